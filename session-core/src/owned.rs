//! Who drives an operation to its end? Its caller, for as long as he waits for it and looks; a task, if he does not.
//!
//! A caller may drop the future of an operation half-way, or keep it without polling it. Neither may leave an operation where it is: it
//! may have a lock by then, or a connection that others wait for. So an operation whose future is dropped goes on in a task, and one
//! that is still under way after [`PATIENCE`] is moved to a task too, whatever its caller does. What answers sooner than that, which
//! nearly everything does, costs no task and no hop to another thread.

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::mem;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};

/// How long a caller drives his operation himself, give or take as much again.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

type Work<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Runs `future` to its end, even if the caller stops waiting or looking. A result that nobody takes any more is dropped, and cleans up
/// after itself. It has to be called on a runtime.
pub(crate) fn owned<T: Send + 'static>(
    watch: &Arc<Watch>,
    future: impl Future<Output = T> + Send + 'static,
) -> impl Future<Output = Result<T>> + Send {
    let begun = begin(watch, future);
    async {
        match begun.await {
            Begun::Done(outcome) => Ok(outcome),
            Begun::Waiting(mut operation) => operation.outcome().await,
        }
    }
}

/// Polls `future` once, which is all that many need, and says what came of it.
pub(crate) fn begin<T: Send + 'static>(
    watch: &Arc<Watch>,
    future: impl Future<Output = T> + Send + 'static,
) -> impl Future<Output = Begun<T>> + Send {
    // On the heap from here on, so that no caller carries the room for it.
    let mut work: Option<Work<T>> = Some(Box::pin(future));
    poll_fn(move |context| {
        let mut work = work.take().expect("it is ready at once, and so polled once");
        Poll::Ready(match work.as_mut().poll(context) {
            Poll::Ready(outcome) => Begun::Done(outcome),
            Poll::Pending => Begun::Waiting(Owned::new(watch, work, context.waker().clone())),
        })
    })
}

/// What came of the first step of an operation.
pub(crate) enum Begun<T: Send + 'static> {
    Done(T),
    Waiting(Owned<T>),
}

/// An operation that waits for something, and goes to its end.
pub(crate) struct Owned<T: Send + 'static> {
    watch: Arc<Watch>,
    afloat: Arc<Afloat<T>>,
    key: u64,
}

impl<T: Send + 'static> Owned<T> {
    fn new(watch: &Arc<Watch>, work: Work<T>, caller: Waker) -> Self {
        let afloat = Arc::new(Afloat { since: Instant::now(), state: Mutex::new(State::InPlace { work, caller }) });
        let key = watch.insert(&afloat);
        Self { watch: Arc::clone(watch), afloat, key }
    }

    /// Waits for the outcome, which is there once. If the future is dropped, a task goes on, and the outcome can be called for again.
    pub(crate) async fn outcome(&mut self) -> Result<T> {
        let look = Look(self);
        poll_fn(|context| look.0.afloat.poll(context)).await
    }

    /// Lets a task go on with what is under way.
    fn hand_over(&self) {
        if let Some(work) = self.afloat.take() {
            let carried = carry(Arc::clone(&self.afloat), work);
            match Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn(carried)),
                Err(_) => self.watch.leave(Box::pin(carried)),
            }
        }
        self.watch.remove(self.key);
    }
}

impl<T: Send + 'static> Drop for Owned<T> {
    fn drop(&mut self) {
        self.hand_over();
    }
}

/// Somebody waits. Whenever he stops, a task is at work, unless there is nothing left to do.
struct Look<'a, T: Send + 'static>(&'a mut Owned<T>);

impl<T: Send + 'static> Drop for Look<'_, T> {
    fn drop(&mut self) {
        self.0.hand_over();
    }
}

struct Afloat<T> {
    since: Instant,
    // Held while the operation is polled by its caller; whoever else wants it then finds it in good hands.
    state: Mutex<State<T>>,
}

enum State<T> {
    /// The caller drives it.
    InPlace {
        work: Work<T>,
        caller: Waker,
    },
    /// A task does.
    Carried {
        caller: Waker,
    },
    Done(Result<T>),
    /// The outcome was taken, or a panic was.
    Over,
}

impl<T: Send + 'static> Afloat<T> {
    fn poll(&self, context: &mut Context<'_>) -> Poll<Result<T>> {
        let mut state = guard(&self.state);
        match mem::replace(&mut *state, State::Over) {
            State::InPlace { mut work, mut caller } => {
                let outcome = work.as_mut().poll(context);
                if outcome.is_pending() {
                    caller.clone_from(context.waker());
                    *state = State::InPlace { work, caller };
                }
                outcome.map(Ok)
            }
            State::Carried { mut caller } => {
                caller.clone_from(context.waker());
                *state = State::Carried { caller };
                Poll::Pending
            }
            State::Done(outcome) => Poll::Ready(outcome),
            State::Over => Poll::Ready(Err(ended())),
        }
    }

    /// Takes the operation from its caller, unless he is at it, or it is his no more.
    fn take(&self) -> Option<Work<T>> {
        let mut state = self.state.try_lock().ok()?;
        match mem::replace(&mut *state, State::Over) {
            State::InPlace { work, caller } => {
                *state = State::Carried { caller };
                Some(work)
            }
            other => {
                *state = other;
                None
            }
        }
    }

    fn land(&self, outcome: Result<T>) {
        let before = mem::replace(&mut *guard(&self.state), State::Done(outcome));
        if let State::Carried { caller } = before {
            caller.wake();
        }
    }
}

/// Drives an operation to its end in place of its caller.
fn carry<T: Send + 'static>(afloat: Arc<Afloat<T>>, work: Work<T>) -> impl Future<Output = ()> + Send {
    // Made here, for a task may end before its first step.
    let mut landing = Landing(Some(afloat));
    async move {
        let outcome = work.await;
        if let Some(afloat) = landing.0.take() {
            afloat.land(Ok(outcome));
        }
    }
}

/// However the task ends, the caller hears of it.
struct Landing<T: Send + 'static>(Option<Arc<Afloat<T>>>);

impl<T: Send + 'static> Drop for Landing<T> {
    fn drop(&mut self) {
        if let Some(afloat) = self.0.take() {
            afloat.land(Err(ended()));
        }
    }
}

fn ended() -> Error {
    let message = "the task of this operation ended before it answered (panic or shutdown)";
    Error::new(ErrorKind::Unknown, "session", message)
}

/// The operations that wait for something, and are driven by their callers for the time being. The janitor looks after them.
pub(crate) struct Watch {
    table: Mutex<Table>,
    /// Whether somebody will [look](Self::look) without being told.
    watched: AtomicBool,
    begun: Notify,
    leave: Box<dyn Fn(Carried) + Send + Sync>,
}

/// An operation for a task.
pub(crate) type Carried = Pin<Box<dyn Future<Output = ()> + Send>>;

#[derive(Default)]
struct Table {
    entries: HashMap<u64, Weak<dyn Adopt>>,
    next_key: u64,
    looked_at: u64,
}

trait Adopt: Send + Sync {
    fn since(&self) -> Instant;

    fn adopt(self: Arc<Self>) -> Option<Carried>;
}

impl<T: Send + 'static> Adopt for Afloat<T> {
    fn since(&self) -> Instant {
        self.since
    }

    fn adopt(self: Arc<Self>) -> Option<Carried> {
        let work = self.take()?;
        Some(Box::pin(carry(self, work)))
    }
}

impl Watch {
    /// `leave` takes what is dropped outside a runtime.
    pub(crate) fn new(leave: impl Fn(Carried) + Send + Sync + 'static) -> Self {
        Self { table: Mutex::default(), watched: AtomicBool::new(false), begun: Notify::new(), leave: Box::new(leave) }
    }

    fn insert<T: Send + 'static>(&self, afloat: &Arc<Afloat<T>>) -> u64 {
        let weak = Arc::downgrade(afloat);
        let key = {
            let mut table = guard(&self.table);
            let key = table.next_key;
            table.next_key += 1;
            table.entries.insert(key, weak);
            key
        };
        if !self.watched.load(Ordering::SeqCst) && !self.watched.swap(true, Ordering::SeqCst) {
            self.begun.notify_one();
        }
        key
    }

    fn remove(&self, key: u64) {
        guard(&self.table).entries.remove(&key);
    }

    fn leave(&self, work: Carried) {
        (self.leave)(work);
    }

    /// Waits until there is something to look after.
    pub(crate) async fn begun(&self) {
        self.begun.notified().await;
    }

    /// Takes over what its caller has had for long enough. `None` once there has been nothing new, and there is nothing left: until the
    /// next operation begins there is then no reason to come again.
    pub(crate) fn look(&self, now: Instant) -> Option<Vec<Carried>> {
        let mut table = guard(&self.table);
        let idle = table.entries.is_empty() && table.looked_at == table.next_key;
        table.looked_at = table.next_key;
        if idle {
            // Under the mutex: whoever inserts behind it finds that nobody comes, and says so.
            self.watched.store(false, Ordering::SeqCst);
            return None;
        }
        let afloat: Vec<_> = table.entries.iter().filter_map(|(key, entry)| Some((*key, entry.upgrade()?))).collect();
        // What is let go of here may be the last of an operation, whose end comes back for the mutex.
        drop(table);
        let old = afloat.into_iter().filter(|(_, afloat)| now >= afloat.since() + PATIENCE);
        let adopt = |(key, afloat): (u64, Arc<dyn Adopt>)| {
            // Whoever is being polled at this moment is looked at again.
            afloat.adopt().inspect(|_| self.remove(key))
        };
        Some(old.filter_map(adopt).collect())
    }

    /// How many operations are driven by their callers at this moment.
    #[cfg(test)]
    fn len(&self) -> usize {
        guard(&self.table).entries.len()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("afloat", &guard(&self.table).entries.len()).finish_non_exhaustive()
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // An operation that panics while its caller polls it takes the panic to him; nobody looks at it afterwards.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
