//! `ls`, `locks`, `unlock`, `gc`: a store as its administrator sees it.
//!
//! A live id is never printed. Behind `hash_ids` the store knows only hashes, and those are the handles; without it a handle is a
//! short hash, made here.

use std::fmt::Write as _;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::json;
use session_core::{HashIds, SessionHandler, SessionId};
use sha2::{Digest, Sha256};

use crate::args::{GcArgs, LocksArgs, LsArgs, UnlockArgs};
use crate::failure::Failure;
use crate::output::{Align, Cell, Output, Style, Table, bytes, span, thousands};
use crate::store::{PAGE, admin, session_id};

/// How this store's ids may be shown.
#[derive(Clone, Copy, Debug)]
enum Handles {
    /// They are hashes already.
    Stored,
    /// They are live ids, and are hashed for show.
    Hashed,
}

impl Handles {
    fn of(dsn: &str) -> Result<Self, Failure> {
        Ok(if sessionkit::hashes_ids(dsn)? { Self::Stored } else { Self::Hashed })
    }

    fn show(self, id: &SessionId) -> String {
        match self {
            Self::Stored => id.as_str().to_owned(),
            Self::Hashed => {
                let hash = Sha256::digest(id.as_str());
                hash[..8].iter().fold(String::from("sid:"), |mut text, byte| {
                    let _ = write!(text, "{byte:02x}");
                    text
                })
            }
        }
    }
}

pub(crate) async fn ls(args: LsArgs, out: &Output) -> Result<(), Failure> {
    let handles = Handles::of(&args.dsn)?;
    let handler = sessionkit::handler(&args.dsn).await?;
    let admin = admin(&handler)?;
    let mut table = Table::new(&[("handle", Align::Left), ("bytes", Align::Right), ("left", Align::Right)]);
    // Printed page by page: wide enough for what may still come.
    table.widen(1, "1023.9 KiB".len());
    table.widen(2, "364 d 23 h".len());
    let mut rest = args.limit.map_or(u64::MAX, |limit| limit.get().into());
    let mut after = None;
    let mut any = false;
    while let Some(limit) = u32::try_from(rest.min(PAGE.get().into())).ok().and_then(NonZeroU32::new) {
        let page = admin.list(after.as_ref(), limit).await?;
        for session in page.sessions.iter().take(usize::try_from(rest).unwrap_or(usize::MAX)) {
            rest -= 1;
            let handle = handles.show(&session.id);
            if out.is_json() {
                let left = u64::try_from(session.left.as_millis()).unwrap_or(u64::MAX);
                out.object(&json!({"handle": handle, "bytes": session.bytes, "left_ms": left}))?;
            } else {
                table.row(vec![Cell::new(handle), Cell::new(bytes(session.bytes)), Cell::new(span(session.left))]);
            }
        }
        any |= !table.is_empty();
        table.print(out)?;
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    if !any && !out.is_json() {
        out.raw("no sessions")?;
    }
    Ok(())
}

pub(crate) async fn locks(args: LocksArgs, out: &Output) -> Result<(), Failure> {
    let handles = Handles::of(&args.dsn)?;
    let handler = sessionkit::handler(&args.dsn).await?;
    let locks = admin(&handler)?.locks(args.limit).await?;
    let mut table = Table::new(&[
        ("handle", Align::Left),
        ("holder", Align::Left),
        ("held for", Align::Right),
        ("lease left", Align::Right),
        ("waiting", Align::Right),
    ]);
    for lock in &locks {
        let handle = handles.show(&lock.id);
        let held = lock.holder.as_ref().map(|holder| SystemTime::now().duration_since(holder.since).unwrap_or_default());
        if out.is_json() {
            out.object(&json!({
                "handle": handle,
                "holder": lock.holder.as_ref().map(|holder| &holder.process),
                "held_ms": held.map(millis),
                "lease_left_ms": lock.lease_left.map(millis),
                "waiting": lock.waiting,
            }))?;
            continue;
        }
        let unknown = || Cell::styled("?", Style::Dim);
        table.row(vec![
            Cell::new(handle),
            lock.holder.as_ref().map_or_else(unknown, |holder| Cell::new(&holder.process)),
            held.map_or_else(unknown, |held| Cell::new(span(held))),
            lock.lease_left.map_or_else(|| Cell::styled("no limit", Style::Dim), |left| Cell::new(span(left))),
            lock.waiting.map_or_else(unknown, |waiting| Cell::new(waiting.to_string())),
        ]);
    }
    if !out.is_json() {
        if table.is_empty() { out.raw("no locks")? } else { table.print(out)? }
    }
    Ok(())
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) async fn unlock(args: UnlockArgs, out: &Output) -> Result<(), Failure> {
    let handles = Handles::of(&args.dsn)?;
    let mut handler = sessionkit::handler(&args.dsn).await?;
    if matches!(handles, Handles::Stored) {
        // The layer takes both: a live id, and a handle as it is listed.
        handler = Arc::new(HashIds::new(handler));
    }
    let admin = admin(&handler)?;
    let id = if args.id.starts_with("sid:") {
        let locks = admin.locks(NonZeroU32::MAX).await?;
        locks.into_iter().map(|lock| lock.id).find(|id| handles.show(id) == args.id)
    } else {
        Some(session_id(&args.id)?)
    };
    let broken = match id {
        Some(id) => admin.unlock(&id).await?,
        None => false,
    };
    if out.is_json() {
        out.object(&json!({"unlocked": broken}))?;
    }
    match broken {
        true if out.is_json() => Ok(()),
        true => Ok(out.raw("unlocked")?),
        false => Err(Failure::no("nobody holds it")),
    }
}

pub(crate) async fn gc(args: GcArgs, out: &Output) -> Result<(), Failure> {
    let handler = sessionkit::handler(&args.dsn).await?;
    let bar = out.progress(0, "  {spinner} {human_pos} freed  {per_sec}  {elapsed}");
    let mut freed = 0u64;
    loop {
        let rest = args.limit.map_or(u64::MAX, |limit| u64::from(limit.get()).saturating_sub(freed));
        let Some(batch) = NonZeroU32::new(u32::try_from(rest).unwrap_or(u32::MAX).min(PAGE.get())) else { break };
        let now = handler.gc(batch).await?;
        freed += now;
        bar.inc(now);
        if now == 0 {
            break;
        }
    }
    bar.finish_and_clear();
    if out.is_json() {
        out.object(&json!({"freed": freed}))?;
    } else {
        out.raw(&format!("{} freed", thousands(freed)))?;
    }
    Ok(())
}
