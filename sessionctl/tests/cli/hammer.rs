//! `hammer`: nothing is lost with the lock, something is without it, and the program says which.

use serde_json::Value;

use crate::{Answer, Store, run};

const KEYS: [&str; 13] = [
    "acked",
    "final",
    "lost",
    "fenced",
    "gone",
    "unknown",
    "killed",
    "cycles_per_s",
    "wait_p50_us",
    "wait_p99_us",
    "wait_max_us",
    "share_min",
    "share_max",
];

fn report(answer: &Answer) -> Value {
    assert_eq!(answer.stderr, "", "{answer:?}");
    let report = answer.object();
    for key in KEYS {
        assert!(report[key].is_number(), "{key} in {report}");
    }
    report
}

#[test]
fn nothing_is_lost_under_any_lock_while_workers_are_killed() {
    for access in ["exclusive", "optimistic", "merge"] {
        let store = Store::new();
        let words = ["--processes", "3", "--tasks", "2", "--seconds", "2", "--kill", "2", "--access", access, "--json"];
        let answer = store.run("hammer", &words);
        let report = report(&answer);
        assert_eq!((answer.status, report["lost"].as_u64()), (0, Some(0)), "{access} {report}");
        assert!(report["acked"].as_u64() > Some(0), "{access} {report}");
    }
}

#[test]
fn the_control_group_loses_updates_and_ends_with_one() {
    let store = Store::new();
    let words = ["--access", "none", "--processes", "4", "--tasks", "4", "--seconds", "2", "--hold", "1ms"];
    let answer = store.run("hammer", &[&words[..], &["--json"]].concat());
    let report = report(&answer);
    assert!(report["lost"].as_u64() > Some(0), "{report}");
    assert_eq!(answer.status, 1);
    let human = store.run("hammer", &words);
    assert_eq!((human.status, human.stderr.as_str()), (1, ""), "{human:?}");
    assert!(human.stdout.contains("lost"), "{human:?}");
}

#[test]
fn it_ends_after_as_many_changes_as_it_was_told() {
    let store = Store::new();
    let answer = store.run("hammer", &["--processes", "2", "--tasks", "2", "--sessions", "3", "--ops", "100", "--json"]);
    let report = report(&answer);
    assert_eq!(answer.status, 0);
    assert!((100..300).contains(&report["acked"].as_u64().unwrap()), "{report}");
}

#[test]
fn a_store_that_processes_cannot_share_is_refused() {
    run(&["hammer", "memory://"]).refused(2, "memory://");
}
