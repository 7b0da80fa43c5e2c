//! A run: requests of one visitor at the same time, each in a task of its own, on a real store, with a clock at every step.
//!
//! Nothing here draws or tells. The session is made for the run and destroyed after it.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use session_core::{Error, ErrorKind, Result, Session, SessionId, SessionView, Sessions};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::lane::Board;
use super::plan::{Plan, Strategy};

const COUNTER: &str = "counter";

/// What was in the session when everybody was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) counter: u64,
    /// The requests whose change is there.
    pub(super) present: BTreeSet<usize>,
}

/// Runs `plan` under `strategy` in a session of its own, and notes on `board` what happens when.
///
/// # Errors
/// Those of making, reading and destroying the session. What a single request runs into is its outcome and no error here.
pub(super) async fn run(
    sessions: &Sessions,
    plan: &Plan,
    strategy: Strategy,
    board: &Arc<Board>,
    id: &SessionId,
) -> Result<Found> {
    let mut tasks = JoinSet::new();
    let mut before = None;
    for at in 0..plan.works_ms.len() {
        let (next, turn) = oneshot::channel();
        let request = Request {
            sessions: sessions.clone(),
            id: id.clone(),
            board: Arc::clone(board),
            at,
            plan: plan.clone(),
            next: Some(next),
        };
        tasks.spawn(request.serve(strategy, before.replace(turn)));
    }
    // Whoever drops this run drops its requests with it.
    tasks.join_all().await;
    let view = sessions.view(id).await?;
    if !view.exists() {
        return Err(Error::new(ErrorKind::Gone, "lab", "the session of the run is no longer there"));
    }
    let found = Found { counter: view.get(COUNTER)?.unwrap_or_default(), present: present(view.keys()) };
    board.judge(&found.present);
    Ok(found)
}

/// Makes the session of a run.
///
/// # Errors
/// Those of saving.
pub(super) async fn prepare(sessions: &Sessions) -> Result<SessionId> {
    let mut session = sessions.create()?;
    session.insert(COUNTER, &0u64)?;
    session.close().await?.ok_or_else(|| Error::new(ErrorKind::Unexpected, "lab", "a session with a value was not stored"))
}

/// The requests whose changes are among these keys.
fn present<'a>(keys: impl Iterator<Item = &'a str>) -> BTreeSet<usize> {
    keys.filter_map(|key| key.strip_prefix("request-")?.parse().ok()).collect()
}

/// One request.
struct Request {
    sessions: Sessions,
    id: SessionId,
    board: Arc<Board>,
    at: usize,
    plan: Plan,
    /// Dropped when this request has asked for the session.
    next: Option<oneshot::Sender<()>>,
}

impl Request {
    async fn serve(mut self, strategy: Strategy, before: Option<oneshot::Receiver<()>>) {
        // Even a sleep of nothing lasts until the next tick of the timer.
        let arrival = self.plan.arrival(self.at);
        if !arrival.is_zero() {
            tokio::time::sleep_until(self.board.start() + arrival).await;
        }
        if let Some(before) = before {
            // Requests arrive in the order of their numbers, even at the same moment. An error means that the sender is gone, which
            // is what is waited for.
            let _ = before.await;
        }
        let at = self.at;
        self.board.mark(at, |lane, now| lane.arrived_us = Some(now));
        let outcome = match strategy {
            Strategy::NoLock => self.overwrite().await,
            Strategy::Exclusive => self.under_the_lock().await,
            Strategy::EarlyRelease => self.release_early().await,
            Strategy::ReadOnly if strategy.writes(at) => self.under_the_lock().await,
            Strategy::ReadOnly => self.look().await,
            Strategy::Merge => self.merge().await,
        };
        self.board.mark(at, |lane, now| {
            lane.done_us = Some(now);
            lane.outcome = Some(match outcome {
                Ok(()) if lane.writes => "saved",
                Ok(()) => "read",
                Err(error) => error.kind().as_str(),
            });
        });
    }

    async fn under_the_lock(&mut self) -> Result<()> {
        let mut session = self.open().await?;
        let seen = self.saw(session.get(COUNTER)?);
        self.work().await;
        session.insert(COUNTER, &(seen + 1))?;
        session.insert(&self.key(), &true)?;
        self.saving();
        session.close().await?;
        self.released();
        Ok(())
    }

    async fn release_early(&mut self) -> Result<()> {
        let mut session = self.open().await?;
        let seen = self.saw(session.get(COUNTER)?);
        session.insert(COUNTER, &(seen + 1))?;
        session.insert(&self.key(), &true)?;
        self.saving();
        let _view = session.release().await?;
        self.released();
        self.work().await;
        Ok(())
    }

    async fn look(&mut self) -> Result<()> {
        let view = self.view().await?;
        self.saw(view.get(COUNTER)?);
        self.work().await;
        Ok(())
    }

    async fn merge(&mut self) -> Result<()> {
        let (sessions, id) = (self.sessions.clone(), self.id.clone());
        let mut session = exists(self.ask(sessions.merge(&id)).await?)?;
        self.saw(session.get(COUNTER)?);
        session.update_key(COUNTER, |count: Option<u64>| count.unwrap_or_default() + 1)?;
        session.insert(&self.key(), &true)?;
        self.work().await;
        self.saving();
        session.close().await?;
        self.released();
        Ok(())
    }

    /// The control group: what was read at the beginning, and our change in it, replaces whatever is there at the end.
    async fn overwrite(&mut self) -> Result<()> {
        let view = self.view().await?;
        let seen = self.saw(view.get(COUNTER)?);
        self.work().await;
        self.saving();
        // Held for the write alone, as any store holds something while it replaces a value. It makes the write whole, and tells
        // exactly what it wipes out; it does not make it right.
        let mut session = exists(self.sessions.open(&self.id).await?)?;
        let (there, mut ours) = (present(session.keys()), present(view.keys()));
        ours.insert(self.at + 1);
        session.clear();
        session.insert(COUNTER, &(seen + 1))?;
        for n in &ours {
            session.insert(&key_of(*n), &true)?;
        }
        session.close().await?;
        self.board.mark(self.at, |lane, now| {
            lane.released_us = Some(now);
            lane.overwrote = there.difference(&ours).copied().collect();
        });
        Ok(())
    }

    async fn open(&mut self) -> Result<Session> {
        let (sessions, id) = (self.sessions.clone(), self.id.clone());
        exists(self.ask(sessions.open(&id)).await?)
    }

    async fn view(&mut self) -> Result<SessionView> {
        let (sessions, id) = (self.sessions.clone(), self.id.clone());
        self.ask(sessions.view(&id)).await
    }

    /// Waits for the session, and lets the next request arrive as soon as this one stands in the queue.
    async fn ask<T>(&mut self, opening: impl Future<Output = Result<T>>) -> Result<T> {
        let mut opening = pin!(opening);
        self.board.mark(self.at, |lane, now| lane.queued_us = Some(now));
        let first = std::future::poll_fn(|context| Poll::Ready(opening.as_mut().poll(context))).await;
        // Taken before the next request runs, which shares the cores with this one.
        let now = self.board.now_us();
        self.next = None;
        let (opened, now) = match first {
            Poll::Ready(opened) => (opened?, now),
            Poll::Pending => (opening.await?, self.board.now_us()),
        };
        self.board.mark(self.at, |lane, _| lane.opened_us = Some(now));
        Ok(opened)
    }

    /// What a request does besides: it waits for a database, a service, a disk.
    async fn work(&self) {
        self.board.mark(self.at, |lane, now| lane.work_began_us = Some(now));
        tokio::time::sleep(self.plan.work(self.at)).await;
        self.board.mark(self.at, |lane, now| lane.work_ended_us = Some(now));
    }

    fn saw(&self, counter: Option<u64>) -> u64 {
        let counter = counter.unwrap_or_default();
        self.board.mark(self.at, |lane, _| lane.saw = Some(counter));
        counter
    }

    fn saving(&self) {
        self.board.mark(self.at, |lane, now| lane.saving_us = Some(now));
    }

    fn released(&self) {
        self.board.mark(self.at, |lane, now| lane.released_us = Some(now));
    }

    fn key(&self) -> String {
        key_of(self.at + 1)
    }
}

fn key_of(n: usize) -> String {
    format!("request-{n}")
}

/// Somebody may have destroyed the session of a run, from the page that lists it or from elsewhere.
fn exists(session: Session) -> Result<Session> {
    match session.is_new() {
        false => Ok(session),
        true => Err(Error::new(ErrorKind::Gone, "lab", "the session of the run is no longer there")),
    }
}

#[cfg(test)]
mod tests {
    use session_core::MemoryHandler;

    use super::super::lane::{Lane, handovers};
    use super::*;

    fn sessions() -> Sessions {
        Sessions::builder(Arc::new(MemoryHandler::new())).queue(1024).build().unwrap()
    }

    async fn run_of(strategy: Strategy, works_ms: Vec<u64>) -> (Found, Vec<Lane>) {
        let sessions = sessions();
        let id = prepare(&sessions).await.unwrap();
        let plan = Plan { works_ms, apart_ms: 0 };
        let board = Arc::new(Board::new(strategy, plan.works_ms.len()));
        let found = run(&sessions, &plan, strategy, &board, &id).await.unwrap();
        (found, board.snapshot())
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn without_a_lock_updates_are_lost_and_each_lost_one_names_who_wrote_over_it() {
        let (found, lanes) = run_of(Strategy::NoLock, vec![20; 20]).await;
        let lost: Vec<_> = lanes.iter().filter(|lane| lane.lost).collect();
        assert!(!lost.is_empty());
        assert_eq!(found.counter, 20 - lost.len() as u64);
        assert_eq!(found.counter, found.present.len() as u64);
        assert!(lanes.iter().all(|lane| lane.saved()));
        for lane in lost {
            let winner = &lanes[lane.lost_to.unwrap() - 1];
            assert!(winner.overwrote.contains(&lane.n) && winner.released_us >= lane.saving_us, "{lane:?} {winner:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_strategy_of_ours_loses_one() {
        for strategy in Strategy::ALL.into_iter().filter(|strategy| *strategy != Strategy::NoLock) {
            let (found, lanes) = run_of(strategy, vec![5; 20]).await;
            let saved = lanes.iter().filter(|lane| lane.saved()).count();
            assert_eq!((found.counter, found.present.len()), (saved as u64, saved), "{strategy:?}");
            assert!(lanes.iter().all(|lane| !lane.lost && lane.saved() == lane.writes), "{strategy:?} {lanes:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn exclusive_requests_are_served_in_the_order_of_their_numbers_and_never_two_at_a_time() {
        let (_, lanes) = run_of(Strategy::Exclusive, vec![3; 30]).await;
        for pair in lanes.windows(2) {
            assert!(pair[0].saving_us.unwrap() <= pair[1].opened_us.unwrap(), "{pair:?}");
        }
        assert_eq!(handovers(&lanes).len(), 29);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_releases_early_works_while_others_hold() {
        let (_, lanes) = run_of(Strategy::EarlyRelease, vec![100; 4]).await;
        let last_opened = lanes.iter().map(|lane| lane.opened_us.unwrap()).max();
        let first_worked = lanes.iter().map(|lane| lane.work_ended_us.unwrap()).min();
        assert!(last_opened < first_worked, "{lanes:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_only_reads_does_not_wait_for_the_writer() {
        let (found, lanes) = run_of(Strategy::ReadOnly, vec![100; 4]).await;
        assert_eq!(found.counter, 1);
        for reader in &lanes[1..] {
            assert_eq!((reader.outcome, reader.saw), (Some("read"), Some(0)));
            assert!(reader.opened_us < lanes[0].saving_us, "{lanes:?}");
        }
    }

    #[tokio::test]
    async fn a_session_that_is_destroyed_in_the_middle_is_an_outcome_and_an_error() {
        let sessions = sessions();
        let id = prepare(&sessions).await.unwrap();
        let plan = Plan { works_ms: vec![50], apart_ms: 0 };
        let board = Arc::new(Board::new(Strategy::Exclusive, 1));
        let destroy = async {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            sessions.destroy(&id).await.unwrap();
        };
        let (ended, ()) = tokio::join!(run(&sessions, &plan, Strategy::Exclusive, &board, &id), destroy);
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Gone);
        assert_eq!(board.snapshot()[0].outcome, Some("gone"));
    }
}
