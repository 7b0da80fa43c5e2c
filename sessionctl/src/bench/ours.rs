//! Our cycles, and the peer's: what an application would run, as tasks of one runtime, each on a session of its own.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use session_core::{Change, Error, ErrorKind, Expect, OpenRequest, Record, SessionHandler, SessionId, Ttl, WriteId};
use sessionkit::Sessions;
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tower_sessions_core::SessionStore;
use tower_sessions_file_store::FileSessionStorage;

use crate::bench::Round;
use crate::failure::Failure;

const TTL: Duration = Duration::from_secs(3600);
const WAIT: Duration = Duration::from_secs(10);
const LEASE: Duration = Duration::from_secs(30);

/// The bare handler: open, read, save.
#[derive(Clone, Debug)]
pub(crate) struct HandlerCycle {
    handler: Arc<dyn SessionHandler>,
    ids: Arc<[SessionId]>,
}

impl HandlerCycle {
    pub(crate) async fn prepare(handler: Arc<dyn SessionHandler>, tasks: usize, payload: usize) -> Result<Self, Failure> {
        let ids = (0..tasks).map(|_| SessionId::generate()).collect::<session_core::Result<Vec<_>>>()?;
        for id in &ids {
            let request = OpenRequest::exclusive(WAIT, LEASE).expecting(Expect::Any);
            let mut open = handler.open(id, &request).await?;
            open.read().await?;
            let record = Record::new(vec![b'x'; payload], Ttl::new(TTL));
            open.save(&Change::Write(record), WriteId::random()?).await?;
        }
        Ok(Self { handler, ids: ids.into() })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.ids.len(), length, |task| {
            let (handler, id) = (self.handler.clone(), self.ids[task].clone());
            move || {
                let (handler, id) = (handler.clone(), id.clone());
                async move {
                    let mut open = handler.open(&id, &OpenRequest::exclusive(WAIT, LEASE)).await?;
                    let mut record = open.read().await?.ok_or_else(lost)?;
                    record.data[0] = record.data[0].wrapping_add(1);
                    record.ttl = Ttl::new(TTL);
                    open.save(&Change::Write(record), WriteId::random()?).await?;
                    Ok(())
                }
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
        run(self.ids.len(), length, |task| {
            let (sessions, id) = (self.sessions.clone(), self.ids[task].clone());
            move || {
                let (sessions, id) = (sessions.clone(), id.clone());
                async move {
                    let mut session = sessions.open(&id).await?;
                    let n = session.get::<u64>("n")?.ok_or_else(lost)?;
                    session.insert("n", &(n + 1))?;
                    session.close().await?;
                    Ok(())
                }
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
            let data =
                [("payload".to_owned(), json!("x".repeat(payload))), ("n".to_owned(), json!(0))].into_iter().collect();
            let id = tower_sessions_core::session::Id::default();
            let mut record = tower_sessions_core::session::Record { id, data, expiry_date };
            store.create(&mut record).await.map_err(peer_failed)?;
            ids.push(record.id);
        }
        Ok(Self { store, ids: ids.into() })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.ids.len(), length, |task| {
            let (store, id) = (self.store.clone(), self.ids[task]);
            move || {
                let store = store.clone();
                async move {
                    let mut record = store.load(&id).await.map_err(peer_failed)?.ok_or_else(lost)?;
                    let n = record.data.get("n").and_then(serde_json::Value::as_u64).ok_or_else(lost)?;
                    record.data.insert("n".to_owned(), json!(n + 1));
                    store.save(&record).await.map_err(peer_failed)
                }
            }
        })
        .await
    }
}

fn lost() -> Error {
    Error::new(ErrorKind::Gone, "bench", "a session that was just stored is not there")
}

fn peer_failed(error: tower_sessions_core::session_store::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "bench", "the peer's store failed").with_source(error)
}

/// Runs `tasks` tasks for `length`, each in a loop of its own cycles.
async fn run<C, F>(tasks: usize, length: Duration, cycle_of: impl Fn(usize) -> C) -> Result<Round, Failure>
where
    C: Fn() -> F + Send + 'static,
    F: Future<Output = session_core::Result<()>> + Send + 'static,
{
    let start = Arc::new(Barrier::new(tasks));
    let mut running = JoinSet::new();
    for task in 0..tasks {
        let (start, cycle) = (start.clone(), cycle_of(task));
        running.spawn(async move {
            let mut waits = Vec::with_capacity(1 << 17);
            start.wait().await;
            let started = Instant::now();
            let end = started + length;
            let mut before = started;
            while before < end {
                cycle().await?;
                let now = Instant::now();
                waits.push(Round::nanos(now - before));
                before = now;
                // A cycle that never waits gives the other tasks of this thread no turn; a request that has ended does.
                if waits.len().is_multiple_of(8) && tasks > 1 {
                    tokio::task::yield_now().await;
                    before = Instant::now();
                }
            }
            Ok::<_, Error>(Round { elapsed: before - started, waits })
        });
    }
    let mut rounds = Vec::with_capacity(tasks);
    while let Some(ended) = running.join_next().await {
        rounds.push(ended.expect("a cycle does not panic")?);
    }
    Ok(Round::join(rounds))
}
