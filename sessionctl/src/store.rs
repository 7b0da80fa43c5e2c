//! From words on the command line to a store, and to a place of its own inside one.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use session_core::{Dsn, Error, ErrorKind, SessionAdmin, SessionHandler, SessionId};
use sessionkit::Sessions;
use tempfile::TempDir;

use crate::failure::Failure;

/// Reads an id, without repeating a wrong one: it may be a right one with a letter missing.
pub(crate) fn session_id(text: &str) -> Result<SessionId, Failure> {
    SessionId::parse(text).ok_or_else(|| {
        Failure::usage(format!(
            "ID is not a session id: {} characters, expected {} to {} of A-Z a-z 0-9 , -",
            text.chars().count(),
            SessionId::MIN_LEN,
            SessionId::MAX_LEN
        ))
    })
}

pub(crate) async fn connect(dsn: &str) -> Result<Sessions, Failure> {
    Ok(sessionkit::connect(dsn).await?)
}

/// Returns what administrators may do with the store itself, below all layers.
pub(crate) fn admin(handler: &Arc<dyn SessionHandler>) -> Result<&dyn SessionAdmin, Failure> {
    handler.admin().ok_or_else(|| Failure::usage("this store cannot be listed"))
}

/// What kind of store a DSN names, where a measurement or a case needs a place of its own in it.
#[derive(Debug)]
pub(crate) enum Place {
    /// Every connection is a store of its own already.
    Memory,
    /// A fresh directory inside the given one, removed when this is dropped.
    Directory(TempDir, FileDsn),
}

impl Place {
    /// Makes a place in the store of `dsn`.
    pub(crate) async fn new(dsn: &str, purpose: &str) -> Result<Self, Failure> {
        // Opened once as it stands, so that a mistake in it is reported as what it is.
        sessionkit::handler(dsn).await?;
        let parsed = Dsn::parse(dsn)?;
        if parsed.scheme() == "memory" {
            return Ok(Self::Memory);
        }
        let directory = tempfile::Builder::new()
            .prefix(&format!(".sessionctl-{purpose}-"))
            .tempdir_in(parsed.path())
            .map_err(Failure::local("make a directory of our own in the store"))?;
        let query = dsn.split_once('?').map(|(_, query)| query.to_owned());
        Ok(Self::Directory(directory, FileDsn { query }))
    }
}

/// The options of a `file://` DSN, to be used with other directories.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct FileDsn {
    query: Option<String>,
}

impl FileDsn {
    /// Returns the DSN of `directory` with these options.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if its name is not UTF-8.
    pub(crate) fn at(&self, directory: &Path) -> session_core::Result<String> {
        let not_text = || Error::new(ErrorKind::Config, "dsn", "the name of the directory is not UTF-8");
        let path = directory.to_str().ok_or_else(not_text)?;
        let mut dsn = String::from("file://");
        for byte in path.bytes() {
            match byte {
                b'/' | b'-' | b'_' | b'.' | b'~' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => dsn.push(byte.into()),
                _ => dsn.push_str(&format!("%{byte:02X}")),
            }
        }
        if let Some(query) = &self.query {
            dsn.push('?');
            dsn.push_str(query);
        }
        Ok(dsn)
    }
}

/// Takes user and password out of whatever in `text` looks like a DSN.
pub(crate) fn redact(text: &str) -> String {
    let Some(start) = text.find("://").map(|place| place + 3) else { return text.into() };
    // An @ that should have been written as %40 must not show what stands before it, so the last one counts.
    match text[start..].rfind('@') {
        Some(at) => format!("{}***{}", &text[..start], &text[start + at..]),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_directory_keeps_the_options_and_survives_odd_names() {
        let dsn = FileDsn { query: Some("depth=2&prefix=a%26".into()) }.at(Path::new("/tmp/a b?é#%")).unwrap();
        let parsed = Dsn::parse(&dsn).unwrap();
        assert_eq!(
            (parsed.path(), parsed.option("depth"), parsed.option("prefix")),
            ("/tmp/a b?é#%", Some("2"), Some("a&"))
        );
    }

    #[test]
    fn nothing_before_an_at_sign_is_shown() {
        assert_eq!(redact("redis://me:p@ss@h/0?lease=1"), "redis://***@h/0?lease=1");
        assert_eq!(redact("--x=redis://:pw@h"), "--x=redis://***@h");
        assert_eq!(redact("file:///x"), "file:///x");
    }
}
