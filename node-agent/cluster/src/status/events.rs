//! Event objects: repeats are counted on one object, floods are cut off per object, nothing blocks the caller.
use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::debug;

/// How many events may wait for the API server; more are dropped, as they are only for people to read.
const QUEUE: usize = 1000;
/// Remembered events for counting repeats.
const REMEMBERED: usize = 4096;
/// Upstream's spam filter: a burst of 25 per object, then one each five minutes.
const BURST: f64 = 25.0;
const REFILL_PER_SECOND: f64 = 1.0 / 300.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Normal,
    Warning,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

struct Record {
    about: ObjectReference,
    kind: Kind,
    reason: String,
    message: String,
    at: jiff::Timestamp,
}

#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Record>,
}

impl Recorder {
    pub fn start(client: Client, node_name: &str) -> Self {
        let (queue, records) = mpsc::channel(QUEUE);
        tokio::spawn(write(client, node_name.to_owned(), records));
        Self { queue }
    }

    pub fn record(&self, about: ObjectReference, kind: Kind, reason: &str, message: String) {
        debug!(object = about.name, reason, message, "event");
        // Full: dropped on purpose.
        let _ = self.queue.try_send(Record { about, kind, reason: reason.into(), message, at: jiff::Timestamp::now() });
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Sameness {
    object: String,
    kind: Kind,
    reason: String,
    message: String,
}

struct Seen {
    name: String,
    namespace: String,
    count: i32,
}

struct Bucket {
    tokens: f64,
    at: jiff::Timestamp,
}

impl Bucket {
    fn take(&mut self, now: jiff::Timestamp) -> bool {
        let elapsed = now.duration_since(self.at).as_secs_f64().max(0.0);
        self.tokens = (self.tokens + elapsed * REFILL_PER_SECOND).min(BURST);
        self.at = now;
        let allowed = self.tokens >= 1.0;
        if allowed {
            self.tokens -= 1.0;
        }
        allowed
    }
}

async fn write(client: Client, node_name: String, mut records: mpsc::Receiver<Record>) {
    let mut seen: HashMap<Sameness, Seen> = HashMap::new();
    let mut buckets: HashMap<String, Bucket> = HashMap::new();
    while let Some(record) = records.recv().await {
        if seen.len() > REMEMBERED {
            seen.clear();
            buckets.clear();
        }
        let object = format!(
            "{}/{}/{}/{}/{}",
            record.about.kind.as_deref().unwrap_or_default(),
            record.about.namespace.as_deref().unwrap_or_default(),
            record.about.name.as_deref().unwrap_or_default(),
            record.about.uid.as_deref().unwrap_or_default(),
            record.about.field_path.as_deref().unwrap_or_default()
        );
        let bucket = buckets.entry(object.clone()).or_insert(Bucket { tokens: BURST, at: record.at });
        if !bucket.take(record.at) {
            continue;
        }
        let same = Sameness { object, kind: record.kind, reason: record.reason.clone(), message: record.message.clone() };
        if let Some(known) = seen.get_mut(&same)
            && count_up(&client, known, record.at).await
        {
            continue;
        }
        let event = build(&record, &node_name);
        let api: Api<Event> = Api::namespaced(client.clone(), event.metadata.namespace.as_deref().unwrap_or("default"));
        match api.create(&PostParams::default(), &event).await {
            Ok(created) => {
                let known = Seen { name: created.name_any(), namespace: created.namespace().unwrap_or_default(), count: 1 };
                seen.insert(same, known);
            }
            Err(error) => debug!(%error, reason = record.reason, "an event was not accepted"),
        }
    }
}

/// False when the Event object is gone and a new one is needed.
async fn count_up(client: &Client, known: &mut Seen, at: jiff::Timestamp) -> bool {
    let api: Api<Event> = Api::namespaced(client.clone(), &known.namespace);
    let patch = json!({ "count": known.count + 1, "lastTimestamp": Time(seconds(at)) });
    let written = api.patch(&known.name, &PatchParams::default(), &Patch::Merge(&patch)).await;
    if written.is_ok() {
        known.count += 1;
    }
    written.is_ok()
}

fn seconds(at: jiff::Timestamp) -> jiff::Timestamp {
    jiff::Timestamp::from_second(at.as_second()).unwrap_or(at)
}

fn build(record: &Record, node_name: &str) -> Event {
    let namespace = record.about.namespace.clone().filter(|namespace| !namespace.is_empty()).unwrap_or_else(|| "default".into());
    let name = format!("{}.{:x}", record.about.name.as_deref().unwrap_or_default(), record.at.as_nanosecond());
    let at = Some(Time(seconds(record.at)));
    Event {
        metadata: ObjectMeta { name: Some(name), namespace: Some(namespace), ..ObjectMeta::default() },
        involved_object: record.about.clone(),
        reason: Some(record.reason.clone()),
        message: Some(record.message.clone()),
        type_: Some(record.kind.name().into()),
        source: Some(EventSource { component: Some("kubelet".into()), host: Some(node_name.into()) }),
        reporting_component: Some("kubelet".into()),
        reporting_instance: Some(node_name.into()),
        first_timestamp: at.clone(),
        last_timestamp: at,
        count: Some(1),
        ..Event::default()
    }
}
