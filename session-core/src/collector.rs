//! Which operations travel to the store together? Those of different sessions that wait at the same moment.
//!
//! A backend owns a [`Collector`] and says how one batch is sent ([`Batch`]). The collector takes what is there and never waits
//! for more: there is no timer in here. A request that is alone is sent at once, by its own task. Nothing here knows what an
//! operation is, what a store answers, or which of two writes is right: that is the backend's, and the fence's.
//!
//! ```
//! use session_core::collector::{Batch, Class, Collector, Limits, Member, Reply};
//! use session_core::{Error, ErrorKind, Result};
//!
//! struct Table { /* a pool of connections */ }
//!
//! struct Save { row: [u8; 32], data: Vec<u8> }
//!
//! impl Batch for Table {
//!     type Key = [u8; 32];
//!     type Op = Save;
//!     type Outcome = bool;
//!
//!     async fn send(&self, class: Class, members: &[Member<Save>]) -> Result<Vec<Reply<bool>>> {
//!         // One statement over arrays of rows and data; each row of its answer finds its member.
//!         # let answer = vec![true; members.len()];
//!         # assert!(class == Class::Save && !members[0].op.row.is_empty() && !members[0].op.data.is_empty());
//!         let reply = |(applied, member): (bool, &Member<Save>)| match (applied, member.repeat) {
//!             (true, _) => Reply::Done(Ok(true)),
//!             (false, true) => Reply::Done(Err(Error::new(ErrorKind::Unknown, "save", "it may have been applied before"))),
//!             (false, false) => Reply::Done(Ok(false)),
//!         };
//!         Ok(answer.into_iter().zip(members).map(reply).collect())
//!     }
//! }
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let collector = Collector::new(Table {}, Limits::default());
//! let data = b"cart".to_vec();
//! assert!(collector.submit(Class::Save, [7; 32], data.len(), Save { row: [7; 32], data }).await?);
//! # Ok::<(), Error>(()) }).unwrap();
//! ```

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::Hash;
use std::iter;
use std::mem;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};

use crate::error::{Error, ErrorKind, Result};

/// So many batches of saves may pass an open that waits; then one batch of opens goes.
const PASSED: usize = 8;
/// After so many members of a failed batch in a row that got no answer alone either, it is the store and not a member.
const SILENT: usize = 3;

/// How one batch is sent: what a backend brings to a [`Collector`].
pub trait Batch: Send + Sync + 'static {
    /// What names a session. It is cloned for each operation, so it should be cheap: a hash, or an `Arc`.
    type Key: Clone + Eq + Hash + Send + Sync + 'static;
    /// One operation on one session.
    type Op: Send + Sync + 'static;
    /// What became of it, if it succeeded.
    type Outcome: Send + 'static;

    /// Sends `members` as one batch and returns their replies, one for each, in the order of the members.
    ///
    /// All members are of one `class` and each of a different session. There is at least one; with a single one this is the
    /// plain operation, and must cost no more than that. The members of a batch are independent: what is wrong with one is its
    /// own reply, and is not the failure of the others. A batch of several never waits for a row: a member whose row somebody
    /// has locked is [`Reply::Skipped`], and comes again alone.
    ///
    /// It bounds its own time. The collector has no clock, and what hangs here keeps a place in flight.
    ///
    /// # Errors
    /// The batch failed as a whole, and what becomes of its members depends on the kind. A batch of one is never sent again:
    /// the error is its caller's.
    ///
    /// | kind | says | the members of a batch of several |
    /// |---|---|---|
    /// | [`Unavailable`](ErrorKind::Unavailable) | nothing has reached the store | are told so; no member can be the reason |
    /// | [`Unknown`](ErrorKind::Unknown) | it was sent, and no answer came | are sent again one by one, each a [repeat](Member::repeat) |
    /// | any other | the store refused it, and nothing of it is applied | are sent again one by one |
    ///
    /// # Panics
    /// A panic is taken as `Unknown`. It reaches a caller only where it happens with his operation alone.
    ///
    /// # Cancel safety
    /// The future is dropped if a lone caller goes away, or if the runtime ends. A batch of several then counts as `Unknown`.
    fn send(
        &self,
        class: Class,
        members: &[Member<Self::Op>],
    ) -> impl Future<Output = Result<Vec<Reply<Self::Outcome>>>> + Send;
}

/// What never shares a batch; in the order in which it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_enums, reason = "a backend has to say how it sends each class")]
pub enum Class {
    /// What must be durable, and what frees sessions that others wait for. Goes first.
    Save,
    /// What may be lost in a crash of the store, such as the taking of a lock. Also what only reads.
    Open,
}

/// One operation on its way.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Member<Op> {
    /// The operation, as it was submitted.
    pub op: Op,
    /// It was sent before and no answer came, so it may be in force already. What the store says to it now is judged in that
    /// light: "already applied" is our own doing, and a refusal may be of our own first copy, so it is reported as
    /// [`Unknown`](ErrorKind::Unknown). What follows [`leased`](crate::leased) says it with
    /// [`Asked::repeated`](crate::leased::Asked::repeated).
    pub repeat: bool,
    /// It was [skipped](Reply::Skipped) before and is now alone. It may wait for its row, for a short time.
    pub skipped: bool,
}

impl<Op> Member<Op> {
    /// Makes a member that is sent for the first time.
    #[must_use]
    pub const fn new(op: Op) -> Self {
        Self { op, repeat: false, skipped: false }
    }
}

/// What a batch says of one member.
#[derive(Debug)]
#[allow(clippy::exhaustive_enums, reason = "either there is an outcome or there is none yet")]
pub enum Reply<Outcome> {
    /// It is decided: applied, or refused. This is what its caller gets.
    Done(Result<Outcome>),
    /// Certainly not applied, because somebody has locked its row. It is sent again alone, and whoever answers so a second time
    /// is [`Unavailable`](ErrorKind::Unavailable).
    Skipped,
}

/// How much goes at once. Start from the default and change what a store needs; a zero counts as one.
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The members of a batch: 64.
    pub members: usize,
    /// The bytes at which a batch ends: 256 KiB.
    pub bytes: usize,
    /// What has more bytes than this travels alone: 64 KiB.
    pub alone: usize,
    /// How many are in flight at a time: two, so that the store works on one while the answers of the other are read.
    pub flights: usize,
    /// A batch goes beside those of its class that are under way if these have at most so many times its members: once, for a store
    /// to which a small batch is as much work as a large one. The larger, the sooner a batch goes, and the smaller it is.
    pub beside: usize,
    /// How many are sent again alone at a time, beside those in flight: four.
    pub again: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { members: 64, bytes: 256 << 10, alone: 64 << 10, flights: 2, beside: 1, again: 4 }
    }
}

/// Joins operations of different sessions that wait at the same moment. Clones share one queue.
///
/// * A session has at most one operation in flight. Its next one waits, in the order of submission.
/// * Whatever finds a free place in flight is sent at once, by its caller's task. The rest waits until a flight ends, which
///   takes the oldest with it. What goes alone is again sent by its caller; a batch of several has a task of its own, on a runtime of
///   one of its callers, so that no caller can delay or drop the others.
/// * A batch goes beside one of its class only if it is as large, or as large a part of it as [`Limits::beside`] says: a lone operation
///   beside a lone one, but not one beside forty. The store does nearly the same for a batch of one as for one of forty, and one that
///   waits meets those who come again.
/// * Saves go before opens. After eight batches of saves that passed a waiting open, one batch of opens goes.
/// * An operation whose caller has gone is taken out. What waits is therefore bounded by the callers.
///
/// Without a tokio runtime it works, and each operation travels alone. Callers may be on different runtimes; if one of these ends
/// in mid-batch, the others send what is theirs again. One that is neither driven nor ended holds up what it has in flight.
pub struct Collector<B: Batch> {
    shared: Arc<Shared<B>>,
}

impl<B: Batch> Collector<B> {
    /// Makes a collector that sends by `batch`.
    #[must_use]
    pub fn new(batch: B, limits: Limits) -> Self {
        let limits = Limits {
            members: limits.members.max(1),
            flights: limits.flights.max(1),
            beside: limits.beside.max(1),
            again: limits.again.clamp(1, Semaphore::MAX_PERMITS),
            ..limits
        };
        let state = State {
            in_flight: 0,
            under_way: [0; 2],
            departing: false,
            passed: 0,
            next: 0,
            lanes: Default::default(),
            sessions: HashMap::new(),
        };
        let again = Semaphore::new(limits.again);
        Self { shared: Arc::new(Shared { batch, limits, again, state: Mutex::new(state) }) }
    }

    /// Returns what sends the batches.
    #[must_use]
    pub fn batch(&self) -> &B {
        &self.shared.batch
    }

    /// Sends `op` on the session `key`, with others if others wait, and returns its own outcome. `bytes` is the length of its
    /// payload.
    ///
    /// # Errors
    /// What the store says of this operation, and:
    ///
    /// | kind | when |
    /// |---|---|
    /// | [`Unavailable`](ErrorKind::Unavailable) | the store was not reached, or somebody has locked the row; nothing was applied |
    /// | [`Unknown`](ErrorKind::Unknown) | it was sent and no answer came; also a refusal, `Unavailable` included, of what had been sent before without an answer |
    /// | [`Unexpected`](ErrorKind::Unexpected) | the backend's replies do not match the members |
    ///
    /// # Panics
    /// With the panic of [`Batch::send`], if that happens with this operation alone.
    ///
    /// # Cancel safety
    /// While it waits, a dropped future takes the operation out: it is never sent. Afterwards it equals `Unknown`: a batch of
    /// several goes on, what was sent alone is dropped with it. A future that is kept and not polled keeps its place in flight.
    pub async fn submit(&self, class: Class, key: B::Key, bytes: usize, op: B::Op) -> Result<B::Outcome> {
        let lone = match Shared::enter(&self.shared, class, key, bytes, op) {
            Entry::Now(lone) => lone,
            Entry::Later(ticket) => match ticket.verdict().await {
                Verdict::Done(result) => return result,
                Verdict::Alone(lone) => lone,
            },
        };
        // On the heap: with others beside it, an operation seldom goes alone.
        Box::pin(lone.send()).await
    }
}

impl<B: Batch> Clone for Collector<B> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<B: Batch> fmt::Debug for Collector<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (in_flight, waiting) = {
            let state = self.shared.lock();
            let parked: usize = state.sessions.values().map(VecDeque::len).sum();
            (state.in_flight, parked + state.lanes.iter().map(VecDeque::len).sum::<usize>())
        };
        f.debug_struct("Collector").field("in_flight", &in_flight).field("waiting", &waiting).finish_non_exhaustive()
    }
}

struct Shared<B: Batch> {
    batch: B,
    limits: Limits,
    again: Semaphore,
    // Held for a few operations on maps, never across an await, so a blocking mutex is the cheaper one.
    state: Mutex<State<B>>,
}

/// Whenever the mutex is free and something waits in a lane, all places in flight are taken, or so many of its class are under way
/// that it does not go beside them, or somebody is departing.
struct State<B: Batch> {
    in_flight: usize,
    /// The operations in flight, by class.
    under_way: [usize; 2],
    /// Somebody sees batches off without the mutex, and will look again for what can go.
    departing: bool,
    /// How many batches of saves in a row have passed an open that waits.
    passed: usize,
    /// The arrival number of the next operation that has to wait.
    next: u64,
    /// What may go as soon as there is a place, by class and in the order of arrival; of each session at most one.
    lanes: [Line<B>; 2],
    /// The sessions with an operation in a lane or on its way, each with what has to wait for that.
    sessions: HashMap<B::Key, Line<B>>,
}

/// By number. In boxes, because whoever gives up leaves a gap that all on one side of him close.
type Line<B> = VecDeque<Box<Waiting<B>>>;

struct Waiting<B: Batch> {
    number: u64,
    class: Class,
    key: B::Key,
    bytes: usize,
    op: B::Op,
    runtime: Option<Handle>,
    caller: oneshot::Sender<Verdict<B>>,
}

enum Entry<B: Batch> {
    Now(Lone<B>),
    Later(Ticket<B>),
}

/// What a caller who waits is told.
enum Verdict<B: Batch> {
    Done(Result<B::Outcome>),
    Alone(Lone<B>),
}

impl<B: Batch> Shared<B> {
    fn enter(shared: &Arc<Self>, class: Class, key: B::Key, bytes: usize, op: B::Op) -> Entry<B> {
        let mut state = shared.lock();
        let waits = state.sessions.contains_key(&key) || state.lanes.iter().any(|lane| !lane.is_empty());
        if !waits && state.in_flight < shared.limits.flights && state.goes(1, class, &shared.limits) {
            state.set_out(class, 1);
            state.sessions.insert(key.clone(), VecDeque::new());
            drop(state);
            let member = Member::new(op);
            let place = Place { shared: Arc::clone(shared), key, flight: Some(class) };
            return Entry::Now(Lone { place, class, member, failed: None });
        }
        let number = state.next;
        state.next += 1;
        let (caller, answer) = oneshot::channel();
        let runtime = Handle::try_current().ok();
        let waiting = Box::new(Waiting { number, class, key: key.clone(), bytes, op, runtime, caller });
        match state.sessions.get_mut(&key) {
            Some(parked) => parked.push_back(waiting),
            None => {
                state.sessions.insert(key.clone(), VecDeque::new());
                state.lanes[class as usize].push_back(waiting);
            }
        }
        Self::see_off(shared, state);
        Entry::Later(Ticket { shared: Arc::clone(shared), number, class, key, answer: Some(answer) })
    }

    /// Gives back the place in flight of so many of a class, and the sessions of `keys`, and sends what can go now.
    fn leave<'k>(self: &Arc<Self>, flight: Option<(Class, usize)>, keys: impl IntoIterator<Item = &'k B::Key>) {
        let mut state = self.lock();
        if let Some((class, count)) = flight {
            state.in_flight -= 1;
            state.under_way[class as usize] -= count;
        }
        for key in keys {
            state.free(key);
        }
        self.see_off(state);
    }

    fn see_off<'s>(self: &'s Arc<Self>, mut state: MutexGuard<'s, State<B>>) {
        // Seeing off may end in here again, once for each batch if a runtime is ending; the stack has no room for that.
        if state.departing {
            return;
        }
        while let Some(batch) = state.take(&self.limits) {
            state.departing = true;
            drop(state);
            self.depart(batch);
            state = self.lock();
            state.departing = false;
        }
    }

    fn depart(self: &Arc<Self>, mut batch: Line<B>) {
        let mut first = batch.pop_front().expect("nothing departs empty");
        if batch.is_empty() {
            let Waiting { class, key, op, caller, .. } = *first;
            let member = Member::new(op);
            let place = Place { shared: Arc::clone(self), key, flight: Some(class) };
            // A caller who has gone leaves the place to the next, by dropping it.
            let _ = caller.send(Verdict::Alone(Lone { place, class, member, failed: None }));
            return;
        }
        let (class, count) = (first.class, 1 + batch.len());
        let runtime = first.runtime.take().expect("a batch of several begins with a caller on a runtime");
        let (mut members, mut callers) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for waiting in iter::once(first).chain(batch) {
            let Waiting { key, op, caller, .. } = *waiting;
            members.push(Member::new(op));
            callers.push((key, caller));
        }
        // If this runtime is ending, the task is dropped unpolled, and the flight lands by its `Drop`.
        runtime.spawn(
            Flight {
                shared: Arc::clone(self),
                class,
                count,
                members,
                callers,
                sent: false,
                landed: false,
                done: Vec::new(),
            }
            .fly(),
        );
    }

    fn lock(&self) -> MutexGuard<'_, State<B>> {
        // Nothing panics while it is held but a key's own `Hash`, before anything has changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Batch> State<B> {
    /// Takes a place in flight, and what travels on it.
    fn take(&mut self, limits: &Limits) -> Option<Line<B>> {
        if self.in_flight >= limits.flights {
            return None;
        }
        let class = match [Class::Save, Class::Open].map(|class| self.is_due(class, limits)) {
            [false, false] => return None,
            [true, _] if self.lanes[Class::Open as usize].is_empty() => Class::Save,
            [true, due] if !due || self.passed < PASSED => {
                self.passed += 1;
                Class::Save
            }
            _ => {
                self.passed = 0;
                Class::Open
            }
        };
        let lane = &mut self.lanes[class as usize];
        let first = lane.front()?;
        let (mut count, mut bytes) = (1, first.bytes);
        // Without a runtime nobody could drive a batch of several.
        if bytes <= limits.alone && first.runtime.is_some() {
            let fits = lane.iter().take(limits.members).skip(1).map(|next| {
                bytes += next.bytes;
                next.bytes <= limits.alone && bytes <= limits.bytes
            });
            count += fits.take_while(|fits| *fits).count();
        }
        let batch = lane.drain(..count).collect();
        self.set_out(class, count);
        Some(batch)
    }

    /// Whether what waits of this class goes as soon as there is a place.
    fn is_due(&self, class: Class, limits: &Limits) -> bool {
        let waiting = self.lanes[class as usize].len();
        waiting > 0 && self.goes(waiting, class, limits)
    }

    /// Whether so many go beside those of their class that are under way. The store does the same work for a few, and those under way
    /// come again soon.
    fn goes(&self, count: usize, class: Class, limits: &Limits) -> bool {
        count.saturating_mul(limits.beside) >= self.under_way[class as usize]
    }

    fn set_out(&mut self, class: Class, count: usize) {
        self.in_flight += 1;
        self.under_way[class as usize] += count;
    }

    /// Ends an operation of this session: the next one may go.
    fn free(&mut self, key: &B::Key) {
        match self.sessions.get_mut(key).and_then(VecDeque::pop_front) {
            Some(next) => {
                let lane = &mut self.lanes[next.class as usize];
                // It may have come before others of its lane.
                let at = lane.partition_point(|waiting| waiting.number < next.number);
                lane.insert(at, next);
            }
            None => {
                self.sessions.remove(key);
            }
        }
    }

    /// Takes out an operation that was not sent yet.
    fn give_up(&mut self, ticket: &Ticket<B>) -> Option<Box<Waiting<B>>> {
        let at = |line: &Line<B>| line.binary_search_by_key(&ticket.number, |waiting| waiting.number).ok();
        let lane = &mut self.lanes[ticket.class as usize];
        if let Some(waiting) = at(lane).and_then(|at| lane.remove(at)) {
            self.free(&ticket.key);
            return Some(waiting);
        }
        let parked = self.sessions.get_mut(&ticket.key)?;
        parked.remove(at(parked)?)
    }
}

/// A caller who waits; dropping it takes the operation out.
struct Ticket<B: Batch> {
    shared: Arc<Shared<B>>,
    number: u64,
    class: Class,
    key: B::Key,
    answer: Option<oneshot::Receiver<Verdict<B>>>,
}

impl<B: Batch> Ticket<B> {
    async fn verdict(mut self) -> Verdict<B> {
        let answer = self.answer.as_mut().expect("a verdict is awaited once");
        let verdict = answer.await.unwrap_or_else(|_| {
            let message = "the batch ended without a word on this operation";
            Verdict::Done(Err(Error::new(ErrorKind::Unknown, "batch", message)))
        });
        self.answer = None;
        verdict
    }
}

impl<B: Batch> Drop for Ticket<B> {
    fn drop(&mut self) {
        if self.answer.is_some() {
            // What is taken out is dropped after the lock, and so is an answer that came meanwhile, with the place it holds.
            let _waiting = self.shared.lock().give_up(self);
        }
    }
}

/// The right of one operation to be on its way. Dropping it lets the next one of its session go, and gives back its flight.
struct Place<B: Batch> {
    shared: Arc<Shared<B>>,
    key: B::Key,
    /// Of which class, if it has a place in flight.
    flight: Option<Class>,
}

impl<B: Batch> Drop for Place<B> {
    fn drop(&mut self) {
        self.shared.leave(self.flight.map(|class| (class, 1)), [&self.key]);
    }
}

/// An operation that its own caller sends, alone.
struct Lone<B: Batch> {
    place: Place<B>,
    class: Class,
    member: Member<B::Op>,
    /// The batch that failed as a whole, if it comes from one.
    failed: Option<Arc<Failed>>,
}

impl<B: Batch> Lone<B> {
    async fn send(mut self) -> Result<B::Outcome> {
        loop {
            let result = self.ask().await;
            if let Some(failed) = &self.failed {
                failed.learn(&result);
            }
            match result {
                Ok(Reply::Done(result)) => return judge(self.class, self.member.repeat, result),
                Ok(Reply::Skipped) if self.member.skipped => {
                    let message = "somebody has locked the row of this session for longer than an operation may wait";
                    let error = Error::new(ErrorKind::Unavailable, "batch", message);
                    return judge(self.class, self.member.repeat, Err(error));
                }
                Ok(Reply::Skipped) => {
                    self.member.skipped = true;
                    // It waits for somebody's row now; nobody else shall wait for that.
                    if let Some(class) = self.place.flight.take() {
                        self.place.shared.leave(Some((class, 1)), []);
                    }
                }
                Err(error) => return judge(self.class, self.member.repeat, Err(error)),
            }
        }
    }

    async fn ask(&self) -> Result<Reply<B::Outcome>> {
        let shared = &*self.place.shared;
        let _permit = match self.place.flight {
            Some(_) => None,
            None => Some(shared.again.acquire().await.expect("the semaphore is never closed")),
        };
        if let Some(failed) = &self.failed {
            failed.check()?;
        }
        let mut replies = shared.batch.send(self.class, slice::from_ref(&self.member)).await?;
        match (replies.pop(), replies.len()) {
            (Some(reply), 0) => Ok(reply),
            (reply, rest) => Err(mismatch(1, rest + usize::from(reply.is_some()))),
        }
    }
}

/// What the members of a failed batch learn from each other.
#[derive(Default)]
struct Failed {
    /// How many in a row got no answer alone either.
    silent: AtomicUsize,
}

impl Failed {
    fn learn<T>(&self, result: &Result<T>) {
        match result {
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unknown) => {
                self.silent.fetch_add(1, Ordering::Relaxed);
            }
            // Once given up it stays so: an answer to one that was under way says little about those behind it.
            _ => {
                let reset = |silent| if silent < SILENT { Some(0) } else { None };
                let _ = self.silent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, reset);
            }
        }
    }

    fn check(&self) -> Result<()> {
        if self.silent.load(Ordering::Relaxed) < SILENT {
            return Ok(());
        }
        let message = format!("the batch failed, and {SILENT} of its members in a row got no answer alone either");
        Err(Error::new(ErrorKind::Unavailable, "batch", message))
    }
}

/// A batch of several in flight, in a task of its own. However that task ends, each caller hears of it.
struct Flight<B: Batch> {
    shared: Arc<Shared<B>>,
    class: Class,
    /// How many set out; some of them may have been taken out since.
    count: usize,
    members: Vec<Member<B::Op>>,
    callers: Vec<(B::Key, oneshot::Sender<Verdict<B>>)>,
    sent: bool,
    landed: bool,
    /// The sessions whose operation has ended.
    done: Vec<B::Key>,
}

impl<B: Batch> Flight<B> {
    async fn fly(mut self) {
        self.take_out_who_has_gone();
        self.sent = true;
        let answer = match self.members.is_empty() {
            true => Ok(Vec::new()),
            false => self.shared.batch.send(self.class, &self.members).await,
        };
        match answer {
            Ok(replies) if replies.len() == self.members.len() => self.land(replies),
            Ok(replies) => self.refuse(&mismatch(self.members.len(), replies.len())),
            Err(error) if error.kind() == ErrorKind::Unavailable || self.members.len() == 1 => self.refuse(&error),
            Err(error) => self.scatter(error.kind() == ErrorKind::Unknown),
        }
        // No wait, but one round of the scheduler: whoever has just been told and comes again at once still joins the next batch.
        // Otherwise the first of them would travel alone, and all others wait for him.
        tokio::task::yield_now().await;
    }

    /// Between the taking of the batch and the first step of its task a caller may have gone.
    fn take_out_who_has_gone(&mut self) {
        if !self.callers.iter().any(|(_, caller)| caller.is_closed()) {
            return;
        }
        let mut gone = Vec::new();
        let callers = mem::take(&mut self.callers);
        let members = mem::take(&mut self.members);
        for (member, (key, caller)) in members.into_iter().zip(callers) {
            if caller.is_closed() {
                gone.push(key);
            } else {
                self.members.push(member);
                self.callers.push((key, caller));
            }
        }
        if !gone.is_empty() {
            self.shared.leave(None, &gone);
        }
    }

    /// Tells each caller the reply to his own operation.
    fn land(&mut self, replies: Vec<Reply<B::Outcome>>) {
        let verdicts = replies.into_iter().map(|reply| match reply {
            Reply::Done(result) => Some(result),
            Reply::Skipped => None,
        });
        let skipped = |member: Member<B::Op>| Member { skipped: true, ..member };
        self.tell(verdicts, skipped, None);
    }

    /// Tells all callers the same.
    fn refuse(&mut self, error: &Error) {
        self.tell(iter::repeat_with(|| Some(Err(error.clone()))), |member| member, None);
    }

    /// Lets each caller send his own operation again, alone.
    fn scatter(&mut self, repeat: bool) {
        self.tell(iter::repeat_with(|| None), |member| Member { repeat, ..member }, Some(&Arc::default()));
    }

    /// Hands out the verdicts, or `again` where there is none.
    fn tell(
        &mut self,
        verdicts: impl Iterator<Item = Option<Result<B::Outcome>>>,
        again: impl Fn(Member<B::Op>) -> Member<B::Op>,
        failed: Option<&Arc<Failed>>,
    ) {
        self.landed = true;
        let members = mem::take(&mut self.members);
        let callers = mem::take(&mut self.callers);
        self.done.reserve(callers.len());
        for ((member, (key, caller)), verdict) in members.into_iter().zip(callers).zip(verdicts) {
            let verdict = match verdict {
                Some(result) => {
                    self.done.push(key);
                    Verdict::Done(result)
                }
                None => {
                    let place = Place { shared: Arc::clone(&self.shared), key, flight: None };
                    Verdict::Alone(Lone { place, class: self.class, member: again(member), failed: failed.cloned() })
                }
            };
            // Nobody is there any more to hear it: what was applied stays, and what was to go again does not.
            let _ = caller.send(verdict);
        }
    }
}

impl<B: Batch> Drop for Flight<B> {
    fn drop(&mut self) {
        // The sending panicked, or its runtime has ended.
        if !self.landed {
            self.scatter(self.sent);
        }
        self.shared.leave(Some((self.class, self.count)), &self.done);
    }
}

/// A refusal of what was sent before without an answer may be a lie: the first copy may be in force, and somebody went on from it.
fn judge<T>(class: Class, repeat: bool, result: Result<T>) -> Result<T> {
    result.map_err(|error| match (error.kind(), class) {
        (ErrorKind::Unavailable, _) if repeat => error.with_kind(ErrorKind::Unknown),
        (ErrorKind::Fenced | ErrorKind::Conflict | ErrorKind::Gone, Class::Save) if repeat => {
            error.with_kind(ErrorKind::Unknown)
        }
        _ => error,
    })
}

fn mismatch(members: usize, replies: usize) -> Error {
    let message = format!("a batch of {members} was answered by {replies} replies");
    Error::new(ErrorKind::Unexpected, "batch", message)
}
