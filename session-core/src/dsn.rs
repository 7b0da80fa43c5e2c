//! Connection strings: parsed once, strict, and never printed with a password.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// The options that every backend accepts, because [`Sessions`](crate::Sessions) or the facade acts on them.
pub const COMMON_OPTIONS: &[&str] = &[
    "prefix",
    "ttl",
    "absolute_ttl",
    "locking",
    "lease",
    "wait",
    "queue",
    "max_hold",
    "strict_expiry",
    "hash_ids",
    "layout",
    "codec",
    "max_bytes",
];

/// A data source name: `scheme://[user[:password]@]host[:port][,host…]/path?option=value&…`.
///
/// User, password, path and values are percent-decoded. An option that is given twice, is empty, or is not known to the backend
/// is an error that names it. `Debug` and every error show neither user nor password.
///
/// ```
/// use session_core::Dsn;
/// let dsn = Dsn::parse("file:///var/lib/app/sessions?depth=2&ttl=20m")?;
/// assert_eq!(dsn.path(), "/var/lib/app/sessions");
/// assert_eq!(dsn.duration("ttl")?, Some(std::time::Duration::from_secs(1200)));
/// # Ok::<(), session_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Dsn {
    scheme: String,
    user: Option<String>,
    password: Option<String>,
    hosts: Vec<String>,
    path: String,
    options: BTreeMap<String, String>,
}

impl Dsn {
    /// The longest accepted text, in bytes.
    pub const MAX_LEN: usize = 16 * 1024;

    /// Parses `text`. Whether the scheme and the options are known is asked later, by whoever knows them.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) with what is wrong and where, without the text itself.
    pub fn parse(text: &str) -> Result<Self> {
        if text.trim().is_empty() {
            return Err(config("it is empty; expected scheme://…, such as file:///var/lib/app/sessions"));
        }
        if text.len() > Self::MAX_LEN {
            return Err(config(format!("{} bytes, at most {} are accepted", text.len(), Self::MAX_LEN)));
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(config("there is no :// in it; expected scheme://…, such as file:///var/lib/app/sessions"));
        };
        let scheme_ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '+';
        if scheme.is_empty() || !scheme.chars().all(scheme_ok) {
            return Err(config("the scheme before :// must be lower-case letters, digits and +"));
        }
        let (place, query) = rest.split_once('?').map_or((rest, ""), |(place, query)| (place, query));
        if place.contains('#') || query.contains('#') {
            return Err(config("a # must be written as %23"));
        }
        let (authority, path) = place.find('/').map_or((place, ""), |slash| place.split_at(slash));
        let (userinfo, hosts) = authority.rsplit_once('@').map_or((None, authority), |(user, hosts)| (Some(user), hosts));
        if userinfo.is_some_and(|user| user.contains('@')) {
            return Err(config("an @ in a user or password must be written as %40"));
        }
        let (user, password) = match userinfo.map(|user| user.split_once(':').map_or((user, None), |(u, p)| (u, Some(p)))) {
            None => (None, None),
            Some((user, password)) => (Some(decode("user", user)?), password.map(|p| decode("password", p)).transpose()?),
        };
        let hosts = if hosts.is_empty() { Vec::new() } else { hosts.split(',').map(host).collect::<Result<_>>()? };
        let mut options = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = decode("option", name)?;
            let value = decode(&name, value)?;
            if value.is_empty() && name != "prefix" {
                return Err(config(format!("option {name} has no value")));
            }
            if options.insert(name.clone(), value).is_some() {
                return Err(config(format!("option {name} is given twice")));
            }
        }
        Ok(Self { scheme: scheme.into(), user, password, hosts, path: decode("path", path)?, options })
    }

    /// Returns what stands before `://`.
    #[must_use]
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// Returns the user, if one is given.
    #[must_use]
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// Returns the password, if one is given.
    #[must_use]
    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    /// Returns the hosts, each with its port if it has one; empty for local stores.
    #[must_use]
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// Returns the path with its leading slash; empty if there is none.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Refuses options that are neither [common](COMMON_OPTIONS) nor in `own`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names the option, the nearest accepted one, and all of them.
    pub fn accept_options(&self, own: &[&str]) -> Result<()> {
        let accepted = || own.iter().chain(COMMON_OPTIONS).copied();
        for name in self.options.keys() {
            if !accepted().any(|known| known == name) {
                let near = accepted().min_by_key(|known| distance(known, name)).filter(|known| distance(known, name) <= 2);
                let near = near.map(|known| format!("; did you mean {known}?")).unwrap_or_default();
                let list = accepted().collect::<Vec<_>>().join(", ");
                let name = name.escape_debug();
                return Err(config(format!("unknown option {name} for {}://{near} (accepted: {list})", self.scheme)));
            }
        }
        Ok(())
    }

    /// Returns the text of an option.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    /// Returns an option that is one of `choices`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that lists the choices.
    pub fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let Some(value) = self.option(name) else { return Ok(None) };
        match choices.iter().find(|(word, _)| *word == value) {
            Some((_, choice)) => Ok(Some(*choice)),
            None => {
                let words = choices.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
                Err(self.refuse(name, &format!("one of {words}")))
            }
        }
    }

    /// Returns an option that is `on` or `off`; `true` and `false` are accepted too.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config).
    pub fn flag(&self, name: &str) -> Result<Option<bool>> {
        self.choice(name, &[("on", true), ("off", false), ("true", true), ("false", false)])
    }

    /// Returns an option that is a whole number within `range`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names the range.
    pub fn number(&self, name: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(value) = self.option(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.refuse(name, &format!("a whole number from {} to {}", range.start(), range.end()))),
        }
    }

    /// Returns an option that is a duration, `500ms`, `30s`, `20m` or `2h`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config).
    pub fn duration(&self, name: &str) -> Result<Option<Duration>> {
        let Some(value) = self.option(name) else { return Ok(None) };
        parse_duration(value).map(Some).ok_or_else(|| self.refuse(name, "a duration such as 500ms, 30s, 20m or 2h"))
    }

    /// Makes the error for a value that is not accepted: names the option, the value and what is expected.
    #[must_use]
    pub fn refuse(&self, name: &str, expected: &str) -> Error {
        let value = self.option(name).unwrap_or_default();
        let cut: String = value.chars().take(40).collect();
        config(format!("option {name}={} is not {expected}", cut.escape_debug()))
    }
}

impl fmt::Debug for Dsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secret = if self.user.is_some() || self.password.is_some() { "***@" } else { "" };
        write!(f, "{}://{secret}{}{}", self.scheme, self.hosts.join(","), self.path)?;
        for (n, (name, value)) in self.options.iter().enumerate() {
            write!(f, "{}{name}={value}", if n == 0 { '?' } else { '&' })?;
        }
        Ok(())
    }
}

/// Reads `500ms`, `30s`, `20m`, `2h`; anything else is `None`.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(millis).map(Duration::from_millis)
}

fn config(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, "dsn", message)
}

fn host(text: &str) -> Result<String> {
    let port_of = |rest: &str| rest.strip_prefix(':').map(|port| matches!(port.parse::<u32>(), Ok(1..=65535)));
    let (name, rest) = match text.strip_prefix('[') {
        Some(v6) => v6.split_once(']').ok_or_else(|| config("an IPv6 address must end with ]"))?,
        None => text.find(':').map_or((text, ""), |colon| text.split_at(colon)),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:%~".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        return Err(config("a host is empty or has a character that a host name cannot have"));
    }
    if !rest.is_empty() && port_of(rest) != Some(true) {
        return Err(config("a port must be a number from 1 to 65535; write a : in a password as %3A"));
    }
    Ok(text.into())
}

fn decode(what: &str, text: &str) -> Result<String> {
    let broken = || config(format!("{} is not valid percent-encoded UTF-8; write a % as %25", what.escape_debug()));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'%' {
            let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()).ok_or_else(broken)?;
            bytes.push(u8::from_str_radix(hex, 16).map_err(|_| broken())?);
            rest = &tail[2..];
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    if bytes.contains(&0) {
        return Err(config(format!("{} holds a NUL", what.escape_debug())));
    }
    String::from_utf8(bytes).map_err(|_| broken())
}

/// The number of edits between two words, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(40).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let edit = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = edit;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let own: &[&str] = &["depth"];
        Dsn::parse(text).and_then(|dsn| dsn.accept_options(own)).expect_err(text).to_string()
    }

    #[test]
    fn every_part_is_found_and_decoded() {
        let dsn =
            Dsn::parse("redis+sentinel://us%40er:p%3A%2F%23@h1:26379,[::1]:26380,h3/mymaster?prefix=app%3A&wait=500ms")
                .unwrap();
        assert_eq!((dsn.scheme(), dsn.user(), dsn.password()), ("redis+sentinel", Some("us@er"), Some("p:/#")));
        assert_eq!(dsn.hosts(), ["h1:26379", "[::1]:26380", "h3"]);
        assert_eq!((dsn.path(), dsn.option("prefix")), ("/mymaster", Some("app:")));
        assert_eq!(dsn.duration("wait").unwrap(), Some(Duration::from_millis(500)));
        assert!(Dsn::parse("memory://").unwrap().hosts().is_empty());
    }

    #[test]
    fn neither_debug_nor_an_error_shows_a_password() {
        let dsn = Dsn::parse("redis://me:hunter2@h/0?lease=hunter").unwrap();
        assert_eq!(format!("{dsn:?}"), "redis://***@h/0?lease=hunter");
        for bad in
            ["redis://me:hunter2@h:99999/0", "redis://me:hunter2%@h", "redis://me:hunter2@h@x", "redis://me:hunter2@h#"]
        {
            assert!(!error(bad).contains("hunter2"), "{bad}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_the_cure() {
        assert!(error("").contains("scheme://"));
        assert!(error("sessions").contains("://"));
        assert!(error("://x").contains("scheme"));
        assert!(error("file:///x?depht=2").contains("did you mean depth?"));
        assert!(error("file:///x?a=1&a=2").contains("twice"));
        assert!(error("file:///x?depth=").contains("no value"));
        assert!(error("redis://h:0").contains("1 to 65535"));
        assert!(error("file:///a%zz").contains("%25"));
        assert!(error("file:///a%00").contains("NUL"));
        let dsn = Dsn::parse("file:///x?depth=9&ttl=20&locking=maybe").unwrap();
        assert!(dsn.number("depth", 0..=3).unwrap_err().to_string().contains("depth=9 is not a whole number from 0 to 3"));
        assert!(dsn.duration("ttl").unwrap_err().to_string().contains("20m"));
        assert!(dsn.flag("locking").unwrap_err().to_string().contains("on, off"));
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("2h"), Some(Duration::from_secs(7200)));
        for bad in ["", "5", "s", "5 s", "-5s", "5d", "99999999999999999999s", "18446744073709551615h"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
