//! DELETE: preconditions, grace periods, finalizers by propagation policy, and collections.

use jiff::{SignedDuration, Timestamp};
use outrigger_api::{FieldError, Resource, Status, meta};
use outrigger_store::{Expect, Op, WriteOutcome};
use serde_json::{Value, json};

use crate::admission::{Attributes, Operation};
use crate::body::Request;
use crate::call::{Call, parse_dry_run};
use crate::engine::Engine;
use crate::negotiate::decode_body;
use crate::registry::{cached, definition, list, read_body, service, store_key, versions, write};
use crate::reply::Reply;

const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";

/// `metav1.DeleteOptions`, from the body or the query.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    pub grace_period: Option<i64>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    pub propagation: Option<String>,
    pub orphan_dependents: Option<bool>,
    pub dry_run: bool,
    /// Part of another request, which was admitted.
    pub admitted: bool,
}

impl DeleteOptions {
    /// As admission shows them.
    fn to_value(&self) -> Value {
        let mut value = json!({"kind": "DeleteOptions", "apiVersion": "meta.k8s.io/v1"});
        let preconditions = json!({"uid": self.uid, "resourceVersion": self.resource_version});
        for (key, option) in [
            ("gracePeriodSeconds", self.grace_period.map(Value::from)),
            ("preconditions", (self.uid.is_some() || self.resource_version.is_some()).then_some(preconditions)),
            ("orphanDependents", self.orphan_dependents.map(Value::from)),
            ("propagationPolicy", self.propagation.as_deref().map(Value::from)),
            ("dryRun", self.dry_run.then(|| json!(["All"]))),
        ] {
            if let Some(option) = option {
                value[key] = option;
            }
        }
        value
    }

    async fn of(call: &Call, request: Request) -> Result<Self, Status> {
        let (parts, body) = request.into_parts();
        let bytes = read_body(body).await?;
        let mut options = Self { dry_run: call.dry_run, ..Default::default() };
        if bytes.is_empty() {
            options.grace_period = call.query.number("gracePeriodSeconds");
            options.propagation = call.query.get("propagationPolicy").map(String::from);
            options.orphan_dependents = call.query.get("orphanDependents").map(|_| call.query.flag("orphanDependents"));
        } else {
            options.read(&decode_body(&parts.headers, &bytes)?)?;
        }
        options.check()?;
        Ok(options)
    }

    pub fn read(&mut self, body: &Value) -> Result<(), Status> {
        let text = |path: &str| meta::get(body, path).as_str().map(String::from);
        let kind = meta::kind(body);
        if !matches!(kind, "" | "DeleteOptions") {
            return Err(Status::bad_request(format!("decoded object cannot be converted to DeleteOptions: {kind}")));
        }
        self.grace_period = body["gracePeriodSeconds"].as_i64();
        self.uid = text("preconditions.uid");
        self.resource_version = text("preconditions.resourceVersion");
        self.propagation = text("propagationPolicy");
        self.orphan_dependents = body["orphanDependents"].as_bool();
        let dry_run: Vec<String> = meta::items(body, "dryRun").iter().filter_map(|v| v.as_str().map(String::from)).collect();
        self.dry_run |= parse_dry_run(&dry_run, "delete")?;
        Ok(())
    }

    fn check(&self) -> Result<(), Status> {
        let invalid = |error: FieldError| Err(Status::invalid("meta.k8s.io", "DeleteOptions", "", &[error]));
        if let Some(policy) = &self.propagation {
            if self.orphan_dependents.is_some() {
                let why = "orphanDependents and deletionPropagation cannot be both set";
                return invalid(FieldError::invalid("propagationPolicy", policy.as_str(), why));
            }
            if !matches!(policy.as_str(), "Foreground" | "Background" | "Orphan") {
                return invalid(FieldError::not_supported(
                    "propagationPolicy",
                    policy.as_str(),
                    &["Foreground", "Background", "Orphan", "nil"],
                ));
            }
        }
        Ok(())
    }
}

/// What a deletion came to.
pub struct Deleted {
    pub object: Value,
    /// False while grace period or finalizers keep it.
    pub gone: bool,
}

pub async fn handle(engine: &Engine, call: &Call, request: Request) -> Result<Reply, Status> {
    let options = DeleteOptions::of(call, request).await?;
    let deleted = delete(engine, call, &call.info.name, &options).await?;
    let code = if !deleted.gone && options.orphan_dependents == Some(false) { 202 } else { 200 };
    if deleted.gone && !returns_object(&call.resource) {
        let (group, plural) = (&call.resource.group, &call.resource.plural);
        let status = Status::deleted(group, plural, &call.info.name, meta::uid(&deleted.object));
        return Ok(Reply::Object(code, status.to_value()));
    }
    crate::registry::read::reply(engine, call, code, deleted.object)
}

/// Kinds whose DELETE answers the last state of the object instead of a Status.
fn returns_object(resource: &Resource) -> bool {
    const KINDS: &[&str] = &[
        "Pod",
        "Service",
        "ServiceAccount",
        "ResourceQuota",
        "PersistentVolume",
        "PersistentVolumeClaim",
        "PodTemplate",
        "StorageClass",
        "CSIDriver",
        "CSINode",
        "VolumeAttachment",
        "CSIStorageCapacity",
        "VolumeAttributesClass",
    ];
    resource.custom.is_none() && KINDS.contains(&resource.kind.as_ref())
}

pub async fn collection(engine: &Engine, call: &Call, request: Request) -> Result<Reply, Status> {
    let options = DeleteOptions::of(call, request).await?;
    let page = list::page(engine, call).await?;
    let mut items = Vec::new();
    for entry in &page.entries {
        let single = call.derived(call.resource.clone(), "delete", entry.namespace(), entry.name());
        let outcome = delete(engine, &single, entry.name(), &options).await;
        single.take_warnings().into_iter().for_each(|warning| call.warn(warning));
        match outcome {
            Ok(deleted) => items.push(deleted.object),
            Err(status) if status.code == 404 => {}
            Err(status) => return Err(status),
        }
    }
    let list = json!({
        "kind": call.resource.list_kind,
        "apiVersion": call.resource.api_version(),
        "metadata": {"resourceVersion": page.revision.to_string()},
        "items": items,
    });
    Ok(Reply::Object(200, list))
}

/// Deletes one object, or begins to.
pub async fn delete(engine: &Engine, call: &Call, name: &str, options: &DeleteOptions) -> Result<Deleted, Status> {
    engine.fresh().await?;
    for _ in 0..20 {
        let entry = cached(engine, call, name).ok_or_else(|| call.not_found(name))?;
        let current = versions::object(engine, &call.resource, &entry).await?;
        check_preconditions(call, name, options, &current)?;
        if !options.admitted {
            let shown = options.to_value();
            let attributes = Attributes::new(call, Operation::Delete, name);
            let attributes = Attributes { old: Some(&current), dry_run: options.dry_run, options: Some(&shown), ..attributes };
            engine.admission.mutate(engine, &attributes, None).await?;
            engine.admission.validate(engine, &attributes, None).await?;
        }
        let Some((object, gone)) = next_state(&call.resource, options, &current) else {
            return Ok(Deleted { object: current, gone: false });
        };
        if options.dry_run {
            return Ok(Deleted { object, gone });
        }
        if let Some(revision) = commit(engine, call, name, &object, gone, entry.revision).await? {
            let mut object = object;
            meta::set_resource_version(&mut object, &revision.to_string());
            return Ok(Deleted { object, gone });
        }
    }
    Err(Status::modified(&call.resource.group, &call.resource.plural, name))
}

/// The write of a deletion; none when someone else wrote first.
async fn commit(engine: &Engine, call: &Call, name: &str, object: &Value, gone: bool, revision: u64) -> Result<Option<u64>, Status> {
    let key = store_key(&call.key(name));
    let op = if gone {
        Op::delete(key, Expect::ModRevision(revision))
    } else {
        Op::update(key, versions::stored_bytes(engine, &call.resource, object).await?, revision)
    };
    match write(engine, op).await? {
        WriteOutcome::Done { revision, .. } => {
            if gone {
                service::on_delete(engine, &call.resource, object);
            }
            Ok(Some(revision))
        }
        WriteOutcome::Conflict { revision, .. } => {
            engine.reach(revision).await?;
            Ok(None)
        }
    }
}

fn check_preconditions(call: &Call, name: &str, options: &DeleteOptions, current: &Value) -> Result<(), Status> {
    let conflict = |what: &str, said: &str, has: &str| {
        Err(call.conflict(name, &format!("Precondition failed: {what} in precondition: {said}, {what} in object meta: {has}")))
    };
    match (&options.uid, &options.resource_version) {
        (Some(uid), _) if uid != meta::uid(current) => conflict("UID", uid, meta::uid(current)),
        (_, Some(version)) if version != meta::resource_version(current) => {
            conflict("ResourceVersion", version, meta::resource_version(current))
        }
        _ => Ok(()),
    }
}

/// The object after this deletion and whether it is gone; none when nothing changes because it is being deleted already.
fn next_state(resource: &Resource, options: &DeleteOptions, current: &Value) -> Option<(Value, bool)> {
    let mut next = current.clone();
    if resource.is("", "Namespace") {
        return namespace_state(options, next);
    }
    if definition::is_definition(resource) && !meta::is_deleting(current) {
        definition::begin_deletion(&mut next);
        return Some((next, false));
    }
    let finalizers = finalizers_after(resource, options, current);
    let finalizers_change = finalizers.iter().map(String::as_str).ne(meta::finalizers(current));
    let keeps = !finalizers.is_empty();
    set_finalizers(&mut next, finalizers);
    let now = Timestamp::now();
    if let Some(grace) = grace_period(resource, options, current) {
        return graceful_state(next, current, grace, options.grace_period, keeps, finalizers_change, now);
    }
    if !keeps {
        return Some((next, true));
    }
    if meta::is_deleting(current) {
        return finalizers_change.then_some((next, false));
    }
    mark(&mut next, now, 0);
    Some((next, false))
}

/// Pods: the deletion waits for the kubelet, and only a shorter period may follow a longer one.
fn graceful_state(
    mut next: Value,
    current: &Value,
    grace: i64,
    asked: Option<i64>,
    keeps: bool,
    finalizers_change: bool,
    now: Timestamp,
) -> Option<(Value, bool)> {
    if meta::is_deleting(current) {
        let before = meta::get(current, "metadata.deletionGracePeriodSeconds").as_i64().unwrap_or_default();
        let shorter = asked.is_some() && grace < before;
        if shorter || (grace == 0 && before == 0 && !keeps) {
            if grace == 0 && !keeps {
                return Some((next, true));
            }
            let start = outrigger_api::time::parse(meta::text(current, "metadata.deletionTimestamp")).unwrap_or(now);
            let end = after(start, grace.saturating_sub(before));
            meta::set(&mut next, "metadata.deletionTimestamp", outrigger_api::time::format(end));
            meta::set(&mut next, "metadata.deletionGracePeriodSeconds", grace);
            return Some((next, false));
        }
        return finalizers_change.then_some((next, false));
    }
    if grace == 0 && !keeps {
        return Some((next, true));
    }
    mark(&mut next, now, grace);
    Some((next, false))
}

fn namespace_state(_options: &DeleteOptions, mut next: Value) -> Option<(Value, bool)> {
    if meta::is_deleting(&next) {
        let kept = !meta::items(&next, "spec.finalizers").is_empty() || meta::finalizers(&next).next().is_some();
        return (!kept).then_some((next, true));
    }
    meta::set(&mut next, "metadata.deletionTimestamp", outrigger_api::time::format(Timestamp::now()));
    meta::set(&mut next, "status.phase", "Terminating");
    Some((next, false))
}

/// The time so many seconds later; what no timestamp can say is the last one.
fn after(time: Timestamp, seconds: i64) -> Timestamp {
    time.saturating_add(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MAX)
}

fn mark(object: &mut Value, now: Timestamp, grace: i64) {
    let end = after(now, grace);
    meta::set(object, "metadata.deletionTimestamp", outrigger_api::time::format(end));
    meta::set(object, "metadata.deletionGracePeriodSeconds", grace);
    let generation = meta::generation(object);
    if generation > 0 {
        meta::set(object, "metadata.generation", generation + 1);
    }
}

fn set_finalizers(object: &mut Value, finalizers: Vec<String>) {
    if finalizers.is_empty() {
        meta::remove(object, "metadata.finalizers");
    } else {
        meta::set(object, "metadata.finalizers", finalizers);
    }
}

/// The period a graceful kind is given; none for all other kinds.
fn grace_period(resource: &Resource, options: &DeleteOptions, current: &Value) -> Option<i64> {
    if !resource.strategy.graceful_deletion {
        return None;
    }
    let mut period = options.grace_period.or_else(|| meta::get(current, "spec.terminationGracePeriodSeconds").as_i64()).unwrap_or(30);
    let unscheduled = meta::text(current, "spec.nodeName").is_empty();
    let finished = matches!(meta::text(current, "status.phase"), "Failed" | "Succeeded");
    if unscheduled || finished {
        period = 0;
    }
    Some(if period < 0 { 1 } else { period })
}

fn finalizers_after(resource: &Resource, options: &DeleteOptions, current: &Value) -> Vec<String> {
    let has = |wanted: &str| meta::finalizers(current).any(|f| f == wanted);
    let policy = match (options.propagation.as_deref(), options.orphan_dependents) {
        (Some(policy), _) => policy,
        (None, Some(true)) => "Orphan",
        (None, Some(false)) => "Background",
        (None, None) if has(ORPHAN) => "Orphan",
        (None, None) if has(FOREGROUND) => "Foreground",
        (None, None) if resource.strategy.orphan_by_default => "Orphan",
        (None, None) => "Background",
    };
    let mut finalizers: Vec<String> = meta::finalizers(current).filter(|f| !matches!(*f, ORPHAN | FOREGROUND)).map(String::from).collect();
    match policy {
        "Orphan" => finalizers.push(ORPHAN.into()),
        "Foreground" => finalizers.push(FOREGROUND.into()),
        _ => {}
    }
    finalizers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(kind: &str, options: DeleteOptions, object: Value) -> Option<(Value, bool)> {
        let resource = outrigger_api::builtin::by_kind("", "v1", kind).unwrap();
        next_state(resource, &options, &object)
    }

    #[test]
    fn no_grace_period_reaches_beyond_the_last_timestamp() {
        let now = Timestamp::now();
        assert_eq!(after(now, 30), now + SignedDuration::from_secs(30));
        assert_eq!(after(now, i64::MAX), Timestamp::MAX);
    }

    #[test]
    fn finalizers_follow_the_policy() {
        let with = |policy: &str| DeleteOptions { propagation: Some(policy.into()), ..Default::default() };
        let (object, gone) = state("ConfigMap", with("Foreground"), json!({"metadata": {"name": "a"}})).unwrap();
        assert!(!gone);
        assert_eq!(object["metadata"]["finalizers"], json!(["foregroundDeletion"]));
        assert_eq!(object["metadata"]["deletionGracePeriodSeconds"], 0);
        assert!(state("ConfigMap", with("Background"), json!({"metadata": {"name": "a"}})).unwrap().1);
        let kept = json!({"metadata": {"name": "a", "finalizers": ["x"], "deletionTimestamp": "2020-01-01T00:00:00Z"}});
        assert!(state("ConfigMap", with("Background"), kept).is_none());
    }

    #[test]
    fn pods_wait_for_their_node() {
        let none = DeleteOptions::default;
        let bound = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n", "terminationGracePeriodSeconds": 7}});
        let (object, gone) = state("Pod", none(), bound.clone()).unwrap();
        assert!(!gone);
        assert_eq!(object["metadata"]["deletionGracePeriodSeconds"], 7);
        assert!(state("Pod", none(), object.clone()).is_none());
        let now = DeleteOptions { grace_period: Some(0), ..Default::default() };
        assert!(state("Pod", now, object).unwrap().1);
        assert!(state("Pod", none(), json!({"metadata": {"name": "a"}, "spec": {}})).unwrap().1);
        let mut done = bound;
        done["status"] = json!({"phase": "Succeeded"});
        assert!(state("Pod", none(), done).unwrap().1);
    }
}
