//! What travels together: each member of a flight is judged for itself, whatever becomes of the others.
//!
//! The runtime has one thread, so that what is asked for at once stands there at once: the first seven go alone, the next twelve in
//! twos, and the others in fours and ever more. That they did is read from what the server counts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use conformance_tests::proxy::{CountFrom, Direction};
use conformance_tests::servers::{Monitor, Redis};
use session_core::{
    Change, ErrorKind, Expect, LeaseRequest, OpenRequest, Result, SessionHandler, SessionId, SessionLock, Ttl, WriteId,
    Written,
};
use session_redis::RedisHandler;
use support::*;
use tokio::task::{JoinHandle, JoinSet};

/// How many are asked for at once.
const MANY: usize = 64;

/// From here on they are in flights of eight and of nine.
const CROWDED: usize = 45;

/// How often the server was told to do this.
fn calls(redis: &Redis, command: &str) -> usize {
    let stats = redis.command(&["INFO", "commandstats"]).unwrap();
    let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")).map(str::to_owned));
    line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
}

/// How many scripts were about any of these sessions, and the most that one of them was about one of them.
fn judged(monitor: &mut Monitor, ids: &[SessionId]) -> (usize, usize) {
    let locks: Vec<_> = ids.iter().map(|id| keys(id)[1].clone()).collect();
    let lines = monitor.lines().unwrap();
    let scripts = lines.iter().filter(|line| line.to_lowercase().contains("\"evalsha\""));
    let most = scripts.filter_map(|line| locks.iter().map(|lock| line.matches(lock).count()).max().filter(|most| *most > 0));
    most.fold((0, 0), |(scripts, most), this| (scripts + 1, most.max(this)))
}

fn exists(redis: &Redis, key: &str) -> bool {
    redis.command(&["EXISTS", key]).unwrap() == "1"
}

/// No body was left where it waited to be judged.
#[track_caller]
fn nothing_left_behind(redis: &Redis) {
    assert_eq!(redis.command(&["KEYS", "*:new:*"]).unwrap(), "");
}

async fn sessions(handler: &RedisHandler, count: usize) -> Vec<SessionId> {
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(session(handler, "old").await);
    }
    ids
}

async fn open_all(handler: &RedisHandler, ids: &[SessionId]) -> Vec<Opened> {
    let mut opened = Vec::new();
    for id in ids {
        opened.push(open(handler, id, exclusive()).await);
    }
    opened
}

/// Saves all at once, and returns the openings and what became of each.
async fn save_all(opened: Vec<Opened>, change: impl Fn(usize) -> (Change, WriteId)) -> Vec<(Opened, Result<Written>)> {
    let tasks: Vec<JoinHandle<_>> = opened
        .into_iter()
        .enumerate()
        .map(|(n, mut opened)| {
            let (change, write) = change(n);
            tokio::spawn(async move {
                let outcome = opened.save(&change, write).await;
                (opened, outcome)
            })
        })
        .collect();
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.unwrap());
    }
    outcomes
}

fn new(n: usize) -> (Change, WriteId) {
    (write_of(format!("new {n}")), wid())
}

#[track_caller]
fn applied(outcome: &Result<Written>, what: &str) {
    assert!(matches!(outcome, Ok(Written::Applied)), "{what}: {outcome:?}");
}

#[tokio::test]
async fn saves_in_one_flight_are_judged_each_for_itself() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let ids = sessions(&handler, MANY).await;
    let mut opened = open_all(&handler, &ids).await;
    let at = |n: usize| keys(&ids[n]);

    let foreign = CROWDED;
    redis.command(&["DEL", &at(foreign)[0]]).unwrap();
    redis.command(&["RPUSH", &at(foreign)[0], "somebody else's"]).unwrap();
    let before = redis.command(&["DUMP", &at(foreign)[0]]).unwrap();
    let overtaken = CROWDED + 1;
    redis.command(&["DEL", &at(overtaken)[1]]).unwrap();
    saved(open(&other, &ids[overtaken], at_once()).await, "theirs").await;
    let passed = CROWDED + 2;
    redis.command(&["DEL", &at(passed)[1]]).unwrap();
    let _passer = open(&other, &ids[passed], at_once()).await;
    let destroyed = CROWDED + 3;
    let mut logout = open(&other, &ids[destroyed], OpenRequest::destroy()).await;
    logout.destroy().await.unwrap();
    let ended = CROWDED + 4;
    redis.command(&["DEL", &at(ended)[1]]).unwrap();
    let touched = CROWDED + 5;
    redis.command(&["PEXPIRE", &at(touched)[0], "200000"]).unwrap();
    let awaited = CROWDED + 6;
    let waiter = tokio::spawn({
        let (other, id) = (other.clone(), ids[awaited].clone());
        async move { read(&mut open(&other, &id, exclusive()).await).await }
    });
    until("a place in the queue", async || exists(&redis, &keys(&ids[awaited])[2])).await;
    let created = CROWDED + 7;
    opened[created].close().await.unwrap();
    let fresh = new_id();
    opened[created] = open(&handler, &fresh, exclusive().expecting(Expect::Fresh)).await;
    let optimistic = CROWDED + 8;
    opened[optimistic].close().await.unwrap();
    opened[optimistic] = open(&handler, &ids[optimistic], OpenRequest::optimistic()).await;
    let large = CROWDED + 9;
    let locked_queue = CROWDED + 10;
    redis.command(&["SET", &at(locked_queue)[2], "no list"]).unwrap();

    let scripts = calls(&redis, "evalsha");
    let mut monitor = redis.monitor().unwrap();
    let outcomes = save_all(opened, |n| match n {
        n if n == touched => (Change::Touch(Ttl::from_secs(900)), wid()),
        n if n == large => (write_of("x".repeat(100_000)), wid()),
        n => new(n),
    })
    .await;
    let scripts = calls(&redis, "evalsha") - scripts;
    assert!(scripts <= MANY / 2, "{MANY} saves travelled as {scripts}");
    let (last, _) = judged(&mut monitor, &ids[MANY - 24..]);
    assert!((1..=12).contains(&last), "the last 24 saves travelled as {last}");

    for (n, (_, outcome)) in outcomes.iter().enumerate() {
        let seen = || async { look(&other, &ids[n]).await };
        if n == foreign {
            assert_eq!(outcome.as_ref().unwrap_err().kind(), ErrorKind::Corrupt);
            assert_eq!(redis.command(&["DUMP", &at(n)[0]]).unwrap(), before);
        } else if n == overtaken {
            assert_eq!(outcome.as_ref().unwrap_err().kind(), ErrorKind::Fenced);
            assert_eq!(seen().await.as_deref(), Some("theirs"));
        } else if n == passed {
            assert_eq!(outcome.as_ref().unwrap_err().kind(), ErrorKind::Fenced);
            assert_eq!(seen().await.as_deref(), Some("old"));
        } else if n == destroyed {
            assert_eq!(outcome.as_ref().unwrap_err().kind(), ErrorKind::Gone);
            assert_eq!(seen().await, None);
        } else if n == touched {
            applied(outcome, "a touch");
            assert_eq!(seen().await.as_deref(), Some("old"));
            let left: i64 = redis.command(&["PTTL", &at(n)[0]]).unwrap().parse().unwrap();
            assert!(left > 800_000, "{left}");
        } else if n == created {
            applied(outcome, "a create");
            assert_eq!(look(&other, &fresh).await, Some(format!("new {n}")));
        } else {
            applied(outcome, &format!("the save of {n}"));
            let expected = if n == large { "x".repeat(100_000) } else { format!("new {n}") };
            assert_eq!(seen().await, Some(expected), "{n}");
            let left: i64 = redis.command(&["PTTL", &at(n)[0]]).unwrap().parse().unwrap();
            assert!((800_000..=900_000).contains(&left), "{n} lives for {left} ms");
        }
        if ![foreign, passed, awaited].contains(&n) {
            until("the lock is given back", async || !exists(&redis, &at(n)[1])).await;
        }
    }
    assert_eq!(waiter.await.unwrap(), Some(format!("new {awaited}")), "the waiter was let in");
    nothing_left_behind(&redis);
}

#[tokio::test]
async fn a_lone_save_is_one_script_and_only_the_body_of_a_long_one_goes_beside_it() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let id = session(&handler, "old").await;
    for (length, beside) in [(2 << 10, 0), (9 << 10, 1), (2 << 10, 1)] {
        let mut opened = open(&handler, &id, exclusive()).await;
        let (data, scripts) = ("x".repeat(length), calls(&redis, "evalsha"));
        applied(&opened.save(&write_of(data.as_str()), wid()).await, "alone");
        assert_eq!((calls(&redis, "evalsha"), calls(&redis, "rename")), (scripts + 1, beside), "{length} bytes");
        assert_eq!(look(&handler, &id).await, Some(data));
    }
    nothing_left_behind(&redis);
}

#[tokio::test]
async fn a_late_save_in_one_flight_with_the_holders_own_is_refused_and_changes_nothing() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    for late_first in [true, false] {
        let mut opened = open_all(&handler, &sessions(&handler, CROWDED).await).await;
        let id = session(&handler, "old").await;
        let late = open(&handler, &id, exclusive()).await;
        redis.command(&["DEL", &keys(&id)[1]]).unwrap();
        let holder = open(&handler, &id, at_once()).await;
        let (first, second) = if late_first { (late, holder) } else { (holder, late) };
        opened.extend([first, second]);
        let mut ids = sessions(&handler, 10).await;
        opened.extend(open_all(&handler, &ids).await);
        ids.push(id.clone());
        let mut monitor = redis.monitor().unwrap();
        let outcomes = save_all(opened, new).await;
        let (scripts, most) = judged(&mut monitor, &ids);
        assert!(scripts <= 6, "{scripts}");
        assert_eq!(most, 2, "one script judged both");
        let (late, holder) = if late_first { (CROWDED, CROWDED + 1) } else { (CROWDED + 1, CROWDED) };
        applied(&outcomes[holder].1, "the holder's save");
        assert_eq!(outcomes[late].1.as_ref().unwrap_err().kind(), ErrorKind::Fenced, "late first: {late_first}");
        assert_eq!(look(&other, &id).await, Some(format!("new {holder}")));
        nothing_left_behind(&redis);
    }
}

#[tokio::test]
async fn merges_of_one_session_in_one_flight_are_judged_one_after_the_other() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let id = session(&handler, "old").await;
    let mut opened = Vec::new();
    for _ in 0..MANY {
        opened.push(open(&handler, &id, OpenRequest::optimistic()).await);
    }
    let outcomes = save_all(opened, new).await;
    let winners: Vec<_> = (0..MANY).filter(|n| outcomes[*n].1.is_ok()).collect();
    let [winner] = winners[..] else { panic!("one is applied, and not {winners:?}") };
    assert_eq!(look(&handler, &id).await, Some(format!("new {winner}")));
    for (n, (_, outcome)) in outcomes.into_iter().enumerate().filter(|(n, _)| *n != winner) {
        assert_eq!(kind(outcome), ErrorKind::Conflict, "{n}");
    }
}

#[tokio::test]
async fn opens_in_one_flight_are_answered_each_for_itself() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let mut ids = sessions(&handler, MANY).await;
    let absent = CROWDED;
    ids[absent] = new_id();
    let foreign = CROWDED + 1;
    redis.command(&["DEL", &keys(&ids[foreign])[0]]).unwrap();
    redis.command(&["RPUSH", &keys(&ids[foreign])[0], "somebody else's"]).unwrap();
    let unlockable = CROWDED + 2;
    redis.command(&["RPUSH", &keys(&ids[unlockable])[1], "somebody else's"]).unwrap();
    let short = CROWDED + 3;
    redis.command(&["PEXPIRE", &keys(&ids[short])[0], "20000"]).unwrap();
    let held = CROWDED + 4;
    let holder = open(&other, &ids[held], exclusive()).await;
    let repeats = CROWDED + 5..CROWDED + 8;
    for n in repeats.clone() {
        ids[n] = ids[repeats.start].clone();
    }
    let viewed = CROWDED + 8;
    let locked = CROWDED + 9;
    let unqueued = CROWDED + 10;
    redis.command(&["SET", &keys(&ids[unqueued])[2], "no list"]).unwrap();

    let lock = handler.lock();
    let tasks: Vec<JoinHandle<Result<Option<String>>>> = (0..MANY)
        .map(|n| {
            let (handler, lock, id) = (handler.clone(), lock.clone(), ids[n].clone());
            tokio::spawn(async move {
                if n == locked {
                    let lease = lock.acquire(&id, &LeaseRequest { wait: SOON, lease: LEASE }).await?;
                    lock.release(&lease).await?;
                    return Ok(None);
                }
                let request = if n == viewed { OpenRequest::read_only() } else { exclusive() };
                let mut opened = handler.open(&id, &request).await?;
                let record = opened.read().await?.map(|record| String::from_utf8(record.data).unwrap());
                opened.close().await?;
                Ok(record)
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    saved(holder, "theirs").await;
    for (n, task) in tasks.into_iter().enumerate() {
        let outcome = task.await.unwrap();
        if n == foreign || n == unlockable || n == unqueued {
            assert_eq!(kind(outcome), ErrorKind::Corrupt, "{n}");
        } else {
            let expected = match n {
                n if n == absent || n == locked => None,
                n if n == held => Some("theirs"),
                _ => Some("old"),
            };
            assert_eq!(outcome.unwrap().as_deref(), expected, "{n}");
        }
        if n != unlockable {
            until("nobody has the lock", async || !exists(&redis, &keys(&ids[n])[1])).await;
        }
    }
    let left: i64 = redis.command(&["PTTL", &keys(&ids[short])[0]]).unwrap().parse().unwrap();
    assert!(left > 100_000, "the hold keeps it alive: {left}");
}

#[tokio::test]
async fn views_in_one_flight_are_answered_each_for_itself() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let mut ids = sessions(&handler, MANY).await;
    let absent = CROWDED;
    ids[absent] = new_id();
    let foreign = [CROWDED + 1, CROWDED + 2];
    redis.command(&["DEL", &keys(&ids[foreign[0]])[0]]).unwrap();
    redis.command(&["RPUSH", &keys(&ids[foreign[0]])[0], "somebody else's"]).unwrap();
    redis.command(&["SET", &keys(&ids[foreign[1]])[0], "somebody else's text"]).unwrap();
    let destroyed = CROWDED + 3;
    open(&handler, &ids[destroyed], OpenRequest::destroy()).await.destroy().await.unwrap();
    let before = calls(&redis, "get");
    let tasks: Vec<JoinHandle<Result<Option<String>>>> = ids
        .iter()
        .map(|id| {
            let (handler, id) = (handler.clone(), id.clone());
            tokio::spawn(async move {
                let record = handler.open(&id, &OpenRequest::read_only()).await?.read().await?;
                Ok(record.map(|record| String::from_utf8(record.data).unwrap()))
            })
        })
        .collect();
    for (n, task) in tasks.into_iter().enumerate() {
        let outcome = task.await.unwrap();
        match n {
            n if foreign.contains(&n) => assert_eq!(kind(outcome), ErrorKind::Corrupt, "{n}"),
            n if n == absent || n == destroyed => assert_eq!(outcome.unwrap(), None, "{n}"),
            n => assert_eq!(outcome.unwrap().as_deref(), Some("old"), "{n}"),
        }
    }
    let (together, alone) = (calls(&redis, "mget"), calls(&redis, "get") - before);
    assert!(
        (1..=20).contains(&together) && alone <= 12,
        "{MANY} views asked {together} times together and {alone} times alone"
    );
}

#[tokio::test]
async fn an_open_in_a_flight_that_finds_a_free_lock_lets_those_in_who_wait_for_it() {
    let redis = start(&[]);
    let (handler, other, third) = (on(&redis).await, on(&redis).await, on(&redis).await);
    let ids = sessions(&handler, MANY).await;
    let awaited = CROWDED;
    let _holder = open(&other, &ids[awaited], exclusive()).await;
    let waiter = tokio::spawn({
        let id = ids[awaited].clone();
        async move { saved(open(&third, &id, exclusive()).await, "theirs").await }
    });
    until("a place in the queue", async || exists(&redis, &keys(&ids[awaited])[2])).await;
    // As if the lease had ended, which the waiter does not know.
    redis.command(&["DEL", &keys(&ids[awaited])[1]]).unwrap();
    let before = calls(&redis, "mget");
    let tasks: Vec<JoinHandle<_>> = ids
        .iter()
        .map(|id| {
            let (handler, id) = (handler.clone(), id.clone());
            tokio::spawn(async move {
                let mut opened = open(&handler, &id, exclusive()).await;
                let found = read(&mut opened).await;
                opened.close().await.unwrap();
                found
            })
        })
        .collect();
    for (n, task) in tasks.into_iter().enumerate() {
        let expected = if n == awaited { "theirs" } else { "old" };
        assert_eq!(task.await.unwrap().as_deref(), Some(expected), "{n}");
    }
    waiter.await.unwrap();
    assert!(calls(&redis, "mget") > before, "they travelled together");
}

/// What was sent and not answered may be in force, and what was never sent is not.
#[tokio::test]
async fn a_flight_whose_answer_is_lost_counts_once_for_each_in_it() {
    // So many that more than a few stand behind those that were sent.
    const CROWD: usize = 115;
    let redis = start(&[]);
    let proxy = proxy(&redis).await;
    let (handler, other) = (hasty(&proxy).await, on(&redis).await);
    let ids = sessions(&other, CROWD).await;
    let opened = open_all(&handler, &ids).await;
    let writes: Vec<_> = (0..CROWD).map(|_| wid()).collect();
    let change = |n: usize| (write_of(format!("new {n}")), writes[n]);
    proxy.swallow(Direction::ToClient);
    let outcomes = save_all(opened, change).await;
    proxy.heal();
    let (mut unknown, mut unsent) = (0, 0);
    for (n, (mut opened, outcome)) in outcomes.into_iter().enumerate() {
        let seen = look(&other, &ids[n]).await;
        let refusal = outcome.expect_err("no answer came");
        let expected = match refusal.kind() {
            ErrorKind::Unknown => {
                unknown += 1;
                assert_eq!(seen, Some(format!("new {n}")));
                Written::AlreadyApplied
            }
            ErrorKind::Unavailable => {
                // Whoever stood behind a flight that met with silence has waited as long as it has, and need not wait as long again.
                unsent += u32::from(refusal.to_string().contains("many wait"));
                assert_eq!(seen.as_deref(), Some("old"), "what was not sent is not in force");
                Written::Applied
            }
            kind => panic!("{n}: {kind:?}"),
        };
        let mut settled = opened.save(&change(n).0, writes[n]).await;
        while settled.as_ref().is_err_and(|error| error.kind().keeps_opening()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
            settled = opened.save(&change(n).0, writes[n]).await;
        }
        assert!(matches!(&settled, Ok(written) if *written == expected), "{n}: {settled:?} and not {expected:?}");
        assert_eq!(look(&other, &ids[n]).await, Some(format!("new {n}")));
    }
    assert!(unknown >= 4 && unsent >= 8, "{unknown} unknown, {unsent} not sent");
    nothing_left_behind(&redis);
}

#[tokio::test]
async fn a_flight_that_is_cut_anywhere_is_repeated_and_counts_once_for_each_in_it() {
    let redis = start(&[]);
    let proxy = proxy(&redis).await;
    let (handler, other) = (through(&proxy).await, on(&redis).await);
    for direction in [Direction::ToServer, Direction::ToClient] {
        let last = if direction == Direction::ToServer { 16_000 } else { 270 };
        for cut in (0..=12).map(|step| step * last / 12) {
            let ids = sessions(&other, MANY).await;
            let opened = open_all(&handler, &ids).await;
            proxy.cut(direction, cut, CountFrom::Now);
            let outcomes = save_all(opened, new).await;
            proxy.heal();
            for (n, (_, outcome)) in outcomes.iter().enumerate() {
                applied(outcome, &format!("{n}, cut {direction:?} after {cut}"));
                assert_eq!(look(&other, &ids[n]).await, Some(format!("new {n}")));
                assert!(!exists(&redis, &keys(&ids[n])[1]), "{n}, cut {direction:?} after {cut}");
            }
        }
    }
    nothing_left_behind(&redis);
}

#[tokio::test]
async fn opens_that_are_dropped_together_leave_no_lock() {
    let redis = start(&[]);
    let (handler, other) = (on(&redis).await, on(&redis).await);
    let ids = sessions(&other, MANY).await;
    for turns in 0..20 {
        let mut tasks = JoinSet::new();
        for id in &ids {
            let (handler, id) = (handler.clone(), id.clone());
            tasks.spawn(async move { handler.open(&id, &exclusive()).await.map(drop) });
        }
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        tasks.abort_all();
        while tasks.join_next().await.is_some() {}
        for id in &ids {
            open(&other, id, exclusive()).await.close().await.unwrap();
        }
        until("no lock comes back", async || ids.iter().all(|id| !exists(&redis, &keys(id)[1]))).await;
    }
}

#[tokio::test]
async fn scripts_that_were_flushed_are_not_missed_by_those_who_travel_together() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let ids = sessions(&handler, MANY).await;
    let opened = open_all(&handler, &ids).await;
    redis.command(&["SCRIPT", "FLUSH"]).unwrap();
    for (n, (_, outcome)) in save_all(opened, new).await.iter().enumerate() {
        applied(outcome, &n.to_string());
        assert_eq!(look(&handler, &ids[n]).await, Some(format!("new {n}")));
    }
    nothing_left_behind(&redis);
}

#[tokio::test]
async fn a_full_server_refuses_all_of_a_flight_and_keeps_what_was_there() {
    let redis = start(&["maxmemory-policy noeviction"]);
    let handler = on(&redis).await;
    let ids = sessions(&handler, MANY).await;
    let opened = open_all(&handler, &ids).await;
    redis.command(&["SET", "filler", &"x".repeat(2 << 20)]).unwrap();
    redis.command(&["CONFIG", "SET", "maxmemory", "1mb"]).unwrap();
    let mut refused = 0;
    for (n, (mut opened, outcome)) in save_all(opened, new).await.into_iter().enumerate() {
        // A save that gives its lock back makes room, in the eyes of the server, for the others of its script.
        match outcome {
            Ok(_) => assert_eq!(look(&handler, &ids[n]).await, Some(format!("new {n}"))),
            Err(error) => {
                refused += 1;
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
                assert!(error.to_string().contains("maxmemory"), "{error}");
                assert_eq!(look(&handler, &ids[n]).await.as_deref(), Some("old"));
                opened.close().await.expect("giving back needs no room");
            }
        }
        assert!(!exists(&redis, &keys(&ids[n])[1]));
    }
    assert!(refused > 0);
    redis.command(&["DEL", "filler"]).unwrap();
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]).unwrap();
    nothing_left_behind(&redis);
    for (_, outcome) in save_all(open_all(&handler, &ids).await, new).await {
        applied(&outcome, "with room");
    }
}

#[tokio::test]
async fn a_master_that_becomes_a_replica_refuses_all_of_a_flight_until_it_is_master_again() {
    let redis = start(&[]);
    let handler = on(&redis).await;
    let ids = sessions(&handler, MANY).await;
    let opened = open_all(&handler, &ids).await;
    redis.command(&["REPLICAOF", "127.0.0.1", "1"]).unwrap();
    let writes: Vec<_> = (0..MANY).map(|_| wid()).collect();
    let change = |n: usize| (write_of(format!("new {n}")), writes[n]);
    let mut again = Vec::new();
    for (opened, outcome) in save_all(opened, change).await {
        let error = outcome.expect_err("it is read only");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        again.push(opened);
    }
    redis.command(&["REPLICAOF", "NO", "ONE"]).unwrap();
    for (n, (_, outcome)) in save_all(again, change).await.iter().enumerate() {
        applied(outcome, &n.to_string());
        assert_eq!(look(&handler, &ids[n]).await, Some(format!("new {n}")));
    }
    nothing_left_behind(&redis);
}
