//! How long a flight may take, without a timer for each.
//!
//! To set a timer that is due before all others wakes the thread that watches them, which costs a lone flight as much as
//! everything else that it does in this process. So each connection has one timer, which is left as it is while it is due too early:
//! it fires once in a while, finds that the flight of now has begun later, and is set again.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// A flight was not over in time.
#[derive(Debug)]
pub(crate) struct Late;

/// The timer of one connection.
#[derive(Debug, Default)]
pub(crate) struct Clock(Option<Pin<Box<Sleep>>>);

impl Clock {
    #[cfg(all(test, feature = "sqlite"))]
    pub(crate) fn is_set(&self) -> bool {
        self.0.is_some()
    }

    /// Waits for `flight`, but no longer than `limit`.
    pub(crate) async fn limit<F: Future>(&mut self, limit: Duration, flight: F) -> Result<F::Output, Late> {
        let until = Instant::now() + limit;
        let mut flight = pin!(flight);
        poll_fn(|cx| {
            if let Poll::Ready(answer) = flight.as_mut().poll(cx) {
                return Poll::Ready(Ok(answer));
            }
            let timer = self.0.get_or_insert_with(|| Box::pin(sleep_until(until)));
            if timer.deadline() > until {
                timer.as_mut().reset(until);
            }
            while timer.as_mut().poll(cx).is_ready() {
                if Instant::now() >= until {
                    return Poll::Ready(Err(Late));
                }
                timer.as_mut().reset(until);
            }
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use tokio::time::sleep;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_flight_is_over_in_time_or_late_whatever_the_timer_was_set_to_before() {
        let mut clock = Clock::default();
        let begun = Instant::now();
        let last = Duration::from_millis(1);
        for flight in [3, 3, 3, 4].map(Duration::from_secs) {
            clock.limit(LIMIT, sleep(flight)).await.unwrap();
        }
        assert_eq!(begun.elapsed().as_secs(), 13);
        for limit in [LIMIT, LIMIT / 5, LIMIT * 2] {
            let begun = Instant::now();
            clock.limit(limit, sleep(limit + last)).await.unwrap_err();
            assert!(begun.elapsed() >= limit && begun.elapsed() <= limit + last, "{limit:?} was {:?}", begun.elapsed());
        }
        clock.limit(LIMIT, sleep(LIMIT - last)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_fired_while_nothing_was_under_way_ends_no_flight() {
        let mut clock = Clock::default();
        clock.limit(LIMIT, tokio::task::yield_now()).await.unwrap();
        sleep(LIMIT * 3).await;
        clock.limit(LIMIT, sleep(LIMIT / 2)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_over_at_once_needs_no_timer() {
        let mut clock = Clock::default();
        assert_eq!(clock.limit(Duration::ZERO, async { 7 }).await.unwrap(), 7);
        assert!(clock.0.is_none());
    }
}
