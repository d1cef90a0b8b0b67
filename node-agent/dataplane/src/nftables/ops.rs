//! The vocabulary of the table: its sets, their elements, the rules that are made as they are needed. Shown as nft would show them.
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use outrigger_desired::{Family, Protocol};

/// How the table's name begins; a number that grows with each rebuild follows.
pub(super) const TABLE: &str = "outrigger-proxy";
/// The bit that asks for masquerading; kube-proxy's own, so that others' rules which know it go on working.
pub(super) const MASQUERADE_MARK: u32 = 0x4000;

/// What a frontend is looked up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum By {
    /// Address, protocol and port.
    Address,
    /// Protocol and port, at any of the node's addresses.
    Port,
}

/// What there is to know about a frontend, each in a set of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Fact {
    /// With a slot: an endpoint.
    Endpoints,
    /// The same for clients that stick, as the endpoint's number.
    Choices,
    /// With its seconds: clients stick to their endpoints.
    Sticky,
    /// With a client: the number of the endpoint that it had last. Filled by the kernel.
    Affinity,
    /// The node and its pods are led to other endpoints (policy Local).
    Split,
    /// Everybody is masqueraded.
    Masquerade,
    /// The node's own connections are.
    MasqueradeNode,
    /// What is refused or dropped before it is translated.
    NoEndpoints,
}

/// For whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Whom {
    All,
    /// The node and its pods, where a frontend is split.
    Inside,
}

/// The table's sets and maps; there is one of each per family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Set {
    /// Addresses of Services inside the cluster.
    ClusterIps,
    /// Endpoints on this node, as source and destination: a pod that was sent back to itself.
    Hairpin,
    Frontends,
    NodePorts,
    HostPorts,
    Of(Fact, By, Whom),
    /// Endpoints that clients stick to, by number.
    Numbered,
    /// Load balancer addresses with loadBalancerSourceRanges.
    Firewall,
    /// Who may connect to them.
    Allowed,
}

impl Set {
    pub fn all() -> impl Iterator<Item = Self> {
        use Fact::{Affinity, Choices, Endpoints, Masquerade, MasqueradeNode, NoEndpoints, Split, Sticky};
        let of = [Affinity, Masquerade, MasqueradeNode, NoEndpoints, Split].map(|fact| (fact, Whom::All)).into_iter();
        let of = of.chain([Choices, Endpoints, Sticky].into_iter().flat_map(|fact| [(fact, Whom::All), (fact, Whom::Inside)]));
        let of = of.flat_map(|(fact, whom)| [By::Address, By::Port].map(|by| Self::Of(fact, by, whom)));
        let others = [
            Self::ClusterIps,
            Self::Hairpin,
            Self::Frontends,
            Self::NodePorts,
            Self::HostPorts,
            Self::Numbered,
            Self::Firewall,
            Self::Allowed,
        ];
        others.into_iter().chain(of)
    }

    pub fn name(self, family: Family) -> String {
        let (prefix, stem, suffix) = match self {
            Self::ClusterIps => ("", "cluster-ips", ""),
            Self::Hairpin => ("", "hairpin", ""),
            Self::Frontends => ("", "frontends", ""),
            Self::NodePorts => ("", "node-ports", ""),
            Self::HostPorts => ("", "host-ports", ""),
            Self::Numbered => ("", "numbered", ""),
            Self::Firewall => ("", "firewall", ""),
            Self::Allowed => ("", "allowed", ""),
            Self::Of(fact, by, whom) => {
                let stem = match fact {
                    Fact::Endpoints => "endpoints",
                    Fact::Choices => "choices",
                    Fact::Sticky => "sticky",
                    Fact::Affinity => "affinity",
                    Fact::Split => "split",
                    Fact::Masquerade => "masquerade",
                    Fact::MasqueradeNode => "masquerade-node",
                    Fact::NoEndpoints => "no-endpoints",
                };
                (if by == By::Port { "port-" } else { "" }, stem, if whom == Whom::Inside { "-inside" } else { "" })
            }
        };
        format!("{prefix}{stem}{suffix}{}", digit(family))
    }

    /// Its declaration in nft's language.
    pub fn declaration(self, family: Family) -> String {
        let ip = match family {
            Family::V4 => "ipv4_addr",
            Family::V6 => "ipv6_addr",
        };
        let (by_address, by_port) = (format!("{ip} . inet_proto . inet_service"), "inet_proto . inet_service");
        let name = self.name(family);
        match self {
            Self::ClusterIps => format!("set {name} {{ type {ip}; }}"),
            Self::Hairpin => format!("set {name} {{ type {ip} . {ip}; }}"),
            Self::Frontends | Self::Firewall => format!("set {name} {{ type {by_address}; }}"),
            Self::NodePorts | Self::HostPorts => format!("set {name} {{ type {by_port}; }}"),
            Self::Allowed => format!("set {name} {{ type {by_address} . {ip}; flags interval; }}"),
            Self::Numbered => format!("map {name} {{ type mark : {ip} . inet_service; }}"),
            Self::Of(fact, by, _) => {
                let key = if by == By::Address { &*by_address } else { by_port };
                match fact {
                    Fact::Endpoints => format!("map {name} {{ type {key} . mark : {ip} . inet_service; }}"),
                    Fact::Choices => format!("map {name} {{ type {key} . mark : mark; }}"),
                    Fact::Sticky => format!("set {name} {{ type {key} . mark; }}"),
                    // Full, it lets no more clients stick.
                    Fact::Affinity => format!("map {name} {{ type {ip} . {key} : mark; flags dynamic,timeout; size 1048576; }}"),
                    Fact::NoEndpoints => format!("map {name} {{ type {key} : verdict; }}"),
                    Fact::Split | Fact::Masquerade | Fact::MasqueradeNode => format!("set {name} {{ type {key}; }}"),
                }
            }
        }
    }
}

/// What a frontend is found by; without an address at any of the node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Dial {
    pub ip: Option<IpAddr>,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Key {
    Ip(IpAddr),
    /// The same address twice.
    Twice(IpAddr),
    Frontend(Dial),
    /// With a slot, or with seconds.
    With(Dial, u32),
    /// With who may connect.
    Allowed(Dial, IpNet),
    Number(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Value {
    Goto(&'static str),
    Endpoint(IpAddr, u16),
    Number(u32),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Element {
    pub set: Set,
    pub family: Family,
    pub key: Key,
    /// Only in maps.
    pub value: Option<Value>,
}

/// How a connection is translated: a rule for each number of endpoints, since that has to stand in the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Rule {
    /// To any of the frontend's endpoints, for frontends with this many slots.
    Spread { slots: u32 },
    /// To the endpoint that the client had within so many seconds, as long as it is there.
    Recall { seconds: u32 },
    /// As `Spread`, and it sticks.
    Stick { seconds: u32, slots: u32 },
}

/// Where the slots of a frontend begin: those with another number of slots have none there, so their rules pass it on.
pub(super) fn first_slot(slots: u32) -> u32 {
    slots << 16
}

/// A chain that such rules stand in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Chain {
    pub family: Family,
    pub by: By,
    pub whom: Whom,
}

impl Chain {
    pub fn all(family: Family) -> [Self; 4] {
        let all = [(By::Address, Whom::All), (By::Address, Whom::Inside), (By::Port, Whom::All), (By::Port, Whom::Inside)];
        all.map(|(by, whom)| Self { family, by, whom })
    }

    pub fn name(self) -> String {
        let stem = match (self.by, self.whom) {
            (By::Address, Whom::All) => "to",
            (By::Address, Whom::Inside) => "to-inside",
            (By::Port, Whom::All) => "to-port",
            (By::Port, Whom::Inside) => "to-port-inside",
        };
        format!("{stem}{}", digit(self.family))
    }

    pub fn set(self, fact: Fact) -> Set {
        // A client keeps its endpoint whichever way it came.
        Set::Of(fact, self.by, if fact == Fact::Affinity { Whom::All } else { self.whom })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Delete(Element),
    Add(Element),
    AddRule(Family, Rule),
}

pub(super) fn digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

pub(super) fn ip_word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn proto_word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

impl fmt::Display for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(ip) = self.ip {
            write!(f, "{ip} . ")?;
        }
        write!(f, "{} . {}", proto_word(self.protocol), self.port)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Twice(ip) => write!(f, "{ip} . {ip}"),
            Self::Frontend(dial) => dial.fmt(f),
            Self::With(dial, number) => write!(f, "{dial} . {number:#x}"),
            Self::Allowed(dial, net) => write!(f, "{dial} . {net}"),
            Self::Number(number) => write!(f, "{number:#x}"),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {{ {}", self.set.name(self.family), self.key)?;
        match self.value {
            None => {}
            Some(Value::Goto(chain)) => write!(f, " : goto {chain}")?,
            Some(Value::Endpoint(ip, port)) => write!(f, " : {ip} . {port}")?,
            Some(Value::Number(number)) => write!(f, " : {number:#x}")?,
        }
        f.write_str(" }")
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delete(element) => write!(f, "delete element {element}"),
            Self::Add(element) => write!(f, "add element {element}"),
            Self::AddRule(family, Rule::Spread { slots }) => write!(f, "spread{} over {slots}", digit(*family)),
            Self::AddRule(family, Rule::Recall { seconds }) => write!(f, "recall{} for {seconds}s", digit(*family)),
            Self::AddRule(family, Rule::Stick { seconds, slots }) => write!(f, "stick{} over {slots} for {seconds}s", digit(*family)),
        }
    }
}
