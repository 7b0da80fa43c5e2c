//! What a suite needs of the handler under test: a way to get one, on a store of its own, and the pace of its clock.
//!
//! Nothing here knows what a case does with it.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use session_core::{Error, ErrorKind, Result, SessionHandler, SessionLock, SessionsBuilder, WriteId};
use tokio::task::JoinHandle;

use crate::case;
use crate::proxy::Proxy;

/// A boxed future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Makes the handlers that the cases are run on.
///
/// A store that cannot be reached is an error, never a panic and never a reason to skip; its text says how to start the
/// server.
pub trait Harness: Send + Sync + 'static {
    /// Returns a handler on the store named `namespace`: 13 lower-case letters and digits, the first a letter, different for
    /// each case and each run.
    ///
    /// The same namespace gives the same store, in any process; another namespace sees nothing of it. Each call gives a handler
    /// of its own, with connections of its own if it has any, so that two of them stand for two processes.
    fn handler(&self, namespace: &str) -> impl Future<Output = Result<Arc<dyn SessionHandler>>> + Send;

    /// Returns the lock of the store named `namespace`, for `lock_suite!`.
    ///
    /// Without this method the handler has no lock that could be used alone.
    fn lock(&self, namespace: &str) -> impl Future<Output = Result<Arc<dyn SessionLock>>> + Send {
        let _ = namespace;
        async { Err(Error::new(ErrorKind::Unsupported, "harness", "this harness offers no lock of its own")) }
    }

    /// Returns the server that the handlers of this harness ask, as `host:port`, for `trips_suite!`.
    ///
    /// Without this method, or if they do not speak plain TCP with one server, no proxy can stand before it.
    fn server(&self) -> Option<String> {
        None
    }

    /// Returns a handler as [`handler`](Self::handler) does, with connections to `server` in place of [its own](Self::server).
    fn handler_at(
        &self,
        namespace: &str,
        server: SocketAddr,
    ) -> impl Future<Output = Result<Arc<dyn SessionHandler>>> + Send {
        let _ = (namespace, server);
        async { Err(Error::new(ErrorKind::Unsupported, "harness", "the server of this harness cannot be elsewhere")) }
    }

    /// Returns how to start a process that calls [`processes::worker`](crate::processes::worker) with this harness, for cases
    /// that need several processes.
    ///
    /// `processes_suite!` does not need it: there the workers are the test executable itself, run again.
    fn worker(&self) -> Option<Command> {
        None
    }

    /// Returns the shortest lease or life that this store can keep, which is also the step in which it counts them; all times of
    /// the cases are multiples of it. A store that counts in seconds says one second.
    fn tick(&self) -> Duration {
        Duration::from_millis(200)
    }

    /// Whether a write under a lease that has ended is refused even if nobody took over (the option `strict_expiry`).
    fn strict_expiry(&self) -> bool {
        false
    }

    /// Whether the store knows for a while that an id was destroyed. Only a store without a network between, where no late copy
    /// of a request can arrive, may forget at once.
    fn remembers_destroyed(&self) -> bool {
        true
    }

    /// Whether an id that was destroyed a short time ago can be created again under the lock. Only a layer that cannot see the
    /// trace of the destruction together with the lock may refuse it, with `Conflict`.
    fn recreates_destroyed(&self) -> bool {
        true
    }

    /// Whether a lease ends by itself. A lock that ends with its holder, and never before, says no: then the next opener is kept
    /// out until the holder lets go, and there is nothing to take over.
    fn leases_end(&self) -> bool {
        true
    }

    /// Whether a touch rewrites the record under a new write id, as the provided method does: then it makes an optimistic write
    /// that is based on an earlier read a conflict.
    fn touch_rewrites(&self) -> bool {
        false
    }

    /// Adds to the settings of a case what an application with this handler would add, such as a codec.
    fn sessions(&self, settings: SessionsBuilder) -> SessionsBuilder {
        settings
    }
}

/// [`Harness`] as an object; every harness is one.
pub trait DynHarness: Send + Sync + 'static {
    /// See [`Harness::handler`].
    fn dyn_handler<'a>(&'a self, namespace: &'a str) -> BoxFuture<'a, Result<Arc<dyn SessionHandler>>>;
    /// See [`Harness::lock`].
    fn dyn_lock<'a>(&'a self, namespace: &'a str) -> BoxFuture<'a, Result<Arc<dyn SessionLock>>>;
    /// See [`Harness::server`].
    fn dyn_server(&self) -> Option<String>;
    /// See [`Harness::handler_at`].
    fn dyn_handler_at<'a>(
        &'a self,
        namespace: &'a str,
        server: SocketAddr,
    ) -> BoxFuture<'a, Result<Arc<dyn SessionHandler>>>;
    /// See [`Harness::worker`].
    fn dyn_worker(&self) -> Option<Command>;
    /// See [`Harness::tick`].
    fn dyn_tick(&self) -> Duration;
    /// See [`Harness::strict_expiry`].
    fn dyn_strict_expiry(&self) -> bool;
    /// See [`Harness::remembers_destroyed`].
    fn dyn_remembers_destroyed(&self) -> bool;
    /// See [`Harness::recreates_destroyed`].
    fn dyn_recreates_destroyed(&self) -> bool;
    /// See [`Harness::leases_end`].
    fn dyn_leases_end(&self) -> bool;
    /// See [`Harness::touch_rewrites`].
    fn dyn_touch_rewrites(&self) -> bool;
    /// See [`Harness::sessions`].
    fn dyn_sessions(&self, settings: SessionsBuilder) -> SessionsBuilder;
}

impl<H: Harness> DynHarness for H {
    fn dyn_handler<'a>(&'a self, namespace: &'a str) -> BoxFuture<'a, Result<Arc<dyn SessionHandler>>> {
        Box::pin(self.handler(namespace))
    }

    fn dyn_lock<'a>(&'a self, namespace: &'a str) -> BoxFuture<'a, Result<Arc<dyn SessionLock>>> {
        Box::pin(self.lock(namespace))
    }

    fn dyn_server(&self) -> Option<String> {
        self.server()
    }

    fn dyn_handler_at<'a>(
        &'a self,
        namespace: &'a str,
        server: SocketAddr,
    ) -> BoxFuture<'a, Result<Arc<dyn SessionHandler>>> {
        Box::pin(self.handler_at(namespace, server))
    }

    fn dyn_worker(&self) -> Option<Command> {
        self.worker()
    }

    fn dyn_tick(&self) -> Duration {
        self.tick()
    }

    fn dyn_strict_expiry(&self) -> bool {
        self.strict_expiry()
    }

    fn dyn_remembers_destroyed(&self) -> bool {
        self.remembers_destroyed()
    }

    fn dyn_recreates_destroyed(&self) -> bool {
        self.recreates_destroyed()
    }

    fn dyn_leases_end(&self) -> bool {
        self.leases_end()
    }

    fn dyn_touch_rewrites(&self) -> bool {
        self.touch_rewrites()
    }

    fn dyn_sessions(&self, settings: SessionsBuilder) -> SessionsBuilder {
        self.sessions(settings)
    }
}

/// What a case is given: handlers on a store of its own, times to use, randomness that can be replayed.
#[derive(Clone)]
pub struct Env {
    harness: Arc<dyn DynHarness>,
    namespace: String,
    seed: u64,
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Env").field("namespace", &self.namespace).field("seed", &self.seed).finish_non_exhaustive()
    }
}

impl Env {
    pub(crate) fn fresh_namespace() -> String {
        let random = WriteId::random().expect("the operating system has randomness").to_bytes();
        random[..6].iter().fold(String::from("c"), |name, byte| format!("{name}{byte:02x}"))
    }

    pub(crate) fn new(harness: Arc<dyn DynHarness>) -> Self {
        let random = WriteId::random().expect("the operating system has randomness").to_bytes();
        let namespace = Self::fresh_namespace();
        let fresh = u64::from(u32::from_le_bytes([random[8], random[9], random[10], random[11]]));
        let seed = std::env::var("CONFORMANCE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(fresh);
        Self { harness, namespace, seed }
    }

    /// Returns a handler of its own on the store of this case.
    ///
    /// # Panics
    /// Fails the case if the harness has none to give.
    pub async fn handler(&self) -> Arc<dyn SessionHandler> {
        match self.harness.dyn_handler(&self.namespace).await {
            Ok(handler) => handler,
            Err(error) => panic!("the harness gave no handler: {error:?}"),
        }
    }

    /// Returns a lock of its own on the store of this case.
    ///
    /// # Panics
    /// Fails the case if the harness has none to give.
    pub async fn lock(&self) -> Arc<dyn SessionLock> {
        match self.harness.dyn_lock(&self.namespace).await {
            Ok(lock) => lock,
            Err(error) => panic!("the harness gave no lock: {error:?}"),
        }
    }

    /// Returns a handler of its own on the store of this case that asks its server through a proxy, and the proxy.
    ///
    /// # Panics
    /// Fails the case if the harness names no server, or has no such handler to give.
    pub async fn counted(&self) -> (Proxy, Arc<dyn SessionHandler>) {
        let Some(server) = self.harness.dyn_server() else {
            panic!("the harness names no server that a proxy could stand before")
        };
        let proxy = Proxy::start(server).await.unwrap_or_else(|error| panic!("the proxy cannot be started: {error}"));
        match self.harness.dyn_handler_at(&self.namespace, proxy.address()).await {
            Ok(handler) => (proxy, handler),
            Err(error) => panic!("the harness gave no handler that goes through a proxy: {error:?}"),
        }
    }

    /// Returns the same for another store.
    #[must_use]
    pub fn elsewhere(&self) -> Self {
        Self { seed: self.seed, ..Self::new(self.harness.clone()) }
    }

    /// Returns the name of the store of this case, to be handed to another process.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns how to start a worker process; see [`Harness::worker`].
    #[must_use]
    pub fn worker(&self) -> Option<Command> {
        self.harness.dyn_worker()
    }

    /// Returns the unit of time; see [`Harness::tick`].
    #[must_use]
    pub fn tick(&self) -> Duration {
        self.harness.dyn_tick()
    }

    /// See [`Harness::strict_expiry`].
    #[must_use]
    pub fn strict_expiry(&self) -> bool {
        self.harness.dyn_strict_expiry()
    }

    /// See [`Harness::remembers_destroyed`].
    #[must_use]
    pub fn remembers_destroyed(&self) -> bool {
        self.harness.dyn_remembers_destroyed()
    }

    /// See [`Harness::recreates_destroyed`].
    #[must_use]
    pub fn recreates_destroyed(&self) -> bool {
        self.harness.dyn_recreates_destroyed()
    }

    /// See [`Harness::leases_end`].
    #[must_use]
    pub fn leases_end(&self) -> bool {
        self.harness.dyn_leases_end()
    }

    /// See [`Harness::touch_rewrites`].
    #[must_use]
    pub fn touch_rewrites(&self) -> bool {
        self.harness.dyn_touch_rewrites()
    }

    /// See [`Harness::sessions`].
    pub fn finish(&self, settings: SessionsBuilder) -> SessionsBuilder {
        self.harness.dyn_sessions(settings)
    }

    /// Returns randomness that follows from the seed of this run and from `stream`.
    #[must_use]
    pub fn rng(&self, stream: u64) -> Rng {
        Rng(self.seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Returns the seed of this run.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Runs a part of the case as a task of its own; what it finds wrong fails the case once it is awaited with
    /// [`joined`](Self::joined).
    pub fn spawn<T: Send + 'static>(&self, part: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        case::spawn(part)
    }

    /// Awaits a part.
    ///
    /// # Panics
    /// If the part did.
    pub async fn joined<T>(&self, part: JoinHandle<T>) -> T {
        match part.await {
            Ok(value) => value,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => panic!("a part of the case was lost: {error}"),
            },
        }
    }
}

/// A small generator (SplitMix64) whose whole state is the seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Starts from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `limit`, which must not be zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }

    /// Returns a duration below `limit`.
    pub fn duration(&mut self, limit: Duration) -> Duration {
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX).max(1);
        Duration::from_nanos(self.below(nanos))
    }
}
