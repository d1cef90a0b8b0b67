//! Turns a node's conditions into NoSchedule taints, and keeps its old and new labels the same.
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Taint};
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;

use crate::Context;
use crate::informers::Informers;
use crate::objects::{Key, labels};
use crate::store::Store;
use crate::worker::{self, Outcome, Queue};

pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Condition, its bad status, and the taint for it.
const BY_CONDITION: [(&str, &str, &str); 6] = [
    ("Ready", "False", NOT_READY),
    ("Ready", "Unknown", UNREACHABLE),
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
];
/// The label that counts, and the older one that follows it.
const SAME_LABELS: [(&str, &str); 2] = [("kubernetes.io/os", "beta.kubernetes.io/os"), ("kubernetes.io/arch", "beta.kubernetes.io/arch")];

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.nodes.on_change(move |_, new| {
        if let Some(node) = new {
            add.add(Key::of(&**node));
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("node-taints", queue, 4, move |key| sync(informers.clone(), key)));
}

async fn sync(informers: Arc<Informers>, key: Key) -> Outcome {
    let Some(node) = informers.nodes.get(&key) else { return Ok(None) };
    if let Some(taints) = with_no_schedule(&node) {
        write(&informers.nodes, &node, taints).await?;
    }
    let Some(node) = informers.nodes.get(&key) else { return Ok(None) };
    let missing: Map<String, Value> = SAME_LABELS
        .iter()
        .filter_map(|(first, second)| {
            let value = labels(&node.metadata).get(*first)?;
            (labels(&node.metadata).get(*second) != Some(value)).then(|| ((*second).to_owned(), Value::from(value.clone())))
        })
        .collect();
    if !missing.is_empty() {
        informers.nodes.strategic(&key, json!({"metadata": {"labels": missing}})).await?;
    }
    Ok(None)
}

/// Replaces a node's taints, provided that nobody else wrote the node meanwhile.
pub async fn write(nodes: &Store<Node>, node: &Node, taints: Vec<Taint>) -> Result<Arc<Node>, crate::SyncError> {
    let taints = if taints.is_empty() { Value::Null } else { json!(taints) };
    nodes.merge(&Key::of(node), json!({"metadata": {"resourceVersion": node.metadata.resource_version}, "spec": {"taints": taints}})).await
}

pub fn taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()
}

pub fn ready_status(node: &Node) -> Option<&str> {
    let conditions = node.status.as_ref()?.conditions.iter().flatten();
    conditions.into_iter().find(|condition| condition.type_ == "Ready").map(|condition| condition.status.as_str())
}

/// The taints after those of NoSchedule follow the conditions; None when they do.
fn with_no_schedule(node: &Node) -> Option<Vec<Taint>> {
    let conditions: Vec<_> = node.status.iter().flat_map(|status| status.conditions.iter().flatten()).collect();
    let mut wanted: Vec<&str> = BY_CONDITION
        .iter()
        .filter(|(kind, status, _)| conditions.iter().any(|condition| condition.type_ == *kind && condition.status == *status))
        .map(|(.., key)| *key)
        .collect();
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        wanted.push(UNSCHEDULABLE);
    }
    let ours = |taint: &Taint| {
        taint.effect == "NoSchedule" && (taint.key == UNSCHEDULABLE || BY_CONDITION.iter().any(|(.., key)| *key == taint.key))
    };
    let current: Vec<&Taint> = taints(node).iter().filter(|taint| ours(taint)).collect();
    if current.len() == wanted.len() && wanted.iter().all(|key| current.iter().any(|taint| taint.key == *key)) {
        return None;
    }
    let mut result: Vec<Taint> =
        taints(node).iter().filter(|taint| !ours(taint) || wanted.contains(&taint.key.as_str())).cloned().collect();
    for key in wanted {
        if !current.iter().any(|taint| taint.key == key) {
            result.push(Taint { key: key.into(), effect: "NoSchedule".into(), value: None, time_added: Some(crate::objects::now()) });
        }
    }
    Some(result)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::NodeCondition;

    use super::*;

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        let mut node = Node::default();
        let keys = |taints: &[Taint]| taints.iter().map(|taint| taint.key.clone()).collect::<Vec<_>>();
        let own = Taint { key: "dedicated".into(), effect: "NoSchedule".into(), ..Default::default() };
        node.spec.get_or_insert_default().taints = Some(vec![own]);
        assert!(with_no_schedule(&node).is_none());
        node.status.get_or_insert_default().conditions =
            Some(vec![NodeCondition { type_: "Ready".into(), status: "Unknown".into(), ..Default::default() }]);
        node.spec.as_mut().unwrap().unschedulable = Some(true);
        let tainted = with_no_schedule(&node).unwrap();
        assert_eq!(keys(&tainted), ["dedicated", UNREACHABLE, UNSCHEDULABLE]);
        node.spec.as_mut().unwrap().taints = Some(tainted);
        assert!(with_no_schedule(&node).is_none());
        node.status = None;
        node.spec.as_mut().unwrap().unschedulable = None;
        assert_eq!(keys(&with_no_schedule(&node).unwrap()), ["dedicated"]);
    }
}
