//! Nobody who stops waiting, or looking, leaves an operation where it is.

use std::sync::atomic::AtomicU32;
use std::task::Context;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{advance, timeout};

use super::*;

const SOON: Duration = Duration::from_secs(5);

/// A watch, and somebody who looks as the janitor does.
fn watch() -> Arc<Watch> {
    let watch = Arc::new(Watch::new(|_| panic!("nothing was dropped outside a runtime")));
    let watcher = Arc::clone(&watch);
    tokio::spawn(async move {
        loop {
            watcher.begun().await;
            loop {
                tokio::time::sleep(PATIENCE).await;
                let Some(taken) = watcher.look(Instant::now()) else { break };
                taken.into_iter().for_each(|work| drop(tokio::spawn(work)));
            }
        }
    });
    watch
}

/// Polls once, with the waker of the test.
async fn once<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    let mut future = future;
    poll_fn(|context: &mut Context<'_>| Poll::Ready(future.as_mut().poll(context))).await
}

async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_never_waits_is_not_looked_after() {
    let watch = watch();
    assert_eq!(owned(&watch, async { 7 }).await.unwrap(), 7);
    assert!(guard(&watch.table).next_key == 0 && !watch.watched.load(Ordering::SeqCst));
}

#[tokio::test]
async fn what_waits_a_little_is_driven_by_its_caller() {
    let watch = watch();
    let (sender, receiver) = oneshot::channel::<u32>();
    let answer = tokio::spawn(async move {
        settle().await;
        sender.send(7).unwrap();
    });
    let work = async move { (receiver.await.unwrap(), tokio::task::try_id()) };
    let (value, there) = owned(&watch, work).await.unwrap();
    assert_eq!((value, there), (7, None), "a test is no task");
    assert_eq!(watch.len(), 0);
    answer.await.unwrap();
}

#[tokio::test]
async fn whoever_drops_it_lets_a_task_go_on_at_once() {
    let watch = watch();
    let (go, done) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicU32::new(0)));
    let (may, counter) = (go.clone(), done.clone());
    let mut operation = Box::pin(owned(&watch, async move {
        for _ in 0..3 {
            may.acquire().await.unwrap().forget();
            counter.fetch_add(1, Ordering::SeqCst);
        }
    }));
    assert!(once(operation.as_mut()).await.is_pending());
    go.add_permits(1);
    settle().await;
    assert_eq!(done.load(Ordering::SeqCst), 0, "nobody looks");
    drop(operation);
    settle().await;
    assert_eq!(done.load(Ordering::SeqCst), 1);
    go.add_permits(2);
    settle().await;
    assert_eq!((done.load(Ordering::SeqCst), watch.len()), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn whoever_keeps_it_and_does_not_look_holds_up_nobody_else() {
    let watch = watch();
    // Fair: the first who waits is given it, and keeps it from the others until he looks.
    let gate = Arc::new(Semaphore::new(0));
    let mine = gate.clone();
    let mut operation = Box::pin(owned(&watch, async move { drop(mine.acquire().await.unwrap()) }));
    assert!(once(operation.as_mut()).await.is_pending());
    let theirs = gate.clone();
    let other = tokio::spawn(async move { drop(theirs.acquire().await.unwrap()) });
    settle().await;
    gate.add_permits(1);
    settle().await;
    assert!(!other.is_finished(), "it is the turn of whoever does not look");
    advance(3 * PATIENCE).await;
    settle().await;
    assert!(other.is_finished(), "a task has looked for him");
    assert_eq!(watch.len(), 0);
    operation.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_outcome_that_a_task_has_reached_is_there_for_whoever_looks_again() {
    let watch = watch();
    let (sender, receiver) = oneshot::channel::<u32>();
    let mut operation = Box::pin(owned(&watch, async move { receiver.await.unwrap() }));
    assert!(once(operation.as_mut()).await.is_pending());
    advance(3 * PATIENCE).await;
    settle().await;
    assert!(once(operation.as_mut()).await.is_pending());
    sender.send(7).unwrap();
    assert_eq!(timeout(SOON, operation).await.unwrap().unwrap(), 7);
}

#[tokio::test]
async fn an_outcome_can_be_called_for_again_after_the_first_call_was_dropped() {
    let watch = watch();
    let (sender, receiver) = oneshot::channel::<u32>();
    let reached = Arc::new(AtomicU32::new(0));
    let seen = reached.clone();
    let work = async move {
        let value = receiver.await.unwrap();
        seen.store(value, Ordering::SeqCst);
        value
    };
    let Begun::Waiting(mut operation) = begin(&watch, work).await else { panic!("nothing was sent yet") };
    assert!(once(Box::pin(operation.outcome()).as_mut()).await.is_pending());
    sender.send(7).unwrap();
    settle().await;
    assert_eq!(reached.load(Ordering::SeqCst), 7, "a task goes on meanwhile");
    assert_eq!(operation.outcome().await.unwrap(), 7);
    assert_eq!(operation.outcome().await.unwrap_err().kind(), ErrorKind::Unknown, "it is there once");
}

#[tokio::test]
async fn a_panic_is_the_callers_while_he_looks_and_an_unknown_end_once_he_does_not() {
    let watch = watch();
    let panics = || async {
        tokio::task::yield_now().await;
        panic!("a backend is broken")
    };
    let looked_at = watch.clone();
    let looking = tokio::spawn(async move { owned::<()>(&looked_at, panics()).await });
    assert!(looking.await.unwrap_err().is_panic());
    let Begun::Waiting(mut operation) = begin::<()>(&watch, panics()).await else { panic!("it waits first") };
    operation.hand_over();
    assert_eq!(operation.outcome().await.unwrap_err().kind(), ErrorKind::Unknown);
    assert_eq!(watch.len(), 0);
}

#[tokio::test]
async fn a_task_that_ends_before_it_begins_keeps_nobody_waiting() {
    let watch = Arc::new(Watch::new(|_| panic!("nothing was dropped outside a runtime")));
    let (_sender, receiver) = oneshot::channel::<()>();
    let Begun::Waiting(mut operation) = begin(&watch, receiver).await else { panic!("nothing was sent yet") };
    let taken = watch.look(Instant::now() + PATIENCE).expect("something began");
    assert_eq!(taken.len(), 1);
    drop(taken);
    assert_eq!(operation.outcome().await.unwrap_err().kind(), ErrorKind::Unknown);
}

#[tokio::test]
async fn the_watcher_stays_away_once_there_is_nothing_and_comes_again() {
    let watch = Arc::new(Watch::new(|_| panic!("nothing was dropped outside a runtime")));
    assert!(watch.look(Instant::now()).is_none(), "nothing began");
    for _ in 0..2 {
        let (sender, receiver) = oneshot::channel::<()>();
        let Begun::Waiting(operation) = begin(&watch, receiver).await else { panic!("nothing was sent yet") };
        timeout(SOON, watch.begun()).await.expect("it is said that something began");
        assert_eq!(watch.look(Instant::now()).map(|taken| taken.len()), Some(0), "it is young");
        assert_eq!(watch.look(Instant::now() + PATIENCE).map(|taken| taken.len()), Some(1));
        assert!(watch.look(Instant::now()).is_none(), "nothing is left, and nothing began since");
        drop((sender, operation));
    }
    let (_sender, receiver) = oneshot::channel::<()>();
    let Begun::Waiting(operation) = begin(&watch, receiver).await else { panic!("nothing was sent yet") };
    drop(operation);
    assert_eq!(watch.look(Instant::now()).map(|taken| taken.len()), Some(0), "something began since, and more may come");
    assert!(watch.look(Instant::now()).is_none());
}

#[test]
fn what_is_dropped_outside_a_runtime_is_left_to_whoever_has_one() {
    let (left, mut right) = mpsc::unbounded_channel();
    let watch = Arc::new(Watch::new(move |carried| drop(left.send(carried))));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (sender, receiver) = oneshot::channel::<()>();
    let done = Arc::new(AtomicU32::new(0));
    let counter = done.clone();
    let work = async move {
        receiver.await.unwrap();
        counter.fetch_add(1, Ordering::SeqCst);
    };
    let Begun::Waiting(operation) = runtime.block_on(begin(&watch, work)) else { panic!("nothing was sent yet") };
    drop(operation);
    sender.send(()).unwrap();
    let carried = right.try_recv().expect("it was left to somebody");
    runtime.block_on(carried);
    assert_eq!(done.load(Ordering::SeqCst), 1);
}
