//! Strategic merge: lists merge by their key or as sets, directives steer the rest.
use serde_json::{Map, Value};

use super::unprocessable;
use crate::status::Status;
use crate::types::{self, Merge, Shape, TypeId};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE: &str = "$deleteFromPrimitiveList/";

/// What is known of a value: its struct, if it has one.
type Known = Option<TypeId>;

/// Patches an object of the struct in place.
pub(super) fn apply(root: TypeId, object: &mut Value, patch: &Value) -> Result<(), Status> {
    let Value::Object(patch) = patch else { return Err(Status::bad_request("invalid JSON document")) };
    let target = crate::meta::map_mut(object);
    *target = map(std::mem::take(target), patch, Some(root))?;
    Ok(())
}

/// A field's shape and merge facts; nothing is known below arbitrary JSON.
fn lookup(known: Known, key: &str) -> Option<(&'static Shape, &'static Merge)> {
    let field = types::graph().types[known?].field(key)?;
    Some((&field.shape, &field.merge))
}

/// The struct of a field's value, or of its items.
fn inner(shape: &Shape) -> Known {
    match shape {
        Shape::Struct(id) => Some(*id),
        Shape::List(item) | Shape::Map(item) => inner(item),
        _ => None,
    }
}

fn map(mut original: Map<String, Value>, patch: &Map<String, Value>, known: Known) -> Result<Map<String, Value>, Status> {
    if let Some(directive) = patch.get(PATCH) {
        return match directive.as_str() {
            Some("replace") => Ok(patch.iter().filter(|(key, _)| *key != PATCH).map(|(key, value)| (key.clone(), value.clone())).collect()),
            Some("delete") => Ok(Map::new()),
            _ => Err(bad_directive(directive, patch)),
        };
    }
    retain_keys(&mut original, patch)?;
    let mut done = Vec::new();
    for (key, order) in patch {
        if let Some(name) = key.strip_prefix(ORDER) {
            ordered_list(&mut original, patch, name, order, known)?;
            done.push(name);
        }
    }
    for (key, change) in patch {
        if key == RETAIN || key.starts_with(ORDER) || done.contains(&key.as_str()) {
            continue;
        }
        match key.strip_prefix(DELETE) {
            Some(name) if done.contains(&name) => {}
            Some(name) => delete_scalars(&mut original, name, change)?,
            None => field(&mut original, key, change, known)?,
        }
    }
    Ok(original)
}

/// Clears what `$retainKeys` does not list; the patch itself may only set listed keys.
fn retain_keys(original: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), Status> {
    let Some(directive) = patch.get(RETAIN) else { return Ok(()) };
    let Some(kept) = directive.as_array() else { return Err(Status::bad_request("invalid patch format of retainKeys")) };
    let keeps = |key: &str| kept.iter().any(|entry| entry == key);
    let set = patch.iter().filter(|(key, value)| !key.starts_with('$') && !value.is_null());
    if set.into_iter().any(|(key, _)| !keeps(key)) {
        return Err(unprocessable("patch content doesn't match retainKeys list".into()));
    }
    original.retain(|key, _| keeps(key));
    Ok(())
}

fn field(original: &mut Map<String, Value>, key: &str, change: &Value, known: Known) -> Result<(), Status> {
    if change.is_null() {
        original.shift_remove(key);
        return Ok(());
    }
    let facts = lookup(known, key);
    let child = match facts {
        Some((shape, _)) => inner(shape),
        // Inside a map of structs the key is a name, and the value has the map's own struct.
        None => None,
    };
    let merge = facts.map(|(_, merge)| merge);
    let merged = match (original.get_mut(key).map(Value::take), change) {
        (Some(Value::Object(current)), Value::Object(change)) => {
            if merge.is_some_and(|merge| merge.replace) {
                Some(Value::Object(change.clone()))
            } else if matches!(facts, Some((Shape::Map(_), _))) {
                Some(Value::Object(map_of(current, change, child)?))
            } else {
                Some(Value::Object(map(current, change, child)?))
            }
        }
        (Some(Value::Array(current)), Value::Array(change)) => match merge {
            Some(merge) if merge.patch_key.is_some() || merge.patch_scalars => {
                Some(Value::Array(list(current, change, merge, child, None)?))
            }
            _ => Some(Value::Array(change.clone())),
        },
        (_, change) => without_directives(change),
    };
    match merged {
        Some(value) => drop(original.insert(key.to_string(), value)),
        None => drop(original.shift_remove(key)),
    }
    Ok(())
}

/// A map whose values have one struct: directives count, keys are names.
fn map_of(mut original: Map<String, Value>, patch: &Map<String, Value>, item: Known) -> Result<Map<String, Value>, Status> {
    if item.is_none() || patch.contains_key(PATCH) {
        return map(original, patch, None);
    }
    for (key, change) in patch {
        match (original.get_mut(key).map(Value::take), change) {
            (_, Value::Null) => drop(original.shift_remove(key)),
            (Some(Value::Object(current)), Value::Object(change)) => {
                drop(original.insert(key.clone(), Value::Object(map(current, change, item)?)))
            }
            (_, change) => match without_directives(change) {
                Some(value) => drop(original.insert(key.clone(), value)),
                None => drop(original.shift_remove(key)),
            },
        }
    }
    Ok(original)
}

/// `$setElementOrder/name` with, or without, changes to the list itself.
fn ordered_list(
    original: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    name: &str,
    order: &Value,
    known: Known,
) -> Result<(), Status> {
    let Some(order) = order.as_array() else { return Err(Status::bad_request("invalid patch format of setElementOrder list")) };
    let facts = lookup(known, name);
    let merge = facts.map(|(_, merge)| merge.clone()).unwrap_or_default();
    let child = facts.and_then(|(shape, _)| inner(shape));
    if let Some(deleted) = patch.get(&format!("{DELETE}{name}")) {
        delete_scalars(original, name, deleted)?;
    }
    let change = match patch.get(name) {
        None => Vec::new(),
        Some(Value::Array(items)) => items.clone(),
        Some(other) => return field(original, name, other, known),
    };
    let current = match original.get_mut(name).map(Value::take) {
        Some(Value::Array(items)) => items,
        _ if change.is_empty() => {
            original.shift_remove(name);
            return Ok(());
        }
        _ => Vec::new(),
    };
    let merged = list(current, &change, &merge, child, Some(order))?;
    original.insert(name.to_string(), Value::Array(merged));
    Ok(())
}

fn delete_scalars(original: &mut Map<String, Value>, name: &str, deleted: &Value) -> Result<(), Status> {
    let Some(deleted) = deleted.as_array() else { return Err(Status::bad_request("invalid patch format of primitive list")) };
    if let Some(Value::Array(items)) = original.get_mut(name) {
        items.retain(|item| !deleted.contains(item));
    }
    Ok(())
}

/// Merges two lists; `order` is the wanted order, by default the patch's own.
fn list(mut original: Vec<Value>, patch: &[Value], merge: &Merge, item: Known, order: Option<&[Value]>) -> Result<Vec<Value>, Status> {
    let Some(key) = merge.patch_key else {
        let before = original.len();
        for value in patch {
            if !original.contains(value) {
                original.push(value.clone());
            }
        }
        let same = |left: &Value, right: &Value| left == right;
        return Ok(in_order(original, before, order.unwrap_or(patch), same));
    };
    let same = |left: &Value, right: &Value| left.get(key).is_some_and(|value| right.get(key) == Some(value));
    let mut plain = Vec::new();
    let mut replace = false;
    for entry in patch {
        let Value::Object(fields) = entry else { return Err(Status::internal(format!("expected a map, but received {entry}"))) };
        match fields.get(PATCH).map(|directive| (directive, directive.as_str())) {
            None => plain.push(entry.clone()),
            Some((_, Some("replace"))) => replace = true,
            Some((_, Some("delete"))) if fields.contains_key(key) => original.retain(|current| !same(current, entry)),
            Some((_, Some("delete"))) => return Err(no_merge_key(fields, key)),
            Some((_, Some("merge"))) => return Err(Status::internal("merging lists cannot yet be specified in the patch")),
            Some((directive, _)) => return Err(bad_directive(directive, fields)),
        }
    }
    if replace {
        return Ok(plain);
    }
    let before = original.len();
    for entry in &plain {
        let Value::Object(fields) = entry else { continue };
        if !fields.contains_key(key) {
            return Err(no_merge_key(fields, key));
        }
        match original.iter_mut().find(|current| same(current, entry)) {
            Some(current) => {
                let taken = std::mem::take(crate::meta::map_mut(current));
                *current = Value::Object(map(taken, fields, item)?);
            }
            None => original.extend(without_directives(entry)),
        }
    }
    Ok(in_order(original, before, order.unwrap_or(&plain), same))
}

/// Items named by `order` come in that order; the others keep theirs, each before the first ordered one that it stood before.
/// An item from index `new` on stood nowhere before, so it comes as early as `order` lets it: a list's new items lead.
fn in_order(merged: Vec<Value>, new: usize, order: &[Value], same: impl Fn(&Value, &Value) -> bool) -> Vec<Value> {
    let position = |value: &Value| merged.iter().position(|current| same(current, value));
    let mut named = Vec::with_capacity(merged.len());
    for wanted in order {
        if let Some(index) = position(wanted)
            && !named.contains(&index)
        {
            named.push(index);
        }
    }
    let mut others = (0..merged.len()).filter(|index| !named.contains(index)).peekable();
    let mut indexes = Vec::with_capacity(merged.len());
    for index in &named {
        while let Some(other) = others.next_if(|other| other < index && *index < new) {
            indexes.push(other);
        }
        indexes.push(*index);
    }
    indexes.extend(others);
    indexes.into_iter().map(|index| merged[index].clone()).collect()
}

/// A new value from a patch: nulls and directives are no content; none if the value itself is one.
fn without_directives(value: &Value) -> Option<Value> {
    match value {
        Value::Object(map) if map.contains_key(PATCH) => None,
        Value::Object(map) => {
            let plain =
                map.iter().filter(|(key, value)| !value.is_null() && !key.starts_with(ORDER) && !key.starts_with(DELETE) && *key != RETAIN);
            Some(Value::Object(plain.filter_map(|(key, value)| Some((key.clone(), without_directives(value)?))).collect()))
        }
        Value::Array(items) => Some(Value::Array(items.iter().filter_map(without_directives).collect())),
        other => Some(other.clone()),
    }
}

fn bad_directive(directive: &Value, map: &Map<String, Value>) -> Status {
    Status::internal(format!("unknown patch type: {directive} in map: {}", Value::Object(map.clone())))
}

fn no_merge_key(map: &Map<String, Value>, key: &str) -> Status {
    Status::internal(format!("map: {} does not contain declared merge key: {key}", Value::Object(map.clone())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn patched(kind: (&str, &str), mut object: Value, patch: Value) -> Result<Value, u16> {
        let root = types::by_kind(kind.0, "v1", kind.1).expect("built in").id;
        apply(root, &mut object, &patch).map(|()| object).map_err(|status| status.code)
    }

    #[test]
    fn lists_merge_by_their_key() {
        let pod = json!({"spec": {"containers": [{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]}});
        for (patch, expected) in [
            (json!([{"name": "b", "image": "2"}]), json!([{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "2"}])),
            (json!([{"name": "a", "args": ["y"]}]), json!([{"name": "a", "image": "1", "args": ["y"]}, {"name": "b", "image": "1"}])),
            (json!([{"name": "a", "$patch": "delete"}]), json!([{"name": "b", "image": "1"}])),
            (json!([{"name": "c"}, {"$patch": "replace"}]), json!([{"name": "c"}])),
            (
                json!([{"name": "c", "image": null}]),
                json!([{"name": "c"}, {"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]),
            ),
        ] {
            let result = patched(("", "Pod"), pod.clone(), json!({"spec": {"containers": patch}})).expect("merges");
            assert_eq!(result["spec"]["containers"], expected, "{patch}");
        }
        assert_eq!(patched(("", "Pod"), pod, json!({"spec": {"containers": [{"image": "x"}]}})), Err(500));
    }

    #[test]
    fn element_order_is_kept() {
        let pod = json!({"spec": {"containers": [{"name": "a"}, {"name": "server"}, {"name": "b"}]}});
        let patch = json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "c"}, {"name": "a"}], "containers": [{"name": "c", "image": "x"}]}});
        let result = patched(("", "Pod"), pod.clone(), patch).expect("merges");
        let names: Vec<_> = crate::meta::items(&result, "spec.containers")
            .iter()
            .map(|entry| entry["name"].as_str().unwrap_or_default().to_string())
            .collect();
        assert_eq!(names, ["server", "b", "c", "a"].map(String::from).to_vec(), "{names:?}");
        let result =
            patched(("", "Pod"), pod, json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}})).expect("merges");
        assert_eq!(result["spec"]["containers"].as_array().map(Vec::len), Some(3));
    }

    #[test]
    fn directives_steer() {
        for (kind, object, patch, expected) in [
            (
                ("", "Pod"),
                json!({"metadata": {"finalizers": ["a", "b"]}}),
                json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]}}),
                json!({"metadata": {"finalizers": ["b"]}}),
            ),
            (
                ("", "Pod"),
                json!({"metadata": {"finalizers": ["a"]}}),
                json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "$setElementOrder/finalizers": ["c"], "finalizers": ["c"]}}),
                json!({"metadata": {"finalizers": ["c"]}}),
            ),
            (
                ("", "Pod"),
                json!({"metadata": {"finalizers": ["a", "b"]}}),
                json!({"metadata": {"finalizers": ["c"]}}),
                json!({"metadata": {"finalizers": ["c", "a", "b"]}}),
            ),
            (
                ("", "Pod"),
                json!({"metadata": {"labels": {"a": "1", "b": "2"}}}),
                json!({"metadata": {"labels": {"$patch": "replace", "c": "3"}}}),
                json!({"metadata": {"labels": {"c": "3"}}}),
            ),
            (
                ("", "Pod"),
                json!({"metadata": {"labels": {"a": "1"}}}),
                json!({"metadata": {"labels": {"a": null, "b": "2"}}}),
                json!({"metadata": {"labels": {"b": "2"}}}),
            ),
            (
                ("apps", "Deployment"),
                json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
                json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
                json!({"spec": {"strategy": {"type": "Recreate"}}}),
            ),
            (
                ("", "Pod"),
                json!({"spec": {"tolerations": [{"key": "a"}]}}),
                json!({"spec": {"tolerations": [{"key": "b"}]}}),
                json!({"spec": {"tolerations": [{"key": "b"}]}}),
            ),
            (("", "ConfigMap"), json!({"data": {"a": "1"}}), json!({"data": {"b": "2"}}), json!({"data": {"a": "1", "b": "2"}})),
        ] {
            assert_eq!(patched(kind, object, patch.clone()), Ok(expected), "{patch}");
        }
        let refused = json!({"spec": {"strategy": {"$retainKeys": ["type"], "rollingUpdate": {}}}});
        assert_eq!(patched(("apps", "Deployment"), json!({}), refused.clone()), Ok(json!({"spec": {"strategy": {"rollingUpdate": {}}}})));
        assert_eq!(patched(("apps", "Deployment"), json!({"spec": {"strategy": {}}}), refused), Err(422));
        assert_eq!(patched(("", "Pod"), json!({"spec": {}}), json!({"spec": {"$patch": "x"}})), Err(500));
    }
}
