//! A report that takes seconds, and a page that goes on meanwhile: the lock is released early and taken again for the result.
//!
//! `cargo run --example slow_report --features file,axum`, then open http://127.0.0.1:3003.

use std::time::Duration;

use axum::Router;
use axum::extract::Query;
use axum::response::Html;
use axum::routing::{get, post};
use serde::Deserialize;
use sessionkit::Sessions;
use sessionkit::web::{Result, Session, SessionCookie, SessionLayer};

#[derive(Deserialize)]
struct How {
    release: bool,
}

async fn report(session: Session, Query(how): Query<How>) -> Result<String> {
    session.update_key("reports", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
    let number: u32 = session.get("reports").await?.unwrap_or(0);
    if !how.release {
        // As PHP does it: whatever else the visitor asks for waits until this is over.
        let text = write_report(number).await;
        session.insert("last", &text).await?;
        return Ok(text);
    }
    let view = session.release().await?;
    let text = write_report(number).await;
    // Fresh data: what was read before may be old by now, and a `Session` from before could not be used any more.
    let session = view.reopen().await?;
    session.insert("last", &text).await?;
    Ok(text)
}

async fn write_report(number: u32) -> String {
    tokio::time::sleep(Duration::from_secs(2)).await;
    format!("report {number}")
}

async fn click(session: Session) -> Result<String> {
    session.update_key("clicks", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
    Ok(session.get("clicks").await?.unwrap_or(0_u32).to_string())
}

pub(crate) fn app(sessions: Sessions) -> sessionkit::Result<Router> {
    // For plain HTTP on the own machine. Behind HTTPS, leave this line out: the default is `__Host-sid`, Secure.
    let layer = SessionLayer::new(sessions).with_cookie(SessionCookie::development().build()?);
    Ok(Router::new()
        .route("/", get(async || Html(PAGE)))
        .route("/report", post(report))
        .route("/click", post(click))
        .layer(layer))
}

const PAGE: &str = r#"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>
<title>Slow report</title><link rel=icon href='data:,'><style>
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem }
button { font: inherit; padding: .3rem .6rem }
</style>
<h1>Slow report</h1>
<p>The report takes two seconds. While it is made, click.
<p><label><input type=checkbox id=release checked> release the lock while it is made</label>
<p><button id=report>Make the report</button> <output id=made></output>
<p><button id=click>Click</button> <output id=clicks>0</output> clicks, the last one after <output id=took>0</output> ms
<script>
const $ = id => document.getElementById(id)
const post = async path => (await fetch(path, { method: 'POST' })).text()
$('report').onclick = async () => {
  $('made').value = '…'
  $('made').value = await post('/report?release=' + $('release').checked)
}
const click = async () => {
  const began = performance.now()
  $('clicks').value = await post('/click')
  $('took').value = Math.round(performance.now() - began)
}
$('click').onclick = click
// The first visit has no session to share yet.
click()
</script>"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = format!("file://{}", std::env::temp_dir().join("sessionkit-slow-report").display());
    let sessions = sessionkit::connect(&std::env::args().nth(1).unwrap_or(store)).await?;
    let port: u16 = std::env::var("PORT").map_or(Ok(3003), |port| port.parse())?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, app(sessions)?).await?)
}
