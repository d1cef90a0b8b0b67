//! What the programs have counted and what they tell, read from their maps.
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{Map as AyaMap, MapData, RingBuf};
use foldhash::{HashMap, HashSet};
use outrigger_abi as abi;
use outrigger_desired::ServicePortName;

use super::load::EVENTS;
use super::maps::{self, Shared, Tables};
use super::plan::Layout;
use super::sys;
use crate::backend::{BackendError, Result};
use crate::namespace::{self, Namespace};
use crate::sight::{Counted, Counts, Event, Fill, Reason, Traffic, What, merge};

/// How long the programs tell after they were last listened to.
const ATTENTION: u64 = 3_000_000_000;
/// How long the counts of a backend are kept that its Service no longer has: its connections may still be draining.
const DRAIN: Duration = Duration::from_secs(600);
/// So full, a map is worth a word.
const ALARM: f64 = 0.8;

/// What was counted of the Service ports in `layout`.
pub fn counts(layout: &Layout, tables: &Tables, shared: &Shared, fills: &[Fill]) -> Result<Counts> {
    let mut by_index: HashMap<u32, Counted> = HashMap::default();
    for (key, traffic) in shared.traffic.entries()? {
        let counted = by_index.entry(key.service).or_default();
        let bytes = Some((traffic.sent, traffic.received));
        let of = Traffic { connections: traffic.connections, failed: Some(traffic.failed), bytes };
        counted.backends.insert(socket(&key.backend), of);
        merge(counted.connect.get_or_insert_default(), &traffic.connect);
    }
    for (key, count) in shared.drops.entries()? {
        // A reason of a later agent's programs has no name here.
        if let Ok(reason) = Reason::try_from(key.reason) {
            by_index.entry(key.service).or_default().drops.insert(reason, count);
        }
    }
    let stray = by_index.remove(&0).unwrap_or_default().drops;
    let mut counts = Counts { stray, maps: fills.to_vec(), ..Counts::default() };
    for (name, index) in layout.services() {
        if let Some(mut counted) = by_index.remove(&index) {
            counted.connections = tables.counters.get(index)?.connections;
            // Where nothing has connected over TCP there is nothing to show.
            counted.connect = counted.connect.filter(|latency| latency.nanoseconds > 0);
            counts.services.insert(name.clone(), counted);
        }
    }
    Ok(counts)
}

fn socket(endpoint: &abi::Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.addr.ip(), endpoint.port.host())
}

/// Forgets what was counted for Service ports whose indices others get now.
pub fn forget(shared: &Shared, services: &[u32]) -> Result<()> {
    if services.is_empty() {
        return Ok(());
    }
    let fresh: HashSet<u32> = services.iter().copied().collect();
    let traffic = shared.traffic.entries()?.into_iter().map(|(key, _)| key).filter(|key| fresh.contains(&key.service));
    shared.traffic.delete_all(&traffic.collect::<Vec<_>>())?;
    let drops = shared.drops.entries()?.into_iter().map(|(key, _)| key).filter(|key| fresh.contains(&key.service));
    shared.drops.delete_all(&drops.collect::<Vec<_>>())
}

/// What one look at the maps saw that the programs fill.
#[derive(Debug)]
pub struct Seen {
    fills: Vec<Fill>,
    backends: HashSet<abi::sight::TrafficKey>,
}

impl Seen {
    pub fn now(shared: &Shared) -> Result<Self> {
        let backends: HashSet<_> = shared.traffic.entries()?.into_iter().map(|(key, _)| key).collect();
        let fills = vec![
            fill("node_addresses", shared.node_addresses.count()?, shared.node_addresses.capacity),
            fill("source_ranges", shared.source_ranges.count()?, shared.source_ranges.capacity),
            fill("affinity", shared.affinity.count()?, shared.affinity.capacity),
            fill("datagrams", shared.datagrams.count()?, shared.datagrams.capacity),
            fill("flows", shared.flows.count()?, shared.flows.capacity),
            fill("traffic", backends.len(), shared.traffic.capacity),
            fill("drops", shared.drops.count()?, shared.drops.capacity),
        ];
        Ok(Self { fills, backends })
    }
}

fn fill(map: &'static str, entries: usize, max: u32) -> Fill {
    Fill { map, entries: entries as u64, max: max.into() }
}

/// What is looked after now and then.
#[derive(Debug, Default)]
pub struct Upkeep {
    pub fills: Vec<Fill>,
    alarmed: HashSet<&'static str>,
    /// Since when its Service doesn't have the backend.
    absent: HashMap<abi::sight::TrafficKey, Instant>,
}

impl Upkeep {
    pub fn take(&mut self, seen: Seen, layout: &Layout, tables: &Tables, shared: &Shared) -> Result<()> {
        // The tables themselves grow when they have to.
        for Fill { map, entries, max } in &seen.fills {
            let is_full = *entries as f64 > ALARM * *max as f64;
            if !is_full {
                self.alarmed.remove(map);
            } else if self.alarmed.insert(map) {
                tracing::warn!(map, entries, max, "an eBPF map is nearly full: what was used least recently is forgotten");
            }
        }
        let needed = layout.needed();
        self.fills = seen.fills;
        self.fills.extend([
            fill("frontends", needed.frontends as usize, tables.frontends.capacity),
            fill("slots", needed.slots as usize, tables.slots.capacity()),
            fill("maglev", needed.maglev as usize, tables.maglev.capacity()),
            fill("counters", needed.services as usize, tables.counters.capacity()),
        ]);
        self.prune(layout.without(seen.backends), shared)
    }

    fn prune(&mut self, gone: HashSet<abi::sight::TrafficKey>, shared: &Shared) -> Result<()> {
        let now = Instant::now();
        self.absent.retain(|key, _| gone.contains(key));
        for key in gone {
            self.absent.entry(key).or_insert(now);
        }
        let drained: Vec<_> = self.absent.iter().filter(|(_, since)| now - **since > DRAIN).map(|(key, _)| *key).collect();
        shared.traffic.delete_all(&drained)
    }
}

/// Somebody who is told what happens.
pub struct Listener {
    ring: RingBuf<MapData>,
    /// The addresses in each network namespace, by its cookie.
    sources: HashMap<u64, Vec<IpAddr>>,
    looked: Option<Instant>,
    lost: u64,
}

const LOOK_AGAIN: Duration = Duration::from_secs(2);

impl Listener {
    pub fn open(folder: &Path) -> Result<Self> {
        let path: PathBuf = folder.join(EVENTS.0);
        let failed = |error: &dyn std::error::Error| BackendError::failed(format!("open the map {}", path.display()), error);
        let data = MapData::from_pin(&path).map_err(|error| failed(&error))?;
        let mut ring = RingBuf::try_from(AyaMap::RingBuf(data)).map_err(|error| failed(&error))?;
        // What an earlier listener left is old.
        while ring.next().is_some() {}
        Ok(Self { ring, sources: HashMap::default(), looked: None, lost: 0 })
    }

    /// What happened since, and the programs go on telling.
    pub fn events(&mut self, shared: &Shared, layout: &Layout, cgroup: &Path, node: &Namespace) -> Result<Vec<Event>> {
        let watched = shared.watched.get(&0)?.unwrap_or_default();
        shared.watched.put(&0, &abi::sight::Watched { until: sys::now() + ATTENTION, ..watched })?;
        if watched.lost > self.lost {
            tracing::warn!(lost = watched.lost - self.lost, "connections came and went faster than they could be listened to");
        }
        self.lost = watched.lost;
        let mut raw: Vec<abi::sight::Event> = Vec::new();
        while let Some(item) = self.ring.next() {
            raw.extend(maps::read::<abi::sight::Event>(&item));
        }
        if raw.is_empty() {
            return Ok(Vec::new());
        }
        self.look(&raw, cgroup, node);
        let names: HashMap<u32, &ServicePortName> = layout.services().map(|(name, index)| (index, name)).collect();
        Ok(raw.iter().filter_map(|event| self.read(event, &names)).collect())
    }

    /// Learns who lives in namespaces that aren't known.
    fn look(&mut self, raw: &[abi::sight::Event], cgroup: &Path, node: &Namespace) {
        let unknown = raw.iter().any(|event| event.namespace != 0 && !self.sources.contains_key(&event.namespace));
        if !unknown || self.looked.is_some_and(|looked| looked.elapsed() < LOOK_AGAIN) {
            return;
        }
        self.looked = Some(Instant::now());
        match namespace::below(cgroup, node).and_then(|namespaces| sources(&namespaces)) {
            Ok(sources) => self.sources = sources,
            Err(error) => tracing::debug!(%error, "clients without an address can't be named"),
        }
    }

    fn read(&self, event: &abi::sight::Event, names: &HashMap<u32, &ServicePortName>) -> Option<Event> {
        let what = match event.kind {
            abi::sight::event_kind::OPENED => What::Opened,
            abi::sight::event_kind::CLOSED => What::Closed,
            abi::sight::event_kind::REFUSED => What::Refused(Reason::try_from(u32::from(event.reason)).ok()?),
            _ => return None,
        };
        let known = |endpoint: &abi::Endpoint| (*endpoint != abi::Endpoint::default()).then(|| socket(endpoint));
        let frontend = known(&event.frontend);
        let by_namespace = || {
            let v4 = frontend?.is_ipv4();
            let ip = self.sources.get(&event.namespace)?.iter().find(|ip| ip.is_ipv4() == v4)?;
            Some(SocketAddr::new(*ip, 0))
        };
        Some(Event {
            what,
            count: 1,
            service: names.get(&event.service).map(|name| (*name).clone()),
            protocol: event.protocol,
            source: known(&event.source).or_else(by_namespace),
            frontend,
            backend: known(&event.backend),
            // Of packets' connections nobody counts the bytes.
            bytes: (what == What::Closed && event.namespace != 0).then_some((event.sent, event.received)),
            took: (event.nanoseconds > 0).then(|| Duration::from_nanos(event.nanoseconds)),
        })
    }
}

/// The programs stop to tell.
pub fn quiet(shared: &Shared) -> Result<()> {
    let watched = shared.watched.get(&0)?.unwrap_or_default();
    shared.watched.put(&0, &abi::sight::Watched { until: 0, ..watched })
}

/// The addresses in each namespace, by the cookie that the programs know it by.
fn sources(namespaces: &[Namespace]) -> io::Result<HashMap<u64, Vec<IpAddr>>> {
    std::thread::scope(|scope| {
        let walk = scope.spawn(|| {
            let mut found = HashMap::default();
            for namespace in namespaces {
                // One that goes meanwhile has nobody to name.
                if namespace.enter().is_ok() {
                    let addresses = namespace::addresses()?.into_iter().filter(|address| !address.loopback);
                    found.insert(namespace::cookie()?, addresses.map(|address| address.ip).collect());
                }
            }
            Ok(found)
        });
        walk.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
