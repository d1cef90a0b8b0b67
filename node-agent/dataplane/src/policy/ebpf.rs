//! Policies by programs at the interfaces of isolated pods; pods that aren't isolated have none.
//!
//! Maps are written before a program hangs on an interface or a pod turns to other rules, and cleared after it. All is pinned, so
//! nothing opens while no agent runs.
use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::EbpfLoader;
use foldhash::HashMap;
use outrigger_abi as abi;
use outrigger_abi::policy::{Drops, OPEN, Peer, Pod, PortKey};
use outrigger_desired::policy::{PodPolicy, PolicyTable};

use super::plan::{Plan, Steps};
use super::{Applied, Dropped, Enforcer, nftables};
use crate::backend::{BackendError, Result};
use crate::config::{Config, PodInterfaces};
use crate::ebpf::attach::{self, Interface, InterfaceHook, Pins, attach_interface, children, create_folder, remove_folder};
use crate::ebpf::load::{self, Programs};
use crate::ebpf::maps::{Map, PerCpuMap};
use crate::ebpf::sys;
use crate::namespace::{self, Namespace};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OUTRIGGER_POLICE_OBJECT"));

/// The maps, with how many elements they hold. Only the last two take their room before they are filled.
const MAPS: [(&str, u32); 7] = [
    ("policed", 1 << 14),
    ("policy_node", 1 << 12),
    ("policy_peers", 1 << 22),
    ("policy_ports", 1 << 20),
    ("policy_drops", 1 << 14),
    ("policy_opened", 1 << 16),
    ("policy_parts", 1 << 12),
];

/// What pods send is judged behind the Service program, and what goes to them before it: by the addresses of pods.
const HOOKS: [InterfaceHook; 2] = [
    InterfaceHook { name: "police_egress", ingress: true, place: sys::LAST, priority: 11 },
    InterfaceHook { name: "police_ingress", ingress: false, place: sys::FIRST, priority: 9 },
];

/// What this kernel or build lacks shows by trying.
pub(super) fn open(config: &Config) -> Result<Ebpf> {
    if let Some(flaw) = load::flaw(OBJECT, &abi::policy::MARKER) {
        return Err(BackendError::failed("load the eBPF programs that police pods", flaw));
    }
    let root = Pins::at(&config.pin_dir).policy();
    let is_first = !root.exists();
    let opened = Ebpf::open(config, Places { root: root.clone() });
    if opened.is_err() && is_first {
        // A kernel that can't use them keeps none of the maps. What can't be taken away says less than why eBPF can't be used.
        let _ = remove_folder(&root);
    }
    opened
}

/// Where the pins are.
struct Places {
    root: PathBuf,
}

impl Places {
    fn maps(&self) -> PathBuf {
        self.root.join(format!("v{}", abi::policy::VERSION))
    }

    fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    fn pin(&self, index: u32, hook: &InterfaceHook) -> PathBuf {
        self.links().join(format!("{index}_{}", hook.name))
    }
}

/// Around the maps pinned in the folder.
fn load(folder: &Path) -> Result<Programs> {
    let mut loader = EbpfLoader::new();
    for (name, size) in MAPS {
        loader.map_max_entries(name, size).map_pin_path(name, folder.join(name));
    }
    let programs = Programs::load_object(&mut loader, OBJECT)?;
    HOOKS.iter().try_for_each(|hook| programs.program(&format!("outrigger_{}", hook.name)).map(drop))?;
    Ok(programs)
}

struct Maps {
    policed: Map<u32, Pod>,
    node: Map<abi::Addr, u32>,
    peers: Map<Peer, u32>,
    ports: Map<PortKey, u32>,
    drops: PerCpuMap<u32, Drops>,
}

pub(super) struct Ebpf {
    pins: Pins,
    places: Places,
    namespace: Namespace,
    pod_interfaces: Option<PodInterfaces>,
    programs: Programs,
    maps: Maps,
    plan: Plan,
    /// What the kernel has is what is kept here; not so at first, nor after a failure.
    settled: bool,
    /// What `policed` holds.
    policed: HashMap<u32, Pod>,
    /// Interfaces that the programs of this agent are on.
    attached: HashSet<u32>,
    /// Isolated pods' interfaces, by sandbox.
    isolated: BTreeMap<Arc<str>, u32>,
}

/// What a table means for the interfaces that there are.
#[derive(Default)]
struct Wanted {
    pods: BTreeMap<u32, Pod>,
    names: BTreeMap<u32, String>,
    isolated: BTreeMap<Arc<str>, u32>,
    absent: Vec<Arc<str>>,
    /// Interfaces of pods that aren't isolated.
    open: Vec<String>,
}

impl Ebpf {
    fn open(config: &Config, places: Places) -> Result<Self> {
        Pins::mount(&config.pin_dir)?;
        let pins = Pins::at(&config.pin_dir);
        create_folder(&places.maps())?;
        create_folder(&places.links())?;
        let namespace = Namespace::current().map_err(|error| BackendError::kernel("open the node's network namespace", error))?;
        let folder = places.maps();
        let programs = load(&folder)?;
        let maps = Maps {
            policed: Map::open(&folder, "policed")?,
            node: Map::open(&folder, "policy_node")?,
            peers: Map::open(&folder, "policy_peers")?,
            ports: Map::open(&folder, "policy_ports")?,
            drops: PerCpuMap::open(&folder, "policy_drops")?,
        };
        Ok(Self {
            pins,
            places,
            namespace,
            pod_interfaces: config.pod_interfaces.clone(),
            programs,
            maps,
            plan: Plan::above(&[], &[]),
            settled: false,
            policed: HashMap::default(),
            attached: HashSet::new(),
            isolated: BTreeMap::new(),
        })
    }

    /// What is in the kernel is kept until it is replaced as a whole.
    fn read_back(&mut self) -> Result<(Vec<Peer>, Vec<PortKey>)> {
        let mut peers: Vec<Peer> = self.maps.peers.entries()?.into_iter().map(|(key, _)| key).collect();
        let ports: Vec<PortKey> = self.maps.ports.entries()?.into_iter().map(|(key, _)| key).collect();
        peers.sort_unstable_by_key(|key| key.prefix);
        self.plan = Plan::above(&peers, &ports);
        self.policed = self.maps.policed.entries()?.into_iter().collect();
        Ok((peers, ports))
    }

    fn apply_now(&mut self, table: &PolicyTable, node: &[IpAddr]) -> Result<Applied> {
        let first = !self.settled;
        let left = if self.settled { Default::default() } else { self.read_back()? };
        self.settled = false;
        let mut steps = self.plan.apply(table);
        self.maps.node.settle(self.node_addresses(node)?)?;
        self.maps.ports.put_all(&steps.ports)?;
        self.maps.peers.put_all(&steps.peers)?;
        let wanted = self.look(table, &steps)?;
        self.isolate(&wanted)?;
        self.release(&wanted, first)?;
        steps.stale_peers.extend(left.0);
        steps.stale_ports.extend(left.1);
        self.forget(&steps)?;
        if first {
            self.remove_other_versions()?;
            // What another enforcer left has held until here.
            nftables::remove()?;
        }
        self.settled = true;
        self.isolated = wanted.isolated;
        Ok(Applied { pods: steps.pods.len(), rules: self.plan.rule_sets(), absent: wanted.absent })
    }

    /// Those that the cluster knows, and those that the node's end of a pod's link may have.
    fn node_addresses(&self, known: &[IpAddr]) -> Result<HashMap<abi::Addr, u32>> {
        let failed = |error| BackendError::kernel("list the node's addresses", error);
        let found = self.namespace.run(namespace::addresses).map_err(failed)?.map_err(failed)?;
        let all = found.into_iter().filter(|address| !address.loopback).map(|address| address.ip).chain(known.iter().copied());
        Ok(all.map(|ip| (ip.into(), 1)).collect())
    }

    /// Finds the interfaces.
    fn look(&self, table: &PolicyTable, steps: &Steps) -> Result<Wanted> {
        let failed = |error| BackendError::kernel("list the pods' interfaces", error);
        let now = sys::now();
        let find = || {
            let mut wanted = Wanted::default();
            for (sandbox, pod) in &table.pods {
                match (steps.pods.get(sandbox), nix::net::if_::if_nametoindex(pod.interface.as_str())) {
                    (None, _) => wanted.open.push(pod.interface.clone()),
                    (Some(_), Err(_)) => wanted.absent.push(sandbox.clone()),
                    (Some(sets), Ok(index)) => {
                        wanted.pods.insert(index, policed(pod, *sets, self.policed.get(&index), now));
                        wanted.names.insert(index, pod.interface.clone());
                        wanted.isolated.insert(sandbox.clone(), index);
                    }
                }
            }
            let known: HashSet<&str> = table.pods.values().map(|pod| pod.interface.as_str()).collect();
            // Without an entry their programs let nothing pass.
            for name in namespace::interfaces()?.into_iter().filter(|name| self.is_unknown_pod(name, &known)) {
                if let Ok(index) = nix::net::if_::if_nametoindex(name.as_str()) {
                    wanted.names.insert(index, name);
                }
            }
            Ok(wanted)
        };
        self.namespace.run(find).map_err(failed)?.map_err(failed)
    }

    fn is_unknown_pod(&self, interface: &str, known: &HashSet<&str>) -> bool {
        let prefix = self.pod_interfaces.as_ref().filter(|pods| matches!(pods, PodInterfaces::Prefix(_)));
        prefix.is_some_and(|pods| pods.has(interface)) && !known.contains(interface)
    }

    fn isolate(&mut self, wanted: &Wanted) -> Result<()> {
        for (index, pod) in &wanted.pods {
            let old = self.policed.get(index);
            if old.is_none() {
                self.maps.drops.reset(index)?;
            }
            if old != Some(pod) {
                self.maps.policed.put(index, pod)?;
                self.policed.insert(*index, *pod);
            }
        }
        let Self { namespace, programs, places, attached, .. } = self;
        let attach = || -> Result<()> {
            for (index, name) in &wanted.names {
                if attached.contains(index) {
                    continue;
                }
                let interface = Interface { name: name.clone(), index: *index };
                let mut there = true;
                for hook in &HOOKS {
                    there &= attach_interface(programs, &interface, hook, &places.pin(*index, hook))?;
                }
                if there {
                    attached.insert(*index);
                }
            }
            Ok(())
        };
        namespace.run(attach).map_err(|error| BackendError::kernel("enter the node's network namespace", error))?
    }

    /// Programs go before what they know: without it they would let nothing pass.
    fn release(&mut self, wanted: &Wanted, first: bool) -> Result<()> {
        let keep: HashSet<PathBuf> = wanted.names.keys().flat_map(|index| HOOKS.iter().map(|hook| self.places.pin(*index, hook))).collect();
        for pin in children(&self.places.links())?.into_iter().filter(|pin| !keep.contains(pin)) {
            attach::detach(&pin)?;
        }
        // Where there are no links a former agent's filters are only known by their interface.
        let gone = |index: &u32| !wanted.names.contains_key(index);
        if first || self.attached.iter().any(gone) {
            let detach = || wanted.open.iter().for_each(|name| detach_classic(name));
            self.namespace.run(detach).map_err(|error| BackendError::kernel("enter the node's network namespace", error))?;
        }
        self.attached.retain(|index| wanted.names.contains_key(index));
        let stale: Vec<u32> = self.policed.keys().filter(|index| !wanted.pods.contains_key(index)).copied().collect();
        for index in stale {
            self.maps.policed.delete(&index)?;
            self.maps.drops.delete(&index)?;
            self.policed.remove(&index);
        }
        Ok(())
    }

    fn forget(&self, steps: &Steps) -> Result<()> {
        if steps.stale_peers.is_empty() && steps.stale_ports.is_empty() {
            return Ok(());
        }
        sys::wait_for_programs();
        steps.stale_peers.iter().try_for_each(|key| self.maps.peers.delete(key).map(drop))?;
        steps.stale_ports.iter().try_for_each(|key| self.maps.ports.delete(key).map(drop))
    }

    fn remove_other_versions(&self) -> Result<()> {
        let keep = [self.places.maps(), self.places.links()];
        children(&self.places.root)?.iter().filter(|path| !keep.contains(path)).try_for_each(|path| remove_folder(path))
    }
}

fn detach_classic(interface: &str) {
    HOOKS.iter().for_each(|hook| Programs::detach_classic(interface, hook.ingress, hook.priority));
}

fn policed(pod: &PodPolicy, (ingress, egress): (u32, u32), old: Option<&Pod>, now: u64) -> Pod {
    let address = |v4: bool| pod.addresses.iter().find(|ip| ip.is_ipv4() == v4).map(|ip| abi::Addr::from(*ip)).unwrap_or_default();
    let was_so = |old: &&Pod| (old.ingress == OPEN, old.egress == OPEN) == (ingress == OPEN, egress == OPEN);
    Pod { since: old.filter(was_so).map_or(now, |old| old.since), v4: address(true), v6: address(false), ingress, egress }
}

impl Enforcer for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn apply<'a>(&'a mut self, table: &'a PolicyTable, node: &'a [IpAddr]) -> Result<Applied> {
        self.apply_now(table, node)
    }

    fn dropped(&self) -> Result<BTreeMap<Arc<str>, Dropped>> {
        let sum = |sum: Dropped, one: &Drops| Dropped { ingress: sum.ingress + one.ingress, egress: sum.egress + one.egress };
        let of =
            |(sandbox, index): (&Arc<str>, &u32)| Ok((sandbox.clone(), self.maps.drops.get(index)?.iter().fold(Dropped::default(), sum)));
        self.isolated.iter().map(of).collect()
    }

    fn teardown(&mut self) -> Result<()> {
        self.settled = false;
        self.attached.clear();
        remove(&self.pins, &self.namespace)
    }
}

/// Takes every program off its interface, and forgets the maps.
pub(super) fn remove(pins: &Pins, node: &Namespace) -> Result<()> {
    let places = Places { root: pins.policy() };
    if !places.root.exists() {
        return Ok(());
    }
    for pin in children(&places.links())? {
        attach::detach(&pin)?;
    }
    let failed = |error| BackendError::kernel("list the node's interfaces", error);
    let detach = || namespace::interfaces().map(|names| names.iter().for_each(|name| detach_classic(name)));
    node.run(detach).map_err(failed)?.map_err(failed)?;
    remove_folder(&places.root)?;
    pins.remove_root()
}
