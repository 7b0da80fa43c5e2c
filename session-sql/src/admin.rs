//! The table as its administrator sees it: sessions and locks in the order of their keys, and breaking a lock.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;

use async_trait::async_trait;
use session_core::{Cursor, LockInfo, Page, Result, SessionAdmin, SessionId, SessionInfo};

use crate::store::Store;

#[derive(Clone)]
pub(crate) struct SqlAdmin {
    store: Arc<Store>,
}

impl SqlAdmin {
    pub(crate) fn over(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// Reads the id back from a key; what somebody else wrote under our prefix has none.
    fn id(&self, key: &str) -> Option<SessionId> {
        SessionId::parse(key.strip_prefix(&*self.store.config.prefix)?)
    }
}

impl fmt::Debug for SqlAdmin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlAdmin").finish_non_exhaustive()
    }
}

#[async_trait]
impl SessionAdmin for SqlAdmin {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        let after = after.map(|Cursor(key)| key.as_str());
        let listed = self.store.database.list(&self.store.config.prefix, after, limit.get()).await;
        let listed = listed.map_err(|failure| failure.into_error("list"))?;
        let full = listed.len() >= limit.get() as usize;
        let next = listed.last().filter(|_| full).map(|last| Cursor(last.key.clone()));
        let info = |one: crate::database::Listed| Some(SessionInfo::new(self.id(&one.key)?, one.bytes, one.left));
        Ok(Page::new(listed.into_iter().filter_map(info).collect(), next))
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        let locks = self.store.database.locks(&self.store.config.prefix, limit.get()).await;
        let locks = locks.map_err(|failure| failure.into_error("locks"))?;
        let info = |one: crate::database::Locked| {
            // How many stand behind the one next in line nobody knows; without him nobody does.
            let waiting = (!one.wanted).then_some(0);
            Some(LockInfo::new(self.id(&one.key)?, one.holder, Some(one.left), waiting))
        };
        Ok(locks.into_iter().filter_map(info).collect())
    }

    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        self.store.database.unlock(&self.store.key(id)).await.map_err(|failure| failure.into_error("unlock"))
    }
}
