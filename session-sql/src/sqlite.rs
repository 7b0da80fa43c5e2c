//! SQLite: one connection of a handler writes, and whatever waits at that moment shares a transaction; others read beside it.
//!
//! The steps are judged in Rust on the row as it stands (`row`), inside a transaction that nobody else can write beside. What no
//! power cut may take is synced before anybody is told of it, though others may read it meanwhile; who holds a lock need not outlive
//! the machine. No thread of a runtime waits for the disk, but where several processes share a file: the first write after one of them
//! has copied the whole log syncs the head of the new one, and that process cannot tell the others.

mod clear;
mod clocks;
mod job;
mod pen;
mod place;
mod readers;
mod row;
mod side;
mod table;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::Connection;
use session_core::leased::{Found, Renewed, Verdict};
use session_core::{LeaseToken, Record};

use crate::config::SqlConfig;
use crate::database::{Alter, Database, Enter, Entered, Failure, Listed, Locked, Owner, Remove, Renew, Waiter};
use clocks::Clocks;
use place::Place;
use readers::Readers;
use row::Who;
use side::Side;
use table::{Fitness, Table, Turn};
use writer::{Errand, Writer};

/// What all threads of a handler know.
#[derive(Debug)]
struct Shared {
    place: Place,
    table: Table,
    who: Who,
    strict: bool,
    timeout: Duration,
    /// Open as long as this lives, and that says so to other processes.
    side: Option<Side>,
    clocks: Clocks,
}

impl Shared {
    /// Begins to look at the table by a connection.
    fn turn<'a>(&'a self, connection: &'a Connection) -> Turn<'a> {
        Turn { connection, table: &self.table, who: &self.who, strict: self.strict }
    }

    /// Says whether the process of another handler has ended, as far as that can be known.
    fn is_gone(&self, process: i64) -> bool {
        self.side.as_ref().is_some_and(|side| side.is_gone(process))
    }
}

#[derive(Debug)]
struct Sqlite {
    shared: Arc<Shared>,
    writer: Writer,
    readers: Readers,
}

pub(crate) async fn connect(path: &Path, config: &SqlConfig, owner: Owner) -> Result<Arc<dyn Database>, Failure> {
    if config.table.contains('.') && !config.table.starts_with("main.") {
        return Err(place::config("table= of SQLite has no schema, or the schema main"));
    }
    let place = Place::new(path, config.durability, config.create)?;
    let side = side::beside(&place.path, Some(owner.process));
    let who = Who { owner, proven: side.is_some() };
    let (table, strict, timeout) = (Table::new(&config.table), config.strict_expiry, config.timeout);
    let shared = Arc::new(Shared { place, table, who, strict, timeout, side, clocks: Clocks::default() });
    let writer = Writer::start(shared.clone()).map_err(|error| {
        let mut failure = Failure::new(session_core::ErrorKind::Unavailable, "no thread could be started");
        failure.source = Some(Box::new(error));
        failure
    })?;
    Ok(Arc::new(Sqlite { writer, readers: Readers::new(shared.clone(), config.connections()), shared }))
}

#[async_trait]
impl Database for Sqlite {
    async fn enter(&self, entries: &[Enter]) -> Result<Vec<Option<Entered>>, Failure> {
        // Who waits asks again and again, and mostly in vain.
        if let [entry] = entries
            && entry.book > 0
        {
            let asked = entry.clone();
            let peek = move |connection: &Connection, shared: &Shared| {
                shared.turn(connection).peek(&asked, |process| shared.is_gone(process))
            };
            if let Some(answer) = self.readers.ask(peek).await? {
                return Ok(vec![Some(answer)]);
            }
        }
        let errand = if entries.len() == 1 { Errand::Light } else { Errand::Heavy };
        let (entries, shared) = (entries.to_vec(), self.shared.clone());
        let work = move |turn: &Turn<'_>| {
            let enter = |entry| turn.enter(entry, |process| shared.is_gone(process)).map(Some);
            entries.iter().map(enter).collect()
        };
        self.writer.ask(errand, work).await
    }

    async fn change(&self, changes: &[Alter]) -> Result<Vec<Option<Verdict>>, Failure> {
        let changes = changes.to_vec();
        let errand = Errand::Lasting { bytes: changes.iter().map(Alter::bytes).sum(), rows: changes.len() };
        let work = move |turn: &Turn<'_>| changes.iter().map(|change| turn.change(change).map(Some)).collect();
        self.writer.ask(errand, work).await
    }

    async fn look(&self, key: &str) -> Result<Found, Failure> {
        let key = key.to_owned();
        self.readers.ask(move |connection, shared| shared.table.look(connection, &key)).await
    }

    async fn remove(&self, removal: &Remove) -> Result<Option<Record>, Failure> {
        let removal = removal.clone();
        self.writer.ask(Errand::Lasting { bytes: 0, rows: 1 }, move |turn| turn.remove(&removal)).await
    }

    async fn renew(&self, leases: &[Renew]) -> Result<Vec<Renewed>, Failure> {
        let errand = if leases.len() == 1 { Errand::Light } else { Errand::Heavy };
        let leases = leases.to_vec();
        self.writer.ask(errand, move |turn| leases.iter().map(|lease| turn.renew(lease)).collect()).await
    }

    async fn leave(&self, key: &str, token: LeaseToken, clean: bool) -> Result<bool, Failure> {
        let key = key.to_owned();
        self.writer.ask(Errand::Light, move |turn| turn.leave(&key, token, clean)).await?;
        // What was asked before has been done before, or never is.
        Ok(true)
    }

    async fn gc(&self, limit: u32) -> Result<u64, Failure> {
        let mut left = limit;
        let mut expired = 0;
        // What is left of others goes last, so that an answer of zero says that no record has expired.
        for records in [true, false] {
            let mut done = false;
            while !done && left > 0 {
                // A transaction of its own for each piece, and time for the others between two, so that it holds up nobody.
                let freed = self.writer.ask(Errand::Heavy, move |turn| turn.gc(records, left)).await?;
                expired += if records { u64::from(freed.rows) } else { 0 };
                left -= freed.rows.min(left);
                done = freed.done;
                if !done && self.writer.is_asked() {
                    tokio::time::sleep(table::TURN).await;
                }
            }
        }
        Ok(expired)
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: u32) -> Result<Vec<Listed>, Failure> {
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        self.readers.ask(move |connection, shared| shared.table.list(connection, &prefix, after.as_deref(), limit)).await
    }

    async fn locks(&self, prefix: &str, limit: u32) -> Result<Vec<Locked>, Failure> {
        let prefix = prefix.to_owned();
        self.readers.ask(move |connection, shared| shared.table.locks(connection, &prefix, limit)).await
    }

    async fn unlock(&self, key: &str) -> Result<bool, Failure> {
        let key = key.to_owned();
        self.writer.ask(Errand::Light, move |turn| turn.unlock(&key)).await
    }

    async fn create_table(&self) -> Result<(), Failure> {
        self.writer.ask(Errand::Lasting { bytes: 0, rows: 64 }, |turn| turn.table.create(turn.connection)).await
    }

    async fn check(&self) -> Result<(), Failure> {
        match self.writer.ask(Errand::Heavy, |turn| turn.table.check(turn.connection)).await? {
            Fitness::Fits => Ok(()),
            Fitness::Missing => Err(place::missing()),
            Fitness::Foreign => Err(place::foreign_table()),
        }
    }

    async fn waiter(&self, _token: LeaseToken) -> Option<Box<dyn Waiter>> {
        None
    }
}
