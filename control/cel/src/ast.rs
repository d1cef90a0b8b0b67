//! Expressions as the parser leaves them. Every node knows where in the source it stands.
use std::sync::Arc;

use crate::function::Function;
use crate::value::Value;

#[derive(Clone, Debug)]
pub struct Expr {
    /// Byte offset: of an operator, a call's parenthesis, a selection's dot, or the first character.
    pub at: usize,
    /// How many expressions stand one in the other below this one, itself included.
    pub height: usize,
    pub kind: Kind,
}

impl Expr {
    pub fn new(at: usize, kind: Kind) -> Expr {
        let height = 1 + kind.parts().iter().map(|part| part.height).max().unwrap_or_default();
        Expr { at, height, kind }
    }
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

impl Kind {
    /// The expressions that this one is made of.
    fn parts(&self) -> Vec<&Expr> {
        match self {
            Kind::Literal(_) | Kind::Ident(_) => Vec::new(),
            Kind::Select { operand, .. } | Kind::Has { operand, .. } => vec![operand],
            Kind::Call(call) => call.target.as_deref().into_iter().chain(&call.args).collect(),
            Kind::And(left, right) | Kind::Or(left, right) => vec![left, right],
            Kind::Cond(parts) => parts.iter().collect(),
            Kind::List(items) => items.iter().map(|item| &item.value).collect(),
            Kind::Map(entries) => entries.iter().flat_map(|entry| [&entry.key, &entry.value]).collect(),
            Kind::Struct { fields, .. } => fields.iter().map(|field| &field.value).collect(),
            Kind::Fold(fold) => [Some(&fold.range), fold.condition.as_ref(), fold.transform.as_ref()].into_iter().flatten().collect(),
            Kind::Bind { value, body, .. } => vec![value, body],
        }
    }
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
