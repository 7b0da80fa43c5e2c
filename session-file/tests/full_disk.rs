//! A disk with hardly any room, and limits below what is there already: what is refused, and what may not be taken along.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use session_core::{ErrorKind, Expect, Record, SessionHandler, SessionId, Ttl, WriteId, Written};
use session_file::{Durability, FileConfig, FileHandler};
use support::{
    Place, SmallDisk, block_on, child_of, child_place, create, exclusive, id, is_free, keeps_secret, many, put_file, read,
    record, tree, view, write,
};

fn on(disk: &SmallDisk, durability: Durability, depth: u8) -> FileHandler {
    let config = FileConfig::new(disk.path().join("sessions")).with_durability(durability).with_depth(depth);
    FileHandler::open_dir(config).unwrap()
}

/// A disk for each level: the room of a removed file comes back only when its last descriptor is closed, and a child that
/// another test starts at this moment may have one for a while.
const OF_ITS_OWN: &str = "size=1m";

const LEVELS: [Durability; 3] = [Durability::None, Durability::Data, Durability::Full];

#[tokio::test]
async fn a_refused_write_gives_back_what_it_had_taken_of_the_last_room() {
    for durability in LEVELS {
        let disk = SmallDisk::new(OF_ITS_OWN);
        let (handler, id) = (on(&disk, durability, 0), id());
        create(&handler, &id, b"small").await;
        let path = tree(&disk.path().join("sessions")).remove(0);
        let length = fs::metadata(&path).unwrap().len();
        disk.fill(2 * 4096);
        let mut opened = handler.open(&id, &exclusive()).await.unwrap();
        for round in 0..40 {
            // By the way that writes and the way that reserves; each would take a part of the room before it fails.
            let long = vec![7; if round % 2 == 0 { 40_000 } else { 140_000 }];
            let error = write(&mut opened, &long).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            keeps_secret(&error, &id);
            assert_eq!(opened.read().await.unwrap().unwrap().data, b"small");
            assert_eq!(fs::metadata(&path).unwrap().len(), length, "round {round}");
        }
        // Two pages were left, and they still are.
        put_file(&disk.path().join("two pages"), &[1; 8192], 0o600);
        opened.close().await.unwrap();
        assert!(is_free(&path));
        assert_eq!(read(&handler, &id).await.unwrap().unwrap(), b"small");
        disk.empty();
        create(&handler, &id, &[7; 140_000]).await;
        assert_eq!(read(&handler, &id).await.unwrap().unwrap(), [7; 140_000]);
        support::destroy(&handler, &id).await.unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_lets_a_session_in_that_it_cannot_prolong() {
    for durability in LEVELS {
        let disk = SmallDisk::new(OF_ITS_OWN);
        let (handler, id) = (on(&disk, durability, 0), id());
        // One page, so that the second entry would need another one.
        let brief = Record::new([3; 2500], Ttl::from_secs(15));
        let mut opened = handler.open(&id, &exclusive().expecting(Expect::Any)).await.unwrap();
        opened.write(&brief, WriteId::random().unwrap()).await.unwrap();
        opened.close().await.unwrap();
        disk.fill(0);
        let mut opened = handler.open(&id, &exclusive()).await.unwrap();
        let seen = opened.read().await.unwrap().unwrap();
        assert_eq!(seen.data, [3; 2500]);
        assert!(seen.ttl.as_duration() <= Duration::from_secs(15), "there was no room to prolong it");
        let longer = Ttl::from_secs(3600);
        assert_eq!(opened.touch(longer).await.unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(opened.read().await.unwrap().unwrap().data, [3; 2500]);
        let name = WriteId::random().unwrap();
        assert_eq!(opened.write(&record(&[4; 2500]), name).await.unwrap_err().kind(), ErrorKind::Unavailable);
        disk.empty();
        assert_eq!(opened.touch(longer).await.unwrap(), Written::Applied);
        assert!(opened.read().await.unwrap().unwrap().ttl.as_duration() > Duration::from_secs(3500));
        assert_eq!(opened.write(&record(&[4; 2500]), name).await.unwrap(), Written::Applied);
        opened.close().await.unwrap();
        assert_eq!(read(&handler, &id).await.unwrap().unwrap(), [4; 2500]);
        support::destroy(&handler, &id).await.unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_does_not_keep_anybody_from_logging_out_or_collecting() {
    for durability in LEVELS {
        let disk = SmallDisk::new(OF_ITS_OWN);
        let handler = on(&disk, durability, 0);
        let (held, free, over) = (id(), id(), id());
        for id in [&held, &free] {
            create(&handler, id, b"logged in").await;
        }
        let mut opened = handler.open(&over, &exclusive().expecting(Expect::Any)).await.unwrap();
        opened.write(&Record::new(b"over", Ttl::from_secs(0)), WriteId::random().unwrap()).await.unwrap();
        opened.close().await.unwrap();
        let mut holder = handler.open(&held, &exclusive()).await.unwrap();
        disk.fill(0);
        assert_eq!(support::destroy(&handler, &held).await.unwrap().unwrap(), b"logged in");
        assert_eq!(support::destroy(&handler, &free).await.unwrap().unwrap(), b"logged in");
        assert_eq!(write(&mut holder, b"late").await.unwrap_err().kind(), ErrorKind::Gone);
        drop(holder);
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert_eq!(handler.gc(many()).await.unwrap(), 1);
        assert!(tree(&disk.path().join("sessions")).is_empty());
        disk.empty();
    }
}

#[tokio::test]
async fn used_up_inodes_keep_neither_a_shard_nor_a_file_and_spare_what_is_there() {
    let disk = SmallDisk::new("size=1m,nr_inodes=8");
    let handler = on(&disk, Durability::Full, 1);
    let first = id();
    create(&handler, &first, b"first").await;
    let mut ballast = Vec::new();
    while fs::File::create(disk.path().join(ballast.len().to_string())).is_ok() {
        ballast.push(disk.path().join(ballast.len().to_string()));
    }
    let before = tree(disk.path());
    for (expect, shard) in [(Expect::Any, "another"), (Expect::Fresh, "another"), (Expect::Any, "the same")] {
        let other = std::iter::repeat_with(id);
        let same = |id: &SessionId| id.as_str()[..1] == first.as_str()[..1];
        let other = other.into_iter().find(|id| same(id) == (shard == "the same")).unwrap();
        let outcome = async {
            let mut opened = handler.open(&other, &exclusive().expecting(expect)).await?;
            write(&mut opened, b"new").await
        };
        let error = outcome.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        assert!(error.to_string().contains("full"), "{error}");
        keeps_secret(&error, &other);
        assert_eq!(tree(disk.path()), before, "in {shard} shard");
    }
    create(&handler, &first, b"changed").await;
    assert_eq!(view(&handler, &first).await.unwrap().unwrap(), b"changed");
    for path in ballast {
        fs::remove_file(path).unwrap();
    }
    create(&handler, &id(), b"new").await;
}

/// Runs in a child, whose limit it is.
fn below_the_limit(dir: &Path, id: &SessionId, limit: u64) {
    let ignored = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = ignored.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim().to_owned();
    let ignored = u64::from_str_radix(&ignored, 16).unwrap();
    assert_eq!(ignored & (1 << (nix::libc::SIGXFSZ - 1)), 0, "the signal would kill");
    block_on(async {
        let handler = FileHandler::open_dir(FileConfig::new(dir).with_durability(Durability::None)).unwrap();
        setrlimit(Resource::RLIMIT_FSIZE, limit, limit).unwrap();
        let (_, held) = (view(&handler, id).await.unwrap(), handler.open(id, &exclusive()).await.unwrap());
        let mut opened = held;
        // The first write goes to one end of the file, and what follows a touch to the other.
        for length in [20_000, 9000, 70_000, 300] {
            for _ in 0..2 {
                match write(&mut opened, &vec![9; length]).await {
                    Ok(_) => assert!(limit > 300, "nothing fits"),
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
                        assert!(error.to_string().contains("RLIMIT_FSIZE"), "{error}");
                        keeps_secret(&error, id);
                    }
                }
                match opened.touch(Ttl::from_secs(7200)).await {
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}"),
                }
                assert!(opened.read().await.unwrap().is_some());
            }
        }
        // One who waits leaves marks in the file, and so does a renewal.
        let brief = session_core::OpenRequest::exclusive(Duration::from_millis(60), support::LEASE);
        assert_eq!(handler.open(id, &brief).await.unwrap_err().kind(), ErrorKind::LockTimeout);
        let lease = opened.held().unwrap().clone();
        let _ = lease.lock.renew(&[lease.lease]).await;
        opened.close().await.unwrap();
        println!("survived {limit}");
    });
}

#[test]
fn a_limit_below_the_length_of_a_file_refuses_and_does_not_kill() {
    if let Some(place) = child_place() {
        let [dir, id, limit] = place.split('|').collect::<Vec<_>>()[..] else { panic!("three parts") };
        return below_the_limit(Path::new(dir), &SessionId::parse(id).unwrap(), limit.parse().unwrap());
    }
    // Nothing fits; the first entry alone; both, but no payload; somewhere within the file.
    for limit in [25_000, 20_500, 8192, 4096, 1024, 100, 40, 0] {
        let place = Place::new();
        let id = id();
        block_on(async {
            create(&place.handler(), &id, &[5; 12_000]).await;
            create(&place.handler(), &id, &[6; 30_000]).await;
        });
        let told = format!("{}|{}|{limit}", place.dir().display(), id.as_str());
        let child = child_of("a_limit_below_the_length_of_a_file_refuses_and_does_not_kill", &told).output().unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        let complaint = String::from_utf8_lossy(&child.stderr).replace(id.as_str(), "(id)");
        assert!(child.status.success(), "limit {limit}: {}\n{complaint}", child.status);
        assert!(said.contains(&format!("survived {limit}")), "limit {limit}: the child did not run");
        let data = block_on(read(&place.handler(), &id)).unwrap().unwrap();
        assert!(data.iter().all(|byte| *byte == data[0]) && matches!(data[0], 6 | 9), "limit {limit}: mixed");
    }
}
