//! Runs the conformance suite over a real memcached server, of the version of this machine, which each test process starts for
//! itself.

use std::net::SocketAddr;
use std::path::PathBuf;
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
struct Standalone(fn(MemcacheConfig) -> MemcacheConfig);

impl Standalone {
    fn config(&self, namespace: &str) -> Result<MemcacheConfig> {
        let unavailable = |error: std::io::Error| Error::new(ErrorKind::Unavailable, "harness", error.to_string());
        // The worker processes of a case find the server of their parent by the namespace.
        let port = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("session-memcache-{namespace}"));
        let found = std::fs::read_to_string(&port).ok().and_then(|port| port.parse().ok());
        let port: u16 = match found {
            Some(port) => port,
            None => {
                let server = match SERVER.get() {
                    Some(server) => server,
                    None => {
                        let server = Memcached::start(&["-m 256"]).map_err(unavailable)?;
                        SERVER.get_or_init(|| server)
                    }
                };
                std::fs::write(&port, server.port().to_string()).map_err(unavailable)?;
                server.port()
            }
        };
        let config = MemcacheConfig::new([MemcacheServer::new("127.0.0.1", port)]);
        // A machine that is busy with other tests answers late.
        let config = config.with_timeout(PATIENCE).with_connect_timeout(PATIENCE);
        Ok((self.0)(config.with_prefix(format!("{namespace}:"))))
    }
}

impl Harness for Standalone {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(MemcacheHandler::connect(self.config(namespace)?).await?))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        Ok(Arc::new(MemcacheLock::connect(self.config(namespace)?).await?))
    }

    fn server(&self) -> Option<String> {
        SERVER.get_or_init(|| Memcached::start(&["-m 256"]).expect("memcached can be started")).address().to_string().into()
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

fn standalone() -> Standalone {
    Standalone(|config| config)
}

conformance_tests::handler_suite!(standalone());
conformance_tests::lock_suite!(standalone());
conformance_tests::fence_suite!(standalone());
conformance_tests::expiry_suite!(standalone());
conformance_tests::optimistic_suite!(standalone());
conformance_tests::race_suite!(standalone());
conformance_tests::cancel_suite!(standalone());
conformance_tests::hostile_suite!(standalone());
conformance_tests::admin_suite!(standalone());
conformance_tests::sessions_suite!(standalone());
conformance_tests::trips_suite!(standalone());
conformance_tests::processes_suite!(standalone());
