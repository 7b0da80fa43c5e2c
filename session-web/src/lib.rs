//! Sessions for [tower](tower_service) and axum: nothing touches the store unless the handler does, and no update is lost.
//!
//! Reading order: [`SessionLayer`] (what surrounds a route), [`Session`] and [`SessionView`] (what a handler asks for), [`Mode`]
//! (how a route locks), [`SessionCookie`] (how the id travels), [`Error`] and [`Answer`] (what the visitor sees if it fails).
//!
//! ```
//! # #[cfg(feature = "axum")] mod shown {
//! use axum::{Router, routing::get};
//! use session_core::Sessions;
//! use session_web::{Result, Session, SessionLayer};
//!
//! /// Locked from the first line on until the response is made; two tabs at once count twice.
//! async fn visit(session: Session) -> Result<String> {
//!     let visits = session.get("visits").await?.unwrap_or(0) + 1;
//!     session.insert("visits", &visits).await?;
//!     Ok(format!("visit {visits}"))
//! }
//!
//! fn app(sessions: Sessions) -> Router {
//!     Router::new().route("/", get(visit)).layer(SessionLayer::new(sessions))
//! }
//! # }
//! ```
//!
//! | what the handler does | trips to the store |
//! |---|---|
//! | asks for nothing, or for a session that it does not use | 0 |
//! | reads through [`SessionView`] | 1 |
//! | reads or changes through [`Session`] | 2: lock and read, write and unlock |
//! | writes for a visitor who has no session yet | 1 |
//!
//! # The end of a handler
//!
//! When the handler has made its response, the session is saved and its lock given back, before the first byte of the body is
//! sent: a slow client holds no lock. If the save is refused, the visitor gets the answer of [`SessionLayer::on_error`] and not a
//! response that says it was saved.
//!
//! | the handler | what it changed | to change that |
//! |---|---|---|
//! | returns a response, also one of a client error (4xx) | is saved | |
//! | returns a server error (5xx) | is saved | [`SessionLayer::on_server_error`] |
//! | panics | is discarded | [`SessionLayer::on_panic`] |
//! | is dropped, because the client hung up | is discarded | |
//!
//! The lock is given back in all four. A staged [`rotate`](Session::rotate) or [`elevate`](Session::elevate) is a change like any
//! other: saved, the response carries the new id, even if it is an error; discarded, the old id stays valid.
//!
//! Nothing here knows how a session is stored or locked.

mod cookie;
mod error;
#[cfg(feature = "axum")]
mod extract;
mod keys;
mod layer;
mod mode;
mod presented;
mod session;
mod transport;
mod typed;
mod view;
mod visit;

pub use crate::cookie::{Duplicates, SameSite, SessionCookie, SessionCookieBuilder};
pub use error::{Answer, Error, Result};
pub use keys::CookieKeys;
pub use layer::{Changes, SessionLayer, WithSessions};
pub use mode::{Mode, WithMode};
pub use session::Session;
pub use typed::Typed;
pub use view::SessionView;
