//! Sessions in memcached, which **may lose any session at any time**: all of them at a restart, and some of them under memory
//! pressure, when the server evicts what was not used for the longest time, locks included. What is lost is absent. It cannot lose
//! an **update of a session that is still there**: every write is compared and stored by the server in one step, whatever became of
//! the lock meanwhile, so a holder who was paused, evicted or restarted under is refused, aloud.
//!
//! A session is two items on one server: the record, and its lock while somebody holds it. An open adds the lock and reads in one
//! flight; a save writes and gives the lock back in another. Whoever finds the lock taken asks again and again, since memcached
//! wakes nobody.
//!
//! ```no_run
//! # async fn f() -> session_core::Result<()> {
//! use std::time::Duration;
//! use session_core::{Change, Dsn, OpenRequest, Record, SessionHandler, SessionId, Ttl, WriteId};
//! use session_memcache::{MemcacheConfig, MemcacheHandler};
//!
//! let dsn = Dsn::parse("memcache://127.0.0.1:11211?prefix=shop:")?;
//! let handler = MemcacheHandler::connect(MemcacheConfig::from_dsn(&dsn)?).await?;
//! let id = SessionId::parse("2v7f8q1c0j3m5n9p4r6s8t0u1v2a3b4c").expect("it is well formed");
//! let request = OpenRequest::exclusive(Duration::from_secs(5), Duration::from_secs(10));
//! let mut session = handler.open(&id, &request).await?;
//! if let Some(record) = session.read().await? {
//!     let longer = Record::new(record.data, Ttl::from_secs(1200));
//!     session.save(&Change::Write(longer), WriteId::random()?).await?;
//! }
//! # Ok(()) }
//! ```
//!
//! # What it needs of the server
//!
//! memcached 1.6.10 or newer, spoken to directly: a proxy that answers for several servers cannot say which life of which server
//! an item is of. From 1.6.27 on the numbers by which items are compared are chosen here, at random, and never come again. An older
//! server counts them from the start with each of its lives; there a change is sent only to the life of the server that the
//! session was read from.
//!
//! Its option `-C` must not be set. `-m` says how much memory it has: a server that evicts loses sessions before their time. `-I`
//! says how large an item may be, 1 MiB unless it is set; a payload that does not fit is
//! [`TooLarge`](session_core::ErrorKind::TooLarge) before anything is sent, because memcached deletes the old item when it refuses
//! the new one. User and password of a DSN are those of its option `-Y`. TLS and SASL are not supported: the client speaks neither,
//! and a DSN that asks for them is refused.
//!
//! # Time
//!
//! memcached counts seconds. A life of whole seconds lasts as long as it was asked for, and up to a second longer; others are
//! rounded up before. A life of less than a second ends within one, and may end early. A lease is rounded up the same way.
//!
//! # Waiting
//!
//! One task of a process asks for a lock, the others stand behind it, first come, first served. It asks after pauses at random that
//! grow from `poll_min` (1 ms) to `poll_max` (50 ms). The process that asked first is next in line and asks every 6 ms at least; a
//! process that gives the lock back leaves it to that one for a moment. Between processes that is orderly, and not first come, first
//! served.
//!
//! # Several servers
//!
//! A session is on the server that libmemcached's weighted ketama gives for its id, with lock and all. A server that does not answer
//! fails its own sessions, with an error that names it, and nobody else's. With `failover=on` those go to the next server, where
//! they are absent; this **gives up the promise**: while processes differ in whom they can reach, a session may have two records, and
//! the older one is back when its server is.
//!
//! # Trips
//!
//! One to open and read, one to save and close, one for a view, none to open a fresh id, one for a logout. One more where the holder
//! before has not released, or somebody has to be waited for; and where an absent id is opened, to give back the lock that was asked
//! for in the flight that found nothing. An optimistic save takes the lock first, and so makes two.
//!
//! Reading order: `item` (what stands where), `transport` (what is said to a server), `store` (what is known of a session),
//! `acquire` (taking a lock) and `wait` (whose turn it is), `change` (the fence), `destroy`, `lease` (renewing, and giving back),
//! `handler`; `joined`, `pool`, `connection` and `ring` (who is asked, and what goes together); `admin`.

mod acquire;
mod admin;
mod change;
mod config;
mod connection;
mod destroy;
mod handler;
mod item;
mod joined;
mod lease;
mod lock;
mod pool;
mod ring;
mod store;
mod transport;
mod wait;

pub use config::{MemcacheConfig, MemcacheServer};
pub use handler::MemcacheHandler;
pub use lock::MemcacheLock;
