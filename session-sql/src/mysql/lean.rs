//! What most batches are: several locks that nobody holds, or several records that their holders write and let go.
//!
//! MariaDB alone can be told not to wait for a row at all, and then one update of one table does, which costs it two thirds of what
//! the [statements for every case](super::batch) do. It fails as a whole where somebody has locked one of the rows, and says nothing of
//! rows that are not as it wants them; all these are the business of the others.

use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use session_core::leased::{Basis, Then, Verdict};

use super::link::write_bytes;
use super::texts::{LIVE, NOW};
use super::{Alter, Enter, Entered, MySql, bytes, found, id, length, number};
use crate::database::{Action, Failure};

/// So many batches go the other way after one met a locked row: where there is one, there are more.
const CAREFUL: u32 = 32;

/// Whether batches go this way.
#[derive(Debug, Default)]
pub(super) struct Lean {
    /// Whether the server can do it.
    can: AtomicBool,
    careful: AtomicU32,
}

impl Lean {
    pub(super) fn allow(&self, can: bool) {
        self.can.store(can, Ordering::Relaxed);
    }

    fn goes(&self) -> bool {
        let less = |careful: u32| careful.checked_sub(1);
        self.can.load(Ordering::Relaxed) && self.careful.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_err()
    }
}

impl MySql {
    /// Takes the locks that nobody has or wants, of records that are there; whoever has no answer is to be asked for again.
    pub(super) async fn enter_free(&self, entries: &[&Enter]) -> Result<Vec<Option<Entered>>, Failure> {
        let mut entered: Vec<Option<Entered>> = entries.iter().map(|_| None).collect();
        let lease = entries.first().map_or(0, |entry| entry.lease);
        if !self.lean.goes() || entries.iter().any(|entry| entry.lease != lease) {
            return Ok(entered);
        }
        let (mut keys, mut tokens) = (String::new(), String::new());
        for entry in entries {
            list(&mut keys, entry.key.as_bytes());
            list(&mut tokens, &entry.token.to_bytes());
        }
        let (table, live) = (&self.texts.table, LIVE.replace("{now}", NOW));
        let mut text = String::with_capacity(2048 + 4 * (keys.len() + tokens.len()));
        let until = format!("GREATEST(expires_at,{NOW}+{})", 2 * lease);
        let _ = write!(
            text,
            "SET STATEMENT innodb_lock_wait_timeout=0 FOR UPDATE {table} SET expires_minute={until} DIV 60000,expires_at={until},\
             lock_handed=0,lock_since={NOW},lock_until={NOW}+{lease},lock_lease={lease},lock_owner="
        );
        write_bytes(&mut text, self.owner.text.as_bytes());
        let _ = match self.anchor.held() {
            Some(alive) => write!(text, ",lock_process={alive}"),
            None => write!(text, ",lock_process=NULL"),
        };
        let _ = write!(
            text,
            ",lock_token=ELT(FIELD(id,{keys}),{tokens}) WHERE id IN ({keys}) AND {live} AND lock_token IS NULL AND want_token IS NULL;\
             SELECT id,data,write_id,expires_at-{NOW} FROM {table} WHERE id IN ({keys}) AND lock_token IN ({tokens}) AND {live}"
        );
        let Some(answers) = self.link.fly_unless_locked(text).await? else {
            self.lean.careful.store(CAREFUL, Ordering::Relaxed);
            return Ok(entered);
        };
        for row in answers.last().map_or(&[][..], |answer| &answer.rows) {
            let key = bytes(row, 0)?.unwrap_or_default();
            let found = found(true, bytes(row, 1)?, id(row, 2)?, number(row, 3)?, true)?;
            if let Some(at) = entries.iter().position(|entry| entry.key.as_bytes() == key) {
                entered[at] = Some(Entered::Granted { found, clean: false });
            }
        }
        Ok(entered)
    }

    /// Writes what holders write and let go while nobody is next in line; whoever has no answer is to be asked for again.
    pub(super) async fn change_held(&self, changes: &[&Alter]) -> Result<Vec<Option<Verdict>>, Failure> {
        let mut verdicts = vec![None; changes.len()];
        let held: Vec<_> = (0..changes.len()).filter_map(|at| Some((at, held(changes[at])?))).collect();
        if self.strict || held.len() < 2 || !self.lean.goes() {
            return Ok(verdicts);
        }
        let [mut keys, mut tokens, mut bases, mut ids] = [const { String::new() }; 4];
        let (mut records, mut lengths) =
            (String::with_capacity(held.iter().map(|(_, write)| 2 * write.data.len() + 8).sum()), String::new());
        for (_, write) in &held {
            list(&mut keys, write.key.as_bytes());
            list(&mut tokens, &write.token);
            list(&mut bases, &write.base);
            list(&mut ids, &write.id);
            list(&mut records, write.data);
            let _ = write!(lengths, "{}{}", if lengths.is_empty() { "" } else { "," }, write.ttl);
        }
        let (table, live) = (&self.texts.table, LIVE.replace("{now}", NOW));
        // A token is of one session, so it says whose row it is, and is shorter than its key. A lock of somebody else has no place, and
        // so no base that it could be.
        let at = format!("FIELD(lock_token,{tokens})");
        let first = held[0].1.ttl;
        let ttl = match held.iter().all(|(_, write)| write.ttl == first) {
            true => first.to_string(),
            false => format!("ELT({at},{lengths})"),
        };
        // The second statement tells who was written by the first: his lock is gone, which a copy that came before may have left.
        let text = format!(
            "START TRANSACTION;SET STATEMENT innodb_lock_wait_timeout=0 FOR UPDATE {table} SET \
             expires_minute=({NOW}+{ttl}) DIV 60000,expires_at={NOW}+{ttl},data=ELT({at},{records}),write_id=ELT({at},{ids}),\
             lock_until=NULL,lock_since=NULL,lock_lease=NULL,lock_owner=NULL,lock_process=NULL,lock_handed=0,lock_token=NULL \
             WHERE id IN ({keys}) AND write_id=ELT({at},{bases}) AND {live} AND want_token IS NULL;\
             SELECT id FROM {table} WHERE id IN ({keys}) AND write_id IN ({ids}) AND lock_token IS NULL;COMMIT"
        );
        let Some(answers) = self.link.fly_unless_locked(text).await? else {
            self.lean.careful.store(CAREFUL, Ordering::Relaxed);
            return Ok(verdicts);
        };
        for row in answers.get(2).map_or(&[][..], |answer| &answer.rows) {
            let key = bytes(row, 0)?.unwrap_or_default();
            if let Some((at, _)) = held.iter().find(|(_, write)| write.key.as_bytes() == key) {
                verdicts[*at] = Some(Verdict::Applied);
            }
        }
        Ok(verdicts)
    }
}

/// A write by the holder, who gives the lock back with it.
struct Held<'a> {
    key: &'a str,
    token: [u8; 16],
    base: [u8; 16],
    id: [u8; 16],
    data: &'a [u8],
    ttl: i64,
}

fn held(change: &Alter) -> Option<Held<'_>> {
    match (change.basis, &change.action, change.token, change.then) {
        // A repeat of the write that it is based on would be done once more.
        (Basis::Written(base), Action::Write { id, data, ttl }, Some(token), Then::Close)
            if change.lease.is_some() && base != *id =>
        {
            let (token, base, id) = (token.to_bytes(), base.to_bytes(), id.to_bytes());
            Some(Held { key: &change.key, token, base, id, data, ttl: length(*ttl) })
        }
        _ => None,
    }
}

fn list(to: &mut String, bytes: &[u8]) {
    if !to.is_empty() {
        to.push(',');
    }
    write_bytes(to, bytes);
}
