//! Watches the nodes' heartbeats: a silent node becomes Unknown, its pods unready, and it is tainted NoExecute.
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use super::taints::{self, NOT_READY, UNREACHABLE, ready_status};
use crate::Context;
use crate::conditions::{self, FALSE, TRUE, UNKNOWN};
use crate::error::{SyncError, unless_gone};
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, labels, name, pod_condition, pod_node, seconds};

const PERIOD: Duration = Duration::from_secs(5);
/// Silence after which a node that has reported before is given up, and one that never has.
const GRACE: Duration = Duration::from_secs(40);
const STARTUP_GRACE: Duration = Duration::from_secs(60);
/// Nodes tainted NoExecute per second and zone, so that a fault of the control plane can't empty the cluster at once.
const RATE: f64 = 0.1;
const REDUCED_RATE: f64 = 0.01;
/// Share of unready nodes from which a zone counts as disrupted, and the size from which it is still emptied slowly.
const UNHEALTHY_SHARE: f64 = 0.55;
const LARGE_ZONE: usize = 50;
const JUDGED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let mut monitor = Monitor {
        informers: context.informers.clone(),
        recorder: context.recorder.named("node-controller"),
        known: HashMap::new(),
        zones: HashMap::new(),
    };
    tasks.spawn(async move {
        loop {
            monitor.pass().await;
            tokio::time::sleep(PERIOD).await;
        }
    });
}

/// The last sign of life seen of a node.
struct Sign {
    heartbeat: Option<Timestamp>,
    lease: Option<MicroTime>,
    at: Instant,
    reported: bool,
    uid: Option<String>,
    /// Its pods must still be marked unready.
    pods_pending: bool,
}

struct Monitor {
    informers: Arc<Informers>,
    recorder: Recorder,
    known: HashMap<String, Sign>,
    /// When the zone may lose its next node.
    zones: HashMap<String, Instant>,
}

fn ready(node: &Node) -> Option<&NodeCondition> {
    conditions::find(node.status.as_ref().and_then(|status| status.conditions.as_ref()), "Ready")
}

fn zone(node: &Node) -> String {
    let label = |key: &str| labels(&node.metadata).get(key).cloned().unwrap_or_default();
    format!("{}:{}", label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"))
}

impl Monitor {
    async fn pass(&mut self) {
        let nodes = self.informers.nodes.list();
        self.note_comings_and_goings(&nodes);
        let mut judged = Vec::with_capacity(nodes.len());
        for node in nodes {
            match self.judge(&node).await {
                Ok(node) => judged.push(node),
                Err(error) if error.is_not_found() => {}
                Err(error) => warn!(node = name(&node.metadata), error = %error.message(), "can't judge the node; next pass tries again"),
            }
        }
        self.taint(&judged).await;
    }

    fn note_comings_and_goings(&mut self, nodes: &[Arc<Node>]) {
        let about = |node_name: &str, uid: Option<String>| k8s_openapi::api::core::v1::ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Node".into()),
            name: Some(node_name.to_owned()),
            uid,
            ..Default::default()
        };
        for node in nodes.iter().filter(|node| !self.known.contains_key(name(&node.metadata))) {
            let title = name(&node.metadata);
            let message = format!("Node {title} event: Registered Node {title} in Controller");
            self.recorder.record(about(title, node.metadata.uid.clone()), crate::events::Severity::Normal, "RegisteredNode", message);
        }
        let recorder = self.recorder.clone();
        self.known.retain(|title, sign| {
            let there = nodes.iter().any(|node| name(&node.metadata) == title);
            if !there {
                let message = format!("Node {title} event: Removing Node {title} from Controller");
                recorder.record(about(title, sign.uid.clone()), crate::events::Severity::Normal, "RemovingNode", message);
            }
            there
        });
    }

    /// Notes signs of life; without any for too long, declares the node's state unknown.
    async fn judge(&mut self, node: &Arc<Node>) -> Result<Arc<Node>, SyncError> {
        let title = name(&node.metadata).to_owned();
        let heartbeat = ready(node).and_then(|ready| ready.last_heartbeat_time.as_ref()).map(|time| time.0);
        let lease = self.informers.leases.get(&Key::new("kube-node-lease", &title)).and_then(|lease| lease.spec.clone()?.renew_time);
        let sign = self.known.entry(title.clone()).or_insert_with(|| Sign {
            heartbeat: None,
            lease: None,
            at: Instant::now(),
            reported: false,
            uid: node.metadata.uid.clone(),
            pods_pending: false,
        });
        sign.reported |= ready(node).is_some();
        // Our own judgement moves the heartbeat of no condition, so a change is the node's doing.
        if heartbeat.is_some() && heartbeat != sign.heartbeat || lease.is_some() && lease != sign.lease {
            sign.at = Instant::now();
        }
        (sign.heartbeat, sign.lease) = (heartbeat, lease);
        let was_ready = ready_status(node) == Some(TRUE);
        let grace = if sign.reported { GRACE } else { STARTUP_GRACE };
        let mut current = node.clone();
        if sign.at.elapsed() > grace
            && let Some(updated) = without_news(node, Timestamp::now())
        {
            info!(node = title, silent = ?sign.at.elapsed(), "node is silent; its state is unknown now");
            current = self.informers.nodes.update_status(&updated).await?;
        }
        if was_ready && ready_status(&current) != Some(TRUE) {
            self.recorder.normal(&*current, "NodeNotReady", format!("Node {title} status is now: NodeNotReady"));
            sign.pods_pending = true;
        }
        // A node may say itself that it isn't ready; the pods on it then are as unready as on a silent one.
        let pending = sign.pods_pending && ready_status(&current) != Some(TRUE);
        if pending {
            self.mark_pods(&title).await?;
        }
        if let Some(sign) = self.known.get_mut(&title) {
            sign.pods_pending = false;
        }
        Ok(current)
    }

    async fn mark_pods(&self, node: &str) -> Result<(), SyncError> {
        let pods: Vec<_> = self.informers.pods.list().into_iter().filter(|pod| pod_node(pod) == node).collect();
        for pod in pods.iter().filter(|pod| pod_condition(pod, "Ready").is_some_and(|condition| condition.status != FALSE)) {
            unless_gone(self.informers.pods.update_status(&unready(pod, Timestamp::now())).await)?;
            self.recorder.warning(&**pod, "NodeNotReady", "Node is not ready");
        }
        Ok(())
    }

    async fn taint(&mut self, nodes: &[Arc<Node>]) {
        let zones = zones(nodes);
        let all_lost = !zones.is_empty() && zones.values().all(|zone| zone.state == Disruption::Full);
        for node in nodes {
            let wanted = match ready_status(node) {
                // With every zone lost, it is more likely us who can't see.
                _ if all_lost => None,
                Some(FALSE) => Some(NOT_READY),
                Some(UNKNOWN) => Some(UNREACHABLE),
                _ => None,
            };
            if with_no_execute(node, wanted).is_none() {
                continue;
            }
            let has_other = taints::taints(node)
                .iter()
                .any(|taint| taint.effect == "NoExecute" && [NOT_READY, UNREACHABLE].contains(&taint.key.as_str()));
            if wanted.is_some() && !has_other && !self.may_taint(&zone(node), zones.get(&zone(node))) {
                continue;
            }
            if let Err(error) = self.write_taints(node, wanted).await {
                warn!(node = name(&node.metadata), error = %error.message(), "can't change the node's taints; next pass tries again");
            }
        }
    }

    /// Others write nodes at the same moment, for the same reasons: a conflict is tried again at once.
    async fn write_taints(&self, node: &Node, wanted: Option<&str>) -> Result<(), SyncError> {
        let key = Key::of(node);
        let mut attempts = 0;
        loop {
            let Some(current) = self.informers.nodes.get(&key) else { return Ok(()) };
            let Some(taints) = with_no_execute(&current, wanted) else { return Ok(()) };
            attempts += 1;
            match taints::write(&self.informers.nodes, &current, taints).await {
                Err(error) if error.is_conflict() && attempts < 5 => tokio::time::sleep(Duration::from_millis(20 * attempts)).await,
                other => return other.map(drop),
            }
        }
    }

    fn may_taint(&mut self, zone: &str, state: Option<&Zone>) -> bool {
        let rate = match state {
            Some(Zone { state: Disruption::Partial, size }) if *size > LARGE_ZONE => REDUCED_RATE,
            Some(Zone { state: Disruption::Partial, .. }) => return false,
            _ => RATE,
        };
        let now = Instant::now();
        if self.zones.get(zone).is_some_and(|next| *next > now) {
            return false;
        }
        self.zones.insert(zone.to_owned(), now + Duration::from_secs_f64(1.0 / rate));
        true
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disruption {
    None,
    Partial,
    Full,
}

struct Zone {
    state: Disruption,
    size: usize,
}

fn zones(nodes: &[Arc<Node>]) -> BTreeMap<String, Zone> {
    let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for node in nodes.iter().filter(|node| !labels(&node.metadata).contains_key("node.kubernetes.io/exclude-disruption")) {
        let count = counts.entry(zone(node)).or_default();
        match ready_status(node) {
            Some(TRUE) => count.0 += 1,
            _ => count.1 += 1,
        }
    }
    let zone = |(ready, unready): (usize, usize)| {
        let size = ready + unready;
        let state = match (ready, unready) {
            (0, 1..) => Disruption::Full,
            (_, 3..) if unready as f64 / size as f64 >= UNHEALTHY_SHARE => Disruption::Partial,
            _ => Disruption::None,
        };
        Zone { state, size }
    };
    counts.into_iter().map(|(key, count)| (key, zone(count))).collect()
}

/// The node with its judged conditions unknown; None when they are.
fn without_news(node: &Node, now: Timestamp) -> Option<Node> {
    let mut updated = node.clone();
    let list = updated.status.get_or_insert_default().conditions.get_or_insert_default();
    for kind in JUDGED {
        match list.iter_mut().find(|condition| condition.type_ == kind) {
            None => list.push(NodeCondition {
                type_: kind.into(),
                status: UNKNOWN.into(),
                reason: Some("NodeStatusNeverUpdated".into()),
                message: Some("Kubelet never posted node status.".into()),
                last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                last_transition_time: Some(seconds(now)),
            }),
            Some(condition) if condition.status != UNKNOWN => {
                condition.status = UNKNOWN.into();
                condition.reason = Some("NodeStatusUnknown".into());
                condition.message = Some("Kubelet stopped posting node status.".into());
                condition.last_transition_time = Some(seconds(now));
            }
            Some(_) => {}
        }
    }
    (updated != *node).then_some(updated)
}

fn unready(pod: &Pod, now: Timestamp) -> Pod {
    let mut updated = pod.clone();
    let conditions = updated.status.get_or_insert_default().conditions.get_or_insert_default();
    for condition in conditions.iter_mut().filter(|condition| condition.type_ == "Ready") {
        condition.status = FALSE.into();
        condition.last_transition_time = Some(seconds(now));
    }
    updated
}

/// The taints with exactly `wanted` of our two NoExecute ones; None when it is so.
fn with_no_execute(node: &Node, wanted: Option<&str>) -> Option<Vec<Taint>> {
    let ours = |taint: &Taint| taint.effect == "NoExecute" && [NOT_READY, UNREACHABLE].contains(&taint.key.as_str());
    let current: Vec<&str> = taints::taints(node).iter().filter(|taint| ours(taint)).map(|taint| taint.key.as_str()).collect();
    if current == wanted.into_iter().collect::<Vec<_>>() {
        return None;
    }
    let mut result: Vec<Taint> = taints::taints(node).iter().filter(|taint| !ours(taint)).cloned().collect();
    result.extend(wanted.map(|key| Taint {
        key: key.into(),
        effect: "NoExecute".into(),
        value: None,
        time_added: Some(crate::objects::now()),
    }));
    Some(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(title: &str, status: &str) -> Arc<Node> {
        let mut node = Node::default();
        node.metadata.name = Some(title.into());
        node.status.get_or_insert_default().conditions =
            Some(vec![NodeCondition { type_: "Ready".into(), status: status.into(), ..Default::default() }]);
        Arc::new(node)
    }

    #[test]
    fn a_silent_node_becomes_unknown_once() {
        let silent = without_news(&node("a", TRUE), Timestamp::from_second(5).unwrap()).unwrap();
        let conditions = silent.status.as_ref().unwrap().conditions.clone().unwrap();
        let shown: Vec<_> = conditions
            .iter()
            .map(|condition| (condition.type_.as_str(), condition.status.as_str(), condition.reason.as_deref().unwrap()))
            .collect();
        assert_eq!(shown[0], ("Ready", UNKNOWN, "NodeStatusUnknown"));
        assert_eq!(shown[1], ("MemoryPressure", UNKNOWN, "NodeStatusNeverUpdated"));
        assert!(without_news(&silent, Timestamp::now()).is_none());
    }

    #[test]
    fn zones_tell_a_lost_node_from_a_lost_zone() {
        let count = |ready: usize, unready: usize| {
            let mut nodes: Vec<_> = (0..ready).map(|number| node(&format!("r{number}"), TRUE)).collect();
            nodes.extend((0..unready).map(|number| node(&format!("u{number}"), UNKNOWN)));
            zones(&nodes).into_values().next().map(|zone| zone.state)
        };
        assert_eq!(count(2, 1), Some(Disruption::None));
        assert_eq!(count(2, 3), Some(Disruption::Partial));
        assert_eq!(count(0, 1), Some(Disruption::Full));
        assert_eq!(count(0, 0), None);
    }

    #[test]
    fn the_two_taints_exclude_each_other() {
        let first = with_no_execute(&node("a", FALSE), Some(NOT_READY)).unwrap();
        let mut tainted = (*node("a", UNKNOWN)).clone();
        tainted.spec.get_or_insert_default().taints = Some(first);
        assert!(with_no_execute(&tainted, Some(NOT_READY)).is_none());
        let second = with_no_execute(&tainted, Some(UNREACHABLE)).unwrap();
        assert_eq!(second.iter().map(|taint| taint.key.as_str()).collect::<Vec<_>>(), [UNREACHABLE]);
        assert_eq!(with_no_execute(&tainted, None), Some(vec![]));
    }
}
