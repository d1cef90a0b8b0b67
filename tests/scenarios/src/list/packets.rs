//! What isn't a plain packet of a connection: fragments, ICMP errors, narrow paths.
use outrigger_dataplane::Mode;

use super::Expect::{From, Refused};
use super::{Scenario, Step, VIP, cluster_ip, dial, ready, scenario, service, slice};
use crate::talk::Transport::{Tcp, Udp};
use crate::world::Place::{Node, Outside, PodA, PodB};

const NO_ERRORS: (Mode, &str) = (Mode::Userspace, "a socket can't send ICMP errors, so what an endpoint answers by one is lost");

pub fn list() -> Vec<Scenario> {
    vec![
        scenario(
            "datagrams larger than a packet, there and back",
            service("  type: NodePort") + &ready(&["a", "r"]),
            vec![
                Step::Datagram { from: PodB, to: VIP.into(), bytes: 9000 },
                Step::Datagram { from: Outside, to: "192.168.78.1:30080".into(), bytes: 9000 },
                Step::Datagram { from: Outside, to: "192.168.78.1:30080".into(), bytes: 9000 },
                Step::Datagram { from: Outside, to: "192.168.78.1:30080".into(), bytes: 9000 },
                Step::Datagram { from: Outside, to: "192.168.78.1:30080".into(), bytes: 9000 },
            ],
        ),
        scenario(
            "an endpoint that doesn't listen: its ICMP errors reach the client, in the Service's name",
            service("  type: NodePort") + &slice(&[("quiet", "ready: true")]),
            vec![
                dial(PodB, Udp, VIP, Refused),
                dial(Node, Udp, VIP, Refused),
                dial(Outside, Udp, "192.168.78.1:30080", Refused),
                Step::Apply(slice(&[("quiet-r", "ready: true")])),
                dial(Outside, Udp, "192.168.78.1:30080", Refused),
                dial(PodA, Udp, "192.168.77.1:30080", Refused),
            ],
        )
        .unsupported(&[NO_ERRORS]),
        scenario(
            "a path that is narrower than its ends",
            service("  type: NodePort") + &ready(&["r"]),
            vec![
                Step::Run("ip route replace 10.244.2.0/24 via 192.168.77.2 mtu 1300".into()),
                dial(Outside, Tcp, "192.168.78.1:30080", From(&["r"])),
                Step::Stream { from: Outside, to: "192.168.78.1:30080".into() },
                Step::Stream { from: PodA, to: VIP.into() },
                Step::Run("ip route replace 10.244.2.0/24 via 192.168.77.2".into()),
            ],
        ),
        scenario(
            "a TCP endpoint that refuses is told as such",
            cluster_ip("") + &slice(&[("quiet", "ready: true")]),
            vec![dial(PodB, Tcp, VIP, super::Expect::Ended)],
        ),
    ]
}
