//! PodDisruptionBudgets: how many of their pods may be evicted now; and conditions of evictions that never came.
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tracing::debug;

use crate::Context;
use crate::conditions::{self, FALSE, TRUE};
use crate::error::{SyncError, unless_gone};
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{
    Key, controller_of, is_ready, is_terminal, is_terminating, labels, name, namespace, now, pod_condition, scaled, selects, uid,
};
use crate::worker::{self, Outcome, Queue};

const ALLOWED: &str = "DisruptionAllowed";
/// An admitted eviction whose deletion hasn't come by then is taken back.
const DELETION_TIMEOUT: i64 = 120;
/// The same for the pod's own DisruptionTarget condition.
const STALE_CONDITION: i64 = 120;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.disruption_budgets.on_change(move |_, new| {
        if let Some(budget) = new {
            add.add(Key::of(&**budget));
        }
    });
    let (add, budgets) = (queue.clone(), context.informers.disruption_budgets.clone());
    context.informers.pods.on_change(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            for budget in budgets.select(namespace(&pod.metadata), |budget| covers(budget, pod)) {
                add.add(Key::of(&*budget));
            }
        }
    });
    enqueue_for_owners(context, &queue);
    let (informers, recorder) = (context.informers.clone(), context.recorder.named("controllermanager"));
    tasks.spawn(worker::run("disruption", queue, 1, move |key| sync(informers.clone(), recorder.clone(), key)));
    start_stale_conditions(context, tasks);
}

/// A workload that is scaled changes what a share of its pods means.
fn enqueue_for_owners(context: &Context, queue: &Queue<Key>) {
    let informers = &context.informers;
    macro_rules! follow {
        ($($store:ident),+) => {$(
            let (add, budgets) = (queue.clone(), informers.disruption_budgets.clone());
            informers.$store.on_change(move |old, new| {
                if let (Some(before), Some(after)) = (old, new)
                    && before.spec.as_ref().and_then(|spec| spec.replicas) != after.spec.as_ref().and_then(|spec| spec.replicas)
                {
                    budgets.select(namespace(&after.metadata), |_| true).iter().for_each(|budget| add.add(Key::of(&**budget)));
                }
            });
        )+};
    }
    follow!(deployments, replica_sets, stateful_sets, replication_controllers);
}

fn covers(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    budget.spec.as_ref().is_some_and(|spec| selects(spec.selector.as_ref(), labels(&pod.metadata)))
}

async fn sync(informers: Arc<Informers>, recorder: Recorder, key: Key) -> Outcome {
    let Some(budget) = informers.disruption_budgets.get(&key) else { return Ok(None) };
    match try_sync(&informers, &recorder, &budget).await {
        Ok(again) => Ok(again),
        Err(error) if error.is_conflict() || error.is_not_found() => Err(error),
        Err(error) => {
            // Whatever went wrong, no eviction may rest on an old figure.
            let mut safe = (*budget).clone();
            let status = safe.status.get_or_insert_default();
            status.disruptions_allowed = 0;
            let generation = status.observed_generation;
            set_condition(&mut status.conditions, FALSE, "SyncFailed", error.message(), generation);
            informers.disruption_budgets.update_status(&safe).await?;
            Ok(None)
        }
    }
}

async fn try_sync(informers: &Informers, recorder: &Recorder, budget: &PodDisruptionBudget) -> Outcome {
    let pods = informers.pods.select(namespace(&budget.metadata), |pod| covers(budget, pod));
    if pods.is_empty() {
        recorder.normal(budget, "NoPods", "No matching pods found");
    }
    let expected = match expectation(informers, budget, &pods).await {
        Ok(expected) => expected,
        Err(error) => {
            let message = format!("Failed to calculate the number of expected pods: {}", error.message());
            recorder.warning(budget, "CalculateExpectedPodCountFailed", message);
            return Err(error);
        }
    };
    if expected.unmanaged > 0 {
        recorder.warning(
            budget,
            "UnmanagedPods",
            "Pods selected by this PodDisruptionBudget were found to be unmanaged. As a result, the status of the PDB cannot be calculated correctly, \
             which may result in undefined behavior. To account for these pods please set \".spec.minAvailable\" field of the PDB to an integer value.",
        );
    }
    let at = Timestamp::now();
    let (disrupted, again) = still_disrupted(budget, &pods, at);
    let status = status(budget, &pods, &expected, disrupted, at);
    if budget.status.as_ref() != Some(&status) {
        let mut updated = budget.clone();
        updated.status = Some(status);
        informers.disruption_budgets.update_status(&updated).await?;
    }
    Ok(again)
}

/// How many pods there should be, and how many of them healthy.
#[derive(Debug, Default, PartialEq)]
struct Expectation {
    pods: i32,
    healthy: i32,
    /// Pods without a controller, which no share can be taken of.
    unmanaged: usize,
}

async fn expectation(informers: &Informers, budget: &PodDisruptionBudget, pods: &[Arc<Pod>]) -> Result<Expectation, SyncError> {
    let Some(spec) = &budget.spec else { return Ok(Expectation::default()) };
    let unreadable = |value: &IntOrString| SyncError::Other(format!("invalid value for IntOrString: {value:?}"));
    if let Some(limit) = &spec.max_unavailable {
        let (count, unmanaged) = scale(informers, pods).await?;
        let unavailable = scaled(Some(limit), count, true).ok_or_else(|| unreadable(limit))?;
        return Ok(Expectation { pods: count, healthy: (count - unavailable).max(0), unmanaged });
    }
    match &spec.min_available {
        None => Ok(Expectation::default()),
        Some(IntOrString::Int(healthy)) => Ok(Expectation { pods: count(pods.len()), healthy: *healthy, unmanaged: 0 }),
        Some(share) => {
            let (count, unmanaged) = scale(informers, pods).await?;
            Ok(Expectation { pods: count, healthy: scaled(Some(share), count, true).ok_or_else(|| unreadable(share))?, unmanaged })
        }
    }
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The sum of what all controllers of these pods want, and the pods that have none.
async fn scale(informers: &Informers, pods: &[Arc<Pod>]) -> Result<(i32, usize), SyncError> {
    let mut scales: HashMap<String, i32> = HashMap::new();
    let mut known: HashMap<String, ()> = HashMap::new();
    let mut unmanaged = 0;
    for pod in pods {
        let Some(controller) = controller_of(&pod.metadata) else {
            unmanaged += 1;
            continue;
        };
        if known.insert(controller.uid.clone(), ()).is_some() {
            continue;
        }
        let space = namespace(&pod.metadata);
        let found = match scale_of(informers, space, controller) {
            Some(found) => Some(found),
            None => scale_subresource(informers, space, controller).await?,
        };
        let (owner, replicas) = found.ok_or_else(|| SyncError::Other(format!("found no controllers for pod {:?}", name(&pod.metadata))))?;
        scales.insert(owner, replicas);
    }
    Ok((scales.values().sum(), unmanaged))
}

/// The uid and the replicas of a built-in workload; a ReplicaSet of a Deployment stands for that.
fn scale_of(informers: &Informers, space: &str, controller: &OwnerReference) -> Option<(String, i32)> {
    let key = Key::new(space, &controller.name);
    let group = controller.api_version.split_once('/').map_or("", |(group, _)| group);
    let one = |replicas: Option<i32>| replicas.unwrap_or(1);
    match (group, controller.kind.as_str()) {
        ("", "ReplicationController") => {
            let found = informers.replication_controllers.get(&key).filter(|found| uid(&found.metadata) == controller.uid)?;
            Some((controller.uid.clone(), one(found.spec.as_ref()?.replicas)))
        }
        ("apps", "StatefulSet") => {
            let found = informers.stateful_sets.get(&key).filter(|found| uid(&found.metadata) == controller.uid)?;
            Some((controller.uid.clone(), one(found.spec.as_ref()?.replicas)))
        }
        ("apps", "ReplicaSet") => {
            let found = informers.replica_sets.get(&key).filter(|found| uid(&found.metadata) == controller.uid)?;
            match controller_of(&found.metadata).filter(|owner| owner.kind == "Deployment") {
                None => Some((controller.uid.clone(), one(found.spec.as_ref()?.replicas))),
                Some(owner) => {
                    let key = Key::new(space, &owner.name);
                    let deployment = informers.deployments.get(&key).filter(|found| uid(&found.metadata) == owner.uid)?;
                    Some((owner.uid.clone(), one(deployment.spec.as_ref()?.replicas)))
                }
            }
        }
        _ => None,
    }
}

/// Any other kind says by its scale subresource how many pods it wants.
async fn scale_subresource(informers: &Informers, space: &str, controller: &OwnerReference) -> Result<Option<(String, i32)>, SyncError> {
    let Some((_, _)) = controller.api_version.split_once('/') else { return Ok(None) };
    let list = match informers.client.list_api_group_resources(&controller.api_version).await.map_err(SyncError::Api) {
        Ok(list) => list,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    let has = |plural: &str, sub: &str| list.resources.iter().any(|resource| resource.name == format!("{plural}{sub}"));
    let plural = list.resources.iter().find(|resource| resource.kind == controller.kind && !resource.name.contains('/'));
    let Some(plural) = plural.map(|resource| &resource.name).filter(|plural| has(plural, "/scale")) else { return Ok(None) };
    let path = format!("/apis/{}/namespaces/{space}/{plural}", controller.api_version);
    let request = kube::core::Request::new(path).get_subresource("scale", &controller.name);
    let scale: Value = match informers.client.request(request.map_err(kube::Error::BuildRequest)?).await.map_err(SyncError::Api) {
        Ok(scale) => scale,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    let replicas = scale.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
    Ok(Some((controller.uid.clone(), i32::try_from(replicas).unwrap_or(i32::MAX))))
}

/// Admitted evictions whose pods still stand, and when to look whether they still do.
fn still_disrupted(budget: &PodDisruptionBudget, pods: &[Arc<Pod>], at: Timestamp) -> (BTreeMap<String, Time>, Option<Duration>) {
    let admitted = budget.status.as_ref().and_then(|status| status.disrupted_pods.clone()).unwrap_or_default();
    let mut left = BTreeMap::new();
    let mut soonest: Option<i64> = None;
    for pod in pods.iter().filter(|pod| !is_terminating(&pod.metadata)) {
        let Some(since) = admitted.get(name(&pod.metadata)) else { continue };
        let remaining = since.0.as_second() + DELETION_TIMEOUT - at.as_second();
        if remaining < 0 {
            debug!(pod = %Key::of(&**pod), "an admitted eviction never came");
            continue;
        }
        soonest = Some(soonest.map_or(remaining, |soonest| soonest.min(remaining)));
        left.insert(name(&pod.metadata).to_owned(), since.clone());
    }
    (left, soonest.and_then(|seconds| u64::try_from(seconds + 1).ok()).map(Duration::from_secs))
}

fn status(
    budget: &PodDisruptionBudget,
    pods: &[Arc<Pod>],
    expected: &Expectation,
    disrupted: BTreeMap<String, Time>,
    at: Timestamp,
) -> PodDisruptionBudgetStatus {
    let going = |pod: &Pod| disrupted.get(name(&pod.metadata)).is_some_and(|since| since.0.as_second() + DELETION_TIMEOUT > at.as_second());
    let healthy = count(pods.iter().filter(|pod| !is_terminating(&pod.metadata) && !going(pod) && is_ready(pod)).count());
    let allowed = if expected.pods <= 0 { 0 } else { (healthy - expected.healthy).max(0) };
    let mut conditions = budget.status.as_ref().and_then(|status| status.conditions.clone());
    let (state, reason) = if allowed > 0 { (TRUE, "SufficientPods") } else { (FALSE, "InsufficientPods") };
    set_condition(&mut conditions, state, reason, String::new(), budget.metadata.generation);
    PodDisruptionBudgetStatus {
        conditions,
        current_healthy: healthy,
        desired_healthy: expected.healthy,
        disrupted_pods: (!disrupted.is_empty()).then_some(disrupted),
        disruptions_allowed: allowed,
        expected_pods: expected.pods,
        observed_generation: budget.metadata.generation,
    }
}

fn set_condition(list: &mut Option<Vec<Condition>>, status: &str, reason: &str, message: String, observed_generation: Option<i64>) {
    let known = conditions::find(list.as_ref(), ALLOWED).filter(|known| known.status == status);
    let last_transition_time = known.map_or_else(now, |known| known.last_transition_time.clone());
    let condition = Condition {
        type_: ALLOWED.into(),
        status: status.into(),
        reason: reason.into(),
        message,
        observed_generation,
        last_transition_time,
    };
    let list = list.get_or_insert_default();
    match list.iter_mut().find(|known| known.type_ == ALLOWED) {
        Some(known) => *known = condition,
        None => list.push(condition),
    }
}

/// A pod that was to be evicted and wasn't doesn't look like it for ever.
fn start_stale_conditions(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.pods.on_change(move |_, new| {
        if let Some(pod) = new
            && let Some(remaining) = stale_in(pod, Timestamp::now())
        {
            add.add_after(Key::of(&**pod), remaining);
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("disruption-conditions", queue, 1, move |key| {
        let informers = informers.clone();
        async move {
            let Some(pod) = informers.pods.get(&key) else { return Ok(None) };
            match stale_in(&pod, Timestamp::now()) {
                None => Ok(None),
                Some(remaining) if !remaining.is_zero() => Ok(Some(remaining)),
                Some(_) => {
                    let condition =
                        json!({"type": "DisruptionTarget", "status": FALSE, "reason": null, "message": null, "lastTransitionTime": now()});
                    let patch = json!({"metadata": {"uid": uid(&pod.metadata)}, "status": {"conditions": [condition]}});
                    unless_gone(informers.pods.strategic_status(&key, patch).await)?;
                    Ok(None)
                }
            }
        }
    }));
}

fn stale_in(pod: &Pod, at: Timestamp) -> Option<Duration> {
    if is_terminating(&pod.metadata) || is_terminal(pod) {
        return None;
    }
    let condition = pod_condition(pod, "DisruptionTarget").filter(|condition| condition.status == TRUE)?;
    if condition.reason.as_deref() == Some("TerminationByKubelet") {
        return None;
    }
    let since = condition.last_transition_time.as_ref()?.0.as_second();
    u64::try_from((since + STALE_CONDITION - at.as_second()).max(0)).ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodCondition, PodStatus};

    use super::*;

    fn pod(title: &str, ready: bool) -> Arc<Pod> {
        let mut pod = Pod::default();
        pod.metadata.name = Some(title.into());
        let condition = PodCondition { type_: "Ready".into(), status: if ready { TRUE } else { FALSE }.into(), ..Default::default() };
        pod.status = Some(PodStatus { conditions: Some(vec![condition]), ..Default::default() });
        Arc::new(pod)
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn what_may_go_is_what_is_healthy_beyond_the_wanted() {
        let budget = PodDisruptionBudget::default();
        let pods = [pod("a", true), pod("b", true), pod("c", false)];
        let allowed = |pods_expected, healthy| {
            let expected = Expectation { pods: pods_expected, healthy, unmanaged: 0 };
            status(&budget, &pods, &expected, BTreeMap::new(), at(0)).disruptions_allowed
        };
        assert_eq!((allowed(3, 1), allowed(3, 2), allowed(3, 3), allowed(0, 0)), (1, 0, 0, 0));
        let disrupted: BTreeMap<_, _> = [("a".to_owned(), Time(at(0)))].into();
        let going = status(&budget, &pods, &Expectation { pods: 3, healthy: 1, unmanaged: 0 }, disrupted, at(10));
        assert_eq!((going.current_healthy, going.disruptions_allowed), (1, 0));
        assert_eq!(going.conditions.unwrap()[0].reason, "InsufficientPods");
    }

    #[test]
    fn an_eviction_that_never_came_is_taken_back() {
        let mut budget = PodDisruptionBudget::default();
        let admitted = [("a".to_owned(), Time(at(0))), ("gone".to_owned(), Time(at(0)))].into();
        budget.status = Some(PodDisruptionBudgetStatus { disrupted_pods: Some(admitted), ..Default::default() });
        let (left, again) = still_disrupted(&budget, &[pod("a", true)], at(100));
        assert_eq!(left.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(again, Some(Duration::from_secs(21)));
        assert!(still_disrupted(&budget, &[pod("a", true)], at(121)).0.is_empty());
    }
}
