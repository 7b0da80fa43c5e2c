//! Whole requests: our layer around an axum application, which visitors call as those of the peers call theirs.
//!
//! Each visitor has a session of his own, and each request reads a number in it and writes the next.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::post;
use session_core::{Error, ErrorKind};
use sessionkit::Sessions;
use sessionkit::web::{Result, Session, SessionLayer};
use tokio::sync::Mutex;

use crate::bench::Round;
use crate::bench::http::{Served, Visitor};
use crate::bench::ours::{lost, run};
use crate::failure::Failure;

/// An application with our layer, and its visitors.
pub(crate) struct WebCycle {
    visitors: Vec<Arc<Mutex<Visitor>>>,
    _served: Served,
}

impl WebCycle {
    pub(crate) async fn prepare(sessions: Sessions, tasks: usize, payload: usize) -> Result<Self, Failure> {
        let begin = async move |session: Session| -> Result<()> {
            session.insert("payload", &"x".repeat(payload)).await?;
            session.insert("n", &0_u64).await
        };
        let count = async |session: Session| -> Result<String> {
            let n: u64 = session.get("n").await?.ok_or_else(lost)?;
            session.insert("n", &(n + 1)).await?;
            Ok(n.to_string())
        };
        let router = Router::new().route("/begin", post(begin)).route("/count", post(count));
        let served = Served::start(router.layer(SessionLayer::new(sessions))).await?;
        let mut visitors = Vec::new();
        for _ in 0..tasks {
            visitors.push(Arc::new(Mutex::new(Visitor::welcome(&served).await?)));
        }
        Ok(Self { visitors, _served: served })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.visitors.len(), length, |task, mut laps| {
            let visitor = self.visitors[task].clone();
            async move {
                let mut visitor = visitor.lock().await;
                while laps.next().await {
                    visitor.count().await.map_err(|error| refused(&error))?;
                }
                Ok(laps.round())
            }
        })
        .await
    }
}

fn refused(error: &io::Error) -> Error {
    Error::new(ErrorKind::Unexpected, "bench", error.to_string())
}
