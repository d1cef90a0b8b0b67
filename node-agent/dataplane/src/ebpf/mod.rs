//! Service traffic by eBPF: sockets of the node and its pods are led to backends when they connect or send.
//!
//! [`plan`] says what the maps should hold (pure), [`load`] brings maps and programs into the kernel, [`maps`] reads and writes them,
//! [`attach`] holds the programs in place by pinned links, [`restore`] reads a former agent's maps back, [`sockets`] ends what
//! still points at a gone backend, [`inspect`] shows what the maps say.
mod attach;
pub mod inspect;
mod load;
mod maps;
mod namespace;
mod plan;
mod restore;
mod sockets;
mod sys;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use outrigger_abi as abi;
use outrigger_desired::{Address, Delta, Entry, Family, Frontend, Protocol, Table};

use crate::backend::{Applied, Backend, BackendError, Parting, Pending, Restored, Result};
use crate::config::{Config, Mode};
use attach::Pins;
use load::{Programs, Sizes};
use maps::{Shared, Tables};
use namespace::Namespace;
use plan::{Batch, Layout};

/// How often the node's addresses are looked at again.
const ADDRESS_INTERVAL: Duration = Duration::from_secs(10);

/// The first feature that this kernel or build lacks, or `None` when eBPF can carry Service traffic here.
pub fn missing(config: &Config) -> Option<String> {
    if !load::is_built() {
        return Some(load::NOT_BUILT.into());
    }
    let tried = attach::open_cgroup(&config.cgroup2_path)
        .map(drop)
        .and_then(|()| Pins::mount(&config.pin_dir))
        .and_then(|()| namespace::cookie().map(drop).map_err(|error| BackendError::kernel("read the network namespace's cookie", error)))
        .and_then(|()| Programs::try_load().map(drop));
    tried.err().map(|error| error.to_string())
}

pub fn open(config: &Config) -> Result<Box<dyn Backend>> {
    if !load::is_built() {
        return Err(BackendError::Unsupported { mode: Mode::Ebpf, missing: load::NOT_BUILT.into() });
    }
    Ok(Box::new(Ebpf::open(config)?))
}

struct Ebpf {
    cgroup_path: PathBuf,
    cgroup: File,
    pins: Pins,
    nodeport_addresses: Vec<IpNet>,
    node: Namespace,
    host_namespace: u64,
    programs: Programs,
    tables: Tables,
    shared: Shared,
    layout: Layout,
    /// The programs of this agent are in place.
    attached: bool,
}

impl Ebpf {
    fn open(config: &Config) -> Result<Self> {
        let cgroup = attach::open_cgroup(&config.cgroup2_path)?;
        let pins = Pins::open(&config.pin_dir)?;
        let node = Namespace::current().map_err(|error| BackendError::kernel("open the node's network namespace", error))?;
        let host_namespace = namespace::cookie().map_err(|error| BackendError::kernel("read the network namespace's cookie", error))?;
        let programs = Programs::load(&pins.tables(), &pins.shared(), &Sizes::INITIAL, host_namespace)?;
        let tables = Tables::open(&pins.tables())?;
        let shared = Shared::open(&pins.shared())?;
        Ok(Self {
            cgroup_path: config.cgroup2_path.clone(),
            cgroup,
            pins,
            nodeport_addresses: config.nodeport_addresses.clone(),
            node,
            host_namespace,
            programs,
            tables,
            shared,
            layout: Layout::default(),
            attached: false,
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
        self.update_addresses()?;
        let batch = self.layout.apply(table, delta);
        let (upserted, removed) = (batch.puts.len(), batch.deletes.len());
        if self.sizes().hold(&self.layout.needed()) {
            write(&self.tables, &batch)?;
            if !self.attached {
                attach::attach_cgroup(&self.programs, &self.cgroup, &self.pins)?;
            }
        } else {
            self.grow()?;
        }
        if !self.attached {
            self.pins.remove_other_versions()?;
            self.attached = true;
        }
        let ended = self.end_sockets(table, delta);
        Ok(Applied { upserted, removed, ended })
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
        self.pins.adopt_next_tables()?;
        self.programs = programs;
        self.tables = tables;
        Ok(())
    }

    /// Keeps the map of the addresses that NodePorts and host ports are reached by.
    fn update_addresses(&self) -> Result<()> {
        let failed = |error| BackendError::kernel("list the node's addresses", error);
        let addresses = self.node.run(namespace::addresses).map_err(failed)?.map_err(failed)?;
        let wanted = node_addresses(&addresses, &self.nodeport_addresses);
        let mut present: HashMap<abi::Addr, u32> = self.shared.node_addresses.entries()?.into_iter().collect();
        for (addr, flags) in wanted {
            if present.remove(&addr) != Some(flags) {
                self.shared.node_addresses.put(&addr, &flags)?;
            }
        }
        present.keys().try_for_each(|addr| self.shared.node_addresses.delete(addr).map(drop))
    }

    /// Sockets of gone backends: those that the delta names or, after a start, those that the table no longer knows.
    fn end_sockets(&self, table: &Table, delta: &Delta) -> usize {
        if delta.gone.is_empty() && !delta.full {
            return 0;
        }
        let namespaces = match namespace::below(&self.cgroup_path, &self.node) {
            Ok(namespaces) => namespaces,
            Err(error) => {
                tracing::warn!(%error, cgroup = %self.cgroup_path.display(), "sockets of gone backends are left to time out");
                return 0;
            }
        };
        let gone: HashSet<(abi::FrontendKey, SocketAddr)> =
            delta.gone.iter().map(|gone| (plan::key(&gone.frontend), gone.backend)).collect();
        let is_doomed = |peer: &abi::Peer| {
            let backend = SocketAddr::new(peer.backend.addr.ip(), peer.backend.port.host());
            let exact = abi::FrontendKey::new(peer.frontend.addr, peer.frontend.port, peer.protocol as u8);
            let by_node = abi::FrontendKey { addr: exact.addr.node(), ..exact };
            gone.contains(&(exact, backend)) || gone.contains(&(by_node, backend)) || (delta.full && is_stale(table, peer, backend))
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
    batch.deletes.iter().try_for_each(|key| tables.frontends.delete(key).map(drop))
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
    let entry: Option<&Entry> = table.get(&frontend(Address::Ip(ip))).or_else(|| table.get(&frontend(Address::Node(Family::of(ip)))));
    match entry {
        Some(entry) => !entry.alive().any(|endpoint| endpoint.socket() == backend),
        None => protocol == Protocol::Udp,
    }
}

/// Which of the node's addresses answer, and to whom.
fn node_addresses(found: &[(IpAddr, bool)], selected: &[IpNet]) -> HashMap<abi::Addr, u32> {
    use abi::node_address_flags::{HOST_ONLY, NODE_PORTS};
    let is_link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    let found = found.iter().filter(|(ip, _)| !is_link_local(ip));
    let flags = |(ip, loopback): &(IpAddr, bool)| {
        let chosen = selected.is_empty() || selected.iter().any(|net| net.contains(ip));
        let flags = if chosen { NODE_PORTS } else { 0 } | if *loopback { HOST_ONLY } else { 0 };
        (abi::Addr::from(*ip), flags)
    };
    found.map(flags).collect()
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
                && let Err(error) = self.update_addresses()
            {
                tracing::warn!(%error, "the node's addresses for NodePorts may be out of date");
            }
            Some(ADDRESS_INTERVAL)
        })
    }

    fn teardown(&mut self, parting: Parting) -> Pending<'_, Result<()>> {
        Box::pin(async move { self.teardown_now(parting) })
    }
}
