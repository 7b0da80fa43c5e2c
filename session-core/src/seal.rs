//! How a session names another one without giving its id away to the store.
//!
//! The id is sealed with a key made from the live id of the session that names it. A live id is never in the store (its hash
//! is), so a copy of the store opens nothing. Nothing here knows what a forward is for.

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::id::{SessionId, fill_random};

const NONCE: usize = 24;
const TAG: usize = 16;

/// What the sealed id is for. What was sealed for one purpose does not open for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The session went on under this id.
    Forward,
    /// The session came from this id.
    Origin,
}

impl Purpose {
    const fn label(self) -> &'static [u8] {
        match self {
            Self::Forward => b"forward",
            Self::Origin => b"origin",
        }
    }
}

/// Seals `target` so that only who knows `key_from` can open it: nonce, then ciphertext with its tag.
///
/// # Errors
/// [`Unavailable`](ErrorKind::Unavailable) if the operating system has no randomness to give.
pub(crate) fn seal(target: &SessionId, key_from: &SessionId, purpose: Purpose) -> Result<Vec<u8>> {
    let mut nonce = [0; NONCE];
    fill_random(&mut nonce)?;
    let message = Payload { msg: target.as_str().as_bytes(), aad: purpose.label() };
    let sealed = cipher(key_from, purpose).encrypt(&XNonce::from(nonce), message);
    let sealed = sealed.map_err(|_| Error::new(ErrorKind::Unexpected, "seal", "the cipher refused to seal an id"))?;
    Ok([&nonce[..], &sealed].concat())
}

/// Opens what [`seal`] made.
///
/// # Errors
/// [`Corrupt`](ErrorKind::Corrupt) if it was sealed with another id or for another purpose, or was changed.
pub(crate) fn open(sealed: &[u8], key_from: &SessionId, purpose: Purpose) -> Result<SessionId> {
    let corrupt =
        || Error::new(ErrorKind::Corrupt, "unseal", "the sealed id of another session does not open with this one");
    // Longer than any id: not worth decrypting.
    if sealed.len() > NONCE + SessionId::MAX_LEN + TAG {
        return Err(corrupt());
    }
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE>().ok_or_else(corrupt)?;
    let message = Payload { msg: sealed, aad: purpose.label() };
    let text = cipher(key_from, purpose).decrypt(&XNonce::from(*nonce), message).map_err(|_| corrupt())?;
    std::str::from_utf8(&text).ok().and_then(SessionId::parse).ok_or_else(corrupt)
}

fn cipher(key_from: &SessionId, purpose: Purpose) -> XChaCha20Poly1305 {
    // Every part but the last has a fixed text that is no prefix of another, so no two inputs meet.
    let mut hash = Sha256::new();
    hash.update(b"sessionkit sealed id v1\0");
    hash.update(purpose.label());
    hash.update(b"\0");
    hash.update(key_from.as_str());
    let key: [u8; 32] = hash.finalize().into();
    XChaCha20Poly1305::new(&key.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> SessionId {
        SessionId::parse(text).expect("an id")
    }

    #[test]
    fn only_the_live_id_and_the_purpose_open_it() {
        let (old, new) = (SessionId::generate().unwrap(), SessionId::generate().unwrap());
        let sealed = seal(&new, &old, Purpose::Forward).unwrap();
        assert_eq!(open(&sealed, &old, Purpose::Forward).unwrap(), new);
        assert_eq!(open(&sealed, &old, Purpose::Origin).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(open(&sealed, &new, Purpose::Forward).unwrap_err().kind(), ErrorKind::Corrupt);
        for _ in 0..1000 {
            assert!(open(&sealed, &SessionId::generate().unwrap(), Purpose::Forward).is_err());
        }
        // Not even who knows all but the last character.
        for last in "0123456789abcdefghijklmnopqrstuv".chars().filter(|last| !old.as_str().ends_with(*last)) {
            let near = id(&format!("{}{last}", &old.as_str()[..31]));
            assert!(open(&sealed, &near, Purpose::Forward).is_err());
        }
    }

    #[test]
    fn neither_id_is_in_it_and_no_two_are_alike() {
        let (old, new) = (SessionId::generate().unwrap(), SessionId::generate().unwrap());
        let sealed = seal(&new, &old, Purpose::Forward).unwrap();
        assert_eq!(sealed.len(), NONCE + 32 + TAG);
        for id in [&old, &new] {
            assert!(!sealed.windows(8).any(|part| id.as_str().as_bytes().windows(8).any(|text| text == part)));
        }
        assert_ne!(sealed, seal(&new, &old, Purpose::Forward).unwrap());
    }

    #[test]
    fn every_flip_cut_and_tail_is_refused() {
        let (old, new) = (SessionId::generate().unwrap(), SessionId::generate().unwrap());
        for purpose in [Purpose::Forward, Purpose::Origin] {
            let sealed = seal(&new, &old, purpose).unwrap();
            let refused = |bytes: &[u8]| assert_eq!(open(bytes, &old, purpose).unwrap_err().kind(), ErrorKind::Corrupt);
            for bit in 0..sealed.len() * 8 {
                let mut damaged = sealed.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                refused(&damaged);
            }
            (0..sealed.len()).for_each(|cut| refused(&sealed[..cut]));
            refused(&[&sealed[..], b"\0"].concat());
            refused(&vec![0; 1 << 20]);
        }
    }

    #[test]
    fn the_shortest_and_the_longest_id_come_back() {
        let (short, long) = (id(&"a".repeat(SessionId::MIN_LEN)), id(&"Z".repeat(SessionId::MAX_LEN)));
        for (target, key) in [(&short, &long), (&long, &short)] {
            let sealed = seal(target, key, Purpose::Origin).unwrap();
            assert_eq!(&open(&sealed, key, Purpose::Origin).unwrap(), target);
        }
    }

    #[test]
    fn what_is_no_id_is_refused_though_it_was_sealed_rightly() {
        let key = SessionId::generate().unwrap();
        for text in [&b"too short"[..], b"../../../../etc/passwd0/", &[0xff; 32]] {
            let message = Payload { msg: text, aad: Purpose::Forward.label() };
            let sealed = cipher(&key, Purpose::Forward).encrypt(&XNonce::from([7; NONCE]), message).unwrap();
            assert!(open(&[&[7; NONCE][..], &sealed].concat(), &key, Purpose::Forward).is_err());
        }
    }

    #[test]
    fn what_an_earlier_build_sealed_still_opens() {
        let (target, key) = (id("0123456789abcdefghijklmnopqrstuv"), id("vutsrqponmlkjihgfedcba9876543210"));
        let message = Payload { msg: target.as_str().as_bytes(), aad: Purpose::Forward.label() };
        let sealed = cipher(&key, Purpose::Forward).encrypt(&XNonce::from([7; NONCE]), message).unwrap();
        let hex: String = sealed.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "f5200494aa3d3cb5891d4cd96ca61b1249e5c4e718aded6c5d626330702c67a3e13c084d1c875cbd4a1ea729543caf06");
    }
}
