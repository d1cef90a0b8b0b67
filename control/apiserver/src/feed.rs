//! Follows the store and keeps the caches, the authorizers' indexes and the catalog of custom resources in step with it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use outrigger_store::{Event, RangeRequest, RangeResult, Store, StoreError, WatchRequest, WatchStream};

use crate::cache::{Hub, StoreChange};

/// Below this all objects are stored, as upstream does in etcd.
pub const ROOT: &str = "/registry/";

/// Told of every object as the caches are, in revision order.
pub trait Listener: Send + Sync {
    /// `key` without the root; `value` is none for a deletion.
    fn changed(&self, key: &str, revision: u64, value: Option<&[u8]>);
}

/// Loads everything at one revision and opens the watch that goes on from there.
pub async fn load(store: &Arc<dyn Store>, hub: &Hub, listeners: &[Arc<dyn Listener>]) -> Result<WatchStream, StoreError> {
    let all = store.range(RangeRequest::prefix(ROOT)).await?;
    hub.begin(all.revision);
    for kv in &all.kvs {
        let key = kv.key.strip_prefix(ROOT).unwrap_or(&kv.key);
        for listener in listeners {
            listener.changed(key, kv.mod_revision, Some(&kv.value));
        }
        hub.load(key, kv.mod_revision, &kv.value);
    }
    hub.advance(all.revision);
    store.watch(WatchRequest::new(ROOT, all.revision + 1)).await
}

/// Brings the caches to the present when the store has no longer the changes that lead there, and opens the watch that goes on from it.
async fn reload(store: &Arc<dyn Store>, hub: &Hub, listeners: &[Arc<dyn Listener>]) -> Result<WatchStream, StoreError> {
    let all = store.range(RangeRequest::prefix(ROOT)).await?;
    let revision = all.revision;
    for event in missed(hub, all) {
        apply(hub, listeners, event);
    }
    hub.advance(revision);
    store.watch(WatchRequest::new(ROOT, revision + 1)).await
}

/// What turns the caches' content into the store's, in revision order.
fn missed(hub: &Hub, all: RangeResult) -> Vec<Event> {
    let revision = all.revision;
    let present: HashSet<Arc<str>> = all.kvs.iter().map(|kv| kv.key.clone()).collect();
    let gone = hub.keys().into_iter().map(|key| Arc::<str>::from(format!("{ROOT}{key}"))).filter(|key| !present.contains(key));
    let mut newer: Vec<_> = all.kvs.into_iter().filter(|kv| kv.mod_revision > hub.revision()).collect();
    newer.sort_by_key(|kv| kv.mod_revision);
    let puts = newer.into_iter().map(|kv| Event::Put { kv, previous: None });
    puts.chain(gone.map(|key| Event::Delete { key, revision, previous: None })).collect()
}

/// Applies the watch's batches for as long as the store lives; after an error the watch is opened again where it stopped.
pub async fn follow(store: Arc<dyn Store>, hub: Arc<Hub>, listeners: Vec<Arc<dyn Listener>>, mut stream: WatchStream) {
    loop {
        while let Some(batch) = stream.next().await {
            match batch {
                Ok(batch) => {
                    for event in batch.events {
                        apply(&hub, &listeners, event);
                    }
                    hub.advance(batch.revision);
                }
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::error!(%error, revision = hub.revision(), "the store's watch ended; opening it again");
                    break;
                }
            }
        }
        stream = loop {
            let opened = match store.watch(WatchRequest::new(ROOT, hub.revision() + 1)).await {
                Err(StoreError::Compacted { .. }) => reload(&store, &hub, &listeners).await,
                opened => opened,
            };
            match opened {
                Ok(stream) => break stream,
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::error!(%error, "cannot follow the store");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        };
    }
}

fn apply(hub: &Hub, listeners: &[Arc<dyn Listener>], event: Event) {
    let (key, revision, value) = match event {
        Event::Put { kv, .. } => (kv.key, kv.mod_revision, Some(kv.value)),
        Event::Delete { key, revision, .. } => (key, revision, None),
    };
    let key = key.strip_prefix(ROOT).unwrap_or(&key);
    for listener in listeners {
        listener.changed(key, revision, value.as_deref());
    }
    hub.apply(StoreChange { key: key.to_string(), revision, value });
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use outrigger_store::KeyValue;

    #[test]
    fn caches_catch_up_with_a_store_that_forgot_the_changes() {
        let hub = Hub::default();
        for (key, revision) in [("pods/a/gone", 1), ("pods/a/kept", 2), ("pods/a/changed", 3)] {
            hub.load(key, revision, br#"{"metadata":{}}"#);
        }
        hub.advance(3);
        let stored = |key: &str, mod_revision| KeyValue {
            key: format!("{ROOT}{key}").into(),
            value: Bytes::from_static(br#"{"metadata":{}}"#),
            create_revision: 1,
            mod_revision,
            version: 1,
        };
        let kvs = vec![stored("pods/a/changed", 8), stored("pods/a/kept", 2), stored("pods/a/new", 7)];
        let all = RangeResult { count: 3, more: false, revision: 9, kvs };
        for event in missed(&hub, all) {
            apply(&hub, &[], event);
        }
        let pods = hub.cache("pods");
        let changes: Vec<_> = pods.changes_after(3, 10).unwrap().iter().map(|c| (c.object.name().to_string(), c.revision)).collect();
        assert_eq!(changes, [("new".to_string(), 7), ("changed".to_string(), 8), ("gone".to_string(), 9)]);
        assert_eq!(pods.len(), 3);
    }
}
