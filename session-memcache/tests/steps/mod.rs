//! The steps that the tests of faults share: connecting, opening, saving, looking.
//!
//! Nothing here decides what is right; a test does.

#![allow(dead_code, reason = "each test executable takes what it needs")]

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

/// One server of each version: one that counts changes itself, and one whose clients choose their numbers.
pub(crate) fn both(options: &[&str]) -> [Memcached; 2] {
    let older = Memcached::start(options).expect("memcached starts; Debian has it in the package memcached");
    [older, Memcached::start_newer(options).expect("a newer memcached starts")]
}

/// Whether clients of this server choose the numbers of changes.
pub(crate) fn takes_numbers(memcached: &Memcached) -> bool {
    memcached.command("ms number 1 E77\r\n1").is_ok() && memcached.get("number").unwrap().unwrap().cas == 77
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

/// Saves, and asks again under the same name as long as no answer comes.
pub(crate) async fn save_in_the_end(opened: &mut Opened, data: &str) -> Result<Written> {
    let write = wid();
    let end = tokio::time::Instant::now() + SOON;
    loop {
        match opened.save(&write_of(data), write).await {
            Err(error) if error.kind() == ErrorKind::Unavailable && tokio::time::Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            outcome => return outcome,
        }
    }
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

/// The key of a record.
pub(crate) fn record_key(id: &SessionId) -> String {
    format!("session:{}", id.as_str())
}

/// The key of a lock.
pub(crate) fn lock_key(id: &SessionId) -> String {
    format!("session:lock.{}", id.as_str())
}

/// Waits for what happens without us.
pub(crate) async fn until(what: &str, mut happened: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + SOON;
    while !happened().await {
        assert!(tokio::time::Instant::now() < end, "{what}: it did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
