//! Who waits for the disk: a few threads that do nothing else, so that no thread of a runtime does.
//!
//! The runtime's blocking pool would do, but a hop there and back puts a thread to sleep and wakes one at either end, and that costs
//! more than the disk does. These threads look for more work for a moment before they sleep, and give way to others while they
//! look: the task whose write has just reached the disk is then often back with its next one. A task that is alone looks as well
//! ([`SpinWait`]).
//!
//! Nothing here knows what is written, or where.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use session_core::spin::{self, SpinWait};

/// How many wait for the disk at the same time. It serves what comes at once together, so more gain little.
const MOST: usize = 16;
/// A thread that slept this long ends.
const IDLE: Duration = Duration::from_secs(10);

/// Waits for the disk, and tells of it.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// The threads, which begin with the work and end without it.
pub(crate) struct SyncThreads {
    shared: Arc<Shared>,
    /// How their answers are waited for.
    pub(crate) answers: SpinWait,
}

#[derive(Default)]
struct Shared {
    /// The length of `jobs`, for those who look.
    waiting: AtomicUsize,
    /// How many jobs are not done yet.
    under_way: AtomicUsize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// How many of the threads look for work, and will once more before they sleep.
    looking: usize,
    /// How many sleep and were not woken.
    sleeping: usize,
    /// How many were woken and do not know it yet.
    woken: usize,
    closed: bool,
}

impl SyncThreads {
    pub(crate) fn new() -> Self {
        Self { shared: Arc::default(), answers: SpinWait::new() }
    }

    /// Whether the disk had better be told by whoever asks, before the job is, to begin with its work. Not for a lone job, with
    /// which a thread begins sooner than that call returns; and not beside many, since a disk with enough to do makes wait who
    /// gives it still more.
    pub(crate) fn are_behind(&self) -> bool {
        (1..MOST).contains(&self.shared.under_way.load(Ordering::Relaxed))
    }

    /// Has `job` done soon, and to its end, and told; returns it if there is no thread to be had.
    pub(crate) fn run(&self, job: Job) -> Result<(), Job> {
        let mut state = self.shared.state();
        state.jobs.push_back(job);
        self.shared.under_way.fetch_add(1, Ordering::Relaxed);
        self.shared.waiting.store(state.jobs.len(), Ordering::Relaxed);
        if state.jobs.len() <= state.looking + state.woken {
            return Ok(());
        }
        if state.sleeping > 0 {
            state.sleeping -= 1;
            state.woken += 1;
            drop(state);
            self.shared.work.notify_one();
            return Ok(());
        }
        if state.threads < MOST {
            let shared = Arc::clone(&self.shared);
            let started = thread::Builder::new().name("session-sync".into()).spawn(move || shared.serve());
            match started {
                Ok(_) => state.threads += 1,
                Err(_) if state.threads == 0 => {
                    let job = state.jobs.pop_back();
                    self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
                    self.shared.waiting.store(state.jobs.len(), Ordering::Relaxed);
                    return job.map_or(Ok(()), Err);
                }
                Err(error) => {
                    tracing::debug!(%error, "no further thread to wait for the disk; those that are there have to do")
                }
            }
        }
        Ok(())
    }
}

impl Drop for SyncThreads {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.work.notify_all();
    }
}

impl fmt::Debug for SyncThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SyncThreads").field("threads", &self.shared.state().threads).finish_non_exhaustive()
    }
}

impl Shared {
    fn serve(&self) {
        while let Some(job) = self.next() {
            // Whoever waits for a job that panics is told by what it drops; the thread has others to serve.
            let _ = panic::catch_unwind(AssertUnwindSafe(job));
            self.under_way.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Returns the next job, or nothing if there was none for long; then this thread is not counted any more.
    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        if let Some(job) = self.take(&mut state) {
            return Some(job);
        }
        state.looking += 1;
        drop(state);
        let found = spin::look(|| {
            if self.waiting.load(Ordering::Relaxed) == 0 {
                return None;
            }
            let mut state = self.state();
            let job = self.take(&mut state)?;
            state.looking -= 1;
            Some(job)
        });
        if found.is_some() {
            return found;
        }
        let mut state = self.state();
        state.looking -= 1;
        let mut slept = false;
        loop {
            if let Some(job) = self.take(&mut state) {
                return Some(job);
            }
            if state.closed || slept {
                state.threads -= 1;
                return None;
            }
            state.sleeping += 1;
            let (woken, timeout) = self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if state.woken > 0 {
                state.woken -= 1
            } else {
                state.sleeping -= 1
            }
            slept = timeout.timed_out();
        }
    }

    fn take(&self, state: &mut State) -> Option<Job> {
        let job = state.jobs.pop_front()?;
        self.waiting.store(state.jobs.len(), Ordering::Relaxed);
        Some(job)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No job runs while this is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn every_job_is_done_and_no_more_threads_than_allowed_do_them() {
        let threads = SyncThreads::new();
        let (done, all) = mpsc::channel();
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        for round in 0..400u64 {
            let (done, running, most) = (done.clone(), Arc::clone(&running), Arc::clone(&most));
            let job: Job = Box::new(move || {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                // As a disk does, and now and then long enough for the others to have gone to sleep.
                thread::sleep(Duration::from_micros(round % 7 * 100));
                running.fetch_sub(1, Ordering::SeqCst);
                done.send(round).unwrap();
            });
            assert!(threads.run(job).is_ok());
            if round % 50 == 0 {
                thread::sleep(Duration::from_millis(3));
            }
        }
        drop(done);
        // What was asked for is done although nobody is there any more who asked.
        drop(threads);
        let mut rounds: Vec<u64> = all.iter().collect();
        rounds.sort_unstable();
        assert_eq!(rounds, (0..400).collect::<Vec<_>>());
        assert!(most.load(Ordering::SeqCst) <= MOST);
    }

    #[test]
    fn the_disk_is_told_early_beside_a_few_jobs_and_neither_alone_nor_beside_many() {
        let threads = SyncThreads::new();
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        for before in 0..2 * MOST {
            assert_eq!(threads.are_behind(), before > 0 && before < MOST, "beside {before}");
            let held = Arc::clone(&held);
            let job: Job = Box::new(move || {
                let _ = held.lock().map(|held| held.recv());
                std::panic::resume_unwind(Box::new("those that end badly have ended too"));
            });
            assert!(threads.run(job).is_ok());
        }
        for _ in 0..2 * MOST {
            release.send(()).unwrap();
        }
        while threads.shared.under_way.load(Ordering::Relaxed) > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(!threads.are_behind());
    }

    #[test]
    fn a_job_that_panics_takes_no_place_from_the_others() {
        let threads = SyncThreads::new();
        for _ in 0..2 * MOST {
            assert!(threads.run(Box::new(|| std::panic::resume_unwind(Box::new("on purpose")))).is_ok());
        }
        let (done, all) = mpsc::channel();
        assert!(threads.run(Box::new(move || done.send(()).unwrap())).is_ok());
        all.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
