//! Label and field selectors: text and object forms, and matching.
use std::fmt;

use serde_json::Value;

use crate::meta;
use crate::names;
use crate::resource::Resource;

/// A conjunction of label requirements; the empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelSelector {
    pub requirements: Vec<Requirement>,
    /// Matches nothing, as a nil LabelSelector object does.
    pub nothing: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    pub values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    GreaterThan,
    LessThan,
}

impl LabelSelector {
    /// The syntax of `labelSelector=`: `a=b,c!=d,e in (f,g),!h`. The error's text goes into a 400.
    pub fn parse(text: &str) -> Result<LabelSelector, String> {
        let mut parser = Parser { tokens: tokens(text), position: 0 };
        let requirements = parser.requirements()?;
        for requirement in &requirements {
            check(requirement).map_err(|error| format!("unable to parse requirement: {error}"))?;
        }
        Ok(LabelSelector { requirements, nothing: false })
    }

    /// A `metav1.LabelSelector`; null matches nothing, `{}` everything.
    pub fn from_object(selector: &Value) -> Result<LabelSelector, String> {
        if selector.is_null() {
            return Ok(LabelSelector { requirements: Vec::new(), nothing: true });
        }
        let mut found = LabelSelector::from_map(&selector["matchLabels"]);
        for expression in meta::items(selector, "matchExpressions") {
            let operator = match meta::text(expression, "operator") {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => return Err(format!("\"{other}\" is not a valid label selector operator")),
            };
            let values = meta::items(expression, "values").iter().filter_map(Value::as_str).map(str::to_string).collect();
            let requirement = Requirement { key: meta::text(expression, "key").to_string(), operator, values };
            check(&requirement)?;
            found.requirements.push(requirement);
        }
        Ok(found)
    }

    /// A plain map as Services and ReplicationControllers have.
    pub fn from_map(map: &Value) -> LabelSelector {
        let requirements = meta::string_entries(map)
            .map(|(key, value)| Requirement { key: key.to_string(), operator: Operator::In, values: vec![value.to_string()] })
            .collect();
        LabelSelector { requirements, nothing: false }
    }

    pub fn matches_everything(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }

    /// Matches a labels map (null counts as empty).
    pub fn matches(&self, labels: &Value) -> bool {
        !self.nothing
            && self.requirements.iter().all(|requirement| requirement.matches(labels.get(&requirement.key).and_then(Value::as_str)))
    }
}

impl Requirement {
    fn matches(&self, value: Option<&str>) -> bool {
        let listed = |value: &str| self.values.iter().any(|wanted| wanted == value);
        let compared = |value: &str| Some((value.parse::<i64>().ok()?, self.values.first()?.parse::<i64>().ok()?));
        match (self.operator, value) {
            (Operator::In, value) => value.is_some_and(listed),
            (Operator::NotIn, value) => !value.is_some_and(listed),
            (Operator::Exists, value) => value.is_some(),
            (Operator::DoesNotExist, value) => value.is_none(),
            (Operator::GreaterThan, value) => value.and_then(compared).is_some_and(|(actual, bound)| actual > bound),
            (Operator::LessThan, value) => value.and_then(compared).is_some_and(|(actual, bound)| actual < bound),
        }
    }
}

/// The canonical text, as `status.selector` of a Scale shows it: sorted by key.
impl fmt::Display for LabelSelector {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sorted: Vec<&Requirement> = self.requirements.iter().collect();
        sorted.sort_by(|left, right| left.key.cmp(&right.key));
        for (index, requirement) in sorted.into_iter().enumerate() {
            if index > 0 {
                formatter.write_str(",")?;
            }
            write!(formatter, "{requirement}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        let mut values = self.values.clone();
        values.sort();
        match (self.operator, values.as_slice()) {
            (Operator::In, [value]) => write!(formatter, "{key}={value}"),
            (Operator::In, values) => write!(formatter, "{key} in ({})", values.join(",")),
            (Operator::NotIn, [value]) => write!(formatter, "{key}!={value}"),
            (Operator::NotIn, values) => write!(formatter, "{key} notin ({})", values.join(",")),
            (Operator::Exists, _) => write!(formatter, "{key}"),
            (Operator::DoesNotExist, _) => write!(formatter, "!{key}"),
            (Operator::GreaterThan, values) => write!(formatter, "{key}>{}", values.join(",")),
            (Operator::LessThan, values) => write!(formatter, "{key}<{}", values.join(",")),
        }
    }
}

fn check(requirement: &Requirement) -> Result<(), String> {
    let key = &requirement.key;
    if let Some(message) = names::qualified_name(key).first() {
        return Err(format!("key: Invalid value: {key:?}: {message}"));
    }
    let count = requirement.values.len();
    match requirement.operator {
        Operator::In | Operator::NotIn if count == 0 => {
            return Err("values: Invalid value: []: for 'in', 'notin' operators, values set can't be empty".into());
        }
        Operator::Exists | Operator::DoesNotExist if count > 0 => {
            return Err(format!("values: Invalid value: {:?}: values set must be empty for exists and does not exist", requirement.values));
        }
        Operator::GreaterThan | Operator::LessThan if requirement.values.iter().any(|value| value.parse::<i64>().is_err()) => {
            return Err(format!(
                "values[0]: Invalid value: {:?}: for 'Gt', 'Lt' operators, the value must be an integer",
                requirement.values.first().map(String::as_str).unwrap_or_default()
            ));
        }
        _ => {}
    }
    for (index, value) in requirement.values.iter().enumerate() {
        if let Some(message) = names::label_value(value).first() {
            return Err(format!("values[{index}][{key}]: Invalid value: {value:?}: {message}"));
        }
    }
    Ok(())
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Symbol(&'static str),
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Token::Word(word) => word,
            Token::Symbol(symbol) => symbol,
        }
    }
}

const SYMBOLS: [&str; 9] = ["==", "!=", "=", "!", "(", ")", ",", ">", "<"];

fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if let Some(symbol) = SYMBOLS.into_iter().find(|symbol| rest.starts_with(symbol)) {
            found.push(Token::Symbol(symbol));
            rest = &rest[symbol.len()..];
        } else {
            let end = rest.find(|letter: char| letter.is_whitespace() || "=!(),><".contains(letter)).unwrap_or(rest.len());
            found.push(Token::Word(rest[..end].to_string()));
            rest = &rest[end..];
        }
        rest = rest.trim_start();
    }
    found
}

struct Parser {
    tokens: Vec<Token>,
    position: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.position)
    }

    fn peek_text(&self) -> String {
        self.peek().map(|token| token.text().to_string()).unwrap_or_default()
    }

    fn take(&mut self, symbol: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Symbol(next)) if *next == symbol);
        self.position += usize::from(found);
        found
    }

    fn word(&mut self) -> Option<String> {
        let Some(Token::Word(word)) = self.peek() else { return None };
        let word = word.clone();
        self.position += 1;
        Some(word)
    }

    fn requirements(&mut self) -> Result<Vec<Requirement>, String> {
        let mut found = Vec::new();
        if self.peek().is_none() {
            return Ok(found);
        }
        loop {
            found.push(self.requirement()?);
            if self.peek().is_none() {
                return Ok(found);
            }
            if !self.take(",") {
                return Err(format!("found '{}', expected: ',' or 'end of string'", self.peek_text()));
            }
            if !matches!(self.peek(), Some(Token::Word(_)) | Some(Token::Symbol("!"))) {
                return Err(format!("found '{}', expected: identifier after ','", self.peek_text()));
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let negated = self.take("!");
        let Some(key) = self.word() else {
            let expected = if negated { "identifier" } else { "!, identifier, or 'end of string'" };
            return Err(format!("found '{}', expected: {expected}", self.peek_text()));
        };
        if negated {
            return Ok(Requirement { key, operator: Operator::DoesNotExist, values: Vec::new() });
        }
        let operator = match self.peek() {
            None | Some(Token::Symbol(",")) => return Ok(Requirement { key, operator: Operator::Exists, values: Vec::new() }),
            Some(token) => match token.text() {
                "=" | "==" | "in" => Operator::In,
                "!=" | "notin" => Operator::NotIn,
                ">" => Operator::GreaterThan,
                "<" => Operator::LessThan,
                other => {
                    return Err(format!("unable to parse requirement: found '{other}', expected: in, notin, =, ==, !=, gt, lt"));
                }
            },
        };
        let set = matches!(self.peek(), Some(Token::Word(_)));
        self.position += 1;
        let values = if set { self.set()? } else { vec![self.word().unwrap_or_default()] };
        Ok(Requirement { key, operator, values })
    }

    fn set(&mut self) -> Result<Vec<String>, String> {
        if !self.take("(") {
            return Err(format!("unable to parse requirement: found '{}' expected: '('", self.peek_text()));
        }
        let mut values = Vec::new();
        loop {
            let value = self.word().unwrap_or_default();
            if !values.contains(&value) {
                values.push(value);
            }
            if self.take(")") {
                return Ok(values);
            }
            if !self.take(",") {
                return Err(format!("unable to parse requirement: found '{}', expected: ',' or ')'", self.peek_text()));
            }
        }
    }
}

/// Field requirements: `path = value` or `path != value`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FieldSelector {
    pub terms: Vec<FieldTerm>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct FieldTerm {
    pub path: String,
    pub equal: bool,
    pub value: String,
}

impl FieldSelector {
    /// The syntax of `fieldSelector=`: `metadata.name=x,status.phase!=Running`, checked against the labels the resource supports.
    pub fn parse(resource: &Resource, text: &str) -> Result<FieldSelector, String> {
        let mut terms = Vec::new();
        for part in split_terms(text) {
            if part.is_empty() {
                continue;
            }
            let (path, equal, value) = split_term(&part).ok_or_else(|| format!("invalid selector: '{text}'; can't understand '{part}'"))?;
            let path = if resource.is("", "Pod") && path == "spec.host" { "spec.nodeName" } else { path };
            supported(resource, path)?;
            terms.push(FieldTerm { path: path.to_string(), equal, value: unescape(value, text)? });
        }
        Ok(FieldSelector { terms })
    }

    pub fn matches_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The name a list is restricted to by `metadata.name=x`, if any.
    pub fn exact_name(&self) -> Option<&str> {
        self.exact("metadata.name")
    }

    /// The value a path must have, if the selector says so.
    pub fn exact(&self, path: &str) -> Option<&str> {
        self.terms.iter().find(|term| term.equal && term.path == path).map(|term| term.value.as_str())
    }

    /// Matches an object in `resource`'s version or in its storage version.
    pub fn matches(&self, resource: &Resource, object: &Value) -> bool {
        self.terms.iter().all(|term| (field(resource, object, &term.path) == term.value) == term.equal)
    }
}

fn supported(resource: &Resource, path: &str) -> Result<(), String> {
    let common = path == "metadata.name" || (path == "metadata.namespace" && (resource.namespaced || resource.field_labels.is_empty()));
    if common || resource.field_labels.iter().any(|label| label == path) {
        return Ok(());
    }
    if let Some(custom) = &resource.custom {
        let selectable: Vec<&str> = custom.selectable_fields.iter().map(|field| field.trim_start_matches('.')).collect();
        return if selectable.contains(&path) { Ok(()) } else { Err(format!("field label not supported: {path}")) };
    }
    Err(match (resource.kind.as_ref(), resource.field_labels.is_empty()) {
        (_, true) => format!("\"{path}\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""),
        ("Job", _) => format!("field label \"{path}\" not supported for Job"),
        _ => format!("field label not supported: {path}"),
    })
}

/// The text a field selector compares with. Numbers and flags are written out; absent ones are as upstream's field sets have them.
pub fn field(resource: &Resource, object: &Value, path: &str) -> String {
    let is_event = resource.is("", "Event") || resource.is("events.k8s.io", "Event");
    let first =
        |paths: &[&str]| paths.iter().map(|path| meta::text(object, path)).find(|text| !text.is_empty()).unwrap_or_default().to_string();
    match path {
        "source" if is_event => return first(&["source.component", "reportingComponent", "reportingController"]),
        "reportingComponent" | "reportingController" if is_event => return first(&["reportingComponent", "reportingController"]),
        "status.podIPs" => {
            let addresses: Vec<&str> = meta::items(object, path).iter().map(|entry| meta::text(entry, "ip")).collect();
            return addresses.join(",");
        }
        _ => {}
    }
    let mut value = meta::get(object, path);
    if is_event && value.is_null() {
        let (from, to) = if path.starts_with("regarding.") { ("regarding.", "involvedObject.") } else { ("involvedObject.", "regarding.") };
        value = meta::get(object, &path.replacen(from, to, 1));
    }
    match value {
        Value::String(text) => text.clone(),
        Value::Null => match path {
            "spec.hostNetwork" | "spec.unschedulable" => "false".into(),
            "status.replicas" | "status.successful" => match meta::get(object, "status.succeeded") {
                Value::Number(number) if path == "status.successful" => number.to_string(),
                _ => "0".into(),
            },
            _ => String::new(),
        },
        other => other.to_string(),
    }
}

/// Splits at commas that are not escaped.
fn split_terms(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for letter in text.chars() {
        if letter == ',' && !escaped {
            parts.push(String::new());
            continue;
        }
        if let Some(part) = parts.last_mut() {
            part.push(letter);
        }
        escaped = letter == '\\' && !escaped;
    }
    parts
}

fn split_term(part: &str) -> Option<(&str, bool, &str)> {
    let at = part.find(['=', '!'])?;
    let (path, rest) = part.split_at(at);
    [("!=", false), ("==", true), ("=", true)].into_iter().find_map(|(sign, equal)| Some((path, equal, rest.strip_prefix(sign)?)))
}

fn unescape(value: &str, selector: &str) -> Result<String, String> {
    let mut found = String::with_capacity(value.len());
    let mut letters = value.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => match letters.next() {
                Some(next @ ('\\' | ',' | '=')) => found.push(next),
                _ => return Err(format!("invalid field selector: invalid escape sequence: {value:?} in {selector:?}")),
            },
            ',' | '=' => return Err(format!("invalid field selector: unescaped character in value: {letter:?}")),
            _ => found.push(letter),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors_match() {
        let labels = json!({"app": "web", "tier": "front", "size": "5"});
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier!=back", true),
            ("app", true),
            ("!app", false),
            ("!none", true),
            ("app in (web, db)", true),
            ("app notin (web,db)", false),
            ("none notin (a)", true),
            ("none!=a", true),
            ("size>4", true),
            ("size<5", false),
            ("app=", false),
            ("app in (web),tier", true),
        ] {
            let selector = LabelSelector::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(selector.matches(&labels), expected, "{text}");
        }
        for text in ["a=b=c", "a in", "a in (b", ",a", "a,", "a b", "=x", "a=-", "-=a", "a>x"] {
            assert!(LabelSelector::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn objects_and_texts_agree() {
        let selector = LabelSelector::from_object(&json!({"matchLabels": {"b": "c"}, "matchExpressions": [
            {"key": "a", "operator": "In", "values": ["y", "x"]}, {"key": "z", "operator": "DoesNotExist"}]}))
        .expect("valid");
        assert_eq!(selector.to_string(), "a in (x,y),b=c,!z");
        assert!(!LabelSelector::from_object(&Value::Null).expect("valid").matches(&json!({})));
        assert!(LabelSelector::from_object(&json!({})).expect("valid").matches(&Value::Null));
        assert!(LabelSelector::from_object(&json!({"matchExpressions": [{"key": "a", "operator": "In"}]})).is_err());
    }

    #[test]
    fn field_selectors_know_their_kind() {
        let pods = crate::builtin::by_kind("", "v1", "Pod").expect("built in");
        let pod = json!({"metadata": {"name": "a", "namespace": "b"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
        for (text, expected) in [
            ("metadata.name=a", true),
            ("spec.nodeName=n,status.phase!=Failed", true),
            ("spec.host==n", true),
            ("spec.hostNetwork=false", true),
            ("status.phase=Failed", false),
            ("", true),
        ] {
            let selector = FieldSelector::parse(pods, text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(selector.matches(pods, &pod), expected, "{text}");
        }
        assert_eq!(FieldSelector::parse(pods, "spec.foo=a"), Err("field label not supported: spec.foo".into()));
        let maps = crate::builtin::by_kind("", "v1", "ConfigMap").expect("built in");
        let error = "\"data.a\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"";
        assert_eq!(FieldSelector::parse(maps, "data.a=1"), Err(error.into()));
        assert_eq!(FieldSelector::parse(maps, "x"), Err("invalid selector: 'x'; can't understand 'x'".into()));
        assert_eq!(FieldSelector::parse(maps, r"metadata.name=a\,b").expect("valid").exact_name(), Some("a,b"));
    }
}
