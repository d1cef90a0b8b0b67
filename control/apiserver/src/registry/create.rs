//! CREATE: names, system fields, admission, validation, hooks, and the guarded write.

use std::time::Duration;

use jiff::Timestamp;
use outrigger_api::{FieldError, Resource, Status, meta, prepare, validate};
use outrigger_store::{Op, WriteOutcome};
use rand::Rng;
use serde_json::Value;

use crate::admission::{Attributes, Operation};
use crate::call::Call;
use crate::engine::Engine;
use crate::registry::{definition, managed, service, store_key, versions, write};

/// How often a generated name is drawn anew when it is taken.
const NAME_TRIES: usize = 8;
/// Events live for an hour, as upstream's default.
const EVENT_TTL: Duration = Duration::from_secs(3600);

/// Stores a new object (decoded, fitted and defaulted) and returns it as stored. All of it is its creator's.
pub async fn create(engine: &Engine, call: &Call, mut object: Value) -> Result<Value, Status> {
    managed::track(engine, call, None, &mut object);
    insert(engine, call, object).await
}

/// The same for an object whose managed fields are as they should be.
pub async fn insert(engine: &Engine, call: &Call, mut object: Value) -> Result<Value, Status> {
    settle_namespace(call, &mut object)?;
    check_new(call, &object)?;
    let generates = meta::name(&object).is_empty() && !meta::generate_name(&object).is_empty();
    let mut tries = 0;
    loop {
        tries += 1;
        let outcome = attempt(engine, call, object.clone()).await;
        match outcome {
            Err(status) if generates && status.reason == "AlreadyExists" && tries < NAME_TRIES => {}
            Err(status) if generates && status.reason == "AlreadyExists" => {
                let name = status.details.as_ref().map(|d| meta::text(d, "name").to_string()).unwrap_or_default();
                return Err(Status::generate_name_conflict(&call.resource.group, &call.resource.plural, &name));
            }
            outcome => return outcome,
        }
    }
}

async fn attempt(engine: &Engine, call: &Call, mut object: Value) -> Result<Value, Status> {
    let resource = &call.resource;
    let now = Timestamp::now();
    meta::stamp_new(&mut object, &uuid::Uuid::new_v4().to_string(), now, &name_suffix());
    let name = meta::name(&object).to_string();
    engine.fresh().await?;
    definition::check_create(engine, call)?;
    let attributes = Attributes::new(call, Operation::Create, &name);
    engine.admission.mutate(engine, &attributes, Some(&mut object)).await?;
    outrigger_api::default::apply(resource, &mut object);
    prepare::create(resource, &mut object, now);
    definition::settle(engine, call, &mut object);
    let errors = validate::create(resource, &object);
    if !errors.is_empty() {
        return Err(call.invalid(&name, &errors));
    }
    let allocated = service::on_create(engine, call, &mut object)?;
    engine.admission.validate(engine, &attributes, Some(&object)).await?;
    if call.dry_run {
        return Ok(object);
    }
    let revision = store(engine, call, &name, &object).await?;
    allocated.keep();
    meta::set_resource_version(&mut object, &revision.to_string());
    Ok(object)
}

async fn store(engine: &Engine, call: &Call, name: &str, object: &Value) -> Result<u64, Status> {
    let bytes = versions::stored_bytes(engine, &call.resource, object).await?;
    let op = Op::create(store_key(&call.key(name)), bytes).expiring(time_to_live(&call.resource));
    match write(engine, op).await? {
        WriteOutcome::Done { revision, .. } => Ok(revision),
        WriteOutcome::Conflict { .. } => Err(already_exists(engine, call, name)),
    }
}

fn already_exists(engine: &Engine, call: &Call, name: &str) -> Status {
    let deleting = crate::registry::cached(engine, call, name).is_some_and(|entry| meta::is_deleting(&entry.object()));
    let mut status = Status::already_exists(&call.resource.group, &call.resource.plural, name);
    if deleting {
        status.message = format!("object is being deleted: {}", status.message);
    }
    status
}

pub fn time_to_live(resource: &Resource) -> Option<Duration> {
    (resource.kind == "Event" && resource.custom.is_none()).then_some(EVENT_TTL)
}

/// The object takes the request's namespace, and may not name another.
pub fn settle_namespace(call: &Call, object: &mut Value) -> Result<(), Status> {
    let said = meta::namespace(object).to_string();
    if !call.resource.namespaced {
        if !said.is_empty() {
            meta::remove(object, "metadata.namespace");
        }
        return Ok(());
    }
    if said.is_empty() {
        meta::set_namespace(object, call.namespace());
    } else if said != call.namespace() {
        return Err(Status::bad_request(format!(
            "the namespace of the provided object does not match the namespace sent on the request ({said} vs {})",
            call.namespace()
        )));
    }
    Ok(())
}

fn check_new(call: &Call, object: &Value) -> Result<(), Status> {
    if !matches!(meta::resource_version(object), "" | "0") {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    if meta::name(object).is_empty() && meta::generate_name(object).is_empty() {
        let error = FieldError::required("metadata.name", "name or generateName is required");
        return Err(call.invalid("", &[error]));
    }
    Ok(())
}

/// Five characters without vowels and look-alikes, as upstream's generated names end in.
pub fn name_suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut rng = rand::rng();
    (0..5).map(|_| ALPHABET[rng.random_range(0..ALPHABET.len())] as char).collect()
}
