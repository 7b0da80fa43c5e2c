//! The stores that `sessionctl bench` measures ours beside and that cannot be linked into it: those of `tower-sessions-sqlx-store`,
//! and for whole requests ([`web`]) the middlewares of tower-sessions and axum_session.
//!
//! Started with the place to be measured as a line of JSON on stdin, it answers with a line when it is ready, and then with a line
//! for each line that says how long to run, until there are no more. What it stored is removed then. A cycle is load and save; no
//! lock is taken.

#[path = "../../sessionctl/src/bench/http.rs"]
mod http;
mod web;

use std::io::{BufRead, Lines, StdinLock, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::mysql::{MySqlConnectOptions, MySqlPoolOptions};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tower_sessions_core::session::{Id, Record};
use tower_sessions_core::{Session, SessionStore};
use tower_sessions_sqlx_store::{MySqlStore, PostgresStore, SqliteStore};

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The first line.
#[derive(Deserialize)]
struct Task {
    place: Place,
    connections: u32,
    tasks: usize,
    payload: usize,
    /// Whole requests through this middleware, and not the store alone.
    #[serde(default)]
    web: Option<web::Middleware>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Place {
    /// Only for whole requests; the database is a number.
    Redis(Server),
    Postgres(Server),
    MySql(Server),
    /// A write-ahead log, as ours has one.
    Sqlite {
        path: String,
        synced: bool,
    },
}

#[derive(Deserialize)]
struct Server {
    host: String,
    port: u16,
    user: Option<String>,
    password: Option<String>,
    database: String,
}

/// What a round came to.
#[derive(Serialize)]
struct Round {
    took: u64,
    waits: Vec<u32>,
}

#[tokio::main]
async fn main() -> std::process::ExitCode {
    match work().await {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

async fn work() -> Outcome<()> {
    let mut lines = std::io::stdin().lock().lines();
    let first = lines.next().ok_or("this program is for sessionctl bench, which says on stdin what to measure")??;
    let task: Task = serde_json::from_str(&first).map_err(|_| "the first line does not say what to measure")?;
    if let Some(middleware) = task.web {
        return web::measure(middleware, &task, lines).await;
    }
    let table = table()?;
    match &task.place {
        Place::Redis(_) => Err("the store for Redis alone is linked into sessionctl bench".into()),
        Place::Postgres(server) => {
            let options = PgConnectOptions::new().host(&server.host).port(server.port).database(&server.database);
            let options = server.user.iter().fold(options, |options, user| options.username(user));
            let options = server.password.iter().fold(options, |options, password| options.password(password));
            let pool = PgPoolOptions::new().max_connections(task.connections).connect_with(options).await?;
            let store = PostgresStore::new(pool.clone()).with_schema_name("public")?.with_table_name(&table)?;
            store.migrate().await?;
            let measured = measure(store, &task, lines).await;
            sqlx::query(&format!("DROP TABLE \"public\".\"{table}\"")).execute(&pool).await?;
            measured
        }
        Place::MySql(server) => {
            let options = MySqlConnectOptions::new().host(&server.host).port(server.port).database(&server.database);
            let options = server.user.iter().fold(options, |options, user| options.username(user));
            let options = server.password.iter().fold(options, |options, password| options.password(password));
            let pool = MySqlPoolOptions::new().max_connections(task.connections).connect_with(options).await?;
            let store = MySqlStore::new(pool.clone()).with_schema_name(&server.database)?.with_table_name(&table)?;
            store.migrate().await?;
            let measured = measure(store, &task, lines).await;
            sqlx::query(&format!("DROP TABLE `{table}`")).execute(&pool).await?;
            measured
        }
        Place::Sqlite { path, synced } => {
            let synchronous = if *synced { SqliteSynchronous::Full } else { SqliteSynchronous::Normal };
            let options = SqliteConnectOptions::new().filename(path).busy_timeout(Duration::from_secs(30));
            let options = options.journal_mode(SqliteJournalMode::Wal).synchronous(synchronous);
            let pool = SqlitePoolOptions::new().max_connections(task.connections).connect_with(options).await?;
            let store = SqliteStore::new(pool.clone()).with_table_name(&table)?;
            store.migrate().await?;
            let measured = measure(store, &task, lines).await;
            sqlx::query(&format!("DROP TABLE {table}")).execute(&pool).await?;
            measured
        }
    }
}

/// A name that nobody else has.
fn table() -> Outcome<String> {
    Ok(format!("sessionctl_peer_{:x}_{:x}", std::process::id(), std::time::UNIX_EPOCH.elapsed()?.subsec_nanos()))
}

async fn measure<S: SessionStore + Clone>(store: S, task: &Task, lines: Lines<StdinLock<'_>>) -> Outcome<()> {
    // A session of theirs is the way to their date type that needs no further crate; it lives for two weeks.
    let expiry_date = Session::new(None, Arc::new(store.clone()), None).expiry_date();
    let mut ids = Vec::new();
    for _ in 0..task.tasks {
        let data = [("payload".to_owned(), json!("x".repeat(task.payload))), ("n".to_owned(), json!(0))];
        let mut record = Record { id: Id::default(), data: data.into_iter().collect(), expiry_date };
        store.create(&mut record).await?;
        ids.push(record.id);
    }
    answer(lines, async |length| {
        let store = store.clone();
        let cycle = move |id: Id| {
            let store = store.clone();
            async move {
                let mut record = store.load(&id).await?.ok_or("a session that was just stored is not there")?;
                let n = record.data.get("n").and_then(serde_json::Value::as_u64).unwrap_or(0);
                record.data.insert("n".to_owned(), json!(n + 1));
                Outcome::Ok(store.save(&record).await?)
            }
        };
        round(&ids, length, cycle).await
    })
    .await
}

/// Says that it is ready, and runs a round for each line.
async fn answer(lines: Lines<StdinLock<'_>>, mut run: impl AsyncFnMut(Duration) -> Outcome<Round>) -> Outcome<()> {
    println!("ready");
    for line in lines {
        let round = run(Duration::from_nanos(line?.parse()?)).await?;
        serde_json::to_writer(std::io::stdout(), &round)?;
        println!();
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Runs a task for each session, all from the same moment.
async fn round<V, F>(visitors: &[V], length: Duration, cycle: impl Fn(V) -> F + Clone + Send + 'static) -> Outcome<Round>
where
    V: Clone + Send + 'static,
    F: Future<Output = Outcome<()>> + Send,
{
    let start = Arc::new(Barrier::new(visitors.len()));
    let mut running = JoinSet::new();
    for visitor in visitors.iter().cloned() {
        let (cycle, start) = (cycle.clone(), start.clone());
        running.spawn(async move {
            start.wait().await;
            let (began, mut waits) = (Instant::now(), Vec::new());
            let mut before = began;
            while before - began < length {
                cycle(visitor.clone()).await?;
                let now = Instant::now();
                waits.push(u32::try_from((now - before).as_nanos()).unwrap_or(u32::MAX));
                before = now;
            }
            Outcome::Ok((began, before, waits))
        });
    }
    let (mut ran, mut waits) = (None::<(Instant, Instant)>, Vec::new());
    while let Some(ended) = running.join_next().await {
        let (began, before, more) = ended??;
        ran = Some(ran.map_or((began, before), |(first, last)| (first.min(began), last.max(before))));
        waits.extend(more);
    }
    let took = ran.map_or(Duration::ZERO, |(began, ended)| ended - began);
    Ok(Round { took: u64::try_from(took.as_nanos())?, waits })
}
