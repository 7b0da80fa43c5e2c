//! Cases: how one is listed, run, bounded and judged.
//!
//! A case is an async function that panics if its guarantee is broken. Nothing here knows what a case is about.

use std::fmt;
use std::future::Future;
use std::panic;
use std::sync::{Arc, Once, OnceLock};
use std::time::{Duration, Instant};

use session_core::{ErrorKind, OpenRequest, Result, SessionId};
use tokio::task::JoinHandle;

use crate::harness::{BoxFuture, DynHarness, Env, Harness};

/// One guarantee, and the test of it.
#[derive(Clone, Copy)]
pub struct Case {
    pub(crate) suite: &'static str,
    pub(crate) name: &'static str,
    pub(crate) guarantee: &'static str,
    pub(crate) run: fn(Env) -> BoxFuture<'static, ()>,
}

impl Case {
    /// Returns the suite that it belongs to.
    #[must_use]
    pub const fn suite(&self) -> &'static str {
        self.suite
    }

    /// Returns its name, which no other case of its suite has.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Returns what must be true, in one sentence.
    #[must_use]
    pub const fn guarantee(&self) -> &'static str {
        self.guarantee
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.suite, self.name)
    }
}

/// What came of a case.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Whether the guarantee was kept.
    pub passed: bool,
    /// How long it took.
    pub elapsed: Duration,
    /// What was seen instead, and the seed to replay it; empty if it passed.
    pub detail: String,
    /// The seed of the run.
    pub seed: u64,
}

/// Every case of every suite, once, in the order of the suites.
#[must_use]
pub fn cases() -> &'static [Case] {
    static CASES: OnceLock<Vec<Case>> = OnceLock::new();
    CASES.get_or_init(|| {
        let suites: &[&[Case]] = &[
            crate::handler::CASES,
            crate::lock::CASES,
            crate::fence::CASES,
            crate::expiry::CASES,
            crate::optimistic::CASES,
            crate::race::CASES,
            crate::cancel::CASES,
            crate::hostile::CASES,
            crate::admin::CASES,
            crate::sessions::CASES,
            crate::trips::CASES,
            crate::processes::CASES,
        ];
        suites.concat()
    })
}

/// Returns the suites that a handler can be held to which is known only at run time: all but those for a lock, an optimistic
/// access, an administration, a server behind a proxy or worker processes that it says it does not have. A test file claims by its macros instead.
///
/// # Errors
/// Those of the harness, and of opening.
pub async fn claims(harness: &dyn DynHarness) -> Result<Vec<&'static str>> {
    let namespace = Env::fresh_namespace();
    let handler = harness.dyn_handler(&namespace).await?;
    let optimistic = match handler.open(&SessionId::generate()?, &OpenRequest::optimistic()).await {
        Ok(mut opened) => opened.close().await.map(|()| true)?,
        Err(error) if error.kind() == ErrorKind::Unsupported => false,
        Err(error) => return Err(error),
    };
    let lock = match harness.dyn_lock(&namespace).await {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::Unsupported => false,
        Err(error) => return Err(error),
    };
    let has = |suite: &str| match suite {
        "lock" => lock,
        "optimistic" => optimistic,
        "admin" => handler.admin().is_some(),
        "trips" => harness.dyn_server().is_some(),
        "processes" => harness.dyn_worker().is_some(),
        _ => true,
    };
    let mut suites: Vec<_> = cases().iter().map(|case| case.suite).filter(|suite| has(suite)).collect();
    suites.dedup();
    Ok(suites)
}

/// Runs one case on a store of its own and says what came of it; a case that does not end in time has failed.
///
/// Needs a tokio runtime with time and I/O. The panics of a case are its way to fail: they are caught and not printed.
pub async fn run_case(case: &Case, harness: Arc<dyn DynHarness>) -> Outcome {
    let limit = Duration::from_secs(60) + harness.dyn_tick() * 150;
    quiet_panics();
    let env = Env::new(harness);
    let seed = env.seed();
    let started = Instant::now();
    let place = Arc::new(OnceLock::new());
    let mut task = tokio::spawn(IN_CASE.scope(place.clone(), (case.run)(env)));
    let ended = tokio::time::timeout(limit, &mut task).await;
    let elapsed = started.elapsed();
    let seen = match ended {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(match error.try_into_panic() {
            Ok(panic) => text_of(panic.as_ref()),
            Err(_) => "the task of the case was lost".into(),
        }),
        Err(_) => {
            task.abort();
            Some(format!("no end after {} s", limit.as_secs()))
        }
    };
    let detail = seen.map(|seen| {
        let place = place.get().map(|place| format!("{place}, ")).unwrap_or_default();
        format!("{} Seen instead: {seen} ({place}CONFORMANCE_SEED={seed})", case.guarantee)
    });
    Outcome { passed: detail.is_none(), elapsed, detail: detail.unwrap_or_default(), seed }
}

/// Runs the case `suite::name` as a test of its own, in a runtime of its own. The suite macros call this.
///
/// # Panics
/// If the case fails; the text is the guarantee and what was seen instead.
pub fn run_test(suite: &str, name: &str, harness: impl Harness) {
    let case = cases().iter().find(|case| case.suite == suite && case.name == name);
    let case = case.expect("the macro and the registry come from the same list");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime can be built");
    let outcome = runtime.block_on(run_case(case, Arc::new(harness)));
    runtime.shutdown_background();
    println!("CONFORMANCE_SEED={}", outcome.seed);
    assert!(outcome.passed, "{}", outcome.detail);
}

/// Lists the cases of one suite: makes the registry `CASES` of the file and the exported macro that turns each case into a
/// `#[test]`. A case that is written and not listed is dead code, which the compiler refuses.
macro_rules! suite {
    ($dollar:tt $(#[$doc:meta])* $suite:ident as $macro:ident { $($name:ident: $guarantee:literal;)+ }) => {
        /// The cases of this suite.
        pub(crate) const CASES: &[$crate::case::Case] = &[$(
            $crate::case::Case {
                suite: stringify!($suite),
                name: stringify!($name),
                guarantee: $guarantee,
                run: |env| Box::pin($name(env)),
            },
        )+];

        $(#[$doc])*
        #[macro_export]
        macro_rules! $macro {
            ($dollar harness:expr) => {
                mod $suite {
                    #[allow(unused_imports)]
                    use super::*;
                    $(
                        #[test]
                        fn $name() {
                            $dollar crate::run_test(stringify!($suite), stringify!($name), $dollar harness);
                        }
                    )+
                }
            };
        }
    };
}
pub(crate) use suite;

tokio::task_local! {
    /// Set in every task of a case, so that the panic hook can tell them from the panics of strangers, and say where the first
    /// one was.
    static IN_CASE: Arc<OnceLock<String>>;
}

/// Spawns a task of the case that this task belongs to.
pub(crate) fn spawn<T: Send + 'static>(part: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let place = IN_CASE.try_with(Arc::clone).unwrap_or_default();
    tokio::spawn(IN_CASE.scope(place, part))
}

/// Keeps the panics of cases from being printed: the outcome says what they say.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let place = || info.location().map(|place| format!("{}:{}", place.file(), place.line())).unwrap_or_default();
            if IN_CASE.try_with(|first| first.get_or_init(place).len()).is_err() {
                before(info);
            }
        }));
    });
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
    text.unwrap_or_else(|| "a panic without words".into())
}
