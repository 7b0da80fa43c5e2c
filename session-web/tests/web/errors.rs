//! What a visitor gets when his session cannot be had or kept, and how an application replaces it.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::Response;
use axum::routing::{get, post};
use reqwest::Client;
use reqwest::header::{CACHE_CONTROL, COOKIE, RETRY_AFTER, SET_COOKIE, VARY};
use session_core::{Error, ErrorKind, OpenRequest, OpenSession, SessionHandler, SessionId, Sessions, async_trait};
use session_web::{Answer, Mode, Result, Session, SessionLayer};
use tokio::sync::Notify;

use super::support::*;

/// A store that can be switched off.
#[derive(Clone, Debug)]
struct Switch {
    inner: Counting,
    off: Arc<AtomicBool>,
}

#[async_trait]
impl SessionHandler for Switch {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> session_core::Result<Box<dyn OpenSession>> {
        match self.off.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Unavailable, "open", "switched off, at secret.example:6379")),
            false => self.inner.open(id, request).await,
        }
    }

    async fn gc(&self, limit: NonZeroU32) -> session_core::Result<u64> {
        self.inner.gc(limit).await
    }
}

/// The sessions of a store that can be switched off, and the switch.
fn switched() -> (Sessions, Arc<AtomicBool>) {
    let off = Arc::new(AtomicBool::new(false));
    let handler = Switch { inner: Counting::new(), off: off.clone() };
    (Sessions::new(Arc::new(handler)).unwrap(), off)
}

async fn visitor(url: &str) -> Client {
    let browser = browser();
    post_ok(&browser, format!("{url}/count")).await;
    browser
}

/// Insists on a response that says how to go on, and nothing about the inside.
async fn refused(response: reqwest::Response, status: u16, retry: Option<&str>) {
    assert_eq!(response.status(), status);
    assert_eq!(response.headers().get(RETRY_AFTER).map(|value| value.to_str().unwrap()), retry);
    assert_eq!(values(response.headers(), CACHE_CONTROL), ["no-store"]);
    assert_eq!(values(response.headers(), VARY), ["Cookie"]);
    assert!(response.headers().get(SET_COOKIE).is_none());
    let text = response.text().await.unwrap();
    assert!(text.ends_with(".\n") && text.len() < 80 && !text.contains("secret"), "{text}");
}

#[tokio::test]
async fn a_lock_that_is_not_free_in_time_is_503_and_a_full_queue_is_429() {
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
    let sessions = Counting::new().builder().wait(Duration::from_millis(300)).queue(1).build().unwrap();
    let url = serve(pages().route("/hold", post(hold)).layer(SessionLayer::new(sessions.clone()))).await;
    let browser = visitor(&url).await;
    let holder = tokio::spawn(browser.post(format!("{url}/hold")).send());
    inside.notified().await;
    let (first, second) = tokio::join!(browser.get(format!("{url}/read")).send(), browser.get(format!("{url}/read")).send());
    let (mut first, mut second) = (first.unwrap(), second.unwrap());
    if first.status() == 429 {
        std::mem::swap(&mut first, &mut second);
    }
    refused(first, 503, Some("1")).await;
    refused(second, 429, Some("1")).await;
    // Neither a page that reads nor one that needs no session waits.
    assert_eq!(text(&browser, format!("{url}/view")).await, "1");
    assert_eq!(text(&browser, format!("{url}/untouched")).await, "untouched");
    go_on.notify_one();
    assert_eq!(holder.await.unwrap().unwrap().status(), 200);
    assert_eq!(post_ok(&browser, format!("{url}/count")).await, "6");
    assert_eq!(sessions.in_use(), (0, 0));
}

#[tokio::test]
async fn a_store_that_is_down_is_503_where_it_is_needed_and_nowhere_else() {
    let (sessions, off) = switched();
    let url = serve(app(SessionLayer::new(sessions))).await;
    let browser = visitor(&url).await;
    off.store(true, Ordering::SeqCst);
    for path in ["view", "read", "user"] {
        refused(browser.get(format!("{url}/{path}")).send().await.unwrap(), 503, Some("5")).await;
    }
    for path in ["count", "login", "logout", "rotate"] {
        refused(browser.post(format!("{url}/{path}")).send().await.unwrap(), 503, Some("5")).await;
    }
    // A new visitor's handler runs; it is his save that fails, and he is not told that it did not.
    refused(bare().post(format!("{url}/count")).send().await.unwrap(), 503, Some("5")).await;
    for path in ["untouched", "asked"] {
        assert_eq!(text(&browser, format!("{url}/{path}")).await, path);
    }
    assert_eq!(text(&bare(), format!("{url}/read")).await, "0", "there is nothing to look up");
    off.store(false, Ordering::SeqCst);
    assert_eq!(post_ok(&browser, format!("{url}/count")).await, "2");
}

#[tokio::test]
async fn the_application_may_go_on_without_a_session() {
    let (sessions, off) = switched();
    let layer = SessionLayer::new(sessions).on_error(|error| match error.kind() {
        ErrorKind::Unavailable => Answer::GoOn,
        _ => error.into(),
    });
    let url = serve(app(layer)).await;
    let browser = visitor(&url).await;
    off.store(true, Ordering::SeqCst);
    // Empty, and what is put in is forgotten: also where the handler began before it was noticed.
    for client in [&browser, &bare()] {
        let response = client.post(format!("{url}/count")).send().await.unwrap();
        assert_eq!((response.status().as_u16(), response.headers().get(SET_COOKIE)), (200, None));
        assert_eq!(response.text().await.unwrap(), "1");
        assert_eq!(text(client, format!("{url}/view")).await, "0");
    }
    off.store(false, Ordering::SeqCst);
    assert_eq!(text(&browser, format!("{url}/view")).await, "1");
    // A logout that did not happen is not made to look like one.
    off.store(true, Ordering::SeqCst);
    assert_eq!(browser.post(format!("{url}/logout")).send().await.unwrap().status(), 503);
}

#[tokio::test]
async fn the_application_may_answer_itself() {
    let (sessions, off) = switched();
    let layer = SessionLayer::new(sessions).on_error(|error| {
        let page = Bytes::from(format!("<h1>{}</h1>", error.kind()));
        Answer::Respond(Response::builder().status(418).header("content-type", "text/html").body(page).unwrap())
    });
    let url = serve(app(layer)).await;
    let browser = visitor(&url).await;
    off.store(true, Ordering::SeqCst);
    for client in [&browser, &bare()] {
        let response = client.post(format!("{url}/count")).send().await.unwrap();
        assert_eq!((response.status().as_u16(), &response.headers()["content-type"]), (418, &"text/html".parse().unwrap()));
        assert_eq!(response.text().await.unwrap(), "<h1>unavailable</h1>");
    }
}

#[tokio::test]
async fn a_save_that_is_refused_is_said_and_not_passed_over() {
    let other = sessions();
    let change = async |sessions: Sessions, session: Session, destroy: bool| -> Result<&'static str> {
        session.insert("n", &10).await?;
        let id = session.id().await?.expect("it is stored");
        if destroy {
            sessions.destroy(&id).await?;
        } else {
            let mut faster = sessions.merge(&id).await?;
            faster.insert("n", &20)?;
            faster.close().await?;
        }
        Ok("saved")
    };
    let route = |destroy: bool| {
        let sessions = other.clone();
        post(async move |session: Session| change(sessions, session, destroy).await)
    };
    let router = pages().route("/gone", route(true)).route("/conflict", route(false).layer(Mode::merge()));
    let url = serve(router.layer(SessionLayer::new(other.clone()))).await;
    let browser = visitor(&url).await;
    refused(browser.post(format!("{url}/conflict")).send().await.unwrap(), 409, None).await;
    assert_eq!(text(&browser, format!("{url}/view")).await, "20");
    refused(browser.post(format!("{url}/gone")).send().await.unwrap(), 409, None).await;
    assert_eq!(text(&browser, format!("{url}/view")).await, "0");
    assert_eq!(post_ok(&browser, format!("{url}/count")).await, "1");
}

#[tokio::test]
async fn a_request_with_an_id_that_a_login_has_retired_reads_nothing_and_is_refused_what_it_writes() {
    let url = serve(app(SessionLayer::new(sessions()))).await;
    let (browser, old) = (browser(), begin(&url).await);
    let cookie = format!("{NAME}={}", old.as_str());
    let login = browser.post(format!("{url}/login")).header(COOKIE, &cookie).send().await.unwrap();
    assert_ne!(id_in(&set_cookie(login.headers())), old);
    for path in ["read", "view", "user"] {
        let response = bare().get(format!("{url}/{path}")).header(COOKIE, &cookie).send().await.unwrap();
        assert!(response.headers().get(SET_COOKIE).is_none());
        assert!(["0", "nobody"].contains(&response.text().await.unwrap().as_str()), "{path}");
    }
    refused(bare().post(format!("{url}/count")).header(COOKIE, &cookie).send().await.unwrap(), 409, None).await;
    assert_eq!(text(&browser, format!("{url}/user")).await, "ada");
}

#[tokio::test]
async fn a_route_without_a_layer_is_the_servers_fault() {
    let url = serve(pages()).await;
    for path in ["asked", "view", "read"] {
        assert_eq!(bare().get(format!("{url}/{path}")).send().await.unwrap().status(), 500);
    }
    let url = serve(axum::Router::new().route("/", get(async || "page")).layer(Mode::merge())).await;
    assert_eq!(text(&bare(), url).await, "page");
}
