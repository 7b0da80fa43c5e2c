//! What was measured of each request of a run, and what follows from it: which updates were lost, and who took over from whom.
//!
//! Every time is microseconds from the start of the run, taken where it happened. Nothing here is what a plan had in mind.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::time::Instant;

use super::plan::Strategy;

/// One request, as far as it has got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Lane {
    pub(super) n: usize,
    /// Whether it is to change the session.
    pub(super) writes: bool,
    /// Whether it has the lock from its opening to its release.
    pub(super) holds: bool,
    pub(super) arrived_us: Option<u64>,
    /// When it asked for the session.
    pub(super) queued_us: Option<u64>,
    /// When it had it.
    pub(super) opened_us: Option<u64>,
    pub(super) work_began_us: Option<u64>,
    pub(super) work_ended_us: Option<u64>,
    /// When it asked for its change to be stored.
    pub(super) saving_us: Option<u64>,
    /// When its change was acknowledged and the lock, if it had one, given back.
    pub(super) released_us: Option<u64>,
    /// How long it can have held the lock: until it was told that the lock was given back, or, if that took longer, until the next
    /// one had it.
    pub(super) held_until_us: Option<u64>,
    pub(super) done_us: Option<u64>,
    /// The counter that it read.
    pub(super) saw: Option<u64>,
    /// `saved`, `read`, or in one word what the store answered instead.
    pub(super) outcome: Option<&'static str>,
    /// Whether its change was acknowledged and is not in the session at the end.
    pub(super) lost: bool,
    /// Who wrote over its change.
    pub(super) lost_to: Option<usize>,
    /// Whose changes it wrote over. Some of them may have been brought back by a third.
    pub(super) overwrote: Vec<usize>,
}

/// A change of hands: the lock went from one request to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Handover {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) at_us: u64,
    /// From where the one had heard that it was given back to where the other had it; 0 if the other was quicker.
    pub(super) took_us: u64,
}

impl Lane {
    pub(super) fn waited_us(&self) -> Option<u64> {
        Some(self.opened_us?.saturating_sub(self.queued_us?))
    }

    pub(super) fn saved(&self) -> bool {
        self.outcome == Some("saved")
    }
}

/// Where the requests of a run write down what happens to them.
#[derive(Debug)]
pub(super) struct Board {
    start: Instant,
    lanes: Mutex<Vec<Lane>>,
}

impl Board {
    /// Starts the clock.
    pub(super) fn new(strategy: Strategy, requests: usize) -> Self {
        let lane = |at| Lane { n: at + 1, writes: strategy.writes(at), holds: strategy.holds(at), ..Lane::default() };
        Self { start: Instant::now(), lanes: Mutex::new((0..requests).map(lane).collect()) }
    }

    pub(super) fn start(&self) -> Instant {
        self.start
    }

    pub(super) fn now_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Writes down what happens to the request at this place now.
    pub(super) fn mark(&self, at: usize, note: impl FnOnce(&mut Lane, u64)) {
        // Before the mutex, which others may have just now.
        let now = self.now_us();
        note(&mut self.lanes()[at], now);
    }

    pub(super) fn snapshot(&self) -> Vec<Lane> {
        let mut lanes = self.lanes().clone();
        settle(&mut lanes);
        lanes
    }

    /// Marks the updates that were acknowledged and are not among `present`, the requests whose changes are in the session.
    pub(super) fn judge(&self, present: &BTreeSet<usize>) {
        let mut lanes = self.lanes();
        let mut writers: Vec<(u64, usize, Vec<usize>)> =
            lanes.iter().filter_map(|lane| Some((lane.released_us?, lane.n, lane.overwrote.clone()))).collect();
        writers.sort_unstable();
        for lane in lanes.iter_mut().filter(|lane| lane.saved() && !present.contains(&lane.n)) {
            lane.lost = true;
            // What was written over may have come back with a third and gone again, so the last one counts.
            lane.lost_to = writers.iter().rev().find(|(_, _, over)| over.contains(&lane.n)).map(|(_, n, _)| *n);
        }
    }

    fn lanes(&self) -> MutexGuard<'_, Vec<Lane>> {
        // Nothing panics while it is held, and a lane is whole after every mark.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says of each holder until when it held the lock.
///
/// The store gives a lock back at some moment between the call and its return. Whoever has it next may come to run before the one
/// who called, and then it was given back by then. Somebody who had it before the call cuts nothing short: that would be two holders
/// at a time, and is to be seen as that.
fn settle(lanes: &mut [Lane]) {
    let openings: Vec<u64> = lanes.iter().filter(|lane| lane.holds).filter_map(|lane| lane.opened_us).collect();
    for lane in lanes.iter_mut().filter(|lane| lane.holds) {
        let (Some(saving), Some(released)) = (lane.saving_us, lane.released_us) else { continue };
        let next = openings.iter().filter(|opened| (saving..released).contains(opened)).min();
        lane.held_until_us = Some(next.copied().unwrap_or(released));
    }
}

/// Who took the lock over from whom: of the requests that held it, in the order in which they had it, each one that was waiting
/// already when the one before it gave the lock back.
pub(super) fn handovers(lanes: &[Lane]) -> Vec<Handover> {
    let mut holders: Vec<&Lane> = lanes.iter().filter(|lane| lane.holds && lane.opened_us.is_some()).collect();
    holders.sort_by_key(|lane| lane.opened_us);
    let handover = |pair: &[&Lane]| {
        let (from, to) = (pair[0], pair[1]);
        let (released, queued, opened) = (from.held_until_us?, to.queued_us?, to.opened_us?);
        (queued < released).then(|| Handover {
            from: from.n,
            to: to.n,
            at_us: opened,
            took_us: opened.saturating_sub(released),
        })
    };
    holders.windows(2).filter_map(handover).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(n: usize, queued: u64, opened: u64, released: u64) -> Lane {
        Lane {
            n,
            holds: true,
            queued_us: Some(queued),
            opened_us: Some(opened),
            saving_us: Some(released - 10),
            released_us: Some(released),
            held_until_us: Some(released),
            outcome: Some("saved"),
            ..Lane::default()
        }
    }

    #[test]
    fn a_hold_ends_when_the_next_one_has_the_lock_but_only_after_it_was_to_be_given_back() {
        let mut lanes = [lane(1, 0, 10, 100), lane(2, 5, 95, 200), lane(3, 6, 150, 300)];
        settle(&mut lanes);
        // The third has it while the second has not yet asked to give it back: two at a time, and shown.
        assert_eq!(lanes.map(|lane| lane.held_until_us), [Some(95), Some(200), Some(300)]);
    }

    #[test]
    fn a_handover_is_from_a_holder_to_whoever_was_waiting() {
        let lanes = [lane(1, 0, 10, 100), lane(2, 5, 120, 200), lane(3, 300, 310, 400), lane(4, 301, 400, 500)];
        let (first, last) =
            (Handover { from: 1, to: 2, at_us: 120, took_us: 20 }, Handover { from: 3, to: 4, at_us: 400, took_us: 0 });
        assert_eq!(handovers(&lanes), [first, last]);
        let unlocked = lanes.map(|lane| Lane { holds: false, ..lane });
        assert_eq!(handovers(&unlocked), []);
    }

    #[test]
    fn an_update_is_lost_to_the_last_who_wrote_over_it() {
        let board = Board::new(Strategy::NoLock, 4);
        for (at, released, overwrote) in [(0, 10, vec![]), (1, 20, vec![1]), (2, 30, vec![2]), (3, 40, vec![1, 3])] {
            board.mark(at, |lane, _| {
                (lane.outcome, lane.released_us, lane.overwrote) = (Some("saved"), Some(released), overwrote);
            });
        }
        board.judge(&BTreeSet::from([4]));
        let lost: Vec<_> = board.snapshot().iter().map(|lane| (lane.lost, lane.lost_to)).collect();
        assert_eq!(lost, [(true, Some(4)), (true, Some(3)), (true, Some(4)), (false, None)]);
    }

    #[test]
    fn what_was_not_acknowledged_cannot_be_lost() {
        let board = Board::new(Strategy::Exclusive, 1);
        board.mark(0, |lane, _| lane.outcome = Some("lock_timeout"));
        board.judge(&BTreeSet::new());
        assert!(!board.snapshot()[0].lost);
    }
}
