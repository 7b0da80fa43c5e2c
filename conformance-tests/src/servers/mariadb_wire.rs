//! A connection to a MariaDB server, as small as can be: SQL goes out, rows come back as text.
//!
//! It is not the client under test and must not share a line with it. It blocks, knows the text protocol only, and has no password.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::sql::NAME;

/// How long the server may take to say something.
const PATIENCE: Duration = Duration::from_secs(10);

/// What we can do: a database in the hello, protocol 4.1, transactions, its passwords, many statements, many results, and a choice
/// of proofs.
const ABILITIES: u32 = 0x8 | 0x200 | 0x2000 | 0x8000 | 0x1_0000 | 0x2_0000 | 0x8_0000;

/// The longest packet that needs no second one.
const LONGEST: usize = 0xff_fffe;

/// `utf8mb4_general_ci`.
const COLLATION: u8 = 45;

const QUIT: u8 = 1;

const QUERY: u8 = 3;

/// The status that tells that the result of another statement follows.
const MORE_RESULTS: u16 = 8;

/// A connection to a [`MariaDb`](super::MariaDb), with its own session, transaction, and locks. Dropping it ends them.
#[derive(Debug)]
pub struct MariaDbConnection {
    stream: BufReader<UnixStream>,
    next: u8,
}

impl MariaDbConnection {
    pub(super) fn open(socket: &Path, user: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut connection = Self { stream: BufReader::new(stream), next: 0 };
        let greeting = connection.reply()?;
        if greeting.first() != Some(&10) {
            return Err(unexpected());
        }
        let mut hello = [ABILITIES.to_le_bytes(), u32::MAX.to_le_bytes()].concat();
        hello.push(COLLATION);
        hello.extend_from_slice(&[0; 23]);
        // The empty one is the proof.
        for word in [user, "", NAME, "mysql_native_password"] {
            hello.extend_from_slice(word.as_bytes());
            hello.push(0);
        }
        connection.send(&hello)?;
        while connection.reply()?.first() == Some(&0xfe) {
            // It would like another proof, and has to do with this one.
            connection.send(&[])?;
        }
        Ok(connection)
    }

    /// Does one or more statements and returns the rows of all of them. `NULL` is the empty string.
    ///
    /// # Errors
    /// `Other` with `number (SQLSTATE): text` if the server refuses, and then it has not done the rest; `TimedOut` if it says nothing
    /// for 10 s; `UnexpectedEof` and others if the connection is gone.
    pub fn query(&mut self, sql: &str) -> io::Result<Vec<Vec<String>>> {
        self.next = 0;
        self.send(&[&[QUERY], sql.as_bytes()].concat())?;
        let mut rows = Vec::new();
        while self.result(&mut rows)? & MORE_RESULTS != 0 {}
        Ok(rows)
    }

    /// Reads the result of one statement, and returns the status of the server after it.
    fn result(&mut self, rows: &mut Vec<Vec<String>>) -> io::Result<u16> {
        let head = self.reply()?;
        if let Some(mut counts) = head.strip_prefix(&[0]) {
            return number(&mut counts)
                .and_then(|_| number(&mut counts))
                .and_then(|_| status(counts))
                .ok_or_else(unexpected);
        }
        let columns = number(&mut head.as_slice()).ok_or_else(unexpected)?;
        for _ in 0..columns {
            self.reply()?;
        }
        end(&self.reply()?).ok_or_else(unexpected)?;
        self.rows(columns, rows)
    }

    fn rows(&mut self, columns: usize, rows: &mut Vec<Vec<String>>) -> io::Result<u16> {
        loop {
            let packet = self.reply()?;
            if let Some(status) = end(&packet) {
                return Ok(status);
            }
            let mut rest = packet.as_slice();
            rows.push((0..columns).map(|_| value(&mut rest)).collect::<Option<_>>().ok_or_else(unexpected)?);
        }
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        if packet.len() > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too long for one packet"));
        }
        let [first, second, third, ..] = packet.len().to_le_bytes();
        let head = [first, second, third, self.next];
        self.next = self.next.wrapping_add(1);
        match self.stream.get_mut().write_all(&[&head, packet].concat()) {
            // What it said before it hung up is still to be read.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(named(error)),
            _ => Ok(()),
        }
    }

    /// Reads what the server says next.
    ///
    /// # Errors
    /// `Other` if that is an error.
    fn reply(&mut self) -> io::Result<Vec<u8>> {
        let mut reply = Vec::new();
        loop {
            let mut head = [0; 4];
            self.stream.read_exact(&mut head).map_err(named)?;
            let [first, second, third, number] = head;
            self.next = number.wrapping_add(1);
            let length = usize::from_le_bytes([first, second, third, 0, 0, 0, 0, 0]);
            let start = reply.len();
            reply.resize(start + length, 0);
            self.stream.read_exact(&mut reply[start..]).map_err(named)?;
            if length <= LONGEST {
                return if reply.first() == Some(&0xff) { Err(refusal(&reply)) } else { Ok(reply) };
            }
        }
    }
}

impl Drop for MariaDbConnection {
    fn drop(&mut self) {
        // Otherwise the server writes down that we were cut off.
        self.next = 0;
        let _ = self.send(&[QUIT]);
    }
}

/// Reads the packet after columns and after rows: a mark, the number of warnings, the status.
fn end(packet: &[u8]) -> Option<u16> {
    (packet.len() < 9).then(|| packet.strip_prefix(&[0xfe])).flatten().and_then(|rest| status(rest.get(2..)?))
}

fn status(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|status| u16::from_le_bytes(*status))
}

/// Reads a number of one byte, or of those that the first one tells.
fn number(rest: &mut &[u8]) -> Option<usize> {
    let (first, after) = rest.split_first()?;
    let length = match first {
        0xfc => 2,
        0xfd => 3,
        0xfe => 8,
        0..=0xfa => {
            *rest = after;
            return Some((*first).into());
        }
        _ => return None,
    };
    let (bytes, after) = after.split_at_checked(length)?;
    *rest = after;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
}

/// Reads a value with its length before it, or the mark of `NULL`.
fn value(rest: &mut &[u8]) -> Option<String> {
    if let Some(after) = rest.strip_prefix(&[0xfb]) {
        *rest = after;
        return Some(String::new());
    }
    let length = number(rest)?;
    let (value, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(String::from_utf8_lossy(value).into_owned())
}

/// Reads an error: a mark, its number, a `#` and five letters if the server knows already who we are, the text.
fn refusal(packet: &[u8]) -> io::Error {
    let read = || {
        let (number, text) = packet.get(1..)?.split_first_chunk()?;
        let text = String::from_utf8_lossy(text);
        let number = u16::from_le_bytes(*number);
        let (state, text) = text.strip_prefix('#').and_then(|text| text.split_at_checked(5)).unwrap_or(("HY000", &text));
        Some(io::Error::other(format!("{number} ({state}): {text}")))
    };
    read().unwrap_or_else(unexpected)
}

fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "expected a packet of the protocol of MariaDB")
}

/// A socket with a time-out says that it would block.
fn named(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, format!("the server says nothing for {} s", PATIENCE.as_secs()))
        }
        _ => error,
    }
}
