//! The suite of those who go away: dropped openings, dropped futures, waiters who gave up.
//!
//! To a handler a dropped future is an answer that never came: what it asked for happened whole or not at all.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use session_core::{Change, ErrorKind, Expect, OpenRequest, SessionHandler, SessionId};

use crate::case::suite;
use crate::harness::Env;
use crate::steps::*;

suite! { $
    /// Claims that nobody who goes away without a word keeps a session for longer than a lease, or leaves half of a write.
    cancel as cancel_suite {
        dropped_opening_frees_its_lock_by_the_end_of_its_lease: "A holder that was dropped keeps its session until the end of its lease at the latest.";
        dropped_creator_frees_its_lock_by_the_end_of_its_lease: "A dropped holder of an absent or of a fresh id keeps it until the end of its lease at the latest.";
        dropped_opening_writes_nothing: "Dropping an opening changes nothing.";
        dropping_needs_no_runtime_and_never_blocks: "An opening can be dropped where there is no runtime, and that takes no time.";
        dropped_open_frees_its_lock_by_the_end_of_its_lease: "An open whose future was dropped keeps the session until the end of a lease at the latest.";
        dropped_waiters_do_not_disturb_the_queue: "Waiters whose futures were dropped keep nobody out.";
        waiters_who_gave_up_do_not_disturb_the_queue: "Waiters whose time ran out keep nobody out.";
        dropped_write_is_whole_or_nothing: "A write whose future was dropped happened whole or not at all.";
        dropped_save_is_whole_or_nothing_and_frees_its_lock: "A save whose future was dropped happened whole or not at all, and its lock ends with the lease.";
        dropped_destroy_removed_or_not: "A destroy whose future was dropped removed the record or did not, and can be called again.";
        cancel_storm: "After a storm of opens that were dropped at random moments the session opens within a lease, and the handler is as usable as before.";
    }
}

/// How long a case waits for a lease of the usual short length to end.
fn past(env: &Env) -> Duration {
    env.short() * 2 + Duration::from_secs(5)
}

/// Fails the case unless the session can be locked by the time a short lease has ended, and written.
async fn opens_within_a_lease(env: &Env, handler: &dyn SessionHandler, id: &SessionId, expect: Expect, data: &str) {
    let request = OpenRequest::exclusive(past(env), env.lease()).expecting(expect);
    match handler.open(id, &request).await {
        Ok(opened) => saved(opened, data).await,
        Err(error) => panic!("somebody who is gone still keeps the session after the end of his lease: {error:?}"),
    }
    holds(handler, id, data, "after the next one saved").await;
}

/// A future that is dropped after it was polled `n` times.
struct Polls<F> {
    inner: Option<Pin<Box<F>>>,
    left: u64,
}

impl<F: Future> Future for Polls<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.left == 0 {
            self.inner = None;
        }
        self.left = self.left.saturating_sub(1);
        match &mut self.inner {
            None => Poll::Ready(None),
            Some(inner) => match inner.as_mut().poll(context) {
                Poll::Ready(output) => Poll::Ready(Some(output)),
                Poll::Pending => {
                    // Polled again at once, so that it is dropped at a certain step and not at a certain time.
                    context.waker().wake_by_ref();
                    Poll::Pending
                }
            },
        }
    }
}

/// Drops `future` after `n` polls; `None` if it was not done by then.
async fn dropped_after<F: Future>(n: u64, future: F) -> Option<F::Output> {
    Polls { inner: Some(Box::pin(future)), left: n }.await
}

async fn dropped_opening_frees_its_lock_by_the_end_of_its_lease(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for wrote in [false, true] {
        let id = session(&env, &*here, "old").await;
        let (mut opened, _) = open_read(&*here, &id, env.briefly()).await;
        if wrote {
            written(&mut opened, "written").await;
        }
        drop(opened);
        opens_within_a_lease(&env, &*there, &id, Expect::Existing, "next").await;
    }
}

async fn dropped_creator_frees_its_lock_by_the_end_of_its_lease(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    drop(open(&*here, &id, env.briefly().expecting(Expect::Any)).await);
    opens_within_a_lease(&env, &*there, &id, Expect::Any, "made").await;
    let id = new_id();
    let mut fresh = open(&*here, &id, env.briefly().expecting(Expect::Fresh)).await;
    written(&mut fresh, "made").await;
    drop(fresh);
    opens_within_a_lease(&env, &*there, &id, Expect::Existing, "next").await;
}

async fn dropped_opening_writes_nothing(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    for request in [env.briefly(), OpenRequest::read_only(), OpenRequest::destroy(), env.briefly().expecting(Expect::Fresh)]
    {
        drop(open(&*handler, &id, request).await);
        holds(&*handler, &id, "old", "after an opening was dropped").await;
    }
    let absent_one = new_id();
    for expect in [Expect::Any, Expect::Existing, Expect::Fresh] {
        drop(open(&*handler, &absent_one, env.briefly().expecting(expect)).await);
        absent(&*handler, &absent_one, "after an opening was dropped").await;
    }
    opens_within_a_lease(&env, &*handler, &absent_one, Expect::Any, "made").await;
}

async fn dropping_needs_no_runtime_and_never_blocks(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    let (mut opened, _) = open_read(&*handler, &id, env.briefly()).await;
    written(&mut opened, "written").await;
    let view = open(&*handler, &id, OpenRequest::read_only()).await;
    let dropped = std::thread::spawn(move || {
        let started = Instant::now();
        drop(opened);
        drop(view);
        started.elapsed()
    });
    let took = tokio::task::spawn_blocking(move || dropped.join()).await.expect("the thread is joined");
    let took = took.unwrap_or_else(|_| panic!("dropping without a runtime panicked"));
    assert!(took < SOON, "dropping took {took:?}");
    holds(&*handler, &id, "written", "after its holder was dropped").await;
    opens_within_a_lease(&env, &*handler, &id, Expect::Existing, "next").await;
}

async fn dropped_open_frees_its_lock_by_the_end_of_its_lease(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for polls in [0, 1, 2, 3, 5, 8, 40] {
        for expect in [Expect::Existing, Expect::Any] {
            let id = session(&env, &*here, "old").await;
            let request = env.briefly().expecting(expect);
            drop(dropped_after(polls, here.open(&id, &request)).await);
            opens_within_a_lease(&env, &*there, &id, Expect::Existing, "next").await;
        }
    }
}

async fn dropped_waiters_do_not_disturb_the_queue(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let mut rng = env.rng(1);
    let id = session(&env, &*here, "old").await;
    let held = open(&*here, &id, env.patient()).await;
    let request = env.briefly();
    for n in 0..10 {
        if n % 2 == 0 {
            let _ = dropped_after(1 + rng.below(20), there.open(&id, &request)).await;
        } else {
            let _ = tokio::time::timeout(rng.duration(env.tick() / 2), there.open(&id, &request)).await;
        }
    }
    let (handler, waiting) = (there.clone(), id.clone());
    let last = env.spawn(async move {
        // In the queue when the holder goes, and gone shortly after: it may become the holder unseen.
        let _ = tokio::time::timeout(Duration::from_millis(2), handler.open(&waiting, &request)).await;
    });
    close(held).await;
    env.joined(last).await;
    opens_within_a_lease(&env, &*there, &id, Expect::Existing, "next").await;
}

async fn waiters_who_gave_up_do_not_disturb_the_queue(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let held = open(&*here, &id, env.patient()).await;
    for _ in 0..4 {
        let second = there.open(&id, &OpenRequest::exclusive(env.tick() / 2, env.lease())).await;
        refused(second, &[ErrorKind::LockTimeout], "an open of a held session");
    }
    close(held).await;
    let next = open(&*there, &id, OpenRequest::exclusive(SOON, env.lease())).await;
    saved(next, "next").await;
}

async fn dropped_write_is_whole_or_nothing(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let (old, new) = (vec![b'o'; 9000], vec![b'n'; 7000]);
    for polls in 0..10 {
        let id = session(&env, &*here, old.clone()).await;
        let (mut opened, _) = open_read(&*here, &id, env.briefly()).await;
        let whole = record(new.clone());
        let done = dropped_after(polls, opened.write(&whole, wid())).await;
        drop(opened);
        let next = open(&*there, &id, OpenRequest::exclusive(past(&env), env.lease())).await;
        let seen = look(&*there, &id).await;
        let is = |data: &[u8]| seen.as_deref() == Some(data);
        assert!(is(&new) || (is(&old) && done.is_none()), "after {polls} polls the session has {}", shown(seen.as_deref()));
        close(next).await;
    }
}

async fn dropped_save_is_whole_or_nothing_and_frees_its_lock(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for polls in 0..10 {
        let id = session(&env, &*here, "old").await;
        let (mut opened, _) = open_read(&*here, &id, env.briefly()).await;
        let change = Change::Write(record("new"));
        let done = dropped_after(polls, opened.save(&change, wid())).await;
        drop(opened);
        let request = OpenRequest::exclusive(past(&env), env.lease());
        let (next, seen) = open_read(&*there, &id, request).await;
        let is = |data: &[u8]| seen.as_deref() == Some(data);
        assert!(
            is(b"new") || (is(b"old") && done.is_none()),
            "after {polls} polls the session has {}",
            shown(seen.as_deref())
        );
        saved(next, "next").await;
        holds(&*here, &id, "next", "after the next one saved").await;
    }
}

async fn dropped_destroy_removed_or_not(env: Env) {
    let handler = env.handler().await;
    for polls in 0..6 {
        let id = session(&env, &*handler, "doomed").await;
        let mut opened = open(&*handler, &id, OpenRequest::destroy()).await;
        let done = dropped_after(polls, opened.destroy()).await;
        let seen = look(&*handler, &id).await;
        let kept = seen.as_deref() == Some(&b"doomed"[..]);
        assert!(
            seen.is_none() || (kept && done.is_none()),
            "after {polls} polls the session has {}",
            shown(seen.as_deref())
        );
        let again = opened.destroy().await;
        assert!(again.is_ok(), "calling destroy again said {again:?}");
        absent(&*handler, &id, "after it was destroyed again").await;
    }
}

async fn cancel_storm(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    let id = session(&env, &*handlers[0], "old").await;
    let lease = env.short();
    let parts: Vec<_> = (0..10)
        .map(|n| {
            let (handler, id, mut rng): (Arc<dyn SessionHandler>, _, _) =
                (handlers[n % 2].clone(), id.clone(), env.rng(n as u64));
            env.spawn(async move {
                for _ in 0..15 {
                    let request = OpenRequest::exclusive(Duration::from_millis(20), lease);
                    if rng.below(2) == 0 {
                        let _ = dropped_after(rng.below(6), handler.open(&id, &request)).await;
                    } else {
                        let open = handler.open(&id, &request);
                        let opened = tokio::time::timeout(rng.duration(Duration::from_millis(4)), open).await;
                        tokio::time::sleep(rng.duration(Duration::from_millis(1))).await;
                        drop(opened);
                    }
                }
            })
        })
        .collect();
    for part in parts {
        env.joined(part).await;
    }
    opens_within_a_lease(&env, &*handlers[1], &id, Expect::Existing, "next").await;
    // Nothing was used up: as many sessions as before can be open at once.
    let mut open_ones = Vec::new();
    for _ in 0..10 {
        let other = session(&env, &*handlers[0], "other").await;
        open_ones.push(open(&*handlers[0], &other, env.at_once()).await);
    }
    for opened in open_ones {
        saved(opened, "saved").await;
    }
}
