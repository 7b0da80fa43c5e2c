//! Runs the conformance suite over a real MariaDB server, which each test process starts for itself.
#![cfg(feature = "mysql")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use conformance_tests::Harness;
use conformance_tests::servers::MariaDb;
use session_core::{Dsn, Error, ErrorKind, Result, SessionHandler, SessionLock};
use session_sql::{SqlConfig, SqlHandler, SqlLock, SqlServer};
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions};

/// Ends with this process.
static SERVER: OnceLock<MariaDb> = OnceLock::new();

/// One table for each namespace, on the server of the test.
#[derive(Clone, Copy)]
enum Tables {
    Plain,
    Strict,
    /// Over connections of the application.
    Pooled,
}

impl Tables {
    fn config(&self, namespace: &str) -> Result<SqlConfig> {
        let unavailable = |error: std::io::Error| Error::new(ErrorKind::Unavailable, "harness", error.to_string());
        // The worker processes of a case find the server of their parent by the namespace.
        let place = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("session-mysql-{namespace}"));
        let url = match std::fs::read_to_string(&place) {
            Ok(url) => url,
            Err(_) => {
                let server = match SERVER.get() {
                    Some(server) => server,
                    None => {
                        let server = MariaDb::start(&[]).map_err(unavailable)?;
                        SERVER.get_or_init(|| server)
                    }
                };
                std::fs::write(&place, server.url()).map_err(unavailable)?;
                server.url()
            }
        };
        let config = SqlConfig::from_dsn(&Dsn::parse(&url)?)?.with_table(namespace).with_create(true);
        // A busy machine takes its time; no case waits for these to pass.
        let config = config.with_timeout(Duration::from_secs(20)).with_connect_timeout(Duration::from_secs(20));
        Ok(config.with_strict_expiry(matches!(self, Self::Strict)))
    }

    async fn connect(&self, namespace: &str) -> Result<SqlHandler> {
        let config = self.config(namespace)?;
        let (Self::Pooled, SqlServer::MySql(address)) = (self, &config.server) else {
            return SqlHandler::connect(config).await;
        };
        let options = MySqlConnectOptions::new().host(&address.host).port(address.port).database(&address.database);
        let options = options.username(address.user.as_deref().unwrap_or_default());
        let options = options.password(address.password.as_deref().unwrap_or_default());
        SqlHandler::from_mysql_pool(MySqlPoolOptions::new().max_connections(3).connect_lazy_with(options), config).await
    }
}

impl Harness for Tables {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(self.connect(namespace).await?))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        match self {
            Self::Pooled => Ok(Arc::new(self.connect(namespace).await?.lock())),
            Self::Plain | Self::Strict => Ok(Arc::new(SqlLock::connect(self.config(namespace)?).await?)),
        }
    }

    fn strict_expiry(&self) -> bool {
        matches!(self, Self::Strict)
    }

    fn server(&self) -> Option<String> {
        let start = || MariaDb::start(&[]).expect("mariadbd can be started; Debian has it in mariadb-server-core");
        SERVER.get_or_init(start).address().to_string().into()
    }

    async fn handler_at(&self, namespace: &str, server: SocketAddr) -> Result<Arc<dyn SessionHandler>> {
        let mut config = self.config(namespace)?;
        if let SqlServer::MySql(address) = &mut config.server {
            (address.host, address.port) = (server.ip().to_string(), server.port());
        }
        Ok(Arc::new(SqlHandler::connect(config).await?))
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(100)
    }
}

conformance_tests::handler_suite!(Tables::Plain);
conformance_tests::lock_suite!(Tables::Plain);
conformance_tests::fence_suite!(Tables::Plain);
conformance_tests::expiry_suite!(Tables::Plain);
conformance_tests::optimistic_suite!(Tables::Plain);
conformance_tests::race_suite!(Tables::Plain);
conformance_tests::cancel_suite!(Tables::Plain);
conformance_tests::hostile_suite!(Tables::Plain);
conformance_tests::admin_suite!(Tables::Plain);
conformance_tests::sessions_suite!(Tables::Plain);
conformance_tests::trips_suite!(Tables::Plain);
conformance_tests::processes_suite!(Tables::Plain);

mod strict {
    use super::*;

    conformance_tests::fence_suite!(Tables::Strict);
    conformance_tests::expiry_suite!(Tables::Strict);
    conformance_tests::optimistic_suite!(Tables::Strict);
}

mod pooled {
    use super::*;

    conformance_tests::handler_suite!(Tables::Pooled);
    conformance_tests::lock_suite!(Tables::Pooled);
    conformance_tests::fence_suite!(Tables::Pooled);
    conformance_tests::expiry_suite!(Tables::Pooled);
    conformance_tests::optimistic_suite!(Tables::Pooled);
    conformance_tests::race_suite!(Tables::Pooled);
    conformance_tests::cancel_suite!(Tables::Pooled);
    conformance_tests::admin_suite!(Tables::Pooled);
}
