//! Plain programs on PostgreSQL.

use session_core::Result;
use sessionkit::sql::SqlAddress;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Row, SqlSafeStr, SqlStr};

use super::{LEASE, Lines, Program, TTL, endpoint, failed, lost, millis, name, owner};

/// The clock, as ours asks it.
pub(super) const NOW: &str = "(date_part('epoch', clock_timestamp()) * 1000)::int8";

/// What an uncontended open of ours sends: it takes the lock and returns the record, and need not be on the disk. `$1` is the key,
/// `$2` the token, `$3` the lease, `$4` and `$5` the owner. The second half says who has the lock if it is not free.
pub(super) const OPEN: &str = "WITH u AS (
  UPDATE {t} AS s SET lock_token = $2, lock_until = {now} + $3, lock_since = {now}, lock_lease = $3, lock_owner = $4, lock_process = $5,
    lock_handed = (s.lock_token = $2 AND s.lock_handed) IS TRUE,
    want_token = NULLIF(s.want_token, $2), want_until = CASE WHEN s.want_token = $2 THEN NULL ELSE s.want_until END,
    expires_at = GREATEST(s.expires_at, {now} + 2 * $3::int8),
    expires_minute = GREATEST(s.expires_at, {now} + 2 * $3) / 60000
  WHERE s.id = $1 AND s.data IS NOT NULL AND s.expires_at > {now} AND (s.lock_token = $2 OR
    ((s.lock_until IS NULL OR s.lock_until <= {now}) AND (s.want_until IS NULL OR s.want_until <= {now} OR s.want_token = $2)))
    AND set_config('lock_timeout', '4000', true) IS NOT NULL
  RETURNING s.data, s.write_id, s.expires_at - {now} AS life, s.lock_handed, set_config('synchronous_commit', 'off', true))
SELECT 1::int2, data, write_id, life, lock_handed, NULL::text, NULL::int8, NULL::int8 FROM u
UNION ALL
SELECT CASE WHEN NOT live THEN 2::int2 WHEN left_over > 0 THEN 3::int2 ELSE 4::int2 END,
  NULL, NULL, NULL, NULL, lock_owner, lock_since, left_over FROM (
  SELECT data IS NOT NULL AND expires_at > now AS live, lock_owner, lock_since,
    GREATEST(lock_until - now, CASE WHEN want_token <> $2 THEN want_until - now END) AS left_over FROM (
    SELECT *, {now} AS now FROM {t} WHERE id = $1 AND NOT EXISTS (SELECT FROM u)) s) s";

/// What an uncontended save of ours sends: it writes if the record is still the one that was read, and gives the lock back, to the
/// one next in line if there is one. `$1` is the key, `$2` the write that was read, `$3` the token, `$4` the length of life, `$5` the
/// name of the write, `$6` the data.
pub(super) const SAVE: &str = "WITH u AS (
  UPDATE {t} AS s SET data = $6, write_id = $5, expires_at = {now} + $4::int8, expires_minute = ({now} + $4) / 60000,
    (lock_token, lock_until, lock_since, lock_lease, lock_handed) =
    (SELECT s.want_token, n.now + 1000, n.now, 1000::int8, (s.lock_token = $3) IS TRUE FROM (SELECT {now} AS now) n
     WHERE s.want_until > n.now),
    lock_owner = NULL, lock_process = NULL, want_token = NULL, want_until = NULL
  WHERE s.id = $1 AND s.write_id = $2 AND s.data IS NOT NULL AND s.expires_at > {now}
    AND (s.lock_token = $3 OR s.lock_until IS NULL OR s.lock_until <= {now}) AND set_config('lock_timeout', '4000', true) IS NOT NULL
  RETURNING s.id, s.lock_token AS told, s.want_process)
SELECT (SELECT count(pg_notify('sessionkit_' || to_hex(want_process), encode(told, 'hex') || ' ' || id))
  FROM u WHERE told IS NOT NULL AND want_process IS NOT NULL) FROM u";

const READ: &str = "SELECT data FROM {t} WHERE id = $1";

const WRITE: &str =
    "UPDATE {t} SET data = $2, expires_at = {now} + $3::int8, expires_minute = ({now} + $3) / 60000 WHERE id = $1";

const FILL: &str = "INSERT INTO {t} (id, data, write_id, expires_at, expires_minute)
SELECT id, $2, $3, {now} + $4::int8, ({now} + $4) / 60000 FROM unnest($1::text[]) AS i(id)";

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
pub(super) fn quoted(table: &str) -> String {
    table.split('.').map(|part| format!("\"{part}\"")).collect::<Vec<_>>().join(".")
}

pub(super) fn filled(text: &str, table: &str) -> String {
    text.replace("{t}", table).replace("{now}", NOW)
}

fn sql(text: &str, table: &str) -> SqlStr {
    AssertSqlSafe(filled(text, table)).into_sql_str()
}

impl Plain {
    pub(super) async fn connect(address: &SqlAddress, table: &str, lines: usize) -> sqlx::Result<Self> {
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
            connections.push(options.connect().await?);
        }
        let table = quoted(table);
        let [open, save, read, write] = [OPEN, SAVE, READ, WRITE].map(|text| sql(text, &table));
        Ok(Self { lines: Lines::new(connections), open, save, read, write, table, owner: owner() })
    }

    pub(super) async fn fill(&self, keys: &[String], data: &[u8]) -> Result<()> {
        let fill = sqlx::query(sql(FILL, &self.table)).bind(keys).bind(data).bind(name()?.to_vec()).bind(millis(TTL));
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
