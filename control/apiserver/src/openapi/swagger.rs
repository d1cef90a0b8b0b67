//! OpenAPI v2: the definitions and paths of all kinds in one document, for tools that know no v3. The built-in kinds' part is made once.

use outrigger_api::{Catalog, Resource};
use serde_json::{Map, Value, json};

use super::document::{self, REF};
use super::gunzip;
use crate::aggregator::AllFound;
use crate::cache::encode;
use crate::reply::gzip;

/// A part of the document: the members of `definitions` and of `paths`, as JSON text without the braces around, compressed.
pub struct Part {
    definitions: bytes::Bytes,
    paths: bytes::Bytes,
}

impl Part {
    pub fn builtin(git_version: &str) -> Self {
        let (definitions, paths) = members(&Catalog::builtin(), git_version, |_| true);
        Self { definitions: gzip(&inner(definitions)), paths: gzip(&inner(paths)) }
    }
}

/// The text of an object's members.
fn inner(map: Map<String, Value>) -> Vec<u8> {
    let text = encode(&Value::Object(map));
    text[1..text.len() - 1].to_vec()
}

/// `others` are the parts of aggregated servers.
pub fn build(catalog: &Catalog, builtin: &Part, others: &AllFound, git_version: &str) -> Vec<u8> {
    let is_custom = |resource: &Resource| resource.custom.is_some();
    let (mut definitions, mut paths) = members(catalog, git_version, is_custom);
    for found in others.values() {
        definitions.extend(found.definitions.clone());
        paths.extend(found.paths.clone());
    }
    let head = json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": git_version}}).to_string();
    let mut out = head.as_bytes()[..head.len() - 1].to_vec();
    for (name, fixed, custom) in [("definitions", &builtin.definitions, definitions), ("paths", &builtin.paths, paths)] {
        out.extend(format!(",\"{name}\":{{").bytes());
        // Compressed by this process.
        out.extend(gunzip(fixed).unwrap_or_default());
        if !custom.is_empty() {
            out.push(b',');
            out.extend(inner(custom));
        }
        out.push(b'}');
    }
    out.push(b'}');
    out
}

/// Definitions and paths of the groups and versions that have a wanted resource, without what all documents share.
fn members(catalog: &Catalog, git_version: &str, wanted: impl Fn(&Resource) -> bool) -> (Map<String, Value>, Map<String, Value>) {
    let (mut definitions, mut paths) = (Map::new(), Map::new());
    for group in catalog.groups() {
        for version in catalog.versions(group) {
            let resources: Vec<_> = catalog.resources(group, version).filter(|resource| wanted(resource)).collect();
            if resources.is_empty() {
                continue;
            }
            let mut document = document::build(catalog, group, version, git_version);
            let names: Vec<String> = resources
                .iter()
                .filter(|resource| resource.custom.is_some())
                .flat_map(|resource| [document::definition_name(resource), document::list_name(resource)])
                .collect();
            if let Value::Object(schemas) = document["components"]["schemas"].take() {
                for (name, schema) in schemas {
                    match (names.is_empty(), names.contains(&name)) {
                        (true, _) => drop(definitions.insert(name, downgrade(schema))),
                        (_, true) => drop(definitions.insert(name, downgrade(custom(schema)))),
                        _ => {}
                    }
                }
            }
            if let Value::Object(found) = document["paths"].take() {
                paths.extend(found.into_iter().map(|(path, item)| (path, path_item(item))));
            }
        }
    }
    (definitions, paths)
}

/// A custom resource's schema as kubectl can bear it in v2: what is nullable or keeps unknown fields has no type and no inside.
fn custom(schema: Value) -> Value {
    if schema["x-kubernetes-preserve-unknown-fields"] != true {
        let mut schema = schema;
        structural(&mut schema);
        return schema;
    }
    // Named fields would forbid all others.
    let mut free = json!({"type": "object"});
    if let Some(kinds) = schema.get("x-kubernetes-group-version-kind") {
        free["x-kubernetes-group-version-kind"] = kinds.clone();
    }
    free
}

fn structural(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    for key in ["oneOf", "anyOf", "allOf", "not"] {
        if key != "allOf" || map.len() > 1 && !is_reference(map) {
            map.shift_remove(key);
        }
    }
    let nullable = map.shift_remove("nullable") == Some(Value::Bool(true));
    let preserves = map.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    let has_items = map.contains_key("items");
    if nullable || preserves {
        map.shift_remove("items");
        map.shift_remove("properties");
    }
    let kind = map.get("type").and_then(Value::as_str).unwrap_or_default().to_string();
    let array_without_items = kind == "array" && (!has_items || nullable || preserves);
    if nullable || array_without_items || (preserves && kind == "object") {
        map.shift_remove("type");
    }
    let optional: Vec<String> = map
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter(|(_, property)| property["nullable"] == true)
        .map(|(key, _)| key.clone())
        .collect();
    if let Some(required) = map.get_mut("required").and_then(Value::as_array_mut) {
        required.retain(|field| !optional.iter().any(|key| field == key));
        if required.is_empty() {
            map.shift_remove("required");
        }
    }
    for key in ["properties", "additionalProperties", "items"] {
        match map.get_mut(key) {
            Some(Value::Object(properties)) if key == "properties" => properties.values_mut().for_each(structural),
            Some(inner) => structural(inner),
            None => {}
        }
    }
}

/// Whether the schema is a reference written as allOf, as v3 has it where there is more to say.
fn is_reference(map: &Map<String, Value>) -> bool {
    map.get("allOf").and_then(Value::as_array).is_some_and(|all| all.len() == 1 && all[0].get("$ref").is_some())
}

/// v2 refers to "#/definitions/", knows no allOf around a single reference and no oneOf.
fn downgrade(schema: Value) -> Value {
    match schema {
        Value::Object(mut map) => {
            map.shift_remove("oneOf");
            map.shift_remove("anyOf");
            if map.get("nullable").is_some_and(Value::is_boolean) {
                map.shift_remove("nullable");
            }
            if is_reference(&map)
                && let Some(Value::Array(all)) = map.shift_remove("allOf")
                && let Some(Value::Object(only)) = all.into_iter().next()
            {
                map.extend(only);
            }
            if map.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
                map.insert("type".into(), "string".into());
                map.insert("format".into(), "int-or-string".into());
            }
            if let Some(target) = map.get_mut("$ref")
                && let Some(name) = target.as_str().and_then(|text| text.strip_prefix(REF)).map(String::from)
            {
                *target = format!("#/definitions/{name}").into();
            }
            Value::Object(map.into_iter().map(|(key, value)| (key, downgrade(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(downgrade).collect()),
        other => other,
    }
}

fn path_item(item: Value) -> Value {
    let Value::Object(map) = item else { return item };
    let mut out = Map::new();
    for (method, operation) in map {
        if method == "parameters" {
            continue;
        }
        let mut slim = json!({"responses": {"200": {"description": "OK"}}});
        for key in ["operationId", "x-kubernetes-action", "x-kubernetes-group-version-kind"] {
            if let Some(value) = operation.get(key) {
                slim[key] = value.clone();
            }
        }
        out.insert(method, slim);
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn custom_schemas_lose_what_v2_cannot_say() {
        for (schema, expected) in [
            (json!({"type": "string", "nullable": true}), json!({})),
            (
                json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"a": {}}}),
                json!({"x-kubernetes-preserve-unknown-fields": true}),
            ),
            (json!({"type": "array", "items": {"type": "string", "oneOf": []}}), json!({"type": "array", "items": {"type": "string"}})),
            (
                json!({"type": "object", "required": ["a"], "properties": {"a": {"type": "object", "nullable": true, "properties": {}}}}),
                json!({"type": "object", "properties": {"a": {}}}),
            ),
        ] {
            let mut got = schema;
            structural(&mut got);
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn the_document_has_builtin_and_custom_kinds() {
        let mut catalog = Catalog::builtin();
        let definition = json!({"metadata": {"name": "foos.x.io"}, "spec": {"group": "x.io", "scope": "Namespaced",
            "names": {"plural": "foos", "singular": "foo", "kind": "Foo", "listKind": "FooList"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "integer"}}}}}]}});
        outrigger_api::custom::resources(&definition).into_iter().for_each(|resource| catalog.insert(resource));
        let text = build(&catalog, &Part::builtin("v1"), &AllFound::default(), "v1");
        let document: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(document["definitions"]["io.x.v1.Foo"]["properties"]["spec"], json!({"type": "integer"}));
        let metadata = &document["definitions"]["io.x.v1.Foo"]["properties"]["metadata"];
        assert_eq!(metadata["$ref"], "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta");
        assert!(document["definitions"]["io.k8s.api.core.v1.Pod"].is_object());
        assert!(document["paths"]["/apis/x.io/v1/namespaces/{namespace}/foos"]["post"].is_object());
        assert!(document["paths"]["/api/v1/pods"]["get"].is_object());
    }
}
