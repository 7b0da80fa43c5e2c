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
use crate::handler::{Cursor, LockInfo, OpenRequest, OpenSession, Page, SessionAdmin, SessionHandler};
use crate::id::SessionId;
use crate::leased::{
    Asked, Failed, Found, Granted, Leased, LeasedLock, LeasedStore, Removal, Renewal, Renewed, Step, Then, Verdict, Want,
};
use crate::lock::{Lease, LeaseRequest, LeaseToken, SessionLock};
use crate::record::Record;

use store::{Store, Wanted};

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
    sessions: Leased<Store>,
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
        MemoryLock { lock: self.sessions.lock() }
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
        MemoryHandler { sessions: Leased::new(Arc::new(Store::new(self))) }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionHandler for MemoryHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        self.sessions.open(id, request).await
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        Ok(self.sessions.store().gc(limit.get()))
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
        Ok(self.sessions.store().list(after.as_ref(), limit.get() as usize))
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        Ok(self.sessions.store().locks(limit.get() as usize))
    }

    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        Ok(self.sessions.store().decide(id, |entry, now, options| {
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
    lock: LeasedLock<Store>,
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
        self.lock.acquire(id, request).await
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        self.lock.renew(leases).await
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        self.lock.release(lease).await
    }

    /// Frees the lock at once. It does not count as a clean release: a write of the former holder may still be under way to
    /// whatever store this lock stands before.
    fn abandon(&self, lease: Arc<Lease>) {
        self.lock.abandon(lease);
    }
}

impl LeasedStore for Store {
    type Place = SessionId;
    type Claim = LeaseToken;

    fn place(&self, id: &SessionId) -> SessionId {
        id.clone()
    }

    fn claim(&self, _lease: Duration) -> Result<LeaseToken> {
        LeaseToken::random()
    }

    fn token(claim: &LeaseToken) -> LeaseToken {
        *claim
    }

    fn max_bytes(&self) -> usize {
        self.options.max_bytes
    }

    async fn acquire(
        self: &Arc<Self>,
        operation: &'static str,
        id: &Arc<SessionId>,
        want: Want,
        wait: Duration,
        lease: Duration,
    ) -> Result<Granted<LeaseToken>> {
        let wanted = Wanted { token: LeaseToken::random()?, lease, existing: want == Want::Existing };
        self.take(operation, id, wanted, wait).await
    }

    async fn look(&self, _operation: &'static str, id: &SessionId) -> Result<Found, Failed> {
        Ok(self.found(id))
    }

    async fn change(&self, id: &SessionId, step: &Step<'_, LeaseToken>) -> Asked<Verdict> {
        let verdict = self.decide(id, |entry, now, options| {
            let verdict = entry.judge(step, now, options);
            if verdict == Verdict::Applied {
                entry.apply(&step.action, now);
            }
            let in_force = matches!(verdict, Verdict::Applied | Verdict::AlreadyApplied);
            match (step.claim, step.lease) {
                (Some(token), Some(lease)) if in_force && step.takes() && !entry.lock_on(now) => {
                    entry.take(*token, lease, now)
                }
                (Some(token), _) if verdict == Verdict::Gone || in_force && step.then == Then::Close => {
                    entry.release(*token, true, now, options);
                }
                _ => {}
            }
            verdict
        });
        Asked { answer: Ok(verdict), repeated: false }
    }

    async fn remove(&self, id: &SessionId, step: &Removal<'_, LeaseToken>) -> Asked<Option<Record>> {
        let removed = self.decide(id, |entry, now, options| {
            let removed = match entry.found(now) {
                Found::Live { record, .. } => Some(record),
                Found::Absent | Found::Buried { .. } => None,
            };
            entry.destroy(step, now, options);
            if let (Some(token), Then::Close) = (step.claim, step.then) {
                entry.release(*token, true, now, options);
            }
            removed
        });
        Asked { answer: Ok(removed), repeated: false }
    }

    async fn renew(&self, leases: &[Renewal<SessionId>]) -> Vec<Result<Renewed, Failed>> {
        let renew =
            |lease: &Renewal<SessionId>| self.decide(&lease.place, |entry, now, options| entry.renew(lease, now, options));
        leases.iter().map(|lease| Ok(renew(lease))).collect()
    }

    async fn release(&self, _operation: &'static str, id: &SessionId, token: LeaseToken) -> Result<(), Failed> {
        self.decide(id, |entry, now, options| entry.release(token, true, now, options));
        Ok(())
    }

    fn release_later(self: &Arc<Self>, id: &Arc<SessionId>, token: LeaseToken, clean: bool) {
        self.decide(id, |entry, now, options| entry.release(token, clean, now, options));
    }
}

#[cfg(test)]
mod tests;
