//! Sessions over real HTTP, with a real client and its cookie jar.
#![cfg(feature = "axum")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod article;
mod attributes;
mod caching;
mod ends;
mod errors;
mod flood;
mod isolation;
mod modes;
mod presented;
mod races;
mod support;
mod trips;
mod typed;
