//! Stored values as JSON: any value of a self-describing codec can be shown, whatever type wrote it.
//!
//! JSON knows fewer things than MessagePack: bytes become a list of numbers, a map's keys become texts, what is not a number
//! becomes null.

use std::fmt;

use serde::de::{Deserialize, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor};
use serde_json::{Map, Number, Value};

/// A stored value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Any(pub(crate) Value);

impl<'de> Deserialize<'de> for Any {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyVisitor)
    }
}

struct AnyVisitor;

impl<'de> Visitor<'de> for AnyVisitor {
    type Value = Any;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Any, E> {
        Ok(Any(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Any, E> {
        Ok(Any(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Any, E> {
        Ok(Any(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Any, E> {
        Ok(Any(Number::from_i128(value).map_or_else(|| value.to_string().into(), Value::Number)))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Any, E> {
        Ok(Any(Number::from_u128(value).map_or_else(|| value.to_string().into(), Value::Number)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Any, E> {
        Ok(Any(Number::from_f64(value).map_or(Value::Null, Value::Number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Any, E> {
        Ok(Any(value.into()))
    }

    fn visit_bytes<E>(self, value: &[u8]) -> Result<Any, E> {
        Ok(Any(value.into()))
    }

    fn visit_none<E>(self) -> Result<Any, E> {
        Ok(Any(Value::Null))
    }

    fn visit_unit<E>(self) -> Result<Any, E> {
        Ok(Any(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Any, D::Error> {
        Any::deserialize(deserializer)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Any, D::Error> {
        Any::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Any, A::Error> {
        let mut list = Vec::new();
        while let Some(Any(value)) = seq.next_element()? {
            list.push(value);
        }
        Ok(Any(list.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Any, A::Error> {
        let mut map = Map::new();
        while let Some((Any(key), Any(value))) = entries.next_entry()? {
            let key = match key {
                Value::String(text) => text,
                other => other.to_string(),
            };
            map.insert(key, value);
        }
        Ok(Any(map.into()))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<Any, A::Error> {
        let (Any(name), variant) = data.variant()?;
        let Any(content) = variant.newtype_variant()?;
        let Value::String(name) = name else { return Err(A::Error::custom("a variant without a name")) };
        Ok(Any(Map::from_iter([(name, content)]).into()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    #[test]
    fn any_json_is_itself() {
        let value = json!({"a": [1, -2, 2.5, null, true, "x"], "b": {"c": u64::MAX}});
        assert_eq!(serde_json::from_value::<Any>(value.clone()).unwrap(), Any(value));
    }

    #[test]
    fn what_json_lacks_is_shown_all_the_same() {
        let deserializer = serde::de::value::MapDeserializer::<_, serde::de::value::Error>::new(
            BTreeMap::from([(1u32, f64::NAN), (2, 0.5)]).into_iter(),
        );
        assert_eq!(Any::deserialize(deserializer).unwrap(), Any(json!({"1": null, "2": 0.5})));
        let bytes = serde::de::value::BytesDeserializer::<serde::de::value::Error>::new(&[1, 255]);
        assert_eq!(Any::deserialize(bytes).unwrap(), Any(json!([1, 255])));
    }
}
