//! Where does this packet go, and why: answered from the table alone, so that it can be compared with what the kernel does.
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::names::{Family, Protocol, ServicePortName};
use crate::table::{Address, Endpoint, Frontend, Kind, Masquerade, NoEndpoints, Table};

/// What the tracer has to know of the node beside the table.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// All addresses of this node.
    pub node_ips: Vec<IpAddr>,
    /// The `--nodeport-addresses`; empty means all addresses.
    pub nodeport_addresses: Vec<IpNet>,
    /// The pods' range, when known.
    pub cluster_cidrs: Vec<IpNet>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub source: IpAddr,
    pub destination: SocketAddr,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No Service's: the packet goes where routing sends it.
    PassesBy,
    /// To one of these; the source becomes the node's where `masquerade` says so (always for a hairpin).
    To {
        backends: Vec<SocketAddr>,
        masquerade: bool,
    },
    Rejected,
    Dropped,
}

/// The verdict and, in order, the reasons that led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    pub service: Option<ServicePortName>,
    pub verdict: Verdict,
    pub reasons: Vec<String>,
}

/// Follows a new connection's first packet.
pub fn trace(table: &Table, around: &Surroundings, flow: &Flow) -> Trace {
    let mut reasons = Vec::new();
    let Some((frontend, entry)) = find(table, around, flow) else {
        let known = table.iter().any(|(frontend, _)| frontend.address == Address::Ip(flow.destination.ip()));
        reasons.push(format!("no frontend for {}/{}", flow.destination, flow.protocol));
        let verdict = if known { Verdict::Rejected } else { Verdict::PassesBy };
        if known {
            reasons.push(format!("{} is a Service's address without this port", flow.destination.ip()));
        }
        return Trace { service: None, verdict, reasons };
    };
    reasons.push(format!("{frontend} is {:?} of {}", entry.kind, entry.service));
    let from_node = around.node_ips.contains(&flow.source);
    let from_pod = around.cluster_cidrs.iter().any(|net| net.contains(&flow.source));
    let finish = |verdict, reasons| Trace { service: Some(entry.service.clone()), verdict, reasons };

    let admitted = entry.admits(flow.source) || (from_node && entry.admits_node(&around.node_ips));
    if !admitted {
        reasons.push(format!("{} is outside loadBalancerSourceRanges", flow.source));
        return finish(Verdict::Dropped, reasons);
    }
    let backends: &[Endpoint] = match &entry.short_circuit {
        Some(cluster) if from_node || from_pod => {
            reasons.push("traffic from inside ignores externalTrafficPolicy Local".into());
            cluster
        }
        _ => &entry.backends,
    };
    if backends.is_empty() {
        let (verdict, reason) = match entry.no_endpoints {
            NoEndpoints::Reject => (Verdict::Rejected, "there is no endpoint"),
            NoEndpoints::Drop => (Verdict::Dropped, "there is no endpoint on this node and the policy is Local"),
        };
        reasons.push(reason.into());
        return finish(verdict, reasons);
    }
    if let Some(timeout) = entry.affinity {
        reasons.push(format!("session affinity: the client's last choice within {} s wins", timeout.as_secs()));
    }
    let masquerade = match entry.masquerade {
        Masquerade::Always => true,
        Masquerade::FromNode => from_node,
        Masquerade::OffCluster => !around.cluster_cidrs.is_empty() && !from_pod,
    };
    if masquerade {
        reasons.push(format!("masqueraded: {:?}", entry.masquerade));
    }
    if backends.iter().any(|endpoint| endpoint.ip == flow.source) {
        reasons.push("a choice of the source itself is a hairpin and is masqueraded".into());
    }
    finish(Verdict::To { backends: backends.iter().map(Endpoint::socket).collect(), masquerade }, reasons)
}

fn find<'a>(table: &'a Table, around: &Surroundings, flow: &Flow) -> Option<(Frontend, &'a crate::table::Entry)> {
    let ip = flow.destination.ip();
    let at = |address| Frontend { address, port: flow.destination.port(), protocol: flow.protocol };
    let exact = at(Address::Ip(ip));
    if let Some(entry) = table.get(&exact) {
        return Some((exact, entry));
    }
    if !around.node_ips.contains(&ip) {
        return None;
    }
    let node = at(Address::Node(Family::of(ip)));
    let entry = table.get(&node)?;
    let selected = around.nodeport_addresses.is_empty() || around.nodeport_addresses.iter().any(|net| net.contains(&ip));
    (entry.kind == Kind::HostPort || selected).then_some((node, entry))
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::PassesBy => writeln!(f, "passes by")?,
            Verdict::Rejected => writeln!(f, "rejected")?,
            Verdict::Dropped => writeln!(f, "dropped")?,
            Verdict::To { backends, masquerade } => {
                writeln!(f, "to one of {backends:?}{}", if *masquerade { ", masqueraded" } else { "" })?
            }
        }
        self.reasons.iter().try_for_each(|reason| writeln!(f, "  {reason}"))
    }
}
