//! Which endpoints may serve: readiness, traffic policies, topology, affinity.
use std::time::Duration;

use super::Expect::{From, OneOf, Refused};
use super::{ALL, Scenario, Step, VIP, cluster_ip, dial, named_slice, open, ready, scenario, slice};
use crate::talk::Transport::{Tcp, Udp};
use crate::world::Place::{Node, PodA, PodB};

pub fn list() -> Vec<Scenario> {
    vec![
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
            "publishNotReadyAddresses: endpoints that are published as ready serve, terminating or not",
            cluster_ip("  publishNotReadyAddresses: true")
                + &slice(&[
                    ("a", "ready: true, serving: false, terminating: false"),
                    ("b", "ready: true, serving: false, terminating: true"),
                ]),
            vec![dial(PodA, Tcp, VIP, From(&["a", "b"]))],
        ),
        scenario(
            "internalTrafficPolicy Local",
            cluster_ip("  internalTrafficPolicy: Local") + &ready(&["a", "r"]),
            vec![
                dial(PodB, Tcp, VIP, From(&["a"])),
                dial(Node, Tcp, VIP, From(&["a"])),
                Step::Apply(slice(&[("a", "ready: false, serving: true, terminating: true"), ("r", "ready: true")])),
                dial(PodB, Tcp, VIP, From(&["a"])),
            ],
        ),
        scenario(
            "trafficDistribution PreferSameZone and PreferSameNode, by hints",
            "---\nkind: Node\nmetadata: {name: node-1, labels: {topology.kubernetes.io/zone: here}}\n".to_owned()
                + &cluster_ip("  trafficDistribution: PreferSameZone")
                + &hinted(&["forZones: [{name: here}]", "forZones: [{name: there}]"]),
            vec![
                dial(PodB, Tcp, VIP, From(&["a"])),
                // Hints count only when all have them, and when some are for this node.
                Step::Apply(hinted(&["forZones: [{name: here}]"])),
                dial(PodB, Tcp, VIP, From(&["a", "r"])),
                Step::Apply(hinted(&["forZones: [{name: there}]", "forZones: [{name: there}]"])),
                dial(PodB, Tcp, VIP, From(&["a", "r"])),
                Step::Apply(hinted(&[
                    "forZones: [{name: here}], forNodes: [{name: node-1}]",
                    "forZones: [{name: here}], forNodes: [{name: node-2}]",
                ])),
                dial(PodB, Tcp, VIP, From(&["a"])),
                Step::Apply(hinted(&[
                    "forZones: [{name: there}], forNodes: [{name: node-3}]",
                    "forZones: [{name: here}], forNodes: [{name: node-2}]",
                ])),
                dial(PodB, Tcp, VIP, From(&["r"])),
            ],
        ),
        scenario(
            "session affinity: a client stays as long as its endpoint does",
            cluster_ip("  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 300}}") + &ready(ALL),
            vec![
                dial(PodA, Tcp, VIP, OneOf(ALL)),
                dial(PodB, Tcp, VIP, OneOf(ALL)),
                dial(PodA, Udp, VIP, OneOf(ALL)),
                dial(Node, Tcp, VIP, OneOf(ALL)),
                Step::Apply(ready(&["b"])),
                dial(PodA, Tcp, VIP, From(&["b"])),
                Step::Apply(ready(ALL)),
                dial(PodA, Tcp, VIP, OneOf(&["b"])),
                // Whatever the mode: others list and change their rules beside ours.
                Step::Run("nft list ruleset".into()),
            ],
        ),
        scenario(
            "session affinity ends with its time",
            cluster_ip("  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 1}}") + &ready(&["a", "b"]),
            vec![
                dial(PodA, Tcp, VIP, OneOf(&["a", "b"])),
                Step::DialApart { from: PodA, to: VIP.into(), pause: Duration::from_millis(2100), until: &["a", "b"] },
            ],
        ),
    ]
}

fn hinted(hints: &[&str]) -> String {
    named_slice("web", &[("a", "ready: true"), ("r", "ready: true")], hints)
}
