//! How many flights each use of a session makes, counted at a proxy.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use session_core::{Change, Expect, OpenRequest, Result, SessionHandler, Ttl};
use support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_use_has_its_number_of_flights() {
    let proxy = proxy(server()).await;
    let (handler, other) = (through(&proxy).await, on(server()).await);
    let id = session(&handler, "old").await;
    let trips = |n: u64, what: &str| {
        assert_eq!(proxy.round_trips(), n, "{what}");
        proxy.reset_counters();
    };
    proxy.reset_counters();
    for n in 0..3 {
        let mut opened = open(&handler, &id, exclusive()).await;
        read(&mut opened).await;
        trips(1, "lock and read");
        saved(opened, &n.to_string()).await;
        trips(1, "write and unlock");
    }
    let mut opened = open(&handler, &id, exclusive()).await;
    opened.save(&Change::Touch(Ttl::from_secs(600)), wid()).await.unwrap();
    trips(2, "a touch");
    let mut opened = open(&handler, &id, exclusive()).await;
    opened.close().await.unwrap();
    trips(2, "an open and a close without a change");
    look(&handler, &id).await;
    trips(1, "a view");
    let fresh = new_id();
    let opened = open(&handler, &fresh, exclusive().expecting(Expect::Fresh)).await;
    trips(0, "opening a fresh id");
    saved(opened, "created").await;
    trips(1, "the first save of a fresh id");
    drop(open(&handler, &new_id(), exclusive()).await);
    trips(2, "an absent id, and giving back the lock that was nothing's");
    let mut optimistic = open(&handler, &id, OpenRequest::optimistic()).await;
    read(&mut optimistic).await;
    trips(1, "an optimistic open");
    saved(optimistic, "optimistic").await;
    trips(2, "an optimistic save, which takes the lock");
    // Breaking the lock leaves the record in the hands of a holder who has not released.
    let _holder = open(&other, &id, exclusive()).await;
    assert!(handler.admin().expect("it has one").unlock(&id).await.unwrap());
    proxy.reset_counters();
    let taken = open(&handler, &id, exclusive()).await;
    trips(2, "a takeover");
    saved(taken, "taken over").await;
    trips(1, "a save after a takeover");
    let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
    trips(0, "opening to destroy");
    logout.destroy().await.unwrap();
    logout.close().await.unwrap();
    trips(1, "a logout");
    assert_eq!(look(&other, &id).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_leases_are_renewed_in_one_flight() {
    let proxy = proxy(server()).await;
    let handler = through(&proxy).await;
    let mut held = Vec::new();
    for _ in 0..100 {
        let id = session(&handler, "old").await;
        held.push(open(&handler, &id, exclusive()).await);
    }
    let (lock, leases) = {
        let held: Vec<_> = held.iter().map(|opened| opened.held().expect("it is locked").clone()).collect();
        (held[0].lock.clone(), held.into_iter().map(|held| held.lease).collect::<Vec<_>>())
    };
    proxy.reset_counters();
    let outcomes = lock.renew(&leases).await;
    assert_eq!(proxy.round_trips(), 1);
    assert!(outcomes.len() == 100 && outcomes.iter().all(Result::is_ok), "{outcomes:?}");
}
