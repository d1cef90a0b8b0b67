//! In-place resize (KEP-1287): what a pod was granted, what its running containers have, and what is left to do. Pure.
use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodCondition, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::json;

use super::admission;
use super::meta::{containers, init_containers, is_sidecar, is_static, phase};
use super::resources::{Qos, pod_request_milli, qos};
use crate::quantity::{Resources, milli_of, nano, value_of};
use crate::runtime::{PodView, RunState};

pub const PENDING: &str = "PodResizePending";
pub const IN_PROGRESS: &str = "PodResizeInProgress";

/// Resources by container: of main containers and sidecars, the only ones that can be resized.
pub type Allocation = BTreeMap<String, ResourceRequirements>;

/// The amounts that a resize can change: thousandths of CPUs, bytes; zero where the spec says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amounts {
    pub cpu_request: i64,
    pub cpu_limit: i64,
    pub memory_request: i64,
    pub memory_limit: i64,
}

impl Amounts {
    pub fn of(resources: Option<&ResourceRequirements>) -> Self {
        let requests = resources.and_then(|resources| resources.requests.as_ref());
        let limits = resources.and_then(|resources| resources.limits.as_ref());
        Self {
            cpu_request: milli_of(requests, "cpu").unwrap_or(0),
            cpu_limit: milli_of(limits, "cpu").unwrap_or(0),
            memory_request: value_of(requests, "memory").unwrap_or(0),
            memory_limit: value_of(limits, "memory").unwrap_or(0),
        }
    }
}

/// Where one pod's resizes stand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resize {
    /// What the node has granted; the spec may ask for something else.
    pub allocated: Allocation,
    /// What was last given to the running containers.
    pub actuated: Allocation,
    /// The pod's cgroup may still be wider than what was granted.
    pub cgroup_due: bool,
    pub pending: Option<PodCondition>,
    pub in_progress: Option<PodCondition>,
}

/// What the node says to a resize.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Granted,
    /// `Deferred` or `Infeasible`, and why.
    Pending {
        reason: &'static str,
        message: String,
    },
}

fn resizable(pod: &Pod) -> impl Iterator<Item = &Container> {
    containers(pod).iter().chain(init_containers(pod).iter().filter(|container| is_sidecar(container)))
}

/// What the spec asks for.
pub fn asked(pod: &Pod) -> Allocation {
    resizable(pod).map(|container| (container.name.clone(), container.resources.clone().unwrap_or_default())).collect()
}

/// Whether both say the same amounts, however they are written.
fn same(a: &Allocation, b: &Allocation) -> bool {
    let list = |list: &Option<Resources>| -> BTreeMap<String, Option<i128>> {
        list.iter().flatten().map(|(name, amount)| (name.clone(), nano(&amount.0))).collect()
    };
    let amounts = |resources: &ResourceRequirements| (list(&resources.requests), list(&resources.limits));
    a.len() == b.len() && a.iter().all(|(name, resources)| b.get(name).is_some_and(|other| amounts(resources) == amounts(other)))
}

impl Resize {
    /// Of a pod that the agent sees for the first time. One that ran before the agent was restarted has its allocation in its status.
    pub fn of(pod: &Pod) -> Self {
        let mut resize = Self { allocated: asked(pod), ..Self::default() };
        let Some(status) = &pod.status else { return resize };
        let statuses = status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
        for known in statuses {
            let Some(allocated) = resize.allocated.get_mut(&known.name) else { continue };
            let Some((granted, given)) = remembered(known) else { continue };
            *allocated = granted;
            resize.actuated.insert(known.name.clone(), given);
        }
        let condition = |type_: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == type_).cloned();
        resize.pending = condition(PENDING);
        resize.in_progress = condition(IN_PROGRESS);
        resize
    }

    /// The spec asks for something else than what was granted.
    pub fn wanted(&self, pod: &Pod) -> bool {
        !same(&asked(pod), &self.allocated)
    }

    /// Containers that don't run have no resources; they get what is granted when they start.
    pub fn keep_running(&mut self, view: &PodView) {
        self.actuated.retain(|name, _| view.find(name).is_some_and(|container| container.state == RunState::Running));
    }

    pub fn unfinished(&self) -> bool {
        self.cgroup_due || self.containers_unfinished()
    }

    /// A running container has something else than what was granted.
    pub fn containers_unfinished(&self) -> bool {
        self.actuated.iter().any(|(name, given)| Amounts::of(Some(given)) != Amounts::of(self.allocated.get(name)))
    }

    pub fn grant(&mut self, pod: &Pod, now: Timestamp) {
        self.allocated = asked(pod);
        self.cgroup_due = true;
        self.pending = None;
        self.in_progress = Some(condition(IN_PROGRESS, None, "", "", pod.metadata.generation, now));
    }

    /// True when the answer is another than before.
    pub fn put_off(&mut self, reason: &str, message: &str, generation: Option<i64>, now: Timestamp) -> bool {
        let fresh = condition(PENDING, self.pending.as_ref(), reason, message, generation, now);
        let changed = self.pending.as_ref().is_none_or(|old| {
            (&old.reason, &old.message, old.observed_generation) != (&fresh.reason, &fresh.message, fresh.observed_generation)
        });
        if changed {
            self.pending = Some(fresh);
        }
        changed
    }

    /// Notes that a granted resize couldn't be carried out; the generation stays that of the grant. True when that is news.
    pub fn fail(&mut self, message: &str, generation: Option<i64>, now: Timestamp) -> bool {
        let generation = self.in_progress.as_ref().map_or(generation, |old| old.observed_generation);
        let fresh = condition(IN_PROGRESS, self.in_progress.as_ref(), "Error", message, generation, now);
        let changed = self.in_progress.as_ref().is_none_or(|old| old.reason != fresh.reason || old.message != fresh.message);
        if changed {
            self.in_progress = Some(fresh);
        }
        changed
    }

    /// Brings the condition in line with the containers. The generation of a resize that has just been completed.
    pub fn settle(&mut self, generation: Option<i64>, now: Timestamp) -> Option<i64> {
        if !self.unfinished() {
            return self.in_progress.take().map(|done| done.observed_generation.unwrap_or(0));
        }
        self.in_progress.get_or_insert_with(|| condition(IN_PROGRESS, None, "", "", generation, now));
        None
    }
}

/// What a status says was granted (its limits only as given) and given.
fn remembered(status: &ContainerStatus) -> Option<(ResourceRequirements, ResourceRequirements)> {
    let given = status.resources.clone()?;
    let granted = ResourceRequirements { requests: status.allocated_resources.clone().or_else(|| given.requests.clone()), ..given.clone() };
    Some((granted, given))
}

/// The pod with what was granted in place of what is asked for.
pub fn allocated(pod: &Arc<Pod>, allocation: &Allocation) -> Arc<Pod> {
    if same(&asked(pod), allocation) {
        return pod.clone();
    }
    let mut granted = (**pod).clone();
    if let Some(spec) = &mut granted.spec {
        let sidecars = spec.init_containers.iter_mut().flatten().filter(|container| is_sidecar(container));
        for container in spec.containers.iter_mut().chain(sidecars) {
            if let Some(resources) = allocation.get(&container.name) {
                container.resources = Some(resources.clone());
            }
        }
    }
    Arc::new(granted)
}

fn condition(
    type_: &str,
    old: Option<&PodCondition>,
    reason: &str,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) -> PodCondition {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let now = Some(Time(Timestamp::from_second(now.as_second()).unwrap_or(now)));
    let since = old.filter(|old| old.reason == text(reason)).and_then(|old| old.last_transition_time.clone());
    PodCondition {
        type_: type_.into(),
        status: "True".into(),
        reason: text(reason),
        message: text(message),
        last_probe_time: now.clone(),
        last_transition_time: since.or(now),
        observed_generation: generation,
    }
}

/// Whether the node can grant what the pod asks for, beside what it has granted to others.
pub fn answer(pod: &Pod, others: &[Arc<Pod>], allocatable: &Resources) -> Answer {
    let infeasible = |message: String| Answer::Pending { reason: "Infeasible", message };
    if is_static(pod) {
        return infeasible("In-place resize of static-pods is not supported".into());
    }
    for (name, unit) in [("memory", 1000), ("cpu", 1)] {
        let (wanted, capacity) = (pod_request_milli(pod, name), milli_of(Some(allocatable), name).unwrap_or(0));
        if wanted > capacity {
            let (wanted, capacity) = (wanted / unit, capacity / unit);
            return infeasible(format!("Node didn't have enough capacity: {name}, requested: {wanted}, capacity: {capacity}"));
        }
    }
    match admission::admit(pod, others, allocatable, None) {
        Ok(()) => Answer::Granted,
        Err(verdict) => Answer::Pending { reason: "Deferred", message: verdict.message },
    }
}

/// The order in which resizes that wait are tried: those that need no more, by priority, by class, by time of waiting.
pub fn turn(asking: &Pod, granted: &Pod, resize: &Resize) -> impl Ord + use<> {
    let grows = ["cpu", "memory"].into_iter().any(|name| pod_request_milli(asking, name) > pod_request_milli(granted, name));
    let priority = asking.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
    let since = resize.pending.as_ref().and_then(|pending| pending.last_transition_time.as_ref()).map(|time| time.0);
    (grows, std::cmp::Reverse(priority), qos(asking) != Qos::Guaranteed, since)
}

/// The message of a resize's event: the containers' resources, after the words that say what became of it.
pub fn event(what: &str, pod: &Pod, generation: i64, error: &str) -> String {
    let list = |list: &[Container]| -> Vec<serde_json::Value> {
        list.iter()
            .map(|container| json!({ "name": container.name, "resources": container.resources.clone().unwrap_or_default() }))
            .collect()
    };
    let mut summary = serde_json::Map::new();
    for (name, list) in [("initContainers", list(init_containers(pod))), ("containers", list(containers(pod)))] {
        if !list.is_empty() {
            summary.insert(name.into(), list.into());
        }
    }
    summary.insert("generation".into(), generation.into());
    if !error.is_empty() {
        summary.insert("error".into(), error.into());
    }
    format!("Pod resize {what}: {}", serde_json::Value::Object(summary))
}

/// A container that gets other resources while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub name: String,
    pub id: String,
    pub from: Amounts,
    pub to: Amounts,
}

impl Change {
    /// Whether the container's resize policy wants a restart for this.
    pub fn restarts(&self, container: &Container) -> bool {
        let policy = |name: &str| {
            let found = container.resize_policy.iter().flatten().find(|policy| policy.resource_name == name);
            found.is_some_and(|policy| policy.restart_policy == "RestartContainer")
        };
        let cpu = (self.from.cpu_request, self.from.cpu_limit) != (self.to.cpu_request, self.to.cpu_limit);
        let memory = (self.from.memory_request, self.from.memory_limit) != (self.to.memory_request, self.to.memory_limit);
        (cpu && policy("cpu")) || (memory && policy("memory"))
    }

    /// The new memory limit, where it is lower than the old one.
    pub fn lower_memory_limit(&self) -> Option<i64> {
        let lower = self.to.memory_limit != 0 && (self.from.memory_limit == 0 || self.to.memory_limit < self.from.memory_limit);
        lower.then_some(self.to.memory_limit)
    }
}

/// The change that a running container needs. `actuated` doesn't know containers that were started before the agent knew of resizes.
pub fn change(container: &Container, id: &str, actuated: &Allocation) -> Option<Change> {
    let from = Amounts::of(Some(actuated.get(&container.name)?));
    let to = Amounts::of(container.resources.as_ref());
    (from != to).then(|| Change { name: container.name.clone(), id: id.to_owned(), from, to })
}

/// A pod that has ended has no resizes.
pub fn conditions<'a>(resize: &'a Resize, pod: &Pod, terminal: bool) -> impl Iterator<Item = PodCondition> + use<'a> {
    let shown = !terminal && !matches!(phase(pod), "Succeeded" | "Failed");
    [&resize.pending, &resize.in_progress].into_iter().flatten().filter(move |_| shown).cloned()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ContainerResizePolicy, PodStatus};
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::*;
    use crate::pod::test_data::pod;

    fn resources(cpu: &str, memory: &str) -> ResourceRequirements {
        let list: Resources = [("cpu", cpu), ("memory", memory)].map(|(name, amount)| (name.to_owned(), Quantity(amount.into()))).into();
        ResourceRequirements { requests: Some(list.clone()), limits: Some(list), ..ResourceRequirements::default() }
    }

    fn sized(cpu: &str, memory: &str) -> Pod {
        let mut pod = pod("Always", &[], &["a"]);
        pod.spec.as_mut().unwrap().containers[0].resources = Some(resources(cpu, memory));
        pod
    }

    fn allocatable() -> Resources {
        [("cpu", "2"), ("memory", "1Gi"), ("pods", "10")].map(|(name, amount)| (name.to_owned(), Quantity(amount.into()))).into()
    }

    #[test]
    fn the_node_grants_defers_or_refuses() {
        let reason = |pod: &Pod, others: &[Arc<Pod>]| match answer(pod, others, &allocatable()) {
            Answer::Granted => "",
            Answer::Pending { reason, .. } => reason,
        };
        let other = [Arc::new(sized("1", "100Mi"))];
        assert_eq!(reason(&sized("1", "100Mi"), &other), "");
        assert_eq!(reason(&sized("1500m", "100Mi"), &other), "Deferred");
        assert_eq!(reason(&sized("3", "100Mi"), &other), "Infeasible");
        let Answer::Pending { message, .. } = answer(&sized("1", "2Gi"), &[], &allocatable()) else { panic!("too much memory") };
        assert_eq!(message, "Node didn't have enough capacity: memory, requested: 2147483648, capacity: 1073741824");
    }

    #[test]
    fn a_resize_from_grant_to_completion() {
        let now = Timestamp::UNIX_EPOCH;
        let before = Arc::new(sized("1", "100Mi"));
        let mut resize = Resize::of(&before);
        resize.actuated = resize.allocated.clone();
        let mut after = sized("2", "100Mi");
        after.metadata.generation = Some(2);
        let after = Arc::new(after);
        assert!(resize.wanted(&after) && !resize.unfinished());
        assert_eq!(allocated(&after, &resize.allocated).spec, before.spec);
        resize.grant(&after, now);
        assert!(!resize.wanted(&after) && resize.unfinished());
        assert_eq!(resize.settle(Some(2), now), None);
        let change = change(&containers(&after)[0], "id", &resize.actuated).unwrap();
        assert_eq!((change.from.cpu_limit, change.to.cpu_limit), (1000, 2000));
        assert!(resize.fail("no", Some(2), now));
        assert!(!resize.fail("no", Some(2), now));
        resize.actuated = asked(&after);
        assert_eq!(resize.settle(Some(3), now), None);
        resize.cgroup_due = false;
        assert_eq!(resize.settle(Some(3), now), Some(2));
        assert_eq!(resize.in_progress, None);
    }

    #[test]
    fn a_restarted_agent_knows_the_allocation_from_the_status() {
        let mut pod = sized("2", "200Mi");
        let old = resources("1", "100Mi");
        pod.status = Some(PodStatus {
            container_statuses: Some(vec![ContainerStatus {
                name: "a".into(),
                allocated_resources: old.requests.clone(),
                resources: Some(old.clone()),
                ..ContainerStatus::default()
            }]),
            ..PodStatus::default()
        });
        let resize = Resize::of(&pod);
        assert!(resize.wanted(&pod) && !resize.unfinished());
        assert_eq!(resize.actuated["a"], old);
    }

    #[test]
    fn the_policy_decides_over_restarts() {
        let mut container = containers(&sized("1", "100Mi"))[0].clone();
        container.resize_policy =
            Some(vec![ContainerResizePolicy { resource_name: "memory".into(), restart_policy: "RestartContainer".into() }]);
        let actuated = |cpu: &str, memory: &str| -> Allocation { [("a".to_owned(), resources(cpu, memory))].into() };
        assert!(!change(&container, "id", &actuated("2", "100Mi")).unwrap().restarts(&container));
        let shrinking = change(&container, "id", &actuated("1", "200Mi")).unwrap();
        assert!(shrinking.restarts(&container));
        assert_eq!(shrinking.lower_memory_limit(), Some(100 << 20));
        assert_eq!(change(&container, "id", &actuated("1000m", "102400Ki")), None);
    }

    #[test]
    fn events_tell_the_resources() {
        assert_eq!(
            event("completed", &sized("1", "1Mi"), 2, ""),
            r#"Pod resize completed: {"containers":[{"name":"a","resources":{"limits":{"cpu":"1","memory":"1Mi"},"requests":{"cpu":"1","memory":"1Mi"}}}],"generation":2}"#
        );
    }
}
