//! From a store with leases to a session handler: what an opening is based on, and what an answer, or none, means for it.
//!
//! A backend whose lock is a token with a deadline, kept where the records are, brings the atomic steps ([`LeasedStore`]) and
//! wraps [`Leased`]. That is how memory, Redis and SQL do it. Nothing here knows commands, statements or clocks.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Access, Expect, OpenRequest, OpenSession};
use crate::id::SessionId;
use crate::lock::{Held, Lease, LeaseRequest, LeaseToken, SessionLock};
use crate::record::{Change, Record, WriteId, Written};
use crate::ttl::Ttl;

/// The atomic steps of a store that keeps records and leases in one place.
///
/// Each step is one request in the ordinary case. A step may repeat its request by itself where that is safe, and then says so
/// ([`Asked::repeated`]): a refusal of a repeat may be of its own first copy (`protocol.md` 4).
pub trait LeasedStore: fmt::Debug + Send + Sync + 'static {
    /// A session as the store names it: its keys, its row. Made once for each opening or lease, all of whose steps are given it.
    type Place: Send + Sync + 'static;

    /// A lock as its holder sets it: the token, and what the store keeps beside it.
    type Claim: Send + Sync + 'static;

    /// Names the session.
    fn place(&self, id: &SessionId) -> Self::Place;

    /// Makes a claim with a new token, for a lease of this length.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if the operating system has no randomness to give.
    fn claim(&self, lease: Duration) -> Result<Self::Claim>;

    /// Returns the token of a claim.
    fn token(claim: &Self::Claim) -> LeaseToken;

    /// Returns how many bytes a payload may have.
    fn max_bytes(&self) -> usize;

    /// Takes the lock, waiting for it if need be, and reads what is there under it. A record with less than two leases left is
    /// prolonged to two. An opener who [expects a record](Want::Existing) is told [`Absent`](Granted::Absent) at once where there is
    /// none, and leaves nothing.
    ///
    /// # Errors
    /// Those of [`SessionHandler::open`](crate::SessionHandler::open). No lock is left behind, or one that ends with its lease.
    ///
    /// # Cancel safety
    /// A dropped future leaves a lock at most that ends with its lease.
    fn acquire(
        self: &Arc<Self>,
        operation: &'static str,
        place: &Arc<Self::Place>,
        want: Want,
        wait: Duration,
        lease: Duration,
    ) -> impl Future<Output = Result<Granted<Self::Claim>>> + Send;

    /// Reads what is there, without a lock.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable), [`Config`](ErrorKind::Config), [`Corrupt`](ErrorKind::Corrupt).
    fn look(&self, operation: &'static str, place: &Self::Place) -> impl Future<Output = Result<Found, Failed>> + Send;

    /// Judges a change by the table in [`Step`], applies it, and draws the consequences for the lock.
    ///
    /// If the change is in force, or the session gone, the lock is given back and the next waiter woken, unless the step
    /// [keeps](Then::Keep) it. If it was refused, the lock is left as it is: whoever is refused under his own lock may be a late
    /// copy of an earlier write, whose holder is still at work.
    fn change(&self, place: &Self::Place, step: &Step<'_, Self::Claim>) -> impl Future<Output = Asked<Verdict>> + Send;

    /// Removes the record, whoever holds the lock, and returns what it removed if that was live.
    ///
    /// It leaves a trace under the name `mark`, for the longer of 60 s and two leases, where there was a record, a trace or a lock,
    /// and in any case if the step says so.
    fn remove(
        &self,
        place: &Self::Place,
        step: &Removal<'_, Self::Claim>,
    ) -> impl Future<Output = Asked<Option<Record>>> + Send;

    /// Moves the end of each lease to now plus its length, and the deadline of the record of each that
    /// [protects](Renewal::protects) one to two leases ahead if it is nearer; one outcome for each, in order.
    fn renew(&self, leases: &[Renewal<Self::Place>]) -> impl Future<Output = Vec<Result<Renewed, Failed>>> + Send;

    /// Gives a lock back. A lock that has ended, or is somebody else's, is left alone.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable); the lock then ends with its lease.
    fn release(
        &self,
        operation: &'static str,
        place: &Self::Place,
        token: LeaseToken,
    ) -> impl Future<Output = Result<(), Failed>> + Send;

    /// Gives a lock back from a `Drop`: never blocks, and from outside a runtime does nothing if it would need one. `clean` says
    /// that no write of its holder is under way.
    fn release_later(self: &Arc<Self>, place: &Arc<Self::Place>, token: LeaseToken, clean: bool);
}

/// What is asked for with a lock.
#[allow(clippy::exhaustive_enums, reason = "every store has to say what it does for each")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The record too, and nothing if it is absent.
    Existing,
    /// The record too, absent or not.
    Any,
    /// Only the lock.
    Lock,
}

/// What somebody who asked for a lock is told.
#[allow(clippy::exhaustive_enums, reason = "there is no third answer")]
#[derive(Debug)]
pub enum Granted<C> {
    /// There is no record, so there is no lock either.
    Absent,
    /// The lock is taken.
    Locked {
        /// What was taken.
        claim: C,
        /// What is there; [`Absent`](Found::Absent) if only the lock was asked for.
        found: Found,
        /// Whether the holder before is known to have released.
        clean: bool,
    },
}

/// What is there under an id.
#[allow(clippy::exhaustive_enums, reason = "a store has to map what it finds to these")]
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Absent,
    /// The trace that a destruction left.
    Buried {
        /// The name of the destruction.
        mark: WriteId,
    },
    /// A live record.
    Live {
        /// Its last write.
        last: WriteId,
        /// Its bytes, and what is left of its life.
        record: Record,
    },
}

/// What a change is based on.
#[allow(clippy::exhaustive_enums, reason = "every store has to judge each")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Nothing was looked at, because the id is fresh.
    Unseen,
    /// Nothing was found, or the trace of a destroyed record.
    Absent {
        /// The name of that trace.
        mark: Option<WriteId>,
    },
    /// The record was found that this write left.
    Written(WriteId),
}

/// What a change leaves of the lock.
#[allow(clippy::exhaustive_enums, reason = "there is no third way")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It is kept.
    Keep,
    /// It is given back.
    Close,
}

/// What a [`Step`] does.
#[allow(clippy::exhaustive_enums, reason = "every store has to do each")]
#[derive(Clone, Copy, Debug)]
pub enum Action<'a> {
    /// Stores bytes under the name of a new write, with a deadline of now plus `ttl`.
    Write {
        /// The name of this write.
        id: WriteId,
        /// The bytes.
        data: &'a [u8],
        /// The length of life.
        ttl: Ttl,
    },
    /// Moves the deadline to now plus `ttl`, and leaves bytes and last write alone.
    Touch {
        /// The length of life.
        ttl: Ttl,
    },
}

/// A change that the store judges and applies in one atomic step.
///
/// | basis | exclusive | the record must be | the lock must be | else |
/// |---|---|---|---|---|
/// | [`Written`](Basis::Written)(*w*) | yes | live, last write still *w* | the claim's own (ended or not) or free | [`Refused`](Verdict::Refused); [`Gone`](Verdict::Gone) if there is no live record |
/// | [`Absent`](Basis::Absent), write | yes | as absent as found: neither live nor another trace | the claim's own (ended or not) | `Refused`; `Gone` for another trace |
/// | `Written`(*w*) | no | live, last write still *w* | free | `Refused`; `Gone` if there is no live record |
/// | `Absent`, write | no | neither live nor a trace; over the one found it may or may not | free | `Refused` |
/// | [`Unseen`](Basis::Unseen), write | either | neither live nor a trace | the claim's own or free; [taken](Self::takes) if it is kept | `Refused` |
/// | `Absent`, `Unseen`, touch | either | | | `Gone` |
///
/// Before all of these a write whose own id is the last write of a live record is [`AlreadyApplied`](Verdict::AlreadyApplied). A
/// lock is free when nobody has it or when its lease has ended. The trace that an expired record leaves counts as one.
#[allow(clippy::exhaustive_structs, reason = "every store has to heed each field")]
#[derive(Debug)]
pub struct Step<'a, C> {
    /// What the change is based on.
    pub basis: Basis,
    /// The lock that the opening has, or that its first write is to take.
    pub claim: Option<&'a C>,
    /// Whether the access is exclusive, and if so how long a lease is.
    pub lease: Option<Duration>,
    /// What to do.
    pub action: Action<'a>,
    /// What becomes of the lock.
    pub then: Then,
}

impl<C> Step<'_, C> {
    /// Whether this is the first write of a fresh id that stays open, which takes the lock.
    #[must_use]
    pub fn takes(&self) -> bool {
        self.basis == Basis::Unseen && self.lease.is_some() && self.then == Then::Keep
    }

    /// Returns the operation, for errors.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        match self.action {
            Action::Write { .. } => "write",
            Action::Touch { .. } => "touch",
        }
    }
}

/// What became of a change.
#[allow(clippy::exhaustive_enums, reason = "every store has to map its answers to these")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This request applied it.
    Applied,
    /// An earlier copy had applied it; nothing changed.
    AlreadyApplied,
    /// Somebody else wrote or holds the lock; nothing changed.
    Refused,
    /// There is no record any more; nothing changed.
    Gone,
}

/// A removal.
#[allow(clippy::exhaustive_structs, reason = "every store has to heed each field")]
#[derive(Debug)]
pub struct Removal<'a, C> {
    /// The lock that the opening has, given back if it closes.
    pub claim: Option<&'a C>,
    /// How long a lease of this opening is; zero if it has none.
    pub lease: Duration,
    /// The name of the trace.
    pub mark: WriteId,
    /// Whether to leave a trace in any case: a create of this opening may still be under way.
    pub trace: bool,
    /// What becomes of the lock.
    pub then: Then,
}

/// A lease to renew.
#[allow(clippy::exhaustive_structs, reason = "every store has to heed each field")]
#[derive(Debug)]
pub struct Renewal<P> {
    /// The session: the very place that the lock was taken under, so a store may keep there what a renewal changes.
    pub place: Arc<P>,
    /// Whose lock it is.
    pub token: LeaseToken,
    /// How long it lasts from now on.
    pub length: Duration,
    /// Whether there is a record to keep alive.
    pub protects: bool,
}

/// What became of a renewal.
#[allow(clippy::exhaustive_enums, reason = "every store has to map its answers to these")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// It lasts.
    Renewed,
    /// It has ended, or somebody else has it.
    Ended,
    /// The record that it protects has passed its deadline.
    Gone,
}

/// The answer to a request that changes something.
#[allow(clippy::exhaustive_structs, reason = "a pair")]
#[derive(Debug)]
pub struct Asked<T> {
    /// What the store answered last.
    pub answer: Result<T, Failed>,
    /// Whether an earlier copy of the same request was sent and never answered.
    pub repeated: bool,
}

/// Why there is no answer that could be used.
#[allow(clippy::exhaustive_structs, reason = "a pair")]
#[derive(Debug)]
pub struct Failed {
    /// What went wrong, under the kind that holds if the request did not reach the store.
    pub error: Error,
    /// Whether the store may have carried it out.
    pub sent: bool,
}

impl Failed {
    /// A failure of a request that the store has certainly not carried out.
    #[must_use]
    pub fn unsent(error: Error) -> Self {
        Self { error, sent: false }
    }

    /// For a change: what was sent and not answered may have happened, whatever the store says to the repeat.
    #[must_use]
    pub fn into_outcome(self, sent_before: bool) -> Error {
        if self.sent || sent_before { self.error.with_kind(ErrorKind::Unknown) } else { self.error }
    }
}

/// Whether a lease protects a record.
#[derive(Debug, Default)]
struct Protects(AtomicBool);

/// What is kept in a lease, for renewing and releasing it.
struct Kept<P> {
    place: Arc<P>,
    protects: Arc<Protects>,
}

/// Opens sessions of a [`LeasedStore`]. Clones share it.
#[derive(Debug)]
pub struct Leased<S> {
    store: Arc<S>,
    lock: Arc<dyn SessionLock>,
}

impl<S> Clone for Leased<S> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), lock: self.lock.clone() }
    }
}

impl<S: LeasedStore> Leased<S> {
    /// Wraps a store.
    #[must_use]
    pub fn new(store: Arc<S>) -> Self {
        Self { lock: Arc::new(LeasedLock::new(store.clone())), store }
    }

    /// Returns the store.
    #[must_use]
    pub fn store(&self) -> &Arc<S> {
        &self.store
    }

    /// Returns the lock of the store, to be used alone. It excludes the exclusive openings, too.
    #[must_use]
    pub fn lock(&self) -> LeasedLock<S> {
        LeasedLock::new(self.store.clone())
    }

    /// Opens a session, as [`SessionHandler::open`](crate::SessionHandler::open) says.
    ///
    /// # Errors
    /// Those of [`SessionHandler::open`](crate::SessionHandler::open).
    ///
    /// # Cancel safety
    /// A dropped future may leave a lock behind that ends with its lease.
    pub async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let mut opening = Opening {
            place: Arc::new(self.store.place(id)),
            store: self.store.clone(),
            lock: self.lock.clone(),
            id: id.clone(),
            request: *request,
            held: None,
            protects: None,
            claim: None,
            basis: Some(Basis::Unseen),
            fetched: None,
            unsettled: false,
            end: None,
        };
        match (request.access, request.expect) {
            (Access::Destroy, _) | (_, Expect::Fresh) => {}
            (Access::Exclusive { wait, lease }, expect) => {
                let want = if expect == Expect::Existing { Want::Existing } else { Want::Any };
                match self.store.acquire("open", &opening.place, want, wait, lease).await? {
                    Granted::Absent => opening.see(Found::Absent),
                    Granted::Locked { claim, found, clean } => {
                        opening.hold(claim, lease, clean);
                        opening.see(found);
                    }
                }
            }
            (Access::ReadOnly | Access::Optimistic, _) => {
                let found = Box::pin(self.store.look("open", &opening.place)).await.map_err(|failed| failed.error)?;
                opening.see(found);
            }
        }
        Ok(Box::new(opening))
    }
}

/// Why an opening can do nothing more.
#[derive(Clone, Copy, Debug)]
enum End {
    Closed,
    Refused(ErrorKind),
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

struct Opening<S: LeasedStore> {
    store: Arc<S>,
    lock: Arc<dyn SessionLock>,
    id: SessionId,
    place: Arc<S::Place>,
    request: OpenRequest,
    held: Option<Held>,
    protects: Option<Arc<Protects>>,
    /// The lock while it is ours, or may be: also one that the first write of a fresh id is to take.
    claim: Option<S::Claim>,
    /// `None` if there is nothing that it may write, because it found nothing where it had expected something.
    basis: Option<Basis>,
    fetched: Option<Option<Record>>,
    /// Whether a write was sent that was never answered: a refusal may then be of its own repeat (`protocol.md` 4).
    unsettled: bool,
    end: Option<End>,
}

impl<S: LeasedStore> Opening<S> {
    fn hold(&mut self, claim: S::Claim, length: Duration, clean: bool) {
        let protects = Arc::new(Protects::default());
        let lease = Lease::new(self.id.clone(), S::token(&claim), length);
        let lease =
            lease.after_clean_release(clean).with_state(Kept { place: self.place.clone(), protects: protects.clone() });
        self.held = Some(Held { lease: Arc::new(lease), lock: self.lock.clone() });
        self.protects = Some(protects);
        self.claim = Some(claim);
    }

    /// Takes over what the store answered.
    fn see(&mut self, found: Found) {
        let (record, basis) = match found {
            Found::Live { last, record } => (Some(record), Some(Basis::Written(last))),
            _ if self.request.expect != Expect::Any => (None, None),
            Found::Buried { mark } => (None, Some(Basis::Absent { mark: Some(mark) })),
            Found::Absent => (None, Some(Basis::Absent { mark: None })),
        };
        self.basis = basis;
        self.protect();
        self.fetched = Some(record);
    }

    /// Tells the renewal whether there is a record to keep alive.
    fn protect(&self) {
        if let Some(protects) = &self.protects {
            protects.0.store(matches!(self.basis, Some(Basis::Written(_))), Ordering::Release);
        }
    }

    fn exclusive(&self) -> Option<Duration> {
        match self.request.access {
            Access::Exclusive { lease, .. } => Some(lease),
            Access::ReadOnly | Access::Optimistic | Access::Destroy => None,
        }
    }

    fn may_write(&self, operation: &'static str) -> Result<()> {
        let fact = match self.request.access {
            Access::Exclusive { .. } | Access::Optimistic => return Ok(()),
            Access::ReadOnly => "the session was opened to be read only",
            Access::Destroy => "the session was opened to be destroyed only",
        };
        Err(Error::new(ErrorKind::Unsupported, operation, fact))
    }

    async fn put(&mut self, record: &Record, id: WriteId, then: Then) -> Result<Written> {
        self.may_write("write")?;
        let max = self.store.max_bytes();
        if record.data.len() > max {
            let fact = format!("a payload of {} bytes, at most {max} are allowed", record.data.len());
            return Err(Error::new(ErrorKind::TooLarge, "write", fact));
        }
        if let Some(end) = self.end {
            // A repeat after a lost answer: the first copy has closed this opening.
            let found = Box::pin(self.store.look("write", &self.place)).await;
            let found = found.map_err(|failed| failed.into_outcome(true))?;
            return match found {
                Found::Live { last, .. } if last == id => Ok(Written::AlreadyApplied),
                _ => Err(end.error("write")),
            };
        }
        let takes = match self.exclusive() {
            Some(length) if then == Then::Keep && self.basis == Some(Basis::Unseen) => {
                if self.claim.is_none() {
                    // Kept from the first copy on, so that a repeat takes the same lock.
                    self.claim = Some(self.store.claim(length)?);
                }
                Some(length)
            }
            _ => None,
        };
        let outcome = self.change(Action::Write { id, data: &record.data, ttl: record.ttl }, then).await;
        if outcome.is_ok() {
            if let Some(length) = takes
                && let Some(claim) = self.claim.take()
            {
                self.hold(claim, length, true);
            }
            self.basis = Some(Basis::Written(id));
            self.protect();
        }
        outcome
    }

    async fn move_deadline(&mut self, ttl: Ttl, then: Then) -> Result<Written> {
        self.may_write("touch")?;
        if let Some(end) = self.end {
            return Err(end.error("touch"));
        }
        self.change(Action::Touch { ttl }, then).await
    }

    /// Sends a change and draws the consequences of its outcome. Unless it was refused, the store has drawn those for the lock.
    async fn change(&mut self, action: Action<'_>, then: Then) -> Result<Written> {
        let operation = if matches!(action, Action::Write { .. }) { "write" } else { "touch" };
        let Some(basis) = self.basis else {
            // Nothing under this id can be ours, so there is nothing to ask.
            self.ended(End::Refused(ErrorKind::Gone));
            return Err(End::Refused(ErrorKind::Gone).error(operation));
        };
        let before = std::mem::replace(&mut self.unsettled, true);
        let step = Step { basis, claim: self.claim.as_ref(), lease: self.exclusive(), action, then };
        let Asked { answer, repeated } = self.store.change(&self.place, &step).await;
        let verdict = match answer {
            Ok(verdict) => verdict,
            Err(failed) => {
                self.unsettled = before || repeated || failed.sent;
                let error = failed.into_outcome(before || repeated);
                if !error.kind().keeps_opening() {
                    self.refuse(error.kind());
                }
                return Err(error);
            }
        };
        let kind = match verdict {
            Verdict::Applied | Verdict::AlreadyApplied => {
                self.unsettled = false;
                // What the open fetched is older than what is there now.
                self.fetched = None;
                if then == Then::Close {
                    self.ended(End::Closed);
                }
                let first = verdict == Verdict::Applied || repeated && !before;
                return Ok(if first { Written::Applied } else { Written::AlreadyApplied });
            }
            Verdict::Refused if self.exclusive().is_some() && basis != Basis::Unseen => ErrorKind::Fenced,
            Verdict::Refused => ErrorKind::Conflict,
            Verdict::Gone => ErrorKind::Gone,
        };
        if before || repeated {
            let fact = "it was sent before without an answer, and is refused now";
            return Err(Error::new(ErrorKind::Unknown, operation, fact));
        }
        self.unsettled = false;
        if verdict == Verdict::Refused {
            self.refuse(kind);
        } else {
            self.ended(End::Refused(kind));
        }
        Err(End::Refused(kind).error(operation))
    }

    async fn remove(&mut self, then: Then) -> Result<Option<Record>> {
        if self.request.access == Access::ReadOnly {
            return Err(Error::new(ErrorKind::Unsupported, "destroy", "the session was opened to be read only"));
        }
        let step = Removal {
            claim: self.claim.as_ref(),
            lease: self.exclusive().unwrap_or_default(),
            mark: WriteId::random()?,
            // A create of ours may still be under way, and must find a trace.
            trace: self.unsettled,
            then,
        };
        let Asked { answer, repeated } = self.store.remove(&self.place, &step).await;
        let removed = answer.map_err(|failed| failed.into_outcome(repeated))?;
        self.fetched = None;
        self.basis = None;
        self.protect();
        if then == Then::Close {
            self.ended(End::Closed);
        }
        Ok(removed)
    }

    async fn give_back(&mut self) -> Result<()> {
        let claim = self.claim.take();
        self.ended(End::Closed);
        let Some(claim) = claim else { return Ok(()) };
        let released = self.store.release("close", &self.place, S::token(&claim)).await;
        released.map_err(|failed| failed.into_outcome(false))
    }

    /// Ends the opening after an error, and gives back a lock that the store has left to it.
    fn refuse(&mut self, kind: ErrorKind) {
        self.let_go();
        self.ended(End::Refused(kind));
    }

    fn let_go(&mut self) {
        if let Some(claim) = self.claim.take() {
            self.store.release_later(&self.place, S::token(&claim), true);
        }
    }

    fn ended(&mut self, end: End) {
        self.held = None;
        self.protects = None;
        self.claim = None;
        self.fetched = None;
        self.end.get_or_insert(end);
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: LeasedStore> OpenSession for Opening<S> {
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
        // On the heap, so that whoever is given what the open fetched does not carry the room for it.
        let found = Box::pin(self.store.look("read", &self.place)).await.map_err(|failed| failed.error)?;
        // A fresh id stays fresh, whatever is there, and an exclusive opening that was refused its lock never gets to write.
        let stays = self.basis == Some(Basis::Unseen) || (self.exclusive().is_some() && self.claim.is_none());
        let basis = self.basis;
        self.see(found);
        if stays {
            self.basis = basis;
            self.protect();
        }
        Ok(self.fetched.take().flatten())
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        self.put(record, id, Then::Keep).await
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        self.remove(Then::Keep).await
    }

    async fn close(&mut self) -> Result<()> {
        self.give_back().await
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        self.move_deadline(ttl, Then::Keep).await
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        // What is rarer is on the heap, so that a write does not carry the room for it.
        match change {
            Change::Write(record) => self.put(record, id, Then::Close).await,
            Change::Touch(ttl) => Box::pin(self.move_deadline(*ttl, Then::Close)).await,
            Change::Destroy => Box::pin(self.remove(Then::Close)).await.map(|_| Written::Applied),
            Change::Nothing => Box::pin(self.give_back()).await.map(|()| Written::Applied),
        }
    }

    fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }
}

impl<S: LeasedStore> Drop for Opening<S> {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl<S: LeasedStore> fmt::Debug for Opening<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening").field("request", &self.request).finish_non_exhaustive()
    }
}

/// The lock of a [`LeasedStore`], to be used alone and for renewing what is held. Clones share the store.
pub struct LeasedLock<S> {
    store: Arc<S>,
}

impl<S: LeasedStore> LeasedLock<S> {
    /// Wraps a store.
    #[must_use]
    pub fn new(store: Arc<S>) -> Self {
        Self { store }
    }
}

impl<S: LeasedStore> LeasedLock<S> {
    /// Returns the place that a lease was taken under, and whether it protects a record.
    fn kept(&self, lease: &Lease, state: Option<&(dyn Any + Send)>) -> (Arc<S::Place>, bool) {
        match state.and_then(|state| state.downcast_ref::<Kept<S::Place>>()) {
            Some(kept) => (kept.place.clone(), kept.protects.0.load(Ordering::Acquire)),
            None => (Arc::new(self.store.place(lease.id())), false),
        }
    }
}

impl<S> Clone for LeasedLock<S> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone() }
    }
}

impl<S> fmt::Debug for LeasedLock<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeasedLock").finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: LeasedStore> SessionLock for LeasedLock<S> {
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>> {
        let place = Arc::new(self.store.place(id));
        match self.store.acquire("acquire", &place, Want::Lock, request.wait, request.lease).await? {
            Granted::Locked { claim, clean, .. } => {
                let lease = Lease::new(id.clone(), S::token(&claim), request.lease).after_clean_release(clean);
                Ok(Arc::new(lease.with_state(Kept { place, protects: Arc::default() })))
            }
            Granted::Absent => {
                Err(Error::new(ErrorKind::Unexpected, "acquire", "the store missed a record that was not asked for"))
            }
        }
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        let mut renewals = Vec::with_capacity(leases.len());
        for lease in leases {
            let (place, protects) = self.kept(lease, Some(&**lease.state().lock().await));
            renewals.push(Renewal { place, token: lease.token(), length: lease.length(), protects });
        }
        let outcomes = self.store.renew(&renewals).await;
        let outcome = |(lease, outcome): (&Arc<Lease>, Result<Renewed, Failed>)| match outcome {
            Ok(Renewed::Renewed) => Ok(()),
            Ok(Renewed::Ended) => {
                lease.mark_lost();
                Err(Error::new(ErrorKind::Fenced, "renew", "the lease has ended"))
            }
            Ok(Renewed::Gone) => Err(Error::new(ErrorKind::Gone, "renew", "the session has expired")),
            Err(failed) => Err(failed.into_outcome(false)),
        };
        leases.iter().zip(outcomes).map(outcome).collect()
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let (place, _) = self.kept(lease, Some(&**lease.state().lock().await));
        let released = self.store.release("release", &place, lease.token()).await;
        released.map_err(|failed| failed.into_outcome(false))
    }

    /// Frees the lock in the background. It does not count as a clean release: a write of the former holder may still be under
    /// way to whatever store this lock stands before.
    fn abandon(&self, lease: Arc<Lease>) {
        let state = lease.state().try_lock().ok();
        let (place, _) = self.kept(&lease, state.as_ref().map(|state| &***state));
        drop(state);
        self.store.release_later(&place, lease.token(), false);
    }
}
