//! MySQL and MariaDB: the steps of a session as statements that commit by themselves.
//!
//! Neither has an `UPDATE` that returns what it changed in a form that both know. So an open is an `UPDATE` and a `SELECT` in one
//! flight: whoever finds his token in the row has the lock, and the record in that row is the one that it protects. A save is one
//! prepared `UPDATE` whose `WHERE` is the fence, and the server counts the rows that it found, changed or not. Only where it found
//! none, the row is asked why.
//!
//! A lock is waited for by asking again: there is nothing in these databases that would wake somebody.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use async_trait::async_trait;
use session_core::leased::{Basis, Found, Renewed, Then, Verdict, Want};
use session_core::{ErrorKind, Record, Ttl, WriteId};
use sqlx::mysql::{MySqlConnectOptions, MySqlPool, MySqlRow, MySqlSslMode};

use crate::config::{SqlAddress, SqlConfig};
use crate::database::{
    Action, Alter, Busy, Database, Enter, Entered, Failure, Listed, Locked, Owner, REMEMBER, Remove, Renew, Waiter, holder,
    millis, span,
};
use crate::pieces::{Finds, MOST, SEARCH, in_pieces};
use crate::plain::Statement;
use crate::transaction::Transactions;
use anchor::Anchor;
use batch::Batch;
use front::Fronts;
use lean::Lean;
use link::{Given, Link, bytes, flag, id, number, text};
use texts::{Access, Lock, Text, Texts};

mod anchor;
mod batch;
mod errors;
mod front;
mod lean;
mod link;
mod schema;
mod texts;
mod transaction;

/// How often a step is tried whose row changes between two statements of it.
const TRIES: usize = 4;

/// A table in a database.
pub(crate) struct MySql {
    link: Link,
    texts: Texts,
    /// The name of the table of holds as it stands in a statement.
    holds: String,
    batch: Batch,
    fronts: Fronts,
    owner: Owner,
    anchor: Arc<Anchor>,
    strict: bool,
    /// Whether the server knows how to pass by a row that somebody has locked.
    skips: AtomicBool,
    lean: Lean,
    /// Expired records, and what is left of others, to be freed.
    finds: [Finds; 2],
}

/// Connects to a server.
pub(crate) async fn connect(address: &SqlAddress, config: &SqlConfig, owner: Owner) -> Result<Arc<dyn Database>, Failure> {
    let mut options = MySqlConnectOptions::new().database(&address.database).ssl_mode(if address.tls {
        MySqlSslMode::VerifyIdentity
    } else {
        MySqlSslMode::Disabled
    });
    if let Some(ca) = &address.ca {
        options = options.ssl_ca(ca);
    }
    options = match &address.socket {
        Some(socket) => options.socket(socket),
        None => options.host(&address.host).port(if address.port == 0 { 3306 } else { address.port }),
    };
    if let Some(user) = &address.user {
        options = options.username(user);
    }
    if let Some(password) = &address.password {
        options = options.password(password);
    }
    let link = Link::own(options, config.connections(), config.timeout, config.connect_timeout);
    Ok(Arc::new(MySql::new(link, config, owner)))
}

/// Uses the connections of a pool.
pub(crate) fn over(pool: MySqlPool, config: &SqlConfig, owner: Owner) -> Arc<dyn Database> {
    Arc::new(MySql::new(Link::lent(pool, config.timeout), config, owner))
}

/// Returns what an uncontended cycle sends: the open as one text in which the values stand, and the save.
pub(crate) fn uncontended(config: &SqlConfig) -> [Statement; 2] {
    let texts = Texts::new(&config.table);
    let access = if config.strict_expiry { Access::Strict } else { Access::Exclusive };
    let statement = |texts: &[&texts::Text]| Statement {
        sql: texts.iter().map(|text| &*text.sql).collect::<Vec<_>>().join(";"),
        values: texts.iter().flat_map(|text| &text.params).map(|param| param.name()).collect(),
    };
    [statement(&[texts.take(true, true, false), texts.seen(true)]), statement(&[texts.change(true, access, true)])]
}

impl MySql {
    fn new(link: Link, config: &SqlConfig, owner: Owner) -> Self {
        let texts = Texts::new(&config.table);
        Self {
            anchor: Anchor::new(owner.process, link.broke.clone()),
            batch: Batch::new(&texts, config.strict_expiry),
            fronts: Fronts::default(),
            link,
            texts,
            holds: transaction::name_of(&config.table),
            owner,
            strict: config.strict_expiry,
            skips: AtomicBool::new(false),
            lean: Lean::default(),
            finds: Default::default(),
        }
    }

    async fn enter_alone(&self, entry: &Enter) -> Result<Entered, Failure> {
        if entry.book == 0 {
            return self.enter_now(entry).await;
        }
        let asking = match self.fronts.come(&entry.key, entry.token) {
            Ok(asking) => asking,
            Err(busy) => return Ok(Entered::Busy(busy)),
        };
        let entered = self.enter_now(entry).await?;
        asking.told(&entered);
        Ok(entered)
    }

    async fn enter_now(&self, entry: &Enter) -> Result<Entered, Failure> {
        self.anchor.wanted(&self.link);
        let existing = entry.want == Want::Existing;
        let given = Given {
            key: entry.key.as_bytes(),
            token: Some(entry.token.to_bytes()),
            lease: entry.lease,
            owner: &self.owner.text,
            alive: self.anchor.held(),
            process: self.owner.process,
            book: entry.book,
            waited: entry.waited,
            ..Given::default()
        };
        let mut flight = vec![self.texts.take(existing, entry.want != Want::Lock, entry.probe && self.anchor.judges())];
        if !existing {
            flight.push(&self.texts.stub);
        }
        if entry.book > 0 {
            flight.push(self.texts.book(existing));
        }
        flight.push(self.texts.seen(entry.want != Want::Lock));
        for _ in 0..TRIES {
            let answers = self.link.ask(&flight, &given).await?;
            match answers.last().and_then(|answer| answer.rows.first()) {
                Some(row) => return entered(row, entry.want),
                None if existing => return Ok(Entered::Absent),
                // The row of a lock that was given back between two statements.
                None => {}
            }
        }
        Ok(Entered::Busy(Busy { holder: None, left: span(0), booked: false }))
    }

    /// Applies a change if it may be.
    async fn apply(&self, change: &Alter, given: &Given<'_>) -> Result<bool, Failure> {
        let close = change.then == Then::Close;
        let writes = matches!(change.action, Action::Write { .. });
        let text = match (change.basis, change.lease) {
            (Basis::Written(_), lease) => {
                let access = match lease {
                    None => Access::Optimistic,
                    Some(_) if self.strict => Access::Strict,
                    Some(_) => Access::Exclusive,
                };
                self.texts.change(writes, access, close)
            }
            (Basis::Absent { .. } | Basis::Unseen, _) if !writes => return Ok(false),
            (Basis::Absent { .. }, Some(_)) => self.texts.fill(self.strict, close),
            (Basis::Absent { .. } | Basis::Unseen, lease) => {
                let asked = self.link.try_ask(&[self.texts.create(change.takes())], given).await?;
                match asked {
                    Ok(_) => return Ok(true),
                    Err(error) if errors::is_duplicate(&error) => {}
                    Err(error) => return Err(errors::asking(error)),
                }
                self.texts.recreate(match lease {
                    Some(_) if change.takes() => Lock::Take,
                    Some(_) if close => Lock::GiveBack,
                    _ => Lock::Leave,
                })
            }
        };
        Ok(self.link.ask(&[text], given).await?.iter().any(|answer| answer.matched > 0))
    }

    async fn alter(&self, change: &Alter) -> Result<Verdict, Failure> {
        let given = self.given(change);
        for _ in 0..TRIES {
            if self.apply(change, &given).await? {
                return Ok(Verdict::Applied);
            }
            let answers = self.link.ask(&[&self.texts.judge], &given).await?;
            let row = answers.first().and_then(|answer| answer.rows.first()).map(Row::read).transpose()?;
            // What would be applied now has become so since it was not.
            let verdict = judge(change, &row.unwrap_or_default(), self.strict);
            if verdict != Verdict::Applied {
                self.conclude(change, verdict, &given).await?;
                return Ok(verdict);
            }
        }
        let text = "the session changed whenever it was looked at";
        Err(Failure { passing: true, ..Failure::new(ErrorKind::Unavailable, text) })
    }

    fn given<'a>(&'a self, change: &'a Alter) -> Given<'a> {
        let mut given = Given {
            key: change.key.as_bytes(),
            token: change.token.map(|token| token.to_bytes()),
            lease: change.lease.unwrap_or(0),
            owner: &self.owner.text,
            alive: self.anchor.held(),
            clean: true,
            ..Given::default()
        };
        match &change.action {
            Action::Write { id, data, ttl } => {
                (given.write, given.data, given.ttl) = (Some(id.to_bytes()), data, length(*ttl));
            }
            Action::Touch { ttl } => given.ttl = length(*ttl),
        }
        given.prev = match change.basis {
            Basis::Written(id) => Some(id.to_bytes()),
            Basis::Absent { mark } => mark.map(WriteId::to_bytes),
            Basis::Unseen => None,
        };
        given
    }

    /// Draws the consequences for the lock of a change that this request did not apply.
    async fn conclude(&self, change: &Alter, verdict: Verdict, given: &Given<'_>) -> Result<(), Failure> {
        if change.token.is_none() {
            return Ok(());
        }
        let close = change.then == Then::Close;
        if verdict == Verdict::Gone || verdict == Verdict::AlreadyApplied && close {
            self.link.ask(&[&self.texts.release, &self.texts.drop], given).await?;
        } else if verdict == Verdict::AlreadyApplied && change.takes() {
            self.link.ask(&[self.texts.take(true, true, false)], given).await?;
        }
        Ok(())
    }

    /// Whether so many can and should travel together.
    fn joins(&self, count: usize) -> bool {
        count > 1 && self.link.flies() && self.skips.load(Ordering::Relaxed)
    }

    async fn enter_joined(&self, entries: &[&Enter]) -> Result<Vec<Option<Entered>>, Failure> {
        let mut entered = self.enter_free(entries).await?;
        let rest: Vec<_> = (0..entries.len()).filter(|at| entered[*at].is_none()).collect();
        if !rest.is_empty() {
            // If this fails, those who were let in ask again, and are let in again.
            let again: Vec<_> = rest.iter().map(|at| entries[*at]).collect();
            for (at, outcome) in rest.into_iter().zip(self.enter_careful(&again).await?) {
                entered[at] = outcome;
            }
        }
        Ok(entered)
    }

    async fn enter_careful(&self, entries: &[&Enter]) -> Result<Vec<Option<Entered>>, Failure> {
        let text = self.batch.enter(entries, &self.owner.text, self.anchor.held());
        let answers = self.link.fly(text).await?;
        let rows = answers.last().map_or(&[][..], |answer| &answer.rows);
        let mut entered = HashMap::with_capacity(rows.len());
        for row in rows {
            let outcome = match self::entered(row, Want::Existing)? {
                // It was passed by because somebody had locked the row, and is asked for again alone.
                Entered::Busy(_) if flag(row, 12)? => None,
                outcome => Some(outcome),
            };
            entered.insert(bytes(row, 11)?.unwrap_or_default(), outcome);
        }
        let outcome = |entry: &&Enter| entered.remove(entry.key.as_bytes()).unwrap_or(Some(Entered::Absent));
        Ok(entries.iter().map(outcome).collect())
    }

    /// Whoever has no outcome was refused, passed by, or had been applied before; alone he is told which.
    async fn change_joined(&self, changes: &[&Alter]) -> Result<Vec<Option<Verdict>>, Failure> {
        let mut verdicts = self.change_held(changes).await?;
        let rest: Vec<_> = (0..changes.len()).filter(|at| verdicts[*at].is_none()).collect();
        if !rest.is_empty() {
            let again: Vec<_> = rest.iter().map(|at| changes[*at]).collect();
            let judged = self.change_careful(&again).await;
            // Some of this batch may be applied already, so nobody may be told for certain that his is not.
            let applied = rest.len() < changes.len();
            let judged = judged.map_err(|failure| Failure { sent: failure.sent || applied, ..failure })?;
            for (at, verdict) in rest.into_iter().zip(judged) {
                verdicts[at] = verdict;
            }
        }
        Ok(verdicts)
    }

    async fn change_careful(&self, changes: &[&Alter]) -> Result<Vec<Option<Verdict>>, Failure> {
        let text = self.batch.change(changes, &self.owner.text, self.anchor.held());
        let answers = self.link.fly(text).await?;
        let rows = |at: Option<usize>| at.and_then(|at| answers.get(at)).map_or(&[][..], |answer| &answer.rows);
        let mut before = HashSet::new();
        for row in rows(Some(1)) {
            before.insert(bytes(row, 0)?.unwrap_or_default());
        }
        let mut after = HashMap::new();
        for row in rows(answers.len().checked_sub(2)) {
            after.insert(bytes(row, 0)?.unwrap_or_default(), id(row, 1)?);
        }
        let judged = |change: &&Alter| {
            let Action::Write { id, .. } = &change.action else { return None };
            let key = change.key.as_bytes();
            let applied = !before.contains(key) && after.get(key) == Some(&Some(id.to_bytes()));
            applied.then_some(Verdict::Applied)
        };
        Ok(changes.iter().map(judged).collect())
    }

    async fn renew_alone(&self, lease: &Renew) -> Result<Renewed, Failure> {
        let given = Given {
            key: lease.key.as_bytes(),
            token: Some(lease.token.to_bytes()),
            lease: lease.lease,
            alive: self.anchor.held(),
            protects: lease.protects,
            ..Given::default()
        };
        let answers = self.link.ask(&[&self.texts.renew, &self.texts.renewed], &given).await?;
        let Some(row) = answers.last().and_then(|answer| answer.rows.first()) else { return Ok(Renewed::Ended) };
        Ok(match (flag(row, 0)?, flag(row, 1)?) {
            (false, _) => Renewed::Ended,
            (true, false) if lease.protects => Renewed::Gone,
            (true, _) => Renewed::Renewed,
        })
    }
}

impl fmt::Debug for MySql {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MySql").field("table", &self.texts.table).field("owner", &self.owner).finish_non_exhaustive()
    }
}

#[async_trait]
impl Database for MySql {
    async fn enter(&self, entries: &[Enter]) -> Result<Vec<Option<Entered>>, Failure> {
        let together = |entry: &Enter| entry.want == Want::Existing && entry.book == 0 && !entry.probe;
        let joined: Vec<_> = entries.iter().filter(|entry| together(entry)).collect();
        if !self.joins(joined.len()) {
            return each(all(entries.iter().map(async |entry| self.enter_alone(entry).await.map(Some))).await);
        }
        self.anchor.wanted(&self.link);
        let mut joined = self.enter_joined(&joined).await?.into_iter();
        let entered = entries.iter().map(|entry| {
            let joined = together(entry).then(|| joined.next().flatten());
            async move {
                match joined {
                    Some(entered) => Ok(entered),
                    None => self.enter_alone(entry).await.map(Some),
                }
            }
        });
        each(all(entered).await)
    }

    async fn change(&self, changes: &[Alter]) -> Result<Vec<Option<Verdict>>, Failure> {
        let together = |change: &Alter| {
            matches!(change.action, Action::Write { .. }) && matches!(change.basis, Basis::Written(_) | Basis::Unseen)
        };
        let joined: Vec<_> = changes.iter().filter(|change| together(change)).collect();
        let bytes: usize = joined.iter().map(|change| 2 * change.bytes() + 2048).sum();
        if !self.joins(joined.len()) || !self.link.takes(bytes) {
            return each(all(changes.iter().map(async |change| self.alter(change).await.map(Some))).await);
        }
        let mut joined = self.change_joined(&joined).await?.into_iter();
        let judged = changes.iter().map(|change| {
            let joined = together(change).then(|| joined.next().flatten());
            async move {
                match joined {
                    Some(judged) => Ok(judged),
                    None => self.alter(change).await.map(Some),
                }
            }
        });
        each(all(judged).await)
    }

    async fn look(&self, key: &str) -> Result<Found, Failure> {
        let given = Given { key: key.as_bytes(), ..Given::default() };
        let answers = self.link.ask(&[&self.texts.look], &given).await?;
        let Some(row) = answers.first().and_then(|answer| answer.rows.first()) else { return Ok(Found::Absent) };
        found(flag(row, 0)?, bytes(row, 1)?, id(row, 2)?, number(row, 3)?, flag(row, 4)?)
    }

    async fn remove(&self, removal: &Remove) -> Result<Option<Record>, Failure> {
        let stay = millis(REMEMBER).max(removal.lease.saturating_mul(2));
        let given = Given {
            key: removal.key.as_bytes(),
            token: removal.token.map(|token| token.to_bytes()),
            write: Some(removal.mark.to_bytes()),
            stay,
            ..Given::default()
        };
        let texts = &self.texts;
        let mut flight = vec![&texts.mark, &texts.removed, &texts.bury];
        if removal.then == Then::Close && removal.token.is_some() {
            flight.push(&texts.release_buried);
        }
        flight.push(&texts.there);
        // Whoever writes between two of the statements is asked to be buried again. That he always comes in between is a race that
        // nobody wins often, and each time a write is lost to it that was going to be lost.
        for _ in 0..16 * TRIES {
            let answers = self.link.ask(&flight, &given).await?;
            let row = |at: usize| answers.get(at).and_then(|answer| answer.rows.first());
            if answers.get(2).is_some_and(|buried| buried.matched > 0) {
                let Some(removed) = row(1) else { return Ok(None) };
                let Some(data) = bytes(removed, 0)? else { return Ok(None) };
                return Ok(Some(Record::new(data, Ttl::new(span(number(removed, 1)?.unwrap_or(0))))));
            }
            match row(flight.len() - 1) {
                Some(_) => {}
                None if removal.trace => {
                    self.link.ask(&[&texts.trace], &given).await?;
                }
                None => return Ok(None),
            }
        }
        let text = "the session was written whenever it was to be removed";
        Err(Failure { sent: true, passing: true, ..Failure::new(ErrorKind::Unavailable, text) })
    }

    async fn renew(&self, leases: &[Renew]) -> Result<Vec<Renewed>, Failure> {
        all(leases.iter().map(|lease| self.renew_alone(lease))).await.into_iter().collect()
    }

    async fn leave(&self, key: &str, token: session_core::LeaseToken, clean: bool) -> Result<bool, Failure> {
        self.fronts.leave(key, token);
        let given = Given { key: key.as_bytes(), token: Some(token.to_bytes()), clean, ..Given::default() };
        let answers = self.link.ask(&[&self.texts.release, &self.texts.unwant, &self.texts.drop], &given).await?;
        Ok(answers.iter().take(2).any(|answer| answer.matched > 0))
    }

    async fn gc(&self, limit: u32) -> Result<u64, Failure> {
        let [records, rest] = self.texts.gc(self.skips.load(Ordering::Relaxed));
        let clear = async |[find, free]: &[Text; 2], limit, finds| {
            let search = async || {
                let found = self.link.ask(&[find], &Given { limit: SEARCH, ..Given::default() }).await?;
                found.iter().flat_map(|answer| &answer.rows).map(|row| Ok(text(row, 0)?.unwrap_or_default())).collect()
            };
            let free = async |keys: Vec<String>| {
                let answers = self.link.ask(&[free], &Given { keys: &keys, limit: MOST as u32, ..Given::default() }).await?;
                Ok(answers.first().map_or(0, |answer| u32::try_from(answer.matched).unwrap_or(u32::MAX)))
            };
            in_pieces(limit, finds, search, free).await
        };
        let [expired, traces] = &self.finds;
        let freed = clear(records, limit, expired).await?;
        // What is left of others goes last, so that an answer of zero says that no record has expired.
        clear(rest, limit - freed, traces).await?;
        Ok(u64::from(freed))
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: u32) -> Result<Vec<Listed>, Failure> {
        let [first, end] = range(prefix);
        // The next key behind one is that with the least character added.
        let from = after.map_or(first, |after| [after.as_bytes(), &[0]].concat());
        let given = Given { from: &from, to: &end, limit, ..Given::default() };
        let answers = self.link.ask(&[&self.texts.list], &given).await?;
        let listed = |row: &MySqlRow| {
            let bytes = u64::try_from(number(row, 1)?.unwrap_or(0)).unwrap_or(0);
            Ok(Listed { key: text(row, 0)?.unwrap_or_default(), bytes, left: span(number(row, 2)?.unwrap_or(0)) })
        };
        answers.iter().flat_map(|answer| &answer.rows).map(listed).collect()
    }

    async fn locks(&self, prefix: &str, limit: u32) -> Result<Vec<Locked>, Failure> {
        let [from, to] = range(prefix);
        let answers =
            self.link.ask(&[&self.texts.locks], &Given { from: &from, to: &to, limit, ..Given::default() }).await?;
        let locked = |row: &MySqlRow| {
            Ok(Locked {
                key: text(row, 0)?.unwrap_or_default(),
                holder: holder(text(row, 1)?, number(row, 2)?),
                left: span(number(row, 3)?.unwrap_or(0)),
                wanted: flag(row, 4)?,
            })
        };
        answers.iter().flat_map(|answer| &answer.rows).map(locked).collect()
    }

    async fn unlock(&self, key: &str) -> Result<bool, Failure> {
        let given = Given { key: key.as_bytes(), ..Given::default() };
        let answers = self.link.ask(&[&self.texts.unlock, &self.texts.drop], &given).await?;
        Ok(answers.first().is_some_and(|answer| answer.matched > 0))
    }

    async fn create_table(&self) -> Result<(), Failure> {
        schema::create(&self.link, &self.texts).await
    }

    async fn check(&self) -> Result<(), Failure> {
        let server = schema::check(&self.link, &self.texts).await?;
        self.skips.store(server.skips, Ordering::Relaxed);
        self.lean.allow(server.hurries);
        self.anchor.allow(server.alone);
        Ok(())
    }

    async fn show_life(&self) {
        self.anchor.wanted(&self.link);
        self.anchor.shown().await;
    }

    fn transactions(self: Arc<Self>) -> Option<Arc<dyn Transactions>> {
        Some(self)
    }

    async fn waiter(&self, _token: session_core::LeaseToken) -> Option<Box<dyn Waiter>> {
        None
    }
}

/// Asks for all at the same time, as far as there are connections, and waits for the last.
async fn all<T, F>(asked: impl Iterator<Item = F>) -> Vec<Result<T, Failure>>
where
    F: Future<Output = Result<T, Failure>> + Send,
    T: Send,
{
    let mut asked: Vec<_> = asked.map(|asked| (Box::pin(asked), None)).collect();
    std::future::poll_fn(|cx| {
        let mut done = true;
        for (future, outcome) in asked.iter_mut().filter(|(_, outcome)| outcome.is_none()) {
            match future.as_mut().poll(cx) {
                Poll::Ready(ready) => *outcome = Some(ready),
                Poll::Pending => done = false,
            }
        }
        if done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    asked.into_iter().filter_map(|(_, outcome)| outcome).collect()
}

/// Tells the members of a batch apart that were asked one by one. Whatever certainly did not happen is asked again alone.
fn each<T>(outcomes: Vec<Result<Option<T>, Failure>>) -> Result<Vec<Option<T>>, Failure> {
    let alone = outcomes.len() == 1;
    let outcome = |outcome: Result<Option<T>, Failure>| match outcome {
        Err(failure) if !failure.sent && !alone => Ok(None),
        outcome => outcome,
    };
    outcomes.into_iter().map(outcome).collect()
}

/// What a change is judged by.
#[derive(Debug, Default)]
struct Row {
    live: bool,
    /// The last write of a record, or the name of a trace that still counts.
    last: Option<WriteId>,
    /// Whether that is the trace of a destruction.
    buried: bool,
    own: bool,
    /// Whether the lease of the lock, whoever has it, has not ended.
    held: bool,
}

impl Row {
    fn read(row: &MySqlRow) -> Result<Self, Failure> {
        let (live, last, data) = (flag(row, 0)?, id(row, 1)?.map(WriteId::from_bytes), flag(row, 3)?);
        let ahead = number(row, 2)?.is_some_and(|left| left > 0);
        let last = last.filter(|_| data || ahead);
        Ok(Self { live, buried: last.is_some() && !data, last, own: flag(row, 4)?, held: flag(row, 5)? })
    }
}

/// Says what the table of [`Step`](session_core::leased::Step) says.
fn judge(change: &Alter, row: &Row, strict: bool) -> Verdict {
    let id = match &change.action {
        Action::Write { id, .. } => Some(*id),
        Action::Touch { .. } => None,
    };
    if row.live && id.is_some() && row.last == id {
        return Verdict::AlreadyApplied;
    }
    let exclusive = change.lease.is_some();
    let foreign = !row.own && row.held;
    let trace = row.last.filter(|_| !row.live);
    match change.basis {
        Basis::Written(_) if !row.live => return Verdict::Gone,
        Basis::Written(prev) if row.last != Some(prev) || foreign => return Verdict::Refused,
        Basis::Written(_) => {}
        Basis::Absent { .. } | Basis::Unseen if id.is_none() => return Verdict::Gone,
        Basis::Absent { .. } if exclusive && row.live => return Verdict::Refused,
        Basis::Absent { mark } if exclusive && trace.is_some() && trace != mark => return Verdict::Gone,
        Basis::Absent { .. } if exclusive && !row.own => return Verdict::Refused,
        Basis::Absent { .. } if exclusive => {}
        // The repeat of a create whose record has expired meanwhile.
        Basis::Absent { .. } | Basis::Unseen if trace.is_some() && trace == id => return Verdict::Gone,
        Basis::Absent { mark } if !row.live && !row.buried && (trace.is_none() || trace == mark) && !foreign => {
            return Verdict::Applied;
        }
        Basis::Unseen if trace.is_none() && !row.live && !foreign => return Verdict::Applied,
        Basis::Absent { .. } | Basis::Unseen => return Verdict::Refused,
    }
    if strict && exclusive && !(row.own && row.held) { Verdict::Refused } else { Verdict::Applied }
}

fn entered(row: &MySqlRow, want: Want) -> Result<Entered, Failure> {
    let (mine, live) = (flag(row, 0)?, flag(row, 2)?);
    if mine {
        let clean = flag(row, 1)?;
        let found = match want {
            Want::Lock => Found::Absent,
            Want::Existing | Want::Any => found(live, bytes(row, 3)?, id(row, 4)?, number(row, 5)?, flag(row, 6)?)?,
        };
        return Ok(Entered::Granted { found, clean });
    }
    if want == Want::Existing && !live {
        return Ok(Entered::Absent);
    }
    let holder = holder(text(row, 7)?, number(row, 8)?);
    Ok(Entered::Busy(Busy { holder, left: span(number(row, 9)?.unwrap_or(0)), booked: flag(row, 10)? }))
}

/// Makes what is there of the columns of a row. `stored` says whether there are bytes, live or not.
fn found(
    live: bool,
    data: Option<Vec<u8>>,
    last: Option<[u8; 16]>,
    left: Option<i64>,
    stored: bool,
) -> Result<Found, Failure> {
    let last = last.map(WriteId::from_bytes);
    let left = left.unwrap_or(0);
    Ok(match (live, data, last) {
        (true, Some(data), Some(last)) => Found::Live { last, record: Record::new(data, Ttl::new(span(left))) },
        (true, _, _) => return Err(Failure::unexpected("a record in the table has no last write")),
        // The trace of a record that has expired and was not collected counts as one.
        (false, _, Some(mark)) if stored || left > 0 => Found::Buried { mark },
        (false, _, _) => Found::Absent,
    })
}

fn length(ttl: Ttl) -> i64 {
    millis(ttl.as_duration())
}

/// The first key that begins with `prefix`, and the first one behind all that do. Keys are of ASCII.
fn range(prefix: &str) -> [Vec<u8>; 2] {
    [prefix.as_bytes().to_vec(), [prefix.as_bytes(), &[0xff]].concat()]
}

#[cfg(test)]
mod tests;
