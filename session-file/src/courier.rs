//! How what a thread has to tell comes back to the tasks of a runtime.
//!
//! A thread that wakes a task of a runtime with several workers wakes a worker for it, and that one, having found work, another to
//! look for more. Where a task waits for a disk that takes some ten microseconds, both cost more than what is told. So the threads
//! hand all that they have to tell to a task of that runtime, and ring for it through the descriptors that its workers watch when
//! they have nothing to do: one worker wakes, and wakes the tasks itself.
//!
//! It only carries. What it cannot take, or was not in time to bring, is told directly.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, Id, RuntimeFlavor};
use tokio::task::AbortHandle;

/// Tells a task what came of its job.
pub(crate) type Delivery = Box<dyn FnOnce() + Send>;

/// The task that brings what the threads have to tell to the tasks of one runtime.
#[derive(Default)]
pub(crate) struct Courier(Mutex<Option<Round>>);

struct Round {
    runtime: Id,
    mail: Arc<Mail>,
    task: AbortHandle,
}

/// What is to be brought, and the bell.
pub(crate) struct Mail {
    /// `None` once nobody brings it any more.
    deliveries: Mutex<Option<Vec<Delivery>>>,
    bell: EventFd,
}

impl Courier {
    /// Returns where to hand what is told to the running task; `None` if that is to be told directly: its runtime has but one worker,
    /// or another one is served.
    pub(crate) fn mail(&self) -> Option<Arc<Mail>> {
        let runtime = Handle::try_current().ok()?;
        let mut round = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(round) = round.as_ref().filter(|round| !round.task.is_finished()) {
            // A runtime that is not driven would bring nothing to the tasks of another.
            return (round.runtime == runtime.id()).then(|| Arc::clone(&round.mail));
        }
        if runtime.runtime_flavor() != RuntimeFlavor::MultiThread || runtime.metrics().num_workers() < 2 {
            return None;
        }
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).ok()?;
        let mail = Arc::new(Mail { deliveries: Mutex::new(Some(Vec::new())), bell });
        #[allow(deprecated, reason = "its successor is unsafe, for types whose descriptor may change or close; ours cannot")]
        let bell = AsyncFd::with_interest(Bell(Arc::clone(&mail)), Interest::READABLE).ok()?;
        let task = runtime.spawn(async move {
            while let Ok(mut rung) = bell.readable().await {
                // The counter behind the bell is left as it is: each ring is told once.
                rung.clear_ready();
                bell.get_ref().0.bring();
            }
        });
        *round = Some(Round { runtime: runtime.id(), mail: Arc::clone(&mail), task: task.abort_handle() });
        Some(mail)
    }
}

impl Drop for Courier {
    fn drop(&mut self) {
        if let Some(round) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner) {
            round.task.abort();
        }
    }
}

impl fmt::Debug for Courier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Courier").finish_non_exhaustive()
    }
}

impl Mail {
    /// Has `tell` called soon, by the courier or, if he has gone, at once.
    pub(crate) fn hand(&self, tell: Delivery) {
        let mut deliveries = self.deliveries();
        let Some(waiting) = deliveries.as_mut() else {
            drop(deliveries);
            return tell();
        };
        let first = waiting.is_empty();
        waiting.push(tell);
        drop(deliveries);
        // Whoever finds some there comes before the courier, who was rung for.
        if first && self.bell.write(1).is_err() {
            self.bring();
        }
    }

    fn bring(&self) {
        let waiting = self.deliveries().as_mut().map(std::mem::take);
        waiting.into_iter().flatten().for_each(|tell| tell());
    }

    fn deliveries(&self) -> MutexGuard<'_, Option<Vec<Delivery>>> {
        // Nothing is told while this is held.
        self.deliveries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bell as its runtime watches it; dropped with the courier.
struct Bell(Arc<Mail>);

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.bell.as_fd().as_raw_fd()
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        let rest = self.0.deliveries().take();
        rest.into_iter().flatten().for_each(|tell| tell());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::time::Duration;

    use tokio::runtime::{Builder, Runtime};
    use tokio::sync::oneshot;

    use super::*;

    fn runtime(workers: usize) -> Runtime {
        Builder::new_multi_thread().worker_threads(workers).enable_all().build().unwrap()
    }

    #[test]
    fn what_threads_hand_over_reaches_every_task() {
        let courier = Arc::new(Courier::default());
        runtime(2).block_on(async {
            let tasks = (0..64).map(|task: u64| {
                let courier = courier.clone();
                tokio::spawn(async move {
                    for round in 0..100 {
                        let (send, receive) = oneshot::channel();
                        let mail = courier.mail().unwrap();
                        std::thread::spawn(move || mail.hand(Box::new(move || send.send((task, round)).unwrap())));
                        assert_eq!(receive.await.unwrap(), (task, round));
                    }
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                tokio::time::timeout(Duration::from_secs(60), task).await.expect("nothing is left lying").unwrap();
            }
        });
    }

    #[test]
    fn another_runtime_is_not_kept_waiting_by_one_that_nobody_drives() {
        let courier = Courier::default();
        let (one, other, single) = (runtime(2), runtime(2), Builder::new_current_thread().enable_all().build().unwrap());
        assert!(single.block_on(async { courier.mail() }).is_none(), "one worker wakes nobody else");
        let mail = one.block_on(async { courier.mail() }).unwrap();
        assert!(other.block_on(async { courier.mail() }).is_none());
        assert!(courier.mail().is_none(), "outside a runtime");
        drop(one);
        // What comes too late is told at once, and the next runtime is served.
        let (send, receive) = std::sync::mpsc::channel();
        mail.hand(Box::new(move || send.send(()).unwrap()));
        receive.try_recv().unwrap();
        assert!(other.block_on(async { courier.mail() }).is_some());
    }

    #[test]
    fn what_was_not_brought_is_told_when_the_runtime_ends() {
        let courier = Courier::default();
        let (send, receive) = std::sync::mpsc::channel();
        let one = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let mail = one.block_on(async { courier.mail() }).unwrap();
        // As if the bell had not been heard yet.
        mail.deliveries().as_mut().unwrap().push(Box::new(move || send.send(()).unwrap()));
        receive.try_recv().unwrap_err();
        drop(one);
        receive.try_recv().unwrap();
    }
}
