//! Which cookie carries the id: its name, its attributes, and the rules that they must keep.
//!
//! What the browsers' rules ask for is checked when a cookie is set up, and never when a request comes.

use std::fmt::{self, Write as _};
use std::time::Duration;

use cookie::Cookie;
pub use cookie::SameSite;
use cookie::time::OffsetDateTime;
use http::HeaderValue;
use session_core::{Error, ErrorKind, Result, SessionId};

use crate::keys::{CookieKeys, Sealing};

/// The longest life that browsers give a cookie.
const LONGEST_LIFE: Duration = Duration::from_secs(400 * 24 * 3600);
/// The most that a browser takes as name and value, and as the value of an attribute.
const MOST_BYTES: usize = 4096;
const MOST_ATTRIBUTE: usize = 1024;

/// What becomes of a request that has our cookie more than once. A neighbouring domain can plant one.
#[allow(clippy::exhaustive_enums, reason = "one is taken, or none")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Duplicates {
    /// It counts as one without a cookie. A visitor for whom somebody plants cookies cannot log in, which is better than to
    /// be logged in as somebody else. Cookies whose name begins with `__Host-` cannot be planted.
    #[default]
    Reject,
    /// The first counts that can be an id, of the first four.
    First,
}

/// The cookie that carries the id. Checked: there is none that a browser would refuse.
///
/// | made by | cookie |
/// |---|---|
/// | [`SessionCookie::default`] | `__Host-sid`: Secure, HttpOnly, SameSite=Lax, Path=/; ends with the browser |
/// | [`strict`](Self::strict) | the same with SameSite=Strict: not even sent when a link from elsewhere is followed |
/// | [`embedded`](Self::embedded) | the same with SameSite=None and Partitioned: for pages inside of others' pages |
/// | [`php`](Self::php) | `PHPSESSID`: Secure, HttpOnly, SameSite=Lax, Path=/ |
/// | [`development`](Self::development) | `sid`: HttpOnly, SameSite=Lax, Path=/; for plain HTTP |
/// | [`named`](Self::named) | as the default, under another name |
#[derive(Clone)]
pub struct SessionCookie {
    name: String,
    sealing: Sealing,
    duplicates: Duplicates,
    most: (usize, usize),
    /// What stands behind the value.
    attributes: String,
    removal: HeaderValue,
}

impl SessionCookie {
    /// Begins with `__Host-sid`: Secure, HttpOnly, SameSite=Strict, Path=/.
    pub fn strict() -> SessionCookieBuilder {
        Self::named("__Host-sid").same_site(SameSite::Strict)
    }

    /// Begins with `__Host-sid`: Secure, HttpOnly, SameSite=None, Partitioned, Path=/. Each site that embeds the page has a
    /// session of its own with it.
    pub fn embedded() -> SessionCookieBuilder {
        Self::named("__Host-sid").same_site(SameSite::None).partitioned()
    }

    /// Begins with `PHPSESSID`: Secure, HttpOnly, SameSite=Lax, Path=/. It gives up what the prefix `__Host-` is worth: a
    /// neighbouring domain, and any plain-HTTP page of this one, can plant a cookie of this name.
    pub fn php() -> SessionCookieBuilder {
        Self::named("PHPSESSID")
    }

    /// Begins with `sid`: HttpOnly, SameSite=Lax, Path=/, and sent over plain HTTP, too, where everybody on the way can read
    /// it: for a server on the developer's own machine.
    pub fn development() -> SessionCookieBuilder {
        Self::named("sid").insecure()
    }

    /// Begins with a name: Secure, HttpOnly, SameSite=Lax, Path=/.
    pub fn named(name: impl Into<String>) -> SessionCookieBuilder {
        SessionCookieBuilder::new(name.into())
    }

    /// Returns the name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn duplicates(&self) -> Duplicates {
        self.duplicates
    }

    /// How many bytes and pairs of a request's cookies are looked at.
    pub(crate) fn most(&self) -> (usize, usize) {
        self.most
    }

    pub(crate) fn open(&self, value: &[u8]) -> Option<(SessionId, bool)> {
        // A value may stand in quotes, which are no part of it.
        let inner = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\""));
        self.sealing.open(&self.name, inner.unwrap_or(value))
    }

    /// Writes the header that hands out `id`.
    pub(crate) fn hand_out(&self, id: &SessionId) -> Result<HeaderValue> {
        let value = self.sealing.seal(&self.name, id)?;
        let mut header = String::with_capacity(self.name.len() + 1 + value.len() + self.attributes.len());
        let _ = write!(header, "{}={value}{}", self.name, self.attributes);
        let mut header = HeaderValue::from_maybe_shared(bytes::Bytes::from(header)).expect("its parts were checked");
        header.set_sensitive(true);
        Ok(header)
    }

    /// Writes the header that takes the cookie away.
    pub(crate) fn removal(&self) -> HeaderValue {
        self.removal.clone()
    }
}

impl Default for SessionCookie {
    fn default() -> Self {
        Self::named("__Host-sid").build().expect("it keeps the rules")
    }
}

impl fmt::Debug for SessionCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionCookie")
            .field("name", &self.name)
            .field("attributes", &self.attributes.trim_start_matches("; "))
            .field("sealing", &self.sealing)
            .field("duplicates", &self.duplicates)
            .finish_non_exhaustive()
    }
}

/// A cookie that is being set up; [`build`](Self::build) checks it.
#[derive(Clone, Debug)]
#[must_use]
pub struct SessionCookieBuilder {
    name: String,
    secure: bool,
    http_only: bool,
    same_site: SameSite,
    path: String,
    domain: Option<String>,
    max_age: Option<Duration>,
    partitioned: bool,
    sealing: Sealing,
    duplicates: Duplicates,
    most: (usize, usize),
}

impl SessionCookieBuilder {
    fn new(name: String) -> Self {
        Self {
            name,
            secure: true,
            http_only: true,
            same_site: SameSite::Lax,
            path: "/".into(),
            domain: None,
            max_age: None,
            partitioned: false,
            sealing: Sealing::Plain,
            duplicates: Duplicates::Reject,
            most: (8 * 1024, 128),
        }
    }

    /// Sets whether the cookie comes along when the visitor comes from another site. `None` lets every site use the session.
    pub fn same_site(mut self, same_site: SameSite) -> Self {
        self.same_site = same_site;
        self
    }

    /// Sends the cookie over plain HTTP, too, where everybody on the way can read it.
    pub fn insecure(mut self) -> Self {
        self.secure = false;
        self
    }

    /// Lets scripts of the page read the cookie, those of an attacker included.
    pub fn readable_by_scripts(mut self) -> Self {
        self.http_only = false;
        self
    }

    /// Sends the cookie to all hosts of `domain`, each of which can then use and replace it.
    pub fn domain(mut self, domain: impl Into<String>) -> Self {
        self.domain = Some(domain.into());
        self
    }

    /// Sends the cookie only to paths below `path`. It does not protect from pages at other paths.
    pub fn path(mut self, path: impl Into<String>) -> Self {
        self.path = path.into();
        self
    }

    /// Lets the cookie outlive the browser, for at most 400 days. It counts from when the cookie is set, which is when a session
    /// is first stored or gets a new id, so it should be as long as the absolute time-out: when a session ends before, the store
    /// knows.
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = Some(age.min(LONGEST_LIFE));
        self
    }

    /// Gives each site that embeds the page a cookie of its own.
    pub fn partitioned(mut self) -> Self {
        self.partitioned = true;
        self
    }

    /// Signs the value, so that a forged id is refused without a trip.
    pub fn signed(mut self, keys: CookieKeys) -> Self {
        self.sealing = Sealing::Signed(keys);
        self
    }

    /// Encrypts the value, so that who reads the cookie does not know the id.
    pub fn encrypted(mut self, keys: CookieKeys) -> Self {
        self.sealing = Sealing::Encrypted(keys);
        self
    }

    /// Sets what becomes of a request that has the cookie more than once. Default [`Duplicates::Reject`].
    pub fn duplicates(mut self, policy: Duplicates) -> Self {
        self.duplicates = policy;
        self
    }

    /// Sets how much of a request's cookies is looked at; a cookie behind that is not found. Default 8 KiB and 128 pairs.
    pub fn look_at_most(mut self, bytes: usize, pairs: usize) -> Self {
        self.most = (bytes, pairs);
        self
    }

    /// Checks the rules of browsers and makes the cookie. What makes it weaker than the default is logged, once, as a warning.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that says which rule is broken.
    pub fn build(self) -> Result<SessionCookie> {
        self.check()?;
        let attributes = |value: &str, age: Option<Duration>| {
            let mut cookie =
                Cookie::build((self.name.clone(), value.to_owned())).path(self.path.clone()).same_site(self.same_site);
            if self.secure {
                cookie = cookie.secure(true);
            }
            if self.http_only {
                cookie = cookie.http_only(true);
            }
            if self.partitioned {
                cookie = cookie.partitioned(true);
            }
            if let Some(domain) = &self.domain {
                cookie = cookie.domain(domain.clone());
            }
            if let Some(age) = age {
                let seconds = i64::try_from(age.as_secs()).expect("at most 400 days");
                cookie = cookie.max_age(cookie::time::Duration::seconds(seconds));
            }
            cookie
        };
        let written = attributes("", self.max_age).to_string();
        let removal = attributes("", Some(Duration::ZERO)).expires(OffsetDateTime::UNIX_EPOCH).to_string();
        self.warn();
        Ok(SessionCookie {
            attributes: written[self.name.len() + 1..].to_owned(),
            removal: HeaderValue::try_from(removal).expect("its parts were checked"),
            name: self.name,
            sealing: self.sealing,
            duplicates: self.duplicates,
            most: self.most,
        })
    }

    fn check(&self) -> Result<()> {
        let refuse = |rule: String| Err(Error::new(ErrorKind::Config, "cookie", rule));
        let shown = self.name.escape_debug();
        let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if self.name.is_empty() || !self.name.bytes().all(token) {
            return refuse(format!("{shown:?} is no name for a cookie: letters, digits and !#$%&'*+-.^_`|~ are"));
        }
        let most = MOST_BYTES - self.sealing.longest();
        if self.name.len() > most {
            return refuse(format!(
                "the name has {} bytes; browsers drop a cookie of more than {MOST_BYTES}, which leaves {most}",
                self.name.len()
            ));
        }
        // The longer ones first: each of them begins like a shorter one.
        let prefix = ["__Host-Http-", "__Host-", "__Secure-", "__Http-"]
            .into_iter()
            .find(|prefix| self.name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix)));
        if let Some(prefix) = prefix {
            if !self.name.starts_with(prefix) {
                return refuse(format!("browsers take the prefix of {shown} for {prefix}; write it like that"));
            }
            if !self.secure {
                return refuse(format!("a cookie with the prefix {prefix} must be Secure"));
            }
            if prefix.starts_with("__Host-") && self.domain.is_some() {
                return refuse(format!("a cookie with the prefix {prefix} must have no Domain"));
            }
            if prefix.starts_with("__Host-") && self.path != "/" {
                return refuse(format!("a cookie with the prefix {prefix} must have Path=/"));
            }
            if prefix.ends_with("Http-") && !self.http_only {
                return refuse(format!("a cookie with the prefix {prefix} must be HttpOnly"));
            }
        }
        if self.same_site == SameSite::None && !self.secure {
            return refuse("a cookie with SameSite=None must be Secure".into());
        }
        if self.partitioned && !(self.secure && self.same_site == SameSite::None) {
            return refuse("a cookie that is Partitioned must be Secure and SameSite=None".into());
        }
        let plain = |text: &str| text.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b';');
        if !self.path.starts_with('/') || !plain(&self.path) || self.path.len() > MOST_ATTRIBUTE {
            return refuse("Path must begin with / and have at most 1,024 printable characters without a semicolon".into());
        }
        let is_host = |domain: &String| {
            let part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
            !domain.is_empty() && domain.bytes().all(part) && domain.len() <= MOST_ATTRIBUTE
        };
        if !self.domain.iter().all(is_host) {
            return refuse("Domain must be the name of a host".into());
        }
        if self.max_age.is_some_and(|age| age.as_secs() == 0) {
            return refuse("max_age must be at least a second; a cookie of less is removed at once".into());
        }
        Ok(())
    }

    fn warn(&self) {
        let weak = [
            (!self.secure, "it is sent over plain HTTP"),
            (!self.http_only, "scripts can read it"),
            (self.same_site == SameSite::None && !self.partitioned, "it comes along from every site"),
            (self.domain.is_some(), "every host of its domain gets it"),
        ];
        for (_, why) in weak.into_iter().filter(|(weak, _)| *weak) {
            tracing::warn!(cookie = self.name, "the session cookie is weaker than by default: {why}");
        }
    }
}
