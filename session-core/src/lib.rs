//! The contract of sessionkit, and the session itself.
//!
//! Reading order: [`SessionHandler`] and [`OpenSession`] (what a backend owes), [`SessionLock`] (who may work on a session),
//! then what an application uses. This crate opens no file and no socket and knows no web framework.

mod clock;
mod codec;
mod depth;
mod dsn;
#[allow(dead_code, reason = "the session uses all of it")]
mod envelope;
mod error;
mod handler;
mod id;
mod lock;
mod memory;
mod record;
#[allow(dead_code, reason = "the session uses all of it")]
mod seal;
mod ttl;

pub use async_trait::async_trait;
pub use clock::{Clock, ManualClock, SystemClock};
#[cfg(feature = "bincode")]
pub use codec::Bincode;
#[cfg(feature = "json")]
pub use codec::Json;
#[cfg(feature = "postcard")]
pub use codec::Postcard;
pub use codec::{Codec, MessagePack, ValueCodec};
pub use dsn::{COMMON_OPTIONS, Dsn, parse_duration};
pub use error::{Error, ErrorKind, Holder, Result};
pub use handler::{
    Access, Cursor, Expect, LockInfo, OpenRequest, OpenSession, Page, SessionAdmin, SessionHandler, SessionInfo,
};
pub use id::SessionId;
pub use lock::{Held, Lease, LeaseRequest, LeaseToken, SessionLock};
pub use memory::{MemoryBuilder, MemoryHandler, MemoryLock};
pub use record::{Change, Record, WriteId, Written};
pub use ttl::Ttl;
