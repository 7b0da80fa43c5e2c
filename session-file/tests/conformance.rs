//! Runs the conformance suite over session files, at each durability and wherever file calls may run.

use std::sync::Arc;
use std::time::Duration;

use conformance_tests::Harness;
use session_core::{Result, SessionHandler, SessionLock};
use session_file::{Durability, FileConfig, FileHandler, FileLock, Io};

/// One directory for each namespace, below the directory that Cargo gives to tests.
struct Files(fn(FileConfig) -> FileConfig);

impl Files {
    fn config(&self, namespace: &str) -> FileConfig {
        (self.0)(FileConfig::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/session-file")).with_prefix(namespace))
    }
}

impl Harness for Files {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(FileHandler::open_dir(self.config(namespace))?))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        Ok(Arc::new(FileLock::open_dir(self.config(namespace))?))
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(50)
    }

    /// No copy of a call can arrive late from the kernel of the same machine.
    fn remembers_destroyed(&self) -> bool {
        false
    }

    /// A kernel lock ends with its holder, and never before.
    fn leases_end(&self) -> bool {
        false
    }
}

fn unsynced() -> Files {
    Files(|config| config.with_durability(Durability::None))
}

conformance_tests::handler_suite!(unsynced());
conformance_tests::lock_suite!(unsynced());
conformance_tests::fence_suite!(unsynced());
conformance_tests::expiry_suite!(unsynced());
conformance_tests::optimistic_suite!(unsynced());
conformance_tests::race_suite!(unsynced());
conformance_tests::cancel_suite!(unsynced());
conformance_tests::hostile_suite!(unsynced());
conformance_tests::admin_suite!(unsynced());
conformance_tests::sessions_suite!(unsynced());
conformance_tests::processes_suite!(unsynced());

mod data {
    use super::*;

    fn data() -> Files {
        Files(|config| config.with_durability(Durability::Data))
    }

    conformance_tests::handler_suite!(data());
    conformance_tests::fence_suite!(data());
    conformance_tests::optimistic_suite!(data());
    conformance_tests::race_suite!(data());
    conformance_tests::cancel_suite!(data());
    conformance_tests::sessions_suite!(data());
    conformance_tests::processes_suite!(data());
}

mod sharded_and_full_on_the_pool {
    use super::*;

    fn full() -> Files {
        Files(|config| config.with_durability(Durability::Full).with_io(Io::Pool).with_depth(2))
    }

    conformance_tests::handler_suite!(full());
    conformance_tests::lock_suite!(full());
    conformance_tests::fence_suite!(full());
    conformance_tests::expiry_suite!(full());
}
