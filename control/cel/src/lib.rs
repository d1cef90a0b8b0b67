//! The Common Expression Language as Kubernetes speaks it: parsed, checked against declared types, and evaluated over JSON.
//!
//! [`Env::compile`] turns source into a [`Program`]: [`lex`] → [`parse`] (macros become [`ast::Fold`]s) → [`check`], which also picks the
//! overloads each call may run. [`Program::eval`] walks the tree. Functions are declared once, as a signature and a Rust function
//! ([`function`]); the checker reads the first, [`eval`] runs the second. What belongs to Kubernetes alone (quantities, addresses, the
//! authorizer) is declared by the callers.
pub mod ast;
mod check;
mod eval;
pub mod function;
mod issues;
mod lex;
pub mod library;
mod parse;
pub mod types;
pub mod value;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use eval::{Bindings, Context};
pub use function::{Functions, Library};
pub use issues::Issues;
pub use types::{Structure, Type};
pub use value::{Error, Opaque, Value};

/// Finds the type of a struct literal by its name: `Object.spec`.
pub type FindStruct = Arc<dyn Fn(&str) -> Option<Type> + Send + Sync>;

/// What an expression may name.
#[derive(Clone)]
pub struct Env {
    functions: Arc<Functions>,
    variables: BTreeMap<String, Type>,
    structs: Option<FindStruct>,
}

impl Env {
    pub fn new(functions: Arc<Functions>) -> Env {
        Env { functions, variables: BTreeMap::new(), structs: None }
    }

    pub fn with(mut self, name: &str, kind: Type) -> Env {
        self.variables.insert(name.into(), kind);
        self
    }

    pub fn with_structs(mut self, find: FindStruct) -> Env {
        self.structs = Some(find);
        self
    }

    pub fn compile(&self, source: &str) -> Result<Program, Issues> {
        let mut expr = parse::parse(source)?;
        let result = check::check(self, source, &mut expr)?;
        Ok(Program { expr, result })
    }
}

/// A checked expression.
#[derive(Debug)]
pub struct Program {
    expr: ast::Expr,
    result: Type,
}

impl Program {
    /// The type of what it evaluates to.
    pub fn result(&self) -> &Type {
        &self.result
    }

    pub fn eval(&self, context: &Context<'_>) -> Result<Value, Error> {
        eval::eval(&self.expr, context)
    }
}

#[cfg(test)]
mod tests;
