//! A layer that loses answers: the faults of a network for handlers that have none.
//!
//! Each fault waits in a line for the next call of its kind. What the layer answers is what the contract allows a handler to
//! answer in that place, so a caller cannot tell it from a handler on a bad day.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::future::Future;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use session_core::{
    Change, Error, ErrorKind, Held, OpenRequest, OpenSession, Record, Result, SessionAdmin, SessionHandler, SessionId, Ttl,
    WriteId, Written,
};

use crate::harness::BoxFuture;

/// Which call a fault waits for.
#[allow(clippy::exhaustive_enums, reason = "these are the calls of the contract")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Opening.
    Open,
    /// Writing, touching or saving.
    Write,
    /// Destroying.
    Destroy,
}

/// What becomes of a call.
#[allow(clippy::exhaustive_enums, reason = "a case chooses from all of them")]
pub enum Fault {
    /// The request is not sent: `Unavailable`.
    NeverSent,
    /// The request is done and its answer lost: `Unknown`.
    ReplyLost,
    /// The request is done, something else happens, and the answer is lost.
    ReplyLostAfter(Meanwhile),
    /// The request is sent late.
    Late(Duration),
    /// Something else happens before the request is sent.
    SentAfter(Meanwhile),
}

/// What happens in the middle of a call.
pub type Meanwhile = Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send>;

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NeverSent => "NeverSent",
            Self::ReplyLost => "ReplyLost",
            Self::ReplyLostAfter(_) => "ReplyLostAfter(..)",
            Self::Late(_) => "Late(..)",
            Self::SentAfter(_) => "SentAfter(..)",
        })
    }
}

/// The faults that wait; clones share the line.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<VecDeque<(On, Fault)>>>);

impl Faults {
    /// Lets `fault` wait for the next call of this kind, behind those that wait for it already.
    pub fn next(&self, on: On, fault: Fault) {
        self.line().push_back((on, fault));
    }

    /// Returns how many faults still wait.
    #[must_use]
    pub fn left(&self) -> usize {
        self.line().len()
    }

    fn take(&self, on: On) -> Option<Fault> {
        let mut line = self.line();
        let place = line.iter().position(|(waits_for, _)| *waits_for == on)?;
        line.remove(place).map(|(_, fault)| fault)
    }

    fn line(&self) -> std::sync::MutexGuard<'_, VecDeque<(On, Fault)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handler behind which answers get lost.
#[derive(Debug)]
pub struct Faulty<H> {
    inner: H,
    faults: Faults,
}

impl<H: SessionHandler> Faulty<H> {
    /// Wraps `inner`, to have these faults.
    pub fn new(inner: H, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

fn never_sent(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unavailable, operation, "the store could not be reached")
}

fn no_answer(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unknown, operation, "the request was sent and no answer came")
}

/// Does `call` as `fault` has it.
async fn suffer<T>(fault: Option<Fault>, operation: &'static str, call: impl Future<Output = Result<T>>) -> Result<T> {
    match fault {
        None => call.await,
        Some(Fault::NeverSent) => Err(never_sent(operation)),
        Some(Fault::Late(by)) => {
            tokio::time::sleep(by).await;
            call.await
        }
        Some(Fault::SentAfter(meanwhile)) => {
            meanwhile().await;
            call.await
        }
        Some(Fault::ReplyLost) => {
            drop(call.await);
            Err(no_answer(operation))
        }
        Some(Fault::ReplyLostAfter(meanwhile)) => {
            drop(call.await);
            meanwhile().await;
            Err(no_answer(operation))
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<H: SessionHandler> SessionHandler for Faulty<H> {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let inner = suffer(self.faults.take(On::Open), "open", self.inner.open(id, request)).await;
        // An open that may have taken the lock and whose answer is lost is not different to the caller from one that was not sent.
        let inner = inner.map_err(|error| match error.kind() {
            ErrorKind::Unknown => error.with_kind(ErrorKind::Unavailable),
            _ => error,
        })?;
        Ok(Box::new(Opening { inner, faults: self.faults.clone(), unanswered: HashSet::new() }))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.inner.gc(limit).await
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        self.inner.admin()
    }
}

#[derive(Debug)]
struct Opening {
    inner: Box<dyn OpenSession>,
    faults: Faults,
    /// The writes that were sent and not answered: a refusal says no longer what became of them.
    unanswered: HashSet<WriteId>,
}

impl Opening {
    fn judged(&mut self, id: WriteId, outcome: Result<Written>) -> Result<Written> {
        match outcome {
            Err(error) if error.kind() == ErrorKind::Unknown => {
                self.unanswered.insert(id);
                Err(error)
            }
            Err(error) if !error.kind().keeps_opening() && self.unanswered.contains(&id) => {
                Err(error.with_kind(ErrorKind::Unknown))
            }
            outcome => outcome,
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl OpenSession for Opening {
    async fn read(&mut self) -> Result<Option<Record>> {
        self.inner.read().await
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        let outcome = suffer(self.faults.take(On::Write), "write", self.inner.write(record, id)).await;
        self.judged(id, outcome)
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        suffer(self.faults.take(On::Destroy), "destroy", self.inner.destroy()).await
    }

    async fn close(&mut self) -> Result<()> {
        self.inner.close().await
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        suffer(self.faults.take(On::Write), "touch", self.inner.touch(ttl)).await
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        let fault = match change {
            Change::Write(_) | Change::Touch(_) => self.faults.take(On::Write),
            Change::Destroy => self.faults.take(On::Destroy),
            Change::Nothing => None,
        };
        let outcome = match (fault, change) {
            // A save without an answer has not closed, so that it may be repeated; the write itself was done.
            (Some(fault @ (Fault::ReplyLost | Fault::ReplyLostAfter(_))), Change::Write(record)) => {
                suffer(Some(fault), "save", self.inner.write(record, id)).await
            }
            (fault, change) => suffer(fault, "save", self.inner.save(change, id)).await,
        };
        self.judged(id, outcome)
    }

    fn held(&self) -> Option<&Held> {
        self.inner.held()
    }
}
