//! A login: the session gets a new id when the privilege changes, and a logout ends it everywhere.
//!
//! `cargo run --example login --features file,axum`, then open http://127.0.0.1:3001. The password is `sesame`.

use axum::response::{Html, Redirect};
use axum::routing::{get, post};
use axum::{Form, Router};
use serde::Deserialize;
use sessionkit::Sessions;
use sessionkit::web::{Result, Session, SessionCookie, SessionLayer};

#[derive(Deserialize)]
struct Credentials {
    name: String,
    password: String,
}

async fn log_in(session: Session, Form(form): Form<Credentials>) -> Result<Redirect> {
    if form.password != "sesame" || form.name.is_empty() {
        session.flash("notice", "That is not the password.").await?;
        return Ok(Redirect::to("/"));
    }
    // Whoever knew the id from before, or planted it, has nothing of the session from here on.
    session.elevate().await?;
    session.insert("user", &form.name).await?;
    session.flash("notice", "You are logged in, under a new id.").await?;
    Ok(Redirect::to("/"))
}

async fn log_out(session: Session) -> Result<Redirect> {
    // It waits for nobody, and no request that is still running brings the session back.
    session.destroy().await?;
    session.flash("notice", "Goodbye.").await?;
    Ok(Redirect::to("/"))
}

async fn page(session: Session) -> Result<Html<String>> {
    let notice: Option<String> = session.take_flash("notice").await?;
    let user: Option<String> = session.get("user").await?;
    let body = match user {
        Some(user) => {
            session.update_key("pages", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
            let pages: u32 = session.get("pages").await?.unwrap_or(0);
            format!(
                "<h1>Hello, <span id=user>{}</span></h1><p>You have seen <span id=pages>{pages}</span> pages since.</p>
                 <form method=post action=/logout><button id=logout>Log out</button></form>",
                escaped(&user)
            )
        }
        None => "<h1>Who are you?</h1><form method=post action=/login>
                 <label>Name <input name=name autofocus required></label>
                 <label>Password <input name=password type=password required></label>
                 <button id=login>Log in</button></form>"
            .into(),
    };
    let notice = notice.map(|notice| format!("<p id=notice role=status>{}</p>", escaped(&notice))).unwrap_or_default();
    Ok(Html(format!("{HEAD}<title>Login</title>{notice}{body}")))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const HEAD: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>
<link rel=icon href='data:,'><style>
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem }
label { display: block; margin: .5rem 0 } input, button { font: inherit; padding: .3rem .6rem }
[role=status] { background: #e8f2ff; padding: .5rem 1rem; border-radius: .4rem }
</style>";

pub(crate) fn app(sessions: Sessions) -> sessionkit::Result<Router> {
    // For plain HTTP on the own machine. Behind HTTPS, leave this line out: the default is `__Host-sid`, Secure.
    let layer = SessionLayer::new(sessions).with_cookie(SessionCookie::development().build()?);
    Ok(Router::new().route("/", get(page)).route("/login", post(log_in)).route("/logout", post(log_out)).layer(layer))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = format!("file://{}", std::env::temp_dir().join("sessionkit-login").display());
    let sessions = sessionkit::connect(&std::env::args().nth(1).unwrap_or(store)).await?;
    let port: u16 = std::env::var("PORT").map_or(Ok(3001), |port| port.parse())?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, app(sessions)?).await?)
}
