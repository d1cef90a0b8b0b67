//! The Node object: registered at start, its status kept true, its lease renewed.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures, NodeRuntimeHandler,
    NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use outrigger_cluster::status::events::Kind;
use outrigger_cluster::status::{patch, reference_to_node};
use serde_json::json;
use tracing::{debug, info, warn};

use crate::cri::v1;
use crate::eviction::{DISK_PRESSURE, MEMORY_PRESSURE, PID_PRESSURE};
use crate::host::Host;
use crate::machine::architecture;

const MAX_IMAGES: usize = 50;
const MAX_IMAGE_NAMES: usize = 5;
const ATTACH_ANNOTATION: &str = "volumes.kubernetes.io/controller-managed-attach-detach";

fn labels(host: &Host) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = [
        ("kubernetes.io/hostname", host.config.node_name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture()),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    labels.extend(host.config.register_labels.iter().cloned());
    labels
}

fn new_node(host: &Host, status: NodeStatus) -> Node {
    let taints = host.config.register_taints.clone();
    Node {
        metadata: ObjectMeta {
            name: Some(host.config.node_name.clone()),
            labels: Some(labels(host)),
            annotations: Some([(ATTACH_ANNOTATION.to_owned(), "true".to_owned())].into()),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec { taints: (!taints.is_empty()).then_some(taints), ..NodeSpec::default() }),
        status: Some(status),
    }
}

/// What the runtime says of itself: the message of what isn't ready, handlers and features.
struct RuntimeState {
    problem: Option<String>,
    handlers: Vec<NodeRuntimeHandler>,
    supplemental_groups_policy: bool,
}

async fn runtime_state(host: &Host) -> RuntimeState {
    let status = match host.cri.status().await {
        Ok(status) => status,
        Err(error) => {
            let problem = Some(format!("container runtime is down: {error}"));
            return RuntimeState { problem, handlers: Vec::new(), supplemental_groups_policy: false };
        }
    };
    let problems: Vec<String> = status
        .status
        .unwrap_or_default()
        .conditions
        .iter()
        .filter(|condition| !condition.status)
        .map(|condition| {
            let what =
                if condition.r#type == "NetworkReady" { "container runtime network not ready" } else { "container runtime not ready" };
            format!("{what}: {}=false reason:{} message:{}", condition.r#type, condition.reason, condition.message)
        })
        .collect();
    let handlers = status.runtime_handlers.into_iter().map(|handler| {
        let features = handler.features.unwrap_or_default();
        NodeRuntimeHandler {
            name: Some(handler.name),
            features: Some(NodeRuntimeHandlerFeatures {
                recursive_read_only_mounts: Some(features.recursive_read_only_mounts),
                user_namespaces: Some(features.user_namespaces),
            }),
        }
    });
    RuntimeState {
        problem: (!problems.is_empty()).then(|| problems.join(", ")),
        handlers: handlers.collect(),
        supplemental_groups_policy: status.features.is_some_and(|features| features.supplemental_groups_policy),
    }
}

struct Finding {
    type_: &'static str,
    status: bool,
    reason: &'static str,
    message: String,
    /// The event's reason when it turns to this.
    event: &'static str,
}

fn findings(host: &Host, problem: Option<String>) -> Vec<Finding> {
    let pressure = host.pressure.conditions();
    let finding = |type_, status, reason, message: &str, event| Finding { type_, status, reason, message: message.into(), event };
    let memory = if pressure.contains(&MEMORY_PRESSURE) {
        finding(
            "MemoryPressure",
            true,
            "KubeletHasInsufficientMemory",
            "kubelet has insufficient memory available",
            "NodeHasInsufficientMemory",
        )
    } else {
        finding("MemoryPressure", false, "KubeletHasSufficientMemory", "kubelet has sufficient memory available", "NodeHasSufficientMemory")
    };
    let disk = if pressure.contains(&DISK_PRESSURE) {
        finding("DiskPressure", true, "KubeletHasDiskPressure", "kubelet has disk pressure", "NodeHasDiskPressure")
    } else {
        finding("DiskPressure", false, "KubeletHasNoDiskPressure", "kubelet has no disk pressure", "NodeHasNoDiskPressure")
    };
    let pid = if pressure.contains(&PID_PRESSURE) {
        finding("PIDPressure", true, "KubeletHasInsufficientPID", "kubelet has insufficient PID available", "NodeHasInsufficientPID")
    } else {
        finding("PIDPressure", false, "KubeletHasSufficientPID", "kubelet has sufficient PID available", "NodeHasSufficientPID")
    };
    let ready = match problem {
        None => finding("Ready", true, "KubeletReady", "kubelet is posting ready status", "NodeReady"),
        Some(message) => Finding { type_: "Ready", status: false, reason: "KubeletNotReady", message, event: "NodeNotReady" },
    };
    vec![memory, disk, pid, ready]
}

fn condition(finding: &Finding, old: &NodeStatus, now: Timestamp) -> NodeCondition {
    let status = if finding.status { "True" } else { "False" };
    let before = old.conditions.iter().flatten().find(|old| old.type_ == finding.type_ && old.status == status);
    NodeCondition {
        type_: finding.type_.into(),
        status: status.into(),
        reason: Some(finding.reason.into()),
        message: Some(finding.message.clone()),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: before.and_then(|before| before.last_transition_time.clone()).or(Some(Time(now))),
    }
}

async fn images(host: &Host) -> Vec<ContainerImage> {
    let mut list = host.cri.list_images().await.unwrap_or_default();
    list.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
    list.truncate(MAX_IMAGES);
    let image = |image: v1::Image| {
        let mut names: Vec<String> = image.repo_digests.into_iter().chain(image.repo_tags).collect();
        names.truncate(MAX_IMAGE_NAMES);
        ContainerImage { names: Some(names), size_bytes: i64::try_from(image.size).ok() }
    };
    list.into_iter().map(image).filter(|image| image.names.as_ref().is_some_and(|names| !names.is_empty())).collect()
}

/// The status as it is now. `old` gives the transition times and what others wrote.
async fn status(host: &Host, old: &NodeStatus) -> (NodeStatus, Vec<Finding>) {
    let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default();
    let runtime = runtime_state(host).await;
    let findings = findings(host, runtime.problem);
    let mut addresses: Vec<NodeAddress> =
        host.config.node_ips.iter().map(|ip| NodeAddress { type_: "InternalIP".into(), address: ip.to_string() }).collect();
    addresses.push(NodeAddress { type_: "Hostname".into(), address: host.config.node_name.clone() });
    // Extended resources of device plugins or an administrator are kept.
    let keep = |own: &crate::quantity::Resources, old: &Option<crate::quantity::Resources>| {
        let mut all = old.clone().unwrap_or_default();
        all.retain(|name, _| name.contains('/'));
        all.extend(own.clone());
        Some(all)
    };
    let fresh = NodeStatus {
        addresses: Some(addresses),
        capacity: keep(&host.capacity, &old.capacity),
        allocatable: keep(&host.allocatable, &old.allocatable),
        conditions: Some(findings.iter().map(|finding| condition(finding, old, now)).collect()),
        daemon_endpoints: Some(NodeDaemonEndpoints { kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(host.config.port) }) }),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(runtime.supplemental_groups_policy) }),
        images: Some(images(host).await),
        node_info: Some(host.machine.system_info(host.runtime_version.clone())),
        runtime_handlers: (!runtime.handlers.is_empty()).then_some(runtime.handlers),
        ..NodeStatus::default()
    };
    (fresh, findings)
}

/// Both as patches see them, so that fields of others stay out of the difference.
fn difference(old: &NodeStatus, fresh: &NodeStatus) -> Option<serde_json::Value> {
    let mut base = serde_json::to_value(old).unwrap_or_default();
    let fresh = serde_json::to_value(fresh).unwrap_or_default();
    if let (Some(base), Some(fresh)) = (base.as_object_mut(), fresh.as_object()) {
        base.retain(|field, _| fresh.contains_key(field));
        // Conditions of others (NetworkUnavailable) stay.
        let own = |condition: &serde_json::Value| {
            fresh["conditions"].as_array().is_some_and(|list| list.iter().any(|fresh| fresh["type"] == condition["type"]))
        };
        if let Some(conditions) = base.get_mut("conditions").and_then(serde_json::Value::as_array_mut) {
            conditions.retain(own);
        }
    }
    patch::difference(&base, &fresh, patch::NODE_STATUS)
}

fn without_heartbeats(status: &NodeStatus) -> NodeStatus {
    let mut status = status.clone();
    for condition in status.conditions.iter_mut().flatten() {
        condition.last_heartbeat_time = None;
    }
    status
}

/// Registers the node: tries until the API server takes it.
pub async fn register(host: &Arc<Host>) -> Node {
    let mut pause = Duration::from_millis(100);
    loop {
        let (status, findings) = status(host, &NodeStatus::default()).await;
        match host.writer.register_node(&new_node(host, status)).await {
            Ok(node) => {
                info!(node = host.config.node_name, "registered");
                tell(host, &findings, &NodeStatus::default());
                return reconcile(host, node).await;
            }
            Err(error) => debug!(%error, "couldn't register the node yet"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(7));
    }
}

/// A node that was there already may have other labels than this agent wants.
async fn reconcile(host: &Host, node: Node) -> Node {
    let current = node.metadata.labels.clone().unwrap_or_default();
    let wanted = labels(host);
    let annotated = node.metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(ATTACH_ANNOTATION));
    if annotated && wanted.iter().all(|(key, value)| current.get(key) == Some(value)) {
        return node;
    }
    let patch = json!({ "metadata": { "labels": wanted, "annotations": { ATTACH_ANNOTATION: "true" } } });
    match host.writer.patch_node(&patch).await {
        Ok(node) => node,
        Err(error) => {
            warn!(%error, "couldn't set the node's labels");
            node
        }
    }
}

fn tell(host: &Host, findings: &[Finding], old: &NodeStatus) {
    let about = reference_to_node(&host.config.node_name);
    for finding in findings {
        let status = if finding.status { "True" } else { "False" };
        let same = old.conditions.iter().flatten().any(|old| old.type_ == finding.type_ && old.status == status);
        if !same {
            let message = format!("Node {} status is now: {}", host.config.node_name, finding.event);
            host.writer.event(&about, Kind::Normal, finding.event, message);
        }
    }
}

/// Keeps the status true: looked at every period, written when it changed or when the last report is old.
pub async fn keep_status(host: Arc<Host>, mut node: Node) {
    let about = reference_to_node(&host.config.node_name);
    host.writer.event(&about, Kind::Normal, "Starting", "Starting kubelet.");
    let mut reported: Option<Instant> = None;
    let mut period = Duration::from_millis(100);
    loop {
        // The newest the watch has seen, so that other writers' parts are known.
        if let Some(seen) = host.watch.nodes.get(&outrigger_cluster::Key::new("", &host.config.node_name)) {
            node = (*seen).clone();
        }
        let old = node.status.clone().unwrap_or_default();
        let (fresh, findings) = status(&host, &old).await;
        let ready = findings.iter().all(|finding| finding.type_ != "Ready" || finding.status);
        let changed = difference(&without_heartbeats(&old), &without_heartbeats(&fresh)).is_some();
        let due = reported.is_none_or(|at| at.elapsed() >= host.config.status_report_period);
        if changed || due {
            let body = difference(&old, &fresh).map(|status| json!({ "status": status }));
            if let Some(body) = body {
                match host.writer.patch_node_status(&body).await {
                    Ok(written) => {
                        tell(&host, &findings, &old);
                        node = written;
                        reported = Some(Instant::now());
                    }
                    Err(error) if error.code() == Some(404) => {
                        info!("the node's object is gone; it is registered again");
                        node = register(&host).await;
                    }
                    Err(error) => warn!(%error, "couldn't write the node's status"),
                }
            }
        }
        // Until the node is ready for the first time it's looked at more often, so that pods needn't wait for the period.
        period = if ready { host.config.status_update_period } else { (period * 2).min(Duration::from_secs(1)) };
        tokio::time::sleep(period).await;
    }
}

/// Renews the lease four times in its duration.
pub async fn keep_lease(host: Arc<Host>, node_uid: Option<String>) {
    let period = Duration::from_secs(u64::try_from(host.config.lease_seconds).unwrap_or(40)) / 4;
    let mut held = None;
    let mut pause = Duration::from_millis(200);
    loop {
        match host.writer.renew_lease(held.take(), host.config.lease_seconds, node_uid.as_deref()).await {
            Ok(lease) => {
                held = Some(lease);
                pause = Duration::from_millis(200);
                tokio::time::sleep(period).await;
            }
            Err(error) => {
                debug!(%error, "couldn't renew the lease; it is tried again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(7));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_condition(type_: &str, status: &str) -> NodeStatus {
        let condition = NodeCondition { type_: type_.into(), status: status.into(), ..NodeCondition::default() };
        NodeStatus { conditions: Some(vec![condition]), ..NodeStatus::default() }
    }

    #[test]
    fn parts_of_others_are_not_touched() {
        let mut old = with_condition("Ready", "True");
        old.conditions.as_mut().unwrap().push(NodeCondition {
            type_: "NetworkUnavailable".into(),
            status: "False".into(),
            ..NodeCondition::default()
        });
        old.volumes_attached = Some(Vec::new());
        assert_eq!(difference(&old, &with_condition("Ready", "True")), None);
        let patch = difference(&old, &with_condition("Ready", "False")).unwrap();
        assert_eq!(patch["conditions"], json!([{"status": "False", "type": "Ready"}]));
    }
}
