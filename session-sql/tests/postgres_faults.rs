//! What a bad network does to a session in PostgreSQL: requests and replies that are cut, late or lost.
//!
//! Each test goes through a proxy to a real server, and judges by what a handler beside the proxy sees.
#![cfg(feature = "postgres")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod postgres_support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use conformance_tests::proxy::{CountFrom, Direction, Proxy};
use postgres_support::*;
use session_core::{ErrorKind, Expect, OpenRequest, Result, SessionHandler, SessionId, WriteId, Written};
use session_sql::{SqlConfig, SqlHandler};
use tokio::task::JoinSet;

/// How many cuts are tried at the same time.
const LANES: usize = 4;

/// Which of the bytes of a flight are tried: the first and the last ones, and these between them.
const STEP: u64 = 23;

/// A connection that is cut once, at one byte, or twice: then the repeat does not come through either.
#[derive(Clone, Copy, Debug)]
struct Cut {
    direction: Direction,
    /// How many bytes of this flight pass.
    at: u64,
    /// How long the request is.
    request: u64,
    twice: bool,
}

impl Cut {
    fn arm(self, proxy: &Proxy) {
        proxy.cut(self.direction, self.at, CountFrom::Now);
        match (self.direction, self.twice) {
            (_, false) => {}
            // What comes to the client next is what the server says to the connection that is made for the repeat.
            (Direction::ToServer, true) => proxy.cut(Direction::ToClient, 0, CountFrom::Now),
            (Direction::ToClient, true) => proxy.cut(Direction::ToServer, self.request + 1, CountFrom::Now),
        }
    }

    /// Whether the server has got the whole request.
    fn delivers(self) -> bool {
        self.direction == Direction::ToClient || self.at == self.request
    }
}

/// The cuts of a flight with so many bytes there and back.
fn cuts(request: u64, reply: u64) -> Vec<Cut> {
    let sampled = |length: u64| (0..=length).filter(move |at| at % STEP == 0 || *at < 3 || *at + 3 > length);
    let there = sampled(request).map(|at| (Direction::ToServer, at));
    let back = sampled(reply).map(|at| (Direction::ToClient, at));
    let both = there.chain(back);
    both.flat_map(move |(direction, at)| [false, true].map(|twice| Cut { direction, at, request, twice })).collect()
}

/// Tries every cut, some at a time, and counts the outcomes by name.
async fn sweep<F>(cuts: Vec<Cut>, case: impl Fn(Cut) -> F) -> BTreeMap<&'static str, usize>
where
    F: Future<Output = &'static str> + Send + 'static,
{
    let mut outcomes = BTreeMap::new();
    let mut running = JoinSet::new();
    for cut in cuts {
        if running.len() == LANES {
            let outcome = running.join_next().await.expect("some run").expect("a cut did what it must not");
            *outcomes.entry(outcome).or_default() += 1;
        }
        running.spawn(case(cut));
    }
    while let Some(outcome) = running.join_next().await {
        *outcomes.entry(outcome.expect("a cut did what it must not")).or_default() += 1;
    }
    outcomes
}

/// A proxy with a handler behind it whose connection is there and knows the statements, and the same server without a proxy.
async fn pair() -> (Arc<Proxy>, SqlHandler, SqlHandler) {
    warm(|config| config).await
}

/// The same with a handler that does not wait long.
async fn hasty_pair() -> (Arc<Proxy>, SqlHandler, SqlHandler) {
    warm(|config| config.with_timeout(SHORT)).await
}

async fn warm(with: fn(SqlConfig) -> SqlConfig) -> (Arc<Proxy>, SqlHandler, SqlHandler) {
    let proxy = proxy(server()).await;
    let other = connect(behind(server(), server().address())).await;
    let handler = loop {
        // One connection, so that each question goes over the one that knows it already.
        let settings = with(behind(server(), proxy.address()).with_connections(1));
        // On a machine that is busy with other things even that can be too late.
        if let Ok(handler) = SqlHandler::connect(settings).await
            && all_said(&handler).await.is_ok()
        {
            break handler;
        }
    };
    proxy.reset_counters();
    (Arc::new(proxy), handler, other)
}

/// Asks everything once that a test asks, so that it is prepared.
async fn all_said(handler: &SqlHandler) -> Result<()> {
    let id = new_id();
    handler.open(&id, &exclusive().expecting(Expect::Fresh)).await?.save(&write_of("old"), wid()).await?;
    handler.open(&id, &exclusive()).await?.save(&write_of("new"), wid()).await?;
    handler.open(&id, &OpenRequest::read_only()).await?.close().await?;
    handler.open(&id, &OpenRequest::destroy()).await?.destroy().await?;
    let mut opened = handler.open(&new_id(), &exclusive().expecting(Expect::Fresh)).await?;
    opened.write(&record("kept"), wid()).await?;
    opened.close().await
}

/// The next opener is in long before the lease ends, and finds this.
async fn next_finds(other: &SqlHandler, id: &SessionId, data: &str, when: &str) {
    let mut opened = open(other, id, exclusive()).await;
    assert_eq!(read(&mut opened).await.as_deref(), Some(data), "{when}");
    opened.close().await.expect("nothing stands between");
}

/// Repeats a save until the connection is there again.
async fn repeated(opened: &mut Opened, data: &str, id: WriteId) -> Result<Written> {
    for _ in 0..200 {
        match opened.save(&write_of(data), id).await {
            // Refused, not unanswered: the words differ.
            Err(error) if error.kind() == ErrorKind::Unknown && error.to_string().contains("refused") => return Err(error),
            Err(error) if error.kind().keeps_opening() => tokio::time::sleep(Duration::from_millis(10)).await,
            outcome => return outcome,
        }
    }
    panic!("the connection was not made again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_that_is_cut_is_a_good_session_or_unavailable_and_keeps_nobody_out() {
    let (proxy, handler, other) = pair().await;
    let id = session(&other, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let (request, reply) = (proxy.bytes(Direction::ToServer), proxy.bytes(Direction::ToClient));
    opened.close().await.unwrap();
    assert!(request > 60 && reply > 60, "that was no open: {request} {reply}");

    let cuts = cuts(request, reply);
    let count = cuts.len();
    let outcomes = sweep(cuts, |cut| async move {
        let (proxy, handler, other) = pair().await;
        let id = session(&other, "old").await;
        cut.arm(&proxy);
        let outcome = handler.open(&id, &exclusive()).await;
        proxy.heal();
        match outcome {
            Ok(mut opened) => {
                assert_eq!(read(&mut opened).await.as_deref(), Some("old"), "{cut:?}");
                saved(opened, "new").await;
                next_finds(&other, &id, "new", &format!("{cut:?}")).await;
                "opened"
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{cut:?}: {error:?}");
                assert!(cut.twice, "a connection that breaks once is made anew: {cut:?}: {error:?}");
                next_finds(&other, &id, "old", &format!("{cut:?}")).await;
                "unavailable"
            }
        }
    })
    .await;
    assert_eq!(outcomes.values().sum::<usize>(), count, "{outcomes:?}");
    assert!(outcomes["unavailable"] > count / 5, "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_that_is_cut_counts_once_or_not_yet_and_ends_the_lock() {
    let (proxy, handler, other) = pair().await;
    let id = session(&other, "old").await;
    let opened = open(&handler, &id, exclusive()).await;
    proxy.reset_counters();
    saved(opened, "new").await;
    let (request, reply) = (proxy.bytes(Direction::ToServer), proxy.bytes(Direction::ToClient));
    assert!(request > 60 && reply > 20, "that was no save: {request} {reply}");

    let cuts = cuts(request, reply);
    let count = cuts.len();
    let outcomes = sweep(cuts, |cut| async move {
        let (proxy, handler, other) = pair().await;
        let id = session(&other, "old").await;
        let mut opened = open(&handler, &id, exclusive()).await;
        let write = wid();
        cut.arm(&proxy);
        let outcome = opened.save(&write_of("new"), write).await;
        proxy.heal();
        let seen = look(&other, &id).await.expect("the session is there");
        let name = match outcome {
            Ok(_) => {
                assert_eq!(seen, "new", "{cut:?}");
                "applied"
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unknown, "{cut:?}: {error:?}");
                assert!(cut.twice, "a save whose connection breaks once is settled by asking again: {cut:?}: {error:?}");
                // The server may not have come to it yet.
                assert!(seen == "old" || seen == "new" && cut.delivers(), "{cut:?}: {seen}");
                let settled = repeated(&mut opened, "new", write).await;
                assert!(settled.is_ok(), "{cut:?}: {settled:?}");
                "unknown"
            }
        };
        next_finds(&other, &id, "new", &format!("{cut:?}")).await;
        // Nothing that is still under way counts a second time.
        saved(open(&other, &id, exclusive()).await, "newest").await;
        let again = opened.save(&write_of("new"), write).await;
        assert!(again.is_err(), "{cut:?}: {again:?}");
        assert_eq!(look(&other, &id).await.as_deref(), Some("newest"), "{cut:?}");
        name
    })
    .await;
    assert_eq!(outcomes.values().sum::<usize>(), count, "{outcomes:?}");
    assert!(outcomes["unknown"] > count / 5, "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_repeat_of_an_unanswered_save_is_unknown_and_changes_nothing() {
    let (proxy, handler, other) = hasty_pair().await;
    let id = session(&other, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let write = wid();
    proxy.swallow_next_reply();
    assert_eq!(kind(opened.save(&write_of("ours"), write).await), ErrorKind::Unknown);
    let mut between = open(&other, &id, exclusive()).await;
    assert_eq!(read(&mut between).await.as_deref(), Some("ours"));
    saved(between, "theirs").await;
    assert_eq!(kind(repeated(&mut opened, "ours", write).await), ErrorKind::Unknown);
    assert_eq!(look(&other, &id).await.as_deref(), Some("theirs"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_whose_answer_comes_too_late_is_withdrawn() {
    let (proxy, handler, other) = hasty_pair().await;
    let id = session(&other, "old").await;
    proxy.delay(Direction::ToClient, 2 * SHORT, 2 * SHORT);
    assert_eq!(kind(handler.open(&id, &exclusive()).await), ErrorKind::Unavailable);
    proxy.heal();
    // It was not refused: the lock was taken, and the answer is still under way.
    next_finds(&other, &id, "old", "after an open that nobody waits for any more").await;
    until("an answer in time", async || handler.open(&id, &at_once()).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_whose_answer_comes_too_late_is_unknown_and_its_repeat_finds_it() {
    let (proxy, handler, other) = hasty_pair().await;
    let id = session(&other, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let write = wid();
    proxy.delay(Direction::ToClient, 2 * SHORT, 2 * SHORT);
    assert_eq!(kind(opened.save(&write_of("new"), write).await), ErrorKind::Unknown);
    assert_eq!(look(&other, &id).await.as_deref(), Some("new"));
    proxy.heal();
    let settled = repeated(&mut opened, "new", write).await;
    assert!(matches!(settled, Ok(Written::AlreadyApplied)), "{settled:?}");
    next_finds(&other, &id, "new", "after a late answer").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_whose_answer_is_lost_counts_once() {
    for keeps in [false, true] {
        let (proxy, handler, other) = hasty_pair().await;
        let id = new_id();
        let mut opened = open(&handler, &id, exclusive().expecting(Expect::Fresh)).await;
        let write = wid();
        proxy.swallow_next_reply();
        let outcome =
            if keeps { opened.write(&record("new"), write).await } else { opened.save(&write_of("new"), write).await };
        assert_eq!(kind(outcome), ErrorKind::Unknown);
        if keeps {
            // The first copy took the lock, and the repeat takes the same one.
            assert_eq!(kind(other.open(&id, &at_once()).await), ErrorKind::LockTimeout);
        }
        let settled = repeated(&mut opened, "new", write).await;
        assert!(matches!(settled, Ok(Written::AlreadyApplied)), "{settled:?}");
        next_finds(&other, &id, "new", "after a create with a lost answer").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destroy_whose_answer_is_lost_is_done() {
    let (proxy, handler, other) = hasty_pair().await;
    let id = session(&other, "old").await;
    let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
    proxy.swallow_next_reply();
    assert_eq!(kind(logout.destroy().await), ErrorKind::Unknown);
    assert_eq!(look(&other, &id).await, None);
    until("another answer", async || logout.destroy().await.is_ok_and(|removed| removed.is_none())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_answers_nothing_for_a_while_costs_no_connection_for_good() {
    let hasty = |config: SqlConfig| config.with_timeout(SHORT).with_connect_timeout(2 * SHORT);
    let (proxy, handler, other) = warm(hasty).await;
    let ids: Vec<_> = [session(&other, "old").await, session(&other, "old").await].into();
    proxy.swallow(Direction::ToClient);
    for id in &ids {
        let mut asked = JoinSet::new();
        for _ in 0..4 {
            let (handler, id) = (handler.clone(), id.clone());
            asked.spawn(async move { kind(handler.open(&id, &OpenRequest::read_only()).await) });
        }
        while let Some(kind) = asked.join_next().await {
            assert_eq!(kind.unwrap(), ErrorKind::Unavailable);
        }
    }
    proxy.heal();
    until("an answer", async || handler.open(&ids[0], &OpenRequest::read_only()).await.is_ok()).await;
}
