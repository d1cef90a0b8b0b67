//! RBAC: an index of roles and bindings, and the decisions made from it.

use crate::attributes::{Attributes, Authorizer, Decision, RulesReview};
use crate::user::UserInfo;
use k8s_openapi::api::rbac::v1::{PolicyRule, RoleRef};
use serde_json::Value;

#[derive(Debug, thiserror::Error)]
#[error("{resource}: {reason}")]
pub struct RbacError {
    pub resource: String,
    pub reason: String,
}

/// Roles and bindings in memory, kept up to date by the API server's watch of rbac.authorization.k8s.io.
#[derive(Default)]
pub struct RbacIndex {
    _p: (),
}

impl RbacIndex {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces an object of `resource`: `roles`, `rolebindings`, `clusterroles`, `clusterrolebindings`.
    pub fn apply(&self, resource: &str, json: &[u8]) -> Result<(), RbacError> {
        let _ = (resource, json);
        todo!()
    }

    pub fn delete(&self, resource: &str, namespace: &str, name: &str) {
        let _ = (resource, namespace, name);
        todo!()
    }

    /// All rules that `user` holds in `namespace` (empty: cluster-wide only).
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> Vec<PolicyRule> {
        let _ = (user, namespace);
        todo!()
    }

    /// Err with upstream's text if `user` doesn't hold all of `rules` in `namespace` (empty: cluster-wide). The caller first asks the
    /// authorizer for verb `escalate` on the role, and lets it pass if allowed.
    pub fn confirm_no_escalation(&self, user: &UserInfo, namespace: &str, rules: &[PolicyRule]) -> Result<(), String> {
        let _ = (user, namespace, rules);
        todo!()
    }

    /// The rules behind a binding's roleRef; Err if the role doesn't exist.
    pub fn role_rules(&self, role_ref: &RoleRef, binding_namespace: &str) -> Result<Vec<PolicyRule>, String> {
        let _ = (role_ref, binding_namespace);
        todo!()
    }

    /// For an aggregated ClusterRole (`aggregationRule` set): its rules as they should be, from the labels of the others. `None` if `role` isn't aggregated.
    pub fn aggregated_rules(&self, role: &Value) -> Option<Vec<PolicyRule>> {
        let _ = role;
        todo!()
    }
}

impl Authorizer for RbacIndex {
    fn authorize(&self, attributes: &Attributes<'_>) -> Decision {
        let _ = attributes;
        todo!()
    }

    fn rules(&self, user: &UserInfo, namespace: &str, review: &mut RulesReview) {
        let _ = (user, namespace, review);
        todo!()
    }
}

/// Whether `owner`'s rules allow everything that `wanted` does; what is left over otherwise.
pub fn covers(owner: &[PolicyRule], wanted: &[PolicyRule]) -> Result<(), Vec<PolicyRule>> {
    let _ = (owner, wanted);
    todo!()
}
