//! A Job's rules: what a pod's failure means, and when enough has succeeded (pure).
use k8s_openapi::api::batch::v1::{Job, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyRule};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::indexes::Indexes;
use crate::objects::Key;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Ignore,
    Count,
    FailIndex,
    FailJob,
}

/// What the failure policy says about one failed pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the failure counts against the back-off limit.
    pub counts: bool,
    pub action: Option<Action>,
    /// Why the whole Job fails, if it does.
    pub fails_job: Option<String>,
}

pub fn judge(job: &Job, pod: &Pod) -> Verdict {
    let rules = job.spec.iter().flat_map(|spec| spec.pod_failure_policy.iter().flat_map(|policy| &policy.rules));
    for (place, rule) in rules.enumerate() {
        let Some(matched) = matches(rule, pod) else { continue };
        let action = match rule.action.as_str() {
            "Ignore" => Action::Ignore,
            "Count" => Action::Count,
            "FailIndex" => Action::FailIndex,
            "FailJob" => Action::FailJob,
            _ => continue,
        };
        let fails_job = (action == Action::FailJob).then(|| {
            let key = Key::of(pod);
            match matched {
                Match::Exit(container, code) => {
                    format!("Container {container} for pod {key} failed with exit code {code} matching FailJob rule at index {place}")
                }
                Match::Condition(kind) => format!("Pod {key} has condition {kind} matching FailJob rule at index {place}"),
            }
        });
        return Verdict { counts: action != Action::Ignore, action: Some(action), fails_job };
    }
    Verdict { counts: true, action: None, fails_job: None }
}

enum Match {
    Exit(String, i32),
    Condition(String),
}

fn matches(rule: &PodFailurePolicyRule, pod: &Pod) -> Option<Match> {
    let status = pod.status.as_ref()?;
    if let Some(codes) = &rule.on_exit_codes {
        let containers = status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
        return containers
            .into_iter()
            .find_map(|container| exit_code(container, codes).map(|code| Match::Exit(container.name.clone(), code)));
    }
    let patterns = rule.on_pod_conditions.as_ref()?;
    let conditions = status.conditions.iter().flatten();
    conditions
        .into_iter()
        .find(|condition| {
            patterns
                .iter()
                .any(|pattern| pattern.type_ == condition.type_ && pattern.status.as_deref().unwrap_or("True") == condition.status)
        })
        .map(|condition| Match::Condition(condition.type_.clone()))
}

fn exit_code(container: &ContainerStatus, codes: &PodFailurePolicyOnExitCodesRequirement) -> Option<i32> {
    let code = container.state.as_ref()?.terminated.as_ref()?.exit_code;
    let named = codes.container_name.as_ref().is_none_or(|name| *name == container.name);
    let listed = codes.values.contains(&code);
    let wanted = match codes.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        _ => false,
    };
    (named && code != 0 && wanted).then_some(code)
}

/// The message of the first success rule that is met.
pub fn success(job: &Job, succeeded: &Indexes, completions: i32) -> Option<String> {
    if succeeded.is_empty() {
        return None;
    }
    let rules = job.spec.as_ref()?.success_policy.as_ref()?.rules.iter();
    rules.enumerate().find_map(|(place, rule)| {
        let met = match &rule.succeeded_indexes {
            Some(text) => {
                let wanted = Indexes::parse(text, completions);
                let common = wanted.common(succeeded);
                !wanted.is_empty() && (common == wanted.total() || rule.succeeded_count.is_some_and(|count| common >= count))
            }
            None => rule.succeeded_count.is_some_and(|count| succeeded.total() >= count),
        };
        met.then(|| format!("Matched rules at index {place}"))
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::batch::v1::{
        JobSpec, PodFailurePolicy, PodFailurePolicyOnPodConditionsPattern, SuccessPolicy, SuccessPolicyRule,
    };
    use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, PodCondition, PodStatus};

    use super::*;

    fn failed(code: i32, condition: Option<&str>) -> Pod {
        let mut pod = Pod {
            status: Some(PodStatus {
                container_statuses: Some(vec![ContainerStatus {
                    name: "main".into(),
                    state: Some(ContainerState {
                        terminated: Some(ContainerStateTerminated { exit_code: code, ..Default::default() }),
                        ..Default::default()
                    }),
                    ..Default::default()
                }]),
                conditions: condition.map(|kind| vec![PodCondition { type_: kind.into(), status: "True".into(), ..Default::default() }]),
                ..Default::default()
            }),
            ..Default::default()
        };
        pod.metadata.namespace = Some("ns".into());
        pod.metadata.name = Some("p".into());
        pod
    }

    #[test]
    fn the_first_matching_rule_decides() {
        let exit = |action: &str, operator: &str, values: &[i32]| PodFailurePolicyRule {
            action: action.into(),
            on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
                operator: operator.into(),
                values: values.to_vec(),
                container_name: None,
            }),
            on_pod_conditions: None,
        };
        let disrupted = PodFailurePolicyRule {
            action: "Ignore".into(),
            on_exit_codes: None,
            on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
                type_: "DisruptionTarget".into(),
                status: Some("True".into()),
            }]),
        };
        let rules = vec![disrupted, exit("FailJob", "In", &[42]), exit("Count", "NotIn", &[1])];
        let job = Job {
            spec: Some(JobSpec { pod_failure_policy: Some(PodFailurePolicy { rules }), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(judge(&job, &failed(42, Some("DisruptionTarget"))).action, Some(Action::Ignore));
        let fatal = judge(&job, &failed(42, None));
        assert_eq!(
            fatal.fails_job.as_deref(),
            Some("Container main for pod ns/p failed with exit code 42 matching FailJob rule at index 1")
        );
        assert_eq!(judge(&job, &failed(3, None)).action, Some(Action::Count));
        assert_eq!(judge(&job, &failed(1, None)), Verdict { counts: true, action: None, fails_job: None });
    }

    #[test]
    fn success_rules_want_indexes_or_a_number_of_them() {
        let rule =
            |indexes: Option<&str>, count| SuccessPolicyRule { succeeded_indexes: indexes.map(str::to_owned), succeeded_count: count };
        let job = |rules| Job {
            spec: Some(JobSpec { success_policy: Some(SuccessPolicy { rules }), ..Default::default() }),
            ..Default::default()
        };
        let done = Indexes::parse("0,2", 5);
        assert_eq!(
            success(&job(vec![rule(Some("0,1"), None), rule(Some("0-2"), Some(2))]), &done, 5).as_deref(),
            Some("Matched rules at index 1")
        );
        assert_eq!(success(&job(vec![rule(None, Some(3))]), &done, 5), None);
        assert_eq!(success(&job(vec![rule(Some("2"), None)]), &done, 5).as_deref(), Some("Matched rules at index 0"));
    }
}
