//! `metav1.Status`, with a builder per reason and upstream's texts.
use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::field_error::{FieldError, aggregate};

/// An answer that is not the object asked for: an error, or the success of a deletion.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    /// HTTP code.
    pub code: u16,
    /// CamelCase reason; empty for successes.
    pub reason: Cow<'static, str>,
    pub message: String,
    /// `details`: name, group, kind, uid, causes, retryAfterSeconds; and `continue`, which goes to the Status' own metadata.
    pub details: Option<Value>,
}

/// `group` and `resource` name the thing: messages say `pods "x"` or `deployments.apps "x"`.
fn qualified(group: &str, resource: &str) -> String {
    if group.is_empty() { resource.to_string() } else { format!("{resource}.{group}") }
}

fn details(group: &str, kind: &str, name: &str) -> Map<String, Value> {
    let mut details = Map::new();
    for (key, value) in [("name", name), ("group", group), ("kind", kind)] {
        if !value.is_empty() {
            details.insert(key.into(), value.into());
        }
    }
    details
}

fn filled(details: Map<String, Value>) -> Option<Value> {
    (!details.is_empty()).then_some(Value::Object(details))
}

impl Status {
    pub fn new(code: u16, reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Status {
        Status { code, reason: reason.into(), message: message.into(), details: None }
    }

    /// Replaces `details`.
    pub fn with_details(mut self, details: Value) -> Status {
        self.details = Some(details);
        self
    }

    /// Adds `details.retryAfterSeconds`; the HTTP answer carries Retry-After with it.
    pub fn with_retry_after(mut self, seconds: u32) -> Status {
        let details = self.details.get_or_insert_with(|| json!({}));
        details["retryAfterSeconds"] = seconds.into();
        self
    }

    /// Adds one cause.
    pub fn with_cause(mut self, reason: &str, message: &str, field: &str) -> Status {
        let details = self.details.get_or_insert_with(|| json!({}));
        let mut cause = json!({"reason": reason, "message": message});
        if !field.is_empty() {
            cause["field"] = field.into();
        }
        match details["causes"].as_array_mut() {
            Some(causes) => causes.push(cause),
            None => details["causes"] = json!([cause]),
        }
        self
    }

    /// Seconds to wait, when the status carries them.
    pub fn retry_after(&self) -> Option<u64> {
        self.details.as_ref()?.get("retryAfterSeconds")?.as_u64()
    }

    pub fn is_success(&self) -> bool {
        self.code < 400
    }

    /// The object as it goes over the wire.
    pub fn to_value(&self) -> Value {
        let outcome = if self.is_success() { "Success" } else { "Failure" };
        let mut value = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": outcome});
        if !self.message.is_empty() {
            value["message"] = self.message.clone().into();
        }
        if !self.reason.is_empty() {
            value["reason"] = self.reason.as_ref().into();
        }
        if let Some(details) = &self.details {
            value["details"] = details.clone();
            if let Some(token) = crate::meta::remove(&mut value, "details.continue") {
                value["metadata"]["continue"] = token;
            }
        }
        if !self.is_success() {
            value["code"] = self.code.into();
        }
        value
    }

    /// What DELETE answers once the object is gone.
    pub fn deleted(group: &str, resource: &str, name: &str, uid: &str) -> Status {
        let mut details = details(group, resource, name);
        details.insert("uid".into(), uid.into());
        Status { code: 200, reason: "".into(), message: String::new(), details: filled(details) }
    }

    /// 201 or 200 without a body of its own, as bindings and evictions answer.
    pub fn success(code: u16) -> Status {
        Status { code, reason: "".into(), message: String::new(), details: None }
    }

    pub fn not_found(group: &str, resource: &str, name: &str) -> Status {
        let message = format!("{} \"{name}\" not found", qualified(group, resource));
        Status { code: 404, reason: "NotFound".into(), message, details: filled(details(group, resource, name)) }
    }

    /// A path nobody serves.
    pub fn path_not_found() -> Status {
        Status {
            code: 404,
            reason: "NotFound".into(),
            message: "the server could not find the requested resource".into(),
            details: Some(json!({})),
        }
    }

    pub fn already_exists(group: &str, resource: &str, name: &str) -> Status {
        let message = format!("{} \"{name}\" already exists", qualified(group, resource));
        Status { code: 409, reason: "AlreadyExists".into(), message, details: filled(details(group, resource, name)) }
    }

    pub fn conflict(group: &str, resource: &str, name: &str, why: &str) -> Status {
        let message = format!("Operation cannot be fulfilled on {} \"{name}\": {why}", qualified(group, resource));
        Status { code: 409, reason: "Conflict".into(), message, details: filled(details(group, resource, name)) }
    }

    /// The conflict of optimistic locking.
    pub fn modified(group: &str, resource: &str, name: &str) -> Status {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Status::conflict(group, resource, name, why)
    }

    /// 422 with the findings as causes. `kind` is the kind, not the resource.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Status {
        let mut message = format!("{} \"{name}\" is invalid", qualified(group, kind));
        if !errors.is_empty() {
            message = format!("{message}: {}", aggregate(errors));
        }
        let mut details = details(group, kind, name);
        details.insert("causes".into(), errors.iter().map(FieldError::cause).collect());
        Status { code: 422, reason: "Invalid".into(), message, details: Some(Value::Object(details)) }
    }

    pub fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Status {
        let target = qualified(group, resource);
        let message = match (target.is_empty(), name.is_empty()) {
            (true, _) => format!("forbidden: {why}"),
            (false, true) => format!("{target} is forbidden: {why}"),
            (false, false) => format!("{target} \"{name}\" is forbidden: {why}"),
        };
        Status { code: 403, reason: "Forbidden".into(), message, details: Some(Value::Object(details(group, resource, name))) }
    }

    pub fn unauthorized() -> Status {
        Status::new(401, "Unauthorized", "Unauthorized")
    }

    pub fn bad_request(message: impl Into<String>) -> Status {
        Status::new(400, "BadRequest", message)
    }

    pub fn method_not_supported(group: &str, resource: &str, action: &str) -> Status {
        let message = format!("{action} is not supported on resources of kind \"{}\"", qualified(group, resource));
        Status { code: 405, reason: "MethodNotAllowed".into(), message, details: filled(details(group, resource, "")) }
    }

    /// A verb that the path has not.
    pub fn method_not_allowed() -> Status {
        Status::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource").with_details(json!({}))
    }

    /// The resourceVersion of a list or watch is compacted away.
    pub fn expired(message: impl Into<String>) -> Status {
        Status::new(410, "Expired", message)
    }

    /// The continue token is too old; `token` continues from now, inconsistently.
    pub fn expired_continue(token: &str) -> Status {
        let message = "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.";
        Status::expired(message).with_details(json!({"continue": token}))
    }

    pub fn too_old_resource_version(requested: u64, oldest: u64) -> Status {
        Status::expired(format!("too old resource version: {requested} ({oldest})"))
    }

    /// The asked resourceVersion is in the future.
    pub fn too_large_resource_version(requested: u64, current: u64) -> Status {
        Status::new(504, "Timeout", format!("Too large resource version: {requested}, current: {current}")).with_details(
            json!({"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}], "retryAfterSeconds": 1}),
        )
    }

    pub fn timeout(message: impl Into<String>) -> Status {
        Status::new(504, "Timeout", message)
    }

    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Status {
        Status::new(429, "TooManyRequests", message).with_retry_after(retry_after_seconds)
    }

    pub fn unsupported_media_type(received: &str, supported: &[&str]) -> Status {
        let message = format!("the body of the request was in an unknown format - accepted media types include: {}", supported.join(", "));
        let _ = received;
        Status::new(415, "UnsupportedMediaType", message)
    }

    pub fn not_acceptable(supported: &[&str]) -> Status {
        let message = format!("only the following media types are accepted: {}", supported.join(", "));
        Status::new(406, "NotAcceptable", message)
    }

    pub fn request_too_large(message: impl Into<String>) -> Status {
        Status::new(413, "RequestEntityTooLarge", message)
    }

    pub fn internal(error: impl std::fmt::Display) -> Status {
        let text = error.to_string();
        Status::new(500, "InternalError", format!("Internal error occurred: {text}")).with_details(json!({"causes": [{"message": text}]}))
    }

    pub fn service_unavailable(message: impl Into<String>) -> Status {
        Status::new(503, "ServiceUnavailable", message)
    }

    pub fn generate_name_conflict(group: &str, resource: &str, name: &str) -> Status {
        let message = format!(
            "{} \"{name}\" already exists, the server was not able to generate a unique name for the object",
            qualified(group, resource)
        );
        Status { code: 409, reason: "AlreadyExists".into(), message, details: filled(details(group, resource, name)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_read_as_upstream_writes_them() {
        for (status, code, message) in [
            (Status::not_found("", "pods", "x"), 404, "pods \"x\" not found"),
            (Status::already_exists("apps", "deployments", "x"), 409, "deployments.apps \"x\" already exists"),
            (
                Status::invalid("", "Pod", "x", &[FieldError::required("spec.containers", "")]),
                422,
                "Pod \"x\" is invalid: spec.containers: Required value",
            ),
            (Status::forbidden("", "pods", "", "no"), 403, "pods is forbidden: no"),
        ] {
            assert_eq!((status.code, status.message.as_str()), (code, message));
            assert_eq!(status.to_value()["code"], code);
        }
        let invalid = Status::invalid("apps", "Deployment", "x", &[FieldError::required("a", "")]).to_value();
        assert_eq!(
            invalid["details"],
            json!({"name": "x", "group": "apps", "kind": "Deployment", "causes": [{"reason": "FieldValueRequired", "message": "Required value", "field": "a"}]})
        );
    }
}
