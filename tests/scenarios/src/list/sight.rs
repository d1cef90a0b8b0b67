//! What is counted and what a watcher is told.
use outrigger_dataplane::Mode;

use super::Expect::{From, Refused, TimedOut};
use super::outside::narrowed;
use super::{Scenario, Step, VIP, cluster_ip, dial, ready, scenario, service, slice};
use crate::run::DIALS;
use crate::talk::Transport::{Tcp, Udp};
use crate::world::Place::{Node, Outside, PodB};

const NODE_PORT: &str = "192.168.78.1:30080";
const BALANCER: &str = "192.168.90.2:80";
const KERNEL_REFUSES: (Mode, &str) = (Mode::Userspace, "nobody listens where there is no endpoint: the kernel refuses by itself");
const TWO: &[&str] = &["a", "r"];

pub fn list() -> Vec<Scenario> {
    vec![
        scenario(
            "connections are counted, by Service port and backend",
            service("  type: NodePort") + &ready(TWO),
            vec![
                Step::Count,
                dial(PodB, Tcp, VIP, From(TWO)),
                Step::Counted { port: "default/web:tcp", connections: DIALS as u64, backends: 2, drops: &[] },
                dial(Node, Tcp, VIP, From(TWO)),
                dial(Outside, Tcp, NODE_PORT, From(TWO)),
                dial(PodB, Udp, VIP, From(TWO)),
                Step::Counted { port: "default/web:tcp", connections: 3 * DIALS as u64, backends: 2, drops: &[] },
                Step::Counted { port: "default/web:udp", connections: DIALS as u64, backends: 2, drops: &[] },
            ],
        ),
        scenario(
            "connections that come to nothing are counted, by reason",
            cluster_ip("") + &slice(&[]),
            vec![
                Step::Count,
                dial(PodB, Tcp, VIP, Refused),
                dial(Node, Tcp, VIP, Refused),
                Step::Counted { port: "default/web:tcp", connections: 0, backends: 0, drops: &[("no_endpoint", 2)] },
            ],
        )
        .unsupported(&[KERNEL_REFUSES]),
        scenario(
            "a watcher is told what happens to connections",
            service("  type: NodePort") + &ready(TWO),
            vec![
                Step::Watch,
                dial(PodB, Tcp, VIP, From(TWO)),
                dial(Outside, Tcp, NODE_PORT, From(TWO)),
                Step::Told(vec![
                    "opened default/web:tcp 10.244.1.11 -> 10.96.0.10:80".into(),
                    "closed default/web:tcp 10.244.1.11 -> 10.96.0.10:80".into(),
                    "opened default/web:tcp 192.168.78.2 -> 192.168.78.1:30080".into(),
                    "closed default/web:tcp 192.168.78.2 -> 192.168.78.1:30080".into(),
                ]),
            ],
        ),
        scenario(
            "a watcher is told of what comes to nothing",
            cluster_ip("") + &slice(&[]),
            vec![
                Step::Watch,
                Step::Sleep(std::time::Duration::from_millis(300)),
                dial(PodB, Tcp, VIP, Refused),
                Step::Told(vec!["no_endpoint default/web:tcp 10.244.1.11 -> 10.96.0.10:80".into()]),
            ],
        )
        .unsupported(&[KERNEL_REFUSES, (Mode::Nftables, "what is refused is known from counters, which don't know clients")]),
        scenario(
            "what source ranges keep out is counted",
            narrowed("10.244.1.10/32"),
            vec![
                Step::Count,
                dial(Outside, Udp, BALANCER, TimedOut),
                Step::Counted { port: "default/web:udp", connections: 0, backends: 0, drops: &[("source_range", 1)] },
            ],
        ),
    ]
}
