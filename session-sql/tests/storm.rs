//! Many requests at once over few connections, and many that nobody waits for any more: what the server is left with.
#![cfg(any(feature = "postgres", feature = "mysql"))]
#![allow(clippy::unwrap_used, reason = "a helper of a test is part of the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[cfg(feature = "mysql")]
use conformance_tests::servers::MariaDb;
#[cfg(feature = "postgres")]
use conformance_tests::servers::Postgres;
use session_core::{Dsn, SessionId, Sessions};
use session_sql::{SqlConfig, SqlHandler};
use tokio::task::JoinSet;

/// Connections of a handler.
const CONNECTIONS: u32 = 5;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server, and what it can be asked about those who use it.
trait Server: Send + Sync + 'static {
    fn url(&self) -> String;
    fn number(&self, sql: &str) -> u64;
    /// Locks a row for as long as what comes back lives.
    fn lock_rows(&self, ids: &[SessionId]) -> Box<dyn Send>;

    const CONNECTIONS: &str;
    const TRANSACTIONS: &str;
    const WAITING: &str;
}

#[cfg(feature = "postgres")]
impl Server for Postgres {
    fn url(&self) -> String {
        self.url()
    }

    fn number(&self, sql: &str) -> u64 {
        self.query(sql).unwrap()[0][0].parse().unwrap()
    }

    fn lock_rows(&self, ids: &[SessionId]) -> Box<dyn Send> {
        let mut connection = self.connect().unwrap();
        connection.query("BEGIN").unwrap();
        connection.query(&format!("SELECT 1 FROM sessions WHERE id IN ({}) FOR UPDATE", list(ids))).unwrap();
        Box::new(connection)
    }

    const CONNECTIONS: &str = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'sessionkit'";
    const TRANSACTIONS: &str =
        "SELECT count(*) FROM pg_stat_activity WHERE usename = 'sessionkit' AND (xact_start IS NOT NULL OR state <> 'idle')";
    const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'sessionkit' AND wait_event_type = 'Lock'";
}

#[cfg(feature = "mysql")]
impl Server for MariaDb {
    fn url(&self) -> String {
        self.url()
    }

    fn number(&self, sql: &str) -> u64 {
        self.query(sql).unwrap()[0][0].parse().unwrap()
    }

    fn lock_rows(&self, ids: &[SessionId]) -> Box<dyn Send> {
        let mut connection = self.connect().unwrap();
        connection.query("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED").unwrap();
        connection.query("BEGIN").unwrap();
        connection
            .query(&format!(
                "SELECT 1 FROM sessionkit.sessions FORCE INDEX (PRIMARY) WHERE id IN ({}) FOR UPDATE",
                list(ids)
            ))
            .unwrap();
        Box::new(connection)
    }

    const CONNECTIONS: &str = "SELECT count(*) FROM information_schema.processlist WHERE user = 'sessionkit'";
    const TRANSACTIONS: &str = "SELECT count(*) FROM information_schema.innodb_trx";
    const WAITING: &str = "SELECT count(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'";
}

fn list(ids: &[SessionId]) -> String {
    ids.iter().map(|id| format!("'{}'", id.as_str())).collect::<Vec<_>>().join(", ")
}

async fn sessions(server: &impl Server) -> Sessions {
    let config = SqlConfig::from_dsn(&Dsn::parse(&server.url()).unwrap()).unwrap();
    let config =
        config.with_create(true).with_connections(CONNECTIONS).with_timeout(PATIENCE).with_connect_timeout(PATIENCE);
    let handler = Arc::new(SqlHandler::connect(config).await.unwrap());
    Sessions::builder(handler).wait(2 * PATIENCE).queue(2000).build().unwrap()
}

async fn stored(sessions: &Sessions) -> SessionId {
    let mut session = sessions.create().unwrap();
    session.insert("n", &0).unwrap();
    session.close().await.unwrap().unwrap()
}

async fn count_up(sessions: &Sessions, id: &SessionId) -> session_core::Result<()> {
    let mut session = sessions.open(id).await?;
    session.update_key("n", |n: Option<u64>| n.unwrap_or(0) + 1)?;
    session.close().await.map(drop)
}

/// Asks a server until it answers as it is to; not often, since InnoDB answers from a copy for as long as it is asked more than ten
/// times a second.
async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// A thousand requests with one cookie, through two processes, and all of them wait.
async fn others_are_served_while_a_thousand_wait<S: Server>(server: S) {
    let processes = [sessions(&server).await, sessions(&server).await];
    let hot = stored(&processes[0]).await;
    let holder = processes[0].open(&hot).await.unwrap();
    let (mut waiting, asked) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    for n in 0..1000 {
        let (sessions, hot, asked) = (processes[n % 2].clone(), hot.clone(), asked.clone());
        waiting.spawn(async move {
            asked.fetch_add(1, Ordering::Relaxed);
            count_up(&sessions, &hot).await
        });
    }
    until("the requests do not get in line", || asked.load(Ordering::Relaxed) == 1000).await;
    for sessions in &processes {
        let mut others = JoinSet::new();
        for _ in 0..20 {
            let sessions = sessions.clone();
            others.spawn(async move {
                let id = stored(&sessions).await;
                for _ in 0..5 {
                    count_up(&sessions, &id).await.unwrap();
                }
                assert_eq!(sessions.view(&id).await.unwrap().get::<u64>("n").unwrap(), Some(5));
            });
        }
        let served = tokio::time::timeout(PATIENCE, others.join_all()).await;
        assert_eq!(served.expect("others are held up by those who wait for one session").len(), 20);
    }
    // Besides those of the pool one on which a process is known to live, and is told.
    let connections = server.number(S::CONNECTIONS);
    assert!(connections <= 2 * u64::from(CONNECTIONS + 1), "{connections} connections");
    assert!(waiting.try_join_next().is_none(), "somebody got in beside the holder");
    holder.close().await.unwrap();
    for outcome in waiting.join_all().await {
        outcome.unwrap();
    }
    assert_eq!(processes[1].view(&hot).await.unwrap().get::<u64>("n").unwrap(), Some(1000));
}

/// A thousand requests whose clients hang up, each at another moment.
async fn a_thousand_that_hang_up_leave_no_transaction_and_a_full_pool<S: Server>(server: S) {
    let sessions = sessions(&server).await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(stored(&sessions).await);
    }
    let mut requests = JoinSet::new();
    for n in 0..1000_u64 {
        let (sessions, id) = (sessions.clone(), ids[n as usize % ids.len()].clone());
        requests.spawn(async move {
            // Enough of them in between that the moments fall everywhere in an open and in a save.
            let patience = Duration::from_micros(n * 7919 % 20_000);
            tokio::time::timeout(patience, count_up(&sessions, &id)).await.is_err()
        });
        if n % 16 == 15 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let cut = requests.join_all().await.into_iter().filter(|cut| *cut).count();
    assert!(cut >= 100, "only {cut} were cut short");
    sessions.shutdown().await;
    until("a session is still held", || sessions.in_use() == (0, 0)).await;
    until("a transaction is still open", || server.number(S::TRANSACTIONS) == 0).await;

    // Whoever removes a session waits for its row. When all connections but one do, that one is still there.
    let rows = server.lock_rows(&ids[1..CONNECTIONS as usize]);
    let mut removals = JoinSet::new();
    for id in &ids[1..CONNECTIONS as usize] {
        let (sessions, id) = (sessions.clone(), id.clone());
        removals.spawn(async move { sessions.destroy(&id).await });
    }
    until("not every connection waits", || server.number(S::WAITING) == u64::from(CONNECTIONS - 1)).await;
    let alone = tokio::time::timeout(PATIENCE / 2, count_up(&sessions, &ids[0])).await;
    let state = || (server.number(S::CONNECTIONS), server.number(S::WAITING));
    alone.unwrap_or_else(|_| panic!("the pool has lost a connection: {:?} are there and wait", state())).unwrap();
    drop(rows);
    for removed in removals.join_all().await {
        removed.unwrap();
    }
}

macro_rules! storms {
    ($database:ident, $server:expr) => {
        mod $database {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn others_are_served_while_a_thousand_wait_for_one_session() {
                others_are_served_while_a_thousand_wait($server).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_thousand_requests_that_hang_up_leave_no_transaction_and_a_full_pool() {
                a_thousand_that_hang_up_leave_no_transaction_and_a_full_pool($server).await;
            }
        }
    };
}

#[cfg(feature = "postgres")]
storms!(postgres, Postgres::start(&[]).unwrap());

#[cfg(feature = "mysql")]
storms!(mariadb, MariaDb::start(&[]).unwrap());
