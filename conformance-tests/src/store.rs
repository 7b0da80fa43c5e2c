//! The store behind the liars: the contract in memory, with one place for each flaw to take effect.
//!
//! Nothing here is fit for use; with [`Flaw::None`] it is correct, and that is what makes each flaw the only thing wrong.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use session_core::{
    Access, Change, Cursor, Error, ErrorKind, Expect, Held, Holder, Lease, LeaseRequest, LeaseToken, LockInfo, OpenRequest,
    OpenSession, Page, Record, Result, SessionAdmin, SessionHandler, SessionId, SessionInfo, SessionLock, Ttl, WriteId,
    Written,
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

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

/// The lock of one id.
#[derive(Default)]
struct Latch {
    hold: Option<Hold>,
    clean: bool,
    haunted: bool,
    queue: VecDeque<u64>,
    wake: Arc<Notify>,
}

#[derive(Clone)]
struct Hold {
    token: LeaseToken,
    instance: u64,
    until: Instant,
    length: Duration,
    since: SystemTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// Absent, with the trace of a destruction if there is one.
    Absent(Option<WriteId>),
    /// The record with this last write.
    Record(WriteId),
    /// Nothing more can be written.
    Spent(ErrorKind),
}

enum Verdict {
    Apply,
    Already,
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

impl Latch {
    fn held(&self, now: Instant) -> Option<&Hold> {
        self.hold.as_ref().filter(|hold| hold.until > now)
    }

    fn is_of(&self, token: Option<LeaseToken>) -> bool {
        token.is_some() && self.hold.as_ref().map(|hold| hold.token) == token
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

    fn timeout(&self, key: &str, hold: Option<&Hold>) -> Error {
        let holder = hold.map(|hold| Holder::this_process(hold.since));
        let error = if self.is(Flaw::ErrorShowsId) {
            Error::new(ErrorKind::LockTimeout, "open", format!("the lock of {key} is taken"))
        } else {
            fail(ErrorKind::LockTimeout, "open")
        };
        error.with_holder(holder)
    }

    /// Waits for the lock; says under which token it was taken and whether the holder before released.
    async fn acquire(
        self: &Arc<Self>,
        key: &str,
        instance: u64,
        request: LeaseRequest,
        absent_is_in: bool,
    ) -> Result<Option<(LeaseToken, bool)>> {
        let wait = match self.flaw {
            Flaw::NeverWaits => Duration::ZERO,
            Flaw::WaitsTooLong => request.wait * 3 + Duration::from_secs(3),
            _ => request.wait,
        };
        let length = if self.is(Flaw::LeaseEndsEarly) { request.lease / 4 } else { request.lease };
        let deadline = Instant::now() + wait.min(AGES);
        let mut ticket = Ticket::draw(self, key);
        loop {
            // Absent while waiting is as good as absent before.
            if absent_is_in && !self.is_live(key) {
                ticket.outcome = Wait::In;
                return Ok(None);
            }
            let wake = self.with(key, |_, latch| latch.wake.clone());
            let woken = wake.notified();
            let token =
                if self.is(Flaw::TokenIsTheProcess) { LeaseToken::from_bytes([7; 16]) } else { LeaseToken::random()? };
            let now = Instant::now();
            let next = self.with(key, |_, latch| {
                let reentrant =
                    self.is(Flaw::LockIsReentrant) && latch.hold.as_ref().is_some_and(|h| h.instance == instance);
                let free = match latch.held(now) {
                    None => !latch.haunted,
                    Some(_) => reentrant || self.is(Flaw::NoLock),
                };
                if free && latch.queue.front() == Some(&ticket.number) {
                    let clean = latch.hold.is_none() && latch.clean;
                    let until = if self.is(Flaw::LockNeverEnds) { now + AGES } else { now + length };
                    latch.hold = Some(Hold { token, instance, until, length, since: SystemTime::now() });
                    latch.clean = false;
                    return Ok((token, clean || self.is(Flaw::TakeoverIsCalledClean)));
                }
                if now >= deadline {
                    return Err(Some(self.timeout(key, latch.hold.as_ref())));
                }
                Err(None)
            });
            match next {
                Ok(taken) => {
                    ticket.outcome = Wait::In;
                    return Ok(Some(taken));
                }
                Err(Some(timeout)) => {
                    ticket.outcome = Wait::GaveUp;
                    return Err(timeout);
                }
                Err(None) => {}
            }
            let lease_end = self.with(key, |_, latch| latch.held(now).map(|hold| hold.until));
            let look_again = lease_end.unwrap_or(deadline).min(deadline).max(now + Duration::from_millis(1));
            if self.is(Flaw::WakeIsLost) {
                let nearly = ((deadline - now) * 9 / 10).min(TOO_LONG);
                tokio::time::sleep(nearly + Duration::from_millis(1)).await;
            } else {
                tokio::select! {
                    () = woken => {}
                    () = tokio::time::sleep_until(look_again.into()) => {}
                }
            }
        }
    }

    /// Gives the lock back if it is `token`'s, or anybody's if `any`.
    fn release(&self, key: &str, token: Option<LeaseToken>, any: bool) {
        self.with(key, |_, latch| {
            if latch.is_of(token) || any {
                latch.hold = None;
                latch.clean = true;
                latch.wake.notify_waiters();
            }
        });
    }

    /// Waits, as long as a flaw does that should not wait at all.
    async fn wait_until_free(&self, key: &str, token: Option<LeaseToken>) {
        let end = Instant::now() + TOO_LONG;
        while Instant::now() < end && self.with(key, |_, latch| latch.held(Instant::now()).is_some() && !latch.is_of(token))
        {
            tokio::time::sleep(GAP).await;
        }
    }

    /// Whether renewal or an exclusive open finds the record near its end, and prolongs it.
    fn prolong(cell: &mut Cell, length: Duration, now: Instant) {
        if let Some(record) = cell.record.as_mut().filter(|record| record.deadline > now) {
            record.deadline = record.deadline.max(now + length * 2);
        }
    }
}

/// A place in the queue of one lock.
struct Ticket {
    store: Arc<Store>,
    key: String,
    number: u64,
    outcome: Wait,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    Waiting,
    In,
    GaveUp,
}

impl Ticket {
    fn draw(store: &Arc<Store>, key: &str) -> Self {
        let latch_key = store.latch_key(key);
        let mut inner = store.inner();
        inner.tickets += 1;
        let number = inner.tickets;
        inner.latches.entry(latch_key).or_default().queue.push_back(number);
        drop(inner);
        Self { store: store.clone(), key: key.to_owned(), number, outcome: Wait::Waiting }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let stays = self.outcome != Wait::In && self.store.is(Flaw::DeadWaiterBlocksQueue);
        let haunts = self.outcome == Wait::Waiting && self.store.is(Flaw::DroppedOpenKeepsLock);
        self.store.with(&self.key, |_, latch| {
            if !stays {
                latch.queue.retain(|number| *number != self.number);
            }
            latch.haunted |= haunts;
            latch.wake.notify_waiters();
        });
    }
}

/// The handler of a store; each stands for a process.
pub(crate) struct StoreHandler {
    store: Arc<Store>,
    instance: u64,
    /// What readers of this handler have seen, for a flaw.
    seen: Mutex<BTreeMap<String, Option<Record>>>,
}

impl fmt::Debug for StoreHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreHandler").finish_non_exhaustive()
    }
}

#[async_trait]
impl SessionHandler for StoreHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let store = &self.store;
        let key = store.key(id);
        let permit = if store.is(Flaw::EightOpeningsAtATime) {
            let permit = tokio::time::timeout(Duration::from_secs(2), store.openings.clone().acquire_owned()).await;
            Some(permit.map_err(|_| fail(ErrorKind::Unavailable, "open"))?.expect("nobody closes the semaphore"))
        } else {
            None
        };
        let mut opening = Opening {
            store: store.clone(),
            id: id.clone(),
            key: key.clone(),
            access: request.access,
            expect: request.expect,
            held: None,
            base: Base::Absent(None),
            fetched: None,
            first: None,
            name: WriteId::random()?,
            sent: HashSet::new(),
            closed: false,
            destroyed: false,
            wrote: false,
            instance: self.instance,
            _permit: permit,
        };
        let absent_at_once = request.expect == Expect::Existing && !store.is_live(&key);
        match request.access {
            Access::Destroy => {
                opening.fetch(true);
                opening.fetched = None;
            }
            Access::ReadOnly => {
                if store.is(Flaw::ReaderWaits) {
                    store.wait_until_free(&key, None).await;
                }
                if store.is(Flaw::ReaderHolds) {
                    let request = LeaseRequest { wait: Duration::ZERO, lease: Duration::from_secs(60) };
                    if let Ok(Some((token, clean))) = store.acquire(&key, self.instance, request, false).await {
                        opening.hold(token, clean, request.lease);
                    }
                }
                opening.fetch(true);
                if store.is(Flaw::ReadsAreSharedByReaders) {
                    let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                    let shared = seen.entry(key).or_insert_with(|| opening.fetched.clone().flatten());
                    opening.fetched = Some(shared.clone());
                }
            }
            Access::Optimistic if request.expect == Expect::Fresh => opening.fetched = Some(None),
            Access::Optimistic => {
                if store.is(Flaw::OptimismWaits) {
                    store.wait_until_free(&key, None).await;
                }
                opening.fetch(true);
            }
            Access::Exclusive { wait, lease } => {
                let request_lease = LeaseRequest { wait, lease };
                if request.expect == Expect::Fresh && !store.is(Flaw::FreshLocksAtOpen) {
                    opening.fetched = Some(None);
                    return Ok(Box::new(opening));
                }
                if absent_at_once {
                    if store.is(Flaw::ExistingLitters) {
                        let empty = Record::new([], Ttl::from_secs(900));
                        store.with(&key, |cell, _| {
                            store.apply(cell, opening.name, &empty, opening.name, Instant::now());
                        });
                    }
                    if store.is(Flaw::ExistingWaitsForAbsent) {
                        store.wait_until_free(&key, None).await;
                    }
                    if !store.is(Flaw::ExistingLocksAbsent) {
                        opening.fetch(true);
                        return Ok(Box::new(opening));
                    }
                }
                if store.is(Flaw::ReadsBeforeLock) {
                    opening.fetch(true);
                }
                let absent_is_in = request.expect == Expect::Existing && !store.is(Flaw::ExistingLocksAbsent);
                if let Some((token, clean)) = store.acquire(&key, self.instance, request_lease, absent_is_in).await? {
                    opening.hold(token, clean, lease);
                }
                // Before it is read: what is found alive has to outlive the hold.
                if opening.held.is_some() && !store.is(Flaw::OpenDoesNotProlong) {
                    store.with(&key, |cell, _| Store::prolong(cell, lease, Instant::now()));
                }
                if !store.is(Flaw::ReadsBeforeLock) {
                    opening.fetch(true);
                }
                if absent_is_in && opening.fetched == Some(None) {
                    opening.let_go();
                }
            }
        }
        Ok(Box::new(opening))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        let store = &self.store;
        let alone = !store.collecting.swap(true, Ordering::SeqCst);
        if store.is(Flaw::GcRunsAlone) && !alone {
            return Err(fail(ErrorKind::Unavailable, "gc"));
        }
        let limit = if store.is(Flaw::GcIgnoresLimit) { usize::MAX } else { limit.get() as usize };
        let keys: Vec<String> = store.inner().cells.keys().cloned().collect();
        let dead = |cell: &Cell, latch: &Latch| {
            let now = Instant::now();
            let held = latch.held(now);
            cell.record.as_ref().is_some_and(|record| match (store.flaw, held) {
                (Flaw::GcTakesHeld, Some(hold)) => record.deadline < now + hold.length * 2,
                (_, Some(_)) => false,
                (Flaw::GcTakesTheLiving, None) => record.deadline <= now + AGES,
                (Flaw::GcTakesRenewed, None) => record.first_deadline <= now,
                (_, None) => record.deadline <= now,
            })
        };
        let two_steps = matches!(store.flaw, Flaw::GcTakesReplaced | Flaw::GcCountsTwice);
        let mut freed = 0;
        let mut found = Vec::new();
        for key in keys {
            if freed as usize + found.len() >= limit {
                break;
            }
            if store.is(Flaw::GcWaits) {
                store.wait_until_free(&key, None).await;
            }
            let now = Instant::now();
            freed += store.with(&key, |cell, latch| {
                let mut counted = 0;
                if dead(cell, latch) {
                    if two_steps {
                        found.push(key.clone());
                    } else {
                        cell.record = None;
                        counted += 1;
                    }
                }
                if cell.grave.is_some() && store.is(Flaw::GcCountsDestroyed) {
                    counted += 1;
                }
                cell.grave = cell.grave.filter(|(_, until)| *until > now);
                counted
            });
        }
        if two_steps {
            tokio::time::sleep(GAP).await;
            for key in found {
                freed += 1;
                let still = |cell: &Cell, latch: &Latch| store.is(Flaw::GcTakesReplaced) || dead(cell, latch);
                store.with(&key, |cell, latch| {
                    if still(cell, latch) {
                        cell.record = None;
                    }
                });
            }
        } else if store.is(Flaw::GcRunsAlone) {
            tokio::time::sleep(GAP).await;
        }
        store.collecting.store(false, Ordering::SeqCst);
        Ok(freed)
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        Some(self)
    }
}

#[async_trait]
impl SessionAdmin for StoreHandler {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        let now = Instant::now();
        let store = &self.store;
        let inner = store.inner();
        let mut page = Page::new(Vec::new(), None);
        let left = |deadline: Instant| deadline.saturating_duration_since(now);
        let mut seen = inner.cells.iter().filter_map(|(key, cell)| {
            let shown = match &cell.record {
                Some(record) if record.deadline > now || store.is(Flaw::ListShowsTheDead) => {
                    Some((record.data.len() as u64, left(record.deadline)))
                }
                None if cell.grave.is_some() && store.is(Flaw::ListShowsTheDead) => Some((0, Duration::ZERO)),
                None if store.is(Flaw::ListShowsLocks) && inner.latches.get(key).is_some_and(|l| l.held(now).is_some()) => {
                    Some((0, AGES))
                }
                _ => None,
            };
            shown.map(|shown| (key, shown))
        });
        for (key, (bytes, left)) in seen.by_ref() {
            if after.is_some_and(|after| *key <= after.0) {
                continue;
            }
            if page.sessions.len() == limit.get() as usize {
                let last = page.sessions.last().map(|last: &SessionInfo| Cursor(last.id.as_str().to_owned()));
                page.next = last.filter(|_| !store.is(Flaw::ListForgetsRest));
                break;
            }
            let id = SessionId::parse(key).expect("only ids are keys");
            page.sessions.push(SessionInfo::new(id, bytes, left));
        }
        Ok(page)
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        let now = Instant::now();
        if self.store.is(Flaw::LocksAreHidden) {
            return Ok(Vec::new());
        }
        let all = self.store.is(Flaw::LocksShowTheEnded);
        let inner = self.store.inner();
        let held = inner.latches.iter().filter_map(|(key, latch)| {
            let hold = if all { latch.hold.as_ref() } else { latch.held(now) }?;
            let id = SessionId::parse(key)?;
            let left = hold.until.saturating_duration_since(now);
            let waiting = u64::try_from(latch.queue.len()).ok();
            Some(LockInfo::new(id, Some(Holder::this_process(hold.since)), Some(left), waiting))
        });
        Ok(held.take(limit.get() as usize).collect())
    }

    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        let key = self.store.key(id);
        let was = self.store.with(&key, |_, latch| latch.held(Instant::now()).is_some());
        match self.store.flaw {
            Flaw::UnlockDoesNothing => {}
            Flaw::UnlockAlwaysSaysYes => self.store.release(&key, None, true),
            _ if was => self.store.with(&key, |_, latch| {
                latch.hold = None;
                latch.clean = false;
                latch.wake.notify_waiters();
            }),
            _ => {}
        }
        Ok(was || self.store.is(Flaw::UnlockAlwaysSaysYes))
    }
}

/// An opening of the store.
struct Opening {
    store: Arc<Store>,
    id: SessionId,
    key: String,
    access: Access,
    expect: Expect,
    held: Option<Held>,
    base: Base,
    fetched: Option<Option<Record>>,
    /// What the first read said.
    first: Option<Option<Record>>,
    name: WriteId,
    sent: HashSet<WriteId>,
    closed: bool,
    destroyed: bool,
    wrote: bool,
    instance: u64,
    _permit: Option<OwnedSemaphorePermit>,
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Opening");
        match self.store.flaw {
            Flaw::DebugShowsId => debug.field("id", &self.id.as_str()),
            Flaw::DebugShowsPayload => {
                let text =
                    self.first.as_ref().and_then(Option::as_ref).map(|r| String::from_utf8_lossy(&r.data).into_owned());
                debug.field("data", &text)
            }
            _ => debug.field("access", &self.access),
        };
        debug.finish_non_exhaustive()
    }
}

impl Store {
    /// Decides whether a write of `me` under `wid` is in order.
    fn judge(&self, cell: &Cell, latch: &Latch, me: &Opening, wid: WriteId, touch: bool, now: Instant) -> Result<Verdict> {
        let operation = if touch { "touch" } else { "write" };
        let exclusive = matches!(me.access, Access::Exclusive { .. });
        let first_of_fresh = me.expect == Expect::Fresh && !me.wrote;
        let late = if exclusive && !first_of_fresh { ErrorKind::Fenced } else { ErrorKind::Conflict };
        let refuse = |kind| Err(fail(kind, operation));
        let revives = self.is(Flaw::WriteRevives) || (touch && self.is(Flaw::TouchRevives));
        let live = if revives { cell.record.as_ref() } else { cell.live(now) };
        let token = me.token();
        let mine = latch.is_of(token);
        let others = latch.held(now).is_some() && !mine;

        if let Base::Spent(kind) = me.base {
            return refuse(kind);
        }
        match self.flaw {
            Flaw::NoFence => return Ok(Verdict::Apply),
            Flaw::TouchIsUnfenced if touch && live.is_some() => return Ok(Verdict::Apply),
            Flaw::OwnerIsEnough if exclusive && !first_of_fresh => {
                return if others { refuse(late) } else { Ok(Verdict::Apply) };
            }
            Flaw::FencePerOpening
                if exclusive && !first_of_fresh && !mine && !touch && live.is_some_and(|record| record.by == me.name) =>
            {
                return Ok(Verdict::Already);
            }
            Flaw::RepeatIsAppliedAgain if me.sent.contains(&wid) => return Ok(Verdict::Apply),
            Flaw::UnlockLeavesHolderIn if exclusive && !mine && live.is_some() => return Ok(Verdict::Apply),
            _ => {}
        }
        if !touch && live.is_some_and(|record| record.wid == wid) {
            return if self.is(Flaw::RepeatIsRefused) { refuse(late) } else { Ok(Verdict::Already) };
        }
        if exclusive
            && !first_of_fresh
            && (self.strict || self.is(Flaw::StrictByStealth))
            && !(mine && latch.held(now).is_some())
        {
            return refuse(late);
        }
        let blocked = others
            && !self.is(Flaw::VersionIsEnough)
            && !(self.is(Flaw::OptimismIgnoresHolder) && matches!(me.access, Access::Optimistic));
        match (me.base, live) {
            (Base::Record(_), None) => refuse(ErrorKind::Gone),
            (Base::Record(_), Some(_)) if blocked => refuse(late),
            (Base::Record(version), Some(record)) => {
                if record.version == version || (self.is(Flaw::OptimismIgnoresVersion) && !exclusive) {
                    Ok(Verdict::Apply)
                } else {
                    refuse(late)
                }
            }
            (Base::Absent(_), None) if touch && !self.is(Flaw::TouchCreates) => refuse(ErrorKind::Gone),
            (Base::Absent(_), _) if me.expect == Expect::Existing && !self.is(Flaw::ExistingCreates) => {
                refuse(ErrorKind::Gone)
            }
            (Base::Absent(_), Some(_)) if self.is(Flaw::FreshReplaces) && first_of_fresh => Ok(Verdict::Apply),
            (Base::Absent(_), Some(_)) if self.is(Flaw::FreshConflictIsGone) && first_of_fresh => refuse(ErrorKind::Gone),
            (Base::Absent(_), Some(_)) => refuse(late),
            (Base::Absent(_), None) if blocked => refuse(late),
            (Base::Absent(_), None) if !exclusive || first_of_fresh => {
                if cell.grave.is_some() {
                    refuse(ErrorKind::Conflict)
                } else {
                    Ok(Verdict::Apply)
                }
            }
            (Base::Absent(grave), None) => match cell.grave.map(|(name, _)| name) {
                _ if self.is(Flaw::ExistingCreates) => Ok(Verdict::Apply),
                now if now != grave => refuse(ErrorKind::Gone),
                _ if mine => Ok(Verdict::Apply),
                _ => refuse(late),
            },
            (Base::Spent(kind), _) => refuse(kind),
        }
    }

    /// Puts the record in.
    fn apply(&self, cell: &mut Cell, by: WriteId, record: &Record, wid: WriteId, now: Instant) {
        let life = match self.flaw {
            Flaw::LivesForEver => AGES,
            Flaw::DiesEarly => record.ttl.as_duration() / 2,
            _ => record.ttl.as_duration(),
        };
        let mut data = record.data.clone();
        match self.flaw {
            Flaw::BytesEndAtNul => data.truncate(data.iter().position(|byte| *byte == 0).unwrap_or(data.len())),
            Flaw::BytesAreCut => data.truncate(60 * 1024),
            Flaw::BytesBecomeText => data = String::from_utf8_lossy(&data).into_owned().into_bytes(),
            _ => {}
        }
        let before = cell.live(now);
        let first_deadline = before.map_or(now + life, |before| before.first_deadline);
        let version = if self.is(Flaw::VersionIsACounter) {
            let count = before.map_or(0, |before| u128::from_le_bytes(before.version.to_bytes()));
            WriteId::from_bytes((count + 1).to_le_bytes())
        } else {
            wid
        };
        let deadline = if self.is(Flaw::WriteKeepsDeadline) { first_deadline } else { now + life };
        let before = before.map(|before| before.data.clone());
        cell.record = Some(Stored { data, ttl: record.ttl, deadline, first_deadline, wid, version, by, before });
        cell.grave = None;
    }
}

impl Opening {
    fn token(&self) -> Option<LeaseToken> {
        self.held.as_ref().map(|held| held.lease.token())
    }

    fn hold(&mut self, token: LeaseToken, clean: bool, length: Duration) {
        let lease = Arc::new(Lease::new(self.id.clone(), token, length).after_clean_release(clean));
        self.held = Some(Held { lease, lock: Arc::new(StoreLock { store: self.store.clone(), instance: self.instance }) });
    }

    /// Gives the lock back, if it is this opening's.
    fn let_go(&mut self) {
        if let Some(held) = self.held.take() {
            self.store.release(&self.key, Some(held.lease.token()), false);
        }
    }

    /// Asks the store, and bases the next write on the answer.
    fn fetch(&mut self, at_open: bool) {
        let now = Instant::now();
        let store = self.store.clone();
        let (record, base) = store.with(&self.key, |cell, _| {
            if store.is(Flaw::ReadProlongs)
                && let Some(record) = cell.record.as_mut().filter(|record| record.deadline > now)
            {
                record.deadline = now + record.ttl.as_duration();
            }
            let live = if store.is(Flaw::ExpiredIsServed) { cell.record.as_ref() } else { cell.live(now) };
            let live = live.filter(|record| !(store.is(Flaw::EmptyIsAbsent) && record.data.is_empty()));
            match live {
                Some(stored) => {
                    let left = stored.deadline.saturating_duration_since(now);
                    let ttl = if store.is(Flaw::ReadReportsWholeLife) { stored.ttl } else { Ttl::new(left) };
                    let back = store.is(Flaw::ReaderGoesBack)
                        && matches!(self.access, Access::ReadOnly)
                        && store.instances.fetch_add(1, Ordering::Relaxed) % 4 == 3;
                    let data = stored.before.as_ref().filter(|_| back).unwrap_or(&stored.data);
                    (Some(Record::new(data.clone(), ttl)), Base::Record(stored.version))
                }
                None => (None, Base::Absent(cell.grave.map(|(name, _)| name))),
            }
        });
        let fresh = self.expect == Expect::Fresh && !self.wrote;
        if !matches!(self.base, Base::Spent(_)) && !fresh {
            self.base = base;
        }
        if at_open && self.first.is_none() {
            self.first = Some(record.clone());
        }
        self.fetched = Some(record);
    }

    fn may_write(&self) -> bool {
        match self.access {
            Access::ReadOnly => self.store.is(Flaw::ReadOnlyWrites),
            Access::Destroy => self.store.is(Flaw::DestroyAccessWrites),
            _ => true,
        }
    }

    /// Does what a write or a touch asks, in one step where the flaw allows.
    async fn put(&mut self, record: &Record, wid: WriteId, touch: bool) -> Result<Written> {
        let store = self.store.clone();
        if !self.may_write() {
            return Err(fail(ErrorKind::Unsupported, "write"));
        }
        if self.closed && !matches!(self.base, Base::Spent(_)) {
            self.base = Base::Spent(ErrorKind::Gone);
        }
        if store.is(Flaw::TooLargeDestroys) && record.data.len() > 512 * 1024 {
            store.with(&self.key, |cell, _| cell.record = None);
            return Err(fail(ErrorKind::TooLarge, "write"));
        }
        let first_of_fresh = self.expect == Expect::Fresh && !self.wrote;
        let exclusive = matches!(self.access, Access::Exclusive { .. });
        let in_two_steps = store.is(Flaw::ChecksThenStores) || (first_of_fresh && store.is(Flaw::FreshChecksThenCreates));
        if in_two_steps || store.is(Flaw::TearsWrites) {
            let verdict = store.with(&self.key, |cell, latch| store.judge(cell, latch, self, wid, touch, Instant::now()));
            if store.is(Flaw::TearsWrites) && verdict.is_ok() && !touch {
                store.with(&self.key, |cell, _| {
                    if let Some(stored) = cell.record.as_mut() {
                        let half = record.data.len().min(stored.data.len()) / 2;
                        stored.data[..half].copy_from_slice(&record.data[..half]);
                    }
                });
            }
            tokio::time::sleep(GAP).await;
            if !in_two_steps || verdict.is_err() {
                return self.finish(record, wid, touch, first_of_fresh && exclusive, None);
            }
            return self.finish(record, wid, touch, first_of_fresh && exclusive, verdict.ok());
        }
        self.finish(record, wid, touch, first_of_fresh && exclusive, None)
    }

    fn finish(
        &mut self,
        record: &Record,
        wid: WriteId,
        touch: bool,
        takes_lock: bool,
        judged: Option<Verdict>,
    ) -> Result<Written> {
        let store = self.store.clone();
        let now = Instant::now();
        let token = LeaseToken::random()?;
        let outcome: Result<_> = store.with(&self.key, |cell, latch| {
            let verdict = match judged {
                Some(verdict) => verdict,
                None => store.judge(cell, latch, self, wid, touch, now)?,
            };
            if matches!(verdict, Verdict::Already) {
                return Ok((Written::AlreadyApplied, None));
            }
            if touch && !store.is(Flaw::TouchIsAWrite) {
                if store.is(Flaw::TouchPutsBackOldBytes)
                    && let (Some(stored), Some(Some(first))) = (cell.record.as_mut(), &self.first)
                {
                    stored.data.clone_from(&first.data);
                }
                match cell.record.as_mut() {
                    Some(stored) if !store.is(Flaw::TouchDoesNothing) => {
                        stored.ttl = record.ttl;
                        stored.deadline = now + record.ttl.as_duration();
                    }
                    Some(_) => {}
                    None => store.apply(cell, self.name, record, wid, now),
                }
            } else if touch {
                let data = cell.record.as_ref().map(|stored| stored.data.clone()).unwrap_or_default();
                store.apply(cell, self.name, &Record::new(data, record.ttl), wid, now);
            } else {
                store.apply(cell, self.name, record, wid, now);
            }
            let mut taken = None;
            if let (true, Access::Exclusive { lease, .. }) = (takes_lock && !store.is(Flaw::FreshTakesNoLock), self.access)
                && !latch.is_of(self.token())
            {
                latch.hold = Some(Hold {
                    token,
                    instance: self.instance,
                    until: now + lease,
                    length: lease,
                    since: SystemTime::now(),
                });
                taken = Some(lease);
            }
            let version = cell.record.as_ref().map(|stored| stored.version);
            Ok((Written::Applied, Some((taken, version))))
        });
        self.sent.insert(wid);
        match outcome {
            Ok((written, news)) => {
                if let Some((taken, version)) = news {
                    if let Some(lease) = taken {
                        self.hold(token, true, lease);
                    }
                    if let Some(version) = version.filter(|_| !store.is(Flaw::OwnWriteIsForgotten) || takes_lock) {
                        self.base = Base::Record(version);
                    }
                }
                self.wrote = true;
                self.fetched = None;
                Ok(written)
            }
            Err(_) if store.is(Flaw::RefusalIsSwallowed) => Ok(Written::Applied),
            Err(error) => {
                self.base = Base::Spent(error.kind());
                if !store.is(Flaw::RefusalKeepsLock) {
                    self.let_go();
                }
                Err(error)
            }
        }
    }
}

#[async_trait]
impl OpenSession for Opening {
    async fn read(&mut self) -> Result<Option<Record>> {
        if matches!(self.access, Access::Destroy) && !self.store.is(Flaw::DestroyAccessReads) {
            return Err(fail(ErrorKind::Unsupported, "read"));
        }
        if let (true, Some(first)) = (self.store.is(Flaw::ReadIsCached), &self.first) {
            return Ok(first.clone());
        }
        if self.fetched.is_none() {
            self.fetch(false);
        }
        let read = self.fetched.take().unwrap_or_default();
        self.first.get_or_insert_with(|| read.clone());
        Ok(read)
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        self.put(record, id, false).await
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        let store = self.store.clone();
        if matches!(self.access, Access::ReadOnly) && !store.is(Flaw::ReadOnlyDestroys) {
            return Err(fail(ErrorKind::Unsupported, "destroy"));
        }
        if store.is(Flaw::DestroyWaits) {
            store.wait_until_free(&self.key, self.token()).await;
        }
        let now = Instant::now();
        let name = WriteId::random()?;
        let token = self.token();
        let removed = store.with(&self.key, |cell, latch| {
            if store.is(Flaw::DestroyIsFenced) && latch.held(now).is_some() && !latch.is_of(token) {
                return Err(fail(ErrorKind::Fenced, "destroy"));
            }
            let live = cell.live(now).is_some();
            if !live && store.is(Flaw::DestroyOfAbsentFails) {
                return Err(fail(ErrorKind::Gone, "destroy"));
            }
            if !store.is(Flaw::DestroyLeavesNoTrace) {
                cell.grave = Some((name, now + Duration::from_secs(60)));
            }
            let shown = live || store.is(Flaw::DestroyReturnsTheExpired);
            let removed = cell.record.take().filter(|_| shown && !store.is(Flaw::DestroyReturnsNothing));
            let left = |stored: &Stored| Ttl::new(stored.deadline.saturating_duration_since(now));
            Ok(removed.map(|stored| Record::new(stored.data.clone(), left(&stored))))
        })?;
        self.destroyed = true;
        self.fetched = None;
        self.base = Base::Spent(ErrorKind::Gone);
        Ok(removed)
    }

    async fn close(&mut self) -> Result<()> {
        let store = self.store.clone();
        let lost = store.with(&self.key, |_, latch| self.held.is_some() && !latch.is_of(self.token()));
        let held = self.held.take();
        let token = held.as_ref().map(|held| held.lease.token());
        if std::mem::replace(&mut self.closed, true) {
            return if store.is(Flaw::SecondCloseFails) { Err(fail(ErrorKind::Gone, "close")) } else { Ok(()) };
        }
        let exclusive = matches!(self.access, Access::Exclusive { .. });
        if store.is(Flaw::CloseCreates) && exclusive && !store.is_live(&self.key) && !self.destroyed {
            let empty = Record::new([], Ttl::from_secs(900));
            store.with(&self.key, |cell, _| store.apply(cell, self.name, &empty, self.name, Instant::now()));
        }
        if store.is(Flaw::CloseClears) && exclusive && !self.wrote && token.is_some() {
            store.with(&self.key, |cell, _| {
                if let Some(stored) = cell.record.as_mut() {
                    stored.data.clear();
                }
            });
        }
        if lost && store.is(Flaw::CloseAfterLossFails) {
            return Err(fail(ErrorKind::Fenced, "close"));
        }
        if self.destroyed && store.is(Flaw::DestroyKeepsLock) {
            return Ok(());
        }
        store.release(&self.key, token, exclusive && store.is(Flaw::CloseFreesAnyLock));
        Ok(())
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        let away = match self.store.flaw {
            Flaw::TouchTakesTwoSteps => self.store.with(&self.key, |cell, _| cell.record.take()),
            _ => None,
        };
        if let Some(stored) = away {
            tokio::time::sleep(GAP).await;
            self.store.with(&self.key, |cell, _| cell.record.get_or_insert(stored).deadline);
        }
        self.put(&Record::new([], ttl), WriteId::random()?, true).await
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        let store = self.store.clone();
        let first = matches!(store.flaw, Flaw::SaveReleasesFirst)
            || (matches!(store.flaw, Flaw::DestroyReleasesFirst) && matches!(change, Change::Destroy));
        if first {
            self.let_go();
            tokio::time::sleep(GAP).await;
        }
        let outcome = match (change, store.flaw) {
            (Change::Write(record), Flaw::SaveWritesOldBytes) => {
                let old = self.first.clone().flatten().map_or_else(|| record.data.clone(), |first| first.data);
                self.write(&Record::new(old, record.ttl), id).await
            }
            (Change::Touch(_), Flaw::SaveForgetsTouch) | (Change::Destroy, Flaw::SaveForgetsDestroy) => Ok(Written::Applied),
            (Change::Write(record), _) => self.write(record, id).await,
            (Change::Touch(ttl), _) => self.touch(*ttl).await,
            (Change::Destroy, _) => self.destroy().await.map(|_| Written::Applied),
            (Change::Nothing, _) => Ok(Written::Applied),
        };
        match outcome {
            Err(error) if error.kind().keeps_opening() => Err(error),
            outcome => {
                if !store.is(Flaw::SaveKeepsLock) {
                    let closed = self.close().await;
                    if matches!(change, Change::Nothing) {
                        closed?;
                    }
                }
                outcome
            }
        }
    }

    fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        let Some(held) = self.held.take() else { return };
        held.lock.abandon(held.lease);
    }
}

/// The lock of a store, alone.
pub(crate) struct StoreLock {
    store: Arc<Store>,
    instance: u64,
}

impl fmt::Debug for StoreLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreLock").finish_non_exhaustive()
    }
}

#[async_trait]
impl SessionLock for StoreLock {
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>> {
        let key = self.store.key(id);
        let taken = self.store.acquire(&key, self.instance, *request, false).await?;
        let (token, clean) = taken.expect("only an opening gives up because the session is absent");
        let told = if self.store.is(Flaw::LeaseTellsAnotherLength) { AGES } else { request.lease };
        Ok(Arc::new(Lease::new(id.clone(), token, told).after_clean_release(clean)))
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        let store = &self.store;
        let now = Instant::now();
        let mut outcomes: Vec<Result<()>> = leases
            .iter()
            .map(|lease| {
                let length = if store.is(Flaw::RenewalIgnoresLength) { Duration::from_millis(20) } else { lease.length() };
                store.with(&store.key(lease.id()), |cell, latch| {
                    if store.is(Flaw::RenewalDoesNothing) {
                        return Ok(());
                    }
                    if !latch.is_of(Some(lease.token())) {
                        if store.is(Flaw::RenewalOfLostSucceeds) {
                            return Ok(());
                        }
                        if !store.is(Flaw::RenewalTakesBack) {
                            lease.mark_lost();
                            return Err(fail(ErrorKind::Fenced, "renew"));
                        }
                    }
                    if cell.record.as_ref().is_some_and(|record| record.deadline <= now) {
                        if store.is(Flaw::RenewalRevives) {
                            if let Some(record) = cell.record.as_mut() {
                                record.deadline = now + length * 2;
                            }
                        } else {
                            return Err(fail(ErrorKind::Gone, "renew"));
                        }
                    }
                    if let Some(hold) = latch.hold.as_mut() {
                        hold.token = lease.token();
                        hold.until = now + length;
                    }
                    if !store.is(Flaw::RenewalDoesNotProlong) {
                        Store::prolong(cell, length, now);
                    }
                    Ok(())
                })
            })
            .collect();
        match store.flaw {
            Flaw::RenewalAnswersReversed => outcomes.reverse(),
            Flaw::RenewalAnswersOne => outcomes.truncate(1),
            _ => {}
        }
        outcomes
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let any = self.store.is(Flaw::ReleaseFreesAnyLock);
        self.store.release(&self.store.key(lease.id()), Some(lease.token()), any);
        Ok(())
    }

    fn abandon(&self, lease: Arc<Lease>) {
        let key = self.store.key(lease.id());
        match self.store.flaw {
            Flaw::DroppedOpeningKeepsLock => self.store.with(&key, |_, latch| {
                if let Some(hold) = latch.hold.as_mut().filter(|hold| hold.token == lease.token()) {
                    hold.until = Instant::now() + AGES;
                }
            }),
            flaw => self.store.release(&key, Some(lease.token()), flaw == Flaw::DropFreesAnyLock),
        }
    }
}
