//! Each rule of the contract, on the store that is its specification.

use super::store::{SHARDS, Slot};
use super::*;
use crate::error::ErrorKind;
use crate::handler::Expect;
use crate::record::{Change, WriteId, Written};
use crate::ttl::Ttl;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

const LEASE: Duration = Duration::from_secs(30);
const LONG: Ttl = Ttl::MAX;

fn exclusive(lease: Duration) -> OpenRequest {
    OpenRequest::exclusive(Duration::ZERO, lease)
}

fn record(text: &str) -> Record {
    Record::new(text.as_bytes(), LONG)
}

fn new_id() -> SessionId {
    SessionId::generate().unwrap()
}

fn wid() -> WriteId {
    WriteId::random().unwrap()
}

async fn create(handler: &MemoryHandler, text: &str, ttl: Ttl) -> SessionId {
    let id = new_id();
    let mut fresh = handler.open(&id, &OpenRequest::optimistic().expecting(Expect::Fresh)).await.unwrap();
    let written = fresh.save(&Change::Write(Record::new(text.as_bytes(), ttl)), wid()).await.unwrap();
    assert_eq!(written, Written::Applied);
    id
}

async fn open(handler: &MemoryHandler, id: &SessionId, request: OpenRequest) -> Box<dyn OpenSession> {
    handler.open(id, &request).await.unwrap()
}

async fn text(handler: &MemoryHandler, id: &SessionId) -> Option<String> {
    let record = open(handler, id, OpenRequest::read_only()).await.read().await.unwrap();
    record.map(|record| String::from_utf8(record.data).unwrap())
}

async fn destroy(handler: &MemoryHandler, id: &SessionId) -> Option<Record> {
    open(handler, id, OpenRequest::destroy()).await.destroy().await.unwrap()
}

fn entries(handler: &MemoryHandler) -> (usize, usize) {
    let shards = (0..SHARDS).map(|n| handler.sessions.store().shard(n));
    shards.fold((0, 0), |(entries, due), shard| (entries + shard.entries.len(), due + shard.due.len()))
}

fn kind<T: fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

async fn past(lease: Duration) {
    tokio::time::sleep(lease + Duration::from_millis(15)).await;
}

const SHORT: Duration = Duration::from_millis(30);

#[tokio::test]
async fn an_absent_id_that_should_exist_is_answered_at_once_and_leaves_nothing() {
    let handler = MemoryHandler::new();
    let id = new_id();
    let _admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
    for request in [OpenRequest::exclusive(LEASE, LEASE), OpenRequest::optimistic()] {
        let other = new_id();
        for id in [&id, &other] {
            let mut opening = open(&handler, id, request).await;
            assert!(opening.held().is_none());
            assert_eq!(opening.read().await.unwrap(), None);
            assert_eq!(kind(opening.write(&record("x"), wid()).await), ErrorKind::Gone);
        }
    }
    drop(_admin);
    assert_eq!(entries(&handler), (0, 0));
}

#[tokio::test]
async fn an_opening_that_was_refused_its_lock_never_writes_even_if_the_session_appears() {
    let handler = MemoryHandler::new();
    let id = new_id();
    let mut early = open(&handler, &id, exclusive(LEASE)).await;
    assert_eq!(early.read().await.unwrap(), None);
    let mut fresh = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Fresh)).await;
    fresh.write(&record("x"), wid()).await.unwrap();
    assert!(early.read().await.unwrap().is_some());
    assert_eq!(kind(early.write(&record("y"), wid()).await), ErrorKind::Gone);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("x"));
}

#[tokio::test]
async fn nothing_is_stored_for_a_fresh_id_before_its_first_write_which_takes_the_lock() {
    let handler = MemoryHandler::new();
    let id = new_id();
    let mut fresh = open(&handler, &id, exclusive(LEASE).expecting(Expect::Fresh)).await;
    assert_eq!(entries(&handler), (0, 0));
    assert!(fresh.held().is_none());
    assert_eq!(fresh.write(&record("1"), wid()).await.unwrap(), Written::Applied);
    assert!(fresh.held().is_some());
    assert_eq!(kind(handler.open(&id, &exclusive(LEASE)).await), ErrorKind::LockTimeout);
    assert_eq!(fresh.save(&Change::Write(record("2")), wid()).await.unwrap(), Written::Applied);
    assert_eq!(open(&handler, &id, exclusive(LEASE)).await.read().await.unwrap().unwrap().data, b"2");
}

#[tokio::test]
async fn a_fresh_id_that_is_taken_destroyed_or_locked_is_a_conflict() {
    let handler = MemoryHandler::new();
    let taken = create(&handler, "old", LONG).await;
    let destroyed = create(&handler, "old", LONG).await;
    destroy(&handler, &destroyed).await;
    let locked = new_id();
    let _holder = open(&handler, &locked, exclusive(LEASE).expecting(Expect::Any)).await;
    for id in [&taken, &destroyed, &locked] {
        for request in [exclusive(LEASE), OpenRequest::optimistic()] {
            let mut fresh = open(&handler, id, request.expecting(Expect::Fresh)).await;
            assert_eq!(kind(fresh.write(&record("new"), wid()).await), ErrorKind::Conflict);
            let mut fresh = open(&handler, id, request.expecting(Expect::Fresh)).await;
            assert_eq!(kind(fresh.save(&Change::Write(record("new")), wid()).await), ErrorKind::Conflict);
        }
    }
    assert_eq!(text(&handler, &taken).await.as_deref(), Some("old"));
    assert_eq!((text(&handler, &destroyed).await, text(&handler, &locked).await), (None, None));
}

#[tokio::test]
async fn a_repeat_under_the_same_write_id_is_recognised_even_after_the_save_closed() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut opening = open(&handler, &id, exclusive(LEASE)).await;
    let first = wid();
    assert_eq!(opening.write(&record("1"), first).await.unwrap(), Written::Applied);
    assert_eq!(opening.write(&record("1"), first).await.unwrap(), Written::AlreadyApplied);
    let second = wid();
    let change = Change::Write(record("2"));
    assert_eq!(opening.save(&change, second).await.unwrap(), Written::Applied);
    assert_eq!(opening.save(&change, second).await.unwrap(), Written::AlreadyApplied);
    assert_eq!(kind(opening.save(&Change::Write(record("3")), wid()).await), ErrorKind::Unsupported);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("2"));
}

#[tokio::test]
async fn every_save_of_one_opening_is_fenced_after_a_takeover() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    for saves_before in 0..2 {
        let mut a = open(&handler, &id, exclusive(SHORT)).await;
        for _ in 0..saves_before {
            a.write(&record("a"), wid()).await.unwrap();
        }
        past(SHORT).await;
        let mut b = open(&handler, &id, exclusive(LEASE)).await;
        assert!(!b.held().unwrap().lease.follows_clean_release());
        assert_eq!(kind(a.write(&record("late"), wid()).await), ErrorKind::Fenced);
        assert_eq!(b.save(&Change::Write(record("b")), wid()).await.unwrap(), Written::Applied);
        assert_eq!(text(&handler, &id).await.as_deref(), Some("b"));
    }
}

#[tokio::test]
async fn a_late_write_is_fenced_after_the_next_holder_has_come_and_gone() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut a = open(&handler, &id, exclusive(SHORT)).await;
    past(SHORT).await;
    open(&handler, &id, exclusive(LEASE)).await.save(&Change::Write(record("b")), wid()).await.unwrap();
    assert_eq!(kind(a.save(&Change::Write(record("late")), wid()).await), ErrorKind::Fenced);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("b"));
}

#[tokio::test]
async fn a_refused_opening_closes_without_touching_the_next_holders_lock() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut a = open(&handler, &id, exclusive(SHORT)).await;
    past(SHORT).await;
    let _b = open(&handler, &id, exclusive(LEASE)).await;
    a.close().await.unwrap();
    a.close().await.unwrap();
    drop(a);
    assert_eq!(kind(handler.open(&id, &exclusive(LEASE)).await), ErrorKind::LockTimeout);
}

#[tokio::test]
async fn an_ended_lease_that_nobody_took_over_still_writes_unless_expiry_is_strict() {
    for (strict, expected) in [(false, Ok(Written::Applied)), (true, Err(ErrorKind::Fenced))] {
        let handler = MemoryHandler::builder().strict_expiry(strict).build();
        let id = create(&handler, "0", LONG).await;
        let absent = new_id();
        let mut a = open(&handler, &id, exclusive(SHORT)).await;
        let mut b = open(&handler, &absent, exclusive(SHORT).expecting(Expect::Any)).await;
        past(SHORT).await;
        assert_eq!(a.save(&Change::Write(record("1")), wid()).await.map_err(|e| e.kind()), expected);
        assert_eq!(b.save(&Change::Write(record("1")), wid()).await.map_err(|e| e.kind()), expected);
    }
}

#[tokio::test]
async fn absent_created_destroyed_is_not_absent() {
    let handler = MemoryHandler::new();
    let id = new_id();
    let mut a = open(&handler, &id, exclusive(SHORT).expecting(Expect::Any)).await;
    past(SHORT).await;
    let mut fresh = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Fresh)).await;
    fresh.save(&Change::Write(record("b")), wid()).await.unwrap();
    assert_eq!(destroy(&handler, &id).await.unwrap().data, b"b");
    assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Gone);
    assert_eq!(text(&handler, &id).await, None);
}

#[tokio::test]
async fn absent_created_expired_is_not_absent() {
    let handler = MemoryHandler::new();
    let id = new_id();
    let mut a = open(&handler, &id, exclusive(SHORT).expecting(Expect::Any)).await;
    past(SHORT).await;
    let mut fresh = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Fresh)).await;
    fresh.save(&Change::Write(Record::new(*b"b", Ttl::new(SHORT))), wid()).await.unwrap();
    past(SHORT).await;
    assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Gone);
}

#[tokio::test]
async fn who_locks_an_absent_id_and_is_overtaken_creates_nothing() {
    let handler = MemoryHandler::new();
    let id = new_id();
    let mut a = open(&handler, &id, exclusive(SHORT).expecting(Expect::Any)).await;
    past(SHORT).await;
    let mut b = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
    b.close().await.unwrap();
    assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Fenced);
    assert_eq!(entries(&handler), (0, 0));
}

#[tokio::test]
async fn only_who_read_the_tombstone_under_its_own_lock_creates_over_it() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    destroy(&handler, &id).await;
    let mut optimist = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Any)).await;
    assert_eq!(kind(optimist.write(&record("o"), wid()).await), ErrorKind::Conflict);
    let mut admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
    assert_eq!(admin.read().await.unwrap(), None);
    assert_eq!(admin.write(&record("1"), wid()).await.unwrap(), Written::Applied);
    // A logout between its read and its next write is another tombstone than the one that it read.
    destroy(&handler, &id).await;
    assert_eq!(kind(admin.write(&record("2"), wid()).await), ErrorKind::Gone);
    let mut admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
    destroy(&handler, &id).await;
    assert_eq!(admin.read().await.unwrap(), None, "hands over what the opening found");
    assert_eq!(admin.read().await.unwrap(), None, "asks the store");
    assert_eq!(admin.save(&Change::Write(record("3")), wid()).await.unwrap(), Written::Applied);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("3"));
}

#[tokio::test]
async fn a_logout_of_an_id_that_is_locked_and_absent_refuses_its_creation() {
    let handler = MemoryHandler::new();
    let id = new_id();
    let mut admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
    assert_eq!(destroy(&handler, &id).await, None);
    assert_eq!(kind(admin.write(&record("1"), wid()).await), ErrorKind::Gone);
    let other = new_id();
    assert_eq!(destroy(&handler, &other).await, None);
    assert_eq!(entries(&handler).0, 1, "an id that nobody holds leaves no tombstone");
}

#[tokio::test]
async fn a_destroy_elsewhere_returns_the_record_and_the_holders_save_is_gone() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    a.write(&record("1"), wid()).await.unwrap();
    assert_eq!(destroy(&handler, &id).await.unwrap().data, b"1");
    assert_eq!(destroy(&handler, &id).await, None);
    assert_eq!(kind(a.save(&Change::Write(record("2")), wid()).await), ErrorKind::Gone);
    assert_eq!(text(&handler, &id).await, None);
}

#[tokio::test]
async fn waiters_for_a_destroyed_session_are_told_at_once_that_it_is_absent() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let _holder = open(&handler, &id, exclusive(LEASE)).await;
    let request = OpenRequest::exclusive(LEASE, LEASE);
    let mut waiting = pin!(handler.open(&id, &request));
    assert!(poll(waiting.as_mut()).is_pending());
    destroy(&handler, &id).await;
    let mut opening = waiting.await.unwrap();
    assert_eq!(opening.read().await.unwrap(), None);
    assert!(opening.held().is_none());
}

#[tokio::test]
async fn an_optimistic_write_yields_to_a_holder_and_never_makes_it_refused() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
    let mut t = open(&handler, &id, OpenRequest::optimistic()).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    assert_eq!(kind(o.write(&record("o"), wid()).await), ErrorKind::Conflict);
    assert_eq!(kind(t.touch(LONG).await), ErrorKind::Conflict);
    assert_eq!(a.save(&Change::Write(record("a")), wid()).await.unwrap(), Written::Applied);
    let mut stale = open(&handler, &id, OpenRequest::optimistic()).await;
    let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
    assert_eq!(o.write(&record("o"), wid()).await.unwrap(), Written::Applied);
    assert_eq!(kind(stale.write(&record("s"), wid()).await), ErrorKind::Conflict);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("o"));
}

#[tokio::test]
async fn an_optimistic_version_does_not_survive_destroy_and_re_creation() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
    destroy(&handler, &id).await;
    let mut admin = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
    admin.save(&Change::Write(record("0")), wid()).await.unwrap();
    assert_eq!(kind(o.write(&record("o"), wid()).await), ErrorKind::Conflict);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("0"));
}

#[tokio::test]
async fn past_its_deadline_a_record_is_absent_to_every_callback() {
    let handler = MemoryHandler::new();
    let ttl = Ttl::new(SHORT);
    for request in [exclusive(Duration::from_millis(1)), OpenRequest::optimistic()] {
        for change in [Change::Write(record("1")), Change::Touch(LONG)] {
            let id = create(&handler, "0", ttl).await;
            let mut opening = open(&handler, &id, request).await;
            past(SHORT).await;
            assert_eq!(kind(opening.save(&change, wid()).await), ErrorKind::Gone);
            assert_eq!(text(&handler, &id).await, None);
            assert_eq!(destroy(&handler, &id).await, None);
        }
    }
    let id = create(&handler, "0", ttl).await;
    past(SHORT).await;
    assert!(open(&handler, &id, exclusive(LEASE)).await.held().is_none());
    let mut fresh = open(&handler, &id, exclusive(LEASE).expecting(Expect::Fresh)).await;
    assert_eq!(fresh.write(&record("1"), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test]
async fn the_repeat_of_a_create_that_expired_does_not_create_it_anew() {
    let handler = MemoryHandler::new();
    let (id, write) = (new_id(), wid());
    let request = OpenRequest::optimistic().expecting(Expect::Fresh);
    let mut first = open(&handler, &id, request).await;
    let mut copy = open(&handler, &id, request).await;
    let short = Record::new(*b"0", Ttl::new(SHORT));
    assert_eq!(first.write(&short, write).await.unwrap(), Written::Applied);
    past(SHORT).await;
    assert_eq!(kind(copy.write(&short, write).await), ErrorKind::Gone);
}

#[tokio::test]
async fn a_hold_keeps_its_session_alive_when_it_opens_and_when_it_renews() {
    let handler = MemoryHandler::new();
    let ttl = Duration::from_millis(200);
    let id = create(&handler, "0", Ttl::new(ttl)).await;
    let lease = Duration::from_millis(200);
    let mut a = open(&handler, &id, exclusive(lease)).await;
    let held = a.held().unwrap().clone();
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(held.lock.renew(std::slice::from_ref(&held.lease)).await.iter().all(Result::is_ok));
    }
    assert_eq!(a.save(&Change::Write(record("1")), wid()).await.unwrap(), Written::Applied);
    let long = create(&handler, "0", LONG).await;
    drop(open(&handler, &long, exclusive(lease)).await);
    let left = open(&handler, &long, OpenRequest::read_only()).await.read().await.unwrap().unwrap().ttl;
    assert!(left.as_duration() > Duration::from_secs(3600), "an open shortens nothing");
}

#[tokio::test]
async fn renewal_tells_who_took_over_and_what_expired() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let a = open(&handler, &id, exclusive(SHORT)).await;
    let lost = a.held().unwrap().clone();
    past(SHORT).await;
    assert!(lost.lock.renew(std::slice::from_ref(&lost.lease)).await[0].is_ok(), "nobody took over");
    past(SHORT).await;
    let _b = open(&handler, &id, exclusive(LEASE)).await;
    let ttl = Duration::from_millis(200);
    let short = create(&handler, "0", Ttl::new(ttl)).await;
    let c = open(&handler, &short, exclusive(Duration::from_millis(1))).await;
    let gone = c.held().unwrap().clone();
    past(ttl).await;
    let outcomes = lost.lock.renew(&[lost.lease.clone(), gone.lease.clone()]).await;
    let kinds: Vec<_> = outcomes.into_iter().map(kind).collect();
    assert_eq!(kinds, [ErrorKind::Fenced, ErrorKind::Gone]);
    assert!(lost.lease.is_lost() && !gone.lease.is_lost());
}

#[tokio::test]
async fn a_touch_moves_the_deadline_and_leaves_the_last_write_alone() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
    let mut t = open(&handler, &id, exclusive(Duration::from_millis(1))).await;
    assert_eq!(t.touch(Ttl::from_secs(100)).await.unwrap(), Written::Applied);
    let left = t.read().await.unwrap();
    assert!(left.is_some(), "the first read hands over what the open fetched");
    let left = t.read().await.unwrap().unwrap().ttl;
    assert!(left <= Ttl::from_secs(100) && left > Ttl::from_secs(90));
    t.close().await.unwrap();
    assert_eq!(o.write(&record("o"), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test]
async fn read_only_and_destroy_change_nothing_else() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut view = open(&handler, &id, OpenRequest::read_only()).await;
    let mut logout = open(&handler, &id, OpenRequest::destroy()).await;
    assert_eq!(kind(view.write(&record("1"), wid()).await), ErrorKind::Unsupported);
    assert_eq!(kind(view.touch(LONG).await), ErrorKind::Unsupported);
    assert_eq!(kind(view.destroy().await), ErrorKind::Unsupported);
    assert_eq!(kind(logout.read().await), ErrorKind::Unsupported);
    assert_eq!(kind(logout.write(&record("1"), wid()).await), ErrorKind::Unsupported);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("0"));
}

#[tokio::test]
async fn a_payload_over_the_limit_is_refused_and_the_opening_stays_usable() {
    let handler = MemoryHandler::builder().max_bytes(3).build();
    let id = create(&handler, "0", LONG).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    assert_eq!(kind(a.save(&Change::Write(record("1234")), wid()).await), ErrorKind::TooLarge);
    assert_eq!(a.save(&Change::Write(record("123")), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test]
async fn waiters_get_in_in_the_order_of_their_arrival_and_are_woken_by_the_release() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "", LONG).await;
    let holder = open(&handler, &id, exclusive(LEASE)).await;
    let request = OpenRequest::exclusive(LEASE, LEASE);
    let mut tasks = Vec::new();
    for n in 0..20u8 {
        let (handler, id) = (handler.clone(), id.clone());
        tasks.push(tokio::spawn(async move {
            let mut opening = handler.open(&id, &request).await.unwrap();
            let mut data = opening.read().await.unwrap().unwrap().data;
            data.push(n);
            tokio::task::yield_now().await;
            opening.save(&Change::Write(Record::new(data, LONG)), wid()).await.unwrap()
        }));
        tokio::task::yield_now().await;
    }
    let admin = handler.admin().unwrap();
    let locks = admin.locks(NonZeroU32::MAX).await.unwrap();
    assert_eq!((locks.len(), locks[0].waiting), (1, Some(20)));
    drop(holder);
    for task in tasks {
        assert_eq!(task.await.unwrap(), Written::Applied);
    }
    let order = open(&handler, &id, OpenRequest::read_only()).await.read().await.unwrap().unwrap().data;
    assert_eq!(order, (0..20).collect::<Vec<u8>>());
}

#[tokio::test]
async fn the_first_waiter_gets_in_when_the_lease_ends_and_a_newcomer_does_not_pass() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let stalled = open(&handler, &id, exclusive(SHORT)).await;
    let request = OpenRequest::exclusive(LEASE, LEASE);
    let mut waiting = pin!(handler.open(&id, &request));
    assert!(poll(waiting.as_mut()).is_pending());
    past(SHORT).await;
    assert_eq!(kind(handler.open(&id, &exclusive(LEASE)).await), ErrorKind::LockTimeout);
    assert!(!waiting.await.unwrap().held().unwrap().lease.follows_clean_release());
    drop(stalled);
}

#[tokio::test]
async fn a_wait_ends_with_its_budget_and_names_the_holder() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let _holder = open(&handler, &id, exclusive(LEASE)).await;
    let error = handler.open(&id, &OpenRequest::exclusive(SHORT, LEASE)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout);
    assert_eq!(error.holder().unwrap().process, format!("pid {}", std::process::id()));
    assert!(!format!("{error} {error:?}").contains(id.as_str()));
}

#[tokio::test]
async fn a_waiter_that_gives_up_leaves_the_queue_and_passes_on_what_it_was_handed() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let request = OpenRequest::exclusive(LEASE, LEASE);
    let holder = open(&handler, &id, exclusive(LEASE)).await;
    let mut second = pin!(handler.open(&id, &request));
    {
        let mut first = Box::pin(handler.open(&id, &request));
        assert!(poll(first.as_mut()).is_pending());
        assert!(poll(second.as_mut()).is_pending());
        // Hands the lock to the first, which goes away without having looked.
        drop(holder);
    }
    assert!(second.await.unwrap().held().unwrap().lease.follows_clean_release());
}

#[tokio::test]
async fn a_lease_says_whether_it_follows_a_clean_release() {
    let lock = MemoryLock::new();
    let id = new_id();
    let request = LeaseRequest { wait: Duration::ZERO, lease: LEASE };
    let first = lock.acquire(&id, &request).await.unwrap();
    lock.release(&first).await.unwrap();
    let second = lock.acquire(&id, &request).await.unwrap();
    assert!(second.follows_clean_release());
    lock.abandon(second);
    let third = lock.acquire(&id, &LeaseRequest { wait: Duration::ZERO, lease: SHORT }).await.unwrap();
    assert!(!third.follows_clean_release());
    past(SHORT).await;
    let fourth = lock.acquire(&id, &request).await.unwrap();
    assert!(!fourth.follows_clean_release());
    lock.release(&third).await.unwrap();
    assert_eq!(kind(lock.acquire(&id, &request).await), ErrorKind::LockTimeout);
    lock.release(&fourth).await.unwrap();
    assert!(lock.acquire(&id, &request).await.unwrap().follows_clean_release());
}

#[tokio::test]
async fn a_dropped_opening_frees_its_session_at_once_and_writes_nothing() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    drop(open(&handler, &id, exclusive(LEASE)).await);
    assert!(open(&handler, &id, exclusive(LEASE)).await.held().is_some());
    assert_eq!(text(&handler, &id).await.as_deref(), Some("0"));
}

#[tokio::test]
async fn gc_counts_expired_records_and_leaves_held_and_live_ones() {
    let remember = Duration::from_millis(1);
    let handler = MemoryHandler::builder().remember(remember).build();
    let live = create(&handler, "0", LONG).await;
    let held = create(&handler, "0", Ttl::new(SHORT)).await;
    let lock = handler.lock();
    // Of the lock alone: an opening would prolong the record.
    let lease = lock.acquire(&held, &LeaseRequest { wait: Duration::ZERO, lease: LEASE }).await.unwrap();
    handler.sessions.store().decide(&held, |entry, now, _| match &mut entry.slot {
        Slot::Record { deadline, .. } => *deadline = now,
        Slot::Empty | Slot::Tombstone { .. } => unreachable!(),
    });
    let destroyed = create(&handler, "0", LONG).await;
    destroy(&handler, &destroyed).await;
    for _ in 0..10 {
        create(&handler, "0", Ttl::new(SHORT)).await;
    }
    past(SHORT).await;
    let three = NonZeroU32::new(3).unwrap();
    let mut counts = Vec::new();
    while entries(&handler).0 > 2 {
        counts.push(handler.gc(three).await.unwrap());
    }
    assert!(counts.iter().all(|count| *count <= 3));
    assert_eq!(counts.iter().sum::<u64>(), 10);
    assert_eq!(text(&handler, &live).await.as_deref(), Some("0"));
    lock.release(&lease).await.unwrap();
    assert_eq!(handler.gc(three).await.unwrap(), 1);
    assert_eq!(entries(&handler), (1, 1));
}

#[tokio::test]
async fn a_tombstone_holds_no_payload_and_is_in_no_listing() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    destroy(&handler, &id).await;
    assert_eq!(entries(&handler).0, 1);
    let page = handler.admin().unwrap().list(None, NonZeroU32::MAX).await.unwrap();
    assert!(page.sessions.is_empty());
    assert_eq!(handler.gc(NonZeroU32::MAX).await.unwrap(), 0);
    assert_eq!(entries(&handler).0, 1, "it stays for its time");
}

#[tokio::test]
async fn a_listing_in_parts_shows_each_live_session_once() {
    let handler = MemoryHandler::new();
    let mut ids = Vec::new();
    for _ in 0..50 {
        ids.push(create(&handler, "12345", LONG).await);
    }
    let _locked = open(&handler, &new_id(), exclusive(LEASE).expecting(Expect::Any)).await;
    let admin = handler.admin().unwrap();
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let page = admin.list(after.as_ref(), NonZeroU32::new(7).unwrap()).await.unwrap();
        assert!(page.sessions.iter().all(|info| info.bytes == 5));
        seen.extend(page.sessions.into_iter().map(|info| info.id));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    seen.sort();
    ids.sort();
    assert_eq!(seen, ids);
    assert_eq!(kind(admin.list(Some(&Cursor("?".into())), NonZeroU32::MAX).await), ErrorKind::Config);
}

#[tokio::test]
async fn an_unlock_lets_the_next_in_and_fences_the_holder() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "0", LONG).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    let admin = handler.admin().unwrap();
    assert!(admin.unlock(&id).await.unwrap());
    assert!(!admin.unlock(&id).await.unwrap());
    let mut b = open(&handler, &id, exclusive(LEASE)).await;
    assert!(!b.held().unwrap().lease.follows_clean_release());
    assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Fenced);
    assert_eq!(b.write(&record("b"), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_storm_of_increments_loses_none_and_leaves_nothing_behind() {
    let remember = Duration::from_millis(1);
    let handler = MemoryHandler::builder().remember(remember).build();
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(create(&handler, "\0", LONG).await);
    }
    let mut tasks = Vec::new();
    for n in 0..150u32 {
        let (handler, id, other) = (handler.clone(), ids[n as usize % 3].clone(), new_id());
        tasks.push(tokio::spawn(async move {
            // Every seventh stalls past its lease; what it then writes counts only if it was applied.
            let stalls = n % 7 == 0;
            let lease = if stalls { Duration::from_millis(3) } else { LEASE };
            let mut opening = handler.open(&id, &OpenRequest::exclusive(LEASE, lease)).await.unwrap();
            let data = vec![opening.read().await.unwrap().unwrap().data[0] + 1];
            tokio::time::sleep(Duration::from_millis(if stalls { 8 } else { 0 })).await;
            let outcome = opening.save(&Change::Write(Record::new(data, LONG)), wid()).await;
            let lock = handler.lock();
            let lease = lock.acquire(&other, &LeaseRequest { wait: LEASE, lease: LEASE }).await.unwrap();
            lock.release(&lease).await.unwrap();
            (n as usize % 3, outcome.map_err(|e| e.kind()))
        }));
    }
    let mut applied = [0u8; 3];
    for task in tasks {
        match task.await.unwrap() {
            (n, Ok(Written::Applied)) => applied[n] += 1,
            (_, outcome) => assert_eq!(outcome, Err(ErrorKind::Fenced)),
        }
    }
    for (id, applied) in ids.iter().zip(applied) {
        assert_eq!(text(&handler, id).await.unwrap().as_bytes(), [applied]);
        destroy(&handler, id).await;
    }
    past(SHORT).await;
    handler.gc(NonZeroU32::MAX).await.unwrap();
    assert_eq!(entries(&handler), (0, 0));
}

#[tokio::test]
async fn debug_shows_neither_ids_nor_payloads() {
    let handler = MemoryHandler::new();
    let id = create(&handler, "payload", LONG).await;
    let opening = open(&handler, &id, exclusive(LEASE)).await;
    let text = format!("{handler:?} {:?} {opening:?} {:?}", handler.lock(), opening.held());
    assert!(!text.contains(id.as_str()) && !text.contains("payload"), "{text}");
}

#[test]
fn nothing_but_waiting_needs_a_runtime() {
    fn now<F: Future>(future: F) -> F::Output {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => output,
            Poll::Pending => panic!("it waits"),
        }
    }
    let handler = MemoryHandler::new();
    let id = now(create(&handler, "0", LONG));
    let mut opening = now(open(&handler, &id, OpenRequest::exclusive(LEASE, LEASE)));
    assert_eq!(now(opening.read()).unwrap().unwrap().data, b"0");
    drop(opening);
    assert_eq!(now(handler.gc(NonZeroU32::MAX)).unwrap(), 0);
}

fn poll<F: Future + ?Sized>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}
