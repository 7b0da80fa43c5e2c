//! What the fault tests share: directories of their own, openings, numbers by chance, and a look at what stands on the disk.
//!
//! Nothing here looks into the crate: a test knows what anybody knows who uses it, and what lies in the directory.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs::{self, File};
use std::io::Write;
use std::num::NonZeroU32;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use session_core::{
    Error, Expect, OpenRequest, OpenSession, Record, Result, SessionHandler, SessionId, Ttl, WriteId, Written,
};
use session_file::{Durability, FileConfig, FileHandler};
use tempfile::TempDir;

pub(crate) const LEASE: Duration = Duration::from_secs(10);
/// Long enough that no opening prolongs it.
pub(crate) const LONG: Duration = Duration::from_secs(3600);

/// A directory for sessions within a directory for whatever else a test needs; both go with it.
pub(crate) struct Place {
    outer: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { outer: TempDir::new().unwrap() }
    }

    /// Where the sessions are.
    pub(crate) fn dir(&self) -> PathBuf {
        self.outer.path().join("sessions")
    }

    /// A path beside the sessions.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.outer.path().join(name)
    }

    pub(crate) fn config(&self) -> FileConfig {
        FileConfig::new(self.dir()).with_durability(Durability::None)
    }

    pub(crate) fn handler(&self) -> FileHandler {
        FileHandler::open_dir(self.config()).unwrap()
    }

    /// Finds out where the file of `id` stands, by creating it and taking it away again.
    pub(crate) async fn probe(&self, handler: &FileHandler, id: &SessionId) -> PathBuf {
        let before = tree(&self.dir());
        create(handler, id, b"probe").await;
        let added: Vec<_> = tree(&self.dir()).into_iter().filter(|path| path.is_file() && !before.contains(path)).collect();
        assert_eq!(added.len(), 1, "a session is one file");
        fs::remove_file(&added[0]).unwrap();
        added.into_iter().next().unwrap()
    }

    /// How many descriptors of this process point into this place.
    pub(crate) fn descriptors(&self) -> usize {
        let root = self.outer.path().canonicalize().unwrap();
        let open = fs::read_dir("/proc/self/fd").unwrap();
        open.filter(|fd| fd.as_ref().is_ok_and(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(&root)))).count()
    }
}

/// All paths below `dir`, sorted.
pub(crate) fn tree(dir: &Path) -> Vec<PathBuf> {
    let (mut found, mut pending) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                pending.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Everything about everything below a directory that must not change when it is left alone: kind and mode, owner, links,
/// inode, times of change, and what is in it.
pub(crate) fn snapshot(dir: &Path) -> BTreeMap<PathBuf, String> {
    let describe = |path: &Path| {
        let meta = fs::symlink_metadata(path).unwrap();
        let content = if meta.is_file() {
            format!("{:?}", fs::read(path).unwrap())
        } else if meta.is_symlink() {
            format!("{:?}", fs::read_link(path).unwrap())
        } else {
            String::new()
        };
        format!(
            "{:o} {}:{} {} {} {}.{:09} {content}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.nlink(),
            meta.ino(),
            meta.ctime(),
            meta.ctime_nsec(),
        )
    };
    tree(dir).into_iter().map(|path| (path.clone(), describe(&path))).collect()
}

/// Puts a file there with this mode, whatever the mask of the process is.
pub(crate) fn put_file(path: &Path, content: &[u8], mode: u32) {
    let mut file = File::options().write(true).create(true).truncate(true).mode(mode).open(path).unwrap();
    file.write_all(content).unwrap();
    file.set_permissions(fs::Permissions::from_mode(mode)).unwrap();
}

/// Whether nobody has the kernel's lock on a file.
pub(crate) fn is_free(path: &Path) -> bool {
    File::open(path).unwrap().try_lock().is_ok()
}

pub(crate) fn id() -> SessionId {
    SessionId::generate().unwrap()
}

pub(crate) fn exclusive() -> OpenRequest {
    OpenRequest::exclusive(Duration::from_secs(5), LEASE)
}

pub(crate) fn record(data: &[u8]) -> Record {
    Record::new(data, Ttl::new(LONG))
}

pub(crate) async fn write(opened: &mut Box<dyn OpenSession>, data: &[u8]) -> Result<Written> {
    opened.write(&record(data), WriteId::random().unwrap()).await
}

/// Writes a record under the lock, whether or not there is one, and lets go.
pub(crate) async fn create(handler: &FileHandler, id: &SessionId, data: &[u8]) {
    let mut opened = handler.open(id, &exclusive().expecting(Expect::Any)).await.unwrap();
    assert_eq!(write(&mut opened, data).await.unwrap(), Written::Applied);
    opened.close().await.unwrap();
}

/// Reads without a lock.
pub(crate) async fn view(handler: &FileHandler, id: &SessionId) -> Result<Option<Vec<u8>>> {
    let mut opened = handler.open(id, &OpenRequest::read_only()).await?;
    Ok(opened.read().await?.map(|record| record.data))
}

/// Reads under the lock, and lets go.
pub(crate) async fn read(handler: &FileHandler, id: &SessionId) -> Result<Option<Vec<u8>>> {
    let mut opened = handler.open(id, &exclusive()).await?;
    let data = opened.read().await?.map(|record| record.data);
    opened.close().await?;
    Ok(data)
}

pub(crate) async fn destroy(handler: &FileHandler, id: &SessionId) -> Result<Option<Vec<u8>>> {
    let mut opened = handler.open(id, &OpenRequest::destroy()).await?;
    Ok(opened.destroy().await?.map(|record| record.data))
}

pub(crate) fn many() -> NonZeroU32 {
    NonZeroU32::new(1_000_000).unwrap()
}

/// Everything that an error shows of itself and of its causes.
pub(crate) fn text(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(" {error} {error:?}"));
        cause = error.source();
    }
    text
}

/// Asserts that an error says nothing of the id.
pub(crate) fn keeps_secret(error: &Error, id: &SessionId) {
    let (text, id) = (text(error), id.as_str());
    assert!(!text.contains(&id[1..]), "an id of {} characters is shown in {} of text", id.len(), text.len());
}

/// Numbers by chance that can be had again: the seed is printed, and taken from `SEED` if that is set.
#[derive(Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new() -> Self {
        let seed = match std::env::var("SEED") {
            Ok(seed) => seed.parse().expect("SEED is a number"),
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
        };
        println!("SEED={seed}");
        Self(seed)
    }

    pub(crate) fn from_seed(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A payload that says of itself which session it is of, which number it has and how long it is; the rest follows from these,
/// so that what is torn, mixed or another session's does not pass.
pub(crate) fn numbered(session: u64, number: u64, length: usize) -> Vec<u8> {
    let mut data = format!("{session} {number} {length}\n").into_bytes();
    let mut tag = Chance::from_seed(session ^ (number << 8) ^ ((length as u64) << 40));
    let tag = tag.next().to_le_bytes();
    data.extend(tag.iter().cycle().take(length));
    data
}

/// The number of a payload that is whole.
pub(crate) fn number(session: u64, data: &[u8]) -> u64 {
    let line = data.split(|byte| *byte == b'\n').next().unwrap();
    let words: Vec<u64> =
        String::from_utf8_lossy(line).split(' ').map(|word| word.parse().expect("a payload begins with numbers")).collect();
    assert!(words.len() == 3 && words[0] == session, "a payload of session {session} begins with {words:?}");
    let expected = numbered(session, words[1], words[2] as usize);
    assert!(data == expected, "payload {} of session {session} is torn or mixed", words[1]);
    words[1]
}

/// A small file system in memory, which only the thread sees that made it, and those that it starts from then on.
pub(crate) struct SmallDisk {
    place: TempDir,
}

impl SmallDisk {
    /// `options` are those of tmpfs, such as `size=1m`.
    pub(crate) fn new(options: &str) -> Self {
        let place = TempDir::new().unwrap();
        unshare(CloneFlags::CLONE_NEWNS).expect("these tests mount file systems: run them as root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts can be kept private");
        let options = format!("mode=0700,{options}");
        mount(Some("tmpfs"), place.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .expect("these tests mount file systems: run them as root, where mounting is allowed");
        Self { place }
    }

    pub(crate) fn path(&self) -> &Path {
        self.place.path()
    }

    /// Makes it read-only, or writable again.
    pub(crate) fn read_only(&self, read_only: bool) {
        let mut flags = MsFlags::MS_REMOUNT;
        flags.set(MsFlags::MS_RDONLY, read_only);
        let none: Option<&str> = None;
        mount(none, self.path(), none, flags, none).unwrap();
    }

    /// Takes all the space that is left but for `spare` bytes.
    pub(crate) fn fill(&self, spare: u64) {
        let mut ballast = File::create(self.ballast()).unwrap();
        let block = [0x55; 4096];
        while ballast.write_all(&block).is_ok() {}
        let length = ballast.metadata().unwrap().len();
        ballast.set_len(length.saturating_sub(spare)).unwrap();
    }

    /// Gives it back.
    pub(crate) fn empty(&self) {
        // A child that another test of this process starts has all its descriptors until it runs its own program, and a removed
        // file keeps its room until the last one is closed. A shortened one does not.
        File::create(self.ballast()).unwrap();
        fs::remove_file(self.ballast()).unwrap();
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

/// Set in the environment of a child: where it is to work.
const CHILD: &str = "SESSION_FILE_CHILD";

/// This executable, to be run again for one of its tests, which then finds [`child_place`].
pub(crate) fn child_of(test: &str, place: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CHILD, place);
    command
}

/// What the parent gave to this process, if it is a child.
pub(crate) fn child_place() -> Option<String> {
    std::env::var(CHILD).ok()
}

pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}
