//! What the visitor gets if a session cannot be had or kept.

use std::error::Error as StdError;
use std::fmt;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use session_core::ErrorKind;

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What becomes of a request whose session cannot be opened or saved: what the application's
/// [`on_error`](crate::SessionLayer::on_error) returns.
#[allow(clippy::exhaustive_enums, reason = "a request is answered, or it goes on")]
#[derive(Debug)]
pub enum Answer {
    /// The visitor gets this response.
    Respond(Response<Bytes>),
    /// The handler goes on without a session: it sees an empty one, and what it puts in is forgotten. At the end of a handler:
    /// its response is sent although what it changed is not stored.
    GoOn,
}

/// The answers without a hook. None of them says more than a visitor may know.
///
/// | kind | status | `Retry-After` |
/// |---|---|---|
/// | [`LockTimeout`](ErrorKind::LockTimeout), [`Fenced`](ErrorKind::Fenced) | 503 | 1 |
/// | [`Busy`](ErrorKind::Busy) | 429 | 1 |
/// | [`Unavailable`](ErrorKind::Unavailable), [`Unknown`](ErrorKind::Unknown) | 503 | 5 |
/// | [`Conflict`](ErrorKind::Conflict), [`Gone`](ErrorKind::Gone) | 409 | |
/// | all others | 500 | |
impl From<&session_core::Error> for Answer {
    fn from(error: &session_core::Error) -> Self {
        Self::Respond(response(error.kind()))
    }
}

fn response(kind: ErrorKind) -> Response<Bytes> {
    let (status, retry, text) = match kind {
        ErrorKind::LockTimeout | ErrorKind::Fenced => {
            (StatusCode::SERVICE_UNAVAILABLE, Some(1), "Another request is using this session. Please try again.\n")
        }
        ErrorKind::Busy => (StatusCode::TOO_MANY_REQUESTS, Some(1), "Too many requests at once. Please try again.\n"),
        ErrorKind::Unavailable | ErrorKind::Unknown => {
            (StatusCode::SERVICE_UNAVAILABLE, Some(5), "Sessions are unavailable at the moment. Please try again.\n")
        }
        ErrorKind::Conflict => (StatusCode::CONFLICT, None, "Another request has changed the same. Please try again.\n"),
        ErrorKind::Gone => (StatusCode::CONFLICT, None, "This session has ended.\n"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, None, "Something went wrong with this session.\n"),
    };
    let mut response = Response::new(Bytes::from_static(text.as_bytes()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(seconds) = retry {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A session that could not be opened, used or saved, and the response for it.
///
/// With the feature `axum` a handler may return it as it is. An error of `session-core` becomes one with the usual response.
pub struct Error(Box<Inner>);

struct Inner {
    cause: session_core::Error,
    response: Response<Bytes>,
}

impl Error {
    pub(crate) fn new(cause: session_core::Error, response: Response<Bytes>) -> Self {
        Self(Box::new(Inner { cause, response }))
    }

    /// Returns what the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.cause.kind()
    }

    /// Returns what went wrong: for the log, not for the visitor.
    #[must_use]
    pub fn cause(&self) -> &session_core::Error {
        &self.0.cause
    }

    /// Returns the response that the visitor should get.
    #[must_use]
    pub fn into_http(self) -> Response<Bytes> {
        self.0.response
    }
}

impl From<session_core::Error> for Error {
    fn from(cause: session_core::Error) -> Self {
        let response = response(cause.kind());
        Self::new(cause, response)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.cause.fmt(f)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.cause.fmt(f)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.cause.source()
    }
}
