//! Typed access to the pinned maps.
use std::hash::Hash;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use foldhash::HashMap;
use outrigger_abi as abi;

use super::activity::Activity;
use super::load::Sizes;
use super::plan::{Batch, Layout};
use super::sys;
use crate::backend::{BackendError, Result};

/// Types whose every bit pattern is a value and which have no padding, so that the kernel may fill them.
///
/// # Safety
/// Implemented for `repr(C)` types of `outrigger-abi` only, whose sizes are asserted there.
unsafe trait Plain: Copy + Default {}

macro_rules! plain {
    ($($type:ty),*) => { $(
        // SAFETY: `repr(C)` integers without padding, see `outrigger-abi`.
        unsafe impl Plain for $type {}
    )* };
}
plain!(
    u32,
    u64,
    abi::Addr,
    abi::FrontendKey,
    abi::Frontend,
    abi::Slot,
    abi::MaglevBlock,
    abi::SourceRange,
    abi::DatagramKey,
    abi::Datagram,
    abi::AffinityKey,
    abi::Affinity,
    abi::Uplink,
    abi::Tuple,
    abi::Flow,
    abi::policy::Pod,
    abi::policy::Peer,
    abi::policy::PortKey,
    abi::policy::Drops,
    abi::sight::DropKey,
    abi::sight::TrafficKey,
    abi::sight::Traffic,
    abi::sight::Watched,
    abi::sight::Event
);

/// A value as the kernel laid it down; `None` when it has another length.
#[expect(private_bounds, reason = "only the ABI's types are plain")]
pub fn read<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: as many bytes as the value has are there, and any are a value.
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Elements per call of a batched read.
const BATCH: usize = 4096;

/// A map whose element sizes were checked against its types.
#[derive(Debug)]
pub struct Map<K, V> {
    name: &'static str,
    fd: OwnedFd,
    pub capacity: u32,
    types: PhantomData<(K, V)>,
}

#[expect(private_bounds, reason = "only the ABI's types are plain")]
impl<K: Plain, V: Plain> Map<K, V> {
    pub fn open(folder: &Path, name: &'static str) -> Result<Self> {
        Self::adopt(name, open_pinned(folder, name)?)
    }

    fn adopt(name: &'static str, fd: OwnedFd) -> Result<Self> {
        let info = sys::map_info(fd.as_fd()).map_err(|error| BackendError::kernel(format!("open the map {name}"), error))?;
        if (info.key_size as usize, info.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
            let message = format!("it has elements of {}+{} bytes", info.key_size, info.value_size);
            return Err(BackendError::failed(format!("adopt the map {name}"), message));
        }
        Ok(Self { name, fd, capacity: info.max_entries, types: PhantomData })
    }

    pub fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::default();
        let found = sys::lookup(&self.fd, key, &mut value).map_err(|error| self.failed("read", error))?;
        Ok(found.then_some(value))
    }

    pub fn put(&self, key: &K, value: &V) -> Result<()> {
        sys::update(&self.fd, key, value).map_err(|error| self.failed("write to", error))
    }

    pub fn put_all(&self, entries: &[(K, V)]) -> Result<()> {
        if let [(key, value)] = entries {
            return self.put(key, value);
        }
        let (keys, values): (Vec<K>, Vec<V>) = entries.iter().copied().unzip();
        sys::update_batch(&self.fd, &keys, &values).map_err(|error| self.failed("write to", error))
    }

    pub fn delete_all(&self, keys: &[K]) -> Result<()> {
        sys::delete_batch(&self.fd, keys).map_err(|error| self.failed("delete from", error))
    }

    /// False when there was no such element.
    pub fn delete(&self, key: &K) -> Result<bool> {
        sys::delete(&self.fd, key).map_err(|error| self.failed("delete from", error))
    }

    /// Makes the map hold `wanted` and nothing else.
    pub fn settle(&self, wanted: HashMap<K, V>) -> Result<()>
    where
        K: Eq + Hash,
        V: PartialEq,
    {
        let mut present: HashMap<K, V> = self.entries()?.into_iter().collect();
        let different = |(key, value): &(K, V)| present.remove(key).is_none_or(|old| old != *value);
        let puts: Vec<(K, V)> = wanted.into_iter().filter(different).collect();
        self.put_all(&puts)?;
        self.delete_all(&present.into_keys().collect::<Vec<_>>())
    }

    /// All elements. Those that change meanwhile may be seen twice or not at all.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut found = Vec::new();
        let mut cursor = sys::Cursor::default();
        let mut size = BATCH;
        loop {
            let mut keys = vec![K::default(); size];
            let mut values = vec![V::default(); size];
            match sys::lookup_batch(&self.fd, &mut cursor, &mut keys, &mut values) {
                Ok((count, end)) => {
                    found.extend(keys.into_iter().zip(values).take(count));
                    if end {
                        return Ok(found);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => size *= 2,
                Err(error) => return Err(self.failed("read", error)),
            }
        }
    }

    /// How many elements there are, about.
    pub fn count(&self) -> Result<usize> {
        Ok(self.entries()?.len())
    }

    fn failed(&self, verb: &str, error: io::Error) -> BackendError {
        let full = matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC));
        let hint = if full { format!(" (it holds at most {} elements)", self.capacity) } else { String::new() };
        BackendError::kernel(format!("{verb} the eBPF map {}{hint}", self.name), error)
    }
}

/// A hash map with one value per possible CPU.
pub struct PerCpuMap<K, V> {
    name: &'static str,
    fd: OwnedFd,
    cpus: usize,
    types: PhantomData<(K, V)>,
}

#[expect(private_bounds, reason = "only the ABI's types are plain")]
impl<K: Plain, V: Plain> PerCpuMap<K, V> {
    pub fn open(folder: &Path, name: &'static str) -> Result<Self> {
        let Map { fd, .. } = Map::<K, V>::open(folder, name)?;
        let cpus = aya::util::nr_cpus().map_err(|(path, error)| BackendError::kernel(format!("read {path}"), error))?;
        Ok(Self { name, fd, cpus, types: PhantomData })
    }

    /// Empty when there is no such element.
    pub fn get(&self, key: &K) -> Result<Vec<V>> {
        let mut values = vec![V::default(); self.cpus];
        // The kernel writes `cpus` values; a slice's first element stands for all of them.
        let failed = |error| BackendError::kernel(format!("read the eBPF map {}", self.name), error);
        let first = values.first_mut().ok_or_else(|| BackendError::failed("read a counter", "this machine has no CPU"))?;
        let found = sys::lookup(&self.fd, key, first).map_err(failed)?;
        Ok(if found { values } else { Vec::new() })
    }

    pub fn reset(&self, key: &K) -> Result<()> {
        let zeros = vec![V::default(); self.cpus];
        let failed = |error| BackendError::kernel(format!("write to the eBPF map {}", self.name), error);
        sys::update(&self.fd, key, zeros.as_slice()).map_err(failed)
    }

    pub fn delete(&self, key: &K) -> Result<bool> {
        sys::delete(&self.fd, key).map_err(|error| BackendError::kernel(format!("delete from the eBPF map {}", self.name), error))
    }
}

/// A hash map in a map of maps, so that a larger one can take its place while programs and readers go on.
#[derive(Debug)]
pub struct Growing<K, V> {
    outer: OwnedFd,
    map: Map<K, V>,
}

impl<K, V> Deref for Growing<K, V> {
    type Target = Map<K, V>;

    fn deref(&self) -> &Map<K, V> {
        &self.map
    }
}

#[expect(private_bounds, reason = "only the ABI's types are plain")]
impl<K: Plain, V: Plain> Growing<K, V> {
    fn open(folder: &Path, name: &'static str) -> Result<Self> {
        let outer = open_pinned(folder, name)?;
        let fd = sys::inner_map(&outer, 0).map_err(|error| BackendError::kernel(format!("open the map {name}"), error))?;
        let fd = fd.ok_or_else(|| BackendError::failed(format!("open the map {name}"), "there is none yet"))?;
        Ok(Self { outer, map: Map::adopt(name, fd)? })
    }

    /// Makes the first one where there is none.
    fn prepare(folder: &Path, name: &'static str, size: u32) -> Result<()> {
        let outer = open_pinned(folder, name)?;
        let what = |error| BackendError::kernel(format!("make the eBPF map {name}"), error);
        if sys::inner_map(&outer, 0).map_err(what)?.is_some() {
            return Ok(());
        }
        let first = sys::map_create(name, &Self::template(), size).map_err(what)?;
        sys::update(&outer, &0_u32, &first.as_raw_fd()).map_err(what)
    }

    fn template() -> sys::MapInfo {
        sys::MapInfo {
            kind: HASH,
            key_size: size_of::<K>() as u32,
            value_size: size_of::<V>() as u32,
            map_flags: NO_PREALLOC,
            ..sys::MapInfo::default()
        }
    }

    /// Fills a larger map beside the one in use and puts it in its place in one step.
    fn replace(&mut self, size: u32, entries: &[(K, V)]) -> Result<()> {
        let what = |error| BackendError::kernel(format!("make a larger eBPF map {}", self.map.name), error);
        let map: Map<K, V> = Map::adopt(self.map.name, sys::map_create(self.map.name, &Self::template(), size).map_err(what)?)?;
        map.put_all(entries)?;
        sys::update(&self.outer, &0_u32, &map.fd.as_raw_fd()).map_err(what)?;
        self.map = map;
        Ok(())
    }
}

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PER_CPU_ARRAY: u32 = 6;
const NO_PREALLOC: u32 = 1;

fn open_pinned(folder: &Path, name: &str) -> Result<OwnedFd> {
    let path = folder.join(name);
    sys::get_pinned(&path).map_err(|error| BackendError::kernel(format!("open the map {}", path.display()), error))
}

/// An array in pages: it grows without moving what is in it.
#[derive(Debug)]
struct Pages {
    name: &'static str,
    outer: OwnedFd,
    pages: Vec<OwnedFd>,
    template: sys::MapInfo,
}

impl Pages {
    fn open(folder: &Path, name: &'static str, template: sys::MapInfo) -> Result<Self> {
        let mut all = Self { name, outer: open_pinned(folder, name)?, pages: Vec::new(), template };
        for index in 0..abi::PAGES {
            match sys::inner_map(&all.outer, index) {
                Ok(Some(page)) => all.pages.push(page),
                Ok(None) => break,
                Err(error) => return Err(all.failed("open a page of", error)),
            }
        }
        Ok(all)
    }

    fn capacity(&self) -> u32 {
        self.pages.len() as u32 * self.template.max_entries
    }

    /// Adds pages until there is room for `count` elements.
    fn hold(&mut self, count: u32) -> Result<()> {
        let wanted = count.div_ceil(self.template.max_entries);
        let present = self.pages.len() as u32;
        if present >= wanted {
            return Ok(());
        }
        let added = (present..wanted).map(|_| sys::map_create(self.name, &self.template, self.template.max_entries));
        let added: Vec<OwnedFd> = added.collect::<io::Result<_>>().map_err(|error| self.failed("make a page of", error))?;
        let indices: Vec<u32> = (present..wanted).collect();
        let descriptors: Vec<i32> = added.iter().map(AsRawFd::as_raw_fd).collect();
        // In one call: the kernel waits for its readers after each.
        sys::update_batch(&self.outer, &indices, &descriptors).map_err(|error| self.failed("add pages to", error))?;
        self.pages.extend(added);
        Ok(())
    }

    /// The page that an element is in, and its place there.
    fn place(&self, index: u32) -> Result<(&OwnedFd, u32)> {
        let page = self.pages.get((index / self.template.max_entries) as usize);
        let page = page.ok_or_else(|| self.failed("find an element of", io::Error::from_raw_os_error(libc::E2BIG)))?;
        Ok((page, index % self.template.max_entries))
    }

    /// Writes elements, whose values lie one after the other in `values`, by as few calls as their order allows.
    fn write<V>(&self, indices: &[u32], values: &[V]) -> Result<()> {
        let size = values.len() / indices.len().max(1);
        let mut done = 0;
        while let Some(&first) = indices.get(done) {
            let page = first / self.template.max_entries;
            let places: Vec<u32> = indices[done..]
                .iter()
                .take_while(|index| **index / self.template.max_entries == page)
                .map(|index| index % self.template.max_entries)
                .collect();
            let next = done + places.len();
            let (fd, _) = self.place(first)?;
            sys::update_batch(fd, &places, &values[done * size..next * size]).map_err(|error| self.failed("write to", error))?;
            done = next;
        }
        Ok(())
    }

    fn failed(&self, verb: &str, error: io::Error) -> BackendError {
        BackendError::kernel(format!("{verb} the eBPF map {} (it has {} pages)", self.name, self.pages.len()), error)
    }
}

/// An array in pages, of one value per element.
#[derive(Debug)]
pub struct Paged<V> {
    pages: Pages,
    values: PhantomData<V>,
}

#[expect(private_bounds, reason = "only the ABI's types are plain")]
impl<V: Plain> Paged<V> {
    fn open(folder: &Path, name: &'static str, per_page: u32) -> Result<Self> {
        let value_size = size_of::<V>() as u32;
        let template = sys::MapInfo { kind: ARRAY, key_size: 4, value_size, max_entries: per_page, ..sys::MapInfo::default() };
        Ok(Self { pages: Pages::open(folder, name, template)?, values: PhantomData })
    }

    pub fn get(&self, index: u32) -> Result<Option<V>> {
        let (page, place) = self.pages.place(index)?;
        let mut value = V::default();
        let found = sys::lookup(page, &place, &mut value).map_err(|error| self.pages.failed("read", error))?;
        Ok(found.then_some(value))
    }

    pub fn capacity(&self) -> u32 {
        self.pages.capacity()
    }

    fn put_all(&self, elements: &[(u32, V)]) -> Result<()> {
        let (indices, values): (Vec<u32>, Vec<V>) = elements.iter().copied().unzip();
        self.pages.write(&indices, &values)
    }

    /// All elements, in order.
    pub fn entries(&self) -> Result<Vec<V>> {
        let length = self.pages.template.max_entries as usize;
        let mut all = vec![V::default(); self.pages.pages.len() * length];
        let mut keys = vec![0_u32; length];
        for (page, values) in self.pages.pages.iter().zip(all.chunks_mut(length)) {
            sys::lookup_batch(page, &mut sys::Cursor::default(), &mut keys, values).map_err(|error| self.pages.failed("read", error))?;
        }
        Ok(all)
    }
}

/// The maps that hold the table. They grow with it.
#[derive(Debug)]
pub struct Tables {
    pub frontends: Growing<abi::FrontendKey, abi::Frontend>,
    pub cluster_ips: Growing<abi::Addr, u32>,
    pub slots: Paged<abi::Slot>,
    pub maglev: Paged<abi::MaglevBlock>,
    pub counters: CounterMap,
}

impl Tables {
    /// Those that the pinned maps of maps have in them.
    pub fn open(folder: &Path) -> Result<Self> {
        Ok(Self {
            frontends: Growing::open(folder, "frontends")?,
            cluster_ips: Growing::open(folder, "cluster_ips")?,
            slots: Paged::open(folder, "slots", abi::SLOTS_PER_PAGE)?,
            maglev: Paged::open(folder, "maglev", abi::MAGLEV_BLOCKS_PER_PAGE)?,
            counters: CounterMap::open(folder)?,
        })
    }

    /// Makes what is missing, then opens.
    pub fn prepare(folder: &Path, sizes: &Sizes) -> Result<Self> {
        both(
            || Growing::<abi::FrontendKey, abi::Frontend>::prepare(folder, "frontends", sizes.frontends),
            || Growing::<abi::Addr, u32>::prepare(folder, "cluster_ips", sizes.frontends),
        )?;
        let mut tables = Self::open(folder)?;
        let Self { slots, maglev, counters, .. } = &mut tables;
        both(|| slots.pages.hold(sizes.slots).and(maglev.pages.hold(sizes.maglev)), || counters.pages.hold(sizes.services))?;
        Ok(tables)
    }

    /// Makes the changes, in their order. Counters come when they come: until then nothing is counted. True when frontends and cluster
    /// IPs have new maps, with what the layout has and nothing else.
    pub fn write(&mut self, batch: &Batch, layout: &Layout) -> Result<bool> {
        let needed = layout.needed();
        // A quarter more than is needed now.
        let larger = (self.frontends.capacity < needed.frontends).then(|| (needed.frontends + needed.frontends / 4).next_power_of_two());
        let Self { frontends, cluster_ips, slots, maglev, counters } = self;
        let mut lead = || {
            slots.pages.hold(needed.slots)?;
            slots.put_all(&batch.slots)?;
            maglev.pages.hold(needed.maglev)?;
            maglev.put_all(&batch.maglev)?;
            let Some(size) = larger else { return write_frontends(frontends, cluster_ips, batch) };
            tracing::info!(frontends = size, "eBPF maps grow");
            let addresses: Vec<(abi::Addr, u32)> = layout.cluster_ips().into_iter().collect();
            // There are no more cluster IPs than frontends.
            both(|| cluster_ips.replace(size, &addresses), || frontends.replace(size, &layout.frontends()))
        };
        if batch.fresh_services.is_empty() {
            lead()?;
        } else {
            both(|| counters.hold(needed.services, &batch.fresh_services), lead)?;
        }
        Ok(larger.is_some())
    }
}

fn write_frontends(
    frontends: &Growing<abi::FrontendKey, abi::Frontend>,
    cluster_ips: &Growing<abi::Addr, u32>,
    batch: &Batch,
) -> Result<()> {
    frontends.put_all(&batch.puts)?;
    frontends.delete_all(&batch.deletes)?;
    let of = |wanted: bool| batch.cluster_ips.iter().filter(move |(_, came)| *came == wanted).map(|(addr, _)| *addr);
    cluster_ips.put_all(&of(true).map(|addr| (addr, 1)).collect::<Vec<_>>())?;
    cluster_ips.delete_all(&of(false).collect::<Vec<_>>())
}

/// At the same time: when a map of maps changes, the kernel waits until nobody reads what was in it.
fn both(one: impl FnOnce() -> Result<()> + Send, other: impl FnOnce() -> Result<()>) -> Result<()> {
    std::thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(other)
    })
}

/// `counters`, one value per possible CPU.
#[derive(Debug)]
pub struct CounterMap {
    pages: Pages,
}

impl CounterMap {
    fn open(folder: &Path) -> Result<Self> {
        let value_size = size_of::<abi::Counters>() as u32;
        let template =
            sys::MapInfo { kind: PER_CPU_ARRAY, key_size: 4, value_size, max_entries: abi::COUNTERS_PER_PAGE, ..sys::MapInfo::default() };
        Ok(Self { pages: Pages::open(folder, "counters", template)? })
    }

    fn cpus() -> Result<usize> {
        aya::util::nr_cpus().map_err(|(path, error)| BackendError::kernel(format!("read {path}"), error))
    }

    pub fn capacity(&self) -> u32 {
        self.pages.capacity()
    }

    /// The sum over the CPUs.
    pub fn get(&self, service: u32) -> Result<abi::Counters> {
        let mut values = vec![abi::Counters::default(); Self::cpus()?];
        let (page, place) = self.pages.place(service)?;
        // The kernel writes one value per CPU; a slice's first element stands for all of them.
        let first = values.first_mut().ok_or_else(|| BackendError::failed("read the counters", "this machine has no CPU"))?;
        sys::lookup(page, &place, first).map_err(|error| BackendError::kernel("read the counters", error))?;
        let sum = |sum: abi::Counters, one: &abi::Counters| abi::Counters {
            connections: sum.connections + one.connections,
            refused: sum.refused + one.refused,
        };
        Ok(values.iter().fold(abi::Counters::default(), sum))
    }

    /// Room for so many, and zeros for the `fresh` among them; those of new pages are.
    fn hold(&mut self, count: u32, fresh: &[u32]) -> Result<()> {
        let present = self.pages.capacity();
        self.pages.hold(count)?;
        let used: Vec<u32> = fresh.iter().copied().filter(|service| *service < present).collect();
        self.pages.write(&used, &vec![abi::Counters::default(); used.len() * Self::cpus()?])
    }
}

/// The maps that hold what sockets and packets have become: kept for as long as the node's programs are.
pub struct Shared {
    pub node_addresses: Map<abi::Addr, u32>,
    pub datagrams: Map<abi::DatagramKey, abi::Datagram>,
    pub source_ranges: Map<abi::SourceRange, u32>,
    pub uplinks: Map<u32, abi::Uplink>,
    pub flows: Map<abi::Tuple, abi::Flow>,
    pub activity: Activity,
    pub affinity: Map<abi::AffinityKey, abi::Affinity>,
    pub traffic: Map<abi::sight::TrafficKey, abi::sight::Traffic>,
    pub drops: Map<abi::sight::DropKey, u64>,
    pub watched: Map<u32, abi::sight::Watched>,
    /// Socket storage has a descriptor as its key.
    pub peers: OwnedFd,
}

impl Shared {
    pub fn open(folder: &Path) -> Result<Self> {
        let peers = folder.join("peers");
        let peers = sys::get_pinned(&peers).map_err(|error| BackendError::kernel(format!("open the map {}", peers.display()), error))?;
        Ok(Self {
            node_addresses: Map::open(folder, "node_addresses")?,
            datagrams: Map::open(folder, "datagrams")?,
            source_ranges: Map::open(folder, "source_ranges")?,
            uplinks: Map::open(folder, "uplinks")?,
            flows: Map::open(folder, "flows")?,
            activity: Activity::open(folder)?,
            affinity: Map::open(folder, "affinity")?,
            traffic: Map::open(folder, "traffic")?,
            drops: Map::open(folder, "drops")?,
            watched: Map::open(folder, "watched")?,
            peers,
        })
    }
}
