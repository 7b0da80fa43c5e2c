//! How long an answer of a thread may take, without a timer for each; see [`clock`](crate::clock).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::{Handle, Id};

use crate::clock::{Clock, Late};

/// The timer of one answer, kept for the next.
#[derive(Debug, Default)]
pub(super) struct Clocks(Mutex<Option<(Id, Clock)>>);

impl Clocks {
    /// Waits for `answer`, but no longer than `limit`. Of several at a time one keeps its timer.
    pub(super) async fn limit<F: Future>(&self, limit: Duration, answer: F) -> Result<F::Output, Late> {
        let runtime = Handle::try_current().ok().map(|runtime| runtime.id());
        let kept = self.slot().take();
        // A timer is of the runtime that it was set on, which may have ended.
        let mut clock = kept.filter(|(id, _)| Some(*id) == runtime).map_or_else(Clock::default, |(_, clock)| clock);
        let over = clock.limit(limit, answer).await;
        if let Some(runtime) = runtime {
            *self.slot() = Some((runtime, clock));
        }
        over
    }

    fn slot(&self) -> MutexGuard<'_, Option<(Id, Clock)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use tokio::time::sleep;

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn a_timer_that_is_kept_is_of_use_on_its_own_runtime_only() {
        let clocks = Clocks::default();
        for _ in 0..2 {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                for flight in [3, 4, 4].map(Duration::from_secs) {
                    clocks.limit(LIMIT, sleep(flight)).await.unwrap();
                    assert!(clocks.slot().as_ref().is_some_and(|(_, clock)| clock.is_set()), "it is kept");
                    clocks.limit(LIMIT, sleep(LIMIT * 2)).await.unwrap_err();
                }
                let [one, two] = [LIMIT / 2, LIMIT * 2].map(|flight| clocks.limit(LIMIT, sleep(flight)));
                let (one, two) = tokio::join!(one, two);
                assert!(one.is_ok() && two.is_err(), "each has its own limit");
            });
        }
    }
}
