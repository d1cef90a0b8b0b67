//! ResourceQuota: what an object uses is added to its namespace's quotas before it is stored, or it is refused.

use std::collections::BTreeMap;

use outrigger_api::quantity::Quantity;
use outrigger_api::{Status, meta};
use serde_json::Value;

use super::limits::{amounts, pod_total};
use super::{Attributes, Operation, all};
use crate::engine::Engine;
use crate::registry::update;

type Usage = BTreeMap<String, Quantity>;

/// Charges the namespace's quotas with what this write adds.
pub async fn charge(engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
    let counted = matches!(attributes.operation, Operation::Create | Operation::Update) && attributes.subresource.is_empty();
    let Some(object) = object.filter(|_| counted && attributes.resource.namespaced) else { return Ok(()) };
    let quotas = all(engine, "", "resourcequotas", attributes.namespace);
    if quotas.is_empty() || attributes.resource.kind == "Event" {
        return Ok(());
    }
    let delta = delta(attributes, object);
    if delta.is_empty() {
        return Ok(());
    }
    for quota in quotas.iter().filter(|quota| in_scope(quota, attributes, object)) {
        let hard = amounts(meta::get(quota, "status.hard"));
        let limited: Usage = delta.iter().filter(|(name, _)| hard.contains_key(*name)).map(|(n, q)| (n.clone(), *q)).collect();
        require_compute(attributes, quota, &hard, object)?;
        if !limited.is_empty() {
            spend(engine, attributes, meta::name(quota), &limited).await?;
        }
    }
    Ok(())
}

async fn spend(engine: &Engine, attributes: &Attributes<'_>, quota: &str, delta: &Usage) -> Result<(), Status> {
    let resource = engine.builtin("", "v1", "resourcequotas");
    let mut call = attributes.call.derived(resource, "patch", attributes.namespace, quota);
    call.info.subresource = "status".into();
    update::change_unchecked(engine, &call, quota, |current| {
        let hard = amounts(meta::get(current, "status.hard"));
        let mut used = amounts(meta::get(current, "status.used"));
        let unknown: Vec<&str> = delta.keys().filter(|name| !used.contains_key(*name)).map(String::as_str).collect();
        if !unknown.is_empty() {
            return Err(attributes.forbidden(format!("status unknown for quota: {quota}, resources: {}", unknown.join(","))));
        }
        let exceeded: Vec<&String> = delta
            .iter()
            .filter(|(name, more)| hard.get(*name).is_some_and(|limit| used[*name] + **more > *limit))
            .map(|(name, _)| name)
            .collect();
        if !exceeded.is_empty() {
            let show = |amounts: &Usage| exceeded.iter().filter_map(|n| amounts.get(*n).map(|q| format!("{n}={q}"))).collect::<Vec<_>>().join(",");
            return Err(attributes.forbidden(format!(
                "exceeded quota: {quota}, requested: {}, used: {}, limited: {}",
                show(delta),
                show(&used),
                show(&hard)
            )));
        }
        let mut object = current.clone();
        for (name, more) in delta {
            let sum = used[name] + *more;
            used.insert(name.clone(), sum);
        }
        for (name, amount) in used {
            meta::map_mut(meta::child_mut(&mut object, "status").entry("used").or_insert(Value::Null)).insert(name, amount.to_string().into());
        }
        Ok(object)
    })
    .await
}

/// What the write adds to the use of each quota resource; only increases count.
fn delta(attributes: &Attributes<'_>, object: &Value) -> Usage {
    let mut now = usage(attributes, object);
    if let (Operation::Update, Some(old)) = (attributes.operation, attributes.old) {
        let before = usage(attributes, old);
        for (name, amount) in &mut now {
            if let Some(old) = before.get(name) {
                *amount = *amount - *old;
            }
        }
    }
    now.retain(|_, amount| !amount.is_zero() && !amount.is_negative());
    now
}

fn usage(attributes: &Attributes<'_>, object: &Value) -> Usage {
    let one = Quantity::from_units(1);
    let resource = attributes.resource;
    let mut usage = Usage::new();
    let count = if resource.group.is_empty() { format!("count/{}", resource.plural) } else { format!("count/{}.{}", resource.plural, resource.group) };
    usage.insert(count, one);
    if !resource.group.is_empty() {
        return usage;
    }
    match resource.plural.as_ref() {
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
fn pod_usage(pod: &Value) -> Usage {
    let mut usage = Usage::new();
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

/// A quota on compute resources obliges every container to say what it asks for.
fn require_compute(attributes: &Attributes<'_>, quota: &Value, hard: &Usage, object: &Value) -> Result<(), Status> {
    if !attributes.creates("", "Pod") {
        return Ok(());
    }
    let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in hard.keys() {
        let (side, resource) = match name.as_str() {
            "cpu" | "memory" => ("requests", name.as_str()),
            name => match name.split_once('.') {
                Some((side @ ("requests" | "limits"), resource @ ("cpu" | "memory"))) => (side, resource),
                _ => continue,
            },
        };
        let all = meta::items(object, "spec.containers").iter().chain(meta::items(object, "spec.initContainers"));
        for container in all.filter(|c| c["resources"][side][resource].is_null()) {
            missing.entry(name).or_default().push(container["name"].as_str().unwrap_or_default());
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let parts: Vec<String> = missing.iter().map(|(name, containers)| format!("{name} for: {}", containers.join(","))).collect();
    Err(attributes.forbidden(format!("failed quota: {}: must specify {}", meta::name(quota), parts.join("; "))))
}

fn in_scope(quota: &Value, attributes: &Attributes<'_>, object: &Value) -> bool {
    let simple = meta::items(quota, "spec.scopes").iter().map(|scope| (scope.as_str().unwrap_or_default(), "Exists", Vec::new()));
    let selected = meta::items(quota, "spec.scopeSelector.matchExpressions").iter().map(|e| {
        let values = meta::items(e, "values").iter().filter_map(Value::as_str).collect::<Vec<_>>();
        (meta::text(e, "scopeName"), meta::text(e, "operator"), values)
    });
    let is_pod = attributes.resource.is("", "Pod");
    simple.chain(selected).all(|(scope, operator, values)| match scope {
        "PriorityClass" if is_pod => by_operator(operator, meta::text(object, "spec.priorityClassName"), &values),
        "Terminating" => is_pod && meta::get(object, "spec.activeDeadlineSeconds").is_i64(),
        "NotTerminating" => is_pod && !meta::get(object, "spec.activeDeadlineSeconds").is_i64(),
        "BestEffort" => is_pod && is_best_effort(object),
        "NotBestEffort" => is_pod && !is_best_effort(object),
        "VolumeAttributesClass" if attributes.resource.is("", "PersistentVolumeClaim") => {
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
        ["requests", "limits"].iter().any(|side| {
            ["cpu", "memory"].iter().any(|resource| !Quantity::of(&container["resources"][side][resource]).is_zero())
        })
    };
    !all.into_iter().any(asks)
}
