//! One session in the hands of one request: typed values, and the verbs that save, release and end it.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::ValueCodec;
use crate::commit::{Mode, NewId, Then, Work};
use crate::envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::id::SessionId;
use crate::merge::{Redo, lay_over};
use crate::owned::{Begun, Owned, begin};
use crate::sessions::Sessions;
use crate::values::Values;
use crate::view::SessionView;

/// Keys that begin with this are ours: flash values are kept apart from the application's.
pub(crate) const RESERVED: char = '\0';
const FLASH: &str = "\0flash:";

/// A session that a request works on: read and change its values, then [`close`](Self::close).
///
/// Values are typed through serde, encoded one by one, and decoded on demand. A session whose encoded values are as they were is
/// not rewritten: closing it touches it, and only when a part of its idle time is used up.
///
/// # Dropping
///
/// Dropping is [`abort`](Self::abort): changes that were not saved are discarded, with a `tracing` event, and the session is
/// closed behind the request.
pub struct Session {
    sessions: Sessions,
    // On the heap, so that whoever passes a session on, or waits for its save, does not carry the room for it.
    work: Box<Work>,
    saving: Option<Saving>,
}

/// A save under way, whose future may have been dropped.
struct Saving {
    sent: Values,
    answer: Owned<(Box<Work>, Result<()>)>,
}

impl Session {
    pub(crate) fn new(sessions: Sessions, work: Box<Work>) -> Self {
        Self { sessions, work, saving: None }
    }

    /// Returns the id to give to the visitor. It changes when a save carries out a [`rotate`](Self::rotate) or
    /// [`elevate`](Self::elevate).
    #[must_use]
    pub fn id(&self) -> &SessionId {
        &self.work.id
    }

    /// Whether nothing is stored under this id yet.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.work.base.is_none()
    }

    /// Whether the visitor came with an id that [`elevate`](Self::elevate) has retired: the session is empty, works, and stores
    /// nothing; no cookie should be set, since the login's response sets the new one.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.work.mode == Mode::Retired
    }

    /// Whether a renewal has found that somebody else took over. A hint to stop early: the store judges the save.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.work.opening.as_ref().is_some_and(|opening| opening.is_lost())
    }

    /// Whether there are changes that no save has stored.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.work.mode != Mode::Retired && self.work.is_changed()
    }

    /// Returns when the session was created, or last [elevated](Self::elevate), in milliseconds since 1970.
    #[must_use]
    pub fn authenticated_millis(&self) -> i64 {
        self.work.data.authenticated
    }

    /// Returns the value of `key`; `None` if there is none.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt) if what is stored is not a `T`.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        self.work.data.values.get(key).map(|value| self.work.data.codec.decode(value)).transpose()
    }

    /// Whether there is a value of `key`.
    #[must_use]
    pub fn contains(&self, key: &str) -> bool {
        self.work.data.values.contains_key(key)
    }

    /// Sets the value of `key`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if the key is empty or begins with NUL, or if the codec cannot express the value;
    /// [`TooLarge`](ErrorKind::TooLarge) if the key has more than 1,024 bytes or there are 100,000 values already.
    pub fn insert<T: Serialize + ?Sized>(&mut self, key: &str, value: &T) -> Result<()> {
        check_key(key)?;
        self.set(key, value)
    }

    /// Removes `key`; says whether it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        self.forget_redo(key);
        self.work.data.values.remove(key)
    }

    /// Removes `key` and returns its value; `None` if there was none.
    ///
    /// # Errors
    /// As [`get`](Self::get); the value then stays.
    pub fn take<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>> {
        let value = self.get(key)?;
        self.remove(key);
        Ok(value)
    }

    /// Changes the value of `key` by a function of what it is: a counter, a list that grows.
    ///
    /// In a [`merge`](Sessions::merge) the function is run again on the newest value if somebody else changed the key meanwhile,
    /// so it should have no other effect.
    ///
    /// # Errors
    /// As [`get`](Self::get) and [`insert`](Self::insert).
    pub fn update_key<T, F>(&mut self, key: &str, change: F) -> Result<()>
    where
        T: Serialize + DeserializeOwned,
        F: Fn(Option<T>) -> T + Send + Sync + 'static,
    {
        check_key(key)?;
        envelope::check_key(key, &self.work.data.values)?;
        let codec = self.work.data.codec;
        let redo: Redo = Arc::new(move |value| {
            let value = value.map(|value| codec.decode::<T>(value)).transpose()?;
            codec.encode(&change(value)).map(Bytes::from)
        });
        let value = redo(self.work.data.values.get(key))?;
        if self.work.mode == Mode::Merge {
            let was = self.work.base.as_ref().and_then(|base| base.values.get(key));
            let untouched = self.work.data.values.get(key) == was;
            match self.work.redo.iter_mut().find(|(redo, _)| redo == key) {
                Some((_, changes)) => changes.push(redo),
                // After an `insert` the value is ours, not a function of theirs.
                None if untouched => self.work.redo.push((key.to_string(), vec![redo])),
                None => {}
            }
        }
        self.work.data.values.insert(key, value);
        Ok(())
    }

    /// Returns the keys, in order; flash values are not among them.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        visible_keys(&self.work.data.values)
    }

    /// Removes all values, flash values included; the session stays. In a [`merge`](Sessions::merge): all that were there when it
    /// was opened.
    pub fn clear(&mut self) {
        self.work.data.values.clear();
        self.work.redo.clear();
    }

    /// Keeps a value for whoever takes it first, usually the next page: a notice after a redirect.
    ///
    /// # Errors
    /// As [`insert`](Self::insert).
    pub fn flash<T: Serialize + ?Sized>(&mut self, key: &str, value: &T) -> Result<()> {
        check_key(key)?;
        self.set(&format!("{FLASH}{key}"), value)
    }

    /// Takes a flash value; `None` if there is none or it was taken before.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn take_flash<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>> {
        self.take(&format!("{FLASH}{key}"))
    }

    /// Asks for a new id with the next save; the privilege stays the same.
    ///
    /// The old id leads to the new one until the visitor has shown the new one, and for the grace time after that, so parallel
    /// requests and a lost response lose nothing. A logout under the old id ends the session. If the save fails, the session goes
    /// on under the old id.
    pub fn rotate(&mut self) {
        self.work.new_id.get_or_insert(NewId::Rotate);
    }

    /// Asks for a new id with the next save, because the privilege changes: a login. Both time-outs begin anew.
    ///
    /// The old id never reaches the new data, not even in requests that are under way. If the save fails, the session goes on
    /// under the old id, without what was changed.
    pub fn elevate(&mut self) {
        self.work.new_id = Some(NewId::Elevate);
    }

    /// Has the next save prolong the session even if hardly any of its idle time is used up.
    pub fn touch(&mut self) {
        self.work.touch = true;
    }

    /// Stores what was changed and keeps the lock.
    ///
    /// # Errors
    ///
    /// | kind | what it means | the session |
    /// |---|---|---|
    /// | [`Fenced`](ErrorKind::Fenced) | somebody took over while we were paused; nothing was stored | is spent |
    /// | [`Conflict`](ErrorKind::Conflict) | somebody changed the same; nothing was stored | is spent |
    /// | [`Gone`](ErrorKind::Gone) | destroyed or expired meanwhile; nothing was stored | is spent |
    /// | [`Unknown`](ErrorKind::Unknown) | no answer, also when asked again | may be saved again, unless others have written since |
    /// | [`Unavailable`](ErrorKind::Unavailable) | the store could not be reached; nothing was stored | may be saved again |
    /// | [`TooLarge`](ErrorKind::TooLarge) | nothing was stored | may be saved again with less in it |
    ///
    /// # Cancel safety
    /// A dropped future goes on; the next save, close or drop waits for it.
    pub async fn save(&mut self) -> Result<()> {
        self.settle().await?;
        self.commit(Then::Keep).await
    }

    /// Stores what was changed, gives the lock back, and returns the id to give to the visitor: `None` if there is nothing stored
    /// for him (a new session without values, a retired id).
    ///
    /// # Errors
    /// As [`save`](Self::save), but the session is gone with the call: to try again, [`save`](Self::save) first.
    ///
    /// # Cancel safety
    /// A dropped future goes on.
    pub async fn close(mut self) -> Result<Option<SessionId>> {
        self.settle().await?;
        self.commit(Then::Close).await?;
        Ok(self.stored_id())
    }

    /// Stores what was changed, gives the lock back early, and goes on reading.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    ///
    /// # Cancel safety
    /// A dropped future goes on.
    pub async fn release(mut self) -> Result<SessionView> {
        self.settle().await?;
        self.commit(Then::Close).await?;
        let (id, retired) = (self.stored_id(), self.is_retired());
        let data = self.work.data.clone();
        let id = if retired { Some(self.work.id.clone()) } else { id };
        Ok(SessionView::new(self.sessions.clone(), id, Some(data), retired))
    }

    /// Gives the lock back and discards what was changed since the last save.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) or [`Unknown`](ErrorKind::Unknown); the lock then ends with its lease.
    ///
    /// # Cancel safety
    /// A dropped future goes on.
    pub async fn abort(mut self) -> Result<()> {
        // A save that was dropped half-way is not undone; its outcome no longer matters to the caller.
        let _ = self.settle().await;
        self.work.data.values.clear();
        self.work.base = None;
        match self.work.opening.take() {
            Some(opening) => self.sessions.core.janitor.owned(opening.close()).await?,
            None => Ok(()),
        }
    }

    /// Destroys the session: a logout. Whoever works on it elsewhere is refused with [`Gone`](ErrorKind::Gone).
    ///
    /// # Errors
    /// [`Unknown`](ErrorKind::Unknown) or [`Unavailable`](ErrorKind::Unavailable): it may still be there;
    /// [`Sessions::destroy`] may be called again.
    ///
    /// # Cancel safety
    /// A dropped future goes on.
    pub async fn destroy(mut self) -> Result<()> {
        let _ = self.settle().await;
        let (core, id) = (Arc::clone(&self.sessions.core), self.work.id.clone());
        self.work.data.values.clear();
        let opening = self.work.opening.take();
        let stored = self.work.base.take().is_some() || opening.is_some();
        self.sessions
            .core
            .janitor
            .owned(async move {
                let Some(mut opening) = opening else {
                    return if stored { core.destroy(id).await } else { Ok(()) };
                };
                let removed = opening.handler().destroy().await?;
                let _ = opening.close().await;
                core.destroy_target(&id, removed).await
            })
            .await?
    }

    fn set<T: Serialize + ?Sized>(&mut self, key: &str, value: &T) -> Result<()> {
        envelope::check_key(key, &self.work.data.values)?;
        let value = self.work.data.codec.encode(value)?;
        self.forget_redo(key);
        self.work.data.values.insert(key, value);
        Ok(())
    }

    fn forget_redo(&mut self, key: &str) {
        self.work.redo.retain(|(redo, _)| redo != key);
    }

    /// What the visitor may be given: the id of what is stored.
    fn stored_id(&self) -> Option<SessionId> {
        (self.work.base.is_some() && !self.is_retired()).then(|| self.work.id.clone())
    }

    async fn commit(&mut self, then: Then) -> Result<()> {
        let (wait, lease) = (self.sessions.wait, self.sessions.lease);
        let core = Arc::clone(&self.sessions.core);
        let mut work = self.work.detach();
        let sent = work.data.values.clone();
        let save = async move {
            let outcome = core.commit(&mut work, then, wait, lease).await;
            (work, outcome)
        };
        match begin(self.sessions.core.janitor.watch(), save).await {
            Begun::Done((work, outcome)) => {
                self.resume(work, &sent);
                outcome
            }
            // It stays with the session, for the next call to wait for if this one is dropped.
            Begun::Waiting(answer) => {
                self.saving = Some(Saving { sent, answer });
                self.settle().await
            }
        }
    }

    /// Waits for a save whose future was dropped, and returns what became of it.
    async fn settle(&mut self) -> Result<()> {
        let Some(saving) = &mut self.saving else { return Ok(()) };
        let answer = saving.answer.outcome().await;
        let Saving { sent, .. } = self.saving.take().expect("it was there a line above");
        let (work, outcome) = answer?;
        self.resume(work, &sent);
        outcome
    }

    /// Goes on with what a save has made of the session; what was changed since it was sent is laid on top.
    fn resume(&mut self, mut saved: Box<Work>, sent: &Values) {
        if &self.work.data.values != sent {
            if let Ok(values) = lay_over(sent, &self.work.data.values, &saved.data.values, &[]) {
                saved.data.values = values;
            } else {
                saved.data.values = std::mem::take(&mut self.work.data.values);
            }
        }
        self.work = saved;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.saving.is_none() && self.work.opening.is_some() && self.is_changed() {
            tracing::warn!("a session was dropped with unsaved changes; they are discarded");
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("mode", &self.work.mode)
            .field("new", &self.is_new())
            .field("keys", &self.work.data.values.len())
            .finish_non_exhaustive()
    }
}

pub(crate) fn visible_keys(values: &Values) -> impl Iterator<Item = &str> {
    values.keys().filter(|key| !key.starts_with(RESERVED))
}

fn check_key(key: &str) -> Result<()> {
    let message = match key {
        "" => "a key may not be empty",
        key if key.starts_with(RESERVED) => "a key may not begin with NUL",
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::Config, "insert", message))
}
