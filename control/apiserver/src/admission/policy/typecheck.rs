//! `status.typeChecking` of ValidatingAdmissionPolicies: their expressions checked against the kinds that their rules name.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use outrigger_api::cel::{Scope, kind_type};
use outrigger_api::resource::split_api_version;
use outrigger_api::{Catalog, GroupVersionKind, Resource, Status, meta};
use serde_json::{Value, json};

use crate::admission::{Operation, all};
use crate::call::Call;
use crate::engine::Engine;
use crate::registry::update;

const GROUP: &str = "admissionregistration.k8s.io";
const PLURAL: &str = "validatingadmissionpolicies";
/// More kinds of one rule are not checked.
const KINDS: usize = 10;

/// Checks every policy that has changed, until the server stops.
pub async fn run(engine: Weak<Engine>) {
    let Some(mut changed) =
        engine.upgrade().map(|engine| engine.hub.cache("admissionregistration.k8s.io/validatingadmissionpolicies").subscribe())
    else {
        return;
    };
    loop {
        changed.mark_unchanged();
        let mut failed = false;
        {
            let Some(engine) = engine.upgrade() else { return };
            for policy in all(&engine, GROUP, PLURAL, "") {
                if meta::get(&policy, "status.observedGeneration").as_i64() != Some(meta::generation(&policy))
                    && let Err(status) = report(&engine, &policy).await
                {
                    tracing::debug!(policy = meta::name(&policy), %status, "type checking a policy");
                    failed |= status.code != 404;
                }
            }
        }
        let pause = Duration::from_secs(if failed { 1 } else { 600 });
        match tokio::time::timeout(pause, changed.changed()).await {
            Ok(Err(_)) => return,
            _ => continue,
        }
    }
}

async fn report(engine: &Arc<Engine>, policy: &Value) -> Result<(), Status> {
    let warnings = warnings(&engine.catalog(), &policy["spec"]);
    let generation = meta::generation(policy);
    let name = meta::name(policy);
    let mut call = Call::internal(engine.builtin(GROUP, "v1", PLURAL), "patch", "", name);
    call.info.subresource = "status".into();
    update::change(engine, &call, name, Operation::Update, |current| {
        let mut object = current.clone();
        let checking = if warnings.is_empty() { json!({}) } else { json!({"expressionWarnings": warnings}) };
        meta::set(&mut object, "status.observedGeneration", generation);
        meta::set(&mut object, "status.typeChecking", checking);
        Ok(object)
    })
    .await?;
    Ok(())
}

fn warnings(catalog: &Catalog, spec: &Value) -> Vec<Value> {
    let kinds = kinds(catalog, spec);
    let mut warnings = Vec::new();
    for (index, validation) in meta::items(spec, "validations").iter().enumerate() {
        for field in ["expression", "messageExpression"] {
            let source = meta::text(validation, field);
            let told: Vec<String> = kinds.iter().filter_map(|kind| problem(catalog, spec, kind, source)).collect();
            if !source.is_empty() && !told.is_empty() {
                warnings.push(json!({"fieldRef": format!("spec.validations[{index}].{field}"), "warning": told.join("\n")}));
            }
        }
    }
    warnings
}

/// The kinds behind the rules that name theirs without wildcards.
fn kinds(catalog: &Catalog, spec: &Value) -> Vec<Arc<Resource>> {
    let mut found: BTreeSet<GroupVersionKind> = BTreeSet::new();
    let mut kinds = Vec::new();
    for rule in meta::items(spec, "matchConstraints.resourceRules") {
        let words = |field: &str| -> Vec<&str> { meta::items(rule, field).iter().filter_map(Value::as_str).collect() };
        let (groups, versions) = (words("apiGroups"), words("apiVersions"));
        if groups.iter().chain(&versions).any(|word| word.contains('*')) {
            continue;
        }
        let resources: Vec<&str> = words("resources").into_iter().filter(|resource| !resource.contains(['*', '/'])).collect();
        let named = groups.iter().flat_map(|group| versions.iter().map(move |version| (group, version)));
        let named = named.flat_map(|(group, version)| resources.iter().filter_map(|plural| catalog.by_path(group, version, plural)));
        for resource in named.take(KINDS) {
            if found.insert(resource.gvk()) {
                kinds.push(resource.clone());
            }
        }
    }
    kinds.sort_by_key(|resource| resource.gvk());
    kinds
}

/// What is wrong with an expression when `object` is of this kind.
fn problem(catalog: &Catalog, spec: &Value, resource: &Resource, source: &str) -> Option<String> {
    let param_kind = meta::get(spec, "paramKind");
    let (group, version) = split_api_version(meta::text(param_kind, "apiVersion"));
    let params = catalog.by_kind(group, version, meta::text(param_kind, "kind"));
    let object = Some(kind_type(resource)?);
    let mut scope =
        Scope { object, params: param_kind.is_object(), params_type: params.and_then(|params| kind_type(params)), ..Scope::default() };
    for variable in meta::items(spec, "variables") {
        // A variable that fails is told where it is used.
        let _ = scope.add_variable(meta::text(variable, "name"), meta::text(variable, "expression"));
    }
    let why = scope.compile(source, &[]).err()?;
    Some(format!("{}, Kind={}: {why}\n", resource.api_version(), resource.kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(expression: &str, message: &str) -> Value {
        json!({
            "matchConstraints": {"resourceRules": [{"apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["deployments"]}]},
            "variables": [{"name": "replicas", "expression": "object.spec.replicas"}],
            "validations": [{"expression": expression, "messageExpression": message}],
        })
    }

    #[test]
    fn confused_types_are_warned_of() {
        let catalog = Catalog::builtin();
        assert_eq!(warnings(&catalog, &spec("object.spec.replicas > 1 && variables.replicas < 5", "'x'")), Vec::<Value>::new());
        let found = warnings(&catalog, &spec("object.spec.replicas > '1'", "'got ' + object.spec.replicas"));
        let told = |index: usize| (found[index]["fieldRef"].as_str().unwrap(), found[index]["warning"].as_str().unwrap());
        assert_eq!(found.len(), 2);
        assert_eq!(told(0).0, "spec.validations[0].expression");
        assert!(told(0).1.starts_with("apps/v1, Kind=Deployment: compilation failed: ERROR: <input>:1:22: found no matching overload"));
        assert!(told(1).1.contains("'_+_' applied to '(string, int)'"));
        assert!(warnings(&catalog, &spec("object.spec.nope == 1", ""))[0]["warning"].as_str().unwrap().contains("undefined field 'nope'"));
        assert_eq!(warnings(&catalog, &spec("variables.replicas > '1'", "")).len(), 1);
    }
}
