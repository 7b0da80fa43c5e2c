//! What an uncontended open and an uncontended save send, for a program that sends it without us: the floor of a bench.
//!
//! It is the text that the handler itself uses, so that the two cannot differ. Nothing else here is a promise.

use crate::config::SqlConfig;

/// A statement, and what is given to it.
#[doc(hidden)]
#[derive(Debug)]
#[non_exhaustive]
pub struct Statement {
    /// With `$1`, `$2`, … or, for MySQL and MariaDB, a question mark for each value.
    pub sql: String,
    /// What the values are, in their order.
    pub values: Vec<&'static str>,
}

/// Returns what takes a lock and reads the record, and what writes the record and gives the lock back. There is none for SQLite,
/// where a step is several statements in a transaction.
#[doc(hidden)]
#[must_use]
pub fn uncontended(config: &SqlConfig) -> Option<[Statement; 2]> {
    match &config.server {
        #[cfg(feature = "postgres")]
        crate::SqlServer::Postgres(_) => Some(crate::postgres::uncontended(config)),
        #[cfg(feature = "mysql")]
        crate::SqlServer::MySql(_) => Some(crate::mysql::uncontended(config)),
        _ => None,
    }
}
