//! CronJob: makes a Job at each of its times, and keeps a few of the finished ones.
mod schedule;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{DeleteParams, PropagationPolicy};
use tokio::task::JoinSet;

use crate::Context;
use crate::conditions::{TRUE, find};
use crate::error::SyncError;
use crate::events::Recorder;
use crate::informers::Informers;
use crate::objects::{Key, controller_ref, is_controlled_by, is_terminating, name, namespace, reference, uid};
use crate::pods::owner_key;
use crate::worker::{self, Outcome, Queue};

use schedule::Schedule;

const CONTROLLER: &str = "cronjob-controller";
const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// A little after the time, so that clocks that disagree a little agree that it has come.
const PADDING: Duration = Duration::from_millis(100);
/// More missed times than this are worth a warning.
const MANY: i64 = 100;

pub fn start(context: &Context, tasks: &mut JoinSet<()>) {
    let queue = Queue::<Key>::new();
    let add = queue.clone();
    context.informers.cron_jobs.on_change(move |old, new| {
        if let Some(object) = new.or(old) {
            add.add(Key::of(&**object));
        }
    });
    let add = queue.clone();
    context.informers.jobs.on_change(move |old, new| {
        for key in [old, new].into_iter().flatten().filter_map(|job| owner_key::<CronJob>(&job.metadata)) {
            add.add(key);
        }
    });
    let worker = Worker { informers: context.informers.clone(), recorder: context.recorder.named(CONTROLLER) };
    tasks.spawn(worker::run("cronjob", queue, 5, move |key| sync(worker.clone(), key)));
}

#[derive(Clone)]
struct Worker {
    informers: Arc<Informers>,
    recorder: Recorder,
}

async fn sync(worker: Worker, key: Key) -> Outcome {
    let Some(cron) = worker.informers.cron_jobs.get(&key) else { return Ok(None) };
    let mut run = Run { worker: &worker, status: cron.status.clone().unwrap_or_default(), cron: &cron };
    let jobs = worker.informers.jobs.select(&key.namespace, |job| is_controlled_by(&job.metadata, uid(&cron.metadata)));
    let again = run.go(&jobs).await;
    run.clean_up(&jobs).await;
    if cron.status.clone().unwrap_or_default() != run.status {
        let mut updated = (*cron).clone();
        updated.status = Some(run.status);
        worker.informers.cron_jobs.update_status(&updated).await?;
    }
    again
}

fn outcome(job: &Job) -> Option<&'static str> {
    let list = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    ["Complete", "Failed"].into_iter().find(|kind| find(list, kind).is_some_and(|condition| condition.status == TRUE))
}

/// One sync; the status is written at its end.
struct Run<'a> {
    worker: &'a Worker,
    cron: &'a CronJob,
    status: CronJobStatus,
}

impl Run<'_> {
    async fn go(&mut self, jobs: &[Arc<Job>]) -> Outcome {
        self.observe(jobs).await?;
        let Some(spec) = self.cron.spec.as_ref().filter(|_| !is_terminating(&self.cron.metadata)) else { return Ok(None) };
        if let Some(zone) = spec.time_zone.as_deref()
            && jiff::tz::TimeZone::get(zone).is_err()
        {
            self.warn("UnknownTimeZone", format!("invalid timeZone: {zone:?}: unknown time zone {zone}"));
            return Ok(None);
        }
        if spec.suspend == Some(true) {
            return Ok(None);
        }
        let schedule = match Schedule::parse(&spec.schedule, spec.time_zone.as_deref()) {
            Ok(schedule) => schedule,
            Err(error) => {
                self.warn("UnparseableSchedule", format!("unparseable schedule: {:?} : {error}", spec.schedule));
                return Ok(None);
            }
        };
        let now = Timestamp::now();
        let due = due(self.cron, spec, &self.status, &schedule, now);
        if due.missed > MANY {
            self.warn(
                "TooManyMissedTimes",
                "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew",
            );
        }
        if let Some(at) = due.latest {
            self.start(spec, at, now).await?;
        }
        Ok(until_next(self.cron, &self.status, &schedule, Timestamp::now()))
    }

    fn warn(&self, reason: &'static str, message: impl Into<String>) {
        self.worker.recorder.warning(self.cron, reason, message);
    }

    fn tell(&self, reason: &'static str, message: String) {
        self.worker.recorder.normal(self.cron, reason, message);
    }

    fn is_active(&self, id: &str) -> bool {
        self.status.active.iter().flatten().any(|job| job.uid.as_deref() == Some(id))
    }

    fn forget(&mut self, id: &str) {
        if let Some(active) = &mut self.status.active {
            active.retain(|job| job.uid.as_deref() != Some(id));
        }
        if self.status.active.as_ref().is_some_and(Vec::is_empty) {
            self.status.active = None;
        }
    }

    /// Brings the status up to date with the Jobs there are.
    async fn observe(&mut self, jobs: &[Arc<Job>]) -> Result<(), SyncError> {
        for job in jobs {
            let (id, title) = (uid(&job.metadata), name(&job.metadata));
            match outcome(job) {
                None if !self.is_active(id) => {
                    self.warn("UnexpectedJob", format!("Saw a job that the controller did not create or forgot: {title}"));
                }
                None => {}
                Some(end) => {
                    if self.is_active(id) {
                        self.forget(id);
                        self.tell("SawCompletedJob", format!("Saw completed job: {title}, condition: {end}"));
                    }
                    let ended = job.status.as_ref().and_then(|status| status.completion_time.clone()).filter(|_| end == "Complete");
                    if ended.is_some() && ended > self.status.last_successful_time {
                        self.status.last_successful_time = ended;
                    }
                }
            }
        }
        for active in self.status.active.clone().unwrap_or_default() {
            let id = active.uid.unwrap_or_default();
            if jobs.iter().any(|job| uid(&job.metadata) == id) {
                continue;
            }
            let title = active.name.unwrap_or_default();
            // The watch may be behind: what is missing is asked for.
            if self.worker.informers.jobs.get_live(&Key::new(namespace(&self.cron.metadata), &title)).await?.is_none() {
                self.tell("MissingJob", format!("Active job went missing: {title}"));
                self.forget(&id);
            }
        }
        Ok(())
    }

    /// Starts the Job of time `at`, unless the rules forbid it.
    async fn start(&mut self, spec: &CronJobSpec, at: Timestamp, now: Timestamp) -> Result<(), SyncError> {
        if spec.starting_deadline_seconds.is_some_and(|deadline| at.as_second() + deadline < now.as_second()) {
            let time = jiff::fmt::rfc2822::to_string(&at.to_zoned(jiff::tz::TimeZone::UTC)).unwrap_or_else(|_| at.to_string());
            self.warn("MissSchedule", format!("Missed scheduled time to start a job: {time}"));
            return Ok(());
        }
        let job = job_at(self.cron, spec, at);
        let same_name = self.status.active.iter().flatten().any(|active| active.name == job.metadata.name);
        if same_name || self.status.last_schedule_time.as_ref().is_some_and(|last| last.0 == at) {
            return Ok(());
        }
        let active = self.status.active.clone().unwrap_or_default();
        match spec.concurrency_policy.as_deref() {
            Some("Forbid") if !active.is_empty() => {
                self.tell(
                    "JobAlreadyActive",
                    "Not starting job because prior execution is running and concurrency policy is Forbid".into(),
                );
                return Ok(());
            }
            Some("Replace") => {
                for running in active {
                    let key = Key::new(namespace(&self.cron.metadata), running.name.unwrap_or_default());
                    match self.worker.informers.jobs.get_live(&key).await? {
                        Some(job) => self.delete(&job).await?,
                        None => self.forget(&running.uid.unwrap_or_default()),
                    }
                }
            }
            _ => {}
        }
        self.create(&job, at).await
    }

    async fn create(&mut self, job: &Job, at: Timestamp) -> Result<(), SyncError> {
        let created = match self.worker.informers.jobs.create(job).await {
            Ok(created) => {
                self.tell("SuccessfulCreate", format!("Created job {}", name(&created.metadata)));
                created
            }
            // Made before, but the status was lost on the way: then it is noted now.
            Err(error) if error.is_already_exists() => match self.worker.informers.jobs.get_live(&Key::of(job)).await? {
                Some(found) if is_controlled_by(&found.metadata, uid(&self.cron.metadata)) && !self.is_active(uid(&found.metadata)) => {
                    Arc::new(found)
                }
                _ => return Ok(()),
            },
            Err(error) => {
                if !error.is_namespace_terminating() {
                    self.warn("FailedCreate", format!("Error creating job: {}", error.message()));
                }
                return Err(error);
            }
        };
        self.status.active.get_or_insert_default().push(reference(&*created));
        self.status.last_schedule_time = Some(Time(at));
        Ok(())
    }

    async fn delete(&mut self, job: &Job) -> Result<(), SyncError> {
        let params = DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..Default::default() };
        match self.worker.informers.jobs.delete(job, params).await {
            Err(error) if !error.is_not_found() => {
                self.warn("FailedDelete", format!("Deleted job: {}", error.message()));
                Err(error)
            }
            _ => {
                self.forget(uid(&job.metadata));
                self.tell("SuccessfulDelete", format!("Deleted job {}", name(&job.metadata)));
                Ok(())
            }
        }
    }

    /// Removes the oldest finished Jobs beyond the history's limits.
    async fn clean_up(&mut self, jobs: &[Arc<Job>]) {
        let Some(spec) = &self.cron.spec else { return };
        for (end, limit) in [("Complete", spec.successful_jobs_history_limit), ("Failed", spec.failed_jobs_history_limit)] {
            let Some(limit) = limit.and_then(|limit| usize::try_from(limit).ok()) else { continue };
            let started = |job: &Job| job.status.as_ref().and_then(|status| status.start_time.clone());
            let mut finished: Vec<_> =
                jobs.iter().filter(|job| outcome(job) == Some(end) && !is_terminating(&job.metadata)).cloned().collect();
            // Those that never started are the youngest.
            finished.sort_by_key(|job| (started(job).is_none(), started(job), name(&job.metadata).to_owned()));
            let excess = finished.len().saturating_sub(limit);
            for job in finished.into_iter().take(excess) {
                // A failure has been told about, and the next sync tries again.
                let _ = self.delete(&job).await;
            }
        }
    }
}

/// The latest time that has passed unused, and about how many have.
#[derive(Debug, PartialEq)]
struct Due {
    latest: Option<Timestamp>,
    missed: i64,
}

fn last(cron: &CronJob, status: &CronJobStatus) -> Timestamp {
    let last = status.last_schedule_time.as_ref().or(cron.metadata.creation_timestamp.as_ref());
    last.map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

fn due(cron: &CronJob, spec: &CronJobSpec, status: &CronJobStatus, schedule: &Schedule, now: Timestamp) -> Due {
    let mut from = last(cron, status);
    if let Some(deadline) = spec.starting_deadline_seconds
        && let Ok(earliest) = Timestamp::from_second(now.as_second() - deadline)
    {
        from = from.max(earliest);
    }
    let none = Due { latest: None, missed: 0 };
    let Some(first) = schedule.next(from).filter(|first| *first <= now) else { return none };
    let Some(second) = schedule.next(first).filter(|second| *second <= now) else { return Due { latest: Some(first), missed: 1 } };
    // Not one by one from the beginning: a long stop would make that long, too.
    let distance = (second.as_second() - first.as_second()).max(1);
    let missed = (now.as_second() - first.as_second()) / distance + 1;
    let jump = Timestamp::from_second(first.as_second() + (missed - 2) * distance).unwrap_or(first);
    let mut latest = None;
    let mut next = schedule.next(jump);
    while let Some(at) = next.filter(|at| *at <= now) {
        latest = Some(at);
        next = schedule.next(at);
    }
    Due { latest: latest.or(Some(second)), missed }
}

fn until_next(cron: &CronJob, status: &CronJobStatus, schedule: &Schedule, now: Timestamp) -> Option<Duration> {
    let last = last(cron, status);
    // A constant distance counts from the last time, not from now.
    let base = match schedule {
        Schedule::Every(seconds) => {
            Timestamp::from_second(last.as_second() + (now.as_second() - last.as_second()).max(0) / seconds * seconds).ok()?
        }
        Schedule::Fields(..) => now.max(last),
    };
    let next = schedule.next(base)?;
    Some(Duration::try_from(next.duration_since(now)).unwrap_or_default() + PADDING)
}

/// The Job of a time is named after it, so that it can't be made twice.
fn job_at(cron: &CronJob, spec: &CronJobSpec, at: Timestamp) -> Job {
    let template = spec.job_template.metadata.clone().unwrap_or_default();
    let zone = spec.time_zone.as_deref().and_then(|zone| jiff::tz::TimeZone::get(zone).ok()).unwrap_or(jiff::tz::TimeZone::UTC);
    let zoned = at.to_zoned(zone);
    let text = if zoned.offset().is_zero() { at.to_string() } else { zoned.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string() };
    let mut annotations = template.annotations.unwrap_or_default();
    annotations.insert(SCHEDULED_AT.into(), text);
    Job {
        metadata: ObjectMeta {
            name: Some(format!("{}-{}", name(&cron.metadata), at.as_second().div_euclid(60))),
            namespace: cron.metadata.namespace.clone(),
            labels: template.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![controller_ref(cron)]),
            ..Default::default()
        },
        spec: spec.job_template.spec.clone(),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn cron(created: &str, deadline: Option<i64>) -> CronJob {
        let mut cron = CronJob::default();
        cron.metadata.name = Some("tick".into());
        cron.metadata.creation_timestamp = Some(Time(at(created)));
        cron.spec = Some(CronJobSpec { schedule: "*/10 * * * *".into(), starting_deadline_seconds: deadline, ..Default::default() });
        cron
    }

    #[test]
    fn only_the_latest_of_missed_times_counts() {
        let cases = [
            ("2024-01-01T00:05:00Z", None, None, 0),
            ("2024-01-01T00:10:01Z", None, Some("2024-01-01T00:10:00Z"), 1),
            ("2024-01-01T01:35:00Z", None, Some("2024-01-01T01:30:00Z"), 9),
            ("2024-01-03T00:35:00Z", None, Some("2024-01-03T00:30:00Z"), 291),
            ("2024-01-03T00:35:00Z", Some(60), None, 0),
        ];
        for (now, deadline, latest, missed) in cases {
            let cron = cron("2024-01-01T00:00:00Z", deadline);
            let spec = cron.spec.as_ref().unwrap();
            let schedule = Schedule::parse(&spec.schedule, None).unwrap();
            let expected = Due { latest: latest.map(at), missed };
            assert_eq!(due(&cron, spec, &CronJobStatus::default(), &schedule, at(now)), expected, "{now}");
        }
    }

    #[test]
    fn a_job_is_named_after_its_minute_and_knows_its_time() {
        let mut cron = cron("2024-01-01T00:00:00Z", None);
        let job = job_at(&cron, cron.spec.as_ref().unwrap(), at("2024-07-01T07:00:00Z"));
        assert_eq!(job.metadata.name.as_deref(), Some("tick-28663620"));
        assert_eq!(job.metadata.annotations.unwrap()[SCHEDULED_AT], "2024-07-01T07:00:00Z");
        cron.spec.as_mut().unwrap().time_zone = Some("Europe/Berlin".into());
        let job = job_at(&cron, cron.spec.as_ref().unwrap(), at("2024-07-01T07:00:00Z"));
        assert_eq!(job.metadata.annotations.unwrap()[SCHEDULED_AT], "2024-07-01T09:00:00+02:00");
    }
}
