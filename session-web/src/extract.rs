//! Sessions as arguments of axum handlers, and errors as their responses.

use axum_core::body::Body;
use axum_core::extract::FromRequestParts;
use axum_core::response::{IntoResponse, Response};
use http::request::Parts;

use crate::error::Error;
use crate::session::Session;
use crate::view::SessionView;

/// Makes no trip: the session is opened when it is first used.
impl<S: Send + Sync, T> FromRequestParts<S> for Session<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        Self::from_extensions(&parts.extensions)
    }
}

/// Makes no trip: the session is read when it is first used.
impl<S: Send + Sync, T> FromRequestParts<S> for SessionView<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        Self::from_extensions(&parts.extensions)
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        self.into_http().map(Body::from)
    }
}
