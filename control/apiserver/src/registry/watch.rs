//! WATCH: a cursor into the cache's ring of changes, translated by the selectors and streamed as encoded events.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use http_body_util::StreamBody;
use jiff::Timestamp;
use outrigger_api::table::{self, IncludeObject};
use outrigger_api::{FieldError, Resource, Status};
use rand::Rng;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::body::boxed;
use crate::cache::{Change, ChangeKind, Entry, ResourceCache, encode, split_key};
use crate::call::Call;
use crate::engine::Engine;
use crate::negotiate::{Encoding, Form};
use crate::registry::list::Selectors;
use crate::registry::read::{include_object, parse_revision, partial};
use crate::registry::versions;
use crate::reply::{self, Reply};

/// Changes taken from the ring at once, and the most bytes put together into one chunk.
const BATCH: usize = 500;
const CHUNK: usize = 64 * 1024;
/// How often a quiet watch that allows bookmarks gets one.
const BOOKMARK_EVERY: Duration = Duration::from_secs(55);

/// A watch under way.
struct Watcher {
    engine: Arc<Engine>,
    cache: Arc<ResourceCache>,
    resource: Arc<Resource>,
    within: String,
    selectors: Selectors,
    form: Form,
    protobuf: bool,
    include: IncludeObject,
    bookmarks: bool,
    columns_sent: bool,
    cursor: u64,
    end: Instant,
    chunk: BytesMut,
    sender: mpsc::Sender<Bytes>,
}

pub async fn watch(engine: &Arc<Engine>, call: &Call) -> Result<Reply, Status> {
    let selectors = Selectors::of(call)?;
    let initial = check_options(call)?;
    let range = call.resource.key(call.scope().filter(|ns| !ns.is_empty()), None);
    let (prefix, within) = split_key(&range).ok_or_else(Status::path_not_found)?;
    let cache = engine.hub.cache(prefix);
    let version = call.query.text("resourceVersion");
    let from = match version {
        "" | "0" => None,
        text => Some(parse_revision(text)?),
    };
    let (sender, receiver) = mpsc::channel(16);
    let mut watcher = Watcher {
        engine: engine.clone(),
        cache,
        resource: call.resource.clone(),
        within: within.to_string(),
        selectors,
        form: call.accept.form,
        protobuf: call.accept.encoding == Encoding::Protobuf,
        include: include_object(call)?,
        bookmarks: call.query.flag("allowWatchBookmarks"),
        columns_sent: false,
        cursor: from.unwrap_or_default(),
        end: Instant::now() + time_limit(call),
        chunk: BytesMut::new(),
        sender,
    };
    if version.is_empty() {
        engine.fresh().await?;
    }
    if initial && let Some(from) = from {
        engine.reach(from).await?;
    }
    if initial || from.is_none() {
        watcher.replay_state(initial).await;
    } else if let Err(too_old) = watcher.cache.changes_after(watcher.cursor, 0) {
        // Known before the stream starts: upstream then still answers 200 and sends the error as an event.
        watcher.frame("ERROR", &encode(&Status::too_old_resource_version(watcher.cursor, too_old.oldest).to_value()));
        watcher.end = Instant::now();
    }
    tokio::spawn(watcher.run());
    let frames = tokio_stream::wrappers::ReceiverStream::new(receiver)
        .map(|chunk| Ok::<_, std::convert::Infallible>(hyper::body::Frame::data(chunk)));
    let kind =
        if call.accept.encoding == Encoding::Protobuf { "application/vnd.kubernetes.protobuf;stream=watch" } else { "application/json" };
    Ok(Reply::Whole(reply::stream(kind, boxed(StreamBody::new(frames)))))
}

/// Whether the watch begins with the state and a bookmark that ends it.
fn check_options(call: &Call) -> Result<bool, Status> {
    let invalid = |error: FieldError| Err(Status::invalid("meta.k8s.io", "ListOptions", "", &[error]));
    let matching = call.query.text("resourceVersionMatch");
    let Some(_) = call.query.get("sendInitialEvents") else {
        if !matching.is_empty() {
            return invalid(FieldError::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        return Ok(false);
    };
    if matching != "NotOlderThan" {
        return invalid(FieldError::forbidden(
            "resourceVersionMatch",
            "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        ));
    }
    let wants = call.query.flag("sendInitialEvents");
    if wants && !call.query.flag("allowWatchBookmarks") {
        return invalid(FieldError::forbidden("allowWatchBookmarks", "sendInitialEvents requires allowWatchBookmarks"));
    }
    Ok(wants)
}

/// `timeoutSeconds`, or 30 to 60 minutes as upstream.
fn time_limit(call: &Call) -> Duration {
    match call.query.number("timeoutSeconds") {
        // An instant cannot hold every number of seconds; a year is as good as for ever.
        Some(seconds) if seconds > 0 => Duration::from_secs((seconds as u64).min(365 * 24 * 3600)),
        _ => Duration::from_secs(rand::rng().random_range(1800..3600)),
    }
}

impl Watcher {
    async fn run(mut self) {
        let mut changed = self.cache.subscribe();
        let mut stop = self.engine.stop.clone();
        let mut bookmark_at = Instant::now() + BOOKMARK_EVERY;
        // The last bookmark comes shortly before the end, so that the next watch can go on from there.
        let mut last_bookmark = self.bookmarks.then(|| self.end - Duration::from_secs(2));
        if self.flush().await.is_err() {
            return;
        }
        loop {
            changed.mark_unchanged();
            match self.send_changes().await {
                Ok(Progress::More) => continue,
                Ok(Progress::Idle) => {}
                Err(()) => return,
            }
            let now = Instant::now();
            if now >= self.end {
                return;
            }
            let wake =
                [Some(self.end), self.bookmarks.then_some(bookmark_at), last_bookmark].into_iter().flatten().min().unwrap_or(self.end);
            tokio::select! {
                outcome = changed.changed() => if outcome.is_err() { return },
                () = self.sender.closed() => return,
                () = async { drop(stop.wait_for(|stopped| *stopped).await) } => return,
                () = sleep_until(wake) => {
                    let now = Instant::now();
                    if self.bookmarks && (now >= bookmark_at || last_bookmark.is_some_and(|at| now >= at)) && now < self.end {
                        last_bookmark = last_bookmark.filter(|at| now < *at);
                        bookmark_at = now + BOOKMARK_EVERY;
                        self.bookmark(None);
                        if self.flush().await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }

    /// All present objects as ADDED events.
    async fn replay_state(&mut self, announce_end: bool) {
        let reached = self.engine.hub.revision();
        let snapshot = self.cache.range(&self.within, None);
        self.cursor = reached.max(snapshot.last_change);
        match self.selectors.matching(&self.engine, &self.resource, &snapshot.entries).await {
            Ok(matching) => {
                for (entry, _) in snapshot.entries.iter().zip(matching).filter(|(_, matches)| *matches) {
                    self.event("ADDED", entry, None).await;
                }
            }
            Err(status) => self.fail(&status),
        }
        if announce_end {
            self.bookmark(Some(self.cursor));
        }
    }

    async fn send_changes(&mut self) -> Result<Progress, ()> {
        let changes = match self.cache.changes_after(self.cursor, BATCH) {
            Ok(changes) => changes,
            Err(too_old) => {
                self.frame("ERROR", &encode(&Status::too_old_resource_version(self.cursor, too_old.oldest).to_value()));
                let _ = self.flush().await;
                return Err(());
            }
        };
        let Some(last) = changes.last() else { return Ok(Progress::Idle) };
        self.cursor = last.revision;
        for change in &changes {
            self.change(change).await;
            if self.chunk.len() >= CHUNK {
                self.flush().await?;
            }
        }
        self.flush().await?;
        Ok(if changes.len() == BATCH { Progress::More } else { Progress::Idle })
    }

    /// One change as this watch's selectors see it: entering the selection is ADDED, leaving it DELETED.
    async fn change(&mut self, change: &Change) {
        if !change.object.key.starts_with(self.within.as_str()) {
            return;
        }
        let after = change.kind != ChangeKind::Deleted;
        let (before, after) = match tokio::try_join!(self.selects(change.previous.as_ref()), self.selects(after.then_some(&change.object)))
        {
            Ok(found) => found,
            Err(status) => return self.fail(&status),
        };
        match (before, after) {
            (false, true) => self.event("ADDED", &change.object, None).await,
            (true, true) => self.event("MODIFIED", &change.object, None).await,
            (true, false) if change.kind == ChangeKind::Deleted => self.event("DELETED", &change.object, None).await,
            (true, false) => {
                if let Some(previous) = change.previous.clone() {
                    // The last state that matched, at the revision of the change.
                    self.event("DELETED", &previous, Some(change.revision)).await;
                }
            }
            (false, false) => {}
        }
    }

    async fn selects(&self, entry: Option<&Arc<Entry>>) -> Result<bool, Status> {
        match entry {
            Some(entry) => self.selectors.matches(&self.engine, &self.resource, entry).await,
            None => Ok(false),
        }
    }

    /// A watch that can't tell a change is over.
    fn fail(&mut self, status: &Status) {
        self.frame("ERROR", &encode(&status.to_value()));
        self.end = Instant::now();
    }

    async fn event(&mut self, kind: &str, entry: &Entry, revision: Option<u64>) {
        if self.form == Form::Plain && revision.is_none() && versions::is_stored_so(&self.resource, entry) {
            return self.frame(kind, &entry.body.clone());
        }
        let mut object = match versions::object(&self.engine, &self.resource, entry).await {
            Ok(object) => object,
            Err(status) => return self.fail(&status),
        };
        if let Some(revision) = revision {
            outrigger_api::meta::set_resource_version(&mut object, &revision.to_string());
        }
        let shaped = self.shape(object);
        self.frame(kind, &encode(&shaped));
    }

    fn shape(&mut self, object: Value) -> Value {
        match self.form {
            Form::Plain => object,
            Form::Metadata => partial(&object),
            Form::Table => {
                let metadata = json!({"resourceVersion": outrigger_api::meta::resource_version(&object)});
                let mut table = table::render(&self.resource, metadata, [&object], self.include, Timestamp::now());
                if std::mem::replace(&mut self.columns_sent, true) {
                    table["columnDefinitions"] = Value::Null;
                }
                table
            }
        }
    }

    /// Tells how far the watch has come. `initial` marks the end of the initial events.
    fn bookmark(&mut self, initial: Option<u64>) {
        let revision = match initial {
            Some(revision) => revision,
            None => self.quiet_revision(),
        };
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if initial.is_some() {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.form {
            Form::Plain => json!({"kind": self.resource.kind, "apiVersion": self.resource.api_version(), "metadata": metadata}),
            Form::Metadata => json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}),
            Form::Table => json!({
                "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": revision.to_string()},
                "columnDefinitions": null,
                "rows": [{"cells": [], "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}}],
            }),
        };
        self.frame("BOOKMARK", &encode(&object));
    }

    /// A revision up to which this watch has seen everything: the server's, if no change of the resource is unsent.
    fn quiet_revision(&mut self) -> u64 {
        let reached = self.engine.hub.revision();
        if self.cache.changes_after(self.cursor, 1).is_ok_and(|unsent| unsent.is_empty()) {
            self.cursor = self.cursor.max(reached);
        }
        self.cursor
    }

    fn frame(&mut self, kind: &str, object: &Bytes) {
        if self.protobuf {
            let value: Value = serde_json::from_slice(object).unwrap_or(Value::Null);
            match crate::protobuf::watch_frame(kind, &value) {
                Ok(frame) => self.chunk.put_slice(&frame),
                Err(error) => tracing::error!(%error, "an event has no protobuf form"),
            }
            return;
        }
        self.chunk.reserve(object.len() + 48);
        self.chunk.put_slice(b"{\"type\":\"");
        self.chunk.put_slice(kind.as_bytes());
        self.chunk.put_slice(b"\",\"object\":");
        self.chunk.put_slice(object);
        self.chunk.put_slice(b"}\n");
    }

    async fn flush(&mut self) -> Result<(), ()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = self.chunk.split().freeze();
        self.sender.send(chunk).await.map_err(|_| ())
    }
}

enum Progress {
    More,
    Idle,
}
