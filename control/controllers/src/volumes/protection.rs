//! Keeps claims that pods use, and volumes that are bound, from going away under them.
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tokio::task::JoinSet;

use crate::Context;
use crate::error::{SyncError, unless_gone};
use crate::informers::{Informers, api};
use crate::objects::{Key, has_finalizer, is_terminating, name, namespace, pod_node};
use crate::store::{Object, Store};
use crate::worker::{self, Outcome, Queue};

const CLAIM_FINALIZER: &str = "kubernetes.io/pvc-protection";
const VOLUME_FINALIZER: &str = "kubernetes.io/pv-protection";

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.volume_claims.on_change(move |_, new| {
        if let Some(claim) = new {
            add.add(Key::of(&**claim));
        }
    });
    let add = queue.clone();
    context.informers.pods.on_change(move |old, new| {
        if let (Some(gone), None) = (old, new) {
            claims_of(gone).into_iter().for_each(|title| add.add(Key::new(namespace(&gone.metadata), title)));
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("pvc-protection", queue, 2, move |key| sync_claim(informers.clone(), key)));
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.volumes.on_change(move |_, new| {
        if let Some(volume) = new {
            add.add(Key::of(&**volume));
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("pv-protection", queue, 1, move |key| sync_volume(informers.clone(), key)));
}

/// The names of all claims that a pod mounts, those made for it included.
fn claims_of(pod: &Pod) -> Vec<String> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let named = |volume: &k8s_openapi::api::core::v1::Volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(source), _) => Some(source.claim_name.clone()),
        (None, Some(_)) => Some(format!("{}-{}", name(&pod.metadata), volume.name)),
        (None, None) => None,
    };
    volumes.filter_map(named).collect()
}

/// A pod that no node has yet will not be started with a claim that is going.
fn uses(pod: &Pod, claim: &str) -> bool {
    !pod_node(pod).is_empty() && claims_of(pod).iter().any(|title| title == claim)
}

async fn sync_claim(informers: Arc<Informers>, key: Key) -> Outcome {
    let Some(claim) = informers.volume_claims.get(&key) else { return Ok(None) };
    let held = has_finalizer(&claim.metadata, CLAIM_FINALIZER);
    match (is_terminating(&claim.metadata), held) {
        (false, false) => add(&informers.volume_claims, &*claim, CLAIM_FINALIZER).await?,
        (true, true) if informers.pods.select(&key.namespace, |pod| uses(pod, &key.name)).is_empty() => {
            // The copy may be behind: data depends on this, so the server is asked.
            let pods = api::<Pod>(&informers.client, &key.namespace).list(&Default::default()).await?;
            if !pods.iter().any(|pod| uses(pod, &key.name)) {
                remove(&informers.volume_claims, &*claim, CLAIM_FINALIZER).await?;
            }
        }
        _ => {}
    }
    Ok(None)
}

async fn sync_volume(informers: Arc<Informers>, key: Key) -> Outcome {
    let Some(volume) = informers.volumes.get(&key) else { return Ok(None) };
    let held = has_finalizer(&volume.metadata, VOLUME_FINALIZER);
    let bound = volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    match (is_terminating(&volume.metadata), held) {
        (false, false) => add(&informers.volumes, &*volume, VOLUME_FINALIZER).await?,
        (true, true) if !bound => remove(&informers.volumes, &*volume, VOLUME_FINALIZER).await?,
        _ => {}
    }
    Ok(None)
}

async fn write<K: Object>(store: &Store<K>, object: &K, finalizers: Vec<String>) -> Result<(), SyncError> {
    let patch = json!({"metadata": {"resourceVersion": object.meta().resource_version, "finalizers": finalizers}});
    unless_gone(store.merge(&Key::of(object), patch).await)
}

async fn add<K: Object>(store: &Store<K>, object: &K, finalizer: &str) -> Result<(), SyncError> {
    let mut all = object.meta().finalizers.clone().unwrap_or_default();
    all.push(finalizer.to_owned());
    write(store, object, all).await
}

async fn remove<K: Object>(store: &Store<K>, object: &K, finalizer: &str) -> Result<(), SyncError> {
    let left = object.meta().finalizers.iter().flatten().filter(|have| *have != finalizer).cloned().collect();
    write(store, object, left).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheduled_pod_uses_its_claims() {
        let mut pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "db"},
            "spec": {"containers": [], "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
                {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}},
            ]},
        }))
        .unwrap();
        assert!(!uses(&pod, "data"));
        pod.spec.as_mut().unwrap().node_name = Some("n".into());
        assert!(uses(&pod, "data") && uses(&pod, "db-scratch") && !uses(&pod, "scratch"));
    }
}
