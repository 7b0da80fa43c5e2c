//! The contract over a SQL database: a store with leases, whose atomic steps are statements.
//!
//! What an opening is based on, and what an answer means for it, is the business of [`session_core::leased`].

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;

use async_trait::async_trait;
use session_core::leased::Leased;
use session_core::{OpenRequest, OpenSession, Result, SessionAdmin, SessionHandler, SessionId};

use crate::admin::SqlAdmin;
use crate::config::SqlConfig;
use crate::lock::SqlLock;
use crate::store::Store;

/// Keeps sessions in a table; clones share connections, batches and wake-ups.
///
/// Cheap to clone. Connections are made when needed, and made anew when they broke.
#[derive(Clone)]
pub struct SqlHandler {
    sessions: Leased<Store>,
    admin: SqlAdmin,
}

impl SqlHandler {
    /// Connects to the database of `config`, and makes the table if `config` says so.
    ///
    /// # Errors
    /// [`Unavailable`](session_core::ErrorKind::Unavailable) if the database does not answer,
    /// [`Config`](session_core::ErrorKind::Config) if it refuses user, password or database, or if the table is missing or not one
    /// that this version can use.
    pub async fn connect(config: SqlConfig) -> Result<Self> {
        Ok(Self::over(config.connect().await?))
    }

    /// Uses the connections of the application: those that sqlx makes for MySQL and MariaDB. Of `config` everything counts but the
    /// address and what is said of connections. No connection is kept while a session is open; one of its own, beside the pool,
    /// shows others that this process is alive.
    ///
    /// Over these connections each statement is a trip of its own, and an open is three of them: what `connect` joins in one flight
    /// would stand as text in the log that sqlx keeps for the application. The connections have to commit by themselves.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    #[cfg(feature = "mysql")]
    pub async fn from_mysql_pool(pool: sqlx::MySqlPool, config: SqlConfig) -> Result<Self> {
        let over = |config: &SqlConfig, owner| Ok(crate::mysql::over(pool, config, owner));
        Ok(Self::over(config.connect_by(over).await?))
    }

    /// Uses the connections of the application: those that sqlx makes for PostgreSQL. Of `config` everything counts but the address
    /// and what is said of connections. No connection is kept while a session is open.
    ///
    /// The connections stay as the application has set them up. Of what [`connect`](Self::connect) says to its own, one thing is worth
    /// saying there, too, in `after_connect` of the pool: `SET backend_flush_after = '256kB'`. A table that is larger than the memory of
    /// the server is then written as it changes, and not at the end of a checkpoint, which can hold up whoever commits for tenths of a
    /// second.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    #[cfg(feature = "postgres")]
    pub async fn from_pg_pool(pool: sqlx::PgPool, config: SqlConfig) -> Result<Self> {
        let over = |config: &SqlConfig, owner| Ok(crate::postgres::over(pool, config, owner));
        Ok(Self::over(config.connect_by(over).await?))
    }

    /// Makes the table if it is not there; one that is there is left as it is.
    ///
    /// # Errors
    /// [`Config`](session_core::ErrorKind::Config) if the user may not, [`Unavailable`](session_core::ErrorKind::Unavailable) if the
    /// database does not answer.
    pub async fn create_table(&self) -> Result<()> {
        self.sessions.store().create_table().await.map_err(|failure| failure.into_error("create the table"))
    }

    /// Returns the lock of this table, to be used alone. It excludes the exclusive openings of this handler, too.
    #[must_use]
    pub fn lock(&self) -> SqlLock {
        SqlLock::over(self.sessions.lock())
    }

    pub(crate) fn over(store: Arc<Store>) -> Self {
        Self { admin: SqlAdmin::over(store.clone()), sessions: Leased::new(store) }
    }
}

impl fmt::Debug for SqlHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlHandler").field("store", self.sessions.store()).finish_non_exhaustive()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionHandler for SqlHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        self.sessions.open(id, request).await
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.sessions.store().gc(limit.get()).await.map_err(|failure| failure.into_error("gc"))
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        Some(&self.admin)
    }
}
