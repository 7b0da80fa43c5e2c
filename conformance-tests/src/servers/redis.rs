//! A Redis server of its own for each test, standing alone.
//!
//! Nothing here knows keys or scripts of a backend.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use session_core::WriteId;

use super::process::{Port, Program, Server, on_free_ports};
use super::resp::Connection;

const PROGRAM: Program = Program { name: "redis-server", package: "redis-server" };

/// Keeps nothing on disk unless it is told to, and answers on the loopback and on a socket in its directory only.
///
/// The user is ours: a test may close all other doors, and `command` still works.
const SETTINGS: &str = "\
bind 127.0.0.1
unixsocket redis.sock
daemonize no
dir .
save \"\"
appendonly no
enable-debug-command local
";

/// The user that [`Redis::command`] is.
const USER: &str = "conformance";

/// A Redis server.
///
/// Dropping it kills it and removes its data.
pub struct Redis {
    server: Server,
    port: Port,
    password: String,
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("address", &self.address()).field("pid", &self.pid()).finish_non_exhaustive()
    }
}

impl Redis {
    /// Starts a server and returns once it answers. Each option is a line of its configuration file, such as
    /// `"requirepass secret"`, `"maxmemory-policy volatile-lru"`, `"user alice on >secret ~app:* +@all"` or `"appendonly yes"`.
    ///
    /// # Errors
    /// `NotFound` with the name of the package if Redis is not installed; with the server's own words if it does not like an
    /// option.
    pub fn start(options: &[&str]) -> io::Result<Self> {
        on_free_ports(|| {
            let redis = Self::prepare(options)?;
            redis.restart()?;
            Ok(redis)
        })
    }

    fn prepare(options: &[&str]) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("redis-").tempdir()?;
        let port = Port::free()?;
        let random = WriteId::random().map_err(io::Error::other)?.to_bytes();
        let password = random.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut lines = format!("{SETTINGS}port {}\nuser {USER} on >{password} ~* &* +@all\n", port.number());
        for option in options {
            lines.push_str(option);
            lines.push('\n');
        }
        fs::write(directory.path().join("redis.conf"), lines)?;
        let server = Server::new(&PROGRAM, directory, vec!["redis.conf".to_owned()])?;
        Ok(Self { server, port, password })
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

    /// Returns `redis://127.0.0.1:port/0`, without user and password.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://{}/0", self.address())
    }

    /// Returns the path of the socket that it listens on besides.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.server.directory().join("redis.sock")
    }

    /// Returns the directory of its data, which is gone with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.server.directory()
    }

    /// Returns the id of its process, `None` after [`kill`](Self::kill).
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
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

    /// Starts it again, after killing it if it runs, on the same port and with what it has on disk: nothing, or everything that
    /// it has acknowledged if `"appendonly yes"` is among its options. Returns once it answers.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn restart(&self) -> io::Result<()> {
        self.server.spawn()?;
        // Asked on the socket, where nobody else can answer in its place.
        self.server.wait(|| Ok(self.command(&["PING"])? == "PONG"))
    }

    /// Does a command, as a user who may do everything, on a connection of its own, and returns its reply as text: what is absent
    /// as the empty string, the elements of an array as lines.
    ///
    /// # Errors
    /// `Other` with the server's text if it refuses; `TimedOut` if it says nothing for 10 s; otherwise it does not run.
    pub fn command(&self, words: &[&str]) -> io::Result<String> {
        self.connect()?.ask(words)
    }

    /// Begins to write down what commands the server executes.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn monitor(&self) -> io::Result<Monitor> {
        let mut watching = self.connect()?;
        watching.ask(&["MONITOR"])?;
        Ok(Monitor { watching, marking: self.connect()? })
    }

    fn connect(&self) -> io::Result<Connection> {
        Connection::open(&self.socket_path(), USER, &self.password)
    }
}

/// The commands that a server executes, as long as this lives; see [`Redis::monitor`].
#[derive(Debug)]
pub struct Monitor {
    watching: Connection,
    marking: Connection,
}

impl Monitor {
    /// Returns every command that was executed since the last call, or since the beginning: all that were answered before this
    /// call, and some that are executed meanwhile. Each is a line as `MONITOR` writes it:
    /// `1700000000.123456 [0 127.0.0.1:40000] "GET" "color"`. What a script does is there too, as `[0 lua]`, and what
    /// [`Redis::command`] does, but not its logging in.
    ///
    /// # Errors
    /// As [`Redis::command`].
    pub fn lines(&mut self) -> io::Result<Vec<String>> {
        // The server writes commands down in order, so what was before the mark has come when the mark has.
        static MARKS: AtomicU64 = AtomicU64::new(0);
        let mark = format!("{MARK}{}", MARKS.fetch_add(1, Ordering::Relaxed));
        self.marking.ask(&["ECHO", &mark])?;
        let end = format!("\"{mark}\"");
        let mut lines = Vec::new();
        loop {
            let line = self.watching.reply()?;
            if line.ends_with(&end) {
                return Ok(lines);
            }
            let login = line.contains(" unix:") && line.contains(LOGIN);
            // Another monitor's.
            let other = line.contains(MARK);
            if !login && !other {
                lines.push(line);
            }
        }
    }
}

/// A login with a user, as the server shows it.
const LOGIN: &str = r#"] "AUTH" "(redacted)" "(redacted)""#;

/// Begins the marks, which no test would write.
const MARK: &str = "the mark of a conformance monitor ";
