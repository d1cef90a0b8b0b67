//! Lookup and choice, by tables and expected verdicts.
extern crate std;
use std::format;
use std::vec::Vec;

use super::*;
use crate::fake::{Fake, endpoint, tcp};

const POD: Client = Client::Socket { namespace: 11, host: false };
const HOST: Client = Client::Socket { namespace: 1, host: true };

fn packet(source: &str, outside: bool) -> Client {
    let Endpoint { addr: source, port, .. } = endpoint(source);
    Client::Packet { source, port, outside }
}

fn target(verdict: Verdict) -> Option<Endpoint> {
    match verdict {
        Verdict::To(choice) => Some(choice.backend),
        _ => None,
    }
}

#[test]
fn other_addresses_ports_and_protocols_pass() {
    let mut fake = Fake::default();
    fake.serve(tcp("10.96.0.1:443"), 1, &["10.0.0.1:6443"]);
    for key in ["10.96.0.1:80", "10.96.0.2:443"] {
        assert_eq!(choose(&fake, &tcp(key), POD, Hint::NONE), Verdict::Pass);
    }
    let udp = FrontendKey { protocol: 17, ..tcp("10.96.0.1:443") };
    assert_eq!(choose(&fake, &udp, POD, Hint::NONE), Verdict::Pass);
    assert_eq!(target(choose(&fake, &tcp("10.96.0.1:443"), POD, Hint::NONE)), Some(endpoint("10.0.0.1:6443")));
}

#[test]
fn chance_reaches_every_backend_evenly() {
    let mut fake = Fake::default();
    let backends: Vec<_> = (1..=5).map(|n| format!("10.0.0.{n}:80")).collect();
    fake.serve(tcp("10.96.0.1:80"), 1, &backends.iter().map(|b| b.as_str()).collect::<Vec<_>>());
    let mut hits = [0_u32; 5];
    for step in 0..10_000_u32 {
        fake.random.set(step.wrapping_mul(u32::MAX / 10_000));
        let chosen = target(choose(&fake, &tcp("10.96.0.1:80"), POD, Hint::NONE)).unwrap();
        hits[backends.iter().position(|backend| endpoint(backend) == chosen).unwrap()] += 1;
    }
    assert!(hits.iter().all(|&hit| (1990..=2010).contains(&hit)), "{hits:?}");
    assert_eq!((scale(u32::MAX, 3), scale(0, 3)), (2, 0));
}

#[test]
fn without_backends_the_policy_decides() {
    let mut fake = Fake::default();
    let reject = *fake.serve(tcp("10.96.0.1:80"), 4, &[]);
    fake.frontends.insert(tcp("10.96.0.2:80"), Frontend { flags: frontend_flags::DROP_INTERNAL, ..reject });
    assert_eq!(choose(&fake, &tcp("10.96.0.1:80"), POD, Hint::NONE), Verdict::Refuse(4));
    assert_eq!(choose(&fake, &tcp("10.96.0.2:80"), POD, Hint::NONE), Verdict::Drop(4, Reason::LocalPolicy));
    let outside = packet("1.2.3.4:0", true);
    assert_eq!(choose(&fake, &tcp("10.96.0.2:80"), outside, Hint::NONE), Verdict::Refuse(4));
}

#[test]
fn inside_and_outside_have_their_own_sets() {
    let mut fake = Fake::default();
    let local = fake.set(1, &["10.0.0.2:80"]);
    fake.serve(tcp("1.1.1.1:80"), 1, &["10.0.0.9:80"]).external = local;
    let outside = packet("9.9.9.9:0", true);
    let inside = packet("10.0.0.3:0", false);
    assert_eq!(target(choose(&fake, &tcp("1.1.1.1:80"), outside, Hint::NONE)), Some(endpoint("10.0.0.2:80")));
    assert_eq!(target(choose(&fake, &tcp("1.1.1.1:80"), inside, Hint::NONE)), Some(endpoint("10.0.0.9:80")));
}

#[test]
fn node_ports_are_reached_by_the_nodes_chosen_addresses() {
    let mut fake = Fake::default();
    fake.serve(tcp("0.0.0.0:30080"), 1, &["10.0.0.1:80"]);
    fake.serve(tcp("0.0.0.0:8080"), 2, &["10.0.0.1:80"]).flags = frontend_flags::HOST_PORT;
    fake.nodes.insert(endpoint("172.16.0.1:0").addr, node_address_flags::NODE_PORTS);
    fake.nodes.insert(endpoint("172.17.0.1:0").addr, 0);
    fake.nodes.insert(endpoint("127.0.0.1:0").addr, node_address_flags::NODE_PORTS | node_address_flags::HOST_ONLY);
    for (dial, client, reached) in [
        ("172.16.0.1:30080", POD, true),
        ("172.16.0.2:30080", POD, false),
        ("172.16.0.1:30081", POD, false),
        ("172.17.0.1:30080", POD, false),
        ("172.17.0.1:8080", POD, true),
        ("127.0.0.1:30080", HOST, true),
        ("127.0.0.1:30080", POD, false),
    ] {
        assert_eq!(target(choose(&fake, &tcp(dial), client, Hint::NONE)).is_some(), reached, "{dial} {client:?}");
    }
}

#[test]
fn affinity_holds_until_its_time_or_its_backend_ends() {
    let mut fake = Fake::default();
    let key = tcp("10.96.0.1:80");
    fake.serve(key, 1, &["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]).affinity = 10;
    fake.random.set(u32::MAX);
    assert_eq!(target(choose(&fake, &key, POD, Hint::NONE)), Some(endpoint("10.0.0.3:80")));
    fake.random.set(0);
    fake.now.set(9 * SECOND);
    assert_eq!(target(choose(&fake, &key, POD, Hint::NONE)), Some(endpoint("10.0.0.3:80")), "sticks");
    assert_eq!(target(choose(&fake, &key, HOST, Hint::NONE)), Some(endpoint("10.0.0.1:80")), "another client");
    fake.now.set(18 * SECOND);
    assert_eq!(target(choose(&fake, &key, POD, Hint::NONE)), Some(endpoint("10.0.0.3:80")), "each connection renews it");
    fake.now.set(29 * SECOND);
    assert_eq!(target(choose(&fake, &key, POD, Hint::NONE)), Some(endpoint("10.0.0.1:80")), "expired");
    // The set moves; the client's backend is still in it, elsewhere.
    let moved = fake.set(1, &["10.0.0.0:80", "10.0.0.1:80", "10.0.0.2:80"]);
    fake.frontends.get_mut(&key).unwrap().internal = moved;
    assert_eq!(target(choose(&fake, &key, POD, Hint::NONE)), Some(endpoint("10.0.0.1:80")), "found by search");
    let without = fake.set(1, &["10.0.0.2:80"]);
    fake.frontends.get_mut(&key).unwrap().internal = without;
    assert_eq!(target(choose(&fake, &key, POD, Hint::NONE)), Some(endpoint("10.0.0.2:80")), "its backend is gone");
}

#[test]
fn a_set_that_was_given_away_is_never_used() {
    let mut fake = Fake::default();
    let key = tcp("10.96.0.1:80");
    fake.serve(key, 1, &["10.0.0.1:80"]);
    fake.slots[0].service = 2;
    assert_eq!(choose(&fake, &key, POD, Hint::NONE), Verdict::Refuse(1));
}

#[test]
fn search_finds_every_member_of_a_large_set_and_nothing_else() {
    let mut fake = Fake::default();
    let backends: Vec<_> = (0..1000).map(|n| format!("10.0.{}.{}:80", n / 250, n % 250)).collect();
    let range = fake.set(1, &backends.iter().map(|b| b.as_str()).collect::<Vec<_>>());
    for (index, backend) in backends.iter().enumerate() {
        let hint = Hint { backend: endpoint(backend), base: u32::MAX, index: 0 };
        assert_eq!(locate(&fake, 1, range, &hint).unwrap().1, index as u32);
    }
    for backend in ["10.0.0.1:81", "9.0.0.1:80", "10.0.9.1:80"] {
        assert_eq!(locate(&fake, 1, range, &Hint { backend: endpoint(backend), base: 0, index: 3 }), None);
    }
}

#[test]
fn other_ports_of_a_cluster_ip_are_refused() {
    let mut fake = Fake::default();
    fake.serve(tcp("10.96.0.1:80"), 1, &["10.0.0.1:80"]);
    fake.cluster_ips.insert(endpoint("10.96.0.1:0").addr);
    assert_eq!(choose(&fake, &tcp("10.96.0.1:81"), POD, Hint::NONE), Verdict::Refuse(0));
    assert!(target(choose(&fake, &tcp("10.96.0.1:80"), POD, Hint::NONE)).is_some());
}

#[test]
fn source_ranges_keep_strangers_out() {
    let mut fake = Fake::default();
    fake.serve(tcp("1.1.1.1:80"), 1, &["10.0.0.1:80"]).flags = frontend_flags::SOURCE_RANGES;
    let outside = |source| packet(source, true);
    fake.sources.insert((1, endpoint("9.9.9.9:0").addr));
    assert!(target(choose(&fake, &tcp("1.1.1.1:80"), outside("9.9.9.9:0"), Hint::NONE)).is_some());
    assert_eq!(choose(&fake, &tcp("1.1.1.1:80"), outside("9.9.9.8:0"), Hint::NONE), Verdict::Drop(1, Reason::SourceRange));
    assert_eq!(choose(&fake, &tcp("1.1.1.1:80"), POD, Hint::NONE), Verdict::Pass, "left to the packets, which have a source");
    assert!(target(choose(&fake, &tcp("1.1.1.1:80"), HOST, Hint::NONE)).is_some());
    fake.frontends.get_mut(&tcp("1.1.1.1:80")).unwrap().flags |= frontend_flags::NODE_REFUSED;
    assert_eq!(choose(&fake, &tcp("1.1.1.1:80"), HOST, Hint::NONE), Verdict::Drop(1, Reason::SourceRange));
}

#[test]
fn a_connection_from_outside_goes_where_its_hash_means() {
    let mut fake = Fake::default();
    let key = tcp("1.1.1.1:80");
    let places: Vec<u16> = (0..67).map(|place| place % 3).collect();
    let maglev = fake.table(&places);
    let frontend = fake.serve(key, 1, &["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
    frontend.maglev = maglev;
    let mut hits = [0; 3];
    for port in 1..1000_u32 {
        let client = packet(&format!("9.9.9.9:{port}"), true);
        let verdict = choose(&fake, &key, client, Hint::NONE);
        let Verdict::To(choice) = verdict else { panic!("{verdict:?}") };
        fake.random.set(port.wrapping_mul(1 << 20));
        assert_eq!(choose(&fake, &key, client, Hint::NONE), verdict, "chance has no say");
        let hash = hash::connection(&endpoint("9.9.9.9:0").addr, Port::new(port as u16), Port::new(80), 6);
        assert_eq!(choice.index, u32::from(places[scale(hash, 67) as usize]));
        hits[choice.index as usize] += 1;
    }
    assert!(hits.iter().all(|&hit| hit > 250), "{hits:?}");
    // Whoever comes from inside is led by chance.
    for (random, backend) in [(0, "10.0.0.1:80"), (u32::MAX, "10.0.0.3:80")] {
        fake.random.set(random);
        assert_eq!(target(choose(&fake, &key, packet("10.0.0.9:1", false), Hint::NONE)), Some(endpoint(backend)));
    }
}

#[test]
fn a_table_that_was_given_away_leads_to_no_stranger() {
    let mut fake = Fake::default();
    let key = tcp("1.1.1.1:80");
    let maglev = fake.table(&[7; 67]);
    fake.serve(key, 1, &["10.0.0.1:80", "10.0.0.2:80"]).maglev = maglev;
    fake.serve(tcp("1.1.1.2:80"), 2, &["10.0.0.3:80"; 9]);
    for base in [maglev.base, 1000] {
        fake.frontends.get_mut(&key).unwrap().maglev.base = base;
        for port in 1..100 {
            let Verdict::To(choice) = choose(&fake, &key, packet(&format!("9.9.9.9:{port}"), true), Hint::NONE) else {
                panic!("no backend")
            };
            assert_eq!(choice.service, 1);
        }
    }
}

#[test]
fn a_client_from_outside_sticks_by_affinity_and_is_led_by_hash_afterwards() {
    let mut fake = Fake::default();
    let key = tcp("1.1.1.1:80");
    let places: Vec<u16> = (0..67).map(|place| place % 3).collect();
    let maglev = fake.table(&places);
    let frontend = fake.serve(key, 1, &["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
    (frontend.maglev, frontend.affinity) = (maglev, 10);
    let mut seen = std::collections::HashSet::new();
    for round in 0..50 {
        fake.now.set(round * 20 * SECOND);
        let [first, second] =
            [0, 1].map(|n| target(choose(&fake, &key, packet(&format!("9.9.9.9:{}", 1 + 2 * round + n), true), Hint::NONE)));
        assert_eq!(first, second);
        seen.insert(first);
    }
    assert_eq!(seen.len(), 3, "each expiry lets the hash decide anew");
}

#[test]
fn of_two_backends_the_one_with_fewer_connections() {
    let mut fake = Fake::default();
    let key = tcp("10.96.0.1:80");
    fake.serve(key, 1, &["10.0.0.1:80", "10.0.0.2:80"]).flags = frontend_flags::LEAST_CONNECTIONS;
    let ask = |random, open: [i64; 2]| {
        for (backend, count) in ["10.0.0.1:80", "10.0.0.2:80"].into_iter().zip(open) {
            fake.connections.borrow_mut().insert(BackendKey::new(endpoint(backend), 6), count);
        }
        fake.random.set(random);
        target(choose(&fake, &key, POD, Hint::NONE)).unwrap()
    };
    for random in [0, 1 << 31, u32::MAX] {
        assert_eq!(ask(random, [3, 1]), endpoint("10.0.0.2:80"));
        assert_eq!(ask(random, [1, 3]), endpoint("10.0.0.1:80"));
        assert_eq!(ask(random, [0, -1]), endpoint("10.0.0.2:80"));
    }
    assert_ne!(ask(0, [1, 1]), ask(u32::MAX, [1, 1]), "chance decides among equals");
}
