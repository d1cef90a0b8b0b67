//! Rules put together: for each prefix that a rule names, all that holds there.
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use ipnet::IpNet;

use super::read::{Direction, Peer, Rule, merged};
use super::state::{Cluster, NamedPort};
use super::{PortRange, Ports, Rules};
use crate::names::Protocol;

/// Where rules begin and cease to hold, by prefix.
#[derive(Default)]
struct Mark {
    /// Blocks, by number.
    opened: Vec<usize>,
    closed: Vec<usize>,
    /// What one pod's address is granted beside the blocks that it is in.
    own: Vec<Ports>,
}

#[derive(Default)]
struct Marks {
    by_prefix: BTreeMap<IpNet, Mark>,
    /// Each block's ports.
    blocks: Vec<Ports>,
}

/// What `rules`, all of policies in `namespace`, allow together. `own` are the isolated pod's named ports.
pub(super) fn compile<'a>(
    cluster: &Cluster,
    namespace: &str,
    direction: Direction,
    own: &[NamedPort],
    rules: impl Iterator<Item = &'a Rule>,
) -> Rules {
    let mut marks = Marks::default();
    for rule in rules {
        let (ports, on_peers) = match direction {
            Direction::Ingress => (resolved(rule, own), false),
            Direction::Egress => (rule.ports.clone(), !rule.named.is_empty()),
        };
        for peer in &rule.peers {
            match peer {
                Peer::Pods { namespaces, pods } => cluster.for_each_selected(namespace, namespaces.as_ref(), pods, |pod| {
                    let ports = if on_peers { resolved(rule, &pod.ports) } else { ports.clone() };
                    pod.addresses.iter().for_each(|address| marks.grant(*address, ports.clone()));
                }),
                Peer::Block(block) => {
                    let number = marks.blocks.len();
                    marks.blocks.push(ports.clone());
                    marks.by_prefix.entry(block.net).or_default().opened.push(number);
                    block.except.iter().for_each(|except| marks.by_prefix.entry(*except).or_default().closed.push(number));
                    if on_peers {
                        cluster.for_each_address(|address, pod| {
                            if block.contains(&IpNet::from(address)) {
                                marks.grant(address, Ports::Only(merged(numbers(&rule.named, &pod.ports).collect()).into()));
                            }
                        });
                    }
                }
            }
        }
    }
    marks.sweep()
}

fn numbers<'a>(named: &'a [(Protocol, String)], ports: &'a [NamedPort]) -> impl Iterator<Item = PortRange> + 'a {
    named.iter().flat_map(move |(protocol, name)| {
        let is = move |port: &&NamedPort| port.protocol == *protocol && *port.name == **name;
        ports.iter().filter(is).map(|port| PortRange { protocol: port.protocol, first: port.number, last: port.number })
    })
}

/// The rule's ports where the traffic ends at a pod with these named ports.
fn resolved(rule: &Rule, ports: &[NamedPort]) -> Ports {
    match &rule.ports {
        Ports::Only(fixed) if !rule.named.is_empty() => {
            Ports::Only(merged(fixed.iter().copied().chain(numbers(&rule.named, ports)).collect()).into())
        }
        ports => ports.clone(),
    }
}

/// A prefix on the way to the one in hand.
struct Level {
    net: IpNet,
    /// The blocks that hold here.
    blocks: Rc<[usize]>,
    ports: Ports,
}

impl Marks {
    fn grant(&mut self, address: IpAddr, ports: Ports) {
        self.by_prefix.entry(IpNet::from(address)).or_default().own.push(ports);
    }

    /// Prefixes come in the order of a tree walk: what covers one has come before it and is still on the stack. A prefix
    /// that says the same as the one around it is left out.
    fn sweep(self) -> Rules {
        let mut rules = Rules::default();
        let mut shared = HashMap::new();
        let mut stack: Vec<Level> = Vec::new();
        let (nobody, nothing) = (Rc::from([]), Ports::Only(Arc::from([])));
        for (net, mark) in self.by_prefix {
            while stack.last().is_some_and(|level| !level.net.contains(&net)) {
                stack.pop();
            }
            let (around, inherited) = stack.last().map_or((&nobody, &nothing), |level| (&level.blocks, &level.ports));
            let blocks = if mark.opened.is_empty() && mark.closed.is_empty() {
                around.clone()
            } else {
                around.iter().filter(|block| !mark.closed.contains(block)).chain(&mark.opened).copied().collect()
            };
            let ports = union(blocks.iter().map(|block| &self.blocks[*block]).chain(&mark.own), &mut shared);
            if ports != *inherited {
                rules.peers.insert(net, ports.clone());
            }
            stack.push(Level { net, blocks, ports });
        }
        rules
    }
}

fn union<'a>(all: impl Iterator<Item = &'a Ports>, shared: &mut HashMap<Vec<PortRange>, Ports>) -> Ports {
    let mut ranges = Vec::new();
    for ports in all {
        match ports {
            Ports::All => return Ports::All,
            Ports::Only(some) => ranges.extend_from_slice(some),
        }
    }
    let ranges = merged(ranges);
    if let Some(known) = shared.get(&ranges) {
        return known.clone();
    }
    let ports = Ports::Only(ranges.as_slice().into());
    shared.insert(ranges, ports.clone());
    ports
}
