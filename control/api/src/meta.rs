//! Reading and writing the common parts of an object held as a `Value`.
use serde_json::{Map, Value};

static NULL: Value = Value::Null;

/// The value at a path of keys, or null.
pub fn at<'a>(object: &'a Value, path: &[&str]) -> &'a Value {
    path.iter().fold(object, |value, key| value.get(*key).unwrap_or(&NULL))
}

/// The value at a dotted path (`spec.nodeName`), or null. Not for keys with dots in them.
pub fn get<'a>(object: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(object, |value, key| value.get(key).unwrap_or(&NULL))
}

/// The string at a dotted path, or "".
pub fn text<'a>(object: &'a Value, path: &str) -> &'a str {
    get(object, path).as_str().unwrap_or_default()
}

/// The items of the array at a dotted path; none when absent.
pub fn items<'a>(object: &'a Value, path: &str) -> &'a [Value] {
    get(object, path).as_array().map(Vec::as_slice).unwrap_or_default()
}

/// The entries of the map at a dotted path; none when absent.
pub fn entries<'a>(object: &'a Value, path: &str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    get(object, path).as_object().into_iter().flatten()
}

/// Makes `value` an object if it is null or something else, and returns its map.
pub fn map_mut(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

/// The map under `key`, made if absent.
pub fn child_mut<'a>(object: &'a mut Value, key: &str) -> &'a mut Map<String, Value> {
    map_mut(map_mut(object).entry(key).or_insert(Value::Null))
}

/// Sets the value at a dotted path, making the maps on the way.
pub fn set(object: &mut Value, path: &str, value: impl Into<Value>) {
    let mut target = object;
    let mut keys = path.split('.').peekable();
    while let Some(key) = keys.next() {
        let map = map_mut(target);
        if keys.peek().is_none() {
            map.insert(key.to_string(), value.into());
            return;
        }
        target = map.entry(key).or_insert(Value::Null);
    }
}

/// Removes the value at a dotted path and returns it. Keeps the order of the others.
pub fn remove(object: &mut Value, path: &str) -> Option<Value> {
    let (parent, key) = path.rsplit_once('.').map_or(("", path), |(parent, key)| (parent, key));
    let mut target = object;
    for key in parent.split('.').filter(|key| !key.is_empty()) {
        target = target.get_mut(key)?;
    }
    target.as_object_mut()?.shift_remove(key)
}

/// Whether the value carries nothing: null, "", 0, false, [] or {}.
pub fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// Equality as upstream's semantic one: absent, null and empty are the same; the order of map keys does not count.
pub fn same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Object(left), Value::Object(right)) => {
            left.iter().all(|(key, value)| same(value, right.get(key).unwrap_or(&NULL)))
                && right.iter().all(|(key, value)| left.contains_key(key) || same(&NULL, value))
        }
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(left, right)| same(left, right))
        }
        (Value::Null, other) | (other, Value::Null) => match other {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(map) => map.values().all(|value| same(&NULL, value)),
            _ => false,
        },
        _ => left == right,
    }
}

pub fn name(object: &Value) -> &str {
    text(object, "metadata.name")
}

/// The `name` of something that is no object of its own: a container, an owner reference.
pub fn name_field(value: &Value) -> &str {
    text(value, "name")
}

pub fn generate_name(object: &Value) -> &str {
    text(object, "metadata.generateName")
}

pub fn namespace(object: &Value) -> &str {
    text(object, "metadata.namespace")
}

pub fn uid(object: &Value) -> &str {
    text(object, "metadata.uid")
}

pub fn resource_version(object: &Value) -> &str {
    text(object, "metadata.resourceVersion")
}

pub fn api_version(object: &Value) -> &str {
    text(object, "apiVersion")
}

pub fn kind(object: &Value) -> &str {
    text(object, "kind")
}

pub fn generation(object: &Value) -> i64 {
    get(object, "metadata.generation").as_i64().unwrap_or_default()
}

pub fn creation_timestamp(object: &Value) -> &str {
    text(object, "metadata.creationTimestamp")
}

/// Set while the object waits for its finalizers or its grace period.
pub fn is_deleting(object: &Value) -> bool {
    !text(object, "metadata.deletionTimestamp").is_empty()
}

pub fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    at(object, &["metadata", "labels", key]).as_str()
}

pub fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    at(object, &["metadata", "annotations", key]).as_str()
}

/// Entries that are strings.
pub fn labels(object: &Value) -> impl Iterator<Item = (&str, &str)> {
    string_entries(get(object, "metadata.labels"))
}

pub fn annotations(object: &Value) -> impl Iterator<Item = (&str, &str)> {
    string_entries(get(object, "metadata.annotations"))
}

/// The string entries of a map value.
pub fn string_entries(map: &Value) -> impl Iterator<Item = (&str, &str)> {
    map.as_object().into_iter().flatten().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
}

pub fn finalizers(object: &Value) -> impl Iterator<Item = &str> {
    items(object, "metadata.finalizers").iter().filter_map(Value::as_str)
}

pub fn owner_references(object: &Value) -> &[Value] {
    items(object, "metadata.ownerReferences")
}

/// The reference with `controller: true`.
pub fn controller_of(object: &Value) -> Option<&Value> {
    owner_references(object).iter().find(|owner| owner["controller"] == true)
}

pub fn set_name(object: &mut Value, name: &str) {
    child_mut(object, "metadata").insert("name".into(), name.into());
}

pub fn set_namespace(object: &mut Value, namespace: &str) {
    child_mut(object, "metadata").insert("namespace".into(), namespace.into());
}

pub fn set_resource_version(object: &mut Value, version: &str) {
    child_mut(object, "metadata").insert("resourceVersion".into(), version.into());
}

/// Sets `apiVersion` and `kind`, at the front where they are missing.
pub fn set_type(object: &mut Value, api_version: &str, kind: &str) {
    let map = map_mut(object);
    for (index, (key, value)) in [("apiVersion", api_version), ("kind", kind)].into_iter().enumerate() {
        match map.get_mut(key) {
            Some(current) => *current = value.into(),
            None => {
                map.shift_insert(index.min(map.len()), key.to_string(), value.into());
            }
        }
    }
}

/// What the server alone decides at creation: uid, creationTimestamp; deletion and managed state of the request are dropped.
/// `generated_suffix` (5 characters) is appended to `generateName` when there is no name.
pub fn stamp_new(object: &mut Value, uid: &str, now: jiff::Timestamp, generated_suffix: &str) {
    let generated = generate_name(object);
    let new_name = (name(object).is_empty() && !generated.is_empty()).then(|| {
        let cut =
            generated.char_indices().take_while(|(index, _)| *index < 63 - 5).last().map_or(0, |(index, symbol)| index + symbol.len_utf8());
        format!("{}{generated_suffix}", &generated[..cut])
    });
    let metadata = child_mut(object, "metadata");
    for key in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion"] {
        metadata.shift_remove(key);
    }
    if let Some(name) = new_name {
        metadata.insert("name".into(), name.into());
    }
    metadata.insert("uid".into(), uid.into());
    metadata.insert("creationTimestamp".into(), crate::time::format(now).into());
}

/// The levels of containers that JSON's readers, which stop at 128, take; all objects stay within them, or they could not be read again.
pub const MAX_DEPTH: usize = 127;

/// Whether containers are nested deeper than `limit`.
pub fn deeper_than(value: &Value, limit: usize) -> bool {
    let within = limit.saturating_sub(1);
    match value {
        Value::Array(items) => limit == 0 || items.iter().any(|item| deeper_than(item, within)),
        Value::Object(map) => limit == 0 || map.values().any(|item| deeper_than(item, within)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_are_made_and_removed() {
        let mut object = json!({"spec": {"a": 1, "b": 2}});
        set(&mut object, "spec.c.d", "x");
        assert_eq!(object, json!({"spec": {"a": 1, "b": 2, "c": {"d": "x"}}}));
        assert_eq!(remove(&mut object, "spec.c"), Some(json!({"d": "x"})));
        assert_eq!(remove(&mut object, "none.at.all"), None);
        assert_eq!(text(&object, "spec.none.x"), "");
    }

    #[test]
    fn absent_and_empty_are_the_same() {
        for (left, right, expected) in [
            (json!({"a": 1}), json!({"a": 1, "b": {}, "c": [], "d": null, "e": ""}), true),
            (json!({"a": 1, "b": 2}), json!({"b": 2, "a": 1}), true),
            (json!({"a": false}), json!({}), false),
            (json!({"a": [1, 2]}), json!({"a": [2, 1]}), false),
        ] {
            assert_eq!((same(&left, &right), same(&right, &left)), (expected, expected), "{left} {right}");
        }
    }

    #[test]
    fn new_objects_are_stamped() {
        let mut object = json!({"metadata": {"generateName": "a-", "resourceVersion": "3", "deletionTimestamp": "x"}});
        stamp_new(&mut object, "u", jiff::Timestamp::UNIX_EPOCH, "12345");
        assert_eq!(
            object,
            json!({"metadata": {"generateName": "a-", "name": "a-12345", "uid": "u", "creationTimestamp": "1970-01-01T00:00:00Z"}})
        );
        let mut typed = json!({"metadata": {}, "kind": "Old"});
        set_type(&mut typed, "v1", "Pod");
        assert_eq!(typed.to_string(), r#"{"apiVersion":"v1","metadata":{},"kind":"Pod"}"#);
    }
}
