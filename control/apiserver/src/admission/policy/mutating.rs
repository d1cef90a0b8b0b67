//! MutatingAdmissionPolicy: patches in CEL.

use outrigger_api::cel::language::{Context, Value as Cel};
use outrigger_api::cel::{patch_list, patch_object};
use outrigger_api::{Status, apply, meta, patch};
use serde_json::{Value, json};

use super::{Binding, Invocation, Policy, invocations, namespace};
use crate::admission::Attributes;
use crate::admission::expressions::{Compiled, evaluate};
use crate::admission::matching::{View, refit};
use crate::admission::webhook::Rounds;
use crate::engine::Engine;
use crate::registry::versions::between;

pub struct Rules {
    mutations: Vec<Mutation>,
    reinvocable: bool,
}

enum Mutation {
    Apply(Compiled),
    Patch(Compiled),
}

pub type MutatingPolicy = Policy<Rules>;

pub fn policies(objects: &[Value]) -> Vec<MutatingPolicy> {
    let policy = |object: &Value| {
        Policy::new(object, true, |spec, names| {
            let mutation = |item: &Value| match meta::text(item, "patchType") {
                "JSONPatch" => Mutation::Patch(names.compile(meta::text(item, "jsonPatch.expression"), &[patch_list()])),
                _ => Mutation::Apply(names.compile(meta::text(item, "applyConfiguration.expression"), &[patch_object()])),
            };
            Rules {
                mutations: meta::items(spec, "mutations").iter().map(mutation).collect(),
                reinvocable: meta::text(spec, "reinvocationPolicy") == "IfNeeded",
            }
        })
    };
    objects.iter().map(policy).collect()
}

pub async fn mutate(
    engine: &Engine,
    attributes: &Attributes<'_>,
    object: &mut Value,
    rounds: &mut Rounds,
    policies: &[MutatingPolicy],
    bindings: &[Binding],
) -> Result<(), Status> {
    let (invocations, errors) = invocations(engine, attributes, Some(object), policies, bindings).await;
    let told = |policy: &str, binding: Option<&str>, why: &str| match binding {
        Some(binding) => format!("policy '{policy}' with binding '{binding}' denied request: {why}"),
        None => format!("policy {policy:?} denied request: {why}"),
    };
    let mut denials: Vec<(String, bool)> = errors
        .iter()
        .map(|error| (told(&error.policy.name, error.binding.map(|binding| binding.name.as_str()), &error.why), false))
        .collect();
    if !invocations.is_empty() {
        let namespace = namespace(engine, attributes)?;
        rounds.begin(Some(object));
        for invocation in &invocations {
            let outcome = invocation.run(engine, attributes, object, namespace.as_ref(), rounds).await?;
            if let Err(why) = outcome.or_else(|why| if invocation.policy.ignores_failure { Ok(()) } else { Err(why) }) {
                denials.push((told(&invocation.policy.name, Some(&invocation.binding.name), &why), true));
            }
        }
        rounds.end(Some(object));
    }
    if denials.is_empty() { Ok(()) } else { Err(refusal(attributes, denials)) }
}

impl Invocation<'_, Rules> {
    /// Applies the policy's mutations; the inner error is the policy's to fail by.
    async fn run(
        &self,
        engine: &Engine,
        attributes: &Attributes<'_>,
        object: &mut Value,
        namespace: Option<&Value>,
        rounds: &mut Rounds,
    ) -> Result<Result<(), String>, Status> {
        let mut view = View::new(engine, attributes, self.seen.clone(), Some(object)).await?;
        match self.policy.conditions.hold(&self.inputs(engine, attributes, &view, namespace)) {
            Ok(true) => {}
            Ok(false) => return Ok(Ok(())),
            Err(why) => return Ok(Err(why)),
        }
        let param =
            self.param.as_ref().map(|param| (meta::namespace(param).to_string(), meta::name(param).to_string())).unwrap_or_default();
        let id = format!("{}/{}/{}/{}", self.policy.name, self.binding.name, param.0, param.1);
        if !rounds.asks(&id) {
            return Ok(Ok(()));
        }
        let before = view.object.clone();
        for mutation in &self.policy.rules.mutations {
            let inputs = self.inputs(engine, attributes, &view, namespace);
            let Some(current) = &view.object else { break };
            match self.mutated(mutation, &inputs.context(), current) {
                Ok(mut after) => {
                    refit(attributes, &self.seen, &mut after)?;
                    view.object = Some(after);
                }
                Err(why) => return Ok(Err(why)),
            }
        }
        let changed = view.object != before;
        if let Some(after) = view.object.filter(|_| changed) {
            *object = if attributes.kind_in(&self.seen) == attributes.kind_in(attributes.resource) {
                after
            } else {
                between(engine, &self.seen, attributes.resource, after).await?
            };
        }
        rounds.asked(id, changed, self.policy.rules.reinvocable);
        Ok(Ok(()))
    }

    fn mutated(&self, mutation: &Mutation, context: &Context<'_>, current: &Value) -> Result<Value, String> {
        match mutation {
            Mutation::Apply(expression) => {
                let unfit = || "unsupported return type from ApplyConfiguration expression".to_string();
                let mut config = evaluate(expression, context)?.to_json().filter(Value::is_object).ok_or_else(unfit)?;
                meta::set_type(&mut config, meta::api_version(current), meta::kind(current));
                apply::overlay(&self.seen, current, &config).map_err(|error| format!("error applying patch: {error}"))
            }
            Mutation::Patch(expression) => {
                let Cel::List(operations) = evaluate(expression, context)? else {
                    return Err("type mismatch: JSONPatchType.expression should evaluate to array".into());
                };
                let operations: Option<Vec<Value>> = operations.iter().map(Cel::to_json).collect();
                let operations = operations.ok_or("type mismatch: JSONPatch values must have a JSON form")?;
                let mut after = current.clone();
                match patch::json(&mut after, &operations.clone().into()) {
                    Ok(()) => Ok(after),
                    // A failed test means that the patch is not for this object.
                    Err(_) if operations.iter().any(|operation| operation["op"] == "test") && !tests_hold(current, &operations) => {
                        Ok(current.clone())
                    }
                    Err(status) => Err(format!("JSON Patch: {}", super::super::webhook::explained(status))),
                }
            }
        }
    }
}

/// Whether the operations up to the first failing one are none of them a failed test.
fn tests_hold(object: &Value, operations: &[Value]) -> bool {
    let mut object = object.clone();
    for operation in operations {
        if patch::json(&mut object, &json!([operation])).is_err() {
            return operation["op"] != "test";
        }
    }
    true
}

fn refusal(attributes: &Attributes<'_>, denials: Vec<(String, bool)>) -> Status {
    let mut status = attributes.forbidden("admission request denied by policy");
    if let Some((message, invalid)) = denials.first() {
        status.message = message.clone();
        if *invalid {
            status.reason = "Invalid".into();
        }
    }
    let details = status.details.get_or_insert_with(|| json!({}));
    details["causes"] = denials.into_iter().map(|(message, _)| json!({"message": message})).collect();
    status
}
