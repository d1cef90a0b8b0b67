//! The cluster's truth: a revisioned key-value store with etcd v3's semantics behind one object-safe trait.
//!
//! One global revision counts write transactions. A key's life carries `create_revision`, `mod_revision` and `version`; snapshots of any
//! revision that isn't compacted yet can be read; a watch replays history and then follows, in revision order and without gaps.
//! Writes are acknowledged only when they are durable, and watchers see them only after that.

pub mod embedded;
pub mod memory;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

/// A position in the store's history. 1 is the empty store; every write transaction that changes something adds one.
pub type Revision = u64;

/// One key at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    pub key: Arc<str>,
    pub value: Bytes,
    /// The revision that created this generation of the key.
    pub create_revision: Revision,
    /// The revision that last wrote it: what Kubernetes shows as `resourceVersion`.
    pub mod_revision: Revision,
    /// 1 after creation, one more with every write.
    pub version: u64,
}

/// Which keys, of which moment.
#[derive(Debug, Clone, Default)]
pub struct RangeRequest {
    /// First key, inclusive.
    pub start: String,
    /// Where to stop.
    pub end: RangeEnd,
    /// At most so many keys are returned; 0 = all.
    pub limit: usize,
    /// The snapshot to read; 0 = the latest.
    pub revision: Revision,
    /// Count the keys, return none.
    pub count_only: bool,
}

/// The end of a [`RangeRequest`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum RangeEnd {
    /// Only the key `start`.
    #[default]
    Single,
    /// All keys that begin with this prefix (`start` may lie inside the prefix, to continue a listing).
    Prefix(String),
    /// All keys before this one, exclusive.
    Before(String),
}

impl RangeRequest {
    /// One key at the latest revision.
    pub fn key(key: impl Into<String>) -> Self {
        Self { start: key.into(), ..Self::default() }
    }

    /// All keys with a prefix at the latest revision.
    pub fn prefix(prefix: impl Into<String>) -> Self {
        let prefix = prefix.into();
        Self { start: prefix.clone(), end: RangeEnd::Prefix(prefix), ..Self::default() }
    }

    /// The keys of `prefix` from `start` on: the next page of a listing.
    pub fn continued(prefix: impl Into<String>, start: impl Into<String>) -> Self {
        Self { start: start.into(), end: RangeEnd::Prefix(prefix.into()), ..Self::default() }
    }

    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    pub fn at(mut self, revision: Revision) -> Self {
        self.revision = revision;
        self
    }

    pub fn count_only(mut self) -> Self {
        self.count_only = true;
        self
    }
}

/// What a range read saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeResult {
    /// Ordered by key.
    pub kvs: Vec<KeyValue>,
    /// Whether keys were left out by the limit.
    pub more: bool,
    /// How many keys the whole range holds in that snapshot, whatever the limit.
    pub count: u64,
    /// The snapshot that was read: the requested revision, or the latest one.
    pub revision: Revision,
}

/// What must hold for a write to happen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Expect {
    #[default]
    Any,
    /// The key must not exist: a create.
    Absent,
    /// The key must exist at this `mod_revision`: an update or a guarded delete.
    ModRevision(Revision),
}

/// One write of a transaction.
#[derive(Debug, Clone)]
pub enum Op {
    Put { key: String, value: Bytes, expect: Expect, ttl: Option<Duration> },
    Delete { key: String, expect: Expect },
}

impl Op {
    /// Creates the key, or fails with the present one.
    pub fn create(key: impl Into<String>, value: Bytes) -> Self {
        Self::Put { key: key.into(), value, expect: Expect::Absent, ttl: None }
    }

    /// Replaces the key if it still stands at `revision`.
    pub fn update(key: impl Into<String>, value: Bytes, revision: Revision) -> Self {
        Self::Put { key: key.into(), value, expect: Expect::ModRevision(revision), ttl: None }
    }

    /// Writes the key whatever was there.
    pub fn put(key: impl Into<String>, value: Bytes) -> Self {
        Self::Put { key: key.into(), value, expect: Expect::Any, ttl: None }
    }

    pub fn delete(key: impl Into<String>, expect: Expect) -> Self {
        Self::Delete { key: key.into(), expect }
    }

    /// Lets the store delete the key by itself after `ttl` (rounded up to seconds), unless it's written again. No effect on a delete.
    pub fn expiring(mut self, after: Option<Duration>) -> Self {
        if let Self::Put { ttl, .. } = &mut self {
            *ttl = after;
        }
        self
    }

    pub fn key_name(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } => key,
        }
    }
}

/// How a transaction ended. A failed expectation is an outcome, not an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOutcome {
    Done {
        /// The transaction's revision (the present one if nothing changed, e.g. a delete of a missing key).
        revision: Revision,
        /// Per operation, in order.
        results: Vec<Written>,
    },
    /// Nothing was written.
    Conflict {
        /// Which operation's expectation failed.
        index: usize,
        /// What stands at its key now.
        current: Option<KeyValue>,
        revision: Revision,
    },
}

/// What one operation did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The key as it stands now; `None` after a delete.
    pub current: Option<KeyValue>,
    /// The key as it stood before.
    pub previous: Option<KeyValue>,
}

/// How a single write ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteOutcome {
    Done { revision: Revision, written: Written },
    Conflict { current: Option<KeyValue>, revision: Revision },
}

/// What to follow.
#[derive(Debug, Clone, Default)]
pub struct WatchRequest {
    pub prefix: String,
    /// The first revision wanted; 0 = from the next write on. After a list at revision R, ask for R + 1.
    pub from_revision: Revision,
}

impl WatchRequest {
    pub fn new(prefix: impl Into<String>, from_revision: Revision) -> Self {
        Self { prefix: prefix.into(), from_revision }
    }
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Put {
        kv: KeyValue,
        previous: Option<KeyValue>,
    },
    /// `revision` is the delete's own revision.
    Delete {
        key: Arc<str>,
        revision: Revision,
        previous: Option<KeyValue>,
    },
}

impl Event {
    pub fn key(&self) -> &Arc<str> {
        match self {
            Self::Put { kv, .. } => &kv.key,
            Self::Delete { key, .. } => key,
        }
    }

    pub fn revision(&self) -> Revision {
        match self {
            Self::Put { kv, .. } => kv.mod_revision,
            Self::Delete { revision, .. } => *revision,
        }
    }

    pub fn previous(&self) -> Option<&KeyValue> {
        match self {
            Self::Put { previous, .. } | Self::Delete { previous, .. } => previous.as_ref(),
        }
    }
}

/// Events in revision order. All events of one revision are in one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// The stream is complete up to this revision: everything under the prefix until here was delivered.
    pub revision: Revision,
    /// Empty for progress.
    pub events: Vec<Event>,
}

/// Ends after its first error.
pub type WatchStream = BoxStream<'static, Result<WatchBatch, StoreError>>;

/// Why the store couldn't answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The revision asked for is older than what history holds: the caller lists anew (HTTP 410).
    #[error("required revision {requested} has been compacted; the oldest available is {compacted}")]
    Compacted { requested: Revision, compacted: Revision },
    #[error("required revision {requested} is a future revision; the current one is {current}")]
    FutureRevision { requested: Revision, current: Revision },
    #[error("transaction writes key {0:?} twice")]
    DuplicateKey(String),
    #[error("the store is closed")]
    Closed,
    #[error("{operation}: {source}")]
    Backend {
        operation: &'static str,
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
}

/// A store, shared as `Arc<dyn Store>`.
pub trait Store: Send + Sync + 'static {
    /// Reads a consistent snapshot.
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResult, StoreError>>;

    /// Does all operations in one revision, or none. Durable when it returns. A key may appear only once.
    fn txn(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<TxnOutcome, StoreError>>;

    /// Replays history from `from_revision`, then follows.
    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<WatchStream, StoreError>>;

    /// Makes every open watch deliver a batch that reaches the present revision (an empty one if there's nothing else).
    fn request_progress(&self) -> BoxFuture<'_, Result<(), StoreError>>;

    /// The latest acknowledged revision.
    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>>;

    /// Forgets what was superseded at or before `revision`; snapshots older than it can't be read any more.
    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Bytes the store takes on disk (or in memory).
    fn size(&self) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// An error when the store has failed for good: only opening it anew helps.
    fn health(&self) -> Result<(), StoreError>;

    /// Ends when the store has failed for good, with the reason.
    fn failure(&self) -> BoxFuture<'_, StoreError>;
}

impl dyn Store {
    /// One key at the latest revision, and that revision.
    pub async fn get(&self, key: &str) -> Result<(Option<KeyValue>, Revision), StoreError> {
        let mut result = self.range(RangeRequest::key(key)).await?;
        Ok((result.kvs.pop(), result.revision))
    }

    /// A transaction of one operation.
    pub async fn write(&self, op: Op) -> Result<WriteOutcome, StoreError> {
        Ok(match self.txn(vec![op]).await? {
            TxnOutcome::Done { revision, mut results } => {
                WriteOutcome::Done { revision, written: results.pop().unwrap_or(Written { current: None, previous: None }) }
            }
            TxnOutcome::Conflict { current, revision, .. } => WriteOutcome::Conflict { current, revision },
        })
    }
}
