//! The v2 document in the protobuf form of gnostic's `openapi.v2.Document`, which client-go asks for. Field numbers are those of its
//! OpenAPIv2.proto.

use serde_json::{Map, Value};

use crate::protobuf::wire::{put_bytes, put_double, put_integer};

pub fn encode(document: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    text(&mut out, 1, &document["swagger"]);
    let mut info = Vec::new();
    text(&mut info, 1, &document["info"]["title"]);
    text(&mut info, 2, &document["info"]["version"]);
    put_bytes(&mut out, 2, &info);
    put_bytes(&mut out, 8, &named(2, &document["paths"], path_item));
    put_bytes(&mut out, 9, &named(1, &document["definitions"], schema));
    out
}

fn text(out: &mut Vec<u8>, number: u32, value: &Value) {
    if let Some(text) = value.as_str().filter(|text| !text.is_empty()) {
        put_bytes(out, number, text.as_bytes());
    }
}

/// A map as a list of name and value.
fn named(number: u32, map: &Value, encode: impl Fn(&Value) -> Vec<u8>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in map.as_object().into_iter().flatten() {
        put_bytes(&mut out, number, &pair(name, &encode(value)));
    }
    out
}

fn pair(name: &str, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, 1, name.as_bytes());
    put_bytes(&mut out, 2, value);
    out
}

/// Any value, as YAML text (JSON is).
fn any(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, 2, value.to_string().as_bytes());
    out
}

fn extensions(out: &mut Vec<u8>, number: u32, map: &Map<String, Value>) {
    for (key, value) in map.iter().filter(|(key, _)| key.starts_with("x-")) {
        put_bytes(out, number, &pair(key, &any(value)));
    }
}

fn path_item(item: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, method) in [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (6, "options"), (7, "head"), (8, "patch")] {
        if let Some(operation) = item.get(method).and_then(Value::as_object) {
            put_bytes(&mut out, number, &self::operation(operation));
        }
    }
    out
}

fn operation(operation: &Map<String, Value>) -> Vec<u8> {
    let mut out = Vec::new();
    text(&mut out, 5, operation.get("operationId").unwrap_or(&Value::Null));
    let responses = operation.get("responses").unwrap_or(&Value::Null);
    let answer = |response: &Value| {
        let (mut inner, mut out) = (Vec::new(), Vec::new());
        text(&mut inner, 1, &response["description"]);
        put_bytes(&mut out, 1, &inner);
        out
    };
    put_bytes(&mut out, 9, &named(1, responses, answer));
    extensions(&mut out, 13, operation);
    out
}

fn schema(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    let Some(map) = value.as_object() else { return out };
    for (key, value) in map {
        match (key.as_str(), value) {
            ("$ref", _) => text(&mut out, 1, value),
            ("format", _) => text(&mut out, 2, value),
            ("title", _) => text(&mut out, 3, value),
            ("description", _) => text(&mut out, 4, value),
            ("default", _) => put_bytes(&mut out, 5, &any(value)),
            ("pattern", _) => text(&mut out, 13, value),
            ("required", Value::Array(items)) => items.iter().for_each(|item| text(&mut out, 19, item)),
            ("enum", Value::Array(items)) => items.iter().for_each(|item| put_bytes(&mut out, 20, &any(item))),
            ("additionalProperties", _) => put_bytes(&mut out, 21, &schema_or_bool(value)),
            ("type", _) => put_bytes(&mut out, 22, &types(value)),
            ("items", _) => put_bytes(&mut out, 23, &wrapped(1, value)),
            ("allOf", Value::Array(items)) => items.iter().for_each(|item| put_bytes(&mut out, 24, &schema(item))),
            ("properties", _) => put_bytes(&mut out, 25, &named(1, value, schema)),
            ("example", _) => put_bytes(&mut out, 30, &any(value)),
            (key, Value::Number(number)) => limit(&mut out, key, number),
            (key, Value::Bool(true)) => flag(&mut out, key),
            _ => {}
        }
    }
    extensions(&mut out, 31, map);
    out
}

fn limit(out: &mut Vec<u8>, key: &str, value: &serde_json::Number) {
    let whole = [("maxLength", 11), ("minLength", 12), ("maxItems", 14), ("minItems", 15), ("maxProperties", 17), ("minProperties", 18)];
    let real = [("multipleOf", 6), ("maximum", 7), ("minimum", 9)];
    if let (Some((_, number)), Some(value)) = (whole.iter().find(|(name, _)| *name == key), value.as_i64()) {
        put_integer(out, *number, value);
    }
    if let (Some((_, number)), Some(value)) = (real.iter().find(|(name, _)| *name == key), value.as_f64()) {
        put_double(out, *number, value);
    }
}

fn flag(out: &mut Vec<u8>, key: &str) {
    let flags = [("exclusiveMaximum", 8), ("exclusiveMinimum", 10), ("uniqueItems", 16), ("readOnly", 27)];
    if let Some((_, number)) = flags.iter().find(|(name, _)| *name == key) {
        put_integer(out, *number, 1);
    }
}

fn wrapped(number: u32, value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, number, &schema(value));
    out
}

fn schema_or_bool(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    match value {
        Value::Bool(allows) => put_integer(&mut out, 2, i64::from(*allows)),
        _ => return wrapped(1, value),
    }
    out
}

fn types(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    match value {
        Value::Array(names) => names.iter().for_each(|name| text(&mut out, 1, name)),
        name => text(&mut out, 1, name),
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_document_is_encoded_by_gnostics_field_numbers() {
        let document = json!({"swagger": "2.0", "info": {"title": "K", "version": "v"}, "paths": {}, "definitions": {"A": {"type": "string", "x-y": [1]}}});
        let expected = b"\x0a\x032.0\x12\x06\x0a\x01K\x12\x01v\x42\x00\x4a\x21\x0a\x1f\x0a\x01A\x12\x1a\xb2\x01\x08\x0a\x06string\xfa\x01\x0c\x0a\x03x-y\x12\x05\x12\x03[1]";
        assert_eq!(encode(&document), expected);
    }
}
