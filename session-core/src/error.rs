//! What can go wrong, in kinds named by what the caller does next.
//!
//! Absence is not in here: a session that is not there is an answer (`None`), never an error.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about an [`Error`].
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The store could not be reached; nothing was applied. Retry later.
    Unavailable,
    /// A request was sent and no answer came, and asking again did not settle it. It may have been applied. Save again
    /// under the same [`WriteId`](crate::WriteId), or read.
    Unknown,
    /// Somebody else kept the lock for the whole wait. Retry later, or tell the visitor.
    LockTimeout,
    /// Too many are waiting for this session already. Turn the request away.
    Busy,
    /// Somebody else took over; the write was refused and nothing changed. Read again and redo the work.
    Fenced,
    /// The session was destroyed, expired or evicted meanwhile; nothing was stored. Start a new one.
    Gone,
    /// Somebody else changed the same thing first; nothing changed. [`Error::keys`] names the keys, where known.
    Conflict,
    /// The record is larger than this store may hold; the stored one is intact. Put less into the session.
    TooLarge,
    /// The stored bytes are nothing that any version of this library writes. They were left alone.
    Corrupt,
    /// A DSN, an option or a permission is wrong. A person must mend it.
    Config,
    /// This handler cannot do what was asked. Choose another access or another backend.
    Unsupported,
    /// An answer that this version does not understand. Report it.
    Unexpected,
}

impl ErrorKind {
    /// Returns the kind as one lower-case word, for metrics and machine-readable output.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Unknown => "unknown",
            Self::LockTimeout => "lock_timeout",
            Self::Busy => "busy",
            Self::Fenced => "fenced",
            Self::Gone => "gone",
            Self::Conflict => "conflict",
            Self::TooLarge => "too_large",
            Self::Corrupt => "corrupt",
            Self::Config => "config",
            Self::Unsupported => "unsupported",
            Self::Unexpected => "unexpected",
        }
    }

    /// Whether an opening is still usable after a save ended this way: it may be saved again under the same
    /// [`WriteId`](crate::WriteId). After any other error it is spent and its lock given back.
    #[must_use]
    pub const fn keeps_opening(self) -> bool {
        matches!(self, Self::Unavailable | Self::Unknown | Self::TooLarge)
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who holds a lock, as far as a store can tell. Advisory: nothing is decided by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The holding process in the store's words, such as `pid 4711 on web-3`.
    pub process: String,
    /// When the lock was taken, by the clock of the holder.
    pub since: SystemTime,
}

impl Holder {
    /// Names this process as the holder, from now on.
    #[must_use]
    pub fn this_process(since: SystemTime) -> Self {
        Self { process: format!("pid {}", std::process::id()), since }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = SystemTime::now().duration_since(self.since).unwrap_or(Duration::ZERO);
        write!(f, "{} for {:.1} s", self.process, held.as_secs_f64())
    }
}

/// An operation on a session that did not succeed: a kind, the operation, the fact, and the cause where there is one.
///
/// The text never holds an id, a payload or a password. It does not repeat the cause: that is [`source`](StdError::source).
/// A clone shares the cause: what fails for many at once is told to each.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    message: Cow<'static, str>,
    holder: Option<Holder>,
    keys: Vec<String>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Makes an error of `kind` for `operation` (a verb: `open`, `save`); the message states the fact and the limit or
    /// the cure, in lower case and without a full stop.
    pub fn new(kind: ErrorKind, operation: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner { kind, operation, message: message.into(), holder: None, keys: Vec::new(), source: None }))
    }

    /// Adds the cause, to be read through [`source`](StdError::source).
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(Arc::from(source.into()));
        self
    }

    /// Adds who holds the lock.
    #[must_use]
    pub fn with_holder(mut self, holder: Option<Holder>) -> Self {
        self.0.holder = holder;
        self
    }

    /// Adds the keys that are in conflict.
    #[must_use]
    pub fn with_keys(mut self, keys: Vec<String>) -> Self {
        self.0.keys = keys;
        self
    }

    /// Returns the same error under another kind, for a layer that knows more than the handler below it.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// Returns what the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the operation that failed.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// Returns who has the lock, and since when, where that can be known.
    #[must_use]
    pub fn holder(&self) -> Option<&Holder> {
        self.0.holder.as_ref()
    }

    /// Returns the keys of the session that are in conflict; empty if that is not what went wrong.
    #[must_use]
    pub fn keys(&self) -> &[String] {
        &self.0.keys
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.operation, self.0.message)?;
        if let Some(holder) = &self.0.holder {
            write!(f, ", held by {holder}")?;
        }
        if !self.0.keys.is_empty() {
            write!(f, ": ")?;
            for (n, key) in self.0.keys.iter().enumerate() {
                let comma = if n == 0 { "" } else { ", " };
                write!(f, "{comma}{}", key.escape_debug())?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self, self.0.kind)?;
        if let Some(source) = &self.0.source {
            write!(f, ", caused by: {source}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_is_printed_once_and_keys_are_escaped() {
        let error = Error::new(ErrorKind::Conflict, "save", "changed by another request")
            .with_keys(vec!["cart".into(), "a\u{1b}[2J".into()])
            .with_source("socket closed");
        assert_eq!(error.to_string(), "save: changed by another request: cart, a\\u{1b}[2J");
        assert_eq!(error.source().expect("a source was given").to_string(), "socket closed");
    }

    #[test]
    fn an_error_is_one_word_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
