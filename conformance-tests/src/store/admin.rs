//! What administrators see of a store, and may do with its locks.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use session_core::{Cursor, Holder, LockInfo, Page, Result, SessionAdmin, SessionId, SessionInfo};

use super::AGES;
use super::handler::StoreHandler;
use crate::liars::Flaw;

#[async_trait]
impl SessionAdmin for StoreHandler {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        let now = Instant::now();
        let store = &self.store;
        let inner = store.inner();
        let mut page = Page::new(Vec::new(), None);
        let left = |deadline: Instant| deadline.saturating_duration_since(now);
        let mut seen = inner.cells.iter().filter_map(|(key, cell)| {
            let shown = match &cell.record {
                Some(record) if record.deadline > now || store.is(Flaw::ListShowsTheDead) => {
                    Some((record.data.len() as u64, left(record.deadline)))
                }
                None if cell.grave.is_some() && store.is(Flaw::ListShowsTheDead) => Some((0, Duration::ZERO)),
                None if store.is(Flaw::ListShowsLocks) && inner.latches.get(key).is_some_and(|l| l.held(now).is_some()) => {
                    Some((0, AGES))
                }
                _ => None,
            };
            shown.map(|shown| (key, shown))
        });
        for (key, (bytes, left)) in seen.by_ref() {
            if after.is_some_and(|after| *key <= after.0) {
                continue;
            }
            if page.sessions.len() == limit.get() as usize {
                let last = page.sessions.last().map(|last: &SessionInfo| Cursor(last.id.as_str().to_owned()));
                page.next = last.filter(|_| !store.is(Flaw::ListForgetsRest));
                break;
            }
            let id = SessionId::parse(key).expect("only ids are keys");
            page.sessions.push(SessionInfo::new(id, bytes, left));
        }
        Ok(page)
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        let now = Instant::now();
        if self.store.is(Flaw::LocksAreHidden) {
            return Ok(Vec::new());
        }
        let all = self.store.is(Flaw::LocksShowTheEnded);
        let inner = self.store.inner();
        let held = inner.latches.iter().filter_map(|(key, latch)| {
            let hold = if all { latch.hold.as_ref() } else { latch.held(now) }?;
            let id = SessionId::parse(key)?;
            let left = hold.until.saturating_duration_since(now);
            let waiting = u64::try_from(latch.queue.len()).ok();
            Some(LockInfo::new(id, Some(Holder::this_process(hold.since)), Some(left), waiting))
        });
        Ok(held.take(limit.get() as usize).collect())
    }

    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        let key = self.store.key(id);
        let was = self.store.with(&key, |_, latch| latch.held(Instant::now()).is_some());
        match self.store.flaw {
            Flaw::UnlockDoesNothing => {}
            Flaw::UnlockAlwaysSaysYes => self.store.release(&key, None, true),
            _ if was => self.store.with(&key, |_, latch| {
                latch.hold = None;
                latch.clean = false;
                latch.wake.notify_waiters();
            }),
            _ => {}
        }
        Ok(was || self.store.is(Flaw::UnlockAlwaysSaysYes))
    }
}
