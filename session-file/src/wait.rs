//! Waiting for a file lock: first come, first served across processes, woken by the release, and no thread per waiter.
//!
//! A waiter takes a ticket, an open-file-description lock on one byte far behind the data whose place is the time of arrival.
//! Whoever sees no lock before his own is first. Tickets vanish with their process, so nobody waits behind the dead. A kernel
//! lock cannot be waited for without a thread, but closing a file that was open for writing can be watched: holders, waiters
//! and the collector all open files read-write and close them when they let go. A holder may leave the file open only if he has
//! found nobody in line after unlocking it. A slow tick covers what cannot be watched, and a waiter at the head who was stopped.
//!
//! Nothing here knows what is in the files.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nix::time::{ClockId, clock_gettime};
use session_core::Result;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use crate::config::Io;
use crate::store::run;

/// How often a waiter looks without having been woken.
const TICK: Duration = Duration::from_millis(50);
/// How soon a waiter looks again who was woken and found the lock still taken.
const GLANCE: Duration = Duration::from_millis(2);
/// After this many looks in a row without news, a waiter may get in although others came first: the first may be stopped.
const PATIENCE: u32 = 3;
/// Where the tickets begin.
const TICKETS: i64 = 1 << 62;
/// The byte that destroyers of a session lock one after the other.
const DESTROYERS: i64 = TICKETS - 1;
/// How often a destroyer looks whether the one before is through. That takes microseconds, unless he was stopped: then he is passed.
const LOOKS: u32 = 200;

/// What came of a try to get a lock.
pub(crate) enum Attempt<T> {
    /// There is nothing more to wait for.
    Done(T),
    /// Somebody else has it. `moved` says that the name stands for another file now.
    Busy { file: File, moved: bool },
}

/// Tries until there is nothing more to wait for or `until` has come; then returns the file that is still locked.
///
/// `attempt` is called when it is this waiter's turn, `peek` when it is not, and `mark` once for each file that is waited for.
pub(crate) async fn in_line<T, A, P, M>(
    watch: &Arc<Watch>,
    io: Io,
    mut file: File,
    until: Instant,
    attempt: A,
    peek: P,
    mark: M,
) -> Result<std::result::Result<T, File>>
where
    T: Send + 'static,
    A: Fn(File) -> Result<Attempt<T>> + Clone + Send + 'static,
    P: Fn(&File) -> Option<T> + Send,
    M: Fn(&File) + Send,
{
    loop {
        let ticket = Ticket::take(&file);
        let news = watch.subscribe(&file);
        mark(&file);
        let (mut quiet, mut tick) = (0, TICK);
        let mut idle = false;
        loop {
            // Listening starts before trying: a release in between is not missed.
            let mut woken = std::pin::pin!(news.listen());
            woken.as_mut().enable();
            let first = ticket.as_ref().is_none_or(|ticket| ticket.is_first(&file));
            // Whoever is not first and finds the lock free leaves it to the first for one more tick: he may be on his way.
            let passes = !first && quiet >= PATIENCE && std::mem::replace(&mut idle, is_idle(&file));
            if first || passes {
                let attempt = attempt.clone();
                match run(io, false, move || attempt(file)).await?? {
                    Attempt::Done(done) => return Ok(Ok(done)),
                    Attempt::Busy { file: back, moved } => {
                        file = back;
                        if moved {
                            break;
                        }
                    }
                }
            } else if let Some(done) = peek(&file) {
                return Ok(Ok(done));
            }
            let now = Instant::now();
            if now >= until {
                return Ok(Err(file));
            }
            (quiet, tick) = match timeout_at(until.min(now + tick), woken).await {
                // The kernel tells of a killed holder's file a moment before it gives up the lock.
                Ok(()) => {
                    idle = false;
                    (0, GLANCE)
                }
                Err(_) => (quiet + 1, TICK),
            };
        }
    }
}

/// When a wait that begins now is over.
pub(crate) fn deadline(wait: Duration) -> Instant {
    // A century is as good as for ever, and can be added.
    Instant::now() + wait.min(Duration::from_secs(100 * 365 * 24 * 3600))
}

/// A place in the line for one file.
struct Ticket(i64);

impl Ticket {
    /// Takes the last place; `None` where the file system has no such locks, and then everybody tries at once.
    fn take(file: &File) -> Option<Self> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).ok()?;
        let arrival = TICKETS + now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000;
        // Two who arrive in the same microsecond stand one behind the other.
        for place in arrival..arrival + 1000 {
            match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, place, 1))) {
                Ok(_) => return Some(Self(place)),
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(_) => return None,
            }
        }
        None
    }

    fn is_first(&self, file: &File) -> bool {
        self.0 == TICKETS || !taken(file, TICKETS, self.0 - TICKETS)
    }
}

/// Whether nobody has the lock of `file` at this moment.
fn is_idle(file: &File) -> bool {
    // There is no way to ask without taking it for an instant. If that meets somebody else's try, he looks again in a moment.
    file.try_lock().is_ok_and(|()| file.unlock().is_ok())
}

/// Whether anybody stands in line for `file`, apart from `file` itself.
pub(crate) fn line(file: &File) -> bool {
    taken(file, TICKETS, 0)
}

/// Whether nobody stands in line for `file` for sure.
pub(crate) fn nobody_waits(file: &File) -> bool {
    let mut lock = range(libc::F_WRLCK, TICKETS, 0);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) == libc::F_UNLCK
}

/// Leaves the line, if `file` stands in it.
pub(crate) fn leave(file: &File) {
    // If this fails, the place is given up with the file.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, TICKETS, 0)));
}

/// Waits until no other destroyer is at work on `file`, and keeps others out until it is closed.
pub(crate) fn pass_alone(file: &File) {
    for look in 0..LOOKS {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, DESTROYERS, 1))) {
            Err(Errno::EAGAIN | Errno::EACCES) => a_moment(look, LOOKS),
            _ => return,
        }
    }
}

/// Pauses after one of so many looks at what takes microseconds unless somebody was stopped, and longer in the second half.
pub(crate) fn a_moment(look: u32, looks: u32) {
    if look < looks / 2 {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Whether the kernel's list of locks has a place in line at `start`.
pub(crate) fn is_ticket(start: u64) -> bool {
    start >= TICKETS as u64
}

/// Whether somebody else has a place from `start` on; a length of zero is up to the end.
fn taken(file: &File, start: i64, length: i64) -> bool {
    let mut lock = range(libc::F_WRLCK, start, length);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
}

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: length, l_pid: 0 }
}

/// Tells waiters that somebody closed the file they wait for: one inotify descriptor for all of them.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    inotify: Option<Arc<Inotify>>,
    files: HashMap<WatchDescriptor, (Arc<Notify>, usize)>,
    reader: Option<AbortHandle>,
}

/// Keeps one file watched.
pub(crate) struct Subscription {
    watch: Arc<Watch>,
    /// `None` where the file cannot be watched.
    descriptor: Option<WatchDescriptor>,
    notify: Arc<Notify>,
}

impl Watch {
    /// Watches `file`. Where that cannot be, the subscription never tells anything, and the tick has to do.
    pub(crate) fn subscribe(self: &Arc<Self>, file: &File) -> Subscription {
        let mut state = self.state();
        let mut descriptor = None;
        let mut notify = Arc::default();
        if let Some(inotify) = state.inotify() {
            // The name could stand for another file by now; the descriptor cannot.
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            match inotify.add_watch(path.as_str(), AddWatchFlags::IN_CLOSE_WRITE) {
                Ok(added) => {
                    let entry = state.files.entry(added).or_default();
                    entry.1 += 1;
                    notify = Arc::clone(&entry.0);
                    descriptor = Some(added);
                }
                Err(errno) => tracing::debug!(%errno, "a session file cannot be watched; its waiters look every 50 ms"),
            }
        }
        drop(state);
        Subscription { watch: Arc::clone(self), descriptor, notify }
    }

    /// Makes sure that somebody reads the events, in this runtime: the one that did may have ended.
    fn read_events(self: &Arc<Self>) {
        let mut state = self.state();
        if state.reader.as_ref().is_some_and(|reader| !reader.is_finished()) {
            return;
        }
        let Some(inotify) = state.inotify.clone() else { return };
        #[allow(deprecated, reason = "its successor is unsafe, for types whose descriptor may change or close; ours cannot")]
        let Ok(events) = AsyncFd::with_interest(Events(inotify), Interest::READABLE) else { return };
        let watch = Arc::downgrade(self);
        let reader = tokio::spawn(async move {
            while let Ok(mut ready) = events.readable().await {
                match events.get_ref().0.read_events() {
                    Ok(events) => {
                        let Some(watch) = watch.upgrade() else { return };
                        watch.tell(events.iter().map(|event| (event.wd, event.mask)));
                    }
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    Err(Errno::EINTR) => {}
                    Err(_) => return,
                }
            }
        });
        state.reader = Some(reader.abort_handle());
    }

    fn tell(&self, events: impl Iterator<Item = (WatchDescriptor, AddWatchFlags)>) {
        let state = self.state();
        for (descriptor, mask) in events {
            if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                state.files.values().for_each(|(notify, _)| notify.notify_waiters());
            } else if let Some((notify, _)) = state.files.get(&descriptor) {
                notify.notify_waiters();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(reader) = self.state().reader.take() {
            reader.abort();
        }
    }
}

impl State {
    fn inotify(&mut self) -> Option<Arc<Inotify>> {
        if self.inotify.is_none() {
            self.inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok().map(Arc::new);
        }
        self.inotify.clone()
    }
}

impl Subscription {
    /// Returns a future that ends when the file was closed by somebody who could write.
    fn listen(&self) -> OwnedNotified {
        self.watch.read_events();
        Arc::clone(&self.notify).notified_owned()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let Some(descriptor) = self.descriptor else { return };
        let mut state = self.watch.state();
        let Some((_, users)) = state.files.get_mut(&descriptor) else { return };
        *users -= 1;
        if *users == 0 {
            state.files.remove(&descriptor);
            if let Some(inotify) = &state.inotify {
                // The kernel has dropped it by itself if the file is gone.
                let _ = inotify.rm_watch(descriptor);
            }
        }
    }
}

struct Events(Arc<Inotify>);

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_whatever_order_a_waiter_comes_and_a_holder_goes_he_gets_in_or_is_woken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (mut left_open, mut orders) = (0, 0);
        // Each bit is a step, of the waiter if it is set; either takes three.
        for order in (0..64u32).filter(|order| order.count_ones() == 3) {
            let (mut holder, waiter) = (Some(open()), open());
            holder.as_ref().unwrap().lock().unwrap();
            let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
            let (mut steps_of_holder, mut steps_of_waiter, mut alone, mut got_in) = (0, 0, true, false);
            for step in 0..6 {
                if order & (1 << step) == 0 {
                    steps_of_holder += 1;
                    match steps_of_holder {
                        1 => holder.as_ref().unwrap().unlock().unwrap(),
                        2 => alone = nobody_waits(holder.as_ref().unwrap()),
                        _ => drop(holder.take_if(|_| !alone)),
                    }
                } else {
                    steps_of_waiter += 1;
                    match steps_of_waiter {
                        1 => assert!(Ticket::take(&waiter).expect("this file system has places in line").is_first(&waiter)),
                        2 => drop(inotify.add_watch(&path, AddWatchFlags::IN_CLOSE_WRITE).unwrap()),
                        _ => got_in = waiter.try_lock().is_ok(),
                    }
                }
            }
            assert!(got_in || inotify.read_events().is_ok(), "order {order:06b}: nobody wakes him");
            orders += 1;
            left_open += usize::from(holder.is_some());
        }
        assert!(left_open > 0 && left_open < orders, "{left_open} of {orders}");
    }
}
