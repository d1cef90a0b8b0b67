//! What was watched, in the least memory that the plan needs: an inert value with one mutator, [`State::apply`].
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::{HashMap, HashSet};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::names::{Family, Owner, Protocol, ServiceName};
use crate::table::Balancing;

mod read;

/// One change of a watched kind.
#[derive(Clone, Debug)]
pub enum Watched<K> {
    /// The whole list, after the initial sync or after the watch had to start over; what isn't in it is gone.
    Replaced(Arc<Vec<Arc<K>>>),
    Applied(Arc<K>),
    Deleted(Arc<K>),
}

/// One change of anything that the Service path depends on.
#[derive(Clone, Debug)]
pub enum Change {
    Service(Watched<Service>),
    EndpointSlice(Watched<EndpointSlice>),
    /// Only this node's own object matters; others are ignored.
    Node(Watched<Node>),
    /// Only this node's pods matter (hostPort); others are ignored.
    Pod(Watched<Pod>),
}

/// Whose frontends have to be planned again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    pub all: bool,
    pub owners: HashSet<Owner>,
    /// What was asked for and can't be had, for people to read.
    pub warnings: Vec<String>,
}

impl Touched {
    pub fn everything() -> Self {
        Self { all: true, ..Self::default() }
    }

    pub fn add(&mut self, owner: Owner) {
        if !self.all {
            self.owners.insert(owner);
        }
    }

    pub fn is_empty(&self) -> bool {
        !self.all && self.owners.is_empty()
    }

    pub fn merge(&mut self, other: Self) {
        self.all |= other.all;
        self.warnings.extend(other.warnings);
        if self.all {
            self.owners.clear();
        } else if self.owners.is_empty() {
            self.owners = other.owners;
        } else {
            self.owners.extend(other.owners);
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServiceSpec {
    pub cluster_ips: Box<[IpAddr]>,
    pub external_ips: Box<[IpAddr]>,
    pub load_balancer_ips: Box<[IpAddr]>,
    pub ports: Box<[ServicePort]>,
    /// Seconds.
    pub affinity: Option<u32>,
    pub internal_local: bool,
    pub external_local: bool,
    pub source_ranges: Box<[IpNet]>,
    pub health_check_port: u16,
    pub balancing: Balancing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    /// The object's own `namespace/name`.
    pub name: ServiceName,
    pub family: Family,
    pub ports: Box<[SlicePort]>,
    pub endpoints: Box<[SliceEndpoint]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SlicePort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SliceEndpoint {
    pub ip: IpAddr,
    pub local: bool,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub hints: Option<Box<Hints>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hints {
    pub zones: Box<[Arc<str>]>,
    /// None: no node hints; otherwise whether this node is among them.
    pub this_node: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort {
    /// None: all of the node's addresses.
    pub host_ip: Option<IpAddr>,
    pub port: u16,
    pub protocol: Protocol,
    pub container_port: u16,
    pub pod_ips: Box<[IpAddr]>,
}

/// The texts that thousands of objects share (port and zone names, labels), each held once.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    /// How many were in use when it was last looked at.
    used: usize,
}

impl Interner {
    pub fn intern(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() > 2 * self.used + 1024 {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.used = self.texts.len();
        }
        let text: Arc<str> = text.into();
        self.texts.insert(text.clone());
        text
    }
}

/// Everything watched that decides where this node's Service traffic goes.
#[derive(Clone, Debug)]
pub struct State {
    node_name: Arc<str>,
    pub(crate) zone: Option<Arc<str>>,
    services: HashMap<ServiceName, ServiceSpec>,
    slices: HashMap<ServiceName, Vec<Slice>>,
    /// Which Service a slice (`namespace/name`) belongs to, since a slice can be given to another one.
    slice_owners: HashMap<ServiceName, ServiceName>,
    host_ports: HashMap<ServiceName, Box<[HostPort]>>,
    interner: Interner,
}

impl State {
    pub fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.into(),
            zone: None,
            services: HashMap::default(),
            slices: HashMap::default(),
            slice_owners: HashMap::default(),
            host_ports: HashMap::default(),
            interner: Interner::default(),
        }
    }

    /// Takes a change in and says whose frontends it may have changed.
    pub fn apply(&mut self, change: &Change) -> Touched {
        let mut touched = Touched::default();
        match change {
            Change::Service(Watched::Applied(service)) => self.set_service(service, &mut touched),
            Change::Service(Watched::Deleted(service)) => self.drop_service(&name_of(&service.metadata), &mut touched),
            Change::Service(Watched::Replaced(all)) => {
                let stale = stale(self.services.keys(), all.iter().map(|service| &service.metadata));
                stale.iter().for_each(|name| self.drop_service(name, &mut touched));
                touched.all = self.services.is_empty() && !all.is_empty();
                self.services.reserve(all.len().saturating_sub(self.services.len()));
                all.iter().for_each(|service| self.set_service(service, &mut touched));
            }
            Change::EndpointSlice(Watched::Applied(slice)) => self.set_slice(slice, &mut touched),
            Change::EndpointSlice(Watched::Deleted(slice)) => self.drop_slice(&name_of(&slice.metadata), &mut touched),
            Change::EndpointSlice(Watched::Replaced(all)) => {
                let stale = stale(self.slice_owners.keys(), all.iter().map(|slice| &slice.metadata));
                stale.iter().for_each(|name| self.drop_slice(name, &mut touched));
                touched.all = self.slice_owners.is_empty() && !all.is_empty();
                self.slice_owners.reserve(all.len().saturating_sub(self.slice_owners.len()));
                self.slices.reserve(self.services.len().saturating_sub(self.slices.len()));
                all.iter().for_each(|slice| self.set_slice(slice, &mut touched));
            }
            Change::Node(Watched::Applied(node)) => self.set_node(node, &mut touched),
            Change::Node(Watched::Replaced(all)) => all.iter().for_each(|node| self.set_node(node, &mut touched)),
            // This node's object comes back when its agent registers it again; until then the last known zone holds.
            Change::Node(Watched::Deleted(_)) => {}
            Change::Pod(Watched::Applied(pod)) => self.set_pod(pod, &mut touched),
            Change::Pod(Watched::Deleted(pod)) => self.drop_pod(&name_of(&pod.metadata), &mut touched),
            Change::Pod(Watched::Replaced(all)) => {
                let stale = stale(self.host_ports.keys(), all.iter().map(|pod| &pod.metadata));
                stale.iter().for_each(|name| self.drop_pod(name, &mut touched));
                all.iter().for_each(|pod| self.set_pod(pod, &mut touched));
            }
        }
        touched
    }

    /// Everything that may ask for a frontend.
    pub(crate) fn owners(&self) -> impl Iterator<Item = Owner> {
        self.services.keys().cloned().map(Owner::Service).chain(self.host_ports.keys().cloned().map(Owner::Pod))
    }

    pub(crate) fn has(&self, owner: &Owner) -> bool {
        match owner {
            Owner::Service(name) => self.services.contains_key(name),
            Owner::Pod(name) => self.host_ports.contains_key(name),
        }
    }

    pub(crate) fn service(&self, name: &ServiceName) -> Option<&ServiceSpec> {
        self.services.get(name)
    }

    pub(crate) fn slices(&self, name: &ServiceName) -> &[Slice] {
        self.slices.get(name).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn host_ports(&self, pod: &ServiceName) -> &[HostPort] {
        self.host_ports.get(pod).map_or(&[], |ports| &**ports)
    }

    fn set_service(&mut self, service: &Service, touched: &mut Touched) {
        let name = name_of(&service.metadata);
        match read::service(service, &mut self.interner) {
            None => self.drop_service(&name, touched),
            Some(spec) if self.services.get(&name) == Some(&spec) => {}
            Some(spec) => {
                touched.warnings.extend(read::warning(&service.metadata));
                touched.add(Owner::Service(name.clone()));
                self.services.insert(name, spec);
            }
        }
    }

    fn drop_service(&mut self, name: &ServiceName, touched: &mut Touched) {
        if self.services.remove(name).is_some() {
            touched.add(Owner::Service(name.clone()));
        }
    }

    fn set_slice(&mut self, object: &EndpointSlice, touched: &mut Touched) {
        let key = name_of(&object.metadata);
        let Some((service, slice)) = read::slice(object, &key, &self.node_name, &mut self.interner) else {
            return self.drop_slice(&key, touched);
        };
        // The Service's own name object is shared where it is known already.
        let qualified = [key.namespace(), "/", service].concat();
        let known = self.services.get_key_value(qualified.as_str()).map(|(known, _)| known.clone());
        let service = known.unwrap_or_else(|| ServiceName::new(key.namespace(), service));
        if self.slice_owners.get(&key).is_some_and(|owner| *owner != service) {
            self.drop_slice(&key, touched);
        }
        let slices = self.slices.entry(service.clone()).or_default();
        match slices.iter_mut().find(|known| known.name == slice.name) {
            Some(known) if *known == slice => return,
            Some(known) => *known = slice,
            None => {
                slices.reserve_exact(1);
                slices.push(slice);
            }
        }
        touched.add(Owner::Service(service.clone()));
        self.slice_owners.insert(key, service);
    }

    fn drop_slice(&mut self, key: &ServiceName, touched: &mut Touched) {
        let Some(service) = self.slice_owners.remove(key) else { return };
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.retain(|slice| slice.name != *key);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
        touched.add(Owner::Service(service));
    }

    fn set_node(&mut self, node: &Node, touched: &mut Touched) {
        if node.metadata.name.as_deref() != Some(&*self.node_name) {
            return;
        }
        let zone = node.metadata.labels.as_ref().and_then(|labels| labels.get("topology.kubernetes.io/zone"));
        let zone = zone.filter(|zone| !zone.is_empty()).map(|zone| self.interner.intern(zone));
        if self.zone != zone {
            self.zone = zone;
            touched.merge(Touched::everything());
        }
    }

    fn set_pod(&mut self, pod: &Pod, touched: &mut Touched) {
        let name = name_of(&pod.metadata);
        let ports = read::host_ports(pod, &self.node_name);
        if ports.is_empty() {
            return self.drop_pod(&name, touched);
        }
        if self.host_ports(&name) != &*ports {
            touched.add(Owner::Pod(name.clone()));
            self.host_ports.insert(name, ports);
        }
    }

    fn drop_pod(&mut self, name: &ServiceName, touched: &mut Touched) {
        if self.host_ports.remove(name).is_some() {
            touched.add(Owner::Pod(name.clone()));
        }
    }
}

/// What is known but not listed.
fn stale<'a>(known: impl ExactSizeIterator<Item = &'a ServiceName>, listed: impl Iterator<Item = &'a ObjectMeta>) -> Vec<ServiceName> {
    if known.len() == 0 {
        return Vec::new();
    }
    let listed: HashSet<ServiceName> = listed.map(name_of).collect();
    known.filter(|name| !listed.contains(*name)).cloned().collect()
}

pub(crate) fn name_of(metadata: &ObjectMeta) -> ServiceName {
    ServiceName::new(metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}
