//! How a route works on sessions: with the lock, without it, or only reading; and how long it waits.

use std::task::{Context, Poll};
use std::time::Duration;

use http::Request;
use session_core::Sessions;
use tower_layer::Layer;
use tower_service::Service;

use crate::visit::Visit;

/// How a [`Session`](crate::Session) is opened when it is first touched.
///
/// For all routes, [`SessionLayer::mode`](crate::SessionLayer::mode); for one, as a layer inside of that, or in the handler:
///
/// ```
/// # #[cfg(feature = "axum")] mod shown {
/// # use std::time::Duration;
/// # use axum::{Router, routing::post};
/// # use session_web::{Mode, Result, Session};
/// # async fn pay() {}
/// async fn like(session: Session) -> Result<()> {
///     let session = session.with(Mode::merge());
///     session.update_key("likes", |n: Option<u32>| n.unwrap_or(0) + 1).await
/// }
///
/// # fn app() -> Router {
/// Router::new()
///     .route("/pay", post(pay))
///     .route_layer(Mode::exclusive().wait(Duration::from_secs(2)).lease(Duration::from_secs(60)))
///     .route("/like", post(like))
/// # }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Mode {
    pub(crate) kind: Kind,
    wait: Option<Duration>,
    lease: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Exclusive,
    Merge,
    ReadOnly,
}

impl Mode {
    /// One request at a time works on a session; the others wait. The default.
    pub const fn exclusive() -> Self {
        Self { kind: Kind::Exclusive, wait: None, lease: None }
    }

    /// Requests work on a session at the same time, and what each has changed is laid over what is stored by then. The same key
    /// changed to two values is a [`Conflict`](session_core::ErrorKind::Conflict), but for
    /// [`update_key`](crate::Session::update_key), which is done again.
    pub const fn merge() -> Self {
        Self { kind: Kind::Merge, wait: None, lease: None }
    }

    /// Sessions are read, without a lock and without waiting. A write is [`Unsupported`](session_core::ErrorKind::Unsupported);
    /// a handler that asks for a [`SessionView`](crate::SessionView) cannot even be compiled with one.
    pub const fn read_only() -> Self {
        Self { kind: Kind::ReadOnly, wait: None, lease: None }
    }

    /// Sets how long a request waits for the lock, instead of what the [`Sessions`] say.
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Sets how long the lock lasts if this process dies, instead of what the [`Sessions`] say. It is renewed while the handler
    /// works.
    pub const fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    pub(crate) fn apply(self, sessions: &Sessions) -> Sessions {
        let sessions = sessions.clone();
        let sessions = self.wait.into_iter().fold(sessions, Sessions::with_wait);
        self.lease.into_iter().fold(sessions, Sessions::with_lease)
    }
}

impl Default for Mode {
    fn default() -> Self {
        Self::exclusive()
    }
}

impl<S> Layer<S> for Mode {
    type Service = WithMode<S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithMode { inner, mode: *self }
    }
}

/// A service whose requests open sessions in a [`Mode`] of their own. Outside of a [`SessionLayer`](crate::SessionLayer) it does
/// nothing.
#[derive(Clone, Debug)]
pub struct WithMode<S> {
    inner: S,
    mode: Mode,
}

impl<S, B> Service<Request<B>> for WithMode<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if let Some(visit) = Visit::of(request.extensions()) {
            visit.set_mode(self.mode);
        }
        self.inner.call(request)
    }
}
