//! CustomResourceDefinitions: names, versions, and the shape of structural schemas.
use std::collections::HashSet;

use serde_json::Value;

use super::place::{Findings, Place};
use crate::field_error::FieldError;
use crate::jsonpath::JsonPath;
use crate::meta;
use crate::names;

pub(super) fn definition(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    let wanted = format!("{}.{}", spec.at("names.plural").text(), spec.at("group").text());
    let name = root.at("metadata.name");
    if name.text() != wanted {
        found.push(name.invalid("must be spec.names.plural+\".\"+spec.group"));
    }
    let group = spec.at("group");
    if group.require(found) {
        group.check(found, names::dns_subdomain);
        if !group.text().contains('.') {
            found.push(group.invalid("should be a domain with at least one dot"));
        }
    }
    spec.at("scope").one_of(found, &["Cluster", "Namespaced"]);
    definition_names(&spec.at("names"), found);
    if spec.at("preserveUnknownFields").flag() {
        found.push(spec.at("preserveUnknownFields").invalid("must be false in order to use defaults in the schema"));
    }
    versions(&spec.at("versions"), found);
    conversion(&spec.at("conversion"), found);
}

fn definition_names(list: &Place<'_>, found: &mut Findings) {
    for field in ["plural", "singular"] {
        list.at(field).check(found, names::dns_1035_label);
    }
    for field in ["kind", "listKind"] {
        let place = list.at(field);
        if place.require(found) {
            found.extend(
                names::dns_1035_label(&place.text().to_lowercase())
                    .into_iter()
                    .map(|message| place.invalid(format!("may have mixed case, but should otherwise match: {message}"))),
            );
        }
    }
    if !list.at("kind").is_empty() && list.at("kind").text() == list.at("listKind").text() {
        found.push(list.at("listKind").invalid("kind and listKind may not be the same"));
    }
    for field in ["shortNames", "categories"] {
        list.at(field).items().for_each(|word| word.check(found, names::dns_1035_label));
    }
}

fn versions(list: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for version in list.items() {
        let name = version.at("name");
        name.check(found, names::dns_1035_label);
        if !seen.insert(name.text()) {
            found.push(FieldError::invalid(list.path.clone(), list.value.clone(), "must contain unique version names"));
        }
        let schema = version.at("schema.openAPIV3Schema");
        if !schema.is_set() {
            found.push(version.at("schema").at("openAPIV3Schema").required("schemas are required"));
        } else {
            structural(&schema, true, found);
            if schema.at("type").text() != "object" {
                found.push(schema.at("type").invalid("must be object at the root"));
            }
        }
        for column in version.at("additionalPrinterColumns").items() {
            column.at("name").require(found);
            column.at("type").one_of(found, &["boolean", "date", "integer", "number", "string"]);
            json_path(&column.at("jsonPath"), found);
        }
        let scale = version.at("subresources.scale");
        if scale.is_set() {
            for (field, prefix) in [("specReplicasPath", ".spec."), ("statusReplicasPath", ".status.")] {
                let path = scale.at(field);
                if path.require(found) && !path.text().starts_with(prefix) {
                    found.push(path.invalid(format!("should be a json path under {}", prefix.trim_end_matches('.'))));
                }
            }
        }
    }
    let storage = list.items().filter(|version| version.at("storage").flag()).count();
    if storage != 1 {
        found.push(list.invalid("must have exactly one version marked as storage version"));
    }
}

fn json_path(path: &Place<'_>, found: &mut Findings) {
    if path.require(found)
        && let Err(error) = JsonPath::parse(path.text())
    {
        found.push(path.invalid(error));
    }
}

fn conversion(conversion: &Place<'_>, found: &mut Findings) {
    let strategy = conversion.at("strategy");
    strategy.one_of(found, &["None", "Webhook"]);
    let webhook = conversion.at("webhook");
    match strategy.text() {
        "Webhook" if !webhook.is_set() => found.push(webhook.required("required when strategy is set to Webhook")),
        "Webhook" => super::admission::client_config(&webhook.at("clientConfig"), found),
        _ if webhook.is_set() => found.push(webhook.forbidden("should not be set when strategy is not set to Webhook")),
        _ => {}
    }
}

const TYPES: &[&str] = &["array", "boolean", "integer", "number", "object", "string"];

/// A structural schema: every value has a type, outside of logical junctors.
fn structural(schema: &Place<'_>, is_root: bool, found: &mut Findings) {
    let free = schema.at("x-kubernetes-preserve-unknown-fields").flag() || schema.at("x-kubernetes-int-or-string").flag();
    let kind = schema.at("type");
    if kind.is_empty() {
        if !free || is_root {
            let detail = if is_root { "must not be empty at the root" } else { "must not be empty for specified object fields" };
            found.push(kind.required(detail));
        }
    } else if !TYPES.contains(&kind.text()) {
        found.push(kind.unsupported(TYPES));
    }
    for field in
        ["$ref", "definitions", "dependencies", "deprecated", "discriminator", "id", "patternProperties", "readOnly", "writeOnly", "xml"]
    {
        if schema.value.get(field).is_some_and(|value| !meta::is_empty(value)) {
            found.push(FieldError::forbidden(format!("{}.{field}", schema.path), "is not supported"));
        }
    }
    if schema.at("uniqueItems").flag() {
        found.push(schema.at("uniqueItems").forbidden("uniqueItems cannot be set to true since the runtime complexity becomes quadratic"));
    }
    let pattern = schema.at("pattern");
    if !pattern.is_empty()
        && let Err(error) = regex::Regex::new(pattern.text())
    {
        found.push(pattern.invalid(format!("must be a valid regular expression, but isn't: {error}")));
    }
    for (_, property) in schema.at("properties").entries() {
        structural(&property, false, found);
    }
    let extra = schema.at("additionalProperties");
    if extra.value.is_object() {
        structural(&extra, false, found);
        if !schema.at("properties").is_empty() {
            found.push(extra.forbidden("additionalProperties and properties are mutual exclusive"));
        }
    }
    let items = schema.at("items");
    if items.value.is_object() {
        structural(&items, false, found);
    } else if kind.text() == "array" {
        found.push(items.required("must be specified"));
    }
    list_type(schema, found);
}

fn list_type(schema: &Place<'_>, found: &mut Findings) {
    let (kind, keys) =
        (schema.value.get("x-kubernetes-list-type").and_then(Value::as_str), meta::items(schema.value, "x-kubernetes-list-map-keys"));
    let place = |field: &str| Place { value: schema.value.get(field).unwrap_or(&Value::Null), path: format!("{}.{field}", schema.path) };
    match kind {
        None => {}
        Some("atomic" | "set") => {}
        Some("map") if keys.is_empty() => {
            found.push(place("x-kubernetes-list-map-keys").required("must not be empty if x-kubernetes-list-type is map"))
        }
        Some("map") => {}
        Some(_) => found.push(place("x-kubernetes-list-type").unsupported(&["atomic", "map", "set"])),
    }
}

pub(super) fn update(root: &Place<'_>, old: &Value, found: &mut Findings) {
    for field in ["spec.group", "spec.scope", "spec.names.kind", "spec.names.plural"] {
        // Until names are accepted everything but the group may still change.
        let established = meta::items(old, "status.conditions")
            .iter()
            .any(|condition| condition["type"] == "Established" && condition["status"] == "True");
        if established || field == "spec.group" {
            root.at(field).immutable(found, meta::get(old, field));
        }
    }
    let names: Vec<&str> = meta::items(root.value, "spec.versions").iter().map(meta::name_field).collect();
    for stored in meta::items(old, "status.storedVersions").iter().filter_map(Value::as_str) {
        if !names.contains(&stored) {
            found.push(FieldError::invalid(
                "status.storedVersions[0]",
                stored,
                "missing from spec.versions; cannot be removed until all objects are migrated",
            ));
        }
    }
}
