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

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Access, Cursor, Expect, LockInfo, OpenRequest, OpenSession, Page, SessionAdmin, SessionHandler};
use crate::id::SessionId;
use crate::lock::{Held, Lease, LeaseRequest, LeaseToken, SessionLock};
use crate::record::{Change, Record, WriteId, Written};
use crate::ttl::Ttl;

use store::{Basis, Found, Granted, Slot, Store, Want, Writer, after};

mod store;

/// How long the trace of a destroyed record stays at least, and the memory of a holder who never released.
const REMEMBER: Duration = Duration::from_secs(60);

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
        let store = Arc::new(Store::new(self));
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

#[cfg(test)]
mod tests;
