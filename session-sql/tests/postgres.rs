//! Runs the conformance suite over a real PostgreSQL server, which each test process starts for itself.
#![cfg(feature = "postgres")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use conformance_tests::Harness;
use conformance_tests::servers::Postgres;
use session_core::{Dsn, Error, ErrorKind, Expect, OpenRequest, Result, SessionHandler, SessionId, SessionLock};
use session_sql::{SqlConfig, SqlHandler, SqlLock, SqlServer};

/// Ends with this process.
static SERVER: OnceLock<Postgres> = OnceLock::new();

fn server() -> &'static Postgres {
    SERVER.get_or_init(|| Postgres::start(&[]).expect("postgres can be started"))
}

/// One table for each namespace, on the server of the test.
struct Tables(fn(SqlConfig) -> SqlConfig);

impl Tables {
    fn config(&self, namespace: &str) -> Result<SqlConfig> {
        let unavailable = |error: std::io::Error| Error::new(ErrorKind::Unavailable, "harness", error.to_string());
        // The worker processes of a case find the server of their parent by the namespace.
        let place = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("session-sql-postgres-{namespace}"));
        let url = match std::fs::read_to_string(&place) {
            Ok(url) => url,
            Err(_) => {
                let url = server().url();
                std::fs::write(&place, &url).map_err(unavailable)?;
                url
            }
        };
        let config = SqlConfig::from_dsn(&Dsn::parse(&url)?)?;
        // Where all cores are busy with tests, connections and answers take their time.
        let config = config.with_connect_timeout(Duration::from_secs(20)).with_timeout(Duration::from_secs(20));
        Ok((self.0)(config.with_create(true).with_table(namespace)))
    }
}

impl Harness for Tables {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(SqlHandler::connect(self.config(namespace)?).await?))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        Ok(Arc::new(SqlLock::connect(self.config(namespace)?).await?))
    }

    fn server(&self) -> Option<String> {
        Some(server().address().to_string())
    }

    async fn handler_at(&self, namespace: &str, server: SocketAddr) -> Result<Arc<dyn SessionHandler>> {
        let mut config = self.config(namespace)?;
        if let SqlServer::Postgres(address) = &mut config.server {
            (address.host, address.port) = (server.ip().to_string(), server.port());
        }
        let handler = SqlHandler::connect(config).await?;
        // What shows that we live is made once, in the background, and counts as a part of nothing. A lock says when it is there.
        let (id, shown) = (SessionId::generate()?, format!("SELECT lock_process IS NOT NULL FROM {namespace}"));
        loop {
            let request = OpenRequest::exclusive(Duration::ZERO, Duration::from_secs(60)).expecting(Expect::Any);
            let mut opened = handler.open(&id, &request).await?;
            let rows = self::server().query(&shown).expect("the server answers");
            opened.close().await?;
            if rows == [["t"]] {
                return Ok(Arc::new(handler));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(100)
    }
}

fn plain() -> Tables {
    Tables(|config| config)
}

conformance_tests::handler_suite!(plain());
conformance_tests::lock_suite!(plain());
conformance_tests::fence_suite!(plain());
conformance_tests::expiry_suite!(plain());
conformance_tests::optimistic_suite!(plain());
conformance_tests::race_suite!(plain());
conformance_tests::cancel_suite!(plain());
conformance_tests::hostile_suite!(plain());
conformance_tests::admin_suite!(plain());
conformance_tests::sessions_suite!(plain());
conformance_tests::trips_suite!(plain());
conformance_tests::processes_suite!(plain());
