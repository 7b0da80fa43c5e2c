//! How a command can end other than well, and which exit status that is.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;

use session_core::{Error, ErrorKind};

use crate::output::escape;

/// What stopped a command.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The answer is "no": it has been told already, or the text says it.
    No(Option<String>),
    /// What was asked for cannot be meant.
    Usage(String),
    /// The store, or the session layer, refused.
    Store(Error),
    /// This machine refused: a directory, a child process.
    Local(String, io::Error),
    /// Whoever read our output has gone.
    PipeClosed,
    /// A signal told us to end.
    Signal(u8),
}

impl Failure {
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    pub(crate) fn no(text: impl Into<String>) -> Self {
        Self::No(Some(text.into()))
    }

    /// For `map_err`: says what was being done.
    pub(crate) fn local(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        |error| Self::Local(what, error)
    }

    pub(crate) fn status(&self) -> u8 {
        match self {
            Self::PipeClosed => 0,
            // As shells count.
            Self::Signal(number) => 128 + number,
            Self::No(_) => 1,
            Self::Usage(_) | Self::Local(..) => 2,
            Self::Store(error) => match error.kind() {
                ErrorKind::Config | ErrorKind::Unsupported => 2,
                ErrorKind::Unavailable | ErrorKind::Unknown | ErrorKind::Unexpected => 3,
                _ => 1,
            },
        }
    }

    /// Returns the line for stderr, each cause once; `None` if there is nothing left to say.
    pub(crate) fn text(&self) -> Option<String> {
        match self {
            Self::PipeClosed | Self::Signal(_) | Self::No(None) => None,
            Self::No(Some(text)) | Self::Usage(text) => Some(escape(text)),
            Self::Store(error) => Some(chain(error)),
            Self::Local(what, error) => Some(escape(&format!("{what}: {error}"))),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

/// The errors of writing to stdout; any other error of this kind names what it was about, with [`Failure::local`].
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::PipeClosed
        } else {
            Self::Local("write to stdout".into(), error)
        }
    }
}

/// The error and its causes, without those whose text has been said already.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            let _ = write!(text, ": {more}");
        }
        cause = error.source();
    }
    escape(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_said_once_and_controls_are_escaped() {
        let error = Error::new(ErrorKind::Unavailable, "open", "the store did not answer")
            .with_source(io::Error::other("socket\u{1b}[2Jclosed"));
        assert_eq!(Failure::from(error).text().unwrap(), "open: the store did not answer: socket\\u{1b}[2Jclosed");
        let error = Error::new(ErrorKind::Config, "open", "disk full").with_source(io::Error::other("disk full"));
        assert_eq!(Failure::from(error).text().unwrap(), "open: disk full");
    }

    #[test]
    fn a_kind_decides_the_exit_status() {
        let status = |kind| Failure::from(Error::new(kind, "open", "x")).status();
        assert_eq!(status(ErrorKind::LockTimeout), 1);
        assert_eq!(status(ErrorKind::Config), 2);
        assert_eq!(status(ErrorKind::Unavailable), 3);
        assert_eq!(status(ErrorKind::Unknown), 3);
        assert_eq!(Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).status(), 0);
    }
}
