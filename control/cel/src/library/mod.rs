//! The functions of the language itself and of the extensions that Kubernetes turns on.
mod convert;
mod format;
mod lists;
mod operators;
mod strings;
mod time;

use crate::function::Library;
use crate::value::{Error, Value};

pub const ALL: &[Library] =
    &[operators::OPERATORS, operators::COMPARISONS, convert::CONVERSIONS, strings::STRINGS, lists::LISTS, time::TIMES];

/// The text of an argument whose type the signature names.
fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn int(value: &Value) -> i64 {
    match value {
        Value::Int(number) => *number,
        _ => 0,
    }
}

fn items(value: &Value) -> &[Value] {
    match value {
        Value::List(items) => items,
        _ => &[],
    }
}

fn compiled(pattern: &str) -> Result<regex::Regex, Error> {
    regex::Regex::new(pattern).map_err(|error| Error::new(format!("error parsing regexp: {error}")))
}
