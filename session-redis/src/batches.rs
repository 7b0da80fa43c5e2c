//! How opens, changes and views of different sessions travel together: what the [collector](session_core::collector) sends to one
//! server, and how the answers find their callers.
//!
//! To run a script costs a server more than all that the script does, and to send a request costs this process more than to write
//! it; a batch pays both once. Whoever is alone is sent as ever, by his own task. The members of a batch are judged one after the
//! other, each in an atomic step of its own, so two of one session may well be among them, and what is wrong with one is its own
//! answer. What an answer means is not known here. The servers of a Cluster and changes that wait for replicas are not asked here.

use std::borrow::Cow;
use std::hash::{Hash, Hasher};
use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use redis::{Cmd, Pipeline, ServerError, ServerErrorKind, Value};
use session_core::collector::{Batch, Class, Collector, Limits, Member, Reply};
use session_core::leased::Want;
use session_core::{ErrorKind, Result};

use crate::answers::{int, look_at};
use crate::layout::{Body, HEADER, Keys, TokenText};
use crate::link::{Failure, is_read_only};
use crate::scripts::Scripts;
use crate::servers::Servers;
use crate::store::command;

/// How many flights are under way at a time: the server works on one while others are written, are read, or cross the network. Of
/// many small ones few are needed before they grow, since a flight goes beside others only if it is a good part of them.
const FLIGHTS: usize = 32;
/// A flight goes beside others that have at most so many times its members: work for this server is by the member more than by the
/// flight, so while it is at some of them the next shall be on their way. Measured with 64 tasks: 1 gives three fifths as many cycles, 3
/// and 8 a tenth less.
const BESIDE: usize = 6;

/// Up to this length the body of a lone save is an argument of the script. Measured with 2 KiB, a lone cycle is a tenth quicker so.
const SMALL: usize = 8 << 10;

/// The way to a server for what may travel together.
pub(crate) struct Batches {
    collector: Collector<ToServer>,
    next: AtomicU64,
}

/// What travels, and how many flights had met with silence when it came.
pub(crate) struct Op {
    keys: Keys,
    what: What,
    silences: u64,
}

enum What {
    /// Takes the lock if it is free, and reads.
    Enter { value: Arc<[u8]>, lease: i64, reads: bool },
    /// Reads.
    Look,
    /// Runs the script that judges a change.
    Change(Change),
    /// Gives up what a token has. It follows the open of that token.
    Leave { token: TokenText, clean: bool },
}

/// A change, as the script that judges it is told.
#[derive(Debug)]
pub(crate) struct Change {
    /// The value of the lock as its holder set it.
    pub(crate) value: Option<Arc<[u8]>>,
    /// The header of what was found.
    pub(crate) found: Option<[u8; HEADER]>,
    pub(crate) ttl: u64,
    pub(crate) body: Vec<u8>,
    pub(crate) how: [u8; 4],
}

impl Change {
    /// Returns the arguments; `ttl` in digits.
    pub(crate) fn args<'a>(&'a self, ttl: &'a str) -> [&'a [u8]; 5] {
        let value = self.value.as_ref().map_or(&NOBODY[..], |value| &value[..]);
        let found = self.found.as_ref().map_or(&[][..], |found| &found[..]);
        [value, found, ttl.as_bytes(), &self.body, &self.how]
    }
}

/// What no token is.
pub(crate) const NOBODY: &TokenText = &[b'-'; 32];

/// The answers to the flight that takes a lock while nobody waits.
#[derive(Debug)]
pub(crate) struct Entered {
    pub(crate) mine: bool,
    pub(crate) queued: bool,
    pub(crate) body: Body,
    pub(crate) left: i64,
}

pub(crate) enum Answer {
    Entered(Entered),
    Seen(Body, i64),
    Plain(Value),
}

/// What came of a request, and whether an earlier copy of it was sent and not answered.
type Outcome = (Result<Answer, Failure>, bool);

impl Batches {
    pub(crate) fn new(servers: Arc<Servers>, scripts: Arc<Scripts>) -> Self {
        let mut limits = Limits::default();
        limits.flights = FLIGHTS;
        limits.beside = BESIDE;
        let server = ToServer { servers, scripts, silences: AtomicU64::new(0) };
        Self { collector: Collector::new(server, limits), next: AtomicU64::new(0) }
    }

    /// Takes the lock `token` if it is free and nobody waits for it, and reads in the same flight.
    pub(crate) async fn enter(
        &self,
        keys: &Keys,
        token: &TokenText,
        value: &Arc<[u8]>,
        lease: i64,
        want: Want,
    ) -> (Result<Entered, Failure>, bool) {
        let what = What::Enter { value: value.clone(), lease, reads: want != Want::Lock };
        let (answer, repeated) = self.submit(Class::Open, Key::Token(*token), keys, 0, what).await;
        let entered = answer.and_then(|answer| match answer {
            Answer::Entered(entered) => Ok(entered),
            Answer::Seen(..) | Answer::Plain(_) => Err(mixed_up()),
        });
        (entered, repeated)
    }

    /// Reads a record as it is now, and what is left of its life.
    pub(crate) async fn look(&self, keys: &Keys) -> Result<(Body, i64), Failure> {
        match self.submit(Class::Open, self.number(), keys, 0, What::Look).await.0? {
            Answer::Seen(body, left) => Ok((body, left)),
            Answer::Entered(_) | Answer::Plain(_) => Err(mixed_up()),
        }
    }

    /// Has a change judged.
    pub(crate) async fn change(&self, keys: &Keys, change: Change) -> (Result<Value, Failure>, bool) {
        let bytes = change.body.len();
        let (answer, repeated) = self.submit(Class::Save, self.number(), keys, bytes, What::Change(change)).await;
        (answer.and_then(plain), repeated)
    }

    /// Gives up whatever `token` has, behind an open of that token that is still under way.
    pub(crate) async fn leave(&self, keys: &Keys, token: TokenText, clean: bool) -> Result<Value, Failure> {
        let what = What::Leave { token, clean };
        self.submit(Class::Save, Key::Token(token), keys, 0, what).await.0.and_then(plain)
    }

    fn number(&self) -> Key {
        Key::Number(self.next.fetch_add(1, Ordering::Relaxed))
    }

    async fn submit(&self, class: Class, key: Key, keys: &Keys, bytes: usize, what: What) -> Outcome {
        let silences = self.collector.batch().silences.load(Ordering::Relaxed);
        let op = Op { keys: keys.clone(), what, silences };
        match self.collector.submit(class, key, bytes, op).await {
            Ok(outcome) => outcome,
            // A batch that was cut short, with the runtime that carried it.
            Err(error) if error.kind() == ErrorKind::Unknown => (Err(Failure::abandoned()), false),
            Err(_) => (Err(Failure::unexpected("a batch was not answered as it was sent")), false),
        }
    }
}

/// What keeps one request behind another: nothing but an open and its withdrawal have the same.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    Number(u64),
    Token(TokenText),
}

/// As little as tells most of them apart: each is looked up four times on its way.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            Self::Number(number) => state.write_u64(*number),
            Self::Token(token) => state.write(&token[..16]),
        }
    }
}

/// Sends batches to the one server.
pub(crate) struct ToServer {
    servers: Arc<Servers>,
    scripts: Arc<Scripts>,
    /// How many flights were not answered in time.
    silences: AtomicU64,
}

impl Batch for ToServer {
    type Key = Key;
    type Op = Op;
    type Outcome = Outcome;

    /// What became of each is its own, so a batch never fails as a whole.
    async fn send(&self, class: Class, members: &[Member<Op>]) -> Result<Vec<Reply<Outcome>>> {
        let silences = self.silences.load(Ordering::Relaxed);
        let mut trips: Vec<Trip<'_>> = members.iter().map(Trip::new).collect();
        for trip in &mut trips {
            // Whoever stood here while the server was found silent has waited his time already.
            if trip.op.silences != silences {
                trip.end(Err(Failure::silent()));
            }
        }
        match class {
            Class::Open => self.enter_all(&mut trips).await,
            Class::Save => self.change_all(&mut trips).await,
        }
        Ok(trips.into_iter().map(Trip::into_reply).collect())
    }
}

/// One member on its way.
struct Trip<'a> {
    op: &'a Op,
    outcome: Option<Result<Answer, Failure>>,
    /// What is known before the whole answer is: whether the lock was taken, and what was read.
    lock: Option<Result<bool, Failure>>,
    read: Option<Result<(Body, i64), Failure>>,
    /// Whether a copy was sent that was not answered.
    sent: bool,
    /// Whether it goes for itself because among others it could not: its body is an argument of the script, its record is asked for
    /// alone.
    apart: bool,
}

impl<'a> Trip<'a> {
    fn new(member: &'a Member<Op>) -> Self {
        Self { op: &member.op, outcome: None, lock: None, read: None, sent: member.repeat, apart: false }
    }

    fn end(&mut self, outcome: Result<Answer, Failure>) {
        self.outcome = Some(outcome);
    }

    fn into_reply(self) -> Reply<Outcome> {
        let outcome = self.outcome.unwrap_or_else(|| Err(Failure::unexpected("an answer is missing")));
        Reply::Done(Ok((outcome, self.sent)))
    }
}

/// The commands of a flight, and who gets which answers.
type Flight = (Pipeline, Vec<Slot>);

/// Whose the next answers are.
enum Slot {
    /// That to a command whose effect the next answer tells.
    Nobody,
    /// The answers of a script, in the order of these members.
    Script(Vec<usize>),
    /// Those to the commands of an open.
    Enter(usize),
    /// Those to the commands of a view.
    Look(usize),
    /// That to the lock of an open among many.
    Lock(usize),
    /// Those to the commands of many: whether anybody waits for one of the first, and what the second read.
    Many { entering: Vec<usize>, reading: Vec<usize> },
    /// The one to a change or a withdrawal.
    Plain(usize),
}

impl ToServer {
    async fn ask(&self, commands: &Pipeline) -> Result<Vec<Value>, Failure> {
        let asked = self.servers.ask_one(commands).await;
        if asked.as_ref().is_err_and(Failure::is_silence) {
            self.silences.fetch_add(1, Ordering::Relaxed);
        }
        asked
    }

    /// Sends what takes locks and what reads. Both may be repeated: a lock is known by its token.
    async fn enter_all(&self, trips: &mut [Trip<'_>]) {
        let mut again = true;
        loop {
            let (commands, slots) = entering(trips);
            if slots.is_empty() {
                return;
            }
            let failure = match self.ask(&commands).await {
                Ok(answers) if again && answers.iter().any(is_read_only) => None,
                Ok(answers) => {
                    hand_out(trips, slots, answers);
                    continue;
                }
                Err(failure) => Some(failure),
            };
            // Whatever a replica said to a view is asked again, too.
            let sent = failure.as_ref().is_none_or(|failure| failure.sent);
            open(trips).for_each(|trip| trip.sent |= sent);
            match failure {
                Some(failure) if !failure.passing || !again => return fail_all(trips, &failure),
                _ => again = false,
            }
        }
    }

    /// Sends what changes something. What was not answered is sent once more, on a connection made anew, and known by its name.
    async fn change_all(&self, trips: &mut [Trip<'_>]) {
        let mut whole = false;
        let mut again = true;
        loop {
            let (commands, slots) = self.changing(trips, whole);
            if slots.is_empty() {
                return;
            }
            match self.ask(&commands).await {
                Ok(answers) => {
                    hand_out(trips, slots, answers);
                    let mut forgotten = false;
                    for trip in trips.iter_mut() {
                        let Some(Ok(Answer::Plain(Value::ServerError(error)))) = &trip.outcome else { continue };
                        let unplaced = !trip.apart && is_unplaced(error);
                        let unknown = !whole && error.kind() == Some(ServerErrorKind::NoScript);
                        if unplaced || unknown || again && Failure::refused(error).passing {
                            trip.outcome = None;
                        }
                        trip.apart |= unplaced;
                        forgotten |= unknown;
                    }
                    if forgotten {
                        whole = true;
                    } else {
                        again = false;
                    }
                }
                Err(failure) => {
                    open(trips).for_each(|trip| trip.sent |= failure.sent);
                    if !failure.passing || !again {
                        return fail_all(trips, &failure);
                    }
                    again = false;
                }
            }
        }
    }

    /// The body of what nearly every save is travels beside the script, as a command of its own: a script takes in each byte of its
    /// arguments, which costs more than all that it does. What is lone and small is spared the command.
    fn changing(&self, trips: &[Trip<'_>], whole: bool) -> Flight {
        let open = || trips.iter().enumerate().filter(|(_, trip)| trip.outcome.is_none());
        let (mut commands, mut slots) = (Pipeline::with_capacity(2), Vec::with_capacity(2));
        let changes: Vec<(usize, &Keys, &Change, String)> = open()
            .filter_map(|(index, trip)| match &trip.op.what {
                What::Change(change) => Some((index, &trip.op.keys, change, change.ttl.to_string())),
                _ => None,
            })
            .collect();
        let mut calls = Vec::with_capacity(changes.len());
        for (index, keys, change, ttl) in &changes {
            let mut args = change.args(ttl);
            let beside = change.how == *USUAL && !trips[*index].apart && (changes.len() > 1 || change.body.len() > SMALL);
            let place = match Body::write_of(&change.body).filter(|_| beside) {
                Some(write) => {
                    let place = keys.place(write);
                    commands.add_command(command(&[b"SET", place.as_bytes(), &change.body, b"PX", ttl.as_bytes()]));
                    slots.push(Slot::Nobody);
                    args[3] = &change.body[..HEADER];
                    Cow::Owned(place)
                }
                None => Cow::Borrowed(keys.record()),
            };
            calls.push((*index, *keys, place, args));
        }
        match &calls[..] {
            [] => {}
            [(index, keys, Cow::Borrowed(_), args)] => {
                commands.add_command(self.scripts.save.call(keys, args, whole));
                slots.push(Slot::Plain(*index));
            }
            calls => {
                let members = calls.iter().map(|(_, keys, place, args)| (*keys, &**place, *args));
                commands.add_command(self.scripts.save_all.call_all(members, whole));
                slots.push(Slot::Script(calls.iter().map(|(index, ..)| *index).collect()));
            }
        }
        for (index, trip) in open() {
            if let What::Leave { token, clean } = &trip.op.what {
                // Whole, because a server that does not answer in time could not say either that it has forgotten the script.
                let clean: &[u8] = if *clean { b"1" } else { b"0" };
                commands.add_command(self.scripts.release.call(&trip.op.keys, &[token, clean, b"0"], true));
                slots.push(Slot::Plain(index));
            }
        }
        (commands, slots)
    }
}

/// What a save says of how it is meant if it closes, and goes on from what was read under its own lock.
const USUAL: &[u8; 4] = b"wewc";

/// Whether a script did not find a body in its place: a full server has not taken it, or has evicted it since.
fn is_unplaced(error: &ServerError) -> bool {
    error.details().is_some_and(|details| details.contains("no such key"))
}

fn open<'t, 'a>(trips: &'t mut [Trip<'a>]) -> impl Iterator<Item = &'t mut Trip<'a>> {
    trips.iter_mut().filter(|trip| trip.outcome.is_none())
}

/// Many opens and views are asked for together: whether anybody waits for one of these sessions, and all records by one command. To
/// take in a command costs a server more than what these do.
fn entering(trips: &[Trip<'_>]) -> Flight {
    let open = || trips.iter().enumerate().filter(|(_, trip)| trip.outcome.is_none());
    let count = open().filter(|(_, trip)| !trip.apart).count();
    let (mut commands, mut slots) = (Pipeline::with_capacity(2 * count + 4), Vec::with_capacity(1));
    let (mut entering, mut reading) = (Vec::new(), Vec::new());
    for (index, trip) in open() {
        let Op { keys, what, .. } = trip.op;
        let together = count > 1 && !trip.apart;
        if let What::Enter { value, lease, reads } = what {
            if together {
                take(&mut commands, keys, value, *lease);
                slots.push(Slot::Lock(index));
                entering.push(index);
                reading.extend(reads.then_some(index));
            } else {
                enter(&mut commands, keys, value, *lease, *reads);
                slots.push(Slot::Enter(index));
            }
        } else if together {
            reading.push(index);
        } else {
            look(&mut commands, keys);
            slots.push(Slot::Look(index));
        }
    }
    let keys = |index: usize| &trips[index].op.keys;
    if !entering.is_empty() {
        let queues = entering.iter().map(|index| keys(*index).queue().as_bytes());
        commands.add_command(command(&iter::once(&b"EXISTS"[..]).chain(queues).collect::<Vec<_>>()));
    }
    if !reading.is_empty() {
        let records = reading.iter().map(|index| keys(*index).record().as_bytes());
        commands.add_command(command(&iter::once(&b"MGET"[..]).chain(records).collect::<Vec<_>>()));
        for index in &reading {
            commands.add_command(command(&[b"PTTL", keys(*index).record().as_bytes()]));
        }
    }
    if count > 1 {
        slots.push(Slot::Many { entering, reading });
    }
    (commands, slots)
}

/// Gives each member its answers.
fn hand_out(trips: &mut [Trip<'_>], slots: Vec<Slot>, answers: Vec<Value>) {
    let mut answers = answers.into_iter();
    for slot in slots {
        match slot {
            Slot::Nobody => drop(answers.next()),
            Slot::Script(members) => match next(&mut answers) {
                Ok(Value::Array(parts)) if parts.len() == members.len() => {
                    for (index, part) in members.into_iter().zip(parts) {
                        trips[index].end(Ok(Answer::Plain(part)));
                    }
                }
                Ok(error @ Value::ServerError(_)) => {
                    members.into_iter().for_each(|index| trips[index].end(Ok(Answer::Plain(error.clone()))));
                }
                _ => members.into_iter().for_each(|index| trips[index].end(Err(missing()))),
            },
            Slot::Enter(index) => {
                let reads = matches!(trips[index].op.what, What::Enter { reads: true, .. });
                let own: Vec<_> = answers.by_ref().take(if reads { 4 } else { 2 }).collect();
                trips[index].end(Entered::parse(&mut own.into_iter(), reads).map(Answer::Entered));
            }
            Slot::Look(index) => {
                let own: Vec<_> = answers.by_ref().take(2).collect();
                trips[index].end(seen(own).map(|(body, left)| Answer::Seen(body, left)));
            }
            Slot::Plain(index) => trips[index].end(next(&mut answers).map(Answer::Plain)),
            Slot::Lock(index) => trips[index].lock = Some(next(&mut answers).and_then(|answer| taken(&answer))),
            Slot::Many { entering, reading } => hand_out_many(trips, &entering, &reading, &mut answers),
        }
    }
}

/// Reads what many were answered together. If anybody waits for one of the sessions, each open hears it, and asks for itself.
fn hand_out_many(trips: &mut [Trip<'_>], entering: &[usize], reading: &[usize], answers: &mut impl Iterator<Item = Value>) {
    let queues = if entering.is_empty() { Value::Int(0) } else { answers.next().unwrap_or(Value::Nil) };
    let bodies = if reading.is_empty() { Value::Array(Vec::new()) } else { answers.next().unwrap_or(Value::Nil) };
    let bodies = match bodies {
        Value::Array(bodies) if bodies.len() == reading.len() => bodies,
        other => vec![other; reading.len()],
    };
    for (&index, body) in reading.iter().zip(bodies) {
        let read = next(answers).and_then(|left| look_at(body, &left));
        let trip = &mut trips[index];
        // What is there is no string, and `MGET` does not say so; or it has only just come. An open that asks again finds its own lock,
        // as any repeat does.
        trip.apart = matches!(read, Ok((Body::Absent, left)) if left != GONE);
        if trip.apart {
            trip.sent = true;
        } else if trip.lock.is_some() {
            trip.read = Some(read);
        } else {
            trip.end(read.map(|(body, left)| Answer::Seen(body, left)));
        }
    }
    for &index in entering {
        let trip = &mut trips[index];
        if let (Some(lock), false) = (trip.lock.take(), trip.apart) {
            let read = trip.read.take().unwrap_or(Ok((Body::Absent, GONE)));
            let entered = lock.and_then(|mine| {
                let (queued, (body, left)) = (int(&queues)? > 0, read?);
                Ok(Answer::Entered(Entered { mine, queued, body, left }))
            });
            trip.end(entered);
        }
    }
}

/// What `PTTL` says of a key that is not there.
const GONE: i64 = -2;

/// Whether a lock was taken.
fn taken(answer: &Value) -> Result<bool, Failure> {
    match answer {
        Value::Okay => Ok(true),
        Value::Nil => Ok(false),
        Value::ServerError(error) => Err(Failure::refused(error)),
        _ => Err(Failure::unexpected("SET answered with something else than it can")),
    }
}

impl Entered {
    /// Reads what the plain commands of one open were answered.
    pub(crate) fn parse(answers: &mut impl Iterator<Item = Value>, reads: bool) -> Result<Self, Failure> {
        let mine = taken(&next(answers)?)?;
        let queued = int(&next(answers)?)? > 0;
        let (body, left) = if reads { look_at(next(answers)?, &next(answers)?)? } else { (Body::Absent, GONE) };
        Ok(Self { mine, queued, body, left })
    }
}

fn next(answers: &mut impl Iterator<Item = Value>) -> Result<Value, Failure> {
    answers.next().ok_or_else(missing)
}

fn seen(answers: Vec<Value>) -> Result<(Body, i64), Failure> {
    let [body, left] = crate::answers::answers(answers)?;
    look_at(body, &left)
}

/// Adds the commands of one open.
pub(crate) fn enter(commands: &mut Pipeline, keys: &Keys, value: &[u8], lease: i64, reads: bool) {
    take(commands, keys, value, lease);
    commands.add_command(command(&[b"EXISTS", keys.queue().as_bytes()]));
    if reads {
        look(commands, keys);
    }
}

fn take(commands: &mut Pipeline, keys: &Keys, value: &[u8], lease: i64) {
    let mut set = Cmd::with_capacity(6, 32 + keys.lock().len() + value.len());
    set.arg("SET").arg(keys.lock()).arg(value).arg("NX").arg("PX").arg(lease);
    commands.add_command(set);
}

/// Adds the commands of one view.
pub(crate) fn look(commands: &mut Pipeline, keys: &Keys) {
    commands.add_command(command(&[b"GET", keys.record().as_bytes()]));
    commands.add_command(command(&[b"PTTL", keys.record().as_bytes()]));
}

fn fail_all(trips: &mut [Trip<'_>], failure: &Failure) {
    for trip in trips.iter_mut().filter(|trip| trip.outcome.is_none()) {
        let mut failure = failure.again();
        failure.sent |= trip.sent;
        trip.end(Err(failure));
    }
}

fn plain(answer: Answer) -> Result<Value, Failure> {
    match answer {
        Answer::Plain(Value::ServerError(error)) => Err(Failure::refused(&error)),
        Answer::Plain(answer) => Ok(answer),
        Answer::Entered(_) | Answer::Seen(..) => Err(mixed_up()),
    }
}

fn missing() -> Failure {
    Failure::unexpected("an answer is missing")
}

fn mixed_up() -> Failure {
    Failure::unexpected("a request was answered as another one")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_asked_for_again_alone_counts_as_sent_so_that_his_lock_is_given_back() {
        let member = |n: u8| {
            let what = What::Enter { value: Arc::from([n]), lease: 1000, reads: true };
            Member::new(Op { keys: Keys::of(&format!("session:{{{n}}}")), what, silences: 0 })
        };
        let members = [member(0), member(1)];
        let mut trips: Vec<_> = members.iter().map(Trip::new).collect();
        let (commands, slots) = entering(&trips);
        assert_eq!(commands.len(), 6, "two locks, the queues, the records, two lives");
        let bodies = Value::Array(vec![Value::Nil, Value::Nil]);
        let answers = vec![Value::Okay, Value::Okay, Value::Int(0), bodies, Value::Int(-1), Value::Int(GONE)];
        hand_out(&mut trips, slots, answers);
        assert!(trips[0].outcome.is_none() && trips[0].sent, "there is something, and it has the lock");
        let absent = matches!(&trips[1].outcome, Some(Ok(Answer::Entered(entered))) if entered.mine && !entered.queued);
        assert!(absent && !trips[1].sent, "there is nothing");
        assert_eq!(entering(&trips).0.len(), 4, "alone, as one that nobody travels with");
        fail_all(&mut trips, &Failure::silent());
        assert!(matches!(&trips[0].outcome, Some(Err(failure)) if failure.sent), "it may have a lock to give back");
    }
}
