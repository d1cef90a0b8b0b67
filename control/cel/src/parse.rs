//! Tokens to expressions, by precedence; macros become folds.
use crate::ast::{Call, Entry, Expr, Field, Fold, FoldKind, Item, Kind};
use crate::issues::Issues;
use crate::lex::{Token, tokens};
use crate::value::Value;

/// Upstream's limit for the height of a tree.
const MAX_HEIGHT: usize = 250;
/// Parentheses in parentheses: fewer than upstream takes, as many as are parsed on a thread's stack with room to spare.
const MAX_DEPTH: usize = 100;
const MAX_LENGTH: usize = 100_000;

const RESERVED: &[&str] = &[
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
];

/// Binary operators from loose to tight, below `&&`.
const LEVELS: &[&[(&str, &str)]] = &[
    &[("<=", "_<=_"), (">=", "_>=_"), ("<", "_<_"), (">", "_>_"), ("==", "_==_"), ("!=", "_!=_")],
    &[("+", "_+_"), ("-", "_-_")],
    &[("*", "_*_"), ("/", "_/_"), ("%", "_%_")],
];

pub fn parse(source: &str) -> Result<Expr, Issues> {
    if source.len() > MAX_LENGTH {
        return Err(Issues::one(
            source,
            0,
            format!("expression code point size exceeds limit: size: {}, limit {MAX_LENGTH}", source.len()),
        ));
    }
    let mut parser = Parser { source, tokens: tokens(source)?, next: 0, depth: 0 };
    let expr = parser.expr()?;
    match parser.peek() {
        Token::End => Ok(expr),
        _ => Err(parser.unexpected()),
    }
}

type Parsed = Result<Expr, Issues>;

struct Parser<'a> {
    source: &'a str,
    tokens: Vec<(usize, Token)>,
    next: usize,
    depth: usize,
}

fn call(at: usize, function: &str, target: Option<Expr>, args: Vec<Expr>) -> Expr {
    Expr::new(at, Kind::Call(Call { function: function.into(), target: target.map(Box::new), args, overloads: Vec::new() }))
}

impl Parser<'_> {
    fn peek(&self) -> &Token {
        &self.tokens[self.next].1
    }

    fn at(&self) -> usize {
        self.tokens[self.next].0
    }

    fn advance(&mut self) -> Token {
        let token = self.tokens[self.next].1.clone();
        if token != Token::End {
            self.next += 1;
        }
        token
    }

    fn sees(&self, sign: &str) -> bool {
        matches!(self.peek(), Token::Sign(found) if *found == sign)
    }

    fn accept(&mut self, sign: &str) -> bool {
        let sees = self.sees(sign);
        self.next += usize::from(sees);
        sees
    }

    fn expect(&mut self, sign: &str) -> Result<(), Issues> {
        if self.accept(sign) { Ok(()) } else { Err(self.unexpected()) }
    }

    fn error(&self, at: usize, message: impl std::fmt::Display) -> Issues {
        Issues::one(self.source, at, message)
    }

    fn unexpected(&self) -> Issues {
        let found = match self.peek() {
            Token::End => "<EOF>".to_string(),
            _ => {
                let end = self.tokens.get(self.next + 1).map_or(self.source.len(), |(at, _)| *at);
                self.source[self.at()..end].trim_end().to_string()
            }
        };
        self.error(self.at(), format!("Syntax error: mismatched input '{found}'"))
    }

    fn expr(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error(self.at(), format!("expression recursion limit exceeded: {MAX_DEPTH}")));
        }
        let condition = self.or()?;
        let at = self.at();
        let expr = if self.accept("?") {
            let then = self.or()?;
            self.expect(":")?;
            let otherwise = self.expr()?;
            Expr::new(at, Kind::Cond(Box::new([condition, then, otherwise])))
        } else {
            condition
        };
        self.depth -= 1;
        self.not_too_high(expr)
    }

    fn or(&mut self) -> Parsed {
        self.logic("||", Self::and, Kind::Or)
    }

    fn and(&mut self) -> Parsed {
        self.logic("&&", |parser| parser.binary(0), Kind::And)
    }

    fn logic(&mut self, sign: &str, operand: fn(&mut Self) -> Parsed, make: MakeLogic) -> Parsed {
        let mut operands = vec![operand(self)?];
        let mut signs = Vec::new();
        while self.sees(sign) {
            signs.push(self.at());
            self.advance();
            operands.push(operand(self)?);
        }
        Ok(balanced(operands, &signs, make))
    }

    /// Operators of this level and tighter ones, by climbing: what has none costs no more stack than one frame.
    fn binary(&mut self, loosest: usize) -> Parsed {
        let mut left = self.unary()?;
        while let Some((level, function)) = self.operator().filter(|(level, _)| *level >= loosest) {
            let at = self.at();
            self.advance();
            let right = self.binary(level + 1)?;
            left = self.not_too_high(call(at, function, None, vec![left, right]))?;
        }
        Ok(left)
    }

    /// The binary operator that comes next, with its level.
    fn operator(&self) -> Option<(usize, &'static str)> {
        let sign = match self.peek() {
            Token::Sign(sign) => sign,
            Token::Ident(word) if word == "in" => return Some((0, "@in")),
            _ => return None,
        };
        let found = |operators: &&'static [(&str, &'static str)]| {
            operators.iter().find(|(operator, _)| operator == sign).map(|(_, function)| *function)
        };
        LEVELS.iter().enumerate().find_map(|(level, operators)| Some((level, found(operators)?)))
    }

    fn unary(&mut self) -> Parsed {
        let at = self.at();
        if self.accept("!") {
            return Ok(call(at, "!_", None, vec![self.deeper()?]));
        }
        if self.accept("-") {
            if let Token::Int(_) | Token::Double(_) = self.peek() {
                let literal = self.literal(at, true)?;
                return self.member(literal);
            }
            return Ok(call(at, "-_", None, vec![self.deeper()?]));
        }
        let primary = self.primary()?;
        self.member(primary)
    }

    fn deeper(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error(self.at(), format!("expression recursion limit exceeded: {MAX_DEPTH}")));
        }
        let inner = self.unary()?;
        self.depth -= 1;
        Ok(inner)
    }

    fn member(&mut self, mut operand: Expr) -> Parsed {
        loop {
            let at = self.at();
            if self.accept(".") {
                let optional = self.accept("?");
                let field = self.name()?;
                let paren = self.at();
                if !optional && self.accept("(") {
                    let args = self.args(")")?;
                    operand = self.method(paren, operand, field, args)?;
                } else {
                    operand = Expr::new(at, Kind::Select { operand: Box::new(operand), field, optional });
                }
            } else if self.accept("[") {
                let function = if self.accept("?") { "_[?_]" } else { "_[_]" };
                let key = self.expr()?;
                self.expect("]")?;
                operand = call(at, function, None, vec![operand, key]);
            } else if self.sees("{")
                && let Some(name) = qualified(&operand)
            {
                self.advance();
                operand = Expr::new(at, Kind::Struct { name, fields: self.fields()? });
            } else {
                return Ok(operand);
            }
            operand = self.not_too_high(operand)?;
        }
    }

    /// Whatever walks a tree, its end included, needs stack for each storey.
    fn not_too_high(&self, expr: Expr) -> Parsed {
        if expr.height <= MAX_HEIGHT { Ok(expr) } else { Err(self.error(expr.at, "max recursion depth exceeded")) }
    }

    /// A field's or function's name.
    fn name(&mut self) -> Result<String, Issues> {
        match self.peek() {
            Token::Ident(name) if name != "in" => {
                let name = name.clone();
                self.advance();
                Ok(name)
            }
            _ => Err(self.unexpected()),
        }
    }

    fn primary(&mut self) -> Parsed {
        let at = self.at();
        match self.peek().clone() {
            Token::Sign("(") => {
                self.advance();
                let inner = self.expr()?;
                self.expect(")")?;
                Ok(inner)
            }
            Token::Sign("[") => {
                self.advance();
                self.list(at)
            }
            Token::Sign("{") => {
                self.advance();
                self.map(at)
            }
            // A leading dot says that the name is no container's, which here none is.
            Token::Sign(".") => {
                self.advance();
                self.ident(at)
            }
            Token::Ident(_) => self.ident(at),
            Token::Sign(_) | Token::End => Err(self.unexpected()),
            _ => self.literal(at, false),
        }
    }

    fn ident(&mut self, at: usize) -> Parsed {
        let name = self.name()?;
        let literal = match name.as_str() {
            "true" => Some(Value::Bool(true)),
            "false" => Some(Value::Bool(false)),
            "null" => Some(Value::Null),
            _ => None,
        };
        if let Some(literal) = literal {
            return Ok(Expr::new(at, Kind::Literal(literal)));
        }
        if RESERVED.contains(&name.as_str()) {
            return Err(self.error(at, format!("reserved identifier: {name}")));
        }
        let paren = self.at();
        if self.accept("(") {
            let args = self.args(")")?;
            return if name == "has" { self.has(paren, args) } else { Ok(call(paren, &name, None, args)) };
        }
        Ok(Expr::new(at, Kind::Ident(name)))
    }

    fn literal(&mut self, at: usize, negative: bool) -> Parsed {
        let integer = |text: &str| match text.get(..2) {
            Some("0x" | "0X") => i128::from_str_radix(&text[2..], 16).ok(),
            _ => text.parse::<i128>().ok(),
        };
        let value = match self.advance() {
            Token::Int(text) => {
                let number = integer(&text).map(|n| if negative { -n } else { n }).and_then(|n| i64::try_from(n).ok());
                Value::Int(number.ok_or_else(|| self.error(at, "invalid int literal"))?)
            }
            Token::Uint(text) => {
                let number = integer(&text).and_then(|n| u64::try_from(n).ok());
                Value::Uint(number.ok_or_else(|| self.error(at, "invalid uint literal"))?)
            }
            Token::Double(number) => Value::Double(if negative { -number } else { number }),
            Token::String(text) => Value::from(text),
            Token::Bytes(bytes) => Value::Bytes(bytes.into()),
            _ => return Err(self.unexpected()),
        };
        Ok(Expr::new(at, Kind::Literal(value)))
    }

    fn args(&mut self, end: &str) -> Result<Vec<Expr>, Issues> {
        let mut args = Vec::new();
        while !self.accept(end) {
            args.push(self.expr()?);
            if !self.sees(end) {
                self.expect(",")?;
            }
        }
        Ok(args)
    }

    fn list(&mut self, at: usize) -> Parsed {
        let mut items = Vec::new();
        while !self.accept("]") {
            let optional = self.accept("?");
            items.push(Item { value: self.expr()?, optional });
            if !self.sees("]") {
                self.expect(",")?;
            }
        }
        Ok(Expr::new(at, Kind::List(items)))
    }

    fn map(&mut self, at: usize) -> Parsed {
        let mut entries = Vec::new();
        while !self.accept("}") {
            let optional = self.accept("?");
            let key = self.expr()?;
            self.expect(":")?;
            entries.push(Entry { key, value: self.expr()?, optional });
            if !self.sees("}") {
                self.expect(",")?;
            }
        }
        Ok(Expr::new(at, Kind::Map(entries)))
    }

    fn fields(&mut self) -> Result<Vec<Field>, Issues> {
        let mut fields = Vec::new();
        while !self.accept("}") {
            let optional = self.accept("?");
            let at = self.at();
            let name = self.name()?;
            self.expect(":")?;
            fields.push(Field { at, name, value: self.expr()?, optional });
            if !self.sees("}") {
                self.expect(",")?;
            }
        }
        Ok(fields)
    }

    fn has(&self, at: usize, mut args: Vec<Expr>) -> Parsed {
        match (args.pop(), args.is_empty()) {
            (Some(Expr { kind: Kind::Select { operand, field, optional: false }, .. }), true) => {
                Ok(Expr::new(at, Kind::Has { operand, field }))
            }
            _ => Err(self.error(at, "invalid argument to has() macro")),
        }
    }

    /// A call with a receiver, or the macro of that name.
    fn method(&self, at: usize, target: Expr, name: String, mut args: Vec<Expr>) -> Parsed {
        if name == "bind" && matches!(&target.kind, Kind::Ident(namespace) if namespace == "cel") && args.len() == 3 {
            let (body, value) = (args.remove(2), args.remove(1));
            let name = self.variable(&args[0])?;
            return Ok(Expr::new(at, Kind::Bind { name, value: Box::new(value), body: Box::new(body) }));
        }
        let Some((kind, variables, filtered)) = fold(&name, args.len()) else { return Ok(call(at, &name, Some(target), args)) };
        let mut rest = args.split_off(variables);
        let variables = args.iter().map(|arg| self.variable(arg)).collect::<Result<_, _>>()?;
        let tests = matches!(kind, FoldKind::All | FoldKind::Exists | FoldKind::ExistsOne | FoldKind::Filter);
        let last = rest.pop();
        let (condition, transform) = if tests { (last, None) } else { (if filtered { rest.pop() } else { None }, last) };
        Ok(Expr::new(at, Kind::Fold(Box::new(Fold { kind, range: target, variables, condition, transform }))))
    }

    fn variable(&self, expr: &Expr) -> Result<String, Issues> {
        match &expr.kind {
            Kind::Ident(name) => Ok(name.clone()),
            _ => Err(self.error(expr.at, "argument must be a simple name")),
        }
    }
}

type MakeLogic = fn(Box<Expr>, Box<Expr>) -> Kind;

/// A tree as low as it gets, as long chains of conditions are common; the order of evaluation stays.
fn balanced(mut left: Vec<Expr>, signs: &[usize], make: MakeLogic) -> Expr {
    let right = left.split_off(left.len().div_ceil(2));
    match (left.len(), right.is_empty()) {
        (1, true) => left.remove(0),
        (count, _) => {
            let (before, after) = (&signs[..count - 1], &signs[count..]);
            let (left, right) = (balanced(left, before, make), balanced(right, after, make));
            Expr::new(signs[count - 1], make(Box::new(left), Box::new(right)))
        }
    }
}

/// The macro of this name and number of arguments: its variables, and whether it has a condition beside what it makes.
fn fold(name: &str, args: usize) -> Option<(FoldKind, usize, bool)> {
    Some(match (name, args) {
        ("all", 2) => (FoldKind::All, 1, false),
        ("all", 3) => (FoldKind::All, 2, false),
        ("exists", 2) => (FoldKind::Exists, 1, false),
        ("exists", 3) => (FoldKind::Exists, 2, false),
        ("exists_one" | "existsOne", 2) => (FoldKind::ExistsOne, 1, false),
        ("exists_one" | "existsOne", 3) => (FoldKind::ExistsOne, 2, false),
        ("filter", 2) => (FoldKind::Filter, 1, false),
        ("map", 2) => (FoldKind::List, 1, false),
        ("map", 3) => (FoldKind::List, 1, true),
        ("transformList", 3) => (FoldKind::List, 2, false),
        ("transformList", 4) => (FoldKind::List, 2, true),
        ("transformMap", 3) => (FoldKind::TransformMap, 2, false),
        ("transformMap", 4) => (FoldKind::TransformMap, 2, true),
        ("transformMapEntry", 3) => (FoldKind::TransformMapEntry, 2, false),
        ("transformMapEntry", 4) => (FoldKind::TransformMapEntry, 2, true),
        ("optMap", 2) => (FoldKind::OptMap, 1, false),
        ("optFlatMap", 2) => (FoldKind::OptFlatMap, 1, false),
        ("sortBy", 2) => (FoldKind::SortBy, 1, false),
        _ => return None,
    })
}

/// `a.b.c` as one name.
pub fn qualified(expr: &Expr) -> Option<String> {
    match &expr.kind {
        Kind::Ident(name) => Some(name.clone()),
        Kind::Select { operand, field, optional: false } => Some(format!("{}.{field}", qualified(operand)?)),
        _ => None,
    }
}
