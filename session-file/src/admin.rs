//! Housekeeping and administration: collecting what has expired, listing, and who holds what.
//!
//! Nothing here waits for a lock, and nothing disturbs a holder.

use std::collections::{BTreeSet, VecDeque};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use session_core::{Cursor, Error, ErrorKind, LockInfo, Page, Result, SessionAdmin, SessionId, SessionInfo};

use crate::dir::{Dir, Plain, Walk, fault, stat};
use crate::handler::FileHandler;
use crate::io::{SessionFile, is_forgotten, load, read_head};
use crate::layout::{HEADER, Header};
use crate::lock::{KernelLocks, holder};
use crate::store::{Store, now, run};

/// How many names a listing keeps in memory between two pages.
const AHEAD: usize = 1 << 16;

/// Collects at most `limit` expired files, from where the last collection stopped.
pub(crate) fn collect(store: &Arc<Store>, last: &Mutex<Option<Walk>>, limit: NonZeroU32) -> Result<u64> {
    let resumed = last.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (mut freed, mut expired) = (0, 0);
    for walk in [resumed, Some(store.dir.walk())].into_iter().flatten() {
        let mut walk = walk;
        while let Some((id, _)) = walk.next()? {
            // What cannot be read is not ours to remove, and must not keep us from the rest.
            match looks_dead(store, &id) {
                Ok(true) => {}
                Ok(false) | Err(_) => continue,
            }
            match SessionFile::collect(store, &id) {
                Ok(None) => continue,
                Ok(Some(counts)) => expired += u64::from(counts),
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Config) => continue,
                Err(error) => return Err(error),
            }
            freed += 1;
            if freed >= limit.get() {
                *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(walk);
                return Ok(expired);
            }
        }
    }
    Ok(expired)
}

/// A look without a lock, and without waking anybody: only what looks dead is opened for writing.
fn looks_dead(store: &Arc<Store>, id: &SessionId) -> Result<bool> {
    const OP: &str = "gc";
    let Some(file) = store.dir.open_file(&store.dir.name(id), false, OP)? else { return Ok(false) };
    let stat = stat(&file).map_err(|cause| fault(OP, cause))?;
    if store.dir.judge(&stat, OP)? != Plain::Ours {
        return Ok(false);
    }
    if stat.dead {
        return Ok(true);
    }
    let mut head = [0; HEADER as usize];
    let length = read_head(&file, &mut head).map_err(|cause| fault(OP, cause))?;
    let head = &head[..length];
    let Ok(header) = Header::decode(head) else { return Ok(false) };
    if header.dead {
        return Ok(true);
    }
    if header.second.is_none() {
        // Somebody may have created it this moment; a collector who locks it, however shortly, is in his way.
        return Ok(is_forgotten(&file));
    }
    Ok(load(&file, false, OP)?.is_absent(now()))
}

/// The names that come next in a listing, so that not every page reads the whole directory.
#[derive(Debug)]
pub(crate) struct Listing {
    after: String,
    names: Names,
}

/// Names in the order of their paths.
#[derive(Debug)]
struct Names {
    next: VecDeque<String>,
    /// Whether there are more behind the last.
    more: bool,
}

#[async_trait]
impl SessionAdmin for FileHandler {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        let (this, after) = (self.clone(), after.map(|cursor| cursor.0.clone()).unwrap_or_default());
        run(self.store.config.io, true, move || this.page(after, limit, AHEAD)).await?
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        let this = self.clone();
        run(self.store.config.io, true, move || this.held(limit)).await?
    }

    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        const OP: &str = "unlock";
        let (store, id) = (Arc::clone(&self.store), id.clone());
        let work = move || -> Result<bool> {
            let Some(file) = store.dir.open_file(&store.dir.name(&id), false, OP)? else { return Ok(false) };
            let stat = stat(&file).map_err(|cause| fault(OP, cause))?;
            if store.dir.judge(&stat, OP)? != Plain::Ours
                || KernelLocks::read(|locks| locks.holder(&stat, &file).is_some())?.holder(&stat, &file).is_none()
            {
                return Ok(false);
            }
            let text = "a kernel lock ends only with its holder; end that process";
            Err(Error::new(ErrorKind::Unsupported, OP, text).with_holder(holder(&file, Duration::ZERO)))
        };
        run(self.store.config.io, false, work).await?
    }
}

impl FileHandler {
    fn page(&self, after: String, limit: NonZeroU32, ahead: usize) -> Result<Page> {
        let store = &self.store;
        let cached = self.listing.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut names = match cached.filter(|listing| listing.after == after) {
            Some(listing) => listing.names,
            None => names_after(&store.dir, &after, ahead)?,
        };
        let (now, mut last) = (now(), after);
        let mut sessions = Vec::new();
        while sessions.len() < limit.get() as usize {
            let Some(name) = names.next.pop_front() else {
                if !names.more {
                    return Ok(Page::new(sessions, None));
                }
                names = names_after(&store.dir, &last, ahead)?;
                continue;
            };
            sessions.extend(describe(store, &name, now));
            last = name;
        }
        let listing = Listing { after: last.clone(), names };
        *self.listing.lock().unwrap_or_else(PoisonError::into_inner) = Some(listing);
        Ok(Page::new(sessions, Some(Cursor(last))))
    }

    fn held(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        const OP: &str = "locks";
        let (dir, kernel) = (&self.store.dir, KernelLocks::read(|_| false)?);
        let mut walk = dir.walk();
        let mut locks = Vec::new();
        while let Some((id, inode)) = walk.next()? {
            if locks.len() >= limit.get() as usize {
                break;
            }
            if !kernel.mention(inode) {
                continue;
            }
            let Ok(Some(file)) = dir.open_file(&dir.name(&id), false, OP) else { continue };
            let Ok(stat) = stat(&file) else { continue };
            if dir.judge(&stat, OP).is_ok_and(|plain| plain == Plain::Ours) && kernel.holder(&stat, &file).is_some() {
                locks.push(LockInfo::new(id, holder(&file, Duration::ZERO), None, Some(kernel.waiting(&stat))));
            }
        }
        Ok(locks)
    }
}

/// Returns the next names after `after` in the order of their paths, at most `ahead`.
fn names_after(dir: &Dir, after: &str, ahead: usize) -> Result<Names> {
    let (mut next, mut more) = (BTreeSet::new(), false);
    let mut pending = vec![(String::new(), 0)];
    while let Some((path, level)) = pending.pop() {
        // Directories sort as what is in them, so those before the cursor need no look, nor do those behind a full page.
        if path.as_str() < after && !after.starts_with(&path) {
            continue;
        }
        if next.len() >= ahead && next.last().is_some_and(|last: &String| *last < path) {
            more = true;
            break;
        }
        let (mut below, leaf) = (Vec::new(), dir.is_leaf(level));
        for entry in dir.read(&path)? {
            let (name, _) = entry?;
            if let Some(deeper) = dir.below(&path, level, &name) {
                below.push(deeper);
            } else if leaf && Dir::id_of(&path, &name).is_some() {
                let full = format!("{path}{name}");
                if full.as_str() > after {
                    next.insert(full);
                    if next.len() > ahead {
                        next.pop_last();
                        more = true;
                    }
                }
            }
        }
        below.sort_unstable_by(|a, b| b.cmp(a));
        pending.append(&mut below);
    }
    Ok(Names { next: next.into_iter().collect(), more })
}

fn describe(store: &Store, name: &str, now: u64) -> Option<SessionInfo> {
    let (path, last) = name.rsplit_once('/').map_or(("", name), |(path, last)| (path, last));
    let id: SessionId = Dir::id_of(path, last)?;
    let file = store.dir.open_file(name, false, "list").ok()??;
    let stat = stat(&file).ok()?;
    if stat.dead || store.dir.judge(&stat, "list").ok()? != Plain::Ours {
        return None;
    }
    let (record, _) = load(&file, false, "list").ok()?.live(now)?;
    Some(SessionInfo::new(id, record.data.len() as u64, record.ttl.as_duration()))
}

#[cfg(test)]
mod tests {
    use session_core::{Change, Expect, OpenRequest, Record, SessionHandler, Ttl, WriteId};

    use super::*;
    use crate::config::{Durability, FileConfig};

    #[tokio::test]
    async fn a_listing_of_more_names_than_are_kept_shows_each_once() {
        for depth in 0..=2 {
            let root = tempfile::tempdir().unwrap();
            let config = FileConfig::new(root.path().join("sessions")).with_depth(depth).with_durability(Durability::None);
            let handler = FileHandler::open_dir(config).unwrap();
            let mut alive = BTreeSet::new();
            let longest = SessionId::parse(&"x".repeat(256)).unwrap();
            for id in (0..100).map(|_| SessionId::generate().unwrap()).chain([longest]) {
                let request = OpenRequest::optimistic().expecting(Expect::Fresh);
                let mut session = handler.open(&id, &request).await.unwrap();
                let record = Record::new("data", Ttl::from_secs(60));
                session.save(&Change::Write(record), WriteId::random().unwrap()).await.unwrap();
                alive.insert(id);
            }
            for (limit, ahead) in [(1, 1), (3, 7), (7, 3), (100, 100), (101, 10), (1000, 101)] {
                let (mut seen, mut after) = (Vec::new(), String::new());
                loop {
                    let page = handler.page(after, NonZeroU32::new(limit).unwrap(), ahead).unwrap();
                    seen.extend(page.sessions.into_iter().map(|session| session.id));
                    let Some(next) = page.next else { break };
                    after = next.0;
                }
                assert_eq!(seen.len(), alive.len(), "depth {depth}, pages of {limit}, {ahead} ahead");
                assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), alive);
            }
        }
    }
}
