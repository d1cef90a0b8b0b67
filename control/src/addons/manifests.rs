//! The addons themselves.
use std::net::IpAddr;

use serde_json::{Value, json};

use super::Addon;

const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles";
const BINDINGS: &str = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
const SERVICES: &str = "/api/v1/namespaces/kube-system/services";
const NODE_AGENT: &str = "outrigger:node-agent";

pub fn all(dns: Option<IpAddr>) -> Vec<Addon> {
    let mut addons = vec![
        Addon { collection: ROLES, name: NODE_AGENT, object: node_agent_role() },
        Addon { collection: BINDINGS, name: NODE_AGENT, object: node_agent_binding() },
    ];
    addons.extend(dns.map(|address| Addon { collection: SERVICES, name: "kube-dns", object: dns_service(address) }));
    addons
}

/// What an agent does beyond a kubelet: it carries Services, routes to other nodes, keeps network policies and
/// answers DNS. The rest comes from the Node authorizer.
fn node_agent_role() -> Value {
    let read = |group: &str, resources: &[&str]| json!({"apiGroups": [group], "resources": resources, "verbs": ["get", "list", "watch"]});
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": NODE_AGENT},
        "rules": [
            read("", &["nodes", "services", "namespaces"]),
            read("discovery.k8s.io", &["endpointslices"]),
            read("networking.k8s.io", &["networkpolicies", "servicecidrs"]),
            // Policies select pods of all nodes by their labels.
            read("", &["pods"]),
            {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
            {"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]},
            {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch", "update"]},
        ],
    })
}

fn node_agent_binding() -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": NODE_AGENT},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NODE_AGENT},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "system:nodes"}],
    })
}

/// No selector, and no proxy's business: each node answers this address itself.
fn dns_service(address: IpAddr) -> Value {
    let port = |name: &str, protocol: &str| json!({"name": name, "port": 53, "protocol": protocol, "targetPort": 53});
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kube-dns",
            "namespace": "kube-system",
            "labels": {
                "k8s-app": "kube-dns",
                "kubernetes.io/name": "CoreDNS",
                "kubernetes.io/cluster-service": "true",
                "service.kubernetes.io/service-proxy-name": "outrigger-dns",
            },
        },
        "spec": {"clusterIP": address.to_string(), "ports": [port("dns", "UDP"), port("dns-tcp", "TCP")]},
    })
}
