//! Real servers for the tests of a backend: each one private, on free loopback ports, its data in a temporary directory.
//!
//! A server ends with its value, and with the process that started it, however that one ends: a static needs no destructor, and
//! a test that is killed leaves nothing behind. A program that is missing is an error that says which package has it.
//!
//! ```no_run
//! use conformance_tests::servers::Redis;
//!
//! # fn main() -> std::io::Result<()> {
//! let redis = Redis::start(&["appendonly yes", "maxmemory 64mb"])?;
//! redis.command(&["SET", "color", "green"])?;
//! redis.kill()?;
//! redis.restart()?;
//! assert_eq!(redis.command(&["GET", "color"])?, "green");
//! # Ok(())
//! # }
//! ```
//!
//! | | what is started | takes |
//! |---|---|---|
//! | [`Redis::start`], [`Redis::start_tls`] | one server | 10 to 40 ms |
//! | [`RedisCluster::start`] | masters and their replicas | 2 s, and a failover 2 to 3 s |
//! | [`RedisSentinel::start`] | a master, two replicas, three sentinels | 1 s, and a failover 3 s |
//! | [`Postgres::start`], [`MariaDb::start`] | one server | 0.1 to 0.2 s, the first time 1 s more |
//! | [`Memcached::start`], [`Memcached::start_newer`] | one server, in the version of the machine or in a newer one | 20 ms |
//! | [`PgBouncer::start`] | what many clients share a PostgreSQL server through | 20 ms |
//!
//! Each of the many servers of a cluster and of the sentinels is a [`Redis`] again, to be frozen, killed and restarted by itself.
//!
//! The data of an SQL server is a copy of what the first one has made, beside the test executable, for its version and its account.
//! Some servers refuse to be root: if we are, they are `postgres`, `mysql`, `memcache` or `nobody`.
//!
//! All calls block their thread and work with and without a runtime around them. All take
//! `&self`, so that a server can be shared.
//!
//! The workers of [`processes_suite!`](crate::processes_suite) are other processes, which must not start servers of their own.
//! A harness tells them where its server is through the environment:
//!
//! ```no_run
//! # use std::{process::Command, sync::{Arc, OnceLock}};
//! # use conformance_tests::{Harness, processes::InTestBinary, servers::Redis};
//! # use session_core::{MemoryHandler, Result, SessionHandler};
//! # fn connect(_: &str) -> Arc<dyn SessionHandler> { Arc::new(MemoryHandler::new()) }
//! static REDIS: OnceLock<Redis> = OnceLock::new();
//!
//! fn url() -> String {
//!     let own = || REDIS.get_or_init(|| Redis::start(&[]).expect("redis-server starts")).url();
//!     std::env::var("URL_OF_THE_PARENT").unwrap_or_else(|_| own())
//! }
//!
//! struct Plain;
//!
//! impl Harness for Plain {
//!     async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
//!         Ok(connect(&format!("{}?prefix={namespace}", url())))
//!     }
//! }
//!
//! struct Mine;
//!
//! impl Harness for Mine {
//!     async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
//!         Plain.handler(namespace).await
//!     }
//!
//!     fn worker(&self) -> Option<Command> {
//!         // The module of the cases, as `processes_suite!` would say it.
//!         let mut worker = InTestBinary::new(Plain, concat!(module_path!(), "::processes")).worker()?;
//!         worker.env("URL_OF_THE_PARENT", url());
//!         Some(worker)
//!     }
//! }
//!
//! conformance_tests::processes_suite!(Mine);
//! # fn main() {}
//! ```
//!
//! Nothing here knows what is tested with a server.

mod certificates;
mod mariadb;
mod mariadb_wire;
mod memcached;
mod memcached_wire;
mod pgbouncer;
mod postgres;
mod postgres_wire;
mod process;
mod redis;
mod redis_cluster;
mod redis_sentinel;
mod resp;
mod sql;
mod template;

pub use mariadb::MariaDb;
pub use mariadb_wire::MariaDbConnection;
pub use memcached::Memcached;
pub use memcached_wire::{MemcachedConnection, MemcachedItem};
pub use pgbouncer::PgBouncer;
pub use postgres::Postgres;
pub use postgres_wire::PostgresConnection;
pub use redis::{Monitor, Redis};
pub use redis_cluster::RedisCluster;
pub use redis_sentinel::RedisSentinel;
