//! A set's volume claims, and who owns them: that decides whether they outlive their pod or their set (pure).
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;

use super::identity::ordinal;
use super::plan::ordinals;
use crate::objects::{controller_ref, name, uid};

pub fn claim_name(set: &StatefulSet, template: &str, ordinal: i32) -> String {
    format!("{template}-{}-{ordinal}", name(&set.metadata))
}

/// The claims that a pod of the set must have.
pub fn of(set: &StatefulSet, pod: &Pod) -> Vec<PersistentVolumeClaim> {
    let (Some(spec), Some(number)) = (&set.spec, ordinal(pod)) else { return Vec::new() };
    let claim = |template: &PersistentVolumeClaim| {
        let mut claim = template.clone();
        claim.status = None;
        claim.metadata.name = Some(claim_name(set, name(&template.metadata), number));
        claim.metadata.namespace = set.metadata.namespace.clone();
        claim.metadata.labels.get_or_insert_default().extend(spec.selector.match_labels.clone().unwrap_or_default());
        claim.metadata.owner_references = owners(&[], set, pod);
        claim
    };
    spec.volume_claim_templates.iter().flatten().map(claim).collect()
}

fn deletes(set: &StatefulSet) -> (bool, bool) {
    let policy = set.spec.as_ref().and_then(|spec| spec.persistent_volume_claim_retention_policy.clone()).unwrap_or_default();
    (policy.when_scaled.as_deref() == Some("Delete"), policy.when_deleted.as_deref() == Some("Delete"))
}

fn names<K: Resource<DynamicType = ()>>(reference: &OwnerReference, object: &K) -> bool {
    reference.api_version == K::api_version(&()) && reference.kind == K::kind(&()) && reference.name == name(object.meta())
}

/// The owners that the retention policy asks for; None for no owners at all.
fn owners(current: &[OwnerReference], set: &StatefulSet, pod: &Pod) -> Option<Vec<OwnerReference>> {
    let (when_scaled, when_deleted) = deletes(set);
    let mut owners: Vec<OwnerReference> =
        current.iter().filter(|reference| !names(reference, set) && !names(reference, pod)).cloned().collect();
    let foreign = owners.iter().any(|reference| reference.controller == Some(true));
    let scaled_away = ordinal(pod).is_some_and(|number| !ordinals(set).contains(&number));
    if !foreign {
        // A pod that isn't made yet can't own anything.
        if when_scaled && scaled_away && !uid(&pod.metadata).is_empty() {
            owners.push(controller_ref(pod));
        } else if when_deleted && !(when_scaled && scaled_away) {
            owners.push(controller_ref(set));
        }
    }
    (!owners.is_empty()).then_some(owners)
}

/// The claim with the owners it should have; None when it has them, or belongs to a set or pod of another time.
pub fn with_owners(claim: &PersistentVolumeClaim, set: &StatefulSet, pod: &Pod) -> Option<PersistentVolumeClaim> {
    let current = claim.metadata.owner_references.clone().unwrap_or_default();
    let stale = |reference: &OwnerReference| {
        names(reference, set) && reference.uid != uid(&set.metadata) || names(reference, pod) && reference.uid != uid(&pod.metadata)
    };
    if current.iter().any(stale) {
        return None;
    }
    let wanted = owners(&current, set, pod).unwrap_or_default();
    let ids = |list: &[OwnerReference]| {
        let mut ids: Vec<(String, Option<bool>)> = list.iter().map(|reference| (reference.uid.clone(), reference.controller)).collect();
        ids.sort();
        ids
    };
    if ids(&current) == ids(&wanted) {
        return None;
    }
    let mut updated = claim.clone();
    updated.metadata.owner_references = Some(wanted);
    Some(updated)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::StatefulSetPersistentVolumeClaimRetentionPolicy;

    use super::*;

    #[test]
    fn the_retention_policy_names_the_owner() {
        let set = |scaled: &str, deleted: &str| {
            let mut set = StatefulSet::default();
            set.metadata.name = Some("web".into());
            set.metadata.uid = Some("set".into());
            let spec = set.spec.get_or_insert_default();
            spec.replicas = Some(1);
            spec.persistent_volume_claim_retention_policy = Some(StatefulSetPersistentVolumeClaimRetentionPolicy {
                when_scaled: Some(scaled.into()),
                when_deleted: Some(deleted.into()),
            });
            set
        };
        let pod = |number: i32| {
            let mut pod = Pod::default();
            pod.metadata.name = Some(format!("web-{number}"));
            pod.metadata.uid = Some("pod".into());
            pod
        };
        let cases = [
            ("Retain", "Retain", 0, None),
            ("Retain", "Delete", 0, Some("set")),
            ("Retain", "Delete", 5, Some("set")),
            ("Delete", "Retain", 0, None),
            ("Delete", "Retain", 5, Some("pod")),
            ("Delete", "Delete", 0, Some("set")),
            ("Delete", "Delete", 5, Some("pod")),
        ];
        for (scaled, deleted, number, owner) in cases {
            let owners = owners(&[], &set(scaled, deleted), &pod(number));
            assert_eq!(owners.as_ref().map(|list| list[0].uid.as_str()), owner, "{scaled} {deleted} {number}");
        }
    }
}
