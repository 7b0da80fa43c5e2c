//! Many tasks and few sessions on the file backend: order, memory, threads, and what dropped requests leave behind.
#![cfg(feature = "file")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sessionkit::{SessionId, Sessions};
use tokio::sync::Mutex;

async fn sessions(dir: &std::path::Path, options: &str) -> Sessions {
    sessionkit::connect(&format!("file://{}?durability=none{options}", dir.display())).await.expect("the directory is ours")
}

async fn stored(sessions: &Sessions) -> SessionId {
    let mut session = sessions.create().expect("randomness");
    session.insert("n", &0u32).expect("a number");
    session.close().await.expect("stored").expect("has a value")
}

/// A line of `/proc/self/status`, as a number.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with(field)).expect("a known field");
    line.split_whitespace().nth(1).expect("a value").parse().expect("a number")
}

/// How many files of this process are open in `dir`.
fn open_files(dir: &std::path::Path) -> usize {
    let files = std::fs::read_dir("/proc/self/fd").expect("Linux");
    files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok()).filter(|path| path.starts_with(dir)).count()
}

/// Counts when `opening` has its place in the queue: once it was polled, and not a moment before.
async fn counted_once_polled<T>(mut opening: Pin<&mut impl Future<Output = T>>, count: &AtomicUsize) -> T {
    let mut polled = false;
    poll_fn(|cx| {
        let opened = opening.as_mut().poll(cx);
        if !std::mem::replace(&mut polled, true) {
            count.fetch_add(1, Ordering::SeqCst);
        }
        opened
    })
    .await
}

#[test]
fn ten_thousand_waiting_tasks_need_no_thread_each_and_are_served_in_order() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let dir = tempfile::tempdir().expect("a directory");
        let sessions = sessions(dir.path(), "&wait=120s").await;
        let mut held = Vec::new();
        let mut ids = Vec::new();
        for _ in 0..1000 {
            let id = stored(&sessions).await;
            held.push(sessions.open(&id).await.expect("free"));
            ids.push(id);
        }
        let (memory, threads) = (status("VmRSS"), status("Threads"));
        let order: Arc<Vec<Mutex<Vec<usize>>>> = Arc::new((0..1000).map(|_| Mutex::default()).collect());
        let waiting = Arc::new(AtomicUsize::new(0));
        let mut tasks = Vec::new();
        for place in 0..10 {
            for (n, id) in ids.iter().enumerate() {
                let (sessions, id, order, waiting) = (sessions.clone(), id.clone(), order.clone(), waiting.clone());
                tasks.push(tokio::spawn(async move {
                    let session = counted_once_polled(pin!(sessions.open(&id)), &waiting).await;
                    let mut session = session.expect("served within the wait");
                    order[n].lock().await.push(place);
                    session.update_key::<u32, _>("n", |n| n.unwrap_or(0) + 1).expect("a number");
                    session.close().await.expect("stored");
                }));
            }
            while waiting.load(Ordering::SeqCst) < 1000 * (place + 1) {
                tokio::task::yield_now().await;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        let per_waiter = (status("VmRSS").saturating_sub(memory)) * 1024 / 10_000;
        println!("memory per waiting task: {per_waiter} bytes; threads {threads} -> {}", status("Threads"));
        assert!(per_waiter < 4096, "{per_waiter} bytes per waiter");
        assert!(status("Threads") <= threads + 2, "a thread per waiter");
        for session in held {
            session.close().await.expect("closed");
        }
        for task in tasks {
            task.await.expect("no panic");
        }
        for (n, id) in ids.iter().enumerate() {
            assert_eq!(*order[n].lock().await, (0..10).collect::<Vec<_>>(), "first come, first served");
            assert_eq!(sessions.view(id).await.expect("read").get::<u32>("n").expect("a number"), Some(10));
        }
        sessions.shutdown().await;
        assert_eq!(sessions.in_use(), (0, 0));
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opens_dropped_at_random_points_leave_no_lock_no_entry_and_no_file() {
    let dir = tempfile::tempdir().expect("a directory");
    // Without those that are kept open for a second, whatever is open at the end was left behind.
    let sessions = sessions(dir.path(), "&wait=20s&keep_open=0").await;
    let ids = [stored(&sessions).await, stored(&sessions).await, stored(&sessions).await];
    sessions.open(&ids[0]).await.expect("free").close().await.expect("closed");
    let files = open_files(dir.path());
    let seed: u64 = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5e55_1014);
    println!("SEED={seed}");
    let mut random = seed;
    let mut draw = move |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let mut tasks = Vec::new();
    for n in 0..1000 {
        let (sessions, id) = (sessions.clone(), ids[n % 3].clone());
        let work = async move {
            let mut session = sessions.open(&id).await.expect("served");
            session.update_key::<u32, _>("n", |n| n.unwrap_or(0) + 1).expect("a number");
            tokio::task::yield_now().await;
            session.save().await.expect("saved");
            tokio::task::yield_now().await;
            session.close().await.expect("closed");
        };
        let patience = Duration::from_micros(draw(3000));
        tasks.push(tokio::spawn(async move {
            let _ = tokio::time::timeout(patience, work).await;
        }));
        if draw(4) == 0 {
            tokio::task::yield_now().await;
        }
        if tasks.len() >= 60 {
            tasks.remove(0).await.expect("no panic");
        }
    }
    for task in tasks {
        task.await.expect("no panic");
    }
    sessions.shutdown().await;
    for id in &ids {
        let free = sessions.clone().with_wait(Duration::from_secs(2)).open(id).await.expect("no lock is left");
        free.close().await.expect("closed");
    }
    assert_eq!(sessions.in_use(), (0, 0));
    assert_eq!(open_files(dir.path()), files, "files are left open");
}
