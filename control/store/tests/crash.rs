//! Durability: processes killed at any moment, and power cut with half-written sectors, lose no acknowledged write.
//!
//! Without the test harness, because this program starts itself as the victim.

// A test, though without the harness that would tell clippy so.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use outrigger_store::embedded::{self, EmbeddedConfig};
use outrigger_store::{Expect, Op, RangeRequest, Store, StoreError, WatchRequest, WriteOutcome};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redb::StorageBackend;

const VICTIM: &str = "OUTRIGGER_STORE_VICTIM";

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if let Some(path) = std::env::var_os(VICTIM) {
        runtime.block_on(write_until_killed(EmbeddedConfig::new(path)));
        return;
    }
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    killed_process_loses_nothing(&runtime, &mut random);
    println!("killed_process_loses_nothing ... ok");
    for _ in 0..60 {
        cut_power_loses_nothing(&runtime, &mut random);
    }
    println!("cut_power_loses_nothing ... ok");
    failing_disk_is_reported(&runtime);
    println!("failing_disk_is_reported ... ok");
}

fn config_for(path: &std::path::Path) -> EmbeddedConfig {
    // Short history, so that compaction runs in the middle of it all.
    EmbeddedConfig { keep_revisions: 200, ..EmbeddedConfig::new(path) }
}

/// Many writers over few keys; prints `key version` after each acknowledgement.
async fn write_until_killed(config: EmbeddedConfig) {
    let store = embedded::open(config_for(&config.path)).unwrap();
    let writers: Vec<_> = (0..16).map(|number| tokio::spawn(rewrite_for_ever(Arc::clone(&store), format!("/k/{number:02}")))).collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

async fn rewrite_for_ever(store: Arc<dyn Store>, key: String) {
    loop {
        let text = Bytes::from(vec![b'x'; 700]);
        let WriteOutcome::Done { written, .. } = store.write(Op::put(key.as_str(), text)).await.unwrap() else {
            panic!("an unconditional write met a conflict")
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{key} {}", written.current.unwrap().version).unwrap();
        out.flush().unwrap();
    }
}

fn killed_process_loses_nothing(runtime: &tokio::runtime::Runtime, random: &mut StdRng) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let mut acknowledged: BTreeMap<String, u64> = BTreeMap::new();
    for _ in 0..12 {
        let mut victim = Command::new(std::env::current_exe().unwrap()).env(VICTIM, &path).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let kill_after = random.random_range(1..400);
        let delay = Duration::from_micros(random.random_range(0..3000));
        for (seen, line) in lines.map_while(Result::ok).enumerate() {
            // The last line may be cut short by the kill; it's then no acknowledgement.
            if let Some((key, version)) = line.split_once(' ')
                && let Ok(version) = version.parse()
            {
                acknowledged.insert(key.to_owned(), version);
            }
            if seen == kill_after {
                std::thread::sleep(delay);
                victim.kill().unwrap();
            }
        }
        victim.wait().unwrap();
        let store = embedded::open(config_for(&path)).unwrap();
        runtime.block_on(check(&*store, &acknowledged));
    }
    assert_eq!(acknowledged.len(), 16, "the victims wrote");
}

/// Everything acknowledged is there, and the store hangs together.
async fn check(store: &dyn Store, acknowledged: &BTreeMap<String, u64>) {
    let all = store.range(RangeRequest::prefix("/")).await.unwrap();
    let found: BTreeMap<&str, u64> = all.kvs.iter().map(|kv| (&*kv.key, kv.version)).collect();
    for (key, version) in acknowledged {
        assert!(found.get(key.as_str()).is_some_and(|there| there >= version), "{key} at {version} is lost: {found:?}");
    }
    let revision = store.revision().await.unwrap();
    assert!(all.kvs.iter().all(|kv| kv.mod_revision <= revision));
    assert_eq!(store.range(RangeRequest::prefix("/").count_only()).await.unwrap().count, found.len() as u64);
    // History reads to its end: the log and the versions agree.
    let from = revision.saturating_sub(100).max(1);
    if let Ok(mut watch) = store.watch(WatchRequest::new("/", from)).await {
        store.request_progress().await.unwrap();
        while futures::StreamExt::next(&mut watch).await.unwrap().unwrap().revision < revision {}
    }
}

/// A disk that forgets: writes reach the platter at a sync; when the power goes, any part of the others does, in any order, torn at sectors.
#[derive(Debug, Default)]
struct Disk {
    state: Mutex<DiskState>,
}

#[derive(Debug, Default)]
struct DiskState {
    seen: Vec<u8>,
    platter: Vec<u8>,
    unsynced: Vec<Change>,
    syncs_left: Option<u32>,
}

#[derive(Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Length(usize),
}

#[derive(Debug, Clone)]
struct DiskHandle(Arc<Disk>);

const SECTOR: usize = 512;

impl DiskHandle {
    fn with<T>(&self, use_state: impl FnOnce(&mut DiskState) -> T) -> T {
        use_state(&mut self.0.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What a machine finds after the power came back.
    fn after_power_cut(&self, random: &mut StdRng) -> Vec<u8> {
        self.with(|state| {
            let mut platter = state.platter.clone();
            for change in &state.unsynced {
                match change {
                    Change::Length(length) if random.random_bool(0.5) => platter.resize(*length, 0),
                    Change::Length(_) => {}
                    Change::Write(at, bytes) => {
                        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                            let start = at + number * SECTOR;
                            if random.random_bool(0.5) && start + sector.len() <= platter.len() {
                                platter[start..start + sector.len()].copy_from_slice(sector);
                            }
                        }
                    }
                }
            }
            platter
        })
    }
}

impl StorageBackend for DiskHandle {
    fn len(&self) -> Result<u64, std::io::Error> {
        Ok(self.with(|state| state.seen.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        let start = offset as usize;
        self.with(|state| out.copy_from_slice(&state.seen[start..start + out.len()]));
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
        self.with(|state| {
            state.seen.resize(len as usize, 0);
            state.unsynced.push(Change::Length(len as usize));
        });
        Ok(())
    }

    fn sync_data(&self) -> Result<(), std::io::Error> {
        self.with(|state| {
            if let Some(left) = &mut state.syncs_left {
                if *left == 0 {
                    return Err(std::io::Error::other("the power is gone"));
                }
                *left -= 1;
            }
            state.platter = state.seen.clone();
            state.unsynced.clear();
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        let start = offset as usize;
        self.with(|state| {
            state.seen[start..start + data.len()].copy_from_slice(data);
            state.unsynced.push(Change::Write(start, data.to_vec()));
        });
        Ok(())
    }
}

fn cut_power_loses_nothing(runtime: &tokio::runtime::Runtime, random: &mut StdRng) {
    let config = config_for(std::path::Path::new("unused"));
    let disk = DiskHandle(Arc::default());
    let store = embedded::open_storage(disk.clone(), &config).unwrap();
    let mut acknowledged: BTreeMap<String, u64> = BTreeMap::new();
    // The power goes at one of the next syncs: what was written for it stays unsynced.
    disk.with(|state| state.syncs_left = Some(random.random_range(1..60)));
    let written = runtime.block_on(async {
        let (acknowledge, mut acknowledgements) = tokio::sync::mpsc::unbounded_channel();
        for number in 0..4 {
            let (store, acknowledge) = (Arc::clone(&store), acknowledge.clone());
            let mut random = StdRng::seed_from_u64(random.random());
            tokio::spawn(async move {
                let key = format!("/k/{number}");
                loop {
                    let text = Bytes::from(vec![b'x'; random.random_range(1..3000)]);
                    let Ok(WriteOutcome::Done { written, .. }) = store.write(Op::put(key.as_str(), text)).await else { return };
                    let _ = acknowledge.send((key.clone(), written.current.map_or(0, |kv| kv.version)));
                }
            });
        }
        drop((acknowledge, store));
        while let Some((key, version)) = acknowledgements.recv().await {
            acknowledged.insert(key, version);
        }
        acknowledged
    });
    let rescued = DiskHandle(Arc::default());
    let image = disk.after_power_cut(random);
    rescued.with(|state| {
        state.seen = image.clone();
        state.platter = image;
    });
    let store = embedded::open_storage(rescued, &config).unwrap();
    runtime.block_on(async {
        check(&*store, &written).await;
        // And it can be written on.
        let outcome = store.write(Op::delete("/k/0", Expect::Any)).await.unwrap();
        assert!(matches!(outcome, WriteOutcome::Done { .. }));
    });
}

fn failing_disk_is_reported(runtime: &tokio::runtime::Runtime) {
    let config = config_for(std::path::Path::new("unused"));
    let disk = DiskHandle(Arc::default());
    let store = embedded::open_storage(disk.clone(), &config).unwrap();
    runtime.block_on(async {
        store.write(Op::put("/k", Bytes::from_static(b"kept"))).await.unwrap();
        assert!(store.health().is_ok());
        disk.with(|state| state.syncs_left = Some(0));
        assert!(store.write(Op::put("/k", Bytes::from_static(b"refused"))).await.is_err());
        assert!(matches!(store.failure().await, StoreError::Backend { .. }));
        assert!(store.health().is_err());
    });
    drop(store);
    // The disk works again: what was acknowledged is there, and the store can be written.
    disk.with(|state| state.syncs_left = None);
    let store = embedded::open_storage(disk, &config).unwrap();
    runtime.block_on(async {
        check(&*store, &BTreeMap::from([("/k".to_owned(), 1)])).await;
        store.write(Op::put("/k", Bytes::from_static(b"new"))).await.unwrap();
        assert!(store.health().is_ok());
    });
}
