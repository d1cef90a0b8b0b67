//! What may change about a pod.
use serde_json::Value;

use super::containers;
use super::place::{Findings, Place};
use crate::meta::{self, same};
use crate::names;

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

pub(super) fn pod(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let spec = root.at("spec");
    annotations(root, old, found);
    for list in ["containers", "initContainers"] {
        if spec.at(list).len() != meta::items(&old["spec"], list).len() {
            found.push(spec.at(list).forbidden("pod updates may not add or remove containers"));
            return;
        }
    }
    if !deadline(&spec.at("activeDeadlineSeconds"), &old["spec"]["activeDeadlineSeconds"], found) {
        return;
    }
    added_tolerations(&spec.at("tolerations"), &old["spec"]["tolerations"], found);
    let gates = spec.at("schedulingGates");
    for gate in gates.items() {
        let name = gate.at("name");
        if !meta::items(&old["spec"], "schedulingGates").iter().any(|known| meta::name_field(known) == name.text()) {
            found.push(name.forbidden(format!("only deletion is allowed, but found new scheduling gate '{}'", name.text())));
        }
    }
    let mut munged = spec.value.clone();
    munge(&mut munged, &old["spec"]);
    if !meta::items(&old["spec"], "schedulingGates").is_empty() {
        gated(&spec, &mut munged, &old["spec"], found);
    }
    if !same(&munged, &old["spec"]) {
        let changed: Vec<String> = munged
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| !same(value, &old["spec"][key.as_str()]))
            .map(|(key, value)| format!("{key}: {} -> {value}", old["spec"][key.as_str()]))
            .collect();
        found.push(spec.forbidden(format!("pod updates may not change fields other than {UPDATABLE}\n{}", changed.join("\n"))));
    }
}

/// Mirror pods keep their mark.
fn annotations(root: &Place<'_>, old: &Value, found: &mut Findings) {
    const MIRROR: &str = "kubernetes.io/config.mirror";
    let place = root.at("metadata.annotations").key(MIRROR);
    match (place.value.as_str(), meta::annotation(old, MIRROR)) {
        (new, old) if new == old => {}
        (Some(_), None) => found.push(place.forbidden("may not add mirror pod annotation")),
        _ => found.push(place.forbidden("may not remove or update mirror pod annotation")),
    }
}

/// From none to any, or lower; tells whether to go on.
fn deadline(new: &Place<'_>, old: &Value, found: &mut Findings) -> bool {
    match (new.integer(), old.as_i64()) {
        (Some(seconds), _) if !(0..=i64::from(i32::MAX)).contains(&seconds) => new.in_range(found, 0, i64::from(i32::MAX)),
        (Some(seconds), Some(before)) if seconds > before => found.push(new.invalid("must be less than or equal to previous value")),
        (None, Some(_)) => {
            found.push(new.invalid("must not update from a positive integer to nil value"));
            return true;
        }
        _ => return true,
    }
    false
}

fn added_tolerations(new: &Place<'_>, old: &Value, found: &mut Findings) {
    let identity = |toleration: &Value| {
        let mut plain = toleration.clone();
        meta::remove(&mut plain, "tolerationSeconds");
        plain
    };
    for toleration in old.as_array().into_iter().flatten() {
        let wanted = identity(toleration);
        if !new.items().any(|candidate| same(&identity(candidate.value), &wanted)) {
            found.push(new.forbidden("existing toleration can not be modified except its tolerationSeconds"));
            return;
        }
    }
}

/// Takes what may change from the old specification, so that the rest can be compared.
fn munge(spec: &mut Value, old: &Value) {
    for list in ["containers", "initContainers"] {
        for (container, before) in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten().zip(meta::items(old, list)) {
            container["image"] = before["image"].clone();
        }
    }
    for field in ["activeDeadlineSeconds", "schedulingGates", "tolerations"] {
        spec[field] = old[field].clone();
    }
    let grace = "terminationGracePeriodSeconds";
    if old[grace].as_i64().is_some_and(|seconds| seconds < 0) && spec[grace] == 1 {
        spec[grace] = old[grace].clone();
    }
}

/// While gated, a pod's node selector and node affinity may get narrower.
fn gated(spec: &Place<'_>, munged: &mut Value, old: &Value, found: &mut Findings) {
    let selector = spec.at("nodeSelector");
    if meta::string_entries(&old["nodeSelector"]).any(|(key, value)| selector.value.get(key).and_then(Value::as_str) != Some(value)) {
        found.push(selector.invalid("only additions to spec.nodeSelector are allowed (no mutations or deletions)"));
    }
    munged["nodeSelector"] = old["nodeSelector"].clone();
    let terms = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
    let before = meta::items(old, terms);
    let now = spec.at(terms);
    if !before.is_empty() {
        if now.len() != before.len() {
            found.push(now.invalid("no additions/deletions to non-empty NodeSelectorTerms list are allowed"));
        } else {
            for (term, old_term) in now.items().zip(before) {
                let kept = ["matchExpressions", "matchFields"].iter().all(|list| {
                    meta::items(old_term, list).iter().zip(meta::items(term.value, list)).filter(|(old, new)| same(old, new)).count()
                        == meta::items(old_term, list).len()
                });
                if !kept {
                    found.push(term.invalid("only additions are allowed (no mutations or deletions)"));
                }
            }
        }
    }
    let node_affinity = old["affinity"]["nodeAffinity"].clone();
    match (old["affinity"].is_null(), munged.get_mut("affinity").and_then(Value::as_object_mut)) {
        (_, Some(affinity)) if node_affinity.is_null() => drop(affinity.shift_remove("nodeAffinity")),
        (_, Some(affinity)) => drop(affinity.insert("nodeAffinity".into(), node_affinity)),
        (false, None) => munged["affinity"] = old["affinity"].clone(),
        (true, None) => {}
    }
}

pub(super) fn status(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let node = root.at("spec.nodeName");
    if node.text() != meta::text(old, "spec.nodeName") {
        found.push(node.forbidden("may not be changed directly"));
    }
    root.at("status.nominatedNodeName").check_if_set(found, names::dns_subdomain);
    for (list, restarts) in [("containerStatuses", meta::text(old, "spec.restartPolicy") == "Always"), ("initContainerStatuses", true)] {
        if restarts || !meta::items(old, "spec.containers").iter().all(|container| container["restartPolicy"].is_null()) {
            continue;
        }
        ended_containers(&root.at("status").at(list), &old["status"][list], meta::text(old, "spec.restartPolicy"), found);
    }
    for address in root.at("status.podIPs").items() {
        super::pods::ip(&address.at("ip"), found);
    }
    for (index, condition) in root.at("status.conditions").items().enumerate() {
        if condition.at("type").is_empty() {
            found.push(
                root.at("status.conditions")
                    .items()
                    .nth(index)
                    .map_or_else(|| condition.required(""), |place| place.at("type").required("")),
            );
        }
    }
}

/// Without restarts, what has ended stays so.
fn ended_containers(list: &Place<'_>, old: &Value, policy: &str, found: &mut Findings) {
    for before in old.as_array().into_iter().flatten() {
        let ended = &before["state"]["terminated"];
        if ended.is_null() || (policy == "OnFailure" && ended["exitCode"].as_i64().unwrap_or_default() != 0) {
            continue;
        }
        for status in list.items().filter(|status| status.value["name"] == before["name"]) {
            if !status.at("state.terminated").is_set() {
                found.push(status.at("state").forbidden("may not be transitioned to non-terminated state"));
            }
        }
    }
}

pub(super) fn ephemeral_containers(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let list = root.at("spec.ephemeralContainers");
    if meta::annotation(old, "kubernetes.io/config.mirror").is_some() {
        found.push(root.forbidden("static pods do not support ephemeral containers"));
        return;
    }
    containers::all(&root.at("spec"), found);
    for before in meta::items(old, "spec.ephemeralContainers") {
        let name = meta::name_field(before);
        match list.items().find(|container| container.at("name").text() == name) {
            None => found.push(list.forbidden(format!("existing ephemeral containers {name:?} may not be removed\n"))),
            Some(container) if !same(container.value, before) => {
                found.push(list.forbidden(format!("existing ephemeral containers {name:?} may not be changed\n")));
            }
            Some(_) => {}
        }
    }
}

pub(super) fn resize(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let spec = root.at("spec");
    if meta::annotation(old, "kubernetes.io/config.mirror").is_some() {
        found.push(root.forbidden("static pods cannot be resized"));
        return;
    }
    for list in ["containers", "initContainers"] {
        let (new, before) = (spec.at(list), meta::items(&old["spec"], list));
        if new.len() != before.len() {
            found.push(new.forbidden(format!("{list} may not be added or removed on resize")));
            return;
        }
        for (container, before) in new.items().zip(before) {
            if container.at("name").text() != meta::name_field(before) {
                found.push(container.at("name").forbidden(format!("{list} may not be renamed or reordered on resize")));
                return;
            }
            if list == "initContainers" && before["restartPolicy"] != "Always" && !same(&container.value["resources"], &before["resources"])
            {
                found.push(spec.forbidden("resources for non-sidecar init containers are immutable"));
            }
            resized_container(&spec, &container, before, found);
        }
    }
    containers::all(&spec, found);
    if crate::prepare::qos_class(root.value) != crate::prepare::qos_class(old) {
        let class = root.at("status.qosClass").named("spec");
        found.push(class.invalid("Pod QOS Class may not change as a result of resizing"));
    }
}

/// Only amounts of CPU and memory change, and none goes away.
fn resized_container(spec: &Place<'_>, container: &Place<'_>, old: &Value, found: &mut Findings) {
    for list in ["requests", "limits"] {
        let place = container.at("resources").at(list);
        let before = &old["resources"][list];
        if meta::entries(before, "").count() == 0 && before.as_object().is_none_or(|map| map.is_empty()) {
            continue;
        }
        if before.as_object().into_iter().flatten().any(|(name, _)| !place.key(name).is_set()) {
            let kind = list.trim_end_matches('s');
            found.push(place.forbidden(format!("resource {kind}s cannot be removed")));
        }
        let others = |map: &Value| {
            map.as_object()
                .into_iter()
                .flatten()
                .filter(|(name, _)| *name != "cpu" && *name != "memory")
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect::<Vec<_>>()
        };
        if others(place.value) != others(before) {
            found.push(spec.forbidden("only cpu and memory resources are mutable"));
        }
    }
}
