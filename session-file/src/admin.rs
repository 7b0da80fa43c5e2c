//! Housekeeping and administration: collecting what has expired, listing, and who holds what.
//!
//! Nothing here waits for a lock, and nothing disturbs a holder.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use session_core::{Cursor, Error, ErrorKind, LockInfo, Page, Result, SessionAdmin, SessionId, SessionInfo};

use crate::dir::{Dir, Plain, Walk, fault, stat};
use crate::handler::FileHandler;
use crate::io::{SessionFile, Store, load, now, read_head, run};
use crate::layout::{HEADER, Header};
use crate::lock::{holder, parse_lock};

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
    if header.dead || header.second.is_none() {
        return Ok(true);
    }
    Ok(load(&file, false, OP)?.is_absent(now()))
}

/// The names that come next in a listing, so that not every page reads the whole directory.
#[derive(Debug)]
pub(crate) struct Listing {
    after: String,
    names: Vec<String>,
}

#[async_trait]
impl SessionAdmin for FileHandler {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        let (this, after) = (self.clone(), after.map(|cursor| cursor.0.clone()).unwrap_or_default());
        run(self.store.config.io, true, move || this.page(after, limit)).await?
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
            let held = store.dir.judge(&stat, OP)? == Plain::Ours && kernel_locks()?.0.contains_key(&stat.inode);
            if !held {
                return Ok(false);
            }
            let text = "a kernel lock ends only with its holder; end that process";
            Err(Error::new(ErrorKind::Unsupported, OP, text).with_holder(holder(&file, Duration::ZERO)))
        };
        run(self.store.config.io, false, work).await?
    }
}

impl FileHandler {
    fn page(&self, after: String, limit: NonZeroU32) -> Result<Page> {
        let store = &self.store;
        let cached = self.listing.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut names = match cached.filter(|listing| listing.after == after && !listing.names.is_empty()) {
            Some(listing) => listing.names,
            None => names_after(&store.dir, &after)?,
        };
        let now = now();
        let mut sessions = Vec::new();
        let mut last = after;
        let mut seen = 0;
        loop {
            if seen == names.len() {
                // A full page of names may end before the names do.
                names = if seen < AHEAD { Vec::new() } else { names_after(&store.dir, &last)? };
                seen = 0;
                if names.is_empty() {
                    return Ok(Page::new(sessions, None));
                }
            }
            if sessions.len() >= limit.get() as usize {
                break;
            }
            last.clone_from(&names[seen]);
            seen += 1;
            if let Some(info) = describe(store, &last, now) {
                sessions.push(info);
            }
        }
        names.drain(..seen);
        let listing = Listing { after: last.clone(), names };
        *self.listing.lock().unwrap_or_else(PoisonError::into_inner) = Some(listing);
        Ok(Page::new(sessions, Some(Cursor(last))))
    }

    fn held(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        let (held, waiting) = kernel_locks()?;
        let mut walk = self.store.dir.walk();
        let mut locks = Vec::new();
        while let Some((id, inode)) = walk.next()? {
            if !held.contains_key(&inode) {
                continue;
            }
            // The numbers of inodes are unique within one file system only; the file itself knows better who holds it.
            let file = self.store.dir.open_file(&self.store.dir.name(&id), false, "locks");
            let Ok(Some(file)) = file else { continue };
            let ours =
                stat(&file).is_ok_and(|stat| self.store.dir.judge(&stat, "locks").is_ok_and(|plain| plain == Plain::Ours));
            if ours {
                let waiting = waiting.get(&inode).copied().unwrap_or_default();
                locks.push(LockInfo::new(id, holder(&file, Duration::ZERO), None, Some(waiting)));
            }
            if locks.len() >= limit.get() as usize {
                break;
            }
        }
        Ok(locks)
    }
}

/// Returns the inodes with a kernel lock, and how many stand in line for each.
fn kernel_locks() -> Result<(BTreeMap<u64, u64>, BTreeMap<u64, u64>)> {
    let text = std::fs::read_to_string("/proc/locks").map_err(|cause| {
        Error::new(ErrorKind::Unsupported, "locks", "the kernel's list of locks, /proc/locks, cannot be read")
            .with_source(cause)
    })?;
    let (mut held, mut waiting) = (BTreeMap::new(), BTreeMap::new());
    for lock in text.lines().filter_map(parse_lock) {
        if lock.ticket {
            *waiting.entry(lock.inode).or_insert(0) += 1;
        } else {
            held.insert(lock.inode, lock.pid);
        }
    }
    Ok((held, waiting))
}

/// Returns the next names after `after` in the order of their paths, at most [`AHEAD`].
fn names_after(dir: &Dir, after: &str) -> Result<Vec<String>> {
    let mut next = BTreeSet::new();
    let mut pending = vec![(String::new(), 0)];
    while let Some((path, level)) = pending.pop() {
        // Directories sort as their contents do, so those before the cursor, and those after a full page, need no look.
        let before = !path.is_empty() && path.as_str() < after && !after.starts_with(&path);
        let beyond = next.len() >= AHEAD && next.last().is_some_and(|last: &String| *last < path);
        if before || beyond {
            continue;
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
                    if next.len() > AHEAD {
                        next.pop_last();
                    }
                }
            }
        }
        below.sort_unstable_by(|a, b| b.cmp(a));
        pending.append(&mut below);
    }
    Ok(next.into_iter().collect())
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
