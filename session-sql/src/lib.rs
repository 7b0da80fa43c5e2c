//! Sessions in a table of a SQL database: PostgreSQL, MySQL and MariaDB, SQLite.
//!
//! The lock is a lease in the session's row: a token with a deadline. The fence is in the `WHERE` of each write. Every step is one
//! statement that commits by itself, so no connection is held while a session is open.
//!
//! With [`SqlLockMode::Transaction`] (`lock=transaction`, PostgreSQL and MySQL or MariaDB) an open transaction holds a row lock beside
//! it, so that the database itself wakes who waits, and frees the sessions of a process that died at once.

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
#[cfg(any(feature = "postgres", feature = "mysql"))]
mod clock;
mod config;
#[cfg(any(feature = "postgres", feature = "mysql"))]
mod connections;
mod database;
mod handler;
mod lock;
#[cfg(feature = "mysql")]
mod mysql;
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
