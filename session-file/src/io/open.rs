//! How an opener comes to a session file and its lock: found, created, passed by, or gone.
//!
//! Waiting is not done here; see [`wait`](crate::wait).

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use session_core::{Error, ErrorKind, Record, Result, SessionId, Ttl, WriteId};

use super::claim::{Claim, stamp};
use super::read::{Content, load};
use super::{LOOKS, OPEN_AGAIN, SessionFile};
use crate::dir::{Plain, fault, stat};
use crate::kept::{Born, Found, Key, Known};
use crate::store::{Store, now};
use crate::wait::{self, Attempt};

/// What an opener with a lock found.
pub(crate) type Opened = Option<(Box<SessionFile>, Option<(Record, WriteId)>)>;

/// How an opener comes to the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Just now: those who stand in line go first.
    Newcomer,
    /// From the head of the line.
    First,
    /// For a moment only, past the line: it is now or not at all.
    Passing,
}

/// What an opener wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Manner {
    /// An absent id is answered, not created.
    pub(crate) existing: bool,
    /// How far ahead the deadline is kept: two of these.
    pub(crate) lease: Duration,
    pub(crate) turn: Turn,
}

impl Manner {
    /// One write, touch or destroy of an id that should be there.
    pub(crate) const PASSING: Self = Self { existing: true, lease: Duration::ZERO, turn: Turn::Passing };
}

/// How an opener came to the open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// He stood in line with it.
    Line,
    /// Another opening of this process left it.
    Kept(Known),
    Found(Option<Born>),
    New,
}

impl Origin {
    fn known(&self) -> Option<&Known> {
        if let Self::Kept(known) = self { Some(known) } else { None }
    }

    fn born(self) -> Option<Born> {
        match self {
            Self::Line | Self::New => None,
            Self::Kept(known) => Some(known.born),
            Self::Found(born) => born,
        }
    }
}

impl SessionFile {
    /// Tries to get the lock on the file of `id`, through `file` if that is open already. `Done(None)` is an absent id.
    pub(crate) fn open(
        store: &Arc<Store>,
        id: &SessionId,
        mut file: Option<File>,
        manner: Manner,
    ) -> Result<Attempt<Opened>> {
        const OP: &str = "open";
        let dir = &store.dir;
        let (name, key) = (dir.name(id), Key::of(id));
        let mut moved = false;
        for _ in 0..OPEN_AGAIN {
            let (file, origin) = match file.take() {
                Some(file) => (file, Origin::Line),
                None => match dir.kept.take(key) {
                    Found::File(idle) => (idle.file, Origin::Kept(idle.known)),
                    Found::Nothing(born) => match dir.open_file(&name, true, OP)? {
                        Some(file) => (file, Origin::Found(born)),
                        None if manner.existing => return Ok(Attempt::Done(None)),
                        None => match dir.create_file(&name, OP)? {
                            Some(file) => (file, Origin::New),
                            None => {
                                moved = true;
                                continue;
                            }
                        },
                    },
                },
            };
            let claim = Claim::take(file, OP)?;
            let stat = match origin {
                // It may have lost its name to another file since it was opened.
                Origin::Kept(known) => match dir.stat_named(&name, known.identity) {
                    Some(stat) => stat,
                    None => continue,
                },
                _ => stat(claim.as_deref().unwrap_or_else(|file| file)).map_err(|cause| fault(OP, cause))?,
            };
            match dir.judge(&stat, OP)? {
                Plain::Ours => {}
                Plain::Unlinked => {
                    moved = true;
                    continue;
                }
                Plain::Foreign if manner.existing => return Ok(Attempt::Done(None)),
                Plain::Foreign => return Err(taken_by_another_user(OP)),
            }
            // The link count tells that the file was removed; only after a wait can it also have been moved away unnoticed.
            if origin == Origin::Line && !dir.is_named(&name, &stat) {
                moved = true;
                continue;
            }
            let file = match claim {
                Ok(claim) => claim,
                Err(file) => return Ok(Attempt::Busy { file, moved }),
            };
            let size = stat.size;
            let mut content = if size == 0 { Content::NEW } else { load(&file, true, OP)? };
            content.header.dead |= stat.dead;
            let now = now();
            if manner.turn == Turn::Newcomer && content.header.waiting > now && wait::line(&file) {
                // Closing is what wakes them; then this opener stands in line himself.
                drop(file);
                let Some(file) = dir.open_file(&name, true, OP)? else { continue };
                match crate::dir::stat(&file).map_err(|cause| fault(OP, cause)).and_then(|stat| dir.judge(&stat, OP))? {
                    Plain::Ours => return Ok(Attempt::Busy { file, moved: true }),
                    Plain::Unlinked | Plain::Foreign => continue,
                }
            }
            if manner.turn == Turn::First {
                wait::leave(&file);
            }
            let absent = content.is_absent(now);
            if content.header.dead || (manner.existing && content.current.is_none()) {
                // Destroyed while somebody held it, or left behind by somebody who was killed before he wrote.
                dir.unlink(&name, &file, OP)?;
                moved = true;
                continue;
            }
            if absent && manner.existing {
                return Ok(Attempt::Done(None));
            }
            let stamped = stamp(&file, now, origin.known().map(|known| known.stamped));
            let mut this = Box::new(Self {
                store: Arc::clone(store),
                id: id.clone(),
                file,
                size,
                second: content.header.second,
                current: content.current,
                settled: content.settled,
                unsynced: content.header.unsynced,
                creating: absent,
                empty: origin == Origin::New || content.current.is_none(),
                stale: false,
                since: now,
                stamped,
                key,
                identity: stat.identity(),
                born: origin.born(),
                signed: false,
            });
            if manner.turn == Turn::First {
                // Where one waited, others may be waiting who want to know for whom.
                this.sign();
            }
            if !absent {
                this.prolong(manner.lease, now);
            }
            let record = content.live(now).map(|(mut record, write)| {
                let deadline = this.current.map_or(0, |(entry, _)| entry.deadline);
                record.ttl = Ttl::new(Duration::from_millis(deadline.saturating_sub(now)));
                (record, write)
            });
            return Ok(Attempt::Done(Some((this, record))));
        }
        Err(taken_by_another_user(OP))
    }

    /// Creates the file of an id that nobody else knows, under its lock. `None` if the id is taken.
    pub(crate) fn create(store: &Arc<Store>, id: &SessionId) -> Result<Option<Box<Self>>> {
        const OP: &str = "write";
        let name = store.dir.name(id);
        for _ in 0..OPEN_AGAIN {
            let Some(file) = store.dir.create_file(&name, OP)? else { return Ok(None) };
            // Somebody may have found the file between these two calls. Whoever only looks, such as another creator of the same id,
            // is through in microseconds; a collector takes it away; anybody else has it then.
            let Some(file) = claim_soon(file, |look| wait::a_moment(look, LOOKS), OP)? else { return Ok(None) };
            let stat = stat(&*file).map_err(|cause| fault(OP, cause))?;
            if stat.links == 0 {
                continue;
            }
            if stat.size > 0 {
                // Whoever had it wrote.
                return Ok(None);
            }
            let since = now();
            let stamped = stamp(&file, since, None);
            return Ok(Some(Box::new(Self {
                store: Arc::clone(store),
                id: id.clone(),
                file,
                size: stat.size,
                second: None,
                current: None,
                settled: true,
                unsynced: false,
                creating: true,
                empty: true,
                stale: false,
                since,
                stamped,
                key: Key::of(id),
                identity: stat.identity(),
                born: None,
                signed: false,
            })));
        }
        Err(Error::new(ErrorKind::Unavailable, OP, "a new session file was taken away again and again"))
    }
}

/// Takes the lock of a file that nobody can want to keep yet; `pause` is what is done after a look at which somebody had it.
fn claim_soon(mut file: File, mut pause: impl FnMut(u32), op: &'static str) -> Result<Option<Claim>> {
    for look in 0..LOOKS {
        file = match Claim::take(file, op)? {
            Ok(claim) => return Ok(Some(claim)),
            Err(file) => file,
        };
        pause(look);
    }
    Ok(None)
}

fn taken_by_another_user(op: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, op, "a file that is not ours stands where the session file should; it was left alone")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_looks_into_a_new_file_for_a_moment_does_not_take_it_from_its_creator() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("new");
        let created = || File::create(&path).unwrap();
        let other = created();
        for through_after in [0, 1, LOOKS - 2] {
            other.lock().unwrap();
            let pause = |look| {
                if look == through_after {
                    other.unlock().unwrap()
                }
            };
            assert!(claim_soon(created(), pause, "write").unwrap().is_some(), "through after look {through_after}");
        }
        other.lock().unwrap();
        assert!(claim_soon(created(), |_| {}, "write").unwrap().is_none(), "somebody keeps it");
    }
}
