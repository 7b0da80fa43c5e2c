//! What an application on tower-sessions or axum_session becomes. `docs/from-tower-sessions.md` explains it part by part.
//!
//! `cargo run --example from_tower_sessions --features axum`

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use sessionkit::web::{Answer, Changes, CookieKeys, Mode, Result, Session, SessionCookie, SessionLayer, SessionView, Typed};
use sessionkit::{ErrorKind, Sessions};
use tower::ServiceExt;

fn layer(sessions: Sessions) -> sessionkit::Result<SessionLayer> {
    // The first key makes new cookies; the one behind it is still accepted.
    let keys = CookieKeys::new(b"the new key: 32 bytes or more, random")?;
    let keys = keys.and_older(b"the old key: for as long as its cookies live")?;
    let cookie = SessionCookie::strict().signed(keys).max_age(Duration::from_secs(8 * 3600)).build()?;
    Ok(SessionLayer::new(sessions).with_cookie(cookie).on_server_error(Changes::Keep).on_error(|error| match error.kind() {
        // A store that is down shows the shop as to a stranger; all else is answered as usual.
        ErrorKind::Unavailable => Answer::GoOn,
        _ => error.into(),
    }))
}

async fn visit(session: Session) -> Result<String> {
    let visits = session.get("visits").await?.unwrap_or(0) + 1;
    session.insert("visits", &visits).await?;
    Ok(format!("visit {visits}"))
}

#[derive(Default, Deserialize, Serialize)]
struct Cart {
    items: Vec<String>,
}

impl Typed for Cart {
    const KEY: &'static str = "cart";
}

async fn add(session: Session<Cart>) -> Result<String> {
    let cart = session.update(|cart| cart.items.push("tea".into())).await?;
    Ok(format!("{} in the cart", cart.items.len()))
}

async fn greeting(view: SessionView) -> Result<String> {
    let user: Option<String> = view.get("user").await?;
    Ok(format!("Hello, {}", user.as_deref().unwrap_or("stranger")))
}

async fn report(session: Session) -> Result<String> {
    let user: Option<String> = session.get("user").await?;
    let view = session.release().await?;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let session = view.reopen().await?;
    session.update_key("reports", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
    Ok(format!("a report for {}", user.unwrap_or_default()))
}

async fn log_in(session: Session) -> Result<Redirect> {
    session.elevate().await?;
    session.insert("user", "ada").await?;
    session.flash("notice", "Welcome back.").await?;
    Ok(Redirect::to("/greeting"))
}

async fn log_out(session: Session) -> Result<Redirect> {
    session.destroy().await?;
    Ok(Redirect::to("/greeting"))
}

async fn members_only(view: SessionView, request: axum::extract::Request, next: axum::middleware::Next) -> Result<Response> {
    if view.contains("user").await? {
        return Ok(next.run(request).await);
    }
    Ok(StatusCode::FORBIDDEN.into_response())
}

fn app(layer: SessionLayer) -> Router {
    Router::new()
        .route("/report", post(report))
        .route_layer(axum::middleware::from_fn(members_only))
        .route("/visit", post(visit))
        .route("/add", post(add).layer(Mode::merge()))
        .route("/logout", post(log_out).layer(Mode::exclusive().wait(Duration::from_secs(2))))
        .route("/greeting", get(greeting))
        .route("/login", post(log_in))
        .layer(layer)
}

/// Sends a request with a cookie and returns the response's text and the cookie to go on with.
async fn send(app: &Router, method: &str, path: &str, cookie: &str) -> Result<(String, String), Box<dyn std::error::Error>> {
    let request = Request::builder().method(method).uri(path).header("cookie", cookie).body(Body::empty())?;
    let response = app.clone().oneshot(request).await?;
    let told = response.headers().get("set-cookie").and_then(|told| told.to_str().ok()?.split(';').next());
    let cookie = told.unwrap_or(cookie).to_owned();
    let text = axum::body::to_bytes(response.into_body(), 1 << 16).await?;
    Ok((String::from_utf8(text.into())?, cookie))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let app = app(layer(sessionkit::connect("memory://").await?)?);
    let (_, anonymous) = send(&app, "POST", "/visit", "").await?;

    // Fifty at once, of one visitor. Not one of them is lost.
    let visits: Vec<_> = (0..50)
        .map(|_| {
            let (app, cookie) = (app.clone(), anonymous.clone());
            tokio::spawn(async move { send(&app, "POST", "/visit", &cookie).await.is_ok() })
        })
        .collect();
    for visit in visits {
        assert!(visit.await?);
    }
    assert_eq!(send(&app, "POST", "/visit", &anonymous).await?.0, "visit 52");

    let (_, member) = send(&app, "POST", "/login", &anonymous).await?;
    assert_eq!(send(&app, "GET", "/greeting", &member).await?.0, "Hello, ada");
    assert_eq!(send(&app, "GET", "/greeting", &anonymous).await?.0, "Hello, stranger");
    let (report, added) = tokio::join!(send(&app, "POST", "/report", &member), send(&app, "POST", "/add", &member));
    assert_eq!((report?.0.as_str(), added?.0.as_str()), ("a report for ada", "1 in the cart"));

    send(&app, "POST", "/logout", &member).await?;
    assert_eq!(send(&app, "GET", "/greeting", &member).await?.0, "Hello, stranger");
    println!("52 visits, one login, one logout: nothing was lost, and nobody came back.");
    Ok(())
}
