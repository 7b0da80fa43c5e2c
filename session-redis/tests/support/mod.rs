//! What the tests of Redis share: servers, handlers on them, and the way there; and the [steps](conformance_tests::by_hand) of all.
//!
//! Nothing here decides what is right; a test does.

#![allow(dead_code, reason = "each test executable takes what it needs")]

use std::sync::OnceLock;
use std::time::Duration;

#[allow(unused_imports, reason = "each test executable takes what it needs")]
pub(crate) use conformance_tests::by_hand::*;
use conformance_tests::proxy::Proxy;
use conformance_tests::servers::Redis;
use session_core::{Dsn, Result, SessionId};
use session_redis::{RedisConfig, RedisHandler};

/// The server of the tests that do it no harm; it ends with this process.
pub(crate) fn server() -> &'static Redis {
    static SERVER: OnceLock<Redis> = OnceLock::new();
    SERVER.get_or_init(|| start(&[]))
}

/// A server of a test's own.
pub(crate) fn start(options: &[&str]) -> Redis {
    Redis::start(options).expect("redis-server starts; Debian has it in the package redis-server")
}

/// Connects as a DSN says.
pub(crate) async fn connect(dsn: &str) -> Result<RedisHandler> {
    let dsn = Dsn::parse(dsn).expect("a test writes it well");
    RedisHandler::connect(RedisConfig::from_dsn(&dsn)?).await
}

/// What a busy machine needs to connect and to answer; no test waits for it to pass.
const PATIENT: &str = "connect_timeout=20s&timeout=20s";

/// A handler on a server.
pub(crate) async fn on(redis: &Redis) -> RedisHandler {
    connect(&format!("{}?{PATIENT}", redis.url())).await.expect("the server answers")
}

/// A proxy before a server.
pub(crate) async fn proxy(redis: &Redis) -> Proxy {
    Proxy::start(redis.address().to_string()).await.expect("a port is free")
}

/// A handler behind a proxy.
pub(crate) async fn through(proxy: &Proxy) -> RedisHandler {
    connect(&format!("redis://{}/0?{PATIENT}", proxy.address())).await.expect("the proxy lets everything pass")
}

/// How long a handler waits for an answer that a test keeps back.
pub(crate) const SHORT: Duration = Duration::from_millis(400);

/// A handler behind a proxy that waits no longer than [`SHORT`].
pub(crate) async fn hasty(proxy: &Proxy) -> RedisHandler {
    let dsn = format!("redis://{}/0?connect_timeout=20s&timeout={}ms", proxy.address(), SHORT.as_millis());
    connect(&dsn).await.expect("the proxy lets everything pass")
}

/// The keys of the record, the lock and the queue of a session.
pub(crate) fn keys(id: &SessionId) -> [String; 3] {
    let record = format!("session:{{{}}}", id.as_str());
    [record.clone(), format!("{record}:lock"), format!("{record}:queue")]
}
