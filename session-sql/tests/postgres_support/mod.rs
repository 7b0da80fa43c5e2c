//! What the tests of PostgreSQL share: servers, handlers on them, and the way there; and the [steps](conformance_tests::by_hand) of all.
//!
//! Nothing here decides what is right; a test does.

#![allow(dead_code, reason = "each test executable takes what it needs")]

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

#[allow(unused_imports, reason = "each test executable takes what it needs")]
pub(crate) use conformance_tests::by_hand::*;
use conformance_tests::proxy::Proxy;
use conformance_tests::servers::Postgres;
use session_core::Dsn;
use session_sql::{SqlConfig, SqlHandler, SqlServer};

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

/// The first column of the first row, `NULL` as nothing.
pub(crate) fn value(server: &Postgres, sql: &str) -> String {
    let rows = server.query(sql).expect("the server answers");
    rows.into_iter().flatten().next().unwrap_or_default()
}
