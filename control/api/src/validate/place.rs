//! A value with its path: what a check looks at, and where its finding points.
use serde_json::Value;

use crate::field_error::FieldError;
use crate::meta;

/// Findings so far.
pub(super) type Findings = Vec<FieldError>;

/// A value in an object; null when there is none.
#[derive(Clone, Debug)]
pub(super) struct Place<'a> {
    pub value: &'a Value,
    pub path: String,
}

impl<'a> Place<'a> {
    pub fn root(object: &'a Value) -> Place<'a> {
        Place { value: object, path: String::new() }
    }

    /// A field, or one further down by a dotted path.
    pub fn at(&self, path: &str) -> Place<'a> {
        let full = if self.path.is_empty() { path.to_string() } else { format!("{}.{path}", self.path) };
        Place { value: meta::get(self.value, path), path: full }
    }

    /// An entry of a map.
    pub fn key(&self, key: &str) -> Place<'a> {
        Place { value: meta::at(self.value, &[key]), path: format!("{}[{key}]", self.path) }
    }

    pub fn items(&self) -> impl Iterator<Item = Place<'a>> + use<'a> {
        let path = self.path.clone();
        self.value.as_array().into_iter().flatten().enumerate().map(move |(index, value)| Place { value, path: format!("{path}[{index}]") })
    }

    pub fn entries(&self) -> impl Iterator<Item = (&'a str, Place<'a>)> + use<'a> {
        let path = self.path.clone();
        self.value
            .as_object()
            .into_iter()
            .flatten()
            .map(move |(key, value)| (key.as_str(), Place { value, path: format!("{path}[{key}]") }))
    }

    /// The same value under another path.
    pub fn named(&self, path: &str) -> Place<'a> {
        Place { value: self.value, path: path.to_string() }
    }

    pub fn text(&self) -> &'a str {
        self.value.as_str().unwrap_or_default()
    }

    pub fn integer(&self) -> Option<i64> {
        self.value.as_i64()
    }

    pub fn number(&self) -> i64 {
        self.integer().unwrap_or_default()
    }

    pub fn flag(&self) -> bool {
        *self.value == true
    }

    pub fn is_set(&self) -> bool {
        !self.value.is_null()
    }

    /// Null, "", 0, false, [] or {}.
    pub fn is_empty(&self) -> bool {
        meta::is_empty(self.value)
    }

    pub fn len(&self) -> usize {
        match self.value {
            Value::Array(items) => items.len(),
            Value::Object(map) => map.len(),
            _ => 0,
        }
    }

    pub fn invalid(&self, detail: impl Into<String>) -> FieldError {
        FieldError::invalid(self.path.clone(), self.value.clone(), detail)
    }

    pub fn required(&self, detail: &str) -> FieldError {
        FieldError::required(self.path.clone(), detail)
    }

    pub fn forbidden(&self, detail: impl Into<String>) -> FieldError {
        FieldError::forbidden(self.path.clone(), detail)
    }

    pub fn duplicate(&self) -> FieldError {
        FieldError::duplicate(self.path.clone(), self.value.clone())
    }

    pub fn not_found(&self) -> FieldError {
        FieldError::not_found(self.path.clone(), self.value.clone())
    }

    pub fn unsupported(&self, supported: &[&str]) -> FieldError {
        FieldError::not_supported(self.path.clone(), self.value.clone(), supported)
    }

    /// Adds a Required finding if empty; tells whether there is a value.
    pub fn require(&self, found: &mut Findings) -> bool {
        if self.is_empty() {
            found.push(self.required(""));
            return false;
        }
        true
    }

    /// Adds a finding for each message about the text, empty texts included.
    pub fn check(&self, found: &mut Findings, check: fn(&str) -> Vec<String>) {
        found.extend(check(self.text()).into_iter().map(|message| self.invalid(message)));
    }

    /// The same where there is a text at all.
    pub fn check_if_set(&self, found: &mut Findings, check: fn(&str) -> Vec<String>) {
        if !self.text().is_empty() {
            self.check(found, check);
        }
    }

    /// Required, and well-formed.
    pub fn require_format(&self, found: &mut Findings, check: fn(&str) -> Vec<String>) {
        if self.require(found) {
            self.check(found, check);
        }
    }

    /// Required, and one of the words.
    pub fn one_of(&self, found: &mut Findings, supported: &[&str]) {
        if self.require(found) {
            self.one_of_if_set(found, supported);
        }
    }

    pub fn one_of_if_set(&self, found: &mut Findings, supported: &[&str]) {
        if !self.is_empty() && !supported.contains(&self.text()) {
            found.push(self.unsupported(supported));
        }
    }

    pub fn in_range(&self, found: &mut Findings, low: i64, high: i64) {
        if let Some(number) = self.integer() {
            found.extend(crate::names::in_range(number, low, high).into_iter().map(|message| self.invalid(message)));
        }
    }

    pub fn non_negative(&self, found: &mut Findings) {
        if self.number() < 0 {
            found.push(self.invalid("must be greater than or equal to 0"));
        }
    }

    pub fn positive(&self, found: &mut Findings) {
        if self.number() < 1 {
            found.push(self.invalid("must be greater than 0"));
        }
    }

    /// A port by number or by name.
    pub fn port(&self, found: &mut Findings) {
        match self.value {
            Value::String(name) => found.extend(crate::names::port_name(name).into_iter().map(|message| self.invalid(message))),
            _ => found.extend(crate::names::port_number(self.number()).into_iter().map(|message| self.invalid(message))),
        }
    }

    /// A count or a percentage, not negative.
    pub fn integer_or_percent(&self, found: &mut Findings) {
        match self.value {
            Value::Null => {}
            Value::String(text) => found.extend(crate::names::percent(text).into_iter().map(|message| self.invalid(message))),
            _ => self.non_negative(found),
        }
    }

    /// A percentage beyond 100.
    pub fn at_most_all(&self, found: &mut Findings) {
        let percent = self.text().strip_suffix('%').and_then(|digits| digits.parse::<i64>().ok());
        if percent.is_some_and(|percent| percent > 100) {
            found.push(self.invalid("must not be greater than 100%"));
        }
    }

    /// Refuses a change of the field.
    pub fn immutable(&self, found: &mut Findings, old: &Value) {
        if !meta::same(self.value, old) {
            found.push(self.invalid("field is immutable"));
        }
    }
}
