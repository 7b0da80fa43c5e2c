//! Session files that stay open between two openings of this process: which, for how long, and when they have to go.
//!
//! To open a file and to close it costs as much as to read and to write it. So whoever is through with a session leaves its file
//! here, open and without any lock, and whoever opens the session next takes it out. At any time a file is either here or with
//! one opening. Only a clean end leaves it: what was dropped or has failed is closed, and so is what somebody waits for.
//! The first opening of a session leaves nothing: most are not opened again soon.
//!
//! What the file is worth by then is not known here. It may have been removed, replaced or moved; who takes it locks it and asks
//! whether the name still stands for it, so even a key that two sessions share does no harm.
//!
//! A second after it was opened no file stays here, however often it was used: as long as it is open, a removed file takes up room,
//! and a child that this process forked without starting another program shares its locks.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use session_core::SessionId;
use tokio::runtime::Handle;
use xxhash_rust::xxh3::xxh3_64;

use crate::dir::Identity;

/// How often the files are looked through.
const ROUND: Duration = Duration::from_millis(500);
/// How many rounds after the one in which it was opened a file goes.
const LAST_ROUND: u32 = 2;
/// In how many groups, each behind a lock of its own, the files are.
const GROUPS: usize = 16;
/// How many sessions each group remembers whose files it does not have.
const SEEN: usize = 16;
/// What part of the descriptors that this process may have are taken at most.
const SHARE: u64 = 16;

/// The files, and who looks after them.
#[derive(Debug)]
pub(crate) struct Kept {
    groups: Box<[Group]>,
    /// How many files a group has at most.
    room: usize,
    /// The number of the round.
    round: AtomicU32,
    /// Whether somebody looks through the files. Nothing is left while nobody does.
    tended: AtomicBool,
    /// Whose the files are.
    process: AtomicU32,
}

/// Some of the files. Each group is on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Group(Mutex<Files>);

#[derive(Debug, Default)]
struct Files {
    /// Those that were left last at the end.
    idle: Vec<Idle>,
    /// The sessions that were last asked for in vain.
    seen: VecDeque<Key>,
}

/// Where the file of a session is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(u64);

/// What is here of a session.
#[derive(Debug)]
pub(crate) enum Found {
    File(Idle),
    /// Nothing. A file that is opened now may be left here if this says when: not that of a session that has not been asked for
    /// lately. Most are not asked for again soon, and what would be done for their files would be in vain.
    Nothing(Option<Born>),
}

/// An open file that nobody uses.
#[derive(Debug)]
pub(crate) struct Idle {
    pub(crate) key: Key,
    pub(crate) file: File,
    pub(crate) known: Known,
}

/// What an opening knows of the file that another one has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// Which file it was when it was opened, and was found to be a session file of ours.
    pub(crate) identity: Identity,
    pub(crate) born: Born,
    /// Since when it is held, by the word that was left in its offset.
    pub(crate) stamped: u64,
}

/// The round in which a file was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Born(u32);

impl Key {
    pub(crate) fn of(id: &SessionId) -> Self {
        Self(xxh3_64(id.as_str().as_bytes()))
    }
}

impl Kept {
    /// Makes room for at most `most` files, and for fewer if this process may have few descriptors.
    pub(crate) fn new(most: usize) -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(limit, _)| limit) / SHARE;
        let most = most.min(usize::try_from(limit).unwrap_or(usize::MAX));
        let groups = most.min(GROUPS);
        Self {
            groups: (0..groups).map(|_| Group::default()).collect(),
            room: most.checked_div(groups).unwrap_or(0),
            round: AtomicU32::new(0),
            tended: AtomicBool::new(false),
            process: AtomicU32::new(std::process::id()),
        }
    }

    /// Makes sure that somebody looks after what will be left here; only a task of a runtime can.
    pub(crate) fn tend(self: &Arc<Self>) {
        if !self.groups.is_empty() && !self.tended.load(Ordering::Relaxed) {
            self.start_tending();
        }
    }

    #[cold]
    fn start_tending(self: &Arc<Self>) {
        let Ok(runtime) = Handle::try_current() else { return };
        if self.tended.swap(true, Ordering::SeqCst) {
            return;
        }
        let tender = Tender(Arc::downgrade(self));
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(ROUND).await;
                match tender.0.upgrade() {
                    Some(kept) if kept.next_round() => {}
                    _ => return,
                }
            }
        });
    }

    /// Takes out the file that was left under this key.
    pub(crate) fn take(&self, key: Key) -> Found {
        let Some(group) = self.group(key) else { return Found::Nothing(None) };
        let mut files = group.files();
        let Some(at) = files.idle.iter().position(|idle| idle.key == key) else {
            let again = files.seen.contains(&key);
            if !again {
                if files.seen.len() >= SEEN {
                    files.seen.pop_front();
                }
                files.seen.push_back(key);
            }
            return Found::Nothing(again.then(|| self.born()));
        };
        let idle = files.idle.remove(at);
        drop(files);
        let process = std::process::id();
        if self.process.load(Ordering::Relaxed) != process {
            self.disown(process);
            return Found::Nothing(None);
        }
        Found::File(idle)
    }

    /// Leaves a file on which there is no lock; what there is no room for is closed.
    pub(crate) fn leave(&self, idle: Idle) {
        let Some(group) = self.group(idle.key) else { return };
        let mut files = group.files();
        // Who stops looking after the files says so first and then empties one group after the other.
        if !self.tended.load(Ordering::SeqCst) || self.is_old(&idle) {
            return;
        }
        let another = files.idle.iter().position(|other| other.key == idle.key);
        let out = another.or_else(|| (files.idle.len() >= self.room).then_some(0)).map(|at| files.idle.remove(at));
        files.idle.push(idle);
        drop(files);
        drop(out);
    }

    /// Closes all files, and says whether there was one.
    pub(crate) fn let_go(&self) -> bool {
        // Not a short cut: every group has to be emptied.
        self.groups.iter().fold(false, |any, group| any | !std::mem::take(&mut group.files().idle).is_empty())
    }

    /// Closes the files that are old, and says whether any is left.
    fn next_round(&self) -> bool {
        self.round.fetch_add(1, Ordering::Relaxed);
        self.groups.iter().fold(false, |any, group| {
            let mut files = group.files();
            files.idle.retain(|idle| !self.is_old(idle));
            any | !files.idle.is_empty()
        })
    }

    fn born(&self) -> Born {
        Born(self.round.load(Ordering::Relaxed))
    }

    fn is_old(&self, idle: &Idle) -> bool {
        self.round.load(Ordering::Relaxed).wrapping_sub(idle.known.born.0) >= LAST_ROUND
    }

    /// In a forked child, which notices that by the first file it finds here: lets go of what is its parent's, now and whatever of
    /// it is still in use. The child has none of the tasks of its parent.
    #[cold]
    fn disown(&self, process: u32) {
        self.tended.store(false, Ordering::SeqCst);
        self.round.fetch_add(LAST_ROUND, Ordering::Relaxed);
        self.let_go();
        self.process.store(process, Ordering::Relaxed);
    }

    fn group(&self, key: Key) -> Option<&Group> {
        self.groups.get((key.0 % self.groups.len().max(1) as u64) as usize)
    }
}

impl Group {
    fn files(&self) -> MutexGuard<'_, Files> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task that looks after the files. It ends when there are none, or with its runtime.
struct Tender(Weak<Kept>);

impl Drop for Tender {
    fn drop(&mut self) {
        if let Some(kept) = self.0.upgrade() {
            kept.tended.store(false, Ordering::SeqCst);
            kept.let_go();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, RawFd};

    use super::*;
    use crate::dir::stat;

    fn idle(kept: &Kept, key: u64) -> Idle {
        let file = tempfile::tempfile().unwrap();
        let identity = stat(&file).unwrap().identity();
        Idle { key: Key(key), file, known: Known { identity, born: kept.born(), stamped: 0 } }
    }

    fn tended(most: usize) -> Kept {
        let kept = Kept::new(most);
        kept.tended.store(true, Ordering::SeqCst);
        kept
    }

    /// Leaves a new file and returns its descriptor.
    fn leave(kept: &Kept, key: u64) -> RawFd {
        let idle = idle(kept, key);
        let fd = idle.file.as_raw_fd();
        kept.leave(idle);
        fd
    }

    fn take(kept: &Kept, key: u64) -> Option<Idle> {
        match kept.take(Key(key)) {
            Found::File(idle) => Some(idle),
            Found::Nothing(_) => None,
        }
    }

    fn is_there(kept: &Kept, key: u64) -> bool {
        take(kept, key).is_some()
    }

    #[test]
    fn a_file_goes_after_its_last_round_however_often_it_was_used() {
        let kept = tended(16);
        leave(&kept, 1);
        for _ in 1..LAST_ROUND {
            assert!(kept.next_round());
            for _ in 0..3 {
                let idle = take(&kept, 1).expect("it is still there");
                kept.leave(idle);
            }
        }
        let used = take(&kept, 1).unwrap();
        leave(&kept, 2);
        assert!(kept.next_round(), "the younger one is left");
        kept.leave(used);
        assert!(!is_there(&kept, 1), "an old file was left after its last round");
        leave(&kept, 3);
        let born = kept.born();
        while kept.next_round() {}
        assert_eq!(kept.round.load(Ordering::Relaxed) - born.0, LAST_ROUND);
    }

    #[test]
    fn where_there_is_no_room_the_file_that_was_left_first_goes() {
        let kept = tended(2 * GROUPS);
        let here = |n: u64| 3 + n * GROUPS as u64;
        for n in 0..3 {
            leave(&kept, here(n));
        }
        assert!(!is_there(&kept, here(0)) && is_there(&kept, here(1)) && is_there(&kept, here(2)));
        leave(&kept, here(0));
        let second = leave(&kept, here(0));
        assert_eq!(take(&kept, here(0)).unwrap().file.as_raw_fd(), second, "one file a session");
        assert!(!is_there(&kept, here(0)));
        let few = tended(3);
        for key in 0..100 {
            leave(&few, key);
        }
        assert_eq!((0..100).filter(|key| is_there(&few, *key)).count(), 3);
    }

    #[test]
    fn only_of_a_session_that_is_asked_for_again_soon_a_file_may_stay() {
        let kept = tended(GROUPS);
        let may_stay = |key| matches!(kept.take(Key(key)), Found::Nothing(Some(_)));
        assert!(!may_stay(1) && may_stay(1) && may_stay(1));
        for other in 1..=SEEN as u64 {
            assert!(!may_stay(1 + other * GROUPS as u64));
        }
        assert!(!may_stay(1), "that was long ago");
    }

    #[test]
    fn nothing_is_left_while_nobody_looks_after_it() {
        let kept = Kept::new(16);
        leave(&kept, 1);
        assert!(!is_there(&kept, 1));
        let kept = Arc::new(tended(16));
        leave(&kept, 1);
        drop(Tender(Arc::downgrade(&kept)));
        leave(&kept, 2);
        assert!(!is_there(&kept, 1) && !is_there(&kept, 2));
        assert!(!is_there(&Kept::new(0), 1));
    }

    #[test]
    fn a_forked_child_lets_go_of_what_its_parent_has_left_or_is_using() {
        let kept = tended(16);
        leave(&kept, 1);
        leave(&kept, 2);
        let in_use = idle(&kept, 3);
        kept.process.store(std::process::id().wrapping_add(1), Ordering::Relaxed);
        assert!(!is_there(&kept, 1), "a file of the parent was used");
        kept.tended.store(true, Ordering::SeqCst);
        kept.leave(in_use);
        assert!(!is_there(&kept, 2) && !is_there(&kept, 3));
        leave(&kept, 1);
        assert!(is_there(&kept, 1), "the child keeps its own");
    }
}
