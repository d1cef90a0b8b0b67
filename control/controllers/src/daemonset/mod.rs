//! DaemonSet: one pod on every node that will have it. `plan` decides, this file does.
mod plan;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::Context;
use crate::error::SyncError;
use crate::events::Recorder;
use crate::history;
use crate::informers::Informers;
use crate::objects::{Key, controller_of, controller_ref, is_terminating, labels, selects, selects_everything, uid};
use crate::pods;
use crate::worker::{self, Outcome, Queue};

use plan::{Actions, Daemons, View};

const CONTROLLER: &str = "daemonset-controller";
const BURST: usize = 250;
/// Pauses between the deletions of failed pods of one set on one node.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(15 * 60);

type Pauses = Arc<Mutex<HashMap<(String, String), (Instant, Duration)>>>;

#[derive(Clone)]
struct Worker {
    informers: Arc<Informers>,
    recorder: Recorder,
    pauses: Pauses,
}

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let informers = &context.informers;
    let add = queue.clone();
    informers.daemon_sets.on_change(move |old, new| {
        if let Some(object) = new.or(old) {
            add.add(Key::of(&**object));
        }
    });
    let (add, owners) = (queue.clone(), informers.daemon_sets.clone());
    informers.pods.on_change(move |old, new| {
        pods::concerned::<DaemonSet, Pod>(old, new, &owners, selects_pod, |key| add.add(key));
    });
    let (add, owners) = (queue.clone(), informers.daemon_sets.clone());
    informers.controller_revisions.on_change(move |old, new| {
        let selects = |owner: &DaemonSet, revision: &k8s_openapi::api::apps::v1::ControllerRevision| {
            owner.spec.as_ref().is_some_and(|spec| selects(Some(&spec.selector), labels(&revision.metadata)))
        };
        pods::concerned::<DaemonSet, _>(old, new, &owners, selects, |key| add.add(key));
    });
    let (add, owners) = (queue.clone(), informers.daemon_sets.clone());
    informers.nodes.on_change(move |old, new| {
        // Heartbeats don't matter; labels, taints and cordons do.
        let facts = |node: &Arc<Node>| (labels(&node.metadata).clone(), node.spec.clone());
        if old.map(facts) != new.map(facts) {
            owners.list().iter().for_each(|owner| add.add(Key::of(&**owner)));
        }
    });
    let worker = Worker { informers: informers.clone(), recorder: context.recorder.named(CONTROLLER), pauses: Pauses::default() };
    tasks.spawn(worker::run("daemonset", queue, 2, move |key| sync(worker.clone(), key)));
}

fn selects_pod(owner: &DaemonSet, pod: &Pod) -> bool {
    owner.spec.as_ref().is_some_and(|spec| selects(Some(&spec.selector), labels(&pod.metadata)))
}

async fn sync(worker: Worker, key: Key) -> Outcome {
    let informers = &worker.informers;
    let Some(set) = informers.daemon_sets.get(&key) else { return Ok(None) };
    let Some(spec) = &set.spec else { return Ok(None) };
    if selects_everything(&spec.selector) {
        worker.recorder.warning(&*set, "SelectingAll", "This daemon set is selecting all pods. A non-empty selector is required.");
        return Ok(None);
    }
    if is_terminating(&set.metadata) {
        return Ok(None);
    }
    let known = history::list(&informers.daemon_sets, &*set, &informers.controller_revisions, Some(&spec.selector)).await?;
    let collisions = set.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0);
    let current = history::current(&informers.controller_revisions, &*set, &spec.template, &known, collisions).await?;
    if current.collisions != collisions {
        let mut updated = (*set).clone();
        updated.status.get_or_insert_default().collision_count = Some(current.collisions);
        informers.daemon_sets.update_status(&updated).await?;
        return Ok(Some(Duration::ZERO));
    }
    let hash = labels(&current.revision.metadata).get(history::HASH_LABEL).cloned().unwrap_or_default();
    let mut again = None;
    let managed = worker.manage(&set, &hash, &mut again).await;
    let view = worker.view(&set, &hash).await?;
    let mut live: HashSet<String> =
        view.daemons.values().flatten().filter_map(|pod| labels(&pod.metadata).get(history::HASH_LABEL).cloned()).collect();
    live.insert(hash.clone());
    history::truncate(&informers.controller_revisions, &known, &live, spec.revision_history_limit.unwrap_or(10)).await?;
    worker.write_status(&set, &view).await?;
    managed?;
    let waiting = view.seconds_to_availability().map(|seconds| Duration::from_secs(seconds.unsigned_abs()));
    Ok([again, waiting].into_iter().flatten().min())
}

impl Worker {
    async fn view<'a>(&self, set: &'a DaemonSet, hash: &'a str) -> Result<View<'a>, SyncError> {
        let space = set.metadata.namespace.clone().unwrap_or_default();
        let candidate = |pod: &Pod| controller_of(&pod.metadata).is_none_or(|controller| controller.uid == uid(&set.metadata));
        let candidates = self.informers.pods.select(&space, candidate);
        let mine = pods::claim_all(&self.informers.daemon_sets, set, &controller_ref(set), &self.informers.pods, candidates, |pod| {
            selects_pod(set, pod)
        })
        .await?;
        let mut daemons = Daemons::new();
        for pod in mine {
            daemons.entry(plan::target_node(&pod)).or_default().push(pod);
        }
        Ok(View { set, hash, nodes: self.informers.nodes.list(), daemons, now: Timestamp::now() })
    }

    /// First what must run where, then what must be replaced.
    async fn manage(&self, set: &DaemonSet, hash: &str, again: &mut Option<Duration>) -> Result<(), SyncError> {
        let view = self.view(set, hash).await?;
        let actions = view.manage();
        let actions = self.hold_back_failed(set, actions, again);
        self.carry_out(set, hash, actions).await?;
        if plan::rolls(set) {
            let view = self.view(set, hash).await?;
            self.carry_out(set, hash, view.roll()).await?;
        }
        Ok(())
    }

    /// A pod that fails again and again on a node is removed ever more slowly.
    fn hold_back_failed(&self, set: &DaemonSet, mut actions: Actions, again: &mut Option<Duration>) -> Actions {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        pauses.retain(|_, (since, pause)| since.elapsed() < *pause * 2 + LAST_PAUSE);
        for pod in std::mem::take(&mut actions.failed) {
            let node = plan::target_node(&pod);
            let key = (uid(&set.metadata).to_owned(), node.clone());
            let (since, pause) = pauses.get(&key).copied().unwrap_or((now, Duration::ZERO));
            let left = (since + pause).saturating_duration_since(now);
            if !left.is_zero() {
                *again = Some(again.map_or(left, |again| again.min(left)));
                continue;
            }
            pauses.insert(key, (now, (pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE)));
            let message = format!("Found failed daemon pod {} on node {node}, will try to kill it", Key::of(&*pod));
            self.recorder.warning(set, "FailedDaemonPod", message);
            actions.delete.push(pod);
        }
        for pod in std::mem::take(&mut actions.succeeded) {
            let message =
                format!("Found succeeded daemon pod {} on node {}, will try to delete it", Key::of(&*pod), plan::target_node(&pod));
            self.recorder.normal(set, "SucceededDaemonPod", message);
            actions.delete.push(pod);
        }
        actions
    }

    async fn carry_out(&self, set: &DaemonSet, hash: &str, mut actions: Actions) -> Result<(), SyncError> {
        actions.create.truncate(BURST);
        actions.delete.truncate(BURST);
        let made: Vec<Pod> = actions.create.iter().filter_map(|node| plan::pod_for(set, hash, node)).collect();
        let (_, created) = pods::slow_start(made.len(), |place| {
            let pod = &made[place];
            async move {
                match pods::create(&self.informers.pods, &self.recorder, set, pod).await {
                    Err(error) if error.is_namespace_terminating() => Ok(()),
                    other => other.map(drop),
                }
            }
        })
        .await;
        let deleted = join_all(actions.delete.iter().map(|pod| pods::delete(&self.informers.pods, &self.recorder, set, pod))).await;
        created?;
        deleted.into_iter().collect()
    }

    async fn write_status(&self, set: &DaemonSet, view: &View<'_>) -> Result<(), SyncError> {
        let Some(current) = self.informers.daemon_sets.get(&Key::of(set)).filter(|current| uid(&current.metadata) == uid(&set.metadata))
        else {
            return Ok(());
        };
        let status = view.status(&current);
        if current.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let mut updated = (*current).clone();
        updated.status = Some(status);
        match self.informers.daemon_sets.update_status(&updated).await {
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }
}
