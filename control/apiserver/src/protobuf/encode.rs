//! From JSON to the wire.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::ProtobufError;
use super::table::{self, Field, Many, Message, Scalar, Shape, Special};
use super::wire::{put_bytes, put_double, put_integer};

pub fn message(message: &Message, object: &Value) -> Result<Vec<u8>, ProtobufError> {
    let mut out = Vec::new();
    for field in &message.fields {
        if field.inline {
            if let Shape::Message(name) = field.shape
                && let Some(inner) = table::find(name)
            {
                put_bytes(&mut out, field.number, &self::message(inner, object)?);
            }
            continue;
        }
        let Some(value) = object.get(field.name).filter(|value| !value.is_null()) else { continue };
        match (field.many, value) {
            (Many::One, value) => one(&mut out, field, field.number, value)?,
            (Many::List, Value::Array(items)) => {
                for item in items {
                    one(&mut out, field, field.number, item)?;
                }
            }
            (Many::Map, Value::Object(entries)) => {
                for (key, value) in entries {
                    let mut entry = Vec::new();
                    put_bytes(&mut entry, 1, key.as_bytes());
                    one(&mut entry, field, 2, value)?;
                    put_bytes(&mut out, field.number, &entry);
                }
            }
            _ => return Err(mismatch(field)),
        }
    }
    Ok(out)
}

fn mismatch(field: &Field) -> ProtobufError {
    ProtobufError::Mismatch(field.name.to_string())
}

fn one(out: &mut Vec<u8>, field: &Field, number: u32, value: &Value) -> Result<(), ProtobufError> {
    match (field.shape, value) {
        (Shape::Scalar(Scalar::Text), Value::String(text)) => put_bytes(out, number, text.as_bytes()),
        (Shape::Scalar(Scalar::Bytes), Value::String(text)) => {
            put_bytes(out, number, &STANDARD.decode(text).map_err(|_| mismatch(field))?);
        }
        (Shape::Scalar(Scalar::Integer), Value::Number(n)) => {
            put_integer(out, number, n.as_i64().or(n.as_f64().map(|f| f as i64)).ok_or_else(|| mismatch(field))?);
        }
        (Shape::Scalar(Scalar::Boolean), Value::Bool(flag)) => put_integer(out, number, i64::from(*flag)),
        (Shape::Scalar(Scalar::Double), Value::Number(n)) => put_double(out, number, n.as_f64().ok_or_else(|| mismatch(field))?),
        (Shape::Message(name), Value::Object(_)) => {
            let inner = table::find(name).ok_or_else(|| mismatch(field))?;
            put_bytes(out, number, &message(inner, value)?);
        }
        (Shape::Special(special), value) => put_bytes(out, number, &self::special(field, special, value)?),
        _ => return Err(mismatch(field)),
    }
    Ok(())
}

fn special(field: &Field, special: Special, value: &Value) -> Result<Vec<u8>, ProtobufError> {
    let mut out = Vec::new();
    match (special, value) {
        (Special::Quantity, Value::String(text)) => put_bytes(&mut out, 1, text.as_bytes()),
        (Special::Quantity, Value::Number(n)) => put_bytes(&mut out, 1, n.to_string().as_bytes()),
        (Special::IntOrString, Value::String(text)) => {
            put_integer(&mut out, 1, 1);
            put_bytes(&mut out, 3, text.as_bytes());
        }
        (Special::IntOrString, Value::Number(n)) => {
            put_integer(&mut out, 1, 0);
            put_integer(&mut out, 2, n.as_i64().unwrap_or_default());
        }
        (Special::Time | Special::MicroTime, Value::String(text)) => {
            let time = outrigger_api::time::parse(text).ok_or_else(|| mismatch(field))?;
            put_integer(&mut out, 1, time.as_second());
            put_integer(&mut out, 2, i64::from(time.subsec_nanosecond()));
        }
        (Special::Raw, value) => put_bytes(&mut out, 1, value.to_string().as_bytes()),
        (Special::Duration, Value::String(text)) => {
            let seconds: f64 = text.trim_end_matches('s').parse().map_err(|_| mismatch(field))?;
            put_integer(&mut out, 1, (seconds * 1e9) as i64);
        }
        (Special::Strings, Value::Array(items)) => strings(&mut out, 1, items),
        (Special::SchemaOrArray | Special::SchemaOrStrings, Value::Object(_)) => put_bytes(&mut out, 1, &schema(value)?),
        (Special::SchemaOrArray, Value::Array(items)) => {
            for item in items {
                put_bytes(&mut out, 2, &schema(item)?);
            }
        }
        (Special::SchemaOrStrings, Value::Array(items)) => strings(&mut out, 2, items),
        (Special::SchemaOrBool, Value::Bool(allows)) => put_integer(&mut out, 1, i64::from(*allows)),
        (Special::SchemaOrBool, Value::Object(_)) => {
            put_integer(&mut out, 1, 1);
            put_bytes(&mut out, 2, &schema(value)?);
        }
        _ => return Err(mismatch(field)),
    }
    Ok(out)
}

fn strings(out: &mut Vec<u8>, number: u32, items: &[Value]) {
    for text in items.iter().filter_map(Value::as_str) {
        put_bytes(out, number, text.as_bytes());
    }
}

fn schema(value: &Value) -> Result<Vec<u8>, ProtobufError> {
    let inner = table::find("apiextensions/v1 JSONSchemaProps").ok_or_else(|| ProtobufError::UnknownKind("JSONSchemaProps".into()))?;
    message(inner, value)
}
