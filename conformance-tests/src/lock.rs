//! The suite of the lock alone: who may work on a session, for how long, and what renewal and release are worth.
//!
//! Nothing here knows about records.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use session_core::{ErrorKind, Lease, LeaseRequest, SessionId, SessionLock};

use crate::case::suite;
use crate::harness::Env;
use crate::steps::{SOON, new_id, refused};

suite! { $
    /// Claims that the store's lock can be used alone, as [`SessionLock`](session_core::SessionLock) says; the harness has to
    /// give one.
    lock as lock_suite {
        one_at_a_time: "Between the return of an acquire and the release nobody else is in.";
        a_taken_lock_times_out_within_the_wait: "Who cannot have the lock is told so when his wait is over, not much later and not before.";
        without_a_wait_it_is_tried_once: "Without a wait a taken lock is refused at once, and a free one is taken.";
        whoever_has_it_waits_too: "Whoever acquires what he already holds waits like anyone else.";
        different_ids_never_contend: "Different ids have different locks.";
        a_release_lets_the_next_in_soon: "A waiter gets in soon after the release.";
        a_waiter_who_gave_up_is_not_waited_for: "Waiters that gave up do not keep later ones out.";
        a_dropped_acquire_is_forgotten: "An acquire whose future was dropped keeps nobody out for longer than its lease.";
        a_lease_knows_its_id_and_length: "A lease is for the id and of the length that was asked for.";
        a_lease_lasts_its_length: "A lease does not end before its length is over.";
        a_lease_ends_by_itself: "A lease that is neither renewed nor released ends, and the next gets in.";
        a_takeover_is_not_called_clean: "A lease that follows one that ended by itself does not claim to follow a release.";
        releasing_twice_succeeds: "Releasing what was released succeeds and frees nobody else's lock.";
        a_release_after_loss_touches_nobody: "Releasing a lease that was taken over succeeds and leaves the lock with its holder.";
        abandoning_never_blocks: "Abandoning a lease returns at once, without a runtime, and the lock is free by the end of the lease.";
        abandoning_after_loss_touches_nobody: "Abandoning a lease that was taken over leaves the lock with its holder.";
        renewal_extends: "A lease that is renewed in time lasts as long as it is renewed.";
        renewal_is_for_the_whole_length: "Each renewal is for the length of the lease.";
        renewal_after_takeover_is_fenced: "A lease that was taken over cannot be renewed, and the renewal takes nothing back.";
        renewals_are_answered_in_order: "A batch of renewals has one answer for each lease, in order.";
        renewing_nothing_answers_nothing: "An empty batch of renewals has no answers.";
        a_released_lease_is_not_renewed_over_the_next: "Renewing a released lease does not disturb the next holder.";
        tokens_are_never_used_twice: "Every acquisition has a name of its own.";
    }
}

const TIMEOUT: &[ErrorKind] = &[ErrorKind::LockTimeout];

async fn acquire(lock: &dyn SessionLock, id: &SessionId, wait: Duration, lease: Duration) -> Arc<Lease> {
    match lock.acquire(id, &LeaseRequest { wait, lease }).await {
        Ok(lease) => lease,
        Err(error) => panic!("the lock was refused: {error:?}"),
    }
}

async fn release(lock: &dyn SessionLock, lease: &Lease) {
    let released = lock.release(lease).await;
    assert!(released.is_ok(), "a release said {released:?}");
}

/// Fails the case unless somebody has the lock.
async fn is_taken(env: &Env, lock: &dyn SessionLock, id: &SessionId, when: &str) {
    let got = lock.acquire(id, &LeaseRequest { wait: Duration::ZERO, lease: env.lease() }).await;
    refused(got, TIMEOUT, &format!("an acquire {when}"));
}

/// How long a case waits for a lease of the usual short length to end.
fn past(env: &Env) -> Duration {
    env.short() * 2 + Duration::from_secs(5)
}

/// Takes the lock over from `lost`, a lease of the usual short length that `holder` granted. Where leases do not end by
/// themselves, it is given back first.
async fn overtake(env: &Env, holder: &dyn SessionLock, lost: &Lease, lock: &dyn SessionLock) -> Arc<Lease> {
    if !env.leases_end() {
        release(holder, lost).await;
    }
    acquire(lock, lost.id(), past(env), env.lease()).await
}

/// Fails the case unless the lock of a lease without an end is still taken after `wait`.
async fn lasts(env: &Env, lock: &dyn SessionLock, id: &SessionId, wait: Duration) {
    let got = lock.acquire(id, &LeaseRequest { wait, lease: env.lease() }).await;
    refused(got, TIMEOUT, "an acquire past the length of a lease that does not end");
}

async fn one_at_a_time(env: Env) {
    let id = new_id();
    let inside = Arc::new(AtomicU32::new(0));
    let mut parts = Vec::new();
    for n in 0..4 {
        let (lock, id, inside, lease) = (env.lock().await, id.clone(), inside.clone(), env.lease());
        let wait = Duration::from_secs(20) + env.tick() * 20;
        let mut rng = env.rng(n);
        parts.push(env.spawn(async move {
            for _ in 0..8 {
                let lease = acquire(&*lock, &id, wait, lease).await;
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two were in at the same time");
                tokio::time::sleep(rng.duration(Duration::from_millis(3))).await;
                inside.fetch_sub(1, Ordering::SeqCst);
                release(&*lock, &lease).await;
            }
        }));
    }
    for part in parts {
        env.joined(part).await;
    }
}

async fn a_taken_lock_times_out_within_the_wait(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let lease = acquire(&*here, &id, SOON, env.lease()).await;
    let wait = Duration::from_millis(400).max(env.tick() * 2);
    let started = Instant::now();
    let got = there.acquire(&id, &LeaseRequest { wait, lease: env.lease() }).await;
    let waited = started.elapsed();
    refused(got, TIMEOUT, "an acquire of a taken lock");
    assert!(waited + Duration::from_millis(20) >= wait, "it gave up after {waited:?} of {wait:?}");
    assert!(waited <= wait + Duration::from_secs(2), "it gave up only after {waited:?}, with a wait of {wait:?}");
    release(&*here, &lease).await;
}

async fn without_a_wait_it_is_tried_once(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let lease = acquire(&*here, &id, Duration::ZERO, env.lease()).await;
    let started = Instant::now();
    is_taken(&env, &*there, &id, "without a wait").await;
    assert!(started.elapsed() < SOON, "it took {:?} to be refused without a wait", started.elapsed());
    release(&*here, &lease).await;
    let next = acquire(&*there, &id, Duration::ZERO, env.lease()).await;
    release(&*there, &next).await;
}

async fn whoever_has_it_waits_too(env: Env) {
    let lock = env.lock().await;
    let id = new_id();
    let lease = acquire(&*lock, &id, SOON, env.lease()).await;
    is_taken(&env, &*lock, &id, "by the holder itself").await;
    release(&*lock, &lease).await;
}

async fn different_ids_never_contend(env: Env) {
    let lock = env.lock().await;
    let mut leases = Vec::new();
    for _ in 0..10 {
        leases.push(acquire(&*lock, &new_id(), Duration::ZERO, env.lease()).await);
    }
    for lease in &leases {
        release(&*lock, lease).await;
    }
}

async fn a_release_lets_the_next_in_soon(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let held = acquire(&*here, &id, SOON, env.lease()).await;
    let (waiting, lease) = (id.clone(), env.lease());
    let waiter = env.spawn(async move {
        let lease = acquire(&*there, &waiting, SOON * 2, lease).await;
        (there, lease, Instant::now())
    });
    tokio::time::sleep(env.tick().max(Duration::from_millis(50))).await;
    assert!(!waiter.is_finished(), "the waiter was in before the release");
    let released = Instant::now();
    release(&*here, &held).await;
    let (there, lease, entered) = env.joined(waiter).await;
    let after = entered.saturating_duration_since(released);
    assert!(after < SOON, "the waiter was in only {after:?} after the release");
    release(&*there, &lease).await;
}

async fn a_waiter_who_gave_up_is_not_waited_for(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let held = acquire(&*here, &id, SOON, env.lease()).await;
    for _ in 0..3 {
        let got = there.acquire(&id, &LeaseRequest { wait: env.tick() / 2, lease: env.lease() }).await;
        refused(got, TIMEOUT, "an acquire of a taken lock");
    }
    release(&*here, &held).await;
    let next = acquire(&*there, &id, SOON, env.lease()).await;
    release(&*there, &next).await;
}

async fn a_dropped_acquire_is_forgotten(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let mut rng = env.rng(1);
    let held = acquire(&*here, &id, SOON, env.lease()).await;
    let request = LeaseRequest { wait: Duration::from_secs(20), lease: env.short() };
    for _ in 0..8 {
        let _ = tokio::time::timeout(rng.duration(env.tick() / 2), there.acquire(&id, &request)).await;
    }
    let released = env.spawn({
        let id = id.clone();
        async move {
            // Dropped in the middle of the hand-over, one may have become the holder unseen.
            let _ = tokio::time::timeout(Duration::from_millis(1), there.acquire(&id, &request)).await;
            there
        }
    });
    release(&*here, &held).await;
    let there = env.joined(released).await;
    let next = acquire(&*there, &id, past(&env), env.lease()).await;
    release(&*there, &next).await;
}

async fn a_lease_knows_its_id_and_length(env: Env) {
    let lock = env.lock().await;
    let id = new_id();
    let lease = acquire(&*lock, &id, SOON, env.lease()).await;
    assert!(lease.id() == &id, "the lease is for another id");
    assert_eq!(lease.length(), env.lease(), "the lease has another length than was asked for");
    assert!(!lease.is_lost(), "a new lease is marked as lost");
    release(&*lock, &lease).await;
}

async fn a_lease_lasts_its_length(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let length = env.tick() * 5;
    let started = Instant::now();
    let first = acquire(&*here, &id, SOON, length).await;
    if !env.leases_end() {
        return lasts(&env, &*there, &id, length * 2).await;
    }
    let second = acquire(&*there, &id, length * 2 + Duration::from_secs(5), env.lease()).await;
    let lasted = started.elapsed();
    assert!(lasted + env.tick() / 4 >= length, "a lease of {length:?} was over after {lasted:?}");
    release(&*there, &second).await;
    drop(first);
}

async fn a_lease_ends_by_itself(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    for wait in [past(&env), Duration::ZERO] {
        let id = new_id();
        let mut dead = Some(acquire(&*here, &id, SOON, env.short()).await);
        if wait.is_zero() {
            env.outlast(env.short()).await;
        }
        if !env.leases_end() {
            // It ends with its holder instead, who gives nothing back.
            lasts(&env, &*there, &id, env.short() * 2).await;
            dead = None;
        }
        let next = acquire(&*there, &id, wait, env.lease()).await;
        is_taken(&env, &*here, &id, "beside the one who took over").await;
        release(&*there, &next).await;
        drop(dead);
    }
}

async fn a_takeover_is_not_called_clean(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let first = acquire(&*here, &id, SOON, env.lease()).await;
    release(&*here, &first).await;
    let dead = acquire(&*here, &id, SOON, env.short()).await;
    let next = if env.leases_end() {
        overtake(&env, &*here, &dead, &*there).await
    } else {
        // A holder that vanishes may have left work under way; one that releases has not.
        drop(dead);
        acquire(&*there, &id, past(&env), env.lease()).await
    };
    assert!(!next.follows_clean_release(), "a lease that was taken over claims to follow a release");
    release(&*there, &next).await;
}

async fn releasing_twice_succeeds(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let first = acquire(&*here, &id, SOON, env.lease()).await;
    release(&*here, &first).await;
    release(&*here, &first).await;
    let second = acquire(&*there, &id, Duration::ZERO, env.lease()).await;
    release(&*here, &first).await;
    is_taken(&env, &*here, &id, "after the holder before released again").await;
    release(&*there, &second).await;
}

async fn a_release_after_loss_touches_nobody(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let lost = acquire(&*here, &id, SOON, env.short()).await;
    let next = overtake(&env, &*here, &lost, &*there).await;
    release(&*here, &lost).await;
    is_taken(&env, &*here, &id, "after a lost lease was released").await;
    release(&*there, &next).await;
}

async fn abandoning_never_blocks(env: Env) {
    let lock = env.lock().await;
    let id = new_id();
    let lease = acquire(&*lock, &id, SOON, env.short()).await;
    let abandoned = {
        let lock = lock.clone();
        // A thread of its own, because a `Drop` may run where there is no runtime.
        std::thread::spawn(move || {
            let started = Instant::now();
            lock.abandon(lease);
            started.elapsed()
        })
    };
    let took = tokio::task::spawn_blocking(move || abandoned.join()).await.expect("the thread is joined");
    let took = took.unwrap_or_else(|_| panic!("abandoning without a runtime panicked"));
    assert!(took < SOON, "abandoning took {took:?}");
    let next = acquire(&*lock, &id, past(&env), env.lease()).await;
    release(&*lock, &next).await;
}

async fn abandoning_after_loss_touches_nobody(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let lost = acquire(&*here, &id, SOON, env.short()).await;
    let next = overtake(&env, &*here, &lost, &*there).await;
    here.abandon(lost);
    env.ticks(1).await;
    is_taken(&env, &*here, &id, "after a lost lease was abandoned").await;
    release(&*there, &next).await;
}

/// Renews one lease.
async fn renew(lock: &dyn SessionLock, lease: &Arc<Lease>) -> session_core::Result<()> {
    let mut outcomes = lock.renew(std::slice::from_ref(lease)).await;
    assert_eq!(outcomes.len(), 1, "one renewal was asked for");
    outcomes.remove(0)
}

async fn renewal_extends(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let length = env.tick() * 6;
    let lease = acquire(&*here, &id, SOON, length).await;
    let waiter = {
        let (there, id, lease) = (there.clone(), id.clone(), env.lease());
        env.spawn(async move {
            let lease = acquire(&*there, &id, length * 6 + Duration::from_secs(10), lease).await;
            (lease, Instant::now())
        })
    };
    let mut renewed = Instant::now();
    for _ in 0..12 {
        env.ticks(1).await;
        let asked = Instant::now();
        match renew(&*here, &lease).await {
            Ok(()) => renewed = asked,
            // On a busy machine this task can be later than its own lease.
            Err(error) => {
                assert!(renewed.elapsed() >= length, "a renewal in time ended as {error:?}");
                break;
            }
        }
    }
    let released = !env.leases_end();
    if released {
        assert!(!waiter.is_finished(), "somebody else was in beside a lease that does not end");
        release(&*here, &lease).await;
    }
    let (next, entered) = env.joined(waiter).await;
    let lasted = entered.saturating_duration_since(renewed);
    assert!(released || lasted + env.tick() / 4 >= length, "somebody else was in {lasted:?} after a renewal for {length:?}");
    release(&*there, &next).await;
}

async fn renewal_is_for_the_whole_length(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let length = env.tick() * 6;
    let lease = acquire(&*here, &id, SOON, length).await;
    env.ticks(1).await;
    let renewed = Instant::now();
    let outcome = renew(&*here, &lease).await;
    assert!(outcome.is_ok(), "a renewal in time ended as {outcome:?}");
    if !env.leases_end() {
        return lasts(&env, &*there, &id, length * 2).await;
    }
    let next = acquire(&*there, &id, length * 2 + Duration::from_secs(5), env.lease()).await;
    let lasted = renewed.elapsed();
    assert!(lasted + env.tick() / 4 >= length, "a renewal for {length:?} was over after {lasted:?}");
    release(&*there, &next).await;
}

async fn renewal_after_takeover_is_fenced(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let lost = acquire(&*here, &id, SOON, env.short()).await;
    let next = overtake(&env, &*here, &lost, &*there).await;
    refused(renew(&*here, &lost).await, &[ErrorKind::Fenced], "the renewal of a lease that was taken over");
    let again = renew(&*there, &next).await;
    assert!(again.is_ok(), "after a stranger tried to renew, the holder's renewal ended as {again:?}");
    is_taken(&env, &*here, &id, "after a lost lease was renewed").await;
    release(&*there, &next).await;
}

async fn renewals_are_answered_in_order(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let lost = acquire(&*here, &id, SOON, env.short()).await;
    let next = overtake(&env, &*here, &lost, &*there).await;
    let (first, last) =
        (acquire(&*here, &new_id(), SOON, env.lease()).await, acquire(&*here, &new_id(), SOON, env.lease()).await);
    let outcomes = here.renew(&[first.clone(), last.clone(), lost.clone()]).await;
    let kinds: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().err().map(session_core::Error::kind)).collect();
    assert_eq!(kinds, [None, None, Some(ErrorKind::Fenced)], "the renewals of two held leases and a lost one");
    for (lock, lease) in [(&here, &first), (&here, &last), (&there, &next)] {
        release(&**lock, lease).await;
    }
}

async fn renewing_nothing_answers_nothing(env: Env) {
    let lock = env.lock().await;
    assert!(lock.renew(&[]).await.is_empty(), "an empty batch was answered");
    // A batch of two is answered twice: an answer to nothing must not come from a fixed number of answers.
    let (one, two) =
        (acquire(&*lock, &new_id(), SOON, env.lease()).await, acquire(&*lock, &new_id(), SOON, env.lease()).await);
    assert_eq!(lock.renew(&[one.clone(), two.clone()]).await.len(), 2, "two renewals were asked for");
    for lease in [one, two] {
        release(&*lock, &lease).await;
    }
}

async fn a_released_lease_is_not_renewed_over_the_next(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let id = new_id();
    let over = acquire(&*here, &id, SOON, env.lease()).await;
    release(&*here, &over).await;
    let next = acquire(&*there, &id, SOON, env.lease()).await;
    refused(renew(&*here, &over).await, &[ErrorKind::Fenced], "the renewal of a released lease beside the next holder");
    release(&*here, &over).await;
    is_taken(&env, &*here, &id, "after a released lease was renewed and released").await;
    release(&*there, &next).await;
}

async fn tokens_are_never_used_twice(env: Env) {
    let (here, there) = (env.lock().await, env.lock().await);
    let (same, mut seen) = (new_id(), Vec::new());
    for n in 0..6 {
        let lock = if n % 2 == 0 { &here } else { &there };
        for id in [same.clone(), new_id()] {
            let lease = acquire(&**lock, &id, SOON, env.lease()).await;
            let token = lease.token().to_bytes();
            assert!(!seen.contains(&token), "two acquisitions have the same name");
            seen.push(token);
            release(&**lock, &lease).await;
        }
    }
}
