//! One session file under its lock, in six parts.
//!
//! Reading order: [`open`] (how an opener comes to it), [`claim`] (the lock), [`read`] (what the file says), [`write`], [`destroy`],
//! and below them [`bytes`]. The rules of the format are in [`layout`](crate::layout); who gets the lock is decided elsewhere.

mod bytes;
mod claim;
mod destroy;
mod open;
mod read;
mod write;

use std::sync::Arc;
use std::time::Duration;

use session_core::{Error, ErrorKind, Result, SessionId, WriteId};

pub(crate) use self::bytes::{read_head, write_at};
pub(crate) use self::claim::{Claim, mark_waiting};
pub(crate) use self::destroy::{destroy, is_forgotten};
pub(crate) use self::open::{Manner, Opened, Turn};
pub(crate) use self::read::{load, peek_absent};
pub(crate) use self::write::{Begun, Unsynced};
use crate::dir::Identity;
use crate::kept::{Born, Idle, Key, Known};
use crate::layout::{Entry, Place};
use crate::store::Store;
use crate::wait;

/// Payloads up to this length are copied in place.
pub(crate) const SMALL: usize = 64 << 10;
/// How often an opener starts over because files come and go under the name.
const OPEN_AGAIN: u32 = 1000;
/// How often whoever created a file tries to lock it before somebody else has it.
const LOOKS: u32 = 100;

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
    /// What is left as word of that in the offset of the file.
    stamped: u64,
    key: Key,
    identity: Identity,
    /// When the file was opened, if it may stay open afterwards: not if it is new, if [`Kept`](crate::kept::Kept) has not
    /// seen the session lately, or if somebody stood in line with it, who may have left something of that behind.
    born: Option<Born>,
    /// Whether the holder line is written.
    signed: bool,
}

impl SessionFile {
    /// Returns the id of the last write.
    pub(crate) fn last_write(&self) -> Option<WriteId> {
        self.current.filter(|_| !self.creating).map(|(entry, _)| entry.write)
    }

    /// Gives the lock back after a clean end, and leaves the file open for the next who opens the session.
    pub(crate) fn give_back(mut self) {
        let clean = !self.empty && !self.creating && !self.stale && self.size <= SMALL as u64;
        let Some(born) = self.born.filter(|_| clean) else { return };
        let Some(file) = self.file.give_back() else { return };
        // Closing is what wakes those who wait. Who took his ticket after this look tries after the unlocking, and needs no waking.
        if wait::nobody_waits(&file) {
            let known = Known { identity: self.identity, born, stamped: self.stamped };
            self.store.dir.kept.leave(Idle { key: self.key, file, known });
        }
    }
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

/// Adds a length of time to an instant, both in milliseconds.
fn after(now: u64, length: Duration) -> u64 {
    now.saturating_add(u64::try_from(length.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use session_core::{Ttl, Written};

    use super::*;
    use crate::config::FileConfig;
    use crate::wait::Attempt;

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
