//! What becomes of connections: when endpoints, Services, modes and the agent itself change.
use outrigger_dataplane::Mode;

use super::Expect::{Ended, From, OneOf};
use super::{ALL, NOT_KEPT, Scenario, Step, VIP, cluster_ip, dial, open, ready, scenario, service, slice};
use crate::talk::Transport::{Tcp, Udp};
use crate::world::Place::{Node, Outside, PodA, PodB};

const NODE_PORT: &str = "192.168.78.1:30080";
const LED_ON: [(Mode, &str); 2] = [(Mode::Nftables, "the flow is led on instead"), (Mode::Userspace, "the flow is led on instead")];

pub fn list() -> Vec<Scenario> {
    let mut all = endpoints();
    all.extend(agent());
    all
}

fn endpoints() -> Vec<Scenario> {
    vec![
        scenario(
            "established connections live on when their Service changes",
            cluster_ip("") + &ready(ALL),
            vec![
                open("tcp", PodA, Tcp, VIP, OneOf(ALL)),
                Step::Apply(service("  type: NodePort")),
                Step::Same { id: "tcp" },
                Step::Delete(service("")),
                Step::Same { id: "tcp" },
            ],
        ),
        scenario(
            "UDP flows leave a backend that is gone",
            service("  type: NodePort") + &ready(&["a"]),
            vec![
                Step::OpenUnconnected { id: "pod", from: PodB, to: VIP.into(), expect: OneOf(&["a"]) },
                Step::OpenUnconnected { id: "outside", from: Outside, to: NODE_PORT.into(), expect: OneOf(&["a"]) },
                open("connected", Outside, Udp, NODE_PORT, OneOf(&["a"])),
                Step::Apply(ready(&["r"])),
                Step::Say { id: "pod", expect: From(&["r"]) },
                Step::Say { id: "outside", expect: From(&["r"]) },
                Step::Say { id: "connected", expect: From(&["r"]) },
                Step::Apply(ready(&["b"])),
                Step::Say { id: "outside", expect: From(&["b"]) },
            ],
        ),
        scenario(
            "UDP flows stay with a backend that drains, and leave it when it no longer serves",
            cluster_ip("") + &ready(&["a"]),
            vec![
                Step::OpenUnconnected { id: "udp", from: PodB, to: VIP.into(), expect: OneOf(&["a"]) },
                Step::Apply(slice(&[("a", "ready: false, serving: false, terminating: true"), ("r", "ready: true")])),
                Step::Say { id: "udp", expect: From(&["r"]) },
            ],
        ),
        scenario(
            "a UDP client that began before there was an endpoint",
            service("  type: NodePort") + &slice(&[]),
            vec![
                open("outside", Outside, Udp, NODE_PORT, super::Expect::Refused),
                Step::Apply(ready(&["a"])),
                Step::Say { id: "outside", expect: From(&["a"]) },
            ],
        ),
        scenario(
            "connected UDP sockets leave a backend that is gone",
            cluster_ip("") + &ready(&["a"]),
            vec![open("udp", PodB, Udp, VIP, OneOf(&["a"])), Step::Apply(ready(&["r"])), Step::Say { id: "udp", expect: From(&["r"]) }],
        )
        .unsupported(&[(Mode::Ebpf, "a connected socket has its backend's address itself; it's ended, so that its program connects anew")]),
        scenario(
            "a connected UDP socket is told that its backend is gone",
            cluster_ip("") + &ready(&["a"]),
            vec![open("udp", PodB, Udp, VIP, OneOf(&["a"])), Step::Apply(ready(&["r"])), Step::Say { id: "udp", expect: Ended }],
        )
        .unsupported(&LED_ON),
        scenario(
            "a client of a dead TCP backend is told at once",
            service("  type: NodePort") + &ready(&["a", "r"]),
            vec![
                Step::Apply(ready(&["a"])),
                open("pod", PodB, Tcp, VIP, OneOf(&["a"])),
                open("node", Node, Tcp, VIP, OneOf(&["a"])),
                open("outside", Outside, Tcp, NODE_PORT, OneOf(&["a"])),
                Step::Apply(ready(&["r"])),
                Step::Say { id: "pod", expect: Ended },
                Step::Say { id: "node", expect: Ended },
                Step::Say { id: "outside", expect: Ended },
                open("remote", Outside, Tcp, NODE_PORT, OneOf(&["r"])),
                Step::Apply(ready(&["a"])),
                Step::Say { id: "remote", expect: Ended },
            ],
        ),
        scenario(
            "an endpoint that can't be reached is passed over",
            cluster_ip("") + &slice(&[("quiet", "ready: true"), ("b", "ready: true"), ("nobody", "ready: true")]),
            vec![dial(PodA, Tcp, VIP, From(&["b"]))],
        )
        .unsupported(&[
            (Mode::Ebpf, "the client's own kernel connects to the endpoint; there is nobody who could try another"),
            (Mode::Nftables, "the client's own kernel connects to the endpoint; there is nobody who could try another"),
        ]),
    ]
}

fn agent() -> Vec<Scenario> {
    vec![
        scenario(
            "established connections live on when the agent is killed and comes back",
            service("  type: NodePort") + &ready(ALL),
            vec![
                open("tcp", PodA, Tcp, VIP, OneOf(ALL)),
                open("udp", PodA, Udp, VIP, OneOf(ALL)),
                open("node", Node, Tcp, VIP, OneOf(ALL)),
                open("outside", Outside, Tcp, NODE_PORT, OneOf(ALL)),
                open("outside-udp", Outside, Udp, NODE_PORT, OneOf(ALL)),
                Step::KillAndRestart,
                Step::Same { id: "tcp" },
                Step::Same { id: "udp" },
                Step::Same { id: "node" },
                Step::Same { id: "outside" },
                Step::Same { id: "outside-udp" },
                dial(PodA, Tcp, VIP, From(ALL)),
            ],
        )
        .unsupported(&[NOT_KEPT]),
        scenario(
            "a backend that vanished while the agent was down: its clients are told, others live on",
            service("  type: NodePort") + &ready(&["a"]),
            vec![
                open("pod", PodB, Tcp, VIP, OneOf(&["a"])),
                open("outside", Outside, Tcp, NODE_PORT, OneOf(&["a"])),
                Step::OpenUnconnected { id: "udp", from: PodB, to: VIP.into(), expect: OneOf(&["a"]) },
                Step::Apply(ready(&["a", "r"])),
                Step::KillApplyRestart(ready(&["r"])),
                Step::Say { id: "pod", expect: Ended },
                Step::Say { id: "outside", expect: Ended },
                Step::Say { id: "udp", expect: From(&["r"]) },
            ],
        ),
        scenario(
            "a Service that was deleted while the agent was down is gone afterwards",
            cluster_ip("") + &super::named_service("web2", "10.96.0.11", 30081, "") + &ready(&["a"]) + &second(&["a"]),
            vec![
                dial(PodB, Tcp, "10.96.0.11:80", From(&["a"])),
                Step::KillApplyRestart("---\nkind: Service\nmetadata: {name: web2, namespace: default}\nspec: {clusterIP: None}\n".into()),
                dial(PodB, Tcp, "10.96.0.11:80", super::Expect::TimedOut),
                dial(PodB, Tcp, VIP, From(&["a"])),
            ],
        ),
        scenario(
            "switching the mode and back keeps connections",
            cluster_ip("") + &ready(ALL),
            vec![
                open("tcp", PodA, Tcp, VIP, OneOf(ALL)),
                Step::SwitchTo(Mode::Nftables),
                Step::Same { id: "tcp" },
                open("tcp2", PodA, Tcp, VIP, OneOf(ALL)),
                Step::SwitchTo(Mode::Userspace),
                Step::Same { id: "tcp" },
                Step::Same { id: "tcp2" },
                open("tcp3", PodA, Tcp, VIP, OneOf(ALL)),
                Step::SwitchTo(Mode::Nftables),
                Step::Same { id: "tcp" },
                Step::Same { id: "tcp2" },
                Step::Same { id: "tcp3" },
                Step::SwitchTo(Mode::Ebpf),
                Step::Same { id: "tcp" },
                Step::Same { id: "tcp2" },
                Step::Same { id: "tcp3" },
                dial(PodA, Tcp, VIP, From(ALL)),
            ],
        ),
    ]
}

fn second(names: &[&str]) -> String {
    super::named_slice("web2", &names.iter().map(|name| (*name, "ready: true")).collect::<Vec<_>>(), &[])
}
