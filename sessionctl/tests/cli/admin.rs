//! `ls`, `locks`, `unlock`, `gc`.

use std::time::Duration;

use serde_json::json;

use crate::{Store, new_id, run};

#[test]
fn a_listing_shows_handles_and_never_a_live_id() {
    for options in ["", "?hash_ids=off"] {
        let (store, id) = (Store::new(), new_id());
        store.run_with(options, "set", &[&id, "n", "1"]).text();
        let human = store.run_with(options, "ls", &[]);
        let json = store.run_with(options, "ls", &["--json"]);
        let object = json.object();
        let handle = object["handle"].as_str().unwrap();
        assert!(human.text().contains(handle) && !human.stdout.contains(&id) && !json.stdout.contains(&id), "{human:?}");
        assert_eq!(handle.starts_with("sid:"), !options.is_empty());
        assert!(object["bytes"].as_u64().unwrap() > 0 && object["left_ms"].as_u64().unwrap() > 0, "{object}");
    }
}

#[test]
fn a_listing_stops_at_its_limit_and_counts_every_session_once_without_one() {
    let store = Store::new();
    for _ in 0..5 {
        store.run("set", &[&new_id(), "n", "1"]).text();
    }
    assert_eq!(store.run("ls", &["--json", "--limit", "3"]).objects().len(), 3);
    let mut handles: Vec<_> = store.run("ls", &["--json"]).objects().iter().map(|o| o["handle"].to_string()).collect();
    handles.sort();
    handles.dedup();
    assert_eq!(handles.len(), 5);
}

#[test]
fn a_held_lock_is_listed_with_its_holder() {
    for options in ["", "?hash_ids=off"] {
        let (store, id) = (Store::new(), new_id());
        store.run_with(options, "set", &[&id, "n", "1"]).text();
        assert_eq!(store.run_with(options, "locks", &[]).text(), "no locks");
        let holder = store.hold_with(options, &id, &[]);
        let lock = store.run_with(options, "locks", &["--json"]).object();
        let pid = holder.child.id().to_string();
        assert!(lock["holder"].as_str().unwrap().contains(&pid) && lock["held_ms"].is_u64(), "{lock}");
        let listed = store.run_with(options, "ls", &["--json"]).object();
        assert_eq!(lock["handle"], listed["handle"]);
        let human = store.run_with(options, "locks", &[]);
        assert!(human.text().contains(&format!("pid {pid}")) && !human.stdout.contains(&id), "{human:?}");
    }
}

#[test]
fn a_lock_that_nobody_holds_cannot_be_taken_away() {
    let (store, id) = (Store::new(), new_id());
    store.run("set", &[&id, "n", "1"]).text();
    store.run("unlock", &[&id]).refused(1, "nobody holds it");
    let answer = store.run("unlock", &["sid:0123456789abcdef", "--json"]);
    assert_eq!((answer.status, answer.object()), (1, json!({"unlocked": false})));
}

#[test]
fn a_lock_of_the_kernel_is_refused_with_the_holders_name_by_id_and_by_handle() {
    for options in ["", "?hash_ids=off"] {
        let (store, id) = (Store::new(), new_id());
        store.run_with(options, "set", &[&id, "n", "1"]).text();
        let holder = store.hold_with(options, &id, &[]);
        let lock = store.run_with(options, "locks", &["--json"]).object();
        for name in [&id, lock["handle"].as_str().unwrap()] {
            store.run_with(options, "unlock", &[name]).refused(2, &format!("held by pid {}", holder.child.id()));
        }
    }
}

#[test]
fn collecting_frees_what_has_expired_up_to_the_limit() {
    let store = Store::new();
    for _ in 0..5 {
        store.run_with("?ttl=100ms", "set", &[&new_id(), "n", "1"]).text();
    }
    let live = new_id();
    store.run("set", &[&live, "n", "1"]).text();
    // A record lives at most a second longer than it was told to.
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(store.run("gc", &["--limit", "2"]).text(), "2 freed");
    assert_eq!(store.run("gc", &["--json"]).object(), json!({"freed": 3}));
    assert_eq!(store.run("gc", &[]).text(), "0 freed");
    assert_eq!(store.run("get", &[&live, "n"]).text(), "1");
}

#[test]
fn a_memory_store_is_empty_in_every_process() {
    assert_eq!(run(&["ls", "memory://"]).text(), "no sessions");
    assert_eq!(run(&["locks", "memory://"]).text(), "no locks");
    assert_eq!(run(&["gc", "memory://"]).text(), "0 freed");
}
