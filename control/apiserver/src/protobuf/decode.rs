//! From the wire to JSON, as Go's JSON encoder would have written the same struct.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use outrigger_api::meta;
use serde_json::{Map, Value, json};

use super::ProtobufError;
use super::table::{self, Field, Many, Message, Scalar, Shape, Special};
use super::wire::{Data, fields};

/// Messages may be `depth` deep: some contain their own kind.
pub fn message(message: &Message, bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    let depth = depth.checked_sub(1).ok_or(ProtobufError::TooDeep)?;
    let mut object = Map::new();
    fill(message, bytes, &mut object, depth)?;
    Ok(Value::Object(object))
}

fn fill(message: &Message, bytes: &[u8], object: &mut Map<String, Value>, depth: usize) -> Result<(), ProtobufError> {
    for field in fields(bytes) {
        let (number, data) = field?;
        let Some(field) = message.fields.iter().find(|f| f.number == number) else { continue };
        if field.inline {
            if let (Shape::Message(name), Data::Bytes(inner)) = (field.shape, data)
                && let Some(inner_message) = table::find(name)
            {
                fill(inner_message, inner, object, depth)?;
            }
            continue;
        }
        match field.many {
            Many::Map => {
                let (key, value) = entry(field, data, depth)?;
                meta::map_mut(object.entry(field.name).or_insert(Value::Null)).insert(key, value);
            }
            Many::List => {
                let value = one(field, data, depth)?;
                match object.entry(field.name).or_insert_with(|| json!([])) {
                    Value::Array(items) => items.push(value),
                    other => *other = json!([value]),
                }
            }
            Many::One => {
                let value = one(field, data, depth)?;
                let absent = value.is_null() || (field.omit_zero && meta::is_empty(&value) && !value.is_object());
                if !absent {
                    object.insert(field.name.to_string(), value);
                }
            }
        }
    }
    Ok(())
}

fn entry(field: &Field, data: Data<'_>, depth: usize) -> Result<(String, Value), ProtobufError> {
    let Data::Bytes(bytes) = data else { return Err(mismatch(field)) };
    let (mut key, mut value) = (String::new(), None);
    for part in fields(bytes) {
        match part? {
            (1, Data::Bytes(text)) => key = String::from_utf8_lossy(text).into_owned(),
            (2, data) => value = Some(one(field, data, depth)?),
            _ => {}
        }
    }
    let value = match value {
        Some(value) => value,
        None => one(field, Data::Bytes(&[]), depth)?,
    };
    Ok((key, value))
}

fn mismatch(field: &Field) -> ProtobufError {
    ProtobufError::Mismatch(field.name.to_string())
}

fn one(field: &Field, data: Data<'_>, depth: usize) -> Result<Value, ProtobufError> {
    match (field.shape, data) {
        (Shape::Scalar(Scalar::Text), Data::Bytes(bytes)) => {
            Ok(std::str::from_utf8(bytes).map_err(|_| ProtobufError::Wire("invalid UTF-8"))?.into())
        }
        (Shape::Scalar(Scalar::Bytes), Data::Bytes(bytes)) => Ok(STANDARD.encode(bytes).into()),
        (Shape::Scalar(Scalar::Integer), Data::Varint(value)) => Ok((value as i64).into()),
        (Shape::Scalar(Scalar::Boolean), Data::Varint(value)) => Ok((value != 0).into()),
        (Shape::Scalar(Scalar::Double), Data::Fixed64(bits)) => Ok(number(f64::from_bits(bits))),
        (Shape::Scalar(Scalar::Double), Data::Fixed32(bits)) => Ok(number(f32::from_bits(bits).into())),
        (Shape::Message(name), Data::Bytes(bytes)) => match table::find(name) {
            Some(inner) => message(inner, bytes, depth),
            None => Err(mismatch(field)),
        },
        (Shape::Special(special), Data::Bytes(bytes)) => self::special(special, bytes, depth),
        _ => Err(mismatch(field)),
    }
}

/// Whole numbers as JSON integers, as Go prints them.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { (value as i64).into() } else { value.into() }
}

fn special(special: Special, bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    let mut integers = [0i64; 4];
    let mut parts: [Vec<&[u8]>; 4] = Default::default();
    for field in fields(bytes) {
        match field? {
            (n @ 1..=3, Data::Varint(value)) => integers[n as usize] = value as i64,
            (n @ 1..=3, Data::Bytes(part)) => parts[n as usize].push(part),
            _ => {}
        }
    }
    let text = |n: usize| parts[n].first().map(|t| String::from_utf8_lossy(t).into_owned()).unwrap_or_default();
    let texts = |n: usize| Value::Array(parts[n].iter().map(|t| String::from_utf8_lossy(t).into_owned().into()).collect());
    let schema = |part: &[u8]| match table::find("apiextensions/v1 JSONSchemaProps") {
        Some(inner) => message(inner, part, depth),
        None => Err(ProtobufError::UnknownKind("JSONSchemaProps".into())),
    };
    Ok(match special {
        Special::Quantity => text(1).into(),
        Special::IntOrString if integers[1] == 1 => text(3).into(),
        Special::IntOrString => integers[2].into(),
        Special::Time if bytes.is_empty() => Value::Null,
        Special::MicroTime if bytes.is_empty() => Value::Null,
        Special::Time => outrigger_api::time::format(timestamp(integers[1], integers[2])).into(),
        Special::MicroTime => outrigger_api::time::format_micro(timestamp(integers[1], integers[2])).into(),
        Special::Raw => match parts[1].first() {
            Some(raw) if !raw.is_empty() => serde_json::from_slice(raw).map_err(|_| ProtobufError::Wire("embedded value is not JSON"))?,
            _ => Value::Null,
        },
        Special::Duration => format!("{}s", integers[1] as f64 / 1e9).into(),
        Special::Strings => texts(1),
        Special::SchemaOrArray => match parts[1].first() {
            Some(one) => schema(one)?,
            None => parts[2].iter().map(|part| schema(part)).collect::<Result<Vec<_>, _>>()?.into(),
        },
        Special::SchemaOrBool => match parts[2].first() {
            Some(one) => schema(one)?,
            None => (integers[1] != 0).into(),
        },
        Special::SchemaOrStrings => match parts[1].first() {
            Some(one) => schema(one)?,
            None => texts(2),
        },
    })
}

fn timestamp(seconds: i64, nanos: i64) -> Timestamp {
    Timestamp::new(seconds, nanos as i32).unwrap_or(Timestamp::UNIX_EPOCH)
}
