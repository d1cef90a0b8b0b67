//! Which of the possible nodes is best: upstream's scores and weights (pure).
use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use outrigger_controllers::nodes::eviction::tolerates;

use crate::snapshot::{NodeInfo, PodInfo, Snapshot};
use crate::{affinity, neighbours, spread};

const MEBIBYTE: i64 = 1024 * 1024;

/// The weighted sum per feasible node, in their order.
pub fn scores(pod: &PodInfo, default_selector: Option<&LabelSelector>, snapshot: &Snapshot, feasible: &[Arc<NodeInfo>]) -> Vec<i64> {
    let mut sums = vec![0; feasible.len()];
    let mut add = |weight: i64, scores: Vec<i64>| sums.iter_mut().zip(scores).for_each(|(sum, score)| *sum += weight * score);
    add(3, taints(pod, feasible));
    if let Some(scores) = preferences(pod, feasible) {
        add(2, scores);
    }
    add(1, feasible.iter().map(|info| least_allocated(pod, info)).collect());
    if let Some(scores) = spread::scores(&pod.pod, default_selector, snapshot, feasible) {
        add(2, scores);
    }
    if let Some(scores) = neighbours::scores(pod, snapshot, feasible) {
        add(2, scores);
    }
    if pod.requests.cpu > 0 || pod.requests.memory > 0 {
        add(1, feasible.iter().map(|info| balanced(pod, info)).collect());
    }
    add(1, images(pod, snapshot, feasible));
    sums
}

/// Scales to 100 for the greatest; turned round, to 100 for the least.
fn normalize(raw: Vec<i64>, reverse: bool) -> Vec<i64> {
    let most = raw.iter().copied().max().unwrap_or(0);
    raw.into_iter()
        .map(|score| match most {
            0 if reverse => 100,
            0 => score,
            _ if reverse => 100 - 100 * score / most,
            _ => 100 * score / most,
        })
        .collect()
}

/// Fewer PreferNoSchedule taints that the pod doesn't tolerate are better.
fn taints(pod: &PodInfo, feasible: &[Arc<NodeInfo>]) -> Vec<i64> {
    let tolerations = pod.pod.spec.as_ref().and_then(|spec| spec.tolerations.clone()).unwrap_or_default();
    let soft: Vec<_> = tolerations
        .iter()
        .filter(|toleration| toleration.effect.as_deref().is_none_or(|effect| effect.is_empty() || effect == "PreferNoSchedule"))
        .collect();
    let count = |info: &Arc<NodeInfo>| {
        let taints = info.node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let bad = taints.filter(|taint| taint.effect == "PreferNoSchedule" && !soft.iter().any(|toleration| tolerates(toleration, taint)));
        bad.count() as i64
    };
    normalize(feasible.iter().map(count).collect(), true)
}

fn preferences(pod: &PodInfo, feasible: &[Arc<NodeInfo>]) -> Option<Vec<i64>> {
    let affinity = pod.pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = affinity.preferred_during_scheduling_ignored_during_execution.as_ref().filter(|terms| !terms.is_empty())?;
    Some(normalize(feasible.iter().map(|info| affinity::preference(terms, &info.node)).collect(), false))
}

/// What is left free of cpu and memory.
fn least_allocated(pod: &PodInfo, info: &NodeInfo) -> i64 {
    let free = |asked: i64, total: i64| match total {
        0 => None,
        total if asked > total => Some(0),
        total => Some((total - asked) * 100 / total),
    };
    let parts = [
        free(info.assumed.cpu + pod.assumed.cpu, info.allocatable.cpu),
        free(info.assumed.memory + pod.assumed.memory, info.allocatable.memory),
    ];
    let known: Vec<i64> = parts.into_iter().flatten().collect();
    if known.is_empty() { 0 } else { known.iter().sum::<i64>() / known.len() as i64 }
}

/// Cpu and memory used up evenly.
fn balanced(pod: &PodInfo, info: &NodeInfo) -> i64 {
    let share = |asked: i64, total: i64| (asked as f64 / total as f64).min(1.0);
    let (cpu, memory) = (info.allocatable.cpu, info.allocatable.memory);
    if cpu == 0 || memory == 0 {
        return 100;
    }
    let difference = share(info.requested.cpu + pod.requests.cpu, cpu) - share(info.requested.memory + pod.requests.memory, memory);
    ((1.0 - difference.abs() / 2.0) * 100.0) as i64
}

/// Images that are there already, weighed by size and by how many nodes have them.
fn images(pod: &PodInfo, snapshot: &Snapshot, feasible: &[Arc<NodeInfo>]) -> Vec<i64> {
    let Some(spec) = &pod.pod.spec else { return vec![0; feasible.len()] };
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let names: Vec<String> = containers.filter_map(|container| container.image.as_deref()).map(full_name).collect();
    let holders: HashMap<&str, usize> =
        names.iter().map(|name| (name.as_str(), snapshot.nodes.iter().filter(|info| info.images.contains_key(name)).count())).collect();
    let (least, most) = (23 * MEBIBYTE, 1000 * MEBIBYTE * names.len().max(1) as i64);
    let score = |info: &Arc<NodeInfo>| {
        let sum: i64 = names
            .iter()
            .filter_map(|name| Some((*info.images.get(name)? as f64 * holders[name.as_str()] as f64 / snapshot.nodes.len() as f64) as i64))
            .sum();
        100 * (sum.clamp(least, most) - least) / (most - least)
    };
    feasible.iter().map(score).collect()
}

fn full_name(image: &str) -> String {
    if image.rfind(':') <= image.rfind('/') { format!("{image}:latest") } else { image.to_owned() }
}
