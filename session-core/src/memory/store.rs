//! The atomic steps of the store: who gets the lock, whose write is applied, what stays behind.
//!
//! It knows entries and instants; what an opening may ask for is the business of the module above.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;

use super::MemoryBuilder;
use crate::error::{Error, ErrorKind, Holder, Result};
use crate::handler::{Cursor, LockInfo, Page, SessionInfo};
use crate::id::SessionId;
use crate::leased::{Action, Basis, Found, Granted, Removal, Renewal, Renewed, Step, Verdict};
use crate::lock::LeaseToken;
use crate::record::{Record, WriteId};
use crate::ttl::Ttl;

pub(super) const SHARDS: usize = 16;

/// All entries, in shards that are locked for the length of one decision and never across an await.
pub(super) struct Store {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    tickets: AtomicU64,
    pub(super) options: MemoryBuilder,
}

#[derive(Default)]
pub(super) struct Shard {
    pub(super) entries: BTreeMap<SessionId, Entry>,
    /// When gc has to look at an entry: never later than there is something to free, possibly earlier, so that a write that
    /// moves a deadline ahead leaves this alone.
    pub(super) due: BTreeSet<(Instant, SessionId)>,
}

/// Everything about one id. An entry with nothing in it does not stay.
#[derive(Default)]
pub(super) struct Entry {
    pub(super) slot: Slot,
    pub(super) lock: Option<Lock>,
    /// Until when it is remembered that the last holder did not release.
    unclean: Option<Instant>,
    /// In the order of their arrival.
    waiters: BTreeMap<u64, Waiter>,
    due: Option<Instant>,
}

#[derive(Default)]
pub(super) enum Slot {
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

pub(super) struct Lock {
    pub(super) token: LeaseToken,
    since: Instant,
    until: Instant,
    length: Duration,
    clean: bool,
}

pub(super) struct Waiter {
    want: Wanted,
    wake: Arc<Notify>,
}

/// What somebody who locks asks for.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) token: LeaseToken,
    pub(super) lease: Duration,
    /// Whether there is nothing to wait for once the record is gone.
    pub(super) existing: bool,
}

pub(super) enum Attempt {
    Granted(Granted<LeaseToken>),
    Busy { since: Instant, until: Instant },
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Store {
    pub(super) fn new(options: MemoryBuilder) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            tickets: AtomicU64::new(0),
            options,
        }
    }

    fn shard_of(&self, id: &SessionId) -> usize {
        usize::try_from(self.hasher.hash_one(id) % SHARDS as u64).unwrap_or(0)
    }

    pub(super) fn shard(&self, index: usize) -> MutexGuard<'_, Shard> {
        // No decision panics halfway, so what a poisoned shard holds is whole.
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one decision about `id`: the atomic step of this store.
    pub(super) fn decide<T>(&self, id: &SessionId, decide: impl FnOnce(&mut Entry, Instant, &MemoryBuilder) -> T) -> T {
        let mut shard = self.shard(self.shard_of(id));
        let now = Instant::now();
        let entry = shard.entries.entry(id.clone()).or_default();
        let decision = decide(entry, now, &self.options);
        shard.tidy(id, now, &self.options);
        decision
    }

    pub(super) fn found(&self, id: &SessionId) -> Found {
        let shard = self.shard(self.shard_of(id));
        shard.entries.get(id).map_or(Found::Absent, |entry| entry.found(Instant::now()))
    }

    pub(super) async fn take(
        &self,
        operation: &'static str,
        id: &SessionId,
        want: Wanted,
        wait: Duration,
    ) -> Result<Granted<LeaseToken>> {
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
    fn attempt(&self, id: &SessionId, want: Wanted, ticket: u64, wake: Option<&Arc<Notify>>) -> Attempt {
        self.decide(id, |entry, now, options| {
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
            Attempt::Granted(Granted::Locked { claim: want.token, found: entry.found(now), clean })
        })
    }

    pub(super) fn gc(&self, limit: u32) -> u64 {
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

    pub(super) fn list(&self, after: Option<&SessionId>, limit: usize) -> Page {
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

    pub(super) fn locks(&self, limit: usize) -> Vec<LockInfo> {
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

    pub(super) fn lock_on(&self, now: Instant) -> bool {
        self.lock.as_ref().is_some_and(|lock| lock.until > now)
    }

    pub(super) fn found(&self, now: Instant) -> Found {
        match &self.slot {
            Slot::Record { data, deadline, last } if *deadline > now => {
                Found::Live { last: *last, record: Record::new(data.to_vec(), Ttl::new(*deadline - now)) }
            }
            Slot::Record { last: mark, .. } => Found::Buried { mark: *mark },
            Slot::Tombstone { until, mark } if *until > now => Found::Buried { mark: *mark },
            Slot::Tombstone { .. } | Slot::Empty => Found::Absent,
        }
    }

    pub(super) fn renew(&mut self, lease: &Renewal<SessionId>, now: Instant, options: &MemoryBuilder) -> Renewed {
        if lease.protects && !self.is_live(now) {
            return Renewed::Gone;
        }
        match &mut self.lock {
            Some(lock) if lock.token == lease.token && (lock.until > now || !options.strict_expiry) => {
                lock.until = after(now, lease.length);
                self.keep_alive(lease.length, now);
                Renewed::Renewed
            }
            _ => Renewed::Ended,
        }
    }

    pub(super) fn judge(&self, step: &Step<'_, LeaseToken>, now: Instant, options: &MemoryBuilder) -> Verdict {
        let (live, trace, buried) = match self.slot {
            Slot::Record { deadline, last, .. } if deadline > now => (Some(last), None, false),
            Slot::Record { last, .. } => (None, Some(last), false),
            Slot::Tombstone { until, mark } if until > now => (None, Some(mark), true),
            Slot::Tombstone { .. } | Slot::Empty => (None, None, false),
        };
        let (id, writes) = match step.action {
            Action::Write { id, .. } => (Some(id), true),
            Action::Touch { .. } => (None, false),
        };
        if live.is_some() && live == id {
            return Verdict::AlreadyApplied;
        }
        let exclusive = step.lease.is_some();
        let own = self.lock.as_ref().filter(|lock| Some(&lock.token) == step.claim);
        let foreign = own.is_none() && self.lock_on(now);
        match step.basis {
            Basis::Written(_) if live.is_none() => return Verdict::Gone,
            Basis::Written(prev) if live != Some(prev) || foreign => return Verdict::Refused,
            Basis::Written(_) => {}
            // There is nothing whose deadline could be moved.
            Basis::Absent { .. } | Basis::Unseen if !writes => return Verdict::Gone,
            Basis::Absent { .. } if exclusive && live.is_some() => return Verdict::Refused,
            // Something was created and has ended since, so the id is not as absent as it was found.
            Basis::Absent { mark } if exclusive && trace.is_some() && trace != mark => return Verdict::Gone,
            Basis::Absent { .. } if exclusive && own.is_none() => return Verdict::Refused,
            Basis::Absent { .. } if exclusive => {}
            // The repeat of a create whose record has expired meanwhile must not create it anew.
            Basis::Absent { .. } | Basis::Unseen if trace.is_some() && trace == id => return Verdict::Gone,
            Basis::Absent { .. } | Basis::Unseen if live.is_some() || buried || foreign => return Verdict::Refused,
            Basis::Absent { .. } | Basis::Unseen => return Verdict::Applied,
        }
        if options.strict_expiry && exclusive && own.is_none_or(|lock| lock.until <= now) {
            return Verdict::Refused;
        }
        Verdict::Applied
    }

    pub(super) fn apply(&mut self, action: &Action<'_>, now: Instant) {
        match (action, &mut self.slot) {
            (Action::Write { id, data, ttl }, slot) => {
                *slot = Slot::Record { data: (*data).into(), deadline: after(now, ttl.as_duration()), last: *id };
            }
            (Action::Touch { ttl }, Slot::Record { deadline, .. }) => *deadline = after(now, ttl.as_duration()),
            (Action::Touch { .. }, Slot::Tombstone { .. } | Slot::Empty) => {}
        }
    }

    pub(super) fn take(&mut self, token: LeaseToken, length: Duration, now: Instant) {
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

    pub(super) fn release(&mut self, token: LeaseToken, clean: bool, now: Instant, options: &MemoryBuilder) {
        if let Some(lock) = self.lock.take_if(|lock| lock.token == token) {
            self.unclean = (!clean).then(|| after(now, options.remember.max(lock.length.saturating_mul(2))));
            self.hand_on(now);
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

    pub(super) fn destroy(&mut self, step: &Removal<'_, LeaseToken>, now: Instant, options: &MemoryBuilder) {
        let lease = self.lock.as_ref().map(|lock| lock.length);
        if step.trace || !matches!(self.slot, Slot::Empty) || lease.is_some() {
            let stay = options.remember.max(lease.unwrap_or_default().max(step.lease).saturating_mul(2));
            self.slot = Slot::Tombstone { until: after(now, stay), mark: step.mark };
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
    pub(super) token: LeaseToken,
    waiting: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.waiting {
            self.store.decide(self.id, |entry, now, options| entry.leave(self.ticket, self.token, now, options));
        }
    }
}

/// Adds without overflow: whatever is longer than the longest life counts as that.
pub(super) fn after(now: Instant, length: Duration) -> Instant {
    now + length.min(Ttl::MAX.as_duration())
}

fn holder(since: Instant) -> Holder {
    Holder::this_process(SystemTime::now() - since.elapsed())
}

fn lock_timeout(operation: &'static str, wait: Duration, since: Instant) -> Error {
    let fact = format!("the lock was not free within {} ms", wait.as_millis());
    Error::new(ErrorKind::LockTimeout, operation, fact).with_holder(Some(holder(since)))
}
