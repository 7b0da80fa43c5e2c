//! Our cycles, and the peer's: what an application would run, as tasks of one runtime, each on a session of its own.

use std::collections::HashMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use session_core::{Change, Error, ErrorKind, Expect, OpenRequest, Record, SessionHandler, SessionId, Ttl, WriteId};
use sessionkit::Sessions;
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tower_sessions_core::SessionStore;
use tower_sessions_file_store::FileSessionStorage;

use crate::bench::Round;
use crate::failure::Failure;

pub(super) const TTL: Duration = Duration::from_secs(3600);
const WAIT: Duration = Duration::from_secs(10);
pub(super) const LEASE: Duration = Duration::from_secs(30);

/// The bare handler: open, read, save.
#[derive(Clone, Debug)]
pub(crate) struct HandlerCycle {
    handler: Arc<dyn SessionHandler>,
    ids: Arc<[SessionId]>,
    change: DataChange,
}

/// What a cycle does between read and save.
pub(super) type DataChange = fn(&mut Vec<u8>) -> session_core::Result<()>;

impl HandlerCycle {
    pub(crate) async fn prepare(handler: Arc<dyn SessionHandler>, tasks: usize, payload: usize) -> Result<Self, Failure> {
        let first_byte: DataChange = |data| {
            data[0] = data[0].wrapping_add(1);
            Ok(())
        };
        Self::prepare_with(handler, tasks, &vec![b'x'; payload], first_byte).await
    }

    /// Stores `data` in a session for each task; each cycle is to `change` it.
    pub(super) async fn prepare_with(
        handler: Arc<dyn SessionHandler>,
        tasks: usize,
        data: &[u8],
        change: DataChange,
    ) -> Result<Self, Failure> {
        let ids = (0..tasks).map(|_| SessionId::generate()).collect::<session_core::Result<Vec<_>>>()?;
        for id in &ids {
            let request = OpenRequest::exclusive(WAIT, LEASE).expecting(Expect::Any);
            let mut open = handler.open(id, &request).await?;
            open.read().await?;
            let record = Record::new(data.to_vec(), Ttl::new(TTL));
            open.save(&Change::Write(record), WriteId::random()?).await?;
        }
        Ok(Self { handler, ids: ids.into(), change })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.ids.len(), length, |task, mut laps| {
            let (handler, id, change) = (self.handler.clone(), self.ids[task].clone(), self.change);
            async move {
                while laps.next().await {
                    let mut open = handler.open(&id, &OpenRequest::exclusive(WAIT, LEASE)).await?;
                    let mut record = open.read().await?.ok_or_else(lost)?;
                    change(&mut record.data)?;
                    record.ttl = Ttl::new(TTL);
                    open.save(&Change::Write(record), WriteId::random()?).await?;
                }
                Ok(laps.round())
            }
        })
        .await
    }
}

/// All of it, as an application calls it: open, get, insert, close.
#[derive(Clone, Debug)]
pub(crate) struct SessionCycle {
    sessions: Sessions,
    ids: Arc<[SessionId]>,
}

impl SessionCycle {
    pub(crate) async fn prepare(sessions: Sessions, tasks: usize, payload: usize) -> Result<Self, Failure> {
        let mut ids = Vec::new();
        for _ in 0..tasks {
            let mut session = sessions.create()?;
            session.insert("payload", &"x".repeat(payload))?;
            session.insert("n", &0u64)?;
            ids.push(session.id().clone());
            session.close().await?;
        }
        Ok(Self { sessions, ids: ids.into() })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.ids.len(), length, |task, mut laps| {
            let (sessions, id) = (self.sessions.clone(), self.ids[task].clone());
            async move {
                while laps.next().await {
                    let mut session = sessions.open(&id).await?;
                    let n = session.get::<u64>("n")?.ok_or_else(lost)?;
                    session.insert("n", &(n + 1))?;
                    session.close().await?;
                }
                Ok(laps.round())
            }
        })
        .await
    }
}

/// The store of the peer: load, save. It takes no lock.
#[derive(Clone, Debug)]
pub(crate) struct PeerCycle {
    store: FileSessionStorage,
    ids: Arc<[tower_sessions_core::session::Id]>,
}

impl PeerCycle {
    pub(crate) async fn prepare(directory: &Path, tasks: usize, payload: usize) -> Result<Self, Failure> {
        let store = FileSessionStorage::new_in_folder(directory.to_owned());
        // A session of theirs is the way to their date type that needs no further crate.
        let expiry_date = tower_sessions_core::Session::new(None, Arc::new(store.clone()), None).expiry_date();
        let mut ids = Vec::new();
        for _ in 0..tasks {
            let id = tower_sessions_core::session::Id::default();
            let mut record = tower_sessions_core::session::Record { id, data: peer_data(payload), expiry_date };
            store.create(&mut record).await.map_err(peer_failed)?;
            ids.push(record.id);
        }
        Ok(Self { store, ids: ids.into() })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.ids.len(), length, |task, mut laps| {
            let (store, id) = (self.store.clone(), self.ids[task]);
            async move {
                while laps.next().await {
                    let mut record = store.load(&id).await.map_err(peer_failed)?.ok_or_else(lost)?;
                    count_up(&mut record.data)?;
                    store.save(&record).await.map_err(peer_failed)?;
                }
                Ok(laps.round())
            }
        })
        .await
    }
}

pub(super) fn lost() -> Error {
    Error::new(ErrorKind::Gone, "bench", "a session that was just stored is not there")
}

/// What a peer's session holds, whichever core the peer is written for.
type PeerData = HashMap<String, Value>;

pub(super) fn peer_data(payload: usize) -> PeerData {
    [("payload".to_owned(), json!("x".repeat(payload))), ("n".to_owned(), json!(0))].into_iter().collect()
}

pub(super) fn count_up(data: &mut PeerData) -> session_core::Result<()> {
    let n = data.get("n").and_then(Value::as_u64).ok_or_else(lost)?;
    data.insert("n".to_owned(), json!(n + 1));
    Ok(())
}

pub(super) fn peer_failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Unavailable, "bench", "the peer's store failed").with_source(error)
}

/// Runs `tasks` tasks for `length`. Each is a loop of cycles, as each thread of a plain program is: nothing but the cycles and one
/// look at the clock between them is measured.
pub(super) async fn run<F>(tasks: usize, length: Duration, task_of: impl Fn(usize, Laps) -> F) -> Result<Round, Failure>
where
    F: Future<Output = session_core::Result<Round>> + Send + 'static,
{
    let start = Arc::new(Barrier::new(tasks));
    let mut running = JoinSet::new();
    for task in 0..tasks {
        running.spawn(task_of(task, Laps::new(start.clone(), tasks, length)));
    }
    let mut rounds = Vec::with_capacity(tasks);
    while let Some(ended) = running.join_next().await {
        rounds.push(ended.expect("a cycle does not panic")?);
    }
    Ok(Round::join(rounds))
}

/// The clock of one task's loop.
pub(super) struct Laps {
    start: Arc<Barrier>,
    alone: bool,
    length: Duration,
    started: Option<Instant>,
    before: Instant,
    waits: Vec<u32>,
}

impl Laps {
    fn new(start: Arc<Barrier>, tasks: usize, length: Duration) -> Self {
        let waits = Vec::with_capacity(1 << 17);
        Self { start, alone: tasks == 1, length, started: None, before: Instant::now(), waits }
    }

    /// Ends one cycle and says whether there is time for the next. The first waits until all tasks are there.
    pub(super) async fn next(&mut self) -> bool {
        let Some(started) = self.started else {
            self.start.wait().await;
            self.before = Instant::now();
            self.started = Some(self.before);
            return true;
        };
        let now = Instant::now();
        self.waits.push(Round::nanos(now - self.before));
        self.before = now;
        // A cycle that never waits gives the other tasks of this thread no turn; a request that has ended does.
        if self.waits.len().is_multiple_of(8) && !self.alone {
            tokio::task::yield_now().await;
            self.before = Instant::now();
        }
        self.before < started + self.length
    }

    pub(super) fn round(self) -> Round {
        Round { ran: (self.started.unwrap_or(self.before), self.before), waits: self.waits }
    }
}
