//! Values while an expression is evaluated, and their JSON form.
use std::any::Any;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};

use crate::eval::Context;

/// Why an evaluation came to nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub message: String,
    /// No `&&` or `||` gets over it: the budget is spent.
    pub fatal: bool,
}

impl Error {
    pub fn new(message: impl Into<String>) -> Error {
        Error { message: message.into(), fatal: false }
    }

    pub fn no_overload() -> Error {
        Error::new("no such overload")
    }

    pub fn no_key(key: impl fmt::Display) -> Error {
        Error::new(format!("no such key: {key}"))
    }
}

/// A value of a type that the language itself doesn't have.
pub trait Opaque: Any + fmt::Debug + Send + Sync {
    fn type_name(&self) -> &'static str;
    fn equals(&self, other: &dyn Opaque) -> bool;
    /// A field, for those that have any; evaluated only when it is asked for.
    fn field(&self, _name: &str, _context: &Context<'_>) -> Option<Result<Value, Error>> {
        None
    }
}

impl dyn Opaque {
    pub fn downcast<T: Opaque>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Bool(bool),
    /// Unsigned numbers, too: equal numbers are the same key.
    Int(i128),
    String(Arc<str>),
}

pub type Map = BTreeMap<Key, Value>;

#[derive(Clone, Debug)]
pub enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    String(Arc<str>),
    Bytes(Arc<[u8]>),
    Timestamp(Timestamp),
    Duration(SignedDuration),
    List(Arc<Vec<Value>>),
    Map(Arc<Map>),
    Optional(Option<Arc<Value>>),
    /// A type, by its name.
    Type(Arc<str>),
    Opaque(Arc<dyn Opaque>),
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::String(text.into())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::String(text.into())
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Value {
        Value::Bool(flag)
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Value {
        Value::Int(number)
    }
}

impl From<Vec<Value>> for Value {
    fn from(items: Vec<Value>) -> Value {
        Value::List(Arc::new(items))
    }
}

impl From<Option<Value>> for Value {
    fn from(inner: Option<Value>) -> Value {
        Value::Optional(inner.map(Arc::new))
    }
}

/// JSON without a schema: whole numbers are ints.
impl From<&serde_json::Value> for Value {
    fn from(json: &serde_json::Value) -> Value {
        match json {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(flag) => Value::Bool(*flag),
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(int), _) => Value::Int(int),
                (_, Some(uint)) => Value::Uint(uint),
                _ => Value::Double(number.as_f64().unwrap_or_default()),
            },
            serde_json::Value::String(text) => Value::from(text.as_str()),
            serde_json::Value::Array(items) => items.iter().map(Value::from).collect::<Vec<_>>().into(),
            serde_json::Value::Object(map) => {
                Value::Map(Arc::new(map.iter().map(|(key, value)| (Key::String(key.as_str().into()), Value::from(value))).collect()))
            }
        }
    }
}

impl Value {
    pub fn opaque(value: impl Opaque) -> Value {
        Value::Opaque(Arc::new(value))
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    pub fn downcast<T: Opaque>(&self) -> Option<&T> {
        match self {
            Value::Opaque(value) => value.downcast(),
            _ => None,
        }
    }

    pub fn type_name(&self) -> &str {
        match self {
            Value::Null => "null_type",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Uint(_) => "uint",
            Value::Double(_) => "double",
            Value::String(_) => "string",
            Value::Bytes(_) => "bytes",
            Value::Timestamp(_) => "google.protobuf.Timestamp",
            Value::Duration(_) => "google.protobuf.Duration",
            Value::List(_) => "list",
            Value::Map(_) => "map",
            Value::Optional(_) => "optional_type",
            Value::Type(_) => "type",
            Value::Opaque(value) => value.type_name(),
        }
    }

    /// Empty, zero or absent: what `optional.ofNonZeroValue` takes for none.
    pub fn is_zero(&self) -> bool {
        match self {
            Value::Null | Value::Optional(None) => true,
            Value::Bool(flag) => !flag,
            Value::Int(number) => *number == 0,
            Value::Uint(number) => *number == 0,
            Value::Double(number) => *number == 0.0,
            Value::String(text) => text.is_empty(),
            Value::Bytes(bytes) => bytes.is_empty(),
            Value::List(items) => items.is_empty(),
            Value::Map(map) => map.is_empty(),
            Value::Duration(duration) => duration.is_zero(),
            _ => false,
        }
    }

    /// This value as a map's key.
    pub fn key(&self) -> Option<Key> {
        match self {
            Value::Bool(flag) => Some(Key::Bool(*flag)),
            Value::Int(number) => Some(Key::Int((*number).into())),
            Value::Uint(number) => Some(Key::Int((*number).into())),
            Value::Double(number) if number.fract() == 0.0 => Some(Key::Int(*number as i128)),
            Value::String(text) => Some(Key::String(text.clone())),
            _ => None,
        }
    }

    /// The order of two values of one kind, numbers of all kinds among each other.
    pub fn compare(&self, other: &Value) -> Option<Ordering> {
        match (self, other) {
            (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
            (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
            (Value::Bytes(a), Value::Bytes(b)) => Some(a.cmp(b)),
            (Value::Timestamp(a), Value::Timestamp(b)) => Some(a.cmp(b)),
            (Value::Duration(a), Value::Duration(b)) => Some(a.cmp(b)),
            (a, b) => match (a.whole(), b.whole()) {
                (Some(a), Some(b)) => Some(a.cmp(&b)),
                _ => a.real()?.partial_cmp(&b.real()?),
            },
        }
    }

    fn whole(&self) -> Option<i128> {
        match self {
            Value::Int(number) => Some((*number).into()),
            Value::Uint(number) => Some((*number).into()),
            _ => None,
        }
    }

    fn real(&self) -> Option<f64> {
        match self {
            Value::Double(number) => Some(*number),
            other => other.whole().map(|number| number as f64),
        }
    }

    /// The JSON form: times as RFC 3339, durations in seconds, bytes in base64. None for types and opaque values.
    pub fn to_json(&self) -> Option<serde_json::Value> {
        Some(match self {
            Value::Null | Value::Optional(None) => serde_json::Value::Null,
            Value::Bool(flag) => (*flag).into(),
            Value::Int(number) => (*number).into(),
            Value::Uint(number) => (*number).into(),
            Value::Double(number) => (*number).into(),
            Value::String(text) => text.as_ref().into(),
            Value::Bytes(bytes) => STANDARD.encode(bytes).into(),
            Value::Timestamp(time) => time.to_string().into(),
            Value::Duration(duration) => format_duration(*duration).into(),
            Value::List(items) => items.iter().map(Value::to_json).collect::<Option<Vec<_>>>()?.into(),
            Value::Map(map) => {
                let entries = map.iter().map(|(key, value)| Some((key.to_string(), value.to_json()?)));
                serde_json::Value::Object(entries.collect::<Option<_>>()?)
            }
            Value::Optional(Some(inner)) => inner.to_json()?,
            Value::Type(_) | Value::Opaque(_) => return None,
        })
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Value) -> bool {
        match (self, other) {
            (Value::Null, Value::Null) => true,
            (Value::List(a), Value::List(b)) => a == b,
            (Value::Map(a), Value::Map(b)) => a == b,
            (Value::Optional(a), Value::Optional(b)) => a == b,
            (Value::Type(a), Value::Type(b)) => a == b,
            (Value::Opaque(a), Value::Opaque(b)) => a.equals(&**b),
            (a, b) => a.compare(b) == Some(Ordering::Equal),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Bool(flag) => write!(f, "{flag}"),
            Key::Int(number) => write!(f, "{number}"),
            Key::String(text) => f.write_str(text),
        }
    }
}

impl From<&Key> for Value {
    fn from(key: &Key) -> Value {
        match key {
            Key::Bool(flag) => Value::Bool(*flag),
            Key::Int(number) => match (i64::try_from(*number), u64::try_from(*number)) {
                (Ok(int), _) => Value::Int(int),
                (_, Ok(uint)) => Value::Uint(uint),
                _ => Value::Double(*number as f64),
            },
            Key::String(text) => Value::String(text.clone()),
        }
    }
}

/// Seconds with as many decimals as needed: `1.5s`.
pub fn format_duration(duration: SignedDuration) -> String {
    let nanos = duration.as_nanos();
    let (sign, nanos) = if nanos < 0 { ("-", -nanos) } else { ("", nanos) };
    let fraction = format!("{:09}", nanos % 1_000_000_000);
    let fraction = fraction.trim_end_matches('0');
    let point = if fraction.is_empty() { "" } else { "." };
    format!("{sign}{}{point}{fraction}s", nanos / 1_000_000_000)
}

/// Go's notation: `1h30m`, `-1.5s`, `100ms`.
pub fn parse_duration(text: &str) -> Option<SignedDuration> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(SignedDuration::ZERO);
    }
    let mut nanos: f64 = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let scale = match &rest[..unit] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        nanos += number * scale;
        rest = &rest[unit..];
    }
    (!text.is_empty() && nanos < i64::MAX as f64).then(|| SignedDuration::from_nanos(sign * nanos.round() as i64))
}
