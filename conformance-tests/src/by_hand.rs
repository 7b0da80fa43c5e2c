//! Steps for the tests that a backend has of its own, where a server, a network or a setting is not as one would have it: open,
//! write, look, and what to say when a step goes wrong.
//!
//! The leases are so long that none ends during a test, and the waits so long that a busy machine does not end them: a lock that is
//! had was let go. Nothing here decides what is right; a test does.

use std::time::Duration;

use session_core::{
    Change, ErrorKind, Expect, OpenRequest, OpenSession, Record, Result, SessionHandler, SessionId, Ttl, WriteId, Written,
};

/// An opening.
pub type Opened = Box<dyn OpenSession>;

/// A lease that no test outlives: whoever gets in before its end was let in.
pub const LEASE: Duration = Duration::from_secs(60);

/// A wait that ends long before [`LEASE`] does, on a machine that is busy with other things.
pub const SOON: Duration = Duration::from_secs(20);

/// Returns a new id.
#[must_use]
pub fn new_id() -> SessionId {
    SessionId::generate().expect("the operating system has randomness")
}

/// Returns a new name for a write.
#[must_use]
pub fn wid() -> WriteId {
    WriteId::random().expect("the operating system has randomness")
}

/// Makes a record with a long life.
pub fn record(data: impl Into<Vec<u8>>) -> Record {
    Record::new(data, Ttl::from_secs(900))
}

/// Makes a change that writes such a record.
pub fn write_of(data: impl Into<Vec<u8>>) -> Change {
    Change::Write(record(data))
}

/// Asks for the lock, with a wait that is long enough unless it is kept until the end of its lease.
#[must_use]
pub fn exclusive() -> OpenRequest {
    OpenRequest::exclusive(SOON, LEASE)
}

/// The same with a lease that a test waits for.
#[must_use]
pub fn briefly(lease: Duration) -> OpenRequest {
    OpenRequest::exclusive(SOON, lease)
}

/// Asks for the lock once.
#[must_use]
pub fn at_once() -> OpenRequest {
    OpenRequest::exclusive(Duration::ZERO, LEASE)
}

/// Opens.
///
/// # Panics
/// If that is refused.
pub async fn open(handler: &dyn SessionHandler, id: &SessionId, request: OpenRequest) -> Opened {
    match handler.open(id, &request).await {
        Ok(opened) => opened,
        Err(error) => panic!("open as {request:?} was refused: {error:?}"),
    }
}

/// Creates a session.
///
/// # Panics
/// If that is refused.
pub async fn session(handler: &dyn SessionHandler, data: &str) -> SessionId {
    let id = new_id();
    let opened = open(handler, &id, exclusive().expecting(Expect::Fresh)).await;
    saved(opened, data).await;
    id
}

/// Saves and closes.
///
/// # Panics
/// Unless it is applied, by this request.
pub async fn saved(mut opened: Opened, data: &str) {
    let outcome = opened.save(&write_of(data), wid()).await;
    assert!(matches!(outcome, Ok(Written::Applied)), "a save that nothing stood against ended as {outcome:?}");
}

/// Saves and closes, and asks again under the same name as long as the store cannot be reached.
///
/// # Errors
/// What it was refused with in the end.
pub async fn save_in_the_end(opened: &mut Opened, data: &str) -> Result<Written> {
    let write = wid();
    let end = tokio::time::Instant::now() + SOON;
    loop {
        match opened.save(&write_of(data), write).await {
            Err(error) if error.kind() == ErrorKind::Unavailable && tokio::time::Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            outcome => return outcome,
        }
    }
}

/// Reads text; `None` if there is no record.
///
/// # Panics
/// If that is refused, or if it is no text.
pub async fn read(opened: &mut Opened) -> Option<String> {
    let record = opened.read().await.unwrap_or_else(|error| panic!("a read was refused: {error:?}"));
    record.map(|record| String::from_utf8(record.data).expect("tests write text"))
}

/// Reads without a lock; `None` if there is no record.
///
/// # Panics
/// As [`read`].
pub async fn look(handler: &dyn SessionHandler, id: &SessionId) -> Option<String> {
    read(&mut open(handler, id, OpenRequest::read_only()).await).await
}

/// Returns the kind of a refusal.
///
/// # Panics
/// If it was not refused.
#[track_caller]
pub fn kind<T>(outcome: Result<T>) -> ErrorKind {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.kind(),
    }
}

/// Waits for what happens without us.
///
/// # Panics
/// If it has not happened [soon](SOON).
pub async fn until(what: &str, mut happened: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + SOON;
    while !happened().await {
        assert!(tokio::time::Instant::now() < end, "{what}: it did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
