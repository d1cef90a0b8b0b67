//! What must hold, for every backend. What one can't do is named with its reason.
use outrigger_dataplane::Mode;

use crate::talk::Transport::{self, Tcp, Udp};
use crate::world::Place::{self, Node, Outside, PodA, PodB, Remote};

#[derive(Clone, Debug)]
pub enum Step {
    /// Objects that are new or changed.
    Apply(String),
    Delete(String),
    /// Connects several times.
    Dial {
        from: Place,
        transport: Transport,
        to: &'static str,
        expect: Expect,
    },
    Open {
        id: &'static str,
        from: Place,
        transport: Transport,
        to: &'static str,
        expect: Expect,
    },
    /// An unconnected UDP socket: the answer must come from the address that was asked.
    OpenUnconnected {
        id: &'static str,
        from: Place,
        to: &'static str,
        expect: Expect,
    },
    /// On a connection that was opened before: the answer must be the one of the first time.
    Same {
        id: &'static str,
    },
    Say {
        id: &'static str,
        expect: Expect,
    },
    /// A megabyte goes there and comes back, though the sender closes its half first.
    Stream {
        from: Place,
        to: &'static str,
    },
    KillAndRestart,
    SwitchTo(Mode),
    Sleep(std::time::Duration),
}

#[derive(Clone, Debug)]
pub enum Expect {
    /// Over several dials all of these answer, and nobody else.
    From(&'static [&'static str]),
    /// This one answers, and sees the client at this address.
    Sees(&'static str, &'static str),
    /// Over several dials always the same one answers.
    OneOf(&'static [&'static str]),
    Refused,
    /// Refused or reset: the client is told at once.
    Ended,
    TimedOut,
}

#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub objects: String,
    pub steps: Vec<Step>,
    pub unsupported: &'static [(Mode, &'static str)],
}

const VIP: &str = "10.96.0.10:80";
const USERSPACE_SOURCE: (Mode, &str) = (Mode::Userspace, "the forwarding process is the backend's peer; keeping the source needs TPROXY");
const USERSPACE_PROCESS: (Mode, &str) = (Mode::Userspace, "connections run through the agent's process and end with it");

/// A Service with one port 80 on TCP and UDP; `more` is further YAML of its spec, indented by two.
pub fn service(more: &str) -> String {
    format!(
        "---
kind: Service
metadata: {{name: web, namespace: default}}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  ports:
  - {{name: tcp, port: 80, protocol: TCP, targetPort: 8080, nodePort: 30080}}
  - {{name: udp, port: 80, protocol: UDP, targetPort: 8080, nodePort: 30080}}
{more}
"
    )
}

/// A Service that only has its ClusterIP.
pub fn cluster_ip(more: &str) -> String {
    service(more).replace(", nodePort: 30080", "")
}

/// The Service's slice; each endpoint is `(pod, conditions)`.
pub fn slice(endpoints: &[(&str, &str)]) -> String {
    let mut text = String::from(
        "---
kind: EndpointSlice
addressType: IPv4
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
ports:
- {name: tcp, port: 8080, protocol: TCP}
- {name: udp, port: 8080, protocol: UDP}
endpoints:",
    );
    if endpoints.is_empty() {
        text.push_str(" []");
    }
    for (name, conditions) in endpoints {
        let (ip, node) = match *name {
            "a" => ("10.244.1.10", "node-1"),
            "b" => ("10.244.1.11", "node-1"),
            "r" => ("10.244.2.10", "node-2"),
            // Nothing listens there.
            _ => ("10.244.1.99", "node-1"),
        };
        text.push_str(&format!("\n- {{addresses: [{ip}], nodeName: {node}, conditions: {{{conditions}}}}}"));
    }
    text.push('\n');
    text
}

fn ready(names: &[&str]) -> String {
    slice(&names.iter().map(|name| (*name, "ready: true")).collect::<Vec<_>>())
}

fn dial(from: Place, transport: Transport, to: &'static str, expect: Expect) -> Step {
    Step::Dial { from, transport, to, expect }
}

fn open(id: &'static str, from: Place, transport: Transport, to: &'static str, expect: Expect) -> Step {
    Step::Open { id, from, transport, to, expect }
}

fn scenario(name: &'static str, objects: String, steps: Vec<Step>) -> Scenario {
    Scenario { name, objects, steps, unsupported: &[] }
}

pub fn all() -> Vec<Scenario> {
    use Expect::{Ended, From, OneOf, Refused, Sees, TimedOut};
    let all: &'static [&'static str] = &["a", "b", "r"];
    vec![
        scenario(
            "ClusterIP over TCP, from pods and from the node, to local and remote endpoints",
            cluster_ip("") + &ready(&["a", "b", "r"]),
            vec![
                dial(PodA, Tcp, VIP, From(all)),
                dial(PodB, Tcp, VIP, From(all)),
                dial(Node, Tcp, VIP, From(all)),
                Step::Stream { from: PodA, to: VIP },
            ],
        ),
        scenario(
            "ClusterIP over UDP, connected and not",
            cluster_ip("") + &ready(&["a", "b", "r"]),
            vec![
                dial(PodA, Udp, VIP, From(all)),
                dial(Node, Udp, VIP, From(all)),
                Step::OpenUnconnected { id: "u", from: PodB, to: VIP, expect: OneOf(all) },
                Step::Same { id: "u" },
            ],
        ),
        Scenario {
            unsupported: &[USERSPACE_SOURCE],
            ..scenario(
                "pods keep their address towards endpoints",
                cluster_ip("") + &ready(&["r"]),
                vec![dial(PodA, Tcp, VIP, Sees("r", "10.244.1.10")), dial(PodA, Udp, VIP, Sees("r", "10.244.1.10"))],
            )
        },
        scenario(
            "hairpin: a pod reaches itself through its Service",
            cluster_ip("") + &ready(&["a"]),
            vec![dial(PodA, Tcp, VIP, From(&["a"])), dial(PodA, Udp, VIP, From(&["a"]))],
        ),
        scenario(
            "no endpoints: refused at once, for a new Service and for one that lost them",
            cluster_ip("") + &slice(&[]),
            vec![
                dial(PodA, Tcp, VIP, Refused),
                dial(Node, Tcp, VIP, Refused),
                dial(PodA, Udp, VIP, Refused),
                Step::Apply(ready(&["b"])),
                dial(PodA, Tcp, VIP, From(&["b"])),
                Step::Apply(slice(&[])),
                dial(PodA, Tcp, VIP, Refused),
                dial(PodA, Udp, VIP, Refused),
            ],
        ),
        scenario(
            "endpoints come and go",
            cluster_ip("") + &ready(&["a"]),
            vec![
                dial(PodB, Tcp, VIP, From(&["a"])),
                Step::Apply(ready(&["a", "b"])),
                dial(PodB, Tcp, VIP, From(&["a", "b"])),
                Step::Apply(ready(&["b", "r"])),
                dial(PodB, Tcp, VIP, From(&["b", "r"])),
                Step::Delete(ready(&["b", "r"])),
                dial(PodB, Tcp, VIP, Refused),
            ],
        ),
        scenario(
            "terminating endpoints serve only while nobody else can, and keep what they have",
            cluster_ip("") + &ready(&["a", "b"]),
            vec![
                Step::Apply(ready(&["a"])),
                open("kept", PodB, Tcp, VIP, OneOf(&["a"])),
                Step::Apply(slice(&[("a", "ready: false, serving: true, terminating: true"), ("r", "ready: true")])),
                dial(PodB, Tcp, VIP, From(&["r"])),
                Step::Same { id: "kept" },
                Step::Apply(slice(&[("a", "ready: false, serving: true, terminating: true")])),
                dial(PodB, Tcp, VIP, From(&["a"])),
                Step::Apply(slice(&[("a", "ready: false, serving: false, terminating: true")])),
                dial(PodB, Tcp, VIP, Refused),
            ],
        ),
        scenario(
            "two Services with the same address space and a port that isn't theirs",
            cluster_ip("") + &ready(&["a"]),
            vec![dial(PodB, Tcp, VIP, From(&["a"])), dial(PodB, Tcp, "10.96.0.10:81", Refused), dial(Node, Tcp, "10.96.0.10:81", Refused)],
        ),
        scenario(
            "NodePort from outside, from pods and from the node",
            service("  type: NodePort") + &ready(&["a", "b", "r"]),
            vec![
                dial(Outside, Tcp, "192.168.78.1:30080", From(all)),
                dial(Outside, Udp, "192.168.78.1:30080", From(all)),
                dial(Remote, Tcp, "192.168.77.1:30080", From(all)),
                dial(PodA, Tcp, "192.168.77.1:30080", From(all)),
                dial(Node, Tcp, "192.168.77.1:30080", From(all)),
                Step::Apply(slice(&[])),
                dial(Outside, Tcp, "192.168.78.1:30080", Refused),
                dial(Outside, Udp, "192.168.78.1:30080", Refused),
            ],
        ),
        Scenario {
            unsupported: &[USERSPACE_SOURCE],
            ..scenario(
                "externalTrafficPolicy Local keeps the client's address and uses this node's endpoints",
                service("  type: NodePort\n  externalTrafficPolicy: Local") + &ready(&["a", "r"]),
                vec![
                    dial(Outside, Tcp, "192.168.78.1:30080", Sees("a", "192.168.78.2")),
                    dial(PodB, Tcp, "192.168.77.1:30080", From(&["a", "r"])),
                    dial(Node, Tcp, "192.168.77.1:30080", From(&["a", "r"])),
                    Step::Apply(ready(&["r"])),
                    dial(Outside, Tcp, "192.168.78.1:30080", TimedOut),
                    dial(PodB, Tcp, "192.168.77.1:30080", From(&["r"])),
                ],
            )
        },
        scenario(
            "internalTrafficPolicy Local",
            cluster_ip("  internalTrafficPolicy: Local") + &ready(&["a", "r"]),
            vec![dial(PodB, Tcp, VIP, From(&["a"])), dial(Node, Tcp, VIP, From(&["a"]))],
        ),
        scenario(
            "session affinity: a client stays, until its time is over",
            cluster_ip("  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 300}}")
                + &ready(&["a", "b", "r"]),
            vec![
                dial(PodA, Tcp, VIP, OneOf(all)),
                dial(PodB, Tcp, VIP, OneOf(all)),
                dial(PodA, Udp, VIP, OneOf(all)),
                dial(Node, Tcp, VIP, OneOf(all)),
                Step::Apply(ready(&["b"])),
                dial(PodA, Tcp, VIP, From(&["b"])),
                Step::Apply(ready(&["a", "b", "r"])),
                dial(PodA, Tcp, VIP, OneOf(&["b"])),
            ],
        ),
        scenario(
            "externalIPs and load balancer addresses",
            service(
                "  type: LoadBalancer\n  externalIPs: [192.168.90.1]\nstatus: {loadBalancer: {ingress: [{ip: 192.168.90.2, ipMode: VIP}]}}",
            ) + &ready(&["a", "r"]),
            vec![
                dial(Outside, Tcp, "192.168.90.1:80", From(&["a", "r"])),
                dial(Outside, Tcp, "192.168.90.2:80", From(&["a", "r"])),
                dial(PodB, Tcp, "192.168.90.1:80", From(&["a", "r"])),
                dial(Node, Tcp, "192.168.90.2:80", From(&["a", "r"])),
            ],
        ),
        Scenario {
            unsupported: &[(Mode::Userspace, "a connection is accepted before its source is known; it's reset instead of dropped")],
            ..scenario(
                "loadBalancerSourceRanges",
                service(
                    "  type: LoadBalancer\n  loadBalancerSourceRanges: [10.244.0.0/16]\nstatus: {loadBalancer: {ingress: [{ip: 192.168.90.2}]}}",
                ) + &ready(&["a"]),
                vec![dial(PodB, Tcp, "192.168.90.2:80", From(&["a"])), dial(Outside, Tcp, "192.168.90.2:80", TimedOut)],
            )
        },
        scenario(
            "hostPort",
            "---
kind: Pod
metadata: {name: a, namespace: default}
spec: {nodeName: node-1, containers: [{name: c, ports: [{containerPort: 8080, hostPort: 9090}]}]}
status: {podIP: 10.244.1.10, podIPs: [{ip: 10.244.1.10}]}
"
            .into(),
            vec![
                dial(Outside, Tcp, "192.168.78.1:9090", From(&["a"])),
                dial(PodB, Tcp, "192.168.77.1:9090", From(&["a"])),
                dial(Node, Tcp, "192.168.77.1:9090", From(&["a"])),
            ],
        ),
        Scenario {
            unsupported: &[USERSPACE_PROCESS],
            ..scenario(
                "established connections live on when the agent is killed and comes back",
                cluster_ip("") + &ready(&["a", "b", "r"]),
                vec![
                    open("tcp", PodA, Tcp, VIP, OneOf(all)),
                    open("udp", PodA, Udp, VIP, OneOf(all)),
                    open("node", Node, Tcp, VIP, OneOf(all)),
                    Step::KillAndRestart,
                    Step::Same { id: "tcp" },
                    Step::Same { id: "udp" },
                    Step::Same { id: "node" },
                    dial(PodA, Tcp, VIP, From(all)),
                ],
            )
        },
        scenario(
            "established connections live on when their Service changes",
            cluster_ip("") + &ready(&["a", "b", "r"]),
            vec![
                open("tcp", PodA, Tcp, VIP, OneOf(all)),
                Step::Apply(service("  type: NodePort")),
                Step::Same { id: "tcp" },
                Step::Delete(service("")),
                Step::Same { id: "tcp" },
            ],
        ),
        scenario(
            "UDP flows leave a backend that is gone",
            cluster_ip("") + &ready(&["a"]),
            vec![
                Step::OpenUnconnected { id: "udp", from: PodB, to: VIP, expect: OneOf(&["a"]) },
                Step::Apply(ready(&["r"])),
                Step::Say { id: "udp", expect: From(&["r"]) },
            ],
        ),
        Scenario {
            unsupported: &[(
                Mode::Ebpf,
                "a connected socket has its backend's address itself; it's ended, so that its program connects anew",
            )],
            ..scenario(
                "connected UDP sockets leave a backend that is gone",
                cluster_ip("") + &ready(&["a"]),
                vec![open("udp", PodB, Udp, VIP, OneOf(&["a"])), Step::Apply(ready(&["r"])), Step::Say { id: "udp", expect: From(&["r"]) }],
            )
        },
        Scenario {
            unsupported: &[(Mode::Nftables, "the flow is led on instead"), (Mode::Userspace, "the flow is led on instead")],
            ..scenario(
                "a connected UDP socket is told that its backend is gone",
                cluster_ip("") + &ready(&["a"]),
                vec![open("udp", PodB, Udp, VIP, OneOf(&["a"])), Step::Apply(ready(&["r"])), Step::Say { id: "udp", expect: Ended }],
            )
        },
        scenario(
            "a client of a dead TCP backend is told at once",
            cluster_ip("") + &ready(&["a"]),
            vec![open("tcp", PodB, Tcp, VIP, OneOf(&["a"])), Step::Apply(ready(&["r"])), Step::Say { id: "tcp", expect: Ended }],
        ),
        scenario(
            "switching the mode and back keeps connections",
            cluster_ip("") + &ready(&["a", "b", "r"]),
            vec![
                open("tcp", PodA, Tcp, VIP, OneOf(all)),
                Step::SwitchTo(Mode::Nftables),
                Step::Same { id: "tcp" },
                open("tcp2", PodA, Tcp, VIP, OneOf(all)),
                Step::SwitchTo(Mode::Userspace),
                Step::Same { id: "tcp" },
                Step::Same { id: "tcp2" },
                open("tcp3", PodA, Tcp, VIP, OneOf(all)),
                Step::SwitchTo(Mode::Nftables),
                Step::Same { id: "tcp" },
                Step::Same { id: "tcp2" },
                Step::Same { id: "tcp3" },
            ],
        ),
    ]
}
