//! The suite of several processes: what must hold when a holder is killed, stopped or far away in another process.
//!
//! A case runs in the parent. Its children are this executable, started anew, and do what they are told ([`worker`]). Nothing
//! here knows how a store keeps its locks: with a lease, a stopped holder is taken over and fenced; with a kernel lock, he keeps
//! it and the others time out. Both are right.

mod orders;
mod own_binary;
mod peer;
mod servant;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use session_core::{Change, Error, ErrorKind, Expect, OpenRequest, OpenSession, Record, SessionHandler, SessionId, Ttl};

pub use own_binary::{InTestBinary, worker_of_a_test};
pub use servant::worker;

use orders::{Answer, LONG, Order, edition, edition_of, name_of, record, text_of};
use peer::{Ledger, PATIENCE, Peer};
use servant::settle;

use crate::case::suite;
use crate::harness::Env;
use crate::steps::{Pace, look, new_id, open};

suite! { $
    /// The cases of [`processes_suite!`](crate::processes_suite), without the worker that they start.
    #[doc(hidden)]
    processes as __processes_cases {
        killed_holder_frees_its_session:
            "A killed holder frees its session, at the end of its lease at the latest, and what it had written stays.";
        stopped_holder_never_overwrites_who_took_over:
            "A holder that was stopped past its lease is refused once somebody took over; if nobody can, the waiter is told in time.";
        closing_after_a_takeover_leaves_the_next_holder_alone:
            "A holder that was taken over gives back nothing that belongs to the next one.";
        waiter_that_gives_up_leaves_the_holder_alone:
            "A waiter whose time is up is told so in time, and the holder keeps the lock.";
        killed_waiters_do_not_disturb_the_queue:
            "Dead waiters at the head of a queue hold up nobody who lives.";
        increments_of_six_processes_are_all_kept:
            "Whatever six processes add to one session at once is all there at the end.";
        appends_survive_the_killing_of_random_holders:
            "No acknowledged append is lost and none is applied twice, whoever is killed meanwhile.";
        acknowledged_write_survives_the_death_of_its_writer:
            "A write that was acknowledged is there, even if its writer dies at once.";
        kill_during_a_write_leaves_the_record_whole:
            "A writer that is killed leaves the old record or the new one, never a mixture.";
        views_beside_a_writing_process_never_go_back:
            "A view sees whole records, and never an older one after a newer one, while another process writes.";
        what_one_process_wrote_the_next_one_reads:
            "A write that was acknowledged to one process is what every other process reads from then on.";
        destroy_in_one_process_reaches_a_holder_in_another:
            "A session that one process destroys is not brought back by a holder in another, who is told that it is gone.";
        absent_id_raced_by_two_processes_is_created_once:
            "Of two processes that open the same absent id, one creates it and the other one finds it.";
        release_wakes_a_waiter_in_another_process:
            "A release lets a waiter in another process in soon, not at the end of some long sleep.";
        no_process_starves:
            "Of four processes that want the same session all the time, each one gets it.";
        gc_spares_what_another_process_holds:
            "Collecting in one process neither counts nor removes what another one holds, however short its life was to be.";
        gc_keeps_the_locks_of_another_process:
            "Collecting in one process gives nobody a lock that another one holds.";
    }
}

/// Claims that everything holds across processes, killed and stopped ones included; takes a harness.
///
/// The children are this test executable itself, run again for the single test `conformance_worker` that the macro adds; it
/// does nothing unless such a parent has started it. The harness must give the same store for the same namespace in every
/// process.
#[macro_export]
macro_rules! processes_suite {
    ($harness:expr) => {
        $crate::__processes_cases!($crate::processes::InTestBinary::new($harness, module_path!()));

        #[test]
        fn conformance_worker() {
            $crate::processes::worker_of_a_test(&$harness);
        }
    };
}

/// A lease that a case can afford to wait for.
fn short(env: &Env) -> Duration {
    env.tick() * 5
}

/// A wait that outlasts the lease of a holder who is dead or stopped, with a second for stores that count in seconds and two
/// for a busy machine.
fn past_the_lease(env: &Env) -> Duration {
    short(env) + env.tick() + Duration::from_secs(3)
}

/// Creates a session.
async fn stored(handler: &dyn SessionHandler, env: &Env, text: &str, ttl: Ttl) -> SessionId {
    let id = new_id();
    let mut opened = open(handler, &id, OpenRequest::exclusive(PATIENCE, short(env)).expecting(Expect::Any)).await;
    let seen = opened.read().await.unwrap_or_else(|error| panic!("a new id could not be read: {error:?}"));
    assert_eq!(seen, None, "a new id is not absent");
    save(&mut *opened, &Record::new(text, ttl)).await;
    id
}

async fn save(opened: &mut dyn OpenSession, record: &Record) {
    let outcome = settle(opened, &Change::Write(record.clone())).await;
    outcome.unwrap_or_else(|error| panic!("a holder whom nobody disturbed could not save: {error:?}"));
}

async fn read(opened: &mut dyn OpenSession) -> Option<String> {
    text_of(opened.read().await.unwrap_or_else(|error| panic!("a holder could not read: {error:?}")))
}

async fn close(opened: &mut dyn OpenSession) {
    opened.close().await.unwrap_or_else(|error| panic!("close failed: {error:?}"));
}

async fn see(handler: &dyn SessionHandler, id: &SessionId) -> Option<String> {
    look(handler, id).await.map(|data| String::from_utf8_lossy(&data).into_owned())
}

/// Life enough for any case.
fn long_life() -> Ttl {
    Ttl::from_secs(1200)
}

async fn killed_holder_frees_its_session(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "before", long_life()).await;
    let mut peer = Peer::start(&env).await;
    peer.hold(&id, short(&env), Some("before")).await;
    peer.must(&Order::Write("during".into())).await;
    peer.kill();
    let mut opened = open(&*handler, &id, OpenRequest::exclusive(past_the_lease(&env), short(&env))).await;
    assert_eq!(read(&mut *opened).await.as_deref(), Some("during"));
    save(&mut *opened, &record("after")).await;
    assert_eq!(see(&*handler, &id).await.as_deref(), Some("after"));
}

/// What came of waiting for a holder that stands still.
enum Takeover {
    TookOver(Box<dyn OpenSession>),
    HolderKeepsIt,
}

/// Waits for the lock of a stopped process: a lease ends, a kernel lock does not, and then the waiter is told in time.
async fn take_over(handler: &dyn SessionHandler, env: &Env, id: &SessionId, holder: &Peer) -> Takeover {
    let wait = past_the_lease(env);
    let control = Control::start(wait);
    match handler.open(id, &OpenRequest::exclusive(wait, short(env) * 4)).await {
        Ok(opened) => Takeover::TookOver(opened),
        Err(error) => {
            control.assert_timed_out(&error, holder.0.pid()).await;
            Takeover::HolderKeepsIt
        }
    }
}

/// A plain sleep beside a wait: on a busy machine both end late, and only what the wait adds is the store's doing.
struct Control {
    started: Instant,
    sleep: tokio::task::JoinHandle<Duration>,
}

impl Control {
    fn start(wait: Duration) -> Self {
        let started = Instant::now();
        let sleep = async move {
            tokio::time::sleep(wait).await;
            started.elapsed()
        };
        Self { started, sleep: tokio::spawn(sleep) }
    }

    async fn assert_timed_out(self, error: &Error, pid: u32) {
        let waited = self.started.elapsed();
        let wait = self.sleep.await.expect("a sleep does not panic");
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error:?}");
        let tolerance = Duration::from_millis(250);
        assert!(waited + tolerance >= wait && waited <= wait + tolerance, "a wait of {wait:?} ended after {waited:?}");
        if let Some(holder) = error.holder() {
            let numbers = holder.process.split(|c: char| !c.is_ascii_digit());
            assert!(numbers.into_iter().any(|n| n == pid.to_string()), "the holder is said to be {holder}, it is pid {pid}");
        }
    }
}

async fn stopped_holder_never_overwrites_who_took_over(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "before", long_life()).await;
    let mut peer = Peer::start(&env).await;
    peer.hold(&id, short(&env), Some("before")).await;
    peer.stop();
    match take_over(&*handler, &env, &id, &peer).await {
        Takeover::TookOver(mut opened) => {
            assert_eq!(read(&mut *opened).await.as_deref(), Some("before"));
            save(&mut *opened, &record("the next one's")).await;
            peer.go_on();
            let why = "somebody else took over and wrote while this holder was stopped";
            peer.must_not(&Order::Write("late".into()), &[ErrorKind::Fenced], why).await;
            assert_eq!(see(&*handler, &id).await.as_deref(), Some("the next one's"));
        }
        Takeover::HolderKeepsIt => {
            peer.go_on();
            peer.must(&Order::Save("late".into())).await;
            assert_eq!(see(&*handler, &id).await.as_deref(), Some("late"));
        }
    }
}

async fn closing_after_a_takeover_leaves_the_next_holder_alone(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "before", long_life()).await;
    let mut peer = Peer::start(&env).await;
    peer.hold(&id, short(&env), Some("before")).await;
    peer.stop();
    let taken = take_over(&*handler, &env, &id, &peer).await;
    peer.go_on();
    peer.must(&Order::Close).await;
    let at_once = OpenRequest::exclusive(Duration::ZERO, short(&env));
    match taken {
        Takeover::TookOver(mut opened) => {
            assert_held(&*handler, &id, &at_once, "the holder before has closed").await;
            save(&mut *opened, &record("after")).await;
        }
        Takeover::HolderKeepsIt => {
            let mut opened = open(&*handler, &id, OpenRequest::exclusive(PATIENCE, short(&env))).await;
            save(&mut *opened, &record("after")).await;
        }
    }
    assert_eq!(see(&*handler, &id).await.as_deref(), Some("after"));
}

async fn assert_held(handler: &dyn SessionHandler, id: &SessionId, request: &OpenRequest, when: &str) {
    match handler.open(id, request).await {
        Err(error) if error.kind() == ErrorKind::LockTimeout => {}
        Err(error) => panic!("an open of what somebody holds failed with {error:?}"),
        Ok(_) => panic!("a second one got the lock after {when}"),
    }
}

async fn waiter_that_gives_up_leaves_the_holder_alone(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "before", long_life()).await;
    let mut peer = Peer::start(&env).await;
    peer.hold(&id, env.lease(), Some("before")).await;
    for wait in [env.tick() * 2, Duration::ZERO] {
        let control = Control::start(wait);
        match handler.open(&id, &OpenRequest::exclusive(wait, short(&env))).await {
            Ok(_) => panic!("two processes hold one session"),
            Err(error) => control.assert_timed_out(&error, peer.0.pid()).await,
        }
    }
    peer.must(&Order::Save("after".into())).await;
    assert_eq!(see(&*handler, &id).await.as_deref(), Some("after"));
}

async fn killed_waiters_do_not_disturb_the_queue(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "before", long_life()).await;
    let mut holder = Peer::start(&env).await;
    let mut waiters = Peer::start_many(&env, 3).await;
    holder.hold(&id, short(&env), Some("before")).await;
    for waiter in &mut waiters {
        waiter.order(&Order::Open { id: id.as_str().into(), wait: LONG, lease: short(&env), any: false });
        // One after the other, so that they queue in this order if the store has a queue.
        tokio::time::sleep(env.tick() / 4).await;
    }
    let (fourth, lease) = (env.handler().await, short(&env));
    // The three dead may cost a second each; see `claim` in the rules for queues.
    let wait = past_the_lease(&env) + Duration::from_secs(3);
    let waiting = {
        let id = id.clone();
        env.spawn(async move { fourth.open(&id, &OpenRequest::exclusive(wait, lease)).await })
    };
    tokio::time::sleep(env.tick() / 4).await;
    for waiter in &mut waiters {
        waiter.kill();
    }
    holder.kill();
    match env.joined(waiting).await {
        Ok(mut opened) => save(&mut *opened, &record("after")).await,
        Err(error) => panic!("behind three dead waiters and a dead holder: {error:?}"),
    }
    assert_eq!(see(&*handler, &id).await.as_deref(), Some("after"));
}

async fn increments_of_six_processes_are_all_kept(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "begin", long_life()).await;
    let mut peers = Peer::start_many(&env, 6).await;
    let mut ledger = Ledger::default();
    for (n, peer) in peers.iter_mut().enumerate() {
        // The lease is long: nobody may need the fence here.
        let (id, writer) = (id.as_str().into(), format!("w{n}"));
        peer.order(&Order::Append { id, writer, lease: env.lease(), times: 20 });
    }
    for (n, peer) in peers.iter_mut().enumerate() {
        peer.rest(&mut ledger, &format!("w{n}")).await;
    }
    assert_eq!(ledger.acked.len() + ledger.unsure.len(), 120);
    ledger.check(&see(&*handler, &id).await.expect("the session is absent"));
}

async fn appends_survive_the_killing_of_random_holders(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "begin", long_life()).await;
    let mut rng = env.rng(1);
    let mut ledger = Ledger::default();
    let mut started = 0;
    let mut begin = async || {
        started += 1;
        let writer = format!("w{started}");
        let mut peer = Peer::start(&env).await;
        let order = Order::Append { id: id.as_str().into(), writer: writer.clone(), lease: env.tick() * 2, times: u64::MAX };
        peer.order(&order);
        (peer, writer)
    };
    let mut peers = Vec::new();
    for _ in 0..4 {
        peers.push(begin().await);
    }
    for _ in 0..6 {
        tokio::time::sleep(env.tick() / 2 + rng.duration(env.tick() * 2)).await;
        let victim = usize::try_from(rng.below(4)).expect("one of four");
        let (mut peer, writer) = std::mem::replace(&mut peers[victim], begin().await);
        peer.kill();
        while let Ok(Some(line)) = peer.0.line(PATIENCE).await {
            ledger.note(&writer, &serde_json::from_str(&line).expect("parent and child are the same program"));
        }
        ledger.note_death(&writer);
    }
    for (peer, writer) in &mut peers {
        peer.order(&Order::Stop);
        peer.rest(&mut ledger, writer).await;
    }
    assert!(ledger.acked.len() > 20, "only {} appends in all", ledger.acked.len());
    // An exclusive opening, so that whatever was under way has arrived or never will.
    let mut opened = open(&*handler, &id, OpenRequest::exclusive(past_the_lease(&env), short(&env))).await;
    let text = read(&mut *opened).await.expect("the session is absent");
    close(&mut *opened).await;
    ledger.check(&text);
}

async fn acknowledged_write_survives_the_death_of_its_writer(env: Env) {
    let handler = env.handler().await;
    for round in 0..5 {
        let id = stored(&*handler, &env, "before", long_life()).await;
        let mut peer = Peer::start(&env).await;
        peer.hold(&id, short(&env), Some("before")).await;
        let order = if round % 2 == 0 { Order::Write("after".into()) } else { Order::Save("after".into()) };
        peer.must(&order).await;
        peer.kill();
        assert_eq!(see(&*handler, &id).await.as_deref(), Some("after"), "after {}", name_of(&order));
    }
}

async fn kill_during_a_write_leaves_the_record_whole(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, &edition(0), long_life()).await;
    let mut rng = env.rng(2);
    let mut newest = 0;
    for _ in 0..6 {
        let mut peer = Peer::start(&env).await;
        let lease = env.tick() * 2;
        peer.order(&Order::Rewrite { id: id.as_str().into(), lease, from: newest + 1, tell: true });
        let first = peer.answer(PATIENCE).await;
        assert!(first == Answer::Acked(newest + 1), "in another process a rewrite was answered {first:?}");
        newest += 1;
        tokio::time::sleep(rng.duration(Duration::from_millis(60))).await;
        peer.kill();
        while let Ok(Some(line)) = peer.0.line(PATIENCE).await {
            match serde_json::from_str(&line).expect("parent and child are the same program") {
                Answer::Acked(n) => newest = n,
                answer => panic!("in another process a rewrite was answered {answer:?}"),
            }
        }
        let seen = see(&*handler, &id).await.expect("the session is absent after a kill");
        let seen = edition_of(&seen).expect("a killed writer left a mixture of two records");
        let mut opened = open(&*handler, &id, OpenRequest::exclusive(past_the_lease(&env), short(&env))).await;
        let held = read(&mut *opened).await.expect("the session is absent after a kill");
        let held = edition_of(&held).expect("a killed writer left a mixture of two records");
        assert!(
            newest <= seen && seen <= held && held <= newest + 1,
            "record {newest} was acknowledged, a view sees {seen}, the next holder {held}"
        );
        newest = held;
        close(&mut *opened).await;
    }
}

async fn views_beside_a_writing_process_never_go_back(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, &edition(0), long_life()).await;
    let mut peer = Peer::start(&env).await;
    peer.order(&Order::Rewrite { id: id.as_str().into(), lease: env.lease(), from: 1, tell: false });
    let until = Instant::now() + Duration::from_millis(1500);
    let mut viewers = Vec::new();
    for _ in 0..2 {
        let (handler, id) = (env.handler().await, id.clone());
        viewers.push(env.spawn(async move {
            let (mut newest, pace) = (0, Pace::begin());
            while Instant::now() < until {
                let seen = see(&*handler, &id).await.expect("a view found the session absent");
                let seen = edition_of(&seen).expect("a view saw a mixture of two records");
                assert!(seen >= newest, "a view saw record {seen} after record {newest}");
                newest = seen;
                pace.next().await;
            }
            newest
        }));
    }
    for viewer in viewers {
        let newest = env.joined(viewer).await;
        assert!(newest > 1, "a view saw nothing of what was written meanwhile");
    }
    peer.must(&Order::Stop).await;
}

async fn what_one_process_wrote_the_next_one_reads(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "0", long_life()).await;
    let mut peers = Peer::start_many(&env, 3).await;
    for n in 1..=30usize {
        let (before, after) = ((n - 1).to_string(), n.to_string());
        let writer = n % 3;
        peers[writer].hold(&id, env.lease(), Some(&before)).await;
        peers[writer].must(&Order::Save(after.clone())).await;
        for peer in &mut peers {
            let seen = peer.ask(&Order::Look(id.as_str().into())).await;
            assert!(seen == Answer::Record(Some(after.clone())), "after write {n} was acknowledged, a view says {seen:?}");
        }
        assert_eq!(see(&*handler, &id).await, Some(after));
    }
}

async fn destroy_in_one_process_reaches_a_holder_in_another(env: Env) {
    let handler = env.handler().await;
    for order in [Order::Save("after".into()), Order::Write("after".into())] {
        let id = stored(&*handler, &env, "before", long_life()).await;
        let mut peers = Peer::start_many(&env, 2).await;
        peers[0].hold(&id, env.lease(), Some("before")).await;
        let destroy = async {
            let mut opened = open(&*handler, &id, OpenRequest::destroy()).await;
            let removed = opened.destroy().await.unwrap_or_else(|error| panic!("destroy failed: {error:?}"));
            close(&mut *opened).await;
            text_of(removed)
        };
        // The holder holds for longer than this.
        let removed = tokio::time::timeout(PATIENCE, destroy).await.expect("a destroy waited for the holder");
        assert_eq!(removed.as_deref(), Some("before"));
        peers[0].must_not(&order, &[ErrorKind::Gone], "the session was destroyed during the hold").await;
        assert_eq!(see(&*handler, &id).await, None, "a holder brought a destroyed session back");
        let seen = peers[1].ask(&Order::Look(id.as_str().into())).await;
        assert_eq!(seen, Answer::Record(None), "a destroyed session is seen by another process");
    }
}

async fn absent_id_raced_by_two_processes_is_created_once(env: Env) {
    let handler = env.handler().await;
    let mut peers = Peer::start_many(&env, 2).await;
    for _ in 0..12 {
        let id = new_id();
        for (peer, text) in peers.iter_mut().zip(["the first", "the second"]) {
            peer.order(&Order::Create { id: id.as_str().into(), lease: env.lease(), text: text.into() });
        }
        let answers = [peers[0].answer(PATIENCE).await, peers[1].answer(PATIENCE).await];
        let winner = see(&*handler, &id).await;
        let found = Answer::Record(winner.clone());
        match &answers {
            [Answer::Created, other] => {
                assert_eq!((*other == found, winner.as_deref()), (true, Some("the first")), "{answers:?}")
            }
            [other, Answer::Created] => {
                assert_eq!((*other == found, winner.as_deref()), (true, Some("the second")), "{answers:?}")
            }
            _ => panic!("nobody created the session: {answers:?}"),
        }
    }
}

async fn release_wakes_a_waiter_in_another_process(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "before", long_life()).await;
    let mut peer = Peer::start(&env).await;
    let mut times = Vec::new();
    for _ in 0..5 {
        peer.hold(&id, env.lease(), Some("before")).await;
        let (waiter, request) = (Arc::clone(&handler), OpenRequest::exclusive(PATIENCE, env.lease()));
        let waiting = {
            let id = id.clone();
            env.spawn(async move { (open(&*waiter, &id, request).await, Instant::now()) })
        };
        // The waiter sleeps by now, and for as long as it ever does at once.
        tokio::time::sleep(Duration::from_millis(250)).await;
        let released = Instant::now();
        peer.must(&Order::Close).await;
        let (mut opened, woken) = env.joined(waiting).await;
        times.push(woken.saturating_duration_since(released));
        close(&mut *opened).await;
    }
    times.sort();
    assert!(
        times[2] < Duration::from_secs(1),
        "a waiter was let in {:?} after the release, in the median of five",
        times[2]
    );
}

async fn no_process_starves(env: Env) {
    let handler = env.handler().await;
    let id = stored(&*handler, &env, "begin", long_life()).await;
    let mut peers = Peer::start_many(&env, 4).await;
    let mut ledger = Ledger::default();
    for (n, peer) in peers.iter_mut().enumerate() {
        let (id, writer) = (id.as_str().into(), format!("w{n}"));
        peer.order(&Order::Append { id, writer, lease: env.lease(), times: u64::MAX });
    }
    tokio::time::sleep(Duration::from_secs(3) + env.tick()).await;
    for peer in &mut peers {
        peer.order(&Order::Stop);
    }
    for (n, peer) in peers.iter_mut().enumerate() {
        peer.rest(&mut ledger, &format!("w{n}")).await;
    }
    let shares: Vec<u64> = (0..4).map(|n| ledger.last.get(&format!("w{n}")).copied().unwrap_or(0)).collect();
    // When they are told to stop, one that waits still gets its turn; that one turn is not a share.
    assert!(shares.iter().all(|share| *share >= 3), "four processes got the session {shares:?} times");
    ledger.check(&see(&*handler, &id).await.expect("the session is absent"));
}

async fn gc_spares_what_another_process_holds(env: Env) {
    let handler = env.handler().await;
    let mut peer = Peer::start(&env).await;
    let life = env.tick() * 4;
    // Twice this outlasts the life that the record had, the second of rounding, and the case.
    let lease = life + Duration::from_secs(3);
    let id = stored(&*handler, &env, "before", Ttl::new(life)).await;
    peer.hold(&id, lease, Some("before")).await;
    tokio::time::sleep(life + Duration::from_millis(1200)).await;
    let limit = NonZeroU32::new(1000).expect("a thousand is not zero");
    let freed = handler.gc(limit).await.unwrap_or_else(|error| panic!("gc failed: {error:?}"));
    assert_eq!(freed, 0, "nothing had expired");
    assert_eq!(see(&*handler, &id).await.as_deref(), Some("before"), "a session that somebody holds was collected");
    peer.must(&Order::Save("after".into())).await;
    assert_eq!(see(&*handler, &id).await.as_deref(), Some("after"));
}

async fn gc_keeps_the_locks_of_another_process(env: Env) {
    let handler = env.handler().await;
    let there = stored(&*handler, &env, "before", long_life()).await;
    let absent = new_id();
    let mut peers = Peer::start_many(&env, 2).await;
    peers[0].hold(&there, env.lease(), Some("before")).await;
    peers[1].hold(&absent, env.lease(), None).await;
    let limit = NonZeroU32::new(1000).expect("a thousand is not zero");
    handler.gc(limit).await.unwrap_or_else(|error| panic!("gc failed: {error:?}"));
    let request = OpenRequest::exclusive(Duration::ZERO, env.lease()).expecting(Expect::Any);
    assert_held(&*handler, &there, &request, "a collection").await;
    assert_held(&*handler, &absent, &request, "a collection").await;
    for (peer, id) in peers.iter_mut().zip([&there, &absent]) {
        peer.must(&Order::Save("after".into())).await;
        assert_eq!(see(&*handler, id).await.as_deref(), Some("after"));
    }
}
