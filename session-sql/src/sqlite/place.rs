//! The file: how a connection to it is made, and what its errors mean for whoever asked.
//!
//! Nothing here knows a table.

use std::fs::{self, File, OpenOptions};
use std::io;
#[cfg(unix)]
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, ffi};
use session_core::ErrorKind;

use crate::config::Durability;
use crate::database::Failure;

/// A connection, and which file it was made to.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) connection: Connection,
    /// The log beside the file, to have synced what was committed to it; of a connection that writes, where that is the same as
    /// what SQLite does.
    pub(super) log: Option<Arc<File>>,
    file: Option<(u64, u64)>,
}

/// As many statements as there are, and a few to spare.
const STATEMENTS: usize = 32;

/// The write-ahead log is cut back to this after it has grown beyond.
const LOG: i64 = 64 << 20;

#[derive(Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) durability: Durability,
}

impl Place {
    /// Takes the path of a file, which is made if `create` says so: for its owner alone, because who reads it has every session.
    pub(super) fn new(path: &Path, durability: Durability, create: bool) -> Result<Self, Failure> {
        if !path.is_absolute() {
            return Err(config("the path of the database file has to begin with a slash"));
        }
        let this = Self { path: path.to_owned(), durability };
        match fs::metadata(path) {
            Ok(file) if file.is_file() => this.check_rights().map(|()| this),
            Ok(_) => Err(config("there is something at the path of the database that is not a file")),
            Err(error) if error.kind() == io::ErrorKind::NotFound && create => this.create().map(|()| this),
            Err(error) => Err(io_failure(error)),
        }
    }

    /// Asks for the rights by name. To open the file for that would take the locks of other connections of this process with it,
    /// once it is closed.
    fn check_rights(&self) -> Result<(), Failure> {
        #[cfg(unix)]
        for path in [Some(&*self.path), self.path.parent()].into_iter().flatten() {
            nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).map_err(|error| io_failure(error.into()))?;
        }
        Ok(())
    }

    fn create(&self) -> Result<(), Failure> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        options.mode(0o600);
        match options.open(&self.path) {
            Ok(_) => {}
            // Somebody was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Err(error) => return Err(io_failure(error)),
        }
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        // The name of the file has to survive a power cut as what is in it does.
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(io_failure)
    }

    /// Connects, to write or only to read.
    pub(super) fn open(&self, writes: bool) -> rusqlite::Result<Opened> {
        // Before the connection is made: a file that takes its place in between is found out by the next question.
        let file = self.file();
        let access = if writes { OpenFlags::SQLITE_OPEN_READ_WRITE } else { OpenFlags::SQLITE_OPEN_READ_ONLY };
        let connection = Connection::open_with_flags(&self.path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        // Its own way of waiting lets whoever has just written go first again and again.
        connection.busy_timeout(Duration::ZERO)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        Ok(Opened { connection, log: None, file })
    }

    /// Says whether the path still leads to the file of a connection. SQLite would go on in a file that nobody can find any more.
    pub(super) fn leads_to(&self, opened: &Opened) -> bool {
        self.file() == opened.file
    }

    fn file(&self) -> Option<(u64, u64)> {
        #[cfg(unix)]
        return fs::metadata(&self.path).ok().map(|file| (MetadataExt::dev(&file), MetadataExt::ino(&file)));
        #[cfg(not(unix))]
        None
    }

    /// Makes the file keep a write-ahead log, without which readers and writers exclude each other; says whether it does.
    ///
    /// The log is not copied into the file by whichever commit finds it long, because that waits for the disk.
    pub(super) fn log_ahead(opened: &mut Opened) -> rusqlite::Result<bool> {
        let connection = &opened.connection;
        let mode: String = connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
        connection.pragma_update_and_check(None, "journal_size_limit", LOG, |_| Ok(()))?;
        connection.pragma_update_and_check(None, "wal_autocheckpoint", 0, |_| Ok(()))?;
        // The log is there once something was read from the file.
        connection.query_row("PRAGMA main.schema_version", [], |_| Ok(()))?;
        opened.log = log(connection);
        Ok(mode == "wal")
    }
}

/// Opens the log of a connection.
///
/// A commit with `synchronous=FULL` is one with `NORMAL`, and then `fsync` of the log before others see it. Synced by this file it
/// is seen before, but nobody is told of it before, and it is no less on the disk: the log is one file as long as the connection
/// lives, a commit lies behind all that it builds on, and the log begins anew only when all of it was copied to the database file
/// and that was synced, by whichever process. The log has none of SQLite's locks, so closing this file takes none away.
#[cfg(target_os = "linux")]
fn log(connection: &Connection) -> Option<Arc<File>> {
    let mut path = std::ffi::OsString::from(connection.path().filter(|path| !path.is_empty())?);
    path.push("-wal");
    File::open(path).ok().map(Arc::new)
}

/// Elsewhere a sync by another descriptor may be less than one of SQLite.
#[cfg(not(target_os = "linux"))]
fn log(_connection: &Connection) -> Option<Arc<File>> {
    None
}

/// How long the log is, in pages, and how many of them are not in the file.
pub(super) struct Log {
    pub(super) pages: i64,
    pub(super) rest: i64,
}

/// Copies the log into the file in one of the ways of SQLite, or with `NOOP` copies nothing; returns what the log is then.
pub(super) fn checkpoint(connection: &Connection, how: &str) -> rusqlite::Result<Log> {
    let mut checkpoint = connection.prepare_cached(&format!("PRAGMA main.wal_checkpoint({how})"))?;
    let (pages, copied): (i64, i64) = checkpoint.query_row([], |row| Ok((row.get(1)?, row.get(2)?)))?;
    // Somebody else is copying, and there is no answer.
    Ok(if pages < 0 { Log { pages: 0, rest: i64::MAX } } else { Log { pages, rest: pages - copied } })
}

/// Says whether the file is locked at this moment, and nothing else is wrong.
pub(super) fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

/// Says whether another connection may fare better.
pub(super) fn spoils_connection(error: &rusqlite::Error) -> bool {
    use ErrorCode as Code;
    let spoilt = [Code::SystemIoFailure, Code::CannotOpen, Code::NotADatabase, Code::DatabaseCorrupt, Code::ReadOnly];
    error.sqlite_error_code().is_some_and(|code| spoilt.contains(&code))
}

/// Says by what the caller can do what an error means that has left the file as it was.
pub(super) fn failure(error: rusqlite::Error) -> Failure {
    use ErrorCode as Code;
    let rusqlite::Error::SqliteFailure(cause, text) = error else {
        let text = match &error {
            rusqlite::Error::SqlInputError { error, msg, .. } if error.code == Code::Unknown => Some(msg.clone()),
            _ => None,
        };
        return text.and_then(|text| schema(&text)).unwrap_or_else(|| match error {
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::IntegralValueOutOfRange(..) => {
                Failure::new(ErrorKind::Corrupt, "a row of the table holds what no version of this library writes")
            }
            // Its text may hold what was written.
            _ => Failure::unexpected("the database library did not understand a statement"),
        });
    };
    let (kind, message) = match cause.code {
        Code::DatabaseBusy | Code::DatabaseLocked => {
            (ErrorKind::Unavailable, "the database file is locked by another program")
        }
        Code::DiskFull => (ErrorKind::Unavailable, "the disk of the database file is full; nothing was changed"),
        Code::OutOfMemory => (ErrorKind::Unavailable, "there is not enough memory"),
        Code::OperationInterrupted | Code::OperationAborted => (ErrorKind::Unavailable, "the statement was interrupted"),
        Code::SystemIoFailure => (ErrorKind::Unavailable, "the database file could not be read or written"),
        Code::CannotOpen => (ErrorKind::Unavailable, "the database file, or the log beside it, cannot be opened"),
        Code::ReadOnly if cause.extended_code == ffi::SQLITE_READONLY_DBMOVED => {
            (ErrorKind::Unavailable, "the database file was moved or replaced")
        }
        Code::ReadOnly | Code::PermissionDenied | Code::AuthorizationForStatementDenied => {
            let fact = "the database file, or its directory, cannot be written; the process needs the right to write both";
            (ErrorKind::Config, fact)
        }
        Code::NotADatabase => (ErrorKind::Config, "the file is not a SQLite database, or it is encrypted"),
        Code::DatabaseCorrupt => (ErrorKind::Corrupt, "the database file is damaged; see PRAGMA integrity_check"),
        Code::TooBig => (ErrorKind::TooLarge, "the record is larger than SQLite holds"),
        Code::Unknown => {
            if let Some(failure) = text.as_deref().and_then(schema) {
                return failure;
            }
            (ErrorKind::Unexpected, "SQLite refused a statement")
        }
        _ => (ErrorKind::Unexpected, "SQLite answered what this version does not understand"),
    };
    let mut failure = Failure::new(kind, message);
    // The number and its name; a text of SQLite may quote what an application's trigger says.
    failure.source = Some(Box::new(cause));
    failure
}

/// Recognises what says that the table is not what it should be.
fn schema(text: &str) -> Option<Failure> {
    let foreign = ["no such column", "has no column named"];
    match text {
        _ if text.contains("no such table") => Some(missing()),
        _ if foreign.iter().any(|about| text.contains(about)) => Some(foreign_table()),
        _ => None,
    }
}

pub(super) fn missing() -> Failure {
    config("the table of sessions is missing; create=on makes it")
}

pub(super) fn foreign_table() -> Failure {
    config("what has the name of the table is not a table of this version; choose another with table=")
}

pub(super) fn config(message: &'static str) -> Failure {
    Failure::new(ErrorKind::Config, message)
}

/// Says that what was committed may not be on the disk.
pub(super) fn sync_failure(source: Option<io::Error>) -> Failure {
    let mut failure = Failure::new(ErrorKind::Unavailable, "the log of the database could not be brought to the disk");
    failure.source = source.map(Into::into);
    failure
}

fn io_failure(error: io::Error) -> Failure {
    let (kind, message) = match error.kind() {
        io::ErrorKind::NotFound => {
            (ErrorKind::Config, "the database file is missing; create=on makes it, in a directory that has to be there")
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => (
            ErrorKind::Config,
            "the database file, or its directory, cannot be written; the process needs the right to write both",
        ),
        io::ErrorKind::NotADirectory => {
            (ErrorKind::Config, "the path of the database leads through something that is no directory")
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            (ErrorKind::Unavailable, "the disk of the database file is full")
        }
        _ => (ErrorKind::Unavailable, "the database file cannot be reached"),
    };
    let mut failure = Failure::new(kind, message);
    failure.source = Some(Box::new(error));
    failure
}
