//! ValidatingAdmissionPolicy: expressions that must be true of a request.

use std::collections::BTreeMap;

use outrigger_api::cel::language::{Context, Type, Value as Cel};
use outrigger_api::{Status, meta};
use serde_json::{Value, json};

use super::{Binding, Invocation, Policy, invocations, namespace};
use crate::admission::Attributes;
use crate::admission::expressions::{Compiled, evaluate};
use crate::admission::matching::View;
use crate::engine::Engine;

/// Longer messages of messageExpressions are not told.
const LONGEST_MESSAGE: usize = 5 * 1024;

pub struct Rules {
    validations: Vec<Validation>,
    annotations: Vec<(String, Compiled)>,
}

struct Validation {
    source: String,
    expression: Compiled,
    message: String,
    made_message: Option<Compiled>,
    reason: String,
}

pub type ValidatingPolicy = Policy<Rules>;

pub fn policies(objects: &[Value]) -> Vec<ValidatingPolicy> {
    let policy = |object: &Value| {
        Policy::new(object, false, |spec, names| {
            let validation = |item: &Value| Validation {
                source: meta::text(item, "expression").trim().into(),
                expression: names.compile(meta::text(item, "expression"), &[Type::Bool]),
                message: meta::text(item, "message").trim().into(),
                made_message: item["messageExpression"].as_str().map(|source| names.compile(source, &[Type::String])),
                reason: meta::text(item, "reason").into(),
            };
            let annotation = |item: &Value| {
                let compiled = names.compile(meta::text(item, "valueExpression"), &[Type::String, Type::Null]);
                (meta::text(item, "key").to_string(), compiled)
            };
            Rules {
                validations: meta::items(spec, "validations").iter().map(validation).collect(),
                annotations: meta::items(spec, "auditAnnotations").iter().map(annotation).collect(),
            }
        })
    };
    objects.iter().map(policy).collect()
}

/// Why a request does not pass a policy.
struct Denial {
    policy: String,
    binding: Option<String>,
    message: String,
    reason: String,
}

pub async fn validate(
    engine: &Engine,
    attributes: &Attributes<'_>,
    object: Option<&Value>,
    policies: &[ValidatingPolicy],
    bindings: &[Binding],
) -> Result<(), Status> {
    let (invocations, errors) = invocations(engine, attributes, object, policies, bindings).await;
    let mut denials: Vec<Denial> = errors
        .into_iter()
        .map(|error| Denial {
            policy: error.policy.name.clone(),
            binding: error.binding.map(|binding| binding.name.clone()),
            message: error.why,
            reason: String::new(),
        })
        .collect();
    if !invocations.is_empty() {
        let namespace = namespace(engine, attributes)?;
        for invocation in &invocations {
            let view = View::new(engine, attributes, invocation.seen.clone(), object).await?;
            invocation.run(engine, attributes, &view, namespace.as_ref(), &mut denials);
        }
    }
    denials.into_iter().next().map_or(Ok(()), |denial| Err(refusal(attributes, &denial)))
}

impl Invocation<'_, Rules> {
    fn run(&self, engine: &Engine, attributes: &Attributes<'_>, view: &View, namespace: Option<&Value>, denials: &mut Vec<Denial>) {
        let inputs = self.inputs(engine, attributes, view, namespace);
        match self.policy.conditions.hold(&inputs) {
            Ok(true) => {}
            Ok(false) => return,
            Err(why) => return self.act(attributes, why, "", denials),
        }
        let context = inputs.context();
        for validation in &self.policy.rules.validations {
            match evaluate(&validation.expression, &context) {
                Ok(Cel::Bool(true)) => {}
                Ok(_) => self.act(attributes, validation.told(&context), &validation.reason, denials),
                Err(_) if self.policy.ignores_failure => {}
                Err(why) => self.act(attributes, format!("expression '{}' resulted in error: {why}", validation.source), "", denials),
            }
        }
        self.annotate(&inputs.context(), denials);
    }

    /// What the binding wants done about a failed validation.
    fn act(&self, attributes: &Attributes<'_>, message: String, reason: &str, denials: &mut Vec<Denial>) {
        let (policy, binding) = (&self.policy.name, &self.binding.name);
        for action in &self.binding.actions {
            match action.as_str() {
                "Deny" => denials.push(self.denial(message.clone(), reason)),
                "Warn" => attributes
                    .call
                    .warn(format!("Validation failed for ValidatingAdmissionPolicy '{policy}' with binding '{binding}': {message}")),
                _ => tracing::info!(policy, binding, message, "a request failed the validation of a policy"),
            }
        }
    }

    fn denial(&self, message: String, reason: &str) -> Denial {
        Denial { policy: self.policy.name.clone(), binding: Some(self.binding.name.clone()), message, reason: reason.into() }
    }

    /// Audit annotations go to the log; one that can't be made refuses the request, if the policy fails closed.
    fn annotate(&self, context: &Context<'_>, denials: &mut Vec<Denial>) {
        let mut annotations = BTreeMap::new();
        for (key, expression) in &self.policy.rules.annotations {
            match evaluate(expression, context) {
                Ok(Cel::String(value)) if !value.trim().is_empty() => drop(annotations.insert(key, value.trim().to_string())),
                Ok(_) => {}
                Err(_) if self.policy.ignores_failure => {}
                Err(why) => denials.push(self.denial(why, "")),
            }
        }
        if !annotations.is_empty() {
            tracing::info!(policy = self.policy.name, binding = self.binding.name, ?annotations, "audit annotations of a policy");
        }
    }
}

impl Validation {
    /// The message of a validation that failed: made by its expression, given, or the expression itself.
    fn told(&self, context: &Context<'_>) -> String {
        let made = self.made_message.as_ref().and_then(|expression| evaluate(expression, context).ok());
        let made = made.as_ref().and_then(Cel::as_str).map(str::trim).unwrap_or_default();
        if !made.is_empty() && made.len() <= LONGEST_MESSAGE && !made.contains('\n') {
            return made.into();
        }
        if self.message.is_empty() { format!("failed expression: {}", self.source) } else { self.message.clone() }
    }
}

fn refusal(attributes: &Attributes<'_>, denial: &Denial) -> Status {
    let bound = denial.binding.as_ref().map(|binding| format!(" with binding '{binding}'")).unwrap_or_default();
    let message = format!("ValidatingAdmissionPolicy '{}'{bound} denied request: {}", denial.policy, denial.message);
    let mut status = attributes.forbidden(&message);
    let (reason, code) = match denial.reason.as_str() {
        "Forbidden" => ("Forbidden", 403),
        "Unauthorized" => ("Unauthorized", 401),
        "RequestEntityTooLarge" => ("RequestEntityTooLarge", 413),
        _ => ("Invalid", 422),
    };
    status.reason = reason.into();
    status.code = code;
    let details = status.details.get_or_insert_with(|| json!({}));
    details["causes"] = json!([{"message": message}]);
    status
}
