//! The one thread of a handler that writes, and what shares a transaction.
//!
//! Whatever waits when the file is free goes into one transaction, and is told of its outcome once that is committed. Nothing here
//! knows what a request does.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::ErrorCode;
use session_core::ErrorKind;

use super::Shared;
use super::job::{Request, request};
use super::place::{self, Opened, Place};
use super::side::{self, Side};
use super::table::Turn;
use crate::config::Durability;
use crate::database::Failure;

/// How much shares a transaction at most, so that other processes get their turn.
const MEMBERS: usize = 64;
const BYTES: usize = 256 << 10;

/// The shortest and the longest pause before the first in line asks again for a file that somebody else is writing, and how long
/// those behind him wait before they look whether they are first.
const FIRST: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(2));
const BEHIND: Duration = Duration::from_micros(300);

/// Says what a request does in its transaction. It may be run again, in another one, if the first came to nothing.
trait Work<T>: FnMut(&Turn<'_>) -> rusqlite::Result<T> + Send + 'static {}

impl<T, F: FnMut(&Turn<'_>) -> rusqlite::Result<T> + Send + 'static> Work<T> for F {}

/// What the thread is handed. Dropped, it ends the thread, which nobody waits for.
pub(super) struct Writer {
    jobs: mpsc::Sender<Box<dyn Job>>,
    timeout: Duration,
}

impl Writer {
    pub(super) fn start(shared: Arc<Shared>) -> std::io::Result<Self> {
        let (sender, jobs) = mpsc::channel();
        let timeout = shared.timeout;
        let chance = Chance(shared.who.owner.process as u64 | 1);
        let (opens, saves) = (VecDeque::new(), VecDeque::new());
        let side = side::beside(&shared.place.path, None);
        let mut thread = Thread { shared, jobs, side, opened: None, synced: None, opens, saves, chance };
        thread::Builder::new().name("session-sqlite".into()).spawn(move || thread.run())?;
        Ok(Self { jobs: sender, timeout })
    }

    /// Runs `work` in a transaction. What is to survive a power cut says so, and how many bytes it writes.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        lasting: bool,
        bytes: usize,
        work: impl FnMut(&Turn<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let (request, caller) = request(self.timeout);
        let task = Task { work, done: None, request, lasting, bytes };
        if self.jobs.send(Box::new(task)).is_err() {
            return Err(Failure::new(ErrorKind::Unavailable, "the thread of the database has ended"));
        }
        caller.answer().await
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

/// A request whose answer nobody but its caller knows the type of.
trait Job: Send {
    fn lasting(&self) -> bool;
    fn bytes(&self) -> usize;
    fn deadline(&self) -> Instant;
    fn is_withdrawn(&self) -> bool;
    fn start(&self) -> bool;
    fn run(&mut self, turn: &Turn<'_>) -> rusqlite::Result<()>;
    fn tell(self: Box<Self>, failed: Option<Failure>);
}

struct Task<T, W> {
    work: W,
    done: Option<T>,
    request: Request<T>,
    lasting: bool,
    bytes: usize,
}

impl<T: Send, W: Work<T>> Job for Task<T, W> {
    fn lasting(&self) -> bool {
        self.lasting
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn deadline(&self) -> Instant {
        self.request.deadline
    }

    fn is_withdrawn(&self) -> bool {
        self.request.is_withdrawn()
    }

    fn start(&self) -> bool {
        self.request.start()
    }

    fn run(&mut self, turn: &Turn<'_>) -> rusqlite::Result<()> {
        self.done = Some((self.work)(turn)?);
        Ok(())
    }

    fn tell(self: Box<Self>, failed: Option<Failure>) {
        let outcome = match (failed, self.done) {
            (Some(failure), _) => Err(failure),
            (None, Some(done)) => Ok(done),
            (None, None) => Err(Failure::unexpected("a request was committed and not carried out")),
        };
        self.request.tell(outcome);
    }
}

struct Thread {
    shared: Arc<Shared>,
    jobs: mpsc::Receiver<Box<dyn Job>>,
    side: Option<Side>,
    opened: Option<Opened>,
    /// Whether the connection syncs what it commits.
    synced: Option<bool>,
    /// What need not survive a power cut, because it says who holds a lock, and whoever does has not survived it either.
    opens: VecDeque<Box<dyn Job>>,
    saves: VecDeque<Box<dyn Job>>,
    chance: Chance,
}

impl Thread {
    fn run(&mut self) {
        loop {
            if self.opens.is_empty() && self.saves.is_empty() {
                match self.jobs.recv() {
                    Ok(job) => self.line_up(job),
                    Err(mpsc::RecvError) => return,
                }
            }
            // The opens first: they do not wait for the disk, and their callers have something to do meanwhile.
            for lasting in [false, true] {
                self.receive();
                self.serve(lasting);
            }
        }
    }

    fn receive(&mut self) {
        while let Ok(job) = self.jobs.try_recv() {
            self.line_up(job);
        }
    }

    fn line_up(&mut self, job: Box<dyn Job>) {
        let lasting = job.lasting() && self.shared.place.durability != Durability::None;
        self.waiting(lasting).push_back(job);
    }

    fn waiting(&mut self, lasting: bool) -> &mut VecDeque<Box<dyn Job>> {
        if lasting { &mut self.saves } else { &mut self.opens }
    }

    /// Carries out what waits for a transaction of this kind.
    fn serve(&mut self, lasting: bool) {
        let waiting = self.waiting(lasting);
        waiting.retain(|job| !job.is_withdrawn());
        let Some(deadline) = waiting.front().map(|job| job.deadline()) else { return };
        if let Err(failure) = self.begin(lasting, deadline) {
            if let Some(job) = self.waiting(lasting).pop_front() {
                job.tell(Some(failure));
            }
            return;
        }
        self.receive();
        let waiting = self.waiting(lasting);
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < MEMBERS
            && let Some(job) = waiting.pop_front_if(|job| batch.is_empty() || bytes + job.bytes() <= BYTES)
        {
            if job.start() {
                bytes += job.bytes();
                batch.push(job);
            }
        }
        match self.commit(&mut batch) {
            Ok(()) => batch.into_iter().for_each(|job| job.tell(None)),
            // What failed together is done one by one, so that each is told of its own.
            Err(_) if batch.len() > 1 => batch.into_iter().for_each(|job| self.serve_alone(lasting, job)),
            Err(failure) => {
                if let Some(job) = batch.pop() {
                    job.tell(Some(failure));
                }
            }
        }
    }

    fn serve_alone(&mut self, lasting: bool, job: Box<dyn Job>) {
        let mut batch = [job];
        let outcome = self.begin(lasting, batch[0].deadline()).and_then(|()| self.commit(&mut batch));
        let [job] = batch;
        job.tell(outcome.err());
    }

    /// Begins a transaction that nobody else can write beside. Whoever waits stands in line with the writers of other handlers.
    fn begin(&mut self, lasting: bool, deadline: Instant) -> Result<(), Failure> {
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
        let connection = match &mut self.opened {
            Some(opened) => &opened.connection,
            none => {
                let opened = place.open(true)?;
                if !Place::log_ahead(&opened.connection)? {
                    let fact = "the file system of the database file, or its user, cannot keep a write-ahead log";
                    return Err(Trouble::Other(place::config(fact)));
                }
                self.synced = None;
                &none.insert(opened).connection
            }
        };
        if self.synced != Some(lasting) {
            // Without, a commit waits for no disk; what is in the log is whole in any case.
            connection.pragma_update(None, "synchronous", if lasting { "FULL" } else { "NORMAL" })?;
            self.synced = Some(lasting);
        }
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        Ok(())
    }

    /// Runs a batch in the transaction that has begun, and ends that.
    fn commit(&mut self, batch: &mut [Box<dyn Job>]) -> Result<(), Failure> {
        let run = AssertUnwindSafe(|| self.run_all(batch));
        let ran = catch_unwind(run).unwrap_or_else(|_| {
            tracing::error!("a request to the database has panicked");
            Err(Trouble::Other(Failure::unexpected("the request has panicked; nothing was changed")))
        });
        ran.map_err(|trouble| self.failed(trouble))?;
        let Some(opened) = &self.opened else { return Err(Failure::unexpected("a transaction has no connection")) };
        let committed = opened.connection.prepare_cached("COMMIT").and_then(|mut commit| commit.execute([]));
        committed.map(drop).map_err(|error| {
            // What was refused for want of room is certainly not there. Of the rest a crash may still make something that is.
            let sent = error.sqlite_error_code() != Some(ErrorCode::DiskFull);
            Failure { sent, ..self.failed(error.into()) }
        })
    }

    fn run_all(&self, batch: &mut [Box<dyn Job>]) -> Result<(), Trouble> {
        let Some(Opened { connection, .. }) = &self.opened else {
            return Err(Trouble::Other(Failure::unexpected("a transaction has no connection")));
        };
        let turn = self.shared.turn(connection)?;
        batch.iter_mut().try_for_each(|job| job.run(&turn))?;
        Ok(())
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
