//! Sessions in Redis, which **may lose acknowledged writes** when a master fails: replication is asynchronous, so what a replica did
//! not have yet is gone when it takes over. No stale holder's write is ever applied, then as always. `wait_replicas=1` acknowledges
//! only what a replica has; `min-replicas-to-write 1` on the server keeps a master that is cut off from acknowledging. A restart
//! loses what the server's own persistence had not stored, and an eviction policy other than `noeviction` or `volatile-lru` may
//! evict what is in use. What is lost is absent; it never comes back older.
//!
//! A session is three keys under one hash tag: the record, its lock, and the queue for it. An open takes the lock and reads in one
//! flight; a save writes, gives the lock back and hands it to the next in line in another. Waiters sleep until they are told.
//!
//! ```no_run
//! # async fn f() -> session_core::Result<()> {
//! use std::time::Duration;
//! use session_core::{Change, Dsn, OpenRequest, Record, SessionHandler, SessionId, Ttl, WriteId};
//! use session_redis::{RedisConfig, RedisHandler};
//!
//! let dsn = Dsn::parse("redis://127.0.0.1:6379/0?prefix=shop:")?;
//! let handler = RedisHandler::connect(RedisConfig::from_dsn(&dsn)?).await?;
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
//! Redis 6 or newer, or a server that speaks its protocol and runs its scripts. A user with an ACL needs, for the keys `~session:*`
//! and the channels `&session:*` (or the prefix that is set), the commands `ping get mget set exists pttl pexpire getrange rename
//! strlen eval evalsha script|load del time publish subscribe llen lrange lpop rpush lrem lset scan wait`, for a database other than 0
//! `select`, and in a Cluster `cluster|slots asking`.
//!
//! # Trips
//!
//! One to open and read, one to save and close, one for a view, none to open a fresh id, one for a logout. Whoever has to wait makes
//! one more, to come for the lock that he was told of. An absent id costs two: the lock is asked for in the same flight as the record,
//! and given back when there is none.
//!
//! What asks at the same moment travels together: one flight for many opens and views, with one command for all their records and
//! one for all their queues (if anybody waits for one of the sessions, each open asks for itself); one script for many saves, whose
//! bodies stand beside it, because a script takes in each byte of its arguments; so does a lone body of more than 8 KiB. Nothing
//! waits for company: whoever is alone is sent at once, and the members of a flight are judged one after the other, each for
//! itself. A body that is to be judged has a key of its own, named after its write, until the script of the same flight puts it in
//! its place or removes it; if the connection breaks between the two, and nobody asks again, it is left there until its life ends.
//! In a Cluster, and with `wait_replicas`, each request is sent for itself.
//!
//! # Silence
//!
//! A request that is not answered within `timeout` is [`Unavailable`](session_core::ErrorKind::Unavailable) if it was an open, which
//! is then withdrawn in the background, and [`Unknown`](session_core::ErrorKind::Unknown) if it was a change. Whoever stood behind it,
//! to travel next, is not sent any more: he is `Unavailable`. A connection that broke is made anew, and the request is asked once more:
//! opens, renewals and withdrawals go by their token, changes by their write id, so that neither happens twice.
//!
//! Reading order: `layout` (what stands where), `scripts` (the atomic steps), `store` (asking) and `answers` (what came back), `acquire`
//! (taking a lock), `batches` (what travels together), `handler` (what each access does), `connect`, `servers`, `link` and `cluster`
//! (who is asked), `waiters` (who is woken how), `replicas` (changes that wait for replicas).

mod acquire;
mod admin;
mod answers;
mod batches;
mod cluster;
mod config;
mod connect;
mod handler;
mod layout;
mod link;
mod lock;
mod replicas;
mod scripts;
mod servers;
mod store;
mod waiters;

pub use config::{RedisConfig, RedisServers, RedisWake};
pub use handler::RedisHandler;
pub use lock::RedisLock;
/// The client crate, for [`RedisHandler::from_client`].
pub use redis;
