//! Connections to a database server: how many there may be, and which of them are used again.
//!
//! A connection is used again if what was asked on it last was answered. One that was given up in the middle of a statement, by a
//! time-out or because nobody waited any more, is closed at once: what it would say next belongs to another question. The pool of
//! sqlx asks each connection that comes back whether it is still there, which is a flight for each statement; this one does not,
//! and needs no runtime where a future is dropped. Nothing here knows a statement.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{ConnectOptions, Connection, Database, Error, Pool};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use crate::clock::Clock;

/// After so long without work a connection is not trusted any more: what stands between may have forgotten it.
const IDLE: Duration = Duration::from_secs(240);

/// What is done to a new connection.
type Setup<D> = dyn for<'c> Fn(&'c mut <D as Database>::Connection) -> SettingUp<'c> + Send + Sync;

/// It being done.
pub(crate) type SettingUp<'c> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'c>>;

type Options<D> = <<D as Database>::Connection as Connection>::Options;

/// Connections of our own, or those of the application.
pub(crate) enum Connections<D: Database> {
    Own(Own<D>),
    Shared(Pool<D>),
}

/// At most so many connections, made when they are needed.
pub(crate) struct Own<D: Database> {
    options: Options<D>,
    setup: Box<Setup<D>>,
    patience: Duration,
    permits: Semaphore,
    /// Those without work, the one used last at the end.
    idle: Mutex<VecDeque<(Timed<D>, Instant)>>,
}

impl<D: Database> Connections<D> {
    /// Makes no connection yet. `patience` is how long to wait for one, made or free.
    pub(crate) fn new(
        options: Options<D>,
        setup: impl for<'c> Fn(&'c mut D::Connection) -> SettingUp<'c> + Send + Sync + 'static,
        count: u32,
        patience: Duration,
    ) -> Self {
        let (permits, setup) = (Semaphore::new(count as usize), Box::new(setup));
        Self::Own(Own { options, setup, patience, permits, idle: Mutex::default() })
    }

    /// Returns how a connection is made, for whoever needs one of his own.
    pub(crate) fn options(&self) -> Options<D> {
        match self {
            Self::Own(own) => own.options.clone(),
            Self::Shared(pool) => (*pool.connect_options()).clone(),
        }
    }

    /// Returns a connection that nobody else uses meanwhile.
    ///
    /// # Errors
    /// Nothing was asked yet. `PoolTimedOut` if all were busy.
    pub(crate) async fn take(&self) -> Result<Line<'_, D>, Error> {
        match self {
            Self::Own(own) => own.take().await,
            // On the heap, so that not every statement carries the room for it.
            Self::Shared(pool) => Ok(Line(Some(Kept::Shared(Box::pin(pool.acquire()).await?, Clock::default())))),
        }
    }

    /// Closes what is idle: a connection has broken, so these may be as old as that.
    pub(crate) fn distrust(&self) {
        if let Self::Own(own) = self {
            let idle = std::mem::take(&mut *own.idle());
            drop(idle);
        }
    }
}

impl<D: Database> Own<D> {
    async fn take(&self) -> Result<Line<'_, D>, Error> {
        let permit = match self.permits.try_acquire() {
            Ok(permit) => permit,
            Err(_) => {
                let free = Box::pin(timeout(self.patience, self.permits.acquire())).await;
                free.map_err(|_| Error::PoolTimedOut)?.map_err(|_| Error::PoolClosed)?
            }
        };
        let idle = {
            let mut idle = self.idle();
            let stale = idle.iter().take_while(|(_, since)| since.elapsed() > IDLE).count();
            let stale: Vec<_> = idle.drain(..stale).collect();
            let last = idle.pop_back();
            drop(idle);
            drop(stale);
            last
        };
        let timed = match idle {
            Some((timed, _)) => timed,
            None => {
                let connect = async {
                    let mut connection = self.options.connect().await?;
                    (self.setup)(&mut connection).await?;
                    Ok(connection)
                };
                let late = || Error::Io(io::Error::new(io::ErrorKind::TimedOut, "no connection in time"));
                // On the heap, so that whoever finds one does not carry the room for it.
                let connection = Box::pin(timeout(self.patience, connect)).await.unwrap_or_else(|_| Err(late()))?;
                Timed { connection, clock: Clock::default() }
            }
        };
        Ok(Line(Some(Kept::Own { timed, own: self, _permit: permit })))
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<(Timed<D>, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Database> fmt::Debug for Connections<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connections").finish_non_exhaustive()
    }
}

/// A connection in use. Dropped without having been [given back](Line::give_back), it is closed at once.
pub(crate) struct Line<'a, D: Database>(Option<Kept<'a, D>>);

enum Kept<'a, D: Database> {
    Own { timed: Timed<D>, own: &'a Own<D>, _permit: SemaphorePermit<'a> },
    Shared(PoolConnection<D>, Clock),
}

/// A connection and its timer.
struct Timed<D: Database> {
    connection: D::Connection,
    clock: Clock,
}

impl<D: Database> Line<'_, D> {
    /// Returns the connection, and what times a flight over it.
    pub(crate) fn timed(&mut self) -> (&mut D::Connection, &mut Clock) {
        match self.0.as_mut().expect("it is taken out only at the end") {
            Kept::Own { timed: Timed { connection, clock }, .. } => (connection, clock),
            Kept::Shared(connection, clock) => (connection, clock),
        }
    }

    /// What was asked on it has been answered.
    pub(crate) fn give_back(mut self) {
        match self.0.take() {
            Some(Kept::Own { timed, own, _permit }) => own.idle().push_back((timed, Instant::now())),
            Some(Kept::Shared(connection, _)) => drop(connection),
            None => {}
        }
    }
}

impl<D: Database> Drop for Line<'_, D> {
    fn drop(&mut self) {
        if let Some(Kept::Shared(connection, _)) = self.0.take() {
            drop(connection.detach());
        }
    }
}
