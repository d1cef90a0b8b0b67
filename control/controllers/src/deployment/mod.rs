//! Deployment: moves pods from one template's ReplicaSet to the next.
//!
//! `revision` finds and makes the ReplicaSets, `rollout` decides their sizes, `status` judges progress; this file
//! fetches, does and writes.
mod revision;
mod rollout;
mod status;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, ReplicaSet};
use kube::api::DeleteParams;
use serde_json::json;
use tokio::task::JoinSet;

use crate::Context;
use crate::conditions;
use crate::error::{SyncError, unless_gone};
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{
    Key, annotation, controller_of, controller_ref, is_terminal, is_terminating, labels, name, selects, selects_everything, uid,
};
use crate::pods;
use crate::worker::{self, Outcome, Queue};

const CONTROLLER: &str = "deployment-controller";

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let informers = &context.informers;
    let add = queue.clone();
    informers.deployments.on_change(move |old, new| {
        if let Some(object) = new.or(old) {
            add.add(Key::of(&**object));
        }
    });
    let (add, owners) = (queue.clone(), informers.deployments.clone());
    informers.replica_sets.on_change(move |old, new| {
        pods::concerned::<Deployment, ReplicaSet>(old, new, &owners, selects_set, |key| add.add(key));
    });
    // A Recreate rollout goes on when the last old pod is gone.
    let (add, sets) = (queue.clone(), informers.replica_sets.clone());
    informers.pods.on_change(move |old, new| {
        if let (Some(gone), None) = (old, new)
            && let Some(set) = pods::owner_key::<ReplicaSet>(&gone.metadata).and_then(|key| sets.get(&key))
            && let Some(key) = pods::owner_key::<Deployment>(&set.metadata)
        {
            add.add(key);
        }
    });
    let worker = Worker { informers: informers.clone(), recorder: context.recorder.named(CONTROLLER) };
    tasks.spawn(worker::run("deployment", queue, 5, move |key| sync(worker.clone(), key)));
}

#[derive(Clone)]
struct Worker {
    informers: Arc<Informers>,
    recorder: Recorder,
}

fn spec(deployment: &Deployment) -> Result<&DeploymentSpec, SyncError> {
    deployment.spec.as_ref().ok_or_else(|| SyncError::Other("the deployment has no spec".into()))
}

fn selects_set(deployment: &Deployment, set: &ReplicaSet) -> bool {
    deployment.spec.as_ref().is_some_and(|spec| !selects_everything(&spec.selector) && selects(Some(&spec.selector), labels(&set.metadata)))
}

fn size(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0)
}

fn wanted(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

/// A deployment's ReplicaSets: the one of its current template, and the others, oldest first.
#[derive(Clone, Debug, Default)]
struct Sets {
    new: Option<Arc<ReplicaSet>>,
    old: Vec<Arc<ReplicaSet>>,
}

impl Sets {
    fn all(&self) -> impl Iterator<Item = &Arc<ReplicaSet>> {
        self.old.iter().chain(&self.new)
    }

    /// Puts a set's newer state in its place.
    fn replace(&mut self, set: Arc<ReplicaSet>) {
        for place in self.old.iter_mut().chain(&mut self.new) {
            if uid(&place.metadata) == uid(&set.metadata) {
                *place = set.clone();
            }
        }
    }
}

async fn sync(worker: Worker, key: Key) -> Outcome {
    let Some(deployment) = worker.informers.deployments.get(&key) else { return Ok(None) };
    if selects_everything(&spec(&deployment)?.selector) {
        worker.recorder.warning(&*deployment, "SelectingAll", "This deployment is selecting all pods. A non-empty selector is required.");
        return worker.observe_generation(&deployment).await;
    }
    let candidates = worker.informers.replica_sets.in_namespace(&key.namespace);
    let controller = controller_ref(&*deployment);
    let sets =
        pods::claim_all(&worker.informers.deployments, &*deployment, &controller, &worker.informers.replica_sets, candidates, |set| {
            selects(deployment.spec.as_ref().map(|spec| &spec.selector), labels(&set.metadata))
        })
        .await?;
    if is_terminating(&deployment.metadata) {
        let (deployment, sets) = worker.with_revision(deployment, sets).await?;
        return worker.write_status(&deployment, &sets, false).await;
    }
    let deployment = worker.note_pause(deployment).await?;
    let (deployment, sets) = worker.with_revision(deployment, sets).await?;
    let spec = spec(&deployment)?;
    if spec.paused == Some(true) || rollout::is_scaling_event(&deployment, &sets) {
        return worker.scale_only(deployment, sets).await;
    }
    match spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref()).unwrap_or("RollingUpdate") {
        "Recreate" => worker.recreate(deployment, sets).await,
        "RollingUpdate" => worker.roll(deployment, sets).await,
        other => Err(SyncError::Other(format!("unexpected deployment strategy type: {other}"))),
    }
}

impl Worker {
    async fn observe_generation(&self, deployment: &Deployment) -> Outcome {
        let mut updated = deployment.clone();
        let status = updated.status.get_or_insert_default();
        if status.observed_generation < deployment.metadata.generation {
            status.observed_generation = deployment.metadata.generation;
            self.informers.deployments.update_status(&updated).await?;
        }
        Ok(None)
    }

    /// Marks pausing and resuming on the Progressing condition, so that a pause doesn't count as lack of progress.
    async fn note_pause(&self, deployment: Arc<Deployment>) -> Result<Arc<Deployment>, SyncError> {
        match status::with_pause_noted(&deployment, Timestamp::now()) {
            Some(updated) => self.informers.deployments.update_status(&updated).await,
            None => Ok(deployment),
        }
    }

    /// Finds the set of the current template and brings its annotations, and the revision's on the deployment, up to date.
    async fn with_revision(&self, deployment: Arc<Deployment>, sets: Vec<Arc<ReplicaSet>>) -> Result<(Arc<Deployment>, Sets), SyncError> {
        let mut sets = revision::sort_out(&deployment, sets);
        let Some(new) = sets.new.clone() else { return Ok((deployment, sets)) };
        if let Some(updated) = revision::annotated(&deployment, &new, &sets.old) {
            sets.replace(self.informers.replica_sets.update(&updated).await?);
        }
        let new = sets.new.clone().unwrap_or(new);
        let revision = annotation(&new.metadata, revision::REVISION).unwrap_or_default().to_owned();
        let mut deployment = self.set_revision(deployment, &revision).await?;
        if status::has_deadline(&deployment) && status::progressing(&deployment).is_none() {
            let message = format!("Found new replica set \"{}\"", name(&new.metadata));
            deployment = self.set_progress(&deployment, conditions::TRUE, "FoundNewReplicaSet", message).await?;
        }
        Ok((deployment, sets))
    }

    async fn set_revision(&self, deployment: Arc<Deployment>, revision: &str) -> Result<Arc<Deployment>, SyncError> {
        if revision.is_empty() || annotation(&deployment.metadata, revision::REVISION) == Some(revision) {
            return Ok(deployment);
        }
        let patch = json!({"metadata": {"annotations": {revision::REVISION: revision}}});
        self.informers.deployments.merge(&Key::of(&*deployment), patch).await
    }

    async fn set_progress(
        &self,
        deployment: &Deployment,
        state: &str,
        reason: &str,
        message: String,
    ) -> Result<Arc<Deployment>, SyncError> {
        let mut updated = deployment.clone();
        status::set(updated.status.get_or_insert_default(), "Progressing", state, reason, message, Timestamp::now());
        self.informers.deployments.update_status(&updated).await
    }

    /// Makes the current template's set when there is none.
    async fn ensure_new(&self, deployment: Arc<Deployment>, mut sets: Sets) -> Result<(Arc<Deployment>, Sets), SyncError> {
        if sets.new.is_some() {
            return Ok((deployment, sets));
        }
        let set = revision::new_set(&deployment, &sets.old)?;
        let count = size(&set);
        let revision = annotation(&set.metadata, revision::REVISION).unwrap_or_default().to_owned();
        let mut deployment = deployment;
        match self.informers.replica_sets.create(&set).await {
            Ok(created) => {
                let title = name(&created.metadata).to_owned();
                if count > 0 {
                    self.recorder.normal(&*deployment, "ScalingReplicaSet", format!("Scaled up replica set {title} from 0 to {count}"));
                }
                sets.new = Some(created);
                deployment = self.set_revision(deployment, &revision).await?;
                if status::has_deadline(&deployment) {
                    let message = format!("Created new replica set \"{title}\"");
                    deployment = self.set_progress(&deployment, conditions::TRUE, "NewReplicaSetCreated", message).await?;
                }
                Ok((deployment, sets))
            }
            Err(error) if error.is_already_exists() => self.after_name_clash(&deployment, sets, &set, error).await,
            Err(error) if error.is_namespace_terminating() => Err(error),
            Err(error) => {
                let message = format!("Failed to create new replica set \"{}\": {}", name(&set.metadata), error.message());
                if status::has_deadline(&deployment) {
                    // The creation's failure is the bigger news than one in writing it down.
                    let _ = self.set_progress(&deployment, conditions::FALSE, "ReplicaSetCreateError", message.clone()).await;
                }
                self.recorder.warning(&*deployment, "ReplicaSetCreateError", message);
                Err(error)
            }
        }
    }

    /// A set of that name exists: ours after all, or another template with the same hash, which asks for another hash.
    async fn after_name_clash(
        &self,
        deployment: &Arc<Deployment>,
        mut sets: Sets,
        wanted: &ReplicaSet,
        error: SyncError,
    ) -> Result<(Arc<Deployment>, Sets), SyncError> {
        let Some(existing) = self.informers.replica_sets.get_live(&Key::of(wanted)).await? else { return Err(error) };
        let ours = controller_of(&existing.metadata).is_some_and(|controller| controller.uid == uid(&deployment.metadata));
        if ours && revision::same_template(deployment, &existing) {
            sets.new = Some(Arc::new(existing));
            return Ok((deployment.clone(), sets));
        }
        let mut updated = (**deployment).clone();
        let status = updated.status.get_or_insert_default();
        status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
        self.informers.deployments.update_status(&updated).await?;
        Err(error)
    }

    async fn scale(&self, deployment: &Deployment, set: &ReplicaSet, to: i32) -> Result<Option<Arc<ReplicaSet>>, SyncError> {
        let Some(updated) = rollout::resized(deployment, set, to) else { return Ok(None) };
        let (title, from) = (name(&set.metadata), size(set));
        let written = self.informers.replica_sets.update(&updated).await?;
        if from != to {
            let direction = if from < to { "up" } else { "down" };
            self.recorder.normal(deployment, "ScalingReplicaSet", format!("Scaled {direction} replica set {title} from {from} to {to}"));
        }
        Ok(Some(written))
    }

    /// Does `sizes`; whether any set's size changed.
    async fn scale_all(&self, deployment: &Deployment, sets: &mut Sets, sizes: Vec<(Arc<ReplicaSet>, i32)>) -> Result<bool, SyncError> {
        let mut changed = false;
        for (set, to) in sizes {
            changed |= size(&set) != to;
            if let Some(written) = self.scale(deployment, &set, to).await? {
                sets.replace(written);
            }
        }
        Ok(changed)
    }

    async fn scale_only(&self, deployment: Arc<Deployment>, mut sets: Sets) -> Outcome {
        let sizes = rollout::proportional(&deployment, &sets);
        self.scale_all(&deployment, &mut sets, sizes).await?;
        if deployment.spec.as_ref().and_then(|spec| spec.paused) == Some(true) {
            self.clean_up(&deployment, &sets).await?;
        }
        self.write_status(&deployment, &sets, false).await
    }

    async fn roll(&self, deployment: Arc<Deployment>, sets: Sets) -> Outcome {
        let (deployment, mut sets) = self.ensure_new(deployment, sets).await?;
        let up = rollout::scale_up_new(&deployment, &sets);
        if self.scale_all(&deployment, &mut sets, up).await? {
            return self.write_status(&deployment, &sets, true).await;
        }
        let down = rollout::scale_down_old(&deployment, &sets);
        if self.scale_all(&deployment, &mut sets, down).await? {
            return self.write_status(&deployment, &sets, true).await;
        }
        self.finish(deployment, sets).await
    }

    async fn recreate(&self, deployment: Arc<Deployment>, mut sets: Sets) -> Outcome {
        let down = sets.old.iter().filter(|set| size(set) > 0).map(|set| (set.clone(), 0)).collect();
        if self.scale_all(&deployment, &mut sets, down).await? || self.old_pods_run(&deployment, &sets) {
            return self.write_status(&deployment, &sets, true).await;
        }
        let (deployment, mut sets) = self.ensure_new(deployment, sets).await?;
        let up = sets.new.clone().filter(|set| size(set) != wanted(&deployment)).map(|set| (set, wanted(&deployment)));
        self.scale_all(&deployment, &mut sets, up.into_iter().collect()).await?;
        self.finish(deployment, sets).await
    }

    fn old_pods_run(&self, deployment: &Deployment, sets: &Sets) -> bool {
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        let old: Vec<&str> = sets.old.iter().map(|set| uid(&set.metadata)).collect();
        let counted = sets.old.iter().any(|set| set.status.as_ref().is_some_and(|status| status.replicas > 0));
        let runs = |pod: &k8s_openapi::api::core::v1::Pod| {
            !is_terminal(pod) && controller_of(&pod.metadata).is_some_and(|controller| old.contains(&controller.uid.as_str()))
        };
        counted || !self.informers.pods.select(namespace, runs).is_empty()
    }

    async fn finish(&self, deployment: Arc<Deployment>, sets: Sets) -> Outcome {
        if deployment.status.as_ref().is_some_and(|known| status::is_complete(&deployment, known)) {
            self.clean_up(&deployment, &sets).await?;
        }
        self.write_status(&deployment, &sets, true).await
    }

    /// Deletes old, empty sets beyond the history limit, oldest revision first.
    async fn clean_up(&self, deployment: &Deployment, sets: &Sets) -> Result<(), SyncError> {
        for set in revision::beyond_history(deployment, &sets.old) {
            unless_gone(self.informers.replica_sets.delete(&set, DeleteParams::default()).await)?;
        }
        Ok(())
    }

    async fn write_status(&self, deployment: &Deployment, sets: &Sets, rolling: bool) -> Outcome {
        let now = Timestamp::now();
        let status = status::of(deployment, sets, rolling, now);
        if deployment.status.as_ref() != Some(&status) {
            let mut updated = deployment.clone();
            updated.status = Some(status);
            return match self.informers.deployments.update_status(&updated).await {
                Err(error) if error.is_not_found() => Ok(None),
                Err(error) => Err(error),
                // The write comes back as a change, and with it the question when to look again.
                Ok(_) => Ok(None),
            };
        }
        Ok(if rolling { status::check_again(deployment, now).map(Duration::from_secs) } else { None })
    }
}
