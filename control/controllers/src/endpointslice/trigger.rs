//! When the change happened that made endpoints change: the annotation by which programming latency is measured.
use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Service};

use crate::objects::{Key, name, pod_condition};

#[derive(Default)]
pub struct TriggerTimes(HashMap<Key, Seen>);

#[derive(Default)]
struct Seen {
    service: Option<Timestamp>,
    pods: HashMap<String, Timestamp>,
}

impl TriggerTimes {
    /// The earliest change not seen before, in the annotation's format.
    pub fn observe(&mut self, key: &Key, service: &Service, pods: &[Arc<Pod>]) -> Option<String> {
        let created = service.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let ready =
            |pod: &Pod| pod_condition(pod, "Ready").and_then(|condition| condition.last_transition_time.as_ref()).map(|time| time.0);
        let now: HashMap<String, Timestamp> = pods.iter().filter_map(|pod| Some((name(&pod.metadata).to_owned(), ready(pod)?))).collect();
        let seen = self.0.entry(key.clone()).or_default();
        let fresh_pods = now.iter().filter(|(pod, time)| seen.pods.get(*pod).is_none_or(|before| before < *time)).map(|(_, time)| *time);
        let fresh_service = created.filter(|_| seen.service.is_none());
        let first = fresh_pods.chain(fresh_service).min();
        *seen = Seen { service: created, pods: now };
        first.map(|time| time.to_string())
    }

    pub fn forget(&mut self, key: &Key) {
        self.0.remove(key);
    }
}
