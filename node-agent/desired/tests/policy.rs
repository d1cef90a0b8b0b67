//! Policies, namespaces and pods in, what this node's pods may do out.
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use outrigger_desired::policy::{Change, LocalPod, NamedPort, Pod, PodPolicy, Policies, PolicyTable, Ports, Rules};
use outrigger_desired::{Protocol, ServiceName, Watched};
use serde_json::{Value, json};

fn policy(name: &str, spec: Value) -> Change {
    let object = json!({"metadata": {"name": name, "namespace": "ns"}, "spec": spec});
    Change::Policy(Watched::Applied(Arc::new(serde_json::from_value(object).expect("the test's policies are right"))))
}

fn no_policy(name: &str) -> Change {
    match policy(name, json!({})) {
        Change::Policy(Watched::Applied(object)) => Change::Policy(Watched::Deleted(object)),
        other => other,
    }
}

fn namespace(name: &str, labels: Value) -> Change {
    let object = json!({"metadata": {"name": name, "labels": labels}});
    Change::Namespace(Watched::Applied(Arc::new(serde_json::from_value(object).expect("the test's namespaces are right"))))
}

/// `labels` as in `a=1,b=2`; ports as in `web=TCP/80`.
fn pod_of(name: &str, labels: &str, addresses: &[&str], ports: &[&str]) -> Pod {
    let (namespace, name) = name.split_once('/').unwrap_or(("ns", name));
    let port = |text: &&str| {
        let (name, rest) = text.split_once('=')?;
        let (protocol, number) = rest.split_once('/')?;
        Some(NamedPort { name: name.into(), protocol: Protocol::parse(Some(protocol))?, number: number.parse().ok()? })
    };
    Pod {
        name: ServiceName::new(namespace, name),
        labels: labels.split(',').filter_map(|label| label.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect(),
        addresses: addresses.iter().map(|address| address.parse().expect("an address")).collect(),
        host_network: false,
        over: false,
        ports: ports.iter().filter_map(port).collect(),
    }
}

fn applied(pod: Pod) -> Change {
    Change::Pod(Watched::Applied(Arc::new(pod)))
}

fn pod(name: &str, labels: &str, address: &str) -> Change {
    applied(pod_of(name, labels, &[address], &[]))
}

fn local(pods: &[(&str, &str)]) -> Change {
    let one = |(name, address): &(&str, &str)| LocalPod {
        sandbox: format!("box-{name}").into(),
        pod: Some(ServiceName::new("ns", name)),
        addresses: vec![address.parse().expect("an address")],
        interface: format!("veth-{name}"),
    };
    Change::Local(pods.iter().map(one).collect())
}

/// A cluster of two namespaces with two pods each; of them `ns/a` is here, at 10.0.0.1.
fn cluster() -> Vec<Change> {
    vec![
        namespace("ns", json!({"team": "blue"})),
        namespace("other", json!({"team": "red", "kubernetes.io/metadata.name": "other"})),
        applied(pod_of("a", "app=a", &["10.0.0.1"], &["web=TCP/8080", "web=UDP/8081", "more=TCP/9000"])),
        applied(pod_of("b", "app=b", &["10.0.1.2", "fd00::2"], &["web=TCP/80"])),
        pod("other/a", "app=a", "10.0.2.1"),
        applied(pod_of("other/b", "app=b", &["10.0.2.2"], &["web=TCP/81", "dns=UDP/53"])),
        local(&[("a", "10.0.0.1")]),
    ]
}

/// Follows changes, and compares each step with a start from nothing.
#[derive(Default)]
struct Node {
    heard: Vec<Change>,
    policies: Policies,
}

impl Node {
    fn of(changes: Vec<Change>) -> Self {
        let mut node = Self::default();
        changes.into_iter().for_each(|change| _ = node.hear(change));
        node
    }

    fn hear(&mut self, change: Change) -> bool {
        let before = self.policies.table().clone();
        self.policies.apply(&change);
        let changed = self.policies.update();
        assert_eq!(changed, before != *self.policies.table());
        self.heard.push(change);
        let mut fresh = Policies::default();
        self.heard.iter().for_each(|change| fresh.apply(change));
        fresh.update();
        assert_eq!(fresh.table(), self.policies.table(), "step by step is as from nothing");
        changed
    }
}

fn ports(ports: &Ports) -> String {
    match ports {
        Ports::All => "all".into(),
        Ports::Only(ranges) if ranges.is_empty() => "none".into(),
        Ports::Only(ranges) => {
            let one = |range: &outrigger_desired::policy::PortRange| match (range.first, range.last) {
                (0, u16::MAX) => range.protocol.to_string(),
                (first, last) if first == last => format!("{}/{first}", range.protocol),
                (first, last) => format!("{}/{first}-{last}", range.protocol),
            };
            ranges.iter().map(one).collect::<Vec<_>>().join(",")
        }
    }
}

fn direction(rules: &Option<Arc<Rules>>) -> String {
    let Some(rules) = rules else { return "open".into() };
    if rules.peers.is_empty() {
        return "closed".into();
    }
    rules.peers.iter().map(|(net, allowed)| format!("{net}={}", ports(allowed))).collect::<Vec<_>>().join(" ")
}

/// A line per pod: who may come in, where it may go.
fn text(table: &PolicyTable) -> String {
    let mut text = String::new();
    for (sandbox, pod) in &table.pods {
        let _ = writeln!(text, "{sandbox} < {} > {}", direction(&pod.ingress), direction(&pod.egress));
    }
    text
}

/// What `ns/a` may do under these policies.
fn check(specs: &[Value], expected: &str) {
    let mut node = Node::of(cluster());
    for (number, spec) in specs.iter().enumerate() {
        node.hear(policy(&format!("p{number}"), spec.clone()));
    }
    assert_eq!(text(node.policies.table()), format!("box-a {expected}\n"), "{specs:?}");
}

#[test]
fn who_is_isolated_in_which_direction() {
    for (spec, expected) in [
        (json!({"podSelector": {}}), "< closed > open"),
        (json!({"podSelector": {"matchLabels": {"app": "b"}}}), "< open > open"),
        (json!({"podSelector": {"matchLabels": {"app": "a"}}}), "< closed > open"),
        (json!({"podSelector": {}, "policyTypes": ["Ingress"], "egress": [{}]}), "< closed > open"),
        (json!({"podSelector": {}, "policyTypes": ["Egress"]}), "< open > closed"),
        (json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]}), "< open > closed"),
        (json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}), "< closed > closed"),
        // Without types: ingress always, egress where it has rules.
        (json!({"podSelector": {}, "egress": [{}]}), "< closed > 0.0.0.0/0=all ::/0=all"),
        (json!({"podSelector": {}, "egress": []}), "< closed > open"),
        (json!({"podSelector": {}, "ingress": [{}]}), "< 0.0.0.0/0=all ::/0=all > open"),
        (json!({"podSelector": {}, "ingress": [{"from": [], "ports": []}]}), "< 0.0.0.0/0=all ::/0=all > open"),
        (json!({"podSelector": {}, "ingress": []}), "< closed > open"),
    ] {
        check(&[spec], expected);
    }
}

#[test]
fn label_selectors() {
    let with =
        |key: &str, operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
    for (selector, selected) in [
        (with("app", "In", &["x", "a"]), true),
        (with("app", "In", &["x"]), false),
        (with("app", "NotIn", &["x"]), true),
        (with("app", "NotIn", &["a"]), false),
        (with("missing", "NotIn", &["a"]), true),
        (with("app", "Exists", &[]), true),
        (with("missing", "Exists", &[]), false),
        (with("app", "DoesNotExist", &[]), false),
        (with("missing", "DoesNotExist", &[]), true),
        (json!({"matchLabels": {"app": "a"}, "matchExpressions": [{"key": "tier", "operator": "Exists"}]}), false),
        (Value::Null, true),
    ] {
        check(&[json!({"podSelector": selector})], if selected { "< closed > open" } else { "< open > open" });
    }
}

#[test]
fn peers() {
    let app = |name: &str| json!({"matchLabels": {"app": name}});
    let team = |name: &str| json!({"matchLabels": {"team": name}});
    for (peers, expected) in [
        (json!([{"podSelector": {}}]), "10.0.0.1/32=all 10.0.1.2/32=all fd00::2/128=all"),
        (json!([{"podSelector": app("b")}]), "10.0.1.2/32=all fd00::2/128=all"),
        (json!([{"namespaceSelector": {}}]), "10.0.0.1/32=all 10.0.1.2/32=all 10.0.2.1/32=all 10.0.2.2/32=all fd00::2/128=all"),
        (json!([{"namespaceSelector": team("red")}]), "10.0.2.1/32=all 10.0.2.2/32=all"),
        (json!([{"namespaceSelector": team("red"), "podSelector": app("a")}]), "10.0.2.1/32=all"),
        (json!([{"namespaceSelector": {}, "podSelector": app("a")}]), "10.0.0.1/32=all 10.0.2.1/32=all"),
        // Two peers are both, one with two selectors is what has both.
        (json!([{"namespaceSelector": team("red")}, {"podSelector": app("a")}]), "10.0.0.1/32=all 10.0.2.1/32=all 10.0.2.2/32=all"),
        (json!([{"podSelector": app("none")}]), "closed"),
        (json!([{"namespaceSelector": team("green")}]), "closed"),
        (json!([{"ipBlock": {"cidr": "192.168.0.0/16"}}]), "192.168.0.0/16=all"),
        (json!([{"ipBlock": {"cidr": "192.168.1.5/16"}}]), "192.168.0.0/16=all"),
        (json!([{"ipBlock": {"cidr": "010.000.0.0/8"}}]), "10.0.0.0/8=all"),
        (json!([{"ipBlock": {"cidr": "fd00::/8", "except": ["fd00:1::/32"]}}]), "fd00::/8=all fd00:1::/32=none"),
        (json!([{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["not one"]}}]), "closed"),
    ] {
        check(&[json!({"podSelector": {}, "ingress": [{"from": peers}]})], &format!("< {expected} > open"));
        check(&[json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": peers}]})], &format!("< open > {expected}"));
    }
}

#[test]
fn ports_by_number() {
    for (ports, expected) in [
        (json!([{"port": 80}]), "TCP/80"),
        (json!([{"port": 80, "protocol": "UDP"}, {"port": 7, "protocol": "SCTP"}]), "UDP/80,SCTP/7"),
        (json!([{"port": 80, "endPort": 90}]), "TCP/80-90"),
        (json!([{"port": 80, "endPort": 90}, {"port": 91}, {"port": 85}, {"port": 93}]), "TCP/80-91,TCP/93"),
        (json!([{"protocol": "UDP"}]), "UDP"),
        (json!([{}]), "TCP"),
    ] {
        let from = json!([{"ipBlock": {"cidr": "9.0.0.0/8"}}]);
        check(&[json!({"podSelector": {}, "ingress": [{"from": from, "ports": ports}]})], &format!("< 9.0.0.0/8={expected} > open"));
        let everybody = format!("< 0.0.0.0/0={expected} ::/0={expected} > open");
        check(&[json!({"podSelector": {}, "ingress": [{"ports": ports}]})], &everybody);
    }
}

#[test]
fn named_ports_are_those_of_the_pod_that_is_spoken_to() {
    let from = json!([{"ipBlock": {"cidr": "9.0.0.0/8"}}]);
    for (ports, expected) in [
        (json!([{"port": "web"}]), "9.0.0.0/8=TCP/8080"),
        (json!([{"port": "web", "protocol": "UDP"}]), "9.0.0.0/8=UDP/8081"),
        (json!([{"port": "web"}, {"port": "more"}, {"port": 1}]), "9.0.0.0/8=TCP/1,TCP/8080,TCP/9000"),
        (json!([{"port": "unknown"}]), "closed"),
    ] {
        check(&[json!({"podSelector": {}, "ingress": [{"from": from, "ports": ports}]})], &format!("< {expected} > open"));
    }
    for (to, ports, expected) in [
        (json!([{"podSelector": {}}]), json!([{"port": "web"}]), "10.0.0.1/32=TCP/8080 10.0.1.2/32=TCP/80 fd00::2/128=TCP/80"),
        (json!([{"namespaceSelector": {}}]), json!([{"port": "dns", "protocol": "UDP"}]), "10.0.2.2/32=UDP/53"),
        (
            json!([{"podSelector": {}}]),
            json!([{"port": "web"}, {"port": 1}]),
            "10.0.0.1/32=TCP/1,TCP/8080 10.0.1.2/32=TCP/1,TCP/80 fd00::2/128=TCP/1,TCP/80",
        ),
        // Nobody but a pod has named ports, wherever it is named by its address.
        (json!([]), json!([{"port": "dns", "protocol": "UDP"}]), "10.0.2.2/32=UDP/53"),
        (
            json!([{"ipBlock": {"cidr": "10.0.0.0/16", "except": ["10.0.2.0/24"]}}]),
            json!([{"port": "web"}]),
            "10.0.0.1/32=TCP/8080 10.0.1.2/32=TCP/80",
        ),
    ] {
        let spec = json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": to, "ports": ports}]});
        check(&[spec], &format!("< open > {expected}"));
    }
}

#[test]
fn rules_and_policies_add_up() {
    let block = |cidr: &str, except: &[&str]| json!([{"ipBlock": {"cidr": cidr, "except": except}}]);
    let rules = |rules: Value| json!({"podSelector": {}, "ingress": rules});
    // A covering prefix's ports hold further in.
    check(
        &[rules(
            json!([{"from": block("10.0.0.0/8", &[]), "ports": [{"port": 80}]}, {"from": block("10.1.0.0/16", &[]), "ports": [{"port": 81}]}]),
        )],
        "< 10.0.0.0/8=TCP/80 10.1.0.0/16=TCP/80-81 > open",
    );
    // An exception cuts its own block only.
    check(
        &[
            rules(json!([{"from": block("10.0.0.0/8", &["10.1.0.0/16"]), "ports": [{"port": 80}]}])),
            rules(json!([{"from": block("10.0.0.0/8", &[]), "ports": [{"port": 81}]}])),
        ],
        "< 10.0.0.0/8=TCP/80-81 10.1.0.0/16=TCP/81 > open",
    );
    // A block within an exception.
    check(
        &[rules(json!([{"from": block("10.0.0.0/8", &["10.1.0.0/16"])}, {"from": block("10.1.1.0/24", &[]), "ports": [{"port": 1}]}]))],
        "< 10.0.0.0/8=all 10.1.0.0/16=none 10.1.1.0/24=TCP/1 > open",
    );
    // A pod within an exception is still a pod; one in a block that holds all is nothing new.
    check(
        &[rules(json!([{"from": block("10.0.0.0/16", &["10.0.1.0/24"])}, {"from": [{"podSelector": {}}]}]))],
        "< 10.0.0.0/16=all 10.0.1.0/24=none 10.0.1.2/32=all fd00::2/128=all > open",
    );
    check(
        &[rules(json!([{"from": block("10.0.0.0/16", &[])}, {"from": [{"podSelector": {}}], "ports": [{"port": 1}]}]))],
        "< 10.0.0.0/16=all fd00::2/128=TCP/1 > open",
    );
    // An exception that another block fills says nothing.
    check(
        &[rules(json!([{"from": block("10.0.0.0/8", &["10.1.0.0/16"])}, {"from": block("10.0.0.0/8", &[])}]))],
        "< 10.0.0.0/8=all > open",
    );
}

#[test]
fn pods_without_an_address_of_their_own_are_no_peers() {
    let mut node = Node::of(cluster());
    node.hear(policy("p", json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}]})));
    let b = || pod_of("b", "app=b", &["10.0.1.2"], &[]);
    for (pod, expected) in [
        (b(), "10.0.1.2/32=all"),
        (Pod { host_network: true, ..b() }, "closed"),
        (Pod { over: true, ..b() }, "closed"),
        (Pod { addresses: Vec::new(), ..b() }, "closed"),
    ] {
        node.hear(applied(pod));
        assert_eq!(text(node.policies.table()), format!("box-a < {expected} > open\n"));
    }
}

#[test]
fn a_pod_is_closed_until_it_is_known() {
    let mut node = Node::of(vec![namespace("ns", json!({})), local(&[("late", "10.0.0.9")])]);
    assert_eq!(text(node.policies.table()), "box-late < closed > closed\n");
    assert!(!node.policies.knows("box-late"));
    assert!(node.hear(pod("late", "app=a", "10.0.0.9")));
    assert_eq!(text(node.policies.table()), "box-late < open > open\n");
    assert!(node.policies.knows("box-late"));
    // Gone from the API, its processes still end: nothing says any more what they may do.
    node.hear(Change::Pod(Watched::Deleted(Arc::new(pod_of("late", "app=a", &["10.0.0.9"], &[])))));
    assert_eq!(text(node.policies.table()), "box-late < closed > closed\n");
    node.hear(local(&[]));
    assert_eq!(text(node.policies.table()), "");
}

#[test]
fn a_network_of_unnoted_owner_is_known_by_its_address() {
    let mut node = Node::of(cluster());
    node.hear(policy("p", json!({"podSelector": {"matchLabels": {"app": "a"}}})));
    let unnamed = |address: &str| {
        let addresses = vec![address.parse().expect("an address")];
        Change::Local(vec![LocalPod { sandbox: "old".into(), pod: None, addresses, interface: "veth".into() }])
    };
    node.hear(unnamed("10.0.0.7"));
    assert_eq!(text(node.policies.table()), "old < closed > closed\n");
    node.hear(pod("other/c", "app=a", "10.0.0.7"));
    assert_eq!(text(node.policies.table()), "old < open > open\n", "the policy is another namespace's");
    node.hear(unnamed("10.0.0.1"));
    assert_eq!(text(node.policies.table()), "old < closed > open\n");
}

#[test]
fn changes_reach_the_pods_that_they_concern() {
    let mut node = Node::of(cluster());
    node.hear(policy("in", json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "red"}}}]}]})));
    node.hear(local(&[("a", "10.0.0.1"), ("b", "10.0.1.2")]));
    let rules = |node: &Node, sandbox: &str| node.policies.table().pods[sandbox].ingress.clone().expect("isolated");
    assert!(Arc::ptr_eq(&rules(&node, "box-a"), &rules(&node, "box-b")), "one value for both");
    let before = rules(&node, "box-a");
    assert!(!node.hear(pod("c", "app=c", "10.0.0.3")), "no rule means it");
    assert!(!node.hear(policy("elsewhere", json!({"podSelector": {"matchLabels": {"app": "none"}}}))));
    assert!(Arc::ptr_eq(&before, &rules(&node, "box-a")), "nothing was compiled again");
    assert!(node.hear(pod("other/c", "app=c", "10.0.2.3")));
    assert_eq!(direction(&Some(rules(&node, "box-a"))), "10.0.2.1/32=all 10.0.2.2/32=all 10.0.2.3/32=all");
    assert!(node.hear(namespace("ns", json!({"team": "red"}))));
    assert!(node.hear(namespace("other", json!({"team": "blue"}))));
    assert_eq!(direction(&Some(rules(&node, "box-b"))), "10.0.0.1/32=all 10.0.0.3/32=all 10.0.1.2/32=all fd00::2/128=all");
    // A pod's own labels decide which policies judge it.
    node.hear(policy("in", json!({"podSelector": {"matchLabels": {"app": "b"}}})));
    assert_eq!(text(node.policies.table()), "box-a < open > open\nbox-b < closed > open\n");
    node.hear(pod("a", "app=b", "10.0.0.1"));
    assert_eq!(text(node.policies.table()), "box-a < closed > open\nbox-b < closed > open\n");
    node.hear(no_policy("in"));
    assert_eq!(text(node.policies.table()), "box-a < open > open\nbox-b < open > open\n");
}

#[test]
fn a_new_list_takes_away_what_is_not_in_it() {
    let mut node = Node::of(cluster());
    let spec = json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]});
    node.hear(policy("p", spec));
    node.hear(Change::Pod(Watched::Replaced(Arc::new(vec![Arc::new(pod_of("a", "app=a", &["10.0.0.1"], &[]))]))));
    assert_eq!(text(node.policies.table()), "box-a < 10.0.0.1/32=all > open\n");
    node.hear(Change::Namespace(Watched::Replaced(Arc::default())));
    assert_eq!(text(node.policies.table()), "box-a < closed > open\n");
    node.hear(Change::Policy(Watched::Replaced(Arc::default())));
    assert_eq!(text(node.policies.table()), "box-a < open > open\n");
}

/// Small numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn one_of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

/// One peer of a rule, written down both for the API and for asking plainly.
fn random_rule(dice: &mut Dice) -> (Value, Box<dyn Fn(IpAddr, u16) -> bool>) {
    let first = dice.below(6) as u16;
    let last = first + dice.below(3) as u16;
    let (ports, in_ports): (Value, Box<dyn Fn(u16) -> bool>) = match dice.below(3) {
        0 => (json!([]), Box::new(|_| true)),
        _ => (json!([{"port": first + 1, "endPort": last + 1}]), Box::new(move |port| (first + 1..=last + 1).contains(&port))),
    };
    let net: IpNet =
        dice.one_of(&["10.0.0.0/8", "10.0.0.0/24", "10.0.0.0/30", "10.0.0.4/30", "10.0.0.2/32", "0.0.0.0/0"]).parse().expect("a block");
    let except: Vec<IpNet> = ["10.0.0.0/29", "10.0.0.2/31", "10.0.0.0/32", "10.0.0.5/32"]
        .iter()
        .map(|text| text.parse::<IpNet>().expect("a block"))
        .filter(|except| net.contains(except) && net != *except && dice.below(2) == 0)
        .collect();
    let app = dice.one_of(&["a", "b"]);
    let (peer, is_peer): (Value, Box<dyn Fn(IpAddr) -> bool>) = match dice.below(4) {
        0 => {
            // Pods of app a have even addresses, see below.
            let even = app == "a";
            let is = move |ip: IpAddr| matches!(ip, IpAddr::V4(ip) if ip.octets()[..3] == [10, 0, 0] && ip.octets()[3] < 8 && (ip.octets()[3] % 2 == 0) == even);
            (json!({"podSelector": {"matchLabels": {"app": app}}}), Box::new(is))
        }
        _ => {
            let block = json!({"ipBlock": {"cidr": net, "except": except}});
            (block, Box::new(move |ip| net.contains(&ip) && !except.iter().any(|except| except.contains(&ip))))
        }
    };
    (json!({"from": [peer], "ports": ports}), Box::new(move |ip, port| is_peer(ip) && in_ports(port)))
}

/// As an enforcer judges: by the longest prefix that has the address.
fn allows(pod: &PodPolicy, ip: IpAddr, port: u16) -> bool {
    let Some(rules) = &pod.ingress else { return true };
    let longest = rules.peers.iter().filter(|(net, _)| net.contains(&ip)).max_by_key(|(net, _)| net.prefix_len());
    match longest {
        Some((_, Ports::All)) => true,
        Some((_, Ports::Only(ranges))) => {
            ranges.iter().any(|range| range.protocol == Protocol::Tcp && (range.first..=range.last).contains(&port))
        }
        None => false,
    }
}

#[test]
fn the_longest_prefix_says_what_all_rules_say() {
    let mut dice = Dice(7);
    for round in 0..300 {
        let mut changes = vec![namespace("ns", json!({})), local(&[("me", "10.9.9.9")]), pod("me", "app=me", "10.9.9.9")];
        changes.extend((0..8).map(|number| {
            let app = if number % 2 == 0 { "app=a" } else { "app=b" };
            pod(&format!("pod-{number}"), app, &format!("10.0.0.{number}"))
        }));
        let rules: Vec<_> = (0..1 + dice.below(5)).map(|_| random_rule(&mut dice)).collect();
        let written: Vec<&Value> = rules.iter().map(|(value, _)| value).collect();
        changes.push(policy("p", json!({"podSelector": {}, "ingress": written})));
        let mut policies = Policies::default();
        changes.iter().for_each(|change| policies.apply(change));
        policies.update();
        let pod = &policies.table().pods["box-me"];
        for ip in (0..12).map(|last| format!("10.0.0.{last}")).chain(["10.1.0.1".into(), "11.0.0.1".into()]) {
            let ip: IpAddr = ip.parse().unwrap();
            for port in 1..10 {
                let plainly = rules.iter().any(|(_, allows)| allows(ip, port));
                assert_eq!(allows(pod, ip, port), plainly, "round {round}: {ip} {port} under {written:?}\n{}", text(policies.table()));
            }
        }
    }
}

#[test]
fn ten_thousand_pods_are_taken_in_and_one_of_them_changes() {
    let mut policies = Policies::default();
    let all: Vec<_> = (0..10_000_u32)
        .map(|number| {
            let address = format!("10.{}.{}.{}", number >> 14, (number >> 7) & 127, number & 127);
            Arc::new(pod_of(&format!("pod-{number}"), &format!("app=app-{}", number % 50), &[&address], &[]))
        })
        .collect();
    for change in [
        namespace("ns", json!({})),
        Change::Pod(Watched::Replaced(Arc::new(all))),
        policy("all", json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]})),
        policy("one", json!({"podSelector": {}, "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "app-7"}}}]}]})),
        local(&[("pod-1", "10.0.0.1")]),
    ] {
        policies.apply(&change);
    }
    policies.update();
    let egress = policies.table().pods["box-pod-1"].egress.clone().expect("isolated");
    assert_eq!(
        (policies.table().pods["box-pod-1"].ingress.as_ref().map(|rules| rules.peers.len()), egress.peers.len()),
        (Some(10_000), 200)
    );
    policies.apply(&pod("pod-5", "app=app-5", "10.99.0.1"));
    assert!(policies.update());
    assert!(Arc::ptr_eq(&egress, policies.table().pods["box-pod-1"].egress.as_ref().expect("isolated")), "unrelated rules stay");
}
