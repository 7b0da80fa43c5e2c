//! What is true of session files beyond the contract: whose files are touched, what a full disk, a damaged file, a killed writer
//! or a stopped holder leaves behind, and that waiting costs neither threads nor descriptors.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod admin;
mod child;
mod damage;
mod holders;
mod kept;
mod kills;
mod plants;
mod races;
mod room;
mod shape;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use session_core::{
    Change, Error, Expect, OpenRequest, OpenSession, Record, Result, SessionHandler, SessionId, Ttl, WriteId, Written,
};
use session_file::{Durability, FileConfig, FileHandler};
use tempfile::TempDir;

/// A wait that is long enough for everything but a lock that nobody gives back.
const PATIENT: Duration = Duration::from_secs(20);
const LEASE: Duration = Duration::from_secs(30);

/// A handler on a directory of its own, unsynced so that tests do not wait for the disk.
struct Store {
    dir: TempDir,
    handler: FileHandler,
}

impl Store {
    fn new() -> Self {
        Self::with(|config| config.with_durability(Durability::None))
    }

    fn with(change: impl FnOnce(FileConfig) -> FileConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let handler = FileHandler::open_dir(change(FileConfig::new(dir.path().join("sessions")))).unwrap();
        Self { dir, handler }
    }

    fn path(&self) -> PathBuf {
        self.handler.config().dir.clone()
    }

    fn file(&self, id: &SessionId) -> PathBuf {
        self.path().join(id.as_str())
    }

    /// Another handler on the same directory, as another process would have it.
    fn again(&self) -> FileHandler {
        FileHandler::open_dir(self.handler.config().clone()).unwrap()
    }

    /// The names in the directory.
    fn names(&self) -> Vec<String> {
        names(&self.path())
    }
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn new_id() -> SessionId {
    SessionId::generate().unwrap()
}

fn wid() -> WriteId {
    WriteId::random().unwrap()
}

fn record(data: impl Into<Vec<u8>>) -> Record {
    Record::new(data, Ttl::from_secs(3600))
}

fn brief(data: impl Into<Vec<u8>>) -> Record {
    Record::new(data, Ttl::new(Duration::from_millis(1)))
}

fn patient() -> OpenRequest {
    OpenRequest::exclusive(PATIENT, LEASE)
}

fn at_once() -> OpenRequest {
    OpenRequest::exclusive(Duration::ZERO, LEASE)
}

async fn open(handler: &dyn SessionHandler, id: &SessionId, request: OpenRequest) -> Box<dyn OpenSession> {
    handler.open(id, &request).await.unwrap()
}

/// Creates a session with this record.
async fn create(handler: &dyn SessionHandler, record: Record) -> SessionId {
    let id = new_id();
    let mut session = open(handler, &id, patient().expecting(Expect::Fresh)).await;
    assert_eq!(session.save(&Change::Write(record), wid()).await.unwrap(), Written::Applied);
    id
}

/// Opens exclusively, writes and closes.
async fn put(handler: &dyn SessionHandler, id: &SessionId, data: impl Into<Vec<u8>>) {
    let mut session = open(handler, id, patient()).await;
    session.save(&Change::Write(record(data)), wid()).await.unwrap();
}

async fn view(handler: &dyn SessionHandler, id: &SessionId) -> Result<Option<Vec<u8>>> {
    let mut session = handler.open(id, &OpenRequest::read_only()).await?;
    Ok(session.read().await?.map(|record| record.data))
}

async fn destroy(handler: &dyn SessionHandler, id: &SessionId) -> Result<Option<Vec<u8>>> {
    let mut session = handler.open(id, &OpenRequest::destroy()).await?;
    Ok(session.destroy().await?.map(|record| record.data))
}

/// Fails if the text of an error has the id in it.
#[track_caller]
fn tells_no_id(error: &Error, id: &SessionId) {
    let text = format!("{error} {error:?}");
    assert!(!text.contains(id.as_str()), "an error shows an id");
}
