//! From results to HTTP responses: objects, raw JSON and errors of upstream's shape.

use std::io::Write;

use bytes::Bytes;
use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, RETRY_AFTER, VARY};
use outrigger_api::Status;
use serde_json::Value;

use crate::body::{RespBody, Response, full};
use crate::cache::encode;
use crate::negotiate::{Accept, Encoding};

/// Responses larger than this are compressed when the client accepts it, as upstream does.
const GZIP_FROM: usize = 128 * 1024;

/// What a handler answers.
pub enum Reply {
    Object(u16, Value),
    /// An already encoded JSON object.
    Json(u16, Bytes),
    /// A response made whole by the handler: streams, upgrades.
    Whole(Response),
}

impl Reply {
    pub fn into_response(self, accept: Accept) -> Response {
        match self {
            Self::Object(code, value) => encoded(code, encode(&value), accept),
            Self::Json(code, bytes) => encoded(code, bytes, accept),
            Self::Whole(response) => response,
        }
    }
}

fn encoded(code: u16, json: Bytes, accept: Accept) -> Response {
    let (bytes, kind) = match accept.encoding {
        Encoding::Json => (json, "application/json"),
        Encoding::Yaml => (to_yaml(&json), "application/yaml"),
        Encoding::Protobuf => match to_protobuf(&json) {
            Ok(bytes) => (bytes, "application/vnd.kubernetes.protobuf"),
            Err(_) => return failure(&Status::not_acceptable(&[crate::negotiate::JSON, crate::negotiate::YAML])),
        },
    };
    if accept.gzip && bytes.len() >= GZIP_FROM {
        let mut response = plain(code, kind, gzip(&bytes));
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        response.headers_mut().insert(VARY, HeaderValue::from_static("Accept-Encoding"));
        return response;
    }
    plain(code, kind, bytes)
}

fn to_yaml(json: &Bytes) -> Bytes {
    let value: Value = serde_json::from_slice(json).unwrap_or(Value::Null);
    serde_yaml_ng::to_string(&value).map(Bytes::from).unwrap_or_else(|_| json.clone())
}

fn to_protobuf(json: &Bytes) -> Result<Bytes, crate::protobuf::ProtobufError> {
    let value: Value = serde_json::from_slice(json).unwrap_or(Value::Null);
    crate::protobuf::encode(&value).map(Bytes::from)
}

pub fn gzip(bytes: &[u8]) -> Bytes {
    let mut encoder = flate2::write::GzEncoder::new(Vec::with_capacity(bytes.len() / 8), flate2::Compression::fast());
    // Writing into memory does not fail.
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default().into()
}

/// A response of one content type.
pub fn plain(code: u16, kind: &'static str, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(full(body));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

pub fn text(code: u16, body: impl Into<Bytes>) -> Response {
    plain(code, "text/plain; charset=utf-8", body)
}

pub fn json(code: u16, value: &Value) -> Response {
    plain(code, "application/json", encode(value))
}

/// An error as its Status object.
pub fn failure(status: &Status) -> Response {
    let mut response = json(status.code, &status.to_value());
    if let Some(seconds) = status.retry_after() {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A streamed JSON body, for watches.
pub fn stream(kind: &'static str, body: RespBody) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}
