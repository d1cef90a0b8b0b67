//! What the structs' documentation doesn't say about fields: how lists and maps merge. Clients that patch or apply read it from the schema.

use outrigger_api::types::{self, Field, ListType};
use serde_json::{Map, Value, json};

/// Adds the merge facts to a definition of a built-in struct, by the definition's name (`io.k8s.api.core.v1.PodSpec`).
pub fn add(name: &str, schema: &mut Value) {
    let mut words = name.rsplit('.');
    let (Some(kind), Some(version), Some(group)) = (words.next(), words.next(), words.next()) else { return };
    let Some(known) = types::graph().by_name(&format!("{group}/{version}"), kind) else { return };
    if known.atomic {
        schema["x-kubernetes-map-type"] = "atomic".into();
    }
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    for (key, property) in properties {
        if let (Some(field), Some(property)) = (known.field(key), property.as_object_mut()) {
            add_field(field, property);
        }
    }
}

fn add_field(field: &Field, property: &mut Map<String, Value>) {
    let merge = &field.merge;
    let is_map = matches!(field.shape, types::Shape::Map(_) | types::Shape::Struct(_));
    match &merge.list {
        ListType::Unset => {}
        ListType::Atomic if is_map => drop(property.insert("x-kubernetes-map-type".into(), "atomic".into())),
        ListType::Atomic => drop(property.insert("x-kubernetes-list-type".into(), "atomic".into())),
        ListType::Set => drop(property.insert("x-kubernetes-list-type".into(), "set".into())),
        ListType::Map(keys) => {
            property.insert("x-kubernetes-list-map-keys".into(), json!(keys));
            property.insert("x-kubernetes-list-type".into(), "map".into());
        }
    }
    if let Some(key) = merge.patch_key {
        property.insert("x-kubernetes-patch-merge-key".into(), key.into());
    }
    let merges = merge.patch_key.is_some() || merge.patch_scalars;
    let strategies = [(merge.retain_keys, "retainKeys"), (merge.replace, "replace"), (merges, "merge")];
    let strategy: Vec<&str> = strategies.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect();
    if !strategy.is_empty() {
        let order: Vec<&str> = if merges && merge.retain_keys { vec!["merge", "retainKeys"] } else { strategy };
        property.insert("x-kubernetes-patch-strategy".into(), order.join(",").into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_learn_how_they_merge() {
        let mut schema =
            json!({"properties": {"containers": {"type": "array"}, "volumes": {"type": "array"}, "nodeName": {"type": "string"}}});
        add("io.k8s.api.core.v1.PodSpec", &mut schema);
        let containers = &schema["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
        assert_eq!(schema["properties"]["volumes"]["x-kubernetes-patch-strategy"], "merge,retainKeys");
        assert_eq!(schema["properties"]["nodeName"], json!({"type": "string"}));
    }
}
