//! In what pieces a table is cleared, so that nobody who is served meanwhile waits long.
//!
//! What is deleted in one statement is written to the log of the database at once, and every commit that comes behind it waits until
//! that is on the disk. So a piece is as large as can be freed in a few milliseconds, and then as long a time is left to the others.
//! What is deleted, and by which statement, is not known here.

use std::time::{Duration, Instant};

use crate::database::Failure;

/// How many rows go at first, at least, and at most.
const FIRST: u32 = 32;
const LEAST: u32 = 8;
const MOST: u32 = 256;

/// A piece that took less is followed by a larger one, and one that took more by a smaller one.
const SHORT: Duration = Duration::from_millis(3);
const LONG: Duration = Duration::from_millis(8);

/// How long the others have the database to themselves between two pieces.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// Has `free` free at most `limit` rows, so many at a time as it is told, and returns how many it has freed.
///
/// # Cancel safety
/// What was freed stays so.
pub(crate) async fn in_pieces<F>(limit: u32, free: impl Fn(u32) -> F) -> Result<u32, Failure>
where
    F: Future<Output = Result<u32, Failure>>,
{
    let (mut piece, mut all) = (FIRST, 0);
    while all < limit {
        let (asked, began) = (piece.min(limit - all), Instant::now());
        let freed = free(asked).await?;
        all += freed.min(asked);
        if freed < asked {
            break;
        }
        let took = began.elapsed();
        piece = next(piece, took);
        if all < limit {
            tokio::time::sleep(took.clamp(PAUSE.0, PAUSE.1)).await;
        }
    }
    Ok(all)
}

fn next(piece: u32, took: Duration) -> u32 {
    match took {
        short if short < SHORT => (piece * 2).min(MOST),
        long if long > LONG => (piece / 2).max(LEAST),
        _ => piece,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Clears a table of `rows` rows and returns how many were freed, and how many were asked for each time.
    async fn cleared(rows: u32, limit: u32) -> (u32, Vec<u32>) {
        let asked = RefCell::new(Vec::new());
        let left = RefCell::new(rows);
        let free = async |count: u32| {
            asked.borrow_mut().push(count);
            let freed = count.min(*left.borrow());
            *left.borrow_mut() -= freed;
            Ok(freed)
        };
        let freed = in_pieces(limit, free).await.unwrap();
        assert_eq!(rows - freed, *left.borrow());
        (freed, asked.into_inner())
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_goes_than_was_asked_for_and_what_is_there_goes() {
        assert_eq!(cleared(0, 1000).await, (0, vec![FIRST]));
        assert_eq!(cleared(5, 1000).await, (5, vec![FIRST]));
        assert_eq!(cleared(1000, 5).await, (5, vec![5]));
        assert_eq!(cleared(1000, 0).await, (0, vec![]));
        for (rows, limit) in [(32, 1000), (33, 1000), (1000, 32), (1000, 33), (1000, 1000), (1000, 999)] {
            let (freed, asked) = cleared(rows, limit).await;
            assert_eq!(freed, rows.min(limit));
            assert!(asked.iter().sum::<u32>() <= limit.max(freed) && asked.iter().all(|count| *count <= MOST), "{asked:?}");
        }
    }

    #[test]
    fn a_piece_grows_and_shrinks_with_the_time_that_it_takes() {
        assert_eq!(next(FIRST, Duration::ZERO), 2 * FIRST);
        assert_eq!(next(MOST, Duration::ZERO), MOST);
        assert_eq!(next(FIRST, Duration::from_millis(5)), FIRST);
        assert_eq!(next(FIRST, Duration::from_secs(1)), FIRST / 2);
        assert_eq!(next(LEAST, Duration::from_secs(1)), LEAST);
    }

    #[tokio::test]
    async fn a_failure_is_told() {
        let failed = in_pieces(10, async |_| Err(Failure::unexpected("no"))).await;
        assert_eq!(failed.unwrap_err().message, "no");
    }
}
