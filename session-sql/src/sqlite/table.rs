//! The statements on the table, and how a row is read and written with them.
//!
//! What a row is to become stands in `row`; whose transaction it is, in `writer`.

use std::time::{Duration, Instant};

use rusqlite::types::{FromSqlError, ToSql, Type};
use rusqlite::{Connection, OptionalExtension, Result, named_params};
use session_core::leased::{Found, Renewed, Verdict, Want};
use session_core::{LeaseToken, Record, Ttl, WriteId};

use super::row::{Answer, Lock, Next, Row, Who};
use crate::database::{Action, Alter, Enter, Entered, Listed, Locked, Remove, Renew, holder, span};

const COLUMNS: [&str; 16] = [
    "id",
    "write_id",
    "expires_at",
    "expires_minute",
    "lock_token",
    "lock_until",
    "lock_since",
    "lock_lease",
    "lock_owner",
    "lock_process",
    "lock_handed",
    "want_token",
    "want_until",
    "want_process",
    "want_since",
    "data",
];

/// Where the number of a row stands among what is bound; each column has its place in the list.
const NUMBER: usize = COLUMNS.len() + 1;

/// The clock of the database, in milliseconds.
const NOW: &str = "CAST(round(unixepoch('subsec') * 1000) AS INTEGER)";

/// How long gc keeps others from writing at a time, and leaves the file to them then; and how many rows it frees before it looks at
/// its watch.
pub(super) const TURN: Duration = Duration::from_millis(2);
const PIECE: u32 = 16;

/// The texts of the statements, with the name of the table in them.
#[derive(Debug)]
pub(super) struct Table {
    name: String,
    create: String,
    now: String,
    /// Without the bytes, and with them.
    row: [String; 2],
    look: String,
    insert: String,
    /// Without bytes and minute, with the minute, with the bytes, with both: what is not named is not written, nor its index.
    update: [String; 4],
    delete: String,
    gc: [String; 2],
    list: String,
    locks: String,
}

impl Table {
    /// Takes the name of a table, which was checked to be one.
    pub(super) fn new(name: &str) -> Self {
        let name = name.strip_prefix("main.").unwrap_or(name);
        let table = format!("\"{name}\"");
        let meta = COLUMNS.iter().copied().filter(|column| *column != "data").collect::<Vec<_>>().join(", ");
        let update = |minute: bool, data: bool| {
            let written = COLUMNS.iter().enumerate().filter(|(_, column)| match **column {
                "id" => false,
                "expires_minute" => minute,
                "data" => data,
                _ => true,
            });
            let set: Vec<_> = written.map(|(n, column)| format!("{column} = ?{}", n + 1)).collect();
            format!("UPDATE main.{table} SET {} WHERE rowid = ?{NUMBER}", set.join(", "))
        };
        let expired = "expires_at <= :now AND (lock_token IS NULL OR lock_until <= :now)";
        Self {
            create: format!(
                "CREATE TABLE main.{table} (
                    id TEXT NOT NULL PRIMARY KEY,
                    write_id BLOB,
                    expires_at INTEGER NOT NULL,
                    expires_minute INTEGER NOT NULL,
                    lock_token BLOB,
                    lock_until INTEGER,
                    lock_since INTEGER,
                    lock_lease INTEGER,
                    lock_owner TEXT,
                    lock_process INTEGER,
                    lock_handed INTEGER,
                    want_token BLOB,
                    want_until INTEGER,
                    want_process INTEGER,
                    want_since INTEGER,
                    data BLOB
                ) STRICT;
                CREATE INDEX IF NOT EXISTS main.\"{name}_expires\" ON {table} (expires_minute);"
            ),
            now: format!("SELECT {NOW}"),
            row: ["NULL", "data"].map(|bytes| {
                format!("SELECT rowid, data IS NOT NULL, {meta}, {NOW}, {bytes} FROM main.{table} WHERE id = :id")
            }),
            look: format!("SELECT write_id, expires_at - {NOW}, data FROM main.{table} WHERE id = :id"),
            insert: format!(
                "INSERT INTO main.{table} ({}) VALUES ({})",
                COLUMNS.join(", "),
                std::array::from_fn::<_, { COLUMNS.len() }, _>(|n| format!("?{}", n + 1)).join(", ")
            ),
            update: [update(false, false), update(true, false), update(false, true), update(true, true)],
            delete: format!("DELETE FROM main.{table} WHERE rowid = :number"),
            gc: ["IS NULL", "IS NOT NULL"].map(|what| {
                format!(
                    "DELETE FROM main.{table} WHERE rowid IN (SELECT rowid FROM main.{table}
                        WHERE expires_minute <= :now / 60000 AND {expired} AND data {what} LIMIT :limit)"
                )
            }),
            list: format!(
                "SELECT id, length(data), expires_at - {NOW} FROM main.{table}
                    WHERE id > :after AND id >= :from AND id < :to AND data IS NOT NULL AND expires_at > {NOW} ORDER BY id LIMIT :limit"
            ),
            locks: format!(
                "SELECT id, lock_owner, lock_since, lock_until - {NOW}, coalesce(want_until > {NOW}, 0) FROM main.{table}
                    WHERE id >= :from AND id < :to AND lock_until > {NOW} ORDER BY id LIMIT :limit"
            ),
            name: name.to_owned(),
        }
    }

    /// Makes the table and its index. Whatever has its name already is left as it is.
    pub(super) fn create(&self, connection: &Connection) -> Result<()> {
        match self.check(connection)? {
            Fitness::Missing => connection.execute_batch(&self.create),
            Fitness::Fits | Fitness::Foreign => Ok(()),
        }
    }

    /// Says whether the table is there, and whether it has the columns of this version.
    pub(super) fn check(&self, connection: &Connection) -> Result<Fitness> {
        let kind = "SELECT type FROM main.sqlite_schema WHERE name = :name COLLATE NOCASE AND type IN ('table', 'view')";
        let kind: Option<String> =
            connection.query_row(kind, named_params! { ":name": self.name }, |row| row.get(0)).optional()?;
        let Some(kind) = kind else { return Ok(Fitness::Missing) };
        let mut columns = connection.prepare("SELECT name FROM pragma_table_info(:name, 'main')")?;
        let columns = columns.query_map(named_params! { ":name": self.name }, |row| row.get::<_, String>(0))?;
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let fits = kind == "table" && COLUMNS.iter().all(|column| columns.iter().any(|found| found == column));
        Ok(if fits { Fitness::Fits } else { Fitness::Foreign })
    }

    pub(super) fn now(&self, connection: &Connection) -> Result<i64> {
        connection.prepare_cached(&self.now)?.query_row([], |row| row.get(0))
    }

    pub(super) fn look(&self, connection: &Connection, key: &str) -> Result<Found> {
        let mut look = connection.prepare_cached(&self.look)?;
        let found = look.query_row(named_params! { ":id": key }, |row| {
            let (write_id, left, data): (_, i64, Option<Vec<u8>>) = (name(row, 0)?, row.get(1)?, row.get(2)?);
            Ok(match (write_id.map(WriteId::from_bytes), data) {
                (Some(last), Some(data)) if left > 0 => {
                    Found::Live { last, record: Record::new(data, Ttl::new(span(left))) }
                }
                (Some(mark), Some(_)) => Found::Buried { mark },
                (Some(mark), None) if left > 0 => Found::Buried { mark },
                _ => Found::Absent,
            })
        });
        Ok(found.optional()?.unwrap_or(Found::Absent))
    }

    pub(super) fn list(
        &self,
        connection: &Connection,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Listed>> {
        let mut list = connection.prepare_cached(&self.list)?;
        let (after, to) = (after.unwrap_or(""), behind(prefix));
        let listed =
            list.query_map(named_params! { ":after": after, ":from": prefix, ":to": to, ":limit": limit }, |row| {
                let bytes: i64 = row.get(1)?;
                Ok(Listed { key: row.get(0)?, bytes: u64::try_from(bytes).unwrap_or(0), left: span(row.get(2)?) })
            })?;
        listed.collect()
    }

    pub(super) fn locks(&self, connection: &Connection, prefix: &str, limit: u32) -> Result<Vec<Locked>> {
        let mut locks = connection.prepare_cached(&self.locks)?;
        let locked = locks.query_map(named_params! { ":from": prefix, ":to": behind(prefix), ":limit": limit }, |row| {
            let holder = holder(row.get(1)?, row.get(2)?);
            Ok(Locked { key: row.get(0)?, holder, left: span(row.get(3)?), wanted: row.get(4)? })
        })?;
        locked.collect()
    }

    /// Reads a row as it stands, its bytes if they are asked for, and the instant at which that is so.
    fn row(&self, connection: &Connection, key: &str, bytes: bool) -> Result<Read> {
        let mut select = connection.prepare_cached(&self.row[usize::from(bytes)])?;
        let found = select.query_row(named_params! { ":id": key }, |row| {
            let lock = match name(row, 6)? {
                None => None,
                Some(token) => Some(Lock {
                    token: LeaseToken::from_bytes(token),
                    until: row.get(7)?,
                    since: row.get(8)?,
                    lease: row.get(9)?,
                    owner: row.get(10)?,
                    process: row.get(11)?,
                    handed: row.get::<_, Option<bool>>(12)?.unwrap_or(false),
                }),
            };
            let next = match name(row, 13)? {
                None => None,
                Some(token) => Some(Next {
                    token: LeaseToken::from_bytes(token),
                    until: row.get(14)?,
                    process: row.get(15)?,
                    since: row.get(16)?,
                }),
            };
            let write_id = name(row, 3)?.map(WriteId::from_bytes);
            let (number, data, expires_at) = (row.get(0)?, row.get(1)?, row.get(4)?);
            let before = Row { number, data, write_id, expires_at, lock, next };
            Ok(Read { before, now: row.get(17)?, data: row.get(18)? })
        });
        match found.optional()? {
            Some(read) => Ok(read),
            None => Ok(Read { before: Row::default(), now: self.now(connection)?, data: None }),
        }
    }

    /// Writes what has changed, and takes away a row that holds nothing any more.
    fn store(&self, connection: &Connection, key: &str, before: &Row, row: &Row, data: Bytes<'_>, now: i64) -> Result<()> {
        if row == before && matches!(data, Bytes::Same) {
            return Ok(());
        }
        if row.is_empty(now) {
            if let Some(number) = row.number {
                connection.prepare_cached(&self.delete)?.execute(named_params! { ":number": number })?;
            }
            return Ok(());
        }
        let (lock, next) = (row.lock.as_ref(), row.next.as_ref());
        let write_id = row.write_id.map(WriteId::to_bytes);
        let (token, wanted) = (lock.map(|lock| lock.token.to_bytes()), next.map(|next| next.token.to_bytes()));
        let minute = row.expires_at.div_euclid(60_000);
        let moved = before.expires_at.div_euclid(60_000) != minute;
        let text = match (row.number, data) {
            (None, _) => &self.insert,
            (Some(_), data) => &self.update[usize::from(moved) + 2 * usize::from(!matches!(data, Bytes::Same))],
        };
        let mut statement = connection.prepare_cached(text)?;
        let data = match data {
            Bytes::Are(bytes) => Some(bytes),
            Bytes::Same | Bytes::None => None,
        };
        // In the order of the columns. Not every statement has all of them, but a number among those it has is no error.
        let values: [&dyn ToSql; COLUMNS.len()] = [
            &key,
            &write_id,
            &row.expires_at,
            &minute,
            &token,
            &lock.map(|lock| lock.until),
            &lock.map(|lock| lock.since),
            &lock.map(|lock| lock.lease),
            &lock.and_then(|lock| lock.owner.as_deref()),
            &lock.and_then(|lock| lock.process),
            &lock.map(|lock| lock.handed),
            &wanted,
            &next.map(|next| next.until),
            &next.map(|next| next.process),
            &next.map(|next| next.since),
            &data,
        ];
        for (n, value) in values.iter().enumerate() {
            statement.raw_bind_parameter(n + 1, value)?;
        }
        if let Some(number) = row.number {
            statement.raw_bind_parameter(NUMBER, number)?;
        }
        statement.raw_execute()?;
        Ok(())
    }
}

/// A row that was read.
struct Read {
    before: Row,
    now: i64,
    data: Option<Vec<u8>>,
}

/// What becomes of the bytes of a record.
#[derive(Clone, Copy)]
enum Bytes<'a> {
    Same,
    Are(&'a [u8]),
    None,
}

/// What stands under the name of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fitness {
    Fits,
    Missing,
    Foreign,
}

/// The connection inside a transaction that nobody else can write beside.
pub(super) struct Turn<'a> {
    pub(super) connection: &'a Connection,
    pub(super) table: &'a Table,
    pub(super) who: &'a Who,
    pub(super) strict: bool,
}

impl Turn<'_> {
    /// Takes a lock; `gone` says of a process whether it has ended.
    pub(super) fn enter(&self, entry: &Enter, gone: impl Fn(i64) -> bool) -> Result<Entered> {
        let Read { before, now, data } = self.table.row(self.connection, &entry.key, entry.want != Want::Lock)?;
        let mut row = before.clone();
        let answer = row.enter(entry, self.who, now, gone);
        self.table.store(self.connection, &entry.key, &before, &row, Bytes::Same, now)?;
        Ok(match answer {
            Answer::Absent => Entered::Absent,
            Answer::Busy(busy) => Entered::Busy(busy),
            Answer::Granted { clean } => {
                let found = match (entry.want, row.live(now), data) {
                    (Want::Lock, ..) => Found::Absent,
                    (_, Some(last), Some(data)) => {
                        Found::Live { last, record: Record::new(data, Ttl::new(span(row.expires_at - now))) }
                    }
                    _ => row.trace(now).map_or(Found::Absent, |mark| Found::Buried { mark }),
                };
                Entered::Granted { found, clean }
            }
        })
    }

    /// Answers without a transaction what would change nothing: who asks again and again disturbs nobody.
    pub(super) fn peek(&self, entry: &Enter, gone: impl Fn(i64) -> bool) -> Result<Option<Entered>> {
        let Read { before, now, .. } = self.table.row(self.connection, &entry.key, false)?;
        let mut row = before.clone();
        let answer = row.enter(entry, self.who, now, gone);
        Ok(match answer {
            Answer::Absent if row == before => Some(Entered::Absent),
            Answer::Busy(busy) if row == before => Some(Entered::Busy(busy)),
            _ => None,
        })
    }

    pub(super) fn change(&self, change: &Alter) -> Result<Verdict> {
        let Read { before, now, .. } = self.table.row(self.connection, &change.key, false)?;
        let mut row = before.clone();
        let verdict = row.change(change, self.who, self.strict, now);
        let data = match &change.action {
            Action::Write { data, .. } if verdict == Verdict::Applied => Bytes::Are(data),
            _ => Bytes::Same,
        };
        self.table.store(self.connection, &change.key, &before, &row, data, now)?;
        Ok(verdict)
    }

    pub(super) fn remove(&self, removal: &Remove) -> Result<Option<Record>> {
        let Read { before, now, data } = self.table.row(self.connection, &removal.key, true)?;
        let mut row = before.clone();
        row.remove(removal, now);
        self.table.store(self.connection, &removal.key, &before, &row, Bytes::None, now)?;
        let left = Ttl::new(span(before.expires_at - now));
        Ok(data.filter(|_| before.live(now).is_some()).map(|data| Record::new(data, left)))
    }

    pub(super) fn renew(&self, renewal: &Renew) -> Result<Renewed> {
        self.keep(&renewal.key, |row, now| row.renew(renewal, self.strict, now))
    }

    pub(super) fn leave(&self, key: &str, token: LeaseToken, clean: bool) -> Result<()> {
        self.keep(key, |row, now| row.leave(token, clean, now))
    }

    pub(super) fn unlock(&self, key: &str) -> Result<bool> {
        self.keep(key, |row, now| row.unlock(now))
    }

    /// Changes a row but for its bytes.
    fn keep<T>(&self, key: &str, change: impl FnOnce(&mut Row, i64) -> T) -> Result<T> {
        let Read { before, now, .. } = self.table.row(self.connection, key, false)?;
        let mut row = before.clone();
        let outcome = change(&mut row, now);
        self.table.store(self.connection, key, &before, &row, Bytes::Same, now)?;
        Ok(outcome)
    }

    /// Frees expired records, or what is left of others.
    pub(super) fn gc(&self, records: bool, limit: u32) -> Result<Freed> {
        let (began, now) = (Instant::now(), self.table.now(self.connection)?);
        let mut gc = self.connection.prepare_cached(&self.table.gc[usize::from(records)])?;
        let mut all = Freed { rows: 0, done: false };
        while !all.done && all.rows < limit && began.elapsed() < TURN {
            let asked = PIECE.min(limit - all.rows);
            let freed = gc.execute(named_params! { ":now": now, ":limit": asked })?;
            let freed = u32::try_from(freed).unwrap_or(asked);
            all.rows += freed;
            all.done = freed < asked;
        }
        Ok(all)
    }
}

/// What gc has freed in one transaction.
#[derive(Debug)]
pub(super) struct Freed {
    pub(super) rows: u32,
    /// Whether there was nothing more to free.
    pub(super) done: bool,
}

/// Reads the name of a write or of a lock.
fn name(row: &rusqlite::Row<'_>, index: usize) -> Result<Option<[u8; 16]>> {
    let value = row.get_ref(index)?;
    let Some(bytes) = value.as_blob_or_null()? else { return Ok(None) };
    let name = bytes.try_into().map_err(|_| FromSqlError::InvalidBlobSize { expected_size: 16, blob_size: bytes.len() });
    name.map(Some).map_err(|error| rusqlite::Error::FromSqlConversionFailure(index, Type::Blob, error.into()))
}

/// Returns what stands behind every key with this prefix: no key has that sign.
fn behind(prefix: &str) -> String {
    format!("{prefix}{}", char::MAX)
}
