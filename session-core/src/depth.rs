//! How deep may a value nest, and how much may it claim? One adapter that answers for every codec, in both directions.
//!
//! It stands between serde and the format and counts levels and elements as they go by. Some formats recurse on hostile
//! input until the process dies, and a type such as `struct L(Option<Box<L>>)` recurses in all of them without consuming a
//! byte; an abort cannot be caught, so it must not begin. Nothing here knows a format.

use std::cell::Cell;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess, Visitor};
use serde::ser::{self, Serialize, Serializer};

/// The levels that a value may nest: sequences, maps, structs, enums, newtypes and options count one each, a variant with
/// fields of its own two.
pub(crate) const MAX_DEPTH: u8 = 64;

/// The elements (items, entries, fields) that a value may have where they take no room. Whoever pays a byte for each may
/// have more: otherwise a list of `()` that claims 2^60 of them would keep a processor busy for years.
pub(crate) const MAX_ELEMENTS: usize = 100_000;

// A reservation that the format asks for is a claim, not a fact. Past this many elements a collection grows as they come.
const RESERVE: usize = 64;

/// What a format can express, beyond what its own serializer checks.
#[derive(Clone, Copy)]
pub(crate) struct Abilities {
    /// The bytes say what they are, so a type may ask. Where they do not, a left-out field shifts all that follow.
    pub(crate) self_describing: bool,
    /// Infinity and NaN come back as they were.
    pub(crate) every_float: bool,
}

/// Why the adapter ended the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Depth,
    Elements,
    Float,
    LeftOut,
    Asks,
}

impl Refusal {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Depth => "it nests deeper than 64 levels",
            Self::Elements => "it has more than 100000 elements",
            Self::Float => "a number in it is infinite or not a number",
            Self::LeftOut => "a field is left out (skip_serializing_if), and this format does not name its fields",
            Self::Asks => "the type asks what comes next (untagged, flatten, tag), and this format does not say",
        }
    }
}

/// The account of one encoding or decoding. It says afterwards why it was ended, so that no text of the format, which may
/// quote the value, is needed.
pub(crate) struct Guard {
    abilities: Abilities,
    elements_left: Cell<usize>,
    reserve_left: Cell<usize>,
    refusal: Cell<Option<Refusal>>,
}

impl Guard {
    /// Makes an account for reading `input` bytes.
    pub(crate) fn reading(input: usize, abilities: Abilities) -> Self {
        Self {
            abilities,
            elements_left: Cell::new(input.max(MAX_ELEMENTS)),
            reserve_left: Cell::new(input / 8),
            refusal: Cell::new(None),
        }
    }

    /// Makes an account for writing. How many elements there may be is known once they are written:
    /// [`settle`](Self::settle) must be asked.
    pub(crate) fn writing(abilities: Abilities) -> Self {
        Self { abilities, elements_left: Cell::new(usize::MAX), reserve_left: Cell::new(0), refusal: Cell::new(None) }
    }

    /// Puts the adapter around `inner`, at the top level.
    pub(crate) fn watch<X>(&self, inner: X) -> Watched<'_, X> {
        Watched { inner, level: Level { left: MAX_DEPTH, guard: self } }
    }

    /// Returns why the adapter ended the work, if it did.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.refusal.get()
    }

    /// Refuses what was written as `output` bytes and could not be read again.
    pub(crate) fn settle(&self, output: usize) -> Result<(), Refusal> {
        let elements = usize::MAX - self.elements_left.get();
        if elements > output.max(MAX_ELEMENTS) { Err(Refusal::Elements) } else { Ok(()) }
    }

    fn refuse(&self, why: Refusal) -> &'static str {
        self.refusal.set(Some(why));
        why.as_str()
    }

    fn count(&self) -> Result<(), &'static str> {
        match self.elements_left.get().checked_sub(1) {
            Some(left) => {
                self.elements_left.set(left);
                Ok(())
            }
            None => Err(self.refuse(Refusal::Elements)),
        }
    }

    fn reserve(&self, claim: usize) -> usize {
        let left = self.reserve_left.get();
        let granted = claim.min(RESERVE).min(left);
        self.reserve_left.set(left - granted);
        granted
    }
}

#[derive(Clone, Copy)]
struct Level<'g> {
    left: u8,
    guard: &'g Guard,
}

impl<'g> Level<'g> {
    fn put<X>(self, inner: X) -> Watched<'g, X> {
        Watched { inner, level: self }
    }

    fn down(self, levels: u8) -> Result<Self, &'static str> {
        match self.left.checked_sub(levels) {
            Some(left) => Ok(Self { left, ..self }),
            None => Err(self.guard.refuse(Refusal::Depth)),
        }
    }
}

/// A deserializer, visitor, access, seed, serializer or value, with the level that it works on.
#[derive(Clone, Copy)]
pub(crate) struct Watched<'g, X> {
    inner: X,
    level: Level<'g>,
}

macro_rules! read {
    ($($method:ident($($arg:ident: $type:ty),*))*) => {$(
        fn $method<V: Visitor<'de>>(self, $($arg: $type,)* visitor: V) -> Result<V::Value, D::Error> {
            self.inner.$method($($arg,)* self.level.put(visitor))
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Watched<'_, D> {
    type Error = D::Error;

    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        if !self.level.guard.abilities.self_describing {
            return Err(de::Error::custom(self.level.guard.refuse(Refusal::Asks)));
        }
        self.inner.deserialize_any(self.level.put(visitor))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        if !self.level.guard.abilities.self_describing {
            return Err(de::Error::custom(self.level.guard.refuse(Refusal::Asks)));
        }
        self.inner.deserialize_ignored_any(self.level.put(visitor))
    }

    // Owned text and bytes are asked for as borrowed ones: what borrows finds the claimed length in the input before anything
    // is reserved, and every visitor of owned text takes a borrowed one too.
    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.deserialize_bytes(visitor)
    }

    read! {
        deserialize_bool() deserialize_char() deserialize_str() deserialize_bytes()
        deserialize_i8() deserialize_i16() deserialize_i32() deserialize_i64() deserialize_i128()
        deserialize_u8() deserialize_u16() deserialize_u32() deserialize_u64() deserialize_u128()
        deserialize_f32() deserialize_f64()
        deserialize_option() deserialize_unit() deserialize_seq() deserialize_map() deserialize_identifier()
        deserialize_unit_struct(name: &'static str)
        deserialize_newtype_struct(name: &'static str)
        deserialize_tuple(len: usize)
        deserialize_tuple_struct(name: &'static str, len: usize)
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
        deserialize_enum(name: &'static str, variants: &'static [&'static str])
    }
}

macro_rules! visit {
    ($($method:ident($type:ty))*) => {$(
        fn $method<E: de::Error>(self, value: $type) -> Result<V::Value, E> {
            self.inner.$method(value)
        }
    )*};
}

// Every way down leads through a visitor, so this is the only place that counts levels.
impl<'de, V: Visitor<'de>> Visitor<'de> for Watched<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    visit! {
        visit_bool(bool) visit_char(char)
        visit_i8(i8) visit_i16(i16) visit_i32(i32) visit_i64(i64) visit_i128(i128)
        visit_u8(u8) visit_u16(u16) visit_u32(u32) visit_u64(u64) visit_u128(u128)
        visit_f32(f32) visit_f64(f64)
        visit_str(&str) visit_borrowed_str(&'de str) visit_string(String)
        visit_bytes(&[u8]) visit_borrowed_bytes(&'de [u8]) visit_byte_buf(Vec<u8>)
    }

    fn visit_none<E: de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_unit<E: de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        let level = self.level.down(1).map_err(de::Error::custom)?;
        self.inner.visit_some(level.put(inner))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        let level = self.level.down(1).map_err(de::Error::custom)?;
        self.inner.visit_newtype_struct(level.put(inner))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let level = self.level.down(1).map_err(de::Error::custom)?;
        self.inner.visit_seq(level.put(access))
    }

    fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let level = self.level.down(1).map_err(de::Error::custom)?;
        self.inner.visit_map(level.put(access))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let level = self.level.down(1).map_err(de::Error::custom)?;
        self.inner.visit_enum(level.put(access))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Watched<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.inner.deserialize(self.level.put(deserializer))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Watched<'_, A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        let next = self.inner.next_element_seed(self.level.put(seed))?;
        if next.is_some() {
            self.level.guard.count().map_err(de::Error::custom)?;
        }
        Ok(next)
    }

    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint().map(|claim| self.level.guard.reserve(claim))
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Watched<'_, A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        let next = self.inner.next_key_seed(self.level.put(seed))?;
        if next.is_some() {
            self.level.guard.count().map_err(de::Error::custom)?;
        }
        Ok(next)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.inner.next_value_seed(self.level.put(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint().map(|claim| self.level.guard.reserve(claim))
    }
}

impl<'de, 'g, A: EnumAccess<'de>> EnumAccess<'de> for Watched<'g, A> {
    type Error = A::Error;
    type Variant = Watched<'g, A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), A::Error> {
        let (value, variant) = self.inner.variant_seed(self.level.put(seed))?;
        Ok((value, self.level.put(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Watched<'_, A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.inner.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        self.inner.newtype_variant_seed(self.level.put(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.inner.tuple_variant(len, self.level.put(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, A::Error> {
        self.inner.struct_variant(fields, self.level.put(visitor))
    }
}

impl<T: Serialize + ?Sized> Serialize for Watched<'_, &T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.inner.serialize(self.level.put(serializer))
    }
}

macro_rules! write {
    ($($method:ident($($arg:ident: $type:ty),*))*) => {$(
        fn $method(self, $($arg: $type),*) -> Result<S::Ok, S::Error> {
            self.inner.$method($($arg),*)
        }
    )*};
}

macro_rules! begin {
    ($($method:ident -> $compound:ident, $levels:literal, ($($arg:ident: $type:ty),*))*) => {$(
        fn $method(self, $($arg: $type),*) -> Result<Self::$compound, S::Error> {
            let level = self.level.down($levels).map_err(ser::Error::custom)?;
            Ok(level.put(self.inner.$method($($arg),*)?))
        }
    )*};
}

impl<'g, S: Serializer> Serializer for Watched<'g, S> {
    type Ok = S::Ok;
    type Error = S::Error;
    type SerializeSeq = Watched<'g, S::SerializeSeq>;
    type SerializeTuple = Watched<'g, S::SerializeTuple>;
    type SerializeTupleStruct = Watched<'g, S::SerializeTupleStruct>;
    type SerializeTupleVariant = Watched<'g, S::SerializeTupleVariant>;
    type SerializeMap = Watched<'g, S::SerializeMap>;
    type SerializeStruct = Watched<'g, S::SerializeStruct>;
    type SerializeStructVariant = Watched<'g, S::SerializeStructVariant>;

    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }

    write! {
        serialize_bool(value: bool) serialize_char(value: char) serialize_str(value: &str) serialize_bytes(value: &[u8])
        serialize_i8(value: i8) serialize_i16(value: i16) serialize_i32(value: i32) serialize_i64(value: i64)
        serialize_u8(value: u8) serialize_u16(value: u16) serialize_u32(value: u32) serialize_u64(value: u64)
        serialize_i128(value: i128) serialize_u128(value: u128)
        serialize_none() serialize_unit() serialize_unit_struct(name: &'static str)
    }

    // Read back, a variant without fields is a level like any other.
    fn serialize_unit_variant(self, name: &'static str, index: u32, variant: &'static str) -> Result<S::Ok, S::Error> {
        self.level.down(1).map_err(ser::Error::custom)?;
        self.inner.serialize_unit_variant(name, index, variant)
    }

    fn serialize_f32(self, value: f32) -> Result<S::Ok, S::Error> {
        if !value.is_finite() && !self.level.guard.abilities.every_float {
            return Err(ser::Error::custom(self.level.guard.refuse(Refusal::Float)));
        }
        self.inner.serialize_f32(value)
    }

    fn serialize_f64(self, value: f64) -> Result<S::Ok, S::Error> {
        if !value.is_finite() && !self.level.guard.abilities.every_float {
            return Err(ser::Error::custom(self.level.guard.refuse(Refusal::Float)));
        }
        self.inner.serialize_f64(value)
    }

    fn collect_str<T: fmt::Display + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.inner.collect_str(value)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        let level = self.level.down(1).map_err(ser::Error::custom)?;
        self.inner.serialize_some(&level.put(value))
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, name: &'static str, value: &T) -> Result<S::Ok, S::Error> {
        let level = self.level.down(1).map_err(ser::Error::custom)?;
        self.inner.serialize_newtype_struct(name, &level.put(value))
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        let level = self.level.down(1).map_err(ser::Error::custom)?;
        level.guard.count().map_err(ser::Error::custom)?;
        self.inner.serialize_newtype_variant(name, index, variant, &level.put(value))
    }

    begin! {
        serialize_seq -> SerializeSeq, 1, (len: Option<usize>)
        serialize_tuple -> SerializeTuple, 1, (len: usize)
        serialize_tuple_struct -> SerializeTupleStruct, 1, (name: &'static str, len: usize)
        serialize_tuple_variant -> SerializeTupleVariant, 2,
            (name: &'static str, index: u32, variant: &'static str, len: usize)
        serialize_map -> SerializeMap, 1, (len: Option<usize>)
        serialize_struct -> SerializeStruct, 1, (name: &'static str, len: usize)
        serialize_struct_variant -> SerializeStructVariant, 2,
            (name: &'static str, index: u32, variant: &'static str, len: usize)
    }
}

macro_rules! items {
    ($($trait:ident.$method:ident)*) => {$(
        impl<S: ser::$trait> ser::$trait for Watched<'_, S> {
            type Ok = S::Ok;
            type Error = S::Error;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), S::Error> {
                self.level.guard.count().map_err(ser::Error::custom)?;
                self.inner.$method(&self.level.put(value))
            }

            fn end(self) -> Result<S::Ok, S::Error> {
                self.inner.end()
            }
        }
    )*};
}

items! {
    SerializeSeq.serialize_element
    SerializeTuple.serialize_element
    SerializeTupleStruct.serialize_field
    SerializeTupleVariant.serialize_field
}

macro_rules! fields {
    ($($trait:ident)*) => {$(
        impl<S: ser::$trait> ser::$trait for Watched<'_, S> {
            type Ok = S::Ok;
            type Error = S::Error;

            fn serialize_field<T: Serialize + ?Sized>(&mut self, key: &'static str, value: &T) -> Result<(), S::Error> {
                self.level.guard.count().map_err(ser::Error::custom)?;
                self.inner.serialize_field(key, &self.level.put(value))
            }

            fn skip_field(&mut self, key: &'static str) -> Result<(), S::Error> {
                if !self.level.guard.abilities.self_describing {
                    return Err(ser::Error::custom(self.level.guard.refuse(Refusal::LeftOut)));
                }
                self.inner.skip_field(key)
            }

            fn end(self) -> Result<S::Ok, S::Error> {
                self.inner.end()
            }
        }
    )*};
}

fields! { SerializeStruct SerializeStructVariant }

impl<S: ser::SerializeMap> ser::SerializeMap for Watched<'_, S> {
    type Ok = S::Ok;
    type Error = S::Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), S::Error> {
        self.level.guard.count().map_err(ser::Error::custom)?;
        self.inner.serialize_key(&self.level.put(key))
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), S::Error> {
        self.inner.serialize_value(&self.level.put(value))
    }

    fn serialize_entry<K, V>(&mut self, key: &K, value: &V) -> Result<(), S::Error>
    where
        K: Serialize + ?Sized,
        V: Serialize + ?Sized,
    {
        self.level.guard.count().map_err(ser::Error::custom)?;
        self.inner.serialize_entry(&self.level.put(key), &self.level.put(value))
    }

    fn end(self) -> Result<S::Ok, S::Error> {
        self.inner.end()
    }
}
