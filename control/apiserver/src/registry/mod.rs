//! The generic registry: every stored kind is created, read, changed and deleted by the same code, driven by its resource's entry.

pub mod create;
pub mod definition;
pub mod delete;
pub mod list;
pub mod managed;
pub mod patch;
pub mod read;
pub mod review;
pub mod service;
pub mod subresource;
pub mod update;
pub mod versions;
pub mod watch;

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use outrigger_api::{Resource, Status, default, meta, schema, types};
use outrigger_store::{StoreError, WriteOutcome};
use serde_json::Value;

use crate::body::{ReadError, ReqBody, Request, read};
use crate::cache::Entry;
use crate::call::{Call, FieldValidation};
use crate::engine::Engine;
use crate::feed::ROOT;
use crate::negotiate::{self, MediaType, header_text};
use crate::reply::Reply;

/// Sends a request for a resource to the code for its verb.
pub async fn dispatch(engine: &Arc<Engine>, call: &Call, request: Request) -> Result<Reply, Status> {
    let info = &call.info;
    check_scope(call)?;
    if !info.subresource.is_empty() {
        let known = call.resource.subresource(&info.subresource).ok_or_else(Status::path_not_found)?;
        let streams = matches!(info.subresource.as_str(), "proxy" | "exec" | "attach" | "portforward");
        if !streams && !known.verbs.contains(&info.verb.as_str()) {
            return Err(Status::method_not_allowed());
        }
        return subresource::dispatch(engine, call, request).await;
    }
    if !call.resource.has_verb(&info.verb) {
        return Err(Status::method_not_allowed());
    }
    match info.verb.as_str() {
        "get" => read::get(engine, call).await,
        "list" => list::list(engine, call).await,
        "watch" => watch::watch(engine, call).await,
        "create" => {
            let object = body_object(engine, call, request).await?;
            if call.resource.strategy.create_only {
                return review::create(engine, call, object).await;
            }
            let created = create::create(engine, call, object).await?;
            read::reply(engine, call, 201, created)
        }
        "update" => {
            let object = body_object(engine, call, request).await?;
            let (updated, was_created) = update::replace(engine, call, object).await?;
            read::reply(engine, call, if was_created { 201 } else { 200 }, updated)
        }
        "patch" => {
            let (code, patched) = patch::handle(engine, call, request).await?;
            read::reply(engine, call, code, patched)
        }
        "delete" => delete::handle(engine, call, request).await,
        "deletecollection" => delete::collection(engine, call, request).await,
        _ => Err(Status::method_not_allowed()),
    }
}

/// A namespaced resource needs its namespace for all but list and watch; a cluster-scoped one has none.
fn check_scope(call: &Call) -> Result<(), Status> {
    let across = call.info.namespace.is_empty() && matches!(call.info.verb.as_str(), "list" | "watch") && call.info.parts.len() == 1;
    match (call.resource.namespaced, call.info.namespace.is_empty()) {
        (true, true) if across => Ok(()),
        (true, true) if call.info.parts.len() == 1 => Err(Status::method_not_allowed()),
        (true, true) => Err(Status::path_not_found()),
        (false, false) if call.info.resource != "namespaces" => Err(Status::path_not_found()),
        _ => Ok(()),
    }
}

pub fn store_failure(error: StoreError) -> Status {
    match error {
        StoreError::Compacted { requested, compacted } => Status::too_old_resource_version(requested, compacted),
        StoreError::FutureRevision { requested, current } => Status::too_large_resource_version(requested, current),
        other => Status::internal(other),
    }
}

pub async fn read_body(body: ReqBody) -> Result<Bytes, Status> {
    read(body).await.map_err(|error| match error {
        ReadError::TooLarge => Status::request_too_large(format!("limit is {}", crate::body::MAX_BODY)),
        ReadError::Broken(error) => Status::bad_request(format!("cannot read the request body: {error}")),
    })
}

/// The request's body as an object of the call's resource, fitted to its schema and defaulted.
pub async fn body_object(engine: &Engine, call: &Call, request: Request) -> Result<Value, Status> {
    let (parts, body) = request.into_parts();
    let bytes = read_body(body).await?;
    decode_object(engine, call, &call.resource, &parts.headers, &bytes)
}

/// Decodes a body that must be of `resource`'s kind.
pub fn decode_object(_engine: &Engine, call: &Call, resource: &Resource, headers: &HeaderMap, bytes: &Bytes) -> Result<Value, Status> {
    let (mut object, duplicates) = parse(call, headers, bytes)?;
    check_kind(&mut object, &resource.api_version(), &resource.kind)?;
    let unknown = fitted(resource, &mut object)?;
    report(call, findings(resource, bytes, duplicates, unknown))?;
    default::apply(resource, &mut object);
    Ok(object)
}

/// Decodes a body without looking at its kind; duplicate fields are reported as the request wants.
pub fn decode_value(call: &Call, headers: &HeaderMap, bytes: &Bytes) -> Result<Value, Status> {
    let (object, duplicates) = parse(call, headers, bytes)?;
    report(call, duplicates)?;
    Ok(object)
}

/// The body's object, and what was found twice in its text.
fn parse(call: &Call, headers: &HeaderMap, bytes: &Bytes) -> Result<(Value, Vec<String>), Status> {
    let strict = call.field_validation != FieldValidation::Ignore;
    let (object, duplicates) = match MediaType::parse(header_text(headers, &CONTENT_TYPE)).name {
        "" | negotiate::JSON if strict => types::parse_json(bytes)
            .map_err(|error| Status::bad_request(format!("couldn't get version/kind; json parse error: {error}")))?,
        negotiate::YAML if strict => negotiate::decode_yaml_strictly(bytes)?,
        _ => (negotiate::decode_body(headers, bytes)?, Vec::new()),
    };
    if !object.is_object() {
        return Err(Status::bad_request(
            "couldn't get version/kind; json parse error: json: cannot unmarshal a value that is not an object",
        ));
    }
    Ok((object, duplicates))
}

/// Both kinds of findings in upstream's order: that of the text for built-in kinds, duplicates first for custom ones.
fn findings(resource: &Resource, bytes: &Bytes, duplicates: Vec<String>, unknown: Vec<String>) -> Vec<String> {
    let unknown_texts = unknown.iter().map(|path| format!("unknown field \"{path}\""));
    if duplicates.is_empty() || unknown.is_empty() || resource.custom.is_some() {
        return duplicates.into_iter().chain(unknown_texts).collect();
    }
    let ordered = types::in_document_order(bytes, &unknown);
    if ordered.is_empty() { duplicates.into_iter().chain(unknown_texts).collect() } else { ordered }
}

/// A body may leave out its type; if it says one it must be the path's.
pub fn check_kind(object: &mut Value, api_version: &str, kind: &str) -> Result<(), Status> {
    let said = meta::api_version(object);
    if !said.is_empty() && said != api_version {
        return Err(Status::bad_request(format!(
            "the API version in the data ({said}) does not match the expected API version ({api_version})"
        )));
    }
    let said = meta::kind(object);
    if !said.is_empty() && said != kind {
        return Err(Status::bad_request(format!("the kind in the data ({said}) does not match the expected kind ({kind})")));
    }
    meta::set_type(object, api_version, kind);
    Ok(())
}

/// Fits an object to its kind's schema (unknown fields go, with a warning or an error) and fills in defaults.
pub fn fit(call: &Call, resource: &Resource, object: &mut Value) -> Result<(), Status> {
    let unknown = fitted(resource, object)?;
    report(call, unknown.into_iter().map(|path| format!("unknown field \"{path}\"")).collect())?;
    default::apply(resource, object);
    Ok(())
}

/// Fits an object to its kind's schema and returns the paths of the fields that it dropped.
pub fn fitted(resource: &Resource, object: &mut Value) -> Result<Vec<String>, Status> {
    let decoded = match &resource.custom {
        None => types::decode(resource, object).map(|decoded| decoded.unknown),
        Some(custom) => schema::decode(custom.schema.as_ref(), custom.preserve_unknown_fields, object),
    };
    decoded.map_err(|error| {
        let (kind, version) = (&resource.kind, &resource.version);
        Status::bad_request(format!("{kind} in version {version:?} cannot be handled as a {kind}: {error}"))
    })
}

fn report(call: &Call, findings: Vec<String>) -> Result<(), Status> {
    if findings.is_empty() {
        return Ok(());
    }
    match call.field_validation {
        FieldValidation::Ignore => Ok(()),
        FieldValidation::Warn => {
            findings.into_iter().for_each(|finding| call.warn(finding));
            Ok(())
        }
        FieldValidation::Strict => Err(Status::bad_request(format!("strict decoding error: {}", findings.join(", ")))),
    }
}

/// The stored object of that name, read consistently.
pub async fn current(engine: &Engine, call: &Call, name: &str) -> Result<Option<Arc<Entry>>, Status> {
    engine.fresh().await?;
    Ok(cached(engine, call, name))
}

/// The stored object as the caches have it now.
pub fn cached(engine: &Engine, call: &Call, name: &str) -> Option<Arc<Entry>> {
    let key = call.key(name);
    let (prefix, rest) = crate::cache::split_key(&key)?;
    engine.hub.cache(prefix).get(rest)
}

pub fn store_key(key: &str) -> String {
    format!("{ROOT}{key}")
}

/// One guarded write; the outcome's revision has reached the caches of no one yet.
pub async fn write(engine: &Engine, op: outrigger_store::Op) -> Result<WriteOutcome, Status> {
    engine.store.write(op).await.map_err(store_failure)
}
