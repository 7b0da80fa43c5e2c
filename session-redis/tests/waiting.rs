//! Waiting for a lock in Redis: woken and not polling, in turn whoever died in between, and with nothing left behind by those who
//! went away.
//!
//! What passes on the wire is counted by the server itself.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use conformance_tests::Rng;
use conformance_tests::proxy::Direction;
use conformance_tests::servers::{Monitor, Redis};
use session_core::{Dsn, ErrorKind, OpenRequest, Result, SessionHandler, SessionId, Sessions};
use session_redis::{RedisConfig, RedisHandler};
use support::*;
use tokio::task::JoinHandle;

/// The commands that clients sent, in order and without their arguments: not those of scripts, nor those that this test sends
/// itself.
fn sent(monitor: &mut Monitor) -> Vec<String> {
    commands(monitor).into_iter().filter(|(script, _)| !script).map(|(_, command)| command).collect()
}

/// Each command, and whether a script did it.
fn commands(monitor: &mut Monitor) -> Vec<(bool, String)> {
    let lines = monitor.lines().unwrap();
    let words = lines.iter().filter_map(|line| {
        let (from, command) = line.split_once("] ")?;
        let command = command.split('"').nth(1).unwrap_or_default().to_ascii_lowercase();
        (!from.contains(" unix:")).then(|| (from.ends_with(" lua"), command))
    });
    words.collect()
}

/// A save told one waiter, and he came.
#[track_caller]
fn is_told_once(monitor: &mut Monitor) {
    let (of_scripts, sent): (Vec<_>, Vec<_>) = commands(monitor).into_iter().partition(|(script, _)| *script);
    assert_eq!(sent.len(), 2, "a save, and coming for the lock: {sent:?}");
    assert_eq!(of_scripts.iter().filter(|(_, command)| command == "publish").count(), 1, "{of_scripts:?}");
}

/// Opens beside the test.
fn waiting(handler: &RedisHandler, id: &SessionId, request: OpenRequest) -> JoinHandle<Result<Opened>> {
    let (handler, id) = (handler.clone(), id.clone());
    tokio::spawn(async move { handler.open(&id, &request).await })
}

/// Waits until so many stand in the queue.
async fn queued(redis: &Redis, id: &SessionId, count: usize) {
    let [_, _, queue] = keys(id);
    let count = count.to_string();
    until("a place in the queue", async || redis.command(&["LLEN", &queue]).unwrap() == count).await;
}

/// Tells a child of this test executable what to wait for: the URL of the server and the id.
const WAIT_FOR: &str = "SESSION_REDIS_TEST_WAIT_FOR";

/// What a child says once it has the lock.
const IN: &str = "@in";

/// A process that does not outlive this value.
struct Waiter(Child);

impl Waiter {
    fn start(redis: &Redis, id: &SessionId) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["a_child_waits_for_what_it_is_told", "--exact", "--nocapture", "--test-threads=1"]);
        child.env(WAIT_FOR, format!("{} {}", redis.url(), id.as_str()));
        Self(child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// Blocks until the process has the lock.
    fn is_in(&mut self) {
        let output = BufReader::new(self.0.stdout.as_mut().unwrap());
        assert!(
            output.lines().map_while(std::io::Result::ok).any(|line| line.ends_with(IN)),
            "the child ended without the lock"
        );
    }

    /// Has it give the lock back and end.
    fn leaves(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        // An error means that it has ended before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Does nothing unless it is a child of another test of this file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_waits_for_what_it_is_told() {
    let Ok(told) = std::env::var(WAIT_FOR) else { return };
    let (url, id) = told.split_once(' ').unwrap();
    let handler = connect(url).await.unwrap();
    let mut opened = open(&handler, &SessionId::parse(id).unwrap(), exclusive()).await;
    println!("{IN}");
    std::io::stdout().flush().unwrap();
    // Until the parent closes its end.
    let _ = std::io::stdin().lock().lines().count();
    opened.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_asks_once_to_stand_in_the_queue_and_once_to_come_for_the_lock() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let id = session(&handler, "old").await;
    for first_wait in [true, false] {
        let holder = open(&handler, &id, exclusive()).await;
        let mut monitor = redis.monitor().unwrap();
        let waiter = waiting(&other, &id, exclusive());
        queued(&redis, &id, 1).await;
        let mut seen = sent(&mut monitor);
        let open = seen.iter().take_while(|command| ["set", "get", "exists", "pttl"].contains(&command.as_str())).count();
        assert!((3..=5).contains(&open), "an open: {seen:?}");
        seen.drain(..open);
        seen.retain(|command| command != "client");
        let queues: &[&str] = if first_wait { &["subscribe", "evalsha"] } else { &["evalsha"] };
        assert_eq!(seen, queues, "a place in the queue");
        // Less than the sleep after which a waiter looks for himself.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(sent(&mut monitor), Vec::<String>::new(), "nobody asks while he waits");
        saved(holder, "new").await;
        let opened = waiter.await.unwrap().unwrap();
        is_told_once(&mut monitor);
        saved(opened, "newer").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_to_expect_others_goes_to_the_queue_at_once_and_only_then() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let id = session(&handler, "old").await;
    let holder = open(&handler, &id, exclusive()).await;
    let waiter = waiting(&other, &id, exclusive());
    queued(&redis, &id, 1).await;
    saved(holder, "new").await;
    let next_holder = waiter.await.unwrap().unwrap();

    let mut monitor = redis.monitor().unwrap();
    let waiter = waiting(&handler, &id, exclusive());
    queued(&redis, &id, 1).await;
    let mut seen = sent(&mut monitor);
    seen.retain(|command| command != "client" && command != "subscribe");
    assert_eq!(seen, ["evalsha"], "others waited when this process saved, so it does not try without a place");
    saved(next_holder, "newer").await;
    saved(waiter.await.unwrap().unwrap(), "newest").await;

    let _ = sent(&mut monitor);
    saved(open(&handler, &id, exclusive()).await, "after the crowd").await;
    assert_eq!(sent(&mut monitor).first().map(String::as_str), Some("set"), "nobody waited when it saved last");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_in_another_process_is_woken_by_the_release_and_asks_nothing_before() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let id = session(&handler, "old").await;
    for _ in 0..3 {
        let holder = open(&handler, &id, exclusive()).await;
        let mut waiter = Waiter::start(&redis, &id);
        queued(&redis, &id, 1).await;
        let mut monitor = redis.monitor().unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(sent(&mut monitor), Vec::<String>::new(), "nobody asks while he waits");
        saved(holder, "new").await;
        waiter.is_in();
        is_told_once(&mut monitor);
        waiter.leaves();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_waiter_in_another_process_holds_nobody_up() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let id = session(&handler, "old").await;
    let holder = open(&handler, &id, exclusive()).await;
    let dead = Waiter::start(&redis, &id);
    queued(&redis, &id, 1).await;
    drop(dead);
    let waiter = waiting(&handler, &id, exclusive());
    queued(&redis, &id, 2).await;
    let mut monitor = redis.monitor().unwrap();
    saved(holder, "new").await;
    let opened = waiter.await.unwrap().unwrap();
    // He was passed over, and not waited for: whoever comes after him was told by the release itself.
    let commands = commands(&mut monitor);
    assert_eq!(commands.iter().filter(|(script, _)| !script).count(), 2, "a save, and coming for the lock: {commands:?}");
    assert_eq!(commands.iter().filter(|(_, command)| command == "publish").count(), 2, "{commands:?}");
    saved(opened, "newer").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wake_up_that_is_lost_with_its_connection_keeps_nobody_asleep() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let id = session(&handler, "old").await;
    for saves in [true, false] {
        let mut holder = open(&handler, &id, exclusive()).await;
        let waiter = waiting(&other, &id, exclusive());
        queued(&redis, &id, 1).await;
        assert_ne!(redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).unwrap(), "0", "nobody listened");
        // Before the subscription is made anew.
        if saves {
            saved(holder, "new").await;
        } else {
            holder.close().await.unwrap();
        }
        waiter.await.unwrap().unwrap().close().await.unwrap();
        until("the subscription again", async || redis.command(&["PUBSUB", "CHANNELS"]).unwrap().lines().count() > 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wake_up_that_is_lost_on_its_way_costs_one_sleep() {
    let redis = start(&[]);
    let proxy = proxy(&redis).await;
    let (handler, other) = (on(&redis).await, through(&proxy).await);
    let id = session(&handler, "old").await;
    let holder = open(&handler, &id, exclusive()).await;
    let waiter = waiting(&other, &id, exclusive());
    queued(&redis, &id, 1).await;
    // The answer to his place in the queue has come when the next thing that could come is the message.
    until("an answer", async || proxy.bytes(Direction::ToClient) > 0 && sleeps(&proxy).await).await;
    proxy.reset_counters();
    proxy.swallow_next_reply();
    let mut monitor = redis.monitor().unwrap();
    saved(holder, "new").await;
    let mut opened = waiter.await.unwrap().unwrap();
    assert!(proxy.swallowed() > 0, "the message was not lost");
    let seen = sent(&mut monitor);
    assert_eq!(seen, ["evalsha", "evalsha"], "a save, and one look");
    assert_eq!(read(&mut opened).await.as_deref(), Some("new"));
}

/// Whether nothing passes any more.
async fn sleeps(proxy: &conformance_tests::proxy::Proxy) -> bool {
    let before = proxy.bytes(Direction::ToClient);
    tokio::time::sleep(Duration::from_millis(50)).await;
    proxy.bytes(Direction::ToClient) == before
}

/// The name of the case in the rules of the protocol.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_waiters_at_the_head() {
    const LEASE: Duration = Duration::from_secs(1);
    let redis = start(&[]);
    let grave = proxy(&redis).await;
    let (handler, newcomers) = (on(&redis).await, on(&redis).await);
    let id = session(&handler, "old").await;
    let holder = open(&through(&grave).await, &id, briefly(LEASE)).await;
    let mut dead = Vec::new();
    for place in 1..=3 {
        let waits_long = OpenRequest::exclusive(Duration::from_secs(60), Duration::from_secs(60));
        dead.push(waiting(&through(&grave).await, &id, waits_long));
        queued(&redis, &id, place).await;
    }
    // As if their machine stood still: the server hears nothing, and takes them for listeners.
    grave.freeze();
    // One lease, three times what somebody has to come for a lock, and what a busy machine takes.
    let fourth = waiting(&handler, &id, OpenRequest::exclusive(LEASE + Duration::from_secs(3 + 5), support::LEASE));
    queued(&redis, &id, 4).await;
    let fifth = waiting(&newcomers, &id, OpenRequest::exclusive(Duration::from_secs(30), support::LEASE));
    let mut passed = 0;
    while !fourth.is_finished() {
        match newcomers.open(&id, &at_once()).await {
            Err(error) => assert_eq!(error.kind(), ErrorKind::LockTimeout),
            Ok(_) => passed += 1,
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let opened = fourth.await.unwrap().expect("one lease and three claims are enough");
    assert_eq!(passed, 0, "newcomers came before who waited");
    assert!(!fifth.is_finished(), "nor did the one behind");
    saved(opened, "fourth").await;
    saved(fifth.await.unwrap().expect("he is next"), "fifth").await;
    // The dead do no harm when they rise.
    grave.thaw();
    let mut late = holder;
    assert_eq!(kind(late.save(&write_of("late"), wid()).await), ErrorKind::Fenced);
    assert_eq!(look(&handler, &id).await.as_deref(), Some("fifth"));
    for waiter in dead {
        waiter.abort();
        let _ = waiter.await;
    }
    saved(open(&handler, &id, exclusive()).await, "after all of them").await;
}

/// What a waiter who died in the queue is given: the lock for a second, or for his lease if that is shorter, so that he costs no
/// more than a dead holder.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_waiter_has_the_lock_no_longer_than_a_dead_holder() {
    let redis = start(&[]);
    let grave = proxy(&redis).await;
    let (handler, dead) = (on(&redis).await, through(&grave).await);
    for (lease, longest) in [(300, 300), (60_000, 1000)] {
        let id = session(&handler, "old").await;
        let holder = open(&handler, &id, exclusive()).await;
        let claim = OpenRequest::exclusive(Duration::from_secs(60), Duration::from_millis(lease));
        let waiter = waiting(&dead, &id, claim);
        queued(&redis, &id, 1).await;
        grave.freeze();
        saved(holder, "new").await;
        let left: u64 = redis.command(&["PTTL", &keys(&id)[1]]).unwrap().parse().expect("he was given the lock");
        assert!((1..=longest).contains(&left), "a lease of {lease} ms: given for {left} ms");
        // Nobody has to wait for more than that, even one who would hold it long.
        let next = handler.open(&id, &briefly(support::LEASE)).await.unwrap();
        saved(next, "newer").await;
        waiter.abort();
        let _ = waiter.await;
        grave.thaw();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_place_of_a_task_that_gives_up_goes_to_the_next_of_its_process() {
    let redis = start(&[]);
    let sessions = async || Sessions::new(Arc::new(on(&redis).await)).unwrap();
    let (holders, ours, theirs) = (sessions().await, sessions().await, sessions().await);
    let mut session = holders.create().unwrap();
    session.insert("order", &Vec::<String>::new()).unwrap();
    let id = session.close().await.unwrap().unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let enter = |sessions: Sessions, name: &'static str| {
        let (id, order) = (id.clone(), Arc::clone(&order));
        tokio::spawn(async move {
            let outcome = sessions.open(&id).await;
            if outcome.is_ok() {
                order.lock().unwrap().push(name);
            }
            outcome.map(drop)
        })
    };
    let holder = holders.open(&id).await.unwrap();
    let short = enter(ours.clone().with_wait(Duration::from_millis(700)), "short of time");
    queued(&redis, &id, 1).await;
    let heir = enter(ours, "ours");
    let other = enter(theirs, "theirs");
    queued(&redis, &id, 2).await;
    assert_eq!(kind(short.await.unwrap()), ErrorKind::LockTimeout);
    // Ours has a place, and nobody has lost his.
    tokio::time::sleep(Duration::from_millis(100)).await;
    queued(&redis, &id, 2).await;
    holder.close().await.unwrap();
    heir.await.unwrap().unwrap();
    other.await.unwrap().unwrap();
    assert_eq!(*order.lock().unwrap(), ["ours", "theirs"]);
}

/// Returns what is counted as soon as it has not changed for a while: what was begun before is over then.
async fn settled<T: PartialEq>(count: impl Fn() -> T) -> T {
    let mut last = count();
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = count();
        if now == last {
            return now;
        }
        last = now;
    }
    panic!("the counts do not settle");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_dropped_opens_leave_no_lock_no_task_no_connection_and_no_waiter() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let mut random = Rng::new(std::process::id().into());
    let mut ids = Vec::new();
    for _ in 0..8 {
        ids.push(session(&handler, "old").await);
    }
    // Both have waited once, so that they listen.
    for (first, second) in [(&handler, &other), (&other, &handler)] {
        let holder = open(first, &ids[0], exclusive()).await;
        let waiter = waiting(second, &ids[0], exclusive());
        queued(&redis, &ids[0], 1).await;
        saved(holder, "old").await;
        saved(waiter.await.unwrap().unwrap(), "old").await;
    }
    let clients = || redis.command(&["CLIENT", "LIST"]).unwrap().lines().filter(|line| line.contains("127.0.0.1")).count();
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let waiters = || format!("{handler:?}{other:?}").matches("waiting: 0").count();
    let before = settled(|| (clients(), tasks())).await;
    assert_eq!(waiters(), 2, "{handler:?}");

    let mut outcomes = [0, 0];
    for round in 0..200 {
        let id = &ids[usize::try_from(random.below(8)).unwrap()];
        // Half of them behind somebody, who goes at some moment too.
        let holder = if round % 2 == 0 { other.open(id, &at_once()).await.ok() } else { None };
        let dropped = waiting(&handler, id, exclusive());
        tokio::time::sleep(random.duration(Duration::from_millis(4))).await;
        if round % 4 == 0 {
            drop(holder);
            tokio::time::sleep(random.duration(Duration::from_millis(1))).await;
        } else if let Some(mut holder) = holder {
            dropped.abort();
            holder.close().await.unwrap();
        }
        dropped.abort();
        outcomes[usize::from(dropped.await.is_ok())] += 1;
    }
    assert!(outcomes.iter().all(|count| *count > 10), "some in time, some not: {outcomes:?}");

    for id in &ids {
        // Long before the lease ends.
        let mut opened = open(&other, id, exclusive()).await;
        assert_eq!(read(&mut opened).await.as_deref(), Some("old"));
        opened.close().await.unwrap();
    }
    until("everybody has gone", async || waiters() == 2 && (clients(), tasks()) == before).await;
    let left = redis.command(&["KEYS", "*:*:*"]).unwrap();
    assert_eq!(left, "", "locks and queues");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_opens_of_sessions_leave_nothing_in_use() {
    let redis = start(&[]);
    let config = RedisConfig::from_dsn(&Dsn::parse(&redis.url()).unwrap()).unwrap();
    let handler = RedisHandler::connect(config).await.unwrap();
    let sessions = Sessions::builder(Arc::new(handler.clone())).lease(LEASE).build().unwrap();
    let mut random = Rng::new(std::process::id().into());
    let mut session = sessions.create().unwrap();
    session.insert("n", &0).unwrap();
    let id = session.close().await.unwrap().unwrap();
    for _ in 0..200 {
        let opening = tokio::spawn({
            let (sessions, id) = (sessions.clone(), id.clone());
            async move { sessions.open(&id).await.map(drop) }
        });
        tokio::time::sleep(random.duration(Duration::from_millis(1))).await;
        opening.abort();
    }
    sessions.open(&id).await.unwrap().close().await.unwrap();
    sessions.shutdown().await;
    until("nothing is in use", async || sessions.in_use() == (0, 0)).await;
    until("the lock is given back", async || redis.command(&["KEYS", "*:*:*"]).unwrap().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_renew_a_hundred_leases_together_and_keep_them() {
    let redis = start(&[]);
    let proxy = proxy(&redis).await;
    let lease = Duration::from_secs(3);
    let sessions = Sessions::builder(Arc::new(through(&proxy).await)).lease(lease).build().unwrap();
    let mut ids = Vec::new();
    for _ in 0..100 {
        let mut session = sessions.create().unwrap();
        session.insert("n", &0).unwrap();
        ids.push(session.close().await.unwrap().unwrap());
    }
    let opening: Vec<_> = ids
        .iter()
        .map(|id| {
            let (sessions, id) = (sessions.clone(), id.clone());
            tokio::spawn(async move { sessions.open(&id).await })
        })
        .collect();
    let mut held = Vec::new();
    for session in opening {
        held.push(session.await.unwrap().unwrap());
    }
    proxy.reset_counters();
    tokio::time::sleep(lease + lease / 2).await;
    // A tick at each third of a lease; on a busy machine not all of them were opened close to each other.
    let trips = proxy.round_trips();
    assert!((1..50).contains(&trips), "{trips} flights renewed a hundred leases four times or so");
    let other = on(&redis).await;
    for (session, id) in held.into_iter().zip(&ids) {
        assert_eq!(kind(other.open(id, &at_once()).await), ErrorKind::LockTimeout, "it is past its lease, and held");
        session.close().await.unwrap();
    }
}
