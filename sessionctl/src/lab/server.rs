//! The addresses of the lab: each one is a page for people and the same numbers for programs.
//!
//! The page is three files that are part of this program, and the same for everybody; what it shows it asks for. Who may ask is
//! the business of `guard.rs`.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde::Deserialize;
use serde_json::json;

use super::backends::Backend;
use super::guard::{Guard, Refusal, guard, wants_json};
use super::jobs::Jobs;
use super::locks::Locks;
use super::plan::{self, PRESETS, Strategy, Wish};

const PAGE: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/lab.css");
const SCRIPT: &str = include_str!("page/lab.js");
const LANES: &str = include_str!("page/lanes.js");
const ICON: &str = include_str!("page/icon.svg");

/// Longer than any plan, and short enough for nobody to fill this process with one.
const MOST_BODY: usize = 16 * 1024;

/// What every request is answered from.
#[derive(Debug)]
pub(super) struct Lab {
    pub(super) backends: Vec<Backend>,
    pub(super) jobs: Jobs,
    pub(super) locks: Arc<Locks>,
    pub(super) guard: Arc<Guard>,
    /// Where it listens, as somebody would type it.
    pub(super) address: String,
}

type Answer = Result<Response, Refusal>;

pub(super) fn routes(lab: Arc<Lab>) -> Router {
    let guarded = Arc::clone(&lab.guard);
    Router::new()
        .route("/", get(home))
        .route("/runs", post(run))
        .route(
            "/runs/{id}",
            get(async |lab: State<_>, id: Path<_>, uri: Uri, headers: HeaderMap| job(lab, id, false, &uri, &headers)),
        )
        .route("/compare", get(home).post(compare))
        .route(
            "/compare/{id}",
            get(async |lab: State<_>, id: Path<_>, uri: Uri, headers: HeaderMap| job(lab, id, true, &uri, &headers)),
        )
        .route("/sessions", get(sessions))
        .route("/sessions/release", post(release))
        .route("/sessions/hold", post(hold))
        .route("/lab.css", get(async || file("text/css; charset=utf-8", STYLE)))
        .route("/lab.js", get(async || file("text/javascript; charset=utf-8", SCRIPT)))
        .route("/lanes.js", get(async || file("text/javascript; charset=utf-8", LANES)))
        .route("/icon.svg", get(async || file("image/svg+xml", ICON)))
        .fallback(async || Refusal::NotFound)
        .layer(DefaultBodyLimit::max(MOST_BODY))
        .layer(middleware::from_fn_with_state(guarded, guard))
        .with_state(lab)
}

fn file(kind: &'static str, text: &'static str) -> Response {
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

fn page() -> Response {
    file("text/html; charset=utf-8", PAGE)
}

/// The page; or what can be asked for, and with which token.
async fn home(State(lab): State<Arc<Lab>>, uri: Uri, headers: HeaderMap) -> Response {
    if !wants_json(&uri, &headers) {
        return page();
    }
    let mut backends = Vec::new();
    for backend in &lab.backends {
        backends.push(backend.offer().await);
    }
    let strategies = Strategy::ALL.map(
        |strategy| json!({"name": strategy, "title": strategy.title(), "what": strategy.what(), "call": strategy.call()}),
    );
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "address": lab.address,
        "token": lab.guard.token(),
        "busy": lab.jobs.busy(),
        "backends": backends,
        "strategies": strategies,
        "presets": PRESETS,
        "limits": {
            "requests": plan::MOST_REQUESTS,
            "work_ms": plan::MOST_WORK_MS,
            "apart_ms": plan::MOST_APART_MS,
            "together_ms": plan::MOST_TOGETHER_MS,
        },
    }))
    .into_response()
}

async fn run(State(lab): State<Arc<Lab>>, wish: Result<Json<Wish>, JsonRejection>) -> Answer {
    let wish = read(wish)?;
    let strategy = wish.strategy.ok_or_else(|| Refusal::Invalid("A run needs a strategy.".into()))?;
    start(&lab, &wish, Some(strategy)).await
}

async fn compare(State(lab): State<Arc<Lab>>, wish: Result<Json<Wish>, JsonRejection>) -> Answer {
    let wish = read(wish)?;
    match wish.strategy {
        None => start(&lab, &wish, None).await,
        Some(_) => Err(Refusal::Invalid("A comparison runs every strategy and takes none.".into())),
    }
}

async fn start(lab: &Lab, wish: &Wish, strategy: Option<Strategy>) -> Answer {
    let plan = wish.plan().map_err(Refusal::Invalid)?;
    let job = lab.jobs.start(lab.backend(&wish.backend)?, plan, strategy).await?;
    let path = job.path();
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, path.clone())], Json(json!({"url": path}))).into_response())
}

fn job(State(lab): State<Arc<Lab>>, Path(id): Path<String>, compares: bool, uri: &Uri, headers: &HeaderMap) -> Answer {
    // Read here and not by the framework, whose refusal would repeat what was sent.
    let job = id.parse().ok().and_then(|id| lab.jobs.find(id, compares));
    let Some(job) = job else { return Err(Refusal::NotFound) };
    Ok(if wants_json(uri, headers) { Json(job.report()).into_response() } else { page() })
}

#[derive(Debug, Deserialize)]
struct Which {
    backend: Option<String>,
}

async fn sessions(
    State(lab): State<Arc<Lab>>,
    which: Result<Query<Which>, QueryRejection>,
    uri: Uri,
    headers: HeaderMap,
) -> Answer {
    if !wants_json(&uri, &headers) {
        return Ok(page());
    }
    let Query(which) = which.map_err(|_| Refusal::Invalid("The address takes backend and format.".into()))?;
    let backend = match &which.backend {
        Some(name) => lab.backend(name)?,
        None => lab.backends.first().ok_or(Refusal::NotFound)?,
    };
    Ok(Json(lab.locks.list(backend).await?).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    backend: String,
    handle: String,
}

async fn release(State(lab): State<Arc<Lab>>, named: Result<Json<Named>, JsonRejection>) -> Answer {
    let named = read(named)?;
    let released = lab.locks.release(lab.backend(&named.backend)?, &named.handle).await?;
    Ok(Json(released).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Where {
    backend: String,
}

async fn hold(State(lab): State<Arc<Lab>>, place: Result<Json<Where>, JsonRejection>) -> Answer {
    let place = read(place)?;
    match lab.locks.hold(lab.backend(&place.backend)?).await? {
        Some(handle) => Ok((StatusCode::CREATED, Json(json!({"handle": handle}))).into_response()),
        None => Err(Refusal::Invalid("The lab holds enough sessions already; release one.".into())),
    }
}

/// What was sent, or a refusal that repeats nothing of it.
fn read<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, Refusal> {
    body.map(|Json(value)| value).map_err(|_| Refusal::Invalid("The body is not what this address takes.".into()))
}

impl Lab {
    fn backend(&self, name: &str) -> Result<&Backend, Refusal> {
        let known = self.backends.iter().find(|backend| backend.name == name);
        known.ok_or_else(|| Refusal::Invalid("There is no store of that name; /?format=json lists them.".into()))
    }
}
