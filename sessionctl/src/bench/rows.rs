//! What the number of stored sessions costs: a cycle beside many of them and beside few, and beside the collecting of those that
//! have expired.
//!
//! Each number has a table of its own, made and dropped here.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use session_core::SessionHandler;

use crate::bench::ours::HandlerCycle;
use crate::bench::{Round, median, sql};
use crate::failure::Failure;
use crate::store::PAGE;

/// What is few.
const FEW: u32 = 1000;

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
    pub(super) during: Round,
    pub(super) without: Round,
    pub(super) batches: Vec<u32>,
}

/// A table with sessions in it.
pub(super) struct Table {
    handler: Arc<dyn SessionHandler>,
    payload: usize,
}

impl Table {
    /// Stores `count` sessions, of which `expired` have no life left.
    pub(super) async fn fill(dsn: &str, count: u32, expired: u32, payload: usize) -> Result<Self, Failure> {
        // The handler makes the table.
        let this = Self { handler: sessionkit::handler(dsn).await?, payload };
        sql::fill(dsn, count, expired, payload).await?;
        Ok(this)
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

/// Lets cycles run while what has expired is collected, and as long again without: a database has cycles that take long at all
/// times.
pub(super) async fn collect(many: &Table) -> Result<Collecting, Failure> {
    let cycle = many.cycle(AT_WORK).await?;
    cycle.run(STRETCH).await?;
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
    let mut during = Vec::new();
    while !collector.is_finished() {
        during.push(cycle.run(STRETCH).await?);
    }
    let (freed, batches) = collector.await.expect("collecting does not panic")?;
    // What the last of it has left the database to write is no part of the time without.
    tokio::time::sleep(5 * STRETCH).await;
    let mut without = Vec::new();
    for _ in 0..during.len() {
        without.push(cycle.run(STRETCH).await?);
    }
    Ok(Collecting { tasks: AT_WORK, freed, during: Round::join(during), without: Round::join(without), batches })
}

/// How many there are in the two tables.
pub(super) fn counts(rows: NonZeroU32) -> [(u32, u32); 2] {
    [(FEW.min(rows.get()), 0), (rows.get(), rows.get() / 10)]
}
