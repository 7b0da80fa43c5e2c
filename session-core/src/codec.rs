//! How one value of a session becomes bytes, and how bytes become a value again.
//!
//! Values are encoded one by one, so that reading a key decodes that key and changing it changes those bytes alone. Nothing
//! here knows keys, envelopes or stores. Every codec is watched by [`depth`](crate::depth), consumes all of its input, and
//! never falls back to another one.

use std::any::type_name;
use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::depth::{Abilities, Guard, Refusal};
use crate::error::{Error, ErrorKind, Result};

/// Turns values into bytes and back.
///
/// What cannot be read again is refused when it is written: values that nest deeper than 64 levels (each list, map, struct,
/// enum, newtype and `Some` is one), more than 100,000 elements that take no room, and what the format has no place for. One
/// loss stays, because no format here but `postcard` and `bincode` tells them apart: `Some(None)` and `Some(())` come back
/// as `None`.
pub trait ValueCodec: fmt::Debug + Send + Sync + 'static {
    /// Encodes a value.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if this codec cannot express it. The text names the codec and the reason, nothing of the
    /// value.
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>>;

    /// Decodes a value, which must take up all of `bytes`.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt) if `bytes` are not a `T` in this codec; [`Config`](ErrorKind::Config) if no bytes could
    /// be, because the type asks the format what comes next and this one does not say.
    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T>;
}

/// MessagePack with named fields, the default: small, self-describing, and a struct may gain and lose fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MessagePack;

impl ValueCodec for MessagePack {
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>> {
        write(MESSAGE_PACK, |guard| {
            let mut bytes = Vec::with_capacity(ROOM);
            guard.watch(value).serialize(&mut rmp_serde::Serializer::new(&mut bytes).with_struct_map())?;
            Ok::<_, rmp_serde::encode::Error>(bytes)
        })
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        use rmp_serde::decode::Error;
        read(MESSAGE_PACK, bytes, |guard| {
            let mut reader = rmp_serde::Deserializer::from_read_ref(bytes);
            let value = T::deserialize(guard.watch(&mut reader))?;
            // The reader does not tell where it is. One that is at the end, and only that one, has no marker to give.
            let rest = !matches!(<bool as serde::Deserialize>::deserialize(&mut reader), Err(Error::InvalidMarkerRead(_)));
            Ok::<_, Error>((value, rest))
        })
    }
}

/// JSON, for people who look into their store with other tools. Bytes become lists of numbers.
#[cfg(feature = "json")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Json;

#[cfg(feature = "json")]
impl ValueCodec for Json {
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>> {
        write(JSON, |guard| {
            let mut bytes = Vec::with_capacity(ROOM);
            guard.watch(value).serialize(&mut serde_json::Serializer::new(&mut bytes))?;
            Ok::<_, serde_json::Error>(bytes)
        })
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        read(JSON, bytes, |guard| {
            let mut reader = serde_json::Deserializer::from_slice(bytes);
            let value = T::deserialize(guard.watch(&mut reader))?;
            Ok::<_, serde_json::Error>((value, reader.end().is_err()))
        })
    }
}

/// Postcard: the smallest, in a specified format that does not name its fields. A struct that changes makes old values
/// unreadable, or reads them as something else; version your types.
#[cfg(feature = "postcard")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Postcard;

#[cfg(feature = "postcard")]
impl ValueCodec for Postcard {
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>> {
        write(POSTCARD, |guard| postcard::to_extend(&guard.watch(value), Vec::with_capacity(ROOM)))
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        read(POSTCARD, bytes, |guard| {
            let mut reader = postcard::Deserializer::from_bytes(bytes);
            let value = T::deserialize(guard.watch(&mut reader))?;
            Ok::<_, postcard::Error>((value, !reader.finalize()?.is_empty()))
        })
    }
}

/// Bincode 2: as compact and as rigid as postcard. Its crate has been without a maintainer since RUSTSEC-2025-0141, so
/// take it only to read what is there.
#[cfg(feature = "bincode")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bincode;

#[cfg(feature = "bincode")]
impl Bincode {
    const MAX_BYTES: usize = 64 << 20;
    // The decoder charges an integer its full width, which is up to 16 times what it takes.
    const LIMIT: usize = 16 * Self::MAX_BYTES;
}

#[cfg(feature = "bincode")]
impl ValueCodec for Bincode {
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>> {
        let bytes = write(BINCODE, |guard| bincode::serde::encode_to_vec(guard.watch(value), bincode::config::standard()))?;
        if bytes.len() > Self::MAX_BYTES {
            let message = format!("value of {} bytes, bincode holds {}", bytes.len(), Self::MAX_BYTES);
            return Err(Error::new(ErrorKind::Config, "encode", message));
        }
        Ok(bytes)
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        read(BINCODE, bytes, |guard| {
            let config = bincode::config::standard().with_limit::<{ Self::LIMIT }>();
            let seed = guard.watch(std::marker::PhantomData::<T>);
            let (value, used) = bincode::serde::seed_decode_from_slice(seed, bytes, config)?;
            Ok::<_, bincode::error::DecodeError>((value, used < bytes.len()))
        })
    }
}

/// The codec of a session, chosen at run time (`codec=` in a DSN) and kept with the session, which is read with the codec that
/// wrote it whatever is configured now.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Codec {
    /// `msgpack`.
    #[default]
    MessagePack,
    /// `json`.
    #[cfg(feature = "json")]
    Json,
    /// `postcard`.
    #[cfg(feature = "postcard")]
    Postcard,
    /// `bincode`.
    #[cfg(feature = "bincode")]
    Bincode,
}

impl Codec {
    /// Returns the number that stands for this codec in stored sessions. Numbers are never given anew.
    #[must_use]
    pub const fn id(self) -> u8 {
        self.format().id
    }

    /// Returns the word that stands for this codec in a DSN.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.format().name
    }

    /// Finds the codec that a stored session names.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt) if there is none of that number, or it is not in this build; the text then names the
    /// codec and the Cargo feature. The session is intact, so nothing else may be tried on it.
    pub fn from_id(id: u8) -> Result<Self> {
        let corrupt = |message: String| Error::new(ErrorKind::Corrupt, "decode", message);
        match FORMATS.iter().find(|format| format.id == id) {
            None => Err(corrupt(format!("codec number {id} is unknown to this version"))),
            Some(format) => Self::of(format)
                .ok_or_else(|| corrupt(format!("written with codec {0}, which needs the Cargo feature {0}", format.name))),
        }
    }

    /// Finds the codec that a person names: `msgpack`, `json`, `postcard` or `bincode`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that lists what is accepted, or names the Cargo feature that is missing.
    pub fn from_name(name: &str) -> Result<Self> {
        let config = |message: String| Error::new(ErrorKind::Config, "codec", message);
        match FORMATS.iter().find(|format| format.name == name) {
            None => {
                let names = FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", ");
                let cut: String = name.chars().take(40).collect();
                Err(config(format!("{} is not one of {names}", cut.escape_debug())))
            }
            Some(format) => Self::of(format).ok_or_else(|| config(format!("{0} needs the Cargo feature {0}", format.name))),
        }
    }

    const fn format(self) -> Format {
        match self {
            Self::MessagePack => MESSAGE_PACK,
            #[cfg(feature = "json")]
            Self::Json => JSON,
            #[cfg(feature = "postcard")]
            Self::Postcard => POSTCARD,
            #[cfg(feature = "bincode")]
            Self::Bincode => BINCODE,
        }
    }

    /// Every codec of this build.
    const ALL: &[Self] = &[
        Self::MessagePack,
        #[cfg(feature = "json")]
        Self::Json,
        #[cfg(feature = "postcard")]
        Self::Postcard,
        #[cfg(feature = "bincode")]
        Self::Bincode,
    ];

    fn of(format: &Format) -> Option<Self> {
        Self::ALL.iter().copied().find(|codec| codec.id() == format.id)
    }
}

impl ValueCodec for Codec {
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>> {
        match self {
            Self::MessagePack => MessagePack.encode(value),
            #[cfg(feature = "json")]
            Self::Json => Json.encode(value),
            #[cfg(feature = "postcard")]
            Self::Postcard => Postcard.encode(value),
            #[cfg(feature = "bincode")]
            Self::Bincode => Bincode.encode(value),
        }
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        match self {
            Self::MessagePack => MessagePack.decode(bytes),
            #[cfg(feature = "json")]
            Self::Json => Json.decode(bytes),
            #[cfg(feature = "postcard")]
            Self::Postcard => Postcard.decode(bytes),
            #[cfg(feature = "bincode")]
            Self::Bincode => Bincode.decode(bytes),
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

// Most values of a session are short.
const ROOM: usize = 64;

#[derive(Clone, Copy)]
struct Format {
    id: u8,
    name: &'static str,
    abilities: Abilities,
}

// Known in every build, so that a session of a codec that is not compiled in can be named.
const MESSAGE_PACK: Format =
    Format { id: 1, name: "msgpack", abilities: Abilities { self_describing: true, every_float: true } };
const JSON: Format = Format { id: 2, name: "json", abilities: Abilities { self_describing: true, every_float: false } };
const POSTCARD: Format =
    Format { id: 3, name: "postcard", abilities: Abilities { self_describing: false, every_float: true } };
const BINCODE: Format =
    Format { id: 4, name: "bincode", abilities: Abilities { self_describing: false, every_float: true } };
const FORMATS: [Format; 4] = [MESSAGE_PACK, JSON, POSTCARD, BINCODE];

// The errors of the formats end here: their texts may quote the value (`invalid type: string "hunter2"`).
fn write<E>(format: Format, encode: impl FnOnce(&Guard) -> Result<Vec<u8>, E>) -> Result<Vec<u8>> {
    let guard = Guard::writing(format.abilities);
    let refused = |why: Option<Refusal>| {
        let reason = why.map(|why| format!(": {}", why.as_str())).unwrap_or_default();
        Error::new(ErrorKind::Config, "encode", format!("value cannot be expressed in {}{reason}", format.name))
    };
    let bytes = encode(&guard).map_err(|_| refused(guard.refusal()))?;
    guard.settle(bytes.len()).map_err(|why| refused(Some(why)))?;
    Ok(bytes)
}

fn read<T, E>(format: Format, bytes: &[u8], decode: impl FnOnce(&Guard) -> Result<(T, bool), E>) -> Result<T> {
    let guard = Guard::reading(bytes.len(), format.abilities);
    let name = format.name;
    let corrupt = |message: String| Err(Error::new(ErrorKind::Corrupt, "decode", message));
    match (decode(&guard), guard.refusal()) {
        (Ok((value, false)), _) => Ok(value),
        (Ok((_, true)), _) => corrupt(format!("stored {name} value has bytes behind its end")),
        (Err(_), Some(Refusal::Asks)) => {
            let message = format!("{} cannot be read from {name}: {}", type_name::<T>(), Refusal::Asks.as_str());
            Err(Error::new(ErrorKind::Config, "decode", message))
        }
        (Err(_), Some(why)) => corrupt(format!("stored {name} value refused: {}", why.as_str())),
        (Err(_), None) => corrupt(format!("stored {name} value is not a {}", type_name::<T>())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_codec_reads_what_it_wrote_and_nothing_behind_it() {
        for codec in Codec::ALL {
            let value = (1u8, String::from("a"), Some(-1i64), vec![0.1 + 0.2]);
            let mut bytes = codec.encode(&value).unwrap();
            assert_eq!(codec.decode::<(u8, String, Option<i64>, Vec<f64>)>(&bytes).unwrap(), value, "{codec}");
            bytes.push(1);
            let error = codec.decode::<(u8, String, Option<i64>, Vec<f64>)>(&bytes).unwrap_err();
            assert!(error.to_string().contains("behind its end"), "{codec}: {error}");
        }
    }
}
