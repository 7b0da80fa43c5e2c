//! The contract of sessionkit, and the session itself.
//!
//! Reading order: [`SessionHandler`] and [`OpenSession`] (what a backend owes), [`SessionLock`] (who may work on a session),
//! then what an application uses. This crate opens no file and no socket and knows no web framework.

mod clock;
mod codec;
pub mod collector;
mod commit;
mod depth;
mod dsn;
mod envelope;
mod error;
mod handler;
mod hash_ids;
mod id;
mod janitor;
pub mod leased;
mod lock;
mod locked;
mod memory;
mod merge;
mod observe;
mod owned;
mod queue;
mod record;
mod seal;
mod session;
mod sessions;
mod settings;
pub mod spin;
mod ttl;
mod values;
mod view;

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
pub use hash_ids::HashIds;
pub use id::SessionId;
pub use lock::{Held, Lease, LeaseRequest, LeaseToken, SessionLock};
pub use locked::Locked;
pub use memory::{MemoryBuilder, MemoryHandler, MemoryLock};
pub use observe::Observe;
pub use record::{Change, Record, WriteId, Written};
pub use session::Session;
pub use sessions::{Sessions, Updated};
pub use settings::SessionsBuilder;
pub use ttl::Ttl;
pub use view::SessionView;
