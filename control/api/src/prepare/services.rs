//! Services: fields that mirror each other, allocated values that an update may leave out, and what a change of type drops.
use serde_json::{Value, json};

use crate::meta::{self, same};

/// `clusterIPs` follows `clusterIP`.
pub(super) fn create(object: &mut Value) {
    let address = meta::get(object, "spec.clusterIP").clone();
    if !meta::is_empty(&address) && meta::items(object, "spec.clusterIPs").is_empty() {
        meta::set(object, "spec.clusterIPs", json!([address]));
    }
}

pub(super) fn update(new: &mut Value, old: &Value) {
    follow_cluster_ip(new, old);
    keep_allocated(new, old);
    drop_type_dependent(new, old);
}

fn kind(service: &Value) -> &str {
    meta::text(service, "spec.type")
}

fn has_node_ports(service: &Value) -> bool {
    matches!(kind(service), "NodePort" | "LoadBalancer")
}

fn has_health_check_port(service: &Value) -> bool {
    kind(service) == "LoadBalancer" && meta::text(service, "spec.externalTrafficPolicy") == "Local"
}

fn is_external(service: &Value) -> bool {
    has_node_ports(service) || (kind(service) == "ClusterIP" && !meta::items(service, "spec.externalIPs").is_empty())
}

fn unchanged(new: &Value, old: &Value, field: &str) -> bool {
    same(&new["spec"][field], &old["spec"][field])
}

/// A client that knows only `clusterIP` changes or clears it alone.
fn follow_cluster_ip(new: &mut Value, old: &Value) {
    if unchanged(new, old, "clusterIP") || !unchanged(new, old, "clusterIPs") {
        return;
    }
    match meta::text(new, "spec.clusterIP") {
        "" => drop(meta::remove(new, "spec.clusterIPs")),
        address => {
            let addresses = json!([address]);
            meta::set(new, "spec.clusterIPs", addresses);
        }
    }
}

/// What the server allocated comes back where the update does not mention it.
fn keep_allocated(new: &mut Value, old: &Value) {
    if kind(new) != "ExternalName" && kind(old) != "ExternalName" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if meta::is_empty(&new["spec"][field]) && !meta::is_empty(&old["spec"][field]) {
                new["spec"][field] = old["spec"][field].clone();
            }
        }
    }
    if has_node_ports(new) && has_node_ports(old) {
        let known = meta::items(old, "spec.ports").to_vec();
        let same_port = |port: &Value, other: &Value| port["port"] == other["port"] && port["protocol"] == other["protocol"];
        let mut taken: Vec<Value> = meta::items(new, "spec.ports").iter().map(|port| port["nodePort"].clone()).collect();
        for port in new["spec"].get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            if !meta::is_empty(&port["nodePort"]) {
                continue;
            }
            let node_port = known.iter().find(|other| same_port(port, other)).map(|other| other["nodePort"].clone());
            match node_port.filter(|number| !meta::is_empty(number) && !taken.contains(number)) {
                Some(number) => {
                    port["nodePort"] = number.clone();
                    taken.push(number);
                }
                None => drop(port.as_object_mut().and_then(|map| map.shift_remove("nodePort"))),
            }
        }
    }
    if has_health_check_port(new) && has_health_check_port(old) && meta::is_empty(&new["spec"]["healthCheckNodePort"]) {
        super::keep_field(new, old, "spec.healthCheckNodePort");
    }
}

/// Fields that the new type does not use are dropped, unless the request changed them: then validation refuses.
fn drop_type_dependent(new: &mut Value, old: &Value) {
    if kind(old) != "ExternalName" && kind(new) == "ExternalName" {
        if unchanged(new, old, "clusterIP") && unchanged(new, old, "clusterIPs") {
            meta::remove(new, "spec.clusterIP");
            meta::remove(new, "spec.clusterIPs");
        }
        for field in ["ipFamilies", "ipFamilyPolicy"] {
            drop_unchanged(new, old, field);
        }
    }
    if has_node_ports(old) && !has_node_ports(new) {
        let numbers = |service: &Value| -> Vec<Value> {
            meta::items(service, "spec.ports")
                .iter()
                .map(|port| port["nodePort"].clone())
                .filter(|number| !meta::is_empty(number))
                .collect()
        };
        let before = numbers(old);
        if numbers(new).iter().all(|number| before.contains(number)) {
            for port in new["spec"].get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(map) = port.as_object_mut() {
                    map.shift_remove("nodePort");
                }
            }
        }
    }
    if has_health_check_port(old) && !has_health_check_port(new) {
        drop_unchanged(new, old, "healthCheckNodePort");
    }
    if kind(old) == "LoadBalancer" && kind(new) != "LoadBalancer" {
        drop_unchanged(new, old, "allocateLoadBalancerNodePorts");
        drop_unchanged(new, old, "loadBalancerClass");
    }
    if is_external(old) && !is_external(new) {
        drop_unchanged(new, old, "externalTrafficPolicy");
    }
    if kind(new) != "LoadBalancer" {
        meta::set(new, "status.loadBalancer", json!({}));
    }
}

fn drop_unchanged(new: &mut Value, old: &Value, field: &str) {
    if unchanged(new, old, field) {
        meta::remove(new, &format!("spec.{field}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocated_values_survive_a_replace() {
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30000}]}});
        let mut new = json!({"spec": {"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP"}, {"port": 81, "protocol": "TCP"}]}});
        update(&mut new, &old);
        assert_eq!(new["spec"]["clusterIPs"], json!(["10.0.0.1"]));
        assert_eq!(new["spec"]["ports"], json!([{"port": 80, "protocol": "TCP", "nodePort": 30000}, {"port": 81, "protocol": "TCP"}]));
    }

    #[test]
    fn changed_types_drop_what_they_do_not_use() {
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "externalTrafficPolicy": "Cluster",
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30000}]}});
        let mut new = old.clone();
        new["spec"]["type"] = "ClusterIP".into();
        update(&mut new, &old);
        assert_eq!(
            new["spec"],
            json!({"type": "ClusterIP", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ports": [{"port": 80, "protocol": "TCP"}]})
        );
        let mut external = old.clone();
        external["spec"]["type"] = "ExternalName".into();
        update(&mut external, &old);
        assert_eq!(external["spec"]["clusterIP"], Value::Null);
    }
}
