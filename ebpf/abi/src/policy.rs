//! What the agent and the programs that police pods tell each other. They are an object of their own, with maps and a version of
//! their own.

use crate::{Addr, Port};

/// As [`crate::VERSION`].
pub const VERSION: u32 = 1;
/// As [`crate::MARKER`].
pub const MARKER: [u8; 24] = *b"outrigger-policy-abi-1\0\0";

/// Whether a packet goes to the pod or comes from it.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    Ingress = 0,
    Egress = 1,
}

impl Direction {
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::Ingress => Self::Egress,
            Self::Egress => Self::Ingress,
        }
    }
}

/// The rule set of a direction that the pod isn't isolated in.
pub const OPEN: u32 = 0;

/// Value of the map `policed`, keyed by interface index: a pod that is isolated in some direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Since when, in nanoseconds of the coarse monotonic clock.
    pub since: u64,
    /// The addresses that it may send from; all zero when it has none of the family.
    pub v4: Addr,
    pub v6: Addr,
    /// Rule sets, or [`OPEN`].
    pub ingress: u32,
    pub egress: u32,
}

impl Pod {
    #[inline(always)]
    pub const fn rules(&self, direction: Direction) -> u32 {
        match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        }
    }

    #[inline(always)]
    pub fn has(&self, addr: &Addr) -> bool {
        *addr == if addr.is_v4() { self.v4 } else { self.v6 } && *addr != Addr([0; 4])
    }
}

/// Key of the longest-prefix map `policy_peers`: what a rule set says of an address is said by the longest prefix that has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Peer {
    /// In bits, over all that follows.
    pub prefix: u32,
    /// The rule set, and in the lowest bit the family: `::/0` has no IPv4 address.
    rules: u32,
    pub addr: Addr,
}

impl Peer {
    /// `length` counts the bits of the address' own family.
    #[inline(always)]
    pub const fn new(rules: u32, addr: Addr, length: u32) -> Self {
        let v4 = addr.is_v4();
        Self { prefix: 32 + length + if v4 { 96 } else { 0 }, rules: rules << 1 | !v4 as u32, addr }
    }

    /// For looking one address up.
    #[inline(always)]
    pub const fn exact(rules: u32, addr: Addr) -> Self {
        Self { prefix: 160, rules: rules << 1 | !addr.is_v4() as u32, addr }
    }

    #[inline(always)]
    pub const fn rules(&self) -> u32 {
        self.rules >> 1
    }

    /// What the kernel compares, as words.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 5] {
        let Addr([a, b, c, d]) = self.addr;
        [self.rules, a, b, c, d]
    }
}

/// Values of the map `policy_peers`; other ones are port sets.
pub mod ports {
    /// Nothing, as behind an `except`.
    pub const NONE: u32 = 0;
    /// Every protocol and port.
    pub const ALL: u32 = 1;
    pub const FIRST_SET: u32 = 2;
}

/// Key of the longest-prefix map `policy_ports`: the ports of a set, as prefixes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortKey {
    /// In bits, over all that follows.
    pub prefix: u32,
    pub ports: u32,
    pub protocol: u8,
    pub zero: u8,
    pub port: Port,
}

impl PortKey {
    /// The ports that have their first `length` bits in common with `port`.
    #[inline(always)]
    pub const fn new(ports: u32, protocol: u8, port: Port, length: u32) -> Self {
        Self { prefix: 48 + length, ports, protocol, zero: 0, port }
    }

    /// What the kernel compares, as words.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 2] {
        let [a, b] = self.port.0.to_ne_bytes();
        [self.ports, u32::from_ne_bytes([self.protocol, self.zero, a, b])]
    }
}

/// Key of the map `policy_opened`: a connection as the pod sees it, the same for both directions. An ICMP echo has its id for both ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Connection {
    pub interface: u32,
    pub local: Addr,
    pub remote: Addr,
    pub local_port: Port,
    pub remote_port: Port,
    pub protocol: u8,
    pub zero: [u8; 3],
}

/// Value of the map `policy_opened`: who opened the connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// When a packet of it passed last, in nanoseconds of the coarse monotonic clock.
    pub seen: u64,
    /// The [`Direction`] of the packet that opened it.
    pub direction: u32,
    pub zero: u32,
}

/// Element of the per-CPU map `policy_drops`, keyed by interface index: packets that were dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    pub ingress: u64,
    pub egress: u64,
}

const _: () = {
    assert!(size_of::<Pod>() == 48);
    assert!(size_of::<Peer>() == 24);
    assert!(size_of::<PortKey>() == 12);
    assert!(size_of::<Connection>() == 44);
    assert!(size_of::<Opened>() == 16);
    assert!(size_of::<Drops>() == 16);
};

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn the_marker_names_the_version() {
        let marker = std::str::from_utf8(&MARKER).unwrap().trim_end_matches('\0');
        assert_eq!(marker, std::format!("outrigger-policy-abi-{VERSION}"));
    }

    #[test]
    fn families_have_prefixes_of_their_own() {
        let v4 = Peer::new(7, Addr::from(core::net::Ipv4Addr::UNSPECIFIED), 0);
        let v6 = Peer::new(7, Addr::from(core::net::Ipv6Addr::UNSPECIFIED), 0);
        assert_eq!((v4.prefix, v6.prefix, v4.rules(), v6.rules()), (128, 32, 7, 7));
        assert_ne!(v4.words()[0], v6.words()[0]);
    }
}
