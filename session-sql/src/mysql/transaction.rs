//! Holds in MySQL and MariaDB: a row in a table of its own, locked by a transaction that stays open.
//!
//! Whoever locks a row that is not there locks the gap around it, and two who fill it then wait for each other; so a row is there
//! first, made by a statement that commits by itself, and only if there is none, because an insert waits for the lock of one that
//! is. It stays, for whoever comes next, until its session is gone; gc looks at it once a day. All that belongs to an attempt goes
//! over in one flight of plain statements, in which the key travels in hexadecimal digits. Nobody waits for a part of a second in
//! these databases: for less than one it is asked again. Who may wait for how long is the business of `transaction.rs`.

use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use session_core::ErrorKind;
use sqlx::{ConnectOptions, MySqlConnection};
use tokio::time::{Instant, sleep};

use super::link::{Answer, Given, bytes, flag, fly, text, write_bytes};
use super::texts::{Param, Text};
use super::{MySql, errors};
use crate::database::Failure;
use crate::transaction::{Begun, Transaction, Transactions};

/// Minutes since 1970, by the clock of the statements.
const MINUTE: &str = "(TIMESTAMPDIFF(MINUTE,'1970-01-01',UTC_TIMESTAMP(6)))";

/// There is a record whose deadline lies ahead.
const LIVE: &str = "data IS NOT NULL AND expires_at>(TIMESTAMPDIFF(MICROSECOND,'1970-01-01',UTC_TIMESTAMP(6)) DIV 1000)";

/// After how many minutes gc asks whether the session of a row is still there.
const DAY: u32 = 24 * 60;

/// The pause between two questions whose answers nobody waits for in the database.
const PAUSE: Duration = Duration::from_millis(8);

/// How many rows gc looks at in one transaction.
const BATCH: u32 = 500;

/// How often a row is made that gc takes away again.
const TRIES: usize = 4;

/// The shortest wait that the databases know.
const SECOND: Duration = Duration::from_secs(1);

/// Returns the name of the table of holds for sessions in `table`, quoted.
pub(super) fn name_of(table: &str) -> String {
    let (schema, name) = table.rsplit_once('.').map_or((None, table), |(schema, name)| (Some(schema), name));
    // At most 64 characters are allowed.
    let name = format!("`{}_holds`", &name[..name.len().min(57)]);
    schema.map_or_else(|| name.clone(), |schema| format!("`{schema}`.{name}"))
}

#[async_trait]
impl Transactions for MySql {
    async fn connect(&self) -> Result<Box<dyn Transaction>, Failure> {
        let mut connection = self.dial().await?;
        let answers = fly(&mut connection, "SELECT VERSION()".to_owned()).await.map_err(errors::connecting)?;
        let version = answers.last().and_then(|answer| answer.rows.first()).map(|row| text(row, 0)).transpose()?.flatten();
        let mariadb = version.unwrap_or_default().contains("MariaDB");
        let (table, holds) = (self.texts.table.clone(), self.holds.clone());
        Ok(Box::new(Line { connection, table, holds, mariadb }))
    }

    async fn evict(&self, key: &str) -> Result<bool, Failure> {
        let marked = |token: &str| format!("({token} IS NOT NULL AND ORD(RIGHT({token},1))&1)");
        let (locks, wants, table) = (marked("lock_token"), marked("want_token"), &self.texts.table);
        // The tokens come last, because the others are judged by them.
        let sql = format!(
            "UPDATE {table} SET lock_owner=IF({locks},NULL,lock_owner),lock_process=IF({locks},NULL,lock_process),\
             lock_handed=IF({locks},0,lock_handed),lock_since=IF({locks},NULL,lock_since),lock_lease=IF({locks},NULL,lock_lease),\
             lock_until=IF({locks},NULL,lock_until),want_until=IF({wants},NULL,want_until),\
             want_process=IF({wants},NULL,want_process),lock_token=IF({locks},NULL,lock_token),\
             want_token=IF({wants},NULL,want_token) WHERE id=? AND ({locks} OR {wants})"
        );
        let given = Given { key: key.as_bytes(), ..Given::default() };
        let answers = self.link.ask(&[&Text { sql: sql.into(), params: vec![Param::Key] }], &given).await?;
        Ok(answers.iter().any(|answer| answer.matched > 0))
    }

    async fn create_table(&self) -> Result<(), Failure> {
        let sql = format!(
            "CREATE TABLE IF NOT EXISTS {} (id varbinary(512) NOT NULL,due_minute bigint NOT NULL,PRIMARY KEY (id),\
             KEY due (due_minute)) ENGINE=InnoDB COMMENT='sessionkit holds 1'",
            self.holds
        );
        self.say(sql).await.map(drop).map_err(|failure| match failure.kind {
            ErrorKind::Config => Failure { message: "the user may not make the table of holds".into(), ..failure },
            _ => failure,
        })
    }

    async fn check(&self) -> Result<(), Failure> {
        let holds = &self.holds;
        // Each right is asked for, and nothing changed.
        let insert =
            format!("INSERT INTO {holds} (id,due_minute) SELECT id,due_minute FROM {holds} AS there WHERE there.id=''");
        let delete = format!("DELETE FROM {holds} WHERE id=''");
        let update = format!("UPDATE {holds} SET due_minute=due_minute WHERE id=''");
        for sql in [insert, delete, update] {
            self.say(sql).await.map_err(|failure| match failure.kind {
                ErrorKind::Config => {
                    let fact = "lock=transaction needs a table beside that of the sessions, with _holds behind its name, where the \
                                user may SELECT, INSERT, UPDATE and DELETE; make it with create=on or create_table()";
                    Failure { message: fact.into(), ..failure }
                }
                _ => failure,
            })?;
        }
        Ok(())
    }

    async fn gc(&self, limit: u32) -> Result<(), Failure> {
        if !self.skips.load(Ordering::Relaxed) {
            // It would have to wait for those that are held; some bytes for each session that ever was are the smaller evil.
            return Ok(());
        }
        let (holds, table, limit) = (&self.holds, &self.texts.table, limit.min(BATCH));
        let mut connection = self.dial().await?;
        let old = format!(
            "START TRANSACTION;SELECT id,EXISTS (SELECT 1 FROM {table} AS s WHERE s.id=h.id) FROM {holds} AS h \
             WHERE due_minute<={MINUTE} LIMIT {limit} FOR UPDATE SKIP LOCKED"
        );
        let old = fly(&mut connection, old).await.map_err(errors::asking)?;
        // One by one: for several at once a server may look at each row that there is, and wait for those that are held.
        let mut flight = String::new();
        for row in old.last().map_or(&[][..], |answer| &answer.rows) {
            let mut id = String::new();
            write_bytes(&mut id, &bytes(row, 0)?.unwrap_or_default());
            flight += &match flag(row, 1)? {
                true => format!("UPDATE {holds} SET due_minute={MINUTE}+{DAY} WHERE id={id};"),
                false => format!("DELETE FROM {holds} WHERE id={id};"),
            };
        }
        flight += "COMMIT";
        fly(&mut connection, flight).await.map(drop).map_err(errors::asking)
    }
}

impl MySql {
    /// Makes a connection for transactions.
    async fn dial(&self) -> Result<MySqlConnection, Failure> {
        let mut connection = self.link.options().connect().await.map_err(errors::connecting)?;
        let first =
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;SET SESSION autocommit=1,innodb_lock_wait_timeout=1";
        fly(&mut connection, first.to_owned()).await.map_err(errors::connecting)?;
        Ok(connection)
    }

    async fn say(&self, sql: String) -> Result<Vec<Answer>, Failure> {
        self.link.ask(&[&Text { sql: sql.into(), params: Vec::new() }], &Given::default()).await
    }
}

/// A connection for holds.
struct Line {
    connection: MySqlConnection,
    table: String,
    holds: String,
    mariadb: bool,
}

impl Line {
    async fn say(&mut self, statements: String) -> Result<Vec<Answer>, Failure> {
        fly(&mut self.connection, statements).await.map_err(errors::asking)
    }

    /// What the server is told of a connection on which nothing happens for so long. MariaDB knows transactions for that; MySQL
    /// knows only connections, and is told otherwise when the transaction has ended.
    fn patience(&self, idle: Duration) -> String {
        let name = if self.mariadb { "idle_transaction_timeout" } else { "wait_timeout" };
        let seconds = idle.as_secs() + u64::from(idle.subsec_nanos() > 0);
        format!("SET SESSION {name}={}", seconds.clamp(1, 30_000_000))
    }

    /// Tries once; `None` if the row was gone that the same flight had made.
    async fn try_once(&mut self, key: &str, existing: bool, waits: bool, idle: Duration) -> Result<Option<Begun>, Failure> {
        let mut id = String::new();
        write_bytes(&mut id, key.as_bytes());
        let (table, holds, patience) = (&self.table, &self.holds, self.patience(idle));
        let live = format!("EXISTS (SELECT 1 FROM {table} WHERE id={id} AND {LIVE})");
        let only = if existing { format!("{live} AND") } else { String::new() };
        let nowait = if waits { "" } else { " NOWAIT" };
        let flight = format!(
            "{patience};INSERT IGNORE INTO {holds} (id,due_minute) SELECT {id},{MINUTE}+{DAY} FROM DUAL WHERE {only} \
             NOT EXISTS (SELECT 1 FROM {holds} AS there WHERE there.id={id});START TRANSACTION;\
             SELECT {live};\
             SELECT 1 FROM {holds} WHERE id={id} FOR UPDATE{nowait}"
        );
        let answers = match fly(&mut self.connection, flight).await {
            Ok(answers) => answers,
            Err(error) if errors::is_locked(&error) => {
                // Who waited in vain has only lost the statement, and who was chosen to end a deadlock has lost all of it.
                return self.end().await.map(|()| Some(Begun::Busy));
            }
            Err(error) => return Err(errors::asking(error)),
        };
        let row = |at: usize| answers.get(at).and_then(|answer| answer.rows.first());
        let live = row(3).map(|row| flag(row, 0)).transpose()?.unwrap_or(false);
        if existing && !live {
            return self.end().await.map(|()| Some(Begun::Absent));
        }
        if row(4).is_some() {
            return Ok(Some(Begun::Taken));
        }
        self.end().await.map(|()| None)
    }
}

#[async_trait]
impl Transaction for Line {
    async fn begin(&mut self, key: &str, existing: bool, wait: Duration, idle: Duration) -> Result<Begun, Failure> {
        let deadline = Instant::now() + wait;
        let mut missed = 0;
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.try_once(key, existing, rest >= SECOND, idle).await? {
                Some(Begun::Busy) if rest > PAUSE => {
                    if rest < SECOND {
                        sleep(PAUSE.min(rest)).await;
                    }
                }
                Some(begun) => return Ok(begun),
                None if missed < TRIES => missed += 1,
                None => return Ok(Begun::Busy),
            }
        }
    }

    async fn keep(&mut self, idle: Duration) -> Result<(), Failure> {
        let patience = self.patience(idle);
        self.say(patience).await.map(drop)
    }

    async fn end(&mut self) -> Result<(), Failure> {
        let end = if self.mariadb { "ROLLBACK" } else { "ROLLBACK;SET SESSION wait_timeout=DEFAULT" };
        self.say(end.to_owned()).await.map(drop)
    }
}
