//! Conversions, sizes and types.
use jiff::Timestamp;

use super::{items, text};
use crate::function::Library;
use crate::value::{Error, Value, format_duration, parse_duration};

pub const CONVERSIONS: Library = &[
    ("dyn(A) -> dyn", |a| Ok(a[0].clone())),
    ("type(A) -> type", |a| Ok(Value::Type(a[0].type_name().into()))),
    ("bool(bool) -> bool", |a| Ok(a[0].clone())),
    ("bool(string) -> bool", |a| match text(&a[0]) {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true.into()),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false.into()),
        other => Err(failed(other, "bool")),
    }),
    ("int(int) -> int", |a| Ok(a[0].clone())),
    ("int(uint) -> int", whole),
    ("int(double) -> int", whole),
    ("int(string) -> int", |a| text(&a[0]).parse().map(Value::Int).map_err(|_| failed(text(&a[0]), "int"))),
    ("int(timestamp) -> int", |a| match &a[0] {
        Value::Timestamp(time) => Ok(Value::Int(time.as_second())),
        _ => Err(Error::no_overload()),
    }),
    ("int(duration) -> int", |a| match &a[0] {
        Value::Duration(duration) => i64::try_from(duration.as_nanos()).map(Value::Int).map_err(|_| Error::new("integer overflow")),
        _ => Err(Error::no_overload()),
    }),
    ("uint(uint) -> uint", |a| Ok(a[0].clone())),
    ("uint(int) -> uint", unsigned),
    ("uint(double) -> uint", unsigned),
    ("uint(string) -> uint", |a| text(&a[0]).parse().map(Value::Uint).map_err(|_| failed(text(&a[0]), "uint"))),
    ("double(double) -> double", |a| Ok(a[0].clone())),
    ("double(int) -> double", real),
    ("double(uint) -> double", real),
    ("double(string) -> double", |a| text(&a[0]).parse().map(Value::Double).map_err(|_| failed(text(&a[0]), "double"))),
    ("string(string) -> string", |a| Ok(a[0].clone())),
    ("string(bool) -> string", shown),
    ("string(int) -> string", shown),
    ("string(uint) -> string", shown),
    ("string(double) -> string", shown),
    ("string(timestamp) -> string", shown),
    ("string(duration) -> string", shown),
    ("string(bytes) -> string", shown),
    ("bytes(bytes) -> bytes", |a| Ok(a[0].clone())),
    ("bytes(string) -> bytes", |a| Ok(Value::Bytes(text(&a[0]).as_bytes().into()))),
    ("timestamp(timestamp) -> timestamp", |a| Ok(a[0].clone())),
    ("timestamp(string) -> timestamp", |a| text(&a[0]).parse().map(Value::Timestamp).map_err(|_| failed(text(&a[0]), "timestamp"))),
    ("timestamp(int) -> timestamp", |a| {
        Timestamp::from_second(super::int(&a[0])).map(Value::Timestamp).map_err(|_| Error::new("timestamp overflow"))
    }),
    ("duration(duration) -> duration", |a| Ok(a[0].clone())),
    ("duration(string) -> duration", |a| parse_duration(text(&a[0])).map(Value::Duration).ok_or_else(|| failed(text(&a[0]), "duration"))),
    ("duration(int) -> duration", |a| Ok(Value::Duration(jiff::SignedDuration::from_nanos(super::int(&a[0]))))),
    ("size(string) -> int", size),
    ("size(bytes) -> int", size),
    ("size(list(A)) -> int", size),
    ("size(map(A, B)) -> int", size),
    ("string.size() -> int", size),
    ("bytes.size() -> int", size),
    ("list(A).size() -> int", size),
    ("map(A, B).size() -> int", size),
];

fn failed(text: &str, kind: &str) -> Error {
    Error::new(format!("type conversion error from 'string' to '{kind}': {text:?}"))
}

fn whole(args: &[Value]) -> Result<Value, Error> {
    let number = match &args[0] {
        Value::Uint(number) => i64::try_from(*number).ok(),
        // The bounds themselves are no exact doubles.
        Value::Double(number) => (*number > i64::MIN as f64 && *number < i64::MAX as f64).then_some(*number as i64),
        _ => None,
    };
    number.map(Value::Int).ok_or_else(|| Error::new("integer overflow"))
}

fn unsigned(args: &[Value]) -> Result<Value, Error> {
    let number = match &args[0] {
        Value::Int(number) => u64::try_from(*number).ok(),
        Value::Double(number) => (*number >= 0.0 && *number < u64::MAX as f64).then_some(*number as u64),
        _ => None,
    };
    number.map(Value::Uint).ok_or_else(|| Error::new("unsigned integer overflow"))
}

fn real(args: &[Value]) -> Result<Value, Error> {
    match &args[0] {
        Value::Int(number) => Ok(Value::Double(*number as f64)),
        Value::Uint(number) => Ok(Value::Double(*number as f64)),
        _ => Err(Error::no_overload()),
    }
}

fn shown(args: &[Value]) -> Result<Value, Error> {
    Ok(Value::from(match &args[0] {
        Value::Bool(flag) => flag.to_string(),
        Value::Int(number) => number.to_string(),
        Value::Uint(number) => number.to_string(),
        Value::Double(number) => number.to_string(),
        Value::Timestamp(time) => time.to_string(),
        Value::Duration(duration) => format_duration(*duration),
        Value::Bytes(bytes) => {
            String::from_utf8(bytes.to_vec()).map_err(|_| Error::new("invalid UTF-8 in bytes, cannot convert to string"))?
        }
        _ => return Err(Error::no_overload()),
    }))
}

fn size(args: &[Value]) -> Result<Value, Error> {
    let size = match &args[0] {
        Value::String(text) => text.chars().count(),
        Value::Bytes(bytes) => bytes.len(),
        Value::Map(map) => map.len(),
        other => items(other).len(),
    };
    Ok(Value::Int(size as i64))
}
