//! A worker process: does what the case in the parent says.
//!
//! Nothing here knows what a case is after.

use std::sync::Arc;
use std::time::Duration;

use session_core::{
    Change, Error, ErrorKind, Expect, OpenRequest, OpenSession, Result, SessionHandler, SessionId, WriteId, Written,
};
use tokio::sync::mpsc;

use super::orders::{Answer, LONG, Order, edition, record, text_of};
use crate::children::{parent_lines, tell_parent};
use crate::harness::Harness;

/// Is a worker process: does what the case in the parent process says, line by line, until that one has no more to say. Then the
/// process exits by itself.
///
/// [`Harness::worker`] has to start a process that awaits this with the same harness, in a tokio runtime with I/O and time.
///
/// # Panics
/// If somebody else than a case is at the other end of the standard input.
pub async fn worker(harness: &impl Harness) {
    let mut orders = parent_lines();
    let Some(namespace) = orders.recv().await else { return };
    let handler = match harness.handler(&namespace).await {
        Ok(handler) => handler,
        Err(error) => return say(&Answer::refused(&error)),
    };
    say(&Answer::Done);
    let mut servant = Servant { handler, opened: None, orders };
    while let Some(order) = servant.orders.recv().await {
        let order = serde_json::from_str(&order).expect("parent and child are the same program");
        let answer = match servant.obey(order).await {
            Ok(answer) => answer,
            Err(error) => Answer::refused(&error),
        };
        say(&answer);
    }
}

fn say(answer: &Answer) {
    tell_parent(&serde_json::to_string(answer).expect("an answer is plain data"));
}

struct Servant {
    handler: Arc<dyn SessionHandler>,
    opened: Option<Box<dyn OpenSession>>,
    orders: mpsc::UnboundedReceiver<String>,
}

impl Servant {
    async fn obey(&mut self, order: Order) -> Result<Answer> {
        match order {
            Order::Open { id, wait, lease, any } => {
                let expect = if any { Expect::Any } else { Expect::Existing };
                self.opened = Some(self.open(&id, wait, lease, expect).await?);
            }
            Order::Read => return Ok(Answer::Record(text_of(self.opened()?.read().await?))),
            Order::Write(text) => {
                self.opened()?.write(&record(&text), WriteId::random()?).await?;
            }
            Order::Save(text) => {
                self.opened()?.save(&Change::Write(record(&text)), WriteId::random()?).await?;
            }
            Order::Close => self.opened()?.close().await?,
            Order::Look(id) => {
                let mut view = self.handler.open(&parse(&id), &OpenRequest::read_only()).await?;
                let seen = text_of(view.read().await?);
                view.close().await?;
                return Ok(Answer::Record(seen));
            }
            Order::Create { id, lease, text } => {
                let mut opened = self.open(&id, LONG, lease, Expect::Any).await?;
                let found = text_of(opened.read().await?);
                if found.is_some() {
                    opened.close().await?;
                    return Ok(Answer::Record(found));
                }
                // Time enough for the other one to believe the same.
                tokio::time::sleep(Duration::from_millis(5)).await;
                opened.save(&Change::Write(record(&text)), WriteId::random()?).await?;
                return Ok(Answer::Created);
            }
            Order::Append { id, writer, lease, times } => return self.append(&id, &writer, lease, times).await,
            Order::Rewrite { id, lease, from, tell } => return self.rewrite(&id, lease, from, tell).await,
            Order::Stop => {}
        }
        Ok(Answer::Done)
    }

    fn opened(&mut self) -> Result<&mut Box<dyn OpenSession>> {
        self.opened.as_mut().ok_or_else(|| Error::new(ErrorKind::Unexpected, "worker", "nothing is open"))
    }

    async fn open(&self, id: &str, wait: Duration, lease: Duration, expect: Expect) -> Result<Box<dyn OpenSession>> {
        self.handler.open(&parse(id), &OpenRequest::exclusive(wait, lease).expecting(expect)).await
    }

    fn told_to_stop(&mut self) -> bool {
        self.orders.try_recv().is_ok()
    }

    async fn append(&mut self, id: &str, writer: &str, lease: Duration, times: u64) -> Result<Answer> {
        let mut n = 1;
        while n <= times && !self.told_to_stop() {
            let mut opened = match self.open(id, LONG, lease, Expect::Existing).await {
                Err(error) if error.kind() == ErrorKind::LockTimeout => continue,
                opened => opened?,
            };
            let before = text_of(opened.read().await?).ok_or_else(|| {
                // Nobody destroys it, so the case has failed.
                Error::new(ErrorKind::Gone, "append", "the session is absent although nobody destroyed it")
            })?;
            tokio::time::sleep(Duration::from_millis(1)).await;
            let change = Change::Write(record(&format!("{before} {writer}:{n}")));
            match settle(&mut *opened, &change).await {
                Ok(_) => say(&Answer::Acked(n)),
                // Certainly not applied: the same number is tried again.
                Err(error) if matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Conflict) => continue,
                Err(error) if error.kind() == ErrorKind::Unknown => say(&Answer::Unsure(n)),
                Err(error) => return Err(error),
            }
            n += 1;
        }
        Ok(Answer::Done)
    }

    async fn rewrite(&mut self, id: &str, lease: Duration, from: u64, tell: bool) -> Result<Answer> {
        let mut n = from;
        while !self.told_to_stop() {
            let mut opened = match self.open(id, LONG, lease, Expect::Existing).await {
                Err(error) if error.kind() == ErrorKind::LockTimeout => continue,
                opened => opened?,
            };
            match settle(&mut *opened, &Change::Write(record(&edition(n)))).await {
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Fenced | ErrorKind::Unknown) => continue,
                Err(error) => return Err(error),
            }
            if tell {
                say(&Answer::Acked(n));
            }
            n += 1;
        }
        Ok(Answer::Done)
    }
}

/// Saves, and asks again under the same write id while nobody can say what became of it.
pub(super) async fn settle(opened: &mut dyn OpenSession, change: &Change) -> Result<Written> {
    let id = WriteId::random()?;
    for _ in 0..5 {
        match opened.save(change, id).await {
            Err(error) if error.kind().keeps_opening() && error.kind() != ErrorKind::TooLarge => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            outcome => return outcome,
        }
    }
    opened.save(change, id).await
}

fn parse(id: &str) -> SessionId {
    SessionId::parse(id).expect("the parent sends ids")
}
