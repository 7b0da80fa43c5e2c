//! What stands in the bytes of a record: what kind of thing it is, who can read it, and the values by key.
//!
//! ```text
//! data     magic 4 | version 1 | kind 1 | codec 1 | flags 1 | created 8 | authenticated 8 | [origin] | entries | checksum 8
//! forward  magic 4 | version 1 | kind 2 | 0       | flags 1 | target                                          | checksum 8
//! retired  magic 4 | version 1 | kind 3 | 0       | 0       |                                                   checksum 8
//! ```
//! Numbers are little-endian. `origin` and `target` are a length and bytes; `entries` is a count, then for each key, in
//! ascending order, the length and bytes of the key and of the value. Lengths and counts are LEB128 in the shortest form. So
//! a payload has one encoding, and what decodes encodes to the same bytes. The checksum (XXH3, 64 bits) covers all before it:
//! most single flips of a bit would otherwise decode as something else. It does not protect against forgery.
//!
//! Values are not decoded here, and neither ids nor keys of the store are known.

use std::fmt;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::codec::Codec;
use crate::error::{Error, ErrorKind, Result};
use crate::values::Values;

/// The most values that a session may have.
pub(crate) const MAX_ENTRIES: usize = 100_000;
/// The longest key, in bytes of UTF-8.
pub(crate) const MAX_KEY: usize = 1024;

/// The name of a value.
pub(crate) type Key = Box<str>;

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
                allow(flags, HAS_ORIGIN)?;
                let codec = Codec::from_id(codec)?;
                let (created, authenticated) = (reader.i64()?, reader.i64()?);
                let origin = if flags & HAS_ORIGIN == 0 { None } else { Some(reader.field()?) };
                Self::Data(Data { codec, created, authenticated, origin, values: reader.values()? })
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
            Self::Data(data) => (DATA, data.codec.id(), if data.origin.is_some() { HAS_ORIGIN } else { 0 }),
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
                if let Some(origin) = &data.origin {
                    put_field(&mut out, origin);
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
                let origin = data.origin.as_ref().map_or(0, |origin| field(origin.len()));
                let entries = data.values.iter().map(|(key, value)| field(key.len()) + field(value.len()));
                16 + origin + number_size(data.values.len()) + entries.sum::<usize>()
            }
            Self::Forward(forward) => field(forward.target.len()),
            Self::Retired => 0,
        };
        HEADER + body + CHECKSUM
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

    fn span(&mut self) -> Result<std::ops::Range<usize>> {
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
        let (mut values, mut last) = (Values::new(), None);
        for _ in 0..count {
            let key = self.span()?;
            if key.len() > MAX_KEY {
                return Err(corrupt(format!("a key of {} bytes, at most {MAX_KEY} are accepted", key.len())));
            }
            let key = std::str::from_utf8(&self.bytes[key]).map_err(|_| corrupt("a key is not UTF-8"))?;
            if last.is_some_and(|last| last >= key) {
                return Err(corrupt("the keys are not in ascending order, or one is there twice"));
            }
            last = Some(key);
            values.insert(key.into(), self.field()?);
        }
        Ok(values)
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
    use super::*;

    fn payloads() -> Vec<Payload> {
        let values = [("", &b""[..]), ("cart", b"\x01\x02"), ("user", &[7; 300])];
        let values: Values = values.into_iter().map(|(key, value)| (key.into(), Bytes::from_static(value))).collect();
        let data = Data { codec: Codec::MessagePack, created: 1, authenticated: -1, origin: None, values };
        let rotated = Data { origin: Some(Bytes::from_static(b"sealed")), values: Values::new(), ..data.clone() };
        let forward = Forward { target: Bytes::from_static(b"sealed"), seen: false };
        let seen = Forward { seen: true, ..forward.clone() };
        vec![
            Payload::Data(data),
            Payload::Data(rotated),
            Payload::Forward(forward),
            Payload::Forward(seen),
            Payload::Retired,
        ]
    }

    #[test]
    fn what_is_written_is_read_and_fills_its_buffer() {
        for payload in payloads() {
            let bytes = payload.encode();
            assert_eq!(bytes.len(), payload.size());
            assert_eq!(Payload::decode(bytes).unwrap(), payload);
        }
    }
}
