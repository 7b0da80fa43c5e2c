//! Holders and waiters: who is stopped, who is killed, who is named, who is next, and what waiting costs.

use std::fs;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use session_core::{Change, ErrorKind, LeaseRequest, OpenRequest, OpenSession, SessionHandler, SessionId, SessionLock};
use session_file::{Durability, FileConfig, FileHandler, Io};

use crate::child::{Worker, say, wait_for_parent};
use crate::{LEASE, Store, at_once, create, new_id, open, patient, put, record, view, wid};

fn of_place(place: &str) -> (FileHandler, SessionId) {
    let (dir, id) = place.split_once('|').unwrap();
    let config = FileConfig::new(dir).with_durability(Durability::None);
    (FileHandler::open_dir(config).unwrap(), SessionId::parse(id).unwrap())
}

fn place(store: &Store, id: &SessionId) -> String {
    format!("{}|{}", store.path().display(), id.as_str())
}

/// Runs in a child: holds the session until it is told to save.
pub(crate) fn hold(place: &str) {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (handler, id) = of_place(place);
        let mut session = open(&handler, &id, patient()).await;
        say("held");
        wait_for_parent();
        let saved = session.save(&Change::Write(record("from the child")), wid()).await;
        say(&format!("{saved:?}"));
    });
}

/// Runs in a child: stands in line.
pub(crate) fn wait(place: &str) {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (handler, id) = of_place(place);
        say("waiting");
        let session = open(&handler, &id, patient()).await;
        say("in");
        wait_for_parent();
        drop(session);
    });
}

fn brief_wait() -> OpenRequest {
    OpenRequest::exclusive(Duration::from_millis(120), LEASE)
}

#[tokio::test]
async fn a_stopped_holder_keeps_its_lock_and_its_save_is_applied() {
    let store = Store::new();
    let id = create(&store.handler, record("old")).await;
    let started = SystemTime::now() - Duration::from_millis(1);
    let mut child = Worker::start("hold", &place(&store, &id));
    assert_eq!(child.line().as_deref(), Some("held"));
    let held_before = SystemTime::now();
    child.stop();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let error = store.handler.open(&id, &brief_wait()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout);
    let holder = error.holder().expect("the kernel knows who holds a lock");
    assert_eq!(holder.process, format!("pid {}", child.pid()));
    assert!(holder.since <= held_before && holder.since >= started, "{error}");
    let locks = store.handler.admin().unwrap().locks(NonZeroU32::MAX).await.unwrap();
    assert_eq!(locks[0].holder, Some(holder.clone()), "the listing of locks says the same");
    assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"old"[..]));
    child.signal(Signal::SIGCONT);
    child.go_on();
    assert_eq!(child.line().as_deref(), Some("Ok(Applied)"));
    assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"from the child"[..]));
}

#[tokio::test]
async fn a_holder_is_named_while_others_lock_and_unlock_without_end() {
    let store = Store::new();
    let id = create(&store.handler, record("old")).await;
    let held = open(&store.handler, &id, patient()).await;
    let over = Arc::new(AtomicBool::new(false));
    let others = [(); 2].map(|()| {
        let over = Arc::clone(&over);
        std::thread::spawn(move || {
            let files: Vec<_> = (0..400).map(|_| tempfile::tempfile().unwrap()).collect();
            while !over.load(Ordering::Relaxed) {
                files.iter().for_each(|file| file.lock().unwrap());
                files.iter().for_each(|file| file.unlock().unwrap());
            }
        })
    });
    let mut unnamed = 0;
    for _ in 0..300 {
        let error = store.handler.open(&id, &at_once()).await.unwrap_err();
        unnamed += usize::from(error.holder().is_none());
    }
    over.store(true, Ordering::Relaxed);
    others.into_iter().for_each(|thread| thread.join().unwrap());
    drop(held);
    assert_eq!(unnamed, 0, "of 300 answers");
}

#[tokio::test]
async fn a_killed_holder_lets_the_waiter_in() {
    let store = Store::new();
    for _ in 0..20 {
        let id = create(&store.handler, record("old")).await;
        let mut child = Worker::start("hold", &place(&store, &id));
        assert_eq!(child.line().as_deref(), Some("held"));
        let waiter = {
            let (handler, id) = (store.again(), id.clone());
            tokio::spawn(async move { put(&handler, &id, "next").await })
        };
        tokio::time::sleep(Duration::from_millis(5)).await;
        child.kill();
        waiter.await.unwrap();
        assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"next"[..]));
    }
}

#[tokio::test]
async fn a_stopped_waiter_at_the_head_of_the_line_keeps_nobody_out() {
    let store = Store::new();
    let id = create(&store.handler, record("old")).await;
    let mut holder = open(&store.handler, &id, patient()).await;
    let mut child = Worker::start("wait", &place(&store, &id));
    assert_eq!(child.line().as_deref(), Some("waiting"));
    let admin = store.handler.admin().unwrap();
    // Once it stands in line, and not before, it is stopped.
    while admin.locks(std::num::NonZeroU32::MAX).await.unwrap()[0].waiting != Some(1) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    child.stop();
    let behind = {
        let (handler, id) = (store.again(), id.clone());
        tokio::spawn(async move { put(&handler, &id, "behind").await })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    holder.close().await.unwrap();
    behind.await.unwrap();
    put(&store.handler, &id, "later").await;
    child.signal(Signal::SIGCONT);
    assert_eq!(child.line().as_deref(), Some("in"));
}

#[tokio::test]
async fn waiters_are_served_in_the_order_of_their_coming() {
    let store = Store::new();
    let id = create(&store.handler, record("")).await;
    let mut holder = open(&store.handler, &id, patient()).await;
    let admin = store.handler.admin().unwrap();
    let mut waiters = Vec::new();
    for name in b'a'..=b'p' {
        let (handler, id) = (store.again(), id.clone());
        waiters.push(tokio::spawn(async move {
            let mut session = open(&handler, &id, patient()).await;
            let mut order = session.read().await.unwrap().unwrap().data;
            order.push(name);
            session.save(&Change::Write(record(order)), wid()).await.unwrap();
        }));
        while admin.locks(std::num::NonZeroU32::MAX).await.unwrap()[0].waiting != Some(waiters.len() as u64) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    holder.close().await.unwrap();
    for waiter in waiters {
        waiter.await.unwrap();
    }
    assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"abcdefghijklmnop"[..]));
}

#[tokio::test]
async fn a_newcomer_does_not_pass_those_who_stand_in_line() {
    let store = Store::new();
    let id = create(&store.handler, record("")).await;
    let mut holder = open(&store.handler, &id, patient()).await;
    let waiter = {
        let (handler, id) = (store.again(), id.clone());
        tokio::spawn(async move { put(&handler, &id, "waiter").await })
    };
    let admin = store.handler.admin().unwrap();
    while admin.locks(std::num::NonZeroU32::MAX).await.unwrap()[0].waiting != Some(1) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // On this runtime of one thread the waiter has had no chance to run when the holder comes again.
    holder.close().await.unwrap();
    let mut again = open(&store.handler, &id, patient()).await;
    assert_eq!(again.read().await.unwrap().unwrap().data, b"waiter");
    waiter.await.unwrap();
}

#[test]
fn many_waiters_and_few_threads_for_files_get_through() {
    let store = Store::with(|config| config.with_durability(Durability::Data).with_io(Io::Pool));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let id = create(&store.handler, record("0")).await;
        let mut tasks = Vec::new();
        for _ in 0..30 {
            let (handler, id) = (store.handler.clone(), id.clone());
            tasks.push(tokio::spawn(async move {
                let mut session = open(&handler, &id, patient()).await;
                let count: u64 = String::from_utf8(session.read().await.unwrap().unwrap().data).unwrap().parse().unwrap();
                session.save(&Change::Write(record((count + 1).to_string())), wid()).await.unwrap();
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"30"[..]));
    });
}

#[test]
fn a_handler_wakes_its_waiters_in_a_second_runtime_after_the_first_has_ended() {
    let store = Store::new();
    for _ in 0..3 {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let id = create(&store.handler, record("old")).await;
            let mut holder = open(&store.handler, &id, patient()).await;
            let (handler, waiting) = (store.handler.clone(), id.clone());
            let waiter = tokio::spawn(async move { put(&handler, &waiting, "new").await });
            tokio::time::sleep(Duration::from_millis(20)).await;
            holder.close().await.unwrap();
            waiter.await.unwrap();
            assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"new"[..]));
        });
        runtime.shutdown_background();
    }
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Runs in a child, where nobody else opens files.
pub(crate) fn count_descriptors(dir: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let handler = FileHandler::open_dir(FileConfig::new(dir).with_durability(Durability::Data)).unwrap();
        let id = create(&handler, record("old")).await;
        // The descriptor by which a task is told what the disk has is opened by the first save that is alone, and kept; the one that
        // watches, by the first who waits.
        open(&handler, &id, patient()).await.save(&Change::Write(record("old")), wid()).await.unwrap();
        let mut holder = open(&handler, &id, patient()).await;
        assert!(handler.open(&id, &brief_wait()).await.is_err());
        let before = descriptors();
        for round in 0..100u64 {
            let waiting = tokio::time::timeout(Duration::from_micros(round * 60), handler.open(&id, &patient())).await;
            assert!(waiting.is_err(), "the holder was passed");
        }
        holder.close().await.unwrap();
        for round in 0..100u64 {
            let session = handler.open(&id, &patient()).await.unwrap();
            match round % 4 {
                0 => drop(session),
                1 => drop(tokio::time::timeout(Duration::from_micros(round), unread(session)).await),
                2 => drop(session.held().cloned()),
                _ => {
                    let fresh = handler.open(&new_id(), &patient().expecting(session_core::Expect::Any)).await.unwrap();
                    drop((session, fresh));
                }
            }
        }
        // A call that a dropped save left on the pool may still be at its end.
        let mut after = descriptors();
        for _ in 0..200 {
            if after < before {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            after = descriptors();
        }
        assert_eq!(after, before - 1, "only the holder's file was open");
        let mut next = open(&handler, &id, at_once()).await;
        next.close().await.unwrap();
    });
    say("counted");
}

/// A save that is given up at some point.
async fn unread(mut session: Box<dyn OpenSession>) {
    session.save(&Change::Write(record("new")), wid()).await.unwrap();
}

#[test]
fn dropped_openings_leave_neither_a_descriptor_nor_a_lock_nor_a_file() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("sessions");
    let mut child = Worker::start("count descriptors", dir.to_str().unwrap());
    assert_eq!(child.line().as_deref(), Some("counted"));
    assert_eq!(crate::names(&dir).len(), 1, "an opening that wrote nothing left a file");
}

/// Runs in a child, where nobody else starts threads.
pub(crate) fn count_threads(dir: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let handler = FileHandler::open_dir(FileConfig::new(dir).with_durability(Durability::None)).unwrap();
        let id = create(&handler, record("old")).await;
        let mut holder = open(&handler, &id, patient()).await;
        let before = fs::read_dir("/proc/self/task").unwrap().count();
        let waiters: Vec<_> = (0..300)
            .map(|_| {
                let (handler, id) = (handler.clone(), id.clone());
                tokio::spawn(async move { put(&handler, &id, "new").await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(fs::read_dir("/proc/self/task").unwrap().count(), before, "waiting costs threads");
        holder.close().await.unwrap();
        for waiter in waiters {
            waiter.await.unwrap();
        }
    });
    say("counted");
}

#[test]
fn waiting_costs_no_thread() {
    let root = tempfile::tempdir().unwrap();
    let mut child = Worker::start("count threads", root.path().join("sessions").to_str().unwrap());
    assert_eq!(child.line().as_deref(), Some("counted"));
}

#[tokio::test]
async fn a_renewal_keeps_the_record_alive_and_signs_the_lock() {
    let store = Store::new();
    let id = create(&store.handler, record("old")).await;
    let mut session = open(&store.handler, &id, patient()).await;
    session.write(&session_core::Record::new("brief", session_core::Ttl::from_secs(1)), wid()).await.unwrap();
    let last = session.read().await.unwrap().unwrap();
    assert!(last.ttl.as_millis() <= 1000);
    let held = session.held().unwrap().clone();
    held.lock.renew(std::slice::from_ref(&held.lease)).await.remove(0).unwrap();
    let longer = session.read().await.unwrap().unwrap();
    assert_eq!(longer.data, b"brief");
    assert!(longer.ttl.as_duration() > LEASE, "less than two leases are left");
    session.close().await.unwrap();
    let over = held.lock.renew(std::slice::from_ref(&held.lease)).await.remove(0);
    assert_eq!(over.unwrap_err().kind(), ErrorKind::Gone);
}

#[tokio::test]
async fn locks_of_their_own_leave_no_file_and_tell_a_vanished_holder_from_a_release() {
    let store = Store::new();
    let lock = store.handler.lock();
    let id = create(&store.handler, record("beside")).await;
    let request = LeaseRequest { wait: Duration::ZERO, lease: LEASE };
    let lease = lock.acquire(&id, &request).await.unwrap();
    assert!(lease.follows_clean_release());
    // The lock and the handler on the same directory do not contend.
    put(&store.handler, &id, "not locked").await;
    lock.release(&lease).await.unwrap();
    assert!(crate::names(&store.path().join("~locks")).is_empty());
    drop(lock.acquire(&id, &request).await.unwrap());
    let after = lock.acquire(&id, &request).await.unwrap();
    assert!(!after.follows_clean_release(), "the holder before gave nothing back");
    lock.release(&after).await.unwrap();
    assert!(lock.acquire(&id, &request).await.unwrap().follows_clean_release());
}
