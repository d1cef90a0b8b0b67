//! Who routes which pods: every node's pod CIDRs and addresses, as far as the pod network cares.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use outrigger_cluster::Delta;

/// One node's share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeShare {
    pub pod_cidrs: Vec<IpNet>,
    /// `InternalIP` addresses, in the node's order.
    pub addresses: Vec<IpAddr>,
}

impl NodeShare {
    pub fn of(node: &Node) -> Self {
        let spec = node.spec.as_ref();
        let mut cidrs: Vec<&String> = spec.and_then(|spec| spec.pod_cidrs.as_ref()).into_iter().flatten().collect();
        if cidrs.is_empty() {
            cidrs.extend(spec.and_then(|spec| spec.pod_cidr.as_ref()));
        }
        let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref()).into_iter().flatten();
        Self {
            pod_cidrs: cidrs.into_iter().filter_map(|cidr| cidr.parse().ok()).collect(),
            addresses: addresses
                .filter(|address| address.type_ == "InternalIP")
                .filter_map(|address| address.address.parse().ok())
                .collect(),
        }
    }
}

/// All nodes' shares by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology(BTreeMap<String, NodeShare>);

impl Topology {
    pub fn take(&mut self, delta: &Delta<Node>) {
        match delta {
            Delta::Replaced(nodes) => self.0 = nodes.iter().map(|node| (name(node), NodeShare::of(node))).collect(),
            Delta::Applied(node) => {
                self.0.insert(name(node), NodeShare::of(node));
            }
            Delta::Deleted(node) => {
                self.0.remove(&name(node));
            }
        }
    }

    pub fn node(&self, name: &str) -> Option<&NodeShare> {
        self.0.get(name)
    }

    /// Where packets for the other nodes' pods go. A node without an address of a CIDR's family gets no route.
    pub fn routes(&self, own: &str) -> BTreeMap<IpNet, IpAddr> {
        let others = self.0.iter().filter(|(name, _)| *name != own);
        others
            .flat_map(|(_, share)| {
                share.pod_cidrs.iter().filter_map(|cidr| {
                    let via = share.addresses.iter().find(|address| address.is_ipv4() == cidr.addr().is_ipv4())?;
                    Some((cidr.trunc(), *via))
                })
            })
            .collect()
    }

    /// Every node's addresses, the own ones included.
    pub fn node_addresses(&self) -> BTreeSet<IpAddr> {
        self.0.values().flat_map(|share| share.addresses.iter().copied()).collect()
    }
}

fn name(node: &Node) -> String {
    node.metadata.name.clone().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn node(name: &str, cidrs: &[&str], addresses: &[&str]) -> Arc<Node> {
        let addresses: Vec<_> = addresses.iter().map(|address| serde_json::json!({"type": "InternalIP", "address": address})).collect();
        let node = serde_json::json!({
            "metadata": {"name": name}, "spec": {"podCIDRs": cidrs}, "status": {"addresses": addresses}
        });
        Arc::new(serde_json::from_value(node).unwrap())
    }

    #[test]
    fn routes_lead_to_the_other_nodes_by_family() {
        let mut topology = Topology::default();
        topology.take(&Delta::Replaced(Arc::new(vec![
            node("a", &["10.244.0.0/24"], &["192.168.0.1"]),
            node("b", &["10.244.1.0/24", "fd00:1::/64"], &["192.168.0.2", "fd00::2"]),
            node("c", &["10.244.2.0/24"], &["fd00::3"]),
        ])));
        let expected = BTreeMap::from([
            ("10.244.1.0/24".parse().unwrap(), "192.168.0.2".parse().unwrap()),
            ("fd00:1::/64".parse().unwrap(), "fd00::2".parse().unwrap()),
        ]);
        assert_eq!(topology.routes("a"), expected);
        assert_eq!(topology.node_addresses().len(), 4);
        topology.take(&Delta::Deleted(node("b", &[], &[])));
        assert_eq!(topology.routes("a"), BTreeMap::new());
        topology.take(&Delta::Applied(node("c", &["10.244.2.0/24"], &["192.168.0.3"])));
        assert_eq!(topology.routes("a").len(), 1);
    }
}
