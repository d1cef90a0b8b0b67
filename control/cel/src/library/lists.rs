//! Lists and sets: Kubernetes' own functions, and the lists (version 3) and sets extensions.
use std::cmp::Ordering;

use super::{int, items};
use crate::function::Library;
use crate::value::{Error, Value};

pub const LISTS: Library = &[
    ("list(A).isSorted() -> bool", |a| {
        Ok(items(&a[0]).windows(2).all(|pair| pair[0].compare(&pair[1]).is_some_and(Ordering::is_le)).into())
    }),
    ("list(A).sum() -> A", |a| sum(items(&a[0]))),
    ("list(A).min() -> A", |a| extreme(items(&a[0]), "min", Ordering::is_lt)),
    ("list(A).max() -> A", |a| extreme(items(&a[0]), "max", Ordering::is_gt)),
    ("list(A).indexOf(A) -> int", |a| Ok(place(items(&a[0]).iter().position(|item| *item == a[1])))),
    ("list(A).lastIndexOf(A) -> int", |a| Ok(place(items(&a[0]).iter().rposition(|item| *item == a[1])))),
    ("list(A).first() -> optional(A)", |a| Ok(items(&a[0]).first().cloned().into())),
    ("list(A).last() -> optional(A)", |a| Ok(items(&a[0]).last().cloned().into())),
    ("list(A).slice(int, int) -> list(A)", |a| slice(items(&a[0]), int(&a[1]), int(&a[2]))),
    ("list(dyn).flatten() -> list(dyn)", |a| Ok(flatten(items(&a[0]), 1).into())),
    ("list(dyn).flatten(int) -> list(dyn)", |a| match int(&a[1]) {
        depth if depth < 0 => Err(Error::new("level must be non-negative")),
        depth => Ok(flatten(items(&a[0]), depth).into()),
    }),
    ("list(A).distinct() -> list(A)", |a| Ok(distinct(items(&a[0])).into())),
    ("list(A).reverse() -> list(A)", |a| Ok(items(&a[0]).iter().rev().cloned().collect::<Vec<_>>().into())),
    ("list(A).sort() -> list(A)", |a| sort(items(&a[0]))),
    ("lists.range(int) -> list(int)", |a| Ok((0..int(&a[0]).min(1_000_000)).map(Value::Int).collect::<Vec<_>>().into())),
    ("sets.contains(list(A), list(A)) -> bool", |a| Ok(contains(&a[0], &a[1]).into())),
    ("sets.equivalent(list(A), list(A)) -> bool", |a| Ok((contains(&a[0], &a[1]) && contains(&a[1], &a[0])).into())),
    ("sets.intersects(list(A), list(A)) -> bool", |a| Ok(items(&a[1]).iter().any(|item| items(&a[0]).contains(item)).into())),
];

fn place(position: Option<usize>) -> Value {
    Value::Int(position.map_or(-1, |at| at as i64))
}

fn sum(items: &[Value]) -> Result<Value, Error> {
    let mut total = match items.first() {
        None => return Ok(Value::Int(0)),
        Some(first) => first.clone(),
    };
    for item in &items[1..] {
        total = match (&total, item) {
            (Value::Int(a), Value::Int(b)) => Value::Int(a.checked_add(*b).ok_or_else(|| Error::new("integer overflow"))?),
            (Value::Uint(a), Value::Uint(b)) => Value::Uint(a.checked_add(*b).ok_or_else(|| Error::new("unsigned integer overflow"))?),
            (Value::Double(a), Value::Double(b)) => Value::Double(a + b),
            (Value::Duration(a), Value::Duration(b)) => Value::Duration(a.checked_add(*b).ok_or_else(|| Error::new("duration overflow"))?),
            _ => return Err(Error::no_overload()),
        };
    }
    Ok(total)
}

fn extreme(items: &[Value], what: &str, better: fn(Ordering) -> bool) -> Result<Value, Error> {
    let mut best = items.first().ok_or_else(|| Error::new(format!("{what} called on empty list")))?;
    for item in &items[1..] {
        if better(item.compare(best).ok_or_else(Error::no_overload)?) {
            best = item;
        }
    }
    Ok(best.clone())
}

fn slice(items: &[Value], start: i64, end: i64) -> Result<Value, Error> {
    let wrong = |why: &str| Err(Error::new(format!("cannot slice({start}, {end}), {why}")));
    if start < 0 || end < 0 {
        return wrong("negative indexes not supported");
    }
    if start > end {
        return wrong("start index must be less than or equal to end index");
    }
    match items.get(start as usize..end as usize) {
        Some(part) => Ok(part.to_vec().into()),
        None => wrong(&format!("list is length {}", items.len())),
    }
}

fn flatten(items: &[Value], depth: i64) -> Vec<Value> {
    let mut flat = Vec::new();
    for item in items {
        match item {
            Value::List(inner) if depth > 0 => flat.extend(flatten(inner, depth - 1)),
            item => flat.push(item.clone()),
        }
    }
    flat
}

fn distinct(items: &[Value]) -> Vec<Value> {
    let mut kept: Vec<Value> = Vec::new();
    for item in items {
        if !kept.contains(item) {
            kept.push(item.clone());
        }
    }
    kept
}

fn sort(items: &[Value]) -> Result<Value, Error> {
    if items.windows(2).any(|pair| pair[0].compare(&pair[1]).is_none()) {
        return Err(Error::new("list elements must have the same type"));
    }
    let mut sorted = items.to_vec();
    sorted.sort_by(|a, b| a.compare(b).unwrap_or(Ordering::Equal));
    Ok(sorted.into())
}

fn contains(list: &Value, wanted: &Value) -> bool {
    items(wanted).iter().all(|item| items(list).contains(item))
}
