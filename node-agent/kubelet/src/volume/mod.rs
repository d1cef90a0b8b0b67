//! A pod's volumes on the node's disk: made before its containers start, kept up to date, taken away after they ended.
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, PersistentVolume, Pod, Volume};
use outrigger_cluster::lookup::References;
use outrigger_cluster::{Key, Lookup};
use tracing::warn;

use crate::config::Config;
use crate::in_flight::InFlight;
use crate::pod::meta::{containers, ephemeral_containers, init_containers, name_of, namespace_of, spec, uid_of};
use crate::quantity::Resources;

pub mod atomic;
mod content;
mod local;
pub mod mounts;
mod ownership;
pub mod subpath;
mod token;

pub use token::Tokens;

/// A volume that can't be had now.
#[derive(Clone, Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume \"{volume}\" : {message}")]
pub struct Error {
    pub volume: String,
    pub message: String,
}

/// What volumes are made from.
pub struct Volumes {
    config: Arc<Config>,
    lookup: Lookup,
    tokens: Tokens,
    allocatable: Resources,
    in_flight: Arc<InFlight>,
}

/// What of the pod isn't in its object.
pub struct Facts<'a> {
    pub pod_ips: &'a [String],
    pub host_ips: &'a [String],
}

/// The config maps and secrets that the pod refers to: in volumes, environment and as pull secrets.
pub fn references(pod: &Pod) -> References {
    let namespace = namespace_of(pod);
    let spec = spec(pod);
    let mut references = References::default();
    let key = |name: &str| Key::new(namespace, name);
    for secret in spec.image_pull_secrets.iter().flatten() {
        references.secrets.insert(key(&secret.name));
    }
    for volume in spec.volumes.iter().flatten() {
        if let Some(name) = volume.config_map.as_ref().map(|source| source.name.as_str()) {
            references.config_maps.insert(key(name));
        }
        if let Some(name) = volume.secret.as_ref().and_then(|source| source.secret_name.as_deref()) {
            references.secrets.insert(key(name));
        }
        for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
            references.config_maps.extend(source.config_map.iter().map(|source| key(&source.name)));
            references.secrets.extend(source.secret.iter().map(|source| key(&source.name)));
        }
    }
    let ephemeral = ephemeral_containers(pod);
    for container in containers(pod).iter().chain(init_containers(pod)).chain(&ephemeral) {
        for source in container.env_from.iter().flatten() {
            references.config_maps.extend(source.config_map_ref.iter().map(|source| key(&source.name)));
            references.secrets.extend(source.secret_ref.iter().map(|source| key(&source.name)));
        }
        for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            references.config_maps.extend(source.config_map_key_ref.iter().map(|source| key(&source.name)));
            references.secrets.extend(source.secret_key_ref.iter().map(|source| key(&source.name)));
        }
    }
    references
}

/// Where a volume of that kind lives: `<pod>/volumes/kubernetes.io~<plugin>/<name>`.
pub fn volume_dir(config: &Config, pod: &Pod, plugin: &str, name: &str) -> PathBuf {
    config.pod_dir(uid_of(pod)).join("volumes").join(format!("kubernetes.io~{plugin}")).join(name)
}

/// A path of what was opened, whatever has its name by now.
fn path_of(opened: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()))
}

/// The file that tells that the volume has been set up; it goes with the pod.
fn ready_file(config: &Config, pod: &Pod, plugin: &str, name: &str) -> PathBuf {
    config.pod_dir(uid_of(pod)).join("plugins").join(format!("kubernetes.io~{plugin}")).join(name).join("ready")
}

impl Volumes {
    pub fn new(
        config: Arc<Config>,
        lookup: Lookup,
        writer: outrigger_cluster::Writer,
        allocatable: Resources,
        in_flight: Arc<InFlight>,
    ) -> Self {
        Self { config, lookup, tokens: Tokens::new(writer), allocatable, in_flight }
    }

    /// Makes or refreshes every volume of the pod; gives each one's path on the host. Stops at the first that fails.
    pub async fn set_up(&self, pod: &Pod, facts: &Facts<'_>) -> Result<HashMap<String, PathBuf>, Error> {
        let mut paths = HashMap::new();
        for volume in spec(pod).volumes.iter().flatten() {
            let path = self.set_up_one(pod, volume, facts).await;
            let path = path.map_err(|message| Error { volume: volume.name.clone(), message })?;
            paths.insert(volume.name.clone(), path);
        }
        Ok(paths)
    }

    async fn set_up_one(&self, pod: &Pod, volume: &Volume, facts: &Facts<'_>) -> Result<PathBuf, String> {
        let name = &volume.name;
        if let Some(source) = &volume.empty_dir {
            return self.empty_dir(pod, name, source).await;
        }
        if let Some(source) = &volume.host_path {
            let path = PathBuf::from(&source.path);
            local::check_host_path(&path, source.type_.as_deref().unwrap_or_default()).await?;
            return Ok(path);
        }
        let content = content::Content { lookup: &self.lookup, tokens: &self.tokens, allocatable: &self.allocatable, facts };
        if let Some(source) = &volume.config_map {
            return self.write(pod, "configmap", name, content.config_map_volume(pod, source).await?).await;
        }
        if let Some(source) = &volume.secret {
            return self.write(pod, "secret", name, content.secret_volume(pod, source).await?).await;
        }
        if let Some(source) = &volume.downward_api {
            return self.write(pod, "downward-api", name, content.downward_volume(pod, source)?).await;
        }
        if let Some(source) = &volume.projected {
            return self.write(pod, "projected", name, content.projected_volume(pod, source).await?).await;
        }
        if let Some(source) = &volume.persistent_volume_claim {
            return self.claimed(pod, name, &source.claim_name, source.read_only == Some(true)).await;
        }
        if volume.ephemeral.is_some() {
            return self.claimed(pod, name, &format!("{}-{name}", name_of(pod)), false).await;
        }
        Err("no volume plugin matched".into())
    }

    /// Writes a volume made of files and gives it to the pod's group.
    async fn write(&self, pod: &Pod, plugin: &str, name: &str, payload: atomic::Payload) -> Result<PathBuf, String> {
        let dir = volume_dir(&self.config, pod, plugin, name);
        let group = ownership::fs_group(pod);
        let target = dir.clone();
        let written = self.in_flight.run(uid_of(pod), move || {
            local::make_volume_dir(&target)?;
            atomic::write(&target, &payload, group)
        });
        written.await.map(|_| dir.clone()).map_err(|error| format!("failed to write {}: {error}", dir.display()))
    }

    async fn empty_dir(&self, pod: &Pod, name: &str, source: &EmptyDirVolumeSource) -> Result<PathBuf, String> {
        let dir = volume_dir(&self.config, pod, "empty-dir", name);
        let make = local::empty_dir(dir.clone(), ready_file(&self.config, pod, "empty-dir", name), pod, source, &self.allocatable);
        let made = self.in_flight.run(uid_of(pod), make).await;
        made.map(|()| dir.clone()).map_err(|error| format!("failed to set up emptyDir {}: {error}", dir.display()))
    }

    /// A claim bound to a volume that is a folder of this node.
    async fn claimed(&self, pod: &Pod, name: &str, claim: &str, read_only: bool) -> Result<PathBuf, String> {
        let namespace = namespace_of(pod);
        let found = self.lookup.claim(namespace, claim).await.map_err(|error| error.to_string())?;
        let found = found.ok_or_else(|| format!("persistentvolumeclaim \"{claim}\" not found"))?;
        let bound = found.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
        let volume = found.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|name| bound && !name.is_empty());
        let volume = volume.ok_or_else(|| format!("PVC {namespace}/{claim} is not bound"))?;
        let volume: Option<PersistentVolume> = self.lookup.volume(&volume).await.map_err(|error| error.to_string())?;
        let spec = volume.and_then(|volume| volume.spec).ok_or("the claim's persistent volume is gone")?;
        let (path, kind) = match (&spec.host_path, &spec.local) {
            (Some(source), _) => (PathBuf::from(&source.path), source.type_.clone().unwrap_or_default()),
            (None, Some(source)) => (PathBuf::from(&source.path), "Directory".to_owned()),
            (None, None) => return Err("no volume plugin matched".into()),
        };
        local::check_host_path(&path, &kind).await?;
        if spec.local.is_some() && !read_only {
            self.give_local(pod, name, path.clone())
                .await
                .map_err(|error| format!("failed to give {} to the group: {error}", path.display()))?;
        }
        Ok(path)
    }

    /// Gives a folder of the node to the pod's group, once for each pod.
    async fn give_local(&self, pod: &Pod, name: &str, path: PathBuf) -> std::io::Result<()> {
        let Some(group) = ownership::fs_group(pod) else { return Ok(()) };
        let only_on_mismatch = ownership::only_on_root_mismatch(pod);
        let ready = ready_file(&self.config, pod, "local-volume", name);
        let give = move || {
            if ready.exists() {
                return Ok(());
            }
            if !(only_on_mismatch && ownership::is_given(&path, group, true))
                && let Err(error) = ownership::give_to_group(&path, group, true)
            {
                // Best effort as upstream: the file system may refuse.
                warn!(path = %path.display(), group, %error, "not all of the volume was given to the pod's group");
            }
            local::mark_ready(&ready)
        };
        self.in_flight.run(uid_of(pod), give).await
    }

    /// Unmounts and removes everything that the pod has on disk but its logs.
    pub async fn tear_down(&self, uid: &str) -> std::io::Result<()> {
        self.tokens.forget_pod(uid);
        let dir = self.config.pod_dir(uid);
        let quiet = self.in_flight.quiet(uid).await;
        let removed = tokio::task::spawn_blocking(move || {
            let _quiet = quiet;
            remove_pod_dir(&dir)
        });
        removed.await?
    }
}

fn remove_pod_dir(dir: &Path) -> std::io::Result<()> {
    mounts::unmount_below(dir)?;
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{
        ConfigMapVolumeSource, Container, EnvFromSource, LocalObjectReference, PodSpec, SecretEnvSource, SecretVolumeSource,
    };

    use super::*;

    #[test]
    fn all_references_of_a_pod() {
        let mut pod = Pod {
            spec: Some(PodSpec {
                image_pull_secrets: Some(vec![LocalObjectReference { name: "pull".into() }]),
                volumes: Some(vec![
                    Volume { config_map: Some(ConfigMapVolumeSource { name: "cm".into(), ..Default::default() }), ..Volume::default() },
                    Volume {
                        secret: Some(SecretVolumeSource { secret_name: Some("s".into()), ..Default::default() }),
                        ..Volume::default()
                    },
                ]),
                containers: vec![Container {
                    env_from: Some(vec![EnvFromSource {
                        secret_ref: Some(SecretEnvSource { name: "env".into(), optional: None }),
                        ..EnvFromSource::default()
                    }]),
                    ..Container::default()
                }],
                ..PodSpec::default()
            }),
            ..Pod::default()
        };
        pod.metadata.namespace = Some("ns".into());
        let references = references(&pod);
        let secrets: Vec<&str> = references.secrets.iter().map(|key| key.name.as_str()).collect();
        assert_eq!(secrets, ["env", "pull", "s"]);
        assert!(references.config_maps.contains(&Key::new("ns", "cm")));
    }
}
