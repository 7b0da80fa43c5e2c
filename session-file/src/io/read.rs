//! What a session file says: which entry is in force, for whoever has the lock and for whoever has not.
//!
//! Nothing here changes a file.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::time::Duration;

use session_core::{Error, ErrorKind, Record, Result, Ttl, WriteId};

use super::SessionFile;
use super::bytes::{read_at, read_head};
use crate::dir::{fault, stat};
use crate::layout::{ENTRY, Entry, FIRST_READ, Header, Place, entry_at};
use crate::store::now;

/// How often a reader starts over before a file counts as damaged, or as one that never stands still.
const READ_AGAIN: u32 = 10_000;

thread_local! {
    /// What is read, always [`FIRST_READ`] long.
    static HEAD: RefCell<Vec<u8>> = RefCell::new(vec![0; FIRST_READ]);
}

/// What a session file says.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) header: Header,
    /// The entry in force and where it stands.
    pub(crate) current: Option<(Entry, Place)>,
    /// Whether the entry in force is known to have reached the disk: then the other one is void.
    pub(super) settled: bool,
    data: Vec<u8>,
}

impl Content {
    pub(super) const NEW: Self = Self {
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

impl SessionFile {
    /// Reads the record anew.
    pub(crate) fn read(&mut self) -> Result<Option<(Record, WriteId)>> {
        let creating = self.creating;
        Ok(self.reload("read")?.live(now()).filter(|_| !creating))
    }

    pub(super) fn reload(&mut self, op: &'static str) -> Result<Content> {
        let mut content = load(&self.file, true, op)?;
        (self.second, self.current, self.settled) = (content.header.second, content.current, content.settled);
        self.unsynced = content.header.unsynced;
        let stat = stat(&*self.file).map_err(|cause| fault(op, cause))?;
        self.size = stat.size;
        content.header.dead |= stat.dead;
        self.stale = false;
        Ok(content)
    }
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

/// Whether a file that somebody else holds has no record that lives.
pub(crate) fn peek_absent(file: &File) -> bool {
    stat(file).is_ok_and(|stat| stat.dead) || load(file, false, "open").is_ok_and(|content| content.is_absent(now()))
}
