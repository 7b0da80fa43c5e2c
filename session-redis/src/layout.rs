//! What stands where in Redis: the three keys of a session, the header of a record, the value of a lock.
//!
//! The scripts read and write the same; see `scripts/common.lua`. Nothing here talks to a server.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use session_core::{Holder, LeaseToken, Record, SessionId, Ttl, WriteId};

/// Begins a record, before the id of its last write.
const LIVE: &[u8; 4] = b"skr1";
/// Begins the trace of a destroyed record.
const BURIED: &[u8; 4] = b"skt1";
pub(crate) const HEADER: usize = 20;

/// What stands behind the session in the key of its lock.
pub(crate) const LOCK: &str = ":lock";
const QUEUE: &str = ":queue";
const PLACE: &str = ":new:";

/// The keys of one session. The braces make a Cluster keep them on one server. Clones share the text.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    /// The lock, which begins as the record's key does, and then the queue.
    text: Arc<str>,
    record: usize,
}

impl Keys {
    pub(crate) fn new(prefix: &str, id: &SessionId) -> Self {
        let id = id.as_str();
        let text = [prefix, "{", id, "}", LOCK, prefix, "{", id, "}", QUEUE].concat().into();
        Self { text, record: prefix.len() + id.len() + 2 }
    }

    /// The keys beside a record's own.
    pub(crate) fn of(record: &str) -> Self {
        Self { text: [record, LOCK, record, QUEUE].concat().into(), record: record.len() }
    }

    pub(crate) fn record(&self) -> &str {
        &self.text[..self.record]
    }

    pub(crate) fn lock(&self) -> &str {
        &self.text[..self.record + LOCK.len()]
    }

    pub(crate) fn queue(&self) -> &str {
        &self.text[self.record + LOCK.len()..]
    }

    /// Returns where the body of a write is put before the write is judged. No other write has the same, so nobody's body can be taken
    /// for that of another.
    pub(crate) fn place(&self, id: WriteId) -> String {
        let digits = digits(id.to_bytes());
        let mut place = String::with_capacity(self.record + PLACE.len() + digits.len());
        place.push_str(self.record());
        place.push_str(PLACE);
        place.extend(digits.iter().map(|digit| char::from(*digit)));
        place
    }

    /// Returns the slot that a Cluster goes by.
    pub(crate) fn slot(&self) -> u16 {
        let tag = self.record().split_once('{').map_or("", |(_, tag)| tag.trim_end_matches('}'));
        slot(tag.as_bytes())
    }

    /// Reads the id back from the key of a record.
    pub(crate) fn id(prefix: &str, record: &str) -> Option<SessionId> {
        SessionId::parse(record.strip_prefix(prefix)?.strip_prefix('{')?.strip_suffix('}')?)
    }
}

/// The slot of a Cluster that a hash tag belongs to: CRC-16/XMODEM modulo 16384 (Redis Cluster specification, appendix A).
fn slot(tag: &[u8]) -> u16 {
    let crc = tag.iter().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 })
    });
    crc % 16384
}

/// What stands under the key of a record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Absent,
    Live { last: WriteId, data: Vec<u8> },
    Buried { mark: WriteId },
    Foreign,
}

impl Body {
    pub(crate) fn parse(mut bytes: Vec<u8>) -> Self {
        let Some((kind, last)) = bytes.get(..HEADER).map(|head| head.split_at(4)) else { return Self::Foreign };
        let mut id = [0; 16];
        id.copy_from_slice(last);
        let id = WriteId::from_bytes(id);
        if kind == BURIED {
            Self::Buried { mark: id }
        } else if kind == LIVE {
            bytes.drain(..HEADER);
            Self::Live { last: id, data: bytes }
        } else {
            Self::Foreign
        }
    }

    /// Returns the header of a record whose last write is `id`.
    pub(crate) fn live_header(id: WriteId) -> [u8; HEADER] {
        header(LIVE, id)
    }

    /// Returns the header of the trace that the destruction `mark` left.
    pub(crate) fn buried_header(mark: WriteId) -> [u8; HEADER] {
        header(BURIED, mark)
    }

    /// Returns the write that the bytes of a record are named after.
    pub(crate) fn write_of(bytes: &[u8]) -> Option<WriteId> {
        let id = bytes.get(LIVE.len()..HEADER)?.try_into().ok()?;
        Some(WriteId::from_bytes(id))
    }

    /// Returns the bytes of a record.
    pub(crate) fn live(id: WriteId, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + data.len());
        bytes.extend_from_slice(&Self::live_header(id));
        bytes.extend_from_slice(data);
        bytes
    }
}

fn header(kind: &[u8; 4], id: WriteId) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(kind);
    header[4..].copy_from_slice(&id.to_bytes());
    header
}

/// Whether what begins with `head` is a record.
pub(crate) fn is_live(head: &[u8]) -> bool {
    head.len() == HEADER && head.starts_with(LIVE)
}

/// Makes a record of its bytes and of what `PTTL` said.
pub(crate) fn record(data: Vec<u8>, left: i64) -> Record {
    Record::new(data, Ttl::new(Duration::from_millis(u64::try_from(left).unwrap_or(0))))
}

pub(crate) type TokenText = [u8; 32];

/// Returns a token as the hexadecimal digits that stand in a lock.
pub(crate) fn token_text(token: LeaseToken) -> TokenText {
    digits(token.to_bytes())
}

fn digits(bytes: [u8; 16]) -> TokenText {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0; 32];
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    text
}

/// Returns the value of a lock: `token|lease|since|channel`.
pub(crate) fn lock_value(token: &TokenText, lease: Duration, channel: &str) -> Arc<[u8]> {
    use std::io::Write as _;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let mut value = Vec::with_capacity(80 + channel.len());
    value.extend_from_slice(token);
    let _ = write!(value, "|{}|{since}|{channel}", lease.as_millis().max(1));
    value.into()
}

/// Whether what stands in the key of a lock begins as every version of this library begins it.
pub(crate) fn is_lock(value: &[u8]) -> bool {
    matches!(value.split_first_chunk::<32>(), Some((token, [b'|', ..])) if token.iter().all(u8::is_ascii_hexdigit))
}

/// Reads who holds a lock from its value, as far as it tells.
pub(crate) fn holder(value: &[u8]) -> Option<Holder> {
    let mut parts = std::str::from_utf8(value).ok()?.splitn(4, '|');
    let since = parts.nth(2)?.parse().ok()?;
    let channel = parts.next()?;
    let (_, process) = channel.split_once(CHANNEL)?;
    let (process, _) = process.rsplit_once('#')?;
    let (pid, host) = process.split_once('@')?;
    Some(Holder { process: format!("pid {pid} on {host}"), since: UNIX_EPOCH + Duration::from_millis(since) })
}

/// What stands between the prefix and the process in the name of a channel.
const CHANNEL: &str = "wake:";

/// Returns the name of the channel on which a handler of this process is woken.
pub(crate) fn channel(prefix: &str, nonce: &str) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    let host: String =
        host.unwrap_or_default().trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c)).collect();
    let host = if host.is_empty() { "localhost" } else { &host };
    format!("{prefix}{CHANNEL}{}@{host}#{nonce}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys_of_a_session_are_in_the_slot_of_its_id() {
        // Test vectors of the specification.
        assert_eq!(slot(b"123456789"), 0x31C3);
        assert_eq!(slot(b"foo"), 12182);
        let id = SessionId::parse("0123456789abcdefghijkl").unwrap();
        let keys = Keys::new("app:", &id);
        assert_eq!(keys.record(), "app:{0123456789abcdefghijkl}");
        assert_eq!(keys.lock(), "app:{0123456789abcdefghijkl}:lock");
        assert_eq!(keys.slot(), slot(id.as_str().as_bytes()));
        assert_eq!(Keys::id("app:", keys.record()), Some(id));
        assert_eq!(Keys::id("app:", keys.lock()), None);
        assert_eq!(Keys::id("other:", keys.record()), None);
    }

    #[test]
    fn a_body_comes_back_as_it_was_written() {
        let id = WriteId::from_bytes([7; 16]);
        assert_eq!(Body::parse(Body::live(id, b"")), Body::Live { last: id, data: vec![] });
        assert_eq!(Body::parse(Body::live(id, b"abc")), Body::Live { last: id, data: b"abc".to_vec() });
        assert_eq!(Body::parse([&BURIED[..], &[7; 16]].concat()), Body::Buried { mark: id });
        for foreign in [&b""[..], b"skr1", b"{\"json\": \"longer than a header\"}"] {
            assert_eq!(Body::parse(foreign.to_vec()), Body::Foreign);
        }
    }

    #[test]
    fn a_lock_tells_who_holds_it() {
        let token = token_text(LeaseToken::from_bytes([0xab; 16]));
        assert_eq!(&token, b"abababababababababababababababab");
        let value = lock_value(&token, Duration::from_secs(30), &channel("app:", "n1"));
        let holder = holder(&value).unwrap();
        assert!(holder.process.starts_with(&format!("pid {} on ", std::process::id())), "{}", holder.process);
        assert!(holder.since.elapsed().unwrap() < Duration::from_secs(5));
        assert_eq!(super::holder(b"1"), None);
        assert!(is_lock(&value));
        for foreign in [&b""[..], b"1", &value[..32], &[&b"x"[..], &value].concat()] {
            assert!(!is_lock(foreign));
        }
    }
}
