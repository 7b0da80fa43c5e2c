//! A server on the loopback, a browser, and a store that counts who comes.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::routing::{get, post};
use reqwest::Client;
use reqwest::header::{HeaderMap, HeaderName, SET_COOKIE};
use session_core::{
    MemoryHandler, OpenRequest, OpenSession, SessionAdmin, SessionHandler, SessionId, Sessions, SessionsBuilder, async_trait,
};
use session_web::{Result, Session, SessionCookie, SessionLayer, SessionView};

/// The name of the default cookie.
pub(crate) const NAME: &str = "__Host-sid";

/// Serves `router` until the test ends, and returns where.
pub(crate) async fn serve(router: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

/// A client with an empty cookie jar.
pub(crate) fn browser() -> Client {
    client().cookie_store(true).build().unwrap()
}

/// A client that sends what it is told and remembers nothing.
pub(crate) fn bare() -> Client {
    client().build().unwrap()
}

fn client() -> reqwest::ClientBuilder {
    // Whatever the machine has for a proxy is none of this.
    Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none())
}

/// Counts what reaches the store.
#[derive(Clone, Debug)]
pub(crate) struct Counting {
    inner: Arc<dyn SessionHandler>,
    opened: Arc<AtomicUsize>,
}

impl Counting {
    pub(crate) fn new() -> Self {
        Self { inner: Arc::new(MemoryHandler::new()), opened: Arc::default() }
    }

    /// How many openings there were since this was last asked.
    pub(crate) fn count(&self) -> usize {
        self.opened.swap(0, Ordering::SeqCst)
    }

    pub(crate) fn builder(&self) -> SessionsBuilder {
        Sessions::builder(Arc::new(self.clone())).wait(Duration::from_secs(20))
    }

    pub(crate) fn sessions(&self) -> Sessions {
        self.builder().build().unwrap()
    }

    /// How many records there are.
    pub(crate) async fn stored(&self) -> usize {
        self.inner.admin().unwrap().list(None, NonZeroU32::MAX).await.unwrap().sessions.len()
    }
}

#[async_trait]
impl SessionHandler for Counting {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> session_core::Result<Box<dyn OpenSession>> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        self.inner.open(id, request).await
    }

    async fn gc(&self, limit: NonZeroU32) -> session_core::Result<u64> {
        self.inner.gc(limit).await
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        self.inner.admin()
    }
}

/// Sessions in memory.
pub(crate) fn sessions() -> Sessions {
    Counting::new().sessions()
}

/// What most applications do with a session, one path each.
pub(crate) fn app(layer: SessionLayer) -> Router {
    pages().layer(layer)
}

pub(crate) fn pages() -> Router {
    Router::new()
        .route("/untouched", get(async || "untouched"))
        .route("/asked", get(async |_: Session, _: SessionView| "asked"))
        .route("/view", get(view))
        .route("/read", get(read))
        .route("/count", post(count))
        .route("/rotate", post(async |session: Session| session.rotate().await))
        .route("/login", post(login))
        .route("/logout", post(async |session: Session| session.destroy().await))
        .route("/user", get(user))
}

async fn view(view: SessionView) -> Result<String> {
    Ok(view.get("n").await?.unwrap_or(0_u32).to_string())
}

async fn read(session: Session) -> Result<String> {
    Ok(session.get("n").await?.unwrap_or(0_u32).to_string())
}

async fn count(session: Session) -> Result<String> {
    let n = session.get("n").await?.unwrap_or(0_u32) + 1;
    // Where there is no lock, others come in between.
    tokio::task::yield_now().await;
    session.insert("n", &n).await?;
    Ok(n.to_string())
}

async fn login(session: Session) -> Result<()> {
    session.elevate().await?;
    session.insert("user", "ada").await
}

async fn user(view: SessionView) -> Result<String> {
    Ok(view.get("user").await?.unwrap_or_else(|| "nobody".to_owned()))
}

/// The values of a header, in order.
pub(crate) fn values(headers: &HeaderMap, name: HeaderName) -> Vec<String> {
    headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
}

/// The one cookie of a response, as it is written.
pub(crate) fn set_cookie(headers: &HeaderMap) -> String {
    let mut cookies = values(headers, SET_COOKIE);
    assert_eq!(cookies.len(), 1, "{cookies:?}");
    cookies.remove(0)
}

/// The id in what [`set_cookie`] returns, where it is written plainly.
pub(crate) fn id_in(cookie: &str) -> SessionId {
    let value = cookie.split(['=', ';']).nth(1).unwrap();
    SessionId::parse(value).unwrap_or_else(|| panic!("no id in {cookie}"))
}

/// Begins a session with one value in it and returns its id.
pub(crate) async fn begin(url: &str) -> SessionId {
    let response = bare().post(format!("{url}/count")).send().await.unwrap();
    id_in(&set_cookie(response.headers()))
}

/// Serves [`app`] under a cookie.
pub(crate) async fn serve_with(cookie: SessionCookie) -> String {
    serve(app(SessionLayer::new(sessions()).with_cookie(cookie))).await
}

/// Fetches a page and returns what it says.
pub(crate) async fn text(client: &Client, url: String) -> String {
    client.get(url).send().await.unwrap().text().await.unwrap()
}

/// Posts, insists on success, and returns what the page says.
pub(crate) async fn post_ok(client: &Client, url: String) -> String {
    let response = client.post(url).send().await.unwrap();
    assert!(response.status().is_success(), "{}", response.status());
    response.text().await.unwrap()
}
