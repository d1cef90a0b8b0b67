//! Pods: first status, quality of service, label keys in affinity, and fields that mirror each other.
use serde_json::{Map, Value, json};

use crate::meta;
use crate::quantity::Quantity;
use crate::resource::Resource;

pub(super) fn create(object: &mut Value) {
    let mut status = json!({"phase": "Pending", "qosClass": qos_class(object)});
    if !meta::items(object, "spec.schedulingGates").is_empty() {
        status["conditions"] = json!([{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates"}]);
    }
    object["status"] = status;
    apply_label_keys(object);
}

/// Guaranteed, Burstable or BestEffort, by CPU and memory of all containers, or of the pod where it has its own.
pub fn qos_class(pod: &Value) -> &'static str {
    let spec = &pod["spec"];
    let pod_level = &spec["resources"];
    let has_pod_level = ["requests", "limits"].iter().any(|list| ["cpu", "memory"].iter().any(|name| !pod_level[*list][*name].is_null()));
    let resources: Vec<&Value> = if has_pod_level {
        vec![pod_level]
    } else {
        ["initContainers", "containers"]
            .iter()
            .flat_map(|list| spec[*list].as_array().into_iter().flatten())
            .map(|container| &container["resources"])
            .collect()
    };
    let amount = |resources: &Value, list: &str, name: &str| Quantity::of(&resources[list][name]);
    let names = ["cpu", "memory"];
    let any = |list: &str| resources.iter().any(|entry| names.iter().any(|name| !amount(entry, list, name).is_zero()));
    if !any("requests") && !any("limits") {
        return "BestEffort";
    }
    let guaranteed = resources.iter().all(|entry| {
        names.iter().all(|name| {
            let limit = amount(entry, "limits", name);
            let request = &entry["requests"][*name];
            !limit.is_zero() && (request.is_null() || Quantity::of(request) == limit)
        })
    });
    if guaranteed { "Guaranteed" } else { "Burstable" }
}

/// `matchLabelKeys` and `mismatchLabelKeys` become expressions with the pod's own label values.
fn apply_label_keys(pod: &mut Value) {
    let labels = meta::get(pod, "metadata.labels").clone();
    for affinity in ["podAffinity", "podAntiAffinity"] {
        let Some(affinity) = pod["spec"].get_mut("affinity").and_then(|all| all.get_mut(affinity)) else { continue };
        for term in terms_mut(affinity, "requiredDuringSchedulingIgnoredDuringExecution") {
            extend_selector(term, "matchLabelKeys", "In", &labels);
            extend_selector(term, "mismatchLabelKeys", "NotIn", &labels);
        }
        for weighted in terms_mut(affinity, "preferredDuringSchedulingIgnoredDuringExecution") {
            let Some(term) = weighted.get_mut("podAffinityTerm") else { continue };
            extend_selector(term, "matchLabelKeys", "In", &labels);
            extend_selector(term, "mismatchLabelKeys", "NotIn", &labels);
        }
    }
    for constraint in terms_mut(&mut pod["spec"], "topologySpreadConstraints") {
        extend_selector(constraint, "matchLabelKeys", "In", &labels);
    }
}

fn terms_mut<'a>(owner: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    owner.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
}

fn extend_selector(term: &mut Value, keys: &str, operator: &str, labels: &Value) {
    let keys: Vec<String> = meta::items(term, keys).iter().filter_map(Value::as_str).map(String::from).collect();
    let Some(selector) = term.get_mut("labelSelector").filter(|selector| selector.is_object()) else { return };
    for key in keys {
        let Some(value) = labels.get(&key) else { continue };
        let requirement = json!({"key": key, "operator": operator, "values": [value]});
        match selector.get_mut("matchExpressions").and_then(Value::as_array_mut) {
            Some(expressions) if expressions.contains(&requirement) => {}
            Some(expressions) => expressions.push(requirement),
            None => selector["matchExpressions"] = json!([requirement]),
        }
    }
}

pub(super) fn update_status(new: &mut Value, old: &Value) {
    if meta::text(new, "status.qosClass").is_empty() {
        super::keep_field(new, old, "status.qosClass");
    }
    let Some(status) = new.get_mut("status").and_then(Value::as_object_mut) else { return };
    for (single, list, key) in [("podIP", "podIPs", "ip"), ("hostIP", "hostIPs", "ip")] {
        mirror(status, single, list, |text| json!({key: text}), |entry| entry[key].clone());
    }
}

/// A deprecated single field and the list that replaces it: the first item is the single one, which wins.
pub(super) fn mirror(
    map: &mut Map<String, Value>,
    single: &str,
    list: &str,
    wrap: impl Fn(&Value) -> Value,
    unwrap: impl Fn(&Value) -> Value,
) {
    let first = map.get(list).and_then(|items| items.get(0)).map(unwrap);
    match (map.get(single).filter(|value| !meta::is_empty(value)).cloned(), first) {
        (Some(value), first) if first.as_ref() != Some(&value) => drop(map.insert(list.into(), json!([wrap(&value)]))),
        (None, Some(first)) => drop(map.insert(single.into(), first)),
        _ => {}
    }
}

/// Only containers' resources and resize policies come from the request, where the containers are the same ones.
pub(super) fn keep_all_but_resources(new: &mut Value, old: &Value) {
    let names = |object: &Value, list: &str| meta::items(object, list).iter().map(|entry| entry["name"].clone()).collect::<Vec<_>>();
    if ["spec.containers", "spec.initContainers"].iter().any(|list| names(new, list) != names(old, list)) {
        return;
    }
    let wanted = new["spec"].take();
    let metadata = new["metadata"].take();
    *new = old.clone();
    new["metadata"] = metadata;
    for list in ["containers", "initContainers"] {
        for (target, source) in terms_mut(&mut new["spec"], list).zip(wanted[list].as_array().into_iter().flatten()) {
            for key in ["resources", "resizePolicy"] {
                if !source[key].is_null() {
                    target[key] = source[key].clone();
                } else if let Some(map) = target.as_object_mut() {
                    map.shift_remove(key);
                }
            }
        }
    }
}

/// Where a kind keeps a pod specification.
pub(crate) fn template_spec_mut<'a>(resource: &Resource, object: &'a mut Value) -> Option<&'a mut Map<String, Value>> {
    let pointer = template_spec_pointer(resource)?;
    object.pointer_mut(pointer)?.as_object_mut()
}

/// JSON pointer to the pod specification of a kind that has one.
pub(crate) fn template_spec_pointer(resource: &Resource) -> Option<&'static str> {
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        ("", "Pod") => Some("/spec"),
        ("", "PodTemplate") => Some("/template/spec"),
        ("", "ReplicationController") | ("apps", "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet") | ("batch", "Job") => {
            Some("/spec/template/spec")
        }
        ("batch", "CronJob") => Some("/spec/jobTemplate/spec/template/spec"),
        _ => None,
    }
}

/// The deprecated `serviceAccount` always has `serviceAccountName`'s value.
pub(super) fn mirror_service_account(spec: &mut Map<String, Value>) {
    let text = |key: &str| spec.get(key).and_then(Value::as_str).filter(|name| !name.is_empty()).map(String::from);
    match text("serviceAccountName").or_else(|| text("serviceAccount")) {
        Some(name) => {
            spec.insert("serviceAccountName".into(), name.clone().into());
            spec.insert("serviceAccount".into(), name.into());
        }
        None => drop(spec.shift_remove("serviceAccount")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_of_service_follows_resources() {
        let both = |request: &str, limit: &str| json!({"requests": {"cpu": request, "memory": request}, "limits": {"cpu": limit, "memory": limit}});
        for (containers, expected) in [
            (json!([{}]), "BestEffort"),
            (json!([{"resources": both("1", "1")}]), "Guaranteed"),
            (json!([{"resources": both("1000m", "1")}]), "Guaranteed"),
            (json!([{"resources": both("1", "2")}]), "Burstable"),
            (json!([{"resources": both("1", "1")}, {}]), "Burstable"),
            (json!([{"resources": {"requests": {"cpu": "1"}}}]), "Burstable"),
            (json!([{"resources": {"limits": {"example.com/x": "1"}}}]), "BestEffort"),
        ] {
            assert_eq!(qos_class(&json!({"spec": {"containers": containers}})), expected, "{containers}");
        }
    }

    #[test]
    fn label_keys_become_expressions() {
        let mut pod = json!({"metadata": {"labels": {"h": "1"}}, "spec": {"containers": [],
            "topologySpreadConstraints": [{"matchLabelKeys": ["h", "none"], "labelSelector": {"matchLabels": {"a": "b"}}}]}});
        create(&mut pod);
        let expected = json!({"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "h", "operator": "In", "values": ["1"]}]});
        assert_eq!(pod["spec"]["topologySpreadConstraints"][0]["labelSelector"], expected);
    }
}
