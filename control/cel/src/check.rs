//! The type checker: what every expression may evaluate to, and which overloads its calls may run.
use crate::Env;
use crate::ast::{Call, Expr, Fold, FoldKind, Kind};
use crate::issues::Issues;
use crate::parse::qualified;
use crate::types::{Substitution, Type, join};
use crate::value::Value;

pub fn check(env: &Env, source: &str, expr: &mut Expr) -> Result<Type, Issues> {
    let mut checker = Checker { env, source, locals: Vec::new(), issues: Issues::default() };
    let kind = checker.expr(expr);
    if checker.issues.is_empty() { Ok(kind) } else { Err(checker.issues) }
}

struct Checker<'a> {
    env: &'a Env,
    source: &'a str,
    /// Variables of the macros around.
    locals: Vec<(String, Type)>,
    issues: Issues,
}

/// Names of types, which are values.
pub const TYPES: &[&str] = &[
    "bool",
    "int",
    "uint",
    "double",
    "string",
    "bytes",
    "list",
    "map",
    "null_type",
    "type",
    "google.protobuf.Timestamp",
    "google.protobuf.Duration",
    "optional_type",
];

impl Checker<'_> {
    /// After an error anything goes, so that one mistake is told once.
    fn error(&mut self, at: usize, message: impl std::fmt::Display) -> Type {
        self.issues.add(self.source, at, message);
        Type::Dyn
    }

    fn variable(&self, name: &str) -> Option<Type> {
        let local = self.locals.iter().rev().find(|(local, _)| local == name).map(|(_, kind)| kind.clone());
        local.or_else(|| self.env.variables.get(name).cloned())
    }

    fn expr(&mut self, expr: &mut Expr) -> Type {
        let at = expr.at;
        match &mut expr.kind {
            Kind::Literal(value) => literal(value),
            Kind::Ident(name) => match self.variable(name) {
                Some(kind) => kind,
                None if TYPES.contains(&name.as_str()) => {
                    expr.kind = Kind::Literal(Value::Type(name.as_str().into()));
                    Type::Type
                }
                None => {
                    let message = format!("undeclared reference to '{name}' (in container '')");
                    self.error(at, message)
                }
            },
            Kind::Select { operand, field, optional } => {
                let optional = *optional;
                let qualified = qualified(operand).map(|path| format!("{path}.{field}")).unwrap_or_default();
                if TYPES.contains(&qualified.as_str()) {
                    expr.kind = Kind::Literal(Value::Type(qualified.into()));
                    return Type::Type;
                }
                // A variable's own name may have dots.
                if let Some(kind) = self.variable(&qualified) {
                    expr.kind = Kind::Ident(qualified);
                    return kind;
                }
                let kind = self.expr(operand);
                self.select(at, kind, field, optional)
            }
            Kind::Has { operand, field } => {
                let kind = self.expr(operand);
                self.select(at, kind, field, false);
                Type::Bool
            }
            Kind::Call(call) => self.call(at, call),
            Kind::And(left, right) => self.logic(at, "_&&_", left, right),
            Kind::Or(left, right) => self.logic(at, "_||_", left, right),
            Kind::Cond(parts) => self.cond(at, parts),
            Kind::List(items) => {
                let mut kind: Option<Type> = None;
                for item in items {
                    let found = self.expr(&mut item.value);
                    let found = self.entry(item.value.at, found, item.optional);
                    kind = Some(self.joined(item.value.at, kind, found));
                }
                Type::list(kind.unwrap_or(Type::Dyn))
            }
            Kind::Map(entries) => {
                let (mut keys, mut values): (Option<Type>, Option<Type>) = (None, None);
                for entry in entries {
                    let found = self.expr(&mut entry.key);
                    keys = Some(self.joined(entry.key.at, keys, found));
                    let found = self.expr(&mut entry.value);
                    let found = self.entry(entry.value.at, found, entry.optional);
                    values = Some(self.joined(entry.value.at, values, found));
                }
                Type::Map(Box::new(keys.unwrap_or(Type::Dyn)), Box::new(values.unwrap_or(Type::Dyn)))
            }
            Kind::Struct { name, fields } => {
                let found = self.env.structs.as_ref().and_then(|find| find(name));
                let Some(kind) = found else {
                    let message = format!("undeclared reference to '{name}' (in container '')");
                    return self.error(at, message);
                };
                for field in fields {
                    let value = self.expr(&mut field.value);
                    let value = self.entry(field.value.at, value, field.optional);
                    let wanted = self.select(field.at, kind.clone(), &field.name, false);
                    if !Substitution::default().accepts(&wanted, &value) {
                        self.error(
                            field.at,
                            format!("expected type of field '{}' is '{wanted}' but provided type is '{value}'", field.name),
                        );
                    }
                }
                kind
            }
            Kind::Fold(fold) => self.fold(fold),
            Kind::Bind { name, value, body } => {
                let kind = self.expr(value);
                self.locals.push((name.clone(), kind));
                let kind = self.expr(body);
                self.locals.pop();
                kind
            }
        }
    }

    /// What an optional element, `?a`, stands for.
    fn entry(&mut self, at: usize, kind: Type, optional: bool) -> Type {
        match (optional, kind) {
            (false, kind) => kind,
            (true, Type::Optional(inner)) => *inner,
            (true, Type::Dyn) => Type::Dyn,
            (true, kind) => self.error(at, format!("expected type 'optional_type(dyn)' but found '{kind}'")),
        }
    }

    /// Elements of one literal are of one type.
    fn joined(&mut self, at: usize, so_far: Option<Type>, next: Type) -> Type {
        let Some(so_far) = so_far else { return next };
        match join(&so_far, &next) {
            Some(kind) => kind,
            None => self.error(at, format!("expected type '{so_far}' but found '{next}'")),
        }
    }

    fn select(&mut self, at: usize, kind: Type, field: &str, optional: bool) -> Type {
        let found = match kind {
            Type::Dyn | Type::Param(_) => Type::Dyn,
            Type::Map(_, value) => *value,
            Type::Optional(inner) => return Type::optional(self.select(at, *inner, field, false)),
            Type::Struct(structure) => match structure.field(field) {
                Some(kind) => kind,
                None => self.error(at, format!("undefined field '{field}'")),
            },
            other => self.error(at, format!("type '{other}' does not support field selection")),
        };
        if optional { Type::optional(found) } else { found }
    }

    fn logic(&mut self, at: usize, name: &str, left: &mut Expr, right: &mut Expr) -> Type {
        let (left, right) = (self.expr(left), self.expr(right));
        let boolean = |kind: &Type| Substitution::default().accepts(&Type::Bool, kind);
        if !boolean(&left) || !boolean(&right) {
            return self.error(at, format!("found no matching overload for '{name}' applied to '({left}, {right})'"));
        }
        Type::Bool
    }

    fn cond(&mut self, at: usize, parts: &mut [Expr; 3]) -> Type {
        let [condition, then, otherwise] = parts;
        let (condition, then, otherwise) = (self.expr(condition), self.expr(then), self.expr(otherwise));
        match join(&then, &otherwise).filter(|_| Substitution::default().accepts(&Type::Bool, &condition)) {
            Some(kind) => kind,
            None => self.error(at, format!("found no matching overload for '_?_:_' applied to '({condition}, {then}, {otherwise})'")),
        }
    }

    fn call(&mut self, at: usize, call: &mut Call) -> Type {
        self.settle_namespace(call);
        let mut args: Vec<Type> = call.target.as_mut().map(|target| self.expr(target)).into_iter().collect();
        args.extend(call.args.iter_mut().map(|arg| self.expr(arg)));
        let member = call.target.is_some();
        let known: Vec<_> = self.env.functions.named(&call.function, member).cloned().collect();
        if known.is_empty() {
            return self.error(at, format!("undeclared reference to '{}' (in container '')", call.function));
        }
        let mut result: Option<Type> = None;
        for function in known.into_iter().filter(|function| function.params.len() == args.len()) {
            let mut substitution = Substitution::default();
            if function.params.iter().zip(&args).all(|(declared, actual)| substitution.accepts(declared, actual)) {
                let kind = substitution.apply(&function.result);
                result = Some(result.map_or(kind.clone(), |so_far| if so_far == kind { so_far } else { Type::Dyn }));
                call.overloads.push(function);
            }
        }
        match result {
            Some(kind) => kind,
            None => {
                let shown = |args: &[Type]| args.iter().map(Type::to_string).collect::<Vec<_>>().join(", ");
                let applied = if member { format!("{}.({})", args[0], shown(&args[1..])) } else { format!("({})", shown(&args)) };
                self.error(at, format!("found no matching overload for '{}' applied to '{applied}'", call.function))
            }
        }
    }

    /// `a.b.f(x)` may be the function `a.b.f` instead of a call on `a.b`.
    fn settle_namespace(&self, call: &mut Call) {
        let Some(path) = call.target.as_deref().and_then(qualified) else { return };
        let root = path.split('.').next().unwrap_or(&path);
        let name = format!("{path}.{}", call.function);
        if self.variable(root).is_none() && self.env.functions.named(&name, false).next().is_some() {
            call.function = name;
            call.target = None;
        }
    }

    fn fold(&mut self, fold: &mut Fold) -> Type {
        let range = self.expr(&mut fold.range);
        let optional = matches!(fold.kind, FoldKind::OptMap | FoldKind::OptFlatMap);
        let (first, second) = match (range, fold.variables.len()) {
            (Type::Dyn | Type::Param(_), _) => (Type::Dyn, Type::Dyn),
            (Type::Optional(inner), _) if optional => (*inner, Type::Dyn),
            (Type::List(item), 1) => (*item, Type::Dyn),
            (Type::List(item), _) => (Type::Int, *item),
            (Type::Map(key, value), _) if !optional => (*key, *value),
            (other, _) => {
                let message = format!("expression of type '{other}' cannot be range of a comprehension (must be list, map, or dynamic)");
                (self.error(fold.range.at, message), Type::Dyn)
            }
        };
        let before = self.locals.len();
        self.locals.extend(fold.variables.iter().cloned().zip([first.clone(), second]));
        if let Some(condition) = &mut fold.condition {
            let kind = self.expr(condition);
            if !Substitution::default().accepts(&Type::Bool, &kind) {
                self.error(condition.at, format!("found no matching overload for '_&&_' applied to '(bool, {kind})'"));
            }
        }
        let made = fold.transform.as_mut().map(|transform| self.expr(transform)).unwrap_or(Type::Dyn);
        self.locals.truncate(before);
        match fold.kind {
            FoldKind::All | FoldKind::Exists | FoldKind::ExistsOne => Type::Bool,
            FoldKind::Filter | FoldKind::SortBy => Type::list(first),
            FoldKind::List => Type::list(made),
            FoldKind::TransformMap => Type::Map(Box::new(first), Box::new(made)),
            FoldKind::TransformMapEntry => made,
            FoldKind::OptMap => Type::optional(made),
            FoldKind::OptFlatMap => made,
        }
    }
}

fn literal(value: &Value) -> Type {
    match value {
        Value::Null => Type::Null,
        Value::Bool(_) => Type::Bool,
        Value::Int(_) => Type::Int,
        Value::Uint(_) => Type::Uint,
        Value::Double(_) => Type::Double,
        Value::String(_) => Type::String,
        Value::Bytes(_) => Type::Bytes,
        Value::Type(_) => Type::Type,
        _ => Type::Dyn,
    }
}
