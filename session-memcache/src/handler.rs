//! The contract over memcached: a store with leases, whose one atomic step is to compare an item's number and store.
//!
//! What an opening is based on, and what an answer means for it, is the business of [`session_core::leased`].

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use session_core::leased::{
    Asked, Failed, Found, Granted, Leased, LeasedStore, Removal, Renewal, Renewed, Step, Verdict, Want,
};
use session_core::{LeaseToken, OpenRequest, OpenSession, Record, Result, SessionAdmin, SessionHandler, SessionId};

use crate::admin::MemcacheAdmin;
use crate::config::MemcacheConfig;
use crate::lock::MemcacheLock;
use crate::store::{Claim, Place, Store};
use crate::transport::Read;

/// Keeps sessions in memcached; clones share connections and places in line.
///
/// Cheap to clone. Connections are made when needed, on the runtime that needs them, and made anew when they broke.
#[derive(Clone)]
pub struct MemcacheHandler {
    sessions: Leased<Store>,
    admin: MemcacheAdmin,
}

impl MemcacheHandler {
    /// Connects to the servers of `config`.
    ///
    /// # Errors
    /// [`Unavailable`](session_core::ErrorKind::Unavailable) if no server answers; of several, one that does fails its own sessions
    /// later. [`Config`](session_core::ErrorKind::Config) if one refuses user and password, is too old, or is none, or if a setting
    /// cannot be used.
    pub async fn connect(config: MemcacheConfig) -> Result<Self> {
        let store = config.connect().await?;
        Ok(Self { admin: MemcacheAdmin::over(store.clone()), sessions: Leased::new(store) })
    }

    /// Returns the lock of this store, to be used alone. It excludes the exclusive openings of this handler, too.
    #[must_use]
    pub fn lock(&self) -> MemcacheLock {
        MemcacheLock::over(self.sessions.lock())
    }
}

impl fmt::Debug for MemcacheHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemcacheHandler").field("store", self.sessions.store()).finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionHandler for MemcacheHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        self.sessions.open(id, request).await
    }

    /// memcached expires records by itself.
    async fn gc(&self, _limit: NonZeroU32) -> Result<u64> {
        Ok(0)
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        Some(&self.admin)
    }
}

impl LeasedStore for Store {
    type Place = Place;
    type Claim = Claim;

    fn place(&self, id: &SessionId) -> Place {
        self.at(id)
    }

    fn claim(&self, lease: Duration) -> Result<Claim> {
        Self::new_claim(lease)
    }

    fn token(claim: &Claim) -> LeaseToken {
        claim.token
    }

    fn max_bytes(&self) -> usize {
        self.limit()
    }

    async fn acquire(
        self: &Arc<Self>,
        operation: &'static str,
        place: &Arc<Place>,
        want: Want,
        wait: Duration,
        lease: Duration,
    ) -> Result<Granted<Claim>> {
        self.take(operation, place, want, wait, Self::new_claim(lease)?).await
    }

    async fn look(&self, operation: &'static str, place: &Place) -> Result<Found, Failed> {
        let look = self.read(place, Read::Value).await;
        look.map(|look| look.found()).map_err(|failure| failure.into_failed(operation))
    }

    async fn change(&self, place: &Place, step: &Step<'_, Claim>) -> Asked<Verdict> {
        self.judge(place, step).await
    }

    async fn remove(&self, place: &Place, step: &Removal<'_, Claim>) -> Asked<Option<Record>> {
        self.bury(place, step).await
    }

    async fn renew(&self, leases: &[Renewal<Place>]) -> Vec<Result<Renewed, Failed>> {
        self.prolong_leases(leases).await
    }

    async fn release(&self, operation: &'static str, place: &Place, token: LeaseToken) -> Result<(), Failed> {
        self.let_go(place, token, true).await.map_err(|failure| failure.into_failed(operation))
    }

    fn release_later(self: &Arc<Self>, place: &Arc<Place>, token: LeaseToken, clean: bool) {
        self.let_go_later(place.clone(), token, clean);
    }
}
