//! How a route locks: each in its own way, for as long as it says.

use std::convert::Infallible;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::routing::{get, post};
use session_core::ErrorKind;
use session_web::{Mode, Result, Session, SessionLayer};
use tokio::sync::Notify;

use super::support::*;

async fn read(session: Session) -> Result<String> {
    Ok(session.get("n").await?.unwrap_or(0_u32).to_string())
}

#[tokio::test]
async fn a_route_waits_as_long_as_it_says_and_a_handler_may_say_otherwise() {
    let (inside, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let hold = {
        let (inside, go_on) = (inside.clone(), go_on.clone());
        async move |session: Session| -> Result<()> {
            session.insert("n", &5).await?;
            inside.notify_one();
            go_on.notified().await;
            Ok(())
        }
    };
    let hasty = Mode::exclusive().wait(Duration::ZERO);
    let router = pages()
        .route("/hold", post(hold))
        .route("/hasty", get(read).layer(hasty))
        .route("/reader", get(read).layer(Mode::read_only()))
        .route("/merger", get(read).layer(Mode::merge()))
        .route("/inner", get(read).layer::<_, Infallible>(hasty).layer(Mode::merge()))
        .route("/own", get(async move |session: Session| read(session.with(hasty)).await).layer(Mode::merge()));
    let sessions = sessions();
    let url = serve(router.layer(SessionLayer::new(sessions.clone()))).await;
    let browser = browser();
    post_ok(&browser, format!("{url}/count")).await;
    let holder = tokio::spawn(browser.post(format!("{url}/hold")).send());
    inside.notified().await;
    for (path, status) in [("hasty", 503), ("reader", 200), ("merger", 200), ("inner", 503), ("own", 503)] {
        let response = browser.get(format!("{url}/{path}")).send().await.unwrap();
        assert_eq!(response.status(), status, "{path}");
        if status == 200 {
            assert_eq!(response.text().await.unwrap(), "1", "what is stored, not what the holder has in mind");
        }
    }
    let waiter = tokio::spawn(browser.get(format!("{url}/read")).send());
    tokio::time::sleep(Duration::from_millis(20)).await;
    go_on.notify_one();
    assert_eq!(waiter.await.unwrap().unwrap().text().await.unwrap(), "5");
    assert_eq!(holder.await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn a_route_that_only_reads_takes_no_lock_and_refuses_to_write() {
    let write = async |session: Session| -> Result<String> {
        let found: u32 = session.get("n").await?.unwrap_or(0);
        let keys = session.keys().await?.join(" ");
        let known = session.id().await?.is_some() && session.contains("n").await? && !session.is_retired().await?;
        let error = session.insert("n", &2).await.expect_err("it only reads");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        Ok(format!("{found} {keys} {known}"))
    };
    let store = Counting::new();
    let router = pages().route("/look", get(write)).layer(SessionLayer::new(store.sessions()).mode(Mode::read_only()));
    let id = {
        let sessions = store.sessions();
        let mut session = sessions.create().unwrap();
        session.insert("n", &1).unwrap();
        session.close().await.unwrap().unwrap()
    };
    let url = serve(router).await;
    store.count();
    let request = bare().get(format!("{url}/look")).header("cookie", format!("{NAME}={}", id.as_str()));
    assert_eq!(request.send().await.unwrap().text().await.unwrap(), "1 n true");
    assert_eq!(store.count(), 1);
    let refused = bare().post(format!("{url}/count")).header("cookie", format!("{NAME}={}", id.as_str()));
    assert_eq!(refused.send().await.unwrap().status(), 500);
}

#[tokio::test]
async fn a_route_has_a_lease_of_its_own() {
    let store = Counting::new();
    let page = async |session: Session| -> Result<String> {
        session.insert("n", &1).await?;
        session.save().await?;
        let handler = session.sessions().handler().clone();
        let locks = handler.admin().expect("it can").locks(NonZeroU32::MAX).await?;
        let left = locks.first().and_then(|lock| lock.lease_left).unwrap_or_default();
        Ok(left.as_secs().to_string())
    };
    let lease = Mode::exclusive().lease(Duration::from_secs(600));
    let router = axum::Router::new().route("/usual", post(page)).route("/long", post(page).layer(lease));
    let url = serve(router.layer(SessionLayer::new(store.sessions()))).await;
    for (path, range) in [("usual", 1..31), ("long", 500..601)] {
        let browser = browser();
        for _ in 0..2 {
            let left: u64 = post_ok(&browser, format!("{url}/{path}")).await.parse().unwrap();
            assert!(range.contains(&left), "{path}: {left} s");
        }
    }
}

#[tokio::test]
async fn a_save_in_the_middle_counts_and_keeps_the_lock() {
    let (inside, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let page = {
        let (inside, go_on) = (inside.clone(), go_on.clone());
        async move |session: Session| -> Result<()> {
            session.insert("n", &10).await?;
            session.save().await?;
            inside.notify_one();
            go_on.notified().await;
            session.insert("n", &11).await
        }
    };
    let sessions = sessions();
    let url = serve(pages().route("/save", post(page)).layer(SessionLayer::new(sessions.clone()))).await;
    let browser = browser();
    post_ok(&browser, format!("{url}/count")).await;
    let saving = tokio::spawn(browser.post(format!("{url}/save")).send());
    inside.notified().await;
    assert_eq!(text(&browser, format!("{url}/view")).await, "10");
    let began = Instant::now();
    let next = tokio::spawn(browser.post(format!("{url}/count")).send());
    tokio::time::sleep(Duration::from_millis(50)).await;
    go_on.notify_one();
    assert_eq!(saving.await.unwrap().unwrap().status(), 200);
    assert_eq!(next.await.unwrap().unwrap().text().await.unwrap(), "12");
    assert!(began.elapsed() >= Duration::from_millis(50));
}
