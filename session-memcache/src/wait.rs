//! Whose turn is it in this process, and when do others go first?
//!
//! Nobody wakes a waiter, so somebody has to ask again and again; one task for each session does, and the others stand behind it
//! in the order in which they came. A process that waits writes its name beside the session, and whoever gives the lock back
//! leaves it to that process for one question (`protocol.md` 13). Nothing here knows commands.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex as Turn, Notify, OwnedMutexGuard};

/// The longest pause of the process that is next in line, unless the option `poll_max` is shorter.
const NEXT: Duration = Duration::from_millis(6);

/// How long a lock is left to it: its longest pause, and its question.
const LEAVE: Duration = Duration::from_millis(10);

/// How many sessions are remembered as left to others before those are forgotten that need not be any more.
const CROWDS: usize = 1024;

/// The tasks of this process that wait for a lock, by its key.
#[derive(Default)]
pub(crate) struct Turns(Mutex<HashMap<Arc<str>, Line>>);

#[derive(Default)]
struct Line {
    turn: Arc<Turn<()>>,
    /// Rung when somebody of this process gives the lock back.
    bell: Arc<Notify>,
    /// How many wait or have their turn.
    tasks: usize,
}

/// The turn of a task, until it is dropped.
pub(crate) struct MyTurn<'a> {
    turns: &'a Turns,
    key: Arc<str>,
    bell: Arc<Notify>,
    held: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    fn lines(&self) -> MutexGuard<'_, HashMap<Arc<str>, Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody of this process asks for the lock, or waits to.
    pub(crate) fn is_taken(&self, key: &str) -> bool {
        let lines = self.lines();
        !lines.is_empty() && lines.contains_key(key)
    }

    /// Wakes whoever asks for a lock that was just given back.
    pub(crate) fn wake(&self, key: &str) {
        let lines = self.lines();
        if !lines.is_empty()
            && let Some(line) = lines.get(key)
        {
            line.bell.notify_one();
        }
    }

    /// Returns the longest pause of a process that is next in line: the more locks it asks for, the longer, so that its questions
    /// do not keep the servers from everything else.
    pub(crate) fn next_pause(&self) -> Duration {
        NEXT + NEXT.mul_f64(self.lines().len() as f64 / 32.0)
    }

    /// Takes a place behind those that wait, and returns once it is the front; after `limit` in any case.
    pub(crate) async fn wait(&self, key: &Arc<str>, limit: Duration) -> MyTurn<'_> {
        let (turn, bell) = {
            let mut lines = self.lines();
            let line = lines.entry(key.clone()).or_default();
            line.tasks += 1;
            (line.turn.clone(), line.bell.clone())
        };
        // From here on the place is given back whatever becomes of the task.
        let mut mine = MyTurn { turns: self, key: key.clone(), bell, held: None };
        mine.held = tokio::time::timeout(limit, turn.lock_owned()).await.ok();
        mine
    }
}

impl MyTurn<'_> {
    /// Sleeps until the next question, or until somebody of this process gives the lock back.
    pub(crate) async fn sleep(&self, pause: Duration) {
        let _ = tokio::time::timeout(pause, self.bell.notified()).await;
    }
}

impl Drop for MyTurn<'_> {
    fn drop(&mut self) {
        self.held = None;
        let mut lines = self.turns.lines();
        if let Some(line) = lines.get_mut(&self.key) {
            line.tasks -= 1;
            if line.tasks == 0 {
                lines.remove(&self.key);
            }
        }
    }
}

impl fmt::Debug for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turns").field("sessions", &self.lines().len()).finish()
    }
}

/// Locks that this process leaves to another for a moment, by key, and until when.
#[derive(Default)]
pub(crate) struct Crowds(Mutex<HashMap<Arc<str>, Instant>>);

impl Crowds {
    fn crowds(&self) -> MutexGuard<'_, HashMap<Arc<str>, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that another process is next in line for a lock that was just given back.
    pub(crate) fn note(&self, key: &Arc<str>) {
        let now = Instant::now();
        let mut crowds = self.crowds();
        if crowds.len() >= CROWDS {
            crowds.retain(|_, until| *until > now);
        }
        crowds.insert(key.clone(), now + LEAVE);
    }

    /// Returns for how long the lock is still left to another.
    pub(crate) fn pause(&self, key: &str) -> Option<Duration> {
        let mut crowds = self.crowds();
        if crowds.is_empty() {
            return None;
        }
        let pause = crowds.get(key)?.saturating_duration_since(Instant::now());
        if pause.is_zero() {
            crowds.remove(key);
            return None;
        }
        Some(pause)
    }
}

impl fmt::Debug for Crowds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crowds").field("sessions", &self.crowds().len()).finish()
    }
}

/// The pauses of a waiter: at random, growing, never longer than they may be.
#[derive(Debug)]
pub(crate) struct Pauses {
    least: Duration,
    last: Duration,
    random: u64,
}

impl Pauses {
    pub(crate) fn new(least: Duration, seed: u64) -> Self {
        Self { least, last: least, random: seed | 1 }
    }

    /// Returns the next pause: between the least and three times the one before, and at most `most`.
    pub(crate) fn next(&mut self, most: Duration) -> Duration {
        // Xorshift: two processes that met once do not meet again.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let most = most.max(self.least);
        let span = (self.last * 3).min(most).saturating_sub(self.least);
        let share = (self.random >> 11) as f64 / (1u64 << 53) as f64;
        self.last = self.least + span.mul_f64(share);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_are_taken_in_order_and_forgotten() {
        let turns = Arc::new(Turns::default());
        let key: Arc<str> = "a".into();
        let first = turns.wait(&key, Duration::MAX).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        for n in 0..4 {
            let (turns, key, order) = (turns.clone(), key.clone(), order.clone());
            tasks.push(tokio::spawn(async move {
                let limit = if n == 1 { Duration::from_millis(1) } else { Duration::from_secs(60) };
                let mine = turns.wait(&key, limit).await;
                order.lock().unwrap().push((n, mine.held.is_some()));
            }));
            tokio::task::yield_now().await;
        }
        assert!(turns.is_taken("a") && !turns.is_taken("b"));
        while order.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(first);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [(1, false), (0, true), (2, true), (3, true)]);
        assert!(!turns.is_taken("a"));
    }

    #[test]
    fn pauses_grow_and_stay_within_their_bounds() {
        let (least, most) = (Duration::from_millis(1), Duration::from_millis(50));
        let mut pauses = Pauses::new(least, 7);
        let first: Vec<_> = (0..3).map(|_| pauses.next(most)).collect();
        assert!(first[0] <= 3 * least && first[1] <= 9 * least, "{first:?}");
        let later: Vec<_> = (0..1000).map(|_| pauses.next(most)).collect();
        assert!(later.iter().all(|pause| (least..=most).contains(pause)));
        assert!(later.iter().any(|pause| *pause > most / 2), "they do not grow");
        assert!((0..100).all(|_| pauses.next(NEXT) <= NEXT));
    }

    #[tokio::test]
    async fn a_release_wakes_whoever_asks() {
        let turns = Turns::default();
        let key: Arc<str> = "a".into();
        let mine = turns.wait(&key, Duration::MAX).await;
        turns.wake("a");
        turns.wake("b");
        let woken = tokio::time::timeout(Duration::from_secs(60), mine.sleep(Duration::MAX)).await;
        assert!(woken.is_ok(), "it slept on");
        assert!(turns.next_pause() >= NEXT && turns.next_pause() < 2 * NEXT);
    }

    #[test]
    fn a_lock_is_left_to_others_for_a_moment() {
        let crowds = Crowds::default();
        let key: Arc<str> = "a".into();
        crowds.note(&key);
        assert!(crowds.pause("a").is_some_and(|pause| pause <= LEAVE) && crowds.pause("b").is_none());
        std::thread::sleep(LEAVE);
        assert!(crowds.pause("a").is_none() && crowds.crowds().is_empty());
    }
}
