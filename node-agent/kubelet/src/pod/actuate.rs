//! Gives running containers the resources that a resize was granted.
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use outrigger_cluster::status::events::Kind;
use tracing::debug;

use super::container::container_resources;
use super::meta::{find_container, full_name};
use super::record::Record;
use super::resize::{self, Change};
use super::resources::pod_limit_milli;
use super::sync::pod_event;
use crate::cgroup::Fit;
use crate::cri::v1;
use crate::host::Host;

/// Makes the pod's cgroup fit: no narrower than before while containers still have their old resources, then exactly.
pub async fn fit_cgroup(host: &Arc<Host>, record: &Record, pod: &Arc<Pod>) -> std::io::Result<()> {
    let fit = if record.resize().containers_unfinished() { Fit::Grow } else { Fit::Exact };
    let (work, object) = (host.clone(), pod.clone());
    let done = host.in_flight.run(&record.uid, move || work.cgroups.set_up_pod(&object, fit)).await;
    match &done {
        Ok(()) => record.change_resize(|resize, _| resize.cgroup_due &= fit == Fit::Grow),
        Err(error) if record.resize().in_progress.is_some() => failed(host, record, pod, &error.to_string()),
        Err(_) => {}
    }
    done
}

/// Updates the containers one after the other. What went wrong is told in the pod's condition.
pub async fn update(host: &Host, record: &Record, pod: &Pod, changes: &[Change]) -> Result<(), ()> {
    let updated = async {
        check_memory(host, pod, changes).await?;
        for change in changes {
            let Some((_, container)) = find_container(pod, &change.name) else { continue };
            let resources = container_resources(host, pod, &container);
            host.cri.update_container(&change.id, resources).await.map_err(|error| error.to_string())?;
            debug!(pod = %full_name(pod), container = change.name, from = ?change.from, to = ?change.to, "resized");
            record.start_with(&container);
        }
        Ok(())
    };
    updated.await.map_err(|message: String| failed(host, record, pod, &message))
}

fn failed(host: &Host, record: &Record, pod: &Pod, message: &str) {
    let news = record.change_resize(|resize, object| {
        let changed = resize.fail(message, object.metadata.generation, Timestamp::now());
        changed.then(|| resize.in_progress.as_ref().and_then(|condition| condition.observed_generation).unwrap_or(0))
    });
    if let Some(generation) = news {
        pod_event(host, pod, Kind::Warning, "ResizeError", resize::event("error", pod, generation, message));
    }
}

/// A limit below what is used now would kill the program, so it's refused.
async fn check_memory(host: &Host, pod: &Pod, changes: &[Change]) -> Result<(), String> {
    let mut errors = Vec::new();
    let wanted = pod_limit_milli(pod, "memory").map(|milli| milli / 1000);
    if let (Some(wanted), Some(limit)) = (wanted, host.cgroups.memory_limit(pod))
        && wanted < limit
    {
        match host.cgroups.memory_usage(pod) {
            None => errors.push("missing pod memory usage".to_owned()),
            Some(usage) if usage >= wanted => {
                errors.push(format!("attempting to set pod memory limit ({wanted}) below current usage ({usage})"));
            }
            Some(_) => {}
        }
    }
    for change in changes {
        let Some(limit) = change.lower_memory_limit() else { continue };
        match memory_usage(host, &change.id).await {
            None => errors.push(format!("missing container \"{}\" memory usage", change.name)),
            Some(usage) if usage >= limit => {
                let name = &change.name;
                errors.push(format!("attempting to set container \"{name}\" memory limit ({limit}) below current usage ({usage})"));
            }
            Some(_) => {}
        }
    }
    match errors.as_slice() {
        [] => Ok(()),
        [one] => Err(format!("cannot decrease memory limits: {one}")),
        several => Err(format!("cannot decrease memory limits: [{}]", several.join(", "))),
    }
}

async fn memory_usage(host: &Host, id: &str) -> Option<i64> {
    let answer = host.cri.runtime().container_stats(v1::ContainerStatsRequest { container_id: id.into() }).await.ok()?;
    let memory = answer.into_inner().stats?.memory?;
    // Older runtimes tell the working set only.
    let usage = memory.usage_bytes.or(memory.working_set_bytes)?.value;
    i64::try_from(usage).ok()
}
