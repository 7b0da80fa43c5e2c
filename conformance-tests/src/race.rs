//! The suite of races: many at once, on one session.
//!
//! What is counted here is the protected data, not the lock: an acknowledged write that is missing at the end is a lost update,
//! whoever held what. The threads and pauses are random; the seed is printed.

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use session_core::{Change, ErrorKind, Expect, OpenRequest, SessionId, Written};

use crate::case::suite;
use crate::harness::{BoxFuture, Env};
use crate::steps::*;

suite! { $
    /// Claims that nothing is lost, torn or brought back when many work on one session at once.
    race as race_suite {
        hundred_increments: "A hundred overlapping increments add a hundred.";
        appends_are_all_there: "Every acknowledged append is in the list once, and the lists that were read are beginnings of the final one.";
        holders_exclude_each_other: "Two holders of one session never work at the same time.";
        stalled_holders_lose_nothing: "Holders that stall past their lease lose no update of others and have none of theirs counted twice.";
        two_creators_one_wins: "Of those who create the same fresh id at once exactly one succeeds, and its record is the one that is there.";
        a_fresh_create_beside_locked_ones_loses_nothing: "Where an id is created as fresh while others lock it as absent, every acknowledged write stays.";
        absent_id_is_created_once: "Of those who lock the same absent id at once one creates it and the others find it.";
        readers_see_whole_records: "A reader sees all of one write or nothing of it.";
        readers_never_go_back: "A reader never sees an older record after a newer one.";
        readers_beside_touches_see_the_record: "A reader beside touches never misses the record.";
        destroy_while_three_wait_for_anything: "When the holder destroys while three wait for the id as such, each finds it absent or made by one of them, one after the other.";
        destroy_while_three_wait_for_the_session: "When the holder destroys while three wait for the session, each is told that it is absent.";
        foreign_destroy_while_one_holds_and_three_wait: "When a session is destroyed under its holder, neither the holder nor those who wait for it bring it back.";
        a_logout_wins_every_race: "A destroy that runs beside a save leaves the session absent when both have ended.";
        destroy_is_told_to_one: "Of those who destroy a session at once exactly one is told what was removed.";
        gc_destroy_create_race_keeps_the_live_one: "Collecting and destroying beside a create never take the new record.";
        gc_beside_prolonging_keeps_the_prolonged: "Collecting beside holders that prolong at the last moment never takes what was prolonged.";
    }
}

/// Asks for the lock with patience for a crowd.
fn in_a_crowd(env: &Env) -> OpenRequest {
    OpenRequest::exclusive(Duration::from_secs(30) + env.tick() * 30, env.lease())
}

/// Runs `n` parts at once and waits for them all.
async fn all<F: Future<Output = T> + Send + 'static, T: Send + 'static>(
    env: &Env,
    n: u64,
    part: impl Fn(u64) -> F,
) -> Vec<T> {
    let parts: Vec<_> = (0..n).map(|n| env.spawn(part(n))).collect();
    let mut ends = Vec::new();
    for part in parts {
        ends.push(env.joined(part).await);
    }
    ends
}

async fn hundred_increments(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    let id = session(&env, &*handlers[0], "0").await;
    let request = in_a_crowd(&env);
    all(&env, 100, |n| {
        let (handler, id) = (handlers[n as usize % 2].clone(), id.clone());
        async move {
            let (mut opened, seen) = open_read(&*handler, &id, request).await;
            tokio::task::yield_now().await;
            let next = (count(seen.as_deref()) + 1).to_string();
            applied(opened.save(&Change::Write(record(next)), wid()).await, "an increment under the lock");
        }
    })
    .await;
    holds(&*handlers[0], &id, "100", "after a hundred increments").await;
}

/// Reads a list of marks.
fn marks(data: Option<&[u8]>) -> Vec<String> {
    let text = String::from_utf8_lossy(data.unwrap_or_default()).into_owned();
    text.split(' ').filter(|mark| !mark.is_empty()).map(str::to_owned).collect()
}

async fn appends_are_all_there(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    let id = session(&env, &*handlers[0], "").await;
    let request = in_a_crowd(&env);
    let histories = all(&env, 8, |n| {
        let (handler, id, mut rng) = (handlers[n as usize % 2].clone(), id.clone(), env.rng(n));
        async move {
            let mut seen_lists = Vec::new();
            for turn in 0..6 {
                let (mut opened, seen) = open_read(&*handler, &id, request).await;
                let mut list = marks(seen.as_deref());
                seen_lists.push(list.clone());
                for part in 0..=rng.below(2) {
                    list.push(format!("{n}.{turn}.{part}"));
                    tokio::time::sleep(rng.duration(Duration::from_millis(2))).await;
                    written(&mut opened, list.join(" ")).await;
                }
                seen_lists.push(list);
                close(opened).await;
            }
            seen_lists
        }
    })
    .await;
    let end = marks(look(&*handlers[0], &id).await.as_deref());
    let once: HashSet<_> = end.iter().collect();
    assert_eq!(once.len(), end.len(), "an append is in the list twice: {end:?}");
    for seen in histories.into_iter().flatten() {
        assert!(end.starts_with(&seen), "what was read or written, {seen:?}, is no beginning of {end:?}");
    }
}

async fn holders_exclude_each_other(env: Env) {
    let handlers = [env.handler().await, env.handler().await, env.handler().await];
    let id = session(&env, &*handlers[0], "0").await;
    let inside = Arc::new(AtomicU32::new(0));
    let request = in_a_crowd(&env);
    all(&env, 6, |n| {
        let (handler, id, inside, mut rng) = (handlers[n as usize % 3].clone(), id.clone(), inside.clone(), env.rng(n));
        async move {
            for turn in 0..6 {
                let mut opened = open(&*handler, &id, request.expecting([Expect::Existing, Expect::Any][turn % 2])).await;
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two were in at the same time");
                tokio::time::sleep(rng.duration(Duration::from_millis(3))).await;
                if rng.below(2) == 0 {
                    written(&mut opened, "held").await;
                }
                inside.fetch_sub(1, Ordering::SeqCst);
                close(opened).await;
            }
        }
    })
    .await;
}

async fn stalled_holders_lose_nothing(env: Env) {
    let handlers = [env.handler().await, env.handler().await, env.handler().await];
    let id = session(&env, &*handlers[0], "").await;
    let lease = env.tick();
    let request = OpenRequest::exclusive(Duration::from_secs(30) + lease * 60, lease);
    let acknowledged = all(&env, 8, |n| {
        let (handler, id, mut rng) = (handlers[n as usize % 3].clone(), id.clone(), env.rng(n));
        async move {
            let mut acknowledged = Vec::new();
            for turn in 0..5 {
                let (mut opened, seen) = open_read(&*handler, &id, request).await;
                let mut list = marks(seen.as_deref());
                for part in 0..2 {
                    if rng.below(3) == 0 {
                        tokio::time::sleep(lease + rng.duration(lease)).await;
                    }
                    let mark = format!("{n}.{turn}.{part}");
                    list.push(mark.clone());
                    match write(&mut opened, list.join(" ")).await {
                        Ok(Written::Applied) => acknowledged.push(mark),
                        Ok(Written::AlreadyApplied) => panic!("a new write was said to be applied already"),
                        Err(error) => {
                            assert!(LATE.contains(&error.kind()), "a late write ended as {error:?}");
                            break;
                        }
                    }
                }
                close(opened).await;
            }
            acknowledged
        }
    })
    .await;
    let end = marks(look(&*handlers[0], &id).await.as_deref());
    let once: HashSet<_> = end.iter().cloned().collect();
    assert_eq!(once.len(), end.len(), "an append is in the list twice: {end:?}");
    let acknowledged: HashSet<_> = acknowledged.into_iter().flatten().collect();
    let lost: Vec<_> = acknowledged.difference(&once).collect();
    let false_ones: Vec<_> = once.difference(&acknowledged).collect();
    assert!(lost.is_empty(), "{} acknowledged appends of {} are lost: {lost:?}", lost.len(), acknowledged.len());
    assert!(false_ones.is_empty(), "appends that were refused are in the list: {false_ones:?}");
}

async fn two_creators_one_wins(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    for round in 0..12 {
        let id = new_id();
        let request = env.patient().expecting(Expect::Fresh);
        let outcomes = all(&env, 4, |n| {
            let (handler, id) = (handlers[n as usize % 2].clone(), id.clone());
            async move {
                let mut opened = open(&*handler, &id, request).await;
                let outcome = if (round + n) % 3 == 0 {
                    opened.save(&Change::Write(record(n.to_string())), wid()).await
                } else {
                    let outcome = write(&mut opened, n.to_string()).await;
                    close(opened).await;
                    outcome
                };
                match outcome {
                    Ok(Written::Applied) => Some(n),
                    other => {
                        refused(other, &[ErrorKind::Conflict], "the create that came second");
                        None
                    }
                }
            }
        })
        .await;
        let winners: Vec<_> = outcomes.into_iter().flatten().collect();
        assert_eq!(winners.len(), 1, "{} of four creators were told that they had created it", winners.len());
        holds(&*handlers[0], &id, winners[0].to_string(), "after four created it at once").await;
    }
}

async fn a_fresh_create_beside_locked_ones_loses_nothing(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    for _ in 0..100 {
        let id = new_id();
        let (fresh, locked) = (env.patient().expecting(Expect::Fresh), in_a_crowd(&env).expecting(Expect::Any));
        let acknowledged = all(&env, 4, |n| {
            let (handler, id) = (handlers[n as usize / 2].clone(), id.clone());
            async move {
                let outcome = if n % 2 == 0 {
                    let mut opened = open(&*handler, &id, fresh).await;
                    opened.save(&Change::Write(record(n.to_string())), wid()).await
                } else {
                    let (mut opened, seen) = open_read(&*handler, &id, locked).await;
                    let mut list = marks(seen.as_deref());
                    list.push(n.to_string());
                    opened.save(&Change::Write(record(list.join(" "))), wid()).await
                };
                match outcome {
                    Ok(Written::Applied) => Some(n.to_string()),
                    // A layer that cannot see lock and record together tells the later of two creators only now.
                    other => {
                        refused(other, &[ErrorKind::Conflict, ErrorKind::Fenced], "a create that came second");
                        None
                    }
                }
            }
        })
        .await;
        let list = marks(look(&*handlers[0], &id).await.as_deref());
        let acknowledged: Vec<_> = acknowledged.into_iter().flatten().collect();
        assert!(!acknowledged.is_empty(), "nobody could create it");
        let lost: Vec<_> = acknowledged.iter().filter(|mark| !list.contains(mark)).collect();
        assert!(lost.is_empty(), "of the acknowledged {acknowledged:?} the record has {list:?}");
    }
}

async fn absent_id_is_created_once(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    for _ in 0..6 {
        let id = new_id();
        let request = in_a_crowd(&env).expecting(Expect::Any);
        let found = all(&env, 4, |n| {
            let (handler, id, mut rng) = (handlers[n as usize % 2].clone(), id.clone(), env.rng(n));
            async move {
                let (opened, seen) = open_read(&*handler, &id, request).await;
                let mut list = marks(seen.as_deref());
                let found = list.len();
                list.push(n.to_string());
                tokio::time::sleep(rng.duration(Duration::from_millis(2))).await;
                saved(opened, list.join(" ")).await;
                found
            }
        })
        .await;
        let mut found = found;
        found.sort_unstable();
        assert_eq!(found, [0, 1, 2, 3], "how many were there already, for each of four");
        assert_eq!(marks(look(&*handlers[0], &id).await.as_deref()).len(), 4);
    }
}

/// A record whose every part tells which write it is of, in a length that changes from one write to the next.
fn page(n: u64) -> Vec<u8> {
    let word = format!("{n:08} ");
    word.repeat(1 + (n as usize * 37) % 700).into_bytes()
}

/// Which write a record is of; fails the case if it is of none.
fn page_number(data: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(data);
    let n =
        text.get(..8).and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("a record begins with {}", shown(Some(data))));
    let whole = page(n);
    assert!(data == whole, "a record of write {n} has {} bytes and is not what was written ({})", data.len(), whole.len());
    n
}

/// Lets readers look at a session while it is written `writes` times; `judge` is given what each reader sees, in order.
async fn read_beside_writes(env: &Env, writes: u64, touches: bool, judge: fn(u64, u64)) {
    let (writer, readers) = (env.handler().await, [env.handler().await, env.handler().await]);
    let id = session(env, &*writer, page(0)).await;
    let (over, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let parts: Vec<_> = (0..4)
        .map(|n| {
            let (handler, id, over, acknowledged) = (readers[n % 2].clone(), id.clone(), over.clone(), acknowledged.clone());
            env.spawn(async move {
                let (mut last, pace) = (0, Pace::begin());
                while !over.load(Ordering::SeqCst) {
                    let before = acknowledged.load(Ordering::SeqCst);
                    let seen = look(&*handler, &id).await;
                    let seen = page_number(seen.as_deref().unwrap_or_else(|| panic!("a reader found nothing")));
                    assert!(seen >= before, "write {before} was acknowledged, and a later read saw write {seen}");
                    judge(last, seen);
                    last = seen;
                    pace.next().await;
                }
            })
        })
        .collect();
    let mut n = 0;
    while n < writes {
        let mut opened = open(&*writer, &id, in_a_crowd(env)).await;
        for _ in 0..3 {
            if touches {
                applied(opened.touch(session_core::Ttl::new(LONG)).await, "a touch by the holder");
            } else {
                n += 1;
                written(&mut opened, page(n)).await;
                acknowledged.store(n, Ordering::SeqCst);
            }
        }
        n += u64::from(touches) * 3;
        close(opened).await;
        tokio::task::yield_now().await;
    }
    over.store(true, Ordering::SeqCst);
    for part in parts {
        env.joined(part).await;
    }
}

async fn readers_see_whole_records(env: Env) {
    read_beside_writes(&env, 60, false, |_, _| {}).await;
}

async fn readers_never_go_back(env: Env) {
    read_beside_writes(&env, 60, false, |last, seen| assert!(seen >= last, "after write {last} a reader saw write {seen}"))
        .await;
}

async fn readers_beside_touches_see_the_record(env: Env) {
    read_beside_writes(&env, 45, true, |_, seen| assert_eq!(seen, 0, "a touch changed the bytes")).await;
}

/// Starts three that wait for a held session.
async fn three_wait(
    env: &Env,
    id: &SessionId,
    request: OpenRequest,
    then: impl Fn(Opened, Option<Vec<u8>>) -> BoxFuture<'static, Option<usize>> + Clone + Send + Sync + 'static,
) -> Vec<tokio::task::JoinHandle<Option<usize>>> {
    let handler = env.handler().await;
    let parts = (0..3)
        .map(|_| {
            let (handler, id, then) = (handler.clone(), id.clone(), then.clone());
            env.spawn(async move {
                let (opened, seen) = open_read(&*handler, &id, request).await;
                then(opened, seen).await
            })
        })
        .collect();
    tokio::time::sleep(env.tick().max(Duration::from_millis(50))).await;
    parts
}

async fn destroy_while_three_wait_for_anything(env: Env) {
    let handler = env.handler().await;
    for fused in [true, false] {
        let id = session(&env, &*handler, "doomed").await;
        let (mut held, _) = open_read(&*handler, &id, env.patient()).await;
        let inside = Arc::new(AtomicU32::new(0));
        let one_env = env.clone();
        let waiters = three_wait(&env, &id, in_a_crowd(&env).expecting(Expect::Any), move |opened, seen| {
            let (inside, env) = (inside.clone(), one_env.clone());
            Box::pin(async move {
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two were in at the same time");
                let mut list = marks(seen.as_deref());
                assert!(!list.contains(&"doomed".to_owned()), "a waiter found what the holder destroyed");
                let found = list.len();
                list.push("made".into());
                tokio::time::sleep(Duration::from_millis(5)).await;
                inside.fetch_sub(1, Ordering::SeqCst);
                let created = if found == 0 {
                    recreated(&env, opened, "made").await
                } else {
                    saved(opened, list.join(" ")).await;
                    true
                };
                created.then_some(found)
            })
        })
        .await;
        if fused {
            applied(held.save(&Change::Destroy, wid()).await, "the holder's destroy");
        } else {
            assert!(held.destroy().await.is_ok(), "the holder's destroy failed");
            close(held).await;
        }
        let mut found = Vec::new();
        for waiter in waiters {
            found.extend(env.joined(waiter).await);
        }
        found.sort_unstable();
        let expected: &[usize] = if env.recreates_destroyed() || !found.is_empty() { &[0, 1, 2] } else { &[] };
        assert_eq!(found, expected, "how many were there already, for each of three waiters");
    }
}

async fn destroy_while_three_wait_for_the_session(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "doomed").await;
    let (mut held, _) = open_read(&*handler, &id, env.patient()).await;
    let waiters = three_wait(&env, &id, in_a_crowd(&env), |mut opened, seen| {
        Box::pin(async move {
            assert_eq!(seen, None, "a waiter found what the holder destroyed");
            refused(
                write(&mut opened, "late").await,
                &[ErrorKind::Gone],
                "a write to a session that was destroyed meanwhile",
            );
            close(opened).await;
            None
        })
    })
    .await;
    applied(held.save(&Change::Destroy, wid()).await, "the holder's destroy");
    for waiter in waiters {
        env.joined(waiter).await;
    }
    absent(&*handler, &id, "after its holder destroyed it and three waiters wrote").await;
}

async fn foreign_destroy_while_one_holds_and_three_wait(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "doomed").await;
    let (mut held, _) = open_read(&*here, &id, env.patient()).await;
    let waiters = three_wait(&env, &id, in_a_crowd(&env), |mut opened, seen| {
        Box::pin(async move {
            assert_eq!(seen, None, "a waiter found what was destroyed");
            let outcome = write(&mut opened, "late").await;
            refused(outcome, &[ErrorKind::Gone], "a write to a session that was destroyed meanwhile");
            None
        })
    })
    .await;
    destroy(&*there, &id).await;
    refused(write(&mut held, "late").await, &[ErrorKind::Gone], "the holder's write");
    close(held).await;
    for waiter in waiters {
        env.joined(waiter).await;
    }
    absent(&*here, &id, "after everybody wrote to what was destroyed").await;
}

async fn a_logout_wins_every_race(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let mut rng = env.rng(1);
    for round in 0..25 {
        let id = session(&env, &*here, "doomed").await;
        let (mut held, _) = open_read(&*here, &id, env.patient()).await;
        let pauses = (rng.duration(Duration::from_millis(4)), rng.duration(Duration::from_millis(4)));
        let saving = env.spawn(async move {
            tokio::time::sleep(pauses.0).await;
            let first = write(&mut held, "late").await;
            let outcome = match first {
                Ok(_) => held.save(&Change::Write(record("later")), wid()).await,
                refused => refused,
            };
            (outcome, held)
        });
        let (handler, doomed) = (there.clone(), id.clone());
        let logout = env.spawn(async move {
            tokio::time::sleep(pauses.1).await;
            destroy(&*handler, &doomed).await
        });
        let (outcome, held) = env.joined(saving).await;
        let removed = env.joined(logout).await;
        assert!(removed.is_some(), "round {round}: the session was live and the destroy found nothing");
        if let Err(error) = &outcome {
            assert_eq!(error.kind(), ErrorKind::Gone, "round {round}: a save beside a destroy ended as {error:?}");
        }
        drop(held);
        absent(&*here, &id, &format!("in round {round}, with the save {outcome:?},")).await;
    }
}

async fn destroy_is_told_to_one(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    for _ in 0..10 {
        let id = session(&env, &*handlers[0], "doomed").await;
        let told = all(&env, 4, |n| {
            let (handler, id) = (handlers[n as usize % 2].clone(), id.clone());
            async move { destroy(&*handler, &id).await }
        })
        .await;
        let told = told.into_iter().flatten().count();
        assert_eq!(told, 1, "{told} of four were told what they had removed");
    }
}

async fn gc_destroy_create_race_keeps_the_live_one(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    let (id, over) = (new_id(), Arc::new(AtomicBool::new(false)));
    let collector = {
        let (handler, over) = (handlers[1].clone(), over.clone());
        env.spawn(async move {
            let pace = Pace::begin();
            while !over.load(Ordering::SeqCst) {
                handler.gc(up_to(50)).await.unwrap_or_else(|error| panic!("collecting failed: {error:?}"));
                pace.next().await;
            }
        })
    };
    let brief = env.tick();
    let mut others: Vec<SessionId> = Vec::new();
    for round in 0..16 {
        let opened = open(&*handlers[0], &id, in_a_crowd(&env).expecting(Expect::Any)).await;
        if !recreated(&env, opened, "made").await {
            // Where a destroyed id cannot be made again, a new one stands for it.
            others.push(session(&env, &*handlers[0], "made").await);
            continue;
        }
        // A collector that looks first and takes later has had the time for both.
        tokio::time::sleep(Duration::from_millis(8)).await;
        holds(&*handlers[0], &id, "made", &format!("in round {round}, soon after it was created,")).await;
        if round % 3 == 0 {
            destroy(&*handlers[0], &id).await;
            continue;
        }
        let mut opened = open(&*handlers[0], &id, env.briefly()).await;
        applied(opened.save(&Change::Write(living("brief", brief)), wid()).await, "a save with a short life");
        // Created again in the very moment in which it expires.
        let born = Instant::now();
        while look(&*handlers[0], &id).await.is_some() {
            assert!(
                born.elapsed() < brief + SOON * 2,
                "a record with a life of {brief:?} was alive after {:?}",
                born.elapsed()
            );
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    }
    for id in &others {
        holds(&*handlers[0], id, "made", "after much collecting").await;
    }
    over.store(true, Ordering::SeqCst);
    env.joined(collector).await;
}

async fn gc_beside_prolonging_keeps_the_prolonged(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    let over = Arc::new(AtomicBool::new(false));
    let collector = {
        let (handler, over) = (handlers[1].clone(), over.clone());
        env.spawn(async move {
            let pace = Pace::begin();
            while !over.load(Ordering::SeqCst) {
                handler.gc(up_to(50)).await.unwrap_or_else(|error| panic!("collecting failed: {error:?}"));
                pace.next().await;
            }
        })
    };
    let brief = env.tick() * 2;
    all(&env, 12, |n| {
        let (handler, env, mut rng) = (handlers[0].clone(), env.clone(), env.rng(n));
        async move {
            for _ in 0..3 {
                let id = create(&env, &*handler, living("brief", brief)).await;
                // Around the deadline: found alive or not, but never half of it.
                tokio::time::sleep(brief - env.tick() + rng.duration(env.tick() * 2)).await;
                let (mut opened, seen) = open_read(&*handler, &id, env.patient()).await;
                if seen.is_none() {
                    close(opened).await;
                    continue;
                }
                match opened.save(&Change::Write(record("kept")), wid()).await {
                    Ok(_) => {
                        env.ticks(2).await;
                        holds(&*handler, &id, "kept", "past its old deadline, which was moved beside a collector,").await;
                    }
                    Err(error) => panic!("a save to what an exclusive opening had found ended as {error:?}"),
                }
            }
        }
    })
    .await;
    over.store(true, Ordering::SeqCst);
    env.joined(collector).await;
}
