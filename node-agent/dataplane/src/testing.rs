//! What the tests of the plans have in common: objects as they are watched, and the table that follows.
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service as ServiceObject;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use outrigger_desired::{Change, Delta, State, Table, Watched};
use serde_json::{Value, json};

pub struct Listener {
    pub state: State,
    pub table: Table,
}

impl Default for Listener {
    fn default() -> Self {
        Self { state: State::new("node"), table: Table::default() }
    }
}

impl Listener {
    pub fn hear(&mut self, change: &Change) -> Delta {
        let touched = self.state.apply(change);
        self.table.update(&self.state, &touched)
    }
}

pub fn service(name: &str, ip: &str, spec: Value) -> Change {
    let mut base = json!({"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]});
    spec.as_object().into_iter().flatten().for_each(|(key, value)| base[key] = value.clone());
    let object = json!({"metadata": {"name": name, "namespace": "ns"}, "spec": base});
    Change::Service(Watched::Applied(Arc::new(serde_json::from_value::<ServiceObject>(object).unwrap())))
}

pub fn gone(name: &str) -> Change {
    let object = json!({"metadata": {"name": name, "namespace": "ns"}});
    Change::Service(Watched::Deleted(Arc::new(serde_json::from_value::<ServiceObject>(object).unwrap())))
}

/// Endpoints on this node (`local`) and elsewhere.
pub fn slice(name: &str, local: &[&str], remote: &[&str]) -> Change {
    let on = |node: &str, ip: &&str| json!({"addresses": [ip], "nodeName": node, "conditions": {"ready": true}});
    let endpoints: Vec<_> = local.iter().map(|ip| on("node", ip)).chain(remote.iter().map(|ip| on("other", ip))).collect();
    let object = json!({
        "metadata": {"name": name, "namespace": "ns", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080, "protocol": "TCP"}],
    });
    Change::EndpointSlice(Watched::Applied(Arc::new(serde_json::from_value::<EndpointSlice>(object).unwrap())))
}
