//! The files of configMap, secret, downwardAPI and projected volumes.
use k8s_openapi::api::core::v1::{
    ConfigMapVolumeSource, DownwardAPIVolumeFile, DownwardAPIVolumeSource, KeyToPath, Pod, ProjectedVolumeSource, SecretVolumeSource,
    VolumeProjection,
};
use outrigger_cluster::Lookup;

use super::atomic::{File, Payload};
use super::{Facts, ownership, token::Tokens};
use crate::downward;
use crate::pod::meta::{find_container, namespace_of};
use crate::quantity::Resources;

const DEFAULT_MODE: i32 = 0o644;
const DEFAULT_TOKEN_SECONDS: i64 = 3600;

pub struct Content<'a> {
    pub lookup: &'a Lookup,
    pub tokens: &'a Tokens,
    pub allocatable: &'a Resources,
    pub facts: &'a Facts<'a>,
}

fn mode_bits(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0o644) & 0o7777
}

/// Chooses and names the keys: all under their own names, or those that `items` lists.
fn select(
    data: Vec<(String, Vec<u8>)>,
    items: Option<&Vec<KeyToPath>>,
    default_mode: i32,
    optional: bool,
    what: &str,
) -> Result<Payload, String> {
    let file = |bytes: Vec<u8>, mode: i32| File { bytes, mode: mode_bits(mode), user: None };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        return Ok(data.into_iter().map(|(key, bytes)| (key, file(bytes, default_mode))).collect());
    };
    let mut payload = Payload::new();
    for item in items {
        match data.iter().find(|(key, _)| *key == item.key) {
            Some((_, bytes)) => {
                payload.insert(item.path.clone(), file(bytes.clone(), item.mode.unwrap_or(default_mode)));
            }
            None if optional => {}
            None => return Err(format!("references non-existent {what} key: {}", item.key)),
        }
    }
    Ok(payload)
}

impl Content<'_> {
    pub async fn config_map_volume(&self, pod: &Pod, source: &ConfigMapVolumeSource) -> Result<Payload, String> {
        self.config_map(pod, &source.name, source.items.as_ref(), source.default_mode.unwrap_or(DEFAULT_MODE), source.optional).await
    }

    async fn config_map(
        &self,
        pod: &Pod,
        name: &str,
        items: Option<&Vec<KeyToPath>>,
        mode: i32,
        optional: Option<bool>,
    ) -> Result<Payload, String> {
        let optional = optional == Some(true);
        let found = self.lookup.config_map(namespace_of(pod), name).await.map_err(|error| error.to_string())?;
        let Some(found) = found else {
            return if optional { Ok(Payload::new()) } else { Err(format!("configmap \"{name}\" not found")) };
        };
        let texts = found.data.iter().flatten().map(|(key, text)| (key.clone(), text.clone().into_bytes()));
        let binaries = found.binary_data.iter().flatten().map(|(key, bytes)| (key.clone(), bytes.0.clone()));
        select(texts.chain(binaries).collect(), items, mode, optional, "config")
    }

    pub async fn secret_volume(&self, pod: &Pod, source: &SecretVolumeSource) -> Result<Payload, String> {
        let name = source.secret_name.as_deref().unwrap_or_default();
        self.secret(pod, name, source.items.as_ref(), source.default_mode.unwrap_or(DEFAULT_MODE), source.optional).await
    }

    async fn secret(
        &self,
        pod: &Pod,
        name: &str,
        items: Option<&Vec<KeyToPath>>,
        mode: i32,
        optional: Option<bool>,
    ) -> Result<Payload, String> {
        let optional = optional == Some(true);
        let found = self.lookup.secret(namespace_of(pod), name).await.map_err(|error| error.to_string())?;
        let Some(found) = found else {
            return if optional { Ok(Payload::new()) } else { Err(format!("secret \"{name}\" not found")) };
        };
        let data = found.data.iter().flatten().map(|(key, bytes)| (key.clone(), bytes.0.clone())).collect();
        select(data, items, mode, optional, "secret")
    }

    pub fn downward_volume(&self, pod: &Pod, source: &DownwardAPIVolumeSource) -> Result<Payload, String> {
        self.downward(pod, source.items.as_deref().unwrap_or_default(), source.default_mode.unwrap_or(DEFAULT_MODE))
    }

    fn downward(&self, pod: &Pod, items: &[DownwardAPIVolumeFile], default_mode: i32) -> Result<Payload, String> {
        let facts = downward::Facts { pod_ips: self.facts.pod_ips, host_ips: self.facts.host_ips, allocatable: self.allocatable };
        let mut payload = Payload::new();
        for item in items {
            let text = if let Some(field) = &item.field_ref {
                downward::field(pod, &field.field_path, &facts)?
            } else if let Some(resource) = &item.resource_field_ref {
                let name = resource.container_name.as_deref().unwrap_or_default();
                let (_, container) = find_container(pod, name).ok_or_else(|| format!("container {name} not found"))?;
                downward::resource(&container, &resource.resource, resource.divisor.as_ref(), &facts)?
            } else {
                return Err(format!("no source for the file {}", item.path));
            };
            let mode = mode_bits(item.mode.unwrap_or(default_mode));
            payload.insert(item.path.clone(), File { bytes: text.into_bytes(), mode, user: None });
        }
        Ok(payload)
    }

    pub async fn projected_volume(&self, pod: &Pod, source: &ProjectedVolumeSource) -> Result<Payload, String> {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let mut payload = Payload::new();
        for part in source.sources.iter().flatten() {
            payload.extend(self.projection(pod, part, mode).await?);
        }
        Ok(payload)
    }

    async fn projection(&self, pod: &Pod, part: &VolumeProjection, mode: i32) -> Result<Payload, String> {
        if let Some(source) = &part.config_map {
            return self.config_map(pod, &source.name, source.items.as_ref(), mode, source.optional).await;
        }
        if let Some(source) = &part.secret {
            return self.secret(pod, &source.name, source.items.as_ref(), mode, source.optional).await;
        }
        if let Some(source) = &part.downward_api {
            return self.downward(pod, source.items.as_deref().unwrap_or_default(), mode);
        }
        if let Some(source) = &part.service_account_token {
            let seconds = source.expiration_seconds.unwrap_or(DEFAULT_TOKEN_SECONDS);
            let token = self.tokens.token(pod, source.audience.as_deref().unwrap_or_default(), seconds).await?;
            let user = ownership::common_user(pod);
            // Nobody else needs to read a token whose reader is known.
            let mode = if user.is_some() || ownership::fs_group(pod).is_some() { 0o600 } else { mode };
            let file = File { bytes: token.into_bytes(), mode: mode_bits(mode), user };
            return Ok([(source.path.clone(), file)].into());
        }
        if let Some(source) = &part.cluster_trust_bundle {
            let text = self.trust_bundle(source).await?;
            return Ok([(source.path.clone(), File { bytes: text.into_bytes(), mode: mode_bits(mode), user: None })].into());
        }
        Err("unsupported source of a projected volume".into())
    }

    async fn trust_bundle(&self, source: &k8s_openapi::api::core::v1::ClusterTrustBundleProjection) -> Result<String, String> {
        let bundles = self.lookup.trust_bundles().await.map_err(|error| error.to_string())?;
        let labels_match = |labels: Option<&std::collections::BTreeMap<String, String>>| {
            let wanted = source.label_selector.as_ref().and_then(|selector| selector.match_labels.as_ref());
            wanted.into_iter().flatten().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
        };
        let chosen: Vec<String> = bundles
            .into_iter()
            .filter(|bundle| match (&source.name, &source.signer_name) {
                (Some(name), _) => bundle.metadata.name.as_ref() == Some(name),
                (None, signer) => bundle.spec.signer_name == *signer && labels_match(bundle.metadata.labels.as_ref()),
            })
            .map(|bundle| bundle.spec.trust_bundle)
            .collect();
        if chosen.is_empty() && source.optional != Some(true) {
            return Err("combination of signerName and labelSelector matched zero ClusterTrustBundles".into());
        }
        Ok(chosen.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_chosen_and_named() {
        let data = || vec![("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())];
        let item = |key: &str, path: &str| KeyToPath { key: key.into(), path: path.into(), mode: Some(0o400) };
        assert_eq!(select(data(), None, 0o644, false, "config").unwrap().len(), 2);
        let chosen = select(data(), Some(&vec![item("b", "x/y")]), 0o644, false, "config").unwrap();
        assert_eq!(chosen["x/y"], File { bytes: b"2".to_vec(), mode: 0o400, user: None });
        assert_eq!(
            select(data(), Some(&vec![item("c", "z")]), 0o644, false, "config").unwrap_err(),
            "references non-existent config key: c"
        );
        assert!(select(data(), Some(&vec![item("c", "z")]), 0o644, true, "config").unwrap().is_empty());
    }
}
