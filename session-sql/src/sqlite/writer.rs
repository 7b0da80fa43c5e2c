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

use rusqlite::{Connection, ErrorCode};
use session_core::ErrorKind;

use super::Shared;
use super::job::{Request, request};
use super::place::{self, Place};
use super::table::Turn;
use crate::config::Durability;
use crate::database::Failure;

/// How much shares a transaction at most, so that other processes get their turn.
const MEMBERS: usize = 64;
const BYTES: usize = 256 << 10;

/// The first and the longest pause before the file is asked for again that somebody else is writing.
const PAUSES: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(2));

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
        let chance = Chance(shared.owner.process as u64 | 1);
        let (opens, saves) = (VecDeque::new(), VecDeque::new());
        let mut thread = Thread { shared, connection: None, synced: None, opens, saves, chance };
        thread::Builder::new().name("session-sqlite".into()).spawn(move || thread.run(&jobs))?;
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
    connection: Option<Connection>,
    /// Whether the connection syncs what it commits.
    synced: Option<bool>,
    /// What need not survive a power cut, because it says who holds a lock, and whoever does has not survived it either.
    opens: VecDeque<Box<dyn Job>>,
    saves: VecDeque<Box<dyn Job>>,
    chance: Chance,
}

impl Thread {
    fn run(&mut self, jobs: &mpsc::Receiver<Box<dyn Job>>) {
        loop {
            if self.opens.is_empty() && self.saves.is_empty() {
                match jobs.recv() {
                    Ok(job) => self.line_up(job),
                    Err(mpsc::RecvError) => return,
                }
            }
            // The opens first: they do not wait for the disk, and their callers have something to do meanwhile.
            for lasting in [false, true] {
                jobs.try_iter().for_each(|job| self.line_up(job));
                let served = catch_unwind(AssertUnwindSafe(|| self.serve(lasting)));
                if served.is_err() {
                    // A transaction that was left in the middle ends with its connection, and who waited for it is told by a channel
                    // that is gone.
                    tracing::error!("a request to the database has panicked");
                    self.connection = None;
                }
            }
        }
    }

    fn line_up(&mut self, job: Box<dyn Job>) {
        let lasting = job.lasting() && self.shared.place.durability != Durability::None;
        if lasting { self.saves.push_back(job) } else { self.opens.push_back(job) }
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

    /// Begins a transaction that nobody else can write beside.
    fn begin(&mut self, lasting: bool, deadline: Instant) -> Result<(), Failure> {
        let mut pause = PAUSES.0;
        loop {
            let error = match self.try_begin(lasting) {
                Ok(began) => return began,
                Err(error) => error,
            };
            let rest = deadline.saturating_duration_since(Instant::now());
            if !place::is_busy(&error) || rest.is_zero() {
                return Err(self.failed(error));
            }
            // Nothing has begun, so nothing is lost by waiting. Two who have met once do not meet again after the same time.
            thread::sleep(pause.mul_f64(0.5 + self.chance.next()).min(rest));
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    fn try_begin(&mut self, lasting: bool) -> rusqlite::Result<Result<(), Failure>> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let connection = self.shared.place.open(true)?;
                if !Place::log_ahead(&connection)? {
                    return Ok(Err(place::config(
                        "the file system of the database file, or its user, cannot keep a write-ahead log",
                    )));
                }
                self.synced = None;
                none.insert(connection)
            }
        };
        if self.synced != Some(lasting) {
            // Without, a commit waits for no disk; what is in the log is whole in any case.
            connection.pragma_update(None, "synchronous", if lasting { "FULL" } else { "NORMAL" })?;
            self.synced = Some(lasting);
        }
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        Ok(Ok(()))
    }

    /// Runs a batch in the transaction that has begun, and ends that.
    fn commit(&mut self, batch: &mut [Box<dyn Job>]) -> Result<(), Failure> {
        let Some(connection) = &self.connection else { return Err(Failure::unexpected("a transaction has no connection")) };
        let shared = &self.shared;
        let mut run = || {
            let now = shared.table.now(connection)?;
            let turn = Turn { connection, table: &shared.table, who: &shared.owner, strict: shared.strict, now };
            batch.iter_mut().try_for_each(|job| job.run(&turn))
        };
        if let Err(error) = run() {
            return Err(self.failed(error));
        }
        let committed = connection.prepare_cached("COMMIT").and_then(|mut commit| commit.execute([]));
        committed.map(drop).map_err(|error| {
            // What was refused for want of room is certainly not there. Of the rest a crash may still make it something that is.
            let sent = error.sqlite_error_code() != Some(ErrorCode::DiskFull);
            Failure { sent, ..self.failed(error) }
        })
    }

    /// Leaves the transaction, and the connection if it is of no use any more.
    fn failed(&mut self, error: rusqlite::Error) -> Failure {
        let left = self
            .connection
            .as_ref()
            .is_none_or(|connection| connection.is_autocommit() || connection.execute_batch("ROLLBACK").is_ok());
        if !left || place::spoils_connection(&error) {
            self.connection = None;
        }
        place::failure(error)
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
