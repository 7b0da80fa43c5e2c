//! How the lock of a session is held in an open transaction, as `lock=transaction` asks for: who waits for it, and when it ends.
//!
//! # What the transaction is for
//!
//! An opener inserts the key of the session into a table of its own, the table of holds, or locks its row there, in a transaction
//! that stays open for as long as the session does. Whoever else wants that row waits in the database and is let in by it, and a
//! holder whose process dies frees the row with his connection, at once. That is all that the transaction does. The lease stands
//! in the row of the session as ever, each write is a statement that commits by itself and is fenced by itself, and everything
//! that decides whether a write is applied is what it is with `lock=lease`. So
//!
//! * a logout waits for nobody: the row of the session is locked by no transaction, and what the holder writes afterwards is
//!   refused with `Gone` by the trace that the logout left;
//! * a write that keeps the session open is durable and visible when it returns, and nobody gets in between;
//! * processes with `lock=lease` and with `lock=transaction` exclude each other on one table, because all of them go by the lease;
//! * an optimistic write is refused while anybody holds, and a view waits for nobody.
//!
//! # Who gets in
//!
//! The tokens of locks that come with a transaction bear a mark ([`mark`]). Whoever has the row of a session in the table of holds
//! knows that any other marked token in the row of the session is that of a holder whose transaction has ended without him, and
//! may [evict](Transactions::evict) it, however long its lease. Against every other token he waits as with `lock=lease`. The
//! evicted holder is fenced like any whose lease has ended: if he is alive after all (the server has closed his connection), his
//! next write finds somebody else's token, or somebody else's write, and is refused.
//!
//! Whoever waits for that row looks at the row of the session meanwhile, at longer and longer intervals. If the lease has ended
//! there, or an administrator has broken it, he takes it without a transaction, under a token without the mark: neither a process
//! that was stopped nor a connection that a dead network keeps open holds a session for longer than its lease. If the session was
//! destroyed, he is told so.
//!
//! # What bounds a hold
//!
//! A task of its own owns the connection of each hold, and nobody cancels it: a request that goes away, at whatever moment, leaves
//! it without somebody to answer to, and it rolls back. It does so, too, when the lease has ended without having been renewed. The
//! database is told to end the transaction by itself a little after that, for a process that was stopped. A renewal asks the
//! connection of the hold for a sign of life; if there is none, the lease counts as lost.
//!
//! Tasks of one process that want one session queue here first, so that a session never has more than one of the connections
//! for holds.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use session_core::{ErrorKind, LeaseToken};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::config::SqlConfig;
use crate::database::Failure;

/// How long a transaction waits in the database at a time, before it looks whether anybody still waits for it.
const SLICE: Duration = Duration::from_secs(1);

/// How long the first attempt waits: whoever is not let in by then knows that somebody else holds the session.
const FIRST: Duration = Duration::from_millis(20);

/// As long as for ever, for instants and for databases.
const EVER: Duration = Duration::from_secs(14 * 24 * 3600);

/// How much later than this process the database ends a transaction in which nothing happens.
const MARGIN: Duration = Duration::from_millis(250);

/// After so long without work a connection is not trusted any more.
const IDLE: Duration = Duration::from_secs(240);

/// What a kind of database has to be able to do for holds.
#[async_trait]
pub(crate) trait Transactions: fmt::Debug + Send + Sync + 'static {
    /// Makes a connection.
    async fn connect(&self) -> Result<Box<dyn Transaction>, Failure>;

    /// Ends the lease that a marked token has in the row of the session, and gives up the place that one has there; says whether
    /// there was one. Only whoever has the session in the table of holds may ask for that.
    async fn evict(&self, key: &str) -> Result<bool, Failure>;

    /// Makes the table of holds if it is not there.
    async fn create_table(&self) -> Result<(), Failure>;

    /// Asks whether there is one.
    async fn check(&self) -> Result<(), Failure>;

    /// Frees what holds have left of at most `limit` sessions that are no longer there. It waits for nobody.
    async fn gc(&self, limit: u32) -> Result<(), Failure>;
}

/// A connection, and the one transaction on it.
#[async_trait]
pub(crate) trait Transaction: Send {
    /// Begins a transaction and locks the session in it, waiting for at most `wait`; zero tries once. The database is to end it if
    /// nothing happens for `idle`. With `existing`, an id without a live record may be answered as [`Begun::Absent`]. There is no
    /// open transaction unless the answer is [`Begun::Taken`].
    async fn begin(&mut self, key: &str, existing: bool, wait: Duration, idle: Duration) -> Result<Begun, Failure>;

    /// Shows that it is alive, and gives it another `idle` from now on.
    async fn keep(&mut self, idle: Duration) -> Result<(), Failure>;

    /// Ends it.
    async fn end(&mut self) -> Result<(), Failure>;
}

/// What became of an attempt to lock.
#[cfg_attr(not(any(feature = "postgres", feature = "mysql")), allow(dead_code, reason = "SQLite has no such locks"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    Taken,
    Busy,
    Absent,
}

/// Marks the token of a lock that comes with a transaction, or makes sure that it bears no such mark.
pub(crate) fn mark(token: LeaseToken, held: bool) -> LeaseToken {
    let mut bytes = token.to_bytes();
    bytes[15] = (bytes[15] & !1) | u8::from(held);
    LeaseToken::from_bytes(bytes)
}

/// Whether a token bears the mark.
pub(crate) fn is_marked(token: LeaseToken) -> bool {
    token.to_bytes()[15] & 1 == 1
}

/// All holds of this handler, and the connections for them.
pub(crate) struct Holds {
    transactions: Arc<dyn Transactions>,
    count: u32,
    permits: Arc<Semaphore>,
    connect_timeout: Duration,
    timeout: Duration,
    /// Those without work, the one used last at the end.
    idle: Mutex<Vec<(Box<dyn Transaction>, Instant)>>,
    /// One for each session that a task of this process holds or wants.
    queues: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    held: Mutex<HashMap<LeaseToken, Hold>>,
}

/// A hold. Dropped, it ends.
pub(crate) struct Hold(mpsc::UnboundedSender<Keep>);

/// An order to the task of a hold: to keep it for so long from now on, and to say whether it is still there.
struct Keep(Duration, Option<oneshot::Sender<()>>);

/// What somebody who wants a hold is told.
pub(crate) enum Sought {
    Held(Hold),
    /// Not in time.
    Busy,
    Absent,
}

/// A hold that is being waited for. Dropped, nobody waits any more.
pub(crate) struct Seeking {
    pub(crate) answer: oneshot::Receiver<Result<Sought, Failure>>,
    passable: Arc<AtomicBool>,
}

impl Seeking {
    /// Whether it is for another holder that this one waits, and not for a connection.
    pub(crate) fn for_a_holder(&self) -> bool {
        self.passable.load(Ordering::Acquire)
    }
}

/// What is sought.
struct Ask {
    key: String,
    existing: bool,
    deadline: Instant,
    lease: Duration,
}

impl Holds {
    pub(crate) fn new(transactions: Arc<dyn Transactions>, config: &SqlConfig) -> Arc<Self> {
        Arc::new(Self {
            transactions,
            count: config.connections(),
            permits: Arc::new(Semaphore::new(config.connections() as usize)),
            connect_timeout: config.connect_timeout,
            timeout: config.timeout,
            idle: Mutex::default(),
            queues: Mutex::default(),
            held: Mutex::default(),
        })
    }

    pub(crate) fn transactions(&self) -> &dyn Transactions {
        &*self.transactions
    }

    /// How long an answer may take that comes after the time for waiting is over.
    pub(crate) fn grace(&self) -> Duration {
        self.connect_timeout + self.timeout
    }

    /// Has a task of its own wait for a hold, for at most `wait`.
    pub(crate) fn seek(self: &Arc<Self>, key: &str, existing: bool, wait: Duration, lease: Duration) -> Seeking {
        let deadline = Instant::now() + wait.min(EVER);
        let ask = Ask { key: key.to_owned(), existing, deadline, lease: lease.min(EVER) };
        let passable = Arc::new(AtomicBool::new(false));
        let (answer, receiver) = oneshot::channel();
        let (this, for_a_holder) = (self.clone(), passable.clone());
        tokio::spawn(async move { this.hold(ask, answer, &for_a_holder).await });
        Seeking { answer: receiver, passable }
    }

    /// Keeps a hold under the token of its lock.
    pub(crate) fn put(&self, token: LeaseToken, hold: Hold) {
        lock(&self.held).insert(token, hold);
    }

    /// Ends the hold of a token, if it has one.
    pub(crate) fn let_go(&self, token: LeaseToken) {
        let hold = lock(&self.held).remove(&token);
        drop(hold);
    }

    /// Asks the hold of a token for a sign of life, and prolongs it; says whether it is still there.
    pub(crate) async fn keep(&self, token: LeaseToken, lease: Duration) -> bool {
        let (done, answer) = oneshot::channel();
        let told = lock(&self.held).get(&token).is_some_and(|hold| hold.0.send(Keep(lease, Some(done))).is_ok());
        told && answer.await.is_ok()
    }

    /// The whole life of a hold.
    async fn hold(&self, ask: Ask, mut answer: oneshot::Sender<Result<Sought, Failure>>, for_a_holder: &AtomicBool) {
        let mut turn = Turn::queue(self, &ask.key);
        if !turn.is_first() {
            for_a_holder.store(true, Ordering::Release);
            let first = tokio::select! {
                biased;
                () = answer.closed() => return,
                first = timeout_at(ask.deadline, turn.come()) => first,
            };
            if first.is_err() {
                let _ = answer.send(Ok(Sought::Busy));
                return;
            }
            for_a_holder.store(false, Ordering::Release);
        }
        let permit = tokio::select! {
            biased;
            () = answer.closed() => return,
            permit = timeout_at(ask.deadline, self.permits.clone().acquire_owned()) => permit,
        };
        let Ok(Ok(permit)) = permit else {
            let count = self.count;
            let fact = format!("{count} sessions are open in transactions, and connections= allows no more");
            let _ = answer.send(Err(Failure::new(ErrorKind::Busy, fact)));
            return;
        };
        let (mut connection, used) = match self.connection().await {
            Ok(connection) => connection,
            Err(failure) => {
                let _ = answer.send(Err(failure));
                return;
            }
        };
        let mut may_be_old = used;
        let mut slice = FIRST;
        loop {
            if answer.is_closed() {
                self.give_back(connection, permit, turn);
                return;
            }
            let rest = ask.deadline.saturating_duration_since(Instant::now());
            match self.begin(&mut *connection, &ask, rest.min(slice)).await {
                Ok(Begun::Taken) => break,
                Ok(Begun::Busy) if rest > slice => {
                    for_a_holder.store(true, Ordering::Release);
                    slice = SLICE;
                }
                Ok(begun) => {
                    self.give_back(connection, permit, turn);
                    let _ = answer.send(Ok(if begun == Begun::Absent { Sought::Absent } else { Sought::Busy }));
                    return;
                }
                // It had waited for work, and what stands between has forgotten it; so it may have the others.
                Err(failure) if may_be_old && failure.sent => {
                    lock(&self.idle).clear();
                    connection = match self.connection().await {
                        Ok((connection, _)) => connection,
                        Err(failure) => {
                            let _ = answer.send(Err(failure));
                            return;
                        }
                    };
                }
                Err(failure) => {
                    let _ = answer.send(Err(failure));
                    return;
                }
            }
            may_be_old = false;
        }
        let (hold, mut orders) = mpsc::unbounded_channel();
        let mut end = Instant::now() + ask.lease;
        // Whoever has gone meanwhile drops it, and that ends it.
        let _ = answer.send(Ok(Sought::Held(Hold(hold))));
        loop {
            let order = tokio::select! {
                biased;
                order = orders.recv() => order,
                () = sleep_until(end) => None,
            };
            let Some(Keep(lease, done)) = order else { break };
            let lease = lease.min(EVER);
            if !matches!(timeout(self.timeout, connection.keep(lease + MARGIN)).await, Ok(Ok(()))) {
                // With the connection the transaction ends; who asked learns it because nobody answers.
                return;
            }
            end = Instant::now() + lease;
            done.map(|done| done.send(()));
        }
        // From here on nobody is told that it is still there.
        drop(orders);
        if matches!(timeout(self.timeout, connection.end()).await, Ok(Ok(()))) {
            self.give_back(connection, permit, turn);
        }
    }

    async fn begin(&self, connection: &mut dyn Transaction, ask: &Ask, wait: Duration) -> Result<Begun, Failure> {
        let begun = connection.begin(&ask.key, ask.existing, wait, ask.lease + MARGIN);
        timeout(wait + self.timeout, begun).await.unwrap_or_else(|_| Err(no_answer()))
    }

    /// Returns a connection, and whether it was used before.
    async fn connection(&self) -> Result<(Box<dyn Transaction>, bool), Failure> {
        let last = {
            let mut idle = lock(&self.idle);
            idle.retain(|(_, since)| since.elapsed() < IDLE);
            idle.pop()
        };
        match last {
            Some((connection, _)) => Ok((connection, true)),
            None => match timeout(self.connect_timeout, self.transactions.connect()).await {
                Ok(made) => Ok((made?, false)),
                Err(_) => Err(Failure::new(ErrorKind::Unavailable, "no connection could be made in time")),
            },
        }
    }

    /// Puts a connection without a transaction back. The next one in the queue finds it there.
    fn give_back(&self, connection: Box<dyn Transaction>, permit: OwnedSemaphorePermit, turn: Turn<'_>) {
        lock(&self.idle).push((connection, Instant::now()));
        drop(permit);
        drop(turn);
    }
}

impl Hold {
    /// Keeps it for so long, whatever comes of it.
    pub(crate) fn keep_for(&self, span: Duration) {
        // Whether it is still there its owner learns when he uses it.
        let _ = self.0.send(Keep(span, None));
    }
}

impl fmt::Debug for Holds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holds").field("connections", &self.count).finish_non_exhaustive()
    }
}

/// A place in the queue of this process for one session; the first keeps it while he holds.
struct Turn<'a> {
    holds: &'a Holds,
    key: &'a str,
    queue: Option<Arc<tokio::sync::Mutex<()>>>,
    first: Option<OwnedMutexGuard<()>>,
}

impl<'a> Turn<'a> {
    fn queue(holds: &'a Holds, key: &'a str) -> Self {
        let queue = lock(&holds.queues).entry(key.to_owned()).or_default().clone();
        Self { holds, key, queue: Some(queue), first: None }
    }

    /// Whether nobody stands before it, which makes it the first.
    fn is_first(&mut self) -> bool {
        self.first = self.queue.clone().and_then(|queue| queue.try_lock_owned().ok());
        self.first.is_some()
    }

    async fn come(&mut self) {
        if let Some(queue) = self.queue.clone() {
            self.first = Some(queue.lock_owned().await);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queues = lock(&self.holds.queues);
        self.first = None;
        self.queue = None;
        if queues.get(self.key).is_some_and(|queue| Arc::strong_count(queue) == 1) {
            queues.remove(self.key);
        }
    }
}

fn no_answer() -> Failure {
    Failure { sent: true, ..Failure::new(ErrorKind::Unavailable, "the database did not answer in time") }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
