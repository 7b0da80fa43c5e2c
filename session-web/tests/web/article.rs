//! The case of the article: request 1 works for 20 units, 2 for 30, 3 for 25, and request 4, which needs no time at all, arrives
//! with them. How long does it wait?

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::extract::Path;
use axum::routing::post;
use session_web::{Mode, Result, Session, SessionLayer, SessionView};
use tokio::task::JoinSet;

use super::support::*;

const UNIT: Duration = Duration::from_millis(10);
const WORK: [u32; 3] = [20, 30, 25];

fn work(units: u32) -> tokio::time::Sleep {
    tokio::time::sleep(UNIT * units)
}

async fn add(session: &Session, key: &str) -> Result<()> {
    session.update_key(key, |n: Option<u32>| n.unwrap_or(0) + 1).await
}

/// As PHP does it: locked from the first touch to the end.
async fn exclusive(session: Session, units: u32) -> Result<()> {
    add(&session, "n").await?;
    work(units).await;
    Ok(())
}

/// Writes, works without the lock, and writes again.
async fn early_release(session: Session, units: u32) -> Result<()> {
    add(&session, "n").await?;
    let view = session.release().await?;
    work(units).await;
    add(&view.reopen().await?, "done").await
}

async fn view(view: SessionView, units: u32) -> Result<()> {
    view.get::<u32>("n").await?;
    work(units).await;
    Ok(())
}

async fn merge(session: Session, units: u32) -> Result<()> {
    let session = session.with(Mode::merge());
    add(&session, "n").await?;
    work(units).await;
    Ok(())
}

/// Returns for how long request 4 waited, how many of the others had done their work before it was over, and what is in the session
/// afterwards. The lock is given back before a response is sent, so request 4 may be answered before a client has read what came before.
async fn measure(strategy: &str) -> (Duration, usize, u32) {
    let (arrived, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let work = {
        let (arrived, over) = (arrived.clone(), over.clone());
        async move |Path((strategy, units)): Path<(String, u32)>, session: Session, look: SessionView| -> Result<()> {
            arrived.fetch_add(1, Ordering::SeqCst);
            let done = match &*strategy {
                "exclusive" => exclusive(session, units).await,
                "early release" => early_release(session, units).await,
                "view" => view(look, units).await,
                _ => merge(session, units).await,
            };
            over.fetch_add(1, Ordering::SeqCst);
            done
        }
    };
    let sessions = sessions();
    let url = serve(pages().route("/{strategy}/{units}", post(work)).layer(SessionLayer::new(sessions.clone()))).await;
    let browser = browser();
    post_ok(&browser, format!("{url}/count")).await;
    let mut others = JoinSet::new();
    for (n, units) in WORK.into_iter().enumerate() {
        let request = browser.post(format!("{url}/{strategy}/{units}")).send();
        others.spawn(async move { assert_eq!(request.await.unwrap().status(), 200) });
        while arrived.load(Ordering::SeqCst) <= n {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let began = Instant::now();
    post_ok(&browser, format!("{url}/count")).await;
    let (waited, before) = (began.elapsed(), over.load(Ordering::SeqCst));
    while let Some(other) = others.join_next().await {
        other.unwrap();
    }
    assert_eq!(sessions.in_use(), (0, 0));
    (waited, before, text(&browser, format!("{url}/view")).await.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn request_4_waits_for_all_of_them_under_the_lock_and_for_none_of_them_otherwise() {
    let all: u32 = WORK.iter().sum();
    for (strategy, written) in [("exclusive", 5), ("early release", 5), ("view", 2), ("merge", 5)] {
        let (waited, before, n) = measure(strategy).await;
        println!(
            "{strategy}: request 4 waited {:.1} units, {before} were over before it",
            waited.as_secs_f64() / UNIT.as_secs_f64()
        );
        // Nothing that was written is lost, however it was locked.
        assert_eq!(n, written, "{strategy}");
        match strategy {
            // What it waited before the clock started is the little that the others needed to arrive.
            "exclusive" => assert!(before == WORK.len() && waited + UNIT * 10 >= UNIT * all, "{before} {waited:?}"),
            _ => assert_eq!(before, 0, "{strategy}"),
        }
    }
}
