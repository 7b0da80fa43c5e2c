//! A memcached server of its own for each test, in the version that the machine has or in a newer one.
//!
//! Nothing here knows keys of a backend.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::memcached_wire::{MemcachedConnection, MemcachedItem, PATIENCE};
use super::process::{Account, Port, Program, Server, on_free_ports};
use super::sql::{NAME, PASSWORD};

const PROGRAM: Program = Program { name: "memcached", package: "memcached" };

/// Who the server becomes if we are root, which it refuses to stay: the one of Debian's package, or anybody.
const ACCOUNTS: &[&str] = &["memcache", "nobody"];

/// From this version on a client can say what the number of a change is to be.
const NEWER: [u32; 3] = [1, 6, 27];

/// Where the newer one lies in the target directory if the machine's own is older.
const UNPACKED: &str = "memcached/memcached";

/// How long one may be silent that is just starting, before it is asked again.
const SHORT: Duration = Duration::from_millis(200);

/// Who may come in, a line each.
const LOGINS: &str = "logins";

/// A memcached server. Its memory is its data: one that is started again is empty.
///
/// Dropping it kills it.
pub struct Memcached {
    server: Server,
    port: Port,
    login: Option<(&'static str, &'static str)>,
}

impl fmt::Debug for Memcached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memcached").field("address", &self.address()).field("pid", &self.pid()).finish_non_exhaustive()
    }
}

impl Memcached {
    /// Starts the one that the machine has, and returns once it answers. Each option is one of its command line, such as `"-m 2"`
    /// (megabytes), `"-I 2m"` (the largest item) or `"-o no_lru_crawler"`.
    ///
    /// # Errors
    /// `NotFound` with the name of the package if memcached is not installed; with the server's own words if it does not like an
    /// option.
    pub fn start(options: &[&str]) -> io::Result<Self> {
        Self::start_as(&PROGRAM.find()?, options, None)
    }

    /// Does the same with one of version 1.6.27 or newer, which takes the number of a change from its client (the flag `E`): the
    /// machine's own, or the one that `cargo xtask test` has unpacked.
    ///
    /// # Errors
    /// `NotFound` if neither is there, and how it comes there; otherwise as [`start`](Self::start).
    pub fn start_newer(options: &[&str]) -> io::Result<Self> {
        Self::start_as(&newer()?, options, None)
    }

    /// Does what [`start`](Self::start) does, with a server that lets nobody in who does not say the password of
    /// [`url`](Self::url) first.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with_password(options: &[&str]) -> io::Result<Self> {
        Self::start_as(&PROGRAM.find()?, options, Some((NAME, PASSWORD)))
    }

    fn start_as(program: &Path, options: &[&str], login: Option<(&'static str, &'static str)>) -> io::Result<Self> {
        on_free_ports(|| {
            let memcached = Self::prepare(program.to_owned(), options, login)?;
            memcached.restart()?;
            Ok(memcached)
        })
    }

    /// Makes all but the process.
    fn prepare(program: PathBuf, options: &[&str], login: Option<(&'static str, &'static str)>) -> io::Result<Self> {
        let user = Account::unprivileged_user(ACCOUNTS)?;
        let account = user.as_ref().map_or(Account::Ours, |user| Account::Other(user.uid, user.gid));
        let (directory, port) = (account.directory("memcached-")?, Port::free()?);
        let mut arguments = words(&["-l 127.0.0.1", "-U 0"]);
        arguments.extend(["-p".to_owned(), port.number().to_string()]);
        // By its own means, and not by ours: it is started where only we may be able to reach it.
        arguments.extend(user.into_iter().flat_map(|user| ["-u".to_owned(), user.name]));
        if let Some((user, password)) = login {
            let file = directory.path().join(LOGINS);
            fs::write(&file, format!("{user}:{password}\n"))?;
            account.own(&file)?;
            arguments.extend(["-Y".to_owned(), LOGINS.to_owned()]);
        }
        arguments.extend(words(options));
        Ok(Self { server: Server::of(program, directory, arguments), port, login })
    }

    /// Returns the port that it listens on, the same for life.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Returns the address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Returns `memcache://127.0.0.1:port`, with user and password if it wants them.
    #[must_use]
    pub fn url(&self) -> String {
        let login = self.login.map_or_else(String::new, |(user, password)| format!("{user}:{password}@"));
        format!("memcache://{login}{}", self.address())
    }

    /// Returns its directory, which is gone with it, and in which there is nothing but its log.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.server.directory()
    }

    /// Returns the id of its process, `None` after [`kill`](Self::kill) and [`stop`](Self::stop).
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// Says whether it runs and is not frozen.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.server.is_up()
    }

    /// Stops it, as a suspended machine or an overloaded host does, and returns once it stands still: connections stay open, new
    /// ones are accepted, and nothing is answered. It can be killed and dropped like this.
    ///
    /// # Errors
    /// `NotConnected` if it does not run.
    pub fn freeze(&self) -> io::Result<()> {
        self.server.freeze()
    }

    /// Ends a [`freeze`](Self::freeze).
    ///
    /// # Errors
    /// `NotConnected` if it does not run.
    pub fn resume(&self) -> io::Result<()> {
        self.server.resume()
    }

    /// Kills it, and returns once it is gone. Its port refuses connections and is given to nobody else. One that does not run
    /// stays so.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn kill(&self) -> io::Result<()> {
        self.server.kill()
    }

    /// Tells it to end, frozen or not, as an administrator does, and returns once it has. One that does not run stays so.
    ///
    /// # Errors
    /// `TimedOut` if it does not; it is killed then.
    pub fn stop(&self) -> io::Result<()> {
        self.server.end_by(Signal::SIGTERM)
    }

    /// Starts it again, after killing it if it runs, on the same port and empty. Returns once it answers.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn restart(&self) -> io::Result<()> {
        self.server.spawn()?;
        self.server.wait(|| {
            // It has no socket besides, on which nobody else could answer, or say nothing, in its place.
            let pid = MemcachedConnection::open(self.address(), self.login, SHORT)?.stats("")?.remove("pid");
            Ok(pid.is_some() && pid == self.pid().map(|pid| pid.to_string()))
        })
    }

    /// Returns its version, such as `1.6.18`.
    ///
    /// # Errors
    /// As [`MemcachedConnection::ask`].
    pub fn version(&self) -> io::Result<String> {
        let line = self.command("version")?;
        Ok(line.strip_prefix("VERSION ").unwrap_or(&line).to_owned())
    }

    /// Sends a line on a connection of its own and returns the line of the answer; see [`MemcachedConnection::ask`].
    ///
    /// # Errors
    /// As [`MemcachedConnection::ask`].
    pub fn command(&self, line: &str) -> io::Result<String> {
        self.connect()?.ask(line)
    }

    /// Returns an item, `None` if it is absent.
    ///
    /// # Errors
    /// As [`MemcachedConnection::ask`].
    pub fn get(&self, key: &str) -> io::Result<Option<MemcachedItem>> {
        self.connect()?.get(key)
    }

    /// Returns the keys of all items that are there, in no order.
    ///
    /// # Errors
    /// As [`MemcachedConnection::ask`].
    pub fn keys(&self) -> io::Result<Vec<String>> {
        self.connect()?.keys()
    }

    /// Returns what it counts; see [`MemcachedConnection::stats`].
    ///
    /// # Errors
    /// As [`MemcachedConnection::ask`].
    pub fn stats(&self, group: &str) -> io::Result<BTreeMap<String, String>> {
        self.connect()?.stats(group)
    }

    /// Connects, and says the password if there is one.
    ///
    /// # Errors
    /// As [`MemcachedConnection::ask`].
    pub fn connect(&self) -> io::Result<MemcachedConnection> {
        MemcachedConnection::open(self.address(), self.login, PATIENCE)
    }
}

fn words(options: &[&str]) -> Vec<String> {
    options.iter().flat_map(|option| option.split_whitespace()).map(str::to_owned).collect()
}

/// Finds one that is new enough.
fn newer() -> io::Result<PathBuf> {
    if let Ok(own) = PROGRAM.find()
        && version_of(&own)? >= Some(NEWER)
    {
        return Ok(own);
    }
    let executable = std::env::current_exe()?;
    executable.ancestors().map(|place| place.join(UNPACKED)).find(|path| path.is_file()).ok_or_else(|| {
        let [major, minor, patch] = NEWER;
        io::Error::new(
            io::ErrorKind::NotFound,
            format!(
                "memcached {major}.{minor}.{patch} or newer is not there: install it, or have `cargo xtask test` unpack it"
            ),
        )
    })
}

/// Asks a program for its version, `None` if it says something else.
fn version_of(program: &Path) -> io::Result<Option<[u32; 3]>> {
    let output = Command::new(program).arg("-V").stdin(Stdio::null()).output()?;
    Ok(version_in(&String::from_utf8_lossy(&output.stdout)))
}

fn version_in(text: &str) -> Option<[u32; 3]> {
    let mut numbers = text.trim().strip_prefix("memcached ")?.split('.').map(|number| number.parse().ok());
    Some([numbers.next()??, numbers.next()??, numbers.next()??])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version_in("memcached 1.6.18\n"), Some([1, 6, 18]));
        assert!(version_in("memcached 1.6.9") < Some(NEWER) && version_in("memcached 1.10.0") > Some(NEWER));
        assert_eq!(version_in("memcached of mine"), None);
    }
}
