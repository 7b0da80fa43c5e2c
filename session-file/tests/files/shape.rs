//! The shape of the directory and of the files: what stands where, how large it gets, what is left behind.

use std::fs;

use session_core::{Access, Change, ErrorKind, Expect, OpenRequest, SessionHandler, SessionId, Written};
use session_file::Durability;

use crate::{Store, create, destroy, new_id, open, patient, put, record, view, wid};

#[tokio::test]
async fn openings_that_write_nothing_leave_nothing() {
    let store = Store::new();
    for expect in [Expect::Existing, Expect::Any, Expect::Fresh] {
        for access in [patient().access, Access::ReadOnly, Access::Optimistic, Access::Destroy] {
            for closed in [true, false] {
                let mut session = open(&store.handler, &new_id(), OpenRequest { access, expect }).await;
                if closed {
                    session.close().await.unwrap();
                    session.close().await.unwrap();
                }
                drop(session);
                assert!(store.names().is_empty(), "{access:?} {expect:?} {closed}");
            }
        }
    }
    // A refused record is as good as none.
    let small = Store::with(|config| config.with_max_bytes(10));
    for expect in [Expect::Any, Expect::Fresh] {
        let mut session = open(&small.handler, &new_id(), patient().expecting(expect)).await;
        assert_eq!(session.write(&record("eleven bytes"), wid()).await.unwrap_err().kind(), ErrorKind::TooLarge);
        drop(session);
        assert!(small.names().is_empty());
    }
}

#[tokio::test]
async fn a_record_that_is_too_large_leaves_the_opening_usable() {
    let store = Store::with(|config| config.with_max_bytes(100));
    let id = create(&store.handler, record([1; 100])).await;
    let mut session = open(&store.handler, &id, patient()).await;
    let error = session.save(&Change::Write(record([2; 101])), wid()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    assert!(error.to_string().contains("101") && error.to_string().contains("100"), "{error}");
    assert_eq!(session.save(&Change::Write(record([3; 100])), wid()).await.unwrap(), Written::Applied);
    assert_eq!(view(&store.handler, &id).await.unwrap().unwrap(), [3; 100]);
}

#[tokio::test]
async fn records_of_all_lengths_come_back_at_every_depth_and_durability() {
    for depth in 0..=3 {
        for durability in [Durability::None, Durability::Data, Durability::Full] {
            let store = Store::with(|config| config.with_depth(depth).with_durability(durability));
            let long = SessionId::parse(&"Z,-a".repeat(64)).unwrap();
            let mut session = open(&store.handler, &long, patient().expecting(Expect::Any)).await;
            session.save(&Change::Write(record("the longest id")), wid()).await.unwrap();
            assert_eq!(view(&store.handler, &long).await.unwrap().as_deref(), Some(&b"the longest id"[..]));
            let id = create(&store.handler, record("")).await;
            for length in [0, 1, 700, 1900, 1985, 2048, 4000, 9000, 100_000, 70_000, 5, 0, 2048] {
                let data: Vec<u8> = (0..length).map(|n: u32| n as u8).collect();
                put(&store.handler, &id, data.clone()).await;
                assert!(view(&store.again(), &id).await.unwrap().as_deref() == Some(&data[..]), "{length} bytes");
            }
            let depth = usize::from(depth);
            let mut path = store.path();
            path.extend(id.as_str()[..depth].chars().map(String::from));
            assert!(path.join(id.as_str()).is_file());
            let page = store.handler.admin().unwrap().list(None, std::num::NonZeroU32::MAX).await.unwrap();
            assert_eq!(page.sessions.len(), 2);
            for id in [&id, &long] {
                assert!(destroy(&store.handler, id).await.unwrap().is_some());
                assert_eq!(view(&store.handler, id).await.unwrap(), None);
            }
        }
    }
}

#[tokio::test]
async fn a_file_shrinks_again_but_not_before_a_later_write() {
    for durability in [Durability::None, Durability::Data] {
        let store = Store::with(|config| config.with_durability(durability));
        let id = create(&store.handler, record("small")).await;
        let length = || fs::metadata(store.file(&id)).unwrap().len();
        put(&store.handler, &id, vec![1; 1 << 20]).await;
        put(&store.handler, &id, "small").await;
        assert!(length() > 1 << 20, "the entry before still needs the tail");
        put(&store.handler, &id, "small again").await;
        assert!(length() <= 8192, "{} bytes", length());
        assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"small again"[..]));
    }
}

#[tokio::test]
async fn a_small_session_stays_within_one_block_and_is_never_replaced() {
    use std::os::unix::fs::MetadataExt;
    let store = Store::new();
    let id = create(&store.handler, record(vec![1; 600])).await;
    let inode = fs::metadata(store.file(&id)).unwrap().ino();
    for round in 0..100u8 {
        let mut session = open(&store.handler, &id, patient()).await;
        session.touch(session_core::Ttl::from_secs(60)).await.unwrap();
        session.save(&Change::Write(record(vec![round; 600])), wid()).await.unwrap();
    }
    let meta = fs::metadata(store.file(&id)).unwrap();
    assert_eq!(meta.ino(), inode);
    assert!(meta.len() <= 4096, "{} bytes", meta.len());
    assert_eq!(store.names(), [id.as_str()]);
}

#[tokio::test]
async fn two_prefixes_share_a_directory_and_nothing_else() {
    let one = Store::with(|config| config.with_prefix("one"));
    let two = session_file::FileHandler::open_dir(one.handler.config().clone().with_prefix("two")).unwrap();
    let id = create(&one.handler, record("one")).await;
    assert_eq!(view(&two, &id).await.unwrap(), None);
    assert_eq!(view(&one.again(), &id).await.unwrap().as_deref(), Some(&b"one"[..]));
}
