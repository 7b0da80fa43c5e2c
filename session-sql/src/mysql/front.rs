//! Which task of this process asks for a lock that others wait for, too?
//!
//! One at a time: the others would only stand in the way of the holder's save, each with a statement on the same row. They are
//! answered with what the one in front was told. Nothing here knows statements.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use session_core::{Holder, LeaseToken};

use crate::database::{Busy, Entered};

/// Whoever is in front asks again within so long, or has gone.
const GONE: Duration = Duration::from_millis(15);

/// The tasks in front, by the keys that they wait for.
#[derive(Debug, Default)]
pub(super) struct Fronts(Mutex<HashMap<String, Front>>);

#[derive(Debug)]
struct Front {
    token: LeaseToken,
    /// When he was answered last; while he asks there is none.
    answered: Option<Instant>,
    holder: Option<Holder>,
    until: Instant,
}

impl Fronts {
    /// Puts `token` in front, or says what whoever is there was told.
    pub(super) fn come(&self, key: &str, token: LeaseToken) -> Result<Asking<'_>, Busy> {
        let mut fronts = self.lock();
        let now = Instant::now();
        let (holder, until) = match fronts.get(key) {
            Some(front) if front.token != token && front.answered.is_none_or(|at| now - at < GONE) => {
                let left = front.until.saturating_duration_since(now);
                return Err(Busy { holder: front.holder.clone(), left, booked: false });
            }
            Some(front) => (front.holder.clone(), front.until),
            None => (None, now + GONE),
        };
        fronts.insert(key.to_owned(), Front { token, answered: None, holder, until });
        Ok(Asking { fronts: self, key: key.to_owned(), token })
    }

    /// Whoever gave up is in front of nobody.
    pub(super) fn leave(&self, key: &str, token: LeaseToken) {
        let mut fronts = self.lock();
        if fronts.get(key).is_some_and(|front| front.token == token) {
            fronts.remove(key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Front>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one in front while he asks.
pub(super) struct Asking<'a> {
    fronts: &'a Fronts,
    key: String,
    token: LeaseToken,
}

impl Asking<'_> {
    /// Remembers what he was told; with the lock, or behind somebody of another process, he is in front no more.
    pub(super) fn told(self, entered: &Entered) {
        match entered {
            Entered::Busy(busy) if busy.booked => {
                if let Some(front) = self.fronts.lock().get_mut(&self.key).filter(|front| front.token == self.token) {
                    (front.holder, front.until) = (busy.holder.clone(), Instant::now() + busy.left);
                }
            }
            _ => self.fronts.leave(&self.key, self.token),
        }
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(front) = self.fronts.lock().get_mut(&self.key).filter(|front| front.token == self.token) {
            front.answered = Some(Instant::now());
        }
    }
}
