//! What can be set: which database, table, time-outs, connections; from code or from a DSN.
//!
//! What [`Sessions`](https://docs.rs/sessionkit) acts on (time-outs of sessions, codec, hashing of ids) is not in here.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use session_core::{Dsn, Error, ErrorKind, Result};

use crate::database::{Database, Failure, Owner};
use crate::store::Store;

/// Which database.
#[non_exhaustive]
#[derive(Clone, PartialEq, Eq)]
pub enum SqlServer {
    /// PostgreSQL.
    Postgres(SqlAddress),
    /// MySQL or MariaDB.
    MySql(SqlAddress),
    /// SQLite, in the file at this absolute path, on a **local file system only**.
    ///
    /// The file may be the application's own database; it is made to keep a write-ahead log if it does not yet. A new one is for
    /// its owner alone. Beside it stand that log (`-wal`), its index (`-shm`) and an empty file (`-turn`) by which processes take
    /// turns in writing, and see (on Linux) which of them have ended: the locks of a killed one are free within half a second. None
    /// of them may be removed while the database is in use.
    Sqlite(PathBuf),
}

/// What an acknowledged save survives in SQLite. A killed process never costs one, and the file stays whole, at any level.
#[cfg(feature = "sqlite")]
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Killed processes, not power cuts: nobody waits for the disk (`synchronous=NORMAL`). A power cut may take the last saves.
    None,
    /// Power cuts too: what is saved together waits for one sync of the log, as with `synchronous=FULL`; it can be read before that,
    /// but is not acknowledged. Locks do not wait: they need not outlive whoever holds them.
    #[default]
    Data,
}

/// Where a database server is, and who we are there. `Debug` shows neither user nor password.
#[non_exhaustive]
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SqlAddress {
    /// A name or an address.
    pub host: String,
    /// 0 for the usual one: 5432 or 3306.
    pub port: u16,
    /// The path of a socket on this machine, in place of host and port.
    pub socket: Option<PathBuf>,
    /// The user; without one whoever the server takes us for.
    pub user: Option<String>,
    /// The password.
    pub password: Option<String>,
    /// The database.
    pub database: String,
    /// Whether to speak TLS, and nothing else; the certificate has to be for this host. Default no.
    pub tls: bool,
    /// Who may sign for the server, as a file of PEM. Without it those whom this machine trusts.
    pub ca: Option<PathBuf>,
}

impl SqlAddress {
    /// Takes host and database, the usual port, and nobody as user.
    #[must_use]
    pub fn new(host: impl Into<String>, database: impl Into<String>) -> Self {
        Self { host: host.into(), database: database.into(), ..Self::default() }
    }
}

impl fmt::Debug for SqlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlAddress")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("socket", &self.socket)
            .field("database", &self.database)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

impl SqlServer {
    /// Returns the kind of database in one word, for metrics: `postgres`, `mysql`, `sqlite`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Postgres(_) => "postgres",
            Self::MySql(_) => "mysql",
            Self::Sqlite(_) => "sqlite",
        }
    }
}

impl fmt::Debug for SqlServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Postgres(address) => f.debug_tuple("Postgres").field(address).finish(),
            Self::MySql(address) => f.debug_tuple("MySql").field(address).finish(),
            Self::Sqlite(path) => f.debug_tuple("Sqlite").field(path).finish(),
        }
    }
}

/// What keeps others out of a session while it is open.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SqlLockMode {
    /// A token with a deadline in the row of the session. No connection is held while a session is open, and a holder who died keeps
    /// others out until his lease ends, or until the database has noticed that his process is gone.
    #[default]
    Lease,
    /// The same, and beside it an open transaction that holds a row lock, on a connection of its own. Waiters are woken by the database
    /// itself, and a holder who died is out at once. At most [`connections`](SqlConfig::connections()) sessions are open in one process
    /// at a time; an opener who waits counts. PostgreSQL and MySQL or MariaDB only. Processes with either mode can share a table.
    Transaction,
}

/// Which database it is and how it is used. Every default is meant for production.
///
/// `Debug` shows neither user nor password.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct SqlConfig {
    /// Which database.
    pub server: SqlServer,
    /// The table: a name, or a schema and a name with a dot between them, of letters, digits and underscores. Default `sessions`.
    pub table: String,
    /// Whether [`connect`](crate::SqlHandler::connect) makes the table if it is not there. Default no.
    pub create: bool,
    /// What stands before the id in every key. Default nothing.
    pub prefix: Cow<'static, str>,
    /// What keeps others out of a session while it is open. Default [`Lease`](SqlLockMode::Lease).
    pub lock: SqlLockMode,
    /// How many connections there may be for all sessions together, 1 at least; for SQLite the connections that read. Default 8. With
    /// [`SqlLockMode::Transaction`] there may be as many again, one for each session that is open, and the default is 32. Each is
    /// made when it is needed.
    pub connections: Option<u32>,
    /// How long to wait for an answer. Default 5 s.
    pub timeout: Duration,
    /// How long to wait for a connection: a new one, or one that is free. Default 2 s.
    pub connect_timeout: Duration,
    /// Payloads of more bytes are refused. Default 1 MiB.
    pub max_bytes: usize,
    /// Whether a lease that has ended no longer writes, even if nobody took over. Default no: such a write endangers nothing.
    pub strict_expiry: bool,
    /// Whether PostgreSQL tells waiters that it is their turn, on a connection beside the others which also shows that this process
    /// lives. Default yes. Without it waiters look again and again, and the lock of a killed holder ends with its lease. It finds out
    /// by itself where nothing is told, as behind PgBouncer in transaction mode.
    #[cfg(feature = "postgres")]
    pub listen: bool,
    /// What an acknowledged save survives in SQLite. Default power cuts, too; the other databases go by their own settings.
    #[cfg(feature = "sqlite")]
    pub durability: Durability,
}

impl SqlConfig {
    /// The default of [`max_bytes`](Self::max_bytes): 1 MiB.
    pub const DEFAULT_MAX_BYTES: usize = 1 << 20;

    /// The schemes that [`from_dsn`](Self::from_dsn) reads, as far as the features go.
    pub const SCHEMES: &[&str] = &[
        #[cfg(feature = "postgres")]
        "postgres",
        #[cfg(feature = "postgres")]
        "postgresql",
        #[cfg(feature = "mysql")]
        "mysql",
        #[cfg(feature = "mysql")]
        "mariadb",
        #[cfg(feature = "sqlite")]
        "sqlite",
    ];

    /// The options of these DSNs beside the common ones.
    pub const OPTIONS: &[&str] = &[
        "table",
        "create",
        "lock",
        "connections",
        "timeout",
        "connect_timeout",
        "socket",
        "tls",
        "ca",
        #[cfg(feature = "postgres")]
        "wake",
        #[cfg(feature = "sqlite")]
        "durability",
    ];

    /// Takes the defaults for `server`.
    #[must_use]
    pub fn new(server: SqlServer) -> Self {
        Self {
            server,
            table: "sessions".into(),
            create: false,
            prefix: "".into(),
            lock: SqlLockMode::default(),
            connections: None,
            timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            max_bytes: Self::DEFAULT_MAX_BYTES,
            strict_expiry: false,
            #[cfg(feature = "postgres")]
            listen: true,
            #[cfg(feature = "sqlite")]
            durability: Durability::default(),
        }
    }

    /// Reads a DSN, with the common options `prefix`, `max_bytes` and `strict_expiry`. The other common options are accepted for
    /// whoever acts on them.
    ///
    /// | DSN | database |
    /// |---|---|
    /// | `postgres://user:password@host:5432/app?table=sessions` | PostgreSQL |
    /// | `postgres:///app?socket=/run/postgresql` | PostgreSQL on this machine, by its socket |
    /// | `mysql://user:password@host:3306/app` | MySQL or MariaDB |
    /// | `sqlite:///var/lib/app/sessions.db?durability=data` | SQLite |
    ///
    /// `tls=on` speaks TLS with a server, and `ca=/path.pem` names who may sign for it.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names what is not accepted and lists what is.
    pub fn from_dsn(dsn: &Dsn) -> Result<Self> {
        dsn.accept_options(Self::OPTIONS)?;
        if let Some("php") = dsn.option("layout") {
            return Err(config("layout=php is not supported by SQL databases in this version; accepted: native"));
        }
        dsn.choice("layout", &[("native", ())])?;
        let mut this = Self::new(match dsn.scheme() {
            #[cfg(feature = "postgres")]
            "postgres" | "postgresql" => SqlServer::Postgres(address(dsn)?),
            #[cfg(feature = "mysql")]
            "mysql" | "mariadb" => SqlServer::MySql(address(dsn)?),
            #[cfg(feature = "sqlite")]
            "sqlite" => {
                if !dsn.hosts().is_empty() || dsn.path().len() < 2 || dsn.user().is_some() {
                    return Err(config("write three slashes and the path of the file: sqlite:///var/lib/app/sessions.db"));
                }
                if dsn.option("socket").is_some() {
                    return Err(config("socket= is of database servers; SQLite has none"));
                }
                SqlServer::Sqlite(dsn.path().into())
            }
            scheme => {
                let accepted = Self::SCHEMES.join("://, ");
                return Err(config(format!("the scheme {} is none of {accepted}://", scheme.escape_debug())));
            }
        });
        let locks = [("lease", SqlLockMode::Lease), ("transaction", SqlLockMode::Transaction)];
        if let Some(lock) = dsn.choice("lock", &locks)? {
            this.lock = lock;
        }
        if let Some(table) = dsn.option("table") {
            this.table = table.into();
        }
        this.create = dsn.flag("create")?.unwrap_or(false);
        if let Some(prefix) = dsn.option("prefix") {
            this.prefix = prefix.to_owned().into();
        }
        if let Some(count) = dsn.number("connections", 1..=10_000)? {
            this.connections = Some(count as u32);
        }
        let spans = [("timeout", &mut this.timeout), ("connect_timeout", &mut this.connect_timeout)];
        for (name, field) in spans {
            if let Some(span) = dsn.duration(name)? {
                *field = span;
            }
        }
        if let Some(bytes) = dsn.number("max_bytes", 1..=512 << 20)? {
            this.max_bytes = bytes as usize;
        }
        this.strict_expiry = dsn.flag("strict_expiry")?.unwrap_or(false);
        #[cfg(feature = "postgres")]
        if let Some(listen) = dsn.choice("wake", &[("listen", true), ("poll", false)])? {
            if !matches!(this.server, SqlServer::Postgres(_)) {
                return Err(config("wake= is of PostgreSQL; waiters for other databases look again and again"));
            }
            this.listen = listen;
        }
        #[cfg(feature = "sqlite")]
        if let Some(durability) = dsn.choice("durability", &[("none", Durability::None), ("data", Durability::Data)])? {
            if !matches!(this.server, SqlServer::Sqlite(_)) {
                return Err(config("durability= is of SQLite; other databases go by their own settings"));
            }
            this.durability = durability;
        }
        this.check()?;
        Ok(this)
    }

    /// The same with another table.
    #[must_use]
    pub fn with_table(mut self, table: impl Into<String>) -> Self {
        self.table = table.into();
        self
    }

    /// The same with a table that is made if it is not there.
    #[must_use]
    pub fn with_create(mut self, create: bool) -> Self {
        self.create = create;
        self
    }

    /// The same with another prefix.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into().into();
        self
    }

    /// The same with another way to keep others out.
    #[must_use]
    pub fn with_lock(mut self, lock: SqlLockMode) -> Self {
        self.lock = lock;
        self
    }

    /// The same with another number of connections.
    #[must_use]
    pub fn with_connections(mut self, connections: u32) -> Self {
        self.connections = Some(connections);
        self
    }

    /// Returns how many connections there may be, by the default if nothing else is set.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.connections.unwrap_or(match self.lock {
            SqlLockMode::Lease => 8,
            SqlLockMode::Transaction => 32,
        })
    }

    /// The same with another limit for answers.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The same with another limit for connections.
    #[must_use]
    pub fn with_connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// The same with another limit for payloads.
    #[must_use]
    pub fn with_max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// The same with the end of a lease as the end of the right to write, or not.
    #[must_use]
    pub fn with_strict_expiry(mut self, strict: bool) -> Self {
        self.strict_expiry = strict;
        self
    }

    /// The same with waiters who are told, or not.
    #[cfg(feature = "postgres")]
    #[must_use]
    pub fn with_listen(mut self, listen: bool) -> Self {
        self.listen = listen;
        self
    }

    /// The same with another durability.
    #[cfg(feature = "sqlite")]
    #[must_use]
    pub fn with_durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    fn check(&self) -> Result<()> {
        let part = |part: &str| {
            let mut chars = part.chars();
            let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
            first && part.len() <= 63 && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        if self.table.split('.').count() > 2 || !self.table.split('.').all(part) {
            let fact =
                "table= is not a name of letters, digits and underscores, at most 63, with a schema before a dot if need be";
            return Err(config(fact));
        }
        if self.prefix.len() > 200 || !self.prefix.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(config("prefix= may have at most 200 characters, letters, digits and signs of ASCII"));
        }
        if self.lock == SqlLockMode::Transaction && matches!(self.server, SqlServer::Sqlite(_)) {
            let fact = "lock=transaction is not possible on SQLite: a transaction that stays open would lock every session of the file; \
                        take lock=lease, which frees the sessions of a process that died as well";
            return Err(config(fact));
        }
        if let SqlServer::Postgres(address) | SqlServer::MySql(address) = &self.server {
            if address.ca.is_some() && !address.tls {
                return Err(config("ca= names who signs for TLS, which is off; write tls=on"));
            }
            if address.tls && address.socket.is_some() {
                return Err(config("a socket of this machine speaks no TLS; leave out tls= or socket="));
            }
            if address.tls && cfg!(not(feature = "tls")) {
                return Err(config("TLS needs the Cargo feature tls of session-sql, which is off"));
            }
        }
        if self.connections == Some(0) {
            return Err(config("connections= must be 1 at least"));
        }
        if self.timeout < Duration::from_millis(1) || self.connect_timeout < Duration::from_millis(1) {
            return Err(config("timeout= and connect_timeout= must be 1ms at least"));
        }
        Ok(())
    }

    pub(crate) async fn connect(self) -> Result<Arc<Store>> {
        self.check()?;
        let owner = Owner::new()?;
        let connected: Result<Arc<dyn Database>, Failure> = match &self.server {
            #[cfg(feature = "postgres")]
            SqlServer::Postgres(address) => crate::postgres::connect(address, &self, owner).await,
            #[cfg(feature = "mysql")]
            SqlServer::MySql(address) => crate::mysql::connect(address, &self, owner).await,
            #[cfg(feature = "sqlite")]
            SqlServer::Sqlite(path) => crate::sqlite::connect(path, &self, owner).await,
            #[allow(unreachable_patterns, reason = "with every feature there is no other")]
            other => {
                let fact = format!("{} needs a Cargo feature of session-sql that is off", other.name());
                Err(Failure::new(ErrorKind::Config, fact))
            }
        };
        let database = connected.map_err(|failure| failure.into_error("connect"))?;
        self.begin(database).await
    }

    /// Does the same over what `connect` makes.
    #[cfg(any(feature = "postgres", feature = "mysql"))]
    pub(crate) async fn connect_by(
        self,
        connect: impl FnOnce(&Self, Owner) -> Result<Arc<dyn Database>>,
    ) -> Result<Arc<Store>> {
        self.check()?;
        let database = connect(&self, Owner::new()?)?;
        self.begin(database).await
    }

    async fn begin(self, database: Arc<dyn Database>) -> Result<Arc<Store>> {
        if self.lock == SqlLockMode::Transaction && database.clone().transactions().is_none() {
            return Err(config("lock=transaction is not possible on this database; take lock=lease"));
        }
        let create = self.create;
        let store = Store::new(database, self);
        if create {
            store.create_table().await.map_err(|failure| failure.into_error("create the table"))?;
        }
        store.check().await.map_err(|failure| failure.into_error("connect"))?;
        // Now, so that the first session that is opened has a holder who can be asked for.
        store.database.show_life().await;
        Ok(store)
    }
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
fn address(dsn: &Dsn) -> Result<SqlAddress> {
    let mut address = SqlAddress {
        socket: dsn.option("socket").map(Into::into),
        tls: dsn.flag("tls")?.unwrap_or(false),
        ca: dsn.option("ca").map(Into::into),
        ..SqlAddress::default()
    };
    match dsn.hosts() {
        [] if address.socket.is_some() => {}
        [] => return Err(config(format!("the host is missing; write {}://user:password@host/database", dsn.scheme()))),
        [host] => {
            (address.host, address.port) = match host.rsplit_once(':') {
                Some((host, port)) if !port.contains(']') => {
                    let port = port.parse().map_err(|_| config("the port is not a number between 1 and 65535"))?;
                    (host.into(), port)
                }
                _ => (host.clone(), 0),
            };
        }
        _ => return Err(config("several hosts are not supported; name the one that takes writes")),
    }
    address.database = dsn.path().trim_start_matches('/').into();
    if address.database.is_empty() || address.database.contains('/') {
        return Err(config(format!("the database is missing; write {}://user:password@host/database", dsn.scheme())));
    }
    address.user = dsn.user().filter(|user| !user.is_empty()).map(Into::into);
    address.password = dsn.password().map(Into::into);
    Ok(address)
}

fn config(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, "dsn", message)
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SqlConfig> {
        SqlConfig::from_dsn(&Dsn::parse(text)?)
    }

    #[test]
    fn a_power_cut_takes_no_session_of_sqlite_unless_that_is_asked_for() {
        assert_eq!(parse("sqlite:///srv/s.db").unwrap().durability, Durability::Data);
        let config = parse("sqlite:///srv/s.db?durability=none&table=main.visits&create=on&connections=3").unwrap();
        assert_eq!(config.durability, Durability::None);
        assert_eq!((config.table.as_str(), config.create, config.connections), ("main.visits", true, Some(3)));
        assert_eq!(config.server, SqlServer::Sqlite("/srv/s.db".into()));
    }

    #[test]
    fn what_sqlite_does_not_have_is_refused_by_name() {
        for (text, said) in [
            ("sqlite:///srv/s.db?durability=full", "none, data"),
            ("sqlite:///srv/s.db?socket=/run", "socket="),
            ("sqlite:///srv/s.db?lock=transaction", "lock every session"),
            ("sqlite://srv/s.db", "three slashes"),
            ("sqlite://", "three slashes"),
            ("sqlite:///srv/s.db?table=a.b.c", "table="),
            ("sqlite:///srv/s.db?connections=0", "connections"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config, "{text}");
            assert!(error.to_string().contains(said), "{text}: {error}");
        }
    }
}
