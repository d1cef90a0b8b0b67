//! What objects use of their namespace's ResourceQuotas: for admission, which charges, and for the controller, which counts.
use std::collections::BTreeMap;

use serde_json::Value;

use crate::meta;
use crate::quantity::Quantity;

/// Amounts by resource name.
pub type Amounts = BTreeMap<String, Quantity>;

/// Reads a map of quantities.
pub fn amounts(map: &Value) -> Amounts {
    map.as_object().into_iter().flatten().map(|(name, value)| (name.clone(), Quantity::of(value))).collect()
}

/// What a pod as a whole asks for: containers and sidecars together, or one init container with the sidecars before it, if that is more.
pub fn pod_total(pod: &Value, side: &str) -> Amounts {
    let of = |container: &Value| amounts(&container["resources"][side]);
    let mut running = Amounts::new();
    let mut peak = Amounts::new();
    let add = |into: &mut Amounts, more: &Amounts| {
        for (name, amount) in more {
            let sum = into.get(name).copied().unwrap_or_default() + *amount;
            into.insert(name.clone(), sum);
        }
    };
    for container in meta::items(pod, "spec.initContainers") {
        if container["restartPolicy"] == "Always" {
            add(&mut running, &of(container));
            raise(&mut peak, &running);
        } else {
            let mut alone = running.clone();
            add(&mut alone, &of(container));
            raise(&mut peak, &alone);
        }
    }
    for container in meta::items(pod, "spec.containers") {
        add(&mut running, &of(container));
    }
    raise(&mut running, &peak);
    let overhead = amounts(meta::get(pod, "spec.overhead"));
    if side == "requests" {
        add(&mut running, &overhead);
    } else {
        for (name, amount) in overhead {
            if let Some(total) = running.get_mut(&name) {
                *total = *total + amount;
            }
        }
    }
    running
}

fn raise(into: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        let most = into.get(name).copied().unwrap_or_default().max(*amount);
        into.insert(name.clone(), most);
    }
}

/// What one object of a kind uses of each quota resource.
pub fn usage(group: &str, plural: &str, object: &Value) -> Amounts {
    let one = Quantity::from_units(1);
    let mut usage = Amounts::new();
    let count = if group.is_empty() { format!("count/{plural}") } else { format!("count/{plural}.{group}") };
    usage.insert(count, one);
    if !group.is_empty() {
        return usage;
    }
    match plural {
        "pods" => usage.extend(pod_usage(object)),
        "services" => {
            usage.insert("services".into(), one);
            let ports = Quantity::from_units(meta::items(object, "spec.ports").len() as i64);
            match meta::text(object, "spec.type") {
                "NodePort" => drop(usage.insert("services.nodeports".into(), ports)),
                "LoadBalancer" => {
                    usage.insert("services.loadbalancers".into(), one);
                    if meta::get(object, "spec.allocateLoadBalancerNodePorts") != &Value::Bool(false) {
                        usage.insert("services.nodeports".into(), ports);
                    }
                }
                _ => {}
            }
        }
        "persistentvolumeclaims" => {
            let storage = Quantity::of(meta::at(object, &["spec", "resources", "requests", "storage"]));
            usage.insert("persistentvolumeclaims".into(), one);
            usage.insert("requests.storage".into(), storage);
            let class = meta::text(object, "spec.storageClassName");
            if !class.is_empty() {
                usage.insert(format!("{class}.storageclass.storage.k8s.io/persistentvolumeclaims"), one);
                usage.insert(format!("{class}.storageclass.storage.k8s.io/requests.storage"), storage);
            }
        }
        plural @ ("configmaps" | "secrets" | "replicationcontrollers" | "resourcequotas") => {
            usage.insert(plural.to_string(), one);
        }
        _ => {}
    }
    usage
}

/// A pod's compute resources under all the names that quotas have for them.
fn pod_usage(pod: &Value) -> Amounts {
    let mut usage = Amounts::new();
    if matches!(meta::text(pod, "status.phase"), "Succeeded" | "Failed") {
        return usage;
    }
    usage.insert("pods".into(), Quantity::from_units(1));
    for (name, amount) in pod_total(pod, "requests") {
        if matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-") {
            usage.insert(name.clone(), amount);
        }
        usage.insert(format!("requests.{name}"), amount);
    }
    for (name, amount) in pod_total(pod, "limits") {
        usage.insert(format!("limits.{name}"), amount);
    }
    usage
}

/// Whether a quota's scopes hold for an object.
pub fn in_scope(quota: &Value, group: &str, plural: &str, object: &Value) -> bool {
    let simple = meta::items(quota, "spec.scopes").iter().map(|scope| (scope.as_str().unwrap_or_default(), "Exists", Vec::new()));
    let selected = meta::items(quota, "spec.scopeSelector.matchExpressions").iter().map(|e| {
        let values = meta::items(e, "values").iter().filter_map(Value::as_str).collect::<Vec<_>>();
        (meta::text(e, "scopeName"), meta::text(e, "operator"), values)
    });
    let is_pod = group.is_empty() && plural == "pods";
    simple.chain(selected).all(|(scope, operator, values)| match scope {
        "PriorityClass" if is_pod => by_operator(operator, meta::text(object, "spec.priorityClassName"), &values),
        "Terminating" => is_pod && meta::get(object, "spec.activeDeadlineSeconds").is_i64(),
        "NotTerminating" => is_pod && !meta::get(object, "spec.activeDeadlineSeconds").is_i64(),
        "BestEffort" => is_pod && is_best_effort(object),
        "NotBestEffort" => is_pod && !is_best_effort(object),
        "VolumeAttributesClass" if group.is_empty() && plural == "persistentvolumeclaims" => {
            by_operator(operator, meta::text(object, "spec.volumeAttributesClassName"), &values)
        }
        _ => false,
    })
}

fn by_operator(operator: &str, value: &str, values: &[&str]) -> bool {
    match operator {
        "In" => values.contains(&value),
        "NotIn" => !values.contains(&value),
        "DoesNotExist" => value.is_empty(),
        _ => !value.is_empty(),
    }
}

pub fn is_best_effort(pod: &Value) -> bool {
    let all = meta::items(pod, "spec.containers").iter().chain(meta::items(pod, "spec.initContainers"));
    let asks = |container: &Value| {
        ["requests", "limits"]
            .iter()
            .any(|side| ["cpu", "memory"].iter().any(|resource| !Quantity::of(&container["resources"][side][resource]).is_zero()))
    };
    !all.into_iter().any(asks)
}
