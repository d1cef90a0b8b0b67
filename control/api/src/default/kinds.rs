//! Defaults of the other kinds that depend on other fields.
use serde_json::{Map, Value, json};

use super::{Fields, put, text};
use crate::meta::is_empty;

pub(super) fn service_spec(spec: &mut Fields) {
    if text(spec, "sessionAffinity").is_empty() {
        spec.insert("sessionAffinity".into(), "None".into());
    }
    match text(spec, "sessionAffinity") {
        "None" => drop(spec.shift_remove("sessionAffinityConfig")),
        "ClientIP" => {
            let timeout = spec.get("sessionAffinityConfig").map(|config| &config["clientIP"]["timeoutSeconds"]);
            if timeout.is_none_or(Value::is_null) {
                spec.insert("sessionAffinityConfig".into(), json!({"clientIP": {"timeoutSeconds": 10800}}));
            }
        }
        _ => {}
    }
    if text(spec, "type").is_empty() {
        spec.insert("type".into(), "ClusterIP".into());
    }
    for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        if port.get("targetPort").is_none_or(is_empty) {
            port["targetPort"] = port["port"].clone();
        }
    }
    let kind = text(spec, "type").to_string();
    if externally_accessible(spec) && text(spec, "externalTrafficPolicy").is_empty() {
        spec.insert("externalTrafficPolicy".into(), "Cluster".into());
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer" | "ClusterIP") {
        put(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        put(spec, "allocateLoadBalancerNodePorts", true);
    }
}

/// Reachable from outside the cluster: by node port, load balancer or external IPs.
fn externally_accessible(spec: &Fields) -> bool {
    let has_external_ips = spec.get("externalIPs").is_some_and(|ips| !is_empty(ips));
    match text(spec, "type") {
        "NodePort" | "LoadBalancer" => true,
        "ClusterIP" => has_external_ips,
        _ => false,
    }
}

pub(super) fn service(fields: &mut Fields) {
    put(fields, "spec", json!({}));
    if fields["spec"]["type"] != "LoadBalancer" {
        return;
    }
    let ingress = fields.get_mut("status").and_then(|status| status.get_mut("loadBalancer")?.get_mut("ingress")?.as_array_mut());
    for point in ingress.into_iter().flatten().filter_map(Value::as_object_mut) {
        if !text(point, "ip").is_empty() {
            put(point, "ipMode", "VIP");
        }
    }
}

pub(super) fn namespace(fields: &mut Fields) {
    let Some(metadata) = fields.get_mut("metadata") else { return };
    let name = metadata["name"].as_str().unwrap_or_default().to_string();
    if !name.is_empty() {
        crate::meta::child_mut(metadata, "labels").insert("kubernetes.io/metadata.name".into(), name.into());
    }
}

pub(super) fn node_status(fields: &mut Fields) {
    if let Some(capacity) = fields.get("capacity").cloned() {
        put(fields, "allocatable", capacity);
    }
}

/// For containers: default limits follow max, default requests follow default limits, then min.
pub(super) fn limit_range_item(fields: &mut Fields) {
    if text(fields, "type") != "Container" {
        return;
    }
    let list = |fields: &Fields, key: &str| fields.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
    let mut limits = list(fields, "default");
    let mut requests = list(fields, "defaultRequest");
    let fill = |target: &mut Map<String, Value>, source: &Map<String, Value>| {
        for (name, value) in source {
            target.entry(name.clone()).or_insert(value.clone());
        }
    };
    fill(&mut limits, &list(fields, "max"));
    fill(&mut requests, &limits);
    fill(&mut requests, &list(fields, "min"));
    for (key, list) in [("default", limits), ("defaultRequest", requests)] {
        if !list.is_empty() {
            fields.insert(key.into(), list.into());
        }
    }
}

/// Selector and labels follow the template's labels.
pub(super) fn replication_controller(fields: &mut Fields) {
    let labels = fields["spec"]["template"]["metadata"]["labels"].clone();
    if is_empty(&labels) {
        return;
    }
    if let Some(spec) = fields.get_mut("spec").and_then(Value::as_object_mut)
        && spec.get("selector").is_none_or(is_empty)
    {
        spec.insert("selector".into(), labels.clone());
    }
    labels_if_none(fields, labels);
}

fn labels_if_none(fields: &mut Fields, labels: Value) {
    let metadata = fields.entry("metadata").or_insert_with(|| json!({}));
    if metadata.get("labels").is_none_or(is_empty) {
        metadata["labels"] = labels;
    }
}

/// Deployments and daemon sets.
pub(super) fn rolling_update(fields: &mut Fields) {
    if text(fields, "type") == "RollingUpdate" {
        put(fields, "rollingUpdate", json!({}));
    }
}

/// A rolling update's parameters are made only where the type was not given either.
pub(super) fn stateful_set_strategy(fields: &mut Fields) {
    if text(fields, "type").is_empty() {
        fields.insert("type".into(), "RollingUpdate".into());
        put(fields, "rollingUpdate", json!({}));
    }
}

/// Claim templates say what they are.
pub(super) fn stateful_set_spec(spec: &mut Fields) {
    for claim in spec.get_mut("volumeClaimTemplates").and_then(Value::as_array_mut).into_iter().flatten() {
        crate::meta::set_type(claim, "v1", "PersistentVolumeClaim");
    }
}

pub(super) fn job(fields: &mut Fields) {
    let labels = fields.get("spec").map(|spec| spec["template"]["metadata"]["labels"].clone()).unwrap_or_default();
    let spec = crate::meta::map_mut(fields.entry("spec").or_insert_with(|| json!({})));
    let set = |spec: &Fields, key: &str| spec.get(key).is_some_and(|value| !value.is_null());
    if !set(spec, "completions") && !set(spec, "parallelism") {
        spec.insert("completions".into(), 1.into());
    }
    put(spec, "parallelism", 1);
    let limit = if set(spec, "backoffLimitPerIndex") { i32::MAX } else { 6 };
    put(spec, "backoffLimit", limit);
    put(spec, "completionMode", "NonIndexed");
    put(spec, "suspend", false);
    let replacement = if set(spec, "podFailurePolicy") { "Failed" } else { "TerminatingOrFailed" };
    put(spec, "podReplacementPolicy", replacement);
    put(spec, "manualSelector", false);
    if !is_empty(&labels) {
        labels_if_none(fields, labels);
    }
}

/// 80 % of CPU where no metric is named, and whole scaling rules where there is any behaviour.
pub(super) fn autoscaler(spec: &mut Fields) {
    if spec.get("metrics").is_none_or(is_empty) {
        let metric =
            json!([{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]);
        spec.insert("metrics".into(), metric);
    }
    let Some(behavior) = spec.get_mut("behavior").filter(|behavior| !behavior.is_null()) else { return };
    let up = crate::meta::child_mut(behavior, "scaleUp");
    put(up, "stabilizationWindowSeconds", 0);
    put(up, "selectPolicy", "Max");
    put(up, "policies", json!([{"type": "Pods", "value": 4, "periodSeconds": 15}, {"type": "Percent", "value": 100, "periodSeconds": 15}]));
    let down = crate::meta::child_mut(behavior, "scaleDown");
    put(down, "selectPolicy", "Max");
    put(down, "policies", json!([{"type": "Percent", "value": 100, "periodSeconds": 15}]));
}

pub(super) fn network_policy(spec: &mut Fields) {
    if spec.get("policyTypes").is_some_and(|kinds| !is_empty(kinds)) {
        return;
    }
    let has_egress = spec.get("egress").is_some_and(|rules| !is_empty(rules));
    spec.insert("policyTypes".into(), if has_egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) });
}

const RBAC: &str = "rbac.authorization.k8s.io";

pub(super) fn role_binding(fields: &mut Fields) {
    if let Some(reference) = fields.get_mut("roleRef").and_then(Value::as_object_mut)
        && text(reference, "apiGroup").is_empty()
    {
        reference.insert("apiGroup".into(), RBAC.into());
    }
}

pub(super) fn subject(fields: &mut Fields) {
    if text(fields, "apiGroup").is_empty() && matches!(text(fields, "kind"), "User" | "Group") {
        fields.insert("apiGroup".into(), RBAC.into());
    }
}

pub(super) fn device_request(fields: &mut Fields) {
    if text(fields, "allocationMode").is_empty() {
        fields.insert("allocationMode".into(), "ExactCount".into());
    }
    if text(fields, "allocationMode") == "ExactCount" && fields.get("count").is_none_or(is_empty) {
        fields.insert("count".into(), 1.into());
    }
}

pub(super) fn definition_names(fields: &mut Fields) {
    let kind = text(fields, "kind").to_string();
    if kind.is_empty() {
        return;
    }
    for (key, value) in [("singular", kind.to_lowercase()), ("listKind", format!("{kind}List"))] {
        if text(fields, key).is_empty() {
            fields.insert(key.into(), value.into());
        }
    }
}
