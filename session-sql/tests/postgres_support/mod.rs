//! The steps that the tests of PostgreSQL share: connecting, opening, saving, looking.
//!
//! Nothing here decides what is right; a test does.

#![allow(dead_code, reason = "each test executable takes what it needs")]

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use conformance_tests::proxy::Proxy;
use conformance_tests::servers::Postgres;
use session_core::{
    Change, Dsn, ErrorKind, Expect, OpenRequest, OpenSession, Record, Result, SessionHandler, SessionId, Ttl, WriteId,
    Written,
};
use session_sql::{SqlConfig, SqlHandler, SqlServer};

/// An opening.
pub(crate) type Opened = Box<dyn OpenSession>;

/// A lease that no test outlives: whoever gets in before its end was let in.
pub(crate) const LEASE: Duration = Duration::from_secs(60);

/// A wait that ends long before [`LEASE`] does, on a machine that is busy with other things.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// How long a handler waits for an answer that a test keeps back.
pub(crate) const SHORT: Duration = Duration::from_millis(400);

/// The server of the tests that do it no harm; it ends with this process.
pub(crate) fn server() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| start(&[]))
}

/// A server of a test's own.
pub(crate) fn start(options: &[&str]) -> Postgres {
    Postgres::start(options).expect("postgres starts; Debian has it in the package postgresql")
}

/// What a DSN says, with the patience of a busy machine.
pub(crate) fn config(dsn: &str) -> SqlConfig {
    let config = SqlConfig::from_dsn(&Dsn::parse(dsn).expect("a test writes it well")).expect("a test writes it well");
    config.with_connect_timeout(Duration::from_secs(20)).with_timeout(Duration::from_secs(20)).with_create(true)
}

pub(crate) async fn connect(config: SqlConfig) -> SqlHandler {
    SqlHandler::connect(config).await.expect("the server answers")
}

/// A handler on a server.
pub(crate) async fn on(server: &Postgres) -> SqlHandler {
    connect(config(&server.url())).await
}

/// A proxy before a server.
pub(crate) async fn proxy(server: &Postgres) -> Proxy {
    Proxy::start(server.address().to_string()).await.expect("a port is free")
}

/// The settings of a handler behind a proxy; nobody listens, so that nothing passes but what a test does.
pub(crate) fn behind(server: &Postgres, place: SocketAddr) -> SqlConfig {
    let mut config = config(&server.url()).with_listen(false);
    if let SqlServer::Postgres(address) = &mut config.server {
        (address.host, address.port) = (place.ip().to_string(), place.port());
    }
    config
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

/// The first column of the first row, `NULL` as nothing.
pub(crate) fn value(server: &Postgres, sql: &str) -> String {
    let rows = server.query(sql).expect("the server answers");
    rows.into_iter().flatten().next().unwrap_or_default()
}

/// Waits for what happens without us.
pub(crate) async fn until(what: &str, mut happened: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + SOON;
    while !happened().await {
        assert!(tokio::time::Instant::now() < end, "{what}: it did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
