//! Runs the conformance suite over SQLite files, with and without a sync for each save.
#![cfg(feature = "sqlite")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use conformance_tests::Harness;
use session_core::{Result, SessionHandler, SessionLock};
use session_sql::{Durability, SqlConfig, SqlHandler, SqlLock, SqlServer};

/// One file for each namespace, in the directory that Cargo gives to tests.
struct Files(fn(SqlConfig) -> SqlConfig);

impl Files {
    fn config(&self, namespace: &str) -> SqlConfig {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("session-sqlite");
        std::fs::create_dir_all(&dir).expect("the directory of the tests can be written");
        (self.0)(SqlConfig::new(SqlServer::Sqlite(dir.join(format!("{namespace}.db")))).with_create(true))
    }
}

impl Harness for Files {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(SqlHandler::connect(self.config(namespace)).await?))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        Ok(Arc::new(SqlLock::connect(self.config(namespace)).await?))
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(100)
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

mod synced {
    use super::*;

    fn synced() -> Files {
        Files(|config| config)
    }

    conformance_tests::handler_suite!(synced());
    conformance_tests::lock_suite!(synced());
    conformance_tests::fence_suite!(synced());
    conformance_tests::expiry_suite!(synced());
    conformance_tests::optimistic_suite!(synced());
    conformance_tests::race_suite!(synced());
    conformance_tests::cancel_suite!(synced());
    conformance_tests::sessions_suite!(synced());
    conformance_tests::processes_suite!(synced());
}
