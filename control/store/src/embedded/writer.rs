//! The one thread that writes: group commit, expiry and compaction.

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use redb::{ReadableTable, Table, WriteTransaction};
use tokio::sync::{oneshot, watch};

use super::tables::{COMPACTED, EXPIRIES, LOG, META, REVISION, Record, Tables, VERSIONS, corrupt, latest};
use super::{EmbeddedConfig, backend};
use crate::watch::{History, Hub};
use crate::{Event, Expect, KeyValue, Op, Revision, StoreError, TxnOutcome, Written};

/// Bounds of one group, so that its first writer doesn't wait for long.
const GROUP_COMMANDS: usize = 1024;
const GROUP_BYTES: usize = 8 << 20;
/// Log entries removed, or keys expired, in one group.
const CHORES: usize = 1000;
/// Expired keys are looked for at most so often.
const SWEEP: Duration = Duration::from_secs(1);

pub(super) enum Command {
    Write { ops: Vec<Op>, answer: Answer<TxnOutcome> },
    Compact { revision: Revision, answer: Answer<()> },
}

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;
/// A queued transaction and who waits for it.
type QueuedWrite = (Vec<Op>, Answer<TxnOutcome>);

pub(super) struct Writer {
    tables: Arc<Tables>,
    hub: Arc<Hub>,
    failed: watch::Sender<Option<StoreError>>,
    keep_age: Duration,
    keep_revisions: u64,
    revision: Revision,
    compacted: Revision,
    /// Everything up to here is to be compacted.
    compact_to: Revision,
    compact_waiters: Vec<(Revision, Answer<()>)>,
    /// When which revision was current, oldest first: history's age.
    marks: VecDeque<(Instant, Revision)>,
    /// Seconds since 1970.
    next_expiry: Option<u64>,
    last_sweep: Option<Instant>,
}

/// What a group does before it's committed.
#[derive(Default)]
struct Group {
    answers: Vec<(Answer<TxnOutcome>, TxnOutcome)>,
    events: Vec<Event>,
    compacted: Option<Revision>,
}

impl Writer {
    pub(super) fn new(
        tables: Arc<Tables>,
        hub: Arc<Hub>,
        failed: watch::Sender<Option<StoreError>>,
        config: &EmbeddedConfig,
    ) -> Result<Self, StoreError> {
        let (revision, compacted, next_expiry) = (tables.revision()?, tables.compacted()?, tables.next_expiry()?);
        Ok(Self {
            tables,
            hub,
            failed,
            keep_age: config.keep_age,
            keep_revisions: config.keep_revisions,
            revision,
            compacted,
            compact_to: compacted,
            compact_waiters: Vec::new(),
            marks: VecDeque::from([(Instant::now(), revision)]),
            next_expiry,
            last_sweep: None,
        })
    }

    /// Works until every sender is gone and the queue is empty.
    pub(super) fn run(mut self, commands: &mpsc::Receiver<Command>) {
        loop {
            let first = match self.idle_for() {
                None => commands.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
                Some(wait) => commands.recv_timeout(wait),
            };
            let mut queued = Vec::new();
            match first {
                Ok(command) => queued.push(command),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
            let mut bytes = 0;
            while queued.len() < GROUP_COMMANDS && bytes < GROUP_BYTES {
                let Ok(command) = commands.try_recv() else { break };
                bytes += payload(&command);
                queued.push(command);
            }
            self.step(queued);
        }
    }

    /// One group: writes, chores, commit, publish, acknowledge.
    fn step(&mut self, queued: Vec<Command>) {
        let mut writes = Vec::new();
        for command in queued {
            match command {
                Command::Write { ops, answer } => writes.push((ops, answer)),
                Command::Compact { revision, answer } => self.accept_compaction(revision, answer),
            }
        }
        self.age_history();
        let before = self.revision;
        match self.commit(writes) {
            Ok(group) => {
                if let Some(compacted) = group.compacted {
                    self.compacted = compacted;
                }
                if !group.events.is_empty() {
                    self.hub.publish(self.revision, &group.events);
                }
                for (answer, outcome) in group.answers {
                    // A caller that went away doesn't need to know.
                    let _ = answer.send(Ok(outcome));
                }
                self.answer_compactions();
            }
            Err(error) => {
                self.revision = before;
                tracing::error!(%error, "a group of writes failed");
                // Don't spin on the chore that failed.
                self.next_expiry = None;
                self.compact_to = self.compacted;
                for (_, answer) in self.compact_waiters.drain(..) {
                    let _ = answer.send(Err(error.clone()));
                }
                // After an I/O error the database refuses everything until it's opened anew, which its readers stand in the way of.
                if self.tables.database.begin_write().is_err() {
                    self.failed.send_replace(Some(error));
                }
            }
        }
    }

    /// How long to sleep without commands; `None`: until one comes.
    fn idle_for(&self) -> Option<Duration> {
        if self.compact_to > self.compacted {
            return Some(Duration::ZERO);
        }
        let oldest = self.marks.iter().find(|(_, revision)| *revision > self.compacted);
        let compaction = oldest.map(|(at, _)| (*at + self.keep_age).saturating_duration_since(Instant::now()));
        let expiry = self.next_expiry.map(|at| {
            let pause = self.last_sweep.map_or(Duration::ZERO, |last| (last + SWEEP).saturating_duration_since(Instant::now()));
            (UNIX_EPOCH + Duration::from_secs(at)).duration_since(SystemTime::now()).unwrap_or_default().max(pause)
        });
        [compaction, expiry].into_iter().flatten().min()
    }

    fn accept_compaction(&mut self, revision: Revision, answer: Answer<()>) {
        let refusal = if revision > self.revision {
            Some(StoreError::FutureRevision { requested: revision, current: self.revision })
        } else if revision <= self.compacted {
            Some(StoreError::Compacted { requested: revision, compacted: self.compacted })
        } else {
            None
        };
        match refusal {
            Some(error) => {
                let _ = answer.send(Err(error));
            }
            None => {
                self.compact_to = self.compact_to.max(revision);
                self.compact_waiters.push((revision, answer));
            }
        }
    }

    fn answer_compactions(&mut self) {
        let compacted = self.compacted;
        for (_, answer) in self.compact_waiters.extract_if(.., |(revision, _)| *revision <= compacted) {
            let _ = answer.send(Ok(()));
        }
    }

    /// Raises the compaction target to what is older than `keep_age` or more than `keep_revisions` back.
    fn age_history(&mut self) {
        let now = Instant::now();
        // About 30 marks span the age.
        let newest = self.marks.back();
        if newest.is_none_or(|(at, revision)| now.duration_since(*at) >= self.keep_age / 30 && *revision < self.revision) {
            self.marks.push_back((now, self.revision));
        }
        while let Some((at, revision)) = self.marks.front()
            && now.duration_since(*at) >= self.keep_age
        {
            self.compact_to = self.compact_to.max(*revision);
            self.marks.pop_front();
        }
        self.compact_to = self.compact_to.max(self.revision.saturating_sub(self.keep_revisions));
    }

    fn commit(&mut self, writes: Vec<QueuedWrite>) -> Result<Group, StoreError> {
        let mut group = Group::default();
        let transaction = match self.tables.database.begin_write() {
            Ok(transaction) => transaction,
            Err(error) => return Err(fail_all(writes, group, backend("begin a write")(error))),
        };
        let mut rest = writes.into_iter();
        if let Err(error) = self.fill(&transaction, &mut rest, &mut group) {
            return Err(fail_all(rest.collect(), group, error));
        }
        let changed = !group.events.is_empty() || group.compacted.is_some();
        let ended = if changed {
            transaction.commit().map_err(backend("commit"))
        } else {
            transaction.abort().map_err(backend("end a write without changes"))
        };
        match ended {
            Ok(()) => Ok(group),
            Err(error) => Err(fail_all(Vec::new(), group, error)),
        }
    }

    fn fill(
        &mut self,
        transaction: &WriteTransaction,
        writes: &mut impl Iterator<Item = QueuedWrite>,
        group: &mut Group,
    ) -> Result<(), StoreError> {
        let mut open = Open {
            versions: transaction.open_table(VERSIONS).map_err(backend("open a table"))?,
            log: transaction.open_table(LOG).map_err(backend("open a table"))?,
            expiries: transaction.open_table(EXPIRIES).map_err(backend("open a table"))?,
            now: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        };
        let first = self.revision;
        for (ops, answer) in writes {
            match open.txn(ops, self.revision, &mut group.events) {
                Ok(outcome) => {
                    if let TxnOutcome::Done { revision, .. } = &outcome {
                        self.revision = *revision;
                    }
                    group.answers.push((answer, outcome));
                }
                Err(error) => {
                    let _ = answer.send(Err(error.clone()));
                    return Err(error);
                }
            }
        }
        self.sweep(&mut open, group)?;
        if self.compact_to > self.compacted {
            group.compacted = Some(open.compact(self.compacted, self.compact_to.min(first))?);
        }
        if self.revision != first || group.compacted.is_some() {
            let mut meta = transaction.open_table(META).map_err(backend("open a table"))?;
            meta.insert(REVISION, self.revision).map_err(backend("write a counter"))?;
            meta.insert(COMPACTED, group.compacted.unwrap_or(self.compacted)).map_err(backend("write a counter"))?;
        }
        self.next_expiry = open.expiries.first().map_err(backend("read expiries"))?.map(|(at, _)| at.value().0);
        Ok(())
    }

    fn sweep(&mut self, open: &mut Open<'_>, group: &mut Group) -> Result<(), StoreError> {
        if self.next_expiry.is_none_or(|at| at > open.now.as_secs()) || self.last_sweep.is_some_and(|last| last.elapsed() < SWEEP) {
            return Ok(());
        }
        self.last_sweep = Some(Instant::now());
        for key in open.expired()? {
            // One revision each, as if a client had deleted them.
            if let TxnOutcome::Done { revision, .. } = open.txn(vec![Op::delete(key, Expect::Any)], self.revision, &mut group.events)? {
                self.revision = revision;
            }
        }
        Ok(())
    }
}

/// Answers everything that a failed group held; hands the error back.
fn fail_all(rest: Vec<QueuedWrite>, group: Group, error: StoreError) -> StoreError {
    let answers = group.answers.into_iter().map(|(answer, _)| answer).chain(rest.into_iter().map(|(_, answer)| answer));
    for answer in answers {
        let _ = answer.send(Err(error.clone()));
    }
    error
}

fn payload(command: &Command) -> usize {
    let Command::Write { ops, .. } = command else { return 0 };
    ops.iter().map(|op| if let Op::Put { value, .. } = op { value.len() } else { 0 }).sum()
}

/// The tables of a running write transaction.
struct Open<'t> {
    versions: Table<'t, (&'static str, u64), &'static [u8]>,
    log: Table<'t, (u64, u32), (&'static str, u64)>,
    expiries: Table<'t, (u64, &'static str), ()>,
    /// Since 1970.
    now: Duration,
}

/// A key before a write: as callers see it, and when it would have expired.
struct Before {
    kv: Option<KeyValue>,
    expiry: u64,
}

impl Open<'_> {
    fn before(&self, key: &str) -> Result<Before, StoreError> {
        let found = latest(&self.versions, key, Revision::MAX, |mod_revision, record| Before {
            kv: record.key_value(Arc::from(key), mod_revision),
            expiry: record.expiry,
        })?;
        Ok(found.unwrap_or(Before { kv: None, expiry: 0 }))
    }

    /// Applies a transaction on top of `current`; its events are appended.
    fn txn(&mut self, ops: Vec<Op>, current: Revision, events: &mut Vec<Event>) -> Result<TxnOutcome, StoreError> {
        let mut befores = Vec::with_capacity(ops.len());
        for (index, op) in ops.iter().enumerate() {
            let (Op::Put { expect, .. } | Op::Delete { expect, .. }) = op;
            let before = self.before(op.key_name())?;
            let holds = match expect {
                Expect::Any => true,
                Expect::Absent => before.kv.is_none(),
                Expect::ModRevision(revision) => before.kv.as_ref().is_some_and(|kv| kv.mod_revision == *revision),
            };
            if !holds {
                return Ok(TxnOutcome::Conflict { index, current: before.kv, revision: current });
            }
            befores.push(before);
        }
        let revision = current + 1;
        let mut results = Vec::with_capacity(ops.len());
        let mut changes = 0;
        for (op, before) in ops.into_iter().zip(befores) {
            let written = self.apply(op, before, revision, changes)?;
            if let Some(event) = event_of(&written, revision) {
                events.push(event);
                changes += 1;
            }
            results.push(written);
        }
        Ok(TxnOutcome::Done { revision: if changes > 0 { revision } else { current }, results })
    }

    fn apply(&mut self, op: Op, before: Before, revision: Revision, index: u32) -> Result<Written, StoreError> {
        let Before { kv: previous, expiry: old_expiry } = before;
        let (key, value, expiry) = match op {
            Op::Put { key, value, ttl, .. } => (key, Some(value), ttl.map_or(0, |ttl| seconds_rounded_up(self.now.saturating_add(ttl)))),
            Op::Delete { key, .. } => (key, None, 0),
        };
        if value.is_none() && previous.is_none() {
            return Ok(Written { current: None, previous: None });
        }
        let record = Record {
            deleted: value.is_none(),
            create_revision: previous.as_ref().map_or(revision, |kv| kv.create_revision),
            version: previous.as_ref().map_or(0, |kv| kv.version) + u64::from(value.is_some()),
            expiry,
            value: value.as_deref().unwrap_or_default(),
        };
        let (version, create_revision) = (record.version, record.create_revision);
        self.versions.insert((key.as_str(), revision), record.encode().as_slice()).map_err(backend("write a key"))?;
        let superseded = previous.as_ref().map_or(0, |kv| kv.mod_revision);
        self.log.insert((revision, index), (key.as_str(), superseded)).map_err(backend("write the log"))?;
        if old_expiry != 0 && previous.is_some() {
            self.expiries.remove((old_expiry, key.as_str())).map_err(backend("write an expiry"))?;
        }
        if expiry != 0 {
            self.expiries.insert((expiry, key.as_str()), ()).map_err(backend("write an expiry"))?;
        }
        let name = previous.as_ref().map_or_else(|| Arc::from(key), |kv| Arc::clone(&kv.key));
        let current = value.map(|value| KeyValue { key: name, value, create_revision, mod_revision: revision, version });
        Ok(Written { current, previous })
    }

    fn expired(&self) -> Result<Vec<String>, StoreError> {
        let mut keys = Vec::new();
        for entry in self.expiries.range(..(self.now.as_secs() + 1, "")).map_err(backend("read expiries"))?.take(CHORES) {
            let (position, _) = entry.map_err(backend("read expiries"))?;
            keys.push(position.value().1.to_owned());
        }
        Ok(keys)
    }

    /// Removes what was superseded after `from` and up to `to`, whole revisions, about `CHORES` entries; returns how far it came.
    fn compact(&mut self, from: Revision, to: Revision) -> Result<Revision, StoreError> {
        let mut entries: Vec<(Revision, u32, String, Revision)> = Vec::new();
        let mut reached = to;
        for entry in self.log.range((from, 0)..=(to, u32::MAX)).map_err(backend("compact"))? {
            let (position, change) = entry.map_err(backend("compact"))?;
            let (revision, index) = position.value();
            if entries.len() >= CHORES && entries.last().is_some_and(|(last, ..)| *last != revision) {
                reached = revision - 1;
                break;
            }
            let (key, superseded) = change.value();
            entries.push((revision, index, key.to_owned(), superseded));
        }
        for (revision, index, key, superseded) in entries {
            if superseded != 0 {
                self.versions.remove((key.as_str(), superseded)).map_err(backend("compact"))?;
            }
            let deleted = match self.versions.get((key.as_str(), revision)).map_err(backend("compact"))? {
                Some(bytes) => Record::decode(bytes.value())?.deleted,
                None => return Err(corrupt("a logged version is missing")),
            };
            if deleted {
                self.versions.remove((key.as_str(), revision)).map_err(backend("compact"))?;
            }
            self.log.remove((revision, index)).map_err(backend("compact"))?;
        }
        Ok(reached)
    }
}

/// So that no key goes before its time.
fn seconds_rounded_up(moment: Duration) -> u64 {
    moment.as_secs() + u64::from(moment.subsec_nanos() > 0)
}

fn event_of(written: &Written, revision: Revision) -> Option<Event> {
    match (&written.current, &written.previous) {
        (Some(kv), previous) => Some(Event::Put { kv: kv.clone(), previous: previous.clone() }),
        (None, Some(previous)) => Some(Event::Delete { key: Arc::clone(&previous.key), revision, previous: Some(previous.clone()) }),
        (None, None) => None,
    }
}
