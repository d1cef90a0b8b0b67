//! Functions: one signature and one implementation per overload, in tables that read like declarations.
use std::collections::HashMap;
use std::sync::Arc;

use crate::types::Type;
use crate::value::{Error, Value};

/// Runs on the arguments, the receiver first.
pub type Run = fn(&[Value]) -> Result<Value, Error>;

/// Rows such as `("string.startsWith(string) -> bool", run)`; one-letter types in capitals stand for any one type.
pub type Library = &'static [(&'static str, Run)];

pub struct Function {
    pub name: String,
    /// Called with a receiver.
    pub member: bool,
    /// The receiver's type first.
    pub params: Vec<Type>,
    pub result: Type,
    pub run: Run,
}

impl std::fmt::Debug for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:?} -> {}", self.name, self.params, self.result)
    }
}

impl Function {
    /// None for a malformed signature.
    fn parse(signature: &'static str, run: Run) -> Option<Function> {
        let (call, result) = signature.rsplit_once(" -> ")?;
        // The parameters' parenthesis is the one that the call's last one closes.
        let call = call.strip_suffix(')')?;
        let open = matching_open(call)?;
        let (path, args) = (&call[..open], &call[open + 1..]);
        let mut params: Vec<Type> = split_args(args).map(parse_type).collect::<Option<_>>()?;
        // `string.size` has a receiver, `optional.of` a namespace.
        let receiver = path.rfind('.').and_then(|dot| Some((parse_type(&path[..dot])?, &path[dot + 1..])));
        let (member, name) = match receiver {
            Some((kind, name)) => {
                params.insert(0, kind);
                (true, name)
            }
            None => (false, path),
        };
        Some(Function { name: name.into(), member, params, result: parse_type(result)?, run })
    }

    /// Whether the values are of the parameters' types, as far as values know.
    pub fn fits(&self, args: &[Value]) -> bool {
        self.params.len() == args.len() && self.params.iter().zip(args).all(|(kind, value)| is_of(value, kind))
    }
}

fn matching_open(call: &str) -> Option<usize> {
    let mut depth = 1;
    for (at, c) in call.char_indices().rev() {
        match c {
            ')' => depth += 1,
            '(' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// Splits at the commas outside of parentheses.
fn split_args(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0;
    let split = move |c: char| {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    };
    text.split(split).map(str::trim).filter(|arg| !arg.is_empty())
}

/// Opaque types have a dot or a capital in their names: `kubernetes.Quantity`.
fn parse_type(text: &'static str) -> Option<Type> {
    let inner = |prefix: &str| text.strip_prefix(prefix)?.strip_suffix(')');
    if let Some(item) = inner("list(") {
        return Some(Type::list(parse_type(item)?));
    }
    if let Some(item) = inner("optional(") {
        return Some(Type::optional(parse_type(item)?));
    }
    if let Some(entry) = inner("map(") {
        let mut args = split_args(entry);
        return Some(Type::Map(Box::new(parse_type(args.next()?)?), Box::new(parse_type(args.next()?)?)));
    }
    Some(match text {
        "dyn" => Type::Dyn,
        "null" => Type::Null,
        "bool" => Type::Bool,
        "int" => Type::Int,
        "uint" => Type::Uint,
        "double" => Type::Double,
        "string" => Type::String,
        "bytes" => Type::Bytes,
        "timestamp" => Type::Timestamp,
        "duration" => Type::Duration,
        "type" => Type::Type,
        "A" | "B" => Type::Param(text.chars().next()?),
        _ if text.starts_with("kubernetes.") || text.starts_with("net.") => Type::Opaque(text),
        _ => return None,
    })
}

fn is_of(value: &Value, kind: &Type) -> bool {
    match (value, kind) {
        (_, Type::Dyn | Type::Param(_))
        | (Value::Null, Type::Null)
        | (Value::Bool(_), Type::Bool)
        | (Value::Int(_), Type::Int)
        | (Value::Uint(_), Type::Uint)
        | (Value::Double(_), Type::Double)
        | (Value::String(_), Type::String)
        | (Value::Bytes(_), Type::Bytes)
        | (Value::Timestamp(_), Type::Timestamp)
        | (Value::Duration(_), Type::Duration)
        | (Value::Map(_), Type::Map(..) | Type::Struct(_))
        | (Value::Optional(_), Type::Optional(_))
        | (Value::Type(_), Type::Type) => true,
        (Value::List(items), Type::List(kind)) => items.iter().all(|item| is_of(item, kind)),
        (Value::Opaque(value), Type::Opaque(name)) => value.type_name() == *name,
        _ => false,
    }
}

/// All overloads, by name.
#[derive(Default)]
pub struct Functions(HashMap<String, Vec<Arc<Function>>>);

impl Functions {
    /// The language's own functions and those of the libraries.
    pub fn new(libraries: &[Library]) -> Functions {
        let mut functions = Functions::default();
        for (signature, run) in crate::library::ALL.iter().chain(libraries).flat_map(|library| library.iter()) {
            // A malformed row is found by the tests, which call every function.
            if let Some(function) = Function::parse(signature, *run) {
                functions.0.entry(function.name.clone()).or_default().push(Arc::new(function));
            } else {
                debug_assert!(false, "{signature}");
            }
        }
        functions
    }

    pub fn named(&self, name: &str, member: bool) -> impl Iterator<Item = &Arc<Function>> {
        self.0.get(name).into_iter().flatten().filter(move |function| function.member == member)
    }
}
