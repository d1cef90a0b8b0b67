//! The text for a few tables, and intervals against the meaning of the rules.
use outrigger_desired::Protocol;

use super::*;

fn ports(protocol: Protocol, first: u16, last: u16) -> Ports {
    Ports::Only([PortRange { protocol, first, last }].into())
}

fn rules(peers: &[(&str, Ports)]) -> Option<Arc<Rules>> {
    Some(Arc::new(Rules { peers: peers.iter().map(|(net, ports)| (net.parse().unwrap(), ports.clone())).collect() }))
}

fn nothing() -> Ports {
    Ports::Only([].into())
}

#[test]
fn a_pod_comes_changes_and_goes() {
    let pod = PodPolicy {
        addresses: vec!["10.0.0.1".parse().unwrap()],
        interface: "veth1".into(),
        ingress: rules(&[("10.0.0.0/8", ports(Protocol::Tcp, 80, 90)), ("10.0.0.0/30", nothing()), ("fd00::/8", Ports::All)]),
        egress: None,
    };
    let mut table = PolicyTable { pods: [("a".into(), pod)].into() };
    let mut model = Model::default();
    let text = |model: &mut Model, table: &PolicyTable| model.apply(table).replace(" inet outrigger-policy", "");
    assert_eq!(
        text(&mut model, &table),
        "add set ports-3 { type inet_proto . inet_service; flags interval; elements = { tcp . 80-90 }; }
add chain ports-3-in
add rule ports-3-in meta l4proto . th dport @ports-3 accept
add chain ports-3-out
add rule ports-3-out meta l4proto . th dport @ports-3 goto to
add map peers-2-4 { type ipv4_addr : verdict; flags interval; elements = { 10.0.0.4-10.255.255.255 : goto ports-3-in }; }
add map peers-2-6 { type ipv6_addr : verdict; flags interval; elements = { fd00::-fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff : accept }; }
add chain rules-2
add rule rules-2 ip saddr vmap @peers-2-4
add rule rules-2 ip6 saddr vmap @peers-2-6
add counter drops-1-in
add chain to-1
flush chain to-1
add rule to-1 iifname \"veth1\" accept
add rule to-1 jump answers
add rule to-1 jump rules-2
add rule to-1 counter name drops-1-in drop
add element pods { \"veth1\" }
add element to { \"veth1\" : goto to-1 }
"
    );
    assert_eq!(text(&mut model, &table), "", "nothing to do");
    let pod = table.pods.get_mut("a").unwrap();
    (pod.ingress, pod.egress) = (None, rules(&[]));
    assert_eq!(
        text(&mut model, &table),
        "add chain rules-4
add counter drops-1-out
add chain from-1
flush chain from-1
add rule from-1 meta nfproto ipv4 ip saddr != { 10.0.0.1 } counter name drops-1-out drop
add rule from-1 meta nfproto ipv6 counter name drops-1-out drop
add rule from-1 oifname \"veth1\" accept
add rule from-1 jump answers
add rule from-1 jump rules-4
add rule from-1 counter name drops-1-out drop
delete element pods { \"veth1\" }
delete element to { \"veth1\" }
add element pods { \"veth1\" }
add element from { \"veth1\" : goto from-1 }
add element from4 { 10.0.0.1 : goto from-1 }
flush chain to-1
delete chain to-1
delete counter drops-1-in
flush chain rules-2
delete chain rules-2
flush map peers-2-4
delete map peers-2-4
flush map peers-2-6
delete map peers-2-6
flush chain ports-3-in
delete chain ports-3-in
flush chain ports-3-out
delete chain ports-3-out
delete set ports-3
"
    );
    assert_eq!(
        text(&mut model, &PolicyTable::default()),
        "delete element pods { \"veth1\" }
delete element from { \"veth1\" }
delete element from4 { 10.0.0.1 }
flush chain from-1
delete chain from-1
delete counter drops-1-out
flush chain rules-4
delete chain rules-4
"
    );
}

#[test]
fn intervals_say_what_the_longest_prefix_says() {
    let (a, b) = (ports(Protocol::Tcp, 1, 1), ports(Protocol::Udp, 2, 2));
    // Every set of these prefixes, for each address.
    let prefixes = ["0.0.0.0/0", "0.0.0.0/30", "0.0.0.0/32", "0.0.0.2/31", "0.0.0.3/32", "255.255.255.254/31", "255.255.255.255/32"];
    for chosen in 0..1_u32 << prefixes.len() {
        for values in [[&a, &b, &Ports::All], [&nothing(), &a, &nothing()], [&Ports::All, &nothing(), &a]] {
            let peers: Vec<_> =
                prefixes.iter().enumerate().filter(|(n, _)| chosen >> n & 1 == 1).map(|(n, net)| (*net, values[n % 3].clone())).collect();
            let rules = rules(&peers).unwrap();
            let found = intervals(&rules, true);
            assert!(found.windows(2).all(|pair| pair[0].1 < pair[1].0), "{found:?}");
            for ip in ["0.0.0.0", "0.0.0.1", "0.0.0.2", "0.0.0.3", "0.0.0.4", "255.255.255.253", "255.255.255.254", "255.255.255.255"] {
                let ip: IpAddr = ip.parse().unwrap();
                let longest = rules.peers.iter().filter(|(net, _)| net.contains(&ip)).max_by_key(|(net, _)| net.prefix_len());
                let expected = longest.map(|(_, ports)| ports).filter(|ports| **ports != nothing());
                let interval = found.iter().find(|(first, last, _)| (*first..=*last).contains(&ip)).map(|(.., ports)| *ports);
                assert_eq!(interval, expected, "{ip} of {peers:?}");
            }
            assert!(intervals(&rules, false).is_empty());
        }
    }
}
