//! From the desired table to map contents, purely: which slots to write, which frontends to put and delete, in that order.
//!
//! A set of backends is a range of slots that is never changed while a frontend names it: a change writes a new range, then turns
//! the frontends to it, and frees the old range for the next change. So each frontend goes from the old set to the new in one step.
use std::collections::hash_map::Entry as MapEntry;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use outrigger_abi as abi;
use outrigger_desired::{
    Address, Delta, Endpoint, Entry, Family, Frontend, Kind, Masquerade, NoEndpoints, Protocol, ServicePortName, Table,
};

use super::load::Sizes;

/// Writes to the maps, to be made from top to bottom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Indices that a new Service port got; their old counts mean nothing.
    pub fresh_services: Vec<u32>,
    pub slots: Vec<(u32, abi::Slot)>,
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
    /// Ranges that were in use until this change.
    leaving: Vec<abi::Range>,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            frontends: HashMap::new(),
            by_name: HashMap::new(),
            cluster_ips: HashMap::new(),
            services: vec![Service::default()],
            free_services: VecDeque::new(),
            by_set: HashMap::new(),
            by_base: HashMap::new(),
            space: Space { top: 1, free: BTreeMap::new() },
            leaving: Vec::new(),
        }
    }
}

impl Layout {
    /// Takes over what a former agent left in the maps. Services have no names until a frontend of theirs is asked for; a range
    /// that doesn't hold what its frontend expects counts as unknown, so its frontend will be written anew.
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
            if is_cluster_ip(&value) {
                *layout.cluster_ips.entry(key.addr).or_default() += 1;
            }
            layout.frontends.insert(key, value);
        }
        layout.free_services = (1..layout.services.len() as u32).filter(|&id| layout.services[id as usize].users == 0).collect();
        layout.space = Space::around(ranges);
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

    /// The backends that new connections get, with the Service ports that have them.
    pub fn backends(&self) -> HashSet<(u32, SocketAddr)> {
        self.by_set.keys().flat_map(|set| set.endpoints.iter().map(|endpoint| (set.service, endpoint.socket()))).collect()
    }

    /// What the maps must have room for.
    pub fn needed(&self) -> Sizes {
        Sizes { frontends: self.frontends.len() as u32, slots: self.space.top, services: self.services.len() as u32 }
    }

    /// The whole content, for maps that are empty.
    pub fn dump(&self) -> Batch {
        let mut batch = Batch::default();
        for (&base, held) in &self.by_base {
            batch.slots.extend(slots(base, &held.set));
        }
        batch.puts.extend(self.frontends.iter().map(|(key, value)| (*key, *value)));
        batch.cluster_ips.extend(self.cluster_ips.keys().map(|addr| (*addr, true)));
        batch
    }

    /// Who may connect to the Service ports that don't take everybody.
    pub fn source_ranges(&self, table: &Table) -> HashMap<abi::SourceRange, u32> {
        let mut ranges = HashMap::new();
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
        let mut batch = Batch::default();
        for upsert in &delta.upserts {
            if let Some(entry) = table.get(&upsert.frontend) {
                self.put(&upsert.frontend, entry, node_ips, &mut batch);
            }
        }
        for removal in &delta.removals {
            self.remove(&key(&removal.frontend), &mut batch);
        }
        if delta.full {
            let wanted: HashSet<_> = table.iter().map(|(frontend, _)| key(frontend)).collect();
            let mut stale: Vec<_> = self.frontends.keys().filter(|key| !wanted.contains(key)).copied().collect();
            stale.sort_by_key(|key| (key.addr.sort_key(), key.port.host(), key.protocol));
            stale.iter().for_each(|key| self.remove(key, &mut batch));
        }
        batch
    }

    fn put(&mut self, frontend: &Frontend, entry: &Entry, node_ips: &[IpAddr], batch: &mut Batch) {
        let key = key(frontend);
        let service = self.service(&entry.service, &key, batch);
        let internal = self.hold(service, entry.short_circuit.as_ref().unwrap_or(&entry.backends), batch);
        let external = self.hold(service, &entry.backends, batch);
        let affinity = entry.affinity.map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX));
        let value = abi::Frontend { service, internal, external, flags: flags(entry, node_ips), affinity };
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

/// The slots that are in no range, by the size of their piece. The longest free is used first, so that a range stays as it was
/// for as long as can be.
#[derive(Debug)]
struct Space {
    /// The first slot that was never used.
    top: u32,
    free: BTreeMap<u32, VecDeque<u32>>,
}

impl Space {
    /// Sizes of pieces: 1, 2, 3, 4, 6, 8, 12, 16, … so at most a third of a piece is unused.
    fn piece(count: u32) -> u32 {
        let power = count.next_power_of_two();
        let between = power / 4 * 3;
        if count <= between { between } else { power }
    }

    fn take(&mut self, count: u32) -> u32 {
        let piece = Self::piece(count);
        if let Some(base) = self.reuse(piece) {
            return base;
        }
        let base = self.top;
        self.top += piece;
        base
    }

    fn reuse(&mut self, piece: u32) -> Option<u32> {
        let bases = self.free.get_mut(&piece)?;
        let base = bases.pop_front();
        if bases.is_empty() {
            self.free.remove(&piece);
        }
        base
    }

    fn free(&mut self, range: abi::Range) {
        self.free.entry(Self::piece(range.count)).or_default().push_back(range.base);
    }

    /// The space around ranges that are in use.
    fn around(mut ranges: Vec<abi::Range>) -> Self {
        ranges.sort_by_key(|range| range.base);
        let mut space = Self { top: 1, free: BTreeMap::new() };
        for range in ranges {
            while space.top < range.base {
                // The largest piece that fits the gap.
                let gap = range.base - space.top;
                let count = (1..=gap).rev().find(|&count| Self::piece(count) <= gap).unwrap_or(1);
                space.free(abi::Range { base: space.top, count });
                space.top += Self::piece(count);
            }
            space.top = space.top.max(range.base.saturating_add(Self::piece(range.count)));
        }
        space
    }
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
        for (key, value) in &self.puts {
            write!(f, "put {}", Key(key))?;
            write!(f, " = {} {}", value.service, Range(value.internal))?;
            if value.external != value.internal {
                write!(f, " outside {}", Range(value.external))?;
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
