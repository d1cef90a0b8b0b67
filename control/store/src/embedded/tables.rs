//! The tables, their records, and reading them.

use std::sync::Arc;

use bytes::Bytes;
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};

use super::backend;
use crate::watch::History;
use crate::{Event, KeyValue, RangeEnd, RangeRequest, RangeResult, Revision, StoreError};

/// (key, revision) -> record: every version of every key that isn't compacted.
pub(super) const VERSIONS: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("versions");
/// (revision, operation) -> (key, the revision it superseded or 0).
pub(super) const LOG: TableDefinition<'_, (u64, u32), (&str, u64)> = TableDefinition::new("log");
/// (expiry in seconds since 1970, key): keys that the store deletes by itself.
pub(super) const EXPIRIES: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("expiries");
/// The counters below.
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

pub(super) const REVISION: &str = "revision";
pub(super) const COMPACTED: &str = "compacted";
const FORMAT: &str = "format";
/// Raised when a release can't read the files of the one before.
const FORMAT_VERSION: u64 = 1;

/// Length of a record's fixed part: kind, create revision, version, expiry.
const HEADER: usize = 25;

/// One version of one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub deleted: bool,
    pub create_revision: Revision,
    pub version: u64,
    /// Seconds since 1970; 0 = never.
    pub expiry: u64,
    pub value: &'a [u8],
}

impl<'a> Record<'a> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.value.len());
        out.push(u8::from(self.deleted));
        out.extend_from_slice(&self.create_revision.to_le_bytes());
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&self.expiry.to_le_bytes());
        out.extend_from_slice(self.value);
        out
    }

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self, StoreError> {
        let number = |at: usize| bytes.get(at..at + 8).and_then(|part| part.try_into().ok()).map(u64::from_le_bytes);
        let parts = (|| Some((*bytes.first()?, number(1)?, number(9)?, number(17)?)))();
        let (kind, create_revision, version, expiry) = parts.ok_or_else(|| corrupt("a record is too short"))?;
        Ok(Self { deleted: kind != 0, create_revision, version, expiry, value: &bytes[HEADER..] })
    }

    pub(super) fn key_value(&self, key: Arc<str>, mod_revision: Revision) -> Option<KeyValue> {
        (!self.deleted).then(|| KeyValue {
            key,
            value: Bytes::copy_from_slice(self.value),
            create_revision: self.create_revision,
            mod_revision,
            version: self.version,
        })
    }
}

pub(super) fn corrupt(what: &'static str) -> StoreError {
    backend("read the store")(std::io::Error::new(std::io::ErrorKind::InvalidData, what))
}

/// The latest version of a key, deleted or not.
pub(super) fn latest<T>(
    versions: &impl ReadableTable<(&'static str, u64), &'static [u8]>,
    key: &str,
    at: Revision,
    read: impl FnOnce(Revision, Record<'_>) -> T,
) -> Result<Option<T>, StoreError> {
    let mut found = versions.range((key, 0)..=(key, at)).map_err(backend("read a key"))?;
    let Some(entry) = found.next_back() else { return Ok(None) };
    let (position, bytes) = entry.map_err(backend("read a key"))?;
    Ok(Some(read(position.value().1, Record::decode(bytes.value())?)))
}

/// The open database.
pub(super) struct Tables {
    pub(super) database: Database,
}

impl Tables {
    /// Makes the tables of a new database, refuses one of another format.
    pub(super) fn open(database: Database) -> Result<Self, StoreError> {
        let tables = Self { database };
        let format = {
            let read = tables.database.begin_read().map_err(backend("read the store"))?;
            match read.open_table(META) {
                Ok(meta) => meta.get(FORMAT).map_err(backend("read the store's format"))?.map(|format| format.value()),
                Err(redb::TableError::TableDoesNotExist(_)) => None,
                Err(error) => return Err(backend("read the store's format")(error)),
            }
        };
        match format {
            Some(FORMAT_VERSION) => {}
            Some(_) => return Err(corrupt("the store was written by a newer release")),
            None => tables.create()?,
        }
        Ok(tables)
    }

    fn create(&self) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(backend("create the store"))?;
        {
            write.open_table(VERSIONS).map_err(backend("create the store"))?;
            write.open_table(LOG).map_err(backend("create the store"))?;
            write.open_table(EXPIRIES).map_err(backend("create the store"))?;
            let mut meta = write.open_table(META).map_err(backend("create the store"))?;
            for (name, value) in [(FORMAT, FORMAT_VERSION), (REVISION, 1), (COMPACTED, 0)] {
                meta.insert(name, value).map_err(backend("create the store"))?;
            }
        }
        write.commit().map_err(backend("create the store"))
    }

    fn begin(&self) -> Result<ReadTransaction, StoreError> {
        self.database.begin_read().map_err(backend("read the store"))
    }

    fn counter(read: &ReadTransaction, name: &str) -> Result<u64, StoreError> {
        let meta = read.open_table(META).map_err(backend("read a counter"))?;
        let value = meta.get(name).map_err(backend("read a counter"))?.ok_or_else(|| corrupt("a counter is missing"))?;
        Ok(value.value())
    }

    pub(super) fn revision(&self) -> Result<Revision, StoreError> {
        Self::counter(&self.begin()?, REVISION)
    }

    /// The first moment at which a key expires, in seconds since 1970.
    pub(super) fn next_expiry(&self) -> Result<Option<u64>, StoreError> {
        let read = self.begin()?;
        let expiries = read.open_table(EXPIRIES).map_err(backend("read expiries"))?;
        let first = expiries.first().map_err(backend("read expiries"))?;
        Ok(first.map(|(at, _)| at.value().0))
    }

    /// Bytes that the versions take, without what is free for reuse.
    pub(super) fn stored_bytes(&self) -> Result<u64, StoreError> {
        let read = self.begin()?;
        let versions = read.open_table(VERSIONS).map_err(backend("measure the store"))?;
        let stats = versions.stats().map_err(backend("measure the store"))?;
        Ok(stats.stored_bytes() + stats.metadata_bytes() + stats.fragmented_bytes())
    }

    pub(super) fn range(&self, request: &RangeRequest) -> Result<RangeResult, StoreError> {
        let read = self.begin()?;
        let current = Self::counter(&read, REVISION)?;
        let revision = if request.revision == 0 { current } else { request.revision };
        if revision > current {
            return Err(StoreError::FutureRevision { requested: revision, current });
        }
        let compacted = Self::counter(&read, COMPACTED)?;
        if revision < compacted {
            return Err(StoreError::Compacted { requested: revision, compacted });
        }
        let versions = read.open_table(VERSIONS).map_err(backend("read a range"))?;
        let mut result = RangeResult { revision, ..RangeResult::default() };
        if request.end == RangeEnd::Single {
            let key = request.start.as_str();
            let found = latest(&versions, key, revision, |mod_revision, record| record.key_value(Arc::from(key), mod_revision))?.flatten();
            result.count = u64::from(found.is_some());
            result.kvs.extend(found.filter(|_| !request.count_only));
            return Ok(result);
        }
        scan(&versions, request, revision, &mut result)?;
        Ok(result)
    }
}

/// Walks the versions in order; of each key the last one up to `revision` counts.
fn scan(
    versions: &impl ReadableTable<(&'static str, u64), &'static [u8]>,
    request: &RangeRequest,
    revision: Revision,
    result: &mut RangeResult,
) -> Result<(), StoreError> {
    let mut walk = versions.range((request.start.as_str(), 0)..).map_err(backend("read a range"))?.peekable();
    while let Some(entry) = walk.next() {
        let (position, bytes) = entry.map_err(backend("read a range"))?;
        let (key, mod_revision) = position.value();
        let inside = match &request.end {
            RangeEnd::Single => key == request.start,
            RangeEnd::Prefix(prefix) => key.starts_with(prefix.as_str()),
            RangeEnd::Before(end) => key < end.as_str(),
        };
        if !inside {
            break;
        }
        let superseded = match walk.peek() {
            Some(Ok((next, _))) => next.value().0 == key && next.value().1 <= revision,
            _ => false,
        };
        if superseded || mod_revision > revision {
            continue;
        }
        let record = Record::decode(bytes.value())?;
        if record.deleted {
            continue;
        }
        result.count += 1;
        if request.count_only {
            continue;
        }
        if request.limit > 0 && result.kvs.len() == request.limit {
            result.more = true;
        } else {
            result.kvs.extend(record.key_value(Arc::from(key), mod_revision));
        }
    }
    Ok(())
}

impl History for Tables {
    fn events(&self, prefix: &str, from: Revision, to: Revision, max: usize) -> Result<(Vec<Event>, Revision), StoreError> {
        let read = self.begin()?;
        let compacted = Self::counter(&read, COMPACTED)?;
        if from <= compacted {
            return Err(StoreError::Compacted { requested: from, compacted });
        }
        let versions = read.open_table(VERSIONS).map_err(backend("read history"))?;
        let log = read.open_table(LOG).map_err(backend("read history"))?;
        let version = |key: &Arc<str>, revision: Revision| -> Result<Option<KeyValue>, StoreError> {
            let bytes = versions.get((&**key, revision)).map_err(backend("read history"))?;
            let bytes = bytes.ok_or_else(|| corrupt("a logged version is missing"))?;
            Ok(Record::decode(bytes.value())?.key_value(Arc::clone(key), revision))
        };
        let mut events = Vec::new();
        let mut last = 0;
        for (seen, entry) in log.range((from, 0)..=(to, u32::MAX)).map_err(backend("read history"))?.enumerate() {
            let (position, change) = entry.map_err(backend("read history"))?;
            let (revision, _) = position.value();
            if seen >= max && revision != last {
                return Ok((events, last));
            }
            last = revision;
            let (key, superseded) = change.value();
            if !key.starts_with(prefix) {
                continue;
            }
            let key: Arc<str> = Arc::from(key);
            let previous = if superseded == 0 { None } else { version(&key, superseded)? };
            events.push(match version(&key, revision)? {
                Some(kv) => Event::Put { kv, previous },
                None => Event::Delete { key, revision, previous },
            });
        }
        Ok((events, to))
    }

    fn compacted(&self) -> Result<Revision, StoreError> {
        Self::counter(&self.begin()?, COMPACTED)
    }
}
