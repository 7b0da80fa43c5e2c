//! What a store keeps for a session, and how a write says which state it is based on.

use std::cell::RefCell;
use std::fmt;

use crate::error::Result;
use crate::id::fill_random;
use crate::ttl::Ttl;

/// Opaque bytes and a length of life: to write, the [`Ttl`] to give; read back, what is left of it.
///
/// An empty record is a record; absence is `None`. `Debug` shows the length of the bytes, not the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    /// The payload. Handlers neither look into it nor change it.
    pub data: Vec<u8>,
    /// The time that it lives from the moment it is written, by the store's clock.
    pub ttl: Ttl,
}

impl Record {
    /// Makes a record.
    #[must_use]
    pub fn new(data: impl Into<Vec<u8>>, ttl: Ttl) -> Self {
        Self { data: data.into(), ttl }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record").field("bytes", &self.data.len()).field("ttl", &self.ttl).finish()
    }
}

/// The name of one write: 128 random bits, never used twice.
///
/// The store keeps the id of the last write beside the record. The next write names it as its `prev`, and is refused if it
/// is no longer the last: that is the fence. A write whose own id is the last one has been applied before, so a repeat after
/// a lost reply is recognised. A counter would do neither across a destroy, a restart or a failover (`locks.md` A1).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct WriteId([u8; 16]);

impl WriteId {
    /// Makes a new id.
    ///
    /// # Errors
    /// [`Unavailable`](crate::ErrorKind::Unavailable) if the operating system has no randomness to give.
    pub fn random() -> Result<Self> {
        POOL.with_borrow_mut(Pool::draw).map(Self)
    }

    /// Reads an id back from a store.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes to keep in a store.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { bytes: [0; 512], at: 512, process: 0 }) };
}

/// Random bytes of the operating system, fetched for many write ids at once: a write id is no secret, and a call of its own
/// costs as much as a tenth of a save to a file.
struct Pool {
    bytes: [u8; 512],
    at: usize,
    /// A forked child has a copy of what its parent will hand out, and must not.
    process: u32,
}

impl Pool {
    fn draw(&mut self) -> Result<[u8; 16]> {
        let process = std::process::id();
        if self.at == self.bytes.len() || self.process != process {
            fill_random(&mut self.bytes)?;
            (self.at, self.process) = (0, process);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&self.bytes[self.at..self.at + 16]);
        self.at += 16;
        Ok(id)
    }
}

impl fmt::Debug for WriteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A write id is no secret: who knows it can still not write without the session's id.
        write!(f, "WriteId({:02x}{:02x}{:02x}{:02x})", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// What [`save`](crate::OpenSession::save) is to do before it closes.
#[allow(clippy::exhaustive_enums, reason = "a new kind of change is a new duty, and every backend has to be asked")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Store this record.
    Write(Record),
    /// Leave the bytes alone and move the deadline to now plus this.
    Touch(Ttl),
    /// Remove the record.
    Destroy,
    /// Only close.
    Nothing,
}

/// How a write that is in force came to be.
#[allow(clippy::exhaustive_enums, reason = "there is no third way for a write to be in force")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// This call applied it.
    Applied,
    /// An earlier call under the same [`WriteId`] had applied it; this one changed nothing.
    AlreadyApplied,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn write_ids_are_different_on_every_thread_and_across_refills() {
        let draw = || (0..1000).map(|_| WriteId::random().unwrap()).collect::<Vec<_>>();
        let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(draw)).collect();
        let ids: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_eq!(ids.iter().collect::<HashSet<_>>().len(), 4000);
    }

    #[test]
    fn a_pool_of_another_process_is_not_drawn_from() {
        let mut pool = Pool { bytes: [7; 512], at: 0, process: std::process::id().wrapping_add(1) };
        assert_ne!(pool.draw().unwrap(), [7; 16]);
    }
}
