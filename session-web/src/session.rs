//! The session as a handler has it: opened when it is first touched, saved when the handler ends.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use http::Extensions;
use serde::Serialize;
use serde::de::DeserializeOwned;
use session_core::{ErrorKind, SessionId, Sessions};

use crate::error::{Error, Result};
use crate::mode::{Kind, Mode};
use crate::view::SessionView;
use crate::visit::{Ticket, Visit};

/// The visitor's session.
///
/// To ask for it costs nothing. The first call that reads or writes opens it, as the route's [`Mode`] says: by default it waits
/// for its turn and locks, so that what is read is still so when it is written. Later calls make no trip. At the end of the
/// handler it is saved; see [the crate](crate#the-end-of-a-handler).
///
/// With a type it is that struct: [`Session<Cart>`](crate::Typed). Middleware and handler of one request share the session; each
/// asks for its own handle.
///
/// ```
/// use session_web::{Result, Session};
///
/// async fn log_in(session: Session) -> Result<&'static str> {
///     session.elevate().await?;
///     session.insert("user", "ada").await?;
///     Ok("welcome")
/// }
///
/// async fn report(session: Session) -> Result<String> {
///     let user: Option<String> = session.get("user").await?;
///     // Others may work on the session while this one is slow.
///     let view = session.release().await?;
///     let report = slow(user).await;
///     let session = view.reopen().await?;
///     session.insert("last report", &report).await?;
///     Ok(report)
/// }
/// # async fn slow(user: Option<String>) -> String { user.unwrap_or_default() }
/// ```
pub struct Session<T = ()> {
    visit: Arc<Visit>,
    ticket: Ticket,
    mode: Option<Mode>,
    kept: PhantomData<fn() -> T>,
}

impl<T> Session<T> {
    /// Takes the session out of the extensions of a request, for services without extractors.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if there is no [`SessionLayer`](crate::SessionLayer) around the service.
    pub fn from_extensions(extensions: &Extensions) -> Result<Self> {
        match Visit::of(extensions) {
            Some(visit) => Ok(Self::new(Arc::clone(visit), None)),
            None => Err(no_layer()),
        }
    }

    pub(crate) fn new(visit: Arc<Visit>, mode: Option<Mode>) -> Self {
        Self { visit, ticket: Ticket::default(), mode, kept: PhantomData }
    }

    /// Returns the session as it will be opened in a mode of this handler's own. One that this request has opened already stays
    /// open as it is.
    pub fn with(mut self, mode: Mode) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Stores what was changed and keeps the lock: from here on it counts, whatever becomes of the handler.
    ///
    /// # Errors
    /// Those of opening it and of [`session_core::Session::save`]. After [`Fenced`](ErrorKind::Fenced),
    /// [`Conflict`](ErrorKind::Conflict) and [`Gone`](ErrorKind::Gone) this handle is of no more use.
    ///
    /// # Cancel safety
    /// A dropped future goes on.
    pub async fn save(&self) -> Result<()> {
        self.visit.save(self.mode(), &self.ticket).await
    }

    /// Stores what was changed, gives the lock back early, and goes on reading.
    ///
    /// Other handles of this request that have used the session cannot go on with it: what they have read may be old. They get
    /// [`Fenced`](ErrorKind::Fenced).
    ///
    /// # Errors
    /// Those of [`session_core::Session::release`].
    ///
    /// # Cancel safety
    /// A dropped future goes on.
    pub async fn release(mut self) -> Result<SessionView<T>> {
        self.visit.release(std::mem::take(&mut self.ticket)).await?;
        Ok(SessionView::new(Arc::clone(&self.visit), self.mode))
    }

    /// Has the next save give the session a new id, for the same privilege: the old one leads to the new one until that was
    /// seen, and for a while after.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn rotate(&self) -> Result<()> {
        self.write(|session| {
            session.rotate();
            Ok(())
        })
        .await
    }

    /// Has the next save give the session a new id, because the privilege changes: a login. The old id never reaches the new
    /// data.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn elevate(&self) -> Result<()> {
        self.write(|session| {
            session.elevate();
            Ok(())
        })
        .await
    }

    /// Destroys the session: a logout. It waits for nobody; whoever still works on it is refused when he saves. The response takes
    /// the cookie away. What is put in afterwards begins a new session.
    ///
    /// # Errors
    /// [`Unknown`](ErrorKind::Unknown) or [`Unavailable`](ErrorKind::Unavailable): it may still be there.
    ///
    /// # Cancel safety
    /// A dropped future goes on, but the cookie stays.
    pub async fn destroy(&self) -> Result<()> {
        self.visit.destroy(&self.ticket).await
    }

    /// Has the next save prolong the session even if hardly any of its idle time is used up.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn touch(&self) -> Result<()> {
        self.write(|session| {
            session.touch();
            Ok(())
        })
        .await
    }

    /// Returns the id under which the session is stored; `None` if nothing is.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn id(&self) -> Result<Option<SessionId>> {
        let stored = |session: &session_core::Session| !session.is_new() && !session.is_retired();
        self.read(|session| Ok(stored(session).then(|| session.id().clone())), |view| Ok(view.id().cloned())).await
    }

    /// Whether the visitor came with an id that [`elevate`](Self::elevate) has retired: the session is empty, and to store
    /// something in it is refused with [`Gone`](ErrorKind::Gone).
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn is_retired(&self) -> Result<bool> {
        self.read(|session| Ok(session.is_retired()), |view| Ok(view.is_retired())).await
    }

    /// Returns when the session was created, or last [elevated](Self::elevate), in milliseconds since 1970.
    ///
    /// # Errors
    /// Those of opening it; [`Unsupported`](ErrorKind::Unsupported) in [`Mode::read_only`].
    pub async fn authenticated_millis(&self) -> Result<i64> {
        self.write(|session| Ok(session.authenticated_millis())).await
    }

    /// Returns the sessions of the layer: to destroy those of others, or for work that goes on behind the response.
    #[must_use]
    pub fn sessions(&self) -> &Sessions {
        self.visit.sessions()
    }

    fn mode(&self) -> Mode {
        self.mode.unwrap_or_else(|| self.visit.mode())
    }

    /// Opens the session now.
    pub(crate) async fn open(&self) -> Result<()> {
        self.visit.open(self.mode(), &self.ticket).await.map(|_| ())
    }

    pub(crate) async fn read<R>(
        &self,
        open: impl FnOnce(&session_core::Session) -> session_core::Result<R>,
        view: impl FnOnce(&session_core::SessionView) -> session_core::Result<R>,
    ) -> Result<R> {
        let read = match self.mode().kind {
            Kind::ReadOnly => view(&*self.visit.view().await?),
            _ => open(self.visit.open(self.mode(), &self.ticket).await?.session()),
        };
        read.map_err(|error| self.visit.refuse(error))
    }

    pub(crate) async fn write<R>(
        &self,
        change: impl FnOnce(&mut session_core::Session) -> session_core::Result<R>,
    ) -> Result<R> {
        let changed = change(self.visit.open(self.mode(), &self.ticket).await?.session());
        changed.map_err(|error| self.visit.refuse(error))
    }
}

/// All of these open the session if that has not happened, and fail as that does; see
/// [`session_core::Sessions::open`] and [`Answer`](crate::Answer).
impl Session {
    /// Returns the same session as a struct of the application.
    #[must_use]
    pub fn typed<T: crate::Typed>(self) -> Session<T> {
        let mut typed = Session::new(Arc::clone(&self.visit), self.mode);
        let mut this = self;
        typed.ticket = std::mem::take(&mut this.ticket);
        typed
    }

    /// Returns the value of `key`; `None` if there is none.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt) if what is stored is not a `V`.
    pub async fn get<V: DeserializeOwned>(&self, key: &str) -> Result<Option<V>> {
        self.read(|session| session.get(key), |view| view.get(key)).await
    }

    /// Whether there is a value of `key`.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn contains(&self, key: &str) -> Result<bool> {
        self.read(|session| Ok(session.contains(key)), |view| Ok(view.contains(key))).await
    }

    /// Returns the keys, in order; flash values are not among them.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn keys(&self) -> Result<Vec<String>> {
        self.read(|session| Ok(session.keys().map(Into::into).collect()), |view| Ok(view.keys().map(Into::into).collect()))
            .await
    }

    /// Sets the value of `key`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if the key is empty or begins with NUL, or if the codec cannot express the value.
    pub async fn insert<V: Serialize + ?Sized>(&self, key: &str, value: &V) -> Result<()> {
        self.write(|session| session.insert(key, value)).await
    }

    /// Removes `key`; says whether it was there.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn remove(&self, key: &str) -> Result<bool> {
        self.write(|session| Ok(session.remove(key))).await
    }

    /// Removes `key` and returns its value; `None` if there was none.
    ///
    /// # Errors
    /// [`Corrupt`](ErrorKind::Corrupt) if what is stored is not a `V`; it then stays.
    pub async fn take<V: DeserializeOwned>(&self, key: &str) -> Result<Option<V>> {
        self.write(|session| session.take(key)).await
    }

    /// Changes the value of `key` by a function of what it is: a counter, a list that grows. In a [merge](Mode::merge) it is done
    /// again on the newest value if somebody else was faster, so it should have no other effect.
    ///
    /// # Errors
    /// As [`get`](Self::get) and [`insert`](Self::insert).
    pub async fn update_key<V, F>(&self, key: &str, change: F) -> Result<()>
    where
        V: Serialize + DeserializeOwned,
        F: Fn(Option<V>) -> V + Send + Sync + 'static,
    {
        self.write(|session| session.update_key(key, change)).await
    }

    /// Removes all values; the session stays.
    ///
    /// # Errors
    /// Those of opening it.
    pub async fn clear(&self) -> Result<()> {
        self.write(|session| {
            session.clear();
            Ok(())
        })
        .await
    }

    /// Keeps a value for whoever takes it first, usually the next page: a notice after a redirect.
    ///
    /// # Errors
    /// As [`insert`](Self::insert).
    pub async fn flash<V: Serialize + ?Sized>(&self, key: &str, value: &V) -> Result<()> {
        self.write(|session| session.flash(key, value)).await
    }

    /// Takes a flash value; `None` if there is none or it was taken before.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn take_flash<V: DeserializeOwned>(&self, key: &str) -> Result<Option<V>> {
        self.write(|session| session.take_flash(key)).await
    }
}

impl<T> Drop for Session<T> {
    fn drop(&mut self) {
        // Whoever catches the panic between here and the layer makes a response of it, which would look like any other.
        if std::thread::panicking() {
            self.visit.note_panic();
        }
    }
}

impl<T> fmt::Debug for Session<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("mode", &self.mode()).finish_non_exhaustive()
    }
}

pub(crate) fn no_layer() -> Error {
    let message = "there is no SessionLayer around this route";
    session_core::Error::new(ErrorKind::Config, "session", message).into()
}
