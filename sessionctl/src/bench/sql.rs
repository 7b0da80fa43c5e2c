//! What runs beside ours on a SQL database: plain programs over the same client, in the table of ours.
//!
//! The plain programs know nothing of this library, and keep fewer promises: one locks and does not wait, renew or judge anew what
//! was refused; the other does not lock at all. Reading order: [`postgres`], [`mysql`], [`sqlite`], and [`pgbench`].

mod mysql;
pub(super) mod pgbench;
mod postgres;
mod sqlite;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use session_core::{Dsn, Error, ErrorKind, SessionId, WriteId};
use sessionkit::sql::{SqlAddress, SqlConfig, SqlServer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::bench::Round;
use crate::bench::ours::{LEASE, TTL, lost, run};
use crate::failure::Failure;

/// Which plain program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// The two statements that an uncontended open and an uncontended save of ours send.
    Locked,
    /// Reads by key; then writes by key.
    Unlocked,
}

/// A plain program and the keys of its tasks.
pub(crate) struct PlainCycle {
    program: Program,
    database: Database,
    keys: Arc<[String]>,
}

#[derive(Clone)]
enum Database {
    Postgres(Arc<postgres::Plain>),
    MySql(Arc<mysql::Plain>),
    Sqlite(Arc<sqlite::Plain>),
}

impl PlainCycle {
    /// Connects as our handler does, and stores what is to be read.
    pub(crate) async fn prepare(dsn: &str, program: Program, tasks: usize, payload: usize) -> Result<Self, Failure> {
        let config = SqlConfig::from_dsn(&Dsn::parse(dsn)?)?;
        let id = || Ok(format!("{}{}", config.prefix, SessionId::generate()?.as_str()));
        let keys = (0..tasks).map(|_| id()).collect::<session_core::Result<Arc<[_]>>>()?;
        let lines = tasks.min(config.connections() as usize);
        let database = Database::connect(dsn, &config, lines).await?;
        database.fill(&keys, &vec![b'x'; payload], millis(TTL)).await?;
        Ok(Self { program, database, keys })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        let program = self.program;
        match &self.database {
            Database::Postgres(plain) => {
                run(self.keys.len(), length, |task, mut laps| {
                    let (plain, keys) = (plain.clone(), self.keys.clone());
                    async move {
                        while laps.next().await {
                            plain.cycle(program, &keys[task]).await?;
                        }
                        Ok(laps.round())
                    }
                })
                .await
            }
            Database::MySql(plain) => {
                run(self.keys.len(), length, |task, mut laps| {
                    let (plain, keys) = (plain.clone(), self.keys.clone());
                    async move {
                        while laps.next().await {
                            plain.cycle(program, &keys[task]).await?;
                        }
                        Ok(laps.round())
                    }
                })
                .await
            }
            // One thread goes round: more of them would only wait for each other, as the file has one writer at a time.
            Database::Sqlite(plain) => {
                let (plain, keys) = (plain.clone(), self.keys.clone());
                let ran = tokio::task::spawn_blocking(move || plain.run(program, &keys, length)).await;
                Ok(ran.expect("a plain program does not panic")?)
            }
        }
    }

    /// Removes what was stored.
    pub(crate) async fn remove(&self) -> Result<(), Failure> {
        match &self.database {
            Database::Postgres(plain) => plain.remove(&self.keys).await?,
            Database::MySql(plain) => plain.remove(&self.keys).await?,
            Database::Sqlite(plain) => plain.remove(&self.keys).map_err(failed)?,
        }
        Ok(())
    }
}

impl Database {
    async fn connect(dsn: &str, config: &SqlConfig, lines: usize) -> Result<Self, Failure> {
        Ok(match &config.server {
            SqlServer::Postgres(address) => {
                let plain = postgres::Plain::connect(address, config, lines).await.map_err(failed)?;
                Self::Postgres(Arc::new(plain))
            }
            SqlServer::MySql(address) => {
                let plain = mysql::Plain::connect(address, config, lines).await.map_err(failed)?;
                Self::MySql(Arc::new(plain))
            }
            SqlServer::Sqlite(path) => {
                let plain = sqlite::Plain::open(path, &config.table, synced(dsn)?).map_err(failed)?;
                Self::Sqlite(Arc::new(plain))
            }
            _ => return Err(Failure::usage("there is no plain program for this database")),
        })
    }

    /// Stores a record under each key, with so many milliseconds left to live.
    async fn fill(&self, keys: &[String], data: &[u8], left: i64) -> Result<(), Failure> {
        match self {
            Self::Postgres(plain) => plain.fill(keys, data, left).await?,
            Self::MySql(plain) => plain.fill(keys, data, left).await?,
            Self::Sqlite(plain) => plain.fill(keys, data, left).map_err(failed)?,
        }
        Ok(())
    }
}

/// How many records are stored by one statement.
const AT_ONCE: usize = 1000;

/// Stores `count` records in a table of ours. Those that have `expired` are spread among the others, as gc finds them.
///
/// A million of them through the handler, in the order in which ids come, take a server with little memory longer than all that is
/// measured; in the order of their ids they take seconds.
pub(super) async fn fill(dsn: &str, count: u32, expired: u32, payload: usize) -> Result<(), Failure> {
    let config = SqlConfig::from_dsn(&Dsn::parse(dsn)?)?;
    let database = Database::connect(dsn, &config, 1).await?;
    let id = || Ok(format!("{}{}", config.prefix, SessionId::generate()?.as_str()));
    let mut keys = (0..count).map(|_| id()).collect::<session_core::Result<Vec<_>>>()?;
    keys.sort_unstable();
    let data = vec![b'x'; payload];
    let mut over = 0;
    for keys in keys.chunks(AT_ONCE) {
        let (mut old, mut live) = (Vec::new(), Vec::new());
        for key in keys {
            over += u64::from(expired);
            if over >= u64::from(count) {
                over -= u64::from(count);
                old.push(key.clone());
            } else {
                live.push(key.clone());
            }
        }
        // The live ones outlive the bench.
        for (keys, left) in [(old, -millis(TTL)), (live, 24 * millis(TTL))] {
            if !keys.is_empty() {
                database.fill(&keys, &data, left).await?;
            }
        }
    }
    Ok(())
}

/// Drops the table of a DSN.
pub(crate) async fn drop_table(dsn: &str) -> Result<(), Failure> {
    let config = SqlConfig::from_dsn(&Dsn::parse(dsn)?)?;
    match &config.server {
        SqlServer::Postgres(address) => {
            postgres::Plain::connect(address, &config, 1).await.map_err(failed)?.drop_table().await?;
        }
        SqlServer::MySql(address) => {
            mysql::Plain::connect(address, &config, 1).await.map_err(failed)?.drop_table().await?;
        }
        SqlServer::Sqlite(path) => {
            sqlite::Plain::open(path, &config.table, false).and_then(|plain| plain.drop_table()).map_err(failed)?;
        }
        _ => {}
    }
    Ok(())
}

/// Whether an acknowledged save of ours is on the disk, which plain programs and peers are then asked for, too.
pub(super) fn synced(dsn: &str) -> session_core::Result<bool> {
    Ok(Dsn::parse(dsn)?.option("durability") != Some("none"))
}

/// Returns host and port.
fn endpoint(address: &SqlAddress, usual: u16) -> (&str, u16) {
    (&address.host, if address.port == 0 { usual } else { address.port })
}

/// Connections that are used again as they are. The pool of the client asks each that comes back whether it is still there, and so
/// doubles the trips; ours does not, and so the floor must not either.
struct Lines<C> {
    free: Arc<Mutex<Vec<C>>>,
    permits: Arc<Semaphore>,
}

impl<C> Lines<C> {
    fn new(lines: Vec<C>) -> Self {
        Self { permits: Arc::new(Semaphore::new(lines.len())), free: Arc::new(Mutex::new(lines)) }
    }

    async fn take(&self) -> Line<C> {
        let permit = self.permits.clone().acquire_owned().await.expect("nobody closes it");
        let connection = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Line { connection, free: self.free.clone(), _permit: permit }
    }
}

/// A connection that goes back when it is dropped. One whose statement failed is of no more use, and the bench has failed with it.
struct Line<C> {
    connection: Option<C>,
    free: Arc<Mutex<Vec<C>>>,
    // Behind the connection: whoever gets the permit finds it among the free ones.
    _permit: OwnedSemaphorePermit,
}

impl<C> Line<C> {
    fn connection(&mut self) -> &mut C {
        self.connection.as_mut().expect("there are as many as permits")
    }
}

impl<C> Drop for Line<C> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        }
    }
}

/// A name of 16 bytes: of a lock, or of a write.
fn name() -> session_core::Result<[u8; 16]> {
    Ok(WriteId::random()?.to_bytes())
}

/// What is written down about a holder.
fn owner() -> String {
    format!("pid {} on this machine", std::process::id())
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Unavailable, "bench", "a plain program was refused").with_source(error)
}
