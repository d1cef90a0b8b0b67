//! Steps in, elements out: golden texts, and the model's promises under long random change.
use serde_json::json;

use super::*;
use crate::testing::{Listener, gone, service, slice};

/// A node that hears of Services, and the kernel that follows.
#[derive(Default)]
struct Node {
    listener: Listener,
    model: Model,
    elements: HashMap<(Set, Family, Key), Option<Value>>,
    rules: Vec<(Family, Rule)>,
}

impl Node {
    fn hear(&mut self, change: &outrigger_desired::Change) -> String {
        let delta = self.listener.hear(change);
        let ops = self.model.plan(&self.listener.table, &delta, &[]);
        self.transact(&ops);
        ops.iter().map(|op| format!("{op}\n")).collect()
    }

    /// What the kernel does: it refuses to delete what isn't there, and to add what is.
    fn transact(&mut self, ops: &[Op]) {
        for op in ops {
            match op.clone() {
                Op::Delete(Element { set, family, key, value }) => {
                    assert_eq!(self.elements.remove(&(set, family, key)), Some(value), "{op}");
                }
                Op::Add(Element { set, family, key, value }) => {
                    assert_eq!(self.elements.insert((set, family, key), value), None, "{op}");
                }
                Op::AddRule(family, rule) => {
                    assert!(!self.rules.contains(&(family, rule)), "{op}");
                    self.rules.push((family, rule));
                }
            }
        }
    }

    /// Where the rules lead a new connection, in the order of the slots.
    fn leads(&self, dial: Dial, by: By, whom: Whom) -> Vec<String> {
        let slots = |(_, rule): &(Family, Rule)| match rule {
            Rule::Spread { slots } => Some((Fact::Endpoints, *slots)),
            Rule::Stick { slots, .. } => Some((Fact::Choices, *slots)),
            Rule::Recall { .. } => None,
        };
        let at = |fact, slot| self.elements.get(&(Set::Of(fact, by, whom), Family::V4, Key::With(dial, slot))).copied().flatten();
        let found = self.rules.iter().filter_map(slots).find(|(fact, slots)| at(*fact, first_slot(*slots)).is_some());
        let Some((fact, slots)) = found else { return Vec::new() };
        let text = |slot| match at(fact, first_slot(slots) + slot).expect("all slots are there") {
            Value::Endpoint(ip, port) => format!("{ip}:{port}"),
            Value::Number(number) => match self.elements[&(Set::Numbered, Family::V4, Key::Number(number))] {
                Some(Value::Endpoint(ip, port)) => format!("{ip}:{port}"),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        };
        (0..slots).map(text).collect()
    }

    fn check(&self) {
        for (frontend, entry) in self.listener.table.iter() {
            let (by, dial) = dial(*frontend);
            let texts = |list: &[Endpoint]| list.iter().map(|endpoint| endpoint.socket().to_string()).collect::<Vec<_>>();
            assert_eq!(self.leads(dial, by, Whom::All), texts(&entry.backends));
            assert_eq!(self.leads(dial, by, Whom::Inside), entry.short_circuit.as_deref().map(texts).unwrap_or_default());
        }
    }
}

#[test]
fn one_services_life() {
    let mut node = Node::default();
    let steps = [
        service("web", "10.96.0.1", json!({})),
        slice("web", &["10.0.0.2"], &["10.0.1.1"]),
        slice("web", &["10.0.0.2"], &["10.0.1.2"]),
        slice("web", &[], &["10.0.1.2"]),
        gone("web"),
    ];
    let expected = [
        "add element cluster-ips4 { 10.96.0.1 }\nadd element no-endpoints4 { 10.96.0.1 . tcp . 80 : goto no-endpoint }\n",
        "delete element no-endpoints4 { 10.96.0.1 . tcp . 80 : goto no-endpoint }
spread4 over 2
add element hairpin4 { 10.0.0.2 . 10.0.0.2 }
add element frontends4 { 10.96.0.1 . tcp . 80 }
add element endpoints4 { 10.96.0.1 . tcp . 80 . 0x20000 : 10.0.0.2 . 8080 }
add element endpoints4 { 10.96.0.1 . tcp . 80 . 0x20001 : 10.0.1.1 . 8080 }
",
        "delete element endpoints4 { 10.96.0.1 . tcp . 80 . 0x20001 : 10.0.1.1 . 8080 }
add element endpoints4 { 10.96.0.1 . tcp . 80 . 0x20001 : 10.0.1.2 . 8080 }
",
        "delete element hairpin4 { 10.0.0.2 . 10.0.0.2 }
delete element endpoints4 { 10.96.0.1 . tcp . 80 . 0x20000 : 10.0.0.2 . 8080 }
delete element endpoints4 { 10.96.0.1 . tcp . 80 . 0x20001 : 10.0.1.2 . 8080 }
spread4 over 1
add element endpoints4 { 10.96.0.1 . tcp . 80 . 0x10000 : 10.0.1.2 . 8080 }
",
        "delete element cluster-ips4 { 10.96.0.1 }
delete element frontends4 { 10.96.0.1 . tcp . 80 }
delete element endpoints4 { 10.96.0.1 . tcp . 80 . 0x10000 : 10.0.1.2 . 8080 }
",
    ];
    for (step, expected) in steps.iter().zip(expected) {
        assert_eq!(node.hear(step), expected);
        node.check();
    }
    assert!(node.elements.is_empty());
}

#[test]
fn clients_stick_to_numbered_endpoints() {
    let mut node = Node::default();
    node.hear(&slice("web", &["10.0.0.2"], &["10.0.1.1"]));
    let spec = json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}],
        "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}});
    let expected = "recall4 for 60s
stick4 over 2 for 60s
add element cluster-ips4 { 10.96.0.1 }
add element hairpin4 { 10.0.0.2 . 10.0.0.2 }
add element frontends4 { 10.96.0.1 . tcp . 80 }
add element node-ports4 { tcp . 30080 }
add element choices4 { 10.96.0.1 . tcp . 80 . 0x20000 : 0x1 }
add element choices4 { 10.96.0.1 . tcp . 80 . 0x20001 : 0x2 }
add element port-choices4 { tcp . 30080 . 0x20000 : 0x1 }
add element port-choices4 { tcp . 30080 . 0x20001 : 0x2 }
add element sticky4 { 10.96.0.1 . tcp . 80 . 0x3c }
add element port-sticky4 { tcp . 30080 . 0x3c }
add element port-masquerade4 { tcp . 30080 }
add element numbered4 { 0x1 : 10.0.0.2 . 8080 }
add element numbered4 { 0x2 : 10.0.1.1 . 8080 }
";
    assert_eq!(node.hear(&service("web", "10.96.0.1", spec)), expected);
    node.check();
}

#[test]
fn policy_local_splits_clients() {
    let mut node = Node::default();
    node.hear(&slice("web", &[], &["10.0.1.1"]));
    let spec = json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]});
    node.hear(&service("web", "10.96.0.1", spec));
    node.check();
    let dial = Dial { ip: None, protocol: Protocol::Tcp, port: 30080 };
    let at = |fact| node.elements.get(&(Set::Of(fact, By::Port, Whom::All), Family::V4, Key::Frontend(dial)));
    assert_eq!(at(Fact::NoEndpoints), Some(&Some(Value::Goto("drop-outside"))));
    assert!(at(Fact::Split).is_some() && at(Fact::MasqueradeNode).is_some() && at(Fact::Masquerade).is_none());
}

#[test]
fn source_ranges_are_merged_and_let_the_node_in_by_its_own_address() {
    let mut node = Node::default();
    let spec = json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.1.0.0/16", "10.1.2.0/24", "10.0.0.0/16"]});
    let mut change = service("web", "10.96.0.1", spec);
    let outrigger_desired::Change::Service(outrigger_desired::Watched::Applied(object)) = &mut change else { unreachable!() };
    let object = std::sync::Arc::get_mut(object).unwrap();
    object.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [{"ip": "1.1.1.1"}]}})).unwrap();
    let delta = node.listener.hear(&change);
    for (node_ip, ranges) in [("10.1.0.7", vec!["1.1.1.1/32", "10.0.0.0/15"]), ("9.9.9.9", vec!["10.0.0.0/15"])] {
        let ops = Model::default().plan(&node.listener.table, &delta, &[node_ip.parse().unwrap()]);
        let found = ops.iter().filter_map(|op| match op {
            Op::Add(Element { set: Set::Allowed, key: Key::Allowed(_, net), .. }) => Some(net.to_string()),
            _ => None,
        });
        assert_eq!(found.collect::<Vec<_>>(), ranges);
    }
}

#[test]
fn many_endpoints_share_few_numbers_of_slots() {
    for (endpoints, expected) in [(1, 1), (64, 64), (65, 2048), (128, 2048), (129, 4096), (1000, 16384), (5000, 16384)] {
        assert_eq!(slots(endpoints), expected);
    }
    assert!(first_slot(MAX_SLOTS as u32).checked_add(MAX_SLOTS as u32).is_some());
}

#[test]
fn long_change_leaves_nothing_behind() {
    let mut node = Node::default();
    let mut seed = 1_u64;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for step in 0..3000 {
        let name = format!("s{}", random(12));
        let ips: Vec<_> = (0..random(7)).map(|n| format!("10.0.{}.{n}", random(4))).collect();
        let ips: Vec<_> = ips.iter().map(String::as_str).collect();
        let (local, remote) = ips.split_at(random(ips.len() as u64 + 1) as usize);
        let spec = match random(4) {
            0 => json!({}),
            1 => json!({"sessionAffinity": "ClientIP"}),
            2 => json!({"type": "NodePort", "externalTrafficPolicy": "Local",
                "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30000 + random(8)}]}),
            _ => json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30000 + random(8)}]}),
        };
        match random(6) {
            0 => node.hear(&gone(&name)),
            1 | 2 => node.hear(&service(&name, &format!("10.96.1.{}", random(12)), spec)),
            _ => node.hear(&slice(&name, local, remote)),
        };
        if step % 100 == 99 {
            node.check();
        }
    }
    for name in 0..12 {
        node.hear(&gone(&format!("s{name}")));
    }
    assert!(node.elements.is_empty() && node.model.numbers.is_empty() && node.model.shared.is_empty());
}
