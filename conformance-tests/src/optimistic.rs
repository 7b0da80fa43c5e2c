//! The suite of optimistic access: no lock, and no write that is not based on the newest state.
//!
//! A handler that has only exclusive openings does not claim it; [`Sessions`](session_core::Sessions) then replaces it.

use std::time::{Duration, Instant};

use session_core::{Change, ErrorKind, Expect, OpenRequest, SessionHandler, SessionId, Ttl, Written};

use crate::case::suite;
use crate::harness::Env;
use crate::steps::*;

suite! { $
    /// Claims that [`Access::Optimistic`](session_core::Access::Optimistic) takes no lock, and yields to whoever wrote or holds.
    optimistic as optimistic_suite {
        optimistic_write_is_applied_if_nothing_happened: "An optimistic write is applied if nobody wrote since the read and nobody holds the lock.";
        optimistic_open_takes_no_lock: "An optimistic opening neither waits for a holder nor keeps one waiting.";
        second_optimistic_writer_conflicts: "Of two optimistic writes that are based on the same state the second is refused.";
        optimistic_write_after_a_holder_wrote_conflicts: "An optimistic write is refused once a holder wrote.";
        optimistic_writer_may_go_on: "An optimistic opening may write again, based on its own last write, until somebody else wrote.";
        optimistic_write_yields_to_a_holder: "An optimistic write is not applied while somebody holds the lock, and the holder is never refused because of it.";
        optimistic_write_beside_an_ended_lease_loses_nothing: "Beside a holder whose lease has ended, one of the two writes is refused.";
        optimistic_version_survives_recreate: "A session that was destroyed and created again is not the one that was read.";
        optimistic_write_to_the_destroyed_is_gone: "An optimistic write does not bring a destroyed session back.";
        optimistic_write_to_the_expired_is_gone: "An optimistic write does not bring an expired session back.";
        a_touch_is_no_write: "A touch moves the deadline and makes nobody's read out of date.";
        optimistic_touch_yields_too: "An optimistic touch is refused under the same conditions as a write.";
        optimistic_create_is_won_by_the_first: "Of two who found an id absent the first to write creates it and the second is refused.";
        optimistic_create_after_create_and_destroy_is_refused: "Who found an id absent cannot create it once it was created and destroyed.";
        optimistic_existing_absent_cannot_create: "An optimistic opening of an absent id that should exist creates nothing.";
        optimistic_repeat_is_already_applied: "An optimistic write that is sent again under its own name is recognised, until somebody else wrote.";
        optimistic_increments_are_all_counted: "A hundred overlapping optimistic increments, each tried again when it is refused, add a hundred.";
        optimistic_beside_exclusive_increments: "Optimistic and exclusive increments side by side are all counted.";
    }
}

const CONFLICT: &[ErrorKind] = &[ErrorKind::Conflict];

/// Opens without a lock and reads.
async fn look_to_write(handler: &dyn SessionHandler, id: &SessionId) -> (Opened, Option<Vec<u8>>) {
    open_read(handler, id, OpenRequest::optimistic()).await
}

async fn optimistic_write_is_applied_if_nothing_happened(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    for (data, fused) in [("new", false), ("newer", true)] {
        let (mut opened, seen) = look_to_write(&*handler, &id).await;
        assert!(seen.is_some(), "an optimistic opening does not find the session");
        if fused {
            saved(opened, data).await;
        } else {
            written(&mut opened, data).await;
            close(opened).await;
        }
        holds(&*handler, &id, data, "after an optimistic write").await;
    }
    let (opened, _) = open_read(&*handler, &id, env.at_once()).await;
    close(opened).await;
}

async fn optimistic_open_takes_no_lock(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let held = open(&*here, &id, env.patient()).await;
    let started = Instant::now();
    let (opened, seen) = look_to_write(&*there, &id).await;
    assert_eq!(seen.as_deref(), Some(&b"old"[..]));
    assert!(started.elapsed() < SOON, "an optimistic opening beside a holder took {:?}", started.elapsed());
    assert!(opened.held().is_none(), "an optimistic opening has a lease");
    close(held).await;
    close(open(&*here, &id, env.at_once()).await).await;
    close(opened).await;
}

async fn second_optimistic_writer_conflicts(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    for fused in [false, true] {
        let (mut first, _) = look_to_write(&*here, &id).await;
        let (mut second, _) = look_to_write(&*there, &id).await;
        written(&mut first, "first").await;
        let outcome = if fused {
            second.save(&Change::Write(record("second")), wid()).await
        } else {
            write(&mut second, "second").await
        };
        refused(outcome, CONFLICT, "the second optimistic write based on the same state");
        holds(&*here, &id, "first", "after two optimistic writes").await;
        close(first).await;
        close(second).await;
    }
}

async fn optimistic_write_after_a_holder_wrote_conflicts(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut late, _) = look_to_write(&*there, &id).await;
    saved(open(&*here, &id, env.patient()).await, "holder").await;
    refused(write(&mut late, "late").await, CONFLICT, "an optimistic write after a holder wrote");
    holds(&*here, &id, "holder", "after an optimistic write").await;
}

async fn optimistic_writer_may_go_on(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    let (mut opened, _) = look_to_write(&*handler, &id).await;
    for n in 0..5 {
        written(&mut opened, n.to_string()).await;
    }
    let (other, seen) = look_to_write(&*handler, &id).await;
    assert_eq!(seen.as_deref(), Some(&b"4"[..]));
    saved(other, "other").await;
    refused(write(&mut opened, "late").await, CONFLICT, "a further optimistic write after somebody else wrote");
    holds(&*handler, &id, "other", "after an optimistic write that was late").await;
}

async fn optimistic_write_yields_to_a_holder(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for holder_wrote in [false, true] {
        let id = session(&env, &*here, "old").await;
        let (mut held, _) = open_read(&*here, &id, env.patient()).await;
        if holder_wrote {
            written(&mut held, "holder").await;
        }
        let (mut other, _) = look_to_write(&*there, &id).await;
        refused(write(&mut other, "other").await, CONFLICT, "an optimistic write beside a holder");
        let (mut other, _) = look_to_write(&*there, &id).await;
        let outcome = other.save(&Change::Write(record("other")), wid()).await;
        refused(outcome, CONFLICT, "an optimistic save beside a holder");
        written(&mut held, "holder again").await;
        saved(held, "holder at last").await;
        holds(&*here, &id, "holder at last", "after optimistic writes beside its holder").await;
        let (other, _) = look_to_write(&*there, &id).await;
        saved(other, "other").await;
        holds(&*here, &id, "other", "after an optimistic write when nobody held it").await;
    }
}

async fn optimistic_write_beside_an_ended_lease_loses_nothing(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut held, _) = open_read(&*here, &id, env.briefly()).await;
    let (mut other, _) = look_to_write(&*there, &id).await;
    env.outlast(env.short()).await;
    let optimistic = write(&mut other, "other").await;
    let late = write(&mut held, "holder").await;
    match (&optimistic, &late) {
        (Ok(Written::Applied), Err(error)) if error.kind() == ErrorKind::Fenced => {
            holds(&*here, &id, "other", "after the holder was refused").await;
        }
        (Err(error), Ok(Written::Applied)) if error.kind() == ErrorKind::Conflict => {
            holds(&*here, &id, "holder", "after the optimistic write was refused").await;
        }
        // A strict handler may refuse both.
        (Err(_), Err(_)) if env.strict_expiry() => holds(&*here, &id, "old", "after both were refused").await,
        _ => panic!("the optimistic write ended as {optimistic:?} and the holder's as {late:?}"),
    }
}

async fn optimistic_version_survives_recreate(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    saved(open(&*here, &id, env.patient().expecting(Expect::Any)).await, "first").await;
    let (mut late, _) = look_to_write(&*there, &id).await;
    destroy(&*here, &id).await;
    let again = open(&*here, &id, env.patient().expecting(Expect::Any)).await;
    let created = recreated(&env, again, "first").await;
    let kinds = [ErrorKind::Conflict, ErrorKind::Gone];
    refused(write(&mut late, "late").await, &kinds, "an optimistic write to a session that was destroyed and created again");
    if created {
        holds(&*here, &id, "first", "after a write that was meant for its predecessor").await;
    }
}

async fn optimistic_write_to_the_destroyed_is_gone(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "doomed").await;
    for fused in [false, true] {
        let (mut late, _) = look_to_write(&*there, &id).await;
        destroy(&*here, &id).await;
        let outcome =
            if fused { late.save(&Change::Write(record("late")), wid()).await } else { write(&mut late, "late").await };
        refused(outcome, &[ErrorKind::Gone], "an optimistic write to what was destroyed");
        absent(&*here, &id, "after an optimistic write to what was destroyed").await;
    }
}

async fn optimistic_write_to_the_expired_is_gone(env: Env) {
    let handler = env.handler().await;
    let life = env.tick() * 6;
    let id = create(&env, &*handler, living("brief", life)).await;
    let (mut late, _) = look_to_write(&*handler, &id).await;
    env.outlive(life).await;
    refused(write(&mut late, "late").await, &[ErrorKind::Gone], "an optimistic write past the deadline");
    absent(&*handler, &id, "after an optimistic write past its deadline").await;
}

async fn a_touch_is_no_write(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    for fused in [false, true] {
        let (mut reader, _) = look_to_write(&*there, &id).await;
        for request in [env.patient(), OpenRequest::optimistic()] {
            let mut toucher = open(&*here, &id, request).await;
            if fused {
                applied(toucher.save(&Change::Touch(Ttl::from_secs(700)), wid()).await, "a save of a new life");
            } else {
                applied(toucher.touch(Ttl::from_secs(800)).await, "a touch");
                close(toucher).await;
            }
        }
        let outcome = write(&mut reader, "reader").await;
        if outcome.is_err() && env.touch_rewrites() {
            refused(outcome, CONFLICT, "a write after a touch that rewrites");
            holds(&*here, &id, "old", "after touches and a refused write").await;
        } else {
            applied(outcome, "a write after touches");
            holds(&*here, &id, "reader", "after touches and a write").await;
        }
        close(reader).await;
    }
}

async fn optimistic_touch_yields_too(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut late, _) = look_to_write(&*there, &id).await;
    let mut holder = open(&*here, &id, env.patient()).await;
    let (mut beside, _) = look_to_write(&*there, &id).await;
    refused(beside.touch(Ttl::from_secs(9000)).await, CONFLICT, "an optimistic touch beside a holder");
    written(&mut holder, "holder").await;
    close(holder).await;
    refused(late.touch(Ttl::from_secs(9000)).await, CONFLICT, "an optimistic touch after a holder wrote");
    let left = look_whole(&*here, &id).await.map(|record| record.ttl.as_duration());
    assert!(left.is_some_and(|left| left <= LONG), "after refused touches {left:?} of life are left");
}

async fn optimistic_create_is_won_by_the_first(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    let request = OpenRequest::optimistic().expecting(Expect::Any);
    let (mut first, _) = open_read(&*here, &id, request).await;
    let (mut second, _) = open_read(&*there, &id, request).await;
    written(&mut first, "first").await;
    refused(write(&mut second, "second").await, CONFLICT, "a second create");
    holds(&*here, &id, "first", "after two creates").await;
    let id = new_id();
    let (mut other, _) = open_read(&*there, &id, request).await;
    let holder = open(&*here, &id, env.patient().expecting(Expect::Any)).await;
    refused(write(&mut other, "other").await, CONFLICT, "an optimistic create of what somebody has locked to create");
    saved(holder, "holder").await;
    holds(&*here, &id, "holder", "after an optimistic create beside its creator").await;
}

async fn optimistic_create_after_create_and_destroy_is_refused(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    let (mut late, seen) = open_read(&*there, &id, OpenRequest::optimistic().expecting(Expect::Any)).await;
    assert_eq!(seen, None);
    saved(open(&*here, &id, env.patient().expecting(Expect::Any)).await, "made").await;
    destroy(&*here, &id).await;
    let outcome = write(&mut late, "late").await;
    if env.remembers_destroyed() {
        let kinds = [ErrorKind::Conflict, ErrorKind::Gone];
        refused(outcome, &kinds, "an optimistic create of what was created and destroyed meanwhile");
        absent(&*here, &id, "after it was created, destroyed, and created too late").await;
    } else if outcome.is_ok() {
        holds(&*here, &id, "late", "after a create that was applied").await;
    }
}

async fn optimistic_existing_absent_cannot_create(env: Env) {
    let handler = env.handler().await;
    let id = new_id();
    let (mut opened, seen) = look_to_write(&*handler, &id).await;
    assert_eq!(seen, None);
    refused(
        write(&mut opened, "made").await,
        &[ErrorKind::Gone],
        "an optimistic write to an id that should exist and was absent",
    );
    absent(&*handler, &id, "after the refusal").await;
}

async fn optimistic_repeat_is_already_applied(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut first, _) = look_to_write(&*here, &id).await;
    let (record, name) = (record("first"), wid());
    applied(first.write(&record, name).await, "an optimistic write");
    let again = first.write(&record, name).await;
    assert!(matches!(again, Ok(Written::AlreadyApplied)), "the same write sent again ended as {again:?}");
    let (second, _) = look_to_write(&*there, &id).await;
    saved(second, "second").await;
    let kinds = [ErrorKind::Conflict, ErrorKind::Unknown];
    refused(first.write(&record, name).await, &kinds, "a write that was sent again after somebody else wrote");
    holds(&*here, &id, "second", "after an old write was sent again").await;
}

/// Adds one, again and again until it is applied.
async fn add_one(handler: &dyn SessionHandler, id: &SessionId, request: OpenRequest) {
    let give_up = Instant::now() + SOON * 20;
    loop {
        let (mut opened, seen) = open_read(handler, id, request).await;
        let next = (count(seen.as_deref()) + 1).to_string();
        // Long enough for others to come in between.
        tokio::time::sleep(Duration::from_micros(300)).await;
        match opened.save(&Change::Write(record(next)), wid()).await {
            Ok(_) => return,
            Err(error) if error.kind() == ErrorKind::Conflict && Instant::now() < give_up => {
                tokio::task::yield_now().await;
            }
            Err(error) => panic!("an increment ended as {error:?}"),
        }
    }
}

async fn optimistic_increments_are_all_counted(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    let id = session(&env, &*handlers[0], "0").await;
    let parts: Vec<_> = (0..10)
        .map(|n| {
            let (handler, id) = (handlers[n % 2].clone(), id.clone());
            env.spawn(async move {
                for _ in 0..10 {
                    add_one(&*handler, &id, OpenRequest::optimistic()).await;
                }
            })
        })
        .collect();
    for part in parts {
        env.joined(part).await;
    }
    holds(&*handlers[0], &id, "100", "after a hundred optimistic increments").await;
}

async fn optimistic_beside_exclusive_increments(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    let id = session(&env, &*handlers[0], "0").await;
    let exclusive = OpenRequest::exclusive(SOON * 20, env.lease());
    let parts: Vec<_> = (0..6)
        .map(|n| {
            let (handler, id) = (handlers[n % 2].clone(), id.clone());
            let request = if n < 3 { exclusive } else { OpenRequest::optimistic() };
            env.spawn(async move {
                for _ in 0..8 {
                    add_one(&*handler, &id, request).await;
                }
            })
        })
        .collect();
    for part in parts {
        env.joined(part).await;
    }
    holds(&*handlers[0], &id, "48", "after increments of both kinds").await;
}
