//! Runs the conformance suite over PostgreSQL with `lock=transaction`, and tests what is peculiar to that.

#![cfg(feature = "postgres")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use conformance_tests::Harness;
use conformance_tests::servers::Postgres;
use session_core::{
    Change, Error, ErrorKind, Expect, LeaseRequest, OpenRequest, Record, Result, SessionHandler, SessionId, SessionLock,
    Ttl, WriteId,
};
use session_sql::{SqlAddress, SqlConfig, SqlHandler, SqlLock, SqlLockMode, SqlServer};

/// Ends with this process.
static SERVER: OnceLock<Postgres> = OnceLock::new();

/// One table for each namespace, on the server of the test.
struct Transactions;

fn server() -> &'static Postgres {
    SERVER.get_or_init(|| Postgres::start(&["autovacuum = on"]).expect("postgres can be started"))
}

fn config(table: &str, port: u16) -> SqlConfig {
    let mut address = SqlAddress::new("127.0.0.1", "sessionkit");
    (address.port, address.user, address.password) = (port, Some("sessionkit".into()), Some("conformance".into()));
    SqlConfig::new(SqlServer::Postgres(address)).with_create(true).with_table(table).with_lock(SqlLockMode::Transaction)
}

impl Transactions {
    fn config(&self, namespace: &str) -> Result<SqlConfig> {
        let unavailable = |error: std::io::Error| Error::new(ErrorKind::Unavailable, "harness", error.to_string());
        // The worker processes of a case find the server of their parent by the namespace.
        let port = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("postgres-transaction-{namespace}"));
        let found = std::fs::read_to_string(&port).ok().and_then(|port| port.parse().ok());
        let port = match found {
            Some(port) => port,
            None => {
                std::fs::write(&port, server().port().to_string()).map_err(unavailable)?;
                server().port()
            }
        };
        // The cases have up to so many sessions open at once; and a busy machine takes its time, for which no case waits.
        let patience = Duration::from_secs(30);
        Ok(config(namespace, port).with_connections(20).with_timeout(patience).with_connect_timeout(patience))
    }
}

impl Harness for Transactions {
    async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
        Ok(Arc::new(SqlHandler::connect(self.config(namespace)?).await?))
    }

    async fn lock(&self, namespace: &str) -> Result<Arc<dyn SessionLock>> {
        Ok(Arc::new(SqlLock::connect(self.config(namespace)?).await?))
    }

    fn server(&self) -> Option<String> {
        server().address().to_string().into()
    }

    async fn handler_at(&self, namespace: &str, server: SocketAddr) -> Result<Arc<dyn SessionHandler>> {
        let mut config = self.config(namespace)?;
        if let SqlServer::Postgres(address) = &mut config.server {
            (address.host, address.port) = (server.ip().to_string(), server.port());
        }
        Ok(Arc::new(SqlHandler::connect(config).await?))
    }

    fn tick(&self) -> Duration {
        Duration::from_millis(100)
    }
}

conformance_tests::handler_suite!(Transactions);
conformance_tests::lock_suite!(Transactions);
conformance_tests::fence_suite!(Transactions);
conformance_tests::expiry_suite!(Transactions);
conformance_tests::optimistic_suite!(Transactions);
conformance_tests::race_suite!(Transactions);
conformance_tests::cancel_suite!(Transactions);
conformance_tests::hostile_suite!(Transactions);
conformance_tests::admin_suite!(Transactions);
conformance_tests::sessions_suite!(Transactions);
conformance_tests::processes_suite!(Transactions);

const LONG: Duration = Duration::from_secs(30);
const TTL: Duration = Duration::from_secs(600);

/// A table of its own for each test.
fn table() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("t{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

async fn handler(config: SqlConfig) -> SqlHandler {
    SqlHandler::connect(config).await.expect("the handler connects")
}

async fn session(handler: &SqlHandler) -> SessionId {
    let id = SessionId::generate().expect("there is randomness");
    let mut opening =
        handler.open(&id, &OpenRequest::exclusive(LONG, LONG).expecting(Expect::Fresh)).await.expect("a fresh id is opened");
    save(&mut *opening, b"0").await.expect("a session is made");
    id
}

async fn save(opening: &mut dyn session_core::OpenSession, data: &[u8]) -> Result<()> {
    let change = Change::Write(Record::new(data, Ttl::new(TTL)));
    opening.save(&change, WriteId::random()?).await.map(drop)
}

/// Counts the transactions that are open on tables of this name, or wait for one.
fn transactions(table: &str) -> usize {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%{table}\\_holds%' AND pid <> pg_backend_pid() \
         AND xact_start IS NOT NULL"
    );
    server().query(&sql).expect("the server answers")[0][0].parse().expect("it is a number")
}

async fn eventually(what: &str, mut test: impl FnMut() -> bool) {
    let began = Instant::now();
    while !test() {
        assert!(began.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime is made")
}

#[tokio::test]
async fn an_open_session_is_an_open_transaction_and_a_closed_one_leaves_nothing() {
    let table = table();
    let handler = handler(config(&table, server().port())).await;
    let id = session(&handler).await;
    assert_eq!(transactions(&table), 0, "a fresh id needs no transaction");
    let mut opening = handler.open(&id, &OpenRequest::exclusive(LONG, LONG)).await.unwrap();
    assert_eq!(transactions(&table), 1);
    save(&mut *opening, b"1").await.unwrap();
    eventually("the transaction outlives the session", || transactions(&table) == 0).await;
    assert_eq!(server().query(&format!("SELECT count(*) FROM {table}_holds")).unwrap(), [["0"]]);
}

#[tokio::test]
async fn a_holder_who_died_is_out_at_once_however_long_his_lease() {
    let table = table();
    let handler = handler(config(&table, server().port())).await;
    let id = session(&handler).await;
    let (dying, held) = (id.clone(), config(&table, server().port()));
    // What ends with its runtime says goodbye to nobody.
    std::thread::spawn(move || {
        let runtime = runtime();
        let opening = runtime.block_on(async {
            let handler = SqlHandler::connect(held).await.unwrap();
            handler.open(&dying, &OpenRequest::exclusive(LONG, LONG)).await.unwrap()
        });
        std::mem::forget(opening);
        runtime.shutdown_background();
    })
    .join()
    .unwrap();
    let began = Instant::now();
    let mut next = handler.open(&id, &OpenRequest::exclusive(LONG, LONG)).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "the next one was let in after {:?}", began.elapsed());
    save(&mut *next, b"1").await.unwrap();
}

#[tokio::test]
async fn a_stalled_holder_loses_his_transaction_and_his_write_is_refused() {
    let table = table();
    let handler = handler(config(&table, server().port())).await;
    let id = session(&handler).await;
    let lease = Duration::from_millis(300);
    let (stalled, held) = (id.clone(), config(&table, server().port()));
    let (opened, is_open) = tokio::sync::oneshot::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
    let holder = std::thread::spawn(move || {
        runtime().block_on(async {
            let handler = SqlHandler::connect(held).await.unwrap();
            let mut opening = handler.open(&stalled, &OpenRequest::exclusive(LONG, lease)).await.unwrap();
            opened.send(()).unwrap();
            // Nothing moves in this runtime meanwhile, as in a process that was stopped.
            goes_on.recv().unwrap();
            save(&mut *opening, b"late").await
        })
    });
    is_open.await.unwrap();
    assert_eq!(transactions(&table), 1);
    eventually("the database keeps the transaction of a holder who is stalled", || transactions(&table) == 0).await;
    let mut next = handler.open(&id, &OpenRequest::exclusive(LONG, LONG)).await.unwrap();
    go_on.send(()).unwrap();
    let late = tokio::task::spawn_blocking(|| holder.join().unwrap()).await.unwrap();
    assert_eq!(late.unwrap_err().kind(), ErrorKind::Fenced);
    assert_eq!(next.read().await.unwrap().unwrap().data, b"0");
    save(&mut *next, b"1").await.unwrap();
}

#[tokio::test]
async fn opens_that_are_dropped_leave_no_transaction_and_a_full_pool() {
    const CONNECTIONS: u32 = 5;
    let table = table();
    let handler = handler(config(&table, server().port()).with_connections(CONNECTIONS)).await;
    let mut ids = Vec::new();
    for _ in 0..CONNECTIONS {
        ids.push(session(&handler).await);
    }
    for n in 0..1000_u64 {
        let request = OpenRequest::exclusive(LONG, LONG);
        let open = handler.open(&ids[n as usize % 3], &request);
        // From before the first statement to behind the last.
        let _ = tokio::time::timeout(Duration::from_micros(n * 7 % 3000), open).await;
    }
    eventually("a transaction is open that nobody asked for", || transactions(&table) == 0).await;
    // On a busy machine some of the dropped ones are still about to notice.
    for last in [false, false, false, true] {
        let mut openings = Vec::new();
        for id in &ids {
            openings.push(handler.open(id, &OpenRequest::exclusive(Duration::from_secs(5), LONG)).await.unwrap());
        }
        let open = transactions(&table);
        for mut opening in openings {
            opening.close().await.unwrap();
        }
        if open == CONNECTIONS as usize {
            return;
        }
        assert!(!last, "{open} of {CONNECTIONS} connections are left");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test]
async fn more_open_sessions_than_connections_are_turned_away_in_time() {
    let table = table();
    let handler = handler(config(&table, server().port()).with_connections(1)).await;
    let (one, other) = (session(&handler).await, session(&handler).await);
    let mut first = handler.open(&one, &OpenRequest::exclusive(LONG, LONG)).await.unwrap();
    let began = Instant::now();
    let wait = Duration::from_millis(700);
    let refused = handler.open(&other, &OpenRequest::exclusive(wait, LONG)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains("connections="), "{refused}");
    assert!(began.elapsed() >= wait && began.elapsed() < wait + Duration::from_secs(2), "after {:?}", began.elapsed());
    // Who waits for a session that is open here costs no connection, and a look at another one neither.
    let busy = handler.open(&one, &OpenRequest::exclusive(wait, LONG)).await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::LockTimeout);
    assert!(busy.holder().is_some(), "who holds it can be known");
    handler.open(&other, &OpenRequest::read_only()).await.unwrap();
    save(&mut *first, b"1").await.unwrap();
    handler.open(&other, &OpenRequest::exclusive(LONG, LONG)).await.unwrap();
}

#[tokio::test]
async fn sessions_of_one_table_can_be_held_in_both_ways_by_turns() {
    const EACH: usize = 25;
    let table = table();
    let own = config(&table, server().port());
    let handlers = [
        handler(own.clone()).await,
        handler(own.clone().with_lock(SqlLockMode::Lease)).await,
        handler(own.clone()).await,
        handler(own.with_lock(SqlLockMode::Lease)).await,
    ];
    let id = session(&handlers[0]).await;
    let inside = Arc::new(AtomicU32::new(0));
    let mut tasks = Vec::new();
    for handler in handlers.clone() {
        let (id, inside) = (id.clone(), inside.clone());
        tasks.push(tokio::spawn(async move {
            for _ in 0..EACH {
                let mut opening = handler.open(&id, &OpenRequest::exclusive(LONG, LONG)).await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two hold the session");
                let record = opening.read().await.unwrap().unwrap();
                let count: usize = String::from_utf8(record.data).unwrap().parse().unwrap();
                inside.fetch_sub(1, Ordering::SeqCst);
                save(&mut *opening, (count + 1).to_string().as_bytes()).await.unwrap();
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let mut view = handlers[0].open(&id, &OpenRequest::read_only()).await.unwrap();
    assert_eq!(view.read().await.unwrap().unwrap().data, (handlers.len() * EACH).to_string().as_bytes());
}

#[tokio::test]
async fn a_logout_waits_for_no_transaction() {
    let table = table();
    let handler = handler(config(&table, server().port())).await;
    let id = session(&handler).await;
    let mut held = handler.open(&id, &OpenRequest::exclusive(LONG, LONG)).await.unwrap();
    held.write(&Record::new("1", Ttl::new(TTL)), WriteId::random().unwrap()).await.unwrap();
    let began = Instant::now();
    let removed = handler.open(&id, &OpenRequest::destroy()).await.unwrap().destroy().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "after {:?}", began.elapsed());
    assert_eq!(removed.unwrap().data, b"1", "what a holder has written is seen before he closes");
    assert_eq!(save(&mut *held, b"2").await.unwrap_err().kind(), ErrorKind::Gone);
    assert!(handler.open(&id, &OpenRequest::read_only()).await.unwrap().read().await.unwrap().is_none());
}

#[tokio::test]
async fn a_connection_that_was_cut_costs_the_lease_at_its_renewal() {
    let table = table();
    let lock = SqlLock::connect(config(&table, server().port())).await.unwrap();
    let id = SessionId::generate().unwrap();
    let request = LeaseRequest { wait: LONG, lease: LONG };
    let lease = lock.acquire(&id, &request).await.unwrap();
    assert!(lock.renew(std::slice::from_ref(&lease)).await[0].is_ok());
    let cut = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction' AND query LIKE 'SET LOCAL%' \
         AND pid IN (SELECT pid FROM pg_locks WHERE relation = '{table}_holds'::regclass)"
    );
    assert_eq!(server().query(&cut).unwrap().len(), 1, "one transaction is open");
    assert_eq!(lock.renew(std::slice::from_ref(&lease)).await.remove(0).unwrap_err().kind(), ErrorKind::Fenced);
    assert!(lease.is_lost());
    lock.acquire(&id, &LeaseRequest { wait: Duration::from_secs(1), lease: LONG }).await.unwrap();
}
