//! The default store: redb, every acknowledged write durable, group commit.
//!
//! All versions of a key lie in one table under (key, revision), so a value is written once; a log of (revision, operation) -> (key,
//! previous revision) orders them for watches and for compaction, which removes a version when the entry that superseded it leaves the log.
//! One thread writes: it takes every queued transaction into one redb transaction, syncs once, publishes, and acknowledges.

mod tables;
mod writer;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use redb::backends::FileBackend;
use redb::{Builder, StorageBackend};
use tokio::sync::oneshot;

use crate::memory::refuse_duplicates;
use crate::watch::{self, Hub};
use crate::{Op, RangeEnd, RangeRequest, RangeResult, Revision, Store, StoreError, TxnOutcome, WatchRequest, WatchStream};
use tables::Tables;
use writer::{Command, Writer};

/// How the embedded store behaves.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// The database file; created if missing, mode 0600.
    pub path: PathBuf,
    /// redb's page cache, in bytes.
    pub cache_bytes: usize,
    /// History younger than this is kept...
    pub keep_age: Duration,
    /// ...but never more than so many revisions.
    pub keep_revisions: u64,
}

impl EmbeddedConfig {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), cache_bytes: 8 << 20, keep_age: Duration::from_secs(300), keep_revisions: 50_000 }
    }
}

/// Opens (or creates) the store and starts its writer thread. Dropping the last handle closes it, after what is queued was written.
pub fn open(config: EmbeddedConfig) -> Result<Arc<dyn Store>, StoreError> {
    let file = open_file(&config.path).map_err(backend("open the store's file"))?;
    let storage = FileBackend::new(file).map_err(backend("lock the store's file"))?;
    let mut store = start(storage, &config)?;
    store.path = Some(config.path);
    Ok(Arc::new(store))
}

/// The same over any storage of redb; `config.path` is not used.
pub fn open_storage(storage: impl StorageBackend, config: &EmbeddedConfig) -> Result<Arc<dyn Store>, StoreError> {
    Ok(Arc::new(start(storage, config)?))
}

fn start(storage: impl StorageBackend, config: &EmbeddedConfig) -> Result<Embedded, StoreError> {
    let mut builder = Builder::new();
    builder.set_cache_size(config.cache_bytes);
    let database = builder.create_with_backend(storage).map_err(backend("open the store"))?;
    let tables = Arc::new(Tables::open(database)?);
    let hub = Arc::new(Hub::new(tables.revision()?));
    let (queue, commands) = mpsc::channel();
    let (failed, failure) = tokio::sync::watch::channel(None);
    let writer = Writer::new(Arc::clone(&tables), Arc::clone(&hub), failed, config)?;
    let thread = std::thread::Builder::new()
        .name("store-writer".to_owned())
        .spawn(move || writer.run(&commands))
        .map_err(backend("start the store's writer"))?;
    Ok(Embedded { tables, hub, path: None, failure, queue: Some(queue), thread: Some(thread) })
}

fn open_file(path: &Path) -> std::io::Result<File> {
    let is_new = !path.exists();
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if is_new {
        // Without this the name itself may be lost with the machine's power, and every acknowledged write with it.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
    }
    Ok(file)
}

fn backend<E: std::error::Error + Send + Sync + 'static>(operation: &'static str) -> impl Fn(E) -> StoreError {
    move |source| StoreError::Backend { operation, source: Arc::new(source) }
}

struct Embedded {
    tables: Arc<Tables>,
    hub: Arc<Hub>,
    path: Option<PathBuf>,
    /// Set by the writer, and closed when it ends, as by a panic.
    failure: tokio::sync::watch::Receiver<Option<StoreError>>,
    /// `None` only while dropping.
    queue: Option<mpsc::Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl Embedded {
    async fn send<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Command) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(StoreError::Closed)?;
        queue.send(command(answer)).map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
        self.hub.close();
    }
}

impl Store for Embedded {
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResult, StoreError>> {
        async move {
            if request.end == RangeEnd::Single {
                return self.tables.range(&request);
            }
            let tables = Arc::clone(&self.tables);
            tokio::task::spawn_blocking(move || tables.range(&request)).await.map_err(backend("read a range"))?
        }
        .boxed()
    }

    fn txn(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<TxnOutcome, StoreError>> {
        async move {
            refuse_duplicates(&ops)?;
            self.send(|answer| Command::Write { ops, answer }).await
        }
        .boxed()
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
        async move { Ok(self.hub.revision()) }.boxed()
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        self.send(move |answer| Command::Compact { revision, answer }).boxed()
    }

    fn size(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        async move {
            match &self.path {
                Some(path) => Ok(std::fs::metadata(path).map_err(backend("measure the store's file"))?.len()),
                None => self.tables.stored_bytes(),
            }
        }
        .boxed()
    }

    fn health(&self) -> Result<(), StoreError> {
        let failure = self.failure.borrow().clone();
        match failure {
            Some(error) => Err(error),
            None if self.failure.has_changed().is_err() => Err(StoreError::Closed),
            None => Ok(()),
        }
    }

    fn failure(&self) -> BoxFuture<'_, StoreError> {
        async move {
            let mut failure = self.failure.clone();
            let failed = failure.wait_for(Option::is_some).await.map(|error| error.clone());
            failed.ok().flatten().unwrap_or(StoreError::Closed)
        }
        .boxed()
    }
}
