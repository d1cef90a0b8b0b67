//! The paths of an OpenAPI v3 document: what tools look verbs, parameters and bodies up by.

use outrigger_api::Resource;
use serde_json::{Map, Value, json};

use super::document::{gvk, reference};

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

pub fn add(paths: &mut Map<String, Value>, resource: &Resource, name: &str) {
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
