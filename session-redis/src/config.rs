//! What can be set: servers, user, database, TLS, time-outs, replicas; from code or from a DSN.
//!
//! What [`Sessions`](https://docs.rs/sessionkit) acts on (time-outs of sessions, codec, hashing of ids) is not in here.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use session_core::{Dsn, Error, ErrorKind, Result};

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// Where the server or servers are.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisServers {
    /// One server, by host and port.
    Tcp {
        /// A name or an address.
        host: String,
        /// 6379 by default.
        port: u16,
    },
    /// One server on this machine, by its socket.
    Unix(PathBuf),
    /// Whoever these sentinels call the master.
    Sentinel {
        /// Hosts and ports of sentinels; one that answers is enough.
        sentinels: Vec<(String, u16)>,
        /// The name of the master.
        master: String,
    },
    /// A Redis Cluster.
    Cluster {
        /// Hosts and ports of some of its servers; one that answers is enough.
        seeds: Vec<(String, u16)>,
    },
}

/// How a waiter learns that it is its turn.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RedisWake {
    /// It has a place in a queue, and is told: first come, first served, and nothing is asked meanwhile.
    #[default]
    Push,
    /// It asks again and again, after 1 ms at first and every 20 ms later, in no order. For servers behind something that does
    /// not let subscriptions through.
    Poll,
}

/// Where Redis is and how it is used. Every default is meant for production.
///
/// `Debug` shows neither user nor password.
#[non_exhaustive]
#[derive(Clone)]
pub struct RedisConfig {
    /// Where the server is. Default `127.0.0.1:6379`.
    pub servers: RedisServers,
    /// The ACL user; without one the server's `default`.
    pub user: Option<String>,
    /// The password.
    pub password: Option<String>,
    /// User and password of the sentinels, which have their own.
    pub sentinel_auth: Option<(Option<String>, String)>,
    /// The number of the database. Default 0; a Cluster has no other.
    pub database: u16,
    /// Whether to speak TLS.
    pub tls: bool,
    /// The certificates, in PEM, of those who may sign the server's; by default what the system trusts.
    pub ca: Option<PathBuf>,
    /// What stands before the id in every key. Default `session:`.
    pub prefix: Cow<'static, str>,
    /// How long to wait for an answer. Default 2 s.
    pub timeout: Duration,
    /// How long to wait for a connection. Default 1 s.
    pub connect_timeout: Duration,
    /// How many replicas must have a change before it counts. Default 0: what the master acknowledged counts, and may be lost
    /// with it.
    pub wait_replicas: u32,
    /// How waiters are woken. Default by a message.
    pub wake: RedisWake,
    /// Payloads of more bytes are refused. Default 16 MiB.
    pub max_bytes: usize,
    /// Whether a lease that has ended no longer writes, even if nobody took over. Default no: such a write endangers nothing.
    pub strict_expiry: bool,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            servers: RedisServers::Tcp { host: "127.0.0.1".into(), port: PORT },
            user: None,
            password: None,
            sentinel_auth: None,
            database: 0,
            tls: false,
            ca: None,
            prefix: "session:".into(),
            timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(1),
            wait_replicas: 0,
            wake: RedisWake::Push,
            max_bytes: Self::DEFAULT_MAX_BYTES,
            strict_expiry: false,
        }
    }
}

impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig")
            .field("servers", &self.servers)
            .field("database", &self.database)
            .field("tls", &self.tls)
            .field("prefix", &self.prefix)
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("wait_replicas", &self.wait_replicas)
            .field("wake", &self.wake)
            .field("max_bytes", &self.max_bytes)
            .field("strict_expiry", &self.strict_expiry)
            .finish_non_exhaustive()
    }
}

impl RedisConfig {
    /// The default of [`max_bytes`](Self::max_bytes): 16 MiB.
    pub const DEFAULT_MAX_BYTES: usize = 16 << 20;

    /// The schemes that [`from_dsn`](Self::from_dsn) reads.
    pub const SCHEMES: &[&str] = &["redis", "rediss", "redis+unix", "redis+sentinel", "redis+cluster"];

    /// The options of these DSNs beside the common ones.
    pub const OPTIONS: &[&str] = &["db", "timeout", "connect_timeout", "wait_replicas", "wake", "tls", "ca"];

    /// Takes the defaults for `servers`.
    #[must_use]
    pub fn new(servers: RedisServers) -> Self {
        Self { servers, ..Self::default() }
    }

    /// Reads a DSN, with the common options `prefix`, `max_bytes` and `strict_expiry`. The other common options are accepted for
    /// whoever acts on them.
    ///
    /// | DSN | server |
    /// |---|---|
    /// | `redis://user:password@host:6379/0` | one |
    /// | `rediss://…` | one, with TLS |
    /// | `redis+unix:///run/redis/redis.sock?db=0` | one on this machine |
    /// | `redis+sentinel://h1:26379,h2,h3/mymaster?db=0` | the master of this name; user and password are the master's |
    /// | `redis+cluster://h1:6379,h2,h3` | a Cluster |
    ///
    /// `tls=on` makes TLS of the last two, `ca=/path.pem` names who may sign.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names what is not accepted and lists what is.
    pub fn from_dsn(dsn: &Dsn) -> Result<Self> {
        dsn.accept_options(Self::OPTIONS)?;
        if let Some("php") = dsn.option("layout") {
            return Err(config("layout=php is not supported by redis:// in this version; accepted: native"));
        }
        dsn.choice("layout", &[("native", ())])?;
        let path = dsn.path();
        let mut this = Self::default();
        match dsn.scheme() {
            "redis" | "rediss" => {
                let host = match dsn.hosts() {
                    [host] => host,
                    [] => return Err(config("the host is missing; write redis://host:6379/0")),
                    _ => {
                        return Err(config(
                            "several hosts are a cluster or its sentinels; write redis+cluster:// or redis+sentinel://",
                        ));
                    }
                };
                let (host, port) = split(host, PORT)?;
                this.servers = RedisServers::Tcp { host, port };
                this.tls = dsn.scheme() == "rediss";
                if let Some(number) = path.strip_prefix('/').filter(|number| !number.is_empty()) {
                    this.database = number.parse().map_err(|_| {
                        config(format!("/{} is not the number of a database; write /0", number.escape_debug()))
                    })?;
                }
            }
            "redis+unix" => {
                if !dsn.hosts().is_empty() || path.len() < 2 {
                    return Err(config(
                        "write three slashes and the path of the socket: redis+unix:///run/redis/redis.sock",
                    ));
                }
                this.servers = RedisServers::Unix(path.into());
            }
            "redis+sentinel" => {
                let sentinels = split_all(dsn, SENTINEL_PORT)?;
                let master = path.trim_start_matches('/');
                if master.is_empty() || master.contains('/') {
                    return Err(config("the name of the master is missing; write redis+sentinel://h1,h2,h3/mymaster"));
                }
                this.servers = RedisServers::Sentinel { sentinels, master: master.into() };
            }
            "redis+cluster" => {
                if !matches!(path, "" | "/" | "/0") {
                    return Err(config("a cluster has only database 0; write redis+cluster://h1,h2,h3"));
                }
                this.servers = RedisServers::Cluster { seeds: split_all(dsn, PORT)? };
            }
            scheme => {
                let accepted = Self::SCHEMES.join("://, ");
                return Err(config(format!("the scheme {} is none of {accepted}://", scheme.escape_debug())));
            }
        }
        if let Some(number) = dsn.number("db", 0..=u64::from(u16::MAX))? {
            let fits = match this.servers {
                RedisServers::Unix(_) | RedisServers::Sentinel { .. } => true,
                RedisServers::Tcp { .. } => this.database == 0 || u64::from(this.database) == number,
                RedisServers::Cluster { .. } => number == 0,
            };
            if !fits {
                return Err(config("db= and the path name different databases, and a cluster has only database 0"));
            }
            this.database = number as u16;
        }
        this.user = dsn.user().filter(|user| !user.is_empty()).map(Into::into);
        this.password = dsn.password().map(Into::into);
        if this.user.is_some() && this.password.is_none() {
            return Err(config(
                "a user without a password; write redis://user:password@host, or :password@ for the default user",
            ));
        }
        if let Some(tls) = dsn.flag("tls")? {
            if this.tls && !tls {
                return Err(config("rediss:// speaks TLS; write redis:// for tls=off"));
            }
            this.tls = tls;
        }
        this.ca = dsn.option("ca").map(Into::into);
        let spans = [("timeout", &mut this.timeout), ("connect_timeout", &mut this.connect_timeout)];
        for (name, field) in spans {
            if let Some(span) = dsn.duration(name)? {
                *field = span;
            }
        }
        if let Some(count) = dsn.number("wait_replicas", 0..=1000)? {
            this.wait_replicas = count as u32;
        }
        if let Some(wake) = dsn.choice("wake", &[("push", RedisWake::Push), ("poll", RedisWake::Poll)])? {
            this.wake = wake;
        }
        if let Some(bytes) = dsn.number("max_bytes", 1..=512 << 20)? {
            this.max_bytes = bytes as usize;
        }
        this.strict_expiry = dsn.flag("strict_expiry")?.unwrap_or(false);
        if let Some(prefix) = dsn.option("prefix") {
            this.prefix = prefix.to_owned().into();
        }
        this.check()?;
        Ok(this)
    }

    /// The same with another prefix.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into().into();
        self
    }

    /// The same with another user and password.
    #[must_use]
    pub fn with_auth(mut self, user: Option<String>, password: impl Into<String>) -> Self {
        self.user = user;
        self.password = Some(password.into());
        self
    }

    /// The same with user and password of the sentinels.
    #[must_use]
    pub fn with_sentinel_auth(mut self, user: Option<String>, password: impl Into<String>) -> Self {
        self.sentinel_auth = Some((user, password.into()));
        self
    }

    /// The same with another database.
    #[must_use]
    pub fn with_database(mut self, database: u16) -> Self {
        self.database = database;
        self
    }

    /// The same with TLS, and with the certificates in PEM of those who may sign the server's, if not the system's.
    #[must_use]
    pub fn with_tls(mut self, ca: Option<PathBuf>) -> Self {
        self.tls = true;
        self.ca = ca;
        self
    }

    /// The same with another limit for answers.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The same with another limit for making a connection.
    #[must_use]
    pub fn with_connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// The same with another number of replicas that must have a change.
    #[must_use]
    pub fn with_wait_replicas(mut self, count: u32) -> Self {
        self.wait_replicas = count;
        self
    }

    /// The same with another way to wake waiters.
    #[must_use]
    pub fn with_wake(mut self, wake: RedisWake) -> Self {
        self.wake = wake;
        self
    }

    /// The same with another limit for payloads.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: usize) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    /// The same, strict about leases that have ended, or not.
    #[must_use]
    pub fn with_strict_expiry(mut self, strict: bool) -> Self {
        self.strict_expiry = strict;
        self
    }

    /// Checks what needs no server.
    pub(crate) fn check(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_graphic() && !"{}|".contains(c);
        if !self.prefix.chars().all(plain) || self.prefix.len() > 128 {
            return Err(config(
                "a prefix has at most 128 visible ASCII characters, without braces, which Redis reads as a hash tag, and without |",
            ));
        }
        let bounds = Duration::from_millis(10)..=Duration::from_secs(600);
        if !bounds.contains(&self.timeout) || !bounds.contains(&self.connect_timeout) {
            return Err(config("timeout and connect_timeout have to be between 10ms and 10m"));
        }
        if self.ca.is_some() && !self.tls {
            return Err(config("ca= names who signs for TLS, which is off; write rediss:// or tls=on"));
        }
        if self.tls && matches!(self.servers, RedisServers::Unix(_)) {
            return Err(config("a socket on this machine has no TLS"));
        }
        if self.tls && cfg!(not(feature = "tls")) {
            return Err(config("TLS needs the Cargo feature tls of session-redis, which is off"));
        }
        Ok(())
    }
}

fn split(host: &str, port: u16) -> Result<(String, u16)> {
    let wrong = || config("a host has a port that is no port");
    // The DSN has been checked: an IPv6 address stands in brackets.
    match host.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']').ok_or_else(wrong)?;
            let port = rest.strip_prefix(':').map_or(Ok(port), str::parse).map_err(|_| wrong())?;
            Ok((address.into(), port))
        }
        None => match host.split_once(':') {
            Some((name, port)) => Ok((name.into(), port.parse().map_err(|_| wrong())?)),
            None => Ok((host.into(), port)),
        },
    }
}

fn split_all(dsn: &Dsn, port: u16) -> Result<Vec<(String, u16)>> {
    if dsn.hosts().is_empty() {
        return Err(config(format!("the hosts are missing; write {}://h1,h2,h3", dsn.scheme())));
    }
    dsn.hosts().iter().map(|host| split(host, port)).collect()
}

fn config(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, "redis", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RedisConfig> {
        RedisConfig::from_dsn(&Dsn::parse(text).unwrap())
    }

    fn hosts(list: &[(&str, u16)]) -> Vec<(String, u16)> {
        list.iter().map(|(host, port)| ((*host).to_owned(), *port)).collect()
    }

    #[test]
    fn every_scheme_names_its_servers() {
        let tcp = parse("redis://me:s%40t@h:7000/3?prefix=app:&timeout=500ms&connect_timeout=2s&max_bytes=99").unwrap();
        assert_eq!(tcp.servers, RedisServers::Tcp { host: "h".into(), port: 7000 });
        assert_eq!((tcp.user.as_deref(), tcp.password.as_deref(), tcp.database), (Some("me"), Some("s@t"), 3));
        assert_eq!((&*tcp.prefix, tcp.max_bytes), ("app:", 99));
        assert_eq!((tcp.timeout, tcp.connect_timeout), (Duration::from_millis(500), Duration::from_secs(2)));
        assert_eq!(parse("redis://[::1]/").unwrap().servers, RedisServers::Tcp { host: "::1".into(), port: 6379 });
        assert_eq!(parse("redis://:pw@h").unwrap().user, None);
        let unix = parse("redis+unix:///run/redis.sock?db=2").unwrap();
        assert_eq!((unix.servers, unix.database), (RedisServers::Unix("/run/redis.sock".into()), 2));
        let sentinel = parse("redis+sentinel://h1,h2:5000/mymaster?db=1&wait_replicas=2").unwrap();
        let sentinels = hosts(&[("h1", 26379), ("h2", 5000)]);
        assert_eq!(sentinel.servers, RedisServers::Sentinel { sentinels, master: "mymaster".into() });
        assert_eq!((sentinel.database, sentinel.wait_replicas), (1, 2));
        let cluster = parse("redis+cluster://h1,h2:7001?strict_expiry=on&ttl=20m").unwrap();
        assert_eq!(cluster.servers, RedisServers::Cluster { seeds: hosts(&[("h1", 6379), ("h2", 7001)]) });
        assert!(cluster.strict_expiry);
        assert_eq!(parse("redis://h?wake=poll").unwrap().wake, RedisWake::Poll);
    }

    #[cfg(feature = "tls")]
    #[test]
    fn tls_is_a_scheme_or_an_option() {
        assert!(parse("rediss://h").unwrap().tls);
        assert!(parse("redis+cluster://h?tls=on&ca=/ca.pem").unwrap().tls);
        assert!(!parse("redis://h").unwrap().tls);
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn tls_names_its_feature() {
        assert!(parse("rediss://h").unwrap_err().to_string().contains("feature tls"));
    }

    #[test]
    fn what_is_not_accepted_is_named_and_no_password_is_shown() {
        for (dsn, part) in [
            ("redis:///0", "host is missing"),
            ("redis://h1,h2/0", "redis+cluster"),
            ("redis://h/zero", "number of a database"),
            ("redis://h/1?db=2", "different databases"),
            ("redis://me@h", "without a password"),
            ("redis://h?wait_replicas=many", "wait_replicas"),
            ("redis://h?wake=shake", "push, poll"),
            ("redis://h?prefix=a{b}", "braces"),
            ("redis://h?timeout=1ms", "10ms"),
            ("redis://h?ca=/x", "tls=on"),
            ("redis://h?layout=php", "layout=php"),
            ("redis://h?layout=flat", "native"),
            ("redis://h?depth=2", "unknown option"),
            ("redis+unix://h/x", "three slashes"),
            ("redis+sentinel://h1", "name of the master"),
            ("redis+sentinel:///m", "hosts are missing"),
            ("redis+cluster://h/3", "only database 0"),
            ("redis+cluster://h?db=3", "only database 0"),
            ("memcache://h", "none of"),
        ] {
            let error = parse(dsn).expect_err(dsn);
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(part), "{dsn}: {error}");
        }
        let config = parse("redis://me:hunter2@h").unwrap().with_sentinel_auth(None, "hunter2");
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
