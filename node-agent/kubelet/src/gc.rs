//! Collects what nobody needs any more: dead containers, sandboxes, folders, cgroups and logs without a pod, unused images; turns logs over.
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use crate::cri::v1;
use crate::host::Host;
use crate::machine::disk_space;
use crate::registry::Registry;
use crate::runtime::{CONTAINER_NAME, POD_UID};

const PERIOD: Duration = Duration::from_secs(30);
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// Runs for ever; must be started only after every source of pods has been read once.
pub async fn run(host: Arc<Host>, registry: Arc<Registry>) {
    let mut unused_since = HashMap::new();
    loop {
        if let Err(error) = collect(&host, &registry).await {
            debug!(%error, "collecting failed; it is tried again");
        }
        collect_images(&host, &mut unused_since).await;
        tokio::time::sleep(PERIOD).await;
    }
}

async fn collect(host: &Arc<Host>, registry: &Registry) -> crate::cri::Result<()> {
    let sandboxes = host.cri.list_sandboxes(v1::PodSandboxFilter::default()).await?;
    let containers = host.cri.list_containers(v1::ContainerFilter::default()).await?;
    let uid = |labels: &HashMap<String, String>| labels.get(POD_UID).cloned().unwrap_or_default();
    // Asked for after the listing: a pod that came meanwhile is known.
    let known = registry.uids();
    for sandbox in &sandboxes {
        let used = containers.iter().any(|container| container.pod_sandbox_id == sandbox.id);
        let owner = uid(&sandbox.labels);
        let newest = sandboxes.iter().filter(|other| uid(&other.labels) == owner).all(|other| other.created_at <= sandbox.created_at);
        let dead = sandbox.state() == v1::PodSandboxState::SandboxNotready && !used && !newest;
        if !known.contains(&owner) {
            info!(sandbox = sandbox.id, pod_uid = owner, "removing the sandbox of a pod that is no more");
        }
        if dead || !known.contains(&owner) {
            host.cri.stop_sandbox(&sandbox.id).await?;
            host.cri.remove_sandbox(&sandbox.id).await?;
        }
    }
    for id in superfluous(&containers) {
        host.cri.remove_container(&id).await?;
        host.probes.forget_container(&id);
    }
    let in_runtime: HashSet<String> = sandboxes.iter().map(|sandbox| uid(&sandbox.labels)).collect();
    collect_files(host, &known, &in_runtime).await;
    Ok(())
}

/// Ended containers but the newest of each name.
fn superfluous(containers: &[v1::Container]) -> Vec<String> {
    let mut ended: HashMap<(&str, &str), Vec<&v1::Container>> = HashMap::new();
    for container in containers.iter().filter(|container| container.state() == v1::ContainerState::ContainerExited) {
        let label = |name: &str| container.labels.get(name).map(String::as_str).unwrap_or_default();
        ended.entry((label(POD_UID), label(CONTAINER_NAME))).or_default().push(container);
    }
    let mut ids = Vec::new();
    for mut list in ended.into_values() {
        list.sort_by_key(|container| std::cmp::Reverse(container.created_at));
        ids.extend(list.into_iter().skip(1).map(|container| container.id.clone()));
    }
    ids
}

async fn collect_files(host: &Arc<Host>, known: &HashSet<String>, in_runtime: &HashSet<String>) {
    let lost = |uid: &String| !known.contains(uid) && !in_runtime.contains(uid);
    for uid in names_in(&host.config.pods_dir()).into_iter().filter(lost) {
        info!(pod_uid = uid, "removing the volumes of a pod that is no more");
        if let Err(error) = host.volumes.tear_down(&uid).await {
            warn!(pod_uid = uid, %error, "couldn't remove the volumes of a pod that is no more");
        }
    }
    for name in names_in(&host.config.logs_dir()) {
        let uid = name.rsplit('_').next().unwrap_or_default().to_owned();
        if lost(&uid) && tokio::fs::remove_dir_all(host.config.logs_dir().join(&name)).await.is_ok() {
            debug!(folder = name, "removed the logs of a pod that is no more");
        }
    }
    let (work, known, in_runtime) = (host.clone(), known.clone(), in_runtime.clone());
    let cleaned = tokio::task::spawn_blocking(move || {
        for uid in work.cgroups.pods().into_iter().filter(|uid| !known.contains(uid) && !in_runtime.contains(uid)) {
            if let Err(error) = work.cgroups.remove_pod(&uid) {
                debug!(pod_uid = uid, %error, "couldn't remove a cgroup");
            }
        }
    });
    if let Err(error) = cleaned.await {
        warn!(%error, "cleaning cgroups failed");
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Above the high mark, unused images go, the longest unused first, until the low mark is reached.
async fn collect_images(host: &Host, unused_since: &mut HashMap<String, Instant>) {
    let Some(mount) = image_mount(host).await else { return };
    let used_percent = || disk_space(&mount).map_or(0, |(size, free)| 100 - free.saturating_mul(100) / size.max(1));
    let Some(unused) = unused_images(host).await else { return };
    unused_since.retain(|id, _| unused.iter().any(|image| image.id == *id));
    for image in &unused {
        unused_since.entry(image.id.clone()).or_insert_with(Instant::now);
    }
    if used_percent() < u64::from(host.config.image_gc_high_percent) {
        return;
    }
    let mut oldest: Vec<(&v1::Image, Instant)> =
        unused.iter().filter_map(|image| unused_since.get(&image.id).map(|since| (image, *since))).collect();
    oldest.retain(|(_, since)| since.elapsed() >= host.config.image_minimum_age);
    oldest.sort_by_key(|(_, since)| *since);
    for (image, _) in oldest {
        if used_percent() <= u64::from(host.config.image_gc_low_percent) {
            return;
        }
        remove_image(host, image).await;
    }
}

/// The disk is nearly full: ended containers go, and every image that nobody uses.
pub async fn free_disk(host: &Arc<Host>, registry: &Registry) {
    if let Err(error) = collect(host, registry).await {
        debug!(%error, "collecting failed");
    }
    for image in unused_images(host).await.iter().flatten() {
        remove_image(host, image).await;
    }
}

/// The images that no container uses, nor any sandbox.
async fn unused_images(host: &Host) -> Option<Vec<v1::Image>> {
    let (images, containers, sandbox) =
        tokio::join!(host.cri.list_images(), host.cri.list_containers(v1::ContainerFilter::default()), host.cri.sandbox_image());
    let (mut images, containers) = (images.ok()?, containers.ok()?);
    images.retain(|image| {
        let of_sandboxes = sandbox.as_ref().is_some_and(|name| image.repo_tags.contains(name));
        let used = |container: &v1::Container| container.image_ref == image.id || image.repo_digests.contains(&container.image_ref);
        !image.pinned && !of_sandboxes && !containers.iter().any(used)
    });
    Some(images)
}

async fn remove_image(host: &Host, image: &v1::Image) {
    info!(image = image.repo_tags.first().unwrap_or(&image.id), "removing an unused image: the disk is full");
    let spec = v1::ImageSpec { image: image.id.clone(), ..v1::ImageSpec::default() };
    if let Err(error) = host.cri.remove_image(spec).await {
        debug!(%error, "couldn't remove an image");
    }
}

/// Where the runtime keeps its images.
pub async fn image_mount(host: &Host) -> Option<PathBuf> {
    let info = host.cri.image_fs_info().await.ok()?;
    let mount = info.image_filesystems.first()?.fs_id.as_ref()?.mountpoint.clone();
    (!mount.is_empty()).then(|| mount.into())
}

/// Turns over logs that grew too large, for ever.
pub async fn rotate_logs(host: Arc<Host>) {
    loop {
        tokio::time::sleep(LOG_PERIOD).await;
        let running = v1::ContainerFilter {
            state: Some(v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning as i32 }),
            ..v1::ContainerFilter::default()
        };
        let Ok(containers) = host.cri.list_containers(running).await else { continue };
        for container in containers {
            let Some(log) = log_path(&host, &container) else { continue };
            let large = tokio::fs::metadata(&log).await.is_ok_and(|metadata| metadata.len() >= host.config.container_log_max_size);
            if large && let Err(error) = rotate(&host, &container.id, &log).await {
                warn!(log = %log.display(), %error, "couldn't turn a log over");
            }
        }
    }
}

fn log_path(host: &Host, container: &v1::Container) -> Option<PathBuf> {
    let label = |name: &str| container.labels.get(name).map(String::as_str);
    let dir = host.config.pod_logs_dir(label(crate::runtime::POD_NAMESPACE)?, label(crate::runtime::POD_NAME)?, label(POD_UID)?);
    let attempt = container.metadata.as_ref()?.attempt;
    Some(dir.join(label(CONTAINER_NAME)?).join(format!("{attempt}.log")))
}

/// `N.log` becomes `N.log.TIME`; the oldest go; the runtime opens a new file.
async fn rotate(host: &Host, container_id: &str, log: &Path) -> std::io::Result<()> {
    let stamp = jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S");
    let old = PathBuf::from(format!("{}.{stamp}", log.display()));
    tokio::fs::rename(log, &old).await?;
    if let Err(error) = host.cri.reopen_log(container_id).await {
        // Still written to under its old name.
        tokio::fs::rename(&old, log).await?;
        return Err(std::io::Error::other(error));
    }
    let prefix = format!("{}.", log.file_name().unwrap_or_default().to_string_lossy());
    let dir = log.parent().unwrap_or(Path::new("/"));
    let mut rotated: Vec<String> = names_in(dir).into_iter().filter(|name| name.starts_with(&prefix)).collect();
    rotated.sort();
    let keep = host.config.container_log_max_files.saturating_sub(1);
    for name in rotated.iter().take(rotated.len().saturating_sub(keep)) {
        tokio::fs::remove_file(dir.join(name)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_ended_container_of_each_name_stays() {
        let container = |id: &str, name: &str, created_at: i64, state: v1::ContainerState| v1::Container {
            id: id.into(),
            created_at,
            state: state as i32,
            labels: [(POD_UID.to_owned(), "u".to_owned()), (CONTAINER_NAME.to_owned(), name.to_owned())].into(),
            ..v1::Container::default()
        };
        use v1::ContainerState::{ContainerExited, ContainerRunning};
        let list = [
            container("1", "a", 1, ContainerExited),
            container("2", "a", 2, ContainerExited),
            container("3", "a", 3, ContainerRunning),
            container("4", "b", 1, ContainerExited),
        ];
        assert_eq!(superfluous(&list), ["1"]);
    }
}
