//! Plain programs on SQLite: one thread, one connection, and one commit for each statement.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, Result, TransactionBehavior, params};

use super::{LEASE, Program, TTL, failed, lost, millis, name, owner};
use crate::bench::Round;

/// The clock, as ours asks it.
const NOW: &str = "CAST(round(unixepoch('subsec') * 1000) AS INTEGER)";

/// The two steps that a thread of ours takes in transactions that it shares among whoever waits: reading the row with its lock, and
/// writing what has become of it. A statement that does both, and commits by itself, is the least that it takes.
const OPEN: &str = "UPDATE {t} SET lock_token = ?2, lock_until = {now} + ?3, lock_since = {now}, lock_lease = ?3, lock_owner = ?4,
    lock_process = 1, lock_handed = 0, expires_at = max(expires_at, {now} + 2 * ?3)
  WHERE id = ?1 AND data IS NOT NULL AND expires_at > {now} AND (lock_token IS NULL OR lock_until <= {now} OR lock_token = ?2)
  RETURNING data, write_id";

const SAVE: &str = "UPDATE {t} SET data = ?6, write_id = ?5, expires_at = {now} + ?4, lock_token = NULL, lock_until = NULL,
    lock_since = NULL, lock_lease = NULL, lock_owner = NULL, lock_process = NULL, lock_handed = NULL
  WHERE id = ?1 AND write_id = ?2 AND data IS NOT NULL AND expires_at > {now} AND lock_token = ?3";

const READ: &str = "SELECT data FROM {t} WHERE id = ?1";

const WRITE: &str = "UPDATE {t} SET data = ?2, expires_at = {now} + ?3 WHERE id = ?1";

const FILL: &str =
    "INSERT INTO {t} (id, data, write_id, expires_at, expires_minute) VALUES (?1, ?2, ?3, {now} + ?4, ({now} + ?4) / 60000)";

pub(super) struct Plain {
    connection: Mutex<Connection>,
    /// Whether a save waits for the disk, as ours does; an open never does.
    synced: bool,
    open: String,
    save: String,
    read: String,
    write: String,
    fill: String,
    remove: String,
    drop: String,
}

impl Plain {
    pub(super) fn open(path: &Path, table: &str, synced: bool) -> Result<Self> {
        let connection = Connection::open(path)?;
        // Ours may be clearing up behind the round before.
        connection.busy_timeout(Duration::from_secs(10))?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        let [open, save, read, write, fill, remove] = [OPEN, SAVE, READ, WRITE, FILL, "DELETE FROM {t} WHERE id = ?1"]
            .map(|text| text.replace("{t}", &format!("\"{table}\"")).replace("{now}", NOW));
        let drop = format!("DROP TABLE \"{table}\"");
        Ok(Self { connection: Mutex::new(connection), synced, open, save, read, write, fill, remove, drop })
    }

    pub(super) fn fill(&self, keys: &[String], data: &[u8], left: i64) -> Result<()> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for key in keys {
            transaction.prepare_cached(&self.fill)?.execute(params![key, data, [0_u8; 16], left])?;
        }
        transaction.commit()
    }

    pub(super) fn run(&self, program: Program, keys: &[String], length: Duration) -> session_core::Result<Round> {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let (began, owner) = (Instant::now(), owner());
        let (mut before, mut waits) = (began, Vec::new());
        for key in keys.iter().cycle() {
            match program {
                Program::Locked => self.locked(&connection, key, &owner)?,
                Program::Unlocked => self.unlocked(&connection, key)?,
            }
            let now = Instant::now();
            waits.push(Round::nanos(now - before));
            before = now;
            if now - began >= length {
                break;
            }
        }
        Ok(Round { ran: (began, before), waits })
    }

    fn locked(&self, connection: &Connection, key: &str, owner: &str) -> session_core::Result<()> {
        let (token, write) = (name()?, name()?);
        self.wait_for_disk(connection, false).map_err(failed)?;
        let (mut data, prev) = connection
            .prepare_cached(&self.open)
            .and_then(|mut open| {
                open.query_row(params![key, token, millis(LEASE), owner], |row| {
                    Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, Vec<u8>>(1)?))
                })
            })
            .map_err(failed)?;
        data[0] = data[0].wrapping_add(1);
        self.wait_for_disk(connection, self.synced).map_err(failed)?;
        let saved = connection
            .prepare_cached(&self.save)
            .and_then(|mut save| save.execute(params![key, prev, token, millis(TTL), write, data]));
        if saved.map_err(failed)? == 1 { Ok(()) } else { Err(lost()) }
    }

    fn unlocked(&self, connection: &Connection, key: &str) -> session_core::Result<()> {
        let read = connection.prepare_cached(&self.read).and_then(|mut read| read.query_row([key], |row| row.get(0)));
        let mut data: Vec<u8> = read.map_err(failed)?;
        data[0] = data[0].wrapping_add(1);
        self.wait_for_disk(connection, self.synced).map_err(failed)?;
        let written =
            connection.prepare_cached(&self.write).and_then(|mut write| write.execute(params![key, data, millis(TTL)]));
        if written.map_err(failed)? == 1 { Ok(()) } else { Err(lost()) }
    }

    fn wait_for_disk(&self, connection: &Connection, wait: bool) -> Result<()> {
        connection.pragma_update(None, "synchronous", if wait { "FULL" } else { "NORMAL" })
    }

    pub(super) fn remove(&self, keys: &[String]) -> Result<()> {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        for key in keys {
            connection.execute(&self.remove, [key])?;
        }
        Ok(())
    }

    pub(super) fn drop_table(&self) -> Result<()> {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        connection.execute_batch(&self.drop)
    }
}
