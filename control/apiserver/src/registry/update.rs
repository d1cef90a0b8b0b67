//! UPDATE: optimistic concurrency around a function that makes the new object from the current one.

use jiff::Timestamp;
use outrigger_api::{FieldError, Status, meta, prepare, scale, validate};
use outrigger_store::{Expect, Op, WriteOutcome};
use serde_json::Value;

use crate::admission::{Attributes, Operation};
use crate::call::Call;
use crate::engine::Engine;
use crate::registry::create::{create, settle_namespace, time_to_live};
use crate::registry::{cached, current, definition, managed, service, store_key, versions, write};

/// How often a write that lost a race is tried again from the newer object.
const TRIES: usize = 20;

/// PUT of a whole object. True when it was created by that.
pub async fn replace(engine: &Engine, call: &Call, mut object: Value) -> Result<(Value, bool), Status> {
    let name = call.info.name.as_str();
    settle_name(&mut object, name)?;
    settle_namespace(call, &mut object)?;
    let uid = meta::uid(&object).to_string();
    if current(engine, call, name).await?.is_none() {
        if !uid.is_empty() {
            return Err(call.conflict(name, &format!("Precondition failed: UID in precondition: {uid}, UID in object meta: ")));
        }
        if !call.resource.strategy.create_on_update {
            return Err(call.not_found(name));
        }
        permit_create(engine, call)?;
        meta::remove(&mut object, "metadata.resourceVersion");
        return Ok((create(engine, call, object).await?, true));
    }
    let updated = change(engine, call, name, Operation::Update, |_| Ok(object.clone())).await?;
    Ok((updated, false))
}

/// Writes that create what isn't there need the permission to create as well.
pub fn permit_create(engine: &Engine, call: &Call) -> Result<(), Status> {
    engine.permit(&outrigger_access::Attributes {
        namespace: call.namespace(),
        name: &call.info.name,
        api_version: &call.info.version,
        ..outrigger_access::Attributes::resource(&call.user, "create", &call.info.group, &call.info.resource)
    })
}

pub fn settle_name(object: &mut Value, name: &str) -> Result<(), Status> {
    let said = meta::name(object).to_string();
    if said.is_empty() {
        meta::set_name(object, name);
    } else if said != name {
        return Err(Status::bad_request(format!("the name of the object ({said}) does not match the name on the URL ({name})")));
    }
    Ok(())
}

/// Changes a stored object: `make` gives the new object from the current one (both in the call's version); lost races are run again.
/// What changes becomes the caller's.
pub async fn change<F>(engine: &Engine, call: &Call, name: &str, operation: Operation, mut make: F) -> Result<Value, Status>
where
    F: FnMut(&Value) -> Result<Value, Status>,
{
    let tracked = |old: &Value| {
        let mut new = make(old)?;
        managed::track(engine, call, Some(old), &mut new);
        Ok(new)
    };
    change_as_made(engine, call, name, operation, tracked).await
}

/// The same for changes whose managed fields are as they should be.
pub async fn change_as_made<F>(engine: &Engine, call: &Call, name: &str, operation: Operation, mut make: F) -> Result<Value, Status>
where
    F: FnMut(&Value) -> Result<Value, Status>,
{
    engine.fresh().await?;
    for _ in 0..TRIES {
        let entry = cached(engine, call, name).ok_or_else(|| call.not_found(name))?;
        let old = versions::object(engine, &call.resource, &entry).await?;
        let new = make(&old)?;
        check_preconditions(call, name, &new, &old)?;
        match step(engine, call, name, operation, new, old, entry.revision).await? {
            Step::Done(object) => return Ok(object),
            Step::Raced(revision) => engine.reach(revision).await?,
        }
    }
    Err(Status::modified(&call.resource.group, &call.resource.plural, name))
}

/// A change as part of another request that was admitted: no admission, no validation. Errors of `make` end it.
pub async fn change_unchecked<F>(engine: &Engine, call: &Call, name: &str, mut make: F) -> Result<(), Status>
where
    F: FnMut(&Value) -> Result<Value, Status>,
{
    for _ in 0..TRIES {
        let entry = cached(engine, call, name).ok_or_else(|| call.not_found(name))?;
        let new = make(&entry.object())?;
        if call.dry_run {
            return Ok(());
        }
        let op = Op::update(store_key(&call.key(name)), versions::builtin_bytes(&call.resource, &new), entry.revision);
        match write(engine, op).await? {
            WriteOutcome::Done { revision, .. } => return engine.reach(revision).await,
            WriteOutcome::Conflict { revision, .. } => engine.reach(revision).await?,
        }
    }
    Err(Status::modified(&call.resource.group, &call.resource.plural, name))
}

enum Step {
    Done(Value),
    /// Someone else wrote first; the caches must reach this revision before the next try.
    Raced(u64),
}

fn check_preconditions(call: &Call, name: &str, new: &Value, old: &Value) -> Result<(), Status> {
    let (said, has) = (meta::uid(new), meta::uid(old));
    if !said.is_empty() && said != has {
        return Err(call.conflict(name, &format!("Precondition failed: UID in precondition: {said}, UID in object meta: {has}")));
    }
    match meta::resource_version(new) {
        "" | "0" if call.resource.strategy.unconditional_update || call.info.verb != "update" => Ok(()),
        "" | "0" => {
            let error = FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update");
            Err(call.invalid(name, &[error]))
        }
        said if said == meta::resource_version(old) => Ok(()),
        _ => Err(Status::modified(&call.resource.group, &call.resource.plural, name)),
    }
}

async fn step(
    engine: &Engine,
    call: &Call,
    name: &str,
    operation: Operation,
    mut new: Value,
    old: Value,
    revision: u64,
) -> Result<Step, Status> {
    let resource = &call.resource;
    let subresource = call.info.subresource.as_str();
    // A scale or a binding is a change of the object's own spec.
    let sub = (!matches!(subresource, "" | "scale")).then_some(subresource);
    // Admission sees a Scale as what it is.
    let scale = |object: &Value| (subresource == "scale").then(|| scale::read(resource, object)).flatten();
    let (scale_before, mut scale_after) = (scale(&old), scale(&new));
    let attributes = Attributes { old: Some(scale_before.as_ref().unwrap_or(&old)), ..Attributes::new(call, operation, name) };
    engine.admission.mutate(engine, &attributes, Some(scale_after.as_mut().unwrap_or(&mut new))).await?;
    if let Some(scale) = &scale_after {
        scale::write(resource, &mut new, scale)?;
    }
    service::carry_over(resource, &mut new, &old);
    outrigger_api::default::apply(resource, &mut new);
    prepare::update(resource, sub, &mut new, &old, Timestamp::now());
    definition::settle(engine, call, &mut new);
    let errors = validate::update(resource, sub, &new, &old);
    if !errors.is_empty() {
        return Err(call.invalid(name, &errors));
    }
    let allocated = service::on_update(engine, call, &mut new, &old)?;
    engine.admission.validate(engine, &attributes, Some(scale(&new).as_ref().unwrap_or(&new))).await?;
    meta::set_resource_version(&mut new, meta::resource_version(&old));
    outrigger_api::apply::keep_times(&mut new, &old);
    if call.dry_run {
        return Ok(Step::Done(new));
    }
    if new == old {
        allocated.keep();
        return Ok(Step::Done(old));
    }
    let key = store_key(&call.key(name));
    let goes = goes_away(resource.kind.as_ref(), &new, &old);
    let op = if goes {
        Op::delete(key, Expect::ModRevision(revision))
    } else {
        Op::update(key, versions::stored_bytes(engine, resource, &new).await?, revision).expiring(time_to_live(resource))
    };
    match write(engine, op).await? {
        WriteOutcome::Done { revision, .. } => {
            allocated.keep();
            if goes {
                service::on_delete(engine, resource, &new);
            }
            meta::set_resource_version(&mut new, &revision.to_string());
            Ok(Step::Done(new))
        }
        WriteOutcome::Conflict { revision, .. } => Ok(Step::Raced(revision)),
    }
}

/// Whether this update takes away the last thing that kept a deleted object: its finalizers.
pub fn goes_away(kind: &str, new: &Value, old: &Value) -> bool {
    if !meta::is_deleting(old) || meta::finalizers(new).next().is_some() {
        return false;
    }
    if kind == "Namespace" && !meta::items(new, "spec.finalizers").is_empty() {
        return false;
    }
    meta::get(old, "metadata.deletionGracePeriodSeconds").as_i64().unwrap_or_default() == 0
}
