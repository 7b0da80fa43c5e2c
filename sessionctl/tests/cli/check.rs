//! `check`: which cases run, where, and what is said about them.

use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Answer, Store, run, sessionctl};

#[test]
fn one_case_is_chosen_by_its_name_and_several_by_a_part_of_it() {
    let store = Store::new();
    let answer = store.run("check", &["--only", "absent_id_reads_none", "--json"]);
    assert_eq!((answer.status, answer.stderr.as_str()), (0, ""));
    let lines = answer.objects();
    assert_eq!(lines.len(), 2);
    assert_eq!((&lines[0]["case"], &lines[0]["suite"]), (&json!("absent_id_reads_none"), &json!("handler")));
    assert_eq!((&lines[0]["outcome"], &lines[0]["detail"]), (&json!("passed"), &json!("")));
    assert!(lines[0]["ms"].as_f64() > Some(0.0));
    assert_eq!(lines[1], json!({"cases": 1, "passed": 1, "failed": 0}));
    // Nothing of the cases stays behind.
    assert_eq!(store.run("ls", &[]).text(), "no sessions");

    let several = run(&["check", "memory://", "--only", "absent", "--json"]).objects();
    let (last, lines) = several.split_last().unwrap();
    assert!(lines.len() > 1 && last["cases"] == json!(lines.len()), "{last}");
    assert!(lines.iter().all(|line| line["case"].as_str().unwrap().contains("absent")));
}

#[test]
fn an_unknown_case_is_a_mistake() {
    run(&["check", "memory://", "--only", "frobnicate"]).refused(2, "no case has frobnicate in its name");
}

#[test]
fn people_see_a_mark_for_each_case_and_a_verdict() {
    let answer = run(&["check", "memory://", "--only", "absent_id_reads_none"]);
    let text = answer.text();
    assert!(text.starts_with("memory://  1 case\n") && text.contains("✓   handler"), "{text}");
    assert!(text.contains("1 passed, 0 failed"), "{text}");
}

#[test]
fn a_store_that_breaks_a_guarantee_ends_with_one() {
    // A store whose directory cannot be written to keeps nothing, and says so case by case.
    let answer = run(&["check", "file:///proc/self", "--json"]);
    assert_ne!(answer.status, 0, "{answer:?}");
    assert!(answer.objects().iter().all(|line: &Value| line["outcome"] != "passed"));
}

#[test]
fn being_told_to_end_leaves_nothing_behind() {
    let store = Store::new();
    let child = sessionctl(&["check", &store.dsn("")]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let own = || std::fs::read_dir(store.0.path()).unwrap().any(|entry| entry.unwrap().path().is_dir());
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    while !own() {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let answer = Answer::of(child.wait_with_output().unwrap());
    assert_eq!((answer.status, answer.stderr.as_str()), (130, ""));
    assert!(!own());
}
