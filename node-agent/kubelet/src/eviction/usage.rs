//! How much the node has left, and what its pods use.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use nix::sys::statvfs::statvfs;

use super::rank::{ContainerUsage, Disk, Usage, Usages};
use super::signals::{Observation, Observations, Signal};
use crate::host::Host;
use crate::machine::{available_memory, disk_space};
use crate::pod::meta::{containers, init_containers, name_of, namespace_of, uid_of};
use crate::runtime::{CONTAINER_NAME, POD_UID};
use crate::server::stats::{self, NodeUsage, value};

fn number(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

/// What is left of everything that has a signal. `images`: where the runtime keeps its images.
pub fn observe(host: &Host, images: Option<&Path>) -> Observations {
    let mut seen = Observations::new();
    if let Some(available) = available_memory() {
        seen.insert(Signal::MemoryAvailable, Observation { available, capacity: host.machine.memory });
    }
    let data = Some(host.config.data_dir.as_path());
    for (path, space, inodes) in
        [(data, Signal::NodefsAvailable, Signal::NodefsInodesFree), (images, Signal::ImagefsAvailable, Signal::ImagefsInodesFree)]
    {
        let Some(path) = path else { continue };
        if let Some((size, free)) = disk_space(path) {
            seen.insert(space, Observation { available: number(free), capacity: number(size) });
        }
        // File systems that make inodes as they need them have no number to run out of.
        if let Ok(facts) = statvfs(path)
            && facts.files() > 0
        {
            seen.insert(inodes, Observation { available: number(facts.files_available()), capacity: number(facts.files()) });
        }
    }
    let node = NodeUsage::read();
    if node.max_pid > 0 {
        let available = number(node.max_pid.saturating_sub(node.processes));
        seen.insert(Signal::PidAvailable, Observation { available, capacity: number(node.max_pid) });
    }
    seen
}

/// What each of the pods uses, as far as it can be told.
pub async fn measure(host: &Arc<Host>, pods: &[Arc<Pod>]) -> Usages {
    let Ok(measured) = stats::measure(&host.cri).await else { return Usages::new() };
    let mut usages: Usages = pods.iter().map(|pod| (uid_of(pod).to_owned(), Usage::default())).collect();
    for container in &measured.containers {
        let label = |name: &str| container.labels.get(name).map(String::as_str).unwrap_or_default();
        let (Some(usage), Some(stats)) = (usages.get_mut(label(POD_UID)), measured.stats.get(&container.id)) else { continue };
        let memory = stats.memory.as_ref().and_then(|memory| value(&memory.working_set_bytes)).unwrap_or(0);
        let layer = stats.writable_layer.as_ref();
        let disk = Disk {
            bytes: number(layer.and_then(|layer| value(&layer.used_bytes)).unwrap_or(0)),
            inodes: number(layer.and_then(|layer| value(&layer.inodes_used)).unwrap_or(0)),
        };
        usage.containers.insert(label(CONTAINER_NAME).to_owned(), ContainerUsage { memory: number(memory), disk });
    }
    let (host, pods) = (host.clone(), pods.to_vec());
    let on_disk = tokio::task::spawn_blocking(move || {
        pods.iter().for_each(|pod| {
            if let Some(usage) = usages.get_mut(uid_of(pod)) {
                add_files(&host, pod, usage);
            }
        });
        usages
    });
    on_disk.await.unwrap_or_default()
}

fn add_files(host: &Host, pod: &Pod, usage: &mut Usage) {
    let logs = host.config.pod_logs_dir(namespace_of(pod), name_of(pod), uid_of(pod));
    for container in containers(pod).iter().chain(init_containers(pod)) {
        if let Some(used) = usage.containers.get_mut(&container.name) {
            used.disk += below(&logs.join(&container.name));
        }
    }
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let Some(source) = &volume.empty_dir else { continue };
        let used = below(&crate::volume::volume_dir(&host.config, pod, "empty-dir", &volume.name));
        let volumes = if source.medium.as_deref() == Some("Memory") { &mut usage.memory_volumes } else { &mut usage.volumes };
        volumes.insert(volume.name.clone(), used);
    }
    usage.processes = host.cgroups.processes(pod).unwrap_or(0);
}

/// What the files below the folder take; links aren't followed, and what vanishes meanwhile isn't counted.
fn below(dir: &Path) -> Disk {
    use std::os::unix::fs::MetadataExt;
    let mut sum = Disk::default();
    let mut left: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        sum += Disk { bytes: number(metadata.blocks() * 512), inodes: 1 };
        if metadata.is_dir() {
            left.extend(std::fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_counted_in_depth() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a/b"), vec![1; 100_000]).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        assert_eq!(below(dir.path()).inodes, 4);
        assert_eq!(below(&dir.path().join("none")), Disk::default());
    }
}
