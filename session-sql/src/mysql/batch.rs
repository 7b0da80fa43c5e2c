//! Opens and saves of many sessions in one flight.
//!
//! What is asked stands in a table of its own, `r`, made of literals. The rows are locked as `l`, and those that somebody else has
//! locked are left out, so that a batch waits for nobody. Every value is computed from `r` and `l`, which do not change meanwhile.
//!
//! The statements are those of `texts`, about two tables in place of one; nothing is decided here that is not decided there.

use std::fmt::Write;

use super::link::write_bytes;
use super::texts::{Texts, qualified};
use crate::database::{Action, Alter, Enter};
use session_core::Ttl;
use session_core::leased::{Basis, Then};

/// What changes of a session that has a row, and under which condition.
#[derive(Debug)]
pub(super) struct Batch {
    table: String,
    /// The columns of `l`.
    columns: String,
    now: String,
    take: String,
    open: String,
    seen: String,
    change: String,
    fence: String,
    create: String,
}

impl Batch {
    pub(super) fn new(texts: &Texts, strict: bool) -> Self {
        let parts = qualified(strict);
        Self {
            table: texts.table.clone(),
            columns: parts.columns,
            now: parts.now,
            take: parts.take,
            open: parts.open,
            seen: parts.seen,
            change: parts.change,
            fence: parts.fence,
            create: parts.create,
        }
    }

    /// Takes locks of records that are there, and reads.
    pub(super) fn enter(&self, entries: &[&Enter], owner: &str, alive: Option<i64>) -> String {
        let mut text = String::with_capacity(4096 + 256 * entries.len());
        text.push_str("UPDATE (");
        for (at, entry) in entries.iter().enumerate() {
            text.push_str(if at == 0 { "SELECT " } else { " UNION ALL SELECT " });
            write_bytes(&mut text, entry.key.as_bytes());
            text.push_str(if at == 0 { " AS k," } else { "," });
            write_bytes(&mut text, &entry.token.to_bytes());
            text.push_str(if at == 0 { " AS token," } else { "," });
            add(&mut text, entry.lease);
            text.push_str(if at == 0 { " AS lease" } else { "" });
        }
        let keys = keys(entries.iter().map(|entry| &*entry.key));
        self.join(&mut text, &keys, entries.len() as i64);
        let mut name = String::new();
        write_bytes(&mut name, owner.as_bytes());
        let alive = alive.map_or_else(|| "NULL".into(), |alive| alive.to_string());
        text.push_str(&self.take.replace("{owner}", &name).replace("{alive}", &alive));
        text.push_str(" WHERE ");
        text.push_str(&self.open);
        let mut tokens = String::new();
        for entry in entries {
            tokens.push_str(if tokens.is_empty() { "" } else { "," });
            write_bytes(&mut tokens, &entry.token.to_bytes());
        }
        let seen = self.seen.replace("{tokens}", &tokens);
        let _ = write!(text, ";SELECT {seen} FROM {} WHERE id IN ({keys})", self.table);
        text
    }

    /// Writes over what was found, and creates what is new, as one. What was in force before is shown by the second answer, and what
    /// is now by the last but one.
    pub(super) fn change(&self, changes: &[&Alter], owner: &str, alive: Option<i64>) -> String {
        let bytes: usize = changes.iter().map(|change| change.bytes()).sum();
        let mut text = String::with_capacity(8192 + 512 * changes.len() + 2 * bytes);
        let keys = keys(changes.iter().map(|change| &*change.key));
        let mut ids = String::new();
        for change in changes {
            ids.push_str(if ids.is_empty() { "" } else { "," });
            if let Action::Write { id, .. } = &change.action {
                write_bytes(&mut ids, &id.to_bytes());
            }
        }
        let table = &self.table;
        let _ = write!(text, "START TRANSACTION;SELECT id FROM {table} WHERE id IN ({keys}) AND write_id IN ({ids})");
        self.create(&mut text, changes, owner, alive);
        self.overwrite(&mut text, changes);
        let _ = write!(text, ";SELECT id,write_id FROM {table} WHERE id IN ({keys});COMMIT");
        text
    }

    fn create(&self, text: &mut String, changes: &[&Alter], owner: &str, alive: Option<i64>) {
        let mut first = true;
        for change in changes.iter().filter(|change| change.basis == Basis::Unseen) {
            let Action::Write { id, data, ttl } = &change.action else { continue };
            if std::mem::take(&mut first) {
                let _ = write!(text, ";INSERT IGNORE INTO {} {} VALUES (", self.table, self.create);
            } else {
                text.push_str(",(");
            }
            write_bytes(text, change.key.as_bytes());
            text.push(',');
            write_bytes(text, data);
            text.push(',');
            write_bytes(text, &id.to_bytes());
            let (now, ttl) = (&self.now, length(*ttl));
            let _ = write!(text, ",{now}+{ttl},({now}+{ttl}) DIV 60000,");
            match change.token.filter(|_| change.takes()) {
                Some(token) => {
                    write_bytes(text, &token.to_bytes());
                    let lease = change.lease.unwrap_or(0);
                    let _ = write!(text, ",{now}+{lease},{now},{lease},");
                    write_bytes(text, owner.as_bytes());
                    text.push(',');
                    match alive {
                        Some(alive) => add(text, alive),
                        None => text.push_str("NULL"),
                    }
                }
                None => text.push_str("NULL,NULL,NULL,NULL,NULL,NULL"),
            }
            text.push(')');
        }
    }

    fn overwrite(&self, text: &mut String, changes: &[&Alter]) {
        let (mut count, mut payloads) = (0, String::new());
        for change in changes {
            let (Basis::Written(prev), Action::Write { id, data, ttl }) = (change.basis, &change.action) else { continue };
            let names = count == 0;
            let name = |text: &mut String, name: &str, end: &str| {
                if names {
                    text.push_str(" AS ");
                    text.push_str(name);
                }
                text.push_str(end);
            };
            text.push_str(if names { ";UPDATE (SELECT " } else { " UNION ALL SELECT " });
            write_bytes(text, change.key.as_bytes());
            name(text, "k", ",");
            match change.token {
                Some(token) => write_bytes(text, &token.to_bytes()),
                None => text.push_str("NULL"),
            }
            name(text, "token", ",");
            write_bytes(text, &prev.to_bytes());
            name(text, "prev", ",");
            write_bytes(text, &id.to_bytes());
            name(text, "w", ",");
            payloads.push_str(if names { "" } else { "," });
            write_bytes(&mut payloads, data);
            add(text, count + 1);
            name(text, "n", ",");
            add(text, length(*ttl));
            name(text, "ttl", ",");
            add(text, i64::from(change.lease.is_some()));
            name(text, "excl", ",");
            add(text, i64::from(change.lease.is_some() && change.then == Then::Close));
            name(text, "gives", "");
            count += 1;
        }
        if count > 0 {
            let keys = keys(changes.iter().filter(|change| change.basis != Basis::Unseen).map(|change| &*change.key));
            self.join(text, &keys, count);
            text.push_str(&self.change.replace("{data}", &payloads));
            text.push_str(" WHERE ");
            text.push_str(&self.fence);
        }
    }

    /// Locks the rows and joins what is asked, them, and the table, in this order: nothing else may be looked at, or it would be waited
    /// for. With a limit the locking stays a table of its own.
    fn join(&self, text: &mut String, keys: &str, count: i64) {
        let Self { table, columns, .. } = self;
        let _ = write!(
            text,
            ") AS r STRAIGHT_JOIN (SELECT {columns} FROM {table} FORCE INDEX (PRIMARY) WHERE id IN ({keys}) LIMIT {count} FOR UPDATE SKIP LOCKED) AS l \
             ON l.id=r.k STRAIGHT_JOIN {table} AS t FORCE INDEX (PRIMARY) ON t.id=l.id SET "
        );
    }
}

fn keys<'a>(keys: impl Iterator<Item = &'a str>) -> String {
    let mut text = String::new();
    for key in keys {
        text.push_str(if text.is_empty() { "" } else { "," });
        write_bytes(&mut text, key.as_bytes());
    }
    text
}

fn add(text: &mut String, number: i64) {
    let _ = write!(text, "{number}");
}

fn length(ttl: Ttl) -> i64 {
    crate::database::millis(ttl.as_duration())
}
