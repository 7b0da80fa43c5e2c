//! A liar: sessions as php-memcached keeps them, whose lock and writes nothing connects.
//!
//! The value of the lock is a constant, so that nobody can tell whose it is; the unlock deletes whatever lock there is; and the write
//! is a plain `set`, which asks neither for the lock nor for the last write. As long as everybody is in time, nothing is lost.
//!
//! It is not for use, and shares no line with the backend that it stands beside.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use session_core::{
    Access, Error, ErrorKind, Expect, OpenRequest, OpenSession, Record, Result, SessionHandler, SessionId, Ttl, WriteId,
    Written, async_trait,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// The first and the longest wait between two tries for a lock; each is twice the one before.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// How long a session lives.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// The liar.
#[derive(Clone, Debug)]
pub(crate) struct PhpMemcached {
    server: SocketAddr,
    idle: Arc<Mutex<Vec<Wire>>>,
}

impl PhpMemcached {
    pub(crate) fn new(server: SocketAddr) -> Self {
        Self { server, idle: Arc::default() }
    }

    /// Sends a command and returns the first line of the answer, and the value that follows it.
    async fn ask(&self, operation: &'static str, command: &[u8]) -> Result<(String, Vec<u8>)> {
        let broken =
            |error: io::Error| Error::new(ErrorKind::Unknown, operation, "memcached did not answer").with_source(error);
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut wire = match idle {
            Some(wire) => wire,
            None => Wire(BufReader::new(TcpStream::connect(self.server).await.map_err(broken)?)),
        };
        let answer = wire.ask(command).await.map_err(broken)?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(wire);
        Ok(answer)
    }

    /// Takes the lock as soon as there is none.
    async fn lock(&self, id: &SessionId, wait: Duration, lease: Duration) -> Result<()> {
        let seconds = lease.as_secs().max(1);
        let add = format!("add memc.sess.lock.{} 0 {seconds} 1\r\n1\r\n", id.as_str());
        let end = Instant::now() + wait;
        let mut pause = PAUSES.0;
        loop {
            if self.ask("lock", add.as_bytes()).await?.0 == "STORED" {
                return Ok(());
            }
            if Instant::now() + pause > end {
                return Err(Error::new(ErrorKind::LockTimeout, "lock", "it was not free within the wait"));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn unlock(&self, id: &SessionId) -> Result<()> {
        self.ask("unlock", format!("delete memc.sess.lock.{}\r\n", id.as_str()).as_bytes()).await.map(drop)
    }

    async fn get(&self, id: &SessionId) -> Result<Option<Record>> {
        let (line, data) = self.ask("read", format!("get memc.sess.{}\r\n", id.as_str()).as_bytes()).await?;
        Ok((line != "END").then(|| Record::new(data, Ttl::new(TTL))))
    }

    async fn set(&self, id: &SessionId, data: &[u8]) -> Result<()> {
        let head = format!("set memc.sess.{} 0 {} {}\r\n", id.as_str(), TTL.as_secs(), data.len());
        let (line, _) = self.ask("write", &[head.as_bytes(), data, b"\r\n"].concat()).await?;
        if line == "STORED" { Ok(()) } else { Err(Error::new(ErrorKind::Unavailable, "write", "it was refused")) }
    }

    async fn delete(&self, id: &SessionId) -> Result<()> {
        self.ask("destroy", format!("delete memc.sess.{}\r\n", id.as_str()).as_bytes()).await.map(drop)
    }
}

#[async_trait]
impl SessionHandler for PhpMemcached {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        let mut opening = PhpOpening { php: self.clone(), id: id.clone(), locked: false };
        match request.access {
            Access::Exclusive { wait, lease } if request.expect != Expect::Fresh => {
                self.lock(id, wait, lease).await?;
                opening.locked = true;
            }
            Access::Exclusive { .. } | Access::ReadOnly | Access::Optimistic | Access::Destroy => {}
        }
        Ok(Box::new(opening))
    }

    async fn gc(&self, _: NonZeroU32) -> Result<u64> {
        Ok(0)
    }
}

/// A session between `session_start` and `session_write_close`.
#[derive(Debug)]
struct PhpOpening {
    php: PhpMemcached,
    id: SessionId,
    locked: bool,
}

#[async_trait]
impl OpenSession for PhpOpening {
    async fn read(&mut self) -> Result<Option<Record>> {
        self.php.get(&self.id).await
    }

    async fn write(&mut self, record: &Record, _: WriteId) -> Result<Written> {
        self.php.set(&self.id, &record.data).await?;
        Ok(Written::Applied)
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        let removed = self.php.get(&self.id).await?;
        self.php.delete(&self.id).await?;
        Ok(removed)
    }

    async fn close(&mut self) -> Result<()> {
        if std::mem::take(&mut self.locked) { self.php.unlock(&self.id).await } else { Ok(()) }
    }
}

/// A connection.
#[derive(Debug)]
struct Wire(BufReader<TcpStream>);

impl Wire {
    async fn ask(&mut self, command: &[u8]) -> io::Result<(String, Vec<u8>)> {
        self.0.get_mut().write_all(command).await?;
        let line = self.line().await?;
        let mut data = Vec::new();
        if line.starts_with("VALUE ") {
            let length = line.rsplit(' ').next().and_then(|length| length.parse().ok());
            data.resize(length.ok_or(io::ErrorKind::InvalidData)?, 0);
            self.0.read_exact(&mut data).await?;
            // What ends the value, and what ends the answer.
            for _ in 0..2 {
                self.line().await?;
            }
        }
        Ok((line, data))
    }

    async fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line).await?;
        let line = line.strip_suffix("\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(line.to_owned())
    }
}
