//! Short ways to what is asked of a pod all the time.
use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod, PodSpec};

use crate::runtime::ContainerView;

/// The annotations of static pods and their mirrors.
pub const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
pub const CONFIG_SEEN: &str = "kubernetes.io/config.seen";
pub const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

pub fn uid_of(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

pub fn name_of(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub fn namespace_of(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or_default()
}

/// `name_namespace(uid)`, the way upstream prints a pod in messages.
pub fn full_name(pod: &Pod) -> String {
    format!("{}_{}({})", name_of(pod), namespace_of(pod), uid_of(pod))
}

pub fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

pub fn is_mirror(pod: &Pod) -> bool {
    annotation(pod, CONFIG_MIRROR).is_some()
}

/// Read from a file, not from the API server.
pub fn is_static(pod: &Pod) -> bool {
    annotation(pod, CONFIG_SOURCE).is_some_and(|source| source != "api") && !is_mirror(pod)
}

/// A pod without a spec has no containers; the API server never sends one.
pub fn spec(pod: &Pod) -> std::borrow::Cow<'_, PodSpec> {
    match &pod.spec {
        Some(spec) => std::borrow::Cow::Borrowed(spec),
        None => std::borrow::Cow::Owned(PodSpec::default()),
    }
}

pub fn containers(pod: &Pod) -> &[Container] {
    pod.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default()
}

pub fn init_containers(pod: &Pod) -> &[Container] {
    pod.spec.as_ref().and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default()
}

/// Ephemeral containers in the shape of ordinary ones.
pub fn ephemeral_containers(pod: &Pod) -> Vec<Container> {
    let list = pod.spec.as_ref().and_then(|spec| spec.ephemeral_containers.as_deref()).unwrap_or_default();
    list.iter()
        .map(|ephemeral| Container {
            args: ephemeral.args.clone(),
            command: ephemeral.command.clone(),
            env: ephemeral.env.clone(),
            env_from: ephemeral.env_from.clone(),
            image: ephemeral.image.clone(),
            image_pull_policy: ephemeral.image_pull_policy.clone(),
            name: ephemeral.name.clone(),
            resources: ephemeral.resources.clone(),
            security_context: ephemeral.security_context.clone(),
            stdin: ephemeral.stdin,
            stdin_once: ephemeral.stdin_once,
            termination_message_path: ephemeral.termination_message_path.clone(),
            termination_message_policy: ephemeral.termination_message_policy.clone(),
            tty: ephemeral.tty,
            volume_devices: ephemeral.volume_devices.clone(),
            volume_mounts: ephemeral.volume_mounts.clone(),
            working_dir: ephemeral.working_dir.clone(),
            ..Container::default()
        })
        .collect()
}

/// Which list of the pod a container stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Init,
    Main,
    Ephemeral,
}

pub fn find_container(pod: &Pod, name: &str) -> Option<(Role, Container)> {
    if let Some(container) = containers(pod).iter().find(|container| container.name == name) {
        return Some((Role::Main, container.clone()));
    }
    if let Some(container) = init_containers(pod).iter().find(|container| container.name == name) {
        return Some((Role::Init, container.clone()));
    }
    ephemeral_containers(pod).into_iter().find(|container| container.name == name).map(|container| (Role::Ephemeral, container))
}

/// An init container that keeps running beside the main ones.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

pub fn restart_policy(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()).unwrap_or("Always")
}

pub fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

pub fn grace_period(pod: &Pod) -> i64 {
    pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30)
}

pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

pub fn is_terminal_phase(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

/// KEP-5307: a container may say itself whether an exit of this code is followed by a restart.
pub fn restarts_after(pod: &Pod, container: &Container, exit_code: i32) -> bool {
    if let Some(rules) = &container.restart_policy_rules {
        for rule in rules {
            let Some(codes) = &rule.exit_codes else { continue };
            let listed = codes.values.as_ref().is_some_and(|values| values.contains(&exit_code));
            let matched = match codes.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                _ => false,
            };
            if matched && rule.action == "Restart" {
                return true;
            }
        }
    }
    match container.restart_policy.as_deref().unwrap_or_else(|| restart_policy(pod)) {
        "Never" => false,
        "OnFailure" => exit_code != 0,
        _ => true,
    }
}

/// Whether the container is to be started (again), by its newest state in the runtime.
pub fn should_restart(pod: &Pod, container: &Container, newest: Option<&ContainerView>) -> bool {
    use crate::runtime::RunState;
    if pod.metadata.deletion_timestamp.is_some() {
        return false;
    }
    match newest {
        None => true,
        Some(view) => match view.state {
            RunState::Running => false,
            RunState::Unknown | RunState::Created => true,
            RunState::Exited => restarts_after(pod, container, view.exit_code),
        },
    }
}

/// The pod as events' object.
pub fn reference(pod: &Pod) -> ObjectReference {
    let mut reference = outrigger_cluster::status::reference_to_pod(pod);
    // A static pod's events hang on its mirror, which upstream finds by the config hash.
    if is_static(pod) {
        reference.uid = annotation(pod, CONFIG_HASH).map(str::to_owned);
    }
    reference
}

/// One container of the pod as events' object.
pub fn container_reference(pod: &Pod, container: &str) -> ObjectReference {
    let list = match find_container(pod, container) {
        Some((Role::Init, _)) => "initContainers",
        Some((Role::Ephemeral, _)) => "ephemeralContainers",
        _ => "containers",
    };
    ObjectReference { field_path: Some(format!("spec.{list}{{{container}}}")), ..reference(pod) }
}
