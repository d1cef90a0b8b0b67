//! The pod's status as the API shows it: pure, from the spec, the runtime's view, the probes' results and the status before.
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, ContainerUser,
    HostIP, LinuxContainerUser, Pod, PodIP, PodStatus, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::conditions;
use super::meta::{
    containers, ephemeral_containers, host_network, init_containers, is_sidecar, is_static, is_terminal_phase, phase, restarts_after,
    should_restart,
};
use super::resize::Resize;
use super::resources::qos;
use crate::runtime::{ContainerView, PodView, RunState};

const UNKNOWN_REASON: &str = "ContainerStatusUnknown";
/// The code of a container of which nobody knows how it ended.
const UNKNOWN_EXIT: i32 = 137;

/// Why a container isn't running although it should: `state.waiting`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

/// What the probes say, asked by container (its name and id).
pub trait ProbeState {
    fn started(&self, name: &str, container_id: &str) -> bool;
    fn ready(&self, name: &str, container_id: &str) -> bool;
}

/// An end that the node decided: rejected, evicted, past its deadline.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub reason: String,
    pub message: String,
    /// Seconds for the containers to end, where the pod's own aren't granted.
    pub grace: Option<i64>,
    /// The pod is sacrificed for the node's sake: its condition says so.
    pub disruption: bool,
}

pub struct Inputs<'a> {
    pub pod: &'a Pod,
    /// What was last written, or what the API has.
    pub old: &'a PodStatus,
    pub view: &'a PodView,
    pub waiting: &'a HashMap<String, Waiting>,
    pub probes: &'a dyn ProbeState,
    /// The pod won't be started again.
    pub terminal: bool,
    pub failed: Option<&'a Verdict>,
    pub resize: &'a Resize,
    pub runtime_name: &'a str,
    pub node_ips: &'a [IpAddr],
    pub recursive_read_only: bool,
    pub now: Timestamp,
}

pub fn time(nanoseconds: i64) -> Option<Time> {
    Timestamp::from_second(nanoseconds.div_euclid(1_000_000_000)).ok().map(Time)
}

fn seconds(now: Timestamp) -> Time {
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

pub fn generate(inputs: &Inputs<'_>) -> PodStatus {
    let pod = inputs.pod;
    let has_init = !init_containers(pod).is_empty();
    let waiting_for = if has_init { "PodInitializing" } else { "ContainerCreating" };
    let mut status = PodStatus {
        qos_class: Some(qos(pod).name().into()),
        observed_generation: pod.metadata.generation,
        start_time: inputs.old.start_time.clone().or_else(|| Some(seconds(inputs.now))),
        ..PodStatus::default()
    };
    status.container_statuses = container_statuses(inputs, containers(pod), &inputs.old.container_statuses, waiting_for, false);
    status.init_container_statuses =
        container_statuses(inputs, init_containers(pod), &inputs.old.init_container_statuses, waiting_for, true);
    let ephemeral = ephemeral_containers(pod);
    status.ephemeral_container_statuses =
        container_statuses(inputs, &ephemeral, &inputs.old.ephemeral_container_statuses, waiting_for, false);
    apply_probes(inputs, &mut status);
    let all: Vec<&ContainerStatus> =
        status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten()).collect();
    let started_before = containers(pod)
        .iter()
        .any(|container| inputs.view.find(&container.name).is_some_and(|view| matches!(view.state, RunState::Running | RunState::Created)));
    let mut new_phase = compute_phase(pod, &all, inputs.terminal, started_before);
    settle_phase(inputs, &mut new_phase, &mut status);
    status.phase = Some(new_phase.into());
    set_addresses(inputs, &mut status);
    status.conditions = Some(conditions::generate(inputs, &status));
    status
}

/// A last phase is never left, reason and message stay with their phase, the node's own verdict wins.
fn settle_phase(inputs: &Inputs<'_>, new_phase: &mut &'static str, status: &mut PodStatus) {
    let terminal = |phase: &str| match phase {
        "Failed" => Some("Failed"),
        "Succeeded" => Some("Succeeded"),
        _ => None,
    };
    let before = inputs.old.phase.as_deref().unwrap_or_default();
    if terminal(new_phase).is_none()
        && let Some(last) = terminal(before).or_else(|| terminal(phase(inputs.pod)))
    {
        *new_phase = last;
    }
    if *new_phase == before {
        let api = inputs.pod.status.as_ref();
        status.reason = inputs.old.reason.clone().or_else(|| api.and_then(|status| status.reason.clone()));
        status.message = inputs.old.message.clone().or_else(|| api.and_then(|status| status.message.clone()));
    }
    if let Some(verdict) = inputs.failed {
        *new_phase = "Failed";
        status.reason = Some(verdict.reason.clone());
        status.message = Some(verdict.message.clone());
    }
    if let Some(last) = terminal(phase(inputs.pod)) {
        *new_phase = last;
    }
}

fn set_addresses(inputs: &Inputs<'_>, status: &mut PodStatus) {
    let mut ips = inputs.view.ips();
    let nodes: Vec<String> = inputs.node_ips.iter().map(ToString::to_string).collect();
    if host_network(inputs.pod) {
        ips.clone_from(&nodes);
    }
    status.host_ip = nodes.first().cloned();
    status.host_ips = (!nodes.is_empty()).then(|| nodes.into_iter().map(|ip| HostIP { ip }).collect());
    // The addresses of a pod that has ended stay in its status.
    if ips.is_empty() && !inputs.view.containers.is_empty() {
        ips = inputs.old.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect();
    }
    status.pod_ip = ips.first().cloned();
    status.pod_ips = (!ips.is_empty()).then(|| ips.into_iter().map(|ip| PodIP { ip }).collect());
}

fn apply_probes(inputs: &Inputs<'_>, status: &mut PodStatus) {
    let id = |status: &ContainerStatus| {
        let full = status.container_id.as_deref().unwrap_or_default();
        full.rsplit("://").next().unwrap_or_default().to_owned()
    };
    let running = |status: &ContainerStatus| status.state.as_ref().is_some_and(|state| state.running.is_some());
    let init = status.init_container_statuses.iter_mut().flatten();
    for status in init {
        let sidecar = init_containers(inputs.pod).iter().any(|container| container.name == status.name && is_sidecar(container));
        let id = id(status);
        let started = running(status) && inputs.probes.started(&status.name, &id);
        status.started = Some(started);
        status.ready = if sidecar {
            started && inputs.probes.ready(&status.name, &id)
        } else {
            status.state.as_ref().and_then(|state| state.terminated.as_ref()).is_some_and(|terminated| terminated.exit_code == 0)
        };
    }
    for status in status.container_statuses.iter_mut().flatten() {
        let id = id(status);
        let started = running(status) && inputs.probes.started(&status.name, &id);
        status.started = Some(started);
        status.ready = started && inputs.probes.ready(&status.name, &id);
    }
}

fn waiting_state(reason: &str, message: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: (!reason.is_empty()).then(|| reason.to_owned()),
            message: (!message.is_empty()).then(|| message.to_owned()),
        }),
        ..ContainerState::default()
    }
}

fn unknown_end(message: &str) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            reason: Some(UNKNOWN_REASON.into()),
            message: Some(message.into()),
            exit_code: UNKNOWN_EXIT,
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

fn container_statuses(
    inputs: &Inputs<'_>,
    list: &[Container],
    old: &Option<Vec<ContainerStatus>>,
    waiting_for: &str,
    init: bool,
) -> Option<Vec<ContainerStatus>> {
    if list.is_empty() {
        return None;
    }
    let old: HashMap<&str, &ContainerStatus> = old.iter().flatten().map(|status| (status.name.as_str(), status)).collect();
    let mut statuses: BTreeMap<&str, ContainerStatus> = BTreeMap::new();
    for container in list {
        let before = old.get(container.name.as_str()).copied();
        let mut seen = inputs.view.containers.iter().filter(|view| view.name == container.name);
        let status = match seen.next() {
            Some(newest) => seen_status(inputs, container, newest, seen.next(), before),
            None => unseen_status(inputs, container, before, waiting_for),
        };
        statuses.insert(&container.name, status);
    }
    for container in list {
        let newest = inputs.view.find(&container.name);
        if init && newest.is_some_and(|view| view.state == RunState::Exited && view.exit_code == 0) {
            continue;
        }
        if !should_restart(inputs.pod, container, newest) {
            continue;
        }
        if let (Some(waiting), Some(status)) = (inputs.waiting.get(&container.name), statuses.get_mut(container.name.as_str())) {
            if status.state.as_ref().is_some_and(|state| state.terminated.is_some()) {
                status.last_state = status.state.take();
            }
            status.state = Some(waiting_state(&waiting.reason, &waiting.message));
        }
    }
    if init {
        return Some(list.iter().filter_map(|container| statuses.remove(container.name.as_str())).collect());
    }
    Some(statuses.into_values().collect())
}

/// The runtime has the container.
fn seen_status(
    inputs: &Inputs<'_>,
    container: &Container,
    newest: &ContainerView,
    older: Option<&ContainerView>,
    before: Option<&ContainerStatus>,
) -> ContainerStatus {
    let id = format!("{}://{}", inputs.runtime_name, newest.id);
    let mut status = ContainerStatus {
        name: newest.name.clone(),
        restart_count: newest.restart_count,
        image: newest.image.clone(),
        image_id: newest.image_ref.clone(),
        container_id: Some(id.clone()),
        state: Some(state_of(inputs, newest, before)),
        last_state: older.map(|older| state_of(inputs, older, None)),
        volume_mounts: before.and_then(|before| before.volume_mounts.clone()).or_else(|| volume_mounts(inputs, container)),
        resources: inputs.resize.actuated.get(&container.name).cloned().or_else(|| container.resources.clone()),
        allocated_resources: container.resources.as_ref().and_then(|resources| resources.requests.clone()),
        user: newest.user.as_ref().map(|user| ContainerUser {
            linux: Some(LinuxContainerUser {
                uid: user.uid,
                gid: user.gid,
                supplemental_groups: (!user.supplemental_groups.is_empty()).then(|| user.supplemental_groups.clone()),
            }),
        }),
        ..ContainerStatus::default()
    };
    if newest.state == RunState::Unknown && before.is_some_and(was_running) {
        status.restart_count = before.map_or(0, |before| before.restart_count) + 1;
    }
    // The container before may have been removed already: what was known of it stays.
    if older.is_none()
        && let Some(before) = before
        && before.restart_count == status.restart_count
    {
        status.last_state.clone_from(&before.last_state);
    }
    status
}

fn was_running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.running.is_some())
}

fn state_of(inputs: &Inputs<'_>, view: &ContainerView, before: Option<&ContainerStatus>) -> ContainerState {
    match view.state {
        RunState::Running => {
            ContainerState { running: Some(ContainerStateRunning { started_at: time(view.started_at) }), ..ContainerState::default() }
        }
        RunState::Created => waiting_state("", ""),
        RunState::Exited => ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: view.exit_code,
                reason: (!view.reason.is_empty()).then(|| view.reason.clone()),
                message: (!view.message.is_empty()).then(|| view.message.clone()),
                started_at: time(view.started_at),
                finished_at: time(view.finished_at),
                container_id: Some(format!("{}://{}", inputs.runtime_name, view.id)),
                signal: None,
            }),
            ..ContainerState::default()
        },
        RunState::Unknown if before.is_some_and(was_running) => {
            unknown_end("The container could not be located when the pod was terminated")
        }
        RunState::Unknown => waiting_state("", ""),
    }
}

/// The runtime doesn't have it: not yet, or no longer.
fn unseen_status(inputs: &Inputs<'_>, container: &Container, before: Option<&ContainerStatus>, waiting_for: &str) -> ContainerStatus {
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        state: Some(waiting_state(waiting_for, "")),
        volume_mounts: volume_mounts(inputs, container),
        ..ContainerStatus::default()
    };
    let Some(before) = before else { return status };
    if before.state.as_ref().is_some_and(|state| state.terminated.is_some()) {
        return before.clone();
    }
    status.restart_count = before.restart_count;
    status.last_state.clone_from(&before.last_state);
    let has_last = status.last_state.as_ref().is_some_and(|state| state.terminated.is_some());
    if was_running(before) && !has_last {
        status.last_state =
            Some(unknown_end("The container could not be located when the pod was deleted.  The container used to be Running"));
        if inputs.pod.metadata.deletion_timestamp.is_none() {
            status.restart_count += 1;
        }
    }
    status
}

fn volume_mounts(inputs: &Inputs<'_>, container: &Container) -> Option<Vec<VolumeMountStatus>> {
    let mounts = container.volume_mounts.as_ref()?;
    let status = mounts.iter().map(|mount| {
        let read_only = mount.read_only.unwrap_or(false);
        let recursive = match mount.recursive_read_only.as_deref() {
            Some("Enabled") => true,
            Some("IfPossible") => inputs.recursive_read_only,
            _ => false,
        };
        VolumeMountStatus {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            read_only: mount.read_only.filter(|read_only| *read_only),
            recursive_read_only: read_only.then(|| if recursive { "Enabled" } else { "Disabled" }.to_owned()),
        }
    });
    (!mounts.is_empty()).then(|| status.collect())
}

/// Counters of how the containers stand; upstream's `getPhase`.
#[derive(Default)]
struct Tally {
    pending_init: usize,
    pending_sidecar: usize,
    failed_for_good: usize,
    unknown: usize,
    running: usize,
    waiting: usize,
    stopped: usize,
    stopped_for_good: usize,
    succeeded: usize,
}

pub fn compute_phase(pod: &Pod, statuses: &[&ContainerStatus], terminal: bool, started_before: bool) -> &'static str {
    let tally = tally(pod, statuses);
    if tally.failed_for_good > 0 {
        return "Failed";
    }
    if tally.pending_init > 0 || (tally.pending_sidecar > 0 && !started_before) || tally.waiting > 0 {
        return "Pending";
    }
    if tally.running > 0 && tally.unknown == 0 {
        return "Running";
    }
    if tally.running == 0 && tally.stopped > 0 && tally.unknown == 0 {
        let ended = terminal && !is_static(pod);
        if !ended && tally.stopped != tally.stopped_for_good {
            return "Running";
        }
        return if tally.stopped == tally.succeeded { "Succeeded" } else { "Failed" };
    }
    "Pending"
}

fn tally(pod: &Pod, statuses: &[&ContainerStatus]) -> Tally {
    let mut tally = Tally::default();
    let find = |name: &str| statuses.iter().find(|status| status.name == name).copied();
    let last_exit = |status: &ContainerStatus| {
        status.last_state.as_ref().and_then(|state| state.terminated.as_ref()).map(|terminated| terminated.exit_code)
    };
    for container in init_containers(pod) {
        let Some(status) = find(&container.name) else {
            if is_sidecar(container) {
                tally.unknown += 1
            } else {
                tally.pending_init += 1
            }
            continue;
        };
        let state = status.state.clone().unwrap_or_default();
        if is_sidecar(container) {
            if state.running.is_some() {
                tally.pending_sidecar += usize::from(status.started != Some(true));
                tally.running += 1;
            } else if state.waiting.is_some() && last_exit(status).is_none() {
                tally.pending_sidecar += 1;
                tally.waiting += 1;
            }
            continue;
        }
        let exit = state.terminated.map(|terminated| terminated.exit_code).or_else(|| state.waiting.and(last_exit(status)));
        match exit {
            Some(0) => {}
            Some(code) => tally.failed_for_good += usize::from(!restarts_after(pod, container, code)),
            None => tally.pending_init += 1,
        }
    }
    for container in containers(pod) {
        let Some(status) = find(&container.name) else {
            tally.unknown += 1;
            continue;
        };
        let state = status.state.clone().unwrap_or_default();
        if state.running.is_some() {
            tally.running += 1;
        } else if let Some(terminated) = state.terminated {
            tally.stopped += 1;
            tally.stopped_for_good += usize::from(!restarts_after(pod, container, terminated.exit_code));
            tally.succeeded += usize::from(terminated.exit_code == 0);
        } else if let Some(code) = last_exit(status) {
            tally.stopped += 1;
            tally.stopped_for_good += usize::from(!restarts_after(pod, container, code));
        } else {
            tally.waiting += 1;
        }
    }
    tally
}

/// The last status of a pod whose containers are all gone: what isn't known to have ended counts as lost, and the phase is a last one.
pub fn conclude(pod: &Pod, status: &mut PodStatus) {
    let lost = || Some(unknown_end("The container could not be located when the pod was terminated"));
    let ended = |status: &ContainerStatus| status.state.as_ref().is_some_and(|state| state.terminated.is_some());
    let initialized = status.conditions.iter().flatten().any(|condition| condition.type_ == "Initialized" && condition.status == "True");
    if initialized {
        for status in status.container_statuses.iter_mut().flatten().filter(|status| !ended(status)) {
            status.state = lost();
            status.ready = false;
            status.started = Some(false);
        }
    }
    if let Some(list) = &mut status.init_container_statuses {
        let was_started = |status: &ContainerStatus| {
            let state = status.state.as_ref();
            let last = status.last_state.as_ref();
            state.is_some_and(|state| state.running.is_some() || state.terminated.is_some())
                || last.is_some_and(|last| last.terminated.is_some())
        };
        let started = list.iter().rposition(was_started).map_or(0, |last| last + 1);
        for status in list[..started].iter_mut().filter(|status| !ended(status)) {
            status.state = lost();
            status.ready = false;
            status.started = Some(false);
        }
    }
    if !is_static(pod) && !status.phase.as_deref().is_some_and(is_terminal_phase) {
        status.phase = Some("Failed".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::test_data::{pod, view};

    struct AllReady;
    impl ProbeState for AllReady {
        fn started(&self, _: &str, _: &str) -> bool {
            true
        }
        fn ready(&self, _: &str, _: &str) -> bool {
            true
        }
    }

    fn status_of(pod: &Pod, old: &PodStatus, view: &PodView, waiting: &[(&str, &str)], terminal: bool) -> PodStatus {
        let waiting =
            waiting.iter().map(|(name, reason)| ((*name).to_owned(), Waiting { reason: (*reason).into(), message: "m".into() })).collect();
        generate(&Inputs {
            pod,
            old,
            view,
            waiting: &waiting,
            probes: &AllReady,
            terminal,
            failed: None,
            resize: &Resize::default(),
            runtime_name: "containerd",
            node_ips: &["192.0.2.1".parse().unwrap()],
            recursive_read_only: false,
            now: Timestamp::UNIX_EPOCH,
        })
    }

    fn condition<'a>(status: &'a PodStatus, type_: &str) -> (&'a str, &'a str) {
        let condition = status.conditions.iter().flatten().find(|condition| condition.type_ == type_).unwrap();
        (&condition.status, condition.reason.as_deref().unwrap_or_default())
    }

    #[test]
    fn phases() {
        let old = PodStatus::default();
        for (policy, containers, terminal, phase) in [
            ("Always", &[][..], false, "Pending"),
            ("Always", &[("a", "running")], false, "Running"),
            ("Always", &[("a", "exited 0")], false, "Running"),
            ("Always", &[("a", "exited 0")], true, "Succeeded"),
            ("Always", &[("a", "exited 1")], true, "Failed"),
            ("OnFailure", &[("a", "exited 0")], false, "Succeeded"),
            ("OnFailure", &[("a", "exited 1")], false, "Running"),
            ("Never", &[("a", "exited 1")], false, "Failed"),
            ("Never", &[("a", "exited 0")], false, "Succeeded"),
        ] {
            let status = status_of(&pod(policy, &[], &["a"]), &old, &view(containers), &[], terminal);
            assert_eq!(status.phase.as_deref(), Some(phase), "{policy} {containers:?}");
        }
    }

    #[test]
    fn a_failed_init_container_fails_a_pod_that_never_restarts() {
        let failed = view(&[("i", "exited 1")]);
        assert_eq!(status_of(&pod("Never", &["i"], &["a"]), &PodStatus::default(), &failed, &[], false).phase.as_deref(), Some("Failed"));
        assert_eq!(status_of(&pod("Always", &["i"], &["a"]), &PodStatus::default(), &failed, &[], false).phase.as_deref(), Some("Pending"));
    }

    #[test]
    fn a_running_pod_is_ready() {
        let status = status_of(&pod("Always", &[], &["a"]), &PodStatus::default(), &view(&[("a", "running")]), &[], false);
        for type_ in ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"] {
            assert_eq!(condition(&status, type_), ("True", ""), "{type_}");
        }
        assert_eq!(status.pod_ip.as_deref(), Some("10.0.0.1"));
        let container = &status.container_statuses.unwrap()[0];
        assert_eq!(container.container_id.as_deref(), Some("containerd://a-0"));
        assert!(container.ready);
    }

    #[test]
    fn a_crashing_container_waits_and_shows_its_last_end() {
        let status =
            status_of(&pod("Always", &[], &["a"]), &PodStatus::default(), &view(&[("a", "exited 3")]), &[("a", "CrashLoopBackOff")], false);
        assert_eq!(status.phase.as_deref(), Some("Running"));
        assert_eq!(condition(&status, "Ready"), ("False", "ContainersNotReady"));
        let container = &status.container_statuses.unwrap()[0];
        assert_eq!(container.state.as_ref().unwrap().waiting.as_ref().unwrap().reason.as_deref(), Some("CrashLoopBackOff"));
        assert_eq!(container.last_state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 3);
    }

    #[test]
    fn a_succeeded_pod_is_complete() {
        let status = status_of(&pod("Never", &[], &["a"]), &PodStatus::default(), &view(&[("a", "exited 0")]), &[], false);
        assert_eq!(condition(&status, "Ready"), ("False", "PodCompleted"));
        assert_eq!(condition(&status, "Initialized"), ("True", "PodCompleted"));
    }

    #[test]
    fn a_last_phase_stays() {
        let old = PodStatus { phase: Some("Failed".into()), reason: Some("Evicted".into()), ..PodStatus::default() };
        let status = status_of(&pod("Always", &[], &["a"]), &old, &view(&[("a", "running")]), &[], false);
        assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("Evicted")));
    }

    #[test]
    fn lost_containers_end_as_unknown() {
        let pod = pod("Always", &[], &["a"]);
        let running = status_of(&pod, &PodStatus::default(), &view(&[("a", "running")]), &[], false);
        let mut status = status_of(&pod, &running, &view(&[]), &[], true);
        conclude(&pod, &mut status);
        assert_eq!(status.phase.as_deref(), Some("Failed"));
        let container = &status.container_statuses.unwrap()[0];
        assert_eq!(container.state.as_ref().unwrap().terminated.as_ref().unwrap().reason.as_deref(), Some(UNKNOWN_REASON));
    }
}
