//! Redis as its administrator sees it: sessions and locks by `SCAN`, and breaking a lock.
//!
//! `SCAN` returns what is there throughout at least once, and never blocks the server for long; nothing here is part of a request.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::{Pipeline, ServerErrorKind, Value};
use session_core::{Cursor, Error, ErrorKind, LockInfo, Page, Result, SessionAdmin, SessionId, SessionInfo};

use crate::answers::{array, bytes, int};
use crate::layout::{HEADER, Keys, LOCK, holder, is_live};
use crate::link::Failure;
use crate::store::Store;

/// How many keys a server looks at for one answer.
const LOOK_AT: u32 = 500;

#[derive(Clone)]
pub(crate) struct RedisAdmin {
    store: Arc<Store>,
}

impl RedisAdmin {
    pub(crate) fn over(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// Sends commands to the server at `place` in the order of the listing; `None` behind the last.
    async fn ask(&self, place: usize, commands: &Pipeline) -> Result<Option<Vec<Value>>, Failure> {
        let Some(answers) = self.store.servers.ask_at(place, commands).await? else { return Ok(None) };
        // A single key that cannot be read is skipped; a listing that may read none would look empty.
        let denied = |answer: &Value| match answer {
            Value::ServerError(error) if error.kind() == Some(ServerErrorKind::NoPerm) => Some(Failure::refused(error)),
            _ => None,
        };
        answers.iter().find_map(denied).map_or(Ok(Some(answers)), Err)
    }

    /// Returns the keys that match beside the next place of the listing.
    async fn scan(&self, at: &Place, suffix: &str) -> Result<Option<(Place, Vec<String>)>, Failure> {
        let pattern = format!("{}{{*}}{suffix}", escape(&self.store.config.prefix));
        let mut commands = Pipeline::new();
        commands.cmd("SCAN").arg(&at.cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(LOOK_AT);
        let Some(answers) = self.ask(at.server, &commands).await? else { return Ok(None) };
        let mut parts = array(answers.into_iter().next().unwrap_or(Value::Nil))?.into_iter();
        let cursor = parts.next().and_then(bytes).and_then(|cursor| String::from_utf8(cursor).ok());
        let cursor = cursor.ok_or_else(|| Failure::unexpected("SCAN answered without a cursor"))?;
        let keys = array(parts.next().unwrap_or(Value::Nil))?;
        let keys = keys.into_iter().filter_map(|key| String::from_utf8(bytes(key)?).ok()).collect();
        let next = if cursor == "0" { Place { server: at.server + 1, cursor } } else { Place { server: at.server, cursor } };
        Ok(Some((next, keys)))
    }

    async fn sessions(&self, server: usize, keys: Vec<String>) -> Result<Vec<SessionInfo>, Failure> {
        let mut commands = Pipeline::with_capacity(3 * keys.len());
        for key in &keys {
            commands.cmd("GETRANGE").arg(key).arg(0).arg(HEADER - 1);
            commands.cmd("STRLEN").arg(key).cmd("PTTL").arg(key);
        }
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let mut answers = self.ask(server, &commands).await?.unwrap_or_default().into_iter();
        let mut sessions = Vec::new();
        for key in keys {
            let (head, length, left) = (answers.next(), answers.next(), answers.next());
            // What is not ours under a key of this form is not a session.
            let Some(head) = head.and_then(bytes).filter(|head| is_live(head)) else { continue };
            let (Some(Ok(length)), Some(Ok(left))) = (length.as_ref().map(int), left.as_ref().map(int)) else { continue };
            let Some(id) = Keys::id(&self.store.config.prefix, &key).filter(|_| left > 0) else { continue };
            let bytes = u64::try_from(length).unwrap_or(0).saturating_sub(head.len() as u64);
            sessions.push(SessionInfo::new(id, bytes, Duration::from_millis(u64::try_from(left).unwrap_or(0))));
        }
        Ok(sessions)
    }

    async fn held(&self, server: usize, keys: Vec<String>) -> Result<Vec<LockInfo>, Failure> {
        let keys: Vec<Keys> = keys.into_iter().filter_map(|key| key.strip_suffix(LOCK).map(Keys::of)).collect();
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let mut commands = Pipeline::with_capacity(3 * keys.len());
        for keys in &keys {
            commands.cmd("GET").arg(keys.lock()).cmd("PTTL").arg(keys.lock()).cmd("LLEN").arg(keys.queue());
        }
        let mut answers = self.ask(server, &commands).await?.unwrap_or_default().into_iter();
        let mut locks = Vec::new();
        for keys in keys {
            let (owner, left, waiting) = (answers.next(), answers.next(), answers.next());
            let Some(owner) = owner.and_then(bytes) else { continue };
            let Some(id) = Keys::id(&self.store.config.prefix, keys.record()) else { continue };
            let left = left.and_then(|left| u64::try_from(int(&left).ok()?).ok()).map(Duration::from_millis);
            let waiting = waiting.and_then(|waiting| u64::try_from(int(&waiting).ok()?).ok());
            locks.push(LockInfo::new(id, holder(&owner), left, waiting));
        }
        Ok(locks)
    }
}

impl fmt::Debug for RedisAdmin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisAdmin").finish_non_exhaustive()
    }
}

/// A place in a listing: which server, and its own cursor. In between lies nothing, so a page may be longer than was asked for.
struct Place {
    server: usize,
    cursor: String,
}

impl Place {
    fn parse(cursor: Option<&Cursor>) -> Result<Self> {
        let Some(Cursor(text)) = cursor else { return Ok(Self { server: 0, cursor: "0".into() }) };
        let foreign = || Error::new(ErrorKind::Config, "list", "the cursor does not come from this store");
        let (server, cursor) = text.split_once(':').ok_or_else(foreign)?;
        let server = server.parse().map_err(|_| foreign())?;
        cursor.parse::<u64>().map_err(|_| foreign())?;
        Ok(Self { server, cursor: cursor.into() })
    }

    fn cursor(&self) -> Cursor {
        Cursor(format!("{}:{}", self.server, self.cursor))
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionAdmin for RedisAdmin {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        let mut at = Place::parse(after)?;
        let mut sessions = Vec::new();
        loop {
            let server = at.server;
            let found = self.scan(&at, "").await.map_err(|failure| failure.into_error("list"))?;
            let Some((next, keys)) = found else { return Ok(Page::new(sessions, None)) };
            sessions.extend(self.sessions(server, keys).await.map_err(|failure| failure.into_error("list"))?);
            at = next;
            if sessions.len() >= limit.get() as usize {
                return Ok(Page::new(sessions, Some(at.cursor())));
            }
        }
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        let mut at = Place::parse(None)?;
        let mut locks = Vec::new();
        loop {
            let server = at.server;
            let found = self.scan(&at, LOCK).await.map_err(|failure| failure.into_error("locks"))?;
            let Some((next, keys)) = found else { return Ok(locks) };
            for lock in self.held(server, keys).await.map_err(|failure| failure.into_error("locks"))? {
                // A scan may return a key twice.
                if !locks.iter().any(|known: &LockInfo| known.id == lock.id) {
                    locks.push(lock);
                }
            }
            locks.truncate(limit.get() as usize);
            if locks.len() == limit.get() as usize {
                return Ok(locks);
            }
            at = next;
        }
    }

    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        let keys = self.store.keys(id);
        let args: [&[u8]; 3] = [&[b'-'; 32], b"0", b"1"];
        let answer = self.store.run(&keys, &self.store.scripts.release, &args).await;
        let had = answer.and_then(|answer| int(&answer)).map_err(|failure| failure.into_error("unlock"))?;
        Ok(had == 1)
    }
}

/// Takes the meaning from characters that a pattern would give one.
fn escape(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len());
    for c in prefix.chars() {
        if r"*?[]^\".contains(c) {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern
}
