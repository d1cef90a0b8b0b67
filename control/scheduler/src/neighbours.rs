//! Inter-pod affinity: near these pods, away from those (pure).
use std::collections::HashMap;
use std::sync::Arc;

use crate::affinity::{PodTerms, Term};
use crate::filter::Rejection;
use crate::snapshot::{NodeInfo, PodInfo, Snapshot};

pub const NOT_NEAR: &str = "node(s) didn't match pod affinity rules";
pub const TOO_NEAR: &str = "node(s) didn't match pod anti-affinity rules";
pub const UNWELCOME: &str = "node(s) didn't satisfy existing pods anti-affinity rules";
/// What a pod's required affinity counts for when others are scored.
const HARD_WEIGHT: i64 = 1;

/// Topology key and value to the number of matches.
type Counts = HashMap<(String, String), i64>;

#[derive(Clone, Debug, Default)]
pub struct Neighbours {
    near: Counts,
    far: Counts,
    /// Pods there that don't want this one.
    unwelcome: Counts,
}

fn bump(counts: &mut Counts, info: &NodeInfo, key: &str, by: i64) {
    if let Some(value) = info.label(key) {
        let pair = (key.to_owned(), value.to_owned());
        let count = counts.entry(pair.clone()).or_default();
        *count += by;
        if *count == 0 {
            counts.remove(&pair);
        }
    }
}

fn required(pod: &PodInfo) -> (&[Term], &[Term]) {
    pod.terms.as_ref().map_or((&[], &[]), |terms| (&terms.affinity, &terms.anti_affinity))
}

fn matches_all(terms: &[Term], pod: &PodInfo, snapshot: &Snapshot) -> bool {
    !terms.is_empty() && terms.iter().all(|term| term.matches(&pod.pod, |space| snapshot.namespace_labels(space)))
}

impl Neighbours {
    pub fn new(pod: &PodInfo, snapshot: &Snapshot) -> Self {
        let mut neighbours = Self::default();
        let (near, far) = required(pod);
        let picky = !near.is_empty() || !far.is_empty();
        for info in &snapshot.nodes {
            for other in info.pods.iter().filter(|other| picky || other.terms.is_some()) {
                neighbours.change(pod, other, info, snapshot, 1);
            }
        }
        neighbours
    }

    /// Notes that `other` comes to (1) or leaves (-1) a node.
    pub fn change(&mut self, pod: &PodInfo, other: &PodInfo, info: &NodeInfo, snapshot: &Snapshot, by: i64) {
        let labels = |space: &str| snapshot.namespace_labels(space);
        for term in required(other).1.iter().filter(|term| term.matches(&pod.pod, labels)) {
            bump(&mut self.unwelcome, info, &term.topology_key, by);
        }
        let (near, far) = required(pod);
        if matches_all(near, other, snapshot) {
            near.iter().for_each(|term| bump(&mut self.near, info, &term.topology_key, by));
        }
        for term in far.iter().filter(|term| term.matches(&other.pod, labels)) {
            bump(&mut self.far, info, &term.topology_key, by);
        }
    }

    pub fn check(&self, pod: &PodInfo, info: &NodeInfo, snapshot: &Snapshot) -> Result<(), Rejection> {
        let (near, far) = required(pod);
        let count = |counts: &Counts, key: &str, value: &str| counts.get(&(key.to_owned(), value.to_owned())).copied().unwrap_or(0);
        let mut all_near = true;
        for term in near {
            match info.label(&term.topology_key) {
                Some(value) => all_near &= count(&self.near, &term.topology_key, value) > 0,
                None => return Err(Rejection::final_(NOT_NEAR)),
            }
        }
        // The first of a group that wants to be near itself has nobody to be near to.
        let first_of_its_kind = self.near.is_empty() && matches_all(near, pod, snapshot);
        if !all_near && !first_of_its_kind {
            return Err(Rejection::final_(NOT_NEAR));
        }
        let too_near = |term: &Term| info.label(&term.topology_key).is_some_and(|value| count(&self.far, &term.topology_key, value) > 0);
        if !self.far.is_empty() && far.iter().any(too_near) {
            return Err(Rejection::passing(TOO_NEAR));
        }
        if self.unwelcome.iter().any(|((key, value), count)| *count > 0 && info.label(key) == Some(value)) {
            return Err(Rejection::passing(UNWELCOME));
        }
        Ok(())
    }
}

/// Scores by preferences on both sides. None when nobody has any.
pub fn scores(pod: &PodInfo, snapshot: &Snapshot, feasible: &[Arc<NodeInfo>]) -> Option<Vec<i64>> {
    let own = pod.terms.as_deref().filter(|terms| !terms.preferred.is_empty() || !terms.anti_preferred.is_empty());
    let mut sums = Counts::new();
    for info in &snapshot.nodes {
        for other in info.pods.iter().filter(|other| own.is_some() || other.terms.is_some()) {
            add_preferences(&mut sums, own, pod, other, info, snapshot);
        }
    }
    if sums.is_empty() {
        return None;
    }
    let raw: Vec<i64> = feasible
        .iter()
        .map(|info| sums.iter().filter(|((key, value), _)| info.label(key) == Some(value)).map(|(_, sum)| sum).sum())
        .collect();
    let least = raw.iter().copied().min()?;
    let range = raw.iter().copied().max()? - least;
    Some(raw.into_iter().map(|score| if range > 0 { (100.0 * (score - least) as f64 / range as f64) as i64 } else { 0 }).collect())
}

fn add_preferences(sums: &mut Counts, own: Option<&PodTerms>, pod: &PodInfo, other: &PodInfo, info: &NodeInfo, snapshot: &Snapshot) {
    let labels = |space: &str| snapshot.namespace_labels(space);
    let mut add = |terms: &[Term], about: &PodInfo, sign: i64, fixed: Option<i64>| {
        for term in terms.iter().filter(|term| term.matches(&about.pod, labels)) {
            bump(sums, info, &term.topology_key, sign * fixed.unwrap_or(term.weight));
        }
    };
    if let Some(own) = own {
        add(&own.preferred, other, 1, None);
        add(&own.anti_preferred, other, -1, None);
    }
    if let Some(theirs) = &other.terms {
        add(&theirs.affinity, pod, 1, Some(HARD_WEIGHT));
        add(&theirs.preferred, pod, 1, None);
        add(&theirs.anti_preferred, pod, -1, None);
    }
}
