//! The suite of the fence: what a write is worth whose author may have been overtaken.
//!
//! A lock that has no time limit keeps its holder in; then the same cases demand that the holder's writes stand. Nothing
//! here depends on how fast anything is.

use session_core::{Change, ErrorKind, Expect, OpenRequest, SessionHandler, SessionId, Ttl, Written};

use crate::case::suite;
use crate::harness::Env;
use crate::steps::*;

suite! { $
    /// Claims that no write is applied that is not based on the newest state, whatever became of the lock.
    fence as fence_suite {
        repeat_of_a_write_is_already_applied: "A write that is sent again under its own name changes nothing and says so.";
        repeat_of_a_create_is_already_applied: "The first write of an id that is sent again is recognised.";
        repeat_of_a_save_is_already_applied: "A save that is sent again after a write under the same name is recognised, and closes.";
        repeat_after_somebody_else_wrote_is_refused: "A write that is sent again after somebody else wrote is refused, and changes nothing.";
        expired_lease_that_nobody_took_still_writes: "A lease that has ended and that nobody took over still writes, unless the handler is strict.";
        late_write_after_the_successor_wrote_is_fenced: "A holder that was overtaken cannot undo what its successor wrote.";
        late_write_before_the_successor_writes_is_fenced: "A holder that was overtaken cannot spoil the write of its successor.";
        second_save_of_one_open_after_takeover_is_fenced: "That an opening has written before does not let it write after a takeover.";
        second_save_after_an_idle_takeover_is_not_swallowed: "After somebody took over and wrote nothing, a write is applied or refused, and never only said to be applied.";
        late_touch_after_takeover_is_fenced: "A holder that was overtaken cannot touch.";
        late_save_leaves_the_successor_its_lock: "A refused save gives back no lock but its own.";
        late_close_leaves_the_successor_its_lock: "Closing after the lock was lost succeeds and frees nobody else's lock.";
        late_drop_leaves_the_successor_its_lock: "Dropping after the lock was lost frees nobody else's lock.";
        a_refused_write_changes_nothing: "A refused write changes neither the bytes nor the length of life.";
        foreign_destroy_then_holder_saves_is_gone: "A session that was destroyed under its holder is not brought back by it.";
        foreign_destroy_then_holder_writes_twice_is_gone: "No number of attempts brings a destroyed session back.";
        destroyed_and_created_again_is_not_the_same: "A holder cannot write into a session that was destroyed and created again.";
        absent_created_destroyed_is_not_absent: "Who found an id absent cannot create it once it was created and destroyed.";
        absent_created_by_the_successor_is_refused: "Who found an id absent and was overtaken cannot replace what the successor created.";
        renewal_after_takeover_is_fenced: "A lease that somebody else took over is not renewed, and is marked as lost.";
        random_histories_lose_nothing: "In any order of openings, writes, destructions and pauses each applied write is based on the state before it.";
    }
}

/// A session that was opened with a short lease, and what comes after it.
struct Overtaken {
    id: SessionId,
    late: Opened,
    /// `None` if the lock has no time limit and the holder is still in.
    successor: Option<Opened>,
}

/// Opens with a short lease, writes `first` through it if there is something to write, and lets somebody else take over.
async fn overtaken(env: &Env, here: &dyn SessionHandler, there: &dyn SessionHandler, first: Option<&str>) -> Overtaken {
    let id = session(env, here, "old").await;
    let (mut late, _) = open_read(here, &id, env.briefly()).await;
    if let Some(first) = first {
        written(&mut late, first).await;
    }
    let mut successor = env.overtake(there, &id, env.is_endless(&late), Expect::Existing).await;
    if let Some(successor) = &mut successor {
        let seen = read(successor).await;
        let expected = first.unwrap_or("old").as_bytes();
        assert!(
            seen.as_deref() == Some(expected),
            "the successor read {}, not {}",
            shown(seen.as_deref()),
            shown(Some(expected))
        );
    }
    Overtaken { id, late, successor }
}

/// Where the lock has no time limit: the holder is in, so whatever it writes has to stand.
async fn still_in(handler: &dyn SessionHandler, id: &SessionId, mut holder: Opened) {
    written(&mut holder, "still in").await;
    holds(handler, id, "still in", "after its only holder wrote").await;
    saved(holder, "out").await;
    holds(handler, id, "out", "after its only holder saved").await;
}

async fn repeat_of_a_write_is_already_applied(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
    for data in ["new", "newer"] {
        let (record, name) = (record(data), wid());
        applied(opened.write(&record, name).await, "a write");
        for _ in 0..3 {
            let again = opened.write(&record, name).await;
            assert!(matches!(again, Ok(Written::AlreadyApplied)), "the same write sent again ended as {again:?}");
        }
        holds(&*handler, &id, data, "after a write was sent four times").await;
    }
    written(&mut opened, "newest").await;
    close(opened).await;
    holds(&*handler, &id, "newest", "after the write that followed").await;
}

async fn repeat_of_a_create_is_already_applied(env: Env) {
    let handler = env.handler().await;
    for expect in [Expect::Fresh, Expect::Any] {
        let id = new_id();
        let mut opened = open(&*handler, &id, env.patient().expecting(expect)).await;
        let (record, name) = (record("made"), wid());
        applied(opened.write(&record, name).await, "the first write of an id");
        let again = opened.write(&record, name).await;
        assert!(matches!(again, Ok(Written::AlreadyApplied)), "the first write of an id, sent again, ended as {again:?}");
        written(&mut opened, "changed").await;
        close(opened).await;
        holds(&*handler, &id, "changed", "after it was created twice and changed").await;
    }
}

async fn repeat_of_a_save_is_already_applied(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
    let (record, name) = (record("new"), wid());
    applied(opened.write(&record, name).await, "a write");
    let again = opened.save(&Change::Write(record), name).await;
    assert!(matches!(again, Ok(Written::AlreadyApplied)), "a save under the name of a write ended as {again:?}");
    let (next, seen) = open_read(&*handler, &id, env.at_once()).await;
    assert_eq!(seen.as_deref(), Some(&b"new"[..]));
    close(next).await;
}

async fn repeat_after_somebody_else_wrote_is_refused(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut late, _) = open_read(&*here, &id, env.briefly()).await;
    let (record, name) = (record("first"), wid());
    applied(late.write(&record, name).await, "a write");
    let Some(mut successor) = env.overtake(&*there, &id, env.is_endless(&late), Expect::Existing).await else {
        return still_in(&*here, &id, late).await;
    };
    assert_eq!(read(&mut successor).await.as_deref(), Some(&b"first"[..]));
    saved(successor, "second").await;
    let kinds = [ErrorKind::Fenced, ErrorKind::Unknown];
    refused(late.write(&record, name).await, &kinds, "a write that was sent again after somebody else wrote");
    holds(&*there, &id, "second", "after an old write was sent again").await;
}

async fn expired_lease_that_nobody_took_still_writes(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    let (mut opened, _) = open_read(&*handler, &id, env.briefly()).await;
    let endless = env.is_endless(&opened);
    env.outlast(env.short()).await;
    let outcome = write(&mut opened, "late").await;
    if env.strict_expiry() && !endless {
        refused(outcome, &[ErrorKind::Fenced], "a write under a lease that has ended, to a strict handler");
        holds(&*handler, &id, "old", "after a strict refusal").await;
    } else {
        applied(outcome, "a write under a lease that has ended and that nobody took");
        saved(opened, "later").await;
        holds(&*handler, &id, "later", "after two writes under a lease that has ended").await;
    }
}

async fn late_write_after_the_successor_wrote_is_fenced(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for keeps_it in [true, false] {
        let Overtaken { id, mut late, successor } = overtaken(&env, &*here, &*there, None).await;
        let Some(mut successor) = successor else { return still_in(&*here, &id, late).await };
        written(&mut successor, "successor").await;
        let kept = if keeps_it {
            Some(successor)
        } else {
            close(successor).await;
            None
        };
        refused(write(&mut late, "late").await, &[ErrorKind::Fenced], "a write after the successor wrote");
        holds(&*here, &id, "successor", "after a late write").await;
        if let Some(successor) = kept {
            saved(successor, "successor again").await;
            holds(&*here, &id, "successor again", "after the successor saved").await;
        }
    }
}

async fn late_write_before_the_successor_writes_is_fenced(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let Overtaken { id, mut late, successor } = overtaken(&env, &*here, &*there, None).await;
    let Some(successor) = successor else { return still_in(&*here, &id, late).await };
    refused(write(&mut late, "late").await, &[ErrorKind::Fenced], "a write while the successor holds the session");
    holds(&*here, &id, "old", "after a late write").await;
    saved(successor, "successor").await;
    holds(&*here, &id, "successor", "after the successor saved").await;
}

async fn second_save_of_one_open_after_takeover_is_fenced(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let Overtaken { id, mut late, successor } = overtaken(&env, &*here, &*there, Some("first")).await;
    let Some(successor) = successor else { return still_in(&*here, &id, late).await };
    saved(successor, "successor").await;
    let outcome = late.save(&Change::Write(record("second")), wid()).await;
    refused(outcome, &[ErrorKind::Fenced], "the second save of an opening that was overtaken");
    holds(&*here, &id, "successor", "after a late second save").await;
}

async fn second_save_after_an_idle_takeover_is_not_swallowed(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let Overtaken { id, mut late, successor } = overtaken(&env, &*here, &*there, Some("first")).await;
    let Some(successor) = successor else { return still_in(&*here, &id, late).await };
    close(successor).await;
    match late.save(&Change::Write(record("second")), wid()).await {
        Ok(Written::Applied) => holds(&*here, &id, "second", "after a write that was said to be applied").await,
        Err(error) if error.kind() == ErrorKind::Fenced => {
            holds(&*here, &id, "first", "after a write that was refused").await
        }
        other => panic!("a new write after an idle takeover ended as {other:?}"),
    }
}

async fn late_touch_after_takeover_is_fenced(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let Overtaken { id, mut late, successor } = overtaken(&env, &*here, &*there, None).await;
    let Some(mut successor) = successor else { return still_in(&*here, &id, late).await };
    written(&mut successor, "successor").await;
    refused(late.touch(Ttl::from_secs(7200)).await, &[ErrorKind::Fenced], "a touch by a holder that was overtaken");
    let left = look_whole(&*here, &id).await.map(|record| record.ttl.as_duration());
    assert!(left.is_some_and(|left| left <= LONG), "after a late touch {left:?} of life are left");
    saved(successor, "successor again").await;
    holds(&*here, &id, "successor again", "after a late touch").await;
}

/// Fails the case unless `successor` still has the lock and can save.
async fn successor_is_in(env: &Env, handler: &dyn SessionHandler, id: &SessionId, mut successor: Opened) {
    let third = handler.open(id, &env.at_once()).await;
    refused(third, &[ErrorKind::LockTimeout], "an open beside the successor");
    written(&mut successor, "successor").await;
    let third = handler.open(id, &env.at_once()).await;
    refused(third, &[ErrorKind::LockTimeout], "an open beside the successor, after it wrote");
    close(successor).await;
    holds(handler, id, "successor", "after the successor wrote").await;
    close(open(handler, id, env.at_once()).await).await;
}

async fn late_save_leaves_the_successor_its_lock(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for change in [Change::Write(record("late")), Change::Touch(Ttl::from_secs(700)), Change::Nothing] {
        let Overtaken { id, mut late, successor } = overtaken(&env, &*here, &*there, None).await;
        let Some(successor) = successor else { return still_in(&*here, &id, late).await };
        let outcome = late.save(&change, wid()).await;
        assert!(outcome.is_err() || change == Change::Nothing, "a late save ended as {outcome:?}");
        successor_is_in(&env, &*here, &id, successor).await;
    }
}

async fn late_close_leaves_the_successor_its_lock(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let Overtaken { id, mut late, successor } = overtaken(&env, &*here, &*there, None).await;
    let Some(successor) = successor else { return still_in(&*here, &id, late).await };
    for time in ["first", "second"] {
        let closed = late.close().await;
        assert!(closed.is_ok(), "the {time} close after the lock was lost said {closed:?}");
    }
    successor_is_in(&env, &*here, &id, successor).await;
}

async fn late_drop_leaves_the_successor_its_lock(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let Overtaken { id, late, successor } = overtaken(&env, &*here, &*there, None).await;
    let Some(successor) = successor else { return still_in(&*here, &id, late).await };
    drop(late);
    env.ticks(1).await;
    successor_is_in(&env, &*here, &id, successor).await;
}

async fn a_refused_write_changes_nothing(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let Overtaken { id, mut late, successor } = overtaken(&env, &*here, &*there, None).await;
    let Some(mut successor) = successor else { return still_in(&*here, &id, late).await };
    applied(successor.write(&living("successor", LONG / 2), wid()).await, "the successor's write");
    let refusal = late.write(&living("l".repeat(5000), LONG * 4), wid()).await;
    refused(refusal, &[ErrorKind::Fenced], "a write after the successor wrote");
    let seen = look_whole(&*here, &id).await.expect("a refused write removes nothing");
    assert_eq!(shown(Some(&seen.data)), shown(Some(b"successor")), "a refused write changed the bytes");
    assert!(seen.ttl.as_duration() <= LONG / 2, "a refused write changed the length of life to {:?}", seen.ttl);
    close(successor).await;
}

async fn foreign_destroy_then_holder_saves_is_gone(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for change in [Change::Write(record("late")), Change::Touch(Ttl::from_secs(700))] {
        let id = session(&env, &*here, "doomed").await;
        let (mut held, _) = open_read(&*here, &id, env.patient()).await;
        destroy(&*there, &id).await;
        refused(held.save(&change, wid()).await, &[ErrorKind::Gone], "a save to a session that was destroyed meanwhile");
        absent(&*there, &id, "after it was destroyed and its holder saved").await;
        let (opened, seen) = open_read(&*there, &id, env.patient()).await;
        assert_eq!(seen, None, "an exclusive opening found what was destroyed");
        close(opened).await;
    }
}

async fn foreign_destroy_then_holder_writes_twice_is_gone(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for expect in [Expect::Existing, Expect::Any, Expect::Fresh] {
        let id = if expect == Expect::Fresh { new_id() } else { session(&env, &*here, "doomed").await };
        let mut held = open(&*here, &id, env.patient().expecting(expect)).await;
        let (record, name) = (record("held"), wid());
        applied(held.write(&record, name).await, "the holder's write");
        destroy(&*there, &id).await;
        let kinds = [ErrorKind::Gone, ErrorKind::Unknown];
        refused(held.write(&record, name).await, &kinds, "the holder's write, sent again after a destroy");
        absent(&*there, &id, "after its holder sent a write again").await;
        for _ in 0..2 {
            let again = write(&mut held, "late").await;
            assert!(again.is_err(), "a write after a destroy ended as {again:?}");
            absent(&*there, &id, "after it was destroyed and its holder wrote").await;
        }
        close(held).await;
        absent(&*there, &id, "after it was destroyed and its holder closed").await;
    }
}

async fn destroyed_and_created_again_is_not_the_same(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut late, _) = open_read(&*here, &id, env.briefly()).await;
    destroy(&*there, &id).await;
    let Some(creator) = env.overtake(&*there, &id, env.is_endless(&late), Expect::Any).await else {
        refused(write(&mut late, "late").await, &[ErrorKind::Gone], "a write to what was destroyed");
        return absent(&*there, &id, "after it was destroyed and its holder wrote").await;
    };
    let created = recreated(&env, creator, "new").await;
    refused(write(&mut late, "late").await, LATE, "a write into a session that was destroyed and created again");
    if created {
        holds(&*here, &id, "new", "after the holder of its predecessor wrote").await;
    }
}

async fn absent_created_destroyed_is_not_absent(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    let (mut late, seen) = open_read(&*here, &id, env.briefly().expecting(Expect::Any)).await;
    assert_eq!(seen, None);
    let Some(creator) = env.overtake(&*there, &id, env.is_endless(&late), Expect::Any).await else {
        return still_in(&*here, &id, late).await;
    };
    saved(creator, "made").await;
    assert_eq!(destroy(&*there, &id).await.as_deref(), Some(&b"made"[..]));
    refused(write(&mut late, "late").await, LATE_CREATE, "a create of what was created and destroyed meanwhile");
    absent(&*here, &id, "after it was created, destroyed, and created too late").await;
}

async fn absent_created_by_the_successor_is_refused(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for creator_stays in [true, false] {
        let id = new_id();
        let (mut late, _) = open_read(&*here, &id, env.briefly().expecting(Expect::Any)).await;
        let Some(mut creator) = env.overtake(&*there, &id, env.is_endless(&late), Expect::Any).await else {
            return still_in(&*here, &id, late).await;
        };
        written(&mut creator, "made").await;
        if !creator_stays {
            let closed = creator.close().await;
            assert!(closed.is_ok(), "the creator's close said {closed:?}");
        }
        refused(write(&mut late, "late").await, &[ErrorKind::Fenced, ErrorKind::Conflict], "a create after the successor's");
        holds(&*here, &id, "made", "after it was created twice").await;
        drop(creator);
    }
}

async fn renewal_after_takeover_is_fenced(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let Overtaken { id, late, successor } = overtaken(&env, &*here, &*there, None).await;
    let Some(successor) = successor else { return still_in(&*here, &id, late).await };
    let held = late.held().expect("a lock that was overtaken has a lease").clone();
    let outcomes = held.lock.renew(std::slice::from_ref(&held.lease)).await;
    assert_eq!(outcomes.len(), 1, "one renewal was asked for");
    for outcome in outcomes {
        refused(outcome, &[ErrorKind::Fenced], "the renewal of a lease that was overtaken");
    }
    assert!(held.lease.is_lost(), "a lease that could not be renewed is not marked as lost");
    drop(late);
    successor_is_in(&env, &*here, &id, successor).await;
}

/// One of those who work on the session of [`random_histories_lose_nothing`].
struct Actor {
    opened: Opened,
    /// What it bases its next write on; `None` if that is absence.
    base: Option<Vec<u8>>,
}

async fn random_histories_lose_nothing(env: Env) {
    let mut rng = env.rng(2);
    let handlers = [env.handler().await, env.handler().await];
    let lease = env.tick();
    for history in 0..4 {
        let id = new_id();
        // What the store must hold now, by the words of the contract alone.
        let mut truth: Option<Vec<u8>> = None;
        let mut actors: [Option<Actor>; 3] = [None, None, None];
        let mut steps = Vec::new();
        for step in 0..60 {
            let (n, handler) = (rng.below(3) as usize, &handlers[rng.below(2) as usize]);
            let what = rng.below(12);
            match (actors[n].take(), what) {
                (None, 0..=6) => {
                    let expect = if truth.is_none() || what > 4 { Expect::Any } else { Expect::Existing };
                    let request = OpenRequest::exclusive(env.tick() / 2, lease).expecting(expect);
                    if let Ok(mut opened) = handler.open(&id, &request).await {
                        let base = read(&mut opened).await;
                        steps.push(format!("{n} opens"));
                        assert!(
                            base == truth,
                            "{n} read {} of {} after {steps:?}",
                            shown(base.as_deref()),
                            shown(truth.as_deref())
                        );
                        actors[n] = Some(Actor { opened, base });
                    }
                }
                (None, 7) => {
                    let request = OpenRequest::exclusive(env.tick() / 2, lease).expecting(Expect::Fresh);
                    let opened = open(&**handler, &id, request).await;
                    steps.push(format!("{n} opens as fresh"));
                    actors[n] = Some(Actor { opened, base: None });
                }
                (None, 8) => {
                    let removed = destroy(&**handler, &id).await;
                    steps.push("destroyed".into());
                    assert!(removed == truth, "a destroy removed {} after {steps:?}", shown(removed.as_deref()));
                    truth = None;
                }
                (None, _) => {
                    env.ticks(1).await;
                    steps.push("a tick".into());
                }
                (Some(mut actor), 0..=7) => {
                    let mark = format!("{history}.{step} by {n}").into_bytes();
                    let outcome = write(&mut actor.opened, mark.clone()).await;
                    steps.push(format!("{n} writes: {outcome:?}"));
                    match outcome {
                        Ok(Written::Applied) => {
                            assert!(
                                actor.base == truth,
                                "a write based on {} replaced {} after {steps:?}",
                                shown(actor.base.as_deref()),
                                shown(truth.as_deref())
                            );
                            truth = Some(mark.clone());
                            actors[n] = Some(Actor { opened: actor.opened, base: Some(mark) });
                        }
                        Ok(Written::AlreadyApplied) => panic!("a new write was said to be applied already after {steps:?}"),
                        Err(error) => {
                            let kinds = [ErrorKind::Fenced, ErrorKind::Gone, ErrorKind::Conflict];
                            assert!(kinds.contains(&error.kind()), "a write ended as {error:?} after {steps:?}");
                            let creates = actor.base.is_none();
                            assert!(creates || error.kind() != ErrorKind::Conflict, "{error:?} after {steps:?}");
                        }
                    }
                }
                (Some(mut actor), 8) => {
                    let removed = actor.opened.destroy().await.map(|removed| removed.map(|record| record.data));
                    steps.push(format!("{n} destroys"));
                    let removed = removed.unwrap_or_else(|error| panic!("a destroy ended as {error:?} after {steps:?}"));
                    assert!(removed == truth, "a destroy removed {} after {steps:?}", shown(removed.as_deref()));
                    truth = None;
                    close(actor.opened).await;
                }
                (Some(actor), 9) => {
                    steps.push(format!("{n} closes"));
                    close(actor.opened).await;
                }
                (Some(actor), 10) => {
                    steps.push(format!("{n} drops"));
                    drop(actor.opened);
                }
                (actor, _) => {
                    actors[n] = actor;
                    env.ticks(1).await;
                    steps.push("a tick".into());
                }
            }
            let seen = look(&**handler, &id).await;
            assert!(
                seen == truth,
                "the session has {}, not {} after {steps:?}",
                shown(seen.as_deref()),
                shown(truth.as_deref())
            );
        }
    }
}
