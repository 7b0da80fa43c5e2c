//! What goes on behind the requests of one [`Sessions`](crate::Sessions): closing what was dropped, renewing what is held,
//! finishing what nobody waits for any more, or looks at.
//!
//! One task, started by the first open, and anew if its runtime has gone. It holds on to nothing but weak references, so it ends
//! with the last clone of its `Sessions`.

use std::collections::HashMap;
use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::handler::OpenSession;
use crate::lock::{Held, Lease, SessionLock};
use crate::owned::{Carried, PATIENCE, Watch, owned};
use crate::queue::Turn;

/// Leases of one lock, renewed together.
type Batch = (Arc<dyn SessionLock>, Vec<Arc<Lease>>);

pub(crate) struct Janitor {
    sender: Arc<Mutex<Option<mpsc::UnboundedSender<Message>>>>,
    renewals: Arc<Renewals>,
    watch: Arc<Watch>,
}

enum Message {
    Run(Carried),
    Carry(Carried),
    Drain(oneshot::Sender<()>),
}

impl Janitor {
    pub(crate) fn new(max_hold: Duration) -> Arc<Self> {
        let sender: Arc<Mutex<Option<mpsc::UnboundedSender<Message>>>> = Arc::default();
        // Weak, because the task that looks after the operations ends with the sender.
        let to = Arc::downgrade(&sender);
        let watch = Watch::new(move |carried| {
            if let Some(sender) = to.upgrade().and_then(|sender| guard(&sender).clone()) {
                let _ = sender.send(Message::Carry(carried));
            }
        });
        Arc::new(Self { sender, renewals: Arc::new(Renewals::new(max_hold)), watch: Arc::new(watch) })
    }

    /// Makes sure that a task serves on a living runtime.
    pub(crate) fn start(&self) -> Result<()> {
        let mut sender = guard(&self.sender);
        if sender.as_ref().is_some_and(|sender| !sender.is_closed()) {
            return Ok(());
        }
        let runtime = tokio::runtime::Handle::try_current().map_err(|e| {
            Error::new(ErrorKind::Config, "open", "sessions work on a tokio runtime; none is running").with_source(e)
        })?;
        let (new, receiver) = mpsc::unbounded_channel();
        runtime.spawn(serve(receiver, Arc::clone(&self.renewals), Arc::clone(&self.watch)));
        *sender = Some(new);
        Ok(())
    }

    /// Runs `work` to its end, whoever drops what. Without a runtime it is dropped.
    pub(crate) fn run(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(sender) = guard(&self.sender).as_ref() {
            // A refused message is dropped here, and what it holds cleans up after itself.
            let _ = sender.send(Message::Run(Box::pin(work)));
        }
    }

    /// Waits until all that was dropped before is closed.
    pub(crate) async fn drain(&self) {
        let (done, drained) = oneshot::channel();
        let sent = guard(&self.sender).as_ref().is_some_and(|sender| sender.send(Message::Drain(done)).is_ok());
        if sent {
            let _ = drained.await;
        }
    }

    /// Runs `work` to its end, whoever drops or forgets it, and returns what came of it.
    pub(crate) fn owned<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> impl Future<Output = Result<T>> + Send {
        owned(&self.watch, work)
    }

    /// What looks after operations that their callers drive.
    pub(crate) fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    /// The number of leases under renewal.
    pub(crate) fn renewing(&self) -> usize {
        guard(&self.renewals.table).entries.len()
    }
}

impl fmt::Debug for Janitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Janitor").field("renewing", &self.renewing()).finish()
    }
}

async fn serve(mut receiver: mpsc::UnboundedReceiver<Message>, renewals: Arc<Renewals>, watch: Arc<Watch>) {
    let mut tasks = JoinSet::new();
    let mut wake = renewals.next(Instant::now());
    // Whatever began under a task whose runtime has gone is looked after from now on.
    let mut look = Some(Instant::now());
    loop {
        tokio::select! {
            message = receiver.recv() => match message {
                Some(Message::Run(work)) => {
                    tasks.spawn(work);
                }
                Some(Message::Carry(work)) => drop(tokio::spawn(work)),
                Some(Message::Drain(done)) => {
                    // Beside this task, which has leases to renew meanwhile.
                    let mut before = mem::take(&mut tasks);
                    tokio::spawn(async move {
                        while before.join_next().await.is_some() {}
                        let _ = done.send(());
                    });
                }
                None => break,
            },
            () = until(wake) => {
                for (lock, leases) in renewals.due(Instant::now()) {
                    tasks.spawn(renew(lock, leases));
                }
                wake = renewals.next(Instant::now());
            }
            () = renewals.earlier.notified() => wake = renewals.next(Instant::now()),
            () = until(look) => {
                let now = Instant::now();
                let taken = watch.look(now);
                look = taken.is_some().then(|| now + PATIENCE);
                taken.into_iter().flatten().for_each(|work| drop(tokio::spawn(work)));
            }
            () = watch.begun() => look = Some(Instant::now() + PATIENCE),
            Some(_) = tasks.join_next() => {}
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn renew(lock: Arc<dyn SessionLock>, leases: Vec<Arc<Lease>>) {
    let patience = leases.iter().map(|lease| lease.length()).max().unwrap_or_default();
    // A store that hangs must not pile up renewals: after a whole lease there is nothing left to renew.
    let Ok(outcomes) = tokio::time::timeout(patience, lock.renew(&leases)).await else {
        tracing::warn!(leases = leases.len(), "renewal: the store did not answer within the lease");
        return;
    };
    for (lease, outcome) in leases.iter().zip(outcomes) {
        match outcome {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Gone) => {
                tracing::warn!(kind = %error.kind(), "renewal: the lease is lost");
                lease.mark_lost();
            }
            Err(error) => tracing::warn!(kind = %error.kind(), "renewal failed, the next tick tries again"),
        }
    }
}

/// The leases that are held through one `Sessions`. One timer, at a third of the lease, renews them in batches per lock.
struct Renewals {
    table: Mutex<Table>,
    earlier: Notify,
    max_hold: Duration,
}

#[derive(Default)]
struct Table {
    entries: HashMap<u64, Renewal>,
    next_key: u64,
    sleeping_until: Option<Instant>,
}

struct Renewal {
    lease: Weak<Lease>,
    lock: Arc<dyn SessionLock>,
    period: Duration,
    due: Instant,
    until: Instant,
}

impl Renewals {
    fn new(max_hold: Duration) -> Self {
        Self { table: Mutex::default(), earlier: Notify::new(), max_hold }
    }

    fn insert(&self, held: &Held) -> u64 {
        let now = Instant::now();
        let period = (held.lease.length() / 3).max(Duration::from_millis(1));
        let (lease, lock) = (Arc::downgrade(&held.lease), Arc::clone(&held.lock));
        let renewal = Renewal { lease, lock, period, due: now + period, until: now + self.max_hold };
        let mut table = guard(&self.table);
        let key = table.next_key;
        table.next_key += 1;
        if table.sleeping_until.is_none_or(|until| renewal.due < until) {
            table.sleeping_until = Some(renewal.due);
            self.earlier.notify_one();
        }
        table.entries.insert(key, renewal);
        key
    }

    fn remove(&self, key: u64) {
        guard(&self.table).entries.remove(&key);
    }

    /// When to look next. The timer stays set when what it was set for is closed early: it then finds nothing to do, which is
    /// cheaper than moving it on every close.
    fn next(&self, now: Instant) -> Option<Instant> {
        let mut table = guard(&self.table);
        table.sleeping_until = table.entries.values().map(|renewal| renewal.due.max(now)).min();
        table.sleeping_until
    }

    fn due(&self, now: Instant) -> Vec<Batch> {
        let mut batches: HashMap<usize, Batch> = HashMap::new();
        guard(&self.table).entries.retain(|_, renewal| {
            let Some(lease) = renewal.lease.upgrade().filter(|lease| !lease.is_lost()) else { return false };
            if now >= renewal.until {
                tracing::warn!("renewal: a session was held longer than max_hold; its lease now runs out");
                return false;
            }
            // What falls due soon after comes along: one trip instead of two.
            if renewal.due <= now + renewal.period / 8 {
                renewal.due = now + renewal.period;
                let address = Arc::as_ptr(&renewal.lock).cast::<()>() as usize;
                batches.entry(address).or_insert_with(|| (Arc::clone(&renewal.lock), Vec::new())).1.push(lease);
            }
            true
        });
        batches.into_values().collect()
    }
}

/// An open session on its way through tasks: with its turn, under renewal, closed by the janitor if nobody else does.
pub(crate) struct Opening {
    inner: Option<Box<dyn OpenSession>>,
    renewal: Option<u64>,
    janitor: Arc<Janitor>,
    // Last: the next task is admitted after everything else is given back.
    turn: Option<Turn>,
}

impl Opening {
    pub(crate) fn new(inner: Box<dyn OpenSession>, turn: Option<Turn>, janitor: Arc<Janitor>) -> Self {
        let mut opening = Self { inner: Some(inner), renewal: None, janitor, turn };
        opening.keep_renewed();
        opening
    }

    /// Takes a lease under renewal that came with a first write.
    pub(crate) fn keep_renewed(&mut self) {
        if self.renewal.is_none() {
            let held = self.inner.as_ref().and_then(|inner| inner.held());
            self.renewal = held.map(|held| self.janitor.renewals.insert(held));
        }
    }

    pub(crate) fn handler(&mut self) -> &mut dyn OpenSession {
        self.inner.as_mut().expect("an opening is used only until it is closed").as_mut()
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.inner.as_ref().and_then(|inner| inner.held()).is_some_and(|held| held.lease.is_lost())
    }

    /// Lets go of an opening that a save has closed, and admits the next task.
    pub(crate) fn closed(mut self) {
        self.end_renewal();
        self.inner = None;
    }

    /// Closes it now; a lock that cannot be given back ends with its lease.
    pub(crate) async fn close(mut self) -> Result<()> {
        self.end_renewal();
        let outcome = self.handler().close().await;
        self.inner = None;
        outcome
    }

    fn end_renewal(&mut self) {
        if let Some(key) = self.renewal.take() {
            self.janitor.renewals.remove(key);
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.end_renewal();
        if let Some(mut inner) = self.inner.take() {
            let turn = self.turn.take();
            self.janitor.run(async move {
                // Dropped later, closed or not: the handler's own `Drop` gives the lock back or leaves it to its lease.
                if let Err(error) = inner.close().await {
                    tracing::debug!(kind = %error.kind(), "a dropped session could not be closed");
                }
                drop(inner);
                drop(turn);
            });
        }
    }
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening").field("inner", &self.inner).finish_non_exhaustive()
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while these are held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
