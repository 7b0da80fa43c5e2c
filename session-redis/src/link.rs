//! One server and the connection that all sessions share to it: made when needed, replaced when it broke.
//!
//! Every call says whether a request that failed may have reached the server. What a request means, and whether to ask again, is
//! not known here.

use std::borrow::Cow;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::sentinel::SentinelClient;
use redis::{AsyncConnectionConfig, Client, Pipeline, RedisError, ServerError, ServerErrorKind, Value};
use session_core::leased::Failed;
use session_core::{Error, ErrorKind};

/// The first and the longest pause after an attempt to connect that failed.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// How many time-outs in a row make a connection suspect: its peer may be gone without a word.
const SILENCES: u32 = 2;

const NOT_PERMITTED: &str = "the user may not do this; see the permissions in the documentation of session-redis";

/// Why a request has no answer that could be used.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: ErrorKind,
    message: Cow<'static, str>,
    source: Option<RedisError>,
    /// Whether the server may have carried the request out.
    pub(crate) sent: bool,
    /// Whether it is what the server said, or what that means.
    pub(crate) answered: bool,
    /// Whether another attempt, on a connection made anew, may fare better.
    pub(crate) passing: bool,
}

impl Failure {
    fn unsent(message: impl Into<Cow<'static, str>>, source: Option<RedisError>) -> Self {
        Self { kind: ErrorKind::Unavailable, message: message.into(), source, sent: false, answered: false, passing: false }
    }

    fn lost(source: RedisError) -> Self {
        let timed_out = source.is_timeout();
        let message = if timed_out { "the server did not answer in time" } else { "the connection broke before the answer" };
        Self {
            kind: ErrorKind::Unavailable,
            message: message.into(),
            source: Some(source),
            sent: true,
            answered: false,
            // Whoever did not answer in time would be asked at the price of another time-out.
            passing: !timed_out,
        }
    }

    /// Draws the conclusion from an error that the server answered with: nothing was changed.
    pub(crate) fn refused(error: &ServerError) -> Self {
        let (kind, message): (_, Cow<'static, str>) = match (error.kind(), error.code()) {
            (Some(ServerErrorKind::ReadOnly), _) => (ErrorKind::Unavailable, "the server has become a replica".into()),
            (Some(ServerErrorKind::BusyLoading), _) => {
                (ErrorKind::Unavailable, "the server is still loading its data".into())
            }
            (Some(ServerErrorKind::MasterDown), _) => (ErrorKind::Unavailable, "the server has lost its master".into()),
            (Some(ServerErrorKind::ClusterDown | ServerErrorKind::TryAgain), _) => {
                (ErrorKind::Unavailable, "the cluster does not serve this slot now".into())
            }
            (Some(ServerErrorKind::Moved | ServerErrorKind::Ask), _) => {
                (ErrorKind::Config, "the server belongs to a cluster; use redis+cluster://".into())
            }
            (Some(ServerErrorKind::NoPerm), _) => (ErrorKind::Config, NOT_PERMITTED.into()),
            (_, "NOAUTH") => (ErrorKind::Config, "the server asks for a password; write redis://:password@host".into()),
            (_, "WRONGPASS") => (ErrorKind::Config, "the server refuses this user and password".into()),
            (_, "WRONGTYPE") => {
                (ErrorKind::Corrupt, "a key of the session holds something that is not ours; it was left alone".into())
            }
            (_, "OOM") => {
                (ErrorKind::Unavailable, "the server is at its maxmemory and may evict nothing; nothing was changed".into())
            }
            (_, "NOREPLICAS") => (ErrorKind::Unavailable, "too few replicas are connected for min-replicas-to-write".into()),
            (_, "MISCONF") => (ErrorKind::Unavailable, "the server cannot write to its disk and refuses changes".into()),
            (_, "BUSY") => (ErrorKind::Unavailable, "the server is busy with somebody's script".into()),
            _ if error.details().is_some_and(|details| details.contains("DB index is out of range")) => {
                (ErrorKind::Config, "the server has no database of this number; see its setting databases".into())
            }
            // What a script may not do, in the words of different versions.
            _ if error.details().is_some_and(|details| {
                details.contains("ACL failure in script") || details.contains("user executing the script can't")
            }) =>
            {
                (ErrorKind::Config, NOT_PERMITTED.into())
            }
            // The details could name keys.
            (_, code) => (ErrorKind::Unexpected, format!("the server answered with the error {code}").into()),
        };
        let passing = matches!(
            error.kind(),
            Some(
                ServerErrorKind::ReadOnly
                    | ServerErrorKind::MasterDown
                    | ServerErrorKind::ClusterDown
                    | ServerErrorKind::TryAgain
            )
        );
        Self { kind, message, source: None, sent: false, answered: true, passing }
    }

    /// Draws the conclusion from an attempt to connect that failed.
    fn connecting(error: RedisError) -> Self {
        let text = error.to_string();
        let (kind, message) = if error.kind() == redis::ErrorKind::AuthenticationFailed
            || matches!(error.code(), Some("WRONGPASS" | "NOAUTH" | "NOPERM"))
        {
            (ErrorKind::Config, "the server refuses this user and password")
        } else if text.contains("DB index is out of range") || text.contains("switch database") {
            (ErrorKind::Config, "the server has no database of this number; see its setting databases")
        } else if error.kind() == redis::ErrorKind::MasterNameNotFoundBySentinel {
            (ErrorKind::Unavailable, "no sentinel knows a master of this name that answers")
        } else if text.contains("peer certificate") {
            (ErrorKind::Config, "the server's certificate is not trusted; ca= names who may sign it")
        } else if error.kind() == redis::ErrorKind::InvalidClientConfig {
            (ErrorKind::Config, "the address or a certificate cannot be used")
        } else {
            (ErrorKind::Unavailable, "the server cannot be reached")
        };
        Self { kind, message: message.into(), source: Some(error), sent: false, answered: false, passing: false }
    }

    pub(crate) fn unexpected(message: &'static str) -> Self {
        Self {
            kind: ErrorKind::Unexpected,
            message: message.into(),
            source: None,
            sent: false,
            answered: true,
            passing: false,
        }
    }

    pub(crate) fn corrupt(message: &'static str) -> Self {
        Self { kind: ErrorKind::Corrupt, message: message.into(), source: None, sent: false, answered: true, passing: false }
    }

    /// No server of the cluster has the slot.
    pub(crate) fn uncovered() -> Self {
        let message = "no server of the cluster serves this slot now".into();
        Self { kind: ErrorKind::Unavailable, message, source: None, sent: false, answered: false, passing: true }
    }

    /// Others were not answered in time while it waited to be sent.
    pub(crate) fn silent() -> Self {
        Self::unsent("the server does not answer in time, and many wait", None)
    }

    /// Whether the server did not answer in time.
    pub(crate) fn is_silence(&self) -> bool {
        self.source.as_ref().is_some_and(RedisError::is_timeout)
    }

    /// Whoever was to send it has ended.
    pub(crate) fn abandoned() -> Self {
        let message = "the runtime ended before the answer".into();
        Self { kind: ErrorKind::Unavailable, message, source: None, sent: true, answered: false, passing: true }
    }

    /// The same for another request of the same flight.
    pub(crate) fn again(&self) -> Self {
        Self {
            kind: self.kind,
            message: self.message.clone(),
            source: self.source.clone(),
            sent: self.sent,
            answered: self.answered,
            passing: self.passing,
        }
    }

    /// Too few replicas have the write in time: it is there, and it may be lost with the server.
    pub(crate) fn too_few(have: i64, wanted: u32) -> Self {
        let message = format!("{have} of {wanted} replicas have the write in time").into();
        Self { kind: ErrorKind::Unavailable, message, source: None, sent: true, answered: false, passing: false }
    }

    pub(crate) fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// For something that changes nothing, or that is undone if it happened.
    pub(crate) fn into_error(self, operation: &'static str) -> Error {
        let error = Error::new(self.kind, operation, self.message);
        match self.source {
            Some(source) => error.with_source(source),
            None => error,
        }
    }

    /// The same for a change, which may have happened if it was sent.
    pub(crate) fn into_failed(self, operation: &'static str) -> Failed {
        let sent = self.sent;
        Failed { error: self.into_error(operation), sent }
    }
}

/// How a connection to the server of today is made.
pub(crate) enum Maker {
    /// Always the same address.
    Client(Box<Client>),
    /// Whoever the sentinels name.
    Sentinel(Box<tokio::sync::Mutex<SentinelClient>>),
}

impl Maker {
    pub(crate) async fn client(&self) -> Result<Client, RedisError> {
        match self {
            Self::Client(client) => Ok(Client::clone(client)),
            Self::Sentinel(sentinels) => sentinels.lock().await.async_get_client().await,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    pub(crate) connect: Duration,
    pub(crate) answer: Duration,
}

pub(crate) struct Link {
    maker: Maker,
    timeouts: Timeouts,
    state: Mutex<State>,
    /// How many time-outs there were since the last answer.
    silences: AtomicU32,
    /// One attempt to connect at a time; whoever comes meanwhile shares its outcome.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    connection: Option<MultiplexedConnection>,
    /// Which connection it is, so that a late failure of an old one does not end the new.
    generation: u64,
    /// After a failed attempt: until when nobody tries again, and after what pause.
    rest: Option<(Instant, Duration)>,
}

impl Link {
    pub(crate) fn new(maker: Maker, timeouts: Timeouts) -> Self {
        Self {
            maker,
            timeouts,
            state: Mutex::default(),
            silences: AtomicU32::new(0),
            connecting: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn maker(&self) -> &Maker {
        &self.maker
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of it is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> Option<(u64, MultiplexedConnection)> {
        let state = self.state();
        state.connection.clone().map(|connection| (state.generation, connection))
    }

    async fn connection(&self) -> Result<(u64, MultiplexedConnection), Failure> {
        match self.current() {
            Some(current) => Ok(current),
            // On the heap, so that whoever finds a connection does not carry the room for making one.
            None => Box::pin(self.replace()).await,
        }
    }

    async fn replace(&self) -> Result<(u64, MultiplexedConnection), Failure> {
        let _one = self.connecting.lock().await;
        if let Some(current) = self.current() {
            return Ok(current);
        }
        let pause = match self.state().rest {
            Some((until, _)) if Instant::now() < until => {
                return Err(Failure::unsent("the server could not be reached a moment ago", None));
            }
            Some((_, pause)) => (pause * 2).min(PAUSES.1),
            None => PAUSES.0,
        };
        // As an object: the client's futures are so deep that a compiler would refuse to look through them.
        let connecting: Pin<Box<dyn Future<Output = Result<MultiplexedConnection, Failure>> + Send + '_>> =
            Box::pin(self.connect());
        match connecting.await {
            Ok(connection) => {
                let mut state = self.state();
                state.generation += 1;
                state.connection = Some(connection.clone());
                state.rest = None;
                self.silences.store(0, Ordering::Relaxed);
                Ok((state.generation, connection))
            }
            Err(failure) => {
                self.state().rest = Some((Instant::now() + pause, pause));
                Err(failure)
            }
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, Failure> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeouts.connect))
            .set_response_timeout(Some(self.timeouts.answer));
        let attempt = async {
            let client = self.maker.client().await?;
            client.get_multiplexed_async_connection_with_config(&config).await
        };
        // Sentinels that do not answer are asked one after the other.
        match tokio::time::timeout(self.timeouts.connect * 4, attempt).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(Failure::connecting(error)),
            Err(_) => Err(Failure::unsent("the server cannot be reached in time", None)),
        }
    }

    /// Gives up a connection, unless it has been replaced already.
    fn discard(&self, generation: u64) {
        let mut state = self.state();
        if state.generation == generation {
            state.connection = None;
        }
    }

    fn silent(&self, generation: u64) {
        let mut state = self.state();
        if state.generation == generation {
            let silences = self.silences.fetch_add(1, Ordering::Relaxed) + 1;
            // Where the address can change, silence is a reason to ask for it again.
            if silences >= SILENCES || matches!(self.maker, Maker::Sentinel(_)) {
                state.connection = None;
            }
        }
    }

    /// Sends the commands in one flight and returns their answers, errors of single commands among them.
    pub(crate) async fn ask(&self, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        let (generation, mut connection) = self.connection().await?;
        match connection.send_packed_commands(commands, 0, commands.len()).await {
            Ok(answers) => {
                if answers.iter().any(is_read_only) {
                    self.discard(generation);
                }
                if self.silences.load(Ordering::Relaxed) > 0 && self.state().generation == generation {
                    self.silences.store(0, Ordering::Relaxed);
                }
                Ok(answers)
            }
            Err(error) => {
                if error.is_timeout() {
                    self.silent(generation);
                } else {
                    self.discard(generation);
                }
                Err(Failure::lost(error))
            }
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("connected", &self.state().connection.is_some()).finish_non_exhaustive()
    }
}

/// Whether the server says that it has become a replica: in so many words, or in the answer of a script to one of many.
pub(crate) fn is_read_only(answer: &Value) -> bool {
    match answer {
        Value::Array(parts) => parts.iter().any(|part| error_kind(part) == Some(ServerErrorKind::ReadOnly)),
        answer => error_kind(answer) == Some(ServerErrorKind::ReadOnly),
    }
}

/// Returns what kind of error an answer is, if it is one that has a kind.
pub(crate) fn error_kind(answer: &Value) -> Option<ServerErrorKind> {
    match answer {
        Value::ServerError(error) => error.kind(),
        _ => None,
    }
}
