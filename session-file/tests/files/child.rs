//! Tests that need a process of their own: this executable, run again for one function.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::{holders, kept, kills, room};

/// Set in the environment of a child: what it is to do, where.
const ROLE: &str = "SESSION_FILE_TEST_ROLE";
const PLACE: &str = "SESSION_FILE_TEST_PLACE";

/// A child process, killed when it goes out of scope.
pub(crate) struct Worker {
    pub(crate) process: Child,
    lines: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts `role` with `place`, which it splits at `|`.
    pub(crate) fn start(role: &str, place: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["child::plays_its_role", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env(PLACE, place).stdout(Stdio::piped()).stdin(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap());
        Self { process, lines }
    }

    /// The next line that the child said, without the words of the test runner; `None` when it has ended.
    pub(crate) fn line(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some((_, said)) = line.trim_end().split_once('>') {
                return Some(said.to_owned());
            }
        }
    }

    pub(crate) fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.process.id() as i32)
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid(), signal).unwrap();
    }

    /// Stops the child and returns once it stands still.
    pub(crate) fn stop(&self) {
        self.signal(nix::sys::signal::Signal::SIGSTOP);
        let flags = nix::sys::wait::WaitPidFlag::WSTOPPED | nix::sys::wait::WaitPidFlag::WNOWAIT;
        nix::sys::wait::waitid(nix::sys::wait::Id::Pid(self.pid()), flags).unwrap();
    }

    /// Kills the child and reaps it.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Tells the child to go on.
    pub(crate) fn go_on(&mut self) {
        self.process.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The child's side: says a line.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("\n>{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// The child's side: waits for the parent.
pub(crate) fn wait_for_parent() {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).unwrap() == 0 {
        std::process::exit(0);
    }
}

/// Not a test of anything in the parent: in a child that one of the tests has started, this is where it begins.
#[test]
fn plays_its_role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let place = std::env::var(PLACE).unwrap();
    match role.as_str() {
        "write for ever" => kills::write_for_ever(&place),
        "hold" => holders::hold(&place),
        "wait" => holders::wait(&place),
        "count descriptors" => holders::count_descriptors(Path::new(&place)),
        "count threads" => holders::count_threads(Path::new(&place)),
        "run out of descriptors" => kept::run_out_of_descriptors(Path::new(&place)),
        "grow beyond the limit" => room::grow_beyond_the_limit(Path::new(&place)),
        other => panic!("no role {other}"),
    }
}
