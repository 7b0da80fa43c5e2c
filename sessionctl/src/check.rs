//! `check`: the conformance suite against the store that a DSN names, case by case.
//!
//! Nothing here knows what a case does. What is here: a namespace for each, a bound on how many run at once, and the report.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use conformance_tests::{Case, Harness, Outcome, cases, claims, run_case};
use serde::{Deserialize, Serialize};
use serde_json::json;
use session_core::{Dsn, MemoryHandler, SessionHandler, SessionLock};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::args::{CheckArgs, Part};
use crate::failure::Failure;
use crate::output::{Align, Cell, Output, Style, Table, escape, micros};
use crate::store::{Place, Stores, lock, redact};
use crate::worker;

/// How many cases run at the same time: most of them wait for time to pass.
const AT_ONCE: usize = 4;

/// Stores without a network between can keep leases this short.
const TICK: Duration = Duration::from_millis(50);

/// How long is waited for a store to be removed, which somebody who was killed may still use.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize)]
struct Line<'a> {
    case: &'a str,
    suite: &'a str,
    outcome: &'static str,
    ms: f64,
    detail: &'a str,
}

pub(crate) async fn check(args: CheckArgs, out: &Output) -> Result<(), Failure> {
    let chosen = choose(args.only.as_deref())?;
    let place = Place::new(&args.dsn, "check").await?;
    let store = match place.stores() {
        None => Store::Memory(Arc::new(MemoryHarness::new(&args.dsn)?)),
        Some(stores) => Store::Shared(SharedHarness::new(stores, &args.dsn)?),
    };
    let claims = store.claims().await?;
    let (chosen, left_out): (Vec<&'static Case>, Vec<_>) =
        chosen.into_iter().partition(|case| claims.contains(&case.suite()));
    if let ([], [first, ..]) = (&chosen[..], &left_out[..]) {
        return Err(Failure::usage(format!("{} needs {}", first.name(), needs(first.suite()))));
    }
    let mut report = Report::new(out, &args.dsn, &chosen)?;
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let mut running = JoinSet::new();
    for case in chosen {
        let (store, permits) = (store.for_one_case(), permits.clone());
        running.spawn(async move {
            let _permit = permits.acquire().await.expect("nobody closes it");
            (case, store.run(case).await)
        });
    }
    while let Some(ended) = running.join_next().await {
        let (case, outcome) = ended.expect("a case's panics are caught");
        report.case(case, &outcome)?;
    }
    report.end(&left_out)
}

/// What a store must have for a suite that not every store can be held to.
fn needs(suite: &str) -> &'static str {
    match suite {
        "processes" => "a store that processes can share",
        "trips" => "one server in plain TCP, so that a proxy can stand before it",
        "lock" => "a lock that can be used alone",
        "optimistic" => "optimistic writes",
        "admin" => "a store that can be listed",
        _ => "what this store has not",
    }
}

/// The store that is checked.
enum Store {
    Memory(Arc<MemoryHarness>),
    Shared(SharedHarness),
}

impl Store {
    async fn claims(&self) -> Result<Vec<&'static str>, Failure> {
        Ok(match self {
            Self::Memory(harness) => claims(&**harness).await?,
            Self::Shared(harness) => {
                let claims = claims(harness).await;
                harness.sweep().await;
                claims?
            }
        })
    }

    fn for_one_case(&self) -> Self {
        match self {
            Self::Memory(harness) => Self::Memory(harness.clone()),
            Self::Shared(harness) => Self::Shared(harness.for_one_case()),
        }
    }

    async fn run(self, case: &'static Case) -> Outcome {
        match self {
            Self::Memory(harness) => run_case(case, harness).await,
            Self::Shared(harness) => {
                let harness = Arc::new(harness);
                let outcome = run_case(case, harness.clone()).await;
                harness.sweep().await;
                outcome
            }
        }
    }
}

/// The case of this very name; if there is none, those whose names contain the text; without a text, all.
fn choose(only: Option<&str>) -> Result<Vec<&'static Case>, Failure> {
    let all = cases().iter();
    let Some(only) = only else { return Ok(all.collect()) };
    let exact: Vec<_> = all.clone().filter(|case| case.name() == only).collect();
    let chosen = if exact.is_empty() { all.filter(|case| case.name().contains(only)).collect() } else { exact };
    if chosen.is_empty() {
        return Err(Failure::usage(format!("no case has {only} in its name; there are {} cases", cases().len())));
    }
    Ok(chosen)
}

struct Report<'a> {
    out: &'a Output,
    table: Table,
    bar: indicatif::ProgressBar,
    started: Instant,
    passed: u64,
    failed: u64,
}

impl<'a> Report<'a> {
    fn new(out: &'a Output, dsn: &str, chosen: &[&Case]) -> Result<Self, Failure> {
        let mut table = Table::new(&[("", Align::Left), ("", Align::Left), ("", Align::Left), ("", Align::Right)]);
        table.widen(1, chosen.iter().map(|case| case.suite().len()).max().unwrap_or(0));
        table.widen(2, chosen.iter().map(|case| case.name().len()).max().unwrap_or(0));
        table.widen(3, "999 ms".len());
        if !out.is_json() {
            let count = format!("{} case{}", chosen.len(), if chosen.len() == 1 { "" } else { "s" });
            out.raw(&format!("{}  {}", out.paint(Style::Bold, escape(&redact(dsn))), out.paint(Style::Dim, count)))?;
        }
        let bar = out.progress(chosen.len() as u64, "  {bar:32} {pos}/{len}  {elapsed}");
        Ok(Self { out, table, bar, started: Instant::now(), passed: 0, failed: 0 })
    }

    fn case(&mut self, case: &Case, outcome: &Outcome) -> Result<(), Failure> {
        let count = if outcome.passed { &mut self.passed } else { &mut self.failed };
        *count += 1;
        self.bar.inc(1);
        if self.out.is_json() {
            let ms = (outcome.elapsed.as_secs_f64() * 1e6).round() / 1e3;
            let word = if outcome.passed { "passed" } else { "failed" };
            let line = Line { case: case.name(), suite: case.suite(), outcome: word, ms, detail: &outcome.detail };
            return Ok(self.out.object(&line)?);
        }
        let (mark, style) = if outcome.passed { ("✓", Style::Good) } else { ("✗", Style::Bad) };
        self.table.row(vec![
            Cell::styled(mark, style),
            Cell::styled(case.suite(), Style::Dim),
            Cell::styled(case.name(), if outcome.passed { Style::Plain } else { Style::Bad }),
            Cell::styled(micros(outcome.elapsed.as_secs_f64() * 1e6), Style::Dim),
        ]);
        self.bar.suspend(|| {
            self.table.print(self.out)?;
            for line in outcome.detail.lines() {
                self.out.raw(&format!("       {}", escape(line)))?;
            }
            Ok::<_, std::io::Error>(())
        })?;
        Ok(())
    }

    fn end(self, left_out: &[&Case]) -> Result<(), Failure> {
        self.bar.finish_and_clear();
        let (passed, failed) = (self.passed, self.failed);
        if self.out.is_json() {
            self.out.object(&json!({"cases": passed + failed, "passed": passed, "failed": failed}))?;
        } else {
            let verdict = format!("{passed} passed, {failed} failed");
            let style = if failed == 0 { Style::Good } else { Style::Bad };
            let took = format!("in {}", crate::output::span(self.started.elapsed()));
            self.out.raw(&format!("\n  {}  {}", self.out.paint(style, verdict), self.out.paint(Style::Dim, took)))?;
            for of_suite in left_out.chunk_by(|one, next| one.suite() == next.suite()) {
                let (count, suite) = (of_suite.len(), of_suite[0].suite());
                let cases = if count == 1 { "case" } else { "cases" };
                let why = format!("{count} {cases} of {suite} left out: {} needed", needs(suite));
                self.out.raw(&format!("  {}", self.out.paint(Style::Dim, why)))?;
            }
        }
        if failed == 0 { Ok(()) } else { Err(Failure::No(None)) }
    }
}

/// `memory://`: a store for each namespace, shared by all who ask for that namespace.
struct MemoryHarness {
    strict_expiry: bool,
    stores: Mutex<HashMap<String, MemoryHandler>>,
}

impl MemoryHarness {
    fn new(dsn: &str) -> Result<Self, Failure> {
        let strict_expiry = Dsn::parse(dsn)?.flag("strict_expiry")?.unwrap_or(false);
        Ok(Self { strict_expiry, stores: Mutex::default() })
    }

    fn store(&self, namespace: &str) -> MemoryHandler {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || MemoryHandler::builder().strict_expiry(self.strict_expiry).build();
        stores.entry(namespace.to_owned()).or_insert_with(make).clone()
    }
}

impl Harness for MemoryHarness {
    async fn handler(&self, namespace: &str) -> session_core::Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(self.store(namespace)))
    }

    async fn lock(&self, namespace: &str) -> session_core::Result<Arc<dyn SessionLock>> {
        Ok(Arc::new(self.store(namespace).lock()))
    }

    fn tick(&self) -> Duration {
        TICK
    }

    fn strict_expiry(&self) -> bool {
        self.strict_expiry
    }
}

/// A store for each namespace, which processes can share: a directory, a table, or a prefix on a server.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct SharedHarness {
    stores: Stores,
    strict_expiry: bool,
    /// The namespaces that were asked for in this process.
    #[serde(skip)]
    used: Mutex<BTreeSet<String>>,
}

/// Where a worker finds its [`SharedHarness`]: not on its command line, since it may hold a password.
const STORE: &str = "SESSIONCTL_STORE";

impl SharedHarness {
    fn new(stores: Stores, dsn: &str) -> Result<Self, Failure> {
        let strict_expiry = Dsn::parse(dsn)?.flag("strict_expiry")?.unwrap_or(false);
        Ok(Self { stores, strict_expiry, used: Mutex::default() })
    }

    /// Reads what [`Harness::worker`] left.
    pub(crate) fn from_environment() -> Result<Self, Failure> {
        let store = std::env::var(STORE).unwrap_or_default();
        serde_json::from_str(&store).map_err(|_| Failure::usage("__worker is for sessionctl itself"))
    }

    fn for_one_case(&self) -> Self {
        Self { stores: self.stores.clone(), strict_expiry: self.strict_expiry, used: Mutex::default() }
    }

    fn is_file(&self) -> bool {
        matches!(self.stores, Stores::Directories { .. })
    }

    fn dsn(&self, namespace: &str) -> session_core::Result<String> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(namespace.to_owned());
        self.stores.apart(namespace)
    }

    /// Removes the sessions that were stored.
    async fn sweep(&self) {
        let used = std::mem::take(&mut *self.used.lock().unwrap_or_else(PoisonError::into_inner));
        for namespace in used {
            // A store that fails here has failed the case, too; what it keeps expires.
            let _ = tokio::time::timeout(PATIENCE, self.stores.sweep_apart(&namespace)).await;
        }
    }
}

impl Harness for SharedHarness {
    async fn handler(&self, namespace: &str) -> session_core::Result<Arc<dyn SessionHandler>> {
        sessionkit::handler(&self.dsn(namespace)?).await
    }

    async fn lock(&self, namespace: &str) -> session_core::Result<Arc<dyn SessionLock>> {
        lock(&self.dsn(namespace)?).await
    }

    fn server(&self) -> Option<String> {
        self.stores.server()
    }

    async fn handler_at(&self, namespace: &str, server: SocketAddr) -> session_core::Result<Arc<dyn SessionHandler>> {
        // The sweep goes the direct way.
        self.dsn(namespace)?;
        sessionkit::handler(&self.stores.through(server).apart(namespace)?).await
    }

    fn worker(&self) -> Option<Command> {
        let mut command = worker::command(Part::Case).ok()?;
        command.env(STORE, serde_json::to_string(self).ok()?);
        Some(command)
    }

    fn tick(&self) -> Duration {
        self.stores.tick()
    }

    fn strict_expiry(&self) -> bool {
        self.strict_expiry
    }

    /// No copy of a call can arrive late from the kernel of the same machine.
    fn remembers_destroyed(&self) -> bool {
        !self.is_file()
    }

    /// A kernel lock ends with its holder, and never before.
    fn leases_end(&self) -> bool {
        !self.is_file()
    }
}
