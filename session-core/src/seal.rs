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

    #[test]
    fn only_the_live_id_and_the_purpose_open_it() {
        let (old, new) = (SessionId::generate().unwrap(), SessionId::generate().unwrap());
        let sealed = seal(&new, &old, Purpose::Forward).unwrap();
        assert_eq!(open(&sealed, &old, Purpose::Forward).unwrap(), new);
        for (id, purpose) in [(&new, Purpose::Forward), (&old, Purpose::Origin)] {
            assert_eq!(open(&sealed, id, purpose).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
