//! A handler for a store of one's own, and the suite that holds it to the contract.
//!
//! The store is a map in this process; yours speaks to a server. `docs/write-a-handler.md` explains it part by part.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use session_core::{
    Access, Error, ErrorKind, Expect, Locked, MemoryLock, OpenRequest, OpenSession, Record, Result, Session, SessionHandler,
    SessionId, Sessions, Ttl, WriteId, Written, async_trait,
};

/// The store; clones share it, as connections to one server do.
#[derive(Clone, Default)]
struct Shelf(Arc<Mutex<HashMap<SessionId, Slot>>>);

/// What the store keeps for a session.
#[derive(Clone)]
struct Slot {
    /// The bytes; `None` is the trace of a destroyed session.
    data: Option<Vec<u8>>,
    /// The write, or the destruction, that left it so.
    last: WriteId,
    /// From here on it counts as absent, collected or not.
    deadline: Instant,
}

/// How long it is remembered that a session was destroyed: longer than a request that opened it before may run.
const REMEMBER: Duration = Duration::from_secs(600);

impl Slot {
    fn record(&self) -> Option<Record> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        self.data.clone().map(|data| Record::new(data, Ttl::new(left)))
    }
}

impl Shelf {
    fn slots(&self) -> MutexGuard<'_, HashMap<SessionId, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows `decide` what is there and stores what it returns, if anything: one step that nothing can come between.
    fn step<T>(&self, id: &SessionId, decide: impl FnOnce(Option<&Slot>) -> (Option<Slot>, T)) -> T {
        let mut slots = self.slots();
        let (slot, answer) = decide(slots.get(id).filter(|slot| slot.deadline > Instant::now()));
        if let Some(slot) = slot {
            slots.insert(id.clone(), slot);
        }
        answer
    }
}

/// Keeps sessions on a [`Shelf`]. It takes no locks; [`Locked`] adds that.
#[derive(Clone, Debug, Default)]
struct ShelfHandler {
    shelf: Shelf,
}

#[async_trait]
impl SessionHandler for ShelfHandler {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        if let Access::Exclusive { .. } = request.access {
            return Err(Error::new(ErrorKind::Unsupported, "open", "a shelf has no lock"));
        }
        let (shelf, id) = (self.shelf.clone(), id.clone());
        let mut opening = Opening { shelf, id, request: *request, basis: Basis::Still(None), fetched: None, end: None };
        if request.access != Access::Destroy && request.expect != Expect::Fresh {
            opening.fetched = Some(opening.look());
        }
        Ok(Box::new(opening))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        let (mut slots, now) = (self.shelf.slots(), Instant::now());
        let due = slots.iter().filter(|(_, slot)| slot.deadline <= now).map(|(id, _)| id.clone());
        let due: Vec<_> = due.take(limit.get() as usize).collect();
        // The trace of a destroyed session is freed, too, and is not counted.
        let freed = due.iter().filter_map(|id| slots.remove(id)?.data);
        Ok(freed.count() as u64)
    }
}

/// What the next write goes by.
#[derive(Clone, Copy, Debug)]
enum Basis {
    /// The store must still be as this write or this destruction left it, or still have nothing.
    Still(Option<WriteId>),
    /// There is nothing that this opening may write.
    Barred,
}

#[derive(Debug)]
struct Opening {
    shelf: Shelf,
    id: SessionId,
    request: OpenRequest,
    basis: Basis,
    /// What `open` found, until `read` hands it over.
    fetched: Option<Option<Record>>,
    /// Why it can do nothing more: it is closed, or a write of it was refused.
    end: Option<ErrorKind>,
}

impl Opening {
    fn look(&mut self) -> Option<Record> {
        let found = self.shelf.step(&self.id, |found| (None, found.cloned()));
        let record = found.as_ref().and_then(Slot::record);
        self.basis = match self.request.expect {
            Expect::Fresh => Basis::Still(None),
            Expect::Existing if record.is_none() => Basis::Barred,
            Expect::Existing | Expect::Any => Basis::Still(found.map(|slot| slot.last)),
        };
        record
    }

    /// Stores what `next` makes of what is there, if that is still what this opening goes by.
    fn replace(&mut self, id: Option<WriteId>, next: impl FnOnce(Option<&Slot>) -> Option<Slot>) -> Result<Written> {
        if self.request.access != Access::Optimistic {
            return self.refuse("write");
        }
        let (basis, spent, fresh) = (self.basis, self.end.is_some(), self.request.expect == Expect::Fresh);
        let outcome = self.shelf.step(&self.id, |found| {
            let last = found.map(|slot| slot.last);
            let live = found.is_some_and(|slot| slot.data.is_some());
            match basis {
                _ if live && last == id => (None, Ok(Written::AlreadyApplied)),
                Basis::Still(seen) if seen == last && !spent => match next(found) {
                    Some(slot) => (Some(slot), Ok(Written::Applied)),
                    None => (None, Err(ErrorKind::Gone)),
                },
                Basis::Still(seen) if live || (fresh && seen.is_none()) => (None, Err(ErrorKind::Conflict)),
                Basis::Still(_) | Basis::Barred => (None, Err(ErrorKind::Gone)),
            }
        });
        match (&outcome, id) {
            (Ok(_), Some(id)) => (self.basis, self.fetched) = (Basis::Still(Some(id)), None),
            (Ok(_), None) => self.fetched = None,
            (Err(kind), _) => drop(self.end.get_or_insert(*kind)),
        }
        outcome.or_else(|_| self.refuse("write"))
    }

    fn refuse<T>(&self, operation: &'static str) -> Result<T> {
        Err(Error::new(self.end.unwrap_or(ErrorKind::Unsupported), operation, "the session is not open for this"))
    }
}

#[async_trait]
impl OpenSession for Opening {
    async fn read(&mut self) -> Result<Option<Record>> {
        if self.request.access == Access::Destroy || self.end.is_some() {
            return self.refuse("read");
        }
        Ok(self.fetched.take().unwrap_or_else(|| self.look()))
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        let slot = Slot { data: Some(record.data.clone()), last: id, deadline: Instant::now() + record.ttl.as_duration() };
        self.replace(Some(id), |_| Some(slot))
    }

    async fn touch(&mut self, ttl: Ttl) -> Result<Written> {
        let deadline = Instant::now() + ttl.as_duration();
        self.replace(None, |found| found.filter(|slot| slot.data.is_some()).map(|slot| Slot { deadline, ..slot.clone() }))
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        if self.request.access == Access::ReadOnly {
            return self.refuse("destroy");
        }
        let trace = Slot { data: None, last: WriteId::random()?, deadline: Instant::now() + REMEMBER };
        (self.basis, self.fetched) = (Basis::Barred, None);
        Ok(self.shelf.step(&self.id, |found| (Some(trace), found.and_then(Slot::record))))
    }

    async fn close(&mut self) -> Result<()> {
        self.end.get_or_insert(ErrorKind::Unsupported);
        Ok(())
    }
}

impl fmt::Debug for Shelf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shelf")
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let handler = Locked::new(ShelfHandler::default(), MemoryLock::new());
    let sessions = Sessions::new(Arc::new(handler))?;
    let mut session = sessions.create()?;
    session.insert("visits", &1)?;
    let id = session.close().await?.expect("a session with a value in it is stored");
    let visit = async |session: &mut Session| session.update_key("visits", |n: Option<u32>| n.unwrap_or(0) + 1);
    tokio::try_join!(sessions.update(&id, visit), sessions.update(&id, visit))?;
    println!("visits: {:?}", sessions.view(&id).await?.get::<u32>("visits")?);
    Ok(())
}

#[cfg(test)]
mod conformance {
    use super::*;
    use conformance_tests::{
        Harness, cancel_suite, expiry_suite, fence_suite, handler_suite, hostile_suite, optimistic_suite, race_suite,
        sessions_suite,
    };

    /// One shelf and one lock for each namespace.
    #[derive(Default)]
    struct Shelves(Mutex<HashMap<String, (ShelfHandler, MemoryLock)>>);

    impl Harness for Shelves {
        async fn handler(&self, namespace: &str) -> Result<Arc<dyn SessionHandler>> {
            let mut shelves = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (handler, lock) = shelves.entry(namespace.into()).or_default().clone();
            Ok(Arc::new(Locked::new(handler, lock)))
        }

        /// [`Locked`] touches by rewriting.
        fn touch_rewrites(&self) -> bool {
            true
        }
    }

    handler_suite!(Shelves::default());
    fence_suite!(Shelves::default());
    expiry_suite!(Shelves::default());
    optimistic_suite!(Shelves::default());
    race_suite!(Shelves::default());
    cancel_suite!(Shelves::default());
    hostile_suite!(Shelves::default());
    sessions_suite!(Shelves::default());
}
