//! The lock of the SQL backend, to be used alone.
//!
//! How it is taken stands in `store`; nothing here knows about records.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use session_core::leased::LeasedLock;
use session_core::{Lease, LeaseRequest, Result, SessionId, SessionLock};

use crate::config::SqlConfig;
use crate::store::Store;

/// One holder at a time, in a table: a token with a deadline, and one who is next in line.
///
/// Locks for records of the same table are part of [`SqlHandler`](crate::SqlHandler) already. This one is for other purposes, such
/// as [`Locked`](session_core::Locked) over a handler that keeps its records elsewhere. A lease counts as following a clean release
/// only if the holder before handed it over; a lock that was found free may have ended without its holder.
#[derive(Clone)]
pub struct SqlLock {
    lock: LeasedLock<Store>,
}

impl SqlLock {
    /// Connects to the database of `config`.
    ///
    /// # Errors
    /// As [`SqlHandler::connect`](crate::SqlHandler::connect).
    pub async fn connect(config: SqlConfig) -> Result<Self> {
        Ok(Self::over(LeasedLock::new(config.connect().await?)))
    }

    pub(crate) fn over(lock: LeasedLock<Store>) -> Self {
        Self { lock }
    }
}

impl fmt::Debug for SqlLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlLock").finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionLock for SqlLock {
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
