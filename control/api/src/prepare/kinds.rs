//! The other kinds' own server-side fields.
use jiff::Timestamp;
use serde_json::{Value, json};

use super::pods::mirror;
use crate::meta::{self, same};

/// `podCIDR` is the first of `podCIDRs`.
pub(super) fn node(object: &mut Value) {
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        mirror(spec, "podCIDR", "podCIDRs", Value::clone, Value::clone);
    }
}

pub(super) fn create_namespace(object: &mut Value) {
    object["status"] = json!({"phase": "Active"});
    let spec = meta::child_mut(object, "spec");
    match spec.get_mut("finalizers").and_then(Value::as_array_mut) {
        Some(finalizers) if finalizers.iter().any(|name| name == "kubernetes") => {}
        Some(finalizers) => finalizers.push("kubernetes".into()),
        None => drop(spec.insert("finalizers".into(), json!(["kubernetes"]))),
    }
}

/// `stringData` is written only: it becomes `data`.
pub(super) fn secret(object: &mut Value) {
    use base64::Engine as _;
    let Some(Value::Object(plain)) = meta::remove(object, "stringData") else { return };
    let data = meta::child_mut(object, "data");
    for (key, value) in plain {
        let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
        data.insert(key, encoded.into());
    }
}

pub(super) fn create_claim(object: &mut Value) {
    object["status"] = json!({"phase": "Pending"});
    mirror_data_source(object);
}

/// `dataSource` and `dataSourceRef` name the same thing, unless it lies in another namespace.
pub(super) fn mirror_data_source(object: &mut Value) {
    let source = meta::get(object, "spec.dataSource").clone();
    let reference = meta::get(object, "spec.dataSourceRef").clone();
    if !source.is_null() && reference.is_null() {
        meta::set(object, "spec.dataSourceRef", source);
    } else if source.is_null() && !reference.is_null() && meta::text(&reference, "namespace").is_empty() {
        meta::set(object, "spec.dataSource", reference);
    }
}

/// Without `manualSelector`, a job selects by its uid; the template carries it and the job's name, in new and old spelling.
pub(super) fn create_job(object: &mut Value) {
    if meta::get(object, "spec.manualSelector") == &Value::Bool(true) {
        return;
    }
    let (name, uid) = (meta::name(object).to_string(), meta::uid(object).to_string());
    let spec = meta::child_mut(object, "spec");
    let template = spec.entry("template").or_insert_with(|| json!({}));
    let labels = meta::child_mut(meta::map_mut(template).entry("metadata").or_insert_with(|| json!({})), "labels");
    for (key, value) in [
        ("job-name", &name),
        ("batch.kubernetes.io/job-name", &name),
        ("controller-uid", &uid),
        ("batch.kubernetes.io/controller-uid", &uid),
    ] {
        labels.entry(key).or_insert_with(|| value.clone().into());
    }
    let selector = spec.entry("selector").or_insert_with(|| json!({}));
    meta::child_mut(selector, "matchLabels").entry("batch.kubernetes.io/controller-uid").or_insert_with(|| uid.into());
}

const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

pub(super) fn set_template_generation(object: &mut Value, generation: i64) {
    let annotations = meta::child_mut(meta::map_mut(object).entry("metadata").or_insert_with(|| json!({})), "annotations");
    annotations.insert(TEMPLATE_GENERATION.into(), generation.to_string().into());
}

pub(super) fn update_template_generation(new: &mut Value, old: &Value) {
    let before: i64 = meta::annotation(old, TEMPLATE_GENERATION).and_then(|text| text.parse().ok()).unwrap_or(1);
    let changed = !same(meta::get(new, "spec.template"), meta::get(old, "spec.template"));
    set_template_generation(new, before + i64::from(changed));
}

/// The storage version joins `status.storedVersions`.
pub(super) fn stored_versions(object: &mut Value) {
    let storage =
        meta::items(object, "spec.versions").iter().find(|version| version["storage"] == true).map(|version| version["name"].clone());
    let Some(name) = storage else { return };
    let mut stored = meta::items(object, "status.storedVersions").to_vec();
    if !stored.contains(&name) {
        stored.push(name);
    }
    meta::set(object, "status.storedVersions", stored);
}

/// Services of the server itself are available at once.
pub(super) fn create_api_service(object: &mut Value, now: Timestamp) {
    if meta::get(object, "spec.service").is_null() {
        object["status"] = json!({"conditions": [{"type": "Available", "status": "True", "reason": "Local",
            "message": "Local APIServices are always available", "lastTransitionTime": crate::time::format(now)}]});
    }
}

/// Who asks is told by the server: the caller fills these in after.
pub(super) fn drop_requester(object: &mut Value) {
    for key in ["username", "uid", "groups", "extra"] {
        meta::remove(object, &format!("spec.{key}"));
    }
}

pub(super) fn phase_transition(new: &mut Value, old: &Value, now: Timestamp) {
    let time = "status.lastPhaseTransitionTime";
    if meta::text(new, "status.phase") == meta::text(old, "status.phase") {
        if meta::get(new, time).is_null() {
            super::keep_field(new, old, time);
        }
    } else if meta::get(new, time).is_null() || meta::get(new, time) == meta::get(old, time) {
        meta::set(new, time, crate::time::format(now));
    }
}
