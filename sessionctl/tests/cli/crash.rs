//! Holders that die and holders that stand still.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::{Answer, Store, new_id, sessionctl};

/// How long the program takes to start, count and end when nobody is in its way.
fn undisturbed(store: &Store) -> Duration {
    let id = new_id();
    let times = (0..5).map(|_| {
        let started = Instant::now();
        store.run("incr", &[&id, "n"]).text();
        started.elapsed()
    });
    times.max().unwrap()
}

#[test]
fn a_killed_holder_frees_its_session_at_once() {
    let (store, id) = (Store::new(), new_id());
    let mut soonest = Duration::MAX;
    // The machine may be busy with something else once, but not each time.
    for time in 1..=8 {
        let mut holder = store.hold(&id, &[]);
        let waiter = sessionctl(&["incr", &store.dsn("?wait=20s"), &id, "n"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let killed = Instant::now();
        holder.child.kill().unwrap();
        let answer = Answer::of(waiter.wait_with_output().unwrap());
        soonest = soonest.min(killed.elapsed());
        assert_eq!(answer.text(), time.to_string());
        if soonest < Duration::from_millis(100) {
            return;
        }
    }
    panic!("the waiter was through {soonest:?} after the kill at the soonest");
}

#[test]
fn a_stopped_holder_is_named_when_the_wait_is_over() {
    let (store, id) = (Store::new(), new_id());
    store.run("set", &[&id, "n", "0"]).text();
    let wait = Duration::from_millis(1500);
    let slack = Duration::from_millis(250);
    let overhead = undisturbed(&store);
    let mut seen = Vec::new();
    for _ in 0..4 {
        let holder = store.hold(&id, &[]);
        holder.signal(Signal::SIGSTOP);
        let started = Instant::now();
        let answer = store.run_with("?wait=1500ms", "incr", &[&id, "n"]);
        let waited = started.elapsed();
        answer.refused(1, &format!("held by pid {}", holder.child.id()));
        let since = answer.stderr.rsplit_once(" for ").and_then(|(_, text)| text.trim_end().strip_suffix(" s")).unwrap();
        // It was held for the whole wait, and not since long before.
        let since = Duration::from_secs_f64(since.parse().unwrap());
        assert!(since + slack >= wait && since <= waited + Duration::from_secs(5), "{since:?} {waited:?}");
        assert!(waited >= wait, "gave up after {waited:?} of {wait:?}");
        holder.signal(Signal::SIGCONT);
        holder.signal(Signal::SIGTERM);
        assert_eq!(holder.end().0.code(), Some(0));
        if waited <= wait + slack + overhead {
            assert_eq!(store.run("incr", &[&id, "n"]).text(), "1");
            return;
        }
        seen.push(waited);
    }
    panic!("waits of {wait:?} ended after {seen:?}, with {overhead:?} to start and end a process");
}
