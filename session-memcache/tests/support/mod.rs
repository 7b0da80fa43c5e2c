//! The steps that the tests of faults share: connecting, opening, saving, looking.
//!
//! Nothing here decides what is right; a test does.

#![allow(dead_code, reason = "each test executable takes what it needs")]

use std::sync::OnceLock;
use std::time::Duration;

use conformance_tests::proxy::Proxy;
use conformance_tests::servers::Memcached;
use session_core::{
    Change, Dsn, ErrorKind, Expect, OpenRequest, OpenSession, Record, Result, SessionHandler, SessionId, Ttl, WriteId,
    Written,
};
use session_memcache::{MemcacheConfig, MemcacheHandler};

/// An opening.
pub(crate) type Opened = Box<dyn OpenSession>;

/// A lease that no test outlives: whoever gets in before its end was let in.
pub(crate) const LEASE: Duration = Duration::from_secs(60);

/// A wait that ends long before [`LEASE`] does, on a machine that is busy with other things.
pub(crate) const SOON: Duration = Duration::from_secs(10);

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
pub(crate) fn start_newer() -> Memcached {
    Memcached::start_newer(&[]).expect("a newer memcached starts")
}

/// Connects as a DSN says.
pub(crate) async fn connect(dsn: &str) -> Result<MemcacheHandler> {
    let dsn = Dsn::parse(dsn).expect("a test writes it well");
    MemcacheHandler::connect(MemcacheConfig::from_dsn(&dsn)?).await
}

/// What a busy machine needs to connect and to answer; no test waits for it to pass.
const PATIENT: &str = "connect_timeout=20s&timeout=20s";

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

pub(crate) fn new_id() -> SessionId {
    SessionId::generate().expect("the operating system has randomness")
}

pub(crate) fn wid() -> WriteId {
    WriteId::random().expect("the operating system has randomness")
}

pub(crate) fn record(data: impl Into<Vec<u8>>) -> Record {
    Record::new(data, Ttl::from_secs(900))
}

pub(crate) fn write_of(data: impl Into<Vec<u8>>) -> Change {
    Change::Write(record(data))
}

/// Asks for the lock, with a wait that is long enough unless it is kept until the end of its lease.
pub(crate) fn exclusive() -> OpenRequest {
    OpenRequest::exclusive(SOON, LEASE)
}

/// The same with a lease that a test waits for.
pub(crate) fn briefly(lease: Duration) -> OpenRequest {
    OpenRequest::exclusive(SOON, lease)
}

/// Asks for the lock once.
pub(crate) fn at_once() -> OpenRequest {
    OpenRequest::exclusive(Duration::ZERO, LEASE)
}

pub(crate) async fn open(handler: &dyn SessionHandler, id: &SessionId, request: OpenRequest) -> Opened {
    match handler.open(id, &request).await {
        Ok(opened) => opened,
        Err(error) => panic!("open as {request:?} was refused: {error:?}"),
    }
}

/// Creates a session.
pub(crate) async fn session(handler: &dyn SessionHandler, data: &str) -> SessionId {
    let id = new_id();
    let opened = open(handler, &id, exclusive().expecting(Expect::Fresh)).await;
    saved(opened, data).await;
    id
}

pub(crate) async fn saved(mut opened: Opened, data: &str) {
    let outcome = opened.save(&write_of(data), wid()).await;
    assert!(matches!(outcome, Ok(Written::Applied)), "a save that nothing stood against ended as {outcome:?}");
}

pub(crate) async fn read(opened: &mut Opened) -> Option<String> {
    let record = opened.read().await.unwrap_or_else(|error| panic!("a read was refused: {error:?}"));
    record.map(|record| String::from_utf8(record.data).expect("tests write text"))
}

/// Reads without a lock.
pub(crate) async fn look(handler: &dyn SessionHandler, id: &SessionId) -> Option<String> {
    read(&mut open(handler, id, OpenRequest::read_only()).await).await
}

/// Returns the kind of a refusal.
#[track_caller]
pub(crate) fn kind<T>(outcome: Result<T>) -> ErrorKind {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.kind(),
    }
}

/// The keys of the record and of the lock of a session.
pub(crate) fn keys(id: &SessionId) -> [String; 2] {
    [format!("session:{}", id.as_str()), format!("session:lock.{}", id.as_str())]
}

/// Waits for what happens without us.
pub(crate) async fn until(what: &str, mut happened: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + SOON;
    while !happened().await {
        assert!(tokio::time::Instant::now() < end, "{what}: it did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
