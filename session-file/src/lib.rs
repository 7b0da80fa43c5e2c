//! Sessions in files, for **local file systems only**. With `durability=none` a power cut may take what was written since the
//! kernel last wrote back (a killed process takes nothing); with `data`, the default, and `full`, an acknowledged write is on the
//! disk. On network file systems locks can end unnoticed and waiters are not woken: do not.
//!
//! One file per session, never replaced and never renamed: two entries and room for two payloads, so that a write never
//! touches what is in force, readers need no lock, and a crash at any byte leaves the old state. The kernel's lock on the
//! file itself keeps writers apart; it ends with its holder's process and never before, so a stopped holder stays the holder.
//! Waiters are served first come, first served across processes, and woken by the release.
//!
//! A file that nobody waits for stays open for the next request of the same visitor, without a lock and for a second at most
//! ([`keep_open`](FileConfig::keep_open)). As long as that lasts, its file system cannot be remounted read-only.
//!
//! ```no_run
//! # async fn f() -> session_core::Result<()> {
//! use std::time::Duration;
//! use session_core::{Change, OpenRequest, Record, SessionHandler, SessionId, Ttl, WriteId};
//! use session_file::{FileConfig, FileHandler};
//!
//! let handler = FileHandler::open_dir(FileConfig::new("/var/lib/app/sessions"))?;
//! let id = SessionId::parse("2v7f8q1c0j3m5n9p4r6s8t0u1v2a3b4c").expect("it is well formed");
//! let request = OpenRequest::exclusive(Duration::from_secs(5), Duration::from_secs(10));
//! let mut session = handler.open(&id, &request).await?;
//! if let Some(record) = session.read().await? {
//!     let longer = Record::new(record.data, Ttl::from_secs(1200));
//!     session.save(&Change::Write(longer), WriteId::random()?).await?;
//! }
//! # Ok(()) }
//! ```
//!
//! Reading order: `layout` (what stands where), `io` (one file under its lock), `handler` (what each access does), `wait` (how
//! the lock is waited for), `kept` (which files stay open between two openings), `store` and `sync` (on which thread a call runs,
//! and who waits for the disk), `dir` (whose files these are).

mod admin;
mod config;
mod dir;
mod handler;
mod io;
mod kept;
mod layout;
mod lock;
mod store;
mod sync;
mod wait;

pub use config::{Durability, FileConfig, Io};
pub use handler::FileHandler;
pub use lock::FileLock;
