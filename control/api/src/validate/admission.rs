//! What configures admission: webhooks, policies and their bindings, down to the types of their expressions.
use std::collections::HashSet;

use super::metadata::label_selector;
use super::place::{Findings, Place};
use crate::cel::Scope;
use crate::cel::language::Type;
use crate::field_error::FieldError;
use crate::names;

const MATCH_CONDITIONS: usize = 64;
const AUDIT_ANNOTATIONS: usize = 20;

pub(super) fn kind(kind: &str, root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    match kind {
        "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration" => webhooks(root, found),
        "ValidatingAdmissionPolicy" => validating_policy(&spec, found),
        "MutatingAdmissionPolicy" => mutating_policy(&spec, found),
        "ValidatingAdmissionPolicyBinding" => {
            binding(&spec, found);
            actions(&spec.at("validationActions"), found);
        }
        "MutatingAdmissionPolicyBinding" => binding(&spec, found),
        _ => {}
    }
}

fn webhooks(root: &Place<'_>, found: &mut Findings) {
    let mut seen = HashSet::new();
    for hook in root.at("webhooks").items() {
        let name = hook.at("name");
        if name.require(found) {
            let before = found.len();
            name.check(found, names::dns_subdomain);
            if found.len() == before && name.text().split('.').count() < 3 {
                found.push(name.invalid("should be a domain with at least three segments separated by dots"));
            }
        }
        if !seen.insert(name.text()) {
            found.push(name.duplicate());
        }
        for rule in hook.at("rules").items() {
            webhook_rule(&rule, found);
        }
        hook.at("failurePolicy").one_of_if_set(found, &["Fail", "Ignore"]);
        hook.at("matchPolicy").one_of_if_set(found, &["Equivalent", "Exact"]);
        hook.at("reinvocationPolicy").one_of_if_set(found, &["IfNeeded", "Never"]);
        match hook.at("sideEffects") {
            effects if effects.is_set() => effects.one_of_if_set(found, &["None", "NoneOnDryRun"]),
            effects => found.push(effects.required("must specify one of None, NoneOnDryRun")),
        }
        let timeout = hook.at("timeoutSeconds");
        if timeout.integer().is_some_and(|seconds| !(1..=30).contains(&seconds)) {
            found.push(timeout.invalid("the timeout value must be between 1 and 30 seconds"));
        }
        label_selector(&hook.at("namespaceSelector"), found);
        label_selector(&hook.at("objectSelector"), found);
        match_conditions(&hook.at("matchConditions"), &Scope::default(), found);
        if hook.at("admissionReviewVersions").is_empty() {
            found.push(hook.at("admissionReviewVersions").required("must specify one of v1, v1beta1"));
        } else if !hook.at("admissionReviewVersions").items().any(|version| matches!(version.text(), "v1" | "v1beta1")) {
            found.push(hook.at("admissionReviewVersions").invalid("must include at least one of v1, v1beta1"));
        }
        client_config(&hook.at("clientConfig"), found);
    }
}

fn webhook_rule(rule: &Place<'_>, found: &mut Findings) {
    for field in ["operations", "apiGroups", "apiVersions", "resources"] {
        let list = rule.at(field);
        if list.is_empty() {
            found.push(list.required(""));
        }
        if list.len() > 1 && field != "resources" && list.items().any(|item| item.text() == "*") {
            found.push(list.invalid("if '*' is present, must not specify other values"));
        }
    }
    for operation in rule.at("operations").items() {
        operation.one_of_if_set(found, &["*", "CONNECT", "CREATE", "DELETE", "UPDATE"]);
    }
    rule.at("scope").one_of_if_set(found, &["*", "Cluster", "Namespaced"]);
}

/// Where a webhook is called.
pub(super) fn client_config(config: &Place<'_>, found: &mut Findings) {
    let (url, service) = (config.at("url"), config.at("service"));
    match (url.is_set(), service.is_set()) {
        (true, true) | (false, false) => found.push(config.required("exactly one of url or service is required")),
        (true, false) => {
            if !url.text().starts_with("https://") {
                found.push(url.invalid("'https' is the only allowed URL scheme; desired format: https://host[/path]"));
            }
        }
        (false, true) => {
            service.at("name").require(found);
            service.at("namespace").require(found);
            if service.at("port").is_set() {
                service.at("port").in_range(found, 1, 65535);
            }
            let path = service.at("path");
            if !path.text().is_empty() && !path.text().starts_with('/') {
                found.push(path.invalid("must start with a '/'"));
            }
        }
    }
}

fn match_conditions(conditions: &Place<'_>, scope: &Scope, found: &mut Findings) {
    if conditions.len() > MATCH_CONDITIONS {
        found.push(FieldError::too_many(conditions.path.as_str(), conditions.len(), MATCH_CONDITIONS));
    }
    let mut seen = HashSet::new();
    for condition in conditions.items() {
        let expression = condition.at("expression");
        if expression.text().trim().is_empty() {
            found.push(expression.required(""));
        } else if let Err(why) = scope.compile(expression.text().trim(), &[Type::Bool]) {
            found.push(expression.invalid(why));
        }
        let name = condition.at("name");
        name.require_format(found, names::qualified_name);
        if !name.is_empty() && !seen.insert(name.text()) {
            found.push(name.duplicate());
        }
    }
}

/// An expression that must be there, and whose value is of one of the wanted types.
fn expression(place: &Place<'_>, scope: &Scope, wanted: &[Type], found: &mut Findings) {
    if place.text().trim().is_empty() {
        found.push(place.required("expression is not specified"));
    } else if let Err(why) = scope.compile(place.text(), wanted) {
        found.push(place.invalid(why));
    }
}

/// What both kinds of policies have; the scope of their expressions, with the policy's variables.
fn policy(spec: &Place<'_>, patches: bool, found: &mut Findings) -> Scope {
    spec.at("failurePolicy").one_of_if_set(found, &["Fail", "Ignore"]);
    let param_kind = spec.at("paramKind");
    if param_kind.is_set() {
        param_kind.at("apiVersion").require(found);
        let kind = param_kind.at("kind");
        if kind.require(found) {
            for why in names::dns_1035_label(&kind.text().to_lowercase()) {
                found.push(kind.invalid(format!("may have mixed case, but should otherwise match: {why}")));
            }
        }
    }
    let constraints = spec.at("matchConstraints");
    if constraints.is_set() {
        match_resources(&constraints, found);
        if constraints.at("resourceRules").is_empty() {
            found.push(constraints.at("resourceRules").required(""));
        }
    } else {
        found.push(constraints.required(""));
    }
    let mut scope = Scope { params: param_kind.is_set(), ..Scope::default() };
    match_conditions(&spec.at("matchConditions"), &scope, found);
    scope.patches = patches;
    for variable in spec.at("variables").items() {
        let (name, source) = (variable.at("name"), variable.at("expression"));
        if name.text().trim().is_empty() {
            found.push(name.required("name is not specified"));
        } else if !names::c_identifier(name.text()).is_empty() {
            found.push(name.invalid("must be a valid CEL identifier"));
        }
        if source.text().trim().is_empty() {
            found.push(source.required("expression is not specified"));
        } else if let Err(why) = scope.add_variable(name.text(), source.text()) {
            found.push(source.invalid(why));
        }
    }
    scope
}

fn validating_policy(spec: &Place<'_>, found: &mut Findings) {
    let scope = policy(spec, false, found);
    let (validations, annotations) = (spec.at("validations"), spec.at("auditAnnotations"));
    if validations.is_empty() && annotations.is_empty() {
        for list in [&validations, &annotations] {
            found.push(list.required("validations or auditAnnotations must contain at least one item"));
        }
    }
    for item in validations.items() {
        validation(&item, &scope, found);
    }
    if annotations.len() > AUDIT_ANNOTATIONS {
        found.push(annotations.invalid(format!("must not have more than {AUDIT_ANNOTATIONS} auditAnnotations")));
    }
    let mut seen = HashSet::new();
    for annotation in annotations.items() {
        let (key, value) = (annotation.at("key"), annotation.at("valueExpression"));
        key.require_format(found, names::qualified_name);
        if value.text().trim().is_empty() {
            found.push(value.required("valueExpression is not specified"));
        } else if let Err(why) = scope.compile(value.text(), &[Type::String, Type::Null]) {
            found.push(value.invalid(why));
        }
        if !seen.insert(key.text()) {
            found.push(key.duplicate());
        }
    }
}

fn validation(item: &Place<'_>, scope: &Scope, found: &mut Findings) {
    expression(&item.at("expression"), scope, &[Type::Bool], found);
    let (message, made) = (item.at("message"), item.at("messageExpression"));
    if !made.is_empty() {
        if made.text().trim().is_empty() {
            found.push(made.invalid("must be non-empty if specified"));
        } else if let Err(why) = scope.compile(made.text(), &[Type::String]) {
            found.push(made.invalid(why));
        }
    }
    if !message.is_empty() && message.text().trim().is_empty() {
        found.push(message.invalid("must be non-empty if specified"));
    } else if message.text().trim().contains(['\n', '\r']) {
        found.push(message.invalid("must not contain line breaks"));
    }
    item.at("reason").one_of_if_set(found, &["Forbidden", "Invalid", "RequestEntityTooLarge", "Unauthorized"]);
}

fn mutating_policy(spec: &Place<'_>, found: &mut Findings) {
    let scope = policy(spec, true, found);
    let mutations = spec.at("mutations");
    if mutations.is_empty() {
        found.push(mutations.required("mutations must contain at least one item"));
    }
    for mutation in mutations.items() {
        let (apply, patch) = (mutation.at("applyConfiguration"), mutation.at("jsonPatch"));
        let (wanted, other, source, result) = match mutation.at("patchType").text() {
            "ApplyConfiguration" => ("applyConfiguration", &patch, &apply, crate::cel::patch_object()),
            "JSONPatch" => ("jsonPatch", &apply, &patch, crate::cel::patch_list()),
            "" => {
                found.push(mutation.at("patchType").required(""));
                continue;
            }
            _ => {
                found.push(mutation.at("patchType").unsupported(&["ApplyConfiguration", "JSONPatch"]));
                continue;
            }
        };
        if other.is_set() {
            found.push(other.invalid(format!("must not be specified when patchType is {}", mutation.at("patchType").text())));
        }
        if source.is_set() {
            expression(&source.at("expression"), &scope, &[result], found);
        } else {
            found.push(mutation.at(wanted).required(&format!("must be specified when patchType is {}", mutation.at("patchType").text())));
        }
    }
    spec.at("reinvocationPolicy").one_of(found, &["IfNeeded", "Never"]);
}

fn match_resources(resources: &Place<'_>, found: &mut Findings) {
    resources.at("matchPolicy").one_of_if_set(found, &["Equivalent", "Exact"]);
    label_selector(&resources.at("namespaceSelector"), found);
    label_selector(&resources.at("objectSelector"), found);
    for field in ["resourceRules", "excludeResourceRules"] {
        for rule in resources.at(field).items() {
            let mut seen = HashSet::new();
            for name in rule.at("resourceNames").items() {
                name.check(found, names::path_segment);
                if !seen.insert(name.text()) {
                    found.push(name.duplicate());
                }
            }
            webhook_rule(&rule, found);
        }
    }
}

fn binding(spec: &Place<'_>, found: &mut Findings) {
    spec.at("policyName").require_format(found, names::dns_subdomain);
    let params = spec.at("paramRef");
    if params.is_set() {
        param_ref(&params, found);
    }
    if spec.at("matchResources").is_set() {
        match_resources(&spec.at("matchResources"), found);
    }
}

fn param_ref(params: &Place<'_>, found: &mut Findings) {
    let (name, selector) = (params.at("name"), params.at("selector"));
    name.check_if_set(found, names::path_segment);
    match (name.is_empty(), selector.is_set()) {
        (true, false) => found.push(params.required("one of name or selector must be specified")),
        (false, true) => {
            found.push(name.forbidden("name and selector are mutually exclusive"));
            found.push(selector.forbidden("name and selector are mutually exclusive"));
        }
        _ => label_selector(&selector, found),
    }
    let action = params.at("parameterNotFoundAction");
    if action.is_set() {
        action.one_of(found, &["Allow", "Deny"]);
    } else {
        found.push(action.required(""));
    }
}

fn actions(actions: &Place<'_>, found: &mut Findings) {
    if actions.is_empty() {
        found.push(actions.required("at least one validation action is required"));
    }
    let mut seen = HashSet::new();
    for action in actions.items() {
        action.one_of_if_set(found, &["Audit", "Deny", "Warn"]);
        if !seen.insert(action.text()) {
            found.push(action.duplicate());
        }
    }
    if seen.contains("Deny") && seen.contains("Warn") {
        let why = "must not contain both Deny and Warn (repeating the same validation failure information in the API response and \
                   headers serves no purpose)";
        found.push(actions.invalid(why));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn found(of: &str, spec: Value) -> Vec<String> {
        let object = json!({"spec": spec});
        let mut found = Findings::new();
        kind(of, &Place::root(&object), &mut found);
        found.iter().map(FieldError::to_string).collect()
    }

    fn constraints() -> Value {
        json!({"resourceRules": [{"operations": ["CREATE"], "apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["deployments"]}]})
    }

    #[test]
    fn expressions_are_compiled() {
        let policy = |validations: Value| json!({"matchConstraints": constraints(), "variables": [{"name": "n", "expression": "object.spec.n"}], "validations": validations});
        assert_eq!(
            found(
                "ValidatingAdmissionPolicy",
                policy(json!([{"expression": "variables.n > 1", "messageExpression": "'got ' + variables.n"}]))
            ),
            [""; 0]
        );
        for (validation, expected) in [
            (json!({"expression": "1"}), "spec.validations[0].expression: Invalid value: \"1\": must evaluate to bool but got int"),
            (json!({"expression": ""}), "spec.validations[0].expression: Required value: expression is not specified"),
            (json!({"expression": "params.x == 1"}), "undeclared reference to 'params'"),
            (json!({"expression": "true", "message": "a\nb"}), "must not contain line breaks"),
        ] {
            let errors = found("ValidatingAdmissionPolicy", policy(json!([validation])));
            assert!(errors.len() == 1 && errors[0].contains(expected), "{errors:?}");
        }
        assert_eq!(found("ValidatingAdmissionPolicy", policy(json!([]))).len(), 2);
    }

    #[test]
    fn mutations_make_patches() {
        let policy = |mutation: Value| json!({"matchConstraints": constraints(), "reinvocationPolicy": "Never", "mutations": [mutation]});
        let apply = |expression: &str| policy(json!({"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": expression}}));
        let patch = |expression: &str| policy(json!({"patchType": "JSONPatch", "jsonPatch": {"expression": expression}}));
        assert_eq!(found("MutatingAdmissionPolicy", apply("Object{metadata: Object.metadata{annotations: {'a': 'b'}}}")), [""; 0]);
        assert_eq!(found("MutatingAdmissionPolicy", patch("[JSONPatch{op: 'add', path: '/a', value: 1}]")), [""; 0]);
        assert!(found("MutatingAdmissionPolicy", patch("Object{}"))[0].contains("must evaluate to list(JSONPatch) but got Object"));
        assert!(found("MutatingAdmissionPolicy", apply("Object{spec: Object.metadata{}}"))[0].contains("expected type of field 'spec'"));
    }

    #[test]
    fn bindings_say_what_to_do() {
        let errors = found(
            "ValidatingAdmissionPolicyBinding",
            json!({"policyName": "p", "validationActions": ["Deny", "Warn"], "paramRef": {"name": "a", "selector": {}}}),
        );
        assert_eq!(errors.len(), 4, "{errors:?}");
        let good = json!({"policyName": "p", "validationActions": ["Deny"], "paramRef": {"name": "a", "parameterNotFoundAction": "Deny"}});
        assert_eq!(found("ValidatingAdmissionPolicyBinding", good), [""; 0]);
    }

    #[test]
    fn match_conditions_of_webhooks_must_compile() {
        let hook = |expression: &str| {
            let object = json!({"webhooks": [{"name": "a.b.c", "sideEffects": "None", "admissionReviewVersions": ["v1"],
                "clientConfig": {"url": "https://x"}, "matchConditions": [{"name": "n", "expression": expression}]}]});
            let mut found = Findings::new();
            webhooks(&Place::root(&object), &mut found);
            found.iter().map(FieldError::to_string).collect::<Vec<_>>()
        };
        assert_eq!(hook("object.metadata.name != 'skip-me'"), [""; 0]);
        assert!(hook("... [] bad expression")[0].starts_with("webhooks[0].matchConditions[0].expression: Invalid value: \"... [] bad"));
    }
}
