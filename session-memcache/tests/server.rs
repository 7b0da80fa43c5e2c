//! What servers do to sessions: they restart, forget, refuse, are several, or are newer than others.
//!
//! Whatever becomes of the items, no write is applied to a state that it was not based on.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::HashSet;
use std::time::Duration;

use conformance_tests::proxy::Direction;
use conformance_tests::servers::Memcached;
use session_core::{Change, ErrorKind, Expect, LeaseRequest, OpenRequest, SessionHandler, SessionId, SessionLock, Written};
use session_memcache::MemcacheLock;
use support::*;

/// Asks for a lock on an id that may be absent.
fn any() -> OpenRequest {
    exclusive().expecting(Expect::Any)
}

/// The number of the last change of an item.
fn number(server: &Memcached, key: &str) -> u64 {
    server.get(key).unwrap().expect("the item is there").cas
}

#[tokio::test]
async fn a_holder_from_before_a_restart_does_not_write_over_what_has_the_same_number_after_it() {
    let server = start(&[]);
    let (here, there) = (on(&server).await, on(&server).await);
    let id = new_id();
    saved(open(&here, &id, any()).await, "before").await;
    let mut held = open(&here, &id, any()).await;
    let mut optimistic = open(&here, &id, OpenRequest::optimistic()).await;
    let [record_key, _] = keys(&id);
    let before = number(&server, &record_key);
    server.restart().unwrap();
    // The same id is made again, and written until its item has the very number that the holder knows.
    let mut again = open(&there, &id, any()).await;
    assert_eq!(read(&mut again).await, None);
    loop {
        assert!(matches!(again.write(&record("after"), wid()).await, Ok(Written::Applied)));
        let now = number(&server, &record_key);
        assert!(now <= before, "the numbers of this server do not begin anew");
        if now == before {
            break;
        }
    }
    assert_eq!(kind(held.save(&write_of("stale"), wid()).await), ErrorKind::Gone);
    assert_eq!(kind(optimistic.save(&write_of("stale"), wid()).await), ErrorKind::Conflict);
    assert_eq!(look(&there, &id).await.as_deref(), Some("after"));
    saved(again, "newest").await;
}

#[tokio::test]
async fn a_newer_server_is_told_numbers_that_never_come_again() {
    let server = start_newer(&[]);
    let (here, there) = (on(&server).await, on(&server).await);
    let id = new_id();
    saved(open(&here, &id, any()).await, "before").await;
    let [record_key, lock_key] = keys(&id);
    let mut seen = HashSet::new();
    for n in 0..20 {
        let mut opened = open(&here, &id, exclusive()).await;
        seen.extend([number(&server, &record_key), number(&server, &lock_key)]);
        saved_and_kept(&mut opened, &n.to_string()).await;
        seen.insert(number(&server, &record_key));
        opened.close().await.unwrap();
    }
    assert!(seen.len() >= 59, "numbers came again: {}", seen.len());
    assert!(seen.iter().filter(|number| **number > 1 << 40).count() > 50, "the server counts by itself");
    let mut held = open(&here, &id, exclusive()).await;
    server.restart().unwrap();
    let again = open(&there, &id, any()).await;
    saved(again, "after").await;
    // It does not say that the server was started anew: the number does.
    let refused = kind(held.save(&write_of("stale"), wid()).await);
    assert!(matches!(refused, ErrorKind::Fenced | ErrorKind::Gone), "{refused:?}");
    assert_eq!(look(&there, &id).await.as_deref(), Some("after"));
}

async fn saved_and_kept(opened: &mut Opened, data: &str) {
    assert!(matches!(opened.write(&record(data), wid()).await, Ok(Written::Applied)));
}

#[tokio::test]
async fn what_a_server_forgets_during_a_hold_is_gone_or_fenced() {
    let server = start(&[]);
    let (here, there) = (on(&server).await, on(&server).await);
    for what in ["everything", "the record", "the lock", "both"] {
        let id = session(&here, "old").await;
        let mut held = open(&here, &id, exclusive()).await;
        let [record_key, lock_key] = keys(&id);
        if what == "everything" {
            assert_eq!(server.command("flush_all").unwrap(), "OK");
        }
        for (key, of) in [(&record_key, ["the record", "both"]), (&lock_key, ["the lock", "both"])] {
            if of.contains(&what) {
                assert!(server.connect().unwrap().delete(key).unwrap(), "{key}");
            }
        }
        if what == "the lock" {
            let mut next = open(&there, &id, at_once()).await;
            assert_eq!(read(&mut next).await.as_deref(), Some("old"));
            assert_eq!(kind(held.save(&write_of("stale"), wid()).await), ErrorKind::Fenced, "{what}");
            saved(next, "next").await;
            assert_eq!(look(&there, &id).await.as_deref(), Some("next"), "{what}");
        } else {
            assert_eq!(kind(held.save(&write_of("stale"), wid()).await), ErrorKind::Gone, "{what}");
            assert_eq!(look(&there, &id).await, None, "{what}");
        }
    }
}

#[tokio::test]
async fn a_lock_that_is_forgotten_and_not_taken_still_writes() {
    let server = start(&[]);
    let handler = on(&server).await;
    let id = session(&handler, "old").await;
    let held = open(&handler, &id, exclusive()).await;
    assert!(server.connect().unwrap().delete(&keys(&id)[1]).unwrap());
    saved(held, "new").await;
    assert_eq!(look(&handler, &id).await.as_deref(), Some("new"));
}

#[tokio::test]
async fn what_is_too_large_is_not_sent() {
    let proxy = proxy(server()).await;
    let handler = through(&proxy).await;
    let id = session(&handler, "old").await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let before = proxy.bytes(Direction::ToServer);
    for large in [2 << 20, 1 << 20] {
        assert_eq!(kind(opened.write(&record(vec![b'x'; large]), wid()).await), ErrorKind::TooLarge);
    }
    assert_eq!(proxy.bytes(Direction::ToServer), before, "something was sent");
    assert_eq!(look(&handler, &id).await.as_deref(), Some("old"));
    // What it calls the largest is taken.
    let error = opened.write(&record(vec![b'x'; 2 << 20]), wid()).await.unwrap_err().to_string();
    let most = error.split("at most ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap().parse().unwrap();
    let largest = "x".repeat(most);
    saved(opened, &largest).await;
    let destroyed = open(&handler, &id, OpenRequest::destroy()).await.destroy().await.unwrap();
    assert_eq!(destroyed.map(|record| record.data.len()), Some(most));
    assert_eq!(look(&handler, &id).await, None);
}

#[tokio::test]
async fn a_server_says_how_large_an_item_may_be() {
    let server = start(&["-I 4m", "-m 64"]);
    let handler = on(&server).await;
    let id = session(&handler, "old").await;
    let large = "x".repeat(3 << 20);
    saved(open(&handler, &id, exclusive()).await, &large).await;
    assert_eq!(look(&handler, &id).await.map(|data| data.len()), Some(large.len()));
    let opened = open(&handler, &id, exclusive()).await;
    saved(opened, "small again").await;
    let limited = connect(&format!("{}?max_bytes=10", server.url())).await.unwrap();
    let mut opened = open(&limited, &id, exclusive()).await;
    assert_eq!(kind(opened.write(&record("eleven byte"), wid()).await), ErrorKind::TooLarge);
}

#[tokio::test]
async fn no_id_becomes_a_key_that_the_server_would_read_as_something_else() {
    let server = start(&[]);
    let handler = on(&server).await;
    for bad in ["\r\nflush_all\r\n", " 0 0 1\r\nx", "\t", "\0", "\u{7f}", "é"] {
        let text = format!("{}{bad}", "a".repeat(30));
        assert!(SessionId::parse(&text).is_none(), "{bad:?} is part of an id");
    }
    for length in [238, 239, 251, 256] {
        let id = SessionId::parse(&"b".repeat(length)).unwrap();
        saved(open(&handler, &id, any()).await, &length.to_string()).await;
        let held = open(&handler, &id, any()).await;
        let locks = handler.admin().unwrap().locks(std::num::NonZeroU32::new(9).unwrap()).await.unwrap();
        assert!(locks.iter().any(|lock| lock.id == id), "the lock of an id of {length} bytes is not listed");
        drop(held);
        assert_eq!(look(&handler, &id).await, Some(length.to_string()));
    }
    let keys = server.keys().unwrap();
    assert!(
        keys.iter().all(|key| key.len() <= 250 && !key.contains(&"b".repeat(239))),
        "an id is in a key that is too long"
    );
    let listed = handler.admin().unwrap().list(None, std::num::NonZeroU32::new(9).unwrap()).await.unwrap();
    let lengths: HashSet<_> = listed.sessions.iter().map(|session| session.id.as_str().len()).collect();
    assert_eq!(lengths, HashSet::from([238, 239, 251, 256]));
}

#[tokio::test]
async fn what_is_not_ours_is_left_alone_and_its_lock_is_free() {
    let server = start(&[]);
    let handler = on(&server).await;
    let id = new_id();
    let [record_key, lock_key] = keys(&id);
    let theirs = b"a:1:{s:4:\"cart\";s:30:\"something that PHP has written\";}";
    server.connect().unwrap().set(&record_key, 0, 0, theirs).unwrap();
    for request in [exclusive(), any(), OpenRequest::read_only(), OpenRequest::optimistic()] {
        assert_eq!(kind(handler.open(&id, &request).await), ErrorKind::Corrupt, "{request:?}");
        assert_eq!(server.get(&record_key).unwrap().unwrap().data, theirs, "{request:?}");
        assert_eq!(server.get(&lock_key).unwrap(), None, "{request:?}");
    }
    let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
    assert_eq!(logout.destroy().await.unwrap(), None);
    assert_eq!(look(&handler, &id).await, None, "a logout removes whatever is there");
}

#[tokio::test]
async fn a_destroyed_session_leaves_a_trace_without_its_payload() {
    let server = start(&[]);
    let handler = on(&server).await;
    let (long, short) = (session(&handler, "a payload that goes").await, new_id());
    let brief = session_core::Record::new("a payload that goes", session_core::Ttl::from_secs(8));
    let mut opened = open(&handler, &short, any()).await;
    opened.save(&Change::Write(brief), wid()).await.unwrap();
    for id in [&long, &short] {
        open(&handler, id, OpenRequest::destroy()).await.destroy().await.unwrap();
        assert_eq!(look(&handler, id).await, None);
    }
    for id in [&long, &short] {
        let [record_key, _] = keys(id);
        until("a sweep", async || server.get(&record_key).unwrap().expect("a trace stays").data.len() == 26).await;
        let left = server.command(&format!("mg {record_key} t")).unwrap();
        let left: u64 = left.trim_start_matches("HD t").parse().unwrap();
        assert!((50..=61).contains(&left), "a trace lasts for {left} s");
    }
}

#[tokio::test]
async fn absent_ids_leave_nothing_and_places_are_given_back() {
    let server = start(&[]);
    let handler = on(&server).await;
    for request in [exclusive(), any(), at_once(), at_once().expecting(Expect::Any), OpenRequest::optimistic()] {
        let mut opened = open(&handler, &new_id(), request).await;
        assert_eq!(read(&mut opened).await, None);
        opened.close().await.unwrap();
        open(&handler, &new_id(), OpenRequest::destroy()).await.destroy().await.unwrap();
        assert_eq!(server.keys().unwrap(), Vec::<String>::new(), "{request:?}");
    }
}

#[tokio::test]
async fn a_password_is_asked_for_and_told() {
    let server = Memcached::start_with_password(&[]).unwrap();
    let handler = connect(&server.url()).await.expect("it is the right one");
    let id = session(&handler, "let in").await;
    assert_eq!(look(&handler, &id).await.as_deref(), Some("let in"));
    let address = server.address();
    let none = connect(&format!("memcache://{address}")).await.unwrap_err();
    let wrong = connect(&format!("memcache://me:hunter2@{address}")).await.unwrap_err();
    for (error, part) in [(none, "asks for a user"), (wrong, "refuses this user")] {
        assert_eq!(error.kind(), ErrorKind::Config);
        let text = format!("{error:?}");
        assert!(text.contains(part) && text.contains(&address.to_string()) && !text.contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn sessions_of_a_server_that_is_down_fail_and_the_others_do_not() {
    let servers = [start(&[]), start(&[])];
    let dsn = format!("memcache://{},{}?timeout=5s&connect_timeout=5s", servers[0].address(), servers[1].address());
    let handler = connect(&dsn).await.unwrap();
    let mut homes: [Vec<SessionId>; 2] = [Vec::new(), Vec::new()];
    for n in 0..60 {
        let id = session(&handler, &n.to_string()).await;
        let at = servers.iter().position(|server| server.get(&keys(&id)[0]).unwrap().is_some()).expect("it is somewhere");
        homes[at].push(id);
    }
    assert!(homes.iter().all(|home| home.len() > 10), "they are not spread");
    servers[0].kill().unwrap();
    for id in &homes[0] {
        let error = handler.open(id, &exclusive()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains(&servers[0].address().to_string()), "{error}");
    }
    for id in &homes[1] {
        saved(open(&handler, id, exclusive()).await, "still there").await;
    }
    // One that starts while a server is down serves the others, too.
    let late = connect(&dsn).await.unwrap();
    assert_eq!(look(&late, &homes[1][0]).await.as_deref(), Some("still there"));
    let id = &homes[0][0];
    let failover = connect(&format!("{dsn}&failover=on")).await.unwrap();
    assert_eq!(look(&failover, id).await, None, "on the next server it is absent");
    saved(open(&failover, id, any()).await, "elsewhere").await;
    assert!(servers[1].get(&keys(id)[0]).unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_goes_to_the_process_that_is_next_in_line() {
    let server = start(&[]);
    let (here, there) = (on(&server).await, on(&server).await);
    let id = session(&here, "0").await;
    // One process hands on to itself as fast as it can; another waits in line.
    let busy = tokio::spawn({
        let (here, id) = (here.clone(), id.clone());
        async move {
            let mut turns = 0;
            while let Ok(mut opened) = here.open(&id, &exclusive()).await {
                turns += 1;
                let seen = read(&mut opened).await.unwrap();
                if seen == "end" {
                    return turns;
                }
                saved(opened, &seen).await;
            }
            turns
        }
    });
    for _ in 0..20 {
        let mut opened = open(&there, &id, exclusive()).await;
        let seen: u32 = read(&mut opened).await.unwrap().parse().unwrap();
        saved(opened, &(seen + 1).to_string()).await;
    }
    let mut opened = open(&there, &id, exclusive()).await;
    assert_eq!(read(&mut opened).await.as_deref(), Some("20"), "an update was lost");
    saved(opened, "end").await;
    let turns = busy.await.unwrap();
    assert!(turns < 2000, "it took {turns} turns of the other before 21 of this one came");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_who_list_at_once_get_their_list() {
    let memcached = start(&[]);
    let handler = on(&memcached).await;
    for _ in 0..200 {
        session(&handler, "there").await;
    }
    let mut listing = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let handler = handler.clone();
        listing.spawn(async move { handler.admin().unwrap().list(None, std::num::NonZeroU32::new(1000).unwrap()).await });
    }
    while let Some(listed) = listing.join_next().await {
        assert_eq!(listed.unwrap().unwrap().sessions.len(), 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_waiters_of_a_process_ask_like_one() {
    let server = start(&[]);
    let handler = on(&server).await;
    let id = session(&handler, "old").await;
    let holder = open(&handler, &id, exclusive()).await;
    let mut waiters = Vec::new();
    for _ in 0..100 {
        let (handler, id) = (handler.clone(), id.clone());
        waiters.push(tokio::spawn(async move { saved(open(&handler, &id, exclusive()).await, "new").await }));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let asked = || server.stats("").unwrap()["cmd_set"].parse::<u64>().unwrap();
    let before = asked();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let each_second = asked() - before;
    assert!((20..1500).contains(&each_second), "they send {each_second} questions a second");
    saved(holder, "new").await;
    for waiter in waiters {
        waiter.await.unwrap();
    }
}

#[tokio::test]
async fn a_lease_is_renewed_for_as_long_as_it_is_held() {
    let server = start(&[]);
    let config = |server: &Memcached| {
        let address = server.address();
        session_memcache::MemcacheConfig::new([session_memcache::MemcacheServer::new(
            address.ip().to_string(),
            address.port(),
        )])
    };
    let lock = MemcacheLock::connect(config(&server)).await.unwrap();
    let id = new_id();
    let request = LeaseRequest { wait: Duration::ZERO, lease: Duration::from_secs(1) };
    let lease = lock.acquire(&id, &request).await.unwrap();
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(lock.renew(std::slice::from_ref(&lease)).await.iter().all(Result::is_ok));
        assert_eq!(kind(lock.acquire(&id, &request).await), ErrorKind::LockTimeout);
    }
    lock.release(&lease).await.unwrap();
    assert!(lock.acquire(&id, &request).await.is_ok());
}
