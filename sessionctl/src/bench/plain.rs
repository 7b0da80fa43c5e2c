//! Plain programs: what a session store costs that does the same calls to the kernel and keeps no promise beyond them.
//!
//! They run on plain threads, one file each, and know nothing of this library. They are the floor that ours is measured against.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crate::bench::Round;

/// Which plain program.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Program {
    /// Opens, locks, reads, writes over it, closes.
    InPlace,
    /// Locks a lock file, reads, writes a temporary file, renames it over the old one.
    Rename,
}

/// What is asked of the disk after each write, as `durability` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sync {
    None,
    /// The data of the file.
    Data,
    /// The directory too, if a name in it has changed.
    Full,
}

impl Program {
    /// Makes the files of `tasks` threads.
    pub(crate) fn prepare(self, directory: &Path, tasks: usize, payload: usize) -> io::Result<()> {
        for task in 0..tasks {
            std::fs::write(self.file(directory, task), vec![b'x'; payload])?;
        }
        Ok(())
    }

    fn file(self, directory: &Path, task: usize) -> PathBuf {
        match self {
            Self::InPlace => directory.join(format!("plain-{task}")),
            Self::Rename => directory.join(format!("rename-{task}")),
        }
    }

    /// Runs `tasks` threads, each on a file of its own, for `length`.
    pub(crate) fn run(
        self,
        directory: &Path,
        tasks: usize,
        payload: usize,
        sync: Sync,
        length: Duration,
    ) -> io::Result<Round> {
        let start = Barrier::new(tasks);
        let one = |task: usize| {
            let mut cycle = Cycle::new(self.file(directory, task), directory, payload, sync);
            let mut waits = Vec::with_capacity(1 << 17);
            start.wait();
            let started = Instant::now();
            let end = started + length;
            let mut before = started;
            while before < end {
                match self {
                    Self::InPlace => cycle.in_place()?,
                    Self::Rename => cycle.rename()?,
                }
                let now = Instant::now();
                waits.push(Round::nanos(now - before));
                before = now;
            }
            Ok::<_, io::Error>(Round { ran: (started, before), waits })
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..tasks).map(|task| scope.spawn(move || one(task))).collect();
            let rounds = threads.into_iter().map(|thread| thread.join().expect("the program does not panic"));
            rounds.collect::<io::Result<Vec<_>>>().map(Round::join)
        })
    }
}

struct Cycle {
    path: PathBuf,
    lock: PathBuf,
    temporary: PathBuf,
    directory: PathBuf,
    data: Vec<u8>,
    sync: Sync,
}

impl Cycle {
    fn new(path: PathBuf, directory: &Path, payload: usize, sync: Sync) -> Self {
        let (lock, temporary) = (path.with_extension("lock"), path.with_extension("tmp"));
        Self { path, lock, temporary, directory: directory.to_owned(), data: vec![0; payload], sync }
    }

    fn in_place(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        file.lock()?;
        file.read_exact_at(&mut self.data, 0)?;
        self.data[0] = self.data[0].wrapping_add(1);
        file.write_all_at(&self.data, 0)?;
        self.settle(&file)
    }

    fn rename(&mut self) -> io::Result<()> {
        let lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&self.lock)?;
        lock.lock()?;
        File::open(&self.path)?.read_exact(&mut self.data)?;
        self.data[0] = self.data[0].wrapping_add(1);
        let mut file = OpenOptions::new().write(true).create_new(true).open(&self.temporary)?;
        file.write_all(&self.data)?;
        self.settle(&file)?;
        std::fs::rename(&self.temporary, &self.path)?;
        if self.sync == Sync::Full {
            File::open(&self.directory)?.sync_all()?;
        }
        Ok(())
    }

    fn settle(&self, file: &File) -> io::Result<()> {
        match self.sync {
            Sync::None => Ok(()),
            Sync::Data | Sync::Full => file.sync_data(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_programs_change_the_file_once_a_cycle() {
        let directory = tempfile::tempdir().unwrap();
        for program in [Program::InPlace, Program::Rename] {
            program.prepare(directory.path(), 2, 64).unwrap();
            for sync in [Sync::None, Sync::Data, Sync::Full] {
                let before = std::fs::read(program.file(directory.path(), 1)).unwrap();
                let mut cycle = Cycle::new(program.file(directory.path(), 1), directory.path(), 64, sync);
                match program {
                    Program::InPlace => cycle.in_place().unwrap(),
                    Program::Rename => cycle.rename().unwrap(),
                }
                let after = std::fs::read(program.file(directory.path(), 1)).unwrap();
                assert_eq!((after[0], &after[1..]), (before[0].wrapping_add(1), &before[1..]), "{program:?} {sync:?}");
            }
            let round = program.run(directory.path(), 2, 64, Sync::None, Duration::from_millis(5)).unwrap();
            assert!(round.waits.len() >= 2);
        }
    }
}
