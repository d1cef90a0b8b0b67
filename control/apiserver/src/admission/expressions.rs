//! Expressions of webhooks and policies, evaluated over one request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use outrigger_access::{Authorizer as _, Union, UserInfo};
use outrigger_api::cel::language::{Bindings, Context, Error, Opaque, Program, Type, Value as Cel};
use outrigger_api::cel::{Authority, Authorizer, BUDGET, Check, Decision, MATCH_CONDITIONS_BUDGET, Scope};
use outrigger_api::{Resource, meta};
use serde_json::{Value, json};

use super::Attributes;
use super::matching::View;
use crate::engine::Engine;

/// An expression, or why it doesn't compile. That is known since it was written, unless it was stored by a server that knew more.
pub type Compiled = Result<Program, String>;

/// Match conditions: all must hold.
pub struct Conditions {
    expressions: Vec<Compiled>,
    /// A condition that can't be evaluated is taken for one that doesn't hold.
    ignores_failure: bool,
}

impl Conditions {
    /// Of the object that has `matchConditions` and `failurePolicy`.
    pub fn of(owner: &Value, params: bool) -> Self {
        let scope = Scope { params, ..Scope::default() };
        let compile = |condition: &Value| scope.compile(meta::text(condition, "expression").trim(), &[Type::Bool]);
        Self {
            expressions: meta::items(owner, "matchConditions").iter().map(compile).collect(),
            ignores_failure: meta::text(owner, "failurePolicy") == "Ignore",
        }
    }

    pub fn is_empty(&self) -> bool {
        self.expressions.is_empty()
    }

    /// One that is false outweighs errors of others.
    pub fn hold(&self, inputs: &Inputs) -> Result<bool, String> {
        let context = Context::new(&inputs.0, MATCH_CONDITIONS_BUDGET);
        let mut errors = Vec::new();
        for expression in &self.expressions {
            match evaluate(expression, &context) {
                Ok(Cel::Bool(false)) => return Ok(false),
                Ok(_) => {}
                Err(error) => errors.push(error),
            }
        }
        match errors.as_slice() {
            [] => Ok(true),
            _ if self.ignores_failure => Ok(false),
            [one] => Err(one.clone()),
            many => Err(format!("[{}]", many.join(", "))),
        }
    }
}

pub fn evaluate(expression: &Compiled, context: &Context<'_>) -> Result<Cel, String> {
    expression.as_ref().map_err(Clone::clone)?.eval(context).map_err(|error| error.message)
}

/// The values of an evaluation's variables.
pub struct Inputs(Bindings);

impl Inputs {
    pub fn new(engine: &Engine, attributes: &Attributes<'_>, view: &View, namespace: Option<&Value>) -> Self {
        let shown = |object: Option<&Value>| object.map_or(Cel::Null, Cel::from);
        let authority = Arc::new(Requester { user: attributes.call.user.clone(), authorizer: Union(engine.authorizer.0.clone()) });
        let bindings = [
            ("object", shown(view.object.as_ref())),
            ("oldObject", shown(view.old.as_ref())),
            ("request", Cel::from(&request(attributes, &view.seen))),
            ("namespaceObject", shown(namespace.map(shown_namespace).as_ref())),
            ("params", Cel::Null),
            ("authorizer", Authorizer::of_requester(authority.clone())),
            ("authorizer.requestResource", Authorizer::for_resource(authority, requested(attributes))),
        ];
        Self(bindings.into_iter().map(|(name, value)| (name.to_string(), value)).collect())
    }

    pub fn set_params(&mut self, params: Option<&Value>) {
        self.0.insert("params".into(), params.map_or(Cel::Null, Cel::from));
    }

    pub fn set_variables(&mut self, variables: Arc<Vec<(String, Compiled)>>) {
        self.0.insert("variables".into(), Cel::opaque(Variables { variables, known: Mutex::default() }));
    }

    pub fn context(&self) -> Context<'_> {
        Context::new(&self.0, BUDGET)
    }
}

/// The request as AdmissionReviews and expressions show it, in `seen`'s version.
pub fn request(attributes: &Attributes<'_>, seen: &Resource) -> Value {
    let kind = |resource: &Resource| {
        let kind = attributes.kind_in(resource);
        json!({"group": kind.group, "version": kind.version, "kind": kind.kind})
    };
    let plural = |resource: &Resource| json!({"group": resource.group, "version": resource.version, "resource": resource.plural});
    let mut request = json!({
        "kind": kind(seen),
        "resource": plural(seen),
        "requestKind": kind(attributes.resource),
        "requestResource": plural(attributes.resource),
        "operation": attributes.operation.name(),
        "userInfo": crate::registry::review::user_value(&attributes.call.user),
        "dryRun": attributes.dry_run,
        "options": attributes.options(),
    });
    for (key, value) in [
        ("subResource", attributes.subresource),
        ("requestSubResource", attributes.subresource),
        ("name", attributes.name),
        ("namespace", attributes.namespace),
    ] {
        if !value.is_empty() {
            request[key] = value.into();
        }
    }
    request
}

/// What of a Namespace expressions may see.
fn shown_namespace(namespace: &Value) -> Value {
    let mut shown = json!({"metadata": namespace["metadata"], "spec": namespace["spec"], "status": namespace["status"]});
    for field in ["managedFields", "ownerReferences", "selfLink"] {
        meta::remove(&mut shown["metadata"], field);
    }
    shown
}

fn requested(attributes: &Attributes<'_>) -> Check {
    Check {
        group: attributes.resource.group.to_string(),
        resource: attributes.resource.plural.to_string(),
        subresource: attributes.subresource.into(),
        namespace: attributes.namespace.into(),
        name: attributes.name.into(),
        ..Check::default()
    }
}

/// The cluster's authorizers, asked about the requester.
struct Requester {
    user: UserInfo,
    authorizer: Union,
}

impl Authority for Requester {
    fn decide(&self, check: &Check) -> Decision {
        let account = check.account.as_ref().map(|(namespace, name)| {
            let groups =
                ["system:serviceaccounts".to_string(), format!("system:serviceaccounts:{namespace}"), "system:authenticated".into()];
            UserInfo::new(outrigger_access::user::service_account_user(namespace, name), groups)
        });
        let user = account.as_ref().unwrap_or(&self.user);
        let requirements = crate::engine::field_requirements(&check.field_selector);
        let attributes = if check.path.is_empty() {
            outrigger_access::Attributes {
                namespace: &check.namespace,
                subresource: &check.subresource,
                name: &check.name,
                api_version: "*",
                field_selector: &requirements,
                ..outrigger_access::Attributes::resource(user, &check.verb, &check.group, &check.resource)
            }
        } else {
            outrigger_access::Attributes::path(user, &check.verb, &check.path)
        };
        let decision = self.authorizer.authorize(&attributes);
        Decision { allowed: decision.allowed(), reason: decision.reason().into() }
    }
}

/// `variables`: each is evaluated when it is first asked for.
#[derive(Debug)]
struct Variables {
    variables: Arc<Vec<(String, Compiled)>>,
    known: Mutex<HashMap<String, Result<Cel, Error>>>,
}

impl Opaque for Variables {
    fn type_name(&self) -> &'static str {
        "kubernetes.variables"
    }

    fn equals(&self, _other: &dyn Opaque) -> bool {
        false
    }

    fn field(&self, name: &str, context: &Context<'_>) -> Option<Result<Cel, Error>> {
        if let Some(known) = self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get(name) {
            return Some(known.clone());
        }
        let (_, compiled) = self.variables.iter().find(|(variable, _)| variable == name)?;
        let value = match compiled {
            Ok(program) => program.eval(context),
            Err(why) => Err(Error::new(why.clone())),
        };
        let value = value.map_err(|error| Error { message: format!("composited variable {name:?} fails to evaluate: {error}"), ..error });
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(name.into(), value.clone());
        Some(value)
    }
}
