//! Follows the store and keeps the caches, the authorizers' indexes and the catalog of custom resources in step with it.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use outrigger_store::{Event, RangeRequest, Store, StoreError, WatchRequest, WatchStream};

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
            match store.watch(WatchRequest::new(ROOT, hub.revision() + 1)).await {
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
