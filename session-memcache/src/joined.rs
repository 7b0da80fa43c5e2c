//! What waits for a server at the same moment goes there in one batch: one write, one read, one wake-up for many sessions.
//!
//! Whoever is alone is sent at once. Nothing here knows what a command is for; that the members of a batch have nothing to do with
//! each other is all that is relied on.

use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use session_core::Result;
use session_core::collector::{Batch, Class, Collector, Limits, Member, Reply};

use crate::transport::{Answers, Command, Failure, Flight, Life, Transport};

/// What is sent little of, in bytes: so many of those fit on the way, however long the answers are that come back meanwhile.
const LITTLE: usize = 1024;

/// A transport that joins batches.
pub(crate) struct Joined<T: Transport> {
    inner: Arc<T>,
    lanes: Vec<Collector<Lane<T>>>,
    /// How many batches are on their way to each server beside the lane.
    alone: Vec<AtomicUsize>,
    /// Each batch is a member of its own: what belongs together is in one.
    next: AtomicU64,
    patience: Duration,
}

impl<T: Transport> Joined<T> {
    /// Joins what goes over `inner`, which itself waits `timeout` for an answer.
    pub(crate) fn new(inner: T, timeout: Duration) -> Self {
        let inner = Arc::new(inner);
        let lane = |server| Collector::new(Lane { inner: inner.clone(), server }, Limits::default());
        let lanes = (0..inner.servers()).map(lane).collect();
        let alone = (0..inner.servers()).map(|_| AtomicUsize::new(0)).collect();
        // Once for the batch before, and once for its own.
        Self { inner, lanes, alone, next: AtomicU64::new(0), patience: timeout.saturating_mul(3) }
    }
}

/// A batch that is on its way by itself, until this is dropped.
struct Alone<'a>(&'a AtomicUsize);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The batches to one server.
struct Lane<T> {
    inner: Arc<T>,
    server: usize,
}

/// A batch on its way, taken out when it is sent.
struct Waiting(Mutex<(Vec<Command>, Option<Life>)>);

impl<T: Transport> Batch for Lane<T> {
    type Key = u64;
    type Op = Waiting;
    type Outcome = Result<Answers, Failure>;

    async fn send(&self, _: Class, members: &[Member<Waiting>]) -> Result<Vec<Reply<Self::Outcome>>> {
        let flights = members.iter().map(|member| {
            let mut waiting = member.op.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (commands, life) = mem::take(&mut *waiting);
            Flight { commands, life }
        });
        // What became of each is its own, and whether to ask again its caller's to decide.
        let answers = self.inner.exchange_all(self.server, flights.collect()).await;
        Ok(answers.into_iter().map(|answers| Reply::Done(Ok(answers))).collect())
    }
}

#[async_trait]
impl<T: Transport> Transport for Joined<T> {
    async fn exchange_all(&self, server: usize, flights: Vec<Flight>) -> Vec<Result<Answers, Failure>> {
        self.inner.exchange_all(server, flights).await
    }

    async fn exchange(&self, server: usize, commands: Vec<Command>, life: Option<Life>) -> Result<Answers, Failure> {
        // Whoever is alone need not stand in a lane.
        let alone = Alone(&self.alone[server]);
        if alone.0.fetch_add(1, Ordering::Relaxed) == 0 {
            return self.inner.exchange(server, commands, life).await;
        }
        drop(alone);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let bytes = commands.iter().map(Command::bytes).sum();
        let waiting = Waiting(Mutex::new((commands, life)));
        // Whoever sends much gets short answers, and long answers are got by those who send little: apart they cannot keep each
        // other from being sent and read.
        let class = if bytes > LITTLE { Class::Save } else { Class::Open };
        let submitted = self.lanes[server].submit(class, number, bytes, waiting);
        match tokio::time::timeout(self.patience, submitted).await {
            Ok(Ok(answers)) => answers,
            Ok(Err(error)) => Err(Failure::new(error.kind(), "a batch was cut short").after_sending(true)),
            Err(_) => Err(Failure::unavailable("it does not answer in time, and many wait").after_sending(false)),
        }
    }

    async fn keys(
        &self,
        server: usize,
        prefix: &str,
        key: &mut (dyn for<'k> FnMut(&'k str) + Send + '_),
    ) -> Result<(), Failure> {
        self.inner.keys(server, prefix, key).await
    }

    fn servers(&self) -> usize {
        self.inner.servers()
    }

    fn is_down(&self, server: usize) -> bool {
        self.inner.is_down(server)
    }

    fn item_limit(&self) -> usize {
        self.inner.item_limit()
    }
}

impl<T: Transport> fmt::Debug for Joined<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}
