//! Nodes: a new one is tainted until it is ready, and a kubelet changes only its own node and pods.

use outrigger_api::{Status, meta};
use serde_json::{Value, json};

use super::{Attributes, Operation, Plugin};
use crate::engine::Engine;

/// TaintNodesByCondition
pub struct TaintByCondition;

const NOT_READY: &str = "node.kubernetes.io/not-ready";

impl Plugin for TaintByCondition {
    fn mutate(&self, _engine: &Engine, attributes: &Attributes<'_>, node: &mut Value) -> Result<(), Status> {
        if !attributes.creates("", "Node") {
            return Ok(());
        }
        let mut taints = meta::items(node, "spec.taints").to_vec();
        if !taints.iter().any(|t| t["key"] == NOT_READY && t["effect"] == "NoSchedule") {
            taints.push(json!({"key": NOT_READY, "effect": "NoSchedule"}));
            meta::set(node, "spec.taints", taints);
        }
        Ok(())
    }
}

pub struct NodeRestriction;

impl Plugin for NodeRestriction {
    fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let Some(node) = attributes.call.user.node_name() else { return Ok(()) };
        match (attributes.resource.group.as_ref(), attributes.resource.plural.as_ref(), attributes.subresource) {
            ("", "pods", "") => pod(attributes, node, object),
            ("", "pods", "status") => own_pod(attributes, node, "update"),
            ("", "pods", "eviction") => evicted(engine, attributes, node),
            ("", "nodes", _) => self_only(attributes, node, object),
            ("coordination.k8s.io", "leases", _) => lease(attributes, node),
            ("storage.k8s.io", "csinodes", _) if attributes.name != node => {
                Err(attributes.forbidden(format!("node {node:?} is not allowed to modify CSINode {:?}", attributes.name)))
            }
            _ => Ok(()),
        }
    }
}

/// A kubelet makes mirror pods of its own, and deletes pods bound to it.
fn pod(attributes: &Attributes<'_>, node: &str, object: Option<&Value>) -> Result<(), Status> {
    match attributes.operation {
        Operation::Create => {
            let Some(pod) = object else { return Ok(()) };
            if meta::annotation(pod, "kubernetes.io/config.mirror").is_none() {
                return Err(attributes.forbidden(format!(
                    "pod does not have \"kubernetes.io/config.mirror\" annotation, node {node:?} can only create mirror pods"
                )));
            }
            if meta::text(pod, "spec.nodeName") != node {
                return Err(attributes.forbidden(format!("node {node:?} can only create pods with spec.nodeName set to itself")));
            }
            Ok(())
        }
        Operation::Delete => own_pod(attributes, node, "delete"),
        _ => Err(attributes.forbidden(format!("unexpected operation, node {node:?} can only create and delete mirror pods"))),
    }
}

fn own_pod(attributes: &Attributes<'_>, node: &str, action: &str) -> Result<(), Status> {
    let bound = attributes.old.map(|old| meta::text(old, "spec.nodeName")).unwrap_or_default();
    if bound == node {
        return Ok(());
    }
    let what = if action == "update" { "update pod status for" } else { "delete" };
    Err(attributes.forbidden(format!("node {node:?} can only {what} pods with spec.nodeName set to itself")))
}

fn evicted(engine: &Engine, attributes: &Attributes<'_>, node: &str) -> Result<(), Status> {
    let pod = super::lookup(engine, "", "pods", attributes.namespace, attributes.name);
    match pod.as_ref().map(|pod| meta::text(pod, "spec.nodeName")) {
        Some(bound) if bound == node => Ok(()),
        _ => Err(attributes.forbidden(format!("node {node:?} can only evict pods with spec.nodeName set to itself"))),
    }
}

fn self_only(attributes: &Attributes<'_>, node: &str, object: Option<&Value>) -> Result<(), Status> {
    if attributes.name != node {
        return Err(attributes.forbidden(format!("node {node:?} is not allowed to modify node {:?}", attributes.name)));
    }
    let (Some(new), Operation::Update, Some(old)) = (object, attributes.operation, attributes.old) else { return Ok(()) };
    if meta::get(new, "spec.taints") != meta::get(old, "spec.taints") {
        return Err(attributes.forbidden(format!("node {node:?} is not allowed to modify taints")));
    }
    if meta::get(new, "metadata.ownerReferences") != meta::get(old, "metadata.ownerReferences") {
        return Err(attributes.forbidden(format!("node {node:?} is not allowed to modify ownerReferences")));
    }
    let restricted: Vec<&str> = meta::labels(new)
        .filter(|(key, value)| {
            key.split('/').next().is_some_and(|p| p == "node-restriction.kubernetes.io" || p.ends_with(".node-restriction.kubernetes.io"))
                && meta::label(old, key) != Some(value)
        })
        .map(|(key, _)| key)
        .collect();
    if !restricted.is_empty() {
        return Err(attributes.forbidden(format!("is not allowed to modify labels: {}", restricted.join(", "))));
    }
    Ok(())
}

fn lease(attributes: &Attributes<'_>, node: &str) -> Result<(), Status> {
    if attributes.namespace == "kube-node-lease" && attributes.name != node {
        return Err(attributes.forbidden("can only access node lease with the same name as the requesting node"));
    }
    Ok(())
}
