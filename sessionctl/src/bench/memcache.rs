//! What runs beside ours on a memcached server: plain programs over the same client; and how much those ask who wait.
//!
//! The plain programs know nothing of this library, and keep fewer promises: one locks and does not wait, renew or remember what was
//! destroyed; the other does not lock at all. Each shares one client among its tasks, as our handler does.

use std::time::Duration;

use ::memcache::exp::{AsyncMetaClient, Delete, Get, Meta, Op, OpResult, Set, Ttl};
use session_core::{Dsn, Error, ErrorKind, WriteId};
use sessionkit::Sessions;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::bench::Round;
use crate::bench::ours::{LEASE, TTL, lost, run};
use crate::failure::Failure;

/// What our handler puts before a payload.
const HEADER: usize = 26;

/// How long the value of a lock of ours is, about: who holds it, and since when.
const LOCK: usize = 80;

/// Which plain program.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Program {
    /// Add the lock and get, in one batch; compare and set, and compare and delete the lock, in another.
    Locked,
    /// Get; then set.
    Unlocked,
}

/// A plain program and the keys of its tasks.
pub(crate) struct PlainCycle {
    program: Program,
    client: AsyncMetaClient,
    keys: Vec<Keys>,
}

#[derive(Clone)]
struct Keys {
    data: String,
    lock: String,
}

impl PlainCycle {
    /// Connects to `server` as our handler does, and stores what is to be read under the prefix of `dsn`.
    pub(crate) async fn prepare(
        dsn: &str,
        server: &str,
        program: Program,
        tasks: usize,
        payload: usize,
    ) -> Result<Self, Failure> {
        let dsn = Dsn::parse(dsn)?;
        let prefix = dsn.option("prefix").unwrap_or_default();
        let client = AsyncMetaClient::builder().max_idle(64).connect_async(server).await.map_err(failed)?;
        let name = |task: usize| format!("{prefix}{program:?}-{task}");
        let keys: Vec<_> = (0..tasks).map(|task| Keys { data: name(task), lock: format!("{}.lock", name(task)) }).collect();
        for Keys { data, .. } in &keys {
            client.set(data, vec![b'x'; HEADER + payload]).ttl(ttl(TTL)).send().await.map_err(failed)?;
        }
        Ok(Self { program, client, keys })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.keys.len(), length, |task, mut laps| {
            let (program, client, keys) = (self.program, self.client.clone(), self.keys[task].clone());
            async move {
                while laps.next().await {
                    match program {
                        Program::Locked => locked(&client, &keys).await?,
                        Program::Unlocked => unlocked(&client, &keys).await?,
                    }
                }
                Ok(laps.round())
            }
        })
        .await
    }

    /// Removes what was stored.
    pub(crate) async fn remove(&self) -> Result<(), Failure> {
        for Keys { data, .. } in &self.keys {
            self.client.delete(data).send().await.map_err(failed)?;
        }
        Ok(())
    }
}

async fn locked(client: &AsyncMetaClient, keys: &Keys) -> session_core::Result<()> {
    let token = WriteId::random()?.to_bytes();
    let mut value = vec![b'x'; LOCK];
    value[..token.len()].copy_from_slice(&token);
    let [taken, found] = batch(
        client,
        [
            Set::new(&keys.lock, &value).add().ttl(ttl(LEASE)).return_cas().into(),
            Get::new(&keys.data).meta(Meta::default().cas().ttl()).into(),
        ],
    )
    .await?;
    let (OpResult::Mutation(taken), OpResult::Get(found)) = (taken, found) else { return Err(lost()) };
    let (true, Some(lock), Some(mut data), Some(cas)) = (taken.applied(), taken.cas, found.value, found.item.cas) else {
        return Err(lost());
    };
    count_up(&mut data);
    let [stored, freed] = batch(
        client,
        [
            Set::new(&keys.data, &data).compare_cas(cas).ttl(ttl(TTL)).return_cas().into(),
            Delete::new(&keys.lock).compare_cas(lock).into(),
        ],
    )
    .await?;
    match (stored, freed) {
        (OpResult::Mutation(stored), OpResult::Mutation(freed)) if stored.applied() && freed.applied() => Ok(()),
        _ => Err(lost()),
    }
}

async fn unlocked(client: &AsyncMetaClient, keys: &Keys) -> session_core::Result<()> {
    let found = client.get(&keys.data).send().await.map_err(failed)?;
    let mut data = found.value.ok_or_else(lost)?;
    count_up(&mut data);
    client.set(&keys.data, &data).ttl(ttl(TTL)).send().await.map_err(failed)?;
    Ok(())
}

/// Sends commands together and returns what became of each.
async fn batch<const N: usize>(client: &AsyncMetaClient, commands: [Op; N]) -> session_core::Result<[OpResult; N]> {
    let outcomes = client.run_batch(commands).await.map_err(failed)?;
    let outcomes = outcomes.into_iter().collect::<Result<Vec<_>, _>>().map_err(failed)?;
    outcomes.try_into().map_err(|_| lost())
}

fn count_up(data: &mut [u8]) {
    data[HEADER] = data[HEADER].wrapping_add(1);
}

fn ttl(length: Duration) -> Ttl {
    Ttl::secs(u32::try_from(length.as_secs()).unwrap_or(u32::MAX))
}

fn failed(error: ::memcache::exp::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "bench", "a plain program was refused").with_source(error)
}

/// How many wait, for [`commands_of_waiters`].
pub(crate) const WAITERS: usize = 100;

/// How long the commands of waiters are counted.
const COUNTED: Duration = Duration::from_secs(1);

/// How long waiters are given until they ask as seldom as they ever do.
const SETTLE: Duration = Duration::from_millis(500);

/// Counts how many commands a second `server` gets of [`WAITERS`] tasks that wait for one session: tasks that share one of ours, or
/// each with its own, as they would be in as many processes.
pub(crate) async fn commands_of_waiters(dsn: &str, server: &str, apart: bool) -> Result<f64, Failure> {
    let own = async || {
        let builder = Sessions::builder(sessionkit::handler(dsn).await?).wait(Duration::from_secs(60)).lease(LEASE);
        builder.queue(WAITERS).build()
    };
    let sessions = own().await?;
    let mut session = sessions.create()?;
    session.insert("n", &0)?;
    let id = session.close().await?.ok_or_else(lost)?;
    let held = sessions.open(&id).await?;
    let shared = own().await?;
    let mut waiting = JoinSet::new();
    for _ in 0..WAITERS {
        let (sessions, id) = (if apart { own().await? } else { shared.clone() }, id.clone());
        waiting.spawn(async move { sessions.open(&id).await?.abort().await });
    }
    tokio::time::sleep(SETTLE).await;
    let before = commands(server).await?;
    let began = tokio::time::Instant::now();
    tokio::time::sleep(COUNTED).await;
    let (after, length) = (commands(server).await?, began.elapsed());
    held.abort().await?;
    while let Some(ended) = waiting.join_next().await {
        ended.expect("a waiter does not panic")?;
    }
    sessions.destroy(&id).await?;
    #[expect(clippy::cast_precision_loss, reason = "nobody sends 2^52 commands in a second")]
    Ok((after - before) as f64 / length.as_secs_f64())
}

/// What a server counts commands under, the meta commands of the same effect included.
const COUNTERS: [&str; 4] = ["cmd_get", "cmd_set", "delete_hits", "delete_misses"];

/// Asks a server how many commands it has got of those that we send.
async fn commands(server: &str) -> Result<u64, Failure> {
    let asking = async {
        let mut stream = BufReader::new(TcpStream::connect(server).await?);
        stream.write_all(b"stats\r\n").await?;
        let (mut line, mut sum) = (String::new(), 0);
        while stream.read_line(&mut line).await? > 0 && !line.starts_with("END") {
            let counter = line.strip_prefix("STAT ").and_then(|rest| rest.trim_end().split_once(' '));
            if let Some((_, count)) = counter.filter(|(name, _)| COUNTERS.contains(name)) {
                sum += count.parse().unwrap_or(0);
            }
            line.clear();
        }
        Ok(sum)
    };
    asking.await.map_err(Failure::local("ask the server for its statistics"))
}
