//! The lock of the Redis backend, to be used alone.
//!
//! How it is taken stands in `acquire`; nothing here knows about records.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use session_core::leased::LeasedLock;
use session_core::{Lease, LeaseRequest, Result, SessionId, SessionLock};

use crate::config::RedisConfig;
use crate::store::Store;

/// One holder at a time, in Redis: a token with a deadline, a queue, and a message to the next in line.
///
/// Locks for Redis records are part of [`RedisHandler`](crate::RedisHandler) already. This one is for other purposes, such as
/// [`Locked`](session_core::Locked) over a handler that keeps its records elsewhere. A lease counts as following a clean release
/// only if the holder before handed it over; a lock that was found free may have ended without its holder.
#[derive(Clone)]
pub struct RedisLock {
    lock: LeasedLock<Store>,
}

impl RedisLock {
    /// Connects to the server of `config`.
    ///
    /// # Errors
    /// As [`RedisHandler::connect`](crate::RedisHandler::connect).
    pub async fn connect(config: RedisConfig) -> Result<Self> {
        Ok(Self::over(LeasedLock::new(config.connect().await?)))
    }

    pub(crate) fn over(lock: LeasedLock<Store>) -> Self {
        Self { lock }
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
        self.lock.acquire(id, request).await
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        self.lock.renew(leases).await
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        self.lock.release(lease).await
    }

    fn abandon(&self, lease: Arc<Lease>) {
        self.lock.abandon(lease);
    }
}
