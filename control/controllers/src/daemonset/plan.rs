//! Where a DaemonSet's pods should be, and which of them to replace (pure).
use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration};

use crate::history::HASH_LABEL;
use crate::nodes::eviction::tolerates;
use crate::nodes::selection::required_matches;
use crate::nodes::taints::taints;
use crate::objects::{
    annotation, available_in, by_creation, controller_ref, is_available, is_ready, is_terminating, labels, name, pod_node, pod_phase,
    scaled,
};
use crate::pods;

/// The set's pods by node.
pub type Daemons = BTreeMap<String, Vec<Arc<Pod>>>;

/// A node's pod of the new revision, and that of an old one.
type Pair = (Option<Arc<Pod>>, Option<Arc<Pod>>);

/// Nodes to get a pod, and pods to go.
#[derive(Debug, Default)]
pub struct Actions {
    pub create: Vec<String>,
    pub delete: Vec<Arc<Pod>>,
    /// To go too, but told about, and failed ones not too often.
    pub failed: Vec<Arc<Pod>>,
    pub succeeded: Vec<Arc<Pod>>,
}

/// What a sync looks at.
pub struct View<'a> {
    pub set: &'a DaemonSet,
    pub hash: &'a str,
    pub nodes: Vec<Arc<Node>>,
    pub daemons: Daemons,
    pub now: Timestamp,
}

const GENERATION: &str = "deprecated.daemonset.template.generation";
const GENERATION_LABEL: &str = "pod-template-generation";

/// The node that a pod is on, or is made for.
pub fn target_node(pod: &Pod) -> String {
    if !pod_node(pod).is_empty() {
        return pod_node(pod).to_owned();
    }
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    let fields =
        required.into_iter().flat_map(|selector| &selector.node_selector_terms).flat_map(|term| term.match_fields.iter().flatten());
    fields
        .filter(|field| field.key == "metadata.name" && field.operator == "In")
        .find_map(|field| field.values.as_ref()?.first().cloned())
        .unwrap_or_default()
}

/// Tolerations that let a daemon run where ordinary pods may not.
fn daemon_tolerations(spec: &PodSpec) -> Vec<Toleration> {
    let mut wanted = vec![
        ("node.kubernetes.io/not-ready", "NoExecute"),
        ("node.kubernetes.io/unreachable", "NoExecute"),
        ("node.kubernetes.io/disk-pressure", "NoSchedule"),
        ("node.kubernetes.io/memory-pressure", "NoSchedule"),
        ("node.kubernetes.io/pid-pressure", "NoSchedule"),
        ("node.kubernetes.io/unschedulable", "NoSchedule"),
    ];
    if spec.host_network == Some(true) {
        wanted.push(("node.kubernetes.io/network-unavailable", "NoSchedule"));
    }
    let mut tolerations = spec.tolerations.clone().unwrap_or_default();
    for (key, effect) in wanted {
        let toleration =
            Toleration { key: Some(key.into()), operator: Some("Exists".into()), effect: Some(effect.into()), ..Default::default() };
        if !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
    tolerations
}

/// The pod for a node: pinned to it, and marked with its revision.
pub fn pod_for(set: &DaemonSet, hash: &str, node: &str) -> Option<Pod> {
    let mut template = set.spec.as_ref()?.template.clone();
    let marks = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    marks.insert(HASH_LABEL.into(), hash.to_owned());
    if let Some(generation) = annotation(&set.metadata, GENERATION) {
        marks.insert(GENERATION_LABEL.into(), generation.to_owned());
    }
    let spec = template.spec.get_or_insert_default();
    spec.tolerations = Some(daemon_tolerations(spec));
    let field = NodeSelectorRequirement { key: "metadata.name".into(), operator: "In".into(), values: Some(vec![node.to_owned()]) };
    let required = spec.affinity.get_or_insert_default().node_affinity.get_or_insert_default();
    let selector = required.required_during_scheduling_ignored_during_execution.get_or_insert_default();
    // Which nodes are fit has been decided: the pin replaces the terms that decided it.
    *selector = NodeSelector { node_selector_terms: vec![NodeSelectorTerm { match_fields: Some(vec![field]), match_expressions: None }] };
    Some(pods::from_template(&set.metadata, &template, controller_ref(set)))
}

/// Whether a pod should be started on the node, and whether one there may stay.
fn suits(set: &DaemonSet, node: &Node) -> (bool, bool) {
    let Some(spec) = set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()) else { return (false, false) };
    let named = spec.node_name.as_deref().is_none_or(|wanted| wanted.is_empty() || wanted == name(&node.metadata));
    if !named || !required_matches(spec, node) {
        return (false, false);
    }
    let tolerations = daemon_tolerations(spec);
    let bad = |taint: &&Taint| !tolerations.iter().any(|toleration| tolerates(toleration, taint));
    let hard = taints(node).iter().filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute")).find(bad);
    let evicting = taints(node).iter().filter(|taint| taint.effect == "NoExecute").find(bad);
    (hard.is_none(), evicting.is_none())
}

fn oldest_first(pods: &mut [Arc<Pod>]) {
    // Scheduled pods are older in effect, whenever they were made.
    pods.sort_by(|left, right| {
        pod_node(left).is_empty().cmp(&pod_node(right).is_empty()).then_with(|| by_creation(&left.metadata, &right.metadata))
    });
}

pub fn rolls(set: &DaemonSet) -> bool {
    let strategy = set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref());
    strategy.and_then(|strategy| strategy.type_.as_deref()).unwrap_or("RollingUpdate") == "RollingUpdate"
}

impl View<'_> {
    fn min_ready(&self) -> i32 {
        self.set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
    }

    fn is_updated(&self, pod: &Pod) -> bool {
        let generation = annotation(&self.set.metadata, GENERATION);
        labels(&pod.metadata).get(HASH_LABEL).is_some_and(|hash| hash == self.hash)
            || generation.is_some() && labels(&pod.metadata).get(GENERATION_LABEL).map(String::as_str) == generation
    }

    fn is_available(&self, pod: &Pod) -> bool {
        is_available(pod, self.min_ready(), self.now)
    }

    fn on(&self, node: &str) -> &[Arc<Pod>] {
        self.daemons.get(node).map_or(&[], Vec::as_slice)
    }

    fn wanted_nodes(&self) -> usize {
        self.nodes.iter().filter(|node| suits(self.set, node).0).count()
    }

    /// (surge, unavailable) in pods.
    fn limits(&self) -> (usize, usize) {
        let strategy =
            self.set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref()).and_then(|strategy| strategy.rolling_update.clone());
        let strategy = strategy.unwrap_or_default();
        let wanted = i32::try_from(self.wanted_nodes()).unwrap_or(i32::MAX);
        let surge = scaled(strategy.max_surge.as_ref(), wanted, true).unwrap_or(0).max(0) as usize;
        let unavailable = match strategy.max_unavailable.as_ref() {
            None => usize::from(surge == 0),
            value => scaled(value, wanted, true).unwrap_or(1).max(0) as usize,
        };
        if surge == 0 && unavailable == 0 && wanted > 0 { (0, 1) } else { (surge, unavailable) }
    }

    /// What must run where.
    pub fn manage(&self) -> Actions {
        let mut actions = Actions::default();
        for node in &self.nodes {
            self.manage_node(node, &mut actions);
        }
        // Pods for nodes that have gone before they were scheduled; those on lost nodes are the pod collector's.
        for pods in self
            .daemons
            .iter()
            .filter(|(node, _)| !self.nodes.iter().any(|other| name(&other.metadata) == node.as_str()))
            .map(|(_, pods)| pods)
        {
            actions.delete.extend(pods.iter().filter(|pod| pod_node(pod).is_empty() && !is_terminating(&pod.metadata)).cloned());
        }
        actions
    }

    fn manage_node(&self, node: &Node, actions: &mut Actions) {
        let (should_run, may_stay) = suits(self.set, node);
        let title = name(&node.metadata);
        let here = self.on(title);
        if should_run && here.is_empty() {
            actions.create.push(title.to_owned());
            return;
        }
        if !may_stay {
            actions.delete.extend(here.iter().filter(|pod| !is_terminating(&pod.metadata)).cloned());
            return;
        }
        let mut running = Vec::new();
        for pod in here.iter().filter(|pod| !is_terminating(&pod.metadata)) {
            match pod_phase(pod) {
                "Failed" => actions.failed.push(pod.clone()),
                "Succeeded" => actions.succeeded.push(pod.clone()),
                _ => running.push(pod.clone()),
            }
        }
        oldest_first(&mut running);
        if self.limits().0 == 0 {
            actions.delete.extend(running.into_iter().skip(1));
        } else if running.is_empty() {
            if should_run {
                actions.create.push(title.to_owned());
            }
        } else {
            self.prune_surged(running, actions);
        }
    }

    /// While surging, one pod of the new revision and one of an old one may stand side by side.
    fn prune_surged(&self, running: Vec<Arc<Pod>>, actions: &mut Actions) {
        let (mut new, mut old): (Vec<_>, Vec<_>) =
            running.into_iter().partition(|pod| labels(&pod.metadata).get(HASH_LABEL).is_some_and(|hash| hash == self.hash));
        actions.delete.extend(new.split_off(new.len().min(1)));
        actions.delete.extend(old.split_off(old.len().min(1)));
        if let (Some(new), Some(old)) = (new.first(), old.first())
            && (!is_ready(old) || self.is_available(new))
        {
            actions.delete.push(old.clone());
        }
    }

    /// The node's pods that aren't going: of the new revision, and of an old one. None when there are too many.
    fn pair(&self, pods: &[Arc<Pod>]) -> Option<Pair> {
        let staying = pods.iter().filter(|pod| !is_terminating(&pod.metadata));
        let (new, old): (Vec<_>, Vec<_>) = staying.cloned().partition(|pod| self.is_updated(pod));
        (new.len() <= 1 && old.len() <= 1).then(|| (new.into_iter().next(), old.into_iter().next()))
    }

    /// Which old pods to replace now.
    pub fn roll(&self) -> Actions {
        let (surge, unavailable) = self.limits();
        if surge == 0 { self.roll_in_place(unavailable) } else { self.roll_with_surge(surge) }
    }

    fn roll_in_place(&self, limit: usize) -> Actions {
        let mut unavailable = 0usize;
        let (mut at_once, mut candidates) = (Vec::new(), Vec::new());
        for pods in self.daemons.values() {
            match self.pair(pods) {
                Some((Some(new), None)) => unavailable += usize::from(!self.is_available(&new)),
                Some((None, Some(old))) if !self.is_available(&old) => {
                    at_once.push(old);
                    unavailable += 1;
                }
                Some((None, Some(old))) => candidates.push(old),
                _ => unavailable += 1,
            }
        }
        candidates.truncate(limit.saturating_sub(unavailable));
        at_once.extend(candidates);
        Actions { delete: at_once, ..Default::default() }
    }

    fn roll_with_surge(&self, limit: usize) -> Actions {
        let mut actions = Actions::default();
        let (mut surged, mut available) = (0usize, 0usize);
        let (mut candidates, mut misplaced) = (Vec::new(), Vec::new());
        for (title, pods) in &self.daemons {
            let Some((new, old)) = self.pair(pods) else {
                surged += 1;
                continue;
            };
            if old.as_ref().or(new.as_ref()).is_some_and(|pod| self.is_available(pod)) {
                available += 1;
            }
            let Some(old) = old else { continue };
            let belongs = self.nodes.iter().find(|node| name(&node.metadata) == title.as_str()).is_some_and(|node| suits(self.set, node).0);
            match new {
                Some(new) if self.is_available(&new) => actions.delete.push(old),
                Some(_) => surged += 1,
                None if !self.is_available(&old) && belongs => actions.create.push(title.clone()),
                None if !self.is_available(&old) => actions.delete.push(old),
                None if belongs => candidates.push(title.clone()),
                None => misplaced.push(old),
            }
        }
        misplaced.truncate(available.saturating_sub(self.wanted_nodes()));
        actions.delete.extend(misplaced);
        candidates.truncate(limit.saturating_sub(surged));
        actions.create.extend(candidates);
        actions
    }

    pub fn status(&self, current: &DaemonSet) -> DaemonSetStatus {
        let mut status = current.status.clone().unwrap_or_default();
        let (mut desired, mut scheduled, mut misplaced, mut ready, mut available, mut updated) = (0, 0, 0, 0, 0, 0);
        for node in &self.nodes {
            let mut here = self.on(name(&node.metadata)).to_vec();
            if !suits(self.set, node).0 {
                misplaced += i32::from(!here.is_empty());
                continue;
            }
            desired += 1;
            oldest_first(&mut here);
            let Some(pod) = here.first() else { continue };
            scheduled += 1;
            ready += i32::from(is_ready(pod));
            available += i32::from(self.is_available(pod));
            updated += i32::from(self.is_updated(pod));
        }
        let some = |number: i32| (number != 0).then_some(number);
        status.observed_generation = self.set.metadata.generation;
        status.desired_number_scheduled = desired;
        status.current_number_scheduled = scheduled;
        status.number_misscheduled = misplaced;
        status.number_ready = ready;
        status.number_available = some(available);
        status.updated_number_scheduled = some(updated);
        status.number_unavailable = some(desired - available);
        status
    }

    /// When the next ready pod will have been ready for long enough.
    pub fn seconds_to_availability(&self) -> Option<i64> {
        self.daemons.values().flatten().filter_map(|pod| available_in(pod, self.min_ready(), self.now)).filter(|seconds| *seconds > 0).min()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::{DaemonSetSpec, DaemonSetUpdateStrategy, RollingUpdateDaemonSet};
    use k8s_openapi::api::core::v1::{NodeSpec, PodCondition};
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

    use super::*;

    fn set(surge: i32, unavailable: i32) -> DaemonSet {
        let rolling =
            RollingUpdateDaemonSet { max_surge: Some(IntOrString::Int(surge)), max_unavailable: Some(IntOrString::Int(unavailable)) };
        let mut set = DaemonSet {
            spec: Some(DaemonSetSpec {
                update_strategy: Some(DaemonSetUpdateStrategy { type_: Some("RollingUpdate".into()), rolling_update: Some(rolling) }),
                ..Default::default()
            }),
            ..Default::default()
        };
        set.spec.as_mut().unwrap().template.spec = Some(PodSpec::default());
        set
    }

    fn node(title: &str, taint: Option<(&str, &str)>) -> Arc<Node> {
        let mut node = Node { spec: Some(NodeSpec::default()), ..Default::default() };
        node.metadata.name = Some(title.into());
        node.spec.as_mut().unwrap().taints =
            taint.map(|(key, effect)| vec![Taint { key: key.into(), effect: effect.into(), ..Default::default() }]);
        Arc::new(node)
    }

    fn pod(title: &str, node: &str, hash: &str, ready: bool) -> Arc<Pod> {
        let mut pod = Pod::default();
        pod.metadata.name = Some(title.into());
        pod.metadata.labels = Some([(HASH_LABEL.to_owned(), hash.to_owned())].into());
        pod.spec.get_or_insert_default().node_name = Some(node.into());
        let status = pod.status.get_or_insert_default();
        status.phase = Some("Running".into());
        status.conditions =
            Some(vec![PodCondition { type_: "Ready".into(), status: if ready { "True" } else { "False" }.into(), ..Default::default() }]);
        Arc::new(pod)
    }

    fn view<'a>(set: &'a DaemonSet, nodes: Vec<Arc<Node>>, pods: Vec<Arc<Pod>>) -> View<'a> {
        let mut daemons = Daemons::new();
        pods.into_iter().for_each(|pod| daemons.entry(target_node(&pod)).or_default().push(pod));
        View { set, hash: "new", nodes, daemons, now: Timestamp::now() }
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<&str> {
        pods.iter().map(|pod| name(&pod.metadata)).collect()
    }

    #[test]
    fn every_suitable_node_gets_one_pod() {
        let set = set(0, 1);
        let nodes = vec![
            node("bare", None),
            node("tainted", Some(("dedicated", "NoSchedule"))),
            node("cordoned", Some(("node.kubernetes.io/unschedulable", "NoSchedule"))),
            node("busy", None),
            node("leaving", Some(("out", "NoExecute"))),
        ];
        let pods = vec![pod("one", "busy", "new", true), pod("two", "busy", "new", true), pod("three", "leaving", "new", true)];
        let view = view(&set, nodes, pods);
        let actions = view.manage();
        assert_eq!(actions.create, ["bare", "cordoned"]);
        assert_eq!(names(&actions.delete), ["two", "three"]);
        let status = view.status(&set);
        assert_eq!((status.desired_number_scheduled, status.current_number_scheduled, status.number_misscheduled), (3, 1, 1));
        let made = pod_for(&set, "new", "bare").unwrap();
        assert_eq!((target_node(&made).as_str(), labels(&made.metadata)[HASH_LABEL].as_str()), ("bare", "new"));
    }

    #[test]
    fn old_pods_are_replaced_within_the_limits() {
        let nodes = || ["a", "b", "c"].map(|title| node(title, None)).to_vec();
        let old = || vec![pod("pa", "a", "old", true), pod("pb", "b", "old", true), pod("pc", "c", "old", false)];
        let in_place = set(0, 1);
        assert_eq!(names(&view(&in_place, nodes(), old()).roll().delete), ["pc"], "the unavailable one uses up the limit");
        let two = set(0, 2);
        assert_eq!(names(&view(&two, nodes(), old()).roll().delete), ["pc", "pa"]);
        let surging = set(1, 0);
        let first = view(&surging, nodes(), old()).roll();
        assert_eq!((first.create, first.delete.len()), (vec!["c".to_owned(), "a".to_owned()], 0));
        let mut pods = old();
        pods.push(pod("na", "a", "new", true));
        assert_eq!(names(&view(&surging, nodes(), pods).roll().delete), ["pa"]);
    }
}
