//! Cookies that are signed or encrypted, and keys that change.
//!
//! An id is a secret that cannot be guessed, so neither is needed to keep sessions safe. What it adds: forged ids are refused
//! without a trip to the store, and (encrypted) who reads the cookie does not know the id.

use std::fmt;

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use hmac::{Hmac, Mac};
use session_core::{Error, ErrorKind, Result, SessionId};
use sha2::{Digest, Sha256};

const NONCE: usize = 24;
const TAG: usize = 16;
const MAC: usize = 32;
/// Sets the signature apart; it is in no id.
const DOT: u8 = b'.';

/// The keys of a cookie: one that makes new cookies, and older ones that are still accepted.
///
/// To change the key, put the new one in front and keep the old one as [`and_older`](Self::and_older) for as long as its cookies
/// live. A visitor who comes with an old one gets a new one when his session is next saved.
#[derive(Clone)]
pub struct CookieKeys(Vec<[u8; 32]>);

impl CookieKeys {
    /// Takes the key that new cookies are made with: 32 bytes or more, from a generator for cryptography.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if it is shorter, or one byte over and over.
    pub fn new(key: impl AsRef<[u8]>) -> Result<Self> {
        Self(Vec::new()).and_older(key)
    }

    /// Takes a key whose cookies are still accepted.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if it is there already.
    pub fn and_older(mut self, key: impl AsRef<[u8]>) -> Result<Self> {
        let key = key.as_ref();
        let refuse = |message: &'static str| Err(Error::new(ErrorKind::Config, "cookie keys", message));
        if key.len() < 32 {
            return refuse("a key must have at least 32 bytes");
        }
        if key.iter().all(|byte| *byte == key[0]) {
            return refuse("a key must be random, and this one is one byte over and over");
        }
        let key = Sha256::new().chain_update(b"sessionkit cookie key v1\0").chain_update(key).finalize().into();
        if self.0.contains(&key) {
            return refuse("a key is there twice");
        }
        self.0.push(key);
        Ok(self)
    }
}

impl fmt::Debug for CookieKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CookieKeys({})", self.0.len())
    }
}

/// How an id is written as a value.
#[derive(Clone, Debug, Default)]
pub(crate) enum Sealing {
    #[default]
    Plain,
    Signed(CookieKeys),
    Encrypted(CookieKeys),
}

impl Sealing {
    /// The longest value, in bytes.
    pub(crate) const fn longest(&self) -> usize {
        match self {
            Self::Plain => SessionId::MAX_LEN,
            Self::Signed(_) => SessionId::MAX_LEN + 1 + 2 * MAC,
            Self::Encrypted(_) => 2 * (NONCE + SessionId::MAX_LEN + TAG),
        }
    }

    /// Writes `id` for the cookie `name`.
    pub(crate) fn seal(&self, name: &str, id: &SessionId) -> Result<String> {
        match self {
            Self::Plain => Ok(id.as_str().to_owned()),
            Self::Signed(keys) => {
                let mac = signature(&keys.0[0], name, id).finalize().into_bytes();
                Ok(format!("{}.{}", id.as_str(), hex(&mac)))
            }
            Self::Encrypted(keys) => {
                let mut nonce = [0; NONCE];
                getrandom::fill(&mut nonce).map_err(|error| {
                    Error::new(ErrorKind::Unavailable, "cookie", "the operating system gave no randomness")
                        .with_source(error)
                })?;
                let message = Payload { msg: id.as_str().as_bytes(), aad: name.as_bytes() };
                let sealed = cipher(&keys.0[0]).encrypt(&XNonce::from(nonce), message);
                let sealed =
                    sealed.map_err(|_| Error::new(ErrorKind::Unexpected, "cookie", "the cipher refused to seal an id"))?;
                Ok(format!("{}{}", hex(&nonce), hex(&sealed)))
            }
        }
    }

    /// Reads a value of the cookie `name`: the id, and whether it was written with the newest key. What cannot be read, or was
    /// made by somebody else, is `None`.
    pub(crate) fn open(&self, name: &str, value: &[u8]) -> Option<(SessionId, bool)> {
        // Longer than any that was sealed here: not worth a look.
        if value.len() > self.longest() {
            return None;
        }
        match self {
            Self::Plain => parse(value).map(|id| (id, true)),
            Self::Signed(keys) => {
                let dot = value.iter().position(|byte| *byte == DOT)?;
                let (id, mac) = (parse(&value[..dot])?, unhex(&value[dot + 1..])?);
                let key = keys.0.iter().position(|key| signature(key, name, &id).verify_slice(&mac).is_ok())?;
                Some((id, key == 0))
            }
            Self::Encrypted(keys) => {
                let bytes = unhex(value)?;
                let (nonce, sealed) = bytes.split_first_chunk::<NONCE>()?;
                keys.0.iter().enumerate().find_map(|(n, key)| {
                    let message = Payload { msg: sealed, aad: name.as_bytes() };
                    let text = cipher(key).decrypt(&XNonce::from(*nonce), message).ok()?;
                    parse(&text).map(|id| (id, n == 0))
                })
            }
        }
    }
}

fn parse(value: &[u8]) -> Option<SessionId> {
    std::str::from_utf8(value).ok().and_then(SessionId::parse)
}

/// Signs name and id: what was signed for one cookie is nothing for another.
fn signature(key: &[u8; 32], name: &str, id: &SessionId) -> Hmac<Sha256> {
    let mut mac = <Hmac<Sha256> as hmac::KeyInit>::new_from_slice(key).expect("a key of any length will do");
    mac.update(b"sessionkit signed cookie v1\0");
    // A name of a cookie has no NUL in it, so that no two pairs of name and id are one text.
    mac.update(name.as_bytes());
    mac.update(b"\0");
    mac.update(id.as_str().as_bytes());
    mac
}

fn cipher(key: &[u8; 32]) -> XChaCha20Poly1305 {
    let key: [u8; 32] = Sha256::new().chain_update(b"sessionkit sealed cookie v1\0").chain_update(key).finalize().into();
    XChaCha20Poly1305::new(&key.into())
}

fn hex(bytes: &[u8]) -> String {
    let digit = |four: u8| char::from_digit(u32::from(four), 16).expect("four bits are a digit");
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Reads what [`hex`] writes, and nothing else: one value has one form.
fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let pair = |pair: &[u8]| Some(digit(pair[0])? << 4 | digit(pair[1])?);
    text.len().is_multiple_of(2).then(|| text.chunks_exact(2).map(pair).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "__Host-sid";

    fn keys(seed: u8) -> CookieKeys {
        CookieKeys::new([seed, 200].repeat(16)).unwrap()
    }

    fn both(keys: &CookieKeys) -> [Sealing; 2] {
        [Sealing::Signed(keys.clone()), Sealing::Encrypted(keys.clone())]
    }

    #[test]
    fn what_was_sealed_is_read_under_its_name_and_key_only() {
        let id = SessionId::generate().unwrap();
        for (sealing, other) in both(&keys(1)).iter().zip(both(&keys(2))) {
            let value = sealing.seal(NAME, &id).unwrap();
            assert_eq!(sealing.open(NAME, value.as_bytes()), Some((id.clone(), true)));
            assert!(sealing.open("__Host-admin", value.as_bytes()).is_none());
            assert!(other.open(NAME, value.as_bytes()).is_none());
            assert!(sealing.open(NAME, id.as_str().as_bytes()).is_none());
            assert!(Sealing::Plain.open(NAME, value.as_bytes()).is_none_or(|(read, _)| read != id));
        }
    }

    #[test]
    fn every_change_and_every_cut_is_refused() {
        let id = SessionId::generate().unwrap();
        for sealing in both(&keys(1)) {
            let value = sealing.seal(NAME, &id).unwrap().into_bytes();
            for at in 0..value.len() {
                assert!(sealing.open(NAME, &value[..at]).is_none());
                for byte in *b"0aAZ.," {
                    let mut changed = value.clone();
                    changed[at] = byte;
                    assert!(changed == value || sealing.open(NAME, &changed).is_none());
                }
            }
        }
    }

    #[test]
    fn an_older_key_is_read_and_known_to_be_old() {
        let id = SessionId::generate().unwrap();
        let rotated = keys(2).and_older([1, 1].repeat(16));
        assert!(rotated.is_err(), "one byte over and over");
        let rotated = keys(2).and_older([1, 7].repeat(16)).unwrap().and_older([1, 1, 2].repeat(16)).unwrap();
        let old = CookieKeys::new([1, 7].repeat(16)).unwrap();
        for (old, new) in both(&old).iter().zip(both(&rotated)) {
            assert_eq!(new.open(NAME, old.seal(NAME, &id).unwrap().as_bytes()), Some((id.clone(), false)));
            assert!(old.open(NAME, new.seal(NAME, &id).unwrap().as_bytes()).is_none());
        }
    }

    #[test]
    fn a_poor_key_is_refused() {
        for poor in [vec![], vec![7; 64], (0..31).collect()] {
            assert_eq!(CookieKeys::new(poor).unwrap_err().kind(), ErrorKind::Config);
        }
        let twice = CookieKeys::new((0..32).collect::<Vec<u8>>()).unwrap().and_older((0..32).collect::<Vec<u8>>());
        assert!(twice.unwrap_err().to_string().contains("twice"));
        assert_eq!(format!("{:?}", keys(3)), "CookieKeys(1)");
    }

    #[test]
    fn no_value_is_longer_than_is_said() {
        let id = SessionId::parse(&"a".repeat(SessionId::MAX_LEN)).unwrap();
        for sealing in both(&keys(1)).into_iter().chain([Sealing::Plain]) {
            assert_eq!(sealing.seal(NAME, &id).unwrap().len(), sealing.longest());
        }
    }
}
