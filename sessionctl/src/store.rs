//! From words on the command line to a store, and to a place of its own inside one.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use session_core::{Dsn, Error, ErrorKind, OpenRequest, SessionAdmin, SessionHandler, SessionId, SessionLock, WriteId};
use sessionkit::{Sessions, file, memcache, redis, sql};
use tempfile::TempDir;

use crate::failure::Failure;

/// How many sessions are listed at a time.
pub(crate) const PAGE: NonZeroU32 = NonZeroU32::new(1000).unwrap();

/// Reads an id, without repeating a wrong one: it may be a right one with a letter missing.
pub(crate) fn session_id(text: &str) -> Result<SessionId, Failure> {
    SessionId::parse(text).ok_or_else(|| {
        Failure::usage(format!(
            "ID is not a session id: {} characters, expected {} to {} of A-Z a-z 0-9 , -",
            text.chars().count(),
            SessionId::MIN_LEN,
            SessionId::MAX_LEN
        ))
    })
}

pub(crate) async fn connect(dsn: &str) -> Result<Sessions, Failure> {
    Ok(sessionkit::connect(dsn).await?)
}

/// Returns what administrators may do with the store itself, below all layers.
pub(crate) fn admin(handler: &Arc<dyn SessionHandler>) -> Result<&dyn SessionAdmin, Failure> {
    handler.admin().ok_or_else(|| Failure::usage("this store cannot be listed"))
}

/// Opens the lock of the store of `dsn`, to be used alone.
///
/// # Errors
/// [`Unsupported`](ErrorKind::Unsupported) if it has none; otherwise as [`sessionkit::handler`].
pub(crate) async fn lock(dsn: &str) -> session_core::Result<Arc<dyn SessionLock>> {
    let parsed = Dsn::parse(dsn)?;
    match parsed.scheme() {
        "file" => Ok(Arc::new(file::FileLock::open_dir(file::FileConfig::from_dsn(&parsed)?)?)),
        scheme if memcache::MemcacheConfig::SCHEMES.contains(&scheme) => {
            Ok(Arc::new(memcache::MemcacheLock::connect(memcache::MemcacheConfig::from_dsn(&parsed)?).await?))
        }
        scheme if redis::RedisConfig::SCHEMES.contains(&scheme) => {
            Ok(Arc::new(redis::RedisLock::connect(redis::RedisConfig::from_dsn(&parsed)?).await?))
        }
        scheme if sql::SqlConfig::SCHEMES.contains(&scheme) => {
            Ok(Arc::new(sql::SqlLock::connect(sql::SqlConfig::from_dsn(&parsed)?).await?))
        }
        _ => Err(Error::new(ErrorKind::Unsupported, "lock", "this store has no lock that could be used alone")),
    }
}

/// A place of its own in the store that a DSN names, for measurements and cases.
#[derive(Debug)]
pub(crate) enum Place {
    /// Every connection is a store of its own already.
    Memory,
    /// A fresh directory inside the given one, removed when this is dropped.
    Directory(OwnDirectory, FileDsn),
    /// A prefix of its own on a server; what is stored under it is removed with [`Stores::sweep`].
    Prefix(ServerDsn),
}

impl Place {
    /// Makes a place in the store of `dsn`.
    pub(crate) async fn new(dsn: &str, purpose: &str) -> Result<Self, Failure> {
        // Opened once as it stands, so that a mistake in it is reported as what it is.
        sessionkit::handler(dsn).await?;
        let parsed = Dsn::parse(dsn)?;
        match parsed.scheme() {
            "memory" => Ok(Self::Memory),
            "file" => {
                let directory = tempfile::Builder::new()
                    .prefix(&format!(".sessionctl-{purpose}-"))
                    .tempdir_in(parsed.path())
                    .map_err(Failure::local("make a directory of our own in the store"))?;
                let query = dsn.split_once('?').map(|(_, query)| query.to_owned());
                Ok(Self::Directory(OwnDirectory(directory), FileDsn { query }))
            }
            _ => {
                let random = WriteId::random()?.to_bytes();
                let random: String = random[..4].iter().map(|byte| format!("{byte:02x}")).collect();
                Ok(Self::Prefix(ServerDsn::new(dsn)?.within(&format!("sessionctl-{purpose}-{random}:"))))
            }
        }
    }

    /// Returns how to name stores in this place, if other processes can reach them.
    pub(crate) fn stores(&self) -> Option<Stores> {
        match self {
            Self::Memory => None,
            Self::Directory(directory, options) => {
                Some(Stores::Directories { root: directory.path().to_owned(), options: options.clone() })
            }
            Self::Prefix(server) => Some(Stores::Prefixes(server.clone())),
        }
    }
}

/// A directory that goes when this is dropped, also if somebody is still writing in it: a command that is told to end is dropped where it
/// stands, and a file that one of its threads makes behind the back of the removal would keep the directory.
#[derive(Debug)]
pub(crate) struct OwnDirectory(TempDir);

impl OwnDirectory {
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for OwnDirectory {
    fn drop(&mut self) {
        for _ in 0..200 {
            match std::fs::remove_dir_all(self.path()) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => std::thread::sleep(Duration::from_millis(1)),
                _ => break,
            }
        }
    }
}

/// Names stores in a place, in whatever process.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) enum Stores {
    Directories { root: PathBuf, options: FileDsn },
    Prefixes(ServerDsn),
}

impl Stores {
    /// Returns the DSN of the store `name`, which may hold a password.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if a directory's name is not UTF-8.
    pub(crate) fn dsn(&self, name: &str) -> session_core::Result<String> {
        match self {
            Self::Directories { root, options } => options.at(&root.join(name)),
            Self::Prefixes(server) => Ok(server.within(&format!("{name}:")).text()),
        }
    }

    /// Returns the DSN of a store that shares nothing with the others: in a database a table of its own, which is made when it is
    /// opened, because collecting goes through all of a table.
    ///
    /// # Errors
    /// As [`dsn`](Self::dsn).
    pub(crate) fn apart(&self, name: &str) -> session_core::Result<String> {
        match self {
            Self::Prefixes(server) if server.is_sql() => Ok(server.in_table(name)),
            _ => self.dsn(name),
        }
    }

    /// Returns the server of these stores, if it is one that speaks plain TCP, so that a proxy can stand before it.
    pub(crate) fn server(&self) -> Option<String> {
        match self {
            Self::Directories { .. } => None,
            Self::Prefixes(server) => server.plain_tcp(),
        }
    }

    /// Returns the shortest lease that such a store can keep.
    pub(crate) fn tick(&self) -> Duration {
        match self {
            Self::Directories { .. } => Duration::from_millis(50),
            // Its server counts seconds.
            Self::Prefixes(server) if server.is_memcache() => Duration::from_secs(1),
            // There is a network between.
            Self::Prefixes(_) => Duration::from_millis(100),
        }
    }

    /// Returns the same stores, reached through a proxy at `address`.
    pub(crate) fn through(&self, address: SocketAddr) -> Self {
        match self {
            Self::Directories { .. } => self.clone(),
            Self::Prefixes(server) => Self::Prefixes(server.through(address)),
        }
    }

    /// Removes the store `name` that was [apart](Self::apart).
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) async fn sweep_apart(&self, name: &str) -> Result<(), Failure> {
        match self {
            Self::Prefixes(server) if server.is_sql() => crate::bench::drop_table(&server.in_table(name)).await,
            _ => Ok(self.sweep(name).await?),
        }
    }

    /// Removes the sessions of the store `name`, as far as a contract allows that knows no store to remove as a whole: what is
    /// listed is destroyed. Traces, and locks of the dead, expire; a database frees their rows with its next gc, which is not called
    /// for them here, as it would go through everybody's sessions. A directory goes with its place.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) async fn sweep(&self, name: &str) -> session_core::Result<()> {
        if matches!(self, Self::Directories { .. }) {
            return Ok(());
        }
        let handler = sessionkit::handler(&self.dsn(name)?).await?;
        let Some(admin) = handler.admin() else { return Ok(()) };
        let mut after = None;
        loop {
            let page = admin.list(after.as_ref(), PAGE).await?;
            for session in &page.sessions {
                let mut opened = handler.open(&session.id, &OpenRequest::destroy()).await?;
                opened.destroy().await?;
                opened.close().await?;
            }
            after = Some(match page.next {
                Some(next) => next,
                None => return Ok(()),
            });
        }
    }
}

/// A DSN of a server, to be used with other prefixes and other addresses.
#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct ServerDsn {
    scheme: String,
    /// With its colon and its `@`, or empty.
    login: String,
    hosts: String,
    path: String,
    /// Without the prefix.
    options: Vec<String>,
    prefix: String,
}

/// What a backend puts before every key unless it is told otherwise. A user of the server may be allowed no other keys.
fn default_prefix(scheme: &str) -> &'static str {
    if sql::SqlConfig::SCHEMES.contains(&scheme) { "" } else { "session:" }
}

/// The schemes of one server in plain TCP, and their ports.
const PLAIN_TCP: &[(&str, u16)] =
    &[("memcache", 11211), ("redis", 6379), ("postgres", 5432), ("postgresql", 5432), ("mysql", 3306), ("mariadb", 3306)];

impl ServerDsn {
    fn new(dsn: &str) -> session_core::Result<Self> {
        let parsed = Dsn::parse(dsn)?;
        let (scheme, rest) = dsn.split_once("://").unwrap_or_default();
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = place.find('/').map_or((place, ""), |slash| place.split_at(slash));
        let (login, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
        // Names may be written in more than one way, which the parser knows.
        let is_prefix = |option: &str| {
            Dsn::parse(&format!("{scheme}://?{option}")).is_ok_and(|parsed| parsed.option("prefix").is_some())
        };
        let options = query.split('&').filter(|option| !option.is_empty() && !is_prefix(option));
        Ok(Self {
            scheme: scheme.to_owned(),
            login: login.to_owned(),
            hosts: hosts.to_owned(),
            path: path.to_owned(),
            options: options.map(Into::into).collect(),
            prefix: parsed.option("prefix").unwrap_or(default_prefix(scheme)).to_owned(),
        })
    }

    /// Returns the DSN of what stands under `name` within this prefix.
    fn within(&self, name: &str) -> Self {
        Self { prefix: format!("{}{name}", self.prefix), ..self.clone() }
    }

    /// Returns the DSN of a table whose name nobody else has; only for databases.
    fn in_table(&self, name: &str) -> String {
        let parsed = |option: &str| Dsn::parse(&format!("{}://?{option}", self.scheme));
        let is_other = |option: &String| {
            parsed(option).is_ok_and(|parsed| parsed.option("table").is_none() && parsed.option("create").is_none())
        };
        let mut options: Vec<_> = self.options.iter().filter(|option| is_other(option)).cloned().collect();
        let own: String = self.prefix.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        // A name may have 63 characters, and the end of the prefix is what nobody else has.
        let own = &own[own.len().saturating_sub(48)..];
        options.extend([format!("table=s_{own}{name}"), "create=on".to_owned()]);
        Self { options, ..self.clone() }.text()
    }

    fn is_sql(&self) -> bool {
        sql::SqlConfig::SCHEMES.contains(&self.scheme.as_str())
    }

    fn is_memcache(&self) -> bool {
        memcache::MemcacheConfig::SCHEMES.contains(&self.scheme.as_str())
    }

    fn through(&self, address: SocketAddr) -> Self {
        Self { hosts: address.to_string(), ..self.clone() }
    }

    /// Returns `host:port`, unless there are several, or they do not speak plain TCP, or flights are not what the user of this lock
    /// saves: one in a transaction that stays open takes two of them.
    fn plain_tcp(&self) -> Option<String> {
        let (_, port) = PLAIN_TCP.iter().find(|(scheme, _)| *scheme == self.scheme)?;
        let parsed = Dsn::parse(&self.text()).ok()?;
        match parsed.hosts() {
            _ if parsed.flag("tls").ok()? == Some(true) => None,
            _ if parsed.option("lock") == Some("transaction") => None,
            [host] if host.rfind(':') > host.rfind(']') => Some(host.clone()),
            [host] => Some(format!("{host}:{port}")),
            _ => None,
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{}://{}{}{}?prefix=", self.scheme, self.login, self.hosts, self.path);
        percent(&mut text, &self.prefix);
        for option in &self.options {
            text.push('&');
            text.push_str(option);
        }
        text
    }
}

impl fmt::Debug for ServerDsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact(&self.text()))
    }
}

/// The options of a `file://` DSN, to be used with other directories.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct FileDsn {
    query: Option<String>,
}

impl FileDsn {
    /// No options at all.
    pub(crate) fn plain() -> Self {
        Self { query: None }
    }

    /// Returns the DSN of `directory` with these options.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if its name is not UTF-8.
    pub(crate) fn at(&self, directory: &Path) -> session_core::Result<String> {
        let not_text = || Error::new(ErrorKind::Config, "dsn", "the name of the directory is not UTF-8");
        let path = directory.to_str().ok_or_else(not_text)?;
        let mut dsn = String::from("file://");
        percent(&mut dsn, path);
        if let Some(query) = &self.query {
            dsn.push('?');
            dsn.push_str(query);
        }
        Ok(dsn)
    }
}

/// Appends `text` to a DSN, with what could have a meaning there escaped.
fn percent(dsn: &mut String, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'/' | b'-' | b'_' | b'.' | b'~' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => dsn.push(byte.into()),
            _ => dsn.push_str(&format!("%{byte:02X}")),
        }
    }
}

/// Takes user and password out of whatever in `text` looks like a DSN.
pub(crate) fn redact(text: &str) -> String {
    let Some(start) = text.find("://").map(|place| place + 3) else { return text.into() };
    // An @ that should have been written as %40 must not show what stands before it, so the last one counts.
    match text[start..].rfind('@') {
        Some(at) => format!("{}***{}", &text[..start], &text[start + at..]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_our_own_goes_while_somebody_writes_in_it() {
        for _ in 0..5 {
            let directory = OwnDirectory(tempfile::tempdir().unwrap());
            let path = directory.path().to_owned();
            let (begun, waits) = std::sync::mpsc::channel();
            let writers = (0..4).map(|writer| {
                let (path, begun) = (path.clone(), begun.clone());
                std::thread::spawn(move || {
                    let write = |n: &u32| std::fs::write(path.join(format!("{writer}-{n}")), "").is_ok();
                    (0..500).take_while(write).for_each(|_| begun.send(()).unwrap_or(()));
                })
            });
            let writers: Vec<_> = writers.collect();
            waits.recv().unwrap();
            drop(directory);
            assert!(!path.exists());
            writers.into_iter().for_each(|writer| writer.join().unwrap());
        }
    }

    #[test]
    fn another_directory_keeps_the_options_and_survives_odd_names() {
        let dsn = FileDsn { query: Some("depth=2&prefix=a%26".into()) }.at(Path::new("/tmp/a b?é#%")).unwrap();
        let parsed = Dsn::parse(&dsn).unwrap();
        assert_eq!(
            (parsed.path(), parsed.option("depth"), parsed.option("prefix")),
            ("/tmp/a b?é#%", Some("2"), Some("a&"))
        );
    }

    #[test]
    fn another_prefix_and_another_address_keep_the_rest() {
        let text = "redis://me:p%40ss@[::1]/3?ttl=20m&%70refix=app%3A&lease=1s";
        let server = ServerDsn::new(text).unwrap().within("check-1:").within("c2:");
        let parsed = Dsn::parse(&server.text()).unwrap();
        assert_eq!((parsed.user(), parsed.password(), parsed.path()), (Some("me"), Some("p@ss"), "/3"));
        assert_eq!((parsed.hosts(), parsed.option("ttl")), (&["[::1]".to_owned()][..], Some("20m")));
        assert_eq!(parsed.option("prefix"), Some("app:check-1:c2:"));
        assert_eq!(server.plain_tcp().as_deref(), Some("[::1]:6379"));
        let through = server.through(([127, 0, 0, 1], 99).into());
        assert_eq!(through.plain_tcp().as_deref(), Some("127.0.0.1:99"));
        assert_eq!(Dsn::parse(&through.text()).unwrap().password(), Some("p@ss"));
        assert!(!format!("{server:?}").contains("p%40ss") && !format!("{server:?}").contains("me:"));
        assert_eq!(ServerDsn::new("redis://h").unwrap().within("x:").prefix, "session:x:");
        assert_eq!(ServerDsn::new("postgres://me:pw@h/app").unwrap().within("x:").prefix, "x:");
        assert_eq!(ServerDsn::new("mysql://me:pw@h/app").unwrap().plain_tcp().as_deref(), Some("h:3306"));
        let lite = ServerDsn::new("sqlite:///tmp/s.db?create=on").unwrap().within("x:");
        assert_eq!((lite.plain_tcp(), lite.text()), (None, "sqlite:///tmp/s.db?prefix=x%3A&create=on".to_owned()));
        assert_eq!(ServerDsn::new("redis://h?prefix=").unwrap().within("x:").prefix, "x:");
        let table = ServerDsn::new("mysql://h/app?table=mine&create=off&ttl=1h").unwrap().within("x-1:").in_table("few");
        assert_eq!(table, "mysql://h/app?prefix=x-1%3A&ttl=1h&table=s_x_1_few&create=on");
        for other in ["redis+cluster://h1,h2", "redis://h?tls=on", "redis+unix:///run/redis.sock", "rediss://h"] {
            assert_eq!(ServerDsn::new(other).unwrap().plain_tcp(), None, "{other}");
        }
    }

    #[test]
    fn nothing_before_an_at_sign_is_shown() {
        assert_eq!(redact("redis://me:p@ss@h/0?lease=1"), "redis://***@h/0?lease=1");
        assert_eq!(redact("--x=redis://:pw@h"), "--x=redis://***@h");
        assert_eq!(redact("file:///x"), "file:///x");
    }
}
