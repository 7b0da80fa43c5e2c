//! How statements are sent, and what is given to them: alone and prepared, several as one text, or one after the other.
//!
//! Nothing here knows what they mean.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_core::Stream;
use session_core::ErrorKind;
use sqlx::mysql::{MySqlConnectOptions, MySqlPool, MySqlQueryResult, MySqlRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Either, Executor, MySql, MySqlConnection, Row};
use tokio::sync::Notify;

use super::errors;
use super::texts::{Param, Text};
use crate::connections::{Connections, SettingUp};
use crate::database::Failure;

/// What one statement has beside the values that it is given.
const ROOM: usize = 4096;

/// What the statements of a flight are given. What none of them names may be left out.
#[derive(Clone, Copy, Default)]
pub(super) struct Given<'a> {
    pub(super) key: &'a [u8],
    pub(super) token: Option<[u8; 16]>,
    pub(super) lease: i64,
    pub(super) owner: &'a str,
    /// The process, if its liveness lock is in place.
    pub(super) alive: Option<i64>,
    pub(super) process: i64,
    pub(super) book: i64,
    pub(super) waited: i64,
    pub(super) clean: bool,
    pub(super) data: &'a [u8],
    pub(super) write: Option<[u8; 16]>,
    pub(super) prev: Option<[u8; 16]>,
    pub(super) ttl: i64,
    pub(super) stay: i64,
    pub(super) protects: bool,
    pub(super) from: &'a [u8],
    pub(super) to: &'a [u8],
    pub(super) limit: u32,
    /// A list; the last of it stands in all the places that are left.
    pub(super) keys: &'a [String],
}

#[derive(Clone, Copy)]
enum Value<'a> {
    Null,
    Number(i64),
    Bytes(&'a [u8]),
}

impl Given<'_> {
    fn value(&self, param: Param) -> Value<'_> {
        let id = |id: &'_ Option<[u8; 16]>| id.is_some();
        match param {
            Param::Key => Value::Bytes(self.key),
            Param::Token if id(&self.token) => Value::Bytes(self.token.as_ref().map_or(&[], |id| &id[..])),
            Param::Write if id(&self.write) => Value::Bytes(self.write.as_ref().map_or(&[], |id| &id[..])),
            Param::Prev if id(&self.prev) => Value::Bytes(self.prev.as_ref().map_or(&[], |id| &id[..])),
            Param::Token | Param::Write | Param::Prev => Value::Null,
            Param::Lease => Value::Number(self.lease),
            Param::Owner => Value::Bytes(self.owner.as_bytes()),
            Param::Alive => self.alive.map_or(Value::Null, Value::Number),
            Param::Process => Value::Number(self.process),
            Param::Book => Value::Number(self.book),
            Param::Waited => Value::Number(self.waited),
            Param::Clean => Value::Number(self.clean.into()),
            Param::Data => Value::Bytes(self.data),
            Param::Ttl => Value::Number(self.ttl),
            Param::Stay => Value::Number(self.stay),
            Param::Protects => Value::Number(self.protects.into()),
            Param::From => Value::Bytes(self.from),
            Param::To => Value::Bytes(self.to),
            Param::Limit => Value::Number(self.limit.into()),
            Param::Listed(at) => {
                self.keys.get(at).or(self.keys.last()).map_or(Value::Null, |key| Value::Bytes(key.as_bytes()))
            }
        }
    }
}

/// What a statement was answered with.
#[derive(Default)]
pub(super) struct Answer {
    /// How many rows it found to change, changed or not.
    pub(super) matched: u64,
    pub(super) rows: Vec<MySqlRow>,
}

/// Where statements are sent.
pub(super) struct Link {
    connections: Connections<MySql>,
    timeout: Duration,
    /// The longest packet that the server takes.
    pub(super) packet: Arc<AtomicUsize>,
    /// Told when a connection has broken.
    pub(super) broke: Arc<Notify>,
}

impl Link {
    pub(super) fn own(options: MySqlConnectOptions, count: u32, timeout: Duration, connect_timeout: Duration) -> Self {
        let packet = Arc::new(AtomicUsize::new(usize::MAX));
        // The server gives up a row first, and says so, while we still listen.
        let patience = timeout.as_secs().saturating_sub(1).max(1);
        let known = packet.clone();
        let connections = Connections::new(
            plain(options),
            move |connection: &mut MySqlConnection| set_up(connection, known.clone(), patience),
            count,
            connect_timeout,
        );
        Self { connections, timeout, packet, broke: Arc::default() }
    }

    pub(super) fn lent(pool: MySqlPool, timeout: Duration) -> Self {
        let packet = Arc::new(AtomicUsize::new(usize::MAX));
        Self { connections: Connections::Shared(pool), timeout, packet, broke: Arc::default() }
    }

    /// Returns how to make a connection beside the others.
    pub(super) fn options(&self) -> MySqlConnectOptions {
        plain(self.connections.options())
    }

    /// Whether what is asked in one flight may be of several statements; over a pool that is not ours each is a trip of its own, so
    /// that no value ever stands in a text that somebody else may log.
    pub(super) fn flies(&self) -> bool {
        matches!(self.connections, Connections::Own(_))
    }

    /// Whether a text of so many bytes is small enough for the server.
    pub(super) fn takes(&self, bytes: usize) -> bool {
        bytes.saturating_add(ROOM) <= self.packet.load(Ordering::Relaxed)
    }

    /// Asks one statement, or several in one flight. The first that fails ends it.
    pub(super) async fn ask(&self, flight: &[&Text], given: &Given<'_>) -> Result<Vec<Answer>, Failure> {
        self.try_ask(flight, given).await?.map_err(errors::asking)
    }

    /// The same, with errors that the server answered with left as they are.
    pub(super) async fn try_ask(
        &self,
        flight: &[&Text],
        given: &Given<'_>,
    ) -> Result<Result<Vec<Answer>, sqlx::Error>, Failure> {
        if !self.takes(given.data.len()) {
            let text = "the record is larger than max_allowed_packet of the database";
            return Err(Failure::new(ErrorKind::TooLarge, text));
        }
        let mut line = self.connections.take().await.map_err(errors::lending)?;
        let (connection, clock) = line.timed();
        let asking = async {
            match flight {
                [text] if self.flies() => Ok(vec![prepare(connection, text, given).await?]),
                flight if self.flies() => fly(connection, written(flight.iter().map(|text| (*text, given)))).await,
                flight => {
                    // What the application may have left open would take our statements into it.
                    connection.execute("ROLLBACK").await?;
                    let mut answers = Vec::with_capacity(flight.len());
                    for text in flight {
                        answers.push(prepare(connection, text, given).await?);
                    }
                    Ok(answers)
                }
            }
        };
        let asked = clock.limit(self.timeout, asking).await.map_err(|_| errors::silent())?;
        match &asked {
            Err(error) if !errors::leaves_usable(error) => self.distrust(),
            _ => line.give_back(),
        }
        Ok(asked)
    }

    /// Sends a text whose values stand in it, which may be a transaction; only over connections of ours. One over which it failed is
    /// closed, and what it had begun ends with it.
    pub(super) async fn fly(&self, text: String) -> Result<Vec<Answer>, Failure> {
        if !self.flies() {
            return Err(Failure::unexpected("a batch was sent over a pool that is not ours"));
        }
        let mut line = self.connections.take().await.map_err(errors::lending)?;
        let (connection, clock) = line.timed();
        match clock.limit(self.timeout, fly(connection, text)).await.map_err(|_| errors::silent())? {
            Ok(answers) => {
                line.give_back();
                Ok(answers)
            }
            Err(error) => {
                if !errors::leaves_usable(&error) {
                    self.distrust();
                }
                Err(errors::asking(error))
            }
        }
    }

    /// The same; says `None` if a row was not free at once, and then nothing of it was done.
    pub(super) async fn fly_unless_locked(&self, text: String) -> Result<Option<Vec<Answer>>, Failure> {
        let mut line = self.connections.take().await.map_err(errors::lending)?;
        let (connection, clock) = line.timed();
        let flight = async {
            match fly(connection, text).await {
                Err(error) if errors::is_locked(&error) => connection.execute("ROLLBACK").await.map(|_| None),
                answers => answers.map(Some),
            }
        };
        match clock.limit(self.timeout, flight).await.map_err(|_| errors::silent())? {
            Ok(answers) => {
                line.give_back();
                Ok(answers)
            }
            Err(error) => {
                if !errors::leaves_usable(&error) {
                    self.distrust();
                }
                Err(errors::asking(error))
            }
        }
    }

    /// What broke one connection has broken the others, too: a server that went, a runtime that ended.
    fn distrust(&self) {
        self.connections.distrust();
        self.broke.notify_one();
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

/// What every connection of ours has: no log of its statements, whose texts hold values, and nothing set in a trip of its own.
fn plain(options: MySqlConnectOptions) -> MySqlConnectOptions {
    options.disable_statement_logging().set_names(false).timezone(None).pipes_as_concat(false).no_engine_substitution(false)
}

/// Sets what our statements count on. `patience` is for how many seconds the server lets one wait for a row.
fn set_up(connection: &mut MySqlConnection, packet: Arc<AtomicUsize>, patience: u64) -> SettingUp<'_> {
    Box::pin(async move {
        let text = format!(
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;\
             SET SESSION sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION',autocommit=1,innodb_lock_wait_timeout={patience},\
             wait_timeout=600;\
             SELECT @@max_allowed_packet"
        );
        let answers = fly(connection, text).await?;
        if let Some(row) = answers.last().and_then(|answer| answer.rows.first()) {
            let size: i64 = row.try_get_unchecked(0)?;
            packet.store(usize::try_from(size).unwrap_or(usize::MAX), Ordering::Relaxed);
        }
        Ok(())
    })
}

async fn prepare(connection: &mut MySqlConnection, text: &Text, given: &Given<'_>) -> Result<Answer, sqlx::Error> {
    let mut query = sqlx::query(AssertSqlSafe(text.sql.clone()));
    for param in &text.params {
        query = match given.value(*param) {
            Value::Null => query.bind(None::<&[u8]>),
            Value::Number(number) => query.bind(number),
            Value::Bytes(bytes) => query.bind(bytes),
        };
    }
    Ok(answers(connection.fetch_many(query)).await?.pop().unwrap_or_default())
}

pub(super) async fn fly(connection: &mut MySqlConnection, text: String) -> Result<Vec<Answer>, sqlx::Error> {
    answers(connection.fetch_many(sqlx::raw_sql(AssertSqlSafe(text)))).await
}

async fn answers(
    stream: impl Stream<Item = Result<Either<MySqlQueryResult, MySqlRow>, sqlx::Error>>,
) -> Result<Vec<Answer>, sqlx::Error> {
    let mut stream = pin!(stream);
    let (mut answers, mut rows) = (Vec::new(), Vec::new());
    while let Some(item) = std::future::poll_fn(|cx| stream.as_mut().poll_next(cx)).await {
        match item? {
            Either::Left(done) => {
                answers.push(Answer { matched: done.rows_affected(), rows: std::mem::take(&mut rows) });
            }
            Either::Right(row) => rows.push(row),
        }
    }
    Ok(answers)
}

/// Writes statements as one text, with their values in it: numbers as they are, and bytes in digits.
pub(super) fn written<'a>(statements: impl Iterator<Item = (&'a Text, &'a Given<'a>)>) -> String {
    let mut written = String::new();
    for (text, given) in statements {
        if !written.is_empty() {
            written.push(';');
        }
        let mut parts = text.sql.split('?');
        written.push_str(parts.next().unwrap_or_default());
        for (param, part) in text.params.iter().zip(parts) {
            write_value(&mut written, given.value(*param));
            written.push_str(part);
        }
    }
    written
}

fn write_value(to: &mut String, value: Value<'_>) {
    use fmt::Write;
    match value {
        Value::Null => to.push_str("NULL"),
        Value::Number(number) => write!(to, "{number}").expect("a string takes everything"),
        Value::Bytes(bytes) => write_bytes(to, bytes),
    }
}

/// Writes bytes as a literal that has no meaning in any mode or character set.
pub(super) fn write_bytes(to: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    to.reserve(2 * bytes.len() + 3);
    to.push_str("x'");
    for byte in bytes {
        to.push(char::from(DIGITS[usize::from(byte >> 4)]));
        to.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    to.push('\'');
}

/// Reads a number, absent or not.
pub(super) fn number(row: &MySqlRow, at: usize) -> Result<Option<i64>, Failure> {
    row.try_get_unchecked(at).map_err(errors::asking)
}

/// Reads an answer to a question of yes or no.
pub(super) fn flag(row: &MySqlRow, at: usize) -> Result<bool, Failure> {
    Ok(number(row, at)?.is_some_and(|number| number != 0))
}

/// Reads bytes, absent or not.
pub(super) fn bytes(row: &MySqlRow, at: usize) -> Result<Option<Vec<u8>>, Failure> {
    row.try_get_unchecked(at).map_err(errors::asking)
}

/// Reads an id of 16 bytes, absent or not.
pub(super) fn id(row: &MySqlRow, at: usize) -> Result<Option<[u8; 16]>, Failure> {
    let broken = |_| Failure::unexpected("an id in the table has not 16 bytes");
    bytes(row, at)?.map(|id| id.try_into().map_err(broken)).transpose()
}

/// Reads text of ours, absent or not.
pub(super) fn text(row: &MySqlRow, at: usize) -> Result<Option<String>, Failure> {
    Ok(bytes(row, at)?.map(|text| String::from_utf8_lossy(&text).into_owned()))
}
