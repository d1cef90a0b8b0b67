//! Workloads that run to an end: Job, CronJob.
use serde_json::Value;

use super::metadata::{self, label_selector};
use super::place::{Findings, Place};
use super::pods;
use super::workloads::template_labels;
use crate::field_error::FieldError;
use crate::meta::{self, same};
use crate::names;
use crate::selector::LabelSelector;

pub(super) fn create_job(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    if spec.at("manualSelector").flag() {
        return;
    }
    let uid = root.at("metadata.uid");
    let wanted = serde_json::json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid.text()}});
    if !same(spec.at("selector").value, &wanted) {
        found.push(spec.at("selector").invalid("`selector` not auto-generated"));
    }
    for (key, value) in [
        ("batch.kubernetes.io/controller-uid", uid.text()),
        ("batch.kubernetes.io/job-name", root.at("metadata.name").text()),
        ("controller-uid", uid.text()),
        ("job-name", root.at("metadata.name").text()),
    ] {
        let label = spec.at("template.metadata.labels").key(key);
        if label.text() != value {
            found.push(FieldError::invalid(label.path, spec.at("template.metadata.labels").value.clone(), format!("must be '{value}'")));
        }
    }
}

pub(super) fn job(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    job_spec(&spec, found);
    if !spec.at("selector").is_set() {
        found.push(spec.at("selector").required(""));
    } else {
        label_selector(&spec.at("selector"), found);
        if let Ok(selector) = LabelSelector::from_object(spec.at("selector").value) {
            template_labels(&spec, &selector, found);
        }
    }
    let indexed = spec.at("completionMode").text() == "Indexed";
    if indexed && spec.at("completions").number() > 0 {
        let name = root.at("metadata.name");
        let host = format!("{}-{}", name.text(), spec.at("completions").number() - 1);
        for message in names::dns_label(&host) {
            found.push(name.invalid(format!("will not able to create pod with invalid DNS label: {host}: {message}")));
        }
    }
}

fn job_spec(spec: &Place<'_>, found: &mut Findings) {
    for field in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        spec.at(field).non_negative(found);
    }
    let (per_index, max_failed, mode) = (spec.at("backoffLimitPerIndex"), spec.at("maxFailedIndexes"), spec.at("completionMode"));
    if max_failed.is_set() && !per_index.is_set() {
        found.push(per_index.required("when maxFailedIndexes is specified"));
    }
    mode.one_of_if_set(found, &["Indexed", "NonIndexed"]);
    let completions = spec.at("completions");
    if mode.text() == "Indexed" {
        if !completions.is_set() {
            found.push(completions.required("when completion mode is Indexed"));
        }
        if spec.at("parallelism").number() > 100_000 {
            found.push(spec.at("parallelism").invalid("must be less than or equal to 100000 when completion mode is Indexed"));
        }
        if completions.is_set() && max_failed.number() > completions.number() {
            found.push(max_failed.invalid("must be less than or equal to completions"));
        }
    } else {
        for place in [&per_index, &max_failed, &spec.at("successPolicy")] {
            if place.is_set() {
                found.push(place.invalid("requires indexed completion mode"));
            }
        }
    }
    let managed = spec.at("managedBy");
    if managed.is_set() {
        managed.check(found, names::qualified_name);
        if managed.text().len() > 63 {
            found.push(FieldError::too_long(managed.path, 63));
        }
    }
    let has_failure_policy = spec.at("podFailurePolicy").is_set();
    let replacement = spec.at("podReplacementPolicy");
    replacement.one_of_if_set(found, if has_failure_policy { &["Failed"] } else { &["Failed", "TerminatingOrFailed"] });
    failure_policy(spec, found);
    success_policy(spec, found);
    pods::template(&spec.at("template"), found);
    job_restart_policy(spec, has_failure_policy, found);
}

fn job_restart_policy(spec: &Place<'_>, has_failure_policy: bool, found: &mut Findings) {
    let policy = spec.at("template.spec.restartPolicy");
    match policy.text() {
        "" | "Always" => found.push(FieldError::required(policy.path.clone(), "valid values: \"OnFailure\", \"Never\"")),
        "OnFailure" | "Never" => {}
        _ => found.push(policy.unsupported(&["OnFailure", "Never"])),
    }
    if has_failure_policy && policy.text() != "Never" {
        found.push(policy.invalid("only \"Never\" is supported when podFailurePolicy is specified"));
    }
}

fn failure_policy(spec: &Place<'_>, found: &mut Findings) {
    let rules = spec.at("podFailurePolicy.rules");
    if rules.len() > 20 {
        found.push(FieldError::too_many(rules.path.clone(), rules.len(), 20));
    }
    let containers: Vec<&str> = ["containers", "initContainers"]
        .iter()
        .flat_map(|list| meta::items(meta::get(spec.value, "template.spec"), list))
        .map(meta::name_field)
        .collect();
    for rule in rules.items() {
        let action = rule.at("action");
        match action.text() {
            "" => found.push(action.required("valid values: [\"Count\" \"FailIndex\" \"FailJob\" \"Ignore\"]")),
            "FailIndex" if !spec.at("backoffLimitPerIndex").is_set() => {
                found.push(action.invalid("requires the backoffLimitPerIndex to be set"))
            }
            "Count" | "FailIndex" | "FailJob" | "Ignore" => {}
            _ => found.push(action.unsupported(&["Count", "FailIndex", "FailJob", "Ignore"])),
        }
        let (codes, conditions) = (rule.at("onExitCodes"), rule.at("onPodConditions"));
        match (codes.is_set(), !conditions.is_empty()) {
            (true, true) => found.push(rule.invalid("specifying both OnExitCodes and OnPodConditions is not supported")),
            (false, false) => found.push(rule.invalid("specifying one of OnExitCodes and OnPodConditions is required")),
            _ => {}
        }
        for pattern in conditions.items() {
            pattern.at("type").check(found, names::qualified_name);
            pattern.at("status").one_of_if_set(found, &["False", "True", "Unknown"]);
        }
        if codes.is_set() {
            exit_codes(&codes, &containers, found);
        }
    }
}

fn exit_codes(codes: &Place<'_>, containers: &[&str], found: &mut Findings) {
    let (operator, values, container) = (codes.at("operator"), codes.at("values"), codes.at("containerName"));
    match operator.text() {
        "" => found.push(operator.required("valid values: [\"In\" \"NotIn\"]")),
        "In" | "NotIn" => {}
        _ => found.push(operator.unsupported(&["In", "NotIn"])),
    }
    if container.is_set() && !containers.contains(&container.text()) {
        found.push(container.invalid("must be one of the container or initContainer names in the pod template"));
    }
    if values.is_empty() {
        found.push(values.invalid("at least one value is required"));
    } else if values.len() > 255 {
        found.push(FieldError::too_many(values.path.clone(), values.len(), 255));
    }
    let mut before = None;
    for value in values.items() {
        if operator.text() == "In" && value.number() == 0 {
            found.push(value.invalid("must not be 0 for the In operator"));
        }
        match before {
            Some(last) if last == value.number() => found.push(value.duplicate()),
            Some(last) if last > value.number() => {
                found.push(values.invalid("must be ordered"));
                break;
            }
            _ => {}
        }
        before = Some(value.number());
    }
}

fn success_policy(spec: &Place<'_>, found: &mut Findings) {
    let policy = spec.at("successPolicy");
    if !policy.is_set() || spec.at("completionMode").text() != "Indexed" {
        return;
    }
    let rules = policy.at("rules");
    if rules.is_empty() {
        found.push(rules.required("at least one rules must be specified when the successPolicy is specified"));
    } else if rules.len() > 20 {
        found.push(FieldError::too_many(rules.path.clone(), rules.len(), 20));
    }
    for rule in rules.items() {
        let (count, indexes) = (rule.at("succeededCount"), rule.at("succeededIndexes"));
        if !count.is_set() && !indexes.is_set() {
            found.push(rule.required("at least one of succeededCount or succeededIndexes must be specified"));
        }
        count.non_negative(found);
        let completions = spec.at("completions").number();
        if count.number() > completions {
            found.push(count.invalid(format!("must be less than or equal to {completions} (the number of specified completions)")));
        }
    }
}

pub(super) fn update_job(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let spec = root.at("spec");
    let before = &old["spec"];
    for field in ["selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"] {
        spec.at(field).immutable(found, &before[field]);
    }
    let completions = spec.at("completions");
    if !same(completions.value, &before["completions"]) {
        let elastic = spec.at("completionMode").text() == "Indexed" && completions.is_set() && !before["completions"].is_null();
        if !elastic {
            completions.immutable(found, &before["completions"]);
        } else if completions.value != spec.at("parallelism").value {
            found.push(completions.invalid("can only be modified in tandem with spec.parallelism"));
        }
    }
    job_template(&spec.at("template"), old, found);
}

/// A job that is suspended and never ran may still be directed to other nodes.
fn job_template(template: &Place<'_>, old: &Value, found: &mut Findings) {
    let before = meta::get(old, "spec.template");
    let suspended = meta::get(old, "spec.suspend") == true && meta::get(old, "status.startTime").is_null();
    if !suspended {
        template.immutable(found, before);
        return;
    }
    let strip = |template: &Value| {
        let mut template = template.clone();
        for path in [
            "metadata.annotations",
            "metadata.labels",
            "spec.nodeSelector",
            "spec.tolerations",
            "spec.schedulingGates",
            "spec.affinity.nodeAffinity",
        ] {
            meta::remove(&mut template, path);
        }
        template
    };
    if !same(&strip(template.value), &strip(before)) {
        found.push(template.invalid("field is immutable"));
    }
}

pub(super) fn job_status(root: &Place<'_>, old: &Value, found: &mut Findings) {
    let status = root.at("status");
    for field in ["active", "succeeded", "failed", "ready", "terminating"] {
        status.at(field).non_negative(found);
    }
    let holds = |object: &Value, kind: &str| {
        meta::items(object, "status.conditions").iter().any(|condition| condition["type"] == kind && condition["status"] == "True")
    };
    let has = |kind: &str| holds(root.value, kind);
    let conditions = FieldError::invalid("status.conditions", Value::Null, "");
    let refuse = |detail: &str| FieldError { detail: detail.to_string(), ..conditions.clone() };
    if has("Complete") && has("Failed") {
        found.push(refuse("cannot set Complete=True and Failed=true conditions"));
    }
    if has("Complete") && has("FailureTarget") {
        found.push(refuse("cannot set Complete=True and FailureTarget=true conditions"));
    }
    for kind in ["Complete", "Failed"] {
        if holds(old, kind) && !has(kind) {
            found.push(refuse(&format!("cannot disable the terminal {kind}=True condition")));
        }
    }
    if has("Complete") && !status.at("completionTime").is_set() {
        found.push(status.at("completionTime").required("completionTime is required for Complete jobs"));
    }
    if !has("Complete") && status.at("completionTime").is_set() {
        found.push(status.at("completionTime").invalid("cannot set completionTime when there is no Complete=True condition"));
    }
    for field in ["failed", "succeeded"] {
        let place = status.at(field);
        if place.number() < old["status"][field].as_i64().unwrap_or_default() {
            found.push(place.invalid(format!("cannot decrease the {field} counter")));
        }
    }
}

pub(super) fn create_cron_job(root: &Place<'_>, found: &mut Findings) {
    let name = root.at("metadata.name");
    if name.text().len() > 52 {
        found.push(name.invalid("must be no more than 52 characters"));
    }
}

pub(super) fn cron_job(root: &Place<'_>, found: &mut Findings) {
    let spec = root.at("spec");
    let schedule = spec.at("schedule");
    if schedule.require(found) {
        if let Err(error) = cron_schedule(schedule.text()) {
            found.push(schedule.invalid(error));
        }
        let names_zone = schedule.text().contains("TZ");
        if names_zone && spec.at("timeZone").is_set() {
            found.push(schedule.invalid("cannot use both timeZone field and TZ or CRON_TZ in schedule"));
        } else if names_zone {
            found.push(schedule.invalid("cannot use TZ or CRON_TZ in schedule, use timeZone field instead"));
        }
    }
    let zone = spec.at("timeZone");
    if zone.is_set() {
        match zone.text() {
            "" => found.push(zone.invalid("timeZone must be nil or non-empty string")),
            name if name.eq_ignore_ascii_case("Local") => {
                found.push(zone.invalid("timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones"));
            }
            name if jiff::tz::TimeZone::get(name).is_err() => found.push(zone.invalid(format!("unknown time zone {name}"))),
            _ => {}
        }
    }
    for field in ["startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"] {
        spec.at(field).non_negative(found);
    }
    spec.at("concurrencyPolicy").one_of(found, &["Allow", "Forbid", "Replace"]);
    let job = spec.at("jobTemplate.spec");
    if job.at("selector").is_set() {
        found.push(job.at("selector").invalid("`selector` will be auto-generated"));
    }
    if job.at("manualSelector").flag() {
        found.push(job.at("manualSelector").unsupported(&["nil", "false"]));
    }
    metadata::labels(&spec.at("jobTemplate.metadata.labels"), found);
    job_spec(&job, found);
}

/// Five fields, or a descriptor such as `@daily` and `@every 5m`.
fn cron_schedule(text: &str) -> Result<(), String> {
    let text = text.split_once(' ').filter(|(zone, _)| zone.contains("TZ=")).map_or(text, |(_, rest)| rest).trim();
    if let Some(descriptor) = text.strip_prefix('@') {
        let known = matches!(descriptor, "yearly" | "annually" | "monthly" | "weekly" | "daily" | "midnight" | "hourly");
        return match descriptor.strip_prefix("every ") {
            Some(duration) if duration.starts_with(|letter: char| letter.is_ascii_digit()) => Ok(()),
            Some(_) => Err(format!("failed to parse duration {text}")),
            None if known => Ok(()),
            None => Err(format!("unrecognized descriptor: {text}")),
        };
    }
    let fields: Vec<&str> = text.split_whitespace().collect();
    if fields.len() != 5 {
        return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
    }
    const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
    const DAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
    let bounds: [(u32, u32, &[&str]); 5] = [(0, 59, &[]), (0, 23, &[]), (1, 31, &[]), (1, 12, MONTHS), (0, 6, DAYS)];
    for (field, (low, high, words)) in fields.into_iter().zip(bounds) {
        for part in field.split(',') {
            cron_part(part, low, high, words)?;
        }
    }
    Ok(())
}

fn cron_part(part: &str, low: u32, high: u32, words: &[&str]) -> Result<(), String> {
    let number = |text: &str| -> Result<u32, String> {
        let word = words.iter().position(|word| word.eq_ignore_ascii_case(text)).map(|index| index as u32 + low);
        word.map_or_else(
            || text.parse().map_err(|_| format!("failed to parse int from {text}: strconv.Atoi: parsing {text:?}: invalid syntax")),
            Ok,
        )
    };
    let (range, step) = part.split_once('/').map_or((part, None), |(range, step)| (range, Some(step)));
    if let Some(step) = step
        && number(step)? == 0
    {
        return Err(format!("step of range should be a positive number: {part}"));
    }
    if matches!(range, "*" | "?") {
        return Ok(());
    }
    let (start, end) = match range.split_once('-') {
        Some((start, end)) => (number(start)?, number(end)?),
        None => (number(range)?, number(range)?),
    };
    if start < low {
        return Err(format!("beginning of range ({start}) below minimum ({low}): {part}"));
    }
    if end > high {
        return Err(format!("end of range ({end}) above maximum ({high}): {part}"));
    }
    if start > end {
        return Err(format!("beginning of range ({start}) beyond end of range ({end}): {part}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_checked() {
        for text in ["* * * * *", "*/5 0-3 1,15 JAN-mar mon", "@daily", "@every 5m", "TZ=UTC 0 0 * * *", "?/2 * * * *"] {
            assert_eq!(cron_schedule(text), Ok(()), "{text}");
        }
        for text in ["", "* * * *", "60 * * * *", "* * 0 * *", "5-1 * * * *", "*/0 * * * *", "x * * * *", "@often", "@every x"] {
            assert!(cron_schedule(text).is_err(), "{text}");
        }
    }
}
