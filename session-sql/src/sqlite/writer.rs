//! Who writes when, and what shares a transaction.
//!
//! A request that is alone, and waits for no disk, is carried out by whoever asks: to hand it to a thread and to be woken by that
//! takes longer than what it does. The rest is for the one thread of a handler that may wait: whatever waits when the file is free
//! goes into one transaction, and is told of its outcome once that is committed, and on the disk if it is to last. Nothing here
//! knows what a request does.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use session_core::ErrorKind;
use session_core::spin::{self, SpinWait};

use super::job::{Request, request};
use super::pen::Pen;
use super::place;
use super::table::Turn;
use super::{Shared, clear};
use crate::config::Durability;
use crate::database::Failure;

/// How much shares a transaction at most, so that other processes get their turn.
const MEMBERS: usize = 64;
const BYTES: usize = 256 << 10;

/// How long the thread looks for a call that was announced before it sleeps: longer than a lone request takes to write. It does not
/// give way meanwhile, because on a busy machine others then keep the processor for a hundred times as long.
const LOOKS: Duration = Duration::from_micros(30);

/// What a request asks of the writer, beside what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Errand {
    /// One row, of which no power cut need leave anything: it says who holds a lock, and whoever does has not survived it either.
    Light,
    /// The same with more rows.
    Heavy,
    /// What is to survive a power cut, and how many bytes are written for how many rows.
    Lasting { bytes: usize, rows: usize },
}

impl Errand {
    /// How many rows are written, about.
    fn rows(self) -> usize {
        match self {
            Self::Light => 1,
            Self::Heavy => MEMBERS,
            Self::Lasting { rows, .. } => rows,
        }
    }
}

/// Says what a request does in its transaction. It may be run again, in another one, if the first came to nothing.
trait Work<T>: FnMut(&Turn<'_>) -> rusqlite::Result<T> + Send + 'static {}

impl<T, F: FnMut(&Turn<'_>) -> rusqlite::Result<T> + Send + 'static> Work<T> for F {}

/// What was committed, and the log that is to be synced before anybody is told.
type Done<T> = (T, Option<Arc<File>>);

type Tell = Box<dyn FnOnce(Option<Failure>) + Send>;

/// The way to the pen. Dropped, it ends the thread, which nobody waits for.
pub(super) struct Writer {
    /// The thread has it, so that it is the thread that waits for the disk when it is closed.
    pen: Weak<Mutex<Pen>>,
    calls: mpsc::Sender<Call>,
    /// How many ask at this moment.
    asking: AtomicUsize,
    /// Those who have written by themselves and wait for the disk.
    syncs: SpinWait,
    shared: Arc<Shared>,
}

enum Call {
    /// There is going to be one: to wake takes the thread about as long as to write takes whoever asks.
    Soon,
    Serve(Box<dyn Job>),
    /// What was committed to this log is to last.
    Sync(Arc<File>, Tell),
}

impl Writer {
    pub(super) fn start(shared: Arc<Shared>) -> std::io::Result<Self> {
        let (sender, calls) = mpsc::channel();
        let mut started = Ok(());
        let pen = Arc::new_cyclic(|pen| {
            let clearer = clear::start(shared.clone(), pen.clone()).unwrap_or_else(|error| {
                started = Err(error);
                mpsc::channel().0
            });
            Mutex::new(Pen::new(shared.clone(), clearer))
        });
        started?;
        let (opens, saves) = (VecDeque::new(), VecDeque::new());
        let this =
            Self { pen: Arc::downgrade(&pen), calls: sender, asking: AtomicUsize::new(0), syncs: SpinWait::new(), shared };
        let mut thread = Thread { pen, calls, opens, saves, synced: Vec::new(), doubtful: false };
        thread::Builder::new().name("session-sqlite".into()).spawn(move || thread.run())?;
        Ok(this)
    }

    /// Runs `work` in a transaction. It may be run again, in another one, if the first came to nothing.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        errand: Errand,
        mut work: impl FnMut(&Turn<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let asking = Asking::one_more(&self.asking);
        let lasting = matches!(errand, Errand::Lasting { .. }) && self.shared.place.durability != Durability::None;
        if errand.rows() == 1
            && asking.alone
            && let Some(carried) = self.carry_out(lasting, &mut work)
        {
            drop(asking);
            return match carried? {
                (done, Some(log)) => self.sync(log, done).await,
                (done, None) => Ok(done),
            };
        }
        let (request, caller) = request(self.shared.timeout);
        let task = Task { work, done: None, request, errand, lasting };
        self.call(Call::Serve(Box::new(task)))?;
        caller.answer(&self.shared.clocks, None).await
    }

    /// Carries `work` out at once, on the thread of whoever asks; `None` if it would have to wait.
    fn carry_out<T>(
        &self,
        lasting: bool,
        work: &mut impl FnMut(&Turn<'_>) -> rusqlite::Result<T>,
    ) -> Option<Result<Done<T>, Failure>> {
        let pen = self.pen.upgrade()?;
        let mut pen = pen.try_lock().ok()?;
        if !pen.begin_now(lasting) {
            return None;
        }
        if lasting {
            let _ = self.calls.send(Call::Soon);
        }
        let mut done = None;
        let committed = pen.commit(1, |turn| {
            done = Some(work(turn)?);
            Ok(())
        });
        let log = if lasting { pen.log() } else { None };
        Some(committed.and_then(|()| done.map(|done| (done, log)).ok_or_else(|| Failure::unexpected(NOT_CARRIED_OUT))))
    }

    /// Waits until what was committed is on the disk.
    async fn sync<T: Send + 'static>(&self, log: Arc<File>, done: T) -> Result<T, Failure> {
        let (request, caller) = request(self.shared.timeout);
        request.start();
        let tell = move |failed: Option<Failure>| request.tell(failed.map_or(Ok(done), Err));
        self.call(Call::Sync(log, Box::new(tell))).map_err(|failure| Failure { sent: true, ..failure })?;
        caller.answer(&self.shared.clocks, Some(&self.syncs)).await
    }

    /// Says whether anybody asks at this moment.
    pub(super) fn is_asked(&self) -> bool {
        self.asking.load(Ordering::Relaxed) > 0
    }

    fn call(&self, call: Call) -> Result<(), Failure> {
        let ended = || Failure::new(ErrorKind::Unavailable, "the thread of the database has ended");
        self.calls.send(call).map_err(|_| ended())
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

/// Counts one who asks, until he is told or goes.
struct Asking<'a> {
    all: &'a AtomicUsize,
    alone: bool,
}

impl<'a> Asking<'a> {
    fn one_more(all: &'a AtomicUsize) -> Self {
        Self { all, alone: all.fetch_add(1, Ordering::Relaxed) == 0 }
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Ordering::Relaxed);
    }
}

const NOT_CARRIED_OUT: &str = "a request was committed and not carried out";

/// A request whose answer nobody but its caller knows the type of.
trait Job: Send {
    fn errand(&self) -> Errand;
    fn lasting(&self) -> bool;
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
    errand: Errand,
    lasting: bool,
}

impl<T: Send, W: Work<T>> Job for Task<T, W> {
    fn errand(&self) -> Errand {
        self.errand
    }

    fn lasting(&self) -> bool {
        self.lasting
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
            (None, None) => Err(Failure::unexpected(NOT_CARRIED_OUT)),
        };
        self.request.tell(outcome);
    }
}

struct Thread {
    pen: Arc<Mutex<Pen>>,
    calls: mpsc::Receiver<Call>,
    /// What need not survive a power cut.
    opens: VecDeque<Box<dyn Job>>,
    saves: VecDeque<Box<dyn Job>>,
    /// What was committed by others and is not told yet.
    synced: Vec<(Arc<File>, Tell)>,
    /// Whether a sync of the log has failed, after which the next one says nothing of what was written before.
    doubtful: bool,
}

impl Thread {
    fn run(&mut self) {
        loop {
            if self.opens.is_empty() && self.saves.is_empty() && self.synced.is_empty() {
                let Some(call) = self.next_call() else { return };
                self.take(call);
            }
            // The opens first: they do not wait for the disk, and their callers have something to do meanwhile.
            for lasting in [false, true] {
                self.receive();
                self.serve(lasting);
            }
            self.sync_for_others();
        }
    }

    /// Waits for a call; there is none any more if the handler is gone.
    fn next_call(&self) -> Option<Call> {
        // Whoever was told last is often back already.
        let call = spin::look(|| self.calls.try_recv().ok()).map_or_else(|| self.calls.recv(), Ok).ok()?;
        if !matches!(call, Call::Soon) {
            return Some(call);
        }
        let began = Instant::now();
        while began.elapsed() < LOOKS {
            match self.calls.try_recv() {
                Ok(call) => return Some(call),
                Err(mpsc::TryRecvError::Disconnected) => return None,
                Err(mpsc::TryRecvError::Empty) => std::hint::spin_loop(),
            }
        }
        Some(call)
    }

    fn receive(&mut self) {
        while let Ok(call) = self.calls.try_recv() {
            self.take(call);
        }
    }

    fn take(&mut self, call: Call) {
        match call {
            Call::Serve(job) => self.waiting(job.lasting()).push_back(job),
            Call::Sync(log, tell) => self.synced.push((log, tell)),
            Call::Soon => {}
        }
    }

    fn waiting(&mut self, lasting: bool) -> &mut VecDeque<Box<dyn Job>> {
        if lasting { &mut self.saves } else { &mut self.opens }
    }

    /// Carries out what waits for a transaction of this kind.
    fn serve(&mut self, lasting: bool) {
        let waiting = self.waiting(lasting);
        waiting.retain(|job| !job.is_withdrawn());
        let Some(deadline) = waiting.front().map(|job| job.deadline()) else { return };
        let pen = self.pen.clone();
        let mut pen = lock(&pen);
        if let Err(failure) = pen.begin(lasting, deadline) {
            if let Some(job) = self.waiting(lasting).pop_front() {
                job.tell(Some(failure));
            }
            return;
        }
        let mut batch = self.batch(lasting);
        match commit(&mut pen, &mut batch) {
            Ok(()) => {
                let log = pen.log();
                // Neither other processes nor whoever has only to take a lock waits for the disk.
                drop(pen);
                let failed = if lasting { self.sync(log) } else { None };
                for job in batch {
                    job.tell(failed.as_ref().map(Failed::to_failure));
                }
            }
            // What failed together is done one by one, so that each is told of its own. Nobody comes in between: whoever has gone
            // may be taking back what he has asked for, and that is to find it done.
            Err(_) if batch.len() > 1 => {
                let alone = |job: Box<dyn Job>| {
                    let mut batch = [job];
                    let done = pen.begin(lasting, batch[0].deadline()).and_then(|()| commit(&mut pen, &mut batch));
                    let [job] = batch;
                    (job, done.err())
                };
                let alone: Vec<_> = batch.into_iter().map(alone).collect();
                let log = pen.log();
                drop(pen);
                let unsynced = if lasting { self.sync(log) } else { None };
                for (job, failed) in alone {
                    job.tell(failed.or_else(|| unsynced.as_ref().map(Failed::to_failure)));
                }
            }
            Err(failure) => {
                if let Some(job) = batch.pop() {
                    job.tell(Some(failure));
                }
            }
        }
    }

    /// Takes what shares a transaction.
    fn batch(&mut self, lasting: bool) -> Vec<Box<dyn Job>> {
        self.receive();
        let waiting = self.waiting(lasting);
        let (mut batch, mut all) = (Vec::new(), 0);
        while batch.len() < MEMBERS
            && let Some(job) = waiting.pop_front_if(|job| batch.is_empty() || all + bytes(&**job) <= BYTES)
        {
            if job.start() {
                all += bytes(&*job);
                batch.push(job);
            }
        }
        batch
    }

    /// Syncs once for all who have committed by themselves, and tells them.
    fn sync_for_others(&mut self) {
        while let Some((log, _)) = self.synced.first() {
            let log = log.clone();
            let mine = |(other, _): &mut (Arc<File>, Tell)| Arc::ptr_eq(other, &log);
            let told: Vec<_> = self.synced.extract_if(.., mine).collect();
            let failed = self.sync(Some(log));
            told.into_iter().for_each(|(_, tell)| tell(failed.as_ref().map(Failed::to_failure)));
        }
    }

    /// Waits until what was committed is on the disk.
    fn sync(&mut self, log: Option<Arc<File>>) -> Option<Failed> {
        let log = log?;
        if !self.doubtful {
            let Err(error) = log.sync_data() else { return None };
            self.doubtful = true;
            return Some(Failed(Some(error)));
        }
        // The kernel reports a write that failed once, and takes it for done from then on.
        self.doubtful = !lock(&self.pen).settle();
        self.doubtful.then_some(Failed(None))
    }
}

/// That a sync has failed, for each of those who wait for it.
struct Failed(Option<std::io::Error>);

impl Failed {
    fn to_failure(&self) -> Failure {
        let source =
            self.0.as_ref().map(|error| error.raw_os_error().map_or(error.kind().into(), std::io::Error::from_raw_os_error));
        Failure { sent: true, ..place::sync_failure(source) }
    }
}

fn commit(pen: &mut Pen, batch: &mut [Box<dyn Job>]) -> Result<(), Failure> {
    let rows = batch.iter().map(|job| job.errand().rows()).sum();
    pen.commit(rows, |turn| batch.iter_mut().try_for_each(|job| job.run(turn)))
}

fn bytes(job: &dyn Job) -> usize {
    match job.errand() {
        Errand::Lasting { bytes, .. } => bytes,
        Errand::Light | Errand::Heavy => 0,
    }
}

/// No request panics while it has the pen: `commit` sees to that.
fn lock(pen: &Mutex<Pen>) -> MutexGuard<'_, Pen> {
    pen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use rusqlite::Connection;
    use tempfile::TempDir;

    use super::*;
    use crate::database::Owner;
    use crate::sqlite::clocks::Clocks;
    use crate::sqlite::place::Place;
    use crate::sqlite::row::Who;
    use crate::sqlite::table::Table;

    const SAVE: Errand = Errand::Lasting { bytes: 0, rows: 1 };

    /// Makes a writer that has written, so that nothing of the file is new to it.
    async fn writer(path: &Path, durability: Durability) -> Writer {
        let who = Who { owner: Owner { text: "a test".into(), process: 7 }, proven: false };
        let place = Place::new(path, durability, true).unwrap();
        let timeout = Duration::from_secs(20);
        let shared = Shared {
            place,
            table: Table::new("sessions"),
            who,
            strict: false,
            timeout,
            side: None,
            clocks: Clocks::default(),
        };
        let writer = Writer::start(Arc::new(shared)).unwrap();
        writer
            .ask(SAVE, |turn| turn.connection.execute_batch("CREATE TABLE t (n INTEGER); INSERT INTO t VALUES (0)"))
            .await
            .unwrap();
        writer
    }

    /// Counts up, and says on which thread.
    fn count_up(turn: &Turn<'_>) -> rusqlite::Result<thread::ThreadId> {
        turn.connection.execute("UPDATE t SET n = n + 1", [])?;
        Ok(thread::current().id())
    }

    fn counted(path: &Path) -> i64 {
        Connection::open(path).unwrap().query_row("SELECT n FROM t", [], |row| row.get(0)).unwrap()
    }

    #[tokio::test]
    async fn whoever_is_alone_writes_at_once_and_whoever_would_wait_has_the_thread_do_it() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("s.db");
        let (writer, here) = (writer(&path, Durability::Data).await, thread::current().id());
        assert_eq!(writer.ask(Errand::Light, count_up).await.unwrap(), here);
        assert_eq!(writer.ask(SAVE, count_up).await.unwrap(), here);
        assert_ne!(writer.ask(Errand::Heavy, count_up).await.unwrap(), here);
        let (one, two) = tokio::join!(writer.ask(SAVE, count_up), writer.ask(SAVE, count_up));
        assert!(one.unwrap() == here && two.unwrap() == here, "who waits for the disk only keeps nobody from writing");
        let other = Connection::open(&path).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let asked = async {
            let asked = writer.ask(Errand::Light, count_up);
            tokio::time::timeout(Duration::from_millis(20), asked).await.unwrap_err();
        };
        asked.await;
        let released = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            other.execute_batch("COMMIT").unwrap();
        };
        let (done, ()) = tokio::join!(writer.ask(Errand::Light, count_up), released);
        assert_ne!(done.unwrap(), here);
        assert_eq!(counted(&path), 6);
    }

    #[tokio::test]
    async fn a_save_whose_sync_fails_is_not_acknowledged_and_its_repeat_only_once_it_is_in_the_file() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("s.db");
        let writer = writer(&path, Durability::Data).await;
        // A pipe cannot be synced.
        let (pipe, _end) = std::io::pipe().unwrap();
        lock(&writer.pen.upgrade().unwrap()).log_to(File::from(std::os::fd::OwnedFd::from(pipe)));
        for errand in [SAVE, Errand::Lasting { bytes: 0, rows: 2 }] {
            let failure = writer.ask(errand, count_up).await.unwrap_err();
            assert_eq!((failure.kind, failure.sent), (ErrorKind::Unavailable, true));
            let reader = Connection::open(&path).unwrap();
            reader.execute_batch("BEGIN; SELECT n FROM t").unwrap();
            writer.ask(Errand::Light, count_up).await.unwrap();
            let failure = writer.ask(errand, |_| Ok(())).await.unwrap_err();
            assert!(failure.sent, "somebody reads an older state, which keeps the rest in the log");
            reader.execute_batch("COMMIT").unwrap();
            writer.ask(errand, |_| Ok(())).await.unwrap();
            let saved = dir.path().join("saved.db");
            // To close a file in this process would take the locks of its connections away.
            assert!(Command::new("cp").args([&path, &saved]).status().unwrap().success());
            assert_eq!(counted(&saved), counted(&path), "it is in the file, without the log");
        }
    }

    #[tokio::test]
    async fn a_log_that_grows_is_copied_and_begins_anew() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("s.db");
        let writer = writer(&path, Durability::None).await;
        for _ in 0..10_000 {
            writer.ask(Errand::Light, count_up).await.unwrap();
        }
        // Each has written a page at least.
        let (reader, began) = (Connection::open(&path).unwrap(), Instant::now());
        while place::checkpoint(&reader, "NOOP").unwrap().pages >= 10_000 {
            assert!(began.elapsed() < Duration::from_secs(20), "the log goes on and on");
            writer.ask(Errand::Light, count_up).await.unwrap();
        }
    }
}
