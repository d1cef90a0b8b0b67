//! `kubectl get`: columns and cells per kind.
mod cells;
mod columns;
mod custom;
mod pods;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::convert;
use crate::meta;
use crate::resource::Resource;

/// What a row carries besides its cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IncludeObject {
    None,
    #[default]
    Metadata,
    Object,
}

impl IncludeObject {
    /// The `includeObject` query parameter; anything else is an error's text.
    pub fn parse(text: &str) -> Result<IncludeObject, String> {
        match text {
            "None" => Ok(IncludeObject::None),
            "" | "Metadata" => Ok(IncludeObject::Metadata),
            "Object" => Ok(IncludeObject::Object),
            other => Err(format!("unrecognized includeObject value: {other:?}")),
        }
    }
}

/// One column of a kind.
struct Column {
    name: &'static str,
    kind: &'static str,
    /// Shown only by `-o wide` if 1.
    priority: i32,
    cell: Cell,
}

/// Where a cell's value comes from.
enum Cell {
    Name,
    Age,
    /// The text at a dotted path, or the other text if it is absent or empty.
    Text(&'static str, &'static str),
    /// The number at a dotted path, 0 if absent.
    Number(&'static str),
    /// The flag at a dotted path, or the other one if absent.
    Flag(&'static str, bool),
    /// How many items or entries are at a dotted path.
    Count(&'static str),
    /// Age of the time at a dotted path, or the other text.
    Since(&'static str, &'static str),
    Computed(fn(&Value) -> Value),
    Timed(fn(&Value, Timestamp) -> Value),
}

impl Cell {
    fn value(&self, object: &Value, now: Timestamp) -> Value {
        let age = |path: &str| crate::time::age(meta::text(object, path), now);
        match self {
            Cell::Name => meta::name(object).into(),
            Cell::Age => age("metadata.creationTimestamp").into(),
            Cell::Text(path, absent) => match meta::get(object, path) {
                Value::String(text) if !text.is_empty() => text.clone().into(),
                Value::Number(number) => number.to_string().into(),
                _ => (*absent).into(),
            },
            Cell::Number(path) => meta::get(object, path).as_i64().unwrap_or_default().into(),
            Cell::Flag(path, absent) => meta::get(object, path).as_bool().unwrap_or(*absent).into(),
            Cell::Count(path) => match meta::get(object, path) {
                Value::Array(items) => items.len().into(),
                Value::Object(map) => map.len().into(),
                _ => 0.into(),
            },
            Cell::Since(path, absent) if meta::text(object, path).is_empty() => (*absent).into(),
            Cell::Since(path, _) => age(path).into(),
            Cell::Computed(function) => function(object),
            Cell::Timed(function) => function(object, now),
        }
    }
}

/// `columnDefinitions` of the resource.
pub fn columns(resource: &Resource) -> Vec<Value> {
    if resource.custom.is_some() {
        return custom::columns(resource);
    }
    let definition = |column: &Column| {
        let format = if column.name == "Name" { "name" } else { "" };
        let description = format!("{} of the {}", column.name, resource.kind);
        json!({"name": column.name, "type": column.kind, "format": format, "description": description, "priority": column.priority})
    };
    columns::of(resource).iter().map(definition).collect()
}

/// The cells of one object, in the columns' order.
fn cells(resource: &Resource, object: &Value, now: Timestamp) -> Vec<Value> {
    if resource.custom.is_some() {
        return custom::cells(resource, object, now);
    }
    let columns = columns::of(resource);
    if convert::is_identity(resource) {
        return columns.iter().map(|column| column.cell.value(object, now)).collect();
    }
    // Columns are written for the stored version.
    let mut stored = object.clone();
    convert::to_storage(resource, &mut stored);
    columns.iter().map(|column| column.cell.value(&stored, now)).collect()
}

/// One row: `cells` and, as asked, `object`.
pub fn row(resource: &Resource, object: &Value, include: IncludeObject, now: Timestamp) -> Value {
    let mut row = json!({"cells": cells(resource, object, now)});
    if resource.is("", "Pod")
        && let Some(conditions) = pods::conditions(object)
    {
        row["conditions"] = conditions;
    }
    row["object"] = match include {
        IncludeObject::None => Value::Null,
        IncludeObject::Object => object.clone(),
        IncludeObject::Metadata => {
            json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
        }
    };
    row
}

/// A whole `meta.k8s.io/v1 Table`; `list_metadata` is the list's (resourceVersion, continue, remainingItemCount).
pub fn render<'a>(
    resource: &Resource,
    list_metadata: Value,
    objects: impl IntoIterator<Item = &'a Value>,
    include: IncludeObject,
    now: Timestamp,
) -> Value {
    let rows: Vec<Value> = objects.into_iter().map(|object| row(resource, object, include, now)).collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_metadata,
        "columnDefinitions": columns(resource),
        "rows": rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(group: &str, version: &str, kind: &str, object: Value) -> Vec<String> {
        let resource = crate::builtin::by_kind(group, version, kind).expect("built in");
        let now = "2024-01-01T01:00:00Z".parse().expect("a time");
        let mut object = object;
        meta::set(&mut object, "metadata.name", "x");
        meta::set(&mut object, "metadata.creationTimestamp", "2024-01-01T00:00:00Z");
        let cells = cells(resource, &object, now);
        assert_eq!(cells.len(), columns(resource).len(), "{kind}");
        cells.into_iter().map(|cell| cell.as_str().map_or_else(|| cell.to_string(), String::from)).collect()
    }

    #[test]
    fn every_kind_has_columns() {
        for resource in crate::builtin::resources() {
            assert!(!shown(&resource.group, &resource.version, &resource.kind, json!({})).is_empty(), "{}", resource.kind);
        }
    }

    #[test]
    fn cells_read_as_kubectl_shows_them() {
        let template = json!({"spec": {"containers": [{"name": "c", "image": "i"}, {"name": "d", "image": "j"}]}});
        let cases: [(&str, &str, &str, Value, &[&str]); 21] = [
            (
                "apps",
                "v1",
                "Deployment",
                json!({"spec": {"replicas": 3, "template": template, "selector": {"matchLabels": {"b": "c", "a": "b"}}}, "status": {"readyReplicas": 2, "updatedReplicas": 3}}),
                &["x", "2/3", "3", "0", "60m", "c,d", "i,j", "a=b,b=c"],
            ),
            (
                "apps",
                "v1",
                "DaemonSet",
                json!({"status": {"desiredNumberScheduled": 2, "numberReady": 1}}),
                &["x", "2", "0", "1", "0", "0", "<none>", "60m", "", "", "<none>"],
            ),
            (
                "batch",
                "v1",
                "Job",
                json!({"spec": {"completions": 1}, "status": {"succeeded": 1, "startTime": "2024-01-01T00:00:00Z", "completionTime": "2024-01-01T00:00:05Z", "conditions": [{"type": "Complete", "status": "True"}]}}),
                &["x", "Complete", "1/1", "5s", "60m", "", "", "<none>"],
            ),
            (
                "batch",
                "v1",
                "CronJob",
                json!({"spec": {"schedule": "* * * * *", "suspend": false}, "status": {"active": [{}]}}),
                &["x", "* * * * *", "<none>", "False", "1", "<none>", "60m", "", "", "<none>"],
            ),
            (
                "",
                "v1",
                "Service",
                json!({"spec": {"type": "NodePort", "clusterIPs": ["10.0.0.1"], "ports": [{"port": 80, "nodePort": 30000, "protocol": "TCP"}], "selector": {"a": "b"}}}),
                &["x", "NodePort", "10.0.0.1", "<none>", "80:30000/TCP", "60m", "a=b"],
            ),
            (
                "",
                "v1",
                "Service",
                json!({"spec": {"type": "LoadBalancer"}}),
                &["x", "LoadBalancer", "<none>", "<pending>", "<none>", "60m", "<none>"],
            ),
            (
                "",
                "v1",
                "Endpoints",
                json!({"subsets": [{"addresses": [{"ip": "1"}, {"ip": "2"}], "ports": [{"port": 80}, {"port": 81}]}]}),
                &["x", "1:80,2:80,1:81 + 1 more...", "60m"],
            ),
            (
                "discovery.k8s.io",
                "v1",
                "EndpointSlice",
                json!({"addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [{"addresses": ["1"]}]}),
                &["x", "IPv4", "80", "1", "60m"],
            ),
            (
                "",
                "v1",
                "Node",
                json!({"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}, "spec": {"unschedulable": true}, "status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "10.0.0.2"}], "nodeInfo": {"kubeletVersion": "v1"}}}),
                &[
                    "x",
                    "Ready,SchedulingDisabled",
                    "control-plane",
                    "60m",
                    "v1",
                    "10.0.0.2",
                    "<none>",
                    "<unknown>",
                    "<unknown>",
                    "<unknown>",
                ],
            ),
            ("", "v1", "Secret", json!({"type": "Opaque", "data": {"a": "b"}}), &["x", "Opaque", "1", "60m"]),
            ("", "v1", "ConfigMap", json!({"data": {"a": "b"}, "binaryData": {"c": "d"}}), &["x", "2", "60m"]),
            (
                "",
                "v1",
                "PersistentVolumeClaim",
                json!({"spec": {"volumeName": "v", "storageClassName": "s"}, "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce", "ReadOnlyMany"]}}),
                &["x", "Bound", "v", "1Gi", "RWO,ROX", "s", "<unset>", "60m", "<unset>"],
            ),
            (
                "rbac.authorization.k8s.io",
                "v1",
                "RoleBinding",
                json!({"roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "User", "name": "u"}, {"kind": "ServiceAccount", "namespace": "n", "name": "s"}]}),
                &["x", "Role/r", "60m", "u", "", "n/s"],
            ),
            (
                "networking.k8s.io",
                "v1",
                "Ingress",
                json!({"spec": {"rules": [{"host": "a"}, {"host": "b"}, {"host": "c"}, {"host": "d"}], "tls": [{}]}}),
                &["x", "<none>", "a,b,c + 1 more...", "", "80, 443", "60m"],
            ),
            (
                "networking.k8s.io",
                "v1",
                "NetworkPolicy",
                json!({"spec": {"podSelector": {"matchLabels": {"a": "b"}}}}),
                &["x", "a=b", "60m"],
            ),
            ("policy", "v1", "PodDisruptionBudget", json!({"spec": {"minAvailable": 1}}), &["x", "1", "N/A", "0", "60m"]),
            (
                "autoscaling",
                "v1",
                "HorizontalPodAutoscaler",
                json!({"spec": {"scaleTargetRef": {"kind": "Deployment", "name": "d"}, "maxReplicas": 3, "minReplicas": 1, "targetCPUUtilizationPercentage": 50}}),
                &["x", "Deployment/d", "cpu: <unknown>/50%", "1", "3", "0", "60m"],
            ),
            ("coordination.k8s.io", "v1", "Lease", json!({"spec": {"holderIdentity": "me"}}), &["x", "me", "60m"]),
            (
                "certificates.k8s.io",
                "v1",
                "CertificateSigningRequest",
                json!({"spec": {"signerName": "s", "username": "u"}, "status": {"conditions": [{"type": "Approved"}], "certificate": "x"}}),
                &["x", "60m", "s", "u", "<none>", "Approved,Issued"],
            ),
            (
                "",
                "v1",
                "ResourceQuota",
                json!({"status": {"hard": {"pods": "4", "limits.cpu": "2"}, "used": {"pods": "1", "limits.cpu": "1"}}}),
                &["x", "pods: 1/4", "limits.cpu: 1/2", "60m"],
            ),
            (
                "events.k8s.io",
                "v1",
                "Event",
                json!({"type": "Normal", "reason": "R", "regarding": {"kind": "Pod", "name": "p"}, "note": " hi ", "eventTime": "2024-01-01T00:59:00.000000Z"}),
                &["60s", "Normal", "R", "pod/p", "", "", "hi", "60s", "1", "x"],
            ),
        ];
        for (group, version, kind, object, expected) in cases {
            assert_eq!(shown(group, version, kind, object), expected, "{kind}");
        }
    }

    #[test]
    fn rows_carry_what_is_asked_for() {
        let resource = crate::builtin::by_kind("", "v1", "Namespace").expect("built in");
        let object = json!({"metadata": {"name": "a"}, "status": {"phase": "Active"}});
        let table = render(resource, json!({"resourceVersion": "5"}), [&object], IncludeObject::Metadata, Timestamp::UNIX_EPOCH);
        assert_eq!(
            table["rows"][0]["object"],
            json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": {"name": "a"}})
        );
        assert_eq!(table["rows"][0]["cells"], json!(["a", "Active", "<unknown>"]));
        assert_eq!(row(resource, &object, IncludeObject::None, Timestamp::UNIX_EPOCH)["object"], Value::Null);
    }
}
