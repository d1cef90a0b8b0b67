//! NamespaceLifecycle: nothing is created in a namespace that is missing or going; the system's own namespaces stay.

use outrigger_api::{Status, meta};
use serde_json::{Value, json};

use super::{Attributes, Operation, Plugin, lookup};
use crate::engine::Engine;

const IMMORTAL: &[&str] = &["default", "kube-system", "kube-public"];

pub struct NamespaceLifecycle;

impl Plugin for NamespaceLifecycle {
    fn mutate(&self, engine: &Engine, attributes: &Attributes<'_>, _object: &mut Value) -> Result<(), Status> {
        check(engine, attributes)
    }

    fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, _object: Option<&Value>) -> Result<(), Status> {
        if attributes.operation == Operation::Delete && attributes.is("", "Namespace") && IMMORTAL.contains(&attributes.name) {
            return Err(attributes.forbidden("this namespace may not be deleted"));
        }
        if attributes.operation == Operation::Create { check(engine, attributes) } else { Ok(()) }
    }
}

fn check(engine: &Engine, attributes: &Attributes<'_>) -> Result<(), Status> {
    if attributes.operation != Operation::Create || !attributes.resource.namespaced {
        return Ok(());
    }
    let namespace = attributes.namespace;
    let Some(object) = lookup(engine, "", "namespaces", "", namespace) else {
        return Err(Status::not_found("", "namespaces", namespace));
    };
    if meta::text(&object, "status.phase") != "Terminating" && !meta::is_deleting(&object) {
        return Ok(());
    }
    let mut status = attributes.forbidden(format!("unable to create new content in namespace {namespace} because it is being terminated"));
    let details = status.details.get_or_insert_with(|| json!({}));
    details["causes"] = json!([{
        "reason": "NamespaceTerminating",
        "message": format!("namespace {namespace} is being terminated"),
        "field": "metadata.namespace",
    }]);
    Err(status)
}
