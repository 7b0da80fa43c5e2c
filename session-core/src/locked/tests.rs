//! A stalled holder, a write under way and a lost answer, each against the next holder.

use super::*;
use crate::memory::{MemoryHandler, MemoryLock};
use std::collections::VecDeque;
use std::sync::Mutex as StdMutex;
use tokio::sync::Notify;

const LEASE: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(30);

/// What happens to the next write on its way to the store.
enum Fate {
    Normal,
    /// It is applied, and its answer is lost: the opening that sent it has learnt nothing.
    ReplyLost,
    /// It arrives after this was notified.
    Late(Arc<Notify>),
}

/// A store that knows no locks and has nothing but the four callbacks and `save`.
#[derive(Clone, Debug, Default)]
struct Unlocked {
    inner: MemoryHandler,
    fates: Arc<StdMutex<VecDeque<Fate>>>,
    calls: Arc<StdMutex<Vec<&'static str>>>,
}

impl fmt::Debug for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fate")
    }
}

impl Unlocked {
    fn next_write(&self, fate: Fate) {
        self.fates.lock().unwrap().push_back(fate);
    }

    fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn note(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }
}

#[async_trait]
impl SessionHandler for Unlocked {
    async fn open(&self, id: &SessionId, request: &OpenRequest) -> Result<Box<dyn OpenSession>> {
        if matches!(request.access, Access::Exclusive { .. }) {
            return Err(Error::new(ErrorKind::Unsupported, "open", "this store has no lock"));
        }
        self.note("open");
        let inner = self.inner.open(id, request).await?;
        Ok(Box::new(UnlockedOpening { inner, store: self.clone(), id: id.clone(), request: *request }))
    }

    async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.inner.gc(limit).await
    }
}

#[derive(Debug)]
struct UnlockedOpening {
    inner: Box<dyn OpenSession>,
    store: Unlocked,
    id: SessionId,
    request: OpenRequest,
}

impl UnlockedOpening {
    async fn sent(&mut self, change: &Change, id: WriteId, keep: bool) -> Result<Written> {
        let fate = self.store.fates.lock().unwrap().pop_front().unwrap_or(Fate::Normal);
        match fate {
            Fate::Normal => {}
            Fate::Late(gate) => gate.notified().await,
            Fate::ReplyLost => {
                let mut copy = self.store.inner.open(&self.id, &self.request).await?;
                assert_eq!(copy.save(change, id).await?, Written::Applied);
                return Err(Error::new(ErrorKind::Unknown, "write", "no answer"));
            }
        }
        match change {
            Change::Write(record) if keep => self.inner.write(record, id).await,
            change => self.inner.save(change, id).await,
        }
    }
}

// Without a touch of its own: the provided one reads, as that of a simple handler does.
#[async_trait]
impl OpenSession for UnlockedOpening {
    async fn read(&mut self) -> Result<Option<Record>> {
        self.store.note("read");
        self.inner.read().await
    }

    async fn write(&mut self, record: &Record, id: WriteId) -> Result<Written> {
        self.store.note("write");
        self.sent(&Change::Write(record.clone()), id, true).await
    }

    async fn destroy(&mut self) -> Result<Option<Record>> {
        self.store.note("destroy");
        self.inner.destroy().await
    }

    async fn close(&mut self) -> Result<()> {
        self.store.note("close");
        self.inner.close().await
    }

    async fn save(&mut self, change: &Change, id: WriteId) -> Result<Written> {
        self.store.note("save");
        self.sent(change, id, false).await
    }
}

type Handler = Arc<Locked<Unlocked, MemoryLock>>;

fn locked() -> (Handler, Unlocked, MemoryLock) {
    let (store, lock) = (Unlocked::default(), MemoryLock::new());
    (Arc::new(Locked::new(store.clone(), lock.clone())), store, lock)
}

fn record(text: &str) -> Record {
    Record::new(text.as_bytes(), Ttl::MAX)
}

fn save(text: &str) -> Change {
    Change::Write(record(text))
}

fn wid() -> WriteId {
    WriteId::random().unwrap()
}

fn exclusive(lease: Duration) -> OpenRequest {
    OpenRequest::exclusive(Duration::ZERO, lease)
}

async fn open(handler: &Handler, id: &SessionId, request: OpenRequest) -> Box<dyn OpenSession> {
    handler.open(id, &request).await.unwrap()
}

async fn create(handler: &Handler, text: &str, ttl: Ttl) -> SessionId {
    let id = SessionId::generate().unwrap();
    let mut fresh = open(handler, &id, exclusive(LEASE).expecting(Expect::Fresh)).await;
    let change = Change::Write(Record::new(text.as_bytes(), ttl));
    assert_eq!(fresh.save(&change, wid()).await.unwrap(), Written::Applied);
    id
}

async fn text(handler: &Handler, id: &SessionId) -> Option<String> {
    let record = open(handler, id, OpenRequest::read_only()).await.read().await.unwrap();
    record.map(|record| String::from_utf8(record.data).unwrap())
}

async fn is_free(lock: &MemoryLock, id: &SessionId) -> bool {
    let taken = lock.acquire(id, &LeaseRequest { wait: Duration::ZERO, lease: LEASE }).await;
    match taken {
        Ok(lease) => {
            lock.release(&lease).await.unwrap();
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::LockTimeout);
            false
        }
    }
}

fn kind<T: fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

async fn past(lease: Duration) {
    tokio::time::sleep(lease + Duration::from_millis(15)).await;
}

#[tokio::test]
async fn a_stalled_holder_overwrites_nothing_and_the_rightful_one_is_never_refused() {
    let (handler, _, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    for a_first in [true, false] {
        let mut a = open(&handler, &id, exclusive(SHORT)).await;
        past(SHORT).await;
        let mut b = open(&handler, &id, exclusive(LEASE)).await;
        assert!(b.read().await.unwrap().is_some());
        if a_first {
            assert_eq!(kind(a.save(&save("a"), wid()).await), ErrorKind::Fenced);
            assert_eq!(b.save(&save("b"), wid()).await.unwrap(), Written::Applied);
        } else {
            assert_eq!(b.save(&save("b"), wid()).await.unwrap(), Written::Applied);
            assert_eq!(kind(a.save(&save("a"), wid()).await), ErrorKind::Fenced);
        }
        assert_eq!(text(&handler, &id).await.as_deref(), Some("b"));
    }
}

#[tokio::test]
async fn a_write_under_way_at_the_takeover_arrives_too_late() {
    let (handler, store, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut a = open(&handler, &id, exclusive(SHORT)).await;
    let gate = Arc::new(Notify::new());
    store.next_write(Fate::Late(gate.clone()));
    let a = tokio::spawn(async move { a.save(&save("a"), wid()).await });
    past(SHORT).await;
    let mut b = open(&handler, &id, exclusive(LEASE)).await;
    gate.notify_one();
    assert_eq!(kind(a.await.unwrap()), ErrorKind::Fenced);
    assert_eq!(b.save(&save("b"), wid()).await.unwrap(), Written::Applied);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("b"));
}

#[tokio::test]
async fn a_write_that_arrives_before_the_rewrite_is_what_the_next_holder_reads() {
    let (handler, store, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut a = open(&handler, &id, exclusive(SHORT)).await;
    past(SHORT).await;
    let gate = Arc::new(Notify::new());
    store.next_write(Fate::Late(gate.clone()));
    let (other, same) = (handler.clone(), id.clone());
    let b = tokio::spawn(async move { other.open(&same, &exclusive(LEASE)).await });
    tokio::task::yield_now().await;
    assert_eq!(a.save(&save("a"), wid()).await.unwrap(), Written::Applied);
    gate.notify_one();
    let mut b = b.await.unwrap().unwrap();
    assert_eq!(b.read().await.unwrap().unwrap().data, b"a");
    assert_eq!(b.save(&save("b"), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test]
async fn a_rewrite_whose_answer_is_lost_is_settled_by_asking_again() {
    let (handler, store, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let _a = open(&handler, &id, exclusive(SHORT)).await;
    past(SHORT).await;
    store.next_write(Fate::ReplyLost);
    let mut b = open(&handler, &id, exclusive(LEASE)).await;
    assert_eq!(b.save(&save("b"), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test]
async fn after_a_clean_release_nothing_is_rewritten_and_the_save_is_fused() {
    let (handler, store, lock) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    open(&handler, &id, exclusive(LEASE)).await.save(&save("1"), wid()).await.unwrap();
    store.calls();
    let mut second = open(&handler, &id, exclusive(LEASE)).await;
    second.read().await.unwrap();
    assert!(!is_free(&lock, &id).await);
    second.save(&save("2"), wid()).await.unwrap();
    assert!(is_free(&lock, &id).await);
    assert_eq!(store.calls(), ["open", "read", "read", "save"]);
}

#[tokio::test]
async fn an_absent_id_that_should_exist_is_answered_without_a_lock() {
    let (handler, _, lock) = locked();
    let id = SessionId::generate().unwrap();
    let taken = lock.acquire(&id, &LeaseRequest { wait: LEASE, lease: LEASE }).await.unwrap();
    let mut opening = open(&handler, &id, exclusive(LEASE)).await;
    assert!(opening.held().is_none());
    assert_eq!(opening.read().await.unwrap(), None);
    let mut fresh = open(&handler, &id, OpenRequest::optimistic().expecting(Expect::Fresh)).await;
    fresh.save(&save("x"), wid()).await.unwrap();
    assert!(opening.read().await.unwrap().is_some());
    assert_eq!(kind(opening.write(&record("y"), wid()).await), ErrorKind::Gone);
    lock.release(&taken).await.unwrap();
}

#[tokio::test]
async fn a_waiter_for_a_session_that_was_destroyed_is_told_that_it_is_absent() {
    let (handler, _, lock) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    let (other, same) = (handler.clone(), id.clone());
    let b = tokio::spawn(async move { other.open(&same, &OpenRequest::exclusive(LEASE, LEASE)).await });
    tokio::task::yield_now().await;
    a.save(&Change::Destroy, wid()).await.unwrap();
    let mut b = b.await.unwrap().unwrap();
    assert_eq!(b.read().await.unwrap(), None);
    assert!(b.held().is_none());
    assert!(is_free(&lock, &id).await);
}

#[tokio::test]
async fn of_two_who_create_the_first_wins_and_the_other_is_told_conflict() {
    let (handler, _, _) = locked();
    let id = SessionId::generate().unwrap();
    let mut a = open(&handler, &id, exclusive(SHORT).expecting(Expect::Any)).await;
    past(SHORT).await;
    let mut b = open(&handler, &id, exclusive(LEASE).expecting(Expect::Any)).await;
    assert_eq!(b.write(&record("b"), wid()).await.unwrap(), Written::Applied);
    assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Conflict);
    assert_eq!(b.write(&record("c"), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test]
async fn a_fresh_id_is_locked_by_the_first_write_that_goes_on() {
    let (handler, store, lock) = locked();
    let id = SessionId::generate().unwrap();
    let mut fresh = open(&handler, &id, exclusive(LEASE).expecting(Expect::Fresh)).await;
    assert!(is_free(&lock, &id).await);
    store.next_write(Fate::ReplyLost);
    let write = wid();
    assert_eq!(kind(fresh.write(&record("1"), write).await), ErrorKind::Unknown);
    assert_eq!(fresh.write(&record("1"), write).await.unwrap(), Written::AlreadyApplied);
    assert!(fresh.held().is_some() && !is_free(&lock, &id).await);
    assert_eq!(fresh.save(&save("2"), wid()).await.unwrap(), Written::Applied);
    assert!(is_free(&lock, &id).await);
    let mut again = open(&handler, &id, exclusive(LEASE).expecting(Expect::Fresh)).await;
    assert_eq!(kind(again.write(&record("3"), wid()).await), ErrorKind::Conflict);
    assert!(is_free(&lock, &id).await);
}

#[tokio::test]
async fn an_optimistic_write_yields_to_a_holder_and_never_makes_it_refused() {
    let (handler, _, lock) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    assert_eq!(kind(o.write(&record("o"), wid()).await), ErrorKind::Conflict);
    assert_eq!(kind(o.save(&Change::Touch(Ttl::MAX), wid()).await), ErrorKind::Conflict);
    assert_eq!(a.save(&save("a"), wid()).await.unwrap(), Written::Applied);
    let mut o = open(&handler, &id, OpenRequest::optimistic()).await;
    let mut stale = open(&handler, &id, OpenRequest::optimistic()).await;
    assert_eq!(o.write(&record("o"), wid()).await.unwrap(), Written::Applied);
    assert_eq!(kind(stale.write(&record("s"), wid()).await), ErrorKind::Conflict);
    assert!(is_free(&lock, &id).await);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("o"));
}

#[tokio::test]
async fn an_optimist_who_was_refused_leaves_the_lock_as_unclean_as_it_was() {
    let (handler, _, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut a = open(&handler, &id, exclusive(SHORT)).await;
    let mut stale = open(&handler, &id, OpenRequest::optimistic()).await;
    a.write(&record("1"), wid()).await.unwrap();
    past(SHORT).await;
    assert_eq!(kind(stale.write(&record("s"), wid()).await), ErrorKind::Conflict);
    let mut b = open(&handler, &id, exclusive(LEASE)).await;
    assert!(!b.held().unwrap().lease.follows_clean_release());
    assert_eq!(kind(a.write(&record("a"), wid()).await), ErrorKind::Fenced);
    assert_eq!(b.write(&record("b"), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test]
async fn a_refusal_of_a_write_that_was_sent_before_is_unknown() {
    let (handler, store, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut a = open(&handler, &id, exclusive(SHORT)).await;
    store.next_write(Fate::ReplyLost);
    let write = wid();
    assert_eq!(kind(a.write(&record("a"), write).await), ErrorKind::Unknown);
    past(SHORT).await;
    let mut b = open(&handler, &id, exclusive(LEASE)).await;
    assert_eq!(b.read().await.unwrap().unwrap().data, b"a");
    assert_eq!(b.save(&save("b"), wid()).await.unwrap(), Written::Applied);
    assert_eq!(kind(a.write(&record("a"), write).await), ErrorKind::Unknown);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("b"));
}

#[tokio::test]
async fn a_close_after_a_dropped_write_is_no_clean_release() {
    let (handler, store, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    store.next_write(Fate::Late(Arc::new(Notify::new())));
    let dropped = tokio::time::timeout(SHORT, a.write(&record("a"), wid())).await;
    assert!(dropped.is_err());
    a.close().await.unwrap();
    let b = open(&handler, &id, exclusive(LEASE)).await;
    assert!(!b.held().unwrap().lease.follows_clean_release());
}

#[tokio::test]
async fn a_dropped_opening_frees_its_session_at_once() {
    let (handler, _, lock) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    drop(open(&handler, &id, exclusive(LEASE)).await);
    assert!(is_free(&lock, &id).await);
}

#[tokio::test]
async fn a_hold_that_is_renewed_keeps_its_session_alive() {
    let (handler, store, _) = locked();
    let ttl = Duration::from_millis(200);
    let id = create(&handler, "0", Ttl::new(ttl)).await;
    let lease = Duration::from_millis(200);
    let mut a = open(&handler, &id, exclusive(lease)).await;
    let held = a.held().unwrap().clone();
    store.next_write(Fate::ReplyLost);
    let mut unsettled = 0;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        match held.lock.renew(std::slice::from_ref(&held.lease)).await.pop().unwrap() {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unavailable);
                unsettled += 1;
            }
        }
    }
    assert_eq!(unsettled, 1);
    assert!(!held.lease.is_lost());
    assert_eq!(a.save(&save("1"), wid()).await.unwrap(), Written::Applied);
    assert_eq!(text(&handler, &id).await.as_deref(), Some("1"));
}

#[tokio::test]
async fn a_renewal_whose_answer_was_lost_does_not_make_the_holder_refused() {
    let (handler, store, _) = locked();
    let id = create(&handler, "0", Ttl::from_secs(1)).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    let held = a.held().unwrap().clone();
    a.write(&Record::new(*b"1", Ttl::from_secs(5)), wid()).await.unwrap();
    store.next_write(Fate::ReplyLost);
    assert_eq!(kind(held.lock.renew(std::slice::from_ref(&held.lease)).await.pop().unwrap()), ErrorKind::Unavailable);
    assert_eq!(a.save(&save("2"), wid()).await.unwrap(), Written::Applied);
}

#[tokio::test]
async fn a_touch_of_an_overtaken_holder_does_not_adopt_what_it_never_read() {
    let (handler, _, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut a = open(&handler, &id, exclusive(SHORT)).await;
    past(SHORT).await;
    open(&handler, &id, exclusive(LEASE)).await.save(&save("b"), wid()).await.unwrap();
    assert_eq!(kind(a.touch(Ttl::MAX).await), ErrorKind::Fenced);
    assert!(a.write(&record("a"), wid()).await.is_err());
    assert_eq!(text(&handler, &id).await.as_deref(), Some("b"));
}

#[tokio::test]
async fn a_lost_lease_is_marked_by_renewal() {
    let (handler, _, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let a = open(&handler, &id, exclusive(SHORT)).await;
    let held = a.held().unwrap().clone();
    past(SHORT).await;
    let _b = open(&handler, &id, exclusive(LEASE)).await;
    assert_eq!(kind(held.lock.renew(std::slice::from_ref(&held.lease)).await.pop().unwrap()), ErrorKind::Fenced);
    assert!(held.lease.is_lost());
    held.lock.release(&held.lease).await.unwrap();
    held.lock.abandon(held.lease.clone());
    assert_eq!(kind(handler.open(&id, &exclusive(LEASE)).await), ErrorKind::LockTimeout);
}

#[tokio::test]
async fn a_destroy_elsewhere_wins_over_the_holder() {
    let (handler, _, _) = locked();
    let id = create(&handler, "0", Ttl::MAX).await;
    let mut a = open(&handler, &id, exclusive(LEASE)).await;
    let removed = open(&handler, &id, OpenRequest::destroy()).await.destroy().await.unwrap();
    assert_eq!(removed.unwrap().data, b"0");
    assert_eq!(kind(a.save(&save("a"), wid()).await), ErrorKind::Gone);
    assert_eq!(text(&handler, &id).await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_storm_with_stalls_and_optimists_loses_no_increment() {
    let (handler, _, _) = locked();
    let id = create(&handler, "\0", Ttl::MAX).await;
    let mut tasks = Vec::new();
    for n in 0..120u32 {
        let (handler, id) = (handler.clone(), id.clone());
        tasks.push(tokio::spawn(async move {
            let stalls = n % 7 == 0;
            let lease = if stalls { Duration::from_millis(3) } else { LEASE };
            let request = if n % 5 == 0 { OpenRequest::optimistic() } else { OpenRequest::exclusive(LEASE, lease) };
            let mut opening = handler.open(&id, &request).await.unwrap();
            let data = vec![opening.read().await.unwrap().unwrap().data[0] + 1];
            tokio::time::sleep(Duration::from_millis(if stalls { 8 } else { 0 })).await;
            let outcome = opening.save(&Change::Write(Record::new(data, Ttl::MAX)), wid()).await;
            (request.access, stalls, outcome.map_err(|e| e.kind()))
        }));
    }
    let mut applied = 0;
    for task in tasks {
        match task.await.unwrap() {
            (_, _, Ok(_)) => applied += 1,
            (Access::Optimistic, _, Err(ErrorKind::Conflict)) | (_, true, Err(ErrorKind::Fenced)) => {}
            refused => panic!("{refused:?}"),
        }
    }
    assert_eq!(text(&handler, &id).await.unwrap().as_bytes(), [applied]);
}

#[tokio::test]
async fn debug_shows_neither_ids_nor_payloads() {
    let (handler, _, _) = locked();
    let id = create(&handler, "payload", Ttl::MAX).await;
    let opening = open(&handler, &id, exclusive(LEASE)).await;
    let text = format!("{handler:?} {opening:?} {:?}", opening.held());
    assert!(!text.contains(id.as_str()) && !text.contains("payload"), "{text}");
}
