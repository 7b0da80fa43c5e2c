//! What do bytes cost that somebody made up? Time, stack and memory must follow from their number, not from what they claim.
//!
//! The allocator counts, so one test runs at a time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use peak_alloc::PeakAlloc;
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use session_core::{
    Codec, ErrorKind, Expect, MemoryHandler, OpenRequest, Record, Result, SessionHandler, SessionId, Sessions, Ttl,
    ValueCodec, WriteId, Written,
};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn codecs() -> impl Iterator<Item = Codec> {
    ["msgpack", "json", "postcard", "bincode"].into_iter().filter_map(|name| Codec::from_name(name).ok())
}

fn describes_itself(codec: Codec) -> bool {
    matches!(codec.name(), "msgpack" | "json")
}

/// A list of lists.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Nest(Vec<Self>);

/// A map of maps.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Shelf(BTreeMap<u8, Self>);

/// An enum of enums, through every kind of variant.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Tree {
    Leaf,
    New(Box<Self>),
    Pair(Box<Self>, u8),
    Named { left: Box<Self> },
}

/// Nests in every format without taking a byte: `Some` and newtypes leave no trace in most of them.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Link(Option<Box<Self>>);

/// Takes owned bytes.
#[derive(Debug, PartialEq)]
struct Blob(Vec<u8>);

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Blob;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }
            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Blob, E> {
                Ok(Blob(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

/// Takes 1 KiB for each byte of input.
#[derive(Debug, PartialEq, Deserialize)]
struct Fat {
    first: u8,
    #[serde(skip, default = "kilobyte")]
    _rest: [[u64; 16]; 8],
}

fn kilobyte() -> [[u64; 16]; 8] {
    [[0; 16]; 8]
}

/// Decodes within 4 × input + 64 KiB of memory.
fn frugal<T: DeserializeOwned + Debug>(codec: Codec, bytes: &[u8]) -> Result<T> {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let outcome = codec.decode::<T>(bytes);
    let peak = ALLOCATOR.peak_usage() - before;
    let bound = 4 * bytes.len() + 64 * 1024;
    let name = std::any::type_name::<T>();
    assert!(peak < bound, "{codec}: {} bytes as {name} took {peak}, bound {bound}", bytes.len());
    outcome
}

fn refused<T: DeserializeOwned + Debug>(codec: Codec, bytes: &[u8]) {
    let error = frugal::<T>(codec, bytes).expect_err("hostile bytes were accepted");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{codec}: {error}");
}

/// Bytes that open 100,000 levels, for the type and the codec at hand.
fn deep(codec: Codec, msgpack: &[u8], json: &str, compact: &[u8]) -> Vec<u8> {
    match codec.name() {
        "msgpack" => msgpack.repeat(100_000),
        "json" => json.repeat(100_000).into_bytes(),
        _ => compact.repeat(100_000),
    }
}

#[test]
fn a_hundred_thousand_levels_end_at_the_limit_on_a_small_stack() {
    let _alone = alone();
    // Without a limit the first of these takes hundreds of megabytes of stack.
    let small = thread::Builder::new().stack_size(512 * 1024).spawn(|| {
        for codec in codecs() {
            refused::<Nest>(codec, &deep(codec, b"\x91", "[", &[1]));
            refused::<Shelf>(codec, &deep(codec, b"\x81\x07", "{\"7\":", &[1, 7]));
            refused::<Tree>(codec, &deep(codec, b"\x81\xa3New", "{\"New\":", &[1]));
            refused::<Tree>(codec, &deep(codec, b"\x81\xa4Pair\x92", "{\"Pair\":[", &[2]));
            refused::<Tree>(codec, &deep(codec, b"\x81\xa5Named\x81\xa4left", "{\"Named\":{\"left\":", &[3]));
            refused::<Link>(codec, &deep(codec, b"\x01", "1", &[1]));
            if describes_itself(codec) {
                refused::<serde_json::Value>(codec, &deep(codec, b"\x91", "[", &[]));
                refused::<serde_json::Value>(codec, &deep(codec, b"\x81\xa1a", "{\"a\":", &[]));
                // Fields that nobody asked for are walked through as well.
                refused::<HashMap<String, serde::de::IgnoredAny>>(codec, &deep(codec, b"\x81\xa1a", "{\"a\":", &[]));
            }
        }
    });
    small.expect("a thread can be made").join().expect("no panic, and no overflow, which would end the process");
}

fn bombs(codec: Codec) -> Vec<Vec<u8>> {
    let claims: Vec<Vec<u8>> = match codec.name() {
        // Text, bytes, list, map, extension: the longest claim, 2^32 - 1, and one of 100,000.
        "msgpack" => [0xdb, 0xc6, 0xdd, 0xdf, 0xc9]
            .into_iter()
            .flat_map(|marker| [vec![marker, 0xff, 0xff, 0xff, 0xff], vec![marker, 0x00, 0x01, 0x86, 0xa0]])
            .collect(),
        // 2^60 and 100,000.
        "postcard" => vec![[&[0x80; 8][..], &[0x10]].concat(), vec![0xa0, 0x8d, 0x06]],
        "bincode" => vec![vec![253, 0, 0, 0, 0, 0, 0, 0, 0x10], vec![252, 0xa0, 0x86, 0x01, 0x00]],
        _ => Vec::new(),
    };
    // Alone, followed by a few elements, and by many.
    let tails = [vec![], vec![1; 40], vec![1; 4000]];
    claims.iter().flat_map(|claim| tails.iter().map(move |tail| [&claim[..], tail].concat())).collect()
}

#[test]
fn a_length_that_is_only_claimed_costs_nothing() {
    let _alone = alone();
    for codec in codecs() {
        for bomb in bombs(codec) {
            refused::<String>(codec, &bomb);
            refused::<Blob>(codec, &bomb);
            refused::<Vec<u8>>(codec, &bomb);
            refused::<Vec<u64>>(codec, &bomb);
            refused::<BTreeMap<u8, u8>>(codec, &bomb);
            // What really is there takes what its type takes, which may be more than four times its bytes.
            if bomb.len() < 50 {
                refused::<Vec<Vec<Vec<u64>>>>(codec, &bomb);
                refused::<Vec<(u8, String, Vec<u8>)>>(codec, &bomb);
            }
            if bomb.len() < 10 {
                refused::<Vec<Fat>>(codec, &bomb);
                refused::<HashMap<u8, Fat>>(codec, &bomb);
            }
            if describes_itself(codec) && bomb.len() < 50 {
                refused::<serde_json::Value>(codec, &bomb);
            }
        }
    }
}

#[test]
fn claims_within_claims_do_not_add_up() {
    let _alone = alone();
    for codec in codecs() {
        let claim: &[u8] = match codec.name() {
            "msgpack" => &[0xdd, 0xff, 0xff, 0xff, 0xff],
            "postcard" => &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10],
            "bincode" => &[253, 0, 0, 0, 0, 0, 0, 0, 0x10],
            _ => continue,
        };
        for levels in 1..40 {
            refused::<Nest>(codec, &claim.repeat(levels));
        }
    }
}

#[test]
fn elements_that_take_no_room_are_counted() {
    let _alone = alone();
    for codec in codecs() {
        let claim: &[u8] = match codec.name() {
            "postcard" => &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10],
            "bincode" => &[253, 0, 0, 0, 0, 0, 0, 0, 0x10],
            _ => continue,
        };
        refused::<Vec<()>>(codec, claim);
        refused::<Vec<[u8; 0]>>(codec, claim);
        let units = vec![(); 100_000];
        assert_eq!(codec.decode::<Vec<()>>(&codec.encode(&units).unwrap()).unwrap().len(), 100_000);
        let more = codec.encode(&vec![(); 100_001]).unwrap_err();
        assert!(more.kind() == ErrorKind::Config && more.to_string().contains("100000"), "{more}");
    }
}

#[test]
fn real_text_and_bytes_stay_within_the_bound() {
    let _alone = alone();
    for codec in codecs() {
        let text = "x".repeat(1 << 20);
        let bytes = codec.encode(&text).unwrap();
        assert_eq!(frugal::<String>(codec, &bytes).unwrap(), text);
        let numbers: Vec<u64> = (0..50_000).map(|n| u64::MAX - n).collect();
        let bytes = codec.encode(&numbers).unwrap();
        assert_eq!(frugal::<Vec<u64>>(codec, &bytes).unwrap(), numbers);
        // More than 100,000 elements are fine where each of them takes a byte.
        let many = vec![7u8; 300_000];
        assert_eq!(codec.decode::<Vec<u8>>(&codec.encode(&many).unwrap()).unwrap(), many);
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Basket {
    owner: String,
    paid: Option<bool>,
    items: Vec<(u32, String)>,
    notes: BTreeMap<String, f64>,
    tree: Tree,
}

#[test]
fn random_bytes_never_panic_and_never_cost_more_than_they_may() {
    let _alone = alone();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for codec in codecs() {
        let mut accepted = 0u32;
        for _ in 0..100_000 {
            let mut bytes: Vec<u8> = (0..random() % 48).map(|_| random() as u8).collect();
            if codec.name() == "json" {
                const LIKELY: &[u8] = b"[]{}\",:0123456789.eE+-\\untrfalse ";
                bytes.iter_mut().for_each(|byte| *byte = LIKELY[*byte as usize % LIKELY.len()]);
            }
            accepted += u32::from(frugal::<Basket>(codec, &bytes).is_ok());
            accepted += u32::from(frugal::<Vec<String>>(codec, &bytes).is_ok());
            accepted += u32::from(frugal::<BTreeMap<i16, Option<f32>>>(codec, &bytes).is_ok());
            accepted += u32::from(frugal::<(Tree, char, u128)>(codec, &bytes).is_ok());
            accepted += u32::from(frugal::<Nest>(codec, &bytes).is_ok());
            if describes_itself(codec) {
                accepted += u32::from(frugal::<serde_json::Value>(codec, &bytes).is_ok());
            }
        }
        assert!(accepted > 0, "{codec}: nothing was accepted, so nothing was tried");
    }
}

#[test]
fn a_value_that_is_cut_anywhere_is_refused() {
    let _alone = alone();
    let basket = Basket {
        owner: "Ada".into(),
        paid: Some(true),
        items: vec![(1, "pen".into()), (70_000, "é".repeat(40))],
        notes: BTreeMap::from([("weight".into(), 0.3), ("".into(), f64::MIN_POSITIVE)]),
        tree: Tree::Pair(Box::new(Tree::Named { left: Box::new(Tree::New(Box::new(Tree::Leaf))) }), 9),
    };
    for codec in codecs() {
        let bytes = codec.encode(&basket).unwrap();
        assert_eq!(codec.decode::<Basket>(&bytes).unwrap(), basket, "{codec}");
        for cut in 0..bytes.len() {
            refused::<Basket>(codec, &bytes[..cut]);
        }
        refused::<Basket>(codec, &[&bytes[..], &bytes[..]].concat());
        refused::<Basket>(codec, &[&bytes[..], b"\0"].concat());
    }
}

/// A store with one record in it that somebody else wrote, and what looking at it costs.
fn look(runtime: &tokio::runtime::Runtime, record: &[u8]) -> Result<Vec<String>> {
    let handler = Arc::new(MemoryHandler::new());
    let sessions = Sessions::new(handler.clone()).unwrap();
    let id = SessionId::generate().unwrap();
    runtime.block_on(async {
        let fresh = OpenRequest::optimistic().expecting(Expect::Fresh);
        let mut open = handler.open(&id, &fresh).await.unwrap();
        let record = Record::new(record, Ttl::from_secs(60));
        assert_eq!(open.write(&record, WriteId::random().unwrap()).await.unwrap(), Written::Applied);
        open.close().await.unwrap();
    });
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let view = runtime.block_on(sessions.view(&id));
    let (peak, bound) = (ALLOCATOR.peak_usage() - before, 4 * record.len() + 64 * 1024);
    assert!(peak < bound, "a record of {} bytes took {peak}, bound {bound}", record.len());
    view.map(|view| view.keys().map(str::to_owned).collect())
}

/// An envelope of version 1 with the right checksum, so that only its claims are wrong.
fn envelope(kind: u8, codec: u8, body: &[&[u8]]) -> Vec<u8> {
    let mut bytes = [b"\xe5skv\x01", &[kind, codec, 0][..], &body.concat()].concat();
    bytes.extend(xxhash_rust::xxh3::xxh3_64(&bytes).to_le_bytes());
    bytes
}

#[test]
fn a_record_costs_what_is_in_it_and_not_what_it_claims() {
    let _alone = alone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // A stamp in the future counts as now.
    let now = i64::MAX.to_le_bytes();
    let session = |entries: &[&[u8]]| envelope(1, 1, &[&[&now[..], &now], entries].concat());
    // 100,000 and 2^48 in LEB128.
    let claims: [&[u8]; 2] = [b"\xa0\x8d\x06", b"\x80\x80\x80\x80\x80\x80\x40"];
    let mut bombs = Vec::new();
    for claim in claims {
        for tail in [0, 100, 199_999, 240_000, 1_000_000] {
            bombs.push(session(&[claim, &vec![0; tail]]));
            bombs.push(session(&[b"\x01", claim, &vec![b'k'; tail.min(90_000)]]));
            bombs.push(session(&[b"\x01\x01k", claim, &vec![0; tail.min(90_000)]]));
            bombs.push(envelope(2, 0, &[claim, &vec![0; tail.min(90_000)]]));
        }
    }
    bombs.extend([vec![0xff; 1 << 20], b"\xe5skv\x01\x01".repeat(1000), vec![]]);
    for bomb in bombs {
        assert_eq!(look(&runtime, &bomb).expect_err("a bomb was accepted").kind(), ErrorKind::Corrupt);
    }
    let mut state = 1u64;
    for round in 0..2000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let byte = [(state >> 33) as u8];
        let keys: Vec<u8> = (b'a'..=b'z').flat_map(|key| [1, key, 3, 1, 2, 3]).collect();
        let mut entries = [b"\x1a", &keys[..]].concat();
        let place = round % entries.len();
        entries.splice(place..=place, byte);
        if let Err(error) = look(&runtime, &session(&[&entries])) {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }
    // One honest megabyte.
    let text = [&b"\xdb\x00\x10\x00\x00"[..], &[b'x'; 1 << 20]].concat();
    assert_eq!(look(&runtime, &session(&[b"\x01\x01k\x85\x80\x40", &text])).unwrap(), ["k"]);
}
