//! Every case of the suite on the other ways to have a Redis: a Cluster, sentinels, TLS, a socket, a server that waits for replicas,
//! one that tells nobody.
//!
//! One server for all cases of a test, since a cluster takes seconds to come up; what failed is listed by name. The cases with
//! several processes and those that count round trips run on the plain server, in `conformance`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use conformance_tests::servers::{Redis, RedisCluster, RedisSentinel};
use conformance_tests::{DynHarness, Harness, cases, claims, run_case};
use session_core::{Dsn, Result, SessionHandler, SessionLock};
use session_redis::{RedisConfig, RedisHandler, RedisLock};
use tokio::task::JoinSet;

/// How many cases run at the same time: most of them wait for time to pass.
const AT_ONCE: usize = 6;

struct At {
    dsn: String,
    strict_expiry: bool,
}

impl At {
    fn config(&self, namespace: &str) -> Result<RedisConfig> {
        // Many cases at once, each with connections of its own, are slow to connect on a busy machine.
        let patient = Duration::from_secs(10);
        let config = RedisConfig::from_dsn(&Dsn::parse(&self.dsn)?)?;
        Ok(config.with_prefix(format!("{namespace}:")).with_connect_timeout(patient))
    }
}

impl Harness for At {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(RedisHandler::connect(self.config(namespace)?).await?))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        Ok(Arc::new(RedisLock::connect(self.config(namespace)?).await?))
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(150)
    }

    fn strict_expiry(&self) -> bool {
        self.strict_expiry
    }
}

async fn every_case(dsn: String) {
    let strict_expiry = dsn.contains("strict_expiry=on");
    let harness: Arc<dyn DynHarness> = Arc::new(At { dsn, strict_expiry });
    let suites = claims(&*harness).await.unwrap();
    let (mut running, mut failed, mut passed) = (JoinSet::new(), Vec::new(), 0);
    let mut waiting = cases().iter().filter(|case| suites.contains(&case.suite()));
    loop {
        while running.len() < AT_ONCE {
            let Some(case) = waiting.next() else { break };
            let harness = harness.clone();
            running.spawn(async move { (case.name(), run_case(case, harness).await) });
        }
        let Some(ended) = running.join_next().await else { break };
        let (name, outcome) = ended.unwrap();
        if outcome.passed {
            passed += 1;
        } else {
            failed.push(format!("{name}: {}", outcome.detail));
        }
    }
    assert!(failed.is_empty(), "{} of {} cases failed:\n{}", failed.len(), failed.len() + passed, failed.join("\n"));
    assert!(passed > 200, "only {passed} cases were run");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes_on_a_cluster() {
    let cluster = RedisCluster::start(3, 0).unwrap();
    every_case(cluster.url()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes_on_the_master_that_sentinels_name() {
    let sentinel = RedisSentinel::start().unwrap();
    every_case(sentinel.url()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes_where_a_change_waits_for_a_replica() {
    let sentinel = RedisSentinel::start().unwrap();
    every_case(format!("{}?wait_replicas=1", sentinel.url())).await;
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes_over_tls() {
    let server = Redis::start_tls(&[]).unwrap();
    every_case(format!("{}?ca={}", server.url(), server.ca_path().unwrap().display())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes_over_a_socket_and_with_strict_expiry() {
    let server = Redis::start(&[]).unwrap();
    every_case(format!("redis+unix://{}?strict_expiry=on&db=3", server.socket_path().display())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes_where_waiters_ask_again_and_again() {
    let server = Redis::start(&[]).unwrap();
    every_case(format!("{}?wake=poll", server.url())).await;
}
