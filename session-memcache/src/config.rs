//! What can be set: servers and their weights, login, time-outs, how waiters ask; from code or from a DSN.
//!
//! What [`Sessions`](https://docs.rs/sessionkit) acts on (time-outs of sessions, codec, hashing of ids) is not in here.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use session_core::{Dsn, Error, ErrorKind, Result};

use crate::joined::Joined;
use crate::pool::Pool;
use crate::store::Store;

const PORT: u16 = 11211;

/// A server. Its `Display` is its address.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemcacheServer {
    /// A name or an address, of one server.
    pub host: String,
    /// 11211 by default.
    pub port: u16,
    /// Its share of the sessions, relative to the other servers'. Default 1.
    pub weight: u32,
}

impl MemcacheServer {
    /// Names a server of weight 1.
    #[must_use]
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), port, weight: 1 }
    }

    /// The same with another weight.
    #[must_use]
    pub fn with_weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }
}

impl fmt::Display for MemcacheServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Where memcached is and how it is used. Every default is meant for production.
///
/// `Debug` shows neither user nor password.
#[non_exhaustive]
#[derive(Clone)]
pub struct MemcacheConfig {
    /// The servers. Default `127.0.0.1:11211`. Every process must have the same ones, by the same names.
    pub servers: Vec<MemcacheServer>,
    /// The user of a server that was started with `-Y`.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<String>,
    /// What stands before the id in every key. Default `session:`.
    pub prefix: Cow<'static, str>,
    /// How long to wait for an answer. Default 2 s.
    pub timeout: Duration,
    /// How long to wait for a connection. Default 1 s.
    pub connect_timeout: Duration,
    /// The shortest pause of a waiter between two questions. Default 1 ms.
    pub poll_min: Duration,
    /// The longest. Default 50 ms.
    pub poll_max: Duration,
    /// Whether the sessions of a server that cannot be reached go to the next one, where they are absent. Default no: they fail.
    pub failover: bool,
    /// Payloads of more bytes are refused. Default what the servers hold: their option `-I`, less what an item has beside it.
    pub max_bytes: Option<usize>,
    /// Whether a lease that has ended no longer writes, even if nobody took over; each write then costs one trip more. Default no:
    /// such a write endangers nothing.
    pub strict_expiry: bool,
}

impl Default for MemcacheConfig {
    fn default() -> Self {
        Self {
            servers: vec![MemcacheServer::new("127.0.0.1", PORT)],
            user: None,
            password: None,
            prefix: "session:".into(),
            timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(1),
            poll_min: Duration::from_millis(1),
            poll_max: Duration::from_millis(50),
            failover: false,
            max_bytes: None,
            strict_expiry: false,
        }
    }
}

impl fmt::Debug for MemcacheConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemcacheConfig")
            .field("servers", &self.servers)
            .field("prefix", &self.prefix)
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("poll_min", &self.poll_min)
            .field("poll_max", &self.poll_max)
            .field("failover", &self.failover)
            .field("max_bytes", &self.max_bytes)
            .field("strict_expiry", &self.strict_expiry)
            .finish_non_exhaustive()
    }
}

impl MemcacheConfig {
    /// The schemes that [`from_dsn`](Self::from_dsn) reads.
    pub const SCHEMES: &[&str] = &["memcache"];

    /// The options of these DSNs beside the common ones.
    pub const OPTIONS: &[&str] = &["weights", "timeout", "connect_timeout", "poll_min", "poll_max", "failover"];

    /// Takes the defaults for `servers`.
    #[must_use]
    pub fn new(servers: impl IntoIterator<Item = MemcacheServer>) -> Self {
        Self { servers: servers.into_iter().collect(), ..Self::default() }
    }

    /// Reads a DSN, with the common options `prefix`, `max_bytes` and `strict_expiry`. The other common options are accepted for
    /// whoever acts on them.
    ///
    /// | DSN | servers |
    /// |---|---|
    /// | `memcache://host:11211` | one |
    /// | `memcache://h1:11211,h2:11211?weights=2,1` | two, of which the first keeps two thirds of the sessions |
    /// | `memcache://user:password@host` | one that was started with `-Y` |
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names what is not accepted and lists what is.
    pub fn from_dsn(dsn: &Dsn) -> Result<Self> {
        for (name, reason) in [
            ("tls", "the client speaks no TLS; put a tunnel beside the application, such as stunnel, and name its end"),
            ("sasl", "SASL belongs to the binary protocol, which cannot keep the promise; start the server with -Y instead"),
        ] {
            if dsn.option(name).is_some() {
                return Err(config(format!("{name}= is not supported by memcache://: {reason}")));
            }
        }
        dsn.accept_options(Self::OPTIONS)?;
        if !Self::SCHEMES.contains(&dsn.scheme()) {
            return Err(config(format!("the scheme {} is not memcache://", dsn.scheme().escape_debug())));
        }
        if let Some("php") = dsn.option("layout") {
            return Err(config("layout=php is not supported by memcache:// in this version; accepted: native"));
        }
        dsn.choice("layout", &[("native", ())])?;
        if dsn.hosts().is_empty() {
            return Err(config("the host is missing; write memcache://host:11211"));
        }
        if !matches!(dsn.path(), "" | "/") {
            return Err(config(
                "memcached has no databases; write memcache://host:11211, and tell applications apart by prefix=",
            ));
        }
        let mut this = Self::new(dsn.hosts().iter().map(|host| server(host)).collect::<Result<Vec<_>>>()?);
        if let Some(weights) = dsn.option("weights") {
            let weights: Option<Vec<u32>> = weights.split(',').map(|weight| weight.parse().ok()).collect();
            let fits = |weights: &Vec<u32>| weights.len() == this.servers.len();
            let Some(weights) = weights.filter(fits) else {
                return Err(dsn.refuse("weights", "a whole number for each server, such as 2,1"));
            };
            for (server, weight) in this.servers.iter_mut().zip(weights) {
                server.weight = weight;
            }
        }
        this.user = dsn.user().filter(|user| !user.is_empty()).map(Into::into);
        this.password = dsn.password().map(Into::into);
        let spans = [
            ("timeout", &mut this.timeout),
            ("connect_timeout", &mut this.connect_timeout),
            ("poll_min", &mut this.poll_min),
            ("poll_max", &mut this.poll_max),
        ];
        for (name, field) in spans {
            if let Some(span) = dsn.duration(name)? {
                *field = span;
            }
        }
        this.failover = dsn.flag("failover")?.unwrap_or(false);
        this.max_bytes = dsn.number("max_bytes", 1..=1 << 30)?.map(|bytes| bytes as usize);
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

    /// The same with user and password.
    #[must_use]
    pub fn with_auth(mut self, user: impl Into<String>, password: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self.password = Some(password.into());
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

    /// The same with other pauses of waiters.
    #[must_use]
    pub fn with_poll(mut self, min: Duration, max: Duration) -> Self {
        self.poll_min = min;
        self.poll_max = max;
        self
    }

    /// The same with or without failover.
    #[must_use]
    pub fn with_failover(mut self, failover: bool) -> Self {
        self.failover = failover;
        self
    }

    /// The same with a limit for payloads of its own.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: usize) -> Self {
        self.max_bytes = Some(max_bytes);
        self
    }

    /// The same, strict about leases that have ended, or not.
    #[must_use]
    pub fn with_strict_expiry(mut self, strict: bool) -> Self {
        self.strict_expiry = strict;
        self
    }

    /// Checks what needs no server.
    fn check(&self) -> Result<()> {
        if !self.prefix.bytes().all(|byte| byte.is_ascii_graphic()) || self.prefix.len() > 128 {
            return Err(config("a prefix has at most 128 visible ASCII characters"));
        }
        if self.servers.is_empty() || self.servers.iter().any(|server| server.host.is_empty()) {
            return Err(config("the host is missing; write memcache://host:11211"));
        }
        let known = |server: &MemcacheServer| {
            self.servers.iter().filter(|other| (&other.host, other.port) == (&server.host, server.port)).count()
        };
        if self.servers.iter().any(|server| known(server) > 1) {
            return Err(config("a server is named twice; give it a greater weight instead"));
        }
        if self.servers.iter().any(|server| !(1..=1000).contains(&server.weight)) {
            return Err(config("a weight is a whole number from 1 to 1000"));
        }
        if self.user.is_some() != self.password.is_some() {
            return Err(config("user and password belong together; write memcache://user:password@host"));
        }
        let plain =
            |word: &Option<String>| word.as_ref().is_none_or(|word| word.bytes().all(|byte| byte.is_ascii_graphic()));
        if !plain(&self.user) || !plain(&self.password) {
            return Err(config("user and password have visible ASCII characters only, as the server's file of them"));
        }
        let bounds = Duration::from_millis(10)..=Duration::from_secs(600);
        if !bounds.contains(&self.timeout) || !bounds.contains(&self.connect_timeout) {
            return Err(config("timeout and connect_timeout have to be between 10ms and 10m"));
        }
        let bounds = Duration::from_millis(1)..=Duration::from_secs(10);
        if !bounds.contains(&self.poll_min) || !bounds.contains(&self.poll_max) || self.poll_min > self.poll_max {
            return Err(config("poll_min and poll_max have to be between 1ms and 10s, and poll_min the smaller one"));
        }
        Ok(())
    }

    /// Connects, and has each server say what it is.
    pub(crate) async fn connect(self) -> Result<Arc<Store>> {
        self.check()?;
        let transport = Joined::new(Pool::new(&self), self.timeout);
        let store = Store::new(Arc::new(transport), self)?;
        store.greet().await?;
        Ok(store)
    }
}

fn server(host: &str) -> Result<MemcacheServer> {
    let wrong = || config("a host has a port that is no port");
    // The DSN has been checked: an IPv6 address stands in brackets.
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']').ok_or_else(wrong)?;
            (address, rest.strip_prefix(':'))
        }
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    Ok(MemcacheServer::new(name, port.map_or(Ok(PORT), str::parse).map_err(|_| wrong())?))
}

fn config(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, "memcache", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MemcacheConfig> {
        MemcacheConfig::from_dsn(&Dsn::parse(text).unwrap())
    }

    #[test]
    fn a_dsn_names_servers_and_options() {
        let one = parse("memcache://h").unwrap();
        assert_eq!(one.servers, [MemcacheServer::new("h", 11211)]);
        assert_eq!((&*one.prefix, one.max_bytes, one.failover), ("session:", None, false));
        let two = parse(
            "memcache://me:s%40t@h1:7000,[::1]:7001/?weights=2,1&prefix=app:&timeout=500ms&connect_timeout=2s\
             &poll_min=2ms&poll_max=20ms&failover=on&max_bytes=99&strict_expiry=on&ttl=20m",
        )
        .unwrap();
        assert_eq!(two.servers, [MemcacheServer::new("h1", 7000).with_weight(2), MemcacheServer::new("::1", 7001)]);
        assert_eq!(two.servers[1].to_string(), "[::1]:7001");
        assert_eq!((two.user.as_deref(), two.password.as_deref()), (Some("me"), Some("s@t")));
        assert_eq!((two.timeout, two.connect_timeout), (Duration::from_millis(500), Duration::from_secs(2)));
        assert_eq!((two.poll_min, two.poll_max), (Duration::from_millis(2), Duration::from_millis(20)));
        assert_eq!((&*two.prefix, two.max_bytes), ("app:", Some(99)));
        assert!(two.failover && two.strict_expiry);
    }

    #[test]
    fn what_is_not_accepted_is_named_and_no_password_is_shown() {
        for (dsn, part) in [
            ("memcache://", "host is missing"),
            ("memcache://h/0", "no databases"),
            ("memcache://me@h", "belong together"),
            ("memcache://me:hunter2%20x@h", "visible ASCII"),
            ("memcache://h,h:11211", "named twice"),
            ("memcache://h1,h2?weights=1", "weights=1 is not a whole number for each server"),
            ("memcache://h?weights=0", "1 to 1000"),
            ("memcache://h?tls=on", "speaks no TLS"),
            ("memcache://h?sasl=on", "-Y"),
            ("memcache://h?timeout=1ms", "10ms"),
            ("memcache://h?poll_min=20ms&poll_max=10ms", "poll_min"),
            ("memcache://h?poll=20ms", "unknown option poll"),
            ("memcache://h?failover=maybe", "on, off"),
            ("memcache://h?prefix=a%20b", "prefix"),
            ("memcache://h?layout=php", "layout=php"),
            ("memcache://h?layout=flat", "native"),
            ("redis://h", "not memcache://"),
        ] {
            let error = parse(dsn).expect_err(dsn);
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(part), "{dsn}: {error}");
            assert!(!error.to_string().contains("hunter2"), "{dsn}: {error}");
        }
        let config = parse("memcache://me:hunter2@h").unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
