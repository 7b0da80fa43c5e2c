//! Steps: how a command is announced, run, timed and, if it fails, named so that it can be run again alone.
//!
//! Nothing here knows what the commands are for.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{self, Stdio};
use std::time::{Duration, Instant};

/// A command that can be shown as one would type it.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    words: Vec<String>,
    env: Vec<(&'static str, &'static str)>,
}

/// Makes a command from words without spaces in them.
pub(crate) fn command(words: &str) -> Command {
    Command { words: words.split(' ').map(Into::into).collect(), env: Vec::new() }
}

/// Makes a cargo command.
pub(crate) fn cargo(words: &str) -> Command {
    command(&format!("cargo {words}"))
}

impl Command {
    pub(crate) fn arg(mut self, word: &str) -> Self {
        self.words.push(word.into());
        self
    }

    pub(crate) fn env(mut self, name: &'static str, value: &'static str) -> Self {
        self.env.push((name, value));
        self
    }

    fn shown(&self) -> String {
        let plain = |c: char| c.is_alphanumeric() || "-_./:=@,+%".contains(c);
        let quoted = |word: &str| match !word.is_empty() && word.chars().all(plain) {
            true => word.to_owned(),
            false => format!("'{}'", word.replace('\'', r"'\''")),
        };
        let env = self.env.iter().map(|(name, value)| format!("{name}={} ", quoted(value)));
        env.collect::<String>() + &self.words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }

    fn process(&self, root: &Path) -> process::Command {
        // The cargo that started this program, which need not be the first one in the path.
        let program = match self.words[0].as_str() {
            "cargo" => std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()),
            other => OsString::from(other),
        };
        let mut process = process::Command::new(program);
        process.args(&self.words[1..]).envs(self.env.iter().copied()).current_dir(root).stdin(Stdio::null());
        process
    }
}

/// The step that failed, and the command that shows it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) step: String,
    pub(crate) command: String,
}

/// The steps of one run, done one after the other in the root of the repository.
#[derive(Debug)]
pub(crate) struct Steps {
    root: PathBuf,
    started: Instant,
    done: Vec<(String, Duration, bool)>,
}

impl Steps {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.into(), started: Instant::now(), done: Vec::new() }
    }

    /// Runs a command whose exit status decides.
    pub(crate) fn run(&mut self, step: &str, command: &Command) -> Result<(), Failure> {
        self.take(step, command, |process| process.status().map(|status| status.success()))
    }

    /// Runs a command that must not find anything: not even a package of that name, which cargo reports as an error.
    pub(crate) fn prints_nothing(&mut self, step: &str, command: &Command) -> Result<(), Failure> {
        self.take(step, command, |process| {
            let output = process.stderr(Stdio::piped()).output()?;
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let unknown = err.contains("did not match any packages");
            let good = out.trim().is_empty() && (output.status.success() || unknown);
            if !good {
                eprint!("{out}{err}");
            }
            Ok(good)
        })
    }

    /// Says whether a command can be run and succeeds, without a step of its own.
    pub(crate) fn succeeds(&self, command: &Command) -> bool {
        let mut process = command.process(&self.root);
        process.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    }

    /// Prints every step with its time.
    pub(crate) fn summary(&self) {
        println!("\n{:>9}  step", "seconds");
        for (step, time, good) in &self.done {
            println!("{:>9.1}  {step}{}", time.as_secs_f64(), if *good { "" } else { "  FAILED" });
        }
        println!("{:>9.1}  together", self.started.elapsed().as_secs_f64());
    }

    fn take(
        &mut self,
        step: &str,
        command: &Command,
        run: impl FnOnce(&mut process::Command) -> std::io::Result<bool>,
    ) -> Result<(), Failure> {
        let shown = command.shown();
        println!("\n==> {step}: {shown}");
        let started = Instant::now();
        let good = run(&mut command.process(&self.root)).unwrap_or_else(|error| {
            eprintln!("{} cannot be started: {error}", command.words[0]);
            false
        });
        let time = started.elapsed();
        println!("<== {step}: {} after {:.1} s", if good { "ok" } else { "FAILED" }, time.as_secs_f64());
        self.done.push((step.into(), time, good));
        if good { Ok(()) } else { Err(Failure { step: step.into(), command: shown }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps() -> Steps {
        Steps::new(Path::new("/"))
    }

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let docs = cargo("doc --no-deps").env("RUSTDOCFLAGS", "-D warnings").arg("a b");
        assert_eq!(docs.shown(), "RUSTDOCFLAGS='-D warnings' cargo doc --no-deps 'a b'");
        let quotes = command("sh -c").arg("echo 'a  b' \"$1\"").arg("x").arg("$HOME");
        assert_eq!(quotes.shown(), r#"sh -c 'echo '\''a  b'\'' "$1"' x '$HOME'"#);
    }

    #[test]
    fn a_step_that_fails_or_cannot_start_names_the_command() {
        let mut steps = steps();
        assert!(steps.run("good", &command("true")).is_ok());
        let failure = steps.run("bad", &command("false")).unwrap_err();
        assert_eq!((failure.step.as_str(), failure.command.as_str()), ("bad", "false"));
        assert!(steps.run("none", &command("there-is-no-such-program")).is_err());
        assert_eq!(steps.done.iter().map(|(_, _, good)| *good).collect::<Vec<_>>(), [true, false, false]);
    }

    #[test]
    fn what_must_print_nothing_fails_if_it_prints_or_fails() {
        let mut steps = steps();
        assert!(steps.prints_nothing("silent", &command("true")).is_ok());
        assert!(steps.prints_nothing("talks", &command("echo found")).is_err());
        assert!(steps.prints_nothing("fails", &command("false")).is_err());
        let unknown = command("sh -c").arg("echo 'error: x did not match any packages' >&2; exit 101");
        assert!(steps.prints_nothing("unknown", &unknown).is_ok());
    }
}
