//! The part of kubectl's JSONPath that definitions use: fields, indexes, wildcards and simple filters.
use serde_json::Value;

/// A parsed path such as `.status.conditions[?(@.type=="Ready")].status`.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonPath {
    steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(String),
    /// Negative ones count from the end.
    Index(i64),
    All,
    /// Items whose value at the path compares as told.
    Filter {
        path: JsonPath,
        equal: bool,
        value: Value,
    },
}

impl JsonPath {
    pub fn parse(text: &str) -> Result<JsonPath, String> {
        let mut rest = text.trim_start_matches(['{', '$']).trim_end_matches('}');
        let mut steps = Vec::new();
        while !rest.is_empty() {
            if let Some(inner) = rest.strip_prefix('[') {
                let end = closing(inner).ok_or_else(|| format!("unterminated array in {text}"))?;
                steps.push(bracket(&inner[..end]).ok_or_else(|| format!("invalid array index {}", &inner[..end]))?);
                rest = &inner[end + 1..];
                continue;
            }
            rest = rest.strip_prefix('.').unwrap_or(rest);
            if rest.starts_with('[') {
                continue;
            }
            let (name, after) = field_name(rest);
            if name.is_empty() {
                return Err(format!("unexpected end of path in {text}"));
            }
            steps.push(if name == "*" { Step::All } else { Step::Field(name) });
            rest = after;
        }
        Ok(JsonPath { steps })
    }

    /// Every value the path leads to.
    pub fn find<'a>(&self, object: &'a Value) -> Vec<&'a Value> {
        let mut found = vec![object];
        for step in &self.steps {
            found = found.into_iter().flat_map(|value| step.follow(value)).collect();
        }
        found
    }
}

impl Step {
    fn follow<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        match self {
            Step::Field(name) => value.get(name).into_iter().collect(),
            Step::Index(index) => {
                let Some(items) = value.as_array() else { return Vec::new() };
                let at = if *index < 0 { items.len() as i64 + index } else { *index };
                usize::try_from(at).ok().and_then(|at| items.get(at)).into_iter().collect()
            }
            Step::All => match value {
                Value::Array(items) => items.iter().collect(),
                Value::Object(map) => map.values().collect(),
                _ => Vec::new(),
            },
            Step::Filter { path, equal, value: wanted } => {
                let fits = |item: &Value| path.find(item).first().is_some_and(|found| (**found == *wanted) == *equal);
                value.as_array().into_iter().flatten().filter(|item| fits(item)).collect()
            }
        }
    }
}

/// Position of the bracket that ends the text, outside of quotes.
fn closing(text: &str) -> Option<usize> {
    let mut quote = None;
    for (index, letter) in text.char_indices() {
        match (quote, letter) {
            (Some(open), letter) if open == letter => quote = None,
            (None, '\'' | '"') => quote = Some(letter),
            (None, ']') => return Some(index),
            _ => {}
        }
    }
    None
}

/// A name up to the next `.` or `[`; `\.` stands for a dot.
fn field_name(text: &str) -> (String, &str) {
    let mut name = String::new();
    let mut letters = text.char_indices();
    while let Some((index, letter)) = letters.next() {
        match letter {
            '\\' => name.extend(letters.next().map(|(_, next)| next)),
            '.' | '[' => return (name, &text[index..]),
            _ => name.push(letter),
        }
    }
    (name, "")
}

fn bracket(text: &str) -> Option<Step> {
    let text = text.trim();
    if text == "*" {
        return Some(Step::All);
    }
    if let Some(filter) = text.strip_prefix("?(").and_then(|inner| inner.strip_suffix(')')) {
        let (equal, (path, value)) = match filter.split_once("==") {
            Some(parts) => (true, parts),
            None => (false, filter.split_once("!=")?),
        };
        let path = JsonPath::parse(path.trim().strip_prefix('@')?).ok()?;
        return Some(Step::Filter { path, equal, value: literal(value.trim())? });
    }
    if let Some(name) = unquoted(text) {
        return Some(Step::Field(name.to_string()));
    }
    text.parse().ok().map(Step::Index)
}

fn literal(text: &str) -> Option<Value> {
    unquoted(text).map(Value::from).or_else(|| serde_json::from_str(text).ok())
}

fn unquoted(text: &str) -> Option<&str> {
    ['"', '\''].into_iter().find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_find_values() {
        let object = json!({"spec": {"a": [1, 2, 3], "x.y": "dot"}, "status": {"conditions": [{"type": "A", "status": "True"}, {"type": "B", "status": "False"}]}});
        for (path, expected) in [
            (".spec.a[0]", json!([1])),
            (".spec.a[-1]", json!([3])),
            (".spec.a[*]", json!([1, 2, 3])),
            (".spec.x\\.y", json!(["dot"])),
            (".spec['x.y']", json!(["dot"])),
            (".status.conditions[?(@.type==\"B\")].status", json!(["False"])),
            (".status.conditions[?(@.type!='B')].status", json!(["True"])),
            ("{.spec.a[1]}", json!([2])),
            (".none.at", json!([])),
            (".status.conditions[*].type", json!(["A", "B"])),
        ] {
            let parsed = JsonPath::parse(path).unwrap_or_else(|error| panic!("{path}: {error}"));
            assert_eq!(json!(parsed.find(&object)), expected, "{path}");
        }
        assert!(JsonPath::parse(".a[").is_err() && JsonPath::parse(".a[x").is_err());
    }
}
