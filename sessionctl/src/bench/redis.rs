//! What runs beside ours on a Redis server: plain programs over the same client, the peer's store and the peer's session; and our
//! handler with the records of that store, so that like can be put beside like.
//!
//! The plain programs know nothing of this library, and keep fewer promises: one locks and does not wait, renew or fence; the other
//! does not lock at all. Both share one connection among their tasks, as our handler does.

use std::sync::Arc;
use std::time::Duration;

use session_core::{Dsn, Error, ErrorKind, WriteId};
use sessionkit::redis::redis::aio::MultiplexedConnection;
use sessionkit::redis::redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, RedisError, Script, cmd, pipe,
};
use sessionkit::redis::{RedisConfig, RedisServers};
use tower_sessions_core_of_redis_store::session::{Id, Record};
use tower_sessions_core_of_redis_store::{Session, SessionStore};
use tower_sessions_redis_store::RedisStore;
use tower_sessions_redis_store::fred::interfaces::ClientLike;
use tower_sessions_redis_store::fred::prelude::{Config, Pool, ServerConfig};

use crate::bench::Round;
use crate::bench::ours::{LEASE, TTL, count_up, lost, peer_data, peer_failed, run};
use crate::failure::Failure;

/// Writes and unlocks, if the lock is still the caller's.
const SAVE: &str = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end \
                    redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3]) \
                    redis.call('DEL', KEYS[1]) return 1";

/// Which plain program.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Program {
    /// `SET lock NX PX` and `GET` in one pipeline; then a script that compares, writes and unlocks.
    Locked,
    /// `GET`; then `SET`.
    Unlocked,
}

/// A plain program and the keys of its tasks.
pub(crate) struct PlainCycle {
    program: Program,
    connection: MultiplexedConnection,
    digest: Arc<str>,
    keys: Vec<Keys>,
}

#[derive(Clone)]
struct Keys {
    data: String,
    lock: String,
}

impl PlainCycle {
    /// Connects as our handler does, and stores what is to be read.
    pub(crate) async fn prepare(dsn: &str, program: Program, tasks: usize, payload: usize) -> Result<Self, Failure> {
        let config = RedisConfig::from_dsn(&Dsn::parse(dsn)?)?;
        let client = client(&config)?;
        let limits = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(config.connect_timeout))
            .set_response_timeout(Some(config.timeout));
        let mut connection = client.get_multiplexed_async_connection_with_config(&limits).await.map_err(failed)?;
        let script = Script::new(SAVE);
        cmd("SCRIPT").arg("LOAD").arg(SAVE).exec_async(&mut connection).await.map_err(failed)?;
        let name = |task: usize| format!("{}{program:?}:{task}", config.prefix);
        let keys: Vec<_> = (0..tasks).map(|task| Keys { data: name(task), lock: format!("{}:lock", name(task)) }).collect();
        for Keys { data, .. } in &keys {
            let mut set = cmd("SET");
            set.arg(data).arg(vec![b'x'; payload]).arg("PX").arg(millis(TTL));
            set.exec_async(&mut connection).await.map_err(failed)?;
        }
        Ok(Self { program, connection, digest: script.get_hash().into(), keys })
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.keys.len(), length, |task, mut laps| {
            let (program, keys) = (self.program, self.keys[task].clone());
            let (mut connection, digest) = (self.connection.clone(), self.digest.clone());
            async move {
                while laps.next().await {
                    match program {
                        Program::Locked => locked(&mut connection, &keys, &digest).await?,
                        Program::Unlocked => unlocked(&mut connection, &keys).await?,
                    }
                }
                Ok(laps.round())
            }
        })
        .await
    }

    /// Removes what was stored.
    pub(crate) async fn remove(&self) -> Result<(), Failure> {
        let mut connection = self.connection.clone();
        let mut delete = cmd("DEL");
        for Keys { data, lock } in &self.keys {
            delete.arg(data).arg(lock);
        }
        Ok(delete.exec_async(&mut connection).await.map_err(failed)?)
    }
}

fn client(config: &RedisConfig) -> session_core::Result<Client> {
    let RedisServers::Tcp { host, port } = &config.servers else {
        return Err(Error::new(ErrorKind::Unsupported, "bench", "the plain programs know one server only"));
    };
    let mut settings = RedisConnectionInfo::default().set_db(i64::from(config.database));
    if let Some(user) = &config.user {
        settings = settings.set_username(user);
    }
    if let Some(password) = &config.password {
        settings = settings.set_password(password);
    }
    let address = ConnectionAddr::Tcp(host.clone(), *port).into_connection_info().map_err(failed)?;
    Client::open(address.set_redis_settings(settings)).map_err(failed)
}

async fn locked(connection: &mut MultiplexedConnection, keys: &Keys, digest: &str) -> session_core::Result<()> {
    let token = WriteId::random()?.to_bytes();
    let mut open = pipe();
    open.cmd("SET").arg(&keys.lock).arg(&token[..]).arg("NX").arg("PX").arg(millis(LEASE));
    open.cmd("GET").arg(&keys.data);
    let (taken, data): (Option<String>, Option<Vec<u8>>) = open.query_async(connection).await.map_err(failed)?;
    let (Some(_), Some(mut data)) = (taken, data) else { return Err(lost()) };
    data[0] = data[0].wrapping_add(1);
    let mut save = cmd("EVALSHA");
    save.arg(digest).arg(2).arg(&keys.lock).arg(&keys.data).arg(&token[..]).arg(&data).arg(millis(TTL));
    match save.query_async(connection).await.map_err(failed)? {
        1 => Ok(()),
        _ => Err(lost()),
    }
}

async fn unlocked(connection: &mut MultiplexedConnection, keys: &Keys) -> session_core::Result<()> {
    let data: Option<Vec<u8>> = cmd("GET").arg(&keys.data).query_async(connection).await.map_err(failed)?;
    let mut data = data.ok_or_else(lost)?;
    data[0] = data[0].wrapping_add(1);
    cmd("SET").arg(&keys.data).arg(&data).arg("PX").arg(millis(TTL)).exec_async(connection).await.map_err(failed)
}

/// What of the peer runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Layer {
    /// Its store: load, save.
    Store,
    /// Its session, as an application calls it: get, insert, save.
    Session,
}

/// The peer. It takes no lock. Its pool is the one of its documentation.
pub(crate) struct PeerCycle {
    layer: Layer,
    pool: Pool,
    store: RedisStore<Pool>,
    ids: Vec<Id>,
    encoded: Vec<u8>,
}

/// Connections in the peer's pool.
const POOL: usize = 6;

impl PeerCycle {
    pub(crate) async fn prepare(dsn: &str, layer: Layer, tasks: usize, payload: usize) -> Result<Self, Failure> {
        let config = RedisConfig::from_dsn(&Dsn::parse(dsn)?)?;
        let RedisServers::Tcp { host, port } = &config.servers else {
            return Err(Failure::usage("the peer is measured on one server only"));
        };
        let theirs = Config {
            server: ServerConfig::new_centralized(host.clone(), *port),
            username: config.user.clone(),
            password: config.password.clone(),
            database: u8::try_from(config.database).ok().filter(|number| *number > 0),
            ..Config::default()
        };
        let pool = Pool::new(theirs, None, None, None, POOL).map_err(peer_failed)?;
        pool.init().await.map_err(peer_failed)?;
        let store = RedisStore::new(pool.clone());
        // A session of theirs is the way to their date type that needs no further crate; it lives for two weeks.
        let expiry_date = Session::new(None, Arc::new(store.clone()), None).expiry_date();
        let mut record = Record { id: Id::default(), data: peer_data(payload), expiry_date };
        let mut ids = Vec::new();
        for _ in 0..tasks {
            record.id = Id::default();
            store.create(&mut record).await.map_err(peer_failed)?;
            ids.push(record.id);
        }
        let encoded = rmp_serde::to_vec(&record).map_err(peer_failed)?;
        Ok(Self { layer, pool, store, ids, encoded })
    }

    /// A record as the peer stores it.
    pub(crate) fn encoded(&self) -> &[u8] {
        &self.encoded
    }

    pub(crate) async fn run(&self, length: Duration) -> Result<Round, Failure> {
        run(self.ids.len(), length, |task, mut laps| {
            let (layer, store, id) = (self.layer, Arc::new(self.store.clone()), self.ids[task]);
            async move {
                while laps.next().await {
                    match layer {
                        Layer::Store => {
                            let mut record = store.load(&id).await.map_err(peer_failed)?.ok_or_else(lost)?;
                            count_up(&mut record.data)?;
                            store.save(&record).await.map_err(peer_failed)?;
                        }
                        Layer::Session => {
                            let session = Session::new(Some(id), store.clone(), None);
                            let n = session.get::<u64>("n").await.map_err(peer_failed)?.ok_or_else(lost)?;
                            session.insert("n", n + 1).await.map_err(peer_failed)?;
                            session.save().await.map_err(peer_failed)?;
                        }
                    }
                }
                Ok(laps.round())
            }
        })
        .await
    }

    /// Removes what was stored, and disconnects.
    pub(crate) async fn remove(&self) -> Result<(), Failure> {
        for id in &self.ids {
            self.store.delete(id).await.map_err(peer_failed)?;
        }
        Ok(self.pool.quit().await.map_err(peer_failed)?)
    }
}

/// Counts up in a record of the peer's, in the peer's encoding: what its store decodes and encodes, for a handler of ours.
pub(crate) fn count_up_encoded(data: &mut Vec<u8>) -> session_core::Result<()> {
    let mut record: Record = rmp_serde::from_slice(data).map_err(peer_failed)?;
    count_up(&mut record.data)?;
    *data = rmp_serde::to_vec(&record).map_err(peer_failed)?;
    Ok(())
}

fn failed(error: RedisError) -> Error {
    Error::new(ErrorKind::Unavailable, "bench", "a plain program was refused").with_source(error)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
