//! Who has the lock of an id, and who waits for it.
//!
//! Nothing here knows of records, but that who waits for an absent one need not wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use session_core::{Error, ErrorKind, Holder, LeaseRequest, LeaseToken, Result};
use tokio::sync::Notify;

use super::{AGES, GAP, Store, TOO_LONG, fail};
use crate::liars::Flaw;

/// The lock of one id.
#[derive(Default)]
pub(super) struct Latch {
    pub(super) hold: Option<Hold>,
    pub(super) clean: bool,
    pub(super) haunted: bool,
    pub(super) queue: VecDeque<u64>,
    pub(super) wake: Arc<Notify>,
}

#[derive(Clone)]
pub(super) struct Hold {
    pub(super) token: LeaseToken,
    pub(super) instance: u64,
    pub(super) until: Instant,
    pub(super) length: Duration,
    pub(super) since: SystemTime,
}

impl Latch {
    pub(super) fn held(&self, now: Instant) -> Option<&Hold> {
        self.hold.as_ref().filter(|hold| hold.until > now)
    }

    pub(super) fn is_of(&self, token: Option<LeaseToken>) -> bool {
        token.is_some() && self.hold.as_ref().map(|hold| hold.token) == token
    }
}

impl Store {
    fn timeout(&self, key: &str, hold: Option<&Hold>) -> Error {
        let holder = hold.map(|hold| Holder::this_process(hold.since));
        let error = if self.is(Flaw::ErrorShowsId) {
            Error::new(ErrorKind::LockTimeout, "open", format!("the lock of {key} is taken"))
        } else {
            fail(ErrorKind::LockTimeout, "open")
        };
        error.with_holder(holder)
    }

    /// Waits for the lock; says under which token it was taken and whether the holder before released.
    pub(super) async fn acquire(
        self: &Arc<Self>,
        key: &str,
        instance: u64,
        request: LeaseRequest,
        absent_is_in: bool,
    ) -> Result<Option<(LeaseToken, bool)>> {
        let wait = match self.flaw {
            Flaw::NeverWaits => Duration::ZERO,
            Flaw::WaitsTooLong => request.wait * 3 + Duration::from_secs(3),
            _ => request.wait,
        };
        let length = if self.is(Flaw::LeaseEndsEarly) { request.lease / 4 } else { request.lease };
        let deadline = Instant::now() + wait.min(AGES);
        let mut ticket = Ticket::draw(self, key);
        loop {
            // Absent while waiting is as good as absent before.
            if absent_is_in && !self.is_live(key) {
                ticket.outcome = Wait::In;
                return Ok(None);
            }
            let wake = self.with(key, |_, latch| latch.wake.clone());
            let woken = wake.notified();
            let token =
                if self.is(Flaw::TokenIsTheProcess) { LeaseToken::from_bytes([7; 16]) } else { LeaseToken::random()? };
            let now = Instant::now();
            let next = self.with(key, |_, latch| {
                let reentrant =
                    self.is(Flaw::LockIsReentrant) && latch.hold.as_ref().is_some_and(|h| h.instance == instance);
                let free = match latch.held(now) {
                    None => !latch.haunted,
                    Some(_) => reentrant || self.is(Flaw::NoLock),
                };
                if free && latch.queue.front() == Some(&ticket.number) {
                    let clean = latch.hold.is_none() && latch.clean;
                    let until = if self.is(Flaw::LockNeverEnds) { now + AGES } else { now + length };
                    latch.hold = Some(Hold { token, instance, until, length, since: SystemTime::now() });
                    latch.clean = false;
                    return Ok((token, clean || self.is(Flaw::TakeoverIsCalledClean)));
                }
                if now >= deadline {
                    return Err(Some(self.timeout(key, latch.hold.as_ref())));
                }
                Err(None)
            });
            match next {
                Ok(taken) => {
                    ticket.outcome = Wait::In;
                    return Ok(Some(taken));
                }
                Err(Some(timeout)) => {
                    ticket.outcome = Wait::GaveUp;
                    return Err(timeout);
                }
                Err(None) => {}
            }
            let lease_end = self.with(key, |_, latch| latch.held(now).map(|hold| hold.until));
            let look_again = lease_end.unwrap_or(deadline).min(deadline).max(now + Duration::from_millis(1));
            if self.is(Flaw::WakeIsLost) {
                let nearly = ((deadline - now) * 9 / 10).min(TOO_LONG);
                tokio::time::sleep(nearly + Duration::from_millis(1)).await;
            } else {
                tokio::select! {
                    () = woken => {}
                    () = tokio::time::sleep_until(look_again.into()) => {}
                }
            }
        }
    }

    /// Gives the lock back if it is `token`'s, or anybody's if `any`.
    pub(super) fn release(&self, key: &str, token: Option<LeaseToken>, any: bool) {
        self.with(key, |_, latch| {
            if latch.is_of(token) || any {
                latch.hold = None;
                latch.clean = true;
                latch.wake.notify_waiters();
            }
        });
    }

    /// Waits, as long as a flaw does that should not wait at all.
    pub(super) async fn wait_until_free(&self, key: &str, token: Option<LeaseToken>) {
        let end = Instant::now() + TOO_LONG;
        while Instant::now() < end && self.with(key, |_, latch| latch.held(Instant::now()).is_some() && !latch.is_of(token))
        {
            tokio::time::sleep(GAP).await;
        }
    }
}

/// A place in the queue of one lock.
struct Ticket {
    store: Arc<Store>,
    key: String,
    number: u64,
    outcome: Wait,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    Waiting,
    In,
    GaveUp,
}

impl Ticket {
    fn draw(store: &Arc<Store>, key: &str) -> Self {
        let latch_key = store.latch_key(key);
        let mut inner = store.inner();
        inner.tickets += 1;
        let number = inner.tickets;
        inner.latches.entry(latch_key).or_default().queue.push_back(number);
        drop(inner);
        Self { store: store.clone(), key: key.to_owned(), number, outcome: Wait::Waiting }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let stays = self.outcome != Wait::In && self.store.is(Flaw::DeadWaiterBlocksQueue);
        let haunts = self.outcome == Wait::Waiting && self.store.is(Flaw::DroppedOpenKeepsLock);
        self.store.with(&self.key, |_, latch| {
            if !stays {
                latch.queue.retain(|number| *number != self.number);
            }
            latch.haunted |= haunts;
            latch.wake.notify_waiters();
        });
    }
}
