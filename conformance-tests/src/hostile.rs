//! The suite of bad intentions: what strangers send, what must never be shown, and what must not become of it.

use std::time::Duration;

use session_core::{Change, ErrorKind, Expect, OpenRequest, SessionId, Ttl, Written};

use crate::case::suite;
use crate::harness::Env;
use crate::steps::*;

suite! { $
    /// Claims that ids and payloads of strangers do no harm, and that secrets are not shown.
    hostile as hostile_suite {
        errors_show_no_secrets: "No error shows an id or a payload, in any of its forms.";
        debug_shows_no_secrets: "Debug shows neither ids nor payloads, of handlers, openings, leases and locks.";
        bytes_of_any_protocol_come_back: "Payloads that look like the words of a protocol are payloads.";
        unknown_ids_leave_nothing: "Asking for ids that do not exist, however often, leaves nothing in the store.";
        an_oversized_write_leaves_the_old_record: "A write that is too large leaves the record alone, also if it comes too late.";
        extreme_lives_and_waits_are_kept: "The longest and the shortest life, lease and wait are taken at their word.";
        a_flood_of_ids_does_not_mix: "Hundreds of sessions beside each other keep what is theirs.";
        ids_that_look_like_paths_are_ids: "Ids that look like names of something else are ids.";
    }
}

/// A payload that nobody would show by chance.
const SECRET: &str = "cHJpdmF0ZSBjYXJ0";

/// Fails the case if `text` shows the id or the payload.
fn shows_nothing(text: &str, id: &SessionId, what: &str) {
    let lower = text.to_ascii_lowercase();
    assert!(!lower.contains(&id.as_str().to_ascii_lowercase()), "{what} shows the id");
    assert!(!lower.contains(&SECRET.to_ascii_lowercase()), "{what} shows the payload");
    let bytes = format!("{:?}", SECRET.as_bytes());
    let hex: String = SECRET.bytes().map(|byte| format!("{byte:02x}")).collect();
    assert!(
        !text.contains(bytes.trim_matches(['[', ']'])) && !lower.contains(&hex),
        "{what} shows the bytes of the payload"
    );
}

async fn errors_show_no_secrets(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, SECRET).await;
    let mut errors = Vec::new();
    let (mut held, _) = open_read(&*here, &id, env.patient()).await;
    errors.extend(there.open(&id, &env.at_once()).await.err());
    let wait = OpenRequest::exclusive(env.tick() / 2, env.lease());
    errors.extend(there.open(&id, &wait).await.err());
    let mut fresh = open(&*there, &id, env.patient().expecting(Expect::Fresh)).await;
    errors.extend(write(&mut fresh, SECRET).await.err());
    let mut view = open(&*there, &id, OpenRequest::read_only()).await;
    errors.extend(write(&mut view, SECRET).await.err());
    destroy(&*there, &id).await;
    errors.extend(held.save(&Change::Write(record(SECRET)), wid()).await.err());
    let mut none = open(&*there, &id, env.patient()).await;
    errors.extend(none.touch(Ttl::new(LONG)).await.err());
    assert!(errors.len() >= 6, "only {} of six attempts were refused", errors.len());
    for error in &errors {
        let mut text = format!("{error} {error:?} {error:#?}");
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text.push_str(&format!(" {cause} {cause:?}"));
            source = cause.source();
        }
        shows_nothing(&text, &id, &format!("an error of the kind {}", error.kind()));
    }
}

async fn debug_shows_no_secrets(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, SECRET).await;
    for request in [env.patient(), OpenRequest::read_only(), OpenRequest::destroy(), env.patient().expecting(Expect::Fresh)]
    {
        let mut opened = open(&*handler, &id, request).await;
        shows_nothing(&format!("{opened:?} {opened:#?}"), &id, "a new opening");
        if let Ok(read) = opened.read().await {
            shows_nothing(&format!("{read:?}"), &id, "a record");
        }
        shows_nothing(&format!("{opened:?} {opened:#?}"), &id, "an opening that was read");
        let _ = write(&mut opened, SECRET).await;
        shows_nothing(&format!("{opened:?} {opened:#?}"), &id, "an opening that was written");
        if let Some(held) = opened.held() {
            shows_nothing(&format!("{held:?} {held:#?}"), &id, "a lease and its lock");
        }
        shows_nothing(&format!("{handler:?} {handler:#?}"), &id, "the handler");
        close(opened).await;
    }
}

async fn bytes_of_any_protocol_come_back(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "old").await;
    let payloads: [&[u8]; 14] = [
        b"END\r\n",
        b"VALUE k 0 5\r\nhello\r\nEND\r\n",
        b"\r\nset k 0 0 1\r\nx\r\n",
        b"HD\r\nmn\r\nMN\r\n",
        b"*1\r\n$8\r\nFLUSHALL\r\n",
        b"$-1\r\n+OK\r\n-ERR no\r\n",
        b"'; DROP TABLE sessions; --",
        b"\\x00\\'\"%_$1 ?1 :name",
        b"%00%0a%s%n",
        b"null",
        b"a|s:1:\"b\";",
        b"\x1f\x8b\x08\x00\x00",
        b"\xef\xbb\xbf\xff\xfe\x00\xd8",
        b"../../../etc/passwd\0.txt",
    ];
    for payload in payloads {
        let (opened, _) = open_read(&*handler, &id, env.patient()).await;
        saved(opened, payload).await;
        holds(&*handler, &id, payload, "after a payload that looks like something else").await;
    }
}

async fn unknown_ids_leave_nothing(env: Env) {
    let handler = env.handler().await;
    let kept = session(&env, &*handler, "kept").await;
    for _ in 0..60 {
        let id = new_id();
        for request in [env.patient(), OpenRequest::read_only()] {
            let (opened, seen) = open_read(&*handler, &id, request).await;
            assert_eq!(seen, None, "an id that nobody made was there");
            close(opened).await;
        }
        let (mut opened, _) = open_read(&*handler, &id, env.patient()).await;
        let made = write(&mut opened, "made").await;
        assert!(made.is_err(), "an id that a stranger made up was created");
        close(opened).await;
    }
    if let Some(ids) = listing(&*handler, 25).await {
        assert_eq!(ids.len(), 1, "the store lists {} sessions and one was made", ids.len());
    }
    if let Some(admin) = handler.admin() {
        let locks = admin.locks(up_to(1000)).await.unwrap_or_else(|error| panic!("listing locks failed: {error:?}"));
        assert!(locks.is_empty(), "{} locks are held and nobody holds any", locks.len());
    }
    let freed = handler.gc(up_to(1000)).await.unwrap_or_else(|error| panic!("collecting failed: {error:?}"));
    assert_eq!(freed, 0, "{freed} expired records were collected and none was made");
    holds(&*handler, &kept, "kept", "after strangers asked for other ids").await;
}

async fn an_oversized_write_leaves_the_old_record(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let large = || record(vec![b'L'; 2 << 20]);
    let id = session(&env, &*here, "old").await;
    let (mut opened, _) = open_read(&*here, &id, env.patient()).await;
    match opened.write(&large(), wid()).await {
        Ok(Written::Applied) => written(&mut opened, "old").await,
        Err(error) if error.kind() == ErrorKind::TooLarge => {
            holds(&*here, &id, "old", "after a write that was too large").await
        }
        other => panic!("a write of 2 MiB ended as {other:?}"),
    }
    close(opened).await;
    let (mut late, _) = open_read(&*here, &id, env.briefly()).await;
    let Some(successor) = env.overtake(&*there, &id, env.is_endless(&late), Expect::Existing).await else {
        saved(late, "still in").await;
        return holds(&*here, &id, "still in", "after its only holder saved").await;
    };
    saved(successor, "successor").await;
    let outcome = late.write(&large(), wid()).await;
    refused(outcome, &[ErrorKind::Fenced, ErrorKind::TooLarge], "a large write that came too late");
    holds(&*here, &id, "successor", "after a large write that came too late").await;
}

async fn extreme_lives_and_waits_are_kept(env: Env) {
    let handler = env.handler().await;
    let day = Duration::from_secs(24 * 3600);
    for days in [1, 31, 400, 3650] {
        let id = create(&env, &*handler, living("long", day * days)).await;
        let left = look_whole(&*handler, &id).await.map(|record| record.ttl.as_duration()).unwrap_or_default();
        let off = left.abs_diff(day * days);
        assert!(off < Duration::from_secs(60), "{left:?} are left of a life of {days} days");
    }
    let id = create(&env, &*handler, living("short", Duration::from_millis(1))).await;
    tokio::time::sleep(Duration::from_millis(1) + env.rounding()).await;
    absent(&*handler, &id, "after the shortest life").await;
    let id = session(&env, &*handler, "old").await;
    for wait in [day, Duration::MAX] {
        let request = OpenRequest::exclusive(wait, env.lease());
        match tokio::time::timeout(SOON, handler.open(&id, &request)).await {
            Ok(Ok(opened)) => close(opened).await,
            Ok(Err(error)) => panic!("a free lock with a wait of {wait:?} was refused: {error:?}"),
            Err(_) => panic!("a free lock with a wait of {wait:?} was waited for"),
        }
    }
    let (opened, _) = open_read(&*handler, &id, OpenRequest::exclusive(Duration::ZERO, day)).await;
    refused(handler.open(&id, &env.at_once()).await, &[ErrorKind::LockTimeout], "an open beside a lease of a day");
    saved(opened, "new").await;
    holds(&*handler, &id, "new", "after a lease of a day").await;
}

async fn a_flood_of_ids_does_not_mix(env: Env) {
    let handlers = [env.handler().await, env.handler().await];
    let mut ids = Vec::new();
    for n in 0..300 {
        ids.push(session(&env, &*handlers[n % 2], n.to_string()).await);
    }
    for (n, id) in ids.iter().enumerate().filter(|(n, _)| n % 3 == 0) {
        assert_eq!(
            destroy(&*handlers[n % 2], id).await,
            Some(n.to_string().into_bytes()),
            "a destroy removed something else"
        );
    }
    for (n, id) in ids.iter().enumerate() {
        if n % 3 == 0 {
            absent(&*handlers[n % 2], id, "after a third was destroyed").await;
        } else {
            holds(&*handlers[(n + 1) % 2], id, n.to_string(), "after a third was destroyed").await;
        }
    }
}

async fn ids_that_look_like_paths_are_ids(env: Env) {
    let handler = env.handler().await;
    let texts = [
        "----------------------",
        "-rf-------------------",
        "--help----------------",
        ",,,,,,,,,,,,,,,,,,,,,,",
        "con-------------------",
        "NULL------------------",
        "0000000000000000000000",
        "1-OR-1-1--------------",
        "session-lock-session-lock",
        "sess,sess,sess,sess,sess",
    ];
    let ids: Vec<_> = texts.iter().map(|text| SessionId::parse(text).expect("it is accepted")).collect();
    for (n, id) in ids.iter().enumerate() {
        let opened = open(&*handler, id, env.patient().expecting(Expect::Any)).await;
        saved(opened, n.to_string()).await;
    }
    for (n, id) in ids.iter().enumerate() {
        holds(&*handler, id, n.to_string(), "beside others that look like something else").await;
        assert!(destroy(&*handler, id).await.is_some());
        absent(&*handler, id, "after it was destroyed").await;
    }
    if let Some(ids) = listing(&*handler, 3).await {
        assert!(ids.is_empty(), "{} sessions are listed and all were destroyed", ids.len());
    }
}
