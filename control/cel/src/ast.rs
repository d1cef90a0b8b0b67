//! Expressions as the parser leaves them. Every node knows where in the source it stands.
use std::sync::Arc;

use crate::function::Function;
use crate::value::Value;

#[derive(Clone, Debug)]
pub struct Expr {
    /// Byte offset: of an operator, a call's parenthesis, a selection's dot, or the first character.
    pub at: usize,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub enum Kind {
    Literal(Value),
    Ident(String),
    /// `a.b`, or `a.?b`
    Select {
        operand: Box<Expr>,
        field: String,
        optional: bool,
    },
    /// `has(a.b)`
    Has {
        operand: Box<Expr>,
        field: String,
    },
    /// Operators are calls, too: `_+_`, `_[_]`.
    Call(Call),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Cond(Box<[Expr; 3]>),
    List(Vec<Item>),
    Map(Vec<Entry>),
    /// `Object.spec{replicas: 1}`
    Struct {
        name: String,
        fields: Vec<Field>,
    },
    Fold(Box<Fold>),
    /// `cel.bind(name, value, body)`
    Bind {
        name: String,
        value: Box<Expr>,
        body: Box<Expr>,
    },
}

#[derive(Clone, Debug)]
pub struct Call {
    pub function: String,
    /// The receiver of `a.f(b)`.
    pub target: Option<Box<Expr>>,
    pub args: Vec<Expr>,
    /// The overloads that fit the arguments' types; filled in by the checker.
    pub overloads: Vec<Arc<Function>>,
}

/// An element of a list literal; an optional one, `[?a]`, is left out when it has no value.
#[derive(Clone, Debug)]
pub struct Item {
    pub value: Expr,
    pub optional: bool,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub key: Expr,
    pub value: Expr,
    pub optional: bool,
}

#[derive(Clone, Debug)]
pub struct Field {
    pub at: usize,
    pub name: String,
    pub value: Expr,
    pub optional: bool,
}

/// A macro that goes over the elements of a list or map, or over an optional's value.
#[derive(Clone, Debug)]
pub struct Fold {
    pub kind: FoldKind,
    pub range: Expr,
    /// The element (of a map: the key), or index and element (key and value).
    pub variables: Vec<String>,
    pub condition: Option<Expr>,
    /// What an element becomes.
    pub transform: Option<Expr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoldKind {
    All,
    Exists,
    ExistsOne,
    Filter,
    /// map and transformList
    List,
    TransformMap,
    TransformMapEntry,
    OptMap,
    OptFlatMap,
    SortBy,
}
