//! The pen: the one connection of a handler that writes. Whoever has it writes, and nobody else does.
//!
//! A request that is alone takes it on its caller's thread if it is free, and only for what touches no more than the page cache:
//! it waits for no lock of the file, and its commit for no disk. Everything else, the clearing of the log included, is for the
//! thread that may wait. Nothing here knows what a request does, or who is told of it.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::ErrorCode;

use super::Shared;
use super::place::{self, Opened, Place};
use super::side::{self, Side};
use super::table::Turn;
use crate::database::Failure;

/// The shortest and the longest pause before the first in line asks again for a file that somebody else is writing, and how long
/// those behind him wait before they look whether they are first.
const FIRST: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(2));
const BEHIND: Duration = Duration::from_micros(300);

/// After so many requests the length of the log is asked for; one writes a few pages, and a batch no more than it has members.
const ASK: usize = 64;

/// The pages in the log from which on it is copied into the file, as SQLite itself would; and those from which on it has to begin
/// anew, for which those who write wait until the last of it is copied.
const LONG: i64 = 1000;
const LONGEST: i64 = 4 * LONG;

pub(super) struct Pen {
    shared: Arc<Shared>,
    side: Option<Side>,
    opened: Option<Opened>,
    /// Whether the connection waits for the disk in its commits.
    waits: Option<bool>,
    /// Whether the next write may begin the log anew, and then waits until its head is on the disk.
    fresh: bool,
    /// What was written since the log was last asked for its length.
    written: usize,
    clearer: mpsc::Sender<()>,
    /// Whether it has been asked to copy the log and has not done so yet.
    clearing: bool,
    chance: Chance,
}

impl Pen {
    pub(super) fn new(shared: Arc<Shared>, clearer: mpsc::Sender<()>) -> Self {
        let side = side::beside(&shared.place.path, None);
        let chance = Chance(shared.who.owner.process as u64 | 1);
        Self { shared, side, opened: None, waits: None, fresh: true, written: 0, clearer, clearing: false, chance }
    }

    /// Begins a transaction if neither that nor its commit waits for anything; otherwise nothing has begun, for whatever reason.
    pub(super) fn begin_now(&mut self, lasting: bool) -> bool {
        let Some(opened) = &self.opened else { return false };
        if self.fresh || (lasting && opened.log.is_none()) || self.side.as_ref().is_some_and(Side::is_line) {
            return false;
        }
        // What is wrong with the file is found out once more by whoever can wait, and told from there.
        self.try_begin(lasting).map_err(|trouble| self.failed(trouble)).is_ok()
    }

    /// Begins a transaction that nobody else can write beside. Whoever waits stands in line with the writers of other handlers.
    pub(super) fn begin(&mut self, lasting: bool, deadline: Instant) -> Result<(), Failure> {
        if !self.side.as_ref().is_some_and(Side::is_line) {
            match self.try_begin(lasting) {
                Err(Trouble::Sqlite(error)) if place::is_busy(&error) => {}
                began => return began.map_err(|trouble| self.failed(trouble)),
            }
        }
        let began = self.begin_in_line(lasting, deadline);
        if let Some(side) = &mut self.side {
            side.leave();
        }
        began.map_err(|trouble| self.failed(trouble))
    }

    fn begin_in_line(&mut self, lasting: bool, deadline: Instant) -> Result<(), Trouble> {
        if let Some(side) = &mut self.side {
            side.line_up();
        }
        let mut pause = FIRST.0;
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            let first = self.side.as_ref().is_none_or(Side::is_first);
            if first || rest.is_zero() {
                match self.try_begin(lasting) {
                    Err(Trouble::Sqlite(error)) if place::is_busy(&error) && !rest.is_zero() => {}
                    began => return began,
                }
            }
            // Nothing has begun, so nothing is lost by waiting. Two who have met once do not meet again after the same time.
            let about = if first { pause } else { BEHIND };
            thread::sleep(about.mul_f64(0.5 + self.chance.next()).min(rest));
            if first {
                pause = pause.mul_f64(1.25).min(FIRST.1);
            }
        }
    }

    fn try_begin(&mut self, lasting: bool) -> Result<(), Trouble> {
        let place = &self.shared.place;
        self.opened.take_if(|opened| !place.leads_to(opened));
        let opened = match &mut self.opened {
            Some(opened) => opened,
            none => {
                let mut opened = place.open(true)?;
                if !Place::log_ahead(&mut opened)? {
                    let fact = "the file system of the database file, or its user, cannot keep a write-ahead log";
                    return Err(Trouble::Other(place::config(fact)));
                }
                (self.waits, self.fresh) = (None, true);
                none.insert(opened)
            }
        };
        // Where the log can be synced by itself, that is done after the commit, and keeps nobody else from writing.
        let waits = lasting && opened.log.is_none();
        if self.waits != Some(waits) {
            // Without, a commit waits for no disk; what is in the log is whole in any case.
            opened.connection.pragma_update(None, "synchronous", if waits { "FULL" } else { "NORMAL" })?;
            self.waits = Some(waits);
        }
        opened.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        Ok(())
    }

    /// Runs what one or `many` requests do in the transaction that has begun, and ends that.
    pub(super) fn commit(
        &mut self,
        many: usize,
        run: impl FnOnce(&Turn<'_>) -> rusqlite::Result<()>,
    ) -> Result<(), Failure> {
        let Some(Opened { connection, .. }) = &self.opened else {
            return Err(Failure::unexpected("a transaction has no connection"));
        };
        let run = AssertUnwindSafe(|| run(&self.shared.turn(connection)).map_err(Trouble::Sqlite));
        let ran = catch_unwind(run).unwrap_or_else(|_| {
            tracing::error!("a request to the database has panicked");
            Err(Trouble::Other(Failure::unexpected("the request has panicked; nothing was changed")))
        });
        if let Err(trouble) = ran {
            return Err(self.failed(trouble));
        }
        let committed = connection.prepare_cached("COMMIT").and_then(|mut commit| commit.execute([]));
        self.fresh = false;
        self.written += many;
        if self.written >= ASK && !self.clearing && committed.is_ok() {
            self.look_at_log();
        }
        committed.map(drop).map_err(|error| {
            // What was refused for want of room is certainly not there. Of the rest a crash may still make something that is.
            let sent = error.sqlite_error_code() != Some(ErrorCode::DiskFull);
            Failure { sent, ..self.failed(error.into()) }
        })
    }

    /// Returns what is to be synced after a commit that is to last; nothing if the commit has waited for that.
    pub(super) fn log(&self) -> Option<Arc<File>> {
        self.opened.as_ref()?.log.clone()
    }

    /// Has the log copied if it has become long.
    fn look_at_log(&mut self) {
        let Some(Opened { connection, .. }) = &self.opened else { return };
        self.written = 0;
        if place::checkpoint(connection, "NOOP").is_ok_and(|log| log.rest >= LONG) {
            // If that thread has ended, so has this handler.
            self.clearing = self.clearer.send(()).is_ok();
        }
    }

    /// Copies the last of it when the log has been copied, if it has become so long that it has to begin anew.
    pub(super) fn clear(&mut self) {
        self.clearing = false;
        let Some(Opened { connection, .. }) = &self.opened else { return };
        let log = place::checkpoint(connection, "NOOP").and_then(|log| match log.pages {
            LONGEST.. => place::checkpoint(connection, "PASSIVE"),
            _ => Ok(log),
        });
        // Who reads an older state keeps the rest in the log, which then goes on.
        self.fresh |= log.is_ok_and(|log| log.rest == 0);
    }

    /// Has everything that is in the log on the disk in another way than by a sync of the log: in the file.
    pub(super) fn settle(&mut self) -> bool {
        self.fresh = true;
        let Some(Opened { connection, .. }) = &self.opened else { return false };
        place::checkpoint(connection, "FULL").is_ok_and(|log| log.rest == 0)
    }

    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn log_to(&mut self, log: File) {
        self.opened.as_mut().expect("something was written").log = Some(Arc::new(log));
    }

    /// Leaves the transaction, and the connection if it is of no use any more.
    fn failed(&mut self, trouble: Trouble) -> Failure {
        let left =
            |opened: &Opened| opened.connection.is_autocommit() || opened.connection.execute_batch("ROLLBACK").is_ok();
        let spoilt = matches!(&trouble, Trouble::Sqlite(error) if place::spoils_connection(error));
        self.opened.take_if(|opened| !left(opened) || spoilt);
        match trouble {
            Trouble::Sqlite(error) => place::failure(error),
            Trouble::Other(failure) => failure,
        }
    }
}

/// Why there is no transaction, or none any more.
enum Trouble {
    Sqlite(rusqlite::Error),
    Other(Failure),
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

/// Numbers by chance, of which nothing hangs but when somebody asks again.
struct Chance(u64);

impl Chance {
    /// Returns a number between 0 and 1.
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f64 / (1_u64 << 24) as f64
    }
}
