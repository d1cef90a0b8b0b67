//! What NetworkPolicies (networking.k8s.io/v1) mean for this node's pods: an inert value, without I/O.
//!
//! [`Policies`] takes in what is watched and keeps a [`PolicyTable`], which is all that an enforcer has to know.
mod compile;
mod read;
mod selector;
mod state;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::names::Protocol;

pub use state::{Change, LocalPod, NamedPort, Pod, Policies};

/// A run of ports of one protocol, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRange {
    pub protocol: Protocol,
    pub first: u16,
    pub last: u16,
}

/// What a peer may be spoken to on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ports {
    /// Every protocol and port, ICMP included.
    All,
    /// Sorted, without overlaps. Empty means nothing at all, as behind an `except`.
    Only(Arc<[PortRange]>),
}

/// One direction of one isolated pod's traffic: what is named here is allowed, all else is not.
///
/// An address is judged by the longest prefix that has it; each prefix's ports are already the union of all rules that
/// hold for it, those of shorter prefixes included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rules {
    pub peers: BTreeMap<IpNet, Ports>,
}

/// One pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodPolicy {
    pub addresses: Vec<IpAddr>,
    /// The node's end of the pod's link.
    pub interface: String,
    /// `None`: the pod isn't isolated in this direction.
    pub ingress: Option<Arc<Rules>>,
    pub egress: Option<Arc<Rules>>,
}

/// All of this node's pods that have a network of their own, by sandbox. Equal rules are one `Arc` where they can be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyTable {
    pub pods: BTreeMap<Arc<str>, PodPolicy>,
}
