//! Plain programs on MySQL and MariaDB.

use std::fmt::Write as _;

use futures_core::Stream;
use session_core::{Error, ErrorKind, Result};
use sessionkit::sql::{SqlAddress, SqlConfig, Statement, uncontended};
use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Either, Executor, Row, SqlSafeStr, SqlStr};

use super::{LEASE, Lines, Program, TTL, endpoint, failed, lost, millis, name, owner};

/// The clock, as ours asks it.
const NOW: &str = "(TIMESTAMPDIFF(MICROSECOND,'1970-01-01',UTC_TIMESTAMP(6)) DIV 1000)";

const READ: &str = "SELECT data FROM {t} WHERE id=?";

const WRITE: &str = "UPDATE {t} SET data=?,expires_minute=({now}+?) DIV 60000,expires_at={now}+? WHERE id=?";

const FILL: &str = "SET @data={data};INSERT INTO {t} (id,data,write_id,expires_at,expires_minute) VALUES ";

const FILLED: &str = "({key},@data,{write},{now}+{left},({now}+{left}) DIV 60000)";

/// What ours sets on each connection.
const SETUP: &str = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;SET SESSION autocommit=1";

pub(super) struct Plain {
    lines: Lines<MySqlConnection>,
    /// What an uncontended open of ours sends, as one text with the values in it, because no database of this kind returns what an
    /// UPDATE has left: it takes the lock, and reads the record if it has it.
    open: Statement,
    /// What an uncontended save of ours sends, prepared: it writes if the record is still the one that was read, and gives the lock
    /// back.
    save: (SqlStr, Vec<&'static str>),
    read: SqlStr,
    write: SqlStr,
    fill: String,
    remove: SqlStr,
    drop: SqlStr,
}

fn sql(text: &str) -> SqlStr {
    AssertSqlSafe(text).into_sql_str()
}

impl Plain {
    pub(super) async fn connect(address: &SqlAddress, config: &SqlConfig, lines: usize) -> sqlx::Result<Self> {
        let (host, port) = endpoint(address, 3306);
        let mut options = MySqlConnectOptions::new().host(host).port(port).database(&address.database);
        if let Some(socket) = &address.socket {
            options = options.socket(socket);
        }
        if let Some(user) = &address.user {
            options = options.username(user);
        }
        if let Some(password) = &address.password {
            options = options.password(password);
        }
        let options = options.set_names(false).timezone(None).pipes_as_concat(false).no_engine_substitution(false);
        let options = options.disable_statement_logging();
        let mut connections = Vec::new();
        for _ in 0..lines {
            let mut connection = options.connect().await?;
            connection.execute(sqlx::raw_sql(SETUP)).await?;
            connections.push(connection);
        }
        let table = config.table.split('.').map(|part| format!("`{part}`")).collect::<Vec<_>>().join(".");
        let [read, write, fill, remove] =
            [READ, WRITE, FILL, "DELETE FROM {t} WHERE id=?"].map(|text| text.replace("{t}", &table).replace("{now}", NOW));
        let [open, save] = uncontended(config).expect("there are statements for this database");
        let save = (sql(&save.sql), save.values);
        let [read, write, remove] = [read, write, remove].map(|text| sql(&text));
        let drop = sql(&format!("DROP TABLE {table}"));
        Ok(Self { lines: Lines::new(connections), open, save, read, write, fill, remove, drop })
    }

    pub(super) async fn fill(&self, keys: &[String], data: &[u8], left: i64) -> Result<()> {
        let filled =
            FILLED.replace("{now}", NOW).replace("{write}", &literal(&name()?)).replace("{left}", &left.to_string());
        let rows: Vec<_> = keys.iter().map(|key| filled.replace("{key}", &literal(key.as_bytes()))).collect();
        let fill = self.fill.replace("{data}", &literal(data)) + rows.join(",").as_str();
        let mut line = self.lines.take().await;
        line.connection().execute(sqlx::raw_sql(AssertSqlSafe(fill))).await.map_err(failed)?;
        Ok(())
    }

    pub(super) async fn cycle(&self, program: Program, key: &str) -> Result<()> {
        match program {
            Program::Locked => self.locked(key).await,
            Program::Unlocked => self.unlocked(key).await,
        }
    }

    async fn locked(&self, key: &str) -> Result<()> {
        let token = name()?;
        let mut open = String::with_capacity(2 * self.open.sql.len());
        for (n, text) in self.open.sql.split('?').enumerate() {
            match n.checked_sub(1).map(|n| self.open.values[n]) {
                None => {}
                Some("key") => open += &literal(key.as_bytes()),
                Some("token") => open += &literal(&token),
                Some("lease") => open += &millis(LEASE).to_string(),
                Some("owner") => open += &literal(owner().as_bytes()),
                Some("alive") => open += "1",
                Some(other) => return Err(unknown(other)),
            }
            open += text;
        }
        let mut line = self.lines.take().await;
        let row = last_row(line.connection().fetch_many(sqlx::raw_sql(AssertSqlSafe(open)))).await.map_err(failed)?;
        drop(line);
        let row = row.ok_or_else(lost)?;
        if row.try_get_unchecked::<i64, _>(0).map_err(failed)? != 1 {
            return Err(lost());
        }
        let mut data: Vec<u8> = row.try_get_unchecked(3).map_err(failed)?;
        let prev: Vec<u8> = row.try_get_unchecked(4).map_err(failed)?;
        data[0] = data[0].wrapping_add(1);
        let write = name()?;
        let (mut save, ttl) = (sqlx::query(self.save.0.clone()), millis(TTL));
        for value in &self.save.1 {
            save = match *value {
                "data" => save.bind(&data),
                "write" => save.bind(&write[..]),
                "ttl" => save.bind(ttl),
                "token" => save.bind(&token[..]),
                "key" => save.bind(key.as_bytes()),
                "prev" => save.bind(&prev),
                other => return Err(unknown(other)),
            };
        }
        match save.execute(self.lines.take().await.connection()).await.map_err(failed)?.rows_affected() {
            1 => Ok(()),
            _ => Err(lost()),
        }
    }

    async fn unlocked(&self, key: &str) -> Result<()> {
        let read = sqlx::query(self.read.clone()).bind(key.as_bytes());
        let row = read.fetch_one(self.lines.take().await.connection()).await.map_err(failed)?;
        let mut data: Vec<u8> = row.try_get_unchecked(0).map_err(failed)?;
        data[0] = data[0].wrapping_add(1);
        let write = sqlx::query(self.write.clone()).bind(data).bind(millis(TTL)).bind(millis(TTL)).bind(key.as_bytes());
        match write.execute(self.lines.take().await.connection()).await.map_err(failed)?.rows_affected() {
            1 => Ok(()),
            _ => Err(lost()),
        }
    }

    pub(super) async fn remove(&self, keys: &[String]) -> Result<()> {
        for key in keys {
            let remove = sqlx::query(self.remove.clone()).bind(key.as_bytes());
            remove.execute(self.lines.take().await.connection()).await.map_err(failed)?;
        }
        Ok(())
    }

    pub(super) async fn drop_table(&self) -> Result<()> {
        let drop = sqlx::query(self.drop.clone());
        drop.execute(self.lines.take().await.connection()).await.map_err(failed)?;
        Ok(())
    }
}

async fn last_row<D>(stream: impl Stream<Item = sqlx::Result<Either<D, MySqlRow>>>) -> sqlx::Result<Option<MySqlRow>> {
    let mut stream = std::pin::pin!(stream);
    let mut last = None;
    while let Some(item) = std::future::poll_fn(|cx| stream.as_mut().poll_next(cx)).await {
        if let Either::Right(row) = item? {
            last = Some(row);
        }
    }
    Ok(last)
}

fn unknown(value: &str) -> Error {
    Error::new(
        ErrorKind::Unexpected,
        "bench",
        format!("a statement of ours is given {value}, which a plain program does not have"),
    )
}

/// Writes bytes as a literal, as ours does it.
fn literal(bytes: &[u8]) -> String {
    let digits = bytes.iter().fold(String::with_capacity(2 * bytes.len() + 3), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    format!("x'{digits}'")
}
