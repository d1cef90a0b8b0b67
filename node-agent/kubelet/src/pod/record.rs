//! What is known of one pod, shared between its worker, its probes and whoever asks.
use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodStatus};
use tokio::sync::Notify;

use super::meta::{find_container, uid_of};
use super::resize::{self, Resize};
use super::status::{Verdict, Waiting};
use crate::probe::Subject;
use crate::runtime::PodView;

/// Where the pod came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Api,
    File,
}

/// The mutable part, behind one lock that is never held across an await.
#[derive(Default)]
struct Inner {
    /// As its source has it.
    object: Arc<Pod>,
    /// With the resources that the node has granted.
    pod: Arc<Pod>,
    resize: Resize,
    status: PodStatus,
    view: Option<Arc<PodView>>,
    waiting: HashMap<String, Waiting>,
    /// The node's own verdict on the pod.
    failed: Option<Verdict>,
    /// The object is gone from where it came.
    gone: bool,
    /// When to look again although nothing happens.
    retry_after: Option<Duration>,
}

pub struct Record {
    pub uid: String,
    pub source: Source,
    inner: RwLock<Inner>,
    pub wake: Notify,
}

impl Record {
    pub fn new(pod: Arc<Pod>, source: Source) -> Self {
        let mut inner =
            Inner { object: pod.clone(), status: pod.status.clone().unwrap_or_default(), resize: Resize::of(&pod), ..Inner::default() };
        inner.pod = resize::allocated(&pod, &inner.resize.allocated);
        Self { uid: uid_of(&pod).to_owned(), source, inner: RwLock::new(inner), wake: Notify::new() }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The pod with the resources that the node has granted it.
    pub fn pod(&self) -> Arc<Pod> {
        self.read().pod.clone()
    }

    /// The pod as its source has it.
    pub fn object(&self) -> Arc<Pod> {
        self.read().object.clone()
    }

    /// Takes a newer object in and wakes the worker.
    pub fn update(&self, pod: Arc<Pod>) {
        let mut inner = self.write();
        inner.pod = resize::allocated(&pod, &inner.resize.allocated);
        inner.object = pod;
        drop(inner);
        self.wake.notify_one();
    }

    /// Notes what a container has from now on.
    pub fn start_with(&self, container: &Container) {
        let resize = &mut self.write().resize;
        if resize.allocated.contains_key(&container.name) {
            resize.actuated.insert(container.name.clone(), container.resources.clone().unwrap_or_default());
        }
    }

    /// Whether a resize waits for room on the node.
    pub fn is_resize_deferred(&self) -> bool {
        self.read().resize.pending.as_ref().is_some_and(|pending| pending.reason.as_deref() == Some("Deferred"))
    }

    pub fn resize(&self) -> Resize {
        self.read().resize.clone()
    }

    /// Changes how the pod's resizes stand.
    pub fn change_resize<T>(&self, change: impl FnOnce(&mut Resize, &Arc<Pod>) -> T) -> T {
        let mut inner = self.write();
        let object = inner.object.clone();
        let result = change(&mut inner.resize, &object);
        inner.pod = resize::allocated(&object, &inner.resize.allocated);
        result
    }

    pub fn mark_gone(&self) {
        self.write().gone = true;
        self.wake.notify_one();
    }

    pub fn is_gone(&self) -> bool {
        self.read().gone
    }

    pub fn status(&self) -> PodStatus {
        self.read().status.clone()
    }

    pub fn set_status(&self, status: PodStatus) {
        self.write().status = status;
    }

    pub fn view(&self) -> Option<Arc<PodView>> {
        self.read().view.clone()
    }

    pub fn set_view(&self, view: Arc<PodView>) {
        self.write().view = Some(view);
    }

    pub fn waiting(&self) -> HashMap<String, Waiting> {
        self.read().waiting.clone()
    }

    pub fn set_waiting(&self, container: &str, waiting: Option<Waiting>) {
        let mut inner = self.write();
        match waiting {
            Some(waiting) => drop(inner.waiting.insert(container.to_owned(), waiting)),
            None => drop(inner.waiting.remove(container)),
        }
    }

    pub fn failed(&self) -> Option<Verdict> {
        self.read().failed.clone()
    }

    /// Refuses or evicts the pod; the first verdict stands.
    pub fn fail(&self, verdict: Verdict) {
        self.write().failed.get_or_insert(verdict);
        self.wake.notify_one();
    }

    /// Asks for another look after that time; the shortest one asked for counts.
    pub fn retry_after(&self, after: Duration) {
        let mut inner = self.write();
        inner.retry_after = Some(inner.retry_after.map_or(after, |before| before.min(after)));
    }

    pub fn take_retry(&self) -> Option<Duration> {
        self.write().retry_after.take()
    }

    /// The object with the status that the kubelet holds, which is newer than the API server's.
    pub fn with_status(&self) -> Pod {
        let inner = self.read();
        Pod { status: Some(inner.status.clone()), ..(*inner.object).clone() }
    }
}

impl Subject for Record {
    fn pod(&self) -> Arc<Pod> {
        Record::pod(self)
    }

    fn container_status(&self, name: &str) -> Option<ContainerStatus> {
        let inner = self.read();
        let lists = [&inner.status.container_statuses, &inner.status.init_container_statuses];
        let found = lists.into_iter().flat_map(|list| list.iter().flatten()).find(|status| status.name == name).cloned();
        found.filter(|_| find_container(&inner.pod, name).is_some())
    }

    fn pod_ip(&self) -> String {
        self.read().status.pod_ip.clone().unwrap_or_default()
    }

    fn phase(&self) -> String {
        self.read().status.phase.clone().unwrap_or_default()
    }

    fn wake(&self) {
        self.wake.notify_one();
    }
}
