//! Another process as a case sees it, and the book of what such processes were told.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use session_core::{ErrorKind, SessionId};

use super::orders::{Answer, LONG, Order, name_of};
use crate::children::Child;
use crate::harness::Env;

/// Another process, which works on the store of the case.
pub(super) struct Peer(pub(super) Child);

/// How long a process may take to answer what needs no waiting, on a machine that does a hundred other things.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

impl Peer {
    pub(super) async fn start(env: &Env) -> Self {
        let Some(mut command) = env.worker() else {
            panic!("the harness cannot start a worker process; see Harness::worker");
        };
        let mut peer = Self(Child::start(&mut command).unwrap_or_else(|e| panic!("no process could be started: {e}")));
        peer.0.send(env.namespace()).unwrap_or_else(|e| panic!("the worker process ended at once: {e}"));
        peer.expect(&Answer::Done).await;
        peer
    }

    pub(super) async fn start_many(env: &Env, count: usize) -> Vec<Self> {
        let mut peers = Vec::new();
        for _ in 0..count {
            peers.push(Self::start(env).await);
        }
        peers
    }

    pub(super) fn order(&mut self, order: &Order) {
        let line = serde_json::to_string(order).expect("an order is plain data");
        self.0.send(&line).unwrap_or_else(|e| panic!("a worker process is gone: {e}: {}", self.0.other_lines()));
    }

    pub(super) async fn answer(&mut self, limit: Duration) -> Answer {
        match self.0.line(limit).await {
            Ok(Some(line)) => serde_json::from_str(&line).expect("parent and child are the same program"),
            Ok(None) => panic!("a worker process ended: {}", self.0.other_lines()),
            Err(_) => panic!("a worker process did not answer within {limit:?}"),
        }
    }

    pub(super) async fn ask(&mut self, order: &Order) -> Answer {
        self.order(order);
        self.answer(PATIENCE).await
    }

    async fn expect(&mut self, expected: &Answer) {
        let answer = self.answer(PATIENCE).await;
        assert!(answer == *expected, "a worker process answered {answer:?}, expected {expected:?}");
    }

    /// Does what must succeed.
    pub(super) async fn must(&mut self, order: &Order) {
        let answer = self.ask(order).await;
        assert!(answer == Answer::Done, "in another process {} was answered {answer:?}", name_of(order));
    }

    /// Does what must be refused, with one of these kinds.
    pub(super) async fn must_not(&mut self, order: &Order, kinds: &[ErrorKind], why: &str) {
        match self.ask(order).await {
            Answer::Refused { kind, .. } if kinds.iter().any(|allowed| allowed.as_str() == kind) => {}
            answer => panic!("{why}: {} was answered {answer:?}, expected one of {kinds:?}", name_of(order)),
        }
    }

    /// Opens exclusively, reads `text`, and keeps it.
    pub(super) async fn hold(&mut self, id: &SessionId, lease: Duration, text: Option<&str>) {
        self.must(&Order::Open { id: id.as_str().into(), wait: PATIENCE, lease, any: text.is_none() }).await;
        let read = self.ask(&Order::Read).await;
        assert!(read == Answer::Record(text.map(Into::into)), "in another process a read was answered {read:?}");
    }

    /// Collects what a loop says until it is done.
    pub(super) async fn rest(&mut self, ledger: &mut Ledger, writer: &str) {
        loop {
            match self.answer(PATIENCE + LONG).await {
                Answer::Done => return,
                answer => ledger.note(writer, &answer),
            }
        }
    }

    pub(super) fn stop(&self) {
        self.0.stop().unwrap_or_else(|e| panic!("a process could not be stopped: {e}"));
    }

    pub(super) fn go_on(&self) {
        self.0.go_on().unwrap_or_else(|e| panic!("a process could not be continued: {e}"));
    }

    pub(super) fn kill(&mut self) {
        self.0.kill().unwrap_or_else(|e| panic!("a process could not be killed: {e}"));
    }
}

/// What the processes were told about their appends.
#[derive(Default)]
pub(super) struct Ledger {
    pub(super) acked: HashSet<String>,
    pub(super) unsure: HashSet<String>,
    pub(super) last: HashMap<String, u64>,
}

impl Ledger {
    pub(super) fn note(&mut self, writer: &str, answer: &Answer) {
        let n = match answer {
            Answer::Acked(n) => {
                self.acked.insert(format!("{writer}:{n}"));
                *n
            }
            Answer::Unsure(n) => {
                self.unsure.insert(format!("{writer}:{n}"));
                *n
            }
            other => panic!("in another process an append was answered {other:?}"),
        };
        self.last.insert(writer.into(), n);
    }

    /// The writer is dead: the write that it was at may be there or not.
    pub(super) fn note_death(&mut self, writer: &str) {
        let n = self.last.get(writer).map_or(1, |n| n + 1);
        self.unsure.insert(format!("{writer}:{n}"));
    }

    /// Nothing acknowledged is missing, nothing is there twice, and nothing is there that nobody wrote.
    pub(super) fn check(&self, text: &str) {
        let all: Vec<&str> = text.split_whitespace().skip(1).collect();
        let there: HashSet<&str> = all.iter().copied().collect();
        let lost = self.acked.iter().filter(|id| !there.contains(id.as_str())).count();
        assert!(lost == 0, "{lost} of {} acknowledged appends are lost", self.acked.len());
        assert!(there.len() == all.len(), "{} appends were applied twice", all.len() - there.len());
        let strange = there.iter().filter(|id| !self.acked.contains(**id) && !self.unsure.contains(**id)).count();
        assert!(strange == 0, "{strange} appends are there although they were refused");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_finds_what_is_lost_doubled_and_strange() {
        let ledger = || {
            let mut ledger = Ledger::default();
            ledger.note("w1", &Answer::Acked(1));
            ledger.note("w1", &Answer::Unsure(2));
            ledger.note("w2", &Answer::Acked(1));
            ledger.note_death("w2");
            ledger
        };
        for fine in ["begin w1:1 w2:1", "begin w2:1 w1:1 w1:2", "begin w1:1 w2:1 w2:2"] {
            ledger().check(fine);
        }
        for wrong in ["begin w1:1", "begin w1:1 w2:1 w2:1", "begin w1:1 w2:1 w2:3", "begin w1:1 w1:3 w2:1"] {
            assert!(std::panic::catch_unwind(|| ledger().check(wrong)).is_err(), "{wrong}");
        }
    }
}
