//! What a run of the lab is asked for: how many requests, how long each works, and how each opens the session.
//!
//! Nothing here knows a store. What is refused is refused with its limit, and nothing of what was sent is repeated.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// At most so many requests: more lanes than this cannot be told apart on a page.
pub(super) const MOST_REQUESTS: usize = 200;

/// No request may work for longer than this.
pub(super) const MOST_WORK_MS: u64 = 2000;

/// No two requests may arrive further apart than this.
pub(super) const MOST_APART_MS: u64 = 500;

/// What all requests of a run may take together, one after the other.
pub(super) const MOST_TOGETHER_MS: u64 = 60_000;

/// How the requests of a run open their session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Strategy {
    /// The control group: neither lock nor fence.
    NoLock,
    Exclusive,
    EarlyRelease,
    ReadOnly,
    Merge,
}

impl Strategy {
    pub(super) const ALL: [Self; 5] = [Self::NoLock, Self::Exclusive, Self::EarlyRelease, Self::ReadOnly, Self::Merge];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::NoLock => "No lock",
            Self::Exclusive => "Exclusive",
            Self::EarlyRelease => "Early release",
            Self::ReadOnly => "Read-only",
            Self::Merge => "Merge",
        }
    }

    /// What a request does, in the words of somebody who has read nothing else.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::NoLock => {
                "Reads, works, and writes the whole session back, over whatever is there by then. The control group."
            }
            Self::Exclusive => "Takes the lock, reads, works, writes, and only then lets the next request in.",
            Self::EarlyRelease => "Takes the lock just to make its change, gives it back, and goes on working without it.",
            Self::ReadOnly => {
                "Only reads: no lock, no waiting. The first request writes, under the lock, while the others read."
            }
            Self::Merge => "Works without a lock; when it saves, its changes are laid over the newest state.",
        }
    }

    /// The call of ours that does it; for the control group, what most stores do.
    pub(super) fn call(self) -> &'static str {
        match self {
            Self::NoLock => "load, then store",
            Self::Exclusive => "sessions.open(&id)",
            Self::EarlyRelease => "session.release()",
            Self::ReadOnly => "sessions.view(&id)",
            Self::Merge => "sessions.merge(&id)",
        }
    }

    /// Whether the request at this place, counted from 0, changes the session.
    pub(super) fn writes(self, at: usize) -> bool {
        self != Self::ReadOnly || at == 0
    }

    /// Whether the request at this place holds the lock from its opening to its release.
    pub(super) fn holds(self, at: usize) -> bool {
        match self {
            Self::Exclusive | Self::EarlyRelease => true,
            Self::ReadOnly => at == 0,
            Self::NoLock | Self::Merge => false,
        }
    }
}

/// A plan that is worth a button of its own.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Preset {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) works_ms: &'static [u64],
    pub(super) apart_ms: u64,
}

pub(super) const PRESETS: [Preset; 3] = [
    Preset { name: "twenty", title: "20 at once", works_ms: &[40; 20], apart_ms: 0 },
    // Three requests that take 20, 30 and 25, and a short one that has to wait for all of them: the articles on session locks.
    Preset { name: "article", title: "The article: 20, 30, 25 and a fourth", works_ms: &[20, 30, 25, 10], apart_ms: 0 },
    Preset { name: "crowd", title: "200, one after the other", works_ms: &[30; 200], apart_ms: 2 },
];

/// What a page or a script sends.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wish {
    pub(super) backend: String,
    /// Absent in a comparison, which runs them all.
    pub(super) strategy: Option<Strategy>,
    requests: Option<usize>,
    work_ms: Option<u64>,
    /// In place of the two above: how long each request works.
    works_ms: Option<Vec<u64>>,
    #[serde(default)]
    apart_ms: u64,
}

/// What was asked for and can be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Plan {
    pub(super) works_ms: Vec<u64>,
    pub(super) apart_ms: u64,
}

impl Wish {
    /// Returns the plan.
    ///
    /// # Errors
    /// A sentence that names the limit.
    pub(super) fn plan(&self) -> Result<Plan, String> {
        let works_ms = match (&self.works_ms, self.requests, self.work_ms) {
            (Some(works), None, None) => works.clone(),
            (None, Some(requests), Some(work)) if requests <= MOST_REQUESTS => vec![work; requests],
            (None, Some(_), Some(_)) => return Err(too_many()),
            _ => return Err("A run takes either works_ms, or requests and work_ms.".into()),
        };
        if works_ms.is_empty() || works_ms.len() > MOST_REQUESTS {
            return Err(too_many());
        }
        if works_ms.iter().any(|work| !(1..=MOST_WORK_MS).contains(work)) {
            return Err(format!("A request works for 1 to {MOST_WORK_MS} ms."));
        }
        if self.apart_ms > MOST_APART_MS {
            return Err(format!("Requests arrive at most {MOST_APART_MS} ms apart."));
        }
        let arrivals = self.apart_ms * (works_ms.len() as u64 - 1);
        if arrivals + works_ms.iter().sum::<u64>() > MOST_TOGETHER_MS {
            return Err(format!(
                "One after the other, these requests would take more than {} s: fewer of them, or shorter ones.",
                MOST_TOGETHER_MS / 1000
            ));
        }
        Ok(Plan { works_ms, apart_ms: self.apart_ms })
    }
}

fn too_many() -> String {
    format!("A run has 1 to {MOST_REQUESTS} requests.")
}

impl Plan {
    pub(super) fn work(&self, at: usize) -> Duration {
        Duration::from_millis(self.works_ms[at])
    }

    pub(super) fn arrival(&self, at: usize) -> Duration {
        Duration::from_millis(self.apart_ms * at as u64)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn plan(wish: Value) -> Result<Plan, String> {
        let mut wish = wish;
        wish["backend"] = json!("file");
        serde_json::from_value::<Wish>(wish).map_err(|error| error.to_string())?.plan()
    }

    #[test]
    fn a_plan_is_a_number_of_equal_requests_or_a_list() {
        let equal = plan(json!({"requests": 3, "work_ms": 7, "strategy": "no_lock", "apart_ms": 2})).unwrap();
        assert_eq!((equal.works_ms.as_slice(), equal.arrival(2)), (&[7, 7, 7][..], Duration::from_millis(4)));
        assert_eq!(plan(json!({"works_ms": [20, 30, 25, 10]})).unwrap().work(1), Duration::from_millis(30));
    }

    #[test]
    fn what_goes_beyond_a_limit_is_refused_with_the_limit_and_without_what_was_sent() {
        for (wish, part) in [
            (json!({"requests": 0, "work_ms": 1}), "1 to 200"),
            (json!({"requests": 99_999_999_999_u64, "work_ms": 1}), "1 to 200"),
            (json!({"works_ms": vec![1; 201]}), "1 to 200"),
            (json!({"works_ms": []}), "1 to 200"),
            (json!({"requests": 1, "work_ms": 2001}), "2000 ms"),
            (json!({"requests": 1, "work_ms": 0}), "1 to 2000"),
            (json!({"requests": 2, "work_ms": 1, "apart_ms": 501}), "500 ms"),
            (json!({"requests": 200, "work_ms": 301}), "60 s"),
            (json!({"requests": 2}), "either"),
            (json!({"requests": 2, "work_ms": 1, "works_ms": [1]}), "either"),
        ] {
            let text = plan(wish.clone()).unwrap_err();
            assert!(text.contains(part) && !text.contains("99999"), "{wish}: {text}");
        }
    }

    #[test]
    fn every_preset_is_within_the_limits() {
        for preset in PRESETS {
            let wish = json!({"works_ms": preset.works_ms, "apart_ms": preset.apart_ms});
            assert!(plan(wish).is_ok(), "{}", preset.name);
        }
    }
}
