//! The test executable as its own worker: how it is started again, and what it does then.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use session_core::{Result, SessionHandler, SessionLock, SessionsBuilder};

use super::worker;
use crate::harness::Harness;

/// Set in the environment of a test executable that is to be a worker.
const WORKER: &str = "SESSIONKIT_CONFORMANCE_WORKER";

/// A harness whose workers are this test executable, run again.
#[derive(Debug)]
pub struct InTestBinary<H> {
    harness: H,
    test: String,
}

impl<H: Harness> InTestBinary<H> {
    /// Wraps `harness`. `module` is the module of the cases; the test `conformance_worker` stands beside it.
    #[must_use]
    pub fn new(harness: H, module: &str) -> Self {
        // The name of the executable comes first in a path of modules and is no part of a test's name.
        let within: Vec<&str> = module.split("::").skip(1).collect();
        let outer = &within[..within.len().saturating_sub(1)];
        let test = outer.iter().copied().chain(["conformance_worker"]).collect::<Vec<_>>().join("::");
        Self { harness, test }
    }
}

#[deny(clippy::missing_trait_methods)]
impl<H: Harness> Harness for InTestBinary<H> {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        self.harness.handler(namespace).await
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        self.harness.lock(namespace).await
    }

    fn server(&self) -> Option<String> {
        self.harness.server()
    }

    async fn handler_at(&self, namespace: &str, server: SocketAddr) -> Result<Arc<dyn SessionHandler>> {
        self.harness.handler_at(namespace, server).await
    }

    fn worker(&self) -> Option<Command> {
        if let Some(command) = self.harness.worker() {
            return Some(command);
        }
        let mut command = Command::new(std::env::current_exe().ok()?);
        command.args([&self.test, "--exact", "--nocapture", "--test-threads=1"]).env(WORKER, "1");
        Some(command)
    }

    fn tick(&self) -> Duration {
        self.harness.tick()
    }

    fn strict_expiry(&self) -> bool {
        self.harness.strict_expiry()
    }

    fn remembers_destroyed(&self) -> bool {
        self.harness.remembers_destroyed()
    }

    fn recreates_destroyed(&self) -> bool {
        self.harness.recreates_destroyed()
    }

    fn touch_rewrites(&self) -> bool {
        self.harness.touch_rewrites()
    }

    fn leases_end(&self) -> bool {
        self.harness.leases_end()
    }

    fn sessions(&self, settings: SessionsBuilder) -> SessionsBuilder {
        self.harness.sessions(settings)
    }
}

/// Is a worker if a case has started this test executable as one; otherwise does nothing.
///
/// # Panics
/// If no runtime can be built.
pub fn worker_of_a_test(harness: &impl Harness) {
    if std::env::var_os(WORKER).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime can be built").block_on(worker(harness));
    }
}

#[cfg(test)]
mod tests {
    use session_core::{Error, ErrorKind};

    use super::*;

    #[test]
    fn the_worker_test_stands_beside_the_module_of_the_cases() {
        struct None;
        impl Harness for None {
            async fn handler(&self, _: &str) -> Result<Arc<dyn SessionHandler>> {
                Err(Error::new(ErrorKind::Unavailable, "harness", "there is none"))
            }
        }
        assert_eq!(InTestBinary::new(None, "file::processes").test, "conformance_worker");
        assert_eq!(InTestBinary::new(None, "file::deep::processes").test, "deep::conformance_worker");
    }
}
