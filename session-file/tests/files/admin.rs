//! Collecting, listing, and locks, as an administrator sees them.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroU32;
use std::time::Duration;

use session_core::{Change, ErrorKind, Expect, SessionAdmin, SessionHandler, SessionId};

use crate::{Store, at_once, brief, create, destroy, new_id, open, patient, record, tells_no_id, view, wid};

fn up_to(limit: u32) -> NonZeroU32 {
    NonZeroU32::new(limit).unwrap()
}

async fn list_all(admin: &dyn SessionAdmin, limit: u32) -> Vec<SessionId> {
    let mut ids = Vec::new();
    let mut after = None;
    loop {
        let page = admin.list(after.as_ref(), up_to(limit)).await.unwrap();
        assert!(page.sessions.len() <= limit as usize);
        ids.extend(page.sessions.into_iter().map(|session| session.id));
        after = match page.next {
            Some(next) => Some(next),
            None => return ids,
        };
    }
}

#[tokio::test]
async fn a_collection_goes_on_where_the_last_one_stopped() {
    for depth in [0, 2] {
        let store = Store::with(|config| config.with_depth(depth).with_durability(session_file::Durability::None));
        let mut alive = BTreeSet::new();
        for _ in 0..30 {
            create(&store.handler, brief("expired")).await;
            alive.insert(create(&store.handler, record("alive")).await);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        let mut freed = Vec::new();
        for _ in 0..5 {
            freed.push(store.handler.gc(up_to(7)).await.unwrap());
        }
        assert_eq!(freed, [7, 7, 7, 7, 2]);
        let listed: BTreeSet<_> = list_all(store.handler.admin().unwrap(), 11).await.into_iter().collect();
        assert_eq!(listed, alive);
    }
}

#[tokio::test]
async fn collecting_removes_the_destroyed_and_the_forgotten_and_counts_only_the_expired() {
    let store = Store::new();
    // Destroyed under a holder that never wrote again.
    let id = create(&store.handler, record("old")).await;
    let mut holder = open(&store.handler, &id, patient()).await;
    destroy(&store.handler, &id).await.unwrap();
    assert_eq!(store.handler.gc(up_to(100)).await.unwrap(), 0);
    assert_eq!(store.names().len(), 1, "a held file was collected");
    holder.close().await.unwrap();
    // Made by somebody who was killed before he wrote: a young one may still be about to be written.
    let litter = |age: u64| {
        let path = store.file(&new_id());
        let file = fs::File::create(&path).unwrap();
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(age)).unwrap();
        path
    };
    let (old, young) = (litter(3600), litter(0));
    create(&store.handler, brief("expired")).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(store.handler.gc(up_to(100)).await.unwrap(), 1);
    assert!(!old.exists() && young.exists());
    assert_eq!(store.names().len(), 1);
}

#[tokio::test]
async fn a_listing_shows_each_live_session_once_whatever_the_page() {
    for depth in 0..=2 {
        let store = Store::with(|config| config.with_depth(depth).with_durability(session_file::Durability::None));
        let mut alive = BTreeSet::new();
        for n in 0..60 {
            alive.insert(create(&store.handler, record(vec![0; n])).await);
        }
        create(&store.handler, brief("expired")).await;
        let gone = create(&store.handler, record("gone")).await;
        destroy(&store.handler, &gone).await.unwrap();
        fs::write(store.path().join("README"), "not a session").unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        let locked_only = open(&store.handler, &new_id(), patient().expecting(Expect::Any)).await;
        for limit in [1, 7, 60, 1000] {
            let listed = list_all(store.handler.admin().unwrap(), limit).await;
            assert_eq!(listed.len(), alive.len(), "depth {depth}, pages of {limit}");
            assert_eq!(listed.into_iter().collect::<BTreeSet<_>>(), alive);
        }
        // Two who list at the same time do not disturb each other.
        let admin = store.handler.admin().unwrap();
        let (one, two) = tokio::join!(list_all(admin, 3), list_all(admin, 5));
        assert_eq!((one.len(), two.len()), (60, 60));
        drop(locked_only);
    }
}

#[tokio::test]
async fn locks_are_shown_with_their_holders_and_can_only_end_with_them() {
    let store = Store::new();
    let admin = store.handler.admin().unwrap();
    let (held, free) = (create(&store.handler, record("held")).await, create(&store.handler, record("free")).await);
    assert!(admin.locks(up_to(10)).await.unwrap().is_empty());
    let mut session = open(&store.handler, &held, at_once()).await;
    let locks = admin.locks(up_to(10)).await.unwrap();
    assert_eq!(locks.len(), 1);
    assert_eq!(locks[0].id, held);
    let process = format!("pid {}", std::process::id());
    assert_eq!(locks[0].holder.as_ref().unwrap().process, process);
    assert_eq!((locks[0].lease_left, locks[0].waiting), (None, Some(0)));
    assert!(!format!("{locks:?}").contains(held.as_str()));
    assert!(!admin.unlock(&free).await.unwrap());
    assert!(!admin.unlock(&new_id()).await.unwrap());
    let error = admin.unlock(&held).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(error.holder().unwrap().process, process);
    tells_no_id(&error, &held);
    // Nobody was disturbed by being asked about.
    session.save(&Change::Write(record("saved")), wid()).await.unwrap();
    assert_eq!(view(&store.handler, &held).await.unwrap().as_deref(), Some(&b"saved"[..]));
    assert!(admin.locks(up_to(10)).await.unwrap().is_empty());
}
