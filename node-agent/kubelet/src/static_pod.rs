//! Pods from a folder of manifests, and the mirror pods that show them to the API server.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use notify::Watcher;
use tokio::sync::{mpsc, watch};
use tracing::{debug, warn};

use crate::host::Host;
use crate::pod::meta::{CONFIG_HASH, CONFIG_MIRROR, CONFIG_SEEN, CONFIG_SOURCE, annotation, name_of, namespace_of, uid_of};
use crate::pod::{meta, resources};

/// The folder is read this often even when nothing was reported.
const RESCAN: Duration = Duration::from_secs(20);

/// Publishes the folder's pods by UID, whenever they change; the first set is there when this returns its receiver's first change.
pub async fn follow(dir: PathBuf, node_name: String, pods: watch::Sender<Option<BTreeMap<String, Arc<Pod>>>>) {
    let (sender, mut changes) = mpsc::unbounded_channel();
    let watcher = notify::recommended_watcher(move |_| {
        // Closed means that nobody reads the folder any more.
        let _ = sender.send(());
    });
    let _watcher = match watcher {
        Ok(mut watcher) => match watcher.watch(&dir, notify::RecursiveMode::NonRecursive) {
            Ok(()) => Some(watcher),
            Err(error) => {
                debug!(dir = %dir.display(), %error, "the manifest folder can't be watched; it is read now and then");
                None
            }
        },
        Err(error) => {
            debug!(%error, "no file notifications; the manifest folder is read now and then");
            None
        }
    };
    loop {
        let found = scan(&dir, &node_name);
        pods.send_if_modified(|known| {
            let same = known.as_ref().is_some_and(|known| known.keys().eq(found.keys()));
            if !same {
                *known = Some(found);
            }
            !same
        });
        tokio::select! {
            Some(()) = changes.recv() => {
                // An editor writes a file in several steps.
                tokio::time::sleep(Duration::from_millis(100)).await;
                while changes.try_recv().is_ok() {}
            }
            () = tokio::time::sleep(RESCAN) => {}
        }
    }
}

fn scan(dir: &Path, node_name: &str) -> BTreeMap<String, Arc<Pod>> {
    let mut pods = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir(dir) else { return pods };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
        if hidden || !path.is_file() {
            continue;
        }
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => {
                warn!(file = %path.display(), %error, "couldn't read a manifest");
                continue;
            }
        };
        match parse(&text, &path, node_name) {
            Ok(pod) => drop(pods.insert(uid_of(&pod).to_owned(), Arc::new(pod))),
            Err(error) => warn!(file = %path.display(), error, "not a pod's manifest"),
        }
    }
    pods
}

/// The pod of a manifest, named and marked for this node.
fn parse(text: &str, path: &Path, node_name: &str) -> Result<Pod, String> {
    let mut pod: Pod = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    let name = pod.metadata.name.clone().filter(|name| !name.is_empty()).ok_or("the pod has no name")?;
    if pod.spec.as_ref().is_none_or(|spec| spec.containers.is_empty()) {
        return Err("the pod has no containers".into());
    }
    let hash = digest(&[node_name, &path.display().to_string(), text]);
    if uid_of(&pod).is_empty() {
        pod.metadata.uid = Some(hash.clone());
    }
    pod.metadata.name = Some(format!("{name}-{}", node_name.to_lowercase()));
    if namespace_of(&pod).is_empty() {
        pod.metadata.namespace = Some("default".into());
    }
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(CONFIG_HASH.into(), hash);
    annotations.insert(CONFIG_SOURCE.into(), "file".into());
    annotations.insert(CONFIG_SEEN.into(), Timestamp::now().to_string());
    let status = pod.status.get_or_insert_default();
    status.phase = Some("Pending".into());
    complete(&mut pod, node_name);
    Ok(pod)
}

/// The defaults that matter to a pod that no API server has seen.
fn complete(pod: &mut Pod, node_name: &str) {
    let Some(spec) = pod.spec.as_mut() else { return };
    spec.node_name = Some(node_name.into());
    spec.restart_policy.get_or_insert_with(|| "Always".into());
    spec.dns_policy.get_or_insert_with(|| "ClusterFirst".into());
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.enable_service_links.get_or_insert(true);
    let forever = Toleration { operator: Some("Exists".into()), effect: Some("NoExecute".into()), ..Toleration::default() };
    let tolerations = spec.tolerations.get_or_insert_default();
    if !tolerations.contains(&forever) {
        tolerations.push(forever);
    }
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        container.termination_message_path.get_or_insert_with(|| "/dev/termination-log".into());
        container.termination_message_policy.get_or_insert_with(|| "File".into());
    }
}

/// 128 bits as hex: tells one manifest's state from another's.
fn digest(parts: &[&str]) -> String {
    let mut state: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in parts.iter().flat_map(|part| part.bytes().chain([0])) {
        state = (state ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    format!("{state:032x}")
}

/// Makes the API object that shows the static pod, or replaces one that shows an older manifest.
pub async fn ensure_mirror(host: &Host, pod: &Pod) {
    let hash = annotation(pod, CONFIG_HASH).unwrap_or_default();
    let key = outrigger_cluster::Key::new(namespace_of(pod), name_of(pod));
    if let Some(existing) = host.watch.pods.get(&key) {
        let current = annotation(&existing, CONFIG_MIRROR) == Some(hash) && existing.metadata.deletion_timestamp.is_none();
        if current {
            return;
        }
        if meta::is_mirror(&existing)
            && let Err(error) = host.writer.delete_pod(namespace_of(&existing), name_of(&existing), uid_of(&existing)).await
        {
            warn!(pod = %key, %error, "couldn't delete an old mirror pod");
            return;
        }
    }
    let node = host.watch.nodes.get(&outrigger_cluster::Key::new("", &host.config.node_name));
    // Without its owner the mirror would be refused; the next pass makes it.
    let Some(node_uid) = node.and_then(|node| node.metadata.uid.clone()) else { return };
    match host.writer.create_pod(&mirror(pod, hash, &host.config.node_name, &node_uid)).await {
        Ok(_) => {}
        Err(error) => warn!(pod = %key, %error, "couldn't create the mirror pod"),
    }
}

fn mirror(pod: &Pod, hash: &str, node_name: &str, node_uid: &str) -> Pod {
    let mut mirror = pod.clone();
    mirror.metadata.uid = None;
    mirror.metadata.resource_version = None;
    mirror.metadata.annotations.get_or_insert_default().insert(CONFIG_MIRROR.into(), hash.into());
    mirror.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: node_name.into(),
        uid: node_uid.into(),
        controller: Some(true),
        block_owner_deletion: None,
    }]);
    if let Some(status) = mirror.status.as_mut() {
        status.qos_class = Some(resources::qos(pod).name().into());
    }
    mirror
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\nspec:\n  containers:\n  - name: c\n    image: nginx\n";

    #[test]
    fn a_manifest_becomes_a_pod_of_this_node() {
        let pod = parse(MANIFEST, Path::new("/m/web.yaml"), "Node-1").unwrap();
        assert_eq!((name_of(&pod), namespace_of(&pod)), ("web-node-1", "default"));
        assert!(meta::is_static(&pod));
        assert_eq!(annotation(&pod, CONFIG_HASH), Some(uid_of(&pod)));
        let changed = parse(&MANIFEST.replace("nginx", "busybox"), Path::new("/m/web.yaml"), "Node-1").unwrap();
        assert_ne!(uid_of(&pod), uid_of(&changed));
        let mirror = mirror(&pod, "h", "Node-1", "u");
        assert!(meta::is_mirror(&mirror) && !meta::is_static(&mirror));
    }

    #[test]
    fn a_folder_is_read_without_its_hidden_and_broken_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.yaml"), MANIFEST).unwrap();
        std::fs::write(dir.path().join(".b.yaml"), MANIFEST).unwrap();
        std::fs::write(dir.path().join("c.yaml"), "kind: [").unwrap();
        assert_eq!(scan(dir.path(), "n").len(), 1);
    }
}
