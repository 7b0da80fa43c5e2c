//! One request's dealings with its session, from the cookie to the notice that goes back: shared by the layer and by all that the
//! handler has asked for.
//!
//! Nothing here knows how an id is written or what a response looks like.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use http::{Extensions, HeaderMap, HeaderValue};
use session_core::{ErrorKind, Session, SessionId, SessionView, Sessions};
use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};

use crate::error::{Answer, Error, Result};
use crate::layer::Shared;
use crate::mode::{Kind, Mode};
use crate::presented::Presented;
use crate::transport::Notice;

/// A response that comes later than this after its id was stored asks the store what has become of the id: a rotate or a logout
/// may have overtaken it, and the visitor must not be given an id that leads nowhere in place of a newer one.
const LATE: Duration = Duration::from_secs(1);

pub(crate) struct Visit {
    shared: Arc<Shared>,
    fields: Vec<HeaderValue>,
    presented: OnceLock<Presented>,
    mode: Mutex<Mode>,
    known: Mutex<Known>,
    state: AsyncMutex<State>,
    /// What was last read without a lock. Apart from `state`: a view does not wait for somebody who waits for the lock.
    seen: AsyncMutex<Option<Arc<SessionView>>>,
    touched: AtomicBool,
    panicked: AtomicBool,
}

/// Which id is the visitor's.
#[derive(Clone, Debug)]
enum Known {
    /// The one that he came with, if any.
    Presented,
    /// This one, since then.
    Stored(SessionId, Instant),
    /// None any more.
    Destroyed,
}

/// What is open.
pub(crate) struct State {
    session: Option<Session>,
    /// Counts how often it was given up: who has read what was read before must not write what is written after.
    epoch: u64,
    /// The application goes on without a session: nothing is stored.
    without: bool,
    locked: bool,
    ended: bool,
}

/// A handle's way in: which state of the session it has seen. Zero is none.
#[derive(Debug, Default)]
pub(crate) struct Ticket(AtomicU64);

impl Visit {
    pub(crate) fn new(shared: Arc<Shared>, headers: &HeaderMap) -> Self {
        let (fields, mode) = (shared.transport.fields(headers), Mutex::new(shared.mode));
        let state = State { session: None, epoch: 1, without: false, locked: false, ended: false };
        Self {
            shared,
            fields,
            presented: OnceLock::new(),
            mode,
            known: Mutex::new(Known::Presented),
            state: AsyncMutex::new(state),
            seen: AsyncMutex::new(None),
            touched: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        }
    }

    pub(crate) fn of(extensions: &Extensions) -> Option<&Arc<Self>> {
        extensions.get()
    }

    pub(crate) fn sessions(&self) -> &Sessions {
        &self.shared.sessions
    }

    pub(crate) fn mode(&self) -> Mode {
        *guard(&self.mode)
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        *guard(&self.mode) = mode;
    }

    /// Whether anybody has asked for the session.
    pub(crate) fn is_touched(&self) -> bool {
        self.touched.load(Ordering::Relaxed)
    }

    /// Whether a handler that held the session has panicked.
    pub(crate) fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::Relaxed)
    }

    pub(crate) fn note_panic(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    fn presented(&self) -> &Presented {
        self.presented.get_or_init(|| self.shared.transport.read(&self.fields))
    }

    fn current(&self) -> Option<SessionId> {
        match &*guard(&self.known) {
            Known::Presented => self.presented().id.clone(),
            Known::Stored(id, _) => Some(id.clone()),
            Known::Destroyed => None,
        }
    }

    fn know(&self, id: &SessionId) {
        *guard(&self.known) = Known::Stored(id.clone(), Instant::now());
    }

    /// Returns the open session, after opening it if nobody has.
    pub(crate) async fn open(&self, mode: Mode, ticket: &Ticket) -> Result<Open<'_>> {
        let mut state = self.enter(ticket).await?;
        if mode.kind == Kind::ReadOnly && state.session.is_none() {
            let message = "this route only reads its sessions (Mode::read_only)";
            return Err(self.refuse(session_core::Error::new(ErrorKind::Unsupported, "open", message)));
        }
        if state.session.is_none() {
            let sessions = mode.apply(self.sessions());
            // On the heap, as all that asks the store: a handler carries the room for each of its calls, and is itself passed on by value.
            let opened = match self.current() {
                None => sessions.create(),
                Some(id) if mode.kind == Kind::Merge => Box::pin(sessions.merge(&id)).await,
                Some(id) => Box::pin(sessions.open(&id)).await,
            };
            (state.without, state.locked) = (false, mode.kind == Kind::Exclusive);
            state.session = Some(match opened {
                Ok(session) => session,
                Err(error) => {
                    self.go_on_after(error)?;
                    state.without = true;
                    sessions.create()?
                }
            });
        }
        Ok(Open(state))
    }

    /// Lets a handle in that has seen nothing, or the state that is open now.
    async fn enter(&self, ticket: &Ticket) -> Result<AsyncMutexGuard<'_, State>> {
        self.touched.store(true, Ordering::Relaxed);
        let state = self.state.lock().await;
        if state.ended {
            let message = "the response is on its way, and what is changed now would be lost";
            return Err(self.refuse(session_core::Error::new(ErrorKind::Config, "open", message)));
        }
        match ticket.0.load(Ordering::Relaxed) {
            0 => ticket.0.store(state.epoch, Ordering::Relaxed),
            seen if seen == state.epoch => {}
            _ => {
                let message = "released by another part of this request since this one has read it";
                return Err(self.refuse(session_core::Error::new(ErrorKind::Fenced, "open", message)));
            }
        }
        Ok(state)
    }

    /// Returns the last committed state, without waiting for anybody.
    pub(crate) async fn view(&self) -> Result<Arc<SessionView>> {
        self.touched.store(true, Ordering::Relaxed);
        let mut seen = self.seen.lock().await;
        if let Some(view) = &*seen {
            return Ok(Arc::clone(view));
        }
        let read = match self.current() {
            Some(id) => Box::pin(self.sessions().view(&id)).await,
            None => Box::pin(self.nothing()).await,
        };
        let view = match read {
            Ok(view) => view,
            Err(error) => {
                self.go_on_after(error)?;
                Box::pin(self.nothing()).await?
            }
        };
        Ok(Arc::clone(seen.insert(Arc::new(view))))
    }

    /// A view of a session that is nowhere; makes no trip.
    async fn nothing(&self) -> session_core::Result<SessionView> {
        self.sessions().create()?.release().await
    }

    /// Stores what was changed and keeps the lock.
    pub(crate) async fn save(&self, mode: Mode, ticket: &Ticket) -> Result<()> {
        let mut open = self.open(mode, ticket).await?;
        let state = &mut *open.0;
        if state.without {
            return Ok(());
        }
        let session = state.session.as_mut().expect("it was opened a line above");
        let outcome = match check_retired(session) {
            Ok(()) => session.save().await,
            retired => retired,
        };
        match outcome {
            Ok(()) if session.is_new() || session.is_retired() => Ok(()),
            Ok(()) => {
                self.know(session.id());
                *self.seen.lock().await = None;
                Ok(())
            }
            Err(error) => {
                if !error.kind().keeps_opening() {
                    // Spent; the next one to ask opens it anew.
                    state.session = None;
                    state.epoch += 1;
                }
                Err(self.refuse(error))
            }
        }
    }

    /// Stores what was changed and gives the lock back. Goes on if the caller is dropped: an id that a rotate or a login has made
    /// must be known when the response is made.
    pub(crate) async fn release(self: &Arc<Self>, ticket: Ticket) -> Result<()> {
        let visit = Arc::clone(self);
        let released = tokio::spawn(async move {
            let mut state = visit.enter(&ticket).await?;
            let Some(session) = state.session.take() else { return Ok(()) };
            state.epoch += 1;
            if state.without {
                return Ok(());
            }
            check_retired(&session).map_err(|error| visit.refuse(error))?;
            let tells = state.locked || session.is_changed();
            let view = session.release().await.map_err(|error| visit.refuse(error))?;
            if let Some(id) = view.id().filter(|_| tells) {
                visit.know(id);
            }
            *visit.seen.lock().await = Some(Arc::new(view));
            Ok(())
        });
        released.await.unwrap_or_else(|error| {
            let message = "the task that released it ended before it answered (panic or shutdown)";
            Err(self.refuse(session_core::Error::new(ErrorKind::Unknown, "release", message).with_source(error)))
        })
    }

    /// Destroys the session, open or not, without waiting for whoever else holds it.
    pub(crate) async fn destroy(&self, ticket: &Ticket) -> Result<()> {
        let mut state = self.enter(ticket).await?;
        let outcome = match state.session.take() {
            Some(session) => session.destroy().await,
            None => match self.current() {
                Some(id) => self.sessions().destroy(&id).await,
                None => Ok(()),
            },
        };
        state.epoch += 1;
        ticket.0.store(state.epoch, Ordering::Relaxed);
        outcome.map_err(|error| self.refuse(error))?;
        *guard(&self.known) = Known::Destroyed;
        *self.seen.lock().await = None;
        Ok(())
    }

    /// Ends the visit: saves or discards what is open, gives the lock back, and returns what the visitor has to be told.
    pub(crate) async fn end(&self, keep: bool) -> (Notice, Result<()>) {
        let mut state = self.state.lock().await;
        state.ended = true;
        let outcome = match state.session.take() {
            None => Ok(()),
            Some(_) if state.without => Ok(()),
            Some(session) if !keep => {
                tracing::debug!("what a failed request changed in its session is discarded");
                // The lock then ends with its lease.
                let _ = Box::pin(session.abort()).await;
                Ok(())
            }
            Some(session) => {
                // One that was neither locked nor changed is as good as a view: what it has read may be old, its id included.
                let tells = state.locked || session.is_changed();
                let closed = match check_retired(&session) {
                    Ok(()) => session.close().await,
                    Err(error) => Err(error),
                };
                match closed {
                    Ok(id) => {
                        id.iter().filter(|_| tells).for_each(|id| self.know(id));
                        Ok(())
                    }
                    Err(error) => self.go_on_after(error),
                }
            }
        };
        drop(state);
        (self.notice().await, outcome)
    }

    async fn notice(&self) -> Notice {
        let known = guard(&self.known).clone();
        let presented = self.presented();
        match known {
            Known::Presented => Notice::Nothing,
            Known::Destroyed if presented.sent => Notice::Forget,
            Known::Destroyed => Notice::Nothing,
            Known::Stored(id, _) if presented.id.as_ref() == Some(&id) && !presented.outdated => Notice::Nothing,
            Known::Stored(id, stored) if stored.elapsed() > LATE => match Box::pin(self.sessions().view(&id)).await {
                Ok(view) => view.id().cloned().map_or(Notice::Nothing, Notice::Keep),
                // A new visitor's session would be lost for certain.
                Err(_) => Notice::Keep(id),
            },
            Known::Stored(id, _) => Notice::Keep(id),
        }
    }

    /// Asks the application what a failure means; going on is no error.
    fn go_on_after(&self, error: session_core::Error) -> Result<()> {
        match self.answer(&error) {
            Answer::Respond(response) => Err(Error::new(error, response)),
            Answer::GoOn => Ok(()),
        }
    }

    /// Makes the error of a call that cannot go on without a session.
    pub(crate) fn refuse(&self, error: session_core::Error) -> Error {
        match self.answer(&error) {
            Answer::Respond(response) => Error::new(error, response),
            Answer::GoOn => error.into(),
        }
    }

    fn answer(&self, error: &session_core::Error) -> Answer {
        tracing::warn!(kind = %error.kind(), "session: {error}");
        (self.shared.on_error)(error)
    }
}

/// The session, open, for as long as a call works on it.
pub(crate) struct Open<'a>(AsyncMutexGuard<'a, State>);

impl Open<'_> {
    pub(crate) fn session(&mut self) -> &mut Session {
        self.0.session.as_mut().expect("it is opened before it is lent")
    }
}

/// Refuses what was put into the session of an id that a login has retired: it would be stored nowhere.
fn check_retired(session: &Session) -> session_core::Result<()> {
    if !session.is_retired() || session.keys().next().is_none() {
        return Ok(());
    }
    let message = "a login has given this session a new id, and the request came with the old one";
    Err(session_core::Error::new(ErrorKind::Gone, "save", message))
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while these are held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
