//! RBAC objects and access reviews.
use serde_json::Value;

use super::metadata::label_selector;
use super::place::{Findings, Place};
use crate::meta::same;
use crate::names;

const GROUP: &[&str] = &["rbac.authorization.k8s.io"];

pub(super) fn kind(kind: &str, root: &Place<'_>, found: &mut Findings) {
    match kind {
        "Role" => rules(&root.at("rules"), true, found),
        "ClusterRole" => {
            rules(&root.at("rules"), false, found);
            let aggregation = root.at("aggregationRule");
            let selectors = aggregation.at("clusterRoleSelectors");
            if aggregation.is_set() && selectors.is_empty() {
                found.push(selectors.required("at least one clusterRoleSelector required if aggregationRule is non-nil"));
            }
            selectors.items().for_each(|selector| label_selector(&selector, found));
        }
        "RoleBinding" => binding(root, &["Role", "ClusterRole"], true, found),
        "ClusterRoleBinding" => binding(root, &["ClusterRole"], false, found),
        _ => {}
    }
}

fn rules(list: &Place<'_>, namespaced: bool, found: &mut Findings) {
    for rule in list.items() {
        if rule.at("verbs").is_empty() {
            found.push(rule.at("verbs").required("verbs must contain at least one value"));
        }
        let urls = rule.at("nonResourceURLs");
        if !urls.is_empty() {
            if namespaced {
                found.push(urls.invalid("namespaced rules cannot apply to non-resource URLs"));
            }
            if ["apiGroups", "resources", "resourceNames"].iter().any(|field| !rule.at(field).is_empty()) {
                found.push(urls.invalid("rules cannot apply to both regular resources and non-resource URLs"));
            }
            continue;
        }
        if rule.at("apiGroups").is_empty() {
            found.push(rule.at("apiGroups").required("resource rules must supply at least one api group"));
        }
        if rule.at("resources").is_empty() {
            found.push(rule.at("resources").required("resource rules must supply at least one resource"));
        }
    }
}

fn binding(root: &Place<'_>, kinds: &[&str], namespaced: bool, found: &mut Findings) {
    let reference = root.at("roleRef");
    if reference.at("apiGroup").text() != GROUP[0] {
        found.push(reference.at("apiGroup").unsupported(GROUP));
    }
    if !kinds.contains(&reference.at("kind").text()) {
        found.push(reference.at("kind").unsupported(kinds));
    }
    reference.at("name").require_format(found, names::path_segment);
    for subject in root.at("subjects").items() {
        let (name, group) = (subject.at("name"), subject.at("apiGroup"));
        name.require(found);
        match subject.at("kind").text() {
            "ServiceAccount" => {
                name.check_if_set(found, names::dns_subdomain);
                if !group.is_empty() {
                    found.push(group.unsupported(&[""]));
                }
                if !namespaced {
                    subject.at("namespace").require(found);
                }
            }
            "User" | "Group" => {
                if group.text() != GROUP[0] {
                    found.push(group.unsupported(GROUP));
                }
            }
            _ => found.push(subject.at("kind").unsupported(&["ServiceAccount", "User", "Group"])),
        }
    }
}

pub(super) fn update_binding(root: &Place<'_>, old: &Value, found: &mut Findings) {
    if !same(&root.value["roleRef"], &old["roleRef"]) {
        found.push(root.at("roleRef").invalid("cannot change roleRef"));
    }
}

pub(super) fn access_review(kind: &str, root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    let (resource, path) = (spec.at("resourceAttributes"), spec.at("nonResourceAttributes"));
    match (resource.is_set(), path.is_set()) {
        (true, true) => found.push(path.invalid("cannot be specified in combination with resourceAttributes")),
        (false, false) => found.push(resource.invalid("exactly one of nonResourceAttributes or resourceAttributes must be specified")),
        _ => {}
    }
    if kind != "SelfSubjectAccessReview" && spec.at("user").is_empty() && spec.at("groups").is_empty() {
        found.push(spec.at("user").invalid("at least one of user or group must be specified"));
    }
}
