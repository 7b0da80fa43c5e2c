//! What happened in a run, as numbers and as the sentence that explains them.
//!
//! Everything is worked out from what was measured and from what was found in the session at the end.

use serde::Serialize;

use super::lane::{Handover, Lane, handovers};
use super::plan::Strategy;
use super::run::Found;

/// The numbers of a run, and what they mean.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Story {
    /// How many changes were acknowledged: what the counter should say.
    pub(super) expected: u64,
    /// What the counter says.
    pub(super) found: u64,
    pub(super) lost: u64,
    /// Requests that were answered with an error, and know it.
    pub(super) refused: u64,
    /// From the start to the end of the last request.
    pub(super) total_us: u64,
    /// What the requests worked, together.
    pub(super) worked_us: u64,
    pub(super) wait_median_us: u64,
    pub(super) wait_max_us: u64,
    /// What the last request waited.
    pub(super) wait_last_us: u64,
    /// The median of what the lock was held.
    pub(super) held_median_us: Option<u64>,
    pub(super) handovers: Vec<Handover>,
    pub(super) sentence: String,
}

/// Returns what became of a run whose requests are all done.
pub(super) fn tell(strategy: Strategy, lanes: &[Lane], found: &Found) -> Story {
    let expected = lanes.iter().filter(|lane| lane.saved()).count() as u64;
    let lost = lanes.iter().filter(|lane| lane.lost).count() as u64;
    let waits = sorted(lanes.iter().filter_map(Lane::waited_us));
    let held = sorted(lanes.iter().filter(|lane| lane.holds).filter_map(|lane| span(lane.opened_us, lane.held_until_us)));
    let mut story = Story {
        expected,
        found: found.counter,
        lost,
        refused: lanes.iter().filter(|lane| !matches!(lane.outcome, Some("saved" | "read"))).count() as u64,
        total_us: lanes.iter().filter_map(|lane| lane.done_us).max().unwrap_or_default(),
        worked_us: lanes.iter().filter_map(|lane| span(lane.work_began_us, lane.work_ended_us)).sum(),
        wait_median_us: median(&waits).unwrap_or_default(),
        wait_max_us: waits.last().copied().unwrap_or_default(),
        wait_last_us: lanes.last().and_then(Lane::waited_us).unwrap_or_default(),
        held_median_us: median(&held),
        handovers: handovers(lanes),
        sentence: String::new(),
    };
    story.sentence = sentence(strategy, lanes, &story);
    story
}

fn span(from: Option<u64>, to: Option<u64>) -> Option<u64> {
    Some(to?.saturating_sub(from?))
}

fn sorted(numbers: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut numbers: Vec<_> = numbers.collect();
    numbers.sort_unstable();
    numbers
}

fn median(sorted: &[u64]) -> Option<u64> {
    sorted.get(sorted.len() / 2).copied()
}

fn sentence(strategy: Strategy, lanes: &[Lane], story: &Story) -> String {
    let (n, total) = (lanes.len(), time(story.total_us));
    let mut text = match strategy {
        Strategy::NoLock if story.lost > 0 => lost(lanes, story),
        Strategy::NoLock => format!(
            "Nothing was lost this time, because no two of these requests overlapped between reading and writing. \
             Nothing prevents it either: let them arrive closer together, or work longer. All {n} took {total}."
        ),
        Strategy::Exclusive if n == 1 => format!("One request, one lock, {total}. Nobody was there to wait for it."),
        Strategy::Exclusive => format!(
            "One at a time: each request found what the one before it had written, so nothing was lost. \
             The price is the queue: the longest wait was {}, and all {n} together took {total}.",
            time(story.wait_max_us)
        ),
        Strategy::EarlyRelease => format!(
            "Each request held the lock for {} (the median), just long enough to make its change, and did its slow work \
             without it. Nothing was lost, the longest wait was {}, and {} of work took {total}.",
            time(story.held_median_us.unwrap_or_default()),
            time(story.wait_max_us),
            time(story.worked_us)
        ),
        Strategy::ReadOnly if n == 1 => format!("The only request is the one that writes, under the lock: {total}."),
        Strategy::ReadOnly => {
            let wait = lanes.iter().filter(|lane| !lane.writes).filter_map(Lane::waited_us).max().unwrap_or_default();
            let who = match n {
                2 => "Request 2".into(),
                n => format!("Requests 2 to {n}"),
            };
            format!(
                "{who} only read the session. None of them waited for the writer: the longest had it after {}. \
                 A view has no method that writes, so there is nothing to lose. All took {total}.",
                time(wait)
            )
        }
        Strategy::Merge => {
            let saving = lanes.iter().filter_map(|lane| span(lane.saving_us, lane.released_us)).max().unwrap_or_default();
            format!(
                "Nobody waited to begin. Each request worked on its own copy; when it saved, its change was laid over the newest \
                 state, and the counter was counted up from there. Nothing was lost, {} of work took {total}, and the \
                 longest save {}.",
                time(story.worked_us),
                time(saving)
            )
        }
    };
    if story.lost > 0 && strategy != Strategy::NoLock {
        // It would be a defect, and the last place to keep quiet about it is here.
        text = format!(
            "{} of {} acknowledged updates are missing. That must not happen: please report it.",
            story.lost, story.expected
        );
    }
    if story.refused > 0 {
        text.push_str(&match story.refused {
            1 => " One request was refused; it was told so, and its change is not counted.".into(),
            refused => format!(" {refused} requests were refused; they were told so, and their changes are not counted."),
        });
    }
    text
}

fn lost(lanes: &[Lane], story: &Story) -> String {
    // The most common reading: how many looked at the counter before anybody had written what they saw.
    let together = lanes.iter().filter(|lane| lane.saw == lanes[0].saw).count();
    let first = lanes.iter().find(|lane| lane.lost).and_then(|lane| Some((lane.n, lane.lost_to?)));
    let example = match first {
        Some((n, winner)) => {
            format!(" Request {n}\u{2019}s update was wiped out by request {winner}, which had read before it was written.")
        }
        None => String::new(),
    };
    let (were, updates) = if story.lost == 1 { ("is", "update") } else { ("are", "updates") };
    let together = if together == lanes.len() { "All".into() } else { format!("{together} of them") };
    format!(
        "{} of {} {updates} {were} gone, and nobody was told: all requests answered \u{201c}saved\u{201d}. {together} read the same \
         counter, each added one to what it had read, and each wrote over the others.{example}",
        story.lost, story.expected
    )
}

/// Microseconds as somebody would say them.
fn time(us: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "two or three digits are shown")]
    let us = us as f64;
    match us {
        us if us < 1000.0 => format!("{us:.0} µs"),
        us if us < 10_000.0 => format!("{:.1} ms", us / 1e3),
        us if us < 1_000_000.0 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn lane(n: usize, lost_to: Option<usize>) -> Lane {
        Lane {
            n,
            writes: true,
            queued_us: Some(0),
            opened_us: Some(n as u64 * 1000),
            released_us: Some(n as u64 * 1000 + 500),
            done_us: Some(n as u64 * 1000 + 600),
            saw: Some(0),
            outcome: Some("saved"),
            lost: lost_to.is_some(),
            lost_to,
            ..Lane::default()
        }
    }

    fn found(counter: u64) -> Found {
        Found { counter, present: BTreeSet::new() }
    }

    #[test]
    fn a_loss_is_told_with_an_example_and_the_numbers_add_up() {
        let lanes = [lane(1, Some(3)), lane(2, Some(3)), lane(3, None)];
        let story = tell(Strategy::NoLock, &lanes, &found(1));
        assert_eq!((story.expected, story.found, story.lost), (3, 1, 2));
        assert_eq!((story.total_us, story.wait_max_us, story.wait_last_us, story.wait_median_us), (3600, 3000, 3000, 2000));
        assert!(
            story.sentence.starts_with("2 of 3 updates are gone") && story.sentence.contains("by request 3"),
            "{story:?}"
        );
    }

    #[test]
    fn a_strategy_that_loses_says_so_whatever_it_promises() {
        let story = tell(Strategy::Exclusive, &[lane(1, Some(2)), lane(2, None)], &found(1));
        assert!(story.sentence.contains("must not happen"), "{}", story.sentence);
    }

    #[test]
    fn a_refused_request_is_neither_expected_nor_lost() {
        let refused = Lane { outcome: Some("lock_timeout"), ..lane(2, None) };
        let story = tell(Strategy::Exclusive, &[lane(1, None), refused], &found(1));
        assert_eq!((story.expected, story.lost, story.refused), (1, 0, 1));
        assert!(story.sentence.contains("One request was refused"), "{}", story.sentence);
    }

    #[test]
    fn every_strategy_has_a_sentence_for_one_request_and_for_many() {
        for strategy in Strategy::ALL {
            for lanes in [vec![lane(1, None)], vec![lane(1, None), lane(2, None)]] {
                assert!(tell(strategy, &lanes, &found(1)).sentence.len() > 20);
            }
        }
        assert_eq!([time(999), time(1500), time(75_400), time(1_234_567)], ["999 µs", "1.5 ms", "75 ms", "1.23 s"]);
    }
}
