//! What an opening does: read, write, destroy, close, and what becomes of it when it is dropped.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use session_core::{
    Access, Change, ErrorKind, Expect, Held, Lease, LeaseToken, OpenSession, Record, Result, SessionId, Ttl, WriteId,
    Written,
};
use tokio::sync::OwnedSemaphorePermit;

use super::fence::{Base, Verdict};
use super::lock::StoreLock;
use super::queue::Hold;
use super::{GAP, Store, Stored, fail};
use crate::liars::Flaw;

/// An opening of the store.
pub(super) struct Opening {
    pub(super) store: Arc<Store>,
    pub(super) id: SessionId,
    pub(super) key: String,
    pub(super) access: Access,
    pub(super) expect: Expect,
    pub(super) held: Option<Held>,
    pub(super) base: Base,
    pub(super) fetched: Option<Option<Record>>,
    /// What the first read said.
    pub(super) first: Option<Option<Record>>,
    pub(super) name: WriteId,
    pub(super) sent: HashSet<WriteId>,
    pub(super) closed: bool,
    pub(super) destroyed: bool,
    pub(super) wrote: bool,
    pub(super) instance: u64,
    pub(super) _permit: Option<OwnedSemaphorePermit>,
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Opening");
        match self.store.flaw {
            Flaw::DebugShowsId => debug.field("id", &self.id.as_str()),
            Flaw::DebugShowsPayload => {
                let text =
                    self.first.as_ref().and_then(Option::as_ref).map(|r| String::from_utf8_lossy(&r.data).into_owned());
                debug.field("data", &text)
            }
            _ => debug.field("access", &self.access),
        };
        debug.finish_non_exhaustive()
    }
}

impl Opening {
    pub(super) fn token(&self) -> Option<LeaseToken> {
        self.held.as_ref().map(|held| held.lease.token())
    }

    pub(super) fn hold(&mut self, token: LeaseToken, clean: bool, length: Duration) {
        let lease = Arc::new(Lease::new(self.id.clone(), token, length).after_clean_release(clean));
        self.held = Some(Held { lease, lock: Arc::new(StoreLock { store: self.store.clone(), instance: self.instance }) });
    }

    /// Gives the lock back, if it is this opening's.
    pub(super) fn let_go(&mut self) {
        if let Some(held) = self.held.take() {
            self.store.release(&self.key, Some(held.lease.token()), false);
        }
    }

    /// Asks the store, and bases the next write on the answer.
    pub(super) fn fetch(&mut self, at_open: bool) {
        let now = Instant::now();
        let store = self.store.clone();
        let (record, base) = store.with(&self.key, |cell, _| {
            if store.is(Flaw::ReadProlongs)
                && let Some(record) = cell.record.as_mut().filter(|record| record.deadline > now)
            {
                record.deadline = now + record.ttl.as_duration();
            }
            let live = if store.is(Flaw::ExpiredIsServed) { cell.record.as_ref() } else { cell.live(now) };
            let live = live.filter(|record| !(store.is(Flaw::EmptyIsAbsent) && record.data.is_empty()));
            match live {
                Some(stored) => {
                    let left = stored.deadline.saturating_duration_since(now);
                    let ttl = if store.is(Flaw::ReadReportsWholeLife) { stored.ttl } else { Ttl::new(left) };
                    let back = store.is(Flaw::ReaderGoesBack)
                        && matches!(self.access, Access::ReadOnly)
                        && store.instances.fetch_add(1, Ordering::Relaxed) % 4 == 3;
                    let data = stored.before.as_ref().filter(|_| back).unwrap_or(&stored.data);
                    (Some(Record::new(data.clone(), ttl)), Base::Record(stored.version))
                }
                None => (None, Base::Absent(cell.grave.map(|(name, _)| name))),
            }
        });
        let fresh = self.expect == Expect::Fresh && !self.wrote;
        if !matches!(self.base, Base::Spent(_)) && !fresh {
            self.base = base;
        }
        if at_open && self.first.is_none() {
            self.first = Some(record.clone());
        }
        self.fetched = Some(record);
    }

    fn may_write(&self) -> bool {
        match self.access {
            Access::ReadOnly => self.store.is(Flaw::ReadOnlyWrites),
            Access::Destroy => self.store.is(Flaw::DestroyAccessWrites),
            _ => true,
        }
    }

    /// Does what a write or a touch asks, in one step where the flaw allows.
    async fn put(&mut self, record: &Record, wid: WriteId, touch: bool) -> Result<Written> {
        let store = self.store.clone();
        if !self.may_write() {
            return Err(fail(ErrorKind::Unsupported, "write"));
        }
        if self.closed && !matches!(self.base, Base::Spent(_)) {
            self.base = Base::Spent(ErrorKind::Gone);
        }
        if store.is(Flaw::TooLargeDestroys) && record.data.len() > 512 * 1024 {
            store.with(&self.key, |cell, _| cell.record = None);
            return Err(fail(ErrorKind::TooLarge, "write"));
        }
        let first_of_fresh = self.expect == Expect::Fresh && !self.wrote;
        let exclusive = matches!(self.access, Access::Exclusive { .. });
        let in_two_steps = store.is(Flaw::ChecksThenStores) || (first_of_fresh && store.is(Flaw::FreshChecksThenCreates));
        if in_two_steps || store.is(Flaw::TearsWrites) {
            let verdict = store.with(&self.key, |cell, latch| store.judge(cell, latch, self, wid, touch, Instant::now()));
            if store.is(Flaw::TearsWrites) && verdict.is_ok() && !touch {
                store.with(&self.key, |cell, _| {
                    if let Some(stored) = cell.record.as_mut() {
                        let half = record.data.len().min(stored.data.len()) / 2;
                        stored.data[..half].copy_from_slice(&record.data[..half]);
                    }
                });
            }
            tokio::time::sleep(GAP).await;
            if !in_two_steps || verdict.is_err() {
                return self.finish(record, wid, touch, first_of_fresh && exclusive, None);
            }
            return self.finish(record, wid, touch, first_of_fresh && exclusive, verdict.ok());
        }
        self.finish(record, wid, touch, first_of_fresh && exclusive, None)
    }

    fn finish(
        &mut self,
        record: &Record,
        wid: WriteId,
        touch: bool,
        takes_lock: bool,
        judged: Option<Verdict>,
    ) -> Result<Written> {
        let store = self.store.clone();
        let now = Instant::now();
        let token = LeaseToken::random()?;
        let outcome: Result<_> = store.with(&self.key, |cell, latch| {
            let verdict = match judged {
                Some(verdict) => verdict,
                None => store.judge(cell, latch, self, wid, touch, now)?,
            };
            if matches!(verdict, Verdict::Already) {
                return Ok((Written::AlreadyApplied, None));
            }
            if touch && !store.is(Flaw::TouchIsAWrite) {
                if store.is(Flaw::TouchPutsBackOldBytes)
                    && let (Some(stored), Some(Some(first))) = (cell.record.as_mut(), &self.first)
                {
                    stored.data.clone_from(&first.data);
                }
                match cell.record.as_mut() {
                    Some(stored) if !store.is(Flaw::TouchDoesNothing) => {
                        stored.ttl = record.ttl;
                        stored.deadline = now + record.ttl.as_duration();
                    }
                    Some(_) => {}
                    None => store.apply(cell, self.name, record, wid, now),
                }
            } else if touch {
                let data = cell.record.as_ref().map(|stored| stored.data.clone()).unwrap_or_default();
                store.apply(cell, self.name, &Record::new(data, record.ttl), wid, now);
            } else {
                store.apply(cell, self.name, record, wid, now);
            }
            let mut taken = None;
            if let (true, Access::Exclusive { lease, .. }) = (takes_lock && !store.is(Flaw::FreshTakesNoLock), self.access)
                && !latch.is_of(self.token())
            {
                latch.hold = Some(Hold {
                    token,
                    instance: self.instance,
                    until: now + lease,
                    length: lease,
                    since: SystemTime::now(),
                });
                taken = Some(lease);
            }
            let version = cell.record.as_ref().map(|stored| stored.version);
            Ok((Written::Applied, Some((taken, version))))
        });
        self.sent.insert(wid);
        match outcome {
            Ok((written, news)) => {
                if let Some((taken, version)) = news {
                    if let Some(lease) = taken {
                        self.hold(token, true, lease);
                    }
                    if let Some(version) = version.filter(|_| !store.is(Flaw::OwnWriteIsForgotten) || takes_lock) {
                        self.base = Base::Record(version);
                    }
                }
                self.wrote = true;
                self.fetched = None;
                Ok(written)
            }
            Err(_) if store.is(Flaw::RefusalIsSwallowed) => Ok(Written::Applied),
            Err(error) => {
                self.base = Base::Spent(error.kind());
                if !store.is(Flaw::RefusalKeepsLock) {
                    self.let_go();
                }
                Err(error)
            }
        }
    }
}

#[async_trait]
impl OpenSession for Opening {
    async fn read(&mut self) -> Result<Option<Record>> {
        if matches!(self.access, Access::Destroy) && !self.store.is(Flaw::DestroyAccessReads) {
            return Err(fail(ErrorKind::Unsupported, "read"));
        }
        if let (true, Some(first)) = (self.store.is(Flaw::ReadIsCached), &self.first) {
            return Ok(first.clone());
        }
        if self.fetched.is_none() {
            self.fetch(false);
        }
        let read = self.fetched.take().unwrap_or_default();
        self.first.get_or_insert_with(|| read.clone());
        Ok(read)
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        self.put(record, id, false).await
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        let store = self.store.clone();
        if matches!(self.access, Access::ReadOnly) && !store.is(Flaw::ReadOnlyDestroys) {
            return Err(fail(ErrorKind::Unsupported, "destroy"));
        }
        if store.is(Flaw::DestroyWaits) {
            store.wait_until_free(&self.key, self.token()).await;
        }
        let now = Instant::now();
        let name = WriteId::random()?;
        let token = self.token();
        let removed = store.with(&self.key, |cell, latch| {
            if store.is(Flaw::DestroyIsFenced) && latch.held(now).is_some() && !latch.is_of(token) {
                return Err(fail(ErrorKind::Fenced, "destroy"));
            }
            let live = cell.live(now).is_some();
            if !live && store.is(Flaw::DestroyOfAbsentFails) {
                return Err(fail(ErrorKind::Gone, "destroy"));
            }
            if !store.is(Flaw::DestroyLeavesNoTrace) {
                cell.grave = Some((name, now + Duration::from_secs(60)));
            }
            let shown = live || store.is(Flaw::DestroyReturnsTheExpired);
            let removed = cell.record.take().filter(|_| shown && !store.is(Flaw::DestroyReturnsNothing));
            let left = |stored: &Stored| Ttl::new(stored.deadline.saturating_duration_since(now));
            Ok(removed.map(|stored| Record::new(stored.data.clone(), left(&stored))))
        })?;
        self.destroyed = true;
        self.fetched = None;
        self.base = Base::Spent(ErrorKind::Gone);
        Ok(removed)
    }

    async fn close(&mut self) -> Result<()> {
        let store = self.store.clone();
        let lost = store.with(&self.key, |_, latch| self.held.is_some() && !latch.is_of(self.token()));
        let held = self.held.take();
        let token = held.as_ref().map(|held| held.lease.token());
        if std::mem::replace(&mut self.closed, true) {
            return if store.is(Flaw::SecondCloseFails) { Err(fail(ErrorKind::Gone, "close")) } else { Ok(()) };
        }
        let exclusive = matches!(self.access, Access::Exclusive { .. });
        if store.is(Flaw::CloseCreates) && exclusive && !store.is_live(&self.key) && !self.destroyed {
            let empty = Record::new([], Ttl::from_secs(900));
            store.with(&self.key, |cell, _| store.apply(cell, self.name, &empty, self.name, Instant::now()));
        }
        if store.is(Flaw::CloseClears) && exclusive && !self.wrote && token.is_some() {
            store.with(&self.key, |cell, _| {
                if let Some(stored) = cell.record.as_mut() {
                    stored.data.clear();
                }
            });
        }
        if lost && store.is(Flaw::CloseAfterLossFails) {
            return Err(fail(ErrorKind::Fenced, "close"));
        }
        if self.destroyed && store.is(Flaw::DestroyKeepsLock) {
            return Ok(());
        }
        store.release(&self.key, token, exclusive && store.is(Flaw::CloseFreesAnyLock));
        Ok(())
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        let away = match self.store.flaw {
            Flaw::TouchTakesTwoSteps => self.store.with(&self.key, |cell, _| cell.record.take()),
            _ => None,
        };
        if let Some(stored) = away {
            tokio::time::sleep(GAP).await;
            self.store.with(&self.key, |cell, _| cell.record.get_or_insert(stored).deadline);
        }
        self.put(&Record::new([], ttl), WriteId::random()?, true).await
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        let store = self.store.clone();
        let first = matches!(store.flaw, Flaw::SaveReleasesFirst)
            || (matches!(store.flaw, Flaw::DestroyReleasesFirst) && matches!(change, Change::Destroy));
        if first {
            self.let_go();
            tokio::time::sleep(GAP).await;
        }
        let outcome = match (change, store.flaw) {
            (Change::Write(record), Flaw::SaveWritesOldBytes) => {
                let old = self.first.clone().flatten().map_or_else(|| record.data.clone(), |first| first.data);
                self.write(&Record::new(old, record.ttl), id).await
            }
            (Change::Touch(_), Flaw::SaveForgetsTouch) | (Change::Destroy, Flaw::SaveForgetsDestroy) => Ok(Written::Applied),
            (Change::Write(record), _) => self.write(record, id).await,
            (Change::Touch(ttl), _) => self.touch(*ttl).await,
            (Change::Destroy, _) => self.destroy().await.map(|_| Written::Applied),
            (Change::Nothing, _) => Ok(Written::Applied),
        };
        match outcome {
            Err(error) if error.kind().keeps_opening() => Err(error),
            outcome => {
                if !store.is(Flaw::SaveKeepsLock) {
                    let closed = self.close().await;
                    if matches!(change, Change::Nothing) {
                        closed?;
                    }
                }
                outcome
            }
        }
    }

    fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        let Some(held) = self.held.take() else { return };
        held.lock.abandon(held.lease);
    }
}
