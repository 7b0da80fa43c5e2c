//! The hammer, on both versions of the server, under a flood that evicts locks, across a restart, and beside the algorithm of
//! php-memcached: the same processes, stopped and killed in the same way, lose updates there and none here.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod php_memcached;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use conformance_tests::hammer::{Hammer, HammerLength, Report, worker};
use conformance_tests::servers::Memcached;
use php_memcached::PhpMemcached;
use session_core::{Dsn, Result, SessionHandler};
use session_memcache::{MemcacheConfig, MemcacheHandler};

/// Tells this executable that it is a worker.
const WORKER: &str = "SESSIONKIT_HAMMER_WORKER";

/// What names the liar in place of ours.
const PHP: &str = "php+";

async fn open(dsn: &str) -> Result<Arc<dyn SessionHandler>> {
    let parsed = Dsn::parse(dsn.strip_prefix(PHP).unwrap_or(dsn))?;
    if dsn.starts_with(PHP) {
        return Ok(Arc::new(PhpMemcached::new(parsed.hosts()[0].parse().expect("a test writes an address"))));
    }
    Ok(Arc::new(MemcacheHandler::connect(MemcacheConfig::from_dsn(&parsed)?).await?))
}

#[test]
fn hammer_worker() {
    if std::env::var_os(WORKER).is_some() {
        let outcome = runtime().block_on(worker(open));
        outcome.expect("the hammer is at the other end");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn command() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this executable has a path"));
    command.args(["hammer_worker", "--exact", "--nocapture"]).env(WORKER, "1");
    command
}

/// A lease that is as short as it can be here: the server's clock has whole seconds.
fn small(seconds: u64) -> Hammer {
    let mut hammer = Hammer::new().unwrap();
    (hammer.processes, hammer.tasks, hammer.sessions) = (6, 3, 4);
    hammer.lease = Duration::from_secs(2);
    hammer.length = HammerLength::Time(Duration::from_secs(seconds));
    hammer
}

async fn hit(hammer: &Hammer, dsn: &str) -> Report {
    let outcome = hammer.run(dsn, open(dsn).await.unwrap(), command, |_| {}).await;
    let report = outcome.unwrap_or_else(|error| panic!("{dsn}: {error:?}"));
    println!("{dsn}\n{report}");
    report
}

#[test]
fn stalls_and_kills_that_lose_updates_with_the_algorithm_of_php_memcached_lose_none_here() {
    let servers = [Memcached::start(&[]).unwrap(), Memcached::start_newer(&[]).unwrap()];
    let mut hammer = small(15);
    (hammer.hold, hammer.stall, hammer.kill) = (Duration::from_millis(1), 4.0, 4.0);
    let urls = servers.each_ref().map(Memcached::url);
    let php = format!("{PHP}{}", urls[0]);
    let (older, newer, php) =
        runtime().block_on(async { tokio::join!(hit(&hammer, &urls[0]), hit(&hammer, &urls[1]), hit(&hammer, &php)) });
    for report in [&older, &newer] {
        assert!(report.kept() && report.lost == 0, "{report}");
        assert!(report.acked > 30 && report.stalled > 0, "{report}");
    }
    assert!(older.killed + newer.killed > 0, "{older}\n{newer}");
    assert!(php.stalled > 0 && php.lost > 0 && !php.kept(), "{php}");
}

/// Fills the slab class of small items, which is that of the locks, until it is told to stop.
fn flood(memcached: &Memcached, stop: &AtomicBool) {
    let mut connection = memcached.connect().unwrap();
    let mut round = 0u32;
    while !stop.load(Ordering::Relaxed) {
        // As long as a lock with its key: what is evicted is chosen among items of one size.
        for size in [1, 30, 60, 90] {
            connection.flood((0..4000).map(|number| format!("flood-{round:08}-{number:08}")), &vec![b'x'; size]).unwrap();
        }
        round += 1;
    }
}

#[test]
fn nothing_is_lost_while_locks_are_evicted_alone() {
    for memcached in [Memcached::start(&["-m 2"]).unwrap(), Memcached::start_newer(&["-m 2"]).unwrap()] {
        let mut hammer = small(6);
        // Records that are larger than anything in the flood, and holds that outlast a lock.
        (hammer.payload, hammer.hold) = (4000, Duration::from_millis(60));
        let stop = AtomicBool::new(false);
        let report = std::thread::scope(|threads| {
            threads.spawn(|| flood(&memcached, &stop));
            let report = runtime().block_on(hit(&hammer, &memcached.url()));
            stop.store(true, Ordering::Relaxed);
            report
        });
        let evictions: u64 = memcached.stats("").unwrap()["evictions"].parse().unwrap();
        assert!(report.kept() && report.lost == 0 && report.gone == 0, "{report}");
        // Somebody was let in while another held what was evicted, and the other was told.
        assert!(report.acked > 20 && report.fenced > 0 && evictions > 10_000, "{evictions} evictions\n{report}");
    }
}
