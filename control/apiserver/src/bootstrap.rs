//! What every cluster has from the start: namespaces, priority classes, roles, and the Service that leads to this server.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use outrigger_access::bootstrap::Reconciled;
use outrigger_api::{Resource, meta, prepare};
use outrigger_store::{Expect, Op, TxnOutcome};
use serde_json::{Value, json};

use crate::engine::Engine;
use crate::error::StartError;
use crate::registry::store_key;
use crate::registry::versions::builtin_bytes;

struct Wanted {
    resource: Arc<Resource>,
    object: Value,
}

fn wanted(engine: &Engine, group: &str, plural: &str, object: Value) -> Wanted {
    Wanted { resource: engine.builtin(group, "v1", plural), object }
}

/// Creates what is missing and brings roles and the server's own endpoints up to date, in one transaction.
pub async fn run(engine: &Engine) -> Result<(), StartError> {
    for _ in 0..5 {
        let mut ops = Vec::new();
        for Wanted { resource, object } in objects(engine) {
            let key = resource.key(resource.namespaced.then(|| meta::namespace(&object)), Some(meta::name(&object)));
            if stored(engine, &resource, &object).is_none() {
                ops.push(Op::create(store_key(&key), fresh_bytes(&resource, object)));
            }
        }
        ops.extend(roles(engine));
        ops.extend(endpoints(engine));
        if ops.is_empty() {
            return Ok(());
        }
        match engine.store.txn(ops).await? {
            TxnOutcome::Done { revision, .. } | TxnOutcome::Conflict { revision, .. } => {
                let reached = engine.reach(revision).await;
                reached.map_err(|status| StartError::Bootstrap { what: "the first objects".into(), status })?;
            }
        }
    }
    Ok(())
}

fn entry(engine: &Engine, resource: &Resource, object: &Value) -> Option<Arc<crate::cache::Entry>> {
    let key =
        if resource.namespaced { format!("{}/{}", meta::namespace(object), meta::name(object)) } else { meta::name(object).to_string() };
    engine.hub.cache(&resource.storage_prefix).get(&key)
}

fn stored(engine: &Engine, resource: &Resource, object: &Value) -> Option<Value> {
    entry(engine, resource, object).map(|entry| entry.object())
}

/// A new object as the registry would have stored it.
fn fresh_bytes(resource: &Resource, mut object: Value) -> bytes::Bytes {
    let now = Timestamp::now();
    meta::stamp_new(&mut object, &uuid::Uuid::new_v4().to_string(), now, "");
    outrigger_api::default::apply(resource, &mut object);
    let status = object.get("status").cloned();
    prepare::create(resource, &mut object, now);
    if let Some(status) = status {
        object["status"] = status;
    }
    builtin_bytes(resource, &object)
}

fn objects(engine: &Engine) -> Vec<Wanted> {
    let mut all = Vec::new();
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let labels = json!({"kubernetes.io/metadata.name": name});
        all.push(wanted(
            engine,
            "",
            "namespaces",
            json!({
                "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels},
                "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
            }),
        ));
    }
    for (name, value, what) in [
        ("system-node-critical", 2_000_001_000_i64, "Used for system critical pods that must not be moved from their current node."),
        (
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        ),
    ] {
        all.push(wanted(
            engine,
            "scheduling.k8s.io",
            "priorityclasses",
            json!({
                "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": value,
                "description": what, "preemptionPolicy": "PreemptLowerPriority",
            }),
        ));
    }
    let cidrs: Vec<String> = engine.config.service_cidrs.iter().map(|c| c.trunc().to_string()).collect();
    let now = outrigger_api::time::format(Timestamp::now());
    all.push(wanted(
        engine,
        "networking.k8s.io",
        "servicecidrs",
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs},
            "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "", "message": "Kubernetes default Service CIDR is ready", "lastTransitionTime": now}]},
        }),
    ));
    all.push(kubernetes_service(engine));
    all.push(wanted(
        engine,
        "",
        "configmaps",
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
            "data": {
                "client-ca-file": engine.config.pki.ca_pem(),
                "requestheader-allowed-names": "[\"front-proxy-client\"]",
                "requestheader-client-ca-file": engine.config.pki.front_proxy_ca_pem(),
                "requestheader-extra-headers-prefix": "[\"X-Remote-Extra-\"]",
                "requestheader-group-headers": "[\"X-Remote-Group\"]",
                "requestheader-username-headers": "[\"X-Remote-User\"]",
            },
        }),
    ));
    all
}

fn kubernetes_service(engine: &Engine) -> Wanted {
    let ip = engine.services.first().map(|ip| ip.to_string()).unwrap_or_default();
    let family = if ip.contains(':') { "IPv6" } else { "IPv4" };
    let port = engine.config.secure_port;
    wanted(
        engine,
        "",
        "services",
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {
                "type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": [family], "ipFamilyPolicy": "SingleStack",
                "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}], "sessionAffinity": "None",
            },
            "status": {"loadBalancer": {}},
        }),
    )
}

/// Endpoints and EndpointSlice of the `kubernetes` Service: this server.
fn endpoints(engine: &Engine) -> Vec<Op> {
    let address = engine.config.advertise_address;
    let port = json!([{"name": "https", "port": engine.config.secure_port, "protocol": "TCP"}]);
    let ip = address.to_string();
    let family = if matches!(address, IpAddr::V4(_)) { "IPv4" } else { "IPv6" };
    let legacy = wanted(
        engine,
        "",
        "endpoints",
        json!({
            "apiVersion": "v1", "kind": "Endpoints",
            "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": [{"addresses": [{"ip": ip}], "ports": port}],
        }),
    );
    let slice = wanted(
        engine,
        "discovery.k8s.io",
        "endpointslices",
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": family, "endpoints": [{"addresses": [ip], "conditions": {"ready": true}}], "ports": port,
        }),
    );
    [legacy, slice]
        .into_iter()
        .filter_map(|Wanted { resource, object }| {
            let key = store_key(&resource.key(Some("default"), Some("kubernetes")));
            let Some(entry) = entry(engine, &resource, &object) else { return Some(Op::create(key, fresh_bytes(&resource, object))) };
            let mut updated = entry.object();
            for field in ["subsets", "endpoints", "ports", "addressType"] {
                if let Some(value) = object.get(field) {
                    updated[field] = value.clone();
                }
            }
            outrigger_api::default::apply(&resource, &mut updated);
            (updated != entry.object()).then(|| Op::update(key, builtin_bytes(&resource, &updated), entry.revision))
        })
        .collect()
}

fn roles(engine: &Engine) -> Vec<Op> {
    let mut ops = Vec::new();
    for wanted in outrigger_access::bootstrap::objects() {
        let resource = engine.builtin("rbac.authorization.k8s.io", "v1", wanted.resource);
        let key = store_key(&resource.key(resource.namespaced.then_some(wanted.namespace.as_str()), Some(&wanted.name)));
        match entry(engine, &resource, &wanted.object) {
            None => ops.push(Op::create(key, fresh_bytes(&resource, wanted.object))),
            Some(entry) => {
                let mut stored = entry.object();
                let value = match outrigger_access::bootstrap::reconcile(&mut stored, &wanted) {
                    Reconciled::Unchanged => continue,
                    Reconciled::Changed => builtin_bytes(&resource, &stored),
                    // A roleRef can't change: a new object takes the place of the old one.
                    Reconciled::Recreate => fresh_bytes(&resource, wanted.object),
                };
                ops.push(Op::Put { key, value, expect: Expect::ModRevision(entry.revision), ttl: None });
            }
        }
    }
    ops
}
