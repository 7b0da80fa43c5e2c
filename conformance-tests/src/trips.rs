//! The suite of round trips: a lock that comes with the read and goes with the write costs no flight of its own.
//!
//! The cases count at a proxy between the handler and its server. What a first use may need besides, such as a connection, is not
//! counted. Nothing here knows what a flight consists of.

use std::time::Duration;

use session_core::{Expect, OpenRequest, SessionHandler};

use crate::case::suite;
use crate::harness::Env;
use crate::proxy::Proxy;
use crate::steps::*;

suite! { $
    /// Claims how many round trips each use of a session costs; the harness has to [name its server](crate::Harness::server).
    trips as trips_suite {
        open_is_one_flight: "An exclusive open in whose way nobody stands takes the lock and reads the record in one flight.";
        save_and_close_is_one_flight: "A save writes the record and gives the lock back in one flight.";
        a_view_is_one_flight: "An open to read only, its read and its close are one flight together.";
        a_fresh_id_is_one_flight: "An id that was just made is opened without a flight, and stored and closed in one.";
        a_logout_is_one_flight: "An open to destroy makes no flight; the destroy and its close are one together.";
    }
}

/// Counts the flights of one step.
async fn flights<T>(proxy: &Proxy, step: impl Future<Output = T>) -> (T, u64) {
    let before = proxy.round_trips();
    let outcome = step.await;
    (outcome, proxy.round_trips() - before)
}

/// For how long nothing may pass before the counting begins; a handler may make connections in the background.
const SILENCE: Duration = Duration::from_millis(100);

/// Does everything that a case counts before it counts: the first time may need a connection, or tell the server a script or a
/// statement. Once more after what that began in the background is over, which may have left another connection to be used next.
async fn warm_up(env: &Env, proxy: &Proxy, handler: &dyn SessionHandler) {
    use_all(env, handler).await;
    assert!(proxy.silence(SILENCE, 100 * SILENCE).await, "a handler that nobody uses goes on talking to its server");
    use_all(env, handler).await;
}

async fn use_all(env: &Env, handler: &dyn SessionHandler) {
    let id = session(env, handler, "first").await;
    let (opened, _) = open_read(handler, &id, env.patient()).await;
    saved(opened, "second").await;
    look(handler, &id).await;
    destroy(handler, &id).await;
}

async fn open_is_one_flight(env: Env) {
    let (proxy, handler) = env.counted().await;
    warm_up(&env, &proxy, &*handler).await;
    let id = session(&env, &*handler, "there").await;
    let ((opened, data), count) = flights(&proxy, open_read(&*handler, &id, env.patient())).await;
    assert_eq!(data.as_deref(), Some(&b"there"[..]), "what was read");
    assert_eq!(count, 1, "flights of an open and its read");
    close(opened).await;
}

async fn save_and_close_is_one_flight(env: Env) {
    let (proxy, handler) = env.counted().await;
    warm_up(&env, &proxy, &*handler).await;
    let id = session(&env, &*handler, "old").await;
    let (opened, _) = open_read(&*handler, &id, env.patient()).await;
    let ((), count) = flights(&proxy, saved(opened, "new")).await;
    assert_eq!(count, 1, "flights of a save");
    let (next, data) = open_read(&*handler, &id, env.at_once()).await;
    assert_eq!(data.as_deref(), Some(&b"new"[..]), "what was saved");
    close(next).await;
}

async fn a_view_is_one_flight(env: Env) {
    let (proxy, handler) = env.counted().await;
    warm_up(&env, &proxy, &*handler).await;
    let id = session(&env, &*handler, "there").await;
    let (data, count) = flights(&proxy, look(&*handler, &id)).await;
    assert_eq!(data.as_deref(), Some(&b"there"[..]), "what was read");
    assert_eq!(count, 1, "flights of a view");
}

async fn a_fresh_id_is_one_flight(env: Env) {
    let (proxy, handler) = env.counted().await;
    warm_up(&env, &proxy, &*handler).await;
    let id = new_id();
    let (opened, count) = flights(&proxy, open(&*handler, &id, env.patient().expecting(Expect::Fresh))).await;
    assert_eq!(count, 0, "flights of opening a fresh id");
    let ((), count) = flights(&proxy, saved(opened, "new")).await;
    assert_eq!(count, 1, "flights of its save");
    holds(&*handler, &id, "new", "after its first save").await;
}

async fn a_logout_is_one_flight(env: Env) {
    let (proxy, handler) = env.counted().await;
    warm_up(&env, &proxy, &*handler).await;
    let id = session(&env, &*handler, "there").await;
    let (mut opened, count) = flights(&proxy, open(&*handler, &id, OpenRequest::destroy())).await;
    assert_eq!(count, 0, "flights of an open to destroy");
    let leaving = async {
        let removed = opened.destroy().await.unwrap_or_else(|error| panic!("a destroy was refused: {error:?}"));
        close(opened).await;
        removed
    };
    let (removed, count) = flights(&proxy, leaving).await;
    assert_eq!(removed.map(|record| record.data).as_deref(), Some(&b"there"[..]), "what was removed");
    assert_eq!(count, 1, "flights of a destroy and its close");
    absent(&*handler, &id, "after a destroy").await;
}
