//! What do bytes cost that somebody made up? Time, stack and memory must follow from their number, not from what they claim.
//!
//! The allocator counts, so one test runs at a time.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard};
use std::thread;

use peak_alloc::PeakAlloc;
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use session_core::{Codec, ErrorKind, Result, ValueCodec};

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
