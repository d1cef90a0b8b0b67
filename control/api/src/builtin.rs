//! The built-in kinds, one line each. Facts of discovery, of the registry strategies and of the field label conversions upstream.
use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

use crate::resource::{GroupVersionKind, NameRule, Resource, Strategy, Subresource, Text};

const NAMESPACED: u32 = 1;
const STATUS: u32 = 1 << 1;
const GENERATION: u32 = 1 << 2;
const CREATE_ON_UPDATE: u32 = 1 << 3;
/// An update must carry the resourceVersion.
const CONDITIONAL: u32 = 1 << 4;
const CREATE_ONLY: u32 = 1 << 5;
const READ_ONLY: u32 = 1 << 6;
const NO_COLLECTION_DELETE: u32 = 1 << 7;

/// Group, version, kind, plural, flags, short names, categories, subresources besides status, field labels.
type Row = (&'static str, &'static str, &'static str, &'static str, u32, &'static str, &'static str, &'static str, &'static str);

const POD_FIELDS: &str = "spec.nodeName spec.restartPolicy spec.schedulerName spec.serviceAccountName spec.hostNetwork status.phase status.podIP status.podIPs status.nominatedNodeName";
const EVENT_FIELDS: &str = "involvedObject.kind involvedObject.namespace involvedObject.name involvedObject.uid involvedObject.apiVersion involvedObject.resourceVersion involvedObject.fieldPath reason reportingComponent source type";
const EVENT_V1_FIELDS: &str = "regarding.kind regarding.namespace regarding.name regarding.uid regarding.apiVersion regarding.resourceVersion regarding.fieldPath reason reportingController type";

#[rustfmt::skip]
const ROWS: &[Row] = &[
    ("", "v1", "Binding", "bindings", NAMESPACED | CREATE_ONLY, "", "", "", ""),
    ("", "v1", "ComponentStatus", "componentstatuses", READ_ONLY, "cs", "", "", ""),
    ("", "v1", "ConfigMap", "configmaps", NAMESPACED, "cm", "", "", ""),
    ("", "v1", "Endpoints", "endpoints", NAMESPACED | CREATE_ON_UPDATE, "ep", "", "", ""),
    ("", "v1", "Event", "events", NAMESPACED | CREATE_ON_UPDATE, "ev", "", "", EVENT_FIELDS),
    ("", "v1", "LimitRange", "limitranges", NAMESPACED | CREATE_ON_UPDATE, "limits", "", "", ""),
    ("", "v1", "Namespace", "namespaces", STATUS | NO_COLLECTION_DELETE, "ns", "", "finalize", "status.phase"),
    ("", "v1", "Node", "nodes", STATUS, "no", "", "proxy", "spec.unschedulable"),
    ("", "v1", "PersistentVolume", "persistentvolumes", STATUS, "pv", "", "", ""),
    ("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", NAMESPACED | STATUS, "pvc", "", "", ""),
    ("", "v1", "Pod", "pods", NAMESPACED | STATUS | GENERATION, "po", "all", "attach binding ephemeralcontainers eviction exec log portforward proxy resize", POD_FIELDS),
    ("", "v1", "PodTemplate", "podtemplates", NAMESPACED | GENERATION, "", "", "", ""),
    ("", "v1", "ReplicationController", "replicationcontrollers", NAMESPACED | STATUS | GENERATION, "rc", "all", "scale", "status.replicas"),
    ("", "v1", "ResourceQuota", "resourcequotas", NAMESPACED | STATUS, "quota", "", "", ""),
    ("", "v1", "Secret", "secrets", NAMESPACED, "", "", "", "type"),
    ("", "v1", "Service", "services", NAMESPACED | STATUS | CREATE_ON_UPDATE, "svc", "all", "proxy", "spec.clusterIP spec.type"),
    ("", "v1", "ServiceAccount", "serviceaccounts", NAMESPACED, "sa", "", "token", ""),
    ("admissionregistration.k8s.io", "v1alpha1", "MutatingAdmissionPolicy", "mutatingadmissionpolicies", GENERATION | CONDITIONAL, "", "api-extensions", "", ""),
    ("admissionregistration.k8s.io", "v1alpha1", "MutatingAdmissionPolicyBinding", "mutatingadmissionpolicybindings", GENERATION | CONDITIONAL, "", "api-extensions", "", ""),
    ("admissionregistration.k8s.io", "v1beta1", "MutatingAdmissionPolicy", "mutatingadmissionpolicies", GENERATION | CONDITIONAL, "", "api-extensions", "", ""),
    ("admissionregistration.k8s.io", "v1beta1", "MutatingAdmissionPolicyBinding", "mutatingadmissionpolicybindings", GENERATION | CONDITIONAL, "", "api-extensions", "", ""),
    ("admissionregistration.k8s.io", "v1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations", GENERATION | CONDITIONAL, "", "api-extensions", "", ""),
    ("admissionregistration.k8s.io", "v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies", STATUS | GENERATION | CONDITIONAL, "", "api-extensions", "", ""),
    ("admissionregistration.k8s.io", "v1", "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings", GENERATION | CONDITIONAL, "", "api-extensions", "", ""),
    ("admissionregistration.k8s.io", "v1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations", GENERATION | CONDITIONAL, "", "api-extensions", "", ""),
    ("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", STATUS | GENERATION | CONDITIONAL, "crd crds", "api-extensions", "", ""),
    ("apiregistration.k8s.io", "v1", "APIService", "apiservices", STATUS | CONDITIONAL, "", "api-extensions", "", ""),
    ("apps", "v1", "ControllerRevision", "controllerrevisions", NAMESPACED, "", "", "", ""),
    ("apps", "v1", "DaemonSet", "daemonsets", NAMESPACED | STATUS | GENERATION, "ds", "all", "", ""),
    ("apps", "v1", "Deployment", "deployments", NAMESPACED | STATUS | GENERATION, "deploy", "all", "scale", ""),
    ("apps", "v1", "ReplicaSet", "replicasets", NAMESPACED | STATUS | GENERATION, "rs", "all", "scale", "status.replicas"),
    ("apps", "v1", "StatefulSet", "statefulsets", NAMESPACED | STATUS | GENERATION, "sts", "all", "scale", ""),
    ("authentication.k8s.io", "v1", "SelfSubjectReview", "selfsubjectreviews", CREATE_ONLY, "", "", "", ""),
    ("authentication.k8s.io", "v1", "TokenReview", "tokenreviews", CREATE_ONLY, "", "", "", ""),
    ("authorization.k8s.io", "v1", "LocalSubjectAccessReview", "localsubjectaccessreviews", NAMESPACED | CREATE_ONLY, "", "", "", ""),
    ("authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", CREATE_ONLY, "", "", "", ""),
    ("authorization.k8s.io", "v1", "SelfSubjectRulesReview", "selfsubjectrulesreviews", CREATE_ONLY, "", "", "", ""),
    ("authorization.k8s.io", "v1", "SubjectAccessReview", "subjectaccessreviews", CREATE_ONLY, "", "", "", ""),
    ("autoscaling", "v1", "HorizontalPodAutoscaler", "horizontalpodautoscalers", NAMESPACED | STATUS, "hpa", "all", "", ""),
    ("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", NAMESPACED | STATUS, "hpa", "all", "", ""),
    ("batch", "v1", "CronJob", "cronjobs", NAMESPACED | STATUS | GENERATION, "cj", "all", "", ""),
    ("batch", "v1", "Job", "jobs", NAMESPACED | STATUS | GENERATION, "", "all", "", "status.successful"),
    ("certificates.k8s.io", "v1", "CertificateSigningRequest", "certificatesigningrequests", STATUS, "csr", "", "approval", "spec.signerName"),
    ("coordination.k8s.io", "v1", "Lease", "leases", NAMESPACED | CREATE_ON_UPDATE | CONDITIONAL, "", "", "", ""),
    ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", NAMESPACED | GENERATION, "", "", "", ""),
    ("events.k8s.io", "v1", "Event", "events", NAMESPACED | CREATE_ON_UPDATE, "ev", "", "", EVENT_V1_FIELDS),
    ("flowcontrol.apiserver.k8s.io", "v1", "FlowSchema", "flowschemas", STATUS | GENERATION, "", "", "", ""),
    ("flowcontrol.apiserver.k8s.io", "v1", "PriorityLevelConfiguration", "prioritylevelconfigurations", STATUS | GENERATION, "", "", "", ""),
    ("networking.k8s.io", "v1", "IPAddress", "ipaddresses", 0, "ip", "", "", ""),
    ("networking.k8s.io", "v1", "Ingress", "ingresses", NAMESPACED | STATUS | GENERATION, "ing", "", "", ""),
    ("networking.k8s.io", "v1", "IngressClass", "ingressclasses", GENERATION, "", "", "", ""),
    ("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", NAMESPACED | GENERATION, "netpol", "", "", ""),
    ("networking.k8s.io", "v1", "ServiceCIDR", "servicecidrs", STATUS, "", "", "", ""),
    ("node.k8s.io", "v1", "RuntimeClass", "runtimeclasses", CREATE_ON_UPDATE | CONDITIONAL, "", "", "", ""),
    ("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", NAMESPACED | STATUS | GENERATION | CONDITIONAL, "pdb", "", "", ""),
    ("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", CREATE_ON_UPDATE, "", "", "", ""),
    ("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings", CREATE_ON_UPDATE, "", "", "", ""),
    ("rbac.authorization.k8s.io", "v1", "Role", "roles", NAMESPACED | CREATE_ON_UPDATE, "", "", "", ""),
    ("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings", NAMESPACED | CREATE_ON_UPDATE, "", "", "", ""),
    ("resource.k8s.io", "v1", "DeviceClass", "deviceclasses", GENERATION, "", "", "", ""),
    ("resource.k8s.io", "v1", "ResourceClaim", "resourceclaims", NAMESPACED | STATUS, "", "", "", ""),
    ("resource.k8s.io", "v1", "ResourceClaimTemplate", "resourceclaimtemplates", NAMESPACED, "", "", "", ""),
    ("resource.k8s.io", "v1", "ResourceSlice", "resourceslices", GENERATION, "", "", "", "spec.nodeName spec.driver"),
    ("scheduling.k8s.io", "v1", "PriorityClass", "priorityclasses", GENERATION, "pc", "", "", ""),
    ("storage.k8s.io", "v1", "CSIDriver", "csidrivers", GENERATION | CONDITIONAL, "", "", "", ""),
    ("storage.k8s.io", "v1", "CSINode", "csinodes", CONDITIONAL, "", "", "", ""),
    ("storage.k8s.io", "v1", "CSIStorageCapacity", "csistoragecapacities", NAMESPACED | CONDITIONAL, "", "", "", ""),
    ("storage.k8s.io", "v1", "StorageClass", "storageclasses", 0, "sc", "", "", ""),
    ("storage.k8s.io", "v1", "VolumeAttachment", "volumeattachments", STATUS | CONDITIONAL, "", "", "", ""),
    ("storage.k8s.io", "v1", "VolumeAttributesClass", "volumeattributesclasses", 0, "vac", "", "", ""),
];

static RESOURCES: LazyLock<Vec<Arc<Resource>>> = LazyLock::new(|| ROWS.iter().map(|row| Arc::new(resource(row))).collect());

/// All built-in resources.
pub fn resources() -> &'static [Arc<Resource>] {
    &RESOURCES
}

/// A built-in resource by group, version and kind.
pub fn by_kind(group: &str, version: &str, kind: &str) -> Option<&'static Arc<Resource>> {
    RESOURCES.iter().find(|resource| resource.group == group && resource.version == version && resource.kind == kind)
}

fn words(text: &'static str) -> Vec<Text> {
    text.split_whitespace().map(Cow::Borrowed).collect()
}

fn resource(row: &Row) -> Resource {
    let &(group, version, kind, plural, flags, short_names, categories, subresources, field_labels) = row;
    let has = |flag: u32| flags & flag != 0;
    let mut names: Vec<&'static str> = subresources.split_whitespace().collect();
    if has(STATUS) {
        names.push("status");
    }
    names.sort_unstable();
    Resource {
        group: group.into(),
        version: version.into(),
        kind: kind.into(),
        list_kind: format!("{kind}List").into(),
        plural: plural.into(),
        singular: kind.to_lowercase().into(),
        short_names: words(short_names),
        categories: words(categories),
        namespaced: has(NAMESPACED),
        verbs: verbs(flags),
        subresources: names.into_iter().map(|name| subresource(group, version, kind, name)).collect(),
        storage: storage(group, version, kind),
        storage_prefix: storage_prefix(group, plural),
        warning: (group.is_empty() && kind == "Endpoints")
            .then(|| "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice".into())
            .or_else(|| (kind == "ComponentStatus").then(|| "v1 ComponentStatus is deprecated in v1.19+".into())),
        strategy: strategy(group, kind, flags),
        field_labels: words(field_labels),
        custom: None,
    }
}

fn strategy(group: &str, kind: &str, flags: u32) -> Strategy {
    let has = |flag: u32| flags & flag != 0;
    Strategy {
        has_status: has(STATUS),
        has_generation: has(GENERATION),
        create_on_update: has(CREATE_ON_UPDATE),
        unconditional_update: !has(CONDITIONAL),
        graceful_deletion: group.is_empty() && kind == "Pod",
        orphan_by_default: kind == "ReplicationController",
        create_only: has(CREATE_ONLY),
        name_rule: match (group, kind) {
            ("", "Namespace") => NameRule::Label,
            ("", "Service") => NameRule::ServiceName,
            ("rbac.authorization.k8s.io", _) => NameRule::PathSegment,
            ("apiregistration.k8s.io", _) => NameRule::ApiService,
            ("networking.k8s.io", "IPAddress") => NameRule::IpAddress,
            _ => NameRule::Subdomain,
        },
    }
}

fn verbs(flags: u32) -> Vec<&'static str> {
    if flags & CREATE_ONLY != 0 {
        return vec!["create"];
    }
    if flags & READ_ONLY != 0 {
        return vec!["get", "list"];
    }
    let mut verbs = vec!["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
    if flags & NO_COLLECTION_DELETE != 0 {
        verbs.retain(|verb| *verb != "deletecollection");
    }
    verbs
}

fn subresource(group: &'static str, version: &'static str, kind: &'static str, name: &'static str) -> Subresource {
    const EDIT: &[&str] = &["get", "patch", "update"];
    const STREAM: &[&str] = &["create", "get"];
    const PROXY: &[&str] = &["create", "delete", "get", "patch", "update"];
    let core = |kind: &'static str| ("", "v1", kind);
    let ((group, version, kind), verbs): ((&'static str, &'static str, &'static str), &[&'static str]) = match (kind, name) {
        (_, "scale") => (("autoscaling", "v1", "Scale"), EDIT),
        (_, "eviction") => (("policy", "v1", "Eviction"), &["create"]),
        (_, "token") => (("authentication.k8s.io", "v1", "TokenRequest"), &["create"]),
        (_, "binding") => (core("Binding"), &["create"]),
        (_, "log") => (core("Pod"), &["get"]),
        (_, "finalize") => ((group, version, kind), &["update"]),
        (_, "attach") => (core("PodAttachOptions"), STREAM),
        (_, "exec") => (core("PodExecOptions"), STREAM),
        (_, "portforward") => (core("PodPortForwardOptions"), STREAM),
        ("Node", "proxy") => (core("NodeProxyOptions"), PROXY),
        ("Service", "proxy") => (core("ServiceProxyOptions"), PROXY),
        (_, "proxy") => (core("PodProxyOptions"), PROXY),
        _ => ((group, version, kind), EDIT),
    };
    Subresource {
        name: name.into(),
        body: GroupVersionKind { group: group.into(), version: version.into(), kind: kind.into() },
        verbs: verbs.to_vec(),
    }
}

/// Events of both groups are stored as core/v1, autoscalers as autoscaling/v2, mutating policies as v1beta1.
fn storage(group: &'static str, version: &'static str, kind: &'static str) -> GroupVersionKind {
    let (group, version) = match group {
        "events.k8s.io" => ("", "v1"),
        "autoscaling" => ("autoscaling", "v2"),
        "admissionregistration.k8s.io" if version == "v1alpha1" => (group, "v1beta1"),
        _ => (group, version),
    };
    GroupVersionKind { group: group.into(), version: version.into(), kind: kind.into() }
}

fn storage_prefix(group: &'static str, plural: &'static str) -> Text {
    match group {
        "" | "events.k8s.io" => plural.into(),
        _ => format!("{group}/{plural}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_well_formed() {
        for resource in resources() {
            assert!(resource.plural.chars().all(|letter| letter.is_ascii_lowercase()), "{}", resource.plural);
            assert!(crate::types::by_kind(&resource.group, &resource.version, &resource.kind).is_some(), "{} has no type", resource.kind);
            let twins = resources().iter().filter(|other| other.gvr() == resource.gvr()).count();
            assert_eq!(twins, 1, "{}", resource.plural);
        }
    }

    #[test]
    fn pods_have_the_subresources_of_discovery() {
        let names: Vec<_> = by_kind("", "v1", "Pod").expect("built in").subresources.iter().map(|entry| entry.name.to_string()).collect();
        let expected = ["attach", "binding", "ephemeralcontainers", "eviction", "exec", "log", "portforward", "proxy", "resize", "status"];
        assert_eq!(names, expected);
    }
}
