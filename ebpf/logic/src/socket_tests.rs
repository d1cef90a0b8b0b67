//! Datagram flows over one socket, and names as programs see them.
use super::*;
use crate::fake::{Fake, endpoint, tcp};

const POD: Client = Client::Socket { namespace: 11, host: false };

fn udp(text: &str) -> FrontendKey {
    FrontendKey { protocol: UDP, ..tcp(text) }
}

/// Sends once and notes what the program would note.
fn send_to(fake: &Fake, dest: &str, noted: &mut Option<Peer>) -> Option<Endpoint> {
    let dest = endpoint(dest);
    let Verdict::To(choice) = send(fake, fake, dest, UDP, POD, noted.as_ref()) else { return None };
    note_datagram(fake, noted.as_ref(), dest, choice.backend, fake.now());
    note(noted.get_or_insert_default(), dest, UDP, &choice, fake.now());
    Some(choice.backend)
}

#[test]
fn protocols_of_sockets() {
    for (socket, known) in [(6, Some(6)), (17, Some(17)), (132, Some(132)), (262, Some(6)), (1, None), (58, None), (273, None)] {
        assert_eq!(protocol(socket), known);
    }
}

#[test]
fn a_pod_connects_over_udp_whoever_answers() {
    let host = Client::Socket { namespace: 1, host: true };
    for (protocol, client, fails) in [(TCP, POD, true), (UDP, POD, false), (132, POD, true), (TCP, host, true), (UDP, host, true)] {
        assert_eq!(fails_at_once(protocol, client), fails, "{protocol} {client:?}");
    }
}

#[test]
fn a_socket_stays_with_its_backend_and_is_answered_by_the_frontend() {
    let mut fake = Fake::default();
    fake.serve(udp("10.96.0.10:53"), 1, &["10.0.0.1:53", "10.0.0.2:53"]);
    let mut noted = None;
    assert_eq!(send_to(&fake, "10.96.0.10:53", &mut noted), Some(endpoint("10.0.0.1:53")));
    fake.random.set(u32::MAX);
    assert_eq!(send_to(&fake, "10.96.0.10:53", &mut noted), Some(endpoint("10.0.0.1:53")), "sticks");
    assert_eq!(receive(&fake, endpoint("10.0.0.1:53"), noted.as_ref()), Some(endpoint("10.96.0.10:53")));
    assert_eq!(receive(&fake, endpoint("10.0.0.2:53"), noted.as_ref()), None, "a stranger keeps its name");
    fake.now.set(DATAGRAM_IDLE + 1);
    assert_eq!(send_to(&fake, "10.96.0.10:53", &mut noted), Some(endpoint("10.0.0.2:53")), "silent for too long");
}

#[test]
fn a_socket_that_talks_to_two_services_keeps_both_apart() {
    let mut fake = Fake::default();
    fake.serve(udp("10.96.0.10:53"), 1, &["10.0.0.1:53", "10.0.0.2:53"]);
    fake.serve(udp("10.96.0.11:53"), 2, &["10.0.1.1:53", "10.0.1.2:53"]);
    let mut noted = None;
    let first = send_to(&fake, "10.96.0.10:53", &mut noted).unwrap();
    let second = send_to(&fake, "10.96.0.11:53", &mut noted).unwrap();
    fake.random.set(u32::MAX);
    assert_eq!(send_to(&fake, "10.96.0.10:53", &mut noted), Some(first));
    assert_eq!(send_to(&fake, "10.96.0.11:53", &mut noted), Some(second));
    assert_eq!(receive(&fake, first, noted.as_ref()), Some(endpoint("10.96.0.10:53")));
    assert_eq!(receive(&fake, second, noted.as_ref()), Some(endpoint("10.96.0.11:53")));
}

#[test]
fn a_removed_backend_is_left_at_the_next_datagram() {
    let mut fake = Fake::default();
    let key = udp("10.96.0.10:53");
    fake.serve(key, 1, &["10.0.0.1:53", "10.0.0.2:53"]);
    let mut noted = None;
    assert_eq!(send_to(&fake, "10.96.0.10:53", &mut noted), Some(endpoint("10.0.0.1:53")));
    let without = fake.set(1, &["10.0.0.2:53"]);
    fake.frontends.get_mut(&key).unwrap().internal = without;
    assert_eq!(send_to(&fake, "10.96.0.10:53", &mut noted), Some(endpoint("10.0.0.2:53")));
    // A late answer of the old backend is still the frontend's.
    assert_eq!(receive(&fake, endpoint("10.0.0.1:53"), noted.as_ref()), Some(endpoint("10.96.0.10:53")));
}

#[test]
fn names_of_connected_peers() {
    let noted = Peer { frontend: endpoint("10.96.0.1:80"), backend: endpoint("10.0.0.1:8080"), ..Peer::default() };
    assert_eq!(peer_name(endpoint("10.0.0.1:8080"), Some(&noted)), Some(endpoint("10.96.0.1:80")));
    assert_eq!(peer_name(endpoint("10.0.0.2:8080"), Some(&noted)), None);
    assert_eq!(peer_name(endpoint("10.0.0.1:8080"), None), None);
}

#[test]
fn a_socket_is_counted_for_one_backend_while_it_is_open() {
    let mut fake = Fake::default();
    let key = tcp("10.96.0.1:80");
    fake.serve(key, 1, &["10.0.0.1:80", "10.0.0.2:80"]).flags = frontend_flags::LEAST_CONNECTIONS;
    fake.serve(tcp("10.96.0.2:80"), 2, &["10.0.0.1:80"]);
    let mut peer = Peer::default();
    let counts = |fake: &Fake| ["10.0.0.1:80", "10.0.0.2:80"].map(|backend| fake.connections(&BackendKey::new(endpoint(backend), TCP)));
    let connect_to = |fake: &Fake, peer: &mut Peer, dest: &str| {
        let dest = endpoint(dest);
        let Verdict::To(choice) = connect(fake, dest, TCP, POD) else { panic!("no backend") };
        leave(fake, peer);
        note(peer, dest, TCP, &choice, 0);
        enter(fake, peer, &choice);
    };
    connect_to(&fake, &mut peer, "10.96.0.1:80");
    assert_eq!(counts(&fake), [1, 0]);
    connect_to(&fake, &mut peer, "10.96.0.1:80");
    assert_eq!(counts(&fake), [0, 1], "it connects again, to the other, and leaves the first");
    connect_to(&fake, &mut peer, "10.96.0.2:80");
    assert_eq!(counts(&fake), [0, 0], "a Service that doesn't ask isn't counted for");
    connect_to(&fake, &mut peer, "10.96.0.1:80");
    leave(&fake, &mut peer);
    leave(&fake, &mut peer);
    assert_eq!(counts(&fake), [0, 0]);
}
