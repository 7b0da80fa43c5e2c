//! Races: readers beside writers, collectors and logouts beside creators, waiters beside logouts.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use session_core::{Change, ErrorKind, Expect, OpenRequest, SessionHandler, Ttl, Written};

use crate::{PATIENT, Store, brief, create, destroy, new_id, open, patient, put, record, view, wid};

/// A record with a number, longer and shorter in turns.
fn numbered(number: u64) -> Vec<u8> {
    let mut data = number.to_le_bytes().to_vec();
    data.resize(2048 + (number % 3) as usize * 3000, number as u8);
    data
}

fn number_of(data: &[u8]) -> u64 {
    let number = u64::from_le_bytes(data[..8].try_into().unwrap());
    assert!(data == numbered(number), "a mixed record");
    number
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_reader_never_goes_back_beside_a_hot_writer_and_toucher() {
    let store = Store::new();
    let id = create(&store.handler, record(numbered(0))).await;
    let done = Arc::new(AtomicBool::new(false));
    let mut readers = Vec::new();
    for _ in 0..2 {
        let (handler, id, done) = (store.again(), id.clone(), Arc::clone(&done));
        readers.push(tokio::spawn(async move {
            let (mut last, mut reads) = (0, 0u64);
            while !done.load(Ordering::Relaxed) {
                let seen = number_of(&view(&handler, &id).await.unwrap().expect("the session is there"));
                assert!(seen >= last, "{seen} after {last}");
                (last, reads) = (seen, reads + 1);
                if reads.is_multiple_of(64) {
                    tokio::task::yield_now().await;
                }
            }
            reads
        }));
    }
    let mut session = open(&store.handler, &id, patient()).await;
    let started = Instant::now();
    let mut number = 0;
    while started.elapsed() < Duration::from_secs(3) {
        number += 1;
        session.write(&record(numbered(number)), wid()).await.unwrap();
        if number.is_multiple_of(2) {
            session.touch(Ttl::from_secs(3600)).await.unwrap();
            session.touch(Ttl::from_secs(3600)).await.unwrap();
        }
        // What was acknowledged is what a reader that starts now sees.
        if number.is_multiple_of(16) {
            assert_eq!(number_of(&view(&store.handler, &id).await.unwrap().unwrap()), number);
            tokio::task::yield_now().await;
        }
    }
    done.store(true, Ordering::Relaxed);
    for reader in readers {
        assert!(reader.await.unwrap() > 100, "the readers did not read");
    }
    assert!(number > 1000, "the writer did not write");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn gc_beside_a_destroy_and_a_create_keeps_the_live_one() {
    let store = Store::new();
    let (collector, remover) = (store.again(), store.again());
    let stop = Arc::new(AtomicBool::new(false));
    let collecting = {
        let stop = Arc::clone(&stop);
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                collector.gc(NonZeroU32::MAX).await.unwrap();
            }
        })
    };
    let id = new_id();
    for round in 0..3000u64 {
        let mut session = open(&store.handler, &id, patient().expecting(Expect::Any)).await;
        session.save(&Change::Write(brief("expires at once")), wid()).await.unwrap();
        let removing = {
            let (remover, id) = (remover.clone(), id.clone());
            tokio::spawn(async move { destroy(&remover, &id).await.unwrap() })
        };
        if round.is_multiple_of(2) {
            tokio::task::yield_now().await;
        }
        removing.await.unwrap();
        let mut session = open(&store.handler, &id, patient().expecting(Expect::Any)).await;
        let data = round.to_string();
        session.save(&Change::Write(record(data.clone())), wid()).await.unwrap();
        tokio::task::yield_now().await;
        assert_eq!(view(&store.handler, &id).await.unwrap(), Some(data.into_bytes()), "round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    collecting.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn waiters_on_a_destroyed_file_never_write_into_it() {
    let store = Store::new();
    for round in 0..400 {
        let id = create(&store.handler, record("old")).await;
        let mut holder = open(&store.handler, &id, patient()).await;
        let mut waiters = Vec::new();
        for expect in [Expect::Any, Expect::Existing, Expect::Any] {
            let (handler, id) = (store.again(), id.clone());
            waiters.push(tokio::spawn(async move {
                let mut session = open(&handler, &id, patient().expecting(expect)).await;
                let seen = session.read().await.unwrap().map(|record| record.data);
                assert_ne!(seen.as_deref(), Some(&b"old"[..]), "a waiter sees what was destroyed");
                let saved = session.save(&Change::Write(record("new")), wid()).await;
                match (expect, seen) {
                    (Expect::Existing, None) => assert_eq!(saved.unwrap_err().kind(), ErrorKind::Gone),
                    _ => assert_eq!(saved.unwrap(), Written::Applied),
                }
            }));
        }
        if round % 2 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if round % 4 < 2 {
            assert!(holder.destroy().await.unwrap().is_some());
        } else {
            assert_eq!(destroy(&store.handler, &id).await.unwrap().as_deref(), Some(&b"old"[..]));
        }
        drop(holder);
        for waiter in waiters {
            waiter.await.unwrap();
        }
        assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"new"[..]), "round {round}");
    }
}

#[tokio::test]
async fn a_destroyed_session_is_absent_to_everybody_while_its_holder_works() {
    let store = Store::new();
    let id = create(&store.handler, record("old")).await;
    let mut holder = open(&store.handler, &id, patient()).await;
    assert_eq!(destroy(&store.again(), &id).await.unwrap().as_deref(), Some(&b"old"[..]));
    assert_eq!(destroy(&store.again(), &id).await.unwrap(), None, "it is destroyed once");
    assert_eq!(view(&store.handler, &id).await.unwrap(), None);
    let mut existing = open(&store.again(), &id, patient()).await;
    assert_eq!(existing.read().await.unwrap(), None, "who expects it need not wait for the holder");
    let short = OpenRequest::exclusive(Duration::from_millis(30), PATIENT).expecting(Expect::Any);
    assert_eq!(store.again().open(&id, &short).await.unwrap_err().kind(), ErrorKind::LockTimeout);
    assert_eq!(holder.write(&record("late"), wid()).await.unwrap_err().kind(), ErrorKind::Gone);
    // The holder was the owner of the lock, so the file goes with his refusal.
    assert!(store.names().is_empty());
    let mut next = open(&store.handler, &id, patient().expecting(Expect::Any)).await;
    assert_eq!(next.read().await.unwrap(), None);
    next.save(&Change::Write(record("new")), wid()).await.unwrap();
    assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"new"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_a_destroy_returns_is_the_last_write_that_was_acknowledged() {
    let store = Store::new();
    let other = store.again();
    for round in 0..1500u64 {
        let id = create(&store.handler, record("0")).await;
        let mut holder = open(&store.handler, &id, patient()).await;
        let writing = tokio::spawn(async move {
            let mut last = 0;
            for number in 1..200u64 {
                match holder.write(&record(number.to_string()), wid()).await {
                    Ok(_) => last = number,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Gone);
                        return last;
                    }
                }
            }
            last
        });
        for _ in 0..round % 50 {
            std::hint::spin_loop();
        }
        let removed = destroy(&other, &id).await.unwrap().expect("it lived");
        let removed: u64 = String::from_utf8(removed).unwrap().parse().unwrap();
        let last = writing.await.unwrap();
        assert!(removed >= last, "round {round}: {last} was acknowledged, and the destroy returned {removed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn increments_of_many_handlers_are_all_kept() {
    let store = Store::new();
    let id = create(&store.handler, record("0")).await;
    let mut tasks = Vec::new();
    for _ in 0..6 {
        let (handler, id) = (store.again(), id.clone());
        tasks.push(tokio::spawn(async move {
            for _ in 0..150 {
                let mut session = open(&handler, &id, patient()).await;
                let count: u64 = String::from_utf8(session.read().await.unwrap().unwrap().data).unwrap().parse().unwrap();
                session.save(&Change::Write(record((count + 1).to_string())), wid()).await.unwrap();
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(view(&store.handler, &id).await.unwrap().as_deref(), Some(&b"900"[..]));
    put(&store.handler, &id, "done").await;
}
