//! A store in memory: the suite's yardstick, and good for tests of what is built on a store. Nothing outlives the process.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::watch::{self, History, Hub};
use crate::{
    Event, Expect, KeyValue, Op, RangeEnd, RangeRequest, RangeResult, Revision, Store, StoreError, TxnOutcome, WatchRequest, WatchStream,
    Written,
};

/// How often expired keys are looked for once there are keys with a TTL.
const SWEEP: Duration = Duration::from_millis(100);

/// A new, empty store at revision 1.
pub fn open() -> Arc<dyn Store> {
    Arc::new(Memory { tables: Arc::new(Tables::default()), hub: Arc::new(Hub::new(1)) })
}

struct Memory {
    tables: Arc<Tables>,
    hub: Arc<Hub>,
}

struct Tables {
    state: Mutex<State>,
}

struct State {
    revision: Revision,
    compacted: Revision,
    /// Per key its versions in revision order; `None` is a delete.
    keys: BTreeMap<Arc<str>, Vec<(Revision, Option<KeyValue>)>>,
    log: Vec<Event>,
    expiries: BTreeMap<Arc<str>, Instant>,
    sweeping: bool,
}

impl Default for Tables {
    fn default() -> Self {
        let state = State { revision: 1, compacted: 0, keys: BTreeMap::new(), log: Vec::new(), expiries: BTreeMap::new(), sweeping: false };
        Self { state: Mutex::new(state) }
    }
}

impl Tables {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn at(versions: &[(Revision, Option<KeyValue>)], revision: Revision) -> Option<&KeyValue> {
        versions.iter().rev().find(|(written, _)| *written <= revision).and_then(|(_, kv)| kv.as_ref())
    }

    fn current(&self, key: &str) -> Option<&KeyValue> {
        self.keys.get(key).and_then(|versions| Self::at(versions, Revision::MAX))
    }

    fn range(&self, request: &RangeRequest) -> Result<RangeResult, StoreError> {
        let revision = if request.revision == 0 { self.revision } else { request.revision };
        if revision > self.revision {
            return Err(StoreError::FutureRevision { requested: revision, current: self.revision });
        }
        if revision < self.compacted {
            return Err(StoreError::Compacted { requested: revision, compacted: self.compacted });
        }
        let mut result = RangeResult { revision, ..RangeResult::default() };
        for (key, versions) in self.keys.range::<str, _>((Bound::Included(request.start.as_str()), Bound::Unbounded)) {
            let inside = match &request.end {
                RangeEnd::Single => **key == *request.start,
                RangeEnd::Prefix(prefix) => key.starts_with(prefix),
                RangeEnd::Before(end) => **key < **end,
            };
            if !inside {
                break;
            }
            let Some(kv) = Self::at(versions, revision) else { continue };
            result.count += 1;
            if request.count_only {
                continue;
            }
            if request.limit > 0 && result.kvs.len() == request.limit {
                result.more = true;
            } else {
                result.kvs.push(kv.clone());
            }
        }
        Ok(result)
    }

    fn put(&mut self, key: &str, value: Bytes, ttl: Option<Duration>) -> Event {
        let previous = self.current(key).cloned();
        let kv = KeyValue {
            key: previous.as_ref().map_or_else(|| Arc::from(key), |kv| Arc::clone(&kv.key)),
            value,
            create_revision: previous.as_ref().map_or(self.revision, |kv| kv.create_revision),
            mod_revision: self.revision,
            version: previous.as_ref().map_or(1, |kv| kv.version + 1),
        };
        self.keys.entry(Arc::clone(&kv.key)).or_default().push((self.revision, Some(kv.clone())));
        match ttl {
            Some(ttl) => self.expiries.insert(Arc::clone(&kv.key), Instant::now() + ttl),
            None => self.expiries.remove(&kv.key),
        };
        Event::Put { kv, previous }
    }

    fn delete(&mut self, key: &str) -> Option<Event> {
        let previous = self.current(key)?.clone();
        let key = Arc::clone(&previous.key);
        self.keys.entry(Arc::clone(&key)).or_default().push((self.revision, None));
        self.expiries.remove(&key);
        Some(Event::Delete { key, revision: self.revision, previous: Some(previous) })
    }

    fn txn(&mut self, ops: Vec<Op>) -> (TxnOutcome, Vec<Event>) {
        for (index, op) in ops.iter().enumerate() {
            let (Op::Put { expect, .. } | Op::Delete { expect, .. }) = op;
            let current = self.current(op.key_name());
            let holds = match expect {
                Expect::Any => true,
                Expect::Absent => current.is_none(),
                Expect::ModRevision(revision) => current.is_some_and(|kv| kv.mod_revision == *revision),
            };
            if !holds {
                return (TxnOutcome::Conflict { index, current: current.cloned(), revision: self.revision }, Vec::new());
            }
        }
        self.revision += 1;
        let mut results = Vec::with_capacity(ops.len());
        let mut events = Vec::with_capacity(ops.len());
        for op in ops {
            let event = match op {
                Op::Put { key, value, ttl, .. } => Some(self.put(&key, value, ttl)),
                Op::Delete { key, .. } => self.delete(&key),
            };
            results.push(match &event {
                Some(Event::Put { kv, previous }) => Written { current: Some(kv.clone()), previous: previous.clone() },
                Some(Event::Delete { previous, .. }) => Written { current: None, previous: previous.clone() },
                None => Written { current: None, previous: None },
            });
            events.extend(event);
        }
        if events.is_empty() {
            self.revision -= 1;
        }
        self.log.extend(events.iter().cloned());
        (TxnOutcome::Done { revision: self.revision, results }, events)
    }

    fn compact(&mut self, revision: Revision) -> Result<(), StoreError> {
        if revision > self.revision {
            return Err(StoreError::FutureRevision { requested: revision, current: self.revision });
        }
        if revision <= self.compacted {
            return Err(StoreError::Compacted { requested: revision, compacted: self.compacted });
        }
        self.compacted = revision;
        self.log.retain(|event| event.revision() > revision);
        self.keys.retain(|_, versions| {
            let first = versions.iter().rposition(|(written, _)| *written <= revision).unwrap_or(0);
            versions.drain(..first);
            !(versions.len() == 1 && versions[0].0 <= revision && versions[0].1.is_none())
        });
        Ok(())
    }
}

impl History for Tables {
    fn events(&self, prefix: &str, from: Revision, to: Revision, _max: usize) -> Result<(Vec<Event>, Revision), StoreError> {
        let state = self.state();
        if from <= state.compacted {
            return Err(StoreError::Compacted { requested: from, compacted: state.compacted });
        }
        let wanted = |event: &&Event| (from..=to).contains(&event.revision()) && event.key().starts_with(prefix);
        Ok((state.log.iter().filter(wanted).cloned().collect(), to))
    }

    fn compacted(&self) -> Result<Revision, StoreError> {
        Ok(self.state().compacted)
    }
}

impl Memory {
    fn write(&self, ops: Vec<Op>) -> Result<TxnOutcome, StoreError> {
        refuse_duplicates(&ops)?;
        let mut state = self.tables.state();
        let (outcome, events) = state.txn(ops);
        if !events.is_empty() {
            // Under the lock, so that publications keep the order of revisions.
            self.hub.publish(state.revision, &events);
        }
        if !state.expiries.is_empty() && !state.sweeping {
            state.sweeping = true;
            self.start_sweeping();
        }
        Ok(outcome)
    }

    fn start_sweeping(&self) {
        let (tables, hub) = (Arc::downgrade(&self.tables), Arc::clone(&self.hub));
        std::thread::spawn(move || {
            while let Some(tables) = tables.upgrade() {
                sweep(&tables, &hub);
                drop(tables);
                std::thread::sleep(SWEEP);
            }
        });
    }
}

fn sweep(tables: &Tables, hub: &Hub) {
    let mut state = tables.state();
    let now = Instant::now();
    let due: Vec<Arc<str>> = state.expiries.iter().filter(|(_, at)| **at <= now).map(|(key, _)| Arc::clone(key)).collect();
    for key in due {
        let (_, events) = state.txn(vec![Op::delete(&*key, Expect::Any)]);
        hub.publish(state.revision, &events);
    }
}

/// A transaction writes each key at most once, as in etcd.
pub(crate) fn refuse_duplicates(ops: &[Op]) -> Result<(), StoreError> {
    for (index, op) in ops.iter().enumerate() {
        if ops[..index].iter().any(|earlier| earlier.key_name() == op.key_name()) {
            return Err(StoreError::DuplicateKey(op.key_name().to_owned()));
        }
    }
    Ok(())
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.hub.close();
    }
}

impl Store for Memory {
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResult, StoreError>> {
        async move { self.tables.state().range(&request) }.boxed()
    }

    fn txn(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        async move { self.write(ops) }.boxed()
    }

    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<WatchStream, StoreError>> {
        async move { watch::open(&self.tables, &self.hub, request) }.boxed()
    }

    fn request_progress(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        async move {
            self.hub.progress();
            Ok(())
        }
        .boxed()
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, StoreError>> {
        async move { Ok(self.tables.state().revision) }.boxed()
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        async move { self.tables.state().compact(revision) }.boxed()
    }

    fn size(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        async move {
            let state = self.tables.state();
            let versions = state.keys.values().flatten().filter_map(|(_, kv)| kv.as_ref());
            Ok(versions.map(|kv| (kv.key.len() + kv.value.len()) as u64).sum())
        }
        .boxed()
    }

    fn health(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn failure(&self) -> BoxFuture<'_, StoreError> {
        std::future::pending().boxed()
    }
}
