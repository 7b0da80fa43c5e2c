//! Holds in PostgreSQL: a key that a transaction has inserted into a table of its own, and never commits.
//!
//! Whoever inserts the same key waits for the end of that transaction, so nothing has to be there beforehand, and nothing stays
//! behind. The table is empty to everybody, and unlogged, as nothing in it has to survive. All that belongs to an attempt goes over
//! in one flight of plain statements, which no pooler minds; the key travels in hexadecimal digits. Who may wait for how long is
//! the business of `transaction.rs`.

use std::time::Duration;

use async_trait::async_trait;
use session_core::ErrorKind;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgQueryResult};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, SqlSafeStr};

use super::errors::{self, Told};
use super::server::Parameters;
use super::{Postgres, quoted};
use crate::database::{Failure, millis};
use crate::transaction::{Begun, Transaction, Transactions};

/// The clock of the statements.
const NOW: &str = "(date_part('epoch', clock_timestamp()) * 1000)::int8";

/// The code of a lock that was not free in time.
const LOCKED: &str = "55P03";

/// Returns the name of the table of holds for sessions in `table`, quoted.
pub(super) fn name_of(table: &str) -> String {
    let (schema, name) = table.rsplit_once('.').map_or((None, table), |(schema, name)| (Some(schema), name));
    // At most 63 characters count.
    let name = format!("{}_holds", &name[..name.len().min(57)]);
    quoted(&schema.map_or_else(|| name.clone(), |schema| format!("{schema}.{name}")))
}

#[async_trait]
impl Transactions for Postgres {
    async fn connect(&self) -> Result<Box<dyn Transaction>, Failure> {
        let options: PgConnectOptions = self.server.connections.options();
        let connection = options.connect().await.map_err(errors::unconnected)?;
        Ok(Box::new(Line { connection, table: self.table.clone(), holds: self.holds.clone() }))
    }

    async fn evict(&self, key: &str) -> Result<bool, Failure> {
        let marked = |token: &str| format!("({token} IS NOT NULL AND get_byte({token}, 15) % 2 = 1)");
        let (locks, wants) = (marked("lock_token"), marked("want_token"));
        let table = &self.table;
        let cleared = |gone: &str, columns: &[&str]| {
            let clear = |column: &&str| format!("{column} = CASE WHEN {gone} THEN NULL ELSE {column} END");
            columns.iter().map(clear).collect::<Vec<_>>().join(", ")
        };
        let lock = ["lock_token", "lock_until", "lock_since", "lock_lease", "lock_owner", "lock_process", "lock_handed"];
        let (lock, want) = (cleared(&locks, &lock), cleared(&wants, &["want_token", "want_until", "want_process"]));
        let sql = format!("UPDATE {table} SET {lock}, {want} WHERE id = $1 AND ({locks} OR {wants}) RETURNING true");
        let rows = self.ask(&AssertSqlSafe(sql).into_sql_str(), Parameters::new().add(key)?).await?;
        Ok(!rows.is_empty())
    }

    async fn create_table(&self) -> Result<(), Failure> {
        if self.has_holds().await? {
            return Ok(());
        }
        let sql = format!("CREATE UNLOGGED TABLE IF NOT EXISTS {} (id text COLLATE \"C\" PRIMARY KEY)", self.holds);
        match self.ask(&AssertSqlSafe(sql).into_sql_str(), Parameters::new()).await {
            // Two who make it at the same moment meet at the catalogue.
            Err(failure) if !self.has_holds().await? => Err(failure),
            _ => Ok(()),
        }
    }

    async fn check(&self) -> Result<(), Failure> {
        if self.has_holds().await? {
            return Ok(());
        }
        let fact = "lock=transaction needs a table beside that of the sessions, with _holds behind its name, where the user may \
                    SELECT, INSERT and DELETE; make it with create=on or create_table()";
        Err(Failure::new(ErrorKind::Config, fact))
    }

    async fn gc(&self, _limit: u32) -> Result<(), Failure> {
        // A transaction that ends leaves nothing.
        Ok(())
    }
}

impl Postgres {
    async fn has_holds(&self) -> Result<bool, Failure> {
        const SQL: &str = "SELECT true FROM (SELECT to_regclass($1) AS oid) c WHERE c.oid IS NOT NULL
          AND has_table_privilege(c.oid, 'INSERT')";
        let rows = self.ask(&sqlx::SqlStr::from_static(SQL), Parameters::new().add(&*self.holds)?).await?;
        Ok(!rows.is_empty())
    }
}

/// A connection for holds.
struct Line {
    connection: PgConnection,
    table: String,
    holds: String,
}

impl Line {
    async fn say(&mut self, statements: String) -> Result<PgQueryResult, sqlx::Error> {
        self.connection.execute(sqlx::raw_sql(AssertSqlSafe(statements))).await
    }
}

#[async_trait]
impl Transaction for Line {
    async fn begin(&mut self, key: &str, existing: bool, wait: Duration, idle: Duration) -> Result<Begun, Failure> {
        let digits: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
        let key = format!("convert_from(decode('{digits}', 'hex'), 'UTF8')");
        let (wait, idle, holds, table) = (millis(wait), millis(idle), &self.holds, &self.table);
        let what = if existing {
            format!("SELECT id FROM {table} WHERE id = {key} AND data IS NOT NULL AND expires_at > {NOW}")
        } else {
            format!("SELECT {key}")
        };
        let begun = self
            .say(format!(
                "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {wait}; \
                 SET LOCAL idle_in_transaction_session_timeout = {idle}; INSERT INTO {holds} (id) {what}"
            ))
            .await;
        match begun {
            Ok(done) if done.rows_affected() == 1 => Ok(Begun::Taken),
            Ok(_) => self.end().await.map(|()| Begun::Absent),
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(LOCKED) => {
                self.end().await.map(|()| Begun::Busy)
            }
            Err(error) => {
                let Told { mut failure, usable } = errors::asked(error);
                // Nothing that was begun outlives its connection, and nobody uses this one again.
                failure.sent |= !usable;
                Err(failure)
            }
        }
    }

    async fn keep(&mut self, idle: Duration) -> Result<(), Failure> {
        let statement = format!("SET LOCAL idle_in_transaction_session_timeout = {}", millis(idle));
        self.say(statement).await.map(drop).map_err(|error| errors::asked(error).failure)
    }

    async fn end(&mut self) -> Result<(), Failure> {
        self.say("ROLLBACK".into()).await.map(drop).map_err(|error| errors::asked(error).failure)
    }
}
