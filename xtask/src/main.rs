//! Every developer command: what runs for `cargo xtask test`, `ci`, `bench` and `pictures`, and in which order.
//!
//! How a step is run and timed is in `step.rs`, what a machine must have in `tools.rs`, which features there are in
//! `manifest.rs`, the servers of a bench in `server.rs`. This program has no dependency, so that it is built in a second on a new machine.

mod manifest;
mod server;
mod step;
mod tools;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use server::{Others, Redis};
use step::{Failure, Steps, cargo};
use tools::CargoTool;

const USAGE: &str = "\
usage: cargo xtask <command>

  test   installs what the tests need and is missing, then runs every test and every doctest
  ci     fmt, clippy, test, docs, each feature alone, dependencies, advisories; needs nothing prepared
  bench  [DSN...] [options of `sessionctl bench`]; without a DSN the file backend and SQLite in a temporary
         directory, memory, and Redis, PostgreSQL, MariaDB and memcached on servers of their own
  pictures
         takes the pictures of the lab in docs/pictures anew";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next();
    let rest: Vec<String> = args.collect();
    // The repository, wherever the command was started from.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository");
    let mut steps = Steps::new(root);
    let outcome = match (command.as_deref(), rest.is_empty()) {
        (Some("test"), true) => test(&mut steps, root),
        (Some("ci"), true) => ci(&mut steps, root),
        (Some("bench"), _) => bench(&mut steps, root, &rest),
        (Some("pictures"), true) => pictures(&mut steps),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    steps.summary();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("\nfailed: {}\nto see it alone: {}", failure.step, failure.command);
            ExitCode::FAILURE
        }
    }
}

/// Every test on a machine that has only Rust.
fn test(steps: &mut Steps, root: &Path) -> Result<(), Failure> {
    let crates: Vec<_> = manifest::packages(root).into_iter().map(|package| package.name).collect();
    tools::install_debian_packages(steps, &crates)?;
    tools::unpack_newer_memcached(steps)?;
    tools::install_cargo_tool(steps, CargoTool::Nextest)?;
    steps.run("test", &cargo("nextest run --workspace --all-features --locked --no-tests=fail"))?;
    // Doctests are not among the tests that nextest knows.
    steps.run("doctest", &cargo("test --doc --workspace --all-features --locked --quiet"))
}

/// What must hold before a change lands. The cheap steps come first, and steps that share build results follow each other.
fn ci(steps: &mut Steps, root: &Path) -> Result<(), Failure> {
    steps.run("fmt", &cargo("fmt --all --check"))?;
    // Not a member of the workspace, and needed by nothing but the bench, which builds it.
    steps.run("fmt peers", &cargo("fmt --manifest-path peers/Cargo.toml --check"))?;
    steps.run("clippy", &cargo("clippy --workspace --all-targets --all-features --locked -- -D warnings"))?;
    let docs = cargo("doc --workspace --no-deps --all-features --locked --quiet");
    steps.run("docs", &docs.env("RUSTDOCFLAGS", "-D warnings"))?;
    test(steps, root)?;
    for package in manifest::packages(root) {
        // Clippy and not check: with it, warnings are errors without a rebuild of all dependencies under other flags.
        let alone = format!("clippy -p {} --no-default-features --locked --quiet", package.name);
        steps.run(&format!("{} bare", package.name), &cargo(&format!("{alone} -- -D warnings")))?;
        for feature in &package.features {
            let command = cargo(&format!("{alone} --features {feature} -- -D warnings"));
            steps.run(&format!("{} +{feature}", package.name), &command)?;
        }
    }
    // Asked for by name only: nobody mends it any more. See deny.toml.
    steps.prints_nothing("no bincode by default", &cargo("tree --workspace --edges normal --invert bincode --locked"))?;
    tools::install_cargo_tool(steps, CargoTool::Deny)?;
    steps.run("deny", &cargo("deny --workspace --locked check bans licenses sources"))?;
    let peers = cargo("deny --manifest-path peers/Cargo.toml --config deny.toml --locked check licenses sources");
    steps.run("deny peers", &peers.arg("--allow").arg("license-not-encountered"))?;
    tools::install_cargo_tool(steps, CargoTool::Audit)?;
    steps.run("audit", &audit(root))
}

/// Looks every dependency up in the advisory database: in the copy that `ADVISORY_DB` names or that lies beside the
/// repository, so that it works without a network, and otherwise in the newest.
fn audit(root: &Path) -> step::Command {
    let audit = "audit --deny unmaintained --deny unsound";
    let copy = std::env::var("ADVISORY_DB").unwrap_or_else(|_| "../shared/advisory-db".into());
    match root.join(&copy).is_dir() {
        true => cargo(&format!("{audit} --no-fetch --stale --db")).arg(&copy),
        false => cargo(audit),
    }
}

/// Measures the stores that are named, or one of each kind.
fn bench(steps: &mut Steps, root: &Path, args: &[String]) -> Result<(), Failure> {
    let scratch = Scratch(std::env::temp_dir().join(format!("sessionkit-bench-{}", std::process::id())));
    // Built apart: what they depend on cannot be linked beside ours.
    steps.run(
        "peers",
        &cargo("build --release --locked --quiet --manifest-path peers/Cargo.toml --target-dir target/peers"),
    )?;
    let mut command = cargo("run --release --locked --quiet -p sessionctl -- bench --peers target/peers/release/peers");
    // They live until the bench is done.
    let (redis, others);
    if !args.iter().any(|arg| arg.contains("://")) {
        tools::install_debian_packages(steps, &["session-memcache", "session-redis", "session-sql"].map(Into::into))?;
        let started = tools::find("redis-server").ok_or(io::ErrorKind::NotFound.into()).and_then(|path| Redis::start(&path));
        redis = started.map_err(|error| Failure { step: format!("bench: {error}"), command: "redis-server".into() })?;
        let failed = |error| Failure { step: format!("bench: {error}"), command: "cargo run --example servers".into() };
        others = Others::start(root).map_err(failed)?;
        std::fs::create_dir_all(&scratch.0)
            .map_err(|error| Failure { step: format!("bench: {error}"), command: "mkdir".into() })?;
        command = command.arg(&format!("file://{}/files", scratch.0.display())).arg("memory://").arg(&redis.dsn());
        command = command.arg(&format!("sqlite://{}/sessions.db?create=on", scratch.0.display()));
        for dsn in &others.dsns {
            let is_database = !dsn.starts_with("memcache://");
            command = command.arg(&format!("{dsn}{}", if is_database { "?create=on" } else { "" }));
        }
    }
    for arg in args {
        command = command.arg(arg);
    }
    steps.run("bench", &command)
}

/// Takes the pictures of the lab, of the program as it is given away.
fn pictures(steps: &mut Steps) -> Result<(), Failure> {
    tools::install_debian_packages(steps, &["sessionctl".into()])?;
    steps.run("lab", &cargo("build --release --locked --quiet -p sessionctl"))?;
    steps.run("pictures", &cargo("run --release --locked --quiet -p sessionctl --example pictures -- docs/pictures"))
}

/// A directory that is gone when the command is done.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // It may never have been created.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
