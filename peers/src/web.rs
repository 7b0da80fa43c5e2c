//! Whole requests: an axum application over the middleware of a peer, which visitors call as `sessionctl bench` has ours called.
//!
//! Each visitor has a session of his own, and each request reads a number in it and writes the next. No lock is taken.

use std::io::{Lines, StdinLock};
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use axum_session::{DatabasePool, SessionConfig, SessionLayer, SessionStore};
use serde::Deserialize;
use tokio::sync::Mutex;
use tower_sessions::SessionManagerLayer;
use tower_sessions_redis_store::RedisStore;
use tower_sessions_redis_store::fred::prelude::{ClientLike, Config, Pool, ServerConfig};
use tower_sessions_sqlx_store::PostgresStore;

use crate::http::{Served, Visitor};
use crate::{Outcome, Place, Server, Task, answer, round, table};

/// Which peer.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Middleware {
    TowerSessions,
    AxumSession,
}

/// Connections in the pool for Redis of tower-sessions: that of its documentation.
const POOL: usize = 6;

pub(crate) async fn measure(middleware: Middleware, task: &Task, lines: Lines<StdinLock<'_>>) -> Outcome<()> {
    let table = table()?;
    match (middleware, &task.place) {
        (Middleware::TowerSessions, Place::Redis(server)) => {
            let config = Config {
                server: ServerConfig::new_centralized(server.host.clone(), server.port),
                username: server.user.clone(),
                password: server.password.clone(),
                database: server.database.parse().ok().filter(|number| *number > 0),
                ..Config::default()
            };
            let pool = Pool::new(config, None, None, None, POOL)?;
            pool.init().await?;
            run(tower_sessions(RedisStore::new(pool.clone()), task.payload), task, lines).await?;
            Ok(pool.quit().await?)
        }
        (Middleware::TowerSessions, Place::Postgres(server)) => {
            let options =
                sqlx::postgres::PgConnectOptions::new().host(&server.host).port(server.port).database(&server.database);
            let options = server.user.iter().fold(options, |options, user| options.username(user));
            let options = server.password.iter().fold(options, |options, password| options.password(password));
            let pool = sqlx::postgres::PgPoolOptions::new().max_connections(task.connections).connect_with(options).await?;
            let store = PostgresStore::new(pool.clone()).with_schema_name("public")?.with_table_name(&table)?;
            store.migrate().await?;
            let measured = run(tower_sessions(store, task.payload), task, lines).await;
            sqlx::query(&format!("DROP TABLE \"public\".\"{table}\"")).execute(&pool).await?;
            measured
        }
        (Middleware::AxumSession, Place::Redis(server)) => {
            let client = redis::Client::open(url("redis", server))?;
            let pool = redis_pool::SingleRedisPool::from(client);
            let router = axum_session(axum_session_redispool::SessionRedisPool::from(pool), &table, task.payload).await?;
            run(router, task, lines).await
        }
        (Middleware::AxumSession, Place::Postgres(server)) => {
            use sqlx_of_axum_session::postgres::{PgConnectOptions, PgPoolOptions};
            let options: PgConnectOptions = url("postgres", server).parse()?;
            let pool = PgPoolOptions::new().max_connections(task.connections).connect_with(options).await?;
            let store = axum_session_sqlx::SessionPgPool::from(pool.clone());
            let measured = run(axum_session(store, &table, task.payload).await?, task, lines).await;
            let drop = sqlx_of_axum_session::AssertSqlSafe(format!("DROP TABLE {table}"));
            sqlx_of_axum_session::query(drop).execute(&pool).await?;
            measured
        }
        _ => Err("whole requests are measured on Redis and PostgreSQL".into()),
    }
}

fn url(scheme: &str, Server { host, port, user, password, database }: &Server) -> String {
    let account = match (user, password) {
        (None, None) => String::new(),
        (user, password) => format!("{}:{}@", user.as_deref().unwrap_or_default(), password.as_deref().unwrap_or_default()),
    };
    format!("{scheme}://{account}{host}:{port}/{database}")
}

/// What is in a session besides its number.
fn payload(length: usize) -> String {
    "x".repeat(length)
}

fn tower_sessions(store: impl tower_sessions::SessionStore + Clone, length: usize) -> Router {
    use tower_sessions::Session;
    let begin = async move |session: Session| -> Result<(), StatusCode> {
        session.insert("payload", payload(length)).await.map_err(failed)?;
        session.insert("n", 0_u64).await.map_err(failed)
    };
    let count = async |session: Session| -> Result<String, StatusCode> {
        let n: u64 = session.get("n").await.map_err(failed)?.ok_or(StatusCode::GONE)?;
        session.insert("n", n + 1).await.map_err(failed)?;
        Ok(n.to_string())
    };
    let router = Router::new().route("/begin", post(begin)).route("/count", post(count));
    router.layer(SessionManagerLayer::new(store))
}

async fn axum_session<S>(store: S, table: &str, length: usize) -> Outcome<Router>
where
    S: DatabasePool + Clone + std::fmt::Debug + Send + Sync + 'static,
{
    use axum_session::Session;
    let begin = async move |session: Session<S>| {
        session.set("payload", payload(length));
        session.set("n", 0_u64);
    };
    let count = async |session: Session<S>| -> Result<String, StatusCode> {
        let n: u64 = session.get("n").ok_or(StatusCode::GONE)?;
        session.set("n", n + 1);
        Ok(n.to_string())
    };
    let config = SessionConfig::default().with_table_name(table.to_owned()).with_ip_and_user_agent(false);
    let store = SessionStore::new(Some(store), config).await?;
    let router = Router::new().route("/begin", post(begin)).route("/count", post(count));
    Ok(router.layer(SessionLayer::new(store)))
}

fn failed(error: tower_sessions::session::Error) -> StatusCode {
    eprintln!("peers: {error}");
    StatusCode::INTERNAL_SERVER_ERROR
}

async fn run(router: Router, task: &Task, lines: Lines<StdinLock<'_>>) -> Outcome<()> {
    let served = Served::start(router).await?;
    let mut visitors = Vec::new();
    for _ in 0..task.tasks {
        visitors.push(Arc::new(Mutex::new(Visitor::welcome(&served).await?)));
    }
    answer(lines, async |length| {
        let cycle = async move |visitor: Arc<Mutex<Visitor>>| Ok(visitor.lock().await.count().await?);
        round(&visitors, length, cycle).await
    })
    .await
}
