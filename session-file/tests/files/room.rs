//! No room: full disks, used-up inodes, limits of the process, directories that vanish or become read-only.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, setrlimit};
use session_core::{Change, ErrorKind, Expect, SessionHandler, Written};
use session_file::{Durability, FileConfig, FileHandler};

use crate::child::{Worker, say};
use crate::{Store, create, new_id, open, patient, put, record, tells_no_id, view, wid};

/// A small file system of its own, gone with the value.
struct Disk {
    at: PathBuf,
    _root: tempfile::TempDir,
}

impl Disk {
    fn new(options: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().join("disk");
        fs::create_dir(&at).unwrap();
        let mounted = mount(Some("none"), &at, Some("tmpfs"), MsFlags::empty(), Some(options));
        mounted.expect("this test mounts a small tmpfs and has to run as root, with the right to mount");
        Self { at, _root: root }
    }

    fn handler(&self, durability: Durability) -> FileHandler {
        FileHandler::open_dir(FileConfig::new(self.at.join("sessions")).with_durability(durability)).unwrap()
    }

    /// Uses up all the room; removing the file gives it back.
    fn fill(&self) -> PathBuf {
        let ballast = self.at.join("ballast");
        let mut file = fs::File::create(&ballast).unwrap();
        while std::io::Write::write(&mut file, &[1; 4096]).is_ok() {}
        ballast
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_refuses_a_longer_record_and_keeps_the_old_one() {
    let disk = Disk::new("size=1m,mode=0700");
    for durability in [Durability::None, Durability::Data, Durability::Full] {
        let handler = disk.handler(durability);
        let id = create(&handler, record("small")).await;
        put(&handler, &id, "small too").await;
        let ballast = disk.fill();
        for length in [5_000, 60_000, 200_000] {
            let mut session = open(&handler, &id, patient()).await;
            let (longer, name) = (record(vec![7; length]), wid());
            for _ in 0..2 {
                let error = session.write(&longer, name).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{length} bytes: {error:?}");
                assert!(error.to_string().contains("full"), "{error}");
                tells_no_id(&error, &id);
                assert_eq!(view(&handler, &id).await.unwrap().as_deref(), Some(&b"small too"[..]));
            }
            // The opening goes on, and what fits is stored although the disk is full.
            assert_eq!(session.write(&record("small too"), wid()).await.unwrap(), Written::Applied);
            drop(session);
        }
        let mut session = open(&handler, &id, patient()).await;
        let (longer, name) = (record(vec![7; 200_000]), wid());
        assert!(session.save(&Change::Write(longer.clone()), name).await.is_err());
        fs::remove_file(&ballast).unwrap();
        assert_eq!(session.save(&Change::Write(longer), name).await.unwrap(), Written::Applied);
        assert_eq!(view(&handler, &id).await.unwrap().map(|data| data.len()), Some(200_000));
        crate::destroy(&handler, &id).await.unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_refuses_a_new_session_and_leaves_nothing_of_it() {
    let disk = Disk::new("size=1m,mode=0700");
    let handler = disk.handler(Durability::Data);
    let ballast = disk.fill();
    for expect in [Expect::Fresh, Expect::Any] {
        let id = new_id();
        let (new, name) = (record(vec![7; 3000]), wid());
        let mut session = open(&handler, &id, patient().expecting(expect)).await;
        let error = session.save(&Change::Write(new.clone()), name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        drop(session);
        assert!(crate::names(&disk.at.join("sessions")).is_empty());
        assert_eq!(view(&handler, &id).await.unwrap(), None);
    }
    fs::remove_file(ballast).unwrap();
    create(&handler, record(vec![7; 3000])).await;
}

#[tokio::test]
async fn used_up_inodes_refuse_a_new_session() {
    let disk = Disk::new("size=1m,nr_inodes=4,mode=0700");
    let handler = disk.handler(Durability::None);
    let mut created = 0;
    let error = loop {
        let mut session = open(&handler, &new_id(), patient().expecting(Expect::Fresh)).await;
        match session.save(&Change::Write(record("new")), wid()).await {
            Ok(_) => created += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert_eq!(created, 2);
}

#[tokio::test]
async fn a_file_system_that_becomes_read_only_still_shows_its_sessions() {
    let disk = Disk::new("size=1m,mode=0700");
    let handler = disk.handler(Durability::None);
    let id = create(&handler, record("kept")).await;
    let remount = |flags| mount(None::<&str>, &disk.at, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>).unwrap();
    remount(MsFlags::MS_RDONLY);
    assert_eq!(view(&handler, &id).await.unwrap().as_deref(), Some(&b"kept"[..]));
    let error = handler.open(&id, &patient()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("read-only"), "{error}");
    let error = FileHandler::open_dir(handler.config().clone()).unwrap_err();
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains("read-only"), "{error}");
    remount(MsFlags::empty());
    put(&handler, &id, "changed").await;
}

#[tokio::test]
async fn a_directory_that_is_removed_is_no_absent_session_and_works_again_when_it_is_back() {
    let store = Store::new();
    let id = create(&store.handler, record("lost")).await;
    fs::remove_dir_all(store.path()).unwrap();
    for _ in 0..2 {
        let error = view(&store.handler, &id).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        let mut fresh = open(&store.handler, &new_id(), patient().expecting(Expect::Fresh)).await;
        let error = fresh.write(&record("new"), wid()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    }
    // Somebody else's directory in its place is not taken.
    fs::create_dir(store.path()).unwrap();
    fs::set_permissions(store.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    assert_eq!(view(&store.handler, &id).await.unwrap_err().kind(), ErrorKind::Unavailable);
    fs::remove_dir(store.path()).unwrap();
    let again = store.again();
    let id = create(&again, record("new")).await;
    assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"new"[..]));
}

/// Runs in a child, whose limit it is.
pub(crate) fn grow_beyond_the_limit(place: &Path) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let handler = FileHandler::open_dir(FileConfig::new(place).with_durability(Durability::None)).unwrap();
        let id = create(&handler, record(vec![1; 3000])).await;
        setrlimit(Resource::RLIMIT_FSIZE, 9000, 9000).unwrap();
        for length in [10_000, 100_000] {
            let mut session = open(&handler, &id, patient()).await;
            let error = session.write(&record(vec![2; length]), wid()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            assert!(error.to_string().contains("9000"), "{error}");
            assert_eq!(session.write(&record(vec![3; 3000]), wid()).await.unwrap(), Written::Applied);
        }
        let mut fresh = open(&handler, &new_id(), patient().expecting(Expect::Fresh)).await;
        let error = fresh.save(&Change::Write(record(vec![2; 10_000])), wid()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        assert_eq!(view(&handler, &id).await.unwrap().as_deref(), Some(&[3; 3000][..]));
    });
    say("alive");
}

#[test]
fn a_file_size_limit_refuses_and_does_not_kill() {
    let root = tempfile::tempdir().unwrap();
    let mut child = Worker::start("grow beyond the limit", root.path().join("sessions").to_str().unwrap());
    assert_eq!(child.line().as_deref(), Some("alive"), "the child was killed or failed");
}
