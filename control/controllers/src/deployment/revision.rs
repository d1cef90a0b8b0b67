//! Which ReplicaSet holds which template, and the numbering of templates (pure).
use std::cmp::Reverse;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{Sets, rollout, size, spec, wanted};
use crate::error::SyncError;
use crate::objects::{Labels, annotation, by_creation, controller_ref, is_terminating, name, template_hash};

pub const REVISION: &str = "deployment.kubernetes.io/revision";
pub const HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
pub const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
pub const HASH_LABEL: &str = "pod-template-hash";
/// The history annotation's longest value.
const HISTORY_LENGTH: usize = 2000;
/// What isn't copied from a deployment to its sets.
const OWN_ANNOTATIONS: [&str; 6] =
    ["kubectl.kubernetes.io/last-applied-configuration", REVISION, HISTORY, DESIRED, MAXIMUM, "deprecated.deployment.rollback.to"];

fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    let meta = template.metadata.get_or_insert_default();
    if let Some(labels) = &mut meta.labels {
        labels.remove(HASH_LABEL);
    }
    if meta.labels.as_ref().is_some_and(Labels::is_empty) {
        meta.labels = None;
    }
    meta.creation_timestamp = None;
    template
}

pub fn same_template(deployment: &Deployment, set: &ReplicaSet) -> bool {
    let (Some(wanted), Some(has)) =
        (deployment.spec.as_ref().map(|spec| &spec.template), set.spec.as_ref().and_then(|spec| spec.template.as_ref()))
    else {
        return false;
    };
    without_hash(wanted) == without_hash(has)
}

/// Splits a deployment's sets into the one of its template (the oldest, should there be two) and the rest.
pub(super) fn sort_out(deployment: &Deployment, mut sets: Vec<Arc<ReplicaSet>>) -> Sets {
    sets.sort_by(|left, right| by_creation(&left.metadata, &right.metadata));
    let new = sets.iter().position(|set| same_template(deployment, set)).map(|place| sets.remove(place));
    Sets { new, old: sets }
}

fn revision(meta: &ObjectMeta) -> i64 {
    annotation(meta, REVISION).and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn next_revision(old: &[Arc<ReplicaSet>]) -> i64 {
    old.iter().map(|set| revision(&set.metadata)).max().unwrap_or(0) + 1
}

/// Copies the deployment's annotations and, when `number` is higher than the set's revision, the number.
fn annotate(deployment: &Deployment, meta: &mut ObjectMeta, number: i64) {
    let annotations = meta.annotations.get_or_insert_default();
    for (key, value) in deployment.metadata.annotations.iter().flatten() {
        if !OWN_ANNOTATIONS.contains(&key.as_str()) {
            annotations.insert(key.clone(), value.clone());
        }
    }
    let known = annotations.get(REVISION).cloned();
    // A revision that is no number was written by somebody else: hands off.
    let Ok(current) = known.as_deref().unwrap_or("0").parse::<i64>() else { return };
    if current >= number {
        return;
    }
    annotations.insert(REVISION.into(), number.to_string());
    if let Some(previous) = known {
        let history = annotations.get(HISTORY).cloned().unwrap_or_default();
        let mut entries: Vec<&str> = history.split(',').filter(|entry| !entry.is_empty()).chain([previous.as_str()]).collect();
        while entries.iter().map(|entry| entry.len() + 1).sum::<usize>() > HISTORY_LENGTH + 1 {
            entries.remove(0);
        }
        let joined = entries.join(",");
        annotations.insert(HISTORY.into(), joined);
    }
}

/// The current template's set with its annotations and minReadySeconds brought up to date; None when they are.
pub fn annotated(deployment: &Deployment, new: &ReplicaSet, old: &[Arc<ReplicaSet>]) -> Option<ReplicaSet> {
    let mut updated = new.clone();
    annotate(deployment, &mut updated.metadata, next_revision(old));
    let min_ready = deployment.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0);
    let set_spec = updated.spec.get_or_insert_default();
    if set_spec.min_ready_seconds.unwrap_or(0) != min_ready {
        set_spec.min_ready_seconds = Some(min_ready);
    }
    (updated != *new).then_some(updated)
}

/// The set to be made for the current template, of the size that the rollout allows at once.
pub fn new_set(deployment: &Deployment, old: &[Arc<ReplicaSet>]) -> Result<ReplicaSet, SyncError> {
    let spec = spec(deployment)?;
    let hash = template_hash(&without_hash(&spec.template), deployment.status.as_ref().and_then(|status| status.collision_count));
    let mut template = spec.template.clone();
    template.metadata.get_or_insert_default().labels.get_or_insert_default().insert(HASH_LABEL.into(), hash.clone());
    let mut selector = spec.selector.clone();
    selector.match_labels.get_or_insert_default().insert(HASH_LABEL.into(), hash.clone());
    let prefix: String = name(&deployment.metadata).chars().take(253 - 1 - hash.len()).collect();
    let mut set = ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{prefix}-{hash}")),
            namespace: deployment.metadata.namespace.clone(),
            labels: template.metadata.as_ref().and_then(|meta| meta.labels.clone()),
            owner_references: Some(vec![controller_ref(deployment)]),
            ..Default::default()
        },
        spec: Some(ReplicaSetSpec { replicas: Some(0), min_ready_seconds: spec.min_ready_seconds, selector, template: Some(template) }),
        status: None,
    };
    annotate(deployment, &mut set.metadata, next_revision(old));
    let maximum = wanted(deployment) + rollout::max_surge(deployment);
    let annotations = set.metadata.annotations.get_or_insert_default();
    annotations.insert(DESIRED.into(), wanted(deployment).to_string());
    annotations.insert(MAXIMUM.into(), maximum.to_string());
    let total: i32 = old.iter().map(|set| size(set)).sum();
    set.spec.get_or_insert_default().replicas = Some(rollout::new_size(deployment, 0, total));
    Ok(set)
}

/// Old sets without pods that the history has no room for.
pub fn beyond_history(deployment: &Deployment, old: &[Arc<ReplicaSet>]) -> Vec<Arc<ReplicaSet>> {
    let Some(limit) = deployment.spec.as_ref().and_then(|spec| spec.revision_history_limit).filter(|limit| *limit != i32::MAX) else {
        return Vec::new();
    };
    let mut alive: Vec<_> = old.iter().filter(|set| !is_terminating(&set.metadata)).cloned().collect();
    let excess = alive.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    alive.sort_by_key(|set| Reverse(revision(&set.metadata)));
    let oldest = alive.into_iter().rev().take(excess);
    oldest
        .filter(|set| {
            let status = set.status.clone().unwrap_or_default();
            size(set) == 0 && status.replicas == 0 && status.observed_generation >= set.metadata.generation
        })
        .collect()
}
