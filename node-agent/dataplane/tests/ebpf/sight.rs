//! What the programs count and tell.
use std::time::{Duration, Instant};

use outrigger_dataplane::sight::{Event, Reason, What};
use serde_json::json;

use crate::lab::{Agent, Lab, Network, service, slice};
use crate::{ask, client, serve_tcp, serve_udp};

const PATIENCE: Duration = Duration::from_secs(5);

fn eventually(mut check: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

#[test]
fn connections_bytes_and_failures_are_counted_by_backend() {
    Lab::run(&["10.0.0.1/32", "10.0.0.2/32"], |lab| {
        serve_tcp("10.0.0.1:8080");
        serve_tcp("10.0.0.2:8080");
        let mut agent = lab.agent();
        agent.apply(&[
            service("web", "10.96.0.1", "80/TCP", json!({})),
            slice("web", "8080/TCP", &["10.0.0.1", "10.0.0.2"]),
            service("dead", "10.96.0.2", "80/TCP", json!({})),
            slice("dead", "9999/TCP", &["10.0.0.1"]),
            service("empty", "10.96.0.3", "80/TCP", json!({})),
        ]);
        (0..20).for_each(|_| _ = ask("10.96.0.1:80").unwrap());
        // Each answer is `10.0.0.1:8080` and a line's end.
        let counted = || {
            let counted = agent.counted("web");
            let (sent, received) =
                counted.backends.values().filter_map(|traffic| traffic.bytes).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
            let connects: u64 = counted.connect.map_or(0, |connect| connect.buckets.iter().sum());
            (counted.connections, counted.backends.values().map(|traffic| traffic.connections).sum::<u64>(), sent, received, connects)
        };
        // The backend's FIN counts as a byte when it comes while the client's socket is there.
        assert!(eventually(|| matches!(counted(), (20, 20, 0, 280..=300, 20))), "{:?}", counted());
        assert!(ask("10.96.0.2:80").is_err() && ask("10.96.0.3:80").is_err() && ask("10.96.0.3:81").is_err());
        let dead = agent.counted("dead");
        assert_eq!((dead.connections, dead.drops.get(&Reason::ConnectFailed)), (1, Some(&1)));
        assert_eq!(dead.backends.values().map(|traffic| traffic.failed).collect::<Vec<_>>(), [Some(1)]);
        assert_eq!(agent.counted("empty").drops, [(Reason::NoEndpoint, 1)].into());
        assert_eq!(agent.counts().stray, [(Reason::NoPort, 1)].into());
        // Another Service that gets a former one's index begins with nothing.
        agent.forget(&service("dead", "10.96.0.2", "80/TCP", json!({})));
        agent.apply(&[service("new", "10.96.0.4", "80/TCP", json!({})), slice("new", "9999/TCP", &["10.0.0.1"])]);
        assert_eq!(agent.counted("new"), Default::default());
    });
}

#[test]
fn what_happens_is_told_while_somebody_listens() {
    Lab::run(&["10.0.0.1/32"], |lab| {
        serve_tcp("10.0.0.1:8080");
        serve_udp("10.0.0.1:5353");
        let mut agent = lab.agent();
        agent.apply(&[
            service("web", "10.96.0.1", "80/TCP", json!({})),
            slice("web", "8080/TCP", &["10.0.0.1"]),
            service("dns", "10.96.0.2", "53/UDP", json!({})),
            slice("dns", "5353/UDP", &["10.0.0.1"]),
            service("empty", "10.96.0.3", "80/TCP", json!({})),
        ]);
        ask("10.96.0.1:80").unwrap();
        assert!(eventually(|| agent.counted("web").backends.values().any(|traffic| traffic.bytes.is_some_and(|bytes| bytes.1 > 0))));
        assert!(agent.events().is_empty(), "nobody has listened before");
        ask("10.96.0.1:80").unwrap();
        assert!(ask("10.96.0.3:80").is_err());
        crate::ask_udp(&client("0.0.0.0:0"), "10.96.0.2:53").unwrap();
        let events = collect(&agent, 4);
        let of = |what, service: &str| events.iter().find(|event| event.what == what && name(event) == service).unwrap();
        let opened = of(What::Opened, "web");
        assert_eq!(opened.source.unwrap().ip().to_string(), "10.0.0.1");
        assert_eq!(opened.frontend.unwrap().to_string(), "10.96.0.1:80");
        assert_eq!(opened.backend.unwrap().to_string(), "10.0.0.1:8080");
        assert!(opened.took.is_some_and(|took| took < PATIENCE));
        let closed = of(What::Closed, "web");
        assert!(matches!(closed.bytes, Some((0, 14 | 15))), "{closed:?}");
        assert_eq!(closed.source, opened.source);
        assert_eq!(of(What::Opened, "dns").protocol, 17);
        assert_eq!(of(What::Refused(Reason::NoEndpoint), "empty").frontend.unwrap().to_string(), "10.96.0.3:80");
    });
}

fn name(event: &Event) -> &str {
    event.service.as_ref().map_or("", |name| name.service.name())
}

fn collect(agent: &Agent, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    eventually(|| {
        events.extend(agent.events());
        events.len() >= count
    });
    assert_eq!(events.len(), count, "{events:?}");
    events
}

#[test]
fn connections_from_outside_are_told_with_their_clients() {
    Lab::run(&[], |lab| {
        let network = Network::new();
        lab.unhooked(|| network.pod.run(|| serve_tcp("10.0.0.1:8080")));
        let mut agent = lab.agent();
        agent.apply(&[
            service("web", "10.96.0.1", "80/TCP", json!({"type": "NodePort", "nodePort": 30080})),
            slice("web", "8080/TCP", &["10.0.0.1"]),
        ]);
        assert!(agent.events().is_empty());
        lab.unhooked(|| network.client.run(|| ask("10.1.0.1:30080").unwrap()));
        let events = collect(&agent, 2);
        assert_eq!(events.iter().map(|event| event.what).collect::<Vec<_>>(), [What::Opened, What::Closed]);
        assert!(events.iter().all(|event| event.source.unwrap().ip().to_string() == "10.1.0.9" && name(event) == "web"), "{events:?}");
        assert_eq!(agent.counted("web").connections, 1);
    });
}
