//! Runs the conformance suite over a memcached that takes the numbers of items from its clients, from version 1.6.27 on.
//!
//! What depends on its clock alone, and on other processes, is the same as with an older one; see `conformance.rs`.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use conformance_tests::Harness;
use conformance_tests::servers::Memcached;
use session_core::{Error, ErrorKind, Result, SessionHandler, SessionLock};
use session_memcache::{MemcacheConfig, MemcacheHandler, MemcacheLock, MemcacheServer};

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// Ends with this process.
static SERVER: OnceLock<Memcached> = OnceLock::new();

/// One prefix for each namespace, on the server of the test.
struct Newer;

impl Newer {
    fn config(&self, namespace: &str) -> Result<MemcacheConfig> {
        let unavailable = |error: std::io::Error| Error::new(ErrorKind::Unavailable, "harness", error.to_string());
        let server = match SERVER.get() {
            Some(server) => server,
            None => {
                let server = Memcached::start_newer(&["-m 256"]).map_err(unavailable)?;
                SERVER.get_or_init(|| server)
            }
        };
        let config = MemcacheConfig::new([MemcacheServer::new("127.0.0.1", server.port())]);
        // A machine that is busy with other tests answers late.
        let config = config.with_timeout(PATIENCE).with_connect_timeout(PATIENCE);
        Ok(config.with_prefix(format!("{namespace}:")))
    }
}

impl Harness for Newer {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(MemcacheHandler::connect(self.config(namespace)?).await?))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        Ok(Arc::new(MemcacheLock::connect(self.config(namespace)?).await?))
    }

    fn server(&self) -> Option<String> {
        self.config("").ok()?;
        SERVER.get().map(|server| server.address().to_string())
    }

    async fn handler_at(&self, namespace: &str, server: SocketAddr) -> Result<Arc<dyn SessionHandler>> {
        let mut config = self.config(namespace)?;
        config.servers = vec![MemcacheServer::new(server.ip().to_string(), server.port())];
        Ok(Arc::new(MemcacheHandler::connect(config).await?))
    }

    fn tick(&self) -> Duration {
        Duration::from_secs(1)
    }
}

conformance_tests::handler_suite!(Newer);
conformance_tests::lock_suite!(Newer);
conformance_tests::fence_suite!(Newer);
conformance_tests::optimistic_suite!(Newer);
conformance_tests::race_suite!(Newer);
conformance_tests::hostile_suite!(Newer);
conformance_tests::admin_suite!(Newer);
conformance_tests::trips_suite!(Newer);
