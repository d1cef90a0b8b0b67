//! Object metadata, label selectors and other parts that many kinds share.
use serde_json::Value;

use super::place::{Findings, Place};
use crate::field_error::FieldError;
use crate::meta;
use crate::names;
use crate::resource::{NameRule, Resource};

const MAX_ANNOTATION_BYTES: usize = 256 * 1024;

pub(super) fn create(resource: &Resource, object: &Value, found: &mut Findings) {
    let metadata = Place::root(object).at("metadata");
    let check = name_check(resource);
    let generated = metadata.at("generateName");
    if !generated.is_empty() {
        // A prefix may end in a dash: the server appends letters.
        let prefix = generated.text().strip_suffix('-').map_or(generated.text().to_string(), |rest| format!("{rest}a"));
        found.extend(check(&prefix).into_iter().map(|message| generated.invalid(message)));
    }
    let name = metadata.at("name");
    if name.is_empty() {
        found.push(name.required("name or generateName is required"));
    } else {
        name.check(found, check);
    }
    namespace(resource, &metadata.at("namespace"), found);
    metadata.at("generation").non_negative(found);
    common(&metadata, found);
    finalizers(&metadata.at("finalizers"), found);
    standard_finalizers(resource, &metadata.at("finalizers"), found);
}

fn name_check(resource: &Resource) -> fn(&str) -> Vec<String> {
    match resource.strategy.name_rule {
        NameRule::Subdomain => names::dns_subdomain,
        NameRule::Label => names::dns_label,
        NameRule::ServiceName => names::dns_1035_label,
        NameRule::PathSegment | NameRule::ApiService => names::path_segment,
        NameRule::IpAddress => ip_address,
    }
}

/// One spelling per address, since the name is the key.
fn ip_address(text: &str) -> Vec<String> {
    match text.parse::<std::net::IpAddr>() {
        Ok(address) if address.to_string() == text => Vec::new(),
        Ok(address) => vec![format!("must be in canonical form (\"{address}\")")],
        Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_string()],
    }
}

fn namespace(resource: &Resource, namespace: &Place<'_>, found: &mut Findings) {
    match (resource.namespaced, namespace.is_empty()) {
        (true, true) => found.push(namespace.required("")),
        (true, false) => namespace.check(found, names::dns_label),
        (false, false) => found.push(namespace.forbidden("not allowed on this type")),
        (false, true) => {}
    }
}

fn common(metadata: &Place<'_>, found: &mut Findings) {
    labels(&metadata.at("labels"), found);
    annotations(&metadata.at("annotations"), found);
    owners(&metadata.at("ownerReferences"), found);
    for entry in metadata.at("managedFields").items() {
        let (operation, kind) = (entry.at("operation"), entry.at("fieldsType"));
        if !matches!(operation.text(), "Apply" | "Update") {
            found.push(operation.invalid("must be `Apply` or `Update`"));
        }
        if !kind.is_empty() && kind.text() != "FieldsV1" {
            found.push(kind.invalid("must be `FieldsV1`"));
        }
    }
}

/// A map of labels.
pub(super) fn labels(map: &Place<'_>, found: &mut Findings) {
    for (key, entry) in map.entries() {
        label_key(&map.path, key, found);
        found.extend(
            names::label_value(entry.text()).into_iter().map(|message| FieldError::invalid(map.path.clone(), entry.value.clone(), message)),
        );
    }
}

fn label_key(path: &str, key: &str, found: &mut Findings) {
    found.extend(names::qualified_name(key).into_iter().map(|message| FieldError::invalid(path, key, message)));
}

/// A map of annotations: keys in any case, 256 KiB in all.
pub(super) fn annotations(map: &Place<'_>, found: &mut Findings) {
    let mut size = 0;
    for (key, entry) in map.entries() {
        found.extend(
            names::qualified_name(&key.to_lowercase()).into_iter().map(|message| FieldError::invalid(map.path.clone(), key, message)),
        );
        size += key.len() + entry.text().len();
    }
    if size > MAX_ANNOTATION_BYTES {
        found.push(FieldError::too_long(map.path.clone(), MAX_ANNOTATION_BYTES));
    }
}

fn owners(list: &Place<'_>, found: &mut Findings) {
    let mut controller = String::new();
    for owner in list.items() {
        let (_, version) = crate::resource::split_api_version(meta::api_version(owner.value));
        for (field, empty, detail) in [
            ("apiVersion", version.is_empty(), "version must not be empty"),
            ("kind", owner.at("kind").is_empty(), "must not be empty"),
            ("name", owner.at("name").is_empty(), "must not be empty"),
            ("uid", owner.at("uid").is_empty(), "must not be empty"),
        ] {
            if empty {
                found.push(FieldError::invalid(format!("{}.{field}", list.path), owner.at(field).text(), detail));
            }
        }
        if meta::api_version(owner.value) == "v1" && meta::kind(owner.value) == "Event" {
            found.push(owner.named(&list.path).invalid("/v1, Kind=Event is disallowed from being an owner"));
        }
        if owner.at("controller").flag() {
            let this = format!("{}/{}", meta::kind(owner.value), owner.at("name").text());
            if controller.is_empty() {
                controller = this;
            } else {
                found.push(list.invalid(format!(
                    "Only one reference can have Controller set to true. Found \"true\" in references for {controller} and {this}"
                )));
            }
        }
    }
}

fn finalizers(list: &Place<'_>, found: &mut Findings) {
    for finalizer in list.items() {
        finalizer.named(&list.path).check(found, names::qualified_name);
    }
    let has = |name: &str| list.items().any(|finalizer| finalizer.text() == name);
    if has("orphan") && has("foregroundDeletion") {
        found.push(list.invalid("finalizer orphan and foregroundDeletion cannot be both set"));
    }
}

pub(super) fn update(resource: &Resource, new: &Value, old: &Value, found: &mut Findings) {
    let metadata = Place::root(new).at("metadata");
    if meta::is_deleting(old) {
        let before: Vec<&str> = meta::finalizers(old).collect();
        let added: Vec<&str> = meta::finalizers(new).filter(|name| !before.contains(name)).collect();
        if !added.is_empty() {
            let quoted: Vec<String> = added.iter().map(|name| format!("{name:?}")).collect();
            let detail = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                quoted.join(", ")
            );
            found.push(metadata.at("finalizers").forbidden(detail));
        }
    }
    for field in ["name", "namespace", "uid", "creationTimestamp"] {
        metadata.at(field).immutable(found, meta::get(old, &format!("metadata.{field}")));
    }
    common(&metadata, found);
    standard_finalizers(resource, &metadata.at("finalizers"), found);
}

/// Built-in kinds allow names without a domain only where Kubernetes itself gave them.
fn standard_finalizers(resource: &Resource, list: &Place<'_>, found: &mut Findings) {
    for finalizer in list.items().filter(|_| resource.custom.is_none()) {
        if !finalizer.text().contains('/') && !matches!(finalizer.text(), "kubernetes" | "orphan" | "foregroundDeletion") {
            found.push(finalizer.invalid("name is neither a standard finalizer name nor is it fully qualified"));
        }
    }
}

/// A `metav1.LabelSelector`.
pub(super) fn label_selector(selector: &Place<'_>, found: &mut Findings) {
    labels(&selector.at("matchLabels"), found);
    for expression in selector.at("matchExpressions").items() {
        let values = expression.at("values");
        match expression.at("operator").text() {
            "In" | "NotIn" if values.is_empty() => found.push(values.required("must be specified when `operator` is 'In' or 'NotIn'")),
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                found.push(values.forbidden("may not be specified when `operator` is 'Exists' or 'DoesNotExist'"));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => found.push(expression.at("operator").invalid("not a valid selector operator")),
        }
        expression.at("key").check(found, names::qualified_name);
        for value in values.items() {
            value.check(found, names::label_value);
        }
    }
}

pub(super) fn delete_options(options: &Place<'_>) -> Findings {
    let mut found = Findings::new();
    let policy = options.at("propagationPolicy");
    if policy.is_set() {
        if options.at("orphanDependents").is_set() {
            found.push(policy.invalid("orphanDependents and deletionPropagation cannot be both set"));
        }
        policy.one_of_if_set(&mut found, &["Foreground", "Background", "Orphan", "nil"]);
    }
    for entry in options.at("dryRun").items() {
        if entry.text() != "All" {
            found.push(options.at("dryRun").unsupported(&["All"]));
        }
    }
    found
}

/// A quantity that must not be negative.
pub(super) fn non_negative_quantity(place: &Place<'_>, found: &mut Findings) {
    if crate::quantity::Quantity::of(place.value).is_negative() {
        found.push(place.invalid("must be greater than or equal to 0"));
    }
}
