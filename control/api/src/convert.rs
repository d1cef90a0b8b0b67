//! Versions of one kind: from and to the stored one.
use serde_json::{Map, Value, json};

use crate::meta;
use crate::resource::{Resource, api_version};

/// The annotation that keeps what autoscaling/v1 has no field for; not stored.
const HPA_METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";

/// Turns an object of `resource`'s version into the stored version, `apiVersion` and `kind` included.
pub fn to_storage(resource: &Resource, object: &mut Value) {
    match (resource.group.as_ref(), resource.version.as_ref(), resource.kind.as_ref()) {
        ("autoscaling", "v1", "HorizontalPodAutoscaler") => {
            autoscaler_to_v2(object);
            crate::default::apply_as("autoscaling", "v2", "HorizontalPodAutoscaler", object);
        }
        ("events.k8s.io", "v1", "Event") => event_to_core(object),
        _ => {}
    }
    meta::set_type(object, &api_version(&resource.storage.group, &resource.storage.version), &resource.storage.kind);
}

/// Turns a stored object into `resource`'s version. Custom resources with a webhook are the caller's business.
pub fn to_version(resource: &Resource, object: &mut Value) {
    match (resource.group.as_ref(), resource.version.as_ref(), resource.kind.as_ref()) {
        ("autoscaling", "v1", "HorizontalPodAutoscaler") => autoscaler_to_v1(object),
        ("events.k8s.io", "v1", "Event") => event_to_events(object),
        _ => {}
    }
    meta::set_type(object, &resource.api_version(), &resource.kind);
}

/// Whether the stored bytes can be served as they are.
pub fn is_identity(resource: &Resource) -> bool {
    resource.group == resource.storage.group && resource.version == resource.storage.version
}

fn rename(map: &mut Map<String, Value>, from: &str, to: &str) {
    if let Some(value) = map.shift_remove(from) {
        map.insert(to.to_string(), value);
    }
}

/// (core/v1, events.k8s.io/v1)
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

fn event_to_core(object: &mut Value) {
    let map = meta::map_mut(object);
    for (core, events) in EVENT_FIELDS {
        rename(map, events, core);
    }
}

fn event_to_events(object: &mut Value) {
    let map = meta::map_mut(object);
    for (core, events) in EVENT_FIELDS {
        rename(map, core, events);
    }
}

fn autoscaler_to_v2(object: &mut Value) {
    let kept = object.get_mut("metadata").and_then(|metadata| metadata.get_mut("annotations")?.as_object_mut()?.shift_remove(HPA_METRICS));
    let mut metrics: Vec<Value> = kept.and_then(|text| serde_json::from_str(text.as_str()?).ok()).unwrap_or_default();
    if let Some(utilization) = meta::remove(object, "spec.targetCPUUtilizationPercentage").filter(|value| !value.is_null()) {
        metrics.insert(
            0,
            json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": utilization}}}),
        );
    }
    if !metrics.is_empty() {
        meta::set(object, "spec.metrics", metrics);
    }
    if let Some(current) = meta::remove(object, "status.currentCPUUtilizationPercentage").filter(|value| !value.is_null()) {
        let metric = json!([{"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": current}}}]);
        meta::set(object, "status.currentMetrics", metric);
    }
}

fn autoscaler_to_v1(object: &mut Value) {
    let is_cpu = |metric: &Value, side: &str| {
        metric["type"] == "Resource" && metric["resource"]["name"] == "cpu" && !metric["resource"][side]["averageUtilization"].is_null()
    };
    let metrics = meta::remove(object, "spec.metrics").and_then(|value| value.as_array().cloned()).unwrap_or_default();
    let (cpu, others): (Vec<Value>, Vec<Value>) = metrics.into_iter().partition(|metric| is_cpu(metric, "target"));
    if let Some(metric) = cpu.first() {
        meta::set(object, "spec.targetCPUUtilizationPercentage", metric["resource"]["target"]["averageUtilization"].clone());
    }
    if !others.is_empty() {
        let annotations = meta::child_mut(&mut object["metadata"], "annotations");
        annotations.insert(HPA_METRICS.into(), Value::Array(others).to_string().into());
    }
    meta::remove(object, "spec.behavior");
    let current = meta::remove(object, "status.currentMetrics").and_then(|value| value.as_array().cloned()).unwrap_or_default();
    if let Some(metric) = current.iter().find(|metric| is_cpu(metric, "current")) {
        meta::set(object, "status.currentCPUUtilizationPercentage", metric["resource"]["current"]["averageUtilization"].clone());
    }
    meta::remove(object, "status.conditions");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn autoscalers_go_there_and_back() {
        let v1 = crate::builtin::by_kind("autoscaling", "v1", "HorizontalPodAutoscaler").expect("built in");
        let mut object = json!({"apiVersion": "autoscaling/v1", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "a"},
            "spec": {"minReplicas": 1, "maxReplicas": 3, "targetCPUUtilizationPercentage": 50}});
        let before = object.clone();
        to_storage(v1, &mut object);
        assert_eq!(object["apiVersion"], "autoscaling/v2");
        assert_eq!(object["spec"]["metrics"][0]["resource"]["target"], json!({"type": "Utilization", "averageUtilization": 50}));
        to_version(v1, &mut object);
        assert_eq!(object, before);
    }

    #[test]
    fn events_change_their_words() {
        let events = crate::builtin::by_kind("events.k8s.io", "v1", "Event").expect("built in");
        let mut object = json!({"metadata": {}, "regarding": {"kind": "Pod"}, "note": "hi", "reportingController": "x", "eventTime": "t"});
        to_storage(events, &mut object);
        assert_eq!(
            object,
            json!({"apiVersion": "v1", "kind": "Event", "metadata": {}, "involvedObject": {"kind": "Pod"}, "message": "hi", "reportingComponent": "x", "eventTime": "t"})
        );
        to_version(events, &mut object);
        assert_eq!(object["note"], "hi");
    }
}
