//! Handing out sessions: who waits for what, and which record a live id leads to.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::commit::{Mode, Work};
use crate::dsn::Dsn;
use crate::envelope::{Data, Forward, Payload};
use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Access, Expect, OpenRequest, SessionHandler};
use crate::id::SessionId;
use crate::janitor::{Janitor, Opening};
use crate::queue::Queues;
use crate::record::{Change, Record, WriteId};
use crate::seal::{self, Purpose};
use crate::session::Session;
use crate::settings::{MAX_LEASE, MAX_WAIT, MIN_LEASE, SessionsBuilder, Settings};
use crate::ttl::Ttl;
use crate::view::SessionView;

/// How many forwards an access follows: each `rotate` leaves one, and a visitor who is that far behind starts anew.
const MAX_HOPS: usize = 4;

/// How often `update` runs its closure again on newer data, and `merge` lays its changes over again.
pub(crate) const MAX_REDOS: usize = 8;

/// The sessions of one application over one [`SessionHandler`]. Cheap to clone; clones share the queues.
///
/// | call | lock | for |
/// |---|---|---|
/// | [`create`](Self::create) | none, no trip | a new visitor |
/// | [`open`](Self::open) | exclusive, renewed while open | a request that reads and writes |
/// | [`view`](Self::view) | none, never waits | a request that only reads |
/// | [`update`](Self::update) | only around the closure | slow work first, then a short change |
/// | [`merge`](Self::merge) | none while working | parallel requests that change different things |
/// | [`destroy`](Self::destroy) | none | a logout, from anywhere |
///
/// Tasks of one process that want the same session queue here, first come, first served, and one at a time goes to the store.
/// Two `Sessions` over one handler are correct, only less orderly.
///
/// ```
/// use std::sync::Arc;
/// use session_core::{MemoryHandler, Sessions};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> session_core::Result<()> {
/// let sessions = Sessions::new(Arc::new(MemoryHandler::new()))?;
/// let mut session = sessions.create()?;
/// session.insert("visits", &1)?;
/// let id = session.close().await?.expect("a session with values is stored");
///
/// let updated = sessions.update(&id, async |session| {
///     let visits: u32 = session.get("visits")?.unwrap_or(0) + 1;
///     session.insert("visits", &visits)?;
///     Ok(visits)
/// }).await?;
/// assert_eq!(updated.value, 2);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Sessions {
    pub(crate) core: Arc<Core>,
    pub(crate) wait: Duration,
    pub(crate) lease: Duration,
    /// What is made here is known under this name only, and what was made under another name is not known here.
    realm: Option<Bytes>,
}

/// What [`update`](Sessions::update) did.
#[allow(clippy::exhaustive_structs, reason = "a pair")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Updated<T> {
    /// The id to give to the visitor; `None` if the session was new and nothing was stored.
    pub id: Option<SessionId>,
    /// What the closure returned.
    pub value: T,
}

impl Sessions {
    /// Serves sessions from `handler` with the default settings.
    ///
    /// # Errors
    /// None; the signature is that of [`SessionsBuilder::build`].
    pub fn new(handler: Arc<dyn SessionHandler>) -> Result<Self> {
        Self::builder(handler).build()
    }

    /// Begins to set up.
    pub fn builder(handler: Arc<dyn SessionHandler>) -> SessionsBuilder {
        SessionsBuilder::new(handler)
    }

    /// Serves sessions from `handler` with the common options of `dsn`.
    ///
    /// # Errors
    /// [`Config`](ErrorKind::Config) that names the option.
    pub fn with_options(handler: Arc<dyn SessionHandler>, dsn: &Dsn) -> Result<Self> {
        Self::builder(handler).options_from(dsn)?.build()
    }

    pub(crate) fn from_parts(handler: Arc<dyn SessionHandler>, settings: Settings) -> Self {
        let (wait, lease) = (settings.wait, settings.lease);
        let (queues, janitor) = (Queues::new(settings.queue), Janitor::new(settings.max_hold));
        Self { core: Arc::new(Core { handler, queues, janitor, settings }), wait, lease, realm: None }
    }

    /// Returns the same sessions with another wait, for a route that has its own; more than ten minutes count as ten.
    #[must_use]
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.wait = wait.min(MAX_WAIT);
        self
    }

    /// Returns the same sessions with another lease, for a route that has its own, brought into the range of
    /// [`SessionsBuilder::lease`].
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease.clamp(MIN_LEASE, MAX_LEASE);
        self
    }

    /// Returns the same sessions as they are known under one name, such as that of a cookie: what is made here is marked with it,
    /// and what is marked with another name is absent here. Sessions without a mark are known under every name, and without a
    /// realm all sessions are known. `destroy` does not ask for the mark.
    ///
    /// It keeps the id of a session from being valid under two cookies of applications that share a store.
    #[must_use]
    pub fn with_realm(mut self, name: &str) -> Self {
        self.realm = Some(Bytes::copy_from_slice(name.as_bytes()));
        self
    }

    /// Returns the handler below.
    #[must_use]
    pub fn handler(&self) -> &Arc<dyn SessionHandler> {
        &self.core.handler
    }

    /// Makes a session for a new visitor, under a new id. Nothing is stored before its first save with a value in it.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) if the operating system has no randomness to give.
    pub fn create(&self) -> Result<Session> {
        let data = self.new_data();
        Ok(Session::new(self.clone(), Work::new(SessionId::generate()?, Mode::Fresh, None, data)))
    }

    /// Opens `id` exclusively: nobody else works on it until it is closed, and it stays locked for as long as it is open, up to
    /// `max_hold`.
    ///
    /// An absent id, also one that was destroyed while we waited, gives an empty session with a *new* id: an id that a client
    /// made up is never adopted. An id that [`elevate`](Session::elevate) has retired gives a session that
    /// [`is_retired`](Session::is_retired).
    ///
    /// # Errors
    /// [`LockTimeout`](ErrorKind::LockTimeout) if somebody else held it for the whole wait; a task that opens what it holds
    /// already ends like this too. [`Busy`](ErrorKind::Busy) if the queue is full. Those of [`SessionHandler::open`].
    ///
    /// # Cancel safety
    /// Safe: a dropped future gives up its place, and a lock that it had got is given back.
    pub async fn open(&self, id: &SessionId) -> Result<Session> {
        self.open_expecting(id, Expect::Existing).await
    }

    /// Opens `id` exclusively and creates it under this very id if it is absent: for administrators and migrations, never for an
    /// id that came from a visitor.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Cancel safety
    /// As [`open`](Self::open).
    pub async fn open_or_create(&self, id: &SessionId) -> Result<Session> {
        self.open_expecting(id, Expect::Any).await
    }

    async fn open_expecting(&self, id: &SessionId, expect: Expect) -> Result<Session> {
        let mode = if self.core.settings.locking { Mode::Exclusive } else { Mode::Optimistic };
        let found = match mode {
            Mode::Exclusive => self.core.find(id, mode.access(self.lease), expect, self.wait).await?,
            // On the heap, so that whoever locks does not carry the room for it.
            _ => Box::pin(self.find_optimistic(id, expect)).await?,
        };
        self.hand_out(found, mode)
    }

    /// Without optimistic writes it is a view, and its save a short exclusive opening that compares.
    async fn find_optimistic(&self, id: &SessionId, expect: Expect) -> Result<Found> {
        match self.core.find(id, Access::Optimistic, expect, self.wait).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let mut found = self.core.find(id, Access::ReadOnly, Expect::Existing, self.wait).await?;
                if let Found::Live(live) = &mut found {
                    live.compare_at_save = true;
                }
                Ok(found)
            }
            found => found,
        }
    }

    /// Reads `id` without a lock and without waiting: the last committed state. An absent id gives an empty view. Never prolongs
    /// the session's life.
    ///
    /// # Errors
    /// Those of [`SessionHandler::open`]; never [`LockTimeout`](ErrorKind::LockTimeout).
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn view(&self, id: &SessionId) -> Result<SessionView> {
        match self.core.find(id, Access::ReadOnly, Expect::Existing, self.wait).await? {
            Found::Live(live) if self.is_foreign(&live.data) => {
                live.opening.close().await?;
                Ok(SessionView::new(self.clone(), None, None, false))
            }
            Found::Live(live) => {
                live.opening.close().await?;
                Ok(SessionView::new(self.clone(), Some(live.id), Some(live.data), false))
            }
            Found::Absent { .. } => Ok(SessionView::new(self.clone(), None, None, false)),
            Found::Retired { id } => Ok(SessionView::new(self.clone(), Some(id), None, true)),
        }
    }

    /// Opens `id` without a lock; saving lays the keys that were changed over whatever is stored by then.
    ///
    /// A key that somebody else changed meanwhile to another value is a [`Conflict`](ErrorKind::Conflict) that names it, and
    /// nothing is stored; [`update_key`](Session::update_key) is done again on the newest value instead. A session that was
    /// destroyed meanwhile is [`Gone`](ErrorKind::Gone). An absent id gives a session with a new id.
    ///
    /// # Errors
    /// Those of [`SessionHandler::open`]; never [`LockTimeout`](ErrorKind::LockTimeout).
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn merge(&self, id: &SessionId) -> Result<Session> {
        let found = self.find_optimistic(id, Expect::Existing).await?;
        self.hand_out(found, Mode::Merge)
    }

    fn hand_out(&self, found: Found, mode: Mode) -> Result<Session> {
        let work = match found {
            // Its opening is closed behind the request.
            Found::Live(live) if self.is_foreign(&live.data) => return self.create(),
            Found::Live(live) => {
                let Live { id, opening, data, left, presented, compare_at_save } = *live;
                let mut work = Work::new(id, mode, (!compare_at_save).then_some(opening), data.clone());
                (work.base, work.left, work.compare) = (Some(data), Some(left), compare_at_save);
                if presented {
                    // Stored with the next save, which this makes due: the old id has had its reminder.
                    work.data.origin = None;
                }
                work
            }
            Found::Absent { id, opening: Some(opening) } => Work::new(id, mode, Some(opening), self.new_data()),
            Found::Absent { opening: None, .. } => return self.create(),
            Found::Retired { id } => Work::new(id, Mode::Retired, None, self.new_data()),
        };
        Ok(Session::new(self.clone(), work))
    }

    fn new_data(&self) -> Data {
        Data { realm: self.realm.clone(), ..self.core.new_data() }
    }

    /// Whether a session is known under another name only.
    fn is_foreign(&self, data: &Data) -> bool {
        matches!((&self.realm, &data.realm), (Some(ours), Some(theirs)) if ours != theirs)
    }

    /// Runs `change` on `id` under the lock and saves: the lock is held only around the closure. If the closure fails, nothing is
    /// written.
    ///
    /// If somebody took over in the middle (the process was paused for longer than its lease), nothing was stored, and the closure
    /// runs again on the newest data. It never runs again after a write of unknown fate, so it counts once.
    ///
    /// In a task of its own (`tokio::spawn`) the closure should own what it uses: `async move |session| …` over clones. One that
    /// borrows from outside makes a future that the compiler does not accept as `Send`.
    ///
    /// # Errors
    /// Those of the closure, of [`open`](Self::open) and of [`Session::close`].
    ///
    /// # Cancel safety
    /// The change is stored whole or not at all.
    pub async fn update<T, F>(&self, id: &SessionId, change: F) -> Result<Updated<T>>
    where
        F: AsyncFnMut(&mut Session) -> Result<T>,
    {
        self.try_update(id, change).await
    }

    /// The same as [`update`](Self::update), for a closure with an error type of its own.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    ///
    /// # Cancel safety
    /// As [`update`](Self::update).
    pub async fn try_update<T, E, F>(&self, id: &SessionId, mut change: F) -> Result<Updated<T>, E>
    where
        E: From<Error>,
        F: AsyncFnMut(&mut Session) -> Result<T, E>,
    {
        let mut redos = 0;
        loop {
            let mut session = self.open(id).await?;
            let value = match change(&mut session).await {
                Ok(value) => value,
                Err(error) => {
                    // The closure's error matters more than a lock that ends with its lease.
                    let _ = session.abort().await;
                    return Err(error);
                }
            };
            match session.close().await {
                Ok(id) => return Ok(Updated { id, value }),
                Err(error) if matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Conflict) && redos < MAX_REDOS => {
                    redos += 1
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Destroys what `id` forwards to, and `id`. Never waits for a holder; a holder's later save is [`Gone`](ErrorKind::Gone).
    /// Destroying an absent session succeeds.
    ///
    /// # Errors
    /// [`Unknown`](ErrorKind::Unknown) or [`Unavailable`](ErrorKind::Unavailable) if the store did not answer; calling again is safe.
    ///
    /// # Cancel safety
    /// A dropped future goes on.
    pub async fn destroy(&self, id: &SessionId) -> Result<()> {
        self.core.janitor.start()?;
        let (core, id) = (Arc::clone(&self.core), id.clone());
        self.core.janitor.owned(async move { core.destroy(id).await }).await?
    }

    /// Frees the space of at most `limit` expired sessions, and returns how many it freed.
    ///
    /// # Errors
    /// As [`SessionHandler::gc`].
    ///
    /// # Cancel safety
    /// As [`SessionHandler::gc`].
    pub async fn gc(&self, limit: NonZeroU32) -> Result<u64> {
        self.core.handler.gc(limit).await
    }

    /// Waits until every session that was dropped unclosed has been closed, for an orderly end of the process. Without it their
    /// locks end with their leases. Sessions that are still open are not touched.
    pub async fn shutdown(&self) {
        self.core.janitor.drain().await;
    }

    /// Returns how many sessions this process holds or waits for, and how many leases it renews: both are zero when nothing is
    /// open.
    #[must_use]
    pub fn in_use(&self) -> (usize, usize) {
        (self.core.queues.len(), self.core.janitor.renewing())
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions")
            .field("handler", &self.core.handler)
            .field("queues", &self.core.queues)
            .finish_non_exhaustive()
    }
}

pub(crate) struct Core {
    pub(crate) handler: Arc<dyn SessionHandler>,
    pub(crate) queues: Arc<Queues>,
    pub(crate) janitor: Arc<Janitor>,
    pub(crate) settings: Settings,
}

/// Where a live id leads.
pub(crate) enum Found {
    // On the heap, because it passes through many hands.
    Live(Box<Live>),
    Absent { id: SessionId, opening: Option<Opening> },
    Retired { id: SessionId },
}

pub(crate) struct Live {
    pub(crate) id: SessionId,
    pub(crate) opening: Opening,
    pub(crate) data: Data,
    pub(crate) left: Ttl,
    /// The visitor himself has shown this id, which a rotate had made.
    presented: bool,
    compare_at_save: bool,
}

impl Core {
    /// Opens `id` and whatever it forwards to, and reads. The queue of this process comes first; what it leaves of `wait` goes to
    /// the store.
    pub(crate) async fn find(
        self: &Arc<Self>,
        id: &SessionId,
        access: Access,
        expect: Expect,
        wait: Duration,
    ) -> Result<Found> {
        self.janitor.start()?;
        // Where no call of a store ever waits, this is what lets the other tasks of the thread run.
        tokio::task::coop::consume_budget().await;
        let deadline = Instant::now() + wait;
        let mut id = id.clone();
        for hop in 0..=MAX_HOPS {
            let expect = if hop == 0 { expect } else { Expect::Existing };
            let (opening, record) = self.open_one(&id, access, expect, deadline).await?;
            let Some(record) = record else {
                if expect == Expect::Any {
                    return Ok(Found::Absent { id, opening: Some(opening) });
                }
                opening.close().await?;
                break;
            };
            let left = record.ttl;
            match Payload::decode(record.data) {
                Ok(Payload::Data(data)) if self.absolute_left(&data).is_some() => {
                    let presented = match &data.origin {
                        Some(origin) if hop == 0 => {
                            self.forward_was_seen(&id, origin);
                            true
                        }
                        _ => false,
                    };
                    let live = Live { id, opening, data, left, presented, compare_at_save: false };
                    return Ok(Found::Live(Box::new(live)));
                }
                Ok(Payload::Data(_)) => {
                    // Past its absolute time-out: absent from now on, whoever asks.
                    Box::pin(self.end(opening, access)).await?;
                    break;
                }
                Ok(Payload::Forward(forward)) => {
                    // The old lock is given up before the new one is queued for: holding both in turn could deadlock.
                    opening.close().await?;
                    id = seal::open(&forward.target, &id, Purpose::Forward)?;
                }
                Ok(Payload::Retired) => {
                    opening.close().await?;
                    return Ok(Found::Retired { id });
                }
                Err(error) => {
                    // Nothing is deleted because it could not be read.
                    let _ = opening.close().await;
                    return Err(error);
                }
            }
        }
        Ok(Found::Absent { id, opening: None })
    }

    async fn open_one(
        self: &Arc<Self>,
        id: &SessionId,
        access: Access,
        expect: Expect,
        deadline: Instant,
    ) -> Result<(Opening, Option<Record>)> {
        let (turn, access) = match access {
            Access::Exclusive { lease, .. } => {
                let turn = self.queues.turn(id, deadline).await?;
                let wait = deadline.saturating_duration_since(Instant::now());
                (Some(turn), Access::Exclusive { wait, lease })
            }
            access => (None, access),
        };
        let (core, id) = (Arc::clone(self), id.clone());
        self.janitor
            .owned(async move {
                let inner = core.handler.open(&id, &OpenRequest { access, expect }).await?;
                let mut opening = Opening::new(inner, turn, Arc::clone(&core.janitor));
                match opening.handler().read().await {
                    Ok(record) => Ok((opening, record)),
                    Err(error) => {
                        let _ = opening.close().await;
                        Err(error)
                    }
                }
            })
            .await?
    }

    async fn end(&self, mut opening: Opening, access: Access) -> Result<()> {
        if matches!(access, Access::Exclusive { .. }) {
            opening.handler().destroy().await?;
        }
        opening.close().await
    }

    /// Destroys what `id` forwards to before `id` itself: if an answer is lost, the next call finds the forward still there.
    pub(crate) async fn destroy(&self, id: SessionId) -> Result<()> {
        let mut chain = vec![id];
        while chain.len() <= MAX_HOPS {
            let id = chain.last().expect("it begins with one");
            match self.forward_of(id).await? {
                Some(target) => chain.push(target),
                None => break,
            }
        }
        for _ in 0..=2 * MAX_HOPS {
            let Some(id) = chain.pop() else { break };
            let mut open = self.handler.open(&id, &OpenRequest::destroy()).await?;
            let removed = open.destroy().await?;
            let _ = open.close().await;
            // A rotate may have come between.
            if let Some(target) = target_of(&id, removed)? {
                chain.push(target);
            }
        }
        Ok(())
    }

    async fn forward_of(&self, id: &SessionId) -> Result<Option<SessionId>> {
        let mut open = self.handler.open(id, &OpenRequest::read_only()).await?;
        let record = open.read().await;
        let _ = open.close().await;
        match record {
            Ok(record) => target_of(id, record),
            // What cannot be read can still be destroyed.
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Destroys what `removed` forwards to, if it does.
    pub(crate) async fn destroy_target(&self, id: &SessionId, removed: Option<Record>) -> Result<()> {
        match target_of(id, removed)? {
            Some(target) => self.destroy(target).await,
            None => Ok(()),
        }
    }

    /// Lets the forward that led to `id` live for no more than the grace time, since the visitor has the new id. Behind the
    /// request, and without harm if it fails: the forward then lives until it expires.
    fn forward_was_seen(self: &Arc<Self>, id: &SessionId, origin: &[u8]) {
        let Ok(old) = seal::open(origin, id, Purpose::Origin) else { return };
        let core = Arc::clone(self);
        self.janitor.run(async move {
            if let Err(error) = core.shorten_forward(&old).await {
                tracing::debug!(kind = %error.kind(), "a forward was left to expire by itself");
            }
        });
    }

    async fn shorten_forward(&self, old: &SessionId) -> Result<()> {
        let mut open = match self.handler.open(old, &OpenRequest::optimistic()).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let request = OpenRequest::exclusive(Duration::ZERO, self.settings.lease);
                self.handler.open(old, &request).await?
            }
            open => open?,
        };
        let change = match open.read().await?.map(|record| Payload::decode(record.data)) {
            Some(Ok(Payload::Forward(Forward { target, seen: false }))) => {
                let data = Payload::Forward(Forward { target, seen: true }).encode();
                Change::Write(Record::new(data, Ttl::new(self.settings.grace)))
            }
            _ => Change::Nothing,
        };
        open.save(&change, WriteId::random()?).await.map(|_| ())
    }

    pub(crate) fn new_data(&self) -> Data {
        let now = self.settings.clock.now_millis();
        let codec = self.settings.codec;
        Data { codec, created: now, authenticated: now, origin: None, realm: None, values: Default::default() }
    }

    /// What the absolute time-out leaves of a life; `None` if it is over. A stamp in the future counts as now.
    pub(crate) fn absolute_left(&self, data: &Data) -> Option<Duration> {
        let Some(limit) = self.settings.absolute_ttl else { return Some(Duration::MAX) };
        let age = self.settings.clock.now_millis().saturating_sub(data.created).max(0);
        limit.checked_sub(Duration::from_millis(age.unsigned_abs())).filter(|left| !left.is_zero())
    }

    /// The life that a write or touch gives: the idle time, or what the absolute time-out leaves.
    pub(crate) fn life(&self, data: &Data) -> Option<Ttl> {
        self.absolute_left(data).map(|left| Ttl::new(left.min(self.settings.ttl)))
    }
}

/// Where a record forwards to, if it is a forward; bytes that are nothing of ours forward nowhere.
fn target_of(id: &SessionId, record: Option<Record>) -> Result<Option<SessionId>> {
    match record.map(|record| Payload::decode(record.data)) {
        Some(Ok(Payload::Forward(forward))) => seal::open(&forward.target, id, Purpose::Forward).map(Some),
        _ => Ok(None),
    }
}
