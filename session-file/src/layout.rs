//! The session file: what stands where, and which of its two entries is the state.
//!
//! ```text
//!       0   magic and version (8), place of the second entry (4), unsynced (1), zero (3)      last of all at creation
//!      16   dead (1): a destroy that could not get the lock; nothing clears it, and the sticky bit of the file says the same
//!      24   waiting (8): until when somebody may be queueing, milliseconds since 1970; advisory
//!      32   holder (8), since (8): who holds the lock; advisory
//!      64   first entry (64), then room for a payload
//!  second   second entry (64), then room for payloads up to the end of the file
//! ```
//!
//! All numbers are little-endian. An entry is void if its sequence number is zero. An entry in force is never rewritten, and
//! a payload goes where the one in force is not, so a crash at any byte leaves the old state. Directly behind each entry is
//! room for its payload: the usual write is then one call on one block.
//!
//! Nothing here touches a file or knows about locks.

use session_core::WriteId;
use xxhash_rust::xxh3::xxh3_64;

/// Magic and version. The last byte is the version.
pub(crate) const MAGIC: [u8; 8] = *b"skfile\0\x01";
/// The length of the header, and the place of the first entry.
pub(crate) const HEADER: u64 = 64;
/// The length of an entry.
pub(crate) const ENTRY: u64 = 64;
/// What makes a file a session file: magic, version, the place of the second entry, the unsynced byte.
pub(crate) const FIXED: usize = 16;
/// The place of the unsynced byte: one until a write is known to have reached the disk.
pub(crate) const UNSYNCED_AT: u64 = 12;
/// The place of the dead byte.
pub(crate) const DEAD_AT: u64 = 16;
/// The dead byte of a destroyed session.
pub(crate) const DEAD: u8 = 0xde;
/// The place of the waiting mark.
pub(crate) const WAITING_AT: u64 = 24;
/// The place of the holder line.
pub(crate) const HOLDER_AT: u64 = 32;
/// How much is read at once: both entries and both payloads of a usual session.
pub(crate) const FIRST_READ: usize = 8192;

/// Where the second entry may stand: sessions that stay small fit into one block with both their payloads.
const SECONDS: [u64; 2] = [2048, 4096];

/// Why bytes are not a session file. No id, no payload.
pub(crate) type Flaw = &'static str;

/// One of the two entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    First,
    Second,
}

impl Place {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// The fixed part of a header, and what others may have written into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Where the second entry stands; `None` while no write has created the record.
    pub(crate) second: Option<u64>,
    pub(crate) unsynced: bool,
    pub(crate) dead: bool,
    pub(crate) waiting: u64,
    pub(crate) holder: u64,
    pub(crate) since: u64,
}

impl Header {
    /// Reads the first bytes of a file, cut off where the file ends.
    ///
    /// A file that is empty, or whose fixed part is all zero, has no record: it was made to be locked, or a power cut took what
    /// was in it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Flaw> {
        let mut head = [0; HEADER as usize];
        let length = bytes.len().min(head.len());
        head[..length].copy_from_slice(&bytes[..length]);
        let dead = match head[DEAD_AT as usize] {
            0 => Ok(false),
            DEAD => Ok(true),
            _ => Err("the header is damaged"),
        };
        let number = |at: u64| u64::from_le_bytes(eight(&head, at as usize));
        let (waiting, holder, since) = (number(WAITING_AT), number(HOLDER_AT), number(HOLDER_AT + 8));
        if head[..FIXED].iter().all(|byte| *byte == 0) {
            return Ok(Self { second: None, unsynced: false, dead: dead?, waiting, holder, since });
        }
        if head[..7] != MAGIC[..7] {
            return Err("it is not a session file of this library");
        }
        if head[7] != MAGIC[7] {
            return Err("it was written by another version of this library");
        }
        if length < head.len() {
            return Err("it is cut off within the header");
        }
        let second = u64::from(u32::from_le_bytes([head[8], head[9], head[10], head[11]]));
        let unsynced = head[UNSYNCED_AT as usize];
        if !SECONDS.contains(&second) || unsynced > 1 || head[13..FIXED] != [0; 3] {
            return Err("the header is damaged");
        }
        Ok(Self { second: Some(second), unsynced: unsynced == 1, dead: dead?, waiting, holder, since })
    }

    /// The bytes that make a file with entries a session file.
    pub(crate) fn fixed(second: u64) -> [u8; FIXED] {
        let mut bytes = [0; FIXED];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..].copy_from_slice(&second.to_le_bytes());
        bytes[UNSYNCED_AT as usize] = 1;
        bytes
    }

    /// Where the second entry of a new file should stand, by its first payload: with room to grow by half.
    pub(crate) fn second_for(payload: usize) -> u64 {
        let room = |second: u64| second - HEADER - ENTRY;
        let wanted = payload as u64 + payload as u64 / 2;
        SECONDS.into_iter().find(|second| wanted <= room(*second)).unwrap_or(SECONDS[1])
    }
}

/// Where an entry stands.
pub(crate) fn entry_at(place: Place, second: u64) -> u64 {
    match place {
        Place::First => HEADER,
        Place::Second => second,
    }
}

/// One write: its number, its name, how long it lives and where its payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Counts the writes and touches of one file, from a random number on.
    pub(crate) sequence: u64,
    pub(crate) write: WriteId,
    /// Milliseconds since 1970.
    pub(crate) deadline: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// The checksum of the payload. The one of the entry covers it, so a touch need not read the payload.
    pub(crate) sum: u64,
}

impl Entry {
    /// Makes the bytes, with a checksum at the end.
    pub(crate) fn encode(&self) -> [u8; ENTRY as usize] {
        let mut bytes = [0; ENTRY as usize];
        bytes[..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.write.to_bytes());
        bytes[24..32].copy_from_slice(&self.deadline.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.offset.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.length.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.sum.to_le_bytes());
        let own = checksum(&bytes[..56]);
        bytes[56..].copy_from_slice(&own.to_le_bytes());
        bytes
    }

    /// Reads an entry; `None` if it is void, torn or damaged.
    pub(crate) fn decode(bytes: &[u8; ENTRY as usize]) -> Option<Self> {
        let number = |at: usize| u64::from_le_bytes(eight(bytes, at));
        let mut write = [0; 16];
        write.copy_from_slice(&bytes[8..24]);
        let entry = Self {
            sequence: number(0),
            write: WriteId::from_bytes(write),
            deadline: number(24),
            offset: number(32),
            length: number(40),
            sum: number(48),
        };
        let whole = entry.sequence != 0 && checksum(&bytes[..56]) == number(56) && entry.end().is_some();
        whole.then_some(entry)
    }

    /// The number that an entry claims, whether or not it is whole; zero is void.
    pub(crate) fn claimed(bytes: &[u8; ENTRY as usize]) -> u64 {
        u64::from_le_bytes(eight(bytes, 0))
    }

    /// Whether `payload` is what this write stored.
    pub(crate) fn holds(&self, payload: &[u8]) -> bool {
        checksum(payload) == self.sum
    }

    /// The end of the payload; `None` if no file is that long.
    pub(crate) fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.length).filter(|end| self.offset >= HEADER + ENTRY && *end <= i64::MAX as u64)
    }
}

/// The number of the first write of a new file. Write ids are random, so two files of one id start far apart, and an old
/// reader cannot take one for the other.
pub(crate) fn first_sequence(write: WriteId) -> u64 {
    (u64::from_le_bytes(eight(&write.to_bytes(), 0)) >> 2) | 1
}

/// Where a payload of `length` goes whose entry stands at `target`: where neither an entry nor the payload in force is, behind
/// its own entry if possible, and within `size`, the length of the file, if possible.
pub(crate) fn place_payload(target: Place, second: u64, size: u64, in_force: Option<&Entry>, length: u64) -> u64 {
    let behind_first = HEADER + ENTRY;
    let behind_second = second + ENTRY;
    let taken = in_force.map_or((0, 0), |entry| (entry.offset, entry.offset + entry.length));
    let free = |from: u64| {
        let end = from + length;
        let fits = end <= second || from >= behind_second;
        fits && (end <= taken.0 || from >= taken.1 || length == 0)
    };
    let after_taken = taken.1.next_multiple_of(64);
    let (own, others) = match target {
        Place::First => (behind_first, behind_second),
        Place::Second => (behind_second, behind_first),
    };
    // Leaving the other entry's room free lets the next write be one call again, after a touch made both share one payload.
    let spare = (after_taken >= behind_first && after_taken + length <= size).then_some(after_taken);
    let beyond = after_taken.max(behind_second);
    [Some(own), spare, Some(others), Some(behind_second)].into_iter().flatten().find(|from| free(*from)).unwrap_or(beyond)
}

/// The checksum of an entry or a payload.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

fn eight(bytes: &[u8], at: usize) -> [u8; 8] {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    eight
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(offset: u64, length: u64) -> Entry {
        Entry { sequence: 7, write: WriteId::from_bytes([3; 16]), deadline: 99, offset, length, sum: checksum(b"payload") }
    }

    #[test]
    fn an_entry_survives_encoding_and_no_flipped_bit_goes_unseen() {
        let payload = b"payload".to_vec();
        let bytes = entry(128, 7).encode();
        assert_eq!(Entry::decode(&bytes), Some(entry(128, 7)));
        assert!(entry(128, 7).holds(&payload));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Entry::decode(&bad), None, "bit {bit}");
        }
        for bit in 0..payload.len() * 8 {
            let mut bad = payload.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!entry(128, 7).holds(&bad), "bit {bit}");
        }
        assert_eq!(Entry::decode(&entry(u64::MAX - 3, 7).encode()), None);
    }

    #[test]
    fn a_payload_never_lies_on_an_entry_or_on_the_payload_in_force() {
        let lengths = [0, 1, 63, 64, 500, 1900, 1920, 1921, 2048, 3968, 3969, 10_000, 70_000];
        for second in SECONDS {
            for length in lengths {
                for old in lengths {
                    for offset in [128, 640, second + 64, second + 64 + 2048, second + 64 + 80_000] {
                        if offset < second && offset + old > second {
                            continue;
                        }
                        for target in [Place::First, Place::Second] {
                            for size in [0, 4096, 8192, 200_000] {
                                let force = entry(offset, old);
                                let at = place_payload(target, second, size, Some(&force), length);
                                let hits = |from: u64, to: u64| length > 0 && from < at + length && at < to && from < to;
                                assert!(at >= 128 && !hits(second, second + 64), "{second} {length} at {at}");
                                assert!(!hits(offset, offset + old), "{second} {length} at {at} over {offset}+{old}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn writes_of_one_length_settle_into_one_call_each_even_after_a_touch() {
        for length in [100u64, 700, 1500, 3000] {
            let second = Header::second_for(length as usize);
            let size = 8192;
            let (mut place, mut force) = (Place::First, entry(128, length));
            place = place.other(); // a touch: the entry moves, the payload stays
            let mut calls = Vec::new();
            for _ in 0..6 {
                let target = place.other();
                let at = place_payload(target, second, size, Some(&force), length);
                calls.push(if at == entry_at(target, second) + ENTRY { 1 } else { 2 });
                (place, force) = (target, entry(at, length));
            }
            if length < 1500 {
                assert_eq!(calls[1..], [1; 5], "{length}");
            }
        }
    }

    #[test]
    fn payloads_that_grow_by_one_do_not_grow_the_file_without_bound() {
        let (mut place, mut force, mut size) = (Place::First, entry(128, 5000), 0);
        for length in 5000..9000 {
            let target = place.other();
            let at = place_payload(target, 4096, size, Some(&force), length);
            size = size.max(at + length);
            (place, force) = (target, entry(at, length));
        }
        assert!(size < 4 * 9000 + 4096, "{size}");
    }
}
