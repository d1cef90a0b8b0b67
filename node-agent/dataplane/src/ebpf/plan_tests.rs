//! Steps in, map writes out: golden texts, and the layout's promises under long random change.
use std::time::Duration;

use outrigger_desired::Change;
use serde_json::json;

use super::*;
use crate::testing::{Listener, gone, service, slice};

/// A node that hears of Services, and the maps that follow.
struct Node {
    listener: Listener,
    layout: Layout,
    /// The maps as the batches leave them.
    frontends: HashMap<abi::FrontendKey, abi::Frontend>,
    slots: HashMap<u32, abi::Slot>,
    maglev: HashMap<u32, abi::MaglevBlock>,
}

impl Node {
    fn new() -> Self {
        Self {
            listener: Listener::default(),
            layout: Layout::default(),
            frontends: HashMap::default(),
            slots: HashMap::default(),
            maglev: HashMap::default(),
        }
    }

    fn hear(&mut self, change: &Change) -> Batch {
        let delta = self.listener.hear(change);
        let batch = self.layout.apply(&self.listener.table, &delta, &[]);
        self.write(&batch);
        batch
    }

    /// What the kernel does with a batch; on the way, no frontend may lead into a slot that isn't its own.
    fn write(&mut self, batch: &Batch) {
        self.slots.extend(batch.slots.iter().copied());
        let in_use: HashSet<u32> =
            self.frontends.values().map(|value| blocks(value.maglev)).flat_map(|range| range.base..range.base + range.count).collect();
        assert!(batch.maglev.iter().all(|(index, _)| !in_use.contains(index)), "no table changes while a frontend names it");
        self.maglev.extend(batch.maglev.iter().copied());
        self.check();
        for (key, value) in &batch.puts {
            self.frontends.insert(*key, *value);
            self.check();
            if value.maglev.count != 0 {
                assert_eq!(self.table(value.maglev), table(&self.backends(value.external)));
            }
        }
        for key in &batch.deletes {
            assert!(self.frontends.remove(key).is_some(), "deletes what is there");
        }
    }

    fn check(&self) {
        for value in self.frontends.values() {
            for range in [value.internal, value.external] {
                let backends: Vec<_> = (range.base..range.base + range.count).map(|index| self.slots[&index]).collect();
                assert!(backends.iter().all(|slot| slot.service == value.service));
                assert!(backends.iter().map(|slot| slot.endpoint().sort_key()).is_sorted());
            }
        }
    }

    fn backends(&self, range: abi::Range) -> Vec<Endpoint> {
        (range.base..range.base + range.count).map(|index| endpoint(self.slots[&index])).collect()
    }

    fn table(&self, places: abi::Range) -> Vec<abi::MaglevBlock> {
        let abi::Range { base, count } = blocks(places);
        (base..base + count).map(|index| self.maglev[&index]).collect()
    }

    fn adopted(&self) -> Layout {
        Layout::adopt(self.frontends.iter().map(|(key, value)| (*key, *value)).collect(), |index| self.slots.get(&index).copied())
    }
}

#[test]
fn one_services_life() {
    let mut node = Node::new();
    let steps = [
        service("web", "10.96.0.1", json!({})),
        slice("web", &["10.0.0.2"], &["10.0.1.1"]),
        slice("web", &["10.0.0.2"], &["10.0.1.1", "10.0.1.2"]),
        slice("web", &["10.0.0.2"], &["10.0.1.2"]),
        gone("web"),
    ];
    let texts: Vec<_> = steps.iter().map(|step| node.hear(step).to_string()).collect();
    let expected = [
        "service 1\nput 10.96.0.1:80/6 = 1 [0+0] flags 0x40\n",
        "slot 1 = 1 10.0.0.2:8080*\nslot 2 = 1 10.0.1.1:8080\nput 10.96.0.1:80/6 = 1 [1+2] flags 0x40\n",
        "slot 3 = 1 10.0.0.2:8080*\nslot 4 = 1 10.0.1.1:8080\nslot 5 = 1 10.0.1.2:8080\nput 10.96.0.1:80/6 = 1 [3+3] flags 0x40\n",
        "slot 1 = 1 10.0.0.2:8080*\nslot 2 = 1 10.0.1.2:8080\nput 10.96.0.1:80/6 = 1 [1+2] flags 0x40\n",
        "delete 10.96.0.1:80/6\n",
    ];
    assert_eq!(texts, expected);
}

#[test]
fn frontends_of_one_port_share_their_backends() {
    let mut node = Node::new();
    node.hear(&slice("web", &["10.0.0.2"], &["10.0.1.1"]));
    let spec = json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}], "externalIPs": ["1.1.1.1"],
        "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}});
    let batch = node.hear(&service("web", "10.96.0.1", spec));
    assert_eq!((batch.slots.len(), batch.puts.len(), batch.fresh_services.len()), (2, 3, 1));
    assert!(batch.puts.iter().all(|(_, value)| value.internal == abi::Range { base: 1, count: 2 } && value.affinity == 60));
    assert!(batch.to_string().contains("put 0.0.0.0:30080/6 = 1 [1+2] maglev [0+1021] affinity 60s"));
    assert!(batch.to_string().contains("put 10.96.0.1:80/6 = 1 [1+2] affinity 60s"), "a cluster IP has no table");
    assert_eq!(batch.maglev.len(), 32);
}

#[test]
fn the_same_backends_have_the_same_table_on_every_node() {
    let node_port =
        || service("web", "10.96.0.1", json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]}));
    let key = abi::FrontendKey::new(abi::Addr::NODE_V4, abi::Port::new(30080), abi::TCP);
    let table_of = |local: &[&str], remote: &[&str], before: bool| {
        let mut node = Node::new();
        if before {
            // Another node has had other Services, and other backends.
            node.hear(&service("old", "10.96.0.9", json!({"externalIPs": ["1.1.1.1"]})));
            node.hear(&slice("old", &["10.0.0.2"], &["10.0.1.7"]));
            node.hear(&slice("web", &["10.0.0.2"], &["10.0.1.9"]));
        }
        node.hear(&node_port());
        node.hear(&slice("web", local, remote));
        let value = node.frontends[&key];
        let table = node.table(value.maglev);
        let backends = node.backends(value.external);
        (0..value.maglev.count).map(|place| backends[table[(place / 32) as usize].get(place) as usize].socket()).collect::<Vec<_>>()
    };
    let here = table_of(&["10.0.0.2"], &["10.0.1.1", "10.0.2.1"], false);
    assert_eq!(here, table_of(&["10.0.2.1", "10.0.1.1"], &["10.0.0.2"], true));
    assert_eq!(here.len(), 1021);
}

#[test]
fn a_set_of_one_or_none_needs_no_table() {
    let mut node = Node::new();
    node.hear(&slice("web", &["10.0.0.2"], &["10.0.1.1"]));
    let spec = json!({"externalTrafficPolicy": "Local", "externalIPs": ["1.1.1.1"]});
    let batch = node.hear(&service("web", "10.96.0.1", spec));
    assert!(batch.maglev.is_empty() && batch.puts.iter().all(|(_, value)| value.maglev.count == 0), "one is here");
    assert!(node.hear(&slice("web", &[], &[])).maglev.is_empty());
}

#[test]
fn policy_local_keeps_clients_outside_on_this_node() {
    let mut node = Node::new();
    node.hear(&slice("web", &["10.0.0.2"], &["10.0.1.1"]));
    let spec = json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]});
    node.hear(&service("web", "10.96.0.1", spec));
    let value = node.frontends[&abi::FrontendKey::new(abi::Addr::NODE_V4, abi::Port::new(30080), abi::TCP)];
    assert_eq!((value.internal.count, value.external.count), (2, 1));
    assert_eq!(value.flags & abi::frontend_flags::MASQUERADE_NEVER, abi::frontend_flags::MASQUERADE_NEVER);
}

#[test]
fn a_new_agent_changes_nothing_that_is_right_and_removes_what_is_stale() {
    let mut node = Node::new();
    for step in [
        slice("web", &["10.0.0.2"], &["10.0.1.1"]),
        service("web", "10.96.0.1", json!({})),
        slice("old", &[], &["10.0.1.7"]),
        service("old", "10.96.0.2", json!({})),
    ] {
        node.hear(&step);
    }
    node.layout = node.adopted();
    assert_eq!(node.layout.apply(&node.listener.table, &Delta::full(&node.listener.table), &[]), Batch::default());
    node.listener.state.apply(&gone("old"));
    let table = Table::build(&node.listener.state);
    let batch = node.layout.apply(&table, &Delta::full(&table), &[]);
    assert_eq!(batch.to_string(), "delete 10.96.0.2:80/6\n");
}

#[test]
fn adopted_frontends_with_foreign_slots_are_written_anew() {
    let mut node = Node::new();
    node.hear(&slice("web", &[], &["10.0.1.1"]));
    node.hear(&service("web", "10.96.0.1", json!({})));
    node.slots.get_mut(&1).unwrap().service = 9;
    node.layout = node.adopted();
    let batch = node.layout.apply(&node.listener.table, &Delta::full(&node.listener.table), &[]);
    assert_eq!(batch.to_string(), "slot 2 = 1 10.0.1.1:8080\nput 10.96.0.1:80/6 = 1 [2+1] flags 0x40\n");
}

#[test]
fn long_change_leaks_no_space_and_no_index() {
    let mut node = Node::new();
    let mut seed = 1_u64;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for step in 0..5000 {
        let name = format!("s{}", random(20));
        let ips: Vec<_> = (0..random(13)).map(|n| format!("10.0.{}.{n}", random(4))).collect();
        match random(8) {
            0 => node.hear(&gone(&name)),
            1 => {
                let external =
                    if random(2) == 0 { json!([]) } else { json!([format!("1.1.1.{}", random(20)), format!("1.1.2.{}", random(20))]) };
                node.hear(&service(&name, &format!("10.96.1.{}", random(20)), json!({"externalIPs": external})))
            }
            _ => node.hear(&slice(&name, &[], &ips.iter().map(String::as_str).collect::<Vec<_>>())),
        };
        if step % 500 == 499 {
            node.layout = node.adopted();
            let batch = node.layout.apply(&node.listener.table, &Delta::full(&node.listener.table), &[]);
            assert_eq!(batch, Batch::default(), "the kernel holds what is wanted");
        }
    }
    let needed = node.layout.needed();
    assert!(needed.slots < 900 && needed.maglev < 20 * 256 + 20 * 32 && needed.services <= 22, "{needed:?}");
}

#[test]
fn pieces_waste_little_and_gaps_are_found() {
    let pieces: Vec<_> = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 100, 129].into_iter().map(space::piece).collect();
    assert_eq!(pieces, [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 24, 128, 192]);
    let mut space = Space::new(1, space::piece).around(vec![abi::Range { base: 10, count: 2 }, abi::Range { base: 20, count: 5 }]);
    assert_eq!(space.top, 26);
    let mut taken = Vec::new();
    while let Some(base) = [8, 6, 4, 3, 2, 1].into_iter().find_map(|size| space.reuse(size)) {
        taken.push(base);
    }
    taken.sort();
    assert_eq!(taken, [1, 9, 12]);
}

#[test]
fn times_beyond_the_maps_are_capped() {
    let entry = |seconds| Entry {
        service: Node::named(),
        kind: Kind::ClusterIp,
        backends: Arc::from([Endpoint { ip: IpAddr::from([10, 0, 0, 1]), port: 1, local: false }]),
        short_circuit: None,
        retained: Arc::from([]),
        affinity: Some(Duration::from_secs(seconds)),
        masquerade: Masquerade::OffCluster,
        source_ranges: Arc::from([]),
        balancing: Balancing::Random,
        no_endpoints: NoEndpoints::Reject,
    };
    let frontend = Frontend { address: Address::Ip(IpAddr::from([10, 96, 0, 1])), port: 80, protocol: Protocol::Tcp };
    let mut layout = Layout::default();
    let mut batch = Batch::default();
    layout.put(&frontend, &entry(u64::MAX), &[], &mut batch);
    assert_eq!(batch.puts[0].1.affinity, u32::MAX);
}

impl Node {
    fn named() -> ServicePortName {
        let mut node = Self::new();
        node.hear(&service("any", "10.96.0.9", json!({})));
        let (_, entry) = node.listener.table.iter().next().unwrap();
        entry.service.clone()
    }
}
