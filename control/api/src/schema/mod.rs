//! Structural schemas of custom resources: pruning, defaulting and validation, with upstream's messages.
mod formats;
mod validate;

use std::collections::HashSet;

use serde_json::Value;

pub use validate::{validate, validate_update};

use crate::decode::{decode_metadata, find};

const META_FIELDS: [&str; 3] = ["apiVersion", "kind", "metadata"];
const PRESERVE: &str = "x-kubernetes-preserve-unknown-fields";
const EMBEDDED: &str = "x-kubernetes-embedded-resource";

fn flag(schema: &Value, key: &str) -> bool {
    schema.get(key) == Some(&Value::Bool(true))
}

/// Fits a custom resource's body to its schema: metadata to ObjectMeta, everything else pruned. Returns the paths of dropped fields;
/// the error is the message of a 400. Without a schema, or with `preserve`, only metadata is looked at.
pub fn decode(schema: Option<&Value>, preserve: bool, object: &mut Value) -> Result<Vec<String>, String> {
    let mut unknown = decode_metadata(object, "")?.unknown;
    if let Some(schema) = schema.filter(|_| !preserve) {
        unknown.extend(prune(schema, object));
    }
    unknown.sort();
    Ok(unknown)
}

/// Drops the fields the schema does not name and returns their paths, sorted; `x-kubernetes-preserve-unknown-fields` and embedded
/// resources are honoured. `apiVersion`, `kind` and `metadata` of the root stay.
pub fn prune(schema: &Value, object: &mut Value) -> Vec<String> {
    let mut pruning = Pruning { path: String::new(), unknown: Vec::new() };
    pruning.value(Some(schema), object, true);
    pruning.unknown.sort();
    pruning.unknown
}

struct Pruning {
    path: String,
    unknown: Vec<String>,
}

impl Pruning {
    fn value(&mut self, schema: Option<&Value>, value: &mut Value, is_resource: bool) {
        let preserve = schema.is_some_and(|schema| flag(schema, PRESERVE));
        let is_resource = is_resource || schema.is_some_and(|schema| flag(schema, EMBEDDED));
        match value {
            Value::Array(items) => {
                let item_schema = schema.and_then(|schema| schema.get("items")).filter(|items| items.is_object());
                for (index, item) in items.iter_mut().enumerate() {
                    // Below preserved fields, items without a schema are preserved too.
                    if preserve && item_schema.is_none() {
                        continue;
                    }
                    let length = self.path.len();
                    self.path.push_str(&format!("[{index}]"));
                    self.value(item_schema, item, false);
                    self.path.truncate(length);
                }
            }
            Value::Object(_) => self.object(schema, value, is_resource, preserve),
            _ => {}
        }
    }

    fn object(&mut self, schema: Option<&Value>, value: &mut Value, is_resource: bool, preserve: bool) {
        if is_resource && !self.path.is_empty() {
            let prefix = self.path.clone();
            // A wrong type in embedded metadata is validation's to report.
            if let Ok(found) = decode_metadata(value, &prefix) {
                found.unknown.into_iter().for_each(|path| find(&mut self.unknown, || path));
            }
        }
        let Value::Object(map) = value else { return };
        let mut dropped = HashSet::new();
        for (key, item) in map.iter_mut() {
            if is_resource && META_FIELDS.contains(&key.as_str()) {
                continue;
            }
            let property = schema.and_then(|schema| schema.get("properties")?.get(key));
            let extra = schema
                .and_then(|schema| schema.get("additionalProperties"))
                .filter(|extra| !matches!(extra, Value::Null | Value::Bool(false)));
            let length = self.path.len();
            if length > 0 {
                self.path.push('.');
            }
            self.path.push_str(key);
            match (property, extra) {
                (Some(property), _) => self.value(Some(property), item, false),
                // `true` allows any value, which then has no schema of its own to prune by.
                (None, Some(Value::Bool(true))) => {}
                (None, Some(extra)) => self.value(Some(extra), item, false),
                (None, None) if preserve => {}
                (None, None) => {
                    find(&mut self.unknown, || self.path.clone());
                    dropped.insert(key.clone());
                }
            }
            self.path.truncate(length);
        }
        if !dropped.is_empty() {
            map.retain(|key, _| !dropped.contains(key));
        }
    }
}

/// Fills in the schema's defaults, and replaces or drops nulls of fields that are not nullable and have one.
pub fn default(schema: &Value, object: &mut Value) {
    match object {
        Value::Object(map) => {
            for (key, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
                let Some(default) = property.get("default") else { continue };
                let missing = match map.get(key) {
                    None => true,
                    Some(value) => value.is_null() && !flag(property, "nullable"),
                };
                if missing {
                    map.insert(key.clone(), default.clone());
                }
            }
            for (key, value) in map.iter_mut() {
                let property = schema.get("properties").and_then(|properties| properties.get(key));
                if let Some(schema) = property.or_else(|| schema.get("additionalProperties").filter(|extra| extra.is_object())) {
                    replace_null(schema, value);
                    default(schema, value);
                }
            }
            drop_nulls(schema, map);
        }
        Value::Array(items) => {
            let Some(schema) = schema.get("items").filter(|items| items.is_object()) else { return };
            for item in items {
                replace_null(schema, item);
                default(schema, item);
            }
        }
        _ => {}
    }
}

fn replace_null(schema: &Value, value: &mut Value) {
    if value.is_null()
        && !flag(schema, "nullable")
        && let Some(default) = schema.get("default")
    {
        *value = default.clone();
    }
}

/// Nulls of named fields that are not nullable and have no default go away.
fn drop_nulls(schema: &Value, map: &mut serde_json::Map<String, Value>) {
    let properties = schema.get("properties");
    map.retain(|key, value| {
        let property = properties.and_then(|properties| properties.get(key));
        !(value.is_null() && property.is_some_and(|property| !flag(property, "nullable")))
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema() -> Value {
        json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "n": {"type": "integer", "default": 3},
            "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string", "default": "x"}}}},
            "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {"b": {"type": "string"}}}},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"known": {"type": "object", "properties": {}}}},
            "pod": {"type": "object", "x-kubernetes-embedded-resource": true, "properties": {"spec": {"type": "object"}}}}}}})
    }

    #[test]
    fn unknown_fields_are_pruned() {
        let mut object = json!({"apiVersion": "x/v1", "kind": "X", "metadata": {"name": "a", "foo": 1}, "other": 1, "spec": {
            "n": 1, "x": 2, "list": [{"a": "1", "c": 2}], "map": {"k": {"b": "1", "d": 1}}, "free": {"any": {"thing": 1}, "known": {"z": 1}},
            "pod": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "bar": 1}, "spec": {}, "status": {}}}});
        let unknown = decode(Some(&schema()), false, &mut object).expect("decodes");
        let paths = [
            "metadata.foo",
            "other",
            "spec.free.known.z",
            "spec.list[0].c",
            "spec.map.k.d",
            "spec.pod.metadata.bar",
            "spec.pod.status",
            "spec.x",
        ];
        assert_eq!(unknown, paths);
        assert_eq!(
            object,
            json!({"apiVersion": "x/v1", "kind": "X", "metadata": {"name": "a"}, "spec": {"n": 1, "list": [{"a": "1"}], "map": {"k": {"b": "1"}},
                "free": {"any": {"thing": 1}, "known": {}}, "pod": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {}}}})
        );
        assert!(decode(None, false, &mut json!({"metadata": {"labels": 1}})).is_err());
    }

    #[test]
    fn defaults_are_filled_in() {
        for (object, expected) in [
            (json!({"spec": {}}), json!({"spec": {"n": 3}})),
            (json!({"spec": {"n": null, "list": [{}]}}), json!({"spec": {"n": 3, "list": [{"a": "x"}]}})),
            (json!({"spec": {"n": 5, "map": null}}), json!({"spec": {"n": 5}})),
            (json!({}), json!({})),
        ] {
            let mut target = object;
            default(&schema(), &mut target);
            assert_eq!(target, expected);
        }
    }
}
