//! The lock on one open file: taken, given back, and what is left for others to read about it.
//!
//! Who may take it, and in which order, is decided elsewhere.

use std::fs::{File, TryLockError};
use std::io::{Seek, SeekFrom};
use std::time::Duration;

use session_core::Result;

use super::after;
use super::bytes::{read_head, write_at};
use crate::dir::fault;
use crate::layout::{HEADER, Header, WAITING_AT};
use crate::store::now;

/// How exact, in milliseconds, a holder's word is of since when he holds the lock.
const ROUGHLY: u64 = 50;

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
    pub(super) fn release(mut self) -> File {
        let file = self.0.take().expect("only a release takes it");
        let _ = file.unlock();
        file
    }

    /// Gives the lock back and keeps the file open; `None` if that cannot be. Only the drop is left to this.
    pub(super) fn give_back(&mut self) -> Option<File> {
        self.0.take().filter(|file| file.unlock().is_ok())
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

/// Leaves word of since when the lock is held, for whoever waits in vain: in the offset of the open file, which nothing else uses
/// and which the kernel shows to processes of the same user. It costs less than a write, it is there for a stopped holder too,
/// and it goes with the holder. What a holder just before has left is good enough. Returns what is there.
pub(super) fn stamp(mut file: &File, since: u64, before: Option<u64>) -> u64 {
    if let Some(before) = before.filter(|before| (*before..*before + ROUGHLY).contains(&since)) {
        return before;
    }
    let _ = file.seek(SeekFrom::Start(since));
    since
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
