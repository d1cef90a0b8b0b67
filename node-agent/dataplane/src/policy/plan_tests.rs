//! The maps against the meaning of the rules.
use std::net::IpAddr;

use outrigger_abi::policy::{Connection, Direction, Opened, Pod};
use outrigger_desired::Protocol;
use outrigger_desired::policy::PodPolicy;
use outrigger_logic::policy::{Kind, Packet, Tables, passes};

use super::*;

/// The maps as the kernel holds them.
#[derive(Default)]
struct Maps {
    peers: HashMap<Peer, u32>,
    ports: HashMap<PortKey, u32>,
    pods: BTreeMap<Arc<str>, (u32, u32)>,
}

impl Maps {
    fn take(&mut self, steps: Steps) {
        self.ports.extend(steps.ports);
        self.peers.extend(steps.peers);
        self.pods = steps.pods;
        steps.stale_peers.iter().for_each(|key| _ = self.peers.remove(key).unwrap());
        steps.stale_ports.iter().for_each(|key| _ = self.ports.remove(key).unwrap());
    }
}

/// Whether the first `length` bits of the words, as they lie in memory, are the same.
fn same(length: u32, a: &[u32], b: &[u32]) -> bool {
    let bits = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let (a, b) = (bits(a), bits(b));
    (0..length as usize).all(|bit| (a[bit / 8] ^ b[bit / 8]) << (bit % 8) & 0x80 == 0)
}

impl Tables for Maps {
    fn is_node(&self, _: &Addr) -> bool {
        false
    }
    fn ports(&self, rules: u32, peer: &Addr) -> u32 {
        let wanted = Peer::exact(rules, *peer).words();
        let matching = self.peers.iter().filter(|(key, _)| same(key.prefix, &key.words(), &wanted));
        matching.max_by_key(|(key, _)| key.prefix).map_or(ports::NONE, |(_, value)| *value)
    }
    fn has_port(&self, ports: u32, protocol: u8, port: Port) -> bool {
        let wanted = PortKey::new(ports, protocol, port, 16).words();
        self.ports.keys().any(|key| same(key.prefix, &key.words(), &wanted))
    }
    fn opened(&self, _: &Connection) -> Option<Opened> {
        None
    }
    fn remember(&self, _: &Connection, _: &Opened) {}
    fn now(&self) -> u64 {
        0
    }
}

/// What the contract says.
fn naive(rules: &Rules, peer: IpAddr, protocol: u8, port: u16) -> bool {
    let longest = rules.peers.iter().filter(|(net, _)| net.contains(&peer)).max_by_key(|(net, _)| net.prefix_len());
    match longest {
        None => false,
        Some((_, Ports::All)) => true,
        Some((_, Ports::Only(ranges))) => {
            ranges.iter().any(|range| range.protocol.number() == protocol && (range.first..=range.last).contains(&port))
        }
    }
}

/// Numbers by chance, the same in each run (xorshift).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn protocol(&mut self) -> Protocol {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp][self.below(3) as usize]
    }

    /// From few enough that prefixes cover each other and packets meet them.
    fn address(&mut self) -> IpAddr {
        let low = self.below(8) as u32;
        if self.below(2) == 0 {
            std::net::Ipv4Addr::from_bits(0x0a00_0000 + (low << 29) + self.below(4) as u32).into()
        } else {
            std::net::Ipv6Addr::from_bits((u128::from(low) << 125) + u128::from(self.below(4))).into()
        }
    }

    fn port(&mut self) -> u16 {
        [0, 1, 79, 80, 81, 443, 1023, 1024, 65534, 65535][self.below(10) as usize]
    }

    fn rules(&mut self) -> Rules {
        let mut peers = BTreeMap::new();
        for _ in 0..self.below(12) {
            let address = self.address();
            let longest = if address.is_ipv4() { 32 } else { 128 };
            let length = [0, 1, 3, longest - 2, longest - 1, longest][self.below(6) as usize];
            let net = IpNet::new(address, length).unwrap().trunc();
            let mut ranges = Vec::new();
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                if self.below(2) == 0 {
                    let (a, b) = (self.port(), self.port());
                    ranges.push(PortRange { protocol, first: a.min(b), last: a.max(b) });
                }
            }
            peers.insert(net, if self.below(3) == 0 { Ports::All } else { Ports::Only(ranges.into()) });
        }
        Rules { peers }
    }
}

#[test]
fn maps_mean_what_the_rules_say() {
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    let (mut plan, mut maps) = (Plan::above(&[], &[]), Maps::default());
    let address: IpAddr = "192.0.2.1".parse().unwrap();
    let mut table = PolicyTable::default();
    for _ in 0..100 {
        let direction = chance.below(8);
        let rules = |chance: &mut Chance| Some(Arc::new(chance.rules()));
        let pod = PodPolicy {
            addresses: vec![address],
            interface: "pod".into(),
            ingress: (direction != 0).then(|| rules(&mut chance)).flatten(),
            egress: (direction != 1).then(|| rules(&mut chance)).flatten(),
        };
        let sandbox: Arc<str> = chance.below(5).to_string().into();
        table.pods.insert(sandbox.clone(), pod.clone());
        maps.take(plan.apply(&table));
        let (ingress, egress) = maps.pods[&sandbox];
        let policed = Pod { v4: address.into(), ingress, egress, ..Pod::default() };
        for _ in 0..60 {
            let (peer, port, protocol) = (chance.address(), chance.port(), chance.protocol().number());
            for (direction, rules) in [(Direction::Ingress, &pod.ingress), (Direction::Egress, &pod.egress)] {
                let (local_port, remote_port) = if direction == Direction::Ingress { (port, 9) } else { (9, port) };
                let connection = Connection {
                    local: address.into(),
                    remote: peer.into(),
                    local_port: Port::new(local_port),
                    remote_port: Port::new(remote_port),
                    protocol,
                    ..Connection::default()
                };
                let (local, remote) = (connection.local, connection.remote);
                let packet = Packet { kind: Kind::Opens, local, remote, connection, from_node: false, from_itself: false };
                let expected = rules.as_ref().is_none_or(|rules| naive(rules, peer, protocol, port));
                assert_eq!(
                    passes(&maps, Some(&policed), direction, &packet),
                    expected,
                    "{direction:?} {peer} {protocol} {port}: {rules:?}"
                );
            }
        }
    }
    maps.take(plan.apply(&PolicyTable::default()));
    assert!(maps.peers.is_empty() && maps.ports.is_empty() && maps.pods.is_empty(), "nothing stays");
}

#[test]
fn pods_with_the_same_rules_share_them() {
    let rules = || {
        let ports = Ports::Only([PortRange { protocol: Protocol::Tcp, first: 80, last: 90 }].into());
        Some(Arc::new(Rules { peers: BTreeMap::from([("10.0.0.0/8".parse().unwrap(), ports)]) }))
    };
    let pod = || PodPolicy { ingress: rules(), egress: rules(), ..PodPolicy::default() };
    let table = PolicyTable { pods: ["a", "b"].map(|sandbox| (sandbox.into(), pod())).into() };
    let mut plan = Plan::above(&[Peer::new(6, Addr::default(), 0)], &[]);
    let steps = plan.apply(&table);
    assert_eq!((plan.rule_sets(), steps.peers.len(), steps.ports.len()), (1, 1, 3));
    assert!(steps.pods.values().all(|sets| *sets == (7, 7)), "above what is in use");
    let again = plan.apply(&table);
    assert_eq!(again, Steps { pods: steps.pods, ..Steps::default() });
}

#[test]
fn ranges_are_the_fewest_prefixes() {
    assert_eq!(prefixes(80, 80), [(80, 16)]);
    assert_eq!(prefixes(0, 65535), [(0, 0)]);
    assert_eq!(prefixes(1, 4), [(1, 16), (2, 15), (4, 16)]);
    assert_eq!(prefixes(32768, 65535), [(32768, 1)]);
    assert_eq!(prefixes(1, 65534).len(), 30);
}
