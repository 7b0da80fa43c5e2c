//! The handler: what each access does with a session file, and what becomes of an opening.
//!
//! What stands in a file is not known here; see [`layout`](crate::layout).

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use session_core::{
    Access, Change, Error, ErrorKind, Expect, Held, OpenRequest, OpenSession, Record, Result, SessionAdmin, SessionHandler,
    SessionId, Ttl, WriteId, Written,
};

use crate::admin;
use crate::config::{Durability, FileConfig, Io};
use crate::dir::{Plain, Walk, fault, stat};
use crate::io::{
    Begun, Manner, Opened, SMALL, SessionFile, Turn, Unsynced, destroy, gone, load, mark_waiting, peek_absent, too_large,
};
use crate::lock::{FileLock, Half, Hold, timed_out};
use crate::store::{Store, now, pooled, run};
use crate::wait::{Attempt, deadline, in_line};

/// How many openings, each on a thread of its own, refer to nothing that another one changes. A count of references or of readers
/// that two processors change in turn costs either as much as a call to the kernel.
const LANES: usize = 16;

thread_local! {
    /// The number of this thread.
    static LANE: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    };
}

/// Keeps sessions in files, one each, under kernel locks. Cloning it is cheap.
///
/// See the [crate](crate) for what it may lose. It needs a tokio runtime with time and I/O enabled.
#[derive(Clone)]
pub struct FileHandler {
    pub(crate) store: Arc<Store>,
    lanes: Arc<[Arc<FileLock>]>,
    /// Where the last collection stopped.
    walk: Arc<Mutex<Option<Walk>>>,
    pub(crate) listing: Arc<Mutex<Option<admin::Listing>>>,
}

impl FileHandler {
    /// Opens the directory of `config`. It is created, with mode 0700, if its parent is there.
    ///
    /// ```no_run
    /// use session_file::{Durability, FileConfig, FileHandler};
    /// let config = FileConfig::new("/var/lib/app/sessions").with_durability(Durability::None);
    /// let handler = FileHandler::open_dir(config)?;
    /// # Ok::<(), session_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if the directory belongs to somebody else, others may write to it, it is missing with its
    /// parent, or its file system has no kernel locks; the text has the command that mends it.
    pub fn open_dir(config: FileConfig) -> Result<Self> {
        let store = Arc::new(Store::open(config)?);
        let lanes: Result<Vec<_>> = (1..LANES).map(|_| Ok(FileLock::on(Arc::new(store.another()?)))).collect();
        let lanes = lanes?.into_iter().chain([FileLock::on(Arc::clone(&store))]).map(Arc::new).collect();
        Ok(Self { store, lanes, walk: Arc::default(), listing: Arc::default() })
    }

    /// Returns a lock on files of its own in the same directory, for [`Locked`](https://docs.rs/session-core) or on its own.
    #[must_use]
    pub fn lock(&self) -> FileLock {
        FileLock::on(Arc::clone(&self.store))
    }

    /// Returns the settings.
    #[must_use]
    pub fn config(&self) -> &FileConfig {
        &self.store.config
    }

    /// Returns what an opening on this thread refers to.
    fn lane(&self) -> &Arc<FileLock> {
        &self.lanes[LANE.with(|number| number % LANES)]
    }

    async fn exclusive(
        store: &Arc<Store>,
        id: &SessionId,
        expect: Expect,
        wait: Duration,
        lease: Duration,
    ) -> Result<Opened> {
        let io = store.config.io;
        let manner = Manner { existing: expect == Expect::Existing, lease, turn: Turn::Newcomer };
        // What seldom happens is boxed: all would carry the state for it.
        let attempt = if pooled(io, false) {
            let (store, id) = (Arc::clone(store), id.clone());
            Box::pin(run(io, false, move || SessionFile::open(&store, &id, None, manner))).await??
        } else {
            SessionFile::open(store, id, None, manner)?
        };
        match attempt {
            Attempt::Done(opened) => Ok(opened),
            Attempt::Busy { file, .. } => Box::pin(stand_in_line(store, id, file, manner, wait)).await,
        }
    }
}

impl fmt::Debug for FileHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileHandler").field("config", &self.store.config).finish_non_exhaustive()
    }
}

#[async_trait]
impl SessionHandler for FileHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let lock = self.lane();
        lock.store.dir.kept.tend();
        let mut session = FileSession {
            lock: Arc::clone(lock),
            id: id.clone(),
            request: *request,
            mode: Mode::Absent,
            base: None,
            fetched: None,
            unsure: None,
        };
        match (request.access, request.expect) {
            (Access::Destroy, _) => session.mode = Mode::Destroy,
            (Access::ReadOnly, Expect::Fresh) => session.mode = Mode::View,
            (_, Expect::Fresh) => session.mode = Mode::Fresh,
            (Access::Exclusive { wait, lease }, expect) => {
                if let Some((file, record)) = Self::exclusive(&lock.store, id, expect, wait, lease).await? {
                    session.mode = Mode::Held(Hold::new(file, lease));
                    session.fetched = Some(record.map(|(record, _)| record));
                }
            }
            (access @ (Access::ReadOnly | Access::Optimistic), _) => {
                let record = Box::pin(peek_at(&lock.store, id)).await?;
                session.mode = if access == Access::ReadOnly { Mode::View } else { Mode::Optimistic };
                session.base = record.as_ref().map(|(_, write)| *write);
                session.fetched = Some(record.map(|(record, _)| record));
            }
        }
        Ok(Box::new(session))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        let this = self.clone();
        run(self.store.config.io, true, move || admin::collect(&this.store, &this.walk, limit)).await?
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        Some(self)
    }
}

/// What an opening can do, which changes as it goes on.
enum Mode {
    /// It has the lock.
    Held(Hold),
    /// Nobody else knows the id, and nothing was written yet.
    Fresh,
    Optimistic,
    View,
    Destroy,
    /// The id was absent and may not be created, or was destroyed through this opening.
    Absent,
    /// It was closed, or ended with an error of this kind.
    Spent(Option<ErrorKind>),
}

struct FileSession {
    lock: Arc<FileLock>,
    id: SessionId,
    request: OpenRequest,
    mode: Mode,
    /// The write that an optimistic opening is based on.
    base: Option<WriteId>,
    /// What `open` fetched and nobody has read yet.
    fetched: Option<Option<Record>>,
    /// A write of this id went out and nobody knows what became of it.
    unsure: Option<WriteId>,
}

impl fmt::Debug for FileSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            Mode::Held(_) => "held",
            Mode::Fresh => "fresh",
            Mode::Optimistic => "optimistic",
            Mode::View => "view",
            Mode::Destroy => "destroy",
            Mode::Absent => "absent",
            Mode::Spent(_) => "spent",
        };
        f.debug_struct("FileSession").field("mode", &mode).finish_non_exhaustive()
    }
}

/// One change of a record.
enum Step<'a> {
    Write(Cow<'a, [u8]>, Ttl, WriteId),
    Touch(Ttl),
}

impl Step<'_> {
    fn write(record: &Record, id: WriteId) -> Step<'_> {
        Step::Write(Cow::Borrowed(&record.data), record.ttl, id)
    }

    fn op(&self) -> &'static str {
        match self {
            Self::Write(..) => "write",
            Self::Touch(_) => "touch",
        }
    }

    fn begin(&self, file: &mut SessionFile) -> Result<Begun> {
        match self {
            Self::Write(data, ttl, id) => file.begin_write(data, *ttl, *id),
            Self::Touch(ttl) => file.begin_touch(*ttl),
        }
    }

    fn apply(&self, file: &mut SessionFile) -> Result<Written> {
        match self {
            Self::Write(data, ttl, id) => file.write(data, *ttl, *id),
            Self::Touch(ttl) => file.touch(*ttl),
        }
    }

    /// Makes one that can go to another thread.
    fn into_owned(self) -> Step<'static> {
        match self {
            Self::Write(data, ttl, id) => Step::Write(Cow::Owned(data.into_owned()), ttl, id),
            Self::Touch(ttl) => Step::Touch(ttl),
        }
    }

    fn write_id(&self) -> Option<WriteId> {
        match self {
            Self::Write(_, _, id) => Some(*id),
            Self::Touch(_) => None,
        }
    }

    /// Whether it may wait for the disk.
    fn is_heavy(&self, store: &Store) -> bool {
        store.config.durability >= Durability::Data || !self.is_small()
    }

    fn is_small(&self) -> bool {
        !matches!(self, Self::Write(data, ..) if data.len() > SMALL)
    }
}

/// Applies a step under the lock and keeps the file if the opening goes on.
fn carry_out(step: &Step<'_>, mut file: Box<SessionFile>, last: bool) -> (Option<Box<SessionFile>>, Result<Written>) {
    let outcome = step.apply(&mut file);
    keep(file, outcome, last)
}

/// Keeps the file if the opening goes on after this.
fn keep(file: Box<SessionFile>, outcome: Result<Written>, last: bool) -> (Option<Box<SessionFile>>, Result<Written>) {
    let kept = match &outcome {
        Ok(_) if last => {
            file.give_back();
            return (None, outcome);
        }
        Ok(_) => true,
        Err(error) if error.kind().keeps_opening() => true,
        Err(_) => {
            file.bury();
            false
        }
    };
    (kept.then_some(file), outcome)
}

/// What of a step is left to the disk.
enum Left {
    All(Step<'static>),
    Sync(Unsynced),
}

async fn step_held(store: &Store, hold: &mut Hold, step: Step<'_>, last: bool) -> Result<Written> {
    let (io, heavy) = (store.config.io, step.is_heavy(store));
    let outcome = match io {
        _ if !pooled(io, heavy) => hold.in_place(|file| carry_out(&step, file, last)).await,
        Io::Auto => Box::pin(step_in_two(store, hold, step, last)).await?,
        _ => {
            let step = step.into_owned();
            hold.run(io, heavy, move |file| carry_out(&step, file, last)).await?
        }
    };
    outcome.unwrap_or_else(|| Err(gone("write")))
}

/// Writes in place, which only touches the page cache, and leaves it to another thread to wait for the disk.
async fn step_in_two(store: &Store, hold: &mut Hold, step: Step<'_>, last: bool) -> Result<Option<Result<Written>>> {
    let op = step.op();
    let begin = |mut file: Box<SessionFile>| {
        if !step.is_small() || !file.is_settled() {
            return Half::Begun(file, Left::All(step.into_owned()));
        }
        let outcome = match step.begin(&mut file) {
            Ok(Begun::Unsynced(unsynced)) => {
                if store.threads.are_behind() {
                    file.begin_sync();
                }
                return Half::Begun(file, Left::Sync(unsynced));
            }
            Ok(Begun::Done(written)) => Ok(written),
            Err(error) => Err(error),
        };
        let (file, outcome) = keep(file, outcome, last);
        Half::Whole(file, outcome)
    };
    let finish = move |mut file: Box<SessionFile>, left| match left {
        Left::All(step) => carry_out(&step, file, last),
        Left::Sync(unsynced) => {
            let outcome = file.finish(Begun::Unsynced(unsynced), op);
            keep(file, outcome, last)
        }
    };
    hold.in_two(&store.threads, begin, finish).await
}

impl FileSession {
    /// Carries out one step in whatever mode the opening is, and closes afterwards if `last`.
    async fn step(&mut self, step: Step<'_>, last: bool) -> Result<Written> {
        let op = step.op();
        if let Step::Write(data, ..) = &step {
            too_large(&self.lock.store, data.len(), op)?;
        }
        let write = step.write_id();
        let outcome = match &mut self.mode {
            Mode::Held(hold) => step_held(&self.lock.store, hold, step, last).await,
            Mode::Fresh => Box::pin(self.step_fresh(step.into_owned(), last, op)).await,
            Mode::Optimistic => Box::pin(self.step_optimistic(step.into_owned(), op)).await,
            Mode::View | Mode::Destroy => return Err(unsupported(op)),
            Mode::Absent => Err(gone(op)),
            Mode::Spent(Some(kind)) => return Err(Error::new(*kind, op, "this opening has ended with an error before")),
            Mode::Spent(None) => return Err(Error::new(ErrorKind::Gone, op, "this opening is closed")),
        };
        match outcome {
            Ok(written) => {
                self.unsure = None;
                self.fetched = None;
                if last {
                    self.mode = Mode::Spent(None);
                }
                Ok(written)
            }
            Err(error) if error.kind().keeps_opening() => {
                if error.kind() == ErrorKind::Unknown {
                    self.unsure = write;
                }
                Err(error)
            }
            Err(error) => {
                self.mode = Mode::Spent(Some(error.kind()));
                // It may have been applied, and overtaken since.
                let unsure = self.unsure.is_some() && self.unsure == write;
                Err(if unsure { error.with_kind(ErrorKind::Unknown) } else { error })
            }
        }
    }

    async fn step_fresh(&mut self, step: Step<'static>, last: bool, op: &'static str) -> Result<Written> {
        let (store, id) = (Arc::clone(&self.lock.store), self.id.clone());
        let Some(write) = step.write_id() else { return Err(gone(op)) };
        let lease = match self.request.access {
            Access::Exclusive { lease, .. } if !last => Some(lease),
            _ => None,
        };
        let heavy = step.is_heavy(&store);
        let work = move || -> Result<_> {
            let mut file = match SessionFile::create(&store, &id)? {
                Some(file) => file,
                // Taken; by ourselves, if a write before this one was applied without our learning of it.
                None => match SessionFile::open(&store, &id, None, Manner::PASSING)? {
                    Attempt::Done(Some((file, _))) if file.last_write() == Some(write) => file,
                    _ => return Err(Error::new(ErrorKind::Conflict, op, "the id is taken; nothing was stored")),
                },
            };
            let written = step.apply(&mut file)?;
            Ok((written, lease.is_some().then_some(file)))
        };
        let (written, file) = run(self.lock.store.config.io, heavy, work).await??;
        self.base = Some(write);
        self.mode = match (file, lease) {
            (Some(file), Some(lease)) => Mode::Held(Hold::new(file, lease)),
            _ => Mode::Optimistic,
        };
        Ok(written)
    }

    async fn step_optimistic(&mut self, step: Step<'static>, op: &'static str) -> Result<Written> {
        let (store, id, base) = (Arc::clone(&self.lock.store), self.id.clone(), self.base);
        let may_create = self.request.expect != Expect::Existing && base.is_none();
        let (heavy, write) = (step.is_heavy(&store), step.write_id());
        let work = move || -> Result<Written> {
            let conflict = |text| Err(Error::new(ErrorKind::Conflict, op, text));
            let mut file = match SessionFile::open(&store, &id, None, Manner::PASSING)? {
                Attempt::Done(Some((file, _))) => file,
                Attempt::Busy { file, .. } if !may_create && peek_absent(&file) => return Err(gone(op)),
                Attempt::Busy { .. } => return conflict("somebody else holds the session; nothing was stored"),
                Attempt::Done(None) if may_create && write.is_some() => match SessionFile::create(&store, &id)? {
                    Some(file) => file,
                    None => return conflict("somebody else created the session meanwhile; nothing was stored"),
                },
                Attempt::Done(None) => return Err(gone(op)),
            };
            let last = file.last_write();
            if last != base && (last.is_none() || last != write) {
                return conflict("the session was changed meanwhile; nothing was stored");
            }
            step.apply(&mut file)
        };
        let written = run(self.lock.store.config.io, heavy, work).await??;
        self.base = write.or(base);
        Ok(written)
    }

    async fn release(&mut self) -> Result<()> {
        if let Mode::Held(hold) = &mut self.mode {
            let close = |file: Box<SessionFile>| {
                file.give_back();
                (None, ())
            };
            hold.run(self.lock.store.config.io, false, close).await?;
        }
        if !matches!(self.mode, Mode::Spent(Some(_))) {
            self.mode = Mode::Spent(None);
        }
        self.fetched = None;
        Ok(())
    }
}

#[async_trait]
impl OpenSession for FileSession {
    async fn read(&mut self) -> Result<Option<Record>> {
        const OP: &str = "read";
        let fetched = self.fetched.take();
        match &mut self.mode {
            Mode::Destroy => Err(unsupported(OP)),
            Mode::Spent(Some(kind)) => Err(Error::new(*kind, OP, "this opening has ended with an error before")),
            Mode::Spent(None) => Err(Error::new(ErrorKind::Gone, OP, "this opening is closed")),
            Mode::Fresh | Mode::Absent => Ok(None),
            _ if fetched.is_some() => Ok(fetched.flatten()),
            Mode::Held(hold) => {
                let read = hold.run(self.lock.store.config.io, false, |mut file| {
                    let record = file.read();
                    (Some(file), record)
                });
                let record = read.await?.unwrap_or_else(|| Err(gone(OP)))?;
                Ok(record.map(|(record, _)| record))
            }
            Mode::View | Mode::Optimistic => {
                let record = Box::pin(peek_at(&self.lock.store, &self.id)).await?;
                self.base = record.as_ref().map(|(_, write)| *write);
                Ok(record.map(|(record, _)| record))
            }
        }
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        self.step(Step::write(record, id), false).await
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        const OP: &str = "destroy";
        match &self.mode {
            Mode::View => return Err(unsupported(OP)),
            Mode::Spent(None) => return Err(Error::new(ErrorKind::Gone, OP, "this opening is closed")),
            _ => {}
        }
        let heavy = self.lock.store.config.durability >= Durability::Data;
        self.fetched = None;
        let mode = std::mem::replace(&mut self.mode, Mode::Absent);
        if let Mode::Held(mut hold) = mode
            && let Some(removed) = hold.run(self.lock.store.config.io, heavy, |file| (None, file.destroy())).await?
        {
            return removed;
        }
        let (store, id) = (Arc::clone(&self.lock.store), self.id.clone());
        run(self.lock.store.config.io, heavy, move || destroy(&store, &id)).await?
    }

    async fn close(&mut self) -> Result<()> {
        self.release().await
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        self.step(Step::Touch(ttl), false).await
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        let outcome = match change {
            Change::Write(record) => self.step(Step::write(record, id), true).await,
            Change::Touch(ttl) => self.step(Step::Touch(*ttl), true).await,
            Change::Destroy => self.destroy().await.map(|_| Written::Applied),
            Change::Nothing => return self.release().await.map(|()| Written::Applied),
        };
        if outcome.as_ref().err().is_none_or(|error| !error.kind().keeps_opening()) {
            self.release().await?;
        }
        outcome
    }

    fn held(&self) -> Option<&Held> {
        match &self.mode {
            Mode::Held(hold) => Some(hold.held(&self.lock, &self.id)),
            _ => None,
        }
    }
}

impl Drop for FileSession {
    fn drop(&mut self) {
        if let Mode::Held(hold) = &self.mode {
            hold.abandon();
        }
    }
}

async fn stand_in_line(store: &Arc<Store>, id: &SessionId, file: File, manner: Manner, wait: Duration) -> Result<Opened> {
    let until = deadline(wait);
    // Whoever expects a session need not wait for one that is not there any more.
    let absent = move |file: &File| (manner.existing && peek_absent(file)).then_some(None);
    if let Some(opened) = absent(&file) {
        return Ok(opened);
    }
    if wait.is_zero() {
        return Err(timed_out("open", &file, wait));
    }
    let mark = move |file: &File| mark_waiting(file, wait);
    let (shared, id) = (Arc::clone(store), id.clone());
    let attempt = move |file| match SessionFile::open(&shared, &id, Some(file), Manner { turn: Turn::First, ..manner })? {
        Attempt::Busy { file, .. } if absent(&file).is_some() => Ok(Attempt::Done(None)),
        attempt => Ok(attempt),
    };
    let waited = in_line(&store.watch, store.config.io, file, until, attempt, absent, mark).await?;
    waited.map_err(|file| timed_out("open", &file, wait))
}

/// Reads the last committed state, without a lock.
async fn peek_at(store: &Arc<Store>, id: &SessionId) -> Result<Option<(Record, WriteId)>> {
    const OP: &str = "read";
    let (io, store, id) = (store.config.io, Arc::clone(store), id.clone());
    let work = move || -> Result<_> {
        let name = store.dir.name(&id);
        loop {
            let Some(file) = store.dir.open_file(&name, false, OP)? else { return Ok(None) };
            let stat = stat(&file).map_err(|cause| fault(OP, cause))?;
            match store.dir.judge(&stat, OP)? {
                Plain::Ours if stat.dead => return Ok(None),
                Plain::Ours => return Ok(load(&file, false, OP)?.live(now())),
                Plain::Foreign => return Ok(None),
                Plain::Unlinked => {}
            }
        }
    };
    run(io, false, work).await?
}

fn unsupported(op: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, op, "this access does not allow it; open the session exclusively or optimistically")
}
