//! Which endpoint a connection gets, where a Service says how to choose.
use outrigger_dataplane::Mode;

use super::Expect::{From, OneOf};
use super::{Scenario, Step, VIP, cluster_ip, dial, open, ready, scenario};
use crate::talk::Transport::Tcp;
use crate::world::Place::{Node, PodB};

/// More than dials that have ended may look alive for a moment.
const OPEN: [&str; 8] = ["1", "2", "3", "4", "5", "6", "7", "8"];

pub fn list() -> Vec<Scenario> {
    let web = cluster_ip("").replace("name: web,", "name: web, annotations: {outrigger.dev/balancing: least-connections},");
    let mut steps: Vec<Step> = OPEN.into_iter().map(|id| open(id, PodB, Tcp, VIP, OneOf(&["a"]))).collect();
    steps.extend([Step::Apply(ready(&["a", "r"])), dial(PodB, Tcp, VIP, From(&["r"])), dial(Node, Tcp, VIP, From(&["r"]))]);
    vec![scenario("least-connections: new connections go to the idle endpoint", web + &ready(&["a"]), steps).unsupported(&[(
        Mode::Nftables,
        "rules choose by chance or by hash; the kernel counts connections to limit them, and can't compare the counts",
    )])]
}
