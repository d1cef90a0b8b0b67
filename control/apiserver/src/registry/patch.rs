//! PATCH: JSON, merge, strategic merge and apply.

use http::HeaderMap;
use http::header::CONTENT_TYPE;
use outrigger_api::{FieldError, Status, meta, patch};
use serde_json::Value;

use crate::admission::Operation;
use crate::body::Request;
use crate::call::Call;
use crate::engine::Engine;
use crate::negotiate::{MediaType, decode_json, decode_yaml_strictly, header_text};
use crate::registry::{check_kind, fit, managed, read_body, update};

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
    /// Reads a patch of one of the types that the target takes; strategic ones need a built-in kind.
    pub fn decode(call: &Call, headers: &HeaderMap, bytes: &[u8], strategic: bool) -> Result<Self, Status> {
        let media = MediaType::parse(header_text(headers, &CONTENT_TYPE)).name.to_string();
        let accepted = TYPES.iter().filter(|(_, kind)| strategic || *kind != PatchType::Strategic);
        let names: Vec<&str> = accepted.clone().map(|(name, _)| *name).collect();
        let found = accepted.clone().find(|(name, _)| *name == media);
        let kind = found.map(|(_, kind)| *kind).ok_or_else(|| Status::unsupported_media_type(&media, &names))?;
        check_options(call, kind)?;
        let body = if kind == PatchType::Apply {
            let (body, duplicates) = decode_yaml_strictly(bytes)?;
            managed::report_duplicates(call, &duplicates)?;
            body
        } else {
            decode_json(bytes)?
        };
        if kind != PatchType::Json && !body.is_object() {
            return Err(Status::bad_request("error decoding patch: the patch is not an object"));
        }
        Ok(Self { kind, body })
    }

    /// The current object with the patch on it, fitted as a request's body would be.
    fn patched(&self, call: &Call, current: &Value) -> Result<Value, Status> {
        let resource = &call.resource;
        let mut object = current.clone();
        match self.kind {
            PatchType::Json => patch::json(&mut object, &self.body)?,
            PatchType::Merge | PatchType::Apply => patch::merge(&mut object, &self.body),
            PatchType::Strategic => patch::strategic(resource, &mut object, &self.body)?,
        }
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
}

/// Patches the object, or the part of it that the subresource is.
pub async fn handle(engine: &Engine, call: &Call, request: Request) -> Result<(u16, Value), Status> {
    let (parts, body) = request.into_parts();
    let bytes = read_body(body).await?;
    let patch = Patch::decode(call, &parts.headers, &bytes, call.resource.custom.is_none())?;
    if patch.kind == PatchType::Apply {
        return managed::apply(engine, call, patch.body).await;
    }
    let patched = update::change(engine, call, &call.info.name, Operation::Update, |current| patch.patched(call, current)).await?;
    Ok((200, patched))
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
