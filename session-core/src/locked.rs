//! Exclusive openings for a handler that has none: any optimistic handler, any lock.
//!
//! The lock makes the waiting orderly. What makes a loss impossible stays where it was: the handler's own test of each write.
//! This file adds what the two do not have between them, because lock and data cannot be tested in one step: a holder who is
//! paused past the end of its lease, or who left a write under way, must not spoil the turn of the next.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{Mutex, MutexGuard};

use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Access, Expect, OpenRequest, OpenSession, SessionAdmin, SessionHandler};
use crate::id::SessionId;
use crate::lock::{Held, Lease, LeaseRequest, SessionLock};
use crate::record::{Change, Record, WriteId, Written};
use crate::ttl::Ttl;

/// How long the lock of an optimistic write lasts if its writer dies on the way.
const WRITE_LEASE: Duration = Duration::from_secs(10);

/// How often a record is rewritten at an open before somebody who ignores the lock is blamed.
const REWRITES: u32 = 8;

/// Adds [`Access::Exclusive`] to a handler that does [`Access::Optimistic`], with a lock of any kind.
///
/// The lock must not be that of the very store that the handler writes to, if that store tests its own lock on each write: it
/// would take this layer's writes for those of a stranger. Every process that writes must use the same lock; one that does
/// not is still unable to make anybody lose an update, but holders are then refused although they did nothing wrong.
///
/// # What it adds
///
/// An absent id that was expected to exist is answered without a lock. After the lock the record is read again. If the lease
/// does not [follow a clean release](Lease::follows_clean_release), the record is first rewritten unchanged under a new write
/// id: from then on nothing that the holder before may still have under way can be applied. The same is done to a record
/// with less than two leases of life left, and by renewal during the hold.
///
/// A write that the handler refuses with [`Conflict`](ErrorKind::Conflict) is [`Fenced`](ErrorKind::Fenced) to a holder. Where
/// nothing was found at the open it stays `Conflict`: of two who create, the first wins.
///
/// An optimistic write takes the lock for as long as the write takes, without waiting: if somebody holds it, the answer is
/// `Conflict`. The first write of a [fresh](Expect::Fresh) id takes none, unless it goes on.
///
/// The handler below sees an optimistic write also when an id that was destroyed a short time ago is to be created again under
/// the lock. It should let that pass over the very trace that it found; one that refuses, with `Conflict`, is right too, but
/// the id then has to wait until the trace is gone.
pub struct Locked<H, L> {
    inner: H,
    lock: Arc<Renewing<L>>,
}

impl<H: SessionHandler, L: SessionLock> Locked<H, L> {
    /// Puts `lock` before `inner`.
    pub fn new(inner: H, lock: L) -> Self {
        Self { inner, lock: Arc::new(Renewing { lock }) }
    }

    async fn open_exclusive(&self, id: &SessionId, expect: Expect, wait: Duration, length: Duration) -> Result<Opening<L>> {
        let request = OpenRequest::optimistic().expecting(expect);
        let began = Instant::now();
        let mut early = None;
        if expect == Expect::Existing {
            let mut opening = self.inner.open(id, &request).await?;
            if opening.read().await?.is_none() {
                return Ok(self.opening(id, opening, Mode::Exclusive(length), Basis::Barred));
            }
            early = Some(opening);
        }
        let wait = wait.saturating_sub(began.elapsed());
        let lease = self.lock.lock.acquire(id, &LeaseRequest { wait, lease: length }).await?;
        let mut turn = Turn { lock: &self.lock, lease: Some(lease.clone()), sent: false };
        let (opening, record) = match self.take_over(id, &request, early, &lease, &mut turn).await {
            Ok(found) => found,
            Err(error) => {
                turn.end().await;
                return Err(error);
            }
        };
        if record.is_none() && expect == Expect::Existing {
            // Whoever read this session before has nothing left to write over.
            turn.release().await;
            return Ok(self.opening(id, opening, Mode::Exclusive(length), Basis::Barred));
        }
        let basis = if record.is_some() { Basis::Found } else { Basis::Absent };
        let mut opening = self.opening(id, opening, Mode::Exclusive(length), basis);
        opening.hold(lease);
        turn.lease = None;
        let hold = opening.hold.clone();
        hold.lock().await.know(record.as_ref());
        opening.fetched = Some(record);
        Ok(opening)
    }

    /// Reads under the lock, and makes whatever the holder before may have under way too late.
    async fn take_over(
        &self,
        id: &SessionId,
        request: &OpenRequest,
        early: Option<Box<dyn OpenSession>>,
        lease: &Lease,
        turn: &mut Turn<'_, L>,
    ) -> Result<(Box<dyn OpenSession>, Option<Record>)> {
        let enough = Ttl::new(lease.length().saturating_mul(2));
        // Its second read asks the store again, and so follows the lock.
        let mut next = early;
        for _ in 0..REWRITES {
            let mut opening = match next.take() {
                Some(opening) => opening,
                None => self.inner.open(id, request).await?,
            };
            let Some(mut record) = opening.read().await? else { return Ok((opening, None)) };
            if lease.follows_clean_release() && record.ttl >= enough {
                return Ok((opening, Some(record)));
            }
            record.ttl = record.ttl.max(enough);
            let write = WriteId::random()?;
            turn.sent = true;
            let mut outcome = opening.write(&record, write).await;
            if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unknown) {
                outcome = opening.write(&record, write).await;
            }
            match outcome {
                Ok(_) => return Ok((opening, Some(record))),
                // The write of the holder before arrived first, or a logout did: look again.
                Err(error) if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Fenced | ErrorKind::Gone) => {}
                Err(error) if error.kind() == ErrorKind::Unknown => return Err(error.with_kind(ErrorKind::Unavailable)),
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(ErrorKind::Unavailable, "open", "somebody keeps writing to the session without its lock"))
    }

    fn opening(&self, id: &SessionId, inner: Box<dyn OpenSession>, mode: Mode, basis: Basis) -> Opening<L> {
        let hold = Hold { opening: inner, data: None, deadline: None, unsettled: false, rewrite: None };
        Opening {
            id: id.clone(),
            lock: self.lock.clone(),
            hold: Arc::new(Mutex::new(hold)),
            lease: None,
            held: None,
            mode,
            basis,
            fetched: (basis == Basis::Barred).then_some(None),
        }
    }
}

impl<H: fmt::Debug, L: fmt::Debug> fmt::Debug for Locked<H, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Locked").field("inner", &self.inner).field("lock", &self.lock.lock).finish()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<H: SessionHandler, L: SessionLock> SessionHandler for Locked<H, L> {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        match request.access {
            Access::ReadOnly | Access::Destroy => self.inner.open(id, request).await,
            Access::Optimistic => {
                let opening = self.inner.open(id, request).await?;
                let basis = if request.expect == Expect::Fresh { Basis::Unseen } else { Basis::Found };
                Ok(Box::new(self.opening(id, opening, Mode::Optimistic, basis)))
            }
            Access::Exclusive { lease, .. } if request.expect == Expect::Fresh => {
                let opening = self.inner.open(id, &OpenRequest::optimistic().expecting(Expect::Fresh)).await?;
                Ok(Box::new(self.opening(id, opening, Mode::Exclusive(lease), Basis::Unseen)))
            }
            Access::Exclusive { wait, lease } => Ok(Box::new(self.open_exclusive(id, request.expect, wait, lease).await?)),
        }
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.inner.gc(limit).await
    }

    /// Passes on what the handler below offers; it knows nothing of the locks of this layer.
    fn admin(&self) -> Option<&dyn SessionAdmin> {
        self.inner.admin()
    }
}

/// A lease between its grant and the opening that it is for.
struct Turn<'a, L: SessionLock> {
    lock: &'a Renewing<L>,
    lease: Option<Arc<Lease>>,
    /// Whether a write was sent under it.
    sent: bool,
}

impl<L: SessionLock> Turn<'_, L> {
    /// Gives the lease back after an open that came to nothing.
    async fn end(self) {
        // What made a lease unclean has not been dealt with, so the next holder must still be told.
        if self.lease.as_ref().is_some_and(|lease| lease.follows_clean_release() && !self.sent) {
            self.release().await;
        }
    }

    async fn release(mut self) {
        if let Some(lease) = self.lease.take() {
            // A lease that cannot be given back runs out.
            let _ = self.lock.lock.release(&lease).await;
        }
    }
}

impl<L: SessionLock> Drop for Turn<'_, L> {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            self.lock.lock.abandon(lease);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    /// With the length of the lease.
    Exclusive(Duration),
    Optimistic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Basis {
    /// A fresh id, not written yet.
    Unseen,
    /// Under the lock there was nothing.
    Absent,
    /// There was a record; or, without the lock, only the handler below knows.
    Found,
    /// Answered as absent without a lock.
    Barred,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Keep,
    Close,
}

struct Opening<L: SessionLock> {
    id: SessionId,
    lock: Arc<Renewing<L>>,
    hold: Arc<Mutex<Hold>>,
    lease: Option<Arc<Lease>>,
    held: Option<Held>,
    mode: Mode,
    basis: Basis,
    fetched: Option<Option<Record>>,
}

/// What a save and a renewal of one opening may only have one after the other.
struct Hold {
    opening: Box<dyn OpenSession>,
    /// The payload in force, as far as this opening knows, to be rewritten as it is.
    data: Option<Vec<u8>>,
    deadline: Option<Instant>,
    /// Whether a write was sent and not answered, to us or because our future was dropped.
    unsettled: bool,
    /// A rewrite in the same state. The next write is based on it, so it has to be settled first.
    rewrite: Option<(Record, WriteId)>,
}

impl Hold {
    fn know(&mut self, record: Option<&Record>) {
        self.data = record.map(|record| record.data.clone());
        self.deadline = record.map(|record| Instant::now() + record.ttl.as_duration());
    }

    /// Whether nothing of ours can still arrive at the store.
    fn is_settled(&self) -> bool {
        !self.unsettled && self.rewrite.is_none()
    }

    async fn send(&mut self, change: &Change, id: WriteId, then: Then) -> Result<Written> {
        self.settle_rewrite().await?;
        let before = std::mem::replace(&mut self.unsettled, true);
        let outcome = match (then, change) {
            (Then::Keep, Change::Write(record)) => self.opening.write(record, id).await,
            (Then::Keep, Change::Touch(ttl)) => self.opening.touch(*ttl).await,
            (_, change) => self.opening.save(change, id).await,
        };
        self.unsettled = match &outcome {
            // Whatever was sent before is based on what this write has replaced.
            Ok(_) => false,
            Err(error) => error.kind() == ErrorKind::Unknown || before,
        };
        if let (Ok(_), Change::Write(record)) = (&outcome, change) {
            self.know(Some(record));
        }
        outcome.map_err(|error| match error.kind() {
            ErrorKind::Conflict | ErrorKind::Fenced if before => error.with_kind(ErrorKind::Unknown),
            _ => error,
        })
    }

    /// Gives the record `ttl` to live from now on, without looking at what is in the store: a handler's own `touch` may read,
    /// and base what is written next on a state that the holder has never seen.
    async fn rewrite(&mut self, ttl: Ttl) -> Result<()> {
        if self.unsettled {
            return Err(Error::new(ErrorKind::Unknown, "touch", "an earlier write is not settled"));
        }
        self.settle_rewrite().await?;
        let Some(data) = self.data.clone() else {
            return Err(Error::new(ErrorKind::Gone, "touch", "the session is no longer there"));
        };
        self.rewrite = Some((Record { data, ttl }, WriteId::random()?));
        self.settle_rewrite().await
    }

    async fn settle_rewrite(&mut self) -> Result<()> {
        let Some((record, id)) = &self.rewrite else { return Ok(()) };
        match self.opening.write(record, *id).await {
            Ok(_) => {
                self.deadline = Some(Instant::now() + record.ttl.as_duration());
                self.rewrite = None;
                Ok(())
            }
            // What waits for it has not been sent.
            Err(error) if error.kind() == ErrorKind::Unknown => Err(error.with_kind(ErrorKind::Unavailable)),
            Err(error) if error.kind() == ErrorKind::Unavailable => Err(error),
            Err(error) => {
                self.rewrite = None;
                Err(error)
            }
        }
    }
}

impl<L: SessionLock> Opening<L> {
    fn hold(&mut self, lease: Arc<Lease>) {
        let parts = Parts { inner: lease.clone(), hold: Arc::downgrade(&self.hold) };
        let outer = Lease::new(self.id.clone(), lease.token(), lease.length())
            .after_clean_release(lease.follows_clean_release())
            .with_state(parts);
        self.held = Some(Held { lease: Arc::new(outer), lock: self.lock.clone() });
        self.lease = Some(lease);
    }

    /// Gives the lease back; as a clean release only if nothing of ours can still arrive.
    async fn let_go(&mut self, clean: bool) {
        self.held = None;
        if let Some(lease) = self.lease.take() {
            if clean {
                // A lease that cannot be given back runs out; what was written is written.
                let _ = self.lock.lock.release(&lease).await;
            } else {
                self.lock.lock.abandon(lease);
            }
        }
    }

    /// Takes the lock without waiting.
    async fn borrow(&self, length: Duration) -> Result<Arc<Lease>> {
        let request = LeaseRequest { wait: Duration::ZERO, lease: length };
        self.lock.lock.acquire(&self.id, &request).await.map_err(|error| match error.kind() {
            ErrorKind::LockTimeout => error.with_kind(ErrorKind::Conflict),
            // Whatever became of the lock, the write was not sent.
            ErrorKind::Unknown => error.with_kind(ErrorKind::Unavailable),
            _ => error,
        })
    }

    async fn change(&mut self, change: &Change, id: WriteId, then: Then) -> Result<Written> {
        if self.basis == Basis::Barred {
            return Err(Error::new(ErrorKind::Gone, "write", "the session is no longer there"));
        }
        // What the open fetched is older than what will be there.
        self.fetched = None;
        let hold = self.hold.clone();
        match self.mode {
            Mode::Exclusive(length) => {
                if self.basis == Basis::Unseen && then == Then::Keep && self.lease.is_none() {
                    // Before the create: the record must never be there without the lock of its creator.
                    let lease = self.borrow(length).await?;
                    self.hold(lease);
                }
                let mut hold = hold.lock().await;
                let outcome = match change {
                    Change::Touch(ttl) => {
                        let outcome = hold.rewrite(*ttl).await.map(|()| Written::Applied);
                        if then == Then::Close && !outcome.as_ref().is_err_and(|error| error.kind().keeps_opening()) {
                            // The touch is decided, and the handler below holds nothing that could be given back.
                            let _ = hold.opening.close().await;
                        }
                        outcome
                    }
                    _ => hold.send(change, id, then).await,
                };
                self.settle(outcome, then, hold).await
            }
            Mode::Optimistic if self.basis == Basis::Unseen => {
                let mut hold = hold.lock().await;
                let outcome = hold.send(change, id, then).await;
                self.settle(outcome, then, hold).await
            }
            Mode::Optimistic => {
                // One may be left from a write whose future was dropped.
                let lease = match self.lease.take() {
                    Some(lease) => lease,
                    None => self.borrow(WRITE_LEASE).await?,
                };
                let unclean = !lease.follows_clean_release();
                self.lease = Some(lease);
                let mut hold = hold.lock().await;
                let outcome = hold.send(change, id, then).await;
                // Only an applied write makes that too late which the holder before may have under way.
                let clean = hold.is_settled() && (outcome.is_ok() || !unclean);
                drop(hold);
                self.let_go(clean).await;
                outcome
            }
        }
    }

    /// Draws the consequences of an outcome for the lock and for what comes next.
    async fn settle(&mut self, outcome: Result<Written>, then: Then, hold: MutexGuard<'_, Hold>) -> Result<Written> {
        let clean = hold.is_settled();
        drop(hold);
        let outcome = outcome.map_err(|error| match (error.kind(), self.mode, self.basis) {
            (ErrorKind::Conflict, Mode::Exclusive(_), Basis::Found) => error.with_kind(ErrorKind::Fenced),
            _ => error,
        });
        match &outcome {
            Ok(_) => self.basis = Basis::Found,
            Err(error) if error.kind().keeps_opening() => return outcome,
            Err(_) => {}
        }
        if then == Then::Close || outcome.is_err() {
            self.let_go(clean).await;
        }
        outcome
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<L: SessionLock> OpenSession for Opening<L> {
    async fn read(&mut self) -> Result<Option<Record>> {
        if let Some(fetched) = self.fetched.take() {
            return Ok(fetched);
        }
        let hold = self.hold.clone();
        let mut hold = hold.lock().await;
        let record = hold.opening.read().await?;
        if self.lease.is_some() {
            hold.know(record.as_ref());
            self.basis = if record.is_some() { Basis::Found } else { Basis::Absent };
        }
        Ok(record)
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        self.change(&Change::Write(record.clone()), id, Then::Keep).await
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        self.fetched = None;
        let mut hold = self.hold.lock().await;
        let removed = hold.opening.destroy().await?;
        hold.know(None);
        self.fetched = None;
        Ok(removed)
    }

    async fn close(&mut self) -> Result<()> {
        let hold = self.hold.clone();
        let mut hold = hold.lock().await;
        let outcome = hold.opening.close().await;
        let clean = hold.is_settled();
        drop(hold);
        self.let_go(clean).await;
        outcome
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        self.change(&Change::Touch(ttl), WriteId::random()?, Then::Keep).await
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        match change {
            Change::Write(_) | Change::Touch(_) => self.change(change, id, Then::Close).await,
            Change::Destroy | Change::Nothing => {
                let hold = self.hold.clone();
                let mut hold = hold.lock().await;
                let outcome = hold.opening.save(change, id).await;
                let clean = hold.is_settled();
                drop(hold);
                if !outcome.as_ref().is_err_and(|error| error.kind().keeps_opening()) {
                    self.let_go(clean).await;
                }
                outcome
            }
        }
    }

    fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }
}

impl<L: SessionLock> Drop for Opening<L> {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            self.lock.lock.abandon(lease);
        }
    }
}

impl<L: SessionLock> fmt::Debug for Opening<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening").field("mode", &self.mode).field("basis", &self.basis).finish_non_exhaustive()
    }
}

/// The lock as this layer hands it out for renewal: a renewal also keeps the held record alive.
#[derive(Debug)]
struct Renewing<L> {
    lock: L,
}

/// What a lease of this layer stands for.
#[derive(Clone)]
struct Parts {
    inner: Arc<Lease>,
    hold: Weak<Mutex<Hold>>,
}

impl Parts {
    async fn of(lease: &Lease) -> Option<Self> {
        lease.state().lock().await.downcast_ref::<Self>().cloned()
    }

    /// Moves the deadline of the held record ahead when less than two leases are left.
    async fn keep_alive(&self) -> Result<()> {
        let Some(hold) = self.hold.upgrade() else { return Ok(()) };
        // A save under way sets a deadline of its own; the next tick looks again.
        let Ok(mut hold) = hold.try_lock() else { return Ok(()) };
        let enough = self.inner.length().saturating_mul(2);
        let near = hold.deadline.is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()) < enough);
        if !near || hold.unsettled {
            return Ok(());
        }
        hold.rewrite(Ttl::new(enough)).await.map_err(|error| match error.kind() {
            ErrorKind::Conflict => error.with_kind(ErrorKind::Fenced),
            _ => error,
        })
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<L: SessionLock> SessionLock for Renewing<L> {
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>> {
        self.lock.acquire(id, request).await
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        let mut parts = Vec::with_capacity(leases.len());
        for lease in leases {
            parts.push(Parts::of(lease).await);
        }
        let inner =
            |(lease, parts): (&Arc<Lease>, &Option<Parts>)| parts.as_ref().map_or(lease, |parts| &parts.inner).clone();
        let inner: Vec<_> = leases.iter().zip(&parts).map(inner).collect();
        let mut outcomes = self.lock.renew(&inner).await;
        for ((lease, parts), outcome) in leases.iter().zip(&parts).zip(&mut outcomes) {
            if let (Ok(()), Some(parts)) = (&*outcome, parts) {
                *outcome = parts.keep_alive().await;
            }
            if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Fenced) {
                lease.mark_lost();
            }
        }
        outcomes
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        match Parts::of(lease).await {
            Some(parts) => self.lock.release(&parts.inner).await,
            None => self.lock.release(lease).await,
        }
    }

    fn abandon(&self, lease: Arc<Lease>) {
        // Held only for the length of a copy.
        let parts = lease.state().try_lock().ok().and_then(|state| state.downcast_ref::<Parts>().cloned());
        self.lock.abandon(parts.map_or(lease, |parts| parts.inner));
    }
}

#[cfg(test)]
mod tests;
