//! What all servers have in common: the program, the account, the port, the directory, and processes that nobody has to remember to
//! stop.
//!
//! Nothing here knows a protocol: a server says what its program needs, and how to ask whether it answers.

use std::cmp::Reverse;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Gid, Pid, Uid, User};
use tempfile::TempDir;
use tokio::net::TcpSocket;

/// How long a server may take until it answers. A machine may be busy; a server that cannot start says so at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often it is asked.
const POLL: Duration = Duration::from_millis(5);

/// How many of the last lines of its log an error shows.
const LOG_LINES: usize = 20;

/// How often a start is tried anew when somebody else has taken the port.
const STARTS: usize = 10;

/// What stands between a server and its orphanhood. The shell becomes the server, so that the server is our own child. Before
/// that it leaves a watchman behind, who reads from a pipe of which only we have the other end: a line means that the server is
/// gone and buried, another one that its directory is gone too, and the end of the pipe that we are. `$0` is the directory, `$1` the
/// [last rites](Server::with_last_rites).
///
/// The watchman has a session of his own. The process group of the server can be killed without him; and when a group with
/// stopped members loses its last parent outside, the kernel sends it a hang-up, which would take him before he has killed a server
/// that stands still.
///
/// What the server has forked may have left its group, so its children are killed by their numbers. A server that is stopped
/// first forks no more, and buries nobody whose number somebody else could have by then.
const KEEPER: &str = r#"
exec 3<&0 </dev/null
rites=$1
shift
( setsid sh -c '
    if read -r word; then
        read -r word && exit
    else
        kill -s STOP "$1"
        for process in $(cat /proc/"$1"/task/*/children) -"$1"; do kill -s KILL -- "$process"; done
    fi
    eval "$2"
    rm -rf -- "$0" || { sleep 1; rm -rf -- "$0"; }
' "$0" $$ "$rites" <&3 3<&- & )
exec "$@" 3<&-
"#;

/// A program, and the Debian package that has it.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: &'static str,
    pub(super) package: &'static str,
}

impl Program {
    /// Finds it.
    ///
    /// # Errors
    /// `NotFound`, with the name of the package.
    pub(super) fn find(&self) -> io::Result<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        // Debian keeps some servers where only root looks, and those of PostgreSQL by version.
        let places = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
        places.chain(postgresql()).map(|place| place.join(self.name)).find(|program| program.is_file()).ok_or_else(|| {
            let Self { name, package } = self;
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("{name} is not installed: install {name} (Debian package {package})"),
            )
        })
    }
}

/// Returns where Debian keeps the programs of PostgreSQL, those of the newest version first.
fn postgresql() -> impl Iterator<Item = PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    newest_first(versions.map(|version| version.path()).collect()).into_iter().map(|version| version.join("bin"))
}

/// Sorts directories whose names are versions; what is no number comes last.
fn newest_first(mut versions: Vec<PathBuf>) -> Vec<PathBuf> {
    versions.sort_by_key(|path| Reverse(path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok())));
    versions
}

/// Who a server is, and who owns its files.
#[derive(Clone, Copy, Debug)]
pub(super) enum Account {
    /// Whoever we are.
    Ours,
    /// Somebody who may do little.
    Other(Uid, Gid),
}

impl Account {
    /// Chooses one for a server that refuses to be root: ours, unless we are root; then the first of these that exists.
    ///
    /// # Errors
    /// `NotFound` if none does.
    pub(super) fn unprivileged(names: &[&str]) -> io::Result<Self> {
        Ok(Self::unprivileged_user(names)?.map_or(Self::Ours, |user| Self::Other(user.uid, user.gid)))
    }

    /// Chooses the same, for a server that wants to be told its name; `None` is ours.
    ///
    /// # Errors
    /// As [`unprivileged`](Self::unprivileged).
    pub(super) fn unprivileged_user(names: &[&str]) -> io::Result<Option<User>> {
        if !Uid::effective().is_root() {
            return Ok(None);
        }
        for name in names {
            if let Some(user) = User::from_name(name)? {
                return Ok(Some(user));
            }
        }
        Err(io::Error::new(io::ErrorKind::NotFound, format!("none of the users {} exists", names.join(", "))))
    }

    /// Makes the file or directory its own.
    pub(super) fn own(self, path: &Path) -> io::Result<()> {
        match self {
            Self::Ours => Ok(()),
            Self::Other(user, group) => chown(path, Some(user.as_raw()), Some(group.as_raw())),
        }
    }

    /// Makes a directory that it can read and write, and nobody else.
    pub(super) fn directory(self, prefix: &str) -> io::Result<TempDir> {
        let only_the_owner = Permissions::from_mode(0o700);
        let directory = tempfile::Builder::new().prefix(prefix).permissions(only_the_owner).tempdir()?;
        self.own(directory.path())?;
        Ok(directory)
    }

    /// Makes the process to come its own.
    pub(super) fn run(self, command: &mut Command) {
        if let Self::Other(user, group) = self {
            command.uid(user.as_raw()).gid(group.as_raw());
        }
    }
}

/// A port of the loopback.
#[derive(Debug)]
pub(super) struct Port {
    address: SocketAddr,
    // Bound and never listening: nobody else is given the port, while the server is down too.
    _reserved: TcpSocket,
}

impl Port {
    pub(super) fn free() -> io::Result<Self> {
        let reserved = TcpSocket::new_v4()?;
        // What lets the server bind it as well, which asks for the same.
        reserved.set_reuseaddr(true)?;
        reserved.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        Ok(Self { address: reserved.local_addr()?, _reserved: reserved })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn number(&self) -> u16 {
        self.address.port()
    }
}

/// Calls `start` until it finds its ports free.
pub(super) fn on_free_ports<T>(mut start: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..STARTS {
        match start() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            other => return other,
        }
    }
    start()
}

/// Asks every few milliseconds until the answer is yes.
///
/// # Errors
/// `TimedOut`, with what was waited for and what was seen last.
pub(super) fn wait_until(what: &str, mut answer: impl FnMut() -> io::Result<Seen>) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let seen = match answer() {
            Ok(Seen::Done) => return Ok(()),
            Ok(Seen::NotYet(seen)) => seen,
            Err(error) => error.to_string(),
        };
        if Instant::now() >= end {
            let text = format!("waited {} s until {what}; last seen: {seen}", PATIENCE.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        sleep(POLL);
    }
}

/// What [`wait_until`] is told.
#[derive(Debug)]
pub(super) enum Seen {
    Done,
    NotYet(String),
}

/// A server: a program with its arguments and a directory, and most of the time a process.
#[derive(Debug)]
pub(super) struct Server {
    program: PathBuf,
    arguments: Vec<String>,
    account: Account,
    last_rites: &'static str,
    // Where in the log the last start begins.
    log_start: AtomicU64,
    process: Mutex<Option<Process>>,
    // After the process: what it writes to is removed when it is gone.
    directory: TempDir,
    // At last: until then somebody else has to remove it if we end.
    watchman: Mutex<Option<Arc<Watchman>>>,
}

impl Server {
    /// Prepares a server that is to run in `directory`, which is its own and removed with it.
    pub(super) fn new(program: &Program, directory: TempDir, arguments: Vec<String>) -> io::Result<Self> {
        Ok(Self::of(program.find()?, directory, arguments))
    }

    /// Does the same with a program that was found elsewhere.
    pub(super) fn of(program: PathBuf, directory: TempDir, arguments: Vec<String>) -> Self {
        Self {
            program,
            arguments,
            account: Account::Ours,
            last_rites: "",
            log_start: AtomicU64::new(0),
            process: Mutex::new(None),
            directory,
            watchman: Mutex::new(None),
        }
    }

    /// Has it run as somebody else, who can write to its directory.
    pub(super) fn run_by(self, account: Account) -> Self {
        Self { account, ..self }
    }

    /// Has a command of the shell done, in its directory, each time that its processes are gone: it removes what they leave behind
    /// elsewhere.
    pub(super) fn with_last_rites(self, last_rites: &'static str) -> Self {
        Self { last_rites, ..self }
    }

    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts the process, after killing the one that runs, and returns at once.
    pub(super) fn spawn(&self) -> io::Result<()> {
        let mut process = self.process();
        // In this order: only then the port is free.
        drop(process.take());
        self.log_start.store(fs::metadata(self.directory().join(LOG)).map_or(0, |log| log.len()), Ordering::Relaxed);
        let new = Process::spawn(self)?;
        *self.watchman.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&new.watchman));
        *process = Some(new);
        Ok(())
    }

    /// Waits until the server answers.
    ///
    /// # Errors
    /// `AddrInUse` if somebody else has its port; otherwise with the end of its log.
    pub(super) fn wait(&self, answers: impl Fn() -> io::Result<bool>) -> io::Result<()> {
        let end = Instant::now() + PATIENCE;
        let name = self.program.file_name().unwrap_or_default().display();
        loop {
            // Looked at first: a server that has ended cannot begin to answer.
            let ended = self.process().as_ref().map_or(Ok(true), Process::is_over)?;
            if !ended && answers().unwrap_or(false) {
                return Ok(());
            }
            let (kind, fact) = match (ended, Instant::now() >= end) {
                (true, _) if self.found_its_port_taken() => (io::ErrorKind::AddrInUse, "finds its port taken"),
                (true, _) => (io::ErrorKind::Other, "ended at once"),
                (false, true) => (io::ErrorKind::TimedOut, "does not answer"),
                (false, false) => {
                    sleep(POLL);
                    continue;
                }
            };
            return Err(io::Error::new(kind, format!("{name} {fact}; the end of its log:\n{}", self.log())));
        }
    }

    /// Returns the id of the process, `None` while there is none.
    pub(super) fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(|process| process.child.id())
    }

    /// Says whether there is a process that does not stand still.
    pub(super) fn is_up(&self) -> bool {
        self.process().as_ref().is_some_and(Process::goes_on)
    }

    /// Stops the process and its children, and returns once they stand still. Their connections stay open, and they say nothing.
    ///
    /// # Errors
    /// `NotConnected` if it does not run.
    pub(super) fn freeze(&self) -> io::Result<()> {
        self.running(|process| {
            process.stop()?;
            let children = process.children();
            signal_all(&children, Signal::SIGSTOP)?;
            wait_until("the children stand still", || {
                let moving = children.iter().find(|child| !matches!(state(**child), None | Some('T' | 'Z')));
                Ok(moving.map_or(Seen::Done, |child| Seen::NotYet(format!("{child} does not"))))
            })
        })
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// `NotConnected` if it does not run.
    pub(super) fn resume(&self) -> io::Result<()> {
        self.running(Process::resume)
    }

    /// Kills the process and its children, frozen or not, and returns once they are gone. A server that does not run stays so.
    pub(super) fn kill(&self) -> io::Result<()> {
        self.process().take().map_or(Ok(()), |mut process| process.end())
    }

    /// Sends a signal that tells it to end, frozen or not, and returns once it has. A server that does not run stays so.
    ///
    /// # Errors
    /// `TimedOut` if it did not; it is killed then.
    pub(super) fn end_by(&self, signal: Signal) -> io::Result<()> {
        let Some(mut process) = self.process().take() else { return Ok(()) };
        process.signal(signal)?;
        process.resume()?;
        wait_until("the server ends", || {
            Ok(if process.is_over()? { Seen::Done } else { Seen::NotYet("it runs".to_owned()) })
        })?;
        process.end()
    }

    fn running(&self, act: impl FnOnce(&Process) -> io::Result<()>) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the server does not run");
        act(self.process().as_ref().ok_or_else(gone)?)
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether it has complained since its start that somebody else has its port.
    pub(super) fn found_its_port_taken(&self) -> bool {
        self.log().contains("ddress already in use")
    }

    /// Returns the end of what the server has printed since its start.
    fn log(&self) -> String {
        let log = fs::read(self.directory().join(LOG)).unwrap_or_default();
        let start = usize::try_from(self.log_start.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        let log = String::from_utf8_lossy(log.get(start..).unwrap_or_default());
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

const LOG: &str = "log";

/// The way to the watchman. A child of ours does not inherit it.
#[derive(Debug)]
struct Watchman(ChildStdin);

impl Watchman {
    fn tell(&self, word: &str) {
        // If he is gone there is nobody to tell.
        let _ = writeln!(&self.0, "{word}");
    }
}

impl Drop for Watchman {
    fn drop(&mut self) {
        self.tell("done");
    }
}

/// A process of a server that does not outlive this value.
#[derive(Debug)]
struct Process {
    child: Child,
    has_ended: bool,
    watchman: Arc<Watchman>,
    directory: PathBuf,
    last_rites: &'static str,
}

impl Process {
    fn spawn(server: &Server) -> io::Result<Self> {
        let directory = server.directory();
        let log = File::options().create(true).append(true).open(directory.join(LOG))?;
        let mut command = Command::new("/bin/sh");
        server.account.run(&mut command);
        let mut child = command
            .args(["-c", KEEPER])
            .arg(directory)
            .arg(server.last_rites)
            .arg(&server.program)
            .args(&server.arguments)
            .current_dir(directory)
            // Its messages are read here.
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            // What a terminal or a test runner sends to our group is meant for us; the server ends after us, at once.
            .process_group(0)
            .spawn()?;
        let watchman = Arc::new(Watchman(child.stdin.take().expect("it was piped")));
        let (directory, last_rites) = (directory.to_owned(), server.last_rites);
        Ok(Self { child, has_ended: false, watchman, directory, last_rites })
    }

    fn is_over(&self) -> io::Result<bool> {
        // Without burying it: the watchman still knows it by its number.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        Ok(waitid(Id::Pid(self.id()), flags)? != WaitStatus::StillAlive)
    }

    fn goes_on(&self) -> bool {
        // Nothing is consumed: a later wait sees the same.
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        matches!(waitid(Id::Pid(self.id()), flags), Ok(WaitStatus::StillAlive))
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        // Not yet buried, so the number cannot belong to anybody else.
        Ok(kill(self.id(), signal)?)
    }

    /// Returns once it stands still, or has ended.
    fn stop(&self) -> io::Result<()> {
        self.signal(Signal::SIGSTOP)?;
        waitid(Id::Pid(self.id()), WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
        Ok(())
    }

    fn resume(&self) -> io::Result<()> {
        // The children first: once the parent goes on, it can bury one of them, and its number can be another's.
        signal_all(&self.children(), Signal::SIGCONT)?;
        self.signal(Signal::SIGCONT)
    }

    /// Returns the processes that it has forked. The numbers are theirs as long as it stands still.
    fn children(&self) -> Vec<Pid> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.id())).into_iter().flatten().flatten();
        let texts = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
        texts
            .flat_map(|text| text.split_whitespace().map(str::parse).collect::<Vec<_>>())
            .flatten()
            .map(Pid::from_raw)
            .collect()
    }

    fn id(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("the id of a process is a positive i32"))
    }

    fn end(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.has_ended, true) {
            return Ok(());
        }
        // With everything that it has forked, in its group or not: a server's child goes on writing when the server is gone.
        self.stop()?;
        let children = self.children();
        // They first: nobody is to see that the parent is gone, and say so.
        signal_all(&children, Signal::SIGKILL)?;
        killpg(self.id(), Signal::SIGKILL)?;
        // Between the two: told before, the watchman would miss our own end; after, he might find the number reused.
        self.watchman.tell("buried");
        self.child.wait()?;
        wait_until("the children are gone", || {
            let left = children.iter().find(|child| !matches!(state(**child), None | Some('Z')));
            Ok(left.map_or(Seen::Done, |child| Seen::NotYet(format!("{child} is not"))))
        })?;
        if !self.last_rites.is_empty() {
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", self.last_rites]).current_dir(&self.directory);
            shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        }
        Ok(())
    }
}

/// Sends a signal to processes that may be gone meanwhile.
fn signal_all(processes: &[Pid], signal: Signal) -> io::Result<()> {
    for process in processes {
        match kill(*process, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Returns the letter that the kernel has for what a process does, `None` if there is no such process.
fn state(process: Pid) -> Option<char> {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before it may contain anything.
    status.rsplit_once(") ")?.1.chars().next()
}

impl Drop for Process {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_versions_the_newest_is_started() {
        let versions = ["9", "9.6", "17", "100"].map(PathBuf::from);
        assert_eq!(newest_first(versions.to_vec()), ["100", "17", "9", "9.6"].map(PathBuf::from));
    }

    #[test]
    fn a_program_that_is_nowhere_is_told_with_its_package() {
        let program = Program { name: "no-such-program", package: "no-such-package" };
        let missing = program.find().expect_err("there is none");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert_eq!(
            missing.to_string(),
            "no-such-program is not installed: install no-such-program (Debian package no-such-package)"
        );
    }
}
