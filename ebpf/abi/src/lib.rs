//! What the agent and the eBPF programs tell each other: map keys, map values, flags.
//!
//! Everything here is `repr(C)`, without padding and valid for any bit pattern; sizes are asserted, since they are what the
//! kernel compares when a new agent adopts pinned maps. Addresses and ports are in network byte order here and nowhere else:
//! IPv4 addresses take their v4-mapped IPv6 form, so that one key serves both families and v6 sockets that dial v4.
#![no_std]

pub mod policy;
pub mod sight;

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Bumped when a layout or a meaning changes: pinned maps of another version aren't adopted.
pub const VERSION: u32 = 4;
/// Stands in the object that the programs are built to, so that an agent knows an object of another version.
pub const MARKER: [u8; 16] = *b"outrigger-abi-4\0";

/// Source ports of connections that are sent on in the node's name, both ends included. The agent keeps the kernel from giving them to
/// the node's own sockets.
pub const MASQUERADE_PORTS: (u16, u16) = (2048, 29_999);

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

/// Elements in each page of `slots`, `maglev` and `counters`: arrays that grow by the page, so what is in them stays where it is.
pub const SLOTS_PER_PAGE: u32 = 1 << 14;
pub const MAGLEV_BLOCKS_PER_PAGE: u32 = 1 << 14;
pub const COUNTERS_PER_PAGE: u32 = 1 << 12;
/// Pages that there can be of each.
pub const PAGES: u32 = 256;

/// An address of either family, as it lies in memory on the wire.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Addr(pub [u32; 4]);

impl Addr {
    const MAPPED: u32 = 0xffff_u32.to_be();
    /// "Any address of this node", in the keys of node ports and host ports.
    pub const NODE_V4: Self = Self::from_v4_word(0);
    pub const NODE_V6: Self = Self([0; 4]);

    /// `word` is in network byte order, as `user_ip4` is.
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, Self::MAPPED, word])
    }

    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == Self::MAPPED
    }

    /// The IPv4 address in network byte order; only meaningful when [`Self::is_v4`].
    pub const fn v4_word(&self) -> u32 {
        self.0[3]
    }

    /// The wildcard key of this address' family.
    pub const fn node(&self) -> Self {
        if self.is_v4() { Self::NODE_V4 } else { Self::NODE_V6 }
    }

    pub fn ip(&self) -> IpAddr {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(self.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets).to_canonical()
    }

    /// Orders as addresses do: by their bytes on the wire.
    #[inline(always)]
    pub const fn sort_key(&self) -> (u64, u64) {
        let [a, b, c, d] = self.0;
        (double(a, b), double(c, d))
    }
}

#[inline(always)]
const fn double(high: u32, low: u32) -> u64 {
    (u32::from_be(high) as u64) << 32 | u32::from_be(low) as u64
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(ip.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        let octets = ip.octets();
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        Self(words)
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

/// A port as it lies in memory on the wire.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Port(pub u16);

impl Port {
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    #[inline(always)]
    pub const fn host(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// An address and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub addr: Addr,
    pub port: Port,
    pub zero: u16,
}

impl Endpoint {
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port) -> Self {
        Self { addr, port, zero: 0 }
    }

    #[inline(always)]
    pub const fn sort_key(&self) -> (u64, u64, u16) {
        let (high, low) = self.addr.sort_key();
        (high, low, self.port.host())
    }
}

/// Key of the map `frontends`: what a client dials.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FrontendKey {
    pub addr: Addr,
    pub port: Port,
    pub protocol: u8,
    pub zero: u8,
}

impl FrontendKey {
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port, protocol: u8) -> Self {
        Self { addr, port, protocol, zero: 0 }
    }
}

/// A set of backends: consecutive slots, sorted by address and port, never changed while a frontend names them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Range {
    pub base: u32,
    pub count: u32,
}

/// Value of the map `frontends`. Replaced whole, so readers see the old set or the new one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Frontend {
    /// Index of the Service port; the slots carry it too, which tells a reader that a range was given to another one meanwhile.
    pub service: u32,
    /// For clients on this node (its own processes and its pods).
    pub internal: Range,
    /// For clients from outside.
    pub external: Range,
    /// Which of the external backends a connection's hash means: the first block of `maglev`, and how many places there are. None where
    /// chance decides.
    pub maglev: Range,
    /// `frontend_flags`.
    pub flags: u32,
    /// Seconds that a client sticks to its backend; 0 without session affinity.
    pub affinity: u32,
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flags {
    /// With no internal backend: drop instead of refusing.
    pub const DROP_INTERNAL: u32 = 1 << 0;
    /// With no external backend: drop instead of refusing.
    pub const DROP_EXTERNAL: u32 = 1 << 1;
    /// A host port: reached by every address of the node, not only by those chosen for node ports.
    pub const HOST_PORT: u32 = 1 << 2;
    /// Connections from outside get the node's address as their source, wherever the backend is.
    pub const MASQUERADE_ALWAYS: u32 = 1 << 3;
    /// Connections from outside keep their source, wherever the backend is.
    pub const MASQUERADE_NEVER: u32 = 1 << 4;
    /// The map `source_ranges` says who may connect.
    pub const SOURCE_RANGES: u32 = 1 << 5;
    /// A cluster-internal address: clients from outside are served, but it's no node or load balancer address.
    pub const CLUSTER_IP: u32 = 1 << 6;
    /// The node's own processes aren't among those whom `source_ranges` lets connect.
    pub const NODE_REFUSED: u32 = 1 << 7;
    /// Sockets get the backend with the fewer open connections of two that chance offers.
    pub const LEAST_CONNECTIONS: u32 = 1 << 8;
}

/// Places of a Maglev table in one element of the paged array `maglev`: the kernel rounds an element up to eight bytes, so one alone would
/// waste most of them.
pub const MAGLEV_BLOCK: u32 = 32;

/// Element of the paged array `maglev`: for each place, which backend of the set it means. Written before a frontend names it, and never
/// changed while one does.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MaglevBlock(pub [u16; MAGLEV_BLOCK as usize]);

impl MaglevBlock {
    #[inline(always)]
    pub const fn get(&self, place: u32) -> u32 {
        self.0[(place % MAGLEV_BLOCK) as usize] as u32
    }
}

/// Element of the paged array `slots`: one backend of one set.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slot {
    pub addr: Addr,
    pub port: Port,
    /// `slot_flags`.
    pub flags: u16,
    /// The Service port that the slot belongs to; 0 is nobody's.
    pub service: u32,
}

impl Slot {
    #[inline(always)]
    pub const fn endpoint(&self) -> Endpoint {
        Endpoint::new(self.addr, self.port)
    }
}

/// Bits of [`Slot::flags`].
pub mod slot_flags {
    /// The backend runs on this node.
    pub const LOCAL: u16 = 1 << 0;
}

/// Values of the map `node_addresses`, keyed by [`Addr`].
pub mod node_address_flags {
    /// Node ports are reached here.
    pub const NODE_PORTS: u32 = 1 << 0;
    /// Only processes in the node's own network namespace mean this node by it (loopback).
    pub const HOST_ONLY: u32 = 1 << 1;
}

/// Key of the longest-prefix map `source_ranges`: who may connect to the Service port's load balancer addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceRange {
    /// In bits, over all that follows.
    pub prefix: u32,
    pub service: u32,
    pub addr: Addr,
}

impl SourceRange {
    /// `length` counts the bits of the address' own family.
    #[inline(always)]
    pub const fn new(service: u32, addr: Addr, length: u32) -> Self {
        Self { prefix: 32 + length + if addr.is_v4() { 96 } else { 0 }, service, addr }
    }

    /// For looking one client up.
    #[inline(always)]
    pub const fn exact(service: u32, addr: Addr) -> Self {
        Self { prefix: 160, service, addr }
    }
}

/// Socket storage `peers`: where a socket was led. `frontend` is what its program dialled, `backend` what it got.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// In nanoseconds of the monotonic clock: when the socket last sent to the frontend (UDP, by the coarse clock), or when it connected.
    pub seen: u64,
    pub frontend: Endpoint,
    pub backend: Endpoint,
    /// Where `backend` was found, to find it again without a search.
    pub base: u32,
    pub index: u32,
    pub service: u32,
    pub protocol: u16,
    /// `peer_flags`.
    pub flags: u16,
}

/// Bits of [`Peer::flags`].
pub mod peer_flags {
    /// The socket is among those that `connections` counts for its backend.
    pub const COUNTED: u16 = 1 << 0;
}

/// Key of the map `connections`: a backend whose open sockets on this node are counted, whichever frontend led them there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BackendKey {
    pub addr: Addr,
    pub port: Port,
    pub protocol: u16,
}

impl BackendKey {
    #[inline(always)]
    pub const fn new(backend: Endpoint, protocol: u8) -> Self {
        Self { addr: backend.addr, port: backend.port, protocol: protocol as u16 }
    }
}

/// Key of the map `datagrams`: what an unconnected UDP socket, which may talk to several Services, is to translate.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DatagramKey {
    pub cookie: u64,
    pub endpoint: Endpoint,
    /// `datagram_direction`.
    pub direction: u32,
}

pub mod datagram_direction {
    /// `endpoint` is a frontend; the value's is the backend.
    pub const FORWARD: u32 = 0;
    /// `endpoint` is a backend; the value's is the frontend.
    pub const REVERSE: u32 = 1;
}

/// Value of the map `datagrams`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Datagram {
    pub seen: u64,
    pub endpoint: Endpoint,
    pub zero: u32,
}

/// Key of the map `affinity`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// By `kind`: an address, or a network namespace's cookie in the first two words.
    pub client: Addr,
    pub service: u32,
    /// `client_kind`.
    pub kind: u32,
}

/// At connect time a socket has no source address yet, but it has a network namespace, and that is its pod.
pub mod client_kind {
    pub const ADDRESS: u32 = 0;
    pub const NAMESPACE: u32 = 1;
}

impl AffinityKey {
    #[inline(always)]
    pub const fn namespace(cookie: u64, service: u32) -> Self {
        Self { client: Addr([cookie as u32, (cookie >> 32) as u32, 0, 0]), service, kind: client_kind::NAMESPACE }
    }

    #[inline(always)]
    pub const fn address(client: Addr, service: u32) -> Self {
        Self { client, service, kind: client_kind::ADDRESS }
    }
}

/// Value of the map `affinity`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// When the client last opened a connection, in nanoseconds of the coarse monotonic clock.
    pub seen: u64,
    pub backend: Endpoint,
    pub base: u32,
    pub index: u32,
    pub zero: u32,
}

/// Key of the map `flows`: one direction of one connection that packets (not sockets) are translated for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub src: Addr,
    pub dst: Addr,
    pub sport: Port,
    pub dport: Port,
    pub protocol: u8,
    pub zero: [u8; 3],
}

impl Tuple {
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, protocol: self.protocol, zero: [0; 3] }
    }
}

/// Value of the map `flows`: what the packet's addresses become.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    pub seen: u64,
    pub to: Tuple,
    /// `flow_flags`.
    pub flags: u32,
    pub service: u32,
    pub zero: [u32; 2],
}

/// Bits of [`Flow::flags`].
pub mod flow_flags {
    /// This direction answers the connection; the other opened it.
    pub const REPLY: u32 = 1 << 0;
    /// The source changes too, so the packet can't pass through the node's own routing and is sent on at once.
    pub const REDIRECT: u32 = 1 << 1;
    /// A FIN passed in this direction.
    pub const FIN: u32 = 1 << 2;
    /// A RST passed, or FINs in both directions: the next SYN starts anew.
    pub const CLOSED: u32 = 1 << 3;
    /// Its packets come by an interface of pods, not by an uplink; an answer that leaves goes by one.
    pub const POD: u32 = 1 << 4;
}

/// The array `activity`: whether there are flows at all, so that nobody pays for what nobody uses. One element for those with
/// `flow_flags::POD`, one for the others.
pub mod activity {
    pub const POD: u32 = 0;
    pub const OUTSIDE: u32 = 1;
    pub const KINDS: u32 = 2;
    /// Values: no flow is there; the agent is looking whether one is left; there may be some.
    pub const NONE: u32 = 0;
    pub const DOUBTED: u32 = 1;
    pub const SOME: u32 = 2;
}

/// Key of the maps `fragments` and `policy_parts`: by it all parts of a datagram are known.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Fragment {
    pub src: Addr,
    pub dst: Addr,
    pub id: u32,
    pub protocol: u32,
}

/// Value of the maps `fragments` and `policy_parts`: what only a datagram's first part has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ports {
    pub sport: Port,
    pub dport: Port,
}

/// Value of the map `uplinks`, keyed by interface index: an interface that traffic from outside arrives on. Index 0 is the node as a
/// whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uplink {
    /// Source for connections that are sent on to another node; all zero when the interface has no address of the family.
    pub v4: Addr,
    pub v6: Addr,
}

/// Element of the paged per-CPU array `counters`, by Service port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub connections: u64,
    /// New connections refused or dropped for want of a backend.
    pub refused: u64,
}

const _: () = {
    assert!(size_of::<Addr>() == 16 && align_of::<Addr>() == 4);
    assert!(size_of::<Endpoint>() == 20);
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Frontend>() == 36);
    assert!(size_of::<MaglevBlock>() == 64);
    assert!(size_of::<Slot>() == 24);
    assert!(size_of::<SourceRange>() == 24);
    assert!(size_of::<Peer>() == 64);
    assert!(size_of::<BackendKey>() == 20);
    assert!(size_of::<DatagramKey>() == 32);
    assert!(size_of::<Datagram>() == 32);
    assert!(size_of::<AffinityKey>() == 24);
    assert!(size_of::<Affinity>() == 40);
    assert!(size_of::<Tuple>() == 40);
    assert!(size_of::<Flow>() == 64);
    assert!(size_of::<Fragment>() == 40);
    assert!(size_of::<Ports>() == 4);
    assert!(size_of::<Uplink>() == 32);
    assert!(size_of::<Counters>() == 16);
};

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn addresses_keep_their_value_and_order() {
        let sorted: std::vec::Vec<IpAddr> =
            ["0.0.0.1", "9.255.255.255", "10.0.0.2", "10.0.1.1", "192.168.0.1"].map(|ip| ip.parse().unwrap()).to_vec();
        for ip in &sorted {
            assert_eq!(Addr::from(*ip).ip(), *ip);
            assert!(Addr::from(*ip).is_v4());
        }
        assert!(sorted.iter().map(|ip| Addr::from(*ip).sort_key()).is_sorted());
        let v6: IpAddr = "fd00::1:2".parse().unwrap();
        assert_eq!(Addr::from(v6).ip(), v6);
        assert!(!Addr::from(v6).is_v4());
        assert_eq!(Addr::from(v6).node(), Addr::NODE_V6);
    }

    #[test]
    fn the_marker_names_the_version() {
        let marker = std::str::from_utf8(&MARKER).unwrap().trim_end_matches('\0');
        assert_eq!(marker, std::format!("outrigger-abi-{VERSION}"));
    }

    #[test]
    fn ports_are_swapped_once() {
        assert_eq!(Port::new(80).0.to_ne_bytes(), [0, 80]);
        assert_eq!(Port::new(30080).host(), 30080);
    }
}
