//! What a server does to a session that has stopped, forgotten, evicted, filled up, changed its role, or refuses us.
//!
//! Each test has a server of its own, does to it what an operator or a bad day does, and says what a holder is told.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::num::NonZeroU32;
use std::time::Duration;

use conformance_tests::servers::{Redis, RedisCluster};
use session_core::{Change, ErrorKind, Expect, LockInfo, OpenRequest, Result, SessionHandler, SessionId, Ttl, Written};
use session_redis::{RedisConfig, RedisHandler};
use support::*;
use tokio::task::JoinSet;

/// A handler that does not wait long for an answer.
async fn impatient(redis: &Redis) -> RedisHandler {
    connect(&format!("{}?timeout={}ms", redis.url(), SHORT.as_millis())).await.unwrap()
}

fn exists(redis: &Redis, key: &str) -> bool {
    redis.command(&["EXISTS", key]).unwrap() == "1"
}

/// Saves until the server has answered.
async fn settled(opened: &mut Opened, data: &str, id: session_core::WriteId) -> Result<Written> {
    for _ in 0..500 {
        match opened.save(&write_of(data), id).await {
            Err(error) if error.kind().keeps_opening() => tokio::time::sleep(Duration::from_millis(10)).await,
            outcome => return outcome,
        }
    }
    panic!("the server never answered");
}

// Each of them is a future of its own on the heap, and what is larger than 1 KiB is not at hand there on each thread.
#[tokio::test]
async fn a_call_carries_no_room_for_what_only_a_rare_one_needs() {
    let (handler, id, request) = (on(server()).await, new_id(), exclusive());
    let change = write_of("data");
    let mut opened = handler.open(&id, &request.expecting(Expect::Fresh)).await.unwrap();
    let open = size_of_val(&*handler.open(&id, &request));
    let read = size_of_val(&*opened.read());
    let sizes = [open, read, size_of_val(&*opened.save(&change, wid()))];
    assert!(sizes.iter().all(|size| *size <= 1024), "{sizes:?}");
}

/// Uses everything that a session is, and a wait for a lock beside it.
async fn whole_cycle(first: &RedisHandler, second: &RedisHandler) -> Result<()> {
    let id = new_id();
    let mut fresh = first.open(&id, &exclusive().expecting(Expect::Fresh)).await?;
    fresh.write(&record("created"), wid()).await?;
    fresh.save(&write_of("old"), wid()).await?;
    let mut opened = first.open(&id, &exclusive()).await?;
    assert_eq!(opened.read().await?.map(|record| record.data).as_deref(), Some(&b"old"[..]));
    let held = opened.held().expect("it is locked").clone();
    held.lock.renew(&[held.lease]).await.remove(0)?;
    let waiter = tokio::spawn({
        let (second, id) = (second.clone(), id.clone());
        async move { second.open(&id, &exclusive()).await }
    });
    let admin = first.admin().expect("it can be listed");
    let mut locks = Vec::new();
    while !waiter.is_finished() && locks.first().and_then(|lock: &LockInfo| lock.waiting) != Some(1) {
        locks = admin.locks(NonZeroU32::MIN).await?;
        assert_eq!(locks.len(), 1);
    }
    assert!(!admin.list(None, NonZeroU32::MAX).await?.sessions.is_empty());
    opened.touch(Ttl::from_secs(800)).await?;
    opened.save(&write_of("new"), wid()).await?;
    let mut opened = waiter.await.expect("it does not panic")?;
    assert_eq!(opened.read().await?.map(|record| record.data).as_deref(), Some(&b"new"[..]));
    assert!(admin.unlock(&id).await?);
    opened.save(&Change::Touch(Ttl::from_secs(700)), wid()).await?;
    // The body of a long save goes beside the script.
    let mut long = first.open(&id, &exclusive()).await?;
    long.save(&write_of("x".repeat(9 << 10)), wid()).await?;
    let mut optimistic = first.open(&id, &OpenRequest::optimistic()).await?;
    optimistic.read().await?;
    optimistic.save(&write_of("newest"), wid()).await?;
    // Many who ask at the same moment ask together.
    let mut views = JoinSet::new();
    for _ in 0..64 {
        let (first, id) = (first.clone(), id.clone());
        views.spawn(async move { first.open(&id, &OpenRequest::read_only()).await?.read().await });
    }
    for view in views.join_all().await {
        assert_eq!(view?.map(|record| record.data).as_deref(), Some(&b"newest"[..]));
    }
    // A life that ends before two leases do is prolonged at the open.
    let mut opened = first.open(&id, &exclusive()).await?;
    opened.save(&Change::Touch(Ttl::from_secs(30)), wid()).await?;
    let mut held = first.open(&id, &exclusive()).await?;
    let waiter = tokio::spawn({
        let (second, id) = (second.clone(), id.clone());
        async move { second.open(&id, &exclusive()).await }
    });
    while !waiter.is_finished() && admin.locks(NonZeroU32::MIN).await?.first().and_then(|lock| lock.waiting) != Some(1) {}
    let mut logout = first.open(&id, &OpenRequest::destroy()).await?;
    assert!(logout.destroy().await?.is_some());
    logout.close().await?;
    // Whoever waits is told at once, and leaves the queue.
    assert!(waiter.await.expect("it does not panic")?.read().await?.is_none());
    held.close().await?;
    assert!(first.open(&id, &OpenRequest::read_only()).await?.read().await?.is_none());
    Ok(())
}

/// A session works from beginning to end.
async fn works(handler: &RedisHandler) {
    whole_cycle(handler, handler).await.unwrap_or_else(|error| panic!("a whole cycle failed: {error:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_of_a_frozen_server_is_unavailable_and_is_withdrawn_when_it_goes_on() {
    let redis = start(&[]);
    let (handler, other) = (impatient(&redis).await, on(&redis).await);
    let id = session(&other, "old").await;
    look(&handler, &id).await;
    redis.freeze().unwrap();
    assert_eq!(kind(handler.open(&id, &exclusive()).await), ErrorKind::Unavailable);
    redis.resume().unwrap();
    // The server does now what it was asked while it stood still.
    let opened = open(&other, &id, exclusive()).await;
    saved(opened, "new").await;
    until("an answer in time", async || handler.open(&id, &OpenRequest::read_only()).await.is_ok()).await;
    assert_eq!(look(&handler, &id).await.as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hold_outlasts_a_server_that_freezes_and_goes_on() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let id = session(&handler, "old").await;
    let opened = open(&handler, &id, briefly(Duration::from_millis(200))).await;
    let held = open(&handler, &session(&handler, "held").await, exclusive()).await;
    redis.freeze().unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    redis.resume().unwrap();
    saved(held, "new").await;
    // A lease that ended meanwhile, and that nobody took over, still writes.
    saved(opened, "new").await;
    let first = open(&handler, &id, briefly(Duration::from_millis(200))).await;
    redis.freeze().unwrap();
    let next = tokio::spawn({
        let (other, id) = (other.clone(), id.clone());
        async move { open(&other, &id, exclusive()).await }
    });
    tokio::time::sleep(Duration::from_millis(400)).await;
    redis.resume().unwrap();
    // One that somebody took over does not.
    saved(next.await.unwrap(), "theirs").await;
    let mut first = first;
    assert_eq!(kind(first.save(&write_of("late"), wid()).await), ErrorKind::Fenced);
    assert_eq!(look(&handler, &id).await.as_deref(), Some("theirs"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_to_a_frozen_server_is_unknown_and_counts_once_when_it_goes_on() {
    let redis = start(&[]);
    let (handler, other) = (impatient(&redis).await, on(&redis).await);
    let id = session(&other, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let write = wid();
    redis.freeze().unwrap();
    assert_eq!(kind(opened.save(&write_of("new"), write).await), ErrorKind::Unknown);
    assert_eq!(kind(opened.save(&write_of("new"), write).await), ErrorKind::Unknown);
    redis.resume().unwrap();
    let outcome = settled(&mut opened, "new", write).await;
    assert!(matches!(outcome, Ok(Written::AlreadyApplied)), "{outcome:?}");
    let mut next = open(&other, &id, exclusive()).await;
    assert_eq!(read(&mut next).await.as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_forgets_everything_when_it_restarts_leaves_a_holder_with_gone() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let id = session(&handler, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let other = session(&handler, "old").await;
    let mut unaware = open(&handler, &other, exclusive()).await;
    redis.restart().unwrap();
    // This one meets the broken connection, and cannot know whether the server had it before it fell.
    assert_eq!(kind(unaware.save(&write_of("new"), wid()).await), ErrorKind::Unknown);
    assert_eq!(kind(opened.save(&write_of("new"), wid()).await), ErrorKind::Gone);
    for id in [id, other] {
        assert_eq!(look(&handler, &id).await, None, "what was lost does not come back");
    }
    works(&handler).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_keeps_everything_when_it_restarts_keeps_locks_and_records() {
    let redis = start(&["appendonly yes", "appendfsync always"]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let id = session(&handler, "old").await;
    let opened = open(&handler, &id, exclusive()).await;
    redis.restart().unwrap();
    assert_eq!(kind(other.open(&id, &at_once()).await), ErrorKind::LockTimeout, "the lock came back with the server");
    saved(opened, "new").await;
    assert_eq!(look(&other, &id).await.as_deref(), Some("new"));
    works(&handler).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_down_is_unavailable_and_back_without_a_new_handler() {
    let redis = start(&["appendonly yes", "appendfsync always"]);
    let handler = impatient(&redis).await;
    let id = session(&handler, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let write = wid();
    redis.kill().unwrap();
    let first = kind(opened.save(&write_of("new"), write).await);
    assert!(matches!(first, ErrorKind::Unknown | ErrorKind::Unavailable), "{first:?}");
    for _ in 0..3 {
        assert_eq!(kind(handler.open(&id, &OpenRequest::read_only()).await), ErrorKind::Unavailable);
        assert_eq!(kind(handler.open(&id, &exclusive()).await), ErrorKind::Unavailable);
    }
    redis.restart().unwrap();
    let outcome = settled(&mut opened, "new", write).await;
    assert!(outcome.is_ok(), "{outcome:?}");
    assert_eq!(look(&handler, &id).await.as_deref(), Some("new"));
    works(&handler).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_during_a_hold_is_gone() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let id = session(&handler, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    redis.command(&["FLUSHALL"]).unwrap();
    assert_eq!(kind(opened.save(&write_of("new"), wid()).await), ErrorKind::Gone);
    assert_eq!(redis.command(&["DBSIZE"]).unwrap(), "0", "nothing was brought back");
    works(&handler).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_that_are_flushed_between_any_two_calls_are_not_missed() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let flush = || redis.command(&["SCRIPT", "FLUSH"]).unwrap();
    let id = new_id();
    let mut opened = open(&handler, &id, exclusive().expecting(Expect::Fresh)).await;
    flush();
    assert!(matches!(opened.write(&record("created"), wid()).await, Ok(Written::Applied)));
    flush();
    assert!(matches!(opened.touch(Ttl::from_secs(30)).await, Ok(Written::Applied)));
    flush();
    let held = opened.held().unwrap().clone();
    assert!(matches!(held.lock.renew(&[held.lease]).await[..], [Ok(())]));
    let waiter = tokio::spawn({
        let (other, id) = (other.clone(), id.clone());
        async move { open(&other, &id, exclusive()).await }
    });
    let queue = keys(&id)[2].clone();
    until("a place in the queue", async || exists(&redis, &queue)).await;
    flush();
    saved(opened, "new").await;
    flush();
    let mut opened = waiter.await.unwrap();
    assert_eq!(read(&mut opened).await.as_deref(), Some("new"));
    flush();
    opened.close().await.unwrap();
    flush();
    let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
    assert!(logout.destroy().await.unwrap().is_some());
    assert_eq!(look(&other, &id).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evicted_lock_lets_the_next_one_in_and_fences_the_holder() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    for next_writes in [false, true] {
        let id = session(&handler, "old").await;
        let mut opened = open(&handler, &id, exclusive()).await;
        assert_eq!(redis.command(&["DEL", &keys(&id)[1]]).unwrap(), "1");
        let next = open(&other, &id, at_once()).await;
        let expected = if next_writes {
            saved(next, "theirs").await;
            "theirs"
        } else {
            // Kept open: whoever holds the lock now wins, even before he has written.
            assert_eq!(kind(opened.save(&write_of("late"), wid()).await), ErrorKind::Fenced);
            saved(next, "then theirs").await;
            "then theirs"
        };
        if next_writes {
            assert_eq!(kind(opened.save(&write_of("late"), wid()).await), ErrorKind::Fenced);
        }
        assert_eq!(look(&handler, &id).await.as_deref(), Some(expected));
    }
    // Without a next one nothing has happened.
    let id = session(&handler, "old").await;
    let opened = open(&handler, &id, exclusive()).await;
    redis.command(&["DEL", &keys(&id)[1]]).unwrap();
    saved(opened, "new").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evicted_record_is_gone_and_is_not_brought_back() {
    let redis = start(&["maxmemory-policy allkeys-lru"]);
    let handler = on(&redis).await;
    let id = session(&handler, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let memory: u64 = redis
        .command(&["INFO", "memory"])
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("used_memory:")?.trim().parse().ok())
        .expect("it says how much it uses");
    redis.command(&["CONFIG", "SET", "maxmemory", &(memory + 300_000).to_string()]).unwrap();
    let filler = "for i = 1, 500 do redis.call('SET', 'filler:' .. ARGV[1] .. ':' .. i, string.rep('x', 1000)) end";
    let mut round = 0;
    until("the eviction of the record", async || {
        round += 1;
        // What does not fit is evicted before the next command.
        let _ = redis.command(&["EVAL", filler, "0", &round.to_string()]);
        !exists(&redis, &keys(&id)[0])
    })
    .await;
    assert_eq!(kind(opened.save(&write_of("new"), wid()).await), ErrorKind::Gone);
    assert!(!exists(&redis, &keys(&id)[0]));
    let expired = redis.command(&["INFO", "stats"]).unwrap();
    assert!(!expired.contains("evicted_keys:0"), "{expired}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_values_under_a_record_are_corrupt_left_alone_and_not_locked() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let plants: &[&[&str]] = &[&["SET", "KEY", "somebody else's, and longer than a header"], &["RPUSH", "KEY", "a", "list"]];
    for plant in plants {
        let id = new_id();
        let [key, lock, queue] = keys(&id);
        let plant: Vec<_> = plant.iter().map(|word| if *word == "KEY" { key.as_str() } else { word }).collect();
        redis.command(&plant).unwrap();
        let before = redis.command(&["DUMP", &key]).unwrap();
        let accesses =
            [exclusive(), exclusive().expecting(Expect::Any), OpenRequest::read_only(), OpenRequest::optimistic()];
        for request in accesses {
            assert_eq!(kind(handler.open(&id, &request).await), ErrorKind::Corrupt, "{plant:?} as {request:?}");
            assert!(!exists(&redis, &lock) && !exists(&redis, &queue), "{plant:?} as {request:?}");
        }
        let mut fresh = open(&handler, &id, exclusive().expecting(Expect::Fresh)).await;
        assert_eq!(kind(fresh.save(&write_of("new"), wid()).await), ErrorKind::Corrupt);
        let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
        assert_eq!(kind(logout.destroy().await), ErrorKind::Corrupt);
        assert_eq!(redis.command(&["DUMP", &key]).unwrap(), before, "{plant:?}");
        assert!(!exists(&redis, &lock));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_turns_foreign_during_a_hold_is_corrupt_and_its_lock_is_free() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    for plant in [&["SET", "KEY", "somebody else's"][..], &["RPUSH", "KEY", "a"]] {
        let id = session(&handler, "old").await;
        let [key, lock, _] = keys(&id);
        let mut opened = open(&handler, &id, exclusive()).await;
        redis.command(&["DEL", &key]).unwrap();
        let plant: Vec<_> = plant.iter().map(|word| if *word == "KEY" { key.as_str() } else { word }).collect();
        redis.command(&plant).unwrap();
        let before = redis.command(&["DUMP", &key]).unwrap();
        assert_eq!(kind(opened.save(&write_of("new"), wid()).await), ErrorKind::Corrupt, "{plant:?}");
        assert_eq!(redis.command(&["DUMP", &key]).unwrap(), before, "{plant:?}");
        until("the lock is given back", async || !exists(&redis, &lock)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_values_under_lock_and_queue_are_corrupt_and_left_alone() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let plants: &[(usize, &[&str])] = &[
        (1, &["SET", "KEY", "somebody else's"]),
        (1, &["SET", "KEY", ""]),
        (1, &["RPUSH", "KEY", "a", "list"]),
        (2, &["SET", "KEY", "no list"]),
        (2, &["HSET", "KEY", "no", "list"]),
    ];
    for (which, plant) in plants {
        let id = session(&handler, "old").await;
        let all = keys(&id);
        let plant: Vec<_> = plant.iter().map(|word| if *word == "KEY" { all[*which].as_str() } else { word }).collect();
        redis.command(&plant).unwrap();
        let before = redis.command(&["DUMP", &all[*which]]).unwrap();
        assert_eq!(kind(handler.open(&id, &exclusive()).await), ErrorKind::Corrupt, "{plant:?}");
        assert_eq!(redis.command(&["DUMP", &all[*which]]).unwrap(), before, "{plant:?}");
        assert_eq!(look(&handler, &id).await.as_deref(), Some("old"), "{plant:?}");
        if *which == 2 {
            assert!(!exists(&redis, &all[1]), "{plant:?}: the lock was given back");
            redis.command(&["DEL", &all[2]]).unwrap();
            let mut opened = open(&handler, &id, exclusive()).await;
            redis.command(&plant).unwrap();
            // Nobody has queued since the open, so a save has nothing to do with what is there.
            assert!(matches!(opened.save(&write_of("new"), wid()).await, Ok(Written::Applied)), "{plant:?}");
            assert!(!exists(&redis, &all[1]), "{plant:?}: the lock was given back");
            assert_eq!(redis.command(&["DUMP", &all[2]]).unwrap(), before, "{plant:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_becomes_a_replica_is_unavailable_until_it_is_master_again() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let id = session(&handler, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let free = session(&handler, "free").await;
    // Of a master that is not there, so it keeps what it has.
    redis.command(&["REPLICAOF", "127.0.0.1", "1"]).unwrap();
    let write = wid();
    let error = opened.save(&write_of("new"), write).await.expect_err("it is read only");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.to_string().contains("replica"), "{error}");
    assert_eq!(kind(handler.open(&free, &exclusive()).await), ErrorKind::Unavailable);
    assert_eq!(look(&handler, &id).await.as_deref(), Some("old"), "reading goes on");
    redis.command(&["REPLICAOF", "NO", "ONE"]).unwrap();
    assert!(matches!(opened.save(&write_of("new"), write).await, Ok(Written::Applied)));
    saved(open(&handler, &free, at_once()).await, "new").await;
    works(&handler).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_refuses_clearly_keeps_the_old_record_and_gives_locks_back() {
    let redis = start(&["maxmemory-policy noeviction"]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let (id, waited) = (session(&handler, "old").await, session(&handler, "old").await);
    let mut opened = open(&handler, &id, exclusive()).await;
    let mut contended = open(&handler, &waited, exclusive()).await;
    let waiter = tokio::spawn({
        let (other, id) = (other.clone(), waited.clone());
        async move { other.open(&id, &exclusive()).await }
    });
    until("a place in the queue", async || exists(&redis, &keys(&waited)[2])).await;
    redis.command(&["SET", "filler", &"x".repeat(2 << 20)]).unwrap();
    redis.command(&["CONFIG", "SET", "maxmemory", "1mb"]).unwrap();
    let error = opened.save(&write_of("new"), wid()).await.expect_err("there is no room");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.to_string().contains("maxmemory"), "{error}");
    assert_eq!(look(&handler, &id).await.as_deref(), Some("old"));
    opened.close().await.expect("giving back needs no room");
    assert!(!exists(&redis, &keys(&id)[1]));
    assert_eq!(kind(handler.open(&id, &exclusive()).await), ErrorKind::Unavailable);
    // Who was handed the lock has no room for his own mark, and passes it on.
    contended.close().await.expect("giving back needs no room");
    assert_eq!(kind(waiter.await.unwrap()), ErrorKind::Unavailable);
    until("the lock is given back", async || !exists(&redis, &keys(&waited)[1])).await;
    redis.command(&["DEL", "filler"]).unwrap();
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]).unwrap();
    works(&handler).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_or_missing_password_or_user_is_a_matter_of_configuration_and_is_not_shown() {
    let redis = start(&["requirepass hunter2", "user app on >swordfish ~* &* +@all"]);
    let at = redis.address();
    for login in ["", ":swordfish@", "app:hunter2@", "nobody:hunter2@"] {
        let error = connect(&format!("redis://{login}{at}/0")).await.expect_err(login);
        assert_eq!(error.kind(), ErrorKind::Config, "{login}: {error:?}");
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("swordfish"), "{shown}");
    }
    for login in [":hunter2@", "default:hunter2@", "app:swordfish@"] {
        works(&connect(&format!("redis://{login}{at}/0")).await.expect(login)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_loses_his_permissions_is_told_so_and_the_next_answer_is_right_when_he_has_them_again() {
    let redis = start(&["user app on >pw ~* &* +@all"]);
    let handler = connect(&format!("redis://app:pw@{}/0", redis.address())).await.unwrap();
    let id = session(&handler, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    redis.command(&["ACL", "SETUSER", "app", "-set"]).unwrap();
    let free = session(&on(&redis).await, "free").await;
    assert_eq!(kind(handler.open(&free, &exclusive()).await), ErrorKind::Config);
    assert_eq!(kind(opened.save(&write_of("new"), wid()).await), ErrorKind::Config, "a script may do no more than its user");
    assert_eq!(look(&handler, &id).await.as_deref(), Some("old"));
    redis.command(&["ACL", "SETUSER", "app", "+set"]).unwrap();
    until("the lock is given back", async || !exists(&redis, &keys(&id)[1])).await;
    works(&handler).await;
}

/// The commands that the crate's documentation says a user needs.
fn documented() -> Vec<&'static str> {
    let text = include_str!("../src/lib.rs");
    let (_, text) = text.split_once("the commands `").expect("it lists the commands");
    let (commands, _) = text.split_once('`').expect("the list ends");
    commands.split_whitespace().filter(|word| *word != "//!").collect()
}

/// A user with these commands and the keys and channels of the documentation.
fn user(commands: &[&str]) -> String {
    let commands: Vec<_> = commands.iter().map(|command| format!("+{command}")).collect();
    format!("user app on >pw ~session:* &session:* -@all {}", commands.join(" "))
}

async fn as_user(redis: &Redis) -> Result<RedisHandler> {
    connect(&format!("redis://app:pw@{}/0", redis.address())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_with_exactly_the_documented_permissions_can_do_everything() {
    let commands = documented();
    assert!(commands.len() > 10, "{commands:?}");
    let redis = start(&[&user(&commands)]);
    let (first, second) = (as_user(&redis).await.unwrap(), as_user(&redis).await.unwrap());
    whole_cycle(&first, &second).await.unwrap_or_else(|error| panic!("the documentation is wrong: {error:?}"));
    let log = redis.command(&["ACL", "LOG"]).unwrap();
    let lines: Vec<_> = log.lines().collect();
    let mut refused = lines.windows(2).filter(|pair| pair[0] == "object").map(|pair| pair[1]);
    // What the client says about itself is refused, and nobody misses it.
    assert!(refused.all(|object| object.starts_with("client")), "{log}");

    let elsewhere = format!("redis://app:pw@{}/2", redis.address());
    assert_eq!(kind(connect(&elsewhere).await), ErrorKind::Config);
    redis.command(&["ACL", "SETUSER", "app", "+select"]).unwrap();
    works(&connect(&elsewhere).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_lacks_one_of_the_documented_permissions_is_a_matter_of_configuration() {
    let commands = documented();
    // What only `wait_replicas`, a quiet subscription or a long wait need is not missed here; nor is the wake-up, which costs a sleep.
    // A script that could not be loaded is sent whole, and one that was loaded need not be.
    let later = ["wait", "ping", "lset", "subscribe", "eval", "script|load"];
    for missing in commands.iter().filter(|command| !later.contains(command)) {
        let rest: Vec<_> = commands.iter().copied().filter(|command| command != missing).collect();
        let redis = start(&[&user(&rest)]);
        let outcome = async {
            let (first, second) = (as_user(&redis).await?, as_user(&redis).await?);
            whole_cycle(&first, &second).await
        };
        match outcome.await {
            Err(error) => assert_eq!(error.kind(), ErrorKind::Config, "without {missing}: {error:?}"),
            Ok(()) => panic!("nothing needs {missing}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_without_the_keys_or_the_channels_is_a_matter_of_configuration() {
    let commands = documented();
    for (instead, of) in [("~other:*", "~session:*"), ("&other:*", "&session:*")] {
        let redis = start(&[&user(&commands).replace(of, instead)]);
        let outcome = async {
            let (first, second) = (as_user(&redis).await?, as_user(&redis).await?);
            whole_cycle(&first, &second).await
        };
        assert_eq!(kind(outcome.await), ErrorKind::Config, "{instead}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_out_of_range_is_a_matter_of_configuration() {
    let redis = start(&["databases 4"]);
    let at = redis.address();
    let error = connect(&format!("redis://{at}/4")).await.expect_err("there are four");
    assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
    let handler = connect(&format!("redis://{at}/3")).await.unwrap();
    let id = session(&handler, "old").await;
    assert_eq!(look(&handler, &id).await.as_deref(), Some("old"));
    assert_eq!(look(&on(&redis).await, &id).await, None, "another database is another store");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_of_a_cluster_taken_for_a_single_one_is_a_matter_of_configuration() {
    let cluster = RedisCluster::start(3, 0).unwrap();
    let node = &cluster.nodes()[0];
    let handler = on(node).await;
    let mut seen = 0;
    for _ in 0..30 {
        let id = new_id();
        if cluster.master_of(&keys(&id)[0]).unwrap().port() == node.port() {
            continue;
        }
        seen += 1;
        for request in [exclusive(), OpenRequest::read_only()] {
            let error = handler.open(&id, &request).await.expect_err("it is another server's");
            assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
            assert!(error.to_string().contains("redis+cluster"), "{error}");
        }
        let mut fresh = open(&handler, &id, exclusive().expecting(Expect::Fresh)).await;
        assert_eq!(kind(fresh.save(&write_of("new"), wid()).await), ErrorKind::Config);
    }
    assert!(seen > 3, "two thirds of all ids belong to others");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_on_this_machine_is_a_server_like_others() {
    let redis = start(&["requirepass secret"]);
    let path = redis.socket_path();
    let path = path.display();
    works(&connect(&format!("redis+unix://:secret@{path}?db=2")).await.unwrap()).await;
    assert_eq!(kind(connect(&format!("redis+unix://{path}")).await), ErrorKind::Config);
    assert_eq!(kind(connect(&format!("redis+unix://{path}.not")).await), ErrorKind::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_believed_only_of_those_who_are_trusted() {
    let (redis, stranger) = (Redis::start_tls(&[]).unwrap(), Redis::start_tls(&[]).unwrap());
    let ca = redis.ca_path().unwrap();
    let handler = connect(&format!("{}?ca={}", redis.url(), ca.display())).await.unwrap();
    works(&handler).await;
    redis.restart().unwrap();
    works(&handler).await;
    let trusting = |ca: &str| connect_owned(format!("{}?{ca}", redis.url()));
    for options in [format!("ca={}", stranger.ca_path().unwrap().display()), String::new()] {
        let error = trusting(&options).await.expect_err("nobody vouches for it");
        assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
    }
    let error = trusting("ca=/nowhere/ca.pem").await.expect_err("there is no such file");
    assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
    // Plain to a port that speaks TLS.
    let plain = connect(&format!("redis://{}/0?timeout=500ms&connect_timeout=500ms", redis.address())).await;
    assert_eq!(kind(plain), ErrorKind::Unavailable);
}

async fn connect_owned(dsn: String) -> Result<RedisHandler> {
    connect(&dsn).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_exists_already_can_be_used() {
    let redis = start(&["requirepass secret"]);
    let client = session_redis::redis::Client::open(format!("redis://:secret@{}/2", redis.address())).unwrap();
    let config = || RedisConfig::default().with_prefix("session:");
    let handler = RedisHandler::from_client(client.clone(), config()).await.unwrap();
    works(&handler).await;
    // The client's own address, password and database count.
    let id: SessionId = session(&handler, "old").await;
    let same = connect(&format!("redis://:secret@{}/2", redis.address())).await.unwrap();
    assert_eq!(look(&same, &id).await.as_deref(), Some("old"));
    redis.restart().unwrap();
    works(&handler).await;
    redis.kill().unwrap();
    assert_eq!(kind(RedisHandler::from_client(client, config()).await), ErrorKind::Unavailable);
}
