//! Child processes of a case or of the hammer: how they are started, spoken to, stopped, killed and buried.
//!
//! Both sides speak in lines over the child's standard input and output. Nothing here knows what the lines mean.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::sync::mpsc;

/// Begins each line of a child. What else it prints, such as the words of a test runner, may stand before it.
const MARK: &str = "@child ";

/// How many lines without the mark are kept, to be shown when a child ends too early.
const OTHER_LINES: usize = 20;

/// A child process that does not outlive this value: dropping it kills the process, stopped or not, and reaps it.
#[derive(Debug)]
pub(crate) struct Child {
    process: std::process::Child,
    input: Option<ChildStdin>,
    lines: mpsc::UnboundedReceiver<String>,
    others: Arc<Mutex<VecDeque<String>>>,
}

impl Child {
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = process.stdin.take();
        let output = process.stdout.take().expect("the standard output was just piped");
        let (sender, lines) = mpsc::unbounded_channel();
        let others = Arc::new(Mutex::new(VecDeque::new()));
        let remembered = Arc::clone(&others);
        // A thread of its own: it ends with the pipe, and no reader of a pipe may block a runtime.
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some((_, told)) = line.split_once(MARK) {
                    if sender.send(told.to_owned()).is_err() {
                        return;
                    }
                } else {
                    let mut others = remembered.lock().unwrap_or_else(PoisonError::into_inner);
                    others.push_back(line);
                    if others.len() > OTHER_LINES {
                        others.pop_front();
                    }
                }
            }
        });
        Ok(Self { process, input, lines, others })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends a line. A child that has ended is an error.
    pub(crate) fn send(&mut self, line: &str) -> io::Result<()> {
        let input = self.input.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        input.write_all(format!("{line}\n").as_bytes())
    }

    /// Returns the next line, `None` if the child has ended and said everything.
    ///
    /// # Errors
    /// `TimedOut` if neither happened within `limit`.
    pub(crate) async fn line(&mut self, limit: Duration) -> io::Result<Option<String>> {
        tokio::time::timeout(limit, self.lines.recv()).await.map_err(|_| io::ErrorKind::TimedOut.into())
    }

    /// Returns the last of what the child printed without the mark.
    pub(crate) fn other_lines(&self) -> String {
        let others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// Stops the whole process, as a debugger, a suspended machine or an overloaded host does, and returns once it stands still.
    pub(crate) fn stop(&self) -> io::Result<()> {
        self.signal(Signal::SIGSTOP)?;
        waitid(self.id(), WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
        Ok(())
    }

    /// Lets a stopped process go on.
    pub(crate) fn go_on(&self) -> io::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Kills the process, as the kernel does when memory is short, and reaps it. What it had said before can still be read.
    pub(crate) fn kill(&mut self) -> io::Result<ExitStatus> {
        self.input = None;
        self.process.kill()?;
        self.process.wait()
    }

    /// Returns a line that has come already.
    pub(crate) fn line_now(&mut self) -> Option<String> {
        self.lines.try_recv().ok()
    }

    /// Says whether the process stands still.
    pub(crate) fn is_stopped(&self) -> bool {
        // Nothing is consumed: a later wait sees the same.
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        matches!(waitid(self.id(), flags), Ok(WaitStatus::Stopped(..)))
    }

    /// Returns how the process ended, if it has.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.process.try_wait()
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        // Not yet reaped, so the pid cannot belong to anybody else.
        Ok(kill(self.raw_pid(), signal)?)
    }

    fn raw_pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.process.id()).expect("a pid is a positive i32"))
    }

    fn id(&self) -> Id<'static> {
        Id::Pid(self.raw_pid())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // An error means that it has ended and was reaped before.
        let _ = self.kill();
    }
}

/// The child's side: the lines of the parent, in order. The process exits when the parent closes its end or dies, so that no
/// child is left behind.
pub(crate) fn parent_lines() -> mpsc::UnboundedReceiver<String> {
    let (sender, lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
        std::process::exit(0);
    });
    lines
}

/// The child's side: says a line, in one piece.
pub(crate) fn tell_parent(line: &str) {
    // A test runner may have begun a line of its own.
    let mut output = io::stdout().lock();
    // A parent that is gone ends this process through its input.
    let _ = output.write_all(format!("\n{MARK}{line}\n").as_bytes()).and_then(|()| output.flush());
}
