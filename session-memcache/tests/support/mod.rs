//! What the tests of memcached share: servers, handlers on them, and the way there; and the [steps](conformance_tests::by_hand) of all.
//!
//! Nothing here decides what is right; a test does.

#![allow(dead_code, reason = "each test executable takes what it needs")]

use std::sync::OnceLock;
use std::time::Duration;

#[allow(unused_imports, reason = "each test executable takes what it needs")]
pub(crate) use conformance_tests::by_hand::*;
use conformance_tests::proxy::Proxy;
use conformance_tests::servers::Memcached;
use session_core::{Dsn, Result, SessionId};
use session_memcache::{MemcacheConfig, MemcacheHandler};

/// The server of the tests that do it no harm; it ends with this process.
pub(crate) fn server() -> &'static Memcached {
    static SERVER: OnceLock<Memcached> = OnceLock::new();
    SERVER.get_or_init(|| start(&[]))
}

/// A server of a test's own.
pub(crate) fn start(options: &[&str]) -> Memcached {
    Memcached::start(options).expect("memcached starts; Debian has it in the package memcached")
}

/// A server of a test's own that lets its clients choose numbers.
pub(crate) fn start_newer(options: &[&str]) -> Memcached {
    Memcached::start_newer(options).expect("a newer memcached starts")
}

/// Connects as a DSN says.
pub(crate) async fn connect(dsn: &str) -> Result<MemcacheHandler> {
    let dsn = Dsn::parse(dsn).expect("a test writes it well");
    MemcacheHandler::connect(MemcacheConfig::from_dsn(&dsn)?).await
}

/// What a busy machine needs to connect and to answer; no test waits for it to pass.
pub(crate) const PATIENT: &str = "connect_timeout=20s&timeout=20s";

/// A handler on a server.
pub(crate) async fn on(memcached: &Memcached) -> MemcacheHandler {
    connect(&format!("{}?{PATIENT}", memcached.url())).await.expect("the server answers")
}

/// A proxy before a server.
pub(crate) async fn proxy(memcached: &Memcached) -> Proxy {
    Proxy::start(memcached.address().to_string()).await.expect("a port is free")
}

/// A handler behind a proxy.
pub(crate) async fn through(proxy: &Proxy) -> MemcacheHandler {
    connect(&format!("memcache://{}?{PATIENT}", proxy.address())).await.expect("the proxy lets everything pass")
}

/// How long a handler waits for an answer that a test keeps back.
pub(crate) const SHORT: Duration = Duration::from_millis(400);

/// A handler behind a proxy that waits no longer than [`SHORT`].
pub(crate) async fn hasty(proxy: &Proxy) -> MemcacheHandler {
    let dsn = format!("memcache://{}?connect_timeout=20s&timeout={}ms", proxy.address(), SHORT.as_millis());
    connect(&dsn).await.expect("the proxy lets everything pass")
}

/// One server of each version: one that counts changes itself, and one whose clients choose their numbers.
pub(crate) fn both(options: &[&str]) -> [Memcached; 2] {
    [start(options), start_newer(options)]
}

/// Whether clients of this server choose the numbers of changes.
pub(crate) fn takes_numbers(memcached: &Memcached) -> bool {
    memcached.command("ms number 1 E77\r\n1").is_ok() && memcached.get("number").unwrap().unwrap().cas == 77
}

/// The key of a record.
pub(crate) fn record_key(id: &SessionId) -> String {
    format!("session:{}", id.as_str())
}

/// The key of a lock.
pub(crate) fn lock_key(id: &SessionId) -> String {
    format!("session:lock.{}", id.as_str())
}

/// The keys of the record and of the lock of a session.
pub(crate) fn keys(id: &SessionId) -> [String; 2] {
    [record_key(id), lock_key(id)]
}
