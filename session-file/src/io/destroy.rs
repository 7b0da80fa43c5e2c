//! How a session file goes: by its holder, by a logout that waits for nobody, by the collector.
//!
//! Only the owner of the lock removes a file; whoever cannot have the lock marks the file instead, and nothing takes the mark off.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use session_core::{Error, ErrorKind, Record, Result, SessionId};

use super::bytes::{read_head, sync, write_at};
use super::claim::Claim;
use super::open::Manner;
use super::read::{Content, load};
use super::{OPEN_AGAIN, SessionFile};
use crate::config::Durability;
use crate::dir::{Plain, fault, mark_dead, stat};
use crate::layout::{DEAD, DEAD_AT, HEADER, Header};
use crate::store::{Store, now};
use crate::wait::{self, Attempt};

/// After this time nobody is still about to write a file that he created.
const FORGOTTEN: Duration = Duration::from_secs(60);

impl SessionFile {
    /// Removes the record with its file, and returns it if it lived.
    pub(crate) fn destroy(mut self) -> Result<Option<Record>> {
        const OP: &str = "destroy";
        let creating = self.creating;
        let content = match self.reload(OP) {
            // Damage within a file of ours must not keep a logout from removing it.
            Err(error) if error.kind() == ErrorKind::Corrupt && self.second.is_some() => Content::NEW,
            content => content?,
        };
        let removed = self.remove(OP)?;
        let record = content.live(now()).map(|(record, _)| record).filter(|_| !creating);
        if removed {
            return Ok(record);
        }
        // Somebody took the file away by hand. What stands under the name now has to go too, or the logout would be undone.
        let (store, id) = (Arc::clone(&self.store), self.id.clone());
        drop(self);
        Ok(destroy(&store, &id)?.or(record))
    }

    /// Removes the file of `id` if its record is past its deadline or destroyed, and says whether it was an expired one; `None` if it
    /// was left. Who is held or alive is left alone, and so is what is too young to be forgotten.
    pub(crate) fn collect(store: &Arc<Store>, id: &SessionId) -> Result<Option<bool>> {
        const OP: &str = "gc";
        let name = store.dir.name(id);
        let Some(file) = store.dir.open_file(&name, true, OP)? else { return Ok(None) };
        let Ok(file) = Claim::take(file, OP)? else { return Ok(None) };
        let stat = stat(&*file).map_err(|cause| fault(OP, cause))?;
        if store.dir.judge(&stat, OP)? != Plain::Ours {
            return Ok(None);
        }
        // Only now is what it says final.
        let mut content = load(&file, true, OP)?;
        content.header.dead |= stat.dead;
        let forgotten = match content.current {
            _ if content.header.dead => true,
            Some((entry, _)) => now() >= entry.deadline,
            None => is_forgotten(&file),
        };
        let removed = forgotten && store.dir.unlink(&name, &file, OP)?;
        drop(file);
        if removed && store.config.durability == Durability::Full {
            store.dir.sync(&name).map_err(|cause| fault(OP, cause))?;
        }
        Ok(removed.then(|| content.current.is_some() && !content.header.dead))
    }

    /// Removes the file, and makes that last where it is asked for; says whether it still had its name.
    fn remove(&mut self, op: &'static str) -> Result<bool> {
        let (dir, durability) = (&self.store.dir, self.store.config.durability);
        let unknown = |error: Error| error.with_kind(ErrorKind::Unknown);
        if durability >= Durability::Data && self.current.is_some() {
            // A removed name may come back after a power cut; the dead byte does not go again.
            write_at(&self.file, &[DEAD], DEAD_AT).map_err(|cause| unknown(fault(op, cause)))?;
            sync(&self.file).map_err(|cause| unknown(fault(op, cause)))?;
        }
        let name = dir.name(&self.id);
        let removed = dir.unlink(&name, &self.file, op).map_err(unknown)?;
        self.empty = false;
        if removed && durability == Durability::Full {
            dir.sync(&name).map_err(|cause| unknown(fault(op, cause)))?;
        }
        Ok(removed)
    }

    /// Removes the file if it was destroyed under its holder, who is the owner of the lock.
    pub(crate) fn bury(&self) {
        if stat(&*self.file).is_ok_and(|stat| stat.dead) {
            let _ = self.store.dir.unlink(&self.store.dir.name(&self.id), &self.file, "close");
        }
    }
}

impl Drop for SessionFile {
    fn drop(&mut self) {
        if self.empty {
            let _ = self.store.dir.unlink(&self.store.dir.name(&self.id), &self.file, "close");
        }
    }
}

/// Removes the record of `id` without waiting for anybody, and returns it if it lived.
pub(crate) fn destroy(store: &Arc<Store>, id: &SessionId) -> Result<Option<Record>> {
    const OP: &str = "destroy";
    let dir = &store.dir;
    let name = dir.name(id);
    let unknown = |cause: io::Error| fault(OP, cause).with_kind(ErrorKind::Unknown);
    // One destroyer at a time, so that one of them is told what was there. What is wrong with the file is said below.
    let gate = dir.open_file(&name, true, OP).ok().flatten();
    gate.as_ref().inspect(|file| wait::pass_alone(file));
    for _ in 0..OPEN_AGAIN {
        let file = match SessionFile::open(store, id, None, Manner::PASSING) {
            Ok(Attempt::Done(None)) => return Ok(None),
            Ok(Attempt::Done(Some((file, _)))) => return file.destroy(),
            Ok(Attempt::Busy { file, .. }) => file,
            Err(error) if error.kind() == ErrorKind::Corrupt && remove_damaged(store, &name)? => return Ok(None),
            Err(error) => return Err(error),
        };
        let before = stat(&file).map_err(|cause| fault(OP, cause))?;
        if before.dead {
            return Ok(None);
        }
        mark_dead(&file).map_err(unknown)?;
        // Read after the mark, which every write asks for when it is done: what was answered with success is in here.
        let after = load(&file, false, OP);
        if before.size >= HEADER {
            write_at(&file, &[DEAD], DEAD_AT).map_err(unknown)?;
            if store.config.durability >= Durability::Data {
                sync(&file).map_err(unknown)?;
            }
        }
        let file = match Claim::take(file, OP)? {
            Ok(claim) => {
                dir.unlink(&name, &claim, OP).map_err(|error| error.with_kind(ErrorKind::Unknown))?;
                claim.release()
            }
            Err(file) => file,
        };
        let stat = stat(&file).map_err(|cause| fault(OP, cause))?;
        let removed = match after {
            Ok(content) => content.live(now()).map(|(record, _)| record),
            Err(error) if error.kind() == ErrorKind::Corrupt => None,
            Err(error) => return Err(error),
        };
        // The holder may have removed the file himself, and somebody may have begun anew.
        if stat.links == 0 && removed.is_none() {
            continue;
        }
        return Ok(removed);
    }
    Err(Error::new(ErrorKind::Unknown, OP, "session files came and went under the name"))
}

/// Removes a file of ours in which no entry is whole: damage must not keep a logout from removing it. Says whether it did.
fn remove_damaged(store: &Store, name: &str) -> Result<bool> {
    const OP: &str = "destroy";
    let Some(file) = store.dir.open_file(name, true, OP)? else { return Ok(false) };
    let stat = stat(&file).map_err(|cause| fault(OP, cause))?;
    if store.dir.judge(&stat, OP)? != Plain::Ours {
        return Ok(false);
    }
    let Ok(file) = Claim::take(file, OP)? else { return Ok(false) };
    let mut head = [0; HEADER as usize];
    let length = read_head(&file, &mut head).map_err(|cause| fault(OP, cause))?;
    let ours = Header::decode(&head[..length]).is_ok_and(|header| header.second.is_some());
    Ok(ours && store.dir.unlink(name, &file, OP)?)
}

/// Whether a file that nobody has written yet is old enough that nobody will.
pub(crate) fn is_forgotten(file: &File) -> bool {
    let changed = file.metadata().and_then(|meta| meta.modified());
    changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age > FORGOTTEN))
}
