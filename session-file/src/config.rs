//! What can be set: directory, sharding, how much a power cut may take, and where file calls run.
//!
//! What [`Sessions`](https://docs.rs/sessionkit) acts on (time-outs, codec, hashing of ids) is not in here.

use std::path::PathBuf;

use session_core::{Dsn, Error, ErrorKind, Result};

/// What an acknowledged write survives. A killed process never costs an acknowledged write, at any level.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// Killed processes, not power cuts: nothing waits for the disk.
    None,
    /// Power cuts too: each write waits for one `fdatasync`.
    #[default]
    Data,
    /// As `Data`, and the directory is synced whenever a file appears or goes.
    Full,
}

/// Where the calls that touch files run.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// What only touches the page cache runs in place, because a hop to another thread costs ten times the calls. What may wait
    /// for the disk never does: to sync what a holder has saved is the work of at most sixteen threads of the store's own, which
    /// end when there is none, and the rest (a payload of a new session, a walk through the directory) runs on the runtime's
    /// blocking pool. As long as the disk is quick, a task that waits for it alone looks for its answer before it sleeps, for some
    /// hundred microseconds and giving way to others ([`SpinWait`](session_core::spin::SpinWait)). Of several at once,
    /// each from the second to the sixteenth has the disk begin in place, which waits for nothing but room in its queue.
    #[default]
    Auto,
    /// Everything runs in place. For a disk that never makes anybody wait, such as tmpfs.
    Inline,
    /// Everything runs on the blocking pool. For a disk so slow that even opening a file may wait for it.
    Pool,
}

/// The settings of a [`FileHandler`](crate::FileHandler) or a [`FileLock`](crate::FileLock).
#[allow(clippy::exhaustive_structs, reason = "a plain struct of settings; use `..FileConfig::default()`")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// The directory of the sessions, on a local file system. It is created, with mode 0700, if its parent is there.
    pub dir: PathBuf,
    /// A directory of its own within `dir` for the sessions of one application; empty for none.
    pub prefix: String,
    /// How many levels of directories, one leading character of the file name each, spread the files: 0 to 3. File systems of
    /// today need none; changing it hides the sessions that are there.
    pub depth: u8,
    /// What an acknowledged write survives.
    pub durability: Durability,
    /// Where the calls that touch files run.
    pub io: Io,
    /// The longest payload that is stored, in bytes.
    pub max_bytes: usize,
    /// How many files of sessions that nobody uses stay open, each for a second at most, so that the next request of the same
    /// visitor need not open it again; 0 for none. Never more than a sixteenth of the descriptors that the process may have.
    pub keep_open: usize,
}

impl Default for FileConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::new(),
            prefix: String::new(),
            depth: 0,
            durability: Durability::default(),
            io: Io::default(),
            max_bytes: Self::DEFAULT_MAX_BYTES,
            keep_open: Self::DEFAULT_KEEP_OPEN,
        }
    }
}

impl FileConfig {
    /// The default of [`max_bytes`](Self::max_bytes): 16 MiB.
    pub const DEFAULT_MAX_BYTES: usize = 16 << 20;
    /// The default of [`keep_open`](Self::keep_open).
    pub const DEFAULT_KEEP_OPEN: usize = 64;
    /// The most that a DSN may say for [`keep_open`](Self::keep_open).
    const MOST_KEPT_OPEN: u64 = 1024;
    /// The deepest sharding.
    pub const MAX_DEPTH: u8 = 3;

    /// The options of a `file://` DSN beside the common ones.
    pub const OPTIONS: &[&str] = &["depth", "durability", "io", "keep_open"];

    /// Takes the defaults for `dir`.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), ..Self::default() }
    }

    /// Reads `file:///path?depth=…&durability=…&io=…&keep_open=…`, with the common options `prefix` and `max_bytes`. The other common options
    /// are accepted for whoever acts on them.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names what is not accepted and lists what is.
    pub fn from_dsn(dsn: &Dsn) -> Result<Self> {
        if dsn.scheme() != "file" {
            return Err(config(format!("the scheme {} is not file", dsn.scheme().escape_debug())));
        }
        dsn.accept_options(Self::OPTIONS)?;
        if dsn.user().is_some() || dsn.password().is_some() || !dsn.hosts().is_empty() {
            return Err(config("a directory has no host and no user; write three slashes: file:///var/lib/app/sessions"));
        }
        let path = dsn.path().trim_end_matches('/');
        if path.is_empty() {
            return Err(config("the directory is missing; write file:///var/lib/app/sessions"));
        }
        if let Some("php") = dsn.option("layout") {
            return Err(config("layout=php is not supported by file:// in this version; accepted: native"));
        }
        dsn.choice("layout", &[("native", ())])?;
        let mut this = Self::new(path);
        if let Some(depth) = dsn.number("depth", 0..=u64::from(Self::MAX_DEPTH))? {
            this.depth = depth as u8;
        }
        let levels = [("none", Durability::None), ("data", Durability::Data), ("full", Durability::Full)];
        if let Some(durability) = dsn.choice("durability", &levels)? {
            this.durability = durability;
        }
        if let Some(io) = dsn.choice("io", &[("auto", Io::Auto), ("inline", Io::Inline), ("pool", Io::Pool)])? {
            this.io = io;
        }
        if let Some(bytes) = dsn.number("max_bytes", 1..=u64::from(u32::MAX))? {
            this.max_bytes = bytes as usize;
        }
        if let Some(files) = dsn.number("keep_open", 0..=Self::MOST_KEPT_OPEN)? {
            this.keep_open = files as usize;
        }
        // A kernel lock ends with its holder and not with time, so there is nothing that strict_expiry could refuse.
        dsn.flag("strict_expiry")?;
        this.prefix = dsn.option("prefix").unwrap_or_default().into();
        this.check()?;
        Ok(this)
    }

    /// The same with another prefix.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// The same with another depth of sharding.
    #[must_use]
    pub fn with_depth(mut self, depth: u8) -> Self {
        self.depth = depth;
        self
    }

    /// The same with another durability.
    #[must_use]
    pub fn with_durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// The same with another place for file calls.
    #[must_use]
    pub fn with_io(mut self, io: Io) -> Self {
        self.io = io;
        self
    }

    /// The same with another limit for payloads.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: usize) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    /// The same with another number of files that stay open.
    #[must_use]
    pub fn with_keep_open(mut self, files: usize) -> Self {
        self.keep_open = files;
        self
    }

    /// Checks what does not need the directory.
    pub(crate) fn check(&self) -> Result<()> {
        if self.dir.as_os_str().is_empty() {
            return Err(config("the directory of the session files is empty; there is no default"));
        }
        if self.depth > Self::MAX_DEPTH {
            return Err(config(format!("depth {} is more than {}", self.depth, Self::MAX_DEPTH)));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-:.,=@+".contains(c);
        if !self.prefix.chars().all(plain) || self.prefix.starts_with('.') || self.prefix.len() > 64 {
            return Err(config(
                "a prefix names a directory here: at most 64 of A-Z a-z 0-9 _ - : . , = @ +, not a dot first",
            ));
        }
        // One character would be taken for a shard of an application without a prefix.
        if self.prefix.len() == 1 {
            return Err(config("a prefix has at least two characters here, because shards are directories of one"));
        }
        Ok(())
    }
}

fn config(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, "file", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<FileConfig> {
        FileConfig::from_dsn(&Dsn::parse(text).unwrap())
    }

    #[test]
    fn every_option_is_read() {
        let config =
            parse("file:///var/lib/app/?depth=2&durability=full&io=pool&max_bytes=4096&keep_open=7&prefix=shop&ttl=20m")
                .unwrap();
        let expected = FileConfig::new("/var/lib/app")
            .with_depth(2)
            .with_durability(Durability::Full)
            .with_io(Io::Pool)
            .with_max_bytes(4096)
            .with_keep_open(7)
            .with_prefix("shop");
        assert_eq!(config, expected);
        assert_eq!(parse("file:///x").unwrap(), FileConfig::new("/x"));
        assert_eq!(FileConfig::default().durability, Durability::Data);
    }

    #[test]
    fn what_is_not_accepted_is_named() {
        for (dsn, part) in [
            ("file://sessions", "three slashes"),
            ("file://me@/x", "three slashes"),
            ("file://", "missing"),
            ("file:///", "missing"),
            ("file:///x?depth=4", "0 to 3"),
            ("file:///x?durability=fsync", "none, data, full"),
            ("file:///x?io=async", "auto, inline, pool"),
            ("file:///x?layout=php", "layout=php"),
            ("file:///x?layout=flat", "native"),
            ("file:///x?prefix=..", "prefix"),
            ("file:///x?prefix=a%2Fb", "prefix"),
            ("file:///x?prefix=a", "two characters"),
            ("file:///x?max_bytes=0", "max_bytes"),
            ("file:///x?keep_open=1025", "0 to 1024"),
            ("file:///x?strict_expiry=maybe", "strict_expiry"),
            ("file:///x?poll_min=1ms", "unknown option"),
            ("redis://h/0", "not file"),
        ] {
            let error = parse(dsn).expect_err(dsn);
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(part), "{dsn}: {error}");
        }
    }
}
