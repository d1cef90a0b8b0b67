//! The pod conditions that the node decides: PodReadyToStartContainers, Initialized, Ready, ContainersReady.
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::meta::{containers, host_network, init_containers, is_sidecar};
use super::resize;
use super::status::Inputs;

const DISRUPTION: &str = "DisruptionTarget";

/// Status, reason and message of one condition.
struct Finding {
    status: bool,
    reason: &'static str,
    message: String,
}

impl Finding {
    fn is(status: bool) -> Self {
        Self { status, reason: "", message: String::new() }
    }

    fn no(reason: &'static str, message: String) -> Self {
        Self { status: false, reason, message }
    }
}

/// All of them, in the order in which upstream lists them, with the transition times of the status before where nothing turned.
pub fn generate(inputs: &Inputs<'_>, status: &PodStatus) -> Vec<PodCondition> {
    let statuses: Vec<&ContainerStatus> =
        status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten()).collect();
    let phase = status.phase.as_deref().unwrap_or_default();
    let (new_sandbox_needed, _, _) = inputs.view.sandbox_changed(host_network(inputs.pod));
    let containers_ready = containers_ready(inputs.pod, &statuses, phase);
    let ready = ready(inputs.pod, &containers_ready);
    let mut conditions: Vec<PodCondition> = resize::conditions(inputs.resize, inputs.pod, inputs.terminal).collect();
    conditions.extend([
        condition(inputs, "PodReadyToStartContainers", Finding::is(!new_sandbox_needed)),
        condition(inputs, "Initialized", initialized(inputs.pod, &statuses, phase)),
        condition(inputs, "Ready", ready),
        condition(inputs, "ContainersReady", containers_ready),
        condition(inputs, "PodScheduled", Finding::is(true)),
    ]);
    // Set once when a pod is evicted; it stays.
    let told = inputs.old.conditions.iter().flatten().find(|condition| condition.type_ == DISRUPTION).cloned();
    conditions.extend(told.or_else(|| {
        let verdict = inputs.failed.filter(|verdict| verdict.disruption)?;
        Some(condition(inputs, DISRUPTION, Finding { status: true, reason: "TerminationByKubelet", message: verdict.message.clone() }))
    }));
    conditions
}

fn condition(inputs: &Inputs<'_>, type_: &str, finding: Finding) -> PodCondition {
    let status = if finding.status { "True" } else { "False" };
    let old =
        inputs.old.conditions.iter().flatten().chain(inputs.pod.status.iter().filter_map(|status| status.conditions.as_ref()).flatten());
    let unchanged = old.into_iter().find(|old| old.type_ == type_ && old.status == status);
    let now = Timestamp::from_second(inputs.now.as_second()).unwrap_or(inputs.now);
    PodCondition {
        type_: type_.into(),
        status: status.into(),
        reason: (!finding.reason.is_empty()).then(|| finding.reason.to_owned()),
        message: (!finding.message.is_empty()).then_some(finding.message),
        last_transition_time: unchanged.map_or_else(|| Some(Time(now)), |old| old.last_transition_time.clone()),
        observed_generation: inputs.pod.metadata.generation,
        ..PodCondition::default()
    }
}

/// `[a b]`, as Go prints a list.
fn listed(names: &[&str]) -> String {
    format!("[{}]", names.join(" "))
}

fn find<'a>(statuses: &[&'a ContainerStatus], name: &str) -> Option<&'a ContainerStatus> {
    statuses.iter().find(|status| status.name == name).copied()
}

fn containers_ready(pod: &Pod, statuses: &[&ContainerStatus], phase: &str) -> Finding {
    if phase == "Failed" {
        return Finding::no("PodFailed", String::new());
    }
    let mut unknown = Vec::new();
    let mut unready = Vec::new();
    for container in init_containers(pod).iter().filter(|container| is_sidecar(container)).chain(containers(pod)) {
        match find(statuses, &container.name) {
            None => unknown.push(container.name.as_str()),
            Some(status) if !status.ready => unready.push(container.name.as_str()),
            Some(_) => {}
        }
    }
    if phase == "Succeeded" && unknown.is_empty() {
        return Finding::no("PodCompleted", String::new());
    }
    match messages(&unknown, &unready, "unready") {
        Some(message) => Finding::no("ContainersNotReady", message),
        None => Finding::is(true),
    }
}

fn messages(unknown: &[&str], others: &[&str], what: &str) -> Option<String> {
    let mut parts = Vec::new();
    if !unknown.is_empty() {
        parts.push(format!("containers with unknown status: {}", listed(unknown)));
    }
    if !others.is_empty() {
        parts.push(format!("containers with {what} status: {}", listed(others)));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn ready(pod: &Pod, containers_ready: &Finding) -> Finding {
    if !containers_ready.status {
        return Finding { status: false, reason: containers_ready.reason, message: containers_ready.message.clone() };
    }
    let gates = pod.spec.as_ref().and_then(|spec| spec.readiness_gates.as_deref()).unwrap_or_default();
    let current = |type_: &str| {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        conditions.iter().find(|condition| condition.type_ == type_)
    };
    let unmet: Vec<String> = gates
        .iter()
        .filter_map(|gate| match current(&gate.condition_type) {
            None => Some(format!("corresponding condition of pod readiness gate \"{}\" does not exist.", gate.condition_type)),
            Some(condition) if condition.status != "True" => {
                Some(format!("the status of pod readiness gate \"{}\" is not \"True\", but {}", gate.condition_type, condition.status))
            }
            Some(_) => None,
        })
        .collect();
    if unmet.is_empty() { Finding::is(true) } else { Finding::no("ReadinessGatesNotReady", unmet.join(", ")) }
}

fn initialized(pod: &Pod, statuses: &[&ContainerStatus], phase: &str) -> Finding {
    if statuses.is_empty() && !init_containers(pod).is_empty() {
        return Finding::no("UnknownContainerStatuses", String::new());
    }
    let mut unknown = Vec::new();
    let mut incomplete = Vec::new();
    for container in init_containers(pod) {
        let done = |status: &ContainerStatus| if is_sidecar(container) { status.started == Some(true) } else { status.ready };
        match find(statuses, &container.name) {
            None => unknown.push(container.name.as_str()),
            Some(status) if !done(status) => incomplete.push(container.name.as_str()),
            Some(_) => {}
        }
    }
    if phase == "Succeeded" && unknown.is_empty() {
        return Finding { status: true, reason: "PodCompleted", message: String::new() };
    }
    let started = |status: &ContainerStatus| {
        let ended =
            |state: &Option<k8s_openapi::api::core::v1::ContainerState>| state.as_ref().is_some_and(|state| state.terminated.is_some());
        status.state.as_ref().is_some_and(|state| state.running.is_some()) || ended(&status.state) || ended(&status.last_state)
    };
    if containers(pod).iter().any(|container| find(statuses, &container.name).is_some_and(started)) {
        return Finding::is(true);
    }
    match messages(&unknown, &incomplete, "incomplete") {
        Some(message) => Finding::no("ContainersNotInitialized", message),
        None => Finding::is(true),
    }
}
