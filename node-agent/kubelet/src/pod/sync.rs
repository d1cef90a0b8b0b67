//! What a worker does with its pod: one pass of keeping, the stopping, the cleaning up.
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus, Secret};
use outrigger_cluster::Key;
use outrigger_cluster::status::events::Kind;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::actuate;
use super::meta::{
    containers, ephemeral_containers, full_name, grace_period, host_network, init_containers, is_mirror, is_sidecar, is_terminal_phase,
    name_of, namespace_of, reference, spec,
};
use super::plan::{KillReason, Plan, plan};
use super::record::{Record, Source};
use super::resize;
use super::sandbox::sandbox_config;
use super::start::{self, Place, Turn, kill};
use super::status::{self, Inputs, Verdict, Waiting};
use crate::cri::v1;
use crate::host::Host;
use crate::probe::{OfPod, Subject};
use crate::runtime::{self, PodView};
use crate::volume;

/// How a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The pod is as it should be, or waits for something that will wake it.
    Done,
    /// Something failed: try again soon.
    Failed,
    /// The pod has ended.
    Ended,
}

/// Reads the runtime and writes the status.
async fn look(host: &Host, record: &Record, terminal: bool) -> crate::cri::Result<Arc<PodView>> {
    let view = Arc::new(runtime::read(&host.cri, &record.uid).await?);
    record.set_view(view.clone());
    let completed = record.change_resize(|resize, object| {
        resize.keep_running(&view);
        resize.settle(object.metadata.generation, Timestamp::now())
    });
    if let Some(generation) = completed {
        let pod = record.pod();
        pod_event(host, &pod, Kind::Normal, "ResizeCompleted", resize::event("completed", &pod, generation, ""));
    }
    publish(host, record, &view, terminal);
    Ok(view)
}

fn publish(host: &Host, record: &Record, view: &PodView, terminal: bool) -> PodStatus {
    let status = generate(host, record, view, terminal);
    store(host, record, status.clone());
    status
}

fn generate(host: &Host, record: &Record, view: &PodView, terminal: bool) -> PodStatus {
    let pod = record.pod();
    status::generate(&Inputs {
        pod: &pod,
        old: &record.status(),
        view,
        waiting: &record.waiting(),
        probes: &OfPod { probes: &host.probes, pod: &pod },
        terminal,
        failed: record.failed().as_ref(),
        resize: &record.resize(),
        runtime_name: &host.runtime_name,
        node_ips: &host.config.node_ips,
        recursive_read_only: false,
        now: Timestamp::now(),
    })
}

/// Keeps the status and queues it for the API server: a static pod's on its mirror.
fn store(host: &Host, record: &Record, status: PodStatus) {
    record.set_status(status.clone());
    match record.source {
        Source::Api => host.writer.set_pod_status(&record.pod(), status),
        Source::File => {
            if let Some(mirror) = mirror_of(host, &record.pod()) {
                host.writer.set_pod_status(&mirror, status);
            }
        }
    }
}

/// The API object that shows a static pod.
pub fn mirror_of(host: &Host, pod: &Pod) -> Option<Arc<Pod>> {
    host.watch.pods.get(&Key::new(namespace_of(pod), name_of(pod))).filter(|found| is_mirror(found))
}

pub fn pod_event(host: &Host, pod: &Pod, kind: Kind, reason: &str, message: impl Into<String>) {
    host.writer.event(&reference(pod), kind, reason, message);
}

/// One pass: status, deadline, cgroup, volumes, then whatever the plan says.
pub async fn sync(host: &Arc<Host>, record: &Arc<Record>) -> Pass {
    let pod = record.pod();
    let view = match look(host, record, false).await {
        Ok(view) => view,
        Err(error) => {
            warn!(pod = %full_name(&pod), %error, "couldn't read the pod from the runtime");
            return Pass::Failed;
        }
    };
    if has_ended(record) {
        return Pass::Ended;
    }
    if past_deadline(host, record, &pod) {
        publish(host, record, &view, false);
        return Pass::Ended;
    }
    let volumes = match prepare(host, record, &pod, &view).await {
        Ok(volumes) => volumes,
        Err(()) => return Pass::Failed,
    };
    let subject: Arc<dyn Subject> = record.clone();
    host.probes.ensure(&host.probe_tools(), &subject);
    let resize = record.resize();
    let actions = plan(&pod, &view, &*host.probes, &resize.actuated);
    let idle = Plan { attempt: actions.attempt, sandbox_id: actions.sandbox_id.clone(), ..Plan::default() };
    if actions == idle && resize.in_progress.is_none() {
        return Pass::Done;
    }
    debug!(pod = %full_name(&pod), ?actions, "plan");
    let mut carried_out = carry_out(host, record, &pod, &view, &actions, &volumes).await;
    if carried_out.is_ok() && resize.in_progress.is_some() {
        carried_out = actuate::fit_cgroup(host, record, &pod).await.map_err(drop);
    }
    let seen = look(host, record, false).await;
    host.probes.kick(&record.uid);
    match (carried_out, seen) {
        _ if has_ended(record) => Pass::Ended,
        (Ok(()), Ok(_)) => Pass::Done,
        _ => Pass::Failed,
    }
}

fn has_ended(record: &Record) -> bool {
    record.status().phase.as_deref().is_some_and(is_terminal_phase)
}

fn past_deadline(host: &Host, record: &Record, pod: &Pod) -> bool {
    let Some(limit) = spec(pod).active_deadline_seconds else { return false };
    let Some(started) = record.status().start_time else { return false };
    let passed = Timestamp::now().duration_since(started.0).as_secs();
    if passed < limit {
        record.retry_after(Duration::from_secs((limit - passed).unsigned_abs()));
        return false;
    }
    let message = "Pod was active on the node longer than the specified deadline";
    record.fail(Verdict { reason: "DeadlineExceeded".into(), message: message.into(), ..Verdict::default() });
    pod_event(host, pod, Kind::Normal, "DeadlineExceeded", message);
    true
}

/// Everything that must be there before a container: cgroup, folders, mirror, volumes.
async fn prepare(host: &Arc<Host>, record: &Record, pod: &Arc<Pod>, view: &PodView) -> Result<HashMap<String, PathBuf>, ()> {
    if record.source == Source::File {
        crate::static_pod::ensure_mirror(host, pod).await;
    }
    if let Err(error) = actuate::fit_cgroup(host, record, pod).await {
        pod_event(host, pod, Kind::Warning, "FailedCreatePodContainer", format!("unable to ensure pod container exists: {error}"));
        warn!(pod = %full_name(pod), %error, "couldn't set up the pod's cgroup");
        return Err(());
    }
    host.lookup.hold(&record.uid, &volume::references(pod));
    let facts = volume::Facts { pod_ips: &pod_ips(host, pod, view), host_ips: &host.host_ips() };
    host.volumes.set_up(pod, &facts).await.map_err(|error| {
        debug!(pod = %full_name(pod), %error, "a volume isn't ready");
        pod_event(host, pod, Kind::Warning, "FailedMount", error.to_string());
    })
}

fn pod_ips(host: &Host, pod: &Pod, view: &PodView) -> Vec<String> {
    if host_network(pod) { host.host_ips() } else { view.ips() }
}

async fn carry_out(
    host: &Arc<Host>,
    record: &Record,
    pod: &Arc<Pod>,
    view: &PodView,
    actions: &Plan,
    volumes: &HashMap<String, PathBuf>,
) -> Result<(), ()> {
    if actions.kill_pod {
        if actions.create_sandbox && actions.sandbox_id.is_some() {
            pod_event(host, pod, Kind::Normal, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.");
        }
        kill_all(host, pod, view, None).await.map_err(|error| {
            warn!(pod = %full_name(pod), %error, "couldn't stop the pod");
            pod_event(host, pod, Kind::Warning, "FailedKillPod", format!("error killing pod: {error}"));
        })?;
        if !actions.create_sandbox {
            return Ok(());
        }
        remove_init_containers(host, pod, view).await;
    } else {
        for unwanted in &actions.kill {
            let ip = view.ips().first().cloned().unwrap_or_default();
            let killed = kill(host, pod, &unwanted.name, &unwanted.id, &unwanted.message, unwanted.reason, None, None, &ip).await;
            killed.map_err(|error| warn!(pod = %full_name(pod), container = unwanted.name, %error, "couldn't stop a container"))?;
        }
    }
    actuate::update(host, record, pod, &actions.resize).await?;
    let cgroup_parent = host.cgroups.parent_of(pod);
    let config = sandbox_config(&host.config, pod, actions.attempt, &cgroup_parent, &host.node_dns().await).map_err(|message| {
        pod_event(host, pod, Kind::Warning, "FailedCreatePodSandBox", format!("Failed to create pod sandbox: {message}"));
    })?;
    let (sandbox_id, ips) = match (&actions.sandbox_id, actions.create_sandbox) {
        (Some(id), false) => (id.clone(), pod_ips(host, pod, view)),
        _ => make_sandbox(host, pod, &config).await?,
    };
    let secrets = pull_secrets(host, pod).await;
    let place = Place { sandbox_id: &sandbox_id, sandbox_config: &config, pod_ips: &ips, volumes, pull_secrets: &secrets };
    // Containers of a sandbox that was replaced are no longer of this pod's present, but still count restarts.
    start_all(host, record, pod, view, actions, &place).await;
    Ok(())
}

async fn remove_init_containers(host: &Host, pod: &Pod, view: &PodView) {
    for container in init_containers(pod) {
        for old in view.containers.iter().filter(|old| old.name == container.name) {
            if let Err(error) = host.cri.remove_container(&old.id).await {
                debug!(pod = %full_name(pod), container = container.name, %error, "couldn't remove an old init container");
            }
        }
    }
}

async fn make_sandbox(host: &Host, pod: &Pod, config: &v1::PodSandboxConfig) -> Result<(String, Vec<String>), ()> {
    let failed = |message: String| {
        warn!(pod = %full_name(pod), message, "no sandbox");
        pod_event(host, pod, Kind::Warning, "FailedCreatePodSandBox", format!("Failed to create pod sandbox: {message}"));
    };
    let handler = match spec(pod).runtime_class_name.as_deref().filter(|name| !name.is_empty()) {
        None => String::new(),
        Some(name) => match host.lookup.runtime_class(name).await {
            Ok(Some(class)) => class.handler,
            Ok(None) => {
                failed(format!("RuntimeClass \"{name}\" not found"));
                return Err(());
            }
            Err(error) => {
                failed(error.to_string());
                return Err(());
            }
        },
    };
    tokio::fs::create_dir_all(&config.log_directory).await.map_err(|error| failed(format!("mkdir {}: {error}", config.log_directory)))?;
    let id = host.cri.run_sandbox(config.clone(), handler).await.map_err(|error| failed(error.to_string()))?;
    if host_network(pod) {
        return Ok((id, host.host_ips()));
    }
    let status = host.cri.sandbox_status(&id, false).await.map_err(|error| {
        pod_event(host, pod, Kind::Warning, "FailedStatusPodSandBox", format!("Unable to get pod sandbox status: {error}"));
    })?;
    let network = status.status.and_then(|status| status.network).unwrap_or_default();
    let ips = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip)).filter(|ip| !ip.is_empty());
    Ok((id, ips.collect()))
}

async fn pull_secrets(host: &Host, pod: &Pod) -> Vec<Arc<Secret>> {
    let mut secrets = Vec::new();
    for reference in spec(pod).image_pull_secrets.iter().flatten() {
        match host.lookup.secret(namespace_of(pod), &reference.name).await {
            Ok(Some(secret)) => secrets.push(secret),
            Ok(None) | Err(_) => {
                let message = format!(
                    "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                    reference.name
                );
                pod_event(host, pod, Kind::Warning, "FailedToRetrieveImagePullSecret", message);
            }
        }
    }
    secrets
}

async fn start_all(host: &Host, record: &Record, pod: &Pod, view: &PodView, actions: &Plan, place: &Place<'_>) {
    let ephemeral = ephemeral_containers(pod);
    let init = pick(&actions.start_init, init_containers(pod)).map(|container| (container, !is_sidecar(container)));
    let ephemeral = pick(&actions.start_ephemeral, &ephemeral).map(|container| (container, false));
    let main = pick(&actions.start_main, containers(pod)).map(|container| (container, false));
    let queue = ephemeral.chain(init).chain(main);
    for (index, (container, gates_the_rest)) in queue.enumerate() {
        // How the one before fared is shown already while this one's image is pulled.
        if index > 0
            && let Err(error) = look(host, record, false).await
        {
            debug!(pod = %full_name(pod), %error, "couldn't read the pod between two starts");
        }
        if !start_one(host, record, pod, container, view, place).await && gates_the_rest {
            return;
        }
    }
}

fn pick<'a>(indexes: &'a [usize], from: &'a [Container]) -> impl Iterator<Item = &'a Container> {
    indexes.iter().filter_map(|index| from.get(*index))
}

/// Failures are kept as the container's waiting reason, and a new try is asked for.
async fn start_one(host: &Host, record: &Record, pod: &Pod, container: &Container, view: &PodView, place: &Place<'_>) -> bool {
    match start::start(host, pod, container, view, place).await {
        Ok(()) => {
            record.set_waiting(&container.name, None);
            record.start_with(container);
            true
        }
        Err(error) => {
            debug!(pod = %full_name(pod), container = container.name, reason = error.reason, error.message, "not started");
            record.retry_after(error.retry_after.unwrap_or(Duration::from_secs(10)));
            record.set_waiting(&container.name, Some(Waiting { reason: error.reason, message: error.message }));
            false
        }
    }
}

/// The order in which a pod with sidecars ends: main containers first, then sidecars, the last one of the list first.
struct EndOrder {
    /// Who has to be gone before that sidecar is stopped.
    before: HashMap<String, Vec<String>>,
    ended: watch::Sender<Vec<String>>,
}

impl EndOrder {
    fn new(pod: &Pod, running: &[String]) -> Self {
        let mut before = HashMap::new();
        let mut earlier: Vec<String> =
            containers(pod).iter().map(|container| container.name.clone()).filter(|name| running.contains(name)).collect();
        for sidecar in init_containers(pod).iter().rev().filter(|container| is_sidecar(container)) {
            before.insert(sidecar.name.clone(), earlier.clone());
            if running.contains(&sidecar.name) {
                earlier.push(sidecar.name.clone());
            }
        }
        Self { before, ended: watch::Sender::new(Vec::new()) }
    }

    fn end(&self, name: &str) {
        self.ended.send_modify(|ended| ended.push(name.to_owned()));
    }
}

impl Turn for EndOrder {
    fn wait(&self, name: &str, limit: Duration) -> BoxFuture<'_, ()> {
        let before = self.before.get(name).cloned().unwrap_or_default();
        let mut ended = self.ended.subscribe();
        Box::pin(async move {
            let all = ended.wait_for(|ended| before.iter().all(|name| ended.contains(name)));
            // Time is up or all are gone: either way it's this one's turn.
            let _ = tokio::time::timeout(limit, all).await;
        })
    }
}

/// Stops all running containers at the same time, then the sandboxes.
async fn kill_all(host: &Host, pod: &Pod, view: &PodView, grace: Option<i64>) -> crate::cri::Result<()> {
    let running: Vec<String> = view.running().map(|container| container.name.clone()).collect();
    let order = EndOrder::new(pod, &running);
    let ip = view.ips().first().cloned().unwrap_or_default();
    let kills = view.running().map(|container| {
        let (order, ip) = (&order, ip.as_str());
        async move {
            let result = kill(host, pod, &container.name, &container.id, "", KillReason::Other, grace, Some(order), ip).await;
            order.end(&container.name);
            result
        }
    });
    for result in futures::future::join_all(kills).await {
        result?;
    }
    let stops = view.sandboxes.iter().filter(|sandbox| sandbox.ready || grace.is_some()).map(|sandbox| host.cri.stop_sandbox(&sandbox.id));
    for result in futures::future::join_all(stops).await {
        result?;
    }
    Ok(())
}

/// Ends the pod's containers within the grace period. True when none is left.
pub async fn stop(host: &Arc<Host>, record: &Arc<Record>, grace: i64) -> bool {
    let pod = record.pod();
    host.probes.stop_liveness_and_startup(&record.uid);
    let view = match look(host, record, false).await {
        Ok(view) => view,
        Err(error) => {
            warn!(pod = %full_name(&pod), %error, "couldn't read the pod from the runtime");
            return false;
        }
    };
    if let Err(error) = kill_all(host, &pod, &view, Some(grace)).await {
        warn!(pod = %full_name(&pod), %error, "couldn't stop the pod");
        pod_event(host, &pod, Kind::Warning, "FailedKillPod", format!("error killing pod: {error}"));
        return false;
    }
    host.probes.stop_all(&record.uid);
    match look(host, record, true).await {
        Ok(view) => view.running().next().is_none(),
        Err(_) => false,
    }
}

/// Writes the last status and takes volumes and cgroups away. True when nothing is left of them.
pub async fn clean_up(host: &Arc<Host>, record: &Arc<Record>) -> bool {
    let pod = record.pod();
    let view = record.view().unwrap_or_default();
    let mut last = generate(host, record, &view, true);
    status::conclude(&pod, &mut last);
    store(host, record, last);
    host.lookup.release(&record.uid);
    host.restarts.forget_pod(&record.uid);
    host.images.forget_pod(&record.uid);
    for container in &view.containers {
        host.probes.forget_container(&container.id);
    }
    if let Err(error) = host.volumes.tear_down(&record.uid).await {
        warn!(pod = %full_name(&pod), %error, "couldn't take the pod's volumes away");
        return false;
    }
    let (work, uid) = (host.clone(), record.uid.clone());
    host.in_flight.forget(&record.uid);
    match tokio::task::spawn_blocking(move || work.cgroups.remove_pod(&uid)).await {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            debug!(pod = %full_name(&pod), %error, "the pod's cgroup isn't empty yet");
            false
        }
        Err(error) => {
            warn!(pod = %full_name(&pod), %error, "cleaning up failed");
            false
        }
    }
}

/// Lets the API server forget the pod, once it has the last status.
pub async fn delete_object(host: &Host, record: &Record) -> bool {
    let pod = record.pod();
    host.writer.pod_status_written(&record.uid).await;
    match host.writer.delete_pod(namespace_of(&pod), name_of(&pod), &record.uid).await {
        Ok(()) => true,
        Err(error) => {
            warn!(pod = %full_name(&pod), %error, "couldn't delete the pod's object");
            false
        }
    }
}

/// Removes what remains of a pod that nobody knows any more: its sandboxes with their containers, and its logs.
pub async fn purge(host: &Host, record: &Record) {
    let pod = record.pod();
    let view = runtime::read(&host.cri, &record.uid).await.unwrap_or_default();
    for sandbox in &view.sandboxes {
        if let Err(error) = host.cri.remove_sandbox(&sandbox.id).await {
            debug!(pod = %full_name(&pod), %error, "couldn't remove a sandbox; the collector will");
        }
    }
    let logs = host.config.pod_logs_dir(namespace_of(&pod), name_of(&pod), &record.uid);
    if let Err(error) = tokio::fs::remove_dir_all(&logs).await
        && error.kind() != std::io::ErrorKind::NotFound
    {
        debug!(pod = %full_name(&pod), %error, "couldn't remove the pod's logs; the collector will");
    }
    host.writer.forget_pod(&record.uid);
    if record.source == Source::File
        && let Some(mirror) = mirror_of(host, &pod)
        && let Err(error) = host.writer.delete_pod(namespace_of(&mirror), name_of(&mirror), super::meta::uid_of(&mirror)).await
    {
        warn!(pod = %full_name(&pod), %error, "couldn't delete the mirror pod");
    }
    info!(pod = %full_name(&pod), "removed");
}

/// Seconds that the pod has to end, by how its end was asked for.
pub fn grace_of(pod: &Pod) -> i64 {
    pod.metadata.deletion_grace_period_seconds.unwrap_or_else(|| grace_period(pod)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::test_data::pod;

    #[tokio::test]
    async fn sidecars_end_last_in_reverse_order() {
        let pod = pod("Always", &["s1*", "s2*"], &["a"]);
        let running = ["a", "s1", "s2"].map(str::to_owned);
        let order = EndOrder::new(&pod, &running);
        assert!(!order.before.contains_key("a"));
        assert_eq!(order.before["s2"], ["a"]);
        assert_eq!(order.before["s1"], ["a", "s2"]);
        order.end("a");
        order.wait("s2", Duration::from_secs(60)).await;
    }
}
