//! `get`, `set`, `incr`, `hold`, `rm`.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use crate::{Answer, Store, new_id, run, sessionctl};

#[test]
fn what_is_set_can_be_read_until_it_is_removed() {
    let (store, id) = (Store::new(), new_id());
    assert_eq!(
        store.run("set", &[&id, "cart", r#"{"items": [1, 2.5, null, "é"], "open": true}"#]).text(),
        "stored in a new session"
    );
    assert_eq!(store.run("set", &[&id, "name", r#""Ada""#]).text(), "stored");
    assert_eq!(store.run("set", &[&id, "debt", "-7"]).text(), "stored");
    assert_eq!(store.run("get", &[&id, "name"]).text(), r#""Ada""#);
    assert_eq!(store.run("get", &[&id, "debt", "--json"]).text(), "-7");
    let all = store.run("get", &[&id]).object();
    assert_eq!(all, json!({"cart": {"items": [1, 2.5, null, "é"], "open": true}, "debt": -7, "name": "Ada"}));
    assert_eq!(store.run("rm", &[&id]).text(), "removed");
    store.run("get", &[&id]).refused(1, "no such session");
}

#[test]
fn what_is_absent_ends_with_one_and_is_not_created_by_looking() {
    let (store, id) = (Store::new(), new_id());
    store.run("get", &[&id]).refused(1, "no such session");
    store.run("get", &[&id, "n", "--json"]).refused(1, "no such session");
    store.run("rm", &[&id]).refused(1, "no such session");
    assert_eq!(store.run("ls", &[]).text(), "no sessions");
    store.run("set", &[&id, "n", "1"]).text();
    store.run("get", &[&id, "m"]).refused(1, "no such key");
    assert_eq!(store.run("rm", &[&id, "--json"]).object(), json!({"removed": true}));
    let again = store.run("rm", &[&id, "--json"]);
    assert_eq!((again.status, again.object()), (1, json!({"removed": false})));
}

#[test]
fn json_answers_are_objects_and_errors_stay_on_stderr() {
    let (store, id) = (Store::new(), new_id());
    let set = store.run("set", &[&id, "n", "1", "--json"]).object();
    assert_eq!(set, json!({"key": "n", "stored": true, "created": true}));
    let incr = store.run("incr", &[&id, "n", "--times", "3", "--json"]).object();
    assert_eq!(incr, json!({"key": "n", "times": 3, "value": 4}));
    let held = store.run("hold", &[&id, "--seconds", "0", "--json"]).objects();
    assert_eq!((held.len(), &held[0], &held[1]["released"]), (2, &json!({"held": true}), &json!(true)));
    assert_eq!(run(&["--json", "get", &store.dsn(""), &id]).object(), json!({"n": 4}));
}

#[test]
fn what_a_terminal_could_act_on_is_escaped_and_still_json() {
    let (store, id) = (Store::new(), new_id());
    let (key, value) = ("k\u{1b}]0;x\u{7}\u{202e}", "v\u{9b}31m\u{200f}\u{e0041}");
    store.run("set", &[&id, key, &serde_json::to_string(value).unwrap()]).text();
    let answer = store.run("get", &[&id]);
    assert!(answer.text().is_ascii(), "{answer:?}");
    assert_eq!(answer.object(), json!({key: value}));
}

#[test]
fn counting_starts_at_nought_and_goes_on_where_it_was() {
    let (store, id) = (Store::new(), new_id());
    assert_eq!(store.run("incr", &[&id, "n"]).text(), "1");
    assert_eq!(store.run("incr", &[&id, "n", "--times", "41"]).text(), "42");
    store.run("set", &[&id, "text", "\"x\""]).text();
    store.run("incr", &[&id, "text"]).refused(1, "not a whole number");
    store.run("set", &[&id, "top", &i64::MAX.to_string()]).text();
    store.run("incr", &[&id, "top"]).refused(1, "largest");
    assert_eq!(store.run("get", &[&id, "n"]).text(), "42");
}

#[test]
fn no_increment_of_four_processes_is_lost() {
    let (store, id) = (Store::new(), new_id());
    let finals: Vec<u64> = std::thread::scope(|scope| {
        let count = || store.run("incr", &[&id, "n", "--times", "50", "--hold", "1ms"]).text().parse().unwrap();
        let running: Vec<_> = (0..4).map(|_| scope.spawn(count)).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(finals.iter().max(), Some(&200));
    assert_eq!(store.run("get", &[&id, "n"]).text(), "200");
}

#[test]
fn holding_an_absent_session_stores_nothing() {
    let (store, id) = (Store::new(), new_id());
    assert_eq!(store.run("hold", &[&id, "--seconds", "0"]).text(), "held");
    store.run("get", &[&id]).refused(1, "no such session");
}

#[test]
fn a_holder_lasts_as_long_as_it_was_told() {
    let (store, id) = (Store::new(), new_id());
    let started = Instant::now();
    assert_eq!(store.run("hold", &[&id, "--seconds", "1"]).text(), "held");
    assert!(started.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_holder_that_is_told_to_end_gives_the_lock_back_and_ends_well() {
    let (store, id) = (Store::new(), new_id());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let holder = store.hold(&id, &[]);
        store.run_with("?wait=0ms", "incr", &[&id, "n"]).refused(1, "held by");
        holder.signal(signal);
        let (status, rest) = holder.end();
        assert_eq!((status.code(), rest.as_str()), (Some(0), ""), "{signal}");
        store.run_with("?wait=0ms", "incr", &[&id, "n"]).text();
    }
}

#[test]
fn a_view_and_a_removal_do_not_wait_for_a_holder() {
    let (store, id) = (Store::new(), new_id());
    store.run("set", &[&id, "n", "1"]).text();
    let holder = store.hold(&id, &[]);
    assert_eq!(store.run_with("?wait=20s", "get", &[&id, "n"]).text(), "1");
    assert_eq!(store.run_with("?wait=20s", "rm", &[&id]).text(), "removed");
    store.run("get", &[&id]).refused(1, "no such session");
    drop(holder);
    store.run("get", &[&id]).refused(1, "no such session");
}

#[test]
fn a_holder_whose_reader_has_gone_gives_the_lock_back_and_ends_quietly() {
    let (store, id) = (Store::new(), new_id());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let answer = sessionctl(&["hold", &store.dsn(""), &id]).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!((answer.status.code(), answer.stderr.as_slice()), (Some(0), &b""[..]));
    store.run_with("?wait=0ms", "incr", &[&id, "n"]).text();
}

#[test]
fn a_store_that_has_no_files_left_to_open_ends_with_three() {
    let (store, id) = (Store::new(), new_id());
    store.run("incr", &[&id, "n"]).text();
    // How many a process needs before it comes to the store is its own affair: too few are met at every step on the way.
    let answers: Vec<_> = (8..40)
        .map(|limit| {
            let program = env!("CARGO_BIN_EXE_sessionctl");
            let script = format!("ulimit -n {limit}; exec \"$@\"");
            let command = ["-c", &script, "sh", program, "incr", &store.dsn(""), &id, "n"];
            Answer::of(Command::new("sh").args(command).stdin(Stdio::null()).output().unwrap())
        })
        .collect();
    for answer in &answers {
        assert!([0, 2, 3].contains(&answer.status) && (answer.status == 0 || answer.stdout.is_empty()), "{answer:?}");
    }
    assert!(answers.iter().any(|answer| answer.status == 3), "{answers:?}");
    let counted = answers.iter().filter(|answer| answer.status == 0).count();
    assert_eq!(store.run("get", &[&id, "n"]).text(), (counted + 1).to_string());
}
