//! The watch cache: every stored object encoded once, shared by GET, LIST and all watchers, with a ring of changes to resume watches from.
//!
//! One feeder reads the store's watch for all kinds; the revision it has reached is the clock that consistent reads wait for.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrigger_api::meta;
use outrigger_api::resource::Text;
use serde_json::Value;
use tokio::sync::watch;

/// Changes kept for resuming watches: at least this many, and all younger than `FRESH` up to `RING_MOST`.
const RING_LEAST: usize = 128;
const RING_MOST: usize = 16 * 1024;
const FRESH: Duration = Duration::from_secs(180);

/// One object at one revision, in its storage version.
#[derive(Debug)]
pub struct Entry {
    /// What follows the resource's prefix in its store key: "namespace/name" or "name".
    pub key: Arc<str>,
    pub revision: u64,
    /// JSON with metadata.resourceVersion set.
    pub body: Bytes,
    /// `metadata.labels`, null when there are none.
    pub labels: Value,
    /// Values of the kind's field labels.
    pub fields: Box<[(Text, Box<str>)]>,
}

impl Entry {
    pub fn new(key: &str, revision: u64, mut object: Value, field_labels: &[Text]) -> Self {
        meta::set_resource_version(&mut object, &revision.to_string());
        let fields = field_labels.iter().map(|label| (label.clone(), field_text(&object, label).into())).collect();
        let body = encode(&object);
        let labels = object.pointer_mut("/metadata/labels").map(Value::take).unwrap_or_default();
        Self { key: key.into(), revision, body, labels, fields }
    }

    pub fn namespace(&self) -> &str {
        self.key.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    pub fn name(&self) -> &str {
        self.key.rsplit_once('/').map_or(&self.key, |(_, name)| name)
    }

    pub fn object(&self) -> Value {
        // The body was encoded by this process from a Value.
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn field(&self, label: &str) -> Option<&str> {
        match label {
            "metadata.name" => Some(self.name()),
            "metadata.namespace" => Some(self.namespace()),
            _ => self.fields.iter().find(|(k, _)| k == label).map(|(_, v)| &**v),
        }
    }
}

/// The text of one field of a stored object as selectors compare it.
pub fn field_text(object: &Value, label: &str) -> String {
    // events.k8s.io names the fields of a stored core Event differently
    let path = match label.split_once('.') {
        Some(("regarding", rest)) => format!("involvedObject.{rest}"),
        _ if label == "reportingController" => "reportingComponent".into(),
        _ => label.to_string(),
    };
    let value = match path.as_str() {
        "source" if meta::kind(object) == "Event" => match meta::text(object, "source.component") {
            "" => meta::get(object, "reportingComponent"),
            component => return component.to_string(),
        },
        "status.podIPs" => meta::get(object, "status.podIP"),
        path => meta::get(object, path),
    };
    match value {
        Value::String(text) => text.clone(),
        Value::Null if matches!(label, "spec.hostNetwork" | "spec.unschedulable") => "false".into(),
        Value::Null if matches!(label, "status.replicas" | "status.successful") => "0".into(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        _ => String::new(),
    }
}

pub fn encode(value: &Value) -> Bytes {
    // Serializing a Value into memory has no failing case: its keys are strings.
    Bytes::from(serde_json::to_vec(value).unwrap_or_default())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    Added,
    Modified,
    Deleted,
}

#[derive(Debug)]
pub struct Change {
    pub kind: ChangeKind,
    pub revision: u64,
    /// For a deletion the last state, at the deletion's revision.
    pub object: Arc<Entry>,
    pub previous: Option<Arc<Entry>>,
    at: Instant,
}

#[derive(Default)]
struct Content {
    live: BTreeMap<Arc<str>, Arc<Entry>>,
    ring: VecDeque<Arc<Change>>,
    /// All changes after this revision are in the ring.
    floor: u64,
    /// Revision of the last change of this resource.
    last: u64,
}

/// The objects of one stored resource.
pub struct ResourceCache {
    content: RwLock<Content>,
    changed: watch::Sender<u64>,
}

/// Objects read at once, and the revision they were read at.
pub struct Snapshot {
    pub entries: Vec<Arc<Entry>>,
    /// Revision of the resource's last change.
    pub last_change: u64,
}

/// The asked revision is older than what the ring remembers.
#[derive(Debug, PartialEq, Eq)]
pub struct TooOld {
    pub oldest: u64,
}

impl ResourceCache {
    fn new(floor: u64) -> Self {
        Self { content: RwLock::new(Content { floor, ..Default::default() }), changed: watch::Sender::new(0) }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Content> {
        self.content.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn get(&self, key: &str) -> Option<Arc<Entry>> {
        self.read().live.get(key).cloned()
    }

    pub fn len(&self) -> usize {
        self.read().live.len()
    }

    pub fn is_empty(&self) -> bool {
        self.read().live.is_empty()
    }

    /// Revision of the resource's last change.
    pub fn last_change(&self) -> u64 {
        self.read().last
    }

    /// All whose key starts with `prefix` and sorts after `after`.
    pub fn range(&self, prefix: &str, after: Option<&str>) -> Snapshot {
        let content = self.read();
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let entries = content
            .live
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(k, _)| k.starts_with(prefix))
            .map(|(_, e)| e.clone())
            .collect();
        Snapshot { entries, last_change: content.last }
    }

    /// Up to `most` changes after `revision`, oldest first.
    pub fn changes_after(&self, revision: u64, most: usize) -> Result<Vec<Arc<Change>>, TooOld> {
        let content = self.read();
        if revision < content.floor {
            return Err(TooOld { oldest: content.floor });
        }
        let start = content.ring.partition_point(|change| change.revision <= revision);
        Ok(content.ring.range(start..).take(most).cloned().collect())
    }

    /// Wakes on every change; its value is the revision of the last one.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn load(&self, entry: Entry) {
        let mut content = self.content.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        content.last = content.last.max(entry.revision);
        content.live.insert(entry.key.clone(), Arc::new(entry));
    }

    fn put(&self, entry: Entry) {
        let revision = entry.revision;
        let entry = Arc::new(entry);
        let mut content = self.content.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let previous = content.live.insert(entry.key.clone(), entry.clone());
        let kind = if previous.is_some() { ChangeKind::Modified } else { ChangeKind::Added };
        content.push(Change { kind, revision, object: entry, previous, at: Instant::now() });
        drop(content);
        self.changed.send_replace(revision);
    }

    fn remove(&self, key: &str, revision: u64) {
        let mut content = self.content.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Some(previous) = content.live.remove(key) else { return };
        let mut object = previous.object();
        meta::set_resource_version(&mut object, &revision.to_string());
        let last = Entry {
            key: previous.key.clone(),
            revision,
            body: encode(&object),
            labels: previous.labels.clone(),
            fields: previous.fields.clone(),
        };
        content.push(Change { kind: ChangeKind::Deleted, revision, object: Arc::new(last), previous: Some(previous), at: Instant::now() });
        drop(content);
        self.changed.send_replace(revision);
    }
}

impl Content {
    fn push(&mut self, change: Change) {
        let now = change.at;
        self.last = change.revision;
        self.ring.push_back(Arc::new(change));
        while self.ring.len() > RING_LEAST {
            let oldest_is_fresh = self.ring.front().is_some_and(|c| now.duration_since(c.at) < FRESH);
            if oldest_is_fresh && self.ring.len() <= RING_MOST {
                break;
            }
            if let Some(dropped) = self.ring.pop_front() {
                self.floor = dropped.revision;
            }
        }
    }
}

/// A change as the store reports it.
pub struct StoreChange {
    pub key: String,
    pub revision: u64,
    /// The new value; none for a deletion.
    pub value: Option<Bytes>,
}

/// How to read field labels of the objects under a storage prefix.
type FieldLabels = Arc<[Text]>;

/// All caches, by storage prefix ("pods", "apps/deployments").
pub struct Hub {
    caches: RwLock<HashMap<String, Arc<ResourceCache>>>,
    labels: RwLock<HashMap<String, FieldLabels>>,
    reached: watch::Sender<u64>,
    start: std::sync::atomic::AtomicU64,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            caches: RwLock::default(),
            labels: RwLock::default(),
            reached: watch::Sender::new(0),
            start: std::sync::atomic::AtomicU64::new(0),
        }
    }
}

impl Hub {
    /// Which fields are indexed for the objects under `prefix`; said before the first of them arrives.
    pub fn index_fields(&self, prefix: &str, labels: &[Text]) {
        let mut all = self.labels.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        all.insert(prefix.to_string(), labels.into());
    }

    pub fn cache(&self, prefix: &str) -> Arc<ResourceCache> {
        if let Some(cache) = self.caches.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(prefix) {
            return cache.clone();
        }
        let mut caches = self.caches.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let floor = self.start.load(std::sync::atomic::Ordering::Acquire);
        caches.entry(prefix.to_string()).or_insert_with(|| Arc::new(ResourceCache::new(floor))).clone()
    }

    /// How many objects each stored resource has, for the metrics.
    pub fn counts(&self) -> Vec<(String, usize)> {
        let caches = self.caches.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        caches.iter().map(|(prefix, cache)| (prefix.clone(), cache.len())).collect()
    }

    /// The store keys, without their root, of all present objects.
    pub fn keys(&self) -> Vec<String> {
        let caches = self.caches.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let of = |prefix: &str, cache: &ResourceCache| -> Vec<String> {
            cache.read().live.keys().map(|key| format!("{prefix}/{key}")).collect()
        };
        caches.iter().flat_map(|(prefix, cache)| of(prefix, cache)).collect()
    }

    /// The revision up to which all changes have been seen.
    pub fn revision(&self) -> u64 {
        *self.reached.borrow()
    }

    /// Waits until everything up to `revision` has been seen; false when it takes longer than `limit`.
    pub async fn wait_for(&self, revision: u64, limit: Duration) -> bool {
        if self.revision() >= revision {
            return true;
        }
        let mut reached = self.reached.subscribe();
        tokio::time::timeout(limit, reached.wait_for(|r| *r >= revision)).await.is_ok_and(|r| r.is_ok())
    }

    /// The revision from which the caches were loaded: called once, before `load`.
    pub fn begin(&self, revision: u64) {
        self.start.store(revision, std::sync::atomic::Ordering::Release);
    }

    pub fn load(&self, key: &str, revision: u64, value: &[u8]) {
        if let Some((cache, entry)) = self.decode(key, revision, value) {
            cache.load(entry);
        }
    }

    pub fn apply(&self, change: StoreChange) {
        match &change.value {
            Some(value) => {
                if let Some((cache, entry)) = self.decode(&change.key, change.revision, value) {
                    cache.put(entry);
                }
            }
            None => {
                if let Some((prefix, rest)) = split_key(&change.key) {
                    self.cache(prefix).remove(rest, change.revision);
                }
            }
        }
    }

    pub fn advance(&self, revision: u64) {
        self.reached.send_if_modified(|reached| {
            let newer = revision > *reached;
            *reached = revision.max(*reached);
            newer
        });
    }

    /// An object of the past, as read from the store's history.
    pub fn historic(&self, key: &str, revision: u64, value: &[u8]) -> Option<Arc<Entry>> {
        self.decode(key, revision, value).map(|(_, entry)| Arc::new(entry))
    }

    fn decode(&self, key: &str, revision: u64, value: &[u8]) -> Option<(Arc<ResourceCache>, Entry)> {
        let (prefix, rest) = split_key(key)?;
        let object: Value = match serde_json::from_slice(value) {
            Ok(object) => object,
            Err(error) => {
                tracing::error!(key, %error, "a stored object cannot be decoded");
                return None;
            }
        };
        let labels = self.labels.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(prefix).cloned();
        Some((self.cache(prefix), Entry::new(rest, revision, object, labels.as_deref().unwrap_or_default())))
    }
}

/// Splits a store key (without its root) into the resource's prefix and the object's own part.
/// Core resources have a prefix of one segment, all others are stored below their group.
pub fn split_key(key: &str) -> Option<(&str, &str)> {
    let first = key.find('/')?;
    if is_core_prefix(&key[..first]) {
        return Some((&key[..first], &key[first + 1..]));
    }
    let second = first + 1 + key[first + 1..].find('/')?;
    Some((&key[..second], &key[second + 1..]))
}

fn is_core_prefix(segment: &str) -> bool {
    static CORE: std::sync::OnceLock<std::collections::HashSet<String>> = std::sync::OnceLock::new();
    CORE.get_or_init(|| {
        let builtin = outrigger_api::builtin::resources().iter();
        builtin.map(|r| r.storage_prefix.to_string()).filter(|prefix| !prefix.contains('/')).collect()
    })
    .contains(segment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn change(key: &str, revision: u64, labels: Option<Value>) -> StoreChange {
        let value = labels.map(|labels| encode(&json!({"metadata": {"name": "x", "labels": labels}})));
        StoreChange { key: key.into(), revision, value }
    }

    #[test]
    fn changes_are_told_apart_and_remembered() {
        let hub = Hub::default();
        hub.begin(5);
        hub.apply(change("pods/ns/x", 6, Some(json!({"a": "1"}))));
        hub.apply(change("pods/ns/x", 7, Some(json!({"a": "2"}))));
        hub.apply(change("apps/deployments/ns/x", 8, Some(json!({}))));
        hub.apply(change("pods/ns/x", 9, None));
        let pods = hub.cache("pods");
        let kinds: Vec<_> = pods.changes_after(5, 10).unwrap().iter().map(|c| (c.kind, c.revision)).collect();
        assert_eq!(kinds, [(ChangeKind::Added, 6), (ChangeKind::Modified, 7), (ChangeKind::Deleted, 9)]);
        assert_eq!(pods.changes_after(4, 10).unwrap_err(), TooOld { oldest: 5 });
        let last = pods.changes_after(8, 10).unwrap();
        assert_eq!(last[0].object.object()["metadata"]["resourceVersion"], "9");
        assert_eq!(last[0].object.labels["a"], "2");
        assert_eq!(hub.cache("apps/deployments").range("ns/", None).entries.len(), 1);
    }

    #[test]
    fn ranges_respect_prefix_and_start() {
        let hub = Hub::default();
        for (i, key) in ["a/1", "a/2", "a/3", "ab/1", "b/1"].iter().enumerate() {
            hub.load(&format!("pods/{key}"), i as u64 + 1, br#"{"metadata":{}}"#);
        }
        let keys = |prefix: &str, after: Option<&str>| -> Vec<String> {
            hub.cache("pods").range(prefix, after).entries.iter().map(|e| e.key.to_string()).collect()
        };
        assert_eq!(keys("a/", None), ["a/1", "a/2", "a/3"]);
        assert_eq!(keys("a/", Some("a/1")), ["a/2", "a/3"]);
        assert_eq!(keys("", Some("a/3")), ["ab/1", "b/1"]);
    }
}
