//! Fitting a request's JSON to a built-in kind's struct: types, unknown and duplicate fields, canonical quantities and times.
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::quantity::Quantity;
use crate::resource::Resource;
use crate::types::{self, Shape, TypeId};

/// Findings beyond these are not told, as upstream: a body of nothing else would make an answer many times its size.
const MAX_FINDINGS: usize = 100;

/// Adds one more finding, unless there are enough.
pub(crate) fn find(findings: &mut Vec<String>, finding: impl FnOnce() -> String) {
    if findings.len() < MAX_FINDINGS {
        findings.push(finding());
    }
}

/// What a decode found besides errors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decoded {
    /// Paths of fields that the kind has not; they were dropped. `spec.foo`, `spec.containers[0].bar`.
    pub unknown: Vec<String>,
}

impl Decoded {
    /// `unknown field "spec.foo"` per finding: the texts of warnings, and of `strict decoding error: a, b`.
    pub fn warnings(&self) -> Vec<String> {
        self.unknown.iter().map(|path| format!("unknown field \"{path}\"")).collect()
    }
}

/// Fits a built-in kind's body to its struct: drops unknown fields, nulls and zero values that Go would not write, adds those it would, makes quantities and times canonical. The error is Go's
/// text, without the kind in front. `kind` and `apiVersion` are not compared with the resource.
pub fn decode(resource: &Resource, object: &mut Value) -> Result<Decoded, String> {
    decode_as(&resource.group, &resource.version, &resource.kind, object)
}

/// The same for bodies of subresources and options: `("policy", "v1", "Eviction")`.
pub fn decode_as(group: &str, version: &str, kind: &str, object: &mut Value) -> Result<Decoded, String> {
    let Some(root) = types::by_kind(group, version, kind) else { return Ok(Decoded::default()) };
    let mut walk = Walk { path: String::new(), owner: root.id, found: Decoded::default() };
    walk.structure(root.id, object)?;
    Ok(walk.found)
}

/// Fits the `metadata` of an object of any kind, whose own path is `prefix` ("" for the root), to ObjectMeta.
pub fn decode_metadata(object: &mut Value, prefix: &str) -> Result<Decoded, String> {
    let Some(root) = types::graph().by_name("meta/v1", "ObjectMeta") else { return Ok(Decoded::default()) };
    let path = if prefix.is_empty() { "metadata".to_string() } else { format!("{prefix}.metadata") };
    let mut walk = Walk { path, owner: root.id, found: Decoded::default() };
    if let Some(metadata) = object.get_mut("metadata") {
        walk.structure(root.id, metadata)?;
    }
    Ok(walk.found)
}

struct Walk {
    path: String,
    /// The struct whose field is being read, for messages.
    owner: TypeId,
    found: Decoded,
}

impl Walk {
    fn structure(&mut self, id: TypeId, value: &mut Value) -> Result<(), String> {
        let found = &types::graph().types[id];
        let Value::Object(map) = value else { return Err(self.mismatch(value, &format!("v1.{}", found.name))) };
        let outer = std::mem::replace(&mut self.owner, id);
        let mut dropped = HashSet::new();
        for (key, item) in map.iter_mut() {
            let length = self.enter(key);
            match found.field(key) {
                None => {
                    dropped.insert(key.clone());
                    find(&mut self.found.unknown, || self.path.clone());
                }
                Some(_) if item.is_null() => {
                    dropped.insert(key.clone());
                }
                Some(field) => {
                    self.value(&field.shape, item)?;
                    if field.omit_zero && !matches!(field.shape, Shape::Struct(_) | Shape::Quantity) && crate::meta::is_empty(item) {
                        dropped.insert(key.clone());
                    }
                }
            }
            self.path.truncate(length);
        }
        if !dropped.is_empty() {
            map.retain(|key, _| !dropped.contains(key));
        }
        write_zeros(id, map);
        self.owner = outer;
        Ok(())
    }

    fn enter(&mut self, key: &str) -> usize {
        let length = self.path.len();
        if length > 0 {
            self.path.push('.');
        }
        self.path.push_str(key);
        length
    }

    fn value(&mut self, shape: &Shape, value: &mut Value) -> Result<(), String> {
        match shape {
            Shape::Struct(id) => self.structure(*id, value),
            Shape::List(item) => {
                let Value::Array(items) = value else { return Err(self.mismatch(value, &go_type(shape))) };
                for (index, entry) in items.iter_mut().enumerate() {
                    let length = self.path.len();
                    self.path.push_str(&format!("[{index}]"));
                    // A null item is the zero value to Go; for structs that is an empty object.
                    if entry.is_null() {
                        *entry = zero(item);
                    }
                    // The zero time is written as null.
                    if !entry.is_null() {
                        self.value(item, entry)?;
                    }
                    self.path.truncate(length);
                }
                Ok(())
            }
            Shape::Map(item) => {
                let Value::Object(map) = value else { return Err(self.mismatch(value, &go_type(shape))) };
                for (key, entry) in map.iter_mut() {
                    let length = self.enter(key);
                    if entry.is_null() {
                        *entry = zero(item);
                    }
                    // The zero time is written as null.
                    if !entry.is_null() {
                        self.value(item, entry)?;
                    }
                    self.path.truncate(length);
                }
                Ok(())
            }
            scalar => self.scalar(scalar, value),
        }
    }

    fn scalar(&mut self, shape: &Shape, value: &mut Value) -> Result<(), String> {
        let fits = match shape {
            Shape::String => value.is_string(),
            Shape::Bool => value.is_boolean(),
            Shape::Double => value.is_number(),
            Shape::Int32 => integer(value).is_some_and(|number| i32::try_from(number).is_ok()),
            Shape::Int64 => integer(value).is_some(),
            Shape::Bytes => return self.bytes(value),
            Shape::Time | Shape::MicroTime => return self.time(shape, value),
            Shape::Quantity => {
                *value = Quantity::from_value(value)?.into();
                true
            }
            Shape::IntOrString => value.is_string() || integer(value).is_some(),
            Shape::Embedded => value.is_object(),
            _ => true,
        };
        if !fits {
            return Err(self.mismatch(value, &go_type(shape)));
        }
        if let (Shape::Int32 | Shape::Int64 | Shape::IntOrString, Some(number)) = (shape, integer(value)) {
            *value = number.into();
        }
        Ok(())
    }

    fn bytes(&self, value: &Value) -> Result<(), String> {
        use base64::Engine as _;
        let Some(text) = value.as_str() else { return Err(self.mismatch(value, "[]uint8")) };
        let cleaned: String = text.chars().filter(|letter| !matches!(letter, '\r' | '\n')).collect();
        base64::engine::general_purpose::STANDARD.decode(&cleaned).map(drop).map_err(|error| match error {
            base64::DecodeError::InvalidByte(offset, _) => format!("illegal base64 data at input byte {offset}"),
            _ => format!("illegal base64 data at input byte {}", cleaned.len().saturating_sub(cleaned.len() % 4)),
        })
    }

    fn time(&self, shape: &Shape, value: &mut Value) -> Result<(), String> {
        let Some(text) = value.as_str() else { return Err(self.mismatch(value, &go_type(shape))) };
        let layout = if *shape == Shape::Time { "2006-01-02T15:04:05Z07:00" } else { "2006-01-02T15:04:05.000000Z07:00" };
        let time = crate::time::parse(text)
            .ok_or_else(|| format!("parsing time \"{text}\" as \"{layout}\": cannot parse \"{text}\" as \"2006\""))?;
        *value = if *shape == Shape::Time { crate::time::format(time).into() } else { crate::time::format_micro(time).into() };
        Ok(())
    }

    /// Go's text: the field's path has no indexes.
    fn mismatch(&self, value: &Value, wanted: &str) -> String {
        let got = match value {
            Value::Null => "null".to_string(),
            Value::Bool(_) => "bool".to_string(),
            Value::Number(number) if number.is_f64() || matches!(wanted, "int32" | "int64") => format!("number {number}"),
            Value::Number(_) => "number".to_string(),
            Value::String(_) => "string".to_string(),
            Value::Array(_) => "array".to_string(),
            Value::Object(_) => "object".to_string(),
        };
        if self.path.is_empty() {
            return format!("json: cannot unmarshal {got} into Go value of type {wanted}");
        }
        let mut plain = String::with_capacity(self.path.len());
        let mut inside = false;
        for letter in self.path.chars() {
            match letter {
                '[' => inside = true,
                ']' => inside = false,
                _ if !inside => plain.push(letter),
                _ => {}
            }
        }
        format!("json: cannot unmarshal {got} into Go struct field {}.{plain} of type {wanted}", types::graph().types[self.owner].name)
    }
}

/// Whole numbers also when written as `3.0`.
fn integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 9e15).map(|number| number as i64))
}

/// The status that Go writes of a kind when nothing is set: counts that are always there are 0.
pub fn zero_status(resource: &Resource) -> Value {
    let status = types::by_kind(&resource.group, &resource.version, &resource.kind).and_then(|root| root.field("status"));
    let mut map = Map::new();
    if let Some(Shape::Struct(id)) = status.map(|field| &field.shape) {
        write_zeros(*id, &mut map);
    }
    Value::Object(map)
}

/// Fills in what Go always writes.
fn write_zeros(id: TypeId, map: &mut Map<String, Value>) {
    for field in types::graph().types[id].fields.iter().filter(|field| field.write_zero) {
        if map.contains_key(field.name) {
            continue;
        }
        let mut value = zero(&field.shape);
        if let (Shape::Struct(id), Value::Object(inner)) = (&field.shape, &mut value) {
            write_zeros(*id, inner);
        }
        map.insert(field.name.to_string(), value);
    }
}

fn zero(shape: &Shape) -> Value {
    match shape {
        Shape::Struct(_) | Shape::Map(_) | Shape::Embedded => Value::Object(Map::new()),
        Shape::List(_) => Value::Array(Vec::new()),
        Shape::String | Shape::Bytes => "".into(),
        Shape::Bool => false.into(),
        Shape::Int32 | Shape::Int64 | Shape::Double | Shape::IntOrString => 0.into(),
        Shape::Quantity => "0".into(),
        Shape::Time | Shape::MicroTime | Shape::Any => Value::Null,
    }
}

fn go_type(shape: &Shape) -> String {
    match shape {
        Shape::String => "string".into(),
        Shape::Int32 => "int32".into(),
        Shape::Int64 => "int64".into(),
        Shape::Double => "float64".into(),
        Shape::Bool => "bool".into(),
        Shape::Bytes => "[]uint8".into(),
        Shape::Time => "v1.Time".into(),
        Shape::MicroTime => "v1.MicroTime".into(),
        Shape::Quantity => "resource.Quantity".into(),
        Shape::IntOrString => "intstr.IntOrString".into(),
        Shape::Any => "interface {}".into(),
        Shape::Embedded => "runtime.RawExtension".into(),
        Shape::Struct(id) => format!("v1.{}", types::graph().types[*id].name),
        Shape::List(item) => format!("[]{}", go_type(item)),
        Shape::Map(item) => format!("map[string]{}", go_type(item)),
    }
}

/// Parses JSON and reports fields that occur twice in one object, as `duplicate field "spec.a"`; the last one wins.
pub fn parse_json(bytes: &[u8]) -> Result<(Value, Vec<String>), String> {
    let mut notes = Notes::default();
    let value = read_json(bytes, &mut notes)?;
    Ok((value, notes.findings))
}

/// Duplicate and unknown fields in the order in which the text has them, as Go's decoder meets them.
pub fn in_document_order(bytes: &[u8], unknown: &[String]) -> Vec<String> {
    let mut notes = Notes { unknown: unknown.iter().cloned().collect(), ..Notes::default() };
    // The text was read before: it parses.
    let _ = read_json(bytes, &mut notes);
    notes.findings
}

fn read_json(bytes: &[u8], notes: &mut Notes) -> Result<Value, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Tracking::new(notes).deserialize(&mut deserializer).map_err(|error| error.to_string())?;
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(value)
}

/// What a [`Tracking`] read met on its way.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// `duplicate field "a.b"`, and `unknown field "a.b"` for the paths asked for.
    pub findings: Vec<String>,
    /// The keys of the duplicates, each with the reader's error there, which says where it stands; only where places are wanted.
    pub repeated: Vec<(String, String)>,
    unknown: HashSet<String>,
    locating: bool,
    /// How many nodes and bytes of text may still be read.
    budget: Option<usize>,
}

impl Notes {
    /// Notes of a read that keeps the places of duplicates, of a format that can repeat a part of its text: no more than `budget`
    /// nodes and bytes of text come out of it.
    pub fn locating(budget: usize) -> Notes {
        Notes { locating: true, budget: Some(budget), ..Notes::default() }
    }

    fn spend<E: serde::de::Error>(&mut self, cost: usize) -> Result<(), E> {
        if let Some(budget) = &mut self.budget {
            *budget = budget.checked_sub(cost).ok_or_else(|| E::custom("document contains excessive aliasing"))?;
        }
        Ok(())
    }
}

/// Reads any self-describing format into a value, noting fields that occur twice in one object.
pub struct Tracking<'a> {
    path: String,
    notes: &'a mut Notes,
}

impl<'a> Tracking<'a> {
    pub fn new(notes: &'a mut Notes) -> Tracking<'a> {
        Tracking { path: String::new(), notes }
    }
}

impl<'de> DeserializeSeed<'de> for Tracking<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tracking<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not a JSON number"))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        self.notes.spend::<E>(value.len())?;
        Ok(value.into())
    }

    fn visit_string<E: serde::de::Error>(self, value: String) -> Result<Value, E> {
        self.notes.spend::<E>(value.len())?;
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) =
            access.next_element_seed(Tracking { path: format!("{}[{}]", self.path, items.len()), notes: &mut *self.notes })?
        {
            self.notes.spend::<A::Error>(1)?;
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        loop {
            let mut repeated = None;
            let known = self.notes.locating.then_some((&map, &mut repeated));
            let key = match (access.next_key_seed(Key { known }), repeated) {
                (Ok(Some(key)), _) => key,
                (Ok(None), _) => break,
                (Err(error), Some(key)) => {
                    if self.notes.repeated.len() < MAX_FINDINGS {
                        self.notes.repeated.push((key.clone(), error.to_string()));
                    }
                    key
                }
                (Err(error), None) => return Err(error),
            };
            self.notes.spend::<A::Error>(1 + key.len())?;
            let path = if self.path.is_empty() { key.clone() } else { format!("{}.{key}", self.path) };
            if map.contains_key(&key) {
                find(&mut self.notes.findings, || format!("duplicate field \"{path}\""));
            }
            if self.notes.unknown.remove(&path) {
                find(&mut self.notes.findings, || format!("unknown field \"{path}\""));
            }
            let value = access.next_value_seed(Tracking { path, notes: &mut *self.notes })?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// An object's key as text; numbers and booleans, which YAML allows, as they are written.
struct Key<'a> {
    /// Where the place of a key that is known already is wanted, reading it fails, with the place, and leaves it here.
    known: Option<(&'a Map<String, Value>, &'a mut Option<String>)>,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = String;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<String, E> {
        if let Some((known, repeated)) = self.known
            && known.contains_key(key)
        {
            *repeated = Some(key.to_string());
            return Err(E::custom("already set"));
        }
        Ok(key.to_string())
    }

    fn visit_bool<E: serde::de::Error>(self, key: bool) -> Result<String, E> {
        self.visit_str(&key.to_string())
    }

    fn visit_i64<E: serde::de::Error>(self, key: i64) -> Result<String, E> {
        self.visit_str(&key.to_string())
    }

    fn visit_u64<E: serde::de::Error>(self, key: u64) -> Result<String, E> {
        self.visit_str(&key.to_string())
    }

    fn visit_f64<E: serde::de::Error>(self, key: f64) -> Result<String, E> {
        self.visit_str(&key.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(mut object: Value) -> Result<(Value, Decoded), String> {
        decode_as("", "v1", "Pod", &mut object).map(|found| (object, found))
    }

    #[test]
    fn unknown_fields_and_nulls_are_dropped() {
        let (object, found) = pod(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "creationTimestamp": null, "foo": 1},
            "spec": {"hostNetwork": false, "automountServiceAccountToken": false, "volumes": [{"name": "v", "emptyDir": {}}], "containers": [{"name": "c", "command": [], "bar": {"x": 1}, "resources": {"limits": {"cpu": 0.5, "memory": "1024Ki"}}}], "nodeName": null}
        }))
        .expect("decodes");
        let expected = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"},
            "spec": {"automountServiceAccountToken": false, "volumes": [{"name": "v", "emptyDir": {}}],
                "containers": [{"name": "c", "resources": {"limits": {"cpu": "500m", "memory": "1Mi"}}}]}, "status": {}});
        assert_eq!(object, expected);
        assert_eq!(found.warnings(), ["unknown field \"metadata.foo\"", "unknown field \"spec.containers[0].bar\""]);
    }

    #[test]
    fn wrong_types_are_errors() {
        for (object, expected) in [
            (
                json!({"spec": {"containers": "x"}}),
                "json: cannot unmarshal string into Go struct field PodSpec.spec.containers of type []v1.Container",
            ),
            (
                json!({"metadata": {"labels": {"a": 1}}}),
                "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels.a of type string",
            ),
            (
                json!({"spec": {"containers": [{"ports": [{"containerPort": 1.5}]}]}}),
                "json: cannot unmarshal number 1.5 into Go struct field ContainerPort.spec.containers.ports.containerPort of type int32",
            ),
            (json!([]), "json: cannot unmarshal array into Go value of type v1.Pod"),
        ] {
            let error = pod(object).expect_err("wrong type");
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn duplicates_are_reported() {
        let (value, duplicates) = parse_json(br#"{"a": 1, "b": [{"c": 1, "c": 2}], "a": 2.5}"#).expect("parses");
        assert_eq!(value, json!({"a": 2.5, "b": [{"c": 2}]}));
        assert_eq!(duplicates, ["duplicate field \"b[0].c\"", "duplicate field \"a\""]);
        assert!(parse_json(b"{} x").is_err());
        let (_, many) = parse_json(format!("{{{}\"a\": 1}}", "\"a\": 1,".repeat(1000)).as_bytes()).expect("parses");
        assert_eq!(many.len(), MAX_FINDINGS);
        let text = br#"{"spec": {"x": 1, "a": 1, "a": 2, "y": 3}}"#;
        let found = in_document_order(text, &["spec.x".into(), "spec.y".into()]);
        assert_eq!(found, ["unknown field \"spec.x\"", "duplicate field \"spec.a\"", "unknown field \"spec.y\""]);
    }
}
