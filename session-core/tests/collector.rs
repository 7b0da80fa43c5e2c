//! The collector, over a store that is made up: what travels together, who hears what, and what becomes of whoever goes away.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use session_core::collector::{Batch, Class, Collector, Limits, Member, Reply};
use session_core::{Error, ErrorKind, Result};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use Class::{Open, Save};

/// An operation: its number.
struct Op(u32, #[allow(dead_code, reason = "it is counted from outside, to see when the operation is dropped")] Arc<()>);

/// What was sent: the class, and the number, repeat and skipped of each member.
type Sent = (Class, Vec<(u32, bool, bool)>);

type Answers = Box<dyn Fn(&[Member<Op>]) -> Result<Vec<Reply<u32>>> + Send + Sync>;

/// A store that notes what it is sent and answers when the gate lets it.
struct Fake {
    sent: Mutex<Vec<Sent>>,
    gate: Semaphore,
    in_flight: AtomicUsize,
    most: AtomicUsize,
    answers: Answers,
}

impl Batch for Fake {
    type Key = u32;
    type Op = Op;
    type Outcome = u32;

    async fn send(&self, class: Class, members: &[Member<Op>]) -> Result<Vec<Reply<u32>>> {
        let note = members.iter().map(|member| (member.op.0, member.repeat, member.skipped)).collect();
        self.sent.lock().unwrap().push((class, note));
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let _landing = Landing(&self.in_flight);
        self.gate.acquire().await.unwrap().forget();
        (self.answers)(members)
    }
}

struct Landing<'f>(&'f AtomicUsize);

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn done(members: &[Member<Op>]) -> Vec<Reply<u32>> {
    members.iter().map(|member| Reply::Done(Ok(member.op.0))).collect()
}

fn error(kind: ErrorKind) -> Error {
    Error::new(kind, "send", "as the test wants it")
}

/// A bug of a backend, without the noise of one.
fn panic_silently() -> ! {
    std::panic::resume_unwind(Box::new("as the test wants it"))
}

/// A collector over a store whose gate is shut.
fn collector_with(
    limits: Limits,
    answers: impl Fn(&[Member<Op>]) -> Result<Vec<Reply<u32>>> + Send + Sync + 'static,
) -> Collector<Fake> {
    let (sent, most) = (Mutex::default(), AtomicUsize::new(0));
    let fake = Fake { sent, gate: Semaphore::new(0), in_flight: AtomicUsize::new(0), most, answers: Box::new(answers) };
    Collector::new(fake, limits)
}

fn collector(answers: impl Fn(&[Member<Op>]) -> Result<Vec<Reply<u32>>> + Send + Sync + 'static) -> Collector<Fake> {
    collector_with(Limits::default(), answers)
}

fn obedient() -> Collector<Fake> {
    collector(|members| Ok(done(members)))
}

/// Submits operation `n` on session `n` from a task of its own.
fn submit(collector: &Collector<Fake>, class: Class, n: u32) -> JoinHandle<Result<u32>> {
    submit_sized(collector, class, n, 100)
}

fn submit_sized(collector: &Collector<Fake>, class: Class, n: u32, bytes: usize) -> JoinHandle<Result<u32>> {
    let collector = collector.clone();
    tokio::spawn(async move { collector.submit(class, n, bytes, Op(n, Arc::default())).await })
}

/// Lets all tasks go as far as they can.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// Fills both places in flight with the operations 1001 and 1002.
async fn occupy(collector: &Collector<Fake>) -> [JoinHandle<Result<u32>>; 2] {
    let lone = [1001, 1002].map(|n| submit(collector, Save, n));
    settle().await;
    assert_eq!(numbers(collector), [vec![1001], vec![1002]]);
    collector.batch().sent.lock().unwrap().clear();
    lone
}

async fn let_in(collector: &Collector<Fake>, flights: usize) {
    collector.batch().gate.add_permits(flights);
    settle().await;
}

fn numbers(collector: &Collector<Fake>) -> Vec<Vec<u32>> {
    sent(collector).into_iter().map(|(_, members)| members.into_iter().map(|(n, ..)| n).collect()).collect()
}

fn sent(collector: &Collector<Fake>) -> Vec<Sent> {
    collector.batch().sent.lock().unwrap().clone()
}

fn is_idle<B: Batch>(collector: &Collector<B>) -> bool {
    format!("{collector:?}") == "Collector { in_flight: 0, waiting: 0, .. }"
}

fn poll<F: Future>(future: &mut Pin<&mut F>) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

// What goes together

#[test]
fn a_lone_operation_is_sent_in_place_without_a_task_or_a_runtime() {
    let collector = obedient();
    collector.batch().gate.add_permits(1);
    let mut submit = pin!(collector.submit(Open, 1, 0, Op(1, Arc::default())));
    assert!(matches!(poll(&mut submit), Poll::Ready(Ok(1))));
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn what_waits_travels_together_in_the_order_of_arrival() {
    let collector = obedient();
    let [first, _second] = occupy(&collector).await;
    let waiting: Vec<_> = (0..10).map(|n| submit(&collector, Save, n)).collect();
    settle().await;
    assert!(numbers(&collector).is_empty(), "two in flight are enough");
    let_in(&collector, 1).await;
    assert_eq!(first.await.unwrap().unwrap(), 1001);
    assert_eq!(numbers(&collector), [(0..10).collect::<Vec<_>>()]);
    let_in(&collector, 2).await;
    for (n, task) in (0..).zip(waiting) {
        assert_eq!(task.await.unwrap().unwrap(), n);
    }
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn a_batch_has_at_most_64_members_and_ends_at_256_kib() {
    let collector = obedient();
    let _lone = occupy(&collector).await;
    let small: Vec<_> = (0..70).map(|n| submit(&collector, Save, n)).collect();
    let large: Vec<_> = (70..76).map(|n| submit_sized(&collector, Save, n, 60 << 10)).collect();
    settle().await;
    let_in(&collector, 100).await;
    let expected = [(0..64).collect::<Vec<_>>(), (64..74).collect(), (74..76).collect()];
    assert_eq!(numbers(&collector), expected, "64 members; six small ones and four of 60 KiB; the rest");
    for task in small.into_iter().chain(large) {
        task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn what_has_more_than_64_kib_travels_alone_and_passes_nobody() {
    let collector = obedient();
    let _lone = occupy(&collector).await;
    let tasks = [(1, 1), (2, 1), (3, (64 << 10) + 1), (4, 1), (5, 1), (6, 64 << 10)];
    let tasks = tasks.map(|(n, bytes)| submit_sized(&collector, Save, n, bytes));
    settle().await;
    let_in(&collector, 100).await;
    assert_eq!(numbers(&collector), [vec![1, 2], vec![3], vec![4, 5, 6]]);
    for task in tasks {
        task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_session_is_in_flight_once_and_its_operations_keep_their_order() {
    let collector = obedient();
    let submit = |session: u32, n: u32, class| {
        let collector = collector.clone();
        tokio::spawn(async move { collector.submit(class, session, 0, Op(n, Arc::default())).await })
    };
    // Session 7 alone in flight; a place is free, and yet its next ones wait.
    let mut tasks = vec![submit(7, 0, Open), submit(7, 1, Save), submit(7, 2, Open), submit(7, 3, Save)];
    settle().await;
    assert_eq!(numbers(&collector), [vec![0]]);
    tasks.push(submit(8, 10, Open));
    tasks.push(submit(9, 11, Open));
    settle().await;
    let_in(&collector, 1).await;
    assert_eq!(numbers(&collector), [vec![0], vec![10], vec![1]], "the save of 7 goes before the open of 9");
    let_in(&collector, 100).await;
    assert_eq!(numbers(&collector), [vec![0], vec![10], vec![1], vec![11], vec![2], vec![3]]);
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn whoever_waited_for_his_session_has_not_lost_his_place() {
    let collector = obedient();
    let [first, second] = occupy(&collector).await;
    let behind = {
        let collector = collector.clone();
        tokio::spawn(async move { collector.submit(Save, 1001, 0, Op(1, Arc::default())).await })
    };
    settle().await;
    let others = [2, 3].map(|n| submit(&collector, Save, n));
    settle().await;
    let_in(&collector, 100).await;
    assert_eq!(numbers(&collector), [[1, 2, 3]]);
    for task in others.into_iter().chain([first, second, behind]) {
        task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn saves_go_before_opens_and_never_with_them() {
    let collector = obedient();
    let [_first, _second] = occupy(&collector).await;
    let tasks = [(Open, 1), (Save, 2), (Open, 3), (Save, 4)].map(|(class, n)| submit(&collector, class, n));
    settle().await;
    let_in(&collector, 100).await;
    let sent: Vec<_> = sent(&collector).into_iter().map(|(class, members)| (class, members.len(), members[0].0)).collect();
    assert_eq!(sent, [(Save, 2, 2), (Open, 2, 1)]);
    for task in tasks {
        task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn each_open_is_passed_by_eight_batches_of_saves_and_no_more() {
    let collector = collector_with(one_flight(), |members| Ok(done(members)));
    let lone = submit(&collector, Save, 1000);
    settle().await;
    let opens = [998, 999].map(|n| submit_sized(&collector, Open, n, 65 << 10));
    let saves: Vec<_> = (0..64 * 20).map(|n| submit(&collector, Save, n + 2000)).collect();
    settle().await;
    let_in(&collector, 100).await;
    let classes: Vec<_> = sent(&collector).into_iter().map(|(class, _)| class).collect();
    let turns: Vec<_> = classes.iter().enumerate().filter(|(_, class)| **class == Open).map(|(turn, _)| turn).collect();
    assert_eq!(turns, [1 + 8, 1 + 8 + 1 + 8]);
    for task in saves.into_iter().chain(opens).chain([lone]) {
        task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_second_batch_goes_beside_one_of_its_class_as_soon_as_it_is_as_large() {
    let collector = obedient();
    let lone = occupy(&collector).await;
    let mut saves: Vec<_> = (0..10).map(|n| submit(&collector, Save, n)).collect();
    settle().await;
    let_in(&collector, 2).await;
    saves.extend((10..19).map(|n| submit(&collector, Save, n)));
    settle().await;
    assert_eq!(numbers(&collector), [(0..10).collect::<Vec<_>>()], "nine do not go beside ten, though there is a place");
    saves.push(submit(&collector, Save, 19));
    settle().await;
    assert_eq!(numbers(&collector)[1..], [(10..20).collect::<Vec<_>>()], "ten do");
    let_in(&collector, 2).await;
    for task in saves.into_iter().chain(lone) {
        task.await.unwrap().unwrap();
    }
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn a_store_may_let_half_as_large_a_batch_go_beside_one_of_its_class() {
    let mut limits = Limits::default();
    limits.beside = 2;
    let collector = collector_with(limits, |members| Ok(done(members)));
    let lone = occupy(&collector).await;
    let mut saves: Vec<_> = (0..10).map(|n| submit(&collector, Save, n)).collect();
    settle().await;
    let_in(&collector, 2).await;
    saves.extend((10..14).map(|n| submit(&collector, Save, n)));
    settle().await;
    assert_eq!(numbers(&collector), [(0..10).collect::<Vec<_>>()], "four do not go beside ten, though there is a place");
    saves.push(submit(&collector, Save, 14));
    settle().await;
    assert_eq!(numbers(&collector)[1..], [(10..15).collect::<Vec<_>>()], "five do");
    let_in(&collector, 2).await;
    for task in saves.into_iter().chain(lone) {
        task.await.unwrap().unwrap();
    }
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn whoever_waits_beside_a_large_batch_of_his_class_keeps_nobody_of_the_other_and_goes_when_it_lands() {
    let collector = obedient();
    let lone = occupy(&collector).await;
    let mut tasks: Vec<_> = (0..10).map(|n| submit(&collector, Save, n)).collect();
    settle().await;
    let_in(&collector, 2).await;
    tasks.push(submit(&collector, Save, 10));
    tasks.push(submit(&collector, Open, 11));
    settle().await;
    assert_eq!(numbers(&collector)[1..], [[11]]);
    let_in(&collector, 1).await;
    assert_eq!(numbers(&collector)[1..], [[11], [10]]);
    let_in(&collector, 2).await;
    for task in tasks.into_iter().chain(lone) {
        task.await.unwrap().unwrap();
    }
    assert!(is_idle(&collector));
}

fn one_flight() -> Limits {
    let mut limits = Limits::default();
    limits.flights = 1;
    limits
}

#[tokio::test]
async fn those_who_come_again_as_soon_as_they_are_answered_travel_together_again() {
    let collector = collector_with(one_flight(), |members| Ok(done(members)));
    let tasks = (0..8).map(|n| {
        let collector = collector.clone();
        tokio::spawn(async move {
            for _ in 0..4 {
                collector.submit(Save, n, 0, Op(n, Arc::default())).await.unwrap();
            }
        })
    });
    let tasks: Vec<_> = tasks.collect();
    settle().await;
    let_in(&collector, 100).await;
    for task in tasks {
        task.await.unwrap();
    }
    let sizes: Vec<_> = numbers(&collector).iter().map(Vec::len).collect();
    assert_eq!(sizes, [1, 7, 8, 8, 8]);
}

// Who goes away

#[tokio::test]
async fn an_operation_whose_caller_has_gone_is_dropped_at_once_and_never_sent() {
    let collector = obedient();
    let _lone = occupy(&collector).await;
    let alive = Arc::new(());
    let submit_on = |session, n| {
        let (collector, alive) = (collector.clone(), alive.clone());
        tokio::spawn(async move { collector.submit(Save, session, 0, Op(n, alive)).await })
    };
    let (waits, parked, last) = (submit_on(1, 1), submit_on(1, 2), submit_on(1, 3));
    settle().await;
    assert_eq!(Arc::strong_count(&alive), 4);
    parked.abort();
    settle().await;
    assert_eq!(Arc::strong_count(&alive), 3);
    waits.abort();
    settle().await;
    assert_eq!(Arc::strong_count(&alive), 2);
    let_in(&collector, 100).await;
    assert_eq!(numbers(&collector), [vec![3]]);
    assert_eq!(last.await.unwrap().unwrap(), 3);
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn a_caller_who_goes_when_the_batch_is_made_up_but_not_sent_is_taken_out() {
    let collector = obedient();
    // Sent by hand, so that the flight ends here and the task of the next batch has not begun.
    let mut lone = Box::pin(collector.submit(Save, 1001, 0, Op(1001, Arc::default())));
    let mut second = Box::pin(collector.submit(Save, 1002, 0, Op(1002, Arc::default())));
    assert!(poll(&mut lone.as_mut()).is_pending() && poll(&mut second.as_mut()).is_pending());
    let mut gone = Box::pin(collector.submit(Save, 1, 0, Op(1, Arc::default())));
    let mut stays = Box::pin(collector.submit(Save, 2, 0, Op(2, Arc::default())));
    assert!(poll(&mut gone.as_mut()).is_pending() && poll(&mut stays.as_mut()).is_pending());
    drop(lone);
    drop(gone);
    settle().await;
    assert_eq!(numbers(&collector), [vec![1001], vec![1002], vec![2]]);
    collector.batch().gate.add_permits(2);
    assert_eq!(stays.await.unwrap(), 2);
    assert_eq!(second.await.unwrap(), 1002);
    settle().await;
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn whoever_is_left_alone_of_a_batch_is_sent_once_like_any_lone_one() {
    let collector = collector_with(one_flight(), |_| Err(error(ErrorKind::Unknown)));
    let mut lone = Box::pin(collector.submit(Save, 1001, 0, Op(1001, Arc::default())));
    let mut gone = Box::pin(collector.submit(Save, 1, 0, Op(1, Arc::default())));
    let mut stays = Box::pin(collector.submit(Save, 2, 0, Op(2, Arc::default())));
    assert!(poll(&mut lone.as_mut()).is_pending());
    assert!(poll(&mut gone.as_mut()).is_pending() && poll(&mut stays.as_mut()).is_pending());
    drop(lone);
    drop(gone);
    collector.batch().gate.add_permits(10);
    assert_eq!(stays.await.unwrap_err().kind(), ErrorKind::Unknown);
    assert_eq!(numbers(&collector), [[1001], [2]]);
}

#[tokio::test]
async fn a_caller_who_goes_in_mid_batch_harms_nobody() {
    for leaver in 0..3 {
        let collector = obedient();
        let [first, second] = occupy(&collector).await;
        let tasks: Vec<_> = (0..3).map(|n| submit(&collector, Save, n)).collect();
        settle().await;
        let_in(&collector, 1).await;
        assert_eq!(numbers(&collector), [[0, 1, 2]]);
        tasks[leaver].abort();
        settle().await;
        let_in(&collector, 2).await;
        for (n, task) in tasks.into_iter().enumerate().filter(|(n, _)| *n != leaver) {
            assert_eq!(task.await.unwrap().unwrap(), u32::try_from(n).unwrap());
        }
        assert_eq!(numbers(&collector).len(), 1, "nothing is sent twice because somebody has gone");
        assert!(first.await.unwrap().is_ok() && second.await.unwrap().is_ok() && is_idle(&collector));
    }
}

#[tokio::test]
async fn a_lone_caller_who_goes_gives_his_place_to_those_who_wait() {
    let collector = obedient();
    let [first, second] = occupy(&collector).await;
    let tasks = [1, 2].map(|n| submit(&collector, Save, n));
    settle().await;
    first.abort();
    settle().await;
    assert_eq!(numbers(&collector), [[1, 2]]);
    let next = submit(&collector, Open, 3);
    settle().await;
    second.abort();
    settle().await;
    assert_eq!(numbers(&collector), [vec![1, 2], vec![3]]);
    // The lone one in its place is told to send itself and goes at that moment.
    next.abort();
    settle().await;
    let_in(&collector, 1).await;
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert!(is_idle(&collector));
}

// What goes wrong

#[tokio::test]
async fn a_poisonous_member_fails_alone() {
    for kind in [ErrorKind::Unexpected, ErrorKind::TooLarge, ErrorKind::Unknown] {
        let collector = collector(move |members| match members.iter().any(|member| member.op.0 == 2) {
            true => Err(error(kind)),
            false => Ok(done(members)),
        });
        let _lone = occupy(&collector).await;
        let tasks: Vec<_> = (0..5).map(|n| submit(&collector, Save, n)).collect();
        settle().await;
        let_in(&collector, 100).await;
        for (n, task) in (0..).zip(tasks) {
            let outcome = task.await.unwrap();
            match n {
                2 => assert_eq!(outcome.unwrap_err().kind(), kind),
                _ => assert_eq!(outcome.unwrap(), n),
            }
        }
        let repeat = kind == ErrorKind::Unknown;
        let mut again = sent(&collector);
        assert_eq!(again.remove(0).1.len(), 5);
        again.sort_by_key(|(_, members)| members[0].0);
        assert_eq!(again, (0..5).map(|n| (Save, vec![(n, repeat, false)])).collect::<Vec<_>>());
        assert!(is_idle(&collector));
    }
}

#[tokio::test]
async fn a_refused_repeat_is_unknown_and_a_refused_first_time_is_not() {
    for (class, first, refusal, expected) in [
        (Save, ErrorKind::Unknown, ErrorKind::Fenced, ErrorKind::Unknown),
        (Save, ErrorKind::Unknown, ErrorKind::Gone, ErrorKind::Unknown),
        (Save, ErrorKind::Unknown, ErrorKind::Conflict, ErrorKind::Unknown),
        (Save, ErrorKind::Unknown, ErrorKind::Unavailable, ErrorKind::Unknown),
        (Save, ErrorKind::Unknown, ErrorKind::TooLarge, ErrorKind::TooLarge),
        (Open, ErrorKind::Unknown, ErrorKind::LockTimeout, ErrorKind::LockTimeout),
        (Save, ErrorKind::Unexpected, ErrorKind::Fenced, ErrorKind::Fenced),
    ] {
        let collector = collector(move |members| match members.len() {
            1 if members[0].op.0 < 1000 => Ok(vec![Reply::Done(Err(error(refusal)))]),
            1 => Ok(done(members)),
            _ => Err(error(first)),
        });
        let _lone = occupy(&collector).await;
        let tasks = [1, 2].map(|n| submit(&collector, class, n));
        settle().await;
        let_in(&collector, 100).await;
        for task in tasks {
            assert_eq!(task.await.unwrap().unwrap_err().kind(), expected, "{refusal} after {first}");
        }
    }
}

#[tokio::test]
async fn a_store_that_was_not_reached_is_not_asked_for_each_member() {
    let collector = collector(|_| Err(error(ErrorKind::Unavailable).with_source("refused")));
    let _lone = occupy(&collector).await;
    let tasks: Vec<_> = (0..20).map(|n| submit(&collector, Save, n)).collect();
    settle().await;
    let_in(&collector, 100).await;
    for task in tasks {
        let error = task.await.unwrap().unwrap_err();
        assert_eq!((error.kind(), format!("{error:?}").contains("refused")), (ErrorKind::Unavailable, true));
    }
    assert_eq!(numbers(&collector).len(), 1);
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn a_store_that_has_fallen_silent_is_not_waited_for_by_each_member_in_turn() {
    let collector = collector(|_| Err(error(ErrorKind::Unknown)));
    let _lone = occupy(&collector).await;
    let tasks: Vec<_> = (0..64).map(|n| submit(&collector, Save, n)).collect();
    settle().await;
    let_in(&collector, 100).await;
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap_err().kind(), ErrorKind::Unknown);
    }
    let asked = numbers(&collector).len() - 1;
    assert!((3..=3 + Limits::default().again).contains(&asked), "{asked} members were sent again");
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn members_that_fall_silent_one_here_and_one_there_do_not_condemn_the_rest() {
    let collector = collector(|members| match members.iter().any(|member| member.op.0 % 3 == 1 && member.op.0 < 1000) {
        true => Err(error(ErrorKind::Unknown)),
        false => Ok(done(members)),
    });
    let _lone = occupy(&collector).await;
    let tasks: Vec<_> = (0..30).map(|n| submit(&collector, Save, n)).collect();
    settle().await;
    let_in(&collector, 100).await;
    for (n, task) in (0..).zip(tasks) {
        assert_eq!(task.await.unwrap().is_ok(), n % 3 != 1, "operation {n}");
    }
}

#[tokio::test]
async fn a_skipped_member_goes_again_alone_and_delays_only_itself() {
    let collector = collector(|members| {
        let reply = |member: &Member<Op>| match member.op.0 {
            n if n < 8 && !member.skipped => Reply::Skipped,
            n => Reply::Done(Ok(n)),
        };
        Ok(members.iter().map(reply).collect())
    });
    let _lone = occupy(&collector).await;
    let tasks: Vec<_> = (0..10).map(|n| submit(&collector, Open, n)).collect();
    settle().await;
    let_in(&collector, 2).await;
    assert_eq!(numbers(&collector)[0].len(), 10);
    let_in(&collector, 1).await;
    // The others have been told, and the eight wait for their rows, four at a time, outside of the two places.
    assert!(tasks[8].is_finished() && tasks[9].is_finished() && !tasks.iter().take(8).any(JoinHandle::is_finished));
    assert_eq!(numbers(&collector).len(), 1 + 4);
    let others = [21, 22, 23].map(|n| submit(&collector, Open, n));
    settle().await;
    assert_eq!(numbers(&collector)[5..], [[21], [22]]);
    let_in(&collector, 100).await;
    for (n, task) in (0..10).chain(21..24).zip(tasks.into_iter().chain(others)) {
        assert_eq!(task.await.unwrap().unwrap(), n);
    }
    let again: Vec<_> = sent(&collector).into_iter().filter(|(_, members)| members[0].2).collect();
    assert_eq!(numbers(&collector).iter().flatten().count(), 10 + 8 + 3, "nobody is sent more often than that");
    assert_eq!(again.len(), 8);
    assert!(again.iter().all(|(_, members)| members.len() == 1 && !members[0].1), "{again:?}");
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn a_lone_operation_that_is_skipped_does_not_wait_for_its_row_in_a_place_in_flight() {
    let collector = collector_with(one_flight(), |members| match members[0] {
        Member { op: Op(1, _), skipped: false, .. } => Ok(vec![Reply::Skipped]),
        _ => Ok(done(members)),
    });
    let skipped = submit(&collector, Save, 1);
    settle().await;
    let_in(&collector, 1).await;
    let other = submit(&collector, Save, 2);
    settle().await;
    assert_eq!(numbers(&collector), [[1], [1], [2]]);
    let_in(&collector, 2).await;
    assert!(skipped.await.unwrap().is_ok() && other.await.unwrap().is_ok() && is_idle(&collector));
}

#[tokio::test]
async fn an_operation_that_is_skipped_alone_too_was_certainly_not_applied() {
    let collector = collector(|_| Ok(vec![Reply::Skipped]));
    collector.batch().gate.add_permits(2);
    let outcome = collector.submit(Save, 1, 0, Op(1, Arc::default())).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(sent(&collector), [(Save, vec![(1, false, false)]), (Save, vec![(1, false, true)])]);
    assert!(is_idle(&collector));
}

#[tokio::test]
async fn replies_that_do_not_match_the_members_are_given_to_nobody() {
    for surplus in [false, true] {
        let collector = collector(move |members| {
            let mut replies = done(members);
            replies.pop();
            if surplus {
                replies.extend(done(members));
                replies.extend(done(&members[..1]));
            }
            Ok(replies)
        });
        let lone = occupy(&collector).await;
        let tasks = [1, 2, 3].map(|n| submit(&collector, Save, n));
        settle().await;
        let_in(&collector, 100).await;
        for task in lone.into_iter().chain(tasks) {
            let outcome = task.await.unwrap();
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unexpected);
        }
        assert!(is_idle(&collector));
    }
}

#[tokio::test]
async fn a_panic_reaches_only_the_caller_whose_operation_causes_it() {
    let collector = collector(|members| match members.iter().any(|member| member.op.0 == 2) {
        true => panic_silently(),
        false => Ok(done(members)),
    });
    let _lone = occupy(&collector).await;
    let tasks: Vec<_> = (0..5).map(|n| submit(&collector, Save, n)).collect();
    settle().await;
    let_in(&collector, 100).await;
    for (n, task) in (0..).zip(tasks) {
        match task.await {
            Ok(outcome) => assert_eq!(outcome.unwrap(), n),
            Err(panic) => assert!(panic.is_panic() && n == 2),
        }
    }
    assert!(sent(&collector)[1..].iter().all(|(_, members)| members[0].1), "a panic may have come after the sending");
    assert!(is_idle(&collector));
}

// Runtimes

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap()
}

/// Waits until `collector` has sent `flights` flights.
fn until_sent(collector: &Collector<Fake>, flights: usize) {
    until(|| numbers(collector).len() == flights);
}

fn until(condition: impl Fn() -> bool) {
    for _ in 0..30_000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it did not come to that within half a minute");
}

#[test]
fn a_runtime_that_ends_in_mid_batch_leaves_nobody_of_another_waiting() {
    let collector = obedient();
    let (ending, staying) = (runtime(), runtime());
    let submit_on = |runtime: &Runtime, n| {
        let _context = runtime.enter();
        submit(&collector, Save, n)
    };
    let lone: Vec<_> = (1001..1003).map(|n| submit_on(&staying, n)).collect();
    until_sent(&collector, 2);
    // The first of the batch says where it runs: on the runtime that will end.
    let _lost = submit_on(&ending, 1);
    until(|| format!("{collector:?}").contains("waiting: 1"));
    let tasks: Vec<_> = (2..5).map(|n| submit_on(&staying, n)).collect();
    until(|| format!("{collector:?}").contains("waiting: 4"));
    collector.batch().gate.add_permits(1);
    until_sent(&collector, 3);
    ending.shutdown_timeout(Duration::from_secs(5));
    collector.batch().gate.add_permits(100);
    for (n, task) in (2..).zip(tasks) {
        assert_eq!(staying.block_on(task).unwrap().unwrap(), n);
    }
    for task in lone {
        staying.block_on(task).unwrap().unwrap();
    }
    let repeats: Vec<_> = sent(&collector).into_iter().filter(|(_, members)| members[0].1).collect();
    assert_eq!(repeats.len(), 3, "they were sent before, and are repeats");
    assert!(is_idle(&collector));
}

#[test]
fn a_runtime_that_has_ended_before_its_batch_was_sent_makes_no_repeats() {
    let collector = obedient();
    let (ended, staying) = (runtime(), runtime());
    // A caller who outlives his runtime: his future is polled here, by hand.
    let mut lone: Vec<_> = (1001..1003).map(|n| Box::pin(collector.submit(Save, n, 0, Op(n, Arc::default())))).collect();
    assert!(lone.iter_mut().all(|lone| poll(&mut lone.as_mut()).is_pending()));
    let mut first = pin!(collector.submit(Save, 1, 0, Op(1, Arc::default())));
    {
        let _context = ended.enter();
        assert!(poll(&mut first).is_pending());
    }
    let other = {
        let _context = staying.enter();
        submit(&collector, Save, 2)
    };
    until(|| format!("{collector:?}").contains("waiting: 2"));
    ended.shutdown_timeout(Duration::from_secs(5));
    collector.batch().gate.add_permits(4);
    assert!(matches!(poll(&mut lone[0].as_mut()), Poll::Ready(Ok(1001))));
    assert!(matches!(poll(&mut first), Poll::Ready(Ok(1))));
    assert_eq!(staying.block_on(other).unwrap().unwrap(), 2);
    assert!(sent(&collector).iter().all(|(_, members)| members.len() == 1 && !members[0].1));
    assert!(matches!(poll(&mut lone[1].as_mut()), Poll::Ready(Ok(1002))));
    assert!(is_idle(&collector));
}

#[test]
fn a_thousand_batches_that_wait_for_a_runtime_that_has_ended_do_not_exhaust_the_stack() {
    let mut limits = one_flight();
    limits.members = 2;
    let collector = collector_with(limits, |members| Ok(done(members)));
    let ended = runtime();
    let mut callers: Vec<_> = (0..20_001).map(|n| Box::pin(collector.submit(Save, n, 0, Op(n, Arc::default())))).collect();
    {
        let _context = ended.enter();
        assert!(callers.iter_mut().all(|caller| poll(&mut caller.as_mut()).is_pending()));
    }
    ended.shutdown_timeout(Duration::from_secs(5));
    collector.batch().gate.add_permits(30_000);
    for (n, caller) in (0..).zip(&mut callers) {
        match poll(&mut caller.as_mut()) {
            Poll::Ready(outcome) => assert_eq!(outcome.unwrap(), n),
            Poll::Pending => panic!("operation {n} is left behind"),
        }
    }
    assert!(is_idle(&collector));
}

#[test]
fn without_a_runtime_each_travels_alone() {
    let collector = obedient();
    let mut callers: Vec<_> = (0..5).map(|n| Box::pin(collector.submit(Save, n, 0, Op(n, Arc::default())))).collect();
    assert!(callers.iter_mut().all(|caller| poll(&mut caller.as_mut()).is_pending()));
    collector.batch().gate.add_permits(5);
    for (n, caller) in (0..).zip(&mut callers) {
        assert!(matches!(poll(&mut caller.as_mut()), Poll::Ready(Ok(m)) if m == n));
    }
    assert!(sent(&collector).iter().all(|(_, members)| members.len() == 1));
    assert!(is_idle(&collector));
}

// Everything at once

/// A number of a sequence that a seed determines.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        // The finalizer of SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

/// A store of counters, one for each session, that fails in every way that a store can.
struct Unruly {
    state: Mutex<Ledger>,
}

struct Ledger {
    dice: Dice,
    flights: usize,
    busy: HashSet<u32>,
    /// How often each operation was applied.
    applied: HashMap<u64, u32>,
    /// What was sent and may be applied, as far as the collector can know.
    open_question: HashSet<u64>,
    last_of_session: HashMap<u32, u64>,
    /// Whether the numbers of a session grow in the order of submission, because there is only one thread.
    ordered: bool,
    broken: Vec<String>,
}

struct Numbered {
    session: u32,
    number: u64,
    poison: bool,
    bytes: usize,
}

/// The time that a batch is under way: its sessions are busy. It may end by being dropped.
struct UnderWay<'s> {
    store: &'s Unruly,
    sessions: Vec<u32>,
    several: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut ledger = self.store.state.lock().unwrap_or_else(PoisonError::into_inner);
        for session in &self.sessions {
            ledger.busy.remove(session);
        }
        ledger.flights -= usize::from(self.several);
    }
}

impl Batch for Unruly {
    type Key = u32;
    type Op = Numbered;
    type Outcome = u64;

    async fn send(&self, _: Class, members: &[Member<Numbered>]) -> Result<Vec<Reply<u64>>> {
        let (_under_way, rounds) = self.begin(members);
        for _ in 0..rounds {
            tokio::task::yield_now().await;
        }
        let replies = self.decide(members);
        for _ in 0..rounds {
            tokio::task::yield_now().await;
        }
        if replies.is_err() && rounds == 3 {
            panic_silently();
        }
        replies
    }
}

impl Unruly {
    fn begin(&self, members: &[Member<Numbered>]) -> (UnderWay<'_>, u64) {
        let mut ledger = self.state.lock().unwrap();
        let ledger = &mut *ledger;
        let several = members.len() > 1;
        ledger.flights += usize::from(several);
        let bytes: usize = members.iter().map(|member| member.op.bytes).sum();
        let largest = members.iter().map(|member| member.op.bytes).max().unwrap();
        if ledger.flights > 2 || members.len() > 64 || several && (bytes > 256 << 10 || largest > 64 << 10) {
            ledger.broken.push(format!("{} flights, {} members, {bytes} bytes", ledger.flights, members.len()));
        }
        for Member { op, repeat, .. } in members {
            if !ledger.busy.insert(op.session) {
                ledger.broken.push(format!("session {} is in flight twice", op.session));
            }
            if ledger.open_question.contains(&op.number) && !repeat {
                ledger.broken.push(format!("operation {} is sent again and not called a repeat", op.number));
            }
            if ledger.last_of_session.insert(op.session, op.number).is_some_and(|last| last > op.number && ledger.ordered) {
                ledger.broken.push(format!("operation {} was overtaken in its session", op.number));
            }
        }
        // Whoever is dropped from here on may have been applied.
        ledger.open_question.extend(members.iter().map(|member| member.op.number));
        let sessions = members.iter().map(|member| member.op.session).collect();
        (UnderWay { store: self, sessions, several }, ledger.dice.throw(4))
    }

    fn decide(&self, members: &[Member<Numbered>]) -> Result<Vec<Reply<u64>>> {
        let mut ledger = self.state.lock().unwrap();
        let ledger = &mut *ledger;
        let not_applied = |ledger: &mut Ledger| {
            // A repeat remains in question: its first copy may have been applied.
            for member in members.iter().filter(|member| !member.repeat) {
                ledger.open_question.remove(&member.op.number);
            }
        };
        if members.iter().any(|member| member.op.poison) {
            not_applied(ledger);
            return Err(error(ErrorKind::TooLarge));
        }
        match ledger.dice.throw(12) {
            0 => {
                not_applied(ledger);
                return Err(error(ErrorKind::Unavailable));
            }
            1 => return Err(error(ErrorKind::Unknown)),
            _ => {}
        }
        let mut replies = Vec::new();
        for member in members {
            if ledger.dice.throw(10) == 0 {
                if !member.repeat {
                    ledger.open_question.remove(&member.op.number);
                }
                replies.push(Reply::Skipped);
                continue;
            }
            // As a store with a fence: the same write id is applied once, and a repeat of it hears that.
            let applied = ledger.applied.entry(member.op.number).or_default();
            if *applied == 0 {
                *applied = 1;
            } else if !member.repeat {
                *applied += 1;
            }
            replies.push(Reply::Done(Ok(member.op.number)));
        }
        match ledger.dice.throw(12) {
            0 => Err(error(ErrorKind::Unknown)), // The answer is lost.
            _ => Ok(replies),
        }
    }
}

/// Every caller who stays hears exactly once, of his own operation, and the truth.
#[test]
fn whatever_the_dice_want_each_caller_hears_the_truth_of_his_own_operation() {
    let seed = std::env::var("CONFORMANCE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| RandomState::new().hash_one(std::process::id()));
    println!("replay with CONFORMANCE_SEED={seed}");
    // On one thread a seed replays exactly; on several the threads throw dice of their own.
    for round in 0..4 {
        run_at_random(seed.wrapping_add(round), &runtime(), false);
        run_at_random(seed.wrapping_add(round), &Builder::new_current_thread().enable_all().build().unwrap(), true);
    }
}

fn run_at_random(seed: u64, runtime: &Runtime, ordered: bool) {
    let ledger = Ledger {
        dice: Dice(seed),
        flights: 0,
        busy: HashSet::new(),
        applied: HashMap::new(),
        open_question: HashSet::new(),
        last_of_session: HashMap::new(),
        ordered,
        broken: Vec::new(),
    };
    let collector = Collector::new(Unruly { state: Mutex::new(ledger) }, Limits::default());
    let numbers = Arc::new(AtomicU64::new(0));
    let tallies = runtime.block_on(async {
        let tasks: Vec<_> = (0..100)
            .map(|task| {
                let (collector, numbers) = (collector.clone(), numbers.clone());
                tokio::spawn(one_caller(collector, numbers, task, Dice(seed ^ (u64::from(task) << 32))))
            })
            .collect();
        let mut tallies = Vec::new();
        for task in tasks {
            let tally = tokio::time::timeout(Duration::from_secs(60), task).await.expect("somebody is never told");
            tallies.push(tally.unwrap());
        }
        tallies
    });
    // The last flight is given back a moment after its last answer.
    until(|| {
        runtime.block_on(tokio::task::yield_now());
        is_idle(&collector)
    });
    let heard: Vec<_> = tallies.into_iter().flatten().collect();
    let ledger = collector.batch().state.lock().unwrap();
    assert_eq!(ledger.broken, Vec::<String>::new(), "seed {seed}");
    assert!(ledger.applied.values().all(|&times| times == 1), "applied twice, seed {seed}");
    let mut kinds = HashMap::new();
    for (number, heard) in &heard {
        let applied = ledger.applied.contains_key(number);
        match heard {
            None => assert!(applied, "told that {number} is applied, seed {seed}"),
            Some(ErrorKind::Unknown) => {}
            Some(kind) => assert!(!applied, "told {kind} of {number}, which is applied, seed {seed}"),
        }
        *kinds.entry(*heard).or_insert(0) += 1;
    }
    for kind in [None, Some(ErrorKind::Unknown), Some(ErrorKind::Unavailable), Some(ErrorKind::TooLarge)] {
        assert!(kinds.contains_key(&kind), "the dice never came to {kind:?}, seed {seed}");
    }
}

/// Submits again and again, gives up now and then, and returns what it heard: `None` is success.
async fn one_caller(
    collector: Collector<Unruly>,
    numbers: Arc<AtomicU64>,
    task: u32,
    mut dice: Dice,
) -> Vec<(u64, Option<ErrorKind>)> {
    let mut heard = Vec::new();
    for _ in 0..40 {
        let class = if dice.throw(2) == 0 { Save } else { Open };
        let bytes = if dice.throw(20) == 0 { 70 << 10 } else { 10 << 10 };
        let poison = dice.throw(30) == 0;
        let session = if dice.throw(4) == 0 { task % 10 } else { task };
        let gives_up = (dice.throw(5) == 0).then(|| dice.throw(6));
        let (collector, numbers) = (collector.clone(), numbers.clone());
        let submit = tokio::spawn(async move {
            let number = numbers.fetch_add(1, Ordering::SeqCst);
            let op = Numbered { session, number, poison, bytes };
            (number, collector.submit(class, session, bytes, op).await)
        });
        if let Some(rounds) = gives_up {
            for _ in 0..rounds {
                tokio::task::yield_now().await;
            }
            submit.abort();
        }
        match submit.await {
            Ok((number, Ok(outcome))) => {
                assert_eq!(outcome, number, "heard somebody else's outcome");
                heard.push((number, None));
            }
            Ok((number, Err(error))) => heard.push((number, Some(error.kind()))),
            // Gone, or a panic of the backend with this operation alone: whatever became of it, nobody is told.
            Err(end) => assert!(end.is_cancelled() || end.is_panic()),
        }
    }
    heard
}
