//! Renewing locks and giving them back.
//!
//! A renewal stores the lock anew under its number, so it prolongs nobody else's. What is done under a lock is not known here.

use std::sync::Arc;
use std::time::Duration;

use session_core::leased::{Failed, Renewal, Renewed};
use session_core::{ErrorKind, LeaseToken};
use tokio::runtime::Handle;
use tokio::sync::MutexGuard;

use crate::item::{Body, is_lock_of, lease_seconds, left};
use crate::store::{Lock, Look, Place, State, Store, delete, get};
use crate::transport::{Command, Failure, Life, Read, When};

/// When a lock that nobody wants is given back to a server that did not take it back before.
const PAUSES: [Duration; 3] = [Duration::from_millis(50), Duration::from_millis(250), Duration::from_secs(1)];

/// How many leases are renewed in one flight, so that the answers fit on the way.
const FLIGHT: usize = 128;

/// Leases by their place in the list, each with what its opening knows.
type Members<'a> = Vec<(usize, MutexGuard<'a, State>)>;

impl Store {
    /// Renews leases, in one flight for many of a server.
    pub(crate) async fn prolong_leases(&self, leases: &[Renewal<Place>]) -> Vec<Result<Renewed, Failed>> {
        let mut outcomes: Vec<Option<Result<Renewed, Failed>>> = leases.iter().map(|_| None).collect();
        let mut flights: Vec<(usize, Life, Members<'_>)> = Vec::new();
        for (n, lease) in leases.iter().enumerate() {
            // Whose save is under way waits for it, and not all the others with it.
            let Ok(state) = lease.place.state.try_lock() else { continue };
            let (server, life) = match &state.lock {
                Lock::Ours { life, .. } => (lease.place.server, *life),
                // Whether it is ours is asked for by whoever needs it next.
                Lock::Unknown => continue,
                Lock::Gone => {
                    outcomes[n] = Some(Ok(Renewed::Ended));
                    continue;
                }
            };
            let fits =
                |flight: &&mut (usize, Life, Members<'_>)| (flight.0, flight.1) == (server, life) && flight.2.len() < FLIGHT;
            match flights.iter_mut().rev().find(fits) {
                Some(flight) => flight.2.push((n, state)),
                None => flights.push((server, life, vec![(n, state)])),
            }
        }
        for (server, life, members) in flights {
            self.fly(server, life, members, leases, &mut outcomes).await;
        }
        for (n, lease) in leases.iter().enumerate().filter(|(n, _)| outcomes[*n].is_none()).collect::<Vec<_>>() {
            let state = lease.place.state.lock().await;
            match &state.lock {
                Lock::Ours { life, .. } => {
                    let (server, life) = (lease.place.server, *life);
                    self.fly(server, life, vec![(n, state)], leases, &mut outcomes).await;
                }
                _ => outcomes[n] = Some(self.find(lease, state).await),
            }
        }
        outcomes.into_iter().map(|outcome| outcome.unwrap_or(Ok(Renewed::Ended))).collect()
    }

    /// Renews leases of one server in one flight.
    async fn fly(
        &self,
        server: usize,
        life: Life,
        members: Members<'_>,
        leases: &[Renewal<Place>],
        outcomes: &mut [Option<Result<Renewed, Failed>>],
    ) {
        let mut commands = Vec::with_capacity(2 * members.len());
        for (n, state) in &members {
            let lease = &leases[*n];
            if let Lock::Ours { cas, value, .. } = &state.lock {
                let (key, when) = (lease.place.keys.lock.clone(), When::Unchanged(*cas));
                let seconds = lease_seconds(lease.length);
                commands.push(Command::Set { key, value: value.clone(), when, seconds });
                commands.push(get(&lease.place.keys.record, Read::Size));
            }
        }
        let asked = self.transport.exchange(server, commands, Some(life)).await;
        let mut answers = match asked {
            Ok(answers) => answers,
            Err(failure) => {
                for (n, mut state) in members {
                    outcomes[n] = Some(if failure.restarted {
                        state.lock = Lock::Gone;
                        Ok(if leases[n].protects { Renewed::Gone } else { Renewed::Ended })
                    } else {
                        if failure.sent {
                            // It has the old number or a new one.
                            state.lock = Lock::Unknown;
                        }
                        Err(failure.again().into_failed("renew"))
                    });
                }
                return;
            }
        };
        for (n, mut state) in members {
            let lease = &leases[n];
            let answer = (|| Ok((answers.stored()?, answers.item()?)))();
            let (lock, record) = match answer {
                Ok(answer) => answer,
                Err(failure) => {
                    let failure: Failure = failure;
                    outcomes[n] = Some(Err(failure.into_failed("renew")));
                    continue;
                }
            };
            let Some(new) = lock else {
                state.lock = Lock::Gone;
                outcomes[n] = Some(Ok(Renewed::Ended));
                continue;
            };
            if let Lock::Ours { cas, .. } = &mut state.lock {
                *cas = new;
            }
            outcomes[n] = Some(match record {
                None if lease.protects => Ok(Renewed::Gone),
                None => Ok(Renewed::Renewed),
                Some(record) => {
                    let short = record.seconds.is_some_and(|secs| left(secs).as_duration() < lease.length.saturating_mul(2));
                    let ours = state.seen.as_ref().is_some_and(|seen| seen.cas == record.cas);
                    if short && ours { self.keep_record(lease, &mut state).await } else { Ok(Renewed::Renewed) }
                }
            });
        }
    }

    /// Moves the deadline of a record ahead, or that of the place that is kept for one.
    async fn keep_record(&self, lease: &Renewal<Place>, state: &mut State) -> Result<Renewed, Failed> {
        let place = &lease.place;
        let Some(seen) = state.seen.take() else { return Ok(Renewed::Renewed) };
        if !matches!(seen.body, Body::Live { .. }) {
            state.seen = Some(seen);
            return Ok(Renewed::Renewed);
        }
        let (cas, life, body) = (seen.cas, seen.life, seen.body.clone());
        let look = Look { seen: Some(seen), left: None, marked: false };
        match self.prolong(place, state, look, lease.length).await {
            Ok(look) => {
                let live = look.is_live();
                state.seen = look.seen;
                Ok(if live { Renewed::Renewed } else { Renewed::Gone })
            }
            Err(failure) => {
                state.seen = Some(crate::store::Seen { cas, life, body });
                Err(failure.into_failed("renew"))
            }
        }
    }

    /// Renews a lease whose number is not known, if the lock is ours by its token.
    async fn find(&self, lease: &Renewal<Place>, mut state: MutexGuard<'_, State>) -> Result<Renewed, Failed> {
        let place = &lease.place;
        let found: Result<bool, Failure> = async {
            let mut answers = self.ask(place, vec![get(&place.keys.lock, Read::Value)], None).await?;
            let life = answers.life;
            let owner = answers.item()?.filter(|owner| is_lock_of(&owner.value, lease.token));
            let Some(owner) = owner else { return Ok(false) };
            let set = Command::Set {
                key: place.keys.lock.clone(),
                value: owner.value.clone(),
                when: When::Unchanged(owner.cas),
                seconds: lease_seconds(lease.length),
            };
            let stored = self.ask(place, vec![set], Some(life)).await?.stored()?;
            let Some(cas) = stored else { return Ok(false) };
            state.lock = Lock::Ours { cas, life, value: owner.value };
            Ok(true)
        }
        .await;
        match found {
            Ok(true) => Ok(Renewed::Renewed),
            Ok(false) => {
                state.lock = Lock::Gone;
                Ok(Renewed::Ended)
            }
            Err(failure) => Err(failure.into_failed("renew")),
        }
    }

    /// Gives a lock back, and takes the mark from the record if nothing more of its holder can come.
    pub(crate) async fn let_go(&self, place: &Place, token: LeaseToken, clean: bool) -> Result<(), Failure> {
        let mut state = place.state.lock().await;
        let seen = state.seen.take();
        let clean = clean && !state.unsettled;
        let (cas, life) = match std::mem::replace(&mut state.lock, Lock::Gone) {
            Lock::Ours { cas, life, .. } => (cas, life),
            Lock::Unknown => return self.give_up(&place.keys.lock, place.server, token).await.map(drop),
            Lock::Gone => return Ok(()),
        };
        let keys = &place.keys;
        let commands = || {
            let mut commands = Vec::with_capacity(3);
            if let Some(seen) = seen.as_ref().filter(|seen| clean && seen.life == life) {
                commands.push(match seen.body {
                    Body::Stub => delete(&keys.record, seen.cas),
                    _ => {
                        let (key, when) = (keys.record.clone(), When::AppendUnchanged(seen.cas));
                        Command::Set { key, value: Vec::new(), when, seconds: 0 }
                    }
                });
            }
            commands.push(delete(&keys.lock, cas));
            commands.push(get(&keys.next, Read::Value));
            commands
        };
        let asked = match self.ask(place, commands(), Some(life)).await {
            Err(failure) if failure.passing => self.ask(place, commands(), Some(life)).await,
            asked => asked,
        };
        match asked {
            Ok(mut answers) => {
                for _ in 1..commands().len() {
                    answers.next()?;
                }
                self.note_next(place, answers.item()?.as_ref());
                Ok(())
            }
            // With the server the lock has gone.
            Err(failure) if failure.restarted => Ok(()),
            Err(failure) => {
                (state.lock, state.unsettled) = (Lock::Unknown, true);
                Err(failure)
            }
        }
    }

    /// Gives back a lock of which only the token is known; says whether it was there.
    pub(crate) async fn give_up(&self, lock: &Arc<str>, server: usize, token: LeaseToken) -> Result<bool, Failure> {
        let mut answers = self.transport.exchange(server, vec![get(lock, Read::Value)], None).await?;
        let life = answers.life;
        match answers.item()?.filter(|owner| is_lock_of(&owner.value, token)) {
            Some(owner) => {
                self.transport.exchange(server, vec![delete(lock, owner.cas)], Some(life)).await?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Gives back what an open may have taken that nobody waits for any more; from outside a runtime not at all.
    pub(crate) fn give_up_later(self: &Arc<Self>, lock: Arc<str>, server: usize, token: LeaseToken) {
        let Ok(runtime) = Handle::try_current() else { return };
        let store = self.clone();
        runtime.spawn(async move {
            // Once is not enough: what was sent before may arrive later, on another connection.
            for pause in PAUSES {
                if let Ok(true) = store.give_up(&lock, server, token).await {
                    return;
                }
                tokio::time::sleep(pause).await;
            }
            let _ = store.give_up(&lock, server, token).await;
        });
    }

    /// The same for a lock whose opening was dropped.
    pub(crate) fn let_go_later(self: &Arc<Self>, place: Arc<Place>, token: LeaseToken, clean: bool) {
        let Ok(runtime) = Handle::try_current() else { return };
        let store = self.clone();
        runtime.spawn(async move {
            let mut pauses = PAUSES.iter();
            while let Err(failure) = store.let_go(&place, token, clean).await {
                match pauses.next() {
                    Some(pause) if failure.kind == ErrorKind::Unavailable => tokio::time::sleep(*pause).await,
                    _ => {
                        tracing::debug!(kind = %failure.kind, "a lock could not be given back and ends with its lease");
                        return;
                    }
                }
            }
        });
    }
}
