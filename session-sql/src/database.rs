//! What a database has to be able to do: the atomic steps on the row of a session, each in one statement or transaction.
//!
//! One module for each kind of database implements [`Database`]; nothing above it knows a statement, and nothing in here waits
//! for a lock. Ids come as keys: the prefix of the configuration and the id.
//!
//! # The row
//!
//! | column | holds |
//! |---|---|
//! | `id` | the key, compared byte by byte |
//! | `data` | the bytes of a record; null for a trace, and for an absent id that somebody holds |
//! | `write_id` | the last write of a record, or the name of the destruction that left a trace; null if there is neither |
//! | `expires_at` | the deadline of the record or the trace |
//! | `expires_minute` | the same in whole minutes, indexed for gc: a write moves it once a minute at most |
//! | `lock_token`, `lock_until`, `lock_since`, `lock_lease` | who holds the lock, until when, since when, for how long at a time |
//! | `lock_owner`, `lock_process` | the same in words, and the number of the process in its liveness lock |
//! | `lock_handed` | 1 if the holder before gave the lock to this one by a clean release |
//! | `want_token`, `want_until`, `want_process` | the one next in line, until when he counts, and whose process he is of |
//! | `want_since` | since when he waits |
//!
//! Instants are milliseconds since 1970 and spans milliseconds, by the clock of the database, so that no type, time zone or
//! precision of a date comes in.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use session_core::leased::{Basis, Failed, Found, Renewed, Then, Verdict, Want};
use session_core::{Error, ErrorKind, Holder, LeaseToken, Record, Ttl, WriteId};

use crate::transaction::Transactions;

/// How long a trace stays at least.
pub(crate) const REMEMBER: Duration = Duration::from_secs(60);

/// How long a lock that was handed on waits for its new holder.
pub(crate) const CLAIM: Duration = Duration::from_secs(1);

/// A kind of database.
///
/// A slice of one is done by the shortest statement; more of them, which are of different sessions, travel together. A batch never
/// waits for a row that somebody has locked: for it the answer is `None`, and it is asked for again alone (`protocol.md` 16). A batch
/// that fails does so as a whole, and its members are then asked for one by one.
#[async_trait]
pub(crate) trait Database: fmt::Debug + Send + Sync + 'static {
    /// Takes locks that are free, or handed to their token, and reads what is there; books the next place where asked to. An answer
    /// of [`Busy`] without a booking has changed nothing. A record with less than two leases left is prolonged to two. Asking twice
    /// with one token is as good as once.
    async fn enter(&self, entries: &[Enter]) -> Result<Vec<Option<Entered>>, Failure>;

    /// Judges and applies changes; see [`Step`](session_core::leased::Step). A lock that is given back goes to the one next in
    /// line, who is told where the database can tell.
    async fn change(&self, changes: &[Alter]) -> Result<Vec<Option<Verdict>>, Failure>;

    /// Reads without a lock.
    async fn look(&self, key: &str) -> Result<Found, Failure>;

    /// Buries a record, whoever holds the lock.
    async fn remove(&self, removal: &Remove) -> Result<Option<Record>, Failure>;

    /// Renews leases, in as few statements as there may be.
    async fn renew(&self, leases: &[Renew]) -> Result<Vec<Renewed>, Failure>;

    /// Gives up whatever a token has: the lock, which goes to the one next in line, or that place. A row without record, trace and
    /// lock does not stay. `clean` says that no write of the holder is under way. The answer is `false` if the token had nothing and
    /// a request for the lock that was sent before may still get it.
    async fn leave(&self, key: &str, token: LeaseToken, clean: bool) -> Result<bool, Failure>;

    /// Frees at most `limit` rows whose time is over and that nobody holds, and says how many of them were expired records. It
    /// waits for no row.
    async fn gc(&self, limit: u32) -> Result<u64, Failure>;

    /// Lists live records whose keys begin with `prefix`, in the order of their keys, behind `after`.
    async fn list(&self, prefix: &str, after: Option<&str>, limit: u32) -> Result<Vec<Listed>, Failure>;

    /// Lists held locks of keys that begin with `prefix`.
    async fn locks(&self, prefix: &str, limit: u32) -> Result<Vec<Locked>, Failure>;

    /// Takes the lock from whoever holds it; says whether somebody did. It does not count as a clean release.
    async fn unlock(&self, key: &str) -> Result<bool, Failure>;

    /// Makes the table if it is not there.
    async fn create_table(&self) -> Result<(), Failure>;

    /// Asks whether the database answers and the table is one that this version can use.
    async fn check(&self) -> Result<(), Failure>;

    /// Lets others see that this process lives, so that they need not wait for the end of a lease if it does not. Returns once they
    /// can, or when that takes longer than a moment; it goes on behind the caller's back then.
    async fn show_life(&self) {}

    /// Returns how this database holds locks in transactions, if it can.
    fn transactions(self: Arc<Self>) -> Option<Arc<dyn Transactions>> {
        None
    }

    /// Registers somebody who waits under `token`, before the database is told of him; `None` where it cannot wake anybody.
    async fn waiter(&self, token: LeaseToken) -> Option<Box<dyn Waiter>>;
}

/// A place in the register of those who wait, given up when it is dropped.
#[async_trait]
pub(crate) trait Waiter: Send {
    /// Waits for a message, or for as long as `limit`. A message that came before counts. Says no if it is that he has lost the place
    /// next in line, and nobody will hand him the lock.
    async fn woken(&mut self, limit: Duration) -> bool;
}

/// Whose locks they are: this handler in this process.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    /// What others are told: `pid 4711 on web-3`.
    pub(crate) text: String,
    /// The random number of this handler: the name of its liveness lock, and of the channel on which it is woken.
    pub(crate) process: i64,
}

impl Owner {
    pub(crate) fn new() -> session_core::Result<Self> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
        let host: String = host
            .unwrap_or_default()
            .trim()
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c))
            .take(100)
            .collect();
        let host = if host.is_empty() { "localhost" } else { &host };
        let number = u128::from_le_bytes(WriteId::random()?.to_bytes()) as i64;
        Ok(Self { text: format!("pid {} on {host}", std::process::id()), process: number })
    }
}

/// Whoever came up to so many milliseconds later than the one next in line came with him: clocks are read to the millisecond. Who came
/// later still gives way. Else two processes that come again at once would book after each other for ever, since whoever waits for long
/// looks less often.
pub(crate) const SAME: i64 = 2;

/// A request for a lock.
#[derive(Clone, Debug)]
pub(crate) struct Enter {
    pub(crate) key: String,
    pub(crate) token: LeaseToken,
    /// In milliseconds.
    pub(crate) lease: i64,
    pub(crate) want: Want,
    /// How long the place next in line is to be kept, in milliseconds, if the lock is not free; zero books none. The place is open
    /// if nobody has it, his time is over, he is of this process, or he has come [later](SAME).
    pub(crate) book: i64,
    /// For how long this one has waited, in milliseconds.
    pub(crate) waited: i64,
    /// Whether to ask if the process of the holder is still there, and to take the lock if it is not.
    pub(crate) probe: bool,
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Entered {
    /// There is no record where one was expected; nothing was changed.
    Absent,
    Granted {
        /// Absent if only the lock was asked for.
        found: Found,
        clean: bool,
    },
    Busy(Busy),
}

/// Who has the lock instead.
#[derive(Debug)]
pub(crate) struct Busy {
    pub(crate) holder: Option<Holder>,
    /// What is left of his lease.
    pub(crate) left: Duration,
    /// Whether the place next in line is the asker's.
    pub(crate) booked: bool,
}

/// A change; see [`Step`](session_core::leased::Step).
#[derive(Clone, Debug)]
pub(crate) struct Alter {
    pub(crate) key: String,
    pub(crate) basis: Basis,
    /// The lock of the opening, or the one that this first write is to take.
    pub(crate) token: Option<LeaseToken>,
    /// The length of a lease in milliseconds if the access is exclusive.
    pub(crate) lease: Option<i64>,
    pub(crate) action: Action,
    pub(crate) then: Then,
}

impl Alter {
    /// Returns how many bytes it carries.
    pub(crate) fn bytes(&self) -> usize {
        match &self.action {
            Action::Write { data, .. } => data.len(),
            Action::Touch { .. } => 0,
        }
    }

    /// Whether this is the first write of a fresh id that stays open, which takes the lock.
    pub(crate) fn takes(&self) -> bool {
        self.basis == Basis::Unseen && self.lease.is_some() && self.then == Then::Keep
    }
}

#[derive(Clone)]
pub(crate) enum Action {
    Write { id: WriteId, data: Arc<[u8]>, ttl: Ttl },
    Touch { ttl: Ttl },
}

impl fmt::Debug for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { id, data, ttl } => write!(f, "Write({id:?}, {} bytes, {ttl:?})", data.len()),
            Self::Touch { ttl } => write!(f, "Touch({ttl:?})"),
        }
    }
}

/// A removal; see [`Removal`](session_core::leased::Removal).
#[derive(Clone, Debug)]
pub(crate) struct Remove {
    pub(crate) key: String,
    pub(crate) token: Option<LeaseToken>,
    /// The length of a lease of this opening in milliseconds, zero if it has none.
    pub(crate) lease: i64,
    pub(crate) mark: WriteId,
    /// Whether to leave a trace in any case.
    pub(crate) trace: bool,
    pub(crate) then: Then,
}

/// A lease to renew; see [`Renewal`](session_core::leased::Renewal).
#[derive(Clone, Debug)]
pub(crate) struct Renew {
    pub(crate) key: String,
    pub(crate) token: LeaseToken,
    /// In milliseconds.
    pub(crate) lease: i64,
    pub(crate) protects: bool,
}

/// A live record in a listing.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) key: String,
    pub(crate) bytes: u64,
    pub(crate) left: Duration,
}

/// A held lock in a listing.
#[derive(Debug)]
pub(crate) struct Locked {
    pub(crate) key: String,
    pub(crate) holder: Option<Holder>,
    pub(crate) left: Duration,
    /// Whether somebody is next in line; how many stand behind him nobody knows.
    pub(crate) wanted: bool,
}

/// Why a request has no answer that could be used.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What went wrong, under the kind that holds if the request did not reach the database.
    pub(crate) kind: ErrorKind,
    pub(crate) message: std::borrow::Cow<'static, str>,
    pub(crate) source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// Whether the database may have carried it out.
    pub(crate) sent: bool,
    /// Whether another attempt at once may fare better: a connection that broke, a deadlock, a failure to serialize.
    pub(crate) passing: bool,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<std::borrow::Cow<'static, str>>) -> Self {
        Self { kind, message: message.into(), source: None, sent: false, passing: false }
    }

    pub(crate) fn unexpected(message: &'static str) -> Self {
        Self::new(ErrorKind::Unexpected, message)
    }

    /// With what lies beneath, which must not contain a value of a statement.
    #[cfg(feature = "postgres")]
    pub(crate) fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// For something that changes nothing, or that is undone if it happened.
    pub(crate) fn into_error(self, operation: &'static str) -> Error {
        let error = Error::new(self.kind, operation, self.message);
        match self.source {
            Some(source) => error.with_source(source),
            None => error,
        }
    }

    /// The same for a change, which may have happened if it was sent.
    pub(crate) fn into_failed(self, operation: &'static str) -> Failed {
        let sent = self.sent;
        Failed { error: self.into_error(operation), sent }
    }
}

/// Reads who holds a lock from its row.
pub(crate) fn holder(text: Option<String>, since: Option<i64>) -> Option<Holder> {
    let since = UNIX_EPOCH + Duration::from_millis(u64::try_from(since?).ok()?);
    Some(Holder { process: text?, since: since.min(SystemTime::now()) })
}

/// Makes a span of what a database answered with.
pub(crate) fn span(millis: i64) -> Duration {
    Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

/// Makes milliseconds of a span, at least one.
pub(crate) fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX / 4).clamp(1, i64::MAX / 4)
}
