//! A worker process of the hammer: its tasks open, think, write and note, and now and then it stops or kills itself.
//!
//! It judges nothing. Whether anything was lost, the parent finds out.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::getpid;
use serde::de::DeserializeOwned;
use session_core::{Error, ErrorKind, Result, Session, SessionHandler, SessionId, SessionView, Sessions};
use tokio::task::JoinSet;

use super::journal::{Cell, Journal, Stats, Waits};
use super::ledger::{COUNTER, PAD, Runs, writer_key};
use super::{Assignment, DONE, FAILED, GO, Hammer, HammerAccess, HammerLength, Patience, READY};
use crate::children::{parent_lines, tell_parent};
use crate::harness::Rng;

/// Is a worker process, for a parent that has called [`Hammer::run`]: `open` makes the handler of a DSN, and is asked again for
/// half a minute while the store is away.
///
/// It returns when the run is over, and the process should then end. If the parent dies, the process exits by itself. Nothing
/// else may be printed on the standard output by lines that begin like a worker's.
///
/// # Errors
/// [`Unexpected`](ErrorKind::Unexpected) if no hammer is at the other end of the standard input. Everything else is told to the
/// parent.
///
/// # Panics
/// If it is not called from within a tokio runtime with I/O and time.
pub async fn worker(open: impl AsyncFn(&str) -> Result<Arc<dyn SessionHandler>>) -> Result<()> {
    let mut parent = parent_lines();
    let assignment = parent.recv().await.and_then(|line| serde_json::from_str::<Assignment>(&line).ok());
    let Some(assignment) = assignment else {
        return Err(Error::new(ErrorKind::Unexpected, "hammer", "a worker is started by the hammer, not by hand"));
    };
    let outcome = async {
        let patience = Patience::new();
        let handler = loop {
            match open(&assignment.dsn).await {
                Err(error) => patience.after(error).await?,
                Ok(handler) => break handler,
            }
        };
        let bench = Arc::new(Bench::new(&assignment, handler)?);
        while let Err(error) = bench.find_the_sessions().await {
            patience.after(error).await?;
        }
        tell_parent(READY);
        if parent.recv().await.as_deref() != Some(GO) {
            return Ok(());
        }
        let listener = Arc::clone(&bench);
        tokio::spawn(async move {
            // Whatever comes now says to stop.
            parent.recv().await;
            listener.stop.store(true, Ordering::Release);
        });
        bench.work(assignment.incarnation).await
    };
    match outcome.await {
        Ok(()) => tell_parent(DONE),
        Err(error) => tell_parent(&format!("{FAILED} {} {}", error.kind(), told(&error))),
    }
    Ok(())
}

/// An error as one line, with its cause.
fn told(error: &Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("{error}{cause}").replace('\n', " ")
}

/// What the tasks of a worker share.
struct Bench {
    hammer: Hammer,
    slot: u32,
    ids: Vec<SessionId>,
    sessions: Sessions,
    /// The same store without its lock, for who does not take it.
    unlocked: Sessions,
    journal: Journal,
    counts: Mutex<(Stats, Waits)>,
    stop: AtomicBool,
    told_error: AtomicBool,
    faults: mpsc::Sender<(Duration, Signal)>,
}

impl Bench {
    fn new(assignment: &Assignment, handler: Arc<dyn SessionHandler>) -> Result<Self> {
        let hammer = assignment.hammer.clone();
        let ids = assignment.ids.iter().map(|id| SessionId::parse(id).expect("the parent sends ids")).collect();
        let journal = Journal::open(Path::to_owned(&assignment.journal), hammer.tasks, hammer.sessions)?;
        let counts = Mutex::new((journal.stats()?, journal.waits()?));
        Ok(Self {
            sessions: hammer.sessions(Arc::clone(&handler)).build()?,
            unlocked: hammer.sessions(handler).locking(false).build()?,
            slot: assignment.slot,
            hammer,
            ids,
            journal,
            counts,
            stop: AtomicBool::new(false),
            told_error: AtomicBool::new(false),
            faults: strike_from_aside(),
        })
    }

    /// A store that lives in one process alone is a mistake of whoever has started the hammer, not lost updates.
    async fn find_the_sessions(&self) -> Result<()> {
        if self.sessions.view(&self.ids[0]).await?.exists() {
            return Ok(());
        }
        let text = "the session that the hammer has made is not there: this store is not shared between processes";
        Err(Error::new(ErrorKind::Config, "hammer", text))
    }

    async fn work(self: &Arc<Self>, incarnation: u64) -> Result<()> {
        let mut tasks = JoinSet::new();
        for task in 0..self.hammer.tasks {
            let stream = (u64::from(self.slot) << 32) | (u64::from(task) << 48) | incarnation;
            let mut random = Rng::new(self.hammer.seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            // Two streams whose states are near each other must not run side by side.
            let rng = Rng::new(random.bits());
            let worker = Worker { bench: Arc::clone(self), task, key: writer_key(self.slot, task), rng };
            tasks.spawn(worker.run());
        }
        let mut flush = tokio::time::interval(Duration::from_millis(20));
        let outcome = loop {
            tokio::select! {
                ended = tasks.join_next() => match ended {
                    None => break Ok(()),
                    Some(Ok(Ok(()))) => {}
                    Some(Ok(Err(error))) => break Err(error),
                    Some(Err(_)) => break Err(Error::new(ErrorKind::Unexpected, "hammer", "a task of a worker has panicked")),
                },
                _ = flush.tick() => self.flush()?,
            }
        };
        self.flush()?;
        self.sessions.shutdown().await;
        self.unlocked.shutdown().await;
        outcome
    }

    fn counts(&self) -> MutexGuard<'_, (Stats, Waits)> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self) -> Result<()> {
        let counts = self.counts();
        self.journal.set_stats(&counts.0, &counts.1)
    }

    /// Counts what does not happen in every cycle, and has it in the journal before anybody can be killed for it.
    fn count(&self, count: impl FnOnce(&mut Stats)) -> Result<()> {
        let mut counts = self.counts();
        count(&mut counts.0);
        self.journal.set_stats(&counts.0, &counts.1)
    }

    fn over(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// Strikes this process from a thread of its own, a little later, at whatever point it then is.
fn strike_from_aside() -> mpsc::Sender<(Duration, Signal)> {
    let (sender, strikes) = mpsc::channel();
    std::thread::spawn(move || {
        for (delay, signal) in strikes {
            std::thread::sleep(delay);
            let _ = kill(getpid(), signal);
        }
    });
    sender
}

/// One task.
struct Worker {
    bench: Arc<Bench>,
    task: u32,
    key: String,
    rng: Rng,
}

/// A fault that this cycle is to suffer.
#[derive(Clone, Copy)]
struct Strike {
    signal: Signal,
    in_hold: bool,
}

/// How a cycle ended, where there is something to note.
enum Cycle {
    Saved(Result<()>),
    NotOpened(Error),
    /// The session is not there.
    Absent,
    /// The run ended while it was waited for.
    Late,
}

impl Worker {
    async fn run(mut self) -> Result<()> {
        let mut left = self.quota()?;
        while left > 0 && !self.bench.over() {
            // Where no call ever has to wait, the tasks before this one would be the only ones that run.
            tokio::task::yield_now().await;
            let at = u32::try_from(self.rng.below(self.bench.ids.len() as u64)).expect("at most 10,000 sessions");
            let cell = self.bench.journal.cell(self.task, at)?;
            let n = cell.begun + 1;
            let begun = Cell { begun: n, resolved: cell.resolved };
            let cycle = self.cycle(at, n, begun).await;
            let set = |cell| self.bench.journal.set_cell(self.task, at, cell);
            match cycle {
                Cycle::Saved(Ok(())) => {
                    set(Cell { begun: n, resolved: n })?;
                    left -= 1;
                }
                Cycle::Saved(Err(error)) if error.kind() == ErrorKind::Unknown => {
                    self.bench.journal.doubt(self.task, at, n)?;
                    set(Cell { begun: n, resolved: n })?;
                }
                Cycle::Saved(Err(error)) => {
                    // Certainly not applied, so the number is given to the next write.
                    set(cell)?;
                    self.refused(error).await?;
                }
                Cycle::NotOpened(error) => self.refused(error).await?,
                Cycle::Absent => {
                    self.bench.count(|stats| stats.gone += 1)?;
                    // It will not come back; there is no hurry to count that again.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Cycle::Late => {}
            }
        }
        Ok(())
    }

    /// How many writes this task still has to do, when they are counted: its share, less what those before it have done.
    fn quota(&self) -> Result<u64> {
        let HammerLength::Ops(ops) = self.bench.hammer.length else { return Ok(u64::MAX) };
        let hammer = &self.bench.hammer;
        let writers = u64::from(hammer.processes) * u64::from(hammer.tasks);
        let mine = u64::from(self.bench.slot) * u64::from(hammer.tasks) + u64::from(self.task);
        let share = ops / writers + u64::from(mine < ops % writers);
        let mut done = 0;
        for session in 0..hammer.sessions {
            let doubtful = self.bench.journal.doubtful(self.task, session)?.len() as u64;
            done += self.bench.journal.cell(self.task, session)?.resolved - doubtful;
        }
        Ok(share.saturating_sub(done))
    }

    /// Counts a refusal. What no repetition can mend ends the run.
    async fn refused(&self, error: Error) -> Result<()> {
        match error.kind() {
            ErrorKind::Fenced => self.bench.count(|stats| stats.fenced += 1),
            ErrorKind::Conflict => self.bench.count(|stats| stats.conflicts += 1),
            ErrorKind::Gone => self.bench.count(|stats| stats.gone += 1),
            ErrorKind::Corrupt => self.bench.count(|stats| stats.corrupt += 1),
            ErrorKind::LockTimeout | ErrorKind::Busy => self.bench.count(|stats| stats.refused += 1),
            ErrorKind::Unavailable | ErrorKind::Unknown => {
                self.bench.count(|stats| stats.errors += 1)?;
                if !self.bench.told_error.swap(true, Ordering::Relaxed) {
                    tell_parent(&format!("error {}", told(&error)));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok(())
            }
            _ => Err(error),
        }
    }

    async fn cycle(&mut self, at: u32, n: u64, begun: Cell) -> Cycle {
        let strike = self.strike();
        if let Some(Strike { signal, in_hold: false }) = strike {
            let delay = self.rng.duration(self.bench.hammer.hold + Duration::from_millis(2));
            // The thread lives as long as the process.
            let _ = self.bench.faults.send((delay, signal));
        }
        let outcome = match self.bench.hammer.access {
            HammerAccess::None => self.overwrite(at, n, begun, strike).await,
            _ => self.append(at, n, begun, strike).await,
        };
        outcome.unwrap_or_else(|error| Cycle::Saved(Err(error)))
    }

    fn strike(&mut self) -> Option<Strike> {
        let mut hit = |percent: f64| (self.rng.below(1_000_000) as f64) < percent * 10_000.0;
        let hammer = &self.bench.hammer;
        let signal = if hit(hammer.kill) {
            Signal::SIGKILL
        } else if hit(hammer.stall) {
            Signal::SIGSTOP
        } else {
            return None;
        };
        Some(Strike { signal, in_hold: hit(50.0) })
    }

    /// Thinks, and is struck in the middle of it if that is its lot.
    async fn think(&self, strike: Option<Strike>) {
        let hold = self.bench.hammer.hold;
        if hold > Duration::ZERO {
            tokio::time::sleep(hold / 2).await;
        }
        if let Some(Strike { signal, in_hold: true }) = strike {
            // The whole process stands still in here, until the parent lets it go on.
            let _ = raise(signal);
        }
        if hold > Duration::ZERO {
            tokio::time::sleep(hold / 2).await;
        }
    }

    fn acquired(&self, asked: Instant) {
        let waited = asked.elapsed();
        let mut counts = self.bench.counts();
        counts.0.acquired += 1;
        counts.0.longest_wait_us = counts.0.longest_wait_us.max(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
        counts.1.note(waited);
    }

    /// Everything that goes through a session: under the lock, optimistic, merged.
    async fn append(&self, at: u32, n: u64, begun: Cell, strike: Option<Strike>) -> Result<Cycle> {
        let id = &self.bench.ids[at as usize];
        let asked = Instant::now();
        let opened = match self.bench.hammer.access {
            HammerAccess::Merge => self.bench.sessions.merge(id).await,
            HammerAccess::Optimistic => self.bench.unlocked.open(id).await,
            _ => self.bench.sessions.open(id).await,
        };
        let mut session = match opened {
            Ok(session) => session,
            Err(error) => return Ok(Cycle::NotOpened(error)),
        };
        self.acquired(asked);
        if session.is_new() {
            let _ = session.abort().await;
            return Ok(Cycle::Absent);
        }
        if self.bench.over() {
            let _ = session.abort().await;
            return Ok(Cycle::Late);
        }
        if self.bench.hammer.access == HammerAccess::Merge {
            session.update_key(COUNTER, |count: Option<u64>| count.unwrap_or_default() + 1)?;
        } else {
            let count: u64 = session.get(COUNTER)?.unwrap_or_default();
            session.insert(COUNTER, &(count + 1))?;
        }
        let mut runs: Runs = session.get(&self.key)?.unwrap_or_default();
        runs.insert(n, self.most_runs());
        session.insert(&self.key, &runs)?;
        self.think(strike).await;
        self.bench.journal.set_cell(self.task, at, begun)?;
        Ok(Cycle::Saved(session.close().await.map(|_| ())))
    }

    /// The control group: what was read at the beginning, and our write in it, replaces whatever is there at the end.
    async fn overwrite(&self, at: u32, n: u64, begun: Cell, strike: Option<Strike>) -> Result<Cycle> {
        let id = &self.bench.ids[at as usize];
        let asked = Instant::now();
        let view = match self.bench.sessions.view(id).await {
            Ok(view) => view,
            Err(error) => return Ok(Cycle::NotOpened(error)),
        };
        self.acquired(asked);
        if !view.exists() {
            return Ok(Cycle::Absent);
        }
        let mut runs: Runs = view.get(&self.key)?.unwrap_or_default();
        runs.insert(n, self.most_runs());
        self.think(strike).await;
        self.bench.journal.set_cell(self.task, at, begun)?;
        loop {
            let mut session = self.bench.unlocked.open(id).await?;
            if session.is_new() {
                let _ = session.abort().await;
                return Err(Error::new(ErrorKind::Gone, "hammer", "the session is no longer there"));
            }
            session.clear();
            for key in view.keys().filter(|key| *key != self.key) {
                match key {
                    COUNTER => session.insert(COUNTER, &(view.get::<u64>(COUNTER)?.unwrap_or_default() + 1))?,
                    PAD => copy::<String>(&view, &mut session, PAD)?,
                    key => copy::<Runs>(&view, &mut session, key)?,
                }
            }
            session.insert(&self.key, &runs)?;
            match session.close().await {
                // Somebody else was quicker: his write is what we overwrite now.
                Err(error) if error.kind() == ErrorKind::Conflict => tokio::task::yield_now().await,
                outcome => return Ok(Cycle::Saved(outcome.map(|_| ()))),
            }
        }
    }

    /// How many runs a list may have. Honest lists stay far below; those of the control group are full of gaps.
    fn most_runs(&self) -> usize {
        if self.bench.hammer.access == HammerAccess::None { 64 } else { 4096 }
    }
}

fn copy<T: DeserializeOwned + serde::Serialize>(view: &SessionView, session: &mut Session, key: &str) -> Result<()> {
    match view.get::<T>(key)? {
        Some(value) => session.insert(key, &value),
        None => Ok(()),
    }
}
