//! GET of one object, and the forms that single objects are answered in.

use jiff::Timestamp;
use outrigger_api::table::{self, IncludeObject};
use outrigger_api::{Resource, Status, meta};
use serde_json::{Value, json};

use crate::call::Call;
use crate::engine::Engine;
use crate::negotiate::Form;
use crate::registry::{cached, versions};
use crate::reply::Reply;

pub async fn get(engine: &Engine, call: &Call) -> Result<Reply, Status> {
    let name = &call.info.name;
    match call.query.text("resourceVersion") {
        "" => {
            engine.fresh().await?;
        }
        "0" => {}
        text => engine.reach(parse_revision(text)?).await?,
    }
    let entry = cached(engine, call, name).ok_or_else(|| call.not_found(name))?;
    if call.accept.form == Form::Plain && versions::is_stored_so(&call.resource, &entry) {
        return Ok(Reply::Json(200, entry.body.clone()));
    }
    reply(engine, call, 200, versions::object(engine, &call.resource, &entry).await?)
}

/// One object in the form the client accepts.
pub fn reply(_engine: &Engine, call: &Call, code: u16, object: Value) -> Result<Reply, Status> {
    Ok(match call.accept.form {
        Form::Plain => Reply::Object(code, object),
        Form::Metadata => Reply::Object(code, partial(&object)),
        Form::Table => {
            let metadata = json!({"resourceVersion": meta::resource_version(&object)});
            Reply::Object(code, table::render(&call.resource, metadata, [&object], include_object(call)?, Timestamp::now()))
        }
    })
}

/// `includeObject` of Table requests.
pub fn include_object(call: &Call) -> Result<IncludeObject, Status> {
    Ok(match call.query.text("includeObject") {
        "" | "Metadata" => IncludeObject::Metadata,
        "None" => IncludeObject::None,
        "Object" => IncludeObject::Object,
        other => return Err(Status::bad_request(format!("unrecognized includeObject value: {other:?}"))),
    })
}

pub fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta::get(object, "metadata").clone()})
}

pub fn parse_revision(text: &str) -> Result<u64, Status> {
    text.parse().map_err(|_| Status::bad_request(format!("Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax")))
}

/// The kind's own name for messages that end in a name.
pub fn describe(resource: &Resource, name: &str) -> String {
    format!("{} {name:?}", resource.qualified())
}
