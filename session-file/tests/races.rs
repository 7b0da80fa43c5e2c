//! Collectors, logouts, writers and waiters on the same few files, in any order and at the same time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::HashSet;
use std::ops::RangeFrom;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use session_core::{ErrorKind, Expect, OpenRequest, OpenSession, Record, SessionHandler, SessionId, Ttl, WriteId, Written};
use session_file::{Durability, FileHandler, Io};
use support::{
    Chance, LEASE, Place, block_on, create, destroy, exclusive, id, many, number, numbered, read, record, tree, view, write,
};

/// Runs `work` again and again in a thread of its own until the value is dropped.
struct Meanwhile {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Meanwhile {
    fn start<F: Future<Output = ()>>(mut work: impl FnMut() -> F + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            block_on(async {
                while !stopped.load(Ordering::Relaxed) {
                    work().await;
                }
            });
        });
        Self { stop, thread: Some(thread) }
    }

    /// Fails if the work has failed.
    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Meanwhile {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What logouts have removed: payloads by their number.
#[derive(Clone, Default)]
struct LoggedOut(Arc<Mutex<HashSet<u64>>>);

impl LoggedOut {
    fn remember(&self, number: u64) {
        assert!(self.0.lock().unwrap().insert(number), "record {number} was removed twice");
    }

    /// Whether a logout removed this record; one that did it this moment has not told yet.
    fn wait_for(&self, number: u64) -> bool {
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(20) {
            if self.0.lock().unwrap().remove(&number) {
                return true;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        false
    }
}

/// Puts a record there, whatever logouts do meanwhile, and returns which it was: each try has one of its own, since a logout may
/// tell that it removed what a writer was refused for.
async fn put(handler: &FileHandler, id: &SessionId, mut record: impl FnMut() -> Record) -> Record {
    loop {
        let record = record();
        let mut opened = handler.open(id, &exclusive().expecting(Expect::Any)).await.unwrap();
        match opened.write(&record, WriteId::random().unwrap()).await {
            Ok(_) => {
                opened.close().await.unwrap();
                return record;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Gone, "{error:?}"),
        }
    }
}

/// What is in a record that the collectors may have.
const OVER: &[u8] = b"over";

/// Lets sessions end and creates them anew, in the midst of collectors and logouts.
struct Creator {
    handler: FileHandler,
    logged_out: LoggedOut,
    chance: Chance,
    numbers: RangeFrom<u64>,
}

impl Creator {
    async fn work(&mut self, ids: &[SessionId]) {
        for id in ids {
            put(&self.handler, id, || Record::new(OVER, Ttl::from_secs(0))).await;
        }
        // The collectors come for them before they are replaced, or while they are.
        std::thread::sleep(Duration::from_micros(self.chance.below(600)));
        for id in ids {
            self.replace(id).await;
        }
    }

    async fn replace(&mut self, id: &SessionId) {
        if self.chance.below(2) == 0 {
            // A record may live a little longer than its life.
            let removed = destroy(&self.handler, id).await.unwrap();
            assert!(removed.is_none_or(|data| data == OVER), "something else is there than what is over");
        }
        let length = if self.chance.below(16) == 0 { 3000 } else { self.chance.below(300) as usize };
        let mut number = 0;
        let live = put(&self.handler, id, || {
            number = self.numbers.next().unwrap();
            record(&numbered(0, number, length))
        });
        let live = Some(live.await.data);
        let seen = view(&self.handler, id).await.unwrap();
        let removed = destroy(&self.handler, id).await.unwrap();
        if seen != live || removed != live {
            assert!(removed.is_none() && (seen.is_none() || seen == live), "another one than {number} is there");
            assert!(self.logged_out.wait_for(number), "the live one, {number}, was taken");
        }
    }
}

#[test]
fn a_hundred_thousand_times_neither_collectors_nor_logouts_take_what_replaces_what_they_came_for() {
    const CREATORS: u64 = 4;
    const ROUNDS: u64 = 100_000;
    // With few sessions the collectors come by so often that they meet the creator at work.
    const SESSIONS: u64 = 4;
    // Threads, each with a handler of its own: the kernel tells their locks apart as it does those of processes.
    let (place, mut chance, started) = (Place::new(), Chance::new(), Instant::now());
    let (collected, logged_out) = (Arc::new(AtomicU64::new(0)), LoggedOut::default());
    let ids: Vec<Vec<SessionId>> = (0..CREATORS).map(|_| (0..SESSIONS).map(|_| id()).collect()).collect();
    let collector = || {
        let (handler, collected) = (place.handler(), Arc::clone(&collected));
        Meanwhile::start(move || {
            let (handler, collected) = (handler.clone(), Arc::clone(&collected));
            async move {
                collected.fetch_add(handler.gc(many()).await.unwrap(), Ordering::Relaxed);
            }
        })
    };
    let logouts = {
        let (handler, ids, logged_out) = (place.handler(), ids.concat(), logged_out.clone());
        let mut chance = Chance::from_seed(chance.next());
        Meanwhile::start(move || {
            let (handler, logged_out) = (handler.clone(), logged_out.clone());
            let id = ids[chance.below(ids.len() as u64) as usize].clone();
            let pause = Duration::from_micros(chance.below(600));
            async move {
                if let Some(data) = destroy(&handler, &id).await.unwrap().filter(|data| data != OVER) {
                    logged_out.remember(number(0, &data));
                }
                std::thread::sleep(pause);
            }
        })
    };
    let others = [collector(), collector(), logouts];
    let creators: Vec<_> = (0u64..)
        .zip(ids)
        .map(|(creator, ids)| {
            let (handler, logged_out) = (place.handler(), logged_out.clone());
            let (chance, numbers) = (Chance::from_seed(chance.next()), creator << 32..);
            let mut creator = Creator { handler, logged_out, chance, numbers };
            std::thread::spawn(move || {
                block_on(async {
                    for _ in 0..ROUNDS / CREATORS / SESSIONS {
                        creator.work(&ids).await;
                    }
                });
            })
        })
        .collect();
    creators.into_iter().for_each(|creator| creator.join().unwrap());
    others.into_iter().for_each(Meanwhile::end);
    let collected = collected.load(Ordering::Relaxed);
    println!("{ROUNDS} rounds in {:?}, {collected} collected", started.elapsed());
    assert!(collected > ROUNDS / 100, "the collectors found {collected}");
}

/// One opening, and what must be true of it.
struct Opening {
    session: Box<dyn OpenSession>,
    exclusive: bool,
    existing: bool,
    /// How often the session had been destroyed when it was opened.
    destroyed: u64,
    /// The last write that it has seen or made.
    base: Option<u64>,
}

/// What everybody must see.
#[derive(Default)]
struct Truth {
    /// The number of the last write, while there is a record.
    last: Option<u64>,
    writes: u64,
    destroyed: u64,
}

impl Opening {
    async fn open(handler: &FileHandler, id: &SessionId, truth: &Truth, chance: &mut Chance) -> Option<Self> {
        let exclusive = chance.below(2) == 0;
        let existing = chance.below(2) == 0;
        let expect = if existing { Expect::Existing } else { Expect::Any };
        let request = if exclusive { OpenRequest::exclusive(Duration::ZERO, LEASE) } else { OpenRequest::optimistic() };
        let mut session = match handler.open(id, &request.expecting(expect)).await {
            Ok(session) => session,
            Err(error) => {
                assert!(exclusive && error.kind() == ErrorKind::LockTimeout, "{error:?}");
                return None;
            }
        };
        let base = session.read().await.unwrap().map(|record| number(0, &record.data));
        assert_eq!(base, truth.last, "an opening sees another state than the last");
        Some(Self { session, exclusive, existing, destroyed: truth.destroyed, base })
    }

    /// Writes, and says whether the opening goes on.
    async fn write(&mut self, truth: &mut Truth, chance: &mut Chance, others_hold: bool) -> bool {
        truth.writes += 1;
        let data = numbered(0, truth.writes, chance.below(5000) as usize);
        let outcome = write(&mut self.session, &data).await;
        let undisturbed = self.base == truth.last && self.destroyed == truth.destroyed;
        match outcome {
            Ok(written) => {
                assert_eq!(written, Written::Applied);
                assert!(self.base == truth.last, "a write went over a state that it had not seen");
                assert!(!self.exclusive || undisturbed, "a write brought back what was destroyed");
                assert!(!others_hold, "a write went past the holder");
                assert!(self.base.is_some() || !self.existing, "a visitor created a session");
                truth.last = Some(truth.writes);
                self.base = truth.last;
                true
            }
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::Gone | ErrorKind::Conflict), "{error:?}");
                if self.exclusive && self.destroyed < truth.destroyed {
                    assert_eq!(error.kind(), ErrorKind::Gone, "{error:?}");
                }
                let refused = others_hold || !undisturbed || (self.existing && self.base.is_none());
                assert!(refused, "an undisturbed write was refused: {error:?}");
                false
            }
        }
    }
}

#[test]
fn nothing_that_was_destroyed_comes_back_in_any_order_of_calls() {
    for durability in [Durability::None, Durability::Data] {
        let place = Place::new();
        let handler = FileHandler::open_dir(place.config().with_durability(durability).with_io(Io::Inline)).unwrap();
        let (id, mut chance, mut truth) = (id(), Chance::new(), Truth::default());
        let mut openings: Vec<Opening> = Vec::new();
        let steps = if durability == Durability::None { 10_000 } else { 500 };
        block_on(async {
            for step in 0..steps {
                let which = chance.below(4) as usize;
                match chance.below(10) {
                    0..=2 if openings.len() < 4 => {
                        openings.extend(Opening::open(&handler, &id, &truth, &mut chance).await);
                    }
                    0..=5 if which < openings.len() => {
                        // Who found nothing and may not create has no lock.
                        let holds = |(at, other): (usize, &Opening)| at != which && other.session.held().is_some();
                        let others = openings.iter().enumerate().any(holds);
                        if !openings[which].write(&mut truth, &mut chance, others).await {
                            drop(openings.swap_remove(which));
                        }
                    }
                    6 if which < openings.len() => {
                        let mut opening = openings.swap_remove(which);
                        let removed = opening.session.destroy().await.unwrap();
                        assert_eq!(removed.map(|record| number(0, &record.data)), truth.last, "step {step}");
                        (truth.last, truth.destroyed) = (None, truth.destroyed + 1);
                    }
                    7 => {
                        let removed = destroy(&handler, &id).await.unwrap();
                        assert_eq!(removed.map(|data| number(0, &data)), truth.last, "step {step}");
                        (truth.last, truth.destroyed) = (None, truth.destroyed + 1);
                    }
                    8 if which < openings.len() => openings.swap_remove(which).session.close().await.unwrap(),
                    _ => assert_eq!(handler.gc(many()).await.unwrap(), 0, "nothing has expired"),
                }
                let seen = view(&handler, &id).await.unwrap().map(|data| number(0, &data));
                assert_eq!(seen, truth.last, "step {step}");
            }
            openings.clear();
            destroy(&handler, &id).await.unwrap();
        });
        assert!(truth.writes > steps / 20 && truth.destroyed > steps / 20, "{} writes", truth.writes);
        assert!(tree(&place.dir()).is_empty(), "something was left behind");
    }
}

#[test]
fn a_logout_beside_writers_and_collectors_is_final() {
    let place = Place::new();
    let handler = place.handler();
    let collector = place.handler();
    let collector = Meanwhile::start(move || {
        let collector = collector.clone();
        async move { assert_eq!(collector.gc(many()).await.unwrap(), 0) }
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
    let (mut chance, started, mut round) = (Chance::new(), Instant::now(), 0);
    runtime.block_on(async {
        while round < 20 || round < 400 && started.elapsed() < Duration::from_secs(5) {
            round += 1;
            let id = id();
            create(&handler, &id, b"logged in").await;
            let writers: Vec<_> = [exclusive(), OpenRequest::optimistic(), exclusive()]
                .into_iter()
                .map(|request| {
                    let (handler, id) = (place.handler(), id.clone());
                    tokio::spawn(async move {
                        // Visitors whose session is gone are told so; nobody of them may create it.
                        loop {
                            // Who is refused again and again must not keep his thread from the others.
                            tokio::task::yield_now().await;
                            let mut opened = handler.open(&id, &request).await.unwrap();
                            if opened.read().await.unwrap().is_none() {
                                assert_eq!(write(&mut opened, b"late").await.unwrap_err().kind(), ErrorKind::Gone);
                                return;
                            }
                            for _ in 0..3 {
                                match write(&mut opened, b"logged in and working").await {
                                    Ok(_) => tokio::task::yield_now().await,
                                    Err(error) => {
                                        assert!(matches!(error.kind(), ErrorKind::Gone | ErrorKind::Conflict), "{error:?}");
                                        break;
                                    }
                                }
                            }
                        }
                    })
                })
                .collect();
            tokio::time::sleep(Duration::from_micros(chance.below(2000))).await;
            assert!(destroy(&handler, &id).await.unwrap().is_some(), "round {round}: the session was there");
            assert_eq!(view(&handler, &id).await.unwrap(), None, "round {round}");
            for writer in writers {
                writer.await.unwrap();
            }
            assert_eq!(view(&handler, &id).await.unwrap(), None, "round {round}: it came back");
        }
    });
    println!("{round} rounds in {:?}", started.elapsed());
    collector.end();
    assert!(tree(&place.dir()).is_empty(), "something was left behind");
}

#[test]
fn two_hundred_waiters_get_through_two_threads_for_files() {
    const WAITERS: u64 = 200;
    for (durability, io) in [(Durability::None, Io::Pool), (Durability::Data, Io::Auto), (Durability::Data, Io::Pool)] {
        let place = Place::new();
        let handler = FileHandler::open_dir(place.config().with_durability(durability).with_io(io)).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let id = id();
            create(&handler, &id, &numbered(0, 0, 10)).await;
            let mut holder = handler.open(&id, &exclusive()).await.unwrap();
            let waiters: Vec<_> = (0..WAITERS)
                .map(|_| {
                    let (handler, id) = (handler.clone(), id.clone());
                    tokio::spawn(async move {
                        let patient = OpenRequest::exclusive(Duration::from_secs(60), LEASE);
                        let mut opened = handler.open(&id, &patient).await.unwrap();
                        let before = number(0, &opened.read().await.unwrap().unwrap().data);
                        write(&mut opened, &numbered(0, before + 1, 10)).await.unwrap();
                        opened.close().await.unwrap();
                    })
                })
                .collect();
            let admin = handler.admin().unwrap();
            while admin.locks(many()).await.unwrap()[0].waiting != Some(WAITERS) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // All of them wait, and yet there are threads for the holder's own calls.
            write(&mut holder, &numbered(0, 1, 70_000)).await.unwrap();
            holder.close().await.unwrap();
            for waiter in waiters {
                waiter.await.unwrap();
            }
            assert_eq!(number(0, &read(&handler, &id).await.unwrap().unwrap()), WAITERS + 1);
        });
    }
}
