//! The server or servers of one handler, and the two things that handler and lock both do there: ask, and take a lock.
//!
//! It knows keys and scripts; what may be written, and what an answer means for an opening, it does not.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use redis::{Cmd, Pipeline, ServerErrorKind, Value};
use session_core::leased::{Found, Want};
use session_core::{Error, ErrorKind, Result, SessionId, WriteId};
use tokio::runtime::Handle;

use crate::cluster::{Cluster, Node};
use crate::config::{RedisConfig, RedisWake};
use crate::layout::{Body, Keys, TokenText, channel, holder, is_lock, lock_value, record};
use crate::link::{Failure, Link, error_kind};
use crate::replicas::Replicas;
use crate::scripts::{Script, Scripts};
use crate::waiters::{PassOn, Subscribe, Waiter, Waiters};

/// How long the place of a task that gave up waits for the next task of this process.
const HEIR: Duration = Duration::from_millis(20);

/// When a lock that nobody wants is given back to a server that did not take it back before.
const PAUSES: [Duration; 3] = [Duration::from_millis(50), Duration::from_millis(250), Duration::from_secs(1)];

/// How long a place in the queue is worth at most before the one who stands there looks again: the time that a dead waiter
/// before him may keep the lock.
const CLAIM: Duration = Duration::from_secs(1);

/// The first and the longest pause of a waiter who asks again and again.
const POLL: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// The servers.
#[derive(Debug)]
pub(crate) enum Servers {
    One { link: Link, replicas: Option<Replicas> },
    Cluster(Cluster),
}

pub(crate) struct Store {
    pub(crate) servers: Arc<Servers>,
    pub(crate) config: RedisConfig,
    pub(crate) scripts: Scripts,
    waiters: Waiters,
    /// Places in queues whose tasks gave up, for a moment.
    places: Mutex<HashMap<Box<str>, TokenText>>,
}

impl Store {
    pub(crate) fn new(servers: Servers, config: RedisConfig) -> Result<Arc<Self>> {
        let nonce: String = WriteId::random()?.to_bytes()[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        let cluster = matches!(servers, Servers::Cluster(_));
        let servers = Arc::new(servers);
        Ok(Arc::new_cyclic(|this: &Weak<Self>| {
            let source = servers.clone();
            let subscribe: Subscribe = Arc::new(move || {
                let source = source.clone();
                Box::pin(async move {
                    let client = match &*source {
                        Servers::One { link, .. } => link.maker().client().await?,
                        Servers::Cluster(cluster) => cluster.any_client().await?,
                    };
                    client.get_async_pubsub().await
                })
            });
            let this = this.clone();
            let pass_on: PassOn = Arc::new(move |token, record| {
                if let Some(store) = this.upgrade() {
                    store.pass_on(token, record);
                }
            });
            let channel = channel(&config.prefix, &nonce);
            Self {
                waiters: Waiters::new(channel, subscribe, pass_on),
                scripts: Scripts::new(!cluster, config.strict_expiry),
                places: Mutex::default(),
                servers,
                config,
            }
        }))
    }

    /// Asks the server for an answer of any kind, and gives it the scripts, so that no request has to. Whether waiters may be told is
    /// asked too: a script that may not tell them would not say so, and leave them to their sleep.
    pub(crate) async fn greet(&self) -> Result<(), Failure> {
        let mut greeting = Pipeline::with_capacity(7);
        greeting.cmd("PING").cmd("PUBLISH").arg(channel(&self.config.prefix, "")).arg("");
        for load in self.scripts.load() {
            greeting.add_command(load);
        }
        match &*self.servers {
            Servers::One { link, .. } => {
                // Whoever may not load scripts sends each of them whole with its first call.
                let answers = link.ask(&greeting).await?;
                let refusal = answers.iter().take(2).find_map(|answer| match answer {
                    Value::ServerError(error) => Some(Failure::refused(error)),
                    _ => None,
                });
                refusal.map_or(Ok(()), Err)
            }
            Servers::Cluster(cluster) => {
                for node in cluster.masters().await? {
                    // One that is down now is asked again by whoever needs it.
                    let _ = node.link.ask(&greeting).await;
                }
                Ok(())
            }
        }
    }

    pub(crate) fn keys(&self, id: &SessionId) -> Keys {
        Keys::new(&self.config.prefix, id)
    }

    /// Returns the value of a lock that this handler takes now.
    pub(crate) fn lock_value(&self, token: &TokenText, lease: Duration) -> Vec<u8> {
        lock_value(token, lease, self.waiters.channel())
    }

    async fn ask_once(&self, keys: &Keys, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        match &*self.servers {
            Servers::One { link, .. } => link.ask(commands).await,
            // On the heap, so that whoever has one server does not carry the room for it.
            Servers::Cluster(cluster) => Box::pin(cluster.ask(keys.slot(), commands)).await,
        }
    }

    /// Sends commands of one session in one flight. What fails in passing is tried once more, so they must bear that.
    pub(crate) async fn ask(&self, keys: &Keys, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        self.ask_twice(keys, commands).await.map(|(answers, _)| answers)
    }

    /// The same, and says whether the answers are those to a repeat.
    async fn ask_twice(&self, keys: &Keys, commands: &Pipeline) -> Result<(Vec<Value>, bool), Failure> {
        let sent = match self.ask_once(keys, commands).await {
            Ok(answers) if !answers.iter().any(|answer| error_kind(answer) == Some(ServerErrorKind::ReadOnly)) => {
                return Ok((answers, false));
            }
            Ok(_) => false,
            Err(failure) if !failure.passing => return Err(failure),
            Err(failure) => failure.sent,
        };
        let repeated = self.ask_once(keys, commands).await;
        repeated.map(|answers| (answers, true)).map_err(|mut failure| {
            failure.sent |= sent;
            failure
        })
    }

    /// Runs a script that may be run twice.
    pub(crate) async fn run(&self, keys: &Keys, script: &Script, args: &[&[u8]]) -> Result<Value, Failure> {
        for whole in [false, true] {
            let mut commands = Pipeline::with_capacity(1);
            commands.add_command(script.call(keys, args, whole));
            match only(self.ask(keys, &commands).await?)? {
                answer if error_kind(&answer) == Some(ServerErrorKind::NoScript) => {}
                Value::ServerError(error) => return Err(Failure::refused(&error)),
                answer => return Ok(answer),
            }
        }
        Err(Failure::unexpected("the server does not keep a script that it was just given"))
    }

    /// Runs a script that changes a record, once and once more if that is not answered; says whether the first may have been
    /// carried out although it was not answered. With `wait_replicas` the answer counts only once they have it.
    pub(crate) async fn run_once(&self, keys: &Keys, script: &Script, args: &[&[u8]]) -> (Result<Value, Failure>, bool) {
        let mut sent = false;
        let mut whole = false;
        let mut tries = 0;
        loop {
            let outcome = self.change_once(keys, script.call(keys, args, whole)).await;
            let failure = match outcome {
                Ok(answer) if error_kind(&answer) == Some(ServerErrorKind::NoScript) && !whole => {
                    whole = true;
                    continue;
                }
                Ok(Value::ServerError(error)) => Failure::refused(&error),
                Ok(answer) => return (Ok(answer), sent),
                Err(failure) => failure,
            };
            sent |= failure.sent;
            tries += 1;
            if tries == 2 || !failure.passing {
                return (Err(failure), sent);
            }
        }
    }

    async fn change_once(&self, keys: &Keys, call: Cmd) -> Result<Value, Failure> {
        if self.config.wait_replicas > 0 {
            return Box::pin(self.change_on_replicas(keys, call)).await;
        }
        let mut commands = Pipeline::with_capacity(1);
        commands.add_command(call);
        only(self.ask_once(keys, &commands).await?)
    }

    async fn change_on_replicas(&self, keys: &Keys, call: Cmd) -> Result<Value, Failure> {
        let (node, replicas);
        let cluster = match &*self.servers {
            Servers::One { replicas: one, .. } => {
                replicas = one.as_ref();
                None
            }
            Servers::Cluster(cluster) => {
                node = cluster.owner(keys.slot()).await?;
                replicas = node.replicas.as_ref();
                Some(cluster)
            }
        };
        let replicas = replicas.ok_or_else(|| Failure::unexpected("a server without a connection for its replicas"))?;
        let asked = replicas.ask(call).await;
        if let Some(cluster) = cluster {
            let moved = |answer: &Value| matches!(error_kind(answer), Some(ServerErrorKind::Moved | ServerErrorKind::Ask));
            match &asked {
                Ok((answer, _)) if moved(answer) => {
                    let _ = cluster.refresh().await;
                    return Err(Failure::uncovered());
                }
                Ok(_) => {}
                Err(_) => {
                    let _ = cluster.refresh().await;
                }
            }
        }
        let (answer, have) = asked?;
        // What was refused is in force nowhere, so there is nothing to wait for.
        let applied = matches!(&answer, Value::Int(1..)) || matches!(&answer, Value::Array(_));
        if applied && have < i64::from(replicas.wanted()) {
            return Err(Failure::too_few(have, replicas.wanted()));
        }
        Ok(answer)
    }

    /// Sends one command each for many sessions, in one flight to each server.
    pub(crate) async fn ask_many(&self, commands: Vec<(u16, Cmd)>) -> Vec<Result<Value, Failure>> {
        match &*self.servers {
            Servers::One { link, .. } => {
                let mut flight = Pipeline::with_capacity(commands.len());
                for (_, command) in commands.iter().cloned() {
                    flight.add_command(command);
                }
                spread(link.ask(&flight).await, commands.len())
            }
            Servers::Cluster(cluster) => {
                let mut flights: HashMap<usize, (Arc<Node>, Vec<usize>, Pipeline)> = HashMap::new();
                let mut outcomes: Vec<Option<Result<Value, Failure>>> = commands.iter().map(|_| None).collect();
                for (index, (slot, command)) in commands.iter().enumerate() {
                    match cluster.owner(*slot).await {
                        Ok(node) => {
                            let flight = flights
                                .entry(Arc::as_ptr(&node).addr())
                                .or_insert_with(|| (node, Vec::new(), Pipeline::new()));
                            flight.1.push(index);
                            flight.2.add_command(command.clone());
                        }
                        Err(failure) => outcomes[index] = Some(Err(failure)),
                    }
                }
                for (node, indices, flight) in flights.into_values() {
                    let answers = spread(node.link.ask(&flight).await, indices.len());
                    if answers.iter().any(|answer| !matches!(answer, Ok(Value::Int(_)))) {
                        let _ = cluster.refresh().await;
                    }
                    for (index, answer) in indices.into_iter().zip(answers) {
                        outcomes[index] = Some(answer);
                    }
                }
                outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(Failure::uncovered()))).collect()
            }
        }
    }

    /// Reads a record as it is now.
    pub(crate) async fn read_record(&self, keys: &Keys) -> Result<Found, Failure> {
        let mut commands = Pipeline::with_capacity(2);
        commands.add_command(command(&[b"GET", keys.record.as_bytes()]));
        commands.add_command(command(&[b"PTTL", keys.record.as_bytes()]));
        let [body, left] = answers(self.ask(keys, &commands).await?)?;
        let (body, left) = look_at(body, &left)?;
        found(body, left)
    }

    /// Takes the lock of a session, waiting for it if there is time, and reads the record in the same flight. Returns what is there and
    /// whether the holder before released, or nothing if a record is missing.
    ///
    /// While nobody waits these are plain commands, which cost the server less than a script. Whoever does not get the lock by
    /// them runs a script, which knows him by his token: a repeat of a `SET` finds the lock taken, by itself (`protocol.md` 11).
    #[allow(clippy::too_many_arguments, reason = "what was asked, and the lock that it is asked for with")]
    pub(crate) async fn take(
        self: &Arc<Self>,
        operation: &'static str,
        keys: &Arc<Keys>,
        want: Want,
        wait: Duration,
        lease: Duration,
        token: &TokenText,
        value: &[u8],
    ) -> Result<Option<(Found, bool)>> {
        let began = Instant::now();
        let lease_ms = millis(lease);
        let mut commands = Pipeline::with_capacity(4);
        let lease_text = lease_ms.to_string();
        commands.add_command(command(&[b"SET", keys.lock.as_bytes(), value, b"NX", b"PX", lease_text.as_bytes()]));
        commands.add_command(command(&[b"EXISTS", keys.queue.as_bytes()]));
        if want != Want::Lock {
            commands.add_command(command(&[b"GET", keys.record.as_bytes()]));
            commands.add_command(command(&[b"PTTL", keys.record.as_bytes()]));
        }
        let mut attempt = Attempt { store: self, keys, token: *token, armed: true };
        let asked = self.ask_twice(keys, &commands).await.map_err(|failure| {
            attempt.armed = failure.sent;
            failure.into_error(operation)
        });
        let (answers, repeated) = asked?;
        let flight = match Flight::parse(answers, want) {
            Ok(flight) => flight,
            Err(failure) => {
                attempt.give_up().await;
                return Err(failure.into_error(operation));
            }
        };
        let Flight { mine, queued, body, mut left } = flight;
        if want == Want::Existing && !matches!(body, Body::Live { .. }) {
            // A repeat may have found its own lock.
            attempt.armed = false;
            if mine || repeated {
                attempt.give_up().await;
            }
            return Ok(None);
        }
        if mine && !queued {
            if !matches!(body, Body::Live { .. }) || left >= 2 * lease_ms {
                attempt.armed = false;
                return found(body, left).map(|found| Some((found, false))).map_err(|failure| failure.into_error(operation));
            }
            // It would end before the hold does.
            let renewed = Box::pin(self.run(keys, &self.scripts.renew, &[token, lease_text.as_bytes(), b"1"])).await;
            match renewed.and_then(|answer| int(&answer)) {
                Ok(1) => {
                    left = 2 * lease_ms;
                    attempt.armed = false;
                    return found(body, left)
                        .map(|found| Some((found, false)))
                        .map_err(|failure| failure.into_error(operation));
                }
                // It ended between the two flights: what is there now is asked for under the lock.
                Ok(_) => {}
                Err(failure) => {
                    attempt.give_up().await;
                    return Err(failure.into_error(operation));
                }
            }
        }
        // On the heap, so that whoever need not wait does not carry the room for it.
        Box::pin(self.queue_up(operation, &mut attempt, want, wait, lease, value, began)).await
    }

    /// Takes a place in the queue and waits there; with [`RedisWake::Poll`] it takes none, and looks again and again.
    #[allow(clippy::too_many_arguments, reason = "the second half of one function")]
    async fn queue_up(
        self: &Arc<Self>,
        operation: &'static str,
        attempt: &mut Attempt<'_>,
        want: Want,
        wait: Duration,
        lease: Duration,
        value: &[u8],
        began: Instant,
    ) -> Result<Option<(Found, bool)>> {
        let keys = attempt.keys;
        let lease_ms = millis(lease).to_string();
        let polls = self.config.wake == RedisWake::Poll;
        let mut tries = 0;
        // First of all, since a new subscription wakes whoever is registered.
        if !wait.is_zero() && !polls {
            self.waiters.listen(wait.min(CLAIM)).await;
        }
        // Before the server is told: the grant may come before its answer.
        let waiter: Waiter = self.waiters.register(attempt.token);
        let heir = self.places.lock().unwrap_or_else(PoisonError::into_inner).remove(&keys.record);
        let mut heir: Vec<u8> = heir.map(|token| token.to_vec()).unwrap_or_default();
        let mut queued: &[u8] = b"0";
        loop {
            let rest = wait.saturating_sub(began.elapsed());
            let rest_ms = if polls { 0 } else { rest.as_millis() }.to_string();
            let args: [&[u8]; 7] =
                [&attempt.token, value, lease_ms.as_bytes(), rest_ms.as_bytes(), word(want), queued, &heir];
            let answer = match self.run(keys, &self.scripts.enter, &args).await {
                Ok(answer) => answer,
                Err(failure) => {
                    attempt.give_up().await;
                    return Err(failure.into_error(operation));
                }
            };
            let entered = match Entered::parse(answer) {
                Ok(entered) => entered,
                Err(failure) => {
                    attempt.give_up().await;
                    return Err(failure.into_error(operation));
                }
            };
            match entered {
                Entered::Absent => {
                    attempt.armed = false;
                    return Ok(None);
                }
                Entered::Granted { body: Body::Foreign, .. } => {
                    attempt.give_up().await;
                    return Err(foreign().into_error(operation));
                }
                Entered::Granted { body, left, clean } => {
                    attempt.armed = false;
                    return found(body, left)
                        .map(|found| Some((found, clean)))
                        .map_err(|failure| failure.into_error(operation));
                }
                Entered::Busy { owner: Some(owner), .. } if !is_lock(&owner) => {
                    attempt.give_up().await;
                    return Err(foreign_lock().into_error(operation));
                }
                Entered::Busy { owner, .. } if rest < Duration::from_millis(1) => {
                    if wait.is_zero() || polls {
                        // It never had a place.
                        attempt.armed = false;
                    } else {
                        self.leave_place(attempt, waiter);
                    }
                    return Err(lock_timeout(operation, wait, owner.as_deref()));
                }
                Entered::Busy { .. } if polls => {
                    let pause = (POLL.0 * (1 << tries.min(5))).min(POLL.1);
                    // Between half and one and a half of it, so that two who met once do not meet again.
                    let share = f64::from(attempt.token[tries % 32] % 16) / 16.0;
                    tokio::time::sleep(rest.min(pause.mul_f64(0.5 + share))).await;
                    tries += 1;
                }
                Entered::Busy { lease_left, place, .. } => {
                    // A little later than the lease ends, and not all at the same moment.
                    let jitter = Duration::from_micros(1000 + u64::from(attempt.token[0]) * 31);
                    let lease_left = Duration::from_millis(lease_left) + jitter;
                    let sleep = rest.min(lease_left).min(CLAIM * place.max(1)).max(Duration::from_millis(1));
                    waiter.woken(sleep).await;
                    queued = b"1";
                    heir.clear();
                }
            }
        }
    }

    /// Leaves the place of a task whose time is over to the next task of this process, for a moment (`protocol.md` 13).
    fn leave_place(self: &Arc<Self>, attempt: &mut Attempt<'_>, waiter: Waiter) {
        let Ok(runtime) = Handle::try_current() else { return };
        attempt.armed = false;
        let (store, record, token) = (self.clone(), attempt.keys.record.clone(), attempt.token);
        let before = self.places.lock().unwrap_or_else(PoisonError::into_inner).insert(record.clone(), token);
        runtime.spawn(async move {
            if let Some(before) = before {
                store.give_up(&Keys::of(record.clone().into()), before, true).await;
            }
            tokio::time::sleep(HEIR).await;
            let mine = {
                let mut places = store.places.lock().unwrap_or_else(PoisonError::into_inner);
                let mine = places.get(&record) == Some(&token);
                if mine {
                    places.remove(&record);
                }
                mine
            };
            if mine {
                store.give_up(&Keys::of(record.into()), token, true).await;
            }
            // Until here a grant for this place was nobody's to pass on.
            drop(waiter);
        });
    }

    async fn release_once(&self, keys: &Keys, token: TokenText, clean: bool) -> Result<(), Failure> {
        let clean: &[u8] = if clean { b"1" } else { b"0" };
        let mut commands = Pipeline::with_capacity(1);
        // Whole, because a server that does not answer in time could not say either that it has forgotten the script.
        commands.add_command(self.scripts.release.call(keys, &[&token, clean, b"0"], true));
        int(&only(self.ask(keys, &commands).await?)?).map(drop)
    }

    /// Gives up whatever `token` has, also to a server that comes back a moment later; otherwise that ends with its lease.
    async fn give_up(&self, keys: &Keys, token: TokenText, clean: bool) {
        let mut pauses = PAUSES.iter();
        while let Err(failure) = self.release_once(keys, token, clean).await {
            match pauses.next() {
                Some(pause) if failure.kind() == ErrorKind::Unavailable => tokio::time::sleep(*pause).await,
                _ => {
                    tracing::debug!(kind = %failure.kind(), "a lock could not be given back and ends with its lease");
                    return;
                }
            }
        }
    }

    /// The same without waiting for it, and from outside a runtime not at all.
    pub(crate) fn give_up_later(self: &Arc<Self>, keys: Arc<Keys>, token: TokenText, clean: bool) {
        if let Ok(runtime) = Handle::try_current() {
            let store = self.clone();
            runtime.spawn(async move { store.give_up(&keys, token, clean).await });
        }
    }

    fn pass_on(self: Arc<Self>, token: TokenText, record: String) {
        let inherited = self.places.lock().unwrap_or_else(PoisonError::into_inner).get(record.as_str()) == Some(&token);
        let Ok(runtime) = Handle::try_current() else { return };
        if !inherited && record.starts_with(&*self.config.prefix) {
            runtime.spawn(async move {
                let keys = Keys::of(record);
                let outcome = self.run(&keys, &self.scripts.release, &[&token, b"1", b"2"]).await;
                if let Err(failure) = outcome {
                    tracing::debug!(kind = %failure.kind(), "a grant could not be passed on and ends with its time");
                }
            });
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("config", &self.config)
            .field("servers", &self.servers)
            .field("waiters", &self.waiters)
            .finish_non_exhaustive()
    }
}

/// A request for a lock under way. Dropped before its end, or after an answer that did not come, it is withdrawn in the background,
/// under its own token: on the same connection the withdrawal arrives behind it.
struct Attempt<'a> {
    store: &'a Arc<Store>,
    keys: &'a Arc<Keys>,
    token: TokenText,
    armed: bool,
}

impl Attempt<'_> {
    async fn give_up(&mut self) {
        // What fails is tried again behind the caller's back.
        self.armed = Box::pin(self.store.release_once(self.keys, self.token, true)).await.is_err();
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.store.give_up_later(self.keys.clone(), self.token, true);
        }
    }
}

/// The answers to the flight that takes a lock while nobody waits.
struct Flight {
    mine: bool,
    queued: bool,
    body: Body,
    left: i64,
}

impl Flight {
    fn parse(answers: Vec<Value>, want: Want) -> Result<Self, Failure> {
        let mut answers = answers.into_iter();
        let mut next = || answers.next().ok_or_else(|| Failure::unexpected("an answer is missing"));
        let mine = match next()? {
            Value::Okay => true,
            Value::Nil => false,
            Value::ServerError(error) => return Err(Failure::refused(&error)),
            _ => return Err(Failure::unexpected("SET answered with something else than it can")),
        };
        let queued = int(&next()?)? > 0;
        let (body, left) = if want == Want::Lock { (Body::Absent, -2) } else { look_at(next()?, &next()?)? };
        Ok(Self { mine, queued, body, left })
    }
}

enum Entered {
    Absent,
    Granted { body: Body, left: i64, clean: bool },
    Busy { owner: Option<Vec<u8>>, lease_left: u64, place: u32 },
}

impl Entered {
    fn parse(answer: Value) -> Result<Self, Failure> {
        let mut parts = array(answer)?.into_iter();
        let mut next = || parts.next().unwrap_or(Value::Nil);
        match int(&next())? {
            2 => Ok(Self::Absent),
            1 => {
                let body = match next() {
                    Value::BulkString(bytes) => Body::parse(bytes),
                    _ => Body::Absent,
                };
                Ok(Self::Granted { body, left: int(&next())?, clean: int(&next())? == 1 })
            }
            0 => {
                let owner = bytes(next());
                let lease_left = u64::try_from(int(&next())?).unwrap_or(0);
                Ok(Self::Busy { owner, lease_left, place: u32::try_from(int(&next())?).unwrap_or(1) })
            }
            _ => Err(Failure::unexpected("a script answered with something else than it can")),
        }
    }
}

/// Gives each request of a flight its own outcome.
fn spread(answers: Result<Vec<Value>, Failure>, count: usize) -> Vec<Result<Value, Failure>> {
    match answers {
        Ok(answers) if answers.len() == count => answers.into_iter().map(Ok).collect(),
        Ok(_) => (0..count).map(|_| Err(Failure::unexpected("an answer is missing"))).collect(),
        Err(failure) => (0..count).map(|_| Err(failure.again())).collect(),
    }
}

fn lock_timeout(operation: &'static str, wait: Duration, owner: Option<&[u8]>) -> Error {
    let fact = format!("the lock was not free within {} ms", wait.as_millis());
    Error::new(ErrorKind::LockTimeout, operation, fact).with_holder(owner.and_then(holder))
}

pub(crate) fn foreign() -> Failure {
    Failure::corrupt("the record is nothing that any version of this library writes; it was left alone")
}

fn foreign_lock() -> Failure {
    Failure::corrupt("the lock of the session is nothing that any version of this library writes; it was left alone")
}

/// Makes of a record what an opening goes by; `left` is what `PTTL` said.
fn found(body: Body, left: i64) -> Result<Found, Failure> {
    match body {
        Body::Absent => Ok(Found::Absent),
        Body::Buried { mark } => Ok(Found::Buried { mark }),
        Body::Live { last, data } => Ok(Found::Live { last, record: record(data, left) }),
        Body::Foreign => Err(foreign()),
    }
}

/// Says what is asked for in the words of the script.
fn word(want: Want) -> &'static [u8] {
    match want {
        Want::Existing => b"existing",
        Want::Any => b"any",
        Want::Lock => b"lock",
    }
}

pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).max(1)
}

fn look_at(body: Value, left: &Value) -> Result<(Body, i64), Failure> {
    Ok((parse_body(body)?, int(left)?))
}

/// Reads the answer to a `GET` of a record.
pub(crate) fn parse_body(body: Value) -> Result<Body, Failure> {
    match body {
        Value::Nil => Ok(Body::Absent),
        Value::BulkString(bytes) => match Body::parse(bytes) {
            Body::Foreign => Err(foreign()),
            body => Ok(body),
        },
        Value::ServerError(error) => Err(Failure::refused(&error)),
        _ => Err(Failure::unexpected("a record came as something else than a string")),
    }
}

pub(crate) fn int(answer: &Value) -> Result<i64, Failure> {
    match answer {
        Value::Int(number) => Ok(*number),
        Value::ServerError(error) => Err(Failure::refused(error)),
        _ => Err(Failure::unexpected("a number came as something else")),
    }
}

pub(crate) fn bytes(answer: Value) -> Option<Vec<u8>> {
    match answer {
        Value::BulkString(bytes) => Some(bytes),
        _ => None,
    }
}

pub(crate) fn array(answer: Value) -> Result<Vec<Value>, Failure> {
    match answer {
        Value::Array(parts) => Ok(parts),
        Value::ServerError(error) => Err(Failure::refused(&error)),
        _ => Err(Failure::unexpected("a list came as something else")),
    }
}

/// Makes a command in as much room as it takes.
fn command(words: &[&[u8]]) -> Cmd {
    let mut command = Cmd::with_capacity(words.len(), words.iter().map(|word| word.len()).sum());
    for word in words {
        command.arg(*word);
    }
    command
}

fn only(answers: Vec<Value>) -> Result<Value, Failure> {
    answers.into_iter().next().ok_or_else(|| Failure::unexpected("an answer is missing"))
}

fn answers<const N: usize>(answers: Vec<Value>) -> Result<[Value; N], Failure> {
    answers.try_into().map_err(|_| Failure::unexpected("an answer is missing"))
}
