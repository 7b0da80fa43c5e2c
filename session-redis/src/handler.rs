//! The contract over Redis: what each access does, and what an answer means for an opening.
//!
//! The atomic steps themselves are scripts; see `scripts/`. This file keeps what the scripts cannot know: what an opening is based
//! on, and whether a write was sent before without an answer.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::Value;
use session_core::{
    Access, Change, Error, ErrorKind, Expect, Held, Lease, LeaseToken, OpenRequest, OpenSession, Record, Result,
    SessionAdmin, SessionHandler, SessionId, SessionLock, Ttl, WriteId, Written,
};

use crate::admin::RedisAdmin;
use crate::config::RedisConfig;
use crate::layout::{Body, Keys, record, token_text};
use crate::lock::{Protects, RedisLock};
use crate::store::{Granted, Store, Want, array, foreign, int, millis, parse_body};

/// Keeps sessions in Redis; clones share connections, queue places and subscription.
///
/// Cheap to clone. Connections are made when needed, on the runtime that needs them, and made anew when they broke.
#[derive(Clone)]
pub struct RedisHandler {
    store: Arc<Store>,
    lock: Arc<dyn SessionLock>,
    admin: RedisAdmin,
}

impl RedisHandler {
    /// Connects to the server or servers of `config`.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if no server answers, [`Config`](ErrorKind::Config) if it refuses user, password or
    /// database, or if a setting or a certificate cannot be used.
    pub async fn connect(config: RedisConfig) -> Result<Self> {
        Ok(Self::over(config.connect().await?))
    }

    /// Uses a client that exists already, with what `config` says beside address, user, password, database and TLS.
    ///
    /// The client is one of a single server; connections of its own are made from it.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn from_client(client: redis::Client, config: RedisConfig) -> Result<Self> {
        Ok(Self::over(config.connect_with(client).await?))
    }

    /// Returns the lock of this store, to be used alone. It excludes the exclusive openings of this handler, too.
    #[must_use]
    pub fn lock(&self) -> RedisLock {
        RedisLock::over(self.store.clone())
    }

    fn over(store: Arc<Store>) -> Self {
        Self { lock: Arc::new(RedisLock::over(store.clone())), admin: RedisAdmin::over(store.clone()), store }
    }
}

impl fmt::Debug for RedisHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisHandler").field("store", &self.store).finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionHandler for RedisHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let keys = Arc::new(self.store.keys(id));
        let mut opening = RedisOpening {
            store: self.store.clone(),
            lock: self.lock.clone(),
            id: id.clone(),
            keys: keys.clone(),
            request: *request,
            held: None,
            protects: None,
            token: None,
            basis: Basis::Unseen,
            fetched: None,
            unsettled: false,
            end: None,
        };
        match (request.access, request.expect) {
            (Access::Destroy, _) | (_, Expect::Fresh) => {}
            (Access::Exclusive { wait, lease }, expect) => {
                let want = if expect == Expect::Existing { Want::Existing } else { Want::Any };
                let (token, value, granted) = self.store.acquire("open", keys, want, wait, lease).await?;
                match granted {
                    Granted::Absent => opening.see(Body::Absent, -2),
                    Granted::Locked { body, left, .. } => {
                        opening.hold(token, value, lease);
                        opening.see(body, left);
                    }
                }
            }
            (Access::ReadOnly | Access::Optimistic, _) => {
                let (body, left) = self.store.look(&keys).await.map_err(|failure| failure.into_error("open"))?;
                opening.see(body, left);
            }
        }
        Ok(Box::new(opening))
    }

    /// Redis expires records by itself.
    async fn gc(&self, _limit: NonZeroU32) -> Result<u64> {
        Ok(0)
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        Some(&self.admin)
    }
}

struct RedisOpening {
    store: Arc<Store>,
    lock: Arc<dyn SessionLock>,
    id: SessionId,
    keys: Arc<Keys>,
    request: OpenRequest,
    held: Option<Held>,
    protects: Option<Arc<Protects>>,
    /// The token of the lock while it is ours, or may be, and the value that the lock then has: also of one that the first write of
    /// a fresh id is to take.
    token: Option<(LeaseToken, Vec<u8>)>,
    basis: Basis,
    fetched: Option<Option<Record>>,
    /// Whether a write was sent that was never answered: a refusal may then be of its own repeat (`protocol.md` 4).
    unsettled: bool,
    end: Option<End>,
}

/// What an opening goes by when it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Basis {
    /// It has not looked, because the id is fresh.
    Unseen,
    /// It found nothing, or the trace of a destroyed record.
    Absent { mark: Option<WriteId> },
    /// It found the record that this write left.
    Written(WriteId),
    /// It found nothing where it had expected something, so there is nothing that it may write.
    Barred,
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

/// What a change leaves of the opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Keep,
    Close,
}

impl RedisOpening {
    fn hold(&mut self, token: LeaseToken, value: Vec<u8>, length: Duration) {
        let protects = Arc::new(Protects::default());
        let lease = Lease::new(self.id.clone(), token, length).with_state(protects.clone());
        self.held = Some(Held { lease: Arc::new(lease), lock: self.lock.clone() });
        self.protects = Some(protects);
        self.token = Some((token, value));
    }

    /// Takes over what the store answered.
    fn see(&mut self, body: Body, left: i64) {
        let (found, basis) = match body {
            Body::Live { last, data } => (Some(record(data, left)), Basis::Written(last)),
            Body::Buried { mark } => (None, Basis::Absent { mark: Some(mark) }),
            Body::Absent | Body::Foreign => (None, Basis::Absent { mark: None }),
        };
        self.basis = match basis {
            Basis::Absent { .. } if self.request.expect != Expect::Any => Basis::Barred,
            basis => basis,
        };
        self.protect();
        self.fetched = Some(found);
    }

    /// Tells the renewal whether there is a record to keep alive.
    fn protect(&self) {
        if let Some(protects) = &self.protects {
            protects.set(matches!(self.basis, Basis::Written(_)));
        }
    }

    fn exclusive(&self) -> Option<Duration> {
        match self.request.access {
            Access::Exclusive { lease, .. } => Some(lease),
            Access::ReadOnly | Access::Optimistic | Access::Destroy => None,
        }
    }

    /// Returns the value of our lock; no lock has this one if we have none.
    fn lock_value(&self) -> &[u8] {
        self.token.as_ref().map_or(&[b'-'; 32], |(_, value)| value)
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
        let max = self.store.config.max_bytes;
        if record.data.len() > max {
            let fact = format!("a payload of {} bytes, at most {max} are allowed", record.data.len());
            return Err(Error::new(ErrorKind::TooLarge, "write", fact));
        }
        if let Some(end) = self.end {
            // A repeat after a lost answer: the first copy has closed this opening.
            let (body, _) = self.store.look(&self.keys).await.map_err(|failure| failure.into_outcome("write", true))?;
            return match body {
                Body::Live { last, .. } if last == id => Ok(Written::AlreadyApplied),
                _ => Err(end.error("write")),
            };
        }
        let takes = match self.exclusive() {
            Some(length) if then == Then::Keep && self.basis == Basis::Unseen => {
                if self.token.is_none() {
                    let token = LeaseToken::random()?;
                    // Kept from the first copy on, so that a repeat takes the same lock.
                    self.token = Some((token, self.store.lock_value(&token_text(token), length)));
                }
                Some(length)
            }
            _ => None,
        };
        let body = Body::live(id, &record.data);
        let outcome = self.change("write", b'w', record.ttl, &body, then).await;
        if outcome.is_ok() {
            if let Some(length) = takes
                && let Some((token, value)) = self.token.take()
            {
                self.hold(token, value, length);
            }
            self.basis = Basis::Written(id);
            self.protect();
        }
        outcome
    }

    async fn move_deadline(&mut self, ttl: Ttl, then: Then) -> Result<Written> {
        self.may_write("touch")?;
        if let Some(end) = self.end {
            return Err(end.error("touch"));
        }
        self.change("touch", b't', ttl, b"", then).await
    }

    /// Sends a change and draws the consequences of its outcome. Unless it was refused, the script has drawn those for the lock.
    async fn change(&mut self, operation: &'static str, what: u8, ttl: Ttl, body: &[u8], then: Then) -> Result<Written> {
        let (basis, found) = match self.basis {
            // Nothing under this id can be ours, so there is nothing to ask.
            Basis::Barred => {
                self.ended(End::Refused(ErrorKind::Gone));
                return Err(End::Refused(ErrorKind::Gone).error(operation));
            }
            Basis::Written(prev) => (b'w', Some(Body::live_header(prev))),
            Basis::Absent { mark } if what == b'w' => (b'a', mark.map(Body::buried_header)),
            Basis::Absent { .. } | Basis::Unseen => (b'u', None),
        };
        let access = if self.exclusive().is_some() { b'e' } else { b'o' };
        // A save under the name of the write before is a repeat, for which the short way is too short.
        let repeat = found.as_ref().is_some_and(|found| body.starts_with(found));
        let next = match then {
            Then::Keep => b'k',
            Then::Close if repeat => b'r',
            Then::Close => b'c',
        };
        let how = [basis, access, what, next];
        let none: &[u8] = b"";
        let ttl = ttl.as_millis().to_string();
        let value = self.lock_value().to_vec();
        let args: [&[u8]; 5] = [&value, found.as_ref().map_or(none, |found| found), ttl.as_bytes(), body, &how];
        let before = std::mem::replace(&mut self.unsettled, true);
        let (answer, sent) = self.store.change(&self.keys, &self.store.scripts.save, &args).await;
        let answer = match answer.and_then(|answer| int(&answer)) {
            Ok(answer) => answer,
            Err(failure) => {
                self.unsettled = before || sent || failure.sent;
                let error = failure.into_outcome(operation, before || sent);
                if !error.kind().keeps_opening() {
                    self.refuse(error.kind());
                }
                return Err(error);
            }
        };
        let refused = if access == b'e' && basis != b'u' { ErrorKind::Fenced } else { ErrorKind::Conflict };
        let kind = match answer {
            1 | 2 => {
                self.unsettled = false;
                // What the open fetched is older than what is there now.
                self.fetched = None;
                if then == Then::Close {
                    self.ended(End::Closed);
                }
                let first = answer == 1 || sent && !before;
                return Ok(if first { Written::Applied } else { Written::AlreadyApplied });
            }
            0 => refused,
            -1 => ErrorKind::Gone,
            _ => ErrorKind::Corrupt,
        };
        if before || sent {
            self.unsettled = true;
            return Err(Error::new(
                ErrorKind::Unknown,
                operation,
                "it was sent before without an answer, and is refused now",
            ));
        }
        self.unsettled = false;
        if answer == 0 {
            self.refuse(kind);
        } else {
            self.ended(End::Refused(kind));
        }
        Err(match kind {
            ErrorKind::Corrupt => foreign().into_error(operation),
            kind => End::Refused(kind).error(operation),
        })
    }

    async fn remove(&mut self, then: Then) -> Result<Option<Record>> {
        if self.request.access == Access::ReadOnly {
            return Err(Error::new(ErrorKind::Unsupported, "destroy", "the session was opened to be read only"));
        }
        let mark = WriteId::random()?.to_bytes();
        let lease = millis(self.exclusive().unwrap_or_default()).to_string();
        let close: &[u8] = if then == Then::Close { b"1" } else { b"0" };
        // A create of ours may still be under way, and must find a trace.
        let trace: &[u8] = if self.basis == Basis::Unseen && self.unsettled { b"1" } else { b"0" };
        let token = self.lock_value()[..32].to_vec();
        let args: [&[u8]; 5] = [&token, &mark, lease.as_bytes(), close, trace];
        let (answer, sent) = self.store.change(&self.keys, &self.store.scripts.destroy, &args).await;
        let removed = answer.and_then(removed).map_err(|failure| failure.into_outcome("destroy", sent))?;
        self.fetched = None;
        self.basis = Basis::Barred;
        self.protect();
        if then == Then::Close {
            self.ended(End::Closed);
        }
        Ok(removed)
    }

    async fn give_back(&mut self) -> Result<()> {
        let token = self.token.take();
        self.ended(End::Closed);
        let Some((_, value)) = token else { return Ok(()) };
        let args: [&[u8]; 3] = [&value, b"1", b"0"];
        let answer = self.store.run(&self.keys, &self.store.scripts.release, &args).await;
        answer.map(|_| ()).map_err(|failure| failure.into_outcome("close", false))
    }

    /// Ends the opening after an error, and gives back a lock that a script has left to it.
    fn refuse(&mut self, kind: ErrorKind) {
        if let Some((token, _)) = self.token.take() {
            self.store.release_later(self.keys.clone(), token_text(token), true);
        }
        self.ended(End::Refused(kind));
    }

    fn ended(&mut self, end: End) {
        self.held = None;
        self.protects = None;
        self.token = None;
        self.fetched = None;
        self.end.get_or_insert(end);
    }
}

fn removed(answer: Value) -> Result<Option<Record>, crate::link::Failure> {
    let mut parts = array(answer)?.into_iter();
    let mut next = || parts.next().unwrap_or(Value::Nil);
    match int(&next())? {
        -2 => Err(foreign()),
        1 => match (parse_body(next())?, int(&next())?) {
            (Body::Live { data, .. }, left) => Ok(Some(record(data, left))),
            _ => Ok(None),
        },
        _ => Ok(None),
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl OpenSession for RedisOpening {
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
        let (body, left) = self.store.look(&self.keys).await.map_err(|failure| failure.into_error("read"))?;
        // A fresh id stays fresh, whatever is there, and an exclusive opening that was refused its lock never gets to write.
        let stays = self.basis == Basis::Unseen || (self.exclusive().is_some() && self.token.is_none());
        let basis = self.basis;
        self.see(body, left);
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
        match change {
            Change::Write(record) => self.put(record, id, Then::Close).await,
            Change::Touch(ttl) => self.move_deadline(*ttl, Then::Close).await,
            Change::Destroy => self.remove(Then::Close).await.map(|_| Written::Applied),
            Change::Nothing => self.give_back().await.map(|()| Written::Applied),
        }
    }

    fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }
}

impl Drop for RedisOpening {
    fn drop(&mut self) {
        if let Some((token, _)) = self.token.take() {
            self.store.release_later(self.keys.clone(), token_text(token), true);
        }
    }
}

impl fmt::Debug for RedisOpening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisOpening").field("request", &self.request).finish_non_exhaustive()
    }
}
