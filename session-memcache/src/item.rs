//! What stands where: the three keys of a session, the header before each payload, and what a lock says of its holder.
//!
//! An item is a header of 26 bytes (kind, name of the last write, lengths), the id if it is too long for a key, the payload, and
//! behind it the name of each destruction that came since, 16 bytes each. A destruction is an append because that is the one change that memcached
//! makes without knowing the state before: it voids every CAS number, and the first name is that of who removed what is there.
//! Nothing here knows commands.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use session_core::{Holder, LeaseToken, SessionId, Ttl, WriteId};
use sha2::{Digest, Sha256};

/// The bytes before the payload, if the id is not there too.
pub(crate) const HEADER: usize = 26;

/// The most that an item has beside its payload: the header, an id, and the names of a few destructions at once.
pub(crate) const BESIDE: usize = HEADER + SessionId::MAX_LEN + 8 * 16;

const LIVE: &[u8; 4] = b"skm1";
const BURIED: &[u8; 4] = b"skm0";
const STUB: &[u8; 4] = b"skm_";

/// What an accepted id cannot contain, so that no id is mistaken for another key.
const LOCK: &str = "lock.";
const NEXT: &str = "next.";
const HASHED: &str = "~";

/// The longest key that memcached takes.
pub(crate) const MAX_KEY: usize = 250;

/// The keys of a session.
#[derive(Debug)]
pub(crate) struct Keys {
    pub(crate) record: Arc<str>,
    pub(crate) lock: Arc<str>,
    /// The process that is next in line (`protocol.md` 13).
    pub(crate) next: Arc<str>,
    /// The id, if it is too long for a key and its hash stands there.
    pub(crate) alias: Option<SessionId>,
}

impl Keys {
    pub(crate) fn new(prefix: &str, id: &SessionId) -> Self {
        let name = id.as_str();
        if prefix.len() + LOCK.len() + name.len() <= MAX_KEY {
            let key = |infix: &str| [prefix, infix, name].concat().into();
            return Self { record: key(""), lock: key(LOCK), next: key(NEXT), alias: None };
        }
        let mut hash = String::from(HASHED);
        for byte in Sha256::digest(name.as_bytes()) {
            let _ = write!(hash, "{byte:02x}");
        }
        let key = |infix: &str| [prefix, infix, &hash].concat().into();
        Self { record: key(""), lock: key(LOCK), next: key(NEXT), alias: Some(id.clone()) }
    }

    fn alias(&self) -> &str {
        self.alias.as_ref().map_or("", SessionId::as_str)
    }

    /// Returns the value of the record.
    pub(crate) fn live(&self, last: WriteId, data: &[u8]) -> Vec<u8> {
        item(LIVE, last.to_bytes(), self.alias(), data)
    }

    /// Returns the value of a lock: `token|since|process|alias`.
    pub(crate) fn lock_value(&self, token: LeaseToken, process: &str) -> Vec<u8> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let mut value = String::with_capacity(48 + process.len());
        for byte in token.to_bytes() {
            let _ = write!(value, "{byte:02x}");
        }
        let _ = write!(value, "|{since}|{process}|{}", self.alias());
        value.into_bytes()
    }
}

/// What the key of an item says about its session.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// This is its id.
    Id(SessionId),
    /// Its id stands in the item.
    Hashed,
}

/// Reads the key of a record.
pub(crate) fn name_of_record(prefix: &str, key: &str) -> Option<Named> {
    let name = key.strip_prefix(prefix)?;
    if name.starts_with(HASHED) { Some(Named::Hashed) } else { SessionId::parse(name).map(Named::Id) }
}

/// Reads the key of a lock.
pub(crate) fn name_of_lock(prefix: &str, key: &str) -> Option<Named> {
    name_of_record("", key.strip_prefix(prefix)?.strip_prefix(LOCK)?)
}

/// What stands under the key of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Live {
        last: WriteId,
        data: Vec<u8>,
        /// The id, if its hash stands in the key.
        alias: Option<SessionId>,
    },
    Buried(Grave),
    /// The place of a record that somebody has locked and that is not there.
    Stub,
    Foreign,
}

/// What a destruction left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grave {
    /// The name of the last destruction.
    pub(crate) mark: WriteId,
    /// The name of the first one, and the payload that it removed; until the grave is swept.
    pub(crate) removed: Option<(WriteId, Vec<u8>)>,
    /// Whether there is nothing to sweep.
    pub(crate) clean: bool,
}

impl Body {
    pub(crate) fn parse(mut value: Vec<u8>) -> Self {
        let Some((header, rest)) = value.split_at_checked(HEADER) else { return Self::Foreign };
        let (kind, last) = ([header[0], header[1], header[2], header[3]], name(&header[4..20]));
        let length = u32::from_be_bytes([header[20], header[21], header[22], header[23]]) as usize;
        let alias = usize::from(u16::from_be_bytes([header[24], header[25]]));
        let Some((alias, rest)) = rest.split_at_checked(alias) else { return Self::Foreign };
        let Some((_, marks)) = rest.split_at_checked(length) else { return Self::Foreign };
        if marks.len() % 16 != 0 {
            return Self::Foreign;
        }
        let destroyed = marks.first_chunk::<16>().zip(marks.last_chunk::<16>());
        let destroyed = destroyed.map(|(first, mark)| (WriteId::from_bytes(*first), WriteId::from_bytes(*mark)));
        let before = HEADER + alias.len();
        let alias = std::str::from_utf8(alias).ok().and_then(SessionId::parse);
        let payload = move || {
            value.truncate(before + length);
            value.drain(..before);
            value
        };
        let grave = |mark, removed, clean| Self::Buried(Grave { mark, removed, clean });
        match (&kind, destroyed) {
            (LIVE, None) => Self::Live { last, data: payload(), alias },
            (LIVE, Some((first, mark))) => grave(mark, Some((first, payload())), false),
            (BURIED, None) => grave(last, None, true),
            (STUB, None) => Self::Stub,
            (BURIED | STUB, Some((_, mark))) => grave(mark, None, false),
            _ => Self::Foreign,
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        matches!(self, Self::Live { .. })
    }
}

fn name(bytes: &[u8]) -> WriteId {
    let mut name = [0; 16];
    name.copy_from_slice(bytes);
    WriteId::from_bytes(name)
}

fn item(kind: &[u8; 4], name: [u8; 16], alias: &str, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("a payload has been measured");
    let alias_length = u16::try_from(alias.len()).expect("an id is short");
    let mut value = Vec::with_capacity(HEADER + alias.len() + data.len());
    value.extend_from_slice(kind);
    value.extend_from_slice(&name);
    value.extend_from_slice(&length.to_be_bytes());
    value.extend_from_slice(&alias_length.to_be_bytes());
    value.extend_from_slice(alias.as_bytes());
    value.extend_from_slice(data);
    value
}

/// Returns the value of a trace without a payload.
pub(crate) fn buried(mark: WriteId) -> Vec<u8> {
    item(BURIED, mark.to_bytes(), "", &[])
}

/// Returns the value that keeps the place of a record that is not there.
pub(crate) fn stub() -> Vec<u8> {
    item(STUB, [0; 16], "", &[])
}

/// Returns for how many seconds to store what has to live for `ttl`.
///
/// The clock of memcached ticks once a second, so what is stored for `n` seconds ends after more than `n - 1` and at most `n`. A
/// life of whole seconds is therefore stored for one more: it is as long as it was asked for, and at most a second longer. What
/// has to end within a second and a little more may end early; nothing else gets it there.
pub(crate) fn seconds(ttl: Ttl) -> u64 {
    if ttl.as_millis() < 1000 { 1 } else { ttl.as_secs_ceil() + 1 }
}

/// Returns what is certainly left of a life that memcached counts `left` more seconds for.
pub(crate) fn left(left: u64) -> Ttl {
    Ttl::from_secs(left.saturating_sub(1))
}

/// Returns for how many seconds to store a lock or the place of a record, for a lease of this length.
pub(crate) fn lease_seconds(lease: Duration) -> u64 {
    Ttl::new(lease).as_secs_ceil() + 1
}

/// Returns for how many seconds to keep the trace of a destroyed record, if a lease is this long.
pub(crate) fn trace_seconds(lease: Duration) -> u64 {
    Ttl::new(lease.saturating_mul(2)).as_secs_ceil().max(60) + 1
}

/// Whether the value of a lock begins with this token.
pub(crate) fn is_lock_of(value: &[u8], token: LeaseToken) -> bool {
    let mut digits = value.chunks_exact(2);
    let digit = |byte: u8| char::from(byte).to_digit(16);
    token.to_bytes().iter().all(|byte| {
        let pair = digits.next().and_then(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?));
        pair == Some(u32::from(*byte))
    })
}

/// Reads who holds a lock from its value, as far as it tells.
pub(crate) fn holder(value: &[u8]) -> Option<Holder> {
    let mut parts = std::str::from_utf8(value).ok()?.splitn(4, '|').skip(1);
    let since = parts.next()?.parse().ok()?;
    let (process, _) = parts.next()?.rsplit_once('#')?;
    let (pid, host) = process.split_once('@')?;
    Some(Holder { process: format!("pid {pid} on {host}"), since: UNIX_EPOCH + Duration::from_millis(since) })
}

/// Reads the id from the value of a lock whose key has only its hash.
pub(crate) fn alias_of_lock(value: &[u8]) -> Option<SessionId> {
    SessionId::parse(std::str::from_utf8(value).ok()?.splitn(4, '|').nth(3)?)
}

/// Returns the name of a handler of this process, as it stands in locks: `pid@host#nonce`.
pub(crate) fn process(nonce: [u8; 4]) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    let host = host.unwrap_or_default();
    let host: String = host.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c)).take(64).collect();
    let host = if host.is_empty() { "localhost" } else { &host };
    format!("{}@{host}#{:08x}", std::process::id(), u32::from_be_bytes(nonce))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: u8) -> WriteId {
        WriteId::from_bytes([n; 16])
    }

    fn keys(id: &str) -> Keys {
        Keys::new("app:", &SessionId::parse(id).unwrap())
    }

    const SHORT: &str = "0123456789abcdefghijkl";

    #[test]
    fn what_was_stored_is_told_apart() {
        let keys = keys(SHORT);
        let parsed = |data: &[u8]| Body::parse(keys.live(name(1), data));
        assert_eq!(parsed(b""), Body::Live { last: name(1), data: vec![], alias: None });
        assert_eq!(parsed(b"cart"), Body::Live { last: name(1), data: b"cart".to_vec(), alias: None });
        assert_eq!(Body::parse(stub()), Body::Stub);
        assert_eq!(Body::parse(buried(name(2))), Body::Buried(Grave { mark: name(2), removed: None, clean: true }));
    }

    #[test]
    fn the_first_of_several_destructions_removed_and_the_last_is_the_mark() {
        let marked = |value: Vec<u8>| [value, vec![7; 16], vec![8; 16]].concat();
        let Body::Buried(grave) = Body::parse(marked(keys(SHORT).live(name(1), b"cart"))) else {
            panic!("it is not buried")
        };
        assert_eq!((grave.mark, grave.removed, grave.clean), (name(8), Some((name(7), b"cart".to_vec())), false));
        for value in [stub(), buried(name(2))] {
            let again = Grave { mark: name(8), removed: None, clean: false };
            assert_eq!(Body::parse(marked(value)), Body::Buried(again));
        }
    }

    #[test]
    fn what_nobody_of_us_wrote_is_foreign() {
        let item = keys(SHORT).live(name(1), b"cart");
        let long = [&item[..], &[0]].concat();
        let short = &item[..item.len() - 1];
        for foreign in [&b""[..], b"skm1", b"a:1:{s:4:\"cart\";}", b"{\"json\": \"as long as a header\"}", short, &long] {
            assert_eq!(Body::parse(foreign.to_vec()), Body::Foreign);
        }
    }

    #[test]
    fn no_id_has_the_key_of_another() {
        let keys = keys(SHORT);
        assert_eq!((&*keys.record, &*keys.lock), ("app:0123456789abcdefghijkl", "app:lock.0123456789abcdefghijkl"));
        let id = Some(Named::Id(SessionId::parse(SHORT).unwrap()));
        assert_eq!(name_of_record("app:", &keys.record), id);
        assert_eq!(name_of_lock("app:", &keys.lock), id);
        assert_eq!(name_of_record("app:", &keys.lock), None);
        assert_eq!(name_of_record("app:", &keys.next), None);
        assert_eq!(name_of_lock("app:", &keys.record), None);
    }

    #[test]
    fn an_id_that_is_too_long_for_a_key_stands_in_the_items() {
        for length in [22, 241, 242, 251, 256] {
            let text = "a".repeat(length);
            let (keys, id) = (keys(&text), SessionId::parse(&text).unwrap());
            assert!(keys.lock.len() <= MAX_KEY && keys.record.len() <= MAX_KEY);
            let hashed = length > 241;
            assert_eq!((keys.alias.is_some(), keys.record.contains(&text)), (hashed, !hashed));
            if hashed {
                assert_eq!(name_of_record("app:", &keys.record), Some(Named::Hashed));
                assert_eq!(name_of_lock("app:", &keys.lock), Some(Named::Hashed));
                let Body::Live { alias, data, .. } = Body::parse(keys.live(name(1), b"cart")) else {
                    panic!("it is not live")
                };
                assert_eq!((alias, &data[..]), (Some(id.clone()), &b"cart"[..]));
                assert_eq!(alias_of_lock(&keys.lock_value(LeaseToken::from_bytes([1; 16]), "p")), Some(id));
            }
        }
    }

    #[test]
    fn lives_are_counted_in_seconds_that_are_rounded_up() {
        let stored = |millis| seconds(Ttl::new(Duration::from_millis(millis)));
        assert_eq!([1, 999, 1000, 1001, 900_000].map(stored), [1, 1, 2, 3, 901]);
        assert_eq!(left(901), Ttl::from_secs(900));
        assert_eq!(left(0), Ttl::MIN);
        assert_eq!(lease_seconds(Duration::from_millis(1500)), 3);
        assert_eq!([10, 40].map(|lease| trace_seconds(Duration::from_secs(lease))), [61, 81]);
    }

    #[test]
    fn a_lock_tells_who_holds_it() {
        let token = LeaseToken::from_bytes([0xa7; 16]);
        let value = keys(SHORT).lock_value(token, &process([0, 0, 0, 1]));
        assert!(is_lock_of(&value, token));
        assert!(!is_lock_of(&value, LeaseToken::from_bytes([0xa8; 16])) && !is_lock_of(&value[..31], token));
        let holder = holder(&value).expect("it says so");
        assert!(holder.process.starts_with(&format!("pid {} on ", std::process::id())), "{}", holder.process);
        assert!(holder.since.elapsed().unwrap() < Duration::from_secs(5));
        assert_eq!(super::holder(b"1"), None);
    }
}
