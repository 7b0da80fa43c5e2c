//! Things that somebody else put into the directory, and directories that somebody else could put things into.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use nix::sys::stat::Mode;
use session_core::{ErrorKind, Expect, OpenRequest, SessionHandler, SessionId, WriteId};
use session_file::{FileConfig, FileHandler};

use crate::{Store, at_once, create, destroy, new_id, put, record, tells_no_id, view, wid};

/// Another user than the one who runs the tests.
const NOBODY: u32 = 65534;

/// Everything about a file that must not change.
fn fingerprint(path: &Path) -> (u64, u32, u32, i64, u64, Vec<u8>) {
    let meta = fs::symlink_metadata(path).unwrap();
    let data = if meta.is_file() { fs::read(path).unwrap() } else { Vec::new() };
    (meta.ino(), meta.mode(), meta.uid(), meta.mtime_nsec(), meta.nlink(), data)
}

/// Tries everything on an id and returns the kinds of what was refused, by the way of asking.
async fn attack(store: &Store, id: &SessionId) -> Vec<(&'static str, Option<ErrorKind>)> {
    let handler = &store.handler;
    let mut seen = Vec::new();
    let mut note = |what, error: Option<session_core::Error>| {
        if let Some(error) = &error {
            tells_no_id(error, id);
        }
        seen.push((what, error.map(|error| error.kind())));
    };
    note("view", view(handler, id).await.err());
    for (what, expect) in [("open", Expect::Existing), ("any", Expect::Any)] {
        let error = match handler.open(id, &at_once().expecting(expect)).await {
            Err(error) => Some(error),
            Ok(mut session) => {
                assert_eq!(session.read().await.unwrap(), None, "{what}: a planted record was handed out");
                session.write(&record("mine"), wid()).await.err()
            }
        };
        note(what, error);
    }
    let mut fresh = handler.open(id, &at_once().expecting(Expect::Fresh)).await.unwrap();
    note("fresh", fresh.write(&record("mine"), wid()).await.err());
    let optimistic = handler.open(id, &OpenRequest::optimistic().expecting(Expect::Any)).await;
    note(
        "optimistic",
        match optimistic {
            Err(error) => Some(error),
            Ok(mut session) => session.write(&record("mine"), wid()).await.err(),
        },
    );
    note("destroy", destroy(handler, id).await.err());
    note("gc", handler.gc(std::num::NonZeroU32::MAX).await.err());
    let admin = handler.admin().unwrap();
    note("list", admin.list(None, std::num::NonZeroU32::MAX).await.err());
    seen
}

#[tokio::test]
async fn what_is_no_plain_file_is_neither_followed_nor_changed() {
    let store = Store::new();
    let victim = store.dir.path().join("victim");
    fs::write(&victim, vec![0; 10_000]).unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let before = fingerprint(&victim);
    type Plant = fn(&Path, &Path);
    let plants: [(&str, Plant); 5] = [
        ("a link to a file", |at, victim| symlink(victim, at).unwrap()),
        ("a link to nothing", |at, victim| symlink(victim.with_extension("missing"), at).unwrap()),
        ("a pipe", |at, _| nix::unistd::mkfifo(at, Mode::S_IRWXU).unwrap()),
        ("a directory", |at, _| fs::create_dir(at).unwrap()),
        ("a socket", |at, _| drop(std::os::unix::net::UnixListener::bind(at).unwrap())),
    ];
    for (what, plant) in plants {
        let id = new_id();
        // Bound by the length of a socket's path: the name in the directory of the tests is short enough.
        plant(&store.file(&id), &victim);
        let planted = fingerprint(&store.file(&id));
        for (how, kind) in attack(&store, &id).await {
            let expected = match how {
                "gc" | "list" => None,
                "fresh" => Some(ErrorKind::Conflict),
                _ => Some(ErrorKind::Corrupt),
            };
            // A fresh id that turns out to be taken looks at what took it.
            let also = how == "fresh" && kind == Some(ErrorKind::Corrupt);
            assert!(kind == expected || also, "{what}, {how}: {kind:?}");
        }
        assert_eq!(fingerprint(&store.file(&id)), planted, "{what} was changed");
        assert_eq!(fingerprint(&victim), before, "{what}: what it led to was changed");
    }
    assert!(!victim.with_extension("missing").exists());
}

#[tokio::test]
async fn a_file_with_a_second_name_is_left_alone() {
    let store = Store::new();
    let id = create(&store.handler, record("real")).await;
    fs::hard_link(store.file(&id), store.dir.path().join("second")).unwrap();
    let before = fingerprint(&store.file(&id));
    for (how, kind) in attack(&store, &id).await {
        let expected = if matches!(how, "gc" | "list") { None } else { Some(ErrorKind::Corrupt) };
        assert_eq!(kind, expected, "{how}");
    }
    assert_eq!(fingerprint(&store.file(&id)), before);
}

#[tokio::test]
async fn a_session_planted_by_another_user_is_absent_and_nothing_takes_its_place() {
    let store = Store::new();
    let id = create(&store.handler, record("planted")).await;
    chown(store.file(&id), Some(NOBODY), None).expect("these tests have to run as root");
    let before = fingerprint(&store.file(&id));
    for (how, kind) in attack(&store, &id).await {
        let expected = match how {
            "open" => Some(ErrorKind::Gone),
            "any" => Some(ErrorKind::Corrupt),
            "fresh" | "optimistic" => Some(ErrorKind::Conflict),
            _ => None,
        };
        assert_eq!(kind, expected, "{how}");
    }
    assert_eq!(fingerprint(&store.file(&id)), before);
    let page = store.handler.admin().unwrap().list(None, std::num::NonZeroU32::MAX).await.unwrap();
    assert!(page.sessions.is_empty());
}

#[tokio::test]
async fn a_session_file_that_others_may_touch_is_refused_with_the_command_that_mends_it() {
    let store = Store::new();
    for mode in [0o644, 0o620, 0o606, 0o660, 0o601] {
        let id = create(&store.handler, record("real")).await;
        fs::set_permissions(store.file(&id), fs::Permissions::from_mode(mode)).unwrap();
        let before = fingerprint(&store.file(&id));
        let error = view(&store.handler, &id).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("chmod 600"), "{error}");
        tells_no_id(&error, &id);
        for (how, kind) in attack(&store, &id).await {
            let expected = if matches!(how, "gc" | "list") { None } else { Some(ErrorKind::Config) };
            assert_eq!(kind, expected, "{how} with mode {mode:o}");
        }
        assert_eq!(fingerprint(&store.file(&id)), before);
        fs::remove_file(store.file(&id)).unwrap();
    }
}

#[tokio::test]
async fn a_shard_that_is_a_link_leads_nowhere() {
    let store = Store::with(|config| config.with_depth(2));
    let outside = store.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let id = new_id();
    let mut levels = id.as_str().chars();
    let (first, second) = (levels.next().unwrap().to_string(), levels.next().unwrap().to_string());
    fs::create_dir(outside.join(&second)).unwrap();
    symlink(&outside, store.path().join(&first)).unwrap();
    for (how, kind) in attack(&store, &id).await {
        assert!(kind.is_some() || matches!(how, "gc" | "list"), "{how} went through a link");
    }
    assert!(fs::read_dir(outside.join(&second)).unwrap().next().is_none(), "a file was made outside of the directory");
}

#[tokio::test]
async fn files_and_directories_are_made_for_their_owner_only() {
    let store = Store::with(|config| config.with_depth(1).with_prefix("shop"));
    let id = create(&store.handler, record("mine")).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    let shard = store.path().join("shop").join(&id.as_str()[..1]);
    assert_eq!(mode(&store.path()), 0o700);
    assert_eq!(mode(&store.path().join("shop")), 0o700);
    assert_eq!(mode(&shard), 0o700);
    assert_eq!(mode(&shard.join(id.as_str())), 0o600);
}

#[tokio::test]
async fn directories_that_others_can_write_to_are_refused_with_the_command_that_mends_them() {
    let root = tempfile::tempdir().unwrap();
    let us = nix::unistd::geteuid().as_raw();
    for (mode, owner, accepted) in [
        (0o700, us, true),
        (0o750, us, true),
        (0o755, us, true),
        (0o770, us, false),
        (0o702, us, false),
        (0o777, us, false),
        (0o1777, us, false),
        (0o700, NOBODY, false),
    ] {
        let dir = root.path().join(format!("{mode:o}-{owner}"));
        fs::create_dir(&dir).unwrap();
        chown(&dir, Some(owner), None).expect("these tests have to run as root");
        fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
        match FileHandler::open_dir(FileConfig::new(&dir)) {
            Ok(_) => assert!(accepted, "{mode:o} of {owner} was accepted"),
            Err(error) => {
                assert!(!accepted, "{mode:o} of {owner}: {error}");
                let cure = if owner == us { "chmod 0700 " } else { "chown " };
                assert_eq!(error.kind(), ErrorKind::Config);
                assert!(error.to_string().contains(cure) && error.to_string().contains(dir.to_str().unwrap()), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn a_directory_is_made_but_not_its_parents() {
    let root = tempfile::tempdir().unwrap();
    FileHandler::open_dir(FileConfig::new(root.path().join("one"))).unwrap();
    let error = FileHandler::open_dir(FileConfig::new(root.path().join("two/three"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("mkdir -p -m 0700"), "{error}");
    assert!(!root.path().join("two").exists());
    fs::write(root.path().join("file"), "").unwrap();
    let error = FileHandler::open_dir(FileConfig::new(root.path().join("file"))).unwrap_err();
    assert!(error.to_string().contains("not a directory"), "{error}");
    assert!(FileHandler::open_dir(FileConfig::default()).unwrap_err().to_string().contains("empty"));
}

#[tokio::test]
async fn a_wait_on_a_file_that_is_moved_away_goes_on_with_the_name() {
    let store = Store::new();
    let id = create(&store.handler, record("old")).await;
    let mut holder = store.handler.open(&id, &at_once()).await.unwrap();
    let other = store.again();
    let waiter = {
        let id = id.clone();
        tokio::spawn(async move {
            let mut session = crate::open(&other, &id, crate::patient()).await;
            session.read().await.unwrap().map(|record| record.data)
        })
    };
    tokio::time::sleep(std::time::Duration::from_millis(60)).await;
    let copy = fs::read(store.file(&id)).unwrap();
    fs::rename(store.file(&id), store.dir.path().join("away")).unwrap();
    fs::write(store.file(&id), &copy).unwrap();
    fs::set_permissions(store.file(&id), fs::Permissions::from_mode(0o600)).unwrap();
    put(&store.handler, &id, "restored").await;
    holder.close().await.unwrap();
    assert_eq!(waiter.await.unwrap().as_deref(), Some(&b"restored"[..]));
}

#[tokio::test]
async fn a_holder_whose_file_was_removed_by_hand_is_told() {
    let store = Store::new();
    let id = create(&store.handler, record("old")).await;
    let mut holder = store.handler.open(&id, &at_once()).await.unwrap();
    fs::remove_file(store.file(&id)).unwrap();
    let error = holder.write(&record("late"), WriteId::random().unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert_eq!(view(&store.handler, &id).await.unwrap(), None);
    assert!(store.names().is_empty());
}

#[tokio::test]
async fn only_a_destroy_removes_what_was_put_in_the_place_of_a_holders_file() {
    let store = Store::new();
    let restored = create(&store.handler, record("restored")).await;
    let bytes = fs::read(store.file(&restored)).unwrap();
    for destroys in [false, true] {
        let id = new_id();
        let mut holder = crate::open(&store.handler, &id, crate::patient().expecting(Expect::Any)).await;
        fs::rename(store.file(&id), store.dir.path().join(format!("away-{destroys}"))).unwrap();
        fs::write(store.file(&id), &bytes).unwrap();
        fs::set_permissions(store.file(&id), fs::Permissions::from_mode(0o600)).unwrap();
        if destroys {
            // Whatever happened to his file, a logout is a logout.
            assert_eq!(holder.destroy().await.unwrap().unwrap().data, b"restored");
            assert_eq!(view(&store.handler, &id).await.unwrap(), None);
        } else {
            holder.close().await.unwrap();
            assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"restored"[..]));
        }
    }
}
