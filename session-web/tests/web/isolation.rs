//! What does not get from one cookie, request or moment into another.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::Request;
use axum::routing::{get, post};
use reqwest::header::{COOKIE, HeaderName, SET_COOKIE};
use session_core::{ErrorKind, SessionId};
use session_web::{Mode, Result, Session, SessionCookie, SessionLayer, SessionView};
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tower::ServiceExt;

use super::support::*;

#[tokio::test]
async fn s_54_an_id_of_one_cookie_is_unknown_under_another_name() {
    let store = Counting::new();
    let layer = |name: &str| SessionLayer::new(store.sessions()).with_cookie(SessionCookie::named(name).build().unwrap());
    let (shop, staff) = (serve(app(layer("__Host-shop"))).await, serve(app(layer("__Host-staff"))).await);
    let api = SessionLayer::new(store.sessions()).with_header(HeaderName::from_static("x-session"));
    let api = serve(app(api)).await;
    let id = begin(&shop).await;
    let shows = async |url: &str, name: &str, path: &str| {
        let request = bare().get(format!("{url}/{path}")).header(name, id.as_str());
        let request = request.header(COOKIE, format!("{name}={}", id.as_str()));
        request.send().await.unwrap().text().await.unwrap()
    };
    for path in ["read", "view"] {
        assert_eq!(shows(&shop, "__Host-shop", path).await, "1");
        assert_eq!(shows(&staff, "__Host-staff", path).await, "0");
        assert_eq!(shows(&api, "x-session", path).await, "0");
    }
    // Not even to write on: it gets a session of its own.
    let request = bare().post(format!("{staff}/count")).header(COOKIE, format!("__Host-staff={}", id.as_str()));
    let response = request.send().await.unwrap();
    assert_ne!(id_in(&set_cookie(response.headers())), id);
    assert_eq!(response.text().await.unwrap(), "1");
    // A login there does not make it known here.
    let login = bare().post(format!("{staff}/login")).header(COOKIE, format!("__Host-staff={}", id.as_str()));
    let staffed = id_in(&set_cookie(login.send().await.unwrap().headers()));
    let request = bare().get(format!("{shop}/user")).header(COOKIE, format!("__Host-shop={}", staffed.as_str()));
    assert_eq!(request.send().await.unwrap().text().await.unwrap(), "nobody");
    assert_eq!(shows(&shop, "__Host-shop", "read").await, "1");
}

#[tokio::test]
async fn s_54_two_cookies_share_their_sessions_where_that_was_asked_for() {
    let store = Counting::new();
    let cookie = |name: &str| SessionLayer::new(store.sessions()).with_cookie(SessionCookie::named(name).build().unwrap());
    let (old, new) = (cookie("__Host-old").with_realm("app"), cookie("__Host-new").with_realm("app"));
    let (old, new, all) = (serve(app(old)).await, serve(app(new)).await, serve(app(cookie("a").without_realm())).await);
    let id = begin(&old).await;
    for (url, name) in [(&new, "__Host-new"), (&all, "a")] {
        let request = bare().get(format!("{url}/read")).header(COOKIE, format!("{name}={}", id.as_str()));
        assert_eq!(request.send().await.unwrap().text().await.unwrap(), "1");
    }
}

/// Requests of a run over 64 visitors.
const REQUESTS: usize = 1_000_000;
const VISITORS: usize = 64;

#[test]
fn s_55_no_request_ever_sees_the_session_of_another() {
    // Two workers, so that each serves all visitors in turns.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let marker = async |session: Session, sent: Bytes| -> Result<String> {
            let found: Option<String> = session.get("marker").await?;
            tokio::task::yield_now().await;
            if found.is_none() {
                session.insert("marker", std::str::from_utf8(&sent).unwrap()).await?;
            }
            Ok(found.unwrap_or_default())
        };
        let look = async |view: SessionView| -> Result<String> { Ok(view.get("marker").await?.unwrap_or_default()) };
        let router = Router::new().route("/", post(marker)).route("/look", post(look)).layer(SessionLayer::new(sessions()));
        let mut visitors = JoinSet::new();
        for visitor in 0..VISITORS {
            let router = router.clone();
            visitors.spawn(async move {
                let marker = format!("visitor {visitor}");
                let mut cookie = String::new();
                for n in 0..REQUESTS / VISITORS {
                    let request = Request::post(if n % 2 == 0 { "/" } else { "/look" }).header("cookie", &cookie);
                    let request = request.body(Body::from(marker.clone())).unwrap();
                    let response = router.clone().oneshot(request).await.unwrap();
                    if let Some(told) = response.headers().get(SET_COOKIE) {
                        assert_eq!(n, 0, "nobody is given another id");
                        cookie = told.to_str().unwrap().split(';').next().unwrap().to_owned();
                    }
                    let seen = axum::body::to_bytes(response.into_body(), 100).await.unwrap();
                    assert_eq!(seen, if n == 0 { b"" } else { marker.as_bytes() });
                }
            });
        }
        while let Some(visitor) = visitors.join_next().await {
            visitor.unwrap();
        }
    });
}

/// Lets a handler stop in the middle, twice: it says that it is there, and waits to go on.
#[derive(Clone)]
struct Stop(Arc<Barrier>);

impl Stop {
    fn new() -> Self {
        Self(Arc::new(Barrier::new(2)))
    }

    async fn here(&self) {
        self.0.wait().await;
        self.0.wait().await;
    }
}

/// Asks for a page that stops in the middle, does something there, and returns status and text.
async fn between<F: Future<Output = ()>>(
    url: String,
    id: &SessionId,
    stop: &Stop,
    act: impl FnOnce() -> F,
) -> (u16, String) {
    let request = bare().post(url).header(COOKIE, format!("{NAME}={}", id.as_str()));
    let request = tokio::spawn(request.send());
    stop.0.wait().await;
    act().await;
    stop.0.wait().await;
    let response = request.await.unwrap().unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

#[tokio::test]
async fn s_56_whatever_comes_between_a_look_and_a_write_is_seen_or_refused() {
    let (stop, store) = (Stop::new(), Counting::new());
    let sessions = store.sessions();
    let page = |mode: Mode| {
        let stop = stop.clone();
        post(async move |session: Session| -> Result<String> {
            let session = session.with(mode);
            let n = session.get("n").await?.unwrap_or(0_u32);
            stop.here().await;
            session.insert("n", &(n + 1)).await?;
            Ok(n.to_string())
        })
    };
    let reopened = {
        let stop = stop.clone();
        post(async move |view: SessionView| -> Result<String> {
            let seen = view.get("n").await?.unwrap_or(0_u32);
            stop.here().await;
            let session = view.reopen().await?;
            let found = session.get("n").await?.unwrap_or(0_u32);
            session.insert("n", &(found + 1)).await?;
            Ok(format!("{seen} {found}"))
        })
    };
    let router =
        pages().route("/exclusive", page(Mode::exclusive())).route("/merge", page(Mode::merge())).route("/reopen", reopened);
    let layer = SessionLayer::new(sessions.clone());
    let sessions = layer.sessions().clone();
    let url = serve(router.layer(layer)).await;
    let at = |path: &str| format!("{url}/{path}");
    let n = async |id: &SessionId| sessions.view(id).await.unwrap().get::<u32>("n").unwrap();
    let change = async |id: &SessionId| {
        let mut session = sessions.merge(id).await.unwrap();
        session.insert("n", &7_u32).unwrap();
        session.close().await
    };

    // Look, logout, write: it stays logged out, and the writer is told.
    for path in ["exclusive", "merge"] {
        let id = begin(&url).await;
        let (status, _) = between(at(path), &id, &stop, async || sessions.destroy(&id).await.unwrap()).await;
        assert_eq!((status, n(&id).await), (409, None), "{path}");
    }
    // Look, write of another, write: under the lock the other is refused, without it the writer is.
    let id = begin(&url).await;
    let outside = sessions.clone().with_wait(std::time::Duration::ZERO);
    let refuse = async || assert_eq!(outside.open(&id).await.unwrap_err().kind(), ErrorKind::LockTimeout);
    assert_eq!(between(at("exclusive"), &id, &stop, refuse).await, (200, "1".into()));
    assert_eq!(n(&id).await, Some(2));
    let id = begin(&url).await;
    let (status, _) = between(at("merge"), &id, &stop, async || drop(change(&id).await.unwrap())).await;
    assert_eq!((status, n(&id).await), (409, Some(7)));
    // A look without a lock, and then a session: it is read again.
    let id = begin(&url).await;
    let seen = between(at("reopen"), &id, &stop, async || drop(change(&id).await.unwrap())).await;
    assert_eq!((seen, n(&id).await), ((200, "1 7".into()), Some(8)));
    // The same, and a logout between: a new session, and the old one stays away.
    let id = begin(&url).await;
    let seen = between(at("reopen"), &id, &stop, async || sessions.destroy(&id).await.unwrap()).await;
    assert_eq!((seen, n(&id).await), ((200, "1 0".into()), None));
    // The same, and a login between: the old id stores nothing and reaches nothing.
    let id = begin(&url).await;
    let (status, _) = between(at("reopen"), &id, &stop, async || {
        let login = bare().post(at("login")).header(COOKIE, format!("{NAME}={}", id.as_str()));
        assert_eq!(login.send().await.unwrap().status(), 200);
    })
    .await;
    assert_eq!((status, n(&id).await), (409, None));
    // The same, and a rotate between: it goes on under the new id.
    let id = begin(&url).await;
    let seen = between(at("reopen"), &id, &stop, async || {
        let rotate = bare().post(at("rotate")).header(COOKIE, format!("{NAME}={}", id.as_str()));
        assert_eq!(rotate.send().await.unwrap().status(), 200);
    })
    .await;
    assert_eq!((seen, n(&id).await), ((200, "1 1".into()), Some(2)));
    sessions.shutdown().await;
    assert_eq!(sessions.in_use(), (0, 0));
}

#[tokio::test]
async fn s_56_rotates_at_once_leave_one_session_and_lose_nobody() {
    let store = Counting::new();
    let url = serve(app(SessionLayer::new(store.sessions()))).await;
    let browser = browser();
    post_ok(&browser, format!("{url}/count")).await;
    for round in 1..51 {
        // As many new ids in a row as an old one leads through.
        let mut all = JoinSet::new();
        for path in ["rotate", "count", "rotate", "count", "rotate", "count", "rotate", "count"] {
            all.spawn(browser.post(format!("{url}/{path}")).send());
        }
        while let Some(response) = all.join_next().await {
            assert_eq!(response.unwrap().unwrap().status(), 200);
        }
        assert_eq!(text(&browser, format!("{url}/read")).await, (1 + 4 * round).to_string());
    }
}

#[tokio::test]
async fn s_55_nothing_of_a_request_stays_behind_for_the_next_on_its_connection() {
    let url = serve(
        pages()
            .route("/left", get(async |view: SessionView| -> Result<String> { Ok(format!("{:?}", view.id().await?)) }))
            .layer(SessionLayer::new(sessions())),
    )
    .await;
    // One connection, kept alive, for a visitor with a session and one without in turns.
    let (client, id) = (bare(), begin(&url).await);
    for _ in 0..100 {
        let with = client.get(format!("{url}/read")).header(COOKIE, format!("{NAME}={}", id.as_str()));
        assert_eq!(with.send().await.unwrap().text().await.unwrap(), "1");
        assert_eq!(text(&client, format!("{url}/read")).await, "0");
        assert_eq!(text(&client, format!("{url}/left")).await, "None");
    }
}
