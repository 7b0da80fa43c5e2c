//! What a bad network does to a session: requests and replies that are cut at any byte, late, lost, or delivered twice.
//!
//! Each test goes through a proxy to a real server, and judges by what a handler beside the proxy sees.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use conformance_tests::proxy::{CountFrom, Direction, Hold, Proxy};
use session_core::{ErrorKind, Expect, OpenRequest, Result, SessionHandler, SessionId, Sessions, WriteId, Written};
use session_redis::RedisHandler;
use support::*;
use tokio::task::JoinSet;

/// How many cuts are tried at the same time.
const LANES: usize = 8;

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

/// How many bytes a flight has, there and back.
struct Flight {
    request: u64,
    reply: u64,
}

impl Flight {
    fn of(proxy: &Proxy) -> Self {
        Self { request: proxy.bytes(Direction::ToServer), reply: proxy.bytes(Direction::ToClient) }
    }

    fn cuts(&self) -> impl Iterator<Item = Cut> + use<> {
        let request = self.request;
        let there = (0..=request).map(|at| (Direction::ToServer, at));
        let back = (0..=self.reply).map(|at| (Direction::ToClient, at));
        let cuts = there.chain(back);
        cuts.flat_map(move |(direction, at)| [false, true].map(|twice| Cut { direction, at, request, twice }))
    }
}

/// Tries every cut, some at a time, and counts the outcomes by name.
async fn sweep<F>(cuts: impl Iterator<Item = Cut>, case: impl Fn(Cut) -> F) -> BTreeMap<&'static str, u32>
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

/// A proxy with a handler behind it that is connected, and the same server without a proxy.
async fn pair() -> (Arc<Proxy>, RedisHandler, RedisHandler) {
    let proxy = proxy(server()).await;
    let (handler, other) = (through(&proxy).await, on(server()).await);
    proxy.reset_counters();
    (Arc::new(proxy), handler, other)
}

/// The same with a handler that does not wait long.
async fn hasty_pair() -> (Arc<Proxy>, RedisHandler, RedisHandler) {
    let proxy = proxy(server()).await;
    let (handler, other) = (hasty(&proxy).await, on(server()).await);
    (Arc::new(proxy), handler, other)
}

/// The next opener is in long before the lease ends, and finds this.
async fn next_finds(other: &RedisHandler, id: &SessionId, data: &str, when: &str) {
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
async fn an_open_cut_after_every_byte_is_a_good_session_or_unavailable_and_keeps_nobody_out() {
    let (proxy, handler, other) = pair().await;
    let id = session(&other, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let flight = Flight::of(&proxy);
    opened.close().await.unwrap();
    assert!(flight.request > 100 && flight.reply > 20, "that was no open");

    let outcomes = sweep(flight.cuts(), |cut| async move {
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
    // Every cut once, and half of them twice. Some of those meant as the second hit the answer to the first part of the first.
    let all = u32::try_from(flight.request + flight.reply + 2).unwrap();
    assert_eq!(outcomes["opened"] + outcomes["unavailable"], 2 * all, "{outcomes:?}");
    assert!(outcomes["unavailable"] > all / 2, "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_cut_after_every_byte_counts_once_or_not_yet_and_ends_the_lock() {
    cut_saves("new", ":1\r\n", |_| true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_save_cut_around_its_body_counts_once_or_not_yet_and_ends_the_lock() {
    let long = 9 << 10;
    // That the body is there, and that one save was judged: applied.
    let edge = |cut: &Cut| cut.direction == Direction::ToClient || cut.at < 250 || cut.at > long;
    cut_saves("x".repeat(9 << 10).leak(), "+OK\r\n*1\r\n:1\r\n", edge).await;
}

/// Cuts a save of `new`, which is answered so, wherever it is `tried`.
async fn cut_saves(new: &'static str, answer: &str, tried: impl Fn(&Cut) -> bool) {
    let (proxy, handler, other) = pair().await;
    let id = session(&other, "old").await;
    let opened = open(&handler, &id, exclusive()).await;
    proxy.reset_counters();
    saved(opened, new).await;
    let flight = Flight::of(&proxy);
    assert!(flight.request > 100 && flight.reply == answer.len() as u64, "that was no save");
    // Each byte of both ways, cut at once and twice; an answer that came whole before its cut counts as one.
    let all = usize::try_from(flight.request + flight.reply + 2).unwrap();
    assert_eq!(flight.cuts().count(), 2 * all);
    let cuts: Vec<_> = flight.cuts().filter(tried).collect();
    let tried = u32::try_from(cuts.len()).unwrap();

    let outcomes = sweep(cuts.into_iter(), |cut| async move {
        let (proxy, handler, other) = pair().await;
        let id = session(&other, "old").await;
        let mut opened = open(&handler, &id, exclusive()).await;
        let write = wid();
        cut.arm(&proxy);
        let outcome = opened.save(&write_of(new), write).await;
        proxy.heal();
        let seen = look(&other, &id).await.expect("the session is there");
        let name = match outcome {
            Ok(_) => {
                assert_eq!(seen, new, "{cut:?}");
                "applied"
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unknown, "{cut:?}: {error:?}");
                assert!(cut.twice, "a save whose connection breaks once is settled by asking again: {cut:?}: {error:?}");
                // The server may not have come to it yet.
                assert!(seen == "old" || seen == new && cut.delivers(), "{cut:?}: {seen}");
                let settled = repeated(&mut opened, new, write).await;
                let expected = if cut.delivers() { Written::AlreadyApplied } else { Written::Applied };
                assert!(matches!(settled, Ok(written) if written == expected), "{cut:?}: {settled:?}");
                "unknown"
            }
        };
        next_finds(&other, &id, new, &format!("{cut:?}")).await;
        // Nothing that is still under way counts a second time.
        saved(open(&other, &id, exclusive()).await, "newest").await;
        let again = opened.save(&write_of(new), write).await;
        assert!(again.is_err(), "{cut:?}: {again:?}");
        assert_eq!(look(&other, &id).await.as_deref(), Some("newest"), "{cut:?}");
        name
    })
    .await;
    assert_eq!(outcomes["applied"] + outcomes["unknown"], tried, "{outcomes:?}");
    assert!(outcomes["unknown"] > tried / 4, "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_repeat_of_an_unanswered_save_is_unknown_and_changes_nothing() {
    let (proxy, handler, other) = pair().await;
    let id = session(&other, "old").await;
    let opened = open(&handler, &id, exclusive()).await;
    proxy.reset_counters();
    saved(opened, "ours").await;
    let flight = Flight::of(&proxy);
    // Every cut behind which it was delivered, and some of the others, which have to wait for the end of the lease.
    let cuts = flight.cuts().filter(|cut| cut.twice && (cut.delivers() || cut.at.is_multiple_of(16)));

    let outcomes = sweep(cuts, |cut| async move {
        let (proxy, handler, other) = pair().await;
        let id = session(&other, "old").await;
        // A lease that ends, for the cases in which the save never arrived.
        let mut opened = open(&handler, &id, briefly(Duration::from_millis(400))).await;
        let write = wid();
        cut.arm(&proxy);
        let outcome = opened.save(&write_of("ours"), write).await;
        proxy.heal();
        if outcome.is_ok() {
            return "applied";
        }
        assert_eq!(kind(outcome), ErrorKind::Unknown, "{cut:?}");
        let mut between = open(&other, &id, exclusive()).await;
        let seen = read(&mut between).await.expect("the session is there");
        assert_eq!(seen, if cut.delivers() { "ours" } else { "old" }, "{cut:?}");
        saved(between, "theirs").await;
        let refused = repeated(&mut opened, "ours", write).await;
        assert_eq!(kind(refused), ErrorKind::Unknown, "{cut:?}");
        assert_eq!(look(&other, &id).await.as_deref(), Some("theirs"), "{cut:?}");
        "unknown"
    })
    .await;
    assert!(outcomes["unknown"] > 20, "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_whose_answer_comes_too_late_is_withdrawn() {
    let (proxy, handler, other) = hasty_pair().await;
    let id = session(&other, "old").await;
    proxy.delay(Direction::ToClient, 2 * SHORT, 2 * SHORT);
    assert_eq!(kind(handler.open(&id, &exclusive()).await), ErrorKind::Unavailable);
    // It was not refused: the lock was taken, and the answer is still under way.
    next_finds(&other, &id, "old", "after an open that nobody waits for any more").await;
    proxy.heal();
    until("an answer in time", async || handler.open(&id, &at_once()).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_that_no_answer_comes_to_is_withdrawn_also_from_the_queue() {
    let (proxy, handler, other) = hasty_pair().await;
    let id = session(&other, "old").await;
    let holder = open(&other, &id, exclusive()).await;
    let waiter = tokio::spawn({
        let (handler, id) = (handler.clone(), id.clone());
        async move { handler.open(&id, &exclusive()).await }
    });
    let queue = keys(&id)[2].clone();
    until("a place in the queue", async || server().command(&["LLEN", &queue]).unwrap() == "1").await;
    // The message that it is its turn does not come through, nor does the answer when it looks for itself.
    proxy.swallow(Direction::ToClient);
    saved(holder, "new").await;
    assert_eq!(kind(waiter.await.unwrap()), ErrorKind::Unavailable);
    next_finds(&other, &id, "new", "after a waiter who was let in and never knew").await;
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
async fn a_save_whose_answer_is_lost_counts_once() {
    let (proxy, handler, other) = hasty_pair().await;
    let id = session(&other, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let write = wid();
    proxy.swallow_next_reply();
    assert_eq!(kind(opened.save(&write_of("new"), write).await), ErrorKind::Unknown);
    assert!(proxy.swallowed() > 0, "nothing was lost");
    let settled = repeated(&mut opened, "new", write).await;
    assert!(matches!(settled, Ok(Written::AlreadyApplied)), "{settled:?}");
    next_finds(&other, &id, "new", "after a lost answer").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_whose_answer_is_lost_counts_once() {
    let (proxy, handler, other) = hasty_pair().await;
    for keeps in [false, true] {
        let id = new_id();
        let mut opened = open(&handler, &id, exclusive().expecting(Expect::Fresh)).await;
        let write = wid();
        proxy.reset_counters();
        proxy.swallow_next_reply();
        let outcome =
            if keeps { opened.write(&record("new"), write).await } else { opened.save(&write_of("new"), write).await };
        assert_eq!(kind(outcome), ErrorKind::Unknown);
        assert!(proxy.swallowed() > 0, "nothing was lost");
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
async fn a_late_copy_of_a_first_write_does_not_undo_the_second() {
    for hold in [Hold::Copy, Hold::Instead] {
        let (proxy, handler, other) = pair().await;
        let id = session(&other, "old").await;
        let mut opened = open(&handler, &id, exclusive()).await;
        let mut held = proxy.hold_request("first", hold);
        assert!(matches!(opened.write(&record("first"), wid()).await, Ok(Written::Applied)), "{hold:?}");
        held.caught(SOON).await.expect("the write went through the proxy");
        assert!(matches!(opened.write(&record("second"), wid()).await, Ok(Written::Applied)), "{hold:?}");
        let answer = held.deliver(b"", SOON).await.expect("the server answers");
        assert_eq!(answer, b":0\r\n", "{hold:?}: a late copy is refused");
        assert_eq!(look(&other, &id).await.as_deref(), Some("second"), "{hold:?}");
        assert_eq!(kind(other.open(&id, &at_once()).await), ErrorKind::LockTimeout, "{hold:?}: the lock is still held");
        saved(opened, "third").await;
        held.deliver(b"", SOON).await.expect("the server answers");
        next_finds(&other, &id, "third", "after late copies").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_copy_of_an_open_takes_no_lock_for_longer_than_its_lease() {
    let (proxy, handler, other) = pair().await;
    let id = session(&other, "old").await;
    let mut held = proxy.hold_request("EXISTS", Hold::Copy);
    let opened = open(&handler, &id, briefly(Duration::from_millis(300))).await;
    held.caught(SOON).await.expect("the open went through the proxy");
    saved(opened, "new").await;
    held.deliver(b"", SOON).await.expect("the server answers");
    assert_eq!(kind(other.open(&id, &at_once()).await), ErrorKind::LockTimeout, "nobody can know that its owner is gone");
    next_finds(&other, &id, "new", "one lease after a late copy of an open").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destroy_whose_answer_is_lost_is_done_and_a_late_copy_of_a_create_does_not_undo_it() {
    let (proxy, handler, other) = hasty_pair().await;
    // From here on the server knows the script, and the lost answer is one of a script that ran.
    open(&other, &new_id(), OpenRequest::destroy()).await.destroy().await.expect("the server answers");
    let id = session(&other, "old").await;
    let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
    proxy.swallow_next_reply();
    assert_eq!(kind(logout.destroy().await), ErrorKind::Unknown);
    assert_eq!(look(&other, &id).await, None);
    until("another answer", async || match logout.destroy().await {
        Ok(removed) => removed.is_none() || panic!("there was nothing more to remove"),
        Err(error) => error.kind() != ErrorKind::Unknown && panic!("{error:?}"),
    })
    .await;

    let id = new_id();
    let opened = open(&handler, &id, exclusive().expecting(Expect::Fresh)).await;
    let mut held = proxy.hold_request("created", Hold::Copy);
    saved(opened, "created").await;
    held.caught(SOON).await.expect("the create went through the proxy");
    open(&other, &id, OpenRequest::destroy()).await.destroy().await.expect("the server answers");
    held.deliver(b"", SOON).await.expect("the server answers");
    assert_eq!(look(&other, &id).await, None, "a logout always wins");
}

/// Ours are opened through the proxy, theirs beside it.
async fn two_sessions(proxy: &Proxy) -> (Sessions, Sessions, SessionId) {
    let ours = Sessions::new(Arc::new(hasty(proxy).await)).unwrap();
    let theirs = Sessions::new(Arc::new(on(server()).await)).unwrap();
    let mut session = theirs.create().unwrap();
    session.insert("log", &vec!["created"]).unwrap();
    let id = session.close().await.unwrap().expect("it has a value");
    (ours, theirs, id)
}

async fn add(sessions: Sessions, id: SessionId, word: String) -> Result<()> {
    let mut session = sessions.open(&id).await?;
    session.update_key("log", move |log: Option<Vec<String>>| {
        log.unwrap_or_default().into_iter().chain([word.clone()]).collect()
    })?;
    session.close().await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_whose_answer_comes_too_late_runs_its_closure_once_whoever_came_between() {
    const LATE: Duration = SHORT.saturating_add(Duration::from_millis(200));
    let proxy = Arc::new(proxy(server()).await);
    for between in [false, true] {
        let (ours, theirs, id) = two_sessions(&proxy).await;
        let runs = AtomicU32::new(0);
        let queue = keys(&id)[2].clone();
        let mut other = None;
        let outcome = ours
            .update(&id, async |session| {
                runs.fetch_add(1, Ordering::SeqCst);
                session.update_key("log", |log: Option<Vec<String>>| {
                    log.unwrap_or_default().into_iter().chain(["ours".to_owned()]).collect()
                })?;
                if between {
                    // In the queue before we save, so let in by the save whose answer is lost.
                    let (theirs, id) = (theirs.clone(), id.clone());
                    other = Some(tokio::spawn(add(theirs, id, "theirs".into())));
                    until("a place in the queue", async || server().command(&["LLEN", &queue]).unwrap() == "1").await;
                }
                // Late for the first question, and in time for the second.
                proxy.delay(Direction::ToClient, LATE, LATE);
                let proxy = proxy.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(LATE / 3).await;
                    proxy.delay(Direction::ToClient, Duration::ZERO, Duration::ZERO);
                });
                Ok(())
            })
            .await;
        if let Some(other) = other {
            other.await.unwrap().expect("nothing stands against theirs");
            assert_eq!(kind(outcome), ErrorKind::Unknown);
        } else {
            outcome.expect("asking again settles it");
        }
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        let log: Vec<String> = theirs.view(&id).await.unwrap().get("log").unwrap().unwrap();
        let expected: &[&str] = if between { &["created", "ours", "theirs"] } else { &["created", "ours"] };
        assert_eq!(log, expected, "each counts once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_is_one_flight_a_save_is_one_and_a_view_is_one() {
    let (proxy, handler, other) = pair().await;
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
    look(&handler, &id).await;
    trips(1, "a view");
    let fresh = new_id();
    let opened = open(&handler, &fresh, exclusive().expecting(Expect::Fresh)).await;
    trips(0, "opening a fresh id");
    saved(opened, "created").await;
    trips(1, "the first save of a fresh id");
    let opened = open(&handler, &new_id(), exclusive()).await;
    trips(2, "an absent id, and giving back the lock that was nothing's");
    drop(opened);
    let mut optimistic = open(&handler, &id, OpenRequest::optimistic()).await;
    read(&mut optimistic).await;
    trips(1, "an optimistic open");
    saved(optimistic, "optimistic").await;
    trips(1, "an optimistic save");
    let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
    trips(0, "opening to destroy");
    logout.destroy().await.unwrap();
    logout.close().await.unwrap();
    trips(1, "a logout");
    assert_eq!(look(&other, &id).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_leases_are_renewed_in_one_flight() {
    let (proxy, handler, other) = pair().await;
    let mut held = Vec::new();
    for _ in 0..100 {
        let id = session(&handler, "old").await;
        held.push(open(&handler, &id, exclusive()).await);
    }
    let (lock, leases) = {
        let held: Vec<_> = held.iter().map(|opened| opened.held().expect("it is locked").clone()).collect();
        (held[0].lock.clone(), held.into_iter().map(|held| held.lease).collect::<Vec<_>>())
    };
    // The server knows the script from the first one on.
    assert!(matches!(lock.renew(&leases[..1]).await[..], [Ok(())]));
    proxy.reset_counters();
    let outcomes = lock.renew(&leases).await;
    assert_eq!(proxy.round_trips(), 1);
    assert!(outcomes.len() == 100 && outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    drop(other);
}
