//! ConfigMaps, Secrets, Namespaces, Nodes, limits, quotas and Events.
use std::collections::HashSet;

use serde_json::Value;

use super::place::{Findings, Place};
use super::{metadata, scheduling};
use crate::field_error::FieldError;
use crate::meta::{self, same};
use crate::names;
use crate::quantity::Quantity;

const MAX_SECRET_BYTES: usize = 1024 * 1024;

pub(super) fn config_map(root: &Place<'_>, found: &mut Findings) {
    let mut size = 0;
    let (data, binary) = (root.at("data"), root.at("binaryData"));
    for (key, value) in data.entries() {
        keyed(&value, key, found);
        if binary.key(key).is_set() {
            found.push(FieldError::invalid(value.path.clone(), key, "duplicate of key present in binaryData"));
        }
        size += value.text().len();
    }
    for (key, value) in binary.entries() {
        keyed(&value, key, found);
        size += decoded_length(value.text());
    }
    if size > MAX_SECRET_BYTES {
        found.push(FieldError::too_long("", MAX_SECRET_BYTES));
    }
}

fn keyed(value: &Place<'_>, key: &str, found: &mut Findings) {
    found.extend(names::config_key(key).into_iter().map(|message| FieldError::invalid(value.path.clone(), key, message)));
}

/// Bytes behind base64 text.
fn decoded_length(text: &str) -> usize {
    text.len() / 4 * 3 - text.bytes().rev().take_while(|byte| *byte == b'=').count().min(2)
}

pub(super) fn secret(root: &Place<'_>, found: &mut Findings) {
    let data = root.at("data");
    let mut size = 0;
    for (key, value) in data.entries() {
        keyed(&value, key, found);
        size += decoded_length(value.text());
    }
    if size > MAX_SECRET_BYTES {
        found.push(FieldError::too_long(data.path.clone(), MAX_SECRET_BYTES));
    }
    let need = |keys: &[&str], found: &mut Findings| {
        for key in keys {
            if !data.key(key).is_set() {
                found.push(data.key(key).required(""));
            }
        }
    };
    match root.at("type").text() {
        "kubernetes.io/service-account-token" => {
            let account = root.at("metadata.annotations").key("kubernetes.io/service-account.name");
            if account.is_empty() {
                found.push(account.required(""));
            }
        }
        "kubernetes.io/dockercfg" => docker_config(&data.key(".dockercfg"), found),
        "kubernetes.io/dockerconfigjson" => docker_config(&data.key(".dockerconfigjson"), found),
        "kubernetes.io/basic-auth" if !data.key("username").is_set() && !data.key("password").is_set() => {
            need(&["username", "password"], found)
        }
        "kubernetes.io/ssh-auth" if data.key("ssh-privatekey").is_empty() => need(&["ssh-privatekey"], found),
        "kubernetes.io/tls" => need(&["tls.crt", "tls.key"], found),
        _ => {}
    }
}

fn docker_config(entry: &Place<'_>, found: &mut Findings) {
    use base64::Engine as _;
    if !entry.is_set() {
        found.push(entry.required(""));
        return;
    }
    let bytes = base64::engine::general_purpose::STANDARD.decode(entry.text()).unwrap_or_default();
    if let Err(error) = serde_json::from_slice::<serde_json::Map<String, Value>>(&bytes) {
        found.push(FieldError::invalid(entry.path.clone(), "<secret contents redacted>", error.to_string()));
    }
}

/// ConfigMaps and Secrets that are marked immutable, and a Secret's type.
pub(super) fn update_data(root: &Place<'_>, old: &Value, found: &mut Findings) {
    if root.value.get("type").is_some() || old.get("type").is_some() {
        root.at("type").immutable(found, &old["type"]);
    }
    if old["immutable"] != true {
        return;
    }
    const DETAIL: &str = "field is immutable when `immutable` is set";
    if !root.at("immutable").flag() {
        found.push(root.at("immutable").forbidden(DETAIL));
    }
    for field in ["data", "binaryData"] {
        if !same(&root.value[field], &old[field]) {
            found.push(root.at(field).forbidden(DETAIL));
        }
    }
}

pub(super) fn namespace(root: &Place<'_>, found: &mut Findings) {
    for finalizer in root.at("spec.finalizers").items() {
        let before = found.len();
        finalizer.check(found, names::qualified_name);
        if found.len() == before
            && !finalizer.text().contains('/')
            && !matches!(finalizer.text(), "kubernetes" | "orphan" | "foregroundDeletion")
        {
            found.push(finalizer.invalid("name is neither a standard finalizer name nor is it fully qualified"));
        }
    }
}

pub(super) fn namespace_status(root: &Place<'_>, found: &mut Findings) {
    let phase = root.at("status.phase");
    let place = phase.named("status.Phase");
    match (meta::is_deleting(root.value), phase.text()) {
        (false, text) if text != "Active" => found.push(place.invalid("may only be 'Active' if `deletionTimestamp` is empty")),
        (true, text) if text != "Terminating" => found.push(place.invalid("may only be 'Terminating' if `deletionTimestamp` is not empty")),
        _ => {}
    }
}

pub(super) fn node(root: &Place<'_>, found: &mut Findings) {
    scheduling::taints(&root.at("spec.taints"), found);
    for list in ["capacity", "allocatable"] {
        for (_, amount) in root.at("status").at(list).entries() {
            metadata::non_negative_quantity(&amount, found);
        }
    }
    let cidrs = root.at("spec.podCIDRs");
    for cidr in cidrs.items() {
        super::network::cidr(&cidr, found);
    }
    let is_v4 = |place: Place<'_>| !place.text().contains(':');
    if cidrs.len() > 1 && (cidrs.len() > 2 || cidrs.items().map(is_v4).collect::<HashSet<_>>().len() == 1) {
        found.push(cidrs.invalid("may specify no more than one CIDR for each IP family"));
    }
}

pub(super) fn update_node(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let cidrs = root.at("spec.podCIDRs");
    if !meta::items(old, "spec.podCIDRs").is_empty() && !same(cidrs.value, meta::get(old, "spec.podCIDRs")) {
        found.push(cidrs.forbidden("node updates may not change podCIDR except from \"\" to valid"));
    }
    let provider = root.at("spec.providerID");
    if !meta::text(old, "spec.providerID").is_empty() && provider.text() != meta::text(old, "spec.providerID") {
        found.push(provider.forbidden("node updates may not change providerID except from \"\" to valid"));
    }
}

pub(super) fn limit_range(root: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for limit in root.at("spec.limits").items() {
        let kind = limit.at("type");
        kind.check(found, names::qualified_name);
        if !seen.insert(kind.text()) {
            found.push(kind.duplicate());
        }
        if kind.text() == "Pod" {
            for field in ["default", "defaultRequest"] {
                if !limit.at(field).is_empty() {
                    found.push(limit.at(field).forbidden("may not be specified when `type` is 'Pod'"));
                }
            }
        }
        let names: HashSet<&str> = ["min", "max", "default", "defaultRequest", "maxLimitRequestRatio"]
            .iter()
            .flat_map(|list| limit.at(list).entries())
            .map(|(name, _)| name)
            .collect();
        let mut names: Vec<&str> = names.into_iter().collect();
        names.sort_unstable();
        if kind.text() == "PersistentVolumeClaim" && !limit.at("min").key("storage").is_set() && !limit.at("max").key("storage").is_set() {
            found.push(limit.at("limits").required("either minimum or maximum storage value is required, but neither was provided"));
        }
        for name in names {
            limit_amounts(&limit, name, found);
        }
    }
}

/// min <= defaultRequest <= default <= max.
fn limit_amounts(limit: &Place<'_>, name: &str, found: &mut Findings) {
    let amount =
        |list: &str| Some(limit.at(list).key(name)).filter(Place::is_set).map(|place| (place.path.clone(), Quantity::of(place.value)));
    let mut ordered = |low: &str, high: &str, at: &str, low_name: &str, high_name: &str| {
        if let (Some((_, small)), Some((_, great))) = (amount(low), amount(high))
            && small > great
        {
            let path = limit.at(at).key(name).path;
            found.push(FieldError::invalid(
                path,
                amount(at).map(|(_, value)| Value::from(value)).unwrap_or_default(),
                format!("{low_name} value {small} is greater than {high_name} value {great}"),
            ));
        }
    };
    ordered("min", "max", "min", "min", "max");
    ordered("min", "defaultRequest", "defaultRequest", "min", "default request");
    ordered("defaultRequest", "max", "defaultRequest", "default request", "max");
    ordered("defaultRequest", "default", "defaultRequest", "default request", "default limit");
    ordered("min", "default", "default", "min", "default");
    ordered("default", "max", "default", "default", "max");
    if let Some((path, ratio)) = amount("maxLimitRequestRatio")
        && ratio < Quantity::from_units(1)
    {
        found.push(FieldError::invalid(path, ratio.to_string(), format!("ratio {ratio} is less than 1")));
    }
}

const QUOTA_RESOURCES: &[&str] = &[
    "cpu",
    "memory",
    "ephemeral-storage",
    "storage",
    "pods",
    "services",
    "replicationcontrollers",
    "resourcequotas",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
];
const SCOPES: &[&str] = &[
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];

pub(super) fn resource_quota(root: &Place<'_>, found: &mut Findings) {
    let hard = root.at("spec.hard");
    for (name, amount) in hard.entries() {
        let known = QUOTA_RESOURCES.contains(&name)
            || ["requests.", "limits.", "services.", "count/", "hugepages-"].iter().any(|prefix| name.starts_with(prefix));
        if !known && !name.contains('/') {
            found.push(FieldError::invalid(amount.path.clone(), name, "must be a standard resource for quota"));
        }
        metadata::non_negative_quantity(&amount, found);
        let counts =
            matches!(name, "pods" | "services" | "secrets" | "configmaps" | "persistentvolumeclaims") || name.starts_with("count/");
        if counts && !Quantity::of(amount.value).is_integer() {
            found.push(amount.invalid("must be an integer"));
        }
    }
    let scopes = root.at("spec.scopes");
    if scopes.items().any(|scope| !SCOPES.contains(&scope.text())) {
        found.push(scopes.invalid("unsupported scope"));
    }
    let has = |name: &str| scopes.items().any(|scope| scope.text() == name);
    if (has("BestEffort") && has("NotBestEffort")) || (has("Terminating") && has("NotTerminating")) {
        found.push(scopes.invalid("conflicting scopes"));
    }
    for requirement in root.at("spec.scopeSelector.matchExpressions").items() {
        if !SCOPES.contains(&requirement.at("scopeName").text()) {
            found.push(requirement.at("scopeName").invalid("unsupported scope"));
        }
        if !["In", "NotIn", "Exists", "DoesNotExist"].contains(&requirement.at("operator").text()) {
            found.push(requirement.at("operator").invalid("not a valid selector operator"));
        }
    }
}

/// Events of cluster objects live in `default` or `kube-system`, others beside their object.
pub(super) fn event(root: &Place<'_>, found: &mut Findings) {
    let object = if root.at("involvedObject").is_set() { root.at("involvedObject") } else { root.at("regarding") };
    let (namespace, own) = (object.at("namespace"), root.at("metadata.namespace").text());
    let matches = if namespace.is_empty() { matches!(own, "default" | "kube-system") } else { namespace.text() == own };
    if !matches {
        found.push(namespace.named(&format!("{}.namespace", object.path)).invalid("does not match event.namespace"));
    }
    if root.at("eventTime").is_set() && root.at("reportingInstance").text().len() > 128 {
        found.push(root.at("reportingInstance").invalid("can have at most 128 characters"));
    }
}
