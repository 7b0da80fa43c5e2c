//! The suite of the callbacks: what `open`, `read`, `write`, `destroy`, `close` and `save` owe to one caller after the other.

use std::time::{Duration, Instant};

use session_core::{Change, ErrorKind, Expect, OpenRequest, Record, SessionId, Ttl, Written};

use crate::case::suite;
use crate::harness::Env;
use crate::steps::*;

suite! { $
    /// Claims that the callbacks do what [`SessionHandler`](session_core::SessionHandler) and
    /// [`OpenSession`](session_core::OpenSession) say, with exclusive and with read-only access.
    handler as handler_suite {
        absent_id_reads_none: "An id that nobody wrote is absent, however it is opened.";
        written_bytes_come_back_exactly: "What was written is read, byte for byte, also through another handler.";
        an_empty_record_is_not_absent: "A record without bytes is a record.";
        a_large_record_comes_back_or_is_refused_whole: "A record is stored whole, or refused as too large while the old one stays.";
        a_later_write_replaces_all_of_the_earlier: "A shorter record leaves nothing of the longer one before it.";
        ids_differing_in_case_are_different: "Ids that differ only in the case of letters are different sessions.";
        ids_of_every_shape_are_told_apart: "Ids that differ in a single character, wherever it stands, are different sessions.";
        other_ids_are_left_alone: "What is done to one session is not seen in another.";
        other_namespaces_see_nothing: "A session is not seen in another namespace.";
        a_write_is_seen_by_every_later_read: "Once a write has returned, every read that starts later sees it.";
        a_write_keeps_the_lock: "A write does not give the lock back.";
        a_second_read_asks_the_store: "What is read later is newer than what was read at first.";
        the_holder_reads_its_own_write: "Whoever wrote reads what he wrote.";
        a_session_can_be_written_again_and_again: "An opening may write any number of times.";
        second_opener_times_out_within_its_wait: "Who cannot have the lock is told so when his wait is over, not much later and not before.";
        a_wait_of_zero_tries_once: "Without a wait a taken lock is refused at once, and a free one is taken.";
        the_same_caller_waits_too: "Who opens what he already has open waits like anyone else.";
        waiter_is_in_soon_after_close: "A waiter gets in soon after the holder has closed.";
        waiter_is_in_soon_after_save: "A waiter gets in soon after the holder has saved.";
        waiter_reads_what_the_holder_wrote: "What is read under the lock was read after the lock was taken.";
        waiters_all_get_in: "Every waiter gets in, one after the other.";
        different_ids_do_not_wait_for_each_other: "A session is not kept waiting by another one.";
        many_sessions_are_open_at_once: "Any number of sessions may be open at the same time.";
        close_twice_succeeds: "Closing what is closed succeeds and does nothing.";
        close_leaves_the_record_alone: "Closing without a write changes nothing.";
        closing_what_was_absent_leaves_nothing: "A session that was absent and that nobody wrote leaves nothing behind.";
        read_only_never_waits: "A reader does not wait for a holder, and sees the last committed state.";
        read_only_is_not_waited_for: "A holder does not wait for a reader.";
        read_only_cannot_change_anything: "Through an opening for reading nothing can be changed.";
        destroy_access_allows_nothing_else: "Through an opening for destruction nothing can be read or written.";
        existing_absent_open_takes_no_lock: "An absent id that should exist is not locked.";
        existing_absent_open_never_waits: "An absent id that should exist is answered at once, also while somebody is about to create it.";
        existing_absent_open_leaves_nothing: "An absent id that should exist leaves nothing in the store.";
        existing_absent_open_cannot_create: "What was opened as existing and was absent cannot be created.";
        an_absent_id_can_be_locked_and_created: "An absent id of which nothing is expected is locked, and created by the first write.";
        fresh_open_takes_no_lock: "Opening a fresh id takes no lock, so that two may open the same one; the first to write wins.";
        fresh_create_conflicts_with_a_live_id: "A fresh id that exists is a conflict, and what is there stays.";
        fresh_create_after_destroy_is_a_conflict: "A fresh id that was destroyed a short time ago is a conflict.";
        first_write_of_a_fresh_id_takes_the_lock: "A fresh id that was written and not closed is held.";
        fresh_open_without_a_write_leaves_nothing: "A fresh id that nobody wrote is not there.";
        destroyed_is_absent_to_everybody: "A destroyed session is absent, however it is opened.";
        destroy_returns_what_it_removed: "A destroy says what it removed, with and without the lock.";
        destroying_the_absent_succeeds: "Destroying what is absent succeeds and finds nothing, also twice.";
        destroy_never_waits: "A destroy does not wait for a holder.";
        a_destroyed_session_can_be_created_again: "A destroyed id is absent only until somebody creates it again.";
        holder_destroys_and_the_next_gets_in: "A holder that destroyed and closed holds nothing more.";
        a_refused_write_gives_the_lock_back: "An opening whose write was refused is spent, and holds nothing more.";
        touch_leaves_the_bytes_alone: "A touch changes the length of life and nothing else.";
        touch_of_the_absent_is_gone: "An absent session cannot be touched, and a touch creates nothing.";
        save_writes_and_closes: "A save stores the new record and gives the lock back.";
        save_touches_and_closes: "A save of a new life keeps the bytes, prolongs and gives the lock back.";
        save_destroys_and_closes: "A save of a destruction removes the record and gives the lock back.";
        save_of_nothing_closes: "A save of nothing changes nothing and gives the lock back.";
        a_refused_save_closes: "A save that was refused has given the lock back.";
    }
}

async fn absent_id_reads_none(env: Env) {
    let handler = env.handler().await;
    let requests = [
        env.patient(),
        env.patient().expecting(Expect::Any),
        env.patient().expecting(Expect::Fresh),
        OpenRequest::read_only(),
        OpenRequest::read_only().expecting(Expect::Any),
    ];
    for request in requests {
        let id = new_id();
        let mut opened = open(&*handler, &id, request).await;
        for time in ["first", "second"] {
            let read = opened.read().await;
            assert!(matches!(read, Ok(None)), "the {time} read after {request:?} said {read:?}");
        }
        close(opened).await;
        absent(&*handler, &id, "after reading").await;
    }
}

async fn written_bytes_come_back_exactly(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let mut rng = env.rng(1);
    let mut noise = vec![0; 64 * 1024];
    noise.fill_with(|| rng.bits().to_le_bytes()[0]);
    let every_byte: Vec<u8> = (0..=255).collect();
    for data in [b"plain".to_vec(), b"a\0b\0".to_vec(), vec![0; 3], vec![0xff; 9], every_byte, noise, b"\r\n\r\n".to_vec()] {
        let id = session(&env, &*here, data.clone()).await;
        holds(&*here, &id, &data, "after the first save").await;
        let (mut opened, seen) = open_read(&*there, &id, env.patient()).await;
        assert!(seen.as_ref() == Some(&data), "another handler read {}", shown(seen.as_deref()));
        let backwards: Vec<u8> = data.iter().rev().copied().collect();
        written(&mut opened, backwards.clone()).await;
        close(opened).await;
        holds(&*here, &id, &backwards, "after the second write").await;
    }
}

async fn an_empty_record_is_not_absent(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "").await;
    holds(&*handler, &id, "", "after an empty save").await;
    let (mut opened, seen) = open_read(&*handler, &id, env.patient()).await;
    assert_eq!(seen.as_deref(), Some(&b""[..]), "an empty record was read as absent");
    written(&mut opened, "x").await;
    written(&mut opened, "").await;
    close(opened).await;
    holds(&*handler, &id, "", "after it was emptied again").await;
}

async fn a_large_record_comes_back_or_is_refused_whole(env: Env) {
    let handler = env.handler().await;
    for len in [256 << 10, 1 << 20, 3 << 20] {
        let id = session(&env, &*handler, "small").await;
        let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
        let large: Vec<u8> = (0..len).map(|n: usize| (n % 251) as u8).collect();
        match write(&mut opened, large.clone()).await {
            Ok(Written::Applied) => {
                close(opened).await;
                holds(&*handler, &id, &large, "after a large write").await;
            }
            Err(error) if error.kind() == ErrorKind::TooLarge => {
                holds(&*handler, &id, "small", "after a write that was too large").await;
                written(&mut opened, "smaller").await;
                close(opened).await;
                holds(&*handler, &id, "smaller", "after the write that followed").await;
            }
            other => panic!("a write of {len} bytes ended as {other:?}"),
        }
    }
}

async fn a_later_write_replaces_all_of_the_earlier(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, vec![b'l'; 100_000]).await;
    for len in [99_999, 4097, 4096, 1, 70_000, 0, 2] {
        let opened = open(&*handler, &id, env.patient()).await;
        saved(opened, vec![b's'; len]).await;
        holds(&*handler, &id, vec![b's'; len], "after a record of another length").await;
    }
}

fn id(text: &str) -> SessionId {
    SessionId::parse(text).expect("a case uses only ids that are accepted")
}

async fn tell_apart(env: &Env, ids: &[SessionId]) {
    let handler = env.handler().await;
    for (n, id) in ids.iter().enumerate() {
        absent(&*handler, id, "before it was created").await;
        let opened = open(&*handler, id, env.patient().expecting(Expect::Any)).await;
        saved(opened, n.to_string()).await;
    }
    for (n, id) in ids.iter().enumerate() {
        holds(&*handler, id, n.to_string(), "after all were created").await;
    }
    assert!(destroy(&*handler, &ids[0]).await.is_some(), "nothing was there to destroy");
    for (n, id) in ids.iter().enumerate().skip(1) {
        holds(&*handler, id, n.to_string(), "after another one was destroyed").await;
    }
}

async fn ids_differing_in_case_are_different(env: Env) {
    let plain = new_id();
    let upper = id(&plain.as_str().to_ascii_uppercase());
    let last = plain.as_str().len() - 1;
    let mixed = format!("{}Z", &plain.as_str()[..last]);
    tell_apart(&env, &[plain.clone(), upper, id(&mixed), id(&mixed.to_ascii_lowercase())]).await;
}

async fn ids_of_every_shape_are_told_apart(env: Env) {
    let long = |end: &str| id(&format!("{}{end}", "x".repeat(SessionId::MAX_LEN - end.len())));
    let short = |end: &str| id(&format!("{}{end}", "x".repeat(SessionId::MIN_LEN - end.len())));
    let sixty = |end: &str| id(&format!("{}{end}", "x".repeat(64)));
    let ids = [
        short("a"),
        short("b"),
        short(","),
        short("-"),
        id(&"-".repeat(22)),
        id(&",".repeat(22)),
        id(&"0".repeat(22)),
        id(&"0".repeat(23)),
        sixty("a"),
        sixty("b"),
        sixty(""),
        long("a"),
        long("b"),
        long(",-"),
        long("-,"),
    ];
    tell_apart(&env, &ids).await;
}

async fn other_ids_are_left_alone(env: Env) {
    let handler = env.handler().await;
    let (one, two) = (session(&env, &*handler, "one").await, session(&env, &*handler, "two").await);
    let (mut first, _) = open_read(&*handler, &one, env.patient()).await;
    let (mut second, _) = open_read(&*handler, &two, env.patient()).await;
    written(&mut first, "one again").await;
    written(&mut second, "two again").await;
    close(first).await;
    destroy(&*handler, &one).await;
    holds(&*handler, &two, "two again", "after another session was destroyed").await;
    written(&mut second, "two at last").await;
    close(second).await;
    absent(&*handler, &one, "after another session was written").await;
}

async fn other_namespaces_see_nothing(env: Env) {
    let elsewhere = env.elsewhere();
    let (here, there) = (env.handler().await, elsewhere.handler().await);
    let id = session(&env, &*here, "here").await;
    absent(&*there, &id, "in another namespace").await;
    let held = open(&*here, &id, env.patient()).await;
    let other = open(&*there, &id, env.at_once().expecting(Expect::Any)).await;
    saved(other, "there").await;
    close(held).await;
    holds(&*here, &id, "here", "after the same id was written elsewhere").await;
    assert_eq!(destroy(&*there, &id).await.as_deref(), Some(&b"there"[..]), "the other namespace lost its own session");
    holds(&*here, &id, "here", "after the same id was destroyed elsewhere").await;
}

async fn a_write_is_seen_by_every_later_read(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "0").await;
    for n in 1..=20 {
        let (writer, reader) = if n % 2 == 0 { (&here, &there) } else { (&there, &here) };
        let (mut opened, seen) = open_read(&**writer, &id, env.patient()).await;
        assert_eq!(count(seen.as_deref()), n - 1, "an exclusive opening read an older state");
        written(&mut opened, n.to_string()).await;
        holds(&**reader, &id, n.to_string(), "as soon as a write had returned").await;
        close(opened).await;
    }
}

async fn a_write_keeps_the_lock(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
    written(&mut opened, "new").await;
    let second = handler.open(&id, &env.at_once()).await;
    refused(second, &[ErrorKind::LockTimeout], "an open beside a holder that has written");
    close(opened).await;
}

async fn a_second_read_asks_the_store(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "first").await;
    let (mut view, seen) = open_read(&*handler, &id, OpenRequest::read_only()).await;
    assert_eq!(seen.as_deref(), Some(&b"first"[..]));
    saved(open(&*handler, &id, env.patient()).await, "second").await;
    let seen = read(&mut view).await;
    assert_eq!(seen.as_deref(), Some(&b"second"[..]), "a second read said what the first had said");
    destroy(&*handler, &id).await;
    let seen = read(&mut view).await;
    assert_eq!(seen, None, "a read after the destruction said what an earlier one had said");
    close(view).await;
}

async fn the_holder_reads_its_own_write(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    let mut opened = open(&*handler, &id, env.patient()).await;
    written(&mut opened, "unread").await;
    assert_eq!(read(&mut opened).await.as_deref(), Some(&b"unread"[..]), "a write before the first read was not read");
    written(&mut opened, "new").await;
    assert_eq!(read(&mut opened).await.as_deref(), Some(&b"new"[..]), "a write after a read was not read");
    close(opened).await;
}

async fn a_session_can_be_written_again_and_again(env: Env) {
    let handler = env.handler().await;
    let id = new_id();
    let mut opened = open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await;
    for n in 0..12 {
        written(&mut opened, n.to_string()).await;
        holds(&*handler, &id, n.to_string(), "after a further write of one opening").await;
    }
    close(opened).await;
}

async fn second_opener_times_out_within_its_wait(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "held").await;
    let held = open(&*here, &id, env.patient()).await;
    let wait = Duration::from_millis(400).max(env.tick() * 2);
    let started = Instant::now();
    let second = there.open(&id, &OpenRequest::exclusive(wait, env.lease())).await;
    let waited = started.elapsed();
    refused(second, &[ErrorKind::LockTimeout], "an open of a held session");
    assert!(waited + Duration::from_millis(20) >= wait, "it gave up after {waited:?} of {wait:?}");
    assert!(waited <= wait + Duration::from_secs(2), "it gave up only after {waited:?}, with a wait of {wait:?}");
    close(held).await;
}

async fn a_wait_of_zero_tries_once(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "held").await;
    let held = open(&*here, &id, env.at_once()).await;
    let started = Instant::now();
    refused(there.open(&id, &env.at_once()).await, &[ErrorKind::LockTimeout], "an open of a held session");
    assert!(started.elapsed() < SOON, "it took {:?} to be refused without a wait", started.elapsed());
    close(held).await;
    close(open(&*there, &id, env.at_once()).await).await;
}

async fn the_same_caller_waits_too(env: Env) {
    let handler = env.handler().await;
    for expect in [Expect::Existing, Expect::Any] {
        let id = session(&env, &*handler, "held").await;
        let held = open(&*handler, &id, env.patient().expecting(expect)).await;
        let again = handler.open(&id, &env.at_once().expecting(expect)).await;
        refused(again, &[ErrorKind::LockTimeout], "a second open by the same handler");
        close(held).await;
    }
}

/// Starts a waiter, lets it wait, ends the hold, and says how long after that the waiter was in.
async fn hand_over(env: &Env, by_saving: bool) -> Duration {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(env, &*here, "old").await;
    let (held, _) = open_read(&*here, &id, env.patient()).await;
    let request = OpenRequest::exclusive(SOON * 2, env.lease());
    let waiter = env.spawn(async move {
        let opened = open(&*there, &id, request).await;
        (opened, Instant::now())
    });
    tokio::time::sleep(env.tick().max(Duration::from_millis(50))).await;
    assert!(!waiter.is_finished(), "the waiter was in before the holder was out");
    let ended = Instant::now();
    if by_saving {
        saved(held, "new").await;
    } else {
        close(held).await;
    }
    let (opened, entered) = env.joined(waiter).await;
    close(opened).await;
    entered.saturating_duration_since(ended)
}

async fn waiter_is_in_soon_after_close(env: Env) {
    let after = hand_over(&env, false).await;
    assert!(after < SOON, "the waiter was in only {after:?} after the close");
}

async fn waiter_is_in_soon_after_save(env: Env) {
    let after = hand_over(&env, true).await;
    assert!(after < SOON, "the waiter was in only {after:?} after the save");
}

async fn waiter_reads_what_the_holder_wrote(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut held, _) = open_read(&*here, &id, env.patient()).await;
    let (waiting, request) = (id.clone(), env.patient());
    let waiter = env.spawn(async move { open_read(&*there, &waiting, request).await });
    tokio::time::sleep(env.tick().max(Duration::from_millis(50))).await;
    written(&mut held, "halfway").await;
    saved(held, "new").await;
    let (mut opened, seen) = env.joined(waiter).await;
    assert_eq!(seen.as_deref(), Some(&b"new"[..]), "the waiter read an older state than the one it was handed");
    written(&mut opened, "newer").await;
    close(opened).await;
    holds(&*here, &id, "newer", "after the waiter wrote").await;
}

async fn waiters_all_get_in(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "0").await;
    let held = open(&*here, &id, env.patient()).await;
    let waiters: Vec<_> = (0..12)
        .map(|n| {
            let handler = if n % 2 == 0 { here.clone() } else { there.clone() };
            let (id, request) = (id.clone(), env.patient());
            env.spawn(async move {
                let (opened, seen) = open_read(&*handler, &id, request).await;
                saved(opened, (count(seen.as_deref()) + 1).to_string()).await;
            })
        })
        .collect();
    env.ticks(1).await;
    close(held).await;
    for waiter in waiters {
        env.joined(waiter).await;
    }
    holds(&*here, &id, "12", "after twelve waiters each added one").await;
}

async fn different_ids_do_not_wait_for_each_other(env: Env) {
    let handler = env.handler().await;
    let ids = [session(&env, &*handler, "a").await, session(&env, &*handler, "b").await, new_id(), new_id()];
    let mut open_ones = Vec::new();
    for id in &ids {
        open_ones.push(open(&*handler, id, env.at_once().expecting(Expect::Any)).await);
    }
    for opened in open_ones {
        close(opened).await;
    }
}

async fn many_sessions_are_open_at_once(env: Env) {
    let handler = env.handler().await;
    let mut open_ones = Vec::new();
    for n in 0..20 {
        let id = session(&env, &*handler, n.to_string()).await;
        let opened = tokio::time::timeout(SOON * 3, open(&*handler, &id, env.patient())).await;
        open_ones.push((id, opened.unwrap_or_else(|_| panic!("session number {n} could not be opened beside the others"))));
    }
    for (_, opened) in &mut open_ones {
        written(opened, "new").await;
    }
    for (id, opened) in open_ones {
        close(opened).await;
        holds(&*handler, &id, "new", "after all were open at once").await;
    }
}

async fn close_twice_succeeds(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "kept").await;
    for request in [env.patient(), OpenRequest::read_only(), env.patient().expecting(Expect::Fresh), OpenRequest::destroy()]
    {
        let mut opened = open(&*handler, &id, request).await;
        for time in ["first", "second", "third"] {
            let closed = opened.close().await;
            assert!(closed.is_ok(), "the {time} close of {request:?} said {closed:?}");
        }
        let next = open(&*handler, &id, env.at_once()).await;
        let again = opened.close().await;
        assert!(again.is_ok(), "closing once more after somebody else opened said {again:?}");
        refused(handler.open(&id, &env.at_once()).await, &[ErrorKind::LockTimeout], "an open after a stranger closed again");
        close(next).await;
    }
    holds(&*handler, &id, "kept", "after much closing").await;
}

async fn close_leaves_the_record_alone(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "kept").await;
    for request in [env.patient(), env.patient().expecting(Expect::Any), OpenRequest::read_only(), OpenRequest::destroy()] {
        close(open(&*handler, &id, request).await).await;
        holds(&*handler, &id, "kept", "after an open and a close").await;
    }
}

async fn closing_what_was_absent_leaves_nothing(env: Env) {
    let handler = env.handler().await;
    let id = new_id();
    for request in [env.patient().expecting(Expect::Any), env.patient(), OpenRequest::read_only()] {
        let (opened, seen) = open_read(&*handler, &id, request).await;
        assert_eq!(seen, None, "an id that was only opened and closed was there");
        close(opened).await;
        absent(&*handler, &id, "after an open and a close").await;
    }
    if let Some(ids) = listing(&*handler, 100).await {
        assert!(ids.is_empty(), "the store lists {} sessions, and none was written", ids.len());
    }
    let opened = open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await;
    saved(opened, "made").await;
}

async fn read_only_never_waits(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "committed").await;
    let (mut held, _) = open_read(&*here, &id, env.patient()).await;
    let started = Instant::now();
    holds(&*there, &id, "committed", "while somebody holds it").await;
    written(&mut held, "written").await;
    holds(&*there, &id, "written", "while somebody holds and has written it").await;
    assert!(started.elapsed() < SOON, "reading beside a holder took {:?}", started.elapsed());
    close(held).await;
}

async fn read_only_is_not_waited_for(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut view, _) = open_read(&*there, &id, OpenRequest::read_only()).await;
    let mut opened = open(&*here, &id, env.at_once()).await;
    written(&mut opened, "new").await;
    assert_eq!(read(&mut view).await.as_deref(), Some(&b"new"[..]));
    close(view).await;
    refused(there.open(&id, &env.at_once()).await, &[ErrorKind::LockTimeout], "an open after a reader closed");
    close(opened).await;
}

async fn read_only_cannot_change_anything(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "kept").await;
    for attempt in ["write", "touch", "destroy", "save"] {
        let (mut view, _) = open_read(&*handler, &id, OpenRequest::read_only()).await;
        let outcome = match attempt {
            "write" => write(&mut view, "changed").await,
            "touch" => view.touch(Ttl::from_secs(1)).await,
            "destroy" => view.destroy().await.map(|_| Written::Applied),
            _ => view.save(&Change::Write(record("changed")), wid()).await,
        };
        refused(outcome, &[ErrorKind::Unsupported], &format!("a {attempt} through an opening for reading"));
        close(view).await;
        holds(&*handler, &id, "kept", "after a reader tried to change it").await;
    }
}

async fn destroy_access_allows_nothing_else(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "kept").await;
    let mut opened = open(&*handler, &id, OpenRequest::destroy()).await;
    refused(opened.read().await, &[ErrorKind::Unsupported], "a read through an opening for destruction");
    refused(write(&mut opened, "changed").await, &[ErrorKind::Unsupported], "a write through an opening for destruction");
    close(opened).await;
    holds(&*handler, &id, "kept", "after an opening for destruction was not used for it").await;
}

async fn existing_absent_open_takes_no_lock(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    let (waiting, seen) = open_read(&*here, &id, env.patient()).await;
    assert_eq!(seen, None);
    assert!(waiting.held().is_none(), "the opening of an absent id has a lease");
    let creator = open(&*there, &id, env.at_once().expecting(Expect::Any)).await;
    saved(creator, "made").await;
    close(waiting).await;
    holds(&*there, &id, "made", "after the opening that found nothing was closed").await;
}

async fn existing_absent_open_never_waits(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    let creator = open(&*here, &id, env.patient().expecting(Expect::Any)).await;
    let started = Instant::now();
    let (opened, seen) = open_read(&*there, &id, env.patient()).await;
    assert!(started.elapsed() < SOON, "it took {:?} to say that the id is absent", started.elapsed());
    assert_eq!(seen, None);
    close(opened).await;
    refused(
        there.open(&id, &env.at_once().expecting(Expect::Any)).await,
        &[ErrorKind::LockTimeout],
        "an open beside the creator",
    );
    close(creator).await;
}

async fn existing_absent_open_leaves_nothing(env: Env) {
    let handler = env.handler().await;
    for _ in 0..5 {
        let id = new_id();
        for request in [env.patient(), OpenRequest::read_only()] {
            close(open(&*handler, &id, request).await).await;
            drop(open(&*handler, &id, request).await);
        }
        absent(&*handler, &id, "after it was asked for").await;
        let fresh = open(&*handler, &id, env.at_once().expecting(Expect::Fresh)).await;
        saved(fresh, "made").await;
        destroy(&*handler, &id).await;
    }
    if let Some(ids) = listing(&*handler, 100).await {
        assert!(ids.is_empty(), "the store lists {} sessions, and all were destroyed", ids.len());
    }
}

async fn existing_absent_open_cannot_create(env: Env) {
    let handler = env.handler().await;
    let id = new_id();
    let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
    refused(write(&mut opened, "made").await, &[ErrorKind::Gone], "a write to an id that should exist and was absent");
    absent(&*handler, &id, "after the refusal").await;
    let mut opened = open(&*handler, &id, env.patient()).await;
    let saved = opened.save(&Change::Write(record("made")), wid()).await;
    refused(saved, &[ErrorKind::Gone], "a save to an id that should exist and was absent");
    absent(&*handler, &id, "after the refusal").await;
}

async fn an_absent_id_can_be_locked_and_created(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    let (mut opened, seen) = open_read(&*here, &id, env.patient().expecting(Expect::Any)).await;
    assert_eq!(seen, None);
    let second = there.open(&id, &env.at_once().expecting(Expect::Any)).await;
    refused(second, &[ErrorKind::LockTimeout], "a second open of a locked absent id");
    written(&mut opened, "made").await;
    holds(&*there, &id, "made", "after it was created").await;
    refused(there.open(&id, &env.at_once()).await, &[ErrorKind::LockTimeout], "an open beside its creator");
    close(opened).await;
    close(open(&*there, &id, env.at_once()).await).await;
}

async fn fresh_open_takes_no_lock(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    let started = Instant::now();
    let mut first = open(&*here, &id, env.patient().expecting(Expect::Fresh)).await;
    let mut second = open(&*there, &id, env.patient().expecting(Expect::Fresh)).await;
    assert!(started.elapsed() < SOON, "opening a fresh id twice took {:?}", started.elapsed());
    written(&mut second, "second").await;
    refused(write(&mut first, "first").await, &[ErrorKind::Conflict], "the first write of a fresh id that was taken");
    close(first).await;
    close(second).await;
    holds(&*here, &id, "second", "after two wrote a fresh id").await;
}

async fn fresh_create_conflicts_with_a_live_id(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "kept").await;
    let mut fresh = open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await;
    refused(write(&mut fresh, "taken").await, &[ErrorKind::Conflict], "the first write of a fresh id that exists");
    close(fresh).await;
    let mut fresh = open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await;
    let saved = fresh.save(&Change::Write(record("taken")), wid()).await;
    refused(saved, &[ErrorKind::Conflict], "the first save of a fresh id that exists");
    holds(&*handler, &id, "kept", "after it was taken for a fresh one").await;
    close(open(&*handler, &id, env.at_once()).await).await;
}

async fn fresh_create_after_destroy_is_a_conflict(env: Env) {
    let handler = env.handler().await;
    let id = new_id();
    // The late copy of a create that was opened before the session was made and destroyed.
    let mut late = open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await;
    saved(open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await, "made").await;
    assert_eq!(destroy(&*handler, &id).await.as_deref(), Some(&b"made"[..]));
    let outcome = write(&mut late, "again").await;
    if env.remembers_destroyed() {
        refused(outcome, &[ErrorKind::Conflict], "a create of a fresh id that was destroyed");
        absent(&*handler, &id, "after the refusal").await;
        let mut fresh = open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await;
        refused(write(&mut fresh, "again").await, &[ErrorKind::Conflict], "a later create of a fresh id that was destroyed");
        absent(&*handler, &id, "after the refusal").await;
    } else if outcome.is_ok() {
        holds(&*handler, &id, "again", "after a create that was applied").await;
    }
}

async fn first_write_of_a_fresh_id_takes_the_lock(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = new_id();
    let mut fresh = open(&*here, &id, env.patient().expecting(Expect::Fresh)).await;
    written(&mut fresh, "made").await;
    for expect in [Expect::Existing, Expect::Any] {
        let second = there.open(&id, &env.at_once().expecting(expect)).await;
        refused(second, &[ErrorKind::LockTimeout], "an open beside the creator of a fresh id");
    }
    written(&mut fresh, "made again").await;
    close(fresh).await;
    let (opened, seen) = open_read(&*there, &id, env.at_once()).await;
    assert_eq!(seen.as_deref(), Some(&b"made again"[..]));
    close(opened).await;
}

async fn fresh_open_without_a_write_leaves_nothing(env: Env) {
    let handler = env.handler().await;
    let id = new_id();
    close(open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await).await;
    drop(open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await);
    let mut nothing = open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await;
    let saved_nothing = nothing.save(&Change::Nothing, wid()).await;
    assert!(saved_nothing.is_ok(), "saving nothing to a fresh id said {saved_nothing:?}");
    absent(&*handler, &id, "after nothing was written").await;
    saved(open(&*handler, &id, env.patient().expecting(Expect::Fresh)).await, "made").await;
    holds(&*handler, &id, "made", "after it was created at last").await;
}

async fn destroyed_is_absent_to_everybody(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "doomed").await;
    let (mut view, _) = open_read(&*there, &id, OpenRequest::read_only()).await;
    destroy(&*here, &id).await;
    absent(&*here, &id, "after it was destroyed").await;
    absent(&*there, &id, "after it was destroyed").await;
    assert_eq!(read(&mut view).await, None, "a reader that was there before still reads it");
    let (opened, seen) = open_read(&*there, &id, env.patient()).await;
    assert_eq!(seen, None, "an exclusive opening found it");
    close(opened).await;
    let (opened, seen) = open_read(&*there, &id, env.patient().expecting(Expect::Any)).await;
    assert_eq!(seen, None, "an exclusive opening that expects nothing found it");
    close(opened).await;
    if let Some(ids) = listing(&*here, 10).await {
        assert!(ids.is_empty(), "it is still listed");
    }
}

async fn destroy_returns_what_it_removed(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "without a lock").await;
    let removed = destroy(&*handler, &id).await;
    assert_eq!(removed.as_deref(), Some(&b"without a lock"[..]), "it removed {}", shown(removed.as_deref()));
    let id = session(&env, &*handler, "old").await;
    let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
    written(&mut opened, "under the lock").await;
    let removed = opened.destroy().await.map(|removed| removed.map(|Record { data, .. }| data));
    assert_eq!(
        removed.ok().flatten().as_deref(),
        Some(&b"under the lock"[..]),
        "the holder's destroy did not say what it removed"
    );
    close(opened).await;
}

async fn destroying_the_absent_succeeds(env: Env) {
    let handler = env.handler().await;
    let id = new_id();
    assert_eq!(destroy(&*handler, &id).await, None, "a destroy of an id that never was removed something");
    let id = session(&env, &*handler, "doomed").await;
    destroy(&*handler, &id).await;
    assert_eq!(destroy(&*handler, &id).await, None, "a second destroy removed something");
    let mut opened = open(&*handler, &id, env.patient()).await;
    let saved = opened.save(&Change::Destroy, wid()).await;
    assert!(saved.is_ok(), "saving a destruction of what is absent said {saved:?}");
}

async fn destroy_never_waits(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "doomed").await;
    let held = open(&*here, &id, env.patient()).await;
    let started = Instant::now();
    let removed = destroy(&*there, &id).await;
    assert!(started.elapsed() < SOON, "a destroy beside a holder took {:?}", started.elapsed());
    assert_eq!(removed.as_deref(), Some(&b"doomed"[..]));
    absent(&*there, &id, "after it was destroyed under its holder").await;
    close(held).await;
}

async fn a_destroyed_session_can_be_created_again(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "first").await;
    for again in ["second", "third"] {
        destroy(&*handler, &id).await;
        let (opened, seen) = open_read(&*handler, &id, env.patient().expecting(Expect::Any)).await;
        assert_eq!(seen, None);
        if !recreated(&env, opened, again).await {
            return absent(&*handler, &id, "after it could not be created again").await;
        }
        holds(&*handler, &id, again, "after it was created again").await;
        let (opened, seen) = open_read(&*handler, &id, env.patient()).await;
        assert_eq!(seen.as_deref(), Some(again.as_bytes()));
        close(opened).await;
    }
}

async fn holder_destroys_and_the_next_gets_in(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "doomed").await;
    let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
    let destroyed = opened.destroy().await;
    assert!(destroyed.is_ok(), "the holder's destroy said {destroyed:?}");
    let closed = opened.close().await;
    assert!(closed.is_ok(), "closing after a destroy said {closed:?}");
    let (next, seen) = open_read(&*handler, &id, env.at_once().expecting(Expect::Any)).await;
    assert_eq!(seen, None, "the next opener found what was destroyed");
    if recreated(&env, next, "new").await {
        drop(opened);
        holds(&*handler, &id, "new", "after somebody else created it again").await;
    }
}

async fn a_refused_write_gives_the_lock_back(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "doomed").await;
    let (mut held, _) = open_read(&*here, &id, env.patient()).await;
    destroy(&*there, &id).await;
    refused(write(&mut held, "late").await, &[ErrorKind::Gone], "a write to what was destroyed");
    let next = open(&*there, &id, env.at_once().expecting(Expect::Any)).await;
    let created = recreated(&env, next, "new").await;
    let again = write(&mut held, "later still").await;
    assert!(again.is_err(), "a spent opening wrote: {again:?}");
    close(held).await;
    let seen = look(&*here, &id).await;
    let expected = created.then_some(&b"new"[..]);
    assert!(seen.as_deref() == expected, "after a spent opening was used again the session has {}", shown(seen.as_deref()));
}

async fn touch_leaves_the_bytes_alone(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "bytes").await;
    let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
    applied(opened.touch(Ttl::from_secs(500)).await, "a touch by the holder");
    holds(&*handler, &id, "bytes", "after a touch").await;
    written(&mut opened, "new bytes").await;
    applied(opened.touch(Ttl::from_secs(600)).await, "a touch by the holder after its write");
    holds(&*handler, &id, "new bytes", "after a write and a touch").await;
    let left = look_whole(&*handler, &id).await.map_or(Duration::ZERO, |record| record.ttl.as_duration());
    assert!(left > Duration::from_secs(550) && left <= Duration::from_secs(601), "{left:?} are left of a touch of 600 s");
    written(&mut opened, "newer bytes").await;
    close(opened).await;
    holds(&*handler, &id, "newer bytes", "after a touch and a write").await;
}

async fn touch_of_the_absent_is_gone(env: Env) {
    let handler = env.handler().await;
    let id = new_id();
    for expect in [Expect::Existing, Expect::Any] {
        let (mut opened, _) = open_read(&*handler, &id, env.patient().expecting(expect)).await;
        refused(opened.touch(Ttl::from_secs(500)).await, &[ErrorKind::Gone], "a touch of an absent session");
        close(opened).await;
        absent(&*handler, &id, "after it was touched").await;
    }
    let id = session(&env, &*handler, "doomed").await;
    let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
    destroy(&*handler, &id).await;
    refused(opened.touch(Ttl::from_secs(500)).await, &[ErrorKind::Gone], "a touch of a destroyed session");
    absent(&*handler, &id, "after it was touched").await;
}

/// Saves `change` to a session with the bytes "old", and checks that the lock was given back by the save itself.
async fn save_and_check(env: &Env, change: Change, expected: Option<&str>) {
    let (here, there) = (env.handler().await, env.handler().await);
    for request in [env.patient(), env.patient().expecting(Expect::Any)] {
        let id = create(env, &*here, living("old", Duration::from_secs(300))).await;
        let (mut opened, _) = open_read(&*here, &id, request).await;
        applied(opened.save(&change, wid()).await, "a save that nothing stood against");
        let (next, seen) = open_read(&*there, &id, env.at_once().expecting(Expect::Any)).await;
        let expected = expected.map(str::as_bytes);
        assert!(
            seen.as_deref() == expected,
            "after the save the next read {}, not {}",
            shown(seen.as_deref()),
            shown(expected)
        );
        let closed = opened.close().await;
        assert!(closed.is_ok(), "closing after a save said {closed:?}");
        drop(opened);
        let third = here.open(&id, &env.at_once().expecting(Expect::Any)).await;
        refused(third, &[ErrorKind::LockTimeout], "an open after a saved opening was closed again");
        if let Change::Touch(ttl) = change {
            let left = look_whole(&*here, &id).await.map_or(Duration::ZERO, |record| record.ttl.as_duration());
            assert!(left + Duration::from_secs(60) > ttl.as_duration(), "{left:?} are left of a touch of {ttl:?}");
        }
        close(next).await;
    }
}

async fn save_writes_and_closes(env: Env) {
    save_and_check(&env, Change::Write(record("new")), Some("new")).await;
}

async fn save_touches_and_closes(env: Env) {
    save_and_check(&env, Change::Touch(Ttl::from_secs(700)), Some("old")).await;
}

async fn save_destroys_and_closes(env: Env) {
    save_and_check(&env, Change::Destroy, None).await;
}

async fn save_of_nothing_closes(env: Env) {
    save_and_check(&env, Change::Nothing, Some("old")).await;
}

async fn a_refused_save_closes(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    for change in [Change::Write(record("late")), Change::Touch(Ttl::from_secs(700))] {
        let id = session(&env, &*here, "doomed").await;
        let (mut held, _) = open_read(&*here, &id, env.patient()).await;
        destroy(&*there, &id).await;
        refused(held.save(&change, wid()).await, &[ErrorKind::Gone], "a save to what was destroyed");
        let next = open(&*there, &id, env.at_once().expecting(Expect::Any)).await;
        let created = recreated(&env, next, "new").await;
        let again = held.close().await;
        assert!(again.is_ok(), "closing after a refused save said {again:?}");
        if created {
            holds(&*here, &id, "new", "after somebody else created it again").await;
        }
    }
}
