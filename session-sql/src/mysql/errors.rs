//! What an error means for whoever asked: whether it was carried out, and whether to ask again.
//!
//! No text of the server is passed on, because it may hold a key or a value.

use std::borrow::Cow;

use session_core::ErrorKind;
use sqlx::Error;
use sqlx::mysql::MySqlDatabaseError;

use crate::database::Failure;

/// The text of a server that a client asks in vain for a key, because of a password that is to be sent in the clear.
const NO_TLS: &str = "the server wants the password over TLS: write tls=on, or give the user mysql_native_password";

/// What is missing where the server says that something is forbidden.
pub(super) const RIGHTS: &str = "the user lacks a right on the table: it takes SELECT, INSERT, UPDATE and DELETE";

/// An error while connecting: nothing was asked yet.
pub(super) fn connecting(error: Error) -> Failure {
    let failure = match error {
        Error::Database(error) => answered(&*error),
        Error::Io(error) => broken(error),
        // What a client says about certificates and log-in; it knows no session yet.
        Error::Tls(error) if error.to_string().contains("RSA") => Failure::new(ErrorKind::Config, NO_TLS),
        Error::Tls(error) | Error::Configuration(error) => {
            let text = "a secure connection to the server was not made";
            Failure { source: Some(error), ..Failure::new(ErrorKind::Config, text) }
        }
        Error::Protocol(_) => Failure::new(ErrorKind::Config, "whoever answers there does not speak the protocol of MySQL"),
        other => asking(other),
    };
    Failure { sent: false, passing: false, ..failure }
}

/// An error of a pool that was asked for a connection.
pub(super) fn lending(error: Error) -> Failure {
    match error {
        Error::PoolTimedOut => Failure::new(ErrorKind::Unavailable, "no connection was free in time"),
        Error::PoolClosed => Failure::new(ErrorKind::Unavailable, "the pool of connections is closed"),
        Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut => {
            Failure::new(ErrorKind::Unavailable, "no connection was made in time")
        }
        other => connecting(other),
    }
}

/// An error after something was asked.
pub(super) fn asking(error: Error) -> Failure {
    match error {
        Error::Database(error) => answered(&*error),
        Error::Io(error) => broken(error),
        Error::ColumnDecode { .. }
        | Error::ColumnIndexOutOfBounds { .. }
        | Error::Decode(_)
        | Error::TypeNotFound { .. } => {
            Failure { sent: true, ..Failure::unexpected("the table answers with other types than those of this version") }
        }
        Error::Protocol(_) => {
            Failure { sent: true, passing: true, ..Failure::new(ErrorKind::Unavailable, "the connection is out of step") }
        }
        _ => Failure { sent: true, ..Failure::unexpected("the client of the database failed") },
    }
}

/// The server did not answer in time.
pub(super) fn silent() -> Failure {
    Failure { sent: true, ..Failure::new(ErrorKind::Unavailable, "the database did not answer in time") }
}

fn broken(error: std::io::Error) -> Failure {
    let text = "the connection to the database broke";
    Failure { source: Some(Box::new(error)), sent: true, passing: true, ..Failure::new(ErrorKind::Unavailable, text) }
}

/// What the server itself answered: it has carried nothing out, unless the answer says that it is going.
fn answered(error: &dyn sqlx::error::DatabaseError) -> Failure {
    let Some(number) = number(error) else { return Failure::unexpected("the database refused it without a reason") };
    let text = |text: &'static str| Cow::Borrowed(text);
    let (kind, message) = match number {
        1044 | 1142 | 1143 | 1227 | 1370 => (ErrorKind::Config, text(RIGHTS)),
        1045 | 1698 => (ErrorKind::Config, text("the database does not accept this user with this password")),
        1130 => (ErrorKind::Config, text("the database does not accept connections from this host")),
        1049 => (ErrorKind::Config, text("there is no such database")),
        1146 => (ErrorKind::Config, text("the table is missing: write create=on, or call create_table() once")),
        1054 | 1136 | 1364 => {
            (ErrorKind::Config, text("the table has other columns than this version uses: name another one"))
        }
        1665 => (ErrorKind::Config, text("the server logs statements: set binlog_format to ROW or MIXED")),
        1406 | 1153 | 1301 => (ErrorKind::TooLarge, text("the record is larger than the database takes")),
        1290 | 1792 | 1836 | 3100 | 3101 | 3657 => (ErrorKind::Unavailable, text("the database takes no writes")),
        1040 | 1203 | 1226 => (ErrorKind::Unavailable, text("the database has too many connections")),
        1021 | 1026 | 1030 | 1041 | 1114 | 1037 | 1038 => (ErrorKind::Unavailable, text("the database has no room left")),
        1047 | 1053 | 1077 | 1079 | 1129 | 1180 | 1927 | 4031 => {
            (ErrorKind::Unavailable, text("the database is going or coming"))
        }
        1020 | 1205 | 1213 | 1317 | 1637 | 1969 | 3024 | 3058 | 3572 | 3101.. if passes(number) => {
            (ErrorKind::Unavailable, text("the database gave it up in favour of others"))
        }
        _ => (ErrorKind::Unexpected, Cow::Owned(format!("the database refused it with error {number}"))),
    };
    // On its way out, and while it commits, it may have done it.
    let sent = matches!(number, 1053 | 1079 | 1180 | 1927 | 4031);
    Failure { sent, passing: sent || passes(number), ..Failure::new(kind, message) }
}

/// Deadlocks, lock time-outs, interruptions: nothing was carried out, and the next attempt may fare better.
fn passes(number: u16) -> bool {
    matches!(number, 1020 | 1205 | 1213 | 1317 | 1637 | 1969 | 3024 | 3058 | 3572)
}

/// Whether the server refused a row because there is one.
pub(super) fn is_duplicate(error: &Error) -> bool {
    matches!(error, Error::Database(error) if number(&**error) == Some(1062))
}

/// Whether the row was not free in time, or the wait for it was ended to end a deadlock.
pub(super) fn is_locked(error: &Error) -> bool {
    matches!(error, Error::Database(error) if matches!(number(&**error), Some(1205 | 1213 | 3572)))
}

/// Whether a connection can be used again after an error.
pub(super) fn leaves_usable(error: &Error) -> bool {
    match error {
        Error::Database(error) => !matches!(number(&**error), Some(1053 | 1079 | 1153 | 1180 | 1927 | 4031) | None),
        _ => false,
    }
}

fn number(error: &dyn sqlx::error::DatabaseError) -> Option<u16> {
    error.try_downcast_ref::<MySqlDatabaseError>().map(MySqlDatabaseError::number)
}
