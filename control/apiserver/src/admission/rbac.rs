//! RBAC's own guard: nobody grants what he does not have.

use k8s_openapi::api::rbac::v1::{PolicyRule, RoleRef};
use outrigger_access::Attributes as Access;
use outrigger_api::{Status, meta};
use serde_json::Value;

use super::{Attributes, Operation, Plugin};
use crate::engine::Engine;

pub struct Escalation;

impl Plugin for Escalation {
    fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let Some(object) = object else { return Ok(()) };
        if attributes.resource.group != "rbac.authorization.k8s.io" || attributes.operation == Operation::Delete {
            return Ok(());
        }
        match attributes.resource.kind.as_ref() {
            "Role" | "ClusterRole" => role(engine, attributes, object),
            "RoleBinding" | "ClusterRoleBinding" => binding(engine, attributes, object),
            _ => Ok(()),
        }
    }
}

fn allowed(engine: &Engine, attributes: &Attributes<'_>, verb: &str, resource: &str, namespace: &str, name: &str) -> bool {
    let wanted = Access { namespace, name, ..Access::resource(&attributes.call.user, verb, "rbac.authorization.k8s.io", resource) };
    engine.permit(&wanted).is_ok()
}

fn role(engine: &Engine, attributes: &Attributes<'_>, object: &Value) -> Result<(), Status> {
    let unchanged = |field: &str| attributes.old.is_some_and(|old| old.get(field) == object.get(field));
    if unchanged("rules") && unchanged("aggregationRule") {
        return Ok(());
    }
    if allowed(engine, attributes, "escalate", &attributes.resource.plural, attributes.namespace, attributes.name) {
        return Ok(());
    }
    let mut rules: Vec<PolicyRule> = serde_json::from_value(object["rules"].clone()).unwrap_or_default();
    if !object["aggregationRule"].is_null() {
        // Who may aggregate could collect any rule.
        rules.push(everything());
    }
    let namespace = if attributes.resource.namespaced { attributes.namespace } else { "" };
    engine.rbac.confirm_no_escalation(&attributes.call.user, namespace, &rules).map_err(|why| attributes.forbidden(why))
}

fn everything() -> PolicyRule {
    let all = || Some(vec!["*".to_string()]);
    PolicyRule { api_groups: all(), resources: all(), verbs: vec!["*".into()], ..Default::default() }
}

fn binding(engine: &Engine, attributes: &Attributes<'_>, object: &Value) -> Result<(), Status> {
    let unchanged = |field: &str| attributes.old.is_some_and(|old| old.get(field) == object.get(field));
    if unchanged("roleRef") && unchanged("subjects") {
        return Ok(());
    }
    let namespace = if attributes.resource.namespaced { attributes.namespace } else { "" };
    let plural = if meta::text(object, "roleRef.kind") == "Role" { "roles" } else { "clusterroles" };
    if allowed(engine, attributes, "bind", plural, namespace, meta::text(object, "roleRef.name")) {
        return Ok(());
    }
    let Ok(role_ref) = serde_json::from_value::<RoleRef>(object["roleRef"].clone()) else { return Ok(()) };
    let rules = engine.rbac.role_rules(&role_ref, namespace).map_err(|why| {
        let mut status = Status::not_found("rbac.authorization.k8s.io", plural, &role_ref.name);
        status.message = why;
        status
    })?;
    engine.rbac.confirm_no_escalation(&attributes.call.user, namespace, &rules).map_err(|why| attributes.forbidden(why))
}
