//! Writers that are killed with SIGKILL: the file holds the last acknowledged record or a later one, whole.

use std::time::Duration;

use session_core::{Change, Record, SessionId, Ttl};
use session_file::{Durability, FileConfig, FileHandler};

use crate::child::{Worker, say};
use crate::{create, open, patient, view, wid};

/// The record of a number: bytes and length follow from it, so half of one and half of another is neither.
fn numbered(number: u64) -> Record {
    // Lengths that need one call, two calls, and growth.
    let length = match number % 4 {
        0 => 100,
        1 => 1500 + number % 700,
        2 => 3000,
        _ => 9000 + number % 5000,
    };
    let mut data = number.to_le_bytes().to_vec();
    let mut mix = number;
    data.extend((0..length).map(|_| {
        mix = mix.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (mix >> 56) as u8
    }));
    Record::new(data, Ttl::from_secs(3600))
}

fn number_of(data: &[u8]) -> u64 {
    let number = u64::from_le_bytes(data[..8].try_into().unwrap());
    assert!(numbered(number).data == data, "a torn or mixed record of {} bytes", data.len());
    number
}

/// Runs in a child until it is killed.
pub(crate) fn write_for_ever(place: &str) {
    let [dir, id, durability] = place.split('|').collect::<Vec<_>>()[..] else { panic!("three parts") };
    let durability = match durability {
        "None" => Durability::None,
        "Data" => Durability::Data,
        _ => Durability::Full,
    };
    let id = SessionId::parse(id).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let handler = FileHandler::open_dir(FileConfig::new(dir).with_durability(durability)).unwrap();
        loop {
            let mut session = open(&handler, &id, patient()).await;
            let number = number_of(&session.read().await.unwrap().unwrap().data) + 1;
            if number.is_multiple_of(7) {
                session.touch(Ttl::from_secs(7200)).await.unwrap();
            }
            session.save(&Change::Write(numbered(number)), wid()).await.unwrap();
            say(&number.to_string());
        }
    });
}

async fn kill_writers(durability: Durability) {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("sessions");
    let handler = FileHandler::open_dir(FileConfig::new(&dir).with_durability(durability)).unwrap();
    let id = create(&handler, numbered(1)).await;
    let place = format!("{}|{}|{durability:?}", dir.display(), id.as_str());
    let mut random = u64::from(std::process::id());
    let mut last = 1;
    for round in 0..200 {
        let mut child = Worker::start("write for ever", &place);
        let mut acknowledged: u64 = child.line().expect("the writer works").parse().unwrap();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        tokio::time::sleep(Duration::from_micros((random >> 33) % 3000)).await;
        child.kill();
        while let Some(line) = child.line() {
            acknowledged = line.parse().unwrap_or(acknowledged);
        }
        let seen = number_of(&view(&handler, &id).await.unwrap().expect("the session is there"));
        assert!(seen >= acknowledged && seen <= acknowledged + 1, "round {round}: {acknowledged} was said, {seen} is there");
        assert!(acknowledged > last, "round {round}: nothing was written");
        // The lock went with the process.
        let mut session = open(&handler, &id, patient()).await;
        assert_eq!(number_of(&session.read().await.unwrap().unwrap().data), seen);
        session.close().await.unwrap();
        last = seen;
    }
}

#[tokio::test]
async fn two_hundred_killed_writers_tear_nothing_without_syncs() {
    kill_writers(Durability::None).await;
}

#[tokio::test]
async fn two_hundred_killed_writers_tear_nothing_with_data_synced() {
    kill_writers(Durability::Data).await;
}

#[tokio::test]
async fn two_hundred_killed_writers_tear_nothing_with_all_synced() {
    kill_writers(Durability::Full).await;
}
