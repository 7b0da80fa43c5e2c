//! Is the process of a holder still there? It keeps a lock of the server for as long as it lives.
//!
//! The lock is taken with `GET_LOCK` on one connection of its own, which the server frees as soon as the connection ends, whoever
//! ended it. While the connection is away, the rows say nothing of the process, and nobody takes it for dead.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlx::mysql::MySqlConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Row};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::link::Link;

/// How often the connection is used, so that it is known to be there, and not closed for its silence.
const BEAT: Duration = Duration::from_secs(5);

/// How long whoever connects waits for it.
const START: Duration = Duration::from_millis(250);

/// How long a server may take over it.
const LIMIT: Duration = Duration::from_secs(2);

/// The pauses between attempts to get it back, the last one again and again.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(20), Duration::from_millis(100), Duration::from_millis(300), Duration::from_secs(1)];

/// How long others have to come back, too, before one who is not there counts as dead: a server that restarts loses all.
const GRACE: Duration = Duration::from_secs(3);

/// Our own sign of life, and the right to judge others by theirs.
pub(super) struct Anchor {
    process: i64,
    /// Whether there is one server to ask, so that its locks are everybody's.
    allowed: AtomicBool,
    held: AtomicBool,
    /// Told when it is held.
    taken: Notify,
    /// From when on others may be judged, in milliseconds since `began`.
    from: AtomicI64,
    began: Instant,
    running: AtomicBool,
    /// Told when another connection has broken, so that this one may be away, too.
    broke: Arc<Notify>,
    /// The options of the connection, once they are known.
    options: Mutex<Option<MySqlConnectOptions>>,
}

impl Anchor {
    pub(super) fn new(process: i64, broke: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self {
            process,
            allowed: AtomicBool::new(false),
            held: AtomicBool::new(false),
            taken: Notify::new(),
            from: AtomicI64::new(i64::MAX),
            began: Instant::now(),
            running: AtomicBool::new(false),
            broke,
            options: Mutex::default(),
        })
    }

    /// Says whether the server can be asked for such locks.
    pub(super) fn allow(&self, alone: bool) {
        self.allowed.store(alone, Ordering::Relaxed);
    }

    /// Returns the process whose lock is in place.
    pub(super) fn held(&self) -> Option<i64> {
        self.held.load(Ordering::Acquire).then_some(self.process)
    }

    /// Waits until it holds, if somebody sees to that, for a moment at most.
    pub(super) async fn shown(&self) {
        let mut taken = std::pin::pin!(self.taken.notified());
        taken.as_mut().enable();
        if self.running.load(Ordering::Acquire) && self.held().is_none() {
            let _ = tokio::time::timeout(START, taken).await;
        }
    }

    /// Whether others may be taken for dead.
    pub(super) fn judges(&self) -> bool {
        let now = i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.held.load(Ordering::Acquire) && self.from.load(Ordering::Acquire) <= now
    }

    /// Sees to it that somebody keeps the lock, as long as this value lives.
    pub(super) fn wanted(self: &Arc<Self>, link: &Link) {
        if !self.allowed.load(Ordering::Relaxed) || self.running.load(Ordering::Relaxed) {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        if self.running.swap(true, Ordering::AcqRel) {
            return;
        }
        *self.options.lock().unwrap_or_else(PoisonError::into_inner) = Some(link.options());
        let keeper = Keeper { anchor: Arc::downgrade(self), broke: self.broke.clone() };
        runtime.spawn(async move { keeper.keep().await });
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        // Whoever keeps the lock for nobody lets go of it now.
        self.broke.notify_one();
    }
}

impl fmt::Debug for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Anchor").field("held", &self.held()).finish_non_exhaustive()
    }
}

/// Keeps the lock from a task. If its runtime ends, the next opener starts another.
struct Keeper {
    anchor: Weak<Anchor>,
    broke: Arc<Notify>,
}

impl Keeper {
    async fn keep(&self) {
        let mut failures = 0;
        let mut first = true;
        while let Some(anchor) = self.anchor.upgrade() {
            let process = anchor.process;
            let options = anchor.options.lock().unwrap_or_else(PoisonError::into_inner).clone();
            drop(anchor);
            let Some(options) = options else { return };
            if let Ok(Some(mut connection)) = tokio::time::timeout(LIMIT, take(&options, process)).await {
                let Some(anchor) = self.anchor.upgrade() else { return };
                let grace = if first { Duration::ZERO } else { GRACE };
                let from = (anchor.began.elapsed() + grace).as_millis();
                anchor.from.store(i64::try_from(from).unwrap_or(i64::MAX), Ordering::Release);
                anchor.held.store(true, Ordering::Release);
                anchor.taken.notify_waiters();
                drop(anchor);
                (failures, first) = (0, false);
                self.watch(&mut connection).await;
                self.lost();
            }
            let pause = PAUSES[failures.min(PAUSES.len() - 1)];
            failures += 1;
            tokio::time::sleep(pause).await;
        }
    }

    /// Returns when the connection is gone, or whoever wanted it.
    async fn watch(&self, connection: &mut sqlx::MySqlConnection) {
        loop {
            let _ = tokio::time::timeout(BEAT, self.broke.notified()).await;
            if self.anchor.strong_count() == 0 {
                return;
            }
            if !matches!(tokio::time::timeout(LIMIT, connection.ping()).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    fn lost(&self) {
        if let Some(anchor) = self.anchor.upgrade() {
            anchor.held.store(false, Ordering::Release);
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.lost();
        if let Some(anchor) = self.anchor.upgrade() {
            anchor.running.store(false, Ordering::Release);
        }
    }
}

async fn take(options: &MySqlConnectOptions, process: i64) -> Option<sqlx::MySqlConnection> {
    let mut connection = options.connect().await.ok()?;
    // Some servers close within seconds what says nothing.
    let text = format!("SET SESSION wait_timeout=600;SELECT GET_LOCK('sessionkit:{process}',0)");
    let row = sqlx::raw_sql(AssertSqlSafe(text)).fetch_one(&mut connection).await.ok()?;
    let got: Option<i64> = row.try_get_unchecked(0).ok()?;
    (got == Some(1)).then_some(connection)
}
