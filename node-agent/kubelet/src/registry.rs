//! All pods of the node, and the loop that hands changes from their sources to their workers.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use futures::FutureExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use outrigger_cluster::status::events::Kind;
use outrigger_cluster::{Delta, Key};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info};

use crate::eviction;
use crate::host::Host;
use crate::pod::meta::{full_name, is_mirror, is_terminal_phase, name_of, namespace_of, phase, uid_of};
use crate::pod::record::{Record, Source};
use crate::pod::{admission, resize, worker};

/// The records by UID.
#[derive(Default)]
pub struct Registry {
    records: RwLock<HashMap<String, Arc<Record>>>,
}

impl Registry {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<String, Arc<Record>>> {
        self.records.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<String, Arc<Record>>> {
        self.records.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn get(&self, uid: &str) -> Option<Arc<Record>> {
        self.read().get(uid).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Record>> {
        self.read().values().cloned().collect()
    }

    pub fn uids(&self) -> HashSet<String> {
        self.read().keys().cloned().collect()
    }

    /// The newest pod of that name.
    pub fn named(&self, namespace: &str, name: &str) -> Option<Arc<Record>> {
        let records = self.read();
        let found = records.values().filter(|record| {
            let pod = record.pod();
            namespace_of(&pod) == namespace && name_of(&pod) == name
        });
        found.max_by_key(|record| record.pod().metadata.creation_timestamp.clone()).cloned()
    }

    pub fn wake(&self, uid: &str) {
        if let Some(record) = self.get(uid) {
            record.wake.notify_one();
        }
    }
}

/// Before a worker that broke down is started again.
const RESTART_PAUSE: Duration = Duration::from_secs(5);

/// Does the work, from its beginning again after each panic: whatever it was about must not be left alone for ever.
async fn until_done<F: Future<Output = ()>>(uid: &str, pause: Duration, mut work: impl FnMut() -> F) {
    while AssertUnwindSafe(work()).catch_unwind().await.is_err() {
        error!(uid, "the pod's worker panicked; starting it anew");
        tokio::time::sleep(pause).await;
    }
}

type StaticPods = Option<BTreeMap<String, Arc<Pod>>>;

/// Follows the sources of pods for ever. `synced` turns true once each has been read in full.
pub async fn run(
    host: Arc<Host>,
    registry: Arc<Registry>,
    mut static_pods: Option<watch::Receiver<StaticPods>>,
    synced: watch::Sender<bool>,
) {
    let mut api = host.watch.pods.subscribe();
    let mut changes = host.lookup.changes();
    let (ended, mut ends) = mpsc::unbounded_channel::<String>();
    let dispatcher = Dispatcher { host, registry, ended };
    let mut api_read = false;
    loop {
        tokio::select! {
            delta = api.recv() => match delta {
                Some(delta) => {
                    api_read = true;
                    dispatcher.take_delta(delta);
                }
                // The mirror lives as long as the agent.
                None => return,
            },
            Some(uid) = ends.recv() => {
                dispatcher.registry.write().remove(&uid);
                // Its name may be free for the next version of a static pod.
                dispatcher.take_static(static_pods.as_ref().map(|pods| pods.borrow().clone()).unwrap_or_default());
            }
            Ok(uid) = changes.recv() => dispatcher.registry.wake(&uid),
            Ok(()) = async {
                match &mut static_pods {
                    Some(pods) => pods.changed().await,
                    None => std::future::pending().await,
                }
            } => {
                let pods = static_pods.as_mut().map(|pods| pods.borrow_and_update().clone()).unwrap_or_default();
                dispatcher.take_static(pods);
            }
        }
        dispatcher.retry_resizes();
        let static_read = static_pods.as_ref().is_none_or(|pods| pods.borrow().is_some());
        if api_read && static_read {
            synced.send_if_modified(|synced| !std::mem::replace(synced, true));
        }
    }
}

fn generation(pod: &Pod) -> i64 {
    pod.metadata.generation.unwrap_or(0)
}

struct Dispatcher {
    host: Arc<Host>,
    registry: Arc<Registry>,
    ended: mpsc::UnboundedSender<String>,
}

impl Dispatcher {
    fn take_delta(&self, delta: Delta<Pod>) {
        match delta {
            Delta::Replaced(pods) => {
                let uids: HashSet<&str> = pods.iter().map(|pod| uid_of(pod)).collect();
                let mut in_order: Vec<&Arc<Pod>> = pods.iter().collect();
                in_order.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
                for pod in in_order {
                    self.take_applied(pod);
                }
                for record in self.registry.all() {
                    if record.source == Source::Api && !uids.contains(record.uid.as_str()) {
                        record.mark_gone();
                    }
                }
            }
            Delta::Applied(pod) => self.take_applied(&pod),
            Delta::Deleted(pod) => match self.registry.get(uid_of(&pod)) {
                Some(record) => {
                    record.update(pod);
                    record.mark_gone();
                }
                None => self.wake_owner_of(&pod),
            },
        }
    }

    fn take_applied(&self, pod: &Arc<Pod>) {
        if is_mirror(pod) {
            self.wake_owner_of(pod);
            return;
        }
        match self.registry.get(uid_of(pod)) {
            Some(record) => {
                record.update(pod.clone());
                self.answer_resize(&record);
            }
            None => self.add(pod.clone(), Source::Api),
        }
    }

    /// Grants the resources that the pod asks for now, or says why not.
    fn answer_resize(&self, record: &Record) {
        let object = record.object();
        if !record.resize().wanted(&object) {
            // What was put off may have been taken back.
            record.change_resize(|resize, _| resize.pending = None);
            return;
        }
        if object.metadata.deletion_timestamp.is_some() || is_terminal_phase(phase(&object)) {
            return;
        }
        let (event, kind, message) = match resize::answer(&object, &self.active(&record.uid), &self.host.allocatable) {
            resize::Answer::Granted => {
                record.change_resize(|resize, object| resize.grant(object, Timestamp::now()));
                ("ResizeStarted", Kind::Normal, resize::event("started", &object, generation(&object), ""))
            }
            resize::Answer::Pending { reason, message } => {
                if !record.change_resize(|resize, pod| resize.put_off(reason, &message, pod.metadata.generation, Timestamp::now())) {
                    return;
                }
                let event = if reason == "Deferred" { "ResizeDeferred" } else { "ResizeInfeasible" };
                (event, Kind::Warning, resize::event(reason, &object, generation(&object), &message))
            }
        };
        info!(pod = %full_name(&object), message, "resize");
        self.host.writer.event(&crate::pod::meta::reference(&object), kind, event, message);
        record.wake.notify_one();
    }

    /// Something happened that may have made room for resizes that wait for it.
    fn retry_resizes(&self) {
        let mut waiting: Vec<Arc<Record>> = self.registry.all().into_iter().filter(|record| record.is_resize_deferred()).collect();
        waiting.sort_by_cached_key(|record| resize::turn(&record.object(), &record.pod(), &record.resize()));
        waiting.iter().for_each(|record| self.answer_resize(record));
    }

    /// The pods that use the node's resources, but that one.
    fn active(&self, but: &str) -> Vec<Arc<Pod>> {
        let active = |record: &Arc<Record>| {
            record.uid != but && !record.status().phase.as_deref().is_some_and(is_terminal_phase) && record.failed().is_none()
        };
        self.registry.all().into_iter().filter(active).map(|record| record.pod()).collect()
    }

    /// A mirror's change concerns the static pod behind it.
    fn wake_owner_of(&self, mirror: &Pod) {
        if let Some(record) = self.registry.named(namespace_of(mirror), name_of(mirror)).filter(|record| record.source == Source::File) {
            record.wake.notify_one();
        }
    }

    fn take_static(&self, pods: StaticPods) {
        let Some(pods) = pods else { return };
        for record in self.registry.all() {
            if record.source == Source::File && !pods.contains_key(&record.uid) {
                record.mark_gone();
            }
        }
        for (uid, pod) in pods {
            // The older version of the manifest has to be gone first.
            let name_taken = self.registry.named(namespace_of(&pod), name_of(&pod)).is_some();
            if self.registry.get(&uid).is_none() && !name_taken {
                self.add(pod, Source::File);
            }
        }
    }

    fn add(&self, pod: Arc<Pod>, source: Source) {
        let record = Arc::new(Record::new(pod.clone(), source));
        self.admit(&record, &pod);
        debug!(pod = %full_name(&pod), ?source, "new");
        self.registry.write().insert(record.uid.clone(), record.clone());
        let (host, ended) = (self.host.clone(), self.ended.clone());
        tokio::spawn(async move {
            let uid = record.uid.clone();
            until_done(&uid, RESTART_PAUSE, || worker::run(host.clone(), record.clone())).await;
            // The loop that listens lives as long as the agent.
            let _ = ended.send(uid);
        });
    }

    /// A pod that ran here before the agent was restarted isn't asked again.
    fn admit(&self, record: &Record, pod: &Pod) {
        let status = pod.status.as_ref();
        let fresh = phase(pod).is_empty() || (phase(pod) == "Pending" && status.is_none_or(|status| status.start_time.is_none()));
        if !fresh || pod.metadata.deletion_timestamp.is_some() {
            return;
        }
        let others = self.active(&record.uid);
        let node = self.host.watch.nodes.get(&Key::new("", &self.host.config.node_name));
        let admitted = eviction::admit(pod, &self.host.pressure.conditions())
            .and_then(|()| admission::admit(pod, &others, &self.host.allocatable, node.as_deref()));
        if let Err(verdict) = admitted {
            info!(pod = %full_name(pod), reason = verdict.reason, message = verdict.message, "refused");
            self.host.writer.event(&crate::pod::meta::reference(pod), Kind::Warning, &verdict.reason, verdict.message.clone());
            record.fail(verdict);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_panics_is_begun_again() {
        let mut begun = 0;
        until_done("uid", Duration::ZERO, || {
            begun += 1;
            let attempt = begun;
            async move { assert!(attempt == 3, "expected: the first attempts panic") }
        })
        .await;
        assert_eq!(begun, 3);
    }
}
