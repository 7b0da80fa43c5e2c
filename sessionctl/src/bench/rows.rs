//! What the number of stored sessions costs: a cycle beside many of them and beside few, and beside the collecting of those that
//! have expired.
//!
//! Each number has a table of its own, made and dropped here. What is stored goes through the handler.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use session_core::{Change, Expect, OpenRequest, Record, SessionHandler, SessionId, Ttl, WriteId};
use tokio::task::JoinSet;

use crate::bench::ours::{HandlerCycle, LEASE, TTL};
use crate::bench::{Round, median};
use crate::failure::Failure;
use crate::store::PAGE;

/// What is few.
const FEW: u32 = 1000;

/// How many store at the same time.
const HANDS: usize = 128;

/// Who works while others are collected.
const AT_WORK: usize = 16;

/// How long those run at a time.
const STRETCH: Duration = Duration::from_millis(200);

/// Cycles beside few and beside many sessions, and what they took.
pub(super) struct Beside {
    pub(super) tasks: usize,
    pub(super) few: f64,
    pub(super) many: f64,
    pub(super) waits: Vec<u32>,
}

/// What collecting did to those at work, and what each batch took.
pub(super) struct Collecting {
    pub(super) tasks: usize,
    pub(super) freed: u64,
    pub(super) before: Round,
    pub(super) during: Round,
    pub(super) batches: Vec<u32>,
}

/// A table with sessions in it.
pub(super) struct Table {
    handler: Arc<dyn SessionHandler>,
    payload: usize,
}

impl Table {
    /// Stores `count` sessions, of which `expired` have no life left when it returns.
    pub(super) async fn fill(dsn: &str, count: u32, expired: u32, payload: usize) -> Result<Self, Failure> {
        let this = Self { handler: sessionkit::handler(dsn).await?, payload };
        this.store(expired, Duration::from_secs(1)).await?;
        // Longer than the bench takes.
        this.store(count - expired, 24 * TTL).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(this)
    }

    async fn store(&self, count: u32, ttl: Duration) -> Result<(), Failure> {
        let (mut hands, left) = (JoinSet::new(), Arc::new(AtomicU32::new(count)));
        for _ in 0..HANDS {
            let (handler, payload, left) = (self.handler.clone(), self.payload, left.clone());
            hands.spawn(async move {
                while left.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    let request = OpenRequest::exclusive(LEASE, LEASE).expecting(Expect::Fresh);
                    let mut open = handler.open(&SessionId::generate()?, &request).await?;
                    let record = Record::new(vec![b'x'; payload], Ttl::new(ttl));
                    open.save(&Change::Write(record), WriteId::random()?).await?;
                }
                Ok::<_, session_core::Error>(())
            });
        }
        while let Some(ended) = hands.join_next().await {
            ended.expect("storing does not panic")?;
        }
        Ok(())
    }

    async fn cycle(&self, tasks: usize) -> Result<HandlerCycle, Failure> {
        HandlerCycle::prepare(self.handler.clone(), tasks, self.payload).await
    }
}

/// Lets cycles run beside few and beside many sessions, in turns.
pub(super) async fn compare(
    few: &Table,
    many: &Table,
    tasks: usize,
    rounds: u32,
    length: Duration,
) -> Result<Beside, Failure> {
    let cycles = [few.cycle(tasks).await?, many.cycle(tasks).await?];
    let (mut rates, mut waits) = ([Vec::new(), Vec::new()], Vec::new());
    for round in 0..=rounds {
        for (n, cycle) in cycles.iter().enumerate() {
            let ran = cycle.run(length).await?;
            // The first one warms up.
            if round > 0 {
                rates[n].push(ran.cycles_per_s());
                if n == 1 {
                    waits.extend(ran.waits);
                }
            }
        }
    }
    let [few, many] = rates.map(median);
    Ok(Beside { tasks, few, many, waits })
}

/// Lets cycles run while what has expired is collected, and for as long before that.
pub(super) async fn collect(many: &Table) -> Result<Collecting, Failure> {
    let cycle = many.cycle(AT_WORK).await?;
    cycle.run(STRETCH).await?;
    let before = cycle.run(10 * STRETCH).await?;
    let handler = many.handler.clone();
    let collector = tokio::spawn(async move {
        let (mut freed, mut batches) = (0, Vec::new());
        loop {
            let began = Instant::now();
            match handler.gc(PAGE).await? {
                0 => return Ok::<_, session_core::Error>((freed, batches)),
                some => freed += some,
            }
            batches.push(Round::nanos(began.elapsed()));
        }
    });
    let mut stretches = Vec::new();
    while !collector.is_finished() {
        stretches.push(cycle.run(STRETCH).await?);
    }
    let (freed, batches) = collector.await.expect("collecting does not panic")?;
    Ok(Collecting { tasks: AT_WORK, freed, before, during: Round::join(stretches), batches })
}

/// How many there are in the two tables.
pub(super) fn counts(rows: NonZeroU32) -> [(u32, u32); 2] {
    [(FEW.min(rows.get()), 0), (rows.get(), rows.get() / 10)]
}
