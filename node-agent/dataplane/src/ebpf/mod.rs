//! Service traffic by eBPF: sockets of the node and its pods are led to backends when they connect or send.
//!
//! [`plan`] says what the maps should hold (pure; [`maglev`] makes tables, [`space`] finds room), [`load`] brings maps and programs into
//! the kernel, [`maps`] reads and writes them, [`attach`] holds the programs in place by pinned links, [`restore`] reads a former agent's
//! maps back, [`ending`] and [`sockets`] end what still points at a gone backend, [`sweep`] forgets connections that are over,
//! [`activity`] says whether there are any, [`ports`] keeps the node's own sockets off their ports, [`inspect`] shows what the maps say,
//! [`sight`] what the programs count and tell.
mod activity;
pub(crate) mod attach;
mod ending;
pub mod inspect;
pub(crate) mod load;
mod maglev;
pub(crate) mod maps;
mod plan;
mod ports;
mod restore;
mod sight;
mod sockets;
mod space;
mod sweep;
pub(crate) mod sys;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use foldhash::{HashMap, HashSet};
use ipnet::IpNet;
use outrigger_abi as abi;
use outrigger_desired::{self as desired, Delta, Entry, Family, Frontend, Protocol, Table};
use outrigger_logic::{hash, service};

use crate::backend::{Applied, Backend, BackendError, Live, Parting, Pending, Restored, Result};
use crate::config::{Config, Mode, PodInterfaces};
use crate::namespace::{self, Address, Changes, Namespace};
use crate::sight::{Counts, Event};
use attach::{Interface, Pins};
use ending::{Ender, Lost, Reach};
use load::{Programs, Sizes};
use maps::{Shared, Tables};
use plan::Layout;
use sweep::Sweep;

/// How often the kernel is asked whether the node's interfaces or addresses changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Whether programs in place have frontends to lead to.
pub fn is_left(config: &Config) -> bool {
    Tables::open(&Pins::at(&config.pin_dir).maps())
        .and_then(|tables| tables.frontends.entries())
        .is_ok_and(|frontends| !frontends.is_empty())
}

/// Opening is the probe: the kernel has to take all programs.
pub fn open(config: &Config) -> Result<Box<dyn Backend>> {
    if let Some(missing) = load::unusable() {
        return Err(BackendError::Unsupported { mode: Mode::Ebpf, missing: missing.into() });
    }
    let is_first = !Pins::at(&config.pin_dir).maps().exists();
    let opened = Ebpf::open(config);
    if opened.is_err() && is_first {
        // A kernel that can't use them keeps none of the maps. What can't be taken away says less than why eBPF can't be used.
        let _ = Pins::at(&config.pin_dir).remove_maps();
    }
    Ok(Box::new(opened?))
}

struct Ebpf {
    cgroup: File,
    pins: Pins,
    nodeport_addresses: Vec<IpNet>,
    node_ips: Vec<IpAddr>,
    cluster_cidrs: Vec<IpNet>,
    pod_interfaces: Option<PodInterfaces>,
    reach: Arc<Reach>,
    ender: Ender,
    programs: Programs,
    tables: Tables,
    shared: Arc<Shared>,
    layout: Layout,
    /// The layout is what the maps hold.
    known: bool,
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
        let programs = Programs::load(&pins.maps(), host_namespace)?;
        if let Err(error) = node.run(ports::reserve).and_then(|reserved| reserved) {
            tracing::warn!(%error, "the node's own connections may meet those that are sent on in its name");
        }
        let tables = Tables::prepare(&pins.maps(), &Sizes::INITIAL)?;
        let shared = Arc::new(Shared::open(&pins.maps())?);
        let reach = Arc::new(Reach { maps: shared.clone(), node, cgroup_path: config.cgroup2_path.clone() });
        let ender = Ender::start(reach.clone())?;
        Ok(Self {
            cgroup,
            pins,
            nodeport_addresses: config.nodeport_addresses.clone(),
            node_ips: config.node_ips.clone(),
            cluster_cidrs: config.cluster_cidrs.clone(),
            pod_interfaces: config.pod_interfaces.clone(),
            reach,
            ender,
            programs,
            tables,
            shared,
            layout: Layout::default(),
            known: false,
            narrowed: false,
            attached: false,
            attached_to: Vec::new(),
            changes,
            sweep: Sweep::default(),
            upkeep: sight::Upkeep::default(),
            listener: Mutex::default(),
        })
    }

    fn apply_now(&mut self, table: &Table, delta: &Delta) -> Result<Applied> {
        if !std::mem::take(&mut self.known) {
            // The mirror may be wrong after a failure; the kernel isn't.
            self.layout = restore::read(&self.tables)?;
        }
        let batch = self.layout.apply(table, delta, &self.node_ips);
        let (upserted, removed) = (batch.puts.len(), batch.deletes.len());
        sight::forget(&self.shared, &batch.fresh_services)?;
        self.update_source_ranges(table, delta)?;
        self.ender.spare(|| alive(table, delta));
        let exact = self.tables.write(&batch, &self.layout)?;
        if delta.full && !exact {
            self.tables.cluster_ips.settle(self.layout.cluster_ips())?;
        }
        if !self.attached {
            attach::attach_cgroup(&self.programs, &self.cgroup, &self.pins)?;
        }
        if delta.full || self.changes.any() {
            self.update_addresses()?;
        }
        if !self.attached {
            self.pins.remove_other_versions()?;
            self.attached = true;
        }
        self.known = true;
        let ended = if delta.full {
            self.end_stale(table, delta)
        } else {
            self.ender.doom(lost(delta));
            0
        };
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

    /// Keeps to the node's addresses, which NodePorts and host ports are reached by, and to its interfaces.
    fn update_addresses(&mut self) -> Result<()> {
        let failed = |error| BackendError::kernel("list the node's interfaces", error);
        let look = || -> io::Result<_> { Ok((namespace::addresses()?, namespace::interfaces()?)) };
        let (addresses, names) = self.reach.node.run(look).map_err(failed)?.map_err(failed)?;
        self.shared.node_addresses.settle(node_addresses(&addresses, &self.nodeport_addresses))?;
        let uplinks = uplinks(&addresses, &self.node_ips, &self.cluster_cidrs, self.pod_interfaces.as_ref());
        let Self { reach, node_ips, programs, pins, shared, attached_to, .. } = self;
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
        self.attached_to = reach.node.run(attach).map_err(failed)??;
        Ok(())
    }

    /// After a start there is no list of what has gone meanwhile, so each connection is held against the table.
    fn end_stale(&self, table: &Table, delta: &Delta) -> usize {
        let gone: HashSet<Lost> = lost(delta).collect();
        self.reach.end(&|peer: &abi::Peer| {
            let names = ending::names_of(peer);
            names.iter().any(|name| gone.contains(name)) || is_stale(table, peer, names[0].1)
        })
    }

    fn teardown_now(&mut self, parting: Parting) -> Result<()> {
        match parting {
            // Without frontends nothing new is led anywhere; the notes on live sockets still translate their replies.
            Parting::Handover => {
                let keys: Vec<_> = self.tables.frontends.entries()?.into_iter().map(|(key, _)| key).collect();
                self.tables.frontends.delete_all(&keys)?;
                self.tables.cluster_ips.settle(HashMap::default())?;
                self.layout = Layout::default();
                Ok(())
            }
            Parting::Final => {
                if let Err(error) = self.reach.node.run(ports::release).and_then(|released| released) {
                    tracing::warn!(%error, "ports stay reserved that nobody needs");
                }
                self.pins.remove()
            }
        }
    }
}

fn lost(delta: &Delta) -> impl Iterator<Item = Lost> {
    delta.gone.iter().map(|gone| (plan::key(&gone.frontend), gone.backend))
}

fn alive<'a>(table: &'a Table, delta: &'a Delta) -> impl Iterator<Item = Lost> + 'a {
    let changed = delta.upserts.iter().filter_map(|upsert| Some((plan::key(&upsert.frontend), table.get(&upsert.frontend)?)));
    changed.flat_map(|(key, entry)| entry.alive().map(move |endpoint| (key, endpoint.socket())))
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
            self.known = true;
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
            if let Some(seen) = self.sweep.run(&self.shared) {
                let upkeep = seen.and_then(|seen| self.upkeep.take(seen, &self.layout, &self.tables, &self.shared));
                if let Err(error) = upkeep {
                    tracing::warn!(%error, "how full the eBPF maps are is not known");
                }
            }
            Some(LOOK_INTERVAL)
        })
    }

    fn ended(&mut self) -> usize {
        self.ender.ended()
    }

    fn finish(&mut self) -> Pending<'_, ()> {
        Box::pin(async { tokio::task::block_in_place(|| self.ender.finish()) })
    }

    fn lookup(&self, frontend: &Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>> {
        let Some(value) = self.tables.frontends.get(&plan::key(frontend))? else { return Ok(None) };
        let range = if outside { value.external } else { value.internal };
        let slots = (range.base..range.base + range.count).filter_map(|index| self.tables.slots.get(index).transpose());
        slots.map(|slot| slot.map(|slot| SocketAddr::new(slot.addr.ip(), slot.port.host()))).collect::<Result<Vec<_>>>().map(Some)
    }

    fn choice(&self, frontend: &Frontend, client: SocketAddr) -> Result<Option<SocketAddr>> {
        let key = plan::key(frontend);
        let Some(value) = self.tables.frontends.get(&key)?.filter(|value| value.maglev.count != 0) else { return Ok(None) };
        let hash = hash::connection(&client.ip().into(), abi::Port::new(client.port()), key.port, key.protocol);
        let place = service::scale(hash, value.maglev.count);
        let Some(block) = self.tables.maglev.get(value.maglev.base + place / abi::MAGLEV_BLOCK)? else { return Ok(None) };
        let slot = self.tables.slots.get(value.external.base + block.get(place))?;
        Ok(slot.map(|slot| SocketAddr::new(slot.addr.ip(), slot.port.host())))
    }

    fn counted(&self, _: &Table) -> Result<Counts> {
        sight::counts(&self.layout, &self.tables, &self.shared, &self.upkeep.fills)
    }

    fn events(&self, _: &Table) -> Result<Vec<Event>> {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = match &mut *listener {
            Some(listener) => listener,
            none => none.insert(sight::Listener::open(&self.pins.maps())?),
        };
        listener.events(&self.shared, &self.layout, &self.reach.cgroup_path, &self.reach.node)
    }

    fn quiet(&self) {
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // Without this they stop by themselves soon.
        if let Err(error) = sight::quiet(&self.shared) {
            tracing::debug!(%error, "the programs go on telling for a moment");
        }
    }

    fn live(&self, _: &Table) -> Result<Vec<Live>> {
        let namespaces = namespace::below(&self.reach.cgroup_path, &self.reach.node);
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
