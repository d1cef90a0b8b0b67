//! LimitRanger: requests and limits that a namespace's LimitRanges fill in and bound.

use outrigger_api::quota::{Amounts, amounts, pod_total};
use outrigger_api::{Status, meta};
use serde_json::Value;

use super::{Attributes, Operation, Plugin, all};
use crate::engine::Engine;

pub struct LimitRanger;

impl Plugin for LimitRanger {
    fn mutate(&self, engine: &Engine, attributes: &Attributes<'_>, pod: &mut Value) -> Result<(), Status> {
        if !attributes.creates("", "Pod") {
            return Ok(());
        }
        for range in all(engine, "", "limitranges", attributes.namespace) {
            for item in meta::items(&range, "spec.limits").iter().filter(|item| item["type"] == "Container") {
                fill_pod(pod, item);
            }
        }
        Ok(())
    }

    fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let claim = attributes.is("", "PersistentVolumeClaim") && attributes.operation != Operation::Delete;
        let pod = attributes.creates("", "Pod") || (attributes.subresource == "resize" && attributes.resource.is("", "Pod"));
        let Some(object) = object.filter(|_| claim || pod) else { return Ok(()) };
        let mut errors = Vec::new();
        for range in all(engine, "", "limitranges", attributes.namespace) {
            for item in meta::items(&range, "spec.limits") {
                match item["type"].as_str().unwrap_or_default() {
                    "Container" if pod => {
                        for container in containers(object) {
                            check(
                                item,
                                "Container",
                                &amounts(&container["resources"]["requests"]),
                                &amounts(&container["resources"]["limits"]),
                                &mut errors,
                            );
                        }
                    }
                    "Pod" if pod => check(item, "Pod", &pod_total(object, "requests"), &pod_total(object, "limits"), &mut errors),
                    "PersistentVolumeClaim" if claim => {
                        let requests = amounts(meta::get(object, "spec.resources.requests"));
                        check_bounds(item, "PersistentVolumeClaim", &requests, &requests, &mut errors);
                    }
                    _ => {}
                }
            }
        }
        match errors.as_slice() {
            [] => Ok(()),
            [one] => Err(attributes.forbidden(one)),
            many => Err(attributes.forbidden(format!("[{}]", many.join(", ")))),
        }
    }
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    meta::items(pod, "spec.containers").iter().chain(meta::items(pod, "spec.initContainers"))
}

/// Puts a range's defaults into the containers that say nothing, and notes in an annotation what was set.
fn fill_pod(pod: &mut Value, item: &Value) {
    let mut notes = Vec::new();
    for (list, what) in [("containers", "container"), ("initContainers", "init container")] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else { continue };
        for container in containers {
            let name = container["name"].as_str().unwrap_or_default().to_string();
            for (side, source) in [("requests", "defaultRequest"), ("limits", "default")] {
                let set = fill(container, side, &item[source]);
                if !set.is_empty() {
                    notes.push(format!("{} {} for {what} {name}", set.join(", "), side.trim_end_matches('s')));
                }
            }
        }
    }
    if !notes.is_empty() {
        let annotations = meta::map_mut(meta::child_mut(pod, "metadata").entry("annotations").or_insert(Value::Null));
        annotations.insert("kubernetes.io/limit-ranger".into(), format!("LimitRanger plugin set: {}", notes.join("; ")).into());
    }
}

fn fill(container: &mut Value, side: &str, defaults: &Value) -> Vec<String> {
    let mut set = Vec::new();
    let mut names: Vec<_> = defaults.as_object().into_iter().flatten().collect();
    names.sort_by_key(|(name, _)| name.as_str());
    for (name, value) in names {
        let map = meta::map_mut(meta::child_mut(container, "resources").entry(side).or_insert(Value::Null));
        if !map.contains_key(name) {
            map.insert(name.clone(), value.clone());
            set.push(name.clone());
        }
    }
    set
}

fn check(item: &Value, kind: &str, requests: &Amounts, limits: &Amounts, errors: &mut Vec<String>) {
    check_bounds(item, kind, requests, limits, errors);
    for (name, bound) in amounts(&item["maxLimitRequestRatio"]) {
        let (Some(limit), Some(request)) = (limits.get(&name), requests.get(&name)) else {
            errors.push(format!("{name} max limit to request ratio per {kind} is {bound}, but no request is specified or request is 0"));
            continue;
        };
        if request.is_zero() {
            errors.push(format!("{name} max limit to request ratio per {kind} is {bound}, but no request is specified or request is 0"));
            continue;
        }
        let ratio = limit.millis() as f64 / request.millis() as f64;
        if ratio > bound.millis() as f64 / 1000.0 {
            errors.push(format!("{name} max limit to request ratio per {kind} is {bound}, but provided ratio is {ratio:.6}"));
        }
    }
}

fn check_bounds(item: &Value, kind: &str, requests: &Amounts, limits: &Amounts, errors: &mut Vec<String>) {
    for (name, bound) in amounts(&item["min"]) {
        match (requests.get(&name), limits.get(&name)) {
            (None, _) => errors.push(format!("minimum {name} usage per {kind} is {bound}.  No request is specified")),
            (Some(request), _) if *request < bound => {
                errors.push(format!("minimum {name} usage per {kind} is {bound}, but request is {request}"));
            }
            (_, Some(limit)) if *limit < bound => errors.push(format!("minimum {name} usage per {kind} is {bound}, but limit is {limit}")),
            _ => {}
        }
    }
    for (name, bound) in amounts(&item["max"]) {
        match (requests.get(&name), limits.get(&name)) {
            (_, None) => errors.push(format!("maximum {name} usage per {kind} is {bound}.  No limit is specified")),
            (_, Some(limit)) if *limit > bound => errors.push(format!("maximum {name} usage per {kind} is {bound}, but limit is {limit}")),
            (Some(request), _) if *request > bound => {
                errors.push(format!("maximum {name} usage per {kind} is {bound}, but request is {request}"));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn defaults_fill_what_is_not_said() {
        let mut pod = json!({"metadata": {}, "spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": "2"}}}]}});
        fill_pod(&mut pod, &json!({"default": {"cpu": "1", "memory": "1Gi"}, "defaultRequest": {"cpu": "500m"}}));
        let resources = &pod["spec"]["containers"][0]["resources"];
        assert_eq!(resources["limits"], json!({"cpu": "2", "memory": "1Gi"}));
        assert_eq!(resources["requests"], json!({"cpu": "500m"}));
        assert_eq!(
            pod["metadata"]["annotations"]["kubernetes.io/limit-ranger"],
            "LimitRanger plugin set: cpu request for container a; memory limit for container a"
        );
    }

    #[test]
    fn bounds_are_told() {
        let mut errors = Vec::new();
        let item = json!({"min": {"cpu": "100m"}, "max": {"cpu": "1"}});
        check(&item, "Container", &amounts(&json!({"cpu": "50m"})), &amounts(&json!({"cpu": "2"})), &mut errors);
        assert_eq!(
            errors,
            ["minimum cpu usage per Container is 100m, but request is 50m", "maximum cpu usage per Container is 1, but limit is 2"]
        );
    }

    #[test]
    fn init_containers_count_by_their_peak() {
        let pod = json!({"spec": {
            "containers": [{"resources": {"requests": {"cpu": "1"}}}],
            "initContainers": [
                {"restartPolicy": "Always", "resources": {"requests": {"cpu": "500m"}}},
                {"resources": {"requests": {"cpu": "2"}}},
            ],
        }});
        assert_eq!(pod_total(&pod, "requests")["cpu"].to_string(), "2500m");
    }
}
