//! How many flights a takeover costs, counted at a proxy: one that finds the lock free and the session in the hands of somebody
//! who never finished, and one more to take it out of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use session_core::ErrorKind;
use support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_is_two_flights_and_fences_the_one_before() {
    for memcached in both(&[]) {
        let proxy = proxy(&memcached).await;
        let (handler, other) = (on(&memcached).await, through(&proxy).await);
        // What only a first use needs.
        let id = session(&handler, "old").await;
        saved(open(&other, &id, exclusive()).await, "old").await;

        let mut before = open(&handler, &id, briefly(Duration::from_secs(1))).await;
        read(&mut before).await;
        // Nobody renews it: the lock ends by itself, and what is marked stays marked.
        until("the end of the lease", async || memcached.get(&lock_key(&id)).unwrap().is_none()).await;
        proxy.reset_counters();
        let mut after = open(&other, &id, at_once()).await;
        assert_eq!(read(&mut after).await.as_deref(), Some("old"));
        assert_eq!(proxy.round_trips(), 2, "flights of a takeover");

        assert_eq!(kind(before.save(&write_of("stale"), wid()).await), ErrorKind::Fenced);
        proxy.reset_counters();
        saved(after, "new").await;
        assert_eq!(proxy.round_trips(), 1, "flights of a save after a takeover");
        proxy.reset_counters();
        let after = open(&other, &id, exclusive()).await;
        assert_eq!(proxy.round_trips(), 1, "flights of an open after a clean save");
        drop(after);
        assert_eq!(look(&handler, &id).await.as_deref(), Some("new"));
    }
}
