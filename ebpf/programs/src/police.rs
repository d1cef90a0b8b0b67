//! The programs at isolated pods' interfaces: they let packets pass or drop them. An object of its own, since most nodes have few
//! such pods. Built by `cargo xtask build-ebpf`.
#![no_std]
#![no_main]

mod base;
mod header;

use core::ptr::addr_of;

use aya_ebpf::bindings::{__sk_buff, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{HashMap, LpmTrie, LruHashMap, PerCpuHashMap};
use aya_ebpf::programs::TcContext;
use outrigger_abi::policy::{Connection, Direction, Drops, MARKER, OPEN, Opened, Peer, Pod, PortKey, ports};
use outrigger_abi::{Addr, Fragment, Port, Ports, SCTP, TCP, UDP};
use outrigger_logic::policy::{self, Kind, Packet, Tables};

use header::{DROP, Header, ICMP, ICMPV6, IPV4, IPV6, L3, NEXT, ethertype, header, ifindex, is_error, load};

/// By it an agent knows an object that was built for another version of the maps.
#[used]
#[unsafe(link_section = "outrigger_abi")]
#[unsafe(no_mangle)]
static POLICY_MARKER: [u8; 24] = MARKER;

const ARP: u32 = 0x0806_u16.to_be() as u32;

#[map(name = "policed")]
static POLICED: HashMap<u32, Pod> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "policy_node")]
static NODE: HashMap<Addr, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "policy_peers")]
static PEERS: LpmTrie<[u32; 5], u32> = LpmTrie::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "policy_ports")]
static PORTS: LpmTrie<[u32; 2], u32> = LpmTrie::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "policy_opened")]
static OPENED: LruHashMap<Connection, Opened> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "policy_parts")]
static PARTS: LruHashMap<Fragment, Ports> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "policy_drops")]
static DROPS: PerCpuHashMap<u32, Drops> = PerCpuHashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

struct Kernel;

impl Tables for Kernel {
    #[inline(always)]
    fn is_node(&self, addr: &Addr) -> bool {
        // SAFETY: only whether there is one is asked.
        unsafe { NODE.get(addr) }.is_some()
    }

    #[inline(always)]
    fn ports(&self, rules: u32, peer: &Addr) -> u32 {
        let key = Peer::exact(rules, *peer);
        PEERS.get(Key::new(key.prefix, key.words())).copied().unwrap_or(ports::NONE)
    }

    #[inline(always)]
    fn has_port(&self, ports: u32, protocol: u8, port: Port) -> bool {
        let key = PortKey::new(ports, protocol, port, 16);
        PORTS.get(Key::new(key.prefix, key.words())).is_some()
    }

    #[inline(always)]
    fn opened(&self, connection: &Connection) -> Option<Opened> {
        // SAFETY: an element that is evicted meanwhile may be read torn; it is judged by the rules all the same.
        unsafe { OPENED.get(connection) }.copied()
    }

    #[inline(always)]
    fn remember(&self, connection: &Connection, opened: &Opened) {
        // A full LRU map evicts; what still fails costs an answer, and the peer asks again.
        let _ = OPENED.insert(connection, opened, 0);
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: takes no argument.
        unsafe { bpf_ktime_get_coarse_ns() }
    }
}

/// Packets that the pod sends, as the Service program has led them.
#[classifier]
pub fn outrigger_police_egress(ctx: TcContext) -> i32 {
    police(ctx.skb.skb, Direction::Egress)
}

/// Packets to the pod, before the Service program renames answers.
#[classifier]
pub fn outrigger_police_ingress(ctx: TcContext) -> i32 {
    police(ctx.skb.skb, Direction::Ingress)
}

#[inline(always)]
fn police(skb: *mut __sk_buff, direction: Direction) -> i32 {
    let interface = ifindex(skb);
    // SAFETY: the map isn't preallocated, so the element stays whole for as long as the program runs.
    let pod = unsafe { POLICED.get(interface) };
    if may_pass(skb, interface, pod, direction) {
        return NEXT;
    }
    if let Some(drops) = DROPS.get_ptr_mut(interface) {
        // SAFETY: the element belongs to this CPU; a program that interrupts this one costs at most one count.
        let drops = unsafe { &mut *drops };
        match direction {
            Direction::Ingress => drops.ingress += 1,
            Direction::Egress => drops.egress += 1,
        }
    }
    DROP
}

#[inline(always)]
fn may_pass(skb: *mut __sk_buff, interface: u32, pod: Option<&Pod>, direction: Direction) -> bool {
    let v4 = match ethertype(skb) {
        IPV4 => true,
        IPV6 => false,
        ARP => return true,
        _ => return is_open(pod, direction),
    };
    match read(skb, interface, v4, direction) {
        Some(packet) => policy::passes(&Kernel, pod, direction, &packet),
        None => is_open(pod, direction),
    }
}

/// What can't be read passes where everything does.
#[inline(always)]
fn is_open(pod: Option<&Pod>, direction: Direction) -> bool {
    pod.is_some_and(|pod| pod.rules(direction) == OPEN)
}

#[inline(always)]
fn read(skb: *mut __sk_buff, interface: u32, v4: bool, direction: Direction) -> Option<Packet> {
    let found = header(skb, L3, v4)?;
    // Nobody has such an address on a wire.
    if !v4 && (found.src.is_v4() || found.dst.is_v4()) {
        return None;
    }
    // SAFETY: the context is valid for the whole call.
    let from = unsafe { addr_of!((*skb).ingress_ifindex).read_volatile() };
    let (local, remote) = ends(direction, found.src, found.dst);
    let connection = connection(interface, direction, &found, Ports::default());
    let (from_node, from_itself) = (from == 0, from == interface);
    let mut packet = Packet { kind: Kind::Other, local, remote, connection, from_node, from_itself };
    transport(skb, v4, direction, &found, &mut packet)?;
    Some(packet)
}

/// The pod's end, and the other one.
#[inline(always)]
fn ends<T>(direction: Direction, src: T, dst: T) -> (T, T) {
    match direction {
        Direction::Ingress => (dst, src),
        Direction::Egress => (src, dst),
    }
}

#[inline(always)]
fn connection(interface: u32, direction: Direction, header: &Header, part: Ports) -> Connection {
    let (local, remote) = ends(direction, header.src, header.dst);
    let (local_port, remote_port) = ends(direction, part.sport, part.dport);
    Connection { interface, local, remote, local_port, remote_port, protocol: header.protocol, zero: [0; 3] }
}

/// Fills in what only the transport header says; `None` for a packet that is cut short.
#[inline(always)]
fn transport(skb: *mut __sk_buff, v4: bool, direction: Direction, found: &Header, packet: &mut Packet) -> Option<()> {
    let l4 = L3 + found.length;
    let icmp = found.protocol == if v4 { ICMP } else { ICMPV6 };
    if !icmp && !matches!(found.protocol, TCP | UDP | SCTP) {
        return Some(());
    }
    let id = Fragment { src: found.src, dst: found.dst, id: found.id, protocol: found.protocol as u32 };
    let part = if found.offset != 0 {
        // SAFETY: an element that is evicted meanwhile may be read torn; it is judged by the rules all the same.
        let Some(part) = (unsafe { PARTS.get(&id) }) else { return Some(()) };
        packet.kind = if found.protocol == UDP { Kind::Datagram } else { Kind::Continues };
        *part
    } else if icmp {
        let message: [u8; 8] = load(skb, l4)?;
        if is_error(message[0], v4) {
            return error(skb, l4 + 8, v4, direction, packet);
        }
        if !v4 && policy::is_neighbour(direction, message[0], &found.dst, found.lifetime.to_ne_bytes()[1]) {
            packet.kind = Kind::Neighbour;
            return Some(());
        }
        packet.kind = policy::of_icmp(v4, message[0]);
        let echo = Port(u16::from_ne_bytes([message[4], message[5]]));
        Ports { sport: echo, dport: echo }
    } else {
        packet.kind = match found.protocol {
            TCP => policy::of_tcp(load(skb, l4 + 13)?),
            SCTP => policy::of_sctp(load(skb, l4 + 12)?),
            _ => Kind::Datagram,
        };
        load(skb, l4)?
    };
    if found.more && found.offset == 0 {
        // A full LRU map evicts.
        let _ = PARTS.insert(&id, &part, 0);
    }
    packet.connection = connection(packet.connection.interface, direction, found, part);
    Some(())
}

/// An error is about a packet that went the other way.
#[inline(always)]
fn error(skb: *mut __sk_buff, at: u32, v4: bool, direction: Direction, packet: &mut Packet) -> Option<()> {
    let about = header(skb, at, v4)?;
    if about.offset != 0 {
        return Some(());
    }
    let l4 = at + about.length;
    let part = match about.protocol {
        TCP | UDP | SCTP => load(skb, l4)?,
        ICMP | ICMPV6 => {
            let echo: Port = load(skb, l4 + 4)?;
            Ports { sport: echo, dport: echo }
        }
        _ => return Some(()),
    };
    packet.kind = Kind::Error;
    packet.connection = connection(packet.connection.interface, direction.other(), &about, part);
    Some(())
}
