//! How a table is cleared of what has expired, so that nobody who is served meanwhile waits long.
//!
//! What is deleted in one statement is written to the log of the database at once, and every commit that comes behind it waits until
//! that is on the disk. So a piece is as large as can be freed in a few milliseconds, and then twice as long a time is left to the others.
//!
//! What goes is looked for once for many pieces. A database that keeps what was deleted for as long as somebody may still see it passes
//! all of that whenever it looks, and one that looked anew for each piece would need a time that grows with the square of their number:
//! on PostgreSQL a search for 64 rows took 320 ms behind 50,000 that were deleted while a transaction could still see them.
//!
//! By which statements that is done is not known here.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::database::Failure;

/// How many rows go at first, at least, and at most.
const FIRST: usize = 32;
const LEAST: usize = 8;
pub(crate) const MOST: usize = 64;

/// A piece that took less is followed by a larger one, and one that took more by a smaller one.
const SHORT: Duration = Duration::from_micros(1500);
const LONG: Duration = Duration::from_millis(4);

/// How long the others have the database to themselves between two pieces.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// How many keys are looked for at a time. On PostgreSQL each is a page of the table that is read, and is still there when it is freed.
pub(crate) const SEARCH: u32 = 4096;

/// The keys that were found to be of no use any more, and have not gone. Whether they still are is for him to judge who frees them.
/// They are ids, so there is no `Debug`.
#[derive(Default)]
pub(crate) struct Finds(Mutex<VecDeque<String>>);

impl Finds {
    fn take(&self, count: usize) -> Vec<String> {
        let mut keys = self.keys();
        let count = count.min(keys.len());
        keys.drain(..count).collect()
    }

    fn put(&self, found: Vec<String>) {
        self.keys().extend(found);
    }

    fn keys(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has `search` look for up to [`SEARCH`] keys, `free` free those of them that it still can, at most [`MOST`] at a time, and so on until
/// `limit` rows are freed or there is nothing more to free. Returns how many it has freed. What was found and not asked for stays in
/// `finds`.
///
/// # Cancel safety
/// What was freed stays so; what was about to be is found again.
pub(crate) async fn in_pieces<S, F>(
    limit: u32,
    finds: &Finds,
    search: impl Fn() -> S,
    free: impl Fn(Vec<String>) -> F,
) -> Result<u32, Failure>
where
    S: Future<Output = Result<Vec<String>, Failure>>,
    F: Future<Output = Result<u32, Failure>>,
{
    let (mut piece, mut all) = (FIRST, 0);
    // Whether there may be more than was found, and whether anything came of what was found last: somebody may keep all of it.
    let (mut more, mut fruitful) = (true, true);
    while all < limit {
        let keys = finds.take(piece.min((limit - all) as usize));
        if keys.is_empty() {
            if !more || !fruitful {
                break;
            }
            let found = search().await?;
            (more, fruitful) = (found.len() >= SEARCH as usize, false);
            if found.is_empty() {
                break;
            }
            finds.put(found);
            continue;
        }
        let (asked, began) = (keys.len(), Instant::now());
        let freed = free(keys).await?;
        fruitful |= freed > 0;
        all += freed.min(asked as u32);
        let took = began.elapsed();
        piece = next(piece, took);
        if all < limit {
            tokio::time::sleep((2 * took).clamp(PAUSE.0, PAUSE.1)).await;
        }
    }
    Ok(all)
}

fn next(piece: usize, took: Duration) -> usize {
    match took {
        short if short < SHORT => (piece * 2).min(MOST),
        long if long > LONG => (piece / 2).max(LEAST),
        _ => piece,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;

    use super::*;

    /// A table: what is in it, and how often it was searched. What begins with a dash is never freed, and found first.
    struct Table {
        rows: RefCell<BTreeSet<String>>,
        finds: Finds,
        searches: Cell<u32>,
        most: Cell<usize>,
    }

    impl Table {
        fn of(rows: usize) -> Self {
            let rows = RefCell::new((0..rows).map(|n| n.to_string()).collect());
            Self { rows, finds: Finds::default(), searches: Cell::new(0), most: Cell::new(0) }
        }

        async fn clear(&self, limit: u32) -> u32 {
            let search = async || {
                self.searches.set(self.searches.get() + 1);
                Ok(self.rows.borrow().iter().take(SEARCH as usize).cloned().collect())
            };
            let free = async |keys: Vec<String>| {
                self.most.set(self.most.get().max(keys.len()));
                let mut rows = self.rows.borrow_mut();
                Ok(keys.iter().filter(|key| !key.starts_with('-') && rows.remove(*key)).count() as u32)
            };
            in_pieces(limit, &self.finds, search, free).await.unwrap()
        }

        fn left(&self) -> usize {
            self.rows.borrow().len()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_goes_than_was_asked_for_and_what_is_there_goes() {
        for rows in [0, 5, 32, 33, 1000, SEARCH as usize, SEARCH as usize + 1] {
            for limit in [0, 1, 5, 33, 1000, u32::MAX] {
                let table = Table::of(rows);
                assert_eq!(table.clear(limit).await, limit.min(rows as u32), "{rows} rows, {limit} asked for");
                assert_eq!(table.left(), rows - rows.min(limit as usize));
                assert!(table.most.get() <= MOST);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_found_once_serves_the_calls_that_follow() {
        let table = Table::of(2 * SEARCH as usize);
        for _ in 0..64 {
            assert_eq!(table.clear(SEARCH / 32).await, SEARCH / 32);
        }
        assert_eq!((table.clear(100).await, table.searches.get()), (0, 3));
        // What others have freed meanwhile is nothing to go by.
        let table = Table::of(1000);
        assert_eq!(table.clear(10).await, 10);
        *table.rows.borrow_mut() = ["new".into()].into();
        assert_eq!((table.clear(10).await, table.left()), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_somebody_keeps_is_passed_by_and_comes_to_an_end() {
        let held = |count: usize| (0..count).map(|n| format!("-{n}"));
        let table = Table::of(100);
        table.rows.borrow_mut().extend(held(50));
        assert_eq!((table.clear(1000).await, table.left()), (100, 50));
        assert_eq!(table.clear(1000).await, 0);
        table.rows.borrow_mut().extend(held(2 * SEARCH as usize));
        assert_eq!(table.clear(1000).await, 0, "all that was found is kept");
    }

    #[test]
    fn a_piece_grows_and_shrinks_with_the_time_that_it_takes() {
        assert_eq!(next(FIRST, Duration::ZERO), 2 * FIRST);
        assert_eq!(next(MOST, Duration::ZERO), MOST);
        assert_eq!(next(FIRST, Duration::from_millis(2)), FIRST);
        assert_eq!(next(FIRST, Duration::from_secs(1)), FIRST / 2);
        assert_eq!(next(LEAST, Duration::from_secs(1)), LEAST);
    }

    #[tokio::test]
    async fn a_failure_is_told() {
        let (no, one) = (|| Failure::unexpected("no"), || Ok(vec!["one".to_owned()]));
        let unsought = in_pieces(10, &Finds::default(), async || Err(no()), async |_| Ok(1)).await;
        let not_freed = in_pieces(10, &Finds::default(), async || one(), async |_| Err(no())).await;
        assert!([unsought, not_freed].into_iter().all(|failed| failed.unwrap_err().message == "no"));
    }
}
