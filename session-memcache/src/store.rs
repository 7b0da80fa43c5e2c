//! A session on its server: what is known of its items, asking for them, and what came back.
//!
//! What an answer means for a lock or a write is not known here.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use session_core::leased::Found;
use session_core::{Error, ErrorKind, LeaseToken, Record, Result, SessionId, Ttl, WriteId};
use tokio::sync::Mutex;

use crate::config::MemcacheConfig;
use crate::destroy::Graves;
use crate::item::{BESIDE, Body, Keys, left, process};
use crate::ring::Ring;
use crate::transport::{Answers, Command, Failure, Item, Life, Read, Transport};
use crate::wait::{Crowds, Turns};

pub(crate) struct Store {
    pub(crate) transport: Arc<dyn Transport>,
    ring: Ring,
    pub(crate) config: MemcacheConfig,
    /// How this handler calls itself in locks.
    pub(crate) process: String,
    pub(crate) turns: Turns,
    pub(crate) crowds: Crowds,
    pub(crate) graves: Graves,
    /// For what goes on after a caller has his answer.
    pub(crate) this: Weak<Self>,
}

/// A session on its server, and what one opening knows of it.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) keys: Keys,
    pub(crate) server: usize,
    /// Held over each flight that changes something, so a save waits for a renewal of its own lock.
    pub(crate) state: Mutex<State>,
}

/// What one opening knows of the items of its session.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) lock: Lock,
    /// What was last seen under the record's key, by whoever had the lock.
    pub(crate) seen: Option<Seen>,
    /// Whether a change was sent and not answered, so that what was seen may be out of date by our own doing.
    pub(crate) unsettled: bool,
}

/// What one opening knows of its lock.
#[derive(Debug, Default)]
pub(crate) enum Lock {
    /// Nothing: it may be ours.
    #[default]
    Unknown,
    /// It is ours while its item has this number.
    Ours { cas: u64, life: Life, value: Vec<u8> },
    /// It is not ours.
    Gone,
}

/// A record's item, as it was seen.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) cas: u64,
    pub(crate) life: Life,
    pub(crate) body: Body,
}

/// What was read of a record's item.
#[derive(Debug, Default)]
pub(crate) struct Look {
    pub(crate) seen: Option<Seen>,
    pub(crate) left: Option<u64>,
    /// Whether it was marked already when it was read.
    pub(crate) marked: bool,
}

impl Look {
    pub(crate) fn at(item: Option<Item>, life: Life) -> Result<Self, Failure> {
        let Some(item) = item else { return Ok(Self::default()) };
        match Body::parse(item.value) {
            Body::Foreign => Err(Failure::corrupt()),
            body => Ok(Self { seen: Some(Seen { cas: item.cas, life, body }), left: item.seconds, marked: item.marked }),
        }
    }

    pub(crate) fn body(&self) -> Option<&Body> {
        self.seen.as_ref().map(|seen| &seen.body)
    }

    pub(crate) fn is_live(&self) -> bool {
        self.body().is_some_and(Body::is_live)
    }

    /// Whether this write was the last.
    pub(crate) fn is_by(&self, id: WriteId) -> bool {
        matches!(self.body(), Some(Body::Live { last, .. }) if *last == id)
    }

    /// Returns what is left of its life.
    pub(crate) fn ttl(&self) -> Ttl {
        self.left.map_or(Ttl::MAX, left)
    }

    pub(crate) fn found(&self) -> Found {
        match self.body() {
            Some(Body::Live { last, data, .. }) => {
                Found::Live { last: *last, record: Record::new(data.clone(), self.ttl()) }
            }
            Some(Body::Buried(grave)) => Found::Buried { mark: grave.mark },
            None | Some(Body::Stub | Body::Foreign) => Found::Absent,
        }
    }
}

/// The lock that a handler of this process takes.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) token: LeaseToken,
    pub(crate) lease: Duration,
}

impl Store {
    pub(crate) fn new(transport: Arc<dyn Transport>, config: MemcacheConfig) -> Result<Arc<Self>> {
        let nonce = WriteId::random()?.to_bytes();
        let ring = Ring::new(config.servers.iter().map(|server| (&*server.host, server.port, server.weight)));
        Ok(Arc::new_cyclic(|this| Self {
            transport,
            ring,
            process: process([nonce[0], nonce[1], nonce[2], nonce[3]]),
            turns: Turns::default(),
            crowds: Crowds::default(),
            graves: Graves::default(),
            config,
            this: this.clone(),
        }))
    }

    /// Has every server say what it is. One that cannot be reached fails later those whose sessions it has; if that is all of
    /// them, it is said now.
    pub(crate) async fn greet(&self) -> Result<()> {
        let mut unreachable = None;
        let mut reached = false;
        for server in 0..self.transport.servers() {
            match self.transport.exchange(server, Vec::new(), None).await {
                Ok(_) => reached = true,
                Err(failure) if failure.kind == ErrorKind::Unavailable => {
                    let error = failure.into_error("connect");
                    tracing::warn!(%error, "a server is left out for now");
                    unreachable = Some(error);
                }
                Err(failure) => return Err(failure.into_error("connect")),
            }
        }
        match unreachable {
            Some(error) if !reached => Err(error),
            _ => Ok(()),
        }
    }

    pub(crate) fn at(&self, id: &SessionId) -> Place {
        let failover = self.config.failover;
        let server = self.ring.server(id.as_str(), |server| failover && self.transport.is_down(server));
        Place { keys: Keys::new(&self.config.prefix, id), server, state: Mutex::default() }
    }

    /// Returns how many bytes a payload may have.
    pub(crate) fn limit(&self) -> usize {
        // Beside the payload an item has its key, and what the server keeps with it.
        let held = self.transport.item_limit().saturating_sub(BESIDE + 250 + 64);
        self.config.max_bytes.map_or(held, |bytes| bytes.min(held))
    }

    pub(crate) fn new_claim(lease: Duration) -> Result<Claim> {
        Ok(Claim { token: LeaseToken::random()?, lease })
    }

    /// Sends commands for one session in one flight.
    pub(crate) async fn ask(&self, place: &Place, commands: Vec<Command>, life: Option<Life>) -> Result<Answers, Failure> {
        self.transport.exchange(place.server, commands, life).await
    }

    /// Reads the record as it is now.
    pub(crate) async fn read(&self, place: &Place, what: Read) -> Result<Look, Failure> {
        let commands = || vec![get(&place.keys.record, what)];
        let asked = match self.ask(place, commands(), None).await {
            Err(failure) if failure.passing => self.ask(place, commands(), None).await,
            asked => asked,
        };
        let mut answers = asked?;
        Look::at(answers.item()?, answers.life)
    }

    /// Takes note of who is next in line for a lock that was just given back.
    pub(crate) fn note_next(&self, place: &Place, next: Option<&Item>) {
        if next.is_some_and(|next| next.value != self.process.as_bytes()) {
            self.crowds.note(&place.keys.lock);
        } else {
            self.turns.wake(&place.keys.lock);
        }
    }
}

pub(crate) fn get(key: &Arc<str>, what: Read) -> Command {
    Command::Get { key: key.clone(), what }
}

pub(crate) fn delete(key: &Arc<str>, cas: u64) -> Command {
    Command::Delete { key: key.clone(), unchanged: Some(cas) }
}

/// Makes the error of a wait that is over.
pub(crate) fn lock_timeout(operation: &'static str, wait: Duration, owner: Option<&[u8]>) -> Error {
    let fact = format!("the lock was not free within {} ms", wait.as_millis());
    Error::new(ErrorKind::LockTimeout, operation, fact).with_holder(owner.and_then(crate::item::holder))
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("config", &self.config).field("transport", &self.transport).finish_non_exhaustive()
    }
}
