//! Preemption: whom to end so that a more important pod gets a node (pure).
use std::cmp::Reverse;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use outrigger_controllers::objects::{is_terminating, labels, namespace, pod_condition, selects, selects_everything};

use crate::filter::State;
use crate::schedule::{Facts, FitError, fits, histogram};
use crate::snapshot::{NodeInfo, PodInfo, Snapshot};

/// A node, and who must go for it.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub node: String,
    /// Most important first.
    pub victims: Vec<Arc<PodInfo>>,
    violations: usize,
}

fn started(pod: &PodInfo) -> Timestamp {
    let status = pod.pod.status.as_ref();
    status.and_then(|status| status.start_time.as_ref()).map_or_else(Timestamp::now, |time| time.0)
}

/// Sorts the more important pod first: by priority, then by age.
fn importance(pod: &Arc<PodInfo>) -> (Reverse<i32>, Timestamp) {
    (Reverse(pod.priority()), started(pod))
}

/// Why a pod may not preempt, if so.
fn ineligible(pod: &PodInfo, error: &FitError, snapshot: &Snapshot) -> Option<&'static str> {
    if pod.pod.spec.as_ref().and_then(|spec| spec.preemption_policy.as_deref()) == Some("Never") {
        return Some("not eligible due to preemptionPolicy=Never.");
    }
    let promised = pod.pod.status.as_ref().and_then(|status| status.nominated_node_name.as_deref()).filter(|name| !name.is_empty())?;
    if error.rejections.get(promised).is_some_and(|rejection| !rejection.resolvable) {
        return None;
    }
    let preempted = |other: &Pod| {
        is_terminating(&other.metadata)
            && pod_condition(other, "DisruptionTarget")
                .is_some_and(|condition| condition.status == "True" && condition.reason.as_deref() == Some("PreemptionByScheduler"))
    };
    let waiting = snapshot.node(promised)?.pods.iter().any(|other| other.priority() < pod.priority() && preempted(&other.pod));
    waiting.then_some("not eligible due to a terminating pod on the nominated node.")
}

/// The best node to clear, or what to tell about the attempt.
pub fn preempt(
    pod: &PodInfo,
    facts: &Facts,
    error: &FitError,
    snapshot: &Snapshot,
    budgets: &[Arc<PodDisruptionBudget>],
) -> Result<Candidate, String> {
    if error.obstacle.is_some() || snapshot.nodes.is_empty() {
        return Err(String::new());
    }
    if let Some(reason) = ineligible(pod, error, snapshot) {
        return Err(format!("preemption: {reason}"));
    }
    let base = State::new(pod, snapshot);
    let mut reasons: Vec<String> = Vec::new();
    let mut candidates = Vec::new();
    for info in &snapshot.nodes {
        let resolvable = error.rejections.get(info.name()).is_none_or(|rejection| rejection.resolvable);
        if !resolvable {
            reasons.push("Preemption is not helpful for scheduling".into());
            continue;
        }
        match victims(pod, facts, &base, info, snapshot, budgets) {
            Ok(candidate) => candidates.push(candidate),
            Err(why) => reasons.extend(why),
        }
    }
    match best(candidates) {
        Some(candidate) => Ok(candidate),
        None => Err(format!("preemption: 0/{} nodes are available: {}.", snapshot.nodes.len(), histogram(reasons.iter()))),
    }
}

/// The fewest and least important pods whose end makes room on this node.
fn victims(
    pod: &PodInfo,
    facts: &Facts,
    base: &State,
    info: &NodeInfo,
    snapshot: &Snapshot,
    budgets: &[Arc<PodDisruptionBudget>],
) -> Result<Candidate, Vec<String>> {
    let (mut cleared, mut state) = (info.clone(), base.clone());
    let mut lower: Vec<Arc<PodInfo>> = info.pods.iter().filter(|other| other.priority() < pod.priority()).cloned().collect();
    if lower.is_empty() {
        return Err(vec!["No preemption victims found for incoming pod".into()]);
    }
    for other in &lower {
        cleared.remove(other.uid());
        state.change(pod, other, info, snapshot, -1);
    }
    fits(pod, facts, &state, &cleared, snapshot).map_err(|rejection| rejection.reasons)?;
    lower.sort_by_key(importance);
    let (violating, harmless) = split_by_budget(lower, budgets);
    let mut victims = Vec::new();
    let mut violations = 0;
    // Whoever may stay without taking the room stays, the budgets' wards first.
    let chances = violating.into_iter().map(|other| (other, true)).chain(harmless.into_iter().map(|other| (other, false)));
    for (other, is_violation) in chances {
        cleared.add(other.clone());
        state.change(pod, &other, info, snapshot, 1);
        if fits(pod, facts, &state, &cleared, snapshot).is_err() {
            cleared.remove(other.uid());
            state.change(pod, &other, info, snapshot, -1);
            violations += usize::from(is_violation);
            victims.push(other);
        }
    }
    victims.sort_by_key(importance);
    Ok(Candidate { node: info.name().to_owned(), victims, violations })
}

/// Parts the pods whose end would break a disruption budget from the others, keeping the order.
fn split_by_budget(pods: Vec<Arc<PodInfo>>, budgets: &[Arc<PodDisruptionBudget>]) -> (Vec<Arc<PodInfo>>, Vec<Arc<PodInfo>>) {
    let mut allowed: Vec<i32> =
        budgets.iter().map(|budget| budget.status.as_ref().map_or(0, |status| status.disruptions_allowed)).collect();
    pods.into_iter().partition(|pod| {
        let meta = &pod.pod.metadata;
        let mut violated = false;
        for (budget, allowed) in budgets.iter().zip(&mut allowed) {
            let selector = budget.spec.as_ref().and_then(|spec| spec.selector.as_ref());
            let matches = namespace(&budget.metadata) == namespace(meta)
                && !labels(meta).is_empty()
                && selector.is_some_and(|selector| !selects_everything(selector))
                && selects(selector, labels(meta));
            let counted = budget
                .status
                .as_ref()
                .and_then(|status| status.disrupted_pods.as_ref())
                .is_some_and(|pods| meta.name.as_ref().is_some_and(|name| pods.contains_key(name)));
            if matches && !counted {
                *allowed -= 1;
                violated |= *allowed < 0;
            }
        }
        violated
    })
}

/// Fewest broken budgets, then the least important victims, then the fewest, then the youngest.
fn best(candidates: Vec<Candidate>) -> Option<Candidate> {
    let order = |candidate: &Candidate| {
        let highest = candidate.victims.first().map_or(i32::MIN, |pod| pod.priority());
        let sum: i64 = candidate.victims.iter().map(|pod| i64::from(pod.priority()) + i64::from(i32::MAX) + 1).sum();
        let earliest = candidate.victims.iter().filter(|pod| pod.priority() == highest).map(|pod| started(pod)).min();
        (candidate.violations, highest, sum, candidate.victims.len(), Reverse(earliest))
    };
    candidates.into_iter().min_by_key(order)
}
