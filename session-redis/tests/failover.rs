//! A master dies in the middle of a storm of appends, below a Cluster and below sentinels.
//!
//! Every session holds the list of the numbers that were appended to it. Each append remembers which number it found last. In
//! the end every number in a list must stand behind the one that its writer had found: a stale holder's write that was applied
//! would break the chain. What was acknowledged and is missing was lost by asynchronous replication: it is counted and
//! printed, it must be older than the recovery, and with `wait_replicas=1` there must be none.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use conformance_tests::servers::{RedisCluster, RedisSentinel};
use session_core::{Change, Dsn, OpenRequest, Record, SessionHandler, SessionId, Ttl, WriteId};
use session_redis::{RedisConfig, RedisHandler};

const HANDLERS: usize = 4;
const TASKS: usize = 3;
const SESSIONS: usize = 6;
const BEFORE: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_secs(3);
/// Within this the service has to resume by itself, from the moment when there is a master again.
const RESUME: Duration = Duration::from_secs(10);
/// How long the servers may take to agree on a new master: a vote can end in a draw, and is then held again.
const ELECTION: Duration = Duration::from_secs(60);
const TTL: Ttl = Ttl::MAX;

/// What one append did.
#[derive(Clone, Copy)]
struct Append {
    session: usize,
    found: u64,
    at: Instant,
    acknowledged: bool,
}

#[derive(Default)]
struct Log {
    appends: Mutex<HashMap<u64, Append>>,
    next: AtomicU64,
    stop: AtomicBool,
}

async fn connect(dsn: &str) -> Arc<RedisHandler> {
    let config = RedisConfig::from_dsn(&Dsn::parse(dsn).unwrap()).unwrap();
    Arc::new(RedisHandler::connect(config).await.unwrap())
}

fn numbers(record: &Record) -> Vec<u64> {
    record.data.chunks_exact(8).map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap())).collect()
}

async fn create(handler: &RedisHandler, id: &SessionId) {
    let request = OpenRequest::exclusive(Duration::ZERO, Duration::from_secs(1)).expecting(session_core::Expect::Fresh);
    let mut opening = handler.open(id, &request).await.unwrap();
    let (first, write) = (Change::Write(Record::new(0_u64.to_le_bytes(), TTL)), WriteId::random().unwrap());
    for _ in 0..100 {
        // A replica that has not joined yet makes it unknown; what is there already is told by its name.
        match opening.save(&first, write).await {
            Ok(_) => return,
            Err(error) if error.kind().keeps_opening() => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(error) => panic!("{error:?}"),
        }
    }
    panic!("the first record of a session could not be stored");
}

/// Appends until it is told to stop. No answer means asking again, under the same id, for as long as that can help.
async fn append(handler: Arc<RedisHandler>, ids: Arc<Vec<SessionId>>, log: Arc<Log>, offset: usize) {
    let mut turn = offset;
    while !log.stop.load(Ordering::Relaxed) {
        let session = turn % ids.len();
        turn += 1;
        let request = OpenRequest::exclusive(Duration::from_secs(2), Duration::from_millis(500));
        let Ok(mut opening) = handler.open(&ids[session], &request).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let Ok(Some(mut record)) = opening.read().await else { continue };
        let number = log.next.fetch_add(1, Ordering::Relaxed) + 1;
        let found = *numbers(&record).last().unwrap();
        let entry = Append { session, found, at: Instant::now(), acknowledged: false };
        log.appends.lock().unwrap().insert(number, entry);
        record.data.extend_from_slice(&number.to_le_bytes());
        record.ttl = TTL;
        let (change, id) = (Change::Write(record), WriteId::random().unwrap());
        for _ in 0..20 {
            match opening.save(&change, id).await {
                Ok(_) => {
                    let mut appends = log.appends.lock().unwrap();
                    let entry = appends.get_mut(&number).unwrap();
                    (entry.acknowledged, entry.at) = (true, Instant::now());
                    break;
                }
                Err(error) if error.kind().keeps_opening() => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(_) => break,
            }
        }
        // A list that grows without end would measure the network.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

struct Verdict {
    acknowledged: usize,
    lost: usize,
    /// From the kill to the new master, as far as it was seen before the service resumed.
    elected: Option<Duration>,
    resumed: Duration,
}

/// Runs the storm against `dsn`, kills with `kill`, and checks every chain. `elected` says whether there is a master again.
async fn storm(dsn: &str, kill: impl FnOnce(&SessionId), elected: impl Fn(&SessionId) -> bool) -> Verdict {
    let admin = connect(dsn).await;
    let ids: Arc<Vec<_>> = Arc::new((0..SESSIONS).map(|_| SessionId::generate().unwrap()).collect());
    for id in ids.iter() {
        create(&admin, id).await;
    }
    let log = Arc::new(Log::default());
    let mut tasks = Vec::new();
    for handler in 0..HANDLERS {
        let handler_of_its_own = connect(dsn).await;
        for task in 0..TASKS {
            tasks.push(tokio::spawn(append(handler_of_its_own.clone(), ids.clone(), log.clone(), handler * TASKS + task)));
        }
    }
    tokio::time::sleep(BEFORE).await;
    kill(&ids[0]);
    let killed = Instant::now();
    // The session whose server died: resumed with the first append that began after the kill and was acknowledged.
    let mut election = None;
    let resumed =
        loop {
            if election.is_none() && tokio::task::block_in_place(|| elected(&ids[0])) {
                election = Some(Instant::now());
            }
            let done =
                log.appends.lock().unwrap().values().any(|append| {
                    append.session == 0 && append.acknowledged && append.at > killed + Duration::from_millis(300)
                });
            if done {
                break killed.elapsed();
            }
            assert!(killed.elapsed() < ELECTION, "the servers found no new master within {ELECTION:?}");
            let waited = election.map_or(Duration::ZERO, |at| at.elapsed());
            assert!(waited < RESUME, "nothing was acknowledged for {RESUME:?} although there was a master");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
    let recovered = Instant::now();
    tokio::time::sleep(AFTER).await;
    log.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    let appends = std::mem::take(&mut *log.appends.lock().unwrap());
    let (mut acknowledged, mut lost) = (0, 0);
    let fresh = connect(dsn).await;
    for (session, id) in ids.iter().enumerate() {
        let record = fresh.open(id, &OpenRequest::read_only()).await.unwrap().read().await.unwrap();
        let list = numbers(&record.expect("a session does not vanish with its server"));
        for pair in list.windows(2) {
            let append = appends.get(&pair[1]).expect("only what was appended is there");
            assert_eq!(append.found, pair[0], "a write was applied over a state that its writer had not read");
            assert_eq!(append.session, session);
        }
        for (number, append) in appends.iter().filter(|(_, append)| append.session == session && append.acknowledged) {
            acknowledged += 1;
            if !list.contains(number) {
                lost += 1;
                assert!(append.at < recovered, "an append was lost that was acknowledged after the recovery");
            }
        }
    }
    let alive = appends.values().filter(|append| append.acknowledged && append.at > recovered).count();
    assert!(alive > SESSIONS, "after the recovery there were only {alive} appends");
    let elected = election.map(|at| at - killed);
    Verdict { acknowledged, lost, elected, resumed }
}

fn report(what: &str, verdict: &Verdict) {
    let Verdict { acknowledged, lost, elected, resumed } = verdict;
    eprintln!(
        "{what}: {acknowledged} acknowledged, {lost} lost by asynchronous replication; new master seen after {elected:?}, \
         resumed after {resumed:?}"
    );
}

fn key(id: &SessionId) -> String {
    format!("session:{{{}}}", id.as_str())
}

async fn cluster_storm(options: &str) -> Verdict {
    let cluster = RedisCluster::start(3, 1).unwrap();
    let dead = Mutex::new(None);
    let kill = |id: &SessionId| {
        let port = cluster.kill_master_of(&key(id)).unwrap().port();
        *dead.lock().unwrap() = Some(port);
    };
    let elected = |id: &SessionId| {
        let dead = dead.lock().unwrap().expect("it was killed before");
        let elected = cluster.master_of(&key(id)).is_ok_and(|master| master.port() != dead);
        if elected {
            // It comes back as a replica: with one server alone no change of this slot could reach another.
            let node = cluster.nodes().iter().find(|node| node.port() == dead).unwrap();
            node.restart().unwrap();
        }
        elected
    };
    storm(&format!("{}?timeout=500ms{options}", cluster.url()), kill, elected).await
}

async fn sentinel_storm(options: &str) -> Verdict {
    let sentinel = RedisSentinel::start().unwrap();
    let kill = |_: &SessionId| {
        sentinel.kill_master().unwrap();
    };
    let elected = |_: &SessionId| sentinel.master().is_ok_and(conformance_tests::servers::Redis::is_up);
    storm(&format!("{}?timeout=500ms{options}", sentinel.url()), kill, elected).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_loses_a_master_applies_no_stale_write_and_resumes() {
    report("cluster", &cluster_storm("").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_with_wait_replicas_loses_nothing_with_a_master() {
    let verdict = cluster_storm("&wait_replicas=1").await;
    report("cluster, wait_replicas=1", &verdict);
    assert_eq!(verdict.lost, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_that_lose_their_master_apply_no_stale_write_and_resume() {
    report("sentinel", &sentinel_storm("").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_with_wait_replicas_lose_nothing_with_a_master() {
    let verdict = sentinel_storm("&wait_replicas=1").await;
    report("sentinel, wait_replicas=1", &verdict);
    assert_eq!(verdict.lost, 0);
}
