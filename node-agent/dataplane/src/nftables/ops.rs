//! The vocabulary of a transaction: every step that the Service path takes in its table, and its text in nft's language.
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use outrigger_desired::{Endpoint, Family, Protocol};

pub(super) const TABLE: &str = "outrigger-proxy";
/// The bit that asks for masquerading; kube-proxy's own, so that others' rules which know it go on working.
pub(super) const MASQUERADE_MARK: u32 = 0x4000;

pub(super) type Name = Arc<str>;

/// The table's fixed sets and maps; there is one of each per family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Set {
    /// Addresses of Services inside the cluster.
    ClusterIps,
    /// Endpoints on this node, as source and destination: a pod that was sent back to itself.
    Hairpin,
    ServiceIps,
    NodePorts,
    HostPorts,
    /// What is refused or dropped before it is translated.
    NoEndpoints,
    NoEndpointPorts,
    /// Load balancer addresses with loadBalancerSourceRanges.
    Firewall,
}

impl Set {
    pub const ALL: [Self; 8] = [
        Self::ClusterIps,
        Self::Hairpin,
        Self::ServiceIps,
        Self::NodePorts,
        Self::HostPorts,
        Self::NoEndpoints,
        Self::NoEndpointPorts,
        Self::Firewall,
    ];

    pub fn name(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::ClusterIps, Family::V4) => "cluster-ips4",
            (Self::ClusterIps, Family::V6) => "cluster-ips6",
            (Self::Hairpin, Family::V4) => "hairpin4",
            (Self::Hairpin, Family::V6) => "hairpin6",
            (Self::ServiceIps, Family::V4) => "service-ips4",
            (Self::ServiceIps, Family::V6) => "service-ips6",
            (Self::NodePorts, Family::V4) => "node-ports4",
            (Self::NodePorts, Family::V6) => "node-ports6",
            (Self::HostPorts, Family::V4) => "host-ports4",
            (Self::HostPorts, Family::V6) => "host-ports6",
            (Self::NoEndpoints, Family::V4) => "no-endpoints4",
            (Self::NoEndpoints, Family::V6) => "no-endpoints6",
            (Self::NoEndpointPorts, Family::V4) => "no-endpoint-ports4",
            (Self::NoEndpointPorts, Family::V6) => "no-endpoint-ports6",
            (Self::Firewall, Family::V4) => "firewall4",
            (Self::Firewall, Family::V6) => "firewall6",
        }
    }

    /// Its declaration in nft's language.
    pub fn declaration(self, family: Family) -> String {
        let address = match family {
            Family::V4 => "ipv4_addr",
            Family::V6 => "ipv6_addr",
        };
        let name = self.name(family);
        match self {
            Self::ClusterIps => format!("set {name} {{ type {address}; }}"),
            Self::Hairpin => format!("set {name} {{ type {address} . {address}; }}"),
            Self::NodePorts | Self::HostPorts | Self::NoEndpointPorts => {
                format!("map {name} {{ type inet_proto . inet_service : verdict; }}")
            }
            Self::ServiceIps | Self::NoEndpoints | Self::Firewall => {
                format!("map {name} {{ type {address} . inet_proto . inet_service : verdict; }}")
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Key {
    Ip(IpAddr),
    /// The same address twice.
    Twice(IpAddr),
    Ports(Protocol, u16),
    Frontend(IpAddr, Protocol, u16),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Goto(Name),
    Drop,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub set: Set,
    pub family: Family,
    pub key: Key,
    /// Only in maps.
    pub verdict: Option<Verdict>,
}

/// The rules that per-Service chains are made of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Rule {
    MarkAlways,
    MarkFromNode,
    GotoFromPods(Family, Name),
    GotoFromPodInterfaces(Name),
    GotoFromNode(Name),
    /// To one of the endpoints, by chance.
    Dnat(Protocol, Arc<[Endpoint]>),
    /// To one of the chains, by chance.
    Spread(Arc<[Name]>),
    /// A client that the affinity set knows goes to its endpoint's chain.
    Sticky(Family, Name, Name),
    Remember(Family, Name),
    Allow(IpNet),
    AllowFromNode,
    Drop,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Op {
    AddChain(Name),
    FlushChain(Name),
    DeleteChain(Name),
    AddRule(Name, Rule),
    AddAffinitySet { name: Name, family: Family, seconds: u64 },
    DeleteSet(Name),
    AddElement(Element),
    DeleteElement(Element),
}

fn ip_word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

pub(super) fn proto_word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Twice(ip) => write!(f, "{ip} . {ip}"),
            Self::Ports(protocol, port) => write!(f, "{} . {port}", proto_word(*protocol)),
            Self::Frontend(ip, protocol, port) => write!(f, "{ip} . {} . {port}", proto_word(*protocol)),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Drop => f.write_str("drop"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MarkAlways => write!(f, "meta mark set meta mark | {MASQUERADE_MARK:#x}"),
            Self::MarkFromNode => write!(f, "fib saddr type local meta mark set meta mark | {MASQUERADE_MARK:#x}"),
            Self::GotoFromPods(family, chain) => write!(f, "{} saddr @cluster-cidrs{} goto {chain}", ip_word(*family), digit(*family)),
            Self::GotoFromPodInterfaces(chain) => write!(f, "iifname @pod-interfaces goto {chain}"),
            Self::GotoFromNode(chain) => write!(f, "fib saddr type local goto {chain}"),
            Self::Dnat(protocol, endpoints) => dnat(f, *protocol, endpoints),
            Self::Spread(chains) => {
                write!(f, "numgen random mod {} vmap {{ ", chains.len())?;
                for (index, chain) in chains.iter().enumerate() {
                    write!(f, "{}{index} : goto {chain}", if index == 0 { "" } else { ", " })?;
                }
                f.write_str(" }")
            }
            Self::Sticky(family, set, chain) => write!(f, "{} saddr @{set} goto {chain}", ip_word(*family)),
            Self::Remember(family, set) => write!(f, "update @{set} {{ {} saddr }}", ip_word(*family)),
            Self::Allow(range) => write!(f, "{} saddr {range} return", ip_word(Family::of(range.addr()))),
            Self::AllowFromNode => f.write_str("fib saddr type local return"),
            Self::Drop => f.write_str("drop"),
        }
    }
}

fn dnat(f: &mut fmt::Formatter<'_>, protocol: Protocol, endpoints: &[Endpoint]) -> fmt::Result {
    let family = endpoints.first().map_or(Family::V4, |endpoint| Family::of(endpoint.ip));
    write!(f, "meta l4proto {} dnat {} ", proto_word(protocol), ip_word(family))?;
    if let [only] = endpoints {
        return write!(f, "to {}", SocketAddr::new(only.ip, only.port));
    }
    write!(f, "addr . port to numgen random mod {} map {{ ", endpoints.len())?;
    for (index, endpoint) in endpoints.iter().enumerate() {
        write!(f, "{}{index} : {} . {}", if index == 0 { "" } else { ", " }, endpoint.ip, endpoint.port)?;
    }
    f.write_str(" }")
}

pub(super) fn digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddChain(name) => write!(f, "add chain inet {TABLE} {name}"),
            Self::FlushChain(name) => write!(f, "flush chain inet {TABLE} {name}"),
            Self::DeleteChain(name) => write!(f, "delete chain inet {TABLE} {name}"),
            Self::AddRule(chain, rule) => write!(f, "add rule inet {TABLE} {chain} {rule}"),
            Self::AddAffinitySet { name, family, seconds } => {
                let address = if *family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
                write!(f, "add set inet {TABLE} {name} {{ type {address}; flags dynamic,timeout; timeout {seconds}s; }}")
            }
            Self::DeleteSet(name) => write!(f, "delete set inet {TABLE} {name}"),
            Self::AddElement(element) => element_text(f, "add", element, true),
            Self::DeleteElement(element) => element_text(f, "delete", element, false),
        }
    }
}

fn element_text(f: &mut fmt::Formatter<'_>, verb: &str, element: &Element, value: bool) -> fmt::Result {
    write!(f, "{verb} element inet {TABLE} {} {{ {}", element.set.name(element.family), element.key)?;
    match &element.verdict {
        Some(verdict) if value => write!(f, " : {verdict} }}"),
        _ => f.write_str(" }"),
    }
}
