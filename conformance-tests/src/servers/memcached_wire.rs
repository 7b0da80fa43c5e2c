//! A connection to a memcached server, as small as can be: lines go out, lines and items come back.
//!
//! It is not the client under test and must not share a line with it. It blocks, and speaks the classic commands, which leave alone
//! what the meta commands mark an item with.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// How long the server may take to say something.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How long to wait before a crawler is asked again that was at work for somebody else.
const PAUSE: Duration = Duration::from_millis(5);

/// What begins a line that says no.
const REFUSALS: [&str; 3] = ["ERROR", "CLIENT_ERROR ", "SERVER_ERROR "];

/// An item as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemcachedItem {
    /// The number that its writer has put beside it.
    pub flags: u32,
    /// The number of its last change.
    pub cas: u64,
    /// Its value.
    pub data: Vec<u8>,
}

/// A connection to a [`Memcached`](super::Memcached).
#[derive(Debug)]
pub struct MemcachedConnection(BufReader<TcpStream>);

impl MemcachedConnection {
    pub(super) fn open(server: SocketAddr, login: Option<(&str, &str)>, patience: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&server, patience)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        stream.set_nodelay(true)?;
        let mut connection = Self(BufReader::new(stream));
        if let Some((user, password)) = login {
            // The key is of no importance: the first item that is stored is the proof.
            connection.set("login", 0, 0, format!("{user} {password}").as_bytes())?;
        }
        Ok(connection)
    }

    /// Sends a line and returns the first line of the answer, which is all of it for commands such as `version`, `flush_all`,
    /// `md key` and `touch key 60`.
    ///
    /// # Errors
    /// `Other` with the server's text if it refuses; `TimedOut` if it says nothing for 10 s; `UnexpectedEof` and others if the
    /// connection is gone.
    pub fn ask(&mut self, line: &str) -> io::Result<String> {
        self.send(&[line.as_bytes(), b"\r\n"])?;
        self.line()
    }

    /// Returns an item, `None` if it is absent.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn get(&mut self, key: &str) -> io::Result<Option<MemcachedItem>> {
        let head = self.ask(&format!("gets {key}"))?;
        if head == "END" {
            return Ok(None);
        }
        let words: Vec<_> = head.split(' ').collect();
        let ["VALUE", name, flags, length, cas] = words[..] else { return Err(unexpected(&head)) };
        let number = |text: &str| text.parse::<u64>().map_err(|_| unexpected(&head));
        let (flags, length) = (number(flags)?, number(length)?);
        let (Ok(flags), Ok(length)) = (u32::try_from(flags), usize::try_from(length)) else { return Err(unexpected(&head)) };
        if name != key {
            return Err(unexpected(&head));
        }
        let mut data = vec![0; length];
        self.0.read_exact(&mut data).map_err(named)?;
        match (self.line()?.as_str(), self.line()?.as_str()) {
            ("", "END") => Ok(Some(MemcachedItem { flags, cas: number(cas)?, data })),
            (_, other) => Err(unexpected(other)),
        }
    }

    /// Stores an item for so many seconds, zero for ever, whatever was there before.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn set(&mut self, key: &str, flags: u32, seconds: u32, data: &[u8]) -> io::Result<()> {
        self.send(&[format!("set {key} {flags} {seconds} {}\r\n", data.len()).as_bytes(), data, b"\r\n"])?;
        match self.line()?.as_str() {
            "STORED" => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Stores many items of the same value for ever, and returns when the server has.
    ///
    /// # Errors
    /// As [`ask`](Self::ask). That an item could not be stored is none.
    pub fn flood(&mut self, keys: impl IntoIterator<Item = String>, data: &[u8]) -> io::Result<()> {
        let mut request = Vec::new();
        for key in keys {
            request.extend_from_slice(format!("set {key} 0 0 {} noreply\r\n", data.len()).as_bytes());
            request.extend_from_slice(data);
            request.extend_from_slice(b"\r\n");
            if request.len() > 1 << 16 {
                self.send(&[&request])?;
                request.clear();
            }
        }
        self.send(&[&request, b"mn\r\n"])?;
        loop {
            // It complains of an item that did not fit, although nobody wants an answer.
            match self.raw_line()?.as_str() {
                "MN" => return Ok(()),
                line if line.starts_with("SERVER_ERROR ") => {}
                other => return Err(unexpected(other)),
            }
        }
    }

    /// Removes an item, and says whether it was there.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn delete(&mut self, key: &str) -> io::Result<bool> {
        match self.ask(&format!("delete {key}"))?.as_str() {
            "DELETED" => Ok(true),
            "NOT_FOUND" => Ok(false),
            other => Err(unexpected(other)),
        }
    }

    /// Returns the keys of all items that are there, in no order.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn keys(&mut self) -> io::Result<Vec<String>> {
        let end = Instant::now() + PATIENCE;
        let mut line = self.ask("lru_crawler metadump all")?;
        while line.starts_with("BUSY") && Instant::now() < end {
            std::thread::sleep(PAUSE);
            line = self.ask("lru_crawler metadump all")?;
        }
        let mut keys = Vec::new();
        while line != "END" {
            let key = line.strip_prefix("key=").and_then(|rest| rest.split(' ').next());
            keys.push(key.and_then(unescaped).ok_or_else(|| unexpected(&line))?);
            line = self.line()?;
        }
        Ok(keys)
    }

    /// Returns what the server counts, such as `cmd_set`, `evictions` and `curr_items`, by name; a group other than `""` is
    /// `"settings"`, `"items"`, `"slabs"`.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn stats(&mut self, group: &str) -> io::Result<BTreeMap<String, String>> {
        let mut line = self.ask(format!("stats {group}").trim_end())?;
        let mut stats = BTreeMap::new();
        while line != "END" {
            let entry = line.strip_prefix("STAT ").and_then(|rest| rest.split_once(' '));
            let (name, value) = entry.ok_or_else(|| unexpected(&line))?;
            stats.insert(name.to_owned(), value.to_owned());
            line = self.line()?;
        }
        Ok(stats)
    }

    fn send(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        self.0.get_mut().write_all(&parts.concat()).map_err(named)
    }

    /// Reads a line that is no refusal.
    fn line(&mut self) -> io::Result<String> {
        let line = self.raw_line()?;
        if REFUSALS.iter().any(|refusal| line.starts_with(refusal)) {
            return Err(io::Error::other(line));
        }
        Ok(line)
    }

    fn raw_line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line).map_err(named)?;
        // The crawler ends its lines like this.
        let Some(line) = line.strip_suffix('\n') else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
    }
}

/// Undoes what the crawler does to keys.
fn unescaped(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(code, 16).ok()?);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

fn unexpected(line: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("expected another reply than {line:?}"))
}

/// A socket with a time-out says that it would block.
fn named(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "no reply in time"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_were_written() {
        assert_eq!(unescaped("session%3Alock%2Ea-b").as_deref(), Some("session:lock.a-b"));
        for broken in ["a%", "a%2", "a%zz", "%ff"] {
            assert_eq!(unescaped(broken), None, "{broken}");
        }
    }
}
