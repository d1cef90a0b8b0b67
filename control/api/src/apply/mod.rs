//! Server-side apply: who owns which field of an object, and what an applied configuration makes of it.
//!
//! [`schema`] says how a value merges, from the same facts that decoding, defaults and strategic patches use; [`walk`] compares, merges and
//! prunes by it; [`set`] holds the fields; [`tracker`] keeps `metadata.managedFields`.
mod managers;
mod schema;
mod set;
mod tracker;
mod walk;

use serde_json::Value;

use crate::resource::Resource;

pub use managers::keep_times;
pub use tracker::Tracker;

/// `live` with a configuration on it that nobody comes to own: what mutating policies do. Atomic values can't be changed in part, so they
/// can't be changed.
pub fn overlay(resource: &Resource, live: &Value, config: &Value) -> Result<Value, String> {
    let root = schema::root(resource);
    walk::check(root, config).map_err(|error| format!("failed to convert patch object to typed object: {error}"))?;
    let mut atomics = Vec::new();
    find_atomics(root, config, String::new(), &mut atomics);
    if !atomics.is_empty() {
        let all = atomics.join(", ");
        return Err(format!("invalid ApplyConfiguration: may not mutate atomic arrays, maps or structs: {all}"));
    }
    Ok(walk::merge(root, Some(live), Some(config)).unwrap_or_default())
}

fn find_atomics(ty: schema::Type<'_>, value: &Value, path: String, found: &mut Vec<String>) {
    match (ty.form(value), value) {
        (schema::Form::Map { atomic: true }, Value::Object(_)) => found.push(path),
        (schema::Form::Map { .. }, Value::Object(map)) => {
            for (key, value) in map {
                if let Some((child, _)) = ty.child(key) {
                    find_atomics(child, value, format!("{path}.{key}"), found);
                }
            }
        }
        (schema::Form::List { keyed: schema::Keyed::Atomic, .. }, Value::Array(_)) => found.push(path),
        (schema::Form::List { item, .. }, Value::Array(items)) => {
            for (index, value) in items.iter().enumerate() {
                find_atomics(item, value, format!("{path}[{index}]"), found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
