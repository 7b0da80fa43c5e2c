//! How the id comes in and goes out: by a cookie, or by a header where that was asked for.

use http::header::{CACHE_CONTROL, COOKIE, SET_COOKIE, VARY};
use http::{HeaderMap, HeaderName, HeaderValue};
use session_core::{Result, SessionId};

use crate::cookie::SessionCookie;
use crate::presented::Presented;

/// The way of the id.
#[derive(Clone, Debug)]
pub(crate) enum Transport {
    Cookie(Box<SessionCookie>),
    Header(HeaderName),
}

/// What the visitor has to be told about his id.
#[derive(Debug)]
pub(crate) enum Notice {
    Nothing,
    Keep(SessionId),
    Forget,
}

impl Transport {
    /// The name under which the sessions of this layer are known.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Cookie(cookie) => cookie.name(),
            Self::Header(name) => name.as_str(),
        }
    }

    /// Takes what is to be looked at out of a request, in case somebody asks for the session.
    pub(crate) fn fields(&self, headers: &HeaderMap) -> Vec<HeaderValue> {
        let name = match self {
            Self::Cookie(_) => &COOKIE,
            Self::Header(name) => name,
        };
        headers.get_all(name).iter().cloned().collect()
    }

    pub(crate) fn read(&self, fields: &[HeaderValue]) -> Presented {
        match self {
            Self::Cookie(cookie) => Presented::in_cookies(fields, cookie),
            Self::Header(_) => Presented::in_header(fields),
        }
    }

    /// Marks a response to a request whose session was touched: it is for this visitor, and no cache may keep it.
    pub(crate) fn write(&self, headers: &mut HeaderMap, notice: &Notice) -> Result<()> {
        let told = !matches!(notice, Notice::Nothing);
        match (self, notice) {
            (_, Notice::Nothing) => {}
            (Self::Cookie(cookie), Notice::Keep(id)) => drop(headers.append(SET_COOKIE, cookie.hand_out(id)?)),
            (Self::Cookie(cookie), Notice::Forget) => drop(headers.append(SET_COOKIE, cookie.removal())),
            (Self::Header(name), Notice::Keep(id)) => {
                let mut value = HeaderValue::from_str(id.as_str()).expect("an id is letters, digits, comma and dash");
                value.set_sensitive(true);
                headers.insert(name, value);
            }
            (Self::Header(name), Notice::Forget) => drop(headers.insert(name, HeaderValue::from_static(""))),
        }
        self.vary(headers);
        forbid_storing(headers, told);
        Ok(())
    }

    fn vary(&self, headers: &mut HeaderMap) {
        let name = match self {
            Self::Cookie(_) => HeaderValue::from_static("Cookie"),
            Self::Header(name) => HeaderValue::from(name.clone()),
        };
        let says = |field: &HeaderValue| words(field).any(|word| word == b"*" || word.eq_ignore_ascii_case(name.as_bytes()));
        if !headers.get_all(VARY).iter().any(says) {
            headers.append(VARY, name);
        }
    }
}

/// Says `no-store`. A response that the application has made `public` stays so, since it has said so; but not one that tells a
/// visitor his id, which a cache would tell to everybody.
fn forbid_storing(headers: &mut HeaderMap, told: bool) {
    let says = |wanted: &[u8]| {
        let directive =
            |word: &[u8]| word.split(|byte| *byte == b'=').next().is_some_and(|name| name.eq_ignore_ascii_case(wanted));
        headers.get_all(CACHE_CONTROL).iter().any(|field| words(field).any(directive))
    };
    if says(b"no-store") {
        return;
    }
    if says(b"public") || says(b"s-maxage") {
        if !told {
            tracing::warn!("a response that caches may share was made with the session of one visitor");
            return;
        }
        tracing::warn!("a response that caches were to share hands out a session; it is marked no-store");
    }
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
}

fn words(field: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    field.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}
