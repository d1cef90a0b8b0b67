//! Makes the claims of pods' ephemeral volumes; they go with their pod, by ownership.
use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tokio::task::JoinSet;

use crate::Context;
use crate::error::SyncError;
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, controller_ref, is_controlled_by, is_terminal, is_terminating, name, uid};
use crate::worker::{self, Outcome, Queue};

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.pods.on_change(move |_, new| {
        if let Some(pod) = new.filter(|pod| templates(pod).next().is_some()) {
            add.add(Key::of(&**pod));
        }
    });
    let (informers, recorder) = (context.informers.clone(), context.recorder.named("ephemeral_volume"));
    tasks.spawn(worker::run("ephemeral-volume", queue, 2, move |key| sync(informers.clone(), recorder.clone(), key)));
}

fn templates(pod: &Pod) -> impl Iterator<Item = &Volume> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter(|volume| volume.ephemeral.as_ref().is_some_and(|source| source.volume_claim_template.is_some()))
}

async fn sync(informers: Arc<Informers>, recorder: Recorder, key: Key) -> Outcome {
    let Some(pod) = informers.pods.get(&key).filter(|pod| !is_terminating(&pod.metadata) && !is_terminal(pod)) else { return Ok(None) };
    for claim in templates(&pod).filter_map(|volume| claim_for(&pod, volume)) {
        let claim_key = Key::of(&claim);
        if let Some(found) = informers.volume_claims.get(&claim_key) {
            if is_controlled_by(&found.metadata, uid(&pod.metadata)) {
                continue;
            }
            let message = format!("PVC {claim_key} was not created for pod {key} (pod is not owner)");
            recorder.warning(&*pod, "EphemeralVolumeFailed", message.clone());
            return Err(SyncError::Other(message));
        }
        match informers.volume_claims.create(&claim).await {
            Err(error) if !error.is_already_exists() => {
                recorder.warning(&*pod, "EphemeralVolumeFailed", format!("ephemeral volume {}: {}", claim_key.name, error.message()));
                return Err(error);
            }
            _ => {}
        }
    }
    Ok(None)
}

fn claim_for(pod: &Pod, volume: &Volume) -> Option<PersistentVolumeClaim> {
    let template = volume.ephemeral.as_ref()?.volume_claim_template.as_ref()?;
    let meta = template.metadata.clone().unwrap_or_default();
    Some(PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(format!("{}-{}", name(&pod.metadata), volume.name)),
            namespace: pod.metadata.namespace.clone(),
            labels: meta.labels,
            annotations: meta.annotations,
            owner_references: Some(vec![controller_ref(pod)]),
            ..Default::default()
        },
        spec: Some(template.spec.clone()),
        status: None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_claim_is_the_pods() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "db", "namespace": "default", "uid": "1"},
            "spec": {"containers": [], "volumes": [
                {"name": "plain", "emptyDir": {}},
                {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"metadata": {"labels": {"a": "b"}}, "spec": {"storageClassName": "x"}}}},
            ]},
        }))
        .unwrap();
        let claims: Vec<_> = templates(&pod).filter_map(|volume| claim_for(&pod, volume)).collect();
        assert_eq!(claims.len(), 1);
        assert_eq!(Key::of(&claims[0]).to_string(), "default/db-scratch");
        assert!(is_controlled_by(&claims[0].metadata, "1"));
    }
}
