//! What is wrong with an expression, shown as cel-go shows it: message, line, and a mark below.
use std::fmt;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Issues(Vec<String>);

impl Issues {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn one(source: &str, at: usize, message: impl fmt::Display) -> Issues {
        let mut issues = Issues::default();
        issues.add(source, at, message);
        issues
    }

    pub(crate) fn add(&mut self, source: &str, at: usize, message: impl fmt::Display) {
        let at = at.min(source.len());
        let start = source[..at].rfind('\n').map_or(0, |newline| newline + 1);
        let line = source[start..].lines().next().unwrap_or_default();
        let number = source[..start].matches('\n').count() + 1;
        let column = source[start..at].chars().count();
        self.0.push(format!("ERROR: <input>:{number}:{}: {message}\n | {line}\n | {}^", column + 1, ".".repeat(column)));
    }
}

impl fmt::Display for Issues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Issues {}
