//! The conformance suite for session handlers: what must be true of every one of them, each sentence as a test.
//!
//! A handler's whole test file is a harness and one macro per claim. A claim that is not made is a line that is not there;
//! nothing is skipped. Where a contract leaves a handler a choice, a method of the [`Harness`] says which one it made, and what is
//! demanded changes with it.
//!
//! ```no_run
//! use std::sync::Arc;
//! use conformance_tests::Harness;
//! use session_core::{Result, SessionHandler};
//! # fn connect(_: &str) -> Result<Arc<dyn SessionHandler>> { Ok(Arc::new(session_core::MemoryHandler::new())) }
//!
//! struct Mine;
//!
//! impl Harness for Mine {
//!     async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
//!         connect(&format!("mine://localhost/?prefix={namespace}"))
//!     }
//! }
//!
//! conformance_tests::handler_suite!(Mine);
//! # fn main() {}
//! ```
//!
//! | macro | the claim |
//! |---|---|
//! | [`handler_suite!`] | the callbacks do what [`SessionHandler`](session_core::SessionHandler) says |
//! | [`fence_suite!`] | no write is applied that is not based on the newest state, whatever became of the lock |
//! | [`expiry_suite!`] | records and leases end when they should, and collecting takes nothing that is alive or held |
//! | [`optimistic_suite!`] | optimistic openings take no lock, and yield to whoever wrote or holds |
//! | [`race_suite!`] | nothing is lost, torn or brought back when many work on one session at once |
//! | [`cancel_suite!`] | nobody who goes away without a word keeps a session, or leaves half of a write |
//! | [`hostile_suite!`] | ids and payloads of strangers do no harm, and secrets are not shown |
//! | [`admin_suite!`] | the store can be listed, and a lock can be broken |
//! | [`lock_suite!`] | the store's lock can be used alone; the harness has to give one |
//! | [`sessions_suite!`] | what an application gets from the handler through [`Sessions`](session_core::Sessions) |
//! | [`trips_suite!`] | how many round trips each use of a session costs; the harness has to name its server |
//! | [`processes_suite!`] | all of it across processes, some of them killed or stopped |
//!
//! Each case is a `#[test]` of its own name, says which guarantee was broken and what was seen instead, and names no backend.
//! A case of a random nature prints its seed; `CONFORMANCE_SEED=…` replays it. A missing server is a failed case: let the
//! harness answer with an error that says how to start it.
//!
//! [`cases`] lists all of them and [`run_case`] runs one against a store that is known only at run time; [`claims`] finds out
//! what such a store can be held to.
//!
//! Each case is failed by at least one liar of [`liars`], a store that is broken in one small way on purpose, and the crate's own
//! tests prove it. [`faulty`] and [`proxy`] lose the answers that a good network delivers.
//!
//! This crate knows the contract and nothing of any backend.

mod admin;
pub mod by_hand;
mod cancel;
mod case;
mod children;
mod expiry;
pub mod faulty;
mod fence;
pub mod hammer;
mod handler;
mod harness;
mod hostile;
pub mod liars;
mod lock;
mod optimistic;
pub mod processes;
pub mod proxy;
mod race;
mod remote;
#[cfg(feature = "servers")]
pub mod servers;
mod sessions;
mod steps;
mod store;
mod trips;

pub use case::{Case, Outcome, cases, claims, run_case, run_test};
pub use harness::{BoxFuture, DynHarness, Env, Harness, Rng};
