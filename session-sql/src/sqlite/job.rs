//! A request on its way to a thread: who asked, whether he still waits, and how he is told.
//!
//! Nothing here knows a database.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use session_core::ErrorKind;
use session_core::spin::SpinWait;
use tokio::sync::oneshot;

use super::clocks::Clocks;
use crate::database::Failure;

const WAITS: u8 = 0;
const STARTED: u8 = 1;
const WITHDRAWN: u8 = 2;

/// The thread ends a request of itself; this is how much later its caller no longer waits for that.
const GRACE: Duration = Duration::from_millis(50);

/// The side of the thread.
#[derive(Debug)]
pub(super) struct Request<T> {
    state: Arc<AtomicU8>,
    reply: oneshot::Sender<Result<T, Failure>>,
    pub(super) deadline: Instant,
}

/// The side of the caller. Dropped before the thread has come to it, the request is not carried out.
#[derive(Debug)]
pub(super) struct Caller<T> {
    state: Arc<AtomicU8>,
    answer: oneshot::Receiver<Result<T, Failure>>,
    deadline: Instant,
}

pub(super) fn request<T>(timeout: Duration) -> (Request<T>, Caller<T>) {
    let (reply, answer) = oneshot::channel();
    let state = Arc::new(AtomicU8::new(WAITS));
    let deadline = Instant::now() + timeout;
    (Request { state: state.clone(), reply, deadline }, Caller { state, answer, deadline })
}

impl<T> Request<T> {
    /// Says that it is being carried out from now on; false if its caller has gone.
    pub(super) fn start(&self) -> bool {
        let started = self.state.compare_exchange(WAITS, STARTED, Ordering::AcqRel, Ordering::Acquire);
        started != Err(WITHDRAWN)
    }

    pub(super) fn is_withdrawn(&self) -> bool {
        self.state.load(Ordering::Acquire) == WITHDRAWN
    }

    pub(super) fn tell(self, outcome: Result<T, Failure>) {
        // Whoever has gone need not be told.
        let _ = self.reply.send(outcome);
    }
}

impl<T> Caller<T> {
    /// Waits for the answer, `among` others of its kind if there are any.
    pub(super) async fn answer(mut self, clocks: &Clocks, among: Option<&SpinWait>) -> Result<T, Failure> {
        let limit = (self.deadline + GRACE).saturating_duration_since(Instant::now());
        let answer = async {
            match among {
                Some(others) => others.wait(&mut self.answer).await,
                None => (&mut self.answer).await.ok(),
            }
        };
        match clocks.limit(limit, answer).await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Err(self.lost("the thread of the database has ended without an answer")),
            Err(_) => Err(self.lost("the database file did not answer in time")),
        }
    }

    fn lost(&self, message: &'static str) -> Failure {
        let mut failure = Failure::new(ErrorKind::Unavailable, message);
        failure.sent = !self.withdraw();
        failure
    }

    fn withdraw(&self) -> bool {
        self.state.compare_exchange(WAITS, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire) != Err(STARTED)
    }
}

impl<T> Drop for Caller<T> {
    fn drop(&mut self) {
        self.withdraw();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_goes_before_it_has_begun_has_asked_for_nothing() {
        let (request, caller) = request::<()>(Duration::from_secs(1));
        drop(caller);
        assert!(request.is_withdrawn() && !request.start());
    }

    #[tokio::test]
    async fn only_what_has_not_begun_in_time_has_certainly_not_happened() {
        let (waiting, caller) = request::<()>(Duration::ZERO);
        let failure = caller.answer(&Clocks::default(), None).await.unwrap_err();
        assert_eq!((failure.kind, failure.sent), (ErrorKind::Unavailable, false));
        assert!(!waiting.start());
        let (begun, caller) = request::<()>(Duration::ZERO);
        assert!(begun.start());
        assert!(caller.answer(&Clocks::default(), None).await.unwrap_err().sent);
        // It may be begun anew, in another transaction, and is told to nobody.
        assert!(begun.start());
        begun.tell(Ok(()));
    }

    #[tokio::test]
    async fn a_thread_that_ends_does_not_leave_anybody_waiting() {
        let (request, caller) = request::<()>(Duration::from_secs(3600));
        assert!(request.start());
        drop(request);
        assert!(caller.answer(&Clocks::default(), None).await.unwrap_err().sent);
    }
}
