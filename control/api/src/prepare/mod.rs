//! The registry strategies: what the server sets, keeps and drops on create and update.
mod kinds;
mod pods;
mod services;

use jiff::Timestamp;
use serde_json::{Value, json};

pub use pods::qos_class;

use crate::meta::{self, same};
use crate::resource::Resource;

/// After [`crate::meta::stamp_new`] and defaulting, before validation: resets status, sets generation and the kind's own server-side fields.
pub fn create(resource: &Resource, object: &mut Value, now: Timestamp) {
    if resource.strategy.create_only {
        return;
    }
    if resource.strategy.has_status && !keeps_status_on_create(resource) {
        reset_status(resource, object);
    }
    if resource.strategy.has_generation || resource.custom.is_some() {
        meta::set(object, "metadata.generation", 1);
    }
    if resource.custom.is_some() {
        return;
    }
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        ("", "Pod") => pods::create(object),
        ("", "Node") => kinds::node(object),
        ("", "Namespace") => kinds::create_namespace(object),
        ("", "Secret") => kinds::secret(object),
        ("", "Service") => services::create(object),
        ("", "PersistentVolume") => {
            meta::set(object, "status", json!({"phase": "Pending", "lastPhaseTransitionTime": crate::time::format(now)}))
        }
        ("", "PersistentVolumeClaim") => kinds::create_claim(object),
        ("batch", "Job") => kinds::create_job(object),
        ("apps", "DaemonSet") => kinds::set_template_generation(object, 1),
        ("apiextensions.k8s.io", _) => kinds::stored_versions(object),
        ("apiregistration.k8s.io", _) => kinds::create_api_service(object, now),
        ("certificates.k8s.io", "CertificateSigningRequest") => kinds::drop_requester(object),
        _ => {}
    }
    if let Some(spec) = pods::template_spec_mut(resource, object) {
        pods::mirror_service_account(spec);
    }
}

/// Kubelets create their Node with a status.
fn keeps_status_on_create(resource: &Resource) -> bool {
    resource.is("", "Node")
}

/// Custom resources lose their status; built-in ones have an empty one, since upstream's struct is no pointer.
fn reset_status(resource: &Resource, object: &mut Value) {
    if resource.custom.is_some() {
        meta::remove(object, "status");
    } else {
        meta::set(object, "status", crate::decode::zero_status(resource));
    }
}

/// Before validation: carries over what the request may not change (uid, creationTimestamp, deletion, generation; status, or all but
/// status for the `status` subresource), and bumps the generation when the spec changed.
pub fn update(resource: &Resource, subresource: Option<&str>, new: &mut Value, old: &Value, now: Timestamp) {
    carry_metadata(new, old);
    match subresource {
        None => update_main(resource, new, old),
        Some("status") => update_status(resource, new, old, now),
        Some("approval") => keep_all_but(new, old, "status.conditions"),
        Some("finalize") => keep_field(new, old, "status"),
        Some("ephemeralcontainers") => {
            reset_metadata(new, old);
            keep_all_but(new, old, "spec.ephemeralContainers");
        }
        Some("resize") => {
            reset_metadata(new, old);
            pods::keep_all_but_resources(new, old);
        }
        Some(_) => {}
    }
    // Where a pod runs is no wish of its author's.
    if !matches!(subresource, Some("status" | "binding")) && changes_generation(resource, new, old) {
        meta::set(new, "metadata.generation", meta::generation(old) + 1);
    }
}

/// What no request may change. A uid and a creation time that differ are left for validation to refuse.
fn carry_metadata(new: &mut Value, old: &Value) {
    for key in ["generation", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"] {
        keep_field(new, old, &format!("metadata.{key}"));
    }
    for key in ["uid", "creationTimestamp", "name", "namespace"] {
        let path = format!("metadata.{key}");
        if meta::text(new, &path).is_empty() {
            keep_field(new, old, &path);
        }
    }
}

/// Takes the field at a dotted path from the old object, absence included.
fn keep_field(new: &mut Value, old: &Value, path: &str) {
    match meta::get(old, path) {
        Value::Null => drop(meta::remove(new, path)),
        value => meta::set(new, path, value.clone()),
    }
}

/// Takes everything but metadata and the field at the path from the old object.
fn keep_all_but(new: &mut Value, old: &Value, path: &str) {
    let wanted = meta::get(new, path).clone();
    let metadata = new["metadata"].take();
    *new = old.clone();
    new["metadata"] = metadata;
    match wanted {
        Value::Null => drop(meta::remove(new, path)),
        wanted => meta::set(new, path, wanted),
    }
}

/// Subresources that change no metadata.
fn reset_metadata(new: &mut Value, old: &Value) {
    for key in ["labels", "annotations", "finalizers", "ownerReferences"] {
        keep_field(new, old, &format!("metadata.{key}"));
    }
}

fn update_main(resource: &Resource, new: &mut Value, old: &Value) {
    if resource.strategy.has_status {
        keep_field(new, old, "status");
    }
    if resource.custom.is_some() {
        return;
    }
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        ("", "Namespace") => keep_field(new, old, "spec.finalizers"),
        ("", "Node") => kinds::node(new),
        ("", "Secret") => {
            if meta::text(new, "type").is_empty() {
                keep_field(new, old, "type");
            }
            kinds::secret(new);
        }
        ("", "Service") => services::update(new, old),
        ("", "PersistentVolumeClaim") => kinds::mirror_data_source(new),
        ("apps", "DaemonSet") => kinds::update_template_generation(new, old),
        ("apiextensions.k8s.io", _) => kinds::stored_versions(new),
        ("certificates.k8s.io", "CertificateSigningRequest") => keep_field(new, old, "spec"),
        _ => {}
    }
    if let Some(spec) = pods::template_spec_mut(resource, new) {
        pods::mirror_service_account(spec);
    }
}

fn update_status(resource: &Resource, new: &mut Value, old: &Value, now: Timestamp) {
    keep_all_but(new, old, "status");
    if resource.custom.is_some() {
        let managed = meta::get(new, "metadata.managedFields").clone();
        let version = meta::resource_version(new).to_string();
        new["metadata"] = old["metadata"].clone();
        meta::set_resource_version(new, &version);
        if !managed.is_null() {
            meta::set(new, "metadata.managedFields", managed);
        }
        return;
    }
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        ("", "Pod") => {
            keep_field(new, old, "metadata.ownerReferences");
            pods::update_status(new, old);
        }
        ("", "PersistentVolume") => kinds::phase_transition(new, old, now),
        ("apps", "Deployment") => keep_field(new, old, "metadata.labels"),
        ("apiextensions.k8s.io" | "apiregistration.k8s.io" | "resource.k8s.io", _)
        | ("storage.k8s.io", "VolumeAttachment")
        | ("networking.k8s.io", "ServiceCIDR") => reset_metadata(new, old),
        _ => {}
    }
}

/// Whether anything that counts as specification changed.
fn changes_generation(resource: &Resource, new: &Value, old: &Value) -> bool {
    let keeps_status_apart = resource.strategy.has_status;
    if !resource.strategy.has_generation && resource.custom.is_none() {
        return false;
    }
    let differs = |key: &str| !same(&new[key], &old[key]);
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        _ if resource.custom.is_some() => other_fields(new, old).any(|key| !(keeps_status_apart && key == "status") && differs(key)),
        ("apps", "Deployment") => differs("spec") || !same(meta::get(new, "metadata.annotations"), meta::get(old, "metadata.annotations")),
        ("discovery.k8s.io", _) => {
            !same(meta::get(new, "metadata.labels"), meta::get(old, "metadata.labels")) || other_fields(new, old).any(differs)
        }
        _ => other_fields(new, old).any(|key| key != "status" && differs(key)),
    }
}

/// The top-level fields of either object, but metadata, kind and version.
fn other_fields<'a>(new: &'a Value, old: &'a Value) -> impl Iterator<Item = &'a str> {
    let keys = |value: &'a Value| value.as_object().into_iter().flat_map(|map| map.keys());
    keys(new).chain(keys(old)).map(String::as_str).filter(|key| !matches!(*key, "metadata" | "kind" | "apiVersion"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(group: &str, kind: &str) -> &'static Resource {
        crate::builtin::by_kind(group, "v1", kind).expect("built in")
    }

    fn created(group: &str, kind: &str, mut object: Value) -> Value {
        let resource = resource(group, kind);
        crate::default::apply(resource, &mut object);
        create(resource, &mut object, Timestamp::UNIX_EPOCH);
        object
    }

    fn updated(group: &str, kind: &str, subresource: Option<&str>, mut new: Value, old: &Value) -> Value {
        update(resource(group, kind), subresource, &mut new, old, Timestamp::UNIX_EPOCH);
        new
    }

    #[test]
    fn creation_resets_what_the_server_owns() {
        for (group, kind, object, path, expected) in [
            ("apps", "Deployment", json!({"metadata": {"generation": 9}, "status": {"replicas": 3}}), "status", json!({})),
            ("apps", "Deployment", json!({"metadata": {"generation": 9}}), "metadata.generation", json!(1)),
            (
                "",
                "Pod",
                json!({"spec": {"containers": [{"name": "a"}]}, "status": {"phase": "Running"}}),
                "status",
                json!({"phase": "Pending", "qosClass": "BestEffort"}),
            ),
            ("", "Namespace", json!({"metadata": {"name": "a"}}), "spec.finalizers", json!(["kubernetes"])),
            ("", "Namespace", json!({"metadata": {"name": "a"}}), "status.phase", json!("Active")),
            ("", "Secret", json!({"stringData": {"a": "b"}, "data": {"c": "ZA=="}}), "data", json!({"c": "ZA==", "a": "Yg=="})),
            ("", "PersistentVolumeClaim", json!({"status": {"phase": "Bound"}}), "status.phase", json!("Pending")),
            ("", "Node", json!({"status": {"capacity": {"cpu": "1"}}}), "status.allocatable", json!({"cpu": "1"})),
            ("", "Service", json!({"spec": {"clusterIP": "None"}}), "spec.clusterIPs", json!(["None"])),
            (
                "apiextensions.k8s.io",
                "CustomResourceDefinition",
                json!({"spec": {"versions": [{"name": "v1", "storage": true}]}}),
                "status.storedVersions",
                json!(["v1"]),
            ),
        ] {
            let object = created(group, kind, object);
            assert_eq!(meta::get(&object, path), &expected, "{kind} {path}");
        }
    }

    #[test]
    fn jobs_get_their_selector() {
        let job = created("batch", "Job", json!({"metadata": {"name": "j", "uid": "u"}, "spec": {"template": {"spec": {}}}}));
        assert_eq!(job["spec"]["selector"], json!({"matchLabels": {"batch.kubernetes.io/controller-uid": "u"}}));
        let labels =
            json!({"job-name": "j", "batch.kubernetes.io/job-name": "j", "controller-uid": "u", "batch.kubernetes.io/controller-uid": "u"});
        assert_eq!(job["spec"]["template"]["metadata"]["labels"], labels);
    }

    #[test]
    fn updates_keep_status_and_bump_generation() {
        let old = json!({"metadata": {"name": "a", "uid": "u", "generation": 2, "creationTimestamp": "t"}, "spec": {"replicas": 1}, "status": {"replicas": 1}});
        let new = json!({"metadata": {"name": "a", "generation": 7}, "spec": {"replicas": 2}, "status": {"replicas": 9}});
        let result = updated("apps", "ReplicaSet", None, new.clone(), &old);
        assert_eq!(result["metadata"], json!({"name": "a", "generation": 3, "uid": "u", "creationTimestamp": "t"}));
        assert_eq!((&result["spec"], &result["status"]), (&new["spec"], &old["status"]));
        let status = updated("apps", "ReplicaSet", Some("status"), new, &old);
        assert_eq!((&status["spec"], &status["status"]), (&old["spec"], &json!({"replicas": 9})));
        assert_eq!(status["metadata"]["generation"], 2);
        let touched = updated("apps", "Deployment", None, json!({"metadata": {"annotations": {"a": "b"}}, "spec": {"replicas": 1}}), &old);
        assert_eq!(touched["metadata"]["generation"], 3, "annotations count for deployments");
    }

    #[test]
    fn subresources_change_their_part_alone() {
        let old = json!({"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "1"}]}, "status": {"phase": "Running", "qosClass": "Burstable"}});
        let new = json!({"metadata": {"name": "a", "labels": {"x": "y"}}, "spec": {"containers": [{"name": "c", "image": "2", "resources": {"limits": {"cpu": "1"}}}],
            "ephemeralContainers": [{"name": "e"}]}, "status": {"phase": "Failed", "podIP": "10.0.0.1"}});
        let debugged = updated("", "Pod", Some("ephemeralcontainers"), new.clone(), &old);
        assert_eq!(debugged["spec"], json!({"containers": [{"name": "c", "image": "1"}], "ephemeralContainers": [{"name": "e"}]}));
        let resized = updated("", "Pod", Some("resize"), new.clone(), &old);
        assert_eq!(resized["spec"], json!({"containers": [{"name": "c", "image": "1", "resources": {"limits": {"cpu": "1"}}}]}));
        let status = updated("", "Pod", Some("status"), new, &old);
        assert_eq!(
            status["status"],
            json!({"phase": "Failed", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}], "qosClass": "Burstable"})
        );
        assert_eq!(status["spec"], old["spec"]);
    }

    #[test]
    fn a_binding_is_no_change_of_the_specification() {
        let old = json!({"metadata": {"name": "a", "generation": 1}, "spec": {"containers": []}});
        let mut new = old.clone();
        meta::set(&mut new, "spec.nodeName", "n");
        for (subresource, generation) in [(Some("binding"), 1), (Some("resize"), 1), (None, 2)] {
            let result = updated("", "Pod", subresource, new.clone(), &old);
            assert_eq!(meta::generation(&result), generation, "{subresource:?}");
        }
    }
}
