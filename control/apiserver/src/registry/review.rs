//! Kinds that are answered and forgotten: reviews of access and tokens, and bindings.

use outrigger_access::{Authorizer, Decision, RulesReview, UserInfo};
use outrigger_api::{FieldError, Status, meta};
use serde_json::{Value, json};

use crate::admission::{Attributes, Operation};
use crate::call::Call;
use crate::engine::Engine;
use crate::registry::create::settle_namespace;
use crate::registry::subresource;
use crate::reply::Reply;

pub async fn create(engine: &Engine, call: &Call, mut object: Value) -> Result<Reply, Status> {
    settle_namespace(call, &mut object)?;
    if call.resource.kind != "Binding" {
        engine.fresh().await?;
        let name = meta::name(&object).to_string();
        let attributes = Attributes::new(call, Operation::Create, &name);
        engine.admission.admit(engine, &attributes, &mut object).await?;
    }
    let status = match call.resource.kind.as_ref() {
        "Binding" => {
            let pod = meta::name(&object).to_string();
            return subresource::bind(engine, call, &pod, object).await;
        }
        "SelfSubjectReview" => json!({"userInfo": user_value(&call.user)}),
        "SelfSubjectAccessReview" => access(engine, call, &call.user, &object)?,
        "SubjectAccessReview" => access(engine, call, &subject(call, &object)?, &object)?,
        "LocalSubjectAccessReview" => {
            let asked = meta::text(&object, "spec.resourceAttributes.namespace");
            if asked != call.namespace() {
                let error = FieldError::invalid("spec.resourceAttributes.namespace", asked, "must match metadata.namespace");
                return Err(call.invalid("", &[error]));
            }
            access(engine, call, &subject(call, &object)?, &object)?
        }
        "SelfSubjectRulesReview" => rules(engine, call, &object)?,
        "TokenReview" => token(engine, &object).await,
        _ => return Err(Status::method_not_allowed()),
    };
    object["status"] = status;
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.entry("creationTimestamp").or_insert(Value::Null);
    }
    Ok(Reply::Object(201, object))
}

pub fn user_value(user: &UserInfo) -> Value {
    serde_json::to_value(k8s_openapi::api::authentication::v1::UserInfo::from(user)).unwrap_or_default()
}

fn subject(call: &Call, object: &Value) -> Result<UserInfo, Status> {
    let strings =
        |value: &Value| -> Vec<String> { value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(String::from)).collect() };
    let mut user = UserInfo::new(meta::text(object, "spec.user"), strings(meta::get(object, "spec.groups")));
    if user.name.is_empty() && user.groups.is_empty() {
        let error = FieldError::invalid("spec.user", "", "at least one of user or group must be specified");
        return Err(call.invalid("", &[error]));
    }
    user.uid = meta::text(object, "spec.uid").into();
    user.extra = meta::entries(object, "spec.extra").map(|(key, values)| (key.to_lowercase(), strings(values))).collect();
    Ok(user)
}

/// Asks the authorizers for what a review's spec describes.
fn access(engine: &Engine, call: &Call, user: &UserInfo, object: &Value) -> Result<Value, Status> {
    let spec = &object["spec"];
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    if resource.is_object() == path.is_object() {
        let why = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
        return Err(call.invalid("", &[FieldError::invalid("spec.resourceAttributes", resource.clone(), why)]));
    }
    let text = |value: &'static str| meta::text(resource, value);
    let decision = if resource.is_object() {
        let mut attributes = outrigger_access::Attributes::resource(user, text("verb"), text("group"), text("resource"));
        attributes.namespace = text("namespace");
        attributes.api_version = text("version");
        attributes.subresource = text("subresource");
        attributes.name = text("name");
        engine.authorizer.authorize(&attributes)
    } else {
        engine.authorizer.authorize(&outrigger_access::Attributes::path(user, meta::text(path, "verb"), meta::text(path, "path")))
    };
    let mut status = json!({"allowed": decision.allowed()});
    if matches!(decision, Decision::Deny(_)) {
        status["denied"] = true.into();
    }
    if !decision.reason().is_empty() {
        status["reason"] = decision.reason().into();
    }
    Ok(status)
}

fn rules(engine: &Engine, call: &Call, object: &Value) -> Result<Value, Status> {
    let namespace = meta::text(object, "spec.namespace");
    if namespace.is_empty() {
        return Err(Status::bad_request("no namespace on request"));
    }
    let mut review = RulesReview::default();
    engine.authorizer.rules(&call.user, namespace, &mut review);
    let resources: Vec<Value> = review
        .resources
        .iter()
        .map(|rule| {
            let mut value = json!({"verbs": rule.verbs, "apiGroups": rule.api_groups, "resources": rule.resources});
            if !rule.resource_names.is_empty() {
                value["resourceNames"] = json!(rule.resource_names);
            }
            value
        })
        .collect();
    let paths: Vec<Value> = review.paths.iter().map(|(verbs, paths)| json!({"verbs": verbs, "nonResourceURLs": paths})).collect();
    let mut status = json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": review.incomplete});
    if !review.error.is_empty() {
        status["evaluationError"] = review.error.into();
    }
    Ok(status)
}

async fn token(engine: &Engine, object: &Value) -> Value {
    let audiences: Vec<String> = meta::items(object, "spec.audiences").iter().filter_map(|v| v.as_str().map(String::from)).collect();
    match engine.authenticator.authenticate_token(meta::text(object, "spec.token"), &audiences).await {
        Ok(known) => {
            let mut status = json!({"authenticated": true, "user": user_value(&known.user)});
            if !known.audiences.is_empty() {
                status["audiences"] = json!(known.audiences);
            }
            status
        }
        Err(error) => json!({"authenticated": false, "user": {}, "error": error.to_string()}),
    }
}
