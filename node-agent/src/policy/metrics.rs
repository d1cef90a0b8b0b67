//! Counters of NetworkPolicies.
use std::collections::BTreeMap;
use std::time::Duration;

use outrigger_dataplane::metrics::{Exposition, quoted};
use outrigger_dataplane::policy::{Applied, Dropped};
use outrigger_desired::ServiceName;

#[derive(Debug, Default)]
pub struct Metrics {
    pub enforcer: &'static str,
    pub applies: u64,
    pub failures: u64,
    pub took: Duration,
    pub last: Applied,
    pub dropped: BTreeMap<ServiceName, Dropped>,
}

impl Metrics {
    pub fn render(&self, out: &mut Exposition) {
        let bare = |value: u64| [(String::new(), value)];
        let enforcer = (!self.enforcer.is_empty()).then(|| (format!("name=\"{}\"", self.enforcer), 1));
        out.family(
            "outrigger_network_policy_enforcer",
            "gauge",
            "What keeps NetworkPolicies on this node; none where nothing does.",
            enforcer,
        );
        out.family("outrigger_network_policy_applies_total", "counter", "Changes brought to the kernel.", bare(self.applies));
        out.family("outrigger_network_policy_failures_total", "counter", "Changes that the kernel didn't take.", bare(self.failures));
        let help = "Time that it took to bring changes to the kernel.";
        out.family("outrigger_network_policy_apply_seconds_total", "counter", help, [(String::new(), self.took.as_secs_f64())]);
        out.family("outrigger_network_policy_pods", "gauge", "Pods of this node that are isolated.", bare(self.last.pods as u64));
        out.family("outrigger_network_policy_rules", "gauge", "Different sets of rules that they have.", bare(self.last.rules as u64));
        let samples = self.dropped.iter().flat_map(|(pod, dropped)| {
            let labels = format!("namespace={},pod={}", quoted(pod.namespace()), quoted(pod.name()));
            [("ingress", dropped.ingress), ("egress", dropped.egress)]
                .map(|(direction, count)| (format!("{labels},direction=\"{direction}\""), count))
        });
        out.family("outrigger_network_policy_dropped_packets_total", "counter", "Packets that no rule allowed.", samples);
    }
}
