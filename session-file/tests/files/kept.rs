//! Files that stay open between two openings: never the wrong one, never in anybody's way, and none for long.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use session_core::{Change, ErrorKind, Expect, SessionHandler, SessionId};
use session_file::{Durability, FileConfig, FileHandler, Io};

use crate::child::{Worker, say};
use crate::{PATIENT, Store, at_once, create, destroy, new_id, open, patient, put, record, view, wid};

/// How many files of this directory the process has open, removed ones too, apart from the directory itself.
fn open_files(dir: &Path) -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    links.filter(|file| file.starts_with(dir) && file != dir).count()
}

/// A session whose file is open, and that path.
async fn kept(store: &Store) -> (SessionId, PathBuf) {
    let id = create(&store.handler, record("old")).await;
    put(&store.handler, &id, "once").await;
    assert_eq!(open_files(&store.path()), 0, "it may not be used again soon");
    put(&store.handler, &id, "kept").await;
    assert_eq!(open_files(&store.path()), 1, "the file does not stay open, so this test would test nothing");
    let file = store.file(&id);
    (id, file)
}

/// What an opening with the lock shows.
async fn locked(handler: &FileHandler, id: &SessionId) -> Result<Option<Vec<u8>>, ErrorKind> {
    let mut session = handler.open(id, &at_once()).await.map_err(|error| error.kind())?;
    let record = session.read().await.map_err(|error| error.kind())?;
    session.close().await.unwrap();
    Ok(record.map(|record| record.data))
}

#[tokio::test]
async fn a_file_that_was_removed_while_it_stayed_open_is_not_used() {
    for durability in [Durability::None, Durability::Data, Durability::Full] {
        let store = Store::with(|config| config.with_durability(durability).with_io(Io::Inline));
        let (id, file) = kept(&store).await;
        fs::remove_file(&file).unwrap();
        assert_eq!(locked(&store.handler, &id).await, Ok(None));
        assert_eq!(open_files(&store.path()), 0);
        let (id, file) = kept(&store).await;
        fs::remove_file(&file).unwrap();
        let mut session = open(&store.handler, &id, patient().expecting(Expect::Any)).await;
        assert_eq!(session.read().await.unwrap(), None);
        session.save(&Change::Write(record("new")), wid()).await.unwrap();
        assert_eq!(view(&store.again(), &id).await.unwrap().as_deref(), Some(&b"new"[..]));
    }
}

#[tokio::test]
async fn a_file_that_was_replaced_while_it_stayed_open_is_not_used() {
    let store = Store::new();
    let (id, file) = kept(&store).await;
    let other = create(&store.again(), record("another file")).await;
    fs::rename(store.file(&other), &file).unwrap();
    assert_eq!(locked(&store.handler, &id).await, Ok(Some(b"another file".to_vec())));
    put(&store.handler, &id, "written").await;
    assert_eq!(view(&store.again(), &id).await.unwrap().as_deref(), Some(&b"written"[..]));
}

#[tokio::test]
async fn a_file_that_was_moved_while_it_stayed_open_is_not_used() {
    for depth in [0, 2] {
        let store = Store::with(|config| config.with_durability(Durability::None).with_depth(depth));
        let id = create(&store.handler, record("old")).await;
        put(&store.handler, &id, "once").await;
        put(&store.handler, &id, "kept").await;
        assert_eq!(open_files(&store.path()), 1);
        let mut file = store.path();
        file.extend(id.as_str()[..usize::from(depth)].chars().map(String::from));
        let (file, away) = (file.join(id.as_str()), store.path().join("away"));
        fs::rename(&file, &away).unwrap();
        let before = fs::read(&away).unwrap();
        assert_eq!(locked(&store.handler, &id).await, Ok(None));
        let mut session = open(&store.handler, &id, patient().expecting(Expect::Any)).await;
        session.save(&Change::Write(record("new")), wid()).await.unwrap();
        assert!(fs::read(&away).unwrap() == before, "what was moved away was written");
        // The open file is now the one that was created.
        fs::rename(&away, &file).unwrap();
        assert_eq!(locked(&store.handler, &id).await, Ok(Some(b"kept".to_vec())));
    }
}

#[tokio::test]
async fn what_became_of_a_file_while_it_stayed_open_is_judged_as_if_it_were_new() {
    let store = Store::new();
    let (id, file) = kept(&store).await;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(locked(&store.handler, &id).await, Err(ErrorKind::Config));

    let store = Store::new();
    let (id, file) = kept(&store).await;
    fs::hard_link(&file, store.path().join("second")).unwrap();
    assert_eq!(locked(&store.handler, &id).await, Err(ErrorKind::Corrupt));

    let store = Store::new();
    let (id, file) = kept(&store).await;
    let away = store.path().join("away");
    fs::rename(&file, &away).unwrap();
    symlink(&away, &file).unwrap();
    assert_eq!(locked(&store.handler, &id).await, Err(ErrorKind::Corrupt), "a link to the very file");

    let store = Store::new();
    let (id, file) = kept(&store).await;
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(70).unwrap();
    assert_eq!(locked(&store.handler, &id).await, Err(ErrorKind::Corrupt));
}

#[tokio::test]
async fn what_another_process_does_meanwhile_is_seen() {
    let store = Store::new();
    let other = store.again();
    let (id, _) = kept(&store).await;
    put(&other, &id, "written by another").await;
    assert_eq!(locked(&store.handler, &id).await, Ok(Some(b"written by another".to_vec())));
    assert!(destroy(&other, &id).await.unwrap().is_some());
    assert_eq!(locked(&store.handler, &id).await, Ok(None));
    // Destroyed while it is held, and not while it stays open: then it is removed by its holder.
    let (id, file) = kept(&store).await;
    let mut holder = open(&store.handler, &id, patient()).await;
    assert!(destroy(&other, &id).await.unwrap().is_some());
    assert_eq!(holder.save(&Change::Write(record("late")), wid()).await.unwrap_err().kind(), ErrorKind::Gone);
    assert!(!file.exists());
    // Collected.
    let (id, file) = kept(&store).await;
    let mut session = open(&store.handler, &id, patient()).await;
    session.save(&Change::Write(crate::brief("over")), wid()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(other.gc(std::num::NonZeroU32::MAX).await.unwrap(), 1, "an open file without a lock is nobody's");
    assert!(!file.exists());
    assert_eq!(locked(&store.handler, &id).await, Ok(None));
}

/// Waits until this process has no file of the directory open, which is not at once.
async fn none_is_open(dir: &Path) {
    let began = Instant::now();
    while open_files(dir) > 0 {
        assert!(began.elapsed() < PATIENT, "a file stays open for ever");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn no_file_stays_open_for_long_be_it_removed_or_used_again_and_again() {
    let store = Store::new();
    let (id, file) = kept(&store).await;
    fs::remove_file(&file).unwrap();
    none_is_open(&store.path()).await;
    assert_eq!(locked(&store.handler, &id).await, Ok(None));
    let (id, file) = kept(&store).await;
    let moved = store.path().join("moved");
    fs::rename(&file, &moved).unwrap();
    fs::copy(&moved, &file).unwrap();
    // Only what is opened anew has another name by now.
    let began = Instant::now();
    while fs::read_dir("/proc/self/fd").unwrap().any(|fd| fs::read_link(fd.unwrap().path()).is_ok_and(|file| file == moved))
    {
        assert!(began.elapsed() < PATIENT, "a file stays open for ever");
        put(&store.handler, &id, "again").await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    none_is_open(&store.path()).await;
}

#[test]
fn no_file_stays_open_beyond_its_runtime_or_outside_one_that_could_close_it() {
    let store = Store::new();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let (id, _) = first.block_on(kept(&store));
    drop(first);
    assert_eq!(open_files(&store.path()), 0);
    // And in the next one it is as before.
    runtime().block_on(async {
        put(&store.handler, &id, "again").await;
        assert_eq!(open_files(&store.path()), 1);
    });
    assert_eq!(open_files(&store.path()), 0);
}

#[tokio::test]
async fn what_was_dropped_or_has_failed_does_not_stay_open() {
    let store = Store::new();
    let (id, file) = kept(&store).await;
    drop(open(&store.handler, &id, patient()).await);
    assert_eq!(open_files(&store.path()), 0, "dropped");
    put(&store.handler, &id, "kept").await;
    let mut session = open(&store.handler, &id, patient()).await;
    session.write(&record("written"), wid()).await.unwrap();
    drop(session);
    assert_eq!(open_files(&store.path()), 0, "dropped after a write");
    put(&store.handler, &id, "kept").await;
    let mut session = open(&store.handler, &id, patient()).await;
    fs::remove_file(&file).unwrap();
    assert_eq!(session.save(&Change::Write(record("late")), wid()).await.unwrap_err().kind(), ErrorKind::Gone);
    assert_eq!(open_files(&store.path()), 0, "failed");
    let mut session = open(&store.handler, &new_id(), patient().expecting(Expect::Any)).await;
    session.close().await.unwrap();
    assert_eq!(open_files(&store.path()), 0, "nothing written");
    let large = create(&store.handler, record(vec![7; 100_000])).await;
    put(&store.handler, &large, vec![8; 100_000]).await;
    assert_eq!(open_files(&store.path()), 0, "large");
}

#[tokio::test]
async fn no_more_files_stay_open_than_was_said() {
    for (keep_open, most) in [(0, 0), (1, 1), (8, 8), (40, 40)] {
        let store = Store::with(|config| config.with_durability(Durability::None).with_keep_open(keep_open));
        for _ in 0..200 {
            let id = create(&store.handler, record("one of many")).await;
            put(&store.handler, &id, "once").await;
            put(&store.handler, &id, "kept, perhaps").await;
        }
        let open = open_files(&store.path());
        assert!(open <= most && (open > 0) == (most > 0), "{open} of {most}");
    }
}

#[tokio::test]
async fn whoever_waits_is_woken_by_a_holder_that_could_leave_the_file_open() {
    let store = Store::new();
    let (id, _) = kept(&store).await;
    let mut holder = open(&store.handler, &id, patient()).await;
    let mut child = Worker::start("wait", &format!("{}|{}", store.path().display(), id.as_str()));
    assert_eq!(child.line().as_deref(), Some("waiting"));
    let admin = store.handler.admin().unwrap();
    while admin.locks(std::num::NonZeroU32::MAX).await.unwrap()[0].waiting != Some(1) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    holder.save(&Change::Write(record("next, please")), wid()).await.unwrap();
    assert_eq!(open_files(&store.path()), 0, "closing is what wakes");
    assert_eq!(child.line().as_deref(), Some("in"));
    child.go_on();
    put(&store.handler, &id, "afterwards").await;
}

/// Runs in a child: has no descriptor left for anything new but those of files that stay open.
pub(crate) fn run_out_of_descriptors(dir: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        // There is room for all of them in each group, into whichever they fall; that takes a sixteenth of the descriptors.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 16 * 320, hard).unwrap();
        let config = FileConfig::new(dir).with_durability(Durability::None).with_keep_open(16 * 20);
        let handler = FileHandler::open_dir(config).unwrap();
        let mut ids = Vec::new();
        for _ in 0..20 {
            let id = create(&handler, record("new")).await;
            put(&handler, &id, "once").await;
            put(&handler, &id, "kept").await;
            ids.push(id);
        }
        assert_eq!(open_files(dir), ids.len());
        setrlimit(Resource::RLIMIT_NOFILE, 200, hard).unwrap();
        let mut others = Vec::new();
        while let Ok(other) = fs::File::open("/dev/null") {
            others.push(other);
        }
        let kept = fs::read_dir(dir);
        assert!(kept.is_err(), "there are descriptors left");
        for id in &ids {
            assert_eq!(view(&handler, id).await.unwrap().as_deref(), Some(&b"kept"[..]));
            put(&handler, id, "written").await;
        }
        create(&handler, record("one more")).await;
        drop(others);
        for id in &ids {
            assert_eq!(view(&handler, id).await.unwrap().as_deref(), Some(&b"written"[..]));
        }
    });
    say("done");
}

#[test]
fn files_that_stay_open_yield_when_descriptors_run_out() {
    let root = tempfile::tempdir().unwrap();
    let mut child = Worker::start("run out of descriptors", root.path().join("sessions").to_str().unwrap());
    assert_eq!(child.line().as_deref(), Some("done"));
}
