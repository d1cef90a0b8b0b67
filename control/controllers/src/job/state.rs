//! One sync's view of a Job, and what follows from it (pure).
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobStatus};
use k8s_openapi::api::core::v1::Pod;

use super::facts::{
    self, Failures, TRACKING, condition, ensure, has_tracking, is_failed, is_indexed, is_suspended, new_condition, replaces_only_failed,
};
use super::indexes::{self, Indexes, index_of};
use super::{may_manage, policy};
use crate::conditions::{FALSE, TRUE};
use crate::objects::{controller_ref, is_active, is_ready, is_terminal, is_terminating, name, pod_phase, seconds, uid};
use crate::pods;
use crate::replicaset::to_delete;

/// Pods created or deleted, and pods counted, in one sync.
const MAX_PODS: usize = 500;

/// What to do about pods.
#[derive(Default)]
pub struct Plan {
    pub create: Vec<Pod>,
    pub delete: Vec<Arc<Pod>>,
    /// Pods that are deleted though their Job goes on aren't counted.
    pub untrack_deleted: bool,
    pub again: Option<Duration>,
}

pub struct State {
    pub job: Job,
    pods: Vec<Arc<Pod>>,
    active: Vec<Arc<Pod>>,
    active_count: i32,
    ready: i32,
    terminating: i32,
    succeeded: i32,
    failed: i32,
    pub failures: Failures,
    /// The condition with which the Job ends, first in its interim form.
    pub finished: Option<JobCondition>,
    succeeded_before: Indexes,
    succeeded_indexes: Indexes,
    failed_indexes: Option<Indexes>,
    awaiting: HashMap<i32, Arc<Pod>>,
    tracked: HashSet<String>,
    managed: bool,
    /// The status must be written.
    pub flush: bool,
    /// The limit of pods per sync was reached.
    pub more_to_count: bool,
}

fn count(pods: impl Iterator<Item = impl AsRef<Pod>>) -> i32 {
    i32::try_from(pods.count()).unwrap_or(i32::MAX)
}

/// Event reasons are a fixed set; a condition's reason comes back as text.
pub fn failure_reason(reason: &str) -> &'static str {
    match reason {
        "BackoffLimitExceeded" => "BackoffLimitExceeded",
        "DeadlineExceeded" => "DeadlineExceeded",
        "PodFailurePolicy" => "PodFailurePolicy",
        "MaxFailedIndexesExceeded" => "MaxFailedIndexesExceeded",
        "FailedIndexes" => "FailedIndexes",
        _ => "Failed",
    }
}

fn some(number: i32) -> Option<i32> {
    (number != 0).then_some(number)
}

impl State {
    pub fn new(mut job: Job, pods: Vec<Arc<Pod>>, known: Failures, now: Timestamp) -> Self {
        let status = job.status.get_or_insert_default();
        let uncounted = status.uncounted_terminated_pods.get_or_insert_default().clone();
        let (done, lost) = (uncounted.succeeded.unwrap_or_default(), uncounted.failed.unwrap_or_default());
        let (succeeded_so_far, failed_so_far) = (status.succeeded.unwrap_or(0), status.failed.unwrap_or(0));
        if status.start_time.is_none() && !is_suspended(&job) {
            job.status.get_or_insert_default().start_time = Some(seconds(now));
        }
        let completions = job.spec.as_ref().and_then(|spec| spec.completions).unwrap_or(0);
        let indexed = is_indexed(&job);
        let uncounted_pod = |pod: &&Arc<Pod>| has_tracking(pod) && (!indexed || index_of(pod).is_some_and(|index| index < completions));
        let new_succeeded: Vec<&Arc<Pod>> = pods
            .iter()
            .filter(uncounted_pod)
            .filter(|pod| pod_phase(pod) == "Succeeded" && !done.contains(&uid(&pod.metadata).to_owned()))
            .collect();
        let new_failed: Vec<&Arc<Pod>> = pods
            .iter()
            .filter(uncounted_pod)
            .filter(|pod| is_failed(pod, &job) && !lost.contains(&uid(&pod.metadata).to_owned()))
            .collect();
        let failed = failed_so_far + lost.len() as i32 + count(new_failed.iter().filter(|pod| policy::judge(&job, pod).counts));
        let succeeded = succeeded_so_far + done.len() as i32 + new_succeeded.len() as i32;
        let failures = known.after(new_succeeded.iter().map(|pod| &***pod), new_failed.iter().map(|pod| &***pod));
        let active: Vec<Arc<Pod>> = pods.iter().filter(|pod| is_active(pod)).cloned().collect();
        let tracked = pods.iter().filter(|pod| has_tracking(pod)).map(|pod| uid(&pod.metadata).to_owned()).collect();
        Self {
            active_count: count(active.iter()),
            ready: count(active.iter().filter(|pod| is_ready(pod))),
            terminating: count(pods.iter().filter(|pod| !is_terminal(pod) && is_terminating(&pod.metadata))),
            job,
            pods,
            active,
            succeeded,
            failed,
            failures,
            finished: None,
            succeeded_before: Indexes::default(),
            succeeded_indexes: Indexes::default(),
            failed_indexes: None,
            awaiting: HashMap::new(),
            tracked,
            managed: false,
            flush: false,
            more_to_count: false,
        }
    }

    fn completions(&self) -> i32 {
        self.job.spec.as_ref().and_then(|spec| spec.completions).unwrap_or(0)
    }

    fn status(&mut self) -> &mut JobStatus {
        self.job.status.get_or_insert_default()
    }

    /// Decides whether the Job ends, and which pods are too many or missing.
    pub fn plan(&mut self, now: Timestamp) -> Plan {
        let again = self.judge(now);
        if self.finished.is_some() {
            return Plan { delete: self.active.clone(), again, ..Default::default() };
        }
        if !may_manage(&self.job) {
            return Plan { again, ..Default::default() };
        }
        self.managed = true;
        let mut plan = self.manage(now);
        plan.again = [plan.again, again].into_iter().flatten().min();
        plan
    }

    /// Sets `finished` if the Job must end; else when it may have to for being too slow.
    fn judge(&mut self, now: Timestamp) -> Option<Duration> {
        let spec = facts::spec(&self.job);
        let failure = |reason, message: &str| Some(new_condition("FailureTarget", TRUE, reason, message, now));
        self.finished = condition(&self.job, "SuccessCriteriaMet").cloned();
        if self.finished.is_none() {
            self.finished = match condition(&self.job, "FailureTarget") {
                Some(target) => Some(JobCondition { type_: "Failed".into(), ..target.clone() }),
                None => {
                    let fatal =
                        self.pods.iter().filter(|pod| is_failed(pod, &self.job)).find_map(|pod| policy::judge(&self.job, pod).fails_job);
                    fatal.and_then(|message| failure("PodFailurePolicy", &message))
                }
            };
        }
        let mut again = None;
        if self.finished.is_none() {
            let limit = spec.backoff_limit.unwrap_or(6);
            if self.failed > limit || self.restarts_exceed(limit) {
                self.finished = failure("BackoffLimitExceeded", "Job has reached the specified backoff limit");
            } else if let Some(left) = self.deadline(now) {
                if left <= 0 {
                    self.finished = failure("DeadlineExceeded", "Job was active longer than specified deadline");
                } else {
                    again = Some(Duration::from_secs(left.unsigned_abs()));
                }
            }
        }
        if is_indexed(&self.job) {
            self.judge_indexes(&spec, now);
        }
        again
    }

    /// Restarts within pods count against the limit when pods restart their containers themselves.
    fn restarts_exceed(&self, limit: i32) -> bool {
        let policy = self.job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()).and_then(|spec| spec.restart_policy.as_deref());
        if policy != Some("OnFailure") {
            return false;
        }
        let running = self.pods.iter().filter(|pod| matches!(pod_phase(pod), "Running" | "Pending"));
        let statuses = running
            .flat_map(|pod| pod.status.iter())
            .flat_map(|status| status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten()));
        let restarts: i32 = statuses.map(|status| status.restart_count).sum();
        if limit == 0 { restarts > 0 } else { restarts >= limit }
    }

    /// Seconds until the active deadline.
    fn deadline(&self, now: Timestamp) -> Option<i64> {
        let allowed = self.job.spec.as_ref()?.active_deadline_seconds.filter(|_| !is_suspended(&self.job))?;
        let since = self.job.status.as_ref()?.start_time.as_ref()?.0;
        Some(since.as_second() + allowed - now.as_second())
    }

    fn judge_indexes(&mut self, spec: &k8s_openapi::api::batch::v1::JobSpec, now: Timestamp) {
        let completions = self.completions();
        (self.succeeded_before, self.succeeded_indexes) = indexes::succeeded(&self.job, &self.pods, completions);
        self.succeeded = self.succeeded_indexes.total();
        if let Some(limit) = spec.backoff_limit_per_index {
            let failed = indexes::failed(&self.job, &self.pods, completions, limit);
            let failure = |reason, message| Some(new_condition("FailureTarget", TRUE, reason, message, now));
            if self.finished.is_none() {
                if spec.max_failed_indexes.is_some_and(|most| failed.total() > most) {
                    self.finished = failure("MaxFailedIndexesExceeded", "Job has exceeded the specified maximal number of failed indexes");
                } else if failed.total() > 0 && failed.total() + self.succeeded_indexes.total() >= completions {
                    self.finished = failure("FailedIndexes", "Job has failed indexes");
                }
            }
            self.awaiting =
                indexes::awaiting_replacement(&self.job, &self.pods, &self.active, (&self.succeeded_indexes, &failed), completions);
            self.failed_indexes = Some(failed);
        }
        if self.finished.is_none()
            && let Some(message) = policy::success(&self.job, &self.succeeded_indexes, completions)
        {
            self.finished = Some(new_condition("SuccessCriteriaMet", TRUE, "SuccessPolicy", &message, now));
        }
    }

    fn manage(&self, now: Timestamp) -> Plan {
        let spec = facts::spec(&self.job);
        let active = self.active.len();
        if is_suspended(&self.job) {
            return Plan { delete: self.active.clone(), untrack_deleted: true, ..Default::default() };
        }
        let parallelism = spec.parallelism.unwrap_or(1).max(0) as usize;
        let wanted = match spec.completions {
            None if self.succeeded > 0 => active,
            None => parallelism,
            Some(completions) => ((completions - self.succeeded).max(0) as usize).min(parallelism),
        };
        let mut doomed = self.surplus(active.saturating_sub(wanted), now);
        doomed.truncate(MAX_PODS);
        if !doomed.is_empty() {
            return Plan { delete: doomed, untrack_deleted: true, ..Default::default() };
        }
        let leaving = if replaces_only_failed(&self.job) { self.terminating.max(0) as usize } else { 0 };
        let missing = wanted.saturating_sub(leaving + active).min(MAX_PODS);
        if missing == 0 { Plan::default() } else { self.creations(missing, now) }
    }

    /// The pods to go: those of an index that isn't one, or that another pod has, and the least useful others.
    fn surplus(&self, at_least: usize, now: Timestamp) -> Vec<Arc<Pod>> {
        let mut doomed = Vec::new();
        let mut left = self.active.clone();
        if is_indexed(&self.job) {
            let mut per_index: HashMap<i32, Vec<Arc<Pod>>> = HashMap::new();
            for pod in &self.active {
                match index_of(pod).filter(|index| *index < self.completions()) {
                    Some(index) => per_index.entry(index).or_default().push(pod.clone()),
                    None => doomed.push(pod.clone()),
                }
            }
            left.clear();
            for pods in per_index.into_values() {
                let extra = to_delete(&pods, &HashMap::new(), pods.len() - 1, now);
                left.extend(pods.into_iter().filter(|pod| !extra.iter().any(|other| uid(&other.metadata) == uid(&pod.metadata))));
                doomed.extend(extra);
            }
        }
        let more = at_least.saturating_sub(doomed.len()).min(left.len());
        doomed.extend(to_delete(&left, &HashMap::new(), more, now));
        doomed
    }

    fn creations(&self, missing: usize, now: Timestamp) -> Plan {
        let per_index = self.failed_indexes.is_some();
        let pause = if per_index { 0 } else { self.failures.pause(now) };
        let wait = |seconds: i64| Plan { again: Some(Duration::from_secs(seconds.unsigned_abs())), ..Default::default() };
        if pause > 0 {
            return wait(pause);
        }
        let Some(spec) = &self.job.spec else { return Plan::default() };
        let mut template = spec.template.clone();
        template.metadata.get_or_insert_default().finalizers.get_or_insert_default().push(TRACKING.into());
        let reference = controller_ref(&self.job);
        if !is_indexed(&self.job) {
            let pod = pods::from_template(&self.job.metadata, &template, reference);
            return Plan { create: vec![pod; missing], ..Default::default() };
        }
        indexes::add_environment(&mut template);
        let mut taken = self.succeeded_indexes.with(indexes::indexes_of(self.active.iter()));
        if replaces_only_failed(&self.job) {
            let leaving = self.pods.iter().filter(|pod| !is_terminal(pod) && is_terminating(&pod.metadata));
            taken = taken.with(indexes::indexes_of(leaving));
        }
        if let Some(failed) = &self.failed_indexes {
            taken = taken.merged(failed);
        }
        let pause_of = |index: &i32| self.awaiting.get(index).map_or(0, |pod| index_pause(pod, now));
        let (ready, waiting): (Vec<i32>, Vec<i32>) =
            taken.missing(self.completions(), missing).into_iter().partition(|index| pause_of(index) == 0);
        if ready.is_empty() {
            return waiting.iter().map(pause_of).min().map(wait).unwrap_or_default();
        }
        let pod = |index: i32| {
            let mut template = template.clone();
            indexes::assign(&self.job, &mut template, index, self.awaiting.get(&index).map(|pod| &**pod));
            let mut pod = pods::from_template(&self.job.metadata, &template, reference.clone());
            pod.metadata.generate_name = Some(indexes::name_prefix(name(&self.job.metadata), index));
            pod
        };
        Plan { create: ready.into_iter().map(pod).collect(), ..Default::default() }
    }

    pub fn deleted(&mut self, was_ready: bool) {
        self.active_count -= 1;
        self.terminating += 1;
        self.ready -= i32::from(was_ready);
    }

    pub fn created(&mut self, number: usize) {
        self.active_count += i32::try_from(number).unwrap_or(i32::MAX);
    }

    /// After the pods have been dealt with: success by completions, suspension, and the plain counts.
    /// Returns events to tell: whether normal, reason, message.
    pub fn settle(&mut self, now: Timestamp) -> Vec<(bool, &'static str, &'static str)> {
        let mut events = Vec::new();
        let wanted = self.job.spec.as_ref().and_then(|spec| spec.completions);
        let complete = self.active_count == 0 && wanted.map_or(self.succeeded > 0, |wanted| self.succeeded >= wanted);
        let ending = condition(&self.job, "FailureTarget").is_some() || self.finished.is_some();
        if !ending && complete {
            self.finished =
                Some(new_condition("SuccessCriteriaMet", TRUE, "CompletionsReached", "Reached expected number of succeeded pods", now));
        } else if !ending && self.managed {
            let suspended = is_suspended(&self.job);
            let wanted = if suspended {
                new_condition("Suspended", TRUE, "JobSuspended", "Job suspended", now)
            } else {
                new_condition("Suspended", FALSE, "JobResumed", "Job resumed", now)
            };
            if ensure(&mut self.status().conditions, wanted) {
                self.flush = true;
                if suspended {
                    events.push((true, "Suspended", "Job suspended"));
                } else {
                    // The deadline runs from the resumption.
                    self.status().start_time = Some(seconds(now));
                    events.push((true, "Resumed", "Job resumed"));
                }
            }
        }
        let (active, ready, terminating) = (some(self.active_count), Some(self.ready), Some(self.terminating));
        let status = self.status();
        if status.active.filter(|number| *number != 0) != active || status.ready != ready || status.terminating != terminating {
            (status.active, status.ready, status.terminating) = (active, ready, terminating);
            self.flush = true;
        }
        events
    }

    /// Notes ended pods in the status; returns those whose finalizer may go once that is written.
    pub fn count_pods(&mut self, now: Timestamp) -> Vec<Arc<Pod>> {
        self.move_to_counters();
        let completions = self.completions();
        let indexed = is_indexed(&self.job);
        let uncounted = self.status().uncounted_terminated_pods.clone().unwrap_or_default();
        let (mut succeeded, mut failed) = (uncounted.succeeded.unwrap_or_default(), uncounted.failed.unwrap_or_default());
        let mut new_indexes = Vec::new();
        let mut released = Vec::new();
        let mut order = self.pods.clone();
        if indexed {
            order.sort_by_key(|pod| index_of(pod));
        }
        for pod in order.iter().filter(|pod| self.tracked.contains(uid(&pod.metadata))) {
            let lost = is_failed(pod, &self.job);
            if !self.may_release(pod, lost) {
                continue;
            }
            released.push(pod.clone());
            let id = uid(&pod.metadata).to_owned();
            let index = index_of(pod).filter(|index| *index < completions);
            let ended_badly = lost || self.finished.as_ref().is_some_and(|finished| finished.type_ != "SuccessCriteriaMet");
            if pod_phase(pod) == "Succeeded" && !failed.contains(&id) {
                if indexed {
                    new_indexes.extend(index.filter(|index| !self.succeeded_before.has(*index)));
                } else if !succeeded.contains(&id) {
                    succeeded.push(id);
                    self.flush = true;
                }
            } else if ended_badly && !failed.contains(&id) && (!indexed || index.is_some()) && policy::judge(&self.job, pod).counts {
                failed.push(id);
                self.flush = true;
            }
            if new_indexes.len() + succeeded.len() + failed.len() >= MAX_PODS {
                self.more_to_count = true;
                break;
            }
        }
        let uncounted = self.status().uncounted_terminated_pods.get_or_insert_default();
        uncounted.succeeded = (!succeeded.is_empty()).then_some(succeeded);
        uncounted.failed = (!failed.is_empty()).then_some(failed);
        if indexed {
            self.note_indexes(new_indexes);
        }
        self.announce_end(now);
        released
    }

    fn may_release(&self, pod: &Pod, lost: bool) -> bool {
        if is_terminating(&self.job.metadata) || self.finished.is_some() || pod_phase(pod) == "Succeeded" {
            return true;
        }
        let awaited =
            || index_of(pod).and_then(|index| self.awaiting.get(&index)).is_some_and(|other| uid(&other.metadata) == uid(&pod.metadata));
        lost && !awaited()
    }

    fn note_indexes(&mut self, fresh: Vec<i32>) {
        let all = self.succeeded_before.with(fresh);
        let text = Some(all.to_string()).filter(|text| !text.is_empty());
        let failed = self.failed_indexes.as_ref().map(Indexes::to_string);
        let total = some(all.total());
        self.succeeded_before = all;
        let status = self.status();
        let changed =
            status.completed_indexes != text || status.failed_indexes != failed || status.succeeded.filter(|number| *number != 0) != total;
        (status.completed_indexes, status.failed_indexes, status.succeeded) = (text, failed, total);
        self.flush |= changed;
    }

    /// Writes the interim condition, and keeps the final one for when all is counted.
    fn announce_end(&mut self, now: Timestamp) {
        let Some(finished) = self.finished.clone() else { return };
        let (interim, last) = match finished.type_.as_str() {
            "FailureTarget" => (finished.clone(), "Failed"),
            "SuccessCriteriaMet" => (finished.clone(), "Complete"),
            _ => return,
        };
        if condition(&self.job, &interim.type_).is_none() {
            self.status().conditions.get_or_insert_default().push(interim);
            self.flush = true;
        }
        self.finished = Some(JobCondition {
            type_: last.into(),
            last_probe_time: Some(seconds(now)),
            last_transition_time: Some(seconds(now)),
            ..finished
        });
    }

    pub fn untracked(&mut self, uid: &str) {
        self.tracked.remove(uid);
    }

    /// Uids of pods without their finalizer leave the status and count for good.
    pub fn move_to_counters(&mut self) {
        let tracked = std::mem::take(&mut self.tracked);
        let status = self.job.status.get_or_insert_default();
        let uncounted = status.uncounted_terminated_pods.get_or_insert_default();
        let mut changed = false;
        let mut moved = |list: &mut Option<Vec<String>>, counter: &mut Option<i32>| {
            let before = list.as_ref().map_or(0, Vec::len);
            if let Some(uids) = list {
                uids.retain(|uid| tracked.contains(uid));
            }
            let after = list.as_ref().map_or(0, Vec::len);
            if after == 0 {
                *list = None;
            }
            if before != after {
                *counter = Some(counter.unwrap_or(0) + (before - after) as i32);
                changed = true;
            }
        };
        moved(&mut uncounted.succeeded, &mut status.succeeded);
        moved(&mut uncounted.failed, &mut status.failed);
        self.flush |= changed;
        self.tracked = tracked;
    }

    /// Sets the final condition when everything is counted and gone. Whether the Job has ended.
    pub fn enact(&mut self, now: Timestamp) -> bool {
        let Some(finished) = self.finished.clone().filter(|_| !self.more_to_count) else { return false };
        let uncounted = self.status().uncounted_terminated_pods.clone().unwrap_or_default();
        if uncounted.succeeded.is_some() || uncounted.failed.is_some() || self.terminating > 0 {
            return false;
        }
        let complete = finished.type_ == "Complete";
        let status = self.status();
        ensure(
            &mut status.conditions,
            JobCondition { last_probe_time: Some(seconds(now)), last_transition_time: Some(seconds(now)), ..finished },
        );
        if complete {
            status.completion_time = Some(seconds(now));
        }
        self.flush = true;
        true
    }

    /// The Job in the form in which it is written.
    pub fn as_written(&self) -> Job {
        self.job.clone()
    }
}

/// Seconds before an index whose pod failed gets another one.
fn index_pause(failed: &Pod, now: Timestamp) -> i64 {
    Failures { count: indexes::failures_before(failed) + 1, last: Some(facts::finished_at(failed)) }.pause(now)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::batch::v1::JobSpec;
    use k8s_openapi::api::core::v1::PodTemplateSpec;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn job(spec: JobSpec) -> Job {
        let mut job = Job {
            spec: Some(JobSpec { template: PodTemplateSpec { spec: Some(Default::default()), ..Default::default() }, ..spec }),
            ..Default::default()
        };
        job.metadata.name = Some("j".into());
        job.metadata.uid = Some("j".into());
        job
    }

    fn pod(id: &str, phase: &str, index: Option<i32>) -> Arc<Pod> {
        let mut pod = Pod::default();
        pod.metadata.name = Some(id.into());
        pod.metadata.uid = Some(id.into());
        pod.metadata.finalizers = Some(vec![TRACKING.into()]);
        pod.metadata.creation_timestamp = Some(Time(at(0)));
        pod.metadata.annotations = index.map(|index| [(indexes::INDEX.to_owned(), index.to_string())].into());
        pod.status.get_or_insert_default().phase = Some(phase.into());
        Arc::new(pod)
    }

    /// A whole sync in which everything works: the Job after it.
    fn sync(job: Job, pods: Vec<Arc<Pod>>, now: i64) -> (Job, Plan) {
        let mut state = State::new(job, pods, Failures::default(), at(now));
        let plan = state.plan(at(now));
        plan.delete.iter().for_each(|_| state.deleted(false));
        state.created(plan.create.len());
        state.settle(at(now));
        let released = state.count_pods(at(now));
        state.flush = false;
        released.iter().for_each(|pod| state.untracked(uid(&pod.metadata)));
        state.move_to_counters();
        state.enact(at(now));
        (state.job, plan)
    }

    fn conditions(job: &Job) -> Vec<String> {
        job.status
            .iter()
            .flat_map(|status| status.conditions.iter().flatten())
            .filter(|known| known.status == TRUE)
            .map(|known| known.type_.clone())
            .collect()
    }

    #[test]
    fn a_job_runs_to_its_completions() {
        let spec = JobSpec { completions: Some(3), parallelism: Some(2), ..Default::default() };
        let (first, plan) = sync(job(spec), vec![], 1);
        assert_eq!(plan.create.len(), 2);
        assert_eq!(first.status.as_ref().unwrap().active, Some(2));
        assert!(plan.create[0].metadata.finalizers.as_ref().unwrap().contains(&TRACKING.to_owned()));
        let (second, plan) = sync(first, vec![pod("a", "Succeeded", None), pod("b", "Running", None)], 2);
        assert_eq!((plan.create.len(), second.status.as_ref().unwrap().succeeded), (1, Some(1)));
        let (third, _) = sync(second, vec![pod("b", "Succeeded", None), pod("c", "Succeeded", None)], 3);
        assert_eq!(conditions(&third), ["SuccessCriteriaMet", "Complete"]);
        let status = third.status.unwrap();
        assert_eq!((status.succeeded, status.active, status.completion_time), (Some(3), None, Some(seconds(at(3)))));
    }

    #[test]
    fn failures_pause_and_then_end_the_job() {
        let spec = JobSpec { completions: Some(1), parallelism: Some(1), backoff_limit: Some(1), ..Default::default() };
        let (first, plan) = sync(job(spec), vec![pod("a", "Failed", None)], 4);
        assert_eq!((plan.create.len(), plan.again), (0, Some(Duration::from_secs(6))));
        assert_eq!(first.status.as_ref().unwrap().failed, Some(1));
        let (second, plan) = sync(first, vec![pod("b", "Failed", None), pod("c", "Running", None)], 20);
        assert_eq!(plan.delete.len(), 1);
        assert_eq!(conditions(&second), ["FailureTarget"], "a pod is still ending");
        let (third, _) = sync(second, vec![], 30);
        assert_eq!(conditions(&third), ["FailureTarget", "Failed"]);
        assert_eq!(third.status.unwrap().failed, Some(3));
    }

    #[test]
    fn a_deadline_ends_a_job_and_suspension_stops_it() {
        let spec = JobSpec { completions: Some(1), parallelism: Some(1), active_deadline_seconds: Some(10), ..Default::default() };
        let (first, plan) = sync(job(spec.clone()), vec![], 1);
        assert_eq!(plan.again, Some(Duration::from_secs(10)));
        let (second, plan) = sync(first, vec![pod("a", "Running", None)], 11);
        assert_eq!((plan.delete.len(), conditions(&second)), (1, vec!["FailureTarget".to_owned()]));
        let (held, plan) = sync(job(JobSpec { suspend: Some(true), ..spec }), vec![pod("a", "Running", None)], 1);
        assert!(plan.untrack_deleted && plan.delete.len() == 1);
        assert_eq!(conditions(&held), ["Suspended"]);
        assert_eq!(held.status.unwrap().start_time, None);
    }

    #[test]
    fn an_indexed_job_gives_every_index_one_pod() {
        let spec = JobSpec {
            completions: Some(3),
            parallelism: Some(3),
            completion_mode: Some("Indexed".into()),
            backoff_limit_per_index: Some(0),
            backoff_limit: Some(i32::MAX),
            ..Default::default()
        };
        let (first, plan) = sync(job(spec), vec![pod("x", "Succeeded", Some(1))], 1);
        assert_eq!(plan.create.iter().filter_map(index_of).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(plan.create[0].metadata.generate_name.as_deref(), Some("j-0-"));
        assert_eq!(first.status.as_ref().unwrap().completed_indexes.as_deref(), Some("1"));
        let (second, plan) = sync(first, vec![pod("y", "Failed", Some(0)), pod("z", "Running", Some(2)), pod("w", "Running", Some(2))], 2);
        assert_eq!(plan.delete.len(), 1, "two pods of one index");
        assert_eq!(second.status.as_ref().unwrap().failed_indexes.as_deref(), Some("0"));
        let (third, _) = sync(second, vec![pod("z", "Succeeded", Some(2))], 3);
        assert_eq!(conditions(&third), ["FailureTarget", "Failed"]);
        let last = third.status.unwrap();
        assert_eq!((last.completed_indexes.as_deref(), last.failed), (Some("1,2"), Some(1)));
    }
}
