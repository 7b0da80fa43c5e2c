//! Writing, touching and renewing a record under its lock: what is written where, in which order, and what the disk has of it.
//!
//! The rules of the format are in [`layout`](crate::layout).

use std::cell::RefCell;
use std::io;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use session_core::{Error, ErrorKind, Result, Ttl, WriteId, Written};

use super::bytes::{begin_sync, is_full, sync, within_limit, write_at};
use super::{SMALL, SessionFile, after, gone, too_large};
use crate::config::Durability;
use crate::dir::{fault, stat};
use crate::layout::{
    ENTRY, Entry, FIXED, HEADER, HOLDER_AT, Header, Place, UNSYNCED_AT, checksum, entry_at, first_sequence, place_payload,
};
use crate::store::now;

thread_local! {
    /// What is written.
    static TAIL: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

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

impl SessionFile {
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

    /// Writes who holds the lock, for those who wait. Nothing depends on it.
    pub(super) fn sign(&mut self) {
        if self.size >= HEADER && !self.signed {
            self.signed = true;
            let mut line = [0; 16];
            line[..8].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
            line[8..].copy_from_slice(&self.since.to_le_bytes());
            let _ = write_at(&self.file, &line, HOLDER_AT);
        }
    }

    pub(super) fn prolong(&mut self, lease: Duration, now: u64) {
        let ahead = after(now, lease.saturating_mul(2));
        if let Some((entry, _)) = self.current
            && entry.deadline < ahead
            && let Err(error) = self.put(None, entry.write, ahead, false, "open")
        {
            // The renewal will try again, and the write will say what is wrong.
            tracing::debug!(%error, "the deadline of a session could not be moved ahead");
        }
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

    /// Has the disk begin with what [`finish`](Self::finish) will wait for.
    pub(crate) fn begin_sync(&self) {
        if let Some((entry, place)) = self.current {
            let at = entry_at(place, self.second.unwrap_or(HEADER));
            begin_sync(&self.file, at, entry.end().unwrap_or_default().max(at + ENTRY));
        }
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
}
