//! Counters of the Service path, by the names that kube-proxy's dashboards know.
use std::fmt::{Display, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outrigger_desired::{Change, Delta, Family, Kind, NoEndpoints, Table, Watched};

use crate::backend::Applied;
use crate::config::Mode;

/// Where the API server's endpoint controllers note when the change that they answer to happened.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// One value per family.
#[derive(Clone, Debug, Default)]
pub struct PerFamily<T>([T; 2]);

impl<T> PerFamily<T> {
    fn get_mut(&mut self, family: Family) -> &mut T {
        &mut self.0[usize::from(family == Family::V6)]
    }

    fn iter(&self) -> impl Iterator<Item = (&'static str, &T)> {
        ["IPv4", "IPv6"].into_iter().zip(&self.0)
    }
}

/// Counts by upper bound.
#[derive(Clone, Debug)]
pub struct Histogram {
    bounds: Vec<f64>,
    counts: Vec<u64>,
    sum: f64,
    count: u64,
}

impl Histogram {
    fn new(bounds: impl IntoIterator<Item = f64>) -> Self {
        let bounds: Vec<f64> = bounds.into_iter().collect();
        Self { counts: vec![0; bounds.len()], bounds, sum: 0.0, count: 0 }
    }

    /// From 1 ms, doubled 14 times.
    fn of_syncs() -> Self {
        Self::new((0..15).map(|power| 0.001 * f64::from(1 << power)))
    }

    /// Fine where clusters should be, up to five minutes.
    fn of_programming() -> Self {
        let steps = |first: u32, step: u32, count: u32| (0..count).map(move |index| f64::from(first + step * index));
        Self::new([0.25, 0.5].into_iter().chain(steps(1, 1, 59)).chain(steps(60, 5, 12)).chain(steps(120, 30, 7)))
    }

    fn observe(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
        if let Some(index) = self.bounds.iter().position(|bound| value <= *bound) {
            self.counts[index] += 1;
        }
    }

    fn samples(&self, labels: &str) -> Vec<(&'static str, String, String)> {
        let mut total = 0;
        let mut samples = Vec::with_capacity(self.bounds.len() + 3);
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            total += count;
            samples.push(("_bucket", format!("{labels},le=\"{bound}\""), total.to_string()));
        }
        samples.push(("_bucket", format!("{labels},le=\"+Inf\""), self.count.to_string()));
        samples.push(("_sum", labels.to_owned(), self.sum.to_string()));
        samples.push(("_count", labels.to_owned(), self.count.to_string()));
        samples
    }
}

/// Prometheus' text format in the making.
#[derive(Debug, Default)]
pub struct Exposition(pub String);

impl Exposition {
    /// One metric with all its values, each with its labels (`a="b",c="d"`).
    pub fn family<V: Display>(&mut self, name: &str, kind: &str, help: &str, samples: impl IntoIterator<Item = (String, V)>) {
        self.suffixed(name, kind, help, samples.into_iter().map(|(labels, value)| ("", labels, value)));
    }

    pub(crate) fn suffixed<V: Display>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = (&'static str, String, V)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        // Writing to a String can't fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (suffix, labels, value) in samples {
            let _ = if labels.is_empty() {
                writeln!(self.0, "{name}{suffix} {value}")
            } else {
                writeln!(self.0, "{name}{suffix}{{{labels}}} {value}")
            };
        }
    }
}

/// A label's value in the format's quoting.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// Counters since start.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub applies: u64,
    pub failures: u64,
    pub frontends: usize,
    pub upserted: u64,
    pub removed: u64,
    pub ended: u64,
    pub switches: u64,
    /// The last apply, from the first of its changes being received to the kernel having it.
    pub last_apply: Duration,
    service_changes: [u64; 2],
    endpoint_changes: [u64; 2],
    last_queued: Option<SystemTime>,
    last_synced: PerFamily<Option<SystemTime>>,
    syncs: PerFamily<Histogram>,
    full_syncs: PerFamily<Histogram>,
    partial_syncs: PerFamily<Histogram>,
    programming: PerFamily<Histogram>,
    /// When the changes happened that the next apply carries.
    triggers: Vec<(Family, SystemTime)>,
    started: SystemTime,
}

const TOTAL: usize = 0;
const PENDING: usize = 1;

impl Default for Metrics {
    fn default() -> Self {
        let both = |histogram: fn() -> Histogram| PerFamily([histogram(), histogram()]);
        Self {
            applies: 0,
            failures: 0,
            frontends: 0,
            upserted: 0,
            removed: 0,
            ended: 0,
            switches: 0,
            last_apply: Duration::ZERO,
            service_changes: [0; 2],
            endpoint_changes: [0; 2],
            last_queued: None,
            last_synced: PerFamily::default(),
            syncs: both(Histogram::of_syncs),
            full_syncs: both(Histogram::of_syncs),
            partial_syncs: both(Histogram::of_syncs),
            programming: both(Histogram::of_programming),
            triggers: Vec::new(),
            started: SystemTime::now(),
        }
    }
}

impl Metrics {
    /// A change that some frontend depends on.
    pub(crate) fn received(&mut self, change: &Change) {
        let count = |counts: &mut [u64; 2], how_many: usize| counts.iter_mut().for_each(|count| *count += how_many as u64);
        match change {
            Change::Service(watched) => count(&mut self.service_changes, size(watched)),
            Change::EndpointSlice(watched) => {
                count(&mut self.endpoint_changes, size(watched));
                if let Watched::Applied(slice) = watched
                    && let Some(text) = slice.metadata.annotations.as_ref().and_then(|annotations| annotations.get(TRIGGER_TIME))
                    && let Ok(time) = text.parse::<jiff::Timestamp>()
                    && let time = SystemTime::from(time)
                    // What happened before this agent is none of its delay.
                    && time > self.started
                {
                    let family = if slice.address_type == "IPv6" { Family::V6 } else { Family::V4 };
                    self.triggers.push((family, time));
                }
            }
            Change::Node(_) | Change::Pod(_) => {}
        }
        self.last_queued = Some(SystemTime::now());
    }

    /// The kernel has everything that was received.
    pub(crate) fn settled(&mut self) {
        self.service_changes[PENDING] = 0;
        self.endpoint_changes[PENDING] = 0;
        let now = SystemTime::now();
        for (family, time) in std::mem::take(&mut self.triggers) {
            self.programming.get_mut(family).observe(now.duration_since(time).unwrap_or_default().as_secs_f64());
        }
    }

    pub(crate) fn applied(&mut self, table: &Table, delta: &Delta, applied: &Applied, took: Duration) {
        self.applies += 1;
        self.upserted += applied.upserted as u64;
        self.removed += applied.removed as u64;
        self.ended += applied.ended as u64;
        self.frontends = table.len();
        self.last_apply = took;
        for family in Family::ALL.into_iter().filter(|family| concerns(delta, *family)) {
            let kind = if delta.full { &mut self.full_syncs } else { &mut self.partial_syncs };
            kind.get_mut(family).observe(took.as_secs_f64());
            self.syncs.get_mut(family).observe(took.as_secs_f64());
            *self.last_synced.get_mut(family) = Some(SystemTime::now());
        }
        self.settled();
    }

    /// All of it, for `/metrics`.
    pub fn render(&self, table: &Table, mode: Mode, out: &mut Exposition) {
        let histograms = |out: &mut Exposition, name: &str, help: &str, values: &PerFamily<Histogram>| {
            let samples = values.iter().flat_map(|(family, histogram)| histogram.samples(&format!("ip_family=\"{family}\"")));
            out.suffixed(&format!("kubeproxy_{name}"), "histogram", &format!("[ALPHA] {help}"), samples);
        };
        histograms(out, "sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds", &self.syncs);
        let full = "SyncProxyRules latency in seconds for full resyncs";
        histograms(out, "sync_full_proxy_rules_duration_seconds", full, &self.full_syncs);
        let partial = "SyncProxyRules latency in seconds for partial resyncs";
        histograms(out, "sync_partial_proxy_rules_duration_seconds", partial, &self.partial_syncs);
        histograms(out, "network_programming_duration_seconds", "In Cluster Network Programming Latency in seconds", &self.programming);

        let mut one = |name: &str, kind: &str, help: &str, samples: Vec<(String, String)>| {
            out.family(&format!("kubeproxy_{name}"), kind, &format!("[ALPHA] {help}"), samples);
        };
        let seconds =
            |time: Option<SystemTime>| time.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default().as_secs_f64();
        let synced =
            self.last_synced.iter().map(|(family, time)| (format!("ip_family=\"{family}\""), seconds(*time).to_string())).collect();
        one("sync_proxy_rules_last_timestamp_seconds", "gauge", "The last time proxy rules were successfully synced", synced);
        let queued = ["IPv4", "IPv6"].map(|family| (format!("ip_family=\"{family}\""), seconds(self.last_queued).to_string()));
        one("sync_proxy_rules_last_queued_timestamp_seconds", "gauge", "The last time a sync of proxy rules was queued", queued.into());
        for (what, counts) in [("Endpoint", self.endpoint_changes), ("Service", self.service_changes)] {
            let name = what.to_lowercase();
            let bare = |count: u64| vec![(String::new(), count.to_string())];
            let (pending, total) = (format!("Pending proxy rules {what} changes"), format!("Cumulative proxy rules {what} changes"));
            one(&format!("sync_proxy_rules_{name}_changes_pending"), "gauge", &pending, bare(counts[PENDING]));
            one(&format!("sync_proxy_rules_{name}_changes_total"), "counter", &total, bare(counts[TOTAL]));
        }
        let help = "Number of services with a Local traffic policy and no endpoints";
        one("sync_proxy_rules_no_local_endpoints_total", "gauge", help, no_local_endpoints(table));
        if mode == Mode::Nftables {
            let failures = ["IPv4", "IPv6"].map(|family| (format!("ip_family=\"{family}\""), self.failures.to_string()));
            one("sync_proxy_rules_nftables_sync_failures_total", "counter", "Cumulative proxy nftables sync failures", failures.into());
        }
        let bare = |value: u64| [(String::new(), value)];
        out.family("outrigger_proxy_mode", "gauge", "How Services are carried.", [(format!("mode=\"{mode}\""), 1)]);
        out.family("outrigger_proxy_frontends", "gauge", "Addresses and ports that are served.", bare(self.frontends as u64));
        out.family("outrigger_proxy_applies_total", "counter", "Changes brought to the kernel.", bare(self.applies));
        out.family("outrigger_proxy_failures_total", "counter", "Changes that the kernel didn't take.", bare(self.failures));
        let help = "Sockets and tracked connections of gone backends that were ended.";
        out.family("outrigger_proxy_ended_connections_total", "counter", help, bare(self.ended));
        out.family("outrigger_proxy_switches_total", "counter", "Changes of the proxy mode.", bare(self.switches));
    }
}

fn size<K>(watched: &Watched<K>) -> usize {
    if let Watched::Replaced(all) = watched { all.len() } else { 1 }
}

fn concerns(delta: &Delta, family: Family) -> bool {
    let frontends = delta.upserts.iter().map(|upsert| upsert.frontend).chain(delta.removals.iter().map(|removal| removal.frontend));
    delta.full || frontends.chain(delta.gone.iter().map(|gone| gone.frontend)).any(|frontend| frontend.address.family() == family)
}

fn no_local_endpoints(table: &Table) -> Vec<(String, String)> {
    let mut counts = std::collections::BTreeMap::new();
    for (policy, family) in [("external", "IPv4"), ("external", "IPv6"), ("internal", "IPv4"), ("internal", "IPv6")] {
        counts.insert((policy, family), std::collections::BTreeSet::new());
    }
    let without = table.iter().filter(|(_, entry)| entry.backends.is_empty() && entry.no_endpoints == NoEndpoints::Drop);
    for (frontend, entry) in without {
        let policy = if entry.kind == Kind::ClusterIp { "internal" } else { "external" };
        let family = if frontend.address.family() == Family::V6 { "IPv6" } else { "IPv4" };
        counts.entry((policy, family)).or_default().insert(&entry.service);
    }
    let sample = |((policy, family), services): ((&str, &str), std::collections::BTreeSet<_>)| {
        (format!("ip_family=\"{family}\",traffic_policy=\"{policy}\""), services.len().to_string())
    };
    counts.into_iter().map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_what_is_at_most_their_bound() {
        let mut histogram = Histogram::new([0.25, 1.0]);
        [0.25, 0.3, 7.0].into_iter().for_each(|value| histogram.observe(value));
        let mut out = Exposition::default();
        out.suffixed("m", "histogram", "Help.", histogram.samples("f=\"x\""));
        let expected = "# HELP m Help.\n# TYPE m histogram\nm_bucket{f=\"x\",le=\"0.25\"} 1\nm_bucket{f=\"x\",le=\"1\"} 2\n\
                        m_bucket{f=\"x\",le=\"+Inf\"} 3\nm_sum{f=\"x\"} 7.55\nm_count{f=\"x\"} 3\n";
        assert_eq!(out.0, expected);
    }

    #[test]
    fn bounds_are_those_of_upstream() {
        let bounds = Histogram::of_programming().bounds;
        assert_eq!((bounds.len(), bounds[2], bounds[60], bounds[61], bounds[73], bounds[79]), (80, 1.0, 59.0, 60.0, 120.0, 300.0));
        let bounds = Histogram::of_syncs().bounds;
        assert_eq!((bounds.len(), bounds[0], bounds[14]), (15, 0.001, 16.384));
    }

    #[test]
    fn labels_are_quoted() {
        assert_eq!(quoted("a\"b\\"), r#""a\"b\\""#);
    }
}
