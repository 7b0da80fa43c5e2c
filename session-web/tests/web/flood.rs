//! One cookie, ten thousand requests at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::routing::post;
use reqwest::header::{COOKIE, RETRY_AFTER};
use session_core::SessionId;
use session_web::{Result, Session, SessionLayer};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::ServiceExt;

use super::support::*;

const REQUESTS: usize = 10_000;
/// The default of `Sessions`.
const QUEUE: usize = 64;

/// Holds the session until a permit comes, and counts how many are inside of a handler at once.
fn held(gate: &Arc<Semaphore>) -> Router {
    let gate = gate.clone();
    let page = async move |session: Session| -> Result<()> {
        session.update_key("n", |n: Option<usize>| n.unwrap_or(0) + 1).await?;
        gate.acquire().await.expect("nobody closes it").forget();
        Ok(())
    };
    pages().route("/hold", post(page))
}

fn memory() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn request(path: &str, id: &SessionId) -> Request<Body> {
    Request::post(path).header("cookie", format!("{NAME}={}", id.as_str())).body(Body::empty()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_with_one_cookie_leave_room_for_others_and_nothing_behind() {
    let (gate, store) = (Arc::new(Semaphore::new(0)), Counting::new());
    let sessions = store.sessions();
    let router = held(&gate).layer(SessionLayer::new(sessions.clone()));
    let url = serve(router.clone()).await;
    let (flooded, other) = (begin(&url).await, begin(&url).await);
    store.count();
    let before = memory();
    let mut flood = JoinSet::new();
    for _ in 0..REQUESTS {
        flood.spawn(router.clone().oneshot(request("/hold", &flooded)));
    }
    let mut refused = 0;
    while refused < REQUESTS - QUEUE - 1 {
        let response = flood.join_next().await.unwrap().unwrap().unwrap();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS, "nobody has let one go");
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        refused += 1;
    }
    let grown = memory().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    // One went to the store; the others wait in front of it.
    assert_eq!(store.count(), 1);
    println!("{refused} of {REQUESTS} turned away, 1 holds, {QUEUE} wait; memory grew by {} KiB", grown >> 10);

    // Others are served meanwhile, over HTTP, and so are pages of this one that only read.
    for expected in 2..102 {
        let request = bare().post(format!("{url}/count")).header(COOKIE, format!("{NAME}={}", other.as_str()));
        assert_eq!(request.send().await.unwrap().text().await.unwrap(), expected.to_string());
    }
    let seen = bare().get(format!("{url}/view")).header(COOKIE, format!("{NAME}={}", flooded.as_str()));
    assert_eq!(seen.send().await.unwrap().text().await.unwrap(), "1");

    gate.add_permits(REQUESTS);
    while let Some(response) = flood.join_next().await {
        assert_eq!(response.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(sessions.in_use(), (0, 0));
    let n: Option<usize> = sessions.view(&flooded).await.unwrap().get("n").unwrap();
    assert_eq!(n, Some(1 + QUEUE + 1), "every answer that was no refusal counts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_over_http_is_answered_with_429_and_503_and_clears_up() {
    let (gate, store) = (Arc::new(Semaphore::new(0)), Counting::new());
    let sessions = store.builder().queue(8).wait(Duration::from_millis(200)).build().unwrap();
    let url = serve(held(&gate).layer(SessionLayer::new(sessions.clone()))).await;
    let id = begin(&url).await;
    let client = bare();
    let (counts, mut flood) = (Arc::new([const { AtomicUsize::new(0) }; 3]), JoinSet::new());
    for _ in 0..500 {
        let request = client.post(format!("{url}/hold")).header(COOKIE, format!("{NAME}={}", id.as_str()));
        let (counts, gate) = (counts.clone(), gate.clone());
        flood.spawn(async move {
            let response = request.send().await.unwrap();
            let kind = [200, 429, 503].iter().position(|status| response.status() == *status);
            let kind = kind.unwrap_or_else(|| panic!("{}", response.status()));
            assert_eq!(response.headers().get(RETRY_AFTER).is_some(), kind > 0);
            counts[kind].fetch_add(1, Ordering::SeqCst);
            if counts[2].load(Ordering::SeqCst) == 8 {
                gate.add_permits(500);
            }
        });
    }
    while let Some(done) = flood.join_next().await {
        done.unwrap();
    }
    let [good, busy, late] = [0, 1, 2].map(|kind| counts[kind].load(Ordering::SeqCst));
    println!("over HTTP: {good} served, {busy} turned away with 429, {late} with 503");
    assert!(busy > 0 && late >= 8 && good > 0);
    assert_eq!(sessions.in_use(), (0, 0));
    assert_eq!(sessions.view(&id).await.unwrap().get("n").unwrap(), Some(1 + good));
}
