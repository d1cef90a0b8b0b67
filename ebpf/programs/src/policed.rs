//! The pods that are isolated, known to both objects.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use outrigger_abi::policy::Pod;

#[map(name = "policed")]
static POLICED: HashMap<u32, Pod> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[inline(always)]
pub fn pod(interface: u32) -> Option<&'static Pod> {
    // SAFETY: the map isn't preallocated, so the element stays whole for as long as the program runs.
    unsafe { POLICED.get(interface) }
}
