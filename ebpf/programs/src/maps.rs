//! The maps, and the decisions' view of them. Sizes here are placeholders: the agent sets them when it loads the object.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use outrigger_abi as abi;
use outrigger_logic::service::Tables;

/// Cookie of the node's own network namespace.
#[unsafe(no_mangle)]
static HOST_NAMESPACE: Global<u64> = Global::new(0);

// Not preallocated: an element that is replaced or deleted stays whole for the readers that hold it.
#[map(name = "frontends")]
static FRONTENDS: HashMap<abi::FrontendKey, abi::Frontend> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "slots")]
static SLOTS: Array<abi::Slot> = Array::with_max_entries(1024, 0);
#[map(name = "node_addresses")]
static NODE_ADDRESSES: HashMap<abi::Addr, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "cluster_ips")]
static CLUSTER_IPS: HashMap<abi::Addr, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "source_ranges")]
static SOURCE_RANGES: LpmTrie<[u32; 5], u32> = LpmTrie::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "affinity")]
static AFFINITY: LruHashMap<abi::AffinityKey, abi::Affinity> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "datagrams")]
pub static DATAGRAMS: LruHashMap<abi::DatagramKey, abi::Datagram> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "flows")]
pub static FLOWS: LruHashMap<abi::Tuple, abi::Flow> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "fragments")]
pub static FRAGMENTS: LruHashMap<abi::Fragment, abi::Ports> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "uplinks")]
pub static UPLINKS: HashMap<u32, abi::Uplink> = HashMap::with_max_entries(64, BPF_F_NO_PREALLOC);
#[map(name = "counters")]
static COUNTERS: PerCpuArray<abi::Counters> = PerCpuArray::with_max_entries(1024, 0);
#[btf_map(name = "peers")]
static PEERS: SkStorage<abi::Peer> = SkStorage::new();

/// The kernel's maps.
pub struct Kernel;

impl Tables for Kernel {
    #[inline(always)]
    fn frontend(&self, key: &abi::FrontendKey) -> Option<&abi::Frontend> {
        // SAFETY: the map isn't preallocated, so the element isn't reused while this program runs.
        unsafe { FRONTENDS.get(key) }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<&abi::Slot> {
        SLOTS.get(index)
    }

    #[inline(always)]
    fn node_address(&self, addr: &abi::Addr) -> Option<u32> {
        // SAFETY: as for FRONTENDS.
        unsafe { NODE_ADDRESSES.get(addr) }.copied()
    }

    #[inline(always)]
    fn is_cluster_ip(&self, addr: &abi::Addr) -> bool {
        // SAFETY: as for FRONTENDS.
        unsafe { CLUSTER_IPS.get(addr) }.is_some()
    }

    #[inline(always)]
    fn allows(&self, service: u32, source: &abi::Addr) -> bool {
        let abi::SourceRange { prefix, service, addr: abi::Addr([a, b, c, d]) } = abi::SourceRange::exact(service, *source);
        SOURCE_RANGES.get(Key::new(prefix, [service, a, b, c, d])).is_some()
    }

    #[inline(always)]
    fn affinity(&self, key: &abi::AffinityKey) -> Option<&abi::Affinity> {
        // SAFETY: an element that is evicted meanwhile may be read torn; the backend in it is checked against the set.
        unsafe { AFFINITY.get(key) }
    }

    #[inline(always)]
    fn remember(&self, key: &abi::AffinityKey, affinity: &abi::Affinity) {
        // A full LRU map evicts; what still fails only costs the client its affinity.
        let _ = AFFINITY.insert(key, affinity, 0);
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: takes no argument.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: takes no argument.
        unsafe { bpf_ktime_get_coarse_ns() }
    }
}

#[inline(always)]
pub fn host_namespace() -> u64 {
    HOST_NAMESPACE.load()
}

#[inline(always)]
pub fn count(service: u32, update: impl FnOnce(&mut abi::Counters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(service) {
        // SAFETY: the element belongs to this CPU; a program that interrupts this one costs at most one count.
        update(unsafe { &mut *counters });
    }
}

/// `PEERS` as the helpers take it.
#[inline(always)]
pub fn peers() -> *mut core::ffi::c_void {
    core::ptr::from_ref(&PEERS).cast_mut().cast()
}
