//! A NetworkPolicy read into what it says.
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::api::networking::v1::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::selector::Selector;
use super::{PortRange, Ports};
use crate::names::Protocol;

/// The directions of traffic, from the isolated pod's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Direction {
    Ingress,
    Egress,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub pods: Selector,
    /// `None`: the policy says nothing about this direction.
    ingress: Option<Box<[Rule]>>,
    egress: Option<Box<[Rule]>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub peers: Box<[Peer]>,
    pub ports: Ports,
    /// Ports that only a pod can give a number.
    pub named: Box<[(Protocol, String)]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Pods {
        /// `None`: the policy's own namespace.
        namespaces: Option<Selector>,
        pods: Selector,
    },
    Block(Block),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub net: IpNet,
    pub except: Box<[IpNet]>,
}

impl Block {
    pub fn contains(&self, net: &IpNet) -> bool {
        self.net.contains(net) && !self.except.iter().any(|except| except.contains(net))
    }
}

impl Policy {
    pub fn read(object: &NetworkPolicy) -> Option<Self> {
        let spec = object.spec.as_ref()?;
        let (ingress, egress) = (spec.ingress.as_deref().unwrap_or_default(), spec.egress.as_deref().unwrap_or_default());
        let types = spec.policy_types.as_deref().unwrap_or_default();
        let has = |name: &str| types.iter().any(|kind| kind == name);
        let ingress = (types.is_empty() || has("Ingress"))
            .then(|| ingress.iter().map(|rule| Rule::read(rule.from.as_deref(), rule.ports.as_deref())).collect());
        let egress = (has("Egress") || (types.is_empty() && !egress.is_empty()))
            .then(|| egress.iter().map(|rule| Rule::read(rule.to.as_deref(), rule.ports.as_deref())).collect());
        Some(Self { pods: Selector::read(spec.pod_selector.as_ref().unwrap_or(&Default::default())), ingress, egress })
    }

    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

impl Rule {
    /// No peers means everybody, no ports means all.
    fn read(peers: Option<&[NetworkPolicyPeer]>, ports: Option<&[NetworkPolicyPort]>) -> Self {
        let ports = ports.unwrap_or_default();
        let ranges: Vec<_> = ports.iter().filter_map(range).collect();
        let named = ports.iter().filter_map(|port| match &port.port {
            Some(IntOrString::String(name)) => Some((Protocol::parse(port.protocol.as_deref())?, name.clone())),
            _ => None,
        });
        Self {
            named: named.collect(),
            ports: if ports.is_empty() { Ports::All } else { Ports::Only(merged(ranges).into()) },
            peers: match peers.unwrap_or_default() {
                [] => everybody().into(),
                peers => peers.iter().filter_map(peer).collect(),
            },
        }
    }
}

fn everybody() -> [Peer; 2] {
    let all = [IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)), IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0))];
    all.map(|net| Peer::Block(Block { net, except: Box::default() }))
}

/// A port entry without a port means all ports of its protocol.
fn range(port: &NetworkPolicyPort) -> Option<PortRange> {
    let protocol = Protocol::parse(port.protocol.as_deref())?;
    let (first, last) = match &port.port {
        None => (0, u16::MAX),
        Some(IntOrString::Int(first)) => (u16::try_from(*first).ok()?, u16::try_from(port.end_port.unwrap_or(*first)).ok()?),
        Some(IntOrString::String(_)) => return None,
    };
    (first <= last).then_some(PortRange { protocol, first, last })
}

fn peer(peer: &NetworkPolicyPeer) -> Option<Peer> {
    match (&peer.ip_block, &peer.namespace_selector, &peer.pod_selector) {
        (Some(block), ..) => block_peer(block).map(Peer::Block),
        (None, None, None) => None,
        (None, namespaces, pods) => Some(Peer::Pods {
            namespaces: namespaces.as_ref().map(Selector::read),
            pods: Selector::read(pods.as_ref().unwrap_or(&Default::default())),
        }),
    }
}

/// A block that can't be read as a whole lets nobody in: without one of its exceptions it would let in too many.
fn block_peer(block: &IPBlock) -> Option<Block> {
    let except = block.except.iter().flatten().map(|text| net(text)).collect::<Option<_>>()?;
    Some(Block { net: net(&block.cidr)?, except })
}

/// API servers let leading zeros and bits beyond the prefix pass, and mean what stands there in decimal.
fn net(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    let plain = |octet: &str| match octet.trim_start_matches('0') {
        "" => "0".to_owned(),
        digits => digits.to_owned(),
    };
    let address = if address.contains(':') { address.to_owned() } else { address.split('.').map(plain).collect::<Vec<_>>().join(".") };
    format!("{address}/{length}").parse().ok().map(|net: IpNet| net.trunc())
}

/// Sorted, without overlaps; neighbours are one run.
pub(super) fn merged(mut ranges: Vec<PortRange>) -> Vec<PortRange> {
    ranges.sort();
    let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.protocol == range.protocol && u32::from(range.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}
