//! The table as map elements, and the steps from one state to the next. Pure.
//!
//! A set of rules, or of ports, never changes: other content is another set, under another number. So a packet sees the old rules or
//! the new ones, each whole, by which number its pod has.
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use ipnet::IpNet;
use outrigger_abi::policy::{OPEN, Peer, PortKey, ports};
use outrigger_abi::{Addr, Port};
use outrigger_desired::policy::{PolicyTable, PortRange, Ports, Rules};

#[derive(Debug)]
pub(super) struct Plan {
    rules: HashMap<Arc<Rules>, u32>,
    ports: HashMap<Arc<[PortRange]>, u32>,
    last_rules: u32,
    last_ports: u32,
}

/// In the order in which they have to be taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Steps {
    pub ports: Vec<(PortKey, u32)>,
    pub peers: Vec<(Peer, u32)>,
    /// The rule sets of each isolated pod, by sandbox: ingress and egress.
    pub pods: BTreeMap<Arc<str>, (u32, u32)>,
    /// What no pod uses any more. Short prefixes come first: what has lost one of them is refused.
    pub stale_peers: Vec<Peer>,
    pub stale_ports: Vec<PortKey>,
}

impl Plan {
    /// With numbers above those that are in use.
    pub fn above(peers: &[Peer], ports: &[PortKey]) -> Self {
        Self {
            rules: HashMap::new(),
            ports: HashMap::new(),
            last_rules: peers.iter().map(Peer::rules).max().unwrap_or(OPEN),
            last_ports: ports.iter().map(|key| key.ports).max().unwrap_or(ports::FIRST_SET - 1),
        }
    }

    pub fn rule_sets(&self) -> usize {
        self.rules.len()
    }

    pub fn apply(&mut self, table: &PolicyTable) -> Steps {
        let mut steps = Steps::default();
        let mut used = HashSet::new();
        for (sandbox, pod) in &table.pods {
            let mut number = |rules: &Option<Arc<Rules>>| match rules {
                None => OPEN,
                Some(rules) => {
                    let number = self.number(rules, &mut steps);
                    used.insert(number);
                    number
                }
            };
            let (ingress, egress) = (number(&pod.ingress), number(&pod.egress));
            if (ingress, egress) != (OPEN, OPEN) {
                steps.pods.insert(sandbox.clone(), (ingress, egress));
            }
        }
        self.forget(&used, &mut steps);
        steps
    }

    fn number(&mut self, rules: &Arc<Rules>, steps: &mut Steps) -> u32 {
        if let Some(number) = self.rules.get(rules) {
            return *number;
        }
        self.last_rules += 1;
        let number = self.last_rules;
        for (net, allowed) in &rules.peers {
            let value = match allowed {
                Ports::All => ports::ALL,
                Ports::Only(ranges) if ranges.is_empty() => ports::NONE,
                Ports::Only(ranges) => self.port_set(ranges, steps),
            };
            steps.peers.push((peer(number, net), value));
        }
        self.rules.insert(rules.clone(), number);
        number
    }

    fn port_set(&mut self, ranges: &Arc<[PortRange]>, steps: &mut Steps) -> u32 {
        if let Some(number) = self.ports.get(ranges) {
            return *number;
        }
        self.last_ports += 1;
        let number = self.last_ports;
        steps.ports.extend(port_keys(number, ranges).map(|key| (key, 1)));
        self.ports.insert(ranges.clone(), number);
        number
    }

    fn forget(&mut self, used: &HashSet<u32>, steps: &mut Steps) {
        let mut stale = Vec::new();
        self.rules.retain(|rules, number| {
            let keep = used.contains(number);
            if !keep {
                stale.extend(rules.peers.keys().map(|net| peer(*number, net)));
            }
            keep
        });
        if stale.is_empty() {
            return;
        }
        stale.sort_unstable_by_key(|key| key.prefix);
        steps.stale_peers = stale;
        let ports = self.rules.keys().flat_map(|rules| rules.peers.values());
        let used: HashSet<&Arc<[PortRange]>> =
            ports.filter_map(|ports| if let Ports::Only(ranges) = ports { Some(ranges) } else { None }).collect();
        self.ports.retain(|ranges, number| {
            let keep = used.contains(ranges);
            if !keep {
                steps.stale_ports.extend(port_keys(*number, ranges));
            }
            keep
        });
    }
}

fn peer(rules: u32, net: &IpNet) -> Peer {
    Peer::new(rules, Addr::from(net.network()), u32::from(net.prefix_len()))
}

fn port_keys(number: u32, ranges: &[PortRange]) -> impl Iterator<Item = PortKey> {
    ranges.iter().flat_map(move |range| {
        let key = move |(port, length)| PortKey::new(number, range.protocol.number(), Port::new(port), length);
        prefixes(range.first, range.last).into_iter().map(key)
    })
}

/// A run of ports as the fewest prefixes: the first port of each, and how many bits its ports have in common.
fn prefixes(first: u16, last: u16) -> Vec<(u16, u32)> {
    let (mut first, end) = (u32::from(first), u32::from(last) + 1);
    let mut found = Vec::new();
    while first < end {
        // As large as it may be where it begins, and no larger than what is left.
        let bits = first.trailing_zeros().min(16).min((end - first).ilog2());
        found.push((first as u16, 16 - bits));
        first += 1 << bits;
    }
    found
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
