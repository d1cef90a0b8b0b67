//! Hooks of the node's uplinks: packets to node ports and load balancer addresses from outside, and the answers to them.

use core::mem::MaybeUninit;
use core::ptr::{addr_of, from_mut, from_ref, null_mut};

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_fib_lookup, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_neigh, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use outrigger_abi::{Addr, Flow, Port, TCP, Tuple, UDP};
use outrigger_logic::packet::{Action, Flows, Packet, arrive, leave};

use crate::maps::{FLOWS, Kernel, UPLINKS, count};

/// On to other programs of the interface, then to the stack.
const NEXT: i32 = -1;
const DROP: i32 = 2;
/// Length of an Ethernet header; tags are kept beside the packet.
const L3: u32 = 14;
const IPV4: u32 = 0x0800_u16.to_be() as u32;
const IPV6: u32 = 0x86dd_u16.to_be() as u32;
const PSEUDO_HEADER: u64 = 0x10;
const MANGLED_0: u64 = 0x20;
const NO_EXIST: u64 = 1;

#[classifier]
pub fn outrigger_arrive(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the map isn't preallocated; the element stays for as long as the program runs.
    let Some(uplink) = (unsafe { UPLINKS.get(ifindex(skb)) }) else { return NEXT };
    let Some((packet, place)) = parse(skb) else { return NEXT };
    let mut to = Tuple::default();
    match arrive(&Kernel, &Kernel, uplink, &packet, &mut to) {
        Action::Pass => NEXT,
        Action::Drop => DROP,
        Action::Rewrite => rewrite(skb, &place, &packet.tuple, &to, NEXT),
        Action::Forward => match rewrite(skb, &place, &packet.tuple, &to, NEXT) {
            NEXT => forward(skb, &place, &to),
            failed => failed,
        },
    }
}

#[classifier]
pub fn outrigger_leave(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let Some((packet, place)) = parse(skb) else { return NEXT };
    let mut to = Tuple::default();
    match leave(&Kernel, &packet, &mut to) {
        Action::Rewrite => rewrite(skb, &place, &packet.tuple, &to, NEXT),
        _ => NEXT,
    }
}

/// Where the headers are.
struct Place {
    v4: bool,
    l4: u32,
    /// The IPv4 header's time to live and protocol, or the IPv6 header's next header and hop limit, as one word of the wire.
    lifetime: u16,
}

#[inline(always)]
fn ifindex(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the whole call.
    unsafe { addr_of!((*skb).ifindex).read_volatile() }
}

#[inline(always)]
fn load<T>(skb: *mut __sk_buff, offset: u32) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills the whole value or fails; `T` is made of integers here.
    unsafe {
        let result = bpf_skb_load_bytes(skb.cast(), offset, from_mut(&mut value).cast(), size_of::<T>() as u32);
        if result == 0 { Some(value.assume_init()) } else { None }
    }
}

#[inline(always)]
fn store<T>(skb: *mut __sk_buff, offset: u32, value: &T) -> bool {
    // SAFETY: the helper reads the whole value.
    unsafe { bpf_skb_store_bytes(skb.cast(), offset, from_ref(value).cast(), size_of::<T>() as u32, 0) == 0 }
}

/// TCP and UDP in unfragmented packets without IPv6 extension headers; the rest is the stack's.
#[inline(always)]
fn parse(skb: *mut __sk_buff) -> Option<(Packet, Place)> {
    // SAFETY: the context is valid for the whole call.
    let ethertype = unsafe { addr_of!((*skb).protocol).read_volatile() };
    let (src, dst, protocol, place) = if ethertype == IPV4 {
        let header: [u32; 5] = load(skb, L3)?;
        let more_or_offset = (header[1] >> 16) as u16 & 0x3fff_u16.to_be();
        if more_or_offset != 0 {
            return None;
        }
        let place = Place { v4: true, l4: L3 + (header[0] & 0xf) * 4, lifetime: header[2] as u16 };
        (Addr::from_v4_word(header[3]), Addr::from_v4_word(header[4]), (header[2] >> 8) as u8, place)
    } else if ethertype == IPV6 {
        let header: [u32; 10] = load(skb, L3)?;
        let place = Place { v4: false, l4: L3 + 40, lifetime: (header[1] >> 16) as u16 };
        let src = Addr([header[2], header[3], header[4], header[5]]);
        let dst = Addr([header[6], header[7], header[8], header[9]]);
        (src, dst, (header[1] >> 16) as u8, place)
    } else {
        return None;
    };
    if protocol != TCP && protocol != UDP {
        return None;
    }
    let ports: [u16; 2] = load(skb, place.l4)?;
    let tcp = if protocol == TCP { load::<u8>(skb, place.l4 + 13)? } else { 0 };
    let tuple = Tuple { src, dst, sport: Port(ports[0]), dport: Port(ports[1]), protocol, zero: [0; 3] };
    Some((Packet { tuple, tcp }, place))
}

/// Puts `new`'s addresses and ports in the place of `old`'s, and mends the checksums.
#[inline(always)]
fn rewrite(skb: *mut __sk_buff, place: &Place, old: &Tuple, new: &Tuple, done: i32) -> i32 {
    let checksum = place.l4 + if old.protocol == TCP { 16 } else { 6 };
    let mangled = if old.protocol == UDP { MANGLED_0 } else { 0 };
    // SAFETY: source and destination lie side by side in a tuple, as do the ports; the prefixes of mapped addresses cancel out.
    let (addresses, ports) = unsafe {
        (
            bpf_csum_diff(from_ref(&old.src).cast_mut().cast(), 32, from_ref(&new.src).cast_mut().cast(), 32, 0),
            bpf_csum_diff(from_ref(&old.sport).cast_mut().cast(), 4, from_ref(&new.sport).cast_mut().cast(), 4, 0),
        )
    };
    // SAFETY: the helpers take the context and numbers.
    let mended = unsafe {
        bpf_l4_csum_replace(skb.cast(), checksum, 0, addresses as u64, PSEUDO_HEADER | mangled) == 0
            && bpf_l4_csum_replace(skb.cast(), checksum, 0, ports as u64, mangled) == 0
            && (!place.v4 || bpf_l3_csum_replace(skb.cast(), L3 + 10, 0, addresses as u64, 0) == 0)
    };
    let stored = mended
        && if place.v4 { store(skb, L3 + 12, &[new.src.v4_word(), new.dst.v4_word()]) } else { store(skb, L3 + 8, &[new.src, new.dst]) }
        && store(skb, place.l4, &[new.sport, new.dport]);
    if stored { done } else { DROP }
}

/// `struct bpf_fib_lookup`.
#[repr(C)]
struct Route {
    family: u8,
    protocol: u8,
    sport: Port,
    dport: Port,
    length: u16,
    ifindex: u32,
    tos: u32,
    src: [u32; 4],
    dst: [u32; 4],
    vlan: u32,
    macs: [u8; 12],
}

/// Sends the packet on by the route to its destination.
#[inline(always)]
fn forward(skb: *mut __sk_buff, place: &Place, to: &Tuple) -> i32 {
    if !age(skb, place) {
        return DROP;
    }
    let first = |addr: &Addr| if place.v4 { [addr.v4_word(), 0, 0, 0] } else { addr.0 };
    let mut route = Route {
        family: if place.v4 { 2 } else { 10 },
        protocol: to.protocol,
        sport: to.sport,
        dport: to.dport,
        length: 0,
        ifindex: ifindex(skb),
        tos: 0,
        src: first(&to.src),
        dst: first(&to.dst),
        vlan: 0,
        macs: [0; 12],
    };
    // SAFETY: `route` has the layout and size that the helper expects.
    let found = unsafe { bpf_fib_lookup(skb.cast(), from_mut(&mut route).cast(), size_of::<Route>() as i32, 0) };
    // Whether the neighbour is known is the next helper's affair.
    if found != 0 && found != 7 {
        return DROP;
    }
    // SAFETY: without a neighbour of ours the helper finds it itself.
    unsafe { bpf_redirect_neigh(route.ifindex, null_mut(), 0, 0) as i32 }
}

/// One hop less to live; false when that was the last.
#[inline(always)]
fn age(skb: *mut __sk_buff, place: &Place) -> bool {
    let [first, second] = place.lifetime.to_ne_bytes();
    if place.v4 {
        let aged = u16::from_ne_bytes([first.wrapping_sub(1), second]);
        // SAFETY: the helper takes the context and numbers.
        let mended = unsafe { bpf_l3_csum_replace(skb.cast(), L3 + 10, place.lifetime as u64, aged as u64, 2) == 0 };
        first > 1 && mended && store(skb, L3 + 8, &(first - 1))
    } else {
        second > 1 && store(skb, L3 + 7, &(second - 1))
    }
}

impl Flows for Kernel {
    #[inline(always)]
    fn flow(&self, tuple: &Tuple) -> Option<&Flow> {
        // SAFETY: a flow that is evicted meanwhile may be read torn; the packet is lost then, and so is the flow.
        unsafe { FLOWS.get(tuple) }
    }

    #[inline(always)]
    fn add_flow(&self, tuple: &Tuple, flow: &Flow) -> bool {
        FLOWS.insert(tuple, flow, NO_EXIST).is_ok()
    }

    #[inline(always)]
    fn set_flow(&self, tuple: &Tuple, flow: &Flow) {
        count(flow.service, |counters| counters.connections += 1);
        // A full LRU map evicts.
        let _ = FLOWS.insert(tuple, flow, 0);
    }

    #[inline(always)]
    fn remove_flow(&self, tuple: &Tuple) {
        // It may have been evicted.
        let _ = FLOWS.remove(tuple);
    }

    #[inline(always)]
    fn mark(&self, tuple: &Tuple, flags: u32) -> u32 {
        match FLOWS.get_ptr_mut(tuple) {
            // SAFETY: as in `flow`; two packets of one direction at once set the same bits.
            Some(flow) => unsafe {
                (*flow).flags |= flags;
                (*flow).flags
            },
            None => 0,
        }
    }
}
