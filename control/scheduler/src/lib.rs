//! The scheduler: finds a node for every pod that asks for it.
//!
//! The decision is pure: `schedule` and `preempt` over a `snapshot`, by `filter` and `score` with their plugins
//! (`affinity`, `spread`, `neighbours`, `volumes`, `resources`). Around it, `cache` and `queue` follow the watches,
//! `facts` gathers, `bind` writes, and this file turns the wheel.
pub mod affinity;
mod bind;
pub mod cache;
mod facts;
pub mod filter;
pub mod neighbours;
pub mod preempt;
pub mod queue;
pub mod resources;
pub mod schedule;
pub mod score;
pub mod snapshot;
pub mod spread;
pub mod volumes;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use outrigger_controllers::events::{Recorder, Shape};
use outrigger_controllers::objects::{Key, is_terminal, is_terminating, labels, name, pod_node, uid};
use outrigger_controllers::{Informers, SyncError};
use rand::Rng;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::cache::Cache;
use crate::filter::concern;
use crate::queue::Waiting;
use crate::snapshot::{PodInfo, Snapshot};

const NAME: &str = "default-scheduler";

/// Runs the scheduler until `shutdown` resolves.
pub async fn run(client: Client, shutdown: impl Future<Output = ()>) {
    let (informers, _watches) = Informers::start(client);
    run_with(informers, shutdown).await;
}

/// The same over watches that others share, as the controllers do.
pub async fn run_with(informers: Arc<Informers>, shutdown: impl Future<Output = ()>) {
    let work = async {
        informers.synced().await;
        let recorder = Recorder::start(informers.client.clone(), Shape::Series, NAME);
        let scheduler = Arc::new(Scheduler {
            writer: bind::Writer { informers: informers.clone(), recorder },
            cache: Mutex::default(),
            waiting: Mutex::default(),
            work: Notify::new(),
        });
        scheduler.clone().listen();
        info!("scheduler started");
        tokio::join!(scheduler.clone().turn(), scheduler.flush());
    };
    tokio::select! { () = work => {}, () = shutdown => {} }
}

struct Scheduler {
    writer: bind::Writer,
    cache: Mutex<Cache>,
    waiting: Mutex<Waiting>,
    /// Rung whenever a pod may have become ready to be tried.
    work: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pod that we are to place.
fn is_ours(pod: &Pod) -> bool {
    let spec = pod.spec.as_ref();
    let name = spec.and_then(|spec| spec.scheduler_name.as_deref()).unwrap_or(NAME);
    let gated = spec.is_some_and(|spec| spec.scheduling_gates.as_ref().is_some_and(|gates| !gates.is_empty()));
    name == NAME && pod_node(pod).is_empty() && !gated && !is_terminal(pod) && !is_terminating(&pod.metadata)
}

fn is_assigned(pod: &Pod) -> bool {
    !pod_node(pod).is_empty() && !is_terminal(pod)
}

/// What of a waiting pod decides where it can go.
fn differs(old: &Pod, new: &Pod) -> bool {
    old.spec != new.spec || labels(&old.metadata) != labels(&new.metadata) || old.metadata.annotations != new.metadata.annotations
}

impl Scheduler {
    fn listen(self: Arc<Self>) {
        let informers = self.writer.informers.clone();
        let me = self.clone();
        informers.namespaces.on_change(move |old, new| {
            if let Some(namespace) = new.or(old) {
                let labels = new.map(|new| labels(&new.metadata).clone());
                lock(&me.cache).set_namespace(name(&namespace.metadata), labels);
                me.changed(concern::NEIGHBOURS);
            }
        });
        let me = self.clone();
        informers.nodes.on_change(move |old, new| me.node_changed(old, new));
        let me = self.clone();
        informers.pods.on_change(move |old, new| me.pod_changed(old, new));
        let me = self.clone();
        informers.volume_claims.on_change(move |_, _| me.changed(concern::VOLUMES));
        let me = self.clone();
        informers.volumes.on_change(move |_, _| me.changed(concern::VOLUMES));
        informers.storage_classes.on_change(move |_, _| self.changed(concern::VOLUMES));
    }

    fn changed(&self, concern: u16) {
        lock(&self.waiting).changed(concern, Instant::now());
        self.work.notify_one();
    }

    fn node_changed(&self, old: Option<&Arc<Node>>, new: Option<&Arc<Node>>) {
        let facts = |node: &Node| {
            let status = node.status.as_ref();
            (labels(&node.metadata).clone(), node.spec.clone(), status.and_then(|status| status.allocatable.clone()))
        };
        match (old, new) {
            (Some(gone), None) => {
                lock(&self.cache).remove_node(name(&gone.metadata));
                self.changed(concern::SPREAD | concern::NEIGHBOURS);
            }
            (old, Some(node)) => {
                lock(&self.cache).set_node(node.clone());
                // Heartbeats change nothing for waiting pods.
                if old.is_none_or(|old| facts(old) != facts(node)) {
                    self.changed(concern::ALL);
                }
            }
            (None, None) => {}
        }
    }

    fn pod_changed(&self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        let was_assigned = old.is_some_and(|pod| is_assigned(pod));
        match new {
            Some(pod) if is_assigned(pod) => {
                lock(&self.waiting).remove(&Key::of(&**pod));
                lock(&self.cache).set_pod(pod.clone());
                let shown = |pod: &Pod| (labels(&pod.metadata).clone(), pod.spec.clone(), is_terminating(&pod.metadata));
                if !was_assigned || old.is_some_and(|old| shown(old) != shown(pod)) {
                    self.changed(concern::SPREAD | concern::NEIGHBOURS | if was_assigned { concern::RESOURCES } else { 0 });
                }
            }
            _ => {
                if let Some(gone) = old.filter(|_| was_assigned) {
                    lock(&self.cache).remove_pod(uid(&gone.metadata));
                    self.changed(concern::RESOURCES | concern::PORTS | concern::SPREAD | concern::NEIGHBOURS);
                }
                self.waiting_changed(old, new);
            }
        }
    }

    fn waiting_changed(&self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        match new.filter(|pod| is_ours(pod)) {
            Some(pod) => {
                if lock(&self.cache).is_assumed(uid(&pod.metadata)) {
                    return;
                }
                let info = Arc::new(PodInfo::new(pod.clone()));
                self.follow_nomination(&info);
                let mut waiting = lock(&self.waiting);
                let known = waiting.contains(&info.key());
                if known && old.is_some_and(|old| uid(&old.metadata) == info.uid() && !differs(old, pod)) {
                    waiting.refresh(info);
                } else {
                    waiting.add(info, Instant::now());
                    self.work.notify_one();
                }
            }
            None => {
                if let Some(pod) = new.or(old) {
                    lock(&self.waiting).remove(&Key::of(&**pod));
                    lock(&self.cache).drop_nomination(uid(&pod.metadata));
                }
            }
        }
    }

    fn follow_nomination(&self, pod: &Arc<PodInfo>) {
        let mut cache = lock(&self.cache);
        match pod.pod.status.as_ref().and_then(|status| status.nominated_node_name.as_deref()).filter(|node| !node.is_empty()) {
            Some(node) => cache.nominate(pod.clone(), node),
            None => cache.drop_nomination(pod.uid()),
        }
    }

    async fn flush(&self) {
        loop {
            tokio::time::sleep(Duration::from_secs(30)).await;
            lock(&self.waiting).flush(Instant::now());
            self.work.notify_one();
        }
    }

    /// One pod after the other: each cycle sees what the one before has decided.
    async fn turn(self: Arc<Self>) {
        loop {
            let (pod, due) = {
                let mut waiting = lock(&self.waiting);
                (waiting.pop(Instant::now()), waiting.next_due())
            };
            match (pod, due) {
                (Some(pod), _) => self.clone().cycle(pod).await,
                (None, Some(due)) => tokio::select! { () = self.work.notified() => {}, () = tokio::time::sleep_until(due) => {} },
                (None, None) => self.work.notified().await,
            }
        }
    }

    async fn cycle(self: Arc<Self>, pod: Arc<PodInfo>) {
        let begun = Instant::now();
        let facts = facts::gather(&self.writer.informers, &pod.pod);
        let snapshot = lock(&self.cache).snapshot();
        match schedule::schedule(&pod, &facts, &snapshot, |count| rand::rng().random_range(0..count)) {
            Ok(info) => {
                let node = info.name().to_owned();
                debug!(pod = %pod.key(), node, took = ?begun.elapsed(), "placed");
                let volumes = facts.volumes.bindings(&info, affinity::node_selector_matches).unwrap_or_default();
                lock(&self.cache).assume(pod.clone(), &node);
                tokio::spawn(async move { self.finish(pod, node, volumes).await });
            }
            Err(error) => self.fail(pod, facts, snapshot, error).await,
        }
    }

    async fn finish(self: Arc<Self>, pod: Arc<PodInfo>, node: String, volumes: Vec<volumes::Binding>) {
        match self.writer.bind(&pod, &node, &volumes).await {
            Ok(()) => lock(&self.waiting).remove(&pod.key()),
            Err(error) => self.binding_failed(&pod, &error).await,
        }
    }

    async fn binding_failed(&self, pod: &Arc<PodInfo>, error: &SyncError) {
        lock(&self.cache).forget(pod.uid());
        self.changed(concern::RESOURCES | concern::PORTS | concern::SPREAD | concern::NEIGHBOURS);
        let current = self.writer.informers.pods.get(&pod.key()).filter(|current| uid(&current.metadata) == pod.uid() && is_ours(current));
        if error.is_not_found() || current.is_none() {
            lock(&self.waiting).remove(&pod.key());
            return;
        }
        warn!(pod = %pod.key(), error = %error.message(), "binding failed; the pod is tried again");
        lock(&self.waiting).retry(&pod.key(), Instant::now());
        self.writer.report(pod, "SchedulerError", &format!("binding rejected: {}", error.message()), None).await;
        self.work.notify_one();
    }

    async fn fail(&self, pod: Arc<PodInfo>, facts: schedule::Facts, snapshot: Snapshot, mut error: Box<schedule::FitError>) {
        let budgets = self.writer.informers.disruption_budgets.list();
        let mut nominated = None;
        match preempt::preempt(&pod, &facts, &error, &snapshot, &budgets) {
            Ok(candidate) => {
                let lesser = lock(&self.cache).lesser_nominees(&candidate.node, pod.priority());
                lock(&self.cache).nominate(pod.clone(), &candidate.node);
                info!(pod = %pod.key(), node = candidate.node, victims = candidate.victims.len(), "preempting");
                match self.writer.preempt(&pod, &candidate, &lesser).await {
                    Ok(()) => nominated = Some(candidate.node),
                    Err(problem) => {
                        warn!(pod = %pod.key(), error = %problem.message(), "preemption failed");
                        lock(&self.cache).drop_nomination(pod.uid());
                    }
                }
            }
            Err(message) => {
                // Without a way to make room, an old promise is void, unless its victims are still going.
                if !message.contains("terminating pod on the nominated node") {
                    nominated = Some(String::new());
                    lock(&self.cache).drop_nomination(pod.uid());
                }
                error.preemption = message;
            }
        }
        debug!(pod = %pod.key(), reason = %error, "no node");
        lock(&self.waiting).fail(&pod.key(), error.concern(), Instant::now());
        self.writer.report(&pod, "Unschedulable", &error.to_string(), nominated.as_deref()).await;
    }
}
