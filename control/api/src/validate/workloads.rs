//! Workloads that keep pods running: ReplicationController, ReplicaSet, Deployment, DaemonSet, StatefulSet.
use serde_json::Value;

use super::metadata::label_selector;
use super::place::{Findings, Place};
use super::pods;
use crate::field_error::FieldError;
use crate::meta::{self, same};
use crate::names;
use crate::selector::LabelSelector;

const ONLY_ALWAYS: &[&str] = &["Always"];

/// A template of pods that are replaced when they end: they restart always and have no deadline.
fn replaced_template(template: &Place<'_>, owner: &str, found: &mut Findings) {
    pods::template(template, found);
    unreplaced(template, owner, found);
}

/// What pods of an owner that replaces them must not have.
fn unreplaced(template: &Place<'_>, owner: &str, found: &mut Findings) {
    let policy = template.at("spec").at("restartPolicy");
    if policy.text() != "Always" {
        found.push(policy.unsupported(ONLY_ALWAYS));
    }
    let deadline = template.at("spec").at("activeDeadlineSeconds");
    if deadline.is_set() {
        found.push(deadline.forbidden(format!("activeDeadlineSeconds in {owner} is not Supported")));
    }
}

/// A required selector that is not empty; none if it can't be read. `owner` appears in upstream's message, not always the kind's own name.
fn selector(spec: &Place<'_>, owner: &str, found: &mut Findings) -> Option<LabelSelector> {
    let place = spec.at("selector");
    if !place.is_set() {
        found.push(place.required(""));
    } else {
        label_selector(&place, found);
        if place.at("matchLabels").is_empty() && place.at("matchExpressions").is_empty() {
            found.push(place.invalid(format!("empty selector is invalid for {owner}")));
        }
    }
    let parsed = LabelSelector::from_object(place.value).ok();
    if parsed.is_none() {
        found.push(place.invalid("invalid label selector"));
    }
    parsed
}

/// A selector that does not match the template's labels; the empty one is another rule's.
pub(super) fn template_labels(spec: &Place<'_>, selector: &LabelSelector, found: &mut Findings) {
    let labels = spec.at("template.metadata.labels");
    if !selector.matches_everything() && !selector.matches(labels.value) {
        found.push(labels.invalid("`selector` does not match template `labels`"));
    }
}

pub(super) fn replication_controller(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    spec.at("minReadySeconds").non_negative(found);
    spec.at("replicas").non_negative(found);
    if !spec.at("selector").require(found) {
        return;
    }
    let template = spec.at("template");
    if !template.is_set() {
        found.push(template.required(""));
        return;
    }
    template_labels(&spec, &LabelSelector::from_map(spec.at("selector").value), found);
    replaced_template(&template, "ReplicationController", found);
}

pub(super) fn replica_set(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    spec.at("replicas").non_negative(found);
    spec.at("minReadySeconds").non_negative(found);
    if let Some(selector) = selector(&spec, "deployment", found) {
        template_labels(&spec, &selector, found);
        replaced_template(&spec.at("template"), "ReplicaSet", found);
    }
}

pub(super) fn deployment(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    spec.at("replicas").non_negative(found);
    if let Some(selector) = selector(&spec, "deployment", found) {
        template_labels(&spec, &selector, found);
        replaced_template(&spec.at("template"), "ReplicaSet", found);
    }
    strategy(&spec.at("strategy"), found);
    spec.at("minReadySeconds").non_negative(found);
    spec.at("revisionHistoryLimit").non_negative(found);
    let deadline = spec.at("progressDeadlineSeconds");
    if deadline.is_set() {
        deadline.non_negative(found);
        if deadline.number() <= spec.at("minReadySeconds").number() {
            found.push(deadline.invalid("must be greater than minReadySeconds"));
        }
    }
}

fn strategy(strategy: &Place<'_>, found: &mut Findings) {
    let rolling = strategy.at("rollingUpdate");
    match strategy.at("type").text() {
        "Recreate" if rolling.is_set() => found.push(rolling.forbidden("may not be specified when strategy `type` is 'Recreate'")),
        "Recreate" => {}
        "RollingUpdate" => {
            let (unavailable, surge) = (rolling.at("maxUnavailable"), rolling.at("maxSurge"));
            unavailable.integer_or_percent(found);
            surge.integer_or_percent(found);
            if is_zero(&unavailable) && is_zero(&surge) {
                found.push(unavailable.invalid("may not be 0 when `maxSurge` is 0"));
            }
            unavailable.at_most_all(found);
        }
        _ => found.push(FieldError::not_supported(strategy.path.clone(), strategy.value.clone(), &["Recreate", "RollingUpdate"])),
    }
}

fn is_zero(place: &Place<'_>) -> bool {
    place.integer() == Some(0) || place.text() == "0%"
}

pub(super) fn daemon_set(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    daemon_selector(&spec, found);
    replaced_template(&spec.at("template"), "DaemonSet", found);
    spec.at("minReadySeconds").non_negative(found);
    spec.at("revisionHistoryLimit").non_negative(found);
    let strategy = spec.at("updateStrategy");
    let rolling = strategy.at("rollingUpdate");
    match strategy.at("type").text() {
        "OnDelete" => {}
        "RollingUpdate" if !rolling.is_set() => found.push(rolling.required("")),
        "RollingUpdate" => {
            let (unavailable, surge) = (rolling.at("maxUnavailable"), rolling.at("maxSurge"));
            for place in [&unavailable, &surge] {
                place.integer_or_percent(found);
                place.at_most_all(found);
            }
            match (is_zero(&unavailable), is_zero(&surge)) {
                (false, false) if surge.is_set() => found.push(surge.invalid("may not be set when maxUnavailable is non-zero")),
                (true, true) => found.push(unavailable.required("cannot be 0 when maxSurge is 0")),
                _ => {}
            }
        }
        _ => found.push(strategy.unsupported(&["OnDelete", "RollingUpdate"])),
    }
}

/// Not required in so many words; but an absent one matches no template.
fn daemon_selector(spec: &Place<'_>, found: &mut Findings) {
    let place = spec.at("selector");
    label_selector(&place, found);
    if let Ok(selector) = LabelSelector::from_object(place.value) {
        template_labels(spec, &selector, found);
    }
    if place.is_set() && place.at("matchLabels").is_empty() && place.at("matchExpressions").is_empty() {
        found.push(place.invalid("empty selector is invalid for daemonset"));
    }
}

pub(super) fn stateful_set(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    let policy = spec.at("podManagementPolicy");
    match policy.text() {
        "" => found.push(policy.required("")),
        "OrderedReady" | "Parallel" => {}
        _ => found.push(policy.invalid("must be 'OrderedReady' or 'Parallel'")),
    }
    let strategy = spec.at("updateStrategy");
    let rolling = strategy.at("rollingUpdate");
    match strategy.at("type").text() {
        "" => found.push(strategy.required("")),
        "OnDelete" if rolling.is_set() => found.push(rolling.invalid("only allowed for updateStrategy 'RollingUpdate'")),
        "OnDelete" => {}
        "RollingUpdate" => {
            rolling.at("partition").non_negative(found);
            let unavailable = rolling.at("maxUnavailable");
            unavailable.integer_or_percent(found);
            unavailable.at_most_all(found);
            if is_zero(&unavailable) {
                found.push(unavailable.invalid("cannot be 0"));
            }
        }
        _ => found.push(strategy.invalid("must be 'RollingUpdate' or 'OnDelete'")),
    }
    for field in ["whenDeleted", "whenScaled"] {
        spec.at("persistentVolumeClaimRetentionPolicy").at(field).one_of_if_set(found, &["Retain", "Delete"]);
    }
    for field in ["replicas", "minReadySeconds", "revisionHistoryLimit", "ordinals.start"] {
        spec.at(field).non_negative(found);
    }
    spec.at("serviceName").check_if_set(found, names::dns_label);
    if let Some(selector) = selector(&spec, "statefulset", found) {
        template_labels(&spec, &selector, found);
        let template = stateful_template(spec.value);
        pods::template(&Place { value: &template, path: spec.at("template").path }, found);
    }
    unreplaced(&spec.at("template"), "StatefulSet", found);
}

/// The template as pods will have it: the claims are volumes, and names come from the set.
fn stateful_template(spec: &Value) -> Value {
    let mut template = spec["template"].clone();
    for field in ["spec.subdomain", "spec.hostname"] {
        meta::remove(&mut template, field);
    }
    let claims: Vec<&str> = meta::items(spec, "volumeClaimTemplates").iter().map(meta::name).collect();
    if !claims.is_empty() {
        let mut volumes: Vec<Value> =
            claims.iter().map(|name| serde_json::json!({"name": name, "persistentVolumeClaim": {"claimName": name}})).collect();
        volumes.extend(meta::items(&template, "spec.volumes").iter().filter(|volume| !claims.contains(&meta::name_field(volume))).cloned());
        meta::set(&mut template, "spec.volumes", volumes);
    }
    template
}

pub(super) fn update_stateful_set(root: &Place<'_>, old: &Value, found: &mut Findings) {
    const MUTABLE: &[&str] = &[
        "replicas",
        "ordinals",
        "template",
        "updateStrategy",
        "revisionHistoryLimit",
        "persistentVolumeClaimRetentionPolicy",
        "minReadySeconds",
    ];
    let strip = |spec: &Value| {
        let mut spec = spec.clone();
        for field in MUTABLE {
            meta::remove(&mut spec, field);
        }
        // The templates' status is a default of the server's.
        for claim in spec.get_mut("volumeClaimTemplates").and_then(Value::as_array_mut).into_iter().flatten() {
            meta::remove(claim, "status");
        }
        spec
    };
    if !same(&strip(&root.value["spec"]), &strip(&old["spec"])) {
        let detail = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
        found.push(root.at("spec").forbidden(detail));
    }
}

/// Counts are not negative, and no part is more than the whole.
pub(super) fn status(status: &Place<'_>, found: &mut Findings) {
    const COUNTS: &[&str] = &["fullyLabeledReplicas", "readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas"];
    let replicas = status.at("replicas");
    for place in
        COUNTS.iter().map(|field| status.at(field)).chain([replicas.clone(), status.at("observedGeneration"), status.at("collisionCount")])
    {
        place.non_negative(found);
    }
    for place in COUNTS.iter().map(|field| status.at(field)) {
        if place.number() > replicas.number() {
            found.push(place.invalid("cannot be greater than status.replicas"));
        }
    }
    let available = status.at("availableReplicas");
    if available.number() > status.at("readyReplicas").number() {
        found.push(available.invalid("cannot be greater than readyReplicas"));
    }
}

pub(super) fn create_revision(root: &Place<'_>, found: &mut Findings) {
    if !root.at("data").is_set() {
        found.push(root.at("data").required("data is mandatory"));
    }
}
