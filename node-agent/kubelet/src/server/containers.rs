//! Finds a pod's containers and sandbox in the runtime.
use std::collections::HashMap;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};

use crate::cri::{Cri, Error, Result, v1};

const POD_UID: &str = "io.kubernetes.pod.uid";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// Whether the pod has a container of that name, of any kind.
pub fn is_in_spec(pod: &Pod, container: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let names = spec.containers.iter().chain(spec.init_containers.iter().flatten()).map(|container| &container.name);
    names.chain(spec.ephemeral_containers.iter().flatten().map(|container| &container.name)).any(|name| name == container)
}

pub fn status_of<'a>(status: &'a PodStatus, container: &str) -> Option<&'a ContainerStatus> {
    let kinds = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    kinds.into_iter().flatten().flatten().find(|status| status.name == container)
}

/// The pod's UID as its containers are labelled: a static pod's mirror names the real one in an annotation.
pub fn runtime_uid(pod: &Pod) -> String {
    let annotations = pod.metadata.annotations.as_ref();
    let mirrored = annotations.and_then(|annotations| annotations.get("kubernetes.io/config.mirror"));
    mirrored.or(pod.metadata.uid.as_ref()).cloned().unwrap_or_default()
}

/// The newest container of that name: the running one, if any.
pub async fn find(cri: &Cri, pod: &Pod, container: &str) -> Result<Option<v1::Container>> {
    let labels: HashMap<String, String> =
        [(POD_UID.to_owned(), runtime_uid(pod)), (CONTAINER_NAME.to_owned(), container.to_owned())].into();
    let found = cri.list_containers(v1::ContainerFilter { label_selector: labels, ..Default::default() }).await?;
    let running = v1::ContainerState::ContainerRunning as i32;
    Ok(found.into_iter().max_by_key(|container| (container.state == running, container.created_at)))
}

/// Where the pod's network is: its sandbox, and the namespace's path unless it is the node's own.
pub struct PodNetwork {
    pub sandbox_id: String,
    pub namespace: Option<PathBuf>,
}

/// The network of the pod's newest ready sandbox.
pub async fn network(cri: &Cri, pod: &Pod) -> Result<Option<PodNetwork>> {
    let labels: HashMap<String, String> = [(POD_UID.to_owned(), runtime_uid(pod))].into();
    let state = v1::PodSandboxStateValue { state: v1::PodSandboxState::SandboxReady as i32 };
    let sandboxes = cri.list_sandboxes(v1::PodSandboxFilter { label_selector: labels, state: Some(state), ..Default::default() }).await?;
    let Some(sandbox) = sandboxes.into_iter().max_by_key(|sandbox| sandbox.created_at) else { return Ok(None) };
    let answer = cri.sandbox_status(&sandbox.id, true).await?;
    let options =
        answer.status.and_then(|status| status.linux).and_then(|linux| linux.namespaces).and_then(|namespaces| namespaces.options);
    if options.is_some_and(|options| options.network == v1::NamespaceMode::Node as i32) {
        return Ok(Some(PodNetwork { sandbox_id: sandbox.id, namespace: None }));
    }
    let namespace = answer.info.get("info").and_then(|info| namespace_path(info)).ok_or_else(|| Error {
        call: "PodSandboxStatus",
        code: tonic::Code::Internal,
        message: format!("the runtime doesn't tell the network namespace of sandbox {}", sandbox.id),
    })?;
    Ok(Some(PodNetwork { sandbox_id: sandbox.id, namespace: Some(namespace) }))
}

/// From containerd's verbose status: the path in the sandbox's OCI spec, or else its process's namespace.
fn namespace_path(info: &str) -> Option<PathBuf> {
    let info: serde_json::Value = serde_json::from_str(info).ok()?;
    let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array();
    let path = namespaces.and_then(|namespaces| namespaces.iter().find(|namespace| namespace["type"] == "network")?["path"].as_str());
    match path.filter(|path| !path.is_empty()) {
        Some(path) => Some(path.into()),
        None => info["pid"].as_u64().filter(|pid| *pid > 0).map(|pid| format!("/proc/{pid}/ns/net").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_comes_from_the_verbose_status() {
        let cases = [
            (
                r#"{"pid":7,"runtimeSpec":{"linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/run/netns/x"}]}}}"#,
                Some("/run/netns/x"),
            ),
            (r#"{"pid":7,"runtimeSpec":{"linux":{"namespaces":[{"type":"network"}]}}}"#, Some("/proc/7/ns/net")),
            (r#"{"pid":0}"#, None),
            ("nonsense", None),
        ];
        for (info, expected) in cases {
            assert_eq!(namespace_path(info), expected.map(PathBuf::from), "{info}");
        }
    }
}
