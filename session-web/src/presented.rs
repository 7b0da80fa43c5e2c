//! What a request shows of a session: the one id in its cookies, if there is exactly one and it can be an id.
//!
//! Everything in here comes from outside. It is looked at once, up to a limit, byte by byte: a name is never decoded, trimmed or
//! compared without regard to case. What is found has not been looked up anywhere.

use http::HeaderValue;
use session_core::SessionId;

use crate::cookie::{Duplicates, SessionCookie};

/// How many values of our name are looked at.
const CANDIDATES: usize = 4;

/// What a request shows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Presented {
    pub(crate) id: Option<SessionId>,
    /// Whether the visitor should get the same id again, written anew.
    pub(crate) outdated: bool,
    /// Whether the visitor has sent anything under our name.
    pub(crate) sent: bool,
}

impl Presented {
    /// Looks for `cookie` in the `Cookie` fields of a request.
    pub(crate) fn in_cookies<'a>(fields: impl IntoIterator<Item = &'a HeaderValue>, cookie: &'a SessionCookie) -> Self {
        let candidates = Candidates::new(fields, cookie).take(CANDIDATES);
        Self::choose(candidates, cookie.duplicates(), |value| cookie.open(value))
    }

    /// Looks at the values of the header that carries the id.
    pub(crate) fn in_header<'a>(fields: impl IntoIterator<Item = &'a HeaderValue>) -> Self {
        let open = |value: &[u8]| Some((SessionId::parse(std::str::from_utf8(value).ok()?)?, true));
        Self::choose(fields.into_iter().map(HeaderValue::as_bytes).take(CANDIDATES), Duplicates::Reject, open)
    }

    fn choose<'a>(
        mut candidates: impl Iterator<Item = &'a [u8]>,
        policy: Duplicates,
        open: impl Fn(&[u8]) -> Option<(SessionId, bool)>,
    ) -> Self {
        let Some(first) = candidates.next() else { return Self::default() };
        let found = match policy {
            Duplicates::First => open(first).or_else(|| candidates.find_map(&open)),
            Duplicates::Reject if candidates.next().is_some() => {
                tracing::debug!("a request came with several session cookies; it counts as one without");
                None
            }
            Duplicates::Reject => open(first),
        };
        if found.is_none() {
            tracing::debug!("what a request sent as its session is no id");
        }
        let outdated = found.as_ref().is_some_and(|(_, newest)| !newest);
        Self { id: found.map(|(id, _)| id), outdated, sent: true }
    }
}

/// The values of one name, within the limits, without an allocation.
struct Candidates<'a, I> {
    fields: I,
    rest: Option<&'a [u8]>,
    name: &'a [u8],
    bytes: usize,
    pairs: usize,
}

impl<'a, I: Iterator<Item = &'a HeaderValue>> Candidates<'a, I> {
    fn new(fields: impl IntoIterator<Item = &'a HeaderValue, IntoIter = I>, cookie: &'a SessionCookie) -> Self {
        let (bytes, pairs) = cookie.most();
        Self { fields: fields.into_iter(), rest: None, name: cookie.name().as_bytes(), bytes, pairs }
    }

    /// Returns the next pair, without what separates it from the one before.
    fn pair(&mut self) -> Option<&'a [u8]> {
        let rest = match self.rest.take() {
            Some(rest) => rest,
            None => self.fields.next()?.as_bytes(),
        };
        let within = &rest[..rest.len().min(self.bytes)];
        let end = within.iter().position(|byte| *byte == b';');
        // A pair that goes on behind the limit is not a pair.
        if end.is_none() && within.len() < rest.len() || self.pairs == 0 {
            return None;
        }
        let pair = &within[..end.unwrap_or(within.len())];
        self.pairs -= 1;
        self.bytes = self.bytes.saturating_sub(pair.len() + 1);
        if let Some(end) = end {
            let rest = &rest[end + 1..];
            // One space belongs to the separator, and a second to the name.
            self.rest = Some(rest.strip_prefix(b" ").unwrap_or(rest));
        }
        Some(pair)
    }
}

impl<'a, I: Iterator<Item = &'a HeaderValue>> Iterator for Candidates<'a, I> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        loop {
            let pair = self.pair()?;
            if let Some(value) = pair.strip_prefix(self.name).and_then(|rest| rest.strip_prefix(b"=")) {
                return Some(value);
            }
        }
    }
}
