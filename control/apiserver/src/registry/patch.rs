//! PATCH: JSON, merge, strategic merge, and apply as a merge that may create.

use http::HeaderMap;
use http::header::CONTENT_TYPE;
use outrigger_api::{FieldError, Status, meta, patch};
use serde_json::Value;

use crate::admission::Operation;
use crate::body::Request;
use crate::call::Call;
use crate::engine::Engine;
use crate::negotiate::{MediaType, decode_json, decode_yaml, header_text};
use crate::registry::create::create;
use crate::registry::{check_kind, current, fit, read_body, update};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchType {
    Json,
    Merge,
    Strategic,
    Apply,
}

const TYPES: &[(&str, PatchType)] = &[
    ("application/json-patch+json", PatchType::Json),
    ("application/merge-patch+json", PatchType::Merge),
    ("application/apply-patch+yaml", PatchType::Apply),
    ("application/strategic-merge-patch+json", PatchType::Strategic),
];

pub struct Patch {
    pub kind: PatchType,
    pub body: Value,
}

impl Patch {
    pub fn decode(headers: &HeaderMap, bytes: &[u8], custom: bool) -> Result<Self, Status> {
        let media = MediaType::parse(header_text(headers, &CONTENT_TYPE)).name.to_string();
        let accepted: Vec<&str> =
            TYPES.iter().filter(|(_, kind)| !(custom && *kind == PatchType::Strategic)).map(|(name, _)| *name).collect();
        let kind = TYPES.iter().find(|(name, _)| *name == media).map(|(_, kind)| *kind);
        let kind = kind
            .filter(|kind| !(custom && *kind == PatchType::Strategic))
            .ok_or_else(|| Status::unsupported_media_type(&media, &accepted))?;
        let body = if kind == PatchType::Apply { decode_yaml(bytes)? } else { decode_json(bytes)? };
        if kind != PatchType::Json && !body.is_object() {
            return Err(Status::bad_request("error decoding patch: the patch is not an object"));
        }
        Ok(Self { kind, body })
    }

    /// The patched object.
    pub fn apply(&self, call: &Call, current: &Value) -> Result<Value, Status> {
        let mut object = current.clone();
        match self.kind {
            PatchType::Json => patch::json(&mut object, &self.body)?,
            PatchType::Merge => patch::merge(&mut object, &self.body),
            PatchType::Apply if call.resource.custom.is_some() => patch::merge(&mut object, &self.body),
            PatchType::Strategic | PatchType::Apply => patch::strategic(&call.resource, &mut object, &self.body)?,
        }
        Ok(object)
    }
}

pub async fn handle(engine: &Engine, call: &Call, request: Request) -> Result<(u16, Value), Status> {
    let (parts, body) = request.into_parts();
    let bytes = read_body(body).await?;
    let patch = Patch::decode(&parts.headers, &bytes, call.resource.custom.is_some())?;
    check_options(call, patch.kind)?;
    let name = call.info.name.as_str();
    if patch.kind == PatchType::Apply && current(engine, call, name).await?.is_none() {
        let mut object = patch.body;
        if meta::name(&object).is_empty() {
            meta::set_name(&mut object, name);
        }
        check_kind(&mut object, &call.resource.api_version(), &call.resource.kind)?;
        fit(call, &call.resource, &mut object)?;
        return Ok((201, create(engine, call, object).await?));
    }
    let patched = update::change(engine, call, name, Operation::Update, |current| patched(call, &patch, current)).await?;
    Ok((200, patched))
}

/// The current object with the patch on it, fitted as a request's body would be.
pub fn patched(call: &Call, patch: &Patch, current: &Value) -> Result<Value, Status> {
    let mut object = patch.apply(call, current)?;
    let resource = &call.resource;
    check_kind(&mut object, &resource.api_version(), &resource.kind)?;
    if meta::name(&object) != meta::name(current) {
        return Err(Status::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({})",
            meta::name(&object),
            meta::name(current)
        )));
    }
    fit(call, resource, &mut object)?;
    Ok(object)
}

fn check_options(call: &Call, kind: PatchType) -> Result<(), Status> {
    let invalid = |error: FieldError| Err(Status::invalid("meta.k8s.io", "PatchOptions", "", &[error]));
    match kind {
        PatchType::Apply if call.query.text("fieldManager").is_empty() => {
            invalid(FieldError::required("fieldManager", "is required for apply patch"))
        }
        PatchType::Apply => Ok(()),
        _ if call.query.get("force").is_some() => invalid(FieldError::forbidden("force", "may not be specified for non-apply patch")),
        _ => Ok(()),
    }
}
