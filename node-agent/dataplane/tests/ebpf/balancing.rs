//! Which backend a connection gets: by its hash from outside, by counts of connections where a Service wants that.
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

use outrigger_dataplane::Parting;
use serde_json::{Value, json};

use crate::host::ip;
use crate::lab::{Agent, Lab, Network, service, slice};
use crate::{ask, many, read_name, serve_tcp, serve_udp};

const BACKENDS: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.1.2"];
const CLIENT_PORTS: std::ops::Range<u16> = 41_000..41_060;

fn endpoints(ips: &[&str]) -> Value {
    slice("web", "8080/UDP", ips)
}

/// Who answers each of the client's ports.
fn answers(lab: &Lab, network: &Network) -> Vec<String> {
    let one = |port: u16| {
        let socket = lab.unhooked(|| network.client.run(move || UdpSocket::bind(("0.0.0.0", port)))).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(b"?", "10.1.0.1:30080").unwrap();
        let mut buffer = [0; 64];
        let (length, _) = socket.recv_from(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    CLIENT_PORTS.map(one).collect()
}

/// Services that clients outside reach: more than the tables of one page of the map are for.
fn others() -> Vec<Value> {
    let one = |n: u32| {
        let (name, ip) = (format!("s{n}"), |net: u32| format!("10.{net}.{}.{}", n / 250, n % 250 + 1));
        let spec = json!({"externalIPs": [ip(98)]});
        [service(&name, &ip(97), "80/UDP", spec), slice(&name, "8080/UDP", &[BACKENDS[0], &ip(99)])]
    };
    (0..600).flat_map(one).collect()
}

/// What another node is, or this one after it was started: it has no flows, and other Services.
fn anew(mut agent: Agent, lab: &Lab, others: &[Value], ips: &[&str]) -> Agent {
    agent.part(Parting::Final);
    drop(agent);
    let mut agent = lab.agent();
    assert_eq!(agent.found, 0);
    agent.apply(others);
    agent.apply(&[service("web", "10.96.0.1", "80/UDP", json!({"type": "NodePort", "nodePort": 30080})), endpoints(ips)]);
    agent
}

#[test]
fn a_node_that_lost_its_flows_leads_connections_as_before() {
    Lab::run(&[], |lab| {
        let network = Network::new();
        network.pod.ip(&["addr add 10.0.0.2/32 dev eth0"]);
        ip("route add 10.0.0.2/32 dev pod");
        network.other.ip(&["addr add 10.0.1.2/32 dev lo"]);
        network.pod.run(|| ["10.0.0.1:8080", "10.0.0.2:8080"].into_iter().for_each(serve_udp));
        network.other.run(|| ["10.0.1.1:8080", "10.0.1.2:8080"].into_iter().for_each(serve_udp));
        let agent = anew(lab.agent(), lab, &[], &BACKENDS);
        let first = answers(lab, &network);
        for backend in BACKENDS {
            let share = first.iter().filter(|name| name.starts_with(&format!("{backend}:"))).count();
            assert!((5..=30).contains(&share), "{backend} has {share} of {}", first.len());
        }
        let agent = anew(agent, lab, &others(), &BACKENDS);
        assert_eq!(answers(lab, &network), first);
        // With one backend less, hardly any other connection is led elsewhere.
        let gone = BACKENDS[1];
        let _agent = anew(agent, lab, &[], &[BACKENDS[0], BACKENDS[2], BACKENDS[3]]);
        let others = answers(lab, &network);
        let moved = first.iter().zip(&others).filter(|(before, after)| !before.starts_with(&format!("{gone}:")) && before != after).count();
        assert!(moved <= 3 && others.iter().all(|name| !name.starts_with(&format!("{gone}:"))), "{moved} moved");
    });
}

fn open(dial: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(dial).unwrap();
    let name = read_name(&mut stream).unwrap();
    (stream, name)
}

#[test]
fn least_connections_follow_sockets_that_open_close_and_outlive_the_agent() {
    const WEB: &str = "10.96.0.1:80";
    Lab::run(&["10.0.0.1/32", "10.0.0.2/32"], |lab| {
        let (one, two) = ("10.0.0.1:8080", "10.0.0.2:8080");
        [one, two].into_iter().for_each(serve_tcp);
        let mut web = service("web", "10.96.0.1", "80/TCP", json!({}));
        web["metadata"]["annotations"] = json!({"outrigger.dev/balancing": "least-connections"});
        let mut agent = lab.agent();
        agent.apply(&[web.clone(), slice("web", "8080/TCP", &["10.0.0.1"])]);
        let held: Vec<_> = (0..3).map(|_| open(WEB)).collect();
        agent.apply(&[slice("web", "8080/TCP", &["10.0.0.1", "10.0.0.2"])]);
        assert_eq!(many(|| ask(WEB).unwrap()), [two], "each connection is over before the next");
        drop(agent);
        let mut agent = lab.agent();
        agent.apply(&[web, slice("web", "8080/TCP", &["10.0.0.1", "10.0.0.2"])]);
        assert_eq!(many(|| ask(WEB).unwrap()), [two], "the kernel counts on");
        // A duplicate is the same socket: it is open until the last descriptor of it is closed.
        let duplicates: Vec<_> = held.iter().map(|(stream, _)| stream.try_clone().unwrap()).collect();
        drop(held);
        assert_eq!(many(|| ask(WEB).unwrap()), [two]);
        drop(duplicates);
        let mut names: Vec<_> = (0..10).map(|_| open(WEB)).collect();
        assert_eq!(names.iter().filter(|(_, name)| name == one).count(), 5, "in turn");
        names.retain(|(_, name)| name == two);
        assert_eq!(many(|| ask(WEB).unwrap()), [one]);
    });
}
