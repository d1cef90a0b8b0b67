//! Checks a custom resource against its schema.
use std::collections::{HashMap, HashSet};
use std::sync::{LazyLock, Mutex};

use regex::Regex;
use serde_json::Value;

use super::{EMBEDDED, flag, formats};
use crate::field_error::{FieldError, FieldErrorKind};
use crate::meta;

const INT_OR_STRING: &str = "x-kubernetes-int-or-string";
const LIST_TYPE: &str = "x-kubernetes-list-type";

/// Findings of types, required fields, enums, patterns, bounds, formats and list types.
pub fn validate(schema: &Value, object: &Value) -> Vec<FieldError> {
    let mut found = Vec::new();
    value(schema, object, None, "", &mut found);
    found
}

/// The same for a changed object: a part that did not change is not looked at again, so that stricter schemas do not block old objects.
pub fn validate_update(schema: &Value, object: &Value, old: &Value) -> Vec<FieldError> {
    let mut found = Vec::new();
    value(schema, object, Some(old), "", &mut found);
    found
}

fn child(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_string() } else { format!("{path}.{key}") }
}

fn value(schema: &Value, value: &Value, old: Option<&Value>, path: &str, found: &mut Vec<FieldError>) {
    if old == Some(value) && !path.is_empty() {
        return;
    }
    if !type_matches(schema, value, path, found) {
        return;
    }
    if value.is_null() {
        return;
    }
    let before = found.len();
    enumeration(schema, value, path, found);
    match value {
        Value::String(text) => string(schema, text, path, found),
        Value::Number(_) => number(schema, value, path, found),
        Value::Array(items) => array(schema, items, old, path, found),
        Value::Object(map) => object(schema, map, old, path, found),
        _ => {}
    }
    if found.len() == before {
        junctors(schema, value, path, found);
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn type_matches(schema: &Value, value: &Value, path: &str, found: &mut Vec<FieldError>) -> bool {
    let wanted = match meta::text(schema, "type") {
        "" if flag(schema, INT_OR_STRING) => "integer,string",
        "" => return true,
        wanted => wanted,
    };
    let actual = type_name(value);
    let whole = value.as_f64().is_some_and(|number| number.fract() == 0.0);
    let fits = wanted.split(',').any(|wanted| {
        wanted == actual || (wanted == "number" && actual == "integer") || (wanted == "integer" && actual == "number" && whole)
    });
    if fits || (value.is_null() && flag(schema, "nullable")) {
        return true;
    }
    let detail = format!("{} must be of type {wanted}: {actual:?}", subject(path));
    found.push(FieldError::type_invalid(path, actual, detail));
    false
}

/// How messages name the place.
fn subject(path: &str) -> String {
    if path.is_empty() { "in body".to_string() } else { format!("{path} in body") }
}

fn enumeration(schema: &Value, value: &Value, path: &str, found: &mut Vec<FieldError>) {
    let Some(allowed) = schema.get("enum").and_then(Value::as_array) else { return };
    if allowed.contains(value) {
        return;
    }
    let shown: Vec<String> = allowed.iter().map(|entry| entry.as_str().map_or_else(|| entry.to_string(), String::from)).collect();
    let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
    found.push(FieldError::not_supported(path, value.clone(), &shown));
}

/// The value of a bound, as the schema writes it.
fn bound<'a>(schema: &'a Value, key: &str) -> Option<&'a serde_json::Number> {
    match schema.get(key)? {
        Value::Number(number) => Some(number),
        _ => None,
    }
}

fn size(schema: &Value, key: &str) -> Option<usize> {
    schema.get(key)?.as_u64().and_then(|size| usize::try_from(size).ok())
}

fn string(schema: &Value, text: &str, path: &str, found: &mut Vec<FieldError>) {
    let length = text.chars().count();
    if let Some(most) = size(schema, "maxLength").filter(|most| length > *most) {
        found.push(FieldError::too_long(path, most));
    }
    if let Some(least) = size(schema, "minLength").filter(|least| length < *least) {
        found.push(FieldError::invalid(path, text, format!("{} should be at least {least} chars long", subject(path))));
    }
    let pattern = meta::text(schema, "pattern");
    if !pattern.is_empty() && !matches_pattern(pattern, text) {
        found.push(FieldError::invalid(path, text, format!("{} should match '{pattern}'", subject(path))));
    }
    let format = meta::text(schema, "format");
    if !formats::has_format(format, text) {
        let detail = format!("{} must be of type {format}: {text:?}", subject(path));
        found.push(FieldError::type_invalid(path, text, detail));
    }
}

/// Patterns are compiled once; one that does not compile was refused with its definition.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    static COMPILED: LazyLock<Mutex<HashMap<String, Option<Regex>>>> = LazyLock::new(Mutex::default);
    let mut compiled = COMPILED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !compiled.contains_key(pattern) {
        compiled.insert(pattern.to_string(), Regex::new(pattern).ok());
    }
    compiled.get(pattern).and_then(Option::as_ref).is_none_or(|pattern| pattern.is_match(text))
}

fn number(schema: &Value, value: &Value, path: &str, found: &mut Vec<FieldError>) {
    let actual = value.as_f64().unwrap_or_default();
    let mut refuse = |words: &str, limit: &dyn std::fmt::Display| {
        found.push(FieldError::invalid(path, value.clone(), format!("{} should be {words} {limit}", subject(path))));
    };
    if let Some(limit) = bound(schema, "maximum") {
        let most = limit.as_f64().unwrap_or(f64::MAX);
        match flag(schema, "exclusiveMaximum") {
            true if actual >= most => refuse("less than", limit),
            false if actual > most => refuse("less than or equal to", limit),
            _ => {}
        }
    }
    if let Some(limit) = bound(schema, "minimum") {
        let least = limit.as_f64().unwrap_or(f64::MIN);
        match flag(schema, "exclusiveMinimum") {
            true if actual <= least => refuse("greater than", limit),
            false if actual < least => refuse("greater than or equal to", limit),
            _ => {}
        }
    }
    if let Some(factor) = bound(schema, "multipleOf") {
        let quotient = actual / factor.as_f64().unwrap_or(1.0);
        if (quotient - quotient.round()).abs() > 1e-9 {
            refuse("a multiple of", factor);
        }
    }
    let range = match meta::text(schema, "format") {
        "int32" => Some((f64::from(i32::MIN), f64::from(i32::MAX))),
        _ => None,
    };
    if let Some((low, high)) = range
        && !(low..=high).contains(&actual)
    {
        found.push(FieldError::type_invalid(path, value.clone(), format!("{} must be of type int32: \"int64\"", subject(path))));
    }
}

fn array(schema: &Value, items: &[Value], old: Option<&Value>, path: &str, found: &mut Vec<FieldError>) {
    if let Some(most) = size(schema, "maxItems").filter(|most| items.len() > *most) {
        found.push(FieldError::too_many(path, items.len(), most));
    }
    if let Some(least) = size(schema, "minItems").filter(|least| items.len() < *least) {
        found.push(FieldError::invalid(path, items.len(), format!("{} should have at least {least} items", subject(path))));
    }
    let keys = list_keys(schema);
    if let Some(item_schema) = schema.get("items").filter(|schema| schema.is_object()) {
        let old_items = old.and_then(Value::as_array);
        for (index, item) in items.iter().enumerate() {
            let twin = old_items
                .filter(|_| !keys.is_empty())
                .and_then(|old| old.iter().find(|other| key_of(item_schema, item, &keys) == key_of(item_schema, other, &keys)));
            value(item_schema, item, twin, &format!("{path}[{index}]"), found);
        }
    }
    let list_type = schema.get(LIST_TYPE).and_then(Value::as_str).unwrap_or_default();
    let mut seen = HashSet::new();
    for (index, item) in items.iter().enumerate() {
        let identity = match list_type {
            "set" => item.clone(),
            "map" => key_of(schema.get("items").unwrap_or(&Value::Null), item, &keys),
            _ => return,
        };
        if !seen.insert(identity.to_string()) {
            found.push(FieldError::duplicate(format!("{path}[{index}]"), identity));
        }
    }
}

fn list_keys(schema: &Value) -> Vec<&str> {
    schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

/// The item's key fields, with their defaults.
fn key_of(schema: &Value, item: &Value, keys: &[&str]) -> Value {
    let field = |key: &&str| {
        let given = item.get(*key).filter(|value| !value.is_null());
        let default = schema.get("properties").and_then(|properties| properties.get(*key)?.get("default"));
        given.or(default).map(|value| (key.to_string(), value.clone()))
    };
    Value::Object(keys.iter().filter_map(field).collect())
}

fn object(schema: &Value, map: &serde_json::Map<String, Value>, old: Option<&Value>, path: &str, found: &mut Vec<FieldError>) {
    for key in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        if !map.contains_key(key) {
            found.push(FieldError::required(child(path, key), ""));
        }
    }
    if let Some(most) = size(schema, "maxProperties").filter(|most| map.len() > *most) {
        found.push(FieldError::too_many(path, map.len(), most));
    }
    if let Some(least) = size(schema, "minProperties").filter(|least| map.len() < *least) {
        found.push(FieldError::invalid(path, map.len(), format!("{} should have at least {least} properties", subject(path))));
    }
    if flag(schema, EMBEDDED) {
        embedded(map, path, found);
    }
    for (key, item) in map {
        let property = schema.get("properties").and_then(|properties| properties.get(key));
        let inner = property.or_else(|| schema.get("additionalProperties").filter(|extra| extra.is_object()));
        if let Some(inner) = inner {
            value(inner, item, old.and_then(|old| old.get(key)), &child(path, key), found);
        }
    }
}

/// An object within the object: it says what it is.
fn embedded(map: &serde_json::Map<String, Value>, path: &str, found: &mut Vec<FieldError>) {
    for key in ["apiVersion", "kind"] {
        if map.get(key).and_then(Value::as_str).is_none_or(str::is_empty) {
            found.push(FieldError::required(child(path, key), "must not be empty"));
        }
    }
}

/// `allOf`, `anyOf`, `oneOf` and `not`, which in structural schemas only narrow values.
fn junctors(schema: &Value, value: &Value, path: &str, found: &mut Vec<FieldError>) {
    let branches = |key: &str| schema.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let passes = |branch: &&Value| {
        let mut errors = Vec::new();
        self::value(branch, value, None, path, &mut errors);
        errors.is_empty()
    };
    let mut refuse = |detail: &str| {
        found.push(FieldError::new(
            FieldErrorKind::Invalid,
            path,
            "",
            format!("{:?} {detail}", if path.is_empty() { "<nil>" } else { path }),
        ))
    };
    if !branches("anyOf").is_empty() && !branches("anyOf").iter().any(|branch| passes(&branch)) {
        refuse("must validate at least one schema (anyOf)");
    }
    if !branches("oneOf").is_empty() {
        match branches("oneOf").iter().filter(passes).count() {
            1 => {}
            0 => refuse("must validate one and only one schema (oneOf). Found none valid"),
            count => refuse(&format!("must validate one and only one schema (oneOf). Found {count} valid alternatives")),
        }
    }
    if schema.get("not").is_some_and(|branch| passes(&branch)) {
        refuse("must not validate the schema (not)");
    }
    let all = branches("allOf");
    for branch in all {
        self::value(branch, value, None, path, found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn texts(schema: Value, object: Value) -> Vec<String> {
        validate(&json!({"type": "object", "properties": {"a": schema}}), &json!({"a": object})).iter().map(FieldError::to_string).collect()
    }

    #[test]
    fn values_are_checked() {
        let cases: [(Value, Value, &[&str]); 24] = [
            (json!({"type": "integer"}), json!(1), &[]),
            (json!({"type": "integer"}), json!("x"), &["a: Invalid value: \"string\": a in body must be of type integer: \"string\""]),
            (json!({"type": "number"}), json!(1), &[]),
            (json!({"type": "string"}), Value::Null, &["a: Invalid value: \"null\": a in body must be of type string: \"null\""]),
            (json!({"type": "string", "nullable": true}), Value::Null, &[]),
            (json!({"x-kubernetes-int-or-string": true}), json!("5%"), &[]),
            (
                json!({"x-kubernetes-int-or-string": true}),
                json!(true),
                &["a: Invalid value: \"boolean\": a in body must be of type integer,string: \"boolean\""],
            ),
            (json!({"type": "string", "enum": ["x", "y"]}), json!("z"), &["a: Unsupported value: \"z\": supported values: \"x\", \"y\""]),
            (json!({"type": "string", "pattern": "^a+$"}), json!("b"), &["a: Invalid value: \"b\": a in body should match '^a+$'"]),
            (
                json!({"type": "string", "minLength": 2}),
                json!("b"),
                &["a: Invalid value: \"b\": a in body should be at least 2 chars long"],
            ),
            (json!({"type": "string", "maxLength": 2}), json!("abc"), &["a: Too long: may not be more than 2 bytes"]),
            (json!({"type": "integer", "minimum": 1}), json!(0), &["a: Invalid value: 0: a in body should be greater than or equal to 1"]),
            (json!({"type": "integer", "maximum": 5}), json!(6), &["a: Invalid value: 6: a in body should be less than or equal to 5"]),
            (
                json!({"type": "integer", "maximum": 5, "exclusiveMaximum": true}),
                json!(5),
                &["a: Invalid value: 5: a in body should be less than 5"],
            ),
            (json!({"type": "integer", "multipleOf": 2}), json!(3), &["a: Invalid value: 3: a in body should be a multiple of 2"]),
            (
                json!({"type": "array", "minItems": 1, "items": {"type": "string"}}),
                json!([]),
                &["a: Invalid value: 0: a in body should have at least 1 items"],
            ),
            (
                json!({"type": "array", "maxItems": 1, "items": {"type": "string"}}),
                json!(["x", "y"]),
                &["a: Too many: 2: must have at most 1 items"],
            ),
            (
                json!({"type": "array", "items": {"type": "string"}}),
                json!([1]),
                &["a[0]: Invalid value: \"integer\": a[0] in body must be of type string: \"integer\""],
            ),
            (
                json!({"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}}),
                json!(["x", "x"]),
                &["a[1]: Duplicate value: \"x\""],
            ),
            (
                json!({"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"], "items": {"type": "object"}}),
                json!([{"k": "1"}, {"k": "1"}]),
                &["a[1]: Duplicate value: {\"k\":\"1\"}"],
            ),
            (json!({"type": "object", "required": ["b"]}), json!({}), &["a.b: Required value"]),
            (
                json!({"type": "object", "additionalProperties": {"type": "string"}}),
                json!({"k": 1}),
                &["a.k: Invalid value: \"integer\": a.k in body must be of type string: \"integer\""],
            ),
            (
                json!({"type": "object", "oneOf": [{"required": ["b"]}, {"required": ["c"]}]}),
                json!({"b": 1, "c": 1}),
                &["a: Invalid value: \"\": \"a\" must validate one and only one schema (oneOf). Found 2 valid alternatives"],
            ),
            (json!({"type": "string", "format": "ipv4"}), json!("x"), &["a: Invalid value: \"x\": a in body must be of type ipv4: \"x\""]),
        ];
        for (schema, object, expected) in cases {
            assert_eq!(texts(schema.clone(), object), expected, "{schema}");
        }
    }

    #[test]
    fn unchanged_parts_are_let_through() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer", "minimum": 5}, "b": {"type": "string"}}});
        let old = json!({"a": 1, "b": "x"});
        assert_eq!(validate_update(&schema, &json!({"a": 1, "b": "y"}), &old), []);
        assert_eq!(validate_update(&schema, &json!({"a": 2, "b": "x"}), &old).len(), 1);
    }
}
