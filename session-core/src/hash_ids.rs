//! A store that never sees a live id: it is given a hash instead, so that who reads the store, its backups or its logs can
//! enter no session.
//!
//! This layer knows nothing of records: what `open` returns is the opening of the handler below, as it is.

use std::num::NonZeroU32;

use async_trait::async_trait;
use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Cursor, LockInfo, OpenRequest, OpenSession, Page, SessionAdmin, SessionHandler};
use crate::id::{SessionId, write_bits};

/// Keeps this hash apart from every other use of SHA-256 on the same id. Changing it loses every stored session.
const DOMAIN: &[u8] = b"sessionkit session id v1\0";

/// The length of a hashed id: 256 bits, five to a character.
const HASHED_LEN: usize = 52;

/// Gives the handler below the hash of each id.
///
/// The hash is SHA-256 over a fixed prefix and the id, as 52 characters of `[0-9a-v]`, so it is an accepted id itself. It has no
/// key and no salt: the 160 random bits of a generated id cannot be guessed, and a lookup must find the same hash in
/// every process. Ids that were made up elsewhere and can be guessed gain nothing from it.
///
/// Listings show the hashes; [`hash`](Self::hash) finds the entry of an id that is known.
#[derive(Clone, Debug)]
pub struct HashIds<H> {
    inner: H,
}

impl<H> HashIds<H> {
    /// Puts the layer before `inner`.
    pub fn new(inner: H) -> Self {
        Self { inner }
    }
}

impl HashIds<()> {
    /// Returns the id under which the store below knows `id`.
    ///
    /// # Panics
    /// Never: what it makes is always an accepted id.
    #[must_use]
    pub fn hash(id: &SessionId) -> SessionId {
        let digest = Sha256::new().chain_update(DOMAIN).chain_update(id.as_str()).finalize();
        // 256 bits are 51 characters and one bit.
        let mut text = [0u8; HASHED_LEN];
        write_bits(&digest, &mut text);
        SessionId::written(&text)
    }
}

/// Whether `id` may have come out of a listing of the store below.
fn looks_hashed(id: &SessionId) -> bool {
    let text = id.as_str();
    text.len() == HASHED_LEN && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'v'))
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<H: SessionHandler> SessionHandler for HashIds<H> {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        self.inner.open(&HashIds::hash(id), request).await
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.inner.gc(limit).await
    }

    fn admin(&self) -> Option<&dyn SessionAdmin> {
        self.inner.admin().map(|_| self as &dyn SessionAdmin)
    }
}

impl<H: SessionHandler> HashIds<H> {
    fn below(&self) -> Result<&dyn SessionAdmin> {
        self.inner.admin().ok_or_else(|| Error::new(ErrorKind::Unsupported, "admin", "the store cannot be listed"))
    }
}

/// Sessions and locks are listed under their hashes.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<H: SessionHandler> SessionAdmin for HashIds<H> {
    async fn list(&self, after: Option<&Cursor>, limit: NonZeroU32) -> Result<Page> {
        self.below()?.list(after, limit).await
    }

    async fn locks(&self, limit: NonZeroU32) -> Result<Vec<LockInfo>> {
        self.below()?.locks(limit).await
    }

    /// Takes a live id, or an id as it is listed.
    async fn unlock(&self, id: &SessionId) -> Result<bool> {
        let below = self.below()?;
        if below.unlock(&HashIds::hash(id)).await? {
            return Ok(true);
        }
        if looks_hashed(id) { below.unlock(id).await } else { Ok(false) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::Expect;
    use crate::memory::MemoryHandler;
    use crate::record::{Change, Record, WriteId, Written};
    use crate::ttl::Ttl;
    use std::time::Duration;

    const LEASE: Duration = Duration::from_secs(30);

    fn exclusive() -> OpenRequest {
        OpenRequest::exclusive(Duration::ZERO, LEASE)
    }

    async fn one_session() -> (HashIds<MemoryHandler>, MemoryHandler, SessionId) {
        let store = MemoryHandler::new();
        let handler = HashIds::new(store.clone());
        let id = SessionId::generate().unwrap();
        let mut fresh = handler.open(&id, &exclusive().expecting(Expect::Fresh)).await.unwrap();
        let change = Change::Write(Record::new(*b"1", Ttl::MAX));
        assert_eq!(fresh.save(&change, WriteId::random().unwrap()).await.unwrap(), Written::Applied);
        (handler, store, id)
    }

    #[test]
    fn the_hash_of_an_id_never_changes() {
        // Sessions outlive releases: another text here would log every visitor out. The expected text was computed apart from
        // this code, with Python's hashlib and base64.
        let id = SessionId::parse("0123456789abcdefghijklmnopqrstuv").unwrap();
        assert_eq!(HashIds::hash(&id).as_str(), "t9ndatc0akpj0bsj3cjris67hcpeevcl9a6ivbo10japqul1b1ng");
    }

    #[test]
    fn hashed_ids_are_accepted_ids_and_differ() {
        let a = HashIds::hash(&SessionId::generate().unwrap());
        let b = HashIds::hash(&SessionId::generate().unwrap());
        assert_ne!(a, b);
        assert!(looks_hashed(&a) && SessionId::parse(a.as_str()).is_some());
        assert!(!looks_hashed(&SessionId::generate().unwrap()));
    }

    #[tokio::test]
    async fn the_store_knows_only_the_hash() {
        let (handler, store, id) = one_session().await;
        let page = handler.admin().unwrap().list(None, NonZeroU32::MAX).await.unwrap();
        let listed: Vec<_> = page.sessions.iter().map(|info| info.id.clone()).collect();
        assert_eq!(listed, [HashIds::hash(&id)]);
        assert_eq!(store.open(&id, &OpenRequest::read_only()).await.unwrap().read().await.unwrap(), None);
        let opening = handler.open(&id, &exclusive()).await.unwrap();
        assert_eq!(opening.held().unwrap().lease.id(), &HashIds::hash(&id));
        let locks = handler.admin().unwrap().locks(NonZeroU32::MAX).await.unwrap();
        assert_eq!(locks[0].id, HashIds::hash(&id));
    }

    #[tokio::test]
    async fn who_has_read_the_store_enters_nothing() {
        let (handler, _, id) = one_session().await;
        let stolen = HashIds::hash(&id);
        assert_eq!(handler.open(&stolen, &OpenRequest::read_only()).await.unwrap().read().await.unwrap(), None);
        assert!(handler.open(&id, &OpenRequest::read_only()).await.unwrap().read().await.unwrap().is_some());
    }

    #[tokio::test]
    async fn an_unlock_takes_a_live_id_and_an_id_as_listed() {
        let (handler, _, id) = one_session().await;
        let admin = handler.admin().unwrap();
        for named in [id.clone(), HashIds::hash(&id)] {
            let _holder = handler.open(&id, &exclusive()).await.unwrap();
            assert!(admin.unlock(&named).await.unwrap());
            assert!(!admin.unlock(&named).await.unwrap());
        }
    }

    #[tokio::test]
    async fn gc_reaches_the_store() {
        let store = MemoryHandler::new();
        let handler = HashIds::new(store);
        let id = SessionId::generate().unwrap();
        let mut fresh = handler.open(&id, &exclusive().expecting(Expect::Fresh)).await.unwrap();
        let change = Change::Write(Record::new(*b"1", Ttl::MIN));
        fresh.save(&change, WriteId::random().unwrap()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(handler.gc(NonZeroU32::MAX).await.unwrap(), 1);
    }
}
