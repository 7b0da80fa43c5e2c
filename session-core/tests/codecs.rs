//! Does every codec give back what it was given, and refuse what it could not give back?

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::Debug;
use std::net::IpAddr;

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use session_core::{Codec, Error, ErrorKind, ValueCodec};

const NAMES: [&str; 4] = ["msgpack", "json", "postcard", "bincode"];

fn codecs() -> impl Iterator<Item = Codec> {
    NAMES.into_iter().filter_map(|name| Codec::from_name(name).ok())
}

fn describes_itself(codec: Codec) -> bool {
    matches!(codec.name(), "msgpack" | "json")
}

/// One of everything that serde knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Tree {
    Unit,
    Bool(bool),
    Char(char),
    Signed(i64),
    Wide(i128, u128),
    Float(f64),
    Short { single: f32, small: i8, big: u32 },
    Text(String),
    Address(IpAddr),
    Maybe(Option<Box<Self>>),
    List(Vec<Self>),
    Map(BTreeMap<String, Self>),
    Numbered(BTreeMap<i16, Self>),
    Array([u16; 3], ()),
    Inner(Inner),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Inner {
    #[serde(default)]
    wrapped: Wrapped,
    tuple: (u8, String),
    #[serde(skip)]
    scratch: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Wrapped(Option<String>);

fn trees() -> impl Strategy<Value = Tree> {
    let finite = any::<f64>().prop_filter("JSON has no other", |float| float.is_finite());
    let single = any::<f32>().prop_filter("JSON has no other", |float| float.is_finite());
    let leaf = prop_oneof![
        Just(Tree::Unit),
        any::<bool>().prop_map(Tree::Bool),
        any::<char>().prop_map(Tree::Char),
        any::<i64>().prop_map(Tree::Signed),
        (any::<i128>(), any::<u128>()).prop_map(|(signed, unsigned)| Tree::Wide(signed, unsigned)),
        finite.prop_map(Tree::Float),
        (single, any::<i8>(), any::<u32>()).prop_map(|(single, small, big)| Tree::Short { single, small, big }),
        any::<String>().prop_map(Tree::Text),
        any::<IpAddr>().prop_map(Tree::Address),
        any::<[u16; 3]>().prop_map(|array| Tree::Array(array, ())),
        (any::<Option<String>>(), any::<(u8, String)>()).prop_map(|(text, tuple)| Tree::Inner(Inner {
            wrapped: Wrapped(text),
            tuple,
            scratch: 0
        })),
    ];
    leaf.prop_recursive(40, 120, 6, |tree| {
        prop_oneof![
            prop::option::of(tree.clone()).prop_map(|tree| Tree::Maybe(tree.map(Box::new))),
            prop::collection::vec(tree.clone(), 0..6).prop_map(Tree::List),
            prop::collection::btree_map(any::<String>(), tree.clone(), 0..6).prop_map(Tree::Map),
            prop::collection::btree_map(any::<i16>(), tree, 0..6).prop_map(Tree::Numbered),
        ]
    })
}

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(codec: Codec, value: &T) -> Result<(), Error> {
    let bytes = codec.encode(value)?;
    assert_eq!(&codec.decode::<T>(&bytes)?, value, "{codec}");
    Ok(())
}

proptest! {
    #[test]
    fn what_is_accepted_comes_back(tree in trees()) {
        for codec in codecs() {
            match round_trip(codec, &tree) {
                Ok(()) => {}
                Err(error) => prop_assert!(error.operation() == "encode" && error.to_string().contains("deeper"), "{error}"),
            }
        }
    }

    #[test]
    fn every_number_comes_back_to_the_bit(bits in any::<u64>(), wide in any::<u128>()) {
        for codec in codecs() {
            let float = f64::from_bits(bits);
            if float.is_finite() {
                let back: f64 = codec.decode(&codec.encode(&float).unwrap()).unwrap();
                prop_assert_eq!(back.to_bits(), float.to_bits());
            }
            let single = f32::from_bits(bits as u32);
            if single.is_finite() {
                let back: f32 = codec.decode(&codec.encode(&single).unwrap()).unwrap();
                prop_assert_eq!(back.to_bits(), single.to_bits());
            }
            round_trip(codec, &(bits, bits as i64, bits as i16, wide, wide as i128)).unwrap();
        }
    }

    #[test]
    fn damaged_bytes_are_refused_or_read_but_never_end_the_process(
        tree in trees(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        for codec in codecs() {
            let Ok(mut bytes) = codec.encode(&tree) else { continue };
            for (place, byte) in &damage {
                let place = place.index(bytes.len());
                bytes[place] = *byte;
            }
            if let Err(error) = codec.decode::<Tree>(&bytes) {
                prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
            }
        }
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Nest(Vec<Self>);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Chain {
    End,
    Link { next: Box<Self> },
}

#[test]
fn what_is_too_deep_to_read_is_not_written() {
    for codec in codecs() {
        for depth in 0..200 {
            // A newtype and a list: two levels.
            let nest = (0..depth).fold(Nest(Vec::new()), |inner, _| Nest(vec![inner]));
            let outcome = round_trip(codec, &nest);
            assert_eq!(outcome.is_ok(), depth < 32, "{codec}: {depth}: {outcome:?}");
            // An enum and its fields: two levels.
            let chain = (0..depth).fold(Chain::End, |next, _| Chain::Link { next: Box::new(next) });
            match round_trip(codec, &chain) {
                Ok(()) => assert!(depth <= 32, "{codec}: {depth}"),
                Err(error) => {
                    assert!(depth >= 32, "{codec}: {depth}: {error}");
                    let text = format!("encode: value cannot be expressed in {codec}: it nests deeper than 64 levels");
                    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Config, text));
                }
            }
        }
    }
}

#[test]
fn a_value_that_serde_buffers_is_read_at_every_depth_that_was_written() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Loose {
        Number(u8),
        List(Vec<Self>),
        Tagged { inner: Tagged },
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "type")]
    enum Tagged {
        End,
        Next { next: Box<Self>, loose: Box<Loose> },
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Flat {
        #[serde(flatten)]
        rest: BTreeMap<String, Loose>,
    }
    for codec in codecs().filter(|codec| describes_itself(*codec)) {
        let mut written = 0;
        for depth in 0..80 {
            let list = (0..depth).fold(Loose::Number(1), |inner, _| Loose::List(vec![inner]));
            let tagged = (0..depth).fold(Tagged::End, |next, _| Tagged::Next {
                next: Box::new(next),
                loose: Box::new(Loose::List(vec![Loose::Number(1)])),
            });
            let flat =
                Flat { rest: BTreeMap::from([("list".into(), list), ("inner".into(), Loose::Tagged { inner: tagged })]) };
            match round_trip(codec, &flat) {
                Ok(()) => written += 1,
                Err(error) => assert_eq!(error.operation(), "encode", "{codec}: {depth}: {error}"),
            }
        }
        assert!((40..64).contains(&written), "{codec}: {written}");
    }
}

#[test]
fn what_a_format_would_lose_it_refuses() {
    #[derive(Serialize, Deserialize, Debug, PartialEq)]
    struct Sparse {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        nick: Option<String>,
        age: u8,
    }
    #[derive(Serialize, Deserialize, Debug, PartialEq)]
    #[serde(untagged)]
    enum Loose {
        Number(u8),
    }
    for codec in codecs() {
        let name = codec.name();
        let refused = |outcome: Result<(), Error>, reason: &str| {
            let error = outcome.expect_err("it was lost");
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
            assert!(error.to_string().contains(name) && error.to_string().contains(reason), "{error}");
        };
        let sparse = round_trip(codec, &Sparse { nick: None, age: 36 });
        let loose = round_trip(codec, &Loose::Number(7));
        if describes_itself(codec) {
            sparse.and(loose).unwrap();
        } else {
            refused(sparse, "skip_serializing_if");
            refused(loose, "untagged");
        }
        for float in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let (double, single) = (codec.encode(&vec![Some(float)]), codec.encode(&(float as f32)));
            if name == "json" {
                refused(double.map(drop), "not a number");
                refused(single.map(drop), "not a number");
            } else {
                let back: Vec<Option<f64>> = codec.decode(&double.unwrap()).unwrap();
                assert_eq!(back[0].unwrap().to_bits(), float.to_bits());
                assert_eq!(codec.decode::<f32>(&single.unwrap()).unwrap().is_nan(), float.is_nan());
            }
        }
        if name == "json" {
            refused(codec.encode(&BTreeMap::from([((1, 2), 3)])).map(drop), "cannot be expressed");
        } else {
            round_trip(codec, &BTreeMap::from([((1, 2), 3)])).unwrap();
        }
    }
}

#[test]
fn a_struct_of_a_self_describing_format_may_gain_and_lose_fields() {
    #[derive(Serialize)]
    struct Old {
        name: &'static str,
        dropped: Vec<u8>,
    }
    #[derive(Deserialize, Debug, PartialEq)]
    struct New {
        #[serde(default)]
        added: Option<u8>,
        name: String,
    }
    for codec in codecs().filter(|codec| describes_itself(*codec)) {
        let bytes = codec.encode(&Old { name: "Ada", dropped: vec![1, 2] }).unwrap();
        assert_eq!(codec.decode::<New>(&bytes).unwrap(), New { added: None, name: "Ada".into() });
    }
}

#[test]
fn an_error_quotes_nothing_of_the_value() {
    struct Chatty;
    impl Serialize for Chatty {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("hunter2 cannot be serialized"))
        }
    }
    #[derive(Serialize)]
    struct Login {
        password: String,
        hunter2: u32,
    }
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "nothing is ever read into it")]
    struct Strict {
        password: u8,
    }
    let login = Login { password: "hunter2".into(), hunter2: 4_000_000_000 };
    for codec in codecs() {
        let bytes = codec.encode(&login).unwrap();
        let errors = [
            codec.encode(&Chatty).unwrap_err(),
            codec.decode::<Strict>(&bytes).unwrap_err(),
            codec.decode::<BTreeMap<u8, u8>>(&bytes).unwrap_err(),
            codec.decode::<char>(&bytes).unwrap_err(),
            codec.decode::<bool>(&codec.encode("hunter2").unwrap()).unwrap_err(),
        ];
        for error in errors {
            assert!(error.source().is_none());
            let text = format!("{error} {error:?}");
            assert!(!text.contains("hunter2") && !text.contains("4000000000"), "{codec}: {text}");
            assert!(text.contains(codec.name()), "{text}");
        }
    }
}

#[test]
fn no_codec_reads_what_another_one_wrote() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Visit {
        id: u64,
        name: String,
        tags: Vec<Option<i32>>,
    }
    let visit = Visit { id: 70_000, name: "Ada".into(), tags: vec![Some(-300), None, Some(1)] };
    for writer in codecs() {
        let bytes = writer.encode(&visit).unwrap();
        for reader in codecs().filter(|reader| *reader != writer) {
            let error = reader.decode::<Visit>(&bytes).expect_err("a fallback");
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains(reader.name()) && !error.to_string().contains(writer.name()), "{error}");
        }
    }
}

#[test]
fn a_type_decides_by_the_format_whether_a_person_reads_it() {
    let address: IpAddr = "127.0.0.1".parse().unwrap();
    for codec in codecs() {
        let bytes = codec.encode(&address).unwrap();
        assert_eq!(bytes == b"\"127.0.0.1\"", codec.name() == "json", "{codec}");
        round_trip(codec, &address).unwrap();
    }
}

#[test]
fn a_codec_has_one_number_and_one_name() {
    assert_eq!(Codec::default(), Codec::MessagePack);
    for (name, id) in NAMES.into_iter().zip(1u8..) {
        match (Codec::from_name(name), Codec::from_id(id)) {
            (Ok(named), Ok(numbered)) => assert_eq!((named, named.id(), named.name()), (numbered, id, name)),
            (Err(named), Err(numbered)) => {
                assert_eq!((named.kind(), numbered.kind()), (ErrorKind::Config, ErrorKind::Corrupt));
                for text in [named.to_string(), numbered.to_string()] {
                    assert!(text.contains(&format!("the Cargo feature {name}")), "{text}");
                }
            }
            (named, numbered) => panic!("{name} is known by one of its names: {named:?}, {numbered:?}"),
        }
    }
    for id in (0..=u8::MAX).filter(|id| !(1..=4).contains(id)) {
        assert_eq!(Codec::from_id(id).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    let error = Codec::from_name("yaml\u{1b}").unwrap_err();
    assert_eq!(error.to_string(), "codec: yaml\\u{1b} is not one of msgpack, json, postcard, bincode");
}
