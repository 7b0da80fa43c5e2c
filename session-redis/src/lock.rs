//! The lock of the Redis backend, to be used alone and for renewing what the handler holds.
//!
//! How it is taken stands in `store`; nothing here knows about records, except that a held one has to outlive the hold.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use redis::{Cmd, ServerErrorKind, Value};
use session_core::{Error, ErrorKind, Lease, LeaseRequest, Result, SessionId, SessionLock};

use crate::config::RedisConfig;
use crate::layout::{Keys, token_text};
use crate::link::{Failure, error_kind};
use crate::store::{Granted, Store, Want, int, millis};

/// Whether there is a record that a renewal has to keep alive; kept in the lease by the handler.
#[derive(Debug, Default)]
pub(crate) struct Protects(AtomicBool);

impl Protects {
    pub(crate) fn set(&self, record: bool) {
        self.0.store(record, Ordering::Release);
    }
}

/// One holder at a time, in Redis: a token with a deadline, a queue, and a message to the next in line.
///
/// Locks for Redis records are part of [`RedisHandler`](crate::RedisHandler) already. This one is for other purposes, such as
/// [`Locked`](session_core::Locked) over a handler that keeps its records elsewhere. A lease counts as following a clean release
/// only if the holder before handed it over; a lock that was found free may have ended without its holder.
#[derive(Clone)]
pub struct RedisLock {
    store: Arc<Store>,
}

impl RedisLock {
    /// Connects to the server of `config`.
    ///
    /// # Errors
    /// As [`RedisHandler::connect`](crate::RedisHandler::connect).
    pub async fn connect(config: RedisConfig) -> Result<Self> {
        Ok(Self { store: config.connect().await? })
    }

    pub(crate) fn over(store: Arc<Store>) -> Self {
        Self { store }
    }

    fn call(&self, lease: &Lease, protects: bool, keys: &Keys, whole: bool) -> Cmd {
        let length = millis(lease.length()).to_string();
        let record: &[u8] = if protects { b"1" } else { b"0" };
        self.store.scripts.renew.call(keys, &[&token_text(lease.token()), length.as_bytes(), record], whole)
    }
}

impl fmt::Debug for RedisLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLock").finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionLock for RedisLock {
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>> {
        let keys = Arc::new(self.store.keys(id));
        let (token, _, granted) = self.store.acquire("acquire", keys, Want::Lock, request.wait, request.lease).await?;
        let clean = matches!(granted, Granted::Locked { clean: true, .. });
        Ok(Arc::new(Lease::new(id.clone(), token, request.lease).after_clean_release(clean)))
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        let mut calls = Vec::with_capacity(leases.len());
        for lease in leases {
            let protects = {
                let state = lease.state().lock().await;
                state.downcast_ref::<Arc<Protects>>().is_some_and(|protects| protects.0.load(Ordering::Acquire))
            };
            let keys = self.store.keys(lease.id());
            calls.push((keys, protects));
        }
        let flight = |whole: bool| {
            let calls = leases.iter().zip(&calls);
            calls.map(|(lease, (keys, protects))| (keys.slot(), self.call(lease, *protects, keys, whole))).collect()
        };
        let mut answers = self.store.ask_many(flight(false)).await;
        if answers.iter().flatten().any(|answer| error_kind(answer) == Some(ServerErrorKind::NoScript)) {
            answers = self.store.ask_many(flight(true)).await;
        }
        leases.iter().zip(answers).map(|(lease, answer)| outcome(lease, answer)).collect()
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let keys = self.store.keys(lease.id());
        let args: [&[u8]; 3] = [&token_text(lease.token()), b"1", b"0"];
        let answer = self.store.run(&keys, &self.store.scripts.release, &args).await;
        answer.map(|_| ()).map_err(|failure| failure.into_outcome("release", false))
    }

    /// Frees the lock in the background. It does not count as a clean release: a write of the former holder may still be under
    /// way to whatever store this lock stands before.
    fn abandon(&self, lease: Arc<Lease>) {
        self.store.release_later(Arc::new(self.store.keys(lease.id())), token_text(lease.token()), false);
    }
}

fn outcome(lease: &Lease, answer: Result<Value, Failure>) -> Result<()> {
    match answer.and_then(|answer| int(&answer)) {
        Ok(1) => Ok(()),
        Ok(0) => {
            lease.mark_lost();
            Err(Error::new(ErrorKind::Fenced, "renew", "the lease has ended"))
        }
        Ok(_) => Err(Error::new(ErrorKind::Gone, "renew", "the session has expired")),
        Err(failure) => Err(failure.into_outcome("renew", false)),
    }
}
