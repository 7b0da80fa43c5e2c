//! The steps that no server can be made to take in a given order.

use std::collections::HashSet;
use std::sync::Mutex;

use async_trait::async_trait;
use tokio::sync::{Notify, Semaphore};

use super::*;
use crate::config::{SqlAddress, SqlServer};
use crate::database::{Listed, Locked, Waiter};

/// A database that takes two steps to grant the locks of a batch, and waits between them until somebody has withdrawn. What comes alone
/// waits for `alone`.
#[derive(Debug)]
struct TwoSteps {
    locks: Mutex<HashSet<LeaseToken>>,
    taken: Notify,
    left: Notify,
    alone: Semaphore,
}

impl TwoSteps {
    fn take(&self, entries: &[Enter]) {
        self.locks.lock().unwrap().extend(entries.iter().map(|entry| entry.token));
    }

    fn held(&self) -> usize {
        self.locks.lock().unwrap().len()
    }

    fn not_here<T>() -> Result<T, Failure> {
        Err(Failure::unexpected("nobody asks for this here"))
    }
}

#[async_trait]
impl Database for TwoSteps {
    async fn enter(&self, entries: &[Enter]) -> Result<Vec<Option<Entered>>, Failure> {
        if entries.len() == 1 {
            self.alone.acquire().await.unwrap().forget();
            return Ok(vec![Some(Entered::Absent)]);
        }
        self.take(entries);
        self.taken.notify_one();
        self.left.notified().await;
        // For whom the first statement did not get it, so it seems, the second asks once more.
        self.take(entries);
        Ok(entries.iter().map(|_| Some(Entered::Granted { found: Found::Absent, clean: true })).collect())
    }

    async fn leave(&self, _key: &str, token: LeaseToken, _clean: bool) -> Result<bool, Failure> {
        let had = self.locks.lock().unwrap().remove(&token);
        self.left.notify_one();
        Ok(had)
    }

    async fn waiter(&self, _token: LeaseToken) -> Option<Box<dyn Waiter>> {
        None
    }

    async fn change(&self, _changes: &[Alter]) -> Result<Vec<Option<Verdict>>, Failure> {
        Self::not_here()
    }

    async fn look(&self, _key: &str) -> Result<Found, Failure> {
        Self::not_here()
    }

    async fn remove(&self, _removal: &Remove) -> Result<Option<Record>, Failure> {
        Self::not_here()
    }

    async fn renew(&self, _leases: &[Renew]) -> Result<Vec<Renewed>, Failure> {
        Self::not_here()
    }

    async fn gc(&self, _limit: u32) -> Result<u64, Failure> {
        Self::not_here()
    }

    async fn list(&self, _prefix: &str, _after: Option<&str>, _limit: u32) -> Result<Vec<Listed>, Failure> {
        Self::not_here()
    }

    async fn locks(&self, _prefix: &str, _limit: u32) -> Result<Vec<Locked>, Failure> {
        Self::not_here()
    }

    async fn unlock(&self, _key: &str) -> Result<bool, Failure> {
        Self::not_here()
    }

    async fn create_table(&self) -> Result<(), Failure> {
        Self::not_here()
    }

    async fn check(&self) -> Result<(), Failure> {
        Self::not_here()
    }
}

/// An open is dropped on its way, its withdrawal gives the lock back between the two statements of the batch, and the second of them
/// takes it again.
#[tokio::test(start_paused = true)]
async fn a_batch_that_takes_a_lock_again_behind_its_withdrawal_keeps_none() {
    let database =
        Arc::new(TwoSteps { locks: Mutex::default(), taken: Notify::new(), left: Notify::new(), alone: Semaphore::new(0) });
    let store = Store::new(database.clone(), SqlConfig::new(SqlServer::MySql(SqlAddress::default())));
    let open = || {
        let (store, row) = (store.clone(), Arc::new(store.place(&SessionId::generate().unwrap())));
        tokio::spawn(async move {
            store.acquire("open", &row, Want::Any, Duration::from_secs(5), Duration::from_secs(30)).await.unwrap()
        })
    };
    let moment = || tokio::time::sleep(Duration::from_millis(1));
    // Two that travel alone keep the next two waiting for each other.
    let alone = [open(), open()];
    moment().await;
    let (dropped, kept) = (open(), open());
    moment().await;
    database.alone.add_permits(alone.len());
    database.taken.notified().await;
    assert_eq!(database.held(), 2, "both travel in one batch");
    dropped.abort();
    assert!(dropped.await.unwrap_err().is_cancelled());
    assert!(matches!(kept.await.unwrap(), Granted::Locked { .. }));
    tokio::time::sleep(AGAIN.iter().sum()).await;
    assert_eq!(database.held(), 1, "a lock stays until its lease ends");
}
