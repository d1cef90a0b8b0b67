//! The cluster as one scheduling cycle sees it: nodes with their pods, and what those take (pure).
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use outrigger_controllers::objects::{Key, Labels, name, uid};

use crate::affinity::PodTerms;
use crate::resources::{self, Resources};

/// A pod with what is asked of it again and again.
#[derive(Clone, Debug)]
pub struct PodInfo {
    pub pod: Arc<Pod>,
    pub requests: Resources,
    pub assumed: Resources,
    pub terms: Option<Box<PodTerms>>,
}

impl PodInfo {
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { requests: resources::requests(&pod), assumed: resources::assumed_requests(&pod), terms: PodTerms::of(&pod), pod }
    }

    pub fn key(&self) -> Key {
        Key::of(&*self.pod)
    }

    pub fn uid(&self) -> &str {
        uid(&self.pod.metadata)
    }

    pub fn priority(&self) -> i32 {
        self.pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
    }

    pub fn host_ports(&self) -> impl Iterator<Item = HostPort> + '_ {
        let spec = self.pod.spec.iter();
        let containers = spec.flat_map(|spec| {
            let sidecars = spec.init_containers.iter().flatten().filter(|init| init.restart_policy.as_deref() == Some("Always"));
            spec.containers.iter().chain(sidecars)
        });
        containers.flat_map(|container| container.ports.iter().flatten()).filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let ip = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".into());
            Some(HostPort { ip, protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()), number })
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    pub ip: String,
    pub protocol: String,
    pub number: i32,
}

impl HostPort {
    /// The wildcard address meets every address.
    pub fn conflicts(&self, other: &Self) -> bool {
        let any = "0.0.0.0";
        self.number == other.number && self.protocol == other.protocol && (self.ip == other.ip || self.ip == any || other.ip == any)
    }
}

/// A node and the pods on it, those just assigned included.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    pub node: Arc<Node>,
    pub pods: Vec<Arc<PodInfo>>,
    pub allocatable: Resources,
    pub allowed_pods: i64,
    pub requested: Resources,
    pub assumed: Resources,
    /// Sizes by image name.
    pub images: BTreeMap<String, i64>,
}

impl NodeInfo {
    pub fn new(node: Arc<Node>) -> Self {
        let mut info = Self {
            node: node.clone(),
            pods: Vec::new(),
            allocatable: Resources::default(),
            allowed_pods: 0,
            requested: Resources::default(),
            assumed: Resources::default(),
            images: BTreeMap::new(),
        };
        info.set_node(node);
        info
    }

    pub fn set_node(&mut self, node: Arc<Node>) {
        let status = node.status.as_ref();
        let list = status.and_then(|status| status.allocatable.as_ref());
        self.allocatable = Resources::of(list);
        let pods = list.and_then(|list| list.get("pods")).and_then(|quantity| outrigger_api::quantity::Quantity::parse(&quantity.0).ok());
        self.allowed_pods = pods.map_or(0, |quantity| quantity.value());
        let images = status.iter().flat_map(|status| status.images.iter().flatten());
        self.images =
            images.flat_map(|image| image.names.iter().flatten().map(|name| (name.clone(), image.size_bytes.unwrap_or(0)))).collect();
        self.node = node;
    }

    pub fn name(&self) -> &str {
        name(&self.node.metadata)
    }

    pub fn label(&self, key: &str) -> Option<&str> {
        self.node.metadata.labels.as_ref()?.get(key).map(String::as_str)
    }

    pub fn add(&mut self, pod: Arc<PodInfo>) {
        self.requested.add(&pod.requests);
        self.assumed.add(&pod.assumed);
        self.pods.push(pod);
    }

    pub fn remove(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let place = self.pods.iter().position(|pod| pod.uid() == uid)?;
        let pod = self.pods.swap_remove(place);
        self.requested.subtract(&pod.requests);
        self.assumed.subtract(&pod.assumed);
        Some(pod)
    }

    pub fn used_ports(&self) -> BTreeSet<HostPort> {
        self.pods.iter().flat_map(|pod| pod.host_ports()).collect()
    }
}

/// Cheap to take: nodes are shared with the cache until it changes them.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub nodes: Vec<Arc<NodeInfo>>,
    pub namespaces: Arc<HashMap<String, Labels>>,
    /// Pods that wait for their victims to go, by the node they are to get.
    pub nominated: Arc<HashMap<String, Vec<Arc<PodInfo>>>>,
}

impl Snapshot {
    pub fn node(&self, name: &str) -> Option<&Arc<NodeInfo>> {
        self.nodes.iter().find(|info| info.name() == name)
    }

    pub fn namespace_labels(&self, namespace: &str) -> Labels {
        self.namespaces.get(namespace).cloned().unwrap_or_default()
    }
}
