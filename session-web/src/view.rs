//! The session as a handler has it that only reads: no lock, no waiting, no method that writes.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use http::Extensions;
use serde::de::DeserializeOwned;
use session_core::SessionId;

use crate::error::Result;
use crate::mode::Mode;
use crate::session::{Session, no_layer};
use crate::visit::Visit;

/// The last committed state of the visitor's session.
///
/// To ask for it costs nothing. The first call reads it, in one trip and without waiting for anybody; later calls, and other
/// views of the same request, see the same. It never prolongs the session's life and never sets a cookie.
///
/// ```
/// use session_web::{Result, SessionView};
///
/// async fn greeting(view: SessionView) -> Result<String> {
///     let user: Option<String> = view.get("user").await?;
///     Ok(format!("Hello, {}", user.as_deref().unwrap_or("stranger")))
/// }
/// ```
///
/// What writes does not compile:
///
/// ```compile_fail
/// # use session_web::{Result, SessionView};
/// async fn greeting(view: SessionView) -> Result<()> {
///     view.insert("user", "ada").await
/// }
/// ```
pub struct SessionView<T = ()> {
    visit: Arc<Visit>,
    mode: Option<Mode>,
    kept: PhantomData<fn() -> T>,
}

impl<T> SessionView<T> {
    /// Takes the session out of the extensions of a request, for services without extractors.
    ///
    /// # Errors
    /// [`Config`](session_core::ErrorKind::Config) if there is no [`SessionLayer`](crate::SessionLayer) around the service.
    pub fn from_extensions(extensions: &Extensions) -> Result<Self> {
        match Visit::of(extensions) {
            Some(visit) => Ok(Self::new(Arc::clone(visit), None)),
            None => Err(no_layer()),
        }
    }

    pub(crate) fn new(visit: Arc<Visit>, mode: Option<Mode>) -> Self {
        Self { visit, mode, kept: PhantomData }
    }

    /// Opens the session as the route's [`Mode`] says, with fresh data. Where there was none, it gives a new one.
    ///
    /// # Errors
    /// Those of opening it.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn reopen(self) -> Result<Session<T>> {
        let session = Session::new(self.visit, self.mode);
        session.open().await?;
        Ok(session)
    }

    /// Whether there is a session.
    ///
    /// # Errors
    /// Those of reading it.
    pub async fn exists(&self) -> Result<bool> {
        self.read(|view| Ok(view.exists())).await
    }

    /// Returns the id of the session; `None` if there is none.
    ///
    /// # Errors
    /// Those of reading it.
    pub async fn id(&self) -> Result<Option<SessionId>> {
        self.read(|view| Ok(view.id().cloned())).await
    }

    pub(crate) async fn read<R>(
        &self,
        read: impl FnOnce(&session_core::SessionView) -> session_core::Result<R>,
    ) -> Result<R> {
        read(&*self.visit.view().await?).map_err(|error| self.visit.refuse(error))
    }
}

impl SessionView {
    /// Returns the value of `key`; `None` if there is none.
    ///
    /// # Errors
    /// Those of reading the session; [`Corrupt`](session_core::ErrorKind::Corrupt) if what is stored is not a `V`.
    pub async fn get<V: DeserializeOwned>(&self, key: &str) -> Result<Option<V>> {
        self.read(|view| view.get(key)).await
    }

    /// Whether there is a value of `key`.
    ///
    /// # Errors
    /// Those of reading the session.
    pub async fn contains(&self, key: &str) -> Result<bool> {
        self.read(|view| Ok(view.contains(key))).await
    }

    /// Returns the keys, in order; flash values are not among them.
    ///
    /// # Errors
    /// Those of reading the session.
    pub async fn keys(&self) -> Result<Vec<String>> {
        self.read(|view| Ok(view.keys().map(Into::into).collect())).await
    }
}

impl<T> fmt::Debug for SessionView<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionView").finish_non_exhaustive()
    }
}
