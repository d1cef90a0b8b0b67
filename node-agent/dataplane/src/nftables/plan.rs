//! The desired table as elements and rules, and the steps from one state to the next. Pure; the model of what the kernel has is
//! kept here and never asked for.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use outrigger_desired::{
    Address, Delta, Endpoint, Entry, Family, Frontend, Kind, Masquerade, NoEndpoints, Protocol, ServicePortName, Table,
};

use super::ops::{By, Dial, Element, Fact, Key, Op, Rule, Set, Value, Whom, first_slot};

/// Up to this many endpoints each gets one slot; more share a power of two, so that there are few different numbers of slots.
const EXACT: usize = 64;
const MAX_SLOTS: usize = 1 << 14;

/// An endpoint that clients stick to.
type Held = (ServicePortName, Protocol, IpAddr, u16);

#[derive(Debug)]
struct Number {
    value: u32,
    users: u32,
}

/// What the kernel has, as far as the next transaction has to know it.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// Endpoints that clients stick to. A number is never given to another: clients may come back with it.
    numbers: HashMap<Held, Number>,
    last_number: u32,
    /// Elements that several frontends ask for.
    shared: HashMap<(Set, Key), u32>,
    rules: BTreeSet<(Family, Rule)>,
}

/// The steps of one transaction, in the order in which they have to come.
#[derive(Debug, Default)]
struct Steps {
    deletes: BTreeMap<(Set, Family, Key), Option<Value>>,
    rules: Vec<Op>,
    adds: BTreeMap<(Set, Family, Key), Option<Value>>,
}

impl Steps {
    fn add(&mut self, Element { set, family, key, value }: Element) {
        // What goes and comes back unchanged stays.
        match self.deletes.get(&(set, family, key)) {
            Some(old) if *old == value => _ = self.deletes.remove(&(set, family, key)),
            _ => _ = self.adds.insert((set, family, key), value),
        }
    }

    fn delete(&mut self, Element { set, family, key, value }: Element) {
        match self.adds.remove(&(set, family, key)) {
            Some(new) if new != value => {
                self.adds.insert((set, family, key), new);
                self.deletes.insert((set, family, key), value);
            }
            Some(_) => {}
            None => _ = self.deletes.insert((set, family, key), value),
        }
    }

    fn in_order(self) -> Vec<Op> {
        let element = |((set, family, key), value)| Element { set, family, key, value };
        let deletes = self.deletes.into_iter().map(element).map(Op::Delete);
        deletes.chain(self.rules).chain(self.adds.into_iter().map(element).map(Op::Add)).collect()
    }
}

impl Model {
    /// The transaction that takes the kernel to `table`. A full delta must be applied to a fresh model, and to an empty table.
    pub fn plan(&mut self, table: &Table, delta: &Delta, node_ips: &[IpAddr]) -> Vec<Op> {
        let mut steps = Steps::default();
        for removal in &delta.removals {
            let old = self.elements(removal.frontend, &removal.previous, node_ips);
            old.into_iter().for_each(|element| steps.delete(element));
            self.release(removal.frontend, &removal.previous, &mut steps);
        }
        for upsert in &delta.upserts {
            if let Some(entry) = table.get(&upsert.frontend) {
                self.put(upsert.frontend, entry, upsert.previous.as_deref().filter(|_| !delta.full), node_ips, &mut steps);
            }
        }
        steps.in_order()
    }

    /// The rules that the table has.
    pub fn rules(&self) -> &BTreeSet<(Family, Rule)> {
        &self.rules
    }

    fn put(&mut self, frontend: Frontend, entry: &Entry, previous: Option<&Entry>, node_ips: &[IpAddr], steps: &mut Steps) {
        // The new is claimed before the old is released, so that what both have stays.
        self.claim(frontend, entry, steps);
        let new = self.elements(frontend, entry, node_ips);
        let old = previous.map(|previous| self.elements(frontend, previous, node_ips)).unwrap_or_default();
        old.difference(&new).for_each(|element| steps.delete(element.clone()));
        new.difference(&old).for_each(|element| steps.add(element.clone()));
        if let Some(previous) = previous {
            self.release(frontend, previous, steps);
        }
    }

    fn claim(&mut self, frontend: Frontend, entry: &Entry, steps: &mut Steps) {
        let family = frontend.address.family();
        for (set, key) in shared(frontend, entry) {
            let users = self.shared.entry((set, key)).or_default();
            *users += 1;
            if *users == 1 {
                steps.add(Element { set, family, key, value: None });
            }
        }
        for rule in lists(entry).flat_map(|(_, list)| rules(entry, list)) {
            if self.rules.insert((family, rule)) {
                steps.rules.push(Op::AddRule(family, rule));
            }
        }
        for held in held(frontend, entry) {
            let (ip, port) = (held.2, held.3);
            let last = &mut self.last_number;
            let number = self.numbers.entry(held).or_insert_with(|| {
                *last += 1;
                Number { value: *last, users: 0 }
            });
            number.users += 1;
            if number.users == 1 {
                steps.add(numbered(family, number.value, ip, port));
            }
        }
    }

    fn release(&mut self, frontend: Frontend, entry: &Entry, steps: &mut Steps) {
        let family = frontend.address.family();
        for (set, key) in shared(frontend, entry) {
            if let Some(users) = self.shared.get_mut(&(set, key)) {
                *users -= 1;
                if *users == 0 {
                    self.shared.remove(&(set, key));
                    steps.delete(Element { set, family, key, value: None });
                }
            }
        }
        for held in held(frontend, entry) {
            let Some(number) = self.numbers.get_mut(&held) else { continue };
            number.users -= 1;
            if number.users == 0 {
                steps.delete(numbered(family, number.value, held.2, held.3));
                self.numbers.remove(&held);
            }
        }
    }

    /// What is the frontend's alone. Its endpoints' numbers are held while this is called.
    fn elements(&self, frontend: Frontend, entry: &Entry, node_ips: &[IpAddr]) -> BTreeSet<Element> {
        let family = frontend.address.family();
        let (by, dial) = dial(frontend);
        let mut elements = BTreeSet::new();
        let mut add = |set, key, value| _ = elements.insert(Element { set, family, key, value });
        if is_served(entry) {
            add(entrance(frontend, entry), Key::Frontend(dial), None);
            match entry.masquerade {
                Masquerade::Always => add(Set::Of(Fact::Masquerade, by, Whom::All), Key::Frontend(dial), None),
                Masquerade::FromNode => add(Set::Of(Fact::MasqueradeNode, by, Whom::All), Key::Frontend(dial), None),
                Masquerade::OffCluster => {} // by the skeleton, for all ClusterIPs at once
            }
            if entry.short_circuit.is_some() {
                add(Set::Of(Fact::Split, by, Whom::All), Key::Frontend(dial), None);
            }
        }
        for (whom, list) in lists(entry) {
            let slots = slots(list.len());
            for slot in 0..slots {
                let Endpoint { ip, port, .. } = list[slot % list.len()];
                let key = Key::With(dial, first_slot(slots as u32) + slot as u32);
                match entry.affinity {
                    None => add(Set::Of(Fact::Endpoints, by, whom), key, Some(Value::Endpoint(ip, port))),
                    Some(_) => {
                        let number = self.numbers.get(&(entry.service.clone(), frontend.protocol, ip, port));
                        add(Set::Of(Fact::Choices, by, whom), key, number.map(|number| Value::Number(number.value)));
                    }
                }
            }
            if let Some(seconds) = seconds(entry) {
                add(Set::Of(Fact::Sticky, by, whom), Key::With(dial, seconds), None);
            }
        }
        if entry.backends.is_empty() {
            let verdict = match (entry.no_endpoints, &entry.short_circuit) {
                (_, Some(_)) => Value::Goto("drop-outside"),
                (NoEndpoints::Reject, None) => Value::Goto("no-endpoint"),
                (NoEndpoints::Drop, None) => Value::Goto("not-local"),
            };
            add(Set::Of(Fact::NoEndpoints, by, Whom::All), Key::Frontend(dial), Some(verdict));
        }
        if let (Some(ip), false) = (dial.ip, entry.admits_all()) {
            add(Set::Firewall, Key::Frontend(dial), None);
            allowed(entry, ip, node_ips).into_iter().for_each(|net| add(Set::Allowed, Key::Allowed(dial, net), None));
        }
        elements
    }
}

pub(super) fn dial(frontend: Frontend) -> (By, Dial) {
    let (by, ip) = match frontend.address {
        Address::Ip(ip) => (By::Address, Some(ip)),
        Address::Node(_) => (By::Port, None),
    };
    (by, Dial { ip, protocol: frontend.protocol, port: frontend.port })
}

fn is_served(entry: &Entry) -> bool {
    !entry.backends.is_empty() || entry.short_circuit.is_some()
}

fn entrance(frontend: Frontend, entry: &Entry) -> Set {
    match (frontend.address, entry.kind) {
        (Address::Ip(_), _) => Set::Frontends,
        (Address::Node(_), Kind::HostPort) => Set::HostPorts,
        (Address::Node(_), _) => Set::NodePorts,
    }
}

/// The lists of endpoints that the frontend leads to.
fn lists(entry: &Entry) -> impl Iterator<Item = (Whom, &[Endpoint])> {
    let lists = [(Whom::All, Some(&entry.backends)), (Whom::Inside, entry.short_circuit.as_ref())];
    lists.into_iter().filter_map(|(whom, list)| Some((whom, &**list?))).filter(|(_, list)| !list.is_empty())
}

fn seconds(entry: &Entry) -> Option<u32> {
    entry.affinity.map(|time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX))
}

/// The endpoints that clients of the frontend stick to.
fn held(frontend: Frontend, entry: &Entry) -> BTreeSet<Held> {
    let sticky = lists(entry).filter(|_| entry.affinity.is_some());
    sticky.flat_map(|(_, list)| list.iter().map(|to| (entry.service.clone(), frontend.protocol, to.ip, to.port))).collect()
}

fn numbered(family: Family, number: u32, ip: IpAddr, port: u16) -> Element {
    Element { set: Set::Numbered, family, key: Key::Number(number), value: Some(Value::Endpoint(ip, port)) }
}

fn slots(endpoints: usize) -> usize {
    if endpoints <= EXACT { endpoints } else { (endpoints * 16).next_power_of_two().min(MAX_SLOTS) }
}

fn rules(entry: &Entry, list: &[Endpoint]) -> Vec<Rule> {
    let slots = slots(list.len()) as u32;
    match seconds(entry) {
        None => vec![Rule::Spread { slots }],
        Some(seconds) => vec![Rule::Recall { seconds }, Rule::Stick { seconds, slots }],
    }
}

fn shared(frontend: Frontend, entry: &Entry) -> Vec<(Set, Key)> {
    let mut shared = Vec::new();
    if let (Kind::ClusterIp, Address::Ip(ip)) = (entry.kind, frontend.address) {
        shared.push((Set::ClusterIps, Key::Ip(ip)));
    }
    if is_served(entry) {
        let mut local: Vec<IpAddr> = entry.alive().filter(|endpoint| endpoint.local).map(|endpoint| endpoint.ip).collect();
        local.sort();
        local.dedup();
        shared.extend(local.into_iter().map(|ip| (Set::Hairpin, Key::Twice(ip))));
    }
    shared
}

/// Who may connect, without overlaps. Where the node has the load balancer's address itself, its own connections come from that.
fn allowed(entry: &Entry, ip: IpAddr, node_ips: &[IpAddr]) -> Vec<IpNet> {
    let own = entry.admits_node(node_ips).then(|| IpNet::from(ip));
    let nets = entry.source_ranges.iter().copied().chain(own);
    let (mut four, mut six): (Vec<Ipv4Net>, Vec<Ipv6Net>) = (Vec::new(), Vec::new());
    for net in nets {
        match net {
            IpNet::V4(net) => four.push(net),
            IpNet::V6(net) => six.push(net),
        }
    }
    let four = Ipv4Net::aggregate(&four).into_iter().map(IpNet::V4);
    four.chain(Ipv6Net::aggregate(&six).into_iter().map(IpNet::V6)).collect()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
