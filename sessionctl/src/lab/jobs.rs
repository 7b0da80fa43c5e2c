//! What is being run and what was run: one at a time, the last few kept to be looked at again.
//!
//! A job is a run of one strategy, or a comparison of all of them, one after the other on the same store.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use session_core::{SessionId, Sessions};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

use super::backends::Backend;
use super::guard::{Refusal, correlate};
use super::lane::{Board, Lane};
use super::plan::{Plan, Strategy};
use super::run::{prepare, run};
use super::story::{Story, tell};

/// How many are kept.
const KEPT: usize = 50;

/// All jobs of a lab.
#[derive(Debug)]
pub(super) struct Jobs {
    kept: Mutex<VecDeque<Arc<Job>>>,
    /// Two at once would measure each other.
    turn: Arc<Semaphore>,
    running: Mutex<Option<AbortHandle>>,
}

/// One job.
#[derive(Debug)]
pub(super) struct Job {
    id: u64,
    compares: bool,
    backend: String,
    plan: Plan,
    started: SystemTime,
    parts: Mutex<Vec<Part>>,
}

/// One strategy of a job.
#[derive(Clone, Debug)]
struct Part {
    strategy: Strategy,
    board: Arc<Board>,
    ended: Option<Result<Story, String>>,
}

/// A job as the page and scripts see it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    id: u64,
    kind: &'static str,
    /// `running`, `done` or `failed`.
    state: &'static str,
    backend: String,
    plan: Plan,
    started_ms: u64,
    runs: Vec<RunReport>,
}

#[derive(Debug, Serialize)]
struct RunReport {
    strategy: Strategy,
    title: &'static str,
    state: &'static str,
    /// How far the clock of this run is.
    now_us: u64,
    #[serde(flatten)]
    story: Option<Story>,
    lanes: Vec<Lane>,
    /// Under which number the log has more about a failure.
    correlation: Option<String>,
}

impl Jobs {
    pub(super) fn new() -> Self {
        Self { kept: Mutex::default(), turn: Arc::new(Semaphore::new(1)), running: Mutex::default() }
    }

    /// Starts a run of `strategy`, or of all of them.
    ///
    /// # Errors
    /// [`Busy`](Refusal::Busy) while another is running; [`Store`](Refusal::Store) if the store does not answer.
    pub(super) async fn start(
        &self,
        backend: &Backend,
        plan: Plan,
        strategy: Option<Strategy>,
    ) -> Result<Arc<Job>, Refusal> {
        let turn = Arc::clone(&self.turn).try_acquire_owned().map_err(|_| Refusal::Busy)?;
        let sessions = backend.sessions().await?;
        let mut kept = lock(&self.kept);
        let job = Arc::new(Job {
            id: kept.back().map_or(1, |job| job.id + 1),
            compares: strategy.is_none(),
            backend: backend.name.clone(),
            plan,
            started: SystemTime::now(),
            parts: Mutex::default(),
        });
        kept.push_back(Arc::clone(&job));
        if kept.len() > KEPT {
            kept.pop_front();
        }
        let strategies = strategy.map_or_else(|| Strategy::ALL.to_vec(), |one| vec![one]);
        let task = tokio::spawn(Arc::clone(&job).carry_out(sessions, strategies, turn));
        *lock(&self.running) = Some(task.abort_handle());
        Ok(job)
    }

    pub(super) fn find(&self, id: u64, compares: bool) -> Option<Arc<Job>> {
        lock(&self.kept).iter().find(|job| job.id == id && job.compares == compares).cloned()
    }

    /// Whether one is running.
    pub(super) fn busy(&self) -> bool {
        self.turn.available_permits() == 0
    }

    /// Stops what is running, and waits until it stands still: its store may vanish after that.
    pub(super) async fn stop(&self) {
        if let Some(task) = lock(&self.running).take() {
            task.abort();
        }
        // The permit is dropped with the task. The semaphore is never closed.
        let _ = self.turn.acquire().await;
    }
}

impl Job {
    pub(super) fn path(&self) -> String {
        format!("/{}/{}", if self.compares { "compare" } else { "runs" }, self.id)
    }

    async fn carry_out(self: Arc<Self>, sessions: Sessions, strategies: Vec<Strategy>, turn: OwnedSemaphorePermit) {
        for strategy in strategies {
            let board = Arc::new(Board::new(strategy, self.plan.works_ms.len()));
            let ended = match prepare(&sessions).await {
                Ok(id) => {
                    // The clock starts when there is a session to work on.
                    let board = Arc::new(Board::new(strategy, self.plan.works_ms.len()));
                    self.parts().push(Part { strategy, board: Arc::clone(&board), ended: None });
                    let found = run(&sessions, &self.plan, strategy, &board, &id).await;
                    remove(&sessions, &id).await;
                    found.map(|found| tell(strategy, &board.snapshot(), &found))
                }
                Err(error) => {
                    self.parts().push(Part { strategy, board, ended: None });
                    Err(error)
                }
            };
            let ended = ended.map_err(|error| correlate("run", &error));
            let failed = ended.is_err();
            if let Some(part) = self.parts().last_mut() {
                part.ended = Some(ended);
            }
            if failed {
                break;
            }
        }
        drop(turn);
    }

    /// What is known by now, whole or not.
    pub(super) fn report(&self) -> Report {
        let parts = self.parts().clone();
        let wanted = if self.compares { Strategy::ALL.len() } else { 1 };
        let runs: Vec<_> = parts.into_iter().map(Part::report).collect();
        let state = match () {
            () if runs.iter().any(|run| run.state == "failed") => "failed",
            () if runs.len() == wanted && runs.iter().all(|run| run.state == "done") => "done",
            () => "running",
        };
        Report {
            id: self.id,
            kind: if self.compares { "compare" } else { "run" },
            state,
            backend: self.backend.clone(),
            plan: self.plan.clone(),
            started_ms: self
                .started
                .duration_since(UNIX_EPOCH)
                .map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            runs,
        }
    }

    fn parts(&self) -> MutexGuard<'_, Vec<Part>> {
        lock(&self.parts)
    }
}

impl Part {
    fn report(self) -> RunReport {
        let (state, story, correlation) = match self.ended {
            None => ("running", None, None),
            Some(Ok(story)) => ("done", Some(story), None),
            Some(Err(correlation)) => ("failed", None, Some(correlation)),
        };
        let now_us = story.as_ref().map_or_else(|| self.board.now_us(), |story| story.total_us);
        let (strategy, title, lanes) = (self.strategy, self.strategy.title(), self.board.snapshot());
        RunReport { strategy, title, state, now_us, story, lanes, correlation }
    }
}

/// Removes the session of a run. If that fails, it expires soon.
async fn remove(sessions: &Sessions, id: &SessionId) {
    if let Err(error) = sessions.destroy(id).await {
        let _ = correlate("remove the session of a run", &error);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while one is held, and what they hold is whole after every change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
