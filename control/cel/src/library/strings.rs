//! Text: the language's tests, the strings extension (version 2), and regular expressions. Positions count characters.
use super::format::format;
use super::{compiled, int, items, text};
use crate::function::Library;
use crate::value::{Error, Value};

pub const STRINGS: Library = &[
    ("string.contains(string) -> bool", |a| Ok(text(&a[0]).contains(text(&a[1])).into())),
    ("string.startsWith(string) -> bool", |a| Ok(text(&a[0]).starts_with(text(&a[1])).into())),
    ("string.endsWith(string) -> bool", |a| Ok(text(&a[0]).ends_with(text(&a[1])).into())),
    ("string.matches(string) -> bool", matches),
    ("matches(string, string) -> bool", matches),
    ("string.find(string) -> string", |a| Ok(compiled(text(&a[1]))?.find(text(&a[0])).map_or("", |found| found.as_str()).into())),
    ("string.findAll(string) -> list(string)", |a| find_all(a, -1)),
    ("string.findAll(string, int) -> list(string)", |a| find_all(a, int(&a[2]))),
    ("string.charAt(int) -> string", |a| {
        let (text, at) = (text(&a[0]), position(a, 1)?);
        match text.chars().nth(at) {
            Some(c) => Ok(Value::from(c.to_string())),
            None if at == text.chars().count() => Ok("".into()),
            None => Err(out_of_range(int(&a[1]))),
        }
    }),
    ("string.indexOf(string) -> int", |a| Ok(Value::Int(index_of(text(&a[0]), text(&a[1]), 0)))),
    ("string.indexOf(string, int) -> int", |a| Ok(Value::Int(index_of(text(&a[0]), text(&a[1]), bounded(a, 2)?)))),
    ("string.lastIndexOf(string) -> int", |a| Ok(Value::Int(last_index_of(text(&a[0]), text(&a[1]), usize::MAX)))),
    ("string.lastIndexOf(string, int) -> int", |a| Ok(Value::Int(last_index_of(text(&a[0]), text(&a[1]), bounded(a, 2)?)))),
    ("string.lowerAscii() -> string", |a| Ok(text(&a[0]).to_ascii_lowercase().into())),
    ("string.upperAscii() -> string", |a| Ok(text(&a[0]).to_ascii_uppercase().into())),
    ("string.replace(string, string) -> string", |a| Ok(text(&a[0]).replace(text(&a[1]), text(&a[2])).into())),
    ("string.replace(string, string, int) -> string", |a| {
        Ok(match usize::try_from(int(&a[3])) {
            Ok(most) => text(&a[0]).replacen(text(&a[1]), text(&a[2]), most),
            Err(_) => text(&a[0]).replace(text(&a[1]), text(&a[2])),
        }
        .into())
    }),
    ("string.split(string) -> list(string)", |a| Ok(split(text(&a[0]), text(&a[1]), -1))),
    ("string.split(string, int) -> list(string)", |a| Ok(split(text(&a[0]), text(&a[1]), int(&a[2])))),
    ("string.substring(int) -> string", |a| substring(text(&a[0]), int(&a[1]), text(&a[0]).chars().count() as i64)),
    ("string.substring(int, int) -> string", |a| substring(text(&a[0]), int(&a[1]), int(&a[2]))),
    ("string.trim() -> string", |a| Ok(text(&a[0]).trim().into())),
    ("list(string).join() -> string", |a| Ok(join(&a[0], ""))),
    ("list(string).join(string) -> string", |a| Ok(join(&a[0], text(&a[1])))),
    ("string.format(list(dyn)) -> string", |a| format(text(&a[0]), items(&a[1])).map(Value::from)),
    ("strings.quote(string) -> string", |a| Ok(quote(text(&a[0])).into())),
];

fn matches(args: &[Value]) -> Result<Value, Error> {
    Ok(compiled(text(&args[1]))?.is_match(text(&args[0])).into())
}

fn find_all(args: &[Value], most: i64) -> Result<Value, Error> {
    let pattern = compiled(text(&args[1]))?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    Ok(pattern.find_iter(text(&args[0])).take(most).map(|found| Value::from(found.as_str())).collect::<Vec<_>>().into())
}

fn out_of_range(at: i64) -> Error {
    Error::new(format!("index out of range: {at}"))
}

fn position(args: &[Value], at: usize) -> Result<usize, Error> {
    usize::try_from(int(&args[at])).map_err(|_| out_of_range(int(&args[at])))
}

/// A position within the text.
fn bounded(args: &[Value], at: usize) -> Result<usize, Error> {
    let position = position(args, at)?;
    if position > text(&args[0]).chars().count() { Err(out_of_range(int(&args[at]))) } else { Ok(position) }
}

/// The byte at which the character at a position starts.
fn offset(text: &str, position: usize) -> usize {
    text.char_indices().nth(position).map_or(text.len(), |(offset, _)| offset)
}

fn index_of(text: &str, wanted: &str, from: usize) -> i64 {
    let start = offset(text, from);
    text[start..].find(wanted).map_or(-1, |found| text[..start + found].chars().count() as i64)
}

fn last_index_of(text: &str, wanted: &str, up_to: usize) -> i64 {
    let found = text.match_indices(wanted).map(|(at, _)| text[..at].chars().count()).filter(|at| *at <= up_to).max();
    let empty = || wanted.is_empty().then(|| text.chars().count().min(up_to));
    empty().or(found).map_or(-1, |at| at as i64)
}

/// As Go's SplitN: no parts for 0, all for a negative number.
fn split(text: &str, separator: &str, most: i64) -> Value {
    let parts: Vec<Value> = match (usize::try_from(most), separator) {
        (Ok(0), _) => Vec::new(),
        (Ok(most), "") => {
            let cut = offset(text, most - 1);
            let head = text[..cut].chars().map(|c| Value::from(c.to_string()));
            head.chain(Some(&text[cut..]).filter(|rest: &&str| !rest.is_empty()).map(Value::from)).collect()
        }
        (Ok(most), _) => text.splitn(most, separator).map(Value::from).collect(),
        (Err(_), "") => text.chars().map(|c| Value::from(c.to_string())).collect(),
        (Err(_), _) => text.split(separator).map(Value::from).collect(),
    };
    parts.into()
}

fn substring(text: &str, start: i64, end: i64) -> Result<Value, Error> {
    let length = text.chars().count() as i64;
    for at in [start, end] {
        if at < 0 || at > length {
            return Err(out_of_range(at));
        }
    }
    if start > end {
        return Err(Error::new(format!("invalid substring range. start: {start}, end: {end}")));
    }
    Ok(text[offset(text, start as usize)..offset(text, end as usize)].into())
}

fn join(list: &Value, separator: &str) -> Value {
    items(list).iter().map(text).collect::<Vec<_>>().join(separator).into()
}

fn quote(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}
