//! Addresses that clients outside of the cluster reach: node ports, external addresses, load balancers, host ports, health checks.
use outrigger_dataplane::Mode;

use super::Expect::{From, Refused, TimedOut};
use super::{ALL, Scenario, Settings, Step, dial, named_service, open, ready, scenario, sees, service, slice};
use crate::talk::Transport::{Tcp, Udp};
use crate::world::Place::{Node, Outside, PodA, PodB, Remote};

const LOAD_BALANCER: &str = "status: {loadBalancer: {ingress: [{ip: 192.168.90.2, ipMode: VIP}]}}";

pub fn list() -> Vec<Scenario> {
    let mut all = node_ports();
    all.extend(load_balancers());
    all.extend(health_checks());
    all
}

fn node_ports() -> Vec<Scenario> {
    vec![
        scenario(
            "NodePort from outside, from pods and from the node",
            service("  type: NodePort") + &ready(ALL),
            vec![
                dial(Outside, Tcp, "192.168.78.1:30080", From(ALL)),
                dial(Outside, Udp, "192.168.78.1:30080", From(ALL)),
                dial(Remote, Tcp, "192.168.77.1:30080", From(ALL)),
                dial(PodA, Tcp, "192.168.77.1:30080", From(ALL)),
                dial(Node, Tcp, "192.168.77.1:30080", From(ALL)),
                Step::Apply(slice(&[])),
                dial(Outside, Tcp, "192.168.78.1:30080", Refused),
                dial(Outside, Udp, "192.168.78.1:30080", Refused),
            ],
        ),
        scenario(
            "NodePort on localhost",
            service("  type: NodePort") + &ready(ALL),
            vec![dial(Node, Tcp, "127.0.0.1:30080", From(ALL)), dial(Node, Udp, "127.0.0.1:30080", From(ALL))],
        )
        .unsupported(&[(
            Mode::Nftables,
            "packets from a loopback address may not leave the node; upstream's nftables mode refuses them too",
        )]),
        scenario(
            "nodeport-addresses: node ports answer there and nowhere else",
            service("  type: NodePort") + &ready(ALL),
            vec![
                dial(Outside, Tcp, "192.168.78.1:30080", From(ALL)),
                dial(Node, Tcp, "192.168.78.1:30080", From(ALL)),
                dial(Remote, Tcp, "192.168.77.1:30080", Refused),
                dial(Node, Tcp, "192.168.77.1:30080", Refused),
                dial(Remote, Udp, "192.168.77.1:30080", Refused),
            ],
        )
        .with(Settings { nodeport_addresses: &["192.168.78.0/24", "fd00:78::/64"], ..Settings::default() }),
        scenario(
            "externalTrafficPolicy Local keeps the client's address and uses this node's endpoints",
            service("  type: NodePort\n  externalTrafficPolicy: Local") + &ready(&["a", "r"]),
            vec![
                dial(Outside, Tcp, "192.168.78.1:30080", sees("a", "192.168.78.2")),
                dial(Outside, Udp, "192.168.78.1:30080", sees("a", "192.168.78.2")),
                dial(PodB, Tcp, "192.168.77.1:30080", From(&["a", "r"])),
                dial(Node, Tcp, "192.168.77.1:30080", From(&["a", "r"])),
                Step::Apply(slice(&[("a", "ready: false, serving: true, terminating: true"), ("r", "ready: true")])),
                dial(Outside, Tcp, "192.168.78.1:30080", From(&["a"])),
            ],
        ),
        scenario(
            "externalTrafficPolicy Local without endpoints here: dropped outside, served inside",
            service("  type: NodePort\n  externalTrafficPolicy: Local") + &ready(&["r"]),
            vec![
                dial(Outside, Tcp, "192.168.78.1:30080", TimedOut),
                dial(PodB, Tcp, "192.168.77.1:30080", From(&["r"])),
                dial(Node, Tcp, "192.168.77.1:30080", From(&["r"])),
            ],
        )
        .unsupported(&[(Mode::Userspace, "a connection is accepted before its source is known; it's reset instead of dropped")]),
        scenario(
            "one client port reaches one endpoint by two node ports",
            named_service("web", "10.96.0.10", 30080, "  type: NodePort")
                + &named_service("web2", "10.96.0.11", 30081, "  type: NodePort")
                + &ready(&["a"])
                + &super::named_slice("web2", &[("a", "ready: true")], &[]),
            vec![from_port("one", Outside, 30080), from_port("two", Outside, 30081), Step::Same { id: "one" }, Step::Same { id: "two" }],
        ),
        scenario(
            "hostPort",
            host_port(""),
            vec![
                dial(Outside, Tcp, "192.168.78.1:9090", From(&["a"])),
                dial(Outside, Udp, "192.168.78.1:9090", From(&["a"])),
                dial(PodB, Tcp, "192.168.77.1:9090", From(&["a"])),
                dial(Node, Tcp, "192.168.77.1:9090", From(&["a"])),
            ],
        ),
        scenario(
            "hostPort with a hostIP",
            host_port(", hostIP: 192.168.78.1"),
            vec![
                dial(Outside, Tcp, "192.168.78.1:9090", From(&["a"])),
                dial(Node, Tcp, "192.168.78.1:9090", From(&["a"])),
                dial(Remote, Tcp, "192.168.77.1:9090", Refused),
            ],
        ),
    ]
}

fn load_balancers() -> Vec<Scenario> {
    vec![
        scenario(
            "externalIPs and load balancer addresses",
            service(&format!("  type: LoadBalancer\n  externalIPs: [192.168.90.1]\n{LOAD_BALANCER}")) + &ready(&["a", "r"]),
            vec![
                dial(Outside, Tcp, "192.168.90.1:80", From(&["a", "r"])),
                dial(Outside, Tcp, "192.168.90.2:80", From(&["a", "r"])),
                dial(Outside, Udp, "192.168.90.2:80", From(&["a", "r"])),
                dial(PodB, Tcp, "192.168.90.1:80", From(&["a", "r"])),
                dial(Node, Tcp, "192.168.90.2:80", From(&["a", "r"])),
                Step::Apply(slice(&[])),
                dial(PodB, Tcp, "192.168.90.1:80", Refused),
                dial(Outside, Tcp, "192.168.90.2:80", Refused),
                dial(Outside, Udp, "192.168.90.1:80", Refused),
            ],
        ),
        scenario(
            "ipMode Proxy: the load balancer's address isn't this node's affair",
            service(&format!("  type: LoadBalancer\n{}", LOAD_BALANCER.replace("VIP", "Proxy"))) + &ready(&["a"]),
            vec![dial(PodB, Tcp, "192.168.90.2:80", TimedOut), dial(Outside, Tcp, "192.168.78.1:30080", From(&["a"]))],
        ),
        scenario(
            "a load balancer's address with externalTrafficPolicy Local",
            service(&format!("  type: LoadBalancer\n  externalTrafficPolicy: Local\n{LOAD_BALANCER}")) + &ready(&["a", "r"]),
            vec![
                dial(Outside, Tcp, "192.168.90.2:80", sees("a", "192.168.78.2")),
                dial(PodB, Tcp, "192.168.90.2:80", From(&["a", "r"])),
                dial(Node, Tcp, "192.168.90.2:80", From(&["a", "r"])),
            ],
        ),
        scenario(
            "loadBalancerSourceRanges, for clients outside, pods and the node",
            narrowed("10.244.1.10/32"),
            vec![
                dial(PodA, Tcp, "192.168.90.2:80", From(&["a"])),
                dial(PodA, Udp, "192.168.90.2:80", From(&["a"])),
                dial(PodB, Tcp, "192.168.90.2:80", TimedOut),
                dial(Node, Tcp, "192.168.90.2:80", TimedOut),
                dial(Outside, Tcp, "192.168.90.2:80", TimedOut),
                dial(Outside, Tcp, "192.168.78.1:30080", From(&["a"])),
                Step::Apply(narrowed("192.168.78.2")),
                dial(Outside, Tcp, "192.168.90.2:80", From(&["a"])),
                Step::Apply(narrowed("192.168.77.1")),
                dial(Node, Tcp, "192.168.90.2:80", From(&["a"])),
                Step::Apply(service(&format!("  type: LoadBalancer\n{LOAD_BALANCER}"))),
                dial(PodB, Tcp, "192.168.90.2:80", From(&["a"])),
            ],
        )
        .unsupported(&[(Mode::Userspace, "a connection is accepted before its source is known; it's reset instead of dropped")]),
    ]
}

fn health_checks() -> Vec<Scenario> {
    let head: &[&str] = &["content-type: application/json", "x-content-type-options: nosniff"];
    let probe = |from, status, contains| Step::Get { from, to: "192.168.78.1:31000".into(), path: "/", status, contains };
    let local = || service(&format!("  type: LoadBalancer\n  externalTrafficPolicy: Local\n  healthCheckNodePort: 31000\n{LOAD_BALANCER}"));
    vec![scenario(
        "healthCheckNodePort tells load balancers how many endpoints are here",
        local() + &ready(&["a", "r"]),
        vec![
            probe(Outside, 200, head),
            probe(
                Outside,
                200,
                &[
                    "x-load-balancing-endpoint-weight: 1",
                    "\"namespace\": \"default\"",
                    "\"name\": \"web\"",
                    "\"localEndpoints\": 1",
                    "\"serviceProxyHealthy\": true",
                ],
            ),
            Step::Apply(ready(&["a", "b"])),
            probe(Outside, 200, &["x-load-balancing-endpoint-weight: 2", "\"localEndpoints\": 2"]),
            Step::Apply(ready(&["r"])),
            probe(Outside, 503, &["x-load-balancing-endpoint-weight: 0", "\"localEndpoints\": 0", "\"serviceProxyHealthy\": true"]),
            Step::Apply(service("  type: NodePort")),
            dial(Outside, Tcp, "192.168.78.1:31000", super::Expect::Ended),
        ],
    )]
}

pub(super) fn narrowed(range: &str) -> String {
    let range = if range.contains('/') { range.to_owned() } else { format!("{range}/32") };
    let spec = format!("  type: LoadBalancer\n  loadBalancerSourceRanges: ['{range}']\n{LOAD_BALANCER}");
    service(&spec) + &ready(&["a"])
}

fn host_port(more: &str) -> String {
    let port = |protocol| format!("{{containerPort: 8080, hostPort: 9090, protocol: {protocol}{more}}}");
    format!(
        "---
kind: Pod
metadata: {{name: a, namespace: default}}
spec: {{nodeName: node-1, containers: [{{name: c, ports: [{}, {}]}}]}}
status: {{podIP: 10.244.1.10, podIPs: [{{ip: 10.244.1.10}}]}}
",
        port("TCP"),
        port("UDP")
    )
}

fn from_port(id: &'static str, from: crate::world::Place, node_port: u16) -> Step {
    match open(id, from, Tcp, &format!("192.168.78.1:{node_port}"), super::Expect::OneOf(&["a"])) {
        Step::Open { id, from, transport, to, expect, .. } => Step::Open { id, from, transport, to, expect, port: 10404 },
        other => other,
    }
}
