//! The books inside a session: a counter, and for each writer the numbers of its writes that are in this state.
//!
//! A writer numbers its writes in each session 1, 2, 3 …; only a write that was certainly refused gives its number to the next
//! one. So the numbers that are there are nearly always one run, however long the hammer goes on.

use serde::{Deserialize, Serialize};

/// The key of the counter.
pub(super) const COUNTER: &str = "counter";
/// The key of the bytes that only fill.
pub(super) const PAD: &str = "pad";

/// The key of the list of one writer.
pub(super) fn writer_key(slot: u32, task: u32) -> String {
    format!("w{slot}.{task}")
}

/// A set of numbers as runs, first and last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Runs {
    runs: Vec<(u64, u64)>,
    /// How many numbers up to `folded_to` there were when their runs were too many to keep.
    folded: u64,
    folded_to: u64,
}

impl Runs {
    /// Adds a number, and says whether it was new. When there are more than `most` runs, the oldest is kept as a count only.
    pub(super) fn insert(&mut self, n: u64, most: usize) -> bool {
        if n <= self.folded_to || self.contains(n) {
            return false;
        }
        let at = self.runs.partition_point(|(_, last)| *last < n);
        let joins_before = at > 0 && self.runs[at - 1].1 + 1 == n;
        let joins_after = self.runs.get(at).is_some_and(|(first, _)| n + 1 == *first);
        match (joins_before, joins_after) {
            (true, true) => {
                self.runs[at - 1].1 = self.runs[at].1;
                self.runs.remove(at);
            }
            (true, false) => self.runs[at - 1].1 = n,
            (false, true) => self.runs[at].0 = n,
            (false, false) => self.runs.insert(at, (n, n)),
        }
        if self.runs.len() > most {
            let (first, last) = self.runs.remove(0);
            self.folded += last - first + 1;
            self.folded_to = last;
        }
        true
    }

    pub(super) fn contains(&self, n: u64) -> bool {
        let at = self.runs.partition_point(|(_, last)| *last < n);
        self.runs.get(at).is_some_and(|(first, _)| *first <= n)
    }

    pub(super) fn len(&self) -> u64 {
        self.folded + self.runs.iter().map(|(first, last)| last - first + 1).sum::<u64>()
    }
}

/// What the comparison of one writer's journal with what a session holds of him says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Acknowledged.
    pub(super) acked: u64,
    /// Acknowledged and not there.
    pub(super) lost: u64,
    /// Made, and nobody was told what became of them.
    pub(super) doubtful: u64,
    /// There.
    pub(super) there: u64,
    /// There, and never made or certainly refused.
    pub(super) strange: u64,
}

impl Tally {
    /// Compares. Of the numbers up to `begun`, those in `doubtful` (in ascending order, none twice) may be there, and all others
    /// were acknowledged.
    ///
    /// Where runs were folded only numbers can be compared: a write that is doubtful and there then hides one that is lost.
    pub(super) fn of(runs: &Runs, begun: u64, doubtful: &[u64]) -> Self {
        let folded_to = runs.folded_to.min(begun);
        let doubtful_below = doubtful.iter().filter(|n| **n <= folded_to).count() as u64;
        let acked_below = folded_to - doubtful_below;
        let mut lost = acked_below.saturating_sub(runs.folded);
        let mut strange = runs.folded.saturating_sub(folded_to);
        // The gaps between the runs, from where the folded part ends.
        let mut next = folded_to + 1;
        let mut gap = |from: u64, to: u64| {
            if from <= to {
                let excused = doubtful.iter().filter(|n| (from..=to).contains(*n)).count() as u64;
                lost += to - from + 1 - excused;
            }
        };
        for (first, last) in &runs.runs {
            gap(next, (first - 1).min(begun));
            strange += last.saturating_sub(begun.max(first - 1));
            next = last + 1;
        }
        gap(next, begun);
        let all_doubtful = doubtful.len() as u64;
        Self { acked: begun - all_doubtful, lost, doubtful: all_doubtful, there: runs.len(), strange }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::harness::Rng;

    fn runs(numbers: impl IntoIterator<Item = u64>) -> Runs {
        let mut runs = Runs::default();
        for n in numbers {
            assert!(runs.insert(n, 1000), "{n} was there");
        }
        runs
    }

    #[test]
    fn runs_hold_exactly_what_was_put_into_them() {
        let mut rng = Rng::new(11);
        for _ in 0..200 {
            let (mut runs, mut set) = (Runs::default(), BTreeSet::new());
            for _ in 0..rng.below(60) {
                let n = 1 + rng.below(40);
                assert_eq!(runs.insert(n, 1000), set.insert(n));
            }
            assert_eq!(runs.len(), set.len() as u64);
            assert!((1..=41).all(|n| runs.contains(n) == set.contains(&n)));
            assert!(runs.runs.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0), "{runs:?} could be shorter");
        }
    }

    #[test]
    fn numbers_without_gaps_are_one_run() {
        assert_eq!(runs(1..=100_000).runs, [(1, 100_000)]);
    }

    #[test]
    fn folded_runs_keep_their_number() {
        let mut runs = Runs::default();
        for n in (1..=200).step_by(2) {
            runs.insert(n, 8);
        }
        assert_eq!((runs.runs.len(), runs.len()), (8, 100));
        assert!(!runs.insert(1, 8), "what was folded is not taken twice");
        // Every even number up to 199 is missing.
        assert_eq!(Tally::of(&runs, 199, &[]).lost, 99);
    }

    #[test]
    fn a_tally_agrees_with_sets() {
        let mut rng = Rng::new(12);
        for _ in 0..2000 {
            let begun = rng.below(30);
            let doubtful: Vec<u64> = (1..=begun).filter(|_| rng.below(5) == 0).collect();
            let there: Vec<u64> = (1..=begun + 3).filter(|_| rng.below(4) != 0).collect();
            let acked: Vec<u64> = (1..=begun).filter(|n| !doubtful.contains(n)).collect();
            let expected = Tally {
                acked: acked.len() as u64,
                lost: acked.iter().filter(|n| !there.contains(n)).count() as u64,
                doubtful: doubtful.len() as u64,
                there: there.len() as u64,
                strange: there.iter().filter(|n| **n > begun).count() as u64,
            };
            assert_eq!(Tally::of(&runs(there), begun, &doubtful), expected);
        }
    }
}
