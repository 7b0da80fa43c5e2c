//! How do a task and a thread wait for what the other tells in a moment? Each looks for it for a while before it sleeps.
//!
//! To wake who sleeps takes some ten microseconds, and more if the processor slept as well: as much as a quick disk takes to sync. So
//! a backend that hands what may wait for the disk to a thread of its own has both of them look, as a lock of an operating system
//! does that spins and then parks. The task gives way between two glances, so that the other tasks of its runtime run meanwhile and
//! what they wait for is noticed. Only a task that is alone looks, for no longer than about twice what such an answer took lately,
//! and not at all if that was long: what is lost at the most is a moment of a processor that had little else to do.
//! Now and then it sleeps all the same, so that the kernel can place it and whoever answers anew.
//!
//! (A. Karlin, K. Li, M. Manasse and S. Owicki, "Empirical studies of competitive spinning for a shared-memory multiprocessor", 1991.)

use std::hint;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;

/// How often a glance looks: a microsecond or two in all. Pauses of the processor are between, which leave more of it to whoever shares
/// it than calls of the kernel would.
const GLANCE: u32 = 64;
/// How many glances a thread takes: some hundred microseconds in all, if nobody else wants the processor.
const GLANCES: u32 = 100;
/// Of how many answers that could be looked for one is slept for.
///
/// A kernel lets a thread that waits for a disk go on where the disk's interrupt arrives, which is the quickest place for it, unless
/// somebody is busy there. A task that only ever looks is: once it has that processor it keeps it, and each answer takes the way from
/// one processor to the other, for as long as the two go on (measured with one interrupt for two processors: 117–125 µs instead of 93–95).
/// While it sleeps the kernel places both anew. Of 4 to 512, 8 to 16 were the quickest.
const NAP: usize = 8;
/// The longest look of a task, in microseconds. Answers that take longer than half of it are slept for.
const LONGEST: u32 = 400;

/// A task that gave way for longer than this sleeps: others want the processor.
const CROWDED: Duration = Duration::from_micros(50);

/// Whether whoever is waited for has a processor while somebody looks.
static APART: LazyLock<bool> =
    LazyLock::new(|| thread::available_parallelism().is_ok_and(|processors| processors.get() > 1));

/// Looks for what `find` finds, for a thread that has nothing else to do; returns nothing if there was none for some hundred
/// microseconds, and the thread had better sleep.
///
/// It gives way to other threads between glances, and does not look where there is but one processor.
pub fn look<T>(mut find: impl FnMut() -> Option<T>) -> Option<T> {
    let glances = if *APART { GLANCES } else { 0 };
    (0..glances).find_map(|_| {
        thread::yield_now();
        glance(&mut find)
    })
}

fn glance<T>(mut find: impl FnMut() -> Option<T>) -> Option<T> {
    (0..GLANCE).find_map(|_| {
        let found = find();
        if found.is_none() {
            hint::spin_loop();
        }
        found
    })
}

/// How tasks wait for answers of one kind, such as those of the threads that sync the files of a store.
///
/// ```
/// use session_core::spin::SpinWait;
/// use tokio::sync::oneshot;
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let synced = SpinWait::new();
/// let (tell, mut told) = oneshot::channel();
/// std::thread::spawn(move || tell.send("on the disk"));
/// assert_eq!(synced.wait(&mut told).await, Some("on the disk"));
/// # });
/// ```
#[derive(Debug)]
pub struct SpinWait {
    apart: bool,
    longest: u32,
    crowded: Duration,
    waiting: AtomicUsize,
    /// How many have begun to wait.
    begun: AtomicUsize,
    /// How long an answer takes whoever is alone, in microseconds; 0 if that is not known.
    usual: AtomicU32,
}

impl SpinWait {
    /// Knows nothing yet: the first answer is slept for.
    #[must_use]
    pub fn new() -> Self {
        let (waiting, begun, usual) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicU32::new(0));
        Self { apart: *APART, longest: LONGEST, crowded: CROWDED, waiting, begun, usual }
    }

    /// Waits for `answer`, just as to await it does, and is through sooner if it comes soon; `None` if whoever was to answer has gone
    /// without.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it has taken nothing: the answer can be waited for again.
    pub async fn wait<T>(&self, answer: &mut Receiver<T>) -> Option<T> {
        let one = Waiting::one_more(&self.waiting);
        let naps = self.begun.fetch_add(1, Ordering::Relaxed) % NAP == NAP - 1;
        let (began, look) = (Instant::now(), if naps { Duration::ZERO } else { self.look() });
        while one.is_alone() && began.elapsed() < look {
            let told = glance(|| match answer.try_recv() {
                Ok(told) => Some(Some(told)),
                Err(TryRecvError::Closed) => Some(None),
                Err(TryRecvError::Empty) => None,
            });
            match told {
                Some(told) => {
                    self.learn(began.elapsed());
                    return told;
                }
                None => {
                    // Whoever answers may have woken up on this very processor.
                    let gave_way = Instant::now();
                    thread::yield_now();
                    if gave_way.elapsed() > self.crowded {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            }
        }
        let told = answer.await.ok();
        if one.is_alone() {
            self.learn(began.elapsed());
        }
        told
    }

    /// How long to look.
    fn look(&self) -> Duration {
        let usual = self.usual.load(Ordering::Relaxed);
        let look = if self.apart && usual <= self.longest / 2 { 2 * usual } else { 0 };
        Duration::from_micros(look.into())
    }

    /// Takes into account how long an answer took: to one part in eight, and one that took very long for no more than twice the
    /// longest look, so that a disk that stood still once does not count for long.
    fn learn(&self, took: Duration) {
        let took = u32::try_from(took.as_micros()).unwrap_or(u32::MAX).clamp(1, 2 * self.longest);
        let usual = match self.usual.load(Ordering::Relaxed) {
            0 => took,
            usual => (7 * usual + took).div_ceil(8),
        };
        // Of two who learn at the same time one is forgotten.
        self.usual.store(usual, Ordering::Relaxed);
    }
}

impl Default for SpinWait {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts one who waits, until he is told or goes.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn one_more(all: &'a AtomicUsize) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self(all)
    }

    fn is_alone(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 1
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::pin::{Pin, pin};
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::task::{Context, Poll, Wake, Waker};

    use tokio::sync::oneshot;

    use super::*;

    /// Notes that its task is to be polled again.
    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Polls, and says what came of it, or whether the task asked to be polled again at once.
    fn poll<F: Future>(future: Pin<&mut F>) -> Result<F::Output, bool> {
        let woken = Arc::new(Woken::default());
        match future.poll(&mut Context::from_waker(&Waker::from(woken.clone()))) {
            Poll::Ready(output) => Ok(output),
            Poll::Pending => Err(woken.0.load(Ordering::Relaxed)),
        }
    }

    /// Longer than any test takes.
    const LONG: u32 = 1 << 30;

    /// Waits on a machine where nothing is late.
    fn usually(micros: u32) -> SpinWait {
        SpinWait { apart: true, longest: LONG, crowded: Duration::MAX, usual: AtomicU32::new(micros), ..SpinWait::new() }
    }

    #[test]
    fn an_answer_that_is_usually_quick_is_looked_for_and_any_other_slept_for() {
        for (spin, looks) in [
            (usually(LONG / 2), true),
            (usually(LONG / 2 + 1), false),
            (usually(0), false),
            (SpinWait { apart: false, ..usually(LONG / 2) }, false),
        ] {
            let (tell, mut told) = oneshot::channel();
            let mut waits = pin!(spin.wait(&mut told));
            assert_eq!(poll(waits.as_mut()), Err(looks), "{spin:?}");
            tell.send("it").unwrap();
            assert_eq!(poll(waits.as_mut()), Ok(Some("it")));
        }
    }

    #[test]
    fn of_so_many_answers_one_is_slept_for() {
        let spin = usually(LONG / 2);
        let looks: Vec<_> = (1..=3 * NAP)
            .map(|_| {
                let (_tell, mut told) = oneshot::channel::<()>();
                poll(pin!(spin.wait(&mut told)))
            })
            .collect();
        assert_eq!(looks, (1..=3 * NAP).map(|turn| Err(turn % NAP != 0)).collect::<Vec<_>>());
    }

    #[test]
    fn a_thread_finds_what_is_there_and_does_not_look_for_ever() {
        assert_eq!(look(|| None::<()>), None);
        let mut looks = 0;
        let third = || {
            looks += 1;
            (looks == 3).then_some(looks)
        };
        assert_eq!(glance(third), Some(3));
    }

    #[test]
    fn a_look_ends() {
        let spin = usually(1);
        let (tell, mut told) = oneshot::channel();
        let mut waits = pin!(spin.wait(&mut told));
        while poll(waits.as_mut()) == Err(true) {}
        // Awaited, it wakes.
        let woken = Arc::new(Woken::default());
        assert!(waits.as_mut().poll(&mut Context::from_waker(&Waker::from(woken.clone()))).is_pending());
        assert!(!woken.0.load(Ordering::Relaxed));
        tell.send("it").unwrap();
        assert!(woken.0.load(Ordering::Relaxed));
        assert_eq!(poll(waits.as_mut()), Ok(Some("it")));
    }

    #[test]
    fn of_several_none_looks() {
        let spin = usually(LONG / 2);
        let ((tell, mut told), (_other, mut late)) = (oneshot::channel(), oneshot::channel::<()>());
        let mut waits = pin!(spin.wait(&mut told));
        assert_eq!(poll(waits.as_mut()), Err(true));
        {
            let mut other = pin!(spin.wait(&mut late));
            assert_eq!(poll(other.as_mut()), Err(false));
            assert_eq!(poll(waits.as_mut()), Err(false));
            tell.send("it").unwrap();
            assert_eq!(poll(waits.as_mut()), Ok(Some("it")));
        }
        let (_tell, mut told) = oneshot::channel::<()>();
        assert_eq!(poll(pin!(spin.wait(&mut told))), Err(true), "those who have gone are not counted");
    }

    #[test]
    fn whoever_gets_the_processor_back_late_sleeps() {
        let spin = SpinWait { crowded: Duration::ZERO, ..usually(LONG / 2) };
        let (_tell, mut told) = oneshot::channel::<()>();
        assert_eq!(poll(pin!(spin.wait(&mut told))), Err(false));
    }

    #[test]
    fn whoever_was_to_answer_may_go() {
        for spin in [usually(0), usually(LONG / 2)] {
            let (tell, mut told) = oneshot::channel::<()>();
            drop(tell);
            assert_eq!(poll(pin!(spin.wait(&mut told))), Ok(None));
        }
    }

    #[test]
    fn one_slow_answer_does_not_count_for_long_and_many_do() {
        let spin = SpinWait { apart: true, ..SpinWait::new() };
        spin.learn(Duration::from_micros(100));
        assert_eq!(spin.look(), Duration::from_micros(200));
        spin.learn(Duration::from_secs(5));
        assert!(!spin.look().is_zero());
        for _ in 0..8 {
            spin.learn(Duration::from_millis(8));
        }
        assert!(spin.look().is_zero());
        for _ in 0..16 {
            spin.learn(Duration::ZERO);
        }
        assert!(!spin.look().is_zero());
    }
}
