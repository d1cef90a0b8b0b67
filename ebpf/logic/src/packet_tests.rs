//! Connections from outside, packet by packet.
use super::*;
use crate::fake::{Fake, endpoint, tcp};
use outrigger_abi::node_address_flags;

fn packet(src: &str, dst: &str, tcp: u8) -> Packet {
    let (src, dst) = (endpoint(src), endpoint(dst));
    let tuple = Tuple { src: src.addr, dst: dst.addr, sport: src.port, dport: dst.port, protocol: TCP, zero: [0; 3] };
    Packet { tuple, tcp, part: Part::Whole }
}

fn tuple(src: &str, dst: &str) -> Tuple {
    packet(src, dst, 0).tuple
}

const NODE: &str = "172.16.0.1:30080";
const CLIENT: &str = "192.168.0.9:40000";

/// A node port with one backend; `local` says where it runs.
fn node(local: bool) -> Fake {
    let mut fake = Fake::default();
    fake.serve(tcp("0.0.0.0:30080"), 1, &["10.0.0.1:80"]);
    fake.slots[0].flags = if local { slot_flags::LOCAL } else { 0 };
    fake.nodes.insert(endpoint(NODE).addr, node_address_flags::NODE_PORTS);
    fake
}

fn uplink() -> Uplink {
    Uplink { v4: endpoint(NODE).addr, v6: Addr::default() }
}

fn arrives(fake: &Fake, packet: Packet) -> (Action, Tuple) {
    let mut to = Tuple::default();
    (arrive(fake, fake, &uplink(), true, &packet, &mut to), to)
}

fn leaves(fake: &Fake, packet: Packet) -> (Action, Tuple) {
    let mut to = Tuple::default();
    (leave(fake, &packet, &mut to), to)
}

#[test]
fn a_backend_here_sees_the_client_and_answers_as_the_node() {
    let fake = node(true);
    assert_eq!(arrives(&fake, packet(CLIENT, NODE, SYN)), (Action::Rewrite, tuple(CLIENT, "10.0.0.1:80")));
    assert_eq!(leaves(&fake, packet("10.0.0.1:80", CLIENT, SYN | ACK)), (Action::Rewrite, tuple(NODE, CLIENT)));
    assert_eq!(arrives(&fake, packet(CLIENT, NODE, ACK)), (Action::Rewrite, tuple(CLIENT, "10.0.0.1:80")));
    assert_eq!(leaves(&fake, packet("10.0.0.1:81", CLIENT, ACK)).0, Action::Pass);
}

#[test]
fn a_backend_elsewhere_sees_the_node_and_is_answered_through_it() {
    let fake = node(false);
    let (action, there) = arrives(&fake, packet(CLIENT, NODE, SYN));
    assert_eq!((action, there.src, there.dst), (Action::Forward, endpoint(NODE).addr, endpoint("10.0.0.1:80").addr));
    assert!((2048..30_000).contains(&there.sport.host()));
    let back = Packet { tuple: there.reversed(), tcp: SYN | ACK, part: Part::Whole };
    assert_eq!(arrives(&fake, back), (Action::Forward, tuple(NODE, CLIENT)));
    assert_eq!(leaves(&fake, back).0, Action::Pass, "only what passes the node's routing is renamed on its way out");
    // Another client gets another port, also when chance offers the same one first.
    fake.random.set(0);
    let (action, other) = arrives(&fake, packet("192.168.0.9:40001", NODE, SYN));
    assert_eq!(action, Action::Drop, "the fake's chance never changes, so no free port is found");
    assert_eq!(other.sport, there.sport);
    fake.random.set(u32::MAX);
    assert_eq!(arrives(&fake, packet("192.168.0.9:40001", NODE, SYN)).0, Action::Forward);
}

#[test]
fn the_port_of_a_connection_that_is_over_serves_another() {
    let (fake, other) = (node(false), "192.168.0.9:40001");
    let (_, there) = arrives(&fake, packet(CLIENT, NODE, SYN));
    arrives(&fake, packet(CLIENT, NODE, RST));
    // The fake's chance never changes: the one port is asked for again.
    assert_eq!(arrives(&fake, packet(other, NODE, SYN)), (Action::Forward, there));
    let back = Packet { tuple: there.reversed(), tcp: SYN | ACK, part: Part::Whole };
    assert_eq!(arrives(&fake, back), (Action::Forward, tuple(NODE, other)));
    // What still comes of the old connection doesn't end the new one, nor does its client's next connection.
    arrives(&fake, packet(CLIENT, NODE, RST));
    assert_eq!(arrives(&fake, packet(CLIENT, NODE, SYN)).0, Action::Drop, "the port is taken");
    assert_eq!(arrives(&fake, back), (Action::Forward, tuple(NODE, other)));
}

#[test]
fn the_port_of_a_connection_that_is_over_serves_the_node_itself() {
    let fake = node(false);
    let (_, there) = arrives(&fake, packet(CLIENT, NODE, SYN));
    arrives(&fake, packet(CLIENT, NODE, RST));
    for tcp in [SYN | ACK, ACK, FIN | ACK] {
        let back = Packet { tuple: there.reversed(), tcp, part: Part::Whole };
        assert_eq!(arrives(&fake, back).0, Action::Pass);
    }
}

fn from_pod(fake: &Fake, packet: Packet) -> (Action, Tuple) {
    let mut to = Tuple::default();
    (arrive(fake, fake, &uplink(), false, &packet, &mut to), to)
}

#[test]
fn a_pod_is_led_by_its_packets_and_keeps_its_address() {
    let mut fake = Fake::default();
    fake.serve(tcp("10.96.0.1:80"), 1, &["10.0.1.1:8080"]);
    let pod = "10.0.0.5:40000";
    assert_eq!(from_pod(&fake, packet(pod, "10.96.0.1:80", SYN)), (Action::Rewrite, tuple(pod, "10.0.1.1:8080")));
    let answer = packet("10.0.1.1:8080", pod, SYN | ACK);
    assert_eq!(arrives(&fake, answer).0, Action::Pass, "answers are renamed where they leave");
    assert_eq!(leaves(&fake, answer), (Action::Rewrite, tuple("10.96.0.1:80", pod)));
}

#[test]
fn a_pod_that_is_led_to_itself_sees_the_node() {
    let mut fake = Fake::default();
    fake.serve(tcp("10.96.0.1:80"), 1, &["10.0.0.5:8080"]);
    let (action, there) = from_pod(&fake, packet("10.0.0.5:40000", "10.96.0.1:80", SYN));
    assert_eq!((action, there.src), (Action::Forward, endpoint(NODE).addr));
    let back = Packet { tuple: there.reversed(), tcp: SYN | ACK, part: Part::Whole };
    assert_eq!(from_pod(&fake, back), (Action::Forward, tuple("10.96.0.1:80", "10.0.0.5:40000")));
}

#[test]
fn the_source_is_the_nodes_on_the_way_to_the_backend() {
    let mut fake = node(false);
    fake.source = endpoint("172.17.0.1:0").addr;
    assert_eq!(arrives(&fake, packet(CLIENT, NODE, SYN)).1.src, fake.source);
}

#[test]
fn without_backends_the_node_refuses_in_the_frontends_name() {
    let mut fake = Fake::default();
    fake.serve(tcp("9.9.9.9:80"), 1, &[]);
    for _ in 0..2 {
        assert_eq!(arrives(&fake, packet(CLIENT, "9.9.9.9:80", SYN)), (Action::Rewrite, tuple(CLIENT, "172.16.0.1:0")));
        assert_eq!(leaves(&fake, packet("172.16.0.1:0", CLIENT, RST | ACK)), (Action::Rewrite, tuple("9.9.9.9:80", CLIENT)));
    }
    let range = fake.set(1, &["10.0.0.1:80"]);
    fake.frontends.get_mut(&tcp("9.9.9.9:80")).unwrap().external = range;
    fake.slots[0].flags = slot_flags::LOCAL;
    assert_eq!(arrives(&fake, packet(CLIENT, "9.9.9.9:80", SYN)).1, tuple(CLIENT, "10.0.0.1:80"));
}

#[test]
fn errors_and_fragments_follow_their_connection_and_open_none() {
    for local in [true, false] {
        let fake = node(local);
        let stray = |part| Packet { part, ..packet(CLIENT, NODE, SYN) };
        for part in [Part::Later, Part::Error] {
            assert_eq!(arrives(&fake, stray(part)).0, Action::Pass);
        }
        let there = arrives(&fake, packet(CLIENT, NODE, SYN)).1;
        for part in [Part::Later, Part::Error] {
            assert_eq!(arrives(&fake, Packet { part, ..packet(CLIENT, NODE, 0) }).1, there);
            // What a backend (or a router before it) says about a packet that was led there.
            let back = Packet { tuple: there.reversed(), tcp: 0, part };
            let said = if local { leaves(&fake, back) } else { arrives(&fake, back) };
            assert_eq!(said, (if local { Action::Rewrite } else { Action::Forward }, tuple(NODE, CLIENT)));
        }
    }
}

#[test]
fn what_opens_nothing_and_belongs_to_nothing_passes() {
    let fake = node(true);
    for other in [packet(CLIENT, NODE, ACK), packet(CLIENT, "172.16.0.1:22", SYN), packet(CLIENT, "172.16.0.2:30080", SYN)] {
        assert_eq!(arrives(&fake, other).0, Action::Pass);
    }
}

#[test]
fn a_connection_ends_by_two_fins_or_one_reset_and_its_port_starts_anew() {
    for closing in [&[(true, FIN | ACK), (false, FIN | ACK), (true, ACK)][..], &[(false, RST)][..]] {
        let mut fake = node(true);
        arrives(&fake, packet(CLIENT, NODE, SYN));
        let moved = fake.set(1, &["10.0.0.2:80"]);
        fake.slots[1].flags = slot_flags::LOCAL;
        fake.frontends.values_mut().for_each(|frontend| frontend.external = moved);
        assert_eq!(arrives(&fake, packet(CLIENT, NODE, SYN)).1, tuple(CLIENT, "10.0.0.1:80"), "a SYN sent again");
        for &(from_client, flags) in closing {
            let action = if from_client {
                arrives(&fake, packet(CLIENT, NODE, flags)).0
            } else {
                leaves(&fake, packet("10.0.0.1:80", CLIENT, flags)).0
            };
            assert_eq!(action, Action::Rewrite);
        }
        assert_eq!(arrives(&fake, packet(CLIENT, NODE, SYN)).1, tuple(CLIENT, "10.0.0.2:80"), "a new connection");
        assert_eq!(leaves(&fake, packet("10.0.0.1:80", CLIENT, ACK)).0, Action::Pass);
        assert_eq!(leaves(&fake, packet("10.0.0.2:80", CLIENT, SYN | ACK)).0, Action::Rewrite);
    }
}

#[test]
fn one_client_port_may_reach_one_backend_by_two_frontends() {
    let mut fake = node(true);
    fake.serve(tcp("0.0.0.0:30081"), 2, &["10.0.0.1:80"]);
    fake.slots[1].flags = slot_flags::LOCAL;
    assert_eq!(arrives(&fake, packet(CLIENT, NODE, SYN)).0, Action::Rewrite);
    let (action, second) = arrives(&fake, packet(CLIENT, "172.16.0.1:30081", SYN));
    assert_eq!((action, second.src), (Action::Forward, endpoint(NODE).addr));
    let from_pod = |tuple: &Tuple| fake.flow(tuple).unwrap().flags & flow_flags::POD != 0;
    assert!(from_pod(&second.reversed()) && !from_pod(&tuple(CLIENT, "172.16.0.1:30081")), "the answers come by the pod's interface");
    assert_eq!(arrives(&fake, Packet { tuple: second.reversed(), tcp: ACK, part: Part::Whole }).1, tuple("172.16.0.1:30081", CLIENT));
    assert_eq!(leaves(&fake, packet("10.0.0.1:80", CLIENT, ACK)).1, tuple(NODE, CLIENT));
}

#[test]
fn one_port_of_a_pod_may_reach_one_backend_by_two_frontends_under_its_own_address() {
    let mut fake = Fake::default();
    fake.serve(tcp("10.96.0.1:80"), 1, &["10.0.1.1:8080"]);
    fake.serve(tcp("10.96.0.2:80"), 2, &["10.0.1.1:8080"]);
    let pod = "10.0.0.5:40000";
    assert_eq!(from_pod(&fake, packet(pod, "10.96.0.1:80", SYN)), (Action::Rewrite, tuple(pod, "10.0.1.1:8080")));
    let (action, second) = from_pod(&fake, packet(pod, "10.96.0.2:80", SYN));
    assert_eq!((action, second.src), (Action::Rewrite, endpoint(pod).addr), "who may not speak as itself may not as the node");
    assert_ne!(second.sport.host(), 40_000);
    let back = Packet { tuple: second.reversed(), tcp: SYN | ACK, part: Part::Whole };
    assert_eq!(leaves(&fake, back), (Action::Rewrite, tuple("10.96.0.2:80", pod)));
    assert_eq!(leaves(&fake, packet("10.0.1.1:8080", pod, ACK)).1, tuple("10.96.0.1:80", pod));
}

#[test]
fn only_a_lone_syn_and_datagrams_may_open() {
    let cases = [(TCP, SYN, true), (TCP, SYN | ACK, false), (TCP, ACK, false), (TCP, FIN | ACK, false), (TCP, RST, false), (UDP, 0, true)];
    for (protocol, flags, expected) in cases {
        assert_eq!(may_open(protocol, flags), expected, "{protocol} {flags}");
    }
}
