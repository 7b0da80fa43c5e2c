//! Changes that count only once enough replicas have them: a connection of their own, on which each batch ends with one `WAIT`.
//!
//! `WAIT` counts the replicas that have everything its own connection has written; on another connection it waits for nothing
//! (`protocol.md` 12). It also blocks its connection, so nothing else may travel there.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::{Cmd, Pipeline, Value};
use tokio::sync::oneshot;

use crate::link::{Failure, Link};

/// How many changes share one `WAIT` at most.
const BATCH: usize = 64;

/// The answer to a change, and how many replicas have it.
pub(crate) struct Answered {
    pub(crate) answer: Value,
    have: i64,
    wanted: u32,
}

impl Answered {
    /// Returns the answer if what it says counts.
    pub(crate) fn enough(self) -> Result<Value, Failure> {
        // What was refused is in force nowhere, so there is nothing to wait for.
        let applied = matches!(&self.answer, Value::Int(1..) | Value::Array(_));
        if applied && self.have < i64::from(self.wanted) {
            return Err(Failure::too_few(self.have, self.wanted));
        }
        Ok(self.answer)
    }
}

type Outcome = Result<Answered, Failure>;

#[derive(Clone)]
pub(crate) struct Replicas {
    shared: Arc<Shared>,
}

struct Shared {
    link: Link,
    count: u32,
    limit: Duration,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    changes: Vec<(Cmd, oneshot::Sender<Outcome>)>,
    /// Whether a task sends what is in here.
    running: bool,
}

impl Replicas {
    /// `limit` is how long a batch waits for `count` replicas; it has to be shorter than the link waits for answers.
    pub(crate) fn new(link: Link, count: u32, limit: Duration) -> Self {
        Self { shared: Arc::new(Shared { link, count, limit, queue: Mutex::default() }) }
    }

    /// Returns the connection that a server has if changes are to wait for its replicas.
    pub(crate) fn of(server: Option<&Self>) -> Result<&Self, Failure> {
        server.ok_or_else(|| Failure::unexpected("a server without a connection for its replicas"))
    }

    /// Sends a change and waits for the replicas.
    pub(crate) async fn ask(&self, change: Cmd) -> Outcome {
        let (sender, outcome) = oneshot::channel();
        let start = {
            let mut queue = self.shared.queue();
            queue.changes.push((change, sender));
            !std::mem::replace(&mut queue.running, true)
        };
        if start {
            // A task of its own, so that a caller who goes away takes nobody else's change with him.
            let running = Running(Some(self.shared.clone()));
            tokio::spawn(async move {
                if let Some(shared) = running.0.clone() {
                    shared.run().await;
                }
                running.ended();
            });
        }
        outcome.await.unwrap_or_else(|_| Err(Failure::abandoned()))
    }
}

/// Lets the next change start a task of its own if this one was cut short, with its runtime.
struct Running(Option<Arc<Shared>>);

impl Running {
    /// By itself, with nothing left to send.
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            let mut queue = shared.queue();
            queue.running = false;
            queue.changes.clear();
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&self) {
        loop {
            let batch: Vec<_> = {
                let mut queue = self.queue();
                if queue.changes.is_empty() {
                    queue.running = false;
                    return;
                }
                let size = queue.changes.len().min(BATCH);
                queue.changes.drain(..size).filter(|(_, sender)| !sender.is_closed()).collect()
            };
            if batch.is_empty() {
                continue;
            }
            let mut commands = Pipeline::with_capacity(batch.len() + 1);
            let mut senders = Vec::with_capacity(batch.len());
            for (change, sender) in batch {
                commands.add_command(change);
                senders.push(sender);
            }
            let limit = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX).max(1);
            commands.cmd("WAIT").arg(self.count).arg(limit);
            match self.link.ask(&commands).await {
                Ok(mut answers) => {
                    let have = match answers.pop() {
                        Some(Value::Int(have)) => have,
                        _ => 0,
                    };
                    for (sender, answer) in senders.into_iter().zip(answers) {
                        let _ = sender.send(Ok(Answered { answer, have, wanted: self.count }));
                    }
                }
                Err(failure) => {
                    for sender in senders {
                        let _ = sender.send(Err(failure.again()));
                    }
                }
            }
        }
    }
}

impl fmt::Debug for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replicas").field("count", &self.shared.count).finish_non_exhaustive()
    }
}
