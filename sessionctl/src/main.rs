//! The command line of sessionkit: what was said, who carries it out, and the exit status.
//!
//! Reading order: [`args`] (what can be said), then one file per group of commands.

mod admin;
mod args;
mod bench;
mod check;
mod failure;
mod hammer;
mod lab;
mod output;
mod session;
mod store;
mod values;
mod worker;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use clap_complete::Shell;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{Cli, Command, LabArgs};
use crate::failure::Failure;
use crate::output::{Output, escape};
use crate::store::redact;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    let out = Output::new(cli.json);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::Local("start".into(), error)),
    };
    // What somebody wants who has typed nothing else: to see what this is about.
    let command = cli.command.unwrap_or_else(|| Command::Lab(LabArgs::default()));
    let outcome = runtime.block_on(until_told_to_end(command, &out));
    // What still runs has been abandoned by then: a task that waits for a lock, a thread in a measurement.
    runtime.shutdown_timeout(Duration::from_millis(100));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

/// Runs the command; a signal drops it where it stands, so that what it made in the store is removed.
async fn until_told_to_end(command: Command, out: &Output) -> Result<(), Failure> {
    if matches!(command, Command::Hold(_) | Command::Lab(_)) {
        // They give their locks back first.
        return run(command, out).await;
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::local("listen for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::local("listen for signals"))?;
    tokio::select! {
        outcome = run(command, out) => outcome,
        _ = terminate.recv() => Err(Failure::Signal(15)),
        _ = interrupt.recv() => Err(Failure::Signal(2)),
    }
}

async fn run(command: Command, out: &Output) -> Result<(), Failure> {
    match command {
        Command::Lab(args) => lab::lab(args, out).await,
        Command::Check(args) => check::check(args, out).await,
        Command::Hammer(args) => hammer::hammer(args, out).await,
        Command::Get(args) => session::get(args, out).await,
        Command::Set(args) => session::set(args, out).await,
        Command::Incr(args) => session::incr(args, out).await,
        Command::Hold(args) => session::hold(args, out).await,
        Command::Rm(args) => session::rm(args, out).await,
        Command::Ls(args) => admin::ls(args, out).await,
        Command::Locks(args) => admin::locks(args, out).await,
        Command::Unlock(args) => admin::unlock(args, out).await,
        Command::Gc(args) => admin::gc(args, out).await,
        Command::Bench(args) => bench::bench(args, out).await,
        Command::Completions { shell } => completions(shell, out),
        Command::Worker { part } => worker::worker(part).await,
    }
}

fn completions(shell: Shell, out: &Output) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sessionctl", &mut script);
    let script = String::from_utf8_lossy(&script);
    if out.is_json() {
        out.object(&json!({"shell": shell.to_string(), "script": script}))?;
    } else {
        out.raw(script.trim_end())?;
    }
    Ok(())
}

/// Prints help where it was asked for, and what was wrong otherwise, without the secrets and controls of the words it repeats.
fn explain(error: &clap::Error) -> ExitCode {
    let words: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    if words.iter().all(|word| safe(word) == *word) {
        // A reader who has gone is no error.
        let _ = error.print();
    } else {
        // Without colours, because what clap leaves of a control sequence in a word looks like one of its own.
        let text = error.render().to_string();
        let _ = writeln!(io::stderr(), "{}", text.trim_end().lines().map(safe).collect::<Vec<_>>().join("\n"));
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// Takes passwords and control characters out of a line.
fn safe(line: &str) -> String {
    escape(&redact(line))
}

fn report(failure: &Failure) -> ExitCode {
    if let Some(text) = failure.text() {
        // Not eprintln!, which panics when nobody reads.
        let _ = writeln!(io::stderr(), "sessionctl: {text}");
    }
    ExitCode::from(failure.status())
}
