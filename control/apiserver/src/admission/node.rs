//! Nodes: a new one is tainted until it is ready, and a kubelet changes only its own node and what belongs to its pods.

use std::collections::BTreeSet;

use outrigger_access::Attributes as Access;
use outrigger_access::user::NODE_USER_PREFIX;
use outrigger_api::{Status, meta};
use serde_json::{Value, json};

use super::{Attributes, Operation, Plugin, certificate};
use crate::engine::Engine;

/// TaintNodesByCondition
pub struct TaintByCondition;

const NOT_READY: &str = "node.kubernetes.io/not-ready";

impl Plugin for TaintByCondition {
    fn mutate(&self, _engine: &Engine, attributes: &Attributes<'_>, node: &mut Value) -> Result<(), Status> {
        if !attributes.creates("", "Node") {
            return Ok(());
        }
        let mut taints = meta::items(node, "spec.taints").to_vec();
        if !taints.iter().any(|t| t["key"] == NOT_READY && t["effect"] == "NoSchedule") {
            taints.push(json!({"key": NOT_READY, "effect": "NoSchedule"}));
            meta::set(node, "spec.taints", taints);
        }
        Ok(())
    }
}

pub struct NodeRestriction;

impl Plugin for NodeRestriction {
    fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let Some(node) = attributes.call.user.node_name() else { return Ok(()) };
        if attributes.operation == Operation::Connect {
            return Ok(());
        }
        match (attributes.resource.group.as_ref(), attributes.resource.plural.as_ref(), attributes.subresource) {
            ("", "pods", "") => pod(engine, attributes, node, object),
            ("", "pods", "status") => pod_status(attributes, node, object),
            ("", "pods", "eviction") => evicted(engine, attributes, node),
            ("", "pods", other) => {
                Err(attributes.forbidden(format!("unexpected pod subresource {other:?}, only 'status' and 'eviction' are allowed")))
            }
            ("", "nodes", _) => self_only(attributes, node, object),
            ("", "serviceaccounts", "token") => token(engine, attributes, node, object),
            ("coordination.k8s.io", "leases", _) => lease(attributes, node),
            ("storage.k8s.io", "csinodes", _) if attributes.name != node => {
                Err(attributes.forbidden("can only access CSINode with the same name as the requesting node"))
            }
            ("certificates.k8s.io", "certificatesigningrequests", _) => signing_request(attributes, node, object),
            ("resource.k8s.io", "resourceslices", _) => slice(attributes, node, object),
            _ => Ok(()),
        }
    }
}

/// A kubelet makes mirror pods of its own, and deletes pods bound to it.
fn pod(engine: &Engine, attributes: &Attributes<'_>, node: &str, object: Option<&Value>) -> Result<(), Status> {
    match attributes.operation {
        Operation::Create => {
            let Some(pod) = object else { return Ok(()) };
            let registered = super::lookup(engine, "", "nodes", "", node);
            mirror_pod(pod, node, registered.as_ref().map(meta::uid).unwrap_or_default()).map_err(|why| attributes.forbidden(why))
        }
        Operation::Delete => own_pod(attributes, node, "delete"),
        other => {
            let name = other.name();
            Err(attributes.forbidden(format!("unexpected operation {name:?}, node {node:?} can only create and delete mirror pods")))
        }
    }
}

/// What a pod must be for its node to make it: a mirror, bound to and owned by the node, that refers to no other object.
fn mirror_pod(pod: &Value, node: &str, uid: &str) -> Result<(), String> {
    if meta::annotation(pod, "kubernetes.io/config.mirror").is_none() {
        return Err(format!("pod does not have \"kubernetes.io/config.mirror\" annotation, node {node:?} can only create mirror pods"));
    }
    if meta::text(pod, "spec.nodeName") != node {
        return Err(format!("node {node:?} can only create pods with spec.nodeName set to itself"));
    }
    let owner = match meta::owner_references(pod) {
        [owner] => owner,
        [] => return Err(format!("node {node:?} can only create pods with an owner reference set to itself")),
        _ => return Err(format!("node {node:?} can only create pods with a single owner reference set to itself")),
    };
    if owner["apiVersion"] != "v1" || owner["kind"] != "Node" || owner["name"] != node {
        return Err(format!("node {node:?} can only create pods with an owner reference set to itself"));
    }
    if owner["controller"] != true {
        return Err(format!("node {node:?} can only create pods with a controller owner reference set to itself"));
    }
    if owner["blockOwnerDeletion"] == true {
        return Err(format!("node {node:?} must not set blockOwnerDeletion on an owner reference"));
    }
    if owner["uid"] != uid {
        return Err(format!("node {node} UID mismatch: expected {} got {uid}", meta::text(owner, "uid")));
    }
    match referenced(pod) {
        Some(what) => Err(format!("node {node:?} can not create pods that reference {what}")),
        None => Ok(()),
    }
}

/// Where volumes name a Secret.
const VOLUME_SECRETS: [&str; 10] = [
    "azureFile.secretName",
    "cephfs.secretRef.name",
    "cinder.secretRef.name",
    "csi.nodePublishSecretRef.name",
    "flexVolume.secretRef.name",
    "iscsi.secretRef.name",
    "rbd.secretRef.name",
    "scaleIO.secretRef.name",
    "secret.secretName",
    "storageos.secretRef.name",
];

/// Volumes that need the API, and what for.
const API_VOLUMES: [(&str, &str); 7] = [
    ("configMap", "configmaps (via configmap volumes)"),
    ("secret", "secrets (via secret volumes)"),
    ("csi", "csidrivers (via CSI volumes)"),
    ("glusterfs", "endpoints (via glusterFS volumes)"),
    ("persistentVolumeClaim", "persistentvolumeclaims"),
    ("ephemeral", "persistentvolumeclaims (via ephemeral volumes)"),
    ("azureFile", "secrets (via azureFile volumes)"),
];

/// The same of projected volumes' sources.
const API_SOURCES: [(&str, &str); 5] = [
    ("configMap", "configmaps (via projected volumes)"),
    ("secret", "secrets (via projected volumes)"),
    ("serviceAccountToken", "serviceaccounts (via projected volumes)"),
    ("clusterTrustBundle", "clustertrustbundles"),
    ("podCertificate", "podcertificates"),
];

/// The first kind of API objects that a pod refers to.
fn referenced(pod: &Value) -> Option<&'static str> {
    let named = |value: &Value, path: &str| !meta::text(value, path).is_empty();
    let lists = ["spec.containers", "spec.initContainers", "spec.ephemeralContainers"];
    let containers: Vec<&Value> = lists.iter().flat_map(|list| meta::items(pod, list)).collect();
    let in_containers = |list: &str, path: &str| containers.iter().any(|c| meta::items(c, list).iter().any(|item| named(item, path)));
    let volumes = meta::items(pod, "spec.volumes");
    let sources: Vec<&Value> = volumes.iter().flat_map(|volume| meta::items(volume, "projected.sources")).collect();
    if named(pod, "spec.serviceAccountName") {
        return Some("serviceaccounts");
    }
    let secrets = meta::items(pod, "spec.imagePullSecrets").iter().any(|secret| named(secret, "name"))
        || in_containers("envFrom", "secretRef.name")
        || in_containers("env", "valueFrom.secretKeyRef.name")
        || volumes.iter().any(|volume| VOLUME_SECRETS.iter().any(|path| named(volume, path)))
        || sources.iter().any(|source| named(source, "secret.name"));
    if secrets {
        return Some("secrets");
    }
    let config_maps = in_containers("envFrom", "configMapRef.name")
        || in_containers("env", "valueFrom.configMapKeyRef.name")
        || volumes.iter().any(|volume| named(volume, "configMap.name"))
        || sources.iter().any(|source| named(source, "configMap.name"));
    if config_maps {
        return Some("configmaps");
    }
    if !meta::items(pod, "spec.resourceClaims").is_empty() {
        return Some("resourceclaims");
    }
    let among =
        |value: &Value, kinds: &[(&str, &'static str)]| kinds.iter().find(|(kind, _)| !value[*kind].is_null()).map(|(_, what)| *what);
    volumes.iter().find_map(|volume| among(volume, &API_VOLUMES)).or_else(|| sources.iter().find_map(|source| among(source, &API_SOURCES)))
}

fn pod_status(attributes: &Attributes<'_>, node: &str, object: Option<&Value>) -> Result<(), Status> {
    own_pod(attributes, node, "update")?;
    let (Some(new), Some(old)) = (object, attributes.old) else { return Ok(()) };
    if !changed_labels(new, old).is_empty() {
        return Err(attributes.forbidden(format!("node {node:?} cannot update labels through pod status")));
    }
    let kept = |path: &str| meta::get(new, path) == meta::get(old, path);
    if meta::items(new, "status.resourceClaimStatuses") != meta::items(old, "status.resourceClaimStatuses") {
        return Err(attributes.forbidden(format!("node {node:?} cannot update resource claim statues")));
    }
    if !kept("status.extendedResourceClaimStatus") {
        return Err(attributes.forbidden(format!("node {node:?} cannot update extended resource claim status")));
    }
    Ok(())
}

fn own_pod(attributes: &Attributes<'_>, node: &str, action: &str) -> Result<(), Status> {
    let bound = attributes.old.map(|old| meta::text(old, "spec.nodeName")).unwrap_or_default();
    if bound == node {
        return Ok(());
    }
    let what = if action == "update" { "update pod status for" } else { "delete" };
    Err(attributes.forbidden(format!("node {node:?} can only {what} pods with spec.nodeName set to itself")))
}

fn evicted(engine: &Engine, attributes: &Attributes<'_>, node: &str) -> Result<(), Status> {
    let pod = super::lookup(engine, "", "pods", attributes.namespace, attributes.name);
    match pod.as_ref().map(|pod| meta::text(pod, "spec.nodeName")) {
        Some(bound) if bound == node => Ok(()),
        _ => Err(attributes.forbidden(format!("node {node:?} can only evict pods with spec.nodeName set to itself"))),
    }
}

fn self_only(attributes: &Attributes<'_>, node: &str, object: Option<&Value>) -> Result<(), Status> {
    if attributes.name != node {
        return Err(attributes.forbidden(format!("node {node:?} is not allowed to modify node {:?}", attributes.name)));
    }
    let Some(new) = object else { return Ok(()) };
    let verdict = match (attributes.operation, attributes.old) {
        (Operation::Create, _) => new_node(new, node),
        (Operation::Update, Some(old)) => changed_node(new, old, node),
        _ => Ok(()),
    };
    verdict.map_err(|why| attributes.forbidden(why))
}

fn new_node(new: &Value, node: &str) -> Result<(), String> {
    if !meta::get(new, "spec.configSource").is_null() {
        return Err(format!("node {node:?} is not allowed to create pods with a non-nil configSource"));
    }
    let restricted = restricted_labels(new, &Value::Null);
    if !restricted.is_empty() {
        return Err(format!("node {node:?} is not allowed to set the following labels: {}", restricted.join(", ")));
    }
    Ok(())
}

fn changed_node(new: &Value, old: &Value, node: &str) -> Result<(), String> {
    let source = meta::get(new, "spec.configSource");
    if !source.is_null() && source != meta::get(old, "spec.configSource") {
        return Err(format!("node {node:?} is not allowed to update configSource to a new non-nil configSource"));
    }
    if meta::items(new, "spec.taints") != meta::items(old, "spec.taints") {
        return Err(format!("node {node:?} is not allowed to modify taints"));
    }
    if meta::owner_references(new) != meta::owner_references(old) {
        return Err(format!("node {node:?} is not allowed to modify ownerReferences"));
    }
    let restricted = restricted_labels(new, old);
    if !restricted.is_empty() {
        return Err(format!("is not allowed to modify labels: {}", restricted.join(", ")));
    }
    Ok(())
}

/// The keys of labels that were added, removed or changed.
fn changed_labels<'a>(new: &'a Value, old: &'a Value) -> BTreeSet<&'a str> {
    let written = meta::labels(new).filter(|(key, value)| meta::label(old, key) != Some(*value));
    let removed = meta::labels(old).filter(|(key, _)| meta::label(new, key).is_none());
    written.chain(removed).map(|(key, _)| key).collect()
}

/// Changes by which a node could draw workloads to itself that aren't meant for it.
fn restricted_labels<'a>(new: &'a Value, old: &'a Value) -> Vec<&'a str> {
    changed_labels(new, old).into_iter().filter(|key| is_restricted(key)).collect()
}

/// Labels of Kubernetes' domains that a kubelet sets on its own node.
const KUBELET_LABELS: [&str; 11] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];

fn is_restricted(key: &str) -> bool {
    let Some((domain, _)) = key.split_once('/') else { return false };
    let within = |parent: &str| domain.strip_suffix(parent).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    let kubelets = KUBELET_LABELS.contains(&key) || within("kubelet.kubernetes.io") || within("node.kubernetes.io");
    within("node-restriction.kubernetes.io") || (within("kubernetes.io") || within("k8s.io")) && !kubelets
}

/// A node asks for tokens of pods that run on it, for audiences that they name.
fn token(engine: &Engine, attributes: &Attributes<'_>, node: &str, object: Option<&Value>) -> Result<(), Status> {
    let Some(request) = object.filter(|_| attributes.operation == Operation::Create) else { return Ok(()) };
    let reference = meta::get(request, "spec.boundObjectRef");
    let (name, uid) = (meta::text(reference, "name"), meta::text(reference, "uid"));
    if reference["apiVersion"] != "v1" || reference["kind"] != "Pod" || name.is_empty() {
        return Err(attributes.forbidden("node requested token not bound to a pod"));
    }
    if uid.is_empty() {
        return Err(attributes.forbidden("node requested token with a pod binding without a uid"));
    }
    let pod = super::lookup(engine, "", "pods", attributes.namespace, name).ok_or_else(|| Status::not_found("", "pods", name))?;
    if meta::uid(&pod) != uid {
        return Err(attributes.forbidden(format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        )));
    }
    if meta::text(&pod, "spec.nodeName") != node {
        return Err(attributes.forbidden("node requested token bound to a pod scheduled on a different node"));
    }
    let audience = match meta::items(request, "spec.audiences") {
        [] => "",
        [one] => one.as_str().unwrap_or_default(),
        _ => return Err(attributes.forbidden("node may only request 0 or 1 audiences")),
    };
    if meta::items(&pod, "spec.volumes").iter().any(|volume| asks_for(engine, &pod, volume, audience)) {
        return Ok(());
    }
    let user = &attributes.call.user;
    let wanted = Access {
        namespace: attributes.namespace,
        name: attributes.name,
        api_version: "v1",
        ..Access::resource(user, "request-serviceaccounts-token-audience", "", audience)
    };
    engine.permit(&wanted).map_err(|_| {
        attributes.forbidden(format!(
            "audience {audience:?} not found in pod spec volume, {} is not authorized to request tokens for this audience",
            user.name
        ))
    })
}

/// Whether a volume of the pod needs a token for the audience: by itself, or for its CSI driver.
fn asks_for(engine: &Engine, pod: &Value, volume: &Value, audience: &str) -> bool {
    let tokens = meta::items(volume, "projected.sources").iter().map(|source| &source["serviceAccountToken"]);
    if tokens.filter(|token| !token.is_null()).any(|token| meta::text(token, "audience") == audience) {
        return true;
    }
    let driver = match (&volume["ephemeral"], meta::text(volume, "persistentVolumeClaim.claimName")) {
        (Value::Object(_), _) => driver_of(engine, pod, &format!("{}-{}", meta::name(pod), meta::text(volume, "name"))),
        (_, "") => Some(meta::text(volume, "csi.driver").to_owned()),
        (_, claim) => driver_of(engine, pod, claim),
    };
    let driver =
        driver.filter(|driver| !driver.is_empty()).and_then(|name| super::lookup(engine, "storage.k8s.io", "csidrivers", "", &name));
    driver.is_some_and(|driver| meta::items(&driver, "spec.tokenRequests").iter().any(|token| meta::text(token, "audience") == audience))
}

/// The CSI driver behind a claim of the pod's namespace.
fn driver_of(engine: &Engine, pod: &Value, claim: &str) -> Option<String> {
    let claim = super::lookup(engine, "", "persistentvolumeclaims", meta::namespace(pod), claim)?;
    let volume = super::lookup(engine, "", "persistentvolumes", "", meta::text(&claim, "spec.volumeName"))?;
    Some(meta::text(&volume, "spec.csi.driver").to_owned())
}

fn lease(attributes: &Attributes<'_>, node: &str) -> Result<(), Status> {
    if attributes.namespace != "kube-node-lease" {
        return Err(attributes.forbidden("can only access leases in the \"kube-node-lease\" system namespace"));
    }
    if attributes.name != node {
        return Err(attributes.forbidden("can only access node lease with the same name as the requesting node"));
    }
    Ok(())
}

/// A node asks for certificates of its own only.
fn signing_request(attributes: &Attributes<'_>, node: &str, object: Option<&Value>) -> Result<(), Status> {
    let Some(request) = object.filter(|_| attributes.operation == Operation::Create) else { return Ok(()) };
    let signer = meta::text(request, "spec.signerName");
    if !["kubernetes.io/kubelet-serving", "kubernetes.io/kube-apiserver-client-kubelet"].contains(&signer) {
        return Ok(());
    }
    let asked = certificate::asked(request).map_err(|error| attributes.forbidden(format!("unable to parse csr: {error}")))?;
    if asked.common_name.strip_prefix(NODE_USER_PREFIX) == Some(node) {
        return Ok(());
    }
    Err(attributes.forbidden(format!("can only create a node CSR with CN={NODE_USER_PREFIX}{node}")))
}

fn slice(attributes: &Attributes<'_>, node: &str, object: Option<&Value>) -> Result<(), Status> {
    let (slice, action) = match attributes.operation {
        Operation::Create => (object, "create"),
        Operation::Delete => (attributes.old, "delete"),
        _ => return Ok(()),
    };
    if slice.is_some_and(|slice| meta::text(slice, "spec.nodeName") == node) {
        return Ok(());
    }
    Err(attributes.forbidden(format!("can only {action} ResourceSlice with the same NodeName as the requesting node")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_set_only_the_labels_of_kubelets() {
        let cases = [
            ("kubernetes.io/hostname", false),
            ("topology.kubernetes.io/zone", false),
            ("example.node.kubernetes.io/disk", false),
            ("kubelet.kubernetes.io/any", false),
            ("example.com/any", false),
            ("plain", false),
            ("nokubernetes.io/any", false),
            ("node-restriction.kubernetes.io/team", true),
            ("a.node-restriction.kubernetes.io/team", true),
            ("node-role.kubernetes.io/control-plane", true),
            ("scheduling.k8s.io/any", true),
        ];
        for (key, restricted) in cases {
            assert_eq!(is_restricted(key), restricted, "{key}");
        }
    }

    #[test]
    fn a_node_changes_of_itself_what_draws_no_workloads() {
        let node = |labels: Value| json!({"metadata": {"labels": labels}});
        let restricted = json!({"node-restriction.kubernetes.io/team": "a", "kubernetes.io/os": "linux"});
        assert!(new_node(&node(json!({"kubernetes.io/os": "linux"})), "n").is_ok());
        let why = "node \"n\" is not allowed to set the following labels: node-restriction.kubernetes.io/team";
        assert_eq!(new_node(&node(restricted.clone()), "n"), Err(why.to_owned()));
        assert!(new_node(&json!({"spec": {"configSource": {}}}), "n").is_err());
        let old = node(restricted);
        assert!(changed_node(&old, &old, "n").is_ok());
        let removed = node(json!({"kubernetes.io/os": "linux"}));
        let why = "is not allowed to modify labels: node-restriction.kubernetes.io/team";
        assert_eq!(changed_node(&removed, &old, "n"), Err(why.to_owned()));
        let mut tainted = old.clone();
        meta::set(&mut tainted, "spec.taints", json!([{"key": "a", "effect": "NoSchedule"}]));
        assert!(changed_node(&tainted, &old, "n").is_err() && changed_node(&old, &tainted, "n").is_err());
    }

    fn mirror(spec: Value) -> Value {
        let owner = json!({"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u", "controller": true});
        let mut pod = json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "h"}, "ownerReferences": [owner]}, "spec": spec});
        meta::set(&mut pod, "spec.nodeName", "n");
        pod
    }

    #[test]
    fn mirror_pods_belong_to_their_node() {
        let pod = mirror(json!({}));
        assert_eq!(mirror_pod(&pod, "n", "u"), Ok(()));
        assert!(mirror_pod(&pod, "n", "other").is_err() && mirror_pod(&pod, "m", "u").is_err());
        for (path, value) in [("metadata.ownerReferences", json!([])), ("metadata.annotations", json!({})), ("spec.nodeName", json!("m"))] {
            let mut other = pod.clone();
            meta::set(&mut other, path, value);
            assert!(mirror_pod(&other, "n", "u").is_err(), "{path}");
        }
        for (field, value) in [("controller", false), ("blockOwnerDeletion", true)] {
            let mut other = pod.clone();
            other["metadata"]["ownerReferences"][0][field] = value.into();
            assert!(mirror_pod(&other, "n", "u").is_err(), "{field}");
        }
    }

    #[test]
    fn mirror_pods_refer_to_nothing() {
        let volume = |volume: Value| json!({"volumes": [volume]});
        let cases = [
            (json!({"serviceAccountName": "a"}), Some("serviceaccounts")),
            (json!({"containers": [{"envFrom": [{"secretRef": {"name": "s"}}]}]}), Some("secrets")),
            (json!({"initContainers": [{"env": [{"valueFrom": {"secretKeyRef": {"name": "s"}}}]}]}), Some("secrets")),
            (json!({"containers": [{"env": [{"valueFrom": {"configMapKeyRef": {"name": "c"}}}]}]}), Some("configmaps")),
            (json!({"resourceClaims": [{"name": "r"}]}), Some("resourceclaims")),
            (volume(json!({"secret": {"secretName": "s"}})), Some("secrets")),
            (volume(json!({"csi": {"driver": "d"}})), Some("csidrivers (via CSI volumes)")),
            (volume(json!({"projected": {"sources": [{"serviceAccountToken": {}}]}})), Some("serviceaccounts (via projected volumes)")),
            (volume(json!({"projected": {"sources": [{"downwardAPI": {}}]}})), None),
            (volume(json!({"hostPath": {"path": "/"}})), None),
            (json!({"containers": [{"env": [{"name": "A", "value": "b"}]}]}), None),
        ];
        for (spec, what) in cases {
            assert_eq!(referenced(&mirror(spec.clone())), what, "{spec}");
        }
    }
}
