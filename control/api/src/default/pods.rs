//! Pod defaults that depend on other fields.
use serde_json::{Map, Value, json};

use super::{Fields, put, text};
use crate::quantity::Quantity;

/// Requests follow limits, host ports follow container ports on the host's network, and pod-level requests follow their limits. Only for
/// pods, never for templates.
pub(super) fn pod(fields: &mut Fields) {
    let Some(spec) = fields.get_mut("spec").and_then(Value::as_object_mut) else { return };
    let host_network = spec.get("hostNetwork") == Some(&Value::Bool(true));
    for list in ["containers", "initContainers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            requests_from_limits(&mut container["resources"]);
            if host_network {
                host_ports(container);
            }
        }
    }
    pod_level_requests(spec);
    put(spec, "enableServiceLinks", true);
}

fn requests_from_limits(resources: &mut Value) {
    let Some(limits) = resources.get("limits").and_then(Value::as_object).filter(|limits| !limits.is_empty()).cloned() else { return };
    let requests = crate::meta::child_mut(resources, "requests");
    for (name, limit) in limits {
        requests.entry(name).or_insert(limit);
    }
}

fn host_ports(container: &mut Value) {
    for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        if port.get("hostPort").and_then(Value::as_i64).unwrap_or_default() == 0 {
            port["hostPort"] = port["containerPort"].clone();
        }
    }
}

/// With pod-level limits, what no pod-level request names is the containers' sum, or else the limit.
fn pod_level_requests(spec: &mut Map<String, Value>) {
    let Some(limits) = spec.get("resources").and_then(|resources| resources.get("limits")).and_then(Value::as_object).cloned() else {
        return;
    };
    if limits.is_empty() {
        return;
    }
    let mut sums: Map<String, Value> = Map::new();
    for container in spec.get("containers").and_then(Value::as_array).into_iter().flatten() {
        for (name, request) in container["resources"]["requests"].as_object().into_iter().flatten() {
            let sum = Quantity::of(sums.get(name).unwrap_or(&Value::Null)) + Quantity::of(request);
            sums.insert(name.clone(), sum.into());
        }
    }
    let Some(resources) = spec.get_mut("resources") else { return };
    let requests = crate::meta::child_mut(resources, "requests");
    for (name, sum) in sums.into_iter().filter(|(name, _)| name == "cpu" || name == "memory") {
        requests.entry(name).or_insert(sum);
    }
    for (name, limit) in limits.into_iter().filter(|(name, _)| name == "cpu" || name == "memory" || name.starts_with("hugepages-")) {
        requests.entry(name).or_insert(limit);
    }
}

pub(super) fn container(fields: &mut Fields) {
    if text(fields, "imagePullPolicy").is_empty() {
        let policy = pull_policy(text(fields, "image"));
        fields.insert("imagePullPolicy".into(), policy.into());
    }
}

/// A volume without any source is an emptyDir.
pub(super) fn volume(fields: &mut Fields) {
    if fields.iter().all(|(key, value)| key == "name" || value.is_null()) {
        fields.insert("emptyDir".into(), json!({}));
    }
    if let Some(image) = fields.get_mut("image").and_then(Value::as_object_mut)
        && text(image, "pullPolicy").is_empty()
    {
        let policy = pull_policy(text(image, "reference"));
        image.insert("pullPolicy".into(), policy.into());
    }
}

/// `Always` for `latest` or no tag at all, unless a digest fixes the image.
fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    let last = name.rsplit('/').next().unwrap_or(name);
    let tag = last.split_once(':').map(|(_, tag)| tag);
    match (tag, digest) {
        (None, None) | (Some("latest"), _) => "Always",
        _ => "IfNotPresent",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pull_policies_follow_the_tag() {
        for (image, expected) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1.2", "IfNotPresent"),
            ("host:5000/nginx", "Always"),
            ("host:5000/nginx:1", "IfNotPresent"),
            ("nginx@sha256:0123", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), expected, "{image}");
        }
    }

    #[test]
    fn pod_level_requests_are_filled() {
        let mut fields = json!({"spec": {"resources": {"limits": {"cpu": "2", "memory": "1Gi"}}, "containers": [
            {"resources": {"requests": {"cpu": "500m"}}}, {"resources": {"requests": {"cpu": "250m"}}}]}});
        pod(fields.as_object_mut().expect("an object"));
        assert_eq!(fields["spec"]["resources"]["requests"], json!({"cpu": "750m", "memory": "1Gi"}));
    }
}
