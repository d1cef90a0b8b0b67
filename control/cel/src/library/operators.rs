//! Operators: arithmetic that never wraps, comparison, equality, membership and indexing.
use std::cmp::Ordering;
use std::sync::Arc;

use jiff::SignedDuration;

use super::{int, items, text};
use crate::function::Library;
use crate::value::{Error, Value};

pub const OPERATORS: Library = &[
    ("!_(bool) -> bool", |a| Ok((!a[0].as_bool().unwrap_or_default()).into())),
    ("-_(int) -> int", |a| int(&a[0]).checked_neg().map(Value::Int).ok_or_else(overflow)),
    ("-_(double) -> double", |a| Ok(Value::Double(-double(&a[0])))),
    ("_+_(int, int) -> int", |a| int(&a[0]).checked_add(int(&a[1])).map(Value::Int).ok_or_else(overflow)),
    ("_+_(uint, uint) -> uint", |a| uint(&a[0]).checked_add(uint(&a[1])).map(Value::Uint).ok_or_else(unsigned_overflow)),
    ("_+_(double, double) -> double", |a| Ok(Value::Double(double(&a[0]) + double(&a[1])))),
    ("_+_(string, string) -> string", |a| Ok(Value::from(format!("{}{}", text(&a[0]), text(&a[1]))))),
    ("_+_(bytes, bytes) -> bytes", |a| Ok(Value::Bytes([bytes(&a[0]), bytes(&a[1])].concat().into()))),
    ("_+_(list(A), list(A)) -> list(A)", |a| Ok([items(&a[0]), items(&a[1])].concat().into())),
    ("_+_(timestamp, duration) -> timestamp", |a| shift(&a[0], span(&a[1]))),
    ("_+_(duration, timestamp) -> timestamp", |a| shift(&a[1], span(&a[0]))),
    ("_+_(duration, duration) -> duration", |a| span(&a[0]).checked_add(span(&a[1])).map(Value::Duration).ok_or_else(out_of_range)),
    ("_-_(int, int) -> int", |a| int(&a[0]).checked_sub(int(&a[1])).map(Value::Int).ok_or_else(overflow)),
    ("_-_(uint, uint) -> uint", |a| uint(&a[0]).checked_sub(uint(&a[1])).map(Value::Uint).ok_or_else(unsigned_overflow)),
    ("_-_(double, double) -> double", |a| Ok(Value::Double(double(&a[0]) - double(&a[1])))),
    ("_-_(timestamp, timestamp) -> duration", |a| match a {
        [Value::Timestamp(later), Value::Timestamp(earlier)] => Ok(Value::Duration(later.duration_since(*earlier))),
        _ => Err(Error::no_overload()),
    }),
    ("_-_(timestamp, duration) -> timestamp", |a| shift(&a[0], -span(&a[1]))),
    ("_-_(duration, duration) -> duration", |a| span(&a[0]).checked_sub(span(&a[1])).map(Value::Duration).ok_or_else(out_of_range)),
    ("_*_(int, int) -> int", |a| int(&a[0]).checked_mul(int(&a[1])).map(Value::Int).ok_or_else(overflow)),
    ("_*_(uint, uint) -> uint", |a| uint(&a[0]).checked_mul(uint(&a[1])).map(Value::Uint).ok_or_else(unsigned_overflow)),
    ("_*_(double, double) -> double", |a| Ok(Value::Double(double(&a[0]) * double(&a[1])))),
    ("_/_(int, int) -> int", |a| divide(int(&a[1]), "division by zero", |by| int(&a[0]).checked_div(by))),
    ("_/_(uint, uint) -> uint", |a| uint(&a[0]).checked_div(uint(&a[1])).map(Value::Uint).ok_or_else(|| Error::new("division by zero"))),
    ("_/_(double, double) -> double", |a| Ok(Value::Double(double(&a[0]) / double(&a[1])))),
    ("_%_(int, int) -> int", |a| divide(int(&a[1]), "modulus by zero", |by| int(&a[0]).checked_rem(by))),
    ("_%_(uint, uint) -> uint", |a| uint(&a[0]).checked_rem(uint(&a[1])).map(Value::Uint).ok_or_else(|| Error::new("modulus by zero"))),
    ("_==_(A, A) -> bool", |a| Ok((a[0] == a[1]).into())),
    ("_!=_(A, A) -> bool", |a| Ok((a[0] != a[1]).into())),
    ("@in(A, list(A)) -> bool", |a| Ok(items(&a[1]).contains(&a[0]).into())),
    ("@in(A, map(A, B)) -> bool", |a| match (&a[1], a[0].key()) {
        (Value::Map(map), Some(key)) => Ok(map.contains_key(&key).into()),
        _ => Ok(false.into()),
    }),
    ("_[_](list(A), int) -> A", index),
    ("_[_](map(A, B), A) -> B", index),
    ("_[_](optional(list(A)), int) -> optional(A)", index_optional),
    ("_[_](optional(map(A, B)), A) -> optional(B)", index_optional),
    ("_[?_](list(A), int) -> optional(A)", index_optional),
    ("_[?_](map(A, B), A) -> optional(B)", index_optional),
    ("_[?_](optional(list(A)), int) -> optional(A)", index_optional),
    ("_[?_](optional(map(A, B)), A) -> optional(B)", index_optional),
    ("optional.of(A) -> optional(A)", |a| Ok(Some(a[0].clone()).into())),
    ("optional.none() -> optional(dyn)", |_| Ok(None.into())),
    ("optional.ofNonZeroValue(A) -> optional(A)", |a| Ok(Some(a[0].clone()).filter(|value| !value.is_zero()).into())),
    ("optional(A).hasValue() -> bool", |a| Ok(inner(&a[0]).is_some().into())),
    ("optional(A).value() -> A", |a| inner(&a[0]).ok_or_else(|| Error::new("optional.none() dereference"))),
    ("optional(A).or(optional(A)) -> optional(A)", |a| Ok(if inner(&a[0]).is_some() { a[0].clone() } else { a[1].clone() })),
    ("optional(A).orValue(A) -> A", |a| Ok(inner(&a[0]).unwrap_or_else(|| a[1].clone()))),
];

/// Every kind of number compares with every other.
macro_rules! comparisons {
    ($($name:literal => $run:ident),*) => {
        &[$(
            (concat!($name, "(bool, bool) -> bool"), $run),
            (concat!($name, "(int, int) -> bool"), $run),
            (concat!($name, "(int, uint) -> bool"), $run),
            (concat!($name, "(int, double) -> bool"), $run),
            (concat!($name, "(uint, uint) -> bool"), $run),
            (concat!($name, "(uint, int) -> bool"), $run),
            (concat!($name, "(uint, double) -> bool"), $run),
            (concat!($name, "(double, double) -> bool"), $run),
            (concat!($name, "(double, int) -> bool"), $run),
            (concat!($name, "(double, uint) -> bool"), $run),
            (concat!($name, "(string, string) -> bool"), $run),
            (concat!($name, "(bytes, bytes) -> bool"), $run),
            (concat!($name, "(timestamp, timestamp) -> bool"), $run),
            (concat!($name, "(duration, duration) -> bool"), $run),
        )*]
    };
}

pub const COMPARISONS: Library = comparisons!("_<_" => less, "_<=_" => at_most, "_>_" => greater, "_>=_" => at_least);

fn overflow() -> Error {
    Error::new("integer overflow")
}

fn unsigned_overflow() -> Error {
    Error::new("unsigned integer overflow")
}

fn out_of_range() -> Error {
    Error::new("duration overflow")
}

fn double(value: &Value) -> f64 {
    match value {
        Value::Double(number) => *number,
        _ => 0.0,
    }
}

fn uint(value: &Value) -> u64 {
    match value {
        Value::Uint(number) => *number,
        _ => 0,
    }
}

fn bytes(value: &Value) -> &[u8] {
    match value {
        Value::Bytes(bytes) => bytes,
        _ => &[],
    }
}

fn span(value: &Value) -> SignedDuration {
    match value {
        Value::Duration(duration) => *duration,
        _ => SignedDuration::ZERO,
    }
}

fn shift(time: &Value, by: SignedDuration) -> Result<Value, Error> {
    match time {
        Value::Timestamp(time) => time.checked_add(by).map(Value::Timestamp).map_err(|_| Error::new("timestamp overflow")),
        _ => Err(Error::no_overload()),
    }
}

fn divide(by: i64, zero: &str, compute: impl Fn(i64) -> Option<i64>) -> Result<Value, Error> {
    if by == 0 {
        return Err(Error::new(zero));
    }
    compute(by).map(Value::Int).ok_or_else(overflow)
}

/// NaN is in no order with anything.
fn ordered(args: &[Value], holds: fn(Ordering) -> bool) -> Result<Value, Error> {
    Ok(args[0].compare(&args[1]).is_some_and(holds).into())
}

fn less(args: &[Value]) -> Result<Value, Error> {
    ordered(args, Ordering::is_lt)
}

fn at_most(args: &[Value]) -> Result<Value, Error> {
    ordered(args, Ordering::is_le)
}

fn greater(args: &[Value]) -> Result<Value, Error> {
    ordered(args, Ordering::is_gt)
}

fn at_least(args: &[Value]) -> Result<Value, Error> {
    ordered(args, Ordering::is_ge)
}

fn find(container: &Value, key: &Value) -> Option<Value> {
    match container {
        Value::List(items) => usize::try_from(int(key)).ok().and_then(|at| items.get(at)).cloned(),
        Value::Map(map) => map.get(&key.key()?).cloned(),
        _ => None,
    }
}

fn index(args: &[Value]) -> Result<Value, Error> {
    let missing = || match (&args[0], args[1].key()) {
        (Value::List(_), _) => Error::new(format!("index out of bounds: {}", int(&args[1]))),
        (_, Some(key)) => Error::no_key(key),
        _ => Error::new("unsupported key type"),
    };
    find(&args[0], &args[1]).ok_or_else(missing)
}

fn index_optional(args: &[Value]) -> Result<Value, Error> {
    let container = match &args[0] {
        Value::Optional(None) => return Ok(None.into()),
        Value::Optional(Some(inner)) => Arc::clone(inner),
        other => Arc::new(other.clone()),
    };
    Ok(find(&container, &args[1]).into())
}

fn inner(value: &Value) -> Option<Value> {
    match value {
        Value::Optional(inner) => inner.as_deref().cloned(),
        _ => None,
    }
}
