//! Sessions in a table of a SQL database: PostgreSQL, MySQL and MariaDB, SQLite.
//!
//! The lock is a lease in the session's row: a token with a deadline. The fence is in the `WHERE` of each write. Every step is one
//! statement that commits by itself, so no connection is held while a session is open.
//!
//! With [`SqlLockMode::Transaction`] (`lock=transaction`, PostgreSQL and MySQL or MariaDB) an open transaction holds a row lock beside
//! it, so that the database itself wakes who waits, and frees the sessions of a process that died at once.
//!
//! Of the processes that wait for a session's lease one is next in line, and a holder who lets go hands it the lock. Whoever has waited
//! longer takes that place when he asks, which he does every 50 ms or so.
//!
//! | | PostgreSQL 12 | MySQL 8.0, MariaDB 10.5 | SQLite |
//! |---|---|---|---|
//! | who waits is | told, by `NOTIFY` | asking again, one task for each session and process | in line, between processes too |
//! | a process that was killed is known by | an advisory lock on a connection of its own | `GET_LOCK` on one | a lock of the kernel on a file beside |
//! | elsewhere than on one server | behind a pooler that changes servers, such as PgBouncer 1.21 in transaction mode, who waits asks again (`wake=poll` says so from the start), and a killed holder keeps others out until his lease ends | on Galera and others that have several servers to write to, a killed holder keeps others out until his lease ends | a file that several machines share is not for SQLite |
//!
//! What has expired is deleted by [`gc`](session_core::SessionHandler::gc) in pieces of at most 64 rows on a server, and behind each the
//! others have twice its time for themselves. Whoever is held up nevertheless should look at the log of the database: a busy table of a
//! million rows stalled for 40 to 75 ms now and then, with and without gc, while MariaDB had a log of 96 MB (`innodb_log_file_size`, as it
//! comes), and for 20 to 31 ms with one of 1 GB. On PostgreSQL with `max_wal_size = 1GB`, as it comes, 100,000 rows to collect brought a
//! checkpoint every 5 to 25 s, of which one `fsync` took 96 to 187 ms, and requests stalled for up to 190 ms, with and without gc; with
//! 6 GB there was no checkpoint in that time, and they stalled for 28 to 85 ms beside gc.

#![cfg_attr(
    not(any(feature = "postgres", feature = "mysql", feature = "sqlite")),
    allow(
        dead_code,
        unreachable_code,
        unused_variables,
        unused_mut,
        reason = "without a kind of database there is nobody to ask"
    )
)]

mod admin;
mod batches;
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
mod clock;
mod config;
#[cfg(any(feature = "postgres", feature = "mysql"))]
mod connections;
mod database;
mod handler;
mod lock;
#[cfg(feature = "mysql")]
mod mysql;
#[cfg(any(feature = "postgres", feature = "mysql"))]
mod pieces;
mod plain;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;
mod store;
mod transaction;

#[cfg(feature = "sqlite")]
pub use config::Durability;
pub use config::{SqlAddress, SqlConfig, SqlLockMode, SqlServer};
pub use handler::SqlHandler;
pub use lock::SqlLock;
#[doc(hidden)]
pub use plain::{Statement, uncontended};
