//! OpenAPI documents, one per group and version: made when first asked for, from the kinds' Rust types or a definition's schema, and kept
//! compressed.

mod document;
mod kinds;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, ETAG, HeaderValue, IF_NONE_MATCH};
use outrigger_api::{Catalog, Status};
use serde_json::{Value, json};

use crate::body::{Request, Response};
use crate::cache::encode;
use crate::discovery::sha2_hex::digest;
use crate::engine::Engine;
use crate::negotiate::header_text;
use crate::reply;
use crate::request::Query;

/// One encoded document.
#[derive(Clone)]
struct Encoded {
    gzip: Bytes,
    hash: String,
}

/// Documents made so far, by their path below /openapi/v3; forgotten when the catalog changes.
#[derive(Default)]
pub struct OpenApi {
    made: Mutex<HashMap<String, Encoded>>,
}

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

impl OpenApi {
    /// A group's definitions have changed.
    pub fn forget(&self, group: &str) {
        let prefix = format!("apis/{group}/");
        let mut made = self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        made.retain(|path, _| !path.starts_with(&prefix) && path != "v2");
    }

    pub fn index(&self, engine: &Engine) -> Result<Response, Status> {
        let catalog = engine.catalog();
        let mut paths = serde_json::Map::new();
        for group in catalog.groups() {
            for version in catalog.versions(group) {
                let path = path_of(group, version);
                let hash = fingerprint(engine, &catalog, group, version);
                paths.insert(path.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}")}));
            }
        }
        let hash = digest(engine.config.git_version.as_bytes());
        paths.insert("version".into(), json!({"serverRelativeURL": format!("/openapi/v3/version?hash={hash}")}));
        Ok(reply::json(200, &json!({"paths": paths})))
    }

    pub fn document(&self, engine: &Engine, request: &Request, segments: &[&str], query: &Query) -> Result<Response, Status> {
        let catalog = engine.catalog();
        let (group, version) = match segments {
            ["api", version] => ("", *version),
            ["apis", group, version] => (*group, *version),
            ["version"] => return Ok(reply::json(200, &document::version(&engine.config.git_version))),
            _ => return Err(Status::path_not_found()),
        };
        if !catalog.versions(group).contains(&version) {
            return Err(Status::path_not_found());
        }
        let fingerprint = fingerprint(engine, &catalog, group, version);
        let make = || document::build(&catalog, group, version, &engine.config.git_version);
        let encoded = self.encoded(&path_of(group, version), fingerprint.clone(), make);
        let mut response = send(request, &encoded)?;
        if query.get("hash").is_some_and(|hash| hash == fingerprint) {
            response.headers_mut().insert(http::header::CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
        }
        Ok(response)
    }

    pub fn v2(&self, engine: &Engine, request: &Request) -> Result<Response, Status> {
        let catalog = engine.catalog();
        let hash = digest(format!("v2{}", engine.config.git_version).as_bytes());
        let encoded = self.encoded("v2", hash, || document::swagger(&catalog, &engine.config.git_version));
        send(request, &encoded)
    }

    fn encoded(&self, path: &str, hash: String, make: impl FnOnce() -> Value) -> Encoded {
        let mut made = self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = made.get(path).filter(|known| known.hash == hash) {
            return known.clone();
        }
        let encoded = Encoded { gzip: reply::gzip(&encode(&make())), hash };
        made.insert(path.to_string(), encoded.clone());
        encoded
    }
}

/// Names a document's content without making it: the server's version, and for custom resources their schemas.
fn fingerprint(engine: &Engine, catalog: &Arc<Catalog>, group: &str, version: &str) -> String {
    let mut text = format!("{} {group}/{version}", engine.config.git_version);
    for resource in catalog.resources(group, version) {
        text.push_str(&resource.plural);
        if let Some(schema) = resource.custom.as_ref().and_then(|custom| custom.schema.as_ref()) {
            text.push_str(&schema.to_string());
        }
    }
    digest(text.as_bytes())
}

fn send(request: &Request, encoded: &Encoded) -> Result<Response, Status> {
    let etag = format!("\"{}\"", encoded.hash);
    let mut response = if header_text(request.headers(), &IF_NONE_MATCH) == etag {
        reply::plain(304, "application/json", "")
    } else if header_text(request.headers(), &ACCEPT_ENCODING).contains("gzip") {
        let mut response = reply::plain(200, "application/json", encoded.gzip.clone());
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        response
    } else {
        reply::plain(200, "application/json", gunzip(&encoded.gzip).map_err(Status::internal)?)
    };
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(ETAG, etag);
    }
    Ok(response)
}

fn gunzip(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut out = Vec::new();
    flate2::read::GzDecoder::new(bytes).read_to_end(&mut out)?;
    Ok(out)
}
