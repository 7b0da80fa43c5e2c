//! Whole requests: our layer around an axum application, called without a socket, as the program of the peers calls theirs.
//!
//! Each visitor has a session of his own, and each request reads a number in it and writes the next.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::routing::post;
use session_core::{Error, ErrorKind};
use sessionkit::Sessions;
use sessionkit::web::{Result, Session, SessionLayer};
use tower::ServiceExt;

use crate::bench::Round;
use crate::bench::ours::{lost, run};
use crate::failure::Failure;

/// An application with our layer, and the cookies of its visitors.
pub(crate) struct WebCycle {
    router: Router,
    cookies: Vec<String>,
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
        let router = router.layer(SessionLayer::new(sessions));
        let mut cookies = Vec::new();
        for _ in 0..tasks {
            cookies.push(send(router.clone(), "/begin", "").await?);
        }
        Ok(Self { router, cookies })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.cookies.len(), length, |task, mut laps| {
            let (router, cookie) = (self.router.clone(), self.cookies[task].clone());
            async move {
                while laps.next().await {
                    send(router.clone(), "/count", &cookie).await?;
                }
                Ok(laps.round())
            }
        })
        .await
    }
}

/// Sends a request and returns the cookie to go on with.
async fn send(router: Router, path: &str, cookie: &str) -> session_core::Result<String> {
    let refused = |message: String| Error::new(ErrorKind::Unexpected, "bench", message);
    let request = Request::post(path).header("cookie", cookie).body(Body::empty());
    let request = request.map_err(|error| refused(error.to_string()))?;
    let response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
    if !response.status().is_success() {
        return Err(refused(format!("a request ended with {}", response.status())));
    }
    let told = response.headers().get("set-cookie").and_then(|told| told.to_str().ok()?.split(';').next());
    let told = told.unwrap_or_default().to_owned();
    axum::body::to_bytes(response.into_body(), 1 << 20).await.map_err(|error| refused(error.to_string()))?;
    Ok(told)
}
