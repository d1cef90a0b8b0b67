//! The desired table as nftables objects: which chains, rules and elements each frontend needs, and the steps from one state
//! to the next. Pure; the model of what the kernel has is kept here and never asked for.
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use outrigger_desired::{Address, Delta, Endpoint, Entry, Family, Frontend, Kind, Masquerade, NoEndpoints, Table};

use crate::config::PodInterfaces;

use super::ops::{Element, Key, MASQUERADE_MARK, Name, Op, Rule, Set, TABLE, Verdict, digit, proto_word};

/// What of the node shapes the table.
#[derive(Clone, Debug, Default)]
pub(super) struct Surroundings {
    pub cluster_cidrs: Vec<IpNet>,
    pub pod_interfaces: Option<PodInterfaces>,
    pub masquerade_all: bool,
    pub nodeport_addresses: Vec<IpNet>,
}

/// The part of the table that doesn't depend on Services, as nft text. It replaces a table that a former agent left, in the same
/// transaction; connections that are established live on in conntrack.
pub(super) fn skeleton(around: &Surroundings) -> String {
    let mut text = format!("add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    for family in Family::ALL {
        for set in Set::ALL {
            text.push_str(&format!("\t{}\n", set.declaration(family)));
        }
        text.push_str(&interval_set("cluster-cidrs", family, &around.cluster_cidrs));
        text.push_str(&interval_set("nodeport-cidrs", family, &around.nodeport_addresses));
    }
    let interfaces = match &around.pod_interfaces {
        Some(PodInterfaces::Bridge(name)) => format!(" elements = {{ \"{name}\" }}"),
        Some(PodInterfaces::Prefix(prefix)) => format!(" elements = {{ \"{prefix}*\" }}"),
        None => String::new(),
    };
    text.push_str(&format!("\tset pod-interfaces {{ type ifname; flags interval;{interfaces} }}\n"));
    let restricted = !around.nodeport_addresses.is_empty();
    let nodeport4 = if restricted { "ip daddr @nodeport-cidrs4 " } else { "" };
    let nodeport6 = if restricted { "ip6 daddr @nodeport-cidrs6 " } else { "" };
    let mark = format!("meta mark set meta mark | {MASQUERADE_MARK:#x}");
    let mut off_cluster = String::new();
    for (family, ip) in [(Family::V4, "ip"), (Family::V6, "ip6")] {
        let digit = digit(family);
        if around.masquerade_all {
            let _ = writeln!(off_cluster, "\t\t{ip} daddr @cluster-ips{digit} {mark}");
        } else if around.pod_interfaces.is_some() {
            let _ = writeln!(off_cluster, "\t\tiifname != @pod-interfaces {ip} daddr @cluster-ips{digit} {mark}");
        // Without the family's range nobody can be told apart, so nobody is masqueraded.
        } else if around.cluster_cidrs.iter().any(|net| Family::of(net.addr()) == family) {
            let _ = writeln!(off_cluster, "\t\t{ip} saddr != @cluster-cidrs{digit} {ip} daddr @cluster-ips{digit} {mark}");
        }
    }
    // Rejecting in prerouting (Linux 5.9) needs no route to the Service's address. TCP packets that begin no connection are never
    // translated: they belong to a connection that is known to conntrack, or to one that has to be refused.
    text.push_str(&format!(
        "	chain refuse {{
		meta l4proto tcp reject with tcp reset
		reject with icmpx type port-unreachable
	}}
	chain drop-outside {{
		fib saddr type local return
		ip saddr @cluster-cidrs4 return
		ip6 saddr @cluster-cidrs6 return
		iifname @pod-interfaces return
		drop
	}}
	chain check {{
		ip daddr . meta l4proto . th dport vmap @firewall4
		ip6 daddr . meta l4proto . th dport vmap @firewall6
		ip daddr . meta l4proto . th dport vmap @no-endpoints4
		ip6 daddr . meta l4proto . th dport vmap @no-endpoints6
		fib daddr type local {nodeport4}meta nfproto ipv4 meta l4proto . th dport vmap @no-endpoint-ports4
		fib daddr type local {nodeport6}meta nfproto ipv6 meta l4proto . th dport vmap @no-endpoint-ports6
	}}
	chain unknown-port {{
		ip daddr @cluster-ips4 fib daddr type != local goto refuse
		ip6 daddr @cluster-ips6 fib daddr type != local goto refuse
	}}
	chain services {{
		meta l4proto tcp tcp flags & (fin | syn | rst | ack) != syn return
{off_cluster}		ip daddr . meta l4proto . th dport vmap @service-ips4
		ip6 daddr . meta l4proto . th dport vmap @service-ips6
		ip daddr != 127.0.0.0/8 fib daddr type local meta l4proto . th dport vmap @host-ports4
		ip6 daddr != ::1 fib daddr type local meta l4proto . th dport vmap @host-ports6
		ip daddr != 127.0.0.0/8 {nodeport4}fib daddr type local meta l4proto . th dport vmap @node-ports4
		ip6 daddr != ::1 {nodeport6}fib daddr type local meta l4proto . th dport vmap @node-ports6
	}}
	chain filter-prerouting {{
		type filter hook prerouting priority dstnat - 10; policy accept;
		ct state new jump check
	}}
	chain filter-output {{
		type filter hook output priority -110; policy accept;
		ct state new jump check
	}}
	chain filter-prerouting-after {{
		type filter hook prerouting priority dstnat + 10; policy accept;
		ct state new jump unknown-port
	}}
	chain filter-output-after {{
		type filter hook output priority -90; policy accept;
		ct state new jump unknown-port
	}}
{NAT}"
    ));
    text.push_str("}\n");
    text
}

const NAT: &str = "	chain nat-prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		jump services
	}
	chain nat-output {
		type nat hook output priority -100; policy accept;
		jump services
	}
	chain nat-postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x4000 == 0x4000 meta mark set meta mark ^ 0x4000 masquerade fully-random
		ct status dnat ip saddr . ip daddr @hairpin4 masquerade fully-random
		ct status dnat ip6 saddr . ip6 daddr @hairpin6 masquerade fully-random
	}
";

/// What is left when another backend takes over. Translation of established connections needs some nat chain on each hook, and
/// connection tracking needs some rule that asks for it: the kernel takes it away with the last such rule.
pub(super) fn handover() -> String {
    format!(
        "add table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
	chain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}
	chain nat-output {{ type nat hook output priority -100; policy accept; }}
	chain nat-input {{ type nat hook input priority 100; policy accept; }}
	chain nat-postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ct state established accept
	}}
}}
"
    )
}

fn interval_set(name: &str, family: Family, nets: &[IpNet]) -> String {
    let (digit, kind) = match family {
        Family::V4 => ('4', "ipv4_addr"),
        Family::V6 => ('6', "ipv6_addr"),
    };
    let members: Vec<String> = nets.iter().filter(|net| Family::of(net.addr()) == family).map(|net| net.trunc().to_string()).collect();
    let elements = if members.is_empty() { String::new() } else { format!(" elements = {{ {} }}", members.join(", ")) };
    format!("\tset {name}{digit} {{ type {kind}; flags interval; auto-merge;{elements} }}\n")
}

/// A chain that the kernel has, and how many frontends lead to it.
#[derive(Clone, Copy, Debug)]
struct ChainState {
    content: u64,
    users: u32,
}

/// What the kernel has, as far as the next transaction has to know it.
#[derive(Debug, Default)]
pub(super) struct Model {
    chains: HashMap<Name, ChainState>,
    affinity_sets: HashMap<Name, u32>,
    /// Elements that several frontends ask for.
    shared: HashMap<(Set, Key), u32>,
    /// Chains that were emptied but may still be referenced for a moment: before Linux 6.2 a chain can't be deleted in the transaction
    /// that deletes the element which points at it.
    stale: Vec<Name>,
}

/// What one frontend needs.
#[derive(Debug, Default)]
struct Needs {
    elements: Vec<Element>,
    shared: Vec<(Set, Key)>,
    chains: Vec<(Name, Vec<Rule>)>,
    affinity_sets: Vec<(Name, Family, u64)>,
}

/// The steps of one transaction, in the order in which the kernel wants them.
#[derive(Debug, Default)]
struct Steps {
    removed_elements: Vec<Op>,
    sets: Vec<Op>,
    chains: Vec<Op>,
    rules: Vec<Op>,
    elements: Vec<Op>,
    last: Vec<Op>,
}

impl Model {
    /// The transaction that takes the kernel to `table`. A full delta must be applied to a fresh model, after the skeleton.
    pub fn plan(&mut self, table: &Table, delta: &Delta) -> Vec<Op> {
        let mut steps = Steps::default();
        let mut unused: BTreeMap<Name, ()> = BTreeMap::new();
        let mut unused_sets: BTreeMap<Name, ()> = BTreeMap::new();
        for removal in &delta.removals {
            let old = needs(removal.frontend, &removal.previous);
            self.release(&old, &mut unused, &mut unused_sets, &mut steps);
            steps.removed_elements.extend(old.elements.into_iter().map(Op::DeleteElement));
        }
        for upsert in &delta.upserts {
            let Some(entry) = table.get(&upsert.frontend) else { continue };
            let new = needs(upsert.frontend, entry);
            let old = upsert.previous.as_ref().filter(|_| !delta.full).map(|previous| needs(upsert.frontend, previous));
            // The new needs are claimed before the old are released, so that what both have stays.
            self.claim(&new, &mut steps);
            let old_elements = old.map(|old| {
                self.release(&old, &mut unused, &mut unused_sets, &mut steps);
                old.elements
            });
            let old_elements = old_elements.unwrap_or_default();
            steps.elements.extend(new.elements.iter().filter(|element| !old_elements.contains(element)).cloned().map(Op::AddElement));
            let stale = old_elements.into_iter().filter(|element| !new.elements.contains(element));
            steps.removed_elements.extend(stale.map(Op::DeleteElement));
        }
        self.retire(unused, unused_sets, &mut steps);
        steps.in_order()
    }

    /// Chains that can be deleted now, in a transaction of their own; see [`Model::tidied`].
    pub fn leftovers(&self) -> Vec<Op> {
        self.stale.iter().cloned().map(Op::DeleteChain).collect()
    }

    pub fn tidied(&mut self) {
        self.stale.clear();
    }

    fn claim(&mut self, needs: &Needs, steps: &mut Steps) {
        for (set, key) in &needs.shared {
            let users = self.shared.entry((*set, *key)).or_default();
            *users += 1;
            if *users == 1 {
                steps.elements.push(Op::AddElement(shared_element(*set, *key)));
            }
        }
        for (name, family, seconds) in &needs.affinity_sets {
            let users = self.affinity_sets.entry(name.clone()).or_default();
            *users += 1;
            if *users == 1 {
                steps.sets.push(Op::AddAffinitySet { name: name.clone(), family: *family, seconds: *seconds });
            }
        }
        for (name, rules) in &needs.chains {
            let content = fingerprint(rules);
            match self.chains.get_mut(name) {
                Some(known) => {
                    known.users += 1;
                    if known.content == content {
                        continue;
                    }
                    known.content = content;
                    steps.rules.push(Op::FlushChain(name.clone()));
                }
                None => {
                    self.chains.insert(name.clone(), ChainState { content, users: 1 });
                    // A stale chain of the same name is still there, empty.
                    let before = self.stale.len();
                    self.stale.retain(|stale| stale != name);
                    if self.stale.len() == before {
                        steps.chains.push(Op::AddChain(name.clone()));
                    }
                }
            }
            steps.rules.extend(rules.iter().cloned().map(|rule| Op::AddRule(name.clone(), rule)));
        }
    }

    fn release(&mut self, needs: &Needs, unused: &mut BTreeMap<Name, ()>, unused_sets: &mut BTreeMap<Name, ()>, steps: &mut Steps) {
        for (set, key) in &needs.shared {
            if let Some(users) = self.shared.get_mut(&(*set, *key)) {
                *users -= 1;
                if *users == 0 {
                    self.shared.remove(&(*set, *key));
                    // Removed after additions: another frontend of this transaction may claim it anew.
                    steps.last.push(Op::DeleteElement(shared_element(*set, *key)));
                }
            }
        }
        for (name, _, _) in &needs.affinity_sets {
            if let Some(users) = self.affinity_sets.get_mut(name) {
                *users = users.saturating_sub(1);
                if *users == 0 {
                    unused_sets.insert(name.clone(), ());
                }
            }
        }
        for (name, _) in &needs.chains {
            if let Some(chain) = self.chains.get_mut(name) {
                chain.users = chain.users.saturating_sub(1);
                if chain.users == 0 {
                    unused.insert(name.clone(), ());
                }
            }
        }
    }

    /// What nothing leads to any more at the end of the transaction.
    fn retire(&mut self, unused: BTreeMap<Name, ()>, unused_sets: BTreeMap<Name, ()>, steps: &mut Steps) {
        for name in unused.into_keys() {
            if self.chains.get(&name).is_some_and(|chain| chain.users == 0) {
                self.chains.remove(&name);
                steps.last.push(Op::FlushChain(name.clone()));
                self.stale.push(name);
            }
        }
        for name in unused_sets.into_keys() {
            if self.affinity_sets.get(&name) == Some(&0) {
                self.affinity_sets.remove(&name);
                steps.last.push(Op::DeleteSet(name));
            }
        }
    }
}

impl Steps {
    fn in_order(mut self) -> Vec<Op> {
        // A shared element that went and came back within the transaction is added twice and removed once: keep it.
        let mut ops = self.removed_elements;
        ops.append(&mut self.sets);
        ops.append(&mut self.chains);
        ops.append(&mut self.rules);
        let (mut removed, kept): (Vec<Op>, Vec<Op>) = self.last.into_iter().partition(|op| matches!(op, Op::DeleteElement(_)));
        self.elements.retain(|op| match op {
            Op::AddElement(added) if added.verdict.is_none() => {
                let undone = removed.iter().position(|other| matches!(other, Op::DeleteElement(element) if element == added));
                undone.map(|position| removed.swap_remove(position)).is_none()
            }
            _ => true,
        });
        ops.append(&mut self.elements);
        ops.append(&mut removed);
        ops.extend(kept);
        ops
    }
}

fn shared_element(set: Set, key: Key) -> Element {
    let family = match key {
        Key::Ip(ip) | Key::Twice(ip) | Key::Frontend(ip, ..) => Family::of(ip),
        Key::Ports(..) => Family::V4,
    };
    Element { set, family, key, verdict: None }
}

fn fingerprint(rules: &[Rule]) -> u64 {
    let mut hasher = DefaultHasher::new();
    rules.hash(&mut hasher);
    hasher.finish()
}

/// `kind/namespace/name/port/protocol` and the family's digit. These parts are DNS labels, so the name is unique and legal.
fn chain_name(kind: &str, entry: &Entry, frontend: Frontend) -> String {
    let port = if entry.service.port.is_empty() { "-" } else { &entry.service.port };
    format!("{kind}/{}/{port}/{}{}", entry.service.service, proto_word(frontend.protocol), digit(frontend.address.family()))
}

fn endpoint_suffix(endpoint: &Endpoint) -> String {
    let ip = match endpoint.ip {
        IpAddr::V4(ip) => ip.to_string(),
        // Colons aren't allowed in names.
        IpAddr::V6(ip) => ip.segments().map(|segment| format!("{segment:x}")).join("."),
    };
    format!("{ip}/{}", endpoint.port)
}

fn needs(frontend: Frontend, entry: &Entry) -> Needs {
    let mut needs = Needs::default();
    let family = frontend.address.family();
    if let (Kind::ClusterIp, Address::Ip(ip)) = (entry.kind, frontend.address) {
        needs.shared.push((Set::ClusterIps, Key::Ip(ip)));
    }
    let served = !entry.backends.is_empty() || entry.short_circuit.is_some();
    if served {
        let chain = entry_chain(frontend, entry, &mut needs);
        needs.elements.push(map_element(frontend, entry, Verdict::Goto(chain)));
        let mut local: Vec<IpAddr> = entry.alive().filter(|endpoint| endpoint.local).map(|endpoint| endpoint.ip).collect();
        local.sort();
        local.dedup();
        needs.shared.extend(local.into_iter().map(|ip| (Set::Hairpin, Key::Twice(ip))));
    }
    if entry.backends.is_empty() {
        let verdict = match (entry.no_endpoints, &entry.short_circuit) {
            (_, Some(_)) => Verdict::Goto("drop-outside".into()),
            (NoEndpoints::Reject, None) => Verdict::Goto("refuse".into()),
            (NoEndpoints::Drop, None) => Verdict::Drop,
        };
        let set = if matches!(frontend.address, Address::Ip(_)) { Set::NoEndpoints } else { Set::NoEndpointPorts };
        needs.elements.push(Element { set, family, key: key(frontend), verdict: Some(verdict) });
    }
    if !entry.source_ranges.is_empty() {
        let name: Name = chain_name("fw", entry, frontend).into();
        // The load balancer's address may be local to the node, so its own connections would come from that very address.
        let mut rules = vec![Rule::AllowFromNode];
        rules.extend(entry.source_ranges.iter().copied().map(Rule::Allow));
        rules.push(Rule::Drop);
        needs.chains.push((name.clone(), rules));
        needs.elements.push(Element { set: Set::Firewall, family, key: key(frontend), verdict: Some(Verdict::Goto(name)) });
    }
    needs
}

pub(super) fn key(frontend: Frontend) -> Key {
    match frontend.address {
        Address::Ip(ip) => Key::Frontend(ip, frontend.protocol, frontend.port),
        Address::Node(_) => Key::Ports(frontend.protocol, frontend.port),
    }
}

fn map_element(frontend: Frontend, entry: &Entry, verdict: Verdict) -> Element {
    let set = match (frontend.address, entry.kind) {
        (Address::Ip(_), _) => Set::ServiceIps,
        (Address::Node(_), Kind::HostPort) => Set::HostPorts,
        (Address::Node(_), _) => Set::NodePorts,
    };
    Element { set, family: frontend.address.family(), key: key(frontend), verdict: Some(verdict) }
}

/// The chain that the frontend leads to. Frontends of a Service port that behave alike share it.
fn entry_chain(frontend: Frontend, entry: &Entry, needs: &mut Needs) -> Name {
    let family = frontend.address.family();
    let kind = match entry.kind {
        Kind::ClusterIp => "svc",
        Kind::HostPort => "host",
        _ => "ext",
    };
    let name: Name = chain_name(kind, entry, frontend).into();
    let mut rules = Vec::new();
    if let Some(cluster) = &entry.short_circuit {
        let inside: Name = chain_name("in", entry, frontend).into();
        let spread = spread(frontend, entry, cluster, needs);
        needs.chains.push((inside.clone(), spread));
        rules.push(Rule::GotoFromPods(family, inside.clone()));
        rules.push(Rule::GotoFromPodInterfaces(inside.clone()));
        rules.push(Rule::MarkFromNode);
        rules.push(Rule::GotoFromNode(inside));
    } else {
        match entry.masquerade {
            Masquerade::Always => rules.push(Rule::MarkAlways),
            Masquerade::FromNode => rules.push(Rule::MarkFromNode),
            Masquerade::OffCluster => {} // by the skeleton, for all ClusterIPs at once
        }
    }
    rules.extend(spread(frontend, entry, &entry.backends, needs));
    needs.chains.push((name.clone(), rules));
    name
}

fn spread(frontend: Frontend, entry: &Entry, endpoints: &Arc<[Endpoint]>, needs: &mut Needs) -> Vec<Rule> {
    if endpoints.is_empty() {
        return Vec::new();
    }
    let Some(affinity) = entry.affinity else { return vec![Rule::Dnat(frontend.protocol, endpoints.clone())] };
    let family = frontend.address.family();
    let seconds = affinity.as_secs();
    let (base, set_base) = (chain_name("ep", entry, frontend), chain_name(&format!("sticky{seconds}"), entry, frontend));
    let mut rules = Vec::new();
    let mut chains: Vec<Name> = Vec::new();
    for endpoint in endpoints.iter() {
        let suffix = endpoint_suffix(endpoint);
        let chain: Name = format!("{base}/{suffix}").into();
        let set: Name = format!("{set_base}/{suffix}").into();
        rules.push(Rule::Sticky(family, set.clone(), chain.clone()));
        let only = Arc::new([*endpoint]);
        let known = needs.chains.iter().any(|(name, _)| *name == chain);
        if !known {
            needs.chains.push((chain.clone(), vec![Rule::Remember(family, set.clone()), Rule::Dnat(frontend.protocol, only)]));
            needs.affinity_sets.push((set, family, seconds));
        }
        chains.push(chain);
    }
    rules.push(Rule::Spread(chains.into()));
    rules
}
