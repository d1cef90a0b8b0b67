//! Job: runs pods until enough of them have succeeded, or too many have failed.
//!
//! `facts` reads, `indexes` and `policy` interpret, `state` decides; this file does. Finished pods are counted
//! exactly once: each keeps a finalizer until its uid stands in the status, and leaves the status once its
//! finalizer is off.
mod facts;
mod indexes;
mod policy;
mod state;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tokio::task::JoinSet;

use crate::Context;
use crate::error::{SyncError, unless_gone};
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, controller_of, controller_ref, is_ready, is_terminating, labels, selects, uid};
use crate::pods;
use crate::worker::{self, Outcome, Queue};

use facts::{Failures, TRACKING, has_tracking, is_finished};
use state::{Plan, State};

const CONTROLLER: &str = "job-controller";
/// Pods that end together are counted together.
const BATCH: Duration = Duration::from_millis(100);

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let informers = &context.informers;
    let add = queue.clone();
    informers.jobs.on_change(move |old, new| {
        if let Some(object) = new.or(old) {
            add.add(Key::of(&**object));
        }
    });
    let (add, owners) = (queue.clone(), informers.jobs.clone());
    informers.pods.on_change(move |old, new| {
        pods::concerned::<Job, Pod>(old, new, &owners, selects_pod, |key| add.add_after(key, BATCH));
    });
    let worker = Worker { informers: informers.clone(), recorder: context.recorder.named(CONTROLLER), failures: Arc::default() };
    start_orphans(context, tasks);
    tasks.spawn(worker::run("job", queue, 5, move |key| sync(worker.clone(), key)));
}

fn selects_pod(job: &Job, pod: &Pod) -> bool {
    job.spec.as_ref().is_some_and(|spec| selects(spec.selector.as_ref(), labels(&pod.metadata)))
}

/// Pods that no Job counts any more must not be held by the finalizer.
fn start_orphans(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let (add, jobs) = (queue.clone(), context.informers.jobs.clone());
    context.informers.pods.on_change(move |_, new| {
        if let Some(pod) = new.filter(|pod| has_tracking(pod))
            && pods::owner_key::<Job>(&pod.metadata).is_none_or(|key| jobs.get(&key).is_none())
        {
            add.add(Key::of(&**pod));
        }
    });
    let (add, pods) = (queue.clone(), context.informers.pods.clone());
    context.informers.jobs.on_change(move |old, new| {
        if let (Some(gone), None) = (old, new) {
            let space = gone.metadata.namespace.as_deref().unwrap_or_default();
            let held = |pod: &Pod| has_tracking(pod) && controller_of(&pod.metadata).is_some_and(|owner| owner.uid == uid(&gone.metadata));
            pods.select(space, held).iter().for_each(|pod| add.add(Key::of(&**pod)));
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("job-orphans", queue, 2, move |key| release(informers.clone(), key)));
}

async fn release(informers: Arc<Informers>, key: Key) -> Outcome {
    let Some(pod) = informers.pods.get(&key).filter(|pod| has_tracking(pod)) else { return Ok(None) };
    if let Some(job_key) = pods::owner_key::<Job>(&pod.metadata) {
        let owner = controller_of(&pod.metadata).map(|owner| owner.uid.clone()).unwrap_or_default();
        let counted = |job: &Job| uid(&job.metadata) == owner;
        if informers.jobs.get(&job_key).is_some_and(|job| counted(&job)) {
            return Ok(None);
        }
        // The pod's event may have been faster than its Job's.
        if informers.jobs.get_live(&job_key).await?.is_some_and(|job| counted(&job)) {
            return Ok(None);
        }
    }
    untrack(&informers, &pod).await?;
    Ok(None)
}

async fn untrack(informers: &Informers, pod: &Pod) -> Result<(), SyncError> {
    if !has_tracking(pod) {
        return Ok(());
    }
    let patch = json!({"metadata": {"uid": uid(&pod.metadata), "$deleteFromPrimitiveList/finalizers": [TRACKING]}});
    unless_gone(informers.pods.strategic(&Key::of(pod), patch).await)
}

#[derive(Clone)]
struct Worker {
    informers: Arc<Informers>,
    recorder: Recorder,
    /// Failures since the last success, per Job: kept in memory only, as upstream does.
    failures: Arc<Mutex<HashMap<Key, Failures>>>,
}

impl Worker {
    fn failures(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Failures>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn sync(worker: Worker, key: Key) -> Outcome {
    let informers = &worker.informers;
    let job = informers.jobs.get(&key);
    let Some(job) = job.filter(|job| !is_finished(job)) else {
        worker.failures().remove(&key);
        return Ok(None);
    };
    let spec = facts::spec(&job);
    if spec.managed_by.as_deref().is_some_and(|by| by != "kubernetes.io/job-controller") {
        return Ok(None);
    }
    if !matches!(spec.completion_mode.as_deref(), None | Some("NonIndexed" | "Indexed")) {
        worker.recorder.warning(&*job, "UnknownCompletionMode", "Skipped Job sync because completion mode is unknown");
        return Ok(None);
    }
    let owned = |pod: &Pod| controller_of(&pod.metadata).is_none_or(|controller| controller.uid == uid(&job.metadata));
    let candidates = informers.pods.select(&key.namespace, owned);
    let mut reference = controller_ref(&*job);
    reference.controller = Some(true);
    let pods = pods::claim_all(&informers.jobs, &*job, &reference, &informers.pods, candidates, |pod| selects_pod(&job, pod)).await?;
    let known = worker.failures().get(&key).copied().unwrap_or_default();
    let mut state = State::new((*job).clone(), pods, known, Timestamp::now());
    let plan = state.plan(Timestamp::now());
    let mut again = plan.again;
    let managed = worker.carry_out(&mut state, plan).await;
    let events = state.settle(Timestamp::now());
    for (severity_normal, reason, message) in events {
        if severity_normal {
            worker.recorder.normal(&*job, reason, message);
        } else {
            worker.recorder.warning(&*job, reason, message);
        }
    }
    worker.track(&key, &mut state).await?;
    if state.more_to_count {
        again = Some(Duration::ZERO);
    }
    managed?;
    Ok(again)
}

impl Worker {
    /// Deletes or creates pods, and keeps the state's counts in step.
    async fn carry_out(&self, state: &mut State, plan: Plan) -> Result<(), SyncError> {
        if !plan.delete.is_empty() {
            let job = state.job.clone();
            let results = join_all(plan.delete.iter().map(|pod| self.delete(&job, pod, plan.untrack_deleted))).await;
            let mut failure = Ok(());
            for (pod, result) in plan.delete.iter().zip(results) {
                match result {
                    Ok(()) => state.deleted(is_ready(pod)),
                    Err(error) => {
                        state.finished = None;
                        failure = Err(error);
                    }
                }
            }
            return failure;
        }
        let job = &state.job;
        let (created, result) = pods::slow_start(plan.create.len(), |place| {
            let pod = &plan.create[place];
            async move {
                match pods::create(&self.informers.pods, &self.recorder, job, pod).await {
                    Err(error) if error.is_namespace_terminating() => Ok(()),
                    other => other.map(drop),
                }
            }
        })
        .await;
        state.created(created);
        result
    }

    async fn delete(&self, job: &Job, pod: &Pod, untracked: bool) -> Result<(), SyncError> {
        if untracked {
            untrack(&self.informers, pod).await?;
        }
        pods::delete(&self.informers.pods, &self.recorder, job, pod).await
    }

    /// The two-step count: uids into the status, finalizers off, uids out of the status into the counters.
    async fn track(&self, key: &Key, state: &mut State) -> Result<(), SyncError> {
        let finished = state.count_pods(Timestamp::now());
        if state.flush {
            self.write(state).await?;
            self.failures().insert(key.clone(), state.failures);
        }
        let results = join_all(finished.iter().map(|pod| untrack(&self.informers, pod))).await;
        let mut failure = Ok(());
        for (pod, result) in finished.iter().zip(results) {
            match result {
                Ok(()) => state.untracked(uid(&pod.metadata)),
                Err(error) => failure = Err(error),
            }
        }
        state.move_to_counters();
        let ended = failure.is_ok() && state.enact(Timestamp::now());
        if state.flush {
            self.write(state).await?;
            if let Some(condition) = state.finished.clone().filter(|_| ended) {
                self.tell_end(state, &condition);
                self.failures().remove(key);
            }
        }
        failure
    }

    fn tell_end(&self, state: &State, condition: &k8s_openapi::api::batch::v1::JobCondition) {
        let job = &state.job;
        if condition.type_ != "Complete" {
            let reason = state::failure_reason(condition.reason.as_deref().unwrap_or_default());
            return self.recorder.warning(job, reason, condition.message.clone().unwrap_or_default());
        }
        let succeeded = job.status.as_ref().and_then(|status| status.succeeded).unwrap_or(0);
        if facts::spec(job).completions.is_some_and(|wanted| succeeded > wanted) {
            self.recorder.warning(job, "TooManySucceededPods", "Too many succeeded pods running after completion count reached");
        }
        self.recorder.normal(job, "Completed", "Job completed");
    }

    async fn write(&self, state: &mut State) -> Result<(), SyncError> {
        state.job = (*self.informers.jobs.update_status(&state.as_written()).await?).clone();
        state.job.status.get_or_insert_default().uncounted_terminated_pods.get_or_insert_default();
        state.flush = false;
        Ok(())
    }
}

/// A Job under deletion makes no pods, but goes on counting those that end.
fn may_manage(job: &Job) -> bool {
    !is_terminating(&job.metadata)
}
