//! A Redis server of its own for each test: standing alone, or a part of what `redis_cluster.rs` and `redis_sentinel.rs` build.
//!
//! Nothing here knows keys or scripts of a backend.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use session_core::WriteId;

use super::certificates::{self, CA, SERVER, SERVER_KEY};
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

const CONFIG: &str = "redis.conf";

/// What a server is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// One that stands alone, or follows another.
    Plain,
    /// The same behind TLS.
    Tls,
    /// One of a cluster.
    Node,
    /// One that watches others.
    Sentinel,
}

/// The user that [`Redis::command`] is.
const USER: &str = "conformance";

/// A Redis server.
///
/// Dropping it kills it and removes its data.
pub struct Redis {
    server: Server,
    role: Role,
    port: Port,
    bus: Port,
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
        Self::start_as(Role::Plain, options)
    }

    /// Does the same with a server whose port speaks TLS only. Its certificate is for `localhost` and `127.0.0.1`, and who trusts
    /// [`ca_path`](Self::ca_path) trusts it. It asks its clients for none.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_tls(options: &[&str]) -> io::Result<Self> {
        Self::start_as(Role::Tls, options)
    }

    fn start_as(role: Role, options: &[&str]) -> io::Result<Self> {
        on_free_ports(|| {
            let redis = Self::prepare(role, options)?;
            redis.restart()?;
            Ok(redis)
        })
    }

    /// Makes all but the process.
    pub(super) fn prepare(role: Role, options: &[&str]) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("redis-").tempdir()?;
        let (port, bus) = (Port::free()?, Port::free()?);
        let random = WriteId::random().map_err(io::Error::other)?.to_bytes();
        let password = random.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut lines = vec![SETTINGS.to_owned(), format!("user {USER} on >{password} ~* &* +@all")];
        let mut arguments = vec![CONFIG.to_owned()];
        match role {
            Role::Plain => lines.push(format!("port {}", port.number())),
            Role::Tls => {
                certificates::make(directory.path())?;
                lines.push(format!("port 0\ntls-port {}\ntls-auth-clients no", port.number()));
                lines.push(format!("tls-ca-cert-file {CA}\ntls-cert-file {SERVER}\ntls-key-file {SERVER_KEY}"));
            }
            Role::Node => {
                lines.push(format!("port {}\ncluster-enabled yes\ncluster-port {}", port.number(), bus.number()));
            }
            Role::Sentinel => {
                lines.push(format!("port {}", port.number()));
                arguments.push("--sentinel".to_owned());
            }
        }
        lines.extend(options.iter().map(ToString::to_string));
        fs::write(directory.path().join(CONFIG), lines.join("\n") + "\n")?;
        let server = Server::new(&PROGRAM, directory, arguments)?;
        Ok(Self { server, role, port, bus, password })
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

    /// Returns `redis://127.0.0.1:port/0`, without user and password; `rediss://…` if it was started with TLS.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.role == Role::Tls { "rediss" } else { "redis" };
        format!("{scheme}://{}/0", self.address())
    }

    /// Returns the path of the certificate that a client has to trust, in PEM; `None` if it was started without TLS.
    #[must_use]
    pub fn ca_path(&self) -> Option<PathBuf> {
        (self.role == Role::Tls).then(|| self.server.directory().join(CA))
    }

    /// Returns the port on which the nodes of a cluster speak to each other.
    pub(super) fn bus_port(&self) -> u16 {
        self.bus.number()
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

    /// Starts it again, after killing it if it runs, on the same port and with what it has on disk: nothing, or everything that
    /// it has acknowledged if `"appendonly yes"` is among its options. Returns once it answers.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn restart(&self) -> io::Result<()> {
        self.spawn()?;
        self.wait()
    }

    /// Begins to start it.
    pub(super) fn spawn(&self) -> io::Result<()> {
        self.server.spawn()
    }

    /// Returns once it answers.
    pub(super) fn wait(&self) -> io::Result<()> {
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

    /// Returns what a line of `INFO` or `CLUSTER INFO`, `name:value`, has to say.
    pub(super) fn value(&self, command: &[&str], name: &str) -> io::Result<String> {
        let text = self.command(command)?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.map(str::to_owned).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no {name} in {text}")))
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

    /// Hands a key over to another server, as the nodes of a cluster do.
    pub(super) fn migrate(&self, key: &str, target: &Self) -> io::Result<()> {
        let port = target.port().to_string();
        self.command(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000", "AUTH2", USER, &target.password])?;
        Ok(())
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
