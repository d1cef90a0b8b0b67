//! Connections of an isolated pod, packet by packet.
extern crate std;
use core::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};

use super::*;
use crate::fake::endpoint;

/// The rule set that each test fills: peers, and their ports in a set.
const RULES: u32 = 5;
/// A rule set of nothing.
const NOTHING: u32 = 6;
const SET: u32 = 7;
const POD: &str = "10.0.0.1";

#[derive(Default)]
struct Fake {
    node: HashSet<Addr>,
    peers: HashMap<(u32, Addr), u32>,
    ports: HashSet<(u32, u8, Port)>,
    opened: RefCell<HashMap<Connection, Opened>>,
    now: Cell<u64>,
}

impl Tables for Fake {
    fn is_node(&self, addr: &Addr) -> bool {
        self.node.contains(addr)
    }
    fn ports(&self, rules: u32, peer: &Addr) -> u32 {
        self.peers.get(&(rules, *peer)).copied().unwrap_or(ports::NONE)
    }
    fn has_port(&self, ports: u32, protocol: u8, port: Port) -> bool {
        self.ports.contains(&(ports, protocol, port))
    }
    fn opened(&self, connection: &Connection) -> Option<Opened> {
        self.opened.borrow().get(connection).copied()
    }
    fn remember(&self, connection: &Connection, opened: &Opened) {
        self.opened.borrow_mut().insert(*connection, *opened);
    }
    fn now(&self) -> u64 {
        self.now.get()
    }
}

impl Fake {
    fn new() -> Self {
        let tables = Self { node: HashSet::from([addr("10.1.0.1")]), ..Self::default() };
        tables.now.set(1000 * SECOND);
        tables
    }

    fn allow(mut self, rules: u32, peer: &str, ports: u32) -> Self {
        self.peers.insert((rules, addr(peer)), ports);
        self
    }

    fn port(mut self, protocol: u8, port: u16) -> Self {
        self.ports.insert((SET, protocol, Port::new(port)));
        self
    }

    fn to(&self, pod: &Pod, kind: Kind, protocol: u8, from: &str, local_port: u16) -> bool {
        passes(self, Some(pod), Direction::Ingress, &packet(kind, protocol, from, local_port))
    }

    fn from(&self, pod: &Pod, kind: Kind, protocol: u8, to: &str, local_port: u16) -> bool {
        passes(self, Some(pod), Direction::Egress, &packet(kind, protocol, to, local_port))
    }
}

fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<core::net::IpAddr>().unwrap())
}

fn pod(ingress: u32, egress: u32) -> Pod {
    Pod { v4: addr(POD), ingress, egress, ..Pod::default() }
}

fn packet(kind: Kind, protocol: u8, remote: &str, local_port: u16) -> Packet {
    let remote = endpoint(remote);
    let connection = Connection {
        interface: 3,
        local: addr(POD),
        remote: remote.addr,
        local_port: Port::new(local_port),
        remote_port: remote.port,
        protocol,
        zero: [0; 3],
    };
    Packet { kind, local: addr(POD), remote: remote.addr, connection, from_node: false, from_itself: false }
}

const WEB: &str = "10.0.0.2:443";

#[test]
fn what_the_pod_opened_is_answered_and_nothing_else_comes_in() {
    let tables = Fake::new();
    let pod = pod(NOTHING, OPEN);
    assert!(!tables.to(&pod, Kind::Opens, TCP, WEB, 40000));
    assert!(!tables.to(&pod, Kind::Answers, TCP, WEB, 40000));
    assert!(tables.from(&pod, Kind::Opens, TCP, WEB, 40000));
    assert!(tables.to(&pod, Kind::Answers, TCP, WEB, 40000));
    assert!(tables.to(&pod, Kind::Continues, TCP, WEB, 40000));
    assert!(!tables.to(&pod, Kind::Continues, TCP, WEB, 40001), "another connection");
    assert!(!tables.to(&pod, Kind::Opens, TCP, WEB, 40000), "the peer may open none, not even by the same ports");
    assert!(tables.from(&pod, Kind::Datagram, UDP, "10.0.0.2:53", 40000));
    assert!(tables.to(&pod, Kind::Datagram, UDP, "10.0.0.2:53", 40000));
    tables.now.set(tables.now.get() + SILENCE);
    assert!(!tables.to(&pod, Kind::Datagram, UDP, "10.0.0.2:53", 40000), "after silence");
    assert!(tables.to(&pod, Kind::Continues, TCP, WEB, 40000), "TCP is silent for as long as it likes");
}

#[test]
fn ports_are_the_servers_in_either_direction() {
    let tables = Fake::new().allow(RULES, "10.0.0.2", SET).port(TCP, 443);
    let server = pod(RULES, NOTHING);
    assert!(tables.to(&server, Kind::Opens, TCP, "10.0.0.2:40000", 443));
    assert!(tables.from(&server, Kind::Answers, TCP, "10.0.0.2:40000", 443));
    assert!(!tables.to(&server, Kind::Opens, TCP, "10.0.0.2:40000", 444));
    assert!(!tables.to(&server, Kind::Opens, SCTP, "10.0.0.2:40000", 443), "another protocol");
    assert!(!tables.to(&server, Kind::Opens, TCP, "10.0.0.3:40000", 443), "another peer");
    assert!(!tables.from(&server, Kind::Opens, TCP, WEB, 443), "who may be asked needn't ask");
    let client = pod(NOTHING, RULES);
    assert!(tables.from(&client, Kind::Opens, TCP, WEB, 40000));
    assert!(tables.to(&client, Kind::Answers, TCP, WEB, 40000));
    assert!(!tables.from(&client, Kind::Opens, 1, WEB, 0), "an echo has no port");
}

#[test]
fn a_change_cuts_live_connections_both_ways() {
    let mut tables = Fake::new().allow(RULES, "10.0.0.2", ports::ALL);
    for protocol in [TCP, UDP] {
        let kind = if protocol == TCP { Kind::Continues } else { Kind::Datagram };
        let pod = pod(NOTHING, RULES);
        assert!(tables.from(&pod, if protocol == TCP { Kind::Opens } else { kind }, protocol, WEB, 40000));
        assert!(tables.to(&pod, kind, protocol, WEB, 40000));
        tables.peers.clear();
        assert!(!tables.to(&pod, kind, protocol, WEB, 40000));
        assert!(!tables.from(&pod, kind, protocol, WEB, 40000));
        tables = tables.allow(RULES, "10.0.0.2", ports::ALL);
        assert!(tables.from(&pod, kind, protocol, WEB, 40000), "allowed again, it goes on");
        assert!(tables.to(&pod, kind, protocol, WEB, 40000));
    }
}

#[test]
fn answers_to_what_is_forbidden_now_do_not_open_it_again() {
    let tables = Fake::new();
    for (kind, protocol) in [(Kind::Continues, TCP), (Kind::Datagram, UDP)] {
        // Opened while the pod was isolated for ingress only; what the server still sends may come in.
        let before = Pod { since: tables.now.get(), ..pod(OPEN, RULES) };
        assert!(!tables.from(&before, kind, protocol, WEB, 40000));
        assert!(tables.to(&before, kind, protocol, WEB, 40000), "ingress is open");
        assert!(!tables.from(&before, kind, protocol, WEB, 40000), "taken for an answer");
    }
    // A client's connection that is older than the isolation goes on.
    let server = Pod { since: tables.now.get(), ..pod(OPEN, NOTHING) };
    assert!(tables.to(&server, Kind::Continues, TCP, "10.0.0.2:40000", 80));
    assert!(tables.from(&server, Kind::Continues, TCP, "10.0.0.2:40000", 80));
}

#[test]
fn errors_pass_about_what_is_allowed() {
    let tables = Fake::new().allow(RULES, "10.0.0.2", SET).port(UDP, 53);
    let pod = pod(NOTHING, RULES);
    let mut error = packet(Kind::Error, UDP, "10.0.0.2:53", 40000);
    error.remote = addr("10.9.9.9");
    assert!(!passes(&tables, Some(&pod), Direction::Ingress, &error));
    assert!(tables.from(&pod, Kind::Datagram, UDP, "10.0.0.2:53", 40000));
    assert!(passes(&tables, Some(&pod), Direction::Ingress, &error), "from whatever router");
    error.connection.local_port = Port::new(1);
    assert!(!passes(&tables, Some(&pod), Direction::Ingress, &error));
}

#[test]
fn without_ports_only_all_will_do() {
    let tables = Fake::new().allow(RULES, "10.0.0.2", SET).allow(RULES, "10.0.0.3", ports::ALL);
    let pod = pod(RULES, RULES);
    for (kind, protocol) in [(Kind::Other, 47), (Kind::Opens, 1)] {
        assert!(!tables.from(&pod, kind, protocol, "10.0.0.2:0", 0));
        assert!(tables.from(&pod, kind, protocol, "10.0.0.3:0", 0));
    }
}

#[test]
fn the_node_and_the_pod_itself_always_may() {
    let tables = Fake::new();
    let (pod, node) = (pod(NOTHING, NOTHING), "10.1.0.1:40000");
    let from_node = Packet { from_node: true, ..packet(Kind::Opens, TCP, node, 80) };
    for pod in [Some(&pod), None] {
        assert!(passes(&tables, pod, Direction::Ingress, &from_node));
        assert!(!passes(&tables, pod, Direction::Ingress, &packet(Kind::Opens, TCP, node, 80)), "who claims to be the node");
        assert!(passes(&tables, pod, Direction::Egress, &packet(Kind::Opens, TCP, node, 80)));
        assert!(passes(&tables, pod, Direction::Ingress, &Packet { from_itself: true, ..packet(Kind::Opens, TCP, WEB, 80) }));
        assert!(!passes(&tables, pod, Direction::Egress, &packet(Kind::Opens, TCP, WEB, 80)));
        let neighbour = Packet { from_node: false, ..packet(Kind::Neighbour, 58, "[fe80::1]:0", 0) };
        assert!(passes(&tables, pod, Direction::Ingress, &neighbour));
    }
    let in_others_name = Packet { from_node: true, ..packet(Kind::Opens, TCP, WEB, 80) };
    assert!(!passes(&tables, Some(&pod), Direction::Ingress, &in_others_name), "the node speaks for a client");
}

#[test]
fn an_isolated_pod_sends_in_its_own_name() {
    let tables = Fake::new().allow(RULES, "10.0.0.2", ports::ALL);
    let mut spoofed = packet(Kind::Opens, TCP, WEB, 80);
    spoofed.local = addr("10.0.0.9");
    assert!(!passes(&tables, Some(&pod(OPEN, RULES)), Direction::Egress, &spoofed));
    spoofed.remote = addr("10.1.0.1");
    assert!(!passes(&tables, Some(&pod(OPEN, RULES)), Direction::Egress, &spoofed), "to the node too");
    assert!(passes(&tables, Some(&pod(RULES, OPEN)), Direction::Egress, &spoofed), "isolated for ingress only");
}

#[test]
fn neighbour_discovery_stays_on_the_link() {
    let (router, group, far) = (addr("fe80::1"), addr("ff02::1:ff00:1"), addr("fd00::2"));
    for link in [router, group] {
        assert!(is_neighbour(Direction::Egress, 135, &link, 255));
    }
    assert!(!is_neighbour(Direction::Egress, 136, &far, 255), "it would be passed on");
    assert!(is_neighbour(Direction::Ingress, 136, &far, 255) && !is_neighbour(Direction::Ingress, 136, &far, 254));
    assert!(!is_neighbour(Direction::Ingress, 128, &router, 255));
}

#[test]
fn the_first_packet_of_a_connection_is_known() {
    assert_eq!([0x02, 0x12, 0x10, 0x11, 0x04, 0x03].map(of_tcp), {
        use Kind::{Answers, Continues, Opens};
        [Opens, Answers, Continues, Continues, Continues, Opens]
    });
}
