//! The queue of pod statuses: newest wins, in order per pod, retried until written or the pod is gone.
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::watch;
use tracing::{debug, warn};

use super::{code, patch};

/// The conditions that the node decides; all others belong to whoever set them.
const OWNED_CONDITIONS: &[&str] = &[
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodResizePending",
    "PodResizeInProgress",
    "AllContainersRestarting",
];
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LAST: Duration = Duration::from_secs(10);

/// Where a queued status ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrittenStatus {
    /// The API server has it.
    Written,
    /// The API server no longer knows the pod.
    PodGone,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Queued,
    Done(WrittenStatus),
}

struct Slot {
    namespace: String,
    name: String,
    /// What the API server has, as far as is known, and at which version.
    base: PodStatus,
    base_version: u64,
    wanted: PodStatus,
    writing: bool,
    progress: watch::Sender<Progress>,
}

pub(super) struct Statuses {
    client: Client,
    slots: Mutex<HashMap<String, Slot>>,
}

fn version(pod: &Pod) -> u64 {
    pod.resource_version().and_then(|version| version.parse().ok()).unwrap_or(0)
}

impl Statuses {
    pub(super) fn new(client: Client) -> Arc<Self> {
        Arc::new(Self { client, slots: Mutex::default() })
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn set(self: &Arc<Self>, pod: &Pod, status: PodStatus) {
        let uid = pod.uid().unwrap_or_default();
        let mut slots = self.slots();
        let slot = slots.entry(uid.clone()).or_insert_with(|| Slot {
            namespace: pod.namespace().unwrap_or_default(),
            name: pod.name_any(),
            base: pod.status.clone().unwrap_or_default(),
            base_version: version(pod),
            wanted: PodStatus::default(),
            writing: false,
            progress: watch::Sender::new(Progress::Queued),
        });
        // Somebody else may have changed the status: compare with the newest version seen.
        if version(pod) > slot.base_version {
            slot.base = pod.status.clone().unwrap_or_default();
            slot.base_version = version(pod);
        }
        slot.wanted = status;
        if !slot.writing {
            slot.writing = true;
            slot.progress.send_replace(Progress::Queued);
            let statuses = self.clone();
            tokio::spawn(async move { statuses.flush(uid).await });
        }
    }

    pub(super) async fn written(&self, uid: &str) -> WrittenStatus {
        let Some(mut progress) = self.slots().get(uid).map(|slot| slot.progress.subscribe()) else {
            return WrittenStatus::Written;
        };
        match progress.wait_for(|progress| matches!(progress, Progress::Done(_))).await.map(|progress| *progress) {
            Ok(Progress::Done(outcome)) => outcome,
            Ok(Progress::Queued) | Err(_) => WrittenStatus::PodGone,
        }
    }

    pub(super) fn forget(&self, uid: &str) {
        self.slots().remove(uid);
    }

    /// The next patch of the pod, or `None` (and the slot is at rest) when there's nothing to write.
    ///
    /// What the server took without keeping it (`last`, sent and answered before) isn't asked again: it would never come to rest.
    fn next(&self, uid: &str, last: Option<&serde_json::Value>) -> Option<(String, String, serde_json::Value)> {
        let mut slots = self.slots();
        let slot = slots.get_mut(uid)?;
        let change = match difference(&slot.base, &slot.wanted) {
            Ok(change) => change,
            Err(error) => {
                warn!(pod = %slot.name, %error, "the pod's status can't be encoded");
                None
            }
        };
        let body = change.map(|change| json!({ "metadata": { "uid": uid }, "status": change })).filter(|body| {
            let repeated = last == Some(body);
            if repeated {
                warn!(pod = %slot.name, patch = %body, "the API server doesn't keep this part of the pod's status");
            }
            !repeated
        });
        let Some(body) = body else {
            slot.writing = false;
            slot.progress.send_replace(Progress::Done(WrittenStatus::Written));
            return None;
        };
        Some((slot.namespace.clone(), slot.name.clone(), body))
    }

    async fn flush(&self, uid: String) {
        let mut delay = RETRY_FIRST;
        let mut last = None;
        while let Some((namespace, name, body)) = self.next(&uid, last.as_ref()) {
            let api: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
            match api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(&body)).await {
                Ok(pod) => {
                    delay = RETRY_FIRST;
                    last = Some(body);
                    debug!(pod = %format_args!("{namespace}/{name}"), "status written");
                    if let Some(slot) = self.slots().get_mut(&uid) {
                        slot.base_version = version(&pod);
                        slot.base = pod.status.unwrap_or_default();
                    }
                }
                // Not found, or the name belongs to another pod by now.
                Err(error) if matches!(code(&error), Some(404 | 409)) => {
                    if let Some(slot) = self.slots().get_mut(&uid) {
                        slot.writing = false;
                        slot.progress.send_replace(Progress::Done(WrittenStatus::PodGone));
                    }
                    return;
                }
                Err(error) => {
                    warn!(pod = %format_args!("{namespace}/{name}"), %error, "writing the pod's status failed; it is tried again");
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(RETRY_LAST);
                }
            }
        }
    }
}

/// The patch from what the server has to what the node wants; conditions of others stay out of it.
fn difference(base: &PodStatus, wanted: &PodStatus) -> serde_json::Result<Option<serde_json::Value>> {
    let mut wanted = wanted.clone();
    wanted.conditions =
        Some(merge_conditions(base.conditions.as_deref().unwrap_or_default(), wanted.conditions.as_deref().unwrap_or_default()));
    // Upstream's encoding always has it, and so do the server's answers.
    let lists = [&mut wanted.init_container_statuses, &mut wanted.container_statuses, &mut wanted.ephemeral_container_statuses];
    for status in lists.into_iter().flatten().flatten() {
        status.last_state.get_or_insert_default();
    }
    // Not the node's: the scheduler and the claim controllers write these.
    wanted.nominated_node_name.clone_from(&base.nominated_node_name);
    wanted.resource_claim_statuses.clone_from(&base.resource_claim_statuses);
    wanted.extended_resource_claim_status.clone_from(&base.extended_resource_claim_status);
    Ok(patch::difference(&serde_json::to_value(base)?, &serde_json::to_value(&wanted)?, patch::POD_STATUS))
}

fn merge_conditions(base: &[PodCondition], wanted: &[PodCondition]) -> Vec<PodCondition> {
    let owned = |condition: &&PodCondition| OWNED_CONDITIONS.contains(&condition.type_.as_str());
    let mut merged: Vec<PodCondition> = wanted.iter().filter(owned).cloned().collect();
    // Transition times only move with the status.
    for condition in &mut merged {
        if let Some(old) = base.iter().find(|old| old.type_ == condition.type_ && old.status == condition.status) {
            condition.last_transition_time.clone_from(&old.last_transition_time);
        }
    }
    for other in base.iter().filter(|condition| !owned(condition)) {
        merged.push(other.clone());
    }
    // A condition that the node sets once (a static pod's PodScheduled, DisruptionTarget of an eviction) is added, never changed.
    for added in wanted.iter().filter(|condition| !owned(condition)) {
        if !merged.iter().any(|condition| condition.type_ == added.type_) {
            merged.push(added.clone());
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(type_: &str, status: &str) -> PodCondition {
        PodCondition { type_: type_.into(), status: status.into(), ..PodCondition::default() }
    }

    #[test]
    fn conditions_of_others_are_left_alone() {
        let base = PodStatus {
            conditions: Some(vec![condition("PodScheduled", "True"), condition("example.com/gate", "False")]),
            ..PodStatus::default()
        };
        let wanted =
            PodStatus { conditions: Some(vec![condition("Ready", "True"), condition("example.com/gate", "True")]), ..PodStatus::default() };
        let patch = difference(&base, &wanted).unwrap().unwrap();
        assert_eq!(patch["conditions"], json!([{"type": "Ready", "status": "True"}]));
    }
}
