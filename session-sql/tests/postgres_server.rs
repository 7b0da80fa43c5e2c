//! What is peculiar to PostgreSQL: its table, its refusals, its connections, its restarts, and how it wakes.
#![cfg(feature = "postgres")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod postgres_support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conformance_tests::servers::PgBouncer;
use postgres_support::*;
use session_core::{ErrorKind, OpenRequest, Result, Session, SessionHandler, SessionId, Sessions};
use session_sql::{SqlHandler, SqlServer};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_table_says_how_to_make_it_and_create_table_makes_it() {
    let missing = config(&server().url()).with_table("not_yet").with_create(false);
    let error = SqlHandler::connect(missing.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("create=on"), "{error}");
    let handler = connect(missing.clone().with_create(true)).await;
    handler.create_table().await.expect("making it twice is as good as once");
    let id = session(&connect(missing).await, "there").await;
    assert_eq!(look(&handler, &id).await.as_deref(), Some("there"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_goes_away_under_a_handler_is_a_matter_of_configuration() {
    let handler = connect(config(&server().url()).with_table("goes_away")).await;
    let id = session(&handler, "there").await;
    server().query("DROP TABLE goes_away").unwrap();
    assert_eq!(kind(handler.open(&id, &exclusive()).await), ErrorKind::Config);
    handler.create_table().await.unwrap();
    // Statements that were prepared for the old table serve the new one.
    session(&handler, "again").await;
    assert_eq!(look(&handler, &id).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_handlers_that_make_the_table_at_once_all_find_it() {
    for round in 0..12 {
        let mut connecting = JoinSet::new();
        for _ in 0..16 {
            let table = format!("made_at_once_{round}");
            connecting.spawn(SqlHandler::connect(config(&server().url()).with_table(table)));
        }
        while let Some(connected) = connecting.join_next().await {
            connected.unwrap().expect("one of them makes it, and nobody sees it half made");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_whose_index_cannot_have_its_name_is_not_made_at_all() {
    let made = config(&server().url()).with_table("moved");
    connect(made.clone()).await;
    // The index keeps its name.
    server().query("ALTER TABLE moved RENAME TO moved_away").unwrap();
    let error = SqlHandler::connect(made.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("_expires, is taken"), "{error}");
    assert_eq!(value(server(), "SELECT count(*) FROM pg_class WHERE relname = 'moved'"), "0");
    server().query("ALTER INDEX moved_expires RENAME TO moved_away_expires").unwrap();
    connect(made).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_another_schema_is_refused() {
    server().query("CREATE TABLE strange (id text PRIMARY KEY); GRANT ALL ON strange TO sessionkit").unwrap();
    for create in [false, true] {
        let other = config(&server().url()).with_table("strange").with_create(create);
        let error = SqlHandler::connect(other).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("not one that this version can use"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_in_another_schema_of_the_database_is_used_by_its_name() {
    server().query("CREATE SCHEMA apart AUTHORIZATION sessionkit").unwrap();
    let handler = connect(config(&server().url()).with_table("apart.sessions")).await;
    session(&handler, "there").await;
    assert_eq!(value(server(), "SELECT count(*) FROM apart.sessions"), "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_records_are_collected_before_what_is_left_of_others() {
    let handler = connect(config(&server().url()).with_table("leftovers")).await;
    let left = "INSERT INTO leftovers (id, data, write_id, expires_at, expires_minute)
        SELECT 'left' || n, CASE WHEN n > 17 THEN 'x'::bytea END, decode(md5(n::text), 'hex'), n, 0 FROM generate_series(1, 20) n";
    server().query(left).unwrap();
    let freed = async || handler.gc(std::num::NonZeroU32::new(5).unwrap()).await.unwrap();
    assert_eq!((freed().await, freed().await), (3, 0), "three records among twenty rows, in batches of five");
    assert_eq!(value(server(), "SELECT count(*) FROM leftovers"), "10");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_may_not_is_told_so() {
    connect(config(&server().url()).with_table("guarded")).await;
    server().query("CREATE ROLE reader LOGIN PASSWORD 'r'; GRANT SELECT ON guarded TO reader").unwrap();
    let reader = config(&server().url_of("reader", "r")).with_table("guarded");
    let error = SqlHandler::connect(reader).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("grant"), "{error}");
    let maker = config(&server().url_of("reader", "r")).with_table("may_not_be_made");
    let error = SqlHandler::connect(maker).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_and_a_wrong_database_are_matters_of_configuration_and_are_not_printed() {
    let error = SqlHandler::connect(config(&server().url_of("sessionkit", "s3cret-wrong"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(!format!("{error:?} {error}").contains("s3cret"), "{error:?}");
    let mut other = config(&server().url());
    if let SqlServer::Postgres(address) = &mut other.server {
        address.database = "no_such_database".into();
    }
    assert_eq!(kind(SqlHandler::connect(other).await), ErrorKind::Config);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_is_a_way_in() {
    let socket = server().socket_path();
    let directory = socket.parent().unwrap().to_str().unwrap();
    let dsn = format!("postgres://sessionkit@127.0.0.1:{}/sessionkit?socket={directory}", server().port());
    let handler = connect(config(&dsn)).await;
    let id = session(&handler, "there").await;
    assert_eq!(look(&on(server()).await, &id).await.as_deref(), Some("there"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_locked_by_a_transaction_of_somebody_delays_only_itself_and_is_certainly_not_applied() {
    let handler = connect(config(&server().url()).with_table("locked_rows").with_timeout(Duration::from_secs(2))).await;
    let (locked, free) = (session(&handler, "old").await, session(&handler, "old").await);
    let mut opened = open(&handler, &locked, exclusive()).await;
    let mut stranger = server().connect().unwrap();
    stranger.query(&format!("BEGIN; SELECT FROM locked_rows WHERE id = '{}' FOR UPDATE", locked.as_str())).unwrap();

    // Sixteen saves at once, so that they travel together.
    let write = wid();
    let mut others = JoinSet::new();
    for _ in 0..16 {
        let (handler, free) = (handler.clone(), free.clone());
        others.spawn(async move { saved(open(&handler, &free, exclusive()).await, "new").await });
    }
    let outcome = opened.save(&write_of("new"), write).await;
    assert_eq!(kind(outcome), ErrorKind::Unavailable, "the database says that it has not done it");
    while let Some(other) = others.join_next().await {
        other.unwrap();
    }
    stranger.query("ROLLBACK").unwrap();
    opened.save(&write_of("new"), write).await.expect("the opening is still good");
    assert_eq!(look(&handler, &locked).await.as_deref(), Some("new"));
}

async fn pool(connections: u32) -> PgPool {
    let address = server().address();
    let options = PgConnectOptions::new_without_pgpass().host(&address.ip().to_string()).port(address.port());
    let options = options.username("sessionkit").password("conformance").database("sessionkit");
    PgPoolOptions::new().max_connections(connections).acquire_timeout(SOON).connect_with(options).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_of_one_serves_twenty_open_sessions_and_the_application() {
    let pool = pool(1).await;
    let settings = config(&server().url()).with_table("of_the_pool");
    let handler = SqlHandler::from_pg_pool(pool.clone(), settings).await.unwrap();
    let mut held = Vec::new();
    for n in 0..20 {
        let id = session(&handler, &n.to_string()).await;
        held.push((id.clone(), open(&handler, &id, exclusive()).await));
    }
    let (one,): (i32,) = sqlx::query_as("SELECT 1").fetch_one(&pool).await.expect("the connection is free");
    assert_eq!(one, 1);
    // A waiter who is woken, too, takes no connection of the pool.
    let (id, opened) = held.pop().unwrap();
    let waiter = tokio::spawn({
        let (handler, id) = (handler.clone(), id.clone());
        async move { read(&mut open(&handler, &id, exclusive()).await).await }
    });
    until("a place", async || value(server(), "SELECT count(*) FROM of_the_pool WHERE want_token IS NOT NULL") == "1").await;
    saved(opened, "from the holder").await;
    assert_eq!(waiter.await.unwrap().as_deref(), Some("from the holder"));
    for (n, (_, opened)) in held.into_iter().enumerate() {
        saved(opened, &format!("{n} again")).await;
    }
    assert_eq!(pool.size(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolation_that_the_application_prefers_loses_nothing() {
    let pool = pool(8).await;
    server()
        .query("ALTER ROLE sessionkit IN DATABASE sessionkit SET default_transaction_isolation = 'repeatable read'")
        .unwrap();
    let strict = self::pool(8).await;
    let settings = config(&server().url()).with_table("strict_isolation");
    let outcome = appended(&SqlHandler::from_pg_pool(strict, settings.clone()).await.unwrap(), 8, 10).await;
    server().query("ALTER ROLE sessionkit IN DATABASE sessionkit RESET default_transaction_isolation").unwrap();
    assert_eq!(outcome, 80);
    drop(pool);
}

/// Increments one session from `tasks` tasks, `times` each, and returns what it comes to.
async fn appended(handler: &SqlHandler, tasks: usize, times: usize) -> usize {
    let id = session(handler, "").await;
    let mut running = JoinSet::new();
    for _ in 0..tasks {
        let (handler, id) = (handler.clone(), id.clone());
        running.spawn(async move {
            for _ in 0..times {
                let mut opened = open(&handler, &id, OpenRequest::exclusive(3 * SOON, LEASE)).await;
                let data = read(&mut opened).await.unwrap() + "x";
                let mut outcome = opened.save(&write_of(&*data), wid()).await;
                while outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unavailable) {
                    outcome = opened.save(&write_of(&*data), wid()).await;
                }
                outcome.unwrap();
            }
        });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap();
    }
    look(handler, &id).await.unwrap().len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_in_another_process_is_told_by_the_release() {
    let settings = config(&server().url()).with_table("told");
    let (ours, theirs) = (connect(settings.clone()).await, connect(settings).await);
    let id = session(&ours, "old").await;
    // The first wait makes the connection that is listened on.
    for round in 0..5 {
        let opened = open(&ours, &id, exclusive()).await;
        let waiter = tokio::spawn({
            let (theirs, id) = (theirs.clone(), id.clone());
            async move {
                let mut opened = open(&theirs, &id, exclusive()).await;
                let data = read(&mut opened).await;
                opened.close().await.unwrap();
                data
            }
        });
        until("a place", async || value(server(), "SELECT count(*) FROM told WHERE want_token IS NOT NULL") == "1").await;
        let data = format!("round {round}");
        saved(opened, &data).await;
        assert_eq!(waiter.await.unwrap(), Some(data));
    }
    // Told and not found out: a message is there for each that had a place.
    assert_eq!(value(server(), "SELECT count(*) FROM told WHERE want_token IS NOT NULL OR lock_token IS NOT NULL"), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_anybody_who_waits_nobody_is_notified() {
    let settings = config(&server().url()).with_table("quiet");
    let handler = connect(settings).await;
    let listening = PgPool::connect(&server().url()).await.unwrap();
    let id = session(&handler, "old").await;
    until("a sign of life", async || {
        open(&handler, &id, exclusive()).await.close().await.unwrap();
        let opened = open(&handler, &id, exclusive()).await;
        let shown = value(server(), "SELECT to_hex(lock_process) FROM quiet WHERE lock_process IS NOT NULL");
        drop(opened);
        !shown.is_empty()
    })
    .await;
    let mut opened = open(&handler, &id, exclusive()).await;
    let channel = value(server(), "SELECT 'sessionkit_' || to_hex(lock_process) FROM quiet");
    let mut listener = sqlx::postgres::PgListener::connect_with(&listening).await.unwrap();
    listener.listen(&channel).await.unwrap();
    opened.close().await.unwrap();
    for _ in 0..20 {
        saved(open(&handler, &id, exclusive()).await, "new").await;
    }
    // Ours comes after whatever was said before.
    server().query(&format!("NOTIFY \"{channel}\", 'the end'")).unwrap();
    assert_eq!(listener.recv().await.unwrap().payload(), "the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_comes_after_the_claim_takes_nothing_from_the_holder() {
    let handler = connect(config(&server().url()).with_table("late_message")).await;
    let id = session(&handler, "old").await;
    let shown = "SELECT to_hex(lock_process) FROM late_message WHERE lock_process IS NOT NULL";
    until("a sign of life", async || {
        let mut opened = open(&handler, &id, exclusive()).await;
        let seen = !value(server(), shown).is_empty();
        opened.close().await.unwrap();
        seen
    })
    .await;
    let opened = open(&handler, &id, exclusive()).await;
    let row =
        server().query("SELECT 'sessionkit_' || to_hex(lock_process), encode(lock_token, 'hex') FROM late_message").unwrap();
    let [channel, token] = &row[0][..] else { panic!("{row:?}") };
    server().query(&format!("NOTIFY \"{channel}\", '{token} {}'", id.as_str())).unwrap();
    // One that nobody has come for, and the message of it: when that has gone on, the first has been heard.
    let other = session(&handler, "old").await;
    let unclaimed = "0123456789abcdef0123456789abcdef";
    let grant = format!(
        "UPDATE late_message SET lock_token = '\\x{unclaimed}', lock_until = 1e15, lock_handed = true WHERE id = '{}'; \
         NOTIFY \"{channel}\", '{unclaimed} {}'",
        other.as_str(),
        other.as_str()
    );
    server().query(&grant).unwrap();
    saved(open(&handler, &other, exclusive()).await, "let in").await;
    assert_eq!(
        kind(connect(config(&server().url()).with_table("late_message")).await.open(&id, &at_once()).await),
        ErrorKind::LockTimeout
    );
    saved(opened, "new").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_holder_with_a_long_lease_keeps_nobody_waiting_for_it() {
    let settings = config(&server().url()).with_table("killed");
    let ours = connect(settings.clone()).await;
    let id = session(&ours, "old").await;
    // All that a process that is killed has open ends with it; so does what a runtime has.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (held, theirs) = runtime
        .spawn({
            let id = id.clone();
            async move {
                let handler = connect(settings).await;
                let deadline = Instant::now() + SOON;
                loop {
                    let mut opened = open(&handler, &id, exclusive()).await;
                    if value(server(), "SELECT count(*) FROM killed WHERE lock_process IS NOT NULL") == "1" {
                        return (opened, handler);
                    }
                    opened.close().await.unwrap();
                    assert!(Instant::now() < deadline, "no sign of life");
                }
            }
        })
        .await
        .unwrap();
    // For the first seconds of a server nobody is taken for dead.
    until("the age of the server", async || {
        value(server(), "SELECT clock_timestamp() - pg_postmaster_start_time() > '6 s'") == "t"
    })
    .await;
    let waiting = OpenRequest::exclusive(Duration::from_secs(2), LEASE);
    assert_eq!(kind(ours.open(&id, &waiting).await), ErrorKind::LockTimeout, "while he lives he keeps it");
    runtime.shutdown_background();
    // Nobody gives back what he had.
    std::mem::forget((held, theirs));
    saved(open(&ours, &id, OpenRequest::exclusive(SOON, LEASE)).await, "new").await;
    assert_eq!(look(&ours, &id).await.as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sign_of_life_that_broke_comes_back() {
    let handler = connect(config(&server().url()).with_table("comes_back")).await;
    let id = session(&handler, "old").await;
    let shown = "SELECT lock_process FROM comes_back WHERE lock_process IS NOT NULL";
    let mut process = String::new();
    let mut shows = async || {
        let mut opened = open(&handler, &id, exclusive()).await;
        process = value(server(), shown);
        opened.close().await.unwrap();
        !process.is_empty()
    };
    until("a sign of life", &mut shows).await;
    let holds = format!(
        "FROM pg_locks WHERE locktype = 'advisory' AND granted AND ((classid::int8 << 32) | objid::int8) = {process}"
    );
    let first = value(server(), &format!("SELECT pid {holds}"));
    assert!(!first.is_empty());
    server().query(&format!("SELECT pg_terminate_backend({first})")).unwrap();
    until("another connection that holds it", async || {
        let now = value(server(), &format!("SELECT pid {holds}"));
        !now.is_empty() && now != first
    })
    .await;
    drop(handler);
    until("its end with the handler", async || value(server(), &format!("SELECT count(*) {holds}")) == "0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_dropped_opens_leave_no_transaction_no_lock_and_a_full_pool() {
    let handler = connect(config(&server().url()).with_table("dropped")).await;
    let mut ids = Vec::new();
    for _ in 0..50 {
        ids.push(session(&handler, "old").await);
    }
    // Whether a withdrawal comes before what it withdraws is a matter of chance, so more than once.
    for _ in 0..4 {
        let mut running = JoinSet::new();
        for n in 0..1000_u64 {
            let (handler, id) = (handler.clone(), ids[n as usize % ids.len()].clone());
            running.spawn(async move {
                let _ = tokio::time::timeout(Duration::from_micros(n * 13 % 9000), handler.open(&id, &exclusive())).await;
            });
        }
        while let Some(dropped) = running.join_next().await {
            dropped.unwrap();
        }
    }
    let stuck =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sessionkit' AND state LIKE 'idle in transaction%'";
    assert_eq!(value(server(), stuck), "0");
    for id in &ids {
        saved(open(&handler, id, exclusive()).await, "new").await;
    }
    // As many at once as there are connections.
    let mut running = JoinSet::new();
    for id in &ids {
        let (handler, id) = (handler.clone(), id.clone());
        running.spawn(async move { look(&handler, &id).await });
    }
    while let Some(seen) = running.join_next().await {
        assert_eq!(seen.unwrap().as_deref(), Some("new"));
    }
    until("the last one is withdrawn", async || {
        value(
            server(),
            "SELECT count(*) FROM dropped WHERE lock_token IS NOT NULL OR want_until > date_part('epoch', now()) * 1000",
        ) == "0"
    })
    .await;
}

async fn append(sessions: Sessions, id: SessionId, n: u32) -> Result<()> {
    let closure = async move |session: &mut Session| {
        session.update_key("log", move |log: Option<Vec<u32>>| {
            let mut log = log.unwrap_or_default();
            log.push(n);
            log
        })
    };
    sessions.update(&id, closure).await.map(drop)
}

#[derive(Clone, Copy, Debug)]
enum Stop {
    Killed,
    Immediate,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_in_a_storm_loses_nothing_that_it_acknowledged() {
    for stop in [Stop::Killed, Stop::Immediate] {
        let server = Arc::new(start(&[]));
        let sessions =
            Sessions::new(Arc::new(connect(config(&server.url()).with_timeout(Duration::from_secs(5))).await)).unwrap();
        let mut session = sessions.create().unwrap();
        session.insert("log", &Vec::<u32>::new()).unwrap();
        let id = session.close().await.unwrap().expect("it has a value");
        let stops = Instant::now() + Duration::from_millis(700);
        let ends = stops + Duration::from_secs(2);
        let mut running = JoinSet::new();
        for task in 0..8_u32 {
            let (sessions, id) = (sessions.clone(), id.clone());
            running.spawn(async move {
                let (mut acknowledged, mut after, mut n) = (Vec::new(), 0, task * 1_000_000);
                while Instant::now() < ends || after == 0 {
                    n += 1;
                    let appended = append(sessions.clone(), id.clone(), n).await;
                    if appended.is_ok() {
                        acknowledged.push(n);
                        after += u32::from(Instant::now() > stops + Duration::from_millis(500));
                    } else {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    assert!(Instant::now() < ends + 3 * SOON, "it does not work again");
                }
                acknowledged
            });
        }
        tokio::time::sleep_until(stops.into()).await;
        let stopping = server.clone();
        tokio::task::spawn_blocking(move || {
            match stop {
                Stop::Killed => stopping.kill().unwrap(),
                Stop::Immediate => stopping.stop_immediate().unwrap(),
            }
            stopping.restart().unwrap();
        })
        .await
        .unwrap();
        let mut acknowledged = Vec::new();
        while let Some(done) = running.join_next().await {
            acknowledged.extend(done.unwrap());
        }
        let log: Vec<u32> = sessions.view(&id).await.unwrap().get("log").unwrap().unwrap();
        let kept: BTreeSet<_> = log.iter().copied().collect();
        assert_eq!(kept.len(), log.len(), "{stop:?}: nothing counts twice");
        let lost: Vec<_> = acknowledged.iter().filter(|n| !kept.contains(n)).collect();
        assert!(lost.is_empty(), "{stop:?}: lost {lost:?} of {}", acknowledged.len());
        assert!(acknowledged.len() > 16, "{stop:?}: that was no storm");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_tells_neither_ids_nor_payloads() {
    let handler = connect(config(&server().url()).with_table("discreet")).await;
    let id = session(&handler, "payl0ad").await;
    server().query("ALTER TABLE discreet ADD CONSTRAINT never CHECK (octet_length(data) < 10) NOT VALID").unwrap();
    let mut opened = open(&handler, &id, exclusive()).await;
    let error = opened.save(&write_of("payl0ad payl0ad payl0ad"), wid()).await.unwrap_err();
    let told = format!("{error} {error:?}");
    assert!(!told.contains("payl0ad") && !told.contains(id.as_str()) && !told.contains("7061796c"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_takes_no_writes_is_unavailable() {
    let server = start(&[]);
    on(&server).await;
    server.query("ALTER DATABASE sessionkit SET default_transaction_read_only = on").unwrap();
    let error = SqlHandler::connect(config(&server.url()).with_create(false)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("takes no writes"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_keeps_a_connection_for_each_client_changes_nothing() {
    let pooler = PgBouncer::start(server(), &["pool_mode = session"]).expect("Debian has it in the package pgbouncer");
    let handler = connect(config(&pooler.url()).with_table("pooled")).await;
    let id = session(&handler, "old").await;
    let opened = open(&handler, &id, exclusive()).await;
    let waiter = tokio::spawn({
        let (handler, id) = (handler.clone(), id.clone());
        async move { read(&mut open(&handler, &id, exclusive()).await).await }
    });
    until("a place", async || value(server(), "SELECT count(*) FROM pooled WHERE want_token IS NOT NULL") == "1").await;
    saved(opened, "new").await;
    assert_eq!(waiter.await.unwrap().as_deref(), Some("new"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_loses_prepared_statements_is_refused_with_the_cure() {
    let options = ["pool_mode = transaction", "default_pool_size = 1"];
    let pooler = PgBouncer::start(server(), &options).expect("Debian has it in the package pgbouncer");
    connect(config(&server().url()).with_table("mixed_up")).await;
    let settings = config(&pooler.url()).with_table("mixed_up").with_listen(false).with_connections(1);
    let _first = SqlHandler::connect(settings.clone()).await;
    // Newer ones keep them apart.
    match SqlHandler::connect(settings).await {
        Ok(handler) => drop(session(&handler, "there").await),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("max_prepared_statements"), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_tls_is_refused_where_tls_is_asked_for() {
    let dsn = format!("{}?tls=on", server().url());
    let error = SqlHandler::connect(config(&dsn)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains("TLS"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_opened_and_saved_stays_on_its_page() {
    let handler = connect(config(&server().url()).with_table("pages")).await;
    let id = session(&handler, "there").await;
    for n in 0..50 {
        let mut opened = open(&handler, &id, exclusive()).await;
        assert!(matches!(opened.read().await, Ok(Some(_))));
        saved(opened, &n.to_string().repeat(200)).await;
    }
    until("the counters", async || {
        let rows =
            server().query("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'pages'").unwrap();
        let counts: Vec<f64> = rows[0].iter().map(|count| count.parse().unwrap()).collect();
        // A minute that ends meanwhile moves one entry of the index.
        counts[0] >= 100.0 && counts[1] >= counts[0] * 0.9
    })
    .await;
}
