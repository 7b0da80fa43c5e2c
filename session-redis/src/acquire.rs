//! How a lock is taken and given up: at once while nobody waits, and from a place in the queue otherwise.
//!
//! What happens on the server stands in `scripts/enter.lua` and `scripts/release.lua`. What may be done under the lock is not known
//! here.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use redis::{Pipeline, Value};
use session_core::leased::{Found, Want};
use session_core::{Error, ErrorKind, LeaseToken, Result};
use tokio::runtime::Handle;

use crate::answers::{array, bytes, found, int, only};
use crate::batches::Entered;
use crate::config::RedisWake;
use crate::layout::{Body, Keys, TokenText, holder, is_lock, token_text};
use crate::link::Failure;
use crate::store::{Store, millis};
use crate::waiters::Waiter;

/// How long the place of a task that gave up waits for the next task of this process.
const HEIR: Duration = Duration::from_millis(20);

/// When a lock that nobody wants is given back to a server that did not take it back before.
const PAUSES: [Duration; 3] = [Duration::from_millis(50), Duration::from_millis(250), Duration::from_secs(1)];

/// How long a place in the queue is worth at most before the one who stands there looks again: the time that a dead waiter
/// before him may keep the lock. With a shorter lease it is that.
const CLAIM: Duration = Duration::from_secs(1);

/// The first and the longest pause of a waiter who asks again and again.
const POLL: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// How many crowded sessions are remembered at most.
const CROWDS: usize = 4096;

/// What was found under a lock, and whether the holder before released it.
type Taken = (Found, bool);

/// The lock that a handler of this process takes.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) token: LeaseToken,
    pub(crate) lease: Duration,
    /// What the lock holds while nobody waits for it.
    pub(crate) value: Arc<[u8]>,
}

impl Store {
    /// Takes the lock of a session, waiting for it if there is time, and reads the record in the same flight. Returns what is there and
    /// whether the holder before released, or nothing if a record is missing.
    pub(crate) async fn take(
        self: &Arc<Self>,
        operation: &'static str,
        keys: &Arc<Keys>,
        want: Want,
        wait: Duration,
        claim: &Claim,
    ) -> Result<Option<Taken>> {
        let (began, token) = (Instant::now(), token_text(claim.token));
        let mut attempt = Attempt { store: self, operation, keys, want, wait, claim, token, began, armed: true };
        attempt.make().await
    }

    async fn release_once(&self, keys: &Keys, token: TokenText, clean: bool) -> Result<(), Failure> {
        if let Some(batches) = &self.batches {
            return int(&batches.leave(keys, token, clean).await?).map(drop);
        }
        let clean: &[u8] = if clean { b"1" } else { b"0" };
        let mut commands = Pipeline::with_capacity(1);
        // Whole, because a server that does not answer in time could not say either that it has forgotten the script.
        commands.add_command(self.scripts.release.call(keys, &[&token, clean, b"0"], true));
        int(&only(self.ask(keys, &commands).await?)?).map(drop)
    }

    /// Gives up whatever `token` has, also to a server that comes back a moment later; otherwise that ends with its lease.
    async fn give_up(&self, keys: &Keys, token: TokenText, clean: bool) {
        let mut pauses = PAUSES.iter();
        while let Err(failure) = self.release_once(keys, token, clean).await {
            match pauses.next() {
                Some(pause) if failure.kind() == ErrorKind::Unavailable => tokio::time::sleep(*pause).await,
                _ => {
                    tracing::debug!(kind = %failure.kind(), "a lock could not be given back and ends with its lease");
                    return;
                }
            }
        }
    }

    /// The same without waiting for it, and from outside a runtime not at all.
    pub(crate) fn give_up_later(self: &Arc<Self>, keys: Arc<Keys>, token: TokenText, clean: bool) {
        if let Ok(runtime) = Handle::try_current() {
            let store = self.clone();
            runtime.spawn(async move { store.give_up(&keys, token, clean).await });
        }
    }

    /// Passes on a grant that nobody here waits for, unless it is for a place that is to be inherited.
    pub(crate) fn pass_on(self: Arc<Self>, token: TokenText, record: String) {
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.places.has(&record, &token) && record.starts_with(&*self.config.prefix) {
            runtime.spawn(async move {
                let keys = Keys::of(&record);
                let outcome = self.run(&keys, &self.scripts.release, &[&token, b"1", b"2"]).await;
                if let Err(failure) = outcome {
                    tracing::debug!(kind = %failure.kind(), "a grant could not be passed on and ends with its time");
                }
            });
        }
    }
}

/// A request for a lock under way. Dropped before its end, or after an answer that did not come, it is withdrawn in the background,
/// under its own token: on the same connection the withdrawal arrives behind it.
struct Attempt<'a> {
    store: &'a Arc<Store>,
    operation: &'static str,
    keys: &'a Arc<Keys>,
    want: Want,
    wait: Duration,
    claim: &'a Claim,
    token: TokenText,
    began: Instant,
    armed: bool,
}

impl Attempt<'_> {
    /// Takes the lock, or a place in the queue for it.
    ///
    /// While nobody waits these are plain commands, which cost the server less than a script. Whoever does not get the lock by
    /// them runs a script, which knows him by his token: a repeat of a `SET` finds the lock taken, by itself (`protocol.md` 11). Whoever
    /// has to expect others does that at once.
    async fn make(&mut self) -> Result<Option<Taken>> {
        let (store, keys, lease) = (self.store, self.keys, millis(self.claim.lease));
        if store.crowds.expected(keys.record()) {
            return Box::pin(self.queue_up()).await;
        }
        let (entered, repeated) = store.enter(keys, &self.token, &self.claim.value, lease, self.want).await;
        let Entered { mine, queued, body, left } = match entered {
            Ok(entered) => entered,
            Err(failure) if failure.answered => return Box::pin(self.failed(failure)).await,
            Err(failure) => {
                self.armed = failure.sent;
                return Err(failure.into_error(self.operation));
            }
        };
        if self.want == Want::Existing && !matches!(body, Body::Live { .. }) {
            // A repeat may have found its own lock.
            self.armed = false;
            if mine || repeated {
                self.give_up().await;
            }
            return Ok(None);
        }
        if mine && !queued {
            if !matches!(body, Body::Live { .. }) || left >= 2 * lease {
                return self.granted(body, left, false).await;
            }
            // It would end before the hold does.
            let renewed =
                Box::pin(store.run(keys, &store.scripts.renew, &[&self.token, lease.to_string().as_bytes(), b"1"])).await;
            match renewed.and_then(|answer| int(&answer)) {
                Ok(1) => return self.granted(body, 2 * lease, false).await,
                // It ended between the two flights: what is there now is asked for under the lock.
                Ok(_) => {}
                Err(failure) => return Box::pin(self.failed(failure)).await,
            }
        }
        // On the heap, so that whoever need not wait does not carry the room for it.
        Box::pin(self.queue_up()).await
    }

    /// Takes a place in the queue and waits there; with [`RedisWake::Poll`] it takes none, and looks again and again.
    async fn queue_up(&mut self) -> Result<Option<Taken>> {
        let (store, keys, wait) = (self.store, self.keys, self.wait);
        let lease = millis(self.claim.lease).to_string();
        let look = self.claim.lease.min(CLAIM);
        let polls = store.config.wake == RedisWake::Poll;
        let mut tries = 0;
        // First of all, since a new subscription wakes whoever is registered.
        if !wait.is_zero() && !polls {
            store.waiters.listen(wait.min(CLAIM)).await;
        }
        // Before the server is told: the grant may come before its answer.
        let waiter: Waiter = store.waiters.register(self.token);
        let mut heir: Vec<u8> = store.places.inherit(keys.record()).map_or_else(Vec::new, |token| token.to_vec());
        let mut queued: &[u8] = b"0";
        loop {
            let rest = wait.saturating_sub(self.began.elapsed());
            let rest_ms = if polls { 0 } else { rest.as_millis() }.to_string();
            let args: [&[u8]; 7] =
                [&self.token, &self.claim.value, lease.as_bytes(), rest_ms.as_bytes(), word(self.want), queued, &heir];
            let answer = store.run(keys, &store.scripts.enter, &args).await;
            let entered = match answer.and_then(Queued::parse) {
                Ok(entered) => entered,
                Err(failure) => return self.failed(failure).await,
            };
            match entered {
                Queued::Absent => {
                    self.armed = false;
                    return Ok(None);
                }
                Queued::Granted { body, left, clean } => return self.granted(body, left, clean).await,
                Queued::Busy { owner: Some(owner), .. } if !is_lock(&owner) => return self.failed(foreign_lock()).await,
                Queued::Busy { owner, .. } if rest < Duration::from_millis(1) => {
                    let error = lock_timeout(self.operation, wait, owner.as_deref());
                    if wait.is_zero() || polls {
                        // It never had a place.
                        self.armed = false;
                    } else {
                        self.leave_place(waiter);
                    }
                    return Err(error);
                }
                Queued::Busy { .. } if polls => {
                    let pause = (POLL.0 * (1 << tries.min(5))).min(POLL.1);
                    // Between half and one and a half of it, so that two who met once do not meet again.
                    let share = f64::from(self.token[tries % 32] % 16) / 16.0;
                    tokio::time::sleep(rest.min(pause.mul_f64(0.5 + share))).await;
                    tries += 1;
                }
                Queued::Busy { lease_left, place, .. } => {
                    // A little later than the lease ends, and not all at the same moment.
                    let jitter = Duration::from_micros(1000 + u64::from(self.token[0]) * 31);
                    let lease_left = Duration::from_millis(lease_left) + jitter;
                    let sleep = rest.min(lease_left).min(look * place.max(1)).max(Duration::from_millis(1));
                    waiter.woken(sleep).await;
                    queued = b"1";
                    heir.clear();
                }
            }
        }
    }

    /// Ends with the lock, unless the record is not ours.
    async fn granted(&mut self, body: Body, left: i64, clean: bool) -> Result<Option<Taken>> {
        match found(body, left) {
            Ok(found) => {
                self.armed = false;
                Ok(Some((found, clean)))
            }
            // On the heap, so that whoever gets the lock does not carry the room for it.
            Err(failure) => Box::pin(self.failed(failure)).await,
        }
    }

    async fn failed(&mut self, failure: Failure) -> Result<Option<Taken>> {
        self.give_up().await;
        Err(failure.into_error(self.operation))
    }

    async fn give_up(&mut self) {
        // What fails is tried again behind the caller's back.
        self.armed = Box::pin(self.store.release_once(self.keys, self.token, true)).await.is_err();
    }

    /// Leaves the place of a task whose time is over to the next task of this process, for a moment (`protocol.md` 13).
    fn leave_place(&mut self, waiter: Waiter) {
        let Ok(runtime) = Handle::try_current() else { return };
        self.armed = false;
        let (store, record, token) = (self.store.clone(), Arc::<str>::from(self.keys.record()), self.token);
        let before = store.places.leave(record.clone(), token);
        runtime.spawn(async move {
            if let Some(before) = before {
                store.give_up(&Keys::of(&record), before, true).await;
            }
            tokio::time::sleep(HEIR).await;
            if store.places.withdraw(&record, &token) {
                store.give_up(&Keys::of(&record), token, true).await;
            }
            // Until here a grant for this place was nobody's to pass on.
            drop(waiter);
        });
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.store.give_up_later(self.keys.clone(), self.token, true);
        }
    }
}

/// Places in queues whose tasks gave up, for a moment: by the key of the record, the token that stands there.
#[derive(Default)]
pub(crate) struct Places(Mutex<HashMap<Arc<str>, TokenText>>);

impl Places {
    fn places(&self) -> MutexGuard<'_, HashMap<Arc<str>, TokenText>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a place, and returns one that was left before and that nobody took.
    fn leave(&self, record: Arc<str>, token: TokenText) -> Option<TokenText> {
        self.places().insert(record, token)
    }

    fn inherit(&self, record: &str) -> Option<TokenText> {
        self.places().remove(record)
    }

    fn has(&self, record: &str, token: &TokenText) -> bool {
        self.places().get(record) == Some(token)
    }

    /// Takes a place back, unless somebody has inherited it.
    fn withdraw(&self, record: &str, token: &TokenText) -> bool {
        let mut places = self.places();
        let there = places.get(record) == Some(token);
        if there {
            places.remove(record);
        }
        there
    }
}

/// Sessions for which others stood in line when somebody of this process saved last, so that the plain flight of the next one would
/// be for nothing. A hint: whoever is wrong is as right as ever, and a little slower.
#[derive(Default)]
pub(crate) struct Crowds(Mutex<HashSet<Arc<str>>>);

impl Crowds {
    fn crowds(&self) -> MutexGuard<'_, HashSet<Arc<str>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that others wait.
    pub(crate) fn note(&self, record: &str) {
        let mut crowds = self.crowds();
        // Sessions that nobody of this process opens again must not pile up.
        if crowds.len() == CROWDS {
            crowds.clear();
        }
        crowds.insert(record.into());
    }

    /// Whether others waited, which is good for one question.
    fn expected(&self, record: &str) -> bool {
        let mut crowds = self.crowds();
        !crowds.is_empty() && crowds.remove(record)
    }
}

enum Queued {
    Absent,
    Granted { body: Body, left: i64, clean: bool },
    Busy { owner: Option<Vec<u8>>, lease_left: u64, place: u32 },
}

impl Queued {
    fn parse(answer: Value) -> Result<Self, Failure> {
        let mut parts = array(answer)?.into_iter();
        let mut next = || parts.next().unwrap_or(Value::Nil);
        match int(&next())? {
            2 => Ok(Self::Absent),
            1 => {
                let body = match next() {
                    Value::BulkString(bytes) => Body::parse(bytes),
                    _ => Body::Absent,
                };
                Ok(Self::Granted { body, left: int(&next())?, clean: int(&next())? == 1 })
            }
            0 => {
                let owner = bytes(next());
                let lease_left = u64::try_from(int(&next())?).unwrap_or(0);
                Ok(Self::Busy { owner, lease_left, place: u32::try_from(int(&next())?).unwrap_or(1) })
            }
            _ => Err(Failure::unexpected("a script answered with something else than it can")),
        }
    }
}

fn lock_timeout(operation: &'static str, wait: Duration, owner: Option<&[u8]>) -> Error {
    let fact = format!("the lock was not free within {} ms", wait.as_millis());
    Error::new(ErrorKind::LockTimeout, operation, fact).with_holder(owner.and_then(holder))
}

fn foreign_lock() -> Failure {
    Failure::corrupt("the lock of the session is nothing that any version of this library writes; it was left alone")
}

/// Says what is asked for in the words of the script.
fn word(want: Want) -> &'static [u8] {
    match want {
        Want::Existing => b"existing",
        Want::Any => b"any",
        Want::Lock => b"lock",
    }
}
