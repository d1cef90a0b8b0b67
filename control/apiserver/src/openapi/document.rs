//! One OpenAPI v3 document: the kinds' schemas with their group-version-kind marks, and the paths that tools look verbs up by.

use outrigger_api::{Catalog, Resource};
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::kinds;

const REF: &str = "#/components/schemas/";

pub fn build(catalog: &Catalog, group: &str, version: &str, git_version: &str) -> Value {
    let mut generator = SchemaSettings::openapi3().into_generator();
    let mut schemas = Map::new();
    let mut paths = Map::new();
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
    for (name, schema) in generator.take_definitions(true) {
        schemas.insert(name, schema);
    }
    for schema in schemas.values_mut() {
        tidy(schema);
    }
    for resource in &resources {
        let name = definition_name(resource);
        if let Some(custom) = &resource.custom {
            schemas.insert(name.clone(), custom_schema(resource, custom.schema.as_ref()));
            for shared in ["ObjectMeta", "ListMeta"] {
                add_meta(&mut schemas, shared);
            }
        }
        mark(&mut schemas, &name, resource);
        if resource.has_verb("list") {
            schemas.insert(format!("{name}List"), list_schema(resource, &name));
            add_meta(&mut schemas, "ListMeta");
        }
        add_paths(&mut paths, resource, &name);
    }
    add_options(&mut schemas);
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": git_version},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

/// The definition's name: that of the Rust type, or upstream's form for custom kinds (the group reversed).
fn definition_name(resource: &Resource) -> String {
    if resource.custom.is_none()
        && let Some(kind) = kinds::find(&resource.group, &resource.version, &resource.kind)
    {
        return (kind.name)();
    }
    let reversed: Vec<&str> = resource.group.split('.').rev().collect();
    format!("{}.{}.{}", reversed.join("."), resource.version, resource.kind)
}

fn reference(name: &str) -> Value {
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

fn gvk(group: &str, version: &str, kind: &str) -> Value {
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

fn type_fields() -> Map<String, Value> {
    let mut fields = Map::new();
    let text = |description: &str| json!({"description": description, "type": "string"});
    fields.insert("apiVersion".into(), text("APIVersion names the version of the schema of this object."));
    fields.insert("kind".into(), text("Kind names the REST resource this object represents."));
    fields
}

fn list_schema(resource: &Resource, name: &str) -> Value {
    let mut properties = type_fields();
    properties.insert("metadata".into(), json!({"allOf": [reference("io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta")]}));
    properties.insert("items".into(), json!({"type": "array", "items": {"allOf": [reference(name)], "default": {}}}));
    json!({
        "description": format!("{} is a list of {}.", resource.list_kind, resource.kind),
        "type": "object",
        "required": ["items"],
        "properties": properties,
        "x-kubernetes-group-version-kind": [gvk(&resource.group, &resource.version, &resource.list_kind)],
    })
}

fn custom_schema(_resource: &Resource, schema: Option<&Value>) -> Value {
    let mut schema = schema.cloned().unwrap_or_else(|| json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));
    let object_meta = json!({"allOf": [reference("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")]});
    let Some(map) = schema.as_object_mut() else { return schema };
    map.insert("type".into(), "object".into());
    let properties = outrigger_api::meta::map_mut(map.entry("properties").or_insert(Value::Null));
    for (key, value) in type_fields() {
        properties.insert(key, value);
    }
    properties.insert("metadata".into(), object_meta);
    schema
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
    for (name, mut schema) in generator.take_definitions(true) {
        tidy(&mut schema);
        schemas.entry(name).or_insert(schema);
    }
}

fn add_options(schemas: &mut Map<String, Value>) {
    add_meta(schemas, "DeleteOptions");
}

fn query(name: &str, kind: &str) -> Value {
    json!({"in": "query", "name": name, "schema": {"type": kind, "uniqueItems": true}})
}

fn parameters(verb: &str) -> Vec<Value> {
    let names: &[&str] = match verb {
        "create" | "update" => &["dryRun", "fieldManager", "fieldValidation"],
        "patch" => &["dryRun", "fieldManager", "fieldValidation", "force"],
        "delete" => &["dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy"],
        "list" | "deletecollection" => &[
            "labelSelector",
            "fieldSelector",
            "limit",
            "continue",
            "resourceVersion",
            "resourceVersionMatch",
            "timeoutSeconds",
            "watch",
            "allowWatchBookmarks",
            "sendInitialEvents",
        ],
        _ => &[],
    };
    names
        .iter()
        .map(|name| match *name {
            "force" | "orphanDependents" | "watch" | "allowWatchBookmarks" | "sendInitialEvents" => query(name, "boolean"),
            "gracePeriodSeconds" | "limit" | "timeoutSeconds" => query(name, "integer"),
            _ => query(name, "string"),
        })
        .collect()
}

fn operation(resource: &Resource, verb: &str, body: Option<&str>, answer: &str) -> Value {
    let action = match verb {
        "create" => "post",
        "update" => "put",
        other => other,
    };
    let content = |name: &str| json!({"application/json": {"schema": reference(name)}, "application/yaml": {"schema": reference(name)}});
    let mut value = json!({
        "operationId": format!("{verb}{}{}{}", resource.group.split('.').next().unwrap_or_default(), resource.version, resource.kind),
        "parameters": parameters(verb),
        "responses": {"200": {"description": "OK", "content": content(answer)}},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk(&resource.group, &resource.version, &resource.kind),
    });
    if let Some(body) = body {
        value["requestBody"] = json!({"content": {"*/*": {"schema": reference(body)}}, "required": true});
    }
    value
}

fn add_paths(paths: &mut Map<String, Value>, resource: &Resource, name: &str) {
    let base = if resource.group.is_empty() {
        format!("/api/{}", resource.version)
    } else {
        format!("/apis/{}/{}", resource.group, resource.version)
    };
    let scope = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
    let collection = format!("{base}{scope}/{}", resource.plural);
    let single = format!("{collection}/{{name}}");
    let list_name = format!("{name}List");
    let path_parameter =
        |name: &str| json!({"in": "path", "name": name, "required": true, "schema": {"type": "string", "uniqueItems": true}});
    let mut scoped: Vec<Value> = Vec::new();
    if resource.namespaced {
        scoped.push(path_parameter("namespace"));
    }
    let mut named = vec![path_parameter("name")];
    named.extend(scoped.clone());
    let mut collection_item = json!({"parameters": scoped});
    let mut single_item = json!({"parameters": named});
    let patch_body = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";
    for verb in &resource.verbs {
        match *verb {
            "list" => collection_item["get"] = operation(resource, "list", None, &list_name),
            "create" => collection_item["post"] = operation(resource, "create", Some(name), name),
            "deletecollection" => collection_item["delete"] = operation(resource, "deletecollection", None, name),
            "get" => single_item["get"] = operation(resource, "get", None, name),
            "update" => single_item["put"] = operation(resource, "update", Some(name), name),
            "patch" => single_item["patch"] = patch_operation(resource, name),
            "delete" => single_item["delete"] = operation(resource, "delete", Some(patch_body), name),
            _ => {}
        }
    }
    for sub in &resource.subresources {
        let mut item = json!({"parameters": [path_parameter("name")]});
        for verb in &sub.verbs {
            match *verb {
                "get" => item["get"] = operation(resource, "get", None, name),
                "update" => item["put"] = operation(resource, "update", Some(name), name),
                "patch" => item["patch"] = patch_operation(resource, name),
                "create" => item["post"] = operation(resource, "create", None, name),
                _ => {}
            }
        }
        paths.insert(format!("{single}/{}", sub.name), item);
    }
    if resource.namespaced && resource.has_verb("list") {
        paths.insert(format!("{base}/{}", resource.plural), json!({"get": operation(resource, "list", None, &list_name)}));
    }
    paths.insert(collection, collection_item);
    if resource.has_verb("get") {
        paths.insert(single, single_item);
    }
}

fn patch_operation(resource: &Resource, name: &str) -> Value {
    let mut value = operation(resource, "patch", None, name);
    let any = json!({"schema": {"type": "object"}});
    let mut content = json!({"application/json-patch+json": any, "application/merge-patch+json": any, "application/apply-patch+yaml": any});
    if resource.custom.is_none() {
        content["application/strategic-merge-patch+json"] = any;
    }
    value["requestBody"] = json!({"content": content, "required": true});
    value
}

pub fn version(git_version: &str) -> Value {
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": git_version},
        "paths": {"/version": {"get": {"operationId": "getCodeVersion", "responses": {"200": {"description": "OK"}}}}},
    })
}

/// OpenAPI v2: the definitions of all kinds, for tools that know no v3.
pub fn swagger(catalog: &Catalog, git_version: &str) -> Value {
    let mut definitions = Map::new();
    let mut paths = Map::new();
    for group in catalog.groups() {
        for version in catalog.versions(group) {
            let mut document = build(catalog, group, version, git_version);
            if let Value::Object(schemas) = document["components"]["schemas"].take() {
                definitions.extend(schemas.into_iter().map(|(name, schema)| (name, downgrade(schema))));
            }
            if let Value::Object(found) = document["paths"].take() {
                paths.extend(found.into_iter().map(|(path, item)| (path, swagger_item(item))));
            }
        }
    }
    json!({"swagger": "2.0", "info": {"title": "Kubernetes", "version": git_version}, "paths": paths, "definitions": definitions})
}

/// v2 refers to "#/definitions/", knows no allOf around a single reference and no oneOf.
fn downgrade(schema: Value) -> Value {
    match schema {
        Value::Object(mut map) => {
            map.shift_remove("oneOf");
            map.shift_remove("anyOf");
            map.shift_remove("nullable");
            if let Some(Value::Array(all)) = map.shift_remove("allOf")
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

fn swagger_item(item: Value) -> Value {
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
