//! (kind, object or change, findings) tables over the whole path: defaulted and prepared as a request would be.
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{builtin, default, field_error::FieldError, meta, prepare, resource::Resource};

fn resource(group: &str, kind: &str) -> &'static Resource {
    builtin::by_kind(group, "v1", kind).or_else(|| builtin::by_kind(group, "v2", kind)).expect("built in")
}

fn new_object(resource: &Resource, mut object: Value) -> Value {
    if meta::name(&object).is_empty() {
        meta::set(&mut object, "metadata.name", "a");
    }
    if resource.namespaced {
        meta::set(&mut object, "metadata.namespace", "default");
    }
    meta::stamp_new(&mut object, "u", Timestamp::UNIX_EPOCH, "12345");
    default::apply(resource, &mut object);
    prepare::create(resource, &mut object, Timestamp::UNIX_EPOCH);
    object
}

fn created(group: &str, kind: &str, object: Value) -> Vec<String> {
    let resource = resource(group, kind);
    super::create(resource, &new_object(resource, object)).iter().map(FieldError::to_string).collect()
}

fn updated(group: &str, kind: &str, old: Value, change: impl FnOnce(&mut Value)) -> Vec<String> {
    let resource = resource(group, kind);
    let old = new_object(resource, old);
    assert_eq!(super::create(resource, &old), [], "the old object is valid");
    let mut new = old.clone();
    change(&mut new);
    default::apply(resource, &mut new);
    prepare::update(resource, None, &mut new, &old, Timestamp::UNIX_EPOCH);
    super::update(resource, None, &new, &old).iter().map(FieldError::to_string).collect()
}

fn container() -> Value {
    json!({"name": "c", "image": "i"})
}

fn workload(extra: Value) -> Value {
    let mut object = json!({"spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [container()]}}}});
    for (key, value) in extra.as_object().into_iter().flatten() {
        object["spec"][key] = value.clone();
    }
    object
}

#[test]
fn good_objects_pass() {
    let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}});
    for (group, kind, object) in [
        ("", "Pod", json!({"spec": {"containers": [container()]}})),
        (
            "",
            "Pod",
            json!({"spec": {"initContainers": [{"name": "s", "image": "i", "restartPolicy": "Always"}], "volumes": [{"name": "v"}, {"name": "p", "projected": {"sources": [{"configMap": {"name": "x", "items": [{"key": "a", "path": "b"}]}}, {"downwardAPI": {"items": [{"path": "n", "fieldRef": {"fieldPath": "metadata.labels['a']"}}]}}]}}],
                "containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80, "name": "http"}], "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                    "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}], "readinessProbe": {"httpGet": {"port": "http"}},
                    "resources": {"limits": {"cpu": "1", "example.com/gpu": "1"}}}],
                "tolerations": [{"operator": "Exists"}], "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]}}),
        ),
        ("", "Service", json!({"spec": {"ports": [{"port": 80}], "selector": {"a": "b"}}})),
        ("", "Service", json!({"spec": {"type": "ExternalName", "externalName": "example.com"}})),
        ("", "Service", json!({"spec": {"clusterIP": "None"}})),
        ("", "ConfigMap", json!({"data": {"a.b": "c"}})),
        ("", "Secret", json!({"stringData": {"a": "b"}})),
        ("", "Namespace", json!({})),
        ("", "Node", json!({"metadata": {"name": "node-1"}})),
        ("", "PersistentVolumeClaim", json!({"spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}})),
        (
            "",
            "PersistentVolume",
            json!({"spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "hostPath": {"path": "/x"}}}),
        ),
        ("", "ResourceQuota", json!({"spec": {"hard": {"pods": "1", "requests.cpu": "1", "count/jobs.batch": "2"}}})),
        ("", "LimitRange", json!({"spec": {"limits": [{"type": "Container", "max": {"cpu": "1"}}]}})),
        ("apps", "Deployment", workload(json!({}))),
        ("apps", "ReplicaSet", workload(json!({"replicas": 0}))),
        ("apps", "DaemonSet", workload(json!({}))),
        ("apps", "StatefulSet", workload(json!({"serviceName": "s"}))),
        ("batch", "Job", json!({"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container()]}}}})),
        (
            "batch",
            "CronJob",
            json!({"spec": {"schedule": "*/5 * * * *", "timeZone": "UTC", "jobTemplate": {"spec": {"template": {"spec": {"restartPolicy": "OnFailure", "containers": [container()]}}}}}}),
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            json!({"spec": {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}], "ports": [{"port": 80, "endPort": 90}]}]}}),
        ),
        (
            "networking.k8s.io",
            "Ingress",
            json!({"spec": {"rules": [{"host": "*.a.b", "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "s", "port": {"number": 80}}}}]}}]}}),
        ),
        (
            "discovery.k8s.io",
            "EndpointSlice",
            json!({"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}], "ports": [{"port": 80}]}),
        ),
        (
            "rbac.authorization.k8s.io",
            "ClusterRole",
            json!({"metadata": {"name": "system:x"}, "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}]}),
        ),
        (
            "rbac.authorization.k8s.io",
            "RoleBinding",
            json!({"roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "User", "name": "u"}]}),
        ),
        ("policy", "PodDisruptionBudget", json!({"spec": {"minAvailable": "50%"}})),
        (
            "autoscaling",
            "HorizontalPodAutoscaler",
            json!({"spec": {"maxReplicas": 2, "scaleTargetRef": {"kind": "Deployment", "name": "d"}}}),
        ),
        ("scheduling.k8s.io", "PriorityClass", json!({"value": 1000})),
        ("coordination.k8s.io", "Lease", json!({"spec": {"leaseDurationSeconds": 10}})),
        ("storage.k8s.io", "StorageClass", json!({"provisioner": "x.io/p"})),
        (
            "apiextensions.k8s.io",
            "CustomResourceDefinition",
            json!({"metadata": {"name": "foos.x.io"}, "spec": {"group": "x.io", "scope": "Namespaced", "names": {"plural": "foos", "kind": "Foo"}, "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}]}}),
        ),
        (
            "apiregistration.k8s.io",
            "APIService",
            json!({"metadata": {"name": "v1.x.io"}, "spec": {"group": "x.io", "version": "v1", "groupPriorityMinimum": 10, "versionPriority": 10}}),
        ),
    ] {
        assert_eq!(created(group, kind, object), Vec::<String>::new(), "{kind}");
    }
}

#[test]
fn bad_objects_are_explained() {
    let cases: [(&str, &str, Value, &[&str]); 30] = [
        ("", "Pod", json!({"spec": {"containers": []}}), &["spec.containers: Required value"]),
        (
            "",
            "Pod",
            json!({"spec": {"containers": [{"name": "", "image": ""}]}}),
            &["spec.containers[0].name: Required value", "spec.containers[0].image: Required value"],
        ),
        (
            "",
            "Pod",
            json!({"spec": {"restartPolicy": "Sometimes", "containers": [container()]}}),
            &["spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"OnFailure\", \"Never\""],
        ),
        ("", "Pod", json!({"spec": {"containers": [container(), container()]}}), &["spec.containers[1].name: Duplicate value: \"c\""]),
        (
            "",
            "Pod",
            json!({"spec": {"containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}}),
            &["spec.containers[0].volumeMounts[0].name: Not found: \"v\""],
        ),
        (
            "",
            "Pod",
            json!({"spec": {"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}}]}}),
            &["spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1"],
        ),
        (
            "",
            "Pod",
            json!({"spec": {"containers": [{"name": "c", "image": "i", "livenessProbe": {}}]}}),
            &["spec.containers[0].livenessProbe: Required value: must specify a handler type"],
        ),
        (
            "",
            "Pod",
            json!({"metadata": {"labels": {"a": "-"}}, "spec": {"containers": [container()]}}),
            &[
                "metadata.labels: Invalid value: \"-\": a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')",
            ],
        ),
        (
            "",
            "Pod",
            json!({"spec": {"initContainers": [{"name": "i", "image": "i", "livenessProbe": {"exec": {"command": ["x"]}}}], "containers": [container()]}}),
            &["spec.initContainers[0].livenessProbe: Forbidden: may not be set for init containers without restartPolicy=Always"],
        ),
        (
            "",
            "Pod",
            json!({"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/a/../b"}}], "containers": [container()]}}),
            &["spec.volumes[0].hostPath.path: Invalid value: \"/a/../b\": must not contain '..'"],
        ),
        ("", "Service", json!({"spec": {}}), &["spec.ports: Required value"]),
        (
            "",
            "Service",
            json!({"spec": {"ports": [{"port": 80}, {"port": 81}]}}),
            &["spec.ports[0].name: Required value", "spec.ports[1].name: Required value"],
        ),
        (
            "",
            "Service",
            json!({"metadata": {"name": "1a"}, "spec": {"ports": [{"port": 0}]}}),
            &[
                "metadata.name: Invalid value: \"1a\": a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')",
                "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
                "spec.ports[0].targetPort: Invalid value: 0: must be between 1 and 65535, inclusive",
            ],
        ),
        (
            "",
            "ConfigMap",
            json!({"data": {"a b": "c"}}),
            &[
                "data[a b]: Invalid value: \"a b\": a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
            ],
        ),
        ("", "Secret", json!({"type": "kubernetes.io/tls"}), &["data[tls.crt]: Required value", "data[tls.key]: Required value"]),
        (
            "",
            "PersistentVolumeClaim",
            json!({"spec": {"accessModes": ["X"]}}),
            &[
                "spec.accessModes: Unsupported value: \"X\": supported values: \"ReadOnlyMany\", \"ReadWriteMany\", \"ReadWriteOnce\", \"ReadWriteOncePod\"",
                "spec.resources[storage]: Required value",
            ],
        ),
        (
            "apps",
            "Deployment",
            workload(json!({"selector": {"matchLabels": {"x": "y"}}})),
            &["spec.template.metadata.labels: Invalid value: {\"a\":\"b\"}: `selector` does not match template `labels`"],
        ),
        (
            "apps",
            "Deployment",
            workload(json!({"replicas": -1})),
            &["spec.replicas: Invalid value: -1: must be greater than or equal to 0"],
        ),
        (
            "apps",
            "StatefulSet",
            workload(json!({"podManagementPolicy": "X"})),
            &["spec.podManagementPolicy: Invalid value: \"X\": must be 'OrderedReady' or 'Parallel'"],
        ),
        (
            "batch",
            "Job",
            json!({"spec": {"template": {"spec": {"containers": [container()]}}}}),
            &["spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\""],
        ),
        (
            "batch",
            "CronJob",
            json!({"spec": {"schedule": "x", "jobTemplate": {"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container()]}}}}}}),
            &["spec.schedule: Invalid value: \"x\": expected exactly 5 fields, found 1: [x]"],
        ),
        (
            "rbac.authorization.k8s.io",
            "Role",
            json!({"rules": [{"apiGroups": [""], "resources": ["pods"]}]}),
            &["rules[0].verbs: Required value: verbs must contain at least one value"],
        ),
        (
            "rbac.authorization.k8s.io",
            "ClusterRoleBinding",
            json!({"roleRef": {"kind": "Role", "name": "x"}}),
            &["roleRef.kind: Unsupported value: \"Role\": supported values: \"ClusterRole\""],
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            json!({"spec": {"ingress": [{"from": [{}]}]}}),
            &["spec.ingress[0].from[0]: Required value: must specify a peer"],
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            json!({"spec": {"policyTypes": ["Ingress", "egress"], "ingress": [{"ports": [
                {"port": 80, "endPort": 79}, {"port": "web", "endPort": 80}, {"endPort": 80}, {"protocol": "ICMP"}, {"port": 0}, {"port": "-"},
                {"port": 70, "endPort": 65536}]}]}}),
            &[
                "spec.ingress[0].ports[0].endPort: Invalid value: 80: must be greater than or equal to `port`",
                "spec.ingress[0].ports[1].endPort: Invalid value: 80: may not be specified when `port` is non-numeric",
                "spec.ingress[0].ports[2].endPort: Invalid value: 80: may not be specified when `port` is not specified",
                "spec.ingress[0].ports[3].protocol: Unsupported value: \"ICMP\": supported values: \"TCP\", \"UDP\", \"SCTP\"",
                "spec.ingress[0].ports[4].port: Invalid value: 0: must be between 1 and 65535, inclusive",
                "spec.ingress[0].ports[5].port: Invalid value: \"-\": must contain at least one letter (a-z)",
                "spec.ingress[0].ports[5].port: Invalid value: \"-\": must not begin or end with a hyphen",
                "spec.ingress[0].ports[6].endPort: Invalid value: 65536: must be between 1 and 65535, inclusive",
                "spec.policyTypes[1]: Unsupported value: \"egress\": supported values: \"Ingress\", \"Egress\"",
            ],
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            json!({"spec": {"egress": [{"to": [
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8", "11.0.0.0/16", "10.1.0.0/33"]}},
                {"ipBlock": {}}, {"ipBlock": {"cidr": "10.0.0.0"}},
                {"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]}}),
            &[
                "spec.egress[0].to[0].ipBlock.except[0]: Invalid value: \"10.0.0.0/8\": must be a strict subset of `cidr`",
                "spec.egress[0].to[0].ipBlock.except[1]: Invalid value: \"11.0.0.0/16\": must be a strict subset of `cidr`",
                "spec.egress[0].to[0].ipBlock.except[2]: Invalid value: \"10.1.0.0/33\": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
                "spec.egress[0].to[1].ipBlock.cidr: Required value",
                "spec.egress[0].to[2].ipBlock.cidr: Invalid value: \"10.0.0.0\": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
                "spec.egress[0].to[3]: Forbidden: may not specify both ipBlock and another peer",
            ],
        ),
        (
            "policy",
            "PodDisruptionBudget",
            json!({"spec": {"minAvailable": "x"}}),
            &[
                "spec.minAvailable: Invalid value: \"x\": a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')",
            ],
        ),
        (
            "scheduling.k8s.io",
            "PriorityClass",
            json!({"value": 2000000000}),
            &["value: Forbidden: maximum allowed value of a user defined priority is 1000000000"],
        ),
        ("storage.k8s.io", "StorageClass", json!({}), &["provisioner: Required value"]),
        (
            "",
            "LimitRange",
            json!({"spec": {"limits": [{"type": "Pod", "min": {"cpu": "2"}, "max": {"cpu": "1"}}]}}),
            &["spec.limits[0].min[cpu]: Invalid value: \"2\": min value 2 is greater than max value 1"],
        ),
    ];
    for (group, kind, object, expected) in cases {
        assert_eq!(created(group, kind, object), expected, "{kind}");
    }
}

#[test]
fn forbidden_changes_are_explained() {
    let pod = || json!({"spec": {"containers": [container()]}});
    assert_eq!(updated("", "Pod", pod(), |pod| pod["spec"]["containers"][0]["image"] = "j".into()), Vec::<String>::new());
    assert_eq!(updated("", "Pod", pod(), |pod| meta::set(pod, "metadata.labels", json!({"a": "b"}))), Vec::<String>::new());
    let changed = updated("", "Pod", pod(), |pod| pod["spec"]["nodeName"] = "n".into());
    assert!(
        changed[0].starts_with("spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`"),
        "{changed:?}"
    );
    let added = updated("", "Pod", pod(), |pod| {
        pod["spec"]["containers"] =
            json!([container(), {"name": "d", "image": "i", "imagePullPolicy": "Always", "terminationMessagePolicy": "File"}])
    });
    assert_eq!(added, ["spec.containers: Forbidden: pod updates may not add or remove containers"]);
    type Change = (&'static str, &'static str, Value, fn(&mut Value), &'static [&'static str]);
    let cases: [Change; 9] = [
        (
            "apps",
            "Deployment",
            workload(json!({})),
            |object| meta::set(object, "spec.selector.matchLabels.a", "c"),
            &[
                "spec.template.metadata.labels: Invalid value: {\"a\":\"b\"}: `selector` does not match template `labels`",
                "spec.selector: Invalid value: {\"matchLabels\":{\"a\":\"c\"}}: field is immutable",
            ],
        ),
        (
            "apps",
            "StatefulSet",
            workload(json!({"serviceName": "s"})),
            |object| meta::set(object, "spec.serviceName", "t"),
            &[
                "spec: Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
            ],
        ),
        (
            "",
            "ConfigMap",
            json!({"immutable": true, "data": {"a": "b"}}),
            |object| meta::set(object, "data.a", "c"),
            &["data: Forbidden: field is immutable when `immutable` is set"],
        ),
        ("", "Secret", json!({}), |object| meta::set(object, "type", "x"), &["type: Invalid value: \"x\": field is immutable"]),
        (
            "",
            "Service",
            json!({"spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]}}),
            |object| meta::set(object, "spec.clusterIP", "10.0.0.2"),
            &["spec.clusterIPs[0]: Invalid value: [\"10.0.0.2\"]: may not change once set"],
        ),
        (
            "batch",
            "Job",
            json!({"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container()]}}}}),
            |object| meta::set(object, "spec.completions", 2),
            &["spec.completions: Invalid value: 2: field is immutable"],
        ),
        (
            "rbac.authorization.k8s.io",
            "RoleBinding",
            json!({"roleRef": {"kind": "Role", "name": "r"}}),
            |object| meta::set(object, "roleRef.name", "s"),
            &[
                "roleRef: Invalid value: {\"kind\":\"Role\",\"name\":\"s\",\"apiGroup\":\"rbac.authorization.k8s.io\"}: cannot change roleRef",
            ],
        ),
        (
            "storage.k8s.io",
            "StorageClass",
            json!({"provisioner": "a"}),
            |object| meta::set(object, "provisioner", "b"),
            &["provisioner: Forbidden: updates to provisioner are forbidden."],
        ),
        (
            "",
            "Namespace",
            json!({}),
            |object| meta::set(object, "metadata.uid", "other"),
            &["metadata.uid: Invalid value: \"other\": field is immutable"],
        ),
    ];
    for (group, kind, old, change, expected) in cases {
        assert_eq!(updated(group, kind, old, change), expected, "{kind}");
    }
}

#[test]
fn delete_options_are_checked() {
    assert_eq!(super::delete_options(&json!({"propagationPolicy": "Foreground"})), []);
    assert_eq!(super::delete_options(&json!({"propagationPolicy": "X", "orphanDependents": true})).len(), 2);
}
