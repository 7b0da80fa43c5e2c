//! The suite of administration: listing sessions, seeing locks, breaking one.

use std::collections::HashSet;
use std::sync::Arc;

use session_core::{ErrorKind, Expect, OpenRequest, SessionAdmin, SessionHandler, SessionId};

use crate::case::suite;
use crate::harness::Env;
use crate::steps::*;

suite! { $
    /// Claims that [`SessionHandler::admin`](session_core::SessionHandler::admin) lists what is there and can break a lock.
    admin as admin_suite {
        list_shows_the_living_only: "Live sessions are listed, with their length and what is left of their life; destroyed, expired and merely locked ones are not.";
        list_reaches_everything_in_small_pages: "A listing in small pages shows every session that was there throughout, and ends.";
        locks_shows_who_holds: "Held locks are listed, ended ones are not.";
        unlock_lets_the_next_in_and_fences_the_holder: "Breaking a lock lets the next one in, and the holder that was broken is refused, unless only its death can free it.";
        unlock_of_the_free_says_no: "Breaking a lock that nobody holds changes nothing and says so.";
    }
}

fn admin(handler: &Arc<dyn SessionHandler>) -> &dyn SessionAdmin {
    handler.admin().expect("a handler that claims this suite can be administered")
}

async fn list(handler: &Arc<dyn SessionHandler>, page: u32) -> Vec<SessionId> {
    admin(handler);
    listing(&**handler, page).await.expect("a handler that claims this suite can be listed")
}

async fn list_shows_the_living_only(env: Env) {
    let handler = env.handler().await;
    let mut lengths = HashSet::new();
    for n in 1..=3 {
        session(&env, &*handler, vec![b'x'; n * 100]).await;
        lengths.insert(n as u64 * 100);
    }
    let destroyed = session(&env, &*handler, "destroyed").await;
    destroy(&*handler, &destroyed).await;
    create(&env, &*handler, living("brief", env.tick())).await;
    let locked = open(&*handler, &new_id(), env.patient().expecting(Expect::Any)).await;
    env.outlive(env.tick()).await;
    let page = admin(&handler).list(None, up_to(100)).await.unwrap_or_else(|error| panic!("listing failed: {error:?}"));
    let seen: HashSet<_> = page.sessions.iter().map(|session| session.bytes).collect();
    assert_eq!(page.sessions.len(), 3, "{} sessions are listed and three are alive", page.sessions.len());
    assert_eq!(seen, lengths, "the lengths of what is listed");
    for session in &page.sessions {
        assert!(session.left > LONG / 2 && session.left <= LONG * 2, "{:?} are left of {LONG:?}", session.left);
    }
    assert!(page.next.is_none() || list(&handler, 100).await.len() == 3, "the listing goes on after its end");
    close(locked).await;
}

async fn list_reaches_everything_in_small_pages(env: Env) {
    let handler = env.handler().await;
    let mut made = Vec::new();
    for n in 0..23 {
        made.push(session(&env, &*handler, n.to_string()).await);
    }
    for page in [1, 4, 23, 100] {
        let ids: HashSet<_> = list(&handler, page).await.into_iter().collect();
        assert_eq!(ids.len(), 23, "{} different sessions are listed in pages of {page} and 23 are alive", ids.len());
    }
    for id in made.drain(..20) {
        destroy(&*handler, &id).await;
    }
    let ids: HashSet<_> = list(&handler, 2).await.into_iter().collect();
    assert_eq!(ids.len(), 3, "{} different sessions are listed after all but three were destroyed", ids.len());
}

async fn locks_shows_who_holds(env: Env) {
    let handler = env.handler().await;
    let locks = async |when: &str| {
        let locks = admin(&handler).locks(up_to(100)).await;
        locks.unwrap_or_else(|error| panic!("listing locks {when} failed: {error:?}"))
    };
    let id = session(&env, &*handler, "held").await;
    assert!(locks("before").await.is_empty(), "a lock is listed and nobody holds one");
    let held = open(&*handler, &id, env.patient()).await;
    let seen = locks("beside a holder").await;
    assert_eq!(seen.len(), 1, "{} locks are listed and one is held", seen.len());
    assert!(seen[0].lease_left.is_none_or(|left| left <= env.lease()), "more is left of a lease than it is long");
    close(held).await;
    assert!(locks("after a close").await.is_empty(), "a lock is listed and its holder has closed");
    let held = open(&*handler, &id, env.briefly()).await;
    if !env.is_endless(&held) {
        env.outlast(env.short()).await;
        assert!(locks("after a lease").await.is_empty(), "a lock is listed whose lease has ended");
    }
    close(held).await;
}

async fn unlock_lets_the_next_in_and_fences_the_holder(env: Env) {
    let (here, there) = (env.handler().await, env.handler().await);
    let id = session(&env, &*here, "old").await;
    let (mut held, _) = open_read(&*here, &id, env.patient()).await;
    // The store's own name of the session, which behind a layer is not the live one.
    let name = list(&there, 10).await.remove(0);
    match admin(&there).unlock(&name).await {
        Ok(was_held) => {
            assert!(was_held, "breaking a held lock says that nobody held it");
            let (mut next, seen) = open_read(&*there, &id, OpenRequest::exclusive(SOON, env.lease())).await;
            assert_eq!(seen.as_deref(), Some(&b"old"[..]));
            refused(
                write(&mut held, "broken").await,
                &[ErrorKind::Fenced],
                "a write under a lock that was broken and taken",
            );
            written(&mut next, "next").await;
            close(next).await;
            holds(&*here, &id, "next", "after a lock was broken").await;
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "breaking a lock ended as {error:?}");
            refused(
                there.open(&id, &env.at_once()).await,
                &[ErrorKind::LockTimeout],
                "an open after a lock could not be broken",
            );
            saved(held, "still in").await;
            holds(&*here, &id, "still in", "after a lock could not be broken").await;
        }
    }
}

async fn unlock_of_the_free_says_no(env: Env) {
    let handler = env.handler().await;
    let id = session(&env, &*handler, "free").await;
    close(open(&*handler, &id, env.patient()).await).await;
    let name = list(&handler, 10).await.remove(0);
    for name in [&name, &new_id()] {
        match admin(&handler).unlock(name).await {
            Ok(was_held) => assert!(!was_held, "breaking a free lock says that somebody held it"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "breaking a free lock ended as {error:?}"),
        }
    }
    holds(&*handler, &id, "free", "after a free lock was broken").await;
    close(open(&*handler, &id, env.at_once()).await).await;
}
