//! Validation of objects before they are stored: object metadata for every kind, and each kind's own rules.
mod access;
mod admission;
mod config;
mod containers;
mod definitions;
mod jobs;
mod metadata;
mod network;
mod place;
mod pod_update;
mod pods;
mod policies;
mod scheduling;
mod services;
mod storage;
mod volumes;
mod workloads;

use serde_json::Value;

use crate::field_error::FieldError;
use crate::resource::Resource;
use place::{Findings, Place};

/// Findings for a new object that is defaulted and prepared. Custom resources are checked against their schema too.
pub fn create(resource: &Resource, object: &Value) -> Vec<FieldError> {
    let mut found = Findings::new();
    if resource.strategy.create_only {
        reviews(resource, &Place::root(object), &mut found);
        return found;
    }
    metadata::create(resource, object, &mut found);
    kind(resource, object, &mut found);
    let root = Place::root(object);
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        ("", "Pod") => pods::create(&root, &mut found),
        ("batch", "Job") => jobs::create_job(&root, &mut found),
        ("batch", "CronJob") => jobs::create_cron_job(&root, &mut found),
        ("apps", "ControllerRevision") => workloads::create_revision(&root, &mut found),
        _ => {}
    }
    found
}

/// Findings for a changed object; `subresource` as in the URL (`status`, `scale`, …).
pub fn update(resource: &Resource, subresource: Option<&str>, new: &Value, old: &Value) -> Vec<FieldError> {
    let mut found = Findings::new();
    metadata::update(resource, new, old, &mut found);
    let root = Place::root(new);
    match (resource.group.as_ref(), resource.kind.as_ref(), subresource) {
        ("", "Pod", Some("status")) => pod_update::status(&root, old, &mut found),
        ("", "Pod", Some("ephemeralcontainers")) => pod_update::ephemeral_containers(&root, old, &mut found),
        // The binding itself was checked; it gives the pod its node, which no update of the pod may.
        ("", "Pod", Some("binding")) => {}
        ("", "Pod", Some("resize")) => pod_update::resize(&root, old, &mut found),
        (_, _, Some("status")) if resource.custom.is_none() => status(resource, &root, old, &mut found),
        ("", "Namespace", Some("finalize")) => config::namespace(&root, &mut found),
        _ if resource.custom.is_some() => custom_update(resource, new, old, &mut found),
        _ => {
            kind(resource, new, &mut found);
            changes(resource, &root, old, &mut found);
        }
    }
    found
}

/// What did not change is not held against a schema that became stricter since.
fn custom_update(resource: &Resource, new: &Value, old: &Value, found: &mut Findings) {
    if let Some(schema) = resource.custom.as_ref().and_then(|custom| custom.schema.as_ref()) {
        found.extend(crate::schema::validate_update(schema, new, old));
    }
}

/// Rules that hold for new and changed objects alike.
fn kind(resource: &Resource, object: &Value, found: &mut Findings) {
    if let Some(custom) = &resource.custom {
        if let Some(schema) = &custom.schema {
            found.extend(crate::schema::validate(schema, object));
        }
        return;
    }
    let root = Place::root(object);
    match resource.group.as_ref() {
        "" | "events.k8s.io" => core_kind(&resource.kind, &root, found),
        "apps" | "batch" => workload_kind(&resource.kind, &root, found),
        "rbac.authorization.k8s.io" => access::kind(&resource.kind, &root, found),
        "networking.k8s.io" | "discovery.k8s.io" => network::kind(&resource.kind, &root, found),
        "storage.k8s.io" => storage::class_kind(&resource.kind, &root, found),
        "apiextensions.k8s.io" => definitions::definition(&root, found),
        _ => policies::kind(resource, &root, found),
    }
}

fn core_kind(kind: &str, root: &Place<'_>, found: &mut Findings) {
    match kind {
        "Pod" => pods::pod(root, found),
        "PodTemplate" => pods::template(&root.at("template"), found),
        "ReplicationController" => workloads::replication_controller(root, found),
        "Service" => services::service(root, found),
        "Endpoints" => services::endpoints(root, found),
        "ConfigMap" => config::config_map(root, found),
        "Secret" => config::secret(root, found),
        "Namespace" => config::namespace(root, found),
        "Node" => config::node(root, found),
        "LimitRange" => config::limit_range(root, found),
        "ResourceQuota" => config::resource_quota(root, found),
        "PersistentVolume" => storage::volume(root, found),
        "PersistentVolumeClaim" => storage::claim(&root.at("spec"), found),
        "Event" => config::event(root, found),
        _ => {}
    }
}

fn workload_kind(kind: &str, root: &Place<'_>, found: &mut Findings) {
    match kind {
        "Deployment" => workloads::deployment(root, found),
        "ReplicaSet" => workloads::replica_set(root, found),
        "DaemonSet" => workloads::daemon_set(root, found),
        "StatefulSet" => workloads::stateful_set(root, found),
        "ControllerRevision" => root.at("revision").non_negative(found),
        "Job" => jobs::job(root, found),
        "CronJob" => jobs::cron_job(root, found),
        _ => {}
    }
}

/// What must not change.
fn changes(resource: &Resource, root: &Place<'_>, old: &Value, found: &mut Findings) {
    let same_as_old = |path: &str, found: &mut Findings| root.at(path).immutable(found, crate::meta::get(old, path));
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        ("", "Pod") => pod_update::pod(root, old, found),
        ("", "Service") => services::update(root, old, found),
        ("", "ConfigMap" | "Secret") => config::update_data(root, old, found),
        ("", "Node") => config::update_node(root, old, found),
        ("", "ResourceQuota") => same_as_old("spec.scopes", found),
        ("", "PersistentVolume") => storage::update_volume(root, old, found),
        ("", "PersistentVolumeClaim") => storage::update_claim(root, old, found),
        ("apps", "Deployment" | "ReplicaSet" | "DaemonSet") => same_as_old("spec.selector", found),
        ("apps", "StatefulSet") => workloads::update_stateful_set(root, old, found),
        ("apps", "ControllerRevision") => same_as_old("data", found),
        ("batch", "Job") => jobs::update_job(root, old, found),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => access::update_binding(root, old, found),
        ("storage.k8s.io", _) => storage::update_class(&resource.kind, root, old, found),
        ("scheduling.k8s.io", "PriorityClass") => policies::update_priority_class(root, old, found),
        ("discovery.k8s.io", "EndpointSlice") => same_as_old("addressType", found),
        ("networking.k8s.io", "IngressClass") => same_as_old("spec.controller", found),
        ("networking.k8s.io", "IPAddress") => same_as_old("spec.parentRef", found),
        ("node.k8s.io", "RuntimeClass") => same_as_old("handler", found),
        ("apiextensions.k8s.io", _) => definitions::update(root, old, found),
        _ => {}
    }
}

/// Rules for the status of the kinds that have any.
fn status(resource: &Resource, root: &Place<'_>, old: &Value, found: &mut Findings) {
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        ("", "Namespace") => config::namespace_status(root, found),
        ("", "ReplicationController") | ("apps", "Deployment" | "ReplicaSet" | "StatefulSet") => {
            workloads::status(&root.at("status"), found)
        }
        ("apps", "DaemonSet") | ("policy", "PodDisruptionBudget") | ("autoscaling", _) => {
            root.at("status").entries().filter(|(_, count)| count.integer().is_some()).for_each(|(key, _)| {
                root.at("status").at(key).non_negative(found);
            });
        }
        ("batch", "Job") => jobs::job_status(root, old, found),
        _ => {}
    }
}

/// Objects that are answered and not stored.
fn reviews(resource: &Resource, root: &Place<'_>, found: &mut Findings) {
    match resource.kind.as_ref() {
        "SubjectAccessReview" | "SelfSubjectAccessReview" | "LocalSubjectAccessReview" => {
            access::access_review(&resource.kind, root, found)
        }
        "Binding" => pods::binding(root, found),
        _ => {}
    }
}

/// Findings for the `binding` subresource of pods.
pub fn binding(object: &Value) -> Vec<FieldError> {
    let mut found = Findings::new();
    pods::binding(&Place::root(object), &mut found);
    found
}

/// Findings for `metav1.DeleteOptions`.
pub fn delete_options(options: &Value) -> Vec<FieldError> {
    metadata::delete_options(&Place::root(options))
}

#[cfg(test)]
mod tests;
