//! Connections to each server, each of which carries one batch at a time. There are as many as batches are on their way at once.
//!
//! A server that does not answer fails its own sessions and nobody else's. Which server a session is on is not known here.

use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use session_core::ErrorKind;
use tokio::time::{Instant as At, timeout_at};

use crate::config::{MemcacheConfig, MemcacheServer};
use crate::connection::{Connection, Facts};
use crate::transport::{Answers, Failure, Flight, Transport};

/// A connection that has been idle for longer is not trusted: something between may have forgotten it.
const IDLE: Duration = Duration::from_secs(60);

/// How long a server counts as down after it could not be reached.
const DOWN: Duration = Duration::from_secs(5);

/// The size of items where no server has been asked yet.
const ITEM_LIMIT: usize = 1 << 20;

pub(crate) struct Pool {
    servers: Vec<Server>,
    timeout: Duration,
    connect_timeout: Duration,
    login: Option<(String, String)>,
}

struct Server {
    name: String,
    host: String,
    port: u16,
    idle: Mutex<Vec<Connection>>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    facts: Option<Arc<Facts>>,
    down_until: Option<Instant>,
}

impl Pool {
    pub(crate) fn new(config: &MemcacheConfig) -> Self {
        let server = |server: &MemcacheServer| Server {
            name: server.to_string(),
            host: server.host.clone(),
            port: server.port,
            idle: Mutex::default(),
            known: Mutex::default(),
        };
        Self {
            servers: config.servers.iter().map(server).collect(),
            timeout: config.timeout,
            connect_timeout: config.connect_timeout,
            login: config.user.clone().zip(config.password.clone()),
        }
    }

    async fn connect(&self, server: &Server) -> Result<Connection, Failure> {
        let login = self.login.as_ref().map(|(user, password)| (&**user, &**password));
        let opening = Connection::open(&server.host, server.port, login);
        let opened = tokio::time::timeout(self.connect_timeout, opening).await;
        let opened = opened.unwrap_or_else(|_| Err(Failure::unavailable("it did not let us in in time")));
        let mut known = server.known();
        match &opened {
            Ok(connection) => *known = Known { facts: Some(connection.facts.clone()), down_until: None },
            Err(failure) if failure.kind == ErrorKind::Unavailable => known.down_until = Some(Instant::now() + DOWN),
            Err(_) => {}
        }
        drop(known);
        opened
    }

    async fn checkout(&self, server: &Server) -> Result<Connection, Failure> {
        // The last one that was used is the warmest.
        while let Some(connection) = server.take() {
            if connection.is_usable(IDLE) {
                return Ok(connection);
            }
        }
        self.connect(server).await
    }

    async fn exchange_with(&self, server: &Server, flights: Vec<Flight>) -> Vec<Result<Answers, Failure>> {
        let mut connection = match self.checkout(server).await {
            Ok(connection) => connection,
            Err(failure) if flights.len() == 1 => return vec![Err(failure)],
            Err(failure) => return flights.iter().map(|_| Err(failure.again())).collect(),
        };
        let facts = connection.facts.clone();
        let mut commands = Vec::new();
        // How many answers each has to get, or why it was not sent.
        let mut sent = Vec::with_capacity(flights.len());
        for flight in flights {
            match facts.judge(&flight) {
                Ok(()) => {
                    sent.push(Ok(flight.commands.len()));
                    if commands.is_empty() {
                        commands = flight.commands;
                    } else {
                        commands.extend(flight.commands);
                    }
                }
                Err(failure) => sent.push(Err(failure)),
            }
        }
        let until = At::now() + self.timeout;
        let exchanged = match timeout_at(until, connection.exchange(commands)).await {
            Ok(answers) => answers,
            Err(_) => Err(Failure::unavailable("it did not answer in time").after_sending(false)),
        };
        let mut answers = match exchanged {
            Ok(answers) => answers.into_iter(),
            Err(failure) if sent.len() == 1 => return vec![Err(sent.pop().and_then(Result::err).unwrap_or(failure))],
            Err(failure) => {
                return sent.into_iter().map(|sent| Err(sent.err().unwrap_or_else(|| failure.again()))).collect();
            }
        };
        connection.idle_since = Instant::now();
        server.put(connection);
        let mut next = |count| Answers::new(answers.by_ref().take(count).collect(), facts.life);
        sent.into_iter().map(|sent| sent.map(&mut next)).collect()
    }
}

impl Server {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Connection> {
        self.idle().pop()
    }

    fn put(&self, connection: Connection) {
        self.idle().push(connection);
    }
}

#[async_trait]
impl Transport for Pool {
    async fn exchange_all(&self, server: usize, flights: Vec<Flight>) -> Vec<Result<Answers, Failure>> {
        let server = &self.servers[server];
        let mut answers = self.exchange_with(server, flights).await;
        for failed in answers.iter_mut().filter(|answers| answers.is_err()) {
            let failure = mem::replace(failed, Err(Failure::restarted()));
            *failed = failure.map_err(|failure| failure.of(&server.name));
        }
        answers
    }

    async fn keys(
        &self,
        server: usize,
        prefix: &str,
        key: &mut (dyn for<'k> FnMut(&'k str) + Send + '_),
    ) -> Result<(), Failure> {
        let server = &self.servers[server];
        let listed = match self.connect(server).await {
            Ok(connection) => connection.keys(prefix, self.timeout, key).await,
            Err(failure) => Err(failure),
        };
        listed.map_err(|failure| failure.of(&server.name))
    }

    fn servers(&self) -> usize {
        self.servers.len()
    }

    fn is_down(&self, server: usize) -> bool {
        self.servers[server].known().down_until.is_some_and(|until| until > Instant::now())
    }

    fn item_limit(&self) -> usize {
        let limits = self.servers.iter().filter_map(|server| server.known().facts.as_ref().map(|facts| facts.item_limit));
        limits.min().unwrap_or(ITEM_LIMIT)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.servers.iter().map(|server| &*server.name).collect();
        f.debug_struct("Pool").field("servers", &names).finish_non_exhaustive()
    }
}
