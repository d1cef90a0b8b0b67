//! A deployment's status, and whether its rollout makes progress (pure).
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};

use super::{Sets, rollout, size, wanted};
use crate::conditions::{self, FALSE, TRUE, UNKNOWN};
use crate::objects::{name, seconds};

const PROGRESSING: &str = "Progressing";
const AVAILABLE: &str = "Available";
const FAILURE: &str = "ReplicaFailure";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
const NEW_AVAILABLE: &str = "NewReplicaSetAvailable";

/// Seconds without progress after which a rollout counts as stuck.
fn deadline(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref()?.progress_deadline_seconds.filter(|seconds| *seconds != i32::MAX)
}

pub fn has_deadline(deployment: &Deployment) -> bool {
    deadline(deployment).is_some()
}

pub fn progressing(deployment: &Deployment) -> Option<&DeploymentCondition> {
    conditions::find(deployment.status.as_ref().and_then(|status| status.conditions.as_ref()), PROGRESSING)
}

pub fn set(status: &mut DeploymentStatus, kind: &str, state: &str, reason: &str, message: String, now: Timestamp) {
    let known = conditions::find(status.conditions.as_ref(), kind);
    let since = conditions::since(known, state, |known| known.last_transition_time.clone(), now);
    let condition = DeploymentCondition {
        type_: kind.into(),
        status: state.into(),
        reason: Some(reason.into()),
        message: Some(message),
        last_update_time: Some(seconds(now)),
        last_transition_time: Some(since),
    };
    conditions::set(&mut status.conditions, condition);
}

/// The deployment with a fresh pause or resumption on its Progressing condition; None when there is none to note.
pub fn with_pause_noted(deployment: &Deployment, now: Timestamp) -> Option<Deployment> {
    let paused = deployment.spec.as_ref()?.paused == Some(true);
    let reason = progressing(deployment).and_then(|condition| condition.reason.as_deref()).unwrap_or_default();
    let noted = reason == "DeploymentPaused";
    if !has_deadline(deployment) || reason == TIMED_OUT || paused == noted {
        return None;
    }
    let (reason, message) =
        if paused { ("DeploymentPaused", "Deployment is paused") } else { ("DeploymentResumed", "Deployment is resumed") };
    let mut updated = deployment.clone();
    set(updated.status.get_or_insert_default(), PROGRESSING, UNKNOWN, reason, message.into(), now);
    Some(updated)
}

pub fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = wanted(deployment);
    status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && status.available_replicas.unwrap_or(0) == wanted
        && status.observed_generation >= deployment.metadata.generation
}

/// New pods were made, or became ready or available, or old ones went.
fn has_progressed(before: &DeploymentStatus, after: &DeploymentStatus) -> bool {
    let old = |status: &DeploymentStatus| status.replicas.unwrap_or(0) - status.updated_replicas.unwrap_or(0);
    after.updated_replicas.unwrap_or(0) > before.updated_replicas.unwrap_or(0)
        || old(after) < old(before)
        || after.ready_replicas.unwrap_or(0) > before.ready_replicas.unwrap_or(0)
        || after.available_replicas.unwrap_or(0) > before.available_replicas.unwrap_or(0)
}

fn has_timed_out(deployment: &Deployment, status: &DeploymentStatus, now: Timestamp) -> bool {
    let (Some(deadline), Some(condition)) = (deadline(deployment), conditions::find(status.conditions.as_ref(), PROGRESSING)) else {
        return false;
    };
    match condition.reason.as_deref() {
        Some(NEW_AVAILABLE) => false,
        Some(TIMED_OUT) => true,
        _ => condition.last_update_time.as_ref().is_some_and(|time| time.0.as_second() + i64::from(deadline) < now.as_second()),
    }
}

/// The status as the sets show it; with `rolling`, progress is judged too.
pub(super) fn of(deployment: &Deployment, sets: &Sets, rolling: bool, now: Timestamp) -> DeploymentStatus {
    let known = deployment.status.clone().unwrap_or_default();
    let sum = |count: &dyn Fn(&ReplicaSet) -> i32| sets.all().map(|set| count(set)).sum::<i32>();
    let some = |number: i32| (number != 0).then_some(number);
    let actual = |set: &ReplicaSet| set.status.as_ref().map_or(0, |status| status.replicas);
    let available = sum(&|set| set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0));
    let terminating: Vec<i32> = sets.all().filter_map(|set| set.status.as_ref()?.terminating_replicas).collect();
    let mut status = DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: some(sum(&actual)),
        updated_replicas: some(sets.new.as_ref().map_or(0, |set| actual(set))),
        ready_replicas: some(sum(&|set| set.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0))),
        available_replicas: some(available),
        unavailable_replicas: some((sum(&size) - available).max(0)),
        collision_count: known.collision_count,
        terminating_replicas: (!terminating.is_empty()).then(|| terminating.iter().sum()),
        conditions: known.conditions.clone(),
    };
    if available >= wanted(deployment) - rollout::max_unavailable(deployment) {
        set(&mut status, AVAILABLE, TRUE, "MinimumReplicasAvailable", "Deployment has minimum availability.".into(), now);
    } else {
        set(&mut status, AVAILABLE, FALSE, "MinimumReplicasUnavailable", "Deployment does not have minimum availability.".into(), now);
    }
    if rolling {
        judge_progress(deployment, &known, &mut status, sets, now);
        copy_failure(&mut status, sets);
    }
    status
}

fn judge_progress(deployment: &Deployment, known: &DeploymentStatus, status: &mut DeploymentStatus, sets: &Sets, now: Timestamp) {
    if !has_deadline(deployment) {
        return conditions::remove(&mut status.conditions, PROGRESSING);
    }
    let current = progressing(deployment);
    let was_done =
        status.replicas == status.updated_replicas && current.is_some_and(|condition| condition.reason.as_deref() == Some(NEW_AVAILABLE));
    if was_done {
        return;
    }
    let subject = match &sets.new {
        Some(set) => format!("ReplicaSet \"{}\"", name(&set.metadata)),
        None => format!("Deployment \"{}\"", name(&deployment.metadata)),
    };
    if is_complete(deployment, status) {
        set(status, PROGRESSING, TRUE, NEW_AVAILABLE, format!("{subject} has successfully progressed."), now);
    } else if has_progressed(known, status) {
        // The same condition again counts as news here: its update time is what the deadline runs from.
        let since = conditions::since(current, TRUE, |known| known.last_transition_time.clone(), now);
        conditions::remove(&mut status.conditions, PROGRESSING);
        let condition = DeploymentCondition {
            type_: PROGRESSING.into(),
            status: TRUE.into(),
            reason: Some("ReplicaSetUpdated".into()),
            message: Some(format!("{subject} is progressing.")),
            last_update_time: Some(seconds(now)),
            last_transition_time: Some(since),
        };
        conditions::set(&mut status.conditions, condition);
    } else if has_timed_out(deployment, status, now) {
        set(status, PROGRESSING, FALSE, TIMED_OUT, format!("{subject} has timed out progressing."), now);
    }
}

/// A set that can't make or remove pods is its deployment's trouble too; the new set's first.
fn copy_failure(status: &mut DeploymentStatus, sets: &Sets) {
    let failure = sets.new.iter().chain(&sets.old).find_map(|set| conditions::find(set.status.as_ref()?.conditions.as_ref(), FAILURE));
    match failure.cloned() {
        None => conditions::remove(&mut status.conditions, FAILURE),
        Some(failure) => {
            let condition = DeploymentCondition {
                type_: failure.type_,
                status: failure.status,
                reason: failure.reason,
                message: failure.message,
                last_update_time: failure.last_transition_time.clone(),
                last_transition_time: failure.last_transition_time,
            };
            conditions::set(&mut status.conditions, condition);
        }
    }
}

/// Seconds until an unfinished rollout could have timed out.
pub fn check_again(deployment: &Deployment, now: Timestamp) -> Option<u64> {
    let deadline = deadline(deployment)?;
    let condition = progressing(deployment)?;
    let status = deployment.status.as_ref()?;
    if is_complete(deployment, status) || condition.reason.as_deref() == Some(TIMED_OUT) {
        return None;
    }
    let due = condition.last_update_time.as_ref()?.0.as_second() + i64::from(deadline);
    Some((due - now.as_second()).max(0).unsigned_abs() + 1)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::apps::v1::DeploymentSpec;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn sets(replicas: i32, available: i32) -> Sets {
        let mut set = ReplicaSet::default();
        set.metadata.name = Some("web-1".into());
        set.spec.get_or_insert_default().replicas = Some(replicas);
        let status = set.status.get_or_insert_default();
        status.replicas = replicas;
        status.available_replicas = Some(available);
        status.ready_replicas = Some(available);
        Sets { new: Some(Arc::new(set)), old: vec![] }
    }

    #[test]
    fn progress_completion_and_timeout_follow_each_other() {
        let mut deployment = Deployment {
            spec: Some(DeploymentSpec { replicas: Some(2), progress_deadline_seconds: Some(60), ..Default::default() }),
            ..Default::default()
        };
        let reason = |deployment: &Deployment| progressing(deployment).and_then(|condition| condition.reason.clone()).unwrap();
        deployment.status = Some(of(&deployment, &sets(2, 0), true, at(10)));
        assert_eq!(reason(&deployment), "ReplicaSetUpdated");
        assert_eq!(check_again(&deployment, at(30)), Some(41));
        deployment.status = Some(of(&deployment, &sets(2, 1), true, at(40)));
        assert_eq!(progressing(&deployment).unwrap().last_update_time, Some(seconds(at(40))));
        assert_eq!(progressing(&deployment).unwrap().last_transition_time, Some(seconds(at(10))));
        deployment.status = Some(of(&deployment, &sets(2, 1), true, at(101)));
        assert_eq!(reason(&deployment), TIMED_OUT);
        deployment.status = Some(of(&deployment, &sets(2, 2), true, at(110)));
        assert_eq!(reason(&deployment), NEW_AVAILABLE);
        assert_eq!(progressing(&deployment).unwrap().message.as_deref(), Some("ReplicaSet \"web-1\" has successfully progressed."));
        assert!(conditions::is_true(deployment.status.as_ref().unwrap().conditions.as_ref(), AVAILABLE));
        assert_eq!(check_again(&deployment, at(200)), None);
    }

    #[test]
    fn a_pause_is_noted_once() {
        let mut deployment = Deployment {
            spec: Some(DeploymentSpec { paused: Some(true), progress_deadline_seconds: Some(60), ..Default::default() }),
            ..Default::default()
        };
        deployment = with_pause_noted(&deployment, at(1)).unwrap();
        assert!(with_pause_noted(&deployment, at(2)).is_none());
        deployment.spec.as_mut().unwrap().paused = None;
        assert!(with_pause_noted(&deployment, at(3)).is_some());
    }
}
