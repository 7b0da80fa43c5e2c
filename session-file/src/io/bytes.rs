//! Bytes to and from a file, and to the disk: what a call to the kernel may do short of what was asked, and the limit beyond which
//! the kernel does not refuse but kills.
//!
//! Nothing here knows what the bytes mean.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use rustix::fs::{Advice, fadvise};
use rustix::io::{pread, pwrite};
use session_core::{Error, ErrorKind, Result};

thread_local! {
    /// The last answer of [`recent_limit`], and when it was given.
    static LIMIT: Cell<Option<(u64, TimeSpec)>> = const { Cell::new(None) };
}

/// Reads the head of a file. A regular file answers short only at its end, so there is no second call to make sure.
pub(crate) fn read_head(file: &File, bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match pread(file, &mut *bytes, 0) {
            Err(rustix::io::Errno::INTR) => {}
            answer => return Ok(answer?),
        }
    }
}

pub(super) fn read_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match pread(file, &mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    Ok(done)
}

/// Writes all of `bytes`, or refuses what is beyond the limit of this process, even within a file: the kernel would kill.
pub(crate) fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    if at + bytes.len() as u64 > recent_limit() {
        return Err(Errno::EFBIG.into());
    }
    let mut done = 0;
    while done < bytes.len() {
        match pwrite(file, &bytes[done..], at + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    Ok(())
}

/// Waits until what was written is on the disk.
pub(super) fn sync(file: &File) -> io::Result<()> {
    #[cfg(test)]
    if super::tests::SYNC_FAILS.take() {
        return Err(Errno::EIO.into());
    }
    file.sync_data()
}

/// Has the disk begin with what was written there, and waits for nothing but room in its queue: the sync that
/// follows finds it at work.
///
/// The kernel takes the word that bytes will not be needed soon as that, and lets go of the pages that are named whole. So none is:
/// of two pages at the most, a first byte is left out, and the last one too, which at the end of a file stands for its page. A
/// file system that does not know the word writes when it is synced; what fails is told there in either case.
pub(super) fn begin_sync(file: &File, from: u64, to: u64) {
    const PAGE: u64 = 4096;
    let from = from + u64::from(from.is_multiple_of(PAGE));
    let to = to.saturating_sub(1).min((from / PAGE + 2) * PAGE - 1);
    if let Some(length) = NonZeroU64::new(to.saturating_sub(from)) {
        let _ = fadvise(file, from, Some(length), Advice::DontNeed);
    }
}

/// Whether the cause is that there is no room.
pub(super) fn is_full(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    let errno = cause.and_then(io::Error::raw_os_error).map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG))
}

/// The limit of this process for the length of its files, as it was at most a tenth of a second ago: who lowers it does so when
/// his process begins, and asking costs as much as looking for a session.
fn recent_limit() -> u64 {
    // The clock of the timer tick: four times as cheap as the exact one.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE);
    LIMIT.with(|last| match (last.get(), now) {
        (Some((limit, asked)), Ok(now)) if Duration::from(now - asked) < Duration::from_millis(100) => limit,
        (_, now) => {
            let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(limit, _)| limit);
            last.set(now.ok().map(|now| (limit, now)));
            limit
        }
    })
}

/// Refuses to grow a file beyond the limit of this process: the kernel would not refuse but kill.
pub(super) fn within_limit(end: u64, op: &'static str) -> Result<()> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if end > limit => {
            let text = format!("the file would grow to {end} bytes, and this process may write {limit} (RLIMIT_FSIZE)");
            Err(Error::new(ErrorKind::Unavailable, op, text))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;

    use rustix::io::{ReadWriteFlags, preadv2};

    use super::*;

    #[test]
    fn the_disk_is_told_to_begin_without_letting_go_of_a_page() {
        let root = tempfile::tempdir().unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(root.path().join("file")).unwrap();
        let bytes: Vec<u8> = (0..5 * 4096 - 100u32).map(|at| (at % 251) as u8).collect();
        let ends = [0, 1, 2, 100, 4095, 4096, 4097, 8191, 8192, 8193, 12_288, 16_383, 16_384, 20_379, 20_380];
        for (from, to) in ends.into_iter().flat_map(|from| ends.into_iter().map(move |to| (from, to))) {
            // Written together they would be kept together, and on their way to the disk they would be kept in any case.
            for (page, bytes) in (0u64..).zip(bytes.chunks(4096)) {
                write_at(&file, bytes, page * 4096).unwrap();
            }
            sync(&file).unwrap();
            begin_sync(&file, from, to);
            for page in 0..5 {
                let mut read = [0; 4096];
                match preadv2(&file, &mut [IoSliceMut::new(&mut read)], page * 4096, ReadWriteFlags::NOWAIT) {
                    Ok(length) => assert_eq!(&read[..length], bytes.chunks(4096).nth(page as usize).unwrap()),
                    // Some file systems that have nothing but pages do not know the question.
                    Err(errno) => assert_eq!(errno, rustix::io::Errno::OPNOTSUPP, "page {page} went with {from}..{to}"),
                }
            }
        }
    }
}
