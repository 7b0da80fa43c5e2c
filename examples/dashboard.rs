//! A dashboard of six widgets that load at the same time: as views they wait neither for each other nor for a slow request.
//!
//! `cargo run --example dashboard --features file,axum`, then open http://127.0.0.1:3004.

use std::time::Duration;

use axum::Router;
use axum::extract::Path;
use axum::response::Html;
use axum::routing::{get, post};
use sessionkit::Sessions;
use sessionkit::web::{Result, Session, SessionCookie, SessionLayer, SessionView};

const WIDGETS: [&str; 6] = ["mail", "news", "weather", "tasks", "stocks", "calendar"];

/// Reads the session without a lock, however many do so at once. A call that writes would not compile.
async fn widget(view: SessionView, Path(name): Path<String>) -> Result<String> {
    let color: Option<String> = view.get("color").await?;
    Ok(draw(&name, color).await)
}

/// The same with the lock, although nothing is written: one after the other.
async fn locked_widget(session: Session, Path(name): Path<String>) -> Result<String> {
    let color: Option<String> = session.get("color").await?;
    Ok(draw(&name, color).await)
}

/// Asks some other service, for the third of a second.
async fn draw(name: &str, color: Option<String>) -> String {
    tokio::time::sleep(Duration::from_millis(300)).await;
    let known = WIDGETS.iter().find(|known| **known == name).unwrap_or(&"nothing");
    format!("{known} in {}", color.as_deref().unwrap_or("gray"))
}

async fn choose(session: Session, Path(color): Path<String>) -> Result<()> {
    let color = ["red", "green", "blue"].into_iter().find(|known| *known == color).unwrap_or("gray");
    session.insert("color", color).await
}

pub(crate) fn app(sessions: Sessions) -> sessionkit::Result<Router> {
    // For plain HTTP on the own machine. Behind HTTPS, leave this line out: the default is `__Host-sid`, Secure.
    let layer = SessionLayer::new(sessions).with_cookie(SessionCookie::development().build()?);
    Ok(Router::new()
        .route("/", get(async || Html(PAGE.replace("WIDGETS", &format!("{WIDGETS:?}")))))
        .route("/widget/{name}", get(widget))
        .route("/locked/{name}", get(locked_widget))
        .route("/color/{color}", post(choose))
        .layer(layer))
}

const PAGE: &str = r#"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>
<title>Dashboard</title><link rel=icon href='data:,'><style>
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem }
button { font: inherit; padding: .3rem .6rem }
#widgets { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem }
#widgets output { display: block; border: 2px solid; border-radius: .5rem; padding: 1.5rem 1rem }
</style>
<h1>Dashboard</h1>
<p><button id=red>red</button> <button id=green>green</button> <button id=blue>blue</button>
<label><input type=checkbox id=locked> load the widgets under the lock</label>
<p id=said role=status>
<div id=widgets></div>
<script>
const $ = id => document.getElementById(id)
const names = WIDGETS
for (const name of names) $('widgets').append(Object.assign(document.createElement('output'), { id: name }))
const load = async () => {
  const began = performance.now(), way = $('locked').checked ? 'locked' : 'widget'
  $('said').textContent = 'loading'
  await Promise.all(names.map(async name => {
    const text = await (await fetch(`/${way}/${name}`, { cache: 'no-store' })).text()
    $(name).value = text
    $(name).style.color = text.split(' ').pop()
  }))
  $('said').textContent = `${names.length} widgets in ${Math.round(performance.now() - began)} ms`
}
for (const color of ['red', 'green', 'blue'])
  $(color).onclick = async () => { await fetch('/color/' + color, { method: 'POST' }); await load() }
$('locked').onchange = load
load()
</script>"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let store = format!("file://{}", std::env::temp_dir().join("sessionkit-dashboard").display());
    let sessions = sessionkit::connect(&std::env::args().nth(1).unwrap_or(store)).await?;
    let port: u16 = std::env::var("PORT").map_or(Ok(3004), |port| port.parse())?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, app(sessions)?).await?)
}
