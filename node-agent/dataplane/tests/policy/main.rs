//! Network policies on the real kernel, in namespaces of their own: one list of cases for both enforcers.
#![allow(clippy::unwrap_used, reason = "a failed precondition is a failed test")]
#[path = "../shared/host.rs"]
mod host;
mod lab;
mod talk;

use std::sync::Arc;

use host::ip;
use lab::Lab;
use outrigger_desired::Protocol;
use outrigger_desired::policy::{PodPolicy, PolicyTable, PortRange, Ports, Rules};
use talk::{Tcp, Udp, ping, serve, tcp, udp};

/// Rules as text: `10.0.0.0/8 tcp:80 udp:53-60`, `fd00::/8` for all ports, `10.0.0.9/32 none`.
fn rules(lines: &[&str]) -> Option<Rules> {
    let line = |line: &&str| {
        let mut words = line.split(' ');
        let net = words.next().unwrap().parse().unwrap();
        let ranges: Vec<PortRange> = words.clone().filter(|word| *word != "none").map(range).collect();
        (net, if words.next().is_none() { Ports::All } else { Ports::Only(ranges.into()) })
    };
    Some(Rules { peers: lines.iter().map(line).collect() })
}

fn range(word: &str) -> PortRange {
    let (protocol, ports) = word.split_once(':').unwrap();
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let protocol = Protocol::parse(Some(&protocol.to_uppercase())).unwrap();
    PortRange { protocol, first: first.parse().unwrap(), last: last.parse().unwrap() }
}

fn nothing() -> Option<Rules> {
    rules(&[])
}

const OPEN: lab::Isolation = (None, None);

fn serve_all(lab: &Lab) {
    for port in [80, 81, 90] {
        serve(&lab.a, &format!("10.0.0.1:{port}"));
        serve(&lab.a, &format!("[fd00::1]:{port}"));
        serve(&lab.b, &format!("10.0.0.2:{port}"));
        serve(&lab.b, &format!("[fd00::2]:{port}"));
        serve(&lab.outside, &format!("10.1.0.9:{port}"));
        serve(&lab.outside, &format!("[fd01::9]:{port}"));
    }
}

#[test]
fn isolated_for_ingress() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        assert!(tcp(&lab.b, "10.0.0.1:80"));
        let applied = agent.apply((nothing(), None), OPEN);
        assert_eq!((applied.pods, applied.rules, applied.absent.len()), (1, 1, 0));
        assert!(!tcp(&lab.b, "10.0.0.1:80") && !udp(&lab.b, "10.0.0.1:80") && !ping(&lab.b, "10.0.0.1"));
        assert!(!tcp(&lab.outside, "[fd00::1]:80") && !udp(&lab.outside, "[fd00::1]:80") && !ping(&lab.outside, "fd00::1"));
        assert!(agent.dropped("a").ingress >= 6 && agent.dropped("a").egress == 0, "{:?}", agent.dropped("a"));
        // What it opens itself is answered.
        for to in ["10.0.0.2", "10.1.0.9"] {
            assert!(tcp(&lab.a, &format!("{to}:80")) && udp(&lab.a, &format!("{to}:80")) && ping(&lab.a, to), "{to}");
        }
        for to in ["fd00::2", "fd01::9"] {
            assert!(tcp(&lab.a, &format!("[{to}]:80")) && udp(&lab.a, &format!("[{to}]:80")) && ping(&lab.a, to), "{to}");
        }
        assert!(tcp(&lab.b, "10.1.0.9:80") && tcp(&lab.outside, "10.0.0.2:80"), "the other pod is as it was");
        agent.apply(OPEN, OPEN);
        assert!(tcp(&lab.b, "10.0.0.1:80") && ping(&lab.outside, "fd00::1"));
    });
}

#[test]
fn isolated_for_egress() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        agent.apply((None, rules(&["10.0.0.2/32 tcp:80", "fd00::2/128 udp:80-90"])), OPEN);
        assert!(tcp(&lab.a, "10.0.0.2:80") && !tcp(&lab.a, "10.0.0.2:81") && !udp(&lab.a, "10.0.0.2:80") && !ping(&lab.a, "10.0.0.2"));
        assert!(!tcp(&lab.a, "[fd00::2]:80") && udp(&lab.a, "[fd00::2]:80") && udp(&lab.a, "[fd00::2]:90"));
        assert!(!tcp(&lab.a, "10.1.0.9:80") && !ping(&lab.a, "fd01::9"));
        assert!(agent.dropped("a").egress > 0 && agent.dropped("a").ingress == 0, "{:?}", agent.dropped("a"));
        // Who asks it is answered.
        assert!(tcp(&lab.b, "10.0.0.1:90") && udp(&lab.outside, "[fd00::1]:80") && ping(&lab.outside, "10.0.0.1"));
    });
}

#[test]
fn both_ends_are_judged() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        let (to_b, from_a) = (|| (nothing(), rules(&["10.0.0.2/32 tcp:80-81"])), || (rules(&["10.0.0.1/32 tcp:81-90"]), nothing()));
        agent.apply(to_b(), from_a());
        assert!(tcp(&lab.a, "10.0.0.2:81") && !tcp(&lab.a, "10.0.0.2:80") && !tcp(&lab.a, "10.0.0.2:90"));
        assert!(!tcp(&lab.b, "10.0.0.1:81"));
        assert!(!tcp(&lab.outside, "10.0.0.2:81") && !tcp(&lab.a, "10.1.0.9:81"));
    });
}

#[test]
fn blocks_and_what_is_excepted() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        agent.apply((rules(&["0.0.0.0/0", "10.1.0.8/31 none", "10.1.0.9/32 tcp:81", "::/0 tcp:0-65535"]), None), OPEN);
        assert!(tcp(&lab.b, "10.0.0.1:80") && ping(&lab.b, "10.0.0.1"));
        assert!(!tcp(&lab.outside, "10.0.0.1:80") && tcp(&lab.outside, "10.0.0.1:81") && !ping(&lab.outside, "10.0.0.1"));
        assert!(tcp(&lab.outside, "[fd00::1]:80") && !udp(&lab.outside, "[fd00::1]:80") && !ping(&lab.outside, "fd00::1"));
        agent.apply((rules(&["::/0"]), None), OPEN);
        assert!(!tcp(&lab.b, "10.0.0.1:80") && tcp(&lab.b, "[fd00::1]:80") && ping(&lab.b, "fd00::1"), "the families are apart");
    });
}

#[test]
fn a_change_takes_effect_on_live_connections() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        let allowed = || rules(&["10.0.0.0/24 tcp:80 udp:80", "10.1.0.0/24 tcp:80 udp:80"]);
        let mut before = Tcp::open(&lab.a, "10.1.0.9:80").unwrap();
        assert!(before.ask());
        agent.apply((allowed(), allowed()), OPEN);
        assert!(before.ask(), "older than the isolation");
        let mut streams =
            [("in", Tcp::open(&lab.b, "10.0.0.1:80")), ("out", Tcp::open(&lab.a, "10.1.0.9:80"))].map(|(name, talk)| (name, talk.unwrap()));
        let datagrams = [Udp::open(&lab.outside, "10.0.0.1:80"), Udp::open(&lab.a, "10.0.0.2:80")];
        assert!(streams.iter_mut().all(|(_, talk)| talk.ask()) && datagrams.iter().all(Udp::ask));
        agent.apply((nothing(), nothing()), OPEN);
        for (name, talk) in &mut streams {
            assert!(!talk.ask(), "{name}");
        }
        assert!(!before.ask() && !datagrams.iter().any(Udp::ask));
        agent.apply((allowed(), allowed()), OPEN);
        for (name, talk) in &mut streams {
            assert!(talk.ask_again(), "{name}, allowed again");
        }
        assert!(datagrams.iter().all(Udp::ask));
    });
}

#[test]
fn connections_older_than_the_isolation() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        agent.apply(OPEN, OPEN);
        let (mut from, to) = (Tcp::open(&lab.b, "10.0.0.1:80").unwrap(), Udp::open(&lab.a, "10.0.0.2:80"));
        let mut out = Tcp::open(&lab.a, "10.0.0.2:80").unwrap();
        assert!(from.ask() && to.ask() && out.ask());
        agent.apply((None, nothing()), OPEN);
        assert!(from.ask(), "its clients keep it");
        assert!(!to.ask() && !out.ask(), "and it loses its servers");
        assert!(!to.ask() && !out.ask());
    });
}

#[test]
fn errors_about_allowed_connections_pass() {
    Lab::run(|lab| {
        let mut agent = lab.agent();
        agent.apply((rules(&["10.1.0.9/32 udp:7000"]), rules(&["10.0.0.2/32 udp:7000", "fd00::2/128 udp:7000"])), OPEN);
        assert!(Udp::open(&lab.a, "10.0.0.2:7000").is_refused() && Udp::open(&lab.a, "[fd00::2]:7000").is_refused());
        assert!(Udp::open(&lab.outside, "10.0.0.1:7000").is_refused());
        assert!(!Udp::open(&lab.outside, "10.0.0.1:7001").is_refused());
    });
}

#[test]
fn fragments_follow_their_first_part() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        let peers = || rules(&["10.0.0.0/24 udp:80", "fd00::/64 udp:80"]);
        agent.apply((nothing(), peers()), (peers(), nothing()));
        for to in ["10.0.0.2", "[fd00::2]"] {
            assert!(Udp::open(&lab.a, &format!("{to}:80")).ask_much(), "{to}");
            assert!(!Udp::open(&lab.a, &format!("{to}:81")).ask_much(), "{to}");
        }
    });
}

#[test]
fn the_node_and_its_pods_always_reach_each_other() {
    Lab::run(|lab| {
        serve_all(lab);
        let node = lab.node();
        for listen in ["10.1.0.1:80", "[fd01::1]:80"] {
            serve(&node, listen);
        }
        let mut agent = lab.agent();
        agent.apply((nothing(), nothing()), OPEN);
        assert!(tcp(&node, "10.0.0.1:80") && udp(&node, "10.0.0.1:80") && ping(&node, "10.0.0.1"));
        assert!(tcp(&node, "[fd00::1]:80") && udp(&node, "[fd00::1]:80") && ping(&node, "fd00::1"));
        assert!(tcp(&lab.a, "10.1.0.1:80") && tcp(&lab.a, "[fd01::1]:80") && ping(&lab.a, "10.1.0.1"));
        assert!(!tcp(&lab.a, "10.1.0.9:80") && !tcp(&lab.a, "[fd01::9]:80"));
        assert!(tcp(&lab.a, "10.0.0.1:80"), "and the pod itself");
        // Its neighbours are asked for anew.
        ip("neigh flush dev poda");
        lab.a.ip(&["neigh flush dev eth0"]);
        assert!(tcp(&node, "[fd00::1]:80") && tcp(&lab.a, "[fd01::1]:80"));
    });
}

#[test]
fn an_isolated_pod_cannot_use_other_addresses() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        lab.a.ip(&["addr add 10.0.0.77/32 dev eth0", "addr add fd00::77/128 dev eth0 nodad"]);
        ip("route add 10.0.0.77/32 dev poda");
        ip("route add fd00::77/128 dev poda");
        serve(&lab.a, "10.0.0.77:80");
        serve(&lab.a, "[fd00::77]:80");
        assert!(tcp(&lab.b, "10.0.0.77:80") && tcp(&lab.b, "[fd00::77]:80"));
        agent.apply((None, rules(&["0.0.0.0/0", "::/0"])), OPEN);
        assert!(!tcp(&lab.b, "10.0.0.77:80") && !tcp(&lab.b, "[fd00::77]:80"));
        assert!(tcp(&lab.b, "10.0.0.1:80") && tcp(&lab.a, "10.0.0.2:80"));
    });
}

#[test]
fn nothing_opens_while_no_agent_runs() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut agent = lab.agent();
        let some = || rules(&["10.0.0.2/32"]);
        agent.apply((some(), None), OPEN);
        let mut talk = Tcp::open(&lab.b, "10.0.0.1:80").unwrap();
        assert!(talk.ask());
        // As after kill -9: nothing is told to the kernel.
        drop(agent);
        assert!(!tcp(&lab.outside, "10.0.0.1:80") && talk.ask() && tcp(&lab.b, "10.0.0.1:80"));
        let mut agent = lab.agent();
        assert!(!tcp(&lab.outside, "10.0.0.1:80") && talk.ask());
        agent.apply((some(), None), OPEN);
        assert!(!tcp(&lab.outside, "10.0.0.1:80") && talk.ask());
        agent.apply((rules(&["10.1.0.0/24"]), None), OPEN);
        assert!(tcp(&lab.outside, "10.0.0.1:80") && !talk.ask());
        drop(agent);
        lab.agent().apply(OPEN, OPEN);
        assert!(talk.ask_again() && tcp(&lab.b, "10.0.0.1:81"), "no longer isolated");
        lab.agent().apply((nothing(), nothing()), (nothing(), nothing()));
        lab.agent().teardown();
        assert!(tcp(&lab.b, "10.0.0.1:80"));
        assert!(!lab.config.pin_dir.exists());
    });
}

#[test]
fn a_pod_that_comes_and_goes() {
    Lab::run(|lab| {
        let mut agent = lab.agent();
        let pod = |interface: &str| PodPolicy {
            addresses: vec!["10.0.0.3".parse().unwrap()],
            interface: interface.into(),
            ingress: nothing().map(Arc::new),
            egress: None,
        };
        let table = PolicyTable { pods: [("c".into(), pod("podc"))].into() };
        let absent = agent.apply_table(&table).absent;
        if lab.mode == outrigger_dataplane::Mode::Ebpf {
            assert_eq!(absent, ["c".into()]);
        }
        for _ in 0..2 {
            let host = lab::pod("podc", 3);
            serve(&host, "10.0.0.3:80");
            assert!(agent.apply_table(&table).absent.is_empty());
            assert!(!tcp(&lab.b, "10.0.0.3:80"));
            agent.apply_table(&PolicyTable::default());
            assert!(tcp(&lab.b, "10.0.0.3:80"));
            agent.apply_table(&table);
            ip("link del podc");
            agent.apply(OPEN, OPEN);
        }
    });
}

#[test]
fn pods_that_nobody_knows_are_closed() {
    Lab::run(|lab| {
        serve_all(lab);
        let mut config = lab.config.clone();
        config.pod_interfaces = Some(outrigger_dataplane::PodInterfaces::Prefix("pod".into()));
        let mut agent = lab.agent_with(&config);
        agent.apply_table(&PolicyTable::default());
        assert!(!tcp(&lab.b, "10.0.0.1:80") && !tcp(&lab.a, "10.1.0.9:80"));
        agent.apply(OPEN, OPEN);
        assert!(tcp(&lab.b, "10.0.0.1:80") && tcp(&lab.a, "10.1.0.9:80"));
    });
}
