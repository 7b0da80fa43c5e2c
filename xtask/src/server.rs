//! Servers for a bench: a Redis server, private, on a free loopback port, with nothing on disk; and others.
//!
//! The tests have a starter of their own, in `conformance-tests`; this program has no dependency, so that it starts Redis itself, and
//! has an example of that crate start what is harder to start.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server that ends with this value.
#[derive(Debug)]
pub(crate) struct Redis {
    child: Child,
    port: u16,
}

impl Redis {
    /// Starts `program` and returns once it answers.
    pub(crate) fn start(program: &Path) -> io::Result<Self> {
        // Given back at once: between here and the server somebody else may take it, and then the server ends and says so.
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let child = Command::new(program)
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .current_dir(std::env::temp_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let mut server = Self { child, port };
        let patience = Instant::now() + PATIENCE;
        while !server.answers() {
            if let Some(status) = server.child.try_wait()? {
                return Err(io::Error::other(format!("{} ended: {status}", program.display())));
            }
            if Instant::now() > patience {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    pub(crate) fn dsn(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    fn answers(&self) -> bool {
        let ask = || {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"PING\r\n")?;
            let mut answer = [0; 7];
            stream.read_exact(&mut answer)?;
            Ok::<_, io::Error>(&answer == b"+PONG\r\n")
        };
        ask().unwrap_or(false)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A PostgreSQL, a MariaDB and a memcached server that end with this value.
#[derive(Debug)]
pub(crate) struct Others {
    child: Child,
    pub(crate) dsns: Vec<String>,
}

impl Others {
    /// Builds what starts them, in the repository `root`, and returns once they answer.
    pub(crate) fn start(root: &Path) -> io::Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut child = Command::new(cargo)
            .args(["run", "--release", "--locked", "--quiet", "-p", "conformance-tests", "--features", "servers"])
            .args(["--example", "servers"])
            .current_dir(root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut this = Self { child, dsns: Vec::new() };
        this.dsns = lines.take(3).collect::<io::Result<_>>()?;
        match this.dsns.len() {
            3 => Ok(this),
            _ => Err(io::Error::other("a server did not start")),
        }
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // They end with their starter, which reads that it is over.
        let _ = self.child.wait();
    }
}
