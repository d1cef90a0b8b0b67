//! Managed fields and server-side apply: the tracker of `outrigger_api::apply` at work on stored objects.

use jiff::Timestamp;
use outrigger_api::apply::Tracker;
use outrigger_api::{Catalog, Status, meta};
use serde_json::Value;

use crate::admission::Operation;
use crate::call::{Call, FieldValidation};
use crate::engine::Engine;
use crate::registry::create::{insert, settle_namespace};
use crate::registry::update::{change_as_made, permit_create, settle_name};
use crate::registry::{current, fit};

fn tracker<'a>(catalog: &'a Catalog, call: &'a Call) -> Tracker<'a> {
    let (subresource, manager) = (call.info.subresource.as_str(), call.manager.as_str());
    Tracker { catalog, resource: &call.resource, subresource, manager, now: Timestamp::now() }
}

/// Makes what a write changes its caller's.
pub fn track(engine: &Engine, call: &Call, live: Option<&Value>, new: &mut Value) {
    if !call.resource.strategy.create_only {
        tracker(&engine.catalog(), call).update(live, new);
    }
}

/// What a text that says a field twice means for the request.
pub fn report_duplicates(call: &Call, findings: &[String]) -> Result<(), Status> {
    let Some(finding) = findings.first() else { return Ok(()) };
    let text = format!("error converting YAML to JSON: {finding}");
    match call.field_validation {
        FieldValidation::Ignore => {}
        FieldValidation::Warn => call.warn(text.replace('\n', " ")),
        FieldValidation::Strict => return Err(Status::bad_request(format!("error strict decoding YAML: {text}"))),
    }
    Ok(())
}

/// Applies a configuration; the object is created where it may be and isn't there. The code is 201 then.
pub async fn apply(engine: &Engine, call: &Call, mut config: Value) -> Result<(u16, Value), Status> {
    let name = call.info.name.as_str();
    settle_name(&mut config, name)?;
    settle_namespace(call, &mut config)?;
    let said = meta::kind(&config);
    if said != call.resource.kind {
        return Err(Status::bad_request(format!(
            "the kind in the data ({said}) does not match the expected kind ({})",
            call.resource.kind
        )));
    }
    let force = call.query.flag("force");
    let catalog = engine.catalog();
    let make = |live: Option<&Value>| {
        let mut object = tracker(&catalog, call).apply(live, &config, force)?;
        fit(call, &call.resource, &mut object)?;
        Ok(object)
    };
    if current(engine, call, name).await?.is_none() && call.info.subresource.is_empty() {
        let uid = meta::uid(&config);
        if !uid.is_empty() {
            let why = format!("uid mismatch: the provided object specified uid {uid}, and no existing object was found");
            return Err(call.conflict(name, &why));
        }
        permit_create(engine, call)?;
        match insert(engine, call, make(None)?).await {
            // Somebody else was faster: it is an update then.
            Err(status) if status.reason == "AlreadyExists" => {}
            created => return Ok((201, created?)),
        }
    }
    Ok((200, change_as_made(engine, call, name, Operation::Update, |live| make(Some(live))).await?))
}
