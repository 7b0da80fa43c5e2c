//! Session ids: bearer secrets that are checked before anything else sees them and never printed.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// The name of a session, and the proof of being allowed into it.
///
/// An accepted id is 22 to 256 characters of `[A-Za-z0-9,-]`; there is no other way to make one, so no backend has to
/// think about path separators, control characters or lengths. A generated id has 160 random bits from the operating
/// system as 32 characters of `[0-9a-v]`.
///
/// `Debug` shows no part of it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(Arc<str>);

impl SessionId {
    /// The shortest accepted id, in characters.
    pub const MIN_LEN: usize = 22;
    /// The longest accepted id, in characters.
    pub const MAX_LEN: usize = 256;

    /// Makes a new id that nobody knows.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if the operating system has no randomness to give; there is no second source.
    pub fn generate() -> Result<Self> {
        let mut bits = [0u8; 20];
        fill_random(&mut bits)?;
        let mut text = [0u8; 32];
        write_bits(&bits, &mut text);
        Ok(Self::written(&text))
    }

    /// Takes what [`write_bits`] has written, which has the length and the alphabet of an id.
    pub(crate) fn written(text: &[u8]) -> Self {
        debug_assert!((Self::MIN_LEN..=Self::MAX_LEN).contains(&text.len()));
        Self(std::str::from_utf8(text).expect("the alphabet is ASCII").into())
    }

    /// Checks what came from outside. What is not an id is `None`: treat it as if no id had been sent.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let length = (Self::MIN_LEN..=Self::MAX_LEN).contains(&text.len());
        let alphabet = |byte: u8| byte.is_ascii_alphanumeric() || byte == b',' || byte == b'-';
        (length && text.bytes().all(alphabet)).then(|| Self(text.into()))
    }

    /// Returns the secret itself: for the cookie and for the key in the store, never for a log.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(..)")
    }
}

/// Writes bits as characters of `[0-9a-v]`, five to each, the highest first; what the last one lacks are zeros.
pub(crate) fn write_bits(bits: &[u8], text: &mut [u8]) {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
    // Five bytes are eight characters.
    for (bytes, text) in bits.chunks(5).zip(text.chunks_mut(8)) {
        let word = bytes.iter().enumerate().fold(0u64, |word, (n, byte)| word | u64::from(*byte) << (32 - 8 * n));
        for (n, character) in text.iter_mut().enumerate() {
            *character = ALPHABET[(word >> (35 - 5 * n)) as usize & 31];
        }
    }
}

/// Fills `bytes` from the operating system.
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes)
        .map_err(|e| Error::new(ErrorKind::Unavailable, "random", "the operating system gave no randomness").with_source(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn generated_ids_are_accepted_different_and_use_the_whole_alphabet() {
        let ids: HashSet<_> = (0..20_000).map(|_| SessionId::generate().unwrap()).collect();
        assert_eq!(ids.len(), 20_000);
        let mut counts = vec![[0u32; 256]; 32];
        for id in &ids {
            assert_eq!(SessionId::parse(id.as_str()).as_ref(), Some(id));
            for (position, byte) in id.as_str().bytes().enumerate() {
                counts[position][byte as usize] += 1;
            }
        }
        // Chi-square with 31 degrees of freedom per position; 80 is passed by chance once in 300,000 positions.
        for count in counts {
            let expected = 20_000.0 / 32.0;
            let seen = b"0123456789abcdefghijklmnopqrstuv".iter().map(|b| f64::from(count[*b as usize]));
            let chi: f64 = seen.map(|n| (n - expected).powi(2) / expected).sum();
            assert!(chi < 80.0, "chi-square {chi}");
        }
    }

    #[test]
    fn only_the_alphabet_and_the_length_make_an_id() {
        let ok = "a".repeat(22);
        assert!(SessionId::parse(&ok).is_some());
        assert!(SessionId::parse(&"Z".repeat(256)).is_some());
        assert!(SessionId::parse("ABCXYZabcxyz0189,-,-,-").is_some());
        for bad in ["", &"a".repeat(21), &"a".repeat(257), "../../../../etc/passwd0", "aaaaaaaaaaaaaaaaaaaaaa\0"] {
            assert!(SessionId::parse(bad).is_none());
        }
        for bad in [" ", "/", "\\", "%", "\r\n", "é", "{", "}", ".", "_", "+", "="] {
            assert!(SessionId::parse(&format!("{ok}{bad}")).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn debug_shows_nothing_of_it() {
        let id = SessionId::generate().unwrap();
        assert_eq!(format!("{id:?}"), "SessionId(..)");
    }
}
