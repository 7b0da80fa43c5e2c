//! What `Sessions` adds to a handler, on the memory handler: values, queues, saves that outlive their request, new ids.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use session_core::{
    Access, Error, ErrorKind, Expect, ManualClock, MemoryHandler, OpenRequest, OpenSession, Record, Result, Session,
    SessionHandler, SessionId, Sessions, SessionsBuilder, Ttl, WriteId, Written, async_trait,
};

fn builder() -> SessionsBuilder {
    Sessions::builder(Arc::new(MemoryHandler::new())).wait(Duration::from_secs(5))
}

fn sessions() -> Sessions {
    builder().build().unwrap()
}

async fn stored(sessions: &Sessions, pairs: &[(&str, u32)]) -> SessionId {
    let mut session = sessions.create().unwrap();
    for (key, value) in pairs {
        session.insert(key, value).unwrap();
    }
    session.close().await.unwrap().unwrap()
}

async fn number(sessions: &Sessions, id: &SessionId, key: &str) -> Option<u32> {
    sessions.view(id).await.unwrap().get(key).unwrap()
}

async fn is_empty(sessions: &Sessions) -> bool {
    sessions.handler().admin().unwrap().list(None, NonZeroU32::MAX).await.unwrap().sessions.is_empty()
}

#[tokio::test]
async fn values_of_any_type_come_back() {
    let sessions = sessions();
    let mut session = sessions.create().unwrap();
    session.insert("name", "Ada").unwrap();
    session.insert("cart", &vec![(1u64, "tea".to_string())]).unwrap();
    session.flash("notice", "saved").unwrap();
    assert!(session.insert("", &1).is_err() && session.insert("\0x", &1).is_err());
    let id = session.close().await.unwrap().unwrap();
    let mut session = sessions.open(&id).await.unwrap();
    assert_eq!(session.keys().collect::<Vec<_>>(), ["cart", "name"]);
    assert_eq!(session.take_flash::<String>("notice").unwrap().as_deref(), Some("saved"));
    assert_eq!(session.take_flash::<String>("notice").unwrap(), None);
    assert_eq!(session.take::<String>("name").unwrap().as_deref(), Some("Ada"));
    assert_eq!(session.get::<u32>("cart").unwrap_err().kind(), ErrorKind::Corrupt);
    session.close().await.unwrap();
    let view = sessions.view(&id).await.unwrap();
    assert_eq!(view.get::<Vec<(u64, String)>>("cart").unwrap(), Some(vec![(1, "tea".into())]));
    assert!(!view.contains("name"));
}

// The handler of an application carries the room for each call that it makes, and is itself moved from hand to hand.
#[tokio::test]
async fn calls_carry_no_room_for_what_only_a_rare_one_needs() {
    let sessions = sessions();
    let id = stored(&sessions, &[("n", 1)]).await;
    let session = sessions.open(&id).await.unwrap();
    let sizes = [
        size_of_val(&session),
        size_of_val(&sessions.open(&id)),
        size_of_val(&sessions.view(&id)),
        size_of_val(&session.close()),
    ];
    assert!(sizes.iter().all(|size| *size < 1024), "{sizes:?}");
}

#[tokio::test]
async fn a_new_session_without_values_is_never_stored() {
    let sessions = sessions();
    assert_eq!(sessions.create().unwrap().close().await.unwrap(), None);
    let unknown = SessionId::generate().unwrap();
    let session = sessions.open(&unknown).await.unwrap();
    assert!(session.is_new() && session.id() != &unknown, "an unknown id is never adopted");
    assert_eq!(session.close().await.unwrap(), None);
    assert!(is_empty(&sessions).await);
    assert_eq!(sessions.in_use(), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_overlapping_updates_count_a_hundred() {
    let sessions = builder().queue(200).build().unwrap();
    let id = stored(&sessions, &[("n", 0)]).await;
    let update = |sessions: Sessions, id: SessionId| async move {
        let change = async |session: &mut Session| {
            let n: u32 = session.get("n")?.unwrap_or(0);
            tokio::task::yield_now().await;
            session.insert("n", &(n + 1))
        };
        sessions.update(&id, change).await.unwrap();
    };
    let tasks: Vec<_> = (0..100).map(|_| tokio::spawn(update(sessions.clone(), id.clone()))).collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(number(&sessions, &id, "n").await, Some(100));
    sessions.shutdown().await;
    assert_eq!(sessions.in_use(), (0, 0));
}

#[tokio::test]
async fn an_update_that_fails_writes_nothing() {
    let sessions = sessions();
    let id = stored(&sessions, &[("n", 1)]).await;
    let outcome: Result<_, Box<dyn std::error::Error + Send + Sync>> = sessions
        .try_update(&id, async |session| {
            session.insert("n", &2)?;
            Err::<(), _>("no".into())
        })
        .await;
    assert_eq!(outcome.unwrap_err().to_string(), "no");
    assert_eq!(number(&sessions, &id, "n").await, Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_merges_of_one_session_at_once_are_all_kept() {
    let sessions = sessions();
    let id = stored(&sessions, &[("total", 0)]).await;
    let merge = |n: u32, sessions: Sessions, id: SessionId| async move {
        let mut session = sessions.merge(&id).await.unwrap();
        session.insert(&format!("k{n}"), &n).unwrap();
        session.update_key::<u32, _>("total", |total| total.unwrap_or(0) + 1).unwrap();
        tokio::task::yield_now().await;
        session.close().await.unwrap();
    };
    let tasks: Vec<_> = (0..64).map(|n| tokio::spawn(merge(n, sessions.clone(), id.clone()))).collect();
    for task in tasks {
        task.await.unwrap();
    }
    let view = sessions.view(&id).await.unwrap();
    assert_eq!(view.get::<u32>("total").unwrap(), Some(64));
    assert_eq!(view.keys().count(), 65);
}

#[tokio::test]
async fn a_merge_of_the_same_key_is_a_conflict_that_names_it_and_stores_nothing() {
    let sessions = sessions();
    let id = stored(&sessions, &[("a", 1), ("b", 1)]).await;
    let mut mine = sessions.merge(&id).await.unwrap();
    mine.insert("a", &2).unwrap();
    mine.insert("c", &2).unwrap();
    sessions.update(&id, async |s| s.insert("a", &3)).await.unwrap();
    let error = mine.close().await.unwrap_err();
    assert_eq!((error.kind(), error.keys()), (ErrorKind::Conflict, &["a".to_string()][..]));
    assert_eq!((number(&sessions, &id, "a").await, number(&sessions, &id, "c").await), (Some(3), None));
}

#[tokio::test]
async fn a_merge_goes_on_after_a_save() {
    let sessions = sessions();
    let id = stored(&sessions, &[("a", 1)]).await;
    let mut mine = sessions.merge(&id).await.unwrap();
    mine.insert("b", &1).unwrap();
    sessions.update(&id, async |s| s.insert("c", &1)).await.unwrap();
    mine.save().await.unwrap();
    mine.insert("d", &1).unwrap();
    sessions.update(&id, async |s| s.insert("e", &1)).await.unwrap();
    mine.close().await.unwrap();
    assert_eq!(sessions.view(&id).await.unwrap().keys().collect::<String>(), "abcde");
}

#[tokio::test]
async fn a_destroyed_session_is_gone_for_holder_and_merge() {
    let sessions = sessions();
    let id = stored(&sessions, &[("a", 1)]).await;
    let mut merge = sessions.merge(&id).await.unwrap();
    let mut holder = sessions.open(&id).await.unwrap();
    sessions.destroy(&id).await.unwrap();
    holder.insert("a", &2).unwrap();
    assert_eq!(holder.close().await.unwrap_err().kind(), ErrorKind::Gone);
    merge.insert("a", &2).unwrap();
    assert_eq!(merge.close().await.unwrap_err().kind(), ErrorKind::Gone);
    assert!(!sessions.view(&id).await.unwrap().exists());
    let session = sessions.open(&id).await.unwrap();
    assert!(session.is_new() && session.id() != &id);
}

#[tokio::test]
async fn a_dropped_save_goes_on_and_the_next_call_waits_for_it() {
    let sessions = Sessions::new(Arc::new(Slow(MemoryHandler::new()))).unwrap();
    let id = stored(&sessions, &[("n", 1)]).await;
    let mut session = sessions.open(&id).await.unwrap();
    session.insert("n", &2).unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(5), session.save()).await.is_err(), "it takes longer");
    session.insert("m", &3).unwrap();
    assert_eq!(session.get::<u32>("n").unwrap(), Some(2));
    session.close().await.unwrap();
    assert_eq!((number(&sessions, &id, "n").await, number(&sessions, &id, "m").await), (Some(2), Some(3)));
    let mut session = sessions.open(&id).await.unwrap();
    session.insert("n", &9).unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(5), session.close()).await.is_err(), "it takes longer");
    let session = sessions.open(&id).await.unwrap();
    assert_eq!(session.get::<u32>("n").unwrap(), Some(9), "the next opener waits for the save");
}

#[tokio::test]
async fn a_close_that_is_kept_and_not_looked_at_goes_on_and_keeps_nobody_out() {
    let sessions = Sessions::new(Arc::new(Slow(MemoryHandler::new()))).unwrap();
    let id = stored(&sessions, &[("n", 1)]).await;
    let mut session = sessions.open(&id).await.unwrap();
    session.insert("n", &2).unwrap();
    let mut close = Box::pin(session.close());
    assert!(tokio::time::timeout(Duration::from_millis(5), &mut close).await.is_err(), "it takes longer");
    let next = sessions.open(&id).await.expect("somebody has looked after the one before");
    assert_eq!(next.get::<u32>("n").unwrap(), Some(2));
    next.close().await.unwrap();
    close.await.unwrap();
}

#[tokio::test]
async fn an_unchanged_session_is_touched_only_when_a_share_of_its_life_is_used_up() {
    let ttl = Duration::from_millis(1600);
    let sessions = builder().ttl(ttl).lease(Duration::from_millis(100)).touch_after(0.3).build().unwrap();
    let id = stored(&sessions, &[("n", 1)]).await;
    let left = async || {
        let mut open = sessions.handler().open(&id, &OpenRequest::read_only()).await.unwrap();
        open.read().await.unwrap().unwrap().ttl.as_millis()
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    sessions.open(&id).await.unwrap().close().await.unwrap();
    let before = left().await;
    assert!(before <= 1400, "{before} ms left: touched too early");
    tokio::time::sleep(Duration::from_millis(500)).await;
    sessions.open(&id).await.unwrap().close().await.unwrap();
    let after = left().await;
    assert!(after > 1200, "{after} ms left: not touched");
}

#[tokio::test]
async fn the_absolute_time_out_ends_a_session_that_is_used_all_the_time() {
    let clock = Arc::new(ManualClock::new());
    let sessions = builder().absolute_ttl(Some(Duration::from_secs(3600))).clock(clock.clone()).build().unwrap();
    let id = stored(&sessions, &[("n", 1)]).await;
    for _ in 0..6 {
        clock.advance(Duration::from_secs(599));
        sessions.update(&id, async |s| s.update_key::<u32, _>("n", |n| n.unwrap_or(0) + 1)).await.unwrap();
    }
    clock.set_back(Duration::from_secs(7200));
    assert_eq!(number(&sessions, &id, "n").await, Some(7), "a stamp in the future counts as now");
    clock.advance(Duration::from_secs(7200 + 7));
    assert!(!sessions.view(&id).await.unwrap().exists());
    assert!(sessions.open(&id).await.unwrap().is_new());
    assert!(is_empty(&sessions).await);
}

#[tokio::test]
async fn a_lease_is_renewed_while_a_session_is_open_and_not_beyond_max_hold() {
    let lease = Duration::from_millis(200);
    let sessions = builder().lease(lease).max_hold(lease * 5).build().unwrap();
    let id = stored(&sessions, &[("n", 1)]).await;
    let mut held = sessions.open(&id).await.unwrap();
    let other = Sessions::builder(sessions.handler().clone()).wait(lease * 2).build().unwrap();
    assert_eq!(other.open(&id).await.unwrap_err().kind(), ErrorKind::LockTimeout);
    let patient = other.with_wait(lease * 25);
    patient.update(&id, async |s| s.insert("n", &2)).await.expect("after max_hold the lease runs out");
    held.insert("n", &3).unwrap();
    assert_eq!(held.close().await.unwrap_err().kind(), ErrorKind::Fenced);
    assert_eq!(number(&sessions, &id, "n").await, Some(2));
}

#[tokio::test]
async fn a_rotate_keeps_what_parallel_requests_do_and_the_old_id_leads_to_the_new() {
    let sessions = sessions();
    let old = stored(&sessions, &[("n", 1)]).await;
    let mut merge = sessions.merge(&old).await.unwrap();
    merge.insert("m", &1).unwrap();
    let mut session = sessions.open(&old).await.unwrap();
    session.insert("n", &2).unwrap();
    session.rotate();
    let waiter = tokio::spawn({
        let (sessions, old) = (sessions.clone(), old.clone());
        async move { sessions.update(&old, async |s| s.insert("w", &1)).await.unwrap().id }
    });
    tokio::task::yield_now().await;
    let new = session.close().await.unwrap().unwrap();
    assert_ne!(new, old);
    assert_eq!(waiter.await.unwrap().as_ref(), Some(&new));
    assert_eq!(merge.close().await.unwrap().as_ref(), Some(&new));
    for id in [&old, &new] {
        let view = sessions.view(id).await.unwrap();
        assert_eq!(view.id(), Some(&new));
        assert_eq!((view.keys().collect::<String>().as_str(), view.get::<u32>("n").unwrap()), ("mnw", Some(2)));
    }
    sessions.destroy(&old).await.unwrap();
    assert!(!sessions.view(&new).await.unwrap().exists(), "a logout under the old id ends the session");
}

#[tokio::test]
async fn a_forward_outlives_the_first_sight_of_the_new_id_only_by_the_grace_time() {
    let grace = Duration::from_millis(300);
    let sessions = builder().grace(grace).lease(Duration::from_millis(50)).build().unwrap();
    let old = stored(&sessions, &[("n", 1)]).await;
    let mut session = sessions.open(&old).await.unwrap();
    session.rotate();
    let new = session.close().await.unwrap().unwrap();
    tokio::time::sleep(grace * 2).await;
    assert!(sessions.view(&old).await.unwrap().exists(), "a lost response must not log the visitor out");
    sessions.open(&new).await.unwrap().close().await.unwrap();
    sessions.shutdown().await;
    assert!(sessions.view(&old).await.unwrap().exists(), "within the grace time");
    tokio::time::sleep(grace + Duration::from_millis(50)).await;
    assert!(!sessions.view(&old).await.unwrap().exists(), "after the grace time");
    assert_eq!(number(&sessions, &new, "n").await, Some(1));
}

#[tokio::test]
async fn after_an_elevate_the_old_id_never_sees_the_new_data() {
    let sessions = sessions();
    let old = stored(&sessions, &[("n", 1)]).await;
    let mut stale = sessions.merge(&old).await.unwrap();
    let mut session = sessions.open(&old).await.unwrap();
    session.insert("user", &7).unwrap();
    session.elevate();
    session.save().await.unwrap();
    let new = session.id().clone();
    session.insert("after", &1).unwrap();
    session.close().await.unwrap();
    assert_ne!(new, old);
    assert_eq!(number(&sessions, &new, "after").await, Some(1));
    let mut anonymous = sessions.open(&old).await.unwrap();
    assert!(anonymous.is_retired() && !anonymous.contains("user"));
    anonymous.insert("x", &1).unwrap();
    assert_eq!(anonymous.close().await.unwrap(), None, "nothing is stored, no cookie is set");
    stale.insert("x", &1).unwrap();
    assert_eq!(stale.close().await.unwrap_err().kind(), ErrorKind::Gone);
    assert!(!sessions.view(&old).await.unwrap().contains("x"));
}

#[tokio::test]
async fn a_failed_rotate_leaves_nothing_behind() {
    let sessions = sessions();
    let old = stored(&sessions, &[("n", 1)]).await;
    let mut session = sessions.open(&old).await.unwrap();
    session.rotate();
    sessions.destroy(&old).await.unwrap();
    assert_eq!(session.close().await.unwrap_err().kind(), ErrorKind::Gone);
    assert!(is_empty(&sessions).await, "the new record is destroyed too");
}

#[tokio::test]
async fn a_session_too_large_is_refused_and_may_be_saved_smaller() {
    let sessions = builder().max_bytes(1000).build().unwrap();
    let id = stored(&sessions, &[("n", 1)]).await;
    let mut session = sessions.open(&id).await.unwrap();
    session.insert("big", &"x".repeat(2000)).unwrap();
    assert_eq!(session.save().await.unwrap_err().kind(), ErrorKind::TooLarge);
    session.remove("big");
    session.insert("n", &2).unwrap();
    session.close().await.unwrap();
    assert_eq!(number(&sessions, &id, "n").await, Some(2));
}

#[tokio::test]
async fn foreign_bytes_are_corrupt_and_left_alone() {
    let sessions = sessions();
    let handler = sessions.handler();
    let id = SessionId::generate().unwrap();
    let request = OpenRequest::exclusive(Duration::ZERO, Duration::from_secs(1)).expecting(Expect::Any);
    let mut open = handler.open(&id, &request).await.unwrap();
    open.write(&Record::new("not ours", Ttl::from_secs(60)), WriteId::random().unwrap()).await.unwrap();
    open.close().await.unwrap();
    assert_eq!(sessions.open(&id).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(sessions.view(&id).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(sessions.in_use(), (0, 0), "the lock was given back");
    let mut open = handler.open(&id, &OpenRequest::read_only()).await.unwrap();
    assert_eq!(open.read().await.unwrap().unwrap().data, b"not ours");
}

#[tokio::test]
async fn without_locking_a_race_is_a_conflict_not_a_loss() {
    let sessions = builder().locking(false).build().unwrap();
    let id = stored(&sessions, &[("n", 1)]).await;
    let (mut a, mut b) = (sessions.open(&id).await.unwrap(), sessions.open(&id).await.unwrap());
    a.insert("n", &2).unwrap();
    b.insert("n", &3).unwrap();
    a.close().await.unwrap();
    assert_eq!(b.close().await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(number(&sessions, &id, "n").await, Some(2));
}

#[test]
fn sessions_survive_the_end_of_the_runtime_that_they_began_on() {
    let sessions = sessions();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (id, left_open) = runtime().block_on(async {
        let id = stored(&sessions, &[("n", 1)]).await;
        let session = sessions.open(&id).await.unwrap();
        (id, session)
    });
    drop(left_open);
    runtime().block_on(async {
        let session = sessions.open(&id).await.unwrap();
        std::thread::spawn(move || drop(session)).join().expect("a drop needs no runtime");
        sessions.shutdown().await;
        sessions.open(&id).await.unwrap().close().await.unwrap();
    });
}

#[tokio::test]
async fn without_optimistic_writes_a_race_is_found_by_comparing() {
    let exclusive = Arc::new(ExclusiveOnly(MemoryHandler::new()));
    for locking in [true, false] {
        let sessions = Sessions::builder(exclusive.clone()).locking(locking).build().unwrap();
        let id = stored(&sessions, &[("n", 1)]).await;
        let open = async || if locking { sessions.merge(&id).await.unwrap() } else { sessions.open(&id).await.unwrap() };
        let (mut a, mut b) = (open().await, open().await);
        a.insert("n", &2).unwrap();
        b.insert("n", &3).unwrap();
        a.save().await.unwrap();
        assert_eq!(b.close().await.unwrap_err().kind(), ErrorKind::Conflict);
        a.insert("n", &4).unwrap();
        a.close().await.unwrap();
        assert_eq!(number(&sessions, &id, "n").await, Some(4));
        assert_eq!(sessions.in_use(), (0, 0));
    }
}

#[tokio::test]
async fn a_task_that_never_waits_lets_the_others_of_its_thread_run() {
    let sessions = sessions();
    let id = stored(&sessions, &[("n", 1)]).await;
    let other = tokio::spawn(async {});
    while !other.is_finished() {
        sessions.open(&id).await.unwrap().close().await.unwrap();
    }
}

/// A store that has no optimistic writes.
#[derive(Debug)]
struct ExclusiveOnly(MemoryHandler);

#[async_trait]
impl SessionHandler for ExclusiveOnly {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        match request.access {
            Access::Optimistic => Err(Error::new(ErrorKind::Unsupported, "open", "this store has no optimistic writes")),
            _ => self.0.open(id, request).await,
        }
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.0.gc(limit).await
    }
}

/// A store that takes its time over every save.
#[derive(Debug)]
struct Slow(MemoryHandler);

#[derive(Debug)]
struct SlowOpen(Box<dyn OpenSession>);

#[async_trait]
impl SessionHandler for Slow {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        Ok(Box::new(SlowOpen(self.0.open(id, request).await?)))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.0.gc(limit).await
    }
}

#[async_trait]
impl OpenSession for SlowOpen {
    async fn read(&mut self) -> Result<Option<Record>> {
        self.0.read().await
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        tokio::time::sleep(Duration::from_millis(40)).await;
        self.0.write(record, id).await
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        self.0.destroy().await
    }

    async fn close(&mut self) -> Result<()> {
        self.0.close().await
    }
}

#[tokio::test]
async fn what_is_made_in_one_realm_is_unknown_in_another_and_known_without_one() {
    let all = Sessions::new(Arc::new(MemoryHandler::new())).unwrap();
    let (shop, staff) = (all.clone().with_realm("shop"), all.clone().with_realm("staff"));
    let mut session = shop.create().unwrap();
    session.insert("n", &1).unwrap();
    session.rotate();
    session.save().await.unwrap();
    session.rotate();
    let id = session.close().await.unwrap().unwrap();

    assert!(!staff.view(&id).await.unwrap().exists());
    for mut other in [staff.open(&id).await.unwrap(), staff.merge(&id).await.unwrap()] {
        assert!(other.is_new() && other.id() != &id);
        other.insert("n", &2).unwrap();
        assert!(!shop.view(&other.close().await.unwrap().unwrap()).await.unwrap().exists());
    }
    all.shutdown().await;
    for known in [&shop, &all] {
        assert_eq!(known.view(&id).await.unwrap().get("n").unwrap(), Some(1));
    }
    let mut plain = all.create().unwrap();
    plain.insert("n", &3).unwrap();
    let plain = plain.close().await.unwrap().unwrap();
    assert!(staff.open(&plain).await.unwrap().get::<u32>("n").unwrap().is_some());
}
