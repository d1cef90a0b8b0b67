//! Which volume suits a claim (pure).
use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use outrigger_api::quantity::Quantity;

use crate::objects::{annotation, is_terminating, labels, name, selects, uid};

const OLD_CLASS: &str = "volume.beta.kubernetes.io/storage-class";

pub fn class_of(claim: &PersistentVolumeClaim) -> &str {
    let own = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref());
    annotation(&claim.metadata, OLD_CLASS).or(own).unwrap_or_default()
}

fn class_of_volume(volume: &PersistentVolume) -> &str {
    let own = volume.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref());
    annotation(&volume.metadata, OLD_CLASS).or(own).unwrap_or_default()
}

/// Whether the volume is reserved for this claim, by name, and by uid if it says one.
pub fn is_reserved_for(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    reference.is_some_and(|reference| {
        let same_uid = reference.uid.as_deref().is_none_or(|id| id.is_empty() || id == uid(&claim.metadata));
        reference.name == claim.metadata.name && reference.namespace == claim.metadata.namespace && same_uid
    })
}

fn size(volume: &PersistentVolume) -> Quantity {
    let capacity = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref()).and_then(|capacity| capacity.get("storage"));
    capacity.and_then(|text| Quantity::parse(&text.0).ok()).unwrap_or_default()
}

/// What the claim asks for is there. A reserved volume needs no class or selector to fit.
pub fn fits(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let (Some(spec), Some(wanted)) = (&volume.spec, &claim.spec) else { return false };
    let request = wanted.resources.as_ref().and_then(|resources| resources.requests.as_ref()).and_then(|requests| requests.get("storage"));
    let request = request.and_then(|text| Quantity::parse(&text.0).ok()).unwrap_or_default();
    let modes = wanted.access_modes.iter().flatten().all(|mode| spec.access_modes.iter().flatten().any(|have| have == mode));
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".into());
    modes && mode(&spec.volume_mode) == mode(&wanted.volume_mode) && size(volume) >= request && class_of_volume(volume) == class_of(claim)
}

/// The reserved volume that fits, else the smallest free one.
pub fn best(volumes: &[Arc<PersistentVolume>], claim: &PersistentVolumeClaim, reserved_only: bool) -> Option<Arc<PersistentVolume>> {
    let alive = || volumes.iter().filter(|volume| !is_terminating(&volume.metadata) && fits(volume, claim));
    if let Some(reserved) = alive().find(|volume| is_reserved_for(volume, claim)) {
        return Some(reserved.clone());
    }
    let selector = claim.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    let is_free = |volume: &&Arc<PersistentVolume>| {
        let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
        volume.spec.as_ref().is_some_and(|spec| spec.claim_ref.is_none())
            && phase == Some("Available")
            && (selector.is_none() || selects(selector, labels(&volume.metadata)))
    };
    let mut free: Vec<_> = alive().filter(is_free).collect();
    free.sort_by(|left, right| size(left).cmp(&size(right)).then_with(|| name(&left.metadata).cmp(name(&right.metadata))));
    free.first().filter(|_| !reserved_only).map(|volume| (*volume).clone())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn volume(title: &str, size: &str, class: &str, reserved: Option<&str>) -> Arc<PersistentVolume> {
        let mut value = json!({
            "metadata": {"name": title}, "status": {"phase": "Available"},
            "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "storageClassName": class},
        });
        if let Some(claim) = reserved {
            value["spec"]["claimRef"] = json!({"namespace": "default", "name": claim});
        }
        Arc::new(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn the_reserved_or_the_smallest_that_fits() {
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": "data", "namespace": "default"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}, "storageClassName": "slow"},
        }))
        .unwrap();
        let mut all = vec![
            volume("small", "1Gi", "slow", None),
            volume("large", "9Gi", "slow", None),
            volume("fitting", "2048Mi", "slow", None),
            volume("fast", "2Gi", "fast", None),
            volume("taken", "2Gi", "slow", Some("other")),
        ];
        let found = |all: &[Arc<PersistentVolume>], only| best(all, &claim, only).map(|volume| name(&volume.metadata).to_owned());
        assert_eq!(found(&all, false).as_deref(), Some("fitting"));
        assert_eq!(found(&all, true), None);
        all.push(volume("mine", "5Gi", "slow", Some("data")));
        assert_eq!(found(&all, true).as_deref(), Some("mine"));
    }
}
