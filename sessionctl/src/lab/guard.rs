//! Who may ask the lab for anything: the page that it served itself, and programs of this machine. Nobody else's page.
//!
//! A browser sends requests for any page that is open in it. So each request is judged by the name it was sent to (a name that an
//! attacker points at this machine is not ours: DNS rebinding), by the page it comes from, and, if it is to change something, by a
//! token that only our own page can read. Nothing here knows what is asked for.

use std::net::{IpAddr, SocketAddr};

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use session_core::{Error, SessionId};
use sha2::{Digest, Sha256};

use crate::failure::chain;

/// Carries the token of a request that changes something. No form can set it, and no other origin without our leave.
pub(super) const TOKEN: &str = "x-lab-token";

/// What every answer carries: nothing is loaded from elsewhere, nothing inline is run, nobody may frame or keep it.
const HEADERS: [(HeaderName, HeaderValue); 9] = [
    (
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
             form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        ),
    ),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (header::VARY, HeaderValue::from_static("accept")),
    (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
    (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
    (HeaderName::from_static("permissions-policy"), HeaderValue::from_static("camera=(), geolocation=(), microphone=()")),
];

/// Why a request was not carried out. The answer says no more than is said here.
#[derive(Debug)]
pub(super) enum Refusal {
    /// Sent to a name that is not ours.
    ForeignHost,
    /// Sent by somebody else's page.
    ForeignPage,
    /// It was to change something, and has no token, or a wrong one.
    NoToken,
    NotFound,
    /// Not what this address takes; the sentence says what it does take, and repeats nothing of what was sent.
    Invalid(String),
    /// A run is under way.
    Busy,
    /// The store refused. What it said is in the log.
    Store(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut correlation = None;
        let (status, code, message) = match self {
            Self::ForeignHost => (
                StatusCode::MISDIRECTED_REQUEST,
                "foreign_host",
                "The lab answers only under the address it has printed.".into(),
            ),
            Self::ForeignPage => {
                (StatusCode::FORBIDDEN, "foreign_page", "The lab answers only its own page, not those of others.".to_owned())
            }
            Self::NoToken => (
                StatusCode::FORBIDDEN,
                "no_token",
                "A request that changes something needs the token of this lab, from /?format=json, in x-lab-token.".into(),
            ),
            Self::NotFound => (StatusCode::NOT_FOUND, "not_found", "There is nothing here, or it is no longer kept.".into()),
            Self::Invalid(message) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid", message),
            Self::Busy => (StatusCode::CONFLICT, "busy", "A run is under way, and two would measure each other.".into()),
            Self::Store(error) => {
                let number = correlate("request", &error);
                let message = format!("The store did not do it. The terminal of the lab says more, under {number}.");
                correlation = Some(number);
                (StatusCode::SERVICE_UNAVAILABLE, "store", message)
            }
        };
        let body = json!({"error": {"code": code, "message": message, "correlation": correlation}});
        (status, Json(body)).into_response()
    }
}

/// Says on stderr what went wrong, and returns the number that it is said under.
pub(super) fn correlate(what: &str, error: &Error) -> String {
    // A number that somebody can read out; it proves nothing, so a clash does no harm.
    let number = SessionId::generate().map_or_else(|_| "unknown".into(), |id| id.as_str()[..8].to_owned());
    eprintln!("sessionctl: lab: {number}: {what}: {} ({})", chain(error), error.kind());
    number
}

/// By which names the lab may be called, and what proves that a change was asked for by its own page.
#[derive(Debug)]
pub(super) struct Guard {
    hosts: Vec<String>,
    token: SessionId,
}

impl Guard {
    /// Guards what listens at `address`, which was asked for as `host`.
    ///
    /// # Errors
    /// [`Unavailable`](session_core::ErrorKind::Unavailable) if the operating system has no randomness to give.
    pub(super) fn new(address: SocketAddr, host: &str) -> session_core::Result<Self> {
        let port = address.port();
        let mut names = vec![host.to_ascii_lowercase(), authority(address.ip())];
        if address.ip().is_loopback() || address.ip().is_unspecified() {
            names.extend(["localhost", "127.0.0.1", "[::1]"].map(Into::into));
        }
        let mut hosts: Vec<_> = names.iter().map(|name| format!("{name}:{port}")).collect();
        if port == 80 {
            hosts.extend(names);
        }
        Ok(Self { hosts, token: SessionId::generate()? })
    }

    pub(super) fn token(&self) -> &str {
        self.token.as_str()
    }

    fn judge(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Refusal> {
        let host = one(headers, header::HOST.as_str()).map_err(|()| Refusal::ForeignHost)?.ok_or(Refusal::ForeignHost)?;
        let host = host.to_ascii_lowercase();
        // A request to a proxy names the host a second time.
        let named = uri.authority().is_none_or(|authority| authority.as_str().eq_ignore_ascii_case(&host));
        if !named || !self.hosts.contains(&host) {
            return Err(Refusal::ForeignHost);
        }
        let foreign = |()| Refusal::ForeignPage;
        if one(headers, header::ORIGIN.as_str()).map_err(foreign)?.is_some_and(|origin| origin != format!("http://{host}")) {
            return Err(Refusal::ForeignPage);
        }
        let fetch = |name: &str| one(headers, name).map_err(foreign);
        let safe = matches!(*method, Method::GET | Method::HEAD);
        match fetch("sec-fetch-site")? {
            // A program, or a browser from before 2023, which sends at least an Origin with what changes something.
            None | Some("same-origin" | "none") => {}
            // Somebody follows a link to the page, which itself holds nothing.
            Some(_)
                if safe
                    && !wants_json(uri, headers)
                    && (fetch("sec-fetch-mode")?, fetch("sec-fetch-dest")?) == (Some("navigate"), Some("document")) => {}
            Some(_) => return Err(Refusal::ForeignPage),
        }
        if safe {
            return Ok(());
        }
        let token = one(headers, TOKEN).map_err(|()| Refusal::NoToken)?.unwrap_or_default();
        // Hashes are compared, so that the time it takes says nothing about the token.
        if Sha256::digest(token) != Sha256::digest(self.token()) {
            return Err(Refusal::NoToken);
        }
        let json = one(headers, header::CONTENT_TYPE.as_str()).is_ok_and(|kind| kind == Some("application/json"));
        if json { Ok(()) } else { Err(Refusal::Invalid("Changes are asked for as application/json.".into())) }
    }
}

/// Judges each request before anything else sees it, and dresses each answer.
pub(super) async fn guard(State(guard): State<std::sync::Arc<Guard>>, request: Request, next: Next) -> Response {
    let mut response = match guard.judge(request.method(), request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    response.headers_mut().extend(HEADERS);
    response
}

/// Whether the same address is to answer with numbers in place of the page.
pub(super) fn wants_json(uri: &Uri, headers: &HeaderMap) -> bool {
    let asked = uri.query().is_some_and(|query| query.split('&').any(|option| option == "format=json"));
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    asked || (accept.contains("application/json") && !accept.contains("text/html"))
}

/// The value of a header that may be there once.
fn one<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, ()> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| ()),
        (Some(_), Some(_)) => Err(()),
    }
}

/// An address as it stands in a URL.
pub(super) fn authority(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab() -> Guard {
        Guard::new(([127, 0, 0, 1], 3000).into(), "127.0.0.1").unwrap()
    }

    fn judge(lab: &Guard, method: &Method, uri: &str, pairs: &[(&'static str, &str)]) -> Result<(), Refusal> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        lab.judge(method, &uri.parse().unwrap(), &headers)
    }

    fn get(pairs: &[(&'static str, &str)]) -> Result<(), Refusal> {
        judge(&lab(), &Method::GET, "/", pairs)
    }

    #[test]
    fn only_our_own_names_are_answered_to() {
        for host in ["127.0.0.1:3000", "localhost:3000", "LOCALHOST:3000", "[::1]:3000"] {
            assert!(get(&[("host", host)]).is_ok(), "{host}");
        }
        for host in
            ["evil.example:3000", "127.0.0.1", "127.0.0.1:3001", "localhost.evil.example:3000", "127.0.0.1.:3000", ""]
        {
            assert!(matches!(get(&[("host", host)]), Err(Refusal::ForeignHost)), "{host}");
        }
        assert!(matches!(get(&[]), Err(Refusal::ForeignHost)));
        let two = [("host", "127.0.0.1:3000"), ("host", "evil.example")];
        assert!(matches!(get(&two), Err(Refusal::ForeignHost)));
        let proxied = judge(&lab(), &Method::GET, "http://evil.example:3000/", &[("host", "127.0.0.1:3000")]);
        assert!(matches!(proxied, Err(Refusal::ForeignHost)));
    }

    #[test]
    fn only_our_own_page_is_answered() {
        let host = ("host", "localhost:3000");
        assert!(get(&[host, ("origin", "http://localhost:3000")]).is_ok());
        for origin in
            ["null", "https://localhost:3000", "http://localhost:3001", "http://127.0.0.1:3000", "http://evil.example", ""]
        {
            assert!(matches!(get(&[host, ("origin", origin)]), Err(Refusal::ForeignPage)), "{origin}");
        }
        for site in ["same-origin", "none"] {
            assert!(get(&[host, ("sec-fetch-site", site)]).is_ok());
        }
        for site in ["cross-site", "same-site", "something-new"] {
            assert!(matches!(get(&[host, ("sec-fetch-site", site)]), Err(Refusal::ForeignPage)), "{site}");
        }
    }

    #[test]
    fn a_link_from_elsewhere_leads_to_the_page_and_to_nothing_else() {
        let link = |dest: &'static str| {
            [
                ("host", "localhost:3000"),
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", dest),
            ]
        };
        assert!(get(&link("document")).is_ok());
        for dest in ["iframe", "embed", "object"] {
            assert!(get(&link(dest)).is_err(), "{dest}");
        }
        assert!(judge(&lab(), &Method::GET, "/sessions?format=json", &link("document")).is_err());
        assert!(judge(&lab(), &Method::POST, "/", &link("document")).is_err());
    }

    #[test]
    fn a_change_needs_the_token_and_no_form_can_send_it() {
        let lab = lab();
        let token = lab.token().to_owned();
        let post = |pairs: &[(&'static str, &str)]| judge(&lab, &Method::POST, "/runs", pairs);
        let (host, json) = (("host", "localhost:3000"), ("content-type", "application/json"));
        assert!(post(&[host, json, (TOKEN, &token)]).is_ok());
        for wrong in [&[host, json][..], &[host, json, (TOKEN, "")], &[host, json, (TOKEN, &token[1..])]] {
            assert!(matches!(post(wrong), Err(Refusal::NoToken)), "{wrong:?}");
        }
        let twice = [host, json, (TOKEN, &token), (TOKEN, &token)];
        assert!(matches!(post(&twice), Err(Refusal::NoToken)));
        for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
            assert!(matches!(post(&[host, (TOKEN, &token), ("content-type", kind)]), Err(Refusal::Invalid(_))), "{kind}");
        }
        assert_ne!(token, Guard::new(([127, 0, 0, 1], 3000).into(), "h").unwrap().token());
    }

    #[test]
    fn numbers_are_asked_for_by_header_or_by_address() {
        let accept = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_str(text).unwrap());
            headers
        };
        assert!(wants_json(&"/runs/1?format=json".parse().unwrap(), &accept("text/html")));
        assert!(wants_json(&"/runs/1".parse().unwrap(), &accept("application/json")));
        assert!(!wants_json(&"/runs/1".parse().unwrap(), &accept("text/html,application/json;q=0.9")));
        assert!(!wants_json(&"/runs/1?format=jsonp".parse().unwrap(), &accept("*/*")));
    }
}
