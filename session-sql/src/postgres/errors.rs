//! What an error of the database means for whoever asked.
//!
//! What PostgreSQL says may contain values of a statement, so its text goes no further: each code has a text of ours. Nothing here
//! knows a statement.

use std::io;

use session_core::ErrorKind;
use sqlx::Error;
use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::database::Failure;

/// What went wrong, and what is to be done with the connection.
pub(super) struct Told {
    pub(super) failure: Failure,
    /// Whether the connection can be used again.
    pub(super) usable: bool,
}

/// Judges an error of an attempt to get a connection. Nothing was asked on it.
pub(super) fn unconnected(error: Error) -> Failure {
    match error {
        Error::PoolTimedOut => unavailable("all connections of the pool are busy"),
        Error::PoolClosed => unavailable("the pool is closed"),
        Error::Io(error) => unavailable("the database server cannot be reached").with_source(text_of(&error)),
        Error::Tls(_) => Failure::new(ErrorKind::Config, "no TLS connection can be made to the database server"),
        Error::Configuration(_) => Failure::new(ErrorKind::Config, "the address of the database is not usable"),
        Error::Database(error) => {
            let error = error.downcast_ref::<PgDatabaseError>();
            Failure { sent: false, passing: false, ..refused(error).failure }
        }
        _ => unavailable("no connection can be made to the database server"),
    }
}

/// Judges an error of a statement that was sent.
pub(super) fn asked(error: Error) -> Told {
    match error {
        Error::Database(error) => refused(error.downcast_ref::<PgDatabaseError>()),
        Error::Io(error) => {
            let failure = unavailable("the connection to the database server broke").with_source(text_of(&error));
            Told { failure: Failure { sent: true, passing: true, ..failure }, usable: false }
        }
        Error::Encode(_) => Told { failure: Failure::unexpected("a parameter cannot be sent"), usable: false },
        Error::ColumnDecode { .. } | Error::Decode(_) | Error::ColumnNotFound(_) | Error::ColumnIndexOutOfBounds { .. } => {
            Told { failure: Failure { sent: true, ..strange() }, usable: true }
        }
        // What breaks off in the middle of a message is called a violation of the protocol.
        _ => {
            let failure = unavailable("the connection to the database server broke in the middle of an answer");
            Told { failure: Failure { sent: true, passing: true, ..failure }, usable: false }
        }
    }
}

/// What a row should not have.
pub(super) fn strange() -> Failure {
    Failure::new(ErrorKind::Corrupt, "the table holds a value that is none of ours")
}

fn unavailable(message: &'static str) -> Failure {
    Failure::new(ErrorKind::Unavailable, message)
}

/// Judges what the server said. Whatever it refused it has not done.
fn refused(error: &PgDatabaseError) -> Told {
    use ErrorKind::{Config, TooLarge, Unavailable};
    let code = error.code();
    let told = |kind, message: &'static str| Told { failure: Failure::new(kind, message), usable: true };
    let passing = |message: &'static str| Told {
        failure: Failure { passing: true, ..Failure::new(Unavailable, message) },
        usable: true,
    };
    let mut told = match code {
        "42P01" | "3F000" => told(Config, "the table is missing; make it with create=on or create_table()"),
        "42703" | "42P10" | "42804" | "42883" | "42P18" => {
            told(Config, "the table is not one that this version can use; take another one with table=")
        }
        "42P07" => told(
            Config,
            "the table cannot be made: the name of its index, which is its own and _expires, is taken; rename that, or take another \
             table with table=",
        ),
        "42501" => told(Config, "the user may not do this; grant SELECT, INSERT, UPDATE and DELETE on the table"),
        "28000" | "28P01" => told(Config, "the database server refuses the user or the password"),
        "3D000" => told(Config, "there is no such database"),
        "08P01" if error.message().contains("startup parameter") => {
            told(Config, "the pooler before the database refuses a parameter of the connection")
        }
        "26000" | "42P05" => told(
            Config,
            "prepared statements do not last; behind a pooler that changes servers between transactions take PgBouncer 1.21 or newer \
             with max_prepared_statements",
        ),
        "25006" => told(Unavailable, "the database takes no writes: it is a standby, or was made read only"),
        "53300" | "53400" => told(Unavailable, "the database server has no connection free"),
        "53100" | "53200" => told(Unavailable, "the database server is out of disk or memory"),
        "55P03" => told(Unavailable, "somebody holds the row of the session for too long, in a transaction of his own"),
        "57014" => told(Unavailable, "the database server gave up: the statement took longer than it allows"),
        "57P03" => told(Unavailable, "the database server is starting or stopping"),
        "40001" | "40P01" => passing("the database server broke off for another transaction"),
        // The table was changed under a prepared statement; a new connection prepares it anew.
        "0A000" if error.message().contains("cached plan") => {
            Told { usable: false, ..passing("the table was changed meanwhile") }
        }
        "54000" | "22023" if error.message().contains("too large") => {
            told(TooLarge, "the row is too large for the database")
        }
        // What it was at when it was told to stop may have been done.
        "57P01" | "57P02" | "57P05" | "25P03" => {
            let mut told = passing("the database server ended the connection");
            told.failure.sent = true;
            told
        }
        _ => match code.get(..2) {
            Some("08") => {
                let mut told = passing("the connection to the database server broke");
                told.failure.sent = true;
                told
            }
            Some("53") => told(Unavailable, "the database server is out of resources"),
            Some("28") => told(Config, "the database server refuses the user or the password"),
            Some("57") => told(Unavailable, "an operator intervened"),
            Some("58") | Some("XX") => told(Unavailable, "the database server failed; its log says why"),
            _ => {
                let message = format!("the database server answered with the error {}", printable(code));
                Told { failure: Failure::new(ErrorKind::Unexpected, message), usable: true }
            }
        },
    };
    if matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic) {
        told.usable = false;
    }
    told
}

fn printable(code: &str) -> String {
    code.chars().filter(char::is_ascii_alphanumeric).take(5).collect()
}

/// The kind of an error of a connection: its text may have more in it than we know.
fn text_of(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}
