//! The steps that cases are made of: open, write, look, and what to say when a step goes wrong.
//!
//! Nothing here decides what is right; a case does.

use std::time::Duration;

use session_core::{Expect, OpenRequest, OpenSession, SessionHandler, SessionId};

use crate::harness::Env;

/// An opening.
pub(crate) type Opened = Box<dyn OpenSession>;

/// Returns a new id.
pub(crate) fn new_id() -> SessionId {
    SessionId::generate().expect("the operating system has randomness")
}

impl Env {
    /// Asks for the lock with time enough for everything but a lock that is kept for ever.
    pub(crate) fn patient(&self) -> OpenRequest {
        OpenRequest::exclusive(Duration::from_secs(20) + self.tick() * 20, self.lease())
    }

    /// A lease that does not end while a case works at its usual pace.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(30) + self.tick() * 30
    }
}

/// Opens, and fails the case if that is refused.
pub(crate) async fn open(handler: &dyn SessionHandler, id: &SessionId, request: OpenRequest) -> Opened {
    match handler.open(id, &request).await {
        Ok(opened) => opened,
        Err(error) => panic!("open as {request:?} was refused: {error:?}"),
    }
}

/// Opens for reading and returns the bytes of the record, if there is one.
pub(crate) async fn look(handler: &dyn SessionHandler, id: &SessionId) -> Option<Vec<u8>> {
    let mut view = open(handler, id, OpenRequest::read_only().expecting(Expect::Any)).await;
    let record = view.read().await.unwrap_or_else(|error| panic!("a read without a lock failed: {error:?}"));
    view.close().await.unwrap_or_else(|error| panic!("closing a read without a lock failed: {error:?}"));
    record.map(|record| record.data)
}
