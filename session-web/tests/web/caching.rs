//! What caches may keep: nothing that was made with a session.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use reqwest::Client;
use reqwest::header::{CACHE_CONTROL, COOKIE, SET_COOKIE, VARY};
use session_core::SessionId;
use session_web::{Result, Session, SessionLayer, SessionView};

use super::support::*;

/// What an application may say of its pages; the first says nothing.
const SAID: [Option<&str>; 6] = [
    None,
    Some("no-store"),
    Some("private, max-age=60"),
    Some("public, max-age=60"),
    Some("s-maxage=60"),
    Some("max-age=60, no-store"),
];

fn saying(page: Response, said: Option<&'static str>) -> Response {
    let mut page = page;
    if let Some(said) = said {
        page.headers_mut().insert("cache-control", said.parse().unwrap());
    }
    page
}

/// A page for each way to use a session and each thing to say, at `/{how}/{what}`.
fn router() -> Router {
    let mut router = Router::new();
    for (n, said) in SAID.into_iter().enumerate() {
        router = router
            .route(&format!("/untouched/{n}"), get(async move || saying("page".into_response(), said)))
            .route(
                &format!("/view/{n}"),
                get(async move |view: SessionView| -> Result<Response> {
                    let user: Option<String> = view.get("user").await?;
                    Ok(saying(user.unwrap_or_else(|| "nobody".into()).into_response(), said))
                }),
            )
            .route(
                &format!("/write/{n}"),
                get(async move |session: Session| -> Result<Response> {
                    session.update_key("n", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
                    Ok(saying("written".into_response(), said))
                }),
            )
            .route(
                &format!("/rotate/{n}"),
                get(async move |session: Session| -> Result<Response> {
                    session.rotate().await?;
                    Ok(saying("rotated".into_response(), said))
                }),
            );
    }
    router.merge(pages())
}

#[tokio::test]
async fn s_18_what_touched_a_session_is_not_stored_and_varies_by_cookie() {
    let url = serve(router().layer(SessionLayer::new(sessions()))).await;
    let client = bare();
    let mut id = begin(&url).await;
    for (n, said) in SAID.into_iter().enumerate() {
        for how in ["untouched", "view", "write", "rotate"] {
            let cookie = format!("{NAME}={}", id.as_str());
            let response = client.get(format!("{url}/{how}/{n}")).header(COOKIE, cookie).send().await.unwrap();
            let headers = response.headers();
            let control = values(headers, CACHE_CONTROL).join(", ");
            let is_public = said.is_some_and(|said| said.contains("public") || said.contains("s-maxage"));
            let kept = said.is_some_and(|said| said.contains("no-store"));
            match how {
                "untouched" => {
                    assert_eq!(control, said.unwrap_or_default());
                    assert!(headers.get(VARY).is_none() && headers.get(SET_COOKIE).is_none());
                    continue;
                }
                // It said so, and no id goes out.
                "view" | "write" if is_public => assert_eq!(control, said.unwrap()),
                _ if kept => assert_eq!(control, said.unwrap()),
                _ => assert_eq!(control, "no-store", "{how} {said:?}"),
            }
            assert_eq!(values(headers, VARY), ["Cookie"]);
            assert_eq!(headers.contains_key(SET_COOKIE), how == "rotate", "{how} {said:?}");
            if how == "rotate" {
                id = id_in(&set_cookie(headers));
            }
        }
    }
}

#[tokio::test]
async fn s_18_what_the_application_says_it_varies_by_stays() {
    let page = |vary: &'static str| {
        get(async move |view: SessionView| -> Result<Response> {
            view.exists().await?;
            Ok(([("vary", vary)], "page").into_response())
        })
    };
    let router =
        Router::new().route("/a", page("Accept, cookie")).route("/b", page("Accept-Encoding")).route("/c", page("*"));
    let url = serve(router.layer(SessionLayer::new(sessions()))).await;
    for (path, expected) in [("a", vec!["Accept, cookie"]), ("b", vec!["Accept-Encoding", "Cookie"]), ("c", vec!["*"])] {
        let response = bare().get(format!("{url}/{path}")).send().await.unwrap();
        assert_eq!(values(response.headers(), VARY), expected);
    }
}

/// A shared cache that keeps whatever it is allowed to, by the rules of HTTP.
#[derive(Clone)]
struct Cache {
    upstream: String,
    client: Client,
    kept: Arc<Mutex<HashMap<String, Vec<Kept>>>>,
    hits: Arc<Mutex<u32>>,
}

struct Kept {
    /// The headers that the page varies by, as they were in the request that it answered.
    varies: Vec<(String, String)>,
    body: String,
    cookie: Option<String>,
}

async fn cached(State(cache): State<Cache>, request: Request) -> Response {
    let (headers, path) = (request.headers().clone(), request.uri().path().to_owned());
    drop(request);
    let said = |name: &str| headers.get(name).map_or_else(String::new, |value| value.to_str().unwrap().to_owned());
    if let Some(hit) = cache
        .kept
        .lock()
        .unwrap()
        .get(&path)
        .and_then(|all| all.iter().find(|kept| kept.varies.iter().all(|(name, value)| said(name) == *value)))
    {
        *cache.hits.lock().unwrap() += 1;
        let mut response = hit.body.clone().into_response();
        if let Some(cookie) = &hit.cookie {
            response.headers_mut().insert("set-cookie", cookie.parse().unwrap());
        }
        return response;
    }
    let upstream =
        cache.client.get(format!("{}{path}", cache.upstream)).header(COOKIE, said("cookie")).send().await.unwrap();
    let header = |name: &str| values(upstream.headers(), name.parse().unwrap()).join(", ");
    let (control, vary, cookie) = (header("cache-control"), header("vary"), upstream.headers().get(SET_COOKIE).cloned());
    let body = upstream.text().await.unwrap();
    let varies: Vec<_> =
        vary.split(", ").filter(|name| !name.is_empty()).map(|name| (name.to_owned(), said(name))).collect();
    if (control.contains("public") || control.contains("s-maxage")) && !control.contains("no-store") {
        let cookie = cookie.as_ref().map(|cookie| cookie.to_str().unwrap().to_owned());
        cache.kept.lock().unwrap().entry(path).or_default().push(Kept { varies, body: body.clone(), cookie });
    }
    let mut response = body.into_response();
    response.headers_mut().extend(cookie.map(|cookie| (SET_COOKIE, cookie)));
    response
}

#[tokio::test]
async fn s_18_a_shared_cache_gives_nobody_what_is_anothers() {
    let upstream = serve(router().layer(SessionLayer::new(sessions()))).await;
    let cache = Cache { upstream: upstream.clone(), client: bare(), kept: Arc::default(), hits: Arc::default() };
    let url = serve(Router::new().fallback(cached).with_state(cache.clone())).await;
    let client = bare();
    let mut ids = Vec::<SessionId>::new();
    for user in ["ada", "grace"] {
        // Each visitor's cookie comes through the cache, from a page that was said to be public.
        let response = client.get(format!("{url}/write/3")).send().await.unwrap();
        let id = id_in(&set_cookie(response.headers()));
        assert!(!ids.contains(&id), "{user} was given the session of another");
        ids.push(id);
    }
    for (n, said) in SAID.into_iter().enumerate() {
        for _ in 0..3 {
            let pages = ids.iter().map(|id| format!("{NAME}={}", id.as_str())).chain([String::new()]);
            let mut seen = Vec::new();
            for cookie in pages {
                let response = client.get(format!("{url}/view/{n}")).header(COOKIE, cookie).send().await.unwrap();
                assert!(response.headers().get(SET_COOKIE).is_none(), "{said:?}");
                seen.push(response.text().await.unwrap());
            }
            assert_eq!(seen, ["nobody", "nobody", "nobody"]);
        }
    }
    // One logs in, behind the cache's back; only she is shown as logged in, and only under her new cookie.
    let login = client.post(format!("{upstream}/login")).header(COOKIE, format!("{NAME}={}", ids[0].as_str()));
    let ada = id_in(&set_cookie(login.send().await.unwrap().headers()));
    for (n, said) in SAID.into_iter().enumerate() {
        for _ in 0..3 {
            for (id, user) in [(&ada, "ada"), (&ids[0], "nobody"), (&ids[1], "nobody")] {
                let cookie = format!("{NAME}={}", id.as_str());
                let page = client.get(format!("{url}/view/{n}")).header(COOKIE, cookie).send().await.unwrap();
                assert_eq!(page.text().await.unwrap(), user, "{said:?}");
            }
        }
    }
    assert!(*cache.hits.lock().unwrap() > 10, "a cache that keeps nothing shows nothing");
}
