//! What stands in the bytes of a record: what kind of thing it is, who can read it, and the values by key.
//!
//! ```text
//! data     magic 4 | version 1 | kind 1 | codec 1 | flags 1 | created 8 | authenticated 8 | [origin] | [realm] | entries | checksum 8
//! forward  magic 4 | version 1 | kind 2 | 0       | flags 1 | target                                          | checksum 8
//! retired  magic 4 | version 1 | kind 3 | 0       | 0       |                                                   checksum 8
//! ```
//! Numbers are little-endian. `origin`, `realm` and `target` are a length and bytes; `entries` is a count, then for each key, in
//! ascending order, the length and bytes of the key and of the value. Lengths and counts are LEB128 in the shortest form. So
//! a payload has one encoding, and what decodes encodes to the same bytes. The checksum (XXH3, 64 bits) covers all before it:
//! most single flips of a bit would otherwise decode as something else. It does not protect against forgery.
//!
//! Values are not decoded here, and neither ids nor keys of the store are known.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::codec::Codec;
use crate::error::{Error, ErrorKind, Result};
use crate::values::Values;

/// The most values that a session may have.
pub(crate) const MAX_ENTRIES: usize = 100_000;
/// The longest key, in bytes of UTF-8.
pub(crate) const MAX_KEY: usize = 1024;

// The first byte is in no text, so nothing that a PHP or JSON store holds begins like this.
const MAGIC: [u8; 4] = *b"\xe5skv";
const VERSION: u8 = 1;
const HEADER: usize = 8;
const CHECKSUM: usize = 8;

const DATA: u8 = 1;
const FORWARD: u8 = 2;
const RETIRED: u8 = 3;

const HAS_ORIGIN: u8 = 1 << 0;
const SEEN: u8 = 1 << 1;
const HAS_REALM: u8 = 1 << 2;
// Kept for a version that has them; this one refuses them.
const COMPRESSED: u8 = 1 << 6;
const SEALED: u8 = 1 << 7;

/// What a record says.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Payload {
    /// A session.
    Data(Data),
    /// The session goes on under another id.
    Forward(Forward),
    /// The id is used up: a login took the session elsewhere and does not say where.
    Retired,
}

/// A session.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Data {
    /// The codec of all values.
    pub(crate) codec: Codec,
    /// When the session began, in milliseconds since 1970.
    pub(crate) created: i64,
    /// When its user proved who he is, in the same unit; for an anonymous session, when it began.
    pub(crate) authenticated: i64,
    /// The sealed id that this session was rotated from, until the new one was presented.
    pub(crate) origin: Option<Bytes>,
    /// Under which name alone this session is known, if only under one.
    pub(crate) realm: Option<Bytes>,
    /// The values.
    pub(crate) values: Values,
}

/// A pointer to the id under which a session goes on.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Forward {
    /// The sealed new id.
    pub(crate) target: Bytes,
    /// Whether the new id was presented, so that the grace time runs.
    pub(crate) seen: bool,
}

impl Payload {
    /// Reads the bytes of a record.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt), with what is wrong: all of `bytes` must be what [`encode`](Self::encode) makes.
    pub(crate) fn decode(bytes: Vec<u8>) -> Result<Self> {
        let bytes = Bytes::from(bytes);
        let start = bytes.len().min(MAGIC.len());
        if bytes[..start] != MAGIC[..start] {
            return Err(corrupt("not a session of this library: the first bytes are others"));
        }
        if bytes.len() < HEADER + CHECKSUM {
            return Err(corrupt(TRUNCATED));
        }
        let (version, kind, codec, flags) = (bytes[4], bytes[5], bytes[6], bytes[7]);
        // Before the checksum, which may be another one there.
        match version {
            VERSION => {}
            0 => return Err(corrupt("envelope version 0 never existed")),
            newer => return Err(corrupt(format!("written by a newer version: envelope {newer}, this one reads {VERSION}"))),
        }
        let body = bytes.len() - CHECKSUM;
        if bytes[body..] != xxh3_64(&bytes[..body]).to_le_bytes() {
            return Err(corrupt("the checksum does not match: truncated or damaged"));
        }
        let mut reader = Reader { bytes: &bytes, at: HEADER, end: body };
        let payload = match kind {
            DATA => {
                allow(flags, HAS_ORIGIN | HAS_REALM)?;
                let codec = Codec::from_id(codec)?;
                let (created, authenticated) = (reader.i64()?, reader.i64()?);
                let origin = if flags & HAS_ORIGIN == 0 { None } else { Some(reader.field()?) };
                let realm = if flags & HAS_REALM == 0 { None } else { Some(reader.field()?) };
                Self::Data(Data { codec, created, authenticated, origin, realm, values: reader.values()? })
            }
            FORWARD | RETIRED if codec != 0 => return Err(corrupt("a mark that names a codec")),
            FORWARD => {
                allow(flags, SEEN)?;
                Self::Forward(Forward { target: reader.field()?, seen: flags & SEEN != 0 })
            }
            RETIRED => {
                allow(flags, 0)?;
                Self::Retired
            }
            other => return Err(corrupt(format!("envelope kind {other} is unknown"))),
        };
        if reader.at != reader.end {
            return Err(corrupt("bytes behind the end"));
        }
        Ok(payload)
    }

    /// Writes the bytes of a record. Keys and counts are within bounds: [`check_key`] was asked when they came in.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (kind, codec, flags) = match self {
            Self::Data(data) => (DATA, data.codec.id(), data.flags()),
            Self::Forward(forward) => (FORWARD, 0, if forward.seen { SEEN } else { 0 }),
            Self::Retired => (RETIRED, 0, 0),
        };
        let mut out = Vec::with_capacity(self.size());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, kind, codec, flags]);
        match self {
            Self::Data(data) => {
                out.extend_from_slice(&data.created.to_le_bytes());
                out.extend_from_slice(&data.authenticated.to_le_bytes());
                for field in data.origin.iter().chain(&data.realm) {
                    put_field(&mut out, field);
                }
                put_number(&mut out, data.values.len());
                for (key, value) in data.values.iter() {
                    put_field(&mut out, key.as_bytes());
                    put_field(&mut out, value);
                }
            }
            Self::Forward(forward) => put_field(&mut out, &forward.target),
            Self::Retired => {}
        }
        let checksum = xxh3_64(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Returns the number of bytes that [`encode`](Self::encode) makes.
    pub(crate) fn size(&self) -> usize {
        let field = |length: usize| number_size(length) + length;
        let body = match self {
            Self::Data(data) => {
                let marks: usize = data.origin.iter().chain(&data.realm).map(|mark| field(mark.len())).sum();
                let entries = data.values.iter().map(|(key, value)| field(key.len()) + field(value.len()));
                16 + marks + number_size(data.values.len()) + entries.sum::<usize>()
            }
            Self::Forward(forward) => field(forward.target.len()),
            Self::Retired => 0,
        };
        HEADER + body + CHECKSUM
    }
}

impl Data {
    fn flags(&self) -> u8 {
        let origin = if self.origin.is_some() { HAS_ORIGIN } else { 0 };
        let realm = if self.realm.is_some() { HAS_REALM } else { 0 };
        origin | realm
    }
}

/// Refuses a key that could not be read again, or one too many; asked when a value is put into a session, because at its end
/// it would be too late.
///
/// # Errors
/// [`TooLarge`](ErrorKind::TooLarge) with the limit.
pub(crate) fn check_key(key: &str, values: &Values) -> Result<()> {
    let too_large = |message: String| Err(Error::new(ErrorKind::TooLarge, "insert", message));
    if key.len() > MAX_KEY {
        return too_large(format!("key of {} bytes, at most {MAX_KEY} are accepted", key.len()));
    }
    if values.len() >= MAX_ENTRIES && !values.contains_key(key) {
        return too_large(format!("a session holds at most {MAX_ENTRIES} values"));
    }
    Ok(())
}

// Values and sealed ids are nobody's business; how much there is of them is.
impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(data) => data.fmt(f),
            Self::Forward(forward) => forward.fmt(f),
            Self::Retired => f.write_str("Retired"),
        }
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: usize = self.values.iter().map(|(_, value)| value.len()).sum();
        let mut shown = f.debug_struct("Data");
        shown.field("codec", &self.codec).field("created", &self.created).field("authenticated", &self.authenticated);
        shown.field("rotated", &self.origin.is_some()).field("values", &self.values.len()).field("bytes", &bytes).finish()
    }
}

impl fmt::Debug for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Forward").field("seen", &self.seen).finish_non_exhaustive()
    }
}

const TRUNCATED: &str = "truncated";

fn corrupt(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Corrupt, "decode", message)
}

fn allow(flags: u8, known: u8) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        COMPRESSED => Err(corrupt("written by a newer version: compressed")),
        SEALED => Err(corrupt("written by a newer version: sealed")),
        _ => Err(corrupt(format!("envelope flags {flags:#04x} are unknown"))),
    }
}

struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
    end: usize,
}

impl Reader<'_> {
    fn i64(&mut self) -> Result<i64> {
        let bytes = self.bytes[self.at..self.end].first_chunk::<8>().ok_or_else(|| corrupt(TRUNCATED))?;
        self.at += 8;
        Ok(i64::from_le_bytes(*bytes))
    }

    fn number(&mut self) -> Result<usize> {
        let (mut number, mut shift) = (0u64, 0);
        for &byte in &self.bytes[self.at..self.end] {
            self.at += 1;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(corrupt("a number is not in its shortest form"));
                }
                return usize::try_from(number).map_err(|_| corrupt(TRUNCATED));
            }
            shift += 7;
            // Nine groups of seven bits are more than any length.
            if shift > 56 {
                return Err(corrupt("a number is too long"));
            }
        }
        Err(corrupt(TRUNCATED))
    }

    fn span(&mut self) -> Result<Range<usize>> {
        let length = self.number()?;
        if length > self.end - self.at {
            return Err(corrupt(TRUNCATED));
        }
        let start = self.at;
        self.at += length;
        Ok(start..self.at)
    }

    fn field(&mut self) -> Result<Bytes> {
        let span = self.span()?;
        Ok(self.bytes.slice(span))
    }

    fn values(&mut self) -> Result<Values> {
        let count = self.number()?;
        if count > MAX_ENTRIES {
            return Err(corrupt(format!("{count} values, at most {MAX_ENTRIES} are accepted")));
        }
        // An entry has two lengths at least.
        if count > (self.end - self.at) / 2 {
            return Err(corrupt(TRUNCATED));
        }
        // The count is a claim: no more is reserved at once than the bytes can pay for, at 16 an entry.
        let mut places = Vec::<(Range<usize>, Range<usize>)>::with_capacity(count.min((self.end - self.at) / 16));
        for _ in 0..count {
            let key = self.span()?;
            if key.len() > MAX_KEY {
                return Err(corrupt(format!("a key of {} bytes, at most {MAX_KEY} are accepted", key.len())));
            }
            if std::str::from_utf8(&self.bytes[key.clone()]).is_err() {
                return Err(corrupt("a key is not UTF-8"));
            }
            if places.last().is_some_and(|(last, _)| self.bytes[last.clone()] >= self.bytes[key.clone()]) {
                return Err(corrupt("the keys are not in ascending order, or one is there twice"));
            }
            places.push((key, self.span()?));
        }
        Values::stored(self.bytes.clone(), &places).ok_or_else(|| corrupt("a record of more than four gigabytes"))
    }
}

fn number_size(number: usize) -> usize {
    (usize::BITS - (number | 1).leading_zeros()).div_ceil(7) as usize
}

fn put_number(out: &mut Vec<u8>, mut number: usize) {
    while number > 0x7f {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_field(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len());
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn payloads() -> Vec<Payload> {
        let values = [("", &b""[..]), ("cart", b"\x01\x02"), ("user", &[7; 300])];
        let values: Values = values.into_iter().collect();
        let data = Data { codec: Codec::MessagePack, created: 1, authenticated: -1, origin: None, realm: None, values };
        let rotated = Data { origin: Some(Bytes::from_static(b"sealed")), values: Values::default(), ..data.clone() };
        let named = Data { realm: Some(Bytes::from_static(b"shop")), ..rotated.clone() };
        let forward = Forward { target: Bytes::from_static(b"sealed"), seen: false };
        let seen = Forward { seen: true, ..forward.clone() };
        vec![
            Payload::Data(data),
            Payload::Data(rotated),
            Payload::Forward(forward),
            Payload::Forward(seen),
            Payload::Retired,
            Payload::Data(named),
        ]
    }

    /// Puts the right checksum behind `body`.
    fn checked(body: &[u8]) -> Vec<u8> {
        [body, &xxh3_64(body).to_le_bytes()].concat()
    }

    fn header(kind: u8, codec: u8, flags: u8) -> Vec<u8> {
        [&MAGIC[..], &[VERSION, kind, codec, flags]].concat()
    }

    /// A session whose entries are `entries`.
    fn session(entries: &[u8]) -> Vec<u8> {
        checked(&[&header(DATA, 1, 0)[..], &[0; 16], entries].concat())
    }

    fn refusal(bytes: Vec<u8>) -> String {
        let error = Payload::decode(bytes).expect_err("hostile bytes were accepted");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        error.to_string()
    }

    #[test]
    fn what_is_written_is_read_and_fills_its_buffer() {
        for payload in payloads() {
            let bytes = payload.encode();
            assert_eq!(bytes.len(), payload.size());
            assert_eq!(Payload::decode(bytes).unwrap(), payload);
        }
    }

    #[test]
    fn the_layout_is_what_it_was() {
        let hex = |payload: &Payload| payload.encode().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let expected = [
            "e5736b76010101000100000000000000ffffffffffffffff",
            "e5736b76010101010100000000000000ffffffffffffffff067365616c656400",
            "e5736b7601020000067365616c6564",
            "e5736b7601020002067365616c6564",
            "e5736b7601030000",
            "e5736b76010101050100000000000000ffffffffffffffff067365616c65640473686f7000",
        ];
        for (payload, expected) in payloads().iter().zip(expected) {
            assert!(hex(payload).starts_with(expected), "{payload:?}: {}", hex(payload));
        }
        assert_eq!(hex(&payloads()[4]), "e5736b760103000069a55ade6bced4dd");
        assert_eq!(hex(&payloads()[1]), "e5736b76010101010100000000000000ffffffffffffffff067365616c656400d324a11a9e6bce1f");
    }

    #[test]
    fn values_are_slices_of_the_one_buffer() {
        let bytes = payloads()[0].encode();
        let within = bytes.as_ptr_range();
        let Payload::Data(data) = Payload::decode(bytes).unwrap() else { panic!("not a session") };
        assert!(
            data.values.iter().filter(|(_, value)| !value.is_empty()).all(|(_, value)| within.contains(&value.as_ptr()))
        );
    }

    #[test]
    fn every_flip_of_a_bit_is_refused() {
        for payload in payloads() {
            let bytes = payload.encode();
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                refusal(damaged);
            }
        }
    }

    #[test]
    fn every_cut_and_every_tail_is_refused() {
        for payload in payloads() {
            let bytes = payload.encode();
            for cut in 0..bytes.len() {
                refusal(bytes[..cut].to_vec());
                // Cut, and signed again by whoever cut it.
                if (HEADER..bytes.len() - CHECKSUM).contains(&cut) {
                    assert!(refusal(checked(&bytes[..cut])).contains("truncated"));
                }
            }
            let body = &bytes[..bytes.len() - CHECKSUM];
            assert!(refusal(checked(&[body, b"\0"].concat())).contains("behind the end"));
            assert!(refusal([&bytes[..], &bytes[..]].concat()).contains("checksum"));
        }
    }

    #[test]
    fn the_text_says_what_is_wrong() {
        let with = |at: usize, byte: u8| {
            let mut body = [&header(DATA, 1, 0)[..], &[0; 17]].concat();
            body[at] = byte;
            refusal(checked(&body))
        };
        assert!(refusal(b"a:1:{s:4:\"user\";i:7;}".to_vec()).contains("not a session of this library"));
        assert!(refusal(b"{}".to_vec()).contains("not a session of this library"));
        assert!(refusal(Vec::new()).contains("truncated"));
        assert!(with(4, 2).contains("written by a newer version: envelope 2"));
        assert!(with(4, 0).contains("version 0"));
        assert!(with(5, 9).contains("kind 9"));
        assert!(with(6, 0).contains("codec number 0"));
        assert!(with(6, 200).contains("codec number 200"));
        assert!(with(7, COMPRESSED).contains("newer version: compressed"));
        assert!(with(7, SEALED).contains("newer version: sealed"));
        assert!(with(7, SEEN).contains("flags 0x02"));
        assert!(with(7, 0x14).contains("flags 0x14"));
        for (kind, flags) in [(FORWARD, HAS_ORIGIN), (RETIRED, SEEN), (RETIRED, HAS_ORIGIN)] {
            let body = [&header(kind, 0, flags)[..], if kind == FORWARD { b"\x01x" } else { b"" }].concat();
            assert!(refusal(checked(&body)).contains("flags"));
        }
        assert!(refusal(checked(&header(RETIRED, 1, 0))).contains("names a codec"));
    }

    #[test]
    fn entries_have_one_form() {
        assert!(Payload::decode(session(b"\x02\x01a\x00\x01b\x01x")).is_ok());
        assert!(refusal(session(b"\x02\x01b\x00\x01a\x01x")).contains("ascending"));
        assert!(refusal(session(b"\x02\x01a\x00\x01a\x01x")).contains("ascending"));
        assert!(refusal(session(b"\x81\x00\x01a\x00")).contains("shortest"));
        assert!(refusal(session(b"\x01\x81\x00a\x00")).contains("shortest"));
        assert!(refusal(session(b"\x01\x01\xff\x00")).contains("UTF-8"));
        assert!(refusal(session(&[0xff; 20])).contains("too long"));
    }

    #[test]
    fn what_is_only_claimed_is_refused() {
        let count = |count: usize| {
            let mut out = Vec::new();
            put_number(&mut out, count);
            out
        };
        for claim in [MAX_ENTRIES + 1, 1 << 40, (1 << 56) - 1] {
            assert!(refusal(session(&count(claim))).contains("at most 100000"));
            assert!(refusal(session(&[b"\x01", &count(claim)[..], b"abc"].concat())).contains("truncated"));
            assert!(refusal(session(&[b"\x01\x01a", &count(claim)[..], b"abc"].concat())).contains("truncated"));
            assert!(refusal(checked(&[header(FORWARD, 0, 0), count(claim)].concat())).contains("truncated"));
        }
        assert!(refusal(session(&[count(MAX_ENTRIES), vec![0; 1000]].concat())).contains("truncated"));
        let entry = |length: usize| [vec![1], count(length), vec![b'k'; length], vec![0]].concat();
        assert!(Payload::decode(session(&entry(MAX_KEY))).is_ok());
        assert!(refusal(session(&entry(MAX_KEY + 1))).contains("at most 1024"));
    }

    #[test]
    fn what_could_not_be_read_is_refused_when_it_is_put_in() {
        let mut values: Values = (0..MAX_ENTRIES).map(|n| (format!("{n:06}"), Bytes::new())).collect();
        assert!(check_key("000001", &values).is_ok());
        assert_eq!(check_key("more", &values).unwrap_err().kind(), ErrorKind::TooLarge);
        let full = Data {
            codec: Codec::MessagePack,
            created: 0,
            authenticated: 0,
            origin: None,
            realm: None,
            values: values.clone(),
        };
        assert!(Payload::decode(Payload::Data(full).encode()).is_ok());
        values.remove("000001");
        assert!(check_key("more", &values).is_ok());
        assert!(check_key(&"k".repeat(MAX_KEY), &values).is_ok());
        assert_eq!(check_key(&"k".repeat(MAX_KEY + 1), &values).unwrap_err().kind(), ErrorKind::TooLarge);
    }

    #[test]
    fn debug_shows_no_value_and_no_key() {
        for payload in payloads() {
            let text = format!("{payload:?}");
            assert!(!text.contains("cart") && !text.contains("sealed") && !text.contains('\u{7}'), "{text}");
        }
    }

    fn any_payload() -> impl Strategy<Value = Payload> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from);
        let entries = prop::collection::btree_map(any::<String>(), bytes(), 0..20);
        let mark = || prop::option::of(bytes());
        let codec =
            prop::sample::select(vec![1u8, 2, 3, 4]).prop_filter_map("not in this build", |id| Codec::from_id(id).ok());
        let data = (codec, any::<i64>(), any::<i64>(), mark(), mark(), entries).prop_map(
            |(codec, created, authenticated, origin, realm, values)| {
                let values = values.into_iter().collect();
                Payload::Data(Data { codec, created, authenticated, origin, realm, values })
            },
        );
        let forward = (bytes(), any::<bool>()).prop_map(|(target, seen)| Payload::Forward(Forward { target, seen }));
        prop_oneof![8 => data, 2 => forward, 1 => Just(Payload::Retired)]
    }

    proptest! {
        #[test]
        fn every_payload_comes_back(payload in any_payload()) {
            let bytes = payload.encode();
            prop_assert_eq!(bytes.len(), payload.size());
            prop_assert_eq!(Payload::decode(bytes).unwrap(), payload);
        }

        #[test]
        fn what_is_accepted_has_no_other_form(
            payload in any_payload(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), 0u8..9), 0..4),
        ) {
            let mut body = payload.encode();
            body.truncate(body.len() - CHECKSUM);
            for (place, byte) in damage {
                let place = place.index(body.len());
                body[place] = byte;
            }
            let bytes = checked(&body);
            if let Ok(accepted) = Payload::decode(bytes.clone()) {
                prop_assert_eq!(accepted.encode(), bytes);
            }
        }
    }

    #[test]
    fn random_bytes_are_refused_or_have_no_other_form() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut accepted = 0;
        for round in 0..100_000 {
            // Small numbers, so that lengths fit now and then.
            let tail: Vec<u8> = (0..random() % 24).map(|_| (random() % 5) as u8).collect();
            let bytes = match round % 4 {
                0 => tail,
                1 => [&MAGIC[..], &tail].concat(),
                2 => {
                    checked(&[&header((random() % 4) as u8, (random() % 2) as u8, (random() % 4) as u8)[..], &tail].concat())
                }
                _ => session(&tail),
            };
            if let Ok(payload) = Payload::decode(bytes.clone()) {
                accepted += 1;
                assert_eq!(payload.encode(), bytes);
            }
        }
        assert!(accepted > 100, "only {accepted} were accepted, so too little was tried");
    }
}
