//! A session that is only read: no lock, and no method that writes.

use std::fmt;

use serde::de::DeserializeOwned;

use crate::codec::ValueCodec;
use crate::envelope::Data;
use crate::error::Result;
use crate::id::SessionId;
use crate::session::{Session, visible_keys};
use crate::sessions::Sessions;

/// The last committed state of a session, as it was when it was read.
///
/// It never waited, holds nothing, and cannot write; [`reopen`](Self::reopen) gives a session that can.
pub struct SessionView {
    sessions: Sessions,
    id: Option<SessionId>,
    data: Option<Data>,
    retired: bool,
}

impl SessionView {
    pub(crate) fn new(sessions: Sessions, id: Option<SessionId>, data: Option<Data>, retired: bool) -> Self {
        Self { sessions, id, data, retired }
    }

    /// Returns the id of the session; `None` if there is none.
    #[must_use]
    pub fn id(&self) -> Option<&SessionId> {
        self.id.as_ref().filter(|_| !self.retired)
    }

    /// Whether there is a session.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.id().is_some()
    }

    /// Whether the id was retired by [`elevate`](Session::elevate).
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.retired
    }

    /// Returns the value of `key`; `None` if there is none.
    ///
    /// # Errors
    /// [`Corrupt`](crate::ErrorKind::Corrupt) if what is stored is not a `T`.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let Some(data) = &self.data else { return Ok(None) };
        data.values.get(key).map(|value| data.codec.decode(value)).transpose()
    }

    /// Whether there is a value of `key`.
    #[must_use]
    pub fn contains(&self, key: &str) -> bool {
        self.data.as_ref().is_some_and(|data| data.values.contains_key(key))
    }

    /// Returns the keys, in order; flash values are not among them.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.data.iter().flat_map(|data| visible_keys(&data.values))
    }

    /// Opens the session exclusively, with fresh data. Where there was none, it gives a new one.
    ///
    /// # Errors
    /// As [`Sessions::open`].
    ///
    /// # Cancel safety
    /// As [`Sessions::open`].
    pub async fn reopen(self) -> Result<Session> {
        match &self.id {
            Some(id) => self.sessions.open(id).await,
            None => self.sessions.create(),
        }
    }
}

impl fmt::Debug for SessionView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.data.as_ref().map_or(0, |data| data.values.len());
        f.debug_struct("SessionView").field("exists", &self.exists()).field("keys", &keys).finish_non_exhaustive()
    }
}
