//! One database for handler and lock: the steps of a session with leases, and how a lock is waited for.
//!
//! It knows no statement; see `database.rs` for what a database has to be able to do.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use session_core::leased::{
    self, Asked, Failed, Found, Granted, LeasedStore, Removal, Renewal, Renewed, Step, Then, Verdict, Want,
};
use session_core::{Error, ErrorKind, LeaseToken, Record, Result, SessionId};
use tokio::runtime::Handle;

use crate::batches::Batches;
use crate::config::{SqlConfig, SqlLockMode};
use crate::database::{Action, Alter, Busy, Database, Enter, Entered, Failure, Remove, Renew, millis};
use crate::transaction::{Hold, Holds, Sought, is_marked, mark};

/// How long the place of a task that gave up waits for the next task of this process.
const HEIR: Duration = Duration::from_millis(20);

/// When a lock that nobody wants is given back to a database that did not take it back before.
const PAUSES: [Duration; 3] = [Duration::from_millis(50), Duration::from_millis(250), Duration::from_secs(1)];

/// When a request that nobody waits for any more is withdrawn again, because it was not there yet: it travels on another connection
/// than its withdrawal, and may come behind it.
const AGAIN: [Duration; 4] =
    [Duration::from_millis(5), Duration::from_millis(50), Duration::from_millis(250), Duration::from_secs(1)];

/// How often a waiter looks at least, whoever promised to wake him: a holder that was killed tells nobody.
const LOOK: Duration = Duration::from_millis(500);

/// How soon whoever waits for a transaction looks at the row for the first time: later than a holder comes from the one to the other.
const GLANCE: Duration = Duration::from_millis(250);

/// The first and the longest pause of the one next in line who is not woken, and of those behind him.
const NEXT: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(6));
const BEHIND: (Duration, Duration) = (Duration::from_millis(3), Duration::from_millis(50));

/// The same behind somebody who is woken: each look takes the row from the one who is to give the lock back, and whoever has waited
/// longest is next after one look. Measured with six processes on PostgreSQL: 3 ms gives a fifth fewer cycles and equal shares, 25 ms a
/// tenth more and longer waits.
const BEHIND_TOLD: (Duration, Duration) = (Duration::from_millis(12), Duration::from_millis(50));

pub(crate) struct Store {
    pub(crate) database: Arc<dyn Database>,
    batches: Batches,
    pub(crate) config: SqlConfig,
    /// With `lock=transaction`.
    holds: Option<Arc<Holds>>,
}

/// A session as the table names it.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) key: String,
}

impl Store {
    pub(crate) fn new(database: Arc<dyn Database>, config: SqlConfig) -> Arc<Self> {
        let holds = database.clone().transactions().filter(|_| config.lock == SqlLockMode::Transaction);
        let holds = holds.map(|transactions| Holds::new(transactions, &config));
        Arc::new(Self { batches: Batches::new(database.clone()), database, config, holds })
    }

    /// Makes the tables if they are not there.
    pub(crate) async fn create_table(&self) -> Result<(), Failure> {
        self.database.create_table().await?;
        match &self.holds {
            Some(holds) => holds.transactions().create_table().await,
            None => Ok(()),
        }
    }

    pub(crate) async fn check(&self) -> Result<(), Failure> {
        self.database.check().await?;
        match &self.holds {
            Some(holds) => holds.transactions().check().await,
            None => Ok(()),
        }
    }

    pub(crate) async fn gc(&self, limit: u32) -> Result<u64, Failure> {
        let freed = self.database.gc(limit).await?;
        if let Some(holds) = &self.holds {
            let freed = tokio::time::timeout(self.config.timeout, holds.transactions().gc(limit)).await;
            let late = || Failure::new(ErrorKind::Unavailable, "the database did not answer in time");
            freed.unwrap_or_else(|_| Err(late()))?;
        }
        Ok(freed)
    }

    pub(crate) fn key(&self, id: &SessionId) -> String {
        [&*self.config.prefix, id.as_str()].concat()
    }

    /// Asks for a lock once, and once more if that fails in passing; says whether it is certain that nothing was left behind.
    async fn enter(&self, entry: &Enter) -> Result<Entered, Failure> {
        let mut sent = false;
        for last in [false, true] {
            match self.batches.enter(entry.clone()).await {
                Err(mut failure) => {
                    sent |= failure.sent;
                    failure.sent = sent;
                    if last || !failure.passing {
                        return Err(failure);
                    }
                }
                entered => return entered,
            }
        }
        Err(Failure::unexpected("two attempts have ended without an outcome"))
    }

    /// Takes the lease in the row, waiting for it if need be; under a hold it waits for nobody who is known to be gone.
    async fn acquire_lease(
        self: &Arc<Self>,
        ask: &Asking<'_>,
        token: LeaseToken,
        hold: Option<(&Holds, &Hold)>,
    ) -> Result<Granted<LeaseToken>> {
        let mut attempt = Attempt { store: self, row: ask.row, token, armed: true, asking: true };
        let entry = ask.entry(token);
        let granted = match self.enter(&entry).await {
            Ok(Entered::Absent) => {
                attempt.armed = false;
                None
            }
            Ok(Entered::Granted { found, clean }) => {
                attempt.armed = false;
                Some((found, clean))
            }
            Ok(Entered::Busy(busy)) => {
                attempt.armed = false;
                let evicted = match hold {
                    Some((holds, hold)) => {
                        hold.keep_for(ask.rest().saturating_add(ask.lease));
                        let evicted = holds.transactions().evict(&ask.row.key).await;
                        evicted.map_err(|failure| failure.into_error(ask.operation))?
                    }
                    None => false,
                };
                if ask.rest() < Duration::from_millis(1) && !evicted {
                    return Err(lock_timeout(ask.operation, ask.wait, busy.holder));
                }
                attempt.armed = true;
                // On the heap, so that whoever need not wait does not carry the room for it.
                Box::pin(self.wait(ask.operation, &mut attempt, entry, ask.wait, ask.began)).await?
            }
            Err(failure) => {
                attempt.armed = failure.sent;
                return Err(failure.into_error(ask.operation));
            }
        };
        Ok(match granted {
            None => Granted::Absent,
            Some((found, clean)) => Granted::Locked { claim: token, found, clean },
        })
    }

    /// Takes the lock in a transaction that stays open, and under it the lease in the row. While somebody else has the transaction,
    /// the row decides whether that still means something.
    async fn acquire_held(
        self: &Arc<Self>,
        holds: &Arc<Holds>,
        ask: &Asking<'_>,
        token: LeaseToken,
    ) -> Result<Granted<LeaseToken>> {
        let mut seeking = holds.seek(&ask.row.key, ask.want == Want::Existing, ask.wait, ask.lease);
        let mut pause = GLANCE;
        loop {
            let answer = match tokio::time::timeout(pause, &mut seeking.answer).await {
                Ok(Ok(answer)) => answer.map_err(|failure| failure.into_error(ask.operation))?,
                Ok(Err(_)) => {
                    let fact = "the task that held the transaction has ended";
                    return Err(Error::new(ErrorKind::Unavailable, ask.operation, fact));
                }
                Err(_) if ask.began.elapsed() > ask.wait.saturating_add(holds.grace()) => Sought::Busy,
                Err(_) if !seeking.for_a_holder() => continue,
                Err(_) => {
                    match self.glance(ask, mark(token, false)).await? {
                        Ok(granted) => return Ok(granted),
                        Err(left) => {
                            let jitter = Duration::from_micros(1000 + u64::from(token.to_bytes()[0]) * 31);
                            pause = LOOK.min(left + jitter);
                        }
                    }
                    continue;
                }
            };
            return match answer {
                Sought::Absent => Ok(Granted::Absent),
                Sought::Busy => self.acquire_lease(ask, mark(token, false), None).await,
                Sought::Held(hold) => {
                    let token = mark(token, true);
                    let granted = self.acquire_lease(ask, token, Some((holds, &hold))).await?;
                    if let Granted::Locked { .. } = granted {
                        holds.put(token, hold);
                    }
                    Ok(granted)
                }
            };
        }
    }

    /// Takes the lease if it is free although somebody has the transaction; otherwise says how long it lasts.
    async fn glance(self: &Arc<Self>, ask: &Asking<'_>, token: LeaseToken) -> Result<Result<Granted<LeaseToken>, Duration>> {
        let mut attempt = Attempt { store: self, row: ask.row, token, armed: true, asking: true };
        let entered = self.enter(&ask.entry(token)).await;
        attempt.armed = entered.as_ref().is_err_and(|failure| failure.sent);
        match entered.map_err(|failure| failure.into_error(ask.operation))? {
            Entered::Absent => Ok(Ok(Granted::Absent)),
            Entered::Granted { found, clean } => Ok(Ok(Granted::Locked { claim: token, found, clean })),
            Entered::Busy(busy) => Ok(Err(busy.left)),
        }
    }

    /// Ends the transaction of a lock that has been given back, or is to be.
    fn let_go(&self, token: Option<LeaseToken>) {
        if let (Some(holds), Some(token)) = (&self.holds, token) {
            holds.let_go(token);
        }
    }

    /// Says of each lease whether the transaction that it came with, if it did, is still open.
    async fn keep(&self, leases: &[Renewal<Row>]) -> Vec<bool> {
        let Some(holds) = &self.holds else { return vec![true; leases.len()] };
        let asked: Vec<_> = leases
            .iter()
            .map(|lease| {
                let (holds, token, length) = (holds.clone(), lease.token, lease.length);
                is_marked(token).then(|| tokio::spawn(async move { holds.keep(token, length).await }))
            })
            .collect();
        let mut kept = Vec::with_capacity(asked.len());
        for asked in asked {
            kept.push(match asked {
                Some(asked) => asked.await.unwrap_or(false),
                None => true,
            });
        }
        kept
    }

    /// Waits for the lock that was not free at first.
    async fn wait(
        self: &Arc<Self>,
        operation: &'static str,
        attempt: &mut Attempt<'_>,
        mut entry: Enter,
        wait: Duration,
        began: Instant,
    ) -> Result<Option<(Found, bool)>> {
        // Before the database is told: the lock may come before its answer.
        let mut waiter = self.database.waiter(entry.token).await;
        let mut tries = 0;
        let mut probed = Instant::now();
        entry.book = millis(LOOK * 3);
        loop {
            let rest = wait.saturating_sub(began.elapsed());
            if probed.elapsed() >= LOOK {
                (entry.probe, probed) = (true, Instant::now());
            }
            entry.waited = millis(began.elapsed());
            attempt.asking = true;
            let entered = match self.enter(&entry).await {
                Ok(entered) => {
                    attempt.asking = false;
                    entered
                }
                Err(failure) => {
                    attempt.give_up().await;
                    return Err(failure.into_error(operation));
                }
            };
            entry.probe = false;
            let Busy { holder, left, booked } = match entered {
                Entered::Absent => {
                    attempt.armed = false;
                    return Ok(None);
                }
                Entered::Granted { found, clean } => {
                    attempt.armed = false;
                    return Ok(Some((found, clean)));
                }
                Entered::Busy(busy) => busy,
            };
            if rest < Duration::from_millis(1) {
                attempt.leave_place(booked);
                return Err(lock_timeout(operation, wait, holder));
            }
            // Nothing is on its way, and whoever is not next in line has left no trace.
            attempt.armed = booked;
            // A little later than the lease ends, and not all at the same moment.
            let jitter = Duration::from_micros(1000 + u64::from(entry.token.to_bytes()[0]) * 31);
            let limit = rest.min(left + jitter).min(LOOK.saturating_sub(probed.elapsed()) + jitter);
            let (first, longest) = match (&waiter, booked) {
                (None, true) => NEXT,
                (None, false) => BEHIND,
                (Some(_), _) => BEHIND_TOLD,
            };
            let pause = (first * (1 << tries.min(6))).min(longest);
            // Between half and one and a half of it, so that two who met once do not meet again.
            let share = f64::from(entry.token.to_bytes()[tries % 16] % 16) / 16.0;
            let pause = limit.min(pause.mul_f64(0.5 + share));
            match &mut waiter {
                Some(waiter) if booked => {
                    if !waiter.woken(limit).await {
                        // To ask again at once would be in vain. If he was told late, and is next in line again, he may still be woken.
                        waiter.woken(pause).await;
                    }
                }
                _ => tokio::time::sleep(pause).await,
            }
            tries += 1;
            attempt.armed = true;
        }
    }

    /// Gives up whatever `token` has, also to a database that comes back a moment later; otherwise that ends with its lease. Says
    /// `false` if it had nothing yet.
    async fn give_up(&self, key: &str, token: LeaseToken, clean: bool) -> bool {
        let mut pauses = PAUSES.iter();
        loop {
            match (self.database.leave(key, token, clean).await, pauses.next()) {
                (Ok(left), _) => return left,
                (Err(failure), Some(pause)) if failure.kind == ErrorKind::Unavailable => tokio::time::sleep(*pause).await,
                (Err(failure), _) => {
                    tracing::debug!(kind = %failure.kind, "a lock could not be given back and ends with its lease");
                    return true;
                }
            }
        }
    }

    /// Gives up what `token` has, or gets from a request that was given up on its way. While there is one, that something was given up
    /// says little: a batch that finds a lock gone which it has just taken takes it once more.
    async fn withdraw(&self, key: &str, token: LeaseToken, asking: bool) {
        let mut pauses = AGAIN.iter();
        while !self.give_up(key, token, true).await || asking {
            match pauses.next() {
                Some(pause) => tokio::time::sleep(*pause).await,
                None => return,
            }
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("config", &self.config).field("database", &self.database).finish()
    }
}

impl LeasedStore for Store {
    type Place = Row;
    type Claim = LeaseToken;

    fn place(&self, id: &SessionId) -> Row {
        Row { key: self.key(id) }
    }

    fn claim(&self, _lease: Duration) -> Result<LeaseToken> {
        // Nobody else knows a fresh id, so its first write waits for nobody and needs no transaction.
        LeaseToken::random().map(|token| mark(token, false))
    }

    fn token(claim: &LeaseToken) -> LeaseToken {
        *claim
    }

    fn max_bytes(&self) -> usize {
        self.config.max_bytes
    }

    async fn acquire(
        self: &Arc<Self>,
        operation: &'static str,
        row: &Arc<Row>,
        want: Want,
        wait: Duration,
        lease: Duration,
    ) -> Result<Granted<LeaseToken>> {
        let began = Instant::now();
        let token = LeaseToken::random()?;
        let ask = Asking { operation, row, want, wait, lease, began };
        match &self.holds {
            // On the heap, so that whoever does without does not carry the room for it.
            Some(holds) => Box::pin(self.acquire_held(holds, &ask, token)).await,
            None => self.acquire_lease(&ask, mark(token, false), None).await,
        }
    }

    async fn look(&self, operation: &'static str, row: &Row) -> Result<Found, Failed> {
        match self.database.look(&row.key).await {
            Err(failure) if failure.passing => self.database.look(&row.key).await,
            found => found,
        }
        .map_err(|failure| failure.into_failed(operation))
    }

    async fn change(&self, row: &Row, step: &Step<'_, LeaseToken>) -> Asked<Verdict> {
        let change = Alter {
            key: row.key.clone(),
            basis: step.basis,
            token: step.claim.copied(),
            lease: step.lease.map(millis),
            action: match step.action {
                leased::Action::Write { id, data, ttl } => Action::Write { id, data: data.into(), ttl },
                leased::Action::Touch { ttl } => Action::Touch { ttl },
            },
            then: step.then,
        };
        let (judged, mut repeated) = self.batches.change(change.clone()).await;
        let judged = match judged {
            Err(failure) if failure.passing => {
                let (again, before) = self.batches.change(change).await;
                repeated |= failure.sent || before;
                again
            }
            judged => judged,
        };
        let in_force = matches!(judged, Ok(Verdict::Applied | Verdict::AlreadyApplied));
        if in_force && step.then == Then::Close || matches!(judged, Ok(Verdict::Gone)) {
            self.let_go(step.claim.copied());
        }
        Asked { answer: judged.map_err(|failure| failure.into_failed(step.operation())), repeated }
    }

    async fn remove(&self, row: &Row, step: &Removal<'_, LeaseToken>) -> Asked<Option<Record>> {
        let removal = Remove {
            key: row.key.clone(),
            token: step.claim.copied(),
            lease: if step.lease.is_zero() { 0 } else { millis(step.lease) },
            mark: step.mark,
            trace: step.trace,
            then: step.then,
        };
        let removed = twice("destroy", || self.database.remove(&removal)).await;
        if removed.answer.is_ok() && step.then == Then::Close {
            self.let_go(removal.token);
        }
        removed
    }

    async fn renew(&self, leases: &[Renewal<Row>]) -> Vec<Result<Renewed, Failed>> {
        let kept = self.keep(leases).await;
        let renewals: Vec<_> = leases
            .iter()
            .zip(&kept)
            // Without its transaction a lock may have been taken over however long its lease is.
            .filter(|(_, kept)| **kept)
            .map(|(lease, _)| Renew {
                key: lease.place.key.clone(),
                token: lease.token,
                lease: millis(lease.length),
                protects: lease.protects,
            })
            .collect();
        let mut outcomes = match twice("renew", || self.database.renew(&renewals)).await.answer {
            Ok(outcomes) if outcomes.len() == renewals.len() => Ok(outcomes.into_iter()),
            Ok(_) => Err(Failure::unexpected("an answer is missing").into_failed("renew")),
            Err(failed) => Err(failed),
        };
        let outcome = |(lease, kept): (&Renewal<Row>, bool)| match &mut outcomes {
            _ if !kept => {
                self.let_go(Some(lease.token));
                Ok(Renewed::Ended)
            }
            Ok(outcomes) => {
                let outcome = outcomes.next().unwrap_or(Renewed::Ended);
                if outcome == Renewed::Ended {
                    self.let_go(Some(lease.token));
                }
                Ok(outcome)
            }
            Err(Failed { error, sent }) => {
                Err(Failed { error: Error::new(error.kind(), "renew", "the database did not answer"), sent: *sent })
            }
        };
        leases.iter().zip(kept).map(outcome).collect()
    }

    async fn release(&self, operation: &'static str, row: &Row, token: LeaseToken) -> Result<(), Failed> {
        let left = twice(operation, || self.database.leave(&row.key, token, true)).await.answer;
        self.let_go(Some(token));
        left.map(drop)
    }

    fn release_later(self: &Arc<Self>, row: &Arc<Row>, token: LeaseToken, clean: bool) {
        if let Ok(runtime) = Handle::try_current() {
            let (store, row) = (self.clone(), row.clone());
            runtime.spawn(async move {
                store.give_up(&row.key, token, clean).await;
                store.let_go(Some(token));
            });
        } else {
            self.let_go(Some(token));
        }
    }
}

/// What is asked for with a lock.
struct Asking<'a> {
    operation: &'static str,
    row: &'a Arc<Row>,
    want: Want,
    wait: Duration,
    lease: Duration,
    began: Instant,
}

impl Asking<'_> {
    fn rest(&self) -> Duration {
        self.wait.saturating_sub(self.began.elapsed())
    }

    fn entry(&self, token: LeaseToken) -> Enter {
        Enter {
            key: self.row.key.clone(),
            token,
            lease: millis(self.lease),
            want: self.want,
            book: 0,
            waited: 0,
            probe: false,
        }
    }
}

/// Asks once, and once more if that fails in passing.
async fn twice<T, F>(operation: &'static str, ask: impl Fn() -> F) -> Asked<T>
where
    F: Future<Output = Result<T, Failure>>,
{
    match ask().await {
        Err(failure) if failure.passing => {
            let answer = ask().await.map_err(|failure| failure.into_failed(operation));
            Asked { answer, repeated: failure.sent }
        }
        answer => Asked { answer: answer.map_err(|failure| failure.into_failed(operation)), repeated: false },
    }
}

fn lock_timeout(operation: &'static str, wait: Duration, holder: Option<session_core::Holder>) -> Error {
    let fact = format!("the lock was not free within {} ms", wait.as_millis());
    Error::new(ErrorKind::LockTimeout, operation, fact).with_holder(holder)
}

/// A request for a lock under way. Dropped before its end, or after an answer that did not come, it is withdrawn in the background.
struct Attempt<'a> {
    store: &'a Arc<Store>,
    row: &'a Arc<Row>,
    token: LeaseToken,
    armed: bool,
    /// Whether a request is on its way.
    asking: bool,
}

impl Attempt<'_> {
    /// Whatever comes too early, or fails, is tried again behind the caller's back.
    async fn give_up(&mut self) {
        let _ = Box::pin(self.store.database.leave(&self.row.key, self.token, true)).await;
    }

    /// Leaves the place of a task whose time is over to the next task of this process, for a moment (`protocol.md` 13).
    fn leave_place(&mut self, booked: bool) {
        self.armed = false;
        if let Ok(runtime) = Handle::try_current()
            && booked
        {
            let (store, row, token) = (self.store.clone(), self.row.clone(), self.token);
            runtime.spawn(async move {
                tokio::time::sleep(HEIR).await;
                store.give_up(&row.key, token, true).await;
            });
        }
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.armed
            && let Ok(runtime) = Handle::try_current()
        {
            let (store, row, token, asking) = (self.store.clone(), self.row.clone(), self.token, self.asking);
            runtime.spawn(async move { store.withdraw(&row.key, token, asking).await });
        }
    }
}

#[cfg(test)]
mod tests;
