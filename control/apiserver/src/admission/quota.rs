//! ResourceQuota: what an object uses is added to its namespace's quotas before it is stored, or it is refused.

use std::collections::BTreeMap;

use outrigger_api::quota::{Amounts as Usage, amounts, in_scope, usage};
use outrigger_api::{Status, meta};
use serde_json::Value;

use super::{Attributes, Operation, all};
use crate::engine::Engine;
use crate::registry::update;

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
    for quota in quotas.iter().filter(|quota| in_scope(quota, &attributes.resource.group, &attributes.resource.plural, object)) {
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
            let show =
                |amounts: &Usage| exceeded.iter().filter_map(|n| amounts.get(*n).map(|q| format!("{n}={q}"))).collect::<Vec<_>>().join(",");
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
            meta::map_mut(meta::child_mut(&mut object, "status").entry("used").or_insert(Value::Null))
                .insert(name, amount.to_string().into());
        }
        Ok(object)
    })
    .await
}

/// What the write adds to the use of each quota resource; only increases count.
fn delta(attributes: &Attributes<'_>, object: &Value) -> Usage {
    let mut now = usage(&attributes.resource.group, &attributes.resource.plural, object);
    if let (Operation::Update, Some(old)) = (attributes.operation, attributes.old) {
        let before = usage(&attributes.resource.group, &attributes.resource.plural, old);
        for (name, amount) in &mut now {
            if let Some(old) = before.get(name) {
                *amount = *amount - *old;
            }
        }
    }
    now.retain(|_, amount| !amount.is_zero() && !amount.is_negative());
    now
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
