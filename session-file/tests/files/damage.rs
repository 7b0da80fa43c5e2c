//! Damaged files: cut off, with a bit flipped, foreign, empty. Nothing is ever mixed, adopted or repaired unasked.

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use session_core::{ErrorKind, Expect, SessionHandler, SessionId};
use session_file::Durability;

use crate::{Store, at_once, create, destroy, new_id, open, patient, put, record, view, wid};

fn replace(path: &Path, bytes: &[u8]) {
    let _ = fs::remove_file(path);
    let file = fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(path).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

/// What a session shows, with and without a lock, which must not differ; and the file must stay as it was.
async fn look(store: &Store, id: &SessionId) -> Result<Option<Vec<u8>>, ErrorKind> {
    let before = fs::read(store.file(id)).unwrap();
    let unlocked = view(&store.handler, id).await.map_err(|error| error.kind());
    // A lock that a refusal had left behind would be in the way of the second.
    for _ in 0..2 {
        let locked = match store.handler.open(id, &at_once()).await {
            Ok(mut session) => session.read().await.map(|record| record.map(|record| record.data)),
            Err(error) => Err(error),
        };
        let locked = locked.map_err(|error| error.kind());
        assert_eq!(locked, unlocked, "with and without a lock");
        if unlocked.is_err() {
            assert!(fs::read(store.file(id)).unwrap() == before, "an unreadable file was changed");
        }
    }
    unlocked
}

/// Writes two records and returns the file.
async fn two_writes(store: &Store, first: &[u8], second: &[u8]) -> (SessionId, Vec<u8>) {
    let id = create(&store.handler, record(first)).await;
    put(&store.handler, &id, second).await;
    (id.clone(), fs::read(store.file(&id)).unwrap())
}

#[tokio::test]
async fn a_file_cut_at_any_length_shows_the_old_record_the_new_one_or_an_error() {
    let store = Store::new();
    for (first, second) in [(vec![b'a'; 300], vec![b'b'; 200]), (vec![b'a'; 40], vec![b'b'; 5000])] {
        let (id, whole) = two_writes(&store, &first, &second).await;
        for length in 0..whole.len() {
            replace(&store.file(&id), &whole[..length]);
            match look(&store, &id).await {
                Ok(None) => {
                    assert_eq!(length, 0, "cut at {length}: absent");
                    // Who opens it finds litter and removes it.
                    assert!(!store.file(&id).exists());
                }
                Ok(Some(data)) => assert!(length >= 128 && (data == first || data == second), "cut at {length}: mixed"),
                Err(kind) => assert_eq!(kind, ErrorKind::Corrupt, "cut at {length}"),
            }
        }
    }
}

#[tokio::test]
async fn no_flipped_bit_shows_anything_but_what_was_written() {
    let store = Store::new();
    let (first, second) = (b"the old record".to_vec(), b"the new record".to_vec());
    let (id, whole) = two_writes(&store, &first, &second).await;
    let mut seen = [0; 3];
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        replace(&store.file(&id), &bytes);
        match view(&store.handler, &id).await.map_err(|error| error.kind()) {
            Ok(Some(data)) if data == second => seen[0] += 1,
            Ok(Some(data)) => {
                assert_eq!(data, first, "bit {bit}");
                seen[1] += 1;
            }
            Ok(None) => panic!("bit {bit} makes the session absent"),
            Err(kind) => {
                assert_eq!(kind, ErrorKind::Corrupt, "bit {bit}");
                seen[2] += 1;
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

#[tokio::test]
async fn once_a_write_is_on_the_disk_damage_never_shows_the_record_before_it() {
    let store = Store::with(|config| config.with_durability(Durability::Data));
    let second = b"the new record".to_vec();
    let (id, whole) = two_writes(&store, b"the old record", &second).await;
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        replace(&store.file(&id), &bytes);
        match view(&store.handler, &id).await.map_err(|error| error.kind()) {
            Ok(data) => assert_eq!(data.as_deref(), Some(&second[..]), "bit {bit}"),
            Err(kind) => assert_eq!(kind, ErrorKind::Corrupt, "bit {bit}"),
        }
    }
}

#[tokio::test]
async fn a_torn_newest_entry_gives_way_to_the_one_before_and_the_next_write_heals() {
    let store = Store::new();
    let (id, whole) = two_writes(&store, b"acknowledged", b"half written").await;
    let second = u32::from_le_bytes(whole[8..12].try_into().unwrap()) as usize;
    let mut torn = whole.clone();
    torn[second + 64] ^= 0xff;
    replace(&store.file(&id), &torn);
    assert_eq!(look(&store, &id).await, Ok(Some(b"acknowledged".to_vec())));
    put(&store.handler, &id, "healed").await;
    assert_eq!(look(&store, &id).await, Ok(Some(b"healed".to_vec())));
}

#[tokio::test]
async fn foreign_files_are_refused_and_kept() {
    let store = Store::new();
    let (_, ours) = two_writes(&store, b"old", b"new").await;
    let mut newer = ours.clone();
    newer[7] += 1;
    for (what, bytes) in [
        ("text", b"user|s:5:\"admin\";".to_vec()),
        ("another program's", vec![0xca; 5000]),
        ("a newer version's", newer),
        ("a header alone", ours[..64].to_vec()),
        ("one byte", vec![1]),
    ] {
        let id = new_id();
        replace(&store.file(&id), &bytes);
        assert_eq!(look(&store, &id).await, Err(ErrorKind::Corrupt), "{what}");
        for expect in [Expect::Any, Expect::Fresh] {
            let kind = match store.handler.open(&id, &at_once().expecting(expect)).await {
                Ok(mut session) => session.write(&record("mine"), wid()).await.unwrap_err().kind(),
                Err(error) => error.kind(),
            };
            assert!(matches!(kind, ErrorKind::Corrupt | ErrorKind::Conflict), "{what}: {kind}");
        }
        assert_eq!(store.handler.gc(std::num::NonZeroU32::MAX).await.unwrap(), 0);
        assert_eq!(fs::read(store.file(&id)).unwrap(), bytes, "{what}: it was changed");
    }
}

#[tokio::test]
async fn a_logout_removes_a_damaged_file_of_ours_but_no_foreign_one() {
    let store = Store::new();
    let (id, mut bytes) = two_writes(&store, b"old", b"new").await;
    for byte in &mut bytes[64..] {
        *byte ^= 0x55;
    }
    replace(&store.file(&id), &bytes);
    assert_eq!(look(&store, &id).await, Err(ErrorKind::Corrupt));
    assert_eq!(destroy(&store.handler, &id).await.unwrap(), None);
    assert!(!store.file(&id).exists());
    replace(&store.file(&id), b"foreign");
    assert_eq!(destroy(&store.handler, &id).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(store.file(&id).exists());
}

#[tokio::test]
async fn an_empty_file_and_one_of_zeros_are_absent_and_can_be_created_over() {
    let store = Store::new();
    // The last one is what a power cut may leave: everything but the header.
    let (_, mut headless) = two_writes(&store, b"old", b"new").await;
    headless[..64].fill(0);
    for bytes in [vec![], vec![0; 10], vec![0; 64], vec![0; 9000], headless] {
        let id = new_id();
        replace(&store.file(&id), &bytes);
        assert_eq!(view(&store.handler, &id).await.unwrap(), None);
        let mut session = open(&store.handler, &id, patient().expecting(Expect::Any)).await;
        assert_eq!(session.read().await.unwrap(), None);
        session.write(&record("first"), wid()).await.unwrap();
        assert_eq!(session.read().await.unwrap().unwrap().data, b"first");
        drop(session);
        assert_eq!(look(&store, &id).await, Ok(Some(b"first".to_vec())), "over {} bytes", bytes.len());
        put(&store.handler, &id, "second").await;
        assert_eq!(look(&store, &id).await, Ok(Some(b"second".to_vec())));
    }
}
