//! Liars: handlers that are broken on purpose, one small flaw each, so that every case can be seen to fail.
//!
//! A case that no liar fails tests nothing; a liar that fails no case shows a gap. `tests/liars.rs` holds both to account.
//! [`Flaw::None`] is the honest store, which has to pass everything. A flaw is named after what it does wrong, and takes
//! effect at one place of `store.rs` and its modules, or of `remote.rs` where it is about round trips.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use session_core::{Error, ErrorKind, Result, SessionHandler, SessionLock, SessionsBuilder};

use crate::harness::Harness;
use crate::remote::{Echo, Remote};
use crate::store::Store;

macro_rules! flaws {
    ($($(#[doc = $doc:literal])+ $flaw:ident,)+) => {
        /// What a liar does wrong.
        #[allow(clippy::exhaustive_enums, reason = "a list to be run through, not to be matched")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Flaw {
            /// Nothing: the honest store.
            None,
            $($(#[doc = $doc])+ $flaw,)+
        }

        impl Flaw {
            /// Every flaw, without [`None`](Self::None).
            pub const ALL: &[Self] = &[$(Self::$flaw,)+];
        }
    };
}

flaws! {
    /// Lets everybody in at once.
    NoLock,
    /// Keeps the lock of a dead holder for ever.
    LockNeverEnds,
    /// Ends a lease after a quarter of its length.
    LeaseEndsEarly,
    /// Names every acquisition of the process the same.
    TokenIsTheProcess,
    /// Frees whatever lock there is when an opening is closed.
    CloseFreesAnyLock,
    /// Frees whatever lock there is when a lease is released.
    ReleaseFreesAnyLock,
    /// Frees whatever lock there is when an opening or a lease is dropped.
    DropFreesAnyLock,
    /// Lets the caller in who is in already.
    LockIsReentrant,
    /// Has one lock for all ids.
    OneLockForAll,
    /// Does not wait: a taken lock times out at once.
    NeverWaits,
    /// Waits three times as long as allowed.
    WaitsTooLong,
    /// Wakes nobody: a waiter looks again when its time is nearly over.
    WakeIsLost,
    /// Leaves those who gave up at the head of the queue.
    DeadWaiterBlocksQueue,
    /// Keeps the lock for ever if the opening is dropped.
    DroppedOpeningKeepsLock,
    /// Keeps the lock for ever if the future of an open is dropped that had to wait.
    DroppedOpenKeepsLock,
    /// Makes readers wait for the lock.
    ReaderWaits,
    /// Lets readers take the lock, so that openers wait for them.
    ReaderHolds,
    /// Makes a destroy wait for the holder.
    DestroyWaits,
    /// Refuses to destroy what somebody else holds.
    DestroyIsFenced,
    /// Keeps the lock after the holder destroyed and closed.
    DestroyKeepsLock,
    /// Gives the lock back when the holder destroys, before it closes, and lets go of nothing of the record until then.
    DestroyReleasesFirst,
    /// Does not say what was destroyed.
    DestroyReturnsNothing,
    /// Hands over an expired record as what was destroyed.
    DestroyReturnsTheExpired,
    /// Fails to destroy what is absent.
    DestroyOfAbsentFails,
    /// Reads through an opening that may only destroy.
    DestroyAccessReads,
    /// Writes through an opening that may only destroy.
    DestroyAccessWrites,
    /// Writes through an opening that may only read.
    ReadOnlyWrites,
    /// Destroys through an opening that may only read.
    ReadOnlyDestroys,
    /// Fetches the record before it waits for the lock.
    ReadsBeforeLock,
    /// Answers later reads with what the first one said.
    ReadIsCached,
    /// Shows readers of one handler what an earlier reader of it has seen.
    ReadsAreSharedByReaders,
    /// Shows a reader the record before the last one now and then.
    ReaderGoesBack,
    /// Prolongs the life of what is read.
    ReadProlongs,
    /// Reports the whole life instead of what is left of it.
    ReadReportsWholeLife,
    /// Stores whatever comes.
    NoFence,
    /// Stores whatever comes from the owner of the lock, or while it is free.
    OwnerIsEnough,
    /// Looks at the last write only, and not at who holds the lock.
    VersionIsEnough,
    /// Counts writes instead of naming them, and starts again with each record.
    VersionIsACounter,
    /// Looks at the lock and the last write in one step and stores in another.
    ChecksThenStores,
    /// Replaces the payload in two steps.
    TearsWrites,
    /// Answers a repeated write as a refusal.
    RepeatIsRefused,
    /// Applies a repeated write again, whatever happened in between.
    RepeatIsAppliedAgain,
    /// Names the opening instead of the write: what an overtaken opening writes after its first write passes for a repeat.
    FencePerOpening,
    /// Bases every write of an opening on what it read at first.
    OwnWriteIsForgotten,
    /// Answers a refused write as applied.
    RefusalIsSwallowed,
    /// Refuses a write under a lease that has ended although nobody came.
    StrictByStealth,
    /// Accepts a write under a lease that has ended although it was told to be strict.
    StrictIsIgnored,
    /// Applies optimistic writes while somebody else holds the lock.
    OptimismIgnoresHolder,
    /// Lets the last optimistic writer win.
    OptimismIgnoresVersion,
    /// Takes the lock for an optimistic opening and waits for it.
    OptimismWaits,
    /// Keeps no trace of what was destroyed.
    DestroyLeavesNoTrace,
    /// Replaces what is there when a fresh id is written.
    FreshReplaces,
    /// Decides in one step that a fresh id is free and creates it in another.
    FreshChecksThenCreates,
    /// Leaves a fresh id unlocked after its first write.
    FreshTakesNoLock,
    /// Waits for a lock on a fresh id.
    FreshLocksAtOpen,
    /// Says gone where a fresh id is taken.
    FreshConflictIsGone,
    /// Creates a record when an absent id is opened that should exist.
    ExistingLitters,
    /// Locks an absent id that should exist.
    ExistingLocksAbsent,
    /// Waits for the lock of an absent id that should exist.
    ExistingWaitsForAbsent,
    /// Lets an opening create what it expected to exist.
    ExistingCreates,
    /// Leaves an empty record when an absent id is closed.
    CloseCreates,
    /// Takes a close without a write for a write of nothing.
    CloseClears,
    /// Fails to close a second time.
    SecondCloseFails,
    /// Fails to close after the lock was lost.
    CloseAfterLossFails,
    /// Keeps the lock after a write was refused.
    RefusalKeepsLock,
    /// Keeps the lock when it saves.
    SaveKeepsLock,
    /// Gives the lock back before it stores.
    SaveReleasesFirst,
    /// Writes the old bytes when it is to save the new ones.
    SaveWritesOldBytes,
    /// Stores nothing when it is to save a new life.
    SaveForgetsTouch,
    /// Stores nothing when it is to save a destruction.
    SaveForgetsDestroy,
    /// Touches nothing.
    TouchDoesNothing,
    /// Counts a touch as a write.
    TouchIsAWrite,
    /// Touches what the holder no longer owns.
    TouchIsUnfenced,
    /// Removes the record and puts it back with its new life, in two steps.
    TouchTakesTwoSteps,
    /// Puts back what the opening had read when it is to prolong.
    TouchPutsBackOldBytes,
    /// Touches through an absent record, which it creates.
    TouchCreates,
    /// Revives an expired record when it is touched.
    TouchRevives,
    /// Serves expired records until they are collected.
    ExpiredIsServed,
    /// Applies writes to expired records.
    WriteRevives,
    /// Forgets that a record expires if nobody holds it.
    LivesForEver,
    /// Ends a record after half of its life.
    DiesEarly,
    /// Lets the first write decide how long a record lives.
    WriteKeepsDeadline,
    /// Does not prolong the record that is opened.
    OpenDoesNotProlong,
    /// Does not prolong the record whose lease is renewed.
    RenewalDoesNotProlong,
    /// Revives an expired record when a lease is renewed.
    RenewalRevives,
    /// Answers renewals and renews nothing.
    RenewalDoesNothing,
    /// Takes the lock back when a lease is renewed that was lost.
    RenewalTakesBack,
    /// Says that a lost lease was renewed.
    RenewalOfLostSucceeds,
    /// Answers a batch of renewals in the wrong order.
    RenewalAnswersReversed,
    /// Answers only the first of a batch of renewals.
    RenewalAnswersOne,
    /// Renews for a second, whatever the length of the lease.
    RenewalIgnoresLength,
    /// Says that every lease follows a clean release.
    TakeoverIsCalledClean,
    /// Rounds the length of a lease to whole hours when it tells it.
    LeaseTellsAnotherLength,
    /// Collects what will not live for another hour.
    GcTakesTheLiving,
    /// Collects the records of held sessions.
    GcTakesHeld,
    /// Collects by the deadline that a record was created with.
    GcTakesRenewed,
    /// Collects what it found expired some time ago without looking again.
    GcTakesReplaced,
    /// Collects what an earlier collection found expired and left, without looking again.
    GcTrustsEarlierFinds,
    /// Collects without limit.
    GcIgnoresLimit,
    /// Counts what was destroyed as expired.
    GcCountsDestroyed,
    /// Counts what another collector has freed.
    GcCountsTwice,
    /// Waits for the locks of those who hold.
    GcWaits,
    /// Refuses a collector while another runs.
    GcRunsAlone,
    /// Folds ids to lower case.
    IdsFoldCase,
    /// Cuts ids after 64 characters.
    IdsAreCut,
    /// Tells no more than a thousand ids apart.
    IdsCollide,
    /// Ignores the namespace.
    NamespacesAreOne,
    /// Ends the payload at the first NUL.
    BytesEndAtNul,
    /// Takes an empty record for an absent one.
    EmptyIsAbsent,
    /// Cuts payloads after 60 KiB.
    BytesAreCut,
    /// Makes text of the payload.
    BytesBecomeText,
    /// Replaces the record by nothing when the new one is too large.
    TooLargeDestroys,
    /// Shows the id in errors.
    ErrorShowsId,
    /// Shows the id in `Debug`.
    DebugShowsId,
    /// Shows the payload in `Debug`.
    DebugShowsPayload,
    /// Lists the expired and the destroyed.
    ListShowsTheDead,
    /// Lists ids that are only locked.
    ListShowsLocks,
    /// Forgets the rest of a listing after its first page.
    ListForgetsRest,
    /// Lists no locks.
    LocksAreHidden,
    /// Lists locks that have ended.
    LocksShowTheEnded,
    /// Says that it unlocked and does not.
    UnlockDoesNothing,
    /// Says that it unlocked what was free.
    UnlockAlwaysSaysYes,
    /// Lets the holder write on whose lock was broken and taken.
    UnlockLeavesHolderIn,
    /// Lets any number queue.
    QueueHasNoEnd,
    /// Lets nobody queue.
    QueueHoldsNobody,
    /// Lets sessions live for ever if they are used.
    NoAbsoluteEnd,
    /// Cannot have more than eight sessions open at the same time.
    EightOpeningsAtATime,
    /// Takes the lock in one flight and reads in another.
    OpenLocksThenReads,
    /// Writes in one flight and gives the lock back in another.
    SaveWritesThenUnlocks,
    /// Asks twice to read without a lock.
    ViewAsksTwice,
    /// Asks whether a fresh id is free when it is opened.
    FreshAsksAtOpen,
    /// Looks before it destroys.
    DestroyLooksFirst,
}

/// The harness of a liar, or, with [`Flaw::None`], of the honest store.
#[derive(Debug)]
pub struct Liar {
    flaw: Flaw,
    tick: Duration,
    strict: bool,
    stores: Mutex<HashMap<String, Arc<Store>>>,
    /// Started for the cases that count round trips.
    server: OnceLock<Echo>,
}

impl Liar {
    /// Makes the liar with this flaw.
    #[must_use]
    pub fn new(flaw: Flaw) -> Self {
        let strict = flaw == Flaw::StrictIsIgnored;
        Self { flaw, tick: Duration::from_millis(60), strict, stores: Mutex::default(), server: OnceLock::new() }
    }

    /// Refuses writes under a lease that has ended.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    fn store(&self, namespace: &str) -> Arc<Store> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let namespace = if self.flaw == Flaw::NamespacesAreOne { "" } else { namespace };
        stores.entry(namespace.to_owned()).or_insert_with(|| Arc::new(Store::new(self.flaw, self.strict))).clone()
    }
}

impl Harness for Liar {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(self.store(namespace).handler())
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        Ok(self.store(namespace).lock())
    }

    fn server(&self) -> Option<String> {
        let server = match self.server.get() {
            Some(server) => server,
            None => {
                let started = Echo::start().ok()?;
                self.server.get_or_init(|| started)
            }
        };
        Some(server.address().to_string())
    }

    async fn handler_at(&self, namespace: &str, server: SocketAddr) -> Result<Arc<dyn SessionHandler>> {
        let gone = |error: io::Error| Error::new(ErrorKind::Unavailable, "connect", "the server is gone").with_source(error);
        let remote = Remote::connect(self.store(namespace).handler(), server, self.flaw).await.map_err(gone)?;
        Ok(Arc::new(remote))
    }

    fn tick(&self) -> Duration {
        self.tick
    }

    fn strict_expiry(&self) -> bool {
        self.strict
    }

    fn sessions(&self, settings: SessionsBuilder) -> SessionsBuilder {
        match self.flaw {
            Flaw::QueueHasNoEnd => settings.queue(usize::MAX / 2),
            Flaw::QueueHoldsNobody => settings.queue(0),
            Flaw::NoAbsoluteEnd => settings.absolute_ttl(None),
            _ => settings,
        }
    }
}
