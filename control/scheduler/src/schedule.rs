//! One scheduling cycle: a pod and a snapshot in, a node or the reasons against all nodes out (pure).
use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::filter::{self, Rejection, State, concern};
use crate::score;
use crate::snapshot::{NodeInfo, PodInfo, Snapshot};
use crate::volumes::Volumes;

/// What a cycle knows besides the snapshot.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pub volumes: Volumes,
    /// What selects the pod's siblings, from its Services and controllers.
    pub siblings: Option<LabelSelector>,
}

/// Why no node would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FitError {
    pub nodes: usize,
    /// Holds for all nodes, whatever they are.
    pub obstacle: Option<String>,
    pub rejections: BTreeMap<String, Rejection>,
    /// What preemption came to, if it was tried.
    pub preemption: String,
}

impl FitError {
    pub fn concern(&self) -> u16 {
        if self.nodes == 0 {
            return concern::ALL;
        }
        let base = if self.obstacle.is_some() { concern::VOLUMES } else { concern::NODE };
        self.rejections.values().fold(base, |all, rejection| all | rejection.concern)
    }
}

/// `2 Insufficient cpu, 1 node(s) were unschedulable`: how often each reason was given, sorted as text.
pub fn histogram<'a>(reasons: impl Iterator<Item = &'a String>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in reasons {
        *counts.entry(reason).or_default() += 1;
    }
    let mut texts: Vec<String> = counts.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    texts.sort();
    texts.join(", ")
}

impl std::fmt::Display for FitError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no nodes available to schedule pods");
        }
        write!(f, "0/{} nodes are available:", self.nodes)?;
        match &self.obstacle {
            Some(obstacle) => write!(f, " {obstacle}.")?,
            None => {
                let reasons = histogram(self.rejections.values().flat_map(|rejection| &rejection.reasons));
                if !reasons.is_empty() {
                    write!(f, " {reasons}.")?;
                }
            }
        }
        if self.preemption.is_empty() { Ok(()) } else { write!(f, " {}", self.preemption) }
    }
}

/// Whether the pod fits, also once the nominated pods of at least its priority have come to the node.
pub fn fits(pod: &PodInfo, facts: &Facts, state: &State, info: &NodeInfo, snapshot: &Snapshot) -> Result<(), Rejection> {
    let nominated = snapshot.nominated.get(info.name()).into_iter().flatten();
    let expected: Vec<_> = nominated.filter(|other| other.priority() >= pod.priority() && other.uid() != pod.uid()).collect();
    if !expected.is_empty() {
        let (mut crowded, mut crowded_state) = (info.clone(), state.clone());
        for other in expected {
            crowded_state.change(pod, other, info, snapshot, 1);
            crowded.add(other.clone());
        }
        filter::check(pod, &facts.volumes, &crowded_state, &crowded, snapshot)?;
    }
    filter::check(pod, &facts.volumes, state, info, snapshot)
}

/// The node for the pod. `pick` chooses among equally good ones: it gets their number.
pub fn schedule(
    pod: &PodInfo,
    facts: &Facts,
    snapshot: &Snapshot,
    pick: impl FnOnce(usize) -> usize,
) -> Result<Arc<NodeInfo>, Box<FitError>> {
    let mut error = FitError { nodes: snapshot.nodes.len(), ..Default::default() };
    if snapshot.nodes.is_empty() {
        return Err(Box::new(error));
    }
    if let Some(obstacle) = &facts.volumes.obstacle {
        error.obstacle = Some(obstacle.clone());
        return Err(Box::new(error));
    }
    let state = State::new(pod, snapshot);
    // A pod whose victims have gone gets the node it was promised, if it still fits.
    let promised = pod.pod.status.as_ref().and_then(|status| status.nominated_node_name.as_deref()).unwrap_or_default();
    if let Some(info) = snapshot.node(promised).filter(|_| !promised.is_empty())
        && fits(pod, facts, &state, info, snapshot).is_ok()
    {
        return Ok(info.clone());
    }
    let mut feasible = Vec::new();
    for info in &snapshot.nodes {
        match fits(pod, facts, &state, info, snapshot) {
            Ok(()) => feasible.push(info.clone()),
            Err(rejection) => drop(error.rejections.insert(info.name().to_owned(), rejection)),
        }
    }
    match feasible.len() {
        0 => return Err(Box::new(error)),
        1 => return Ok(feasible.remove(0)),
        _ => {}
    }
    let scores = score::scores(pod, facts.siblings.as_ref(), snapshot, &feasible);
    let most = scores.iter().copied().max().unwrap_or(0);
    let best: Vec<usize> = (0..feasible.len()).filter(|place| scores[*place] == most).collect();
    let place = best[pick(best.len()).min(best.len() - 1)];
    Ok(feasible.swap_remove(place))
}
