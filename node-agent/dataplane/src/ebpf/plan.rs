//! From the desired table to map contents, purely: which slots to write, which frontends to put and delete, in that order.
//!
//! A set of backends is a range of slots that is never changed while a frontend names it: a change writes a new range, then turns
//! the frontends to it, and frees the old range for the next change. So each frontend goes from the old set to the new in one step. The
//! Maglev table of a set that clients outside reach is kept likewise.
use std::collections::VecDeque;
use std::collections::hash_map::Entry as MapEntry;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::{HashMap, HashSet};
use outrigger_abi as abi;
use outrigger_desired::{
    Address, Balancing, Delta, Endpoint, Entry, Family, Frontend, Kind, Masquerade, NoEndpoints, Protocol, ServicePortName, Table,
};

use super::load::Sizes;
use super::maglev;
use super::space::{self, Space};

/// Writes to the maps, to be made from top to bottom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Indices that a new Service port got; their old counts mean nothing.
    pub fresh_services: Vec<u32>,
    pub slots: Vec<(u32, abi::Slot)>,
    pub maglev: Vec<(u32, abi::MaglevBlock)>,
    pub puts: Vec<(abi::FrontendKey, abi::Frontend)>,
    pub deletes: Vec<abi::FrontendKey>,
    /// Cluster IPs that came (true) or went.
    pub cluster_ips: Vec<(abi::Addr, bool)>,
}

/// A set of backends of one Service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Set {
    service: u32,
    endpoints: Arc<[Endpoint]>,
}

#[derive(Debug)]
struct Held {
    set: Set,
    users: u32,
}

/// The Maglev table of a set.
#[derive(Debug)]
struct Places {
    range: abi::Range,
    users: u32,
}

#[derive(Debug, Default)]
struct Service {
    /// `None` while nobody, or nobody known by name, has the index.
    name: Option<ServicePortName>,
    users: u32,
}

/// What the maps hold, and how it came there.
#[derive(Debug)]
pub struct Layout {
    frontends: HashMap<abi::FrontendKey, abi::Frontend>,
    by_name: HashMap<ServicePortName, u32>,
    /// How many frontends each has.
    cluster_ips: HashMap<abi::Addr, u32>,
    /// By index; 0 is nobody's.
    services: Vec<Service>,
    free_services: VecDeque<u32>,
    by_set: HashMap<Set, u32>,
    by_base: HashMap<u32, Held>,
    space: Space,
    /// By the base of the set's slots.
    maglev: HashMap<u32, Places>,
    maglev_space: Space,
    /// Ranges that were in use until this change: of slots, and of blocks.
    leaving: Vec<abi::Range>,
    leaving_maglev: Vec<abi::Range>,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            frontends: HashMap::default(),
            by_name: HashMap::default(),
            cluster_ips: HashMap::default(),
            services: vec![Service::default()],
            free_services: VecDeque::new(),
            by_set: HashMap::default(),
            by_base: HashMap::default(),
            space: Space::new(1, space::piece),
            maglev: HashMap::default(),
            maglev_space: Space::new(0, maglev::piece),
            leaving: Vec::new(),
            leaving_maglev: Vec::new(),
        }
    }
}

impl Layout {
    /// Takes over what a former agent left in the maps. Services have no names until a frontend of theirs is asked for; a range
    /// that doesn't hold what its frontend expects counts as unknown, so its frontend will be written anew. A Maglev table was written
    /// before its frontend, and isn't read again.
    pub fn adopt(frontends: Vec<(abi::FrontendKey, abi::Frontend)>, slot: impl Fn(u32) -> Option<abi::Slot>) -> Self {
        let mut layout = Self::default();
        let mut ranges = Vec::new();
        for (key, value) in frontends {
            layout.grow_services(value.service);
            layout.services[value.service as usize].users += 1;
            for range in [value.internal, value.external] {
                if range.count != 0 && layout.adopt_range(value.service, range, &slot) {
                    ranges.push(range);
                }
            }
            if value.maglev.count != 0 {
                layout.maglev.entry(value.external.base).or_insert(Places { range: value.maglev, users: 0 }).users += 1;
            }
            if is_cluster_ip(&value) {
                *layout.cluster_ips.entry(key.addr).or_default() += 1;
            }
            layout.frontends.insert(key, value);
        }
        layout.free_services = (1..layout.services.len() as u32).filter(|&id| layout.services[id as usize].users == 0).collect();
        layout.space = layout.space.around(ranges);
        let tables = layout.maglev.values().map(|places| blocks(places.range)).collect();
        layout.maglev_space = layout.maglev_space.around(tables);
        layout
    }

    /// True when the range is new.
    fn adopt_range(&mut self, service: u32, range: abi::Range, slot: &impl Fn(u32) -> Option<abi::Slot>) -> bool {
        match self.by_base.get_mut(&range.base) {
            Some(held) => {
                held.users += 1;
                false
            }
            None => {
                let read = |index: u32| slot(range.base.checked_add(index)?).filter(|slot| slot.service == service).map(endpoint);
                let Some(endpoints) = (0..range.count).map(read).collect::<Option<Arc<[Endpoint]>>>() else { return true };
                let set = Set { service, endpoints };
                self.by_set.insert(set.clone(), range.base);
                self.by_base.insert(range.base, Held { set, users: 1 });
                true
            }
        }
    }

    fn grow_services(&mut self, id: u32) {
        if self.services.len() <= id as usize {
            self.services.resize_with(id as usize + 1, Service::default);
        }
    }

    pub fn len(&self) -> usize {
        self.frontends.len()
    }

    /// The Service ports with their indices.
    pub fn services(&self) -> impl Iterator<Item = (&ServicePortName, u32)> {
        self.by_name.iter().map(|(name, id)| (name, *id))
    }

    /// Those backends that new connections don't get.
    pub fn without(&self, mut backends: HashSet<abi::sight::TrafficKey>) -> HashSet<abi::sight::TrafficKey> {
        for set in self.by_set.keys() {
            if backends.is_empty() {
                break;
            }
            for endpoint in set.endpoints.iter() {
                let backend = abi::Endpoint::new(endpoint.ip.into(), abi::Port::new(endpoint.port));
                backends.remove(&abi::sight::TrafficKey { service: set.service, backend });
            }
        }
        backends
    }

    /// What the maps must have room for.
    pub fn needed(&self) -> Sizes {
        Sizes {
            frontends: self.frontends.len() as u32,
            slots: self.space.top,
            services: self.services.len() as u32,
            maglev: self.maglev_space.top,
        }
    }

    /// All frontends, for a map that is empty.
    pub fn frontends(&self) -> Vec<(abi::FrontendKey, abi::Frontend)> {
        self.frontends.iter().map(|(key, value)| (*key, *value)).collect()
    }

    /// Who may connect to the Service ports that don't take everybody.
    pub fn source_ranges(&self, table: &Table) -> HashMap<abi::SourceRange, u32> {
        let mut ranges = HashMap::default();
        for (_, entry) in table.iter().filter(|(_, entry)| !entry.source_ranges.is_empty()) {
            let Some(&service) = self.by_name.get(&entry.service) else { continue };
            ranges.extend(
                entry.source_ranges.iter().map(|net| (abi::SourceRange::new(service, net.network().into(), net.prefix_len().into()), 1)),
            );
        }
        ranges
    }

    /// The cluster IPs that the frontends have.
    pub fn cluster_ips(&self) -> HashMap<abi::Addr, u32> {
        self.cluster_ips.keys().map(|addr| (*addr, 1)).collect()
    }

    /// The steps that bring the maps from what they hold to `table`.
    ///
    /// `node_ips` are the addresses that the node's own connections come from.
    pub fn apply(&mut self, table: &Table, delta: &Delta, node_ips: &[IpAddr]) -> Batch {
        for range in std::mem::take(&mut self.leaving) {
            self.space.free(range);
        }
        for range in std::mem::take(&mut self.leaving_maglev) {
            self.maglev_space.free(blocks(range));
        }
        let mut batch = Batch::default();
        if self.frontends.is_empty() {
            self.reserve(delta.upserts.len(), &mut batch);
        }
        for upsert in &delta.upserts {
            if let Some(entry) = table.get(&upsert.frontend) {
                self.put(&upsert.frontend, entry, node_ips, &mut batch);
            }
        }
        for removal in &delta.removals {
            self.remove(&key(&removal.frontend), &mut batch);
        }
        // All of the table's are among them by now.
        if delta.full && self.frontends.len() > table.len() {
            let wanted: HashSet<_> = table.iter().map(|(frontend, _)| key(frontend)).collect();
            let mut stale: Vec<_> = self.frontends.keys().filter(|key| !wanted.contains(key)).copied().collect();
            stale.sort_by_key(|key| (key.addr.sort_key(), key.port.host(), key.protocol));
            stale.iter().for_each(|key| self.remove(key, &mut batch));
        }
        batch
    }

    /// Room for this many frontends; most have a Service, an address and a set of their own.
    fn reserve(&mut self, frontends: usize, batch: &mut Batch) {
        self.frontends.reserve(frontends);
        self.by_name.reserve(frontends);
        self.cluster_ips.reserve(frontends);
        self.services.reserve(frontends);
        self.by_set.reserve(frontends);
        self.by_base.reserve(frontends);
        batch.puts.reserve(frontends);
    }

    fn put(&mut self, frontend: &Frontend, entry: &Entry, node_ips: &[IpAddr], batch: &mut Batch) {
        let key = key(frontend);
        let service = self.service(&entry.service, &key, batch);
        let internal = self.hold(service, entry.short_circuit.as_ref().unwrap_or(&entry.backends), batch);
        let external = match &entry.short_circuit {
            Some(_) => self.hold(service, &entry.backends, batch),
            None => self.share(internal),
        };
        let affinity = entry.affinity.map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX));
        // Few clients outside find their way to a cluster IP, and there may be tens of thousands.
        let maglev = if entry.kind == Kind::ClusterIp { abi::Range::default() } else { self.hold_table(external, &entry.backends, batch) };
        let value = abi::Frontend { service, internal, external, maglev, flags: flags(entry, node_ips), affinity };
        self.services[service as usize].users += 1;
        let previous = self.frontends.insert(key, value);
        if previous != Some(value) {
            batch.puts.push((key, value));
        }
        if is_cluster_ip(&value) {
            self.count(key.addr, true, batch);
        }
        if let Some(previous) = previous {
            self.release(&key, &previous, batch);
        }
    }

    fn remove(&mut self, key: &abi::FrontendKey, batch: &mut Batch) {
        if let Some(previous) = self.frontends.remove(key) {
            batch.deletes.push(*key);
            self.release(key, &previous, batch);
        }
    }

    /// One frontend of the cluster IP more or less.
    fn count(&mut self, addr: abi::Addr, more: bool, batch: &mut Batch) {
        let users = self.cluster_ips.entry(addr).or_default();
        *users = if more { *users + 1 } else { users.saturating_sub(1) };
        match (more, *users) {
            (true, 1) => batch.cluster_ips.push((addr, true)),
            (false, 0) => {
                self.cluster_ips.remove(&addr);
                batch.cluster_ips.push((addr, false));
            }
            _ => {}
        }
    }

    fn release(&mut self, key: &abi::FrontendKey, value: &abi::Frontend, batch: &mut Batch) {
        if is_cluster_ip(value) {
            self.count(key.addr, false, batch);
        }
        if let MapEntry::Occupied(mut places) = self.maglev.entry(value.external.base)
            && places.get().range == value.maglev
        {
            places.get_mut().users -= 1;
            if places.get().users == 0 {
                self.leaving_maglev.push(places.remove().range);
            }
        }
        for range in [value.internal, value.external] {
            let MapEntry::Occupied(mut held) = self.by_base.entry(range.base) else { continue };
            if range.count == 0 {
                continue;
            }
            held.get_mut().users -= 1;
            if held.get().users == 0 {
                self.by_set.remove(&held.remove().set);
                self.leaving.push(range);
            }
        }
        let service = &mut self.services[value.service as usize];
        service.users -= 1;
        if service.users == 0 {
            if let Some(name) = service.name.take() {
                self.by_name.remove(&name);
            }
            self.free_services.push_back(value.service);
        }
    }

    /// The Service port's index: the one it has, or the nameless one that its frontend was found with, or a new one.
    fn service(&mut self, name: &ServicePortName, key: &abi::FrontendKey, batch: &mut Batch) -> u32 {
        if let Some(&id) = self.by_name.get(name) {
            return id;
        }
        let found = self.frontends.get(key).map(|value| value.service).filter(|&id| self.services[id as usize].name.is_none());
        let id = found.unwrap_or_else(|| {
            let id = self.free_services.pop_front().unwrap_or(self.services.len() as u32);
            self.grow_services(id);
            batch.fresh_services.push(id);
            id
        });
        self.services[id as usize].name = Some(name.clone());
        self.by_name.insert(name.clone(), id);
        id
    }

    /// The same range once more.
    fn share(&mut self, range: abi::Range) -> abi::Range {
        if let Some(held) = self.by_base.get_mut(&range.base) {
            held.users += 1;
        }
        range
    }

    /// The range that holds exactly these backends, written if there is none yet.
    fn hold(&mut self, service: u32, endpoints: &Arc<[Endpoint]>, batch: &mut Batch) -> abi::Range {
        let count = endpoints.len() as u32;
        if count == 0 {
            return abi::Range::default();
        }
        let set = Set { service, endpoints: endpoints.clone() };
        if let Some(&base) = self.by_set.get(&set) {
            if let Some(held) = self.by_base.get_mut(&base) {
                held.users += 1;
            }
            return abi::Range { base, count };
        }
        let base = self.space.take(count);
        batch.slots.extend(slots(base, &set));
        self.by_set.insert(set.clone(), base);
        self.by_base.insert(base, Held { set, users: 1 });
        abi::Range { base, count }
    }

    /// The set's Maglev table, written if there is none yet.
    fn hold_table(&mut self, set: abi::Range, endpoints: &[Endpoint], batch: &mut Batch) -> abi::Range {
        let count = maglev::places(endpoints.len());
        if count == 0 {
            return abi::Range::default();
        }
        let Self { maglev, maglev_space, .. } = self;
        let places = maglev.entry(set.base).or_insert_with(|| {
            let base = maglev_space.take(maglev::blocks(count));
            batch.maglev.extend((base..).zip(table(endpoints)));
            Places { range: abi::Range { base, count }, users: 0 }
        });
        places.users += 1;
        places.range
    }
}

/// Where a Maglev table is among the blocks.
fn blocks(places: abi::Range) -> abi::Range {
    abi::Range { base: places.base, count: maglev::blocks(places.count) }
}

fn table(endpoints: &[Endpoint]) -> Vec<abi::MaglevBlock> {
    let backends: Vec<_> = endpoints.iter().map(|endpoint| abi::Endpoint::new(endpoint.ip.into(), abi::Port::new(endpoint.port))).collect();
    maglev::table(&backends)
}

fn is_cluster_ip(frontend: &abi::Frontend) -> bool {
    frontend.flags & abi::frontend_flags::CLUSTER_IP != 0
}

pub fn protocol(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => abi::TCP,
        Protocol::Udp => abi::UDP,
        Protocol::Sctp => abi::SCTP,
    }
}

pub fn key(frontend: &Frontend) -> abi::FrontendKey {
    let addr = match frontend.address {
        Address::Ip(ip) => ip.into(),
        Address::Node(Family::V4) => abi::Addr::NODE_V4,
        Address::Node(Family::V6) => abi::Addr::NODE_V6,
    };
    abi::FrontendKey::new(addr, abi::Port::new(frontend.port), protocol(frontend.protocol))
}

fn flags(entry: &Entry, node_ips: &[IpAddr]) -> u32 {
    use abi::frontend_flags::*;
    let mut flags = match entry.masquerade {
        Masquerade::OffCluster => 0,
        Masquerade::Always => MASQUERADE_ALWAYS,
        Masquerade::FromNode => MASQUERADE_NEVER,
    };
    match entry.kind {
        Kind::ClusterIp => flags |= CLUSTER_IP,
        Kind::HostPort => flags |= HOST_PORT,
        Kind::NodePort | Kind::ExternalIp | Kind::LoadBalancer => {}
    }
    if entry.no_endpoints == NoEndpoints::Drop && entry.backends.is_empty() {
        // What reaches clients inside by the short circuit has its own reason to be empty: no endpoint anywhere.
        flags |= DROP_EXTERNAL | if entry.short_circuit.is_none() { DROP_INTERNAL } else { 0 };
    }
    if entry.balancing == Balancing::LeastConnections {
        flags |= LEAST_CONNECTIONS;
    }
    if !entry.admits_all() {
        flags |= SOURCE_RANGES | if entry.admits_node(node_ips) { 0 } else { NODE_REFUSED };
    }
    flags
}

fn slots(base: u32, set: &Set) -> impl Iterator<Item = (u32, abi::Slot)> + '_ {
    set.endpoints.iter().zip(base..).map(|(endpoint, index)| {
        let flags = if endpoint.local { abi::slot_flags::LOCAL } else { 0 };
        (index, abi::Slot { addr: endpoint.ip.into(), port: abi::Port::new(endpoint.port), flags, service: set.service })
    })
}

fn endpoint(slot: abi::Slot) -> Endpoint {
    Endpoint { ip: slot.addr.ip(), port: slot.port.host(), local: slot.flags & abi::slot_flags::LOCAL != 0 }
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for id in &self.fresh_services {
            writeln!(f, "service {id}")?;
        }
        for (index, slot) in &self.slots {
            let local = if slot.flags & abi::slot_flags::LOCAL != 0 { "*" } else { "" };
            writeln!(f, "slot {index} = {} {}:{}{local}", slot.service, slot.addr.ip(), slot.port.host())?;
        }
        if let (Some((first, _)), Some((last, _))) = (self.maglev.first(), self.maglev.last()) {
            writeln!(f, "maglev {first} to {last}")?;
        }
        for (key, value) in &self.puts {
            write!(f, "put {}", Key(key))?;
            write!(f, " = {} {}", value.service, Range(value.internal))?;
            if value.external != value.internal {
                write!(f, " outside {}", Range(value.external))?;
            }
            if value.maglev.count != 0 {
                write!(f, " maglev {}", Range(value.maglev))?;
            }
            if value.affinity != 0 {
                write!(f, " affinity {}s", value.affinity)?;
            }
            writeln!(f, " flags {:#x}", value.flags)?;
        }
        self.deletes.iter().try_for_each(|key| writeln!(f, "delete {}", Key(key)))
    }
}

struct Key<'a>(&'a abi::FrontendKey);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.0.addr.ip(), self.0.port.host(), self.0.protocol)
    }
}

struct Range(abi::Range);

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}+{}]", self.0.base, self.0.count)
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
