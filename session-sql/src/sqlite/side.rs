//! A file beside the database, with no content: what processes tell each other by kernel locks on its bytes.
//!
//! Each handler keeps the lock of one byte as long as it lives, so that others see at once when its process has ended. Writers who
//! find the database busy take a ticket, the lock of a byte whose place is the time of their arrival; whoever sees no earlier one is
//! first. Without, the process that has just written would be the next to write, again and again. Both vanish with their process.
//! Neither decides who may write what.

use std::path::Path;

/// The ending of the name of the file.
const ENDING: &str = "-turn";

#[cfg(target_os = "linux")]
mod kernel {
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;
    use std::time::Duration;

    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc;
    use nix::time::{ClockId, clock_gettime};

    /// Where the bytes of the living begin; the tickets stand before.
    const LIVING: i64 = 1 << 62;

    /// A ticket older than this counts for nothing: who has it may be stopped.
    const PATIENCE: Duration = Duration::from_millis(500);

    #[derive(Debug)]
    pub(in crate::sqlite) struct Side {
        file: File,
        ticket: Option<i64>,
    }

    impl Side {
        /// Opens the file, and takes the byte of `process`; `None` if there cannot be one.
        pub(in crate::sqlite) fn open(path: &Path, process: Option<i64>) -> Option<Self> {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path).ok()?;
            let this = Self { file, ticket: None };
            match process {
                Some(process) => this.set(libc::F_WRLCK, living(process)).then_some(this),
                None => Some(this),
            }
        }

        /// Says whether the process of another handler has ended.
        pub(in crate::sqlite) fn is_gone(&self, process: i64) -> bool {
            !self.is_taken(living(process), 1).unwrap_or(true)
        }

        /// Says whether others wait for their turn, not counting who has waited too long for one that works.
        pub(in crate::sqlite) fn is_line(&self) -> bool {
            let Some(now) = now() else { return false };
            let first = now - PATIENCE.as_micros() as i64;
            self.is_taken(first, LIVING - first).unwrap_or(false)
        }

        /// Takes the last place in the line if this is not in it.
        pub(in crate::sqlite) fn line_up(&mut self) {
            if let (None, Some(now)) = (self.ticket, now()) {
                // Two who arrive in the same microsecond stand one behind the other.
                self.ticket = (now..now + 1000).find(|place| self.set(libc::F_WRLCK, *place));
            }
        }

        pub(in crate::sqlite) fn is_first(&self) -> bool {
            let (Some(ticket), Some(now)) = (self.ticket, now()) else { return true };
            let first = now - PATIENCE.as_micros() as i64;
            ticket <= first || !self.is_taken(first, ticket - first).unwrap_or(false)
        }

        pub(in crate::sqlite) fn leave(&mut self) {
            if let Some(ticket) = self.ticket.take() {
                self.set(libc::F_UNLCK, ticket);
            }
        }

        fn set(&self, kind: i32, at: i64) -> bool {
            fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range(kind, at, 1))).is_ok()
        }

        /// Says whether somebody else has a lock there.
        fn is_taken(&self, from: i64, length: i64) -> Result<bool, Errno> {
            let mut lock = range(libc::F_WRLCK, from, length);
            fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock))?;
            Ok(i32::from(lock.l_type) != libc::F_UNLCK)
        }
    }

    fn living(process: i64) -> i64 {
        LIVING | (process & (LIVING - 1))
    }

    /// The time of arrival: microseconds since the machine was started, and always more than the patience.
    fn now() -> Option<i64> {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
        Some((1 << 32) + now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000)
    }

    fn range(kind: i32, start: i64, length: i64) -> libc::flock {
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: length, l_pid: 0 }
    }
}

/// Where there are no such locks, nobody is told anything: a lock ends with its lease, and the line has no order.
#[cfg(not(target_os = "linux"))]
mod kernel {
    use std::path::Path;

    #[derive(Debug)]
    pub(in crate::sqlite) struct Side;

    impl Side {
        pub(in crate::sqlite) fn open(_path: &Path, _process: Option<i64>) -> Option<Self> {
            None
        }

        pub(in crate::sqlite) fn is_gone(&self, _process: i64) -> bool {
            false
        }

        pub(in crate::sqlite) fn is_line(&self) -> bool {
            false
        }

        pub(in crate::sqlite) fn line_up(&mut self) {}

        pub(in crate::sqlite) fn is_first(&self) -> bool {
            true
        }

        pub(in crate::sqlite) fn leave(&mut self) {}
    }
}

pub(super) use kernel::Side;

/// Opens the file beside `database`; with the number of a handler, to say that this lives as long as the file is open.
pub(super) fn beside(database: &Path, process: Option<i64>) -> Option<Side> {
    let mut name = database.file_name()?.to_owned();
    name.push(ENDING);
    Side::open(&database.with_file_name(name), process)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_first_is_first_and_whoever_goes_is_gone() {
        let dir = tempfile::TempDir::new().unwrap();
        let database = dir.path().join("s.db");
        let [mut first, mut second, last] = [7, -7, i64::MAX].map(|process| beside(&database, Some(process)).unwrap());
        assert!(!last.is_gone(7) && !last.is_gone(-7) && !first.is_gone(i64::MAX));
        assert!(last.is_gone(8));
        assert!(!last.is_line());
        first.line_up();
        second.line_up();
        assert!(last.is_line() && second.is_line() && first.is_line());
        assert!(first.is_first() && !second.is_first());
        first.leave();
        assert!(second.is_first() && !second.is_line() && last.is_line());
        drop(second);
        assert!(!last.is_line() && last.is_gone(-7) && !last.is_gone(7));
        let again = beside(&database, Some(7));
        assert!(again.is_none(), "one number is of one handler");
    }
}
