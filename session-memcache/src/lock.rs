//! The lock of the memcached backend, to be used alone.
//!
//! How it is taken stands in `acquire`; nothing here knows about records.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use session_core::leased::LeasedLock;
use session_core::{Lease, LeaseRequest, Result, SessionId, SessionLock};

use crate::config::MemcacheConfig;
use crate::store::Store;

/// One holder at a time, in memcached: an item that only one can add, and that only its number deletes.
///
/// It is as durable as the server's memory: a restart or an eviction ends it early. What is kept elsewhere must therefore have a
/// fence of its own, as [`Locked`](session_core::Locked) wants it.
///
/// Locks for records in memcached are part of [`MemcacheHandler`](crate::MemcacheHandler) already. This one is for other purposes, such
/// as [`Locked`](session_core::Locked) over a handler that keeps its records elsewhere. No lease counts as following a clean release:
/// a lock that was found free may have ended without its holder.
#[derive(Clone)]
pub struct MemcacheLock {
    lock: LeasedLock<Store>,
}

impl MemcacheLock {
    /// Connects to the servers of `config`.
    ///
    /// # Errors
    /// As [`MemcacheHandler::connect`](crate::MemcacheHandler::connect).
    pub async fn connect(config: MemcacheConfig) -> Result<Self> {
        Ok(Self::over(LeasedLock::new(config.connect().await?)))
    }

    pub(crate) fn over(lock: LeasedLock<Store>) -> Self {
        Self { lock }
    }
}

impl fmt::Debug for MemcacheLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemcacheLock").finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionLock for MemcacheLock {
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
