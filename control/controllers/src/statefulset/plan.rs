//! The next steps of a StatefulSet, and its status (pure).
use std::ops::Range;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};

use super::identity::{self, ordinal, repaired, revision};
use crate::history;
use crate::objects::{is_available, is_ready, is_terminating, name, pod_phase};

#[derive(Clone, Debug)]
pub enum Step {
    Create(Box<Pod>),
    Delete(Arc<Pod>),
    /// Bring labels and claims of a running pod in order.
    Repair(Arc<Pod>),
    /// Make the claims that a pending pod lacks; hand over those of one to go.
    Claims(Arc<Pod>),
}

/// The two templates that a set's pods may have.
pub struct Revisions {
    current: (String, PodTemplateSpec),
    update: (String, PodTemplateSpec),
    collisions: i32,
}

impl Revisions {
    pub fn new(set: &StatefulSet, current: &ControllerRevision, update: &ControllerRevision, collisions: i32) -> Self {
        let own = set.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
        let of = |revision: &ControllerRevision| {
            (name(&revision.metadata).to_owned(), history::template(revision).unwrap_or_else(|| own.clone()))
        };
        Self { current: of(current), update: (name(&update.metadata).to_owned(), own.clone()), collisions }
    }
}

fn replicas(set: &StatefulSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
}

/// The numbers that the set's pods have.
pub fn ordinals(set: &StatefulSet) -> Range<i32> {
    let start = set.spec.as_ref().and_then(|spec| spec.ordinals.as_ref()).and_then(|ordinals| ordinals.start).unwrap_or(0);
    start..start + replicas(set)
}

/// What a sync looks at.
pub struct View<'a> {
    set: &'a StatefulSet,
    revisions: &'a Revisions,
    /// In their numbers' order; a missing one is None.
    members: Vec<(i32, Option<Arc<Pod>>)>,
    /// Beyond the set's size, highest number first.
    condemned: Vec<Arc<Pod>>,
    now: Timestamp,
}

impl<'a> View<'a> {
    pub fn new(set: &'a StatefulSet, revisions: &'a Revisions, pods: &[Arc<Pod>], now: Timestamp) -> Self {
        let wanted = ordinals(set);
        let at = |number: i32| pods.iter().find(|pod| ordinal(pod) == Some(number)).cloned();
        let members = wanted.clone().map(|number| (number, at(number))).collect();
        let mut condemned: Vec<_> =
            pods.iter().filter(|pod| ordinal(pod).is_some_and(|number| !wanted.contains(&number))).cloned().collect();
        condemned.sort_by_key(|pod| std::cmp::Reverse(ordinal(pod)));
        Self { set, revisions, members, condemned, now }
    }

    pub fn is_parallel(&self) -> bool {
        self.set.spec.as_ref().and_then(|spec| spec.pod_management_policy.as_deref()) == Some("Parallel")
    }

    fn min_ready(&self) -> i32 {
        self.set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
    }

    fn is_healthy(&self, pod: &Pod) -> bool {
        pod_phase(pod) == "Running" && is_available(pod, self.min_ready(), self.now) && !is_terminating(&pod.metadata)
    }

    fn is_rolling(&self) -> bool {
        let strategy = self.set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref());
        strategy.and_then(|strategy| strategy.type_.as_deref()).unwrap_or("RollingUpdate") == "RollingUpdate"
    }

    fn partition(&self) -> Option<i32> {
        self.set.spec.as_ref()?.update_strategy.as_ref()?.rolling_update.as_ref()?.partition
    }

    /// The pod of a number that has none: of the old template below the partition.
    fn missing(&self, number: i32) -> Pod {
        let start = ordinals(self.set).start;
        let current_count = self.set.status.as_ref().and_then(|status| status.current_replicas).unwrap_or(0);
        let old = self.is_rolling() && number < start + self.partition().unwrap_or(current_count);
        let (revision, template) = if old { &self.revisions.current } else { &self.revisions.update };
        identity::pod(self.set, template, revision, number)
    }

    /// What to do now. In an ordered set that is at most one creation or deletion.
    pub fn steps(&self) -> Vec<Step> {
        let (mut steps, mut waiting) = (Vec::new(), false);
        for (number, member) in &self.members {
            waiting |= self.step_member(*number, member.as_ref(), &mut steps);
            if waiting && !self.is_parallel() {
                return steps;
            }
        }
        steps.extend(self.condemned.iter().map(|pod| Step::Claims(pod.clone())));
        if self.step_condemned(&mut steps) && !self.is_parallel() {
            return steps;
        }
        let acted = steps.iter().any(|step| matches!(step, Step::Create(_) | Step::Delete(_)));
        if self.is_rolling() && !acted {
            steps.extend(self.next_update().map(Step::Delete));
        }
        steps
    }

    /// Whether the pods after this one must wait.
    fn step_member(&self, number: i32, member: Option<&Arc<Pod>>, steps: &mut Vec<Step>) -> bool {
        let Some(pod) = member else {
            steps.push(Step::Create(Box::new(self.missing(number))));
            return true;
        };
        if matches!(pod_phase(pod), "Failed" | "Succeeded") {
            if !is_terminating(&pod.metadata) {
                steps.push(Step::Delete(pod.clone()));
            }
            return true;
        }
        if pod_phase(pod) == "Pending" {
            steps.push(Step::Claims(pod.clone()));
        } else if repaired(self.set, pod).is_some() {
            steps.push(Step::Repair(pod.clone()));
        } else {
            steps.push(Step::Claims(pod.clone()));
        }
        !self.is_healthy(pod)
    }

    /// Whether there is something to wait for before an update may go on.
    fn step_condemned(&self, steps: &mut Vec<Step>) -> bool {
        let first_ill =
            self.members.iter().filter_map(|(_, pod)| pod.as_ref()).chain(self.condemned.iter().rev()).find(|pod| !self.is_healthy(pod));
        for pod in &self.condemned {
            if is_terminating(&pod.metadata) {
                if self.is_parallel() {
                    continue;
                }
                return true;
            }
            let is_first_ill = first_ill.is_some_and(|ill| Arc::ptr_eq(ill, pod));
            if !self.is_parallel() && !self.is_healthy(pod) && !is_first_ill {
                return true;
            }
            steps.push(Step::Delete(pod.clone()));
            if !self.is_parallel() {
                return true;
            }
        }
        !self.condemned.is_empty()
    }

    /// The pod to be replaced by one of the new template: from the highest number down, one at a time.
    fn next_update(&self) -> Option<Arc<Pod>> {
        let from = ordinals(self.set).start + self.partition().unwrap_or(0);
        for (number, member) in self.members.iter().rev() {
            if *number < from {
                return None;
            }
            let pod = member.as_ref()?;
            if revision(pod) != self.revisions.update.0 && !is_terminating(&pod.metadata) {
                return Some(pod.clone());
            }
            if !self.is_healthy(pod) {
                return None;
            }
        }
        None
    }

    pub fn status(&self) -> StatefulSetStatus {
        let pods: Vec<&Arc<Pod>> = self.members.iter().filter_map(|(_, pod)| pod.as_ref()).chain(&self.condemned).collect();
        let count = |keep: &dyn Fn(&Pod) -> bool| i32::try_from(pods.iter().filter(|pod| keep(pod)).count()).unwrap_or(i32::MAX);
        let some = |number: i32| (number != 0).then_some(number);
        let ready = count(&|pod| pod_phase(pod) == "Running" && is_ready(pod));
        let of = |wanted: &str| count(&|pod| !is_terminating(&pod.metadata) && revision(pod) == wanted);
        let mut status = self.set.status.clone().unwrap_or_default();
        status.observed_generation = self.set.metadata.generation;
        status.collision_count = Some(self.revisions.collisions);
        status.replicas = count(&|pod| !pod_phase(pod).is_empty());
        status.ready_replicas = some(ready);
        status.available_replicas = Some(count(&|pod| pod_phase(pod) == "Running" && is_available(pod, self.min_ready(), self.now)));
        status.current_revision = Some(self.revisions.current.0.clone());
        status.update_revision = Some(self.revisions.update.0.clone());
        let updated = of(&self.revisions.update.0);
        status.updated_replicas = some(updated);
        status.current_replicas = some(of(&self.revisions.current.0));
        // All have the new template: it is the current one from now on.
        let wanted = replicas(self.set);
        if self.is_rolling() && updated == wanted && ready == wanted && status.replicas == wanted {
            status.current_replicas = some(updated);
            status.current_revision = status.update_revision.clone();
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::{RollingUpdateStatefulSetStrategy, StatefulSetUpdateStrategy};
    use k8s_openapi::api::core::v1::PodCondition;

    use super::*;
    use crate::objects::now;

    fn set(replicas: i32, policy: &str, partition: Option<i32>) -> StatefulSet {
        let mut set = StatefulSet::default();
        set.metadata.name = Some("web".into());
        let spec = set.spec.get_or_insert_default();
        spec.replicas = Some(replicas);
        spec.pod_management_policy = Some(policy.into());
        spec.update_strategy = Some(StatefulSetUpdateStrategy {
            type_: Some("RollingUpdate".into()),
            rolling_update: Some(RollingUpdateStatefulSetStrategy { partition: Some(partition.unwrap_or(0)), max_unavailable: None }),
        });
        set
    }

    fn revisions() -> Revisions {
        let template = PodTemplateSpec::default();
        Revisions { current: ("old".into(), template.clone()), update: ("new".into(), template), collisions: 0 }
    }

    fn pod(number: i32, revision: &str, ready: bool) -> Arc<Pod> {
        let mut pod = identity::pod(&set(1, "", None), &PodTemplateSpec::default(), revision, number);
        let status = pod.status.get_or_insert_default();
        status.phase = Some("Running".into());
        status.conditions =
            Some(vec![PodCondition { type_: "Ready".into(), status: if ready { "True" } else { "False" }.into(), ..Default::default() }]);
        Arc::new(pod)
    }

    fn steps(set: &StatefulSet, pods: Vec<Arc<Pod>>) -> Vec<String> {
        let revisions = revisions();
        let view = View::new(set, &revisions, &pods, Timestamp::now());
        let text = |step: &Step| match step {
            Step::Create(pod) => Some(format!("+{}:{}", name(&pod.metadata), revision(pod))),
            Step::Delete(pod) => Some(format!("-{}", name(&pod.metadata))),
            Step::Repair(_) | Step::Claims(_) => None,
        };
        view.steps().iter().filter_map(text).collect()
    }

    #[test]
    fn an_ordered_set_takes_one_step_at_a_time() {
        let three = set(3, "OrderedReady", None);
        assert_eq!(steps(&three, vec![]), ["+web-0:new"]);
        assert!(steps(&three, vec![pod(0, "new", false)]).is_empty());
        assert_eq!(steps(&three, vec![pod(0, "new", true)]), ["+web-1:new"]);
        let one = set(1, "OrderedReady", None);
        assert_eq!(steps(&one, vec![pod(0, "new", true), pod(1, "new", true), pod(2, "new", true)]), ["-web-2"]);
        assert!(steps(&one, vec![pod(0, "new", false), pod(1, "new", true)]).is_empty(), "an ill member comes first");
    }

    #[test]
    fn a_parallel_set_goes_all_at_once() {
        assert_eq!(steps(&set(2, "Parallel", None), vec![]), ["+web-0:new", "+web-1:new"]);
        assert_eq!(steps(&set(0, "Parallel", None), vec![pod(0, "new", true), pod(1, "new", false)]), ["-web-1", "-web-0"]);
    }

    #[test]
    fn an_update_runs_down_to_the_partition() {
        let all = |revisions: [&str; 3]| {
            revisions.iter().enumerate().map(|(number, revision)| pod(number as i32, revision, true)).collect::<Vec<_>>()
        };
        assert_eq!(steps(&set(3, "OrderedReady", None), all(["old", "old", "old"])), ["-web-2"]);
        assert_eq!(steps(&set(3, "OrderedReady", None), all(["old", "old", "new"])), ["-web-1"]);
        assert!(steps(&set(3, "OrderedReady", Some(2)), all(["old", "old", "new"])).is_empty());
        assert_eq!(
            steps(&set(3, "OrderedReady", Some(2)), vec![pod(0, "old", true)]),
            ["+web-1:old"],
            "below the partition the old template counts"
        );
    }

    #[test]
    fn the_status_moves_on_when_all_have_the_new_template() {
        let (three, revisions) = (set(2, "OrderedReady", None), revisions());
        let view = |pods: &[Arc<Pod>]| View::new(&three, &revisions, pods, Timestamp::now()).status();
        let half = view(&[pod(0, "old", true), pod(1, "new", true)]);
        assert_eq!((half.current_replicas, half.updated_replicas, half.current_revision.as_deref()), (Some(1), Some(1), Some("old")));
        let full = view(&[pod(0, "new", true), pod(1, "new", true)]);
        assert_eq!((full.current_replicas, full.current_revision.as_deref()), (Some(2), Some("new")));
        let mut dying = (*pod(1, "new", true)).clone();
        dying.metadata.deletion_timestamp = Some(now());
        assert_eq!(view(&[pod(0, "new", true), Arc::new(dying)]).updated_replicas, Some(1));
    }
}
