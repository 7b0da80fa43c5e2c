//! The threads that read: as many as are needed, each with a connection of its own. Whoever writes does not keep them waiting.
//!
//! Nothing here knows what is read.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use session_core::ErrorKind;

use super::Shared;
use super::job::{Request, request};
use super::place::{self, Opened};
use crate::database::Failure;

/// As many threads as there may be at most; a thread reads tens of thousands of sessions a second.
const MOST: u32 = 64;

/// How long to wait before the file is asked for again that nobody can read at this moment, because its log is being mended.
const PAUSE: Duration = Duration::from_millis(1);

type Job = Box<dyn FnOnce(&Shared, &mut Option<Opened>) + Send>;

/// What the threads are handed. Dropped, it ends them, and nobody waits for that.
pub(super) struct Readers {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
    line: Arc<Line>,
    most: usize,
}

struct Line {
    jobs: Mutex<mpsc::Receiver<Job>>,
    threads: AtomicUsize,
    idle: AtomicUsize,
}

impl Readers {
    pub(super) fn new(shared: Arc<Shared>, most: u32) -> Self {
        let (sender, jobs) = mpsc::channel();
        let line = Line { jobs: Mutex::new(jobs), threads: AtomicUsize::new(0), idle: AtomicUsize::new(0) };
        Self { shared, jobs: sender, line: Arc::new(line), most: most.min(MOST) as usize }
    }

    pub(super) async fn ask<T: Send + 'static>(
        &self,
        work: impl Fn(&Connection, &Shared) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let (request, caller) = request(self.shared.timeout);
        let job: Job = Box::new(move |shared, connection| read(shared, connection, request, work));
        if self.line.idle.load(Ordering::Acquire) == 0 {
            self.start();
        }
        if self.jobs.send(job).is_err() {
            return Err(Failure::new(ErrorKind::Unavailable, "the threads of the database have ended"));
        }
        // What only reads has changed nothing, whether it was answered or not.
        caller.answer(&self.shared.clocks, None).await.map_err(|failure| Failure { sent: false, ..failure })
    }

    /// Starts one more thread if there may be one.
    fn start(&self) {
        let more = |threads: usize| (threads < self.most).then_some(threads + 1);
        if self.line.threads.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            return;
        }
        let (shared, line) = (self.shared.clone(), self.line.clone());
        let started = thread::Builder::new().name("session-sqlite-read".into()).spawn(move || line.run(&shared));
        if started.is_err() {
            self.line.threads.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl fmt::Debug for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readers").field("most", &self.most).finish_non_exhaustive()
    }
}

impl Line {
    fn run(&self, shared: &Shared) {
        let mut connection = None;
        loop {
            self.idle.fetch_add(1, Ordering::AcqRel);
            let job = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            self.idle.fetch_sub(1, Ordering::AcqRel);
            let Ok(job) = job else { return };
            if catch_unwind(AssertUnwindSafe(|| job(shared, &mut connection))).is_err() {
                tracing::error!("a question to the database has panicked");
                connection = None;
            }
        }
    }
}

fn read<T>(
    shared: &Shared,
    connection: &mut Option<Opened>,
    request: Request<T>,
    work: impl Fn(&Connection, &Shared) -> rusqlite::Result<T>,
) {
    if !request.start() {
        return;
    }
    let outcome = loop {
        let opened = match connection.take_if(|opened| shared.place.leads_to(opened)) {
            Some(opened) => Ok(opened),
            None => shared.place.open(false),
        };
        let outcome = opened.and_then(|opened| work(&connection.insert(opened).connection, shared));
        match outcome {
            Err(error) if place::is_busy(&error) && Instant::now() < request.deadline => thread::sleep(PAUSE),
            outcome => break outcome,
        }
    };
    let outcome = outcome.map_err(|error| {
        if place::spoils_connection(&error) {
            *connection = None;
        }
        place::failure(error)
    });
    request.tell(outcome);
}
