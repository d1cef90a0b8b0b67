//! Gathers what a cycle must know of a pod's claims and siblings.
use k8s_openapi::api::core::v1::{NodeSelector, PersistentVolume, PersistentVolumeClaim, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use outrigger_api::quantity::Quantity;
use outrigger_controllers::Informers;
use outrigger_controllers::objects::{
    Key, annotation, controller_of, is_terminating, label_selector, labels, name, namespace, selects, selects_all_of,
};

use crate::schedule::Facts;
use crate::volumes::{Delayed, Volumes};

pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";

pub fn gather(informers: &Informers, pod: &Pod) -> Facts {
    Facts { volumes: volumes(informers, pod), siblings: siblings(informers, pod) }
}

/// What selects this pod: its Services, and its controller.
fn siblings(informers: &Informers, pod: &Pod) -> Option<LabelSelector> {
    let space = namespace(&pod.metadata);
    let mut merged = LabelSelector::default();
    let selects_pod =
        |service: &Service| selects_all_of(service.spec.as_ref().and_then(|spec| spec.selector.as_ref()), labels(&pod.metadata));
    for service in informers.services.select(space, selects_pod) {
        let selector = service.spec.clone().and_then(|spec| spec.selector).unwrap_or_default();
        merged.match_labels.get_or_insert_default().extend(selector);
    }
    if let Some(owner) = controller_of(&pod.metadata) {
        let key = Key::new(space, owner.name.clone());
        let selector = match owner.kind.as_str() {
            "ReplicaSet" => informers.replica_sets.get(&key).and_then(|set| Some(set.spec.as_ref()?.selector.clone())),
            "StatefulSet" => informers.stateful_sets.get(&key).and_then(|set| Some(set.spec.as_ref()?.selector.clone())),
            "ReplicationController" => {
                informers.replication_controllers.get(&key).and_then(|set| set.spec.as_ref()?.selector.clone()).map(label_selector)
            }
            _ => None,
        };
        if let Some(selector) = selector {
            merged.match_labels.get_or_insert_default().extend(selector.match_labels.unwrap_or_default());
            merged.match_expressions.get_or_insert_default().extend(selector.match_expressions.unwrap_or_default());
        }
    }
    (merged.match_labels.is_some() || merged.match_expressions.is_some()).then_some(merged)
}

/// The claims that a pod's volumes name, ephemeral volumes' included, with whether the pod must own them.
fn claims(pod: &Pod) -> Vec<(String, bool)> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
            (Some(claim), _) => Some((claim.claim_name.clone(), false)),
            (None, Some(_)) => Some((format!("{}-{}", name(&pod.metadata), volume.name), true)),
            _ => None,
        })
        .collect()
}

fn volumes(informers: &Informers, pod: &Pod) -> Volumes {
    let mut found = Volumes::default();
    let mut immediate = false;
    for (title, owned) in claims(pod) {
        let key = Key::new(namespace(&pod.metadata), title.clone());
        let Some(claim) = informers.volume_claims.get(&key) else {
            found.obstacle.get_or_insert_with(|| {
                if owned {
                    format!("waiting for ephemeral volume controller to create the persistentvolumeclaim \"{title}\"")
                } else {
                    format!("persistentvolumeclaim \"{title}\" not found")
                }
            });
            continue;
        };
        if is_terminating(&claim.metadata) {
            found.obstacle.get_or_insert_with(|| format!("persistentvolumeclaim \"{title}\" is being deleted"));
            continue;
        }
        if claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Lost") {
            let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
            found
                .obstacle
                .get_or_insert_with(|| format!("persistentvolumeclaim \"{title}\" bound to non-existent persistentvolume \"{volume}\""));
            continue;
        }
        let volume_name = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
        if !volume_name.is_empty() && annotation(&claim.metadata, BIND_COMPLETED).is_some() {
            let volume = informers.volumes.get(&Key::new("", volume_name));
            found.bound.push(volume.map(|volume| required(&volume).unwrap_or_default()));
        } else if !volume_name.is_empty() {
            immediate = true;
        } else {
            match delayed(informers, &claim) {
                Some(delayed) => found.delayed.push(delayed),
                None => immediate = true,
            }
        }
    }
    if immediate {
        found.obstacle.get_or_insert_with(|| "pod has unbound immediate PersistentVolumeClaims".to_owned());
    }
    found
}

fn required(volume: &PersistentVolume) -> Option<NodeSelector> {
    volume.spec.as_ref()?.node_affinity.as_ref()?.required.clone()
}

/// The choices for a claim whose class waits for the first consumer; None when it doesn't.
fn delayed(informers: &Informers, claim: &PersistentVolumeClaim) -> Option<Delayed> {
    let class_name = claim.spec.as_ref()?.storage_class_name.clone().filter(|name| !name.is_empty())?;
    let class = informers.storage_classes.get(&Key::new("", class_name.clone()))?;
    if class.volume_binding_mode.as_deref() != Some("WaitForFirstConsumer") {
        return None;
    }
    let mut candidates: Vec<(Quantity, String, Option<NodeSelector>)> = informers
        .volumes
        .list()
        .iter()
        .filter_map(|volume| usable(volume, claim, &class_name).map(|size| (size, name(&volume.metadata).to_owned(), required(volume))))
        .collect();
    candidates.sort_by(|left, right| left.0.partial_cmp(&right.0).unwrap_or(std::cmp::Ordering::Equal).then_with(|| left.1.cmp(&right.1)));
    let provision = (class.provisioner != "kubernetes.io/no-provisioner").then(|| class.allowed_topologies.clone().unwrap_or_default());
    Some(Delayed {
        claim: name(&claim.metadata).to_owned(),
        candidates: candidates.into_iter().map(|(_, name, selector)| (name, selector)).collect(),
        provision,
    })
}

/// The size of a free volume that meets the claim; of one reserved for it too.
fn usable(volume: &PersistentVolume, claim: &PersistentVolumeClaim, class: &str) -> Option<Quantity> {
    let (spec, wanted) = (volume.spec.as_ref()?, claim.spec.as_ref()?);
    let free = match &spec.claim_ref {
        None => true,
        Some(reference) => {
            reference.name == claim.metadata.name
                && reference.namespace == claim.metadata.namespace
                && reference.uid.as_ref().is_none_or(|uid| Some(uid) == claim.metadata.uid.as_ref())
        }
    };
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    let modes = wanted.access_modes.iter().flatten().all(|mode| spec.access_modes.iter().flatten().any(|have| have == mode));
    let same_mode = spec.volume_mode.as_deref().unwrap_or("Filesystem") == wanted.volume_mode.as_deref().unwrap_or("Filesystem");
    let selected = wanted.selector.is_none() || selects(wanted.selector.as_ref(), labels(&volume.metadata));
    if !free || is_terminating(&volume.metadata) || spec.storage_class_name.as_deref() != Some(class) || !modes || !same_mode || !selected {
        return None;
    }
    if spec.claim_ref.is_none() && !matches!(phase, Some("Available") | None) {
        return None;
    }
    let size = Quantity::parse(&spec.capacity.as_ref()?.get("storage")?.0).ok()?;
    let asked = wanted.resources.as_ref().and_then(|resources| resources.requests.as_ref()?.get("storage"));
    let asked = asked.and_then(|quantity| Quantity::parse(&quantity.0).ok()).unwrap_or_else(|| Quantity::from_units(0));
    (size >= asked).then_some(size)
}
