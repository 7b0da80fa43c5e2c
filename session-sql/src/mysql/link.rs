//! Connections: kept from one request to the next, or lent by a pool of the application.
//!
//! A pool of sqlx sends a ping after each use, which would make two trips of each; so our own connections stand in a pile of ours.
//! What is asked is cut into statements, and nothing here knows what they mean.

use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_core::Stream;
use session_core::ErrorKind;
use sqlx::mysql::{MySqlConnectOptions, MySqlPool, MySqlRow};
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Either, Executor, MySql, MySqlConnection};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::errors;
use super::texts::{Param, Text};
use crate::database::Failure;

/// After such a rest the server may have closed a connection, which is found out before something is asked over it.
const REST: Duration = Duration::from_secs(10);

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
            Param::Clean => Value::Number(self.clean.into()),
            Param::Data => Value::Bytes(self.data),
            Param::Ttl => Value::Number(self.ttl),
            Param::Stay => Value::Number(self.stay),
            Param::Protects => Value::Number(self.protects.into()),
            Param::From => Value::Bytes(self.from),
            Param::To => Value::Bytes(self.to),
            Param::Limit => Value::Number(self.limit.into()),
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
    from: From,
    timeout: Duration,
    /// The longest packet that the server takes.
    pub(super) packet: AtomicUsize,
    /// Told when a connection has broken.
    pub(super) broke: Arc<Notify>,
}

enum From {
    Own(Arc<Pile>),
    Lent(MySqlPool),
}

impl Link {
    pub(super) fn own(options: MySqlConnectOptions, count: u32, timeout: Duration, connect_timeout: Duration) -> Self {
        let pile = Pile {
            options: prepared(options),
            limit: connect_timeout,
            patience: timeout.as_secs().saturating_sub(1).max(1),
            slots: Arc::new(Semaphore::new(count as usize)),
            idle: Mutex::default(),
        };
        Self { from: From::Own(Arc::new(pile)), timeout, packet: AtomicUsize::new(usize::MAX), broke: Arc::default() }
    }

    pub(super) fn lent(pool: MySqlPool, timeout: Duration) -> Self {
        Self { from: From::Lent(pool), timeout, packet: AtomicUsize::new(usize::MAX), broke: Arc::default() }
    }

    /// Returns how to make a connection beside the others.
    pub(super) fn options(&self) -> MySqlConnectOptions {
        match &self.from {
            From::Own(pile) => pile.options.clone(),
            From::Lent(pool) => prepared((*pool.connect_options()).clone()),
        }
    }

    /// Whether what is asked in one flight may be of several statements; over a pool that is not ours each is a trip of its own, so
    /// that no value ever stands in a text that somebody else may log.
    pub(super) fn flies(&self) -> bool {
        matches!(self.from, From::Own(_))
    }

    /// Asks one statement, or several in one flight. The first that fails ends it.
    pub(super) async fn ask(&self, flight: &[&Text], given: &Given<'_>) -> Result<Vec<Answer>, Failure> {
        let failed = |error| {
            if !errors::leaves_usable(&error) {
                self.broke.notify_one();
            }
            errors::asking(error)
        };
        self.try_ask(flight, given).await?.map_err(failed)
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
        match &self.from {
            From::Own(pile) => {
                let mut lent = pile.lend(&self.packet).await?;
                let asked = match flight {
                    [text] => tokio::time::timeout(self.timeout, prepare(&mut lent.connection, text, given)).await,
                    flight => {
                        let text = written(flight.iter().map(|text| (*text, given)));
                        tokio::time::timeout(self.timeout, fly(&mut lent.connection, text)).await
                    }
                };
                lent.back(asked)
            }
            From::Lent(pool) => {
                let mut lent = Borrowed { connection: pool.acquire().await.map_err(errors::lending)?, whole: false };
                let asked = tokio::time::timeout(self.timeout, async {
                    // What the application may have left open would take our statements into it.
                    lent.connection.execute("ROLLBACK").await?;
                    let mut answers = Vec::with_capacity(flight.len());
                    for text in flight {
                        answers.append(&mut prepare(&mut lent.connection, text, given).await?);
                    }
                    Ok(answers)
                });
                let asked = asked.await.map_err(|_| errors::silent())?;
                lent.whole = asked.as_ref().map_or_else(errors::leaves_usable, |_| true);
                Ok(asked)
            }
        }
    }

    /// Sends a text whose values stand in it, which may be a transaction; only over connections of ours. One over which it failed is
    /// closed, and what it had begun ends with it.
    pub(super) async fn fly(&self, text: String) -> Result<Vec<Answer>, Failure> {
        let From::Own(pile) = &self.from else {
            return Err(Failure::unexpected("a batch was sent over a pool that is not ours"));
        };
        let mut lent = pile.lend(&self.packet).await?;
        match tokio::time::timeout(self.timeout, fly(&mut lent.connection, text)).await {
            Ok(Ok(answers)) => lent.back(Ok(Ok(answers)))?.map_err(errors::asking),
            Ok(Err(error)) => {
                if !errors::leaves_usable(&error) {
                    pile.idle().clear();
                    self.broke.notify_one();
                }
                Err(errors::asking(error))
            }
            Err(_) => Err(errors::silent()),
        }
    }

    /// Whether a text of so many bytes is small enough for the server.
    pub(super) fn takes(&self, bytes: usize) -> bool {
        bytes.saturating_add(ROOM) <= self.packet.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

/// What every connection of ours has: no log of its statements, whose texts hold values, and nothing set in a trip of its own.
fn prepared(options: MySqlConnectOptions) -> MySqlConnectOptions {
    options.disable_statement_logging().set_names(false).timezone(None).pipes_as_concat(false).no_engine_substitution(false)
}

/// Our connections while nobody uses them, the last used on top.
struct Pile {
    options: MySqlConnectOptions,
    /// How long to wait for a connection.
    limit: Duration,
    /// For how many seconds the server lets a statement wait for a row.
    patience: u64,
    slots: Arc<Semaphore>,
    idle: Mutex<Vec<(MySqlConnection, Instant)>>,
}

impl Pile {
    async fn lend(self: &Arc<Self>, packet: &AtomicUsize) -> Result<Lent, Failure> {
        let lending = async {
            let slot = self.slots.clone().acquire_owned().await.expect("it is never closed");
            loop {
                let Some((mut connection, since)) = self.idle().pop() else {
                    return Ok(Lent { connection: self.connect(packet).await?, pile: self.clone(), _slot: slot });
                };
                if since.elapsed() < REST || connection.ping().await.is_ok() {
                    return Ok(Lent { connection, pile: self.clone(), _slot: slot });
                }
            }
        };
        match tokio::time::timeout(self.limit, lending).await {
            Ok(lent) => lent,
            Err(_) => Err(Failure::new(ErrorKind::Unavailable, "no connection was made, and none was free, in time")),
        }
    }

    async fn connect(&self, packet: &AtomicUsize) -> Result<MySqlConnection, Failure> {
        let mut connection = self.options.connect().await.map_err(errors::connecting)?;
        let patience = self.patience;
        let text = format!(
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;\
             SET SESSION sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION',autocommit=1,innodb_lock_wait_timeout={patience},\
             wait_timeout=600;\
             SELECT @@max_allowed_packet"
        );
        let answers = fly(&mut connection, text).await.map_err(errors::connecting)?;
        let size = answers.last().and_then(|answer| answer.rows.first()).map(|row| number(row, 0));
        if let Some(size) = size.transpose()?.flatten().and_then(|size| usize::try_from(size).ok()) {
            packet.store(size, Ordering::Relaxed);
        }
        Ok(connection)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(MySqlConnection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection in use. One whose use was cut short is closed: nobody knows what still comes over it.
struct Lent {
    connection: MySqlConnection,
    pile: Arc<Pile>,
    // Behind the connection: whoever gets the slot finds it on the pile.
    _slot: OwnedSemaphorePermit,
}

impl Lent {
    fn back(
        self,
        asked: Result<Result<Vec<Answer>, sqlx::Error>, tokio::time::error::Elapsed>,
    ) -> Result<Result<Vec<Answer>, sqlx::Error>, Failure> {
        let Self { connection, pile, _slot } = self;
        match &asked {
            Ok(Ok(_)) => pile.idle().push((connection, Instant::now())),
            Ok(Err(error)) if errors::leaves_usable(error) => pile.idle().push((connection, Instant::now())),
            // What broke one has broken the others, too: a server that went, a runtime that ended.
            Ok(Err(_)) => pile.idle().clear(),
            Err(_) => {}
        }
        asked.map_err(|_| errors::silent())
    }
}

/// A connection of a pool that is not ours.
struct Borrowed {
    connection: PoolConnection<MySql>,
    whole: bool,
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if !self.whole {
            self.connection.close_on_drop();
        }
    }
}

async fn prepare(connection: &mut MySqlConnection, text: &Text, given: &Given<'_>) -> Result<Vec<Answer>, sqlx::Error> {
    let mut query = sqlx::query(AssertSqlSafe(text.sql.clone()));
    for param in &text.params {
        query = match given.value(*param) {
            Value::Null => query.bind(None::<&[u8]>),
            Value::Number(number) => query.bind(number),
            Value::Bytes(bytes) => query.bind(bytes),
        };
    }
    answers(connection.fetch_many(query)).await
}

async fn fly(connection: &mut MySqlConnection, text: String) -> Result<Vec<Answer>, sqlx::Error> {
    answers(connection.fetch_many(sqlx::raw_sql(AssertSqlSafe(text)))).await
}

async fn answers(
    stream: impl Stream<Item = Result<Either<sqlx::mysql::MySqlQueryResult, MySqlRow>, sqlx::Error>>,
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
    use sqlx::Row;
    row.try_get_unchecked(at).map_err(errors::asking)
}

/// Reads an answer to a question of yes or no.
pub(super) fn flag(row: &MySqlRow, at: usize) -> Result<bool, Failure> {
    Ok(number(row, at)?.is_some_and(|number| number != 0))
}

/// Reads bytes, absent or not.
pub(super) fn bytes(row: &MySqlRow, at: usize) -> Result<Option<Vec<u8>>, Failure> {
    use sqlx::Row;
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
