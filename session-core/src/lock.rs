//! Locks: one holder at a time works on a session, for as long as a lease lasts.
//!
//! Nothing here knows about records. What makes a lost update impossible is the fence on each write
//! ([`OpenSession::write`](crate::OpenSession::write)); the lock makes waiting orderly.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;

use crate::error::Result;
use crate::id::SessionId;
use crate::record::WriteId;

/// How to acquire.
#[allow(clippy::exhaustive_structs, reason = "both fields decide what the lock must do")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseRequest {
    /// How long to wait at most. Zero tries once.
    pub wait: Duration,
    /// How long the lease lasts unless it is renewed.
    pub lease: Duration,
}

/// Lets one holder at a time work on a session.
///
/// A lock here is a **lease**: it ends by itself, because a process that dies cannot give anything back. A holder that is
/// paused past the end of its lease does not notice; that is what the fence is for. A lock that ends with its holder by other
/// means (a kernel lock, a connection) may never end before.
///
/// # What holds
///
/// **Exclusion.** Between the return of `acquire` and the end of the lease, by the store's clock, no other `acquire` for the same
/// id returns `Ok`, in any process. Different ids never contend.
///
/// **No reentrancy.** Whoever acquires what he already holds waits like anyone else.
///
/// **Absent sessions.** The session need not exist; locking an absent id decides who creates it.
#[async_trait]
pub trait SessionLock: fmt::Debug + Send + Sync + 'static {
    /// Waits up to `request.wait` for the lock.
    ///
    /// # Errors
    /// [`LockTimeout`](crate::ErrorKind::LockTimeout) if the wait ran out while somebody else held it, with the holder where it
    /// can be known. [`Unavailable`](crate::ErrorKind::Unavailable) if the store does not answer.
    ///
    /// # Cancel safety
    /// A dropped future may leave a lease behind that nobody holds; it ends by itself.
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>>;

    /// Moves the end of each lease to now plus its [length](Lease::length), in as few trips as the store allows, and returns one
    /// outcome per lease, in order.
    ///
    /// # Errors
    /// Per lease: [`Fenced`](crate::ErrorKind::Fenced) if somebody else has taken over; [`Gone`](crate::ErrorKind::Gone) if the
    /// session it belongs to has passed its own deadline; [`Unavailable`](crate::ErrorKind::Unavailable) or
    /// [`Unknown`](crate::ErrorKind::Unknown) if the store did not answer, and the next tick tries again. A lease that ended
    /// without a successor may be revived or reported as `Fenced`.
    ///
    /// # Cancel safety
    /// Renewed or not; calling again is safe.
    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>>;

    /// Gives the lock back. Releasing a lease that has ended succeeds and must not touch anyone else's.
    ///
    /// # Errors
    /// [`Unavailable`](crate::ErrorKind::Unavailable) or [`Unknown`](crate::ErrorKind::Unknown); the lease then runs out.
    ///
    /// # Cancel safety
    /// Released or not; calling again is safe.
    async fn release(&self, lease: &Lease) -> Result<()>;

    /// Lets go of a lease from a `Drop`: never blocks, needs no runtime, and at worst does nothing, so that the lease runs out.
    fn abandon(&self, lease: Arc<Lease>) {
        drop(lease);
    }
}

/// The name of one acquisition: 128 random bits, never used twice, not even by the same process.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseToken([u8; 16]);

impl LeaseToken {
    /// Makes a new token.
    ///
    /// # Errors
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if the operating system has no randomness to give.
    pub fn random() -> Result<Self> {
        // It is as little a secret as the name of a write, and comes from the same source.
        WriteId::random().map(|id| Self(id.to_bytes()))
    }

    /// Reads a token back from a store.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes to keep in a store.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Debug for LeaseToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseToken(..)")
    }
}

/// The time-bound right to be the only one who works on a session.
///
/// A lease is a right, not a fact about its holder: only the store knows whether it has ended. [`is_lost`](Self::is_lost) is a
/// hint that renewal leaves, so that a holder can stop early; only the store judges a write.
pub struct Lease {
    id: SessionId,
    token: LeaseToken,
    length: Duration,
    clean: bool,
    lost: AtomicBool,
    state: Mutex<Box<dyn Any + Send>>,
}

impl Lease {
    /// Makes a lease, for a [`SessionLock`] to return.
    #[must_use]
    pub fn new(id: SessionId, token: LeaseToken, length: Duration) -> Self {
        Self { id, token, length, clean: false, lost: AtomicBool::new(false), state: Mutex::new(Box::new(())) }
    }

    /// States that the holder before released; without this the lease counts as following a holder who may still write.
    #[must_use]
    pub fn after_clean_release(mut self, clean: bool) -> Self {
        self.clean = clean;
        self
    }

    /// Keeps what the lock needs to renew and release: a file, a version number.
    #[must_use]
    pub fn with_state(mut self, state: impl Any + Send) -> Self {
        self.state = Mutex::new(Box::new(state));
        self
    }

    /// Returns the id of the session.
    #[must_use]
    pub fn id(&self) -> &SessionId {
        &self.id
    }

    /// Returns the token.
    #[must_use]
    pub fn token(&self) -> LeaseToken {
        self.token
    }

    /// Returns how long the lease lasts from each renewal on.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.length
    }

    /// Whether the holder before is known to have released. If not, he may be alive and paused, and one of his writes may be
    /// under way; [`Locked`](crate::Locked) then rewrites the record before it hands it out.
    #[must_use]
    pub fn follows_clean_release(&self) -> bool {
        self.clean
    }

    /// Whether a renewal has found that somebody else took over.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Marks the lease as lost.
    pub fn mark_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Returns what the lock keeps here. Renewal and save take the same mutex, so a save waits for a renewal in flight.
    #[must_use]
    pub fn state(&self) -> &Mutex<Box<dyn Any + Send>> {
        &self.state
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("length", &self.length).field("lost", &self.is_lost()).finish_non_exhaustive()
    }
}

/// A lease and the lock that granted it: what the renewal of [`Sessions`](crate::Sessions) works with.
#[allow(clippy::exhaustive_structs, reason = "a pair")]
#[derive(Clone, Debug)]
pub struct Held {
    /// The lease.
    pub lease: Arc<Lease>,
    /// The lock that renews it.
    pub lock: Arc<dyn SessionLock>,
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: SessionLock + ?Sized> SessionLock for Arc<T> {
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>> {
        (**self).acquire(id, request).await
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        (**self).renew(leases).await
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        (**self).release(lease).await
    }

    fn abandon(&self, lease: Arc<Lease>) {
        (**self).abandon(lease);
    }
}
