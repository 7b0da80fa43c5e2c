//! Whole requests: an application behind a socket of this machine, and visitors that each keep a connection to it open.
//!
//! The program of the peers has this very file, so that nothing differs but the session.

use std::io::{Error, ErrorKind, Result};
use std::net::{Ipv4Addr, SocketAddr};

use axum::Router;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// An application. Dropped, it takes no more connections.
pub(crate) struct Served {
    address: SocketAddr,
    _server: JoinSet<Result<()>>,
}

impl Served {
    pub(crate) async fn start(application: Router) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, application).await });
        Ok(Self { address, _server: server })
    }
}

/// As many headers as an answer may have.
const HEADERS: usize = 32;

/// Who asks: with the cookies of his first answer, and for the next answer when he has one.
pub(crate) struct Visitor {
    connection: TcpStream,
    cookies: String,
    answer: Vec<u8>,
}

impl Visitor {
    /// Has an application begin a session.
    pub(crate) async fn welcome(at: &Served) -> Result<Self> {
        let connection = TcpStream::connect(at.address).await?;
        connection.set_nodelay(true)?;
        let mut this = Self { connection, cookies: String::new(), answer: Vec::new() };
        this.cookies = this.post("/begin").await?.join("; ");
        Ok(this)
    }

    /// Has it change that session.
    pub(crate) async fn count(&mut self) -> Result<()> {
        self.post("/count").await.map(drop)
    }

    /// Sends a request and waits for the whole answer; returns the cookies in it.
    async fn post(&mut self, path: &str) -> Result<Vec<String>> {
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: {}\r\ncookie: {}\r\ncontent-length: 0\r\n\r\n",
            Ipv4Addr::LOCALHOST,
            self.cookies
        );
        self.connection.write_all(request.as_bytes()).await?;
        self.answer.clear();
        loop {
            if self.connection.read_buf(&mut self.answer).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if let Some(cookies) = whole(&self.answer)? {
                return Ok(cookies);
            }
        }
    }
}

/// Returns the cookies in `answer` if that is all of it.
fn whole(answer: &[u8]) -> Result<Option<Vec<String>>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(begin) = head.parse(answer).map_err(Error::other)? else { return Ok(None) };
    let named = |name: &'static str| {
        let values = head.headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        values.filter_map(|header| std::str::from_utf8(header.value).ok())
    };
    let length = named("content-length").find_map(|length| length.parse::<usize>().ok());
    match (head.code, length) {
        (Some(200), Some(length)) if answer.len() < begin + length => Ok(None),
        (Some(200), Some(_)) => {
            let pairs = named("set-cookie").filter_map(|told| told.split(';').next());
            Ok(Some(pairs.map(str::to_owned).collect()))
        }
        (Some(200), None) => Err(Error::other("an answer does not say its length")),
        (code, _) => Err(Error::other(format!("a request ended with {}", code.unwrap_or(0)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_once_all_of_it_is_there() {
        let answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Path=/\r\ncontent-length: 2\r\nset-cookie: b=2\r\n\r\n17";
        for length in 0..answer.len() {
            assert_eq!(whole(&answer[..length]).expect("the beginning of an answer"), None, "{length} bytes");
        }
        assert_eq!(whole(answer).expect("an answer"), Some(vec!["a=1".to_owned(), "b=2".to_owned()]));
    }

    #[test]
    fn what_is_no_answer_of_the_application_is_an_error() {
        for (answer, fact) in [
            (&b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"[..], "503"),
            (b"HTTP/1.1 200 OK\r\n\r\n", "length"),
            (b"220 mail.example.org\r\n\r\n", "invalid HTTP version"),
        ] {
            let error = whole(answer).expect_err("no answer").to_string();
            assert!(error.contains(fact), "{error}");
        }
    }
}
