//! LIST: from the cache at a consistent revision, in pages, or from the store's history at an exact one.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{BufMut, Bytes, BytesMut};
use jiff::Timestamp;
use outrigger_api::selector::{FieldSelector, LabelSelector};
use outrigger_api::{FieldError, Resource, Status, table};
use outrigger_store::{RangeRequest, StoreError};
use serde_json::{Value, json};

use crate::cache::{Entry, split_key};
use crate::call::Call;
use crate::engine::Engine;
use crate::feed::ROOT;
use crate::negotiate::Form;
use crate::registry::read::{include_object, parse_revision, partial};
use crate::registry::{store_failure, versions};
use crate::reply::Reply;

/// Label and field selector of a list or watch.
#[derive(Clone, Default)]
pub struct Selectors {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
}

impl Selectors {
    pub fn of(call: &Call) -> Result<Self, Status> {
        let labels = LabelSelector::parse(call.query.text("labelSelector"))
            .map_err(|error| Status::bad_request(format!("unable to parse requirement: {error}")))?;
        let fields = FieldSelector::parse(&call.resource, call.query.text("fieldSelector")).map_err(Status::bad_request)?;
        Ok(Self { labels, fields })
    }

    pub fn everything(&self) -> bool {
        self.labels.matches_everything() && self.fields.matches_everything()
    }

    /// Whether each of the entries matches.
    pub async fn matching(&self, engine: &Engine, resource: &Resource, entries: &[Arc<Entry>]) -> Result<Vec<bool>, Status> {
        if !self.reads_bodies(resource) {
            return Ok(entries.iter().map(|entry| self.matches_index(entry)).collect());
        }
        let objects = versions::objects(engine, resource, entries.iter().map(|entry| &**entry)).await?;
        let found = entries.iter().zip(&objects);
        Ok(found.map(|(entry, object)| self.labels.matches(&entry.labels) && self.fields.matches(resource, object)).collect())
    }

    /// The same of one.
    pub async fn matches(&self, engine: &Engine, resource: &Resource, entry: &Entry) -> Result<bool, Status> {
        if !self.reads_bodies(resource) {
            return Ok(self.matches_index(entry));
        }
        let object = versions::object(engine, resource, entry).await?;
        Ok(self.labels.matches(&entry.labels) && self.fields.matches(resource, &object))
    }

    /// Custom resources' own fields are not indexed, and are those of the version asked for.
    fn reads_bodies(&self, resource: &Resource) -> bool {
        resource.custom.is_some() && self.fields.terms.iter().any(|term| !term.path.starts_with("metadata."))
    }

    /// By the values indexed when the object was written.
    fn matches_index(&self, entry: &Entry) -> bool {
        (self.labels.matches_everything() || self.labels.matches(&entry.labels))
            && self.fields.terms.iter().all(|term| (entry.field(&term.path).unwrap_or_default() == term.value) == term.equal)
    }
}

/// Where a page ended: the revision of the first page and the key to go on from.
struct Continue {
    /// None: go on from now, whatever has changed.
    revision: Option<u64>,
    after: String,
}

impl Continue {
    fn encode(revision: i64, after: &str) -> String {
        URL_SAFE_NO_PAD.encode(json!({"v": "meta.k8s.io/v1", "rv": revision, "start": after}).to_string())
    }

    fn decode(token: &str) -> Result<Self, Status> {
        let invalid = |why: &str| Status::bad_request(format!("continue key is not valid: {why}"));
        let bytes = URL_SAFE_NO_PAD.decode(token.trim_end_matches('=')).map_err(|e| invalid(&e.to_string()))?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| invalid(&e.to_string()))?;
        if value["v"] != "meta.k8s.io/v1" {
            return Err(invalid("incorrect encoded version"));
        }
        let revision = value["rv"].as_i64().filter(|rv| *rv != 0).ok_or_else(|| invalid("incorrect encoded start resourceVersion"))?;
        let after = value["start"].as_str().filter(|s| !s.is_empty()).ok_or_else(|| invalid("encoded start key empty"))?;
        Ok(Self { revision: u64::try_from(revision).ok(), after: after.into() })
    }
}

/// One page of entries and what the list's metadata says about it.
pub struct Page {
    pub entries: Vec<Arc<Entry>>,
    pub revision: u64,
    next: Option<String>,
    remaining: Option<usize>,
}

pub async fn list(engine: &Engine, call: &Call) -> Result<Reply, Status> {
    let page = page(engine, call).await?;
    let mut metadata = json!({"resourceVersion": page.revision.to_string()});
    if let Some(next) = &page.next {
        metadata["continue"] = next.as_str().into();
    }
    if let Some(remaining) = page.remaining {
        metadata["remainingItemCount"] = remaining.into();
    }
    let resource = &call.resource;
    match call.accept.form {
        Form::Plain => Ok(Reply::Json(200, encode_list(engine, resource, &metadata, &page.entries).await?)),
        Form::Metadata => {
            let objects = versions::objects(engine, resource, page.entries.iter().map(|e| &**e)).await?;
            let items: Vec<Value> = objects.iter().map(partial).collect();
            let list = json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "items": items});
            Ok(Reply::Object(200, list))
        }
        Form::Table => {
            let objects = versions::objects(engine, resource, page.entries.iter().map(|e| &**e)).await?;
            let table = table::render(resource, metadata, &objects, include_object(call)?, Timestamp::now());
            Ok(Reply::Object(200, table))
        }
    }
}

/// The list as bytes: the items' own encodings put together.
async fn encode_list(engine: &Engine, resource: &Resource, metadata: &Value, entries: &[Arc<Entry>]) -> Result<Bytes, Status> {
    let size: usize = entries.iter().map(|e| e.body.len() + 1).sum();
    let mut out = BytesMut::with_capacity(size + 256);
    out.put_slice(
        format!("{{\"kind\":\"{}\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[", resource.list_kind, resource.api_version())
            .as_bytes(),
    );
    let foreign: Vec<bool> = entries.iter().map(|entry| !versions::is_stored_so(resource, entry)).collect();
    let to_convert = entries.iter().zip(&foreign).filter(|(_, foreign)| **foreign).map(|(entry, _)| &**entry);
    let mut converted = versions::objects(engine, resource, to_convert).await?.into_iter();
    for (i, (entry, foreign)) in entries.iter().zip(foreign).enumerate() {
        if i > 0 {
            out.put_u8(b',');
        }
        match converted.as_slice() {
            [next, ..] if foreign => {
                out.put_slice(&crate::cache::encode(next));
                converted.next();
            }
            _ => out.put_slice(&entry.body),
        }
    }
    out.put_slice(b"]}\n");
    Ok(out.freeze())
}

fn check_options(call: &Call) -> Result<(), Status> {
    let (revision, matching, token) =
        (call.query.text("resourceVersion"), call.query.text("resourceVersionMatch"), call.query.text("continue"));
    let invalid = |error: FieldError| Err(Status::invalid("meta.k8s.io", "ListOptions", "", &[error]));
    let forbidden = |detail: &str| invalid(FieldError::forbidden("resourceVersionMatch", detail));
    if !matching.is_empty() {
        if !token.is_empty() {
            return forbidden("resourceVersionMatch is forbidden when continue is provided");
        }
        if revision.is_empty() && !call.query.flag("sendInitialEvents") {
            return forbidden("resourceVersionMatch is forbidden unless resourceVersion is provided");
        }
        if !matches!(matching, "Exact" | "NotOlderThan") {
            return invalid(FieldError::not_supported("resourceVersionMatch", matching, &["Exact", "NotOlderThan", ""]));
        }
        if matching == "Exact" && revision == "0" {
            return forbidden("resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"");
        }
    }
    if call.info.verb == "list" && call.query.get("sendInitialEvents").is_some() {
        return invalid(FieldError::forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list"));
    }
    if !token.is_empty() && !revision.is_empty() && revision != "0" {
        return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
    }
    Ok(())
}

pub async fn page(engine: &Engine, call: &Call) -> Result<Page, Status> {
    check_options(call)?;
    let selectors = Selectors::of(call)?;
    let limit = match (call.query.number("limit"), call.query.text("resourceVersion")) {
        (Some(limit), revision) if limit > 0 && (revision != "0" || call.query.get("continue").is_some()) => limit as usize,
        _ => usize::MAX,
    };
    let token = call.query.text("continue");
    let range = call.resource.key(call.scope().filter(|ns| !ns.is_empty()), None);
    let (prefix, within) = split_key(&range).ok_or_else(Status::path_not_found)?;
    let exact = call.query.text("resourceVersionMatch") == "Exact";
    let (wanted, after) = if !token.is_empty() {
        let token = Continue::decode(token)?;
        (token.revision, Some(token.after))
    } else if exact
        || (limit != usize::MAX
            && !matches!(call.query.text("resourceVersion"), "" | "0")
            && call.query.text("resourceVersionMatch").is_empty())
    {
        (Some(parse_revision(call.query.text("resourceVersion"))?), None)
    } else {
        match call.query.text("resourceVersion") {
            "" => drop(engine.fresh().await?),
            "0" => {}
            text => engine.reach(parse_revision(text)?).await?,
        }
        (None, None)
    };
    if wanted.is_none() && after.is_some() {
        engine.fresh().await?;
    }
    let (candidates, revision) = candidates(engine, prefix, within, wanted, after.as_deref()).await?;
    let everything = selectors.everything();
    let matching = if everything { Vec::new() } else { selectors.matching(engine, &call.resource, &candidates).await? };
    let matches = |place: usize| matching.get(place).copied().unwrap_or(everything);
    Ok(cut(candidates, matches, everything, revision, limit))
}

/// The objects from which a page is cut, at the wanted revision: from the cache if it still shows that moment, else from history.
async fn candidates(
    engine: &Engine,
    prefix: &str,
    within: &str,
    wanted: Option<u64>,
    after: Option<&str>,
) -> Result<(Vec<Arc<Entry>>, u64), Status> {
    let cache = engine.hub.cache(prefix);
    let Some(wanted) = wanted else {
        let revision = engine.hub.revision();
        let snapshot = cache.range(within, after);
        return Ok((snapshot.entries, revision.max(snapshot.last_change)));
    };
    engine.reach(wanted).await?;
    let failure = |error| match (error, after) {
        (StoreError::Compacted { .. }, Some(after)) => Status::expired_continue(&Continue::encode(-1, after)),
        (StoreError::Compacted { .. }, None) => Status::expired("The resourceVersion for the provided list is too old."),
        (other, _) => store_failure(other),
    };
    let snapshot = cache.range(within, after);
    if snapshot.last_change <= wanted {
        // Even if nothing has changed since: history that is gone must look the same whether the cache could answer or not.
        engine.store.range(RangeRequest::key(ROOT).at(wanted)).await.map_err(failure)?;
        return Ok((snapshot.entries, wanted));
    }
    let range = format!("{ROOT}{prefix}/{within}");
    let start = match after {
        Some(after) => format!("{ROOT}{prefix}/{after}\0"),
        None => range.clone(),
    };
    let result = engine.store.range(RangeRequest::continued(range, start).at(wanted)).await.map_err(failure)?;
    let old = result.kvs.iter().filter_map(|kv| engine.hub.historic(kv.key.strip_prefix(ROOT)?, kv.mod_revision, &kv.value));
    Ok((old.collect(), wanted))
}

fn cut(candidates: Vec<Arc<Entry>>, matches: impl Fn(usize) -> bool, everything: bool, revision: u64, limit: usize) -> Page {
    let total = candidates.len();
    let mut entries = Vec::new();
    let mut next = None;
    let mut remaining = None;
    for (place, entry) in candidates.into_iter().enumerate() {
        if !matches(place) {
            continue;
        }
        if entries.len() == limit {
            let last: Option<&Arc<Entry>> = entries.last();
            next = last.map(|last| Continue::encode(revision as i64, &last.key));
            remaining = everything.then(|| total - entries.len());
            break;
        }
        entries.push(entry);
    }
    Page { entries, revision, next, remaining }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_tokens_come_back() {
        let token = Continue::decode(&Continue::encode(7, "ns/a")).unwrap();
        assert_eq!((token.revision, token.after.as_str()), (Some(7), "ns/a"));
        assert_eq!(Continue::decode(&Continue::encode(-1, "a")).unwrap().revision, None);
        assert!(Continue::decode("nonsense").is_err());
    }
}
