//! How many trips to the store a whole request makes, counted at a proxy in front of real servers.

use std::sync::Arc;

use axum::routing::post;
use conformance_tests::proxy::Proxy;
use conformance_tests::servers::{Postgres, Redis};
use reqwest::Client;
use session_core::{Dsn, HashIds, SessionHandler, Sessions};
use session_redis::{RedisConfig, RedisHandler};
use session_sql::{SqlConfig, SqlHandler, SqlServer};
use session_web::{Mode, Result, Session, SessionLayer};

use super::support::*;

/// The fewest flights of a request, of several: what a handler does in the background, such as to make the connection that
/// wakes its waiters or to prepare a statement on each of its connections, can only add to it.
async fn fewest(proxy: &Proxy, mut request: impl AsyncFnMut()) -> u64 {
    let mut fewest = u64::MAX;
    for _ in 0..20 {
        let before = proxy.round_trips();
        request().await;
        fewest = fewest.min(proxy.round_trips() - before);
    }
    fewest
}

async fn count_trips(store: &str, proxy: &Proxy, handler: Arc<dyn SessionHandler>) {
    let sessions = Sessions::new(Arc::new(HashIds::new(handler))).unwrap();
    let slow = async |session: Session| -> Result<String> {
        let n: u32 = session.get("n").await?.unwrap_or(0);
        session.insert("n", &(n + 1)).await?;
        let view = session.release().await?;
        let seen = view.get("n").await?.unwrap_or(0_u32);
        Ok(seen.to_string())
    };
    let again = async |session: Session| -> Result<()> {
        session.update_key("n", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
        let session = session.release().await?.reopen().await?;
        session.update_key("n", |n: Option<u32>| n.unwrap_or(0) + 1).await
    };
    let merge = async |session: Session| -> Result<()> {
        session.with(Mode::merge()).update_key("n", |n: Option<u32>| n.unwrap_or(0) + 1).await
    };
    let router = pages().route("/slow", post(slow)).route("/again", post(again)).route("/merge", post(merge));
    let url = serve(router.layer(SessionLayer::new(sessions))).await;
    let visitor = browser();
    // Whatever only a first use needs.
    for path in ["count", "again", "count"] {
        post_ok(&visitor, format!("{url}/{path}")).await;
    }
    let get =
        async |client: &Client, path: &str| fewest(proxy, async || drop(text(client, format!("{url}/{path}")).await)).await;
    let post = async |client: &Client, path: &str| {
        fewest(proxy, async || drop(post_ok(client, format!("{url}/{path}")).await)).await
    };
    let counted = [
        ("untouched", get(&visitor, "untouched").await, 0),
        ("asked for, not used", get(&visitor, "asked").await, 0),
        ("a view", get(&visitor, "view").await, 1),
        ("read under the lock", get(&visitor, "read").await, 2),
        ("a change", post(&visitor, "count").await, 2),
        ("a change, released early, and read on", post(&visitor, "slow").await, 2),
        ("a change, released, reopened and changed", post(&visitor, "again").await, 4),
        ("a merge in whose way nobody is", post(&visitor, "merge").await, 2),
        (
            "a new visitor's first write",
            fewest(proxy, async || drop(post_ok(&browser(), format!("{url}/count")).await)).await,
            1,
        ),
        ("a new visitor who only looks", get(&bare(), "view").await, 0),
        ("a new visitor who reads under the lock", get(&bare(), "read").await, 0),
    ];
    for (what, trips, _) in counted {
        println!("{store}: {what}: {trips}");
    }
    for (what, trips, expected) in counted {
        assert_eq!(trips, expected, "{store}: {what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_on_redis_makes_as_many_trips_as_it_is_said_to() {
    let redis = Redis::start(&[]).expect("redis-server starts; Debian has it in the package redis-server");
    let proxy = Proxy::start(redis.address().to_string()).await.unwrap();
    let dsn = Dsn::parse(&format!("redis://{}/0", proxy.address())).unwrap();
    let handler = RedisHandler::connect(RedisConfig::from_dsn(&dsn).unwrap()).await.unwrap();
    count_trips("Redis", &proxy, Arc::new(handler)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_on_postgresql_makes_as_many_trips_as_it_is_said_to() {
    let server = Postgres::start(&[]).expect("postgres starts; Debian has it in the package postgresql");
    let proxy = Proxy::start(server.address().to_string()).await.unwrap();
    let mut config = SqlConfig::from_dsn(&Dsn::parse(&server.url()).unwrap()).unwrap().with_create(true);
    if let SqlServer::Postgres(address) = &mut config.server {
        (address.host, address.port) = (proxy.address().ip().to_string(), proxy.address().port());
    }
    let handler = SqlHandler::connect(config).await.unwrap();
    count_trips("PostgreSQL", &proxy, Arc::new(handler)).await;
}
