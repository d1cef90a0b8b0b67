//! The Node authorizer: a kubelet sees what the pods on its node refer to, and nothing else.

mod graph;
mod references;

use std::sync::Arc;

use k8s_openapi::api::rbac::v1::PolicyRule;

use crate::attributes::{Attributes, Authorizer, Decision, RulesReview};
use crate::rules::rules_allow;
use crate::user::{GROUP_NODES, NODE_USER_PREFIX, UserInfo};
use graph::Kind;
pub use graph::NodeGraph;

const LEASE_NAMESPACE: &str = "kube-node-lease";

/// Allows by the graph, and by the fixed rules of the ClusterRole `system:node` for what isn't in it.
pub struct NodeAuthorizer {
    graph: Arc<NodeGraph>,
    rules: Vec<PolicyRule>,
}

fn allow() -> Decision {
    Decision::Allow(String::new())
}

fn no(reason: impl Into<String>) -> Decision {
    Decision::NoOpinion(reason.into())
}

impl NodeAuthorizer {
    pub fn new(graph: Arc<NodeGraph>) -> Self {
        Self { graph, rules: crate::bootstrap::cluster_role_rules("system:node") }
    }

    fn resource(&self, node: &str, attributes: &Attributes<'_>) -> Decision {
        match (attributes.api_group, attributes.resource) {
            ("", "secrets") => self.read_namespaced(node, Kind::Secret, attributes),
            ("", "configmaps") => self.read_namespaced(node, Kind::ConfigMap, attributes),
            ("", "persistentvolumeclaims") if attributes.subresource == "status" => match attributes.verb {
                "update" | "patch" => self.related(node, Kind::Claim, attributes),
                _ => no("can only get/update/patch this type"),
            },
            ("", "persistentvolumeclaims") => self.get(node, Kind::Claim, attributes),
            ("", "persistentvolumes") => self.get(node, Kind::Volume, attributes),
            ("resource.k8s.io", "resourceclaims") => self.get(node, Kind::ResourceClaim, attributes),
            ("storage.k8s.io", "volumeattachments") => self.get(node, Kind::Attachment, attributes),
            ("", "serviceaccounts") => self.service_account(node, attributes),
            ("coordination.k8s.io", "leases") => lease(node, attributes),
            ("storage.k8s.io", "csinodes") => csi_node(node, attributes),
            ("resource.k8s.io", "resourceslices") => self.resource_slice(node, attributes),
            ("", "nodes") => own_node(node, attributes),
            ("", "pods") => self.pod(node, attributes),
            // Kubernetes v1.35 has PodCertificateRequest off.
            ("certificates.k8s.io", "podcertificaterequests") => no(""),
            _ => self.fixed(attributes),
        }
    }

    fn fixed(&self, attributes: &Attributes<'_>) -> Decision {
        if rules_allow(attributes, &self.rules) { allow() } else { no("") }
    }

    fn related(&self, node: &str, kind: Kind, attributes: &Attributes<'_>) -> Decision {
        if attributes.name.is_empty() {
            return no("No Object name found");
        }
        if self.graph.reaches(kind, attributes.namespace, attributes.name, node) {
            return allow();
        }
        no(format!("no relationship found between node '{node}' and this object"))
    }

    fn get(&self, node: &str, kind: Kind, attributes: &Attributes<'_>) -> Decision {
        if attributes.verb != "get" {
            return no("can only get individual resources of this type");
        }
        if !attributes.subresource.is_empty() {
            return no("cannot get subresource");
        }
        self.related(node, kind, attributes)
    }

    fn read_namespaced(&self, node: &str, kind: Kind, attributes: &Attributes<'_>) -> Decision {
        if !attributes.is_read_only() {
            return no("can only read resources of this type");
        }
        if !attributes.subresource.is_empty() {
            return no("cannot read subresource");
        }
        if attributes.namespace.is_empty() {
            return no("can only read namespaced object of this type");
        }
        self.related(node, kind, attributes)
    }

    fn service_account(&self, node: &str, attributes: &Attributes<'_>) -> Decision {
        if attributes.verb == "get" && attributes.subresource.is_empty() {
            return self.read_namespaced(node, Kind::ServiceAccount, attributes);
        }
        if attributes.verb != "create" || attributes.name.is_empty() {
            return no("can only create tokens for individual service accounts");
        }
        if attributes.subresource != "token" {
            return no("can only create token subresource of serviceaccount");
        }
        self.related(node, Kind::ServiceAccount, attributes)
    }

    fn resource_slice(&self, node: &str, attributes: &Attributes<'_>) -> Decision {
        if !attributes.subresource.is_empty() {
            return no("cannot authorize ResourceSlice subresources");
        }
        match attributes.verb {
            // Admission checks the node's name in the body.
            "create" => allow(),
            "get" | "update" | "patch" | "delete" => self.related(node, Kind::ResourceSlice, attributes),
            "watch" | "list" | "deletecollection" if selects_node(attributes, "spec.nodeName", node) => allow(),
            "watch" | "list" | "deletecollection" => no("can only list/watch/deletecollection resourceslices with nodeName field selector"),
            _ => no(
                "only the following verbs are allowed for a ResourceSlice: get, watch, list, create, update, patch, delete, deletecollection",
            ),
        }
    }

    fn pod(&self, node: &str, attributes: &Attributes<'_>) -> Decision {
        match (attributes.subresource, attributes.verb) {
            ("", "get") => self.get(node, Kind::Pod, attributes),
            ("", "list" | "watch") if selects_node(attributes, "spec.nodeName", node) => allow(),
            ("", "list" | "watch") if !attributes.name.is_empty() => self.related(node, Kind::Pod, attributes),
            ("", "list" | "watch") => no("can only list/watch pods with spec.nodeName field selector"),
            // Admission limits these to mirror pods, and to pods of this node.
            ("", "create" | "delete") | ("status", "update" | "patch") | ("eviction", "create") => allow(),
            _ => no(""),
        }
    }
}

fn selects_node(attributes: &Attributes<'_>, field: &str, node: &str) -> bool {
    attributes.field_selector.iter().any(|requirement| requirement.equals && requirement.field == field && requirement.value == node)
}

fn lease(node: &str, attributes: &Attributes<'_>) -> Decision {
    if !matches!(attributes.verb, "get" | "create" | "update" | "patch" | "delete") {
        return no("can only get, create, update, patch, or delete a node lease");
    }
    if attributes.namespace != LEASE_NAMESPACE {
        return no(format!("can only access leases in the {LEASE_NAMESPACE:?} system namespace"));
    }
    // A create's name isn't known here; admission checks it.
    if attributes.verb != "create" && attributes.name != node {
        return no("can only access node lease with the same name as the requesting node");
    }
    allow()
}

fn csi_node(node: &str, attributes: &Attributes<'_>) -> Decision {
    if !matches!(attributes.verb, "get" | "create" | "update" | "patch" | "delete") {
        return no("can only get, create, update, patch, or delete a CSINode");
    }
    if !attributes.subresource.is_empty() {
        return no("cannot authorize CSINode subresources");
    }
    if attributes.verb != "create" && attributes.name != node {
        return no("can only access CSINode with the same name as the requesting node");
    }
    allow()
}

fn own_node(node: &str, attributes: &Attributes<'_>) -> Decision {
    match (attributes.subresource, attributes.verb) {
        // Admission limits these to the node's own object.
        ("", "create" | "update" | "patch") | ("status", "update" | "patch") => allow(),
        // By name and not by the graph, so that a kubelet can look for its Node before there is one.
        ("", "get" | "list" | "watch") => match attributes.name {
            name if name == node => allow(),
            "" => no(format!("node '{node}' cannot read all nodes, only its own Node object")),
            name => no(format!("node '{node}' cannot read '{name}', only its own Node object")),
        },
        _ => no(""),
    }
}

impl Authorizer for NodeAuthorizer {
    fn authorize(&self, attributes: &Attributes<'_>) -> Decision {
        let user = attributes.user;
        if !user.in_group(GROUP_NODES) || !user.name.starts_with(NODE_USER_PREFIX) {
            return no("");
        }
        let Some(node) = user.node_name() else { return no(format!("unknown node for user {:?}", user.name)) };
        if attributes.is_resource { self.resource(node, attributes) } else { self.fixed(attributes) }
    }

    fn rules(&self, user: &UserInfo, _namespace: &str, review: &mut RulesReview) {
        if user.node_name().is_some() {
            review.incomplete = true;
            review.error = "node authorizer does not support user rule resolution".to_owned();
        }
    }
}

#[cfg(test)]
mod tests;
