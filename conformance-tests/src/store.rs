//! The store behind the liars: the contract in memory, with one place for each flaw to take effect.
//!
//! Nothing here is fit for use; with [`Flaw::None`] it is correct, and that is what makes each flaw the only thing wrong.

mod admin;
mod fence;
mod handler;
mod lock;
mod opening;
mod queue;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use session_core::{Error, ErrorKind, SessionId, Ttl, WriteId};
use tokio::sync::Semaphore;

use handler::StoreHandler;
use lock::StoreLock;
use queue::Latch;

use crate::liars::Flaw;

const AGES: Duration = Duration::from_secs(3600);
/// How long a flaw waits that should not wait: longer than any case allows.
const TOO_LONG: Duration = Duration::from_secs(4);
/// How long a flaw leaves a gap open between two steps that should be one.
const GAP: Duration = Duration::from_millis(3);

/// What all handlers of one namespace share.
pub(crate) struct Store {
    flaw: Flaw,
    strict: bool,
    inner: Mutex<Inner>,
    instances: AtomicU64,
    collecting: AtomicBool,
    /// What a collection found and left, for a flaw that trusts it.
    left: Mutex<Vec<String>>,
    openings: Arc<Semaphore>,
}

#[derive(Default)]
struct Inner {
    cells: BTreeMap<String, Cell>,
    latches: BTreeMap<String, Latch>,
    tickets: u64,
}

/// What is kept of one id.
#[derive(Default)]
struct Cell {
    record: Option<Stored>,
    /// The name of the destruction, and how long it is remembered.
    grave: Option<(WriteId, Instant)>,
}

struct Stored {
    data: Vec<u8>,
    ttl: Ttl,
    deadline: Instant,
    first_deadline: Instant,
    wid: WriteId,
    /// What the next write has to name; the write id, unless a flaw has other ideas.
    version: WriteId,
    /// The opening that wrote last.
    by: WriteId,
    /// The payload before this one.
    before: Option<Vec<u8>>,
}

fn fail(kind: ErrorKind, operation: &'static str) -> Error {
    let message = match kind {
        ErrorKind::Fenced => "somebody else took over",
        ErrorKind::Conflict => "somebody else was first",
        ErrorKind::Gone => "the session is no longer there",
        ErrorKind::LockTimeout => "somebody else held the lock for the whole wait",
        ErrorKind::TooLarge => "the record is larger than this store may hold",
        ErrorKind::Unsupported => "this access does not allow it",
        _ => "the store did not answer",
    };
    Error::new(kind, operation, message)
}

impl Cell {
    fn live(&self, now: Instant) -> Option<&Stored> {
        self.record.as_ref().filter(|record| record.deadline > now)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("flaw", &self.flaw).finish_non_exhaustive()
    }
}

impl Store {
    pub(crate) fn new(flaw: Flaw, strict: bool) -> Self {
        Self {
            flaw,
            strict: strict && flaw != Flaw::StrictIsIgnored,
            inner: Mutex::default(),
            instances: AtomicU64::new(0),
            collecting: AtomicBool::new(false),
            left: Mutex::default(),
            openings: Arc::new(Semaphore::new(8)),
        }
    }

    pub(crate) fn handler(self: &Arc<Self>) -> Arc<StoreHandler> {
        let instance = self.instances.fetch_add(1, Ordering::Relaxed);
        Arc::new(StoreHandler { store: self.clone(), instance, seen: Mutex::default() })
    }

    pub(crate) fn lock(self: &Arc<Self>) -> Arc<StoreLock> {
        Arc::new(StoreLock { store: self.clone(), instance: self.instances.fetch_add(1, Ordering::Relaxed) })
    }

    fn is(&self, flaw: Flaw) -> bool {
        self.flaw == flaw
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, id: &SessionId) -> String {
        match self.flaw {
            Flaw::IdsFoldCase => id.as_str().to_ascii_lowercase(),
            Flaw::IdsCollide => {
                let sum = id.as_str().bytes().fold(0u64, |sum, byte| (sum * 31 + u64::from(byte)) % 1009);
                format!("{sum:022}")
            }
            Flaw::IdsAreCut => id.as_str().chars().take(64).collect(),
            _ => id.as_str().to_owned(),
        }
    }

    fn latch_key(&self, key: &str) -> String {
        if self.is(Flaw::OneLockForAll) { "*".into() } else { key.to_owned() }
    }

    /// Runs `step` on one id, as one atomic step.
    fn with<T>(&self, key: &str, step: impl FnOnce(&mut Cell, &mut Latch) -> T) -> T {
        let latch_key = self.latch_key(key);
        let mut inner = self.inner();
        let Inner { cells, latches, .. } = &mut *inner;
        step(cells.entry(key.to_owned()).or_default(), latches.entry(latch_key).or_default())
    }

    fn is_live(&self, key: &str) -> bool {
        self.with(key, |cell, _| cell.live(Instant::now()).is_some())
    }

    /// Whether renewal or an exclusive open finds the record near its end, and prolongs it.
    fn prolong(cell: &mut Cell, length: Duration, now: Instant) {
        if let Some(record) = cell.record.as_mut().filter(|record| record.deadline > now) {
            record.deadline = record.deadline.max(now + length * 2);
        }
    }
}
