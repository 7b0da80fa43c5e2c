//! What handler and lock share, and on which thread a call runs.
//!
//! Nothing here touches a file.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use session_core::{Error, ErrorKind, Result};

use crate::config::{FileConfig, Io};
use crate::dir::Dir;
use crate::lock::Tokens;
use crate::sync::SyncThreads;
use crate::wait::Watch;

/// What handler and lock share.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) dir: Arc<Dir>,
    pub(crate) config: FileConfig,
    pub(crate) watch: Arc<Watch>,
    pub(crate) tokens: Tokens,
    pub(crate) threads: Arc<SyncThreads>,
}

impl Store {
    /// Opens the directory of `config`.
    pub(crate) fn open(config: FileConfig) -> Result<Self> {
        let dir = Arc::new(Dir::open(&config)?);
        Ok(Self { dir, config, watch: Arc::default(), tokens: Tokens::new()?, threads: Arc::new(SyncThreads::new()) })
    }

    /// Returns the same store for the use of another thread: what is changed by each call is not shared with it.
    pub(crate) fn another(&self) -> Result<Self> {
        Ok(Self {
            dir: Arc::new(self.dir.another()),
            config: self.config.clone(),
            watch: Arc::clone(&self.watch),
            tokens: Tokens::new()?,
            threads: Arc::clone(&self.threads),
        })
    }
}

/// Runs what touches files: in place, or on the blocking pool if it may wait for the disk.
pub(crate) async fn run<T: Send + 'static>(io: Io, heavy: bool, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    if !pooled(io, heavy) {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(|cause| {
        Error::new(ErrorKind::Unknown, "file", "the blocking pool ended before the call did").with_source(cause)
    })
}

/// Whether such a call runs on the pool.
pub(crate) fn pooled(io: Io, heavy: bool) -> bool {
    match io {
        Io::Auto => heavy,
        Io::Inline => false,
        Io::Pool => true,
    }
}

/// Milliseconds since 1970, by the clock of the machine: the clock of this store.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64
}
