//! What makes a pod the n-th of its set: name, labels, host name and volumes (pure).
use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec};
use k8s_openapi::api::core::v1::{PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume};

use super::claims::claim_name;
use crate::history::HASH_LABEL;
use crate::objects::{controller_ref, labels, name};
use crate::pods;

const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const INDEX: &str = "apps.kubernetes.io/pod-index";

/// `web-3` is number 3 of `web`.
pub fn parent_and_ordinal(pod: &str) -> Option<(&str, i32)> {
    let (parent, number) = pod.rsplit_once('-')?;
    let canonical = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    Some((parent, number.parse().ok().filter(|_| canonical)?))
}

pub fn ordinal(pod: &Pod) -> Option<i32> {
    parent_and_ordinal(name(&pod.metadata)).map(|(_, ordinal)| ordinal)
}

fn spec(set: &StatefulSet) -> StatefulSetSpec {
    set.spec.clone().unwrap_or_default()
}

fn pod_name(set: &StatefulSet, ordinal: i32) -> String {
    format!("{}-{ordinal}", name(&set.metadata))
}

fn label(pod: &mut Pod, ordinal: i32) {
    let title = name(&pod.metadata).to_owned();
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(POD_NAME.into(), title);
    labels.insert(INDEX.into(), ordinal.to_string());
}

/// The set's claims in place of volumes of the same names.
fn with_storage(set: &StatefulSet, pod: &mut Pod, ordinal: i32) {
    let templates = spec(set).volume_claim_templates.unwrap_or_default();
    if templates.is_empty() {
        return;
    }
    let volume = |template: &k8s_openapi::api::core::v1::PersistentVolumeClaim| Volume {
        name: name(&template.metadata).to_owned(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim_name(set, name(&template.metadata), ordinal),
            read_only: None,
        }),
        ..Default::default()
    };
    let mut volumes: Vec<Volume> = templates.iter().map(volume).collect();
    let own = pod.spec.get_or_insert_default().volumes.take().unwrap_or_default();
    let kept: Vec<Volume> = own.into_iter().filter(|other| !volumes.iter().any(|volume| volume.name == other.name)).collect();
    volumes.extend(kept);
    pod.spec.get_or_insert_default().volumes = Some(volumes);
}

/// The pod of this number, from the template of `revision`.
pub fn pod(set: &StatefulSet, template: &PodTemplateSpec, revision: &str, ordinal: i32) -> Pod {
    let mut pod = pods::from_template(&set.metadata, template, controller_ref(set));
    pod.metadata.generate_name = None;
    pod.metadata.name = Some(pod_name(set, ordinal));
    label(&mut pod, ordinal);
    pod.metadata.labels.get_or_insert_default().insert(HASH_LABEL.into(), revision.to_owned());
    let title = pod.metadata.name.clone();
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.hostname = title;
    pod_spec.subdomain = spec(set).service_name.filter(|service| !service.is_empty());
    with_storage(set, &mut pod, ordinal);
    pod
}

/// The pod with its marks back; None when it has them. Volumes of an existing pod can't be changed.
pub fn repaired(set: &StatefulSet, pod: &Pod) -> Option<Pod> {
    let ordinal = ordinal(pod)?;
    if pod_name(set, ordinal) == name(&pod.metadata) && labels(&pod.metadata).get(POD_NAME).map(String::as_str) == Some(name(&pod.metadata))
    {
        return None;
    }
    let mut updated = pod.clone();
    label(&mut updated, ordinal);
    (updated != *pod).then_some(updated)
}

pub fn revision(pod: &Pod) -> &str {
    labels(&pod.metadata).get(HASH_LABEL).map(String::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::PersistentVolumeClaim;

    use super::*;

    #[test]
    fn names_carry_numbers() {
        assert_eq!(parent_and_ordinal("web-3"), Some(("web", 3)));
        assert_eq!(parent_and_ordinal("web-a-10"), Some(("web-a", 10)));
        assert_eq!(parent_and_ordinal("web-x"), None);
        assert_eq!(parent_and_ordinal("web"), None);
    }

    #[test]
    fn a_numbered_pod_has_its_name_and_storage() {
        let mut set = StatefulSet::default();
        set.metadata.name = Some("web".into());
        let spec = set.spec.get_or_insert_default();
        spec.service_name = Some("svc".into());
        let mut claim = PersistentVolumeClaim::default();
        claim.metadata.name = Some("data".into());
        spec.volume_claim_templates = Some(vec![claim]);
        let mut template = PodTemplateSpec::default();
        template.spec.get_or_insert_default().volumes =
            Some(vec![Volume { name: "data".into(), ..Default::default() }, Volume { name: "tmp".into(), ..Default::default() }]);
        let made = pod(&set, &template, "web-1", 2);
        let pod_spec = made.spec.as_ref().unwrap();
        assert_eq!(
            (name(&made.metadata), pod_spec.hostname.as_deref(), pod_spec.subdomain.as_deref()),
            ("web-2", Some("web-2"), Some("svc"))
        );
        let volumes = pod_spec.volumes.as_ref().unwrap();
        assert_eq!(volumes[0].persistent_volume_claim.as_ref().unwrap().claim_name, "data-web-2");
        assert_eq!((volumes.len(), volumes[1].name.as_str()), (2, "tmp"));
        assert!(repaired(&set, &made).is_none());
        let mut stripped = made.clone();
        stripped.metadata.labels = None;
        assert_eq!(labels(&repaired(&set, &stripped).unwrap().metadata)[INDEX], "2");
    }
}
