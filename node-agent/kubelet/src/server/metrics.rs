//! `/metrics` and its relatives in Prometheus' text format.
use std::fmt::Write;
use std::path::Path;

use http::{Response, StatusCode};

use super::stats::{self, Measured, NodeUsage, value};
use super::{Body, Context, answer, text};
use crate::cri::v1;

const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

pub async fn serve(context: &Context, kind: &[&str]) -> Response<Body> {
    let content = match kind {
        [] => process() + &kubelet(context) + &(context.more_metrics)(),
        ["probes"] => probes(context),
        ["resource"] => resource(stats::measure(&context.cri).await.as_ref().ok()),
        ["cadvisor"] => match stats::measure(&context.cri).await {
            Ok(measured) => cadvisor(&measured),
            Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        _ => return text(StatusCode::NOT_FOUND, "404 page not found\n"),
    };
    answer(StatusCode::OK, CONTENT_TYPE, content)
}

/// A label's value in the format's quoting.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// One metric with all its values; empty ones are left out.
fn family(out: &mut String, name: &str, kind: &str, help: &str, samples: &[(String, String)]) {
    if samples.is_empty() {
        return;
    }
    // Writing to a String can't fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        let _ = if labels.is_empty() { writeln!(out, "{name} {value}") } else { writeln!(out, "{name}{{{labels}}} {value}") };
    }
}

fn seconds(nanoseconds: u64) -> String {
    format!("{:e}", nanoseconds as f64 / 1e9)
}

/// A value with its time in milliseconds, which this format carries behind it.
fn timed(value: impl std::fmt::Display, nanoseconds: i64) -> String {
    format!("{value} {}", nanoseconds / 1_000_000)
}

struct Labelled<'a> {
    container: &'a v1::Container,
    stats: &'a v1::ContainerStats,
}

impl Labelled<'_> {
    fn label(&self, name: &str) -> String {
        quoted(self.container.labels.get(name).map(String::as_str).unwrap_or_default())
    }

    fn short(&self) -> String {
        format!(
            "container={},namespace={},pod={}",
            self.label("io.kubernetes.container.name"),
            self.label("io.kubernetes.pod.namespace"),
            self.label("io.kubernetes.pod.name")
        )
    }

    fn full(&self) -> String {
        let image = self.container.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
        format!("{},id={},image={},name={}", self.short(), quoted(&self.container.id), quoted(image), quoted(&self.container.id))
    }
}

fn labelled(measured: &Measured) -> Vec<Labelled<'_>> {
    let with_stats =
        measured.containers.iter().filter_map(|container| Some(Labelled { container, stats: measured.stats.get(&container.id)? }));
    with_stats.collect()
}

/// What metrics-server reads.
fn resource(measured: Option<&Measured>) -> String {
    let mut out = String::new();
    let node = NodeUsage::read();
    let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
    if let Some(measured) = measured {
        let all = labelled(measured);
        let cpu = |one: &Labelled<'_>| one.stats.cpu.as_ref().and_then(|cpu| Some((value(&cpu.usage_core_nano_seconds)?, cpu.timestamp)));
        let memory =
            |one: &Labelled<'_>| one.stats.memory.as_ref().and_then(|memory| Some((value(&memory.working_set_bytes)?, memory.timestamp)));
        let samples: Vec<_> = all.iter().filter_map(|one| cpu(one).map(|(used, time)| (one.short(), timed(seconds(used), time)))).collect();
        family(
            &mut out,
            "container_cpu_usage_seconds_total",
            "counter",
            "[STABLE] Cumulative cpu time consumed by the container in core-seconds",
            &samples,
        );
        let samples: Vec<_> = all.iter().filter_map(|one| memory(one).map(|(used, time)| (one.short(), timed(used, time)))).collect();
        family(&mut out, "container_memory_working_set_bytes", "gauge", "[STABLE] Current working set of the container in bytes", &samples);
        let samples: Vec<_> = all.iter().map(|one| (one.short(), seconds(one.container.created_at.unsigned_abs()))).collect();
        family(
            &mut out,
            "container_start_time_seconds",
            "gauge",
            "[STABLE] Start time of the container since unix epoch in seconds",
            &samples,
        );
        let pods = |part: &dyn Fn(&Labelled<'_>) -> Option<u64>| -> Vec<(String, u64)> {
            let pod = |sandbox: &v1::PodSandbox| {
                let label = |name: &str| quoted(sandbox.labels.get(name).map(String::as_str).unwrap_or_default());
                let used = all.iter().filter(|one| one.container.pod_sandbox_id == sandbox.id).filter_map(part).sum();
                (format!("namespace={},pod={}", label("io.kubernetes.pod.namespace"), label("io.kubernetes.pod.name")), used)
            };
            measured.sandboxes.iter().map(pod).collect()
        };
        let samples: Vec<_> =
            pods(&|one| Some(cpu(one)?.0)).into_iter().map(|(labels, used)| (labels, timed(seconds(used), now))).collect();
        family(
            &mut out,
            "pod_cpu_usage_seconds_total",
            "counter",
            "[STABLE] Cumulative cpu time consumed by the pod in core-seconds",
            &samples,
        );
        let samples: Vec<_> = pods(&|one| Some(memory(one)?.0)).into_iter().map(|(labels, used)| (labels, timed(used, now))).collect();
        family(&mut out, "pod_memory_working_set_bytes", "gauge", "[STABLE] Current working set of the pod in bytes", &samples);
    }
    let one = |value: String| [(String::new(), value)];
    family(
        &mut out,
        "node_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the node in core-seconds",
        &one(timed(seconds(node.cpu_nanoseconds), now)),
    );
    let working_set = node.memory_total.saturating_sub(node.memory_available);
    family(
        &mut out,
        "node_memory_working_set_bytes",
        "gauge",
        "[STABLE] Current working set of the node in bytes",
        &one(timed(working_set, now)),
    );
    let failed = u8::from(measured.is_none()).to_string();
    family(
        &mut out,
        "resource_scrape_error",
        "gauge",
        "[STABLE] 1 if there was an error while getting container metrics, 0 otherwise",
        &one(failed.clone()),
    );
    family(&mut out, "scrape_error", "gauge", "[ALPHA] 1 if there was an error while getting container metrics, 0 otherwise", &one(failed));
    out
}

/// The part of cAdvisor's metrics that the runtime's figures cover.
fn cadvisor(measured: &Measured) -> String {
    let mut out = String::new();
    let all = labelled(measured);
    let mut each = |name: &str, kind: &str, help: &str, part: &dyn Fn(&Labelled<'_>) -> Option<String>| {
        let samples: Vec<_> = all.iter().filter_map(|one| Some((one.full(), part(one)?))).collect();
        family(&mut out, name, kind, help, &samples);
    };
    each("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed in seconds.", &|one| {
        let cpu = one.stats.cpu.as_ref()?;
        Some(timed(seconds(value(&cpu.usage_core_nano_seconds)?), cpu.timestamp))
    });
    type Part = fn(&v1::MemoryUsage) -> &Option<v1::UInt64Value>;
    let memory: [(&str, &str, Part); 3] = [
        (
            "container_memory_usage_bytes",
            "Current memory usage in bytes, including all memory regardless of when it was accessed",
            |memory| &memory.usage_bytes,
        ),
        ("container_memory_working_set_bytes", "Current working set in bytes.", |memory| &memory.working_set_bytes),
        ("container_memory_rss", "Size of RSS in bytes.", |memory| &memory.rss_bytes),
    ];
    for (name, help, part) in memory {
        each(name, "gauge", help, &|one| {
            let memory = one.stats.memory.as_ref()?;
            Some(timed(value(part(memory))?, memory.timestamp))
        });
    }
    each("container_fs_usage_bytes", "gauge", "Number of bytes that are consumed by the container on this filesystem.", &|one| {
        let layer = one.stats.writable_layer.as_ref()?;
        Some(timed(value(&layer.used_bytes)?, layer.timestamp))
    });
    each("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds.", &|one| {
        Some(seconds(one.container.created_at.unsigned_abs()))
    });
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let one = |value: String| [(String::new(), value)];
    family(&mut out, "machine_cpu_cores", "gauge", "Number of logical CPU cores.", &one(cores.to_string()));
    family(
        &mut out,
        "machine_memory_bytes",
        "gauge",
        "Amount of memory installed on the machine.",
        &one(NodeUsage::read().memory_total.to_string()),
    );
    out
}

/// The kubelet's figures that need no counters of their own.
fn kubelet(context: &Context) -> String {
    let mut out = String::new();
    let pods = context.kubelet.pods();
    let mut states = [("running", 0_u64), ("exited", 0), ("created", 0)];
    let statuses = pods.iter().filter_map(|pod| pod.status.as_ref()?.container_statuses.as_ref()).flatten();
    for state in statuses.filter_map(|status| status.state.as_ref()) {
        let index = if state.running.is_some() {
            0
        } else if state.terminated.is_some() {
            1
        } else {
            2
        };
        states[index].1 += 1;
    }
    let running = pods.iter().filter(|pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")).count();
    let samples = states.map(|(state, count)| (format!("container_state={}", quoted(state)), count.to_string()));
    family(&mut out, "kubelet_running_containers", "gauge", "[ALPHA] Number of containers currently running", &samples);
    family(
        &mut out,
        "kubelet_running_pods",
        "gauge",
        "[ALPHA] Number of pods that have a running pod sandbox",
        &[(String::new(), running.to_string())],
    );
    let node = format!("node={}", quoted(&context.config.node_name));
    family(&mut out, "kubelet_node_name", "gauge", "[ALPHA] The node's name. The count is always 1.", &[(node, "1".to_owned())]);
    out
}

/// Since when the probers have been at work.
fn probes(context: &Context) -> String {
    let mut out = String::new();
    let started = context.kubelet.started().as_second().to_string();
    family(
        &mut out,
        "process_start_time_seconds",
        "gauge",
        "[ALPHA] Start time of the process since unix epoch in seconds.",
        &[(String::new(), started)],
    );
    out
}

/// The agent's own process, under the names that every client library uses.
fn process() -> String {
    let mut out = String::new();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name in parentheses may hold spaces; fields are counted behind it.
    let fields: Vec<&str> = stat.rsplit_once(") ").map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    let field = |number: usize| fields.get(number).and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
    let one = |value: String| [(String::new(), value)];
    family(
        &mut out,
        "process_cpu_seconds_total",
        "counter",
        "Total user and system CPU time spent in seconds.",
        &one(format!("{}", (field(11) + field(12)) as f64 / 100.0)),
    );
    family(&mut out, "process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", &one((field(21) * 4096).to_string()));
    family(&mut out, "process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", &one(field(20).to_string()));
    let files = Path::new("/proc/self/fd").read_dir().map_or(0, Iterator::count);
    family(&mut out, "process_open_fds", "gauge", "Number of open file descriptors.", &one(files.to_string()));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_in_the_text_format() {
        let mut out = String::new();
        family(&mut out, "x_total", "counter", "Help.", &[(format!("a={}", quoted("q\"\\\n")), timed(seconds(1_500_000_000), 7_000_000))]);
        family(&mut out, "empty", "gauge", "Nothing.", &[]);
        assert_eq!(out, "# HELP x_total Help.\n# TYPE x_total counter\nx_total{a=\"q\\\"\\\\\\n\"} 1.5e0 7\n");
    }
}
