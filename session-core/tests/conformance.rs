//! Runs the conformance suite over what this crate brings: the memory handler, its lock, and the layers around them.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use conformance_tests::Harness;
use session_core::{
    Access, Error, ErrorKind, HashIds, Locked, MemoryHandler, MemoryLock, Observe, OpenRequest, OpenSession, Result,
    SessionAdmin, SessionHandler, SessionId, SessionLock, async_trait,
};

/// One store for each namespace, made by `make` and shared by all handlers of the namespace.
struct InMemory<H> {
    make: fn() -> H,
    lock: fn(&H) -> Option<Arc<dyn SessionLock>>,
    strict: bool,
    layered: bool,
    stores: Mutex<HashMap<String, H>>,
}

impl<H: Clone> InMemory<H> {
    fn new(make: fn() -> H) -> Self {
        Self { make, lock: |_| None, strict: false, layered: false, stores: Mutex::default() }
    }

    fn store(&self, namespace: &str) -> H {
        self.stores.lock().expect("no case panics here").entry(namespace.to_owned()).or_insert_with(self.make).clone()
    }
}

impl<H: SessionHandler + Clone> Harness for InMemory<H> {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(self.store(namespace)))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        let none = || Error::new(ErrorKind::Unsupported, "lock", "no lock of its own");
        (self.lock)(&self.store(namespace)).ok_or_else(none)
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(50)
    }

    fn strict_expiry(&self) -> bool {
        self.strict
    }

    fn recreates_destroyed(&self) -> bool {
        !self.layered
    }

    fn touch_rewrites(&self) -> bool {
        self.layered
    }
}

fn memory() -> InMemory<MemoryHandler> {
    InMemory { lock: |handler| Some(Arc::new(handler.lock())), ..InMemory::new(MemoryHandler::new) }
}

conformance_tests::handler_suite!(memory());
conformance_tests::lock_suite!(memory());
conformance_tests::fence_suite!(memory());
conformance_tests::expiry_suite!(memory());
conformance_tests::optimistic_suite!(memory());
conformance_tests::race_suite!(memory());
conformance_tests::cancel_suite!(memory());
conformance_tests::hostile_suite!(memory());
conformance_tests::sessions_suite!(memory());
conformance_tests::admin_suite!(memory());

mod strict {
    use super::*;

    fn strict() -> InMemory<MemoryHandler> {
        InMemory { strict: true, ..InMemory::new(|| MemoryHandler::builder().strict_expiry(true).build()) }
    }

    conformance_tests::fence_suite!(strict());
    conformance_tests::expiry_suite!(strict());
    conformance_tests::race_suite!(strict());
    conformance_tests::cancel_suite!(strict());
}

mod hash_ids {
    use super::*;

    type Hashed = Arc<HashIds<MemoryHandler>>;

    fn hashed() -> InMemory<Hashed> {
        InMemory::new(|| Arc::new(HashIds::new(MemoryHandler::new())))
    }

    conformance_tests::handler_suite!(hashed());
    conformance_tests::fence_suite!(hashed());
    conformance_tests::expiry_suite!(hashed());
    conformance_tests::optimistic_suite!(hashed());
    conformance_tests::race_suite!(hashed());
    conformance_tests::cancel_suite!(hashed());
    conformance_tests::hostile_suite!(hashed());
    conformance_tests::sessions_suite!(hashed());
    conformance_tests::admin_suite!(hashed());
}

mod observe {
    use super::*;

    fn observed() -> InMemory<Arc<Observe<MemoryHandler>>> {
        InMemory::new(|| Arc::new(Observe::new(MemoryHandler::new(), "memory")))
    }

    conformance_tests::handler_suite!(observed());
    conformance_tests::fence_suite!(observed());
    conformance_tests::optimistic_suite!(observed());
    conformance_tests::hostile_suite!(observed());
    conformance_tests::admin_suite!(observed());
}

mod locked {
    use super::*;

    /// The memory handler without exclusive access.
    #[derive(Debug)]
    struct OptimisticOnly(MemoryHandler);

    #[async_trait]
    #[deny(clippy::missing_trait_methods)]
    impl SessionHandler for OptimisticOnly {
        async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
            if matches!(request.access, Access::Exclusive { .. }) {
                return Err(Error::new(ErrorKind::Unsupported, "open", "this handler has no lock"));
            }
            self.0.open(id, request).await
        }

        async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
            self.0.gc(limit).await
        }

        fn admin(&self) -> Option<&dyn SessionAdmin> {
            self.0.admin()
        }
    }

    type Both = Arc<Locked<OptimisticOnly, MemoryLock>>;

    fn locked() -> InMemory<Both> {
        InMemory {
            layered: true,
            ..InMemory::new(|| Arc::new(Locked::new(OptimisticOnly(MemoryHandler::new()), MemoryLock::new())))
        }
    }

    conformance_tests::handler_suite!(locked());
    conformance_tests::fence_suite!(locked());
    conformance_tests::expiry_suite!(locked());
    conformance_tests::optimistic_suite!(locked());
    conformance_tests::race_suite!(locked());
    conformance_tests::cancel_suite!(locked());
    conformance_tests::hostile_suite!(locked());
    conformance_tests::sessions_suite!(locked());
}
