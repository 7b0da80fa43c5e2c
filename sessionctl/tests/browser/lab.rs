//! A running lab, and what its numbers are as a program reads them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

/// It ends with this value.
pub(crate) struct Lab {
    child: Child,
    pub(crate) url: String,
    pub(crate) backends: Vec<String>,
}

impl Lab {
    /// Starts `program`, and returns once it says where it is.
    pub(crate) fn start(program: &Path, dsns: &[String]) -> Self {
        let mut command = Command::new(program);
        command.args(["lab", "--port", "0", "--json"]);
        for dsn in dsns {
            command.args(["--dsn", dsn]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).expect("it says where it is");
        let url = told["url"].as_str().unwrap().trim_end_matches('/').to_owned();
        let backends = serde_json::from_value(told["backends"].clone()).unwrap();
        Self { child, url, backends }
    }

    pub(crate) fn port(&self) -> u16 {
        self.url.rsplit_once(':').unwrap().1.parse().unwrap()
    }

    /// The numbers of an address of the page.
    #[track_caller]
    pub(crate) fn numbers(&self, address: &str) -> Value {
        let (status, body) = self.get(address);
        assert_eq!(status, 200, "{address}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Whether there is anything at an address.
    pub(crate) fn has(&self, address: &str) -> bool {
        self.get(address).0 == 200
    }

    fn get(&self, address: &str) -> (u16, String) {
        let path = address.strip_prefix(&self.url).unwrap_or(address);
        let mut stream = TcpStream::connect(("127.0.0.1", self.port())).unwrap();
        let host = self.url.strip_prefix("http://").unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}\r\naccept: application/json\r\nconnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        // Told, and not killed: it has a directory to remove.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}
