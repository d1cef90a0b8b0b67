//! `/stats/summary` and `/runningpods` in upstream's shapes.
use std::collections::BTreeMap;

use jiff::Timestamp;
use nix::sys::statvfs::statvfs;
use serde_json::{Map, Value, json};

use super::Context;
use super::stats::{self, Measured, NodeUsage, value};
use crate::cri::{Result, v1};

const POD_NAME: &str = "io.kubernetes.pod.name";
const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
const POD_UID: &str = "io.kubernetes.pod.uid";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// RFC 3339 in whole seconds, as metav1.Time is written.
fn time(nanoseconds: i64) -> Value {
    Timestamp::from_nanosecond(i128::from(nanoseconds))
        .map(|time| json!(time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()))
        .unwrap_or(Value::Null)
}

fn now() -> i64 {
    i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// An object of the values that are known.
fn known(pairs: &[(&str, Option<Value>)]) -> Value {
    Value::Object(
        pairs
            .iter()
            .filter_map(|(name, value)| Some(((*name).to_owned(), value.clone().filter(|value| !value.is_null())?)))
            .collect::<Map<_, _>>(),
    )
}

pub async fn summary(context: &Context, only_cpu_and_memory: bool) -> Result<Value> {
    let measured = stats::measure(&context.cri).await?;
    let image_fs = if only_cpu_and_memory { None } else { image_fs(context).await };
    Ok(json!({ "node": node(context, image_fs, only_cpu_and_memory), "pods": pods(context, &measured, only_cpu_and_memory) }))
}

fn node(context: &Context, image_fs: Option<Value>, only_cpu_and_memory: bool) -> Value {
    let (usage, at) = (NodeUsage::read(), now());
    let working_set = usage.memory_total.saturating_sub(usage.memory_available);
    let cpu = known(&[
        ("time", Some(time(at))),
        ("usageNanoCores", context.rates.rate("", at, usage.cpu_nanoseconds).map(Value::from)),
        ("usageCoreNanoSeconds", Some(json!(usage.cpu_nanoseconds))),
    ]);
    let memory = json!({
        "time": time(at),
        "availableBytes": usage.memory_available,
        "usageBytes": usage.memory_total.saturating_sub(usage.memory_free),
        "workingSetBytes": working_set,
        "rssBytes": usage.memory_total.saturating_sub(usage.memory_free + usage.cached),
        "pageFaults": 0,
        "majorPageFaults": 0,
    });
    let mut node = json!({
        "nodeName": context.config.node_name,
        "startTime": time(i64::try_from(context.kubelet.started().as_nanosecond()).unwrap_or_default()),
        "cpu": cpu,
        "memory": memory,
        "swap": {"time": time(at), "swapAvailableBytes": usage.swap_free, "swapUsageBytes": usage.swap_total.saturating_sub(usage.swap_free)},
    });
    if !only_cpu_and_memory {
        node["fs"] = filesystem(&context.config.data_dir).unwrap_or(Value::Null);
        node["runtime"] = known(&[("imageFs", image_fs.clone()), ("containerFs", image_fs)]);
        node["rlimit"] = json!({"time": time(at), "maxpid": usage.max_pid, "curproc": usage.processes});
    }
    node
}

fn filesystem(path: &std::path::Path) -> Option<Value> {
    let stat = statvfs(path).ok()?;
    let block = stat.fragment_size();
    Some(json!({
        "time": time(now()),
        "availableBytes": stat.blocks_available() * block,
        "capacityBytes": stat.blocks() * block,
        "usedBytes": stat.blocks().saturating_sub(stat.blocks_free()) * block,
        "inodesFree": stat.files_available(),
        "inodes": stat.files(),
        "inodesUsed": stat.files().saturating_sub(stat.files_free()),
    }))
}

async fn image_fs(context: &Context) -> Option<Value> {
    let info = context.cri.image_fs_info().await.ok()?;
    let usage = info.image_filesystems.first()?;
    let mut image_fs = filesystem(usage.fs_id.as_ref()?.mountpoint.as_ref())?;
    if let Some(used) = value(&usage.used_bytes) {
        image_fs["usedBytes"] = json!(used);
    }
    if let Some(inodes) = value(&usage.inodes_used) {
        image_fs["inodesUsed"] = json!(inodes);
    }
    Some(image_fs)
}

fn pods(context: &Context, measured: &Measured, only_cpu_and_memory: bool) -> Vec<Value> {
    let mut by_sandbox: BTreeMap<&str, Vec<&v1::Container>> = BTreeMap::new();
    for container in &measured.containers {
        by_sandbox.entry(&container.pod_sandbox_id).or_default().push(container);
    }
    let pods = measured.sandboxes.iter().map(|sandbox| {
        let mut containers = by_sandbox.remove(sandbox.id.as_str()).unwrap_or_default();
        containers.sort_by_key(|container| container.labels.get(CONTAINER_NAME));
        pod(context, sandbox, &containers, measured, only_cpu_and_memory)
    });
    pods.collect()
}

fn pod(
    context: &Context,
    sandbox: &v1::PodSandbox,
    containers: &[&v1::Container],
    measured: &Measured,
    only_cpu_and_memory: bool,
) -> Value {
    let label = |name: &str| sandbox.labels.get(name).cloned().unwrap_or_default();
    let with_stats: Vec<(&v1::Container, &v1::ContainerStats)> =
        containers.iter().filter_map(|container| Some((*container, measured.stats.get(&container.id)?))).collect();
    let at = now();
    let sum = |part: &dyn Fn(&v1::ContainerStats) -> Option<u64>| -> u64 { with_stats.iter().filter_map(|(_, stats)| part(stats)).sum() };
    let used = sum(&|stats| value(&stats.cpu.as_ref()?.usage_core_nano_seconds));
    let memory = |part: fn(&v1::MemoryUsage) -> &Option<v1::UInt64Value>| sum(&move |stats| value(part(stats.memory.as_ref()?)));
    let mut pod = json!({
        "podRef": {"name": label(POD_NAME), "namespace": label(POD_NAMESPACE), "uid": label(POD_UID)},
        "startTime": time(sandbox.created_at),
        "containers": with_stats.iter().map(|(found, stats)| container(context, found, stats, only_cpu_and_memory)).collect::<Vec<_>>(),
        "cpu": known(&[
            ("time", Some(time(at))),
            ("usageNanoCores", context.rates.rate(&sandbox.id, at, used).map(Value::from)),
            ("usageCoreNanoSeconds", Some(json!(used))),
        ]),
        "memory": {
            "time": time(at),
            "usageBytes": memory(|memory| &memory.usage_bytes),
            "workingSetBytes": memory(|memory| &memory.working_set_bytes),
            "rssBytes": memory(|memory| &memory.rss_bytes),
            "pageFaults": memory(|memory| &memory.page_faults),
            "majorPageFaults": memory(|memory| &memory.major_page_faults),
        },
    });
    if !only_cpu_and_memory {
        pod["ephemeral-storage"] = json!({"time": time(at), "usedBytes": sum(&|stats| value(&stats.writable_layer.as_ref()?.used_bytes))});
    }
    pod
}

fn container(context: &Context, container: &v1::Container, stats: &v1::ContainerStats, only_cpu_and_memory: bool) -> Value {
    let cpu = stats.cpu.as_ref().map(|cpu| {
        let used = value(&cpu.usage_core_nano_seconds);
        let rate = used.and_then(|used| context.rates.rate(&container.id, cpu.timestamp, used)).or(value(&cpu.usage_nano_cores));
        known(&[
            ("time", Some(time(cpu.timestamp))),
            ("usageNanoCores", rate.map(Value::from)),
            ("usageCoreNanoSeconds", used.map(Value::from)),
        ])
    });
    let memory = stats.memory.as_ref().map(|memory| {
        known(&[
            ("time", Some(time(memory.timestamp))),
            ("availableBytes", value(&memory.available_bytes).filter(|available| *available > 0).map(Value::from)),
            ("usageBytes", value(&memory.usage_bytes).map(Value::from)),
            ("workingSetBytes", value(&memory.working_set_bytes).map(Value::from)),
            ("rssBytes", value(&memory.rss_bytes).map(Value::from)),
            ("pageFaults", value(&memory.page_faults).map(Value::from)),
            ("majorPageFaults", value(&memory.major_page_faults).map(Value::from)),
        ])
    });
    let rootfs = stats.writable_layer.as_ref().filter(|_| !only_cpu_and_memory).map(|layer| {
        known(&[
            ("time", Some(time(layer.timestamp))),
            ("usedBytes", value(&layer.used_bytes).map(Value::from)),
            ("inodesUsed", value(&layer.inodes_used).map(Value::from)),
        ])
    });
    let name = container.labels.get(CONTAINER_NAME).cloned().unwrap_or_default();
    known(&[
        ("name", Some(json!(name))),
        ("startTime", Some(time(container.created_at))),
        ("cpu", cpu),
        ("memory", memory),
        ("rootfs", rootfs),
    ])
}

/// The pods that the runtime knows, with no more than the runtime knows of them.
pub async fn running_pods(context: &Context) -> Result<Value> {
    let measured = {
        let ready = v1::PodSandboxStateValue { state: v1::PodSandboxState::SandboxReady as i32 };
        let running = v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning as i32 };
        let sandboxes = context.cri.list_sandboxes(v1::PodSandboxFilter { state: Some(ready), ..Default::default() });
        let containers = context.cri.list_containers(v1::ContainerFilter { state: Some(running), ..Default::default() });
        tokio::try_join!(sandboxes, containers)?
    };
    let (sandboxes, containers) = measured;
    let items: Vec<Value> = sandboxes
        .iter()
        .map(|sandbox| {
            let label = |name: &str| sandbox.labels.get(name).cloned().unwrap_or_default();
            let own = containers.iter().filter(|container| container.pod_sandbox_id == sandbox.id);
            let containers: Vec<Value> = own
                .map(|container| {
                    json!({
                        "name": container.labels.get(CONTAINER_NAME).cloned().unwrap_or_default(),
                        "image": container.image.as_ref().map(|image| image.image.clone()).unwrap_or_default(),
                        "resources": {},
                    })
                })
                .collect();
            json!({
                "metadata": {"name": label(POD_NAME), "namespace": label(POD_NAMESPACE), "uid": label(POD_UID)},
                "spec": {"containers": containers},
                "status": {},
            })
        })
        .collect();
    Ok(json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_whole_seconds_and_unknowns_are_left_out() {
        assert_eq!(time(1_767_225_600_999_999_999), json!("2026-01-01T00:00:00Z"));
        assert_eq!(known(&[("a", Some(json!(1))), ("b", None), ("c", Some(Value::Null))]), json!({"a": 1}));
    }
}
