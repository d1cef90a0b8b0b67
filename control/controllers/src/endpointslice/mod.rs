//! EndpointSlices of Services with a selector: which addresses answer for a Service, a hundred to a slice.
mod hints;
pub mod plan;
pub mod trigger;

use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::DeleteParams;
use tokio::task::JoinSet;

use crate::error::{SyncError, unless_gone};
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, annotation, is_terminating, labels, namespace, selects_all_of};
use crate::store::Store;
use crate::worker::{self, Outcome, Queue};
use crate::{Context, objects};

pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub const HEADLESS: &str = "service.kubernetes.io/headless";
pub const CONTROLLER: &str = "endpointslice-controller.k8s.io";
/// Endpoints per slice.
pub const MAX_ENDPOINTS: usize = 100;

#[derive(Clone)]
struct Worker {
    informers: Arc<Informers>,
    recorder: Recorder,
    triggers: Arc<Mutex<trigger::TriggerTimes>>,
}

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    watch_services_and_pods(&context.informers, &queue);
    let add = queue.clone();
    context.informers.endpoint_slices.on_change(move |old, new| {
        if let Some(slice) = new.or(old).filter(|slice| is_managed_by(slice, CONTROLLER))
            && let Some(service) = labels(&slice.metadata).get(SERVICE_NAME)
        {
            add.add(Key::new(namespace(&slice.metadata), service.clone()));
        }
    });
    let (add, services) = (queue.clone(), context.informers.services.clone());
    context.informers.nodes.on_change(move |old, new| {
        if old.map(|node| zone(node)) != new.map(|node| zone(node)) {
            services.list().iter().for_each(|service| add.add(Key::of(&**service)));
        }
    });
    let worker = Worker {
        informers: context.informers.clone(),
        recorder: context.recorder.named("endpoint-slice-controller"),
        triggers: Arc::default(),
    };
    tasks.spawn(worker::run("endpointslice", queue, 5, move |key| sync(worker.clone(), key)));
}

pub fn is_managed_by(slice: &EndpointSlice, controller: &str) -> bool {
    labels(&slice.metadata).get(MANAGED_BY).is_some_and(|name| name == controller)
}

pub fn zone(node: &Node) -> Option<String> {
    labels(&node.metadata).get("topology.kubernetes.io/zone").cloned()
}

/// Queues a Service when it changes, and when a pod changes in a way that its endpoints could show.
pub fn watch_services_and_pods(informers: &Informers, queue: &Queue<Key>) {
    let add = queue.clone();
    informers.services.on_change(move |old, new| {
        if let Some(service) = new.or(old) {
            add.add(Key::of(&**service));
        }
    });
    let (add, services) = (queue.clone(), informers.services.clone());
    informers.pods.on_change(move |old, new| {
        if let (Some(old), Some(new)) = (old, new)
            && !matters(old, new)
        {
            return;
        }
        let Some(pod) = new.or(old) else { return };
        let before = old.map(|pod| labels(&pod.metadata));
        let after = new.map(|pod| labels(&pod.metadata));
        let selected = |service: &Service| {
            let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
            [before, after].into_iter().flatten().any(|labels| selects_all_of(selector, labels))
        };
        for service in services.select(namespace(&pod.metadata), selected) {
            add.add(Key::of(&*service));
        }
    });
}

fn matters(old: &Pod, new: &Pod) -> bool {
    let shown = |pod: &Pod| {
        let status = pod.status.as_ref();
        let spec = pod.spec.as_ref();
        (
            objects::is_ready(pod),
            objects::is_terminal(pod),
            is_terminating(&pod.metadata),
            status.and_then(|status| status.pod_ips.clone()),
            spec.and_then(|spec| spec.node_name.clone()),
            spec.and_then(|spec| spec.hostname.clone()),
            pod.metadata.uid.clone(),
        )
    };
    labels(&old.metadata) != labels(&new.metadata) || shown(old) != shown(new)
}

async fn sync(worker: Worker, key: Key) -> Outcome {
    let informers = &worker.informers;
    let Some(service) = informers.services.get(&key) else {
        // The slices go with their owner, by garbage collection.
        lock(&worker.triggers).forget(&key);
        return Ok(None);
    };
    let Some(spec) = &service.spec else { return Ok(None) };
    if spec.type_.as_deref() == Some("ExternalName") || spec.selector.is_none() {
        return Ok(None);
    }
    let pods = informers.pods.select(&key.namespace, |pod| selects_all_of(spec.selector.as_ref(), labels(&pod.metadata)));
    let slices = informers
        .endpoint_slices
        .select(&key.namespace, |slice| is_managed_by(slice, CONTROLLER) && labels(&slice.metadata).get(SERVICE_NAME) == Some(&key.name));
    let trigger = lock(&worker.triggers).observe(&key, &service, &pods);
    let nodes = |name: &str| informers.nodes.get(&Key::new("", name));
    let plan = plan::plan(&service, &pods, nodes, &slices);
    let result = apply(&informers.endpoint_slices, &plan.changes, trigger.as_deref(), is_terminating(&service.metadata)).await;
    if let Err(error) = result {
        if error.is_namespace_terminating() {
            return Ok(None);
        }
        if !error.is_conflict() && !error.is_not_found() {
            let message = format!("Error updating Endpoint Slices for Service {key}: {}", error.message());
            worker.recorder.warning(&*service, "FailedToUpdateEndpointSlices", message);
        }
        return Err(error);
    }
    if let Some(pod) = plan.without_node {
        return Err(SyncError::Other(format!("pod {pod} of service {key} is on a node that isn't there")));
    }
    Ok(None)
}

/// Writes `changes`; a new slice has no name yet.
pub async fn apply(store: &Store<EndpointSlice>, changes: &plan::Changes, trigger: Option<&str>, no_new: bool) -> Result<(), SyncError> {
    const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
    let stamp = |slice: &EndpointSlice| {
        let mut slice = slice.clone();
        match trigger {
            Some(time) => {
                slice.metadata.annotations.get_or_insert_default().insert(TRIGGER_TIME.into(), time.into());
            }
            None if annotation(&slice.metadata, TRIGGER_TIME).is_some() => {
                slice.metadata.annotations.get_or_insert_default().remove(TRIGGER_TIME);
            }
            None => {}
        }
        slice
    };
    if !no_new {
        for slice in &changes.create {
            store.create(&stamp(slice)).await?;
        }
    }
    for slice in &changes.update {
        store.update(&stamp(slice)).await?;
    }
    for slice in &changes.delete {
        unless_gone(store.delete(slice, DeleteParams::default()).await)?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
