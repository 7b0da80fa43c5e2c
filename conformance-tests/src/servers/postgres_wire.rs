//! A connection to a PostgreSQL server or to what stands before one, as small as can be: SQL goes out, rows come back as text.
//!
//! It is not the client under test and must not share a line with it. It blocks, knows the simple protocol only, and cannot prove
//! who it is: the socket has to trust it.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long the server may take to say something.
const PATIENCE: Duration = Duration::from_secs(10);

/// The version of the protocol: 3.0.
const VERSION: u32 = 3 << 16;

/// A connection to a [`Postgres`](super::Postgres) or a [`PgBouncer`](super::PgBouncer), with its own session, transaction, and
/// locks. Dropping it ends them.
#[derive(Debug)]
pub struct PostgresConnection(BufReader<UnixStream>);

impl PostgresConnection {
    pub(super) fn open(socket: &Path, user: &str, database: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut connection = Self(BufReader::new(stream));
        let mut hello = VERSION.to_be_bytes().to_vec();
        for word in ["user", user, "database", database, ""] {
            hello.extend_from_slice(word.as_bytes());
            hello.push(0);
        }
        connection.send(&[], &hello)?;
        connection.rows()?;
        Ok(connection)
    }

    /// Does one or more statements, in one transaction if they do not say otherwise, and returns the rows of all of them. `NULL` is
    /// the empty string.
    ///
    /// # Errors
    /// `Other` with `SQLSTATE: text` if the server refuses; `TimedOut` if it says nothing for 10 s; `UnexpectedEof` and others if
    /// the connection is gone.
    pub fn query(&mut self, sql: &str) -> io::Result<Vec<Vec<String>>> {
        let mut text = sql.as_bytes().to_vec();
        text.push(0);
        match self.send(b"Q", &text) {
            // What it said before it hung up is still to be read.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => self.rows(),
        }
    }

    fn send(&mut self, kind: &[u8], body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(body.len() + 4).map_err(io::Error::other)?;
        self.0.get_mut().write_all(&[kind, &length.to_be_bytes(), body].concat()).map_err(named)
    }

    /// Reads until the server waits for us.
    fn rows(&mut self) -> io::Result<Vec<Vec<String>>> {
        let (mut rows, mut refused) = (Vec::new(), None);
        loop {
            let (kind, body) = match self.message() {
                Ok(message) => message,
                // Some errors are the last that is said.
                Err(error) => return Err(refused.unwrap_or(error)),
            };
            match kind {
                b'D' => rows.push(row(&body).ok_or_else(unexpected)?),
                b'E' => refused = Some(refusal(&body)),
                // A server that stops at once says so in a notice.
                b'N' if refusal(&body).to_string().starts_with("57P") => refused = Some(refusal(&body)),
                b'R' if !body.starts_with(&[0; 4]) => {
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the server wants a proof of who we are"));
                }
                b'Z' => return refused.map_or(Ok(rows), Err),
                // Notices, parameters, descriptions and counts.
                _ => {}
            }
        }
    }

    fn message(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.0.read_exact(&mut head).map_err(named)?;
        let [kind, length @ ..] = head;
        let length = u32::from_be_bytes(length).checked_sub(4).ok_or_else(unexpected)?;
        let mut body = Vec::new();
        let read = (&mut self.0).take(length.into()).read_to_end(&mut body).map_err(named)?;
        if read < length as usize {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((kind, body))
    }
}

/// Reads a row: the number of values, and each with its length, which is negative for `NULL`.
fn row(body: &[u8]) -> Option<Vec<String>> {
    let (count, mut rest) = body.split_first_chunk()?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk()?;
        let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        let (value, after) = after.split_at_checked(length)?;
        row.push(String::from_utf8_lossy(value).into_owned());
        rest = after;
    }
    Some(row)
}

/// Reads an error: fields that begin with a letter and end with a zero.
fn refusal(body: &[u8]) -> io::Error {
    let fields: Vec<_> = body.split(|byte| *byte == 0).collect();
    let field = |letter| fields.iter().find_map(|field| field.strip_prefix(&[letter])).unwrap_or_default();
    io::Error::other(format!("{}: {}", String::from_utf8_lossy(field(b'C')), String::from_utf8_lossy(field(b'M'))))
}

fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "expected a message of the third protocol of PostgreSQL")
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
