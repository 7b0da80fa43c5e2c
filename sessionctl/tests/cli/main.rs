//! The built program, run as a script would run it: what it prints, where, and how it ends.

#![allow(clippy::unwrap_used, reason = "a helper of a test is part of the test")]

mod admin;
mod bench;
mod check;
mod crash;
mod hammer;
mod lab;
mod memcache;
mod redis;
mod session;
mod sql;
mod usage;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use tempfile::TempDir;

/// A file store of its own.
struct Store(TempDir);

impl Store {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn dsn(&self, options: &str) -> String {
        format!("file://{}{options}", self.0.path().display())
    }

    /// Runs a command on this store.
    fn run(&self, command: &str, rest: &[&str]) -> Answer {
        self.run_with("", command, rest)
    }

    fn run_with(&self, options: &str, command: &str, rest: &[&str]) -> Answer {
        let dsn = self.dsn(options);
        run(&[&[command, dsn.as_str()], rest].concat())
    }

    /// Starts a `hold` and returns once it has the lock.
    fn hold(&self, id: &str, rest: &[&str]) -> Holder {
        self.hold_with("", id, rest)
    }

    fn hold_with(&self, options: &str, id: &str, rest: &[&str]) -> Holder {
        let dsn = self.dsn(options);
        start_hold(&[&[dsn.as_str(), id], rest].concat())
    }
}

/// Starts a `hold` and returns once it has the lock.
fn start_hold(rest: &[&str]) -> Holder {
    let mut child = sessionctl(&[&["hold"], rest].concat()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    Holder { child, stdout }
}

/// A running `hold`; killed at the latest when it is dropped.
struct Holder {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Holder {
    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    fn end(mut self) -> (ExitStatus, String) {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap(), rest)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the program said.
#[derive(Debug)]
struct Answer {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Answer {
    fn of(output: Output) -> Self {
        Self {
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The only text on stdout, after a success.
    #[track_caller]
    fn text(&self) -> &str {
        assert_eq!((self.status, self.stderr.as_str()), (0, ""), "{self:?}");
        self.stdout.trim_end()
    }

    /// Every line of stdout, each of which must be a JSON object.
    #[track_caller]
    fn objects(&self) -> Vec<Value> {
        let objects: Vec<Value> = self.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        assert!(objects.iter().all(Value::is_object), "{self:?}");
        objects
    }

    #[track_caller]
    fn object(&self) -> Value {
        let mut objects = self.objects();
        assert_eq!(objects.len(), 1, "{self:?}");
        objects.remove(0)
    }

    /// Asserts a refusal: nothing on stdout, one line on stderr that holds `part`.
    #[track_caller]
    fn refused(&self, status: i32, part: &str) {
        assert_eq!((self.status, self.stdout.as_str()), (status, ""), "{self:?}");
        assert!(self.stderr.starts_with("sessionctl: ") && self.stderr.lines().count() == 1, "{self:?}");
        assert!(self.stderr.contains(part), "{self:?}");
    }
}

fn sessionctl(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sessionctl"));
    command.args(words).stdin(Stdio::null());
    command
}

fn run(words: &[&str]) -> Answer {
    Answer::of(sessionctl(words).output().unwrap())
}

/// An id that no other test uses.
fn new_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test-{:08}-{:020}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}
