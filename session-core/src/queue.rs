//! Who in this process works on a session next: first come, first served, with a bound.
//!
//! Nothing here knows about stores. One task per session passes; it alone contends with other processes. The map holds an
//! entry for a session only while somebody holds or waits for it.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::id::SessionId;

const SHARDS: usize = 64;

/// The queues of all sessions that somebody in this process holds or waits for.
pub(crate) struct Queues {
    // Held for a map operation, never across an await, so a blocking mutex is the cheaper one.
    shards: Vec<Mutex<HashMap<SessionId, Slot>>>,
    hasher: RandomState,
    limit: usize,
}

struct Slot {
    // Tokio's semaphore is fair: a released permit goes to the longest waiter, and a dropped waiter loses only its own place.
    gate: Arc<Semaphore>,
    users: usize,
}

impl Queues {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Arc::new(Self { shards, hasher: RandomState::new(), limit })
    }

    /// Waits for the turn on `id` until `deadline`.
    ///
    /// Cancel-safe: a dropped future gives up its place.
    pub(crate) async fn turn(self: &Arc<Self>, id: &SessionId, deadline: Instant) -> Result<Turn> {
        let (user, gate) = self.enter(id)?;
        let permit = match Arc::clone(&gate).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => match tokio::time::timeout_at(deadline, gate.acquire_owned()).await {
                Ok(permit) => permit.expect("the semaphore is never closed"),
                Err(_) => {
                    let message = "not free within the wait: held by this process";
                    return Err(Error::new(ErrorKind::LockTimeout, "open", message));
                }
            },
        };
        Ok(Turn { _permit: permit, _user: user })
    }

    /// Takes the turn on an id that nobody else can know yet.
    pub(crate) fn take(self: &Arc<Self>, id: &SessionId) -> Option<Turn> {
        let (user, gate) = self.enter(id).ok()?;
        let permit = gate.try_acquire_owned().ok()?;
        Some(Turn { _permit: permit, _user: user })
    }

    /// The number of sessions that somebody holds or waits for.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    fn enter(self: &Arc<Self>, id: &SessionId) -> Result<(User, Arc<Semaphore>)> {
        let mut shard = lock(self.shard(id));
        let slot = shard.entry(id.clone()).or_insert_with(|| Slot { gate: Arc::new(Semaphore::new(1)), users: 0 });
        // One user holds, the others wait; the limit is on those who wait.
        if slot.users > self.limit {
            let message = format!("{} are waiting for this session already", self.limit);
            return Err(Error::new(ErrorKind::Busy, "open", message));
        }
        slot.users += 1;
        Ok((User { queues: Arc::clone(self), id: id.clone() }, Arc::clone(&slot.gate)))
    }

    fn shard(&self, id: &SessionId) -> &Mutex<HashMap<SessionId, Slot>> {
        let hash = self.hasher.hash_one(id);
        &self.shards[hash as usize % SHARDS]
    }
}

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queues").field("sessions", &self.len()).field("limit", &self.limit).finish()
    }
}

/// The right to be the one task of this process that works on a session; dropping it admits the next.
#[derive(Debug)]
pub(crate) struct Turn {
    // Declared before the user: the permit is given on before the entry may vanish.
    _permit: OwnedSemaphorePermit,
    _user: User,
}

/// One who holds or waits; the last one takes the entry out of the map.
#[derive(Debug)]
struct User {
    queues: Arc<Queues>,
    id: SessionId,
}

impl Drop for User {
    fn drop(&mut self) {
        let mut shard = lock(self.queues.shard(&self.id));
        let Some(slot) = shard.get_mut(&self.id) else { return };
        slot.users -= 1;
        if slot.users == 0 {
            shard.remove(&self.id);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing panics while it is held, and a map is whole after every operation.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[tokio::test]
    async fn tasks_are_served_in_the_order_they_came_and_the_map_forgets() {
        let queues = Queues::new(64);
        let id = SessionId::generate().unwrap();
        let first = queues.turn(&id, soon()).await.unwrap();
        let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
        let mut tasks = Vec::new();
        for n in 0..50 {
            let (queues, id, sender) = (queues.clone(), id.clone(), sender.clone());
            let task = tokio::spawn(async move {
                let _turn = queues.turn(&id, soon()).await.unwrap();
                sender.send(n).unwrap();
                tokio::task::yield_now().await;
            });
            tokio::task::yield_now().await;
            if n % 7 == 3 {
                task.abort(); // A waiter that gives up must not disturb the others.
            } else {
                tasks.push(task);
            }
        }
        drop(first);
        for task in tasks {
            task.await.unwrap();
        }
        drop(sender);
        let mut served = Vec::new();
        while let Some(n) = order.recv().await {
            served.push(n);
        }
        assert_eq!(served, (0..50).filter(|n| n % 7 != 3).collect::<Vec<_>>());
        assert_eq!(queues.len(), 0);
    }

    #[tokio::test]
    async fn the_queue_is_bounded_and_the_wait_too() {
        let queues = Queues::new(2);
        let id = SessionId::generate().unwrap();
        let turn = queues.turn(&id, soon()).await.unwrap();
        let wait = |ms| queues.turn(&id, Instant::now() + Duration::from_millis(ms));
        let (a, b, c) = tokio::join!(wait(30), wait(30), wait(30));
        let kinds = [a, b, c].map(|outcome| outcome.unwrap_err().kind());
        assert_eq!(kinds, [ErrorKind::LockTimeout, ErrorKind::LockTimeout, ErrorKind::Busy]);
        drop(turn);
        assert!(queues.take(&id).is_some());
        assert_eq!(queues.len(), 0);
    }
}
