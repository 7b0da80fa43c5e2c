//! What a request may show, and what becomes of it: nothing that is not exactly one id reaches the store.

use axum::http::HeaderValue;
use reqwest::header::{COOKIE, HeaderName, SET_COOKIE};
use session_core::{SessionId, Sessions};
use session_web::{CookieKeys, Duplicates, SessionCookie, SessionLayer};

use super::support::*;

/// A server that has one session with 1 in it.
struct Place {
    url: String,
    store: Counting,
    id: SessionId,
}

impl Place {
    async fn new(layer: impl FnOnce(Sessions) -> SessionLayer) -> Self {
        let store = Counting::new();
        let url = serve(app(layer(store.sessions()))).await;
        let id = begin(&url).await;
        store.count();
        Self { url, store, id }
    }

    async fn with(cookie: SessionCookie) -> Self {
        Self::new(|sessions| SessionLayer::new(sessions).with_cookie(cookie)).await
    }

    /// Says what a page finds in the session of a request with these `Cookie` fields, and how often the store was asked.
    async fn reads(&self, fields: &[&[u8]]) -> (String, usize) {
        let mut request = bare().get(format!("{}/read", self.url));
        for field in fields {
            request = request.header(COOKIE, HeaderValue::from_bytes(field).unwrap());
        }
        let response = request.send().await.unwrap();
        assert!(response.headers().get(SET_COOKIE).is_none(), "nothing was stored, so there is nothing to tell");
        let text = response.text().await.unwrap();
        (text, self.store.count())
    }

    async fn finds(&self, field: &str) {
        assert_eq!(self.reads(&[field.as_bytes()]).await, ("1".into(), 1), "{field:?}");
    }

    async fn ignores(&self, field: &[u8]) {
        assert_eq!(self.reads(&[field]).await, ("0".into(), 0), "{:?}", String::from_utf8_lossy(field));
    }
}

#[tokio::test]
async fn s_15_a_name_is_compared_byte_by_byte_and_never_decoded() {
    let place = Place::with(SessionCookie::default()).await;
    let id = place.id.as_str();
    place.finds(&format!("{NAME}={id}")).await;
    place.finds(&format!("a=b; {NAME}={id}; c=d")).await;
    place.finds(&format!("a=b;{NAME}={id};")).await;
    for like in [
        "%5f%5fHost-sid",
        "%5F%5FHost-sid",
        "__Host%2Dsid",
        "__host-sid",
        "__HOST-SID",
        "__Host-Sid",
        "..Host-sid",
        "[_Host-sid",
        "__Host-sid ",
        "__Host-sid[]",
        "__Host-sid.",
        "_Host-sid",
        "___Host-sid",
        "__Host_sid",
        "sid",
        "__Secure-sid",
        "\"__Host-sid\"",
    ] {
        place.ignores(format!("{like}={id}").as_bytes()).await;
        place.ignores(format!("a=b; {like}={id}").as_bytes()).await;
    }
    // A second space belongs to the name; so does a tab.
    place.ignores(format!("a=b;  {NAME}={id}").as_bytes()).await;
    place.ignores(format!("a=b;\t{NAME}={id}").as_bytes()).await;
    place.ignores(NAME.as_bytes()).await;
    place.ignores(format!("={NAME}={id}").as_bytes()).await;
}

#[tokio::test]
async fn what_is_no_id_never_reaches_the_store() {
    let place = Place::with(SessionCookie::default()).await;
    let id = place.id.as_str();
    place.finds(&format!("{NAME}=\"{id}\"")).await;
    let ok = "a".repeat(22);
    let mut bad: Vec<Vec<u8>> = ["", "\"\"", "../../../../../../etc/passwd", "%2e%2e%2fpasswdpasswdpasswd", "=", "a"]
        .map(|text| text.as_bytes().to_vec())
        .into();
    for tail in [&b" "[..], b"/", b"%00", b"\xc3\xa9", b"\xff", b"=", b"\"", b"\t", b"_", b"."] {
        bad.push([ok.as_bytes(), tail].concat());
    }
    bad.extend([ok[..21].into(), vec![b'a'; 257], format!("\"{ok}").into_bytes(), format!("{id} ").into_bytes()]);
    for value in bad {
        // HTTP takes white space from the end of a header itself, so something follows.
        place.ignores(&[NAME.as_bytes(), b"=", &value, b"; a=b"].concat()).await;
    }
}

#[tokio::test]
async fn an_id_that_is_unknown_is_looked_up_and_never_adopted() {
    let place = Place::with(SessionCookie::default()).await;
    let offered = SessionId::generate().unwrap();
    let cookie = format!("{NAME}={}", offered.as_str());
    assert_eq!(place.reads(&[cookie.as_bytes()]).await, ("0".into(), 1));
    let response = bare().post(format!("{}/count", place.url)).header(COOKIE, cookie).send().await.unwrap();
    assert_ne!(id_in(&set_cookie(response.headers())), offered);
    assert!(!place.store.sessions().view(&offered).await.unwrap().exists());
    assert_eq!(place.store.stored().await, 2);
}

#[tokio::test]
async fn s_16_of_several_cookies_none_counts_unless_the_first_was_asked_for() {
    let place = Place::with(SessionCookie::default()).await;
    let first = Place::with(SessionCookie::strict().duplicates(Duplicates::First).build().unwrap()).await;
    for (place, planted_first) in [(&place, "0"), (&first, "0")] {
        let ours = format!("{NAME}={}", place.id.as_str());
        let planted = format!("{NAME}={}", SessionId::generate().unwrap().as_str());
        let garbage = format!("{NAME}=garbage");
        let takes_first = std::ptr::eq(place, &first);
        let (one, zero) = (("1".to_owned(), 1), ("0".to_owned(), 0));
        let expect = |taken: &(String, usize)| if takes_first { taken.clone() } else { zero.clone() };
        // In one field and in two, which mean the same.
        for split in [false, true] {
            let send = async |pairs: &[&String]| {
                let fields: Vec<String> = match split {
                    true => pairs.iter().map(|pair| (*pair).clone()).collect(),
                    false => vec![pairs.iter().map(|pair| pair.as_str()).collect::<Vec<_>>().join("; ")],
                };
                place.reads(&fields.iter().map(String::as_bytes).collect::<Vec<_>>()).await
            };
            assert_eq!(send(&[&ours]).await, one);
            assert_eq!(send(&[&ours, &planted]).await, expect(&one));
            assert_eq!(send(&[&planted, &ours]).await, expect(&(planted_first.into(), 1)));
            assert_eq!(send(&[&ours, &ours]).await, expect(&one));
            assert_eq!(send(&[&garbage, &ours]).await, expect(&one));
            assert_eq!(send(&[&garbage, &garbage]).await, zero);
            // Four are looked at, however many there are.
            assert_eq!(send(&[&garbage, &garbage, &garbage, &ours]).await, expect(&one));
            assert_eq!(send(&[&garbage, &garbage, &garbage, &garbage, &ours]).await, zero);
            assert_eq!(send(&vec![&ours; 50]).await, expect(&one));
        }
    }
}

#[tokio::test]
async fn s_19_an_id_comes_from_the_cookie_and_from_nowhere_else() {
    let place = Place::with(SessionCookie::default()).await;
    let id = place.id.as_str();
    let client = bare();
    for name in [NAME, "sid", "x-session-id", "authorization", "x-cookie"] {
        let named = HeaderName::from_bytes(name.to_lowercase().as_bytes()).unwrap();
        let request = client.get(format!("{}/read?{name}={id}&PHPSESSID={id}", place.url)).header(named, id);
        assert_eq!(request.send().await.unwrap().text().await.unwrap(), "0");
        let request = client.post(format!("{}/count?{name}={id}", place.url));
        let posted = request.header("content-type", "application/x-www-form-urlencoded").body(format!("{name}={id}"));
        assert_eq!(posted.send().await.unwrap().text().await.unwrap(), "1", "a session of its own");
        assert_eq!(place.store.count(), 1, "the one that was created");
    }
}

#[tokio::test]
async fn s_19_a_header_carries_the_id_only_where_it_was_asked_for_and_then_no_cookie_does() {
    let name = HeaderName::from_static("x-session-id");
    let store = Counting::new();
    let url = serve(app(SessionLayer::new(store.sessions()).with_header(name.clone()))).await;
    let client = bare();
    let response = client.post(format!("{url}/count")).send().await.unwrap();
    assert!(response.headers().get(SET_COOKIE).is_none());
    assert_eq!(values(response.headers(), HeaderName::from_static("vary")), [name.as_str()]);
    let id = response.headers()[&name].to_str().unwrap().to_owned();
    let counted = client.post(format!("{url}/count")).header(&name, &id).send().await.unwrap();
    assert!(counted.headers().get(&name).is_none(), "the client has the right one");
    assert_eq!(counted.text().await.unwrap(), "2");
    let cookie = client.get(format!("{url}/read")).header(COOKIE, format!("x-session-id={id}; {NAME}={id}"));
    assert_eq!(cookie.send().await.unwrap().text().await.unwrap(), "0");
    let twice = client.get(format!("{url}/read")).header(&name, &id).header(&name, &id);
    assert_eq!(twice.send().await.unwrap().text().await.unwrap(), "0");
    let gone = client.post(format!("{url}/logout")).header(&name, &id).send().await.unwrap();
    assert_eq!(values(gone.headers(), name), [""]);
}

#[tokio::test]
async fn s_20_a_cookie_is_found_within_the_limits_and_not_behind_them() {
    let place = Place::with(SessionCookie::default()).await;
    let ours = format!("{NAME}={}", place.id.as_str());
    // 8 KiB, the cookie and what separates it included.
    let filler = |length: usize| format!("a={}", "b".repeat(length - 2));
    place.finds(&format!("{}; {ours}", filler(8192 - ours.len() - 1))).await;
    place.ignores(format!("{}; {ours}", filler(8192 - ours.len())).as_bytes()).await;
    // 128 pairs, empty ones too.
    place.finds(&format!("{}{ours}", "a=;".repeat(127))).await;
    place.ignores(format!("{}{ours}", "a=;".repeat(128)).as_bytes()).await;
    place.finds(&format!("{}{ours}", ";".repeat(127))).await;
    place.ignores(format!("{}{ours}", ";".repeat(128)).as_bytes()).await;
    // As many in as many fields.
    let fields: Vec<_> = std::iter::repeat_n("a=b", 60).collect();
    let bytes = |fields: &[&str]| fields.iter().map(|field| field.as_bytes().to_vec()).collect::<Vec<_>>();
    let send = async |fields: Vec<Vec<u8>>| place.reads(&fields.iter().map(Vec::as_slice).collect::<Vec<_>>()).await;
    assert_eq!(send(bytes(&[&fields[..], &[&ours]].concat())).await.0, "1");
    // As much as the server takes at all.
    place.ignores("a=;".repeat(100_000).as_bytes()).await;

    let wide = Place::with(SessionCookie::strict().look_at_most(1 << 20, 200_000).build().unwrap()).await;
    wide.finds(&format!("{}{NAME}={}", "a=;".repeat(100_000), wide.id.as_str())).await;
}

fn keys(seed: u8) -> CookieKeys {
    CookieKeys::new((seed..seed + 32).collect::<Vec<u8>>()).unwrap()
}

#[tokio::test]
async fn a_signed_or_encrypted_cookie_that_was_not_made_here_never_reaches_the_store() {
    for cookie in [SessionCookie::strict().signed(keys(1)), SessionCookie::strict().encrypted(keys(1))] {
        let store = Counting::new();
        let url = serve(app(SessionLayer::new(store.sessions()).with_cookie(cookie.build().unwrap()))).await;
        let client = bare();
        let response = client.post(format!("{url}/count")).send().await.unwrap();
        let good = set_cookie(response.headers()).split(';').next().unwrap().to_owned();
        store.count();
        let read = async |cookie: &str| {
            let request = client.get(format!("{url}/read")).header(COOKIE, cookie);
            (request.send().await.unwrap().text().await.unwrap(), store.count())
        };
        assert_eq!(read(&good).await, ("1".into(), 1));
        let made_up = SessionId::generate().unwrap();
        let turned = good.replace('0', "1");
        let forged = [format!("{NAME}={}", made_up.as_str()), good[..good.len() - 1].into(), format!("{good}0"), turned];
        for forged in forged {
            assert_eq!(read(&forged).await, ("0".into(), 0), "{forged}");
        }
    }
}

#[tokio::test]
async fn a_cookie_of_an_older_key_is_taken_and_replaced_with_the_next_save() {
    let store = Counting::new();
    let serve_with = async |keys: CookieKeys| {
        let cookie = SessionCookie::strict().encrypted(keys).build().unwrap();
        serve(app(SessionLayer::new(store.sessions()).with_cookie(cookie))).await
    };
    let old = CookieKeys::new((9..80).collect::<Vec<u8>>()).unwrap();
    let both = keys(1).and_older((9..80).collect::<Vec<u8>>()).unwrap();
    let (before, during, after) = (serve_with(old).await, serve_with(both).await, serve_with(keys(1)).await);
    let client = bare();
    let pair = |headers: &reqwest::header::HeaderMap| set_cookie(headers).split(';').next().unwrap().to_owned();
    let first = pair(client.post(format!("{before}/count")).send().await.unwrap().headers());
    let seen = client.get(format!("{during}/view")).header(COOKIE, &first).send().await.unwrap();
    assert!(seen.headers().get(SET_COOKIE).is_none(), "a view sets no cookie");
    assert_eq!(seen.text().await.unwrap(), "1");
    let replaced = client.post(format!("{during}/count")).header(COOKIE, &first).send().await.unwrap();
    let second = pair(replaced.headers());
    assert_eq!(replaced.text().await.unwrap(), "2");
    for (cookie, found) in [(&first, "0"), (&second, "2")] {
        let request = client.get(format!("{after}/read")).header(COOKIE, cookie);
        assert_eq!(request.send().await.unwrap().text().await.unwrap(), found);
    }
    let kept = client.post(format!("{during}/count")).header(COOKIE, &second).send().await.unwrap();
    assert!(kept.headers().get(SET_COOKIE).is_none(), "the client has the right one");
}
