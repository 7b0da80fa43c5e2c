//! The lock on its own, and the renewal of what the handler holds.
//!
//! A kernel lock has no lease: it ends when its holder lets go or his process ends, never before, however long he is stopped.

use std::any::Any;
use std::cell::{Cell, OnceCell};
use std::fs::{File, TryLockError};
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use session_core::spin::SpinWait;
use session_core::{Error, ErrorKind, Held, Holder, Lease, LeaseRequest, LeaseToken, Result, SessionId, SessionLock};
use tokio::sync::{MutexGuard, oneshot};

use crate::config::{FileConfig, Io};
use crate::dir::{Dir, Plain, Stat, fault, stat};
use crate::io::{Claim, SessionFile, gone, mark_waiting, read_head, write_at};
use crate::layout::{HEADER, HOLDER_AT, Header};
use crate::store::{Store, now, pooled, run};
use crate::sync::{Job, SyncThreads};
use crate::wait::{self, Attempt, deadline, in_line};

/// A [`SessionLock`] by kernel locks on files in a directory, for handlers that have none of their own.
///
/// It has its own files, in the directory `~locks`, and keeps none of them when nobody holds or waits: it does not contend with
/// a [`FileHandler`](crate::FileHandler) on the same directory. Its lease never ends by time. It keeps processes of one
/// machine apart, and nothing else.
#[derive(Clone, Debug)]
pub struct FileLock {
    pub(crate) store: Arc<Store>,
}

impl FileLock {
    /// Opens the directory of `config`, as [`FileHandler::open_dir`](crate::FileHandler::open_dir) does.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config), with the command that mends it.
    pub fn open_dir(config: FileConfig) -> Result<Self> {
        Ok(Self::on(Arc::new(Store::open(config)?)))
    }

    pub(crate) fn on(store: Arc<Store>) -> Self {
        Self { store }
    }
}

#[async_trait]
impl SessionLock for FileLock {
    async fn acquire(&self, id: &SessionId, request: &LeaseRequest) -> Result<Arc<Lease>> {
        let (store, io) = (Arc::clone(&self.store), self.store.config.io);
        let (wait, until) = (request.wait, deadline(request.wait));
        let attempt = {
            let name = Dir::lock_name(id);
            move |file, turn| LockFile::open(&store, &name, file, turn)
        };
        let first = attempt.clone();
        let file = match run(io, false, move || first(None, false)).await?? {
            Attempt::Done(file) => Ok(file),
            Attempt::Busy { file, .. } if wait.is_zero() => Err(file),
            Attempt::Busy { file, .. } => {
                let attempt = move |file| attempt(Some(file), true);
                in_line(&self.store.watch, io, file, until, attempt, |_| None, move |file| mark_waiting(file, wait)).await?
            }
        };
        let file = file.map_err(|file| timed_out("acquire", &file, wait))?;
        let clean = file.clean;
        let lease = Lease::new(id.clone(), self.store.tokens.next(), request.lease)
            .after_clean_release(clean)
            .with_state(Some(file));
        Ok(Arc::new(lease))
    }

    async fn renew(&self, leases: &[Arc<Lease>]) -> Vec<Result<()>> {
        let mut outcomes = Vec::with_capacity(leases.len());
        for lease in leases {
            let outcome = renew(lease).await;
            if outcome.as_ref().is_err_and(|error| !error.kind().keeps_opening()) {
                lease.mark_lost();
            }
            outcomes.push(outcome);
        }
        outcomes
    }

    async fn release(&self, lease: &Lease) -> Result<()> {
        let mut state = lease.state().lock().await;
        if let Some(file) = state.downcast_mut::<Option<LockFile>>() {
            if let Some(file) = file.take() {
                file.release();
            }
        } else if let Some(grip) = state.downcast_mut::<Grip>() {
            drop(grip.take().await);
        }
        Ok(())
    }

    fn abandon(&self, lease: Arc<Lease>) {
        abandon(&lease);
    }
}

/// Lets go of the file behind a lease at once, if no renewal is using it; otherwise it goes with the last user.
pub(crate) fn abandon(lease: &Lease) {
    if let Ok(mut state) = lease.state().try_lock() {
        if let Some(file) = state.downcast_mut::<Option<LockFile>>() {
            *file = None;
        } else if let Some(grip) = state.downcast_mut::<Grip>() {
            *grip = Grip::Empty;
        }
    }
}

async fn renew(lease: &Lease) -> Result<()> {
    let mut state = lease.state().lock().await;
    if let Some(file) = state.downcast_ref::<Option<LockFile>>() {
        return match file {
            Some(file) if file.is_there()? => Ok(()),
            _ => Err(Error::new(ErrorKind::Fenced, "renew", "the lock file is gone")),
        };
    }
    let Some(grip) = state.downcast_mut::<Grip>() else {
        return Err(Error::new(ErrorKind::Unsupported, "renew", "the lease is not from this lock"));
    };
    let Some(mut file) = grip.take().await else { return Err(gone("renew")) };
    let outcome = file.renew(lease.length());
    *grip = Grip::Idle(file);
    outcome
}

/// What a lease of the handler holds: shared by the open session and its renewal.
#[derive(Debug)]
pub(crate) enum Grip {
    Idle(Box<SessionFile>),
    /// A call is under way on another thread, perhaps one that nobody waits for any more.
    Busy(oneshot::Receiver<Option<Box<SessionFile>>>),
    Empty,
}

impl Grip {
    /// Takes the file, as soon as no call uses it.
    async fn take(&mut self) -> Option<Box<SessionFile>> {
        if let Self::Busy(call) = self {
            let file = call.await.ok().flatten();
            *self = file.map_or(Self::Empty, Self::Idle);
        }
        match std::mem::replace(self, Self::Empty) {
            Self::Idle(file) => Some(file),
            Self::Busy(_) | Self::Empty => None,
        }
    }

    /// Runs `work` on the file, in place; `None` if there is none any more.
    async fn apply<R>(&mut self, work: impl FnOnce(Box<SessionFile>) -> (Option<Box<SessionFile>>, R)) -> Option<R> {
        let (file, result) = work(self.take().await?);
        *self = file.map_or(Self::Empty, Self::Idle);
        Some(result)
    }

    /// Runs `work` on the file, on the blocking pool; there it runs to its end even if nobody waits for it.
    async fn apply_on_pool<R: Send + Sync + 'static>(
        &mut self,
        work: impl FnOnce(Box<SessionFile>) -> (Option<Box<SessionFile>>, R) + Send + 'static,
    ) -> Result<Option<R>> {
        let Some(file) = self.take().await else { return Ok(None) };
        let elsewhere = |job: Job| drop(tokio::task::spawn_blocking(job));
        self.send_off(elsewhere, None, move || work(file)).await.map(Some)
    }

    /// Runs `begin` on the file in place, and `finish` on what it leaves to be done, on a thread that waits for the disk; there it
    /// runs to its end even if nobody waits for it.
    async fn apply_in_two<B: Send + 'static, R: Send + Sync + 'static>(
        &mut self,
        threads: &SyncThreads,
        begin: impl FnOnce(Box<SessionFile>) -> Half<B, R>,
        finish: impl FnOnce(Box<SessionFile>, B) -> (Option<Box<SessionFile>>, R) + Send + 'static,
    ) -> Result<Option<R>> {
        let Some(file) = self.take().await else { return Ok(None) };
        match begin(file) {
            Half::Whole(file, result) => {
                *self = file.map_or(Self::Empty, Self::Idle);
                Ok(Some(result))
            }
            Half::Begun(file, begun) => {
                let elsewhere = |job| {
                    if let Err(job) = threads.run(job) {
                        drop(tokio::task::spawn_blocking(job));
                    }
                };
                self.send_off(elsewhere, Some(&threads.answers), move || finish(file, begun)).await.map(Some)
            }
        }
    }

    /// Has `work` done elsewhere and waits for it, among those of `answers` if it is one of them; meanwhile, and if nobody waits,
    /// this is busy.
    async fn send_off<R: Send + Sync + 'static>(
        &mut self,
        elsewhere: impl FnOnce(Job),
        answers: Option<&SpinWait>,
        work: impl FnOnce() -> (Option<Box<SessionFile>>, R) + Send + 'static,
    ) -> Result<R> {
        let (give, back) = oneshot::channel();
        let answer = Arc::new(OnceLock::new());
        *self = Self::Busy(back);
        let answered = Arc::clone(&answer);
        elsewhere(Box::new(move || {
            let (file, result) = work();
            let _ = answered.set(result);
            drop(answered);
            // Nobody may be waiting for it any more.
            drop(give.send(file));
        }));
        if let (Some(answers), Self::Busy(call)) = (answers, &mut *self) {
            let file = answers.wait(call).await.flatten();
            *self = file.map_or(Self::Empty, Self::Idle);
        }
        *self = self.take().await.map_or(Self::Empty, Self::Idle);
        let answer = Arc::into_inner(answer).and_then(OnceLock::into_inner);
        answer.ok_or_else(|| Error::new(ErrorKind::Unknown, "file", "the process ended before the call did"))
    }
}

/// How far a call got without waiting for the disk.
pub(crate) enum Half<B, R> {
    Whole(Option<Box<SessionFile>>, R),
    Begun(Box<SessionFile>, B),
}

/// The lock of an open session: a file, and the lease that shares it with a renewal once somebody has asked for one.
pub(crate) struct Hold {
    /// The file, until the lease has it: most holds end before anybody would renew them.
    grip: Cell<Grip>,
    held: OnceCell<Held>,
    length: Duration,
}

impl Hold {
    pub(crate) fn new(file: Box<SessionFile>, length: Duration) -> Self {
        Self { grip: Cell::new(Grip::Idle(file)), held: OnceCell::new(), length }
    }

    /// Returns the lease, which is made by the first who asks.
    pub(crate) fn held(&self, lock: &Arc<FileLock>, id: &SessionId) -> &Held {
        self.held.get_or_init(|| {
            let lease = Lease::new(id.clone(), lock.store.tokens.next(), self.length);
            let lease = lease.after_clean_release(true).with_state(self.grip.replace(Grip::Empty));
            Held { lease: Arc::new(lease), lock: Arc::<FileLock>::clone(lock) }
        })
    }

    /// Runs `work` on the file, in place; `None` if there is none any more.
    pub(crate) async fn in_place<R>(
        &mut self,
        work: impl FnOnce(Box<SessionFile>) -> (Option<Box<SessionFile>>, R),
    ) -> Option<R> {
        let Some(held) = self.held.get() else { return self.grip.get_mut().apply(work).await };
        // Nearly always free: only a renewal can be using it.
        let mut state = match held.lease.state().try_lock() {
            Ok(state) => state,
            Err(_) => held.lease.state().lock().await,
        };
        grip_in(&mut state).apply(work).await
    }

    /// Runs `begin` on the file in place, and `finish` on a thread that waits for the disk; `None` if there is no file any more.
    pub(crate) async fn in_two<B: Send + 'static, R: Send + Sync + 'static>(
        &mut self,
        threads: &SyncThreads,
        begin: impl FnOnce(Box<SessionFile>) -> Half<B, R>,
        finish: impl FnOnce(Box<SessionFile>, B) -> (Option<Box<SessionFile>>, R) + Send + 'static,
    ) -> Result<Option<R>> {
        match self.held.get() {
            None => self.grip.get_mut().apply_in_two(threads, begin, finish).await,
            Some(held) => grip_in(&mut held.lease.state().lock().await).apply_in_two(threads, begin, finish).await,
        }
    }

    /// Runs `work` on the file, where `io` says; `None` if there is none any more.
    pub(crate) async fn run<R: Send + Sync + 'static>(
        &mut self,
        io: Io,
        heavy: bool,
        work: impl FnOnce(Box<SessionFile>) -> (Option<Box<SessionFile>>, R) + Send + 'static,
    ) -> Result<Option<R>> {
        if !pooled(io, heavy) {
            return Ok(self.in_place(work).await);
        }
        // Boxed, so that the calls in place do not carry the state for it.
        match self.held.get() {
            None => Box::pin(self.grip.get_mut().apply_on_pool(work)).await,
            Some(held) => {
                let mut state = held.lease.state().lock().await;
                Box::pin(grip_in(&mut state).apply_on_pool(work)).await
            }
        }
    }

    /// Lets go of the file at once, if no renewal is using it; otherwise it goes with the last user.
    pub(crate) fn abandon(&self) {
        if let Some(held) = self.held.get() {
            abandon(&held.lease);
        }
    }
}

fn grip_in<'a>(state: &'a mut MutexGuard<'_, Box<dyn Any + Send>>) -> &'a mut Grip {
    state.downcast_mut::<Grip>().expect("the handler put a grip into each of its leases")
}

/// The error of a wait that ended, with whoever holds `file`.
pub(crate) fn timed_out(op: &'static str, file: &File, waited: Duration) -> Error {
    let text = format!("the session stayed locked for the whole wait of {} ms", waited.as_millis());
    Error::new(ErrorKind::LockTimeout, op, text).with_holder(holder(file, waited))
}

/// Finds out who holds the lock on `file`: which process, the kernel knows; since when, the offset of the holder's file says, or the
/// line in the header where the process cannot be looked into, and otherwise it is at least as long as we have waited.
pub(crate) fn holder(file: &File, waited: Duration) -> Option<Holder> {
    let mut head = [0; HEADER as usize];
    let length = read_head(file, &mut head).ok()?;
    let line = Header::decode(&head[..length]).ok();
    let place = stat(file).ok();
    let pid =
        place.and_then(|stat| KernelLocks::read(|locks| locks.holder(&stat, file).is_some()).ok()?.holder(&stat, file));
    let pid = pid.or_else(|| line.map(|line| line.holder).filter(|pid| *pid != 0))?;
    let line = line.filter(|line| line.holder == pid).map(|line| line.since);
    let since = match place.and_then(|stat| stamp_of(pid, stat.inode)).or(line) {
        Some(since) => UNIX_EPOCH + Duration::from_millis(since),
        None => SystemTime::now().checked_sub(waited).unwrap_or(UNIX_EPOCH),
    };
    let mut holder = Holder::this_process(since);
    holder.process = format!("pid {pid}");
    Some(holder)
}

/// Returns since when `pid` holds the lock on an inode, as it has left word in the offset of its file.
fn stamp_of(pid: u64, inode: u64) -> Option<u64> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).ok()?;
    files.filter_map(|file| std::fs::read_to_string(file.ok()?.path()).ok()).find_map(|info| {
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let held = field("ino:")?.parse() == Ok(inode) && field("lock:")?.contains("FLOCK");
        // A waiter of the same process has the file open too, without a lock.
        let since = field("pos:")?.parse().ok()?;
        (held && (1..=now()).contains(&since)).then_some(since)
    })
}

/// The kernel's list of locks: who holds which file, and how many stand in line for it.
#[derive(Debug, Default)]
pub(crate) struct KernelLocks(Vec<KernelLock>);

/// How often the list is read at most. Beside threads that lock and unlock without end, four looks in a row can pass a lock over.
const LOOKS: u32 = 16;

/// Reads a file of the kernel's in as few calls as it allows; what is read a few bytes at a time has more time to change.
fn whole_pages(path: &str) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let (mut text, mut page) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        match file.read(&mut page)? {
            0 => return Ok(String::from_utf8_lossy(&text).into_owned()),
            length => text.extend_from_slice(&page[..length]),
        }
    }
}

/// A line of it.
#[derive(Debug, PartialEq, Eq)]
struct KernelLock {
    device: (u32, u32),
    inode: u64,
    /// Where it begins, which tells two places in line apart.
    start: u64,
    /// `None` for a place in line, which is no lock on a session.
    holder: Option<u64>,
}

impl KernelLocks {
    /// Reads the list until it is `complete`, but only so often: the kernel hands it out page by page, and a lock that is held
    /// all the time can be passed over while others come and go.
    pub(crate) fn read(complete: impl Fn(&Self) -> bool) -> Result<Self> {
        let mut all = Self::default();
        for _ in 0..LOOKS {
            let text = whole_pages("/proc/locks").map_err(|cause| {
                let text = "the kernel's list of locks, /proc/locks, cannot be read";
                Error::new(ErrorKind::Unsupported, "locks", text).with_source(cause)
            })?;
            let before = std::mem::take(&mut all.0);
            all.0.extend(text.lines().filter_map(KernelLock::parse));
            let missed = before.into_iter().filter(|lock| !all.0.contains(lock)).collect::<Vec<_>>();
            all.0.extend(missed);
            if complete(&all) {
                break;
            }
        }
        Ok(all)
    }

    /// Whether there is any lock on an inode of this number, of whatever file system.
    pub(crate) fn mention(&self, inode: u64) -> bool {
        self.0.iter().any(|lock| lock.inode == inode && lock.holder.is_some())
    }

    /// Returns the process that holds the lock on this file.
    pub(crate) fn holder(&self, stat: &Stat, file: &File) -> Option<u64> {
        let mut holders = self.0.iter().filter(|lock| lock.inode == stat.inode && lock.holder.is_some());
        let found = holders.clone().find(|lock| lock.device == stat.device);
        // Some file systems tell another device here than there; then only a try can say whether the lock is on this file.
        let found = found.or_else(|| {
            let held = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
            let _ = file.unlock();
            holders.find(|_| held)
        });
        found.and_then(|lock| lock.holder)
    }

    /// Returns how many stand in line for this file.
    pub(crate) fn waiting(&self, stat: &Stat) -> u64 {
        self.0.iter().filter(|lock| lock.inode == stat.inode && lock.holder.is_none()).count() as u64
    }
}

impl KernelLock {
    /// Reads a line such as `1: FLOCK ADVISORY WRITE 4711 fe:00:131 0 EOF`.
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        // A second word `->` marks somebody who blocks; nobody here does.
        let [_, kind, _, "WRITE", pid, place, start, _] = words[..] else { return None };
        let mut place = place.split(':');
        let mut device = || u32::from_str_radix(place.next()?, 16).ok();
        let device = (device()?, device()?);
        let inode = place.next()?.parse().ok()?;
        let start = start.parse().ok()?;
        let holder = match kind {
            "FLOCK" => Some(pid.parse().ok()?),
            "OFDLCK" if wait::is_ticket(start) => None,
            _ => return None,
        };
        Some(Self { device, inode, start, holder })
    }
}

/// Names for acquisitions: they are not stored anywhere, so a random number of the process and a counter will do.
#[derive(Debug)]
pub(crate) struct Tokens {
    random: [u8; 16],
    count: AtomicU64,
}

impl Tokens {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { random: LeaseToken::random()?.to_bytes(), count: AtomicU64::new(0) })
    }

    fn next(&self) -> LeaseToken {
        let mut bytes = self.random;
        bytes[8..].copy_from_slice(&self.count.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        LeaseToken::from_bytes(bytes)
    }
}

/// Where a lock file says whether its last holder let go of it himself.
const STATE_AT: usize = 17;
const HELD: u8 = 1;
const RELEASED: u8 = 2;

/// A held lock file.
#[derive(Debug)]
struct LockFile {
    store: Arc<Store>,
    name: String,
    file: Claim,
    /// Whether the holder before let go himself, and was not killed: he may have had a write under way.
    clean: bool,
}

impl LockFile {
    fn open(store: &Arc<Store>, name: &str, mut file: Option<File>, turn: bool) -> Result<Attempt<Self>> {
        const OP: &str = "acquire";
        let dir = &store.dir;
        let mut moved = false;
        for _ in 0..1000 {
            let found = match file.take() {
                Some(file) => Some(file),
                None => match dir.open_file(name, true, OP)? {
                    Some(file) => Some(file),
                    None => dir.create_file(name, OP)?,
                },
            };
            let Some(file) = found else { continue };
            let claim = Claim::take(file, OP)?;
            let stat = stat(claim.as_deref().unwrap_or_else(|file| file)).map_err(|cause| fault(OP, cause))?;
            match dir.judge(&stat, OP)? {
                Plain::Ours if dir.is_named(name, &stat) => {}
                Plain::Ours | Plain::Unlinked => {
                    moved = true;
                    continue;
                }
                Plain::Foreign => {
                    return Err(Error::new(ErrorKind::Corrupt, OP, "a lock file is not ours; it was left alone"));
                }
            }
            let file = match claim {
                Ok(claim) => claim,
                Err(file) => return Ok(Attempt::Busy { file, moved }),
            };
            let mut head = [0; HEADER as usize];
            read_head(&file, &mut head).map_err(|cause| fault(OP, cause))?;
            let waiting = Header::decode(&head).map_or(0, |header| header.waiting);
            if !turn && waiting > now() && wait::line(&file) {
                drop(file);
                match dir.open_file(name, true, OP)? {
                    Some(file) => return Ok(Attempt::Busy { file, moved: true }),
                    None => continue,
                }
            }
            if turn {
                wait::leave(&file);
            }
            let clean = head[STATE_AT] != HELD;
            head[STATE_AT] = HELD;
            let at = HOLDER_AT as usize;
            head[at..at + 8].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
            head[at + 8..at + 16].copy_from_slice(&now().to_le_bytes());
            write_at(&file, &head, 0).map_err(|cause| fault(OP, cause))?;
            return Ok(Attempt::Done(Self { store: Arc::clone(store), name: name.to_owned(), file, clean }));
        }
        Err(Error::new(ErrorKind::Unavailable, OP, "lock files came and went under the name"))
    }

    fn is_there(&self) -> Result<bool> {
        stat(&*self.file).map(|stat| stat.links > 0).map_err(|cause| fault("renew", cause))
    }

    fn release(self) {
        // Those who stand in line stand in line for this file. If nothing can be done about it, the next holder takes this for
        // an unclean end, which costs him a write.
        let kept = wait::line(&self.file) && write_at(&self.file, &[RELEASED], STATE_AT as u64).is_ok();
        if !kept {
            let _ = self.store.dir.unlink(&self.name, &self.file, "release");
        }
    }
}
