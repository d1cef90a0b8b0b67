//! StatefulSet: numbered pods with their own storage, made, updated and removed in order.
//!
//! `identity` knows what a numbered pod is, `claims` its storage, `plan` decides the next steps; this file does.
mod claims;
mod identity;
mod plan;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet};
use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use tokio::task::JoinSet;

use crate::Context;
use crate::error::SyncError;
use crate::events::Recorder;
use crate::history;
use crate::informers::Informers;
use crate::objects::{Key, available_in, controller_of, controller_ref, is_terminating, labels, name, selects, selects_everything, uid};
use crate::pods;
use crate::worker::{self, Outcome, Queue};

use plan::{Revisions, Step, View};

const CONTROLLER: &str = "statefulset-controller";

#[derive(Clone)]
struct Worker {
    informers: Arc<Informers>,
    recorder: Recorder,
}

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let informers = &context.informers;
    let add = queue.clone();
    informers.stateful_sets.on_change(move |old, new| {
        if let Some(object) = new.or(old) {
            add.add(Key::of(&**object));
        }
    });
    let (add, owners) = (queue.clone(), informers.stateful_sets.clone());
    informers.pods.on_change(move |old, new| {
        pods::concerned::<StatefulSet, Pod>(old, new, &owners, is_member, |key| add.add(key));
    });
    let worker = Worker { informers: informers.clone(), recorder: context.recorder.named(CONTROLLER) };
    tasks.spawn(worker::run("statefulset", queue, 5, move |key| sync(worker.clone(), key)));
}

/// Selected, and named after the set: others' pods aren't adopted for their labels alone.
fn is_member(set: &StatefulSet, pod: &Pod) -> bool {
    let selected = set.spec.as_ref().is_some_and(|spec| selects(Some(&spec.selector), labels(&pod.metadata)));
    selected && identity::parent_and_ordinal(name(&pod.metadata)).is_some_and(|(parent, _)| parent == name(&set.metadata))
}

async fn sync(worker: Worker, key: Key) -> Outcome {
    let informers = &worker.informers;
    let Some(set) = informers.stateful_sets.get(&key) else { return Ok(None) };
    let Some(spec) = &set.spec else { return Ok(None) };
    if selects_everything(&spec.selector) {
        return Ok(None);
    }
    let known = history::list(&informers.stateful_sets, &*set, &informers.controller_revisions, Some(&spec.selector)).await?;
    let candidate = |pod: &Pod| controller_of(&pod.metadata).is_none_or(|controller| controller.uid == uid(&set.metadata));
    let candidates = informers.pods.select(&key.namespace, candidate);
    let pods =
        pods::claim_all(&informers.stateful_sets, &*set, &controller_ref(&*set), &informers.pods, candidates, |pod| is_member(&set, pod))
            .await?;
    let collisions = set.status.as_ref().and_then(|status| status.collision_count).unwrap_or(0);
    let update = history::current(&informers.controller_revisions, &*set, &spec.template, &known, collisions).await?;
    let current = worker.current_revision(&set, &known, &update.revision);
    let revisions = Revisions::new(&set, &current, &update.revision, update.collisions);
    let stepped = worker.step(&set, &revisions, pods).await;
    // What the step did is in the shared copy now; the status tells how things stand after it.
    let mine = |pod: &Pod| controller_of(&pod.metadata).is_some_and(|controller| controller.uid == uid(&set.metadata));
    let after = informers.pods.select(&key.namespace, mine);
    let view = View::new(&set, &revisions, &after, Timestamp::now());
    worker.write_status(&set, &view).await?;
    let mut live: HashSet<String> = [name(&current.metadata), name(&update.revision.metadata)].map(str::to_owned).into();
    live.extend(after.iter().filter_map(|pod| labels(&pod.metadata).get(history::HASH_LABEL).cloned()));
    history::truncate(&informers.controller_revisions, &known, &live, spec.revision_history_limit.unwrap_or(10)).await?;
    stepped?;
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let soonest = after.iter().filter_map(|pod| available_in(pod, min_ready, Timestamp::now())).filter(|seconds| *seconds > 0).min();
    Ok(soonest.map(|seconds| Duration::from_secs(seconds.unsigned_abs())))
}

impl Worker {
    fn current_revision(
        &self,
        set: &StatefulSet,
        known: &[Arc<ControllerRevision>],
        update: &Arc<ControllerRevision>,
    ) -> Arc<ControllerRevision> {
        let wanted = set.status.as_ref().and_then(|status| status.current_revision.as_deref()).unwrap_or_default();
        known.iter().find(|revision| name(&revision.metadata) == wanted).unwrap_or(update).clone()
    }

    /// Takes step after step until there is one to wait for, or nothing is left to do.
    async fn step(&self, set: &StatefulSet, revisions: &Revisions, pods: Vec<Arc<Pod>>) -> Result<(), SyncError> {
        if is_terminating(&set.metadata) {
            return Ok(());
        }
        let view = View::new(set, revisions, &pods, Timestamp::now());
        let steps = view.steps();
        let parallel = view.is_parallel();
        let failed = futures::future::join_all(steps.iter().map(|step| self.take(set, step))).await;
        let mut first = Ok(());
        for result in failed {
            if let Err(error) = result
                && first.is_ok()
            {
                first = Err(error);
            }
        }
        debug_assert!(
            parallel || steps.iter().filter(|step| matches!(step, Step::Create(_))).count() <= 1,
            "ordered sets make one pod at a time"
        );
        first
    }

    async fn take(&self, set: &StatefulSet, step: &Step) -> Result<(), SyncError> {
        match step {
            Step::Create(pod) => self.create(set, pod).await,
            Step::Delete(pod) => self.delete(set, pod).await,
            Step::Repair(pod) => self.repair(set, pod).await,
            Step::Claims(pod) => self.ensure_claims(set, pod).await,
        }
    }

    async fn create(&self, set: &StatefulSet, pod: &Pod) -> Result<(), SyncError> {
        let verb = ("SuccessfulCreate", "FailedCreate", "create", "Create");
        if let Err(error) = self.ensure_claims(set, pod).await {
            self.tell(set, pod, verb, Err(&error));
            return Err(error);
        }
        match self.informers.pods.create(pod).await {
            Ok(_) => {
                self.tell(set, pod, verb, Ok(()));
                Ok(())
            }
            Err(error) if error.is_namespace_terminating() => Ok(()),
            Err(error) => {
                // Somebody else's pod has the name: that will be told, and tried again.
                self.tell(set, pod, verb, Err(&error));
                Err(error)
            }
        }
    }

    async fn delete(&self, set: &StatefulSet, pod: &Pod) -> Result<(), SyncError> {
        let verb = ("SuccessfulDelete", "FailedDelete", "delete", "Delete");
        match self.informers.pods.delete(pod, DeleteParams::default()).await {
            Ok(()) => {
                self.tell(set, pod, verb, Ok(()));
                Ok(())
            }
            Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
            Err(error) => {
                self.tell(set, pod, verb, Err(&error));
                Err(error)
            }
        }
    }

    /// Gives a pod the labels back that make it the set's, and its claims their owners.
    async fn repair(&self, set: &StatefulSet, pod: &Pod) -> Result<(), SyncError> {
        self.ensure_claims(set, pod).await?;
        let Some(repaired) = identity::repaired(set, pod) else { return Ok(()) };
        let verb = ("SuccessfulUpdate", "FailedUpdate", "update", "Update");
        let result = self.informers.pods.update(&repaired).await.map(drop);
        self.tell(set, pod, verb, result.as_ref().copied());
        result
    }

    fn tell(&self, set: &StatefulSet, pod: &Pod, verb: (&'static str, &'static str, &str, &str), result: Result<(), &SyncError>) {
        let (good, bad, lower, title) = verb;
        let (pod, owner) = (name(&pod.metadata), name(&set.metadata));
        match result {
            Ok(()) => self.recorder.normal(set, good, format!("{lower} Pod {pod} in StatefulSet {owner} successful")),
            Err(error) => {
                self.recorder.warning(set, bad, format!("{lower} Pod {pod} in StatefulSet {owner} failed error: {}", error.message()))
            }
        }
        tracing::trace!(verb = title, pod, "told");
    }

    async fn ensure_claims(&self, set: &StatefulSet, pod: &Pod) -> Result<(), SyncError> {
        for wanted in claims::of(set, pod) {
            let key = Key::of(&wanted);
            let title = name(&wanted.metadata).to_owned();
            let (pod_name, owner) = (name(&pod.metadata), name(&set.metadata));
            match self.informers.volume_claims.get(&key) {
                Some(there) if is_terminating(&there.metadata) && uid(&pod.metadata).is_empty() => {
                    return Err(SyncError::Other(format!("pvc {title} is being deleted")));
                }
                Some(there) => {
                    if let Some(updated) = claims::with_owners(&there, set, pod) {
                        self.informers.volume_claims.update(&updated).await?;
                    }
                }
                None => match self.informers.volume_claims.create(&wanted).await {
                    Ok(_) => {
                        let message = format!("create Claim {title} Pod {pod_name} in StatefulSet {owner} success");
                        self.recorder.normal(set, "SuccessfulCreate", message);
                    }
                    Err(error) if error.is_already_exists() => {}
                    Err(error) => {
                        let message =
                            format!("create Claim {title} for Pod {pod_name} in StatefulSet {owner} failed error: {}", error.message());
                        self.recorder.warning(set, "FailedCreate", message);
                        return Err(SyncError::Other(format!("failed to create PVC {title}: {}", error.message())));
                    }
                },
            }
        }
        Ok(())
    }

    async fn write_status(&self, set: &StatefulSet, view: &View<'_>) -> Result<(), SyncError> {
        let status = view.status();
        if set.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let mut updated = set.clone();
        updated.status = Some(status);
        match self.informers.stateful_sets.update_status(&updated).await {
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }
}
