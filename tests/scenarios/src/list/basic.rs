//! ClusterIPs: who answers, over which protocols and families.
use outrigger_dataplane::Mode;

use super::Expect::{From, OneOf, Refused};
use super::{ALL, Scenario, Settings, Step, VIP, cluster_ip, dial, ready, scenario, sees, service, slice};
use crate::talk::Transport::{Tcp, Udp};
use crate::world::Place::{Node, Outside, PodA, PodB};

pub fn list() -> Vec<Scenario> {
    vec![
        scenario(
            "ClusterIP over TCP, from pods and from the node, to local and remote endpoints",
            cluster_ip("") + &ready(ALL),
            vec![
                dial(PodA, Tcp, VIP, From(ALL)),
                dial(PodB, Tcp, VIP, From(ALL)),
                dial(Node, Tcp, VIP, From(ALL)),
                Step::Stream { from: PodA, to: VIP.into() },
            ],
        ),
        scenario(
            "ClusterIP over UDP, connected and not",
            cluster_ip("") + &ready(ALL),
            vec![
                dial(PodA, Udp, VIP, From(ALL)),
                dial(Node, Udp, VIP, From(ALL)),
                Step::OpenUnconnected { id: "u", from: PodB, to: VIP.into(), expect: OneOf(ALL) },
                Step::Same { id: "u" },
            ],
        ),
        dual_stack(),
        scenario(
            "pods keep their address towards endpoints",
            cluster_ip("") + &ready(&["r"]),
            vec![dial(PodA, Tcp, VIP, sees("r", "10.244.1.10")), dial(PodA, Udp, VIP, sees("r", "10.244.1.10"))],
        ),
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
            "a port that isn't the Service's is refused",
            cluster_ip("") + &ready(&["a"]),
            vec![
                dial(PodB, Tcp, VIP, From(&["a"])),
                dial(PodB, Tcp, "10.96.0.10:81", Refused),
                dial(Node, Tcp, "10.96.0.10:81", Refused),
                dial(PodB, Udp, "10.96.0.10:81", Refused),
            ],
        ),
        scenario(
            "headless Services, ExternalNames and those of another proxy are left alone",
            [
                cluster_ip("").replace("10.96.0.10", "None"),
                cluster_ip("  type: ExternalName\n  externalName: example.com").replace("name: web", "name: far"),
                cluster_ip("").replace("name: web,", "name: other, labels: {service.kubernetes.io/service-proxy-name: other},"),
                ready(ALL),
            ]
            .concat(),
            vec![dial(PodB, Tcp, VIP, super::Expect::TimedOut)],
        ),
        scenario(
            "masquerade-all: endpoints see the node",
            cluster_ip("") + &ready(&["r"]),
            vec![dial(PodA, Tcp, VIP, sees("r", "192.168.77.1")), dial(PodA, Udp, VIP, sees("r", "192.168.77.1"))],
        )
        .with(Settings { masquerade_all: true, ..Settings::default() })
        .unsupported(&[(Mode::Ebpf, "a pod's socket dials the endpoint itself; there is no translation that could change its source")]),
        scenario(
            "from outside to a ClusterIP: the node bridges in",
            cluster_ip("") + &ready(&["r"]),
            vec![dial(Outside, Tcp, VIP, sees("r", "192.168.77.1")), dial(Outside, Udp, VIP, sees("r", "192.168.77.1"))],
        ),
        scenario(
            "pods told apart by their interfaces",
            cluster_ip("") + &ready(&["r"]),
            vec![dial(PodA, Tcp, VIP, sees("r", "10.244.1.10")), dial(Outside, Tcp, VIP, sees("r", "192.168.77.1"))],
        )
        .with(Settings { pod_interface_prefix: Some("pod-"), ..Settings::default() }),
        scenario(
            "a Service that changes its ports and its address",
            cluster_ip("") + &ready(&["a"]),
            vec![
                dial(PodB, Tcp, VIP, From(&["a"])),
                Step::Apply(cluster_ip("").replace("port: 80,", "port: 81,")),
                dial(PodB, Tcp, "10.96.0.10:81", From(&["a"])),
                dial(PodB, Tcp, VIP, Refused),
                Step::Apply(service("").replace("10.96.0.10", "10.96.0.11")),
                dial(PodB, Tcp, "10.96.0.11:80", From(&["a"])),
                dial(PodB, Udp, "10.96.0.11:80", From(&["a"])),
            ],
        ),
    ]
}

fn dual_stack() -> Scenario {
    let six = |text: String| text.replace("web-1", "web-6");
    let service = cluster_ip("").replace("clusterIPs: [10.96.0.10]", "clusterIPs: [10.96.0.10, 'fd00:96::10']");
    let objects = service + &ready(&["a"]) + &six(super::counterpart(&ready(&["b"])));
    let (four, six_vip, mapped) = (VIP, "[fd00:96::10]:80", "[::ffff:10.96.0.10]:80");
    scenario(
        "dual-stack: each family has its endpoints, and IPv6 sockets may dial IPv4",
        objects,
        vec![
            dial(PodA, Tcp, four, From(&["a"])),
            dial(PodA, Udp, four, From(&["a"])),
            dial(PodA, Tcp, six_vip, From(&["b"])),
            dial(PodA, Udp, six_vip, From(&["b"])),
            dial(PodA, Tcp, mapped, From(&["a"])),
            dial(PodA, Udp, mapped, From(&["a"])),
            Step::OpenUnconnected { id: "mapped", from: PodB, to: mapped.into(), expect: OneOf(&["a"]) },
            Step::Same { id: "mapped" },
            dial(Node, Tcp, six_vip, From(&["b"])),
        ],
    )
    .once()
}
