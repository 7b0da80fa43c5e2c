//! A shopping cart and a page that sends ten requests at once: all ten are in the cart.
//!
//! `cargo run --example cart --features file,axum`, then open http://127.0.0.1:3002.

use axum::extract::{Path, Query};
use axum::response::Html;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use sessionkit::Sessions;
use sessionkit::web::{Mode, Result, Session, SessionCookie, SessionLayer, SessionView, Typed};

/// Kept in the session, whole. Another struct with another key would share the session with it.
#[derive(Clone, Default, Deserialize, Serialize)]
struct Cart {
    items: Vec<String>,
}

impl Typed for Cart {
    const KEY: &'static str = "cart";
}

#[derive(Deserialize)]
struct How {
    mode: Option<String>,
}

async fn add(session: Session<Cart>, Path(item): Path<String>, Query(how): Query<How>) -> Result<Json<Cart>> {
    let session = match how.mode.as_deref() {
        // Nobody waits: each request's change is made again on whatever the others have stored.
        Some("merge") => session.with(Mode::merge()),
        // One after the other, first come, first served.
        _ => session,
    };
    let cart = session.update(move |cart| cart.items.push(item.clone())).await?;
    Ok(Json(cart))
}

async fn empty(session: Session<Cart>) -> Result<Json<Cart>> {
    session.update(|cart| cart.items.clear()).await.map(Json)
}

/// A number in the corner of every page, which waits for no lock.
async fn badge(view: SessionView<Cart>) -> Result<String> {
    Ok(view.get().await?.items.len().to_string())
}

pub(crate) fn app(sessions: Sessions) -> sessionkit::Result<Router> {
    // For plain HTTP on the own machine. Behind HTTPS, leave this line out: the default is `__Host-sid`, Secure.
    let layer = SessionLayer::new(sessions).with_cookie(SessionCookie::development().build()?);
    Ok(Router::new()
        .route("/", get(async || Html(PAGE)))
        .route("/add/{item}", post(add))
        .route("/empty", post(empty))
        .route("/badge", get(badge))
        .layer(layer))
}

const PAGE: &str = r#"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>
<title>Cart</title><link rel=icon href='data:,'><style>
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 34rem; margin: 3rem auto; padding: 0 1rem }
button, select { font: inherit; padding: .3rem .6rem } #badge { float: right; font-size: 2rem }
</style>
<output id=badge aria-label="items in the cart">?</output>
<h1>Cart</h1>
<p><button id=one>Add tea</button> <button id=ten>Add ten at once</button> <button id=empty>Empty it</button>
<p><label>Parallel requests <select id=mode>
<option value=exclusive>wait for each other (exclusive)<option value=merge>are merged (merge)</select></label>
<p id=said role=status>
<script>
const $ = id => document.getElementById(id)
const post = async path => { const r = await fetch(path, { method: 'POST' }); if (!r.ok) throw await r.text(); return r.json() }
const add = () => post('/add/tea?mode=' + $('mode').value)
const show = async () => { $('badge').value = await (await fetch('/badge')).text() }
const run = async work => {
  const began = performance.now()
  try { await work(); $('said').textContent = `Done in ${Math.round(performance.now() - began)} ms.` } catch (e) { $('said').textContent = e }
  await show()
}
$('one').onclick = () => run(add)
// The first visit has no session to share yet, so one request makes it.
$('ten').onclick = () => run(async () => { await add(); await Promise.all(Array.from({ length: 9 }, add)) })
$('empty').onclick = () => run(() => post('/empty'))
show()
</script>"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = format!("file://{}", std::env::temp_dir().join("sessionkit-cart").display());
    let sessions = sessionkit::connect(&std::env::args().nth(1).unwrap_or(store)).await?;
    let port: u16 = std::env::var("PORT").map_or(Ok(3002), |port| port.parse())?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, app(sessions)?).await?)
}
