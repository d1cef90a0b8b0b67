//! Writes a cycle's outcome to the API: bindings, failures and preemptions.
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Binding as PodBinding, ObjectReference, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use outrigger_controllers::events::{Recorder, Severity};
use outrigger_controllers::objects::{Key, annotation, pod_condition, reference, seconds, uid};
use outrigger_controllers::{Informers, SyncError};
use serde_json::{Value, json};
use tracing::warn;

use crate::facts::SELECTED_NODE;
use crate::preempt::Candidate;
use crate::snapshot::PodInfo;
use crate::volumes::Binding;

/// How long a pod's claims may take to be bound.
const VOLUME_TIMEOUT: Duration = Duration::from_secs(600);

#[derive(Clone)]
pub struct Writer {
    pub informers: Arc<Informers>,
    pub recorder: Recorder,
}

impl Writer {
    /// Binds the pod's delayed claims, waits for them, and binds the pod.
    pub async fn bind(&self, pod: &PodInfo, node: &str, volumes: &[Binding]) -> Result<(), SyncError> {
        self.bind_volumes(pod, node, volumes).await?;
        let key = pod.key();
        let binding = PodBinding {
            metadata: ObjectMeta {
                name: Some(key.name.clone()),
                namespace: Some(key.namespace.clone()),
                uid: pod.pod.metadata.uid.clone(),
                ..Default::default()
            },
            target: ObjectReference { kind: Some("Node".into()), name: Some(node.to_owned()), ..Default::default() },
        };
        let bytes = serde_json::to_vec(&binding).map_err(kube::Error::SerdeError)?;
        let path = format!("/api/v1/namespaces/{}/pods", key.namespace);
        let request = kube::core::Request::new(path).create_subresource("binding", &key.name, &PostParams::default(), bytes);
        self.informers.client.request::<Value>(request.map_err(kube::Error::BuildRequest)?).await?;
        let message = format!("Successfully assigned {key} to {node}");
        self.recorder.act(reference(&*pod.pod), Severity::Normal, "Scheduled", "Binding", message, None);
        Ok(())
    }

    async fn bind_volumes(&self, pod: &PodInfo, node: &str, volumes: &[Binding]) -> Result<(), SyncError> {
        if volumes.is_empty() {
            return Ok(());
        }
        let space = pod.key().namespace;
        for binding in volumes {
            match binding {
                Binding::Provision { claim } => {
                    let key = Key::new(&space, claim);
                    let patch = json!({"metadata": {"annotations": {SELECTED_NODE: node}}});
                    self.informers.volume_claims.merge(&key, patch).await?;
                }
                Binding::Volume { claim, volume } => {
                    let Some(claim) = self.informers.volume_claims.get(&Key::new(&space, claim)) else { continue };
                    let patch = json!({
                        "metadata": {"annotations": {"pv.kubernetes.io/bound-by-controller": "yes"}},
                        "spec": {"claimRef": {
                            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": space,
                            "name": claim.metadata.name, "uid": claim.metadata.uid, "resourceVersion": claim.metadata.resource_version,
                        }},
                    });
                    self.informers.volumes.merge(&Key::new("", volume), patch).await?;
                }
            }
        }
        let wait = async {
            while !volumes.iter().all(|binding| self.is_bound(&space, binding, node)) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(VOLUME_TIMEOUT, wait)
            .await
            .map_err(|_| SyncError::Other("binding volumes: timed out waiting for the condition".into()))
    }

    fn is_bound(&self, space: &str, binding: &Binding, node: &str) -> bool {
        let (Binding::Volume { claim, .. } | Binding::Provision { claim }) = binding;
        self.informers.volume_claims.get(&Key::new(space, claim)).is_some_and(|claim| {
            let chosen = annotation(&claim.metadata, SELECTED_NODE).is_none_or(|selected| selected == node);
            chosen && annotation(&claim.metadata, "pv.kubernetes.io/bind-completed").is_some()
        })
    }

    /// Tells why the pod waits, on its condition and by an event.
    pub async fn report(&self, pod: &PodInfo, reason: &str, message: &str, nominated: Option<&str>) {
        self.recorder.act(reference(&*pod.pod), Severity::Warning, "FailedScheduling", "Scheduling", message.to_owned(), None);
        let Some(current) = self.informers.pods.get(&pod.key()).filter(|current| uid(&current.metadata) == pod.uid()) else { return };
        let Some(status) = waiting_status(&current, reason, message, nominated, Timestamp::now()) else { return };
        let patch = json!({"metadata": {"uid": pod.uid()}, "status": status});
        if let Err(error) = self.informers.pods.strategic_status(&pod.key(), patch).await
            && !error.is_not_found()
            && !error.is_conflict()
        {
            warn!(pod = %pod.key(), error = %error.message(), "can't write why the pod waits");
        }
    }

    /// Ends the victims, and sends lesser pods that were promised the node back to look again.
    pub async fn preempt(&self, pod: &PodInfo, candidate: &Candidate, lesser: &[Arc<PodInfo>]) -> Result<(), SyncError> {
        for victim in &candidate.victims {
            let scheduler = "default-scheduler: preempting to accommodate a higher priority pod";
            outrigger_controllers::nodes::eviction::disrupt(&self.informers.pods, &victim.pod, "PreemptionByScheduler", scheduler, None)
                .await?;
            outrigger_controllers::error::unless_gone(self.informers.pods.delete(&victim.pod, DeleteParams::default()).await)?;
            let message = format!("Preempted by pod {} on node {}", pod.uid(), candidate.node);
            let related = Some(reference(&*pod.pod));
            self.recorder.act(reference(&*victim.pod), Severity::Normal, "Preempted", "Preempting", message, related);
        }
        for other in lesser {
            let patch = json!({"metadata": {"uid": other.uid()}, "status": {"nominatedNodeName": null}});
            outrigger_controllers::error::unless_gone(self.informers.pods.strategic_status(&other.key(), patch).await)?;
        }
        Ok(())
    }
}

/// The part of the status to write; None when it says so already.
fn waiting_status(pod: &Pod, reason: &str, message: &str, nominated: Option<&str>, now: Timestamp) -> Option<Value> {
    let known = pod_condition(pod, "PodScheduled");
    let same = known.is_some_and(|known| {
        known.status == "False" && known.reason.as_deref() == Some(reason) && known.message.as_deref() == Some(message)
    });
    let current = pod.status.as_ref().and_then(|status| status.nominated_node_name.as_deref()).unwrap_or_default();
    let renominated = nominated.is_some_and(|node| node != current);
    if same && !renominated {
        return None;
    }
    let since =
        known.filter(|known| known.status == "False").and_then(|known| known.last_transition_time.clone()).unwrap_or_else(|| seconds(now));
    let condition = PodCondition {
        type_: "PodScheduled".into(),
        status: "False".into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_transition_time: Some(since),
        observed_generation: pod.metadata.generation,
        ..Default::default()
    };
    let mut status = json!({"conditions": [condition]});
    if let Some(node) = nominated.filter(|_| renominated) {
        status["nominatedNodeName"] = if node.is_empty() { Value::Null } else { json!(node) };
    }
    Some(status)
}
