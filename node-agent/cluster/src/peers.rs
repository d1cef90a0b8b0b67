//! All pods of the cluster, as far as others' policies see them: decoded to little, and passed on without a copy kept here.
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ContainerPort, Pod, PodIP};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use outrigger_client::Decoded;
use serde::{Deserialize, Deserializer};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::mirror::{Delta, Subscription};

/// What selects a pod, and where it is.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct PeerPod {
    /// Name, namespace, labels and versions only.
    #[serde(deserialize_with = "little_metadata")]
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub spec: PeerSpec,
    #[serde(default)]
    pub status: PeerStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerSpec {
    pub host_network: Option<bool>,
    pub containers: Option<Vec<PeerContainer>>,
    pub init_containers: Option<Vec<PeerContainer>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerContainer {
    pub restart_policy: Option<String>,
    pub ports: Option<Vec<ContainerPort>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct PeerStatus {
    pub phase: Option<String>,
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<PodIP>>,
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
}

impl PeerPod {
    /// The ports of all containers that run along with the pod.
    pub fn ports(&self) -> impl Iterator<Item = &ContainerPort> {
        let sidecars = self.spec.init_containers.iter().flatten().filter(|container| container.restart_policy.as_deref() == Some("Always"));
        self.spec.containers.iter().flatten().chain(sidecars).flat_map(|container| container.ports.iter().flatten())
    }

    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        let listed = self.status.pod_ips.as_deref().unwrap_or_default();
        let alone = if listed.is_empty() { self.status.pod_ip.as_deref() } else { None };
        listed.iter().map(|ip| ip.ip.as_str()).chain(alone)
    }
}

/// Annotations and managed fields are most of an object's metadata.
fn little_metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Little {
        name: Option<String>,
        namespace: Option<String>,
        resource_version: Option<String>,
        uid: Option<String>,
        labels: Option<BTreeMap<String, String>>,
    }
    let Little { name, namespace, resource_version, uid, labels } = Little::deserialize(deserializer)?;
    Ok(ObjectMeta { name, namespace, resource_version, uid, labels, ..ObjectMeta::default() })
}

impl Resource for PeerPod {
    type DynamicType = <Pod as Resource>::DynamicType;
    type Scope = <Pod as Resource>::Scope;

    fn kind(dt: &Self::DynamicType) -> Cow<'_, str> {
        Pod::kind(dt)
    }

    fn group(dt: &Self::DynamicType) -> Cow<'_, str> {
        Pod::group(dt)
    }

    fn version(dt: &Self::DynamicType) -> Cow<'_, str> {
        Pod::version(dt)
    }

    fn plural(dt: &Self::DynamicType) -> Cow<'_, str> {
        Pod::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Follows all pods, for ever; `keep` says what the receiver wants of each.
pub fn follow<T: Send + Sync + 'static>(client: &Client, keep: fn(PeerPod) -> T) -> (Subscription<T>, JoinHandle<()>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (receiver, tokio::spawn(pass_on(Api::all(client.clone()), keep, sender)))
}

async fn pass_on<T>(api: Api<Decoded<PeerPod>>, keep: fn(PeerPod) -> T, to: mpsc::UnboundedSender<Delta<T>>) {
    let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
    let mut initial = Vec::new();
    while let Some(event) = events.next().await {
        let delta = match event {
            Ok(watcher::Event::Init) => {
                initial.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(pod)) => {
                initial.extend(pod.readable().map(keep).map(Arc::new));
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                debug!(pods = initial.len(), "listed the cluster's pods");
                Delta::Replaced(Arc::new(std::mem::take(&mut initial)))
            }
            Ok(watcher::Event::Apply(pod)) => match pod.readable() {
                Some(pod) => Delta::Applied(Arc::new(keep(pod))),
                None => continue,
            },
            // Its name is all that matters now.
            Ok(watcher::Event::Delete(pod)) => {
                let nameless = |gone: Box<outrigger_client::Unreadable>| PeerPod { metadata: gone.metadata, ..PeerPod::default() };
                Delta::Deleted(Arc::new(keep(pod.whole().unwrap_or_else(nameless))))
            }
            Err(error) => {
                warn!(%error, "the watch of the cluster's pods broke off; it is taken up again");
                continue;
            }
        };
        if to.send(delta).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn little_is_read_of_a_pod() {
        let port = |name: &str| json!({"name": name, "containerPort": 80});
        let pod: PeerPod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "a", "namespace": "n", "labels": {"app": "a"}, "resourceVersion": "7", "annotations": {"x": "y"},
                "managedFields": [{"manager": "m"}]},
            "spec": {"hostNetwork": null, "nodeName": "n", "containers": [{"name": "c", "image": "i", "ports": [port("one")]}, {"name": "d", "ports": null}],
                "initContainers": [{"name": "once", "ports": [port("two")]}, {"name": "side", "restartPolicy": "Always", "ports": [port("three")]}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
        }))
        .unwrap();
        assert_eq!(pod.addresses().collect::<Vec<_>>(), ["10.0.0.1", "fd00::1"]);
        assert_eq!(pod.ports().filter_map(|port| port.name.as_deref()).collect::<Vec<_>>(), ["one", "three"]);
        assert_eq!((pod.metadata.resource_version.as_deref(), pod.metadata.annotations), (Some("7"), None));
    }
}
