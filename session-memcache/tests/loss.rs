//! What a server loses, and what becomes of those who worked with it: restarts, flushes, evictions, one dead server of two.
//!
//! Each test runs on both versions of the server: one counts the changes of its items itself, and anew after a restart; with the
//! other the client chooses their numbers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::HashSet;

use conformance_tests::servers::Memcached;
use session_core::{ErrorKind, Expect, SessionHandler, Written};
use support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_server_was_started_anew_is_gone_and_its_holder_is_told() {
    for memcached in both(&[]) {
        let handler = on(&memcached).await;
        let id = session(&handler, "old").await;
        let mut opened = open(&handler, &id, exclusive()).await;
        assert_eq!(read(&mut opened).await.as_deref(), Some("old"));
        memcached.restart().unwrap();
        let refused = kind(save_in_the_end(&mut opened, "stale").await);
        assert!(matches!(refused, ErrorKind::Gone | ErrorKind::Fenced), "{refused}");
        assert_eq!(look(&handler, &id).await, None);
        assert_eq!(memcached.keys().unwrap(), [""; 0], "a refused write has left something");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_from_before_a_restart_is_applied_to_a_session_with_the_same_number() {
    for memcached in both(&[]) {
        let handler = on(&memcached).await;
        // Numbers that a new server has not reached when the session is stored again.
        for _ in 0..40 {
            session(&handler, "other").await;
        }
        let id = session(&handler, "old").await;
        let mut stale = open(&handler, &id, exclusive()).await;
        assert_eq!(read(&mut stale).await.as_deref(), Some("old"));
        let key = record_key(&id);
        let before = memcached.get(&key).unwrap().unwrap();
        memcached.restart().unwrap();
        // Somebody else creates it again, and by chance it has the same number as the one that was read.
        let other = on(&memcached).await;
        saved(open(&other, &id, exclusive().expecting(Expect::Any)).await, "new").await;
        // Where a client chooses the numbers they are random, and no chance is worth waiting for.
        if !takes_numbers(&memcached) {
            let (mut wire, after) = (memcached.connect().unwrap(), memcached.get(&key).unwrap().unwrap());
            for _ in after.cas..before.cas - 1 {
                wire.set("something", 0, 0, b"else").unwrap();
            }
            wire.set(&key, after.flags, 600, &after.data).unwrap();
            assert_eq!(wire.get(&key).unwrap().unwrap().cas, before.cas, "the number was not met");
        }
        let refused = kind(save_in_the_end(&mut stale, "stale").await);
        assert!(matches!(refused, ErrorKind::Gone | ErrorKind::Fenced), "{refused}");
        assert_eq!(look(&other, &id).await.as_deref(), Some("new"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_in_the_middle_of_a_hold_is_told_and_resurrects_nothing() {
    for memcached in both(&[]) {
        let handler = on(&memcached).await;
        let id = session(&handler, "old").await;
        let mut opened = open(&handler, &id, exclusive()).await;
        read(&mut opened).await;
        assert_eq!(memcached.command("flush_all").unwrap(), "OK");
        assert_eq!(kind(opened.save(&write_of("stale"), wid()).await), ErrorKind::Gone);
        assert_eq!(look(&handler, &id).await, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lost_a_lock_to_memory_pressure_and_not_to_anybody_still_writes() {
    for memcached in both(&[]) {
        let handler = on(&memcached).await;
        let id = session(&handler, "old").await;
        let opened = open(&handler, &id, exclusive()).await;
        assert!(memcached.connect().unwrap().delete(&lock_key(&id)).unwrap());
        saved(opened, "new").await;
        assert_eq!(look(&handler, &id).await.as_deref(), Some("new"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_lost_a_lock_to_memory_pressure_and_then_to_somebody_is_fenced() {
    for memcached in both(&[]) {
        let (handler, other) = (on(&memcached).await, on(&memcached).await);
        for successor_writes_first in [false, true] {
            let id = session(&handler, "old").await;
            let mut evicted = open(&handler, &id, exclusive()).await;
            read(&mut evicted).await;
            assert!(memcached.connect().unwrap().delete(&lock_key(&id)).unwrap());
            let mut successor = open(&other, &id, at_once()).await;
            assert_eq!(read(&mut successor).await.as_deref(), Some("old"));
            let mut successor = Some(successor);
            if successor_writes_first {
                saved(successor.take().unwrap(), "new").await;
            }
            assert_eq!(kind(evicted.save(&write_of("stale"), wid()).await), ErrorKind::Fenced);
            if let Some(successor) = successor {
                // What the fenced one gave back was not his.
                assert!(memcached.get(&lock_key(&id)).unwrap().is_some(), "somebody else's lock is gone");
                saved(successor, "new").await;
            }
            assert_eq!(look(&handler, &id).await.as_deref(), Some("new"));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_memory_pressure_took_from_its_holder_is_gone_and_stays_so() {
    for memcached in both(&[]) {
        let handler = on(&memcached).await;
        let id = session(&handler, "old").await;
        let mut opened = open(&handler, &id, exclusive()).await;
        read(&mut opened).await;
        assert!(memcached.connect().unwrap().delete(&record_key(&id)).unwrap());
        assert_eq!(kind(opened.save(&write_of("stale"), wid()).await), ErrorKind::Gone);
        assert_eq!(look(&handler, &id).await, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_servers_one_is_killed_and_the_sessions_of_the_other_do_not_notice() {
    for servers in [both(&[]), [Memcached::start(&[]).unwrap(), Memcached::start(&[]).unwrap()]] {
        let [dead, alive] = &servers;
        let handler = connect(&format!("memcache://{},{}?{PATIENT}", dead.address(), alive.address())).await.unwrap();
        let mut ids = Vec::new();
        for _ in 0..60 {
            ids.push(session(&handler, "old").await);
        }
        let keys_of = |server: &Memcached| server.keys().unwrap().into_iter().collect::<HashSet<_>>();
        let (on_dead, on_alive) = (keys_of(dead), keys_of(alive));
        assert!(on_dead.len() > 10 && on_alive.len() > 10, "{} and {}", on_dead.len(), on_alive.len());
        // Lock and record of a session are on one server.
        for id in &ids {
            let opened = open(&handler, id, exclusive()).await;
            let server = if on_dead.contains(&record_key(id)) { dead } else { alive };
            assert!(server.get(&lock_key(id)).unwrap().is_some(), "the lock is on the other server");
            drop(opened);
        }
        let mut held = Vec::new();
        for id in &ids {
            held.push(open(&handler, id, exclusive()).await);
        }
        dead.kill().unwrap();
        for (id, mut opened) in ids.iter().zip(held) {
            let outcome = opened.save(&write_of("new"), wid()).await;
            if on_alive.contains(&record_key(id)) {
                assert!(matches!(outcome, Ok(Written::Applied)), "{outcome:?}");
                assert_eq!(look(&handler, id).await.as_deref(), Some("new"));
                saved(open(&handler, id, exclusive()).await, "newest").await;
                continue;
            }
            let refused = outcome.expect_err("its server is dead");
            assert!(matches!(refused.kind(), ErrorKind::Unavailable | ErrorKind::Unknown), "{refused:?}");
            let error = handler.open(id, &exclusive()).await.expect_err("its server is dead");
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            for error in [refused, error] {
                assert!(error.to_string().contains(&dead.address().to_string()), "{error}");
                assert!(!error.to_string().contains(&alive.address().to_string()), "{error}");
            }
        }
        // Nothing was moved to the server that is left, where it would begin a second life.
        assert!(keys_of(alive).iter().all(|key| on_alive.contains(key) || key.contains("lock.") || key.contains("next.")));
        dead.restart().unwrap();
        let lost = ids.iter().find(|id| on_dead.contains(&record_key(id))).unwrap();
        assert_eq!(look(&handler, lost).await, None);
    }
}
