//! Sets of completion indexes, in the short form in which a Job's status has them: `1,3-5,7` (pure).
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod, PodTemplateSpec};

use super::facts::{finished_at, has_tracking, is_failed};
use super::policy;
use crate::objects::annotation;

pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
pub const FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
pub const IGNORED_FAILURES: &str = "batch.kubernetes.io/job-index-ignored-failure-count";
const INDEX_ENV: &str = "JOB_COMPLETION_INDEX";

/// Ordered, disjoint, non-adjacent ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indexes(Vec<(i32, i32)>);

impl Indexes {
    /// Reads the short form; what can't be read, or isn't below `completions`, is left out.
    pub fn parse(text: &str, completions: i32) -> Self {
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (i32, i32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first < completions && first <= last).then_some((first, last.min(completions - 1)))
        };
        let mut ranges: Vec<(i32, i32)> = text.split(',').filter_map(range).collect();
        ranges.sort_unstable();
        let mut indexes = Self::default();
        ranges.into_iter().for_each(|range| indexes.push(range));
        indexes
    }

    /// Appends a range that doesn't begin before the last one.
    fn push(&mut self, (first, last): (i32, i32)) {
        match self.0.last_mut() {
            Some(end) if first <= end.1 + 1 => end.1 = end.1.max(last),
            _ => self.0.push((first, last)),
        }
    }

    pub fn with(&self, more: impl IntoIterator<Item = i32>) -> Self {
        let mut ranges: Vec<(i32, i32)> = self.0.iter().copied().chain(more.into_iter().map(|index| (index, index))).collect();
        ranges.sort_unstable();
        let mut merged = Self::default();
        ranges.into_iter().for_each(|range| merged.push(range));
        merged
    }

    pub fn merged(&self, other: &Self) -> Self {
        self.with(other.0.iter().flat_map(|(first, last)| *first..=*last))
    }

    pub fn total(&self) -> i32 {
        self.0.iter().map(|(first, last)| last - first + 1).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn has(&self, index: i32) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&index))
    }

    /// How many indexes both have.
    pub fn common(&self, other: &Self) -> i32 {
        let overlap = |left: &(i32, i32), right: &(i32, i32)| (left.1.min(right.1) - left.0.max(right.0) + 1).max(0);
        self.0.iter().map(|left| other.0.iter().map(|right| overlap(left, right)).sum::<i32>()).sum()
    }

    /// The first `count` indexes below `completions` that aren't in here.
    pub fn missing(&self, completions: i32, count: usize) -> Vec<i32> {
        (0..completions).filter(|index| !self.has(*index)).take(count).collect()
    }
}

impl std::fmt::Display for Indexes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, (first, last)) in self.0.iter().enumerate() {
            let comma = if place > 0 { "," } else { "" };
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                1 => write!(f, "{comma}{first},{last}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// The index that a pod works on.
pub fn index_of(pod: &Pod) -> Option<i32> {
    annotation(&pod.metadata, INDEX)?.parse().ok().filter(|index| *index >= 0)
}

fn valid_index(pod: &Pod, completions: i32) -> Option<i32> {
    index_of(pod).filter(|index| *index < completions)
}

pub fn indexes_of<'a>(pods: impl Iterator<Item = &'a Arc<Pod>>) -> BTreeSet<i32> {
    pods.filter_map(|pod| index_of(pod)).collect()
}

/// Succeeded indexes: as the status has them, and with those of pods not counted yet.
pub fn succeeded(job: &Job, pods: &[Arc<Pod>], completions: i32) -> (Indexes, Indexes) {
    let known = job.status.as_ref().and_then(|status| status.completed_indexes.as_deref()).unwrap_or_default();
    let before = Indexes::parse(known, completions);
    let fresh = pods.iter().filter(|pod| crate::objects::pod_phase(pod) == "Succeeded" && has_tracking(pod));
    let after = before.with(fresh.filter_map(|pod| valid_index(pod, completions)));
    (before, after)
}

/// Indexes whose own back-off limit is used up, or that a failure policy has given up.
pub fn failed(job: &Job, pods: &[Arc<Pod>], completions: i32, limit: i32) -> Indexes {
    let known = job.status.as_ref().and_then(|status| status.failed_indexes.as_deref()).unwrap_or_default();
    let fresh = pods.iter().filter(|pod| has_tracking(pod) && is_index_failed(job, pod, limit));
    Indexes::parse(known, completions).with(fresh.filter_map(|pod| valid_index(pod, completions)))
}

fn is_index_failed(job: &Job, pod: &Pod, limit: i32) -> bool {
    if !is_failed(pod, job) {
        return false;
    }
    let verdict = policy::judge(job, pod);
    verdict.action == Some(policy::Action::FailIndex) || verdict.counts && count(pod, FAILURES) >= limit
}

fn count(pod: &Pod, key: &str) -> i32 {
    annotation(&pod.metadata, key).and_then(|number| number.parse().ok()).filter(|number| *number >= 0).unwrap_or(0)
}

/// All failures of the pod's index before it.
pub fn failures_before(pod: &Pod) -> i32 {
    count(pod, FAILURES) + count(pod, IGNORED_FAILURES)
}

/// The failed pods that must stay until their index has a new one, which takes over their failure count.
pub fn awaiting_replacement(
    job: &Job,
    pods: &[Arc<Pod>],
    active: &[Arc<Pod>],
    done: (&Indexes, &Indexes),
    completions: i32,
) -> HashMap<i32, Arc<Pod>> {
    let busy = indexes_of(active.iter());
    let mut latest: HashMap<i32, Arc<Pod>> = HashMap::new();
    for pod in pods.iter().filter(|pod| has_tracking(pod) && is_failed(pod, job)) {
        let Some(index) = valid_index(pod, completions).filter(|index| !done.0.has(*index) && !done.1.has(*index) && !busy.contains(index))
        else {
            continue;
        };
        let newer =
            latest.get(&index).is_none_or(|other| failures_before(other) <= failures_before(pod) && finished_at(pod) >= finished_at(other));
        if newer {
            latest.insert(index, pod.clone());
        }
    }
    latest
}

/// Makes `template` that of one index: annotation, label, host name, and with a limit per index its failures so far.
pub fn assign(job: &Job, template: &mut PodTemplateSpec, index: i32, replaced: Option<&Pod>) {
    let meta = template.metadata.get_or_insert_default();
    meta.annotations.get_or_insert_default().insert(INDEX.into(), index.to_string());
    meta.labels.get_or_insert_default().insert(INDEX.into(), index.to_string());
    if job.spec.as_ref().is_some_and(|spec| spec.backoff_limit_per_index.is_some()) {
        let (mut counted, mut ignored) = replaced.map_or((0, 0), |pod| (count(pod, FAILURES), count(pod, IGNORED_FAILURES)));
        if let Some(pod) = replaced {
            if policy::judge(job, pod).counts { counted += 1 } else { ignored += 1 }
        }
        let annotations = meta.annotations.get_or_insert_default();
        annotations.insert(FAILURES.into(), counted.to_string());
        if ignored > 0 {
            annotations.insert(IGNORED_FAILURES.into(), ignored.to_string());
        }
    }
    if let Some(spec) = &mut template.spec {
        spec.hostname = Some(format!("{}-{index}", crate::objects::name(&job.metadata)));
    }
}

/// The prefix of an index's pods' names.
pub fn name_prefix(job: &str, index: i32) -> String {
    let suffix = format!("-{index}-");
    let room = 58usize.saturating_sub(suffix.len());
    format!("{}{suffix}", job.chars().take(room).collect::<String>())
}

/// Lets every container know its index.
pub fn add_environment(template: &mut PodTemplateSpec) {
    let Some(spec) = &mut template.spec else { return };
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        let env = container.env.get_or_insert_default();
        if env.iter().all(|variable| variable.name != INDEX_ENV) {
            let field = ObjectFieldSelector { field_path: format!("metadata.labels['{INDEX}']"), api_version: None };
            let value_from = Some(EnvVarSource { field_ref: Some(field), ..Default::default() });
            env.push(EnvVar { name: INDEX_ENV.into(), value: None, value_from });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_form_is_read_and_written() {
        for (text, completions, expected) in [
            ("", 5, ""),
            ("1,3-5,7", 10, "1,3-5,7"),
            ("0,1,2", 10, "0-2"),
            ("0-9", 4, "0-3"),
            ("3,4", 10, "3,4"),
            ("x,2", 10, "2"),
            ("8", 5, ""),
        ] {
            assert_eq!(Indexes::parse(text, completions).to_string(), expected, "{text}");
        }
        let indexes = Indexes::parse("1,3-5", 10).with([2, 8]);
        assert_eq!((indexes.to_string().as_str(), indexes.total()), ("1-5,8", 6));
        assert_eq!(indexes.missing(10, 3), [0, 6, 7]);
        assert_eq!(indexes.common(&Indexes::parse("4-9", 10)), 3);
    }

    #[test]
    fn names_keep_their_index_whatever_their_length() {
        assert_eq!(name_prefix("job", 3), "job-3-");
        let long = name_prefix(&"j".repeat(80), 12);
        assert!(long.len() == 58 && long.ends_with("-12-"));
    }
}
