//! The evaluator: walks a checked expression, within a budget.
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;

use crate::ast::{Call, Expr, Fold, FoldKind, Kind};
use crate::value::{Error, Key, Map, Value};

/// Values of the variables that an environment declares.
pub type Bindings = HashMap<String, Value>;

/// One evaluation: its variables, and what it may still spend. Evaluations that share a context share its budget.
pub struct Context<'a> {
    bindings: &'a Bindings,
    budget: Cell<u64>,
}

impl<'a> Context<'a> {
    /// `budget` is in steps, of which every node evaluated takes one.
    pub fn new(bindings: &'a Bindings, budget: u64) -> Context<'a> {
        Context { bindings, budget: Cell::new(budget) }
    }

    pub fn remaining(&self) -> u64 {
        self.budget.get()
    }

    fn spend(&self, steps: u64) -> Result<(), Error> {
        match self.budget.get().checked_sub(steps) {
            Some(rest) => {
                self.budget.set(rest);
                Ok(())
            }
            None => Err(Error { message: "operation cancelled: actual cost limit exceeded".into(), fatal: true }),
        }
    }
}

type Evaluated = Result<Value, Error>;

pub fn eval(expr: &Expr, context: &Context<'_>) -> Evaluated {
    Scope { context, local: None }.eval(expr)
}

/// The variables of the macros around, innermost first.
#[derive(Clone, Copy)]
struct Scope<'a> {
    context: &'a Context<'a>,
    local: Option<&'a Local<'a>>,
}

struct Local<'a> {
    name: &'a str,
    value: Value,
    outer: Option<&'a Local<'a>>,
}

impl Scope<'_> {
    fn lookup(&self, name: &str) -> Evaluated {
        let mut local = self.local;
        while let Some(found) = local {
            if found.name == name {
                return Ok(found.value.clone());
            }
            local = found.outer;
        }
        self.context.bindings.get(name).cloned().ok_or_else(|| Error::new(format!("no such attribute(s): {name}")))
    }

    fn eval(&self, expr: &Expr) -> Evaluated {
        self.context.spend(1)?;
        match &expr.kind {
            Kind::Literal(value) => Ok(value.clone()),
            Kind::Ident(name) => self.lookup(name),
            Kind::Select { operand, field, optional } => {
                let value = self.eval(operand)?;
                if *optional { self.select_optional(&value, field) } else { self.select(&value, field) }
            }
            Kind::Has { operand, field } => self.has(&self.eval(operand)?, field).map(Value::Bool),
            Kind::Call(call) => self.call(call),
            Kind::And(left, right) => self.logic(left, right, false),
            Kind::Or(left, right) => self.logic(left, right, true),
            Kind::Cond(parts) => match self.eval(&parts[0])?.as_bool() {
                Some(true) => self.eval(&parts[1]),
                Some(false) => self.eval(&parts[2]),
                None => Err(Error::no_overload()),
            },
            Kind::List(items) => {
                let mut list = Vec::with_capacity(items.len());
                for item in items {
                    list.extend(present(self.eval(&item.value)?, item.optional)?);
                }
                Ok(list.into())
            }
            Kind::Map(entries) => {
                let mut map = Map::new();
                for entry in entries {
                    let key = self.eval(&entry.key)?.key().ok_or_else(|| Error::new("unsupported key type"))?;
                    if map.contains_key(&key) {
                        return Err(Error::new(format!("Failed with repeated key {key}")));
                    }
                    if let Some(value) = present(self.eval(&entry.value)?, entry.optional)? {
                        map.insert(key, value);
                    }
                }
                Ok(Value::Map(Arc::new(map)))
            }
            Kind::Struct { fields, .. } => {
                let mut map = Map::new();
                for field in fields {
                    if let Some(value) = present(self.eval(&field.value)?, field.optional)? {
                        map.insert(Key::String(field.name.as_str().into()), value);
                    }
                }
                Ok(Value::Map(Arc::new(map)))
            }
            Kind::Fold(fold) => self.fold(fold),
            Kind::Bind { name, value, body } => {
                let local = Local { name, value: self.eval(value)?, outer: self.local };
                Scope { context: self.context, local: Some(&local) }.eval(body)
            }
        }
    }

    /// One side may fail when the other decides.
    fn logic(&self, left: &Expr, right: &Expr, decisive: bool) -> Evaluated {
        let left = self.truth(left);
        match left {
            Ok(truth) if truth == decisive => return Ok(truth.into()),
            Err(error) if error.fatal => return Err(error),
            _ => {}
        }
        match (left, self.truth(right)) {
            (_, Ok(truth)) if truth == decisive => Ok(truth.into()),
            (Err(error), Err(fatal)) => Err(if fatal.fatal { fatal } else { error }),
            (Err(error), _) | (_, Err(error)) => Err(error),
            (Ok(_), Ok(truth)) => Ok(truth.into()),
        }
    }

    fn truth(&self, expr: &Expr) -> Result<bool, Error> {
        self.eval(expr)?.as_bool().ok_or_else(Error::no_overload)
    }

    fn select(&self, value: &Value, field: &str) -> Evaluated {
        match value {
            Value::Map(map) => map.get(&Key::String(field.into())).cloned().ok_or_else(|| Error::no_key(field)),
            Value::Opaque(opaque) => opaque.field(field, self.context).unwrap_or_else(|| Err(Error::no_key(field))),
            Value::Optional(_) => self.select_optional(value, field),
            _ => Err(Error::new(format!("no such key: {field}"))),
        }
    }

    fn select_optional(&self, value: &Value, field: &str) -> Evaluated {
        let value = match value {
            Value::Optional(None) => return Ok(Value::Optional(None)),
            Value::Optional(Some(inner)) => inner,
            value => value,
        };
        if !self.has(value, field)? {
            return Ok(Value::Optional(None));
        }
        self.select(value, field).map(|found| Some(found).into())
    }

    fn has(&self, value: &Value, field: &str) -> Result<bool, Error> {
        match value {
            Value::Map(map) => Ok(map.contains_key(&Key::String(field.into()))),
            Value::Opaque(opaque) => opaque.field(field, self.context).transpose().map(|found| found.is_some()),
            Value::Optional(None) => Ok(false),
            Value::Optional(Some(inner)) => self.has(inner, field),
            _ => Err(Error::new(format!("no such key: {field}"))),
        }
    }

    fn call(&self, call: &Call) -> Evaluated {
        let mut args = Vec::with_capacity(call.args.len() + 1);
        for arg in call.target.as_deref().into_iter().chain(&call.args) {
            args.push(self.eval(arg)?);
        }
        let size: usize = args.iter().filter_map(Value::as_str).map(str::len).sum();
        self.context.spend(size as u64 / 10)?;
        match call.overloads.iter().find(|function| function.fits(&args)) {
            Some(function) => (function.run)(&args),
            None => Err(Error::no_overload()),
        }
    }

    fn fold(&self, fold: &Fold) -> Evaluated {
        let range = self.eval(&fold.range)?;
        if let Value::Optional(inner) = &range {
            return self.fold_optional(fold, inner.as_deref());
        }
        let two = fold.variables.len() == 2;
        let elements: Vec<(Value, Value)> = match &range {
            Value::List(items) if two => items.iter().enumerate().map(|(at, item)| (Value::Int(at as i64), item.clone())).collect(),
            Value::List(items) => items.iter().map(|item| (item.clone(), Value::Null)).collect(),
            Value::Map(map) => map.iter().map(|(key, value)| (Value::from(key), value.clone())).collect(),
            _ => return Err(Error::no_overload()),
        };
        let within = |expr: &Expr, (first, second): &(Value, Value)| {
            let outer = Local { name: &fold.variables[0], value: first.clone(), outer: self.local };
            let inner = fold.variables.get(1).map(|name| Local { name, value: second.clone(), outer: Some(&outer) });
            Scope { context: self.context, local: Some(inner.as_ref().unwrap_or(&outer)) }.eval(expr)
        };
        let holds = |element: &(Value, Value)| match &fold.condition {
            Some(condition) => within(condition, element)?.as_bool().ok_or_else(Error::no_overload),
            None => Ok(true),
        };
        let made = |element: &(Value, Value)| match &fold.transform {
            Some(transform) => within(transform, element),
            None => Ok(element.0.clone()),
        };
        match fold.kind {
            FoldKind::All => quantified(elements.iter().map(holds), false),
            FoldKind::Exists => quantified(elements.iter().map(holds), true),
            FoldKind::ExistsOne => {
                let mut count = 0;
                for element in &elements {
                    count += usize::from(holds(element)?);
                }
                Ok((count == 1).into())
            }
            FoldKind::Filter | FoldKind::List => {
                let mut list = Vec::new();
                for element in &elements {
                    if holds(element)? {
                        list.push(made(element)?);
                    }
                }
                Ok(list.into())
            }
            FoldKind::TransformMap | FoldKind::TransformMapEntry => {
                let mut map = Map::new();
                for element in &elements {
                    if !holds(element)? {
                        continue;
                    }
                    match (fold.kind, made(element)?, element.0.key()) {
                        (FoldKind::TransformMap, value, Some(key)) => drop(map.insert(key, value)),
                        (FoldKind::TransformMapEntry, Value::Map(entry), _) => {
                            for (key, value) in entry.iter() {
                                if map.insert(key.clone(), value.clone()).is_some() {
                                    return Err(Error::new(format!("insert failed: key {key} already exists")));
                                }
                            }
                        }
                        _ => return Err(Error::no_overload()),
                    }
                }
                Ok(Value::Map(Arc::new(map)))
            }
            FoldKind::SortBy => {
                let mut keyed = Vec::new();
                for element in &elements {
                    keyed.push((made(element)?, element.0.clone()));
                }
                if keyed.windows(2).any(|pair| pair[0].0.compare(&pair[1].0).is_none()) {
                    return Err(Error::new("list elements must be comparable"));
                }
                keyed.sort_by(|(a, _), (b, _)| a.compare(b).unwrap_or(std::cmp::Ordering::Equal));
                Ok(keyed.into_iter().map(|(_, value)| value).collect::<Vec<_>>().into())
            }
            FoldKind::OptMap | FoldKind::OptFlatMap => Err(Error::no_overload()),
        }
    }

    fn fold_optional(&self, fold: &Fold, inner: Option<&Value>) -> Evaluated {
        let (Some(inner), Some(transform)) = (inner, &fold.transform) else { return Ok(Value::Optional(None)) };
        let local = Local { name: &fold.variables[0], value: inner.clone(), outer: self.local };
        let made = Scope { context: self.context, local: Some(&local) }.eval(transform)?;
        match fold.kind {
            FoldKind::OptMap => Ok(Some(made).into()),
            FoldKind::OptFlatMap => Ok(made),
            _ => Err(Error::no_overload()),
        }
    }
}

/// `all` and `exists`: an element that decides outweighs errors of others.
fn quantified(outcomes: impl Iterator<Item = Result<bool, Error>>, decisive: bool) -> Evaluated {
    let mut failed = None;
    for outcome in outcomes {
        match outcome {
            Ok(truth) if truth == decisive => return Ok(truth.into()),
            Ok(_) => {}
            Err(error) if error.fatal => return Err(error),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok((!decisive).into()), Err)
}

/// The value of an element, unless it is an optional one without any.
fn present(value: Value, optional: bool) -> Result<Option<Value>, Error> {
    match (optional, value) {
        (false, value) => Ok(Some(value)),
        (true, Value::Optional(inner)) => Ok(inner.map(|inner| (*inner).clone())),
        (true, value) => Err(Error::new(format!("cannot initialize optional entry from non-optional value {}", value.type_name()))),
    }
}
