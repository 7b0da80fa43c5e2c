//! What surrounds a route: it hands out sessions and brings their ids back, and never touches the store by itself.

use std::fmt;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderName, Request, Response};
use session_core::Sessions;
use tower_layer::Layer;
use tower_service::Service;

use crate::cookie::SessionCookie;
use crate::error::Answer;
use crate::mode::Mode;
use crate::transport::{Notice, Transport};
use crate::visit::Visit;

/// What becomes of the changes of a request that failed.
#[allow(clippy::exhaustive_enums, reason = "they are stored or not")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changes {
    /// They are saved.
    Keep,
    /// They are discarded, back to the last save.
    Discard,
}

/// Gives the requests of a service their sessions.
///
/// ```
/// # #[cfg(feature = "axum")] mod shown {
/// # use axum::Router;
/// # use session_core::{ErrorKind, Sessions};
/// use session_web::{Answer, SessionCookie, SessionLayer};
///
/// # fn app(router: Router, sessions: Sessions) -> session_core::Result<Router> {
/// let layer = SessionLayer::new(sessions)
///     .with_cookie(SessionCookie::strict().build()?)
///     .on_error(|error| match error.kind() {
///         // Pages are shown, as if nobody were logged in.
///         ErrorKind::Unavailable => Answer::GoOn,
///         _ => error.into(),
///     });
/// # Ok(router.layer(layer)) }
/// # }
/// ```
#[derive(Clone)]
pub struct SessionLayer {
    all: Sessions,
    realm: Realm,
    shared: Arc<Shared>,
}

#[derive(Clone)]
enum Realm {
    OfTransport,
    Named(String),
    None,
}

type Hook = Arc<dyn Fn(&session_core::Error) -> Answer + Send + Sync>;

#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) sessions: Sessions,
    pub(crate) transport: Transport,
    pub(crate) mode: Mode,
    pub(crate) on_error: Hook,
    on_server_error: Changes,
    on_panic: Changes,
}

impl SessionLayer {
    /// Hands out `sessions` by the cookie of [`SessionCookie::default`].
    #[must_use]
    pub fn new(sessions: Sessions) -> Self {
        let shared = Shared {
            sessions: sessions.clone(),
            transport: Transport::Cookie(Box::default()),
            mode: Mode::exclusive(),
            on_error: Arc::new(|error| error.into()),
            on_server_error: Changes::Keep,
            on_panic: Changes::Discard,
        };
        Self { all: sessions, realm: Realm::OfTransport, shared: Arc::new(shared) }.with_its_realm()
    }

    /// Carries the id in another cookie.
    #[must_use]
    pub fn with_cookie(self, cookie: SessionCookie) -> Self {
        self.set(|shared| shared.transport = Transport::Cookie(Box::new(cookie))).with_its_realm()
    }

    /// Carries the id in a header of request and response, and in no cookie: for clients that are no browsers. The client keeps
    /// what a response tells, and forgets it when that is empty.
    #[must_use]
    pub fn with_header(self, name: HeaderName) -> Self {
        self.set(|shared| shared.transport = Transport::Header(name)).with_its_realm()
    }

    /// Sets under which name its sessions are known: what two layers hand out under two names is unknown to the other, even if
    /// they share the store. Default: the name of the cookie or header. Two layers with one realm share their sessions.
    #[must_use]
    pub fn with_realm(mut self, name: impl Into<String>) -> Self {
        self.realm = Realm::Named(name.into());
        self.with_its_realm()
    }

    /// Hands out all sessions of the store, whoever made them.
    #[must_use]
    pub fn without_realm(mut self) -> Self {
        self.realm = Realm::None;
        self.with_its_realm()
    }

    /// Sets how sessions are opened where a route says nothing else.
    #[must_use]
    pub fn mode(self, mode: Mode) -> Self {
        self.set(|shared| shared.mode = mode)
    }

    /// Sets what becomes of a request whose session cannot be opened or saved. Default: the [usual](Answer#impl-From<%26Error>-for-Answer)
    /// responses. The hook is told the error, which is also logged, and runs on the request's task, so it should not block.
    #[must_use]
    pub fn on_error(self, hook: impl Fn(&session_core::Error) -> Answer + Send + Sync + 'static) -> Self {
        self.set(|shared| shared.on_error = Arc::new(hook))
    }

    /// Sets what becomes of the changes of a handler that returns a server error. Default [`Changes::Keep`].
    #[must_use]
    pub fn on_server_error(self, changes: Changes) -> Self {
        self.set(|shared| shared.on_server_error = changes)
    }

    /// Sets what becomes of the changes of a handler that panics. Default [`Changes::Discard`]. The panic goes on, to whoever
    /// catches it.
    #[must_use]
    pub fn on_panic(self, changes: Changes) -> Self {
        self.set(|shared| shared.on_panic = changes)
    }

    /// Returns the sessions as this layer hands them out.
    #[must_use]
    pub fn sessions(&self) -> &Sessions {
        &self.shared.sessions
    }

    fn set(mut self, change: impl FnOnce(&mut Shared)) -> Self {
        change(Arc::make_mut(&mut self.shared));
        self
    }

    fn with_its_realm(self) -> Self {
        let all = self.all.clone();
        let sessions = match &self.realm {
            Realm::OfTransport => all.with_realm(self.shared.transport.name()),
            Realm::Named(name) => all.with_realm(name),
            Realm::None => all,
        };
        self.set(|shared| shared.sessions = sessions)
    }
}

impl fmt::Debug for SessionLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionLayer")
            .field("sessions", &self.shared.sessions)
            .field("transport", &self.shared.transport)
            .field("mode", &self.shared.mode)
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for SessionLayer {
    type Service = WithSessions<S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithSessions { inner, shared: Arc::clone(&self.shared) }
    }
}

/// A service whose requests have sessions; see [`SessionLayer`].
#[derive(Clone)]
pub struct WithSessions<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S: fmt::Debug> fmt::Debug for WithSessions<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WithSessions").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<S, B, R> Service<Request<B>> for WithSessions<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send,
    R: From<Bytes> + Send,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let visit = Arc::new(Visit::new(Arc::clone(&self.shared), request.headers()));
        request.extensions_mut().insert(Arc::clone(&visit));
        let (inner, shared) = (self.inner.call(request), Arc::clone(&self.shared));
        Box::pin(async move {
            let mut inner = pin!(inner);
            // A panic that ends the connection would leave its lock to the janitor; one that a layer above catches, too.
            let outcome = poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| inner.as_mut().poll(context))) {
                Ok(poll) => poll.map(Ok),
                Err(panic) => Poll::Ready(Err(panic)),
            });
            let outcome = outcome.await;
            if !visit.is_touched() {
                return outcome.unwrap_or_else(|panic| resume_unwind(panic));
            }
            match outcome {
                Ok(Ok(response)) => Ok(shared.end(&visit, response).await),
                Ok(Err(error)) => {
                    // A save that is refused is logged; the service's own error is what is answered.
                    let _ = visit.end(shared.on_server_error == Changes::Keep).await;
                    Err(error)
                }
                Err(panic) => {
                    let _ = visit.end(shared.on_panic == Changes::Keep).await;
                    resume_unwind(panic)
                }
            }
        })
    }
}

impl Shared {
    async fn end<R: From<Bytes>>(&self, visit: &Visit, mut response: Response<R>) -> Response<R> {
        let keep = match (visit.has_panicked(), response.status().is_server_error()) {
            (true, _) => self.on_panic == Changes::Keep,
            (false, true) => self.on_server_error == Changes::Keep,
            (false, false) => true,
        };
        let (notice, saved) = visit.end(keep).await;
        if let Err(error) = saved {
            response = error.into_http().map(R::from);
        }
        if let Err(error) = self.transport.write(response.headers_mut(), &notice) {
            response = visit.refuse(error).into_http().map(R::from);
            self.transport.write(response.headers_mut(), &Notice::Nothing).expect("nothing is told");
        }
        response
    }
}
