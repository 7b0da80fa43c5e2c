//! The lock of a store, alone.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use session_core::{ErrorKind, Lease, LeaseRequest, Result, SessionId, SessionLock};

use super::{AGES, Store, fail};
use crate::liars::Flaw;

/// The lock of a store, alone.
pub(crate) struct StoreLock {
    pub(super) store: Arc<Store>,
    pub(super) instance: u64,
}

impl fmt::Debug for StoreLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreLock").finish_non_exhaustive()
    }
}

#[async_trait]
impl SessionLock for StoreLock {
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>> {
        let key = self.store.key(id);
        let taken = self.store.acquire(&key, self.instance, *request, false).await?;
        let (token, clean) = taken.expect("only an opening gives up because the session is absent");
        let told = if self.store.is(Flaw::LeaseTellsAnotherLength) { AGES } else { request.lease };
        Ok(Arc::new(Lease::new(id.clone(), token, told).after_clean_release(clean)))
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        let store = &self.store;
        let now = Instant::now();
        let mut outcomes: Vec<Result<()>> = leases
            .iter()
            .map(|lease| {
                let length = if store.is(Flaw::RenewalIgnoresLength) { Duration::from_millis(20) } else { lease.length() };
                store.with(&store.key(lease.id()), |cell, latch| {
                    if store.is(Flaw::RenewalDoesNothing) {
                        return Ok(());
                    }
                    if !latch.is_of(Some(lease.token())) {
                        if store.is(Flaw::RenewalOfLostSucceeds) {
                            return Ok(());
                        }
                        if !store.is(Flaw::RenewalTakesBack) {
                            lease.mark_lost();
                            return Err(fail(ErrorKind::Fenced, "renew"));
                        }
                    }
                    if cell.record.as_ref().is_some_and(|record| record.deadline <= now) {
                        if store.is(Flaw::RenewalRevives) {
                            if let Some(record) = cell.record.as_mut() {
                                record.deadline = now + length * 2;
                            }
                        } else {
                            return Err(fail(ErrorKind::Gone, "renew"));
                        }
                    }
                    if let Some(hold) = latch.hold.as_mut() {
                        hold.token = lease.token();
                        hold.until = now + length;
                    }
                    if !store.is(Flaw::RenewalDoesNotProlong) {
                        Store::prolong(cell, length, now);
                    }
                    Ok(())
                })
            })
            .collect();
        match store.flaw {
            Flaw::RenewalAnswersReversed => outcomes.reverse(),
            Flaw::RenewalAnswersOne => outcomes.truncate(1),
            _ => {}
        }
        outcomes
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let any = self.store.is(Flaw::ReleaseFreesAnyLock);
        self.store.release(&self.store.key(lease.id()), Some(lease.token()), any);
        Ok(())
    }

    fn abandon(&self, lease: Arc<Lease>) {
        let key = self.store.key(lease.id());
        match self.store.flaw {
            Flaw::DroppedOpeningKeepsLock => self.store.with(&key, |_, latch| {
                if let Some(hold) = latch.hold.as_mut().filter(|hold| hold.token == lease.token()) {
                    hold.until = Instant::now() + AGES;
                }
            }),
            flaw => self.store.release(&key, Some(lease.token()), flaw == Flaw::DropFreesAnyLock),
        }
    }
}
