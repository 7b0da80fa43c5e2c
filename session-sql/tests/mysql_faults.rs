//! What becomes of sessions in MariaDB when a network, a server, a process or a setting is not as one would have it.
#![cfg(feature = "mysql")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use conformance_tests::proxy::{CountFrom, Direction, Proxy};
use conformance_tests::servers::MariaDb;
use session_core::{
    Change, Dsn, ErrorKind, Expect, OpenRequest, Record, Result, SessionHandler, SessionId, Ttl, WriteId, Written,
};
use session_sql::{SqlConfig, SqlHandler, SqlServer};
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions};
use tokio::task::JoinSet;

/// A lease that no test outlives: whoever gets in before its end was let in.
const LEASE: Duration = Duration::from_secs(600);

/// A wait that ends long before [`LEASE`] does, on a machine that is busy with other things.
const SOON: Duration = Duration::from_secs(20);

fn start(options: &[&str]) -> MariaDb {
    MariaDb::start(options).expect("mariadbd starts; Debian has it in the package mariadb-server-core")
}

/// The server of the tests that do it no harm.
fn server() -> &'static MariaDb {
    static SERVER: OnceLock<MariaDb> = OnceLock::new();
    SERVER.get_or_init(|| start(&[]))
}

fn config_of(url: &str, table: &str) -> SqlConfig {
    let config = SqlConfig::from_dsn(&Dsn::parse(url).unwrap()).unwrap().with_table(table).with_create(true);
    config.with_timeout(SOON).with_connect_timeout(SOON)
}

fn config(server: &MariaDb, table: &str) -> SqlConfig {
    config_of(&server.url(), table)
}

async fn on(server: &MariaDb, table: &str) -> SqlHandler {
    SqlHandler::connect(config(server, table)).await.unwrap()
}

fn new_id() -> SessionId {
    SessionId::generate().unwrap()
}

fn wid() -> WriteId {
    WriteId::random().unwrap()
}

fn write_of(data: impl Into<Vec<u8>>) -> Change {
    Change::Write(Record::new(data, Ttl::from_secs(900)))
}

fn exclusive() -> OpenRequest {
    OpenRequest::exclusive(SOON, LEASE)
}

fn existing() -> OpenRequest {
    exclusive().expecting(Expect::Existing)
}

async fn session(handler: &SqlHandler, data: &str) -> SessionId {
    let id = new_id();
    let mut opened = handler.open(&id, &exclusive().expecting(Expect::Fresh)).await.unwrap();
    assert_eq!(opened.save(&write_of(data), wid()).await.unwrap(), Written::Applied);
    id
}

async fn look(handler: &SqlHandler, id: &SessionId) -> Option<String> {
    let mut opened = handler.open(id, &OpenRequest::read_only()).await.unwrap();
    opened.read().await.unwrap().map(|record| String::from_utf8(record.data).unwrap())
}

#[track_caller]
fn kind<T>(outcome: Result<T>) -> ErrorKind {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.kind(),
    }
}

/// Waits for what happens without us.
async fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + SOON;
    while !happened() {
        assert!(tokio::time::Instant::now() < end, "{what}: it did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until so many transactions are open on a server.
async fn until_open(server: &MariaDb, count: usize) {
    let end = tokio::time::Instant::now() + SOON;
    loop {
        // InnoDB answers from a copy for as long as it is asked more than ten times a second.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let open = server.query("SELECT trx_id FROM information_schema.innodb_trx").unwrap().len();
        if open == count {
            return;
        }
        assert!(tokio::time::Instant::now() < end, "{open} transactions are open, not {count}");
    }
}

fn pool_options(server: &MariaDb) -> MySqlConnectOptions {
    server.url().parse::<MySqlConnectOptions>().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_sessions_are_open_at_once_over_a_pool_of_one() {
    let pool = MySqlPoolOptions::new().max_connections(1).connect_with(pool_options(server())).await.unwrap();
    let handler = SqlHandler::from_mysql_pool(pool.clone(), config(server(), "pool_of_one")).await.unwrap();
    let mut open = Vec::new();
    for number in 0..20 {
        let id = session(&handler, "made").await;
        open.push((handler.open(&id, &existing()).await.unwrap(), id, number));
    }
    // The connection is the application's meanwhile.
    sqlx::query("SELECT 1").execute(&pool).await.unwrap();
    for (opened, id, number) in &mut open {
        assert_eq!(opened.read().await.unwrap().unwrap().data, b"made");
        assert_eq!(opened.save(&write_of(format!("by {number}")), wid()).await.unwrap(), Written::Applied);
        assert_eq!(look(&handler, id).await, Some(format!("by {number}")));
    }
    assert_eq!(pool.size(), 1);
    let mut gone = handler.open(&open[0].1, &OpenRequest::destroy()).await.unwrap();
    assert_eq!(gone.destroy().await.unwrap().unwrap().data, b"by 0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_the_application_left_open_does_not_swallow_a_save() {
    let pool = MySqlPoolOptions::new().max_connections(1).connect_with(pool_options(server())).await.unwrap();
    let handler = SqlHandler::from_mysql_pool(pool.clone(), config(server(), "left_open")).await.unwrap();
    sqlx::raw_sql("START TRANSACTION").execute(&pool).await.unwrap();
    let id = session(&handler, "kept").await;
    sqlx::raw_sql("ROLLBACK").execute(&pool).await.unwrap();
    assert_eq!(look(&on(server(), "left_open").await, &id).await.as_deref(), Some("kept"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_does_not_commit_is_refused() {
    let pool = MySqlPoolOptions::new().after_connect(|connection, _| {
        Box::pin(async move { sqlx::raw_sql("SET autocommit=0").execute(connection).await.map(drop) })
    });
    let pool = pool.max_connections(1).connect_with(pool_options(server())).await.unwrap();
    assert_eq!(kind(SqlHandler::from_mysql_pool(pool, config(server(), "uncommitted")).await), ErrorKind::Config);
}

/// The other process of the test below, which says where the table is; without it there is nothing to hold.
const HOLDER: &str = "SESSION_MYSQL_HOLDER";

#[tokio::test(flavor = "multi_thread")]
async fn the_session_of_a_killed_holder_is_free_long_before_its_lease_ends() {
    if let Ok(orders) = std::env::var(HOLDER) {
        let (url, id) = orders.split_once(' ').unwrap();
        let handler = SqlHandler::connect(config_of(url, "killed")).await.unwrap();
        let mut held = Vec::new();
        // The first opening makes the process known, and a later one finds it so.
        for _ in 0..1000 {
            let id = SessionId::parse(id).unwrap();
            held.push(handler.open(&id, &existing()).await.unwrap());
            tokio::time::sleep(Duration::from_millis(50)).await;
            let locked = server_of(url, "SELECT lock_process FROM killed WHERE lock_process IS NOT NULL").await;
            if locked {
                println!("holds");
                std::future::pending::<()>().await;
            }
            held.pop().unwrap().close().await.unwrap();
        }
        panic!("the sign of life never came");
    }
    let handler = on(server(), "killed").await;
    let id = session(&handler, "there").await;
    let name = "the_session_of_a_killed_holder_is_free_long_before_its_lease_ends";
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(HOLDER, format!("{} {}", server().url(), id.as_str()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let held = || server().query("SELECT 1 FROM sessionkit.killed WHERE lock_process IS NOT NULL").unwrap().len() == 1;
    until("a child holds the session", held).await;
    // While it lives nobody takes it for dead, however often he looks.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let early = handler.open(&id, &OpenRequest::exclusive(Duration::from_secs(2), LEASE).expecting(Expect::Existing)).await;
    assert_eq!(kind(early), ErrorKind::LockTimeout);
    let waiting = tokio::spawn({
        let (handler, id) = (handler.clone(), id.clone());
        async move { handler.open(&id, &existing()).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished(), "it got in beside a holder");
    child.kill().unwrap();
    child.wait().unwrap();
    let mut opened = waiting.await.unwrap().unwrap();
    assert_eq!(opened.save(&write_of("taken over"), wid()).await.unwrap(), Written::Applied);
}

async fn server_of(url: &str, sql: &'static str) -> bool {
    use sqlx::ConnectOptions;
    let mut connection = url.parse::<MySqlConnectOptions>().unwrap().connect().await.unwrap();
    sqlx::query(sql).fetch_optional(&mut connection).await.unwrap().is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_dropped_opens_leave_no_transaction_and_no_connection_less() {
    let mariadb = start(&[]);
    let handler = on(&mariadb, "dropped").await;
    let ids: Vec<_> = [session(&handler, "one").await, session(&handler, "two").await, new_id()].into();
    let lease = SOON * 3;
    let mut tasks = JoinSet::new();
    for number in 0..1000_u64 {
        if tasks.len() >= 50 {
            tasks.join_next().await;
        }
        let (handler, id) = (handler.clone(), ids[(number % 3) as usize].clone());
        let expect = if number % 3 == 2 { Expect::Any } else { Expect::Existing };
        tasks.spawn(async move {
            let request = OpenRequest::exclusive(SOON, lease).expecting(expect);
            let _ = tokio::time::timeout(Duration::from_micros(number * 7919 % 6000), handler.open(&id, &request)).await;
        });
    }
    while tasks.join_next().await.is_some() {}
    until_open(&mariadb, 0).await;
    for id in &ids {
        let mut opened = handler.open(id, &exclusive().expecting(Expect::Any)).await.unwrap();
        assert_eq!(opened.save(&write_of("after"), wid()).await.unwrap(), Written::Applied);
    }
    // As many at once as there are connections.
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let handler = handler.clone();
        tasks.spawn(async move { session(&handler, "new").await });
    }
    while let Some(made) = tasks.join_next().await {
        made.unwrap();
    }
    let count = || mariadb.query("SELECT id FROM information_schema.processlist WHERE user='sessionkit'").unwrap().len();
    until("no more connections than allowed are left", || count() <= 9).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_and_restarted_amid_appends_loses_none_that_it_acknowledged() {
    let mariadb = Arc::new(start(&["innodb_flush_log_at_trx_commit = 1"]));
    let handler = on(&mariadb, "storm").await;
    let ids: Vec<_> = [session(&handler, "").await, session(&handler, "").await, session(&handler, "").await].into();
    let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let mut tasks = JoinSet::new();
    for task in 0..9 {
        let (handler, id, stop, next) = (handler.clone(), ids[task % 3].clone(), stop.clone(), next.clone());
        tasks.spawn(async move {
            let mut acknowledged = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let request = OpenRequest::exclusive(SOON, Duration::from_secs(2)).expecting(Expect::Existing);
                let Ok(mut opened) = handler.open(&id, &request).await else {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let Ok(Some(record)) = opened.read().await else { continue };
                let number = next.fetch_add(1, Ordering::Relaxed);
                let data = format!("{}{number} ", String::from_utf8(record.data).unwrap());
                let (change, name) = (write_of(data), wid());
                loop {
                    match opened.save(&change, name).await {
                        Ok(_) => break acknowledged.push(number),
                        Err(error) if error.to_string().contains("refused") => break,
                        Err(error) if error.kind().keeps_opening() => tokio::time::sleep(Duration::from_millis(20)).await,
                        Err(_) => break,
                    }
                }
            }
            (task, acknowledged)
        });
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let mariadb = mariadb.clone();
        tokio::task::spawn_blocking(move || mariadb.kill().and_then(|()| mariadb.restart())).await.unwrap().unwrap();
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    while let Some(done) = tasks.join_next().await {
        let (task, numbers) = done.unwrap();
        acknowledged.entry(task % 3).or_default().extend(numbers);
    }
    let mut count = 0;
    for (at, id) in ids.iter().enumerate() {
        let data = look(&handler, id).await.unwrap();
        let mut there: Vec<u32> = data.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let total = there.len();
        there.sort_unstable();
        there.dedup();
        assert_eq!(there.len(), total, "something was appended twice");
        for number in &acknowledged[&at] {
            assert!(there.binary_search(number).is_ok(), "an acknowledged append is lost");
            count += 1;
        }
    }
    assert!(count > 20, "only {count} appends were acknowledged");
}

/// A handler behind a proxy, one beside it, and a session.
async fn pair(table: &str) -> (Proxy, SqlHandler, SqlHandler, SessionId) {
    let proxy = Proxy::start(server().address().to_string()).await.unwrap();
    let mut behind = config(server(), table);
    if let SqlServer::MySql(address) = &mut behind.server {
        (address.host, address.port) = (proxy.address().ip().to_string(), proxy.address().port());
    }
    let (handler, other) = (SqlHandler::connect(behind).await.unwrap(), on(server(), table).await);
    let id = session(&other, "old").await;
    // What is asked here was asked before over the same connection, and its answer is all there.
    let mut warm = handler.open(&session(&other, "warm").await, &existing()).await.unwrap();
    warm.save(&write_of("warm"), wid()).await.unwrap();
    proxy.reset_counters();
    (proxy, handler, other, id)
}

/// Every few bytes of a flight, there and back.
fn cuts(request: u64, reply: u64) -> impl Iterator<Item = (Direction, u64)> {
    let there = (0..=request).step_by(request as usize / 24 + 1).map(|at| (Direction::ToServer, at));
    there.chain((0..=reply).step_by(reply as usize / 24 + 1).map(|at| (Direction::ToClient, at)))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_cut_at_any_byte_is_a_good_session_or_unavailable_and_keeps_nobody_out() {
    let (proxy, handler, _, id) = pair("cut_open").await;
    let mut opened = handler.open(&id, &existing()).await.unwrap();
    let (request, reply) = (proxy.bytes(Direction::ToServer), proxy.bytes(Direction::ToClient));
    opened.close().await.unwrap();
    assert!(request > 200 && reply > 50, "that was no open");
    let mut good = 0;
    for (direction, at) in cuts(request, reply) {
        let (proxy, handler, other, id) = pair("cut_open").await;
        proxy.cut(direction, at, CountFrom::Now);
        match handler.open(&id, &existing()).await {
            Ok(mut opened) => {
                assert_eq!(opened.read().await.unwrap().unwrap().data, b"old", "{direction:?} {at}");
                assert_eq!(opened.save(&write_of("new"), wid()).await.unwrap(), Written::Applied, "{direction:?} {at}");
                good += 1;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{direction:?} {at}: {error:?}"),
        }
        proxy.heal();
        let mut next = other.open(&id, &existing()).await.unwrap();
        next.save(&write_of("next"), wid()).await.unwrap();
    }
    assert!(good > 0, "no cut was survived");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_cut_at_any_byte_happens_once() {
    let (proxy, handler, _, id) = pair("cut_save").await;
    let mut opened = handler.open(&id, &existing()).await.unwrap();
    proxy.reset_counters();
    opened.save(&write_of("new"), wid()).await.unwrap();
    let (request, reply) = (proxy.bytes(Direction::ToServer), proxy.bytes(Direction::ToClient));
    assert!(request > 50 && reply > 5, "that was no save");
    for (direction, at) in cuts(request, reply) {
        let (proxy, handler, other, id) = pair("cut_save").await;
        let mut opened = handler.open(&id, &existing()).await.unwrap();
        proxy.cut(direction, at, CountFrom::Now);
        let name = wid();
        let mut outcome = opened.save(&write_of("new"), name).await;
        proxy.heal();
        for _ in 0..100 {
            match outcome {
                Err(ref error) if error.kind().keeps_opening() => outcome = opened.save(&write_of("new"), name).await,
                _ => break,
            }
        }
        assert!(outcome.is_ok(), "{direction:?} {at}: {outcome:?}");
        let mut next = other.open(&id, &existing()).await.unwrap();
        assert_eq!(next.read().await.unwrap().unwrap().data, b"new", "{direction:?} {at}");
        next.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_whose_answer_is_late_is_unknown_and_then_settled_by_its_name() {
    let proxy = Proxy::start(server().address().to_string()).await.unwrap();
    let mut behind = config(server(), "late").with_timeout(Duration::from_millis(400));
    if let SqlServer::MySql(address) = &mut behind.server {
        (address.host, address.port) = (proxy.address().ip().to_string(), proxy.address().port());
    }
    let handler = SqlHandler::connect(behind).await.unwrap();
    let id = session(&handler, "old").await;
    // The first save over a connection makes its statement known, and that is what would be swallowed.
    handler.open(&id, &existing()).await.unwrap().save(&write_of("older"), wid()).await.unwrap();
    let mut opened = handler.open(&id, &existing()).await.unwrap();
    proxy.swallow_next_reply();
    let name = wid();
    assert_eq!(kind(opened.save(&write_of("new"), name).await), ErrorKind::Unknown);
    assert_eq!(opened.save(&write_of("new"), name).await.unwrap(), Written::AlreadyApplied);
    assert_eq!(look(&handler, &id).await.as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_the_server_closed_are_made_anew() {
    let mariadb = start(&[]);
    let handler = on(&mariadb, "closed").await;
    let id = session(&handler, "old").await;
    for round in 0..3 {
        let mut opened = handler.open(&id, &existing()).await.unwrap();
        for row in mariadb.query("SELECT id FROM information_schema.processlist WHERE user='sessionkit'").unwrap() {
            // It may have gone by itself.
            let _ = mariadb.query(&format!("KILL {}", row[0]));
        }
        assert_eq!(opened.save(&write_of(format!("round {round}")), wid()).await.unwrap(), Written::Applied);
        assert_eq!(look(&handler, &id).await, Some(format!("round {round}")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_loose_mode_nor_a_time_zone_of_the_server_changes_a_session() {
    let mariadb = start(&["sql_mode = ", "default_time_zone = '+13:00'", "init_connect = \"SET time_zone='-09:30'\""]);
    let handler = on(&mariadb, "loose").await;
    let long = "x".repeat(300_000);
    let id = session(&handler, &long).await;
    let pool = MySqlPoolOptions::new().connect_with(pool_options(&mariadb).timezone(None)).await.unwrap();
    let pooled = SqlHandler::from_mysql_pool(pool, config(&mariadb, "loose")).await.unwrap();
    for zone in ["-11:00", "+05:45", "SYSTEM"] {
        for handler in [&handler, &pooled] {
            let mut opened = handler.open(&id, &existing()).await.unwrap();
            let record = opened.read().await.unwrap().unwrap();
            assert_eq!(record.data.len(), long.len());
            let left = record.ttl.as_duration();
            assert!(left > Duration::from_secs(800), "{left:?} of 900 s are left");
            mariadb.query(&format!("SET GLOBAL time_zone='{zone}'")).unwrap();
            assert_eq!(
                kind(handler.open(&id, &OpenRequest::exclusive(Duration::ZERO, LEASE)).await),
                ErrorKind::LockTimeout
            );
            assert_eq!(opened.save(&write_of(long.clone()), wid()).await.unwrap(), Written::Applied);
        }
    }
    assert_eq!(look(&handler, &id).await.unwrap(), long);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_larger_than_a_packet_is_too_large_and_leaves_the_old_one() {
    let mariadb = start(&["max_allowed_packet = 1M"]);
    let handler = SqlHandler::connect(config(&mariadb, "packets").with_max_bytes(64 << 20)).await.unwrap();
    let id = session(&handler, "old").await;
    let mut opened = handler.open(&id, &existing()).await.unwrap();
    assert_eq!(kind(opened.save(&write_of(vec![7; 2 << 20]), wid()).await), ErrorKind::TooLarge);
    assert_eq!(look(&handler, &id).await.as_deref(), Some("old"));
    assert_eq!(opened.save(&write_of("new"), wid()).await.unwrap(), Written::Applied);
    // Just below it fits.
    let mut opened = handler.open(&id, &existing()).await.unwrap();
    assert_eq!(opened.save(&write_of(vec![b'y'; (1 << 20) - 8192]), wid()).await.unwrap(), Written::Applied);
    assert_eq!(look(&handler, &id).await.unwrap().len(), (1 << 20) - 8192);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_up_wrongly_is_named_with_its_cure_and_without_secrets() {
    let mariadb = start(&[]);
    let refused = async |config: SqlConfig| {
        let error = SqlHandler::connect(config).await.expect_err("it must not connect");
        let text = format!("{error} {error:?}");
        assert!(!text.contains("conformance") && !text.contains("hush"), "a password is in {text}");
        (error.kind(), text)
    };
    let config = |table: &str| config(&mariadb, table).with_create(false);
    let (kind, text) = refused(config("missing")).await;
    assert!(kind == ErrorKind::Config && text.contains("create=on"), "{text}");

    mariadb.query("CREATE TABLE sessionkit.foreigner (id INT PRIMARY KEY, name TEXT)").unwrap();
    let (kind, text) = refused(config("foreigner")).await;
    assert!(kind == ErrorKind::Config && text.contains("other columns"), "{text}");

    on(&mariadb, "shrunk").await;
    mariadb.query("ALTER TABLE sessionkit.shrunk MODIFY data BLOB").unwrap();
    let (kind, text) = refused(config("shrunk")).await;
    assert!(kind == ErrorKind::Config && text.contains("not one of sessionkit"), "{text}");

    on(&mariadb, "newer").await;
    mariadb.query("ALTER TABLE sessionkit.newer COMMENT='sessionkit 7'").unwrap();
    let (kind, text) = refused(config("newer")).await;
    assert!(kind == ErrorKind::Config && text.contains("version 7"), "{text}");

    on(&mariadb, "rows").await;
    mariadb.query("CREATE USER reader@'%' IDENTIFIED BY 'hush'; GRANT SELECT ON sessionkit.* TO reader@'%'").unwrap();
    let reader = |table: &str| config_of(&mariadb.url_of("reader", "hush"), table).with_create(false);
    let (kind, text) = refused(reader("rows")).await;
    assert!(kind == ErrorKind::Config && text.contains("SELECT, INSERT, UPDATE and DELETE"), "{text}");
    // Whoever may not make tables need not leave out what makes them where there is one.
    mariadb
        .query(
            "CREATE USER worker@'%' IDENTIFIED BY 'hush'; GRANT SELECT,INSERT,UPDATE,DELETE ON sessionkit.* TO worker@'%'",
        )
        .unwrap();
    session(&SqlHandler::connect(config_of(&mariadb.url_of("worker", "hush"), "rows")).await.unwrap(), "made").await;
    let (kind, text) = refused(reader("rows_too").with_create(true)).await;
    assert!(kind == ErrorKind::Config && text.contains("may not make the table"), "{text}");

    let (kind, text) = refused(config_of(&mariadb.url_of("reader", "hush!"), "rows")).await;
    assert!(kind == ErrorKind::Config && text.contains("password"), "{text}");
    let (kind, text) = refused(config_of(&mariadb.url().replace("/sessionkit", "/elsewhere"), "rows")).await;
    assert!(kind == ErrorKind::Config, "{text}");

    mariadb.query("SET GLOBAL read_only=1").unwrap();
    let (kind, text) = refused(config("rows")).await;
    assert!(kind == ErrorKind::Unavailable && text.contains("no writes"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_reached_by_its_socket_keeps_sessions() {
    let socket = server().socket_path();
    let url = format!("mariadb://sessionkit:conformance@/sessionkit?socket={}", socket.display());
    let handler = SqlHandler::connect(config_of(&url, "by_socket")).await.unwrap();
    let id = session(&handler, "there").await;
    assert_eq!(look(&on(server(), "by_socket").await, &id).await.as_deref(), Some("there"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_somebody_keeps_locked_fails_only_its_own_save_and_leaves_nothing_open() {
    let mariadb = start(&[]);
    let handler = SqlHandler::connect(config(&mariadb, "kept").with_timeout(Duration::from_secs(3))).await.unwrap();
    let (id, other) = (session(&handler, "old").await, session(&handler, "other").await);
    let mut opened = handler.open(&id, &existing()).await.unwrap();
    let mut somebody = mariadb.connect().unwrap();
    somebody
        .query(&format!("START TRANSACTION; SELECT id FROM sessionkit.kept WHERE id='{}' FOR UPDATE", id.as_str()))
        .unwrap();
    let name = wid();
    let error = opened.save(&write_of("new"), name).await.expect_err("the row is locked");
    assert!(matches!(error.kind(), ErrorKind::Unavailable), "{error:?}");
    assert_eq!(look(&handler, &other).await.as_deref(), Some("other"));
    until_open(&mariadb, 1).await;
    somebody.query("COMMIT").unwrap();
    assert_eq!(opened.save(&write_of("new"), name).await.unwrap(), Written::Applied);
    until_open(&mariadb, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_of_others_that_take_rows_in_any_order_lose_no_save() {
    let mariadb = Arc::new(start(&[]));
    let handler = on(&mariadb, "crossed").await;
    let mut ids = Vec::new();
    for _ in 0..8 {
        ids.push(session(&handler, "0").await);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut troublemakers = Vec::new();
    for turn in 0..2 {
        let (mariadb, stop, mut ids) = (mariadb.clone(), stop.clone(), ids.clone());
        if turn == 1 {
            ids.reverse();
        }
        troublemakers.push(std::thread::spawn(move || {
            let mut connection = mariadb.connect().unwrap();
            let mut deadlocks = 0;
            while !stop.load(Ordering::Relaxed) {
                connection.query("START TRANSACTION").unwrap();
                for id in &ids {
                    let sql = format!("UPDATE sessionkit.crossed SET lock_since=lock_since WHERE id='{}'", id.as_str());
                    if connection.query(&sql).is_err() {
                        deadlocks += 1;
                        break;
                    }
                }
                connection.query("ROLLBACK").unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
            deadlocks
        }));
    }
    let mut tasks = JoinSet::new();
    for id in ids.clone() {
        let handler = handler.clone();
        tasks.spawn(async move {
            let mut applied = 0;
            while applied < 40 {
                let Ok(mut opened) = handler.open(&id, &existing()).await else { continue };
                let count: u32 = String::from_utf8(opened.read().await.unwrap().unwrap().data).unwrap().parse().unwrap();
                assert_eq!(count, applied, "an update is lost");
                let name = wid();
                loop {
                    match opened.save(&write_of((count + 1).to_string()), name).await {
                        Ok(_) => break applied += 1,
                        Err(error) if error.kind().keeps_opening() => {}
                        Err(error) => panic!("a save that nothing stood against was refused: {error:?}"),
                    }
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    for troublemaker in troublemakers {
        troublemaker.join().unwrap();
    }
    until_open(&mariadb, 0).await;
}
