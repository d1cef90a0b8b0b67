//! Types of expressions, as the checker knows them.
use std::fmt;
use std::sync::Arc;

/// A struct with named fields, which may contain itself: fields are asked for one by one.
pub trait Structure: Send + Sync {
    fn name(&self) -> String;
    fn field(&self, name: &str) -> Option<Type>;
    /// Whether a value of the other type may stand where this one is wanted.
    fn accepts(&self, other: &Type) -> bool {
        matches!(other, Type::Struct(structure) if structure.name() == self.name())
    }
}

#[derive(Clone)]
pub enum Type {
    /// Known only when evaluated.
    Dyn,
    Null,
    Bool,
    Int,
    Uint,
    Double,
    String,
    Bytes,
    Timestamp,
    Duration,
    List(Box<Type>),
    Map(Box<Type>, Box<Type>),
    Optional(Box<Type>),
    /// A type's own type.
    Type,
    Struct(Arc<dyn Structure>),
    /// A type that only functions know the inside of.
    Opaque(&'static str),
    /// Any one type, the same wherever it occurs in a signature.
    Param(char),
}

impl Type {
    pub fn list(item: Type) -> Type {
        Type::List(Box::new(item))
    }

    pub fn map(value: Type) -> Type {
        Type::Map(Box::new(Type::String), Box::new(value))
    }

    pub fn optional(inner: Type) -> Type {
        Type::Optional(Box::new(inner))
    }

    pub fn is_dyn(&self) -> bool {
        matches!(self, Type::Dyn | Type::Param(_))
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Type::Dyn => "dyn",
            Type::Null => "null",
            Type::Bool => "bool",
            Type::Int => "int",
            Type::Uint => "uint",
            Type::Double => "double",
            Type::String => "string",
            Type::Bytes => "bytes",
            Type::Timestamp => "timestamp",
            Type::Duration => "duration",
            Type::Type => "type",
            Type::List(item) => return write!(f, "list({item})"),
            Type::Map(key, value) => return write!(f, "map({key}, {value})"),
            Type::Optional(inner) => return write!(f, "optional_type({inner})"),
            Type::Struct(structure) => return f.write_str(&structure.name()),
            Type::Opaque(name) => name,
            Type::Param(name) => return write!(f, "{name}"),
        };
        f.write_str(name)
    }
}

impl fmt::Debug for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PartialEq for Type {
    fn eq(&self, other: &Type) -> bool {
        match (self, other) {
            (Type::List(a), Type::List(b)) | (Type::Optional(a), Type::Optional(b)) => a == b,
            (Type::Map(a, b), Type::Map(c, d)) => a == c && b == d,
            (Type::Struct(a), Type::Struct(b)) => a.name() == b.name(),
            (Type::Opaque(a), Type::Opaque(b)) => a == b,
            (Type::Param(a), Type::Param(b)) => a == b,
            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
        }
    }
}

/// What the parameters of a signature stand for in one call.
#[derive(Default)]
pub struct Substitution(Vec<(char, Type)>);

impl Substitution {
    /// Whether a value of `actual` may be given where `declared` is wanted.
    pub fn accepts(&mut self, declared: &Type, actual: &Type) -> bool {
        match (declared, actual) {
            (Type::Param(name), actual) => self.bind(*name, actual),
            (Type::Dyn, _) | (_, Type::Dyn) => true,
            (Type::List(a), Type::List(b)) | (Type::Optional(a), Type::Optional(b)) => self.accepts(a, b),
            (Type::Map(a, b), Type::Map(c, d)) => self.accepts(a, c) && self.accepts(b, d),
            (Type::Struct(_) | Type::Timestamp | Type::Duration | Type::Opaque(_), Type::Null) => true,
            (Type::Struct(structure), actual) => structure.accepts(actual),
            (declared, actual) => declared == actual,
        }
    }

    fn bind(&mut self, name: char, actual: &Type) -> bool {
        let Some(at) = self.0.iter().position(|(bound, _)| *bound == name) else {
            self.0.push((name, actual.clone()));
            return true;
        };
        let bound = self.0[at].1.clone();
        if Substitution::default().accepts(&bound, actual) {
            return true;
        }
        let widens = Substitution::default().accepts(actual, &bound);
        if widens {
            self.0[at].1 = actual.clone();
        }
        widens
    }

    /// The type with its parameters replaced; what nothing was given for may be anything.
    pub fn apply(&self, kind: &Type) -> Type {
        match kind {
            Type::Param(name) => self.0.iter().find(|(bound, _)| bound == name).map_or(Type::Dyn, |(_, kind)| kind.clone()),
            Type::List(item) => Type::list(self.apply(item)),
            Type::Optional(inner) => Type::optional(self.apply(inner)),
            Type::Map(key, value) => Type::Map(Box::new(self.apply(key)), Box::new(self.apply(value))),
            other => other.clone(),
        }
    }
}

/// The one type that covers both, if there is one.
pub fn join(left: &Type, right: &Type) -> Option<Type> {
    if Substitution::default().accepts(left, right) {
        return Some(if right.is_dyn() { Type::Dyn } else { left.clone() });
    }
    Substitution::default().accepts(right, left).then(|| right.clone())
}
