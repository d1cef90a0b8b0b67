//! Removes finished Jobs once they have stood for `ttlSecondsAfterFinished`.
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use kube::api::{DeleteParams, PropagationPolicy};
use tokio::task::JoinSet;

use crate::Context;
use crate::conditions::TRUE;
use crate::error::unless_gone;
use crate::informers::Informers;
use crate::objects::{Key, is_terminating};
use crate::worker::{self, Outcome, Queue};

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.jobs.on_change(move |_, new| {
        if let Some(job) = new
            && let Some(remaining) = remaining(job, Timestamp::now())
        {
            add.add_after(Key::of(&**job), remaining);
        }
    });
    let informers = context.informers.clone();
    tasks.spawn(worker::run("ttl-after-finished", queue, 5, move |key| sync(informers.clone(), key)));
}

async fn sync(informers: Arc<Informers>, key: Key) -> Outcome {
    let left = |job: &Job| remaining(job, Timestamp::now());
    match informers.jobs.get(&key).and_then(|job| left(&job)) {
        None => return Ok(None),
        Some(wait) if !wait.is_zero() => return Ok(Some(wait)),
        Some(_) => {}
    }
    // The TTL may have been raised meanwhile.
    let Some(live) = informers.jobs.get_live(&key).await? else { return Ok(None) };
    match left(&live) {
        None => Ok(None),
        Some(wait) if !wait.is_zero() => Ok(Some(wait)),
        Some(_) => {
            let params = DeleteParams { propagation_policy: Some(PropagationPolicy::Foreground), ..Default::default() };
            unless_gone(informers.jobs.delete(&live, params).await)?;
            Ok(None)
        }
    }
}

/// How long the Job may still stand; None for ever.
fn remaining(job: &Job, at: Timestamp) -> Option<Duration> {
    let ttl = job.spec.as_ref()?.ttl_seconds_after_finished.filter(|_| !is_terminating(&job.metadata))?;
    let mut conditions = job.status.as_ref()?.conditions.iter().flatten();
    let end = conditions.find(|condition| matches!(condition.type_.as_str(), "Complete" | "Failed") && condition.status == TRUE)?;
    let due = end.last_transition_time.as_ref()?.0.as_second() + i64::from(ttl);
    u64::try_from((due - at.as_second()).max(0)).ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::batch::v1::{JobCondition, JobSpec, JobStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    #[test]
    fn only_finished_jobs_with_a_ttl_expire() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut job = Job { spec: Some(JobSpec { ttl_seconds_after_finished: Some(30), ..Default::default() }), ..Default::default() };
        assert_eq!(remaining(&job, at(100)), None);
        let end =
            JobCondition { type_: "Failed".into(), status: TRUE.into(), last_transition_time: Some(Time(at(100))), ..Default::default() };
        job.status = Some(JobStatus { conditions: Some(vec![end]), ..Default::default() });
        assert_eq!(remaining(&job, at(110)), Some(Duration::from_secs(20)));
        assert_eq!(remaining(&job, at(200)), Some(Duration::ZERO));
        job.spec.as_mut().unwrap().ttl_seconds_after_finished = None;
        assert_eq!(remaining(&job, at(200)), None);
    }
}
