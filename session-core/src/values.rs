//! The encoded values of a session by name: a map that costs nothing to copy until it is changed.
//!
//! A session is compared with what was read, and handed to a save that may outlive its request; both are copies. Nothing here
//! knows what a value means.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::envelope::Key;

/// Encoded values by name. Decoded from a record they are slices of its one buffer.
#[derive(Clone, Default, Eq)]
pub(crate) struct Values(Arc<BTreeMap<Key, Bytes>>);

impl Values {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Bytes> {
        self.0.get(key)
    }

    pub(crate) fn contains_key(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.0.keys()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Key, &Bytes)> {
        self.0.iter()
    }

    pub(crate) fn insert(&mut self, key: Key, value: Bytes) {
        Arc::make_mut(&mut self.0).insert(key, value);
    }

    pub(crate) fn remove(&mut self, key: &str) -> Option<Bytes> {
        // A miss must not copy the map.
        self.0.contains_key(key).then(|| Arc::make_mut(&mut self.0).remove(key)).flatten()
    }

    pub(crate) fn clear(&mut self) {
        self.0 = Arc::default();
    }
}

impl PartialEq for Values {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl FromIterator<(Key, Bytes)> for Values {
    fn from_iter<I: IntoIterator<Item = (Key, Bytes)>>(pairs: I) -> Self {
        Self(Arc::new(pairs.into_iter().collect()))
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Values({})", self.len())
    }
}
