//! One owner's frontends: endpoint choice by readiness, traffic policy and topology hints, as kube-proxy has them.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::names::{Family, Owner, Protocol, ServiceName, ServicePortName};
use crate::state::{ServicePort, ServiceSpec, SliceEndpoint, State};
use crate::table::{Address, Balancing, Endpoint, Entry, Frontend, HealthCheck, Kind, Masquerade, NoEndpoints};

/// At most one entry per frontend; an owner that is gone has none.
pub(crate) fn plan(state: &State, owner: &Owner) -> Vec<(Frontend, Entry)> {
    let mut planned = match owner {
        Owner::Service(name) => state.service(name).map_or_else(Vec::new, |spec| plan_service(state, name, spec)),
        Owner::Pod(name) => plan_host_ports(state, name),
    };
    if planned.len() > 1 {
        // An address may be asked for twice (an external address that is a load balancer's too): the later kind wins.
        planned = planned.into_iter().collect::<BTreeMap<_, _>>().into_iter().collect();
    }
    planned
}

pub(crate) fn health_check(state: &State, name: &ServiceName) -> Option<HealthCheck> {
    let spec = state.service(name).filter(|spec| spec.health_check_port != 0)?;
    let ready = |endpoint: &&SliceEndpoint| endpoint.ready && endpoint.local;
    let local: std::collections::HashSet<_> =
        state.slices(name).iter().flat_map(|slice| slice.endpoints.iter()).filter(ready).map(|endpoint| endpoint.ip).collect();
    Some(HealthCheck { port: spec.health_check_port, local_endpoints: local.len() })
}

fn plan_service(state: &State, name: &ServiceName, spec: &ServiceSpec) -> Vec<(Frontend, Entry)> {
    let mut planned = Vec::new();
    let ranges: Arc<[IpNet]> = shared(&spec.source_ranges);
    for cluster_ip in &spec.cluster_ips {
        let family = Family::of(*cluster_ip);
        for port in &spec.ports {
            let endpoints = candidates(state, name, port, family);
            let draft = Draft { name, spec, port, choice: Choice::of(spec, port, &endpoints, state), ranges: &ranges };
            let mut add = |address, number, kind| {
                planned.push((Frontend { address, port: number, protocol: port.protocol }, draft.entry(kind, family)));
            };
            add(Address::Ip(*cluster_ip), port.port, Kind::ClusterIp);
            let of_family = |ips: &[std::net::IpAddr]| ips.iter().copied().filter(|ip| Family::of(*ip) == family).collect::<Vec<_>>();
            of_family(&spec.external_ips).into_iter().for_each(|ip| add(Address::Ip(ip), port.port, Kind::ExternalIp));
            of_family(&spec.load_balancer_ips).into_iter().for_each(|ip| add(Address::Ip(ip), port.port, Kind::LoadBalancer));
            if port.node_port != 0 {
                add(Address::Node(family), port.node_port, Kind::NodePort);
            }
        }
    }
    planned
}

/// A candidate keeps its slice's facts beside the address that it is dialled at.
struct Candidate<'a> {
    endpoint: Endpoint,
    facts: &'a SliceEndpoint,
}

/// The endpoints of all slices, one per address and port, sorted. Doubles happen while an endpoint moves between slices; one
/// that is known to be local is preferred.
fn candidates<'a>(state: &'a State, name: &ServiceName, port: &ServicePort, family: Family) -> Vec<Candidate<'a>> {
    let mut found = Vec::new();
    for slice in state.slices(name).iter().filter(|slice| slice.family == family) {
        for slice_port in slice.ports.iter().filter(|other| other.name == port.name && other.protocol == port.protocol) {
            found.extend(
                slice
                    .endpoints
                    .iter()
                    .map(|facts| Candidate { endpoint: Endpoint { ip: facts.ip, port: slice_port.port, local: facts.local }, facts }),
            );
        }
    }
    found.sort_by_key(|candidate| (candidate.endpoint.ip, candidate.endpoint.port, !candidate.facts.local));
    found.dedup_by_key(|candidate| (candidate.endpoint.ip, candidate.endpoint.port));
    found
}

/// An empty list takes no memory of its own.
fn shared<T: Copy>(items: &[T]) -> Arc<[T]>
where
    Arc<[T]>: Default,
{
    if items.is_empty() { Arc::default() } else { items.into() }
}

/// Whether a list that is sorted by address and port has the endpoint.
fn holds(sorted: &[Endpoint], endpoint: &Endpoint) -> bool {
    sorted.binary_search_by_key(&(endpoint.ip, endpoint.port), |other| (other.ip, other.port)).is_ok()
}

/// What the policies choose among one port's endpoints.
struct Choice {
    cluster: Arc<[Endpoint]>,
    local: Arc<[Endpoint]>,
    /// Neither list's, but their connections are left alone.
    others: Arc<[Endpoint]>,
    /// Some endpoint of the cluster could be used by somebody.
    any: bool,
}

impl Choice {
    fn of(spec: &ServiceSpec, port: &ServicePort, candidates: &[Candidate<'_>], state: &State) -> Self {
        let pick = |wanted: &dyn Fn(&SliceEndpoint) -> bool| -> Arc<[Endpoint]> {
            shared(&candidates.iter().filter(|candidate| wanted(candidate.facts)).map(|candidate| candidate.endpoint).collect::<Vec<_>>())
        };
        let draining = |facts: &SliceEndpoint| facts.serving && facts.terminating;
        let topology = Topology::of(candidates, state.zone.as_deref());
        let mut cluster = pick(&|facts| facts.ready && topology.allows(facts, state.zone.as_deref()));
        if cluster.is_empty() {
            cluster = pick(&draining);
        }
        let mut local = Arc::default();
        if spec.internal_local || spec.external_local {
            local = pick(&|facts| facts.local && facts.ready);
            if local.is_empty() {
                local = pick(&|facts| facts.local && draining(facts));
            }
        }
        let keeps_flows = |facts: &SliceEndpoint| port.protocol != Protocol::Udp || facts.serving;
        let unused = |endpoint: &Endpoint| !holds(&cluster, endpoint) && !holds(&local, endpoint);
        let others = candidates.iter().filter(|candidate| keeps_flows(candidate.facts)).map(|candidate| candidate.endpoint).filter(unused);
        let others = shared(&others.collect::<Vec<_>>());
        let any = candidates.iter().any(|candidate| candidate.facts.ready || draining(candidate.facts));
        Self { cluster, local, others, any }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    Anywhere,
    SameZone,
    SameNode,
}

impl Topology {
    /// Hints count only when every ready endpoint has them and one of them is for us: else load would be lost or misplaced.
    fn of(candidates: &[Candidate<'_>], zone: Option<&str>) -> Self {
        let ready = || candidates.iter().map(|candidate| candidate.facts).filter(|facts| facts.ready);
        let all = |wanted: &dyn Fn(&SliceEndpoint) -> bool| ready().all(wanted);
        let node_hinted = |facts: &SliceEndpoint| facts.hints.as_ref().is_some_and(|hints| hints.this_node.is_some());
        let zone_hinted = |facts: &SliceEndpoint| facts.hints.as_ref().is_some_and(|hints| !hints.zones.is_empty());
        if all(&node_hinted) && ready().any(|facts| Self::SameNode.allows(facts, zone)) {
            Self::SameNode
        } else if all(&zone_hinted) && ready().any(|facts| Self::SameZone.allows(facts, zone)) {
            Self::SameZone
        } else {
            Self::Anywhere
        }
    }

    fn allows(self, facts: &SliceEndpoint, zone: Option<&str>) -> bool {
        let hints = facts.hints.as_ref();
        match self {
            Self::Anywhere => true,
            Self::SameNode => hints.is_some_and(|hints| hints.this_node == Some(true)),
            Self::SameZone => hints.is_some_and(|hints| hints.zones.iter().any(|hint| Some(&**hint) == zone)),
        }
    }
}

/// What the entries of one Service port have in common.
struct Draft<'a> {
    name: &'a ServiceName,
    spec: &'a ServiceSpec,
    port: &'a ServicePort,
    choice: Choice,
    ranges: &'a Arc<[IpNet]>,
}

impl Draft<'_> {
    fn entry(&self, kind: Kind, family: Family) -> Entry {
        let external = kind != Kind::ClusterIp;
        let local = if external { self.spec.external_local } else { self.spec.internal_local };
        let Choice { cluster, local: local_endpoints, others, any } = &self.choice;
        let (backends, masquerade) = match (external, local) {
            (false, false) => (cluster, Masquerade::OffCluster),
            (false, true) => (local_endpoints, Masquerade::OffCluster),
            (true, false) => (cluster, Masquerade::Always),
            (true, true) => (local_endpoints, Masquerade::FromNode),
        };
        let source_ranges = match kind {
            Kind::LoadBalancer if self.ranges.iter().all(|range| Family::of(range.addr()) == family) => self.ranges.clone(),
            Kind::LoadBalancer => self.ranges.iter().copied().filter(|range| Family::of(range.addr()) == family).collect(),
            _ => Arc::default(),
        };
        Entry {
            service: ServicePortName { service: self.name.clone(), port: self.port.name.clone() },
            kind,
            retained: self.retained(backends, others),
            backends: backends.clone(),
            short_circuit: (external && local && !cluster.is_empty()).then(|| cluster.clone()),
            affinity: self.spec.affinity.map(|seconds| Duration::from_secs(u64::from(seconds))),
            masquerade,
            source_ranges,
            balancing: self.spec.balancing,
            no_endpoints: if *any { NoEndpoints::Drop } else { NoEndpoints::Reject },
        }
    }

    /// All that live connections may point at beside the entry's own backends.
    fn retained(&self, backends: &Arc<[Endpoint]>, others: &Arc<[Endpoint]>) -> Arc<[Endpoint]> {
        let unused = |list: &Arc<[Endpoint]>| !Arc::ptr_eq(list, backends) && list.iter().any(|endpoint| !holds(backends, endpoint));
        if !unused(&self.choice.cluster) && !unused(&self.choice.local) {
            return others.clone();
        }
        let mut all: Vec<Endpoint> = self.choice.cluster.iter().chain(self.choice.local.iter()).chain(others.iter()).copied().collect();
        all.retain(|endpoint| !holds(backends, endpoint));
        all.sort();
        all.dedup();
        shared(&all)
    }
}

fn plan_host_ports(state: &State, pod: &ServiceName) -> Vec<(Frontend, Entry)> {
    let mut planned = Vec::new();
    for host_port in state.host_ports(pod) {
        for pod_ip in &host_port.pod_ips {
            let family = Family::of(*pod_ip);
            let address = match host_port.host_ip {
                Some(ip) if Family::of(ip) == family => Address::Ip(ip),
                Some(_) => continue,
                None => Address::Node(family),
            };
            let entry = Entry {
                service: ServicePortName { service: pod.clone(), port: host_port.port.to_string().into() },
                kind: Kind::HostPort,
                backends: Arc::new([Endpoint { ip: *pod_ip, port: host_port.container_port, local: true }]),
                short_circuit: None,
                retained: Arc::default(),
                affinity: None,
                masquerade: Masquerade::FromNode,
                source_ranges: Arc::default(),
                balancing: Balancing::Random,
                no_endpoints: NoEndpoints::Reject,
            };
            planned.push((Frontend { address, port: host_port.port, protocol: host_port.protocol }, entry));
        }
    }
    planned
}
