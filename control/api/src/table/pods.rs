//! A pod's cells: what its containers' states add up to.
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::meta;

/// The row's conditions of a pod that has ended.
pub(super) fn conditions(pod: &Value) -> Option<Value> {
    let (reason, message) = match meta::text(pod, "status.phase") {
        "Succeeded" => ("Succeeded", "The pod has completed successfully."),
        "Failed" => ("Failed", "The pod failed."),
        _ => return None,
    };
    Some(json!([{"type": "Completed", "status": "True", "reason": reason, "message": message}]))
}

struct Summary {
    ready: usize,
    total: usize,
    reason: String,
    restarts: i64,
    /// RFC 3339, so the greater text is the later time; empty if never.
    last_restart: String,
}

pub(super) fn ready(pod: &Value) -> Value {
    let summary = summary(pod);
    format!("{}/{}", summary.ready, summary.total).into()
}

pub(super) fn status(pod: &Value) -> Value {
    summary(pod).reason.into()
}

pub(super) fn restarts(pod: &Value, now: Timestamp) -> Value {
    let summary = summary(pod);
    if summary.restarts == 0 || summary.last_restart.is_empty() {
        return summary.restarts.to_string().into();
    }
    format!("{} ({} ago)", summary.restarts, crate::time::age(&summary.last_restart, now)).into()
}

pub(super) fn address(pod: &Value) -> Value {
    match meta::items(pod, "status.podIPs").first().map(|entry| meta::text(entry, "ip")) {
        Some(address) if !address.is_empty() => address.into(),
        _ => "<none>".into(),
    }
}

pub(super) fn readiness_gates(pod: &Value) -> Value {
    let gates = meta::items(pod, "spec.readinessGates");
    if gates.is_empty() {
        return "<none>".into();
    }
    let holds = |gate: &&Value| condition(pod, meta::text(gate, "conditionType")).is_some_and(|found| found["status"] == "True");
    format!("{}/{}", gates.iter().filter(holds).count(), gates.len()).into()
}

fn condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a Value> {
    meta::items(pod, "status.conditions").iter().find(|condition| condition["type"] == kind)
}

fn restart_count(status: &Value) -> i64 {
    status["restartCount"].as_i64().unwrap_or_default()
}

fn later(current: &mut String, status: &Value) {
    let ended = meta::text(status, "lastState.terminated.finishedAt");
    if ended > current.as_str() {
        *current = ended.to_string();
    }
}

/// `ExitCode:1`, `Signal:9` or the reason the runtime gave.
fn termination(terminated: &Value) -> String {
    let number = |key: &str| terminated[key].as_i64().unwrap_or_default();
    match meta::text(terminated, "reason") {
        "" if number("signal") != 0 => format!("Signal:{}", number("signal")),
        "" => format!("ExitCode:{}", number("exitCode")),
        reason => reason.to_string(),
    }
}

fn summary(pod: &Value) -> Summary {
    let phase = meta::text(pod, "status.phase");
    let status_reason = meta::text(pod, "status.reason");
    let mut reason = if status_reason.is_empty() { phase } else { status_reason }.to_string();
    if condition(pod, "PodScheduled").is_some_and(|found| found["reason"] == "SchedulingGated") {
        reason = "SchedulingGated".to_string();
    }
    let sidecars: Vec<&str> =
        meta::items(pod, "spec.initContainers").iter().filter(|entry| entry["restartPolicy"] == "Always").map(meta::name_field).collect();
    let total = meta::items(pod, "spec.containers").len() + sidecars.len();
    let mut summary = Summary { ready: 0, total, reason, restarts: 0, last_restart: String::new() };
    let mut sidecar_restarts = (0, String::new());
    let initializing = initialization(pod, &sidecars, &mut summary, &mut sidecar_restarts);
    if !initializing || condition(pod, "Initialized").is_some_and(|found| found["status"] == "True") {
        (summary.restarts, summary.last_restart) = sidecar_restarts;
        containers(pod, &mut summary);
    }
    if meta::is_deleting(pod) {
        if status_reason == "NodeLost" {
            summary.reason = "Unknown".to_string();
        } else if !matches!(phase, "Succeeded" | "Failed") {
            summary.reason = "Terminating".to_string();
        }
    }
    summary
}

/// Goes through the init containers up to the one that holds the pod back; tells whether there is one.
fn initialization(pod: &Value, sidecars: &[&str], summary: &mut Summary, sidecar_restarts: &mut (i64, String)) -> bool {
    let count = meta::items(pod, "spec.initContainers").len();
    for (index, status) in meta::items(pod, "status.initContainerStatuses").iter().enumerate() {
        summary.restarts += restart_count(status);
        later(&mut summary.last_restart, status);
        let is_sidecar = sidecars.contains(&meta::name_field(status));
        if is_sidecar {
            sidecar_restarts.0 += restart_count(status);
            later(&mut sidecar_restarts.1, status);
        }
        let terminated = &status["state"]["terminated"];
        let waiting = meta::text(status, "state.waiting.reason");
        if terminated.is_object() && terminated["exitCode"].as_i64().unwrap_or_default() == 0 {
            continue;
        }
        if is_sidecar && status["started"] == true {
            summary.ready += usize::from(status["ready"] == true);
            continue;
        }
        summary.reason = if terminated.is_object() {
            format!("Init:{}", termination(terminated))
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{index}/{count}")
        };
        return true;
    }
    false
}

/// Goes through the containers from the last to the first, which has the last word.
fn containers(pod: &Value, summary: &mut Summary) {
    let mut running = false;
    let mut failure = None;
    for status in meta::items(pod, "status.containerStatuses").iter().rev() {
        summary.restarts += restart_count(status);
        later(&mut summary.last_restart, status);
        let waiting = meta::text(status, "state.waiting.reason");
        let terminated = &status["state"]["terminated"];
        if !waiting.is_empty() {
            summary.reason = waiting.to_string();
        } else if terminated.is_object() {
            summary.reason = termination(terminated);
            if terminated["exitCode"].as_i64().unwrap_or_default() != 0 {
                failure = Some(summary.reason.clone());
            }
        } else if status["ready"] == true && status["state"]["running"].is_object() {
            running = true;
            summary.ready += 1;
        }
    }
    if summary.reason != "Completed" {
        return;
    }
    if running && condition(pod, "Ready").is_some_and(|found| found["status"] == "True") {
        summary.reason = "Running".to_string();
    } else if let Some(failure) = failure {
        summary.reason = failure;
    } else if running {
        summary.reason = "NotReady".to_string();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_add_up() {
        let running = json!({"ready": true, "state": {"running": {}}});
        let crash = json!({"restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"finishedAt": "2024-01-01T00:55:00Z"}}});
        let completed = json!({"state": {"terminated": {"reason": "Completed", "exitCode": 0}}});
        let now: Timestamp = "2024-01-01T01:00:00Z".parse().expect("a time");
        let cases = [
            (json!({"spec": {"containers": [{}]}, "status": {"phase": "Pending"}}), "0/1", "Pending", "0"),
            (json!({"spec": {"containers": [{}]}, "status": {"phase": "Running", "containerStatuses": [running]}}), "1/1", "Running", "0"),
            (
                json!({"spec": {"containers": [{}]}, "status": {"phase": "Running", "containerStatuses": [crash]}}),
                "0/1",
                "CrashLoopBackOff",
                "3 (5m ago)",
            ),
            (
                json!({"spec": {"containers": [{}]}, "status": {"phase": "Succeeded", "containerStatuses": [completed]}}),
                "0/1",
                "Completed",
                "0",
            ),
            (
                json!({"spec": {"containers": [{}, {}]}, "status": {"phase": "Running", "containerStatuses": [completed, running]}}),
                "1/2",
                "NotReady",
                "0",
            ),
            (
                json!({"metadata": {"deletionTimestamp": "x"}, "spec": {"containers": [{}]}, "status": {"phase": "Running"}}),
                "0/1",
                "Terminating",
                "0",
            ),
            (
                json!({"spec": {"containers": [{}], "initContainers": [{"name": "i"}, {"name": "j"}]}, "status": {"phase": "Pending",
                    "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 0}}}, {"name": "j", "state": {"running": {}}}]}}),
                "0/1",
                "Init:1/2",
                "0",
            ),
            (
                json!({"spec": {"containers": [{}], "initContainers": [{"name": "i"}]}, "status": {"phase": "Pending",
                    "initContainerStatuses": [{"name": "i", "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}}),
                "0/1",
                "Init:CrashLoopBackOff",
                "2",
            ),
            (
                json!({"spec": {"containers": [{}], "initContainers": [{"name": "s", "restartPolicy": "Always"}]}, "status": {"phase": "Running",
                    "initContainerStatuses": [{"name": "s", "started": true, "ready": true, "state": {"running": {}}}], "containerStatuses": [running]}}),
                "2/2",
                "Running",
                "0",
            ),
            (
                json!({"spec": {"containers": [{}]}, "status": {"phase": "Pending", "conditions": [{"type": "PodScheduled", "reason": "SchedulingGated"}]}}),
                "0/1",
                "SchedulingGated",
                "0",
            ),
            (json!({"spec": {"containers": [{}]}, "status": {"phase": "Failed", "reason": "Evicted"}}), "0/1", "Evicted", "0"),
        ];
        for (pod, expected_ready, expected_status, expected_restarts) in cases {
            assert_eq!(
                (ready(&pod), status(&pod), restarts(&pod, now)),
                (expected_ready.into(), expected_status.into(), expected_restarts.into()),
                "{pod}"
            );
        }
    }
}
