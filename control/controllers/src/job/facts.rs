//! Facts about a Job and its pods (pure).
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use crate::conditions::{self, TRUE};
use crate::objects::{has_finalizer, is_terminating, pod_condition, pod_phase, seconds};

/// Keeps a finished pod until it has been counted.
pub const TRACKING: &str = "batch.kubernetes.io/job-tracking";

pub fn spec(job: &Job) -> JobSpec {
    job.spec.clone().unwrap_or_default()
}

pub fn has_tracking(pod: &Pod) -> bool {
    has_finalizer(&pod.metadata, TRACKING)
}

pub fn is_suspended(job: &Job) -> bool {
    job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true)
}

pub fn is_indexed(job: &Job) -> bool {
    job.spec.as_ref().and_then(|spec| spec.completion_mode.as_deref()) == Some("Indexed")
}

fn has(job: &Job, kind: &str) -> bool {
    conditions::is_true(job.status.as_ref().and_then(|status| status.conditions.as_ref()), kind)
}

pub fn is_finished(job: &Job) -> bool {
    has(job, "Complete") || has(job, "Failed")
}

pub fn condition<'a>(job: &'a Job, kind: &str) -> Option<&'a JobCondition> {
    conditions::find(job.status.as_ref().and_then(|status| status.conditions.as_ref()), kind).filter(|condition| condition.status == TRUE)
}

/// A new pod only comes when the old one has really ended, not as soon as it is being deleted.
pub fn replaces_only_failed(job: &Job) -> bool {
    job.spec.as_ref().is_some_and(|spec| spec.pod_replacement_policy.as_deref() == Some("Failed") || spec.pod_failure_policy.is_some())
}

/// Deleted pods count as failed too, since they may never get to say so themselves.
pub fn is_failed(pod: &Pod, job: &Job) -> bool {
    pod_phase(pod) == "Failed" || !replaces_only_failed(job) && is_terminating(&pod.metadata) && pod_phase(pod) != "Succeeded"
}

pub fn new_condition(kind: &str, status: &str, reason: &str, message: &str, now: Timestamp) -> JobCondition {
    JobCondition {
        type_: kind.into(),
        status: status.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_probe_time: Some(seconds(now)),
        last_transition_time: Some(seconds(now)),
    }
}

/// Sets a condition; a false one isn't added where there was none. Whether anything changed.
pub fn ensure(list: &mut Option<Vec<JobCondition>>, wanted: JobCondition) -> bool {
    let conditions = list.get_or_insert_default();
    match conditions.iter_mut().find(|condition| condition.type_ == wanted.type_) {
        Some(known) if known.status == wanted.status && known.reason == wanted.reason && known.message == wanted.message => false,
        Some(known) => {
            *known = wanted;
            true
        }
        None if wanted.status == conditions::FALSE => false,
        None => {
            conditions.push(wanted);
            true
        }
    }
}

/// When a pod ended: by its containers, else its Ready condition, else its deletion, else its creation.
pub fn finished_at(pod: &Pod) -> Timestamp {
    let ready = pod_condition(pod, "Ready").filter(|condition| condition.status == "False");
    let deleted = pod.metadata.deletion_timestamp.as_ref().map(|time| {
        let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
        time.0.checked_sub(SignedDuration::from_secs(grace)).unwrap_or(time.0)
    });
    containers_finished_at(pod)
        .or_else(|| ready.and_then(|condition| condition.last_transition_time.as_ref()).map(|time| time.0))
        .or(deleted)
        .or_else(|| pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
        .unwrap_or(Timestamp::UNIX_EPOCH)
}

fn containers_finished_at(pod: &Pod) -> Option<Timestamp> {
    let status = pod.status.as_ref()?;
    let sidecars: Vec<&str> = pod
        .spec
        .iter()
        .flat_map(|spec| spec.init_containers.iter().flatten())
        .filter(|container| container.restart_policy.as_deref() == Some("Always"))
        .map(|container| container.name.as_str())
        .collect();
    let ended = |status: &ContainerStatus| Some(status.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref()?.0);
    let sidecar_statuses = status.init_container_statuses.iter().flatten().filter(|status| sidecars.contains(&status.name.as_str()));
    let times: Option<Vec<Timestamp>> = status.container_statuses.iter().flatten().chain(sidecar_statuses).map(ended).collect();
    times?.into_iter().max()
}

/// Failures since the last success, and when the last of them was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failures {
    pub count: i32,
    pub last: Option<Timestamp>,
}

/// Pauses between replacement pods.
const FIRST_PAUSE: i64 = 10;
const LAST_PAUSE: i64 = 600;

impl Failures {
    /// With pods that have ended since.
    pub fn after<'a>(self, succeeded: impl Iterator<Item = &'a Pod>, failed: impl Iterator<Item = &'a Pod>) -> Self {
        let last_success = succeeded.map(finished_at).max();
        let failures: Vec<Timestamp> = failed.map(finished_at).collect();
        match last_success {
            None => Self { count: self.count + failures.len() as i32, last: failures.into_iter().max().or(self.last) },
            Some(success) => {
                let later: Vec<Timestamp> = failures.into_iter().filter(|time| *time > success).collect();
                Self { count: later.len() as i32, last: later.into_iter().max() }
            }
        }
    }

    /// Seconds to wait before the next replacement.
    pub fn pause(&self, now: Timestamp) -> i64 {
        let (Some(last), 1..) = (self.last, self.count) else { return 0 };
        let pause =
            FIRST_PAUSE.saturating_mul(1i64.checked_shl((self.count - 1).unsigned_abs().min(30)).unwrap_or(i64::MAX)).min(LAST_PAUSE);
        (last.as_second() + pause - now.as_second()).max(0)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn ended(second: i64) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.creation_timestamp = Some(Time(Timestamp::from_second(second).unwrap()));
        pod
    }

    #[test]
    fn pauses_double_with_failures_and_end_with_a_success() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let none: [Pod; 0] = [];
        let first = Failures::default().after(none.iter(), [ended(100)].iter());
        assert_eq!((first.pause(at(100)), first.pause(at(105)), first.pause(at(110))), (10, 5, 0));
        let third = first.after(none.iter(), [ended(120), ended(130)].iter());
        assert_eq!(third.pause(at(130)), 40);
        assert_eq!(Failures { count: 20, last: Some(at(0)) }.pause(at(0)), 600);
        let mixed = third.after([ended(200)].iter(), [ended(190), ended(210)].iter());
        assert_eq!(mixed, Failures { count: 1, last: Some(at(210)) });
    }
}
