//! One OpenAPI v3 document: the kinds' schemas with their group-version-kind marks, and the paths that tools look verbs up by.

use outrigger_api::{Catalog, Resource};
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::{facts, kinds, paths};

pub const REF: &str = "#/components/schemas/";

pub fn build(catalog: &Catalog, group: &str, version: &str, git_version: &str) -> Value {
    let mut generator = SchemaSettings::openapi3().into_generator();
    let mut schemas = Map::new();
    let mut all_paths = Map::new();
    let resources: Vec<_> = catalog.resources(group, version).collect();
    for resource in &resources {
        if resource.custom.is_none() {
            if let Some(kind) = kinds::find(&resource.group, &resource.version, &resource.kind) {
                (kind.add)(&mut generator);
            }
            for sub in &resource.subresources {
                if let Some(kind) = kinds::find(&sub.body.group, &sub.body.version, &sub.body.kind) {
                    (kind.add)(&mut generator);
                }
            }
        }
    }
    add_definitions(&mut schemas, generator);
    for resource in &resources {
        let name = definition_name(resource);
        if let Some(custom) = &resource.custom {
            schemas.insert(name.clone(), custom_schema(custom.schema.as_ref()));
            for shared in ["ObjectMeta", "ListMeta"] {
                add_meta(&mut schemas, shared);
            }
        }
        mark(&mut schemas, &name, resource);
        if resource.has_verb("list") {
            schemas.insert(list_name(resource), list_schema(resource, &name));
            add_meta(&mut schemas, "ListMeta");
        }
        paths::add(&mut all_paths, resource, &name);
    }
    add_options(&mut schemas);
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": git_version},
        "paths": all_paths,
        "components": {"schemas": schemas},
    })
}

/// The generator's definitions in upstream's form, but those that are there already.
fn add_definitions(schemas: &mut Map<String, Value>, mut generator: SchemaGenerator) {
    for (name, mut schema) in generator.take_definitions(true) {
        facts::add(&name, &mut schema);
        tidy(&mut schema);
        schemas.entry(name).or_insert(schema);
    }
}

/// The definition's name: that of the Rust type, or upstream's form for custom kinds (the group reversed).
pub fn definition_name(resource: &Resource) -> String {
    if resource.custom.is_none()
        && let Some(kind) = kinds::find(&resource.group, &resource.version, &resource.kind)
    {
        return (kind.name)();
    }
    let reversed: Vec<&str> = resource.group.split('.').rev().collect();
    format!("{}.{}.{}", reversed.join("."), resource.version, resource.kind)
}

/// The list's name, beside that of its items.
pub fn list_name(resource: &Resource) -> String {
    let name = definition_name(resource);
    match name.rsplit_once('.') {
        Some((package, _)) if resource.custom.is_some() => format!("{package}.{}", resource.list_kind),
        _ => format!("{name}List"),
    }
}

pub fn reference(name: &str) -> Value {
    json!({"$ref": format!("{REF}{name}")})
}

/// Upstream never requires metadata, and writes a reference with a description as allOf.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            let required_empty = match map.get_mut("required").and_then(Value::as_array_mut) {
                Some(required) => {
                    required.retain(|field| !matches!(field.as_str(), Some("metadata" | "spec" | "status")));
                    required.is_empty()
                }
                None => false,
            };
            if required_empty {
                map.shift_remove("required");
            }
            if map.len() > 1
                && let Some(target) = map.get("$ref").filter(|target| target.is_string()).cloned()
            {
                map.shift_remove("$ref");
                map.insert("allOf".into(), json!([{"$ref": target}]));
            }
            if map.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) {
                map.insert("oneOf".into(), json!([{"type": "string"}, {"type": "number"}]));
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

pub fn gvk(group: &str, version: &str, kind: &str) -> Value {
    json!({"group": group, "kind": kind, "version": version})
}

fn mark(schemas: &mut Map<String, Value>, name: &str, resource: &Resource) {
    if let Some(schema) = schemas.get_mut(name).and_then(Value::as_object_mut) {
        schema.insert("x-kubernetes-group-version-kind".into(), json!([gvk(&resource.group, &resource.version, &resource.kind)]));
    }
    for sub in resource.subresources.iter().filter(|sub| sub.body.kind != resource.kind) {
        if let Some(kind) = kinds::find(&sub.body.group, &sub.body.version, &sub.body.kind)
            && let Some(schema) = schemas.get_mut(&(kind.name)()).and_then(Value::as_object_mut)
        {
            schema.insert("x-kubernetes-group-version-kind".into(), json!([gvk(kind.group, kind.version, kind.kind)]));
        }
    }
}

/// The fields that every object has, with the descriptions that a built-in kind has of them.
fn type_fields() -> Map<String, Value> {
    let mut generator = SchemaSettings::openapi3().into_generator();
    generator.subschema_for::<k8s_openapi::api::core::v1::Namespace>();
    let mut definitions = Map::new();
    add_definitions(&mut definitions, generator);
    let mut fields = definitions
        .shift_remove("io.k8s.api.core.v1.Namespace")
        .and_then(|mut schema| schema.get_mut("properties").and_then(Value::as_object_mut).map(std::mem::take))
        .unwrap_or_default();
    fields.retain(|key, _| matches!(key.as_str(), "apiVersion" | "kind" | "metadata"));
    fields
}

fn list_schema(resource: &Resource, name: &str) -> Value {
    let mut properties = type_fields();
    properties.insert("metadata".into(), json!({"allOf": [reference("io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta")]}));
    properties.insert("items".into(), json!({"type": "array", "items": {"allOf": [reference(name)], "default": {}}}));
    json!({
        "description": format!("{} is a list of {}", resource.list_kind, resource.kind),
        "type": "object",
        "required": ["items"],
        "properties": properties,
        "x-kubernetes-group-version-kind": [gvk(&resource.group, &resource.version, &resource.list_kind)],
    })
}

fn custom_schema(schema: Option<&Value>) -> Value {
    let mut schema = schema.cloned().unwrap_or_else(|| json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));
    schema["type"] = "object".into();
    let fields = type_fields();
    embed(&mut schema, &fields, true);
    schema
}

/// Resources, the root and those embedded, have the fields that every object has.
fn embed(schema: &mut Value, fields: &Map<String, Value>, is_resource: bool) {
    let Some(map) = schema.as_object_mut() else { return };
    if is_resource || map.get("x-kubernetes-embedded-resource") == Some(&Value::Bool(true)) {
        let properties = outrigger_api::meta::map_mut(map.entry("properties").or_insert(Value::Null));
        properties.extend(fields.iter().map(|(key, value)| (key.clone(), value.clone())));
        if is_resource {
            properties.values_mut().for_each(|property| embed(property, fields, false));
            return;
        }
    }
    for key in ["properties", "items", "additionalProperties"] {
        match map.get_mut(key) {
            Some(Value::Object(properties)) if key == "properties" => {
                properties.values_mut().for_each(|property| embed(property, fields, false));
            }
            Some(inner) => embed(inner, fields, false),
            None => {}
        }
    }
}

/// A shared type of the meta group, with all that it refers to.
fn add_meta(schemas: &mut Map<String, Value>, name: &str) {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1;
    let full = format!("io.k8s.apimachinery.pkg.apis.meta.v1.{name}");
    if schemas.contains_key(&full) {
        return;
    }
    let mut generator = SchemaSettings::openapi3().into_generator();
    match name {
        "ObjectMeta" => generator.subschema_for::<v1::ObjectMeta>(),
        "ListMeta" => generator.subschema_for::<v1::ListMeta>(),
        _ => generator.subschema_for::<v1::DeleteOptions>(),
    };
    add_definitions(schemas, generator);
}

fn add_options(schemas: &mut Map<String, Value>) {
    add_meta(schemas, "DeleteOptions");
}
