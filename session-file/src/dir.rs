//! The directory: which name an id has, and which files under such names are ours.
//!
//! Everything is opened relative to a descriptor that was checked once, without following links. Other users may be able to
//! plant things here; what is not a plain file of ours is never followed, adopted or changed. Nothing here looks into a file.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use nix::dir::{Dir as DirStream, OwningIter};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, mkdirat};
use nix::unistd::{AccessFlags, UnlinkatFlags, faccessat, geteuid, unlinkat};
use rustix::fs::{AtFlags as StatAt, Mode as FileMode, OFlags, ResolveFlags, StatxFlags, fchmod, openat, openat2, statx};
use session_core::{Error, ErrorKind, Result, SessionId};

use crate::config::FileConfig;
use crate::kept::Kept;

/// The directory of the locks that stand by themselves. No id has a `~`.
const LOCKS: &str = "~locks";
/// The longest file name that file systems take, one less than the longest id.
const NAME_MAX: usize = 255;

/// An open, checked directory.
#[derive(Debug)]
pub(crate) struct Dir {
    path: PathBuf,
    fd: RwLock<Arc<OwnedFd>>,
    depth: usize,
    uid: u32,
    pub(crate) kept: Arc<Kept>,
    /// Whether the kernel knows `openat2`; a sandbox may not.
    resolve: AtomicBool,
}

/// What is asked about a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    pub(crate) links: u32,
    pub(crate) size: u64,
    /// Whether it was [marked](mark_dead).
    pub(crate) dead: bool,
    uid: u32,
    mode: u32,
}

/// Which file it is, under whatever name. As long as somebody has it open, no other file is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: (u32, u32),
    inode: u64,
}

/// Asks about an open file.
pub(crate) fn stat(file: impl AsFd) -> io::Result<Stat> {
    ask(file, "", StatAt::EMPTY_PATH)
}

/// Asks about what stands under a name, without following a link.
fn stat_at(dir: &OwnedFd, name: &str) -> io::Result<Stat> {
    ask(dir, name, StatAt::SYMLINK_NOFOLLOW)
}

/// Not `fstat`: it asks for the time of the last change too, and a kernel with fine-grained times then makes the next write a
/// transaction of its own, to keep the two apart. Measured: an eighth of the whole cycle of a session.
fn ask(place: impl AsFd, name: &str, flags: StatAt) -> io::Result<Stat> {
    let wanted =
        StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::NLINK | StatxFlags::UID | StatxFlags::INO | StatxFlags::SIZE;
    let answer = statx(place, name, flags, wanted)?;
    Ok(Stat {
        device: (answer.stx_dev_major, answer.stx_dev_minor),
        inode: answer.stx_ino,
        links: answer.stx_nlink,
        size: answer.stx_size,
        dead: answer.stx_mode & FileMode::SVTX.bits() as u16 != 0,
        uid: answer.stx_uid,
        mode: u32::from(answer.stx_mode),
    })
}

/// Marks a file as destroyed, for everybody who has it open, in the same answer that tells whether it still has a name.
///
/// The byte in the header is what lasts; this is what one call asks for. On a file the bit has no other meaning.
pub(crate) fn mark_dead(file: &File) -> io::Result<()> {
    Ok(fchmod(file, FileMode::RUSR | FileMode::WUSR | FileMode::SVTX)?)
}

/// What a file under the name of a session turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plain {
    /// A session file of ours.
    Ours,
    /// It has no name any more.
    Unlinked,
    /// Somebody else's: as good as absent, but nothing can be created in its place.
    Foreign,
}

impl Stat {
    pub(crate) fn identity(&self) -> Identity {
        Identity { device: self.device, inode: self.inode }
    }
}

impl Dir {
    /// Opens the directory of `config`, creates it if only itself is missing, and checks that nobody else can write to it and that
    /// kernel locks work.
    pub(crate) fn open(config: &FileConfig) -> Result<Self> {
        config.check()?;
        let mut path = config.dir.clone();
        let mut fd = open_checked(&path)?;
        if !config.prefix.is_empty() {
            path.push(&config.prefix);
            fd = open_checked(&path)?;
        }
        test_locks(&fd, &path)?;
        let depth = usize::from(config.depth);
        let fd = RwLock::new(Arc::new(fd));
        let kept = Arc::new(Kept::new(config.keep_open));
        Ok(Self { path, fd, depth, uid: geteuid().as_raw(), kept, resolve: AtomicBool::new(true) })
    }

    /// Returns the same directory behind a lock of its own, for another thread; the descriptor is one.
    pub(crate) fn another(&self) -> Self {
        let fd = RwLock::new(Arc::clone(&self.fd()));
        let resolve = AtomicBool::new(self.resolve.load(Ordering::Relaxed));
        Self { path: self.path.clone(), fd, depth: self.depth, uid: self.uid, kept: Arc::clone(&self.kept), resolve }
    }

    /// Returns the name of the file of a session, relative to the directory.
    pub(crate) fn name<'a>(&self, id: &'a SessionId) -> Cow<'a, str> {
        let id = id.as_str();
        match (long(id), self.depth) {
            (Some(long), _) => long.into(),
            (None, 0) => id.into(),
            (None, depth) => {
                let mut name = String::with_capacity(2 * depth + id.len());
                for level in id.chars().take(depth) {
                    name.extend([level, '/']);
                }
                name.push_str(id);
                name.into()
            }
        }
    }

    /// Returns the name of the file of a lock that stands by itself.
    pub(crate) fn lock_name(id: &SessionId) -> String {
        let id = id.as_str();
        format!("{LOCKS}/{}", long(id).as_deref().unwrap_or(id))
    }

    /// Opens a file; `None` if there is none. What it is must be [judged](Self::judge) before anything is done with it.
    pub(crate) fn open_file(&self, name: &str, write: bool, op: &'static str) -> Result<Option<File>> {
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let opened = self.openat(&self.fd(), name, access, FileMode::empty());
        match opened {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(Errno::ENOENT) => match self.opened_anew(op)? {
                true => self.open_file(name, write, op),
                false => Ok(None),
            },
            Err(errno) => {
                // Somebody else's file may well be closed to us; then it is a plant and no fault of the configuration.
                match stat_at(&self.fd(), name).map(|stat| self.judge(&stat, op)) {
                    Ok(Ok(Plain::Foreign)) => Ok(None),
                    Ok(Err(error)) => Err(error),
                    _ => Err(fault(op, errno)),
                }
            }
        }
    }

    /// Creates a file that nobody else has; `None` if the name is taken, by whatever it may be.
    pub(crate) fn create_file(&self, name: &str, op: &'static str) -> Result<Option<File>> {
        let mut retried = false;
        loop {
            let new = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
            let created = self.openat(&self.fd(), name, new, FileMode::RUSR | FileMode::WUSR);
            match created {
                Ok(fd) => return Ok(Some(File::from(fd))),
                Err(Errno::EEXIST) => return Ok(None),
                Err(Errno::ENOENT) if !retried => {
                    retried = true;
                    if !self.opened_anew(op)? {
                        self.make_parents(name).map_err(|errno| fault(op, errno))?;
                    }
                }
                Err(errno) => return Err(fault(op, errno)),
            }
        }
    }

    /// Says whose file this is. A file of ours that others may touch, or that is no plain file, is an error.
    pub(crate) fn judge(&self, stat: &Stat, op: &'static str) -> Result<Plain> {
        let plant = |what: &'static str| Err(Error::new(ErrorKind::Corrupt, op, what));
        if stat.links == 0 {
            return Ok(Plain::Unlinked);
        }
        let kind = stat.mode & SFlag::S_IFMT.bits();
        if kind != SFlag::S_IFREG.bits() {
            return plant(match SFlag::from_bits_truncate(kind) {
                SFlag::S_IFLNK => "a symbolic link stands where a session file should; it was left alone",
                SFlag::S_IFDIR => "a directory stands where a session file should; it was left alone",
                _ => "something stands where a session file should that is no plain file; it was left alone",
            });
        }
        if stat.uid != self.uid {
            tracing::warn!(owner = stat.uid, "a file of another user stands under the name of a session; it is ignored");
            return Ok(Plain::Foreign);
        }
        if stat.links > 1 {
            return plant("the session file has a second name (a hard link); it was left alone");
        }
        if stat.mode & 0o077 != 0 {
            let text = format!(
                "a session file has mode {:04o}, so others may touch it; run: find {} -type f -perm /077 -exec chmod 600 {{}} +",
                stat.mode & 0o7777,
                quote(&self.path)
            );
            return Err(Error::new(ErrorKind::Config, op, text));
        }
        Ok(Plain::Ours)
    }

    /// Whether `name` is still the file of `stat`.
    pub(crate) fn is_named(&self, name: &str, stat: &Stat) -> bool {
        self.stat_named(name, stat.identity()).is_some()
    }

    /// Asks about the file under `name`, if it is this one.
    pub(crate) fn stat_named(&self, name: &str, file: Identity) -> Option<Stat> {
        stat_at(&self.fd(), name).ok().filter(|stat| stat.identity() == file)
    }

    /// Removes `name` if it is still `file`, whose lock the caller owns.
    pub(crate) fn unlink(&self, name: &str, file: &File, op: &'static str) -> Result<bool> {
        let stat = stat(file).map_err(|cause| fault(op, cause))?;
        if stat.links == 0 || !self.is_named(name, &stat) {
            return Ok(false);
        }
        match unlinkat(&**self.fd(), name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(fault(op, errno)),
        }
    }

    /// Makes it last, beyond a power cut, that `name` is there or not.
    pub(crate) fn sync(&self, name: &str) -> io::Result<()> {
        let mut parent = Some(Path::new(name));
        while let Some(path) = parent.and_then(Path::parent) {
            let dir = self.open_dir(path.to_str().unwrap_or_default())?;
            File::from(dir).sync_all()?;
            parent = Some(path).filter(|path| !path.as_os_str().is_empty());
        }
        Ok(())
    }

    /// Streams through the names of session files, directory by directory.
    pub(crate) fn walk(self: &Arc<Self>) -> Walk {
        Walk { dir: Arc::clone(self), open: None, pending: vec![(String::new(), 0)] }
    }

    /// Reads the names in one directory, with their inodes; one that is not there, or is no directory of ours, has none.
    pub(crate) fn read(&self, path: &str) -> Result<impl Iterator<Item = Result<(String, u64)>> + use<>> {
        let stream = match self.open_dir(path) {
            Ok(fd) => Some(DirStream::from_fd(fd).map_err(|errno| fault("list", errno))?.into_iter()),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) if !path.is_empty() => None,
            Err(errno) => return Err(fault("list", errno)),
        };
        Ok(stream.into_iter().flatten().filter_map(|entry| match entry {
            // A name that is no UTF-8 is no id.
            Ok(entry) => entry.file_name().to_str().ok().map(|name| Ok((name.to_owned(), entry.ino()))),
            Err(errno) => Some(Err(fault("list", errno))),
        }))
    }

    /// The id of the session file `name` in the directory `path`, if that is what it is.
    pub(crate) fn id_of(path: &str, name: &str) -> Option<SessionId> {
        match path.strip_prefix('~') {
            Some(first) if name.len() == NAME_MAX => SessionId::parse(&format!("{}{name}", first.trim_end_matches('/'))),
            Some(_) => None,
            None => SessionId::parse(name).filter(|id| id.as_str().len() <= NAME_MAX),
        }
    }

    /// Whether a directory of this level holds session files.
    pub(crate) fn is_leaf(&self, level: usize) -> bool {
        level >= self.depth
    }

    /// The directory `name` in `path`, if session files may be below it.
    pub(crate) fn below(&self, path: &str, level: usize, name: &str) -> Option<(String, usize)> {
        let mut chars = name.chars();
        match (chars.next()?, chars.next(), chars.next()) {
            ('~', Some(first), None) if level == 0 && in_alphabet(first) => Some((format!("{name}/"), usize::MAX)),
            (shard, None, None) if level < self.depth && in_alphabet(shard) => Some((format!("{path}{name}/"), level + 1)),
            _ => None,
        }
    }

    /// Finds out, when a name was not found, whether the directory itself is gone, and opens what stands in its place; says
    /// whether it did.
    fn opened_anew(&self, op: &'static str) -> Result<bool> {
        let gone = stat(&**self.fd()).map_err(|cause| fault(op, cause))?.links == 0;
        if gone {
            // "No such session" would be wrong: the store does not answer.
            let fd = check(&self.path).map_err(|error| error.with_kind(ErrorKind::Unavailable))?;
            *self.fd.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fd);
        }
        Ok(gone)
    }

    fn make_parents(&self, name: &str) -> nix::Result<()> {
        for (slash, _) in name.match_indices('/') {
            match mkdirat(&**self.fd(), &name[..slash], Mode::S_IRWXU) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn open_dir(&self, path: &str) -> nix::Result<OwnedFd> {
        let path = if path.is_empty() { "." } else { path };
        self.openat(&self.fd(), path, OFlags::RDONLY | OFlags::DIRECTORY, FileMode::empty())
    }

    fn openat(&self, fd: &OwnedFd, name: &str, flags: OFlags, mode: FileMode) -> nix::Result<OwnedFd> {
        match self.openat_once(fd, name, flags, mode) {
            // What is only open for later has to yield to what is needed now.
            Err(Errno::EMFILE | Errno::ENFILE) if self.kept.let_go() => self.openat_once(fd, name, flags, mode),
            answer => answer,
        }
    }

    fn openat_once(&self, fd: &OwnedFd, name: &str, flags: OFlags, mode: FileMode) -> nix::Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let errno = |cause: rustix::io::Errno| Errno::from_raw(cause.raw_os_error());
        if name.contains('/') && self.resolve.load(Ordering::Relaxed) {
            // O_NOFOLLOW looks at the last part of a name only.
            match openat2(fd, name, flags, mode, ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH).map_err(errno) {
                Err(Errno::ENOSYS | Errno::EPERM) => self.resolve.store(false, Ordering::Relaxed),
                answer => return answer,
            }
        }
        openat(fd, name, flags, mode).map_err(errno)
    }

    /// Must not be kept while the directory may be opened anew.
    fn fd(&self) -> RwLockReadGuard<'_, Arc<OwnedFd>> {
        self.fd.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A walk through all session files, in the order in which the file system has them. Keeps one directory open.
pub(crate) struct Walk {
    dir: Arc<Dir>,
    open: Option<(String, usize, OwningIter)>,
    pending: Vec<(String, usize)>,
}

impl Walk {
    /// Returns the next session file, as id and inode, or `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<(SessionId, u64)>> {
        loop {
            let Some((path, level, stream)) = &mut self.open else {
                let Some((path, level)) = self.pending.pop() else { return Ok(None) };
                match self.dir.open_dir(&path).and_then(DirStream::from_fd) {
                    Ok(stream) => self.open = Some((path, level, stream.into_iter())),
                    Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) if !path.is_empty() => {}
                    Err(errno) => return Err(fault("list", errno)),
                }
                continue;
            };
            match stream.next() {
                None => self.open = None,
                Some(Err(errno)) => return Err(fault("list", errno)),
                Some(Ok(entry)) => {
                    let Ok(name) = entry.file_name().to_str() else { continue };
                    if let Some(below) = self.dir.below(path, *level, name) {
                        self.pending.push(below);
                    } else if self.dir.is_leaf(*level)
                        && let Some(id) = Dir::id_of(path, name)
                    {
                        return Ok(Some((id, entry.ino())));
                    }
                }
            }
        }
    }
}

impl std::fmt::Debug for Walk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Walk(..)")
    }
}

/// Turns what the operating system says about files into an error that says what to do.
pub(crate) fn fault(op: &'static str, cause: impl Into<io::Error>) -> Error {
    let cause = cause.into();
    let (kind, text) = match cause.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC) => (ErrorKind::Unavailable, "the disk is full; nothing was stored, what was there is intact"),
        Some(Errno::EDQUOT) => {
            (ErrorKind::Unavailable, "the quota is used up; nothing was stored, what was there is intact")
        }
        Some(Errno::EFBIG) => {
            (ErrorKind::Unavailable, "the file size limit of this process (RLIMIT_FSIZE) is reached; nothing was stored")
        }
        Some(Errno::EMFILE | Errno::ENFILE) => (ErrorKind::Unavailable, "too many open files; raise the limit (ulimit -n)"),
        Some(Errno::EACCES | Errno::EPERM) => (ErrorKind::Config, "permission denied; the files must belong to this user"),
        Some(Errno::EROFS) => (ErrorKind::Config, "the file system is mounted read-only; remount it read-write"),
        Some(Errno::ELOOP | Errno::EISDIR | Errno::ENXIO | Errno::ENOTDIR) => {
            (ErrorKind::Corrupt, "something stands where a session file should that is no plain file; it was left alone")
        }
        Some(Errno::ENOLCK | Errno::EOPNOTSUPP) => {
            (ErrorKind::Config, "this file system has no kernel locks; use a directory on a local one")
        }
        _ => (ErrorKind::Unavailable, "the file system does not answer"),
    };
    Error::new(kind, op, text).with_source(cause)
}

/// The name of an id that is too long for one: its first character becomes a directory.
fn long(id: &str) -> Option<String> {
    (id.len() > NAME_MAX).then(|| format!("~{}/{}", &id[..1], &id[1..]))
}

fn in_alphabet(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == ',' || c == '-'
}

fn config(text: String) -> Error {
    Error::new(ErrorKind::Config, "open directory", text)
}

fn open_checked(path: &Path) -> Result<OwnedFd> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
        // Whether it is there at all is what the check says better.
        Err(_) if path.exists() => {}
        Err(cause) => {
            let text = match cause.kind() {
                io::ErrorKind::NotFound => "its parent is missing",
                _ => "it is missing and cannot be created",
            };
            let cure = format!("cannot use {}: {text}; run: mkdir -p -m 0700 {0}", quote(path));
            return Err(config(cure).with_source(cause));
        }
    }
    check(path)
}

/// Opens a directory that is there and checks whose it is.
fn check(path: &Path) -> Result<OwnedFd> {
    let shown = quote(path);
    let refused = |text: String| config(format!("cannot use {shown}: {text}"));
    // Opening a FIFO would wait for somebody at its other end.
    let dir = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path).map_err(|cause| {
        let text = match cause.kind() {
            io::ErrorKind::NotFound => format!("it is missing; run: mkdir -p -m 0700 {shown}"),
            io::ErrorKind::PermissionDenied => format!("permission denied; run: chown {} {shown}", geteuid()),
            _ => "it cannot be opened".into(),
        };
        refused(text).with_source(cause)
    })?;
    let meta = dir.metadata().map_err(|cause| refused("it cannot be examined".into()).with_source(cause))?;
    if !meta.is_dir() {
        return Err(refused("it is not a directory".into()));
    }
    if meta.uid() != geteuid().as_raw() {
        let (owner, us) = (meta.uid(), geteuid());
        return Err(refused(format!("it belongs to uid {owner} and we are uid {us}; run: chown {us} {shown}")));
    }
    if meta.mode() & 0o022 != 0 {
        let mode = meta.mode() & 0o7777;
        return Err(refused(format!("mode {mode:04o} lets other users plant sessions; run: chmod 0700 {shown}")));
    }
    if meta.mode() & 0o055 != 0 {
        tracing::warn!("other users can list the session directory; run: chmod 0700 {shown}");
    }
    let dir = OwnedFd::from(dir);
    let access = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
    match faccessat(dir.as_fd(), ".", access, AtFlags::AT_EACCESS) {
        Ok(()) => Ok(dir),
        Err(Errno::EROFS) => Err(refused("its file system is mounted read-only; remount it read-write".into())),
        Err(errno) => {
            Err(refused(format!("we may not write to it; run: chmod 0700 {shown}")).with_source(io::Error::from(errno)))
        }
    }
}

/// Fails where a kernel lock is refused, or granted twice: nothing else keeps two writers apart.
fn test_locks(dir: &OwnedFd, path: &Path) -> Result<()> {
    let shown = quote(path);
    let refused = |text: &str| config(format!("cannot use {shown}: {text}; use a directory on a local file system"));
    let again = || openat(dir, ".", OFlags::RDONLY | OFlags::CLOEXEC, FileMode::empty()).map(File::from);
    let (first, second) = again().and_then(|first| Ok((first, again()?))).map_err(|cause| fault("open directory", cause))?;
    // Another process that is just testing shows as well that locks work.
    match first.try_lock() {
        Err(std::fs::TryLockError::WouldBlock) => return Ok(()),
        Err(std::fs::TryLockError::Error(cause)) => return Err(refused("kernel locks are refused").with_source(cause)),
        Ok(()) => {}
    }
    match second.try_lock() {
        Err(std::fs::TryLockError::WouldBlock) => {}
        Err(std::fs::TryLockError::Error(cause)) => return Err(refused("kernel locks are refused").with_source(cause)),
        Ok(()) => return Err(refused("kernel locks do not keep anybody out")),
    }
    if nix::sys::statfs::fstatfs(dir).is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::NFS_SUPER_MAGIC) {
        tracing::warn!("{shown} is on a network file system, where a lock can end unnoticed and waiters are not woken");
    }
    Ok(())
}

/// A path for a message: as a shell would take it.
fn quote(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,=@".contains(c);
    let within_quotes = |c: char| match c {
        '\'' => r"'\''".into(),
        _ if c.is_control() => "?".into(),
        _ => c.to_string(),
    };
    if text.chars().all(plain) { text } else { format!("'{}'", text.chars().map(within_quotes).collect::<String>()) }
}
