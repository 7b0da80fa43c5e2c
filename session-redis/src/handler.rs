//! The contract over Redis: a store with leases, whose atomic steps are scripts; see `scripts/`.
//!
//! What an opening is based on, and what an answer means for it, is the business of [`session_core::leased`].

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::{Cmd, ServerErrorKind, Value};
use session_core::leased::{
    Action, Asked, Basis, Failed, Found, Granted, Leased, LeasedStore, Removal, Renewal, Renewed, Step, Then, Verdict, Want,
};
use session_core::{LeaseToken, OpenRequest, OpenSession, Record, Result, SessionAdmin, SessionHandler, SessionId};

use crate::acquire::Claim;
use crate::admin::RedisAdmin;
use crate::answers::{array, foreign, int, parse_body};
use crate::batches::{Change, NOBODY};
use crate::config::RedisConfig;
use crate::layout::{Body, Keys, record, token_text};
use crate::link::{Failure, error_kind};
use crate::lock::RedisLock;
use crate::store::{Store, millis};

/// Keeps sessions in Redis; clones share connections, queue places and subscription.
///
/// Cheap to clone. Connections are made when needed, on the runtime that needs them, and made anew when they broke.
#[derive(Clone)]
pub struct RedisHandler {
    sessions: Leased<Store>,
    admin: RedisAdmin,
}

impl RedisHandler {
    /// Connects to the server or servers of `config`.
    ///
    /// # Errors
    /// [`Unavailable`](session_core::ErrorKind::Unavailable) if no server answers, [`Config`](session_core::ErrorKind::Config) if it
    /// refuses user, password or database, or if a setting or a certificate cannot be used.
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
        RedisLock::over(self.sessions.lock())
    }

    fn over(store: Arc<Store>) -> Self {
        Self { admin: RedisAdmin::over(store.clone()), sessions: Leased::new(store) }
    }
}

impl fmt::Debug for RedisHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisHandler").field("store", self.sessions.store()).finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionHandler for RedisHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        self.sessions.open(id, request).await
    }

    /// Redis expires records by itself.
    async fn gc(&self, _limit: NonZeroU32) -> Result<u64> {
        Ok(0)
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        Some(&self.admin)
    }
}

impl LeasedStore for Store {
    type Place = Keys;
    type Claim = Claim;

    fn place(&self, id: &SessionId) -> Keys {
        self.keys(id)
    }

    fn claim(&self, lease: Duration) -> Result<Claim> {
        let token = LeaseToken::random()?;
        Ok(Claim { token, lease, value: self.lock_value(&token_text(token), lease) })
    }

    fn token(claim: &Claim) -> LeaseToken {
        claim.token
    }

    fn max_bytes(&self) -> usize {
        self.config.max_bytes
    }

    async fn acquire(
        self: &Arc<Self>,
        operation: &'static str,
        keys: &Arc<Keys>,
        want: Want,
        wait: Duration,
        lease: Duration,
    ) -> Result<Granted<Claim>> {
        let claim = self.claim(lease)?;
        let granted = self.take(operation, keys, want, wait, &claim).await?;
        Ok(match granted {
            None => Granted::Absent,
            Some((found, clean)) => Granted::Locked { claim, found, clean },
        })
    }

    async fn look(&self, operation: &'static str, keys: &Keys) -> Result<Found, Failed> {
        self.read_record(keys).await.map_err(|failure| failure.into_failed(operation))
    }

    async fn change(&self, keys: &Keys, step: &Step<'_, Claim>) -> Asked<Verdict> {
        let (what, ttl, body) = match step.action {
            Action::Write { id, data, ttl } => (b'w', ttl, Body::live(id, data)),
            Action::Touch { ttl } => (b't', ttl, Vec::new()),
        };
        let (basis, found) = match step.basis {
            Basis::Written(prev) => (b'w', Some(Body::live_header(prev))),
            Basis::Absent { mark } if what == b'w' => (b'a', mark.map(Body::buried_header)),
            Basis::Absent { .. } | Basis::Unseen => (b'u', None),
        };
        // A save under the name of the write before is a repeat, for which the short way is too short.
        let repeat = found.as_ref().is_some_and(|found| body.starts_with(found));
        let next = match step.then {
            Then::Keep => b'k',
            Then::Close if repeat => b'r',
            Then::Close => b'c',
        };
        let how = [basis, if step.lease.is_some() { b'e' } else { b'o' }, what, next];
        let value = step.claim.map(|claim| claim.value.clone());
        let change = Change { value, found, ttl: ttl.as_millis(), body, how };
        let (answer, repeated) = self.judge(keys, change).await;
        let answer = answer.and_then(|answer| match int(&answer)? {
            1 => Ok(Verdict::Applied),
            3 => {
                self.crowds.note(keys.record());
                Ok(Verdict::Applied)
            }
            2 => Ok(Verdict::AlreadyApplied),
            0 => Ok(Verdict::Refused),
            -1 => Ok(Verdict::Gone),
            _ => Err(foreign()),
        });
        Asked { answer: answer.map_err(|failure| failure.into_failed(step.operation())), repeated }
    }

    async fn remove(&self, keys: &Keys, step: &Removal<'_, Claim>) -> Asked<Option<Record>> {
        let flag = |on: bool| -> &[u8] { if on { b"1" } else { b"0" } };
        let lease = millis(step.lease).to_string();
        let (close, trace) = (flag(step.then == Then::Close), flag(step.trace));
        let args: [&[u8]; 5] = [
            &step.claim.map_or(NOBODY, |claim| claim.value.first_chunk().unwrap_or(NOBODY))[..],
            &step.mark.to_bytes(),
            lease.as_bytes(),
            close,
            trace,
        ];
        let (answer, repeated) = self.run_once(keys, &self.scripts.destroy, &args).await;
        let answer = answer.and_then(removed).map_err(|failure| failure.into_failed("destroy"));
        Asked { answer, repeated }
    }

    async fn renew(&self, leases: &[Renewal<Keys>]) -> Vec<Result<Renewed, Failed>> {
        let flight = |whole: bool| leases.iter().map(|lease| (lease.place.slot(), self.renewal(lease, whole))).collect();
        let mut answers = self.ask_many(flight(false)).await;
        if answers.iter().flatten().any(|answer| error_kind(answer) == Some(ServerErrorKind::NoScript)) {
            answers = self.ask_many(flight(true)).await;
        }
        let outcome = |answer: Result<Value, Failure>| match answer.and_then(|answer| int(&answer)) {
            Ok(1) => Ok(Renewed::Renewed),
            Ok(0) => Ok(Renewed::Ended),
            Ok(_) => Ok(Renewed::Gone),
            Err(failure) => Err(failure.into_failed("renew")),
        };
        answers.into_iter().map(outcome).collect()
    }

    async fn release(&self, operation: &'static str, keys: &Keys, token: LeaseToken) -> Result<(), Failed> {
        let args: [&[u8]; 3] = [&token_text(token), b"1", b"0"];
        let answer = self.run(keys, &self.scripts.release, &args).await;
        answer.map(drop).map_err(|failure| failure.into_failed(operation))
    }

    fn release_later(self: &Arc<Self>, keys: &Arc<Keys>, token: LeaseToken, clean: bool) {
        self.give_up_later(keys.clone(), token_text(token), clean);
    }
}

impl Store {
    fn renewal(&self, lease: &Renewal<Keys>, whole: bool) -> Cmd {
        let length = millis(lease.length).to_string();
        let record: &[u8] = if lease.protects { b"1" } else { b"0" };
        self.scripts.renew.call(&lease.place, &[&token_text(lease.token), length.as_bytes(), record], whole)
    }
}

fn removed(answer: Value) -> Result<Option<Record>, Failure> {
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
