//! Where a pod may run: affinity, tolerations, spreading.
use std::collections::HashSet;

use super::metadata::label_selector;
use super::place::{Findings, Place};
use crate::field_error::FieldError;
use crate::names;

pub(super) fn affinity(affinity: &Place<'_>, found: &mut Findings) {
    let node = affinity.at("nodeAffinity");
    let required = node.at("requiredDuringSchedulingIgnoredDuringExecution");
    if required.is_set() {
        node_selector(&required, found);
    }
    for preferred in node.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
        weight(&preferred, found);
        node_selector_term(&preferred.at("preference"), found);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let kind = affinity.at(kind);
        for term in kind.at("requiredDuringSchedulingIgnoredDuringExecution").items() {
            pod_affinity_term(&term, found);
        }
        for preferred in kind.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
            weight(&preferred, found);
            pod_affinity_term(&preferred.at("podAffinityTerm"), found);
        }
    }
}

fn weight(term: &Place<'_>, found: &mut Findings) {
    if !(1..=100).contains(&term.at("weight").number()) {
        found.push(term.at("weight").invalid("must be in the range 1-100"));
    }
}

pub(super) fn node_selector(selector: &Place<'_>, found: &mut Findings) {
    let terms = selector.at("nodeSelectorTerms");
    if terms.is_empty() {
        found.push(terms.required("must have at least one node selector term"));
    }
    for term in terms.items() {
        node_selector_term(&term, found);
    }
}

fn node_selector_term(term: &Place<'_>, found: &mut Findings) {
    for requirement in term.at("matchExpressions").items() {
        let values = requirement.at("values");
        match requirement.at("operator").text() {
            "In" | "NotIn" if values.is_empty() => found.push(values.required("must be specified when `operator` is 'In' or 'NotIn'")),
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                found.push(values.forbidden("may not be specified when `operator` is 'Exists' or 'DoesNotExist'"));
            }
            "Gt" | "Lt" if values.len() != 1 => {
                found.push(values.required("must be specified single value when `operator` is 'Lt' or 'Gt'"))
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            _ => found.push(requirement.at("operator").invalid("not a valid selector operator")),
        }
        requirement.at("key").check(found, names::qualified_name);
        for value in values.items() {
            value.check(found, names::label_value);
        }
    }
    for requirement in term.at("matchFields").items() {
        let values = requirement.at("values");
        match requirement.at("operator").text() {
            "In" | "NotIn" if values.len() != 1 => {
                found.push(values.required("must be only one value when `operator` is 'In' or 'NotIn' for node field selector"));
            }
            "In" | "NotIn" => {}
            _ => found.push(requirement.at("operator").invalid("not a valid selector operator")),
        }
        if requirement.at("key").text() == "metadata.name" {
            values.items().for_each(|value| value.check(found, names::dns_subdomain));
        } else {
            found.push(requirement.at("key").invalid("not a valid field selector key"));
        }
    }
}

fn pod_affinity_term(term: &Place<'_>, found: &mut Findings) {
    label_selector(&term.at("labelSelector"), found);
    label_selector(&term.at("namespaceSelector"), found);
    for namespace in term.at("namespaces").items() {
        namespace.named(&term.at("namespace").path).check(found, names::dns_label);
    }
    let key = term.at("topologyKey");
    if key.is_empty() {
        found.push(key.required("can not be empty"));
    }
    key.check(found, names::qualified_name);
}

pub(super) fn tolerations(list: &Place<'_>, found: &mut Findings) {
    for toleration in list.items() {
        let (key, operator, value, effect) =
            (toleration.at("key"), toleration.at("operator"), toleration.at("value"), toleration.at("effect"));
        key.check_if_set(found, names::qualified_name);
        if key.is_empty() && operator.text() != "Exists" {
            found.push(operator.invalid("operator must be Exists when `key` is empty, which means \"match all values and all keys\""));
        }
        if toleration.at("tolerationSeconds").is_set() && effect.text() != "NoExecute" {
            found.push(effect.invalid("effect must be 'NoExecute' when `tolerationSeconds` is set"));
        }
        match operator.text() {
            "Equal" | "" => {
                let errors = names::label_value(value.text());
                if !errors.is_empty() {
                    found.push(FieldError::invalid(operator.path, value.text(), errors.join(";")));
                }
            }
            "Exists" if !value.is_empty() => {
                found.push(FieldError::invalid(operator.path, value.text(), "value must be empty when `operator` is 'Exists'"));
            }
            "Exists" => {}
            _ => found.push(operator.unsupported(&["Equal", "Exists"])),
        }
        if !effect.is_empty() {
            effect.one_of_if_set(found, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        }
    }
}

pub(super) fn topology_spread(list: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for constraint in list.items() {
        constraint.at("maxSkew").positive(found);
        let (key, action) = (constraint.at("topologyKey"), constraint.at("whenUnsatisfiable"));
        if key.is_empty() {
            found.push(key.required("can not be empty"));
        } else {
            key.check(found, names::qualified_name);
        }
        if !["DoNotSchedule", "ScheduleAnyway"].contains(&action.text()) {
            found.push(action.unsupported(&["DoNotSchedule", "ScheduleAnyway"]));
        }
        if !seen.insert((key.text(), action.text())) {
            let pair = format!("{{{}, {}}}", key.text(), action.text());
            found.push(FieldError::duplicate(format!("{}.{{topologyKey, whenUnsatisfiable}}", constraint.path), pair));
        }
        let domains = constraint.at("minDomains");
        if domains.is_set() {
            domains.positive(found);
            if action.text() != "DoNotSchedule" {
                found.push(domains.invalid(format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {}", action.text())));
            }
        }
        for field in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            constraint.at(field).one_of_if_set(found, &["Honor", "Ignore"]);
        }
        let keys = constraint.at("matchLabelKeys");
        if !keys.is_empty() && !constraint.at("labelSelector").is_set() {
            found.push(keys.forbidden("must not be specified when labelSelector is not set"));
        }
        label_selector(&constraint.at("labelSelector"), found);
    }
}

/// Taints of a node.
pub(super) fn taints(list: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for taint in list.items() {
        taint.at("key").check(found, names::qualified_name);
        let errors = names::label_value(taint.at("value").text());
        if !errors.is_empty() {
            found.push(taint.at("value").invalid(errors.join(";")));
        }
        taint.at("effect").one_of(found, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        if !seen.insert((taint.at("key").text(), taint.at("effect").text())) {
            found.push(taint.duplicate());
        }
    }
}
