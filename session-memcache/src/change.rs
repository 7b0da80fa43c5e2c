//! How a change is judged and applied: the fence is the number of the record's item.
//!
//! Whoever has the lock knows that number, so a save is one flight, and the server compares and stores in one step. If the number
//! has changed, or if it is not known, the record is read again and judged by the name of its last write. Without a lock the name
//! is all that is known, so an optimistic change takes the lock for its length.

use std::time::Duration;

use session_core::ErrorKind;
use session_core::leased::{Action, Asked, Basis, Step, Then, Verdict};

use crate::acquire::Beside;
use crate::item::{Body, lease_seconds, seconds};
use crate::store::{Claim, Lock, Look, Place, Seen, State, Store, delete, get};
use crate::transport::{Answers, Command, Failure, Life, Read, When};

/// How long the lock of an optimistic change lasts if whoever makes it dies on the way.
const WRITE_LEASE: Duration = Duration::from_secs(10);

/// How often a change is sent that finds the record as it expects it, and the number changed.
const TRIES: u32 = 4;

impl Store {
    pub(crate) async fn judge(&self, place: &Place, step: &Step<'_, Claim>) -> Asked<Verdict> {
        let mut state = place.state.lock().await;
        let mut job = Job { store: self, place, step, state: &mut state, repeated: false };
        let answer = match (step.basis, step.action) {
            (Basis::Unseen | Basis::Absent { .. }, Action::Touch { .. }) => Ok(Verdict::Gone),
            (Basis::Unseen, _) => job.create().await,
            _ if step.lease.is_some() => job.exclusive().await,
            _ => job.optimistic().await,
        };
        if matches!(answer, Ok(Verdict::Gone)) {
            job.unlock().await;
        }
        let repeated = job.repeated;
        Asked { answer: answer.map_err(|failure| failure.into_failed(step.operation())), repeated }
    }

    /// Stores a record anew as it is, to live for two leases, under the lock that `state` has.
    pub(crate) async fn prolong(
        &self,
        place: &Place,
        state: &mut State,
        look: Look,
        lease: Duration,
    ) -> Result<Look, Failure> {
        let Some(Seen { cas, life, body: Body::Live { last, data, alias } }) = look.seen else { return Ok(look) };
        let secs = lease_seconds(lease.saturating_mul(2));
        let value = place.keys.live(last, &data);
        let key = place.keys.record.clone();
        let set = Command::Set { key, value, when: When::Unchanged(cas), seconds: secs };
        let before = std::mem::replace(&mut state.unsettled, true);
        let mut answers = self.ask(place, vec![set, get(&place.keys.record, Read::Mark)], Some(life)).await?;
        state.unsettled = before;
        match answers.stored()? {
            Some(cas) => {
                let seen = Seen { cas, life, body: Body::Live { last, data, alias } };
                Ok(Look { seen: Some(seen), left: Some(secs), marked: false })
            }
            // Destroyed, expired or taken over: what is there now is what counts.
            None => self.void(place, self.read(place, Read::ValueAndMark).await?).await,
        }
    }
}

/// A change under way.
struct Job<'a> {
    store: &'a Store,
    place: &'a Place,
    step: &'a Step<'a, Claim>,
    state: &'a mut State,
    /// Whether something was sent that was not answered.
    repeated: bool,
}

/// What an attempt came to.
enum Tried {
    Stored,
    /// The number was another.
    Changed,
}

impl Job<'_> {
    /// Changes a record under a lock that is, or was, ours.
    async fn exclusive(&mut self) -> Result<Verdict, Failure> {
        // A write under the name of the one before is a repeat of that.
        let repeats =
            matches!((self.step.basis, self.step.action), (Basis::Written(prev), Action::Write { id, .. }) if id == prev);
        let mut sure = !repeats && !self.state.unsettled && !self.store.config.strict_expiry && self.knows();
        for attempt in 1..=TRIES {
            if !sure && let Some(verdict) = self.look_again().await? {
                return Ok(verdict);
            }
            let before = std::mem::replace(&mut self.state.unsettled, true);
            match self.put().await {
                Ok(Tried::Stored) => {
                    self.state.unsettled = false;
                    return Ok(Verdict::Applied);
                }
                Ok(Tried::Changed) => self.state.unsettled = before,
                Err(failure) if failure.restarted => {
                    self.state.unsettled = before;
                    return Ok(Verdict::Gone);
                }
                Err(failure) => {
                    self.state.unsettled = before || failure.sent;
                    self.repeated |= failure.sent && failure.passing && attempt < TRIES;
                    if !failure.passing || attempt == TRIES {
                        return Err(failure);
                    }
                }
            }
            sure = false;
        }
        Err(Failure::unavailable("somebody keeps changing the session without its lock"))
    }

    /// Whether what was seen last under the lock is what the change is based on.
    fn knows(&self) -> bool {
        self.state.seen.as_ref().is_some_and(|seen| self.fits(Some(&seen.body)))
    }

    /// Whether this is what the change is based on.
    fn fits(&self, body: Option<&Body>) -> bool {
        match (self.step.basis, body) {
            (Basis::Written(prev), Some(Body::Live { last, .. })) => *last == prev,
            (Basis::Absent { .. }, None | Some(Body::Stub)) => true,
            (Basis::Absent { mark }, Some(Body::Buried(grave))) => mark == Some(grave.mark),
            _ => false,
        }
    }

    /// What is said of a record that is not the one the change is based on.
    fn mismatch(&self, look: &Look) -> Verdict {
        match (self.step.basis, look.body()) {
            (_, Some(Body::Live { .. })) => Verdict::Refused,
            (Basis::Written(_), _) => Verdict::Gone,
            (Basis::Absent { .. }, Some(Body::Buried(_))) if !self.fits(look.body()) && self.step.lease.is_some() => {
                Verdict::Gone
            }
            _ => Verdict::Refused,
        }
    }

    fn is_applied(&self, look: &Look) -> bool {
        matches!(self.step.action, Action::Write { id, .. } if look.is_by(id))
    }

    /// Stores the change over what was seen, and gives the lock back or marks the record again.
    async fn put(&mut self) -> Result<Tried, Failure> {
        let keys = &self.place.keys;
        let seen = self.state.seen.as_ref();
        let (value, secs) = self.value(seen.map(|seen| &seen.body))?;
        let when = seen.map_or(When::Absent, |seen| When::Unchanged(seen.cas));
        let mut life = seen.map(|seen| seen.life);
        let mut commands = vec![Command::Set { key: keys.record.clone(), value, when, seconds: secs }];
        let closes = self.step.then == Then::Close;
        let mut unlocks = false;
        if closes {
            if let Lock::Ours { cas, life: of, .. } = &self.state.lock {
                commands.push(delete(&keys.lock, *cas));
                (life, unlocks) = (life.or(Some(*of)), true);
            }
            commands.push(get(&keys.next, Read::Value));
        } else {
            commands.push(get(&keys.record, Read::Mark));
        }
        let mut answers = self.store.ask(self.place, commands, life).await?;
        let stored = answers.stored()?;
        if unlocks {
            answers.next()?;
            self.state.lock = Lock::Gone;
        }
        if closes {
            let next = answers.item()?;
            self.store.note_next(self.place, next.as_ref());
        }
        let Some(cas) = stored else { return Ok(Tried::Changed) };
        self.stored(cas, answers.life);
        if closes && matches!(self.state.lock, Lock::Unknown) {
            self.unlock().await;
        }
        Ok(Tried::Stored)
    }

    /// Keeps in mind what is there now, if the opening goes on.
    fn stored(&mut self, cas: u64, life: Life) {
        let seen = self.state.seen.take();
        if self.step.then == Then::Close {
            return;
        }
        let body = match self.step.action {
            Action::Write { id, data, .. } => {
                Some(Body::Live { last: id, data: data.to_vec(), alias: self.place.keys.alias.clone() })
            }
            Action::Touch { .. } => seen.map(|seen| seen.body),
        };
        self.state.seen = body.map(|body| Seen { cas, life, body });
    }

    fn value(&self, body: Option<&Body>) -> Result<(Vec<u8>, u64), Failure> {
        match (self.step.action, body) {
            (Action::Write { id, data, ttl }, _) => Ok((self.place.keys.live(id, data), seconds(ttl))),
            (Action::Touch { ttl }, Some(Body::Live { last, data, .. })) => {
                Ok((self.place.keys.live(*last, data), seconds(ttl)))
            }
            _ => Err(Failure::new(ErrorKind::Unexpected, "there is no record to touch")),
        }
    }

    /// Reads the record again, and whether the lock is still ours; returns the verdict unless the change may be sent.
    async fn look_again(&mut self) -> Result<Option<Verdict>, Failure> {
        let (store, place, strict) = (self.store, self.place, self.store.config.strict_expiry);
        let Some(claim) = self.step.claim else {
            let look = store.read(place, Read::Value).await?;
            return Ok(Some(if self.is_applied(&look) { Verdict::AlreadyApplied } else { self.mismatch(&look) }));
        };
        // Whether the lock is ours, and whether only since now.
        let (mut ours, mut anew) = (false, false);
        let look = if let Lock::Ours { cas, life, .. } = self.state.lock {
            let renewal = store.set_lock(place, claim, When::Unchanged(cas));
            let asked = store.ask(place, vec![renewal, get(&place.keys.record, Read::ValueAndMark)], Some(life)).await;
            if asked.as_ref().is_err_and(|failure| failure.restarted) {
                return Ok(Some(Verdict::Gone));
            }
            // Without an answer it has the old number or a new one.
            self.state.lock = Lock::Unknown;
            let mut answers = asked.map_err(|failure| self.after(failure))?;
            self.state.lock = Lock::Gone;
            if let Some(cas) = answers.stored()? {
                ours = true;
                self.state.lock = self.lock(claim, cas, life);
            }
            let item = answers.item()?;
            Look::at(item, life)?
        } else {
            let beside = Beside { read: true, stub: false, owner: true };
            let entered = store.enter(place, claim, beside).await.map_err(|failure| self.after(failure))?;
            if let Some(cas) = entered.lock {
                (ours, anew) = (true, entered.anew);
                self.state.lock = self.lock(claim, cas, entered.life);
            }
            entered.look
        };
        if self.is_applied(&look) {
            if self.step.then == Then::Close {
                self.unlock().await;
                self.state.seen = None;
            } else {
                self.state.seen = look.seen;
            }
            self.state.unsettled = false;
            return Ok(Some(Verdict::AlreadyApplied));
        }
        let same = match (&self.state.seen, &look.seen) {
            (Some(before), Some(now)) => before.cas == now.cas && before.life == now.life,
            _ => false,
        };
        // What was absent may be created only under a lock that was ours all the time, or over the very place that was kept for it.
        let whole = ours && !anew;
        if same && self.knows() && (whole || !strict) {
            return Ok(None);
        }
        if !self.fits(look.body()) || (!whole && (strict || matches!(self.step.basis, Basis::Absent { .. }))) {
            return Ok(Some(self.mismatch(&look)));
        }
        if !ours && matches!(self.state.lock, Lock::Gone) {
            // It has ended. If nobody has it, it may be taken again, and the record is still the one that is known.
            self.state.lock = Lock::Unknown;
            return Box::pin(self.look_again()).await;
        }
        if !ours {
            return Ok(Some(Verdict::Refused));
        }
        // While the lock was not ours, somebody else may have marked the record.
        let look = if anew { store.void(place, look).await.map_err(|failure| self.after(failure))? } else { look };
        if !self.fits(look.body()) {
            return Ok(Some(self.mismatch(&look)));
        }
        self.state.seen = look.seen;
        Ok(None)
    }

    fn lock(&self, claim: &Claim, cas: u64, life: Life) -> Lock {
        Lock::Ours { cas, life, value: self.place.keys.lock_value(claim.token, &self.store.process) }
    }

    /// Looking again failed, which says nothing of the change.
    fn after(&self, failure: Failure) -> Failure {
        failure.with_sent(self.repeated)
    }

    /// Gives back the lock that may be ours; at worst it ends with its lease.
    async fn unlock(&mut self) {
        let lock = std::mem::replace(&mut self.state.lock, Lock::Gone);
        match (lock, self.step.claim) {
            (Lock::Ours { cas, life, .. }, _) => {
                let _ = self.store.ask(self.place, vec![delete(&self.place.keys.lock, cas)], Some(life)).await;
            }
            (Lock::Unknown, Some(claim)) => {
                let _ = self.store.give_up(&self.place.keys.lock, self.place.server, claim.token).await;
            }
            _ => {}
        }
    }

    /// Stores a record where there is none; the first write of a fresh id that stays open takes the lock before.
    async fn create(&mut self) -> Result<Verdict, Failure> {
        let Action::Write { data, id, ttl } = self.step.action else { return Ok(Verdict::Gone) };
        let (store, place, keys) = (self.store, self.place, &self.place.keys);
        let takes = self.step.takes();
        let mut again = false;
        loop {
            if let Some(claim) = self.step.claim.filter(|_| takes) {
                let beside = Beside { read: false, stub: false, owner: true };
                let entered = store.enter(place, claim, beside).await.map_err(|failure| self.after(failure))?;
                let Some(cas) = entered.lock else { return Ok(Verdict::Refused) };
                self.state.lock = self.lock(claim, cas, entered.life);
            }
            let value = keys.live(id, data);
            let set = Command::Set { key: keys.record.clone(), value, when: When::Absent, seconds: seconds(ttl) };
            let mut commands = vec![set];
            if takes {
                commands.push(get(&keys.record, Read::Mark));
            }
            let life = match &self.state.lock {
                Lock::Ours { life, .. } => Some(*life),
                _ => None,
            };
            let created: Result<(Answers, Option<u64>), Failure> = async {
                let mut answers = store.ask(place, commands, life).await?;
                let stored = answers.stored()?;
                Ok((answers, stored))
            }
            .await;
            let verdict = match created {
                Ok((answers, Some(cas))) => {
                    self.stored(cas, answers.life);
                    Verdict::Applied
                }
                Ok((_, None)) => {
                    let what = if takes { Read::ValueAndMark } else { Read::Value };
                    let look = store.read(place, what).await.map_err(|failure| failure.with_sent(true))?;
                    if !self.is_applied(&look) {
                        self.unlock().await;
                        return Ok(Verdict::Refused);
                    }
                    if self.step.then == Then::Keep {
                        self.state.seen = look.seen;
                    }
                    Verdict::AlreadyApplied
                }
                Err(failure) if failure.passing && !again => {
                    (self.repeated, again) = (true, true);
                    continue;
                }
                Err(failure) => return Err(failure),
            };
            if self.step.then == Then::Close && self.step.claim.is_some() {
                self.unlock().await;
            }
            return Ok(verdict);
        }
    }

    /// Takes the lock for the length of the change.
    async fn optimistic(&mut self) -> Result<Verdict, Failure> {
        let (store, place, keys) = (self.store, self.place, &self.place.keys);
        let claim = Store::new_claim(WRITE_LEASE)
            .map_err(|error| Failure::new(error.kind(), "the operating system gave no randomness"))?;
        // Given back in the background, unless it is given back before.
        let mut guard = Guard { store, place, token: Some(claim.token) };
        let beside = Beside { read: true, stub: false, owner: false };
        let entered = match store.enter(place, &claim, beside).await {
            Err(Failure { passing: true, .. }) => store.enter(place, &claim, Beside { owner: true, ..beside }).await,
            entered => entered,
        };
        let entered = entered.map_err(|failure| failure.with_sent(false))?;
        let look = entered.look;
        let Some(lock) = entered.lock else {
            guard.token = None;
            let held = if look.is_live() { Verdict::Refused } else { self.mismatch(&look) };
            return Ok(if self.is_applied(&look) { Verdict::AlreadyApplied } else { held });
        };
        if self.is_applied(&look) || !self.fits(look.body()) {
            if store.ask(place, vec![delete(&keys.lock, lock)], Some(entered.life)).await.is_ok() {
                guard.token = None;
            }
            return Ok(if self.is_applied(&look) { Verdict::AlreadyApplied } else { self.mismatch(&look) });
        }
        let (value, secs) = self.value(look.body())?;
        let when = look.seen.as_ref().map_or(When::Absent, |seen| When::Unchanged(seen.cas));
        let set = Command::Set { key: keys.record.clone(), value, when, seconds: secs };
        let commands = vec![set, delete(&keys.lock, lock), get(&keys.next, Read::Value)];
        let answered: Result<Option<u64>, Failure> = async {
            let mut answers = store.ask(place, commands, Some(entered.life)).await?;
            let stored = answers.stored()?;
            answers.next()?;
            store.note_next(place, answers.item()?.as_ref());
            Ok(stored)
        }
        .await;
        match answered {
            Ok(stored) => {
                guard.token = None;
                if stored.is_some() {
                    return Ok(Verdict::Applied);
                }
            }
            Err(failure) if failure.restarted => return Ok(Verdict::Gone),
            Err(failure) if !failure.passing => return Err(failure),
            Err(_) => self.repeated = true,
        }
        let look = store.read(place, Read::Value).await.map_err(|failure| failure.with_sent(true))?;
        if self.is_applied(&look) {
            return Ok(Verdict::AlreadyApplied);
        }
        Ok(if self.fits(look.body()) { Verdict::Refused } else { self.mismatch(&look) })
    }
}

/// A lock that is given back in the background when this is dropped.
struct Guard<'a> {
    store: &'a Store,
    place: &'a Place,
    token: Option<session_core::LeaseToken>,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let (Some(token), Some(store)) = (self.token, self.store.this.upgrade()) {
            store.give_up_later(self.place.keys.lock.clone(), self.place.server, token);
        }
    }
}
