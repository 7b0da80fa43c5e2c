//! What is said to a server, and what it can answer: a batch of commands in, an answer for each out.
//!
//! The algorithm of this crate knows only this. Who carries it is [`Transport`]: today a pool of the client crate's connections,
//! each of which carries one batch at a time; it could be one that joins batches. Nothing here knows what an item holds.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use session_core::leased::Failed;
use session_core::{Error, ErrorKind};

/// One command.
#[derive(Debug)]
pub(crate) enum Command {
    /// Reads an item.
    Get { key: Arc<str>, what: Read },
    /// Stores an item, if it is as it has to be.
    Set {
        key: Arc<str>,
        value: Vec<u8>,
        when: When,
        /// For how many seconds; not for an append, which leaves that alone.
        seconds: u64,
    },
    Delete {
        key: Arc<str>,
        /// Only if it still has this number.
        unchanged: Option<u64>,
    },
}

impl Command {
    /// Returns about how many bytes it has on the way there.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Get { key, .. } | Self::Delete { key, .. } => key.len() + 24,
            Self::Set { key, value, .. } => key.len() + value.len() + 48,
        }
    }
}

/// Commands that go together and in this order.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) commands: Vec<Command>,
    /// The life of the server that the numbers in them are from.
    pub(crate) life: Option<Life>,
}

/// What is read of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// Its bytes.
    Value,
    /// Its bytes; and it is marked as in somebody's hands. The mark goes with the next store.
    ValueAndMark,
    /// The mark alone.
    Mark,
    /// Its size alone.
    Size,
}

/// How an item has to be for a store to take place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Absent,
    /// It has this number.
    Unchanged(u64),
    /// It is there; the bytes are put behind its own.
    Append,
    /// It has this number; the bytes are put behind its own.
    AppendUnchanged(u64),
}

/// What became of a command.
#[derive(Debug)]
pub(crate) enum Answer {
    Item(Item),
    /// It was stored or deleted; the number is that of a stored item.
    Done(u64),
    /// There is no such item.
    Absent,
    /// It has another number.
    Changed,
    /// It is there, or for an append, is not; or there was no memory for it.
    NotStored,
}

/// An item that was read.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) value: Vec<u8>,
    /// The number that every change of the item changes.
    pub(crate) cas: u64,
    /// For how many seconds the server will keep it; none if for ever.
    pub(crate) seconds: Option<u64>,
    /// How many bytes it has, if they were not read.
    pub(crate) size: u64,
    /// Whether somebody had marked it before, since it was stored.
    pub(crate) marked: bool,
}

/// One life of a server, from start to stop. Where the server counts the numbers of items itself, they begin anew with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) process: u64,
    pub(crate) started: u64,
}

/// The answers to a batch.
#[derive(Debug)]
pub(crate) struct Answers {
    answers: std::vec::IntoIter<Answer>,
    pub(crate) life: Life,
}

impl Answers {
    pub(crate) fn new(answers: Vec<Answer>, life: Life) -> Self {
        Self { answers: answers.into_iter(), life }
    }

    /// Returns the answer to the next command.
    pub(crate) fn next(&mut self) -> Result<Answer, Failure> {
        self.answers.next().ok_or_else(|| Failure::unexpected("an answer is missing"))
    }

    /// Returns the answer to the next command, which was a read.
    pub(crate) fn item(&mut self) -> Result<Option<Item>, Failure> {
        match self.next()? {
            Answer::Item(item) => Ok(Some(item)),
            Answer::Absent => Ok(None),
            _ => Err(Failure::unexpected("a read was answered as if it were a change")),
        }
    }

    /// Returns the number of what the next command stored, if it did.
    pub(crate) fn stored(&mut self) -> Result<Option<u64>, Failure> {
        match self.next()? {
            Answer::Done(cas) => Ok(Some(cas)),
            Answer::Absent | Answer::Changed | Answer::NotStored => Ok(None),
            Answer::Item(_) => Err(Failure::unexpected("a store was answered as if it were a read")),
        }
    }
}

/// Carries batches to servers.
#[async_trait]
pub(crate) trait Transport: fmt::Debug + Send + Sync + 'static {
    /// Sends commands to a server in one flight; it carries them out in order, each for itself.
    ///
    /// Numbers of items that stand in the commands are those of one `life` of the server. If that is over and its numbers may
    /// come again, nothing is sent.
    ///
    /// # Cancel safety
    /// A dropped future may have sent them.
    async fn exchange(&self, server: usize, commands: Vec<Command>, life: Option<Life>) -> Result<Answers, Failure> {
        let answers = self.exchange_all(server, vec![Flight { commands, life }]).await.pop();
        answers.unwrap_or_else(|| Err(Failure::unexpected("a batch was answered by nothing")))
    }

    /// The same for several that have nothing to do with each other, with an answer for each, in order.
    async fn exchange_all(&self, server: usize, flights: Vec<Flight>) -> Vec<Result<Answers, Failure>>;

    /// Has a server list the keys that begin with `prefix`, each passed to `key`.
    async fn keys(
        &self,
        server: usize,
        prefix: &str,
        key: &mut (dyn for<'k> FnMut(&'k str) + Send + '_),
    ) -> Result<(), Failure>;

    /// Returns how many servers there are.
    fn servers(&self) -> usize;

    /// Whether a server could not be reached a moment ago.
    fn is_down(&self, server: usize) -> bool;

    /// Returns how many bytes an item may have on every server, as far as they have been asked.
    fn item_limit(&self) -> usize;
}

/// Why a batch has no answers that could be used.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: ErrorKind,
    message: Cow<'static, str>,
    source: Option<std::io::Error>,
    /// Whether the server may have carried some of it out.
    pub(crate) sent: bool,
    /// Whether another attempt, on another connection, may fare better.
    pub(crate) passing: bool,
    /// Whether the server that the numbers are from is no more.
    pub(crate) restarted: bool,
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, message: message.into(), source: None, sent: false, passing: false, restarted: false }
    }

    pub(crate) fn unavailable(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    pub(crate) fn unexpected(message: impl Into<Cow<'static, str>>) -> Self {
        Self { sent: true, ..Self::new(ErrorKind::Unexpected, message) }
    }

    pub(crate) fn corrupt() -> Self {
        let message = "the item is nothing that any version of this library writes; it was left alone";
        Self::new(ErrorKind::Corrupt, message)
    }

    pub(crate) fn with_source(mut self, source: std::io::Error) -> Self {
        self.source = Some(source);
        self
    }

    /// The same of something that was sent.
    pub(crate) fn after_sending(mut self, passing: bool) -> Self {
        (self.sent, self.passing) = (true, passing);
        self
    }

    /// The same, with another answer to whether the change that it belongs to may have been carried out.
    pub(crate) fn with_sent(mut self, sent: bool) -> Self {
        self.sent = sent;
        self
    }

    /// What the numbers were from is no more.
    pub(crate) fn restarted() -> Self {
        let message = "it was started anew since the session was read, and what it held is gone";
        Self { restarted: true, ..Self::unavailable(message) }
    }

    /// The same for another member of the batch.
    pub(crate) fn again(&self) -> Self {
        Self { message: self.message.clone(), source: None, ..*self }
    }

    /// Says which server it was.
    pub(crate) fn of(mut self, server: &str) -> Self {
        self.message = format!("memcached at {server}: {}", self.message).into();
        self
    }

    /// For something that changes nothing, or that is undone if it happened.
    pub(crate) fn into_error(self, operation: &'static str) -> Error {
        let error = Error::new(self.kind, operation, self.message);
        match self.source {
            Some(source) => error.with_source(source),
            None => error,
        }
    }

    pub(crate) fn into_failed(self, operation: &'static str) -> Failed {
        let sent = self.sent;
        Failed { error: self.into_error(operation), sent }
    }
}
