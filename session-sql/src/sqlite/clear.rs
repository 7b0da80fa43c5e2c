//! Copying the log into the file, on a thread and by a connection of its own: writing goes on meanwhile.
//!
//! SQLite would have whichever commit finds the log long do that, and all that is to be written would wait for its syncs.

use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::thread;

use super::Shared;
use super::pen::Pen;
use super::place::{self, Log, Opened};

/// How often what was added meanwhile is copied, too. SQLite syncs the file only if nothing was added while it copied; the shorter
/// the rest, the likelier that is, and the less is left for those who write to wait for.
const PASSES: u32 = 4;

/// What is copied in the time of a sync or two.
const SHORT: i64 = 32;

/// Starts the thread, which ends with the returned end of its line.
pub(super) fn start(shared: Arc<Shared>, pen: Weak<Mutex<Pen>>) -> std::io::Result<mpsc::Sender<()>> {
    let (sender, calls) = mpsc::channel();
    let mut thread = Thread { shared, pen, opened: None };
    thread::Builder::new().name("session-sqlite-log".into()).spawn(move || {
        while calls.recv().is_ok() {
            if let Err(error) = thread.copy() {
                thread.opened = None;
                tracing::debug!(%error, "the log of the database could not be copied; it will be tried again");
            }
            if let Some(pen) = thread.pen.upgrade() {
                pen.lock().unwrap_or_else(PoisonError::into_inner).clear();
            }
        }
    })?;
    Ok(sender)
}

struct Thread {
    shared: Arc<Shared>,
    pen: Weak<Mutex<Pen>>,
    opened: Option<Opened>,
}

impl Thread {
    fn copy(&mut self) -> rusqlite::Result<()> {
        let place = &self.shared.place;
        self.opened.take_if(|opened| !place.leads_to(opened));
        let connection = match &self.opened {
            Some(opened) => &opened.connection,
            None => &self.opened.insert(place.open(true)?).connection,
        };
        for _ in 0..PASSES {
            place::checkpoint(connection, "PASSIVE")?;
            match place::checkpoint(connection, "NOOP")? {
                Log { rest, .. } if rest > SHORT => {}
                _ => break,
            }
        }
        Ok(())
    }
}
