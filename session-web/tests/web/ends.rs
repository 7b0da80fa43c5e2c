//! How a handler may end, and what is then stored, told and locked.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_core::Stream;
use reqwest::Client;
use reqwest::header::SET_COOKIE;
use session_core::{ErrorKind, Sessions};
use session_web::{Changes, Mode, Result, Session, SessionLayer, SessionView};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};

use super::support::*;

/// A browser that has a session with 1 in it.
async fn visitor(url: &str) -> Client {
    let browser = browser();
    assert_eq!(post_ok(&browser, format!("{url}/count")).await, "1");
    browser
}

/// Waits until nobody in this process holds a session.
async fn all_closed(sessions: &Sessions) {
    for _ in 0..500 {
        sessions.shutdown().await;
        if sessions.in_use() == (0, 0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("a lock was left: {:?}", sessions.in_use());
}

#[tokio::test]
async fn ten_rounds_of_release_and_reopen_give_one_cookie_and_the_next_request_none() {
    let rounds = async |session: Session| -> Result<String> {
        let mut session = session;
        for round in 0..10 {
            session.update_key("n", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
            if round % 3 == 0 {
                session.rotate().await?;
            }
            session.save().await?;
            session = session.release().await?.reopen().await?;
        }
        Ok(session.get("n").await?.unwrap_or(0_u32).to_string())
    };
    let router = pages().route("/rounds", post(rounds));
    let url = serve(router.layer(SessionLayer::new(sessions()))).await;
    let browser = browser();
    let mut last = None;
    for expected in ["10", "20"] {
        let response = browser.post(format!("{url}/rounds")).send().await.unwrap();
        let cookie = set_cookie(response.headers());
        assert_ne!(last, Some(cookie.clone()));
        last = Some(cookie);
        assert_eq!(response.text().await.unwrap(), expected);
    }
    for path in ["view", "read", "untouched", "asked"] {
        let response = browser.get(format!("{url}/{path}")).send().await.unwrap();
        assert!(response.headers().get(SET_COOKIE).is_none(), "{path}");
    }
    let response = browser.post(format!("{url}/count")).send().await.unwrap();
    assert!(response.headers().get(SET_COOKIE).is_none(), "a change needs no new cookie");
    assert_eq!(response.text().await.unwrap(), "21");
}

#[tokio::test]
async fn what_was_read_before_a_release_is_not_written_after_it() {
    let page = async |held: Session, other: Session, untouched: Session| -> Result<String> {
        let before: u32 = other.get("n").await?.unwrap_or(0);
        held.insert("m", &before).await?;
        held.release().await?;
        let error = other.insert("n", &(before + 1)).await.expect_err("it may have changed");
        assert_eq!(error.kind(), ErrorKind::Fenced);
        untouched.insert("n", &(before + 10)).await?;
        Ok("".into())
    };
    let url = serve(pages().route("/stale", post(page)).layer(SessionLayer::new(sessions()))).await;
    let browser = visitor(&url).await;
    post_ok(&browser, format!("{url}/stale")).await;
    assert_eq!(text(&browser, format!("{url}/view")).await, "11");
}

/// Changes the session, stages a new id, and then fails in a way that the path names.
fn failing() -> Router {
    let change = async |session: &Session| -> Result<()> {
        session.update_key("n", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
        session.rotate().await
    };
    Router::new()
        .route(
            "/500",
            post(async move |session: Session| -> Result<StatusCode> {
                change(&session).await?;
                Ok(StatusCode::INTERNAL_SERVER_ERROR)
            }),
        )
        .route(
            "/404",
            post(async move |session: Session| -> Result<StatusCode> {
                change(&session).await?;
                Ok(StatusCode::NOT_FOUND)
            }),
        )
        .route(
            "/panic",
            post(async move |session: Session| -> Result<StatusCode> {
                change(&session).await?;
                panic!("on purpose");
            }),
        )
        .route(
            "/saved-panic",
            post(async move |session: Session| -> Result<StatusCode> {
                change(&session).await?;
                session.save().await?;
                change(&session).await?;
                panic!("on purpose");
            }),
        )
}

/// Turns a panic of the handler into a response, inside of the session's layer.
async fn caught(request: axum::extract::Request, next: axum::middleware::Next) -> Response {
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[tokio::test]
async fn a_failed_handler_keeps_or_loses_its_changes_as_the_policy_says_and_never_the_session() {
    type Make = fn(Sessions) -> SessionLayer;
    let layers: [(Make, _); 2] = [
        (SessionLayer::new, [("404", "2"), ("500", "2"), ("panic", "1"), ("saved-panic", "2")]),
        (
            |sessions| SessionLayer::new(sessions).on_server_error(Changes::Discard).on_panic(Changes::Keep),
            [("404", "2"), ("500", "1"), ("panic", "2"), ("saved-panic", "3")],
        ),
    ];
    for (layer, expected) in layers {
        let store = Counting::new();
        let sessions = store.sessions();
        // Caught inside of the layer, where it looks like any other response.
        let inside = pages().merge(failing().layer(axum::middleware::from_fn(caught))).layer(layer(sessions.clone()));
        let bare = pages().merge(failing()).layer(layer(sessions.clone()));
        for (url, answers) in [(serve(inside).await, true), (serve(bare).await, false)] {
            for (path, n) in expected {
                let browser = visitor(&url).await;
                let response = browser.post(format!("{url}/{path}")).send().await;
                assert_eq!(response.is_ok(), answers || !path.contains("panic"), "{path}");
                all_closed(&sessions).await;
                // The lock is free, the session is the visitor's, and nobody has to log in again.
                assert_eq!(text(&browser, format!("{url}/read")).await, n, "{path}, answered: {answers}");
                assert_eq!(post_ok(&browser, format!("{url}/count")).await, (n.parse::<u32>().unwrap() + 1).to_string());
            }
        }
    }
}

#[tokio::test]
async fn a_login_that_ends_in_a_server_error_is_a_login_and_one_that_panics_is_none() {
    let fail = |panics: bool| {
        post(async move |session: Session| -> Result<StatusCode> {
            session.elevate().await?;
            session.insert("user", "ada").await?;
            assert!(!panics, "on purpose");
            Ok(StatusCode::BAD_GATEWAY)
        })
    };
    let router = pages().route("/error", fail(false)).route("/panic", fail(true));
    let url = serve(router.layer(SessionLayer::new(sessions()))).await;
    let browser = visitor(&url).await;
    assert!(browser.post(format!("{url}/panic")).send().await.is_err());
    assert_eq!(text(&browser, format!("{url}/user")).await, "nobody");
    assert_eq!(text(&browser, format!("{url}/read")).await, "1");
    assert_eq!(browser.post(format!("{url}/error")).send().await.unwrap().status(), 502);
    assert_eq!(text(&browser, format!("{url}/user")).await, "ada");
    assert_eq!(text(&browser, format!("{url}/read")).await, "1");
}

#[tokio::test]
async fn a_client_that_hangs_up_in_the_middle_of_a_handler_leaves_no_lock_and_no_change() {
    let (inside, never) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let page = {
        let (inside, never) = (inside.clone(), never.clone());
        async move |session: Session| -> Result<()> {
            session.insert("n", &99).await?;
            inside.notify_one();
            never.notified().await;
            Ok(())
        }
    };
    let sessions = sessions();
    let url = serve(pages().route("/hang", get(page)).layer(SessionLayer::new(sessions.clone()))).await;
    let id = begin(&url).await;
    for _ in 0..20 {
        let mut stream = tokio::net::TcpStream::connect(url.strip_prefix("http://").unwrap()).await.unwrap();
        let request = format!("GET /hang HTTP/1.1\r\nHost: here\r\nCookie: {NAME}={}\r\n\r\n", id.as_str());
        stream.write_all(request.as_bytes()).await.unwrap();
        inside.notified().await;
        assert_eq!(sessions.in_use().0, 1, "it is held");
        drop(stream);
        all_closed(&sessions).await;
    }
    let mut session = sessions.with_wait(Duration::ZERO).open(&id).await.expect("it is free");
    assert_eq!(session.get::<u32>("n").unwrap(), Some(1));
    session.insert("n", &2).unwrap();
    session.close().await.unwrap();
}

/// A body that is made while it is sent.
struct Chunks(mpsc::Receiver<Bytes>);

impl Stream for Chunks {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(Ok))
    }
}

#[tokio::test]
async fn the_lock_is_given_back_before_the_body_is_sent() {
    let (bodies, mut body) = mpsc::unbounded_channel();
    let page = async move |session: Session| -> Result<Body> {
        session.update_key("n", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
        let (sender, receiver) = mpsc::channel(1);
        bodies.send(sender).unwrap();
        Ok(Body::from_stream(Chunks(receiver)))
    };
    let router = pages().route("/stream", get(page)).layer(SessionLayer::new(sessions()));
    let url = serve(router).await;
    let browser = visitor(&url).await;
    let mut slow = browser.get(format!("{url}/stream")).send().await.unwrap();
    let body = body.recv().await.unwrap();
    body.send("first".into()).await.unwrap();
    assert_eq!(slow.chunk().await.unwrap().unwrap(), "first");
    // Its body is not over, and others come and go.
    assert_eq!(post_ok(&browser, format!("{url}/count")).await, "3");
    drop(body);
    assert!(slow.chunk().await.unwrap().is_none());
}

#[tokio::test]
async fn a_slow_upload_holds_no_lock() {
    let page = async |session: Session, body: Bytes| -> Result<String> {
        session.insert("upload", &body.len()).await?;
        Ok(body.len().to_string())
    };
    let url = serve(pages().route("/upload", post(page)).layer(SessionLayer::new(sessions()))).await;
    let id = begin(&url).await;
    let mut stream = tokio::net::TcpStream::connect(url.strip_prefix("http://").unwrap()).await.unwrap();
    let head = format!(
        "POST /upload HTTP/1.1\r\nHost: here\r\nConnection: close\r\nCookie: {NAME}={}\r\nContent-Length: 4\r\n\r\nab",
        id.as_str()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let request = bare().post(format!("{url}/count")).header("cookie", format!("{NAME}={}", id.as_str()));
    assert_eq!(request.send().await.unwrap().text().await.unwrap(), "2");
    stream.write_all(b"cd").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n4"), "{answer}");
}

#[tokio::test]
async fn a_handle_that_outlives_its_response_is_told_so() {
    let (kept, mut left) = mpsc::unbounded_channel();
    let page = async move |session: Session| -> Result<()> {
        session.insert("n", &2).await?;
        kept.send(session).unwrap();
        Ok(())
    };
    let sessions = sessions();
    let url = serve(pages().route("/keep", post(page)).layer(SessionLayer::new(sessions.clone()))).await;
    let browser = visitor(&url).await;
    post_ok(&browser, format!("{url}/keep")).await;
    let session = left.recv().await.unwrap();
    assert_eq!(session.insert("n", &3).await.unwrap_err().kind(), ErrorKind::Config);
    assert_eq!(text(&browser, format!("{url}/read")).await, "2");
    all_closed(&sessions).await;
}

#[tokio::test]
async fn a_response_that_comes_late_does_not_bring_an_older_id_back() {
    let (released, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let slow = {
        let (released, go_on) = (released.clone(), go_on.clone());
        async move |session: Session| -> Result<&'static str> {
            session.rotate().await?;
            session.release().await?;
            released.notify_one();
            go_on.notified().await;
            Ok("done")
        }
    };
    let router = pages().route("/slow", post(slow));
    let url = serve(router.layer(SessionLayer::new(Counting::new().builder().grace(Duration::ZERO).build().unwrap()))).await;
    let browser = visitor(&url).await;
    let slow = tokio::spawn(browser.post(format!("{url}/slow")).send());
    released.notified().await;
    // Others of the same visitor go on, and rotate again; the id that the slow one has made leads nowhere soon.
    assert_eq!(post_ok(&browser, format!("{url}/count")).await, "2");
    post_ok(&browser, format!("{url}/rotate")).await;
    assert_eq!(post_ok(&browser, format!("{url}/count")).await, "3");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    go_on.notify_one();
    assert_eq!(slow.await.unwrap().unwrap().text().await.unwrap(), "done");
    assert_eq!(post_ok(&browser, format!("{url}/count")).await, "4");
}

#[tokio::test]
async fn after_a_logout_the_same_handler_may_begin_anew() {
    let page = async |session: Session| -> Result<()> {
        session.destroy().await?;
        session.flash("notice", "goodbye").await
    };
    let notice = async |session: Session| -> Result<String> { Ok(session.take_flash("notice").await?.unwrap_or_default()) };
    let store = Counting::new();
    let router = pages().route("/leave", post(page)).route("/notice", get(notice));
    let url = serve(router.layer(SessionLayer::new(store.sessions()))).await;
    let browser = visitor(&url).await;
    let response = browser.post(format!("{url}/leave")).send().await.unwrap();
    id_in(&set_cookie(response.headers()));
    assert_eq!(store.stored().await, 1);
    assert_eq!(text(&browser, format!("{url}/read")).await, "0");
    assert_eq!(text(&browser, format!("{url}/notice")).await, "goodbye");
    // Who has no session is told nothing when he leaves.
    let stranger = bare().post(format!("{url}/logout")).send().await.unwrap();
    assert!(stranger.headers().get(SET_COOKIE).is_none());
}

#[tokio::test]
async fn middleware_and_handler_share_one_session_and_its_two_trips() {
    let guard =
        async |session: Session, request: axum::extract::Request, next: axum::middleware::Next| -> Result<Response> {
            session.update_key("seen", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
            Ok(next.run(request).await)
        };
    let page = async |session: Session, view: SessionView| -> Result<String> {
        let seen: u32 = session.get("seen").await?.unwrap_or(0);
        session.insert("n", &seen).await?;
        Ok(format!("{seen} {}", view.get("seen").await?.unwrap_or(0_u32)))
    };
    let store = Counting::new();
    let router = Router::new().route("/", get(page)).layer(axum::middleware::from_fn(guard));
    let url = serve(router.layer(SessionLayer::new(store.sessions()).mode(Mode::exclusive()))).await;
    let browser = browser();
    // What a view sees is what is stored.
    assert_eq!(text(&browser, format!("{url}/")).await, "1 0");
    assert_eq!(store.count(), 1);
    assert_eq!(text(&browser, format!("{url}/")).await, "2 1");
    assert_eq!(store.count(), 2, "the session and the view");
}
