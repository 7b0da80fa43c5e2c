//! How the openings and changes of several sessions travel in one statement.
//!
//! Most of a batch is of one kind: to take what nobody holds, or to write and let go what one holds. The lean statement does that,
//! and whatever it has no answer for goes to the one that judges, together with all that is of another kind. Both leave out rows
//! that somebody has locked.

use session_core::leased::{Basis, Then, Verdict, Want};
use sqlx::SqlStr;
use sqlx::postgres::PgRow;

use super::server::{Parameters, bytes, field, list};
use super::{Postgres, entered, errors, found, length};
use crate::database::{Action, Alter, Enter, Entered, Failure};

/// The rest of a batch, and where in it each member stands.
struct Parted<'a, T> {
    members: &'a [T],
    lean: Vec<usize>,
    rest: Vec<usize>,
}

impl<'a, T> Parted<'a, T> {
    fn new(members: &'a [T], is_lean: impl Fn(&T) -> bool) -> Self {
        let (lean, rest): (Vec<_>, Vec<_>) = (0..members.len()).partition(|at| is_lean(&members[*at]));
        match lean.len() {
            // One would make two statements of one.
            1 => Self { members, lean: Vec::new(), rest: (0..members.len()).collect() },
            _ => Self { members, lean, rest },
        }
    }

    fn lean(&self) -> Vec<&'a T> {
        self.lean.iter().map(|at| &self.members[*at]).collect()
    }

    fn rest(&self) -> Vec<&'a T> {
        self.rest.iter().map(|at| &self.members[*at]).collect()
    }

    /// Returns where the member stands whose number, beginning with one, the database says.
    fn place(&self, number: i64) -> Result<usize, Failure> {
        let index = usize::try_from(number).ok().and_then(|number| number.checked_sub(1));
        index.and_then(|index| self.lean.get(index)).copied().ok_or_else(errors::strange)
    }
}

impl Postgres {
    pub(super) async fn enter_many(&self, entries: &[Enter]) -> Result<Vec<Option<Entered>>, Failure> {
        let mut answers: Vec<Option<Entered>> = entries.iter().map(|_| None).collect();
        let mut parted = Parted::new(entries, |entry| entry.want == Want::Existing && entry.book == 0 && !entry.probe);
        if !parted.lean.is_empty() {
            let lean = parted.lean();
            let arguments = Parameters::new()
                .add(list(&lean, |entry| &*entry.key))?
                .add(list(&lean, |entry| bytes(entry.token)))?
                .add(list(&lean, |entry| entry.lease))?
                .add(&*self.owner.text)?
                .add(self.process())?;
            for row in self.ask(&self.statements.enter_free, arguments).await? {
                let at = parted.place(field(&row, 0)?)?;
                answers[at] = Some(Entered::Granted { found: found(&row, 1)?, clean: false });
            }
            parted.rest.extend(parted.lean.iter().filter(|at| answers[**at].is_none()));
        }
        if !parted.rest.is_empty() {
            // If this fails, those who were let in ask again, and are let in again.
            let judged = self.judge_entries(&parted.rest(), &self.statements.enter.batch).await?;
            for (at, entered) in parted.rest.iter().zip(judged) {
                answers[*at] = entered;
            }
        }
        Ok(answers)
    }

    pub(super) async fn change_many(&self, changes: &[Alter]) -> Result<Vec<Option<Verdict>>, Failure> {
        let mut answers = vec![None; changes.len()];
        let mut parted = Parted::new(changes, |change| !self.strict && held(change).is_some());
        if !parted.lean.is_empty() {
            let lean: Vec<_> = parted.lean().into_iter().filter_map(held).collect();
            let arguments = Parameters::new()
                .add(list(&lean, |write| write.key))?
                .add(list(&lean, |write| &write.token[..]))?
                .add(list(&lean, |write| &write.base[..]))?
                .add(list(&lean, |write| &write.id[..]))?
                .add(list(&lean, |write| write.data))?
                .add(list(&lean, |write| write.ttl))?;
            for row in self.ask(&self.statements.change_held, arguments).await? {
                answers[parted.place(field(&row, 0)?)?] = Some(Verdict::Applied);
            }
            parted.rest.extend(parted.lean.iter().filter(|at| answers[**at].is_none()));
        }
        if !parted.rest.is_empty() {
            let judged = self.judge_changes(&parted.rest(), &self.statements.change.batch).await;
            // Some of this batch may be applied already, so nobody may be told for certain that his is not.
            let judged = judged.map_err(|failure| Failure { sent: failure.sent || !parted.lean.is_empty(), ..failure })?;
            for (at, verdict) in parted.rest.iter().zip(judged) {
                answers[*at] = verdict;
            }
        }
        Ok(answers)
    }

    /// Does what is asked by the statement that judges.
    pub(super) async fn judge_entries(&self, entries: &[&Enter], sql: &SqlStr) -> Result<Vec<Option<Entered>>, Failure> {
        let want = |want| match want {
            Want::Existing => 0_i16,
            Want::Any => 1,
            Want::Lock => 2,
        };
        let arguments = Parameters::new()
            .add(list(entries, |entry| &*entry.key))?
            .add(list(entries, |entry| bytes(entry.token)))?
            .add(list(entries, |entry| entry.lease))?
            .add(list(entries, |entry| entry.book))?
            .add(list(entries, |entry| want(entry.want)))?
            .add(list(entries, |entry| entry.probe))?
            .add(&*self.owner.text)?
            .add(self.process())?
            .add(self.owner.process)?
            .add(list(entries, |entry| entry.waited))?;
        let rows = self.ask(sql, arguments).await?;
        rows.iter().map(|row| entered(row, true)).collect()
    }

    /// Does what is asked by the statement that judges.
    pub(super) async fn judge_changes(&self, changes: &[&Alter], sql: &SqlStr) -> Result<Vec<Option<Verdict>>, Failure> {
        let basis = |basis| match basis {
            Basis::Unseen => (0_i16, None),
            Basis::Absent { mark } => (1, mark.map(|mark| mark.to_bytes().to_vec())),
            Basis::Written(prev) => (2, Some(prev.to_bytes().to_vec())),
        };
        let ttl = |action: &Action| match action {
            Action::Write { ttl, .. } | Action::Touch { ttl } => length(*ttl),
        };
        let written = |action: &Action| match action {
            Action::Write { id, .. } => Some(id.to_bytes().to_vec()),
            Action::Touch { .. } => None,
        };
        let arguments = Parameters::new()
            .add(list(changes, |change| &*change.key))?
            .add(list(changes, |change| change.token.map(bytes)))?
            .add(list(changes, |change| change.lease))?
            .add(list(changes, |change| basis(change.basis).0))?
            .add(list(changes, |change| basis(change.basis).1))?
            .add(list(changes, |change| written(&change.action)))?
            .add(list(changes, |change| match &change.action {
                Action::Write { data, .. } => Some(&**data),
                Action::Touch { .. } => None,
            }))?
            .add(list(changes, |change| ttl(&change.action)))?
            .add(list(changes, |change| change.then == Then::Close))?
            .add(&*self.owner.text)?
            .add(self.process())?;
        let rows = self.ask(sql, arguments).await?;
        let verdict = |row: &PgRow| {
            Ok(match field::<i16>(row, 0)? {
                0 => Some(Verdict::Refused),
                1 => Some(Verdict::Applied),
                2 => Some(Verdict::AlreadyApplied),
                3 => Some(Verdict::Gone),
                _ => None,
            })
        };
        rows.iter().map(verdict).collect()
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
