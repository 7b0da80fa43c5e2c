//! The encoded values of a session by name: a sorted list that costs nothing to copy until it is changed.
//!
//! A session is compared with what was read, and handed to a save that may outlive its request; both are copies. Keys and values
//! that come from a record are slices of its one buffer. Nothing here knows what a value means.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

/// The name of a value: UTF-8.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(Bytes);

impl Key {
    /// Takes a slice of a record, if it is UTF-8.
    pub(crate) fn from_utf8(bytes: Bytes) -> Option<Self> {
        std::str::from_utf8(&bytes).is_ok().then_some(Self(bytes))
    }

    pub(crate) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a key is made from UTF-8 only")
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<&str> for Key {
    fn from(text: &str) -> Self {
        Self(Bytes::copy_from_slice(text.as_bytes()))
    }
}

impl From<String> for Key {
    fn from(text: String) -> Self {
        Self(text.into_bytes().into())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Encoded values by name, in the order of the names. `Debug` shows how many.
#[derive(Clone, Default, Eq)]
pub(crate) struct Values(Arc<Vec<(Key, Bytes)>>);

impl Values {
    pub(crate) fn with_capacity(count: usize) -> Self {
        Self(Arc::new(Vec::with_capacity(count)))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Bytes> {
        self.find(key.as_bytes()).ok().map(|at| &self.0[at].1)
    }

    pub(crate) fn contains_key(&self, key: &str) -> bool {
        self.find(key.as_bytes()).is_ok()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.0.iter().map(|(key, _)| key)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Key, &Bytes)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    pub(crate) fn insert(&mut self, key: Key, value: Bytes) {
        let place = self.find(key.as_bytes());
        let entries = Arc::make_mut(&mut self.0);
        match place {
            Ok(at) => entries[at].1 = value,
            Err(at) => entries.insert(at, (key, value)),
        }
    }

    pub(crate) fn remove(&mut self, key: &str) -> Option<Bytes> {
        // A miss must not copy the list.
        let at = self.find(key.as_bytes()).ok()?;
        Some(Arc::make_mut(&mut self.0).remove(at).1)
    }

    pub(crate) fn clear(&mut self) {
        self.0 = Arc::default();
    }

    fn find(&self, key: &[u8]) -> Result<usize, usize> {
        // A decoder appends in order: the end is the first place to look.
        match self.0.last() {
            Some((last, _)) if last.as_bytes() < key => Err(self.0.len()),
            _ => self.0.binary_search_by(|(other, _)| other.as_bytes().cmp(key)),
        }
    }
}

impl PartialEq for Values {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl FromIterator<(Key, Bytes)> for Values {
    fn from_iter<I: IntoIterator<Item = (Key, Bytes)>>(pairs: I) -> Self {
        let mut values = Self::default();
        for (key, value) in pairs {
            values.insert(key, value);
        }
        values
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Values({})", self.len())
    }
}
