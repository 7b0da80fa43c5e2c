//! What other users, other programs and failing disks may put where a session file should be, and what becomes of it: nothing.
//!
//! Neither followed, nor adopted, nor changed, nor waited for; and no error tells the id. They run as root, because root could
//! do all of that.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::{Mode, SFlag, mknod, umask};
use nix::unistd::mkfifo;
use session_core::{ErrorKind, Expect, LeaseRequest, OpenRequest, Result, SessionHandler, SessionId, SessionLock};
use session_file::{Durability, FileConfig, FileHandler, Io};
use support::{
    LEASE, Place, SmallDisk, create, exclusive, id, is_free, keeps_secret, many, put_file, read, snapshot, text, tree, view,
    write,
};

const NOBODY: u32 = 65534;

/// Everything that can be done with an id, and what came of it.
async fn everything(handler: &FileHandler, id: &SessionId) -> Vec<(&'static str, Result<Option<Vec<u8>>>)> {
    let mut outcomes = Vec::new();
    for (name, request) in [
        ("exclusive", exclusive()),
        ("view", OpenRequest::read_only()),
        ("optimistic", OpenRequest::optimistic()),
        ("any", exclusive().expecting(Expect::Any)),
        ("fresh", exclusive().expecting(Expect::Fresh)),
        ("destroy", OpenRequest::destroy()),
    ] {
        let outcome = async {
            let mut opened = handler.open(id, &request).await?;
            match name {
                "fresh" => write(&mut opened, b"fresh").await.map(|_| None),
                "destroy" => Ok(opened.destroy().await?.map(|record| record.data)),
                _ => Ok(opened.read().await?.map(|record| record.data)),
            }
        };
        let limit = Duration::from_secs(20);
        let outcome = tokio::time::timeout(limit, outcome).await.unwrap_or_else(|_| panic!("{name} hangs"));
        if let Err(error) = &outcome {
            keeps_secret(error, id);
        }
        outcomes.push((name, outcome));
    }
    outcomes
}

/// Asserts that everything ends with `kind`, for a reason that has `part`, and that nothing in `place` has changed.
async fn refused(place: &Place, handler: &FileHandler, id: &SessionId, what: &str, kind: ErrorKind, part: &str) {
    let outer = place.beside("");
    let (before, open) = (snapshot(&outer), place.descriptors());
    for (name, outcome) in everything(handler, id).await {
        let error = outcome.err().unwrap_or_else(|| panic!("{what}: {name} is accepted"));
        assert_eq!(error.kind(), kind, "{what}: {name}: {error}");
        assert!(error.to_string().contains(part), "{what}: {name}: {error}");
    }
    left_alone(handler, what).await;
    assert_eq!(snapshot(&outer), before, "{what} was changed");
    assert!(place.descriptors() <= open, "{what}: a descriptor stayed open");
}

/// Neither collected nor listed.
async fn left_alone(handler: &FileHandler, what: &str) {
    assert_eq!(handler.gc(many()).await.unwrap(), 0, "{what}");
    let admin = handler.admin().unwrap();
    assert!(admin.list(None, many()).await.unwrap().sessions.is_empty(), "{what}");
    assert!(admin.locks(many()).await.unwrap().is_empty(), "{what}");
}

fn remove(path: &Path) {
    if fs::symlink_metadata(path).unwrap().is_dir() { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
}

/// A whole session file of another session, to be pointed at.
async fn victim(place: &Place) -> PathBuf {
    let other = FileConfig::new(place.beside("elsewhere")).with_durability(Durability::None);
    create(&FileHandler::open_dir(other).unwrap(), &id(), b"the session of somebody else").await;
    tree(&place.beside("elsewhere")).remove(0)
}

/// Plants one thing at `path`; some point at a victim.
type Plant = fn(path: &Path, victim: &Path);

const NO_PLAIN_FILES: [(&str, Plant, &str); 9] = [
    ("a symbolic link to a session", |path, victim| symlink(victim, path).unwrap(), "symbolic link"),
    ("a symbolic link to nothing", |path, victim| symlink(victim.with_extension("new"), path).unwrap(), "symbolic link"),
    ("a symbolic link to itself", |path, _| symlink(path, path).unwrap(), "symbolic link"),
    ("a symbolic link to a device", |path, _| symlink("/dev/zero", path).unwrap(), "symbolic link"),
    ("a hard link to a session", |path, victim| fs::hard_link(victim, path).unwrap(), "hard link"),
    ("a FIFO", |path, _| mkfifo(path, Mode::from_bits_truncate(0o600)).unwrap(), "no plain file"),
    ("a directory", |path, _| fs::create_dir(path).unwrap(), "directory stands"),
    ("a socket", |path, _| drop(UnixListener::bind(path).unwrap()), "no plain file"),
    (
        "a device",
        |path, _| mknod(path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), nix::sys::stat::makedev(1, 5)).unwrap(),
        "no plain file",
    ),
];

#[tokio::test]
async fn what_is_no_plain_file_is_refused_and_left_alone() {
    for owner in [0, NOBODY] {
        for (what, plant, part) in NO_PLAIN_FILES {
            let place = Place::new();
            let (handler, id) = (place.handler(), id());
            let path = place.probe(&handler, &id).await;
            let victim = victim(&place).await;
            plant(&path, &victim);
            // The owner of a hard link is that of the victim.
            if !what.starts_with("a hard link") {
                std::os::unix::fs::lchown(&path, Some(owner), Some(owner)).unwrap();
            }
            refused(&place, &handler, &id, what, ErrorKind::Corrupt, part).await;
            remove(&path);
            create(&handler, &id, b"afterwards").await;
            assert_eq!(read(&handler, &id).await.unwrap().unwrap(), b"afterwards", "{what}");
        }
    }
}

#[tokio::test]
async fn the_pool_refuses_the_same_as_the_runtime_thread() {
    for (what, plant, part) in NO_PLAIN_FILES {
        let place = Place::new();
        let handler = FileHandler::open_dir(place.config().with_io(Io::Pool).with_durability(Durability::Full)).unwrap();
        let id = id();
        let path = place.probe(&handler, &id).await;
        plant(&path, &victim(&place).await);
        refused(&place, &handler, &id, what, ErrorKind::Corrupt, part).await;
    }
}

#[tokio::test]
async fn a_file_that_others_may_touch_is_refused_with_the_command_that_mends_it() {
    let place = Place::new();
    let (handler, id) = (place.handler(), id());
    let path = place.probe(&handler, &id).await;
    create(&handler, &id, b"whole").await;
    for mode in [0o644, 0o640, 0o604, 0o620, 0o602, 0o666, 0o777, 0o610] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let cure = format!("mode {mode:04o}, so others may touch it; run: find {} -type f", place.dir().display());
        refused(&place, &handler, &id, "an open file", ErrorKind::Config, &cure).await;
        assert!(is_free(&path));
    }
    let find = format!("find {} -type f -perm /077 -exec chmod 600 {{}} +", place.dir().display());
    let error = view(&handler, &id).await.unwrap_err();
    assert!(error.to_string().ends_with(&find), "{error}");
    assert!(std::process::Command::new("sh").args(["-c", &find]).status().unwrap().success());
    assert_eq!(read(&handler, &id).await.unwrap().unwrap(), b"whole");
}

#[tokio::test]
async fn a_linked_shard_leads_nowhere() {
    let long = SessionId::parse(&"x".repeat(SessionId::MAX_LEN)).unwrap();
    for (depth, id) in [(1, id()), (2, id()), (0, long)] {
        let place = Place::new();
        let handler = FileHandler::open_dir(place.config().with_depth(depth)).unwrap();
        let path = place.probe(&handler, &id).await;
        let shard = path.parent().unwrap();
        assert_ne!(shard, place.dir(), "an id of {} characters stands in a shard", id.as_str().len());
        fs::remove_dir(shard).unwrap();
        let elsewhere = place.beside("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::copy(victim(&place).await, elsewhere.join(path.file_name().unwrap())).unwrap();
        symlink(&elsewhere, shard).unwrap();
        refused(&place, &handler, &id, "a linked shard", ErrorKind::Corrupt, "no plain file").await;
    }
}

#[tokio::test]
async fn files_are_0600_and_directories_0700_whatever_the_mask_is() {
    umask(Mode::empty());
    let place = Place::new();
    let config = place.config().with_prefix("shop").with_depth(2);
    let handler = FileHandler::open_dir(config).unwrap();
    create(&handler, &id(), b"one").await;
    create(&handler, &SessionId::parse(&"y".repeat(SessionId::MAX_LEN)).unwrap(), b"long").await;
    let mut fresh = handler.open(&id(), &exclusive().expecting(Expect::Fresh)).await.unwrap();
    write(&mut fresh, b"fresh").await.unwrap();
    let request = LeaseRequest { wait: Duration::ZERO, lease: LEASE };
    let lease = handler.lock().acquire(&id(), &request).await.unwrap();
    let paths = tree(&place.dir());
    assert!(paths.iter().filter(|path| path.is_file()).count() == 4, "{}", paths.len());
    for path in paths.into_iter().chain([place.dir()]) {
        let meta = fs::symlink_metadata(&path).unwrap();
        assert_eq!(meta.mode() & 0o7777, if meta.is_dir() { 0o700 } else { 0o600 });
        assert_eq!(meta.uid(), 0);
    }
    drop(lease);
}

/// Asserts that a directory is refused, for a reason that has `part`.
fn no_directory(config: FileConfig, part: &str) {
    let error = FileHandler::open_dir(config).expect_err(part);
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains(part), "{part}: {error}");
}

#[test]
fn a_directory_that_others_may_write_to_is_refused_with_the_command_that_mends_it() {
    for mode in [0o777, 0o1777, 0o770, 0o720, 0o702, 0o775] {
        let place = Place::new();
        fs::create_dir(place.dir()).unwrap();
        fs::set_permissions(place.dir(), fs::Permissions::from_mode(mode)).unwrap();
        let cure = format!("run: chmod 0700 {}", place.dir().display());
        no_directory(place.config(), &cure);
        assert_eq!(fs::metadata(place.dir()).unwrap().mode() & 0o7777, mode, "nothing mends it unasked");
        fs::set_permissions(place.dir(), fs::Permissions::from_mode(0o700)).unwrap();
        place.handler();
        // The directory of an application within it is looked at in the same way.
        fs::create_dir(place.dir().join("shop")).unwrap();
        fs::set_permissions(place.dir().join("shop"), fs::Permissions::from_mode(mode)).unwrap();
        no_directory(place.config().with_prefix("shop"), &format!("{cure}/shop"));
    }
}

#[test]
fn a_command_does_what_it_says_for_a_strange_path_too() {
    let place = Place::new();
    for name in ["it's; exit 3", "a \"b\" $HOME `exit 3`", "back\\slash", "a b"] {
        let dir = place.beside(name).join("below");
        let error = FileHandler::open_dir(FileConfig::new(&dir)).unwrap_err().to_string();
        let (_, cure) = error.split_once("run: ").unwrap();
        assert!(std::process::Command::new("sh").args(["-c", cure]).status().unwrap().success(), "{error}");
        FileHandler::open_dir(FileConfig::new(dir)).unwrap();
    }
    let error = FileHandler::open_dir(FileConfig::new(place.beside("two\nlines").join("below"))).unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error:?}");
}

#[test]
fn a_path_that_is_no_directory_is_refused_at_once() {
    let place = Place::new();
    put_file(&place.dir(), b"a file", 0o600);
    no_directory(place.config(), "it is not a directory");
    fs::remove_file(place.dir()).unwrap();
    symlink(place.beside("nothing"), place.dir()).unwrap();
    no_directory(place.config(), "run: mkdir -p -m 0700");
    assert!(!place.beside("nothing").exists());
    fs::remove_file(place.dir()).unwrap();
    mkfifo(&place.dir(), Mode::from_bits_truncate(0o600)).unwrap();
    let config = place.config();
    let (told, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        no_directory(config, "it is not a directory");
        let _ = told.send(());
    });
    said.recv_timeout(Duration::from_secs(20)).expect("a FIFO does not hang");
}

#[tokio::test]
async fn a_read_only_file_system_is_named_and_what_is_there_can_be_read() {
    let disk = SmallDisk::new("size=1m");
    let config = FileConfig::new(disk.path()).with_durability(Durability::None);
    let handler = FileHandler::open_dir(config.clone()).unwrap();
    let id = id();
    create(&handler, &id, b"before").await;
    disk.read_only(true);
    no_directory(config, "remount it read-write");
    assert_eq!(view(&handler, &id).await.unwrap().unwrap(), b"before");
    for (name, outcome) in everything(&handler, &id).await {
        if !matches!(name, "view" | "optimistic") {
            let error = outcome.expect_err(name);
            assert_eq!(error.kind(), ErrorKind::Config, "{name}: {error}");
            assert!(error.to_string().contains("remount it read-write"), "{name}: {error}");
        }
    }
    disk.read_only(false);
    create(&handler, &id, b"after").await;
    assert_eq!(view(&handler, &id).await.unwrap().unwrap(), b"after");
}

#[tokio::test]
async fn a_directory_that_vanished_is_no_answer_about_sessions_until_it_is_back() {
    let place = Place::new();
    let (handler, id) = (place.handler(), id());
    create(&handler, &id, b"before").await;
    fs::remove_dir_all(place.dir()).unwrap();
    for (name, outcome) in everything(&handler, &id).await {
        let error = outcome.expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{name}: {error}");
        assert!(error.to_string().contains("run: mkdir -p -m 0700"), "{name}: {error}");
    }
    fs::create_dir(place.dir()).unwrap();
    fs::set_permissions(place.dir(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = view(&handler, &id).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("run: chmod 0700"), "{error}");
    fs::set_permissions(place.dir(), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(view(&handler, &id).await.unwrap(), None);
    create(&handler, &id, b"after").await;
    assert_eq!(read(&handler, &id).await.unwrap().unwrap(), b"after");
}

/// Two states in one file: `old` and, in force, `new`.
async fn two_states(place: &Place, old: &[u8], new: &[u8]) -> (FileHandler, SessionId, PathBuf, Vec<u8>) {
    let (handler, id) = (place.handler(), id());
    let path = place.probe(&handler, &id).await;
    create(&handler, &id, old).await;
    create(&handler, &id, new).await;
    let bytes = fs::read(&path).unwrap();
    (handler, id, path, bytes)
}

/// What a damaged file says, without the lock and with it: both must agree, let go of it and leave it alone.
async fn says(place: &Place, handler: &FileHandler, id: &SessionId, path: &Path, bytes: &[u8]) -> Option<Option<Vec<u8>>> {
    put_file(path, bytes, 0o600);
    let (inode, open) = (fs::metadata(path).unwrap().ino(), place.descriptors());
    let seen = match view(handler, id).await {
        Ok(seen) => Some(seen),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            keeps_secret(&error, id);
            None
        }
    };
    if seen != Some(None) {
        assert_eq!(handler.gc(many()).await.unwrap(), 0);
    }
    match read(handler, id).await {
        Ok(read) => assert_eq!(Some(read), seen),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            keeps_secret(&error, id);
            assert_eq!(seen, None, "{}", text(&error));
        }
    }
    assert_eq!(place.descriptors(), open, "a descriptor stayed open");
    if seen != Some(None) {
        assert!(is_free(path), "the lock is still taken");
        assert!(fs::read(path).unwrap() == bytes && fs::metadata(path).unwrap().ino() == inode, "the file was changed");
    }
    seen
}

#[tokio::test]
async fn damage_to_the_only_state_is_corrupt_and_never_absent() {
    let place = Place::new();
    let (handler, id) = (place.handler(), id());
    let path = place.probe(&handler, &id).await;
    create(&handler, &id, b"the only state").await;
    let bytes = fs::read(&path).unwrap();
    for at in 64..142 {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert_eq!(says(&place, &handler, &id, &path, &damaged).await, None, "byte {at}");
    }
}

#[tokio::test]
async fn foreign_and_newer_contents_are_corrupt_and_left_alone() {
    let place = Place::new();
    let (handler, id, path, bytes) = two_states(&place, b"old", b"new").await;
    let mut newer = bytes.clone();
    newer[7] += 1;
    let mut garbage = Vec::new();
    let mut chance = support::Chance::new();
    garbage.resize_with(1 << 20, || chance.next() as u8 | 1);
    let foreign: [(&str, &[u8], &str); 6] = [
        ("a newer version", &newer, "another version"),
        ("one byte", b"x", "not a session file"),
        ("a session of PHP", b"user|s:5:\"alice\";cart|a:0:{}", "not a session file"),
        ("a database", b"SQLite format 3\0\x10\0\x01\x01\0\x40\x20\x20", "not a session file"),
        ("a magic without a header", &bytes[..16], "cut off within the header"),
        ("garbage", &garbage, "not a session file"),
    ];
    for (what, content, part) in foreign {
        put_file(&path, content, 0o600);
        refused(&place, &handler, &id, what, ErrorKind::Corrupt, part).await;
        assert!(is_free(&path), "{what}");
    }
}
