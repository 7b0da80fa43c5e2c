//! How a lock is taken: at once, in the flight that reads the record, or by asking again and again.
//!
//! Whoever gets the lock marks the record in the same flight as in somebody's hands. If it was marked already, the holder before
//! has not released, and may be alive and paused: the record is then stored anew as it is, which gives it another number and
//! voids whatever he may still send. What may be done under the lock is not known here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use session_core::leased::{Found, Granted, Want};
use session_core::{Error, LeaseToken, Result};

use crate::item::{is_lock_of, lease_seconds, stub, trace_seconds};
use crate::store::{Claim, Lock, Look, Place, Store, delete, get, lock_timeout};
use crate::transport::{Answers, Command, Failure, Item, Life, Read, When};
use crate::wait::Pauses;

/// How often a waiter renews its claim to be the next, and looks who has the lock.
const CLAIM: Duration = Duration::from_millis(400);

/// For how many seconds that claim is stored.
const CLAIM_SECONDS: u64 = 2;

/// How often a record is stored anew before somebody who ignores the lock is blamed.
const BUMPS: u32 = 8;

/// The answers to a flight that asks for a lock.
pub(crate) struct Entered {
    /// The number of the lock, if it is ours.
    pub(crate) lock: Option<u64>,
    /// Whether it is ours only since this flight.
    pub(crate) anew: bool,
    /// The lock as it is, if that was asked for too.
    pub(crate) owner: Option<Item>,
    pub(crate) look: Look,
    pub(crate) life: Life,
}

/// What a flight that asks for a lock does beside.
#[derive(Clone, Copy)]
pub(crate) struct Beside {
    /// Reads and marks the record.
    pub(crate) read: bool,
    /// Keeps its place, if it is absent.
    pub(crate) stub: bool,
    /// Looks who has the lock: whether that is us, if the same was sent before.
    pub(crate) owner: bool,
}

impl Store {
    /// Asks for a lock once.
    pub(crate) async fn enter(&self, place: &Place, claim: &Claim, beside: Beside) -> Result<Entered, Failure> {
        let mut commands = vec![self.set_lock(place, claim, When::Absent)];
        if beside.owner {
            commands.push(get(&place.keys.lock, Read::Value));
        }
        if beside.stub {
            commands.push(set_stub(place, claim));
        }
        if beside.read {
            commands.push(get(&place.keys.record, Read::ValueAndMark));
        }
        let mut answers = self.ask(place, commands, None).await?;
        let mut lock = answers.stored()?;
        let anew = lock.is_some();
        let owner = if beside.owner { answers.item()? } else { None };
        if let Some(owner) = owner.as_ref().filter(|owner| is_lock_of(&owner.value, claim.token)) {
            lock = Some(owner.cas);
        }
        if beside.stub {
            answers.next()?;
        }
        let look = match beside.read {
            true => read(&mut answers),
            false => Ok(Look::default()),
        };
        let life = answers.life;
        match look {
            Ok(look) => Ok(Entered { lock, anew, owner, look, life }),
            Err(failure) => {
                // What is no record of ours is left alone, and its lock is not needed.
                if let Some(cas) = lock {
                    let _ = self.ask(place, vec![delete(&place.keys.lock, cas)], Some(life)).await;
                }
                Err(failure)
            }
        }
    }

    pub(crate) fn set_lock(&self, place: &Place, claim: &Claim, when: When) -> Command {
        Command::Set {
            key: place.keys.lock.clone(),
            value: place.keys.lock_value(claim.token, &self.process),
            when,
            seconds: lease_seconds(claim.lease),
        }
    }

    /// Gives the record another number if it was marked when it was read, so that nothing that was based on the old one applies.
    pub(crate) async fn void(&self, place: &Place, mut look: Look) -> Result<Look, Failure> {
        for _ in 0..BUMPS {
            let Some(seen) = look.seen.as_ref().filter(|_| look.marked) else { return Ok(look) };
            let bump = Command::Set {
                key: place.keys.record.clone(),
                value: Vec::new(),
                when: When::AppendUnchanged(seen.cas),
                seconds: 0,
            };
            let commands = vec![bump, get(&place.keys.record, Read::ValueAndMark)];
            let mut answers = self.ask(place, commands, Some(seen.life)).await?;
            let bumped = answers.stored()?;
            look = read(&mut answers)?;
            if bumped.is_some() && look.seen.as_ref().map(|seen| seen.cas) == bumped {
                // Marked by us or by somebody who only asked: the next holder will know either way.
                return Ok(look);
            }
        }
        Err(Failure::unavailable("somebody keeps changing the session without its lock"))
    }

    /// Takes the lock of a session, waiting for it if there is time, and reads the record.
    pub(crate) async fn take(
        self: &Arc<Self>,
        operation: &'static str,
        place: &Arc<Place>,
        want: Want,
        wait: Duration,
        claim: Claim,
    ) -> Result<Granted<Claim>> {
        let began = Instant::now();
        let mut attempt = Attempt { store: self, operation, place, want, wait, claim: &claim, began, armed: None };
        let granted = attempt.make().await;
        drop(attempt);
        Ok(match granted? {
            None => Granted::Absent,
            Some((found, clean)) => Granted::Locked { claim, found, clean },
        })
    }
}

/// Keeps the place of a record that is absent, so that whoever creates it is judged as if it were there.
fn set_stub(place: &Place, claim: &Claim) -> Command {
    let (key, seconds) = (place.keys.record.clone(), trace_seconds(claim.lease));
    Command::Set { key, value: stub(), when: When::Absent, seconds }
}

fn read(answers: &mut Answers) -> Result<Look, Failure> {
    let item = answers.item()?;
    Look::at(item, answers.life)
}

/// A request for a lock under way. Dropped before its end, or failed, it is withdrawn in the background, by its token.
struct Attempt<'a> {
    store: &'a Arc<Store>,
    operation: &'static str,
    place: &'a Arc<Place>,
    want: Want,
    wait: Duration,
    claim: &'a Claim,
    began: Instant,
    /// The token of a lock that may have been taken.
    armed: Option<LeaseToken>,
}

impl Attempt<'_> {
    fn rest(&self) -> Duration {
        self.wait.saturating_sub(self.began.elapsed())
    }

    async fn make(&mut self) -> Result<Option<(Found, bool)>> {
        let (store, key) = (self.store, &self.place.keys.lock);
        let beside = Beside { read: self.want != Want::Lock, stub: self.want == Want::Any, owner: self.wait.is_zero() };
        if !self.wait.is_zero() {
            if let Some(pause) = store.crowds.pause(key) {
                tokio::time::sleep(pause.min(self.rest())).await;
            }
            if store.turns.is_taken(key) {
                if self.want == Want::Existing && !self.is_there().await? {
                    return Ok(None);
                }
                return Box::pin(self.stand_in_line()).await;
            }
        }
        self.armed = Some(self.claim.token);
        let entered = match store.enter(self.place, self.claim, beside).await {
            Err(Failure { passing: true, .. }) => {
                let again = store.enter(self.place, self.claim, Beside { owner: true, ..beside }).await;
                again.map_err(|failure| failure.after_sending(false))
            }
            entered => entered,
        };
        let entered = entered.map_err(|failure| self.unanswered(failure))?;
        if entered.lock.is_some() {
            return self.granted(entered).await;
        }
        self.armed = None;
        if self.want == Want::Existing && !entered.look.is_live() {
            return Ok(None);
        }
        if self.wait.is_zero() {
            return Err(self.timed_out(entered.owner.as_ref()));
        }
        // On the heap, so that whoever need not wait does not carry the room for it.
        Box::pin(self.stand_in_line()).await
    }

    async fn is_there(&self) -> Result<bool> {
        let look = self.store.read(self.place, Read::Value).await;
        look.map(|look| look.is_live()).map_err(|failure| failure.into_error(self.operation))
    }

    /// Waits behind those of this process who wait already, then asks again and again.
    async fn stand_in_line(&mut self) -> Result<Option<(Found, bool)>> {
        let (store, place) = (self.store, self.place);
        let (least, most) = (store.config.poll_min, store.config.poll_max);
        let turn = store.turns.wait(&place.keys.lock, self.rest()).await;
        let [a, b, c, d, e, f, g, h, ..] = self.claim.token.to_bytes();
        let mut pauses = Pauses::new(least, u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        let mut claimed: Option<Instant> = None;
        // The number of our claim to be the next, if it stands.
        let mut next: Option<u64> = None;
        let mut owner: Option<Item> = None;
        loop {
            let rest = self.rest();
            let last = rest < Duration::from_millis(1);
            let full = last || claimed.is_none_or(|claimed| claimed.elapsed() >= CLAIM);
            self.armed = Some(self.claim.token);
            let asked = self.question(full, next).await;
            let answers = asked.map_err(|failure| self.unanswered(failure))?;
            let Question { lock, life, owner: seen, next: stands } = answers;
            if full {
                (claimed, next, owner) = (Some(Instant::now()), stands, seen);
            }
            if let Some(lock) = lock {
                let entered = self.look_around(lock, life, next).await;
                let entered = entered.map_err(|failure| failure.into_error(self.operation))?;
                return self.granted(entered).await;
            }
            self.armed = None;
            if last {
                return Err(self.timed_out(owner.as_ref()));
            }
            // As a last resort the lock ends by itself, and not earlier than the server says.
            let ends = owner.as_ref().and_then(|owner| owner.seconds).map(|left| Duration::from_secs(left.max(1)));
            let most = if next.is_some() { most.min(store.turns.next_pause()) } else { most };
            turn.sleep(pauses.next(most).min(rest).min(ends.unwrap_or(rest))).await;
            if let Some(pause) = store.crowds.pause(&place.keys.lock).filter(|_| next.is_none()) {
                tokio::time::sleep(pause.min(self.rest())).await;
            }
        }
    }

    /// Asks for the lock; now and then also who has it, and to be the next.
    async fn question(&self, full: bool, next: Option<u64>) -> Result<Question, Failure> {
        let (store, keys) = (self.store, &self.place.keys);
        let ask = async |full: bool| {
            let mut commands = vec![store.set_lock(self.place, self.claim, When::Absent)];
            if full {
                commands.push(get(&keys.lock, Read::Value));
                commands.push(Command::Set {
                    key: keys.next.clone(),
                    value: store.process.clone().into_bytes(),
                    when: next.map_or(When::Absent, When::Unchanged),
                    seconds: CLAIM_SECONDS,
                });
                commands.push(get(&keys.next, Read::Value));
            }
            let mut answers = store.ask(self.place, commands, None).await?;
            let mut lock = answers.stored()?;
            let (mut owner, mut stands) = (None, None);
            if full {
                owner = answers.item()?;
                answers.next()?;
                stands = answers.item()?.filter(|next| next.value == store.process.as_bytes()).map(|next| next.cas);
            }
            if let Some(owner) = owner.as_ref().filter(|owner| is_lock_of(&owner.value, self.claim.token)) {
                lock = Some(owner.cas);
            }
            Ok(Question { lock, life: answers.life, owner, next: stands })
        };
        match ask(full).await {
            // The lock may be ours by now, which only the whole question tells.
            Err(Failure { passing: true, .. }) => ask(true).await.map_err(|failure| failure.after_sending(false)),
            answers => answers,
        }
    }

    /// Does under a lock that was waited for what the first flight does with it.
    async fn look_around(&self, lock: u64, life: Life, next: Option<u64>) -> Result<Entered, Failure> {
        let mut commands = Vec::with_capacity(3);
        let reads = self.want != Want::Lock;
        if self.want == Want::Any {
            commands.push(set_stub(self.place, self.claim));
        }
        if reads {
            commands.push(get(&self.place.keys.record, Read::ValueAndMark));
        }
        if let Some(next) = next {
            commands.push(delete(&self.place.keys.next, next));
        }
        let mut look = Look::default();
        if !commands.is_empty() {
            let mut answers = self.store.ask(self.place, commands, Some(life)).await?;
            if self.want == Want::Any {
                answers.next()?;
            }
            if reads {
                look = read(&mut answers)?;
            }
        }
        Ok(Entered { lock: Some(lock), anew: true, owner: None, look, life })
    }

    /// Ends with the lock, unless a record is expected and there is none.
    async fn granted(&mut self, entered: Entered) -> Result<Option<(Found, bool)>> {
        let Entered { lock, look, life, .. } = entered;
        let Some(cas) = lock else { return Ok(None) };
        let (store, place) = (self.store, self.place);
        if self.want == Want::Existing && !look.is_live() {
            return self.withdraw(cas, life).await;
        }
        let clean = self.want != Want::Lock && !look.marked;
        let look = store.void(place, look).await.map_err(|failure| failure.into_error(self.operation))?;
        if self.want == Want::Existing && !look.is_live() {
            return self.withdraw(cas, life).await;
        }
        let mut state = place.state.lock().await;
        let value = place.keys.lock_value(self.claim.token, &store.process);
        state.lock = Lock::Ours { cas, life, value };
        let found = if look.is_live() && look.ttl().as_duration() < self.claim.lease.saturating_mul(2) {
            // It would end before the hold does.
            match store.prolong(place, &mut state, look, self.claim.lease).await {
                Ok(look) => look,
                Err(failure) => return Err(failure.into_error(self.operation)),
            }
        } else {
            look
        };
        let answer = found.found();
        state.seen = found.seen;
        if self.want == Want::Existing && !matches!(answer, Found::Live { .. }) {
            // It ended between two flights.
            state.seen = None;
            state.lock = Lock::Gone;
            drop(state);
            return self.withdraw(cas, life).await;
        }
        self.armed = None;
        Ok(Some((answer, clean)))
    }

    /// Gives back a lock that is nothing's.
    async fn withdraw(&mut self, cas: u64, life: Life) -> Result<Option<(Found, bool)>> {
        let commands = vec![delete(&self.place.keys.lock, cas)];
        match self.store.ask(self.place, commands, Some(life)).await {
            Ok(_) => self.armed = None,
            // That there is no record is known; the lock is given back behind the caller's back.
            Err(failure) => drop(failure),
        }
        Ok(None)
    }

    /// Takes a question that was not answered as one that may have got the lock, if it was sent.
    fn unanswered(&mut self, failure: Failure) -> Error {
        if !failure.sent {
            self.armed = None;
        }
        failure.into_error(self.operation)
    }

    fn timed_out(&self, owner: Option<&Item>) -> Error {
        lock_timeout(self.operation, self.wait, owner.map(|owner| &*owner.value))
    }
}

/// The answers to a waiter.
struct Question {
    lock: Option<u64>,
    life: Life,
    owner: Option<Item>,
    next: Option<u64>,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if let Some(token) = self.armed {
            self.store.give_up_later(self.place.keys.lock.clone(), self.place.server, token);
        }
    }
}
