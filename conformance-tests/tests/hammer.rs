//! The hammer finds nothing in honest stores, finds what is lost in the others, and reports what it promises.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use conformance_tests::hammer::{Hammer, HammerAccess, HammerLength, Report, worker};
use session_core::{Error, ErrorKind, MemoryHandler, Result, SessionHandler, async_trait};

#[allow(dead_code, reason = "the harness in it is for the suites")]
mod naive;

use naive::{Naive, NaiveHandler};

const STORES: [Naive; 6] =
    [Naive::Flock, Naive::Lease, Naive::NoLock, Naive::LateWrites, Naive::WriteBehind, Naive::Resurrects];

/// Tells this executable that it is a worker.
const WORKER: &str = "SESSIONKIT_HAMMER_WORKER";

/// The DSN of these tests: which store, and where.
async fn open(dsn: &str) -> Result<Arc<dyn SessionHandler>> {
    let (store, path) = dsn.split_once(':').expect("these tests write store:path");
    if store == "memory" {
        return Ok(Arc::new(MemoryHandler::new()));
    }
    let naive = STORES.iter().find(|naive| format!("{naive:?}") == store).expect("one of the stores");
    Ok(Arc::new(NaiveHandler::new(PathBuf::from(path), *naive)?))
}

#[test]
fn hammer_worker() {
    if std::env::var_os(WORKER).is_some() {
        let outcome = runtime().block_on(worker(open));
        outcome.expect("the hammer is at the other end");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime can be built")
}

fn command() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this executable has a path"));
    command.args(["hammer_worker", "--exact", "--nocapture"]).env(WORKER, "1");
    command
}

fn small(access: HammerAccess) -> Hammer {
    let mut hammer = Hammer::new().expect("there is randomness");
    hammer.processes = 3;
    hammer.tasks = 3;
    hammer.access = access;
    hammer.lease = Duration::from_millis(200);
    hammer.length = HammerLength::Time(Duration::from_millis(2500));
    hammer
}

fn dsn(naive: Naive, directory: &Path) -> String {
    format!("{naive:?}:{}", directory.display())
}

fn hit(hammer: &Hammer, naive: Naive) -> Report {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let dsn = dsn(naive, directory.path());
    let report = runtime().block_on(async { hammer.run(&dsn, open(&dsn).await?, command, |_| {}).await });
    let report = report.unwrap_or_else(|error| panic!("{naive:?}: {error:?}"));
    println!("{naive:?} {:?}\n{report}", hammer.access);
    let left = std::fs::read_dir(directory.path()).expect("the store is there").flatten();
    let records = left.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "record"));
    assert_eq!(records.count(), 0, "the hammer leaves its sessions behind");
    report
}

#[test]
fn honest_stores_lose_nothing_while_processes_are_stopped_and_killed() {
    for naive in [Naive::Lease, Naive::Flock] {
        let mut hammer = small(HammerAccess::Exclusive);
        (hammer.sessions, hammer.payload) = (2, 500);
        (hammer.stall, hammer.kill) = (2.0, 2.0);
        let report = hit(&hammer, naive);
        assert!(report.kept(), "{report}");
        assert!(report.acked > 30 && report.stalled > 0 && report.killed > 0, "{report}");
    }
}

#[test]
fn optimistic_and_merged_writes_lose_nothing() {
    for access in [HammerAccess::Optimistic, HammerAccess::Merge] {
        let mut hammer = small(access);
        hammer.kill = 0.5;
        let report = hit(&hammer, Naive::Lease);
        assert!(report.kept() && report.acked > 20, "{access:?}\n{report}");
    }
}

#[test]
fn the_control_group_loses_updates() {
    // Without a hold no call ever waits, and a run must end all the same.
    for hold in [Duration::from_millis(1), Duration::ZERO] {
        let mut hammer = small(HammerAccess::None);
        hammer.hold = hold;
        hammer.length = HammerLength::Time(Duration::from_millis(1000));
        let report = hit(&hammer, Naive::Lease);
        assert!(report.lost > report.acked / 10 && !report.kept(), "{report}");
        assert!(report.final_count < report.acked);
    }
}

#[test]
fn a_store_without_a_lock_loses_updates() {
    let mut hammer = small(HammerAccess::Exclusive);
    hammer.hold = Duration::from_millis(1);
    hammer.length = HammerLength::Time(Duration::from_millis(800));
    let report = hit(&hammer, Naive::NoLock);
    assert!(report.lost > 0 && !report.kept(), "{report}");
}

#[test]
fn a_lock_without_a_fence_loses_updates_once_holders_are_stopped() {
    let mut hammer = small(HammerAccess::Exclusive);
    hammer.hold = Duration::from_millis(1);
    hammer.stall = 3.0;
    hammer.length = HammerLength::Time(Duration::from_secs(4));
    let report = hit(&hammer, Naive::LateWrites);
    assert!(report.lost > 0 && !report.kept(), "{report}");
}

#[test]
fn an_acknowledgement_before_the_write_is_found_once_writers_are_killed() {
    let mut hammer = small(HammerAccess::Exclusive);
    hammer.kill = 1.0;
    let report = hit(&hammer, Naive::WriteBehind);
    assert!(report.lost > 0 && !report.kept(), "{report}");
}

#[test]
fn so_many_writes_are_done_as_were_asked_for() {
    let mut hammer = small(HammerAccess::Exclusive);
    hammer.sessions = 4;
    hammer.length = HammerLength::Ops(200);
    let report = hit(&hammer, Naive::Lease);
    assert_eq!((report.acked, report.final_count, report.unknown), (200, 200, 0), "{report}");
    // Killed workers are replaced by workers that do the rest.
    hammer.kill = 6.0;
    let report = hit(&hammer, Naive::Flock);
    assert!(report.acked == 200 && report.kept() && report.killed > 0, "{report}");
}

#[test]
fn the_report_has_the_promised_keys_and_adds_up() {
    let report = hit(&small(HammerAccess::Exclusive), Naive::Flock);
    let json = serde_json::to_value(&report).expect("a report is plain data");
    let mut keys: Vec<&str> = json.as_object().expect("an object").keys().map(String::as_str).collect();
    let promised = "acked final lost fenced gone unknown killed cycles_per_s wait_p50_us wait_p99_us wait_max_us share_min \
                    share_max seed";
    let mut promised: Vec<&str> = promised.split_whitespace().collect();
    keys.sort_unstable();
    promised.sort_unstable();
    assert_eq!(keys, promised);
    assert!(report.kept());
    assert!(report.cycles_per_s > 0.0 && report.wait_p50_us <= report.wait_p99_us && report.wait_p99_us > 0);
    assert!(report.wait_p99_us <= report.wait_max_us);
    assert!(report.share_min > 0.0 && report.share_min <= report.share_max && report.share_max < 1.0, "{report}");
    assert_eq!((report.gone, report.killed, report.unknown), (0, 0, 0));
}

#[test]
fn progress_is_told_and_grows() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let dsn = dsn(Naive::Flock, directory.path());
    let mut told = Vec::new();
    let report = runtime().block_on(async {
        let hammer = small(HammerAccess::Exclusive);
        hammer.run(&dsn, open(&dsn).await?, command, |progress| told.push((progress.done, progress.acked))).await
    });
    let report = report.expect("the store is there");
    assert!(told.len() > 5 && told.is_sorted(), "{told:?}");
    let (done, acked) = told[told.len() - 1];
    assert!(done > 0.99 && acked > 0 && acked <= report.acked, "{done} {acked}");
}

#[test]
fn a_store_of_one_process_is_a_mistake_and_not_lost_updates() {
    let outcome = runtime().block_on(async {
        let hammer = small(HammerAccess::Exclusive);
        hammer.run("memory:", Arc::new(MemoryHandler::new()), command, |_| {}).await
    });
    let error = outcome.expect_err("a memory store is not shared");
    assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
    assert!(error.to_string().contains("not shared between processes"), "{error}");
}

#[test]
fn numbers_out_of_range_and_workers_that_are_none_are_errors() {
    let run = |hammer: &Hammer, command: fn() -> Command| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let dsn = dsn(Naive::Flock, directory.path());
        let outcome = runtime().block_on(async { hammer.run(&dsn, open(&dsn).await?, command, |_| {}).await });
        outcome.expect_err("it ran").kind()
    };
    let change: [fn(&mut Hammer); 6] = [
        |hammer| hammer.processes = 0,
        |hammer| hammer.tasks = 2000,
        |hammer| hammer.sessions = 0,
        |hammer| hammer.stall = 101.0,
        |hammer| hammer.kill = f64::NAN,
        |hammer| hammer.length = HammerLength::Ops(0),
    ];
    for change in change {
        let mut hammer = small(HammerAccess::Exclusive);
        change(&mut hammer);
        assert_eq!(run(&hammer, command), ErrorKind::Config, "{hammer:?}");
    }
    assert_eq!(run(&small(HammerAccess::Exclusive), || Command::new("true")), ErrorKind::Unexpected);
}

/// Refuses everything, as a server does that is not there.
#[derive(Debug)]
struct Down;

#[async_trait]
impl SessionHandler for Down {
    async fn open(
        &self,
        _: &session_core::SessionId,
        _: &session_core::OpenRequest,
    ) -> Result<Box<dyn session_core::OpenSession>> {
        Err(Error::new(ErrorKind::Unavailable, "open", "nobody answers"))
    }

    async fn gc(&self, _: std::num::NonZeroU32) -> Result<u64> {
        Ok(0)
    }
}

#[test]
fn a_store_that_does_not_answer_is_said_to() {
    let outcome = runtime().block_on(small(HammerAccess::Exclusive).run("memory:", Arc::new(Down), command, |_| {}));
    assert_eq!(outcome.expect_err("nobody answers").kind(), ErrorKind::Unavailable);
}

#[test]
fn no_worker_outlives_a_run_that_is_given_up() {
    const MARK: &str = "SESSIONKIT_HAMMER_GIVEN_UP";
    let workers = || {
        let all = std::fs::read_dir("/proc").expect("this is Linux").flatten();
        let environments = all.filter_map(|entry| std::fs::read(entry.path().join("environ")).ok());
        environments.filter(|bytes| bytes.windows(MARK.len()).any(|window| window == MARK.as_bytes())).count()
    };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let dsn = dsn(Naive::Flock, directory.path());
    runtime().block_on(async {
        let mut hammer = small(HammerAccess::Exclusive);
        // Some of them stand still when it is given up.
        hammer.stall = 5.0;
        hammer.lease = Duration::from_secs(20);
        let command = || {
            let mut command = command();
            command.env(MARK, "1");
            command
        };
        let run = hammer.run(&dsn, open(&dsn).await.expect("the store is there"), command, |_| {});
        assert!(tokio::time::timeout(Duration::from_millis(1200), run).await.is_err());
    });
    assert_eq!(workers(), 0);
}
