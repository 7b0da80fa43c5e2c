//! One session file under its lock: reading, writing, touching, removing; and which of that may run in place.
//!
//! The rules of the format are in [`layout`](crate::layout); who gets the lock is decided elsewhere.

use std::cell::{Cell, RefCell};
use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use rustix::io::{pread, pwrite};
use session_core::{Error, ErrorKind, Record, Result, SessionId, Ttl, WriteId, Written};

use crate::config::{Durability, FileConfig, Io};
use crate::dir::{Dir, Plain, fault, mark_dead, stat};
use crate::layout::{
    DEAD, DEAD_AT, ENTRY, Entry, FIRST_READ, FIXED, HEADER, HOLDER_AT, Header, Place, UNSYNCED_AT, WAITING_AT, checksum,
    entry_at, first_sequence, place_payload,
};
use crate::lock::Tokens;
use crate::sync::SyncThreads;
use crate::wait::{self, Attempt, Watch};

/// Payloads up to this length are copied in place.
pub(crate) const SMALL: usize = 64 << 10;
/// How often a reader starts over before a file counts as damaged, or as one that never stands still.
const READ_AGAIN: u32 = 10_000;
/// How often an opener starts over because files come and go under the name.
const OPEN_AGAIN: u32 = 1000;

/// After this time nobody is still about to write a file that he created.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// What handler and lock share.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) dir: Arc<Dir>,
    pub(crate) config: FileConfig,
    pub(crate) watch: Arc<Watch>,
    pub(crate) tokens: Tokens,
    pub(crate) threads: Arc<SyncThreads>,
}

impl Store {
    /// Opens the directory of `config`.
    pub(crate) fn open(config: FileConfig) -> Result<Self> {
        let dir = Arc::new(Dir::open(&config)?);
        Ok(Self { dir, config, watch: Arc::default(), tokens: Tokens::new()?, threads: Arc::new(SyncThreads::new()) })
    }

    /// Returns the same store for the use of another thread: what is changed by each call is not shared with it.
    pub(crate) fn another(&self) -> Result<Self> {
        Ok(Self {
            dir: Arc::new(self.dir.another()),
            config: self.config.clone(),
            watch: Arc::clone(&self.watch),
            tokens: Tokens::new()?,
            threads: Arc::clone(&self.threads),
        })
    }
}

/// Runs what touches files: in place, or on the blocking pool if it may wait for the disk.
pub(crate) async fn run<T: Send + 'static>(io: Io, heavy: bool, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    if !pooled(io, heavy) {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(|cause| {
        Error::new(ErrorKind::Unknown, "file", "the blocking pool ended before the call did").with_source(cause)
    })
}

/// Whether such a call runs on the pool.
pub(crate) fn pooled(io: Io, heavy: bool) -> bool {
    match io {
        Io::Auto => heavy,
        Io::Inline => false,
        Io::Pool => true,
    }
}

/// Milliseconds since 1970, by the clock of the machine: the clock of this store.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64
}

/// What a session file says.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) header: Header,
    /// The entry in force and where it stands.
    pub(crate) current: Option<(Entry, Place)>,
    /// Whether the entry in force is known to have reached the disk: then the other one is void.
    settled: bool,
    data: Vec<u8>,
}

impl Content {
    const NEW: Self = Self {
        header: Header { second: None, unsynced: false, dead: false, waiting: 0, holder: 0, since: 0 },
        current: None,
        settled: true,
        data: Vec::new(),
    };

    /// Returns the record, with its last write, if it lives at `now`.
    pub(crate) fn live(self, now: u64) -> Option<(Record, WriteId)> {
        let (entry, _) = self.current.filter(|(entry, _)| !self.header.dead && now < entry.deadline)?;
        Some((Record::new(self.data, Ttl::new(Duration::from_millis(entry.deadline - now))), entry.write))
    }

    /// Whether there is no record that lives at `now`.
    pub(crate) fn is_absent(&self, now: u64) -> bool {
        self.header.dead || self.current.is_none_or(|(entry, _)| now >= entry.deadline)
    }
}

thread_local! {
    /// What is read, always [`FIRST_READ`] long.
    static HEAD: RefCell<Vec<u8>> = RefCell::new(vec![0; FIRST_READ]);
    /// The last answer of [`recent_limit`], and when it was given.
    static LIMIT: Cell<Option<(u64, TimeSpec)>> = const { Cell::new(None) };
    /// What is written.
    static TAIL: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Reads the state of a file. Without the lock a write may be going on.
pub(crate) fn load(file: &File, locked: bool, op: &'static str) -> Result<Content> {
    HEAD.with_borrow_mut(|buffer| {
        let mut flawed = 0;
        for _ in 0..READ_AGAIN {
            let length = read_head(file, buffer).map_err(|cause| fault(op, cause))?;
            match judge(file, &buffer[..length], locked) {
                Ok(Some(content)) => return Ok(content),
                Ok(None) => {}
                Err(Damage::Io(cause)) => return Err(fault(op, cause)),
                // Half a header may be a creation that is going on.
                Err(Damage::Flaw(_)) if !locked && flawed < 3 => {
                    flawed += 1;
                    std::thread::yield_now();
                }
                Err(Damage::Flaw(flaw)) => {
                    return Err(Error::new(ErrorKind::Corrupt, op, format!("a session file: {flaw}")));
                }
            }
        }
        Err(Error::new(ErrorKind::Unavailable, op, "a session file changed faster than it could be read"))
    })
}

enum Damage {
    Io(io::Error),
    Flaw(&'static str),
}

impl From<io::Error> for Damage {
    fn from(cause: io::Error) -> Self {
        Self::Io(cause)
    }
}

/// Finds the entry in force; `None` means that the file changed meanwhile.
fn judge(file: &File, bytes: &[u8], locked: bool) -> Result<Option<Content>, Damage> {
    let header = Header::decode(bytes).map_err(Damage::Flaw)?;
    let Some(second) = header.second else { return Ok(Some(Content { header, ..Content::NEW })) };
    let copy = |bytes: &[u8], place| {
        let mut entry = [0; ENTRY as usize];
        if let Some(rest) = bytes.get(entry_at(place, second) as usize..) {
            let length = rest.len().min(entry.len());
            entry[..length].copy_from_slice(&rest[..length]);
        }
        entry
    };
    let entries = [Place::First, Place::Second].map(|place| (place, copy(bytes, place)));
    let mut order = entries;
    order.sort_by_key(|(_, raw)| std::cmp::Reverse(Entry::claimed(raw)));
    for (place, raw) in &order {
        if Entry::claimed(raw) == 0 {
            continue;
        }
        if let Some(entry) = Entry::decode(raw)
            && let Some(data) = payload(file, bytes, &entry)?
        {
            let void = order.iter().all(|(other, raw)| other == place || Entry::claimed(raw) == 0);
            let settled = void && !header.unsynced;
            return Ok(Some(Content { header, current: Some((entry, *place)), settled, data }));
        }
        if !locked {
            // The highest entry that is not whole means a crash only if nobody is writing; who finds the header changed starts
            // over, or he could return a state older than an acknowledged one.
            let mut again = vec![0; (second + ENTRY) as usize];
            let length = read_head(file, &mut again)?;
            if entries.iter().any(|(place, then)| copy(&again[..length], *place) != *then) {
                return Ok(None);
            }
        }
    }
    Err(Damage::Flaw("no entry in it is whole"))
}

/// Returns the payload of an entry, if the file has it.
fn payload(file: &File, bytes: &[u8], entry: &Entry) -> io::Result<Option<Vec<u8>>> {
    let (start, end) = (entry.offset, entry.offset + entry.length);
    if let Some(data) = bytes.get(start as usize..).and_then(|rest| rest.get(..entry.length as usize)) {
        return Ok(entry.holds(data).then(|| data.to_vec()));
    }
    // The length may be garbage: nothing is allocated for more than the file has.
    if end > file.metadata()?.len() {
        return Ok(None);
    }
    let mut data = vec![0; entry.length as usize];
    let length = read_at(file, &mut data, start)?;
    Ok((length == data.len() && entry.holds(&data)).then_some(data))
}

/// Reads the head of a file. A regular file answers short only at its end, so there is no second call to make sure.
pub(crate) fn read_head(file: &File, bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match pread(file, &mut *bytes, 0) {
            Err(rustix::io::Errno::INTR) => {}
            answer => return Ok(answer?),
        }
    }
}

fn read_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match pread(file, &mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    Ok(done)
}

/// Writes all of `bytes`, or refuses what is beyond the limit of this process, even within a file: the kernel would kill.
pub(crate) fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    if at + bytes.len() as u64 > recent_limit() {
        return Err(Errno::EFBIG.into());
    }
    let mut done = 0;
    while done < bytes.len() {
        match pwrite(file, &bytes[done..], at + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    Ok(())
}

/// An open session file whose lock is ours, until it is dropped.
#[derive(Debug)]
pub(crate) struct SessionFile {
    store: Arc<Store>,
    id: SessionId,
    file: Claim,
    size: u64,
    second: Option<u64>,
    current: Option<(Entry, Place)>,
    settled: bool,
    /// No write of this file is known to have reached the disk.
    unsynced: bool,
    /// The record was absent when the lock was taken, and nothing was written since: the next write creates it.
    creating: bool,
    /// Nobody wrote anything: the file goes with the lock.
    empty: bool,
    /// An error left it open what is in the file.
    stale: bool,
    since: u64,
    /// Whether the holder line is written.
    signed: bool,
}

/// What an opener with a lock found.
pub(crate) type Opened = Option<(Box<SessionFile>, Option<(Record, WriteId)>)>;

/// How far a change of a file has got.
#[derive(Debug)]
pub(crate) enum Begun {
    Done(Written),
    /// Every process sees it, and a power cut would take it.
    Unsynced(Unsynced),
}

/// What is left to do once the disk has a change.
#[derive(Debug)]
pub(crate) struct Unsynced {
    /// What was in force before.
    before: Option<(Entry, Place)>,
    created: bool,
}

/// How an opener comes to the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Just now: those who stand in line go first.
    Newcomer,
    /// From the head of the line.
    First,
    /// For a moment only, past the line: it is now or not at all.
    Passing,
}

/// What an opener wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Manner {
    /// An absent id is answered, not created.
    pub(crate) existing: bool,
    /// How far ahead the deadline is kept: two of these.
    pub(crate) lease: Duration,
    pub(crate) turn: Turn,
}

impl Manner {
    /// One write, touch or destroy of an id that should be there.
    pub(crate) const PASSING: Self = Self { existing: true, lease: Duration::ZERO, turn: Turn::Passing };
}

impl SessionFile {
    /// Tries to get the lock on the file of `id`, through `file` if that is open already. `Done(None)` is an absent id.
    pub(crate) fn open(
        store: &Arc<Store>,
        id: &SessionId,
        mut file: Option<File>,
        manner: Manner,
    ) -> Result<Attempt<Opened>> {
        const OP: &str = "open";
        let dir = &store.dir;
        let name = dir.name(id);
        let mut moved = false;
        for _ in 0..OPEN_AGAIN {
            let waited = file.is_some();
            let found = match file.take() {
                Some(file) => Some(file),
                None => dir.open_file(&name, true, OP)?,
            };
            let (file, new) = match found {
                Some(file) => (file, false),
                None if manner.existing => return Ok(Attempt::Done(None)),
                None => match dir.create_file(&name, OP)? {
                    Some(file) => (file, true),
                    None => {
                        moved = true;
                        continue;
                    }
                },
            };
            let claim = Claim::take(file, OP)?;
            let stat = stat(claim.as_deref().unwrap_or_else(|file| file)).map_err(|cause| fault(OP, cause))?;
            match dir.judge(&stat, OP)? {
                Plain::Ours => {}
                Plain::Unlinked => {
                    moved = true;
                    continue;
                }
                Plain::Foreign if manner.existing => return Ok(Attempt::Done(None)),
                Plain::Foreign => return Err(taken_by_another_user(OP)),
            }
            // The link count tells that the file was removed; only after a wait can it also have been moved away unnoticed.
            if waited && !dir.is_named(&name, &stat) {
                moved = true;
                continue;
            }
            let file = match claim {
                Ok(claim) => claim,
                Err(file) => return Ok(Attempt::Busy { file, moved }),
            };
            let size = stat.size;
            let mut content = if size == 0 { Content::NEW } else { load(&file, true, OP)? };
            content.header.dead |= stat.dead;
            let now = now();
            if manner.turn == Turn::Newcomer && content.header.waiting > now && wait::line(&file) {
                // Closing is what wakes them; then this opener stands in line himself.
                drop(file);
                let Some(file) = dir.open_file(&name, true, OP)? else { continue };
                match crate::dir::stat(&file).map_err(|cause| fault(OP, cause)).and_then(|stat| dir.judge(&stat, OP))? {
                    Plain::Ours => return Ok(Attempt::Busy { file, moved: true }),
                    Plain::Unlinked | Plain::Foreign => continue,
                }
            }
            if manner.turn == Turn::First {
                wait::leave(&file);
            }
            let absent = content.is_absent(now);
            if content.header.dead || (manner.existing && content.current.is_none()) {
                // Destroyed while somebody held it, or left behind by somebody who was killed before he wrote.
                dir.unlink(&name, &file, OP)?;
                moved = true;
                continue;
            }
            if absent && manner.existing {
                return Ok(Attempt::Done(None));
            }
            stamp(&file, now);
            let mut this = Box::new(Self {
                store: Arc::clone(store),
                id: id.clone(),
                file,
                size,
                second: content.header.second,
                current: content.current,
                settled: content.settled,
                unsynced: content.header.unsynced,
                creating: absent,
                empty: new || content.current.is_none(),
                stale: false,
                since: now,
                signed: false,
            });
            if manner.turn == Turn::First {
                // Where one waited, others may be waiting who want to know for whom.
                this.sign();
            }
            if !absent {
                this.prolong(manner.lease, now);
            }
            let record = content.live(now).map(|(mut record, write)| {
                let deadline = this.current.map_or(0, |(entry, _)| entry.deadline);
                record.ttl = Ttl::new(Duration::from_millis(deadline.saturating_sub(now)));
                (record, write)
            });
            return Ok(Attempt::Done(Some((this, record))));
        }
        Err(taken_by_another_user(OP))
    }

    /// Creates the file of an id that nobody else knows, under its lock. `None` if the id is taken.
    pub(crate) fn create(store: &Arc<Store>, id: &SessionId) -> Result<Option<Box<Self>>> {
        const OP: &str = "write";
        let name = store.dir.name(id);
        for _ in 0..OPEN_AGAIN {
            let Some(file) = store.dir.create_file(&name, OP)? else { return Ok(None) };
            // Somebody may have found the file between these two calls; a collector takes it away, anybody else has it then.
            let Ok(file) = Claim::take(file, OP)? else { return Ok(None) };
            let stat = stat(&*file).map_err(|cause| fault(OP, cause))?;
            if stat.links == 0 {
                continue;
            }
            let since = now();
            stamp(&file, since);
            return Ok(Some(Box::new(Self {
                store: Arc::clone(store),
                id: id.clone(),
                file,
                size: stat.size,
                second: None,
                current: None,
                settled: true,
                unsynced: false,
                creating: true,
                empty: true,
                stale: false,
                since,
                signed: false,
            })));
        }
        Err(Error::new(ErrorKind::Unavailable, OP, "a new session file was taken away again and again"))
    }

    /// Returns the id of the last write.
    pub(crate) fn last_write(&self) -> Option<WriteId> {
        self.current.filter(|_| !self.creating).map(|(entry, _)| entry.write)
    }

    /// Reads the record anew.
    pub(crate) fn read(&mut self) -> Result<Option<(Record, WriteId)>> {
        let creating = self.creating;
        Ok(self.reload("read")?.live(now()).filter(|_| !creating))
    }

    /// Stores a record; the caller has checked whatever the fence wants beyond the deadline.
    pub(crate) fn write(&mut self, data: &[u8], ttl: Ttl, id: WriteId) -> Result<Written> {
        let begun = self.begin_write(data, ttl, id)?;
        self.finish(begun, "write")
    }

    /// Moves the deadline to now plus `ttl`.
    pub(crate) fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        let begun = self.begin_touch(ttl)?;
        self.finish(begun, "touch")
    }

    /// Stores a record as far as that needs no disk, unless the write before has not reached it.
    pub(crate) fn begin_write(&mut self, data: &[u8], ttl: Ttl, id: WriteId) -> Result<Begun> {
        const OP: &str = "write";
        too_large(&self.store, data.len(), OP)?;
        if self.stale {
            self.reload(OP)?;
        }
        let now = now();
        if let Some((entry, _)) = self.current {
            let repeated = entry.write == id;
            if now >= entry.deadline && (repeated || !self.creating) {
                return Err(gone(OP));
            }
            // What may not have reached the disk is written again: a sync that failed once says nothing the second time.
            if repeated && (self.settled || self.store.config.durability == Durability::None) {
                self.creating = false;
                self.check(OP)?;
                return Ok(Begun::Done(Written::AlreadyApplied));
            }
        }
        self.put(Some(data), id, now + ttl.as_millis(), true, OP)
    }

    /// Moves the deadline as far as that needs no disk, unless the write before has not reached it.
    pub(crate) fn begin_touch(&mut self, ttl: Ttl) -> Result<Begun> {
        const OP: &str = "touch";
        if self.stale {
            self.reload(OP)?;
        }
        let now = now();
        match self.current {
            Some((entry, _)) if !self.creating && now < entry.deadline => {
                self.put(None, entry.write, now + ttl.as_millis(), true, OP)
            }
            _ => Err(gone(OP)),
        }
    }

    /// Keeps the record alive for its holder: with less than two leases left, its deadline moves two leases ahead.
    pub(crate) fn renew(&mut self, lease: Duration) -> Result<()> {
        const OP: &str = "renew";
        self.sign();
        if self.stale {
            self.reload(OP)?;
        }
        let now = now();
        match self.current {
            Some((entry, _)) if !self.creating => {
                if now >= entry.deadline {
                    return Err(gone(OP));
                }
                let ahead = after(now, lease.saturating_mul(2));
                if entry.deadline < ahead {
                    return self.put(None, entry.write, ahead, false, OP).map(drop);
                }
                self.check(OP)
            }
            _ => self.check(OP),
        }
    }

    /// Removes the record with its file, and returns it if it lived.
    pub(crate) fn destroy(mut self) -> Result<Option<Record>> {
        const OP: &str = "destroy";
        let creating = self.creating;
        let content = match self.reload(OP) {
            // Damage within a file of ours must not keep a logout from removing it.
            Err(error) if error.kind() == ErrorKind::Corrupt && self.second.is_some() => Content::NEW,
            content => content?,
        };
        let removed = self.remove(OP)?;
        let record = content.live(now()).map(|(record, _)| record).filter(|_| !creating);
        if removed {
            return Ok(record);
        }
        // Somebody took the file away by hand. What stands under the name now has to go too, or the logout would be undone.
        let (store, id) = (Arc::clone(&self.store), self.id.clone());
        drop(self);
        Ok(destroy(&store, &id)?.or(record))
    }

    /// Removes the file of `id` if its record is past its deadline or destroyed, and says whether it was an expired one; `None` if it
    /// was left. Who is held or alive is left alone, and so is what is too young to be forgotten.
    pub(crate) fn collect(store: &Arc<Store>, id: &SessionId) -> Result<Option<bool>> {
        const OP: &str = "gc";
        let name = store.dir.name(id);
        let Some(file) = store.dir.open_file(&name, true, OP)? else { return Ok(None) };
        let Ok(file) = Claim::take(file, OP)? else { return Ok(None) };
        let stat = stat(&*file).map_err(|cause| fault(OP, cause))?;
        if store.dir.judge(&stat, OP)? != Plain::Ours {
            return Ok(None);
        }
        // Only now is what it says final.
        let mut content = load(&file, true, OP)?;
        content.header.dead |= stat.dead;
        let forgotten = match content.current {
            _ if content.header.dead => true,
            Some((entry, _)) => now() >= entry.deadline,
            None => is_forgotten(&file),
        };
        let removed = forgotten && store.dir.unlink(&name, &file, OP)?;
        drop(file);
        if removed && store.config.durability == Durability::Full {
            store.dir.sync(&name).map_err(|cause| fault(OP, cause))?;
        }
        Ok(removed.then(|| content.current.is_some() && !content.header.dead))
    }

    /// Removes the file, and makes that last where it is asked for; says whether it still had its name.
    fn remove(&mut self, op: &'static str) -> Result<bool> {
        let (dir, durability) = (&self.store.dir, self.store.config.durability);
        let unknown = |error: Error| error.with_kind(ErrorKind::Unknown);
        if durability >= Durability::Data && self.current.is_some() {
            // A removed name may come back after a power cut; the dead byte does not go again.
            write_at(&self.file, &[DEAD], DEAD_AT).map_err(|cause| unknown(fault(op, cause)))?;
            sync(&self.file).map_err(|cause| unknown(fault(op, cause)))?;
        }
        let name = dir.name(&self.id);
        let removed = dir.unlink(&name, &self.file, op).map_err(unknown)?;
        self.empty = false;
        if removed && durability == Durability::Full {
            dir.sync(&name).map_err(|cause| unknown(fault(op, cause)))?;
        }
        Ok(removed)
    }

    /// Writes who holds the lock, for those who wait. Nothing depends on it.
    fn sign(&mut self) {
        if self.size >= HEADER && !self.signed {
            self.signed = true;
            let mut line = [0; 16];
            line[..8].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
            line[8..].copy_from_slice(&self.since.to_le_bytes());
            let _ = write_at(&self.file, &line, HOLDER_AT);
        }
    }

    fn prolong(&mut self, lease: Duration, now: u64) {
        let ahead = after(now, lease.saturating_mul(2));
        if let Some((entry, _)) = self.current
            && entry.deadline < ahead
            && let Err(error) = self.put(None, entry.write, ahead, false, "open")
        {
            // The renewal will try again, and the write will say what is wrong.
            tracing::debug!(%error, "the deadline of a session could not be moved ahead");
        }
    }

    fn reload(&mut self, op: &'static str) -> Result<Content> {
        let mut content = load(&self.file, true, op)?;
        (self.second, self.current, self.settled) = (content.header.second, content.current, content.settled);
        self.unsynced = content.header.unsynced;
        let stat = stat(&*self.file).map_err(|cause| fault(op, cause))?;
        self.size = stat.size;
        content.header.dead |= stat.dead;
        self.stale = false;
        Ok(content)
    }

    /// Makes an entry, with a new payload or for the old one, at the place of the entry that is not in force.
    fn put(&mut self, data: Option<&[u8]>, id: WriteId, deadline: u64, keep: bool, op: &'static str) -> Result<Begun> {
        let durable = keep && self.store.config.durability >= Durability::Data;
        if durable && !self.settled {
            // The other entry is the last one that the disk has for sure, until the one in force has got there.
            sync(&self.file).map_err(|cause| fault(op, cause).with_kind(ErrorKind::Unavailable))?;
            self.settled = true;
        }
        self.stale = true;
        let entry = match (data, self.current) {
            (None, Some((old, _))) => {
                let entry = Entry { sequence: old.sequence + 1, deadline, ..old };
                self.put_entry(&entry, self.target(), op)?;
                entry
            }
            (data, _) => self.put_payload(data.unwrap_or_default(), id, deadline, op)?,
        };
        let target = self.target();
        // Asked afterwards, not before: whoever destroys reads what he removed after writing the dead byte, and so sees a write
        // that was answered with success.
        self.check(op)?;
        let before = self.current.replace((entry, target));
        let created = self.creating;
        (self.creating, self.empty) = (false, false);
        if durable {
            return Ok(Begun::Unsynced(Unsynced { before, created }));
        }
        self.settled = false;
        if let Some((before, _)) = before {
            self.shrink(&before, &entry);
        }
        self.stale = false;
        Ok(Begun::Done(Written::Applied))
    }

    /// Waits for the disk where that was begun. Until then the file is stale: what follows reads it again.
    pub(crate) fn finish(&mut self, begun: Begun, op: &'static str) -> Result<Written> {
        let Unsynced { before, created } = match begun {
            Begun::Done(written) => return Ok(written),
            Begun::Unsynced(unsynced) => unsynced,
        };
        sync(&self.file).map_err(|cause| fault(op, cause).with_kind(ErrorKind::Unknown))?;
        if created && self.store.config.durability == Durability::Full {
            let name = self.store.dir.name(&self.id);
            self.store.dir.sync(&name).map_err(|cause| fault(op, cause).with_kind(ErrorKind::Unknown))?;
        }
        self.settle(before.map(|(_, place)| place));
        if let (Some((before, _)), Some((entry, _))) = (before, self.current) {
            self.shrink(&before, &entry);
        }
        self.stale = false;
        Ok(Written::Applied)
    }

    /// Whether the next write can begin without waiting for the disk.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled && !self.stale
    }

    /// Notes that the entry in force has reached the disk: nothing may fall back to the one before, and the next writer need not
    /// wonder. If this fails, he syncs once more.
    fn settle(&mut self, before: Option<Place>) {
        let second = self.second.unwrap_or(HEADER);
        let void = before.is_none_or(|place| write_at(&self.file, &[0; 8], entry_at(place, second)).is_ok());
        self.unsynced = self.unsynced && write_at(&self.file, &[0], UNSYNCED_AT).is_err();
        self.settled = void && !self.unsynced;
    }

    fn target(&self) -> Place {
        self.current.map_or(Place::First, |(_, place)| place.other())
    }

    fn put_payload(&mut self, data: &[u8], write: WriteId, deadline: u64, op: &'static str) -> Result<Entry> {
        let length = data.len() as u64;
        let target = self.target();
        let second = self.second.unwrap_or_else(|| Header::second_for(data.len()));
        let in_force = self.current.map(|(entry, _)| entry);
        let offset = place_payload(target, second, self.size, in_force.as_ref(), length);
        let sequence = in_force.map_or_else(|| first_sequence(write), |entry| entry.sequence + 1);
        let entry = Entry { sequence, write, deadline, offset, length, sum: checksum(data) };
        let end = (offset + length).max(entry_at(target, second) + ENTRY);
        let behind = offset == entry_at(target, second) + ENTRY;
        if end > self.size {
            self.reserve(end, length, op)?;
        }
        // In one call only where nothing has to be reserved: a full disk must not leave an entry without its payload.
        let joined = behind && (end <= self.size || self.second.is_none());
        if joined && data.len() <= SMALL {
            TAIL.with_borrow_mut(|buffer| {
                buffer.clear();
                buffer.extend_from_slice(&entry.encode());
                buffer.extend_from_slice(data);
                write_at(&self.file, buffer, offset - ENTRY)
            })
        } else {
            write_at(&self.file, data, offset)
        }
        .map_err(|cause| self.refused(cause, op))?;
        if !(joined && data.len() <= SMALL) {
            self.put_entry(&entry, target, op)?;
        }
        if self.second.is_none() {
            self.begin(second, op)?;
        }
        self.size = self.size.max(end);
        Ok(entry)
    }

    fn put_entry(&mut self, entry: &Entry, target: Place, op: &'static str) -> Result<()> {
        let second = self.second.unwrap_or_else(|| Header::second_for(entry.length as usize));
        let at = entry_at(target, second);
        if at + ENTRY > self.size {
            within_limit(at + ENTRY, op)?;
        }
        write_at(&self.file, &entry.encode(), at).map_err(|cause| {
            let error = fault(op, cause);
            let full = error.kind() == ErrorKind::Unavailable && is_full(&error);
            if full { error } else { error.with_kind(ErrorKind::Unknown) }
        })?;
        self.size = self.size.max(at + ENTRY);
        Ok(())
    }

    /// Makes the first entry count: the header comes last.
    fn begin(&mut self, second: u64, op: &'static str) -> Result<()> {
        if self.size > 0 {
            // A power cut may have left an entry without a header.
            write_at(&self.file, &[0; ENTRY as usize], second).map_err(|cause| self.refused(cause, op))?;
        }
        let fixed: [u8; FIXED] = Header::fixed(second);
        write_at(&self.file, &fixed, 0).map_err(|cause| self.refused(cause, op))?;
        (self.second, self.unsynced) = (Some(second), true);
        Ok(())
    }

    /// Makes sure that there is room up to `end`, before anything is written there.
    fn reserve(&self, end: u64, length: u64, op: &'static str) -> Result<()> {
        within_limit(end, op)?;
        if length as usize <= SMALL {
            // The payload is written first and its range holds nothing, so writing it is what reserves; asking the file system
            // to allocate costs a transaction of its own.
            return Ok(());
        }
        match fallocate(&*self.file, FallocateFlags::empty(), self.size as i64, (end - self.size) as i64) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINTR) => Ok(()),
            Err(errno) => Err(self.refused(errno.into(), op)),
        }
    }

    /// Gives back what a write reserved that could not be done.
    fn refused(&self, cause: io::Error, op: &'static str) -> Error {
        // Beyond the old length there is nothing that an entry points to.
        let _ = self.file.set_len(self.size);
        let error = fault(op, cause);
        if is_full(&error) { error.with_kind(ErrorKind::Unavailable) } else { error.with_kind(ErrorKind::Unknown) }
    }

    /// Cuts off a tail that neither the last write nor the one before needs.
    fn shrink(&mut self, before: &Entry, now: &Entry) {
        let needed = before.end().max(now.end()).unwrap_or(self.size).max(HEADER + ENTRY);
        let needed = needed.max(self.second.unwrap_or_default() + ENTRY).next_multiple_of(4096);
        if self.size > 2 * needed + SMALL as u64 && self.file.set_len(needed).is_ok() {
            self.size = needed;
        }
    }

    /// Whether the file is still the one that holds the session.
    fn check(&self, op: &'static str) -> Result<()> {
        let stat = stat(&*self.file).map_err(|cause| fault(op, cause).with_kind(ErrorKind::Unknown))?;
        if stat.dead || stat.links == 0 { Err(gone(op)) } else { Ok(()) }
    }

    /// Removes the file if it was destroyed under its holder, who is the owner of the lock.
    pub(crate) fn bury(&self) {
        if stat(&*self.file).is_ok_and(|stat| stat.dead) {
            let _ = self.store.dir.unlink(&self.store.dir.name(&self.id), &self.file, "close");
        }
    }
}

impl Drop for SessionFile {
    fn drop(&mut self) {
        if self.empty {
            let _ = self.store.dir.unlink(&self.store.dir.name(&self.id), &self.file, "close");
        }
    }
}

/// Removes the record of `id` without waiting for anybody, and returns it if it lived.
pub(crate) fn destroy(store: &Arc<Store>, id: &SessionId) -> Result<Option<Record>> {
    const OP: &str = "destroy";
    let dir = &store.dir;
    let name = dir.name(id);
    let unknown = |cause: io::Error| fault(OP, cause).with_kind(ErrorKind::Unknown);
    // One destroyer at a time, so that one of them is told what was there. What is wrong with the file is said below.
    let gate = dir.open_file(&name, true, OP).ok().flatten();
    gate.as_ref().inspect(|file| wait::pass_alone(file));
    for _ in 0..OPEN_AGAIN {
        let file = match SessionFile::open(store, id, None, Manner::PASSING) {
            Ok(Attempt::Done(None)) => return Ok(None),
            Ok(Attempt::Done(Some((file, _)))) => return file.destroy(),
            Ok(Attempt::Busy { file, .. }) => file,
            Err(error) if error.kind() == ErrorKind::Corrupt && remove_damaged(store, &name)? => return Ok(None),
            Err(error) => return Err(error),
        };
        let before = stat(&file).map_err(|cause| fault(OP, cause))?;
        if before.dead {
            return Ok(None);
        }
        mark_dead(&file).map_err(unknown)?;
        // Read after the mark, which every write asks for when it is done: what was answered with success is in here.
        let after = load(&file, false, OP);
        if before.size >= HEADER {
            write_at(&file, &[DEAD], DEAD_AT).map_err(unknown)?;
            if store.config.durability >= Durability::Data {
                sync(&file).map_err(unknown)?;
            }
        }
        let file = match Claim::take(file, OP)? {
            Ok(claim) => {
                dir.unlink(&name, &claim, OP).map_err(|error| error.with_kind(ErrorKind::Unknown))?;
                claim.release()
            }
            Err(file) => file,
        };
        let stat = stat(&file).map_err(|cause| fault(OP, cause))?;
        let removed = match after {
            Ok(content) => content.live(now()).map(|(record, _)| record),
            Err(error) if error.kind() == ErrorKind::Corrupt => None,
            Err(error) => return Err(error),
        };
        // The holder may have removed the file himself, and somebody may have begun anew.
        if stat.links == 0 && removed.is_none() {
            continue;
        }
        return Ok(removed);
    }
    Err(Error::new(ErrorKind::Unknown, OP, "session files came and went under the name"))
}

/// Removes a file of ours in which no entry is whole: damage must not keep a logout from removing it. Says whether it did.
fn remove_damaged(store: &Store, name: &str) -> Result<bool> {
    const OP: &str = "destroy";
    let Some(file) = store.dir.open_file(name, true, OP)? else { return Ok(false) };
    let stat = stat(&file).map_err(|cause| fault(OP, cause))?;
    if store.dir.judge(&stat, OP)? != Plain::Ours {
        return Ok(false);
    }
    let Ok(file) = Claim::take(file, OP)? else { return Ok(false) };
    let mut head = [0; HEADER as usize];
    let length = read_head(&file, &mut head).map_err(|cause| fault(OP, cause))?;
    let ours = Header::decode(&head[..length]).is_ok_and(|header| header.second.is_some());
    Ok(ours && store.dir.unlink(name, &file, OP)?)
}

/// Leaves word of since when the lock is held, for whoever waits in vain: in the offset of the open file, which nothing else uses
/// and which the kernel shows to processes of the same user. It costs less than a write, it is there for a stopped holder too,
/// and it goes with the holder.
fn stamp(mut file: &File, since: u64) {
    let _ = file.seek(SeekFrom::Start(since));
}

/// A file whose lock is ours until this is dropped.
///
/// It is given back by a call of its own before the file is closed. Closing is what wakes the waiters, so it must come second; and
/// a process that is just being started has a copy of every descriptor for a moment, with which the lock would live on.
#[derive(Debug)]
pub(crate) struct Claim(Option<File>);

impl Claim {
    /// Takes the lock on a file if it is free, and returns the file if it is not.
    pub(crate) fn take(file: File, op: &'static str) -> Result<std::result::Result<Self, File>> {
        match file.try_lock() {
            Ok(()) => Ok(Ok(Self(Some(file)))),
            Err(TryLockError::WouldBlock) => Ok(Err(file)),
            Err(TryLockError::Error(cause)) => Err(fault(op, cause)),
        }
    }

    /// Gives the lock back and keeps the file open.
    fn release(mut self) -> File {
        let file = self.0.take().expect("only this and the drop take it");
        let _ = file.unlock();
        file
    }
}

impl std::ops::Deref for Claim {
    type Target = File;

    fn deref(&self) -> &File {
        self.0.as_ref().expect("it is there until the end")
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(file) = &self.0 {
            // There is nothing that could be done about it; closing comes next.
            let _ = file.unlock();
        }
    }
}

/// Whether a file that nobody has written yet is old enough that nobody will.
pub(crate) fn is_forgotten(file: &File) -> bool {
    let changed = file.metadata().and_then(|meta| meta.modified());
    changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age > FORGOTTEN))
}

/// Whether a file that somebody else holds has no record that lives.
pub(crate) fn peek_absent(file: &File) -> bool {
    stat(file).is_ok_and(|stat| stat.dead) || load(file, false, "open").is_ok_and(|content| content.is_absent(now()))
}

/// Tells later openers that somebody may stand in line until then. Only a hint: nothing but fairness depends on it.
pub(crate) fn mark_waiting(file: &File, wait: Duration) {
    let until = after(now(), wait);
    let mut head = [0; HEADER as usize];
    // A file without a header is not made longer for a hint.
    if read_head(file, &mut head).is_ok_and(|length| length == head.len())
        && Header::decode(&head).is_ok_and(|header| header.waiting < until)
    {
        let _ = write_at(file, &until.to_le_bytes(), WAITING_AT);
    }
}

/// Adds a length of time to an instant, both in milliseconds.
fn after(now: u64, length: Duration) -> u64 {
    now.saturating_add(u64::try_from(length.as_millis()).unwrap_or(u64::MAX))
}

/// Waits until what was written is on the disk.
fn sync(file: &File) -> io::Result<()> {
    #[cfg(test)]
    if tests::SYNC_FAILS.take() {
        return Err(Errno::EIO.into());
    }
    file.sync_data()
}

/// Refuses a payload over the limit.
pub(crate) fn too_large(store: &Store, length: usize, op: &'static str) -> Result<()> {
    let most = store.config.max_bytes;
    if length > most {
        let text = format!("a record of {length} bytes; at most {most} are stored");
        return Err(Error::new(ErrorKind::TooLarge, op, text));
    }
    Ok(())
}

pub(crate) fn gone(op: &'static str) -> Error {
    Error::new(ErrorKind::Gone, op, "the session was destroyed or has expired; nothing was stored")
}

fn taken_by_another_user(op: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, op, "a file that is not ours stands where the session file should; it was left alone")
}

/// Whether the cause is that there is no room.
fn is_full(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    let errno = cause.and_then(io::Error::raw_os_error).map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG))
}

/// The limit of this process for the length of its files, as it was at most a tenth of a second ago: who lowers it does so when
/// his process begins, and asking costs as much as looking for a session.
fn recent_limit() -> u64 {
    // The clock of the timer tick: four times as cheap as the exact one.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE);
    LIMIT.with(|last| match (last.get(), now) {
        (Some((limit, asked)), Ok(now)) if Duration::from(now - asked) < Duration::from_millis(100) => limit,
        (_, now) => {
            let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(limit, _)| limit);
            last.set(now.ok().map(|now| (limit, now)));
            limit
        }
    })
}

/// Refuses to grow a file beyond the limit of this process: the kernel would not refuse but kill.
fn within_limit(end: u64, op: &'static str) -> Result<()> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if end > limit => {
            let text = format!("the file would grow to {end} bytes, and this process may write {limit} (RLIMIT_FSIZE)");
            Err(Error::new(ErrorKind::Unavailable, op, text))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    thread_local! {
        /// Makes the next sync of this thread fail, once, as a disk does: the kernel does not say it a second time.
        pub(super) static SYNC_FAILS: Cell<bool> = const { Cell::new(false) };
    }

    fn store(root: &tempfile::TempDir) -> Arc<Store> {
        let config = FileConfig::new(root.path().join("sessions"));
        Arc::new(Store::open(config).unwrap())
    }

    fn open(store: &Arc<Store>, id: &SessionId) -> Box<SessionFile> {
        match SessionFile::open(store, id, None, Manner::PASSING).unwrap() {
            Attempt::Done(Some((file, _))) => file,
            _ => panic!("the session is there and free"),
        }
    }

    #[test]
    fn a_failed_sync_is_unknown_and_its_repeat_writes_everything_again() {
        let root = tempfile::tempdir().unwrap();
        let store = store(&root);
        let (id, ttl) = (SessionId::generate().unwrap(), Ttl::from_secs(60));
        let mut file = SessionFile::create(&store, &id).unwrap().unwrap();
        for data in [b"first".as_slice(), b"second", b"third"] {
            let name = WriteId::random().unwrap();
            SYNC_FAILS.set(true);
            assert_eq!(file.write(data, ttl, name).unwrap_err().kind(), ErrorKind::Unknown);
            let place = file.reload("test").unwrap().current.unwrap().1;
            let again = file.write(data, ttl, name).unwrap();
            assert_eq!(again, Written::Applied, "what may not be on the disk is not called applied before");
            assert_ne!(file.current.unwrap().1, place, "the repeat left the write alone that failed");
            assert_eq!(file.write(data, ttl, name).unwrap(), Written::AlreadyApplied);
            assert_eq!(file.read().unwrap().unwrap().0.data, data);
        }
    }

    #[test]
    fn a_write_that_may_not_be_on_the_disk_is_synced_before_the_one_below_it_goes() {
        let root = tempfile::tempdir().unwrap();
        let store = store(&root);
        let (id, ttl) = (SessionId::generate().unwrap(), Ttl::from_secs(60));
        let mut file = SessionFile::create(&store, &id).unwrap().unwrap();
        file.write(b"on the disk", ttl, WriteId::random().unwrap()).unwrap();
        // A touch of the renewal is not synced; a writer that was killed before his sync leaves the same.
        file.renew(Duration::from_secs(3600)).unwrap();
        drop(file);
        let mut file = open(&store, &id);
        let before = file.reload("test").unwrap().current;
        SYNC_FAILS.set(true);
        let error = file.write(b"next", ttl, WriteId::random().unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "nothing was written yet");
        assert_eq!(file.reload("test").unwrap().current, before);
        file.write(b"next", ttl, WriteId::random().unwrap()).unwrap();
        drop(file);
        assert_eq!(open(&store, &id).read().unwrap().unwrap().0.data, b"next");
    }

    #[test]
    fn a_destroy_whose_sync_fails_is_unknown_and_can_be_repeated() {
        let root = tempfile::tempdir().unwrap();
        let store = store(&root);
        let (id, ttl) = (SessionId::generate().unwrap(), Ttl::from_secs(60));
        SessionFile::create(&store, &id).unwrap().unwrap().write(b"data", ttl, WriteId::random().unwrap()).unwrap();
        SYNC_FAILS.set(true);
        assert_eq!(destroy(&store, &id).unwrap_err().kind(), ErrorKind::Unknown);
        assert_eq!(destroy(&store, &id).unwrap(), None);
        assert!(std::fs::read_dir(&store.config.dir).unwrap().next().is_none());
    }
}
