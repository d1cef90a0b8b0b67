//! ReplicaSet and ReplicationController: as many pods as asked for, by one code over both kinds.
use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{
    Pod, PodTemplateSpec, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus,
};
use tokio::task::JoinSet;

use crate::conditions;
use crate::error::SyncError;
use crate::events::Recorder;
use crate::objects::{
    Key, Labels, annotation, available_in, controller_of, controller_ref, is_active, is_available, is_ready, is_terminal, is_terminating,
    labels, pod_condition, pod_node, pod_phase, seconds, selects, selects_all_of, uid,
};
use crate::pods;
use crate::store::{Object, Store};
use crate::worker::{self, Outcome, Queue};
use crate::{Context, Informers};

/// Never more than this many creations or deletions in one go.
const BURST: usize = 500;

/// What the two kinds have in common.
pub trait Replicated: Object {
    fn replicas(&self) -> i32;
    fn min_ready_seconds(&self) -> i32;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn selects(&self, labels: &Labels) -> bool;
    /// The status in the ReplicaSet's shape.
    fn status(&self) -> ReplicaSetStatus;
    fn set_status(&mut self, status: ReplicaSetStatus);
    /// Whether the kind's status counts terminating pods.
    const TERMINATING: bool;
    const CONTROLLER: &'static str;
    fn store(informers: &Informers) -> &Store<Self>;
}

impl Replicated for ReplicaSet {
    fn replicas(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
    }
    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
    }
    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }
    fn selects(&self, labels: &Labels) -> bool {
        self.spec.as_ref().is_some_and(|spec| selects(Some(&spec.selector), labels))
    }
    fn status(&self) -> ReplicaSetStatus {
        self.status.clone().unwrap_or_default()
    }
    fn set_status(&mut self, status: ReplicaSetStatus) {
        self.status = Some(status);
    }
    const TERMINATING: bool = true;
    const CONTROLLER: &'static str = "replicaset-controller";
    fn store(informers: &Informers) -> &Store<Self> {
        &informers.replica_sets
    }
}

impl Replicated for ReplicationController {
    fn replicas(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
    }
    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
    }
    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }
    fn selects(&self, labels: &Labels) -> bool {
        selects_all_of(self.spec.as_ref().and_then(|spec| spec.selector.as_ref()), labels)
    }
    fn status(&self) -> ReplicaSetStatus {
        let status = self.status.clone().unwrap_or_default();
        let condition = |from: ReplicationControllerCondition| ReplicaSetCondition {
            type_: from.type_,
            status: from.status,
            reason: from.reason,
            message: from.message,
            last_transition_time: from.last_transition_time,
        };
        ReplicaSetStatus {
            replicas: status.replicas,
            fully_labeled_replicas: status.fully_labeled_replicas,
            ready_replicas: status.ready_replicas,
            available_replicas: status.available_replicas,
            observed_generation: status.observed_generation,
            terminating_replicas: None,
            conditions: status.conditions.map(|list| list.into_iter().map(condition).collect()),
        }
    }
    fn set_status(&mut self, status: ReplicaSetStatus) {
        let condition = |from: ReplicaSetCondition| ReplicationControllerCondition {
            type_: from.type_,
            status: from.status,
            reason: from.reason,
            message: from.message,
            last_transition_time: from.last_transition_time,
        };
        self.status = Some(ReplicationControllerStatus {
            replicas: status.replicas,
            fully_labeled_replicas: status.fully_labeled_replicas,
            ready_replicas: status.ready_replicas,
            available_replicas: status.available_replicas,
            observed_generation: status.observed_generation,
            conditions: status.conditions.map(|list| list.into_iter().map(condition).collect()),
        });
    }
    const TERMINATING: bool = false;
    const CONTROLLER: &'static str = "replication-controller";
    fn store(informers: &Informers) -> &Store<Self> {
        &informers.replication_controllers
    }
}

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    start_kind::<ReplicaSet>(context, tasks);
    start_kind::<ReplicationController>(context, tasks);
}

fn start_kind<K: Replicated>(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let store = K::store(&context.informers);
    let add = queue.clone();
    store.on_change(move |old, new| {
        if let Some(object) = new.or(old) {
            add.add(Key::of(&**object));
        }
    });
    let (add, owners) = (queue.clone(), store.clone());
    context.informers.pods.on_change(move |old, new| {
        pods::concerned::<K, Pod>(old, new, &owners, |owner, pod| owner.selects(labels(&pod.metadata)), |key| add.add(key));
    });
    let informers = context.informers.clone();
    let recorder = context.recorder.named(K::CONTROLLER);
    tasks.spawn(worker::run(K::CONTROLLER, queue, 5, move |key| sync::<K>(informers.clone(), recorder.clone(), key)));
}

async fn sync<K: Replicated>(informers: Arc<Informers>, recorder: Recorder, key: Key) -> Outcome {
    let store = K::store(&informers);
    let Some(set) = store.get(&key) else { return Ok(None) };
    let owned = |pod: &Pod| controller_of(&pod.metadata).is_none_or(|controller| controller.uid == uid(set.meta()));
    let candidates = informers.pods.select(&key.namespace, owned);
    let (alive, dying): (Vec<_>, Vec<_>) =
        candidates.into_iter().filter(|pod| !is_terminal(pod)).partition(|pod| !is_terminating(&pod.metadata));
    let matches = |pod: &Pod| set.selects(labels(&pod.metadata));
    let active = pods::claim_all(store, &*set, &controller_ref(&*set), &informers.pods, alive, matches).await?;
    let terminating = dying.iter().filter(|pod| controller_of(&pod.metadata).is_some() && matches(pod)).count();
    let managed = if is_terminating(set.meta()) { Ok(()) } else { manage(&informers, &recorder, &*set, &active).await };
    let now = Timestamp::now();
    let mut status = status(&*set, &active, terminating, managed.as_ref().err(), now);
    let current = set.status();
    let generation = set.meta().generation;
    status.observed_generation = generation;
    if status != current {
        let mut updated = (*set).clone();
        updated.set_status(status.clone());
        match store.update_status(&updated).await {
            Err(error) if error.is_not_found() => return Ok(None),
            other => other?,
        };
    }
    managed?;
    let min_ready = set.min_ready_seconds();
    if min_ready > 0 && status.ready_replicas != status.available_replicas {
        let soonest = active.iter().filter_map(|pod| available_in(pod, min_ready, now)).filter(|wait| *wait > 0).min();
        return Ok(Some(Duration::from_secs(soonest.unwrap_or(i64::from(min_ready)).unsigned_abs())));
    }
    Ok(None)
}

/// Creates what is missing or deletes what is too many. Every attempt counts on the shared copy at once, so a
/// sync that follows on its heels sees it.
async fn manage<K: Replicated>(informers: &Informers, recorder: &Recorder, set: &K, active: &[Arc<Pod>]) -> Result<(), SyncError> {
    let wanted = usize::try_from(set.replicas()).unwrap_or(0);
    let Some(template) = set.template() else { return Ok(()) };
    if active.len() < wanted {
        let pod = pods::from_template(set.meta(), template, controller_ref(set));
        let count = (wanted - active.len()).min(BURST);
        let (_, result) = pods::slow_start(count, |_| async {
            match pods::create(&informers.pods, recorder, set, &pod).await {
                // Any creation will fail from now on: nothing to do about it.
                Err(error) if error.is_namespace_terminating() => Ok(()),
                other => other.map(drop),
            }
        })
        .await;
        return result;
    }
    let count = (active.len() - wanted).min(BURST);
    let related = if count > 0 { related_pods(informers, set) } else { HashMap::new() };
    let doomed = to_delete(active, &related, count, Timestamp::now());
    let results = futures::future::join_all(doomed.iter().map(|pod| pods::delete(&informers.pods, recorder, set, pod))).await;
    results.into_iter().collect()
}

/// How many active pods of this set's siblings (ReplicaSets of the same Deployment) each node has.
fn related_pods<K: Replicated>(informers: &Informers, set: &K) -> HashMap<String, usize> {
    let Some(controller) = controller_of(set.meta()) else { return HashMap::new() };
    let namespace = set.meta().namespace.as_deref().unwrap_or_default();
    let siblings =
        K::store(informers).select(namespace, |other| controller_of(other.meta()).is_some_and(|other| other.uid == controller.uid));
    let related = |pod: &Pod| is_active(pod) && siblings.iter().any(|sibling| sibling.selects(labels(&pod.metadata)));
    let mut per_node = HashMap::new();
    for pod in informers.pods.select(namespace, related) {
        *per_node.entry(pod_node(&pod).to_owned()).or_default() += 1;
    }
    per_node
}

/// The `count` pods that are missed least.
pub fn to_delete(active: &[Arc<Pod>], per_node: &HashMap<String, usize>, count: usize, now: Timestamp) -> Vec<Arc<Pod>> {
    let mut order: Vec<Arc<Pod>> = active.to_vec();
    if count < order.len() {
        order.sort_by(|left, right| deletion_order(left, right, per_node, now));
    }
    order.truncate(count);
    order
}

fn phase_rank(pod: &Pod) -> u8 {
    match pod_phase(pod) {
        "Unknown" => 1,
        "Running" => 2,
        _ => 0,
    }
}

fn deletion_cost(pod: &Pod) -> i32 {
    annotation(&pod.metadata, "controller.kubernetes.io/pod-deletion-cost").and_then(|cost| cost.parse().ok()).unwrap_or(0)
}

fn restarts(pod: &Pod) -> (i32, i32) {
    let status = pod.status.as_ref();
    let sidecars: Vec<&str> = pod
        .spec
        .iter()
        .flat_map(|spec| spec.init_containers.iter().flatten())
        .filter(|container| container.restart_policy.as_deref() == Some("Always"))
        .map(|container| container.name.as_str())
        .collect();
    let most = |list: Option<&Vec<k8s_openapi::api::core::v1::ContainerStatus>>, only: Option<&[&str]>| {
        let counted = list.into_iter().flatten().filter(|status| only.is_none_or(|names| names.contains(&status.name.as_str())));
        counted.map(|status| status.restart_count).max().unwrap_or(0)
    };
    (
        most(status.and_then(|status| status.container_statuses.as_ref()), None),
        most(status.and_then(|status| status.init_container_statuses.as_ref()), Some(&sidecars)),
    )
}

/// The power of two of an age: pods of about the same age are equal, so that scaling down isn't predictable.
fn age_rank(since: Option<Timestamp>, now: Timestamp) -> Option<i64> {
    let age = now.as_nanosecond() - since?.as_nanosecond();
    Some(if age > 0 { i64::from(age.ilog2()) } else { -1 })
}

fn by_age(left: Option<Timestamp>, right: Option<Timestamp>, ids: (&str, &str), now: Timestamp) -> Ordering {
    match (age_rank(left, now), age_rank(right, now)) {
        // No time counts as youngest.
        (None, _) | (_, None) => right.is_none().cmp(&left.is_none()),
        (Some(a), Some(b)) => a.cmp(&b).then_with(|| ids.0.cmp(ids.1)),
    }
}

fn deletion_order(left: &Pod, right: &Pod, per_node: &HashMap<String, usize>, now: Timestamp) -> Ordering {
    let rank = |pod: &Pod| per_node.get(pod_node(pod)).copied().unwrap_or(0);
    let ids = (uid(&left.metadata), uid(&right.metadata));
    let first = (!pod_node(left).is_empty())
        .cmp(&!pod_node(right).is_empty())
        .then_with(|| phase_rank(left).cmp(&phase_rank(right)))
        .then_with(|| is_ready(left).cmp(&is_ready(right)))
        .then_with(|| deletion_cost(left).cmp(&deletion_cost(right)))
        .then_with(|| Reverse(rank(left)).cmp(&Reverse(rank(right))));
    if first != Ordering::Equal {
        return first;
    }
    let ready_since =
        |pod: &Pod| pod_condition(pod, "Ready").and_then(|condition| condition.last_transition_time.as_ref()).map(|time| time.0);
    if is_ready(left) && is_ready(right) && ready_since(left) != ready_since(right) {
        return by_age(ready_since(left), ready_since(right), ids, now);
    }
    let created = |pod: &Pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
    Reverse(restarts(left)).cmp(&Reverse(restarts(right))).then_with(|| by_age(created(left), created(right), ids, now))
}

/// The set's status as its active pods show it.
pub fn status<K: Replicated>(
    set: &K,
    active: &[Arc<Pod>],
    terminating: usize,
    failure: Option<&SyncError>,
    now: Timestamp,
) -> ReplicaSetStatus {
    let none = Labels::new();
    let template_labels =
        set.template().and_then(|template| template.metadata.as_ref()).and_then(|meta| meta.labels.as_ref()).unwrap_or(&none);
    let count = |keep: &dyn Fn(&Pod) -> bool| i32::try_from(active.iter().filter(|pod| keep(pod)).count()).unwrap_or(i32::MAX);
    let some = |number: i32| (number != 0).then_some(number);
    let mut status = set.status();
    status.replicas = count(&|_| true);
    status.fully_labeled_replicas =
        some(count(&|pod| template_labels.iter().all(|(key, value)| labels(&pod.metadata).get(key) == Some(value))));
    status.ready_replicas = some(count(&is_ready));
    status.available_replicas = some(count(&|pod| is_available(pod, set.min_ready_seconds(), now)));
    status.terminating_replicas = K::TERMINATING.then(|| i32::try_from(terminating).unwrap_or(i32::MAX));
    match failure {
        Some(failure) if conditions::find(status.conditions.as_ref(), "ReplicaFailure").is_none() => {
            let reason = match status.replicas.cmp(&set.replicas()) {
                Ordering::Less => "FailedCreate",
                Ordering::Greater => "FailedDelete",
                Ordering::Equal => "",
            };
            let condition = ReplicaSetCondition {
                type_: "ReplicaFailure".into(),
                status: conditions::TRUE.into(),
                reason: Some(reason.into()),
                message: Some(failure.message()),
                last_transition_time: Some(seconds(now)),
            };
            conditions::set(&mut status.conditions, condition);
        }
        None => conditions::remove(&mut status.conditions, "ReplicaFailure"),
        Some(_) => {}
    }
    status
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::ReplicaSetSpec;
    use k8s_openapi::api::core::v1::PodCondition;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn pod(name: &str, node: &str, phase: &str, ready_at: Option<i64>) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some(name.into());
        pod.metadata.uid = Some(name.into());
        pod.metadata.creation_timestamp = Some(Time(at(10)));
        pod.spec.get_or_insert_default().node_name = (!node.is_empty()).then(|| node.into());
        let status = pod.status.get_or_insert_default();
        status.phase = Some(phase.into());
        status.conditions = ready_at.map(|second| {
            vec![PodCondition {
                type_: "Ready".into(),
                status: "True".into(),
                last_transition_time: Some(Time(at(second))),
                ..Default::default()
            }]
        });
        pod
    }

    fn order(pods: Vec<Pod>, per_node: &[(&str, usize)]) -> Vec<String> {
        let per_node = per_node.iter().map(|(node, count)| ((*node).to_owned(), *count)).collect();
        let mut pods: Vec<_> = pods.into_iter().map(Arc::new).collect();
        pods.sort_by(|left, right| deletion_order(left, right, &per_node, at(100_000)));
        pods.iter().map(|pod| pod.metadata.name.clone().unwrap()).collect()
    }

    #[test]
    fn the_least_useful_pods_go_first() {
        let mut cheap = pod("cheap", "a", "Running", Some(50));
        cheap.metadata.annotations = Some([("controller.kubernetes.io/pod-deletion-cost".to_owned(), "-5".to_owned())].into());
        let pods = vec![
            pod("ready", "a", "Running", Some(50)),
            cheap,
            pod("unready", "a", "Running", None),
            pod("pending", "a", "Pending", None),
            pod("unscheduled", "", "Pending", None),
        ];
        assert_eq!(order(pods, &[]), ["unscheduled", "pending", "unready", "cheap", "ready"]);
        let doubled = vec![pod("alone", "a", "Running", Some(50)), pod("crowded", "b", "Running", Some(50))];
        assert_eq!(order(doubled, &[("a", 1), ("b", 3)]), ["crowded", "alone"]);
        let young = vec![pod("old", "a", "Running", Some(50)), pod("young", "a", "Running", Some(99_990))];
        assert_eq!(order(young, &[]), ["young", "old"]);
    }

    #[test]
    fn status_counts_and_reports_failures_once() {
        let mut set = ReplicaSet {
            spec: Some(ReplicaSetSpec { replicas: Some(3), min_ready_seconds: Some(20), ..Default::default() }),
            ..Default::default()
        };
        let active = [Arc::new(pod("a", "n", "Running", Some(50))), Arc::new(pod("b", "n", "Running", Some(90)))];
        let failure = SyncError::Other("quota".into());
        let first = status(&set, &active, 1, Some(&failure), at(100));
        assert_eq!(
            (first.replicas, first.ready_replicas, first.available_replicas, first.terminating_replicas),
            (2, Some(2), Some(1), Some(1))
        );
        let condition = &first.conditions.as_ref().unwrap()[0];
        assert_eq!((condition.reason.as_deref(), condition.message.as_deref()), (Some("FailedCreate"), Some("quota")));
        set.status = Some(first);
        assert!(status(&set, &active, 0, None, at(100)).conditions.is_none());
    }
}
