//! The stores that the lab offers, and whether they answer.
//!
//! Nothing here runs anything in them. A DSN is shown without its login; the page never sees more of it than that.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use session_core::{Dsn, Error, ErrorKind, Result, SessionHandler, Sessions};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::output::escape;
use crate::store::{FileDsn, redact};

/// How long a store may take to answer before the lab goes on without it.
const PATIENCE: Duration = Duration::from_secs(2);

/// More than all requests of a run can take, one after the other.
const WAIT: Duration = Duration::from_secs(120);

/// Sessions of the lab are destroyed when they are done with; those of a lab that was killed end soon.
const TTL: Duration = Duration::from_secs(300);

/// One store.
#[derive(Debug)]
pub(super) struct Backend {
    /// What the page and scripts call it.
    pub(super) name: String,
    label: String,
    dsn: String,
    opened: Mutex<Option<Sessions>>,
}

/// A store as the page shows it.
#[derive(Debug, Serialize)]
pub(super) struct Offer {
    name: String,
    label: String,
    answers: bool,
}

impl Backend {
    /// Describes the stores of `dsns`; none of them is opened.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if one is not a DSN.
    pub(super) fn named(dsns: &[String]) -> Result<Vec<Self>> {
        let mut backends: Vec<Self> = Vec::new();
        for dsn in dsns {
            let scheme = Dsn::parse(dsn)?.scheme().to_owned();
            let again = backends
                .iter()
                .filter(|other| other.name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-') == scheme);
            let name = match again.count() {
                0 => scheme,
                n => format!("{scheme}-{}", n + 1),
            };
            backends.push(Self::new(name, escape(&redact(dsn)), dsn.clone()));
        }
        Ok(backends)
    }

    /// What is offered to somebody who has named no store: what needs no server, in a directory that will be removed.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) if the directory's name is not UTF-8.
    pub(super) fn of_our_own(directory: &Path) -> Result<Vec<Self>> {
        // Nothing in there outlives this process, so there is nothing to wait for a disk for.
        let files = format!("{}?durability=none", FileDsn::plain().at(&directory.join("files"))?);
        let sqlite = FileDsn::plain().at(&directory.join("sessions.db"))?;
        let sqlite = format!("sqlite{}?create=on&durability=none", sqlite.trim_start_matches("file"));
        let one = |name: &str, label: &str, dsn| Self::new(name.into(), label.into(), dsn);
        Ok(vec![
            one("file", "Files, in a temporary directory", files),
            one("sqlite", "SQLite, in a temporary directory", sqlite),
            one("memory", "Memory of this process", "memory://".into()),
        ])
    }

    fn new(name: String, label: String, dsn: String) -> Self {
        Self { name, label, dsn, opened: Mutex::new(None) }
    }

    /// Returns the sessions of this store. One that did not answer before is asked again.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if it does not answer in time; otherwise those of [`sessionkit::connect`].
    pub(super) async fn sessions(&self) -> Result<Sessions> {
        // Held across the wait, so that a store that is away is asked by one and not by all.
        let mut opened = self.opened.lock().await;
        if let Some(sessions) = &*opened {
            return Ok(sessions.clone());
        }
        let late = |_| Error::new(ErrorKind::Unavailable, "open", "the store did not answer within 2 s");
        let sessions = timeout(PATIENCE, self.connect()).await.map_err(late)??;
        Ok(opened.insert(sessions).clone())
    }

    async fn connect(&self) -> Result<Sessions> {
        // The layers of the DSN, and in front of them what a crowd needs: room for everybody in the queue, and time to wait.
        let handler = Arc::clone(sessionkit::connect(&self.dsn).await?.handler());
        let builder = Sessions::builder(handler).options_from(&Dsn::parse(&self.dsn)?)?;
        builder.locking(true).queue(4 * super::plan::MOST_REQUESTS).wait(WAIT).ttl(TTL).build()
    }

    /// Returns the store itself, for whoever lists it, with the layers that its sessions have.
    pub(super) async fn handler(&self) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::clone(self.sessions().await?.handler()))
    }

    pub(super) async fn offer(&self) -> Offer {
        let answers = self.sessions().await.is_ok();
        Offer { name: self.name.clone(), label: self.label.clone(), answers }
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_store_has_a_name_of_its_own_and_none_shows_a_login() {
        let dsns = ["redis://me:hunter2@h/0", "redis://h/1", "memory://", "redis://h/2"].map(String::from);
        let backends = Backend::named(&dsns).unwrap();
        let names: Vec<_> = backends.iter().map(|backend| backend.name.as_str()).collect();
        assert_eq!(names, ["redis", "redis-2", "memory", "redis-3"]);
        assert_eq!(backends[0].label(), "redis://***@h/0");
        assert!(Backend::named(&["nonsense".into()]).is_err());
    }

    #[tokio::test]
    async fn what_needs_no_server_answers_and_a_server_that_is_away_does_not() {
        let directory = tempfile::tempdir().unwrap();
        for backend in Backend::of_our_own(directory.path()).unwrap() {
            assert!(backend.offer().await.answers, "{}", backend.name);
        }
        let away = Backend::named(&["redis://:hunter2@127.0.0.1:1/0".into()]).unwrap();
        assert!(!away[0].offer().await.answers);
        assert_eq!(away[0].sessions().await.unwrap_err().kind(), ErrorKind::Unavailable);
    }
}
