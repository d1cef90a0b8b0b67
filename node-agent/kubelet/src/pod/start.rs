//! Starting and killing one container, with all the events that upstream records on the way.
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use outrigger_cluster::status::events::Kind;
use tracing::{debug, warn};

use super::backoff::go_duration;
use super::container::{Circumstances, container_config};
use super::hooks;
use super::meta::{container_reference, find_container, full_name, grace_period, name_of, namespace_of, uid_of};
use super::plan::KillReason;
use crate::cri::v1;
use crate::host::Host;
use crate::runtime::{PodView, RunState};

/// A container is never killed faster than this.
const MINIMUM_GRACE: i64 = 2;

/// Why a container couldn't be started: what `state.waiting` will say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartError {
    pub reason: String,
    pub message: String,
    /// When another try makes sense, if that's known.
    pub retry_after: Option<Duration>,
}

impl StartError {
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into(), retry_after: None }
    }
}

/// The sandbox in which containers are started.
pub struct Place<'a> {
    pub sandbox_id: &'a str,
    pub sandbox_config: &'a v1::PodSandboxConfig,
    pub pod_ips: &'a [String],
    pub volumes: &'a HashMap<String, PathBuf>,
    pub pull_secrets: &'a [Arc<Secret>],
}

fn container_event(host: &Host, pod: &Pod, container: &str, kind: Kind, reason: &str, message: impl Into<String>) {
    host.writer.event(&container_reference(pod, container), kind, reason, message);
}

/// Starts the container unless it has to wait after a crash.
pub async fn start(host: &Host, pod: &Pod, container: &Container, view: &PodView, place: &Place<'_>) -> Result<(), StartError> {
    check_restart_pause(host, pod, container, view)?;
    let name = container.name.as_str();
    let failed = |reason: &str, message: String| {
        container_event(host, pod, name, Kind::Warning, "Failed", format!("Error: {message}"));
        StartError::new(reason, message)
    };
    let image_ref = match host.images.ensure(pod, container, place.pull_secrets, place.sandbox_config).await {
        Ok(image_ref) => image_ref,
        Err(error) => {
            container_event(host, pod, name, Kind::Warning, "Failed", format!("Error: {}", error.reason));
            return Err(error);
        }
    };
    let circumstances = Circumstances {
        image_ref,
        restart_count: restart_count(host, pod, container, view).await,
        pod_ips: place.pod_ips,
        volumes: place.volumes,
        target: ephemeral_target(pod, name, view).map_err(|message| failed("CreateContainerConfigError", message))?,
    };
    let config = container_config(host, pod, container, &circumstances).await;
    let config = config.map_err(|message| failed("CreateContainerConfigError", message))?;
    let id = host.cri.create_container(place.sandbox_id, config, place.sandbox_config.clone()).await;
    let id = id.map_err(|error| failed("CreateContainerError", error.message))?;
    container_event(host, pod, name, Kind::Normal, "Created", "Container created");
    host.cri.start_container(&id).await.map_err(|error| failed("RunContainerError", error.message))?;
    container_event(host, pod, name, Kind::Normal, "Started", "Container started");
    debug!(pod = %full_name(pod), container = name, id, "started");
    if let Some(hook) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref()) {
        let ip = place.pod_ips.first().map(String::as_str).unwrap_or_default();
        if let Err(message) = hooks::run(host, pod, container, &id, ip, hook).await {
            warn!(pod = %full_name(pod), container = name, message, "postStart hook failed");
            // The event says no more, as the answer may hold secrets.
            container_event(host, pod, name, Kind::Warning, "FailedPostStartHook", "PostStartHook failed");
            kill(host, pod, name, &id, "FailedPostStartHook", KillReason::Other, None, None, ip).await.ok();
            return Err(StartError::new("PostStartHookError", message));
        }
    }
    Ok(())
}

/// After a crash the next start waits, longer each time.
fn check_restart_pause(host: &Host, pod: &Pod, container: &Container, view: &PodView) -> Result<(), StartError> {
    let Some(ended) = view.containers.iter().find(|view| view.name == container.name && view.state == RunState::Exited) else {
        return Ok(());
    };
    let at = Timestamp::from_nanosecond(i128::from(ended.finished_at)).unwrap_or_else(|_| Timestamp::now());
    let now = Timestamp::now();
    let uid = uid_of(pod);
    let key = format!("{}/{}", container.name, crate::runtime::hash(container));
    if let Some((left, pause)) = host.restarts.remaining(uid, &key, at, now) {
        let event = format!("Back-off restarting failed container {} in pod {}", container.name, full_name(pod));
        container_event(host, pod, &container.name, Kind::Warning, "BackOff", event);
        let message = format!("back-off {} restarting failed container={} pod={}", go_duration(pause), container.name, full_name(pod));
        return Err(StartError { retry_after: Some(left), ..StartError::new("CrashLoopBackOff", message) });
    }
    host.restarts.advance(uid, &key, at, now);
    Ok(())
}

/// One more than the container before; after a loss of the runtime's state, the logs remember.
async fn restart_count(host: &Host, pod: &Pod, container: &Container, view: &PodView) -> i32 {
    if let Some(before) = view.find(&container.name) {
        return before.restart_count + 1;
    }
    let dir = host.config.pod_logs_dir(namespace_of(pod), name_of(pod), uid_of(pod)).join(&container.name);
    let Ok(mut entries) = tokio::fs::read_dir(dir).await else { return 0 };
    let mut next = 0;
    while let Ok(Some(entry)) = entries.next_entry().await {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.split('.').next()).and_then(|number| number.parse::<i32>().ok());
        next = number.map_or(next, |number| next.max(number + 1));
    }
    next
}

fn ephemeral_target(pod: &Pod, name: &str, view: &PodView) -> Result<Option<String>, String> {
    let list = pod.spec.as_ref().and_then(|spec| spec.ephemeral_containers.as_deref()).unwrap_or_default();
    let target = list.iter().find(|ephemeral| ephemeral.name == name).and_then(|ephemeral| ephemeral.target_container_name.as_deref());
    match target.filter(|target| !target.is_empty()) {
        None => Ok(None),
        Some(target) => match view.find(target) {
            Some(found) => Ok(Some(found.id.clone())),
            None => Err(format!("unable to find target container {target}")),
        },
    }
}

/// Waits for a sidecar's turn to end: after the main containers, last started first.
pub trait Turn: Send + Sync {
    fn wait(&self, name: &str, limit: Duration) -> futures::future::BoxFuture<'_, ()>;
}

/// Runs the preStop hook, sends the stop signal, waits for the rest of the grace period, kills.
#[allow(clippy::too_many_arguments, reason = "each is a separate fact of the kill; a struct would only rename them")]
pub async fn kill(
    host: &Host,
    pod: &Pod,
    name: &str,
    id: &str,
    message: &str,
    reason: KillReason,
    grace: Option<i64>,
    turn: Option<&dyn Turn>,
    pod_ip: &str,
) -> crate::cri::Result<()> {
    let container = find_container(pod, name)
        .map(|(_, container)| container)
        .unwrap_or_else(|| Container { name: name.to_owned(), ..Container::default() });
    let text = if message.is_empty() { format!("Stopping container {name}") } else { message.to_owned() };
    container_event(host, pod, name, Kind::Normal, "Killing", text);
    let mut left = grace.unwrap_or_else(|| grace_for(pod, &container, reason));
    if let Some(hook) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref())
        && left > 0
    {
        let began = Instant::now();
        let limit = Duration::from_secs(left.unsigned_abs());
        match tokio::time::timeout(limit, hooks::run(host, pod, &container, id, pod_ip, hook)).await {
            Ok(Ok(())) => {}
            Ok(Err(message)) => {
                warn!(pod = %full_name(pod), container = name, message, "preStop hook failed");
                container_event(host, pod, name, Kind::Warning, "FailedPreStopHook", "PreStopHook failed");
            }
            Err(_) => debug!(pod = %full_name(pod), container = name, "preStop hook didn't end in time"),
        }
        left -= i64::try_from(began.elapsed().as_secs()).unwrap_or(left);
    }
    if let Some(turn) = turn
        && left > 0
    {
        let began = Instant::now();
        turn.wait(name, Duration::from_secs(left.unsigned_abs())).await;
        left -= i64::try_from(began.elapsed().as_secs()).unwrap_or(left);
    }
    host.cri.stop_container(id, left.max(MINIMUM_GRACE)).await
}

fn grace_for(pod: &Pod, container: &Container, reason: KillReason) -> i64 {
    if let Some(grace) = pod.metadata.deletion_grace_period_seconds {
        return grace;
    }
    let probe = match reason {
        KillReason::LivenessProbe => container.liveness_probe.as_ref(),
        KillReason::StartupProbe => container.startup_probe.as_ref(),
        KillReason::Other => None,
    };
    let own = probe.and_then(|probe| probe.termination_grace_period_seconds);
    own.unwrap_or_else(|| grace_period(pod))
}
