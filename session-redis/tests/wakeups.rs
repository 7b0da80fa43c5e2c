//! Messages that come too late, twice, or to nobody.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use conformance_tests::servers::Redis;
use session_core::{ErrorKind, Expect, OpenRequest, SessionHandler, SessionId};
use session_redis::{RedisConfig, RedisHandler, RedisServers};

async fn handler(server: &Redis) -> RedisHandler {
    let servers = RedisServers::Tcp { host: "127.0.0.1".into(), port: server.port() };
    RedisHandler::connect(RedisConfig::new(servers)).await.unwrap()
}

fn exclusive(wait: Duration) -> OpenRequest {
    OpenRequest::exclusive(wait, Duration::from_secs(30)).expecting(Expect::Any)
}

/// Found by the suite on slow machines: the waiter had looked by himself and had the lock when the message came that granted it;
/// nobody waited for the message any more, so the lock was passed on below the feet of its holder.
#[tokio::test]
async fn a_message_that_comes_after_the_claim_takes_nothing_from_the_holder() {
    let server = Redis::start(&[]).unwrap();
    let (first, second) = (handler(&server).await, handler(&server).await);
    let id = SessionId::generate().unwrap();
    let mut holder = first.open(&id, &exclusive(Duration::ZERO)).await.unwrap();
    let waiting = second.clone();
    let waiter = tokio::spawn({
        let id = id.clone();
        async move { waiting.open(&id, &exclusive(Duration::from_secs(20))).await }
    });
    let lock = format!("session:{{{}}}:lock", id.as_str());
    let queue = format!("session:{{{}}}:queue", id.as_str());
    while server.command(&["LLEN", &queue]).unwrap() != "1" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    holder.close().await.unwrap();
    let held = waiter.await.unwrap().unwrap();
    let value = server.command(&["GET", &lock]).unwrap();
    let mut parts = value.splitn(4, '|');
    let (token, channel) = (parts.next().unwrap(), parts.nth(2).unwrap());
    // Once more, to a process where nobody waits for it now.
    let heard = server.command(&["PUBLISH", channel, &format!("{token}|session:{{{}}}", id.as_str())]).unwrap();
    assert_eq!(heard, "1", "the process listens to its channel");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let error = first.open(&id, &exclusive(Duration::ZERO)).await.expect_err("it is held");
    assert_eq!(error.kind(), ErrorKind::LockTimeout);
    assert!(error.holder().is_some_and(|holder| holder.process.contains(&std::process::id().to_string())), "{error:?}");
    drop(held);
}

/// A grant to somebody who is not there any more goes to the next at once, and not after the time that he has to come for it.
#[tokio::test]
async fn a_grant_that_nobody_waits_for_is_passed_on() {
    let server = Redis::start(&[]).unwrap();
    let (first, second, third) = (handler(&server).await, handler(&server).await, handler(&server).await);
    let id = SessionId::generate().unwrap();
    // The second handler has waited once, so it listens.
    let mut holder = first.open(&id, &exclusive(Duration::ZERO)).await.unwrap();
    second.open(&id, &exclusive(Duration::from_millis(50))).await.expect_err("it is held");
    let queue = format!("session:{{{}}}:queue", id.as_str());
    while server.command(&["LLEN", &queue]).unwrap() != "0" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // A place for a waiter of the second handler of whom it knows nothing.
    let channels = server.command(&["PUBSUB", "CHANNELS", "session:wake:*"]).unwrap();
    let channel = channels.lines().next().unwrap();
    let deadline = "99999999999999";
    let place = format!("{}|30000|0|{channel}|{deadline}", "ab".repeat(16));
    server.command(&["RPUSH", &queue, &place]).unwrap();
    let waiter = tokio::spawn({
        let (id, third) = (id.clone(), Arc::new(third));
        async move { third.open(&id, &exclusive(Duration::from_secs(20))).await }
    });
    while server.command(&["LLEN", &queue]).unwrap() != "2" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut monitor = server.monitor().unwrap();
    holder.close().await.unwrap();
    waiter.await.unwrap().unwrap();
    // The lock did not have to end by itself: the waiter was told, and asked once.
    let lines = monitor.lines().unwrap();
    let published = lines.iter().filter(|line| line.to_ascii_lowercase().contains("\"publish\"")).count();
    assert_eq!(published, 2, "one message to whoever was gone, one to the next: {lines:#?}");
}
