//! Topology spread: keeping a workload's pods even over zones and nodes (pure).
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use outrigger_controllers::objects::{is_terminating, labels, namespace, selects};

use crate::affinity::required_node_matches;
use crate::filter::{Rejection, untolerated_taint};
use crate::snapshot::{NodeInfo, PodInfo, Snapshot};

const HOSTNAME: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";
pub const UNEVEN: &str = "node(s) didn't match pod topology spread constraints";
const NO_LABEL: &str = "node(s) didn't match pod topology spread constraints (missing required label)";

#[derive(Clone, Debug)]
struct Constraint {
    key: String,
    max_skew: i64,
    min_domains: i64,
    selector: Option<LabelSelector>,
    honour_affinity: bool,
    honour_taints: bool,
}

impl Constraint {
    fn new(pod: &Pod, from: &TopologySpreadConstraint) -> Self {
        let mut selector = from.label_selector.clone();
        for key in from.match_label_keys.iter().flatten() {
            if let (Some(selector), Some(value)) = (&mut selector, labels(&pod.metadata).get(key)) {
                let requirement = LabelSelectorRequirement { key: key.clone(), operator: "In".into(), values: Some(vec![value.clone()]) };
                selector.match_expressions.get_or_insert_default().push(requirement);
            }
        }
        Self {
            key: from.topology_key.clone(),
            max_skew: i64::from(from.max_skew),
            min_domains: i64::from(from.min_domains.unwrap_or(1)),
            selector,
            honour_affinity: from.node_affinity_policy.as_deref() != Some("Ignore"),
            honour_taints: from.node_taints_policy.as_deref() == Some("Honor"),
        }
    }

    /// Whether the node's pods count at all.
    fn includes(&self, pod: &Pod, node: &Node) -> bool {
        (!self.honour_affinity || required_node_matches(pod, node)) && (!self.honour_taints || untolerated_taint(pod, node).is_none())
    }

    fn counts(&self, pod: &Pod, other: &Pod) -> bool {
        namespace(&pod.metadata) == namespace(&other.metadata)
            && !is_terminating(&other.metadata)
            && selects(self.selector.as_ref(), labels(&other.metadata))
    }

    fn count_on(&self, pod: &Pod, info: &NodeInfo) -> i64 {
        info.pods.iter().filter(|other| self.counts(pod, &other.pod)).count() as i64
    }
}

fn constraints(pod: &Pod, when: &str) -> Vec<Constraint> {
    let all = pod.spec.iter().flat_map(|spec| spec.topology_spread_constraints.iter().flatten());
    all.filter(|constraint| constraint.when_unsatisfiable == when).map(|constraint| Constraint::new(pod, constraint)).collect()
}

/// The hard constraints, and how many matching pods each domain has.
#[derive(Clone, Debug, Default)]
pub struct Spread {
    constraints: Vec<(Constraint, BTreeMap<String, i64>)>,
}

impl Spread {
    pub fn new(pod: &Pod, snapshot: &Snapshot) -> Self {
        let mut spread =
            Self { constraints: constraints(pod, "DoNotSchedule").into_iter().map(|constraint| (constraint, BTreeMap::new())).collect() };
        if spread.constraints.is_empty() {
            return spread;
        }
        for info in snapshot.nodes.iter().filter(|info| spread.has_all_keys(info)).cloned().collect::<Vec<_>>() {
            for (constraint, domains) in &mut spread.constraints {
                if constraint.includes(pod, &info.node)
                    && let Some(value) = info.label(&constraint.key)
                {
                    *domains.entry(value.to_owned()).or_default() += constraint.count_on(pod, &info);
                }
            }
        }
        spread
    }

    fn has_all_keys(&self, info: &NodeInfo) -> bool {
        self.constraints.iter().all(|(constraint, _)| info.label(&constraint.key).is_some())
    }

    /// Notes that `other` comes to (1) or leaves (-1) a node.
    pub fn change(&mut self, pod: &Pod, other: &PodInfo, info: &NodeInfo, by: i64) {
        if self.constraints.is_empty() || !self.has_all_keys(info) {
            return;
        }
        for (constraint, domains) in &mut self.constraints {
            if constraint.counts(pod, &other.pod)
                && constraint.includes(pod, &info.node)
                && let Some(value) = info.label(&constraint.key)
            {
                *domains.entry(value.to_owned()).or_default() += by;
            }
        }
    }

    pub fn check(&self, pod: &Pod, info: &NodeInfo) -> Result<(), Rejection> {
        for (constraint, domains) in &self.constraints {
            let Some(value) = info.label(&constraint.key) else { return Err(Rejection::final_(NO_LABEL)) };
            let least = if (domains.len() as i64) < constraint.min_domains {
                0
            } else {
                domains.values().copied().min().unwrap_or(i64::from(i32::MAX))
            };
            let own = i64::from(selects(constraint.selector.as_ref(), labels(&pod.metadata)));
            if domains.get(value).copied().unwrap_or(0) + own - least > constraint.max_skew {
                return Err(Rejection::passing(UNEVEN));
            }
        }
        Ok(())
    }
}

/// Scores of the soft constraints, or of the cluster's default ones (zones, then nodes) with the selector of the
/// pod's Services and controllers. None when there is nothing to spread.
pub fn scores(pod: &Pod, default_selector: Option<&LabelSelector>, snapshot: &Snapshot, feasible: &[Arc<NodeInfo>]) -> Option<Vec<i64>> {
    let own = pod.spec.as_ref().is_some_and(|spec| spec.topology_spread_constraints.as_ref().is_some_and(|list| !list.is_empty()));
    let constraints = if own { constraints(pod, "ScheduleAnyway") } else { default_constraints(default_selector?) };
    if constraints.is_empty() {
        return None;
    }
    let ignored = |info: &NodeInfo| own && constraints.iter().any(|constraint| info.label(&constraint.key).is_none());
    let mut domains: Vec<BTreeMap<&str, i64>> = vec![BTreeMap::new(); constraints.len()];
    for info in feasible.iter().filter(|info| !ignored(info)) {
        for (constraint, domains) in constraints.iter().zip(&mut domains).filter(|(constraint, _)| constraint.key != HOSTNAME) {
            if let Some(value) = info.label(&constraint.key) {
                domains.entry(value).or_default();
            }
        }
    }
    for info in snapshot.nodes.iter().filter(|info| !ignored(info)) {
        for (constraint, domains) in constraints.iter().zip(&mut domains) {
            if let Some(count) = info.label(&constraint.key).and_then(|value| domains.get_mut(value))
                && constraint.includes(pod, &info.node)
            {
                *count += constraint.count_on(pod, info);
            }
        }
    }
    let hosts = feasible.iter().filter(|info| !ignored(info)).count();
    let weight = |index: usize| {
        let size = if constraints[index].key == HOSTNAME { hosts } else { domains[index].len() };
        ((size + 2) as f64).ln()
    };
    let raw = |info: &Arc<NodeInfo>| {
        if ignored(info) {
            return None;
        }
        let score = |(index, constraint): (usize, &Constraint)| {
            let value = info.label(&constraint.key)?;
            let count = if constraint.key == HOSTNAME { constraint.count_on(pod, info) } else { *domains[index].get(value)? };
            Some(count as f64 * weight(index) + (constraint.max_skew - 1) as f64)
        };
        Some(constraints.iter().enumerate().filter_map(score).sum::<f64>().round() as i64)
    };
    Some(normalize(feasible.iter().map(raw).collect()))
}

fn default_constraints(selector: &LabelSelector) -> Vec<Constraint> {
    let constraint = |key: &str, max_skew| Constraint {
        key: key.to_owned(),
        max_skew,
        min_domains: 1,
        selector: Some(selector.clone()),
        honour_affinity: true,
        honour_taints: false,
    };
    vec![constraint(HOSTNAME, 3), constraint(ZONE, 5)]
}

/// Few matching pods are good: the scale is turned round.
fn normalize(raw: Vec<Option<i64>>) -> Vec<i64> {
    let least = raw.iter().flatten().copied().min().unwrap_or(0);
    let most = raw.iter().flatten().copied().max().unwrap_or(0);
    raw.into_iter()
        .map(|score| match score {
            None => 0,
            Some(_) if most == 0 => 100,
            Some(score) => 100 * (most + least - score) / most,
        })
        .collect()
}
