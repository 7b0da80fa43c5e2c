//! Saving a session: which write, in which order, and what an answer means. One future that no dropped request cuts in half.
//!
//! `rotate` and `elevate` follow rule 8 of the protocol: the new record is created first, locked; the fenced write that replaces
//! the old one by a forward or a mark is the commit point; if it is refused, the new record is destroyed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::envelope::{Data, Forward, Payload};
use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Access, Expect, OpenRequest};
use crate::id::SessionId;
use crate::janitor::Opening;
use crate::merge::{Redo, lay_over};
use crate::record::{Change, Record, WriteId, Written};
use crate::seal::{self, Purpose};
use crate::sessions::{Core, Found, Live, MAX_REDOS};
use crate::ttl::Ttl;

/// How often a generated id may turn out to be taken before something must be wrong with the randomness.
const MAX_COLLISIONS: usize = 3;

/// What a session is saved through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Not stored yet, under an id of ours.
    Fresh,
    /// Locked.
    Exclusive,
    /// Not locked, because locking is off: a race is a conflict.
    Optimistic,
    /// Not locked: a race is laid over.
    Merge,
    /// The id was retired by `elevate`: nothing is stored under it.
    Retired,
}

impl Mode {
    pub(crate) fn access(self, lease: Duration) -> Access {
        match self {
            Self::Exclusive | Self::Fresh => Access::Exclusive { wait: Duration::ZERO, lease },
            Self::Optimistic | Self::Merge | Self::Retired => Access::Optimistic,
        }
    }
}

/// A staged change of id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewId {
    Rotate,
    Elevate,
}

/// Whether a save gives the lock back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    Keep,
    Close,
}

/// A session as it is worked on: what was read, what it has become, and the opening to save it through.
pub(crate) struct Work {
    pub(crate) id: SessionId,
    pub(crate) mode: Mode,
    pub(crate) opening: Option<Opening>,
    pub(crate) base: Option<Data>,
    pub(crate) data: Data,
    pub(crate) left: Option<Ttl>,
    pub(crate) touch: bool,
    /// The handler has no optimistic writes: a short exclusive opening compares at the save.
    pub(crate) compare: bool,
    pub(crate) new_id: Option<NewId>,
    /// Keys whose every change since the base can be done again on a newer value; only for `merge`.
    pub(crate) redo: Vec<(String, Vec<Redo>)>,
    /// A write that was sent and not answered; it is repeated before anything else is written.
    unsettled: Option<(Change, WriteId)>,
}

impl Work {
    pub(crate) fn new(id: SessionId, mode: Mode, opening: Option<Opening>, data: Data) -> Box<Self> {
        let (base, left, new_id, unsettled) = (None, None, None, None);
        let (touch, compare, redo) = (false, false, Vec::new());
        Box::new(Self { id, mode, opening, base, data, left, touch, compare, new_id, redo, unsettled })
    }

    /// Takes the opening and a copy of the rest, for a save that may outlive the request.
    pub(crate) fn detach(&mut self) -> Box<Self> {
        Box::new(Self {
            id: self.id.clone(),
            mode: self.mode,
            opening: self.opening.take(),
            base: self.base.clone(),
            data: self.data.clone(),
            left: self.left,
            touch: self.touch,
            compare: self.compare,
            new_id: self.new_id,
            redo: self.redo.clone(),
            unsettled: self.unsettled.take(),
        })
    }

    /// Whether there is anything that a save would store.
    pub(crate) fn is_changed(&self) -> bool {
        let same = match &self.base {
            Some(base) => base.values == self.data.values && base.origin == self.data.origin,
            None => self.data.values.is_empty(),
        };
        !same || self.new_id.is_some()
    }

    /// Lets go of the opening, and of a write of unknown fate with it: that may be repeated only through the same opening.
    fn forget_opening(&mut self) {
        (self.opening, self.unsettled) = (None, None);
    }

    fn saved(&mut self, left: Option<Ttl>) {
        self.base = Some(self.data.clone());
        self.redo.clear();
        self.touch = false;
        self.left = left;
    }
}

impl Core {
    /// Saves `work` as its mode says. Afterwards `work.opening` is there only if it can be used again.
    pub(crate) async fn commit(
        self: &Arc<Self>,
        work: &mut Work,
        then: Then,
        wait: Duration,
        lease: Duration,
    ) -> Result<()> {
        // What is rarer is on the heap, so that what most requests do does not carry the room for it.
        match work.mode {
            Mode::Retired => Ok(()),
            Mode::Fresh => Box::pin(self.create_record(work, then, lease)).await,
            Mode::Optimistic if work.compare => Box::pin(self.compare_and_replace(work, wait, lease)).await,
            Mode::Exclusive | Mode::Optimistic => self.replace(work, then, lease).await,
            Mode::Merge => Box::pin(self.merge(work, then, wait, lease)).await,
        }
    }

    async fn create_record(&self, work: &mut Work, then: Then, lease: Duration) -> Result<()> {
        // An id that nobody has seen needs no other.
        work.new_id = None;
        if work.data.values.is_empty() {
            return Ok(());
        }
        for _ in 0..=MAX_COLLISIONS {
            let mut opening = match work.opening.take() {
                Some(opening) => opening,
                None => self.open_fresh(&work.id, lease).await?,
            };
            let change = match self.record(&work.data) {
                Ok(record) => Change::Write(record),
                Err(error) => return Err(error),
            };
            match self.apply(&mut opening, &change, then, &mut work.unsettled).await {
                Ok(_) => {
                    work.saved(self.life(&work.data));
                    if then == Then::Keep {
                        opening.keep_renewed();
                        work.mode = if self.settings.locking { Mode::Exclusive } else { Mode::Optimistic };
                        work.opening = Some(opening);
                    } else {
                        opening.closed();
                    }
                    return Ok(());
                }
                Err(Failure { error, usable: true }) => {
                    work.opening = Some(opening);
                    return Err(error);
                }
                Err(Failure { error, .. }) if error.kind() == ErrorKind::Conflict => {
                    opening.closed();
                    work.id = SessionId::generate()?;
                }
                Err(Failure { error, .. }) => {
                    let _ = opening.close().await;
                    return Err(error);
                }
            }
        }
        Err(repeating_ids())
    }

    async fn replace(&self, work: &mut Work, then: Then, lease: Duration) -> Result<()> {
        let Some(mut opening) = work.opening.take() else {
            return Err(Error::new(ErrorKind::Fenced, "save", "an earlier failure has ended this session; open it again"));
        };
        if let Some(new_id) = work.new_id {
            return Box::pin(self.move_to_new_id(work, opening, new_id, then, lease)).await;
        }
        let change = match self.change(work, then) {
            Ok(change) => change,
            Err(error) => {
                work.opening = Some(opening);
                return Err(error);
            }
        };
        let outcome = self.apply(&mut opening, &change, then, &mut work.unsettled).await;
        match outcome {
            Err(Failure { error, .. }) if matches!(change, Change::Touch(_)) && refused(&error) => {
                // Nothing of ours was to be stored: whoever was first has prolonged or ended it.
                opening.closed();
                Ok(())
            }
            Err(Failure { error, usable: true }) => {
                work.opening = Some(opening);
                Err(error)
            }
            Err(Failure { error, .. }) => {
                let _ = opening.close().await;
                Err(error)
            }
            Ok(_) => {
                match change {
                    Change::Nothing => {}
                    _ => work.saved(self.life(&work.data)),
                }
                match then {
                    Then::Keep => work.opening = Some(opening),
                    Then::Close => opening.closed(),
                }
                Ok(())
            }
        }
    }

    /// What a save has to do to what was read.
    fn change(&self, work: &Work, then: Then) -> Result<Change> {
        if work.is_changed() {
            return self.record(&work.data).map(Change::Write);
        }
        let Some(life) = self.life(&work.data).filter(|_| work.base.is_some()) else { return Ok(Change::Nothing) };
        let used = work.left.map_or(Duration::ZERO, |left| life.as_duration().saturating_sub(left.as_duration()));
        let due = used > life.as_duration().mul_f64(self.settings.touch_after);
        Ok(match (work.touch || due, then) {
            (false, _) => Change::Nothing,
            (true, Then::Close) => Change::Touch(life),
            // The provided `touch` of a handler reads, and what is written after it would be based on a state that we have not
            // seen. Rewriting what we know is fenced.
            (true, Then::Keep) => Change::Write(self.record(&work.data)?),
        })
    }

    /// Does what an optimistic write does, for a handler that has none: under the lock, and only if nothing has changed.
    async fn compare_and_replace(self: &Arc<Self>, work: &mut Work, wait: Duration, lease: Duration) -> Result<()> {
        if !work.is_changed() {
            return Ok(());
        }
        let live = self.find_newest(&work.id, wait, lease).await?;
        if work.base.as_ref() != Some(&live.data) {
            let _ = live.opening.close().await;
            return Err(Error::new(ErrorKind::Conflict, "save", "the session was changed meanwhile; nothing was stored"));
        }
        (work.id, work.left, work.opening) = (live.id, Some(live.left), Some(live.opening));
        let outcome = self.replace(work, Then::Close, lease).await;
        work.forget_opening();
        outcome
    }

    async fn find_newest(self: &Arc<Self>, id: &SessionId, wait: Duration, lease: Duration) -> Result<Box<Live>> {
        match self.find(id, Access::Exclusive { wait, lease }, Expect::Existing, wait).await? {
            Found::Live(live) => Ok(live),
            Found::Absent { .. } | Found::Retired { .. } => {
                Err(Error::new(ErrorKind::Gone, "save", "the session was destroyed meanwhile"))
            }
        }
    }

    async fn merge(self: &Arc<Self>, work: &mut Work, then: Then, wait: Duration, lease: Duration) -> Result<()> {
        if work.new_id.is_none() && work.opening.is_some() {
            match self.replace(work, then, lease).await {
                Err(error) if error.kind() == ErrorKind::Conflict => {}
                outcome => return outcome,
            }
        }
        if let Some(mut opening) = work.opening.take() {
            // A write of unknown fate is settled through its own opening: through another it could be applied a second time.
            let settled = self.apply(&mut opening, &Change::Nothing, Then::Close, &mut work.unsettled).await;
            if let Err(Failure { error, usable }) = settled {
                work.opening = usable.then_some(opening);
                return Err(error);
            }
            opening.closed();
        }
        if !work.is_changed() {
            return Ok(());
        }
        let base = work.base.clone();
        let ours = work.data.clone();
        let staged = work.new_id;
        let deadline = Instant::now() + wait;
        for redo in 0..=MAX_REDOS {
            let left = deadline.saturating_duration_since(Instant::now());
            let live = self.find_newest(&work.id, left, lease).await?;
            let was = base.as_ref().map(|base| &base.values).unwrap_or(&live.data.values);
            let merged = match lay_over(was, &ours.values, &live.data.values, &work.redo) {
                Ok(merged) => merged,
                Err(error) => {
                    let _ = live.opening.close().await;
                    return Err(error);
                }
            };
            (work.id, work.left, work.opening) = (live.id, Some(live.left), Some(live.opening));
            work.data = Data { values: merged, ..live.data.clone() };
            work.data.origin = if ours.origin.is_none() { None } else { work.data.origin.take() };
            work.base = Some(live.data);
            work.new_id = staged;
            let redos = work.redo.clone();
            let outcome = self.replace(work, Then::Close, lease).await;
            match outcome {
                Ok(()) => return Ok(()),
                Err(error) => {
                    // Back to what the request knows.
                    work.forget_opening();
                    (work.base, work.data, work.redo) = (base.clone(), ours.clone(), redos);
                    let again = matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Conflict) && redo < MAX_REDOS;
                    if !again {
                        return Err(error);
                    }
                }
            }
        }
        Err(Error::new(ErrorKind::Conflict, "merge", "others kept taking over"))
    }

    async fn move_to_new_id(
        &self,
        work: &mut Work,
        mut old: Opening,
        new_id: NewId,
        then: Then,
        lease: Duration,
    ) -> Result<()> {
        let mut data = work.data.clone();
        data.origin = None;
        if new_id == NewId::Elevate {
            (data.created, data.authenticated) = (self.settings.clock.now_millis(), self.settings.clock.now_millis());
        }
        let (id, mut new) = match self.create_successor(&work.id, &mut data, new_id, lease).await {
            Ok(created) => created,
            Err(error) => {
                work.opening = Some(old);
                return Err(error);
            }
        };
        let mark = match new_id {
            NewId::Rotate => {
                Payload::Forward(Forward { target: seal::seal(&id, &work.id, Purpose::Forward)?.into(), seen: false })
            }
            NewId::Elevate => Payload::Retired,
        };
        let change = Change::Write(Record::new(mark.encode(), Ttl::new(self.settings.ttl)));
        match self.apply(&mut old, &change, Then::Close, &mut work.unsettled).await {
            Ok(_) => old.closed(),
            Err(Failure { error, .. }) if error.kind() == ErrorKind::Unknown => {
                // The old id may lead to the new record already: both stay, and the visitor keeps the old id.
                work.unsettled = None;
                let _ = new.close().await;
                return Err(error);
            }
            Err(Failure { error, usable }) => {
                let _ = new.handler().destroy().await;
                let _ = new.close().await;
                if usable {
                    work.opening = Some(old);
                } else {
                    let _ = old.close().await;
                }
                return Err(error);
            }
        }
        (work.id, work.data, work.new_id) = (id, data, None);
        work.saved(self.life(&work.data));
        match then {
            Then::Keep => work.opening = Some(new),
            // The record is safe; a lock that cannot be given back ends with its lease.
            Then::Close => drop(new.close().await),
        }
        Ok(())
    }

    /// Stores `data` under a new id, locked.
    async fn create_successor(
        &self,
        old: &SessionId,
        data: &mut Data,
        new_id: NewId,
        lease: Duration,
    ) -> Result<(SessionId, Opening)> {
        for _ in 0..=MAX_COLLISIONS {
            let id = SessionId::generate()?;
            if new_id == NewId::Rotate {
                data.origin = Some(seal::seal(old, &id, Purpose::Origin)?.into());
            }
            let change = Change::Write(self.record(data)?);
            let mut opening = self.open_fresh(&id, lease).await?;
            match self.apply(&mut opening, &change, Then::Keep, &mut None).await {
                Ok(_) => {
                    opening.keep_renewed();
                    return Ok((id, opening));
                }
                Err(Failure { error, .. }) if error.kind() == ErrorKind::Conflict => opening.closed(),
                Err(Failure { error, .. }) => {
                    // It may have been stored; nobody knows its id, and nothing may be left of it.
                    let _ = opening.handler().destroy().await;
                    let _ = opening.close().await;
                    return Err(error);
                }
            }
        }
        Err(repeating_ids())
    }

    async fn open_fresh(&self, id: &SessionId, lease: Duration) -> Result<Opening> {
        self.janitor.start()?;
        let mode = if self.settings.locking { Mode::Exclusive } else { Mode::Optimistic };
        let request = OpenRequest { access: mode.access(lease), expect: Expect::Fresh };
        let inner = match self.handler.open(id, &request).await {
            Err(error) if error.kind() == ErrorKind::Unsupported && mode == Mode::Optimistic => {
                let request = OpenRequest { access: Mode::Exclusive.access(lease), expect: Expect::Fresh };
                self.handler.open(id, &request).await?
            }
            inner => inner?,
        };
        Ok(Opening::new(inner, self.queues.take(id), Arc::clone(&self.janitor)))
    }

    fn record(&self, data: &Data) -> Result<Record> {
        let Some(life) = self.life(data) else {
            return Err(Error::new(ErrorKind::Gone, "save", "the session has passed its absolute time-out"));
        };
        let bytes = Payload::Data(data.clone()).encode();
        if bytes.len() > self.settings.max_bytes {
            let message =
                format!("the session takes {} bytes, the limit is {} (max_bytes)", bytes.len(), self.settings.max_bytes);
            return Err(Error::new(ErrorKind::TooLarge, "save", message));
        }
        Ok(Record::new(bytes, life))
    }

    /// Sends `change`, after a write that is still unanswered, and asks once more if no answer comes: under the same id, so that
    /// it is applied once.
    async fn apply(
        &self,
        opening: &mut Opening,
        change: &Change,
        then: Then,
        unsettled: &mut Option<(Change, WriteId)>,
    ) -> Result<Written, Failure> {
        if let Some((earlier, id)) = unsettled.take() {
            match send(opening, &earlier, Then::Keep, id).await {
                Ok(_) if earlier == *change => return Ok(send(opening, &Change::Nothing, then, id).await?),
                Ok(_) => {}
                Err(error) if error.kind().keeps_opening() => {
                    *unsettled = Some((earlier, id));
                    return Err(error.into());
                }
                Err(error) => return Err(Failure::undecided(error)),
            }
        }
        let id = WriteId::random().map_err(Failure::from)?;
        match send(opening, change, then, id).await {
            Err(error) if error.kind() == ErrorKind::Unknown => match send(opening, change, then, id).await {
                Err(again) if again.kind().keeps_opening() => {
                    *unsettled = Some((change.clone(), id));
                    Err(again.with_kind(ErrorKind::Unknown).into())
                }
                // Refused now: the first copy may have been applied and overtaken since.
                Err(again) => Err(Failure::undecided(again)),
                Ok(written) => Ok(written),
            },
            outcome => Ok(outcome?),
        }
    }
}

/// A save that did not succeed, and whether the opening may be used again.
struct Failure {
    error: Error,
    usable: bool,
}

impl Failure {
    /// A refusal of a write that had been sent before without an answer: whether it counts cannot be known any more.
    fn undecided(refusal: Error) -> Self {
        let message = "a write got no answer, and others have written since: it may or may not have been applied";
        Self { error: Error::new(ErrorKind::Unknown, "save", message).with_source(refusal), usable: false }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { usable: error.kind().keeps_opening(), error }
    }
}

async fn send(opening: &mut Opening, change: &Change, then: Then, id: WriteId) -> Result<Written> {
    let handler = opening.handler();
    match (then, change) {
        (Then::Close, change) => handler.save(change, id).await,
        (Then::Keep, Change::Write(record)) => handler.write(record, id).await,
        (Then::Keep, Change::Touch(ttl)) => handler.touch(*ttl).await,
        (Then::Keep, Change::Destroy) => handler.destroy().await.map(|_| Written::Applied),
        (Then::Keep, Change::Nothing) => Ok(Written::Applied),
    }
}

fn refused(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Gone | ErrorKind::Conflict)
}

fn repeating_ids() -> Error {
    Error::new(
        ErrorKind::Unexpected,
        "create",
        "generated ids keep being taken; the randomness of this machine repeats itself",
    )
}
