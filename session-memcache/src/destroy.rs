//! Destroying: one flight, whoever holds the lock, and exactly one of several is told what was removed.
//!
//! A destruction puts its name behind what is there. From that instant the item is a trace: its number has changed, so no write
//! that was based on the record applies, and it is absent to everybody. What the first one removed is read in the same flight.
//! Sweeping takes the payload out of traces some seconds later, many in one flight, and makes them last as long as a trace does.

use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use session_core::leased::{Asked, Removal, Then};
use session_core::{Record, WriteId};
use tokio::runtime::Handle;

use crate::item::{Body, buried, trace_seconds};
use crate::store::{Claim, Lock, Look, Place, Seen, Store, delete, get};
use crate::transport::{Command, Failure, Life, Read, When};

/// How long after a destruction its trace is swept, with all others of that time.
const SWEEP: Duration = Duration::from_secs(5);

/// How much longer than a trace has to last a record must have lived for its trace to wait that long.
const EARLY: u64 = 10;

/// How many traces are swept in one flight, so that the answers fit on the way.
const FLIGHT: usize = 128;

/// How often a trace is swept, if others destroy the same session meanwhile.
const SWEEPS: u32 = 4;

/// How often a destruction is tried for which the server has no memory.
const TRIES: u32 = 8;

impl Store {
    pub(crate) async fn bury(&self, place: &Place, step: &Removal<'_, Claim>) -> Asked<Option<Record>> {
        let mut repeated = false;
        loop {
            match self.bury_once(place, step).await {
                Err(failure) if failure.passing && !repeated => repeated = true,
                answer => {
                    return Asked { answer: answer.map_err(|failure| failure.into_failed("destroy")), repeated };
                }
            }
        }
    }

    async fn bury_once(&self, place: &Place, step: &Removal<'_, Claim>) -> Result<Option<Record>, Failure> {
        let keys = &place.keys;
        let seconds = trace_seconds(step.lease);
        let mut state = place.state.lock().await;
        // Whatever was based on it is void from here on.
        state.seen = None;
        let closes = step.then == Then::Close;
        let lock = match &state.lock {
            Lock::Ours { cas, life, .. } if closes => Some((*cas, *life)),
            _ => None,
        };
        let set = |value, when| Command::Set { key: keys.record.clone(), value, when, seconds };
        let mut commands = vec![set(step.mark.to_bytes().to_vec(), When::Append)];
        if step.trace {
            commands.push(set(buried(step.mark), When::Absent));
        }
        commands.push(get(&keys.record, Read::Value));
        if let Some((cas, _)) = lock {
            commands.push(delete(&keys.lock, cas));
            commands.push(get(&keys.next, Read::Value));
        }
        let asked = self.ask(place, commands, lock.map(|(_, life)| life)).await;
        let mut answers = match asked {
            // The lock has gone with the server, and so has the record.
            Err(failure) if failure.restarted => {
                state.lock = Lock::Gone;
                return Ok(None);
            }
            answers => answers?,
        };
        let appended = answers.stored()?.is_some();
        if step.trace {
            answers.next()?;
        }
        let item = answers.item()?;
        let life = answers.life;
        if lock.is_some() {
            answers.next()?;
            state.lock = Lock::Gone;
            self.note_next(place, answers.item()?.as_ref());
        } else if closes && let (Lock::Unknown, Some(claim)) = (&state.lock, step.claim) {
            let _ = self.give_up(&keys.lock, place.server, claim.token).await;
            state.lock = Lock::Gone;
        }
        drop(state);
        let cas = item.as_ref().map(|item| item.cas);
        let look = match (Look::at(item, life), cas) {
            (Err(_), Some(cas)) => {
                // Whatever it was, it stands where the session was to be removed.
                let grave = Unswept::new(place, cas, life, step.mark, seconds);
                self.sweep(place.server, vec![grave]).await;
                return Ok(None);
            }
            (look, _) => look?,
        };
        let ttl = look.ttl();
        match look.seen {
            Some(Seen { cas, body: Body::Buried(grave), .. }) => {
                if !grave.clean {
                    let unswept = Unswept::new(place, cas, life, grave.mark, seconds);
                    // It must not end with the record.
                    if look.left.is_some_and(|left| left < seconds + EARLY) {
                        self.sweep(place.server, vec![unswept]).await;
                    } else {
                        self.sweep_later(unswept);
                    }
                }
                let ours = grave.removed.filter(|(first, _)| *first == step.mark);
                Ok(ours.map(|(_, data)| Record::new(data, ttl)))
            }
            // There was no memory for sixteen bytes more.
            Some(seen) if !appended => self.bury_in_place(place, seen, step.mark, seconds).await,
            _ => Ok(None),
        }
    }

    /// Destroys by storing the trace over what was read, until nobody comes between.
    async fn bury_in_place(
        &self,
        place: &Place,
        mut seen: Seen,
        mark: WriteId,
        seconds: u64,
    ) -> Result<Option<Record>, Failure> {
        for _ in 0..TRIES {
            let Seen { cas, life, body } = seen;
            let (key, value, when) = (place.keys.record.clone(), buried(mark), When::Unchanged(cas));
            let commands = vec![Command::Set { key, value, when, seconds }, get(&place.keys.record, Read::Value)];
            let mut answers = self.ask(place, commands, Some(life)).await.map_err(|failure| failure.after_sending(false))?;
            let stored = answers.stored()?.is_some();
            let look = Look::at(answers.item()?, answers.life)?;
            let removed = match body {
                Body::Live { data, .. } => Some(Record::new(data, look.ttl())),
                _ => None,
            };
            match look.seen {
                _ if stored => return Ok(removed),
                Some(next) if !matches!(next.body, Body::Buried(_)) => seen = next,
                _ => return Ok(None),
            }
        }
        Err(Failure::unavailable("it has no memory for the trace of a session; see its option -m"))
    }

    /// Takes the payload out of a trace, in the background; without a runtime it stays until the record would have ended.
    fn sweep_later(&self, grave: Unswept) {
        let (Ok(runtime), Some(store)) = (Handle::try_current(), self.this.upgrade()) else { return };
        let first = {
            let mut graves = self.graves.graves();
            graves.push(grave);
            graves.len() == 1
        };
        if first {
            runtime.spawn(async move {
                let waiting = Sweeping(Some(store.clone()));
                tokio::time::sleep(SWEEP).await;
                let mut graves = waiting.all();
                graves.sort_unstable_by_key(|grave| grave.server);
                while let Some(server) = graves.last().map(|grave| grave.server) {
                    let from =
                        graves.partition_point(|grave| grave.server < server).max(graves.len().saturating_sub(FLIGHT));
                    store.sweep(server, graves.split_off(from)).await;
                }
            });
        }
    }

    /// Takes the payload out of traces of one server. What cannot be swept stays until its record would have ended.
    async fn sweep(&self, server: usize, mut graves: Vec<Unswept>) {
        for _ in 0..SWEEPS {
            let mut again = Vec::new();
            // Numbers are of one life of the server each; those of an earlier one have gone with it.
            let Some(life) = graves.last().map(|grave| grave.life) else { return };
            graves.retain(|grave| grave.life == life);
            let commands: Vec<_> = graves
                .iter()
                .flat_map(|grave| {
                    let (key, when) = (grave.key.clone(), When::Unchanged(grave.cas));
                    let value = buried(grave.mark);
                    [Command::Set { key, value, when, seconds: grave.seconds }, get(&grave.key, Read::Value)]
                })
                .collect();
            let swept: Result<(), Failure> = async {
                let mut answers = self.transport.exchange(server, commands, Some(life)).await?;
                for mut grave in mem::take(&mut graves) {
                    let stored = answers.stored()?.is_some();
                    let look = Look::at(answers.item()?, life);
                    if let (false, Ok(Look { seen: Some(Seen { cas, body: Body::Buried(body), .. }), .. })) = (stored, look)
                        && !body.clean
                    {
                        // Somebody destroyed it once more.
                        (grave.cas, grave.mark) = (cas, body.mark);
                        again.push(grave);
                    }
                }
                Ok(())
            }
            .await;
            if let Err(failure) = swept {
                tracing::debug!(kind = %failure.kind, "destroyed records stay in the memory of their server for a while");
                return;
            }
            graves = again;
        }
    }
}

/// Traces that still have the payload of their record.
#[derive(Default)]
pub(crate) struct Graves(Mutex<Vec<Unswept>>);

/// A trace that still has the payload of its record.
struct Unswept {
    key: Arc<str>,
    server: usize,
    cas: u64,
    life: Life,
    mark: WriteId,
    seconds: u64,
}

impl Unswept {
    fn new(place: &Place, cas: u64, life: Life, mark: WriteId, seconds: u64) -> Self {
        Self { key: place.keys.record.clone(), server: place.server, cas, life, mark, seconds }
    }
}

impl Graves {
    fn graves(&self) -> MutexGuard<'_, Vec<Unswept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Graves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graves").field("unswept", &self.graves().len()).finish()
    }
}

/// Whoever waits to sweep. If he is cut short, with his runtime, the next destruction starts another.
struct Sweeping(Option<Arc<Store>>);

impl Sweeping {
    fn all(mut self) -> Vec<Unswept> {
        self.0.take().map(|store| mem::take(&mut *store.graves.graves())).unwrap_or_default()
    }
}

impl Drop for Sweeping {
    fn drop(&mut self) {
        if let Some(store) = &self.0 {
            store.graves.graves().clear();
        }
    }
}
