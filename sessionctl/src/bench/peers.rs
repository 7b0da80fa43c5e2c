//! The peers that cannot be linked into this program: a program of their own runs them, and is told when and for how long.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use session_core::Dsn;
use sessionkit::redis::{RedisConfig, RedisServers};
use sessionkit::sql::{SqlAddress, SqlConfig, SqlServer};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;

use crate::bench::{Round, sql};
use crate::failure::Failure;

/// A peer, ready to run.
pub(crate) struct ForeignPeer(Mutex<Running>);

struct Running {
    child: Child,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
}

/// What it answers after a round.
#[derive(Deserialize)]
struct Answer {
    took: u64,
    waits: Vec<u32>,
}

impl ForeignPeer {
    /// Starts `program` beside the store of `dsn`; `None` if it has no peer for it.
    /// With `web`, it runs whole requests through the middleware of that name, and otherwise the store alone.
    pub(crate) async fn prepare(
        program: &Path,
        dsn: &str,
        tasks: usize,
        payload: usize,
        web: Option<&'static str>,
    ) -> Result<Option<Self>, Failure> {
        let Some((place, connections)) = place(dsn, web.is_some())? else { return Ok(None) };
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(Failure::local("start the program of the peers"))?;
        let to = child.stdin.take().expect("it is piped");
        let from = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut running = Running { child, to, from };
        // On a pipe and not as arguments: a password is not for the list of processes.
        let task = json!({"place": place, "connections": connections, "tasks": tasks, "payload": payload, "web": web});
        match running.ask(&task.to_string()).await?.as_str() {
            "ready" => Ok(Some(Self(Mutex::new(running)))),
            _ => Err(Failure::no("the program of the peers does not speak as this one does; build both from one tree")),
        }
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        let answer = self.0.lock().await.ask(&length.as_nanos().to_string()).await?;
        let answer: Answer =
            serde_json::from_str(&answer).map_err(|_| Failure::no("the program of the peers did not say what it did"))?;
        let began = Instant::now();
        Ok(Round { ran: (began, began + Duration::from_nanos(answer.took)), waits: answer.waits })
    }

    /// Has it remove what it stored, and end.
    pub(crate) async fn end(self) -> Result<(), Failure> {
        let Running { mut child, to, .. } = self.0.into_inner();
        drop(to);
        let ended = child.wait().await.map_err(Failure::local("wait for the program of the peers"))?;
        if ended.success() { Ok(()) } else { Err(Failure::no("the program of the peers failed")) }
    }
}

impl Running {
    async fn ask(&mut self, line: &str) -> Result<String, Failure> {
        let talk = || Failure::local("talk to the program of the peers");
        self.to.write_all(format!("{line}\n").as_bytes()).await.map_err(talk())?;
        let answer = self.from.next_line().await.map_err(talk())?;
        answer.ok_or_else(|| Failure::no("the program of the peers ended early"))
    }
}

/// Says where the peer of a store runs, and on how many connections; `None` if there is none for it.
fn place(dsn: &str, web: bool) -> Result<Option<(Value, u32)>, Failure> {
    let parsed = Dsn::parse(dsn)?;
    if RedisConfig::SCHEMES.contains(&parsed.scheme()) {
        let config = RedisConfig::from_dsn(&parsed)?;
        let RedisServers::Tcp { host, port } = &config.servers else { return Ok(None) };
        let RedisConfig { user, password, database, .. } = &config;
        let server =
            json!({"host": host, "port": port, "user": user, "password": password, "database": database.to_string()});
        return Ok(web.then(|| (json!({"redis": server}), 0)));
    }
    if !SqlConfig::SCHEMES.contains(&parsed.scheme()) {
        return Ok(None);
    }
    let config = SqlConfig::from_dsn(&parsed)?;
    let place = match &config.server {
        SqlServer::Postgres(address) => server(address, 5432).map(|server| json!({"postgres": server})),
        _ if web => None,
        SqlServer::MySql(address) => server(address, 3306).map(|server| json!({"mysql": server})),
        SqlServer::Sqlite(path) => {
            let synced = sql::synced(dsn)?;
            path.to_str().map(|path| json!({"sqlite": {"path": path, "synced": synced}}))
        }
        _ => None,
    };
    Ok(place.map(|place| (place, config.connections())))
}

fn server(address: &SqlAddress, usual: u16) -> Option<Value> {
    let port = if address.port == 0 { usual } else { address.port };
    let SqlAddress { host, user, password, database, .. } = address;
    let tcp = address.socket.is_none();
    tcp.then(|| json!({"host": host, "port": port, "user": user, "password": password, "database": database}))
}
