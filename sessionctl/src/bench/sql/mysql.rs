//! Plain programs on MySQL and MariaDB.

use std::fmt::Write as _;

use futures_core::Stream;
use session_core::Result;
use sessionkit::sql::SqlAddress;
use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Either, Executor, Row, SqlSafeStr, SqlStr};

use super::{LEASE, Lines, Program, TTL, endpoint, failed, lost, millis, name, owner};

/// The clock, as ours asks it.
const NOW: &str = "(TIMESTAMPDIFF(MICROSECOND,'1970-01-01',UTC_TIMESTAMP(6)) DIV 1000)";

/// What an uncontended open of ours sends, as one text with the values in it, because no database of this kind returns what an UPDATE
/// has left: it takes the lock, and reads the record if it has it.
const OPEN: &str = "UPDATE {t} SET \
    expires_minute=IF(data IS NOT NULL,IF(expires_at>{now},GREATEST(expires_at,{now}+2*{lease}),expires_at),\
        IF(write_id IS NULL,{now}+{lease}+60000,expires_at)) DIV 60000,\
    expires_at=IF(data IS NOT NULL,IF(expires_at>{now},GREATEST(expires_at,{now}+2*{lease}),expires_at),\
        IF(write_id IS NULL,{now}+{lease}+60000,expires_at)),\
    lock_handed=IF(lock_token<=>{token},lock_handed,0),\
    want_process=IF(want_token<=>{token},NULL,want_process),want_until=IF(want_token<=>{token},NULL,want_until),\
    want_token=IF(want_token<=>{token},NULL,want_token),\
    lock_since={now},lock_until={now}+{lease},lock_lease={lease},lock_owner={owner},lock_process=1,lock_token={token} \
    WHERE id={key} AND (data IS NOT NULL AND expires_at>{now}) AND \
    ((lock_token IS NULL OR lock_until<={now}) AND (want_token IS NULL OR want_until<={now} OR want_token={token}) OR lock_token={token});\
    SELECT lock_token<=>{token},lock_handed,(data IS NOT NULL AND expires_at>{now}),\
    IF(lock_token<=>{token} AND (data IS NOT NULL AND expires_at>{now}),data,NULL),write_id,expires_at-{now},data IS NOT NULL,lock_owner,\
    lock_since,lock_until-{now},want_token<=>{token} FROM {t} WHERE id={key}";

/// What an uncontended save of ours sends, prepared: it writes if the record is still the one that was read, and gives the lock back,
/// to the one next in line if there is one.
const SAVE: &str = "UPDATE {t} SET data=?,write_id=?,expires_minute=({now}+?) DIV 60000,expires_at={now}+?,\
    lock_owner=NULL,lock_process=NULL,lock_handed=IF(want_until>{now},lock_token<=>?,0),\
    lock_since=IF(want_until>{now},{now},NULL),lock_lease=IF(want_until>{now},lock_lease,NULL),\
    lock_until=IF(want_until>{now},{now}+1000,NULL),lock_token=IF(want_until>{now},want_token,NULL),\
    want_token=NULL,want_process=NULL,want_until=NULL \
    WHERE id=? AND write_id=? AND (data IS NOT NULL AND expires_at>{now}) AND (lock_token=? OR (lock_token IS NULL OR lock_until<={now}))";

const READ: &str = "SELECT data FROM {t} WHERE id=?";

const WRITE: &str = "UPDATE {t} SET data=?,expires_minute=({now}+?) DIV 60000,expires_at={now}+? WHERE id=?";

const FILL: &str = "INSERT INTO {t} (id,data,write_id,expires_at,expires_minute) VALUES (?,?,?,{now}+?,({now}+?) DIV 60000)";

/// What ours sets on each connection.
const SETUP: &str = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;SET SESSION autocommit=1";

pub(super) struct Plain {
    lines: Lines<MySqlConnection>,
    /// With names in braces for what each open writes into it.
    open: String,
    save: SqlStr,
    read: SqlStr,
    write: SqlStr,
    fill: SqlStr,
    remove: SqlStr,
    drop: SqlStr,
}

fn sql(text: &str) -> SqlStr {
    AssertSqlSafe(text).into_sql_str()
}

impl Plain {
    pub(super) async fn connect(address: &SqlAddress, table: &str, lines: usize) -> sqlx::Result<Self> {
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
        let table = table.split('.').map(|part| format!("`{part}`")).collect::<Vec<_>>().join(".");
        let [open, save, read, write, fill, remove] = [OPEN, SAVE, READ, WRITE, FILL, "DELETE FROM {t} WHERE id=?"]
            .map(|text| text.replace("{t}", &table).replace("{now}", NOW));
        let open = open.replace("{lease}", &millis(LEASE).to_string()).replace("{owner}", &literal(owner().as_bytes()));
        let [save, read, write, fill, remove] = [save, read, write, fill, remove].map(|text| sql(&text));
        let drop = sql(&format!("DROP TABLE {table}"));
        Ok(Self { lines: Lines::new(connections), open, save, read, write, fill, remove, drop })
    }

    pub(super) async fn fill(&self, keys: &[String], data: &[u8]) -> Result<()> {
        let write = name()?;
        for key in keys {
            let fill = sqlx::query(self.fill.clone()).bind(key.as_bytes()).bind(data).bind(&write[..]);
            let fill = fill.bind(millis(TTL)).bind(millis(TTL));
            fill.execute(self.lines.take().await.connection()).await.map_err(failed)?;
        }
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
        let open = self.open.replace("{token}", &literal(&token)).replace("{key}", &literal(key.as_bytes()));
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
        let save = sqlx::query(self.save.clone()).bind(data).bind(&write[..]).bind(millis(TTL)).bind(millis(TTL));
        let save = save.bind(&token[..]).bind(key.as_bytes()).bind(prev).bind(&token[..]);
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

/// Writes bytes as a literal, as ours does it.
fn literal(bytes: &[u8]) -> String {
    let digits = bytes.iter().fold(String::with_capacity(2 * bytes.len() + 3), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    format!("x'{digits}'")
}
