//! What pods and persistent volumes refer to, read from as little of them as possible.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::graph::{Key, Kind};

/// Set on the API server's copy of a static pod, whose references give no rights.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// A pod's place, and what it refers to in its namespace, each once.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PodFacts {
    pub node: String,
    pub references: Vec<(Kind, String)>,
}

/// A bound volume's claim, and the secrets a kubelet needs to mount it, as (namespace, name).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct VolumeFacts {
    pub claim: (String, String),
    pub secrets: BTreeSet<(String, String)>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: String,
    namespace: String,
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Pod {
    metadata: Metadata,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    image_pull_secrets: Vec<Named>,
    containers: Vec<Container>,
    init_containers: Vec<Container>,
    ephemeral_containers: Vec<Container>,
    volumes: Vec<Volume>,
    resource_claims: Vec<PodResourceClaim>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    resource_claim_statuses: Vec<PodResourceClaim>,
    extended_resource_claim_status: Option<PodResourceClaim>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodResourceClaim {
    name: String,
    resource_claim_name: Option<String>,
}

/// A reference by name; a secret of a persistent volume also has a namespace.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Named {
    name: String,
    namespace: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Container {
    env: Vec<Env>,
    env_from: Vec<EnvFrom>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Env {
    value_from: EnvSource,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct EnvSource {
    secret_key_ref: Option<Named>,
    config_map_key_ref: Option<Named>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct EnvFrom {
    secret_ref: Option<Named>,
    config_map_ref: Option<Named>,
}

/// A volume source that names secrets, whichever its kind.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct SecretSource {
    secret_name: Option<String>,
    secret_namespace: Option<String>,
    secret_ref: Option<Named>,
    node_publish_secret_ref: Option<Named>,
    node_stage_secret_ref: Option<Named>,
    node_expand_secret_ref: Option<Named>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Volume {
    name: String,
    secret: SecretSource,
    config_map: Option<Named>,
    persistent_volume_claim: Option<ClaimSource>,
    ephemeral: Option<serde::de::IgnoredAny>,
    projected: Projected,
    #[serde(flatten)]
    sources: SecretSources,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ClaimSource {
    claim_name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Projected {
    sources: Vec<ProjectedSource>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ProjectedSource {
    secret: Option<Named>,
    config_map: Option<Named>,
}

/// The volume sources, of pods and of persistent volumes, that refer to secrets.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct SecretSources {
    azure_file: SecretSource,
    cephfs: SecretSource,
    cinder: SecretSource,
    csi: SecretSource,
    flex_volume: SecretSource,
    iscsi: SecretSource,
    rbd: SecretSource,
    #[serde(rename = "scaleIO")]
    scale_io: SecretSource,
    storageos: SecretSource,
}

impl SecretSources {
    fn all(&self) -> [&SecretSource; 9] {
        [
            &self.azure_file,
            &self.cephfs,
            &self.cinder,
            &self.csi,
            &self.flex_volume,
            &self.iscsi,
            &self.rbd,
            &self.scale_io,
            &self.storageos,
        ]
    }
}

impl SecretSource {
    fn references(&self) -> impl Iterator<Item = &Named> {
        [&self.secret_ref, &self.node_publish_secret_ref, &self.node_stage_secret_ref, &self.node_expand_secret_ref].into_iter().flatten()
    }
}

/// A null stands for an absent field, as in Go; serde's defaults want it away, which costs only those who send one.
fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(json).or_else(|_| {
        let mut value: Value = serde_json::from_slice(json)?;
        strip_nulls(&mut value);
        serde_json::from_value(value)
    })
}

fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(strip_nulls);
        }
        Value::Array(entries) => entries.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// Namespace and name of a pod, and its facts; `None` for a pod without a node.
pub(super) fn pod(json: &[u8]) -> Result<Option<(Key, PodFacts)>, serde_json::Error> {
    let pod: Pod = read(json)?;
    let Some(node) = pod.spec.node_name.clone().filter(|node| !node.is_empty()) else { return Ok(None) };
    let mut found = BTreeSet::new();
    if !pod.metadata.annotations.contains_key(MIRROR_ANNOTATION) {
        collect(&pod, &mut |kind, name| {
            if !name.is_empty() {
                found.insert((kind, name.to_owned()));
            }
        });
    }
    let references = found.into_iter().collect();
    Ok(Some(((pod.metadata.namespace, pod.metadata.name), PodFacts { node, references })))
}

fn collect(pod: &Pod, found: &mut dyn FnMut(Kind, &str)) {
    let spec = &pod.spec;
    found(Kind::ServiceAccount, spec.service_account_name.as_deref().unwrap_or_default());
    for secret in &spec.image_pull_secrets {
        found(Kind::Secret, &secret.name);
    }
    for container in spec.containers.iter().chain(&spec.init_containers).chain(&spec.ephemeral_containers) {
        let env = container.env.iter().map(|env| (&env.value_from.secret_key_ref, &env.value_from.config_map_key_ref));
        let from = container.env_from.iter().map(|from| (&from.secret_ref, &from.config_map_ref));
        for (secret, config_map) in env.chain(from) {
            secret.iter().for_each(|secret| found(Kind::Secret, &secret.name));
            config_map.iter().for_each(|config_map| found(Kind::ConfigMap, &config_map.name));
        }
    }
    for volume in &spec.volumes {
        collect_volume(&pod.metadata.name, volume, found);
    }
    for claim in &spec.resource_claims {
        let generated = pod.status.resource_claim_statuses.iter().find(|status| status.name == claim.name);
        let name = claim.resource_claim_name.as_deref().or(generated.and_then(|status| status.resource_claim_name.as_deref()));
        found(Kind::ResourceClaim, name.unwrap_or_default());
    }
    let extended = pod.status.extended_resource_claim_status.as_ref().and_then(|status| status.resource_claim_name.as_deref());
    found(Kind::ResourceClaim, extended.unwrap_or_default());
}

fn collect_volume(pod_name: &str, volume: &Volume, found: &mut dyn FnMut(Kind, &str)) {
    found(Kind::Secret, volume.secret.secret_name.as_deref().unwrap_or_default());
    for source in volume.sources.all() {
        found(Kind::Secret, source.secret_name.as_deref().unwrap_or_default());
        source.references().for_each(|secret| found(Kind::Secret, &secret.name));
    }
    for source in &volume.projected.sources {
        source.secret.iter().for_each(|secret| found(Kind::Secret, &secret.name));
        source.config_map.iter().for_each(|config_map| found(Kind::ConfigMap, &config_map.name));
    }
    volume.config_map.iter().for_each(|config_map| found(Kind::ConfigMap, &config_map.name));
    match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(claim), _) => found(Kind::Claim, &claim.claim_name),
        (None, Some(_)) => found(Kind::Claim, &format!("{pod_name}-{}", volume.name)),
        (None, None) => {}
    }
}

#[derive(Deserialize)]
struct PersistentVolume {
    metadata: Metadata,
    #[serde(default)]
    spec: PersistentVolumeSpec,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PersistentVolumeSpec {
    claim_ref: Option<Named>,
    #[serde(flatten)]
    sources: SecretSources,
}

/// The volume's name, and what it refers to if it's bound.
pub(super) fn volume(json: &[u8]) -> Result<(String, Option<VolumeFacts>), serde_json::Error> {
    let volume: PersistentVolume = read(json)?;
    let Some(claim) = volume.spec.claim_ref else { return Ok((volume.metadata.name, None)) };
    let mut secrets = BTreeSet::new();
    for source in volume.spec.sources.all() {
        // Without a namespace of its own a reference means the claim's.
        let namespaced = |namespace: &str| if namespace.is_empty() { claim.namespace.clone() } else { namespace.to_owned() };
        if let Some(name) = source.secret_name.as_ref().filter(|name| !name.is_empty()) {
            secrets.insert((namespaced(source.secret_namespace.as_deref().unwrap_or_default()), name.clone()));
        }
        for secret in source.references().filter(|secret| !secret.name.is_empty()) {
            secrets.insert((namespaced(&secret.namespace), secret.name.clone()));
        }
    }
    Ok((volume.metadata.name, Some(VolumeFacts { claim: (claim.namespace, claim.name), secrets })))
}

#[derive(Deserialize)]
struct NodeNamer {
    metadata: Metadata,
    #[serde(default)]
    spec: NodeNamerSpec,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct NodeNamerSpec {
    node_name: Option<String>,
}

/// An object's name and its `spec.nodeName`.
pub(super) fn node_named_in_spec(json: &[u8]) -> Result<(String, Option<String>), serde_json::Error> {
    let object: NodeNamer = read(json)?;
    Ok((object.metadata.name, object.spec.node_name.filter(|node| !node.is_empty())))
}
