//! Leases, budgets, autoscalers, priorities and the rest.
use serde_json::Value;

use super::admission;
use super::metadata::label_selector;
use super::place::{Findings, Place};
use crate::meta::same;
use crate::names;
use crate::quantity::Quantity;
use crate::resource::Resource;

const HIGHEST_USER_PRIORITY: i64 = 1_000_000_000;

pub(super) fn kind(resource: &Resource, root: &Place<'_>, found: &mut Findings) {
    match (resource.group.as_ref(), resource.kind.as_ref()) {
        ("coordination.k8s.io", "Lease") => lease(&root.at("spec"), found),
        ("policy", "PodDisruptionBudget") => disruption_budget(&root.at("spec"), found),
        ("autoscaling", _) => autoscaler(&root.at("spec"), found),
        ("scheduling.k8s.io", "PriorityClass") => priority_class(root, found),
        ("admissionregistration.k8s.io", kind) => admission::kind(kind, root, found),
        ("apiregistration.k8s.io", "APIService") => api_service(root, found),
        ("certificates.k8s.io", "CertificateSigningRequest") => signing_request(&root.at("spec"), found),
        ("node.k8s.io", "RuntimeClass") => root.at("handler").require_format(found, names::dns_label),
        ("flowcontrol.apiserver.k8s.io", "FlowSchema") => {
            root.at("spec.priorityLevelConfiguration.name").require_format(found, names::dns_subdomain);
            root.at("spec.matchingPrecedence").in_range(found, 1, 10_000);
        }
        ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration") => root.at("spec.type").one_of(found, &["Exempt", "Limited"]),
        _ => {}
    }
}

fn lease(spec: &Place<'_>, found: &mut Findings) {
    let (duration, transitions) = (spec.at("leaseDurationSeconds"), spec.at("leaseTransitions"));
    if duration.integer().is_some_and(|seconds| seconds <= 0) {
        found.push(duration.invalid("must be greater than 0"));
    }
    transitions.non_negative(found);
    if spec.at("preferredHolder").is_set() && spec.at("strategy").is_empty() {
        found.push(spec.at("preferredHolder").forbidden("may only be specified if `strategy` is defined"));
    }
}

fn disruption_budget(spec: &Place<'_>, found: &mut Findings) {
    let (minimum, maximum) = (spec.at("minAvailable"), spec.at("maxUnavailable"));
    if minimum.is_set() && maximum.is_set() {
        found.push(spec.invalid("minAvailable and maxUnavailable cannot be both set"));
    }
    for place in [&minimum, &maximum] {
        place.integer_or_percent(found);
        place.at_most_all(found);
    }
    label_selector(&spec.at("selector"), found);
    spec.at("unhealthyPodEvictionPolicy").one_of_if_set(found, &["AlwaysAllow", "IfHealthyBudget"]);
}

fn autoscaler(spec: &Place<'_>, found: &mut Findings) {
    let (least, most) = (spec.at("minReplicas"), spec.at("maxReplicas"));
    if least.integer().is_some_and(|count| count < 1) {
        found.push(least.invalid("must be greater than or equal to 1"));
    }
    if most.number() < 1 {
        found.push(most.invalid("must be greater than 0"));
    }
    if least.is_set() && most.number() < least.number() {
        found.push(most.invalid("must be greater than or equal to `minReplicas`"));
    }
    let target = spec.at("scaleTargetRef");
    target.at("kind").require_format(found, names::path_segment);
    target.at("name").require_format(found, names::path_segment);
    spec.at("targetCPUUtilizationPercentage").integer().filter(|percent| *percent < 1).into_iter().for_each(|_| {
        found.push(spec.at("targetCPUUtilizationPercentage").invalid("must be greater than 0"));
    });
    for metric in spec.at("metrics").items() {
        autoscaler_metric(&metric, found);
    }
    for direction in ["scaleUp", "scaleDown"] {
        let rules = spec.at("behavior").at(direction);
        if !rules.is_set() {
            continue;
        }
        let window = rules.at("stabilizationWindowSeconds");
        if window.number() < 0 {
            found.push(window.invalid("must be greater than or equal to zero"));
        } else if window.number() > 3600 {
            found.push(window.invalid("must be less than or equal to 3600"));
        }
        rules.at("selectPolicy").one_of_if_set(found, &["Disabled", "Max", "Min"]);
        if rules.at("policies").is_empty() {
            found.push(rules.at("policies").required("must specify at least one Policy"));
        }
        for policy in rules.at("policies").items() {
            policy.at("type").one_of_if_set(found, &["Percent", "Pods"]);
            for field in ["value", "periodSeconds"] {
                if policy.at(field).number() <= 0 {
                    found.push(policy.at(field).invalid("must be greater than zero"));
                }
            }
            if policy.at("periodSeconds").number() > 1800 {
                found.push(policy.at("periodSeconds").invalid("must be less than or equal to 1800"));
            }
        }
    }
}

fn autoscaler_metric(metric: &Place<'_>, found: &mut Findings) {
    const KINDS: &[(&str, &str)] = &[
        ("ContainerResource", "containerResource"),
        ("External", "external"),
        ("Object", "object"),
        ("Pods", "pods"),
        ("Resource", "resource"),
    ];
    let kind = metric.at("type");
    if kind.is_empty() {
        found.push(kind.required("must specify a metric source type"));
        return;
    }
    let Some((_, field)) = KINDS.iter().find(|(name, _)| *name == kind.text()) else {
        found.push(kind.unsupported(&KINDS.iter().map(|(name, _)| *name).collect::<Vec<_>>()));
        return;
    };
    let source = metric.at(field);
    if !source.is_set() {
        found.push(source.required("must populate information for the given metric source"));
    }
    for (_, other) in KINDS.iter().filter(|(_, other)| other != field) {
        if metric.at(other).is_set() {
            found.push(metric.at(other).forbidden("must populate the given metric source only"));
        }
    }
    let target = source.at("target");
    if source.is_set() {
        let kind = target.at("type");
        if kind.is_empty() {
            found.push(kind.required("must specify a metric target type"));
        } else if !["Utilization", "Value", "AverageValue"].contains(&kind.text()) {
            found.push(kind.invalid("must be either Utilization, Value, or AverageValue"));
        }
        for field in ["value", "averageValue"] {
            if target.at(field).is_set() && Quantity::of(target.at(field).value) <= Quantity::ZERO {
                found.push(target.at(field).invalid("must be positive"));
            }
        }
        if target.at("averageUtilization").integer().is_some_and(|percent| percent < 1) {
            found.push(target.at("averageUtilization").invalid("must be greater than 0"));
        }
    }
}

fn priority_class(root: &Place<'_>, found: &mut Findings) {
    let (name, value) = (root.at("metadata.name"), root.at("value"));
    let system =
        matches!((name.text(), value.number()), ("system-node-critical", 2_000_001_000) | ("system-cluster-critical", 2_000_000_000));
    if name.text().starts_with("system-") {
        if !system {
            let why = "only system-cluster-critical and system-node-critical with their own values are allowed";
            found
                .push(name.forbidden(format!("priority class names with 'system-' prefix are reserved for system use only. error: {why}")));
        }
    } else if value.number() > HIGHEST_USER_PRIORITY {
        found.push(value.forbidden(format!("maximum allowed value of a user defined priority is {HIGHEST_USER_PRIORITY}")));
    }
    root.at("preemptionPolicy").one_of_if_set(found, &["PreemptLowerPriority", "Never"]);
}

pub(super) fn update_priority_class(root: &Place<'_>, old: &Value, found: &mut Findings) {
    if !same(root.at("value").value, &old["value"]) {
        found.push(root.at("value").forbidden("may not be changed in an update."));
    }
    root.at("preemptionPolicy").immutable(found, &old["preemptionPolicy"]);
}

fn api_service(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    let wanted = format!("{}.{}", spec.at("version").text(), spec.at("group").text());
    let name = root.at("metadata.name");
    if name.text() != wanted && !(spec.at("group").is_empty() && name.text() == format!("{}.", spec.at("version").text())) {
        found.push(name.invalid(format!("must be `spec.version+\".\"+spec.group`: {wanted:?}")));
    }
    spec.at("version").require_format(found, names::dns_1035_label);
    for (field, most) in [("groupPriorityMinimum", 20_000), ("versionPriority", 1000)] {
        let place = spec.at(field);
        if place.number() <= 0 || place.number() > most {
            found.push(place.invalid(format!("must be positive and less than {most}")));
        }
    }
    let service = spec.at("service");
    if !service.is_set() {
        if !spec.at("caBundle").is_empty() {
            found.push(spec.at("caBundle").invalid("local APIServices may not have a caBundle"));
        }
        return;
    }
    service.at("name").require(found);
    service.at("namespace").require(found);
    if spec.at("insecureSkipTLSVerify").flag() && !spec.at("caBundle").is_empty() {
        found.push(spec.at("insecureSkipTLSVerify").invalid("may not be true if caBundle is present"));
    }
}

fn signing_request(spec: &Place<'_>, found: &mut Findings) {
    let request = spec.at("request");
    request.require(found);
    if spec.at("usages").is_empty() {
        found.push(spec.at("usages").required(""));
    }
    let signer = spec.at("signerName");
    if signer.require(found) && !signer.text().contains('/') {
        found.push(signer.invalid("must be a fully qualified domain and path of the form 'example.com/signer-name'"));
    }
    let seconds = spec.at("expirationSeconds");
    if seconds.integer().is_some_and(|seconds| seconds < 600) {
        found.push(seconds.invalid("may not specify a duration less than 600 seconds (10 minutes)"));
    }
}
