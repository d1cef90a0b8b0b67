//! Typed access to the pinned maps.
use std::collections::HashMap;
use std::hash::Hash;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use outrigger_abi as abi;

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
    abi::SourceRange,
    abi::DatagramKey,
    abi::Datagram,
    abi::AffinityKey,
    abi::Affinity,
    abi::Uplink,
    abi::Tuple,
    abi::Flow,
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
        let path = folder.join(name);
        let what = |error| BackendError::kernel(format!("open the map {}", path.display()), error);
        let fd = sys::get_pinned(&path).map_err(what)?;
        let info = sys::map_info(fd.as_fd()).map_err(what)?;
        if (info.key_size as usize, info.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
            let message = format!("it has elements of {}+{} bytes", info.key_size, info.value_size);
            return Err(BackendError::failed(format!("adopt the map {}", path.display()), message));
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
        for (key, value) in wanted {
            if present.remove(&key).is_none_or(|old| old != value) {
                self.put(&key, &value)?;
            }
        }
        present.keys().try_for_each(|key| self.delete(key).map(drop))
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

/// The maps that hold the table: replaced together by larger ones when one of them gets too small.
pub struct Tables {
    pub frontends: Map<abi::FrontendKey, abi::Frontend>,
    pub cluster_ips: Map<abi::Addr, u32>,
    pub slots: Map<u32, abi::Slot>,
    pub counters: CounterMap,
}

impl Tables {
    pub fn open(folder: &Path) -> Result<Self> {
        Ok(Self {
            frontends: Map::open(folder, "frontends")?,
            cluster_ips: Map::open(folder, "cluster_ips")?,
            slots: Map::open(folder, "slots")?,
            counters: CounterMap::open(folder)?,
        })
    }
}

/// `counters`, one value per possible CPU.
pub struct CounterMap {
    fd: OwnedFd,
    cpus: usize,
    pub capacity: u32,
}

impl CounterMap {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("counters");
        let what = |error| BackendError::kernel(format!("open the map {}", path.display()), error);
        let fd = sys::get_pinned(&path).map_err(what)?;
        let info = sys::map_info(fd.as_fd()).map_err(what)?;
        if info.value_size as usize != size_of::<abi::Counters>() {
            return Err(BackendError::failed(format!("adopt the map {}", path.display()), "its counters have another size"));
        }
        let cpus = aya::util::nr_cpus().map_err(|(path, error)| BackendError::kernel(format!("read {path}"), error))?;
        Ok(Self { fd, cpus, capacity: info.max_entries })
    }

    /// The sum over the CPUs.
    pub fn get(&self, service: u32) -> Result<abi::Counters> {
        let mut values = vec![abi::Counters::default(); self.cpus];
        // The kernel writes `cpus` values; a slice's first element stands for all of them.
        let first = values.first_mut().ok_or_else(|| BackendError::failed("read the counters", "this machine has no CPU"))?;
        sys::lookup(&self.fd, &service, first).map_err(|error| BackendError::kernel("read the counters", error))?;
        let sum = |sum: abi::Counters, one: &abi::Counters| abi::Counters {
            connections: sum.connections + one.connections,
            refused: sum.refused + one.refused,
        };
        Ok(values.iter().fold(abi::Counters::default(), sum))
    }

    pub fn reset(&self, service: u32) -> Result<()> {
        let zeros = vec![abi::Counters::default(); self.cpus];
        sys::update(&self.fd, &service, zeros.as_slice()).map_err(|error| BackendError::kernel("reset the counters", error))
    }
}

/// The maps that hold what sockets and packets have become: kept for as long as the node's programs are.
pub struct Shared {
    pub node_addresses: Map<abi::Addr, u32>,
    pub datagrams: Map<abi::DatagramKey, abi::Datagram>,
    pub source_ranges: Map<abi::SourceRange, u32>,
    pub uplinks: Map<u32, abi::Uplink>,
    pub flows: Map<abi::Tuple, abi::Flow>,
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
            affinity: Map::open(folder, "affinity")?,
            traffic: Map::open(folder, "traffic")?,
            drops: Map::open(folder, "drops")?,
            watched: Map::open(folder, "watched")?,
            peers,
        })
    }
}
