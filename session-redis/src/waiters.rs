//! Who in this process waits for a lock, and how a message of the server finds him.
//!
//! One connection per handler is subscribed to one channel. It is made when the first waiter needs it. A message that is lost
//! costs a waiter one bounded sleep: nothing here decides who has a lock.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use redis::RedisError;
use redis::aio::{PubSub, PubSubStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::layout::TokenText;

/// The first and the longest pause before a broken subscription is made anew.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// After how long without a message the connection is asked whether it is still there, and how long it has to answer.
const QUIET: Duration = Duration::from_secs(5);

/// Makes a connection for the subscription.
pub(crate) type Subscribe = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<PubSub, RedisError>> + Send>> + Send + Sync>;

/// Passes on a grant that nobody here waits for: whose it was, and the key of the record.
pub(crate) type PassOn = Arc<dyn Fn(TokenText, String) + Send + Sync>;

pub(crate) struct Waiters {
    shared: Arc<Shared>,
    channel: String,
    subscribe: Subscribe,
    pass_on: PassOn,
}

struct Shared {
    waiting: Mutex<HashMap<TokenText, Arc<Notify>>>,
    listening: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<TokenText, Arc<Notify>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiters {
    pub(crate) fn new(channel: String, subscribe: Subscribe, pass_on: PassOn) -> Self {
        let shared = Shared { waiting: Mutex::default(), listening: watch::Sender::new(false), task: Mutex::default() };
        Self { shared: Arc::new(shared), channel, subscribe, pass_on }
    }

    pub(crate) fn channel(&self) -> &str {
        &self.channel
    }

    /// Registers a waiter. It has to stand here before the server is told of it.
    pub(crate) fn register(&self, token: TokenText) -> Waiter {
        let wake = Arc::new(Notify::new());
        self.shared.waiting().insert(token, wake.clone());
        Waiter { shared: Arc::downgrade(&self.shared), token, wake }
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.shared.waiting().len()
    }

    /// Sees to it that the channel is listened to, and waits for it, but not for long: whoever is not heard is passed over and
    /// comes back after a sleep.
    pub(crate) async fn listen(&self, limit: Duration) {
        let mut listening = self.shared.listening.subscribe();
        if *listening.borrow() && self.is_running() {
            return;
        }
        self.start();
        let _ = tokio::time::timeout(limit, listening.wait_for(|listening| *listening)).await;
    }

    fn is_running(&self) -> bool {
        let task = self.shared.task.lock().unwrap_or_else(PoisonError::into_inner);
        task.as_ref().is_some_and(|task| !task.is_finished())
    }

    fn start(&self) {
        let mut task = self.shared.task.lock().unwrap_or_else(PoisonError::into_inner);
        // The runtime that it ran on may be gone.
        if task.as_ref().is_none_or(JoinHandle::is_finished) {
            let _ = self.shared.listening.send(false);
            let shared = Arc::downgrade(&self.shared);
            *task = Some(tokio::spawn(listen(shared, self.channel.clone(), self.subscribe.clone(), self.pass_on.clone())));
        }
    }
}

impl Drop for Waiters {
    fn drop(&mut self) {
        if let Some(task) = self.shared.task.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

impl fmt::Debug for Waiters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiters").field("waiting", &self.len()).finish_non_exhaustive()
    }
}

/// A place in the register, given up when it is dropped.
pub(crate) struct Waiter {
    shared: Weak<Shared>,
    token: TokenText,
    wake: Arc<Notify>,
}

impl Waiter {
    /// Waits for a message, or for as long as `limit`. A message that came before counts.
    pub(crate) async fn woken(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.wake.notified()).await;
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.waiting().remove(&self.token);
        }
    }
}

async fn listen(shared: Weak<Shared>, channel: String, subscribe: Subscribe, pass_on: PassOn) {
    let mut pause = PAUSES.0;
    loop {
        let subscribed = async {
            let (mut sink, stream) = subscribe().await?.split();
            sink.subscribe(&channel).await?;
            Ok::<_, RedisError>((sink, stream))
        };
        match subscribed.await {
            Ok((mut sink, mut stream)) => {
                pause = PAUSES.0;
                let Some(known) = shared.upgrade() else { return };
                // Whoever slept through the time without a subscription looks again now.
                for waiter in known.waiting().values() {
                    waiter.notify_one();
                }
                let _ = known.listening.send(true);
                drop(known);
                loop {
                    let message = tokio::time::timeout(QUIET, next(&mut stream)).await;
                    let Some(known) = shared.upgrade() else { return };
                    match message {
                        Ok(Some(message)) => deliver(&known, message.get_payload_bytes(), &pass_on),
                        Ok(None) => break,
                        // A peer that is gone without a word would leave every waiter to his sleep.
                        Err(_) if known.waiting().is_empty() => {}
                        Err(_) => {
                            drop(known);
                            if !matches!(tokio::time::timeout(QUIET, sink.ping::<()>()).await, Ok(Ok(()))) {
                                break;
                            }
                        }
                    }
                }
                if let Some(known) = shared.upgrade() {
                    let _ = known.listening.send(false);
                }
            }
            Err(error) => tracing::debug!(%error, "the subscription for wake-ups could not be made; trying again"),
        }
        if shared.strong_count() == 0 {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

fn deliver(shared: &Shared, payload: &[u8], pass_on: &PassOn) {
    let Some((token, rest)) = payload.split_first_chunk::<32>() else { return };
    if let Some(waiter) = shared.waiting().get(token) {
        waiter.notify_one();
        return;
    }
    if let Some(record) = rest.strip_prefix(b"|").and_then(|record| std::str::from_utf8(record).ok()) {
        pass_on(*token, record.to_owned());
    }
}

async fn next(stream: &mut PubSubStream) -> Option<redis::Msg> {
    std::future::poll_fn(|context: &mut Context<'_>| -> Poll<Option<redis::Msg>> {
        futures_core::Stream::poll_next(Pin::new(&mut *stream), context)
    })
    .await
}
