//! Removes pods that nobody else will: of nodes that are gone, too many finished ones, and unscheduled ones under deletion.
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::DeleteParams;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use super::eviction::disrupt;
use super::taints::{ready_status, taints};
use crate::Context;
use crate::conditions::TRUE;
use crate::error::{SyncError, unless_gone};
use crate::informers::Informers;
use crate::objects::{Key, by_creation, is_terminal, is_terminating, name, pod_node};

const PERIOD: Duration = Duration::from_secs(20);
/// How long a node may be missing before its pods are.
const QUARANTINE: Duration = Duration::from_secs(40);
/// Finished pods that are kept.
const THRESHOLD: usize = 12500;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let informers = context.informers.clone();
    tasks.spawn(async move {
        let mut missing = HashMap::new();
        loop {
            tokio::time::sleep(PERIOD).await;
            pass(&informers, &mut missing).await;
        }
    });
}

async fn pass(informers: &Informers, missing: &mut HashMap<String, Instant>) {
    let pods = informers.pods.list();
    let nodes = informers.nodes.list();
    let orphaned = gone_nodes(informers, &pods, &nodes, missing).await;
    for pod in pods.iter().filter(|pod| orphaned.contains(pod_node(pod))) {
        info!(pod = %Key::of(&**pod), node = pod_node(pod), "pod's node is gone; the pod is removed");
        remove(informers, pod, "DeletionByPodGC", "PodGC: node no longer exists").await;
    }
    let doomed = excess(&pods, THRESHOLD).into_iter().chain(stranded(&pods, &nodes));
    for pod in doomed {
        remove(informers, &pod, "", "").await;
    }
}

/// Pods under deletion that no kubelet will finish: never scheduled, or on a node declared out of service.
fn stranded(pods: &[Arc<Pod>], nodes: &[Arc<Node>]) -> Vec<Arc<Pod>> {
    let out_of_service = |node: &&Arc<Node>| {
        ready_status(node) != Some(TRUE) && taints(node).iter().any(|taint| taint.key == "node.kubernetes.io/out-of-service")
    };
    let lost: HashSet<&str> = nodes.iter().filter(out_of_service).map(|node| name(&node.metadata)).collect();
    let is_stranded = |pod: &&Arc<Pod>| is_terminating(&pod.metadata) && (pod_node(pod).is_empty() || lost.contains(pod_node(pod)));
    pods.iter().filter(is_stranded).cloned().collect()
}

/// The finished pods beyond the threshold: evicted ones first, then the oldest.
fn excess(pods: &[Arc<Pod>], threshold: usize) -> Vec<Arc<Pod>> {
    let mut finished: Vec<_> = pods.iter().filter(|pod| is_terminal(pod)).cloned().collect();
    let count = finished.len().saturating_sub(threshold);
    if count == 0 {
        return Vec::new();
    }
    let evicted = |pod: &Pod| pod.status.as_ref().and_then(|status| status.reason.as_deref()) == Some("Evicted");
    finished.sort_by(|left, right| evicted(right).cmp(&evicted(left)).then_with(|| by_creation(&left.metadata, &right.metadata)));
    finished.truncate(count);
    finished
}

async fn gone_nodes(
    informers: &Informers,
    pods: &[Arc<Pod>],
    nodes: &[Arc<Node>],
    missing: &mut HashMap<String, Instant>,
) -> HashSet<String> {
    let there: HashSet<&str> = nodes.iter().map(|node| name(&node.metadata)).collect();
    let named: HashSet<&str> = pods.iter().map(|pod| pod_node(pod)).filter(|node| !node.is_empty() && !there.contains(node)).collect();
    missing.retain(|node, _| named.contains(node.as_str()));
    let mut gone = HashSet::new();
    for node in named {
        let since = missing.entry(node.to_owned()).or_insert_with(Instant::now);
        if since.elapsed() >= QUARANTINE && matches!(informers.nodes.get_live(&Key::new("", node)).await, Ok(None)) {
            gone.insert(node.to_owned());
        }
    }
    gone
}

async fn remove(informers: &Informers, pod: &Pod, reason: &str, message: &str) {
    if let Err(error) = try_remove(informers, pod, reason, message).await {
        warn!(pod = %Key::of(pod), error = %error.message(), "can't remove the pod; next pass tries again");
    }
}

/// A pod that nobody runs any more must not seem to run while finalizers hold it: it fails first.
async fn try_remove(informers: &Informers, pod: &Pod, reason: &str, message: &str) -> Result<(), SyncError> {
    if !is_terminal(pod) {
        disrupt(&informers.pods, pod, reason, message, Some("Failed")).await?;
    }
    unless_gone(informers.pods.delete(pod, DeleteParams::default().grace_period(0)).await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::now;

    fn pod(title: &str, node: &str, phase: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some(title.into());
        pod.spec.get_or_insert_default().node_name = (!node.is_empty()).then(|| node.into());
        pod.status.get_or_insert_default().phase = Some(phase.into());
        pod
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<&str> {
        pods.iter().map(|pod| name(&pod.metadata)).collect()
    }

    #[test]
    fn evicted_pods_go_before_older_ones() {
        let mut evicted = pod("c", "n", "Failed");
        evicted.status.as_mut().unwrap().reason = Some("Evicted".into());
        let pods = [Arc::new(pod("a", "n", "Succeeded")), Arc::new(pod("b", "n", "Running")), Arc::new(evicted)];
        assert_eq!(names(&excess(&pods, 1)), ["c"]);
        assert!(excess(&pods, 2).is_empty());
    }

    #[test]
    fn a_dying_pod_without_a_node_is_stranded() {
        let mut dying = pod("a", "", "Pending");
        dying.metadata.deletion_timestamp = Some(now());
        let mut on_node = pod("b", "n", "Running");
        on_node.metadata.deletion_timestamp = Some(now());
        let pods = [Arc::new(dying), Arc::new(on_node), Arc::new(pod("c", "", "Pending"))];
        assert_eq!(names(&stranded(&pods, &[])), ["a"]);
    }
}
