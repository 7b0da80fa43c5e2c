//! The steps that cases are made of: open, write, look, overtake, and what to say when a step goes wrong.
//!
//! Nothing here decides what is right; a case does.

use std::num::NonZeroU32;
use std::time::{Duration, Instant, SystemTime};

use session_core::{
    Change, Cursor, Error, ErrorKind, Expect, OpenRequest, OpenSession, Record, Result, SessionHandler, SessionId, Ttl,
    WriteId, Written,
};

use crate::harness::Env;

/// An opening.
pub(crate) type Opened = Box<dyn OpenSession>;

/// What a write may be refused with if it is not known whether somebody took over, wrote or destroyed.
pub(crate) const LATE: &[ErrorKind] = &[ErrorKind::Fenced, ErrorKind::Gone];

/// The same for a holder that found nothing: where the lock is a layer's, the first create wins and the other is a conflict.
pub(crate) const LATE_CREATE: &[ErrorKind] = &[ErrorKind::Fenced, ErrorKind::Gone, ErrorKind::Conflict];

/// What is soon, on a machine that is busy with other things.
pub(crate) const SOON: Duration = Duration::from_secs(3);

/// A life that outlasts every case.
pub(crate) const LONG: Duration = Duration::from_secs(900);

/// How long a part that asks again and again does so without a rest: on a quick store, all of the case.
const SPRINT: Duration = Duration::from_millis(100);

/// For how long it then asks before it rests for as long, in milliseconds. Twice that is the shortest time that a case leaves to it.
const BURST: u64 = 4;

/// The pace of a part that asks again and again and waits for nothing. After a while it rests half of the time, and so do all such
/// parts of the machine at the same moment.
///
/// Without, a few cases at a time keep every processor busy until they end. Linux that shares processors between sessions or control
/// groups (seen with 6.18 and `kernel.sched_autogroup_enabled`) may then run no thread of its own for as long, not even what
/// completes the writes to a disk: the save that a case waits for ends when the case has given it up.
pub(crate) struct Pace(Instant);

impl Pace {
    pub(crate) fn begin() -> Self {
        Self(Instant::now())
    }

    /// Gives way between two rounds, or rests.
    pub(crate) async fn next(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let at = u64::try_from(now.as_millis()).unwrap_or(0) % (2 * BURST);
        if at < BURST || self.0.elapsed() < SPRINT {
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(Duration::from_millis(2 * BURST - at)).await;
        }
    }
}

/// Returns a new id.
pub(crate) fn new_id() -> SessionId {
    SessionId::generate().expect("the operating system has randomness")
}

/// Returns a new name for a write.
pub(crate) fn wid() -> WriteId {
    WriteId::random().expect("the operating system has randomness")
}

/// Makes a record with a long life.
pub(crate) fn record(data: impl Into<Vec<u8>>) -> Record {
    Record::new(data, Ttl::new(LONG))
}

/// Makes a record with this life.
pub(crate) fn living(data: impl Into<Vec<u8>>, life: Duration) -> Record {
    Record::new(data, Ttl::new(life))
}

/// A limit of `n`.
pub(crate) fn up_to(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).expect("no case asks for nothing")
}

impl Env {
    /// Asks for the lock with time enough for everything but a lock that is kept for ever.
    pub(crate) fn patient(&self) -> OpenRequest {
        OpenRequest::exclusive(Duration::from_secs(10) + self.tick() * 20, self.lease())
    }

    /// Asks for the lock once.
    pub(crate) fn at_once(&self) -> OpenRequest {
        OpenRequest::exclusive(Duration::ZERO, self.lease())
    }

    /// Asks for a lock that a case lets run out.
    pub(crate) fn briefly(&self) -> OpenRequest {
        OpenRequest::exclusive(Duration::from_secs(10) + self.tick() * 20, self.short())
    }

    /// A lease that does not end while a case works at its usual pace.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(30) + self.tick() * 30
    }

    /// A lease, or a life, that is meant to end.
    pub(crate) fn short(&self) -> Duration {
        self.tick() * 3
    }

    /// Waits until a lease of this length has ended for certain.
    pub(crate) async fn outlast(&self, lease: Duration) {
        tokio::time::sleep(lease + self.tick() * 2 + Duration::from_millis(20)).await;
    }

    /// Waits until a record with this life is dead for certain: a store may round up, and by no more than a second.
    pub(crate) async fn outlive(&self, life: Duration) {
        tokio::time::sleep(life + self.rounding()).await;
    }

    /// How much longer than its life a record may live, and a little.
    pub(crate) fn rounding(&self) -> Duration {
        // A server that counts seconds counts them late while others have the processor.
        let late = Duration::from_millis(30).max(self.tick() / 5);
        self.tick().min(Duration::from_secs(1)) + late
    }

    /// Waits for some ticks.
    pub(crate) async fn ticks(&self, n: u32) {
        tokio::time::sleep(self.tick() * n).await;
    }

    /// Whether the lock of this holder has no time limit.
    pub(crate) fn is_endless(&self, holder: &Opened) -> bool {
        !self.leases_end() || holder.held().is_none()
    }

    /// Waits for the lease of a holder to end and takes the session over. `None` if the holder's lock is `endless`, without a
    /// time limit, and it still holds the session.
    pub(crate) async fn overtake(
        &self,
        handler: &dyn SessionHandler,
        id: &SessionId,
        endless: bool,
        expect: Expect,
    ) -> Option<Opened> {
        let wait = if endless { self.short() + self.tick() * 2 } else { self.short() * 2 + Duration::from_secs(5) };
        match handler.open(id, &OpenRequest::exclusive(wait, self.lease()).expecting(expect)).await {
            Ok(opened) => Some(opened),
            Err(error) if endless && error.kind() == ErrorKind::LockTimeout => None,
            Err(error) => panic!("the lease of the holder ended, and the next opener was refused: {error:?}"),
        }
    }
}

/// Opens, and fails the case if that is refused.
pub(crate) async fn open(handler: &dyn SessionHandler, id: &SessionId, request: OpenRequest) -> Opened {
    match handler.open(id, &request).await {
        Ok(opened) => opened,
        Err(error) => panic!("open as {request:?} was refused: {error:?}"),
    }
}

/// Opens and reads.
pub(crate) async fn open_read(
    handler: &dyn SessionHandler,
    id: &SessionId,
    request: OpenRequest,
) -> (Opened, Option<Vec<u8>>) {
    let mut opened = open(handler, id, request).await;
    let data = read(&mut opened).await;
    (opened, data)
}

/// Reads through an opening.
pub(crate) async fn read(opened: &mut Opened) -> Option<Vec<u8>> {
    match opened.read().await {
        Ok(record) => record.map(|record| record.data),
        Err(error) => panic!("a read was refused: {error:?}"),
    }
}

/// Writes with a long life and under a new name.
pub(crate) async fn write(opened: &mut Opened, data: impl Into<Vec<u8>>) -> Result<Written> {
    opened.write(&record(data), wid()).await
}

/// Writes, and fails the case unless it is applied.
pub(crate) async fn written(opened: &mut Opened, data: impl Into<Vec<u8>>) {
    applied(write(opened, data).await, "a write that nothing stood against");
}

/// Fails the case unless this is the outcome of a change that this call applied.
#[track_caller]
pub(crate) fn applied(outcome: Result<Written>, what: &str) {
    match outcome {
        Ok(Written::Applied) => {}
        other => panic!("{what} ended as {other:?}, not as applied"),
    }
}

/// Fails the case unless the outcome is a refusal of one of these kinds.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(outcome: Result<T>, kinds: &[ErrorKind], what: &str) -> Error {
    match outcome {
        Err(error) if kinds.contains(&error.kind()) => error,
        other => panic!("{what} ended as {other:?}, not as one of {kinds:?}"),
    }
}

/// Closes, and fails the case if that fails.
pub(crate) async fn close(mut opened: Opened) {
    if let Err(error) = opened.close().await {
        panic!("close failed: {error:?}");
    }
}

/// Saves with a long life, and fails the case unless it is applied.
pub(crate) async fn saved(mut opened: Opened, data: impl Into<Vec<u8>>) {
    applied(opened.save(&Change::Write(record(data)), wid()).await, "a save that nothing stood against");
}

/// Creates over what was destroyed, under the lock of `opened`, where the handler can do that; says whether it did.
pub(crate) async fn recreated(env: &Env, mut opened: Opened, data: &str) -> bool {
    let outcome = opened.save(&Change::Write(record(data)), wid()).await;
    if env.recreates_destroyed() {
        applied(outcome, "a create under the lock, over what was destroyed");
        return true;
    }
    match outcome {
        Ok(Written::Applied) => true,
        Err(error) if error.kind() == ErrorKind::Conflict => false,
        other => panic!("a create over what was destroyed ended as {other:?}"),
    }
}

/// Creates a session with this record.
pub(crate) async fn create(env: &Env, handler: &dyn SessionHandler, record: Record) -> SessionId {
    let id = new_id();
    let mut opened = open(handler, &id, env.patient().expecting(Expect::Fresh)).await;
    applied(opened.save(&Change::Write(record), wid()).await, "the first save of a fresh id");
    id
}

/// Creates a session with these bytes and a long life.
pub(crate) async fn session(env: &Env, handler: &dyn SessionHandler, data: impl Into<Vec<u8>>) -> SessionId {
    create(env, handler, record(data)).await
}

/// Destroys without a lock and returns what was removed.
pub(crate) async fn destroy(handler: &dyn SessionHandler, id: &SessionId) -> Option<Vec<u8>> {
    let mut opened = open(handler, id, OpenRequest::destroy()).await;
    let removed = opened.destroy().await.unwrap_or_else(|error| panic!("a destroy was refused: {error:?}"));
    close(opened).await;
    removed.map(|record| record.data)
}

/// Opens for reading and returns the record, if there is one.
pub(crate) async fn look_whole(handler: &dyn SessionHandler, id: &SessionId) -> Option<Record> {
    let mut view = open(handler, id, OpenRequest::read_only()).await;
    let record = view.read().await.unwrap_or_else(|error| panic!("a read without a lock failed: {error:?}"));
    close(view).await;
    record
}

/// Opens for reading and returns the bytes of the record, if there is one.
pub(crate) async fn look(handler: &dyn SessionHandler, id: &SessionId) -> Option<Vec<u8>> {
    look_whole(handler, id).await.map(|record| record.data)
}

/// Fails the case unless the session has these bytes, for every way of looking.
pub(crate) async fn holds(handler: &dyn SessionHandler, id: &SessionId, data: impl AsRef<[u8]>, when: &str) {
    let seen = look(handler, id).await;
    let data = data.as_ref();
    assert!(seen.as_deref() == Some(data), "{when} the session has {}, not {}", shown(seen.as_deref()), shown(Some(data)));
}

/// Fails the case unless the session is absent.
pub(crate) async fn absent(handler: &dyn SessionHandler, id: &SessionId, when: &str) {
    let seen = look(handler, id).await;
    assert!(seen.is_none(), "{when} the session has {}, and should be absent", shown(seen.as_deref()));
}

/// Shows bytes of a case in few words.
pub(crate) fn shown(data: Option<&[u8]>) -> String {
    match data {
        None => "nothing".into(),
        Some(data) if data.len() <= 40 => format!("{:?}", String::from_utf8_lossy(data)),
        Some(data) => format!("{} bytes from {:?} on", data.len(), String::from_utf8_lossy(&data[..20])),
    }
}

/// Reads a counter; absent is zero.
pub(crate) fn count(data: Option<&[u8]>) -> u64 {
    data.map_or(0, |data| {
        std::str::from_utf8(data).ok().and_then(|text| text.parse().ok()).expect("only counters are written")
    })
}

/// Lists everything, if this store can be listed.
pub(crate) async fn listing(handler: &dyn SessionHandler, page: u32) -> Option<Vec<SessionId>> {
    let admin = handler.admin()?;
    let mut ids = Vec::new();
    let mut after: Option<Cursor> = None;
    loop {
        let part = admin.list(after.as_ref(), up_to(page)).await;
        let part = part.unwrap_or_else(|error| panic!("listing failed: {error:?}"));
        ids.extend(part.sessions.into_iter().map(|session| session.id));
        after = Some(match part.next {
            Some(next) => next,
            None => return Some(ids),
        });
        assert!(ids.len() < 100_000, "the listing has no end");
    }
}
