//! memcached as its administrator sees it: sessions and locks by the listing of the LRU crawler, and breaking a lock.
//!
//! Such a listing names keys and nothing else, in no order that would last, so each page is made of a listing of its own. Nothing
//! here is part of a request.

use std::collections::BinaryHeap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use session_core::{Cursor, Error, ErrorKind, LockInfo, Page, Result, SessionAdmin, SessionId, SessionInfo};

use crate::item::{Body, Keys, Named, alias_of_lock, holder, left, name_of_lock, name_of_record};
use crate::store::{Store, get};
use crate::transport::{Command, Failure, Item, Read};

/// The least that a page may have: each costs a listing of all keys.
const PAGE: usize = 5000;

/// How many items are asked for in one flight, so that the answers fit on the way, and about how many bytes.
const FLIGHT: usize = 200;
const BYTES: u64 = 1 << 20;

#[derive(Clone)]
pub(crate) struct MemcacheAdmin {
    store: Arc<Store>,
}

impl MemcacheAdmin {
    pub(crate) fn over(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// Returns the first `limit` keys of a server behind `after` that are of interest, in order.
    async fn keys(
        &self,
        server: usize,
        after: Option<&str>,
        limit: usize,
        wanted: impl Fn(&str) -> bool + Send + Sync,
    ) -> Result<Vec<String>, Failure> {
        let mut first: BinaryHeap<String> = BinaryHeap::new();
        let mut take = |key: &str| {
            if after.is_some_and(|after| key <= after) || !wanted(key) {
                return;
            }
            if first.len() < limit {
                first.push(key.to_owned());
            } else if first.peek().is_some_and(|last| key < last.as_str()) {
                first.pop();
                first.push(key.to_owned());
            }
        };
        self.store.transport.keys(server, &self.store.config.prefix, &mut take).await?;
        let mut keys = first.into_sorted_vec();
        // It may list an item twice that is being stored anew.
        keys.dedup();
        Ok(keys)
    }

    /// Reads items of a server in one flight, in the order of their keys.
    async fn items(&self, server: usize, keys: &[&String], what: Read) -> Result<Vec<Option<Item>>, Failure> {
        let commands: Vec<Command> = keys.iter().map(|key| get(&Arc::from(key.as_str()), what)).collect();
        let mut answers = self.store.transport.exchange(server, commands, None).await?;
        keys.iter().map(|_| answers.item()).collect()
    }

    /// Returns what is live of these keys. That something is a trace only its bytes tell.
    async fn sessions(&self, server: usize, keys: &[String]) -> Result<Vec<SessionInfo>, Failure> {
        let prefix = &*self.store.config.prefix;
        let mut sessions = Vec::new();
        for some in keys.chunks(FLIGHT) {
            let some: Vec<&String> = some.iter().collect();
            let sizes = self.items(server, &some, Read::Size).await?;
            let mut flights: Vec<(u64, Vec<&String>)> = Vec::new();
            for (key, item) in some.into_iter().zip(sizes) {
                let Some(Item { size, .. }) = item else { continue };
                match flights.last_mut().filter(|(bytes, _)| bytes + size <= BYTES) {
                    Some((bytes, few)) => {
                        *bytes += size;
                        few.push(key);
                    }
                    None => flights.push((size, vec![key])),
                }
            }
            for (_, few) in flights {
                let items = self.items(server, &few, Read::Value).await?;
                for (key, item) in few.into_iter().zip(items) {
                    let (Some(name), Some(item)) = (name_of_record(prefix, key), item) else { continue };
                    sessions.extend(info(name, item));
                }
            }
        }
        Ok(sessions)
    }
}

fn info(name: Named, item: Item) -> Option<SessionInfo> {
    let life = life(&item);
    let Body::Live { data, alias, .. } = Body::parse(item.value) else { return None };
    let id = match name {
        Named::Id(id) => id,
        Named::Hashed => alias?,
    };
    Some(SessionInfo::new(id, data.len() as u64, life))
}

fn life(item: &Item) -> Duration {
    item.seconds.map_or(Duration::MAX, |seconds| left(seconds).as_duration())
}

impl fmt::Debug for MemcacheAdmin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemcacheAdmin").finish_non_exhaustive()
    }
}

/// A place in a listing: which server, and behind which key.
fn place(cursor: Option<&Cursor>) -> Result<(usize, Option<&str>)> {
    let Some(Cursor(text)) = cursor else { return Ok((0, None)) };
    let foreign = || Error::new(ErrorKind::Config, "list", "the cursor does not come from this store");
    let (server, key) = text.split_once(':').ok_or_else(foreign)?;
    Ok((server.parse().map_err(|_| foreign())?, Some(key).filter(|key| !key.is_empty())))
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl SessionAdmin for MemcacheAdmin {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        let (mut server, after) = place(after)?;
        let mut after = after.map(str::to_owned);
        let prefix = &*self.store.config.prefix;
        let limit = (limit.get() as usize).max(PAGE);
        let mut sessions = Vec::new();
        while server < self.store.transport.servers() {
            let wanted = |key: &str| name_of_record(prefix, key).is_some();
            let keys = self.keys(server, after.as_deref(), limit, wanted).await;
            let keys = keys.map_err(|failure| failure.into_error("list"))?;
            sessions.extend(self.sessions(server, &keys).await.map_err(|failure| failure.into_error("list"))?);
            (server, after) = match keys.last() {
                Some(last) if keys.len() == limit => (server, Some(last.clone())),
                _ => (server + 1, None),
            };
            if sessions.len() >= limit && server < self.store.transport.servers() {
                let key = after.as_deref().unwrap_or_default();
                return Ok(Page::new(sessions, Some(Cursor(format!("{server}:{key}")))));
            }
        }
        Ok(Page::new(sessions, None))
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        let prefix = &*self.store.config.prefix;
        let limit = limit.get() as usize;
        let mut locks = Vec::new();
        for server in 0..self.store.transport.servers() {
            let keys = self.keys(server, None, limit, |key| name_of_lock(prefix, key).is_some()).await;
            let keys = keys.map_err(|failure| failure.into_error("locks"))?;
            let mut items = Vec::with_capacity(keys.len());
            for some in keys.chunks(FLIGHT) {
                let some = self.items(server, &some.iter().collect::<Vec<_>>(), Read::Value).await;
                items.extend(some.map_err(|failure| failure.into_error("locks"))?);
            }
            for (key, item) in keys.iter().zip(items) {
                let (Some(item), Some(name)) = (item, name_of_lock(prefix, key)) else { continue };
                let id = match name {
                    Named::Id(id) => Some(id),
                    Named::Hashed => alias_of_lock(&item.value),
                };
                let Some(id) = id else { continue };
                let lease_left = item.seconds.map(|seconds| left(seconds).as_duration());
                locks.push(LockInfo::new(id, holder(&item.value), lease_left, None));
            }
        }
        locks.truncate(limit);
        Ok(locks)
    }

    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        let place = self.store.at(id);
        let Keys { lock, .. } = &place.keys;
        let delete = Command::Delete { key: lock.clone(), unchanged: None };
        let answers = self.store.ask(&place, vec![delete], None).await;
        let deleted = answers.and_then(|mut answers| answers.stored());
        deleted.map(|deleted| deleted.is_some()).map_err(|failure| failure.into_error("unlock"))
    }
}
