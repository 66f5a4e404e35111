//! A JSON reader with the rules of Go's encoding/json, by which docker, containerd and podman read the documents of
//! images.
//!
//! A key matches a field in upper or lower case. The keys of an object apply in the order of the document: the last value
//! of a field counts, except that two objects are merged. null is the empty value of every type, in lists too. Invalid
//! UTF-8 and unpaired surrogates are replaced.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, de, forward_to_deserialize_any};
use serde_json::{Error, Number};
use std::collections::BTreeMap;
use std::fmt::{self, Formatter};

/// Parses a document. The names of fields in `T` are in lower case.
pub(crate) fn parse<T: DeserializeOwned>(document: &[u8]) -> Result<T, Error> {
    let value: Value = serde_json::from_str(&with_paired_surrogates(&decode(document)))?;
    T::deserialize(value)
}

/// Decodes UTF-8. Each byte that is no part of a character becomes U+FFFD.
fn decode(document: &[u8]) -> String {
    let mut text = String::with_capacity(document.len());
    for chunk in document.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    text
}

/// Replaces the escapes of unpaired surrogates, which serde_json refuses, with U+FFFD.
fn with_paired_surrogates(mut rest: &str) -> String {
    let mut text = String::with_capacity(rest.len());
    while let Some(at) = rest.find('\\') {
        let escape = &rest[at..];
        text.push_str(&rest[..at]);
        let is_pair = |high| high < 0xdc00 && surrogate(&escape[6..]).is_some_and(|low| low >= 0xdc00);
        let length = match surrogate(escape) {
            Some(high) if is_pair(high) => 12,
            Some(_) => 6,
            None => escape.chars().take(2).map(char::len_utf8).sum(),
        };
        text.push_str(if length == 6 { "\u{fffd}" } else { &escape[..length] });
        rest = &escape[length..];
    }
    text + rest
}

/// The surrogate whose escape a text begins with.
fn surrogate(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    u16::from_str_radix(digits, 16).ok().filter(|code| (0xd800..0xe000).contains(code))
}

/// A value, with the keys of objects in the order of the document.
#[derive(Debug)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    List(Vec<Value>),
    Object(Vec<(String, Value)>),
}

impl Value {
    /// Replaces the value of a field with one that follows in the document.
    fn replace_with(&mut self, new: Self) {
        match (self, new) {
            (Self::Object(old), Self::Object(new)) => old.extend(new),
            (Self::Bool(_) | Self::Number(_) | Self::String(_), Self::Null) => {}
            (old, new) => *old = new,
        }
    }
}

/// The values of the fields with these names.
fn fields(
    object: Vec<(String, Value)>,
    names: &'static [&'static str],
) -> impl Iterator<Item = (&'static str, Value)> {
    let mut fields = BTreeMap::new();
    for (key, value) in object {
        let key = fold(&key);
        if let Some(name) = names.iter().find(|name| **name == key) {
            fields.entry(*name).or_insert(Value::Null).replace_with(value);
        }
    }
    fields.into_iter()
}

/// Converts a key to lower case. `ſ` is the only character besides `S` that is equal to `s` but for its case.
fn fold(key: &str) -> String {
    key.to_lowercase().replace('ſ', "s")
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_any(AnyValue)
    }
}

#[derive(Debug)]
struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Number(number.into()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Number(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Number::from_f64(number).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::String(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut input: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = input.next_element()? {
            list.push(value);
        }
        // A document may consist of millions of short lists and objects.
        list.shrink_to_fit();
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut input: A) -> Result<Value, A::Error> {
        let mut object = Vec::new();
        while let Some(entry) = input.next_entry()? {
            object.push(entry);
        }
        object.shrink_to_fit();
        Ok(Value::Object(object))
    }
}

impl IntoDeserializer<'_, Error> for Value {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Value {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Self::Null => visitor.visit_unit(),
            Self::Bool(value) => visitor.visit_bool(value),
            Self::Number(number) => number.deserialize_any(visitor),
            Self::String(text) => visitor.visit_string(text),
            Self::List(list) => visitor.visit_seq(SeqDeserializer::new(list.into_iter())),
            Self::Object(object) => visitor.visit_map(MapDeserializer::new(object.into_iter())),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if matches!(self, Self::Null) { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if matches!(self, Self::Null) { visitor.visit_str("") } else { self.deserialize_any(visitor) }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let value = if matches!(self, Self::Null) { Self::List(Vec::new()) } else { self };
        value.deserialize_any(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let value = if matches!(self, Self::Null) { Self::Object(Vec::new()) } else { self };
        value.deserialize_any(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self {
            Self::Null => visitor.visit_map(MapDeserializer::new(fields(Vec::new(), names))),
            Self::Object(object) => visitor.visit_map(MapDeserializer::new(fields(object, names))),
            // Without this, serde would take a list for the fields in their order.
            Self::List(_) => Err(de::Error::invalid_type(Unexpected::Seq, &visitor)),
            other => other.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str bytes byte_buf unit unit_struct newtype_struct
        tuple tuple_struct enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct Inner {
        user: String,
        task: Option<Vec<String>>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct Outer {
        inner: Inner,
        list: Vec<Inner>,
        map: BTreeMap<String, String>,
    }

    fn inner(text: &str) -> Inner {
        parse(text.as_bytes()).unwrap()
    }

    fn user(text: &str) -> String {
        inner(text).user
    }

    #[test]
    fn the_last_key_in_the_document_counts() {
        for text in [
            r#"{"user":"a","USER":"b"}"#,
            r#"{"USER":"a","user":"b"}"#,
            r#"{"User":"a","user":"c","USER":"b"}"#,
            r#"{"user":"b","USER":null}"#,
            r#"{"uſer":"b"}"#,
            r#"{"user":"a","uſer":"b","x":[{"user":1}]}"#,
        ] {
            assert_eq!(user(text), "b", "{text}");
        }
        let words = |text| inner(text).task;
        assert_eq!(words(r#"{"task":["a"],"TASK":null}"#), None);
        assert_eq!(words(r#"{"task":["a","b"],"TASK":["c"]}"#), Some(vec!["c".to_owned()]));
        // U+212A, the sign of the unit kelvin.
        assert_eq!(words("{\"tas\u{212a}\":[]}"), Some(vec![]));
    }

    #[test]
    fn objects_are_merged_and_keys_of_maps_are_kept() {
        let outer: Outer = parse(
            br#"{"inner":{"user":"a","task":["x"]},"Inner":{"USER":"b"},"map":{"Ab":"1","aB":"2"},"MAP":{"aB":"3"}}"#,
        )
        .unwrap();
        assert_eq!(outer.inner, Inner { user: "b".into(), task: Some(vec!["x".into()]) });
        assert_eq!(
            outer.map,
            [("Ab", "1"), ("aB", "3")].map(|(key, value)| (key.into(), value.into())).into()
        );
    }

    #[test]
    fn null_is_the_empty_value() {
        let outer: Outer =
            parse(br#"{"inner":null,"list":[null,{"task":[null]}],"map":{"a":null}}"#).unwrap();
        let expected = Outer {
            list: vec![Inner::default(), Inner { task: Some(vec![String::new()]), ..Inner::default() }],
            map: [("a".into(), String::new())].into(),
            ..Outer::default()
        };
        assert_eq!(outer, expected);
        assert_eq!(parse::<Outer>(br#"{"list":null,"map":null}"#).unwrap(), Outer::default());
        assert_eq!(parse::<Outer>(b"null").unwrap(), Outer::default());
        for wrong in
            ["[]", "7", r#"{"list":{}}"#, r#"{"list":[[]]}"#, r#"{"inner":""}"#, r#"{"map":[]}"#, "{"]
        {
            assert!(parse::<Outer>(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn invalid_text_is_replaced() {
        for (text, expected) in [
            (r"\ud83d\ude00", "😀"),
            (r"\ud83d", "\u{fffd}"),
            (r"\ude00\ud83d", "\u{fffd}\u{fffd}"),
            (r"\ud83d\ud83d\ude00", "\u{fffd}😀"),
            (r"\ud83d\u0041\\ud83d", "\u{fffd}A\\ud83d"),
            (r"\ud83dé", "\u{fffd}é"),
            (r#"\"\\\ud83d"#, "\"\\\u{fffd}"),
        ] {
            assert_eq!(user(&format!("{{\"user\":\"{text}\"}}")), expected, "{text}");
        }
        // The bytes of a truncated character, one that begins none, and those of a surrogate.
        let document = b"{\"user\":\"a\xe2\x82b\xff\xed\xa0\x80\"}";
        let expected = format!("a{}b{}", "\u{fffd}".repeat(2), "\u{fffd}".repeat(4));
        assert_eq!(parse::<Inner>(document).unwrap().user, expected);
        for wrong in ["{\"user\":\"\\", "{\"user\":\"\\é\"}", "{\"user\":\"\\ud83", "\u{fffd}", "{}\\ud800"]
        {
            assert!(parse::<Inner>(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
