//! Which nodes a pod can go to at all, and in what words it can't (pure).
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use outrigger_controllers::nodes::eviction::tolerates;

use crate::affinity::{node_selector_matches, required_node_matches};
use crate::neighbours::Neighbours;
use crate::resources::Resources;
use crate::snapshot::{NodeInfo, PodInfo, Snapshot};
use crate::spread::Spread;
use crate::volumes::Volumes;

/// What kind of change could help a rejected pod.
pub mod concern {
    pub const NODE: u16 = 1;
    pub const RESOURCES: u16 = 1 << 1;
    pub const PORTS: u16 = 1 << 2;
    pub const SPREAD: u16 = 1 << 3;
    pub const NEIGHBOURS: u16 = 1 << 4;
    pub const VOLUMES: u16 = 1 << 5;
    pub const ALL: u16 = u16::MAX;
}

/// Why a node won't do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub reasons: Vec<String>,
    /// Whether the end of other pods could help.
    pub resolvable: bool,
    pub concern: u16,
}

impl Rejection {
    pub fn passing(reason: &str) -> Self {
        Self { reasons: vec![reason.to_owned()], resolvable: true, concern: 0 }
    }

    pub fn final_(reason: &str) -> Self {
        Self { reasons: vec![reason.to_owned()], resolvable: false, concern: 0 }
    }

    fn about(mut self, concern: u16) -> Self {
        self.concern = concern;
        self
    }
}

/// What is counted over the whole cluster once per cycle.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub spread: Spread,
    pub neighbours: Neighbours,
}

impl State {
    pub fn new(pod: &PodInfo, snapshot: &Snapshot) -> Self {
        Self { spread: Spread::new(&pod.pod, snapshot), neighbours: Neighbours::new(pod, snapshot) }
    }

    /// Notes that `other` comes to (1) or leaves (-1) a node.
    pub fn change(&mut self, pod: &PodInfo, other: &PodInfo, info: &NodeInfo, snapshot: &Snapshot, by: i64) {
        self.spread.change(&pod.pod, other, info, by);
        self.neighbours.change(pod, other, info, snapshot, by);
    }
}

/// The first taint of the node that keeps the pod out.
pub fn untolerated_taint<'a>(pod: &Pod, node: &'a Node) -> Option<&'a Taint> {
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let keeps_out = |taint: &&Taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute");
    taints.iter().filter(keeps_out).find(|taint| !tolerations.iter().any(|toleration| tolerates(toleration, taint)))
}

fn unschedulable(pod: &Pod, node: &Node) -> bool {
    let cordon = Taint { key: "node.kubernetes.io/unschedulable".into(), effect: "NoSchedule".into(), ..Default::default() };
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
    node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true)
        && !tolerations.iter().any(|toleration| tolerates(toleration, &cordon))
}

/// All that is missing of what the pod asks for.
fn fit(pod: &PodInfo, info: &NodeInfo) -> Result<(), Rejection> {
    let mut reasons = Vec::new();
    let mut resolvable = true;
    if info.pods.len() as i64 + 1 > info.allowed_pods {
        reasons.push("Too many pods".to_owned());
    }
    let mut compare = |name: &str, asked: i64, of: &dyn Fn(&Resources) -> i64| {
        if asked > 0 && asked > of(&info.allocatable) - of(&info.requested) {
            reasons.push(format!("Insufficient {name}"));
            resolvable &= asked <= of(&info.allocatable);
        }
    };
    if !pod.requests.is_nothing() {
        compare("cpu", pod.requests.cpu, &|of| of.cpu);
        compare("memory", pod.requests.memory, &|of| of.memory);
        compare("ephemeral-storage", pod.requests.storage, &|of| of.storage);
        for (name, asked) in &pod.requests.others {
            compare(name, *asked, &|of| of.get(name));
        }
    }
    if reasons.is_empty() { Ok(()) } else { Err(Rejection { reasons, resolvable, concern: concern::RESOURCES }) }
}

/// Runs all filters, in upstream's order, until one says no.
pub fn check(pod: &PodInfo, volumes: &Volumes, state: &State, info: &NodeInfo, snapshot: &Snapshot) -> Result<(), Rejection> {
    let spec = pod.pod.spec.as_ref();
    if unschedulable(&pod.pod, &info.node) {
        return Err(Rejection::final_("node(s) were unschedulable").about(concern::NODE));
    }
    if spec.and_then(|spec| spec.node_name.as_deref()).is_some_and(|name| !name.is_empty() && name != info.name()) {
        return Err(Rejection::final_("node(s) didn't match the requested node name").about(concern::NODE));
    }
    if untolerated_taint(&pod.pod, &info.node).is_some() {
        return Err(Rejection::final_("node(s) had untolerated taint(s)").about(concern::NODE));
    }
    if !required_node_matches(&pod.pod, &info.node) {
        return Err(Rejection::final_("node(s) didn't match Pod's node affinity/selector").about(concern::NODE));
    }
    let mut ports = pod.host_ports().peekable();
    if ports.peek().is_some() {
        let used = info.used_ports();
        if ports.any(|port| used.iter().any(|other| other.conflicts(&port))) {
            return Err(
                Rejection::passing("node(s) didn't have free ports for the requested pod ports").about(concern::PORTS | concern::NODE)
            );
        }
    }
    fit(pod, info).map_err(|rejection| rejection.about(concern::RESOURCES | concern::NODE))?;
    volumes.check(info, node_selector_matches).map_err(|rejection| rejection.about(concern::VOLUMES | concern::NODE))?;
    state.spread.check(&pod.pod, info).map_err(|rejection| rejection.about(concern::SPREAD | concern::NODE))?;
    state.neighbours.check(pod, info, snapshot).map_err(|rejection| rejection.about(concern::NEIGHBOURS | concern::NODE))
}
