//! The book of one process: which writes it began and which were acknowledged, on a file that survives its death.
//!
//! Each entry is one `pwrite` of a few bytes: once it has returned, the kernel has it, whatever becomes of the process. It need
//! not survive a power cut, which would take the parent as well.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use session_core::{Error, ErrorKind, Result};

/// The numbers that a process counts; the order is that of [`Stats::numbers`].
const STATS: usize = 16;
/// Buckets per doubling of the waiting time: one is three per cent wide.
const FINE: usize = 32;
const BUCKETS: usize = 40 * FINE;
const CELLS_AT: u64 = (STATS + BUCKETS) as u64 * 8;

/// What a process counts besides its writes. Of a killed one, the last few milliseconds may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stats {
    pub(super) acquired: u64,
    pub(super) fenced: u64,
    pub(super) gone: u64,
    pub(super) conflicts: u64,
    pub(super) refused: u64,
    pub(super) errors: u64,
    pub(super) corrupt: u64,
    pub(super) longest_wait_us: u64,
}

impl Stats {
    fn numbers(&self) -> [u64; 8] {
        let Self { acquired, fenced, gone, conflicts, refused, errors, corrupt, longest_wait_us } = *self;
        [acquired, fenced, gone, conflicts, refused, errors, corrupt, longest_wait_us]
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.acquired += other.acquired;
        self.fenced += other.fenced;
        self.gone += other.gone;
        self.conflicts += other.conflicts;
        self.refused += other.refused;
        self.errors += other.errors;
        self.corrupt += other.corrupt;
        self.longest_wait_us = self.longest_wait_us.max(other.longest_wait_us);
    }
}

/// How often a session was waited for how long.
#[derive(Clone, Debug)]
pub(super) struct Waits(Vec<u64>);

impl Default for Waits {
    fn default() -> Self {
        Self(vec![0; BUCKETS])
    }
}

impl Waits {
    pub(super) fn note(&mut self, wait: Duration) {
        let micros = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        self.0[Self::bucket(micros)] += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine += theirs;
        }
    }

    /// Returns the upper end of the bucket that the `share` smallest waits end in, in microseconds; zero if there are none.
    pub(super) fn quantile(&self, share: f64) -> u64 {
        let all: u64 = self.0.iter().sum();
        if all == 0 {
            return 0;
        }
        let wanted = ((all as f64 * share).ceil() as u64).clamp(1, all);
        let mut seen = 0;
        let at = self.0.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        Self::upper_end(at.unwrap_or(BUCKETS - 1))
    }

    /// Up to twice `FINE` each microsecond has a bucket; from there on `FINE` of them share a doubling.
    fn bucket(micros: u64) -> usize {
        let fine = FINE as u64;
        if micros < 2 * fine {
            return usize::try_from(micros).expect("less than 64");
        }
        let shift = micros.ilog2() - FINE.ilog2();
        let at = (shift as usize) * FINE + usize::try_from(micros >> shift).expect("less than 64");
        at.min(BUCKETS - 1)
    }

    fn upper_end(bucket: usize) -> u64 {
        if bucket < 2 * FINE {
            return bucket as u64;
        }
        let shift = bucket / FINE - 1;
        (((bucket - shift * FINE) as u64 + 1) << shift) - 1
    }
}

/// Where a task is in the numbering of its writes to one session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    /// The highest number that was given to the store and not certainly refused.
    pub(super) begun: u64,
    /// The highest number whose fate is written down: acknowledged, unless it is listed as doubtful.
    pub(super) resolved: u64,
}

/// The file, and beside it the list of the doubtful.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    doubtful: File,
    tasks: u32,
    sessions: u32,
}

impl Journal {
    pub(super) fn create(path: PathBuf, tasks: u32, sessions: u32) -> Result<Self> {
        let journal = Self::on(path, tasks, sessions, true)?;
        let cells = u64::from(tasks) * u64::from(sessions) * 16;
        journal.file.set_len(CELLS_AT + cells).map_err(|e| broken(&e))?;
        Ok(journal)
    }

    pub(super) fn open(path: PathBuf, tasks: u32, sessions: u32) -> Result<Self> {
        Self::on(path, tasks, sessions, false)
    }

    fn on(path: PathBuf, tasks: u32, sessions: u32, new: bool) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(new);
        let file = options.open(&path).map_err(|e| broken(&e))?;
        let list = path.with_extension("doubtful");
        let doubtful = OpenOptions::new().read(true).append(true).create_new(new).open(list).map_err(|e| broken(&e))?;
        Ok(Self { path, file, doubtful, tasks, sessions })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn cell(&self, task: u32, session: u32) -> Result<Cell> {
        let numbers = self.numbers(self.cell_at(task, session), 2)?;
        Ok(Cell { begun: numbers[0], resolved: numbers[1] })
    }

    /// Writes down where a task is. Both numbers change in one step.
    pub(super) fn set_cell(&self, task: u32, session: u32, cell: Cell) -> Result<()> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&cell.begun.to_le_bytes());
        bytes[8..].copy_from_slice(&cell.resolved.to_le_bytes());
        self.file.write_all_at(&bytes, self.cell_at(task, session)).map_err(|e| broken(&e))
    }

    /// Writes down that nobody was told what became of a write. To be done before the cell says that it is resolved.
    pub(super) fn doubt(&self, task: u32, session: u32, n: u64) -> Result<()> {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&task.to_le_bytes());
        bytes[4..8].copy_from_slice(&session.to_le_bytes());
        bytes[8..].copy_from_slice(&n.to_le_bytes());
        io::Write::write_all(&mut &self.doubtful, &bytes).map_err(|e| broken(&e))
    }

    /// Returns the doubtful writes of a task to a session, in order.
    pub(super) fn doubtful(&self, task: u32, session: u32) -> Result<Vec<u64>> {
        let all = std::fs::read(self.path.with_extension("doubtful")).map_err(|e| broken(&e))?;
        let of_pair = [task.to_le_bytes(), session.to_le_bytes()].concat();
        let entries = all.chunks_exact(16).filter(|entry| entry[..8] == of_pair);
        let number = |entry: &[u8]| u64::from_le_bytes(entry[8..].try_into().expect("half of sixteen bytes"));
        let mut numbers: Vec<u64> = entries.map(number).collect();
        // A process that is killed between the two entries of a doubt leaves it to be written down again.
        numbers.sort_unstable();
        numbers.dedup();
        Ok(numbers)
    }

    /// After the death of the process: what was under way is doubtful.
    pub(super) fn close_books(&self) -> Result<()> {
        for (task, session) in (0..self.tasks).flat_map(|task| (0..self.sessions).map(move |session| (task, session))) {
            let cell = self.cell(task, session)?;
            for n in cell.resolved + 1..=cell.begun {
                self.doubt(task, session, n)?;
            }
            // A number that was taken back after a refusal is given out again.
            self.set_cell(task, session, Cell { begun: cell.begun, resolved: cell.begun })?;
        }
        Ok(())
    }

    /// Returns the sum of all resolved numbers: the acknowledged writes, but for the few doubtful ones.
    pub(super) fn resolved(&self) -> Result<u64> {
        let cells = self.tasks as usize * self.sessions as usize;
        Ok(self.numbers(CELLS_AT, cells * 2)?.chunks_exact(2).map(|cell| cell[1]).sum())
    }

    pub(super) fn stats(&self) -> Result<Stats> {
        let numbers = self.numbers(0, STATS)?;
        let [acquired, fenced, gone, conflicts, refused, errors, corrupt, longest_wait_us, ..] = numbers[..] else {
            unreachable!("as many numbers as were asked for")
        };
        Ok(Stats { acquired, fenced, gone, conflicts, refused, errors, corrupt, longest_wait_us })
    }

    pub(super) fn waits(&self) -> Result<Waits> {
        Ok(Waits(self.numbers(STATS as u64 * 8, BUCKETS)?))
    }

    pub(super) fn set_stats(&self, stats: &Stats, waits: &Waits) -> Result<()> {
        let mut numbers = stats.numbers().to_vec();
        numbers.resize(STATS, 0);
        numbers.extend(&waits.0);
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.file.write_all_at(&bytes, 0).map_err(|e| broken(&e))
    }

    fn cell_at(&self, task: u32, session: u32) -> u64 {
        CELLS_AT + (u64::from(task) * u64::from(self.sessions) + u64::from(session)) * 16
    }

    fn numbers(&self, at: u64, count: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; count * 8];
        self.file.read_exact_at(&mut bytes, at).map_err(|e| broken(&e))?;
        Ok(bytes.chunks_exact(8).map(|n| u64::from_le_bytes(n.try_into().expect("eight bytes"))).collect())
    }
}

pub(super) fn broken(error: &io::Error) -> Error {
    Error::new(ErrorKind::Unexpected, "hammer", "the journal in the temporary directory cannot be used")
        .with_source(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_is_read_back_by_another_process() -> Result<()> {
        let directory = tempfile::tempdir().map_err(|e| broken(&e))?;
        let path = directory.path().join("journal");
        let parent = Journal::create(path.clone(), 3, 5)?;
        let worker = Journal::open(path, 3, 5)?;
        worker.set_cell(2, 4, Cell { begun: 9, resolved: 8 })?;
        worker.set_cell(0, 1, Cell { begun: 4, resolved: 4 })?;
        worker.doubt(0, 1, 3)?;
        worker.doubt(0, 1, 1)?;
        worker.doubt(1, 0, 7)?;
        let stats =
            Stats { acquired: 1, fenced: 2, gone: 3, conflicts: 4, refused: 5, errors: 6, corrupt: 7, longest_wait_us: 8 };
        let mut waits = Waits::default();
        waits.note(Duration::from_micros(1500));
        worker.set_stats(&stats, &waits)?;
        assert_eq!((parent.stats()?, parent.resolved()?), (stats, 12));
        assert_eq!(parent.doubtful(0, 1)?, [1, 3]);
        parent.close_books()?;
        parent.close_books()?;
        assert_eq!(worker.cell(2, 4)?, Cell { begun: 9, resolved: 9 });
        assert_eq!((worker.doubtful(2, 4)?, worker.doubtful(0, 1)?), (vec![9], vec![1, 3]));
        let p50 = parent.waits()?.quantile(0.5);
        assert!((1500..1550).contains(&p50), "{p50}");
        Ok(())
    }

    #[test]
    fn waits_are_kept_to_three_per_cent() {
        for micros in [0, 1, 31, 32, 63, 64, 65, 127, 128, 1000, 123_456, 60_000_000, 3_600_000_000] {
            let end = Waits::upper_end(Waits::bucket(micros));
            assert!(end >= micros && end <= micros + micros / 31 + 1, "{micros} is kept as {end}");
        }
        assert_eq!(Waits::bucket(u64::MAX), BUCKETS - 1);
        let mut waits = Waits::default();
        assert_eq!(waits.quantile(0.5), 0);
        for micros in 1..=100 {
            waits.note(Duration::from_micros(micros));
        }
        assert_eq!((waits.quantile(0.5), waits.quantile(0.0), waits.quantile(1.0)), (50, 1, 101));
    }
}
