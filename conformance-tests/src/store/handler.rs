//! Opening and collecting: what the handler of a store does itself.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use session_core::{
    Access, ErrorKind, Expect, LeaseRequest, OpenRequest, OpenSession, Record, Result, SessionAdmin, SessionHandler,
    SessionId, Ttl, WriteId,
};

use super::fence::Base;
use super::opening::Opening;
use super::queue::Latch;
use super::{AGES, Cell, GAP, Store, fail};
use crate::liars::Flaw;

/// The handler of a store; each stands for a process.
pub(crate) struct StoreHandler {
    pub(super) store: Arc<Store>,
    pub(super) instance: u64,
    /// What readers of this handler have seen, for a flaw.
    pub(super) seen: Mutex<BTreeMap<String, Option<Record>>>,
}

impl fmt::Debug for StoreHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreHandler").finish_non_exhaustive()
    }
}

#[async_trait]
impl SessionHandler for StoreHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let store = &self.store;
        let key = store.key(id);
        let permit = if store.is(Flaw::EightOpeningsAtATime) {
            let permit = tokio::time::timeout(Duration::from_secs(2), store.openings.clone().acquire_owned()).await;
            Some(permit.map_err(|_| fail(ErrorKind::Unavailable, "open"))?.expect("nobody closes the semaphore"))
        } else {
            None
        };
        let mut opening = Opening {
            store: store.clone(),
            id: id.clone(),
            key: key.clone(),
            access: request.access,
            expect: request.expect,
            held: None,
            base: Base::Absent(None),
            fetched: None,
            first: None,
            name: WriteId::random()?,
            sent: HashSet::new(),
            closed: false,
            destroyed: false,
            wrote: false,
            instance: self.instance,
            _permit: permit,
        };
        let absent_at_once = request.expect == Expect::Existing && !store.is_live(&key);
        match request.access {
            Access::Destroy => {
                opening.fetch(true);
                opening.fetched = None;
            }
            Access::ReadOnly => {
                if store.is(Flaw::ReaderWaits) {
                    store.wait_until_free(&key, None).await;
                }
                if store.is(Flaw::ReaderHolds) {
                    let request = LeaseRequest { wait: Duration::ZERO, lease: Duration::from_secs(60) };
                    if let Ok(Some((token, clean))) = store.acquire(&key, self.instance, request, false).await {
                        opening.hold(token, clean, request.lease);
                    }
                }
                opening.fetch(true);
                if store.is(Flaw::ReadsAreSharedByReaders) {
                    let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                    let shared = seen.entry(key).or_insert_with(|| opening.fetched.clone().flatten());
                    opening.fetched = Some(shared.clone());
                }
            }
            Access::Optimistic if request.expect == Expect::Fresh => opening.fetched = Some(None),
            Access::Optimistic => {
                if store.is(Flaw::OptimismWaits) {
                    store.wait_until_free(&key, None).await;
                }
                opening.fetch(true);
            }
            Access::Exclusive { wait, lease } => {
                let request_lease = LeaseRequest { wait, lease };
                if request.expect == Expect::Fresh && !store.is(Flaw::FreshLocksAtOpen) {
                    opening.fetched = Some(None);
                    return Ok(Box::new(opening));
                }
                if absent_at_once {
                    if store.is(Flaw::ExistingLitters) {
                        let empty = Record::new([], Ttl::from_secs(900));
                        store.with(&key, |cell, _| {
                            store.apply(cell, opening.name, &empty, opening.name, Instant::now());
                        });
                    }
                    if store.is(Flaw::ExistingWaitsForAbsent) {
                        store.wait_until_free(&key, None).await;
                    }
                    if !store.is(Flaw::ExistingLocksAbsent) {
                        opening.fetch(true);
                        return Ok(Box::new(opening));
                    }
                }
                if store.is(Flaw::ReadsBeforeLock) {
                    opening.fetch(true);
                }
                let absent_is_in = request.expect == Expect::Existing && !store.is(Flaw::ExistingLocksAbsent);
                if let Some((token, clean)) = store.acquire(&key, self.instance, request_lease, absent_is_in).await? {
                    opening.hold(token, clean, lease);
                }
                // Before it is read: what is found alive has to outlive the hold.
                if opening.held.is_some() && !store.is(Flaw::OpenDoesNotProlong) {
                    store.with(&key, |cell, _| Store::prolong(cell, lease, Instant::now()));
                }
                if !store.is(Flaw::ReadsBeforeLock) {
                    opening.fetch(true);
                }
                if absent_is_in && opening.fetched == Some(None) {
                    opening.let_go();
                }
            }
        }
        Ok(Box::new(opening))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        let store = &self.store;
        let alone = !store.collecting.swap(true, Ordering::SeqCst);
        if store.is(Flaw::GcRunsAlone) && !alone {
            return Err(fail(ErrorKind::Unavailable, "gc"));
        }
        let limit = if store.is(Flaw::GcIgnoresLimit) { usize::MAX } else { limit.get() as usize };
        let keys: Vec<String> = store.inner().cells.keys().cloned().collect();
        let dead = |cell: &Cell, latch: &Latch| {
            let now = Instant::now();
            let held = latch.held(now);
            cell.record.as_ref().is_some_and(|record| match (store.flaw, held) {
                (Flaw::GcTakesHeld, Some(hold)) => record.deadline < now + hold.length * 2,
                (_, Some(_)) => false,
                (Flaw::GcTakesTheLiving, None) => record.deadline <= now + AGES,
                (Flaw::GcTakesRenewed, None) => record.first_deadline <= now,
                (_, None) => record.deadline <= now,
            })
        };
        let two_steps = matches!(store.flaw, Flaw::GcTakesReplaced | Flaw::GcCountsTwice);
        let mut freed = 0;
        let mut found = Vec::new();
        let mut trusted = std::mem::take(&mut *store.left.lock().unwrap_or_else(PoisonError::into_inner));
        for key in trusted.drain(..trusted.len().min(limit)) {
            freed += store.with(&key, |cell, _| u64::from(cell.record.take().is_some()));
        }
        for key in keys {
            if freed as usize + found.len() >= limit {
                if store.is(Flaw::GcTrustsEarlierFinds) && store.with(&key, |cell, latch| dead(cell, latch)) {
                    trusted.push(key);
                }
                continue;
            }
            if store.is(Flaw::GcWaits) {
                store.wait_until_free(&key, None).await;
            }
            let now = Instant::now();
            freed += store.with(&key, |cell, latch| {
                let mut counted = 0;
                if dead(cell, latch) {
                    if two_steps {
                        found.push(key.clone());
                    } else {
                        cell.record = None;
                        counted += 1;
                    }
                }
                if cell.grave.is_some() && store.is(Flaw::GcCountsDestroyed) {
                    counted += 1;
                }
                cell.grave = cell.grave.filter(|(_, until)| *until > now);
                counted
            });
        }
        if two_steps {
            tokio::time::sleep(GAP).await;
            for key in found {
                freed += 1;
                let still = |cell: &Cell, latch: &Latch| store.is(Flaw::GcTakesReplaced) || dead(cell, latch);
                store.with(&key, |cell, latch| {
                    if still(cell, latch) {
                        cell.record = None;
                    }
                });
            }
        } else if store.is(Flaw::GcRunsAlone) {
            tokio::time::sleep(GAP).await;
        }
        *store.left.lock().unwrap_or_else(PoisonError::into_inner) = trusted;
        store.collecting.store(false, Ordering::SeqCst);
        Ok(freed)
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        Some(self)
    }
}
