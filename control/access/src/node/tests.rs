//! The Node authorizer by tables.

use serde_json::json;

use super::*;
use crate::attributes::FieldRequirement;

fn graph() -> Arc<NodeGraph> {
    let graph = NodeGraph::new();
    let pod = json!({
        "metadata": { "name": "p", "namespace": "ns" },
        "spec": {
            "nodeName": "n1",
            "serviceAccountName": "sa",
            "imagePullSecrets": [{ "name": "pull" }],
            "containers": [{
                "name": "c",
                "env": [
                    { "name": "A", "value": "plain", "valueFrom": null },
                    { "name": "B", "valueFrom": { "secretKeyRef": { "name": "env-secret", "key": "k" } } },
                ],
                "envFrom": [{ "configMapRef": { "name": "env-map" } }],
            }],
            "initContainers": [{ "name": "i", "envFrom": [{ "secretRef": { "name": "init-secret" } }] }],
            "volumes": [
                { "name": "v1", "secret": { "secretName": "vol-secret" } },
                { "name": "v2", "configMap": { "name": "vol-map" } },
                { "name": "v3", "projected": { "sources": [{ "secret": { "name": "proj-secret" } }, { "configMap": { "name": "proj-map" } }] } },
                { "name": "v4", "persistentVolumeClaim": { "claimName": "claim" } },
                { "name": "v5", "ephemeral": { "volumeClaimTemplate": { "spec": {} } } },
                { "name": "v6", "csi": { "driver": "d", "nodePublishSecretRef": { "name": "csi-secret" } } },
            ],
            "resourceClaims": [{ "name": "gpu", "resourceClaimTemplateName": "t" }, { "name": "fpga", "resourceClaimName": "direct" }],
        },
        "status": { "resourceClaimStatuses": [{ "name": "gpu", "resourceClaimName": "generated" }] },
    });
    let mirror = json!({
        "metadata": { "name": "mirror", "namespace": "ns", "annotations": { "kubernetes.io/config.mirror": "x" } },
        "spec": { "nodeName": "n1", "containers": [], "volumes": [{ "name": "v", "secret": { "secretName": "mirror-secret" } }] },
    });
    let unassigned = json!({
        "metadata": { "name": "waiting", "namespace": "ns" },
        "spec": { "containers": [], "volumes": [{ "name": "v", "secret": { "secretName": "waiting-secret" } }] },
    });
    for pod in [pod, mirror, unassigned] {
        graph.apply("pods", pod.to_string().as_bytes()).unwrap();
    }
    let volume = json!({
        "metadata": { "name": "pv" },
        "spec": {
            "claimRef": { "namespace": "ns", "name": "claim" },
            "csi": {
                "driver": "d",
                "nodeStageSecretRef": { "namespace": "storage", "name": "stage" },
                "controllerPublishSecretRef": { "namespace": "storage", "name": "controller" },
            },
        },
    });
    graph.apply("persistentvolumes", volume.to_string().as_bytes()).unwrap();
    let attachment = json!({ "metadata": { "name": "va" }, "spec": { "nodeName": "n1" } });
    graph.apply("volumeattachments", attachment.to_string().as_bytes()).unwrap();
    Arc::new(graph)
}

fn kubelet(node: &str) -> UserInfo {
    UserInfo::new(format!("system:node:{node}"), ["system:nodes", "system:authenticated"])
}

/// `verb group/resource[/subresource] namespace/name`, with `-` for nothing.
fn ask<'a>(user: &'a UserInfo, text: &'a str) -> Attributes<'a> {
    let mut words = text.split(' ').map(|word| word.split('/'));
    let mut next = |count: usize| -> Vec<&'a str> {
        let mut parts: Vec<&str> = words.next().into_iter().flatten().map(|part| if part == "-" { "" } else { part }).collect();
        parts.resize(count, "");
        parts
    };
    let (verb, resource, object) = (next(1), next(3), next(2));
    Attributes {
        namespace: object[0],
        name: object[1],
        subresource: resource[2],
        ..Attributes::resource(user, verb[0], resource[0], resource[1])
    }
}

#[test]
fn kubelet_reads_what_its_pods_refer_to() {
    let authorizer = NodeAuthorizer::new(graph());
    // What n1 may; n2, which runs nothing, never.
    let cases = [
        ("get -/secrets ns/pull", true),
        ("get -/secrets ns/env-secret", true),
        ("watch -/secrets ns/init-secret", true),
        ("list -/secrets ns/vol-secret", true),
        ("get -/secrets ns/proj-secret", true),
        ("get -/secrets ns/csi-secret", true),
        ("get -/secrets storage/stage", true),
        ("get -/secrets storage/controller", false),
        ("get -/secrets ns/unrelated", false),
        ("get -/secrets ns/mirror-secret", false),
        ("get -/secrets ns/waiting-secret", false),
        ("get -/secrets other/pull", false),
        ("list -/secrets ns/-", false),
        ("list -/secrets -/-", false),
        ("update -/secrets ns/pull", false),
        ("get -/configmaps ns/env-map", true),
        ("get -/configmaps ns/vol-map", true),
        ("get -/configmaps ns/proj-map", true),
        ("get -/persistentvolumeclaims ns/claim", true),
        ("get -/persistentvolumeclaims ns/p-v5", true),
        ("list -/persistentvolumeclaims ns/claim", false),
        ("patch -/persistentvolumeclaims/status ns/claim", true),
        ("get -/persistentvolumes -/pv", true),
        ("get storage.k8s.io/volumeattachments -/va", true),
        ("get resource.k8s.io/resourceclaims ns/generated", true),
        ("get resource.k8s.io/resourceclaims ns/direct", true),
        ("get -/serviceaccounts ns/sa", true),
        ("create -/serviceaccounts/token ns/sa", true),
        ("create -/serviceaccounts/token ns/other", false),
        ("create -/serviceaccounts ns/sa", false),
        ("get -/pods ns/p", true),
        ("watch -/pods ns/p", true),
        ("get -/pods ns/mirror", true),
        ("get -/pods/log ns/p", false),
    ];
    for (request, allowed) in cases {
        assert_eq!(authorizer.authorize(&ask(&kubelet("n1"), request)).allowed(), allowed, "{request}");
        assert!(!authorizer.authorize(&ask(&kubelet("n2"), request)).allowed(), "n2: {request}");
    }
}

#[test]
fn kubelet_manages_its_own_objects() {
    let authorizer = NodeAuthorizer::new(graph());
    let cases = [
        ("get -/nodes -/n1", true),
        ("watch -/nodes -/n1", true),
        ("get -/nodes -/n2", false),
        ("list -/nodes -/-", false),
        ("create -/nodes -/-", true),
        ("patch -/nodes/status -/n1", true),
        ("delete -/nodes -/n1", false),
        ("update coordination.k8s.io/leases kube-node-lease/n1", true),
        ("create coordination.k8s.io/leases kube-node-lease/-", true),
        ("update coordination.k8s.io/leases kube-node-lease/n2", false),
        ("update coordination.k8s.io/leases kube-system/n1", false),
        ("list coordination.k8s.io/leases kube-node-lease/-", false),
        ("get storage.k8s.io/csinodes -/n1", true),
        ("get storage.k8s.io/csinodes -/n2", false),
        ("list -/pods -/-", false),
        ("create -/pods ns/-", true),
        ("delete -/pods ns/p", true),
        ("patch -/pods/status ns/p", true),
        ("create -/pods/eviction ns/p", true),
        ("patch -/pods ns/p", false),
        // By the fixed rules.
        ("list -/services -/-", true),
        ("create -/events ns/-", true),
        ("create authentication.k8s.io/tokenreviews -/-", true),
        ("create certificates.k8s.io/certificatesigningrequests -/-", true),
        ("list storage.k8s.io/csidrivers -/-", true),
        ("create apps/deployments ns/-", false),
    ];
    for (request, allowed) in cases {
        assert_eq!(authorizer.authorize(&ask(&kubelet("n1"), request)).allowed(), allowed, "{request}");
    }
}

#[test]
fn lists_of_pods_need_the_field_selector() {
    let authorizer = NodeAuthorizer::new(graph());
    for (field, equals, value, allowed) in [
        ("spec.nodeName", true, "n1", true),
        ("spec.nodeName", false, "n1", false),
        ("spec.nodeName", true, "n2", false),
        ("metadata.name", true, "n1", false),
    ] {
        let selector = [FieldRequirement { field: field.to_owned(), equals, value: value.to_owned() }];
        let user = kubelet("n1");
        let attributes = Attributes { field_selector: &selector, ..Attributes::resource(&user, "list", "", "pods") };
        assert_eq!(authorizer.authorize(&attributes).allowed(), allowed, "{field} {equals} {value}");
    }
}

#[test]
fn only_nodes_are_meant() {
    let authorizer = NodeAuthorizer::new(graph());
    for user in [
        UserInfo::new("system:node:n1", ["system:authenticated"]),
        UserInfo::new("anna", ["system:nodes"]),
        UserInfo::new("system:node:", ["system:nodes"]),
    ] {
        assert!(!authorizer.authorize(&ask(&user, "get -/secrets ns/pull")).allowed(), "{user:?}");
        assert!(!authorizer.authorize(&ask(&user, "list -/services -/-")).allowed(), "{user:?}");
    }
}

#[test]
fn rights_end_with_the_last_reference() {
    let graph = graph();
    let authorizer = NodeAuthorizer::new(Arc::clone(&graph));
    let second = json!({
        "metadata": { "name": "q", "namespace": "ns" },
        "spec": { "nodeName": "n1", "containers": [], "volumes": [{ "name": "v", "secret": { "secretName": "vol-secret" } }] },
    });
    graph.apply("pods", second.to_string().as_bytes()).unwrap();
    let may = |request: &str| authorizer.authorize(&ask(&kubelet("n1"), request)).allowed();
    graph.delete("pods", "ns", "p");
    assert!(may("get -/secrets ns/vol-secret"), "q still has it");
    assert!(!may("get -/secrets ns/pull"));
    assert!(!may("get -/persistentvolumes -/pv"));
    assert!(!may("get -/secrets storage/stage"));
    graph.delete("pods", "ns", "q");
    assert!(!may("get -/secrets ns/vol-secret"));
    graph.delete("volumeattachments", "", "va");
    assert!(!may("get storage.k8s.io/volumeattachments -/va"));
}
