//! Server-side sessions that cannot lose an update.
//!
//! Start here: [`connect`] turns a connection string into [`Sessions`], which hands out sessions. Everything else in this crate is
//! the contract below them, re-exported from `session-core`: [`SessionHandler`] for whoever writes a backend of his own,
//! [`SessionLock`] for whoever needs only a lock.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> sessionkit::Result<()> {
//! let sessions = sessionkit::connect("memory://?ttl=20m").await?;
//!
//! let mut session = sessions.create()?;
//! session.insert("visits", &1)?;
//! let id = session.id().clone();
//! session.close().await?;
//!
//! // Whoever opens the session now waits until the one before has closed it: of a hundred increments, none is lost.
//! let mut session = sessions.open(&id).await?;
//! let visits: u32 = session.get("visits")?.unwrap_or(0);
//! session.insert("visits", &(visits + 1))?;
//! session.close().await?;
//! # assert_eq!(sessions.view(&id).await?.get::<u32>("visits")?, Some(2));
//! # Ok(()) }
//! ```
//!
//! # Features
//!
//! | feature | brings |
//! |---|---|
//! | `file` | `file://` and the module [`file`](https://docs.rs/session-file): one two-slot file per session, under kernel locks |
//! | `memcache` | `memcache://` and the module [`memcache`](https://docs.rs/session-memcache): fenced by the numbers of items |
//! | `redis` | `redis://`, `rediss://`, `redis+unix://`, `redis+sentinel://`, `redis+cluster://` and the module [`redis`](https://docs.rs/session-redis) |
//! | `postgres`, `mysql`, `sqlite` | `postgres://`, `mysql://` (MariaDB, too), `sqlite://` and the module [`sql`](https://docs.rs/session-sql) |
//! | `web`, `axum` | the module [`web`](https://docs.rs/session-web): sessions for tower services; extractors for axum |
//! | `json`, `postcard`, `bincode` | the codec of that name, as `codec=…`; MessagePack is always there |
//!
//! Enabling a feature only adds.

use std::sync::Arc;

pub use session_core::*;
/// The file backend: `file:///var/lib/app/sessions`.
#[cfg(feature = "file")]
pub use session_file as file;
/// The memcached backend: `memcache://host:11211`, one server or several.
#[cfg(feature = "memcache")]
pub use session_memcache as memcache;
/// The Redis backend: `redis://host:6379/0`, with TLS, sockets, Sentinel and Cluster.
#[cfg(feature = "redis")]
pub use session_redis as redis;
/// The SQL backend: `postgres://`, `mysql://`, `sqlite://`.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
pub use session_sql as sql;

/// Sessions for tower services, and with the feature `axum` as arguments of handlers.
#[cfg(feature = "web")]
pub use session_web as web;

/// The schemes that this build knows, for error messages.
const SCHEMES: &[&str] = &[
    #[cfg(feature = "file")]
    "file",
    #[cfg(feature = "memcache")]
    "memcache",
    "memory",
    #[cfg(feature = "redis")]
    "redis",
    #[cfg(feature = "redis")]
    "rediss",
    #[cfg(feature = "redis")]
    "redis+unix",
    #[cfg(feature = "redis")]
    "redis+sentinel",
    #[cfg(feature = "redis")]
    "redis+cluster",
    #[cfg(feature = "postgres")]
    "postgres",
    #[cfg(feature = "mysql")]
    "mysql",
    #[cfg(feature = "sqlite")]
    "sqlite",
];

/// Schemes that a Cargo feature brings, with that feature.
const FEATURES: &[(&str, &str)] = &[
    ("file", "file"),
    ("memcache", "memcache"),
    ("redis", "redis"),
    ("rediss", "redis"),
    ("redis+unix", "redis"),
    ("redis+sentinel", "redis"),
    ("redis+cluster", "redis"),
    ("postgres", "postgres"),
    ("postgresql", "postgres"),
    ("mysql", "mysql"),
    ("mariadb", "mysql"),
    ("sqlite", "sqlite"),
];

/// Opens the store of `dsn` as an application uses it: the backend, the layers [`HashIds`] (unless `hash_ids=off`) and
/// [`Observe`], and on top [`Sessions`] with the options of the DSN.
///
/// Every `memory://` is a store of its own: keep the [`Sessions`] and clone them.
///
/// # Errors
/// [`Config`](ErrorKind::Config) if the DSN is not one, or its scheme, an option or a value is not known; the message lists what
/// is, and says which Cargo feature is missing. It never holds a password. [`Unavailable`](ErrorKind::Unavailable) if the store
/// does not answer.
pub async fn connect(dsn: &str) -> Result<Sessions> {
    let dsn = Dsn::parse(dsn)?;
    let (handler, backend) = open(&dsn).await?;
    let handler: Arc<dyn SessionHandler> = if hashed(&dsn)? {
        Arc::new(Observe::new(HashIds::new(handler), backend))
    } else {
        Arc::new(Observe::new(handler, backend))
    };
    Sessions::with_options(handler, &dsn)
}

/// Opens the store of `dsn` without any layer: for a suite, a migration, an administrator.
///
/// # Errors
/// As [`connect`].
pub async fn handler(dsn: &str) -> Result<Arc<dyn SessionHandler>> {
    open(&Dsn::parse(dsn)?).await.map(|(handler, _)| handler)
}

/// Whether [`connect`] lets the store of `dsn` see hashes in place of live ids.
///
/// # Errors
/// [`Config`](ErrorKind::Config) if `dsn` is not a DSN or an option has no such value.
pub fn hashes_ids(dsn: &str) -> Result<bool> {
    hashed(&Dsn::parse(dsn)?)
}

fn hashed(dsn: &Dsn) -> Result<bool> {
    // PHP looks for its sessions under the live id.
    Ok(dsn.flag("hash_ids")?.unwrap_or(dsn.option("layout") != Some("php")))
}

/// Returns the backend, and its name for metrics.
async fn open(dsn: &Dsn) -> Result<(Arc<dyn SessionHandler>, &'static str)> {
    match dsn.scheme() {
        "memory" => Ok((memory(dsn)?, "memory")),
        #[cfg(feature = "file")]
        "file" => Ok((Arc::new(file::FileHandler::open_dir(file::FileConfig::from_dsn(dsn)?)?), "file")),
        #[cfg(feature = "memcache")]
        scheme if memcache::MemcacheConfig::SCHEMES.contains(&scheme) => {
            let config = memcache::MemcacheConfig::from_dsn(dsn)?;
            Ok((Arc::new(memcache::MemcacheHandler::connect(config).await?), "memcache"))
        }
        #[cfg(feature = "redis")]
        scheme if redis::RedisConfig::SCHEMES.contains(&scheme) => {
            Ok((Arc::new(redis::RedisHandler::connect(redis::RedisConfig::from_dsn(dsn)?).await?), "redis"))
        }
        #[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
        scheme if sql::SqlConfig::SCHEMES.contains(&scheme) => {
            let config = sql::SqlConfig::from_dsn(dsn)?;
            let name = config.server.name();
            Ok((Arc::new(sql::SqlHandler::connect(config).await?), name))
        }
        scheme => Err(unknown(scheme)),
    }
}

fn memory(dsn: &Dsn) -> Result<Arc<dyn SessionHandler>> {
    dsn.accept_options(&[])?;
    if !dsn.hosts().is_empty() || !dsn.path().is_empty() || dsn.user().is_some() {
        return Err(Error::new(ErrorKind::Config, "dsn", "memory:// has no host and no path; write memory://?option=value"));
    }
    dsn.choice("layout", &[("native", ())])?;
    let strict = dsn.flag("strict_expiry")?.unwrap_or(false);
    Ok(Arc::new(MemoryHandler::builder().strict_expiry(strict).build()))
}

fn unknown(scheme: &str) -> Error {
    let accepted = SCHEMES.join("://, ");
    let message = match FEATURES.iter().find(|(known, _)| *known == scheme) {
        Some((_, feature)) => {
            format!("{scheme}:// needs the Cargo feature {feature} of sessionkit, which is off (accepted: {accepted}://)")
        }
        None => {
            let scheme: String = scheme.chars().take(40).collect();
            format!("unknown scheme {scheme}:// (accepted: {accepted}://)")
        }
    };
    Error::new(ErrorKind::Config, "dsn", message)
}

/// How to write a handler of one's own, from nothing to the passing suite.
///
/// Its code is `examples/own_handler.rs`, which is compiled and tested there.
#[cfg(all(doc, not(doctest)))]
#[doc = include_str!("../docs/write-a-handler.md")]
pub mod write_a_handler {}

/// The calls of tower-sessions and axum_session beside ours, and what changes.
///
/// Its code is `examples/from_tower_sessions.rs`, which is compiled and run there.
#[cfg(all(doc, not(doctest)))]
#[doc = include_str!("../docs/from-tower-sessions.md")]
pub mod from_tower_sessions {}

/// The programs of the README; one of them is for axum.
#[cfg(all(doctest, feature = "axum"))]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests {
    use super::*;

    async fn refusal(dsn: &str) -> String {
        let error = handler(dsn).await.expect_err(dsn);
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(connect(dsn).await.is_err(), "{dsn}");
        error.to_string()
    }

    #[tokio::test]
    async fn an_unknown_scheme_lists_the_known_ones() {
        for scheme in ["memcached", "ftp"] {
            let text = refusal(&format!("{scheme}://me:hunter2@h/0")).await;
            assert!(text.contains(&format!("unknown scheme {scheme}://")) && text.contains("memory://"), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
    }

    #[cfg(not(feature = "file"))]
    #[tokio::test]
    async fn a_backend_that_is_not_compiled_in_names_its_feature() {
        assert!(refusal("file:///x").await.contains("needs the Cargo feature file"));
    }

    #[cfg(not(feature = "memcache"))]
    #[tokio::test]
    async fn memcached_that_is_not_compiled_in_names_its_feature() {
        let text = refusal("memcache://me:hunter2@h").await;
        assert!(text.contains("needs the Cargo feature memcache") && !text.contains("hunter2"), "{text}");
    }

    #[cfg(feature = "memcache")]
    #[tokio::test]
    async fn a_memcached_that_is_not_there_is_unavailable_and_its_password_is_not_shown() {
        let error = handler("memcache://me:hunter2@127.0.0.1:1").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(!format!("{error:?}").contains("hunter2"));
    }

    #[cfg(not(feature = "redis"))]
    #[tokio::test]
    async fn redis_that_is_not_compiled_in_names_its_feature() {
        assert!(refusal("redis+cluster://:hunter2@h").await.contains("needs the Cargo feature redis"));
    }

    #[cfg(not(any(feature = "postgres", feature = "mysql", feature = "sqlite")))]
    #[tokio::test]
    async fn a_database_that_is_not_compiled_in_names_its_feature() {
        for (scheme, feature) in [("postgresql", "postgres"), ("mariadb", "mysql"), ("sqlite", "sqlite")] {
            let text = refusal(&format!("{scheme}://me:hunter2@h/app")).await;
            assert!(text.contains(&format!("needs the Cargo feature {feature}")) && !text.contains("hunter2"), "{text}");
        }
    }

    #[cfg(feature = "postgres")]
    #[tokio::test]
    async fn a_database_that_is_not_there_is_unavailable_and_its_password_is_not_shown() {
        let error = handler("postgres://me:hunter2@127.0.0.1:1/app").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(!format!("{error:?}").contains("hunter2"));
    }

    #[cfg(feature = "sqlite")]
    #[tokio::test]
    async fn a_database_in_a_file_is_reached_by_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let dsn = format!("sqlite://{}/sessions.db?create=on", directory.path().display());
        let sessions = connect(&dsn).await.unwrap();
        let mut session = sessions.create().unwrap();
        session.insert("n", &7).unwrap();
        let id = session.id().clone();
        session.close().await.unwrap();
        assert_eq!(connect(&dsn).await.unwrap().view(&id).await.unwrap().get::<i32>("n").unwrap(), Some(7));
    }

    #[cfg(feature = "redis")]
    #[tokio::test]
    async fn a_redis_that_is_not_there_is_unavailable_and_its_password_is_not_shown() {
        let error = handler("redis://:hunter2@127.0.0.1:1/0").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(!format!("{error:?}").contains("hunter2"));
    }

    #[cfg(feature = "file")]
    #[tokio::test]
    async fn a_file_store_is_reached_by_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let dsn = format!("file://{}", directory.path().display());
        let sessions = connect(&dsn).await.unwrap();
        let mut session = sessions.create().unwrap();
        session.insert("n", &7).unwrap();
        let id = session.id().clone();
        session.close().await.unwrap();
        let again = connect(&dsn).await.unwrap();
        assert_eq!(again.view(&id).await.unwrap().get::<i32>("n").unwrap(), Some(7));
    }

    #[tokio::test]
    async fn options_are_checked_wherever_they_belong() {
        assert!(refusal("memory://?wiat=1s").await.contains("did you mean wait?"));
        assert!(refusal("memory://h").await.contains("no host"));
        assert!(refusal("memory:///x").await.contains("no path"));
        assert!(refusal("memory://?layout=php").await.contains("native"));
        for dsn in ["memory://?hash_ids=maybe", "memory://?ttl=5", "memory://?locking=perhaps", "memory://?codec=xml"] {
            assert_eq!(connect(dsn).await.expect_err(dsn).kind(), ErrorKind::Config, "{dsn}");
        }
    }

    #[tokio::test]
    async fn every_memory_store_is_its_own_and_hashes_ids_unless_told() {
        for (dsn, hashed) in [("memory://", true), ("memory://?hash_ids=off", false)] {
            assert_eq!(hashes_ids(dsn).unwrap(), hashed);
            let (one, other) = (connect(dsn).await.unwrap(), connect(dsn).await.unwrap());
            let mut session = one.create().unwrap();
            session.insert("n", &7).unwrap();
            let id = session.id().clone();
            session.close().await.unwrap();
            assert!(one.view(&id).await.unwrap().exists());
            assert!(!other.view(&id).await.unwrap().exists());
        }
    }
}

/// The program of the guide, whole: it compiles and runs as a doctest, too.
#[cfg(doctest)]
#[doc = concat!("```\n", include_str!("../examples/own_handler.rs"), "\n```")]
mod own_handler {}
