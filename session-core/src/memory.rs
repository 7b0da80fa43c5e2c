//! The contract as code: a store in this process that keeps every rule a network store has to keep.
//!
//! It is a *leased* store on purpose, although one process needs no lease: takeover, fence and tombstone can then be read and
//! tested here, in one place, without a server. Its clock is the monotonic one of the machine. It knows nothing about values,
//! cookies or processes, and what it keeps ends with the process.
//!
//! # What an opening does
//!
//! | access | `Existing`, live | `Existing`, absent | `Any`, live | `Any`, absent | `Fresh` |
//! |---|---|---|---|---|---|
//! | `Exclusive` | locks, reads | answers at once: no lock, nothing left behind | locks, reads | locks the absent id | looks at nothing, locks nothing |
//! | `Optimistic` | reads | answers | reads | answers | looks at nothing |
//! | `ReadOnly` | reads | answers | reads | answers | looks when asked |
//! | `Destroy` | looks at nothing | the same | the same | the same | the same |
//!
//! # What a write through it needs, beyond a deadline ahead
//!
//! | access | what the opening found | the record must be | the lock must be | else |
//! |---|---|---|---|---|
//! | `Exclusive` | write *w* | still *w* | its own (ended or not) or free | `Fenced`; `Gone` if there is no record |
//! | `Exclusive` | absent, `Existing` | | | `Gone` |
//! | `Exclusive` | absent, `Any` | as absent as found: no other tombstone | its own (ended or not) | `Fenced`; `Gone` for another tombstone |
//! | `Exclusive` | nothing looked at, `Fresh` | neither record nor tombstone | free; a write that keeps the session open takes it | `Conflict` |
//! | `Optimistic` | write *w* | still *w* | free | `Conflict`; `Gone` if there is no record |
//! | `Optimistic` | absent, `Existing` | | | `Gone` |
//! | `Optimistic` | absent, `Any`; or `Fresh` | neither record nor tombstone | free | `Conflict` |
//! | `ReadOnly`, `Destroy` | | | | `Unsupported` |
//!
//! A lock is free when nobody has it or when its lease has ended. A record whose last write is the one that is being asked for
//! answers `AlreadyApplied` before anything else is tested. With [`strict_expiry`](MemoryBuilder::strict_expiry) the lock of an
//! exclusive opening must be its own and its lease must not have ended.
//!
//! `destroy` is tested for nothing. It leaves a tombstone where there was something to destroy: a record, a tombstone, or a
//! lock whose holder may be about to create. An absent id that nobody holds stays without a trace, so that logging out with
//! made-up ids costs no memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Holder, Result};
use crate::handler::{
    Access, Cursor, Expect, LockInfo, OpenRequest, OpenSession, Page, SessionAdmin, SessionHandler, SessionInfo,
};
use crate::id::SessionId;
use crate::lock::{Held, Lease, LeaseRequest, LeaseToken, SessionLock};
use crate::record::{Change, Record, WriteId, Written};
use crate::ttl::Ttl;

/// How long the trace of a destroyed record stays at least, and the memory of a holder who never released.
const REMEMBER: Duration = Duration::from_secs(60);

const SHARDS: usize = 16;

/// Keeps sessions in this process; clones share one store.
///
/// It loses everything when the process ends. Only waiting for a lock needs a Tokio runtime (with its timer); every other call
/// is ready when it is first polled.
///
/// ```
/// # use session_core::{Change, MemoryHandler, OpenRequest, Record, SessionHandler, SessionId, Ttl, WriteId, Expect};
/// # use std::time::Duration;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> session_core::Result<()> {
/// let handler = MemoryHandler::new();
/// let id = SessionId::generate()?;
/// let exclusive = OpenRequest::exclusive(Duration::from_secs(5), Duration::from_secs(30));
///
/// let mut fresh = handler.open(&id, &exclusive.expecting(Expect::Fresh)).await?;
/// fresh.save(&Change::Write(Record::new(*b"cart: 1", Ttl::from_secs(1200))), WriteId::random()?).await?;
///
/// let mut again = handler.open(&id, &exclusive).await?;
/// assert_eq!(again.read().await?.expect("it was just saved").data, b"cart: 1");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct MemoryHandler {
    store: Arc<Store>,
    lock: Arc<dyn SessionLock>,
}

impl MemoryHandler {
    /// Makes an empty store with defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Starts an empty store with choices.
    #[must_use]
    pub fn builder() -> MemoryBuilder {
        MemoryBuilder { strict_expiry: false, max_bytes: usize::MAX, remember: REMEMBER }
    }

    /// Returns the lock of this store, to be used alone. It excludes the exclusive openings of this handler, too.
    #[must_use]
    pub fn lock(&self) -> MemoryLock {
        MemoryLock { store: self.store.clone() }
    }
}

impl Default for MemoryHandler {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryHandler").finish_non_exhaustive()
    }
}

/// The choices of a [`MemoryHandler`].
#[derive(Clone, Copy, Debug)]
pub struct MemoryBuilder {
    strict_expiry: bool,
    max_bytes: usize,
    remember: Duration,
}

impl MemoryBuilder {
    /// Refuses, as [`Fenced`](ErrorKind::Fenced), the write of a holder whose lease has ended even if nobody took over.
    /// Off by default: such a write endangers nothing.
    #[must_use]
    pub fn strict_expiry(mut self, strict: bool) -> Self {
        self.strict_expiry = strict;
        self
    }

    /// Refuses payloads of more bytes as [`TooLarge`](ErrorKind::TooLarge). Without limit by default.
    #[must_use]
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    #[cfg(test)]
    fn remember(mut self, remember: Duration) -> Self {
        self.remember = remember;
        self
    }

    /// Makes the empty store.
    #[must_use]
    pub fn build(self) -> MemoryHandler {
        let store = Arc::new(Store {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            tickets: AtomicU64::new(0),
            options: self,
        });
        MemoryHandler { lock: Arc::new(MemoryLock { store: store.clone() }), store }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionHandler for MemoryHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let mut opening = MemoryOpening {
            store: self.store.clone(),
            lock: self.lock.clone(),
            id: id.clone(),
            request: *request,
            held: None,
            basis: Basis::Unseen,
            fetched: None,
            end: None,
        };
        match (request.access, request.expect) {
            (Access::Destroy, _) | (_, Expect::Fresh) => {}
            (Access::Exclusive { wait, lease }, expect) => {
                let token = LeaseToken::random()?;
                let want = Want { token, lease, existing: expect == Expect::Existing };
                match self.store.acquire("open", id, want, wait).await? {
                    Granted::Absent => opening.see(None),
                    Granted::Locked { clean, found } => {
                        let lease = Arc::new(Lease::new(id.clone(), token, lease).after_clean_release(clean));
                        opening.held = Some(Held { lease, lock: self.lock.clone() });
                        opening.see(Some(found));
                    }
                }
            }
            (Access::ReadOnly | Access::Optimistic, _) => {
                let found = self.store.look(id);
                opening.see(Some(found));
            }
        }
        Ok(Box::new(opening))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        Ok(self.store.gc(limit.get()))
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        Some(self)
    }
}

#[async_trait]
impl SessionAdmin for MemoryHandler {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        let after = match after {
            None => None,
            Some(Cursor(text)) => Some(
                SessionId::parse(text)
                    .ok_or_else(|| Error::new(ErrorKind::Config, "list", "the cursor does not come from this store"))?,
            ),
        };
        Ok(self.store.list(after.as_ref(), limit.get() as usize))
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        Ok(self.store.locks(limit.get() as usize))
    }

    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        Ok(self.store.change(id, |entry, now, options| {
            let on = entry.lock_on(now);
            if let Some(token) = entry.lock.as_ref().map(|lock| lock.token) {
                entry.release(token, false, now, options);
            }
            on
        }))
    }
}

/// The lock of a [`MemoryHandler`], or one of its own: tasks of one process, first come, first served.
#[derive(Clone)]
pub struct MemoryLock {
    store: Arc<Store>,
}

impl MemoryLock {
    /// Makes a lock that shares no store with any handler, as [`Locked`](crate::Locked) needs it.
    #[must_use]
    pub fn new() -> Self {
        MemoryHandler::new().lock()
    }
}

impl Default for MemoryLock {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryLock").finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionLock for MemoryLock {
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>> {
        let want = Want { token: LeaseToken::random()?, lease: request.lease, existing: false };
        match self.store.acquire("acquire", id, want, request.wait).await? {
            Granted::Locked { clean, .. } => {
                Ok(Arc::new(Lease::new(id.clone(), want.token, want.lease).after_clean_release(clean)))
            }
            Granted::Absent => unreachable!("only an opener that expects a record is told that there is none"),
        }
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        leases.iter().map(|lease| self.store.renew(lease)).collect()
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        self.store.change(lease.id(), |entry, now, options| entry.release(lease.token(), true, now, options));
        Ok(())
    }

    /// Frees the lock at once. It does not count as a clean release: a write of the former holder may still be under way to
    /// whatever store this lock stands before.
    fn abandon(&self, lease: Arc<Lease>) {
        self.store.change(lease.id(), |entry, now, options| entry.release(lease.token(), false, now, options));
    }
}

/// What an opening goes by when it writes.
#[derive(Clone, Copy)]
enum Basis {
    /// It has not looked, because the id is fresh.
    Unseen,
    /// It found nothing; `mark` names the destroyed or expired record whose trace was there, if one was.
    Absent { mark: Option<WriteId> },
    /// It found the record that this write left.
    Written(WriteId),
    /// It found nothing where it had expected something, so there is nothing that it may write.
    Barred,
}

struct MemoryOpening {
    store: Arc<Store>,
    lock: Arc<dyn SessionLock>,
    id: SessionId,
    request: OpenRequest,
    held: Option<Held>,
    basis: Basis,
    fetched: Option<Option<Record>>,
    /// Why it can do nothing more: closed, or refused.
    end: Option<End>,
}

#[derive(Clone, Copy)]
enum End {
    Closed,
    Refused(ErrorKind),
}

/// What a change leaves of the opening.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Keep,
    Close,
}

impl MemoryOpening {
    /// Takes over what the store answered; `None` if it was answered without looking closer, because there is no record.
    fn see(&mut self, found: Option<Found>) {
        let Found { record, mark } = found.unwrap_or_default();
        self.basis = match (&record, mark) {
            (Some(_), Some(last)) => Basis::Written(last),
            (_, mark) if self.request.expect == Expect::Any => Basis::Absent { mark },
            _ => Basis::Barred,
        };
        self.fetched = Some(record);
    }

    fn exclusive(&self) -> Option<Duration> {
        match self.request.access {
            Access::Exclusive { lease, .. } => Some(lease),
            Access::ReadOnly | Access::Optimistic | Access::Destroy => None,
        }
    }

    fn put(&mut self, record: &Record, id: WriteId, then: Then) -> Result<Written> {
        self.may_write("write")?;
        let max = self.store.options.max_bytes;
        if record.data.len() > max {
            let fact = format!("a payload of {} bytes, at most {max} are allowed", record.data.len());
            return Err(Error::new(ErrorKind::TooLarge, "write", fact));
        }
        if let Some(end) = self.end {
            // A repeat after a lost answer: the first copy has closed this opening.
            return match self.store.last_write(&self.id) {
                Some(last) if last == id => Ok(Written::AlreadyApplied),
                _ => Err(end.error("write")),
            };
        }
        let data: Arc<[u8]> = record.data.as_slice().into();
        let first_lease = match self.exclusive() {
            Some(length) if then == Then::Keep && self.held.is_none() && matches!(self.basis, Basis::Unseen) => {
                Some(Arc::new(Lease::new(self.id.clone(), LeaseToken::random()?, length).after_clean_release(true)))
            }
            _ => None,
        };
        let writer = self.writer();
        let (outcome, locked) = self.store.change(&self.id, |entry, now, options| {
            let outcome = entry.judge(&writer, Some(id), now, options);
            if outcome == Ok(Written::Applied) {
                entry.slot = Slot::Record { data, deadline: after(now, record.ttl.as_duration()), last: id };
            }
            let locked = match &first_lease {
                Some(lease) if outcome.is_ok() && !entry.lock_on(now) => {
                    entry.take(lease.token(), lease.length(), now);
                    true
                }
                _ => false,
            };
            entry.leave_open_only_if(then == Then::Keep && outcome.is_ok(), &writer, now, options);
            (outcome, locked)
        });
        if let Some(lease) = first_lease.filter(|_| locked) {
            self.held = Some(Held { lease, lock: self.lock.clone() });
        }
        if outcome.is_ok() {
            self.basis = Basis::Written(id);
        }
        self.settle("write", outcome, then)
    }

    fn move_deadline(&mut self, ttl: Ttl, then: Then) -> Result<Written> {
        self.may_write("touch")?;
        if let Some(end) = self.end {
            return Err(end.error("touch"));
        }
        let writer = self.writer();
        let outcome = self.store.change(&self.id, |entry, now, options| {
            let outcome = match writer.basis {
                Basis::Written(_) => entry.judge(&writer, None, now, options),
                Basis::Unseen | Basis::Absent { .. } | Basis::Barred => Err(ErrorKind::Gone),
            };
            if let (Ok(_), Slot::Record { deadline, .. }) = (outcome, &mut entry.slot) {
                *deadline = after(now, ttl.as_duration());
            }
            entry.leave_open_only_if(then == Then::Keep && outcome.is_ok(), &writer, now, options);
            outcome
        });
        self.settle("touch", outcome, then)
    }

    fn remove(&mut self, then: Then) -> Result<Option<Record>> {
        if self.request.access == Access::ReadOnly {
            return Err(Error::new(ErrorKind::Unsupported, "destroy", "the session was opened to be read only"));
        }
        let mark = WriteId::random()?;
        let writer = self.writer();
        let removed = self.store.change(&self.id, |entry, now, options| {
            let removed = entry.found(now).record;
            entry.destroy(mark, now, options);
            entry.leave_open_only_if(then == Then::Keep, &writer, now, options);
            removed
        });
        self.fetched = None;
        self.basis = Basis::Barred;
        if then == Then::Close {
            self.ended(End::Closed);
        }
        Ok(removed)
    }

    fn give_back(&mut self) {
        if let Some(held) = self.held.take() {
            let token = held.lease.token();
            self.store.change(&self.id, |entry, now, options| entry.release(token, true, now, options));
        }
        self.ended(End::Closed);
    }

    fn may_write(&self, operation: &'static str) -> Result<()> {
        let fact = match self.request.access {
            Access::Exclusive { .. } | Access::Optimistic => return Ok(()),
            Access::ReadOnly => "the session was opened to be read only",
            Access::Destroy => "the session was opened to be destroyed only",
        };
        Err(Error::new(ErrorKind::Unsupported, operation, fact))
    }

    fn writer(&self) -> Writer {
        let token = self.held.as_ref().map(|held| held.lease.token());
        Writer { exclusive: self.exclusive().is_some(), token, basis: self.basis }
    }

    /// Draws the consequences of an outcome that the store has already drawn for the lock.
    fn settle(&mut self, operation: &'static str, outcome: Result<Written, ErrorKind>, then: Then) -> Result<Written> {
        match outcome {
            Ok(written) => {
                // What the open fetched is older than what is there now.
                self.fetched = None;
                if then == Then::Close {
                    self.ended(End::Closed);
                }
                Ok(written)
            }
            Err(kind) => {
                self.ended(End::Refused(kind));
                Err(End::Refused(kind).error(operation))
            }
        }
    }

    fn ended(&mut self, end: End) {
        self.held = None;
        self.fetched = None;
        self.end.get_or_insert(end);
    }
}

impl End {
    fn error(self, operation: &'static str) -> Error {
        let (kind, fact) = match self {
            Self::Closed => (ErrorKind::Unsupported, "the session is closed"),
            Self::Refused(kind @ ErrorKind::Fenced) => (kind, "another request took the session over"),
            Self::Refused(kind @ ErrorKind::Gone) => (kind, "the session is no longer there"),
            Self::Refused(kind) => (kind, "another request wrote or holds the session"),
        };
        Error::new(kind, operation, fact)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl OpenSession for MemoryOpening {
    async fn read(&mut self) -> Result<Option<Record>> {
        if self.request.access == Access::Destroy {
            return Err(Error::new(ErrorKind::Unsupported, "read", "the session was opened to be destroyed only"));
        }
        if let Some(end) = self.end {
            return Err(end.error("read"));
        }
        if let Some(fetched) = self.fetched.take() {
            return Ok(fetched);
        }
        let found = self.store.look(&self.id);
        // A fresh id stays fresh, whatever is there, and an exclusive opening that was refused its lock never gets to write.
        let stays = matches!(self.basis, Basis::Unseen) || (self.exclusive().is_some() && self.held.is_none());
        let basis = self.basis;
        self.see(Some(found));
        if stays {
            self.basis = basis;
        }
        Ok(self.fetched.take().flatten())
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        self.put(record, id, Then::Keep)
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        self.remove(Then::Keep)
    }

    async fn close(&mut self) -> Result<()> {
        self.give_back();
        Ok(())
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        self.move_deadline(ttl, Then::Keep)
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        match change {
            Change::Write(record) => self.put(record, id, Then::Close),
            Change::Touch(ttl) => self.move_deadline(*ttl, Then::Close),
            Change::Destroy => self.remove(Then::Close).map(|_| Written::Applied),
            Change::Nothing => {
                self.give_back();
                Ok(Written::Applied)
            }
        }
    }

    fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }
}

impl Drop for MemoryOpening {
    // No call of this handler is ever under way when its opening is dropped, so this is as clean as a close.
    fn drop(&mut self) {
        self.give_back();
    }
}

impl fmt::Debug for MemoryOpening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryOpening").field("request", &self.request).finish_non_exhaustive()
    }
}

/// All entries, in shards that are locked for the length of one decision and never across an await.
struct Store {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    tickets: AtomicU64,
    options: MemoryBuilder,
}

#[derive(Default)]
struct Shard {
    entries: BTreeMap<SessionId, Entry>,
    /// When gc has to look at an entry: never later than there is something to free, possibly earlier, so that a write that
    /// moves a deadline ahead leaves this alone.
    due: BTreeSet<(Instant, SessionId)>,
}

/// Everything about one id. An entry with nothing in it does not stay.
#[derive(Default)]
struct Entry {
    slot: Slot,
    lock: Option<Lock>,
    /// Until when it is remembered that the last holder did not release.
    unclean: Option<Instant>,
    /// In the order of their arrival.
    waiters: BTreeMap<u64, Waiter>,
    due: Option<Instant>,
}

#[derive(Default)]
enum Slot {
    #[default]
    Empty,
    Record {
        data: Arc<[u8]>,
        deadline: Instant,
        last: WriteId,
    },
    Tombstone {
        until: Instant,
        mark: WriteId,
    },
}

struct Lock {
    token: LeaseToken,
    since: Instant,
    until: Instant,
    length: Duration,
    clean: bool,
}

struct Waiter {
    want: Want,
    wake: Arc<Notify>,
}

/// What somebody who locks asks for.
#[derive(Clone, Copy)]
struct Want {
    token: LeaseToken,
    lease: Duration,
    /// Whether there is nothing to wait for once the record is gone.
    existing: bool,
}

enum Granted {
    Absent,
    Locked { clean: bool, found: Found },
}

enum Attempt {
    Granted(Granted),
    Busy { since: Instant, until: Instant },
}

/// What a look at an id finds: a record with its last write, or the trace of one, or nothing.
#[derive(Default)]
struct Found {
    record: Option<Record>,
    mark: Option<WriteId>,
}

/// Who wants to write, and going by what.
struct Writer {
    exclusive: bool,
    token: Option<LeaseToken>,
    basis: Basis,
}

impl Store {
    fn shard_of(&self, id: &SessionId) -> usize {
        usize::try_from(self.hasher.hash_one(id) % SHARDS as u64).unwrap_or(0)
    }

    fn shard(&self, index: usize) -> MutexGuard<'_, Shard> {
        // No decision panics halfway, so what a poisoned shard holds is whole.
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one decision about `id`: the atomic step of this store.
    fn change<T>(&self, id: &SessionId, decide: impl FnOnce(&mut Entry, Instant, &MemoryBuilder) -> T) -> T {
        let mut shard = self.shard(self.shard_of(id));
        let now = Instant::now();
        let entry = shard.entries.entry(id.clone()).or_default();
        let decision = decide(entry, now, &self.options);
        shard.tidy(id, now, &self.options);
        decision
    }

    fn look(&self, id: &SessionId) -> Found {
        let shard = self.shard(self.shard_of(id));
        shard.entries.get(id).map_or_else(Found::default, |entry| entry.found(Instant::now()))
    }

    fn last_write(&self, id: &SessionId) -> Option<WriteId> {
        let found = self.look(id);
        found.mark.filter(|_| found.record.is_some())
    }

    async fn acquire(&self, operation: &'static str, id: &SessionId, want: Want, wait: Duration) -> Result<Granted> {
        let began = Instant::now();
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        if wait.is_zero() {
            return match self.attempt(id, want, ticket, None) {
                Attempt::Granted(granted) => Ok(granted),
                Attempt::Busy { since, .. } => Err(lock_timeout(operation, wait, since)),
            };
        }
        let wake = Arc::new(Notify::new());
        let mut place = Place { store: self, id, ticket, token: want.token, waiting: true };
        loop {
            match self.attempt(id, want, ticket, Some(&wake)) {
                Attempt::Granted(granted) => {
                    place.waiting = false;
                    return Ok(granted);
                }
                Attempt::Busy { since, until } => {
                    let left = wait.saturating_sub(began.elapsed());
                    if left.is_zero() {
                        return Err(lock_timeout(operation, wait, since));
                    }
                    let lease_left = until.saturating_duration_since(Instant::now());
                    // Whether woken or not, the next attempt says what happened.
                    let _ = tokio::time::timeout(left.min(lease_left), wake.notified()).await;
                }
            }
        }
    }

    /// Tries once, and takes a place in the queue if it is given something to be woken by.
    fn attempt(&self, id: &SessionId, want: Want, ticket: u64, wake: Option<&Arc<Notify>>) -> Attempt {
        self.change(id, |entry, now, options| {
            if want.existing && !entry.is_live(now) {
                entry.leave(ticket, want.token, now, options);
                return Attempt::Granted(Granted::Absent);
            }
            // Whoever finds the lock free while others queue hands it to the first of them, and queues.
            entry.hand_on(now);
            match &mut entry.lock {
                Some(lock) if lock.token == want.token => {
                    lock.since = now;
                    lock.until = after(now, want.lease);
                }
                Some(lock) if lock.until > now => {
                    let busy = Attempt::Busy { since: lock.since, until: lock.until };
                    if let Some(wake) = wake {
                        entry.waiters.entry(ticket).or_insert_with(|| Waiter { want, wake: wake.clone() });
                    }
                    return busy;
                }
                _ => entry.take(want.token, want.lease, now),
            }
            entry.keep_alive(want.lease, now);
            let clean = entry.lock.as_ref().is_some_and(|lock| lock.clean);
            Attempt::Granted(Granted::Locked { clean, found: entry.found(now) })
        })
    }

    fn renew(&self, lease: &Lease) -> Result<()> {
        self.change(lease.id(), |entry, now, options| {
            if let Slot::Record { deadline, .. } = entry.slot
                && deadline <= now
            {
                return Err(Error::new(ErrorKind::Gone, "renew", "the session has expired"));
            }
            match &mut entry.lock {
                Some(lock) if lock.token == lease.token() && (lock.until > now || !options.strict_expiry) => {
                    lock.until = after(now, lease.length());
                    entry.keep_alive(lease.length(), now);
                    Ok(())
                }
                _ => {
                    lease.mark_lost();
                    Err(Error::new(ErrorKind::Fenced, "renew", "the lease has ended"))
                }
            }
        })
    }

    fn gc(&self, limit: u32) -> u64 {
        let mut expired = 0;
        let mut freed = 0;
        for index in 0..SHARDS {
            let mut shard = self.shard(index);
            let now = Instant::now();
            while freed < limit {
                let Some((_, id)) = shard.due.first().filter(|(due, _)| *due <= now).cloned() else { break };
                shard.due.pop_first();
                let entry = shard.entries.get_mut(&id).expect("what is due has an entry");
                entry.due = None;
                match entry.slot {
                    Slot::Record { deadline, .. } if deadline <= now && !entry.lock_on(now) => {
                        entry.slot = Slot::Empty;
                        expired += 1;
                        freed += 1;
                    }
                    Slot::Tombstone { until, .. } if until <= now => {
                        entry.slot = Slot::Empty;
                        freed += 1;
                    }
                    _ => {}
                }
                entry.forget(now, &self.options);
                shard.tidy(&id, now, &self.options);
            }
        }
        expired
    }

    fn list(&self, after: Option<&SessionId>, limit: usize) -> Page {
        let first = after.map_or(0, |id| self.shard_of(id));
        let mut sessions = Vec::new();
        for index in first..SHARDS {
            let shard = self.shard(index);
            let now = Instant::now();
            let from = match after {
                Some(id) if index == first => Bound::Excluded(id),
                _ => Bound::Unbounded,
            };
            for (id, entry) in shard.entries.range::<SessionId, _>((from, Bound::Unbounded)) {
                if let Slot::Record { data, deadline, .. } = &entry.slot
                    && *deadline > now
                {
                    sessions.push(SessionInfo::new(id.clone(), data.len() as u64, *deadline - now));
                    if sessions.len() == limit {
                        return Page::new(sessions, Some(Cursor(id.as_str().to_owned())));
                    }
                }
            }
        }
        Page::new(sessions, None)
    }

    fn locks(&self, limit: usize) -> Vec<LockInfo> {
        let mut locks = Vec::new();
        for index in 0..SHARDS {
            let shard = self.shard(index);
            let now = Instant::now();
            for (id, entry) in &shard.entries {
                if let Some(lock) = entry.lock.as_ref().filter(|lock| lock.until > now) {
                    if locks.len() == limit {
                        return locks;
                    }
                    let waiting = entry.waiters.len() as u64;
                    locks.push(LockInfo::new(id.clone(), Some(holder(lock.since)), Some(lock.until - now), Some(waiting)));
                }
            }
        }
        locks
    }
}

impl Shard {
    /// Puts away what the last decision left of the entry.
    fn tidy(&mut self, id: &SessionId, now: Instant, options: &MemoryBuilder) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let next = entry.next_due(now, options);
        if entry.due.is_some() && entry.due <= next && next.is_some() {
            return;
        }
        if let Some(due) = entry.due.take() {
            self.due.remove(&(due, id.clone()));
        }
        match next {
            Some(next) => {
                entry.due = Some(next);
                self.due.insert((next, id.clone()));
            }
            None => {
                self.entries.remove(id);
            }
        }
    }
}

impl Entry {
    fn is_live(&self, now: Instant) -> bool {
        matches!(self.slot, Slot::Record { deadline, .. } if deadline > now)
    }

    fn lock_on(&self, now: Instant) -> bool {
        self.lock.as_ref().is_some_and(|lock| lock.until > now)
    }

    fn found(&self, now: Instant) -> Found {
        match &self.slot {
            Slot::Record { data, deadline, last } => {
                let left = deadline.saturating_duration_since(now);
                let record = (!left.is_zero()).then(|| Record::new(data.to_vec(), Ttl::new(left)));
                Found { record, mark: Some(*last) }
            }
            Slot::Tombstone { until, mark } if *until > now => Found { record: None, mark: Some(*mark) },
            Slot::Tombstone { .. } | Slot::Empty => Found::default(),
        }
    }

    /// Says whether `writer` may write, and nothing changes: the fence. `id` is `None` for a touch.
    fn judge(
        &self,
        writer: &Writer,
        id: Option<WriteId>,
        now: Instant,
        options: &MemoryBuilder,
    ) -> Result<Written, ErrorKind> {
        let refused = if writer.exclusive { ErrorKind::Fenced } else { ErrorKind::Conflict };
        let (live, trace, buried) = match self.slot {
            Slot::Record { deadline, last, .. } if deadline > now => (Some(last), None, false),
            Slot::Record { last, .. } => (None, Some(last), false),
            Slot::Tombstone { until, mark } if until > now => (None, Some(mark), true),
            Slot::Tombstone { .. } | Slot::Empty => (None, None, false),
        };
        if live.is_some() && live == id {
            return Ok(Written::AlreadyApplied);
        }
        let own = self.lock.as_ref().filter(|lock| Some(lock.token) == writer.token);
        let foreign = own.is_none() && self.lock_on(now);
        match writer.basis {
            Basis::Barred => return Err(ErrorKind::Gone),
            Basis::Written(_) if live.is_none() => return Err(ErrorKind::Gone),
            Basis::Written(prev) if live != Some(prev) || foreign => return Err(refused),
            Basis::Written(_) => {}
            Basis::Absent { .. } if writer.exclusive && live.is_some() => return Err(refused),
            // Something was created and has ended since, so the id is not as absent as it was found.
            Basis::Absent { mark } if writer.exclusive && trace.is_some() && trace != mark => return Err(ErrorKind::Gone),
            Basis::Absent { .. } if writer.exclusive && own.is_none() => return Err(refused),
            Basis::Absent { .. } if writer.exclusive => {}
            // The repeat of a create whose record has expired meanwhile must not create it anew.
            Basis::Absent { .. } | Basis::Unseen if trace.is_some() && trace == id => return Err(ErrorKind::Gone),
            Basis::Absent { .. } | Basis::Unseen if live.is_some() || buried || foreign => return Err(ErrorKind::Conflict),
            Basis::Absent { .. } | Basis::Unseen => return Ok(Written::Applied),
        }
        if options.strict_expiry && writer.exclusive && own.is_none_or(|lock| lock.until <= now) {
            return Err(refused);
        }
        Ok(Written::Applied)
    }

    fn take(&mut self, token: LeaseToken, length: Duration, now: Instant) {
        let clean = self.lock.is_none() && self.unclean.is_none();
        self.unclean = None;
        self.lock = Some(Lock { token, since: now, until: after(now, length), length, clean });
    }

    /// Gives a lock that is free to the first in the queue.
    fn hand_on(&mut self, now: Instant) {
        if !self.lock_on(now)
            && let Some((_, next)) = self.waiters.pop_first()
        {
            self.take(next.want.token, next.want.lease, now);
            next.wake.notify_one();
        }
    }

    fn release(&mut self, token: LeaseToken, clean: bool, now: Instant, options: &MemoryBuilder) {
        if let Some(lock) = self.lock.take_if(|lock| lock.token == token) {
            self.unclean = (!clean).then(|| after(now, options.remember.max(lock.length.saturating_mul(2))));
            self.hand_on(now);
        }
    }

    /// Gives the lock of `writer` back unless it goes on.
    fn leave_open_only_if(&mut self, keep: bool, writer: &Writer, now: Instant, options: &MemoryBuilder) {
        if let Some(token) = writer.token.filter(|_| !keep) {
            self.release(token, true, now, options);
        }
    }

    /// Takes a waiter out, and what was handed to him meanwhile.
    fn leave(&mut self, ticket: u64, token: LeaseToken, now: Instant, options: &MemoryBuilder) {
        self.waiters.remove(&ticket);
        // He did nothing under it, so it is as clean for the next as it was for him.
        if let Some(clean) = self.lock.as_ref().filter(|lock| lock.token == token).map(|lock| lock.clean) {
            self.release(token, clean, now, options);
        }
    }

    fn destroy(&mut self, mark: WriteId, now: Instant, options: &MemoryBuilder) {
        let lease = self.lock.as_ref().map(|lock| lock.length);
        if !matches!(self.slot, Slot::Empty) || lease.is_some() {
            let stay = options.remember.max(lease.unwrap_or_default().saturating_mul(2));
            self.slot = Slot::Tombstone { until: after(now, stay), mark };
        }
        for waiter in self.waiters.values().filter(|waiter| waiter.want.existing) {
            waiter.wake.notify_one();
        }
    }

    /// Moves the deadline of a held record ahead, so that it outlives the hold.
    fn keep_alive(&mut self, lease: Duration, now: Instant) {
        if let Slot::Record { deadline, .. } = &mut self.slot
            && *deadline > now
        {
            *deadline = (*deadline).max(after(now, lease.saturating_mul(2)));
        }
    }

    /// Forgets an ended lease and an unclean end after their time.
    fn forget(&mut self, now: Instant, options: &MemoryBuilder) {
        self.lock.take_if(|lock| lock.forgotten(options) <= now);
        self.unclean.take_if(|until| *until <= now);
    }

    /// Returns when there will be something to free, or `None` if there is nothing in here.
    fn next_due(&self, now: Instant, options: &MemoryBuilder) -> Option<Instant> {
        match self.slot {
            Slot::Record { deadline, .. } => match &self.lock {
                Some(lock) if lock.until > now => Some(deadline.max(lock.until)),
                _ => Some(deadline),
            },
            Slot::Tombstone { until, .. } => Some(until),
            Slot::Empty => self.lock.as_ref().map(|lock| lock.forgotten(options)).or(self.unclean),
        }
    }
}

impl Lock {
    fn forgotten(&self, options: &MemoryBuilder) -> Instant {
        after(self.until, options.remember.max(self.length.saturating_mul(2)))
    }
}

/// A place in the queue, given up when the waiting future is dropped.
struct Place<'a> {
    store: &'a Store,
    id: &'a SessionId,
    ticket: u64,
    token: LeaseToken,
    waiting: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.waiting {
            self.store.change(self.id, |entry, now, options| entry.leave(self.ticket, self.token, now, options));
        }
    }
}

/// Adds without overflow: whatever is longer than the longest life counts as that.
fn after(now: Instant, length: Duration) -> Instant {
    now + length.min(Ttl::MAX.as_duration())
}

fn holder(since: Instant) -> Holder {
    Holder::this_process(SystemTime::now() - since.elapsed())
}

fn lock_timeout(operation: &'static str, wait: Duration, since: Instant) -> Error {
    let fact = format!("the lock was not free within {} ms", wait.as_millis());
    Error::new(ErrorKind::LockTimeout, operation, fact).with_holder(Some(holder(since)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    const LEASE: Duration = Duration::from_secs(30);
    const LONG: Ttl = Ttl::MAX;

    fn exclusive(lease: Duration) -> OpenRequest {
        OpenRequest::exclusive(Duration::ZERO, lease)
    }

    fn record(text: &str) -> Record {
        Record::new(text.as_bytes(), LONG)
    }

    fn new_id() -> SessionId {
        SessionId::generate().unwrap()
    }

    fn wid() -> WriteId {
        WriteId::random().unwrap()
    }

    async fn create(handler: &MemoryHandler, text: &str, ttl: Ttl) -> SessionId {
        let id = new_id();
        let mut fresh = handler.open(&id, &OpenRequest::optimistic().expecting(Expect::Fresh)).await.unwrap();
        let written = fresh.save(&Change::Write(Record::new(text.as_bytes(), ttl)), wid()).await.unwrap();
        assert_eq!(written, Written::Applied);
        id
    }

    async fn open(handler: &MemoryHandler, id: &SessionId, request: OpenRequest) -> Box<dyn OpenSession> {
        handler.open(id, &request).await.unwrap()
    }

    async fn text(handler: &MemoryHandler, id: &SessionId) -> Option<String> {
        let record = open(handler, id, OpenRequest::read_only()).await.read().await.unwrap();
        record.map(|record| String::from_utf8(record.data).unwrap())
    }

    async fn destroy(handler: &MemoryHandler, id: &SessionId) -> Option<Record> {
        open(handler, id, OpenRequest::destroy()).await.destroy().await.unwrap()
    }

    fn entries(handler: &MemoryHandler) -> (usize, usize) {
        let shards = (0..SHARDS).map(|n| handler.store.shard(n));
        shards.fold((0, 0), |(entries, due), shard| (entries + shard.entries.len(), due + shard.due.len()))
    }

    fn kind<T: fmt::Debug>(result: Result<T>) -> ErrorKind {
        result.unwrap_err().kind()
    }

    async fn past(lease: Duration) {
        tokio::time::sleep(lease + Duration::from_millis(15)).await;
    }

    const SHORT: Duration = Duration::from_millis(30);

    #[tokio::test]
    async fn an_absent_id_that_should_exist_is_answered_at_once_and_leaves_nothing() {
        let handler = MemoryHandler::new();
        let id = new_id();
        let _admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
        for request in [OpenRequest::exclusive(LEASE, LEASE), OpenRequest::optimistic()] {
            let other = new_id();
            for id in [&id, &other] {
                let mut opening = open(&handler, id, request).await;
                assert!(opening.held().is_none());
                assert_eq!(opening.read().await.unwrap(), None);
                assert_eq!(kind(opening.write(&record("x"), wid()).await), ErrorKind::Gone);
            }
        }
        drop(_admin);
        assert_eq!(entries(&handler), (0, 0));
    }

    #[tokio::test]
    async fn an_opening_that_was_refused_its_lock_never_writes_even_if_the_session_appears() {
        let handler = MemoryHandler::new();
        let id = new_id();
        let mut early = open(&handler, &id, exclusive(LEASE)).await;
        assert_eq!(early.read().await.unwrap(), None);
        let mut fresh = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Fresh)).await;
        fresh.write(&record("x"), wid()).await.unwrap();
        assert!(early.read().await.unwrap().is_some());
        assert_eq!(kind(early.write(&record("y"), wid()).await), ErrorKind::Gone);
        assert_eq!(text(&handler, &id).await.as_deref(), Some("x"));
    }

    #[tokio::test]
    async fn nothing_is_stored_for_a_fresh_id_before_its_first_write_which_takes_the_lock() {
        let handler = MemoryHandler::new();
        let id = new_id();
        let mut fresh = open(&handler, &id, exclusive(LEASE).expecting(Expect::Fresh)).await;
        assert_eq!(entries(&handler), (0, 0));
        assert!(fresh.held().is_none());
        assert_eq!(fresh.write(&record("1"), wid()).await.unwrap(), Written::Applied);
        assert!(fresh.held().is_some());
        assert_eq!(kind(handler.open(&id, &exclusive(LEASE)).await), ErrorKind::LockTimeout);
        assert_eq!(fresh.save(&Change::Write(record("2")), wid()).await.unwrap(), Written::Applied);
        assert_eq!(open(&handler, &id, exclusive(LEASE)).await.read().await.unwrap().unwrap().data, b"2");
    }

    #[tokio::test]
    async fn a_fresh_id_that_is_taken_destroyed_or_locked_is_a_conflict() {
        let handler = MemoryHandler::new();
        let taken = create(&handler, "old", LONG).await;
        let destroyed = create(&handler, "old", LONG).await;
        destroy(&handler, &destroyed).await;
        let locked = new_id();
        let _holder = open(&handler, &locked, exclusive(LEASE).expecting(Expect::Any)).await;
        for id in [&taken, &destroyed, &locked] {
            for request in [exclusive(LEASE), OpenRequest::optimistic()] {
                let mut fresh = open(&handler, id, request.expecting(Expect::Fresh)).await;
                assert_eq!(kind(fresh.write(&record("new"), wid()).await), ErrorKind::Conflict);
                let mut fresh = open(&handler, id, request.expecting(Expect::Fresh)).await;
                assert_eq!(kind(fresh.save(&Change::Write(record("new")), wid()).await), ErrorKind::Conflict);
            }
        }
        assert_eq!(text(&handler, &taken).await.as_deref(), Some("old"));
        assert_eq!((text(&handler, &destroyed).await, text(&handler, &locked).await), (None, None));
    }

    #[tokio::test]
    async fn a_repeat_under_the_same_write_id_is_recognised_even_after_the_save_closed() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut opening = open(&handler, &id, exclusive(LEASE)).await;
        let first = wid();
        assert_eq!(opening.write(&record("1"), first).await.unwrap(), Written::Applied);
        assert_eq!(opening.write(&record("1"), first).await.unwrap(), Written::AlreadyApplied);
        let second = wid();
        let change = Change::Write(record("2"));
        assert_eq!(opening.save(&change, second).await.unwrap(), Written::Applied);
        assert_eq!(opening.save(&change, second).await.unwrap(), Written::AlreadyApplied);
        assert_eq!(kind(opening.save(&Change::Write(record("3")), wid()).await), ErrorKind::Unsupported);
        assert_eq!(text(&handler, &id).await.as_deref(), Some("2"));
    }

    #[tokio::test]
    async fn every_save_of_one_opening_is_fenced_after_a_takeover() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        for saves_before in 0..2 {
            let mut a = open(&handler, &id, exclusive(SHORT)).await;
            for _ in 0..saves_before {
                a.write(&record("a"), wid()).await.unwrap();
            }
            past(SHORT).await;
            let mut b = open(&handler, &id, exclusive(LEASE)).await;
            assert!(!b.held().unwrap().lease.follows_clean_release());
            assert_eq!(kind(a.write(&record("late"), wid()).await), ErrorKind::Fenced);
            assert_eq!(b.save(&Change::Write(record("b")), wid()).await.unwrap(), Written::Applied);
            assert_eq!(text(&handler, &id).await.as_deref(), Some("b"));
        }
    }

    #[tokio::test]
    async fn a_late_write_is_fenced_after_the_next_holder_has_come_and_gone() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut a = open(&handler, &id, exclusive(SHORT)).await;
        past(SHORT).await;
        open(&handler, &id, exclusive(LEASE)).await.save(&Change::Write(record("b")), wid()).await.unwrap();
        assert_eq!(kind(a.save(&Change::Write(record("late")), wid()).await), ErrorKind::Fenced);
        assert_eq!(text(&handler, &id).await.as_deref(), Some("b"));
    }

    #[tokio::test]
    async fn a_refused_opening_closes_without_touching_the_next_holders_lock() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut a = open(&handler, &id, exclusive(SHORT)).await;
        past(SHORT).await;
        let _b = open(&handler, &id, exclusive(LEASE)).await;
        a.close().await.unwrap();
        a.close().await.unwrap();
        drop(a);
        assert_eq!(kind(handler.open(&id, &exclusive(LEASE)).await), ErrorKind::LockTimeout);
    }

    #[tokio::test]
    async fn an_ended_lease_that_nobody_took_over_still_writes_unless_expiry_is_strict() {
        for (strict, expected) in [(false, Ok(Written::Applied)), (true, Err(ErrorKind::Fenced))] {
            let handler = MemoryHandler::builder().strict_expiry(strict).build();
            let id = create(&handler, "0", LONG).await;
            let absent = new_id();
            let mut a = open(&handler, &id, exclusive(SHORT)).await;
            let mut b = open(&handler, &absent, exclusive(SHORT).expecting(Expect::Any)).await;
            past(SHORT).await;
            assert_eq!(a.save(&Change::Write(record("1")), wid()).await.map_err(|e| e.kind()), expected);
            assert_eq!(b.save(&Change::Write(record("1")), wid()).await.map_err(|e| e.kind()), expected);
        }
    }

    #[tokio::test]
    async fn absent_created_destroyed_is_not_absent() {
        let handler = MemoryHandler::new();
        let id = new_id();
        let mut a = open(&handler, &id, exclusive(SHORT).expecting(Expect::Any)).await;
        past(SHORT).await;
        let mut fresh = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Fresh)).await;
        fresh.save(&Change::Write(record("b")), wid()).await.unwrap();
        assert_eq!(destroy(&handler, &id).await.unwrap().data, b"b");
        assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Gone);
        assert_eq!(text(&handler, &id).await, None);
    }

    #[tokio::test]
    async fn absent_created_expired_is_not_absent() {
        let handler = MemoryHandler::new();
        let id = new_id();
        let mut a = open(&handler, &id, exclusive(SHORT).expecting(Expect::Any)).await;
        past(SHORT).await;
        let mut fresh = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Fresh)).await;
        fresh.save(&Change::Write(Record::new(*b"b", Ttl::new(SHORT))), wid()).await.unwrap();
        past(SHORT).await;
        assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Gone);
    }

    #[tokio::test]
    async fn who_locks_an_absent_id_and_is_overtaken_creates_nothing() {
        let handler = MemoryHandler::new();
        let id = new_id();
        let mut a = open(&handler, &id, exclusive(SHORT).expecting(Expect::Any)).await;
        past(SHORT).await;
        let mut b = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
        b.close().await.unwrap();
        assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Fenced);
        assert_eq!(entries(&handler), (0, 0));
    }

    #[tokio::test]
    async fn only_who_read_the_tombstone_under_its_own_lock_creates_over_it() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        destroy(&handler, &id).await;
        let mut optimist = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Any)).await;
        assert_eq!(kind(optimist.write(&record("o"), wid()).await), ErrorKind::Conflict);
        let mut admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
        assert_eq!(admin.read().await.unwrap(), None);
        assert_eq!(admin.write(&record("1"), wid()).await.unwrap(), Written::Applied);
        // A logout between its read and its next write is another tombstone than the one that it read.
        destroy(&handler, &id).await;
        assert_eq!(kind(admin.write(&record("2"), wid()).await), ErrorKind::Gone);
        let mut admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
        destroy(&handler, &id).await;
        assert_eq!(admin.read().await.unwrap(), None, "hands over what the opening found");
        assert_eq!(admin.read().await.unwrap(), None, "asks the store");
        assert_eq!(admin.save(&Change::Write(record("3")), wid()).await.unwrap(), Written::Applied);
        assert_eq!(text(&handler, &id).await.as_deref(), Some("3"));
    }

    #[tokio::test]
    async fn a_logout_of_an_id_that_is_locked_and_absent_refuses_its_creation() {
        let handler = MemoryHandler::new();
        let id = new_id();
        let mut admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
        assert_eq!(destroy(&handler, &id).await, None);
        assert_eq!(kind(admin.write(&record("1"), wid()).await), ErrorKind::Gone);
        let other = new_id();
        assert_eq!(destroy(&handler, &other).await, None);
        assert_eq!(entries(&handler).0, 1, "an id that nobody holds leaves no tombstone");
    }

    #[tokio::test]
    async fn a_destroy_elsewhere_returns_the_record_and_the_holders_save_is_gone() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut a = open(&handler, &id, exclusive(LEASE)).await;
        a.write(&record("1"), wid()).await.unwrap();
        assert_eq!(destroy(&handler, &id).await.unwrap().data, b"1");
        assert_eq!(destroy(&handler, &id).await, None);
        assert_eq!(kind(a.save(&Change::Write(record("2")), wid()).await), ErrorKind::Gone);
        assert_eq!(text(&handler, &id).await, None);
    }

    #[tokio::test]
    async fn waiters_for_a_destroyed_session_are_told_at_once_that_it_is_absent() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let _holder = open(&handler, &id, exclusive(LEASE)).await;
        let request = OpenRequest::exclusive(LEASE, LEASE);
        let mut waiting = pin!(handler.open(&id, &request));
        assert!(poll(waiting.as_mut()).is_pending());
        destroy(&handler, &id).await;
        let mut opening = waiting.await.unwrap();
        assert_eq!(opening.read().await.unwrap(), None);
        assert!(opening.held().is_none());
    }

    #[tokio::test]
    async fn an_optimistic_write_yields_to_a_holder_and_never_makes_it_refused() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
        let mut t = open(&handler, &id, OpenRequest::optimistic()).await;
        let mut a = open(&handler, &id, exclusive(LEASE)).await;
        assert_eq!(kind(o.write(&record("o"), wid()).await), ErrorKind::Conflict);
        assert_eq!(kind(t.touch(LONG).await), ErrorKind::Conflict);
        assert_eq!(a.save(&Change::Write(record("a")), wid()).await.unwrap(), Written::Applied);
        let mut stale = open(&handler, &id, OpenRequest::optimistic()).await;
        let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
        assert_eq!(o.write(&record("o"), wid()).await.unwrap(), Written::Applied);
        assert_eq!(kind(stale.write(&record("s"), wid()).await), ErrorKind::Conflict);
        assert_eq!(text(&handler, &id).await.as_deref(), Some("o"));
    }

    #[tokio::test]
    async fn an_optimistic_version_does_not_survive_destroy_and_re_creation() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
        destroy(&handler, &id).await;
        let mut admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
        admin.save(&Change::Write(record("0")), wid()).await.unwrap();
        assert_eq!(kind(o.write(&record("o"), wid()).await), ErrorKind::Conflict);
        assert_eq!(text(&handler, &id).await.as_deref(), Some("0"));
    }

    #[tokio::test]
    async fn past_its_deadline_a_record_is_absent_to_every_callback() {
        let handler = MemoryHandler::new();
        let ttl = Ttl::new(SHORT);
        for request in [exclusive(Duration::from_millis(1)), OpenRequest::optimistic()] {
            for change in [Change::Write(record("1")), Change::Touch(LONG)] {
                let id = create(&handler, "0", ttl).await;
                let mut opening = open(&handler, &id, request).await;
                past(SHORT).await;
                assert_eq!(kind(opening.save(&change, wid()).await), ErrorKind::Gone);
                assert_eq!(text(&handler, &id).await, None);
                assert_eq!(destroy(&handler, &id).await, None);
            }
        }
        let id = create(&handler, "0", ttl).await;
        past(SHORT).await;
        assert!(open(&handler, &id, exclusive(LEASE)).await.held().is_none());
        let mut fresh = open(&handler, &id, exclusive(LEASE).expecting(Expect::Fresh)).await;
        assert_eq!(fresh.write(&record("1"), wid()).await.unwrap(), Written::Applied);
    }

    #[tokio::test]
    async fn the_repeat_of_a_create_that_expired_does_not_create_it_anew() {
        let handler = MemoryHandler::new();
        let (id, write) = (new_id(), wid());
        let request = OpenRequest::optimistic().expecting(Expect::Fresh);
        let mut first = open(&handler, &id, request).await;
        let mut copy = open(&handler, &id, request).await;
        let short = Record::new(*b"0", Ttl::new(SHORT));
        assert_eq!(first.write(&short, write).await.unwrap(), Written::Applied);
        past(SHORT).await;
        assert_eq!(kind(copy.write(&short, write).await), ErrorKind::Gone);
    }

    #[tokio::test]
    async fn a_hold_keeps_its_session_alive_when_it_opens_and_when_it_renews() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", Ttl::new(SHORT)).await;
        let lease = Duration::from_millis(60);
        let mut a = open(&handler, &id, exclusive(lease)).await;
        let held = a.held().unwrap().clone();
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(30)).await;
            assert!(held.lock.renew(std::slice::from_ref(&held.lease)).await.iter().all(Result::is_ok));
        }
        assert_eq!(a.save(&Change::Write(record("1")), wid()).await.unwrap(), Written::Applied);
        let long = create(&handler, "0", LONG).await;
        drop(open(&handler, &long, exclusive(lease)).await);
        let left = open(&handler, &long, OpenRequest::read_only()).await.read().await.unwrap().unwrap().ttl;
        assert!(left.as_duration() > Duration::from_secs(3600), "an open shortens nothing");
    }

    #[tokio::test]
    async fn renewal_tells_who_took_over_and_what_expired() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let a = open(&handler, &id, exclusive(SHORT)).await;
        let lost = a.held().unwrap().clone();
        past(SHORT).await;
        assert!(lost.lock.renew(std::slice::from_ref(&lost.lease)).await[0].is_ok(), "nobody took over");
        past(SHORT).await;
        let _b = open(&handler, &id, exclusive(LEASE)).await;
        let short = create(&handler, "0", Ttl::new(SHORT)).await;
        let c = open(&handler, &short, exclusive(Duration::from_millis(1))).await;
        let gone = c.held().unwrap().clone();
        past(SHORT).await;
        let outcomes = lost.lock.renew(&[lost.lease.clone(), gone.lease.clone()]).await;
        let kinds: Vec<_> = outcomes.into_iter().map(kind).collect();
        assert_eq!(kinds, [ErrorKind::Fenced, ErrorKind::Gone]);
        assert!(lost.lease.is_lost() && !gone.lease.is_lost());
    }

    #[tokio::test]
    async fn a_touch_moves_the_deadline_and_leaves_the_last_write_alone() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
        let mut t = open(&handler, &id, exclusive(Duration::from_millis(1))).await;
        assert_eq!(t.touch(Ttl::from_secs(100)).await.unwrap(), Written::Applied);
        let left = t.read().await.unwrap();
        assert!(left.is_some(), "the first read hands over what the open fetched");
        let left = t.read().await.unwrap().unwrap().ttl;
        assert!(left <= Ttl::from_secs(100) && left > Ttl::from_secs(90));
        t.close().await.unwrap();
        assert_eq!(o.write(&record("o"), wid()).await.unwrap(), Written::Applied);
    }

    #[tokio::test]
    async fn read_only_and_destroy_change_nothing_else() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut view = open(&handler, &id, OpenRequest::read_only()).await;
        let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
        assert_eq!(kind(view.write(&record("1"), wid()).await), ErrorKind::Unsupported);
        assert_eq!(kind(view.touch(LONG).await), ErrorKind::Unsupported);
        assert_eq!(kind(view.destroy().await), ErrorKind::Unsupported);
        assert_eq!(kind(logout.read().await), ErrorKind::Unsupported);
        assert_eq!(kind(logout.write(&record("1"), wid()).await), ErrorKind::Unsupported);
        assert_eq!(text(&handler, &id).await.as_deref(), Some("0"));
    }

    #[tokio::test]
    async fn a_payload_over_the_limit_is_refused_and_the_opening_stays_usable() {
        let handler = MemoryHandler::builder().max_bytes(3).build();
        let id = create(&handler, "0", LONG).await;
        let mut a = open(&handler, &id, exclusive(LEASE)).await;
        assert_eq!(kind(a.save(&Change::Write(record("1234")), wid()).await), ErrorKind::TooLarge);
        assert_eq!(a.save(&Change::Write(record("123")), wid()).await.unwrap(), Written::Applied);
    }

    #[tokio::test]
    async fn waiters_get_in_in_the_order_of_their_arrival_and_are_woken_by_the_release() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "", LONG).await;
        let holder = open(&handler, &id, exclusive(LEASE)).await;
        let request = OpenRequest::exclusive(LEASE, LEASE);
        let mut tasks = Vec::new();
        for n in 0..20u8 {
            let (handler, id) = (handler.clone(), id.clone());
            tasks.push(tokio::spawn(async move {
                let mut opening = handler.open(&id, &request).await.unwrap();
                let mut data = opening.read().await.unwrap().unwrap().data;
                data.push(n);
                tokio::task::yield_now().await;
                opening.save(&Change::Write(Record::new(data, LONG)), wid()).await.unwrap()
            }));
            tokio::task::yield_now().await;
        }
        let admin = handler.admin().unwrap();
        let locks = admin.locks(NonZeroU32::MAX).await.unwrap();
        assert_eq!((locks.len(), locks[0].waiting), (1, Some(20)));
        drop(holder);
        for task in tasks {
            assert_eq!(task.await.unwrap(), Written::Applied);
        }
        let order = open(&handler, &id, OpenRequest::read_only()).await.read().await.unwrap().unwrap().data;
        assert_eq!(order, (0..20).collect::<Vec<u8>>());
    }

    #[tokio::test]
    async fn the_first_waiter_gets_in_when_the_lease_ends_and_a_newcomer_does_not_pass() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let stalled = open(&handler, &id, exclusive(SHORT)).await;
        let request = OpenRequest::exclusive(LEASE, LEASE);
        let mut waiting = pin!(handler.open(&id, &request));
        assert!(poll(waiting.as_mut()).is_pending());
        past(SHORT).await;
        assert_eq!(kind(handler.open(&id, &exclusive(LEASE)).await), ErrorKind::LockTimeout);
        assert!(!waiting.await.unwrap().held().unwrap().lease.follows_clean_release());
        drop(stalled);
    }

    #[tokio::test]
    async fn a_wait_ends_with_its_budget_and_names_the_holder() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let _holder = open(&handler, &id, exclusive(LEASE)).await;
        let error = handler.open(&id, &OpenRequest::exclusive(SHORT, LEASE)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LockTimeout);
        assert_eq!(error.holder().unwrap().process, format!("pid {}", std::process::id()));
        assert!(!format!("{error} {error:?}").contains(id.as_str()));
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_leaves_the_queue_and_passes_on_what_it_was_handed() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let request = OpenRequest::exclusive(LEASE, LEASE);
        let holder = open(&handler, &id, exclusive(LEASE)).await;
        let mut second = pin!(handler.open(&id, &request));
        {
            let mut first = Box::pin(handler.open(&id, &request));
            assert!(poll(first.as_mut()).is_pending());
            assert!(poll(second.as_mut()).is_pending());
            // Hands the lock to the first, which goes away without having looked.
            drop(holder);
        }
        assert!(second.await.unwrap().held().unwrap().lease.follows_clean_release());
    }

    #[tokio::test]
    async fn a_lease_says_whether_it_follows_a_clean_release() {
        let lock = MemoryLock::new();
        let id = new_id();
        let request = LeaseRequest { wait: Duration::ZERO, lease: LEASE };
        let first = lock.acquire(&id, &request).await.unwrap();
        lock.release(&first).await.unwrap();
        let second = lock.acquire(&id, &request).await.unwrap();
        assert!(second.follows_clean_release());
        lock.abandon(second);
        let third = lock.acquire(&id, &LeaseRequest { wait: Duration::ZERO, lease: SHORT }).await.unwrap();
        assert!(!third.follows_clean_release());
        past(SHORT).await;
        let fourth = lock.acquire(&id, &request).await.unwrap();
        assert!(!fourth.follows_clean_release());
        lock.release(&third).await.unwrap();
        assert_eq!(kind(lock.acquire(&id, &request).await), ErrorKind::LockTimeout);
        lock.release(&fourth).await.unwrap();
        assert!(lock.acquire(&id, &request).await.unwrap().follows_clean_release());
    }

    #[tokio::test]
    async fn a_dropped_opening_frees_its_session_at_once_and_writes_nothing() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        drop(open(&handler, &id, exclusive(LEASE)).await);
        assert!(open(&handler, &id, exclusive(LEASE)).await.held().is_some());
        assert_eq!(text(&handler, &id).await.as_deref(), Some("0"));
    }

    #[tokio::test]
    async fn gc_counts_expired_records_and_leaves_held_and_live_ones() {
        let remember = Duration::from_millis(1);
        let handler = MemoryHandler::builder().remember(remember).build();
        let live = create(&handler, "0", LONG).await;
        let held = create(&handler, "0", Ttl::new(SHORT)).await;
        let lock = handler.lock();
        // Of the lock alone: an opening would prolong the record.
        let lease = lock.acquire(&held, &LeaseRequest { wait: Duration::ZERO, lease: LEASE }).await.unwrap();
        handler.store.change(&held, |entry, now, _| match &mut entry.slot {
            Slot::Record { deadline, .. } => *deadline = now,
            Slot::Empty | Slot::Tombstone { .. } => unreachable!(),
        });
        let destroyed = create(&handler, "0", LONG).await;
        destroy(&handler, &destroyed).await;
        for _ in 0..10 {
            create(&handler, "0", Ttl::new(SHORT)).await;
        }
        past(SHORT).await;
        let three = NonZeroU32::new(3).unwrap();
        let mut counts = Vec::new();
        while entries(&handler).0 > 2 {
            counts.push(handler.gc(three).await.unwrap());
        }
        assert!(counts.iter().all(|count| *count <= 3));
        assert_eq!(counts.iter().sum::<u64>(), 10);
        assert_eq!(text(&handler, &live).await.as_deref(), Some("0"));
        lock.release(&lease).await.unwrap();
        assert_eq!(handler.gc(three).await.unwrap(), 1);
        assert_eq!(entries(&handler), (1, 1));
    }

    #[tokio::test]
    async fn a_tombstone_holds_no_payload_and_is_in_no_listing() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        destroy(&handler, &id).await;
        assert_eq!(entries(&handler).0, 1);
        let page = handler.admin().unwrap().list(None, NonZeroU32::MAX).await.unwrap();
        assert!(page.sessions.is_empty());
        assert_eq!(handler.gc(NonZeroU32::MAX).await.unwrap(), 0);
        assert_eq!(entries(&handler).0, 1, "it stays for its time");
    }

    #[tokio::test]
    async fn a_listing_in_parts_shows_each_live_session_once() {
        let handler = MemoryHandler::new();
        let mut ids = Vec::new();
        for _ in 0..50 {
            ids.push(create(&handler, "12345", LONG).await);
        }
        let _locked = open(&handler, &new_id(), exclusive(LEASE).expecting(Expect::Any)).await;
        let admin = handler.admin().unwrap();
        let mut seen = Vec::new();
        let mut after = None;
        loop {
            let page = admin.list(after.as_ref(), NonZeroU32::new(7).unwrap()).await.unwrap();
            assert!(page.sessions.iter().all(|info| info.bytes == 5));
            seen.extend(page.sessions.into_iter().map(|info| info.id));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        seen.sort();
        ids.sort();
        assert_eq!(seen, ids);
        assert_eq!(kind(admin.list(Some(&Cursor("?".into())), NonZeroU32::MAX).await), ErrorKind::Config);
    }

    #[tokio::test]
    async fn an_unlock_lets_the_next_in_and_fences_the_holder() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "0", LONG).await;
        let mut a = open(&handler, &id, exclusive(LEASE)).await;
        let admin = handler.admin().unwrap();
        assert!(admin.unlock(&id).await.unwrap());
        assert!(!admin.unlock(&id).await.unwrap());
        let mut b = open(&handler, &id, exclusive(LEASE)).await;
        assert!(!b.held().unwrap().lease.follows_clean_release());
        assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Fenced);
        assert_eq!(b.write(&record("b"), wid()).await.unwrap(), Written::Applied);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_storm_of_increments_loses_none_and_leaves_nothing_behind() {
        let remember = Duration::from_millis(1);
        let handler = MemoryHandler::builder().remember(remember).build();
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(create(&handler, "\0", LONG).await);
        }
        let mut tasks = Vec::new();
        for n in 0..150u32 {
            let (handler, id, other) = (handler.clone(), ids[n as usize % 3].clone(), new_id());
            tasks.push(tokio::spawn(async move {
                // Every seventh stalls past its lease; what it then writes counts only if it was applied.
                let stalls = n % 7 == 0;
                let lease = if stalls { Duration::from_millis(3) } else { LEASE };
                let mut opening = handler.open(&id, &OpenRequest::exclusive(LEASE, lease)).await.unwrap();
                let data = vec![opening.read().await.unwrap().unwrap().data[0] + 1];
                tokio::time::sleep(Duration::from_millis(if stalls { 8 } else { 0 })).await;
                let outcome = opening.save(&Change::Write(Record::new(data, LONG)), wid()).await;
                let lock = handler.lock();
                let lease = lock.acquire(&other, &LeaseRequest { wait: LEASE, lease: LEASE }).await.unwrap();
                lock.release(&lease).await.unwrap();
                (n as usize % 3, outcome.map_err(|e| e.kind()))
            }));
        }
        let mut applied = [0u8; 3];
        for task in tasks {
            match task.await.unwrap() {
                (n, Ok(Written::Applied)) => applied[n] += 1,
                (_, outcome) => assert_eq!(outcome, Err(ErrorKind::Fenced)),
            }
        }
        for (id, applied) in ids.iter().zip(applied) {
            assert_eq!(text(&handler, id).await.unwrap().as_bytes(), [applied]);
            destroy(&handler, id).await;
        }
        past(SHORT).await;
        handler.gc(NonZeroU32::MAX).await.unwrap();
        assert_eq!(entries(&handler), (0, 0));
    }

    #[tokio::test]
    async fn debug_shows_neither_ids_nor_payloads() {
        let handler = MemoryHandler::new();
        let id = create(&handler, "payload", LONG).await;
        let opening = open(&handler, &id, exclusive(LEASE)).await;
        let text = format!("{handler:?} {:?} {opening:?} {:?}", handler.lock(), opening.held());
        assert!(!text.contains(id.as_str()) && !text.contains("payload"), "{text}");
    }

    #[test]
    fn nothing_but_waiting_needs_a_runtime() {
        fn now<F: Future>(future: F) -> F::Output {
            match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(output) => output,
                Poll::Pending => panic!("it waits"),
            }
        }
        let handler = MemoryHandler::new();
        let id = now(create(&handler, "0", LONG));
        let mut opening = now(open(&handler, &id, OpenRequest::exclusive(LEASE, LEASE)));
        assert_eq!(now(opening.read()).unwrap().unwrap().data, b"0");
        drop(opening);
        assert_eq!(now(handler.gc(NonZeroU32::MAX)).unwrap(), 0);
    }

    fn poll<F: Future + ?Sized>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }
}
