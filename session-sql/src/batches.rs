//! How opens and changes of different sessions travel together: what the [collector](session_core::collector) sends, and how an
//! answer that did not come is told apart from one that says no.

use std::sync::Arc;

use session_core::collector::{Batch, Class, Collector, Limits, Member, Reply};
use session_core::leased::Verdict;
use session_core::{Error, ErrorKind, Result};

use crate::database::{Alter, Database, Enter, Entered, Failure};

/// What travels.
pub(crate) enum Op {
    Enter(Enter),
    Change(Alter),
}

/// What came of it. A failure of a request that was alone comes as an outcome, because there is more to tell than its kind.
pub(crate) enum Outcome {
    Entered(Result<Entered, Failure>),
    /// Also whether it had been sent before and not been answered.
    Changed(Result<Verdict, Failure>, bool),
}

/// Sends a batch to the database.
#[derive(Debug)]
pub(crate) struct ToDatabase(Arc<dyn Database>);

impl Batch for ToDatabase {
    type Key = Arc<str>;
    type Op = Op;
    type Outcome = Outcome;

    async fn send(&self, class: Class, members: &[Member<Op>]) -> Result<Vec<Reply<Outcome>>> {
        match class {
            Class::Open => {
                let entries = members.iter().filter_map(|member| match &member.op {
                    Op::Enter(entry) => Some(entry.clone()),
                    Op::Change(_) => None,
                });
                let entries: Vec<_> = entries.collect();
                let outcome = |_: &Member<Op>, entered| Outcome::Entered(entered);
                spread(members, self.0.enter(&entries).await, outcome)
            }
            Class::Save => {
                let changes = members.iter().filter_map(|member| match &member.op {
                    Op::Change(change) => Some(change.clone()),
                    Op::Enter(_) => None,
                });
                let changes: Vec<_> = changes.collect();
                let outcome = |member: &Member<Op>, judged| Outcome::Changed(judged, member.repeat);
                spread(members, self.0.change(&changes).await, outcome)
            }
        }
    }
}

/// Gives each member its own reply.
fn spread<T>(
    members: &[Member<Op>],
    answers: Result<Vec<Option<T>>, Failure>,
    outcome: impl Fn(&Member<Op>, Result<T, Failure>) -> Outcome,
) -> Result<Vec<Reply<Outcome>>> {
    match answers {
        Ok(answers) => {
            let reply = |(member, answer): (&Member<Op>, Option<T>)| match answer {
                Some(answer) => Reply::Done(Ok(outcome(member, Ok(answer)))),
                None => Reply::Skipped,
            };
            Ok(members.iter().zip(answers).map(reply).collect())
        }
        Err(failure) if members.len() == 1 => Ok(vec![Reply::Done(Ok(outcome(&members[0], Err(failure))))]),
        Err(failure) => Err(whole(failure)),
    }
}

/// Says to the collector what became of a batch as a whole.
fn whole(failure: Failure) -> Error {
    let kind = match failure.kind {
        _ if failure.sent => ErrorKind::Unknown,
        // A deadlock, say: the members are tried one by one.
        ErrorKind::Unavailable if failure.passing => ErrorKind::Unexpected,
        kind => kind,
    };
    failure.into_error("batch").with_kind(kind)
}

/// The way to the database for what may travel together.
#[derive(Clone, Debug)]
pub(crate) struct Batches {
    collector: Collector<ToDatabase>,
}

impl Batches {
    pub(crate) fn new(database: Arc<dyn Database>) -> Self {
        Self { collector: Collector::new(ToDatabase(database), Limits::default()) }
    }

    pub(crate) async fn enter(&self, entry: Enter) -> Result<Entered, Failure> {
        let key = entry.key.as_str().into();
        match self.collector.submit(Class::Open, key, 0, Op::Enter(entry)).await {
            Ok(Outcome::Entered(entered)) => entered,
            Ok(Outcome::Changed(..)) => Err(Failure::unexpected("a lock was answered as a change")),
            Err(error) => Err(told(error)),
        }
    }

    /// Also says whether it was sent before without an answer.
    pub(crate) async fn change(&self, change: Alter) -> (Result<Verdict, Failure>, bool) {
        let (key, bytes) = (change.key.as_str().into(), change.bytes());
        match self.collector.submit(Class::Save, key, bytes, Op::Change(change)).await {
            Ok(Outcome::Changed(judged, repeated)) => (judged, repeated),
            Ok(Outcome::Entered(_)) => (Err(Failure::unexpected("a change was answered as a lock")), false),
            Err(error) => (Err(told(error)), false),
        }
    }
}

/// Makes a failure of what the collector itself has to say.
fn told(error: Error) -> Failure {
    let sent = error.kind() == ErrorKind::Unknown;
    let kind = if sent { ErrorKind::Unavailable } else { error.kind() };
    let message = if sent { "the request was sent and not answered" } else { "the request did not reach the database" };
    let mut failure = Failure::new(kind, message);
    (failure.sent, failure.source) = (sent, Some(error.into()));
    failure
}
