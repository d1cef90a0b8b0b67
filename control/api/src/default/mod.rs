//! Defaulting: what upstream fills in where a request says nothing. A walk over the kind's structs, outer ones first, applies each
//! struct's facts wherever the struct occurs; so a pod template gets the same defaults in every kind.
mod kinds;
mod pods;

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use crate::meta::is_empty;
use crate::quantity::Quantity;
use crate::resource::Resource;
use crate::types::{self, Shape, TypeId};

/// A struct's fields.
type Fields = Map<String, Value>;

/// Constant defaults by struct: `field=json` where it is absent, `field:=json` where it is absent or empty (fields whose zero value means
/// unset), `field+=json` makes a missing struct that upstream does not hold by pointer.
const CONSTANTS: &str = r#"
core/v1 Pod spec+={} metadata+={}
core/v1 PodSpec dnsPolicy:="ClusterFirst" restartPolicy:="Always" securityContext={} terminationGracePeriodSeconds=30 schedulerName:="default-scheduler"
core/v1 Container terminationMessagePath:="/dev/termination-log" terminationMessagePolicy:="File" resources+={}
core/v1 EphemeralContainer terminationMessagePath:="/dev/termination-log" terminationMessagePolicy:="File" resources+={}
core/v1 ContainerPort protocol:="TCP"
core/v1 Probe timeoutSeconds:=1 periodSeconds:=10 successThreshold:=1 failureThreshold:=3
core/v1 HTTPGetAction path:="/" scheme:="HTTP"
core/v1 GRPCAction service=""
core/v1 FileKeySelector optional=false
core/v1 ObjectFieldSelector apiVersion:="v1"
core/v1 ResourceFieldSelector divisor:="0"
core/v1 SecretVolumeSource defaultMode=420
core/v1 ConfigMapVolumeSource defaultMode=420
core/v1 DownwardAPIVolumeSource defaultMode=420
core/v1 ProjectedVolumeSource defaultMode=420
core/v1 ServiceAccountTokenProjection expirationSeconds=3600
core/v1 HostPathVolumeSource type=""
core/v1 RBDVolumeSource pool:="rbd" user:="admin" keyring:="/etc/ceph/keyring"
core/v1 RBDPersistentVolumeSource pool:="rbd" user:="admin" keyring:="/etc/ceph/keyring"
core/v1 ISCSIVolumeSource iscsiInterface:="default"
core/v1 ISCSIPersistentVolumeSource iscsiInterface:="default"
core/v1 AzureDiskVolumeSource cachingMode="ReadWrite" fsType="ext4" readOnly=false kind="Shared"
core/v1 ScaleIOVolumeSource storageMode:="ThinProvisioned" fsType:="xfs"
core/v1 ScaleIOPersistentVolumeSource storageMode:="ThinProvisioned" fsType:="xfs"
core/v1 Secret type:="Opaque"
core/v1 EndpointPort protocol:="TCP"
core/v1 ServicePort protocol:="TCP"
core/v1 ReplicationController spec+={}
core/v1 ReplicationControllerSpec replicas=1
core/v1 Namespace spec+={} status+={}
core/v1 NamespaceStatus phase:="Active"
core/v1 PersistentVolume spec+={} status+={}
core/v1 PersistentVolumeSpec persistentVolumeReclaimPolicy:="Retain" volumeMode="Filesystem"
core/v1 PersistentVolumeStatus phase:="Pending"
core/v1 PersistentVolumeClaim spec+={} status+={}
core/v1 PersistentVolumeClaimSpec volumeMode="Filesystem"
core/v1 PersistentVolumeClaimStatus phase:="Pending"
core/v1 PodTemplateSpec metadata+={} spec+={}
apps/v1 Deployment spec+={}
apps/v1 DeploymentSpec replicas=1 revisionHistoryLimit=10 progressDeadlineSeconds=600 strategy+={}
apps/v1 DeploymentStrategy type:="RollingUpdate"
apps/v1 RollingUpdateDeployment maxUnavailable="25%" maxSurge="25%"
apps/v1 DaemonSet spec+={}
apps/v1 DaemonSetSpec revisionHistoryLimit=10 updateStrategy+={}
apps/v1 DaemonSetUpdateStrategy type:="RollingUpdate"
apps/v1 RollingUpdateDaemonSet maxUnavailable=1 maxSurge=0
apps/v1 StatefulSet spec+={}
apps/v1 StatefulSetSpec podManagementPolicy:="OrderedReady" replicas=1 revisionHistoryLimit=10 updateStrategy+={} persistentVolumeClaimRetentionPolicy={}
apps/v1 StatefulSetPersistentVolumeClaimRetentionPolicy whenDeleted:="Retain" whenScaled:="Retain"
apps/v1 RollingUpdateStatefulSetStrategy partition=0
apps/v1 ReplicaSet spec+={}
apps/v1 ReplicaSetSpec replicas=1
batch/v1 CronJob spec+={}
batch/v1 CronJobSpec concurrencyPolicy:="Allow" suspend=false successfulJobsHistoryLimit=3 failedJobsHistoryLimit=1
batch/v1 PodFailurePolicyOnPodConditionsPattern status:="True"
autoscaling/v1 HorizontalPodAutoscalerSpec minReplicas=1
autoscaling/v2 HorizontalPodAutoscalerSpec minReplicas=1
discovery/v1 EndpointPort name="" protocol="TCP"
networking/v1 NetworkPolicyPort protocol="TCP"
networking/v1 IngressClassParametersReference scope="Cluster"
scheduling/v1 PriorityClass preemptionPolicy="PreemptLowerPriority"
storage/v1 StorageClass reclaimPolicy="Delete" volumeBindingMode="Immediate"
storage/v1 CSIDriverSpec attachRequired=true podInfoOnMount=false storageCapacity=false fsGroupPolicy="ReadWriteOnceWithFSType" volumeLifecycleModes:=["Persistent"] requiresRepublish=false seLinuxMount=false
authentication/v1 TokenRequestSpec expirationSeconds=3600
admissionregistration/v1 ValidatingWebhook failurePolicy="Fail" matchPolicy="Equivalent" namespaceSelector={} objectSelector={} timeoutSeconds=10
admissionregistration/v1 MutatingWebhook failurePolicy="Fail" matchPolicy="Equivalent" namespaceSelector={} objectSelector={} timeoutSeconds=10 reinvocationPolicy="Never"
admissionregistration/v1 RuleWithOperations scope="*"
admissionregistration/v1 NamedRuleWithOperations scope="*"
admissionregistration/v1 ServiceReference port=443
admissionregistration/v1alpha1 NamedRuleWithOperations scope="*"
admissionregistration/v1alpha1 MutatingAdmissionPolicySpec failurePolicy="Fail"
admissionregistration/v1alpha1 MatchResources matchPolicy="Equivalent" namespaceSelector={} objectSelector={}
admissionregistration/v1beta1 NamedRuleWithOperations scope="*"
admissionregistration/v1beta1 MutatingAdmissionPolicySpec failurePolicy="Fail"
admissionregistration/v1beta1 MatchResources matchPolicy="Equivalent" namespaceSelector={} objectSelector={}
admissionregistration/v1 ValidatingAdmissionPolicySpec failurePolicy="Fail"
admissionregistration/v1 MatchResources matchPolicy="Equivalent" namespaceSelector={} objectSelector={}
apiextensions/v1 ServiceReference port=443
apiextensions/v1 CustomResourceDefinitionSpec conversion={"strategy":"None"}
apiregistration/v1 ServiceReference port=443
flowcontrol/v1 FlowSchemaSpec matchingPrecedence:=1000
flowcontrol/v1 ExemptPriorityLevelConfiguration nominalConcurrencyShares=0 lendablePercent=0
flowcontrol/v1 LimitedPriorityLevelConfiguration nominalConcurrencyShares=30 lendablePercent=0
flowcontrol/v1 QueuingConfiguration handSize:=8 queues:=64 queueLengthLimit:=50
resource/v1 DeviceToleration operator:="Equal"
"#;

/// Fills in a struct's fields.
type Computed = fn(&mut Fields);

/// Defaults that need code, by struct.
const COMPUTED: &[(&str, &str, Computed)] = &[
    ("core/v1", "Pod", pods::pod),
    ("core/v1", "Container", pods::container),
    ("core/v1", "EphemeralContainer", pods::container),
    ("core/v1", "Volume", pods::volume),
    ("core/v1", "ServiceSpec", kinds::service_spec),
    ("core/v1", "Service", kinds::service),
    ("core/v1", "Namespace", kinds::namespace),
    ("core/v1", "NodeStatus", kinds::node_status),
    ("core/v1", "LimitRangeItem", kinds::limit_range_item),
    ("core/v1", "ReplicationController", kinds::replication_controller),
    ("apps/v1", "DeploymentStrategy", kinds::rolling_update),
    ("apps/v1", "DaemonSetUpdateStrategy", kinds::rolling_update),
    ("apps/v1", "StatefulSetUpdateStrategy", kinds::stateful_set_strategy),
    ("apps/v1", "StatefulSetSpec", kinds::stateful_set_spec),
    ("batch/v1", "Job", kinds::job),
    ("autoscaling/v2", "HorizontalPodAutoscalerSpec", kinds::autoscaler),
    ("networking/v1", "NetworkPolicySpec", kinds::network_policy),
    ("rbac/v1", "RoleBinding", kinds::role_binding),
    ("rbac/v1", "ClusterRoleBinding", kinds::role_binding),
    ("rbac/v1", "Subject", kinds::subject),
    ("resource/v1", "ExactDeviceRequest", kinds::device_request),
    ("resource/v1", "DeviceSubRequest", kinds::device_request),
    ("apiextensions/v1", "CustomResourceDefinitionNames", kinds::definition_names),
];

#[derive(Clone, Copy, PartialEq)]
enum When {
    Absent,
    Empty,
}

struct Constant {
    field: &'static str,
    when: When,
    value: Value,
}

/// Per struct: its defaults, and whether it or anything below it has any.
struct Facts {
    constants: Vec<Vec<Constant>>,
    computed: Vec<Option<Computed>>,
    reaches: Vec<bool>,
}

static FACTS: LazyLock<Facts> = LazyLock::new(Facts::read);

impl Facts {
    fn read() -> Facts {
        let graph = types::graph();
        let mut constants: HashMap<TypeId, Vec<Constant>> = HashMap::new();
        for line in CONSTANTS.lines().filter(|line| !line.is_empty()) {
            let mut words = line.split(' ');
            let (package, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let Some(found) = graph.by_name(package, name) else { continue };
            constants.insert(found.id, words.filter_map(constant).collect());
        }
        let count = graph.types.len();
        let mut facts = Facts { constants: Vec::with_capacity(count), computed: vec![None; count], reaches: vec![false; count] };
        for id in 0..count {
            facts.constants.push(constants.remove(&id).unwrap_or_default());
            facts.reaches[id] = !facts.constants[id].is_empty();
        }
        for (package, name, function) in COMPUTED {
            if let Some(found) = graph.by_name(package, name) {
                facts.computed[found.id] = Some(*function);
                facts.reaches[found.id] = true;
            }
        }
        let mut changed = true;
        while changed {
            changed = false;
            for found in &graph.types {
                if !facts.reaches[found.id] && found.fields.iter().any(|field| facts.shape_reaches(&field.shape)) {
                    facts.reaches[found.id] = true;
                    changed = true;
                }
            }
        }
        facts
    }

    fn shape_reaches(&self, shape: &Shape) -> bool {
        match shape {
            Shape::Struct(id) => self.reaches[*id],
            Shape::List(item) => self.shape_reaches(item),
            Shape::Map(item) => **item == Shape::Quantity || self.shape_reaches(item),
            _ => false,
        }
    }

    fn structure(&self, id: TypeId, value: &mut Value) {
        let Value::Object(map) = value else { return };
        for constant in &self.constants[id] {
            match map.get(constant.field) {
                Some(current) if !current.is_null() && (constant.when == When::Absent || !is_empty(current)) => {}
                _ => {
                    map.insert(constant.field.to_string(), constant.value.clone());
                }
            }
        }
        if let Some(function) = self.computed[id] {
            function(map);
        }
        let found = &types::graph().types[id];
        for (key, item) in map.iter_mut() {
            if let Some(field) = found.field(key) {
                self.value(&field.shape, item);
            }
        }
    }

    fn value(&self, shape: &Shape, value: &mut Value) {
        match (shape, value) {
            (Shape::Struct(id), value) if self.reaches[*id] => self.structure(*id, value),
            (Shape::List(item), Value::Array(items)) if self.shape_reaches(item) => {
                items.iter_mut().for_each(|entry| self.value(item, entry));
            }
            (Shape::Map(item), Value::Object(map)) if **item == Shape::Quantity => round_up(map),
            (Shape::Map(item), Value::Object(map)) if self.shape_reaches(item) => {
                map.values_mut().for_each(|entry| self.value(item, entry));
            }
            _ => {}
        }
    }
}

fn constant(word: &'static str) -> Option<Constant> {
    let (field, value) = word.split_once('=')?;
    let (field, when) = match field.strip_suffix(':') {
        Some(field) => (field, When::Empty),
        None => (field.strip_suffix('+').unwrap_or(field), When::Absent),
    };
    Some(Constant { field, when, value: serde_json::from_str(value).ok()? })
}

/// Resource lists keep no more than thousandths.
fn round_up(map: &mut Fields) {
    for value in map.values_mut() {
        if let Ok(quantity) = Quantity::from_value(value) {
            *value = quantity.round_up_to_milli().into();
        }
    }
}

/// Applies the kind's defaults in place; idempotent. Custom resources take their schema's.
pub fn apply(resource: &Resource, object: &mut Value) {
    if let Some(schema) = resource.custom.as_ref().and_then(|custom| custom.schema.as_ref()) {
        crate::schema::default(schema, object);
        return;
    }
    apply_as(&resource.group, &resource.version, &resource.kind, object);
}

/// The same for bodies of subresources: `("authentication.k8s.io", "v1", "TokenRequest")`.
pub fn apply_as(group: &str, version: &str, kind: &str, object: &mut Value) {
    if let Some(found) = types::by_kind(group, version, kind) {
        FACTS.structure(found.id, object);
    }
}

/// The constant default of a struct's field, where it has one.
pub fn constant_of(id: TypeId, field: &str) -> Option<&'static Value> {
    FACTS.constants[id].iter().find(|constant| constant.field == field).map(|constant| &constant.value)
}

/// Inserts where the key is missing or null.
fn put(fields: &mut Fields, key: &str, value: impl Into<Value>) {
    if fields.get(key).is_none_or(Value::is_null) {
        fields.insert(key.to_string(), value.into());
    }
}

fn text<'a>(fields: &'a Fields, key: &str) -> &'a str {
    fields.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn defaulted(group: &str, version: &str, kind: &str, mut object: Value) -> Value {
        apply_as(group, version, kind, &mut object);
        let mut again = object.clone();
        apply_as(group, version, kind, &mut again);
        assert_eq!(object, again, "defaulting {kind} is idempotent");
        object
    }

    #[test]
    fn every_fact_names_a_struct_and_its_field() {
        for line in CONSTANTS.lines().filter(|line| !line.is_empty()) {
            let words: Vec<&str> = line.split(' ').collect();
            let found = types::graph().by_name(words[0], words[1]).unwrap_or_else(|| panic!("{line}"));
            for word in &words[2..] {
                let fact = constant(Box::leak(word.to_string().into_boxed_str())).unwrap_or_else(|| panic!("{word}"));
                assert!(found.field(fact.field).is_some(), "{line}: {}", fact.field);
            }
        }
        for (package, name, _) in COMPUTED {
            assert!(types::graph().by_name(package, name).is_some(), "{package} {name}");
        }
    }

    #[test]
    fn pods_get_everything_upstream_gives_them() {
        let pod = json!({"metadata": {"name": "a"}, "spec": {
            "hostNetwork": true,
            "containers": [{"name": "c", "image": "nginx", "ports": [{"containerPort": 80}],
                "resources": {"limits": {"cpu": "1"}}, "livenessProbe": {"httpGet": {"port": 80}},
                "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}],
            "volumes": [{"name": "e"}, {"name": "s", "secret": {"secretName": "s"}},
                {"name": "p", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}, {"name": "h", "hostPath": {"path": "/"}}]}});
        let pod = defaulted("", "v1", "Pod", pod);
        let expected = json!({
            "hostNetwork": true,
            "containers": [{"name": "c", "image": "nginx", "ports": [{"containerPort": 80, "hostPort": 80, "protocol": "TCP"}],
                "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}},
                "livenessProbe": {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3},
                "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name", "apiVersion": "v1"}}}],
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File", "imagePullPolicy": "Always"}],
            "volumes": [{"name": "e", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "s", "defaultMode": 420}},
                {"name": "p", "projected": {"sources": [{"serviceAccountToken": {"path": "t", "expirationSeconds": 3600}}], "defaultMode": 420}},
                {"name": "h", "hostPath": {"path": "/", "type": ""}}],
            "dnsPolicy": "ClusterFirst", "restartPolicy": "Always", "securityContext": {}, "terminationGracePeriodSeconds": 30,
            "schedulerName": "default-scheduler", "enableServiceLinks": true});
        assert_eq!(pod["spec"], expected);
    }

    #[test]
    fn workloads_default_their_templates() {
        let template = json!({"spec": {"containers": [{"name": "c", "image": "a:1", "resources": {"limits": {"cpu": "1"}}}]}});
        let deployment = defaulted("apps", "v1", "Deployment", json!({"spec": {"template": template.clone()}}));
        assert_eq!(
            deployment["spec"]["strategy"],
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}})
        );
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["imagePullPolicy"], "IfNotPresent");
        assert_eq!(container["resources"], json!({"limits": {"cpu": "1"}}), "requests are a pod's alone");
        let recreate = defaulted("apps", "v1", "Deployment", json!({"spec": {"strategy": {"type": "Recreate"}, "replicas": 0}}));
        assert_eq!(recreate["spec"]["strategy"], json!({"type": "Recreate"}));
        assert_eq!(recreate["spec"]["replicas"], 0);
        let job = defaulted("batch", "v1", "Job", json!({"spec": {"template": {"metadata": {"labels": {"a": "b"}}, "spec": {}}}}));
        assert_eq!(job["metadata"]["labels"], json!({"a": "b"}));
        for (field, value) in [
            ("completions", json!(1)),
            ("parallelism", json!(1)),
            ("backoffLimit", json!(6)),
            ("completionMode", json!("NonIndexed")),
            ("suspend", json!(false)),
            ("podReplacementPolicy", json!("TerminatingOrFailed")),
            ("manualSelector", json!(false)),
        ] {
            assert_eq!(job["spec"][field], value, "{field}");
        }
        let set =
            defaulted("apps", "v1", "StatefulSet", json!({"spec": {"volumeClaimTemplates": [{"metadata": {"name": "d"}, "spec": {}}]}}));
        assert_eq!(set["spec"]["volumeClaimTemplates"][0]["spec"], json!({"volumeMode": "Filesystem"}));
        assert_eq!(set["spec"]["updateStrategy"], json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}));
    }

    #[test]
    fn services_default_by_their_type() {
        for (spec, expected) in [
            (
                json!({"ports": [{"port": 80}]}),
                json!({"ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}], "sessionAffinity": "None", "type": "ClusterIP", "internalTrafficPolicy": "Cluster"}),
            ),
            (
                json!({"type": "LoadBalancer", "sessionAffinity": "ClientIP"}),
                json!({"type": "LoadBalancer", "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}}, "externalTrafficPolicy": "Cluster", "internalTrafficPolicy": "Cluster", "allocateLoadBalancerNodePorts": true}),
            ),
            (
                json!({"type": "ExternalName", "externalName": "a.b"}),
                json!({"type": "ExternalName", "externalName": "a.b", "sessionAffinity": "None"}),
            ),
        ] {
            let service = defaulted("", "v1", "Service", json!({"spec": spec}));
            assert_eq!(service["spec"], expected);
        }
    }

    #[test]
    fn other_kinds_have_theirs() {
        for (group, version, kind, object, path, expected) in [
            ("", "v1", "Namespace", json!({"metadata": {"name": "a"}}), "metadata.labels", json!({"kubernetes.io/metadata.name": "a"})),
            ("", "v1", "Secret", json!({}), "type", json!("Opaque")),
            ("", "v1", "PersistentVolumeClaim", json!({}), "status.phase", json!("Pending")),
            (
                "networking.k8s.io",
                "v1",
                "NetworkPolicy",
                json!({"spec": {"egress": [{}]}}),
                "spec.policyTypes",
                json!(["Ingress", "Egress"]),
            ),
            (
                "rbac.authorization.k8s.io",
                "v1",
                "RoleBinding",
                json!({"subjects": [{"kind": "User"}, {"kind": "ServiceAccount"}], "roleRef": {"kind": "Role"}}),
                "subjects",
                json!([{"kind": "User", "apiGroup": "rbac.authorization.k8s.io"}, {"kind": "ServiceAccount"}]),
            ),
            (
                "apiextensions.k8s.io",
                "v1",
                "CustomResourceDefinition",
                json!({"spec": {"names": {"kind": "Foo"}}}),
                "spec.names",
                json!({"kind": "Foo", "singular": "foo", "listKind": "FooList"}),
            ),
            (
                "",
                "v1",
                "LimitRange",
                json!({"spec": {"limits": [{"type": "Container", "max": {"cpu": "1"}, "min": {"memory": "1"}}]}}),
                "spec.limits",
                json!([{"type": "Container", "max": {"cpu": "1"}, "min": {"memory": "1"}, "default": {"cpu": "1"}, "defaultRequest": {"cpu": "1", "memory": "1"}}]),
            ),
            (
                "autoscaling",
                "v2",
                "HorizontalPodAutoscaler",
                json!({"spec": {"behavior": {"scaleDown": {"selectPolicy": "Min"}}, "metrics": [{}]}}),
                "spec.behavior.scaleDown",
                json!({"selectPolicy": "Min", "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}]}),
            ),
        ] {
            let object = defaulted(group, version, kind, object);
            assert_eq!(crate::meta::get(&object, path), &expected, "{kind}");
        }
    }
}
