//! What the node should do with traffic to Services: frontends and where each leads.
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use ipnet::IpNet;

use crate::diff::{Delta, gone};
use crate::names::{Family, Owner, Protocol, ServiceName, ServicePortName};
use crate::plan;
use crate::state::{State, Touched};

/// Where a frontend listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    Ip(IpAddr),
    /// Any address of this node in the family: for NodePorts those that `--nodeport-addresses` selects, for hostPorts all.
    Node(Family),
}

impl Address {
    pub fn family(self) -> Family {
        match self {
            Self::Ip(ip) => Family::of(ip),
            Self::Node(family) => family,
        }
    }
}

/// What a client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    pub address: Address,
    pub port: u16,
    pub protocol: Protocol,
}

/// One endpoint of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    pub ip: IpAddr,
    pub port: u16,
    /// It runs on this node.
    pub local: bool,
}

impl Endpoint {
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    ClusterIp,
    NodePort,
    ExternalIp,
    LoadBalancer,
    HostPort,
}

/// Whose connections get this node's address as their source, beside hairpins (a pod that reaches itself), which always do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Masquerade {
    /// Sources outside the cluster's pod range (`--cluster-cidr`); nobody when the range isn't known.
    OffCluster,
    /// Everybody: the reply must come back through this node.
    Always,
    /// Only sources that are this node's own addresses: with policy Local the client's address is kept.
    FromNode,
}

/// What happens to a new connection that has no endpoint to go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoEndpoints {
    /// Refused at once: the Service has no endpoint anywhere.
    Reject,
    /// Dropped: there are endpoints, but policy Local keeps this node from using them.
    Drop,
}

/// Which endpoint a new connection from this node gets, where no affinity has a say. Clients outside are led by the hash of their
/// connection where the mode can do that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Balancing {
    #[default]
    Random,
    /// One with few open connections from this node.
    LeastConnections,
}

impl Balancing {
    /// On a Service.
    pub const ANNOTATION: &str = "outrigger.dev/balancing";

    /// `None` for what nobody knows.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "random" => Some(Self::Random),
            "least-connections" => Some(Self::LeastConnections),
            _ => None,
        }
    }
}

/// What one frontend does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub service: ServicePortName,
    pub kind: Kind,
    /// New connections go to one of these, sorted by address and port; see `no_endpoints` when empty.
    pub backends: Arc<[Endpoint]>,
    /// With externalTrafficPolicy Local: what connections from this node and its pods use instead of `backends`, as if
    /// they had gone to an external load balancer and come back.
    pub short_circuit: Option<Arc<[Endpoint]>>,
    /// Endpoints that get no new connections but keep those they have (terminating, unready, elsewhere).
    pub retained: Arc<[Endpoint]>,
    /// A client's address sticks to its backend for this long after its last connection.
    pub affinity: Option<Duration>,
    pub masquerade: Masquerade,
    /// Who may connect; empty means everybody. Only on LoadBalancer frontends.
    pub source_ranges: Arc<[IpNet]>,
    pub balancing: Balancing,
    pub no_endpoints: NoEndpoints,
}

impl Entry {
    pub fn owner(&self) -> Owner {
        match self.kind {
            Kind::HostPort => Owner::Pod(self.service.service.clone()),
            _ => Owner::Service(self.service.service.clone()),
        }
    }

    /// Whether the node's own processes may connect. They come from one of the node's addresses or, where the node has the load balancer's
    /// address itself, from that.
    pub fn admits_node(&self, node_ips: &[IpAddr]) -> bool {
        self.admits_all() || node_ips.iter().any(|ip| self.admits(*ip))
    }

    pub fn admits_all(&self) -> bool {
        self.source_ranges.is_empty()
    }

    /// Whether a client at this address may connect.
    pub fn admits(&self, client: IpAddr) -> bool {
        self.admits_all() || self.source_ranges.iter().any(|net| net.contains(&client))
    }

    /// All endpoints that live connections through this frontend may point at.
    pub fn alive(&self) -> impl Iterator<Item = &Endpoint> {
        self.backends.iter().chain(self.retained.iter()).chain(self.short_circuit.iter().flat_map(|endpoints| endpoints.iter()))
    }
}

/// A Service that external load balancers probe on its own node port (externalTrafficPolicy Local).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub port: u16,
    /// Ready endpoints on this node.
    pub local_endpoints: usize,
}

/// What the frontends that an update touched were before it.
type Before = HashMap<Frontend, Option<Box<Entry>>>;

/// The whole node's Service path.
#[derive(Clone, Debug, Default)]
pub struct Table {
    entries: HashMap<Frontend, Entry>,
    claims: HashMap<Owner, Box<[Frontend]>>,
    /// Frontends asked for by more than one owner; the smallest owner has it.
    contested: HashMap<Frontend, BTreeSet<Owner>>,
    health_checks: HashMap<ServiceName, HealthCheck>,
}

impl Table {
    pub fn build(state: &State) -> Self {
        let mut table = Self::default();
        table.update(state, &Touched::everything());
        table
    }

    pub fn get(&self, frontend: &Frontend) -> Option<&Entry> {
        self.entries.get(frontend)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Frontend, &Entry)> {
        self.entries.iter()
    }

    pub fn health_checks(&self) -> &HashMap<ServiceName, HealthCheck> {
        &self.health_checks
    }

    /// Brings the table up to date with the owners that changed in `state`; cost follows their number, not the table's size.
    pub fn update(&mut self, state: &State, touched: &Touched) -> Delta {
        let before = self.advance(state, touched);
        self.delta_since(before)
    }

    /// The same for a kernel of unknown content.
    pub fn update_unknown(&mut self, state: &State, touched: &Touched) -> Delta {
        let before = self.advance(state, touched);
        let known = before.iter().filter_map(|(frontend, previous)| Some((*frontend, previous.as_deref()?)));
        let gone = known.flat_map(|(frontend, previous)| gone(frontend, previous, self.entries.get(&frontend)));
        Delta { gone: gone.collect(), ..Delta::full(self) }
    }

    fn advance(&mut self, state: &State, touched: &Touched) -> Before {
        let mut work: Vec<Owner> = if touched.all {
            state.owners().chain(self.claims.keys().filter(|owner| !state.has(owner)).cloned()).collect()
        } else {
            touched.owners.iter().cloned().collect()
        };
        let mut before = Before::default();
        if self.entries.is_empty() {
            // Most Services have one frontend.
            self.entries.reserve(work.len());
            self.claims.reserve(work.len());
            before.reserve(work.len());
        }
        while let Some(owner) = work.pop() {
            self.update_owner(state, &owner, &mut before, &mut work);
        }
        before
    }

    fn update_owner(&mut self, state: &State, owner: &Owner, before: &mut Before, work: &mut Vec<Owner>) {
        let planned = plan::plan(state, owner);
        if let Owner::Service(name) = owner {
            match plan::health_check(state, name) {
                Some(check) => self.health_checks.insert(name.clone(), check),
                None => self.health_checks.remove(name),
            };
        }
        let wanted: Box<[Frontend]> = planned.iter().map(|(frontend, _)| *frontend).collect();
        let unwanted: Vec<Frontend> =
            self.claims.get(owner).into_iter().flatten().filter(|frontend| !wanted.contains(frontend)).copied().collect();
        unwanted.into_iter().for_each(|frontend| self.release(owner, frontend, before, work));
        for (frontend, entry) in planned {
            self.claim(owner, frontend, entry, before);
        }
        if wanted.is_empty() {
            self.claims.remove(owner);
        } else {
            self.claims.insert(owner.clone(), wanted);
        }
    }

    fn release(&mut self, owner: &Owner, frontend: Frontend, before: &mut Before, work: &mut Vec<Owner>) {
        let mut heir = None;
        if let Some(rivals) = self.contested.get_mut(&frontend) {
            rivals.remove(owner);
            heir = rivals.first().cloned();
            if rivals.len() < 2 {
                self.contested.remove(&frontend);
            }
        }
        if self.entries.get(&frontend).is_some_and(|entry| entry.owner() == *owner) {
            let entry = self.entries.remove(&frontend).map(Box::new);
            before.entry(frontend).or_insert(entry);
            work.extend(heir);
        }
    }

    fn claim(&mut self, owner: &Owner, frontend: Frontend, entry: Entry, before: &mut Before) {
        let current = self.entries.get(&frontend);
        if current == Some(&entry) {
            return;
        }
        if let Some(holder) = current.map(Entry::owner)
            && holder != *owner
        {
            let rivals = self.contested.entry(frontend).or_default();
            rivals.extend([holder.clone(), owner.clone()]);
            if holder < *owner {
                return;
            }
        }
        let previous = self.entries.insert(frontend, entry).map(Box::new);
        before.entry(frontend).or_insert(previous);
    }

    fn delta_since(&self, before: Before) -> Delta {
        let mut delta = Delta::default();
        let mut changed: Vec<_> = before.into_iter().collect();
        changed.sort_unstable_by_key(|(frontend, _)| *frontend);
        for (frontend, previous) in changed {
            let current = self.entries.get(&frontend);
            if previous.as_deref() == current {
                continue;
            }
            delta.push(frontend, previous, current.is_some(), |previous| gone(frontend, previous, current));
        }
        delta
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Address::Ip(ip) => SocketAddr::new(ip, self.port).fmt(f)?,
            Address::Node(Family::V4) => write!(f, "node4:{}", self.port)?,
            Address::Node(Family::V6) => write!(f, "node6:{}", self.port)?,
        }
        write!(f, "/{}", self.protocol)
    }
}

struct List<'a>(&'a [Endpoint]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (index, endpoint) in self.0.iter().enumerate() {
            let gap = if index == 0 { "" } else { " " };
            write!(f, "{gap}{}{}", endpoint.socket(), if endpoint.local { "*" } else { "" })?;
        }
        f.write_str("]")
    }
}

/// One line; local endpoints are marked by `*`, the defaults of a kind are left out.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} -> ", self.service, self.kind)?;
        if self.backends.is_empty() {
            write!(f, "{:?}", self.no_endpoints)?
        } else {
            List(&self.backends).fmt(f)?
        }
        if let Some(endpoints) = &self.short_circuit {
            write!(f, " short-circuit={}", List(endpoints))?;
        }
        if !self.retained.is_empty() {
            write!(f, " retained={}", List(&self.retained))?;
        }
        if let Some(affinity) = self.affinity {
            write!(f, " affinity={}s", affinity.as_secs())?;
        }
        if self.masquerade != Masquerade::OffCluster {
            write!(f, " masquerade={:?}", self.masquerade)?;
        }
        if !self.source_ranges.is_empty() {
            write!(f, " sources={:?}", self.source_ranges)?;
        }
        if self.balancing != Balancing::Random {
            write!(f, " balancing={:?}", self.balancing)?;
        }
        Ok(())
    }
}

/// One line per frontend, sorted.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(frontend, _)| **frontend);
        entries.into_iter().try_for_each(|(frontend, entry)| writeln!(f, "{frontend} {entry}"))
    }
}
