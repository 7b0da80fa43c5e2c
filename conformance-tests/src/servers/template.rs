//! Data directories of servers that take long to make: made once, and copied for each server.
//!
//! Nothing here knows what is in one.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, syncfs};

use super::process::Account;

/// A data directory as it was before its first start.
#[derive(Debug)]
pub(super) struct Template {
    place: PathBuf,
    account: Account,
}

impl Template {
    /// Names the one that `program` makes for `account` after this recipe. It lies beside the test executable, and goes when the
    /// target directory is cleaned.
    pub(super) fn of(program: &Path, account: Account, recipe: impl Hash) -> io::Result<Self> {
        let file = fs::metadata(program)?;
        let mut hasher = DefaultHasher::new();
        // The program by its file: asking it for its version would take a process each time.
        (program, file.len(), file.modified()?, Uid::effective().as_raw(), format!("{account:?}")).hash(&mut hasher);
        recipe.hash(&mut hasher);
        let name = program.file_name().unwrap_or_default().display();
        let place = std::env::current_exe()?.with_file_name(format!("template-{name}-{:016x}", hasher.finish()));
        Ok(Self { place, account })
    }

    /// Copies it to `target`, which is not there yet. If nobody has made it, `make` makes it in the directory that it is told, which
    /// the account owns.
    pub(super) fn copy(&self, target: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
        if !self.place.exists() {
            self.make(make)?;
        }
        copy(&self.place, target, self.account)
    }

    fn make(&self, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
        let lock = File::create(self.place.with_extension("lock"))?;
        lock.lock()?;
        if self.place.exists() {
            return Ok(());
        }
        // The account need not be able to reach our place.
        let directory = self.account.directory("template-")?;
        make(directory.path())?;
        let half = self.place.with_extension("half");
        match fs::remove_dir_all(&half) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        copy(directory.path(), &half, Account::Ours)?;
        // A name that survives a power failure promises that the content has.
        syncfs(File::open(&half)?)?;
        fs::rename(half, &self.place)
    }
}

/// Copies directories and files with their permissions; anything else is not in a template.
fn copy(source: &Path, target: &Path, account: Account) -> io::Result<()> {
    fs::create_dir(target)?;
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        let (from, to) = (entry.path(), target.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy(&from, &to, account)?;
        } else {
            fs::copy(&from, &to)?;
            account.own(&to)?;
        }
    }
    fs::set_permissions(target, fs::metadata(source)?.permissions())?;
    account.own(target)
}
