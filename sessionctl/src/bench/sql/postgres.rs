//! Plain programs on PostgreSQL.

use session_core::Result;
use sessionkit::sql::{SqlAddress, SqlConfig, uncontended};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, Row, SqlSafeStr, SqlStr};

use super::{LEASE, Lines, Program, TTL, endpoint, failed, lost, millis, name, owner};

/// The clock, as ours asks it.
const NOW: &str = "(date_part('epoch', clock_timestamp()) * 1000)::int8";

const READ: &str = "SELECT data FROM {t} WHERE id = $1";

const WRITE: &str =
    "UPDATE {t} SET data = $2, expires_at = {now} + $3::int8, expires_minute = ({now} + $3) / 60000 WHERE id = $1";

const FILL: &str = "INSERT INTO {t} (id, data, write_id, expires_at, expires_minute)
SELECT id, $2, $3, {now} + $4::int8, ({now} + $4) / 60000 FROM unnest($1::text[]) AS i(id)";

/// As ours do: what the kernel still has to write of a table that was just filled would come in the middle of what is measured.
const SETUP: &str = "SET backend_flush_after = '256kB'";

/// Two connections' worth of the client, without anything around it.
pub(super) struct Plain {
    lines: Lines<PgConnection>,
    open: SqlStr,
    save: SqlStr,
    read: SqlStr,
    write: SqlStr,
    table: String,
    owner: String,
}

/// Writes the name of a table as it stands in a statement.
fn quoted(table: &str) -> String {
    table.split('.').map(|part| format!("\"{part}\"")).collect::<Vec<_>>().join(".")
}

/// What an uncontended open and an uncontended save of ours send. The open takes the lock and returns the record, and says who has the
/// lock if it is not free; the save writes if the record is still the one that was read, and gives the lock back.
pub(super) fn ours(config: &SqlConfig) -> sqlx::Result<[String; 2]> {
    let [open, save] = uncontended(config).expect("there are statements for this database");
    // By these places they are given their values, here and in the script of pgbench.
    let places = [&["key", "token", "lease", "owner", "process"][..], &["key", "prev", "token", "ttl", "write", "data"]];
    for (statement, places) in [&open, &save].into_iter().zip(places) {
        if statement.values != places {
            return Err(sqlx::Error::Protocol(format!("a statement of ours is given {:?}", statement.values)));
        }
    }
    Ok([open.sql, save.sql])
}

fn sql(text: &str, table: &str) -> SqlStr {
    AssertSqlSafe(text.replace("{t}", table).replace("{now}", NOW)).into_sql_str()
}

impl Plain {
    pub(super) async fn connect(address: &SqlAddress, config: &SqlConfig, lines: usize) -> sqlx::Result<Self> {
        let (host, port) = endpoint(address, 5432);
        let mut options = PgConnectOptions::new_without_pgpass().host(host).port(port).database(&address.database);
        if let Some(socket) = &address.socket {
            options = options.socket(socket);
        }
        if let Some(user) = &address.user {
            options = options.username(user);
        }
        if let Some(password) = &address.password {
            options = options.password(password);
        }
        let options = options.disable_statement_logging();
        let mut connections = Vec::new();
        for _ in 0..lines {
            let mut connection = options.connect().await?;
            connection.execute(SETUP).await?;
            connections.push(connection);
        }
        let table = quoted(&config.table);
        let [read, write] = [READ, WRITE].map(|text| sql(text, &table));
        let [open, save] = ours(config)?.map(|text| AssertSqlSafe(text).into_sql_str());
        Ok(Self { lines: Lines::new(connections), open, save, read, write, table, owner: owner() })
    }

    pub(super) async fn fill(&self, keys: &[String], data: &[u8], left: i64) -> Result<()> {
        let fill = sqlx::query(sql(FILL, &self.table)).bind(keys).bind(data).bind(name()?.to_vec()).bind(left);
        fill.execute(self.lines.take().await.connection()).await.map_err(failed)?;
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
        let open =
            sqlx::query(self.open.clone()).bind(key).bind(&token[..]).bind(millis(LEASE)).bind(&self.owner).bind(1_i64);
        let row = open.fetch_one(self.lines.take().await.connection()).await.map_err(failed)?;
        if row.try_get::<i16, _>(0).map_err(failed)? != 1 {
            return Err(lost());
        }
        let mut data: Vec<u8> = row.try_get(1).map_err(failed)?;
        let prev: Vec<u8> = row.try_get(2).map_err(failed)?;
        data[0] = data[0].wrapping_add(1);
        let write = name()?;
        let save = sqlx::query(self.save.clone())
            .bind(key)
            .bind(prev)
            .bind(&token[..])
            .bind(millis(TTL))
            .bind(&write[..])
            .bind(data);
        let saved = save.fetch_optional(self.lines.take().await.connection()).await.map_err(failed)?;
        saved.map(drop).ok_or_else(lost)
    }

    async fn unlocked(&self, key: &str) -> Result<()> {
        let read = sqlx::query(self.read.clone()).bind(key);
        let row = read.fetch_one(self.lines.take().await.connection()).await.map_err(failed)?;
        let mut data: Vec<u8> = row.try_get(0).map_err(failed)?;
        data[0] = data[0].wrapping_add(1);
        let write = sqlx::query(self.write.clone()).bind(key).bind(data).bind(millis(TTL));
        match write.execute(self.lines.take().await.connection()).await.map_err(failed)?.rows_affected() {
            1 => Ok(()),
            _ => Err(lost()),
        }
    }

    pub(super) async fn remove(&self, keys: &[String]) -> Result<()> {
        let remove = sqlx::query(sql("DELETE FROM {t} WHERE id = ANY($1)", &self.table)).bind(keys);
        remove.execute(self.lines.take().await.connection()).await.map_err(failed)?;
        Ok(())
    }

    pub(super) async fn drop_table(&self) -> Result<()> {
        let drop = sqlx::query(sql("DROP TABLE {t}", &self.table));
        drop.execute(self.lines.take().await.connection()).await.map_err(failed)?;
        Ok(())
    }
}
