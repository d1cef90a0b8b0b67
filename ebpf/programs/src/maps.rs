//! The maps, and the decisions' view of them. Sizes here are placeholders: the agent sets them when it loads the object.
//!
//! The table's own maps are maps in maps, so that they grow while the programs stay: `frontends` and `cluster_ips` are replaced by larger
//! ones, `slots`, `maglev` and `counters` get more pages.

use core::arch::asm;

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{self, ArrayOfMaps, SkStorage};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap};
use outrigger_abi as abi;
use outrigger_logic::service::{Tables, search};

/// Cookie of the node's own network namespace.
#[unsafe(no_mangle)]
static HOST_NAMESPACE: Global<u64> = Global::new(0);

// Not preallocated: an element that is replaced or deleted stays whole for the readers that hold it.
type Growing<K, V> = ArrayOfMaps<btf_maps::HashMap<K, V, 1024, { BPF_F_NO_PREALLOC as usize }>, 1>;
const PAGES: usize = abi::PAGES as usize;

#[btf_map(name = "frontends")]
static FRONTENDS: Growing<abi::FrontendKey, abi::Frontend> = ArrayOfMaps::new();
#[btf_map(name = "slots")]
static SLOTS: ArrayOfMaps<btf_maps::Array<abi::Slot, { abi::SLOTS_PER_PAGE as usize }>, PAGES> = ArrayOfMaps::new();
#[btf_map(name = "maglev")]
static MAGLEV: ArrayOfMaps<btf_maps::Array<abi::MaglevBlock, { abi::MAGLEV_BLOCKS_PER_PAGE as usize }>, PAGES> = ArrayOfMaps::new();
#[map(name = "connections")]
static CONNECTIONS: LruHashMap<abi::BackendKey, i64> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "node_addresses")]
static NODE_ADDRESSES: HashMap<abi::Addr, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[btf_map(name = "cluster_ips")]
static CLUSTER_IPS: Growing<abi::Addr, u32> = ArrayOfMaps::new();
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
#[map(name = "activity")]
static ACTIVITY: Array<u32> = Array::with_max_entries(abi::activity::KINDS, BPF_F_MMAPABLE);
#[btf_map(name = "counters")]
static COUNTERS: ArrayOfMaps<btf_maps::PerCpuArray<abi::Counters, { abi::COUNTERS_PER_PAGE as usize }>, PAGES> = ArrayOfMaps::new();
#[btf_map(name = "peers")]
static PEERS: SkStorage<abi::Peer> = SkStorage::new();

const NO_EXIST: u64 = 1;

/// True when the backend has a count. One that is evicted meanwhile is lost, and starts anew.
#[inline(always)]
fn add(backend: &abi::BackendKey, difference: i64) -> bool {
    let Some(count) = CONNECTIONS.get_ptr_mut(backend) else { return false };
    // SAFETY: the element stays memory of the map, and everybody changes it by this operation.
    unsafe { atomic_add(count.cast(), difference as u64) };
    true
}

/// Rust has no atomic addition for this target, since it has none that hands out the old value on every kernel.
///
/// # Safety
/// The counter is in an element of a map that this program may change, and is changed by such additions only.
#[inline(always)]
pub unsafe fn atomic_add(counter: *mut u64, more: u64) {
    // SAFETY: the caller's.
    unsafe { asm!("lock *(u64 *)({counter} + 0) += {more}", counter = in(reg) counter, more = in(reg) more, options(nostack)) };
}

/// The kernel's maps.
pub struct Kernel;

impl Tables for Kernel {
    #[inline(always)]
    fn frontend(&self, key: &abi::FrontendKey) -> Option<&abi::Frontend> {
        // SAFETY: the map isn't preallocated, so the element isn't reused while this program runs.
        unsafe { FRONTENDS.get(0)?.get(key) }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<&abi::Slot> {
        SLOTS.get_value(index / abi::SLOTS_PER_PAGE, &(index % abi::SLOTS_PER_PAGE))
    }

    #[inline(always)]
    fn maglev(&self, index: u32) -> Option<&abi::MaglevBlock> {
        MAGLEV.get_value(index / abi::MAGLEV_BLOCKS_PER_PAGE, &(index % abi::MAGLEV_BLOCKS_PER_PAGE))
    }

    #[inline(always)]
    fn node_address(&self, addr: &abi::Addr) -> Option<u32> {
        // SAFETY: as for FRONTENDS.
        unsafe { NODE_ADDRESSES.get(addr) }.copied()
    }

    #[inline(always)]
    fn is_cluster_ip(&self, addr: &abi::Addr) -> bool {
        // SAFETY: as for FRONTENDS.
        CLUSTER_IPS.get(0).is_some_and(|addresses| unsafe { addresses.get(addr) }.is_some())
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
    fn connections(&self, backend: &abi::BackendKey) -> i64 {
        // SAFETY: an element that is evicted meanwhile may be read torn; that costs one good choice.
        unsafe { CONNECTIONS.get(backend) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn opened(&self, backend: &abi::BackendKey) {
        // Another CPU may be the first to make it.
        if !add(backend, 1) && CONNECTIONS.insert(backend, &1, NO_EXIST).is_err() {
            add(backend, 1);
        }
    }

    #[inline(always)]
    fn closed(&self, backend: &abi::BackendKey) {
        if self.connections(backend) > 0 {
            add(backend, -1);
        }
    }

    #[inline(always)]
    fn search(&self, range: abi::Range, (high, low, port): (u64, u64, u16)) -> u32 {
        outrigger_search(range.base, range.count, high, low, port.into())
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

/// A global function of numbers: the kernel checks it once, not in each place and state that it is called from.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn outrigger_search(base: u32, count: u32, high: u64, low: u64, port: u32) -> u32 {
    search(&Kernel, abi::Range { base, count }, (high, low, port as u16))
}

#[inline(always)]
pub fn host_namespace() -> u64 {
    HOST_NAMESPACE.load()
}

/// Whether there may be flows of the kind.
#[inline(always)]
pub fn is_active(kind: u32) -> bool {
    match ACTIVITY.get_ptr(kind) {
        // SAFETY: the element is the map's for as long as the program runs; others write it as a whole.
        Some(state) => unsafe { state.read_volatile() != abi::activity::NONE },
        None => true,
    }
}

/// To be called when a flow of the kind is in its map: whoever looks for flows afterwards finds it.
#[inline(always)]
pub fn activate(kind: u32) {
    if let Some(state) = ACTIVITY.get_ptr_mut(kind) {
        // SAFETY: as above.
        unsafe {
            if state.read_volatile() != abi::activity::SOME {
                state.write_volatile(abi::activity::SOME);
            }
        }
    }
}

#[inline(always)]
pub fn count(service: u32, update: impl FnOnce(&mut abi::Counters)) {
    let (page, index) = (service / abi::COUNTERS_PER_PAGE, service % abi::COUNTERS_PER_PAGE);
    if let Some(counters) = COUNTERS.get_value_ptr_mut(page, &index) {
        // SAFETY: the element belongs to this CPU; a program that interrupts this one costs at most one count.
        update(unsafe { &mut *counters });
    }
}

/// `PEERS` as the helpers take it.
#[inline(always)]
pub fn peers() -> *mut core::ffi::c_void {
    core::ptr::from_ref(&PEERS).cast_mut().cast()
}
