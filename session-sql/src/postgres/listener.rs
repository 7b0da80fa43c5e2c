//! Who in this process waits for a lock and how a message of the server finds him; and how others see that this process lives.
//!
//! Both hang on one connection beside the pool. It listens on a channel of its own, and holds an advisory lock with the number of
//! this handler: the server frees that lock as soon as the connection ends, whoever ended it. The connection is made in the
//! background, by whoever connects to the database; he waits for it, and so does the first waiter, for a moment. A message that is lost costs a waiter
//! one bounded sleep: nothing here decides who has a lock.
//!
//! Behind a pooler that changes servers between transactions nothing is heard, and the lock would be held by a connection of
//! everybody. So the first message is one to ourselves through the pool, and where that does not arrive there is no lock, and
//! waiters look again and again.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use session_core::LeaseToken;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{Error, Row, SqlStr};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::server::{Parameters, Server, bytes};
use crate::database::{Failure, Waiter};

/// The pauses between attempts to listen again, the last one again and again.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(20), Duration::from_millis(100), Duration::from_millis(300), Duration::from_secs(1)];

/// After how long without a message the connection is asked whether it is still there; also how long it has to answer.
const QUIET: Duration = Duration::from_secs(15);
const LIMIT: Duration = Duration::from_secs(5);

/// How long our own message may take. Where it does not come, it is tried again after a while.
const ECHO: Duration = Duration::from_secs(2);
const DEAF: Duration = Duration::from_secs(60);

/// How long to wait for the connection to be there.
const START: Duration = Duration::from_millis(250);

/// How often whoever cannot be told looks for himself.
const POLL: Duration = Duration::from_millis(5);

const HELLO: &str = "hello";

/// What begins the message to one who has lost the place next in line.
pub(super) const DISPLACED: &str = "-";

/// Wakes waiters, and shows that we live. Made for one handler, used by its clones.
pub(super) struct Listener {
    shared: Arc<Shared>,
    server: Weak<Server>,
    leave: Leave,
    /// Where to connect to; none if nobody is to listen.
    options: Option<PgConnectOptions>,
    task: Mutex<Option<JoinHandle<()>>>,
}

/// The statement that gives up a lock.
#[derive(Clone)]
pub(super) struct Leave(pub(super) SqlStr);

struct Shared {
    process: i64,
    waiting: Mutex<HashMap<[u8; 16], Arc<Wake>>>,
    state: watch::Sender<State>,
    /// Whether the lock of this process is held.
    alive: AtomicBool,
}

/// How a waiter is told.
#[derive(Default)]
struct Wake {
    told: Notify,
    /// Whether what he was told last is that he has to give way.
    displaced: AtomicBool,
}

impl Wake {
    fn tell(&self, displaced: bool) {
        self.displaced.store(displaced, Ordering::Release);
        self.told.notify_one();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Away,
    Listening,
    /// Connected, and nothing arrives.
    Deaf,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<[u8; 16], Arc<Wake>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how it stands; whoever waits looks for himself once.
    fn turn(&self, state: State) {
        self.state.send_replace(state);
        for waiter in self.waiting().values() {
            waiter.tell(false);
        }
    }
}

impl Listener {
    pub(super) fn new(process: i64, server: &Arc<Server>, leave: Leave, options: Option<PgConnectOptions>) -> Self {
        let state = watch::Sender::new(State::Away);
        let shared = Shared { process, waiting: Mutex::default(), state, alive: AtomicBool::new(false) };
        Self { shared: Arc::new(shared), server: Arc::downgrade(server), leave, options, task: Mutex::default() }
    }

    /// The number of the lock that shows that we live, while we hold it.
    pub(super) fn process(&self) -> Option<i64> {
        self.shared.alive.load(Ordering::Acquire).then_some(self.shared.process)
    }

    /// Sees to it that the connection is there or being made. It needs a runtime.
    pub(super) fn start(&self) {
        let Some(options) = &self.options else { return };
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        // The runtime that it ran on may be gone.
        if task.as_ref().is_none_or(JoinHandle::is_finished) {
            self.shared.alive.store(false, Ordering::Release);
            self.shared.state.send_replace(State::Away);
            let ears = Ears { shared: Arc::downgrade(&self.shared), server: self.server.clone(), leave: self.leave.clone() };
            *task = Some(tokio::spawn(ears.keep_listening(options.clone())));
        }
    }

    /// Waits until messages arrive and others see that we live, or are known not to; for a moment at most.
    pub(super) async fn heard(&self) {
        if self.options.is_none() {
            return;
        }
        self.start();
        let mut state = self.shared.state.subscribe();
        let _ = timeout(START, state.wait_for(|state| *state != State::Away)).await;
    }

    /// Registers a waiter; `None` if nobody can tell him anything.
    pub(super) async fn register(&self, token: LeaseToken) -> Option<Box<dyn Waiter>> {
        self.options.as_ref()?;
        self.heard().await;
        let wake = Arc::new(Wake::default());
        self.shared.waiting().insert(token.to_bytes(), wake.clone());
        Some(Box::new(Place { shared: self.shared.clone(), token: token.to_bytes(), wake }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(task) = self.task.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("state", &*self.shared.state.borrow()).finish_non_exhaustive()
    }
}

/// A place in the register, given up when it is dropped.
struct Place {
    shared: Arc<Shared>,
    token: [u8; 16],
    wake: Arc<Wake>,
}

#[async_trait]
impl Waiter for Place {
    async fn woken(&mut self, limit: Duration) -> bool {
        let limit = if *self.shared.state.borrow() == State::Listening { limit } else { limit.min(POLL) };
        let told = timeout(limit, self.wake.told.notified()).await.is_ok();
        !(told && self.wake.displaced.load(Ordering::Acquire))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.waiting().remove(&self.token);
    }
}

/// What the task that listens has; it keeps nothing alive.
struct Ears {
    shared: Weak<Shared>,
    server: Weak<Server>,
    leave: Leave,
}

impl Ears {
    async fn keep_listening(self, options: PgConnectOptions) {
        let mut pauses = PAUSES.iter();
        let mut pause = Duration::ZERO;
        let mut told = false;
        loop {
            sleep(pause).await;
            let heard = self.listen(&options).await;
            let Some(shared) = self.shared.upgrade() else { return };
            shared.alive.store(false, Ordering::Release);
            pause = match heard {
                Ok(true) => {
                    pauses = PAUSES.iter();
                    Duration::ZERO
                }
                Ok(false) => DEAF,
                Err(_) => *pauses.next().unwrap_or(&PAUSES[PAUSES.len() - 1]),
            };
            let deaf = matches!(heard, Ok(false));
            if deaf && !std::mem::replace(&mut told, true) {
                tracing::warn!(
                    "the database does not deliver notifications, as behind a pooler that changes servers between transactions: \
                     waiters look again and again; wake=poll says so from the start"
                );
            }
            shared.turn(if deaf { State::Deaf } else { State::Away });
        }
    }

    /// Listens until the connection breaks; says no if nothing arrives on it.
    async fn listen(&self, options: &PgConnectOptions) -> Result<bool, Error> {
        let (Some(shared), Some(server)) = (self.shared.upgrade(), self.server.upgrade()) else {
            return Err(Error::PoolClosed);
        };
        let process = shared.process;
        let channel = format!("sessionkit_{process:x}");
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(LIMIT)
            .test_before_acquire(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_lazy_with(options.clone());
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        listener.listen(&channel).await?;

        let say = async {
            let parameters = Parameters::new().add(&*channel)?.add(HELLO)?;
            server.ask(&SqlStr::from_static("SELECT pg_notify($1, $2)"), parameters).await
        };
        say.await.map_err(|_| Error::PoolTimedOut)?;
        let echo = async {
            while let Some(message) = listener.try_recv().await? {
                if message.payload() == HELLO {
                    return Ok(true);
                }
            }
            Err(Error::PoolClosed)
        };
        match timeout(ECHO, echo).await {
            Ok(heard) => heard?,
            Err(_) => {
                listener.unlisten_all().await?;
                return Ok(false);
            }
        };

        shared.alive.store(live(&mut listener, process).await?, Ordering::Release);
        shared.turn(State::Listening);
        drop((shared, server));
        loop {
            match timeout(QUIET, listener.try_recv()).await {
                Ok(Ok(Some(message))) => self.hear(message.payload()),
                Ok(Ok(None)) => return Ok(true),
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    let alive = timeout(LIMIT, live(&mut listener, process)).await.map_err(|_| Error::PoolTimedOut)??;
                    let Some(shared) = self.shared.upgrade() else { return Err(Error::PoolClosed) };
                    shared.alive.store(alive, Ordering::Release);
                }
            }
        }
    }

    /// Wakes whom a message is for. A lock that nobody here waits for, and nobody has come for, is passed on.
    fn hear(&self, message: &str) {
        let displaced = message.strip_prefix(DISPLACED);
        let Some((token, key)) = displaced.unwrap_or(message).split_once(' ') else { return };
        let Some(token) = u128::from_str_radix(token, 16).ok().filter(|_| token.len() == 32).map(u128::to_be_bytes) else {
            return;
        };
        let Some(shared) = self.shared.upgrade() else { return };
        if let Some(waiter) = shared.waiting().get(&token) {
            waiter.tell(displaced.is_some());
            return;
        }
        if displaced.is_none()
            && let Some(server) = self.server.upgrade()
        {
            let (sql, key) = (self.leave.0.clone(), key.to_owned());
            tokio::spawn(async move {
                let pass_on = async {
                    let parameters =
                        Parameters::new().add(key)?.add(bytes(LeaseToken::from_bytes(token)))?.add(true)?.add(true)?;
                    server.ask(&sql, parameters).await.map(drop)
                };
                let passed: Result<(), Failure> = pass_on.await;
                if let Err(failure) = passed {
                    tracing::debug!(kind = %failure.kind, "a lock that nobody waits for could not be passed on and ends by itself");
                }
            });
        }
    }
}

/// Takes the lock that shows that we live, and asks so whether the connection does; whether it is held.
async fn live(listener: &mut PgListener, process: i64) -> Result<bool, Error> {
    // Held twice it is freed by the end of the connection all the same. A connection of ours that the server has not given up yet
    // may still have it.
    const SQL: &str =
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted)
      OR pg_try_advisory_lock($1)";
    sqlx::query(SQL).bind(process).fetch_one(listener).await?.try_get(0)
}
