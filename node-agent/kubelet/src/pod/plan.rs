//! What has to be done to bring the runtime's pod to the spec: pure, from both sides' state to a list of actions.
use k8s_openapi::api::core::v1::{Container, Pod};

use super::meta::{
    containers, ephemeral_containers, host_network, init_containers, is_sidecar, restart_policy, restarts_after, should_restart,
};
use super::resize::{Allocation, Change, change};
use crate::probe::Verdict;
use crate::runtime::{ContainerView, PodView, RunState, hash};

/// Why a container is killed; decides its grace period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillReason {
    Other,
    LivenessProbe,
    StartupProbe,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kill {
    pub id: String,
    pub name: String,
    pub message: String,
    pub reason: KillReason,
}

/// The actions of one pass, in this order: kill (all or some), make the sandbox, start ephemeral, init and main containers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub kill_pod: bool,
    pub create_sandbox: bool,
    /// The sandbox to keep, or (when a new one is made) the one that is replaced.
    pub sandbox_id: Option<String>,
    pub attempt: u32,
    pub kill: Vec<Kill>,
    /// Other resources for running containers.
    pub resize: Vec<Change>,
    /// Indexes into the pod's lists.
    pub start_ephemeral: Vec<usize>,
    pub start_init: Vec<usize>,
    pub start_main: Vec<usize>,
}

/// What the probes have found of running containers, by container id.
pub trait ProbeResults {
    fn liveness(&self, container_id: &str) -> Option<Verdict>;
    fn startup(&self, container_id: &str) -> Option<Verdict>;
}

/// `actuated`: what the running containers were given.
pub fn plan(pod: &Pod, view: &PodView, probes: &dyn ProbeResults, actuated: &Allocation) -> Plan {
    let (create_sandbox, attempt, sandbox) = view.sandbox_changed(host_network(pod));
    let mut plan = Plan {
        kill_pod: create_sandbox,
        create_sandbox,
        sandbox_id: sandbox.map(|sandbox| sandbox.id.clone()),
        attempt,
        ..Plan::default()
    };
    if create_sandbox {
        plan_new_sandbox(pod, view, &mut plan);
        return plan;
    }
    for (index, container) in ephemeral_containers(pod).iter().enumerate() {
        // Never restarted.
        if view.find(&container.name).is_none() {
            plan.start_ephemeral.push(index);
        }
    }
    let found = Found { pod, view, probes, actuated };
    let initialized = plan_init(&found, &mut plan);
    if !plan.kill_pod && initialized {
        plan_main(&found, &mut plan);
    }
    // Those that get less make room first.
    plan.resize.sort_by_key(|change| change.to.memory_limit > change.from.memory_limit || change.to.cpu_limit > change.from.cpu_limit);
    plan
}

/// What a plan is made from.
struct Found<'a> {
    pod: &'a Pod,
    view: &'a PodView,
    probes: &'a dyn ProbeResults,
    actuated: &'a Allocation,
}

impl Found<'_> {
    /// True when the running container can stay: it's resized in place, if at all.
    fn plan_resize(&self, container: &Container, running: &ContainerView, plan: &mut Plan) -> bool {
        let Some(change) = change(container, &running.id, self.actuated) else { return true };
        let stays = !change.restarts(container);
        if stays {
            plan.resize.push(change);
        } else {
            let message = format!("Container {} resize requires restart", container.name);
            plan.kill.push(Kill { id: running.id.clone(), name: container.name.clone(), message, reason: KillReason::Other });
        }
        stays
    }
}

fn runs_once(pod: &Pod, container: &Container) -> bool {
    container.restart_policy.as_deref().unwrap_or_else(|| restart_policy(pod)) == "OnFailure"
}

fn plan_new_sandbox(pod: &Pod, view: &PodView, plan: &mut Plan) {
    // The pod has run to its end, or can't be restarted: a new sandbox would start it again.
    if restart_policy(pod) == "Never" && plan.attempt != 0 && !view.containers.is_empty() {
        plan.create_sandbox = false;
        return;
    }
    let succeeded =
        |container: &Container| view.find(&container.name).is_some_and(|view| view.state == RunState::Exited && view.exit_code == 0);
    let start: Vec<usize> = containers(pod)
        .iter()
        .enumerate()
        .filter(|(_, container)| !(runs_once(pod, container) && succeeded(container)))
        .map(|(index, _)| index)
        .collect();
    let any_main = containers(pod).iter().any(|container| view.find(&container.name).is_some());
    if start.is_empty() && any_main {
        plan.create_sandbox = false;
        return;
    }
    if init_containers(pod).is_empty() {
        plan.start_main = start;
    } else {
        plan.start_init = vec![0];
    }
}

fn changed(container: &Container, view: &ContainerView) -> bool {
    view.hash.as_ref().is_some_and(|known| *known != hash(container))
}

/// True when the main containers may run. Init containers are looked at from the last one backwards, since finished ones may have
/// been removed from the runtime.
fn plan_init(found: &Found<'_>, plan: &mut Plan) -> bool {
    let Found { pod, view, .. } = *found;
    let list = init_containers(pod);
    if list.is_empty() {
        return true;
    }
    let mut initialized = containers(pod)
        .iter()
        .any(|container| view.find(&container.name).is_some_and(|view| matches!(view.state, RunState::Created | RunState::Running)));
    let mut previous = initialized;
    for (index, container) in list.iter().enumerate().rev() {
        let last = index + 1 == list.len();
        let Some(seen) = view.find(&container.name) else {
            if previous && is_sidecar(container) {
                plan.start_init.push(index);
            }
            continue;
        };
        if previous && !is_sidecar(container) {
            continue;
        }
        match seen.state {
            RunState::Created => plan.start_init.push(index),
            RunState::Running if is_sidecar(container) => {
                if plan_running_sidecar(found, container, seen, index, previous, plan) {
                    initialized = true;
                }
            }
            RunState::Running => {}
            RunState::Exited if is_sidecar(container) => plan.start_init.push(index),
            RunState::Exited if seen.exit_code != 0 => {
                if !restarts_after(pod, container, seen.exit_code) || pod.metadata.deletion_timestamp.is_some() {
                    plan.kill_pod = true;
                    plan.start_init.clear();
                    return false;
                }
                plan.start_init.push(index);
            }
            RunState::Exited if last => initialized = true,
            RunState::Exited => plan.start_init.push(index + 1),
            RunState::Unknown => {
                let never = container.restart_policy.as_deref().unwrap_or_else(|| restart_policy(pod)) == "Never";
                if !is_sidecar(container) && never {
                    plan.kill_pod = true;
                    plan.start_init.clear();
                    return false;
                }
                let message = "Init container is in \"unknown\" state, try killing it before restart".into();
                plan.kill.push(Kill { id: seen.id.clone(), name: container.name.clone(), message, reason: KillReason::Other });
                plan.start_init.push(index);
            }
        }
        previous = true;
    }
    if !previous {
        plan.start_init.push(0);
    }
    plan.start_init.reverse();
    initialized
}

/// True when it is the last init container and it has started.
fn plan_running_sidecar(
    found: &Found<'_>,
    container: &Container,
    seen: &ContainerView,
    index: usize,
    previous: bool,
    plan: &mut Plan,
) -> bool {
    let last = index + 1 == init_containers(found.pod).len();
    let probes = found.probes;
    let restart = |plan: &mut Plan, what: &str, reason| {
        let message = format!("Init container {} {what}", container.name);
        plan.kill.push(Kill { id: seen.id.clone(), name: container.name.clone(), message, reason });
        plan.start_init.push(index);
    };
    if container.startup_probe.is_some() {
        match probes.startup(&seen.id) {
            Some(Verdict::Success) => {}
            Some(Verdict::Failure) => {
                restart(plan, "failed startup probe", KillReason::StartupProbe);
                return false;
            }
            Some(Verdict::Unknown) | None => return false,
        }
    }
    if !last && !previous {
        plan.start_init.push(index + 1);
    }
    if changed(container, seen) {
        restart(plan, "definition changed", KillReason::Other);
    } else if container.liveness_probe.is_some() && probes.liveness(&seen.id) == Some(Verdict::Failure) {
        restart(plan, "failed liveness probe", KillReason::LivenessProbe);
    } else if !found.plan_resize(container, seen, plan) {
        plan.start_init.push(index);
    }
    last
}

fn plan_main(found: &Found<'_>, plan: &mut Plan) {
    let Found { pod, view, probes, .. } = *found;
    let mut kept = 0;
    for (index, container) in containers(pod).iter().enumerate() {
        let seen = view.find(&container.name);
        let Some(running) = seen.filter(|seen| seen.state == RunState::Running) else {
            if should_restart(pod, container, seen) {
                plan.start_main.push(index);
                if let Some(unknown) = seen.filter(|seen| seen.state == RunState::Unknown) {
                    let message = "Container is in \"unknown\" state, try killing it before restart".into();
                    plan.kill.push(Kill { id: unknown.id.clone(), name: container.name.clone(), message, reason: KillReason::Other });
                }
            }
            continue;
        };
        let mut restart = container.restart_policy.as_deref().unwrap_or_else(|| restart_policy(pod)) != "Never";
        let (mut message, reason) = if changed(container, running) {
            restart = true;
            (format!("Container {} definition changed", container.name), KillReason::Other)
        } else if probes.liveness(&running.id) == Some(Verdict::Failure) {
            (format!("Container {} failed liveness probe", container.name), KillReason::LivenessProbe)
        } else if probes.startup(&running.id) == Some(Verdict::Failure) {
            (format!("Container {} failed startup probe", container.name), KillReason::StartupProbe)
        } else {
            if found.plan_resize(container, running, plan) {
                kept += 1;
            } else {
                plan.start_main.push(index);
            }
            continue;
        };
        if restart {
            message.push_str(", will be restarted");
            plan.start_main.push(index);
        }
        plan.kill.push(Kill { id: running.id.clone(), name: container.name.clone(), message, reason });
    }
    if kept == 0 && plan.start_main.is_empty() {
        plan.kill_pod = true;
        // A sidecar alone must not keep the pod.
        plan.start_init.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::test_data::{pod, view};

    fn plan(pod: &Pod, view: &PodView, probes: &dyn ProbeResults) -> Plan {
        super::plan(pod, view, probes, &Allocation::new())
    }

    struct NoProbes;
    impl ProbeResults for NoProbes {
        fn liveness(&self, _: &str) -> Option<Verdict> {
            None
        }
        fn startup(&self, _: &str) -> Option<Verdict> {
            None
        }
    }

    struct LivenessFailed;
    impl ProbeResults for LivenessFailed {
        fn liveness(&self, _: &str) -> Option<Verdict> {
            Some(Verdict::Failure)
        }
        fn startup(&self, _: &str) -> Option<Verdict> {
            None
        }
    }

    #[test]
    fn a_new_pod_gets_a_sandbox_and_its_first_containers() {
        let plain = plan(&pod("Always", &[], &["a", "b"]), &PodView::default(), &NoProbes);
        assert!(plain.create_sandbox && plain.kill_pod);
        assert_eq!(plain.start_main, [0, 1]);
        let with_init = plan(&pod("Always", &["i", "j"], &["a"]), &PodView::default(), &NoProbes);
        assert_eq!((with_init.start_init, with_init.start_main), (vec![0], vec![]));
    }

    #[test]
    fn init_containers_run_one_after_the_other() {
        let pod = pod("Always", &["i", "j"], &["a"]);
        let step = |containers: &[(&str, &str)]| {
            let plan = plan(&pod, &view(containers), &NoProbes);
            (plan.start_init, plan.start_main, plan.kill_pod)
        };
        assert_eq!(step(&[]), (vec![0], vec![], false));
        assert_eq!(step(&[("i", "running")]), (vec![], vec![], false));
        assert_eq!(step(&[("i", "exited 0")]), (vec![1], vec![], false));
        assert_eq!(step(&[("i", "exited 1")]), (vec![0], vec![], false));
        assert_eq!(step(&[("i", "exited 0"), ("j", "exited 0")]), (vec![], vec![0], false));
        assert_eq!(step(&[("j", "exited 0")]), (vec![], vec![0], false));
        assert_eq!(step(&[("i", "exited 0"), ("j", "exited 0"), ("a", "running")]), (vec![], vec![], false));
    }

    #[test]
    fn a_failed_init_container_ends_a_pod_that_never_restarts() {
        let plan = plan(&pod("Never", &["i"], &["a"]), &view(&[("i", "exited 1")]), &NoProbes);
        assert!(plan.kill_pod && plan.start_init.is_empty() && plan.start_main.is_empty());
    }

    #[test]
    fn sidecars_start_in_order_and_come_back() {
        let pod = pod("Always", &["side*", "i"], &["a"]);
        let step = |containers: &[(&str, &str)]| {
            let plan = plan(&pod, &view(containers), &NoProbes);
            (plan.start_init, plan.start_main)
        };
        assert_eq!(step(&[("side", "running")]), (vec![1], vec![]));
        assert_eq!(step(&[("side", "running"), ("i", "exited 0")]), (vec![], vec![0]));
        assert_eq!(step(&[("side", "exited 1"), ("i", "exited 0"), ("a", "running")]), (vec![0], vec![]));
    }

    #[test]
    fn a_finished_pod_is_torn_down() {
        let plan = plan(&pod("Never", &["side*"], &["a"]), &view(&[("side", "running"), ("a", "exited 0")]), &NoProbes);
        assert!(plan.kill_pod && !plan.create_sandbox && plan.start_init.is_empty());
    }

    #[test]
    fn a_failed_liveness_probe_restarts_by_policy() {
        let always = plan(&pod("Always", &[], &["a"]), &view(&[("a", "running")]), &LivenessFailed);
        assert_eq!(always.start_main, [0]);
        assert_eq!(always.kill[0].message, "Container a failed liveness probe, will be restarted");
        let never = plan(&pod("Never", &[], &["a"]), &view(&[("a", "running")]), &LivenessFailed);
        assert!(never.start_main.is_empty() && never.kill_pod);
    }

    #[test]
    fn on_failure_restarts_failures_only() {
        let step = |state: &str| plan(&pod("OnFailure", &[], &["a"]), &view(&[("a", state)]), &NoProbes).start_main;
        assert_eq!(step("exited 0"), Vec::<usize>::new());
        assert_eq!(step("exited 2"), [0]);
    }
}
