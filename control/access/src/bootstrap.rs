//! The roles and bindings that every cluster has from the start.

use serde_json::Value;

/// One object to create at start, and to bring back in line at later starts.
#[derive(Debug, Clone, PartialEq)]
pub struct BootstrapObject {
    /// `clusterroles`, `clusterrolebindings`, `roles` or `rolebindings`.
    pub resource: &'static str,
    /// Empty for cluster-scoped ones.
    pub namespace: String,
    pub name: String,
    /// The whole object, apiVersion and kind included.
    pub object: Value,
}

/// All of them, in an order in which they can be created.
pub fn objects() -> Vec<BootstrapObject> {
    todo!()
}

/// Adds to a stored object what it lacks of the bootstrap one (missing rules, subjects), unless its annotation
/// `rbac.authorization.kubernetes.io/autoupdate` is `false`. True if something was changed.
pub fn reconcile(stored: &mut Value, wanted: &BootstrapObject) -> bool {
    let _ = (stored, wanted);
    todo!()
}
