//! OpenAPI documents, all derived from the table of kinds: when it changes the documents of changed groups are made anew, by whoever asks
//! first and off the request's thread; the others stay as they are, compressed.

mod document;
mod facts;
mod gnostic;
mod kinds;
mod paths;
mod swagger;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use http::HeaderMap;
use http::header::{ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, ETAG, HeaderValue, IF_NONE_MATCH, VARY};
use outrigger_api::{Catalog, Status};
use serde_json::{Value, json};

use crate::aggregator::AllFound;
use crate::body::Response;
use crate::cache::encode;
use crate::discovery::sha2_hex::digest;
use crate::engine::Engine;
use crate::negotiate::{header_text, media_types};
use crate::reply;
use crate::request::Query;

const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
/// The name that older clients know the protobuf form by.
const V2_PROTOBUF_OLD: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// One document: its hash is known at once, its bytes are made on demand and kept compressed.
struct Document {
    hash: String,
    gzip: OnceLock<Bytes>,
}

impl Document {
    fn new(hash: String) -> Arc<Self> {
        Arc::new(Self { hash, gzip: OnceLock::new() })
    }

    /// The bytes, made by `make` when they are first asked for; that may take long, so not on a request's thread.
    async fn bytes(self: &Arc<Self>, make: impl FnOnce() -> Vec<u8> + Send + 'static) -> Result<Bytes, Status> {
        if let Some(known) = self.gzip.get() {
            return Ok(known.clone());
        }
        let this = self.clone();
        let made = tokio::task::spawn_blocking(move || this.gzip.get_or_init(|| reply::gzip(&make())).clone());
        made.await.map_err(Status::internal)
    }
}

/// The documents of one state of the table of kinds.
struct Edition {
    catalog: Arc<Catalog>,
    /// What aggregated servers add.
    others: Arc<AllFound>,
    /// By path below /openapi/v3: `api/v1`, `apis/apps/v1`.
    v3: BTreeMap<String, Arc<Document>>,
    index: Bytes,
    v2: Arc<Document>,
    v2_protobuf: Arc<Document>,
}

#[derive(Default)]
pub struct OpenApi {
    edition: Mutex<Option<Arc<Edition>>>,
    /// The built-in kinds' part of the v2 document, which never changes.
    builtin_v2: Arc<OnceLock<swagger::Part>>,
}

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

impl OpenApi {
    /// The documents for the kinds served now.
    fn edition(&self, engine: &Engine) -> Arc<Edition> {
        let (catalog, others) = (engine.catalog(), engine.aggregator.found());
        let mut edition = self.edition.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = edition.as_ref().filter(|known| Arc::ptr_eq(&known.catalog, &catalog) && Arc::ptr_eq(&known.others, &others)) {
            return known.clone();
        }
        let next = Arc::new(Edition::new(catalog, others, edition.as_deref(), &engine.config.git_version));
        *edition = Some(next.clone());
        next
    }

    pub fn index(&self, engine: &Engine) -> Result<Response, Status> {
        Ok(reply::plain(200, "application/json", self.edition(engine).index.clone()))
    }

    pub async fn document(&self, engine: &Engine, headers: &HeaderMap, segments: &[&str], query: &Query) -> Result<Response, Status> {
        let git_version = engine.config.git_version.clone();
        let (group, version) = match segments {
            ["api", version] => (String::new(), version.to_string()),
            ["apis", group, version] => (group.to_string(), version.to_string()),
            ["version"] => return Ok(reply::json(200, &paths::version(&git_version))),
            _ => return Err(Status::path_not_found()),
        };
        let edition = self.edition(engine);
        let document = edition.v3.get(&path_of(&group, &version)).ok_or_else(Status::path_not_found)?;
        let catalog = edition.catalog.clone();
        let gzip = document.bytes(move || encode(&document::build(&catalog, &group, &version, &git_version)).into()).await?;
        let mut response = send(headers, &document.hash, "application/json", gzip)?;
        if query.get("hash").is_some_and(|hash| hash == document.hash) {
            response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
        }
        Ok(response)
    }

    pub async fn v2(&self, engine: &Engine, headers: &HeaderMap) -> Result<Response, Status> {
        let edition = self.edition(engine);
        let (catalog, others, builtin) = (edition.catalog.clone(), edition.others.clone(), self.builtin_v2.clone());
        let git_version = engine.config.git_version.clone();
        let make = move || swagger::build(&catalog, builtin.get_or_init(|| swagger::Part::builtin(&git_version)), &others, &git_version);
        let json = edition.v2.bytes(make).await?;
        if !wants_protobuf(header_text(headers, &ACCEPT)) {
            return send(headers, &edition.v2.hash, "application/json", json);
        }
        let make =
            move || gunzip(&json).ok().and_then(|text| serde_json::from_slice(&text).ok()).map(|v| gnostic::encode(&v)).unwrap_or_default();
        let protobuf = edition.v2_protobuf.bytes(make).await?;
        send(headers, &edition.v2_protobuf.hash, V2_PROTOBUF, protobuf)
    }
}

fn wants_protobuf(accept: &str) -> bool {
    let mut known = media_types(accept).into_iter().filter_map(|media| match media.name {
        V2_PROTOBUF | V2_PROTOBUF_OLD => Some(true),
        "application/json" | "application/*" | "*/*" => Some(false),
        _ => None,
    });
    known.next().unwrap_or_default()
}

impl Edition {
    /// Documents whose content is the same as in the edition before are taken over with their bytes.
    fn new(catalog: Arc<Catalog>, others: Arc<AllFound>, before: Option<&Edition>, git_version: &str) -> Self {
        let mut v3 = BTreeMap::new();
        for group in catalog.groups() {
            for version in catalog.versions(group) {
                let path = path_of(group, version);
                let hash = fingerprint(git_version, &catalog, group, version);
                let known = before.and_then(|before| before.v3.get(&path)).filter(|known| known.hash == hash);
                v3.insert(path, known.cloned().unwrap_or_else(|| Document::new(hash)));
            }
        }
        let own = v3.iter().map(|(path, document)| format!("{path} {}\n", document.hash));
        let foreign = others.iter().map(|(name, found)| format!("{name} {}\n", digest(format!("{found:?}").as_bytes())));
        let all: String = own.chain(foreign).collect();
        let paths: serde_json::Map<String, Value> =
            v3.iter().map(|(path, document)| (path.clone(), location(path, &document.hash))).collect();
        let mut index = json!({"paths": paths});
        for found in others.values() {
            let location = found.openapi_v3.as_deref().and_then(|url| Some((url, url.strip_prefix("/openapi/v3/")?.split('?').next()?)));
            if let Some((url, path)) = location.filter(|(_, path)| !v3.contains_key(*path)) {
                index["paths"][path] = json!({"serverRelativeURL": url});
            }
        }
        index["paths"]["version"] = location("version", &digest(git_version.as_bytes()));
        Self {
            index: encode(&index),
            v2: Document::new(digest(all.as_bytes())),
            v2_protobuf: Document::new(digest(format!("protobuf\n{all}").as_bytes())),
            catalog,
            others,
            v3,
        }
    }
}

fn location(path: &str, hash: &str) -> Value {
    json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}")})
}

/// Names a document's content without making it: the server's version, and for custom resources all that shows.
fn fingerprint(git_version: &str, catalog: &Catalog, group: &str, version: &str) -> String {
    let mut text = format!("{git_version} {group}/{version}");
    for resource in catalog.resources(group, version) {
        text.push_str(&format!(" {} {} {} {}", resource.plural, resource.kind, resource.list_kind, resource.namespaced));
        resource.subresources.iter().for_each(|sub| text.push_str(&sub.name));
        if let Some(schema) = resource.custom.as_ref().and_then(|custom| custom.schema.as_ref()) {
            text.push_str(&schema.to_string());
        }
    }
    digest(text.as_bytes())
}

fn send(headers: &HeaderMap, hash: &str, kind: &'static str, gzip: Bytes) -> Result<Response, Status> {
    let etag = format!("\"{hash}\"");
    let mut response = if header_text(headers, &IF_NONE_MATCH) == etag {
        reply::plain(304, kind, "")
    } else if header_text(headers, &ACCEPT_ENCODING).contains("gzip") {
        let mut response = reply::plain(200, kind, gzip);
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        response
    } else {
        reply::plain(200, kind, gunzip(&gzip).map_err(Status::internal)?)
    };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept-Encoding, Accept"));
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
