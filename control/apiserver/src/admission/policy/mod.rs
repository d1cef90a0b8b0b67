//! ValidatingAdmissionPolicy and MutatingAdmissionPolicy: rules in CEL, bound to requests and parameters.

mod mutating;
mod params;
pub mod typecheck;
mod validating;

use std::sync::Arc;

use outrigger_api::cel::Scope as Names;
use outrigger_api::{Status, meta};
use serde_json::Value;

use super::derived::Derived;
use super::expressions::{Compiled, Conditions, Inputs};
use super::matching::{Scope, View, is_exempt};
use super::webhook::Rounds;
use super::{Attributes, lookup};
use crate::engine::Engine;

/// What both kinds of policies have in common; `R` is what they do.
struct Policy<R> {
    name: String,
    scope: Scope,
    /// apiVersion and kind.
    param_kind: Option<(String, String)>,
    conditions: Conditions,
    variables: Arc<Vec<(String, Compiled)>>,
    ignores_failure: bool,
    rules: R,
}

impl<R> Policy<R> {
    fn new(policy: &Value, patches: bool, rules: impl FnOnce(&Value, &Names) -> R) -> Self {
        let spec = &policy["spec"];
        let kind = meta::get(spec, "paramKind");
        let param_kind = kind.is_object().then(|| (meta::text(kind, "apiVersion").to_string(), meta::text(kind, "kind").to_string()));
        let mut names = Names { params: param_kind.is_some(), patches, ..Names::default() };
        let variables = meta::items(spec, "variables").iter().map(|variable| {
            let name = meta::text(variable, "name").to_string();
            let compiled = names.add_variable(&name, meta::text(variable, "expression"));
            (name, compiled)
        });
        let variables = Arc::new(variables.collect());
        Self {
            name: meta::name(policy).into(),
            scope: Scope::of_resources(&spec["matchConstraints"]),
            conditions: Conditions::of(spec, param_kind.is_some()),
            param_kind,
            variables,
            ignores_failure: meta::text(spec, "failurePolicy") == "Ignore",
            rules: rules(spec, &names),
        }
    }
}

struct Binding {
    name: String,
    policy: String,
    scope: Scope,
    param_ref: Value,
    /// Deny, Warn, Audit.
    actions: Vec<String>,
}

fn bindings(objects: &[Value]) -> Vec<Binding> {
    let binding = |object: &Value| Binding {
        name: meta::name(object).into(),
        policy: meta::text(object, "spec.policyName").into(),
        scope: Scope::of_resources(meta::get(object, "spec.matchResources")),
        param_ref: meta::get(object, "spec.paramRef").clone(),
        actions: meta::items(object, "spec.validationActions").iter().filter_map(|action| action.as_str().map(String::from)).collect(),
    };
    objects.iter().map(binding).collect()
}

pub struct Policies {
    validating: Derived<Vec<validating::ValidatingPolicy>>,
    validating_bindings: Derived<Vec<Binding>>,
    mutating: Derived<Vec<mutating::MutatingPolicy>>,
    mutating_bindings: Derived<Vec<Binding>>,
}

impl Default for Policies {
    fn default() -> Self {
        Self {
            validating: Derived::new("admissionregistration.k8s.io/validatingadmissionpolicies", validating::policies),
            validating_bindings: Derived::new("admissionregistration.k8s.io/validatingadmissionpolicybindings", bindings),
            mutating: Derived::new("admissionregistration.k8s.io/mutatingadmissionpolicies", mutating::policies),
            mutating_bindings: Derived::new("admissionregistration.k8s.io/mutatingadmissionpolicybindings", bindings),
        }
    }
}

impl Policies {
    pub async fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let (policies, bindings) = (self.validating.get(engine), self.validating_bindings.get(engine));
        if policies.is_empty() || bindings.is_empty() || is_exempt(attributes) {
            return Ok(());
        }
        validating::validate(engine, attributes, object, &policies, &bindings).await
    }

    pub async fn mutate(
        &self,
        engine: &Engine,
        attributes: &Attributes<'_>,
        object: Option<&mut Value>,
        rounds: &mut Rounds,
    ) -> Result<(), Status> {
        let (policies, bindings) = (self.mutating.get(engine), self.mutating_bindings.get(engine));
        let Some(object) = object else { return Ok(()) };
        if policies.is_empty() || bindings.is_empty() || is_exempt(attributes) {
            return Ok(());
        }
        mutating::mutate(engine, attributes, object, rounds, &policies, &bindings).await
    }
}

/// One policy to be evaluated for one binding and one parameter.
struct Invocation<'a, R> {
    policy: &'a Policy<R>,
    binding: &'a Binding,
    seen: Arc<outrigger_api::Resource>,
    param: Option<Value>,
}

/// What a policy, and maybe a binding of it, can't be evaluated for.
struct Misconfigured<'a, R> {
    policy: &'a Policy<R>,
    binding: Option<&'a Binding>,
    why: String,
}

/// All that is to be evaluated for a request. Of what can't be, only what fails closed is told.
async fn invocations<'a, R>(
    engine: &Engine,
    attributes: &Attributes<'_>,
    object: Option<&Value>,
    policies: &'a [Policy<R>],
    bindings: &'a [Binding],
) -> (Vec<Invocation<'a, R>>, Vec<Misconfigured<'a, R>>) {
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    for policy in policies {
        let seen = match policy.scope.find(engine, attributes, object) {
            Ok(Some(seen)) => seen,
            Ok(None) => continue,
            Err(status) => {
                errors.push(Misconfigured { policy, binding: None, why: format!("failed to configure policy: {}", status.message) });
                continue;
            }
        };
        for binding in bindings.iter().filter(|binding| binding.policy == policy.name) {
            let params = match binding.scope.find(engine, attributes, object) {
                Ok(Some(_)) => params::collect(engine, attributes, policy.param_kind.as_ref(), &binding.param_ref).await,
                Ok(None) => continue,
                Err(status) => Err(status.message),
            };
            match params {
                Ok(params) => found.extend(params.into_iter().map(|param| Invocation { policy, binding, seen: seen.clone(), param })),
                Err(why) => {
                    let why = format!("failed to configure binding: {why}");
                    errors.push(Misconfigured { policy, binding: Some(binding), why });
                }
            }
        }
    }
    errors.retain(|error| !error.policy.ignores_failure);
    (found, errors)
}

impl<R> Invocation<'_, R> {
    fn inputs(&self, engine: &Engine, attributes: &Attributes<'_>, view: &View, namespace: Option<&Value>) -> Inputs {
        let mut inputs = Inputs::new(engine, attributes, view, namespace);
        inputs.set_params(self.param.as_ref());
        inputs.set_variables(self.policy.variables.clone());
        inputs
    }
}

/// The request's namespace, which expressions may look at.
fn namespace(engine: &Engine, attributes: &Attributes<'_>) -> Result<Option<Value>, Status> {
    if attributes.namespace.is_empty() || attributes.resource.is("", "Namespace") {
        return Ok(None);
    }
    let found = lookup(engine, "", "namespaces", "", attributes.namespace);
    found.map(Some).ok_or_else(|| Status::not_found("", "namespaces", attributes.namespace))
}
