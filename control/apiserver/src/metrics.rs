//! The server's own metrics in Prometheus' text format, with upstream's names.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::Duration;

use outrigger_api::Resource;

use crate::request::RequestInfo;

/// Verbs that have a series of their own; all others share one.
const VERBS: [&str; 10] = ["CONNECT", "DELETE", "DELETECOLLECTION", "GET", "HEAD", "LIST", "PATCH", "POST", "PUT", "WATCH"];
const BUCKETS: [f64; 12] = [0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 2.0, 5.0, 15.0, 60.0];

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Series {
    verb: String,
    group: String,
    version: String,
    resource: String,
    subresource: String,
    scope: &'static str,
}

#[derive(Default)]
struct Observed {
    by_code: BTreeMap<u16, u64>,
    buckets: [u64; BUCKETS.len()],
    count: u64,
    seconds: f64,
}

#[derive(Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<Series, Observed>>,
}

impl Metrics {
    /// `resource` is the catalog's entry for what was asked. Names that the catalog has not make no series: anyone can invent them.
    pub fn observe(&self, info: &RequestInfo, resource: Option<&Resource>, code: u16, elapsed: Duration) {
        let known = resource.is_some_and(|found| info.subresource.is_empty() || found.subresource(&info.subresource).is_some());
        let scope = match (known, info.name.is_empty(), info.namespace.is_empty()) {
            (false, _, _) => "",
            (_, false, _) => "resource",
            (_, _, false) => "namespace",
            _ => "cluster",
        };
        let verb = match (info.is_resource, info.verb.as_str()) {
            (true, "create") => "POST".to_string(),
            (true, "update") => "PUT".to_string(),
            (_, verb) => verb.to_ascii_uppercase(),
        };
        let label = |name: &str| if known { name.to_string() } else { String::new() };
        let series = Series {
            verb: if VERBS.contains(&verb.as_str()) { verb } else { "OTHER".to_string() },
            group: label(&info.group),
            version: label(&info.version),
            resource: label(&info.resource),
            subresource: label(&info.subresource),
            scope,
        };
        let seconds = elapsed.as_secs_f64();
        let mut requests = self.requests.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let observed = requests.entry(series).or_default();
        *observed.by_code.entry(code).or_default() += 1;
        observed.count += 1;
        observed.seconds += seconds;
        for (bucket, bound) in observed.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= bound);
        }
    }

    pub fn render(&self, objects: &[(String, usize)], started: Duration) -> String {
        let mut out = String::new();
        let requests = self.requests.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        out.push_str("# HELP apiserver_request_total Counter of apiserver requests broken out for each verb, group, version, resource, scope and code.\n# TYPE apiserver_request_total counter\n");
        for (series, observed) in requests.iter() {
            for (code, count) in &observed.by_code {
                let _ = writeln!(out, "apiserver_request_total{{code=\"{code}\",{}}} {count}", series.labels());
            }
        }
        out.push_str("# HELP apiserver_request_duration_seconds Response latency distribution in seconds.\n# TYPE apiserver_request_duration_seconds histogram\n");
        for (series, observed) in requests.iter() {
            let labels = series.labels();
            for (count, bound) in observed.buckets.iter().zip(BUCKETS) {
                let _ = writeln!(out, "apiserver_request_duration_seconds_bucket{{{labels},le=\"{bound}\"}} {count}");
            }
            let _ = writeln!(out, "apiserver_request_duration_seconds_bucket{{{labels},le=\"+Inf\"}} {}", observed.count);
            let _ = writeln!(out, "apiserver_request_duration_seconds_sum{{{labels}}} {}", observed.seconds);
            let _ = writeln!(out, "apiserver_request_duration_seconds_count{{{labels}}} {}", observed.count);
        }
        out.push_str("# HELP apiserver_resource_objects Number of stored objects.\n# TYPE apiserver_resource_objects gauge\n");
        for (prefix, count) in objects {
            let (group, resource) = prefix.split_once('/').unwrap_or(("", prefix));
            let _ = writeln!(out, "apiserver_resource_objects{{group=\"{}\",resource=\"{}\"}} {count}", escape(group), escape(resource));
        }
        let _ = writeln!(
            out,
            "# HELP process_uptime_seconds Time since the server started.\n# TYPE process_uptime_seconds gauge\nprocess_uptime_seconds {}",
            started.as_secs_f64()
        );
        out
    }
}

impl Series {
    fn labels(&self) -> String {
        format!(
            "component=\"apiserver\",group=\"{}\",resource=\"{}\",scope=\"{}\",subresource=\"{}\",verb=\"{}\",version=\"{}\"",
            escape(&self.group),
            escape(&self.resource),
            self.scope,
            escape(&self.subresource),
            self.verb,
            escape(&self.version)
        )
    }
}

/// A label's value as the text format wants it between quotes.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invented_names_and_verbs_share_a_series() {
        let metrics = Metrics::default();
        for number in 0..10 {
            let info = RequestInfo { is_resource: true, verb: format!("v{number}"), resource: format!("r{number}"), ..Default::default() };
            metrics.observe(&info, None, 404, Duration::ZERO);
        }
        let text = metrics.render(&[], Duration::ZERO);
        let totals: Vec<_> = text.lines().filter(|line| line.starts_with("apiserver_request_total")).collect();
        assert_eq!(totals.len(), 1, "{totals:?}");
        assert!(totals[0].contains("verb=\"OTHER\"") && totals[0].ends_with(" 10"), "{totals:?}");
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(escape("a\\b\"c\nd"), "a\\\\b\\\"c\\nd");
    }
}
