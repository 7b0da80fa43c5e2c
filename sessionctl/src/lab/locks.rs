//! Live sessions and locks, as the page lists them: by handles that are good for nothing but this lab, never by ids.
//!
//! A handle is a hash of the stored id under a key that this process has drawn and tells nobody. It names a row of the page, and lets
//! nobody into a session, neither here nor in the store.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use session_core::{Error, ErrorKind, HashIds, Result, SessionAdmin, SessionHandler, SessionId, Sessions, WriteId};
use sha2::{Digest, Sha256};
use tokio::sync::{oneshot, watch};

use super::backends::Backend;
use super::guard::correlate;
use super::run::prepare;
use crate::output::escape;

/// How many sessions a page lists.
const MOST_SESSIONS: NonZeroU32 = NonZeroU32::new(200).unwrap();

/// How many locks are looked through for a handle.
const MOST_LOCKS: NonZeroU32 = NonZeroU32::new(1000).unwrap();

/// How many sessions the lab holds at a time, to be looked at and released.
const MOST_HELD: usize = 8;

/// How long it holds one.
const HELD: Duration = Duration::from_secs(30);

/// How long each of those that waited for it has it then.
const SEEN: Duration = Duration::from_millis(1500);

/// How many requests of the lab wait for each of them.
const WAITING: usize = 2;

/// What the lab shows of stores, and what it holds in them itself.
#[derive(Debug)]
pub(super) struct Locks {
    key: [u8; 32],
    held: Mutex<HashMap<String, Holding>>,
    /// Whether the lab is about to end.
    ending: watch::Sender<bool>,
}

/// A session that the lab itself holds for show.
#[derive(Debug)]
struct Holding {
    /// Sent to, or dropped, to have it released.
    release: Option<oneshot::Sender<()>>,
    waiting: usize,
}

/// A store as it is listed.
#[derive(Debug, Serialize)]
pub(super) struct Listing {
    backend: String,
    locks: Vec<LockRow>,
    sessions: Vec<SessionRow>,
    /// Whether there are more sessions than are listed.
    more: bool,
}

#[derive(Debug, Serialize)]
struct LockRow {
    handle: String,
    /// The holding process in the store's words, controls escaped; `null` where the store does not know.
    holder: Option<String>,
    held_ms: Option<u64>,
    /// `null` if the lock has no time limit.
    lease_left_ms: Option<u64>,
    /// How many wait, as far as the store and this lab know.
    waiting: Option<u64>,
    /// Whether the lab holds it, for show.
    ours: bool,
}

#[derive(Debug, Serialize)]
struct SessionRow {
    handle: String,
    bytes: u64,
    left_ms: u64,
    locked: bool,
}

/// What became of a release.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Released {
    released: bool,
    reason: String,
}

impl Locks {
    /// Draws the key of the handles.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if the operating system has no randomness to give.
    pub(super) fn new() -> Result<Self> {
        let mut key = [0; 32];
        key[..16].copy_from_slice(&WriteId::random()?.to_bytes());
        key[16..].copy_from_slice(&WriteId::random()?.to_bytes());
        Ok(Self { key, held: Mutex::default(), ending: watch::Sender::new(false) })
    }

    fn handle(&self, stored: &SessionId) -> String {
        let hash = Sha256::new().chain_update(self.key).chain_update(stored.as_str()).finalize();
        hash[..12].iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// Lists the held locks and some of the sessions of a store.
    ///
    /// # Errors
    /// Those of the store; [`Unsupported`](ErrorKind::Unsupported) if it cannot be listed.
    pub(super) async fn list(&self, backend: &Backend) -> Result<Listing> {
        let handler = backend.handler().await?;
        let admin = admin(&handler)?;
        let mut locks = Vec::new();
        for lock in admin.locks(MOST_LOCKS).await? {
            let handle = self.handle(&lock.id);
            let here = self.held().get(&handle).map(|holding| holding.waiting as u64);
            let waiting = match (lock.waiting, here) {
                // Those of the lab wait in this process; the store knows the others.
                (Some(there), Some(here)) => Some(there + here),
                (there, here) => there.or(here),
            };
            locks.push(LockRow {
                holder: lock.holder.as_ref().map(|holder| escape(&holder.process)),
                held_ms: lock
                    .holder
                    .as_ref()
                    .map(|holder| millis(SystemTime::now().duration_since(holder.since).unwrap_or_default())),
                lease_left_ms: lock.lease_left.map(millis),
                waiting,
                ours: here.is_some(),
                handle,
            });
        }
        locks.sort_by(|a, b| b.held_ms.cmp(&a.held_ms).then_with(|| a.handle.cmp(&b.handle)));
        let page = admin.list(None, MOST_SESSIONS).await?;
        let mut sessions: Vec<_> = page
            .sessions
            .iter()
            .map(|session| {
                let handle = self.handle(&session.id);
                let locked = locks.iter().any(|lock| lock.handle == handle);
                SessionRow { handle, bytes: session.bytes, left_ms: millis(session.left), locked }
            })
            .collect();
        sessions.sort_by(|a, b| b.locked.cmp(&a.locked).then_with(|| a.handle.cmp(&b.handle)));
        Ok(Listing { backend: backend.name.clone(), locks, sessions, more: page.next.is_some() })
    }

    /// Takes the lock that `handle` names from whoever holds it. What the lab holds itself it gives back.
    ///
    /// # Errors
    /// Those of the store. A lock that cannot be taken is an answer.
    pub(super) async fn release(&self, backend: &Backend, handle: &str) -> Result<Released> {
        let ours = self.held().get_mut(handle).and_then(|holding| holding.release.take());
        if let Some(release) = ours {
            return Ok(match release.send(()) {
                Ok(()) => yes("The lab gave it back. Whoever waited has it now."),
                Err(()) => no("Nobody holds it any more."),
            });
        }
        let handler = backend.handler().await?;
        let admin = admin(&handler)?;
        // Found among the locks, so that no text from outside is ever looked up in a store.
        let lock = admin.locks(MOST_LOCKS).await?.into_iter().find(|lock| self.handle(&lock.id) == handle);
        let Some(lock) = lock else { return Ok(no("Nobody holds it any more.")) };
        match admin.unlock(&lock.id).await {
            Ok(true) => Ok(yes("Taken from its holder. If somebody else takes over, the holder's next write is refused.")),
            Ok(false) => Ok(no("Nobody holds it any more.")),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let holder = error.holder().or(lock.holder.as_ref());
                let who = holder.map_or_else(|| "its holder".into(), |holder| escape(&holder.process));
                Ok(no(&format!("This lock is the kernel's and ends only with its holder, {who}. End that process.")))
            }
            Err(error) => Err(error),
        }
    }

    /// Holds a session of the lab for a while, and has others wait for it, so that there is something to see and to release.
    ///
    /// Returns its handle, or `None` if the lab holds enough already.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn hold(self: &Arc<Self>, backend: &Backend) -> Result<Option<String>> {
        if self.held().len() >= MOST_HELD {
            return Ok(None);
        }
        let sessions = backend.sessions().await?;
        let id = prepare(&sessions).await?;
        let holder = sessions.open(&id).await?;
        // Behind hash_ids the store lists the hash.
        let names = [HashIds::hash(&id), id.clone()];
        let admin_handler = backend.handler().await?;
        let listed = admin(&admin_handler)?.locks(MOST_LOCKS).await?;
        let stored =
            names.into_iter().find(|name| listed.iter().any(|lock| lock.id == *name)).unwrap_or_else(|| HashIds::hash(&id));
        let handle = self.handle(&stored);
        let (release, released) = oneshot::channel();
        self.held().insert(handle.clone(), Holding { release: Some(release), waiting: 0 });
        let (this, key) = (Arc::clone(self), handle.clone());
        tokio::spawn(async move {
            let waiting: Vec<_> = (0..WAITING)
                .map(|_| tokio::spawn(Arc::clone(&this).wait(sessions.clone(), id.clone(), key.clone())))
                .collect();
            // An error means that the lab has ended, which releases it as well.
            let _ = tokio::time::timeout(HELD, released).await;
            this.count(&key, |holding| holding.release = None);
            log("release", holder.abort().await);
            for waiter in waiting {
                let _ = waiter.await;
            }
            this.held().remove(&key);
            log("remove", sessions.destroy(&id).await);
        });
        Ok(Some(handle))
    }

    async fn wait(self: Arc<Self>, sessions: Sessions, id: SessionId, handle: String) {
        self.count(&handle, |holding| holding.waiting += 1);
        let opened = sessions.open(&id).await;
        self.count(&handle, |holding| holding.waiting -= 1);
        match opened {
            Ok(session) => {
                let mut ending = self.ending.subscribe();
                // Long enough to be seen on a page that looks every second.
                let _ = tokio::time::timeout(SEEN, ending.wait_for(|ending| *ending)).await;
                log("release", session.abort().await);
            }
            Err(error) => log("wait", Err(error)),
        }
    }

    /// Gives back what the lab holds, and waits until it has.
    pub(super) async fn stop(&self) {
        self.ending.send_replace(true);
        for holding in self.held().values_mut() {
            holding.release = None;
        }
        for _ in 0..100 {
            if self.held().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn count(&self, handle: &str, change: impl FnOnce(&mut Holding)) {
        self.held().get_mut(handle).map(change);
    }

    fn held(&self) -> MutexGuard<'_, HashMap<String, Holding>> {
        // Nothing panics while it is held, and the map is whole after every change.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn admin(handler: &Arc<dyn SessionHandler>) -> Result<&dyn SessionAdmin> {
    handler.admin().ok_or_else(|| Error::new(ErrorKind::Unsupported, "list", "this store cannot be listed"))
}

fn log(what: &str, outcome: Result<()>) {
    if let Err(error) = outcome {
        let _ = correlate(what, &error);
    }
}

fn yes(reason: &str) -> Released {
    Released { released: true, reason: reason.into() }
}

fn no(reason: &str) -> Released {
    Released { released: false, reason: reason.into() }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_the_same_in_one_lab_and_another_in_the_next_and_holds_nothing_of_the_id() {
        let (one, other) = (Locks::new().unwrap(), Locks::new().unwrap());
        let id = SessionId::generate().unwrap();
        assert_eq!(one.handle(&id), one.handle(&id));
        assert_ne!(one.handle(&id), other.handle(&id));
        assert_eq!(one.handle(&id).len(), 24);
        assert!(!id.as_str().contains(&one.handle(&id)[..8]));
    }
}
