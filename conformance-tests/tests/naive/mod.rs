//! A store as people write it in an afternoon, files in a directory, with a lock of its own: honest in two ways, or broken in
//! one of many. It shows that the cases and the hammer find what they are there to find.
//!
//! It knows no layers, no renewal and no collector, and it is not fast.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use conformance_tests::Harness;
use session_core::{
    Access, Error, ErrorKind, Expect, Holder, LeaseToken, OpenRequest, OpenSession, Record, Result, SessionHandler,
    SessionId, Ttl, WriteId, Written, async_trait,
};

/// How the store keeps its locks, and what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naive {
    /// Honest: the kernel's lock on a file.
    Flock,
    /// Honest: a file with a token and a deadline.
    Lease,
    /// Locks nothing and writes whatever it is given.
    NoLock,
    /// Takes an expired lease over and lets the former holder write all the same.
    LateWrites,
    /// A lease never ends.
    ImmortalLock,
    /// Waiters draw a ticket, and only the lowest one is served, dead or alive.
    DeadTickets,
    /// Writes in place, piece by piece.
    TornWrites,
    /// A view is now and then answered from what the process has seen before.
    StaleViews,
    /// A write recreates what was destroyed.
    Resurrects,
    /// Waiters look again every three seconds.
    SleepyWaiters,
    /// A process keeps the lock after a release, for its own next opening.
    KeepsForItself,
    /// An exclusive open does not prolong the life of the record.
    GcForgetsHolders,
    /// Collecting removes the locks.
    GcSweepsLocks,
    /// A waiter whose time is up removes the lock.
    LosersUnlock,
    /// Closing removes the lock, whoever it belongs to.
    UnlocksAnybodys,
    /// A write is acknowledged first and stored a little later.
    WriteBehind,
    /// An absent id is not locked, and may be created by everybody who found it absent.
    CreatesTwice,
}

impl Naive {
    fn fences(self) -> bool {
        !matches!(self, Self::NoLock | Self::LateWrites)
    }

    fn poll(self) -> Duration {
        if self == Self::SleepyWaiters { Duration::from_secs(3) } else { Duration::from_millis(2) }
    }
}

/// Makes handlers on a directory named after the namespace, and removes it at the end.
#[derive(Debug)]
pub(crate) struct NaiveHarness {
    naive: Naive,
    worker: Option<&'static str>,
    directories: Mutex<Vec<PathBuf>>,
}

/// Tells a worker process which flaw it has.
const FLAW: &str = "SESSIONKIT_NAIVE";

impl NaiveHarness {
    pub(crate) fn new(naive: Naive) -> Self {
        Self { naive, worker: None, directories: Mutex::default() }
    }

    /// Starts its workers as `test` of this executable, which has to call [`be_a_worker`](Self::be_a_worker).
    #[allow(dead_code, reason = "not every test that shares this file has flaws")]
    pub(crate) fn with_worker(naive: Naive, test: &'static str) -> Self {
        Self { naive, worker: Some(test), directories: Mutex::default() }
    }

    #[allow(dead_code, reason = "not every test that shares this file has flaws")]
    pub(crate) async fn be_a_worker(all: &[Naive]) {
        let Ok(flaw) = std::env::var(FLAW) else { return };
        let naive = all.iter().find(|naive| format!("{naive:?}") == flaw);
        conformance_tests::processes::worker(&Self::new(*naive.expect("the parent names one of them"))).await;
    }
}

impl Harness for NaiveHarness {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        let directory = std::env::temp_dir().join(format!("sessionkit-naive-{namespace}"));
        self.directories.lock().expect("nobody panics here").push(directory.clone());
        Ok(Arc::new(NaiveHandler::new(directory, self.naive)?))
    }

    fn worker(&self) -> Option<Command> {
        let mut command = Command::new(std::env::current_exe().ok()?);
        command.args([self.worker?, "--exact", "--nocapture"]).env(FLAW, format!("{:?}", self.naive));
        Some(command)
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(100)
    }

    fn remembers_destroyed(&self) -> bool {
        false
    }
}

impl Drop for NaiveHarness {
    fn drop(&mut self) {
        // A worker that comes to its end must leave the store to its parent; it never gets here, since it exits.
        for directory in self.directories.lock().expect("nobody panics here").drain(..) {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

/// The store.
#[derive(Clone, Debug)]
pub(crate) struct NaiveHandler {
    directory: PathBuf,
    naive: Naive,
}

impl NaiveHandler {
    pub(crate) fn new(directory: PathBuf, naive: Naive) -> Result<Self> {
        fs::create_dir_all(&directory).map_err(|e| broken("open", e))?;
        Ok(Self { directory, naive })
    }

    fn path(&self, id: &SessionId, what: &str) -> PathBuf {
        self.directory.join(format!("{}.{what}", id.as_str()))
    }

    /// Does `step` while nobody else does one with this session.
    fn atomically<T>(&self, id: &SessionId, step: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.naive == Naive::NoLock {
            return step();
        }
        let mutex = File::create(self.path(id, "mutex")).map_err(|e| broken("lock", e))?;
        mutex.lock().map_err(|e| broken("lock", e))?;
        step()
    }

    fn load(&self, id: &SessionId) -> Result<Option<State>> {
        match fs::read(self.path(id, "record")) {
            Ok(bytes) => Ok(State::decode(&bytes).filter(|state| state.deadline > now())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(broken("read", e)),
        }
    }

    fn store(&self, id: &SessionId, state: &State) -> Result<()> {
        let path = self.path(id, "record");
        let bytes = state.encode();
        match self.naive {
            Naive::TornWrites => write_in_pieces(&path, &bytes).map_err(|e| broken("write", e)),
            // A creation is no exception to be caught; a replacement is.
            Naive::WriteBehind if path.exists() => {
                let temporary = self.path(id, &format!("behind-{}", u128::from_le_bytes(state.last)));
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(100));
                    fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path))
                });
                Ok(())
            }
            _ => {
                static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
                let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let temporary = self.path(id, &format!("new-{}-{n}", std::process::id()));
                fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path)).map_err(|e| broken("write", e))
            }
        }
    }

    fn lease(&self, id: &SessionId) -> Option<LeaseFile> {
        let bytes = fs::read(self.path(id, "lease")).ok()?;
        LeaseFile::decode(&bytes).filter(|lease| lease.until > now())
    }

    fn set_lease(&self, id: &SessionId, token: LeaseToken, length: Duration) -> Result<()> {
        let until = if self.naive == Naive::ImmortalLock { u64::MAX } else { now() + millis(length) };
        let lease = LeaseFile { token: token.to_bytes(), until, pid: std::process::id() };
        fs::write(self.path(id, "lease"), lease.encode()).map_err(|e| broken("lock", e))
    }

    /// Tries once to take the lock; the lease of whoever has it instead.
    fn try_lock(&self, id: &SessionId, token: LeaseToken, length: Duration) -> Result<Result<Lock, Option<LeaseFile>>> {
        match self.naive {
            Naive::NoLock => Ok(Ok(Lock::None)),
            Naive::Flock => {
                let file = OpenOptions::new().create(true).append(true).open(self.path(id, "lock"));
                let file = file.map_err(|e| broken("lock", e))?;
                match file.try_lock() {
                    Ok(()) => Ok(Ok(Lock::Kernel { _file: file })),
                    Err(TryLockError::WouldBlock) => Ok(Err(None)),
                    Err(TryLockError::Error(e)) => Err(broken("lock", e)),
                }
            }
            _ => self.atomically(id, || match self.lease(id) {
                Some(lease) if self.naive == Naive::KeepsForItself && lease.pid == std::process::id() && take_kept(id) => {
                    self.set_lease(id, token, length)?;
                    Ok(Ok(Lock::Lease(token)))
                }
                Some(lease) => Ok(Err(Some(lease))),
                None => {
                    self.set_lease(id, token, length)?;
                    Ok(Ok(Lock::Lease(token)))
                }
            }),
        }
    }

    /// Whether nobody has the lock, at this moment of an atomic step.
    fn is_free(&self, id: &SessionId) -> Result<bool> {
        if self.naive != Naive::Flock {
            return Ok(self.lease(id).is_none());
        }
        let file = OpenOptions::new().create(true).append(true).open(self.path(id, "lock"));
        // An exclusive opening that tries at this very moment tries again.
        Ok(file.map_err(|e| broken("lock", e))?.try_lock().is_ok())
    }

    async fn lock(&self, id: &SessionId, wait: Duration, length: Duration) -> Result<Lock> {
        let until = Instant::now() + wait;
        let token = LeaseToken::random()?;
        let ticket = if self.naive == Naive::DeadTickets { Some(self.draw_ticket(id)?) } else { None };
        loop {
            let served = ticket.as_deref().is_none_or(|ticket| self.is_lowest(id, ticket));
            let outcome = if served { self.try_lock(id, token, length)? } else { Err(None) };
            let end = match outcome {
                Ok(lock) => Some(Ok(lock)),
                Err(holder) if Instant::now() >= until => {
                    if self.naive == Naive::LosersUnlock {
                        let _ = fs::remove_file(self.path(id, "lease"));
                    }
                    let holder =
                        holder.map(|lease| Holder { process: format!("pid {}", lease.pid), since: SystemTime::now() });
                    let error = Error::new(ErrorKind::LockTimeout, "open", "the lock was not free within the wait");
                    Some(Err(error.with_holder(holder)))
                }
                Err(_) => None,
            };
            if let Some(end) = end {
                if let Some(ticket) = ticket {
                    let _ = fs::remove_file(ticket);
                }
                return end;
            }
            tokio::time::sleep(self.naive.poll().min(until.saturating_duration_since(Instant::now()))).await;
        }
    }

    fn draw_ticket(&self, id: &SessionId) -> Result<PathBuf> {
        self.atomically(id, || {
            let queue = self.path(id, "queue");
            fs::create_dir_all(&queue).map_err(|e| broken("lock", e))?;
            let nanos = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is past 1970").as_nanos();
            let ticket = queue.join(format!("{nanos:040}"));
            File::create(&ticket).map_err(|e| broken("lock", e))?;
            Ok(ticket)
        })
    }

    fn is_lowest(&self, id: &SessionId, ticket: &Path) -> bool {
        let names = fs::read_dir(self.path(id, "queue")).into_iter().flatten().flatten().map(|entry| entry.path());
        names.min().as_deref() == Some(ticket)
    }
}

#[async_trait]
impl SessionHandler for NaiveHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let mut opening = NaiveOpening {
            handler: self.clone(),
            id: id.clone(),
            request: *request,
            lock: Lock::None,
            fetched: None,
            base: None,
            spent: false,
        };
        match request.access {
            Access::Destroy => return Ok(Box::new(opening)),
            Access::ReadOnly => opening.fetched = Some(self.view(id)?),
            Access::Optimistic => opening.fetched = Some(self.load(id)?),
            Access::Exclusive { .. } if request.expect == Expect::Fresh => opening.fetched = Some(None),
            Access::Exclusive { wait, lease } => {
                let absent = self.load(id)?.is_none();
                let unlocked = absent && (request.expect == Expect::Existing || self.naive == Naive::CreatesTwice);
                if !unlocked {
                    opening.lock = self.lock(id, wait, lease).await?;
                    let state = self.atomically(id, || {
                        let mut state = self.load(id)?;
                        let least = now() + 2 * millis(lease);
                        let short = state.as_mut().filter(|state| state.deadline < least);
                        if let (Some(state), true) = (short, self.naive != Naive::GcForgetsHolders) {
                            state.deadline = least;
                            self.store(id, state)?;
                        }
                        Ok(state)
                    })?;
                    if state.is_none() && request.expect == Expect::Existing {
                        opening.release()?;
                    }
                    opening.fetched = Some(state);
                }
            }
        }
        Ok(Box::new(opening))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        let mut freed = 0;
        for entry in fs::read_dir(&self.directory).map_err(|e| broken("gc", e))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if self.naive == Naive::GcSweepsLocks && name.ends_with(".lease") {
                let _ = fs::remove_file(entry.path());
            }
            let Some(id) = name.strip_suffix(".record").and_then(SessionId::parse) else { continue };
            let gone = self.atomically(&id, || match self.load(&id)? {
                Some(_) => Ok(false),
                None => Ok(fs::remove_file(entry.path()).is_ok()),
            })?;
            freed += u64::from(gone);
            if freed == u64::from(limit.get()) {
                break;
            }
        }
        Ok(freed)
    }
}

impl NaiveHandler {
    fn view(&self, id: &SessionId) -> Result<Option<State>> {
        type Seen = HashMap<SessionId, (State, Instant, u32)>;
        static SEEN: OnceLock<Mutex<Seen>> = OnceLock::new();
        let current = self.load(id)?;
        if self.naive != Naive::StaleViews {
            return Ok(current);
        }
        let Some(state) = &current else { return Ok(current) };
        let mut seen = SEEN.get_or_init(Mutex::default).lock().expect("nobody panics here");
        let (old, since, views) = seen.entry(id.clone()).or_insert_with(|| (state.clone(), Instant::now(), 0));
        *views += 1;
        if since.elapsed() > Duration::from_millis(300) {
            (*old, *since) = (state.clone(), Instant::now());
        }
        Ok(if *views % 3 == 0 { Some(old.clone()) } else { current })
    }
}

#[derive(Debug)]
enum Lock {
    None,
    Kernel { _file: File },
    Lease(LeaseToken),
}

#[derive(Debug)]
struct NaiveOpening {
    handler: NaiveHandler,
    id: SessionId,
    request: OpenRequest,
    lock: Lock,
    fetched: Option<Option<State>>,
    base: Option<[u8; 16]>,
    spent: bool,
}

impl NaiveOpening {
    fn release(&mut self) -> Result<()> {
        let Lock::Lease(token) = std::mem::replace(&mut self.lock, Lock::None) else { return Ok(()) };
        let handler = &self.handler;
        handler.atomically(&self.id, || {
            let own = handler.lease(&self.id).is_some_and(|lease| lease.token == token.to_bytes());
            if handler.naive == Naive::KeepsForItself && own {
                keep(&self.id);
                // A little longer, for our own next opening.
                return handler.set_lease(&self.id, token, Duration::from_millis(1500));
            }
            if own || handler.naive == Naive::UnlocksAnybodys {
                let _ = fs::remove_file(handler.path(&self.id, "lease"));
            }
            Ok(())
        })
    }

    fn check(&self, current: Option<&State>, id: WriteId) -> Result<Option<Written>> {
        let refuse = |kind, why: &'static str| Err(Error::new(kind, "write", why));
        if self.handler.naive == Naive::NoLock || (self.handler.naive == Naive::CreatesTwice && self.base.is_none()) {
            return Ok(None);
        }
        if current.is_some_and(|state| state.last == id.to_bytes()) {
            return Ok(Some(Written::AlreadyApplied));
        }
        let own = match self.lock {
            Lock::Lease(token) => {
                let lease = self.handler.lease(&self.id);
                lease.is_none_or(|lease| lease.token == token.to_bytes())
            }
            Lock::Kernel { .. } => true,
            Lock::None if self.request.access == Access::Optimistic => self.handler.is_free(&self.id)?,
            Lock::None => self.request.expect == Expect::Fresh,
        };
        let late = if self.request.access == Access::Optimistic { ErrorKind::Conflict } else { ErrorKind::Fenced };
        match (current, self.base) {
            (None, None) if self.request.expect == Expect::Existing => refuse(ErrorKind::Gone, "it was absent at open"),
            (None, Some(_)) if self.handler.naive != Naive::Resurrects => refuse(ErrorKind::Gone, "it is absent"),
            (Some(_), None) if self.request.expect == Expect::Fresh => refuse(ErrorKind::Conflict, "the id is taken"),
            _ if !own && self.handler.naive.fences() => refuse(late, "somebody else holds the lock"),
            (Some(state), base) if Some(state.last) != base && self.handler.naive.fences() => {
                refuse(late, "somebody else wrote")
            }
            _ => Ok(None),
        }
    }
}

#[async_trait]
impl OpenSession for NaiveOpening {
    async fn read(&mut self) -> Result<Option<Record>> {
        let state = match self.fetched.take() {
            Some(state) => state,
            None => self.handler.load(&self.id)?,
        };
        self.base = state.as_ref().map(|state| state.last);
        Ok(state.map(|state| {
            Record::new(state.data, Ttl::new(Duration::from_millis(state.deadline - now().min(state.deadline))))
        }))
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        if matches!(self.request.access, Access::ReadOnly | Access::Destroy) {
            return Err(Error::new(ErrorKind::Unsupported, "write", "the opening is not for writing"));
        }
        if self.spent {
            return Err(Error::new(ErrorKind::Gone, "write", "the opening is spent"));
        }
        if let Some(fetched) = self.fetched.take() {
            self.base = fetched.map(|state| state.last);
        }
        let handler = self.handler.clone();
        let outcome = handler.atomically(&self.id, || {
            let current = handler.load(&self.id)?;
            if let Some(already) = self.check(current.as_ref(), id)? {
                return Ok(already);
            }
            let deadline = now() + record.ttl.as_millis();
            let state = State { last: id.to_bytes(), deadline, data: record.data.clone() };
            handler.store(&self.id, &state)?;
            Ok(Written::Applied)
        });
        match &outcome {
            Ok(_) => self.base = Some(id.to_bytes()),
            Err(_) => self.spent = true,
        }
        let begins = outcome.is_ok() && self.request.expect == Expect::Fresh && matches!(self.lock, Lock::None);
        if begins
            && let Access::Exclusive { lease, .. } = self.request.access
            && let Ok(lock) = handler.try_lock(&self.id, LeaseToken::random()?, lease)?
        {
            self.lock = lock;
        }
        outcome
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        let handler = &self.handler;
        let removed = handler.atomically(&self.id, || {
            let state = handler.load(&self.id)?;
            let _ = fs::remove_file(handler.path(&self.id, "record"));
            Ok(state)
        })?;
        Ok(removed.map(|state| Record::new(state.data, Ttl::MIN)))
    }

    async fn close(&mut self) -> Result<()> {
        self.spent = true;
        self.release()
    }
}

#[derive(Clone, Debug)]
struct State {
    last: [u8; 16],
    deadline: u64,
    data: Vec<u8>,
}

impl State {
    fn encode(&self) -> Vec<u8> {
        [&self.last[..], &self.deadline.to_le_bytes(), &self.data].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (last, rest) = bytes.split_first_chunk()?;
        let (deadline, data) = rest.split_first_chunk()?;
        Some(Self { last: *last, deadline: u64::from_le_bytes(*deadline), data: data.into() })
    }
}

#[derive(Debug)]
struct LeaseFile {
    token: [u8; 16],
    until: u64,
    pid: u32,
}

impl LeaseFile {
    fn encode(&self) -> Vec<u8> {
        [&self.token[..], &self.until.to_le_bytes(), &self.pid.to_le_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (token, rest) = bytes.split_first_chunk()?;
        let (until, rest) = rest.split_first_chunk()?;
        let (pid, _) = rest.split_first_chunk()?;
        Some(Self { token: *token, until: u64::from_le_bytes(*until), pid: u32::from_le_bytes(*pid) })
    }
}

/// Sessions whose lock this process has kept after a release.
fn kept() -> &'static Mutex<HashMap<SessionId, ()>> {
    static KEPT: OnceLock<Mutex<HashMap<SessionId, ()>>> = OnceLock::new();
    KEPT.get_or_init(Mutex::default)
}

fn keep(id: &SessionId) {
    kept().lock().expect("nobody panics here").insert(id.clone(), ());
}

fn take_kept(id: &SessionId) -> bool {
    kept().lock().expect("nobody panics here").remove(id).is_some()
}

fn write_in_pieces(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).write(true).truncate(false).open(path)?;
    for piece in bytes.chunks(1000) {
        file.write_all(piece)?;
        std::thread::sleep(Duration::from_micros(50));
    }
    file.set_len(bytes.len() as u64)
}

fn now() -> u64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).expect("it is past 1970"))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn broken(operation: &'static str, error: io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, operation, "the directory does not answer").with_source(error)
}
