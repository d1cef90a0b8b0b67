//! Hooks of the node's interfaces: packets from outside and from pods to Services, the answers to them, and errors about either.

use core::ptr::{addr_of, from_mut, from_ref};

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_fib_lookup, bpf_get_smp_processor_id, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_neigh,
    bpf_skb_store_bytes,
};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use outrigger_abi::sight::{Event, Reason, event_kind};
use outrigger_abi::{Addr, Endpoint, Flow, Fragment, Port, Ports, TCP, Tuple, UDP, Uplink, activity, flow_flags};
use outrigger_logic::packet::{self, Action, Flows, Packet, Part, arrive, leave, may_open};
use outrigger_logic::service::{Choice, Tables, Verdict};

use crate::header::{DROP, ICMP, ICMPV6, IPV4, IPV6, L3, NEXT, ethertype, header, ifindex, is_error, load};
use crate::maps::{FLOWS, FRAGMENTS, Kernel, UPLINKS, activate, is_active};
use crate::sight::{self, of_packet};

const PSEUDO_HEADER: u64 = 0x10;
const MANGLED_0: u64 = 0x20;
const NO_EXIST: u64 = 1;
const NO_NEIGHBOUR: i64 = 7;
/// How far apart two CPUs begin to count source ports.
const APART: u32 = 17_321;

/// A flow's time is written again after this long, so that a busy one isn't written at each packet.
const SECOND: u64 = 1_000_000_000;

/// What a call works on. Not on the stack, which has 512 bytes, and where the kernel would follow each word of it: in a map it is any
/// number to it. Calls on one CPU don't interrupt each other.
struct Scratch {
    packet: Packet,
    place: Place,
    fragment: Fragment,
    /// Where a new connection goes.
    choice: Choice,
    /// What the packet's addresses become.
    to: Tuple,
    /// What the way to some address is.
    route: Route,
    /// How many source ports were tried on this CPU.
    turns: u32,
}

#[map(name = "scratch")]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

#[inline(always)]
fn scratch() -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(0)
}

#[classifier]
pub fn outrigger_arrive(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let (uplink, outside) = match uplink(ifindex(skb)) {
        Some(uplink) => (uplink, true),
        None => match uplink(0) {
            Some(node) => (node, false),
            None => return NEXT,
        },
    };
    if !is_active(if outside { activity::OUTSIDE } else { activity::POD }) && opens_nothing(skb) {
        return NEXT;
    }
    let Some(scratch) = scratch() else { return NEXT };
    if !parse(skb, scratch) {
        return NEXT;
    }
    // SAFETY: the element belongs to this CPU, and so to this call; its fields are lent apart from each other.
    let (packet, to) = unsafe { (&(*scratch).packet, &mut (*scratch).to) };
    match arrive(&Kernel, &Hook { skb, scratch }, uplink, outside, packet, to) {
        Action::Pass => NEXT,
        Action::Drop => DROP,
        Action::Rewrite => rewrite(skb, scratch),
        Action::Forward => match rewrite(skb, scratch) {
            NEXT => forward(skb, scratch),
            failed => failed,
        },
    }
}

#[classifier]
pub fn outrigger_leave(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    if !is_active(activity::OUTSIDE) && !is_active(activity::POD) {
        return NEXT;
    }
    // Answers to clients outside leave by the way that those came, and answers to a pod through its interface.
    if !is_active(if uplink(ifindex(skb)).is_some() { activity::OUTSIDE } else { activity::POD }) {
        return NEXT;
    }
    let Some(scratch) = scratch() else { return NEXT };
    if !parse(skb, scratch) {
        return NEXT;
    }
    // SAFETY: as above.
    let (packet, to) = unsafe { (&(*scratch).packet, &mut (*scratch).to) };
    match leave(&Hook { skb, scratch }, packet, to) {
        Action::Rewrite => rewrite(skb, scratch),
        _ => NEXT,
    }
}

#[inline(always)]
fn uplink(index: u32) -> Option<&'static Uplink> {
    // SAFETY: the map isn't preallocated; the element stays for as long as the program runs.
    unsafe { UPLINKS.get(index) }
}

/// Where the headers are.
struct Place {
    v4: bool,
    l4: u32,
    /// In an error: the header of the packet that it is about, and what comes behind that.
    inner: u32,
    inner_l4: u32,
    /// The IPv4 header's time to live and protocol, or the IPv6 header's next header and hop limit, as one word of the wire.
    lifetime: u16,
}

#[inline(always)]
fn store<T>(skb: *mut __sk_buff, offset: u32, value: &T) -> bool {
    // SAFETY: the helper reads the whole value.
    unsafe { bpf_skb_store_bytes(skb.cast(), offset, from_ref(value).cast(), size_of::<T>() as u32, 0) == 0 }
}

/// Whether no connection begins with the packet, as a look at plain headers tells; false when in doubt.
#[inline(always)]
fn opens_nothing(skb: *mut __sk_buff) -> bool {
    match ethertype(skb) {
        IPV4 => head::<48>(skb).is_some_and(|head| head[14] == PLAIN_IPV4 && head[23] == TCP && !may_open(TCP, head[47])),
        IPV6 => head::<68>(skb).is_some_and(|head| head[20] == TCP && !may_open(TCP, head[67])),
        _ => true,
    }
}

/// Version 4, a header of 20 bytes.
const PLAIN_IPV4: u8 = 0x45;

/// The packet's first bytes, read in place.
#[inline(always)]
fn head<'a, const LENGTH: usize>(skb: *mut __sk_buff) -> Option<&'a [u8; LENGTH]> {
    // SAFETY: the context is valid for the whole call, and so is what lies between the two ends while nothing is written.
    unsafe {
        let start = addr_of!((*skb).data).read_volatile() as usize;
        let end = addr_of!((*skb).data_end).read_volatile() as usize;
        if start + LENGTH > end { None } else { Some(&*(start as *const [u8; LENGTH])) }
    }
}

/// Reads TCP, UDP and errors about them; false for the rest, which is the stack's.
#[inline(never)]
fn parse(skb: *mut __sk_buff, scratch: *mut Scratch) -> bool {
    // SAFETY: as in the programs.
    let scratch = unsafe { &mut *scratch };
    read(skb, scratch).is_some()
}

#[inline(always)]
fn read(skb: *mut __sk_buff, scratch: &mut Scratch) -> Option<()> {
    let Scratch { packet, place, fragment, .. } = scratch;
    place.v4 = match ethertype(skb) {
        IPV4 => true,
        IPV6 => false,
        _ => return None,
    };
    let found = header(skb, L3, place.v4)?;
    place.l4 = L3 + found.length;
    place.lifetime = found.lifetime;
    packet.tcp = 0;
    if found.protocol == if place.v4 { ICMP } else { ICMPV6 } {
        return if found.offset == 0 { error(skb, packet, place) } else { None };
    }
    if found.protocol != TCP && found.protocol != UDP {
        return None;
    }
    *fragment = Fragment { src: found.src, dst: found.dst, id: found.id, protocol: found.protocol as u32 };
    let ports = if found.offset == 0 {
        let ports: Ports = load(skb, place.l4)?;
        if found.more {
            // A full LRU map evicts.
            let _ = FRAGMENTS.insert(&*fragment, &ports, 0);
        }
        if found.protocol == TCP {
            packet.tcp = load::<u8>(skb, place.l4 + 13)?;
        }
        packet.part = Part::Whole;
        ports
    } else {
        packet.part = Part::Later;
        // SAFETY: an element that is evicted meanwhile may be read torn; the datagram is lost then.
        *unsafe { FRAGMENTS.get(&*fragment) }?
    };
    packet.tuple.src = found.src;
    packet.tuple.dst = found.dst;
    ports_of(packet, found.protocol, ports.sport, ports.dport);
    Some(())
}

#[inline(always)]
fn ports_of(packet: &mut Packet, protocol: u8, sport: Port, dport: Port) {
    packet.tuple.protocol = protocol;
    packet.tuple.sport = sport;
    packet.tuple.dport = dport;
    packet.tuple.zero = [0; 3];
}

/// An error about a packet. It goes where that packet's answer would.
#[inline(always)]
fn error(skb: *mut __sk_buff, packet: &mut Packet, place: &mut Place) -> Option<()> {
    let kind: u8 = load(skb, place.l4)?;
    if !is_error(kind, place.v4) {
        return None;
    }
    place.inner = place.l4 + 8;
    let about = header(skb, place.inner, place.v4)?;
    place.inner_l4 = place.inner + about.length;
    if (about.protocol != TCP && about.protocol != UDP) || about.offset != 0 {
        return None;
    }
    let ports: Ports = load(skb, place.inner_l4)?;
    packet.part = Part::Error;
    packet.tuple.src = about.dst;
    packet.tuple.dst = about.src;
    ports_of(packet, about.protocol, ports.dport, ports.sport);
    Some(())
}

/// Puts `to`'s addresses and ports in the place of the packet's, and mends the checksums.
#[inline(never)]
fn rewrite(skb: *mut __sk_buff, scratch: *mut Scratch) -> i32 {
    // SAFETY: as in the programs; nothing is written here.
    let Scratch { packet, place, to, .. } = unsafe { &*scratch };
    let done = match packet.part {
        Part::Whole => rewrite_whole(skb, place, &packet.tuple, to),
        Part::Later => rewrite_addresses(skb, place, addresses(&packet.tuple, to), to),
        Part::Error => rewrite_error(skb, place, &packet.tuple, to),
    };
    if done {
        return NEXT;
    }
    sight::refused(0, Reason::Malformed);
    DROP
}

/// What changes in a checksum over the addresses. Source and destination lie side by side in a tuple; the prefixes of mapped addresses
/// cancel out.
#[inline(always)]
fn addresses(old: &Tuple, new: &Tuple) -> u64 {
    difference(&old.src, &new.src, 32)
}

#[inline(always)]
fn ports(old: &Tuple, new: &Tuple) -> u64 {
    difference(&old.sport, &new.sport, 4)
}

/// `length` is within what lies behind both.
#[inline(always)]
fn difference<T>(old: &T, new: &T, length: u32) -> u64 {
    // SAFETY: the helper reads that much of both, which the callers keep within a tuple.
    unsafe { bpf_csum_diff(from_ref(old).cast_mut().cast(), length, from_ref(new).cast_mut().cast(), length, 0) as u64 }
}

/// Mends a checksum of a transport header by a difference.
#[inline(always)]
fn mend(skb: *mut __sk_buff, at: u32, difference: u64, flags: u64) -> bool {
    // SAFETY: the helper takes the context and numbers.
    unsafe { bpf_l4_csum_replace(skb.cast(), at, 0, difference, flags) == 0 }
}

/// Mends an IPv4 header's checksum by a difference.
#[inline(always)]
fn mend_header(skb: *mut __sk_buff, header: u32, difference: u64) -> bool {
    // SAFETY: as above.
    unsafe { bpf_l3_csum_replace(skb.cast(), header + 10, 0, difference, 0) == 0 }
}

#[inline(always)]
fn store_addresses(skb: *mut __sk_buff, v4: bool, header: u32, src: &Addr, dst: &Addr) -> bool {
    if v4 { store(skb, header + 12, &[src.v4_word(), dst.v4_word()]) } else { store(skb, header + 8, &[*src, *dst]) }
}

#[inline(always)]
fn rewrite_addresses(skb: *mut __sk_buff, place: &Place, difference: u64, new: &Tuple) -> bool {
    (!place.v4 || mend_header(skb, L3, difference)) && store_addresses(skb, place.v4, L3, &new.src, &new.dst)
}

#[inline(always)]
fn rewrite_whole(skb: *mut __sk_buff, place: &Place, old: &Tuple, new: &Tuple) -> bool {
    let checksum = place.l4 + if old.protocol == TCP { 16 } else { 6 };
    let mangled = if old.protocol == UDP { MANGLED_0 } else { 0 };
    let changed = addresses(old, new);
    mend(skb, checksum, changed, PSEUDO_HEADER | mangled)
        && mend(skb, checksum, ports(old, new), mangled)
        && rewrite_addresses(skb, place, changed, new)
        && store(skb, place.l4, &[new.sport, new.dport])
}

/// The packet that the error is about gets the addresses that its sender knows, and the error itself seems to come from whom that one
/// asked.
#[inline(always)]
fn rewrite_error(skb: *mut __sk_buff, place: &Place, old: &Tuple, new: &Tuple) -> bool {
    let Some(outer) = header(skb, L3, place.v4) else { return false };
    let mut from = *old;
    from.src = outer.src;
    from.dst = outer.dst;
    let outer_change = addresses(&from, new);
    let inner_change = addresses(old, new);
    let checksum = place.l4 + 2;
    // Inside an IPv4 header its checksum makes up for the addresses; IPv6 has none, and counts the outer addresses too.
    let mended = if place.v4 {
        mend_header(skb, place.inner, inner_change)
    } else {
        mend(skb, checksum, outer_change, PSEUDO_HEADER) && mend(skb, checksum, inner_change, 0)
    };
    mended
        && mend(skb, checksum, ports(old, new), 0)
        && store_addresses(skb, place.v4, place.inner, &new.dst, &new.src)
        && store(skb, place.inner_l4, &[new.dport, new.sport])
        && rewrite_addresses(skb, place, outer_change, new)
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
    /// The next hop's address after the lookup, of `family`.
    dst: [u32; 4],
    vlan: u32,
    macs: [u8; 12],
}

/// `struct bpf_redir_neigh`.
#[repr(C)]
struct NextHop {
    family: u32,
    addr: [u32; 4],
}

/// The interface on the route from one address to another; 0 where there is none. Whether the neighbour is known isn't asked.
#[inline(always)]
fn route(skb: *mut __sk_buff, scratch: *mut Scratch, way: &Tuple) -> u32 {
    let v4 = way.src.is_v4();
    let first = |addr: &Addr| if v4 { [addr.v4_word(), 0, 0, 0] } else { addr.0 };
    // SAFETY: as in the programs.
    let route = unsafe { &mut (*scratch).route };
    *route = Route {
        family: if v4 { 2 } else { 10 },
        protocol: way.protocol,
        sport: way.sport,
        dport: way.dport,
        length: 0,
        ifindex: ifindex(skb),
        tos: 0,
        src: first(&way.src),
        dst: first(&way.dst),
        vlan: 0,
        macs: [0; 12],
    };
    // SAFETY: `route` has the layout and size that the helper expects.
    let found = unsafe { bpf_fib_lookup(skb.cast(), from_mut(route).cast(), size_of::<Route>() as i32, 0) };
    if found == 0 || found == NO_NEIGHBOUR { route.ifindex } else { 0 }
}

/// Sends the packet on by the route to its destination.
#[inline(never)]
fn forward(skb: *mut __sk_buff, scratch: *mut Scratch) -> i32 {
    // SAFETY: as in the programs; only `route` is written.
    let (place, to) = unsafe { (&(*scratch).place, &(*scratch).to) };
    if !age(skb, place) {
        sight::refused(0, Reason::Ttl);
        return DROP;
    }
    let interface = route(skb, scratch, to);
    if interface == 0 {
        sight::refused(0, Reason::NoRoute);
        return DROP;
    }
    // The neighbour is named, so that the route needn't be looked up again, and its MAC address is the kernel's to find and to keep fresh.
    // SAFETY: as in the programs; the helper reads all of `next` and no more.
    unsafe {
        let mut next = NextHop { family: (*scratch).route.family as u32, addr: (*scratch).route.dst };
        bpf_redirect_neigh(interface, from_mut(&mut next).cast(), size_of::<NextHop>() as i32, 0) as i32
    }
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

const PASS: u32 = 0;
const REFUSE: u32 = 1;
const TO: u32 = 2;
/// Dropped by `Reason::SourceRange`, and by `Reason::LocalPolicy`.
const STRANGER: u32 = 3;
const FAR: u32 = 4;

/// Where the packet goes: what a verdict holds beside its kind is left in `choice`.
#[inline(never)]
fn lead(scratch: *mut Scratch, outside: u32) -> u32 {
    // SAFETY: as in the programs; only `choice` is written.
    let (packet, choice) = unsafe { (&(*scratch).packet, &mut (*scratch).choice) };
    match packet::lead(&Kernel, packet, outside != 0) {
        Verdict::Pass => PASS,
        Verdict::Refuse(service) => {
            choice.service = service;
            REFUSE
        }
        Verdict::Drop(service, reason) => {
            choice.service = service;
            if reason == Reason::SourceRange { STRANGER } else { FAR }
        }
        Verdict::To(found) => {
            *choice = found;
            TO
        }
    }
}

/// Counts and tells that the packet came to nothing.
#[inline(never)]
fn refused(scratch: *mut Scratch, service: u32, reason: Reason) {
    sight::refused(service, reason);
    if sight::is_watched() {
        // SAFETY: as in the programs; it is only read.
        let tuple = unsafe { &(*scratch).packet.tuple };
        sight::tell(|| Event { kind: event_kind::REFUSED, reason: reason as u8, service, ..of_packet(tuple) });
    }
}

/// Counts and tells that the packet's connection was led to a backend.
#[inline(never)]
fn opened(scratch: *mut Scratch, service: u32) {
    // SAFETY: as in the programs; both are only read.
    let (tuple, to) = unsafe { (&(*scratch).packet.tuple, &(*scratch).to) };
    sight::connected(service, Endpoint::new(to.dst, to.dport));
    if sight::is_watched() {
        sight::tell(|| Event { kind: event_kind::OPENED, backend: Endpoint::new(to.dst, to.dport), service, ..of_packet(tuple) });
    }
}

/// Tells that both sides have closed the flow.
#[inline(never)]
fn closed(tuple: &Tuple, flow: *const Flow) {
    // SAFETY: it is an element of the map of flows; read torn, it tells of a connection that isn't.
    let flow = unsafe { &*flow };
    sight::tell(|| {
        let backend = Endpoint::new(flow.to.dst, flow.to.dport);
        Event { kind: event_kind::CLOSED, backend, service: flow.service, ..of_packet(tuple) }
    });
}

/// Refuses a connection in the frontend's name.
#[inline(never)]
fn refuse(skb: *mut __sk_buff, scratch: *mut Scratch, node: *const Uplink, outside: u32, service: u32) -> Action {
    // SAFETY: as in the programs; of these only `to` is written, and `node` is an element of a map.
    let (packet, to, node) = unsafe { (&(*scratch).packet, &mut (*scratch).to, &*node) };
    packet::refuse(&Kernel, &Hook { skb, scratch }, node, outside != 0, packet, service, to)
}

/// Begins a connection to the backend in `choice`.
#[inline(never)]
fn open(skb: *mut __sk_buff, scratch: *mut Scratch, node: *const Uplink, outside: u32) -> Action {
    // SAFETY: as in the programs; of these only `to` is written, and `node` is an element of a map.
    let (packet, choice, to, node) = unsafe { (&(*scratch).packet, &(*scratch).choice, &mut (*scratch).to, &*node) };
    packet::open(&Kernel, &Hook { skb, scratch }, node, outside != 0, packet, choice, to)
}

#[inline(always)]
fn kind_of(flow: &Flow) -> u32 {
    if flow.flags & flow_flags::POD != 0 { activity::POD } else { activity::OUTSIDE }
}

/// One call of a hook.
struct Hook {
    skb: *mut __sk_buff,
    scratch: *mut Scratch,
}

/// Packets, choices and what packets become are those in the scratch.
impl Flows for Hook {
    #[inline(always)]
    fn lead(&self, _packet: &Packet, outside: bool) -> Verdict {
        let kind = lead(self.scratch, outside as u32);
        // SAFETY: the element belongs to this CPU, and so to this call.
        let choice = unsafe { (*self.scratch).choice };
        match kind {
            TO => Verdict::To(choice),
            REFUSE => Verdict::Refuse(choice.service),
            PASS => Verdict::Pass,
            STRANGER => Verdict::Drop(choice.service, Reason::SourceRange),
            _ => Verdict::Drop(choice.service, Reason::LocalPolicy),
        }
    }

    #[inline(always)]
    fn refuse(&self, node: &Uplink, outside: bool, _packet: &Packet, service: u32, _to: &mut Tuple) -> Action {
        refuse(self.skb, self.scratch, node, outside as u32, service)
    }

    #[inline(always)]
    fn open(&self, node: &Uplink, outside: bool, _packet: &Packet, _choice: &Choice, _to: &mut Tuple) -> Action {
        open(self.skb, self.scratch, node, outside as u32)
    }

    #[inline(always)]
    fn refused(&self, _packet: &Packet, service: u32, reason: Reason) {
        refused(self.scratch, service, reason);
    }

    #[inline(always)]
    fn flow(&self, tuple: &Tuple) -> Option<&Flow> {
        let flow = FLOWS.get_ptr_mut(tuple)?;
        // SAFETY: a flow that is evicted meanwhile may be read torn; the packet is lost then, and so is the flow.
        unsafe {
            let now = Kernel.now();
            if now.wrapping_sub((*flow).seen) > SECOND {
                (*flow).seen = now;
            }
            Some(&*flow)
        }
    }

    #[inline(always)]
    fn source_towards(&self, from: &Addr, to: &Addr) -> Addr {
        let way = Tuple { src: *from, dst: *to, ..Tuple::default() };
        match route(self.skb, self.scratch, &way) {
            0 => Addr::default(),
            interface => match uplink(interface) {
                Some(uplink) if from.is_v4() => uplink.v4,
                Some(uplink) => uplink.v6,
                None => Addr::default(),
            },
        }
    }

    #[inline(always)]
    fn turn(&self) -> u32 {
        // SAFETY: as in the programs.
        let turns = unsafe { &mut (*self.scratch).turns };
        *turns = turns.wrapping_add(1);
        // SAFETY: takes no argument.
        let cpu = unsafe { bpf_get_smp_processor_id() };
        turns.wrapping_add(cpu.wrapping_mul(APART))
    }

    #[inline(always)]
    fn add_flow(&self, tuple: &Tuple, flow: &Flow) -> bool {
        let added = FLOWS.insert(tuple, flow, NO_EXIST).is_ok();
        activate(kind_of(flow));
        added
    }

    #[inline(always)]
    fn set_flow(&self, tuple: &Tuple, flow: &Flow) {
        opened(self.scratch, flow.service);
        // A full LRU map evicts.
        let _ = FLOWS.insert(tuple, flow, 0);
        activate(kind_of(flow));
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
                let before = (*flow).flags;
                (*flow).flags |= flags;
                if flags & flow_flags::CLOSED != 0 && before & (flow_flags::CLOSED | flow_flags::REPLY) == 0 && sight::is_watched() {
                    closed(tuple, flow);
                }
                before | flags
            },
            None => 0,
        }
    }
}
