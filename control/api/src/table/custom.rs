//! Columns of custom resources: `additionalPrinterColumns`, or the age alone.
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::jsonpath::JsonPath;
use crate::meta;
use crate::resource::{PrinterColumn, Resource};

fn declared(resource: &Resource) -> &[PrinterColumn] {
    resource.custom.as_ref().map(|custom| custom.columns.as_slice()).unwrap_or_default()
}

pub(super) fn columns(resource: &Resource) -> Vec<Value> {
    let mut columns = vec![json!({"name": "Name", "type": "string", "format": "name", "description": "Name of the object", "priority": 0})];
    if declared(resource).is_empty() {
        columns.push(json!({"name": "Age", "type": "date", "format": "", "description": "When the object was created", "priority": 0}));
    }
    columns.extend(declared(resource).iter().map(|column| {
        let PrinterColumn { name, kind, format, description, priority, .. } = column;
        json!({"name": name, "type": kind, "format": format, "description": description, "priority": priority})
    }));
    columns
}

pub(super) fn cells(resource: &Resource, object: &Value, now: Timestamp) -> Vec<Value> {
    let mut cells = vec![Value::from(meta::name(object))];
    if declared(resource).is_empty() {
        cells.push(crate::time::age(meta::creation_timestamp(object), now).into());
    }
    cells.extend(declared(resource).iter().map(|column| cell(column, object, now)));
    cells
}

/// Null where there is nothing of the column's type.
fn cell(column: &PrinterColumn, object: &Value, now: Timestamp) -> Value {
    let Ok(path) = JsonPath::parse(&column.json_path) else { return Value::Null };
    let found = path.find(object);
    let Some(first) = found.first() else { return Value::Null };
    match column.kind.as_str() {
        "integer" => first.as_i64().or_else(|| first.as_f64().map(|number| number as i64)).map_or(Value::Null, Value::from),
        "number" => first.as_f64().map_or(Value::Null, |_| (*first).clone()),
        "boolean" => first.as_bool().map_or(Value::Null, Value::from),
        "date" => match first.as_str() {
            Some(text) if crate::time::parse(text).is_some() => crate::time::age(text, now).into(),
            _ => "<invalid>".into(),
        },
        _ => found.iter().map(|value| value.as_str().map_or_else(|| value.to_string(), String::from)).collect::<Vec<_>>().join(" ").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_follow_their_type() {
        let object = json!({"metadata": {"creationTimestamp": "1970-01-01T00:00:00Z"}, "spec": {"n": 3, "s": "t", "l": [1, 2], "b": true}});
        let now: Timestamp = "1970-01-01T01:00:00Z".parse().expect("a time");
        for (kind, path, expected) in [
            ("integer", ".spec.n", json!(3)),
            ("string", ".spec.s", json!("t")),
            ("string", ".spec.l[*]", json!("1 2")),
            ("boolean", ".spec.b", json!(true)),
            ("date", ".metadata.creationTimestamp", json!("60m")),
            ("string", ".spec.none", Value::Null),
            ("integer", ".spec.s", Value::Null),
        ] {
            let column = PrinterColumn {
                name: "A".into(),
                kind: kind.into(),
                format: String::new(),
                description: String::new(),
                priority: 0,
                json_path: path.into(),
            };
            assert_eq!(cell(&column, &object, now), expected, "{kind} {path}");
        }
    }
}
