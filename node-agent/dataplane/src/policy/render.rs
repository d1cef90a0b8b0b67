//! The policies as nft text: what takes a table from one state to the next in one transaction. Pure; the model of what the kernel has is
//! kept here and never asked for.
//!
//! ```text
//! forward ─ from (by interface) ─▶ from-N: only own addresses, answers, its rules ─▶ to
//! output  ─ what the node sends in others' names: from (by address) ─▶ …             │
//!                                    to (by interface) ─▶ to-N: answers, its rules ◀─┘
//! ```
//! Rules leave a chain by allowing (`goto to`, or `accept`); what comes back is dropped and counted.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use outrigger_abi::policy::Direction;
use outrigger_desired::policy::{PodPolicy, PolicyTable, PortRange, Ports, Rules};

pub(super) const TABLE: &str = "outrigger-policy";

/// The table without pods. `unknown` is how interfaces of pods begin.
pub(super) fn skeleton(unknown: Option<&str>) -> String {
    let closed = unknown.map_or(String::new(), |prefix| {
        format!(
            "		iifname \"{prefix}*\" iifname != @pods drop
		oifname \"{prefix}*\" oifname != @pods drop
"
        )
    });
    format!(
        "add table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
	set pods {{ type ifname; }}
	map from {{ type ifname : verdict; }}
	map from4 {{ type ipv4_addr : verdict; }}
	map from6 {{ type ipv6_addr : verdict; }}
	map to {{ type ifname : verdict; }}
	chain answers {{
		ct direction reply ct state established,related accept
		meta l4proto {{ icmp, ipv6-icmp }} ct state related accept
	}}
	chain to {{
		oifname vmap @to
		accept
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
{closed}		iifname vmap @from
		goto to
	}}
	chain output {{
		type filter hook output priority filter; policy accept;
		fib saddr type local accept
		icmpv6 type {{ nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect }} accept
		ip saddr vmap @from4
		ip6 saddr vmap @from6
		goto to
	}}
}}
"
    )
}

const DIRECTIONS: [(Direction, &str, &str); 2] = [(Direction::Ingress, "in", "accept"), (Direction::Egress, "out", "goto to")];

type RuleSet = (Arc<Rules>, bool);

/// What the kernel has.
#[derive(Debug, Default)]
pub(super) struct Model {
    pods: BTreeMap<Arc<str>, (u32, PodPolicy)>,
    rules: HashMap<RuleSet, u32>,
    ports: HashMap<Arc<[PortRange]>, u32>,
    /// Numbers are never given again.
    last: u32,
}

/// One transaction's commands. What others refer to comes first and goes last.
#[derive(Default)]
struct Steps {
    adds: String,
    pods: String,
    removes: Vec<String>,
}

impl Model {
    pub fn rule_sets(&self) -> usize {
        self.rules.keys().map(|(rules, _)| rules).collect::<std::collections::HashSet<_>>().len()
    }

    /// The numbers of isolated pods.
    pub fn isolated(&self) -> impl Iterator<Item = (&Arc<str>, u32)> {
        self.pods.iter().filter(|(_, (_, pod))| is_isolated(pod)).map(|(sandbox, (number, _))| (sandbox, *number))
    }

    pub fn apply(&mut self, table: &PolicyTable) -> String {
        let mut steps = Steps::default();
        let gone: Vec<Arc<str>> = self.pods.keys().filter(|sandbox| !table.pods.contains_key(*sandbox)).cloned().collect();
        for sandbox in gone {
            if let Some((number, pod)) = self.pods.remove(&sandbox) {
                leave(&mut steps, number, &pod, &PodPolicy::default());
            }
        }
        for (sandbox, pod) in &table.pods {
            let old = self.pods.get(sandbox);
            if old.is_some_and(|(_, old)| old == pod) {
                continue;
            }
            let number = match old {
                Some((number, old)) => {
                    let number = *number;
                    leave(&mut steps, number, old, pod);
                    number
                }
                None => self.next(),
            };
            self.enter(&mut steps, number, pod);
            self.pods.insert(sandbox.clone(), (number, pod.clone()));
        }
        self.forget(&mut steps);
        let Steps { adds, pods, removes } = steps;
        adds + &pods + &removes.concat()
    }

    fn next(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    fn enter(&mut self, steps: &mut Steps, number: u32, pod: &PodPolicy) {
        for (map, key, verdict) in elements(number, pod) {
            let _ = writeln!(steps.pods, "add element inet {TABLE} {map} {{ {key}{verdict} }}");
        }
        for (direction, word, _) in DIRECTIONS {
            let Some(rules) = rules_of(pod, direction) else { continue };
            let set = self.rule_set(steps, rules, direction);
            let (chain, end) = if direction == Direction::Ingress { ("to", "iifname") } else { ("from", "oifname") };
            let drop = format!("counter name drops-{number}-{word} drop");
            let _ = writeln!(steps.adds, "add counter inet {TABLE} drops-{number}-{word}\nadd chain inet {TABLE} {chain}-{number}");
            // Emptied and filled again in one step, when it is there.
            let _ = writeln!(steps.adds, "flush chain inet {TABLE} {chain}-{number}");
            let mut rule = |text: &str| _ = writeln!(steps.adds, "add rule inet {TABLE} {chain}-{number} {text}");
            if direction == Direction::Egress {
                for (v4, family, ip) in [(true, "ipv4", "ip"), (false, "ipv6", "ip6")] {
                    let own: Vec<String> = pod.addresses.iter().filter(|ip| ip.is_ipv4() == v4).map(IpAddr::to_string).collect();
                    let others = if own.is_empty() { String::new() } else { format!("{ip} saddr != {{ {} }} ", own.join(", ")) };
                    rule(&format!("meta nfproto {family} {others}{drop}"));
                }
            }
            rule(&format!("{end} \"{}\" accept", pod.interface));
            rule("jump answers");
            rule(&format!("jump rules-{set}"));
            rule(&drop);
        }
    }

    /// The number of a chain that returns when the rules don't allow a packet.
    fn rule_set(&mut self, steps: &mut Steps, rules: &Arc<Rules>, direction: Direction) -> u32 {
        let key = (rules.clone(), direction == Direction::Egress);
        if let Some(number) = self.rules.get(&key) {
            return *number;
        }
        let number = self.next();
        let (_, word, allow) = DIRECTIONS[direction as usize];
        let end = if direction == Direction::Ingress { "saddr" } else { "daddr" };
        let mut chain = format!("add chain inet {TABLE} rules-{number}\n");
        for (v4, digit, ip) in [(true, '4', "ip"), (false, '6', "ip6")] {
            let mut elements = Vec::new();
            for (first, last, allowed) in intervals(rules, v4) {
                let verdict = match allowed {
                    Ports::All => allow.into(),
                    Ports::Only(ranges) => format!("goto ports-{}-{word}", self.port_set(steps, ranges)),
                };
                let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
                elements.push(format!("{range} : {verdict}"));
            }
            if !elements.is_empty() {
                let _ = writeln!(
                    steps.adds,
                    "add map inet {TABLE} peers-{number}-{digit} {{ type ipv{digit}_addr : verdict; flags interval; elements = {{ {} }}; }}",
                    elements.join(", ")
                );
                let _ = writeln!(chain, "add rule inet {TABLE} rules-{number} {ip} {end} vmap @peers-{number}-{digit}");
            }
        }
        steps.adds.push_str(&chain);
        self.rules.insert(key, number);
        number
    }

    fn port_set(&mut self, steps: &mut Steps, ranges: &Arc<[PortRange]>) -> u32 {
        if let Some(number) = self.ports.get(ranges) {
            return *number;
        }
        let number = self.next();
        let port = |range: &PortRange| format!("{} . {}-{}", range.protocol.to_string().to_lowercase(), range.first, range.last);
        let elements: Vec<String> = ranges.iter().map(port).collect();
        let _ = writeln!(
            steps.adds,
            "add set inet {TABLE} ports-{number} {{ type inet_proto . inet_service; flags interval; elements = {{ {} }}; }}",
            elements.join(", ")
        );
        for (_, word, allow) in DIRECTIONS {
            let _ = writeln!(
                steps.adds,
                "add chain inet {TABLE} ports-{number}-{word}
add rule inet {TABLE} ports-{number}-{word} meta l4proto . th dport @ports-{number} {allow}"
            );
        }
        self.ports.insert(ranges.clone(), number);
        number
    }

    /// Takes away what no pod uses any more.
    fn forget(&mut self, steps: &mut Steps) {
        let pods = || self.pods.values().map(|(_, pod)| pod);
        let used: BTreeSet<u32> = DIRECTIONS
            .iter()
            .flat_map(|(direction, ..)| {
                pods().filter_map(|pod| Some((rules_of(pod, *direction)?.clone(), *direction == Direction::Egress)))
            })
            .filter_map(|key| self.rules.get(&key).copied())
            .collect();
        let (mut chains, mut maps) = (BTreeSet::new(), BTreeSet::new());
        self.rules.retain(|(rules, _), number| {
            let keep = used.contains(number);
            if !keep {
                chains.insert(*number);
                let both = [(true, '4'), (false, '6')];
                maps.extend(both.into_iter().filter(|(v4, _)| !intervals(rules, *v4).is_empty()).map(|(_, digit)| (*number, digit)));
            }
            keep
        });
        let kept = self.rules.keys().flat_map(|(rules, _)| rules.peers.values());
        let kept: std::collections::HashSet<_> =
            kept.filter_map(|ports| if let Ports::Only(ranges) = ports { Some(ranges) } else { None }).collect();
        let mut ports = BTreeSet::new();
        self.ports.retain(|ranges, number| {
            let keep = kept.contains(ranges);
            if !keep {
                ports.insert(*number);
            }
            keep
        });
        let removes = &mut steps.removes;
        removes.extend(chains.iter().map(|number| delete_chain(&format!("rules-{number}"))));
        removes.extend(maps.iter().map(|(number, digit)| {
            format!("flush map inet {TABLE} peers-{number}-{digit}\ndelete map inet {TABLE} peers-{number}-{digit}\n")
        }));
        for number in ports {
            removes.extend(DIRECTIONS.map(|(_, word, _)| delete_chain(&format!("ports-{number}-{word}"))));
            removes.push(format!("delete set inet {TABLE} ports-{number}\n"));
        }
    }
}

/// Takes a pod's elements away, and the chains that it won't have any more.
fn leave(steps: &mut Steps, number: u32, pod: &PodPolicy, new: &PodPolicy) {
    for (map, key, _) in elements(number, pod) {
        let _ = writeln!(steps.pods, "delete element inet {TABLE} {map} {{ {key} }}");
    }
    for (direction, word, _) in DIRECTIONS {
        if rules_of(pod, direction).is_some() && rules_of(new, direction).is_none() {
            let chain = if direction == Direction::Ingress { "to" } else { "from" };
            let counter = format!("delete counter inet {TABLE} drops-{number}-{word}\n");
            steps.removes.push(delete_chain(&format!("{chain}-{number}")) + &counter);
        }
    }
}

fn delete_chain(name: &str) -> String {
    format!("flush chain inet {TABLE} {name}\ndelete chain inet {TABLE} {name}\n")
}

fn is_isolated(pod: &PodPolicy) -> bool {
    pod.ingress.is_some() || pod.egress.is_some()
}

fn rules_of(pod: &PodPolicy, direction: Direction) -> Option<&Arc<Rules>> {
    match direction {
        Direction::Ingress => pod.ingress.as_ref(),
        Direction::Egress => pod.egress.as_ref(),
    }
}

/// By what a packet comes to the pod's chains: map, key and verdict.
fn elements(number: u32, pod: &PodPolicy) -> Vec<(&'static str, String, String)> {
    let interface = format!("\"{}\"", pod.interface);
    let mut found = vec![("pods", interface.clone(), String::new())];
    if pod.ingress.is_some() {
        found.push(("to", interface.clone(), format!(" : goto to-{number}")));
    }
    if pod.egress.is_some() {
        found.push(("from", interface, format!(" : goto from-{number}")));
        let map = |ip: &IpAddr| if ip.is_ipv4() { "from4" } else { "from6" };
        found.extend(pod.addresses.iter().map(|ip| (map(ip), ip.to_string(), format!(" : goto from-{number}"))));
    }
    found
}

/// The rules' prefixes as intervals that don't overlap: each address has what the longest prefix says. Where nothing is allowed there
/// is none.
fn intervals(rules: &Rules, v4: bool) -> Vec<(IpAddr, IpAddr, &Ports)> {
    let mut nets: Vec<(u128, u128, &Ports)> = rules
        .peers
        .iter()
        .filter(|(net, _)| net.addr().is_ipv4() == v4)
        .map(|(net, ports)| (bits(net.network()), bits(net.broadcast()), ports))
        .collect();
    // The longer of two prefixes that begin together comes later.
    nets.sort_by_key(|(first, last, _)| (*first, u128::MAX - last));
    let mut found: Vec<(u128, u128, &Ports)> = Vec::new();
    let mut take = |first: u128, last: u128, ports| match found.last_mut() {
        Some((_, end, same)) if *same == ports && end.checked_add(1) == Some(first) => *end = last,
        _ => found.push((first, last, ports)),
    };
    // Prefixes that the current place is in, and where the innermost has not been written yet.
    let mut around: Vec<(u128, &Ports)> = Vec::new();
    let mut place = Some(0);
    for (first, last, ports) in nets {
        while let Some((end, outer)) = around.pop_if(|(end, _)| *end < first) {
            close(&mut take, &mut place, end, outer);
        }
        if let (Some((_, outer)), Some(from)) = (around.last(), place)
            && from < first
        {
            take(from, first - 1, *outer);
        }
        place = Some(first);
        around.push((last, ports));
    }
    while let Some((end, outer)) = around.pop() {
        close(&mut take, &mut place, end, outer);
    }
    let is_something = |ports: &Ports| !matches!(ports, Ports::Only(ranges) if ranges.is_empty());
    found
        .into_iter()
        .filter(|(.., ports)| is_something(ports))
        .map(|(first, last, ports)| (address(first, v4), address(last, v4), ports))
        .collect()
}

/// Writes the rest of a prefix.
fn close<'a>(take: &mut impl FnMut(u128, u128, &'a Ports), place: &mut Option<u128>, end: u128, ports: &'a Ports) {
    if let Some(from) = *place
        && from <= end
    {
        take(from, end, ports);
        *place = end.checked_add(1);
    }
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn address(bits: u128, v4: bool) -> IpAddr {
    if v4 { Ipv4Addr::from_bits(bits as u32).into() } else { Ipv6Addr::from_bits(bits).into() }
}

#[cfg(test)]
#[path = "render_tests.rs"]
mod tests;
