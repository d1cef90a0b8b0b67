//! Service traffic by eBPF: sockets of the node and its pods are led to backends when they connect or send.
//!
//! [`plan`] says what the maps should hold (pure), [`load`] brings maps and programs into the kernel, [`maps`] reads and writes them,
//! [`attach`] holds the programs in place by pinned links, [`restore`] reads a former agent's maps back, [`sockets`] ends what
//! still points at a gone backend, [`sweep`] forgets connections that are over, [`inspect`] shows what the maps say,
//! [`sight`] what the programs count and tell.
mod attach;
pub mod inspect;
mod load;
mod maps;
mod plan;
mod restore;
mod sight;
mod sockets;
mod sweep;
mod sys;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use outrigger_abi as abi;
use outrigger_desired::{self as desired, Delta, Entry, Family, Frontend, Protocol, Table};

use crate::backend::{Applied, Backend, BackendError, Live, Parting, Pending, Restored, Result};
use crate::config::{Config, Mode, PodInterfaces};
use crate::namespace::{self, Address, Changes, Namespace};
use crate::sight::{Counts, Event};
use attach::{Interface, Pins};
use load::{Programs, Sizes};
use maps::{Shared, Tables};
use plan::{Batch, Layout};
use sweep::Sweep;

/// How often the kernel is asked whether the node's interfaces or addresses changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The first feature that this kernel or build lacks, or `None` when eBPF can carry Service traffic here.
pub fn missing(config: &Config) -> Option<String> {
    if let Some(reason) = load::unusable() {
        return Some(reason.into());
    }
    let tried = attach::open_cgroup(&config.cgroup2_path)
        .map(drop)
        .and_then(|()| Pins::mount(&config.pin_dir))
        .and_then(|()| namespace::cookie().map(drop).map_err(|error| BackendError::kernel("read the network namespace's cookie", error)))
        .and_then(|()| Programs::try_load())
        .and_then(|programs| attach::programs().try_for_each(|name| programs.program(&name).map(drop)));
    tried.err().map(|error| error.to_string())
}

/// Whether programs in place have frontends to lead to.
pub fn is_left(config: &Config) -> bool {
    let tables = Pins::at(&config.pin_dir).tables();
    tables.join("frontends").exists()
        && Tables::open(&tables).and_then(|tables| tables.frontends.entries()).is_ok_and(|frontends| !frontends.is_empty())
}

pub fn open(config: &Config) -> Result<Box<dyn Backend>> {
    if let Some(reason) = load::unusable() {
        return Err(BackendError::Unsupported { mode: Mode::Ebpf, missing: reason.into() });
    }
    Ok(Box::new(Ebpf::open(config)?))
}

struct Ebpf {
    cgroup_path: PathBuf,
    cgroup: File,
    pins: Pins,
    nodeport_addresses: Vec<IpNet>,
    node_ips: Vec<IpAddr>,
    cluster_cidrs: Vec<IpNet>,
    pod_interfaces: Option<PodInterfaces>,
    node: Namespace,
    host_namespace: u64,
    programs: Programs,
    tables: Tables,
    shared: Shared,
    layout: Layout,
    /// Some Service port has source ranges.
    narrowed: bool,
    /// The programs of this agent are in place.
    attached: bool,
    /// The interfaces that they hang on.
    attached_to: Vec<Interface>,
    changes: Changes,
    sweep: Sweep,
    upkeep: sight::Upkeep,
    listener: Mutex<Option<sight::Listener>>,
}

impl Ebpf {
    fn open(config: &Config) -> Result<Self> {
        let cgroup = attach::open_cgroup(&config.cgroup2_path)?;
        let pins = Pins::open(&config.pin_dir)?;
        let node = Namespace::current().map_err(|error| BackendError::kernel("open the node's network namespace", error))?;
        let host_namespace = namespace::cookie().map_err(|error| BackendError::kernel("read the network namespace's cookie", error))?;
        let watch = |error| BackendError::kernel("watch the node's interfaces", error);
        let changes = node.run(Changes::open).map_err(watch)?.map_err(watch)?;
        let programs = Programs::load(&pins.tables(), &pins.shared(), &Sizes::INITIAL, host_namespace)?;
        let tables = Tables::open(&pins.tables())?;
        let shared = Shared::open(&pins.shared())?;
        Ok(Self {
            cgroup_path: config.cgroup2_path.clone(),
            cgroup,
            pins,
            nodeport_addresses: config.nodeport_addresses.clone(),
            node_ips: config.node_ips.clone(),
            cluster_cidrs: config.cluster_cidrs.clone(),
            pod_interfaces: config.pod_interfaces.clone(),
            node,
            host_namespace,
            programs,
            tables,
            shared,
            layout: Layout::default(),
            narrowed: false,
            attached: false,
            attached_to: Vec::new(),
            changes,
            sweep: Sweep::default(),
            upkeep: sight::Upkeep::default(),
            listener: Mutex::default(),
        })
    }

    fn sizes(&self) -> Sizes {
        Sizes { frontends: self.tables.frontends.capacity, slots: self.tables.slots.capacity, services: self.tables.counters.capacity }
    }

    fn apply_now(&mut self, table: &Table, delta: &Delta) -> Result<Applied> {
        if delta.full {
            // The mirror may be wrong after a failure; the kernel isn't.
            self.layout = restore::read(&self.tables)?;
        }
        let batch = self.layout.apply(table, delta, &self.node_ips);
        let (upserted, removed) = (batch.puts.len(), batch.deletes.len());
        sight::forget(&self.shared, &batch.fresh_services)?;
        self.update_source_ranges(table, delta)?;
        if self.sizes().hold(&self.layout.needed()) {
            write(&self.tables, &batch)?;
            if delta.full {
                self.tables.cluster_ips.settle(self.layout.cluster_ips())?;
            }
            if !self.attached {
                attach::attach_cgroup(&self.programs, &self.cgroup, &self.pins)?;
            }
        } else {
            self.grow()?;
        }
        if delta.full || self.changes.any() {
            self.update_addresses()?;
        }
        if !self.attached {
            self.pins.remove_other_versions()?;
            self.attached = true;
        }
        let ended = self.end(table, delta);
        Ok(Applied { upserted, removed, ended })
    }

    /// Before the frontends that ask for them. Few Services have any, so all are settled at once.
    fn update_source_ranges(&mut self, table: &Table, delta: &Delta) -> Result<()> {
        let mut changed = delta.upserts.iter().filter_map(|upsert| table.get(&upsert.frontend));
        if delta.full || self.narrowed || changed.any(|entry| !entry.source_ranges.is_empty()) {
            let ranges = self.layout.source_ranges(table);
            self.narrowed = !ranges.is_empty();
            self.shared.source_ranges.settle(ranges)?;
        }
        Ok(())
    }

    /// Fills larger maps beside those in use and turns the programs to them; readers see one or the other, each whole.
    fn grow(&mut self) -> Result<()> {
        let sizes = self.sizes().grown(&self.layout.needed());
        tracing::info!(frontends = sizes.frontends, backends = sizes.slots, services = sizes.services, "eBPF maps grow");
        let folder = self.pins.begin_next_tables()?;
        let programs = Programs::load(&folder, &self.pins.shared(), &sizes, self.host_namespace)?;
        let tables = Tables::open(&folder)?;
        write(&tables, &self.layout.dump())?;
        attach::attach_cgroup(&programs, &self.cgroup, &self.pins)?;
        self.programs = programs;
        self.attached_to.clear();
        self.update_addresses()?;
        self.pins.adopt_next_tables()?;
        self.tables = tables;
        Ok(())
    }

    /// Keeps to the node's addresses, which NodePorts and host ports are reached by, and to its interfaces.
    fn update_addresses(&mut self) -> Result<()> {
        let failed = |error| BackendError::kernel("list the node's interfaces", error);
        let look = || -> io::Result<_> { Ok((namespace::addresses()?, namespace::interfaces()?)) };
        let (addresses, names) = self.node.run(look).map_err(failed)?.map_err(failed)?;
        self.shared.node_addresses.settle(node_addresses(&addresses, &self.nodeport_addresses))?;
        let uplinks = uplinks(&addresses, &self.node_ips, &self.cluster_cidrs, self.pod_interfaces.as_ref());
        let Self { node, node_ips, programs, pins, shared, attached_to, .. } = self;
        let attach = || -> Result<Vec<Interface>> {
            // Those that are gone by now have no index.
            let indexed = |name: String| Some(Interface { index: nix::net::if_::if_nametoindex(name.as_str()).ok()?, name });
            let interfaces: Vec<Interface> = names.into_iter().filter_map(indexed).collect();
            let sources = interfaces.iter().filter_map(|interface| Some((interface.index, *uplinks.get(&interface.name)?)));
            shared.uplinks.settle(sources.chain([(0, own_addresses(node_ips))]).collect())?;
            if *attached_to != interfaces {
                attach::attach_interfaces(programs, &interfaces, pins)?;
            }
            Ok(interfaces)
        };
        self.attached_to = node.run(attach).map_err(failed)??;
        Ok(())
    }

    /// Ends what still points at gone backends: those that the delta names or, after a start, those that the table no longer knows.
    fn end(&self, table: &Table, delta: &Delta) -> usize {
        if delta.gone.is_empty() && !delta.full {
            return 0;
        }
        let gone: HashSet<(abi::FrontendKey, SocketAddr)> =
            delta.gone.iter().map(|gone| (plan::key(&gone.frontend), gone.backend)).collect();
        let is_doomed = |peer: &abi::Peer| {
            let backend = SocketAddr::new(peer.backend.addr.ip(), peer.backend.port.host());
            let exact = abi::FrontendKey::new(peer.frontend.addr, peer.frontend.port, peer.protocol as u8);
            let by_node = abi::FrontendKey { addr: exact.addr.node(), ..exact };
            gone.contains(&(exact, backend)) || gone.contains(&(by_node, backend)) || (delta.full && is_stale(table, peer, backend))
        };
        self.end_flows(&is_doomed) + self.end_sockets(&is_doomed)
    }

    /// Packets of an ended TCP flow reach the node itself, which answers them by a reset.
    fn end_flows(&self, is_doomed: &impl Fn(&abi::Peer) -> bool) -> usize {
        let flows = match self.shared.flows.entries() {
            Ok(flows) => flows,
            Err(error) => {
                tracing::warn!(%error, "flows to gone backends are left to time out");
                return 0;
            }
        };
        let opens = flows.iter().filter(|(_, flow)| flow.flags & abi::flow_flags::REPLY == 0);
        let mut ended = 0;
        for (tuple, flow) in opens {
            let peer = abi::Peer {
                frontend: abi::Endpoint::new(tuple.dst, tuple.dport),
                backend: abi::Endpoint::new(flow.to.dst, flow.to.dport),
                protocol: tuple.protocol.into(),
                ..abi::Peer::default()
            };
            if is_doomed(&peer) {
                // Each may have been evicted meanwhile.
                let gone = self.shared.flows.delete(tuple).and_then(|gone| Ok(self.shared.flows.delete(&flow.to.reversed())? | gone));
                ended += usize::from(gone.unwrap_or(false));
            }
        }
        ended
    }

    fn end_sockets(&self, is_doomed: &(impl Fn(&abi::Peer) -> bool + Sync)) -> usize {
        let namespaces = match namespace::below(&self.cgroup_path, &self.node) {
            Ok(namespaces) => namespaces,
            Err(error) => {
                tracing::warn!(%error, cgroup = %self.cgroup_path.display(), "sockets of gone backends are left to time out");
                return 0;
            }
        };
        let (ended, error) = sockets::end(&namespaces, &self.shared, is_doomed);
        if let Some(error) = error {
            tracing::warn!(%error, "some sockets of gone backends are left to time out");
        }
        ended
    }

    fn teardown_now(&mut self, parting: Parting) -> Result<()> {
        match parting {
            // Without frontends nothing new is led anywhere; the notes on live sockets still translate their replies.
            Parting::Handover => {
                let keys = self.tables.frontends.entries()?;
                keys.iter().try_for_each(|(key, _)| self.tables.frontends.delete(key).map(drop))?;
                self.tables.cluster_ips.settle(HashMap::new())?;
                self.layout = Layout::default();
                Ok(())
            }
            Parting::Final => self.pins.remove(),
        }
    }
}

fn write(tables: &Tables, batch: &Batch) -> Result<()> {
    batch.fresh_services.iter().try_for_each(|&service| tables.counters.reset(service))?;
    tables.slots.put_all(&batch.slots)?;
    tables.frontends.put_all(&batch.puts)?;
    batch.deletes.iter().try_for_each(|key| tables.frontends.delete(key).map(drop))?;
    for (addr, came) in &batch.cluster_ips {
        if *came { tables.cluster_ips.put(addr, &1)? } else { _ = tables.cluster_ips.delete(addr)? }
    }
    Ok(())
}

/// A socket whose backend its frontend no longer has. Where the frontend is gone too, TCP connections are left to their
/// endpoints, and UDP flows, which have no end of their own, are ended.
fn is_stale(table: &Table, peer: &abi::Peer, backend: SocketAddr) -> bool {
    let protocol = match peer.protocol as u8 {
        abi::TCP => Protocol::Tcp,
        abi::UDP => Protocol::Udp,
        _ => return false,
    };
    let ip = peer.frontend.addr.ip();
    let frontend = |address| Frontend { address, port: peer.frontend.port.host(), protocol };
    let entry: Option<&Entry> =
        table.get(&frontend(desired::Address::Ip(ip))).or_else(|| table.get(&frontend(desired::Address::Node(Family::of(ip)))));
    match entry {
        Some(entry) => !entry.alive().any(|endpoint| endpoint.socket() == backend),
        None => protocol == Protocol::Udp,
    }
}

/// The node as a whole, for those who ask for its address but come by no uplink.
fn own_addresses(node_ips: &[IpAddr]) -> abi::Uplink {
    let first = |v4: bool| node_ips.iter().find(|ip| ip.is_ipv4() == v4).map(|ip| abi::Addr::from(*ip)).unwrap_or_default();
    abi::Uplink { v4: first(true), v6: first(false) }
}

/// Which of the node's addresses answer, and to whom.
fn node_addresses(found: &[Address], selected: &[IpNet]) -> HashMap<abi::Addr, u32> {
    use abi::node_address_flags::{HOST_ONLY, NODE_PORTS};
    let flags = |address: &Address| {
        let chosen = selected.is_empty() || selected.iter().any(|net| net.contains(&address.ip));
        let flags = if chosen { NODE_PORTS } else { 0 } | if address.loopback { HOST_ONLY } else { 0 };
        (address.ip.into(), flags)
    };
    found.iter().filter(|address| !is_link_local(address.ip)).map(flags).collect()
}

/// A link-local address means nothing without its interface.
fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// The interfaces that clients outside may come by, with the source that each gives to what is sent on: its own address of the
/// node's where it has one. Interfaces towards pods have no address,
/// or one of the pods' network.
fn uplinks(
    found: &[Address],
    node_ips: &[IpAddr],
    cluster_cidrs: &[IpNet],
    pod_interfaces: Option<&PodInterfaces>,
) -> BTreeMap<String, abi::Uplink> {
    let mut uplinks: BTreeMap<String, abi::Uplink> = BTreeMap::new();
    let in_cluster = |address: &&Address| {
        cluster_cidrs.iter().any(|net| net.contains(&address.ip)) || pod_interfaces.is_some_and(|pods| pods.has(&address.interface))
    };
    let to_pods: HashSet<&str> = found.iter().filter(in_cluster).map(|address| address.interface.as_str()).collect();
    let (own, other): (Vec<_>, Vec<_>) = found
        .iter()
        .filter(|address| !address.loopback && !is_link_local(address.ip) && !to_pods.contains(address.interface.as_str()))
        .partition(|address| node_ips.contains(&address.ip));
    for address in own.into_iter().chain(other) {
        let uplink = uplinks.entry(address.interface.clone()).or_default();
        let source = if address.ip.is_ipv4() { &mut uplink.v4 } else { &mut uplink.v6 };
        if *source == abi::Addr::default() {
            *source = address.ip.into();
        }
    }
    uplinks
}

impl Backend for Ebpf {
    fn mode(&self) -> Mode {
        Mode::Ebpf
    }

    fn restore(&mut self) -> Pending<'_, Result<Restored>> {
        Box::pin(async {
            self.layout = restore::read(&self.tables)?;
            Ok(Restored { frontends: self.layout.len() })
        })
    }

    fn apply<'a>(&'a mut self, table: &'a Table, delta: &'a Delta) -> Pending<'a, Result<Applied>> {
        Box::pin(async { self.apply_now(table, delta) })
    }

    fn tidy(&mut self) -> Pending<'_, Option<Duration>> {
        Box::pin(async {
            if self.attached
                && self.changes.any()
                && let Err(error) = self.update_addresses()
            {
                tracing::warn!(%error, "interfaces and addresses that Services are reached by may be out of date");
            }
            if self.sweep.is_due() {
                Sweep::flows(&self.shared.flows);
                if let Err(error) = self.upkeep.run(&self.layout, &self.tables, &self.shared) {
                    tracing::warn!(%error, "how full the eBPF maps are is not known");
                }
            }
            Some(LOOK_INTERVAL)
        })
    }

    fn lookup(&self, frontend: &Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>> {
        let Some(value) = self.tables.frontends.get(&plan::key(frontend))? else { return Ok(None) };
        let range = if outside { value.external } else { value.internal };
        let slots = (range.base..range.base + range.count).filter_map(|index| self.tables.slots.get(&index).transpose());
        slots.map(|slot| slot.map(|slot| SocketAddr::new(slot.addr.ip(), slot.port.host()))).collect::<Result<Vec<_>>>().map(Some)
    }

    fn counted(&self, _: &Table) -> Result<Counts> {
        sight::counts(&self.layout, &self.tables, &self.shared, &self.upkeep.fills)
    }

    fn events(&self, _: &Table) -> Result<Vec<Event>> {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = match &mut *listener {
            Some(listener) => listener,
            none => none.insert(sight::Listener::open(&self.pins.shared())?),
        };
        listener.events(&self.shared, &self.layout, &self.cgroup_path, &self.node)
    }

    fn quiet(&self) {
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // Without this they stop by themselves soon.
        if let Err(error) = sight::quiet(&self.shared) {
            tracing::debug!(%error, "the programs go on telling for a moment");
        }
    }

    fn live(&self, _: &Table) -> Result<Vec<Live>> {
        let namespaces = namespace::below(&self.cgroup_path, &self.node);
        let namespaces = namespaces.map_err(|error| BackendError::kernel("find the pods' network namespaces", error))?;
        let mut all = sockets::list(&namespaces, &self.shared).map_err(|error| BackendError::kernel("list sockets", error))?;
        let opens = self
            .shared
            .flows
            .entries()?
            .into_iter()
            .filter(|(_, flow)| flow.flags & (abi::flow_flags::REPLY | abi::flow_flags::CLOSED) == 0);
        all.extend(opens.map(|(tuple, flow)| Live {
            protocol: tuple.protocol,
            source: Some(SocketAddr::new(tuple.src.ip(), tuple.sport.host())),
            frontend: SocketAddr::new(tuple.dst.ip(), tuple.dport.host()),
            backend: SocketAddr::new(flow.to.dst.ip(), flow.to.dport.host()),
        }));
        Ok(all)
    }

    fn teardown(&mut self, parting: Parting) -> Pending<'_, Result<()>> {
        Box::pin(async move { self.teardown_now(parting) })
    }
}
