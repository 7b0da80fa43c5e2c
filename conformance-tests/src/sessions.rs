//! The suite of sessions: what an application gets from this handler through [`Sessions`].
//!
//! The handler is the one under test; two `Sessions` over two handlers stand for two processes. Values are small numbers and
//! texts: codecs have tests of their own.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use session_core::{ErrorKind, ManualClock, OpenRequest, Session, SessionHandler, SessionId, Sessions, SessionsBuilder};
use tokio::sync::oneshot;

use crate::case::suite;
use crate::faulty::{Fault, Faults, Faulty, On};
use crate::harness::{BoxFuture, Env};
use crate::steps::{SOON, new_id, up_to};

suite! { $
    /// Claims that [`Sessions`](session_core::Sessions) keeps its promises over this handler.
    sessions as sessions_suite {
        values_come_back_in_another_process: "What one process stored in a session another one reads.";
        an_unknown_id_is_never_adopted: "An id that a client made up gives a session with an id of ours, and nothing is stored under the one that was made up.";
        a_hundred_overlapping_updates_count_a_hundred: "A hundred overlapping updates from two processes add a hundred.";
        updates_run_one_after_the_other: "The closures of two updates of one session never run at the same time.";
        tasks_of_one_process_are_served_in_order: "Fifty tasks that want one session get it in the order in which they came.";
        a_full_queue_turns_away: "Who finds the queue full is told that it is busy, at once, and those who wait are served.";
        a_failed_update_writes_nothing: "An update whose closure fails stores nothing and keeps nobody waiting.";
        merges_of_different_keys_are_both_kept: "Parallel requests that change different keys both keep their change.";
        merges_of_the_same_key_conflict_by_name: "Of two merges that change the same key the second is a conflict that names it, and nothing of it is stored.";
        two_merges_of_one_session_at_once: "Sixty-four merges at once, each of a key of its own and of one counter, are all kept and all counted.";
        a_merge_beside_a_holder_loses_nothing: "A merge beside a holder waits its turn when it saves, and neither loses anything.";
        a_merge_of_the_destroyed_is_gone: "A merge does not bring a destroyed session back.";
        a_view_never_waits: "A view does not wait for a holder and sees what was saved last.";
        a_released_session_is_free_and_reopens_fresh: "A session that was released early is open to others, and reopening it reads what they wrote.";
        a_dropped_session_is_free_and_unchanged: "A session that was dropped stores nothing and keeps nobody waiting.";
        an_unchanged_session_is_not_rewritten: "A request that changes nothing writes nothing.";
        an_unchanged_session_lives_on: "A request that changes nothing prolongs the life of the session when a share of it is used up.";
        a_long_hold_keeps_its_session: "A session that is held for longer than its lease stays locked and can be saved.";
        an_absolute_end_is_the_end: "A session ends at its absolute time-out, however often it is used.";
        a_logout_elsewhere_wins: "A session that was destroyed elsewhere is not brought back by the request that holds it.";
        three_who_wait_for_a_destroyed_session_get_new_ones: "Those who wait for a session that its holder destroys each get an empty session with a new id.";
        random_requests_bring_nothing_back: "In a crowd of updates, merges, views and one logout nothing is stored after the logout.";
        parallel_requests_across_a_rotate_lose_nothing: "Requests with the old id lose nothing while another one changes the id.";
        logout_with_the_old_id_during_a_rotate: "A logout with the old id, at any moment of a rotate, leaves neither the old nor the new id.";
        a_rotate_in_the_middle_of_a_logout_saves_nobody: "A rotate that comes between the look and the destroy of a logout with the old id leaves neither the old nor the new id.";
        a_logout_with_the_old_id_after_a_rotate: "A logout with the old id reaches the session under its new one.";
        after_an_elevate_the_old_id_sees_nothing: "After a login the old id leads nowhere, and nothing is stored under it.";
        a_dropped_save_goes_on: "A save whose request went away is finished, and the next request sees it.";
        a_lost_reply_counts_once: "An update whose answer is lost is counted once.";
        a_lost_reply_of_the_first_save_stores_once: "A first save whose answer is lost stores the session once and under the id that is told.";
        a_lost_reply_before_another_write_is_unknown: "An update whose answer is lost, and that others overwrote since, says that it does not know, and its closure has run once.";
        a_lost_reply_before_a_logout_brings_nothing_back: "An update whose answer is lost, and that a logout followed, brings nothing back.";
        a_save_that_was_not_sent_may_be_repeated: "A save that did not reach the store has stored nothing and can be made again.";
    }
}

/// The settings of the cases: patient, and with a lease that is renewed in time on a busy machine.
fn builder(env: &Env, handler: Arc<dyn SessionHandler>) -> SessionsBuilder {
    let wait = Duration::from_secs(20) + env.tick() * 20;
    Sessions::builder(handler).wait(wait).lease(env.lease())
}

fn build(env: &Env, builder: SessionsBuilder) -> Sessions {
    env.finish(builder).build().expect("the settings of a case are in order")
}

async fn sessions(env: &Env) -> Sessions {
    build(env, builder(env, env.handler().await))
}

/// Sessions over the handler with faults.
async fn faulty(env: &Env) -> (Sessions, Faults) {
    let faults = Faults::default();
    let handler = Arc::new(Faulty::new(env.handler().await, faults.clone()));
    (build(env, builder(env, handler)), faults)
}

#[track_caller]
fn ok<T, E: std::fmt::Debug>(outcome: Result<T, E>, what: &str) -> T {
    outcome.unwrap_or_else(|error| panic!("{what} ended as {error:?}"))
}

/// Stores a session with these numbers.
async fn stored(sessions: &Sessions, numbers: &[(&str, u64)]) -> SessionId {
    let mut session = ok(sessions.create(), "create");
    for (key, number) in numbers {
        ok(session.insert(key, number), "insert");
    }
    ok(session.close().await, "the first close").expect("a session with values is stored")
}

async fn number(sessions: &Sessions, id: &SessionId, key: &str) -> Option<u64> {
    ok(ok(sessions.view(id).await, "a view").get(key), "get")
}

/// Fails the case unless the session has this number.
async fn has(sessions: &Sessions, id: &SessionId, key: &str, expected: u64, when: &str) {
    let seen = number(sessions, id, key).await;
    assert_eq!(seen, Some(expected), "the number {key:?} {when}");
}

async fn exists(sessions: &Sessions, id: &SessionId) -> bool {
    ok(sessions.view(id).await, "a view").exists()
}

fn add(session: &mut Session, key: &str) -> session_core::Result<u64> {
    let next = session.get::<u64>(key)?.unwrap_or(0) + 1;
    session.insert(key, &next)?;
    Ok(next)
}

async fn update(sessions: &Sessions, id: &SessionId, key: &str) -> session_core::Result<u64> {
    // Owned, since the compiler does not believe that a closure which borrows may run on another thread.
    let key = key.to_owned();
    sessions.update(id, async move |session: &mut Session| add(session, &key)).await.map(|updated| updated.value)
}

async fn values_come_back_in_another_process(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let text = "zwölf\0Äpfel\r\n".repeat(500);
    let mut session = ok(here.create(), "create");
    ok(session.insert("text", &text), "insert");
    ok(session.insert("none", &()), "insert");
    ok(session.insert("list", &vec![1u64, 2, 3]), "insert");
    let id = ok(session.close().await, "close").expect("a session with values is stored");
    let mut session = ok(there.open(&id).await, "open");
    assert!(session.id() == &id && !session.is_new(), "the session was opened under another id");
    assert!(ok(session.get::<String>("text"), "get").as_deref() == Some(&text), "a text came back changed");
    assert_eq!(ok(session.take::<Vec<u64>>("list"), "take"), Some(vec![1, 2, 3]));
    ok(session.insert("count", &7u64), "insert");
    ok(session.close().await, "close");
    let view = ok(here.view(&id).await, "a view");
    let keys: Vec<_> = view.keys().collect();
    assert_eq!(keys, ["count", "none", "text"], "the keys after another process changed them");
}

async fn an_unknown_id_is_never_adopted(env: Env) {
    let sessions = sessions(&env).await;
    for made_up in [new_id(), SessionId::parse("attacker-chosen-session-id").expect("it is accepted")] {
        let mut session = ok(sessions.open(&made_up).await, "open of an unknown id");
        assert!(session.id() != &made_up, "an id that was made up elsewhere was adopted");
        ok(session.insert("n", &1u64), "insert");
        let id = ok(session.close().await, "close").expect("a session with values is stored");
        assert!(id != made_up, "an id that was made up elsewhere was adopted");
        has(&sessions, &id, "n", 1, "under the new id").await;
        assert!(!exists(&sessions, &made_up).await, "something was stored under an id that was made up elsewhere");
        let merged = ok(sessions.merge(&made_up).await, "merge of an unknown id");
        assert!(merged.id() != &made_up, "an id that was made up elsewhere was adopted by a merge");
        drop(merged);
        let updated = ok(sessions.update(&made_up, async |session| add(session, "n")).await, "update of an unknown id");
        assert!(updated.id.is_some_and(|id| id != made_up), "an id that was made up elsewhere was adopted by an update");
        assert!(!exists(&sessions, &made_up).await, "something was stored under an id that was made up elsewhere");
    }
}

async fn a_hundred_overlapping_updates_count_a_hundred(env: Env) {
    let processes = [sessions(&env).await, sessions(&env).await];
    let id = stored(&processes[0], &[("n", 0)]).await;
    let parts: Vec<_> = (0..100)
        .map(|n| {
            let (sessions, id) = (processes[n % 2].clone(), id.clone());
            env.spawn(async move { ok(update(&sessions, &id, "n").await, "an update") })
        })
        .collect();
    for part in parts {
        env.joined(part).await;
    }
    has(&processes[0], &id, "n", 100, "after a hundred updates").await;
}

async fn updates_run_one_after_the_other(env: Env) {
    let processes = [sessions(&env).await, sessions(&env).await];
    let id = stored(&processes[0], &[("n", 0)]).await;
    let inside = Arc::new(AtomicU32::new(0));
    let parts: Vec<_> = (0..12)
        .map(|n| {
            let (sessions, id, inside) = (processes[n % 2].clone(), id.clone(), inside.clone());
            env.spawn(async move {
                let updated = sessions.update(&id, async move |session: &mut Session| {
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two closures ran at the same time");
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    add(session, "n")
                });
                ok(updated.await, "an update")
            })
        })
        .collect();
    for part in parts {
        env.joined(part).await;
    }
    has(&processes[0], &id, "n", 12, "after twelve updates").await;
}

async fn tasks_of_one_process_are_served_in_order(env: Env) {
    let sessions = sessions(&env).await;
    let id = stored(&sessions, &[("n", 0)]).await;
    let mut held = ok(sessions.open(&id).await, "open");
    ok(held.insert("order", &Vec::<u64>::new()), "insert");
    let mut parts = Vec::new();
    for n in 0..50u64 {
        let (sessions, id) = (sessions.clone(), id.clone());
        let (asked, asks) = oneshot::channel();
        parts.push(env.spawn(async move {
            let mut opening = std::pin::pin!(sessions.open(&id));
            // Its place in the queue is taken by the first poll.
            let first = std::future::poll_fn(|context| std::task::Poll::Ready(opening.as_mut().poll(context))).await;
            let _ = asked.send(());
            let opened = match first {
                std::task::Poll::Ready(opened) => opened,
                std::task::Poll::Pending => opening.await,
            };
            let mut session = ok(opened, "open of a waiter");
            let mut order: Vec<u64> = ok(session.get("order"), "get").unwrap_or_default();
            order.push(n);
            ok(session.insert("order", &order), "insert");
            ok(session.close().await, "close");
        }));
        let _ = asks.await;
    }
    ok(held.close().await, "close of the holder");
    for part in parts {
        env.joined(part).await;
    }
    let order: Vec<u64> = ok(ok(sessions.view(&id).await, "a view").get("order"), "get").unwrap_or_default();
    assert_eq!(order, (0..50).collect::<Vec<_>>(), "the order in which fifty tasks were served");
}

async fn a_full_queue_turns_away(env: Env) {
    let sessions = build(&env, builder(&env, env.handler().await).queue(3));
    let id = stored(&sessions, &[("n", 0)]).await;
    let held = ok(sessions.open(&id).await, "open");
    let asked = Arc::new(AtomicU64::new(0));
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            let (sessions, id, asked) = (sessions.clone(), id.clone(), asked.clone());
            env.spawn(async move {
                asked.fetch_add(1, Ordering::SeqCst);
                ok(update(&sessions, &id, "n").await, "an update of a waiter")
            })
        })
        .collect();
    while asked.load(Ordering::SeqCst) < 3 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let turned_away = tokio::time::timeout(SOON, sessions.open(&id)).await;
    match turned_away {
        Ok(Err(error)) => assert_eq!(error.kind(), ErrorKind::Busy, "the fourth in a queue of three ended as {error:?}"),
        Ok(Ok(_)) => panic!("the fourth in a queue of three got in, past a holder"),
        Err(_) => panic!("the fourth in a queue of three waited"),
    }
    ok(held.close().await, "close of the holder");
    for waiter in waiters {
        env.joined(waiter).await;
    }
    has(&sessions, &id, "n", 3, "after three who waited").await;
}

async fn a_failed_update_writes_nothing(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("n", 1)]).await;
    let failed = here
        .update(&id, async |session| {
            session.insert("n", &99u64)?;
            session.get::<String>("n").map(|_| ())
        })
        .await;
    assert!(failed.is_err(), "an update whose closure failed ended as {failed:?}");
    let there = there.with_wait(SOON);
    assert_eq!(ok(update(&there, &id, "n").await, "an update after a failed one"), 2, "the number after a failed update");
}

async fn merges_of_different_keys_are_both_kept(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("a", 1), ("b", 1), ("c", 1)]).await;
    let mut one = ok(here.merge(&id).await, "merge");
    let mut two = ok(there.merge(&id).await, "merge");
    ok(one.insert("a", &2u64), "insert");
    ok(one.insert("d", &2u64), "insert");
    ok(two.insert("b", &2u64), "insert");
    assert!(two.remove("c"), "a key that was stored is not there");
    ok(one.close().await, "close of a merge");
    ok(two.close().await, "close of the second merge");
    for (key, expected) in [("a", Some(2)), ("b", Some(2)), ("c", None), ("d", Some(2))] {
        assert_eq!(number(&here, &id, key).await, expected, "the number {key:?} after two merges");
    }
}

async fn merges_of_the_same_key_conflict_by_name(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("a", 1), ("b", 1)]).await;
    let mut one = ok(here.merge(&id).await, "merge");
    let mut two = ok(there.merge(&id).await, "merge");
    ok(one.insert("a", &2u64), "insert");
    ok(two.insert("a", &3u64), "insert");
    ok(two.insert("b", &3u64), "insert");
    ok(one.close().await, "close of a merge");
    match two.close().await {
        Err(error) if error.kind() == ErrorKind::Conflict => assert_eq!(error.keys(), ["a"], "the keys in conflict"),
        other => panic!("a second merge of the same key ended as {other:?}"),
    }
    has(&here, &id, "a", 2, "after a conflict").await;
    has(&here, &id, "b", 1, "after a conflict").await;
}

async fn two_merges_of_one_session_at_once(env: Env) {
    let processes = [sessions(&env).await, sessions(&env).await];
    let id = stored(&processes[0], &[("n", 0)]).await;
    let parts: Vec<_> = (0..64u64)
        .map(|n| {
            let (sessions, id) = (processes[n as usize % 2].clone(), id.clone());
            env.spawn(async move {
                let mut session = ok(sessions.merge(&id).await, "merge");
                ok(session.insert(&format!("key {n}"), &n), "insert");
                let more = session.update_key("n", |count: Option<u64>| count.unwrap_or(0) + 1);
                ok(more, "update_key");
                tokio::task::yield_now().await;
                ok(session.close().await, "close of a merge");
            })
        })
        .collect();
    for part in parts {
        env.joined(part).await;
    }
    has(&processes[0], &id, "n", 64, "after 64 merges that each added one").await;
    for n in 0..64 {
        has(&processes[1], &id, &format!("key {n}"), n, "after 64 merges").await;
    }
}

async fn a_merge_beside_a_holder_loses_nothing(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("n", 1)]).await;
    let mut held = ok(here.open(&id).await, "open");
    let mut merge = ok(there.merge(&id).await, "merge beside a holder");
    ok(merge.insert("merged", &1u64), "insert");
    let merging = env.spawn(async move { ok(merge.close().await, "close of a merge beside a holder") });
    tokio::time::sleep(env.tick().max(Duration::from_millis(50))).await;
    ok(add(&mut held, "n"), "insert");
    ok(held.save().await, "the holder's save beside a merge");
    ok(add(&mut held, "n"), "insert");
    ok(held.close().await, "the holder's close beside a merge");
    env.joined(merging).await;
    has(&here, &id, "n", 3, "after a merge beside its holder").await;
    has(&here, &id, "merged", 1, "after a merge beside a holder").await;
}

async fn a_merge_of_the_destroyed_is_gone(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("n", 1)]).await;
    let mut merge = ok(there.merge(&id).await, "merge");
    ok(merge.insert("n", &2u64), "insert");
    ok(here.destroy(&id).await, "destroy");
    match merge.close().await {
        Err(error) if error.kind() == ErrorKind::Gone => {}
        other => panic!("a merge of what was destroyed ended as {other:?}"),
    }
    assert!(!exists(&here, &id).await, "a merge brought a destroyed session back");
}

async fn a_view_never_waits(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("n", 1)]).await;
    let mut held = ok(here.open(&id).await, "open");
    let looking = async {
        has(&there, &id, "n", 1, "beside a holder").await;
        ok(add(&mut held, "n"), "insert");
        has(&there, &id, "n", 1, "before the holder saved").await;
        ok(held.save().await, "save");
        has(&there, &id, "n", 2, "after the holder saved").await;
    };
    tokio::time::timeout(SOON, looking).await.unwrap_or_else(|_| panic!("a view waited for a holder"));
    // And nobody waits for a view.
    ok(held.close().await, "close");
    let view = ok(there.view(&id).await, "a view");
    ok(update(&here.with_wait(SOON), &id, "n").await, "an update beside a view");
    drop(view);
}

async fn a_released_session_is_free_and_reopens_fresh(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("n", 1)]).await;
    let mut session = ok(here.open(&id).await, "open");
    ok(add(&mut session, "n"), "insert");
    let view = ok(session.release().await, "release");
    assert_eq!(ok(view.get::<u64>("n"), "get"), Some(2), "the view of what was released");
    assert_eq!(ok(update(&there.with_wait(SOON), &id, "n").await, "an update of what was released"), 3);
    let mut session = ok(view.reopen().await, "reopen");
    assert_eq!(ok(add(&mut session, "n"), "insert"), 4, "the number after reopening");
    ok(session.close().await, "close");
    has(&here, &id, "n", 4, "after a release and a reopening").await;
}

async fn a_dropped_session_is_free_and_unchanged(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("n", 1)]).await;
    for aborted in [false, true] {
        let mut session = ok(here.open(&id).await, "open");
        ok(session.insert("n", &99u64), "insert");
        if aborted {
            let task = env.spawn(async move {
                let _session = session;
                std::future::pending::<()>().await;
            });
            tokio::task::yield_now().await;
            task.abort();
            let _ = task.await;
        } else {
            drop(session);
        }
        let session = ok(there.clone().with_wait(SOON).open(&id).await, "open after a session was dropped");
        assert_eq!(ok(session.get::<u64>("n"), "get"), Some(1), "the number after a session was dropped");
        ok(session.close().await, "close");
    }
    here.shutdown().await;
    assert_eq!(here.in_use(), (0, 0), "what is still in use after all was dropped");
}

async fn an_unchanged_session_is_not_rewritten(env: Env) {
    let sessions = sessions(&env).await;
    let id = stored(&sessions, &[("n", 1)]).await;
    let read = |handler: Arc<dyn SessionHandler>| {
        let id = id.clone();
        async move {
            let mut view = ok(handler.open(&id, &OpenRequest::read_only()).await, "a look at the record");
            ok(view.read().await, "a look at the record").map(|record| record.data)
        }
    };
    let before = read(sessions.handler().clone()).await;
    assert!(before.is_some(), "a session that was stored is not there");
    let session = ok(sessions.open(&id).await, "open");
    assert_eq!(ok(session.get::<u64>("n"), "get"), Some(1));
    ok(session.close().await, "close");
    let mut session = ok(sessions.open(&id).await, "open");
    ok(session.save().await, "save");
    ok(session.close().await, "close");
    ok(ok(sessions.merge(&id).await, "merge").close().await, "close of a merge");
    assert!(read(sessions.handler().clone()).await == before, "requests that changed nothing changed the record");
}

async fn an_unchanged_session_lives_on(env: Env) {
    let idle = Duration::from_secs(600);
    let handler = env.handler().await;
    let brief = build(&env, builder(&env, handler.clone()).ttl(idle / 2));
    let sessions = build(&env, builder(&env, handler).ttl(idle).touch_after(0.1));
    let left = async |id: &SessionId| {
        let mut view = ok(sessions.handler().open(id, &OpenRequest::read_only()).await, "a look at the record");
        ok(view.read().await, "a look at the record").map(|record| record.ttl.as_duration()).unwrap_or_default()
    };
    let id = stored(&brief, &[("n", 1)]).await;
    assert!(left(&id).await <= idle / 2 + Duration::from_secs(1), "a new session lives longer than the idle time");
    has(&sessions, &id, "n", 1, "in a view").await;
    assert!(left(&id).await <= idle / 2 + Duration::from_secs(1), "a view prolonged the session");
    ok(ok(sessions.open(&id).await, "open").close().await, "close");
    let now = left(&id).await;
    assert!(now > idle - Duration::from_secs(60), "after a request that changed nothing {now:?} are left of {idle:?}");
    has(&sessions, &id, "n", 1, "after its life was prolonged").await;
}

async fn a_long_hold_keeps_its_session(env: Env) {
    let lease = env.tick() * 8 + Duration::from_millis(400);
    let (here, there) = (sessions(&env).await.with_lease(lease), sessions(&env).await);
    let id = stored(&here, &[("n", 1)]).await;
    let mut held = ok(here.open(&id).await, "open");
    ok(add(&mut held, "n"), "insert");
    let (waiting, waited_for) = (there.with_wait(SOON + lease * 4), id.clone());
    let waiter = env.spawn(async move { ok(update(&waiting, &waited_for, "n").await, "an update of a waiter") });
    tokio::time::sleep(lease * 2 + lease / 2).await;
    assert!(!waiter.is_finished(), "somebody else got in while the session was held and renewed");
    assert!(!held.is_lost(), "a lease that was renewed all the time is marked as lost");
    ok(held.close().await, "the close after a long hold");
    assert_eq!(env.joined(waiter).await, 3, "the number after a long hold and a waiter");
}

async fn an_absolute_end_is_the_end(env: Env) {
    let clock = Arc::new(ManualClock::new());
    let hour = Duration::from_secs(3600);
    let settings = builder(&env, env.handler().await).absolute_ttl(Some(hour)).clock(clock.clone());
    let sessions = build(&env, settings);
    let id = stored(&sessions, &[("n", 0)]).await;
    for n in 1..=5 {
        assert_eq!(ok(update(&sessions, &id, "n").await, "an update"), n, "the number before the absolute time-out");
        clock.advance(hour / 6);
    }
    clock.advance(hour / 6);
    assert!(!exists(&sessions, &id).await, "the session is there past its absolute time-out");
    let session = ok(sessions.open(&id).await, "open past the absolute time-out");
    assert!(session.is_new() && session.id() != &id, "the session was opened past its absolute time-out");
}

async fn a_logout_elsewhere_wins(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    for saved_before in [false, true] {
        let id = stored(&here, &[("n", 1)]).await;
        let mut held = ok(here.open(&id).await, "open");
        ok(add(&mut held, "n"), "insert");
        if saved_before {
            ok(held.save().await, "save");
            ok(add(&mut held, "n"), "insert");
        }
        let logout = tokio::time::timeout(SOON, there.destroy(&id)).await;
        ok(logout.unwrap_or_else(|_| panic!("a logout waited for a holder")), "a logout beside a holder");
        match held.close().await {
            Err(error) if error.kind() == ErrorKind::Gone => {}
            other => panic!("the close of a session that was destroyed meanwhile ended as {other:?}"),
        }
        assert!(!exists(&there, &id).await, "a destroyed session was brought back");
    }
}

async fn three_who_wait_for_a_destroyed_session_get_new_ones(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let id = stored(&here, &[("n", 1)]).await;
    let held = ok(here.open(&id).await, "open");
    let waiters: Vec<_> = [&here, &there, &there]
        .into_iter()
        .map(|sessions| {
            let (sessions, id) = (sessions.clone(), id.clone());
            env.spawn(async move {
                let mut session = ok(sessions.open(&id).await, "open of a waiter");
                assert!(session.is_new(), "a waiter got what was destroyed");
                assert_eq!(ok(session.get::<u64>("n"), "get"), None, "a waiter got a value of what was destroyed");
                ok(add(&mut session, "mine"), "insert");
                ok(session.close().await, "close of a waiter").expect("a session with values is stored")
            })
        })
        .collect();
    tokio::time::sleep(env.tick().max(Duration::from_millis(50))).await;
    ok(held.destroy().await, "the holder's destroy");
    let mut ids = Vec::new();
    for waiter in waiters {
        let new = env.joined(waiter).await;
        assert!(new != id && !ids.contains(&new), "two of three waiters got the same id");
        has(&here, &new, "mine", 1, "of a waiter's own session").await;
        ids.push(new);
    }
    assert!(!exists(&here, &id).await, "a destroyed session is there");
}

async fn random_requests_bring_nothing_back(env: Env) {
    let processes = [sessions(&env).await, sessions(&env).await];
    for round in 0..5 {
        let id = stored(&processes[0], &[("n", 0)]).await;
        let parts: Vec<_> = (0..8)
            .map(|n| {
                let (sessions, id, mut rng) = (processes[n % 2].clone(), id.clone(), env.rng(round * 8 + n as u64));
                env.spawn(async move {
                    tokio::time::sleep(rng.duration(Duration::from_millis(6))).await;
                    let work = rng.duration(Duration::from_millis(4));
                    let outcome = match n {
                        0 => sessions.destroy(&id).await.map(|()| None),
                        1..=3 => {
                            let change = async move |session: &mut Session| {
                                tokio::time::sleep(work).await;
                                add(session, "n")
                            };
                            sessions.update(&id, change).await.map(|updated| updated.id)
                        }
                        4 | 5 => match sessions.merge(&id).await {
                            Ok(mut session) => {
                                tokio::time::sleep(work).await;
                                ok(add(&mut session, "merged"), "insert");
                                session.close().await
                            }
                            Err(error) => Err(error),
                        },
                        _ => sessions.view(&id).await.map(|_| None),
                    };
                    match outcome {
                        Ok(_) => {}
                        Err(error) => assert!(
                            matches!(error.kind(), ErrorKind::Gone | ErrorKind::Conflict),
                            "a request beside a logout ended as {error:?}"
                        ),
                    }
                })
            })
            .collect();
        for part in parts {
            env.joined(part).await;
        }
        assert!(!exists(&processes[0], &id).await, "round {round}: the session is there after a logout");
    }
}

async fn parallel_requests_across_a_rotate_lose_nothing(env: Env) {
    let processes = [sessions(&env).await, sessions(&env).await];
    let id = stored(&processes[0], &[("n", 0)]).await;
    let parts: Vec<_> = (0..60)
        .map(|n| {
            let (sessions, id) = (processes[n % 2].clone(), id.clone());
            env.spawn(async move {
                let updated = sessions.update(&id, async move |session: &mut Session| {
                    if n == 20 {
                        session.rotate();
                    }
                    add(session, "n")
                });
                ok(updated.await, "an update across a rotate").id.expect("a session with values is stored")
            })
        })
        .collect();
    let mut ids = Vec::new();
    for part in parts {
        let new = env.joined(part).await;
        if new != id && !ids.contains(&new) {
            ids.push(new);
        }
    }
    assert_eq!(ids.len(), 1, "{} new ids came of one rotate", ids.len());
    has(&processes[0], &ids[0], "n", 60, "under the new id").await;
    has(&processes[0], &id, "n", 60, "under the old id, which leads to the new one").await;
}

async fn logout_with_the_old_id_during_a_rotate(env: Env) {
    let other = sessions(&env).await;
    // The logout at every moment between two calls of the save, and in the middle of each.
    for (calls, within) in [(0, false), (1, false), (2, false), (0, true), (1, true)] {
        let (sessions, faults) = faulty(&env).await;
        let id = stored(&sessions, &[("n", 1)]).await;
        let mut session = ok(sessions.open(&id).await, "open");
        session.rotate();
        ok(add(&mut session, "n"), "insert");
        let logout = {
            let (other, id) = (other.clone(), id.clone());
            move || -> BoxFuture<'static, ()> {
                Box::pin(async move { ok(other.destroy(&id).await, "a logout during a rotate") })
            }
        };
        if calls == 2 {
            let new = ok(session.close().await, "a close with a rotate");
            logout().await;
            let new = new.expect("a session with values is stored");
            assert!(!exists(&sessions, &new).await, "the new id is there after a logout with the old one");
            assert!(!exists(&sessions, &id).await, "the old id is there after a logout");
            continue;
        }
        for _ in 0..calls {
            faults.next(On::Write, Fault::Late(Duration::ZERO));
        }
        let fault = if within { Fault::ReplyLostAfter(Box::new(logout)) } else { Fault::SentAfter(Box::new(logout)) };
        faults.next(On::Write, fault);
        let outcome = session.close().await;
        if let Ok(Some(new)) = &outcome {
            assert!(!exists(&sessions, new).await, "after call {calls} a logout left the new id ({outcome:?})");
        }
        assert!(!exists(&sessions, &id).await, "after call {calls} a logout left the old id ({outcome:?})");
        if let Some(admin) = sessions.handler().admin() {
            let page = ok(admin.list(None, up_to(100)).await, "a listing");
            // A retired mark or a forward may be left, and a record whose id nobody knows only after a call without an answer.
            assert_eq!(faults.left(), 0, "faults that no call has met");
            assert!(within || page.sessions.is_empty(), "after call {calls} {} records are left", page.sessions.len());
        }
    }
}

async fn a_rotate_in_the_middle_of_a_logout_saves_nobody(env: Env) {
    let (sessions, faults) = faulty(&env).await;
    let other = crate::sessions::sessions(&env).await;
    // The logout looks, opens and destroys: the rotates come before it opens, or when it has opened. With two of them what
    // the destroy removed leads to a second forward.
    for (before_it_opens, rotates) in [(true, 1), (false, 1), (true, 2), (false, 2)] {
        let when = if before_it_opens { "before the logout opened" } else { "when the logout had opened" };
        let id = stored(&other, &[("n", 1)]).await;
        let ids = Arc::new(Mutex::new(vec![id.clone()]));
        let rotate = {
            let (other, ids) = (other.clone(), ids.clone());
            move || -> BoxFuture<'static, ()> {
                Box::pin(async move {
                    for _ in 0..rotates {
                        let id = ids.lock().expect("nobody panics with it").last().expect("it begins with one").clone();
                        let mut session = ok(other.open(&id).await, "open during a logout");
                        session.rotate();
                        let new =
                            ok(session.close().await, "a close with a rotate").expect("a session with values is stored");
                        ids.lock().expect("nobody panics with it").push(new);
                    }
                })
            }
        };
        let rotate = Fault::SentAfter(Box::new(rotate));
        if before_it_opens {
            faults.next(On::Open, Fault::Late(Duration::ZERO));
            faults.next(On::Open, rotate);
        } else {
            faults.next(On::Destroy, rotate);
        }
        ok(sessions.destroy(&id).await, "a logout");
        assert_eq!(faults.left(), 0, "faults that no call has met");
        let ids = std::mem::take(&mut *ids.lock().expect("nobody panics with it"));
        assert_eq!(ids.len(), 1 + rotates, "the ids of the session");
        for (n, id) in ids.iter().enumerate() {
            assert!(!exists(&other, id).await, "with {rotates} rotate(s) {when}, id number {n} is there after the logout");
        }
    }
}

async fn a_logout_with_the_old_id_after_a_rotate(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let first = stored(&here, &[("n", 1)]).await;
    let mut ids = vec![first];
    for _ in 0..3 {
        let last = ids.last().expect("there is a first");
        let updated = here.update(last, async |session| {
            session.rotate();
            add(session, "n")
        });
        ids.push(ok(updated.await, "an update with a rotate").id.expect("a session with values is stored"));
    }
    has(&there, &ids[0], "n", 4, "under the oldest id").await;
    ok(there.destroy(&ids[0]).await, "a logout with the oldest id");
    for (n, id) in ids.iter().enumerate() {
        assert!(!exists(&here, id).await, "id number {n} of four is there after a logout with the oldest");
    }
}

async fn after_an_elevate_the_old_id_sees_nothing(env: Env) {
    let (here, there) = (sessions(&env).await, sessions(&env).await);
    let old = stored(&here, &[("n", 1)]).await;
    let updated = here.update(&old, async |session| {
        session.elevate();
        session.insert("account", &7u64)
    });
    let new = ok(updated.await, "an update with an elevate").id.expect("a session with values is stored");
    assert!(new != old, "a login kept the id");
    has(&there, &new, "account", 7, "under the new id").await;
    let view = ok(there.view(&old).await, "a view of the old id");
    assert!(view.is_retired() && view.keys().next().is_none(), "the old id sees something after a login");
    let mut session = ok(there.open(&old).await, "open of the old id");
    assert!(session.is_retired(), "the old id is not retired after a login");
    ok(session.insert("planted", &1u64), "insert");
    assert_eq!(ok(session.close().await, "close under the old id"), None, "the old id was handed out again");
    assert_eq!(number(&there, &new, "planted").await, None, "what was done under the old id reached the new one");
    assert!(ok(there.view(&old).await, "a view of the old id").is_retired(), "something was stored under the old id");
}

async fn a_dropped_save_goes_on(env: Env) {
    let (sessions, faults) = faulty(&env).await;
    let id = stored(&sessions, &[("n", 1)]).await;
    for n in 2..=3 {
        let mut session = ok(sessions.open(&id).await, "open");
        ok(add(&mut session, "n"), "insert");
        faults.next(On::Write, Fault::Late(Duration::from_millis(60)));
        let gone = tokio::time::timeout(Duration::from_millis(5), session.close()).await;
        drop(gone);
        let session = ok(sessions.open(&id).await, "open after a save whose request went away");
        assert_eq!(ok(session.get::<u64>("n"), "get"), Some(n), "the number after a save whose request went away");
        ok(session.close().await, "close");
    }
}

async fn a_lost_reply_counts_once(env: Env) {
    let (sessions, faults) = faulty(&env).await;
    let id = stored(&sessions, &[("n", 0)]).await;
    for n in 1..=4 {
        faults.next(On::Write, Fault::ReplyLost);
        assert_eq!(ok(update(&sessions, &id, "n").await, "an update whose answer was lost"), n);
        has(&sessions, &id, "n", n, "after an update whose answer was lost").await;
    }
    assert_eq!(faults.left(), 0, "faults that no call has met");
    let mut session = ok(sessions.open(&id).await, "open");
    for n in 5..=6 {
        ok(add(&mut session, "n"), "insert");
        faults.next(On::Write, Fault::ReplyLost);
        ok(session.save().await, "a save whose answer was lost");
        has(&sessions, &id, "n", n, "after a save whose answer was lost").await;
    }
    ok(session.close().await, "close");
}

async fn a_lost_reply_of_the_first_save_stores_once(env: Env) {
    let (sessions, faults) = faulty(&env).await;
    faults.next(On::Write, Fault::ReplyLost);
    let id = stored(&sessions, &[("n", 1)]).await;
    assert_eq!(faults.left(), 0, "faults that no call has met");
    has(&sessions, &id, "n", 1, "after a first save whose answer was lost").await;
    assert_eq!(ok(update(&sessions, &id, "n").await, "an update"), 2);
    if let Some(admin) = sessions.handler().admin() {
        let page = ok(admin.list(None, up_to(10)).await, "a listing");
        assert_eq!(page.sessions.len(), 1, "{} sessions are stored", page.sessions.len());
    }
}

async fn a_lost_reply_before_another_write_is_unknown(env: Env) {
    let faults = Faults::default();
    let handler = Arc::new(Faulty::new(env.handler().await, faults.clone()));
    // Without the lock another one can come between the write and its repetition.
    let sessions = build(&env, builder(&env, handler).locking(false));
    let other = build(&env, builder(&env, env.handler().await).locking(false));
    let id = stored(&other, &[("n", 0)]).await;
    let meanwhile = {
        let (other, id) = (other.clone(), id.clone());
        move || -> BoxFuture<'static, ()> {
            Box::pin(async move {
                ok(update(&other, &id, "n").await, "an update of another request");
            })
        }
    };
    faults.next(On::Write, Fault::ReplyLostAfter(Box::new(meanwhile)));
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let outcome = sessions.update(&id, async move |session: &mut Session| {
        counted.fetch_add(1, Ordering::SeqCst);
        add(session, "n")
    });
    match outcome.await {
        Err(error) if error.kind() == ErrorKind::Unknown => {}
        other => panic!("an update whose answer was lost and that others overwrote ended as {other:?}"),
    }
    assert_eq!(runs.load(Ordering::SeqCst), 1, "how often the closure ran");
    has(&sessions, &id, "n", 2, "after an update of unknown fate and one of another request").await;
}

async fn a_lost_reply_before_a_logout_brings_nothing_back(env: Env) {
    let (sessions, faults) = faulty(&env).await;
    let other = crate::sessions::sessions(&env).await;
    let id = stored(&sessions, &[("n", 0)]).await;
    let meanwhile = {
        let (other, id) = (other.clone(), id.clone());
        move || -> BoxFuture<'static, ()> { Box::pin(async move { ok(other.destroy(&id).await, "a logout") }) }
    };
    faults.next(On::Write, Fault::ReplyLostAfter(Box::new(meanwhile)));
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let outcome = sessions.update(&id, async move |session: &mut Session| {
        counted.fetch_add(1, Ordering::SeqCst);
        add(session, "n")
    });
    match outcome.await {
        Err(error) if matches!(error.kind(), ErrorKind::Unknown | ErrorKind::Gone) => {}
        other => panic!("an update whose answer was lost and that a logout followed ended as {other:?}"),
    }
    assert_eq!(runs.load(Ordering::SeqCst), 1, "how often the closure ran");
    assert!(!exists(&other, &id).await, "a destroyed session was brought back");
}

async fn a_save_that_was_not_sent_may_be_repeated(env: Env) {
    let (sessions, faults) = faulty(&env).await;
    let other = crate::sessions::sessions(&env).await;
    let id = stored(&sessions, &[("n", 1)]).await;
    let mut session = ok(sessions.open(&id).await, "open");
    ok(add(&mut session, "n"), "insert");
    faults.next(On::Write, Fault::NeverSent);
    match session.save().await {
        Err(error) if error.kind() == ErrorKind::Unavailable => {}
        other => panic!("a save that was not sent ended as {other:?}"),
    }
    has(&other, &id, "n", 1, "after a save that was not sent").await;
    ok(session.save().await, "the same save made again");
    has(&other, &id, "n", 2, "after the save was made again").await;
    ok(add(&mut session, "n"), "insert");
    ok(session.close().await, "close");
    has(&other, &id, "n", 3, "after the close").await;
}
