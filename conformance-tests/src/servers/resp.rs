//! A connection to a Redis server, as small as can be: commands go out, replies come back as text.
//!
//! It is not the client under test and must not share a line with it. It blocks, and knows no command but `AUTH`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a reply may take.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Connection(BufReader<UnixStream>);

impl Connection {
    pub(super) fn open(socket: &Path, user: &str, password: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut connection = Self(BufReader::new(stream));
        connection.ask(&["AUTH", user, password])?;
        Ok(connection)
    }

    /// Sends a command and returns its reply: what is absent as nothing, and the elements of an array as lines.
    ///
    /// # Errors
    /// `Other` with the server's text if it refused; `TimedOut` if it said nothing.
    pub(super) fn ask(&mut self, words: &[&str]) -> io::Result<String> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
        }
        self.0.get_mut().write_all(&request).map_err(named)?;
        self.reply()
    }

    /// Returns the next reply.
    pub(super) fn reply(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line).map_err(named)?;
        let Some((kind, rest)) = line.strip_suffix("\r\n").and_then(|line| line.split_at_checked(1)) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let length = || rest.parse::<i64>().map_err(|_| unexpected(&line));
        match kind {
            "+" | ":" => Ok(rest.to_owned()),
            "-" => Err(io::Error::other(rest.to_owned())),
            "$" => match usize::try_from(length()?) {
                Ok(length) => {
                    let mut bytes = vec![0; length + 2];
                    self.0.read_exact(&mut bytes).map_err(named)?;
                    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
                }
                Err(_) => Ok(String::new()),
            },
            "*" => {
                // An error inside an array is told as such, after the whole of it was read.
                let elements: Vec<_> = (0..length()?).map(|_| self.reply()).collect();
                Ok(elements.into_iter().collect::<io::Result<Vec<_>>>()?.join("\n"))
            }
            _ => Err(unexpected(&line)),
        }
    }
}

fn unexpected(line: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("expected a reply of the second protocol, got {line:?}"))
}

/// A socket with a time-out says that it would block.
fn named(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, format!("no reply within {} s", PATIENCE.as_secs()))
        }
        _ => error,
    }
}
