//! The encoded values of a session by name: a sorted list that costs nothing to copy until it is changed.
//!
//! A session is compared with what was read, and handed to a save that may outlive its request; both are copies. What comes from
//! a record stays in its one buffer, as places in it rather than counted references: a session of twenty values is copied as one
//! block of memory. Nothing here knows what a value means.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

/// Encoded values by name, in the order of the names. `Debug` shows how many.
#[derive(Clone, Default)]
pub(crate) struct Values {
    record: Bytes,
    entries: Arc<Vec<Entry>>,
}

#[derive(Clone)]
struct Entry {
    key: Part,
    value: Part,
}

#[derive(Clone)]
enum Part {
    /// A place in the record.
    Stored {
        at: u32,
        len: u32,
    },
    Own(Bytes),
}

impl Part {
    fn of<'a>(&'a self, record: &'a Bytes) -> &'a [u8] {
        match self {
            Self::Stored { at, len } => &record[*at as usize..*at as usize + *len as usize],
            Self::Own(bytes) => bytes,
        }
    }

    fn stored(place: &Range<usize>) -> Option<Self> {
        Some(Self::Stored { at: u32::try_from(place.start).ok()?, len: u32::try_from(place.len()).ok()? })
    }
}

impl Values {
    /// Takes the places of keys and values in `record`; the keys must be UTF-8 and in ascending order. `None` if a place is
    /// beyond four gigabytes.
    pub(crate) fn stored(record: Bytes, places: &[(Range<usize>, Range<usize>)]) -> Option<Self> {
        let entry = |(key, value): &(Range<usize>, _)| Some(Entry { key: Part::stored(key)?, value: Part::stored(value)? });
        let entries = places.iter().map(entry).collect::<Option<_>>()?;
        Some(Self { record, entries: Arc::new(entries) })
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn get(&self, key: &str) -> Option<&[u8]> {
        self.find(key).ok().map(|at| self.entries[at].value.of(&self.record))
    }

    pub(crate) fn contains_key(&self, key: &str) -> bool {
        self.find(key).is_ok()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|(key, _)| key)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let text = |bytes| std::str::from_utf8(bytes).expect("a key is made from UTF-8 only");
        self.entries.iter().map(move |entry| (text(entry.key.of(&self.record)), entry.value.of(&self.record)))
    }

    pub(crate) fn insert(&mut self, key: &str, value: impl Into<Bytes>) {
        let place = self.find(key);
        let value = Part::Own(value.into());
        let entries = Arc::make_mut(&mut self.entries);
        match place {
            Ok(at) => entries[at].value = value,
            Err(at) => entries.insert(at, Entry { key: Part::Own(Bytes::copy_from_slice(key.as_bytes())), value }),
        }
    }

    /// Removes `key`; says whether it was there.
    pub(crate) fn remove(&mut self, key: &str) -> bool {
        // A miss must not copy the list.
        let found = self.find(key);
        found.is_ok_and(|at| {
            Arc::make_mut(&mut self.entries).remove(at);
            true
        })
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    fn find(&self, key: &str) -> Result<usize, usize> {
        self.entries.binary_search_by(|entry| entry.key.of(&self.record).cmp(key.as_bytes()))
    }
}

impl PartialEq for Values {
    fn eq(&self, other: &Self) -> bool {
        // Copies that nobody has changed share their list, and the record with it.
        Arc::ptr_eq(&self.entries, &other.entries) || (self.len() == other.len() && self.iter().eq(other.iter()))
    }
}

impl Eq for Values {}

impl<K: AsRef<str>, V: Into<Bytes>> FromIterator<(K, V)> for Values {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let mut values = Self::default();
        for (key, value) in pairs {
            values.insert(key.as_ref(), value);
        }
        values
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Values({})", self.len())
    }
}
